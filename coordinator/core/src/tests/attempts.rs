//! The life of attempts and what follows for their tasks.

use std::time::Duration;

use trainyard_common::ids::{Digest, JobId, TaskIndex};
use trainyard_common::member::{EndCause, ObservedPhase};
use trainyard_common::spec::{JobSpec, Launcher};
use trainyard_common::state::{ExitStatus, Outcome};
use trainyard_common::time::Timestamp;

use crate::Config;
use crate::gang;
use crate::testing::{TestEnv, attempt, completed, ending, gpu_spec, job_spec, stopped};

fn failed(rank: u32, code: u8) -> ObservedPhase {
    ObservedPhase::Ended(ending(
        EndCause::RankFailed,
        rank,
        &[ExitStatus::Code(code)],
    ))
}

fn with_retries(retries: u32) -> JobSpec {
    let mut spec = job_spec();
    spec.retries = retries;
    spec
}

#[test]
fn the_whole_life_of_a_job() {
    let mut env = TestEnv::new();
    env.node(1);
    env.submit("alice", "r1", gpu_spec(1, 1));
    env.words();
    env.schedule();
    env.expect_all(
        &[
            "j1 PREPARING PLACED",
            "j1.0 PREPARING PLACED",
            "j1.0.1 PLACED [n1 UNCONFIRMED]",
        ],
        &["n1: start j1.0.1"],
    );
    env.report(1, "j1.0.1", 0, ObservedPhase::Preparing);
    env.expect_all(&["j1.0.1 PREPARING [n1 PREPARING]"], &[]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ready { port: 4711 });
    env.expect_all(
        &["j1.0.1 READY [n1 READY]"],
        &["n1: run j1.0.1 at 127.0.0.1:4711"],
    );
    env.report(
        1,
        "j1.0.1",
        0,
        ObservedPhase::Running {
            started_at: env.now,
        },
    );
    env.expect_all(
        &[
            "j1 RUNNING RUNNING",
            "j1.0 RUNNING RUNNING",
            "j1.0.1 RUNNING [n1 RUNNING]",
        ],
        &[],
    );
    env.report(1, "j1.0.1", 0, ObservedPhase::Uploading(completed(0)));
    env.expect_all(
        &[
            "j1 STOPPING UPLOADING",
            "j1.0 STOPPING UPLOADING",
            "j1.0.1 STOPPING [n1 UPLOADING]",
        ],
        &["schedule"],
    );
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(completed(0)));
    env.expect_all(
        &[
            "j1 SUCCEEDED COMPLETED",
            "j1.0 SUCCEEDED COMPLETED",
            "j1.0.1 ENDED [n1 ENDED]",
        ],
        &["n1: forget j1.0.1", "schedule"],
    );
    let job = &env.store.jobs[&JobId(1)];
    assert_eq!(job.exit, Some(ExitStatus::Code(0)));
    assert_eq!(
        (job.started_at, job.ended_at),
        (Some(env.now), Some(env.now))
    );
    assert!(env.core.t.usage.is_empty());
}

#[test]
fn an_end_that_is_heard_of_late_counts_from_when_it_was() {
    let late = |ends: [u64; 2]| {
        let mut env = TestEnv::new();
        env.node(0);
        env.node(0);
        env.start(gpu_spec(2, 0));
        env.run("j1.0.1", &[1, 2]);
        let started = env.now;
        // Nobody listens while it ends.
        env.now = started.after(Duration::from_secs(3600));
        for (rank, end) in (0..).zip(ends) {
            let mut ending = completed(rank);
            ending.ranks[0].at = Timestamp(started.0 + end);
            env.report(rank + 1, "j1.0.1", rank, ObservedPhase::Ended(ending));
        }
        env.words();
        let attempt = &env.store.attempts[&attempt("j1.0.1")];
        let (task, job) = (
            &env.store.tasks[&(JobId(1), TaskIndex(0))],
            &env.store.jobs[&JobId(1)],
        );
        assert_eq!([attempt.ended_at, task.ended_at], [job.ended_at; 2]);
        assert_eq!(job.started_at, Some(started));
        job.ended_at.unwrap().since(started)
    };
    assert_eq!(
        late([5000, 7000]),
        Duration::from_secs(7),
        "the last rank of all"
    );
    // A clock that is wrong moves nothing beyond what we know ourselves.
    assert_eq!(late([5000, 9_000_000]), Duration::from_secs(3600));
    let mut env = TestEnv::new();
    env.node(0);
    env.start(gpu_spec(1, 0));
    env.run("j1.0.1", &[1]);
    let mut early = completed(0);
    early.ranks[0].at = Timestamp(1);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(early));
    env.words();
    let job = &env.store.jobs[&JobId(1)];
    assert_eq!(job.ended_at, job.started_at);
}

