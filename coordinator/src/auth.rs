//! Who may call what: one table, and the layer before all services that applies it to every request.
//!
//! The caller is whom the connection's certificate names; the transport has verified that. Whether the user or node
//! is still on record, and whether the certificate has ended since, is checked here for each request. Which *objects* a
//! caller may touch is the services' business.

mod activity;
mod layer;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use tonic::Request;
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::NodeId;
use trainyard_common::record::{Role, UserRecord};
use trainyard_transport::connections::Peer;
use trainyard_transport::identity::Identity;

use crate::read_model::ReadModel;
use trainyard_transport::clock::Clock;

pub(crate) use activity::{Activity, ActivityGuard};
pub(crate) use layer::AuthLayer;

/// Who calls. In the extensions of every request that reaches a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Caller {
    /// Somebody without a certificate.
    Anonymous,
    /// A user who is on record.
    User(Arc<UserRecord>),
    /// The agent of a node that is on record.
    Node(NodeId),
}

/// Who may call one RPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    anonymous: bool,
    node: bool,
    /// The least role of a user; none: no user.
    user: Option<Role>,
}

/// Everybody, also without a certificate.
const ANYBODY: Rule = Rule {
    anonymous: true,
    node: true,
    user: Some(Role::Viewer),
};
/// Every identity on record.
const KNOWN: Rule = Rule {
    anonymous: false,
    node: true,
    user: Some(Role::Viewer),
};
const AGENTS: Rule = Rule {
    anonymous: false,
    node: true,
    user: None,
};
const VIEWERS: Rule = users(Role::Viewer);
const USERS: Rule = users(Role::User);
const OPERATORS: Rule = users(Role::Operator);
const ADMINS: Rule = users(Role::Admin);
/// Agents, and users who may run jobs.
const WRITERS: Rule = Rule {
    anonymous: false,
    node: true,
    user: Some(Role::User),
};

const fn users(least: Role) -> Rule {
    Rule {
        anonymous: false,
        node: false,
        user: Some(least),
    }
}

/// The table. What is not in it is not served.
const RULES: &[(&str, Rule)] = &[
    ("/trainyard.v1.JobService/Submit", USERS),
    ("/trainyard.v1.JobService/Get", VIEWERS),
    ("/trainyard.v1.JobService/List", VIEWERS),
    ("/trainyard.v1.JobService/Watch", VIEWERS),
    ("/trainyard.v1.JobService/Cancel", USERS),
    ("/trainyard.v1.LogService/Read", VIEWERS),
    ("/trainyard.v1.NodeService/List", VIEWERS),
    ("/trainyard.v1.NodeService/Get", VIEWERS),
    ("/trainyard.v1.NodeService/SetPolicy", OPERATORS),
    ("/trainyard.v1.NodeService/Remove", OPERATORS),
    ("/trainyard.v1.NodeService/ConfirmLost", OPERATORS),
    ("/trainyard.v1.AdminService/CreateToken", ADMINS),
    ("/trainyard.v1.AdminService/ListTokens", ADMINS),
    ("/trainyard.v1.AdminService/RevokeToken", ADMINS),
    ("/trainyard.v1.AdminService/InjectFault", ADMINS),
    ("/trainyard.v1.AdminService/WhoAmI", KNOWN),
    ("/trainyard.v1.EnrollService/Enroll", ANYBODY),
    ("/trainyard.v1.EnrollService/Renew", KNOWN),
    ("/trainyard.v1.AgentService/Session", AGENTS),
    ("/trainyard.v1.AgentService/PushLogs", AGENTS),
    ("/trainyard.v1.BlobService/Missing", KNOWN),
    ("/trainyard.v1.BlobService/Upload", WRITERS),
    ("/trainyard.v1.BlobService/Download", KNOWN),
    ("/grpc.health.v1.Health/Check", KNOWN),
    ("/grpc.health.v1.Health/Watch", KNOWN),
    ("/grpc.health.v1.Health/List", KNOWN),
    (
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        KNOWN,
    ),
    (
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        KNOWN,
    ),
];

fn rule(path: &str) -> Option<Rule> {
    RULES
        .iter()
        .find_map(|(name, rule)| (*name == path).then_some(*rule))
}

/// Applies the table.
#[derive(Debug)]
pub(crate) struct Gate {
    read: Arc<ReadModel>,
    clock: Clock,
    activity: Arc<Activity>,
}

impl Gate {
    pub(crate) fn new(read: Arc<ReadModel>, clock: Clock, activity: Arc<Activity>) -> Self {
        Self {
            read,
            clock,
            activity,
        }
    }

