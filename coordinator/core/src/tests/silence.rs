//! Time: silent nodes, what is given up and what is not, and nodes that operators vouch for.

use std::time::Duration;

use trainyard_common::ids::{Digest, NodeId};
use trainyard_common::member::{EndCause, ObservedMember, ObservedPhase};
use trainyard_common::spec::OnDisconnect;
use trainyard_common::state::{AttemptState, ExitStatus, NodePolicy};
use trainyard_common::time::Timestamp;

use crate::effect::Effect;
use crate::event::Event;
use crate::testing::{TestEnv, attempt, completed, ending, gpu_spec, job_spec, stopped, user};

const fn minutes(minutes: u64) -> Duration {
    Duration::from_secs(60 * minutes)
}

fn remove(env: &mut TestEnv, node: u32) {
    let key = env.key();
    env.event(Event::NodeRemoved {
        key,
        node: NodeId(node),
    });
}

fn confirm(env: &mut TestEnv, node: u32) {
    let key = env.key();
    env.event(Event::NodeConfirmedLost {
        key,
        node: NodeId(node),
    });
}

fn back(env: &mut TestEnv, node: u32, id: &str, rank: u32, phase: ObservedPhase) {
    let member = ObservedMember {
        attempt: attempt(id),
        node_rank: rank,
        phase,
    };
    env.register(NodeId(node), 4, vec![member]);
}

#[test]
fn heartbeats_keep_a_node() {
    let mut env = TestEnv::new();
    env.node(0);
    env.pass(minutes(60));
    env.expect_all(&[], &[]);
}

#[test]
fn a_broken_session_is_no_news_until_the_lease_is_over() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    env.cut(node);
    env.expect_all(&[], &[]);
    // Nothing new is placed on it at once.
    env.start(job_spec());
    assert_eq!(
        env.job(2),
        "PENDING NODE_UNREACHABLE: needs 1 node with 1 CPU; what could hold it takes no new work: n1 is not in \
         session"
    );
    env.pass(Duration::from_millis(14_999));
    env.expect_all(&[], &[]);
    env.pass(Duration::from_millis(1));
    env.expect_all(&["n1 READY ACTIVE SUSPECT"], &[]);
    env.pass(Duration::from_millis(14_999));
    env.expect_all(&[], &[]);
    env.pass(Duration::from_millis(1));
    env.expect_all(&["n1 UNREACHABLE ACTIVE SILENT"], &["note Warn SILENT"]);
    assert!(env.job(1).starts_with("RUNNING"), "{}", env.job(1));
    let now = env.now;
    back(
        &mut env,
        1,
        "j1.0.1",
        0,
        ObservedPhase::Running { started_at: now },
    );
    env.expect_all(
        &["n1 READY ACTIVE IN_SESSION"],
        &[
            "note Info IN_SESSION",
            "n1: welcome [run j1.0.1 at 127.0.0.1:4000]",
            "schedule",
        ],
    );
}

#[test]
fn a_single_attempt_is_replaced_after_its_time_and_the_old_one_stopped_when_it_is_back() {
    let mut env = TestEnv::new();
    let first = env.node(4);
    env.start(gpu_spec(1, 4));
    env.run("j1.0.1", &[1]);
    env.node(4);
    env.cut(first);
    env.pass(minutes(15) - Duration::from_millis(1));
    env.expect_all(
        &["n1 READY ACTIVE SUSPECT", "n1 UNREACHABLE ACTIVE SILENT"],
        &["note Warn SILENT"],
    );
    env.pass(Duration::from_millis(1));
    env.expect_all(
        &[
            "n1 LOST ACTIVE NODE_LOST",
            "j1 PENDING RETRYING",
            "j1.0 PENDING RETRYING",
            "j1.0.1 LOST [n1 RUNNING]",
        ],
        &["note Warn NODE_LOST", "schedule"],
    );
    assert_eq!(
        env.job(1),
        "PENDING RETRYING: attempt 1 unconfirmed on n1; tried again, interruption 1 of 5"
    );
    env.schedule();
    env.expect(&["n2: start j1.0.2"]);
    env.run("j1.0.2", &[2]);
    // What the old one held stays held until it is confirmed.
    assert_eq!(env.core.t.usage[&first].amounts.gpus, 4);
    let now = env.now;
    back(
        &mut env,
        1,
        "j1.0.1",
        0,
        ObservedPhase::Running { started_at: now },
    );
    env.expect(&[
        "note Info IN_SESSION",
        "n1: welcome [stop j1.0.1 NODE_LOST]",
        "schedule",
    ]);
    // A late success of the old one changes nothing but that its place is free.
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(completed(0)));
    env.expect_all(
        &["j1.0.1 ENDED [n1 ENDED]"],
        &["n1: forget j1.0.1", "schedule"],
    );
    assert!(!env.core.t.usage.contains_key(&first));
    assert!(env.job(1).starts_with("RUNNING"), "{}", env.job(1));
}

