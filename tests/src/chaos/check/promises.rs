//! The promises about one job, each held against what its ranks wrote down, what its user was told and what can be read of
//! it now.

use std::path::PathBuf;

use super::super::ledger::{Event, Line, Who, pattern};
use super::super::output;
use super::super::plan::{Kind, Policy};
use super::super::timing;
use super::super::trouble::Troubles;
use super::super::world::{As, World};
use super::{Attempt, COMMAND, Case, Exit, Findings, GangStop, is_over};
use crate::Ran;

/// Each rank of each attempt is started once at most, and only of attempts that are known.
pub(super) fn starts(case: &Case<'_>, findings: &mut Findings) {
    for (who, life) in &case.lives {
        if life.starts > 1 {
            findings
                .broken
                .push(format!("{who} was started {} times", life.starts));
        }
        if case.attempt(who.task, who.attempt).is_none() {
            findings
                .broken
                .push(format!("{who} ran, and the cluster knows no such attempt"));
        }
    }
}

/// Attempts are told as what they were: none ran that is said not to have begun, and failures of the job's own are tried
/// again as often as its user asked for.
pub(super) fn attempts(case: &Case<'_>, findings: &mut Findings) {
    for attempt in &case.attempts {
        let ran = (0..case.job.ranks).any(|rank| case.life(attempt, rank).is_some());
        // Of a gang, one member may fail when it is told to go, and others have gone already.
        let unsaid = match attempt.reason.as_str() {
            "PREPARE_FAILED" => case.job.ranks == 1,
            // One of a single node begins without a word of the coordinator's, and its own may come too late.
            "PREPARE_TIMEOUT" => case.job.ranks > 1,
            _ => false,
        };
        if ran && unsaid {
            findings.broken.push(format!(
                "j{}.{}.{} ran, and is told as {}",
                case.id, attempt.task, attempt.number, attempt.reason
            ));
        }
    }
    let allowed = case.job.retries + 1;
    for (task, state) in &case.tasks {
        let of_task = case.attempts.iter().filter(|attempt| attempt.task == *task);
        let failed = of_task
            .filter(|attempt| attempt.outcome == "FAILED")
            .count();
        let used_up = case.reason == "RANK_EXITED" && state == "FAILED";
        if failed > allowed || (used_up && failed != allowed) {
            findings.broken.push(format!(
                "task {task} of j{} is {state} after {failed} failures of its own; {allowed} were allowed",
                case.id
            ));
        }
    }
}

/// The number of an attempt is its epoch: of a task, each one that begins has a higher one than those before.
pub(super) fn epochs(case: &Case<'_>, findings: &mut Findings) {
    for (who, life) in &case.lives {
        let newer = case
            .lives
            .iter()
            .filter(|(other, _)| other.task == who.task && other.attempt > who.attempt);
        for (other, _) in newer.filter(|(_, newer)| newer.start < life.start) {
            if case.is_unconfirmed(*who) {
                findings.allow("ranks of attempts given up as unconfirmed that began late");
            } else {
                findings
                    .broken
                    .push(format!("{who} began after {other}, of a later attempt"));
            }
        }
    }
}

/// No attempt runs while another one of its task does, but for those that were given up unconfirmed.
pub(super) fn overlaps(case: &Case<'_>, findings: &mut Findings) {
    for (who, life) in &case.lives {
        for other in &life.overlaps {
            let earlier = Who {
                attempt: who.attempt.min(*other),
                ..*who
            };
            if case.is_unconfirmed(earlier) {
                findings.allow("ranks that began while an attempt given up as unconfirmed lived");
            } else {
                findings.broken.push(format!(
                    "{who} began while attempt {other} of its task lived"
                ));
            }
        }
        // The clock says the same, apart from the locks.
        let Some((end, _)) = life.end else {
            continue;
        };
        for (later, next) in case.lives.range(who..) {
            let same_task = later.task == who.task && later.attempt > who.attempt;
            if same_task && next.start < end && !case.is_unconfirmed(*who) {
                findings
                    .broken
                    .push(format!("{later} began before {who} had ended"));
            }
        }
    }
}

/// A node that is away for longer than a lease ends the ranks of the policy `stop` by itself.
pub(super) fn leases(case: &Case<'_>, troubles: &Troubles, findings: &mut Findings) {
    if case.job.policy != Policy::Stop || case.job.ranks != 1 {
        return;
    }
    for attempt in &case.attempts {
        let Some(life) = case.life(attempt, 0) else {
            continue;
        };
        for from in troubles.long(&attempt.agents) {
            let Some((end, code)) = life.end.filter(|(end, _)| life.start < from && *end > from)
            else {
                continue;
            };
            if end > from + timing::LEASE_OVER {
                findings.broken.push(format!(
                    "j{}.{}.{} ended with {code} {:?} after its node was gone, with a lease of {:?}",
                    case.id,
                    attempt.task,
                    attempt.number,
                    end.saturating_sub(from),
                    timing::LOST
                ));
            } else if attempt.reason == "LEASE_EXPIRED" {
                findings.allow("ranks that their node ended at the end of its lease");
            }
        }
    }
}

