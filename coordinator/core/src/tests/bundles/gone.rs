//! What becomes of a bundle when it cannot be prepared, or its node, its agent's memory or we go.

use super::*;

#[test]
fn a_bundle_that_cannot_prepare_sends_the_job_the_single_way() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(array(10));
    let end = over(1, "the snapshot is not there");
    env.bundle(1, observed("j1.b1", end, 0, vec![returned(0, 1)]));
    env.expect(&["note Warn PREPARE_FAILED", "n1: forget j1.b1", "schedule"]);
    assert_eq!(counts(&env, 1), [10, 0, 0, 0, 0, 0]);
    env.schedule();
    env.words();
    assert!(env.store.bundles.is_empty() && env.store.attempts.is_empty());
    // The node pauses, and then is tried with one task.
    env.pass(Duration::from_secs(5));
    env.schedule();
    env.words();
    assert!(env.store.bundles.is_empty());
    assert_eq!(env.store.attempts.len(), 1);
    env.run("j1.0.1", &[1]);
    env.schedule();
    env.words();
    assert!(env.store.attempts.contains_key(&attempt("j1.1.1")));
    env.run("j1.1.1", &[1]);
    // Fresh ones, too.
    for id in ["j1.0.1", "j1.1.1"] {
        let end = trainyard_common::member::ObservedPhase::Ended(completed(0));
        env.report(1, id, 0, end);
    }
    env.schedule();
    env.words();
    assert!(env.store.attempts.contains_key(&attempt("j1.2.1")));
}

#[test]
fn a_bundle_that_prepares_for_too_long_is_stopped() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(array(10));
    env.bundle(
        1,
        observed("j1.b1", ObservedBundlePhase::Preparing, 0, vec![]),
    );
    env.pass(env.config.prepare_timeout);
    env.expect(&[
        "note Warn PREPARE_TIMEOUT",
        "n1: stop PREPARE_TIMEOUT j1.b1 x2 [0-1] 0",
    ]);
    env.bundle(1, observed("j1.b1", over(1, ""), 0, vec![returned(0, 1)]));
    env.words();
    assert_eq!(counts(&env, 1), [10, 0, 0, 0, 0, 0]);
    // One that runs in time has no timer any more.
    let mut env = running(10);
    env.pass(env.config.prepare_timeout * 2);
    env.expect(&[]);
}

#[test]
fn a_bundle_that_a_silent_node_may_run_by_now_is_left_to_the_policy() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    let mut spec = array(10);
    spec.on_disconnect = OnDisconnect::Wait;
    env.start(spec);
    env.cut(node);
    env.pass(env.config.prepare_timeout * 2);
    let words = env.words();
    assert!(
        !words.iter().any(|word| word.contains("PREPARE_TIMEOUT")),
        "{words:?}"
    );
}

#[test]
fn a_lost_node_sends_its_tasks_elsewhere_and_later_reports_change_nothing() {
    let mut env = running(100);
    env.tasks(1, "j1.b1", 0, vec![started(0, env.now)]);
    env.node(0);
    env.schedule();
    env.words();
    assert_eq!(counts(&env, 1), [96, 4, 0, 0, 0, 0]);
    env.cut(NodeId(1));
    env.pass(env.config.lost_after + Duration::from_secs(1));
    env.words();
    for index in [0, 1] {
        assert_eq!(
            task(&env, index),
            "PENDING 1 RETRYING: attempt 1 unconfirmed on n1; tried again, interruption 1 of 5"
        );
        let row = &env.store.attempts[&attempt(&format!("j1.{index}.1"))];
        assert_eq!(row.state.as_str(), "LOST");
    }
    let bundle = &env.store.bundles[&"j1.b1".parse().unwrap()];
    assert_eq!(bundle.state.as_str(), "LOST");
    assert_eq!(counts(&env, 1), [98, 2, 0, 0, 0, 0]);
    assert!(
        env.core.t.usage.contains_key(&NodeId(1)),
        "they may still run there"
    );
    // It is back: what it holds is ended, and its reports only close what was given up.
    env.register_bundles(
        1,
        vec![observed("j1.b1", ObservedBundlePhase::Running, 1, vec![])],
    );
    env.expect(&[
        "note Info IN_SESSION",
        "n1: welcome [stop NODE_LOST j1.b1 x2 [0-1] 1]",
        "schedule",
    ]);
    let reports = vec![ended(env.now, 0, 9, completed(0)), returned(1, 1)];
    env.bundle(1, observed("j1.b1", over(3, ""), 1, reports));
    env.words();
    assert_eq!(counts(&env, 1), [98, 2, 0, 0, 0, 0]);
    for id in ["j1.0.1", "j1.1.1"] {
        let row = &env.store.attempts[&attempt(id)];
        assert_eq!(
            (row.state.as_str(), row.outcome.unwrap().as_str()),
            ("ENDED", "INTERRUPTED")
        );
    }
    let left: Vec<String> = env.store.bundles.keys().map(ToString::to_string).collect();
    assert_eq!(left, ["j1.b2"]);
}

