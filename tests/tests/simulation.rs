//! Many seeds of the simulation in `trainyard_tests::sim`. `TRAINYARD_SEEDS=N` runs N seeds, from `TRAINYARD_FIRST_SEED`
//! (1) on; `TRAINYARD_SEED=N` with the test `one_seed` repeats one and prints everything that happened.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use trainyard_tests::sim::{Failure, MUST_HAPPEN, Options, Outcome, run};

/// Seeds of an ordinary run; they take some seconds without optimisation.
const SEEDS: u64 = 60;
/// Least that must happen in a seed, so that each is worth its time.
const LEAST_EVENTS: u64 = 500;
/// Runs of this many seeds reach everything that must happen.
const ENOUGH_SEEDS: u64 = 2000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Written past the capture of a passing test's output, which nobody would see.
fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

#[derive(Default)]
struct Sum {
    seeds: u64,
    events: u64,
    simulated_ms: u64,
    counters: BTreeMap<&'static str, u64>,
}

impl Sum {
    fn add(&mut self, outcome: Outcome) {
        self.seeds += 1;
        self.events += outcome.events;
        self.simulated_ms += outcome.simulated_ms;
        for (what, times) in outcome.counters {
            *self.counters.entry(what).or_default() += times;
        }
    }
}

/// A thread that panicked has failed its test already.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Seeds side by side; none begins after the first failure.
fn all(first: u64, count: u64) -> (Sum, Vec<Failure>) {
    let next = AtomicU64::new(first);
    let sum = Mutex::new(Sum::default());
    let failures = Mutex::new(Vec::new());
    let keep_going = number("TRAINYARD_KEEP_GOING").is_some();
    let threads = std::thread::available_parallelism()
        .map_or(1, std::num::NonZero::get)
        .min(8);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let failed = !locked(&failures).is_empty();
                    if seed >= first + count || (failed && !keep_going) {
                        return;
                    }
                    match run(Options {
                        seed,
                        ..Options::default()
                    }) {
                        Ok(outcome) => {
                            assert!(
                                outcome.events >= LEAST_EVENTS,
                                "only {} events in seed {seed}",
                                outcome.events
                            );
                            locked(&sum).add(outcome);
                        }
                        Err(failure) => locked(&failures).push(*failure),
                    }
                }
            });
        }
    });
    (
        sum.into_inner().unwrap_or_else(PoisonError::into_inner),
        failures
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner),
    )
}

#[test]
fn every_promise_holds_in_every_seed() {
    let first = number("TRAINYARD_FIRST_SEED").unwrap_or(1);
    let count = number("TRAINYARD_SEEDS").unwrap_or(SEEDS);
    let began = Instant::now();
    let (sum, mut failures) = all(first, count);
    let took = began.elapsed().as_secs_f64();
    let hours = sum.simulated_ms as f64 / 3_600_000.0;
    tell(&format!(
        "{} seeds, {} events, {hours:.1} simulated hours in {took:.1} s: {:.1} seeds/s, {:.2} simulated hours/s",
        sum.seeds,
        sum.events,
        sum.seeds as f64 / took,
        hours / took
    ));
    if count != SEEDS || !failures.is_empty() {
        for (what, times) in &sum.counters {
            tell(&format!("{times:>10}  {what}"));
        }
    }
    failures.sort_by_key(|failure| failure.options.seed);
    if failures.len() > 1 {
        for failure in &failures {
            tell(&format!(
                "seed {}: {}: {}",
                failure.options.seed, failure.invariant, failure.what
            ));
        }
    }
    if let Some(failure) = failures.first() {
        panic!("{failure}");
    }
    let missing: Vec<_> = MUST_HAPPEN
        .iter()
        .filter(|what| !sum.counters.contains_key(*what))
        .collect();
    assert!(
        count < ENOUGH_SEEDS || missing.is_empty(),
        "it never happened: {missing:?}"
    );
}

#[test]
fn one_seed() {
    let Some(seed) = number("TRAINYARD_SEED") else {
        return;
    };
    let crash_at = number("TRAINYARD_CRASH_AT");
    let options = Options {
        seed,
        whole_trace: true,
        crash_at,
        plain: crash_at.is_some(),
    };
    match run(options) {
        Ok(outcome) => {
            outcome.trace.iter().for_each(|line| tell(line));
            tell(&format!(
                "seed {seed}: every promise held, trace {:016x}",
                outcome.hash
            ));
        }
        Err(failure) => panic!("{failure}"),
    }
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let hash = |seed| {
        run(Options {
            seed,
            ..Options::default()
        })
        .map_or(0, |outcome| outcome.hash)
    };
    for seed in [2, 5, 11] {
        assert_eq!(
            hash(seed),
            hash(seed),
            "I25: two runs of seed {seed} differ"
        );
    }
    assert_ne!(hash(2), hash(5));
}

#[test]
fn a_crash_at_every_boundary_breaks_no_promise() {
    let seeds = number("TRAINYARD_BOUNDARY_SEEDS").unwrap_or(1);
    for seed in 1..=seeds {
        let plain = Options {
            seed,
            plain: true,
            ..Options::default()
        };
        let boundaries = match run(plain) {
            Ok(outcome) => outcome.boundaries,
            Err(failure) => panic!("{failure}"),
        };
        assert!(boundaries > 50, "only {boundaries} boundaries");
        for at in 1..=boundaries {
            if let Err(failure) = run(Options {
                crash_at: Some(at),
                ..plain
            }) {
                panic!("{failure}");
            }
        }
    }
}
