//! The one JSON schema of everything that is listed or shown. Times are RFC 3339 in UTC, durations are seconds with a
//! fraction, amounts are integers with their unit in the name.

use serde_json::{Map, Value, json};
use trainyard_common::record::{
    AttemptRecord, JobRecord, MemberRecord, NodeRecord, TaskRecord, TokenGrant,
};
use trainyard_common::resources::Resources;
use trainyard_common::spec::JobSpec;
use trainyard_common::state::{ExitStatus, Reason};
use trainyard_common::time::Timestamp;

use crate::absences::{Absence, Absent};
use crate::jobs::JobDetail;
use crate::nodes::NodeDetail;
use crate::tokens::TokenView;

/// A time as text.
pub(crate) fn time(at: Timestamp) -> String {
    i64::try_from(at.0)
        .ok()
        .and_then(|millis| jiff::Timestamp::from_millisecond(millis).ok())
        .map_or_else(String::new, |time| time.to_string())
}

fn optional_time(at: Option<Timestamp>) -> Value {
    at.map_or(Value::Null, |at| Value::String(time(at)))
}

fn reason(reason: &Reason) -> Value {
    json!({ "code": reason.code, "message": reason.message })
}

fn resources(amounts: &Resources) -> Value {
    json!({ "cpu_milli": amounts.cpu_milli, "memory_bytes": amounts.memory_bytes, "gpus": amounts.gpus })
}

fn exit(status: Option<ExitStatus>) -> Value {
    let Some(status) = status else {
        return Value::Null;
    };
    let mut object = Map::new();
    match status {
        ExitStatus::Code(code) => object.insert("code".into(), code.into()),
        ExitStatus::Signal(signal) => object.insert("signal".into(), signal.into()),
        ExitStatus::NotStarted => object.insert("not_started".into(), true.into()),
        ExitStatus::Unknown => object.insert("unknown".into(), true.into()),
    };
    Value::Object(object)
}

fn spec(spec: &JobSpec) -> Value {
    json!({
        "name": spec.name,
        "workspace": spec.workspace,
        "targets": spec.targets,
        "nodes": spec.nodes,
        "procs_per_node": spec.procs_per_node,
        "resources_per_node": resources(&spec.resources_per_node),
        "gpu_type": spec.gpu_type,
        "gpu_memory_bytes": spec.gpu_memory_bytes,
        "launcher": spec.launcher,
        "command": spec.command,
        "env": spec.env,
        "snapshot": spec.snapshot,
        "time_limit_seconds": spec.time_limit.map(|limit| limit.as_secs_f64()),
        "grace_seconds": spec.grace.as_secs_f64(),
        "retries": spec.retries,
        "array": spec.array,
        "on_disconnect": spec.on_disconnect,
        "labels": spec.labels,
    })
}

/// A job as `jobs` lists it.
pub(crate) fn job(job: &JobRecord) -> Value {
    json!({
        "id": job.id,
        "name": job.spec.name,
        "owner": job.owner,
        "workspace": job.spec.workspace,
        "request_id": job.request_id,
        "state": job.state,
        "reason": reason(&job.reason),
        "tasks": job.tasks,
        "submitted_at": time(job.submitted_at),
        "started_at": optional_time(job.started_at),
        "ended_at": optional_time(job.ended_at),
        "cancelled_by": job.cancel.as_ref().map(|cancel| &cancel.by),
        "exit": exit(job.exit),
        "spec": spec(&job.spec),
    })
}

/// A job as `job` shows it.
pub(crate) fn job_detail(detail: &JobDetail) -> Value {
    let mut value = job(&detail.job);
    if let Value::Object(object) = &mut value {
        object.insert("task_list".into(), detail.tasks.iter().map(task).collect());
        object.insert(
            "attempts".into(),
            detail.attempts.iter().map(attempt).collect(),
        );
    }
    value
}