#[test]
fn a_job_that_waits_keeps_its_bundle_until_the_node_is_confirmed() {
    let mut spec = array(100);
    spec.on_disconnect = OnDisconnect::Wait;
    let mut env = with_spec(spec);
    env.tasks(1, "j1.b1", 0, vec![started(0, env.now)]);
    env.cut(NodeId(1));
    env.pass(env.config.lost_after + Duration::from_secs(1));
    env.words();
    assert_eq!(counts(&env, 1), [98, 2, 0, 0, 0, 0]);
    assert!(task(&env, 0).starts_with("RUNNING 1 NODE_UNREACHABLE"));
    env.register_bundles(
        1,
        vec![observed("j1.b1", ObservedBundlePhase::Running, 1, vec![])],
    );
    env.expect(&[
        "note Info IN_SESSION",
        "n1: welcome [run j1.b1 x2 [0-1] 1 spec]",
        "schedule",
    ]);
    assert_eq!(
        task(&env, 0),
        "RUNNING 1 RUNNING: runs; n1 is heard of again"
    );
    env.cut(NodeId(1));
    env.pass(env.config.lost_after + Duration::from_secs(1));
    let key = env.key();
    env.event(Event::NodeConfirmedLost {
        key,
        node: NodeId(1),
    });
    env.words();
    assert!(env.store.bundles.is_empty());
    for index in [0, 1] {
        assert!(
            task(&env, index).starts_with("PENDING 1 RETRYING"),
            "{}",
            task(&env, index)
        );
    }
}

#[test]
fn a_reboot_interrupts_what_may_have_run() {
    let mut env = running(2);
    env.cut(NodeId(1));
    let mut again = env.registration(NodeId(1), 0, vec![]);
    again.boot_id = "boot-2".into();
    again.incarnation = Incarnation(2);
    let reports = vec![
        ended(env.now, 0, 9, rebooted()),
        ended(env.now, 1, 9, rebooted()),
    ];
    again.bundles = vec![observed("j1.b1", over(2, ""), 0, reports)];
    env.register_with(again);
    env.expect(&["n1: welcome []", "n1: forget j1.b1", "schedule"]);
    for index in [0, 1] {
        assert!(
            task(&env, index).starts_with("PENDING 1 RETRYING"),
            "{}",
            task(&env, index)
        );
        let row = &env.store.attempts[&attempt(&format!("j1.{index}.1"))];
        assert_eq!(row.reason.code, ReasonCode::NodeRebooted);
    }
    assert!(env.store.bundles.is_empty());
}

/// Rows of a backup say that a task is in a bundle which ended since; its second attempt runs.
#[test]
fn a_task_in_a_forgotten_bundle_is_tried_again_above_the_attempts_that_were_seen() {
    let mut env = running(10);
    env.cut(NodeId(1));
    let second = trainyard_common::member::ObservedMember {
        attempt: attempt("j1.0.2"),
        node_rank: 0,
        phase: trainyard_common::member::ObservedPhase::Ended(completed(0)),
    };
    let again = env.registration(NodeId(1), 0, vec![second]);
    env.register_with(again);
    env.words();
    env.pass(Duration::from_secs(60));
    env.schedule();
    env.words();
    assert!(!env.store.attempts.contains_key(&attempt("j1.0.2")));
    assert!(env.store.attempts.contains_key(&attempt("j1.0.3")));
}

