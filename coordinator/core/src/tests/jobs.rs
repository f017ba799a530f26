//! Submitting and cancelling.

use std::time::Duration;

use trainyard_common::ids::JobId;
use trainyard_common::member::ObservedPhase;
use trainyard_common::spec::{Array, Launcher};
use trainyard_common::state::JobState;

use crate::Config;
use crate::effect::Effect;
use crate::testing::{TestEnv, completed, gpu_spec, job_spec, stopped};

fn array(first: u32, last: u32, max_running: Option<u32>) -> trainyard_common::spec::JobSpec {
    let mut spec = job_spec();
    spec.array = Some(Array {
        first,
        last,
        max_running,
    });
    spec.launcher = Launcher::Torchrun; // Has a shim for each attempt.
    spec
}

#[test]
fn a_submit_is_on_record_before_it_is_answered() {
    let mut env = TestEnv::new();
    env.node(0);
    env.submit("alice", "r1", job_spec());
    env.expect_all(&["j1 PENDING QUEUED"], &["submitted j1", "schedule"]);
}

#[test]
fn a_repeated_submit_gets_the_same_job_and_changes_nothing() {
    let mut env = TestEnv::new();
    env.submit("alice", "r1", job_spec());
    env.words();
    env.submit("alice", "r1", job_spec());
    env.expect_all(&[], &["submitted j1 before"]);
    env.restart();
    env.submit("alice", "r1", job_spec());
    env.expect_all(&[], &["submitted j1 before"]);
    // The same id of another user is another request.
    env.submit("bob", "r1", job_spec());
    env.expect(&["submitted j2", "schedule"]);
}

#[test]
fn a_request_id_with_another_body_is_refused_by_name() {
    let mut env = TestEnv::new();
    env.submit("alice", "r1", job_spec());
    env.words();
    env.submit("alice", "r1", gpu_spec(2, 0));
    let Some(Effect::Reply(_, Err(refusal))) = env.said.first() else {
        panic!("no refusal")
    };
    assert!(
        refusal.message.contains("j1") && refusal.message.contains("r1"),
        "{refusal}"
    );
    env.expect_all(&[], &["refused ALREADY_EXISTS REQUEST_ID_REUSED"]);
}

#[test]
fn a_request_id_is_forgotten_after_its_time_and_not_before() {
    let mut env = TestEnv::new();
    env.submit("alice", "r1", job_spec());
    env.now = env.now.after(env.config.request_id_retention);
    env.submit("alice", "r1", job_spec());
    env.expect(&["submitted j1", "schedule", "submitted j1 before"]);
    env.now = env.now.after(Duration::from_millis(1));
    env.submit("alice", "r1", job_spec());
    env.expect(&["submitted j2", "schedule"]);
}

#[test]
fn what_is_invalid_names_its_field() {
    let mut env = TestEnv::new();
    let mut refused = |change: &dyn Fn(&mut trainyard_common::spec::JobSpec)| {
        let mut spec = job_spec();
        change(&mut spec);
        env.submit("alice", "r", spec);
        let Some(Effect::Reply(_, Err(refusal))) = env.said.pop() else {
            panic!("no refusal")
        };
        refusal.field.unwrap()
    };
    assert_eq!(refused(&|spec| spec.nodes = 0), "nodes");
    assert_eq!(
        refused(&|spec| spec.targets = vec!["local".into(), "moon".into()]),
        "targets"
    );
    assert_eq!(
        refused(&|spec| spec.workspace = "other".parse().unwrap()),
        "workspace"
    );
    let last = Some(Array {
        first: u32::MAX,
        last: u32::MAX,
        max_running: None,
    });
    assert_eq!(refused(&|spec| spec.array = last), "array");
    assert!(env.store.jobs.is_empty());
}

#[test]
fn limits_of_the_cluster_and_of_a_user_are_met_at_the_bound() {
    let config = Config {
        max_live_jobs: 3,
        max_live_jobs_per_user: 2,
        ..Config::default()
    };
    let mut env = TestEnv::with(config);
    env.submit("alice", "r1", job_spec());
    env.submit("alice", "r2", job_spec());
    env.words();
    env.submit("alice", "r3", job_spec());
    env.expect_all(&[], &["refused EXHAUSTED TOO_MANY_JOBS_OF_USER"]);
    env.submit("bob", "r1", job_spec());
    env.words();
    env.submit("carol", "r1", job_spec());
    env.expect_all(&[], &["refused EXHAUSTED TOO_MANY_JOBS"]);
    // A retry is answered all the same, and an end makes room.
    env.submit("alice", "r1", job_spec());
    env.expect(&["submitted j1 before"]);
    env.cancel(1);
    env.submit("carol", "r1", job_spec());
    env.expect(&[
        "cancelled j1 CANCELLED",
        "schedule",
        "submitted j4",
        "schedule",
    ]);
}

