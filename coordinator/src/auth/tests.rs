//! Who may call what, over the wire: every RPC with every role and without any.

use prost::Message;
use trainyard_common::ids::{Sequence, UserName};
use trainyard_common::record::Record;
use trainyard_common::time::Timestamp;
use trainyard_coordinator_core::Snapshot;

use super::*;
use crate::store::Loaded;
use crate::testing;

/// Every RPC of our proto files.
fn served() -> Vec<String> {
    let set = prost_types::FileDescriptorSet::decode(trainyard_proto::DESCRIPTORS).unwrap();
    let mut paths = Vec::new();
    for file in set.file {
        for service in &file.service {
            for method in &service.method {
                paths.push(format!(
                    "/{}.{}/{}",
                    file.package(),
                    service.name(),
                    method.name()
                ));
            }
        }
    }
    paths
}

fn gate() -> Gate {
    let loaded = Loaded {
        snapshot: Snapshot::default(),
        sequence: Sequence(0),
    };
    let read = Arc::new(ReadModel::new(&loaded));
    let clock = Clock::start();
    let users = Role::ALL
        .iter()
        .map(|role| Record::User(Box::new(testing::user(role.as_str(), *role))));
    let node = Record::Node(Box::new(testing::node(1)));
    read.publish(users.chain([node]).collect(), Sequence(1));
    Gate::new(read, clock, Activity::new(clock))
}

fn peer(identity: Option<Identity>) -> Peer {
    Peer {
        addr: ([127, 0, 0, 1], 1).into(),
        identity,
        serial: None,
        not_after: None,
        connection_id: 1,
    }
}

fn user(name: &str) -> Peer {
    peer(Some(Identity::User(name.parse::<UserName>().unwrap())))
}

fn node(number: u32) -> Peer {
    peer(Some(Identity::Node(NodeId(number))))
}

fn code(gate: &Gate, path: &str, peer: &Peer) -> Result<(), ErrorCode> {
    gate.admit(path, Some(peer))
        .map(drop)
        .map_err(|refusal| refusal.code)
}

#[test]
fn every_rpc_is_in_the_table_and_the_table_has_no_other_of_ours() {
    let served = served();
    assert!(served.len() >= 22, "{served:?}");
    for path in &served {
        assert!(rule(path).is_some(), "{path} has no rule");
    }
    for (path, _) in RULES
        .iter()
        .filter(|(path, _)| path.starts_with("/trainyard."))
    {
        assert!(
            served.iter().any(|served| served == path),
            "{path} is not served"
        );
    }
}

#[test]
fn the_matrix_of_roles() {
    let gate = gate();
    // The RPCs that each kind of caller may call, written down a second time as sentences of the design.
    let nodes: &[&str] = &[
        "AgentService/Session",
        "AgentService/PushLogs",
        "BlobService/Missing",
        "BlobService/Upload",
        "BlobService/Download",
        "EnrollService/Enroll",
        "EnrollService/Renew",
        "AdminService/WhoAmI",
    ];
    let viewer: &[&str] = &[
        "JobService/Get",
        "JobService/List",
        "JobService/Watch",
        "LogService/Read",
        "NodeService/List",
        "NodeService/Get",
        "BlobService/Missing",
        "BlobService/Download",
        "EnrollService/Enroll",
        "EnrollService/Renew",
        "AdminService/WhoAmI",
    ];
    let more_as_user: &[&str] = &[
        "JobService/Submit",
        "JobService/Cancel",
        "BlobService/Upload",
    ];
    let more_as_operator: &[&str] = &[
        "NodeService/SetPolicy",
        "NodeService/Remove",
        "NodeService/ConfirmLost",
    ];
    let more_as_admin: &[&str] = &[
        "AdminService/CreateToken",
        "AdminService/ListTokens",
        "AdminService/RevokeToken",
        "AdminService/InjectFault",
    ];
    let may = |lists: &[&[&str]], path: &str| {
        let name = path.strip_prefix("/trainyard.v1.").unwrap();
        lists.iter().any(|list| list.contains(&name))
    };
    for path in served() {
        let expect =
            |allowed: bool, refused: ErrorCode| if allowed { Ok(()) } else { Err(refused) };
        let denied = ErrorCode::PermissionDenied;
        let anonymous = expect(
            path.ends_with("EnrollService/Enroll"),
            ErrorCode::Unauthenticated,
        );
        assert_eq!(
            code(&gate, &path, &peer(None)),
            anonymous,
            "anonymous {path}"
        );
        assert_eq!(
            gate.admit(&path, None)
                .map(drop)
                .map_err(|refusal| refusal.code),
            anonymous,
            "no peer {path}"
        );
        assert_eq!(
            code(&gate, &path, &node(1)),
            expect(may(&[nodes], &path), denied),
            "node {path}"
        );
        let grants = [viewer, more_as_user, more_as_operator, more_as_admin];
        for (place, role) in Role::ALL.iter().enumerate() {
            let allowed = may(&grants[..=place], &path);
            assert_eq!(
                code(&gate, &path, &user(role.as_str())),
                expect(allowed, denied),
                "{role} {path}"
            );
        }
        for gone in [user("gone"), node(2), peer(Some(Identity::Coordinator))] {
            assert_eq!(code(&gate, &path, &gone), anonymous, "{gone:?} {path}");
        }
    }
}

#[test]
fn standard_services_and_unknown_paths_need_an_identity() {
    let gate = gate();
    for path in [
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/trainyard.v1.JobService/Nothing",
        "/",
        "",
    ] {
        assert_eq!(code(&gate, path, &user("viewer")), Ok(()), "{path}");
        assert_eq!(
            code(&gate, path, &peer(None)),
            Err(ErrorCode::Unauthenticated),
            "{path}"
        );
    }
    let refusal = gate
        .admit("/trainyard.v1.JobService/Get", None)
        .unwrap_err();
    assert_eq!(
        refusal.message,
        "certificate required; run yard login or yard join"
    );
}

#[test]
fn a_certificate_that_ended_since_the_handshake_counts_no_more() {
    let gate = gate();
    let mut old = user("admin");
    old.not_after = Some(Timestamp(gate.clock.now().0 - 1));
    let refusal = gate
        .admit("/trainyard.v1.JobService/Get", Some(&old))
        .unwrap_err();
    assert_eq!(refusal.reason, "CERTIFICATE_EXPIRED");
    old.not_after = Some(Timestamp(gate.clock.now().0 + 60_000));
    gate.admit("/trainyard.v1.JobService/Get", Some(&old))
        .unwrap();
}

#[test]
fn activity_is_counted_while_a_guard_lives() {
    let activity = Activity::new(Clock::start());
    let guard = activity.begin();
    let clone = guard.clone();
    drop(guard);
    assert_eq!(activity.idle(), std::time::Duration::ZERO);
    assert_eq!(activity.open_requests(), 1);
    drop(clone);
    assert_eq!(activity.open_requests(), 0);
}