#[test]
fn a_gang_is_given_up_sooner_and_its_reachable_members_are_stopped_first() {
    let mut env = TestEnv::new();
    env.node(4);
    let second = env.node(4);
    env.start(gpu_spec(2, 4));
    env.run("j1.0.1", &[1, 2]);
    env.cut(second);
    env.pass(minutes(3));
    env.expect(&["note Warn SILENT", "n1: stop j1.0.1 NODE_LOST"]);
    assert_eq!(
        env.job(1),
        "STOPPING NODE_LOST: attempt 1 unconfirmed on n2"
    );
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(stopped(0)));
    env.expect(&["schedule"]);
    assert!(env.job(1).starts_with("PENDING RETRYING"), "{}", env.job(1));
    assert_eq!(
        env.core.attempt(attempt("j1.0.1")).unwrap().state,
        AttemptState::Lost
    );
}

#[test]
fn a_job_that_is_over_says_where_its_end_is_not_confirmed() {
    let mut env = TestEnv::new();
    env.node(4);
    let second = env.node(4);
    env.start(gpu_spec(2, 4));
    env.run("j1.0.1", &[1, 2]);
    env.cut(second);
    let failed = ending(EndCause::RankFailed, 0, &[ExitStatus::Code(5)]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(failed));
    env.words();
    env.pass(minutes(3));
    let told = "FAILED RANK_EXITED: rank 0 on n1 exited with 5; attempt 1 unconfirmed on n2";
    assert_eq!(env.job(1), told);
    env.words();
    let now = env.now;
    back(
        &mut env,
        2,
        "j1.0.1",
        1,
        ObservedPhase::Running { started_at: now },
    );
    env.expect(&[
        "note Info IN_SESSION",
        "n2: welcome [stop j1.0.1 GANG_ENDED]",
        "schedule",
    ]);
    env.report(2, "j1.0.1", 1, ObservedPhase::Ended(stopped(1)));
    env.words();
    assert_eq!(env.job(1), told);
    let attempt = &env.store.attempts[&attempt("j1.0.1")];
    assert_eq!(attempt.state, AttemptState::Ended);
    assert!(attempt.reason.message.ends_with("unconfirmed on n2"));
}

#[test]
fn a_node_that_is_back_in_time_ends_the_attempt_in_order() {
    let mut env = TestEnv::new();
    env.node(4);
    let second = env.node(4);
    env.start(gpu_spec(2, 4));
    env.run("j1.0.1", &[1, 2]);
    env.cut(second);
    env.pass(minutes(3));
    env.words();
    let now = env.now;
    back(
        &mut env,
        2,
        "j1.0.1",
        1,
        ObservedPhase::Running { started_at: now },
    );
    env.expect(&[
        "note Info IN_SESSION",
        "n2: welcome [stop j1.0.1 NODE_LOST]",
        "schedule",
    ]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(stopped(0)));
    env.words();
    assert!(
        env.job(1).starts_with("STOPPING"),
        "n2 is back, so its end is waited for: {}",
        env.job(1)
    );
    env.report(2, "j1.0.1", 1, ObservedPhase::Ended(stopped(1)));
    env.words();
    assert!(env.job(1).starts_with("PENDING RETRYING"), "{}", env.job(1));
}

