//! Requests that the coordinator core makes, as plain data in the imperative. The driver carries them out in the one
//! order that keeps every promise: persist and sync all records first, and only then speak.

use trainyard_common::bundle::DesiredBundle;
use trainyard_common::error::Refusal;
use trainyard_common::ids::{AttemptRef, BundleRef, JobId, NodeId};
use trainyard_common::member::DesiredMember;
use trainyard_common::record::{JobRecord, NodeRecord, Record, TokenRecord, UserRecord};
use trainyard_common::state::Reason;

use crate::event::{RequestKey, SessionId};

/// A request to the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Make this row durable, with the transition that changed it.
    Persist(Record),
    /// Once durable: answer a request.
    Reply(RequestKey, Result<Answer, Refusal>),
    /// Once durable: tell an agent something.
    Send(SessionId, Command),
    /// Once durable: end a session with a reason; the agent may come back.
    CloseSession(SessionId, Refusal),
    /// Call [`crate::Core::schedule`] soon; several requests may be merged.
    RequestSchedule,
    /// For the operator's log, at the given urgency.
    Note(Urgency, Option<NodeId>, Reason),
}

/// How urgent a note is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// A state change.
    Info,
    /// Unexpected but handled.
    Warn,
    /// A human must look.
    Error,
}

/// What an agent is told in a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// The session is accepted: here is the complete desired set.
    Welcome {
        /// Every member that is desired of the node.
        desired: Vec<DesiredMember>,
        /// Every bundle likewise.
        bundles: Vec<DesiredBundle>,
    },
    /// One member is desired, or desired differently.
    Desire(Box<DesiredMember>),
    /// A member that ended is on record: it can be cleaned away.
    Forget(AttemptRef),
    /// One bundle is desired, or desired differently.
    DesireBundle(Box<DesiredBundle>),
    /// A bundle that ended is on record: it can be cleaned away.
    ForgetBundle(BundleRef),
    /// What the agent says does not follow on what it said before: it must open a new session.
    Resync(String),
}

/// The answer to a request that was carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The job that was accepted, or that the same request made before.
    Submitted {
        /// Its id.
        job: JobId,
        /// Whether an earlier request with the same id made it.
        repeated: bool,
    },
    /// The job as it is after the request.
    Cancelled(Box<JobRecord>),
    /// The token that was made.
    TokenCreated(Box<TokenRecord>),
    /// The node that may now have a certificate.
    NodeEnrolled(Box<NodeRecord>),
    /// The user who may now have a certificate.
    UserEnrolled(Box<UserRecord>),
    /// Carried out.
    Done,
}
