//! Holds what came out of the cluster against what the self test was told and what the ranks wrote. Pure: everything was
//! fetched before.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use trainyard_common::ids::{AttemptRef, NodeId};
use trainyard_common::record::{AttemptRecord, JobRecord};
use trainyard_common::state::{ExitStatus, JobState};

use super::book::{Book, Entry};
use super::job::GRACE;
use super::report::{Row, Verdict};
use super::witness::{Output, Witness};
use crate::jobs::JobDetail;
use crate::output;

/// A rank that does not tick for so long did not run on. Far above what a busy machine makes of a tenth of a second.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// From the end of a gang's first failing rank to that of its last one, besides the grace.
const GANG_MARGIN: Duration = Duration::from_secs(10);
/// From asking for the end of a job that ignores SIGTERM to its end, besides the grace.
const CANCEL_MARGIN: Duration = Duration::from_secs(30);

/// Everything that was fetched of one job.
#[derive(Debug, Default)]
pub(crate) struct Evidence {
    /// Nothing if it is not there.
    pub(crate) detail: Option<JobDetail>,
    pub(crate) witnesses: BTreeMap<(AttemptRef, u32), Witness>,
    /// What each rank left in its file of results.
    pub(crate) results: BTreeMap<(AttemptRef, u32), String>,
    pub(crate) output: BTreeMap<(AttemptRef, u32), Output>,
    /// What could not be fetched of its outputs, or cannot be understood.
    pub(crate) bad_outputs: Vec<String>,
    pub(crate) bad_log: Vec<String>,
}

/// What came of one fault.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    pub(crate) part: usize,
    pub(crate) name: &'static str,
    /// The node that it happened to.
    pub(crate) node: Option<NodeId>,
    pub(crate) node_text: String,
    /// Attempts may have been given up.
    pub(crate) beyond_lost: bool,
    /// Why it was not made.
    pub(crate) not_made: Option<String>,
    /// From the fault until it was over; nothing if that was not seen.
    pub(crate) over_after: Option<Duration>,
    /// The longest time without an answer.
    pub(crate) refused: Duration,
}

/// One promise on its way to a verdict.
#[derive(Debug, Default)]
struct Trial {
    tried: u64,
    broken: Vec<String>,
    measured: String,
}

impl Trial {
    fn check(&mut self, holds: bool, otherwise: impl FnOnce() -> String) {
        self.tried += 1;
        if !holds {
            self.broken.push(otherwise());
        }
    }

    fn row(self, key: &'static str, number: &'static str, words: impl Into<String>) -> Row {
        let verdict = match (self.broken.is_empty(), self.tried) {
            (false, _) => Verdict::Broken,
            (true, 0) => Verdict::NotTried,
            (true, _) => Verdict::Kept,
        };
        Row {
            key,
            number,
            words: words.into(),
            verdict,
            measured: self.measured,
            details: self.broken,
        }
    }
}

/// All that is judged.
#[derive(Debug)]
pub(crate) struct Case<'a> {
    pub(crate) book: &'a Book,
    /// One for each of the book's entries.
    pub(crate) evidence: &'a [Evidence],
    pub(crate) outcomes: &'a [Outcome],
    /// Every job that bears the self test's label, but for the look at what is left.
    pub(crate) census: &'a [JobRecord],
}

impl<'a> Case<'a> {
    /// The rows of the report, but for what is left on the nodes.
    pub(crate) fn judge(&self) -> Vec<Row> {
        let mut rows = vec![
            self.acknowledged(),
            self.one_job(),
            self.ended(),
            self.started_once(),
            self.uninterrupted(),
            self.exits(),
            self.retries(),
            self.gangs(),
            self.cancelled(),
            self.finality(),
            self.logs(),
            self.outputs(),
        ];
        rows.extend(self.outcomes.iter().map(|outcome| self.fault(outcome)));
        rows
    }

    fn all(&self) -> impl Iterator<Item = (&'a Entry, &'a Evidence)> {
        self.book.entries.iter().zip(self.evidence)
    }

    /// Those that are there, with everything about them.
    fn there(&self) -> impl Iterator<Item = (&'a Entry, &'a Evidence, &'a JobDetail)> {
        self.all()
            .filter_map(|(entry, evidence)| Some((entry, evidence, evidence.detail.as_ref()?)))
    }

