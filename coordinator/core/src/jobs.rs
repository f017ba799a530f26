//! Submitting and cancelling. A submit is accepted once for each request id of a user; a cancel is final for everything
//! that is not decided yet. It must not know how a job is placed.

use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{
    AttemptRef, Digest, JobId, RequestId, TaskIndex, UserName, WorkspaceName,
};
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::record::{CancelRequest, JobRecord, Target, TaskCounts};
use trainyard_common::spec::JobSpec;
use trainyard_common::state::{JobState, Outcome, Reason, ReasonCode};
use trainyard_common::time::{Timestamp, millis};

use crate::Core;
use crate::attempts::Decision;
use crate::config::MAX_REMEMBERED_REQUESTS;
use crate::effect::Answer;
use crate::tables::Remembered;

/// A submission.
pub(crate) struct Submission {
    pub(crate) owner: UserName,
    pub(crate) request_id: RequestId,
    pub(crate) digest: Digest,
    pub(crate) spec: JobSpec,
    pub(crate) allow_infeasible: bool,
}

impl Core {
    pub(crate) fn on_submitted(
        &mut self,
        now: Timestamp,
        new: Submission,
    ) -> Result<Answer, Refusal> {
        let retention = millis(self.config.request_id_retention);
        self.t
            .forget_requests(Timestamp(now.0.saturating_sub(retention)));
        // A retry gets the answer of the first try, whatever would be said to a new submit now.
        if let Some(known) = self
            .t
            .requests
            .get(&(new.owner.clone(), new.request_id.clone()))
        {
            return if known.digest == new.digest || planted(Mutation::DigestIgnored) {
                Ok(Answer::Submitted {
                    job: known.job,
                    repeated: true,
                })
            } else {
                Err(reused(&new.request_id, known.job))
            };
        }
        validate(&new.spec)?;
        self.check_room(&new.owner)?;
        let reason = self.first_reason(&new.spec, new.allow_infeasible)?;
        let id = self.t.next_job;
        self.t.next_job = JobId(id.0 + u64::from(!planted(Mutation::JobIdReused)));
        let first = new.spec.array.map_or(0, |array| array.first);
        let job = JobRecord {
            id,
            owner: new.owner.clone(),
            request_id: new.request_id.clone(),
            request_digest: new.digest,
            state: JobState::Pending,
            reason,
            tasks: TaskCounts {
                pending: new.spec.task_count(),
                ..TaskCounts::default()
            },
            next_fresh: TaskIndex(first),
            bundles: 0,
            submitted_at: now,
            started_at: None,
            ended_at: None,
            cancel: None,
            exit: None,
            spec: new.spec,
        };
        self.t.insert_job(job);
        let remembered = Remembered {
            digest: new.digest,
            job: id,
            at: now,
        };
        if !planted(Mutation::RequestForgotten) {
            self.t.remember(new.owner, new.request_id, remembered);
        }
        self.wants_schedule = true;
        Ok(Answer::Submitted {
            job: id,
            repeated: false,
        })
    }

    fn check_room(&self, owner: &UserName) -> Result<(), Refusal> {
        let exhausted = |reason, message| Err(Refusal::new(ErrorCode::Exhausted, reason, message));
        let live = self.t.jobs.len();
        if live >= self.config.max_live_jobs {
            let message = format!(
                "the cluster has {live} unfinished jobs, as many as it takes; wait until some are over"
            );
            return exhausted("TOO_MANY_JOBS", message);
        }
        let own = self.t.jobs_per_user.get(owner).copied().unwrap_or_default();
        let spare = usize::from(planted(Mutation::OneJobTooMany));
        if own >= self.config.max_live_jobs_per_user + spare {
            let message = format!(
                "{owner} has {own} unfinished jobs, as many as one user may have; wait until some are over"
            );
            return exhausted("TOO_MANY_JOBS_OF_USER", message);
        }
        if self.t.requests.len() >= MAX_REMEMBERED_REQUESTS {
            let message = format!(
                "{} jobs were submitted within {}, more than can be remembered; wait a while, or submit arrays",
                self.t.requests.len(),
                trainyard_common::units::format_duration(self.config.request_id_retention)
            );
            return exhausted("TOO_MANY_SUBMITS", message);
        }
        Ok(())
    }

