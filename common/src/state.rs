//! The closed sets of states, and the reasons and outcomes that go with every change of state.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! named_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        pub enum $name {
            $($(#[$vdoc])* #[serde(rename = $text)] $variant,)+
        }

        impl $name {
            /// Every value, in declaration order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The stable name, as on the command line and in `--json`.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl ::std::fmt::Display for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl ::std::str::FromStr for $name {
            type Err = $crate::state::UnknownName;

            fn from_str(text: &str) -> Result<Self, $crate::state::UnknownName> {
                Self::ALL.iter().copied().find(|value| value.as_str() == text).ok_or_else(|| $crate::state::UnknownName {
                    text: text.chars().take(64).collect(),
                    known: vec![$($text),+],
                })
            }
        }
    };
}
pub(crate) use named_enum;

/// A text that is none of a closed set of names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not one of {}", known.join(", "))]
pub struct UnknownName {
    /// What was given, cut to a readable length.
    pub text: String,
    /// What there is.
    pub known: Vec<&'static str>,
}

named_enum!(
    /// Where a job is in its life; also used for each of its tasks. Terminal states never change.
    JobState {
        /// Waits for a place.
        Pending = "PENDING",
        /// Waits for machines that are being created.
        Provisioning = "PROVISIONING",
        /// Code, directories and rendezvous are being made ready on the nodes.
        Preparing = "PREPARING",
        /// Its processes run.
        Running = "RUNNING",
        /// Its processes are being ended, or what they left is being brought in.
        Stopping = "STOPPING",
        /// Every rank exited with 0.
        Succeeded = "SUCCEEDED",
        /// It ended in another way and no retry is left.
        Failed = "FAILED",
        /// A user ended it.
        Cancelled = "CANCELLED",
        /// Its time limit passed.
        TimedOut = "TIMED_OUT",
    }
);

impl JobState {
    /// Whether the state can never change again.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(
            self,
            Self::Succeeded | Self::Failed | Self::Cancelled | Self::TimedOut
        )
    }
}

named_enum!(
    /// Where an attempt is in its life.
    AttemptState {
        /// Has its nodes; nobody has confirmed anything yet.
        Placed = "PLACED",
        /// At least one member prepares.
        Preparing = "PREPARING",
        /// All members are ready and told to go.
        Ready = "READY",
        /// At least one member runs.
        Running = "RUNNING",
        /// Is being ended, or brings in what it left.
        Stopping = "STOPPING",
        /// Over on all nodes, with an outcome.
        Ended = "ENDED",
        /// Given up without confirmation from every node; its processes may still live.
        Lost = "LOST",
    }
);

impl AttemptState {
    /// Whether a further attempt of the task may be made.
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Ended | Self::Lost)
    }
}

named_enum!(
    /// What became of an attempt.
    Outcome {
        /// Every rank exited with 0.
        Succeeded = "SUCCEEDED",
        /// A rank exited otherwise, or could not be started for a cause that lies in the job.
        Failed = "FAILED",
        /// Ended because a user cancelled the job.
        Cancelled = "CANCELLED",
        /// Ended because its time limit passed.
        TimedOut = "TIMED_OUT",
        /// Ended for a cause that lies in the infrastructure; does not use up the user's retries.
        Interrupted = "INTERRUPTED",
    }
);

named_enum!(
    /// Whether a node is heard of.
    NodeAvailability {
        /// In session.
        Ready = "READY",
        /// Not heard of in time; its attempts are left alone.
        Unreachable = "UNREACHABLE",
        /// Given up.
        Lost = "LOST",
    }
);

named_enum!(
    /// What an operator wants of a node.
    NodePolicy {
        /// Takes new work.
        Active = "ACTIVE",
        /// Takes no new work.
        Cordoned = "CORDONED",
        /// Takes no new work and is being emptied.
        Draining = "DRAINING",
    }
);

named_enum!(
    /// Where a member is in its life, as its agent last reported it.
    MemberPhase {
        /// Not reported yet.
        Unconfirmed = "UNCONFIRMED",
        /// Fetches code and makes directories.
        Preparing = "PREPARING",
        /// Holds everything it needs and waits to go.
        Ready = "READY",
        /// Its ranks run.
        Running = "RUNNING",
        /// Its ranks are being ended.
        Stopping = "STOPPING",
        /// It is over but for processes that outlive SIGKILL; what it was given is quarantined.
        CleanupPending = "CLEANUP_PENDING",
        /// Every process is gone and the allocation is free; logs and outputs are being uploaded.
        Uploading = "UPLOADING",
        /// Nothing of it is left to do.
        Ended = "ENDED",
    }
);