    /// Whether attempts of this job may have been given up, as somebody wanted to see just that.
    fn may_be_replaced(&self, entry: &Entry) -> bool {
        let outcome = self.outcomes.iter().find(|it| it.part == entry.part);
        outcome.is_some_and(|outcome| outcome.beyond_lost)
    }

    fn acknowledged(&self) -> Row {
        let mut trial = Trial::default();
        for (entry, evidence) in self.all() {
            let there = evidence
                .detail
                .as_ref()
                .is_some_and(|detail| detail.job.request_id.to_string() == entry.request_id);
            trial.check(there, || {
                format!(
                    "{} was acknowledged for request {} and is not there",
                    entry.id, entry.request_id
                )
            });
        }
        trial.measured = output::count(trial.tried, "job");
        trial.row("acknowledged", "P4", "an acknowledged job is on record")
    }

    fn one_job(&self) -> Row {
        let mut trial = Trial {
            tried: u64::from(self.book.repeated),
            broken: self.book.wrong_answers.clone(),
            measured: format!(
                "{} made again",
                output::count(self.book.repeated.into(), "request")
            ),
        };
        let mut by_request: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for job in self.census {
            let jobs = by_request.entry(job.request_id.to_string()).or_default();
            jobs.push(job.id.to_string());
        }
        for (request, jobs) in by_request {
            trial.check(jobs.len() == 1, || {
                format!("request {request} made {}", jobs.join(" and "))
            });
            let known = self
                .book
                .entries
                .iter()
                .any(|entry| entry.request_id == request);
            trial.check(known, || format!("request {request} was never made"));
        }
        trial.row("one_job", "P2", "one request id, one job")
    }

    fn ended(&self) -> Row {
        let mut trial = Trial::default();
        for (entry, _, detail) in self.there() {
            trial.check(detail.job.state.is_terminal(), || {
                format!(
                    "{} ({}) is {} still: {}",
                    entry.id, entry.job.name, detail.job.state, detail.job.reason.message
                )
            });
        }
        trial.measured = output::count(trial.tried, "job");
        trial.row("ended", "I21", "every job comes to its end")
    }

    fn started_once(&self) -> Row {
        let mut trial = Trial::default();
        for (_, evidence) in self.all() {
            for ((attempt, rank), witness) in &evidence.witnesses {
                let once = witness.starts == 1 && !witness.out_of_order;
                trial.check(once, || {
                    format!(
                        "rank {rank} of {attempt} wrote {} and its ticks are {}",
                        output::count(witness.starts.into(), "start"),
                        if witness.out_of_order {
                            "out of order"
                        } else {
                            "in order"
                        }
                    )
                });
            }
        }
        trial.measured = output::count(trial.tried, "rank");
        trial.row(
            "started_once",
            "P32",
            "no rank of an attempt is started twice",
        )
    }

    fn uninterrupted(&self) -> Row {
        let mut trial = Trial::default();
        let mut most = 0;
        for (entry, _, detail) in self
            .there()
            .filter(|(entry, ..)| !self.may_be_replaced(entry))
        {
            let problem = one_too_many(entry, detail);
            trial.check(problem.is_none(), || problem.unwrap_or_default());
            most = most.max(
                detail
                    .attempts
                    .iter()
                    .map(|it| it.id.attempt.0)
                    .max()
                    .unwrap_or(0),
            );
        }
        trial.measured = format!(
            "{}, at most {} of a task",
            output::count(trial.tried, "job"),
            output::count(most.into(), "attempt")
        );
        trial.row(
            "uninterrupted",
            "I3",
            "no attempt is interrupted or run again without need",
        )
    }