#[test]
fn the_only_member_of_a_gang_may_run_without_ever_being_ready() {
    let mut env = TestEnv::new();
    env.node(1);
    env.submit("alice", "r1", gpu_spec(1, 1));
    env.schedule();
    env.words();
    env.changes();
    let started_at = env.now;
    env.report(1, "j1.0.1", 0, ObservedPhase::Running { started_at });
    env.expect_all(
        &[
            "j1 RUNNING RUNNING",
            "j1.0 RUNNING RUNNING",
            "j1.0.1 RUNNING [n1 RUNNING]",
        ],
        &[],
    );
    // It is late no more, and an agent without orders is told the same again.
    env.pass(Config::default().prepare_timeout * 2);
    env.expect_all(&[], &[]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ready { port: 4711 });
    env.expect_all(&[], &[]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(completed(0)));
    env.expect(&["n1: forget j1.0.1", "schedule"]);
    assert!(env.job(1).starts_with("SUCCEEDED"), "{}", env.job(1));
}

#[test]
fn a_gang_goes_when_all_its_members_are_ready() {
    let mut env = TestEnv::new();
    env.node(4);
    env.node(4);
    env.submit("alice", "r1", gpu_spec(2, 4));
    env.schedule();
    env.expect(&[
        "submitted j1",
        "schedule",
        "n1: prepare j1.0.1",
        "n2: prepare j1.0.1",
    ]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ready { port: 40 });
    env.expect(&[]);
    env.report(2, "j1.0.1", 1, ObservedPhase::Ready { port: 50 });
    env.expect(&[
        "n1: run j1.0.1 at 10.0.0.1:40",
        "n2: run j1.0.1 at 10.0.0.1:40",
    ]);
    // Said again, or late, it changes nothing.
    env.report(2, "j1.0.1", 1, ObservedPhase::Ready { port: 50 });
    env.report(1, "j1.0.1", 0, ObservedPhase::Preparing);
    env.expect_all(&[], &[]);
}

#[test]
fn a_gang_does_not_go_while_a_member_is_being_ended() {
    let mut env = TestEnv::new();
    env.node(4);
    env.node(4);
    env.submit("alice", "r1", gpu_spec(2, 4));
    env.schedule();
    env.words();
    // It could not be prepared, and what there is of it is not gone yet.
    env.report(2, "j1.0.1", 1, ObservedPhase::Stopping);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ready { port: 40 });
    env.expect(&[]);
    let failed = ObservedPhase::Ended(ending(EndCause::PrepareFailed, 1, &[]));
    env.report(2, "j1.0.1", 1, failed);
    let words = env.words();
    assert!(
        words.iter().any(|word| word.starts_with("n1: stop j1.0.1")),
        "{words:?}"
    );
}

#[test]
fn members_that_end_well_do_not_end_the_others() {
    let mut env = TestEnv::new();
    env.node(0);
    env.node(0);
    env.start(gpu_spec(2, 0));
    env.run("j1.0.1", &[1, 2]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(completed(0)));
    env.expect(&["schedule"]);
    assert!(env.job(1).starts_with("RUNNING"), "{}", env.job(1));
    env.report(2, "j1.0.1", 1, ObservedPhase::Ended(completed(1)));
    env.expect(&["n1: forget j1.0.1", "n2: forget j1.0.1", "schedule"]);
    assert!(env.job(1).starts_with("SUCCEEDED"), "{}", env.job(1));
}

