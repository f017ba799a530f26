//! Facts that the coordinator core is told, in the past tense. The driver makes them; nothing here was decided yet.

use std::time::Duration;

use trainyard_common::bundle::ObservedBundle;
use trainyard_common::ids::{Digest, Incarnation, JobId, NodeId, RequestId, TokenId, UserName};
use trainyard_common::inventory::Inventory;
use trainyard_common::member::ObservedMember;
use trainyard_common::record::{Role, Target, TokenGrant};
use trainyard_common::spec::JobSpec;
use trainyard_common::state::NodePolicy;

/// Names a request that waits for [`crate::effect::Effect::Reply`]. The driver's own counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestKey(pub u64);

/// One session of an agent. The driver's own counter, never used again, so that a late message of an old session is
/// told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// A fact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A user submitted a job. Answered with [`crate::effect::Answer::Submitted`] or a refusal.
    JobSubmitted {
        /// Who waits.
        key: RequestKey,
        /// Who submitted.
        owner: UserName,
        /// The caller's name for the request.
        request_id: RequestId,
        /// Hash of the body, made by the driver.
        request_digest: Digest,
        /// What is asked for; the core validates it.
        spec: Box<JobSpec>,
        /// Accept although no present nodes could hold it.
        allow_infeasible: bool,
    },
    /// A user asked for the end of a job. Answered with [`crate::effect::Answer::Cancelled`] or a refusal. Whether the
    /// user may do so was checked by the driver against the job's owner.
    CancelRequested {
        /// Who waits.
        key: RequestKey,
        /// Who asked.
        by: UserName,
        /// Which job.
        job: JobId,
    },
    /// Somebody asked for a join token. Answered with [`crate::effect::Answer::TokenCreated`] or a refusal.
    TokenRequested {
        /// Who waits.
        key: RequestKey,
        /// Who asked.
        by: UserName,
        /// Hash of the secret that the driver drew.
        secret_hash: Digest,
        /// What it is to enrol.
        grant: TokenGrant,
        /// How often.
        uses: u32,
        /// How long.
        ttl: Duration,
    },
    /// Somebody revoked a token. Answered with [`crate::effect::Answer::Done`] or a refusal.
    TokenRevoked {
        /// Who waits.
        key: RequestKey,
        /// Which one.
        token: TokenId,
    },
    /// A machine came with a token. Answered with [`crate::effect::Answer::NodeEnrolled`] or a refusal that never says which part was wrong.
    NodeEnrolled {
        /// Who waits.
        key: RequestKey,
        /// The token's public half.
        token: TokenId,
        /// Hash of the secret that was shown.
        secret_hash: Digest,
        /// The machine's name.
        name: String,
    },
    /// A user came with a token. Answered with [`crate::effect::Answer::UserEnrolled`] or a refusal.
    UserEnrolled {
        /// Who waits.
        key: RequestKey,
        /// The token's public half.
        token: TokenId,
        /// Hash of the secret that was shown.
        secret_hash: Digest,
    },
    /// The driver itself vouches for a user (the one who owns the coordinator's state directory). Answered with
    /// [`crate::effect::Answer::UserEnrolled`].
    LocalUserAdded {
        /// Who waits.
        key: RequestKey,
        /// The user's name.
        name: UserName,
        /// The user's role.
        role: Role,
    },
    /// The driver itself vouches for a machine (an agent that `yard up` started). The same name with target local gives
    /// the same node again. Answered with [`crate::effect::Answer::NodeEnrolled`].
    LocalNodeAdded {
        /// Who waits.
        key: RequestKey,
        /// The node's name.
        name: String,
        /// How it came to be.
        target: Target,
        /// Whose it is.
        owner: UserName,
    },
    /// An operator changed a node's policy. Answered with [`crate::effect::Answer::Done`] or a refusal.
    NodePolicySet {
        /// Who waits.
        key: RequestKey,
        /// Which node.
        node: NodeId,
        /// What is wanted.
        policy: NodePolicy,
        /// Who asked.
        by: UserName,
    },
    /// An operator removed a node; refused while anything of an attempt may be on it. Answered with `Done`.
    NodeRemoved {
        /// Who waits.
        key: RequestKey,
        /// Which node.
        node: NodeId,
    },
    /// An operator vouched that a node is gone and nothing on it lives. Answered with `Done`.
    NodeConfirmedLost {
        /// Who waits.
        key: RequestKey,
        /// Which node.
        node: NodeId,
    },
    /// An agent opened a session and said everything about itself. The core answers with
    /// [`crate::effect::Command::Welcome`] and the whole desired set, or [`crate::effect::Effect::CloseSession`].
    AgentRegistered(Box<Registration>),
    /// An agent reported a change of one member.
    MemberObserved {
        /// In which session.
        session: SessionId,
        /// On which node.
        node: NodeId,
        /// What it saw.
        member: ObservedMember,
    },
    /// An agent reported what became of tasks in a bundle, or that the bundle moved on.
    BundleObserved {
        /// In which session.
        session: SessionId,
        /// On which node.
        node: NodeId,
        /// What it saw.
        bundle: ObservedBundle,
    },
    /// An agent showed that it lives.
    HeartbeatReceived {
        /// In which session.
        session: SessionId,
        /// On which node.
        node: NodeId,
    },
    /// An agent said that its process ends on purpose; its members live on.
    GoodbyeSaid {
        /// In which session.
        session: SessionId,
        /// On which node.
        node: NodeId,
    },
    /// A session is over, for whatever cause.
    SessionEnded {
        /// Which one.
        session: SessionId,
        /// On which node.
        node: NodeId,
    },
    /// The time of [`crate::Core::next_deadline`] has come.
    TimerFired,
}

/// What an agent says first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// The session.
    pub session: SessionId,
    /// The node, from its certificate.
    pub node: NodeId,
    /// The agent's start counter.
    pub incarnation: Incarnation,
    /// Counts the sessions that this agent process tried to open, from 1; 0 if it does not say. A lower one than that of
    /// the last session comes too late.
    pub opening: u64,
    /// The kernel's boot id.
    pub boot_id: String,
    /// The agent's version.
    pub agent_version: String,
    /// What an earlier process of the agent said before it crashed; empty if nothing.
    pub last_words: String,
    /// The address at which other nodes reach it.
    pub address: String,
    /// What the machine has.
    pub inventory: Inventory,
    /// Every member that it has, whole. A desired member that is missing here was never accepted, or its agent lost it.
    pub observed: Vec<ObservedMember>,
    /// Every bundle that it has, whole. Reports that are missing here come in the session.
    pub bundles: Vec<ObservedBundle>,
}