#[test]
fn under_the_policy_wait_only_confirmation_counts() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    let mut spec = job_spec();
    spec.on_disconnect = OnDisconnect::Wait;
    env.start(spec);
    env.run("j1.0.1", &[1]);
    env.cut(node);
    env.pass(minutes(600));
    env.words();
    assert_eq!(
        env.job(1),
        "RUNNING NODE_UNREACHABLE: n1 is not heard of; waits until what runs there is confirmed"
    );
    let now = env.now;
    back(
        &mut env,
        1,
        "j1.0.1",
        0,
        ObservedPhase::Running { started_at: now },
    );
    env.words();
    assert!(env.job(1).starts_with("RUNNING RUNNING"), "{}", env.job(1));
    env.cut(node);
    env.pass(minutes(60));
    confirm(&mut env, 1);
    env.words();
    assert!(env.job(1).starts_with("PENDING RETRYING"), "{}", env.job(1));
}

#[test]
fn a_cancel_waits_for_a_silent_node_and_never_comes_back_to_life() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    env.cut(node);
    env.pass(minutes(1));
    env.cancel(1);
    env.words();
    assert!(
        env.job(1).starts_with("STOPPING CANCEL_REQUESTED"),
        "{}",
        env.job(1)
    );
    env.pass(minutes(20));
    env.words();
    assert!(env.job(1).starts_with("CANCELLED"), "{}", env.job(1));
    // After a restart only the attempt is left, and it is enough to stop what still runs.
    env.restart();
    let now = env.now;
    back(
        &mut env,
        1,
        "j1.0.1",
        0,
        ObservedPhase::Running { started_at: now },
    );
    env.expect(&[
        "note Info IN_SESSION",
        "n1: welcome [stop j1.0.1 CANCEL_REQUESTED]",
        "schedule",
    ]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(stopped(0)));
    env.expect_all(
        &["j1.0.1 ENDED [n1 ENDED]"],
        &["n1: forget j1.0.1", "schedule"],
    );
}

/// A job whose only member ended well and uploads what it wrote, on a node that then falls silent.
fn uploading_on_a_silent_node(policy: OnDisconnect) -> TestEnv {
    let mut env = TestEnv::new();
    let node = env.node(0);
    let mut spec = job_spec();
    spec.on_disconnect = policy;
    env.start(spec);
    env.run("j1.0.1", &[1]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Uploading(completed(0)));
    env.cut(node);
    env.pass(minutes(20));
    env.words();
    env
}

fn warning(env: &TestEnv) -> &str {
    &env.store.attempts[&attempt("j1.0.1")].members[0].warning
}

#[test]
fn uploads_of_a_lost_node_are_not_waited_for_for_ever_and_it_is_said_what_is_missing() {
    let mut env = uploading_on_a_silent_node(OnDisconnect::Replace);
    assert!(env.job(1).starts_with("SUCCEEDED"), "{}", env.job(1));
    let told = "its logs, outputs and checkpoint were not brought in: n1 is not heard of";
    assert_eq!(warning(&env), told);
    // What the node says later changes nothing of a job that is over.
    back(&mut env, 1, "j1.0.1", 0, ObservedPhase::Ended(completed(0)));
    env.expect(&[
        "note Info IN_SESSION",
        "n1: welcome []",
        "n1: forget j1.0.1",
        "schedule",
    ]);
    assert_eq!(warning(&env), told);
}

#[test]
fn only_what_was_not_brought_in_is_said_to_be_missing() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    let mut end = completed(0);
    end.outputs = Some(Digest([7; 32]));
    end.warning = "outputs/fifo is no file".to_owned();
    env.report(1, "j1.0.1", 0, ObservedPhase::Uploading(end));
    env.cut(node);
    env.pass(minutes(20));
    env.words();
    assert_eq!(
        warning(&env),
        "outputs/fifo is no file; its logs and checkpoint were not brought in: n1 is not heard of"
    );
}

