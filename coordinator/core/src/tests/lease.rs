//! The policy `stop`: what a node is told, and that nothing takes an attempt's place before its node has ended it.

use std::time::Duration;

use trainyard_common::member::{EndCause, ObservedMember, ObservedPhase};
use trainyard_common::spec::{Array, JobSpec, OnDisconnect};
use trainyard_common::state::{AttemptState, ExitStatus};

use crate::effect::{Command, Effect};
use crate::event::Event;
use crate::testing::{TestEnv, attempt, ending, gpu_spec, job_spec, stopped};

const fn minutes(minutes: u64) -> Duration {
    Duration::from_secs(60 * minutes)
}

const MILLI: Duration = Duration::from_millis(1);

fn under_stop(mut spec: JobSpec) -> JobSpec {
    spec.on_disconnect = OnDisconnect::Stop;
    spec
}

/// When an attempt with a lease of so many minutes, a grace of 30 s and a margin of 30 s is given up.
fn given_up_after(lease: u64) -> Duration {
    let told = minutes(lease) + Duration::from_secs(30);
    let waited = told * 105 / 95 + Duration::from_secs(30);
    Duration::from_millis(u64::try_from(waited.as_millis()).unwrap() + 1)
}

/// The leases that members are told.
fn leases(env: &TestEnv) -> Vec<Option<Duration>> {
    let desired = |effect: &Effect| {
        if let Effect::Send(_, Command::Desire(member)) = effect {
            return Some(member.spec.lease);
        }
        None
    };
    env.said.iter().filter_map(desired).collect()
}

#[test]
fn members_are_told_the_lease_of_their_size_and_only_under_this_policy() {
    let mut env = TestEnv::new();
    env.node(4);
    env.node(4);
    let mut told = |request: &str, spec| {
        env.submit("anna", request, spec);
        env.schedule();
        let leases = leases(&env);
        env.words();
        leases
    };
    assert_eq!(told("one", under_stop(gpu_spec(1, 1))), [Some(minutes(15))]);
    assert_eq!(
        told("two", under_stop(gpu_spec(2, 1))),
        [Some(minutes(3)); 2]
    );
    assert_eq!(told("three", gpu_spec(1, 1)), [None]);
    env.words();
}

#[test]
fn an_attempt_is_replaced_only_when_its_node_must_have_ended_it() {
    let mut env = TestEnv::new();
    let first = env.node(4);
    env.start(under_stop(gpu_spec(1, 4)));
    env.run("j1.0.1", &[1]);
    env.node(4);
    env.cut(first);
    let after = given_up_after(15);
    env.pass(after - MILLI);
    env.words();
    assert!(env.job(1).starts_with("RUNNING"), "{}", env.job(1));
    env.pass(MILLI);
    assert_eq!(
        env.job(1),
        "PENDING RETRYING: attempt 1: lease over on n1; tried again, interruption 1 of 5"
    );
    env.schedule();
    env.words();
    assert_eq!(
        env.core.attempt(attempt("j1.0.1")).unwrap().state,
        AttemptState::Lost
    );
    // Its place is held until its node says so itself.
    assert_eq!(env.core.t.usage[&first].amounts.gpus, 4);
    let member = ObservedMember {
        attempt: attempt("j1.0.1"),
        node_rank: 0,
        phase: ObservedPhase::Ended(ending(EndCause::LeaseExpired, 0, &[ExitStatus::Signal(15)])),
    };
    env.register(first, 4, vec![member]);
    env.words();
    assert!(!env.core.t.usage.contains_key(&first));
    assert!(env.job(1).starts_with("PREPARING"), "{}", env.job(1));
    env.words();
}

#[test]
fn a_gang_is_waited_for_member_by_member() {
    let mut env = TestEnv::new();
    env.node(4);
    let second = env.node(4);
    env.start(under_stop(gpu_spec(2, 4)));
    env.run("j1.0.1", &[1, 2]);
    env.cut(second);
    env.pass(given_up_after(3) - MILLI);
    assert!(env.job(1).starts_with("RUNNING"), "{}", env.job(1));
    env.pass(MILLI);
    assert_eq!(env.job(1), "STOPPING LEASE_EXPIRED: lease over on n2");
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(stopped(0)));
    assert!(env.job(1).starts_with("PENDING RETRYING"), "{}", env.job(1));
    env.words();
}

#[test]
fn a_lease_that_ran_out_is_an_interruption_and_takes_no_retry() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    let mut spec = under_stop(job_spec());
    spec.retries = 0;
    env.start(spec);
    env.run("j1.0.1", &[1]);
    let end = ending(EndCause::LeaseExpired, 0, &[ExitStatus::Signal(15)]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(end));
    let job = env.job(1);
    assert!(
        job.starts_with("PENDING RETRYING")
            && job.contains("lost the coordinator for longer than the lease on n1"),
        "{job}"
    );
    env.schedule();
    env.run("j1.0.2", &[1]);
    assert!(env.core.live.sessions.contains_key(&node));
    assert!(env.job(1).starts_with("RUNNING"), "{}", env.job(1));
    env.words();
}

#[test]
fn the_lease_that_was_told_counts_whatever_the_configuration_says_later() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    env.start(under_stop(job_spec()));
    env.run("j1.0.1", &[1]);
    env.config.lost_after = minutes(1);
    env.restart();
    env.register(
        node,
        0,
        vec![ObservedMember {
            attempt: attempt("j1.0.1"),
            node_rank: 0,
            phase: ObservedPhase::Running {
                started_at: env.now,
            },
        }],
    );
    env.cut(node);
    env.pass(given_up_after(15) - MILLI);
    assert!(env.job(1).starts_with("RUNNING"), "{}", env.job(1));
    env.pass(MILLI);
    assert!(env.job(1).starts_with("PENDING RETRYING"), "{}", env.job(1));
    env.words();
}

#[test]
fn our_own_pause_and_downtime_lengthen_the_wait() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    env.start(under_stop(job_spec()));
    env.run("j1.0.1", &[1]);
    env.cut(node);
    env.pass(minutes(1));
    env.now = env.now.after(minutes(13));
    env.core.stood_still(env.now, minutes(13));
    env.pass(minutes(5));
    assert!(env.job(1).starts_with("RUNNING"), "{}", env.job(1));
    env.restart();
    env.event(Event::TimerFired);
    env.pass(given_up_after(15) - MILLI);
    assert!(env.job(1).starts_with("RUNNING"), "{}", env.job(1));
    env.pass(MILLI);
    assert!(env.job(1).starts_with("PENDING RETRYING"), "{}", env.job(1));
    env.words();
}

#[test]
fn its_arrays_go_in_no_bundle() {
    let mut env = TestEnv::new();
    env.node(0);
    let mut spec = under_stop(job_spec());
    spec.array = Some(Array {
        first: 0,
        last: 3,
        max_running: None,
    });
    env.submit("anna", "array", spec);
    env.schedule();
    assert_eq!(env.core.bundles().count(), 0);
    assert!(!leases(&env).is_empty());
    assert!(leases(&env).iter().all(Option::is_some));
    env.words();
}
