//! A seeded simulation: the real core, a model store, and agents that are modelled down to their processes, with
//! sessions that break, messages that come late or twice, nodes that vanish, and a coordinator that crashes at every
//! boundary between two effects. The truth is in the machines; every promise is checked against it.

mod carrier;
mod machine;
mod promises;
mod world;

use std::collections::BTreeMap;

use self::world::World;

/// Runs of the ordinary test; they take a few seconds.
const SEEDS: u64 = 60;
/// Runs of the long test.
const MANY_SEEDS: u64 = 3000;

fn run(seed: u64, traces: bool) -> World {
    let mut world = World::new(seed, traces);
    world.chaos(150);
    world.calm();
    world
}

#[test]
fn every_promise_holds_under_faults() {
    all(1..=SEEDS);
}

#[test]
#[ignore = "takes minutes: run it with --ignored --release after changes to the core"]
fn every_promise_holds_under_many_faults() {
    all(SEEDS + 1..=MANY_SEEDS);
}

fn all(seeds: std::ops::RangeInclusive<u64>) {
    let mut seen: BTreeMap<&'static str, u64> = BTreeMap::new();
    for seed in seeds {
        let world = std::panic::catch_unwind(|| run(seed, false));
        let Ok(world) = world else {
            panic!("seed {seed} failed")
        };
        world
            .seen
            .into_iter()
            .for_each(|(what, times)| *seen.entry(what).or_default() += times);
    }
    // A simulation in which nothing goes wrong proves nothing.
    for what in MUST_HAPPEN {
        assert!(
            seen.contains_key(what),
            "it never happened: {what} in {seen:#?}"
        );
    }
}

/// What the faults are meant to bring about.
const MUST_HAPPEN: [&str; 31] = [
    "submit accepted",
    "submit repeated",
    "cancel answered",
    "coordinator crashed",
    "member spawned",
    "member started alone",
    "ready was never told",
    "bundle made",
    "bundle topped up",
    "bundle lost",
    "bundle vanished",
    "bundle shim killed",
    "task in bundle started",
    "tasks given back",
    "gang told to go",
    "gang lost",
    "attempt lost",
    "node lost",
    "brake set",
    "SUCCEEDED",
    "FAILED",
    "CANCELLED",
    "TIMED_OUT",
    "INTERRUPTED",
    "RANK_EXITED",
    "PREPARE_FAILED",
    "PREPARE_TIMEOUT",
    "NODE_LOST",
    "NODE_REBOOTED",
    "SUPERVISOR_LOST",
    "UNKNOWN_TO_AGENT",
];

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in [3, 7, 11] {
        assert_eq!(run(seed, true).trace, run(seed, true).trace, "seed {seed}");
    }
    assert_ne!(run(3, true).trace, run(7, true).trace);
}
