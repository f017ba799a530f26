//! What the coordinator wants of an agent and what the agent observed: the two sets that a session exchanges.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::{AttemptRef, Digest, UserName, WorkspaceName};
use crate::limits::{MAX_LEFT_TOLD, MAX_PROCESS_NAME};
use crate::resources::Resources;
use crate::spec::Launcher;
use crate::state::{ExitStatus, ReasonCode};
use crate::time::Timestamp;

/// One member that the coordinator wants on a node, and in which phase.
///
/// A member that an agent has and that is not desired is left alone while its processes live (the coordinator may have
/// lost its state); only [`DesiredPhase::Stop`] ends processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DesiredMember {
    /// The attempt that it belongs to.
    pub attempt: AttemptRef,
    /// What is to be done.
    pub phase: DesiredPhase,
    /// How it is started. Does not change over the member's life.
    pub spec: MemberSpec,
}

/// What is to be done with a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DesiredPhase {
    /// Fetch, make directories, hold a rendezvous port; start nothing.
    Prepare,
    /// Prepare, and then start the ranks, once ever: for the only member of a gang, which waits for nobody.
    Start,
    /// Start the ranks, once ever.
    Run(Go),
    /// End every process within the grace period and report.
    Stop(Stop),
}

/// What a member needs to start, known once all members are ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Go {
    /// The first node's address, as the others reach it.
    pub master_addr: String,
    /// The rendezvous port that the first node holds.
    pub master_port: u16,
    /// The address of each member in node-rank order.
    pub node_addrs: Vec<String>,
}

/// Address of the only member of a gang: it need not leave its machine.
pub const OWN_ADDRESS: &str = "127.0.0.1";

impl Go {
    /// What the only member of a gang needs, which holds `port`.
    #[must_use]
    pub fn alone(port: u16) -> Self {
        Self {
            master_addr: OWN_ADDRESS.to_owned(),
            master_port: port,
            node_addrs: vec![OWN_ADDRESS.to_owned()],
        }
    }
}

/// Why and how a member is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    /// For the record.
    pub code: ReasonCode,
    /// Time between SIGTERM and SIGKILL.
    pub grace: Duration,
}

/// How a member is started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberSpec {
    /// The job's name.
    pub job_name: String,
    /// Whose job it is.
    pub owner: UserName,
    /// The job's workspace.
    pub workspace: WorkspaceName,
    /// The member's place in the gang, from 0.
    pub node_rank: u32,
    /// Members of the gang.
    pub nodes: u32,
    /// Ranks of each member.
    pub procs_per_node: u32,
    /// What the member is given.
    pub resources: Resources,
    /// The GPUs it is given, by UUID, as many as `resources.gpus`.
    pub gpu_uuids: Vec<String>,
    /// How ranks are started.
    pub launcher: Launcher,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// The user's variables.
    pub env: BTreeMap<String, String>,
    /// The tree to make the working copy from.
    pub snapshot: Option<Digest>,
    /// Checkpoint trees of an earlier attempt, in node-rank order; where two hold the same path the first one counts.
    pub resume_from: Vec<Digest>,
    /// Longest run, enforced by the shim.
    pub time_limit: Option<Duration>,
    /// Time between SIGTERM and SIGKILL when a rank fails or the limit passes.
    pub grace: Duration,
    /// Under the policy `stop`: how long the ranks may live without word from the coordinator, counted from the sending
    /// of the last heartbeat that it acknowledged. Enforced by the shim.
    #[serde(default)]
    pub lease: Option<Duration>,
}

impl MemberSpec {
    /// Ranks of the whole gang.
    #[must_use]
    pub fn world_size(&self) -> u32 {
        self.nodes.saturating_mul(self.procs_per_node)
    }

    /// The first rank of this member.
    #[must_use]
    pub fn first_rank(&self) -> u32 {
        self.node_rank.saturating_mul(self.procs_per_node)
    }

    /// The ranks whose processes the shim itself starts: one that speaks for the node under `torchrun`, else all of
    /// the member's.
    pub fn supervised_ranks(&self) -> std::ops::Range<u32> {
        let first = self.first_rank();
        match self.launcher {
            Launcher::Torchrun => first..first.saturating_add(1),
            Launcher::None | Launcher::Torch => first..first.saturating_add(self.procs_per_node),
        }
    }
}

/// One member as its agent observed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedMember {
    /// The attempt that it belongs to.
    pub attempt: AttemptRef,
    /// Its place in the gang.
    pub node_rank: u32,
    /// Where it is in its life.
    pub phase: ObservedPhase,
}

/// Where a member is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ObservedPhase {
    /// Fetches code and makes directories.
    Preparing,
    /// Waits to go and holds `port` for the rendezvous.
    Ready {
        /// Port held on this node.
        port: u16,
    },
    /// Its ranks run.
    Running {
        /// When they were started, by the agent's clock.
        started_at: Timestamp,
    },
    /// Its ranks are being ended.
    Stopping,
    /// It is over but for processes that outlive SIGKILL: the allocation is held until none is left.
    CleanupPending(Cleanup),
    /// Every process is gone, the allocation is free; logs, outputs and checkpoint are on their way.
    Uploading(Ending),
    /// All of it is over and uploaded.
    Ended(Ending),
}

