//! Nodes that cannot prepare: they pause, are tried one member at a time, and are named.

use std::time::Duration;

use trainyard_common::ids::NodeId;
use trainyard_common::member::{EndCause, Ending, ObservedPhase};
use trainyard_common::spec::JobSpec;

use crate::testing::{TestEnv, attempt, ending, gpu_spec, job_spec};
use crate::trouble::Troubles;

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn disk_full() -> Ending {
    let mut end = ending(EndCause::PrepareFailed, 0, &[]);
    end.message = "disk full".to_owned();
    end
}

/// Submits without a round of scheduling.
fn submit(env: &mut TestEnv, number: u32, spec: JobSpec) {
    env.submit("alice", &format!("r{number}"), spec);
    env.words();
}

fn schedule(env: &mut TestEnv) -> Vec<String> {
    env.schedule();
    env.words()
}

fn fails(env: &mut TestEnv, node: u32, id: &str) {
    env.report(node, id, 0, ObservedPhase::Ended(disk_full()));
    env.words();
}

#[test]
fn other_jobs_go_elsewhere_after_a_failure_on_a_node() {
    let mut env = TestEnv::new();
    env.node(0);
    env.node(0);
    env.start(job_spec());
    fails(&mut env, 1, "j1.0.1");
    for number in 2..=4 {
        submit(&mut env, number, job_spec());
    }
    assert_eq!(
        schedule(&mut env),
        [
            "n2: start j1.0.2",
            "n2: start j2.0.1",
            "n2: start j3.0.1",
            "n2: start j4.0.1"
        ]
    );
    // Also once the pause is over, as long as there is room elsewhere.
    env.pass(seconds(6));
    env.words();
    submit(&mut env, 5, job_spec());
    assert_eq!(schedule(&mut env), ["n2: start j5.0.1"]);
}

#[test]
fn what_fits_only_there_is_tried_at_the_pace_of_the_node_and_says_so() {
    let mut env = TestEnv::new();
    env.node(4);
    env.node(0);
    for number in 1..=4 {
        submit(&mut env, number, gpu_spec(1, 1));
    }
    // All are placed at once, and that they fail together counts once.
    assert_eq!(schedule(&mut env).len(), 4);
    for number in 1..=4 {
        fails(&mut env, 1, &format!("j{number}.0.1"));
    }
    assert!(schedule(&mut env).is_empty());
    assert_eq!(
        env.job(1),
        "PENDING PREPARE_FAILED: needs 1 node with 1 GPU and 1 CPU; what could hold it takes no new work: n1 could not \
         prepare lately (disk full), tried again within 5s"
    );
    // It holds up nobody who needs less.
    env.start(job_spec());
    assert_eq!(
        env.store.attempts[&attempt("j5.0.1")].members[0].node,
        NodeId(2)
    );
    env.pass(seconds(4));
    assert!(schedule(&mut env).is_empty());
    env.pass(seconds(1));
    env.expect(&["schedule"]);
    assert_eq!(schedule(&mut env), ["n1: start j1.0.2"], "one at a time");
    assert!(schedule(&mut env).is_empty());
    fails(&mut env, 1, "j1.0.2");
    schedule(&mut env);
    assert!(
        env.job(2).ends_with("(disk full), tried again within 10s"),
        "{}",
        env.job(2)
    );
    env.pass(seconds(9));
    env.words();
    assert!(schedule(&mut env).is_empty());
    env.pass(seconds(1));
    env.words();
    let tried = schedule(&mut env);
    assert_eq!(tried, ["n1: start j1.0.3"]);
    // One that is prepared there is enough for all.
    env.report(1, "j1.0.3", 0, ObservedPhase::Ready { port: 1 });
    assert!(env.words().contains(&"schedule".to_owned()));
    assert_eq!(
        schedule(&mut env),
        ["n1: start j2.0.2", "n1: start j3.0.2", "n1: start j4.0.2"]
    );
}

#[test]
fn a_node_that_pauses_is_named_beside_those_that_are_full() {
    let mut env = TestEnv::new();
    env.node(2);
    env.node(2);
    env.start(gpu_spec(1, 2));
    env.start(gpu_spec(1, 2));
    env.run("j2.0.1", &[2]);
    fails(&mut env, 1, "j1.0.1");
    schedule(&mut env);
    assert_eq!(
        env.job(1),
        "PENDING INSUFFICIENT_FREE: needs 1 node with 2 GPUs and 1 CPU; 0 of 1 suitable node free enough now; n2 has 0 \
         of 2 GPUs free; n1 could not prepare lately (disk full), tried again within 5s"
    );
}

#[test]
fn a_removed_node_leaves_no_timer() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(job_spec());
    fails(&mut env, 1, "j1.0.1");
    env.cancel(1);
    let key = env.key();
    env.event(crate::event::Event::NodeRemoved {
        key,
        node: NodeId(1),
    });
    env.words();
    assert_eq!(env.core.next_deadline(), None);
}

#[test]
fn pauses_double_to_five_minutes_and_what_is_old_is_forgotten() {
    let (mut troubles, node) = (Troubles::default(), NodeId(3));
    let mut now = trainyard_common::time::Timestamp(1000);
    let mut pauses = Vec::new();
    for _ in 0..8 {
        troubles.failed(now, node, "");
        let told = troubles.told(now, node).unwrap();
        pauses.push(told.rsplit_once("within ").unwrap().1.to_owned());
        now = troubles.next().unwrap();
        assert!(troubles.pauses(trainyard_common::time::Timestamp(now.0 - 1), node));
        assert!(troubles.take_ended(now) && !troubles.take_ended(now));
        assert!(!troubles.pauses(now, node) && troubles.is_on_trial(now, node));
    }
    assert_eq!(
        pauses,
        ["5s", "10s", "20s", "40s", "1m 20s", "2m 40s", "5m", "5m"]
    );
    now = now.after(seconds(300));
    assert!(!troubles.is_on_trial(now, node));
    troubles.failed(now, node, "");
    assert_eq!(
        troubles.told(now, node).unwrap(),
        "n3 could not prepare lately, tried again within 5s"
    );
    assert_eq!(troubles.check(), None);
}