#[test]
fn what_no_node_could_hold_is_refused_with_the_largest_possible() {
    let mut env = TestEnv::new();
    env.node(4);
    env.submit("alice", "r1", gpu_spec(1, 8));
    let Some(Effect::Reply(_, Err(refusal))) = env.said.first() else {
        panic!("no refusal")
    };
    assert_eq!(
        refusal.message,
        "gpus_per_node: needs 1 node with 8 GPUs and 1 CPU; the only node could not hold that even if empty: the most is \
         4 GPUs on n1; ask for less, add nodes, or submit with --allow-infeasible to wait for them"
    );
    assert_eq!(refusal.field.as_deref(), Some("gpus_per_node"));
    env.expect_all(&[], &["refused FAILED_PRECONDITION INFEASIBLE"]);
}

#[test]
fn what_nodes_could_hold_follows_the_nodes() {
    let mut env = TestEnv::new();
    let node = env.node(4);
    env.submit("alice", "r1", gpu_spec(1, 8));
    env.expect(&["refused FAILED_PRECONDITION INFEASIBLE"]);
    env.register(node, 8, vec![]);
    env.words();
    env.submit("alice", "r1", gpu_spec(1, 8));
    env.expect(&["submitted j1", "schedule"]);
    env.register(node, 4, vec![]);
    env.words();
    env.submit("alice", "r2", gpu_spec(1, 8));
    env.expect(&["refused FAILED_PRECONDITION INFEASIBLE"]);
}

#[test]
fn what_no_node_could_hold_waits_if_that_is_wanted() {
    let mut env = TestEnv::new();
    env.node(4);
    env.submit_anyway("r1", gpu_spec(2, 4));
    env.expect_all(&["j1 PENDING INFEASIBLE"], &["submitted j1", "schedule"]);
    env.schedule();
    env.expect_all(&[], &[]);
    // It does not hold up others, and starts once it can.
    env.start(gpu_spec(1, 4));
    assert!(env.job(2).starts_with("PREPARING"), "{}", env.job(2));
    env.node(4);
    env.node(4);
    env.schedule();
    env.expect(&["n2: prepare j1.0.1", "n3: prepare j1.0.1"]);
}

#[test]
fn without_any_node_a_job_waits_for_one() {
    let mut env = TestEnv::new();
    env.submit("alice", "r1", gpu_spec(1, 8));
    env.schedule();
    env.expect_all(&["j1 PENDING QUEUED"], &["submitted j1", "schedule"]);
    assert!(
        env.job(1).contains("no node is there yet"),
        "{}",
        env.job(1)
    );
    let node = env.enrol();
    env.schedule();
    env.expect_all(&[], &[]);
    env.register(node, 8, vec![]);
    env.schedule();
    env.expect(&["n1: welcome []", "schedule", "n1: start j1.0.1"]);
}

#[test]
fn a_waiting_job_is_cancelled_at_once() {
    let mut env = TestEnv::new();
    env.submit("alice", "r1", job_spec());
    env.words();
    env.cancel(1);
    env.expect_all(
        &["j1 CANCELLED CANCEL_REQUESTED"],
        &["cancelled j1 CANCELLED", "schedule"],
    );
    assert!(
        env.core.job(JobId(1)).is_none(),
        "what is over leaves memory"
    );
    env.node(1);
    env.schedule();
    env.cancel(1);
    env.expect_all(&[], &["refused NOT_FOUND JOB_UNKNOWN"]);
}

