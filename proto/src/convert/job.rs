//! Jobs, tasks and attempts as they are on record, and the reasons and exit statuses that they share.

use trainyard_common::ids::TaskIndex;
use trainyard_common::member::RankEnd;
use trainyard_common::record::{
    AttemptRecord, CancelRequest, JobRecord, MemberRecord, TaskCounts, TaskRecord,
};
use trainyard_common::state::{ExitStatus, Reason, ReasonCode};

use super::scalar::{
    byte, digest, digest_bytes, digest_list, digests, duration, job_id, list, node_id, optional,
    optional_digest, optional_duration, optional_port, optional_timestamp, required, text,
    timestamp, to_timestamp,
};
use super::{InvalidField, WireEnum, enum_field, optional_enum_field};
use crate::v1;

impl From<&Reason> for v1::Reason {
    fn from(reason: &Reason) -> Self {
        let Reason { code, message } = reason;
        Self {
            code: code.as_str().to_owned(),
            message: message.clone(),
        }
    }
}

impl TryFrom<v1::Reason> for Reason {
    type Error = InvalidField;

    fn try_from(reason: v1::Reason) -> Result<Self, InvalidField> {
        let v1::Reason { code, message } = reason;
        Ok(Self {
            code: reason_code("code", &code)?,
            message,
        })
    }
}

/// One of the closed set of reason codes.
pub(super) fn reason_code(field: &str, code: &str) -> Result<ReasonCode, InvalidField> {
    if code.is_empty() {
        return Err(InvalidField::missing(field));
    }
    code.parse().map_err(|_| {
        let code: String = code.chars().take(64).collect();
        InvalidField::new(
            field,
            format!("{code:?} is not a reason code that this version knows"),
        )
    })
}

impl From<&ExitStatus> for v1::ExitStatus {
    fn from(exit: &ExitStatus) -> Self {
        use v1::exit_status::Status;
        let status = match *exit {
            ExitStatus::Code(code) => Status::Code(code.into()),
            ExitStatus::Signal(signal) => Status::Signal(signal.into()),
            ExitStatus::NotStarted => Status::NotStarted(true),
            ExitStatus::Unknown => Status::Unknown(true),
        };
        Self {
            status: Some(status),
        }
    }
}

impl From<ExitStatus> for v1::ExitStatus {
    fn from(exit: ExitStatus) -> Self {
        Self::from(&exit)
    }
}

impl TryFrom<v1::ExitStatus> for ExitStatus {
    type Error = InvalidField;

    fn try_from(message: v1::ExitStatus) -> Result<Self, InvalidField> {
        use v1::exit_status::Status;
        let refuse = |field| Err(InvalidField::new(field, "is false, which says nothing"));
        let v1::ExitStatus { status } = message;
        match status {
            Some(Status::Code(code)) => byte("code", code).map(Self::Code),
            Some(Status::Signal(signal)) => byte("signal", signal).map(Self::Signal),
            Some(Status::NotStarted(true)) => Ok(Self::NotStarted),
            Some(Status::Unknown(true)) => Ok(Self::Unknown),
            Some(Status::NotStarted(false)) => refuse("not_started"),
            Some(Status::Unknown(false)) => refuse("unknown"),
            None => Err(InvalidField::missing("status")),
        }
    }
}

impl From<&RankEnd> for v1::RankEnd {
    fn from(end: &RankEnd) -> Self {
        let RankEnd {
            rank,
            exit,
            at,
            unprompted,
            oom_killed,
        } = *end;
        Self {
            rank,
            exit: Some(exit.into()),
            at: Some(timestamp(at)),
            unprompted,
            oom_killed,
        }
    }
}

impl From<RankEnd> for v1::RankEnd {
    fn from(end: RankEnd) -> Self {
        Self::from(&end)
    }
}

impl TryFrom<v1::RankEnd> for RankEnd {
    type Error = InvalidField;

    fn try_from(message: v1::RankEnd) -> Result<Self, InvalidField> {
        let v1::RankEnd {
            rank,
            exit,
            at,
            unprompted,
            oom_killed,
        } = message;
        Ok(Self {
            rank,
            exit: required("exit", exit)?,
            at: to_timestamp("at", at)?,
            unprompted,
            oom_killed,
        })
    }
}

impl From<&JobRecord> for v1::Job {
    fn from(job: &JobRecord) -> Self {
        let JobRecord {
            id,
            owner,
            request_id,
            request_digest,
            spec,
            state,
            reason,
            tasks,
            next_fresh,
            bundles,
            submitted_at,
            started_at,
            ended_at,
            cancel,
            exit,
        } = job;
        Self {
            id: id.0,
            owner: owner.to_string(),
            request_id: request_id.to_string(),
            request_digest: request_digest.0.to_vec(),
            spec: Some(spec.into()),
            state: state.number(),
            reason: Some(reason.into()),
            tasks: Some(tasks.into()),
            next_fresh: next_fresh.0,
            bundles: *bundles,
            submitted_at: Some(timestamp(*submitted_at)),
            started_at: started_at.map(timestamp),
            ended_at: ended_at.map(timestamp),
            cancel: cancel.as_ref().map(Into::into),
            exit: exit.map(Into::into),
        }
    }
}

