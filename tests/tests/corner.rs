//! The exhaustive corner of the simulation: every scenario, with an end at every boundary and every pair of messages in the
//! other order. Without optimisation only a part of them is run, each time the same. `TRAINYARD_CORNER_SHARE=N` runs one in
//! N, `TRAINYARD_CORNER_SEEDS=N` draws the times of each scenario N times; `TRAINYARD_CORNER=...` with the test `one_run`
//! repeats what a failure names.

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use trainyard_tests::sim::{CornerSum, Failure, corner, corner_again, scenario_names};

/// One in so many is run where nothing is said.
const SHARE: usize = if cfg!(debug_assertions) { 60 } else { 1 };
/// Least of boundaries and of pairs of a scenario, or it is none.
const LEAST_BOUNDARIES: u64 = 50;
const LEAST_PAIRS: u64 = 2;
const LEAST_PAIRS_OF_ALL: u64 = 250;
/// What all scenarios together reach.
const MUST_HAPPEN: &[&str] = &[
    "submit repeated",
    "request id with another body refused",
    "cancel answered",
    "commit durable and nobody told",
    "commit lost",
    "accepted and nobody heard",
    "shim started and nobody heard",
    "bundle accepted and nobody heard",
    "recovered: accepted",
    "recovered: alive",
    "recovered: gone",
    "shim killed by the script",
    "carrier killed with tasks",
    "journal's end lost",
    "bundle topped up",
    "message delivered after a later one",
    "gang told to go",
    "time limit passed",
    "node unreachable",
    "node given up",
    "node confirmed as lost",
    "policy set",
    "backup restored",
    "restored state waits for its nodes",
    "restored state reconciled",
    "running member told to stop",
    "SUCCEEDED",
    "FAILED",
    "CANCELLED",
    "TIMED_OUT",
    "INTERRUPTED",
    "NODE_LOST",
    "NODE_REBOOTED",
    "SUPERVISOR_LOST",
];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Written past the capture of a passing test's output, which nobody would see.
fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

#[test]
fn every_end_and_every_order_breaks_no_promise() {
    let share = number("TRAINYARD_CORNER_SHARE").map_or(SHARE, |share| share as usize);
    let seeds = number("TRAINYARD_CORNER_SEEDS").unwrap_or(1);
    let names = scenario_names();
    assert!(names.len() >= 20, "only {} scenarios", names.len());
    let wanted: Vec<(&str, u64)> = (1..=seeds)
        .flat_map(|seed| names.iter().map(move |name| (*name, seed)))
        .collect();
    let began = Instant::now();
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(&str, u64, CornerSum)>> = Mutex::default();
    let failures: Mutex<Vec<Failure>> = Mutex::default();
    let threads = std::thread::available_parallelism()
        .map_or(1, std::num::NonZero::get)
        .min(8);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((name, seed)) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match corner(name, *seed, share) {
                        Ok(sum) => done
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push((name, *seed, sum)),
                        Err(failure) => failures
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push(*failure),
                    }
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    let failures = failures
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(name, seed, _)| (names.iter().position(|known| known == name), *seed));
    tell(&format!(
        "{:>40} {:>10} {:>6} | runs: {:>11} {:>6} {:>6} {:>6} {:>6}",
        "scenario", "boundaries", "pairs", "coordinator", "agent", "power", "shims", "order"
    ));
    let (mut runs, mut events) = (0, 0);
    for (name, seed, sum) in &done {
        runs += sum.runs();
        events += sum.events;
        let [coordinator, agent, power, shims] = sum.crashes;
        if *seed == 1 {
            tell(&format!(
                "{name:>40} {:>10} {:>6} | {coordinator:>17} {agent:>6} {power:>6} {shims:>6} {:>6}",
                sum.boundaries, sum.pairs, sum.swaps
            ));
        }
    }
    tell(&format!(
        "{} scenarios, {runs} runs, {events} events in {:.1} s",
        done.len(),
        began.elapsed().as_secs_f64()
    ));
    for failure in &failures {
        let corner = failure.corner.as_deref().unwrap_or_default();
        tell(&format!(
            "{corner}: {}: {}",
            failure.invariant, failure.what
        ));
    }
    if let Some(failure) = failures.first() {
        panic!("{failure}");
    }
    for (name, _, sum) in &done {
        assert!(
            sum.boundaries >= LEAST_BOUNDARIES && sum.pairs >= LEAST_PAIRS,
            "{name} is too short: {} boundaries, {} pairs",
            sum.boundaries,
            sum.pairs
        );
    }
    let pairs: u64 = done.iter().map(|(_, _, sum)| sum.pairs).sum();
    assert!(
        pairs >= LEAST_PAIRS_OF_ALL,
        "only {pairs} pairs of messages"
    );
    let reached = |what: &&&str| {
        done.iter()
            .any(|(_, _, sum)| sum.counters.contains_key(**what))
    };
    let missing: Vec<_> = MUST_HAPPEN.iter().filter(|what| !reached(what)).collect();
    assert!(
        share > 1 || missing.is_empty(),
        "it never happened: {missing:?}"
    );
}

#[test]
fn one_run() {
    let Ok(named) = std::env::var("TRAINYARD_CORNER") else {
        return;
    };
    match corner_again(&named) {
        Ok(Some(trace)) => {
            trace.iter().for_each(|line| tell(line));
            tell(&format!("{named}: every promise held"));
        }
        Ok(None) => panic!("there is no run {named:?}; the form is SCENARIO/SEED/DISTURBANCE"),
        Err(failure) => panic!("{failure}"),
    }
}