/// Success is told only where every rank ended with 0.
pub(super) fn successes(case: &Case<'_>, findings: &mut Findings) {
    let every = |attempt: &Attempt| {
        (0..case.job.ranks).all(|rank| {
            case.life(attempt, rank)
                .and_then(|life| life.end)
                .is_some_and(|(_, code)| code == 0)
        })
    };
    for attempt in case
        .attempts
        .iter()
        .filter(|attempt| attempt.outcome == "SUCCEEDED")
    {
        if !every(attempt) {
            let id = format!("j{}.{}.{}", case.id, attempt.task, attempt.number);
            findings.broken.push(format!(
                "{id} is called a success, and not every rank ended with 0"
            ));
        }
    }
    let succeeded = |task: u32| {
        let of_task = case.attempts.iter().filter(|attempt| attempt.task == task);
        of_task
            .filter(|attempt| attempt.outcome == "SUCCEEDED")
            .count()
    };
    for (task, state) in &case.tasks {
        let count = succeeded(*task);
        if (state == "SUCCEEDED") != (count == 1) || count > 1 {
            findings.broken.push(format!(
                "task {task} of j{} is {state} with {count} attempts that succeeded",
                case.id
            ));
        }
    }
    let tasks = usize::try_from(case.job.tasks).unwrap_or(usize::MAX);
    if case.state == "SUCCEEDED"
        && (case.tasks.len() != tasks || case.tasks.iter().any(|(_, state)| state != "SUCCEEDED"))
    {
        findings.broken.push(format!(
            "j{} is SUCCEEDED with tasks {:?}",
            case.id, case.tasks
        ));
    }
}

/// Exit codes are those that the ranks wrote down.
pub(super) fn codes(case: &Case<'_>, findings: &mut Findings) {
    for attempt in &case.attempts {
        for (rank, told) in &attempt.ranks {
            let who = Who {
                job: case.id,
                task: attempt.task,
                attempt: attempt.number,
                rank: *rank,
            };
            let written = case
                .lives
                .get(&who)
                .map(|life| life.end.map(|(_, code)| code));
            match (told, written) {
                (Exit::Code(told), Some(Some(written))) if *told == written => {}
                // Killed between its last line and its exit.
                (Exit::Signal(9), Some(Some(_))) => {
                    findings.allow("ranks killed in their last moment")
                }
                (Exit::Signal(_), Some(None)) => {}
                // Told to end, or killed, before it could write anything.
                (Exit::Signal(_) | Exit::NotStarted, None) => {}
                (Exit::Unknown, _) => findings.allow("ranks whose exit nobody saw"),
                (told, written) => {
                    findings.broken.push(format!(
                        "{who} is told to have ended with {told:?}; it wrote {written:?}"
                    ));
                }
            }
        }
        if attempt.state == "ENDED" && attempt.outcome == "FAILED" && attempt.ranks.is_empty() {
            let id = format!("j{}.{}.{}", case.id, attempt.task, attempt.number);
            findings.broken.push(format!(
                "{id} FAILED without a rank that did: {}",
                attempt.message
            ));
        }
    }
}

/// The job ended in a way that its kind can end.
pub(super) fn verdict(case: &Case<'_>, findings: &mut Findings) {
    let job = case.job;
    let gave_up = case.state == "FAILED"
        && ["INFRASTRUCTURE_GAVE_UP", "RETRY_BUDGET_SPENT"].contains(&case.reason.as_str());
    let of_its_own = matches!(job.kind, Kind::Fails | Kind::GangFails | Kind::Training)
        && case.state == "FAILED"
        && case.exit == Some(Exit::Code(job.code));
    let expected = match job.kind {
        Kind::Fails | Kind::GangFails => of_its_own,
        Kind::Deaf => case.state == "TIMED_OUT",
        Kind::Training => case.state == "SUCCEEDED" || of_its_own,
        _ => case.state == "SUCCEEDED",
    };
    // An array that lost a task says so.
    let lost_tasks = job.kind == Kind::Array
        && case.state == "FAILED"
        && case
            .attempts
            .iter()
            .any(|attempt| attempt.outcome == "INTERRUPTED");
    let cancelled = case.state == "CANCELLED" && job.cancel.is_some();
    if gave_up || (lost_tasks && !expected) {
        findings.allow("jobs that the infrastructure gave up");
    } else if job.kind == Kind::Training && of_its_own {
        findings.allow("trainings that lost a peer too often");
    } else if !expected && !cancelled {
        findings.broken.push(format!(
            "j{} ({:?}) ended as {} ({}) with {:?}",
            case.id, job.kind, case.state, case.reason, case.exit
        ));
    }
}