#[test]
fn under_the_policy_wait_uploads_are_waited_for() {
    let mut env = uploading_on_a_silent_node(OnDisconnect::Wait);
    env.pass(minutes(600));
    env.words();
    assert_eq!(
        env.job(1),
        "STOPPING NODE_UNREACHABLE: n1 is not heard of; waits until its results are brought in"
    );
    let uploading = ObservedPhase::Uploading(completed(0));
    back(&mut env, 1, "j1.0.1", 0, uploading);
    env.words();
    assert!(
        env.job(1).starts_with("STOPPING UPLOADING"),
        "{}",
        env.job(1)
    );
    let mut end = completed(0);
    end.outputs = Some(Digest([7; 32]));
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(end));
    env.words();
    assert!(env.job(1).starts_with("SUCCEEDED"), "{}", env.job(1));
    let member = &env.store.attempts[&attempt("j1.0.1")].members[0];
    assert_eq!(
        (member.outputs, member.warning.as_str()),
        (Some(Digest([7; 32])), "")
    );
}

#[test]
fn an_operator_who_vouches_for_the_end_of_a_node_ends_uploads_with_a_warning() {
    let mut env = uploading_on_a_silent_node(OnDisconnect::Wait);
    confirm(&mut env, 1);
    env.words();
    assert!(env.job(1).starts_with("SUCCEEDED"), "{}", env.job(1));
    assert_eq!(
        warning(&env),
        "its logs, outputs and checkpoint were not brought in: n1 was confirmed as lost before the exit status was \
         recorded"
    );
}

#[test]
fn each_change_of_a_nodes_availability_is_told_once_with_its_reason() {
    let mut env = TestEnv::new();
    let node = env.node(0); // Whose first session is no return.
    let told = |env: &mut TestEnv| -> Vec<String> {
        let said = std::mem::take(&mut env.said);
        said.into_iter()
            .filter_map(|effect| {
                let Effect::Note(urgency, Some(about), reason) = effect else {
                    return None;
                };
                Some(format!("{urgency:?} {about}: {}", reason.message))
            })
            .collect()
    };
    env.cut(node);
    env.pass(minutes(1));
    let silent = "Warn n1: n1 is not heard of for 30s; what runs there is left alone";
    assert_eq!(told(&mut env), [silent]);
    env.register(node, 0, vec![]);
    assert_eq!(told(&mut env), ["Info n1: n1 is in session"]);
    env.register(node, 0, vec![]);
    assert!(told(&mut env).is_empty());
    env.cut(node);
    env.pass(minutes(60));
    let lost = "Warn n1: n1 is not heard of for 15m; given up";
    assert_eq!(told(&mut env), [silent, lost]);
    env.register(node, 0, vec![]);
    assert_eq!(told(&mut env), ["Info n1: n1 is in session"]);
}

#[test]
fn many_that_fall_silent_at_once_are_not_given_up() {
    let mut env = TestEnv::new();
    let nodes: Vec<NodeId> = (0..5).map(|_| env.node(0)).collect();
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    nodes[..3].iter().for_each(|node| env.cut(*node));
    env.pass(minutes(600));
    let silent = "note Warn SILENT";
    env.expect(&[silent, silent, silent, "note Error SILENT"]);
    assert_eq!(
        crate::mass_loss(env.core.nodes()).as_deref(),
        Some("3 of 5 nodes are silent at once; none of them is given up while that is so")
    );
    assert!(env.job(1).starts_with("RUNNING"), "{}", env.job(1));
    // One is back: the others get a full lease, because they may be on their way.
    env.register(nodes[2], 0, vec![]);
    let back = "note Info IN_SESSION";
    env.expect(&[back, back, "n3: welcome []", "schedule"]);
    assert_eq!(crate::mass_loss(env.core.nodes()), None);
    env.pass(minutes(14));
    env.expect(&[]);
    env.pass(minutes(1));
    let lost = "note Warn NODE_LOST";
    env.expect(&[lost, lost, "schedule"]);
    assert!(env.job(1).starts_with("PENDING RETRYING"), "{}", env.job(1));
}

#[test]
fn half_of_a_small_cluster_is_no_crowd() {
    let mut env = TestEnv::new();
    let nodes: Vec<NodeId> = (0..2).map(|_| env.node(0)).collect();
    nodes.iter().for_each(|node| env.cut(*node));
    env.pass(minutes(15));
    env.expect_all(
        &[
            "n1 READY ACTIVE SUSPECT",
            "n2 READY ACTIVE SUSPECT",
            "n1 UNREACHABLE ACTIVE SILENT",
            "n2 UNREACHABLE ACTIVE SILENT",
            "n1 LOST ACTIVE NODE_LOST",
            "n2 LOST ACTIVE NODE_LOST",
        ],
        &[
            "note Warn SILENT",
            "note Warn SILENT",
            "note Warn NODE_LOST",
            "note Warn NODE_LOST",
            "schedule",
        ],
    );
}