/// A member that is over but for processes that no signal ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cleanup {
    /// How it would end now. A rank that is still there has the status [`ExitStatus::Unknown`].
    pub ending: Ending,
    /// What is left, at most [`MAX_LEFT_TOLD`] of it.
    pub left: Vec<LeftProcess>,
    /// How many more are left.
    pub more: u32,
}

/// A process that outlives SIGKILL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftProcess {
    /// Its number.
    pub pid: u32,
    /// The kernel's letter for its state; `D` is one that no signal reaches.
    pub state: char,
    /// The kernel's name for it: the first 15 bytes of the program's.
    pub name: String,
}

impl Cleanup {
    /// `pid 812 (python3), state D; pid 813 (python3), state D and 3 more`. Names are cut and freed of control characters.
    #[must_use]
    pub fn told(&self) -> String {
        let clean = |name: &str| -> String {
            let shown = name.chars().filter(|letter| !letter.is_control());
            shown.take(MAX_PROCESS_NAME).collect()
        };
        let told: Vec<String> = self
            .left
            .iter()
            .take(MAX_LEFT_TOLD)
            .map(|left| {
                format!(
                    "pid {} ({}), state {}",
                    left.pid,
                    clean(&left.name),
                    left.state
                )
            })
            .collect();
        match (told.join("; "), self.more) {
            (told, _) if told.is_empty() => "processes that cannot be listed".to_owned(),
            (told, 0) => told,
            (told, more) => format!("{told} and {more} more"),
        }
    }
}

/// How the message of an ending by [`EndCause::NodeRebooted`] begins that says when the node was up again.
pub const REBOOTED_AT: &str = "rebooted at ";

/// How a member ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// What ended it.
    pub cause: EndCause,
    /// One sentence without a final period.
    pub message: String,
    /// Whether any rank was ever started.
    pub started: bool,
    /// How each supervised rank ended, in rank order: empty if none was tried, [`ExitStatus::NotStarted`] for each if the
    /// program could not be executed.
    pub ranks: Vec<RankEnd>,
    /// When the last process was gone.
    pub ended_at: Timestamp,
    /// The tree of `YARD_OUTPUT_DIR`, if anything was in it and it is uploaded.
    pub outputs: Option<Digest>,
    /// The tree of `YARD_CHECKPOINT_DIR`, likewise.
    pub checkpoint: Option<Digest>,
    /// What of logs, outputs and checkpoint is not kept, and why; empty if all is.
    #[serde(default)]
    pub warning: String,
}

/// How one rank ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankEnd {
    /// The rank in the gang.
    pub rank: u32,
    /// Its exit status.
    pub exit: ExitStatus,
    /// When, by the agent's clock. The earliest that failed is what ended the member.
    pub at: Timestamp,
    /// Whether it ended by itself, before the member was being stopped.
    pub unprompted: bool,
    /// Whether the kernel killed it (or a process of it) for want of memory.
    pub oom_killed: bool,
}

crate::state::named_enum!(
    /// What ended a member.
    EndCause {
        /// All ranks exited with 0.
        Completed = "COMPLETED",
        /// A rank ended in another way.
        RankFailed = "RANK_FAILED",
        /// The coordinator asked for it.
        Stopped = "STOPPED",
        /// The time limit passed.
        TimeLimit = "TIME_LIMIT",
        /// Nothing was started: the node could not prepare, for a cause that lies in the infrastructure.
        PrepareFailed = "PREPARE_FAILED",
        /// Nothing was started: the job itself cannot be started (its program is not there, say).
        CannotExecute = "CANNOT_EXECUTE",
        /// The shim was killed; the exit status is not known.
        SupervisorLost = "SUPERVISOR_LOST",
        /// The machine was rebooted.
        NodeRebooted = "NODE_REBOOTED",
        /// The node was cut off from the coordinator for as long as the member may live without it.
        LeaseExpired = "LEASE_EXPIRED",
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_told_in_bounds_and_without_tricks() {
        let mut cleanup = Cleanup {
            ending: Ending {
                cause: EndCause::Stopped,
                message: String::new(),
                started: true,
                ranks: Vec::new(),
                ended_at: Timestamp(0),
                outputs: None,
                checkpoint: None,
                warning: String::new(),
            },
            left: vec![LeftProcess {
                pid: 812,
                state: 'D',
                name: "python3".to_owned(),
            }],
            more: 0,
        };
        assert_eq!(cleanup.told(), "pid 812 (python3), state D");
        cleanup.left.push(LeftProcess {
            pid: 9,
            state: 'R',
            name: format!("a\u{1b}[1m{}", "x".repeat(100)),
        });
        cleanup.more = 3;
        let name = format!("a[1m{}", "x".repeat(MAX_PROCESS_NAME - 4));
        assert_eq!(
            cleanup.told(),
            format!("pid 812 (python3), state D; pid 9 ({name}), state R and 3 more")
        );
    }
}