impl TryFrom<v1::Job> for JobRecord {
    type Error = InvalidField;

    fn try_from(message: v1::Job) -> Result<Self, InvalidField> {
        let v1::Job {
            id,
            owner,
            request_id,
            request_digest,
            spec,
            state,
            reason,
            tasks,
            next_fresh,
            bundles,
            submitted_at,
            started_at,
            ended_at,
            cancel,
            exit,
        } = message;
        Ok(Self {
            id: job_id("id", id)?,
            owner: text("owner", &owner)?,
            request_id: text("request_id", &request_id)?,
            request_digest: digest("request_digest", &request_digest)?,
            spec: required("spec", spec)?,
            state: enum_field("state", state)?,
            reason: required("reason", reason)?,
            tasks: required("tasks", tasks)?,
            next_fresh: TaskIndex(next_fresh),
            bundles,
            submitted_at: to_timestamp("submitted_at", submitted_at)?,
            started_at: optional_timestamp("started_at", started_at)?,
            ended_at: optional_timestamp("ended_at", ended_at)?,
            cancel: optional("cancel", cancel)?,
            exit: optional("exit", exit)?,
        })
    }
}

impl From<&CancelRequest> for v1::CancelRequest {
    fn from(cancel: &CancelRequest) -> Self {
        let CancelRequest { by, at } = cancel;
        Self {
            by: by.to_string(),
            at: Some(timestamp(*at)),
        }
    }
}

impl TryFrom<v1::CancelRequest> for CancelRequest {
    type Error = InvalidField;

    fn try_from(message: v1::CancelRequest) -> Result<Self, InvalidField> {
        let v1::CancelRequest { by, at } = message;
        Ok(Self {
            by: text("by", &by)?,
            at: to_timestamp("at", at)?,
        })
    }
}

impl From<&TaskCounts> for v1::TaskCounts {
    fn from(counts: &TaskCounts) -> Self {
        let TaskCounts {
            pending,
            active,
            succeeded,
            failed,
            cancelled,
            timed_out,
        } = *counts;
        Self {
            pending,
            active,
            succeeded,
            failed,
            cancelled,
            timed_out,
        }
    }
}

impl TryFrom<v1::TaskCounts> for TaskCounts {
    type Error = InvalidField;

    fn try_from(message: v1::TaskCounts) -> Result<Self, InvalidField> {
        let v1::TaskCounts {
            pending,
            active,
            succeeded,
            failed,
            cancelled,
            timed_out,
        } = message;
        Ok(Self {
            pending,
            active,
            succeeded,
            failed,
            cancelled,
            timed_out,
        })
    }
}

impl From<&TaskRecord> for v1::Task {
    fn from(task: &TaskRecord) -> Self {
        let TaskRecord {
            job,
            index,
            owner,
            workspace,
            state,
            reason,
            attempts,
            failures,
            infrastructure_failures,
            early_ends,
            nodes_taken_down,
            exit,
            checkpoints,
            ended_at,
        } = task;
        Self {
            job: job.0,
            index: index.0,
            owner: owner.to_string(),
            workspace: workspace.to_string(),
            state: state.number(),
            reason: Some(reason.into()),
            attempts: *attempts,
            failures: *failures,
            infrastructure_failures: *infrastructure_failures,
            early_ends: *early_ends,
            nodes_taken_down: nodes_taken_down.iter().map(|node| node.0).collect(),
            exit: exit.map(Into::into),
            checkpoints: digest_list(checkpoints),
            ended_at: ended_at.map(timestamp),
        }
    }
}

impl TryFrom<v1::Task> for TaskRecord {
    type Error = InvalidField;

    fn try_from(message: v1::Task) -> Result<Self, InvalidField> {
        let v1::Task {
            job,
            index,
            owner,
            workspace,
            state,
            reason,
            attempts,
            failures,
            infrastructure_failures,
            early_ends,
            nodes_taken_down,
            exit,
            checkpoints,
            ended_at,
        } = message;
        Ok(Self {
            job: job_id("job", job)?,
            index: TaskIndex(index),
            owner: text("owner", &owner)?,
            workspace: text("workspace", &workspace)?,
            state: enum_field("state", state)?,
            reason: required("reason", reason)?,
            attempts,
            failures,
            infrastructure_failures,
            early_ends,
            nodes_taken_down: nodes_taken_down
                .into_iter()
                .map(|node| node_id("nodes_taken_down", node))
                .collect::<Result<_, _>>()?,
            exit: optional("exit", exit)?,
            checkpoints: digests("checkpoints", &checkpoints)?,
            ended_at: optional_timestamp("ended_at", ended_at)?,
        })
    }
}

