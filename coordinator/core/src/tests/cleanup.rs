//! Processes that outlive SIGKILL, tasks that are held for what they did, and agents that crash again and again.

use std::time::Duration;

use trainyard_common::ids::{JobId, NodeId, TaskIndex};
use trainyard_common::member::{Cleanup, EndCause, Ending, LeftProcess, ObservedPhase};
use trainyard_common::spec::OnDisconnect;
use trainyard_common::state::{AttemptState, ExitStatus, MemberPhase, ReasonCode};

use crate::config::Config;
use crate::event::Event;
use crate::testing::*;

fn left(ending: Ending) -> ObservedPhase {
    ObservedPhase::CleanupPending(Cleanup {
        ending,
        left: vec![LeftProcess {
            pid: 812,
            state: 'D',
            name: "python3".to_owned(),
        }],
        more: 0,
    })
}

fn failed(code: u8) -> Ending {
    ending(EndCause::RankFailed, 0, &[ExitStatus::Code(code)])
}

fn node_reason(env: &TestEnv, node: u32) -> String {
    let reason = &env.store.nodes[&NodeId(node)].reason;
    format!("{} {}", reason.code, reason.message)
}

#[test]
fn a_cancelled_job_ends_although_a_process_outlives_sigkill_and_its_node_is_quarantined() {
    let mut env = TestEnv::new();
    env.node(2);
    env.start(gpu_spec(1, 1));
    env.run("j1.0.1", &[1]);
    env.cancel(1);
    env.words();
    let stopped = ending(EndCause::Stopped, 0, &[ExitStatus::Unknown]);
    env.report(1, "j1.0.1", 0, left(stopped));
    env.words();
    assert_eq!(
        env.job(1),
        "CANCELLED CANCEL_REQUESTED: bob asked for its end; cleanup pending on n1: pid 812 (python3), state D"
    );
    assert_eq!(
        node_reason(&env, 1),
        "CLEANUP_PENDING cleanup pending on n1: pid 812 (python3), state D; no new work until then"
    );
    let row = &env.store.attempts[&attempt("j1.0.1")];
    assert_eq!(row.state, AttemptState::Lost);
    assert_eq!(row.members[0].phase, MemberPhase::CleanupPending);
    // Neither its GPU nor the other one is given out, and the waiting job says why.
    env.submit_anyway("next", gpu_spec(1, 1));
    env.schedule();
    env.words();
    assert!(
        env.job(2)
            .contains("n1 is quarantined, as processes there outlive SIGKILL"),
        "{}",
        env.job(2)
    );
    // So also after a start of the coordinator, and a restart of the agent.
    env.restart();
    env.schedule();
    let member = trainyard_common::member::ObservedMember {
        attempt: attempt("j1.0.1"),
        node_rank: 0,
        phase: left(ending(EndCause::Stopped, 0, &[ExitStatus::Unknown])),
    };
    env.register(NodeId(1), 2, vec![member]);
    env.schedule();
    assert!(env.words().iter().all(|word| !word.contains("j2.0.1")));
    assert!(node_reason(&env, 1).starts_with("CLEANUP_PENDING"));
    // The process is gone: the job stays as it is, and the node works again.
    env.report(1, "j1.0.1", 0, ObservedPhase::Uploading(stopped_by_kill()));
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(stopped_by_kill()));
    env.schedule();
    let words = env.words();
    assert!(words.contains(&"n1: forget j1.0.1".to_owned()), "{words:?}");
    assert!(words.contains(&"n1: start j2.0.1".to_owned()), "{words:?}");
    assert!(env.job(1).starts_with("CANCELLED CANCEL_REQUESTED"));
    assert_eq!(node_reason(&env, 1), "IN_SESSION n1 is in session");
    let row = &env.store.attempts[&attempt("j1.0.1")];
    assert_eq!(row.state, AttemptState::Ended);
    assert!(row.reason.message.ends_with("; cleaned up later"));
}

fn stopped_by_kill() -> Ending {
    ending(EndCause::Stopped, 0, &[ExitStatus::Signal(9)])
}

#[test]
fn a_retry_waits_for_processes_that_outlive_sigkill_and_says_so() {
    let mut env = TestEnv::new();
    env.node(0);
    env.node(0);
    let mut spec = job_spec();
    spec.retries = 1;
    env.start(spec);
    env.run("j1.0.1", &[1]);
    env.report(1, "j1.0.1", 0, left(failed(3)));
    env.schedule();
    assert!(env.words().iter().all(|word| !word.contains("j1.0.2")));
    assert_eq!(
        env.job(1),
        "STOPPING CLEANUP_PENDING: attempt 1: rank 0 on n1 exited with 3; tried again when nothing of it is left; \
         cleanup pending on n1: pid 812 (python3), state D"
    );
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(failed(3)));
    env.schedule();
    let words = env.words();
    assert!(
        words.iter().any(|word| word.contains("start j1.0.2")),
        "{words:?}"
    );
}

