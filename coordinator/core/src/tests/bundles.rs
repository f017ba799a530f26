//! Bundles: how tasks get into them, every way out, and what becomes of a bundle when its node, its job or we go.

mod gone;

use std::ops::RangeInclusive;
use std::time::Duration;

use trainyard_common::bundle::{ObservedBundlePhase, TaskReport};
use trainyard_common::ids::{Digest, Incarnation, JobId, NodeId, TaskIndex};
use trainyard_common::member::{EndCause, Ending};
use trainyard_common::spec::{Array, JobSpec, OnDisconnect};
use trainyard_common::state::{ExitStatus, NodePolicy, ReasonCode};
use trainyard_common::time::Timestamp;

use crate::event::Event;
use crate::testing::{
    TestEnv, attempt, completed, ended, ending, job_spec, observed, returned, started, stopped,
    user,
};

/// So many tasks of 4 CPUs each: a node of the tests runs two at a time.
fn array(tasks: u32) -> JobSpec {
    let mut spec = job_spec();
    spec.resources_per_node.cpu_milli = 4000;
    spec.array = Some(Array {
        first: 0,
        last: tasks - 1,
        max_running: None,
    });
    spec
}

fn limited(tasks: u32, max_running: u32) -> JobSpec {
    let mut spec = array(tasks);
    spec.resources_per_node.cpu_milli = 1000;
    if let Some(array) = &mut spec.array {
        array.max_running = Some(max_running);
    }
    spec
}

/// One node and a job of so many tasks, two of which run in `j1.b1`.
fn running(tasks: u32) -> TestEnv {
    with_spec(array(tasks))
}

fn with_spec(spec: JobSpec) -> TestEnv {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(spec);
    env.tasks(1, "j1.b1", 0, vec![]);
    env.words();
    env
}

/// These tasks ended after 10 ms each.
fn quick(env: &TestEnv, tasks: RangeInclusive<u32>) -> Vec<TaskReport> {
    tasks
        .map(|task| ended(env.now, task, 10, completed(0)))
        .collect()
}

/// The same of which tasks 0 to 11 were quick, so that 12 to 61 are held, most of them ahead.
fn warmed(tasks: u32) -> TestEnv {
    let mut env = running(tasks);
    env.tasks(1, "j1.b1", 0, quick(&env, 0..=1));
    env.schedule();
    env.expect(&["schedule", "n1: run j1.b1 x2 [2-11] 2"]);
    env.tasks(1, "j1.b1", 2, quick(&env, 2..=11));
    env.schedule();
    env.expect(&["schedule", "n1: run j1.b1 x2 [12-61] 12"]);
    env
}

fn failed(code: u8) -> Ending {
    ending(EndCause::RankFailed, 0, &[ExitStatus::Code(code)])
}

fn rebooted() -> Ending {
    ending(EndCause::NodeRebooted, 0, &[ExitStatus::Unknown])
}

fn over(total: u64, message: &str) -> ObservedBundlePhase {
    ObservedBundlePhase::Ended {
        total,
        message: message.to_owned(),
    }
}

/// Counts of a job: pending, active, succeeded, failed, cancelled, timed out.
fn counts(env: &TestEnv, job: u64) -> [u32; 6] {
    let counts = env.store.jobs[&JobId(job)].tasks;
    [
        counts.pending,
        counts.active,
        counts.succeeded,
        counts.failed,
        counts.cancelled,
        counts.timed_out,
    ]
}

/// The row of a task of the first job.
fn task(env: &TestEnv, index: u32) -> String {
    let task = &env.store.tasks[&(JobId(1), TaskIndex(index))];
    let (attempts, message) = (task.attempts, &task.reason.message);
    format!("{} {attempts} {}: {message}", task.state, task.reason.code)
}

fn rows(env: &TestEnv) -> usize {
    env.store.tasks.len()
}

