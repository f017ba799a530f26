//! What the core starts from: the durable rows that concern live work. It must not know how they are stored.

use std::collections::BTreeSet;

use trainyard_common::ids::{Digest, JobId, NodeId, RequestId, TokenId, UserName};
use trainyard_common::record::{
    AttemptRecord, BundleRecord, JobRecord, NodeRecord, TaskRecord, TokenRecord, UserRecord,
};
use trainyard_common::time::Timestamp;

/// A submission that was accepted, kept so that a retry gets the same answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RememberedRequest {
    /// Who submitted.
    pub owner: UserName,
    /// The caller's name for the request.
    pub request_id: RequestId,
    /// Hash of the body.
    pub digest: Digest,
    /// The job that it made.
    pub job: JobId,
    /// When it was accepted.
    pub at: Timestamp,
}

/// Everything the core needs to go on where it stopped. The default is an empty cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Jobs that are not in a terminal state.
    pub jobs: Vec<JobRecord>,
    /// Tasks of those jobs that are not in a terminal state.
    pub tasks: Vec<TaskRecord>,
    /// Attempts that are not `ENDED`; also those of jobs that are over (then they are `LOST`).
    pub attempts: Vec<AttemptRecord>,
    /// Every bundle that there is; also those of jobs that are over.
    pub bundles: Vec<BundleRecord>,
    /// Enrolled nodes.
    pub nodes: Vec<NodeRecord>,
    /// Join tokens.
    pub tokens: Vec<TokenRecord>,
    /// Users.
    pub users: Vec<UserRecord>,
    /// Submissions accepted within the retention, of live and of finished jobs.
    pub requests: Vec<RememberedRequest>,
    /// Nodes that must be heard of before anything is placed: after a restored backup those that were ready in it.
    pub awaited: BTreeSet<NodeId>,
    /// The id of the next job, above every id ever given.
    pub next_job: JobId,
    /// The id of the next node, likewise.
    pub next_node: NodeId,
    /// The id of the next token, likewise.
    pub next_token: TokenId,
}

impl Default for Snapshot {
    fn default() -> Self {
        Self {
            jobs: Vec::new(),
            tasks: Vec::new(),
            attempts: Vec::new(),
            bundles: Vec::new(),
            nodes: Vec::new(),
            tokens: Vec::new(),
            users: Vec::new(),
            requests: Vec::new(),
            awaited: BTreeSet::new(),
            next_job: JobId(1),
            next_node: NodeId(1),
            next_token: TokenId(1),
        }
    }
}
