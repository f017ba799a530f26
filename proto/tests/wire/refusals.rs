//! Every field that has to be there is named when it is not, with its whole path.

use std::fmt::Debug;

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::member::{DesiredMember, DesiredPhase, ObservedMember};
use trainyard_common::record::{
    AttemptRecord, JobRecord, MemberRecord, NodeRecord, Record, TaskRecord, TokenGrant,
    TokenRecord, UserRecord,
};
use trainyard_common::state::ExitStatus;
use trainyard_common::time::Timestamp;
use trainyard_proto::convert::InvalidField;
use trainyard_proto::v1;

use crate::strategies;

/// The first value of a strategy that has what the test is about.
fn sample<T: Debug>(strategy: impl Strategy<Value = T>, wanted: impl Fn(&T) -> bool) -> T {
    let mut runner = TestRunner::deterministic();
    let tree = |runner: &mut TestRunner| strategy.new_tree(runner).expect("makes values");
    (0..1000)
        .map(|_| tree(&mut runner).current())
        .find(wanted)
        .expect("one of a thousand has it")
}

/// A field and a change that makes it bad.
type Change<'a, Wire> = (&'a str, fn(&mut Wire));

/// Checks that each change to a good message is refused and names the field.
fn check<Wire, Domain>(good: &Wire, changes: &[Change<'_, Wire>])
where
    Wire: Clone,
    Domain: TryFrom<Wire, Error = InvalidField> + Debug,
{
    Domain::try_from(good.clone()).expect("the unchanged message is good");
    for (field, change) in changes {
        let mut message = good.clone();
        change(&mut message);
        let refused = Domain::try_from(message).expect_err(field);
        assert_eq!(refused.field, *field, "{refused}");
        let refusal = Refusal::from(refused);
        assert_eq!(refusal.code, ErrorCode::Invalid);
        assert_eq!(refusal.field.as_deref(), Some(*field));
        assert!(refusal.message.starts_with(field), "{refusal}");
    }
}

#[test]
fn jobs() {
    let job = sample(strategies::job(), |job| {
        job.cancel.is_some() && matches!(job.exit, Some(ExitStatus::Code(_)))
    });
    check::<v1::Job, JobRecord>(
        &(&job).into(),
        &[
            ("id", |m| m.id = 0),
            ("owner", |m| m.owner.clear()),
            ("owner", |m| m.owner = "../ada".into()),
            ("request_id", |m| m.request_id.clear()),
            ("request_digest", |m| m.request_digest.clear()),
            ("request_digest", |m| m.request_digest.truncate(31)),
            ("spec", |m| m.spec = None),
            ("spec.resources_per_node", |m| {
                m.spec.as_mut().unwrap().resources_per_node = None;
            }),
            ("state", |m| m.state = 0),
            ("state", |m| m.state = 77),
            ("state", |m| m.state = -1),
            ("reason", |m| m.reason = None),
            ("reason.code", |m| m.reason.as_mut().unwrap().code.clear()),
            ("tasks", |m| m.tasks = None),
            ("submitted_at", |m| m.submitted_at = None),
            ("submitted_at", |m| {
                m.submitted_at.as_mut().unwrap().nanos = 1
            }),
            ("started_at", |m| {
                m.started_at = Some(prost_types::Timestamp {
                    seconds: -1,
                    nanos: 0,
                });
            }),
            ("cancel.by", |m| m.cancel.as_mut().unwrap().by.clear()),
            ("cancel.at", |m| m.cancel.as_mut().unwrap().at = None),
            ("exit.status", |m| m.exit.as_mut().unwrap().status = None),
            ("exit.code", |m| {
                m.exit.as_mut().unwrap().status = Some(v1::exit_status::Status::Code(256));
            }),
        ],
    );
}

#[test]
fn tasks() {
    let task = sample(strategies::task(), |task| task.checkpoints.len() == 2);
    check::<v1::Task, TaskRecord>(
        &(&task).into(),
        &[
            ("job", |m| m.job = 0),
            ("state", |m| m.state = 0),
            ("reason", |m| m.reason = None),
            ("checkpoints[1]", |m| m.checkpoints[1].clear()),
        ],
    );
}

#[test]
fn attempts_and_their_members() {
    let attempt = sample(strategies::attempt(), |attempt| {
        attempt.members.len() == 3 && !attempt.members[2].ranks.is_empty()
    });
    let good = v1::Attempt::from(&attempt);
    check::<v1::Attempt, AttemptRecord>(
        &good,
        &[
            ("id", |m| m.id = None),
            ("id.job", |m| m.id.as_mut().unwrap().job = 0),
            ("id.attempt", |m| m.id.as_mut().unwrap().attempt = 0),
            ("state", |m| m.state = 0),
            ("reason", |m| m.reason = None),
            ("outcome", |m| m.outcome = 77),
            ("placed_at", |m| m.placed_at = None),
            ("members[2].node", |m| m.members[2].node = 0),
            ("members[0].phase", |m| m.members[0].phase = 0),
            ("members[1].port", |m| m.members[1].port = 65_536),
            ("members[2].ranks[0].exit", |m| {
                m.members[2].ranks[0].exit = None;
            }),
            ("members[2].ranks[0].at", |m| {
                m.members[2].ranks[0].at = None
            }),
        ],
    );
    check::<v1::Member, MemberRecord>(
        &good.members[0],
        &[
            ("resources", |m| m.resources = None),
            ("outputs", |m| m.outputs = vec![0; 33]),
            ("checkpoint", |m| m.checkpoint = vec![0]),
        ],
    );
    let undecided = v1::Attempt { outcome: 0, ..good };
    let attempt = AttemptRecord::try_from(undecided).expect("may be undecided");
    assert_eq!(attempt.outcome, None);
}

#[test]
fn nodes() {
    let node = sample(strategies::node(), |_| true);
    check::<v1::Node, NodeRecord>(
        &(&node).into(),
        &[
            ("id", |m| m.id = 0),
            ("owner", |m| m.owner.clear()),
            ("target", |m| m.target = 0),
            ("availability", |m| m.availability = 0),
            ("policy", |m| m.policy = 0),
            ("reason", |m| m.reason = None),
            ("inventory", |m| m.inventory = None),
            ("inventory.cpu", |m| {
                m.inventory.as_mut().unwrap().cpu = None
            }),
            ("inventory.capacity", |m| {
                m.inventory.as_mut().unwrap().capacity = None;
            }),
            ("enrolled_at", |m| m.enrolled_at = None),
            ("changed_at", |m| m.changed_at = None),
        ],
    );
}

#[test]
fn tokens_and_users() {
    let token = sample(strategies::token(), |_| true);
    check::<v1::Token, TokenRecord>(
        &(&token).into(),
        &[
            ("id", |m| m.id = 0),
            ("secret_hash", |m| m.secret_hash.clear()),
            ("grant", |m| m.grant = None),
            ("created_by", |m| m.created_by.clear()),
            ("created_at", |m| m.created_at = None),
            ("expires_at", |m| m.expires_at = None),
        ],
    );
    let user = v1::UserGrant {
        name: "ada".into(),
        role: v1::Role::User.into(),
    };
    check::<v1::TokenGrant, TokenGrant>(
        &v1::TokenGrant {
            grant: Some(v1::token_grant::Grant::User(user)),
        },
        &[
            ("grant", |m| m.grant = None),
            ("user.name", |m| {
                m.grant = Some(v1::token_grant::Grant::User(v1::UserGrant {
                    role: 1,
                    ..Default::default()
                }));
            }),
            ("user.role", |m| {
                m.grant = Some(v1::token_grant::Grant::User(v1::UserGrant {
                    name: "ada".into(),
                    role: 0,
                }));
            }),
            ("node.target", |m| {
                m.grant = Some(v1::token_grant::Grant::Node(v1::NodeGrant { target: 0 }));
            }),
        ],
    );
    let user = sample(strategies::user_record(), |_| true);
    check::<v1::User, UserRecord>(
        &(&user).into(),
        &[
            ("name", |m| m.name.clear()),
            ("role", |m| m.role = 0),
            ("workspace", |m| m.workspace.clear()),
            ("created_at", |m| m.created_at = None),
        ],
    );
}

#[test]
fn desired_and_observed_members() {
    let member = sample(strategies::desired(), |member| {
        matches!(member.phase, DesiredPhase::Run(_))
    });
    check::<v1::DesiredMember, DesiredMember>(
        &(&member).into(),
        &[
            ("attempt", |m| m.attempt = None),
            ("phase", |m| m.phase = None),
            ("spec", |m| m.spec = None),
            ("spec.owner", |m| m.spec.as_mut().unwrap().owner.clear()),
            ("spec.workspace", |m| {
                m.spec.as_mut().unwrap().workspace.clear()
            }),
            ("spec.resources", |m| {
                m.spec.as_mut().unwrap().resources = None
            }),
            ("spec.launcher", |m| m.spec.as_mut().unwrap().launcher = 0),
            ("spec.grace", |m| m.spec.as_mut().unwrap().grace = None),
            ("run.master_port", |m| {
                m.phase = Some(v1::desired_member::Phase::Run(v1::Go::default()));
            }),
            ("run.master_port", |m| {
                m.phase = Some(v1::desired_member::Phase::Run(v1::Go {
                    master_port: 70_000,
                    ..Default::default()
                }));
            }),
            ("stop.code", |m| {
                m.phase = Some(v1::desired_member::Phase::Stop(v1::Stop::default()));
            }),
        ],
    );
    let member = sample(strategies::observed(), |_| true);
    check::<v1::ObservedMember, ObservedMember>(
        &(&member).into(),
        &[
            ("attempt", |m| m.attempt = None),
            ("phase", |m| m.phase = None),
            ("uploading.cause", |m| {
                m.phase = Some(v1::observed_member::Phase::Uploading(v1::Ending::default()));
            }),
            ("ended.ended_at", |m| {
                m.phase = Some(v1::observed_member::Phase::Ended(v1::Ending {
                    cause: 1,
                    ..Default::default()
                }));
            }),
        ],
    );
}

#[test]
fn transitions_name_their_row() {
    let job = sample(strategies::job(), |_| true);
    let record = Record::Job(Box::new(job));
    check::<v1::Transition, (Timestamp, Record)>(
        &(Timestamp(5), &record).into(),
        &[
            ("at", |m| m.at = None),
            ("row", |m| m.row = None),
            ("job.id", |m| {
                m.row = Some(v1::transition::Row::Job(v1::Job::default()));
            }),
            ("node_removed", |m| {
                m.row = Some(v1::transition::Row::NodeRemoved(0));
            }),
        ],
    );
}
