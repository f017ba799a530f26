//! The simulation has teeth: every bug of `trainyard_common::mutation` is planted, one at a time, and seeds are run until
//! one of them sees a promise broken that the bug breaks. A bug that no seed sees fails the suite.
//!
//! `TRAINYARD_MUTATION=Name` plants one only, and `TRAINYARD_SEED=N` with it repeats one seed and prints what happened.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use trainyard_common::mutation::{Mutation, plant};
use trainyard_tests::sim::{Failure, Options, run};

/// Seeds after which a bug counts as not seen. Most are seen within fifty.
const SEEDS: u64 = 2000;
/// Bugs that are planted at least.
const LEAST: usize = 36;

/// What became of one bug.
#[derive(Debug, Default)]
struct Fate {
    /// The first seed that saw one of the promises broken that are meant.
    killed: Option<(u64, &'static str, String)>,
    /// What other promises were seen broken before that, and how often.
    others: BTreeMap<&'static str, u64>,
    seconds: f64,
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Written past the capture of a passing test's output, which nobody would see.
fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn seed_with(mutation: Option<Mutation>, seed: u64, whole_trace: bool) -> Result<(), Box<Failure>> {
    let _planted = plant(mutation);
    let options = Options {
        seed,
        whole_trace,
        ..Options::default()
    };
    run(options).map(drop)
}

fn hunt(mutation: Mutation, seeds: u64) -> Fate {
    let began = Instant::now();
    let mut fate = Fate::default();
    for seed in 1..=seeds {
        let Err(failure) = seed_with(Some(mutation), seed, false) else {
            continue;
        };
        if seed_with(None, seed, false).is_err() {
            // Something else is wrong, which the simulation's own test tells.
            *fate.others.entry("unplanted").or_default() += 1;
            continue;
        }
        if mutation.breaks().contains(&failure.invariant) {
            fate.killed = Some((seed, failure.invariant, failure.what));
            break;
        }
        *fate.others.entry(failure.invariant).or_default() += 1;
    }
    fate.seconds = began.elapsed().as_secs_f64();
    fate
}

fn hunt_all(mutations: &[Mutation], seeds: u64) -> BTreeMap<Mutation, Fate> {
    let next = AtomicUsize::new(0);
    let fates = Mutex::new(BTreeMap::new());
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(mutations.len()) {
            scope.spawn(|| {
                while let Some(mutation) = mutations.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let fate = hunt(*mutation, seeds);
                    let mut fates = fates.lock().unwrap_or_else(PoisonError::into_inner);
                    fates.insert(*mutation, fate);
                }
            });
        }
    });
    fates.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn table(fates: &BTreeMap<Mutation, Fate>) -> String {
    let mut table = String::new();
    for (mutation, fate) in fates {
        let name = format!("{mutation:?}");
        let meant = mutation.breaks().join(" ");
        let (seed, seen) = match &fate.killed {
            Some((seed, invariant, _)) => (seed.to_string(), *invariant),
            None => ("-".to_owned(), "SURVIVES"),
        };
        let others: Vec<String> = fate
            .others
            .iter()
            .map(|(invariant, times)| format!("{invariant} x{times}"))
            .collect();
        let _ = writeln!(
            table,
            "{name:<24} {seed:>5}  {seen:<9} meant: {meant:<28} {:>6.1} s  {}",
            fate.seconds,
            others.join(", ")
        );
    }
    table
}

#[test]
fn every_planted_bug_is_seen() {
    let only = variable("TRAINYARD_MUTATION");
    let all: Vec<Mutation> = Mutation::ALL
        .iter()
        .filter(|mutation| {
            only.as_ref()
                .is_none_or(|only| *only == format!("{mutation:?}"))
        })
        .copied()
        .collect();
    assert!(!all.is_empty(), "there is no mutation {only:?}");
    if let (Some(mutation), Some(seed)) = (
        all.first().filter(|_| only.is_some()),
        variable("TRAINYARD_SEED").and_then(|seed| seed.parse().ok()),
    ) {
        match seed_with(Some(*mutation), seed, true) {
            Ok(()) => tell(&format!("seed {seed} does not see {mutation:?}")),
            Err(failure) => tell(&failure.to_string()),
        }
        return;
    }
    let seeds = variable("TRAINYARD_SEEDS").and_then(|seeds| seeds.parse().ok());
    let began = Instant::now();
    let fates = hunt_all(&all, seeds.unwrap_or(SEEDS));
    tell(&table(&fates));
    tell(&format!(
        "{} planted bugs in {:.0} s",
        fates.len(),
        began.elapsed().as_secs_f64()
    ));
    let surviving: Vec<String> = fates
        .iter()
        .filter(|(_, fate)| fate.killed.is_none())
        .map(|(mutation, _)| format!("{mutation:?}: {}", mutation.what().trim()))
        .collect();
    assert!(
        surviving.is_empty(),
        "no seed sees these bugs as what they are:\n{}",
        surviving.join("\n")
    );
    assert!(only.is_some() || fates.len() >= LEAST);
}