    fn exits(&self) -> Row {
        let mut trial = Trial::default();
        for (entry, evidence, detail) in self.there() {
            if !detail.job.state.is_terminal() {
                continue;
            }
            let job = &entry.job;
            let told = detail.job.exit.map(ExitStatus::exit_code);
            let right = detail.job.state == job.end()
                && match job.exit() {
                    Some(0) | None => true,
                    Some(code) => told == Some(code),
                };
            trial.check(right, || {
                format!(
                    "{} ({}) is {} with {}, and was to be {} with {}: {}",
                    entry.id,
                    job.name,
                    detail.job.state,
                    code_text(told),
                    job.end(),
                    code_text(job.exit()),
                    detail.job.reason.message
                )
            });
            for attempt in &detail.attempts {
                for end in attempt.members.iter().flat_map(|member| &member.ranks) {
                    let Some(witness) = evidence.witnesses.get(&(attempt.id, end.rank)) else {
                        continue;
                    };
                    let right = match witness.end {
                        Some(code) => {
                            code == job.code_of(attempt.id.attempt.0, end.rank)
                                && end.exit == ExitStatus::Code(code)
                        }
                        // It was ended before it could; it never succeeded then.
                        None => !end.exit.is_success(),
                    };
                    trial.check(right, || {
                        format!(
                            "rank {} of {} ended with {} and had written {}",
                            end.rank,
                            attempt.id,
                            end.exit,
                            code_text(witness.end)
                        )
                    });
                }
            }
        }
        trial.measured = format!("{} of jobs and ranks", output::count(trial.tried, "end"));
        trial.row("exits", "P18", "ends are told as the ranks wrote them")
    }

    fn retries(&self) -> Row {
        let mut trial = Trial::default();
        for (entry, evidence, detail) in self.there().filter(|(entry, ..)| entry.job.again) {
            let rank_0 = |number: u32| {
                let attempt = detail
                    .attempts
                    .iter()
                    .find(|it| it.id.attempt.0 == number)?;
                evidence.witnesses.get(&(attempt.id, 0))?.end
            };
            let codes = (rank_0(1), rank_0(2));
            let expected = (Some(entry.job.code_of(1, 0)), Some(entry.job.code_of(2, 0)));
            // More than that is another promise's business.
            trial.check(codes == expected || detail.attempts.len() > 2, || {
                format!(
                    "{} was to fail once and be tried again: {}",
                    entry.id, detail.job.reason.message
                )
            });
        }
        trial.measured = output::count(trial.tried, "job");
        trial.row(
            "retries",
            "P39",
            "failures are tried again as often as asked for",
        )
    }

    fn gangs(&self) -> Row {
        let mut trial = Trial::default();
        let mut longest = Duration::ZERO;
        for (entry, evidence, detail) in self.there() {
            let Some(bad) = entry.job.bad_rank else {
                continue;
            };
            for attempt in &detail.attempts {
                let ends: Vec<_> = attempt.members.iter().flat_map(|it| &it.ranks).collect();
                let at = ends.iter().map(|end| end.at);
                let spread = match (at.clone().min(), at.max()) {
                    (Some(first), Some(last)) => last.since(first),
                    _ => Duration::ZERO,
                };
                longest = longest.max(spread);
                let others_ended = ends.iter().filter(|end| end.rank != bad).all(|end| {
                    evidence
                        .witnesses
                        .get(&(attempt.id, end.rank))
                        .is_none_or(|it| it.end.is_none())
                });
                let whole = ends.len() == entry.spec.world_size() as usize
                    && others_ended
                    && spread <= GRACE + GANG_MARGIN;
                trial.check(whole, || {
                    format!(
                        "{}: rank {bad} failed, {} of {} ranks ended, within {:.1} s",
                        attempt.id,
                        ends.len(),
                        entry.spec.world_size(),
                        spread.as_secs_f64()
                    )
                });
            }
        }
        trial.measured = format!(
            "{:.1} s from the first end to the last",
            longest.as_secs_f64()
        );
        trial.row("gangs", "P31", "a gang ends as a whole when a rank fails")
    }

    fn cancelled(&self) -> Row {
        let mut trial = Trial::default();
        let mut longest = Duration::ZERO;
        for (entry, evidence, detail) in self.there().filter(|(it, ..)| it.cancelled.is_some()) {
            let took = entry.cancel_took;
            longest = longest.max(took.unwrap_or_default());
            let in_time = took.is_some_and(|took| took <= GRACE + CANCEL_MARGIN)
                || self.outcomes.iter().any(|it| it.part == entry.part);
            let silent = evidence.witnesses.values().all(|it| it.end.is_none());
            let gone = detail.job.state == JobState::Cancelled && silent && in_time;
            trial.check(gone, || {
                format!(
                    "{} ignores SIGTERM and was cancelled: it is {} after {:.1} s ({})",
                    entry.id,
                    detail.job.state,
                    took.unwrap_or_default().as_secs_f64(),
                    detail.job.reason.message
                )
            });
        }
        trial.measured = format!(
            "{}, {:.1} s at most",
            output::count(trial.tried, "cancel"),
            longest.as_secs_f64()
        );
        trial.row(
            "cancelled",
            "P33",
            "a cancelled job ends, whatever it ignores",
        )
    }