#[test]
fn the_first_rank_that_fails_ends_the_gang() {
    let mut env = TestEnv::new();
    env.node(0);
    env.node(0);
    env.start(gpu_spec(2, 0));
    env.run("j1.0.1", &[1, 2]);
    env.report(2, "j1.0.1", 1, failed(1, 9));
    env.expect_all(
        &[
            "j1 STOPPING RANK_EXITED",
            "j1.0 STOPPING RANK_EXITED",
            "j1.0.1 STOPPING [n1 RUNNING, n2 ENDED]",
        ],
        &["n1: stop j1.0.1 GANG_ENDED", "schedule"],
    );
    // The first decision stands, whatever the other member says.
    env.report(1, "j1.0.1", 0, failed(0, 4));
    env.words();
    assert_eq!(env.job(1), "FAILED RANK_EXITED: rank 1 on n2 exited with 9");
    let row = &env.store.attempts[&attempt("j1.0.1")];
    assert_eq!(
        (row.failed_rank, row.exit),
        (Some(1), Some(ExitStatus::Code(9)))
    );
    // What comes after the end is answered, and changes nothing.
    env.report(
        1,
        "j1.0.1",
        0,
        ObservedPhase::Running {
            started_at: env.now,
        },
    );
    env.expect_all(&[], &["n1: stop j1.0.1 NODE_LOST"]);
}

#[test]
fn the_earliest_rank_that_failed_by_itself_is_blamed() {
    let mut env = TestEnv::new();
    env.node(0);
    let mut spec = job_spec();
    spec.procs_per_node = 4;
    env.start(spec);
    env.run("j1.0.1", &[1]);
    let exits = [
        ExitStatus::Code(0),
        ExitStatus::Signal(15),
        ExitStatus::Code(7),
        ExitStatus::Signal(11),
    ];
    let mut end = ending(EndCause::RankFailed, 0, &exits);
    end.ranks[1].unprompted = false;
    end.ranks[1].at = Timestamp(1);
    end.ranks[2].at = Timestamp(4);
    end.ranks[3].at = Timestamp(3);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(end));
    env.words();
    assert_eq!(
        env.job(1),
        "FAILED RANK_SIGNALLED: rank 3 on n1 was ended by signal 11"
    );
    assert_eq!(env.store.jobs[&JobId(1)].exit.unwrap().exit_code(), 139);
}

#[test]
fn want_of_memory_is_told_as_such() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    let mut end = ending(EndCause::RankFailed, 0, &[ExitStatus::Signal(9)]);
    end.ranks[0].oom_killed = true;
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(end));
    env.words();
    assert_eq!(
        env.job(1),
        "FAILED OOM_KILLED: rank 0 on n1 was killed for want of memory"
    );
}

#[test]
fn a_missing_exit_status_is_never_success() {
    let cases: [&[ExitStatus]; 4] = [
        &[],
        &[ExitStatus::Code(0)],
        &[ExitStatus::Code(0), ExitStatus::Unknown],
        &[
            ExitStatus::Code(0),
            ExitStatus::Code(0),
            ExitStatus::Code(0),
        ],
    ];
    for exits in cases {
        let mut env = TestEnv::new();
        env.node(0);
        let mut spec = job_spec();
        spec.procs_per_node = 2;
        env.start(spec);
        env.run("j1.0.1", &[1]);
        env.report(
            1,
            "j1.0.1",
            0,
            ObservedPhase::Ended(ending(EndCause::Completed, 0, exits)),
        );
        env.words();
        let row = &env.store.attempts[&attempt("j1.0.1")];
        assert_eq!(row.outcome, Some(Outcome::Interrupted), "{exits:?}");
    }
}

#[test]
fn the_rank_that_speaks_for_a_node_is_enough_under_torchrun() {
    let mut env = TestEnv::new();
    env.node(0);
    let mut spec = job_spec();
    spec.procs_per_node = 4;
    spec.launcher = Launcher::Torchrun;
    env.start(spec);
    env.run("j1.0.1", &[1]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(completed(0)));
    env.words();
    assert!(env.job(1).starts_with("SUCCEEDED"), "{}", env.job(1));
}