impl From<&AttemptRecord> for v1::Attempt {
    fn from(attempt: &AttemptRecord) -> Self {
        let AttemptRecord {
            id,
            owner,
            workspace,
            state,
            reason,
            outcome,
            exit,
            failed_rank,
            members,
            resume_from,
            placed_at,
            ready_at,
            started_at,
            ended_at,
            lease,
        } = attempt;
        Self {
            id: Some(id.into()),
            owner: owner.to_string(),
            workspace: workspace.to_string(),
            state: state.number(),
            reason: Some(reason.into()),
            outcome: outcome.map_or(0, WireEnum::number),
            exit: exit.map(Into::into),
            failed_rank: *failed_rank,
            members: members.iter().map(Into::into).collect(),
            resume_from: digest_list(resume_from),
            placed_at: Some(timestamp(*placed_at)),
            ready_at: ready_at.map(timestamp),
            started_at: started_at.map(timestamp),
            ended_at: ended_at.map(timestamp),
            lease: lease.map(duration),
        }
    }
}

impl TryFrom<v1::Attempt> for AttemptRecord {
    type Error = InvalidField;

    fn try_from(message: v1::Attempt) -> Result<Self, InvalidField> {
        let v1::Attempt {
            id,
            owner,
            workspace,
            state,
            reason,
            outcome,
            exit,
            failed_rank,
            members,
            resume_from,
            placed_at,
            ready_at,
            started_at,
            ended_at,
            lease,
        } = message;
        Ok(Self {
            id: required("id", id)?,
            owner: text("owner", &owner)?,
            workspace: text("workspace", &workspace)?,
            state: enum_field("state", state)?,
            reason: required("reason", reason)?,
            outcome: optional_enum_field("outcome", outcome)?,
            exit: optional("exit", exit)?,
            failed_rank,
            members: list("members", members)?,
            resume_from: digests("resume_from", &resume_from)?,
            placed_at: to_timestamp("placed_at", placed_at)?,
            ready_at: optional_timestamp("ready_at", ready_at)?,
            started_at: optional_timestamp("started_at", started_at)?,
            ended_at: optional_timestamp("ended_at", ended_at)?,
            lease: optional_duration("lease", lease)?,
        })
    }
}

impl From<&MemberRecord> for v1::Member {
    fn from(member: &MemberRecord) -> Self {
        let MemberRecord {
            node,
            resources,
            gpu_uuids,
            phase,
            address,
            port,
            ranks,
            outputs,
            checkpoint,
            warning,
            cleanup,
        } = member;
        Self {
            node: node.0,
            resources: Some(resources.into()),
            gpu_uuids: gpu_uuids.clone(),
            phase: phase.number(),
            address: address.clone(),
            port: port.unwrap_or_default().into(),
            ranks: ranks.iter().map(Into::into).collect(),
            outputs: digest_bytes(*outputs),
            checkpoint: digest_bytes(*checkpoint),
            warning: warning.clone(),
            cleanup: cleanup.clone(),
        }
    }
}

impl TryFrom<v1::Member> for MemberRecord {
    type Error = InvalidField;

    fn try_from(message: v1::Member) -> Result<Self, InvalidField> {
        let v1::Member {
            node,
            resources,
            gpu_uuids,
            phase,
            address,
            port,
            ranks,
            outputs,
            checkpoint,
            warning,
            cleanup,
        } = message;
        Ok(Self {
            node: node_id("node", node)?,
            resources: required("resources", resources)?,
            gpu_uuids,
            phase: enum_field("phase", phase)?,
            address,
            port: optional_port("port", port)?,
            ranks: list("ranks", ranks)?,
            outputs: optional_digest("outputs", &outputs)?,
            checkpoint: optional_digest("checkpoint", &checkpoint)?,
            warning,
            cleanup,
        })
    }
}

#[cfg(test)]
mod tests {
    use v1::exit_status::Status;

    use super::*;

    fn exit(status: Option<Status>) -> Result<ExitStatus, String> {
        ExitStatus::try_from(v1::ExitStatus { status }).map_err(|e| e.to_string())
    }

    #[test]
    fn an_exit_status_is_never_guessed() {
        assert_eq!(exit(Some(Status::Code(255))), Ok(ExitStatus::Code(255)));
        assert_eq!(
            exit(Some(Status::Code(256))),
            Err("code: 256 is outside 0 to 255".into())
        );
        assert_eq!(
            exit(Some(Status::Signal(u32::MAX))),
            Err("signal: 4294967295 is outside 0 to 255".into())
        );
        assert_eq!(exit(None), Err("status: is missing".into()));
        assert!(exit(Some(Status::NotStarted(false))).is_err());
        assert!(exit(Some(Status::Unknown(false))).is_err());
        assert_eq!(exit(Some(Status::Unknown(true))), Ok(ExitStatus::Unknown));
    }

    #[test]
    fn every_reason_code_survives_and_others_are_refused() {
        for code in ReasonCode::ALL {
            assert_eq!(reason_code("code", code.as_str()), Ok(*code));
        }
        assert_eq!(reason_code("code", ""), Err(InvalidField::missing("code")));
        let refused = reason_code("code", &"X".repeat(10_000)).expect_err("no such code");
        assert!(refused.problem.len() < 200, "{refused}");
    }
}