    fn finality(&self) -> Row {
        let mut trial = Trial::default();
        for (entry, _) in self.all().filter(|(entry, _)| entry.end.is_some()) {
            trial.check(entry.changed.is_none(), || {
                entry.changed.clone().unwrap_or_default()
            });
        }
        trial.measured = output::count(trial.tried, "end");
        trial.row("final", "P35", "an end that was shown never changes")
    }

    fn logs(&self) -> Row {
        let mut trial = Trial::default();
        let mut lines = 0;
        for (entry, evidence) in self.all() {
            trial.broken.extend(evidence.bad_log.iter().cloned());
            for (key, witness) in &evidence.witnesses {
                let nothing = Output::default();
                let output = evidence.output.get(key).unwrap_or(&nothing);
                let problem = missing_lines(output, witness, entry.job.lines);
                lines += output.text.lines().count() as u64;
                trial.check(problem.is_none(), || {
                    let (attempt, rank) = key;
                    format!("rank {rank} of {attempt}: {}", problem.unwrap_or_default())
                });
            }
        }
        trial.measured = format!(
            "{} of {}",
            output::count(lines, "line"),
            output::count(trial.tried, "rank")
        );
        trial.row("logs", "I13", "output is complete and in order")
    }

    fn outputs(&self) -> Row {
        let mut trial = Trial::default();
        for (entry, evidence, detail) in self.there() {
            trial.broken.extend(evidence.bad_outputs.iter().cloned());
            for attempt in detail.attempts.iter().filter(|it| it.started_at.is_some()) {
                for rank in ranks_of(entry, attempt) {
                    let key = (attempt.id, rank);
                    let right = match evidence.witnesses.get(&key) {
                        None => false,
                        Some(witness) if witness.end.is_none() => true,
                        Some(_) => {
                            let AttemptRef { job, task, attempt } = attempt.id;
                            let expected = format!("{job} {task} {attempt} {rank}");
                            evidence
                                .results
                                .get(&key)
                                .is_some_and(|text| text.trim_end() == expected)
                        }
                    };
                    trial.check(right || self.may_be_replaced(entry), || {
                        lost_outputs(attempt, rank)
                    });
                }
            }
        }
        trial.measured = output::count(trial.tried, "rank");
        trial.row("outputs", "I13", "outputs are there and right")
    }

    fn fault(&self, outcome: &Outcome) -> Row {
        let (key, number, words) = match outcome.name {
            "kill-coordinator" => (
                "kill_coordinator",
                "P1",
                "kill -9 of the coordinator: running jobs go on".to_owned(),
            ),
            "kill-agent" => (
                "kill_agent",
                "P13",
                format!(
                    "kill -9 of the agent of {}: its jobs go on",
                    outcome.node_text
                ),
            ),
            _ if outcome.beyond_lost => (
                "partition",
                "P23",
                format!("{} cut off for long: jobs are replaced", outcome.node_text),
            ),
            _ => (
                "partition",
                "P22",
                format!(
                    "{} cut off: its jobs go on and are not replaced",
                    outcome.node_text
                ),
            ),
        };
        if let Some(why) = &outcome.not_made {
            return Row {
                key,
                number,
                words,
                verdict: Verdict::NotTried,
                measured: String::new(),
                details: vec![why.clone()],
            };
        }
        let mut trial = Trial::default();
        if outcome.over_after.is_none() {
            trial.broken.push("it was not over in time, or never happened; the logs of coordinator and agent say why".to_owned());
        }
        let (ranks, pause) = self.went_on(outcome, &mut trial);
        trial.measured = format!(
            "{} ran on, longest pause {:.2} s; {}",
            output::count(ranks, "rank"),
            pause.as_secs_f64(),
            match (key, outcome.over_after) {
                ("kill_coordinator", _) =>
                    format!("submits refused for {:.2} s", outcome.refused.as_secs_f64()),
                (_, Some(after)) => format!("back after {:.1} s", after.as_secs_f64()),
                (_, None) => "not back".to_owned(),
            }
        );
        trial.row(key, number, words)
    }