#[test]
fn our_own_pause_is_nobodys_fault() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(job_spec());
    env.now = env.now.after(minutes(30));
    env.event(Event::TimerFired);
    env.expect_all(&[], &[]);
}

#[test]
fn our_own_downtime_is_nobodys_fault() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    env.now = env.now.after(minutes(600));
    env.restart();
    env.event(Event::TimerFired);
    env.pass(minutes(14));
    env.expect_all(
        &["n1 READY ACTIVE SUSPECT", "n1 UNREACHABLE ACTIVE SILENT"],
        &["note Warn SILENT"],
    );
    assert!(env.job(1).starts_with("RUNNING"), "{}", env.job(1));
    env.pass(minutes(1));
    env.words();
    assert!(env.job(1).starts_with("PENDING"), "{}", env.job(1));
}

#[test]
fn a_pause_of_ours_is_no_silence_of_a_node_that_was_silent_before() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    env.cut(node);
    env.pass(minutes(1));
    env.changes();
    env.expect(&["note Warn SILENT"]);
    env.now = env.now.after(minutes(13));
    env.core.stood_still(env.now, minutes(13));
    env.pass(minutes(13));
    env.expect_all(&[], &[]);
    env.pass(minutes(1));
    env.words();
    assert!(env.job(1).starts_with("PENDING"), "{}", env.job(1));
}

#[test]
fn a_wall_clock_that_went_back_between_two_starts_ends_nobody() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    env.start(job_spec());
    env.now = Timestamp(env.now.0 - 600_000);
    env.restart();
    env.register(node, 0, vec![]);
    env.run("j1.0.1", &[1]);
    env.words();
    env.changes();
    env.pass(minutes(60));
    env.expect_all(&[], &[]);
    assert!(env.job(1).starts_with("RUNNING"), "{}", env.job(1));
}

#[test]
fn an_attempt_that_is_never_ready_is_tried_elsewhere() {
    let mut env = TestEnv::new();
    env.node(4);
    env.node(4);
    env.start(gpu_spec(2, 4));
    env.report(1, "j1.0.1", 0, ObservedPhase::Ready { port: 1 });
    env.pass(minutes(15));
    env.expect(&[
        "n1: stop j1.0.1 PREPARE_TIMEOUT",
        "n2: stop j1.0.1 PREPARE_TIMEOUT",
    ]);
    assert_eq!(
        env.job(1),
        "STOPPING PREPARE_TIMEOUT: 1 of 2 nodes not ready within 15m: n2"
    );
    // Once told to go there is no such limit.
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(stopped(0)));
    env.report(2, "j1.0.1", 1, ObservedPhase::Ended(stopped(1)));
    env.schedule();
    env.run("j1.0.2", &[1, 2]);
    env.pass(minutes(60));
    env.expect(&[]);
}

#[test]
fn what_a_silent_node_prepared_or_started_meanwhile_is_left_to_the_policy() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    let mut spec = job_spec();
    spec.on_disconnect = OnDisconnect::Wait;
    env.start(spec);
    env.cut(node);
    env.pass(env.config.prepare_timeout * 2);
    env.words();
    assert!(env.job(1).starts_with("PREPARING"), "{}", env.job(1));
    // It had begun without a word that reached us, and goes on.
    let started_at = env.now;
    back(
        &mut env,
        1,
        "j1.0.1",
        0,
        ObservedPhase::Running { started_at },
    );
    env.pass(minutes(60));
    env.words();
    assert!(env.job(1).starts_with("RUNNING"), "{}", env.job(1));
}

#[test]
fn a_node_that_is_back_and_never_ready_is_not_waited_for() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    let mut spec = job_spec();
    spec.on_disconnect = OnDisconnect::Wait;
    env.start(spec);
    env.cut(node);
    env.pass(env.config.prepare_timeout * 2);
    env.words();
    back(&mut env, 1, "j1.0.1", 0, ObservedPhase::Preparing);
    env.words();
    env.pass(env.config.prepare_timeout);
    env.expect(&["n1: stop j1.0.1 PREPARE_TIMEOUT"]);
}