#[test]
fn a_running_job_is_stopped_and_a_second_cancel_changes_nothing() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    env.cancel(1);
    env.expect_all(
        &[
            "j1 STOPPING CANCEL_REQUESTED",
            "j1.0 STOPPING CANCEL_REQUESTED",
            "j1.0.1 STOPPING [n1 RUNNING]",
        ],
        &[
            "n1: stop j1.0.1 CANCEL_REQUESTED",
            "cancelled j1 STOPPING",
            "schedule",
        ],
    );
    env.cancel(1);
    env.expect_all(&[], &["cancelled j1 STOPPING"]);
    // Even ranks that end well after that do not make it a success.
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(completed(0)));
    env.expect_all(
        &[
            "j1 CANCELLED CANCEL_REQUESTED",
            "j1.0 CANCELLED CANCEL_REQUESTED",
            "j1.0.1 ENDED [n1 ENDED]",
        ],
        &["n1: forget j1.0.1", "schedule"],
    );
}

#[test]
fn a_cancelled_job_never_starts() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(job_spec());
    env.report(1, "j1.0.1", 0, ObservedPhase::Preparing);
    env.cancel(1);
    env.words();
    env.report(1, "j1.0.1", 0, ObservedPhase::Ready { port: 1 });
    env.expect_all(&["j1.0.1 STOPPING [n1 READY]"], &[]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(stopped(0)));
    env.words();
    assert!(env.job(1).starts_with("CANCELLED"), "{}", env.job(1));
}

#[test]
fn a_cancel_after_the_decision_leaves_it() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Uploading(completed(0)));
    env.words();
    env.cancel(1);
    env.expect_all(
        &["j1 STOPPING UPLOADING"],
        &["cancelled j1 STOPPING", "schedule"],
    );
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(completed(0)));
    env.words();
    assert_eq!(env.job(1), "SUCCEEDED COMPLETED: every rank exited with 0");
}

#[test]
fn a_cancel_between_attempts_is_the_end() {
    let mut env = TestEnv::new();
    env.node(0);
    let mut spec = job_spec();
    spec.retries = 3;
    env.start(spec);
    env.run("j1.0.1", &[1]);
    let failed = crate::testing::ending(
        trainyard_common::member::EndCause::RankFailed,
        0,
        &[trainyard_common::state::ExitStatus::Code(1)],
    );
    env.report(1, "j1.0.1", 0, ObservedPhase::Uploading(failed.clone()));
    env.cancel(1);
    env.words();
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(failed));
    env.words();
    assert!(env.job(1).starts_with("CANCELLED"), "{}", env.job(1));
}

#[test]
fn an_array_counts_its_tasks_and_keeps_to_its_limit() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(array(5, 8, Some(2)));
    assert_eq!(
        env.job(1),
        "PREPARING PREPARING: of 4 tasks 2 active, 2 waiting"
    );
    env.run("j1.5.1", &[1]);
    env.run("j1.6.1", &[1]);
    env.schedule();
    env.expect_all(&[], &[]);
    env.report(1, "j1.6.1", 0, ObservedPhase::Ended(completed(0)));
    env.schedule();
    env.expect(&["n1: forget j1.6.1", "schedule", "n1: start j1.7.1"]);
    env.report(1, "j1.5.1", 0, ObservedPhase::Ended(completed(0)));
    env.schedule();
    env.run("j1.7.1", &[1]);
    env.run("j1.8.1", &[1]);
    env.report(1, "j1.7.1", 0, ObservedPhase::Ended(completed(0)));
    let failed = crate::testing::ending(
        trainyard_common::member::EndCause::RankFailed,
        0,
        &[trainyard_common::state::ExitStatus::Code(3)],
    );
    env.report(1, "j1.8.1", 0, ObservedPhase::Ended(failed));
    env.words();
    assert_eq!(
        env.job(1),
        "FAILED TASKS_FAILED: of 4 tasks 3 succeeded, 1 failed"
    );
    let exit = env.store.jobs[&JobId(1)].exit;
    assert_eq!(exit, Some(trainyard_common::state::ExitStatus::Code(3)));
}

#[test]
fn an_array_is_cancelled_without_a_row_for_what_never_ran() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(array(0, 99_999, Some(1)));
    env.run("j1.0.1", &[1]);
    env.cancel(1);
    env.words();
    assert_eq!(env.store.jobs[&JobId(1)].tasks.cancelled, 99_999);
    assert_eq!(env.store.tasks.len(), 1);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(stopped(0)));
    env.words();
    assert_eq!(env.store.jobs[&JobId(1)].state, JobState::Cancelled);
    assert_eq!(env.store.jobs[&JobId(1)].tasks.cancelled, 100_000);
}
