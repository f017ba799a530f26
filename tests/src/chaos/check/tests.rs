//! The checker has teeth: for each promise a case that keeps it, and one that breaks it.

use super::super::plan::{Cancel, Commands, Policy, jobs};
use super::super::rng::Rng;
use super::super::script::Fault;
use super::super::users::Cancelled;
use super::promises::{
    attempts, cancels, codes, epochs, gang_stop, leases, overlaps, starts, successes, verdict,
};
use super::*;

const AT: fn(u64) -> Duration = Duration::from_millis;

/// One job of a kind, which runs as the tests say.
fn planned(kind: Kind) -> Accepted {
    let commands = Commands {
        witness: "w".as_ref(),
        ledger: "l".as_ref(),
        nodes: 3,
        node_mib: 100,
    };
    let drawn = jobs(&mut Rng::new(1), 300, AT(1000), &[AT(0)], &commands);
    let job = drawn.into_iter().find(|job| job.kind == kind).unwrap();
    Accepted {
        job: Job {
            cancel: None,
            policy: Policy::Replace,
            ..job
        },
        id: 9,
        at: AT(0),
    }
}

fn life(start: u64, end: Option<(u64, u8)>) -> Life {
    Life {
        starts: 1,
        start: AT(start),
        end: end.map(|(at, code)| (AT(at), code)),
        ..Life::default()
    }
}

fn attempt(number: u32, state: &str, outcome: &str, ranks: &[(u32, Exit)]) -> Attempt {
    Attempt {
        task: 0,
        number,
        state: state.to_owned(),
        outcome: outcome.to_owned(),
        reason: String::new(),
        message: String::new(),
        ranks: ranks.iter().copied().collect(),
        agents: vec![0],
        warned: false,
    }
}

fn who(attempt: u32, rank: u32) -> Who {
    Who {
        job: 9,
        task: 0,
        attempt,
        rank,
    }
}

fn succeeded(accepted: &Accepted) -> Case<'_> {
    Case {
        job: &accepted.job,
        id: 9,
        state: "SUCCEEDED".to_owned(),
        reason: "COMPLETED".to_owned(),
        exit: Some(Exit::Code(0)),
        tasks: vec![(0, "SUCCEEDED".to_owned())],
        attempts: vec![attempt(1, "ENDED", "SUCCEEDED", &[(0, Exit::Code(0))])],
        lives: [(who(1, 0), life(10, Some((20, 0))))].into(),
        cancels: Vec::new(),
    }
}

/// What everything but logs and outputs finds.
fn broken(case: &Case<'_>, lines: &[Line]) -> Vec<String> {
    let mut findings = Findings::default();
    starts(case, &mut findings);
    epochs(case, &mut findings);
    attempts(case, &mut findings);
    overlaps(case, &mut findings);
    successes(case, &mut findings);
    codes(case, &mut findings);
    verdict(case, &mut findings);
    cancels(case, lines, &mut findings);
    findings.broken
}

fn assert_found(case: &Case<'_>, word: &str) {
    let found = broken(case, &[]);
    assert!(
        found.iter().any(|problem| problem.contains(word)),
        "{word}: {found:?}"
    );
}

#[test]
fn a_job_that_went_well_passes() {
    let accepted = planned(Kind::Short);
    assert_eq!(broken(&succeeded(&accepted), &[]), [""; 0]);
}

#[test]
fn a_second_start_and_an_unknown_attempt_are_found() {
    let accepted = planned(Kind::Short);
    let mut case = succeeded(&accepted);
    case.lives.get_mut(&who(1, 0)).unwrap().starts = 2;
    assert_found(&case, "was started 2 times");
    case.lives.insert(who(2, 0), life(30, None));
    assert_found(&case, "knows no such attempt");
}

#[test]
fn attempts_that_overlap_are_found_unless_the_first_was_given_up() {
    let accepted = planned(Kind::Short);
    let mut case = succeeded(&accepted);
    case.attempts
        .insert(0, attempt(1, "ENDED", "INTERRUPTED", &[]));
    case.attempts[1].number = 2;
    case.lives = [
        (who(1, 0), life(10, Some((30, 0)))),
        (who(2, 0), life(20, Some((40, 0)))),
    ]
    .into();
    assert_found(&case, "had ended");
    case.lives.get_mut(&who(2, 0)).unwrap().overlaps.push(1);
    assert_found(&case, "attempt 1 of its task lived");
    case.attempts[0].reason = "NODE_LOST".to_owned();
    case.attempts[0].message = "attempt 1 unconfirmed on n1".to_owned();
    assert_eq!(broken(&case, &[]), [""; 0]);
    for policy in [Policy::Wait, Policy::Stop] {
        let mut strict = planned(Kind::Short);
        strict.job.policy = policy;
        let case = Case {
            job: &strict.job,
            attempts: case.attempts.clone(),
            lives: case.lives.clone(),
            ..succeeded(&accepted)
        };
        assert_found(&case, "attempt 1 of its task lived");
    }
}