#[test]
fn retries_are_for_failures_of_the_job() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(with_retries(1));
    env.run("j1.0.1", &[1]);
    env.report(1, "j1.0.1", 0, failed(0, 1));
    env.expect(&["n1: forget j1.0.1", "schedule"]);
    assert_eq!(
        env.job(1),
        "PENDING RETRYING: attempt 1: rank 0 on n1 exited with 1; retry 1 of 1"
    );
    env.schedule();
    env.expect(&["n1: start j1.0.2"]);
    env.run("j1.0.2", &[1]);
    // A late word of the first attempt is none of the second's.
    env.report(1, "j1.0.1", 0, failed(0, 3));
    env.expect_all(&[], &["n1: forget j1.0.1"]);
    env.report(1, "j1.0.2", 0, failed(0, 2));
    env.words();
    assert_eq!(env.job(1), "FAILED RANK_EXITED: rank 0 on n1 exited with 2");
}

#[test]
fn failures_of_the_infrastructure_use_up_no_retry_and_give_up_in_the_end() {
    let config = Config {
        max_infrastructure_failures: 3,
        ..Config::default()
    };
    let mut env = TestEnv::with(config);
    env.node(0);
    env.start(with_retries(0));
    for number in 1..=3 {
        assert!(
            env.job(1).starts_with("PREPARING"),
            "{number}: {}",
            env.job(1)
        );
        let id = format!("j1.0.{number}");
        env.report(
            1,
            &id,
            0,
            ObservedPhase::Ended(ending(EndCause::PrepareFailed, 0, &[])),
        );
        env.pass(Duration::from_secs(10));
        env.schedule();
        env.words();
    }
    assert_eq!(
        env.job(1),
        "FAILED INFRASTRUCTURE_GAVE_UP: given up after 3 interrupted attempts in a row; the last one: could not \
         prepare on n1"
    );
    assert_eq!(env.store.jobs[&JobId(1)].exit.unwrap().exit_code(), 75);
    assert_eq!(env.store.tasks[&(JobId(1), TaskIndex(0))].failures, 0);
}

#[test]
fn the_second_interruption_in_a_row_is_not_tried_again_at_once() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(job_spec());
    let lost = || ObservedPhase::Ended(ending(EndCause::SupervisorLost, 0, &[ExitStatus::Unknown]));
    env.report(1, "j1.0.1", 0, lost());
    env.schedule();
    env.expect(&["n1: forget j1.0.1", "schedule", "n1: start j1.0.2"]);
    env.report(1, "j1.0.2", 0, lost());
    env.schedule();
    env.expect(&["n1: forget j1.0.2", "schedule"]);
    env.pass(Duration::from_secs(1));
    env.expect(&["schedule"]);
    env.schedule();
    env.expect(&["n1: start j1.0.3"]);
}

#[test]
fn the_next_attempt_avoids_the_node_that_failed() {
    let mut env = TestEnv::new();
    env.node(0);
    env.node(0);
    env.start(job_spec());
    env.report(
        1,
        "j1.0.1",
        0,
        ObservedPhase::Ended(ending(EndCause::PrepareFailed, 0, &[])),
    );
    env.schedule();
    env.expect(&["n1: forget j1.0.1", "schedule", "n2: start j1.0.2"]);
}

#[test]
fn other_ends_have_their_own_outcome() {
    let cases = [
        (
            EndCause::TimeLimit,
            "TIMED_OUT TIME_LIMIT: the time limit of 1h passed",
        ),
        (
            EndCause::CannotExecute,
            "FAILED CANNOT_EXECUTE: cannot be started on n1: no such file",
        ),
    ];
    for (cause, expected) in cases {
        let mut env = TestEnv::new();
        env.node(0);
        let mut spec = job_spec();
        spec.time_limit = Some(Duration::from_secs(3600));
        env.start(spec);
        let mut end = ending(cause, 0, &[]);
        end.message = "no such file".into();
        env.report(1, "j1.0.1", 0, ObservedPhase::Ended(end));
        env.words();
        assert_eq!(env.job(1), expected);
    }
}