    /// Looks at the ranks that ran when the fault happened to them; how many, and the longest pause of one.
    fn went_on(&self, outcome: &Outcome, trial: &mut Trial) -> (u64, Duration) {
        let mut pause = Duration::ZERO;
        let mut ranks = 0;
        for (entry, evidence, detail) in self.there() {
            if entry.part != outcome.part || !entry.at_fault {
                continue;
            }
            let hit = |attempt: &&AttemptRecord| {
                outcome
                    .node
                    .is_none_or(|node| attempt.members.iter().any(|it| it.node == node))
            };
            let hit: BTreeSet<AttemptRef> =
                detail.attempts.iter().filter(hit).map(|it| it.id).collect();
            if hit.is_empty() {
                continue;
            }
            let problem = one_too_many(entry, detail).filter(|_| !outcome.beyond_lost);
            trial.check(problem.is_none(), || problem.unwrap_or_default());
            for ((attempt, rank), witness) in &evidence.witnesses {
                if !hit.contains(attempt) {
                    continue;
                }
                ranks += 1;
                pause = pause.max(witness.longest_gap);
                let ran_on = witness.longest_gap <= LONGEST_PAUSE || outcome.beyond_lost;
                trial.check(ran_on, || {
                    format!(
                        "rank {rank} of {attempt} stood still for {:.1} s",
                        witness.longest_gap.as_secs_f64()
                    )
                });
            }
        }
        (ranks, pause)
    }
}

fn code_text(code: Option<u8>) -> String {
    code.map_or("no exit code".to_owned(), |code| {
        format!("exit code {code}")
    })
}

/// The ranks of an attempt. A task of an array in a bundle has one.
fn ranks_of(entry: &Entry, attempt: &AttemptRecord) -> std::ops::Range<u32> {
    let members = u32::try_from(attempt.members.len()).unwrap_or(u32::MAX);
    0..members.saturating_mul(entry.spec.procs_per_node)
}

fn lost_outputs(attempt: &AttemptRecord, rank: u32) -> String {
    let warnings: Vec<_> = attempt
        .members
        .iter()
        .filter(|member| !member.warning.is_empty())
        .map(|member| member.warning.as_str())
        .collect();
    let why = match warnings.as_slice() {
        [] => attempt.reason.message.clone(),
        warnings => warnings.join("; "),
    };
    format!(
        "what rank {rank} of {} left is not there or not right: {why}",
        attempt.id
    )
}

/// What is wrong if a task was tried more often than its own failures ask for.
fn one_too_many(entry: &Entry, detail: &JobDetail) -> Option<String> {
    let extra = detail
        .attempts
        .iter()
        .find(|attempt| attempt.id.attempt.0 > entry.job.attempts())?;
    let before = detail.attempts.iter().find(|attempt| {
        attempt.id.task == extra.id.task && attempt.id.attempt.0 + 1 == extra.id.attempt.0
    });
    let why = before.map_or_else(
        || "why is not on record any more".to_owned(),
        |before| format!("{} ended: {}", before.id, before.reason.message),
    );
    Some(format!("{} was started: {why}", extra.id))
}

/// What is wrong with a rank's output, if anything: each line has its number, and there is one for each tick.
fn missing_lines(output: &Output, witness: &Witness, burst: u32) -> Option<String> {
    if output.dropped > 0 {
        return Some(format!("{} bytes were dropped", output.dropped));
    }
    let mut count = 0;
    for line in output.text.split_inclusive('\n') {
        count += 1;
        if line != format!("line {count}\n") {
            return Some(format!("line {count} is {line:?}"));
        }
    }
    let whole = burst + witness.ticks;
    let complete = match witness.end {
        Some(_) => count == whole,
        // It was killed, perhaps amid its first lines, or between writing its last tick and its last line.
        None => count <= whole && (witness.ticks == 0 || count + 1 >= whole),
    };
    (!complete).then(|| format!("{count} of {whole} lines are there"))
}

#[cfg(test)]
mod tests;