#[test]
fn an_attempt_that_begins_after_a_later_one_is_found() {
    let accepted = planned(Kind::Short);
    let mut case = succeeded(&accepted);
    case.attempts
        .insert(0, attempt(1, "ENDED", "INTERRUPTED", &[]));
    case.attempts[1].number = 2;
    case.lives = [
        (who(1, 0), life(50, None)),
        (who(2, 0), life(20, Some((40, 0)))),
    ]
    .into();
    assert_found(&case, "of a later attempt");
    case.lives.get_mut(&who(1, 0)).unwrap().start = AT(10);
    assert_eq!(broken(&case, &[]), [""; 0]);
}

#[test]
fn a_gang_that_was_stopped_during_a_fault_of_its_node_is_called_disturbed() {
    let mut accepted = planned(Kind::GangFails);
    (accepted.job.ranks, accepted.job.code) = (2, 5);
    let mut case = succeeded(&accepted);
    case.attempts = vec![attempt(1, "ENDED", "FAILED", &[])];
    case.lives = [
        (who(1, 0), life(10, Some((100, 5)))),
        (who(1, 1), life(10, Some((130, 143)))),
    ]
    .into();
    let stops = |agent| {
        let cut = Step {
            at: AT(90),
            lasts: AT(20),
            fault: Fault::Cut { agent },
        };
        let mut findings = Findings::default();
        gang_stop(&case, &Troubles::new(&[cut], AT(0)), &mut findings);
        findings.gang_stops
    };
    let (disturbed, calm) = (stops(0), stops(1));
    assert_eq!((disturbed.len(), calm.len()), (1, 1));
    assert!(disturbed[0].disturbed && !calm[0].disturbed);
    assert_eq!(calm[0].took, AT(30));
}

#[test]
fn a_rank_that_outlives_the_lease_of_its_node_is_found() {
    let mut accepted = planned(Kind::Short);
    accepted.job.policy = Policy::Stop;
    let cut = Step {
        at: AT(5000),
        lasts: timing::LONG,
        fault: Fault::LongCut { agent: 0 },
    };
    let troubles = Troubles::new(&[cut], AT(0));
    let ended = |at: u64, agents: Vec<usize>| {
        let mut case = succeeded(&accepted);
        case.attempts[0].agents = agents;
        case.lives = [(who(1, 0), life(10, Some((at, 0))))].into();
        let mut findings = Findings::default();
        leases(&case, &troubles, &mut findings);
        findings.broken
    };
    assert_eq!(ended(26_000, vec![0]), [""; 0]);
    assert_eq!(ended(31_000, vec![1]), [""; 0]);
    assert_eq!(ended(31_000, vec![0]).len(), 1);
}

#[test]
fn a_training_with_other_parameters_is_found() {
    let metrics = |hash: &str| {
        serde_json::json!({ "world_size": 2, "epochs": 3, "losses": [2.0, 1.0], "test_accuracies": [0.5, 0.9],
            "params_hash": hash, "resumed": true })
    };
    let references = References::of(2, metrics("a"));
    assert_eq!(references.problem(2, &metrics("a").to_string()), None);
    for text in [metrics("b").to_string(), String::new(), "{}".to_owned()] {
        assert!(references.problem(2, &text).is_some(), "{text}");
    }
}

#[test]
fn success_without_every_rank_and_wrong_codes_are_found() {
    let accepted = planned(Kind::Short);
    let mut case = succeeded(&accepted);
    case.lives.get_mut(&who(1, 0)).unwrap().end = Some((AT(20), 3));
    assert_found(&case, "not every rank ended with 0");
    assert_found(&case, "is told to have ended with");
    case.lives.get_mut(&who(1, 0)).unwrap().end = None;
    assert_found(&case, "not every rank ended with 0");
    let mut twice = succeeded(&accepted);
    twice.attempts.push(attempt(2, "ENDED", "SUCCEEDED", &[]));
    assert_found(&twice, "with 2 attempts that succeeded");
}