#[test]
fn fresh_tasks_of_one_round_on_one_node_become_one_bundle_without_rows() {
    let mut env = TestEnv::new();
    env.node(0);
    env.node(0);
    env.submit("alice", "r1", array(10));
    env.words();
    env.schedule();
    env.expect_all(
        &[
            "j1 PREPARING PREPARING",
            "j1.b1 PLACED n1 [0-1] 0",
            "j1.b2 PLACED n2 [2-3] 0",
        ],
        &[
            "n1: run j1.b1 x2 [0-1] 0 spec",
            "n2: run j1.b2 x2 [2-3] 0 spec",
        ],
    );
    assert_eq!(counts(&env, 1), [6, 4, 0, 0, 0, 0]);
    assert_eq!(rows(&env), 0);
    env.bundle(
        1,
        observed("j1.b1", ObservedBundlePhase::Preparing, 0, vec![]),
    );
    env.expect_all(&[], &[]);
    env.tasks(1, "j1.b1", 0, vec![]);
    env.expect_all(&["j1 RUNNING RUNNING", "j1.b1 RUNNING n1 [0-1] 0"], &[]);
}

#[test]
fn what_is_not_a_plain_array_keeps_its_own_shim() {
    let mut env = TestEnv::new();
    env.node(4);
    let mut gpus = array(4);
    gpus.resources_per_node.gpus = 1;
    env.start(gpus);
    assert!(env.store.bundles.is_empty());
    assert_eq!(env.store.attempts.len(), 2);
    let mut env = TestEnv::new();
    env.node(0);
    env.start(job_spec());
    assert!(env.store.bundles.is_empty());
}

#[test]
fn an_end_makes_both_rows_at_once_and_its_slot_is_filled_in_the_same_bundle() {
    let mut env = running(10);
    env.now = env.now.after(Duration::from_secs(60));
    let report = ended(env.now, 0, 60_000, completed(0));
    env.tasks(1, "j1.b1", 0, vec![report]);
    env.expect_all(
        &[
            "j1 RUNNING RUNNING",
            "j1.b1 RUNNING n1 [1] 1",
            "j1.0 SUCCEEDED COMPLETED",
            "j1.0.1 ENDED [n1 ENDED]",
        ],
        &["schedule"],
    );
    let row = &env.store.attempts[&attempt("j1.0.1")];
    assert_eq!(row.started_at, Some(Timestamp(env.now.0 - 60_000)));
    assert_eq!(
        env.store.jobs[&JobId(1)].started_at,
        row.started_at,
        "the job started with its first task"
    );
    env.schedule();
    env.expect_all(
        &["j1 RUNNING RUNNING", "j1.b1 RUNNING n1 [1-2] 1"],
        &["n1: run j1.b1 x2 [1-2] 1"],
    );
    assert_eq!(counts(&env, 1), [7, 2, 1, 0, 0, 0]);
}

#[test]
fn a_task_that_runs_for_a_while_gets_rows_and_keeps_its_place() {
    let mut env = running(10);
    env.tasks(1, "j1.b1", 0, vec![started(1, env.now)]);
    env.expect_all(
        &[
            "j1 RUNNING RUNNING",
            "j1.b1 RUNNING n1 [0-1] 1",
            "j1.1 RUNNING RUNNING",
            "j1.1.1 RUNNING [n1 RUNNING]",
        ],
        &[],
    );
    assert_eq!(task(&env, 1), "RUNNING 1 RUNNING: attempt 1 runs on n1");
    // Nobody takes it for a member that the agent lost, nor gives it a member's commands.
    env.cut(NodeId(1));
    env.register_bundles(
        1,
        vec![observed("j1.b1", ObservedBundlePhase::Running, 1, vec![])],
    );
    env.expect(&["n1: welcome [run j1.b1 x2 [0-1] 1 spec]", "schedule"]);
    let report = ended(env.now, 1, 0, failed(3));
    env.tasks(1, "j1.b1", 1, vec![report]);
    env.words();
    assert_eq!(
        task(&env, 1),
        "FAILED 1 RANK_EXITED: rank 0 on n1 exited with 3"
    );
    assert_eq!(counts(&env, 1), [8, 1, 0, 1, 0, 0]);
}

