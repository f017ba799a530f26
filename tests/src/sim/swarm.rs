//! What one seed is about: how large the cluster is, how long it runs, which faults are switched on and how often they
//! come. Each seed draws its own mix, because everything at once hides what only some of it would show.

use std::time::Duration;

use trainyard_coordinator_core::Config;

use super::clock::{Micros, secs};
use super::rng::Rng;

/// Faults that come from time to time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    CoordinatorKilled,
    CoordinatorPaused,
    CoordinatorDiskFull,
    CoordinatorClockJumps,
    RowFlipped,
    BackupRestored,
    AgentKilled,
    AgentPaused,
    AgentCrashLoop,
    AgentStateDamaged,
    ShimKilled,
    Rebooted,
    PoweredOff,
    AgentDiskFull,
    DiskLost,
    DiskCloned,
    FileFlipped,
    ClockJumps,
    LineCut,
    LineCutUp,
    LineCutDown,
    AllCut,
    ConnectionBroken,
    AllConnectionsBroken,
    SlowReader,
    ForgedReport,
    PolicySet,
    NodeRemoved,
    NodeConfirmedLost,
    OperatorRash,
    OlderCoordinator,
}

pub(crate) const FAULTS: [Fault; 31] = [
    Fault::CoordinatorKilled,
    Fault::CoordinatorPaused,
    Fault::CoordinatorDiskFull,
    Fault::CoordinatorClockJumps,
    Fault::RowFlipped,
    Fault::BackupRestored,
    Fault::AgentKilled,
    Fault::AgentPaused,
    Fault::AgentCrashLoop,
    Fault::AgentStateDamaged,
    Fault::ShimKilled,
    Fault::Rebooted,
    Fault::PoweredOff,
    Fault::AgentDiskFull,
    Fault::DiskLost,
    Fault::DiskCloned,
    Fault::FileFlipped,
    Fault::ClockJumps,
    Fault::LineCut,
    Fault::LineCutUp,
    Fault::LineCutDown,
    Fault::AllCut,
    Fault::ConnectionBroken,
    Fault::AllConnectionsBroken,
    Fault::SlowReader,
    Fault::ForgedReport,
    Fault::PolicySet,
    Fault::NodeRemoved,
    Fault::NodeConfirmedLost,
    Fault::OperatorRash,
    Fault::OlderCoordinator,
];

/// Chances in thousandths of what may go wrong each time something is done.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Chances {
    /// The coordinator ends between two effects.
    pub(crate) crash: u64,
    /// A commit fails, which ends the coordinator.
    pub(crate) commit_fails: u64,
    /// A commit takes seconds.
    pub(crate) commit_slow: u64,
    /// A message comes twice.
    pub(crate) twice: u64,
    /// A message overtakes the one before it.
    pub(crate) overtakes: u64,
    /// What was under way in a broken session arrives all the same, late.
    pub(crate) late: u64,
    /// A user's call or its answer is lost.
    pub(crate) call_lost: u64,
    pub(crate) accept_fails: u64,
    pub(crate) fetch_fails: u64,
    pub(crate) fetch_hangs: u64,
    pub(crate) spawn_fails: u64,
    pub(crate) go_fails: u64,
    pub(crate) stop_fails: u64,
    pub(crate) upload_fails: u64,
    pub(crate) remove_fails: u64,
    /// Ranks that end otherwise than with 0, in all the ways there are.
    pub(crate) rank_fails: u64,
    /// Ranks that ignore SIGTERM, leave processes behind or cannot be killed for a while.
    pub(crate) rank_nasty: u64,
}

/// How one seed runs.
#[derive(Debug, Clone)]
pub(crate) struct Swarm {
    pub(crate) hosts: usize,
    /// How long faults come.
    pub(crate) chaos: Micros,
    pub(crate) config: Config,
    pub(crate) heartbeat: Duration,
    /// Commands that wait for one session before it is cut off.
    pub(crate) session_queue: usize,
    /// Mean time between two submits.
    pub(crate) submit_gap: Micros,
    pub(crate) jobs: u64,
    /// Longest ordinary run of a rank.
    pub(crate) longest_run: Micros,
    /// Mean time between two faults of each kind that is on.
    pub(crate) faults: Vec<(Fault, Micros)>,
    pub(crate) chances: Chances,
    /// Longest ordinary way of a message.
    pub(crate) delay: Micros,
    /// Longest ordinary commit.
    pub(crate) fsync: Micros,
    /// Drift of clocks, at most.
    pub(crate) drift_ppm: u64,
    /// Whether a full disk of the coordinator only refuses submits, as its reserve takes the rest.
    pub(crate) reserve: bool,
}