#[test]
fn an_attempt_that_ran_unsaid_and_a_retry_too_many_are_found() {
    let accepted = planned(Kind::Short);
    let mut case = succeeded(&accepted);
    case.attempts
        .insert(0, attempt(1, "ENDED", "INTERRUPTED", &[]));
    case.attempts[0].reason = "PREPARE_FAILED".to_owned();
    case.attempts[1].number = 2;
    case.lives = [(who(2, 0), life(10, Some((20, 0))))].into();
    assert_eq!(broken(&case, &[]), [""; 0]);
    case.lives.insert(who(1, 0), life(1, None));
    assert_found(&case, "is told as PREPARE_FAILED");
    let mut case = succeeded(&accepted);
    let failed = |number| attempt(number, "ENDED", "FAILED", &[(0, Exit::Signal(9))]);
    case.attempts.extend([failed(2), failed(3)]);
    assert_found(&case, "after 2 failures of its own; 1 were allowed");
}

#[test]
fn an_end_that_its_kind_cannot_have_is_found() {
    let accepted = planned(Kind::Fails);
    assert_found(&succeeded(&accepted), "ended as SUCCEEDED");
    let short = planned(Kind::Short);
    let mut case = succeeded(&short);
    case.state = "CANCELLED".to_owned();
    assert_found(&case, "ended as CANCELLED");
}

#[test]
fn what_runs_after_a_cancel_is_found() {
    let mut accepted = planned(Kind::Short);
    accepted.job.cancel = Some(Cancel {
        after: AT(0),
        waits: true,
    });
    let cancel = |state: &str, at: u64, alive: Vec<Who>| Cancelled {
        id: 9,
        at: AT(at),
        waited: true,
        state: state.to_owned(),
        alive,
    };
    let line = |at: u64, event| Line {
        at: AT(at),
        who: who(1, 0),
        pid: 1,
        event,
    };
    let lines = [
        line(10, Event::Start("/".to_owned())),
        line(20, Event::End(0)),
    ];
    let late = cancel("SUCCEEDED", 30, Vec::new());
    let mut case = succeeded(&accepted);
    case.cancels = vec![&late];
    assert_eq!(broken(&case, &lines), [""; 0]);
    let changed = cancel("CANCELLED", 30, Vec::new());
    case.cancels = vec![&changed];
    assert!(
        broken(&case, &lines)
            .iter()
            .any(|problem| problem.contains("was CANCELLED and is SUCCEEDED"))
    );
    let early = cancel("STOPPING", 5, vec![who(1, 0)]);
    case.cancels = vec![&early];
    let found = broken(&case, &lines);
    assert!(
        found
            .iter()
            .any(|problem| problem.contains("ran on and SUCCEEDED")),
        "{found:?}"
    );
    assert!(
        found
            .iter()
            .any(|problem| problem.contains("lived after the cancel")),
        "{found:?}"
    );
}

#[test]
fn what_outlives_a_cancel_of_a_job_that_is_over_is_found_unless_it_is_labelled() {
    let accepted = planned(Kind::GangFails);
    let mut case = succeeded(&accepted);
    case.attempts = vec![attempt(1, "ENDED", "FAILED", &[(1, Exit::Code(5))])];
    let cancel = Cancelled {
        id: 9,
        at: AT(30),
        waited: true,
        state: case.state.clone(),
        alive: vec![who(1, 0)],
    };
    case.cancels = vec![&cancel];
    assert_found(&case, "lived after the cancel");
    case.attempts[0].message = "rank 1 on n1 exited with 5; attempt 1 unconfirmed on n2".to_owned();
    let found = broken(&case, &[]);
    assert!(
        !found.iter().any(|problem| problem.contains("lived")),
        "{found:?}"
    );
}

#[test]
fn a_lost_job_and_a_second_job_of_one_request_are_found() {
    let accepted = planned(Kind::Short);
    let request = accepted.job.request.clone();
    let listed = |id: &str| serde_json::json!({ "id": id, "request_id": request });
    let problems = |jobs: &[Value]| {
        let mut findings = Findings::default();
        same_jobs(std::slice::from_ref(&accepted), jobs, &mut findings);
        findings.broken
    };
    assert_eq!(problems(&[listed("j9")]), [""; 0]);
    assert!(problems(&[])[0].contains("is lost"));
    assert!(problems(&[listed("j9"), listed("j10")])[0].contains("two jobs"));
    assert!(problems(&[listed("j8")])[0].contains("was told to be j9"));
}
