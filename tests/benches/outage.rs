//! Whether training feels an outage of the coordinator: the digits training with a fixed number of steps, on a local
//! cluster of the release binary, in pairs of one run with the coordinator up all the time and one in which it is killed
//! and stays away for a while. Prints both, and the ratio with its interval. It must not reach into a component.
//!
//! `OUTAGE_PAIRS` sets the number of pairs (default 40); `YARD_BENCH_BINARY` names a binary to measure instead of the one
//! of this tree.
#![expect(
    clippy::print_stdout,
    reason = "a program whose purpose is to print a table"
)]

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use trainyard_tests::bench::{self, Cluster, let_pass};
use trainyard_tests::{repository, until};

/// Pairs unless `OUTAGE_PAIRS` says otherwise.
const PAIRS: usize = 40;
/// Epochs of one run: 3 to 7 seconds of training here. Short, so that both runs of a pair meet the same mood of the machine:
/// with 20 seconds each, the interval of 12 pairs was 10 % wide to each side.
const EPOCHS: &str = "15";
/// From the first step to the coordinator's end.
const BEFORE: Duration = Duration::from_millis(300);
/// How long it is away.
const AWAY: Duration = Duration::from_secs(2);
/// Runs the training and says what it took: wall clock and CPU time of it and its children, nothing of the shim.
const MEASURE: &str = "import json,resource,subprocess,sys,time
begin=time.monotonic()
code=subprocess.call([sys.executable,'train.py','--epochs','@EPOCHS@'],stdout=sys.stderr)
used=resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps(dict(code=code,wall=time.monotonic()-begin,cpu=used.ru_utime+used.ru_stime)))
";

/// What one run took.
#[derive(Clone, Copy)]
struct Took {
    wall: f64,
    cpu: f64,
}

fn main() {
    let pairs = pairs();
    println!("{}", bench::machine());
    let cluster = Cluster::up(bench::binary());
    let _ = run(&cluster, false);
    let mut quiet = Vec::new();
    let mut outage = Vec::new();
    for pair in 0..pairs {
        // Which one comes first alternates, so that a slow drift of the machine is in both.
        for away in [pair % 2 == 1, pair % 2 == 0] {
            let took = run(&cluster, away);
            println!(
                "pair {pair}, {}: {:.3} s, {:.3} s of CPU",
                if away { "outage" } else { "quiet " },
                took.wall,
                took.cpu
            );
            if away { &mut outage } else { &mut quiet }.push(took);
        }
    }
    println!("\n| {pairs} pairs | quiet | outage | outage / quiet | 95 % interval |");
    println!("|---|---|---|---|---|");
    row("CPU time", &quiet, &outage, |took| took.cpu);
    row("time for the same steps", &quiet, &outage, |took| took.wall);
}

fn pairs() -> usize {
    let text = std::env::var("OUTAGE_PAIRS").ok();
    let pairs = text.map_or(PAIRS, |text| {
        text.parse().expect("OUTAGE_PAIRS is a number")
    });
    assert!(pairs >= 2, "an interval takes two pairs or more");
    pairs
}

/// Trains once, with or without the coordinator being away in between.
fn run(cluster: &Cluster, away: bool) -> Took {
    let digits = repository().join("examples/digits");
    let program = MEASURE.replace("@EPOCHS@", EPOCHS);
    let dir = digits.to_str().expect("the path of the tree is UTF-8");
    let submit = ["submit", "--dir", dir, "--", "python3", "-c", &program];
    let job = cluster.yard(&submit);
    until("the training runs", || {
        (state(cluster, &job) == "RUNNING").then_some(())
    });
    if away {
        let_pass(BEFORE);
        let [(_, coordinator), _] = cluster.processes();
        kill(coordinator, Signal::SIGKILL).expect("the coordinator runs");
        let_pass(AWAY);
        let _ = cluster.yard(&["up", "--listen", "127.0.0.1:0"]);
        assert_eq!(
            state(cluster, &job),
            "RUNNING",
            "the outage outlasted the training"
        );
    }
    let _ = cluster.yard(&["wait", &job]);
    let log = cluster.yard(&["logs", &job]);
    let line = log.lines().rev().find(|line| line.contains("\"wall\""));
    let line = line.expect("the training said what it took");
    let json = &line[line.find('{').expect("it is JSON")..];
    let took: Value = serde_json::from_str(json).expect("it is JSON");
    assert_eq!(took["code"], 0, "the training succeeds");
    let number = |name: &str| took[name].as_f64().expect("a number");
    Took {
        wall: number("wall"),
        cpu: number("cpu"),
    }
}

fn state(cluster: &Cluster, job: &str) -> String {
    let job: Value = serde_json::from_str(&cluster.yard(&["job", job, "--json"]))
        .expect("a job is told as JSON");
    job["state"].as_str().unwrap_or_default().to_owned()
}

/// Prints means, the mean ratio within pairs, and its interval by Student's t.
fn row(what: &str, quiet: &[Took], outage: &[Took], of: impl Fn(&Took) -> f64) {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / number(values.len());
    let all = |took: &[Took]| took.iter().map(&of).collect::<Vec<_>>();
    let ratios: Vec<f64> = outage
        .iter()
        .zip(quiet)
        .map(|(a, b)| of(a) / of(b))
        .collect();
    let middle = mean(&ratios);
    let squares: f64 = ratios.iter().map(|ratio| (ratio - middle).powi(2)).sum();
    let degrees = ratios.len() - 1;
    let error = (squares / number(degrees) / number(ratios.len())).sqrt();
    let half = student(degrees) * error;
    println!(
        "| {what} | {:.3} s | {:.3} s | {middle:.4} | {:.4} to {:.4} |",
        mean(&all(quiet)),
        mean(&all(outage)),
        middle - half,
        middle + half
    );
}

#[expect(clippy::cast_precision_loss, reason = "a number of pairs is small")]
fn number(count: usize) -> f64 {
    count as f64
}

/// The 97.5 % point of Student's t with so many degrees of freedom; from a table of it, rounded up between its rows.
fn student(degrees: usize) -> f64 {
    match degrees {
        1 => 12.706,
        2 => 4.303,
        3 => 3.182,
        4 => 2.776,
        5 => 2.571,
        6 => 2.447,
        7 => 2.365,
        8 => 2.306,
        9 => 2.262,
        10 => 2.228,
        11..=14 => 2.201,
        15..=19 => 2.131,
        20..=29 => 2.086,
        30.. => 2.042,
        0 => f64::INFINITY,
    }
}