/// Whether attempt 2 starts while what attempt 1 left is on a node that is silent for this long.
fn tried_again_beside(policy: OnDisconnect, silence: Duration) -> bool {
    let mut env = TestEnv::new();
    env.node(0);
    let mut spec = job_spec();
    spec.retries = 1;
    spec.on_disconnect = policy;
    env.start(spec);
    env.run("j1.0.1", &[1]);
    env.node(0);
    env.report(1, "j1.0.1", 0, left(failed(3)));
    env.cut(NodeId(1));
    env.pass(silence);
    env.schedule();
    env.words().iter().any(|word| word.contains("start j1.0.2"))
}

#[test]
fn only_without_a_lease_time_gives_up_what_is_left_on_a_silent_node() {
    let lost_after = Config::default().lost_after;
    let second = Duration::from_secs(1);
    assert!(!tried_again_beside(
        OnDisconnect::Replace,
        lost_after - second
    ));
    assert!(tried_again_beside(
        OnDisconnect::Replace,
        lost_after + second
    ));
    assert!(!tried_again_beside(OnDisconnect::Wait, 10 * lost_after));
    assert!(!tried_again_beside(OnDisconnect::Stop, 10 * lost_after));
}

#[test]
fn a_cancel_ends_what_waits_for_such_processes() {
    let mut env = TestEnv::new();
    env.node(0);
    let mut spec = job_spec();
    spec.retries = 1;
    env.start(spec);
    env.run("j1.0.1", &[1]);
    env.report(1, "j1.0.1", 0, left(failed(3)));
    env.cancel(1);
    env.words();
    assert!(
        env.job(1)
            .starts_with("CANCELLED CANCEL_REQUESTED: cancelled; attempt 1 had ended"),
        "{}",
        env.job(1)
    );
}

#[test]
fn a_gang_is_over_when_only_such_processes_are_left_of_it() {
    let mut env = TestEnv::new();
    env.node(0);
    env.node(0);
    env.start(gpu_spec(2, 0));
    env.run("j1.0.1", &[1, 2]);
    env.report(1, "j1.0.1", 0, left(completed(0)));
    env.words();
    assert!(env.job(1).starts_with("RUNNING"), "{}", env.job(1));
    env.report(2, "j1.0.1", 1, ObservedPhase::Uploading(completed(1)));
    env.words();
    assert!(
        env.job(1).starts_with("STOPPING"),
        "its results come: {}",
        env.job(1)
    );
    env.report(2, "j1.0.1", 1, ObservedPhase::Ended(completed(1)));
    env.words();
    assert_eq!(
        env.job(1),
        "SUCCEEDED COMPLETED: every rank exited with 0; cleanup pending on n1: pid 812 (python3), state D"
    );
}

#[test]
fn what_was_seen_of_the_ranks_stays_when_the_shim_is_lost_since() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    env.report(1, "j1.0.1", 0, left(completed(0)));
    env.words();
    assert!(env.job(1).starts_with("SUCCEEDED"), "{}", env.job(1));
    let lost = ending(EndCause::SupervisorLost, 0, &[ExitStatus::Unknown]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Uploading(lost));
    env.words();
    let row = &env.store.attempts[&attempt("j1.0.1")];
    assert_eq!(row.members[0].ranks[0].exit, ExitStatus::Code(0));
}

#[test]
fn a_confirmed_loss_ends_a_quarantine() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    env.report(1, "j1.0.1", 0, left(failed(1)));
    env.cut(NodeId(1));
    env.pass(Duration::from_secs(60));
    let key = env.key();
    let node = NodeId(1);
    env.event(Event::NodeConfirmedLost { key, node });
    env.words();
    let row = &env.store.attempts[&attempt("j1.0.1")];
    assert_eq!(row.state, AttemptState::Ended);
    assert!(env.job(1).starts_with("FAILED RANK_EXITED"));
}

#[test]
fn a_task_that_takes_three_nodes_down_is_not_tried_again() {
    let mut env = TestEnv::new();
    for _ in 0..4 {
        env.node(0);
    }
    env.start(job_spec());
    for number in 1..=3 {
        let id = format!("j1.0.{number}");
        let node = env.store.attempts[&attempt(&id)].members[0].node;
        env.run(&id, &[node.0]);
        let mut rebooted = ending(EndCause::NodeRebooted, 0, &[ExitStatus::Unknown]);
        rebooted.message =
            "rebooted at 2026-11-24 15:00:00 UTC before the exit status was recorded; \
            last log offset: rank 0 at 4711"
                .to_owned();
        env.report(node.0, &id, 0, ObservedPhase::Ended(rebooted));
        env.words();
        if number == 1 {
            assert!(
                env.job(1).contains(&format!(
                    "attempt 1: node {node} rebooted at 2026-11-24 15:00:00 UTC before"
                )),
                "{}",
                env.job(1)
            );
        }
        env.pass(Duration::from_secs(5));
        env.schedule();
        env.words();
    }
    let job = env.job(1);
    assert!(
        job.starts_with(
            "FAILED RETRY_BUDGET_SPENT: not tried again: 3 different nodes went down while it ran there (n1, n2, n3); \
             the last one: node n3 rebooted at"
        ),
        "{job}"
    );
    let task = &env.store.tasks[&(JobId(1), TaskIndex(0))];
    assert_eq!(task.failures, 0, "no retry of the user's was used");
}

