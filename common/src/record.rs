//! The rows that the coordinator keeps: what is durable about clusters, jobs, tasks, attempts, nodes, tokens and users.
//! Whatever can be derived (free amounts, queues, allocations) is not here.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bundle::TaskSet;
use crate::ids::{
    AttemptRef, BundleRef, Digest, Incarnation, JobId, NodeId, RequestId, TaskIndex, TokenId,
    UserName, WorkspaceName,
};
use crate::inventory::Inventory;
use crate::member::RankEnd;
use crate::resources::Resources;
use crate::spec::JobSpec;
use crate::state::{
    AttemptState, ExitStatus, JobState, MemberPhase, NodeAvailability, NodePolicy, Outcome, Reason,
    named_enum,
};
use crate::time::Timestamp;

/// A job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobRecord {
    /// Its id.
    pub id: JobId,
    /// Who submitted it.
    pub owner: UserName,
    /// The caller's name for the submission.
    pub request_id: RequestId,
    /// BLAKE3 of the submitted specification, to tell a retry from another body under the same request id.
    pub request_digest: Digest,
    /// What was asked for.
    pub spec: JobSpec,
    /// Its state, derived from its tasks when it has many.
    pub state: JobState,
    /// Why.
    pub reason: Reason,
    /// Tasks by state.
    pub tasks: TaskCounts,
    /// Tasks from this index on have never been placed; those below have rows of their own or are in a bundle.
    pub next_fresh: TaskIndex,
    /// How many bundles were made of it: the number of the last one.
    pub bundles: u32,
    /// When it was accepted.
    pub submitted_at: Timestamp,
    /// When a rank first ran.
    pub started_at: Option<Timestamp>,
    /// When it reached its terminal state.
    pub ended_at: Option<Timestamp>,
    /// When and by whom the end was asked for.
    pub cancel: Option<CancelRequest>,
    /// How the rank that decided the outcome ended; for an array, the first task that did not succeed.
    pub exit: Option<ExitStatus>,
}

/// Who asked for a job's end, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelRequest {
    /// The user.
    pub by: UserName,
    /// When.
    pub at: Timestamp,
}

/// How many tasks of a job are in which state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TaskCounts {
    /// Wait for a place.
    pub pending: u32,
    /// Have an attempt that is not over.
    pub active: u32,
    /// Succeeded.
    pub succeeded: u32,
    /// Failed.
    pub failed: u32,
    /// Cancelled.
    pub cancelled: u32,
    /// Timed out.
    pub timed_out: u32,
}

/// A task that was placed at least once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskRecord {
    /// Its job.
    pub job: JobId,
    /// Its place in the job.
    pub index: TaskIndex,
    /// Whose job it is.
    pub owner: UserName,
    /// The job's workspace.
    pub workspace: WorkspaceName,
    /// Its state.
    pub state: JobState,
    /// Why.
    pub reason: Reason,
    /// Attempts made.
    pub attempts: u32,
    /// Attempts that failed for a cause in the job, counted against `retries`.
    pub failures: u32,
    /// Attempts in a row that ended for a cause in the infrastructure.
    pub infrastructure_failures: u32,
    /// Attempts in a row that ended soon after their start, whatever the cause.
    pub early_ends: u32,
    /// Different nodes that went down while it ran there, since an attempt of it last ran for long.
    pub nodes_taken_down: Vec<NodeId>,
    /// How the rank that decided the last outcome ended.
    pub exit: Option<ExitStatus>,
    /// Checkpoint trees to resume from, by node rank; from the newest attempt that left one.
    pub checkpoints: Vec<Digest>,
    /// When it reached its terminal state.
    pub ended_at: Option<Timestamp>,
}

impl TaskRecord {
    /// One that gets its first place now: nothing of it is counted yet.
    #[must_use]
    pub fn untried(
        job: JobId,
        index: TaskIndex,
        owner: UserName,
        workspace: WorkspaceName,
        reason: Reason,
    ) -> Self {
        Self {
            job,
            index,
            owner,
            workspace,
            state: JobState::Preparing,
            reason,
            attempts: 0,
            failures: 0,
            infrastructure_failures: 0,
            early_ends: 0,
            nodes_taken_down: Vec::new(),
            exit: None,
            checkpoints: Vec::new(),
            ended_at: None,
        }
    }
}

/// One try to run a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttemptRecord {
    /// Which one.
    pub id: AttemptRef,
    /// Whose job it is.
    pub owner: UserName,
    /// The job's workspace.
    pub workspace: WorkspaceName,
    /// Its state.
    pub state: AttemptState,
    /// Why.
    pub reason: Reason,
    /// What became of it, once decided. Decided once; a later report never changes it.
    pub outcome: Option<Outcome>,
    /// How the rank that decided the outcome ended.
    pub exit: Option<ExitStatus>,
    /// That rank.
    pub failed_rank: Option<u32>,
    /// Its members in node-rank order.
    pub members: Vec<MemberRecord>,
    /// Checkpoint trees that it was given.
    pub resume_from: Vec<Digest>,
    /// When it was placed.
    pub placed_at: Timestamp,
    /// When all members were ready and told to go.
    pub ready_at: Option<Timestamp>,
    /// When the first rank ran.
    pub started_at: Option<Timestamp>,
    /// When it was over.
    pub ended_at: Option<Timestamp>,
    /// Under the policy `stop`: how long its ranks live on a node that is cut off, as its agents were told.
    #[serde(default)]
    pub lease: Option<Duration>,
}

