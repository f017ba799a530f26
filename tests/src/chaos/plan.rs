//! The jobs of a run, drawn from its seed before it begins: what each is, when it is submitted, how impatient its user is
//! and whether it is cancelled. Nothing here runs anything.

use std::path::Path;
use std::time::Duration;

use super::rng::Rng;
use crate::repository;

/// Where training finds its gang's file; its code and data travel with the job.
const TRAINING: &str = "examples/digits/job.yaml";
/// Lines of a job that floods its output: about 4 MiB.
const FLOOD: u64 = 100_000;
/// What every training does. With a pause in each of its 45 steps an epoch takes a second or two, so that faults meet it.
pub(crate) const TRAINING_EPOCHS: u32 = 3;
const STEP_SLEEP: &str = "0.02";
/// Jobs of each policy that are there when a node falls away for longer than the cluster waits, and how long before that
/// they are submitted. Five of the nine fit on a node by their share (of a hundred) of its memory, so that they are on two
/// of three nodes, and on any two there is room for all of them: one that fits nowhere would have all others wait behind it.
const LASTING: u32 = 3;
const LASTING_MEMORY: u64 = 18;
const BEFORE_LONG: Duration = Duration::from_secs(6);
/// How long they work: until the node is given up at least.
const LASTING_WORK: u64 = 36_000;

/// What a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Works for a moment and succeeds.
    Short,
    /// Works for some seconds and succeeds.
    Long,
    /// Ends with a code of its own.
    Fails,
    /// Fails once and is tried again.
    FailsOnce,
    /// Several tasks.
    Array,
    /// Ranks on several nodes that all succeed.
    Gang,
    /// One rank of a gang fails, the others would work for ever.
    GangFails,
    /// The example training on several nodes.
    Training,
    /// Does not listen to SIGTERM and would work for ever; its time limit ends it.
    Deaf,
    /// Leaves a daemon in a session of its own.
    Daemon,
    /// Writes much more than fits into any buffer.
    Flood,
    /// Leaves outputs.
    Outputs,
    /// Is there when a node falls away for long, and works for longer than the cluster waits.
    Lasting,
}

/// What is to happen when a node falls silent: the job's `--on-disconnect`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Policy {
    /// Another attempt begins after a while, and the old one may still live.
    Replace,
    /// Another attempt begins when the end of the old one is known.
    Wait,
    /// The node ends the old attempt by itself, and then another one begins.
    Stop,
}

impl Policy {
    const ALL: [Self; 3] = [Self::Replace, Self::Wait, Self::Stop];

    fn word(self) -> &'static str {
        match self {
            Self::Replace => "replace",
            Self::Wait => "wait",
            Self::Stop => "stop",
        }
    }
}

/// How a job is cancelled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cancel {
    /// Time after its id was printed.
    pub(crate) after: Duration,
    /// Whether the command waits until nothing runs any more.
    pub(crate) waits: bool,
}

/// One job.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) request: String,
    pub(crate) due: Duration,
    pub(crate) kind: Kind,
    /// Of `yard submit`, before the command.
    pub(crate) flags: Vec<String>,
    pub(crate) command: Vec<String>,
    pub(crate) policy: Policy,
    /// Tasks, and ranks of each.
    pub(crate) tasks: u32,
    pub(crate) ranks: u32,
    /// Lines of the known pattern that each rank writes to standard output, unless it is ended.
    pub(crate) lines: u64,
    pub(crate) outputs: u32,
    /// Further attempts after failures of its own.
    pub(crate) retries: usize,
    /// The code that a failure of its own ends with.
    pub(crate) code: u8,
    pub(crate) cancel: Option<Cancel>,
    /// After how long the user gives the first tries up and asks again under the same request id.
    pub(crate) impatient: Vec<Duration>,
    /// Whether it is submitted once more after its id is known.
    pub(crate) again: bool,
    /// Whether another job is submitted under its request id.
    pub(crate) other: bool,
}

/// What the commands of all jobs need.
#[derive(Debug)]
pub(crate) struct Commands<'a> {
    pub(crate) witness: &'a Path,
    pub(crate) ledger: &'a Path,
    /// Nodes of the cluster: no gang is larger.
    pub(crate) nodes: u32,
    /// Memory of each of them.
    pub(crate) node_mib: u64,
}