#[test]
fn reports_count_once_and_a_gap_opens_the_session_again() {
    let mut env = running(10);
    let reports = vec![
        ended(env.now, 0, 9, completed(0)),
        ended(env.now, 1, 9, completed(0)),
    ];
    env.tasks(1, "j1.b1", 0, reports.clone());
    assert_eq!(counts(&env, 1), [8, 0, 2, 0, 0, 0]);
    env.words();
    env.tasks(1, "j1.b1", 0, reports.clone());
    env.expect_all(&[], &[]);
    env.tasks(1, "j1.b1", 3, vec![returned(2, 2)]);
    env.expect_all(&[], &["n1: resync"]);
    // What overlaps is taken from where it is new; the task of the third is not in the bundle and is nobody's.
    let mut more = reports;
    more.push(ended(env.now, 0, 9, failed(1)));
    env.tasks(1, "j1.b1", 0, more);
    env.expect_all(&["j1 PENDING QUEUED", "j1.b1 RUNNING n1 [] 3"], &[]);
    assert_eq!(counts(&env, 1), [8, 0, 2, 0, 0, 0]);
    assert_eq!(
        task(&env, 0),
        "SUCCEEDED 1 COMPLETED: every rank exited with 0"
    );
}

#[test]
fn a_failed_task_is_tried_again_as_an_attempt_of_its_own() {
    let mut spec = array(2);
    spec.retries = 1;
    let mut env = with_spec(spec);
    let report = ended(env.now, 0, 9, failed(1));
    env.tasks(1, "j1.b1", 0, vec![report]);
    env.words();
    assert_eq!(
        task(&env, 0),
        "PENDING 1 RETRYING: attempt 1: rank 0 on n1 exited with 1; retry 1 of 1"
    );
    env.schedule();
    let placed = &env.store.attempts[&attempt("j1.0.2")];
    assert_eq!(placed.members[0].node, NodeId(1));
    env.words();
    assert_eq!(counts(&env, 1), [0, 2, 0, 0, 0, 0]);
}

#[test]
fn a_missing_exit_status_is_no_success() {
    let mut env = running(2);
    let mut silent = completed(0);
    silent.ranks.clear();
    let reports = vec![
        ended(env.now, 0, 9, silent),
        ended(
            env.now,
            1,
            9,
            ending(EndCause::SupervisorLost, 0, &[ExitStatus::Unknown]),
        ),
    ];
    env.tasks(1, "j1.b1", 0, reports);
    env.words();
    for index in [0, 1] {
        assert!(task(&env, index).starts_with("PENDING 1 RETRYING"));
    }
}

#[test]
fn quick_tasks_are_held_ahead_and_topped_up_at_half() {
    let mut env = warmed(1000);
    env.tasks(1, "j1.b1", 12, quick(&env, 12..=34));
    env.expect(&[]); // 27 are left: the slots and half of the 50 that last a quarter of a second.
    env.tasks(1, "j1.b1", 35, quick(&env, 35..=35));
    env.schedule();
    env.expect(&["schedule", "n1: run j1.b1 x2 [36-87] 36"]);
    assert_eq!(counts(&env, 1), [1000 - 88, 52, 36, 0, 0, 0]);
    let usage = &env.core.t.usage[&NodeId(1)];
    assert_eq!((usage.amounts.cpu_milli, usage.members), (8000, 2));
}

#[test]
fn nothing_is_held_ahead_behind_an_earlier_job_that_does_not_fit() {
    let mut env = TestEnv::new();
    env.node(0);
    // j1 takes half of the node, j2 needs all of it, j3 is behind.
    let mut first = limited(1000, 4);
    first.resources_per_node.cpu_milli = 1000;
    env.start(first);
    env.tasks(1, "j1.b1", 0, vec![]);
    let mut whole = job_spec();
    whole.resources_per_node.cpu_milli = 8000;
    env.start(whole);
    env.start(limited(1000, 4));
    assert!(env.store.bundles.len() == 1, "j3 waits behind j2");
    // j1 is before j2 in line, so it goes on, and goes on ahead.
    let reports = vec![ended(env.now, 0, 10, completed(0))];
    env.tasks(1, "j1.b1", 0, reports);
    env.schedule();
    env.expect(&["schedule", "n1: run j1.b1 x4 [1-8] 1"]);
}