/// The ranks of an attempt on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// The node.
    pub node: NodeId,
    /// What it was given.
    pub resources: Resources,
    /// The GPUs it was given, by UUID.
    pub gpu_uuids: Vec<String>,
    /// Its phase as last reported.
    pub phase: MemberPhase,
    /// The address at which the other members reach it.
    pub address: String,
    /// The rendezvous port that it held when ready.
    pub port: Option<u16>,
    /// How its ranks ended.
    pub ranks: Vec<RankEnd>,
    /// The tree of its outputs.
    pub outputs: Option<Digest>,
    /// The tree of its checkpoint.
    pub checkpoint: Option<Digest>,
    /// What of its logs, outputs and checkpoint is not kept, and why; empty if all is.
    pub warning: String,
    /// The processes that outlived SIGKILL, as last reported; empty if there were none.
    pub cleanup: String,
}

named_enum!(
    /// Where a bundle is in its life.
    BundleState {
        /// Handed to its node; nothing was confirmed yet.
        Placed = "PLACED",
        /// Its tasks run.
        Running = "RUNNING",
        /// It gets no more tasks and ends when it has none.
        Closing = "CLOSING",
        /// Its tasks are being ended or given back.
        Stopping = "STOPPING",
        /// Given up without confirmation from the node; its processes may still live.
        Lost = "LOST",
    }
);

/// Tasks of an array that a node holds and runs under one shim. The row is deleted when the bundle has ended. Tasks in
/// `tasks` have no rows of their own unless they run for a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundleRecord {
    /// Which one.
    pub id: BundleRef,
    /// Whose job it is.
    pub owner: UserName,
    /// The job's workspace.
    pub workspace: WorkspaceName,
    /// Its state.
    pub state: BundleState,
    /// Why.
    pub reason: Reason,
    /// The node that holds it.
    pub node: NodeId,
    /// Tasks that run at the same time, at least 1.
    pub slots: u32,
    /// What one task is given.
    pub resources: Resources,
    /// Tasks that were handed out, have not ended and were not given back.
    pub tasks: TaskSet,
    /// How many reports of the agent are on record: the number of the next one.
    pub recorded: u64,
    /// When it was placed.
    pub placed_at: Timestamp,
}

named_enum!(
    /// How a node came to be.
    Target {
        /// On the coordinator's machine, started by `yard up` or `yard run`.
        Local = "local",
        /// Enrolled with `yard join`.
        Attached = "attached",
    }
);

/// A machine with an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its id.
    pub id: NodeId,
    /// Its name: the machine's host name, made unique by a number if taken.
    pub name: String,
    /// The user whose token enrolled it.
    pub owner: UserName,
    /// The workspace that it was enrolled in.
    pub workspace: WorkspaceName,
    /// How it came to be.
    pub target: Target,
    /// Whether it is heard of.
    pub availability: NodeAvailability,
    /// What an operator wants of it.
    pub policy: NodePolicy,
    /// Why.
    pub reason: Reason,
    /// What the machine has, once reported.
    pub inventory: Inventory,
    /// The agent's start counter, 0 before the first session.
    pub incarnation: Incarnation,
    /// The kernel's boot id, empty before the first session.
    pub boot_id: String,
    /// The agent's version, empty before the first session.
    pub agent_version: String,
    /// The address at which other nodes reach it, empty before the first session.
    pub address: String,
    /// When it was enrolled.
    pub enrolled_at: Timestamp,
    /// When its availability last changed, or its session began.
    pub changed_at: Timestamp,
}

named_enum!(
    /// What a user may do. Each role includes those before it.
    Role {
        /// See jobs, nodes and logs.
        Viewer = "viewer",
        /// Submit and cancel own jobs.
        User = "user",
        /// Manage nodes and everybody's jobs.
        Operator = "operator",
        /// Make tokens and users.
        Admin = "admin",
    }
);

/// A right to enrol. The secret itself is never kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// Its public half.
    pub id: TokenId,
    /// Hash of the secret.
    pub secret_hash: Digest,
    /// What it enrols.
    pub grant: TokenGrant,
    /// Who made it.
    pub created_by: UserName,
    /// The workspace that it enrols into.
    pub workspace: WorkspaceName,
    /// When.
    pub created_at: Timestamp,
    /// Until when it can be used.
    pub expires_at: Timestamp,
    /// How often it can still be used.
    pub uses_left: u32,
    /// Whether it was revoked.
    pub revoked: bool,
}

/// What a token enrols.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum TokenGrant {
    /// A machine.
    Node {
        /// What its nodes become.
        target: Target,
    },
    /// A user.
    User {
        /// The user's name.
        name: UserName,
        /// The user's role.
        role: Role,
    },
}

/// Somebody who may call the API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserRecord {
    /// The name in the certificate.
    pub name: UserName,
    /// What the user may do.
    pub role: Role,
    /// The workspace.
    pub workspace: WorkspaceName,
    /// When the user was first enrolled.
    pub created_at: Timestamp,
}

/// One changed row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A job changed.
    Job(Box<JobRecord>),
    /// A task changed.
    Task(Box<TaskRecord>),
    /// An attempt changed.
    Attempt(Box<AttemptRecord>),
    /// A node changed.
    Node(Box<NodeRecord>),
    /// A node was removed.
    NodeRemoved(NodeId),
    /// A token changed.
    Token(Box<TokenRecord>),
    /// A user changed.
    User(Box<UserRecord>),
    /// A bundle changed.
    Bundle(Box<BundleRecord>),
    /// A bundle has ended and is no more.
    BundleRemoved(BundleRef),
}
