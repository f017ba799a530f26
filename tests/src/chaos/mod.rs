//! Real force: the real binary on several hosts (network namespaces), a script of faults drawn from a seed, and jobs that
//! keep a ledger of their own. When the faults are over, everything that the cluster says is held against the ledger.
//! `docs/reliability.md` tells how to run it and how to read a failure.
//!
//! | module | owns |
//! |---|---|
//! | `plan`, `script` | what happens: jobs and faults, drawn before anything runs |
//! | `witness`, `ledger` | what the ranks are, and what they write down |
//! | `world`, `net`, `proxy`, `daemon`, `processes` | hosts, cables, disks and processes |
//! | `force`, `users` | what is done to them, and who works meanwhile |
//! | `check`, `summary` | whether every promise was kept, and the numbers |
//! | `trouble` | when what was wrong, so that numbers can leave it out |

mod check;
mod daemon;
mod force;
mod ledger;
mod net;
mod output;
mod plan;
mod processes;
mod proxy;
mod rng;
mod script;
mod summary;
mod timing;
mod trouble;
mod users;
pub mod witness;
mod world;

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rng::Rng;
use script::Stage;
use trouble::Troubles;
use world::World;

/// Nodes of the cluster.
const AGENTS: usize = 3;

/// What a run is made of.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long things go wrong.
    pub time: Duration,
    /// All chance comes from it.
    pub seed: u64,
    /// Jobs that are submitted meanwhile.
    pub jobs: u32,
    /// Whether the coordinator's disk is filled, too.
    pub coordinator_disk: bool,
    /// Whether the run's directory is kept although nothing broke.
    pub keep: bool,
    /// The program that jobs are (`trainyard-witness`).
    pub witness: PathBuf,
}

/// Set: the run takes place, also where tests may be skipped.
pub const WANTED: &str = "TRAINYARD_CHAOS";

impl Options {
    /// Reads `TRAINYARD_CHAOS_SECONDS`, `_SEED`, `_JOBS`, `_COORDINATOR_DISK` and `_KEEP`; unless told, a run takes 180 seconds of
    /// faults with 300 jobs and a seed of the moment.
    ///
    /// # Panics
    /// If one of them is no number.
    #[must_use]
    pub fn from_environment(witness: PathBuf) -> Self {
        let number = |name: &str| {
            let name = format!("TRAINYARD_CHAOS_{name}");
            let text = std::env::var(&name).ok()?;
            Some(
                text.parse::<u64>()
                    .unwrap_or_else(|error| panic!("{name}={text:?}: {error}")),
            )
        };
        let moment = || {
            let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            since.map_or(0, |since| since.as_secs())
        };
        Self {
            time: Duration::from_secs(number("SECONDS").unwrap_or(180)),
            seed: number("SEED").unwrap_or_else(moment),
            jobs: u32::try_from(number("JOBS").unwrap_or(300)).unwrap_or(u32::MAX),
            coordinator_disk: number("COORDINATOR_DISK").is_some_and(|switch| switch != 0),
            keep: number("KEEP").is_some_and(|switch| switch != 0),
            witness,
        }
    }

    /// The command that repeats the run.
    fn command(&self) -> String {
        format!(
            "TRAINYARD_CHAOS=1 TRAINYARD_CHAOS_SEED={} TRAINYARD_CHAOS_SECONDS={} TRAINYARD_CHAOS_JOBS={} {}cargo test \
             -p trainyard-tests --test chaos -- --nocapture",
            self.seed,
            self.time.as_secs(),
            self.jobs,
            if self.coordinator_disk {
                "TRAINYARD_CHAOS_COORDINATOR_DISK=1 "
            } else {
                ""
            }
        )
    }
}

/// Says why a run cannot take place here, if so.
#[must_use]
pub fn missing() -> Option<&'static str> {
    net::missing()
}

/// Runs it all; the summary goes to standard error.
///
/// # Panics
/// If a promise was broken, with everything that speaks against it. The directory of the run is kept then.
pub fn run(options: &Options) {
    tell(&format!(
        "seed {}; repeat with: {}",
        options.seed,
        options.command()
    ));
    let mut rng = Rng::new(options.seed);
    let stage = Stage {
        agents: AGENTS,
        small_disk: 0,
        slow_line: AGENTS - 1,
        coordinator_disk: options.coordinator_disk,
    };
    let script = script::script(&mut rng.fork(), options.time, stage);
    let world = World::new(options, stage);
    let commands = plan::Commands {
        witness: &world.witness(),
        ledger: world.ledger.dir(),
        nodes: u32::try_from(AGENTS).unwrap_or(1),
        node_mib: world::memory_mib(),
    };
    // The end of the faults meets jobs that are under way.
    let plan = plan::jobs(
        &mut rng.fork(),
        options.jobs,
        options.time.mul_f64(0.97),
        &script::long(&script),
        &commands,
    );
    world.note(
        "script.txt",
        &script
            .iter()
            .map(|step| format!("{step}\n"))
            .collect::<String>(),
    );
    world.note(
        "jobs.txt",
        &plan
            .iter()
            .map(|job| format!("{job:?}\n"))
            .collect::<String>(),
    );

    let stop = AtomicBool::new(false);
    let users = users::Users::new(plan);
    let (window, troubles, findings) = std::thread::scope(|scope| {
        scope.spawn(|| daemon::supervise(world.daemons(), &stop));
        // The supervisor ends also when something below panics.
        let _stop = StopAtEnd(&stop);
        world.enrol();
        let began = ledger::boot_clock();
        let (users, world) = (&users, &world);
        let ended = std::thread::scope(|scope| {
            let now = Instant::now();
            scope.spawn(move || users.work(world, now, options.time));
            scope.spawn(move || users.watch(world, now + options.time));
            force::play(world, &script, options.time, users);
            let ended = ledger::boot_clock();
            tell("the faults are over; the cluster has to settle");
            ended
        });
        let window = (began, ended);
        let troubles = Troubles::new(&script, began);
        let findings = check::check(world, users, &script, &troubles, window);
        (window, troubles, findings)
    });
    let text = summary::summary(
        options,
        &world,
        &script,
        &users,
        (window, &troubles),
        &findings,
    );
    world.note("summary.txt", &text);
    tell(&text);
    if findings.broken.is_empty() && options.keep {
        tell(&format!(
            "the run's directory is kept: {}",
            world.keep().display()
        ));
    } else if !findings.broken.is_empty() {
        let kept = world.keep();
        panic!(
            "{} promises were broken:\n{}\nthe run's directory is kept: {}\nseed {}; repeat with: {}",
            findings.broken.len(),
            findings.broken.join("\n"),
            kept.display(),
            options.seed,
            options.command()
        );
    }
}

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// To standard error, past the capture of a passing test's output.
fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "chaos: {text}");
}

#[expect(
    clippy::disallowed_methods,
    reason = "faults, delays and users take time; conditions are polled with the same pause"
)]
fn rest(time: Duration) {
    std::thread::sleep(time);
}