#[test]
fn a_bundle_drains_for_an_earlier_job() {
    let mut env = TestEnv::new();
    env.node(0);
    // j1 fails once and then waits first in line with a whole node's demand.
    let mut whole = job_spec();
    whole.resources_per_node.cpu_milli = 8000;
    whole.retries = 5;
    env.start(whole);
    env.run("j1.0.1", &[1]);
    env.start(array(1000));
    let failure = ending(EndCause::SupervisorLost, 0, &[ExitStatus::Unknown]);
    // Two interruptions in a row: the third attempt waits a second, and j2 gets the node meanwhile.
    for number in 1..=2 {
        let id = format!("j1.0.{number}");
        env.report(
            1,
            &id,
            0,
            trainyard_common::member::ObservedPhase::Ended(failure.clone()),
        );
        env.schedule();
    }
    env.tasks(1, "j2.b1", 0, vec![]);
    env.words();
    assert_eq!(counts(&env, 2), [998, 2, 0, 0, 0, 0]);
    env.pass(Duration::from_secs(2));
    let reports = vec![ended(env.now, 0, 10, completed(0))];
    env.tasks(1, "j2.b1", 0, reports);
    env.schedule();
    env.words();
    assert_eq!(
        counts(&env, 2),
        [998, 1, 1, 0, 0, 0],
        "neither the free slot nor a place ahead is filled"
    );
    let reports = vec![ended(env.now, 1, 10, completed(0))];
    env.tasks(1, "j2.b1", 1, reports);
    env.schedule();
    env.words();
    assert!(env.store.attempts.contains_key(&attempt("j1.0.3")));
}

#[test]
fn the_bound_of_an_array_counts_slots_and_single_tasks() {
    let mut spec = limited(100, 3);
    spec.retries = 1;
    let mut env = with_spec(spec);
    assert_eq!(counts(&env, 1), [97, 3, 0, 0, 0, 0]);
    let reports = vec![ended(env.now, 0, 10, completed(0))];
    env.tasks(1, "j1.b1", 0, reports);
    env.schedule();
    env.words();
    assert_eq!(
        env.store.bundles.values().next().unwrap().tasks.count(),
        3 + 4,
        "what waits ahead does not count"
    );
    let reports = vec![ended(env.now, 1, 10, failed(1))];
    env.tasks(1, "j1.b1", 1, reports);
    env.schedule();
    env.words();
    assert_eq!(env.store.attempts.len(), 2, "the retry waits for a slot");
    env.schedule();
    assert!(!env.store.attempts.contains_key(&attempt("j1.1.2")));
    env.words();
}

#[test]
fn usage_falls_with_the_last_tasks_and_others_get_the_room() {
    let mut env = running(2);
    env.start(array(4));
    assert_eq!(counts(&env, 2), [4, 0, 0, 0, 0, 0]);
    let reports = vec![ended(env.now, 0, 9, completed(0))];
    env.tasks(1, "j1.b1", 0, reports);
    env.schedule();
    env.expect(&["schedule", "n1: run j2.b1 x1 [0] 0 spec"]);
    let usage = &env.core.t.usage[&NodeId(1)];
    assert_eq!(usage.amounts.cpu_milli, 8000);
}

