//! The first time after a restored backup.

use std::time::Duration;

use trainyard_common::ids::NodeId;
use trainyard_common::member::{ObservedMember, ObservedPhase};

use crate::testing::{TestEnv, attempt, completed, job_spec};
use crate::{Core, Snapshot};

/// Two ready nodes and a job that waits, as a backup holds them.
fn restored() -> TestEnv {
    let mut env = TestEnv::new();
    env.node(0);
    env.node(0);
    env.submit("alice", "r1", job_spec());
    let snapshot = Snapshot {
        awaited: [NodeId(1), NodeId(2)].into(),
        ..env.store.snapshot()
    };
    env.restart();
    env.core = Core::new(env.config.clone(), snapshot, env.now);
    env
}

fn waits(env: &mut TestEnv) -> bool {
    env.schedule();
    env.words();
    env.job(1).starts_with("PENDING")
}

#[test]
fn nothing_is_placed_until_every_ready_node_of_the_backup_said_what_it_runs() {
    let mut env = restored();
    assert!(!env.core.is_reconciled());
    env.register(NodeId(1), 0, vec![]);
    assert!(waits(&mut env));
    assert!(
        env.job(1).contains("nodes of the restored state"),
        "{}",
        env.job(1)
    );
    env.register(NodeId(2), 0, vec![]);
    assert!(env.core.is_reconciled());
    assert!(!waits(&mut env));
}

#[test]
fn a_node_that_does_not_come_back_is_waited_for_as_long_as_a_silent_one() {
    let mut env = restored();
    env.register(NodeId(1), 0, vec![]);
    let lost_after = env.config.lost_after;
    env.pass(lost_after - Duration::from_secs(1));
    assert!(waits(&mut env));
    env.pass(Duration::from_secs(1));
    assert!(env.core.is_reconciled());
    assert!(!waits(&mut env));
}

#[test]
fn a_pause_of_our_own_is_no_time_in_which_a_node_could_speak() {
    let mut env = restored();
    env.register(NodeId(1), 0, vec![]);
    let lost_after = env.config.lost_after;
    env.pass(lost_after - Duration::from_secs(1));
    env.now = env.now.after(lost_after);
    env.core.stood_still(env.now, lost_after);
    assert!(waits(&mut env));
    env.pass(Duration::from_secs(1));
    assert!(!waits(&mut env));
}

#[test]
fn a_start_waits_again_while_only_a_node_knows_the_number_of_an_attempt() {
    let mut env = restored();
    let newer = ObservedMember {
        attempt: attempt("j1.0.3"),
        node_rank: 0,
        phase: ObservedPhase::Ended(completed(0)),
    };
    env.register(NodeId(1), 0, vec![newer]);
    env.register(NodeId(2), 0, vec![]);
    assert!(
        !env.core.is_reconciled(),
        "a start would give number 1 to the next attempt"
    );
    assert!(!waits(&mut env));
    assert!(env.core.is_reconciled(), "{}", env.job(1));
}