/// Draws jobs that are submitted within `time`, in that order. `long` is when nodes fall away for longer than the cluster
/// waits.
pub(crate) fn jobs(
    rng: &mut Rng,
    count: u32,
    time: Duration,
    long: &[Duration],
    commands: &Commands<'_>,
) -> Vec<Job> {
    let most = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let mut dues: Vec<_> = long
        .iter()
        .flat_map(|at| (0..LASTING).map(|round| (at.saturating_sub(BEFORE_LONG), round)))
        .flat_map(|(due, round)| Policy::ALL.map(|policy| (due, round, Some(policy))))
        .take(count as usize)
        .collect();
    while dues.len() < count as usize {
        dues.push((Duration::from_millis(rng.between(0, most)), 0, None));
    }
    dues.sort_unstable();
    let run = rng.between(0, 1 << 40);
    dues.into_iter()
        .enumerate()
        .map(|(number, (due, _, lasting))| {
            let mut rng = rng.fork();
            let mut job = match lasting {
                Some(policy) => self::lasting(&mut rng, policy, commands),
                None => job(&mut rng, commands),
            };
            job.request = format!("chaos-{run:x}-{number}");
            job.due = due;
            job
        })
        .collect()
}

/// One that nobody cancels. It takes little, so that all of them fit beside what else is there.
fn lasting(rng: &mut Rng, policy: Policy, commands: &Commands<'_>) -> Job {
    let mut job = Job {
        lines: rng.between(0, 20),
        ..bare(Kind::Lasting, policy)
    };
    let memory = format!("{}MiB", commands.node_mib * LASTING_MEMORY / 100);
    flag(&mut job, &["--cpus", "0.1", "--memory", &memory]);
    shape(rng, &mut job, commands);
    job
}

fn job(rng: &mut Rng, commands: &Commands<'_>) -> Job {
    let kind = rng.weighted(&[
        (34, Kind::Short),
        (8, Kind::Long),
        (8, Kind::Fails),
        (5, Kind::FailsOnce),
        (9, Kind::Array),
        (6, Kind::Gang),
        (8, Kind::GangFails),
        (8, Kind::Training),
        (4, Kind::Deaf),
        (4, Kind::Daemon),
        (3, Kind::Flood),
        (6, Kind::Outputs),
    ]);
    // Of those that are over in a moment few are there long enough.
    let cancelled = match kind {
        Kind::Short | Kind::Fails | Kind::FailsOnce | Kind::Flood | Kind::Outputs => 8,
        Kind::Training => 15,
        _ => 35,
    };
    let policy = rng.weighted(&[
        (60, Policy::Replace),
        (20, Policy::Wait),
        (20, Policy::Stop),
    ]);
    let mut job = Job {
        lines: rng.between(0, 20),
        cancel: rng.percent(cancelled).then(|| Cancel {
            after: Duration::from_millis(rng.between(0, 4000)),
            waits: rng.percent(60),
        }),
        again: rng.percent(10),
        other: rng.percent(5),
        ..bare(kind, policy)
    };
    while rng.percent(20) && job.impatient.len() < 3 {
        job.impatient
            .push(Duration::from_millis(rng.between(20, 300)));
    }
    // Only training computes; the others would wait for each other more than for what goes wrong.
    let cpus = if kind == Kind::Training {
        "0.5"
    } else {
        "0.25"
    };
    flag(&mut job, &["--cpus", cpus]);
    shape(rng, &mut job, commands);
    job
}

/// A job that has a name and a policy and does nothing yet.
fn bare(kind: Kind, policy: Policy) -> Job {
    let mut job = Job {
        request: String::new(),
        due: Duration::ZERO,
        kind,
        flags: Vec::new(),
        command: Vec::new(),
        policy,
        tasks: 1,
        ranks: 1,
        lines: 0,
        outputs: 0,
        retries: 0,
        code: 0,
        cancel: None,
        impatient: Vec::new(),
        again: false,
        other: false,
    };
    flag(&mut job, &["--name", &format!("{kind:?}").to_lowercase()]);
    if policy != Policy::Replace {
        flag(&mut job, &["--on-disconnect", policy.word()]);
    }
    job
}

fn flag(job: &mut Job, words: &[&str]) {
    job.flags
        .extend(words.iter().map(|word| (*word).to_owned()));
}