#[test]
fn tasks_that_come_back_wait_as_tasks_of_their_own_and_nothing_is_held_ahead() {
    let mut env = warmed(100);
    assert_eq!(counts(&env, 1), [38, 50, 12, 0, 0, 0]);
    env.tasks(1, "j1.b1", 12, vec![returned(14, 1_000_000)]);
    assert_eq!(counts(&env, 1), [86, 2, 12, 0, 0, 0]);
    assert_eq!(
        task(&env, 14),
        "PENDING 0 QUEUED: n1 gave it back before it started"
    );
    env.words();
    env.schedule();
    env.expect(&[]);
    // The next end fills the slot with the task that came back first, by itself.
    let reports = vec![ended(env.now, 12, 10_000, completed(0))];
    env.tasks(1, "j1.b1", 13, reports);
    env.schedule();
    assert!(env.store.attempts.contains_key(&attempt("j1.14.1")));
    env.words();
}

#[test]
fn the_last_tasks_close_the_bundle_and_its_end_removes_it() {
    let mut env = running(3);
    let reports = vec![ended(env.now, 0, 9, completed(0))];
    env.tasks(1, "j1.b1", 0, reports);
    env.words();
    env.schedule();
    env.expect_all(
        &["j1 RUNNING RUNNING", "j1.b1 CLOSING n1 [1-2] 1"],
        &["n1: close j1.b1 x2 [1-2] 1"],
    );
    let reports = vec![
        ended(env.now, 2, 9, completed(0)),
        ended(env.now, 1, 9, completed(0)),
    ];
    // The job is over; the bundle waits for its own end.
    env.tasks(1, "j1.b1", 1, reports.clone());
    assert_eq!(env.job(1), "SUCCEEDED COMPLETED: of 3 tasks 3 succeeded");
    env.words();
    let end = observed("j1.b1", over(3, ""), 1, reports);
    env.bundle(1, end.clone());
    env.expect_all(&["j1.b1 removed"], &["n1: forget j1.b1", "schedule"]);
    env.bundle(1, end);
    env.expect_all(&[], &["n1: forget j1.b1"]);
}

#[test]
fn a_small_array_is_closed_from_the_beginning() {
    let mut env = TestEnv::new();
    env.node(0);
    env.submit("alice", "r1", array(2));
    env.schedule();
    env.expect(&[
        "submitted j1",
        "schedule",
        "n1: close j1.b1 x2 [0-1] 0 spec",
    ]);
}

#[test]
fn an_end_before_all_reports_waits_for_them() {
    let mut env = running(2);
    let first = vec![ended(env.now, 0, 9, completed(0))];
    env.bundle(1, observed("j1.b1", over(2, ""), 0, first));
    assert_eq!(env.store.bundles.len(), 1);
    let second = vec![ended(env.now, 1, 9, completed(0))];
    env.bundle(1, observed("j1.b1", over(2, ""), 1, second));
    assert!(env.store.bundles.is_empty());
    env.words();
}

#[test]
fn tasks_left_over_by_a_bundle_that_ended_are_interrupted() {
    let mut env = running(2);
    env.bundle(
        1,
        observed("j1.b1", over(0, "the shim was killed"), 0, vec![]),
    );
    assert!(env.store.bundles.is_empty());
    assert_eq!(
        task(&env, 1),
        "PENDING 1 RETRYING: attempt 1: the shim was killed; tried again, interruption 1 of 5"
    );
    env.words();
}

#[test]
fn a_cancel_stops_the_bundle_and_nothing_in_it_succeeds_any_more() {
    let mut env = running(100);
    env.tasks(1, "j1.b1", 0, vec![started(0, env.now)]);
    env.words();
    env.cancel(1);
    env.expect_all(
        &[
            "j1 STOPPING CANCEL_REQUESTED",
            "j1.b1 STOPPING n1 [0-1] 1",
            "j1.0 STOPPING CANCEL_REQUESTED",
            "j1.0.1 STOPPING [n1 RUNNING]",
        ],
        &[
            "n1: stop CANCEL_REQUESTED j1.b1 x2 [0-1] 1",
            "cancelled j1 STOPPING",
            "schedule",
        ],
    );
    let reports = vec![
        ended(env.now, 0, 9, stopped(0)),
        ended(env.now, 1, 9, completed(0)),
    ];
    env.bundle(1, observed("j1.b1", over(3, ""), 1, reports));
    env.words();
    assert_eq!(counts(&env, 1), [0, 0, 0, 0, 100, 0]);
    assert_eq!(
        task(&env, 1),
        "CANCELLED 1 CANCEL_REQUESTED: bob asked for its end"
    );
    assert!(env.store.bundles.is_empty());
}