#[test]
fn nodes_that_go_down_after_long_runs_say_nothing_about_the_task() {
    let mut env = TestEnv::new();
    for _ in 0..4 {
        env.node(0);
    }
    env.start(job_spec());
    for number in 1..=8 {
        let id = format!("j1.0.{number}");
        let node = env.store.attempts[&attempt(&id)].members[0].node;
        env.run(&id, &[node.0]);
        env.pass(Duration::from_secs(3700));
        let mut rebooted = ending(EndCause::NodeRebooted, 0, &[ExitStatus::Unknown]);
        rebooted.ranks[0].at = env.now;
        env.report(node.0, &id, 0, ObservedPhase::Ended(rebooted));
        env.pass(Duration::from_secs(5));
        env.schedule();
        env.words();
    }
    assert!(env.job(1).starts_with("PREPARING"), "{}", env.job(1));
}

#[test]
fn a_task_that_fails_again_and_again_soon_after_its_start_is_not_tried_again() {
    let mut env = TestEnv::new();
    env.node(0);
    let mut spec = job_spec();
    spec.retries = 100;
    env.start(spec);
    for number in 1..=9 {
        let id = format!("j1.0.{number}");
        env.run(&id, &[1]);
        // The fourth one gets somewhere.
        env.pass(Duration::from_secs(if number == 4 { 90 } else { 5 }));
        let mut end = failed(1);
        end.ranks[0].at = env.now;
        env.report(1, &id, 0, ObservedPhase::Ended(end));
        env.schedule();
        env.words();
        assert_eq!(
            env.job(1).starts_with("FAILED"),
            number == 9,
            "{number}: {}",
            env.job(1)
        );
    }
    assert!(
        env.job(1).starts_with(
            "FAILED RETRY_BUDGET_SPENT: not tried again: 5 attempts in a row failed within 1m of their start"
        ),
        "{}",
        env.job(1)
    );
    assert_eq!(env.store.jobs[&JobId(1)].exit, Some(ExitStatus::Code(1)));
}

#[test]
fn the_node_of_an_agent_that_crashes_again_and_again_pauses_and_what_runs_there_goes_on() {
    let config = Config {
        crash_pause: Duration::from_secs(120),
        ..Config::default()
    };
    let mut env = TestEnv::with(config);
    let node = env.node(0);
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    let running = || trainyard_common::member::ObservedMember {
        attempt: attempt("j1.0.1"),
        node_rank: 0,
        phase: ObservedPhase::Running {
            started_at: trainyard_common::time::Timestamp(1_000_000),
        },
    };
    for start in 2..=4 {
        env.cut(node);
        env.pass(Duration::from_secs(2));
        let mut registration = env.registration(node, 0, vec![running()]);
        registration.incarnation.0 = start;
        registration.last_words = "panicked at driver.rs:12: no entry".to_owned();
        env.register_with(registration);
    }
    assert!(env.words().contains(&"note Error AGENT_CRASHES".to_owned()));
    let reason = node_reason(&env, 1);
    assert!(
        reason.starts_with(
            "AGENT_CRASHES the agent of n1 started 3 times within 5m without having said goodbye"
        ) && reason.ends_with("its last words: panicked at driver.rs:12: no entry"),
        "{reason}"
    );
    assert!(env.job(1).starts_with("RUNNING"));
    env.submit_anyway("next", job_spec());
    env.schedule();
    env.words();
    assert!(
        env.job(2)
            .contains("n1 pauses: its agent crashes again and again"),
        "{}",
        env.job(2)
    );
    env.pass(Duration::from_secs(121));
    env.schedule();
    let words = env.words();
    assert!(words.contains(&"n1: start j2.0.1".to_owned()), "{words:?}");
    assert_eq!(node_reason(&env, 1), "IN_SESSION n1 is in session");
}

#[test]
fn an_agent_that_says_goodbye_before_each_start_is_in_order() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    for start in 2..=9 {
        let session = env.session(node);
        env.event(Event::GoodbyeSaid { session, node });
        env.cut(node);
        let mut registration = env.registration(node, 0, vec![]);
        registration.incarnation.0 = start;
        env.register_with(registration);
        env.words();
        let reason = env.store.nodes[&node].reason.code;
        assert_eq!(reason, ReasonCode::InSession, "start {start}");
    }
}
