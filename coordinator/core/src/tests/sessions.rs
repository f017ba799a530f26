//! Who may speak for a node, and what an agent has against what it should have.

use trainyard_common::ids::{Incarnation, NodeId};
use trainyard_common::member::{EndCause, ObservedMember, ObservedPhase};
use trainyard_common::state::ExitStatus;

use crate::event::{Event, SessionId};
use crate::testing::{TestEnv, attempt, completed, ending, gpu_spec, job_spec, stopped};

fn observed(id: &str, phase: ObservedPhase) -> ObservedMember {
    ObservedMember {
        attempt: attempt(id),
        node_rank: 0,
        phase,
    }
}

fn running(env: &TestEnv) -> ObservedPhase {
    ObservedPhase::Running {
        started_at: env.now,
    }
}

#[test]
fn an_unknown_node_is_told_to_join_again() {
    let mut env = TestEnv::new();
    let registration = env.registration(NodeId(9), 0, vec![]);
    env.register_with(registration);
    env.expect_all(&[], &["close s1 NODE_UNKNOWN"]);
}

#[test]
fn a_newer_session_replaces_the_older_one() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    let old = env.session(node);
    env.start(job_spec());
    env.register(node, 0, vec![observed("j1.0.1", ObservedPhase::Preparing)]);
    env.expect(&[
        "close s1 SESSION_REPLACED",
        "n1: welcome [start j1.0.1]",
        "schedule",
    ]);
    // Nothing that the old session says or does counts any more.
    let member = observed("j1.0.1", ObservedPhase::Ready { port: 1 });
    env.event(Event::MemberObserved {
        session: old,
        node,
        member,
    });
    env.event(Event::HeartbeatReceived { session: old, node });
    env.event(Event::SessionEnded { session: old, node });
    env.expect_all(&[], &[]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ready { port: 2 });
    env.expect(&["n1: run j1.0.1 at 127.0.0.1:2"]);
}

#[test]
fn an_older_incarnation_or_a_twin_is_refused() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    let mut newer = env.registration(node, 0, vec![]);
    newer.incarnation = Incarnation(5);
    env.register_with(newer);
    env.words();
    let open = env.session(node);
    let mut copy = env.registration(node, 0, vec![]);
    copy.incarnation = Incarnation(4);
    env.event(Event::AgentRegistered(Box::new(copy)));
    env.expect_all(
        &[],
        &[
            "note Error DUPLICATE_IDENTITY",
            "close s3 DUPLICATE_IDENTITY",
        ],
    );
    let mut twin = env.registration(node, 0, vec![]);
    twin.incarnation = Incarnation(5);
    twin.boot_id = "boot-2".into();
    env.event(Event::AgentRegistered(Box::new(twin)));
    env.expect_all(
        &[],
        &[
            "note Error DUPLICATE_IDENTITY",
            "close s4 DUPLICATE_IDENTITY",
        ],
    );
    assert_eq!(env.core.live.sessions.get(&node), Some(&open));
}

#[test]
fn a_report_counts_only_from_a_node_of_the_attempt() {
    let mut env = TestEnv::new();
    env.node(0);
    env.node(0);
    env.start(job_spec());
    env.report(2, "j1.0.1", 0, ObservedPhase::Ended(completed(0)));
    env.report(1, "j1.0.1", 1, ObservedPhase::Ended(completed(0)));
    env.expect_all(
        &[],
        &["note Warn UNKNOWN_TO_AGENT", "note Warn UNKNOWN_TO_AGENT"],
    );
    env.event(Event::HeartbeatReceived {
        session: SessionId(77),
        node: NodeId(1),
    });
    env.expect_all(&[], &[]);
}

#[test]
fn a_member_that_its_agent_lost_is_an_interruption() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    env.register(node, 0, vec![]);
    env.expect(&["close s1 SESSION_REPLACED", "n1: welcome []", "schedule"]);
    assert_eq!(
        env.job(1),
        "PENDING RETRYING: attempt 1: n1 no longer knows attempt 1; how its ranks ended is not known; tried again, \
         interruption 1 of 5"
    );
}

