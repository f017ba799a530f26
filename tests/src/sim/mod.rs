//! The deterministic simulation: both real cores in one thread, virtual time and one seed, with modelled disks, processes,
//! lines, users and operators around them. A seed draws its own mix of faults, lets them rage, stops them, and then
//! everything that can finish has to. Whatever is promised is held against the process tables and what clients were told.
//!
//! The names are those of the project's list of invariants. Checked here:
//!
//! | # | Where |
//! |---|---|
//! | I1 no double use of GPUs, CPUs, memory; nothing free while its processes live | `oracle`: each start, each row |
//! | I2 gangs whole; no two attempts of a task at once but by declared replacement; nothing placed after a restore before its nodes were heard | `oracle`, `calm` |
//! | I3 each rank of an attempt starts once | `oracle`: each start |
//! | I4 attempt numbers, phases and counters only grow, also above what nodes have that a restored backup forgot | `oracle`: each row |
//! | I5 what was accepted is there after every crash | `oracle`: each answer, each start |
//! | I6 one request id makes one job | `oracle`: each row, each answer |
//! | I7 terminal is final, success is real | `oracle`, `users` (watchers) |
//! | I8 an answered cancel is final | `oracle` |
//! | I10 what is given never exceeds what there is; the core's own tables agree | `oracle` |
//! | I11 durable before visible: every word, every start, every deletion | `oracle`, `coordinator`, `agent` |
//! | I12 memory is what a start from the rows gives; rows are what the log gives | `oracle`, `calm` |
//! | I13 exit statuses on record are what processes ended with, or unknown; the wire loses nothing | `oracle`, `network` |
//! | I16 our own downtime, pauses and clocks are nobody's silence | `oracle` |
//! | I17 a watcher sees every durable event once, in order | `users` |
//! | I18 a report counts only from a node of the attempt or bundle; the words of an older coordinator count for nothing | `oracle`, `carried`, `agent` |
//! | I1 to I5, I7, I8, I11, I13, I16, I18 for bundles and tasks in them | `carried` |
//! | I19 every loop ends | `world` |
//! | P39 a task is tried as often as its job asks for, and failures of nodes do not count | `duties` |
//! | I9 no more unfinished jobs than there may be, of all and of one user; I20 nothing passes a job that could have had its place | `order` |
//! | policy: nothing new on a node that an operator closed | `duties` |
//! | I3, I4, I8, I13, I16 for what is decided and asked for | `duties` |
//! | I21 to I24 what can finish does; nodes are back; nothing is left; the view is the truth | `calm` |
//! | I25 the same seed gives the same trace | the test |
//!
//! `corner` holds all of them against an end of each process at each boundary between two effects, and against each order
//! of two messages that are under way at the same time.
//!
//! Not checked, because there is nothing yet that could break them: quotas of amounts (I9), I14 and I15 (machines that cost
//! money), priorities (I20). Bytes of logs (the second half of I13) are no matter of the cores and are tested with real processes.

mod agent;
mod bundles;
mod calm;
mod carried;
mod carrier;
mod clock;
mod coordinator;
mod corner;
mod duties;
mod faults;
mod host;
// The real code of the agent: what waits to be sent of bundles.
#[path = "../../../agent/src/bundles/lanes.rs"]
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "the limit of a journal's reader is not modelled")
)]
mod lanes;
mod network;
mod oracle;
mod order;
mod quarantine;
mod rng;
mod runtime;
mod shim;
mod spoken;
mod store;
mod swarm;
mod trace;
mod users;
mod words;
mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

pub use self::corner::{CornerSum, corner, corner_again, scenario_names};
use self::rng::Rng;
use self::swarm::Swarm;
use self::world::World;

/// How a seed is run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Everything follows from it.
    pub seed: u64,
    /// Keep every line of the trace, not only the last ones.
    pub whole_trace: bool,
    /// No faults but a crash of the coordinator at the boundary between two effects with this number.
    pub crash_at: Option<u64>,
    /// No faults at all, unless `crash_at` says otherwise.
    pub plain: bool,
}

/// What became of a seed in which every promise held.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Over everything that happened.
    pub hash: u64,
    /// How much happened.
    pub events: u64,
    /// Simulated time in milliseconds.
    pub simulated_ms: u64,
    /// Boundaries between two effects that the coordinator passed.
    pub boundaries: u64,
    /// How often each fault and branch was reached.
    pub counters: BTreeMap<&'static str, u64>,
    /// The trace.
    pub trace: Vec<String>,
}

/// A seed in which a promise was broken.
#[derive(Debug, Clone)]
pub struct Failure {
    /// How it was run.
    pub options: Options,
    /// Which promise, such as `I7`; `panic` for a bug that stopped a core.
    pub invariant: &'static str,
    /// How it was broken.
    pub what: String,
    /// The last lines of what happened.
    pub trace: Vec<String>,
    /// Scenario, seed and disturbance, if it was a scenario of the exhaustive corner.
    pub corner: Option<String>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for line in &self.trace {
            writeln!(f, "{line}")?;
        }
        let seed = self.options.seed;
        if let Some(corner) = &self.corner {
            let (invariant, what) = (self.invariant, &self.what);
            writeln!(f, "{corner}: {invariant} is broken: {what}")?;
            return write!(
                f,
                "again: TRAINYARD_CORNER='{corner}' cargo test -p trainyard-tests --test corner one_run -- --nocapture"
            );
        }
        writeln!(
            f,
            "seed {seed}: {} is broken: {}",
            self.invariant, self.what
        )?;
        let crash = self
            .options
            .crash_at
            .map_or(String::new(), |at| format!(" TRAINYARD_CRASH_AT={at}"));
        write!(
            f,
            "again: TRAINYARD_SEED={seed}{crash} cargo test -p trainyard-tests --test simulation one_seed -- --nocapture"
        )
    }
}

