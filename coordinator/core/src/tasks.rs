//! What follows for a task and its job when an attempt is over: success, another try, or the end; and how a job's state
//! derives from its tasks. It must not know about nodes or sessions.

use trainyard_common::ids::{AttemptRef, Digest, JobId, NodeId};
use trainyard_common::limits;
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::record::{AttemptRecord, JobRecord, TaskCounts, TaskRecord};
use trainyard_common::state::{ExitStatus, JobState, Outcome, Reason, ReasonCode};
use trainyard_common::time::Timestamp;
use trainyard_common::units::format_duration;

use crate::Core;
use crate::attempts::ended_at;
use crate::config::retry_delay;
use crate::tables::{ActiveCounts, Bundled, TaskKey};

/// What follows for a task.
struct Next {
    state: JobState,
    reason: Reason,
    exit: Option<ExitStatus>,
}

/// What the attempts of a task have used up of what it may.
#[derive(Debug, Clone, Copy)]
struct Spent {
    failures: u32,
    interruptions: u32,
    early_ends: u32,
}

impl Spent {
    /// With this attempt, which is over.
    fn of(task: &TaskRecord, attempt: &AttemptRecord, now: Timestamp) -> Self {
        let ran = attempt
            .started_at
            .map(|start| ended_at(attempt, now).since(start));
        let mut spent = Self {
            failures: task.failures,
            interruptions: task.infrastructure_failures,
            early_ends: task.early_ends,
        };
        if ran.is_some_and(|ran| ran >= limits::PROVEN_RUN) {
            spent.interruptions = 0;
        }
        if ran.is_some_and(|ran| ran >= limits::EARLY_END) {
            spent.early_ends = 0;
        }
        match attempt.outcome {
            Some(Outcome::Failed) => {
                spent.failures += 1;
                spent.interruptions = 0;
                // What could not even be started got nowhere either.
                let early = ran.is_none_or(|ran| ran < limits::EARLY_END);
                spent.early_ends += u32::from(early);
            }
            Some(Outcome::Interrupted) => {
                spent.interruptions += 1;
                spent.failures += u32::from(planted(Mutation::InterruptionIsFailure));
            }
            Some(Outcome::Succeeded | Outcome::Cancelled | Outcome::TimedOut) | None => {}
        }
        spent
    }
}

impl Core {
    /// An attempt is over (or given up): its task ends or waits for the next attempt.
    pub(crate) fn attempt_over(&mut self, now: Timestamp, id: AttemptRef) {
        let key = (id.job, id.task);
        let Some(attempt) = self.t.attempts.get(&id).cloned() else {
            return;
        };
        let Some((spent, next)) = self.judge_task(now, &attempt) else {
            return;
        };
        let Some(task) = self.t.task_mut(key) else {
            return;
        };
        let checkpoints: Vec<Digest> = attempt
            .members
            .iter()
            .filter_map(|member| member.checkpoint)
            .collect();
        if !checkpoints.is_empty() {
            task.checkpoints = checkpoints;
        }
        task.exit = attempt.exit;
        (task.failures, task.early_ends) = (spent.failures, spent.early_ends);
        task.infrastructure_failures = spent.interruptions;
        let interruptions = spent.interruptions;
        self.wants_schedule |= next.state == JobState::Pending;
        let delay = retry_delay(interruptions);
        if next.state != JobState::Pending {
            self.live.forget_task(key);
        } else if !delay.is_zero() {
            self.live.delay_task(key, now.after(delay));
        }
        self.end_task(attempt.ended_at.unwrap_or(now), key, next);
    }

    /// What an attempt that is over uses up, and what follows for its task.
    fn judge_task(&self, now: Timestamp, attempt: &AttemptRecord) -> Option<(Spent, Next)> {
        let job = self.t.jobs.get(&attempt.id.job)?;
        let task = self.t.tasks.get(&(attempt.id.job, attempt.id.task))?;
        let (retries, cancelled) = (job.spec.retries, job.cancel.is_some());
        let retries = retries + 50 * u32::from(planted(Mutation::RetriesWithoutEnd));
        let cancelled = cancelled && !planted(Mutation::CancelledTriedAgain);
        let spent = Spent::of(task, attempt, now);
        let Spent {
            failures,
            interruptions,
            early_ends,
        } = spent;
        let down = &task.nodes_taken_down;
        let next = match attempt.outcome {
            Some(Outcome::Succeeded) => over(JobState::Succeeded, attempt),
            Some(Outcome::Cancelled) => over(JobState::Cancelled, attempt),
            Some(Outcome::TimedOut) => over(JobState::TimedOut, attempt),
            Some(Outcome::Failed) if failures > retries => over(JobState::Failed, attempt),
            Some(Outcome::Failed) if early_ends >= self.config.max_early_ends && !cancelled => {
                let within = format_duration(limits::EARLY_END);
                let what =
                    format!("{early_ends} attempts in a row failed within {within} of their start");
                held(attempt, &what)
            }
            Some(Outcome::Failed) => {
                again(cancelled, attempt, format!("retry {failures} of {retries}"))
            }
            Some(Outcome::Interrupted) | None => {
                let most = self.config.max_infrastructure_failures;
                if down.len() >= self.config.max_nodes_taken_down && !cancelled {
                    let nodes: Vec<String> = down.iter().map(ToString::to_string).collect();
                    let what = format!(
                        "{} different nodes went down while it ran there ({})",
                        nodes.len(),
                        nodes.join(", ")
                    );
                    held(attempt, &what)
                } else if interruptions >= most && !cancelled {
                    gave_up(attempt, interruptions)
                } else {
                    let told = format!("tried again, interruption {interruptions} of {most}");
                    again(cancelled, attempt, told)
                }
            }
        };
        Some((spent, next))
    }

