//! The numbers that the core decides by. The driver fills them from its configuration file; the core never reads one.
//! It must not know where a number came from.

use std::time::Duration;

use trainyard_common::limits;

/// Times and bounds of the core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Silence after which a node gets no new work.
    pub unreachable_after: Duration,
    /// Silence after which a single-node attempt is given up under the policy `replace`, and the node is lost.
    pub lost_after: Duration,
    /// The same for attempts with more than one member.
    pub lost_after_gang: Duration,
    /// Under the policy `stop`: what is waited beyond the lease, its drift and the grace.
    pub lease_margin: Duration,
    /// Time in which all members of an attempt must be ready.
    pub prepare_timeout: Duration,
    /// Attempts in a row that may end for a cause in the infrastructure before the task fails, at least 1.
    pub max_infrastructure_failures: u32,
    /// Different nodes that may go down with a task running there before it is not tried again, at least 1.
    pub max_nodes_taken_down: usize,
    /// Failed attempts in a row that may end soon after their start before the task is not tried again, at least 1.
    pub max_early_ends: u32,
    /// How long the node of an agent that crashes again and again gets no new work; zero is not at all.
    pub crash_pause: Duration,
    /// Jobs in a non-terminal state.
    pub max_live_jobs: usize,
    /// Jobs in a non-terminal state of one user.
    pub max_live_jobs_per_user: usize,
    /// Enrolled nodes.
    pub max_nodes: usize,
    /// Join tokens that are kept.
    pub max_tokens: usize,
    /// How long a request id is remembered after its job was accepted.
    pub request_id_retention: Duration,
}

impl Config {
    /// Silence after which a node is suspected of being unreachable: half of what makes it that.
    pub(crate) fn suspect_after(&self) -> Duration {
        self.unreachable_after / 2
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            unreachable_after: limits::UNREACHABLE_AFTER,
            lost_after: limits::LOST_AFTER,
            lost_after_gang: limits::LOST_AFTER_GANG,
            lease_margin: limits::LEASE_MARGIN,
            prepare_timeout: limits::PREPARE_TIMEOUT,
            max_infrastructure_failures: limits::MAX_INFRASTRUCTURE_FAILURES,
            max_nodes_taken_down: limits::MAX_NODES_TAKEN_DOWN,
            max_early_ends: limits::MAX_EARLY_ENDS,
            crash_pause: limits::CRASH_PAUSE,
            max_live_jobs: limits::MAX_LIVE_JOBS,
            max_live_jobs_per_user: limits::MAX_LIVE_JOBS_PER_USER,
            max_nodes: limits::MAX_NODES,
            max_tokens: limits::MAX_TOKENS,
            request_id_retention: limits::REQUEST_ID_RETENTION,
        }
    }
}

/// Request ids remembered at once. Ten submits a second for the whole retention fit (about 200 MB); at the bound new
/// submits are refused, because forgetting an id early could run a job twice.
pub(crate) const MAX_REMEMBERED_REQUESTS: usize = 1_000_000;

/// Tasks placed in one round, so that one transaction and one pause stay short; the round asks for another one.
pub(crate) const MAX_PLACEMENTS_PER_ROUND: usize = 1000;

/// Bundles of one node; tasks beyond are placed one by one. An agent takes 256 and may still be cleaning some of them away
/// that are no more here.
pub(crate) const MAX_BUNDLES_PER_NODE: usize = 192;

/// Jobs behind a blocked head, or at all while no node is open, that are told in one round that they wait. Those further
/// back keep the reason they have.
pub(crate) const BEHIND_TOLD: usize = 1000;

/// Rows that one round changes only to say anew why their jobs wait; the next round goes on. Each is written, and whoever
/// submits meanwhile waits for that: so many take a few tens of milliseconds. More than [`BEHIND_TOLD`], so that one round
/// is enough for those.
pub(crate) const MAX_TOLD_PER_ROUND: usize = 2000;

/// Of those, the first ones are told by name which job they wait for. Few, because they are told again whenever that
/// job changes; the others get a sentence that stays true.
pub(crate) const BEHIND_NAMED: usize = 16;

/// Longest wait before a task is tried again after failures of the infrastructure in a row.
pub(crate) const MAX_RETRY_DELAY: Duration = Duration::from_secs(60);

/// The wait before the next attempt after this many failures of the infrastructure in a row: none after the first,
/// which is mostly one bad node and another one is at hand, then 1 s, 2 s, 4 s, so that a disturbance that lasts
/// a few seconds does not use up every attempt.
pub(crate) fn retry_delay(failures: u32) -> Duration {
    match failures.checked_sub(2) {
        None => Duration::ZERO,
        Some(doublings) => Duration::from_secs(1 << doublings.min(6)).min(MAX_RETRY_DELAY),
    }
}