#[test]
fn a_stop_for_what_was_never_accepted_is_its_end() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    env.start(job_spec());
    env.cut(node);
    env.cancel(1);
    env.words();
    assert!(env.job(1).starts_with("STOPPING"), "{}", env.job(1));
    env.register(node, 0, vec![]);
    env.expect(&["n1: welcome []", "schedule"]);
    assert!(env.job(1).starts_with("CANCELLED"), "{}", env.job(1));
}

#[test]
fn what_happened_while_we_were_away_is_caught_up() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    for _ in 0..3 {
        env.start(job_spec());
    }
    env.run("j1.0.1", &[1]);
    env.run("j2.0.1", &[1]);
    env.restart();
    let now = running(&env);
    env.register(
        node,
        0,
        vec![
            observed("j1.0.1", ObservedPhase::Ended(completed(0))),
            observed("j2.0.1", now),
            observed("j3.0.1", ObservedPhase::Ready { port: 8 }),
        ],
    );
    env.expect(&[
        "n1: welcome [run j2.0.1 at 127.0.0.1:4000, run j3.0.1 at 127.0.0.1:8]",
        "n1: forget j1.0.1",
        "schedule",
    ]);
    assert!(env.job(1).starts_with("SUCCEEDED"), "{}", env.job(1));
}

#[test]
fn a_reboot_is_told_by_the_agent() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    let end = ending(EndCause::NodeRebooted, 0, &[ExitStatus::Unknown]);
    let mut registration =
        env.registration(node, 0, vec![observed("j1.0.1", ObservedPhase::Ended(end))]);
    registration.incarnation = Incarnation(2);
    registration.boot_id = "boot-2".into();
    env.register_with(registration);
    env.words();
    assert!(
        env.job(1)
            .contains("rebooted before the exit status was recorded"),
        "{}",
        env.job(1)
    );
}

#[test]
fn what_is_over_is_stopped_or_forgotten_and_what_is_foreign_is_left_alone() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    env.start(job_spec());
    env.cancel(1);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(stopped(0)));
    env.words();
    let now = running(&env);
    let strays = vec![
        observed("j1.0.1", ObservedPhase::Ended(stopped(0))),
        observed("j1.0.7", now.clone()),
        observed("j99.0.1", now),
    ];
    env.register(node, 0, strays);
    env.expect(&[
        "close s1 SESSION_REPLACED",
        "note Warn UNKNOWN_TO_AGENT",
        "n1: welcome [stop j1.0.7 NODE_LOST]",
        "n1: forget j1.0.1",
        "schedule",
    ]);
}

#[test]
fn after_a_restored_backup_attempts_go_on_above_the_highest_known() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    env.submit("alice", "r1", job_spec());
    let now = running(&env);
    env.register(node, 0, vec![observed("j1.0.4", now)]);
    env.words();
    env.schedule();
    env.expect(&["n1: start j1.0.5"]);
}

#[test]
fn a_machine_that_comes_back_with_less_is_not_overbooked_further() {
    let mut env = TestEnv::new();
    let node = env.node(4);
    env.start(gpu_spec(1, 4));
    env.run("j1.0.1", &[1]);
    let now = running(&env);
    env.register(node, 1, vec![observed("j1.0.1", now)]);
    env.start(gpu_spec(1, 1));
    env.words();
    assert!(
        env.job(2).starts_with("PENDING INSUFFICIENT_FREE"),
        "{}",
        env.job(2)
    );
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(completed(0)));
    env.schedule();
    env.words();
    assert!(env.job(2).starts_with("PREPARING"), "{}", env.job(2));
}

#[test]
fn a_greeting_that_comes_after_that_of_a_later_session_is_refused() {
    let mut env = TestEnv::new();
    let node = env.enrol();
    let mut early = env.registration(node, 0, vec![]);
    early.opening = 1;
    let mut later = env.registration(node, 0, vec![]);
    later.opening = 2;
    env.register_with(later);
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    env.words();
    env.changes();
    // It says nothing of an attempt that began after it was sent.
    let refused = format!("close s{} SESSION_TOO_LATE", early.session.0);
    env.register_with(early);
    env.expect_all(&[], &[&refused]);
    assert!(env.job(1).starts_with("RUNNING"), "{}", env.job(1));
}