    /// Whether a further attempt would follow if this one were over now.
    pub(crate) fn is_tried_again(&self, now: Timestamp, id: AttemptRef) -> bool {
        let attempt = self.t.attempts.get(&id);
        let next = attempt.and_then(|attempt| self.judge_task(now, attempt));
        next.is_some_and(|(_, next)| next.state == JobState::Pending)
    }

    /// Nodes went down with a task running there. After a long run that says nothing about the task.
    pub(crate) fn note_taken_down(
        &mut self,
        now: Timestamp,
        key: TaskKey,
        started_at: Timestamp,
        nodes: &[NodeId],
    ) {
        let most = self.config.max_nodes_taken_down;
        let Some(task) = self.t.task_mut(key) else {
            return;
        };
        if now.since(started_at) >= limits::PROVEN_RUN {
            task.nodes_taken_down.clear();
        }
        for node in nodes {
            if !task.nodes_taken_down.contains(node) && task.nodes_taken_down.len() < most {
                task.nodes_taken_down.push(*node);
            }
        }
    }

    fn end_task(&mut self, now: Timestamp, key: TaskKey, next: Next) {
        if next.state.is_terminal() {
            if let Some(task) = self.t.task_mut(key) {
                task.exit = next.exit;
            }
            let first = self
                .t
                .jobs
                .get(&key.0)
                .is_some_and(|job| job.exit.is_none());
            let single = self
                .t
                .jobs
                .get(&key.0)
                .is_some_and(|job| job.spec.array.is_none());
            if (single || (first && next.state != JobState::Succeeded))
                && let Some(job) = self.t.job_mut(key.0)
            {
                job.exit = next.exit;
            }
        }
        self.t.set_task(key, now, next.state, next.reason);
    }

    /// Derives the state of a job from its tasks. Harmless to repeat.
    pub(crate) fn derive_job(&mut self, now: Timestamp, id: JobId) {
        let Some(job) = self.t.jobs.get(&id) else {
            return;
        };
        if job.state.is_terminal() {
            return;
        }
        let active = self.t.active.get(&id).copied().unwrap_or_default();
        let (state, reason) = if job.tasks.pending == 0 && job.tasks.active == 0 {
            let state = terminal_state(job);
            (state, self.terminal_reason(job, state))
        } else {
            let bundled = self.t.bundled.get(&id).copied().unwrap_or_default();
            let state = live_state(job, active, bundled);
            (state, self.live_reason(job, state))
        };
        // What ended of an array before is no longer at hand, so that its end is when we learn of it.
        let last = self.t.tasks_of(id).next().and_then(|task| task.ended_at);
        let ended_at = match job.spec.array {
            None => last.unwrap_or(now),
            Some(_) => now,
        };
        let succeeded = state == JobState::Succeeded;
        let Some(job) = self.t.job_mut(id) else {
            return;
        };
        job.state = state;
        if let Some(reason) = reason {
            job.reason = reason;
        }
        if state.is_terminal() {
            job.ended_at = Some(ended_at);
            if succeeded {
                job.exit = Some(ExitStatus::Code(0));
            }
            self.t.pending.remove(&id);
            self.live.forget_job(id);
            self.wants_schedule = true;
        }
    }

    fn terminal_reason(&self, job: &JobRecord, state: JobState) -> Option<Reason> {
        if job.spec.array.is_none()
            && let Some(task) = self.t.tasks_of(job.id).next()
        {
            return Some(task.reason.clone());
        }
        let told = told(&job.tasks);
        let code = match state {
            JobState::Succeeded => ReasonCode::Completed,
            JobState::Cancelled => ReasonCode::CancelRequested,
            JobState::TimedOut => ReasonCode::TimeLimit,
            JobState::Failed
            | JobState::Pending
            | JobState::Provisioning
            | JobState::Preparing
            | JobState::Running
            | JobState::Stopping => ReasonCode::TasksFailed,
        };
        let by = job.cancel.as_ref().map(|cancel| &cancel.by);
        let message = match (state, by) {
            (JobState::Cancelled, Some(by)) if job.spec.array.is_none() => {
                format!("cancelled by {by} before it started")
            }
            (JobState::Cancelled, Some(by)) => format!("cancelled by {by}; {told}"),
            (
                JobState::Succeeded
                | JobState::Cancelled
                | JobState::TimedOut
                | JobState::Failed
                | JobState::Pending
                | JobState::Provisioning
                | JobState::Preparing
                | JobState::Running
                | JobState::Stopping,
                _,
            ) => told,
        };
        Some(Reason::new(code, message))
    }