named_enum!(
    /// Why a state is what it is, for programs. The sentence beside it is for people.
    ReasonCode {
        /// Waits for its first turn.
        Queued = "QUEUED",
        /// No node has enough free; some would if it were empty.
        InsufficientFree = "INSUFFICIENT_FREE",
        /// No set of present nodes could ever hold it.
        Infeasible = "INFEASIBLE",
        /// An earlier job is first in line.
        BehindEarlierJob = "BEHIND_EARLIER_JOB",
        /// As many tasks of this array run as it allows.
        ArrayLimit = "ARRAY_LIMIT",
        /// Has a place.
        Placed = "PLACED",
        /// Its nodes prepare.
        Preparing = "PREPARING",
        /// Its processes run.
        Running = "RUNNING",
        /// Every rank exited with 0.
        Completed = "COMPLETED",
        /// A rank exited with another code than 0.
        RankExited = "RANK_EXITED",
        /// A rank was ended by a signal that did not come from us.
        RankSignalled = "RANK_SIGNALLED",
        /// The kernel ended a rank for want of memory.
        OomKilled = "OOM_KILLED",
        /// The command could not be started.
        CannotExecute = "CANNOT_EXECUTE",
        /// A user asked for the end.
        CancelRequested = "CANCEL_REQUESTED",
        /// The time limit passed.
        TimeLimit = "TIME_LIMIT",
        /// A node could not prepare.
        PrepareFailed = "PREPARE_FAILED",
        /// A node took too long to prepare.
        PrepareTimeout = "PREPARE_TIMEOUT",
        /// A node is not heard of.
        NodeUnreachable = "NODE_UNREACHABLE",
        /// A node was given up.
        NodeLost = "NODE_LOST",
        /// A node was rebooted while it ran.
        NodeRebooted = "NODE_REBOOTED",
        /// The process that supervised the ranks was killed; the exit status is not known.
        SupervisorLost = "SUPERVISOR_LOST",
        /// An agent did not know the attempt that it was given.
        UnknownToAgent = "UNKNOWN_TO_AGENT",
        /// Another rank of the gang ended first.
        GangEnded = "GANG_ENDED",
        /// The attempt ended and the task is tried again.
        Retrying = "RETRYING",
        /// Failed too often for causes that lie in the infrastructure.
        InfrastructureGaveUp = "INFRASTRUCTURE_GAVE_UP",
        /// Not tried again because of what its attempts did: it took several nodes down, or ended again and again soon
        /// after its start.
        RetryBudgetSpent = "RETRY_BUDGET_SPENT",
        /// Processes of it outlive SIGKILL; what they were given stays quarantined until they are gone.
        CleanupPending = "CLEANUP_PENDING",
        /// A node's agent was started again and again without having said goodbye.
        AgentCrashes = "AGENT_CRASHES",
        /// Some tasks of the array did not succeed.
        TasksFailed = "TASKS_FAILED",
        /// A node is in session.
        InSession = "IN_SESSION",
        /// A node is enrolled and has not been seen yet.
        Enrolled = "ENROLLED",
        /// A node is not heard of for a while and is not unreachable yet.
        Suspect = "SUSPECT",
        /// A node's session ended or its heartbeats stopped.
        Silent = "SILENT",
        /// An operator asked for it.
        Operator = "OPERATOR",
        /// Two agents claim the same identity.
        DuplicateIdentity = "DUPLICATE_IDENTITY",
        /// Logs, outputs or checkpoints are being brought in.
        Uploading = "UPLOADING",
        /// A node was cut off for so long that it had to end the ranks itself.
        LeaseExpired = "LEASE_EXPIRED",
    }
);

/// Why a state is what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// For programs.
    pub code: ReasonCode,
    /// For people: one sentence without a final period.
    pub message: String,
}

impl Reason {
    /// A reason with its sentence.
    #[must_use]
    pub fn new(code: ReasonCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// How a process ended. Not knowing is a value of its own and never counts as success.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "value")]
pub enum ExitStatus {
    /// Exited with this code, 0 to 255.
    Code(u8),
    /// Ended by this signal.
    Signal(u8),
    /// Could not be started; the message beside it says why.
    NotStarted,
    /// Nobody was there to see it.
    Unknown,
}

impl ExitStatus {
    /// The code that `yard run` ends with: the exit code, 128+N for signal N, 127 for a command that could not be
    /// started (as shells do), 75 (EX_TEMPFAIL) if nobody knows.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128_u8.saturating_add(signal),
            Self::NotStarted => 127,
            Self::Unknown => 75,
        }
    }

    /// Whether it is known to be a success.
    #[must_use]
    pub fn is_success(self) -> bool {
        self == Self::Code(0)
    }
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::NotStarted => f.write_str("not started"),
            Self::Unknown => f.write_str("unknown exit status"),
        }
    }
}