#[test]
fn a_bundle_that_never_arrived_is_sent_again_and_one_that_vanished_is_interrupted() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(array(10));
    env.cut(NodeId(1));
    env.register_bundles(1, vec![]);
    env.expect(&["n1: welcome [run j1.b1 x2 [0-1] 0 spec]", "schedule"]);
    env.tasks(1, "j1.b1", 0, vec![]);
    env.words();
    env.cut(NodeId(1));
    env.register_bundles(1, vec![]);
    env.expect(&["n1: welcome []", "schedule"]);
    assert_eq!(
        task(&env, 0),
        "PENDING 1 RETRYING: attempt 1: n1 no longer knows j1.b1; how its tasks ended is not known; tried again, \
         interruption 1 of 5"
    );
    assert!(env.store.bundles.is_empty());
}

#[test]
fn an_unknown_bundle_of_a_known_job_is_stopped_and_forgotten_and_another_left_alone() {
    let mut env = running(10);
    let stray = |phase| observed("j1.b9", phase, 4, vec![started(7, Timestamp(5))]);
    env.bundle(1, stray(ObservedBundlePhase::Running));
    env.expect(&[
        "note Warn UNKNOWN_TO_AGENT",
        "n1: stop NODE_LOST j1.b9 x1 [] 5",
    ]);
    env.bundle(1, stray(over(5, "")));
    env.expect(&["n1: forget j1.b9"]);
    // Rows from a backup: the number is not given again, and the task that was seen gets a higher attempt.
    assert_eq!(env.store.jobs[&JobId(1)].bundles, 9);
    env.bundle(
        1,
        observed("j77.b1", ObservedBundlePhase::Running, 0, vec![]),
    );
    env.expect(&["note Warn UNKNOWN_TO_AGENT"]);
    let known = observed("j1.b1", ObservedBundlePhase::Running, 0, vec![]);
    env.cut(NodeId(1));
    env.register_bundles(
        1,
        vec![
            known,
            stray(ObservedBundlePhase::Running),
            stray(over(5, "")),
        ],
    );
    env.expect(&[
        "n1: welcome [run j1.b1 x2 [0-1] 0 spec]",
        "n1: forget j1.b9",
        "schedule",
    ]);
}

#[test]
fn a_restart_goes_on_where_it_was() {
    let mut env = warmed(100);
    env.tasks(1, "j1.b1", 12, vec![started(13, env.now)]);
    env.words();
    env.restart();
    env.register_bundles(
        1,
        vec![observed("j1.b1", ObservedBundlePhase::Running, 0, vec![])],
    );
    env.expect(&["n1: welcome [run j1.b1 x2 [12-61] 13 spec]", "schedule"]);
    env.tasks(1, "j1.b1", 13, quick(&env, 13..=13));
    env.words();
    assert_eq!(counts(&env, 1), [38, 49, 13, 0, 0, 0]);
}

#[test]
fn a_node_with_a_bundle_is_not_removed_and_a_cordon_closes_it() {
    let mut env = running(100);
    let key = env.key();
    env.event(Event::NodeRemoved {
        key,
        node: NodeId(1),
    });
    env.expect(&["refused FAILED_PRECONDITION NODE_IN_USE"]);
    let key = env.key();
    env.event(Event::NodePolicySet {
        key,
        node: NodeId(1),
        policy: NodePolicy::Draining,
        by: user("root"),
    });
    env.expect(&["n1: close j1.b1 x2 [0-1] 0", "done", "schedule"]);
    let reports = vec![
        ended(env.now, 0, 9, completed(0)),
        ended(env.now, 1, 9, completed(0)),
    ];
    env.bundle(1, observed("j1.b1", over(2, ""), 0, reports));
    env.schedule();
    env.words();
    assert!(env.store.bundles.is_empty() && env.core.t.usage.is_empty());
    let key = env.key();
    env.event(Event::NodeRemoved {
        key,
        node: NodeId(1),
    });
    env.expect(&["close s1 NODE_UNKNOWN", "done", "schedule"]);
}