    pub(crate) fn on_cancel(
        &mut self,
        now: Timestamp,
        by: UserName,
        id: JobId,
    ) -> Result<Answer, Refusal> {
        let Some(job) = self.t.jobs.get(&id) else {
            let message = format!("there is no unfinished job {id}; see `yard jobs -a`");
            return Err(Refusal::new(ErrorCode::NotFound, "JOB_UNKNOWN", message));
        };
        if job.cancel.is_none() {
            self.cancel_job(now, by, id);
        }
        let job = self.t.jobs.get(&id).cloned().ok_or_else(|| {
            Refusal::new(
                ErrorCode::Internal,
                "JOB_VANISHED",
                format!("{id} vanished while it was cancelled"),
            )
        })?;
        Ok(Answer::Cancelled(Box::new(job)))
    }

    fn cancel_job(&mut self, now: Timestamp, by: UserName, id: JobId) {
        let reason = Reason::new(
            ReasonCode::CancelRequested,
            format!("{by} asked for its end"),
        );
        if let Some(job) = self.t.job_mut(id) {
            job.cancel = Some(CancelRequest { by, at: now });
        }
        self.t.cancel_fresh(id);
        let waiting: Vec<TaskIndex> = self
            .t
            .tasks_of(id)
            .filter(|task| task.state == JobState::Pending)
            .map(|task| task.index)
            .collect();
        for index in waiting {
            self.live.forget_task((id, index));
            self.t
                .set_task((id, index), now, JobState::Cancelled, reason.clone());
        }
        let undecided: Vec<AttemptRef> = self
            .t
            .attempts_of(id)
            .filter(|attempt| attempt.outcome.is_none())
            .filter(|_| !planted(Mutation::CancelLeavesRunning))
            .map(|attempt| attempt.id)
            .collect();
        for attempt in undecided {
            let decision = Decision {
                outcome: Outcome::Cancelled,
                reason: reason.clone(),
                exit: None,
                failed_rank: None,
                bad_nodes: Vec::new(),
            };
            self.decide(now, attempt, decision);
        }
        self.stop_bundles_of(now, id, &reason);
        let all = self.t.attempts_of(id).map(|attempt| attempt.id).collect();
        self.settle_lingering(now, all);
        self.derive_job(now, id);
        self.wants_schedule = true;
    }
}

fn validate(spec: &JobSpec) -> Result<(), Refusal> {
    let invalid = |field: &str, problem: String| {
        Err(Refusal::new(
            ErrorCode::Invalid,
            "INVALID_SPEC",
            format!("{field}: {problem}"),
        )
        .at(field))
    };
    if let Err(broken) = spec.validate() {
        return invalid(broken.field, broken.problem);
    }
    if let Some(target) = spec
        .targets
        .iter()
        .find(|target| target.parse::<Target>().is_err())
    {
        return invalid(
            "targets",
            format!("there is no target {target:?}; there are local and attached"),
        );
    }
    if spec.workspace != WorkspaceName::default_workspace() {
        let problem = format!(
            "there is no workspace {:?}; use default",
            spec.workspace.as_str()
        );
        return invalid("workspace", problem);
    }
    // The index after the last one has to be a number, too.
    if spec.array.is_some_and(|array| array.last == u32::MAX) {
        return invalid("array", format!("the last index is above {}", u32::MAX - 1));
    }
    Ok(())
}

fn reused(id: &RequestId, job: JobId) -> Refusal {
    let message = format!(
        "request id {:?} made {job} from another specification; use a new request id for a new job",
        id.as_str()
    );
    Refusal::new(ErrorCode::AlreadyExists, "REQUEST_ID_REUSED", message).at("request_id")
}