impl Swarm {
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let unreachable = rng.between(8, 30);
        let lost = unreachable + rng.between(20, 200);
        let gang = unreachable + rng.between(5, lost - unreachable);
        let config = Config {
            unreachable_after: Duration::from_secs(unreachable),
            lost_after: Duration::from_secs(lost),
            lost_after_gang: Duration::from_secs(gang),
            lease_margin: Duration::from_secs(rng.between(1, 10)),
            prepare_timeout: Duration::from_secs(rng.between(20, 120)),
            max_live_jobs: 40,
            max_live_jobs_per_user: 25,
            ..Config::default()
        };
        let heartbeat = Duration::from_millis(rng.between(1000, unreachable * 1000 / 5));
        // One in ten is quiet: what works without faults has to be seen too.
        let quiet = rng.chance(100);
        let chance = |rng: &mut Rng, most: u64| match quiet || rng.chance(550) {
            true => 0,
            false => rng.skewed(1, most),
        };
        let chances = Chances {
            crash: chance(rng, 8),
            commit_fails: chance(rng, 5),
            commit_slow: chance(rng, 10),
            twice: chance(rng, 100),
            overtakes: chance(rng, 60),
            late: chance(rng, 600),
            call_lost: chance(rng, 300),
            accept_fails: chance(rng, 60),
            fetch_fails: chance(rng, 80),
            fetch_hangs: chance(rng, 40),
            spawn_fails: chance(rng, 60),
            go_fails: chance(rng, 150),
            stop_fails: chance(rng, 400),
            upload_fails: chance(rng, 300),
            remove_fails: chance(rng, 300),
            rank_fails: chance(rng, 400),
            rank_nasty: chance(rng, 300),
        };
        let mut faults = Vec::new();
        for fault in FAULTS {
            let rare = matches!(
                fault,
                Fault::RowFlipped | Fault::BackupRestored | Fault::DiskCloned | Fault::DiskLost
            );
            if !quiet && rng.chance(if rare { 60 } else { 300 }) {
                let least = if rare { 200 } else { 20 };
                faults.push((fault, secs(rng.skewed(least, 900))));
            }
        }
        Self {
            hosts: usize::try_from(rng.skewed(1, 12)).unwrap_or(1),
            chaos: secs(rng.skewed(120, 1800)),
            config,
            heartbeat,
            session_queue: usize::try_from(rng.skewed(4, 256)).unwrap_or(256),
            submit_gap: secs(rng.skewed(2, 40)),
            jobs: rng.skewed(8, 60),
            longest_run: secs(rng.skewed(5, 400)),
            faults,
            chances,
            delay: rng.skewed(200, 2_000_000),
            fsync: rng.skewed(100, 50_000),
            drift_ppm: if rng.chance(300) { 50_000 } else { 50 },
            reserve: rng.chance(500),
        }
    }

    /// A world in which only what a script says happens.
    pub(crate) fn scripted(rng: &mut Rng, hosts: usize) -> Self {
        let quiet = Self::plain(rng);
        Self {
            hosts,
            config: Config {
                unreachable_after: Duration::from_secs(10),
                lost_after: Duration::from_secs(60),
                lost_after_gang: Duration::from_secs(30),
                prepare_timeout: Duration::from_secs(60),
                ..quiet.config
            },
            // The script ends it.
            chaos: secs(7200),
            jobs: 0,
            heartbeat: Duration::from_secs(2),
            // So that messages are under way at the same time.
            delay: 300_000,
            fsync: 5000,
            ..quiet
        }
    }

    /// A short run without any fault but the one that is asked for: for the test that crashes at every boundary.
    pub(crate) fn plain(rng: &mut Rng) -> Self {
        let quiet = Self {
            chances: Chances::default(),
            faults: Vec::new(),
            ..Self::draw(rng)
        };
        Self {
            hosts: 3,
            chaos: secs(60),
            submit_gap: secs(4),
            jobs: 8,
            longest_run: secs(20),
            delay: 5000,
            drift_ppm: 0,
            session_queue: 256,
            ..quiet
        }
    }
}