#[test]
fn tasks_of_a_cancelled_job_that_come_back_are_cancelled_without_rows() {
    let mut env = running(100);
    env.cancel(1);
    env.bundle(1, observed("j1.b1", over(1, ""), 0, vec![returned(0, 1)]));
    env.words();
    assert_eq!(counts(&env, 1), [0, 0, 0, 0, 100, 0]);
    assert_eq!(rows(&env), 0);
    assert!(env.job(1).starts_with("CANCELLED CANCEL_REQUESTED"));
}

#[test]
fn a_checkpoint_of_a_task_in_a_bundle_is_resumed_from() {
    let mut spec = array(2);
    spec.retries = 1;
    let mut env = with_spec(spec);
    let mut end = failed(1);
    end.checkpoint = Some(Digest([4; 32]));
    end.outputs = Some(Digest([5; 32]));
    let reports = vec![ended(env.now, 0, 9, end)];
    env.tasks(1, "j1.b1", 0, reports);
    env.schedule();
    env.words();
    let first = &env.store.attempts[&attempt("j1.0.1")].members[0];
    assert_eq!(first.outputs, Some(Digest([5; 32])));
    let second = &env.store.attempts[&attempt("j1.0.2")];
    assert_eq!(second.resume_from, [Digest([4; 32])]);
}

#[test]
fn an_agent_is_told_now_and_then_what_is_on_record() {
    let mut env = running(2000);
    let reports = vec![ended(env.now, 0, 0, completed(0))];
    env.tasks(1, "j1.b1", 0, reports);
    env.schedule();
    env.words();
    // All fresh tasks but a few are there; nothing is topped up for a while, and still it hears.
    let reports: Vec<TaskReport> = (1..=600).map(|t| started(t, env.now)).collect();
    env.tasks(1, "j1.b1", 1, reports);
    let words = env.words();
    assert!(
        words
            .iter()
            .any(|word| word.starts_with("n1: run j1.b1") && word.ends_with(" 601")),
        "{words:?}"
    );
}

#[test]
fn many_slots_make_several_bundles() {
    let mut env = TestEnv::new();
    env.node(0);
    let mut spec = array(5000);
    spec.resources_per_node.cpu_milli = 5;
    env.start(spec);
    let slots: Vec<u32> = env
        .store
        .bundles
        .values()
        .map(|bundle| bundle.slots)
        .collect();
    assert_eq!(slots, [1000], "one round's bound");
    env.schedule();
    env.words();
    let slots: Vec<u32> = env
        .store
        .bundles
        .values()
        .map(|bundle| bundle.slots)
        .collect();
    assert_eq!(slots, [1000, 600]);
    assert_eq!(counts(&env, 1), [3400, 1600, 0, 0, 0, 0]);
}

#[test]
fn beyond_its_bundles_a_node_runs_tasks_one_by_one() {
    let mut env = TestEnv::new();
    env.node(0);
    let bundles = u64::try_from(crate::config::MAX_BUNDLES_PER_NODE).unwrap();
    for _ in 0..=bundles {
        let mut spec = limited(3, 1);
        spec.resources_per_node.cpu_milli = 10;
        env.start(spec);
    }
    let last = bundles + 1;
    assert_eq!(
        env.core.t.bundles_on(NodeId(1)).len(),
        env.store.bundles.len()
    );
    assert_eq!(env.store.jobs[&JobId(last)].bundles, 0);
    let single = env.store.attempts.keys().map(ToString::to_string);
    assert_eq!(single.collect::<Vec<_>>(), [format!("j{last}.0.1")]);
    assert_eq!(counts(&env, last), [2, 1, 0, 0, 0, 0]);
}
