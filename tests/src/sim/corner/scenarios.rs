//! The scenarios of the exhaustive corner: each a handful of steps, each step taken when what it waits for is seen.

use std::time::Duration;

use trainyard_common::ids::Digest;
use trainyard_common::spec::{Array, JobSpec, OnDisconnect};
use trainyard_common::state::{JobState, MemberPhase, NodeAvailability, NodePolicy};

use super::super::clock::{Micros, ms, secs};

/// What a step waits for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum When {
    /// So long after the step before.
    After(Micros),
    /// Every host is in session.
    AllThere,
    /// A member in this phase is on record.
    Member(MemberPhase),
    /// So many ranks live.
    Ranks(usize),
    Job(u64, JobState),
    Node(usize, NodeAvailability),
    /// An attempt was decided.
    Ended,
    /// A bundle is on record.
    Bundle,
}

/// What a step does.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    Submit {
        request: u64,
        spec: fn(u64) -> JobSpec,
    },
    /// Another body under a request id.
    SubmitOther {
        request: u64,
        spec: fn(u64) -> JobSpec,
    },
    Cancel(u64),
    Policy(usize, NodePolicy),
    ConfirmLost(usize),
    Remove(usize),
    Silent(usize, Micros),
    Break(usize),
    EndAgent(usize),
    PowerOff(usize, Micros),
    KillShims(usize),
    EndCoordinator,
    Backup,
    Restore,
    Wait,
}

/// A script.
#[derive(Debug, Clone)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) hosts: usize,
    pub(crate) steps: Vec<(When, Act)>,
}

fn job(request: u64, command: &str) -> JobSpec {
    let mut spec = JobSpec::new(format!("r{request}"), vec![command.to_owned()]);
    spec.resources_per_node.cpu_milli = 1000;
    spec.grace = Duration::from_secs(2);
    spec
}

fn brief(request: u64) -> JobSpec {
    job(request, "brief")
}

fn fetched(request: u64) -> JobSpec {
    let mut spec = job(request, "brief");
    spec.snapshot = Some(Digest([7; 32]));
    spec
}

fn long(request: u64) -> JobSpec {
    job(request, "long")
}

fn whole_node(request: u64) -> JobSpec {
    let mut spec = job(request, "long");
    spec.resources_per_node.cpu_milli = 4000;
    spec
}

fn stubborn(request: u64) -> JobSpec {
    job(request, "stubborn")
}

fn waiting(request: u64) -> JobSpec {
    let mut spec = job(request, "long");
    spec.on_disconnect = OnDisconnect::Wait;
    spec
}

fn limited(request: u64) -> JobSpec {
    let mut spec = job(request, "long");
    spec.time_limit = Some(Duration::from_secs(3));
    spec
}

fn tried_twice(request: u64) -> JobSpec {
    let mut spec = job(request, "fails-first");
    spec.retries = 1;
    spec
}

fn gang(request: u64) -> JobSpec {
    let mut spec = job(request, "brief");
    spec.nodes = 2;
    spec
}

fn long_gang(request: u64) -> JobSpec {
    let mut spec = job(request, "long");
    spec.nodes = 2;
    spec
}

fn fetched_gang(request: u64) -> JobSpec {
    let mut spec = gang(request);
    spec.snapshot = Some(Digest([7; 32]));
    spec
}

fn failing_gang(request: u64) -> JobSpec {
    let mut spec = job(request, "one-fails");
    spec.nodes = 2;
    spec
}

fn tasks(request: u64, count: u32) -> JobSpec {
    let mut spec = job(request, "task");
    spec.array = Some(Array {
        first: 0,
        last: count - 1,
        max_running: None,
    });
    spec
}

fn array(request: u64) -> JobSpec {
    tasks(request, 6)
}

/// More than the node is handed at once.
fn long_array(request: u64) -> JobSpec {
    tasks(request, 14)
}

fn submit(request: u64, spec: fn(u64) -> JobSpec) -> (When, Act) {
    (When::AllThere, Act::Submit { request, spec })
}

fn after(wait: Micros) -> When {
    When::After(wait)
}

/// A scenario by name.
pub(crate) fn find(name: &str) -> Option<Scenario> {
    all().into_iter().find(|scenario| scenario.name == name)
}

fn scenario(
    name: &'static str,
    hosts: usize,
    steps: impl IntoIterator<Item = (When, Act)>,
) -> Scenario {
    Scenario {
        name,
        hosts,
        steps: steps.into_iter().collect(),
    }
}

/// All of them.
pub(crate) fn all() -> Vec<Scenario> {
    let mut all = starts().to_vec();
    all.extend(cancels());
    all.extend(ends());
    all.extend(nodes());
    all.extend(restarts());
    all.extend(bundles());
    all
}

fn starts() -> [Scenario; 4] {
    [
        scenario("submit", 1, [submit(1, brief)]),
        scenario(
            "submit twice under one request id",
            1,
            [
                submit(1, brief),
                (
                    after(ms(1)),
                    Act::Submit {
                        request: 1,
                        spec: brief,
                    },
                ),
                (
                    after(ms(1)),
                    Act::SubmitOther {
                        request: 1,
                        spec: long,
                    },
                ),
            ],
        ),
        scenario("gang start", 2, [submit(1, gang)]),
        scenario("gang that fetches", 2, [submit(1, fetched_gang)]),
    ]
}