    /// The caller, if it may call what is at `path`. An unknown path is let through to those who are known: the router
    /// says that it is not there.
    fn admit(&self, path: &str, peer: Option<&Peer>) -> Result<Caller, Refusal> {
        let rule = rule(path);
        let caller = match (self.identify(peer), rule) {
            // A machine that was removed, or whose certificate ended, enrols again over the connection that it has.
            (Err(_), Some(rule)) if rule.anonymous => Caller::Anonymous,
            (caller, _) => caller?,
        };
        let allowed = match (&caller, rule) {
            (Caller::Anonymous, Some(rule)) if rule.anonymous => true,
            (Caller::Anonymous, _) => {
                return Err(unauthenticated(
                    "CERTIFICATE_REQUIRED",
                    "certificate required; run yard login or yard join".to_owned(),
                ));
            }
            (_, None) => true,
            (Caller::User(user), Some(rule)) => rule.user.is_some_and(|least| user.role >= least),
            (Caller::Node(_), Some(rule)) => rule.node,
        };
        if allowed {
            Ok(caller)
        } else {
            Err(denied(path, &caller, rule))
        }
    }

    fn identify(&self, peer: Option<&Peer>) -> Result<Caller, Refusal> {
        let Some(peer) = peer else {
            return Ok(Caller::Anonymous);
        };
        if peer.not_after.is_some_and(|end| end <= self.clock.now()) {
            return Err(unauthenticated(
                "CERTIFICATE_EXPIRED",
                "the certificate of this connection has ended; connect again with a renewed one, or enrol again with \
                 yard login or yard join"
                    .to_owned(),
            ));
        }
        let tables = self.read.tables();
        match &peer.identity {
            None => Ok(Caller::Anonymous),
            Some(Identity::User(name)) => match tables.users.get(name) {
                Some(user) => Ok(Caller::User(user.clone())),
                None => Err(unauthenticated(
                    "USER_REMOVED",
                    format!(
                        "user {name} is not on record here any more; ask an admin for a token and run yard login"
                    ),
                )),
            },
            Some(Identity::Node(node)) if tables.nodes.contains_key(node) => {
                Ok(Caller::Node(*node))
            }
            Some(Identity::Node(node)) => Err(unauthenticated(
                "NODE_REMOVED",
                format!("{node} was removed; ask for a token and run yard join"),
            )),
            Some(Identity::Coordinator) => Err(unauthenticated(
                "NOT_A_CLIENT",
                "a coordinator's certificate is not for calling; run yard login".to_owned(),
            )),
        }
    }
}

fn unauthenticated(reason: &str, message: String) -> Refusal {
    Refusal::new(ErrorCode::Unauthenticated, reason, message)
}

fn denied(path: &str, caller: &Caller, rule: Option<Rule>) -> Refusal {
    let least = rule.and_then(|rule| rule.user);
    let message = match (caller, least) {
        (Caller::User(user), Some(least)) => format!(
            "user {} has the role {} and this needs {least}; ask an admin for a token with that role",
            user.name, user.role
        ),
        (Caller::User(_), None) => "only the agent of a node may call this".to_owned(),
        (Caller::Node(_) | Caller::Anonymous, _) => "only a user may call this".to_owned(),
    };
    if let Caller::Node(node) = caller {
        // Agents of ours never do this: somebody uses a node's certificate for something else.
        tracing::warn!(%node, path, "a node's certificate was used for a user's request");
    }
    Refusal::new(ErrorCode::PermissionDenied, "ROLE", message)
}

fn no_caller() -> Refusal {
    Refusal::new(
        ErrorCode::Internal,
        "NO_CALLER",
        "the request did not pass the authorisation layer",
    )
}

/// Who calls.
pub(crate) fn caller<T>(request: &Request<T>) -> Result<Caller, Refusal> {
    request.extensions().get().cloned().ok_or_else(no_caller)
}

/// The user who calls.
pub(crate) fn user<T>(request: &Request<T>) -> Result<Arc<UserRecord>, Refusal> {
    match caller(request)? {
        Caller::User(user) => Ok(user),
        Caller::Anonymous | Caller::Node(_) => Err(no_caller()),
    }
}

/// The node whose agent calls.
pub(crate) fn node<T>(request: &Request<T>) -> Result<NodeId, Refusal> {
    match caller(request)? {
        Caller::Node(node) => Ok(node),
        Caller::Anonymous | Caller::User(_) => Err(no_caller()),
    }
}

/// The connection that a request came on.
pub(crate) fn peer<T>(request: &Request<T>) -> Result<Peer, Refusal> {
    request.extensions().get().cloned().ok_or_else(no_caller)
}