/// Runs one seed.
///
/// # Errors
/// The broken promise.
pub fn run(options: Options) -> Result<Outcome, Box<Failure>> {
    let mut rng = Rng::new(options.seed);
    let swarm = if options.plain {
        Swarm::plain(&mut rng)
    } else {
        Swarm::draw(&mut rng)
    };
    let mut world = World::new(swarm, rng);
    world.trace.whole = options.whole_trace;
    world.crash_at = options.crash_at;
    let ran = catch_unwind(AssertUnwindSafe(|| world.run()));
    let broken = match ran {
        Ok(()) => world
            .broken
            .take()
            .map(|broken| (broken.invariant, broken.what)),
        Err(panic) => Some(("panic", told(panic.as_ref()))),
    };
    let trace = world.trace.tail();
    match broken {
        None => Ok(Outcome {
            hash: world.trace.hash(),
            events: world.events,
            simulated_ms: world.now / 1000,
            boundaries: world.boundaries,
            counters: world.trace.counters,
            trace,
        }),
        Some((invariant, what)) => Err(Box::new(Failure {
            options,
            invariant,
            what,
            trace,
            corner: None,
        })),
    }
}

fn told(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without words").to_owned()
}

/// What a run of many seeds has to reach: a simulation in which nothing goes wrong proves nothing.
pub const MUST_HAPPEN: &[&str] = &[
    "placed while an earlier job waits",
    "as many jobs as there may be",
    "submit accepted",
    "submit repeated",
    "request id with another body refused",
    "cancel answered",
    "call lost",
    "answer lost",
    "caller tried again",
    "coordinator started",
    "coordinator killed",
    "coordinator paused",
    "crash at a boundary",
    "commit failed",
    "commit lost",
    "commit durable and nobody told",
    "several events in one commit",
    "disk was slow",
    "coordinator's disk full",
    "row flipped",
    "damaged rows refused",
    "backup restored",
    "state compared with the rows",
    "agent killed",
    "agent paused",
    "agent in a crash loop",
    "agent's state damaged",
    "agent's disk full",
    "accept failed",
    "ended before its shim said anything",
    "recovered: accepted",
    "recovered: gone",
    "recovered: alive",
    "shim killed",
    "shim died without a word",
    "agent kills what a dead shim left",
    "shim wrote from its reserve",
    "host rebooted",
    "host powered off",
    "disk lost",
    "disk cloned",
    "duplicate identity noticed",
    "file of an attempt flipped",
    "host's clock jumped",
    "coordinator's clock jumped",
    "line cut",
    "line cut towards the coordinator",
    "line cut towards the agent",
    "all lines cut",
    "connection broken",
    "all connections broken",
    "slow reader cut off",
    "message came twice",
    "message overtook another",
    "message of an old session arrived late",
    "session given up for silence",
    "session closed by the core",
    "report forged",
    "report of a bundle forged",
    "older coordinator speaks",
    "stale term refused",
    "operator acts without looking",
    "operator who did not look refused",
    "operator who did not look obeyed",
    "restored state waits for its nodes",
    "restored state reconciled",
    "attempt placed after a restore",
    "policy set",
    "node removed",
    "node enrolled anew",
    "operator confirmed a loss",
    "node unreachable",
    "node given up",
    "node confirmed as lost",
    "mass-loss brake set",
    "attempt given up unconfirmed",
    "attempt given up after its lease",
    "lease over, ranks ended",
    "lease over before the start",
    "processes that outlive SIGKILL told",
    "attempt over with cleanup pending",
    "overlap of attempts",
    "gang told to go",
    "gang member went",
    "rank started",
    "rank that ignores SIGTERM",
    "rank that leaves a process behind",
    "rank that cannot be killed for a while",
    "rank out of memory",
    "time limit passed",
    "directory removed",
    "running member told to stop",
    "SUCCEEDED",
    "FAILED",
    "CANCELLED",
    "TIMED_OUT",
    "INTERRUPTED",
    "RANK_EXITED",
    "RANK_SIGNALLED",
    "OOM_KILLED",
    "CANNOT_EXECUTE",
    "PREPARE_FAILED",
    "PREPARE_TIMEOUT",
    "NODE_LOST",
    "NODE_REBOOTED",
    "SUPERVISOR_LOST",
    "UNKNOWN_TO_AGENT",
    "bundle handed",
    "bundle accepted",
    "bundle topped up",
    "bundle holds tasks ahead",
    "carrier handed more tasks",
    "carrier outlived its agent",
    "carrier killed",
    "carrier killed with tasks",
    "carrier died without a word",
    "carrier told to stop while tasks run",
    "carrier wrote from its reserve",
    "agent kills what a dead carrier left",
    "bundle of a dead carrier settled",
    "bundle lost",
    "bundle lost with a reboot",
    "journal's end lost",
    "tasks returned after waiting",
    "tasks handed after the end returned",
    "bundle ended without a carrier",
    "bundle refused",
    "bundle not accepted",
    "bundle recovered: accepted",
    "bundle recovered: over",
    "gap in the reports of a bundle",
    "long task told of",
    "task ended in a bundle",
    "task that leaves a process behind",
    "bundle removed from the rows",
    "bundle forgotten",
    "no task lost",
    "infeasible job said so",
    "everything came to its end",
];