/// What makes the job its kind.
fn shape(rng: &mut Rng, job: &mut Job, commands: &Commands<'_>) {
    let mut orders: Vec<String> = Vec::new();
    let mut order =
        |name: &str, value: u64| orders.extend([format!("--{name}"), value.to_string()]);
    let mut alone = Vec::new();
    match job.kind {
        Kind::Short | Kind::Flood => order("work", rng.between(0, 1500)),
        Kind::Long => {
            // Some are still there when a node is given up.
            let most = if rng.percent(40) { 40_000 } else { 8000 };
            order("work", rng.between(2000, most));
        }
        Kind::Lasting => {
            order("work", LASTING_WORK);
            flag(job, &["--grace", "1s"]);
        }
        Kind::Fails | Kind::FailsOnce => {
            job.code = u8::try_from(rng.between(1, 80)).unwrap_or(1);
            order("work", rng.between(0, 1000));
            order("exit", job.code.into());
            if job.kind == Kind::FailsOnce {
                alone.push("--only-first");
                job.retries = 1;
                flag(job, &["--retries", "1"]);
            }
        }
        Kind::Array => {
            // Its tasks wait in bundles, also on nodes where they do not run at once.
            let most = if rng.percent(20) { 60 } else { 10 };
            job.tasks = u32::try_from(rng.between(3, most)).unwrap_or(3);
            let last = (job.tasks - 1).to_string();
            flag(job, &["--array", &format!("0-{last}")]);
            order("work", rng.between(0, if most > 10 { 200 } else { 2000 }));
        }
        Kind::Gang | Kind::GangFails | Kind::Training => {
            job.ranks = u32::try_from(rng.between(2, commands.nodes.into())).unwrap_or(2);
            flag(job, &["--nodes", &job.ranks.to_string(), "--grace", "2s"]);
            if job.kind != Kind::Training && rng.percent(30) {
                job.ranks *= 2;
                flag(job, &["--procs-per-node", "2"]);
            }
            // A node that was given up does not count while it is away.
            flag(job, &["--allow-infeasible"]);
            match job.kind {
                Kind::Gang => {
                    let most = if rng.percent(30) { 30_000 } else { 3000 };
                    order("work", rng.between(500, most));
                }
                Kind::GangFails => {
                    job.code = 5;
                    order("work", rng.between(200, 3000));
                    order("exit", 5);
                    order("only-rank", rng.between(0, u64::from(job.ranks) - 1));
                }
                _ => train(job),
            }
        }
        Kind::Deaf => {
            order("work", 600_000);
            alone.push("--ignore-term");
            flag(job, &["--time-limit", "2s", "--grace", "1s"]);
        }
        Kind::Daemon => {
            order("work", rng.between(0, 1500));
            alone.push("--daemon");
            flag(job, &["--grace", "1s"]);
        }
        Kind::Outputs => {
            job.outputs = u32::try_from(rng.between(1, 5)).unwrap_or(1);
            order("work", rng.between(0, 1000));
            order("outputs", job.outputs.into());
        }
    }
    if job.kind == Kind::Flood {
        job.lines = FLOOD;
    }
    if job.kind == Kind::Training {
        // What training prints is its own; the ledger says how it ended.
        job.lines = 0;
    }
    order("lines", job.lines);
    let program = [commands.witness, commands.ledger].map(|path| path.display().to_string());
    let words = alone.into_iter().map(str::to_owned);
    let given = std::mem::take(&mut job.command);
    job.command = program
        .into_iter()
        .chain(orders)
        .chain(words)
        .chain(given)
        .collect();
}

/// Training in plain Python; a rank that loses its peers for too long ends with 1, so it may try again.
fn train(job: &mut Job) {
    let file = repository().join(TRAINING).display().to_string();
    flag(
        job,
        &["--file", &file, "--memory", "64MiB", "--retries", "3"],
    );
    job.retries = 3;
    job.code = 1;
    let epochs = TRAINING_EPOCHS.to_string();
    job.command = [
        "--",
        "python3",
        "train.py",
        "--epochs",
        &epochs,
        "--step-sleep",
        STEP_SLEEP,
        "--peer-timeout",
        "20",
        "--join-timeout",
        "20",
    ]
    .map(str::to_owned)
    .to_vec();
}