fn cancels() -> [Scenario; 7] {
    let cancel = |name, spec, when| scenario(name, 2, [submit(1, spec), (when, Act::Cancel(1))]);
    [
        scenario(
            "cancel while queued",
            1,
            [
                submit(1, whole_node),
                (
                    When::Ranks(1),
                    Act::Submit {
                        request: 2,
                        spec: brief,
                    },
                ),
                (When::Job(2, JobState::Pending), Act::Cancel(2)),
            ],
        ),
        cancel(
            "cancel while preparing",
            fetched_gang,
            When::Member(MemberPhase::Preparing),
        ),
        cancel(
            "cancel while ready",
            fetched_gang,
            When::Member(MemberPhase::Ready),
        ),
        cancel("cancel while running", long_gang, When::Ranks(2)),
        scenario(
            "cancel while stopping",
            1,
            [
                submit(1, stubborn),
                (When::Ranks(1), Act::Cancel(1)),
                (When::Member(MemberPhase::Stopping), Act::Cancel(1)),
            ],
        ),
        cancel(
            "cancel while uploading",
            brief,
            When::Member(MemberPhase::Uploading),
        ),
        cancel(
            "cancel as it starts",
            brief,
            When::Member(MemberPhase::Unconfirmed),
        ),
    ]
}

fn ends() -> [Scenario; 5] {
    [
        scenario("rank of a gang fails", 2, [submit(1, failing_gang)]),
        scenario("retry", 1, [submit(1, tried_twice)]),
        scenario("time limit", 1, [submit(1, limited)]),
        scenario(
            "shim killed",
            1,
            [submit(1, long), (When::Ranks(1), Act::KillShims(0))],
        ),
        scenario(
            "forget while the line is cut",
            1,
            [
                submit(1, brief),
                (
                    When::Member(MemberPhase::Uploading),
                    Act::Silent(0, secs(12)),
                ),
            ],
        ),
    ]
}

fn nodes() -> [Scenario; 8] {
    [
        scenario(
            "node silent, then back",
            2,
            [
                submit(1, long_gang),
                (When::Ranks(2), Act::Silent(0, secs(15))),
            ],
        ),
        scenario(
            "node given up, then back",
            // So many that the brake for a mass loss does not hold it back.
            4,
            [submit(1, long), (When::Ranks(1), Act::Silent(0, secs(90)))],
        ),
        scenario(
            "job that waits for its node",
            1,
            [
                submit(1, waiting),
                (When::Ranks(1), Act::Silent(0, secs(90))),
            ],
        ),
        scenario(
            "node rebooted",
            2,
            [
                submit(1, long_gang),
                (When::Ranks(2), Act::PowerOff(0, secs(8))),
            ],
        ),
        scenario(
            "node confirmed as lost",
            2,
            [
                submit(1, whole_node),
                (
                    When::Ranks(1),
                    Act::Submit {
                        request: 2,
                        spec: whole_node,
                    },
                ),
                (When::Ranks(2), Act::PowerOff(0, secs(100))),
                (
                    When::Node(0, NodeAvailability::Unreachable),
                    Act::ConfirmLost(0),
                ),
                (after(secs(5)), Act::Remove(0)),
            ],
        ),
        scenario(
            "drain",
            2,
            [
                submit(1, long),
                (When::Ranks(1), Act::Policy(0, NodePolicy::Draining)),
                (
                    after(ms(50)),
                    Act::Submit {
                        request: 2,
                        spec: brief,
                    },
                ),
                (after(secs(6)), Act::Policy(0, NodePolicy::Active)),
            ],
        ),
        scenario(
            "session broken as it starts",
            2,
            [
                submit(1, fetched_gang),
                (When::Member(MemberPhase::Ready), Act::Break(0)),
                (after(0), Act::Break(1)),
            ],
        ),
        scenario(
            "restore of a backup",
            1,
            [
                submit(1, long),
                (When::Ranks(1), Act::Backup),
                (
                    after(ms(10)),
                    Act::Submit {
                        request: 2,
                        spec: brief,
                    },
                ),
                (When::Job(2, JobState::Succeeded), Act::Restore),
            ],
        ),
    ]
}

fn restarts() -> [Scenario; 6] {
    let restart = |name, spec, when, act| {
        scenario(
            name,
            2,
            [submit(1, spec), (when, act), (after(secs(3)), Act::Wait)],
        )
    };
    let preparing = When::Member(MemberPhase::Preparing);
    [
        restart(
            "agent restarted during prepare",
            fetched_gang,
            preparing,
            Act::EndAgent(0),
        ),
        restart(
            "agent restarted during run",
            long_gang,
            When::Ranks(2),
            Act::EndAgent(0),
        ),
        restart(
            "coordinator restarted during prepare",
            fetched_gang,
            preparing,
            Act::EndCoordinator,
        ),
        restart(
            "coordinator restarted during run",
            long_gang,
            When::Ranks(2),
            Act::EndCoordinator,
        ),
        restart(
            "coordinator restarted at the end",
            fetched,
            When::Ended,
            Act::EndCoordinator,
        ),
        restart(
            "coordinator restarted during an array",
            array,
            When::Ranks(2),
            Act::EndCoordinator,
        ),
    ]
}

fn bundles() -> [Scenario; 6] {
    [
        scenario("array in a bundle", 1, [submit(1, array)]),
        scenario("bundle with a top-up", 1, [submit(1, long_array)]),
        scenario(
            "bundle with a cancel",
            1,
            [submit(1, long_array), (When::Ranks(3), Act::Cancel(1))],
        ),
        scenario(
            "bundle cancelled as it is handed",
            1,
            [submit(1, array), (When::Bundle, Act::Cancel(1))],
        ),
        scenario(
            "carrier killed",
            1,
            [submit(1, long_array), (When::Ranks(3), Act::KillShims(0))],
        ),
        scenario(
            "agent restarted during a bundle",
            1,
            [submit(1, long_array), (When::Ranks(3), Act::EndAgent(0))],
        ),
    ]
}