/// One value for each node that an unfinished attempt has no word of.
pub(crate) fn absence(absence: &Absence) -> Vec<Value> {
    let value = |absent: &Absent| {
        json!({
            "attempt": absence.attempt,
            "node": absent.node,
            "unreachable_since": optional_time(absent.since),
        })
    };
    absence.nodes.iter().map(value).collect()
}

fn task(task: &TaskRecord) -> Value {
    json!({
        "index": task.index,
        "owner": task.owner,
        "workspace": task.workspace,
        "state": task.state,
        "reason": reason(&task.reason),
        "attempts": task.attempts,
        "failures": task.failures,
        "infrastructure_failures": task.infrastructure_failures,
        "early_ends": task.early_ends,
        "nodes_taken_down": task.nodes_taken_down,
        "exit": exit(task.exit),
        "ended_at": optional_time(task.ended_at),
    })
}

fn attempt(attempt: &AttemptRecord) -> Value {
    json!({
        "id": attempt.id,
        "task": attempt.id.task,
        "attempt": attempt.id.attempt,
        "owner": attempt.owner,
        "workspace": attempt.workspace,
        "state": attempt.state,
        "reason": reason(&attempt.reason),
        "outcome": attempt.outcome,
        "exit": exit(attempt.exit),
        "failed_rank": attempt.failed_rank,
        "members": attempt.members.iter().enumerate().map(member).collect::<Vec<_>>(),
        "placed_at": time(attempt.placed_at),
        "ready_at": optional_time(attempt.ready_at),
        "started_at": optional_time(attempt.started_at),
        "ended_at": optional_time(attempt.ended_at),
    })
}

fn member((node_rank, member): (usize, &MemberRecord)) -> Value {
    json!({
        "node_rank": node_rank,
        "node": member.node,
        "resources": resources(&member.resources),
        "gpu_uuids": member.gpu_uuids,
        "phase": member.phase,
        "address": member.address,
        "ranks": member.ranks.iter().map(|rank| json!({
            "rank": rank.rank,
            "exit": exit(Some(rank.exit)),
            "at": time(rank.at),
            "oom_killed": rank.oom_killed,
        })).collect::<Vec<_>>(),
        "outputs": member.outputs,
        "checkpoint": member.checkpoint,
        "warning": member.warning,
        "cleanup": member.cleanup,
    })
}

/// A node as `nodes` lists it and `node` shows it.
pub(crate) fn node(detail: &NodeDetail) -> Value {
    let NodeRecord {
        id,
        name,
        owner,
        workspace,
        target,
        availability,
        policy,
        reason: why,
        inventory,
        incarnation,
        boot_id,
        agent_version,
        address,
        enrolled_at,
        changed_at,
    } = &detail.node;
    json!({
        "id": id,
        "name": name,
        "owner": owner,
        "workspace": workspace,
        "target": target,
        "availability": availability,
        "policy": policy,
        "reason": reason(why),
        "inventory": inventory,
        "capacity": resources(&inventory.capacity),
        "free": resources(&detail.free),
        "quarantined": resources(&detail.quarantined),
        "attempts": detail.attempts,
        "used_gpus": detail.used_gpus,
        "incarnation": incarnation,
        "boot_id": boot_id,
        "agent_version": agent_version,
        "address": address,
        "enrolled_at": time(*enrolled_at),
        "changed_at": time(*changed_at),
    })
}

/// A token as `token list` lists it; never with a secret.
pub(crate) fn token(token: &TokenView) -> Value {
    let (kind, user, role) = match &token.grant {
        TokenGrant::Node { .. } => ("node", None, None),
        TokenGrant::User { name, role } => ("user", Some(name), Some(role)),
    };
    json!({
        "id": token.id,
        "kind": kind,
        "user": user,
        "role": role,
        "workspace": token.workspace,
        "created_by": token.created_by,
        "created_at": time(token.created_at),
        "expires_at": time(token.expires_at),
        "uses_left": token.uses_left,
        "revoked": token.revoked,
    })
}