/// What a cancel said stays true.
pub(super) fn cancels(case: &Case<'_>, lines: &[Line], findings: &mut Findings) {
    for cancel in &case.cancels {
        if is_over(&cancel.state) && cancel.state != case.state {
            findings.broken.push(format!(
                "j{} was {} and is {}",
                case.id, cancel.state, case.state
            ));
        }
        let own = lines
            .iter()
            .filter(|line| line.who.job == case.id && line.at > cancel.at);
        if case.state == "SUCCEEDED" && own.clone().any(|line| matches!(line.event, Event::End(_)))
        {
            findings
                .broken
                .push(format!("j{} was cancelled, ran on and SUCCEEDED", case.id));
        }
        if !cancel.waited {
            continue;
        }
        let later = own
            .filter(|line| matches!(line.event, Event::Start(_)))
            .map(|line| line.who);
        for who in cancel.alive.iter().copied().chain(later) {
            if case.is_unconfirmed(who) {
                findings.allow("ranks of unconfirmed attempts that outlived a cancel");
            } else {
                findings.broken.push(format!(
                    "{who} lived after the cancel was answered ({})",
                    cancel.state
                ));
            }
        }
    }
}

/// How long it took from the failure of a gang's rank until its other ranks had ended.
pub(super) fn gang_stop(case: &Case<'_>, troubles: &Troubles, findings: &mut Findings) {
    if case.job.kind != Kind::GangFails {
        return;
    }
    for attempt in case
        .attempts
        .iter()
        .filter(|attempt| attempt.outcome == "FAILED")
    {
        let ends = (0..case.job.ranks).filter_map(|rank| case.life(attempt, rank)?.end);
        let failed = ends
            .clone()
            .find(|(_, code)| *code == case.job.code)
            .map(|(at, _)| at);
        let last = ends.map(|(at, _)| at).max();
        if let (Some(failed), Some(last)) = (failed, last) {
            findings.gang_stops.push(GangStop {
                took: last.saturating_sub(failed),
                disturbed: troubles.met(failed, last, &attempt.agents),
            });
        }
    }
}

/// Every byte that a rank wrote is there, or a mark says that it is not.
pub(super) fn logs(world: &World, case: &Case<'_>, findings: &mut Findings) {
    if case.job.kind == Kind::Training {
        return;
    }
    let ran = world.yard(
        As::User,
        &["logs", &format!("j{}", case.id), "--json"],
        COMMAND,
    );
    if ran.code != 0 {
        findings.broken.push(format!(
            "logs of j{} ended with {}: {}",
            case.id, ran.code, ran.stderr
        ));
        return;
    }
    let pieces = output::pieces(&ran.stdout);
    for who in pieces.keys().filter(|who| !case.lives.contains_key(who)) {
        findings
            .broken
            .push(format!("there is output of {who}, which never ran"));
    }
    for (who, life) in &case.lives {
        let Some(attempt) = case.attempt(who.task, who.attempt) else {
            continue;
        };
        let own = pieces.get(who).map_or(&[][..], Vec::as_slice);
        let extent = match output::against(*who, case.job.lines, own) {
            Ok(extent) => extent,
            Err(problem) => {
                findings.broken.push(format!("output of {who}: {problem}"));
                continue;
            }
        };
        if extent.dropped > 0 {
            findings.allow("ranks with output that is marked as dropped");
        }
        let Some(wrote) = life.wrote.map(|lines| output::length(*who, lines)) else {
            continue;
        };
        if extent.bytes >= wrote {
            continue;
        }
        // What a killed supervisor held, and what a node given up has, is gone; the attempt says so.
        if attempt.is_unconfirmed() || attempt.reason == "SUPERVISOR_LOST" {
            findings.allow("ranks whose output is incomplete because they were given up");
        } else if attempt.warned {
            findings.allow("ranks whose output could not be kept, with a warning");
        } else {
            findings.broken.push(format!(
                "output of {who} ends at byte {} of {wrote}, and nothing says so ({} {})",
                extent.bytes, attempt.outcome, attempt.reason
            ));
        }
    }
}

/// Brings the outputs of a job, and says where to.
pub(super) fn fetch(world: &World, case: &Case<'_>) -> (Ran, PathBuf) {
    let (job, to) = (
        format!("j{}", case.id),
        world.base().join(format!("fetched/j{}", case.id)),
    );
    let ran = world.yard(
        As::User,
        &["outputs", &job, "--to", &to.display().to_string()],
        COMMAND,
    );
    (ran, to)
}

/// Outputs are what the rank left.
pub(super) fn outputs(world: &World, case: &Case<'_>, findings: &mut Findings) {
    let Some(attempt) = case.succeeded() else {
        return;
    };
    let (ran, to) = fetch(world, case);
    let who = Who {
        job: case.id,
        task: attempt.task,
        attempt: attempt.number,
        rank: 0,
    };
    let whole = (0..case.job.outputs).all(|file| {
        let text = std::fs::read_to_string(to.join(format!("rank-0-{file}")));
        text.is_ok_and(|text| text == pattern(who, u64::from(file)))
    });
    if ran.code == 0 && whole {
        return;
    }
    if attempt.warned {
        findings.allow("outputs that could not be kept, with a warning");
    } else {
        findings.broken.push(format!(
            "outputs of j{} are not what it left ({}): {}",
            case.id,
            ran.code,
            ran.stderr.trim()
        ));
    }
}