#[test]
fn a_cordoned_node_takes_nothing_new_until_it_is_active_again() {
    let mut env = TestEnv::new();
    env.node(0);
    let set = |env: &mut TestEnv, policy| {
        let key = env.key();
        env.event(Event::NodePolicySet {
            key,
            node: NodeId(1),
            policy,
            by: user("root"),
        });
    };
    set(&mut env, NodePolicy::Cordoned);
    env.expect_all(&["n1 READY CORDONED OPERATOR"], &["done", "schedule"]);
    set(&mut env, NodePolicy::Cordoned);
    env.expect_all(&[], &["done"]);
    env.start(job_spec());
    assert_eq!(
        env.job(1),
        "PENDING OPERATOR: needs 1 node with 1 CPU; what could hold it takes no new work: n1 is cordoned"
    );
    set(&mut env, NodePolicy::Active);
    env.schedule();
    env.expect(&["done", "schedule", "n1: start j1.0.1"]);
}

#[test]
fn a_node_in_use_is_not_removed_unless_it_is_confirmed_lost() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    remove(&mut env, 1);
    env.expect_all(&[], &["refused FAILED_PRECONDITION NODE_IN_USE"]);
    confirm(&mut env, 1);
    env.expect_all(&[], &["refused FAILED_PRECONDITION NODE_REACHABLE"]);
    // Its session may be back any moment, with everything that runs there.
    env.cut(node);
    confirm(&mut env, 1);
    env.expect_all(&[], &["refused FAILED_PRECONDITION NODE_REACHABLE"]);
    env.pass(Duration::from_secs(30));
    env.words();
    env.changes();
    confirm(&mut env, 1);
    env.expect_all(
        &[
            "n1 LOST ACTIVE OPERATOR",
            "j1 PENDING RETRYING",
            "j1.0 PENDING RETRYING",
            "j1.0.1 ENDED [n1 ENDED]",
        ],
        &["note Warn OPERATOR", "done", "schedule"],
    );
    remove(&mut env, 1);
    env.expect_all(&["n1 removed"], &["done", "schedule"]);
    remove(&mut env, 1);
    env.expect_all(&[], &["refused NOT_FOUND NODE_UNKNOWN"]);
    // Its number is never used again.
    assert_eq!(env.enrol(), NodeId(2));
}

#[test]
fn a_node_that_is_back_cannot_be_confirmed_lost_any_more() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    env.cut(node);
    env.pass(minutes(20));
    env.words();
    env.register(node, 0, vec![]);
    env.words();
    confirm(&mut env, 1);
    let [refused] = &env.words()[..] else {
        panic!("one refusal");
    };
    assert_eq!(refused, "refused FAILED_PRECONDITION NODE_REACHABLE");
}

#[test]
fn a_suspect_gets_no_new_work_until_it_is_heard_of() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    env.changes();
    // Its connection is half open: nobody has noticed that its machine is off.
    let session = env.session(node);
    env.silence(node);
    env.pass(Duration::from_secs(16));
    env.expect_all(&["n1 READY ACTIVE SUSPECT"], &[]);
    env.start(job_spec());
    assert_eq!(
        env.job(1),
        "PENDING NODE_UNREACHABLE: needs 1 node with 1 CPU; what could hold it takes no new work: n1 is not heard of \
         for a while"
    );
    env.changes();
    env.event(Event::HeartbeatReceived { session, node });
    env.expect_all(&["n1 READY ACTIVE IN_SESSION"], &["schedule"]);
    env.schedule();
    // The test's own book has no session of the node.
    env.expect(&["s1: start j1.0.1"]);
}

#[test]
fn removing_a_node_ends_its_session() {
    let mut env = TestEnv::new();
    env.node(0);
    remove(&mut env, 1);
    env.expect_all(
        &["n1 removed"],
        &["close s1 NODE_UNKNOWN", "done", "schedule"],
    );
    assert_eq!(env.core.next_deadline(), None::<Timestamp>);
}