    /// The reason of a job that goes on; nothing if it waits as before and the scheduler said why.
    fn live_reason(&self, job: &JobRecord, state: JobState) -> Option<Reason> {
        if job.spec.array.is_none() {
            if state == JobState::Pending && job.state == JobState::Pending {
                return None;
            }
            return self
                .t
                .tasks_of(job.id)
                .next()
                .map(|task| task.reason.clone());
        }
        let told = told(&job.tasks);
        let code = match state {
            JobState::Pending | JobState::Provisioning => {
                return (job.state != state).then(|| Reason::new(ReasonCode::Queued, told));
            }
            JobState::Stopping if job.cancel.is_some() => ReasonCode::CancelRequested,
            JobState::Preparing => ReasonCode::Preparing,
            JobState::Stopping => ReasonCode::Uploading,
            JobState::Running
            | JobState::Succeeded
            | JobState::Failed
            | JobState::Cancelled
            | JobState::TimedOut => ReasonCode::Running,
        };
        Some(Reason::new(code, told))
    }
}

fn over(state: JobState, attempt: &AttemptRecord) -> Next {
    Next {
        state,
        reason: attempt.reason.clone(),
        exit: attempt.exit,
    }
}

fn gave_up(attempt: &AttemptRecord, interruptions: u32) -> Next {
    let message = format!(
        "given up after {interruptions} interrupted attempts in a row; the last one: {}",
        attempt.reason.message
    );
    Next {
        state: JobState::Failed,
        reason: Reason::new(ReasonCode::InfrastructureGaveUp, message),
        exit: Some(ExitStatus::Unknown),
    }
}

/// No further attempt, because of what the ones before did to the cluster or to the user's time.
fn held(attempt: &AttemptRecord, what: &str) -> Next {
    let message = format!(
        "not tried again: {what}; the last one: {}; find the cause before it is submitted again",
        attempt.reason.message
    );
    Next {
        state: JobState::Failed,
        reason: Reason::new(ReasonCode::RetryBudgetSpent, message),
        exit: attempt.exit,
    }
}

/// Another attempt, unless a user asked for the end meanwhile.
fn again(cancelled: bool, attempt: &AttemptRecord, told: String) -> Next {
    let number = attempt.id.attempt;
    let why = &attempt.reason.message;
    let lost = attempt.reason.code == ReasonCode::NodeLost;
    if cancelled {
        let message = format!("cancelled; attempt {number} had ended: {why}");
        return Next {
            state: JobState::Cancelled,
            reason: Reason::new(ReasonCode::CancelRequested, message),
            exit: attempt.exit,
        };
    }
    let message = match lost {
        true => format!("{why}; {told}"),
        false => format!("attempt {number}: {why}; {told}"),
    };
    Next {
        state: JobState::Pending,
        reason: Reason::new(ReasonCode::Retrying, message),
        exit: attempt.exit,
    }
}

fn terminal_state(job: &JobRecord) -> JobState {
    let counts = &job.tasks;
    if counts.succeeded == job.spec.task_count() {
        JobState::Succeeded
    } else if job.cancel.is_some() && counts.cancelled > 0 {
        JobState::Cancelled
    } else if counts.timed_out > 0 && counts.failed == 0 {
        JobState::TimedOut
    } else {
        JobState::Failed
    }
}

/// The most advanced state of its tasks; a job whose end was asked for is `STOPPING` until nothing of it is left.
fn live_state(job: &JobRecord, active: ActiveCounts, bundled: Bundled) -> JobState {
    if job.cancel.is_some() {
        JobState::Stopping
    } else if active.running > 0 || bundled.running > 0 {
        JobState::Running
    } else if active.stopping > 0 || bundled.stopping > 0 {
        JobState::Stopping
    } else if active.preparing > 0 || bundled.placed > 0 {
        JobState::Preparing
    } else {
        JobState::Pending
    }
}

/// The counts that are not zero: `3 active, 5 waiting, 2 succeeded`.
fn told(counts: &TaskCounts) -> String {
    let parts = [
        (counts.active, "active"),
        (counts.pending, "waiting"),
        (counts.succeeded, "succeeded"),
        (counts.failed, "failed"),
        (counts.cancelled, "cancelled"),
        (counts.timed_out, "timed out"),
    ];
    let total: u32 = parts.iter().map(|(count, _)| count).sum();
    let told: Vec<String> = parts
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
    format!("of {total} tasks {}", told.join(", "))
}