#[test]
fn nobody_asked_for_a_stop_is_an_interruption() {
    let mut env = TestEnv::new();
    env.node(0);
    env.start(job_spec());
    env.run("j1.0.1", &[1]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(stopped(0)));
    env.words();
    assert!(env.job(1).starts_with("PENDING RETRYING"), "{}", env.job(1));
}

#[test]
fn what_a_member_held_is_free_when_its_processes_are_gone_and_not_before() {
    let mut env = TestEnv::new();
    env.node(4);
    env.start(gpu_spec(1, 4));
    env.run("j1.0.1", &[1]);
    env.start(gpu_spec(1, 4));
    env.cancel(1);
    env.report(1, "j1.0.1", 0, ObservedPhase::Stopping);
    env.schedule();
    env.words();
    assert!(
        env.job(2).starts_with("PENDING INSUFFICIENT_FREE"),
        "{}",
        env.job(2)
    );
    env.report(1, "j1.0.1", 0, ObservedPhase::Uploading(stopped(0)));
    env.schedule();
    env.expect(&["schedule", "n1: start j2.0.1"]);
}

#[test]
fn the_next_attempt_resumes_from_the_newest_checkpoint() {
    let mut env = TestEnv::new();
    env.node(0);
    env.node(0);
    let mut spec = gpu_spec(2, 0);
    spec.retries = 5;
    env.start(spec);
    let fail = |env: &mut TestEnv, number: u32, checkpoint: Option<u8>| {
        let id = format!("j1.0.{number}");
        env.run(&id, &[1, 2]);
        let mut end = ending(EndCause::RankFailed, 0, &[ExitStatus::Code(1)]);
        end.checkpoint = checkpoint.map(|byte| Digest([byte; 32]));
        env.report(1, &id, 0, ObservedPhase::Ended(end));
        env.report(2, &id, 1, ObservedPhase::Ended(stopped(1)));
        env.schedule();
        env.words();
        let next = format!("j1.0.{}", number + 1);
        env.store.attempts[&attempt(&next)].resume_from.clone()
    };
    assert_eq!(fail(&mut env, 1, None), vec![]);
    assert_eq!(fail(&mut env, 2, Some(7)), vec![Digest([7; 32])]);
    // An attempt that left none does not lose the one before.
    assert_eq!(fail(&mut env, 3, None), vec![Digest([7; 32])]);
    assert_eq!(fail(&mut env, 4, Some(9)), vec![Digest([9; 32])]);
}

#[test]
fn supervised_ranks_are_those_that_the_agent_is_told() {
    for launcher in Launcher::ALL {
        let mut spec = gpu_spec(3, 0);
        spec.procs_per_node = 4;
        spec.launcher = *launcher;
        for rank in 0..3 {
            let mut member = gang::bare_spec(3, rank, None);
            member.procs_per_node = 4;
            member.launcher = *launcher;
            assert_eq!(gang::supervised(&spec, rank), member.supervised_ranks());
        }
    }
}

#[test]
fn a_crash_at_any_point_loses_nothing_that_was_said() {
    let mut env = TestEnv::new();
    let node = env.node(0);
    env.start(job_spec());
    env.restart();
    // The command did not arrive: it is in the answer to the agent.
    env.register(node, 0, vec![]);
    env.expect(&["n1: welcome [start j1.0.1]", "schedule"]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ready { port: 3 });
    env.expect(&["n1: run j1.0.1 at 127.0.0.1:3"]);
    env.restart();
    let ready = trainyard_common::member::ObservedMember {
        attempt: attempt("j1.0.1"),
        node_rank: 0,
        phase: ObservedPhase::Ready { port: 3 },
    };
    env.register(node, 0, vec![ready]);
    env.expect(&["n1: welcome [run j1.0.1 at 127.0.0.1:3]", "schedule"]);
}
