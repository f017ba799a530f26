//! The job specification. It takes over what is there; whether it is a valid job is for
//! [`JobSpec::validate`] to say.

use trainyard_common::spec::{Array, JobSpec};

use super::scalar::{
    digest_bytes, duration, optional, optional_digest, optional_duration, optional_text, required,
    text, to_duration,
};
use super::{InvalidField, WireEnum, enum_field};
use crate::v1;

impl From<&JobSpec> for v1::JobSpec {
    fn from(spec: &JobSpec) -> Self {
        let JobSpec {
            name,
            workspace,
            targets,
            nodes,
            procs_per_node,
            resources_per_node,
            gpu_type,
            gpu_memory_bytes,
            launcher,
            command,
            env,
            snapshot,
            time_limit,
            grace,
            retries,
            array,
            on_disconnect,
            labels,
        } = spec;
        let batch = v1::Batch {
            command: command.clone(),
            env: env.clone(),
        };
        Self {
            name: name.clone(),
            workspace: workspace.to_string(),
            targets: targets.clone(),
            nodes: *nodes,
            procs_per_node: *procs_per_node,
            resources_per_node: Some(resources_per_node.into()),
            gpu_type: gpu_type.clone().unwrap_or_default(),
            gpu_memory_bytes: gpu_memory_bytes.unwrap_or_default(),
            launcher: launcher.number(),
            on_disconnect: on_disconnect.number(),
            time_limit: time_limit.map(duration),
            grace: Some(duration(*grace)),
            retries: *retries,
            array: array.as_ref().map(Into::into),
            snapshot: digest_bytes(*snapshot),
            labels: labels.clone(),
            workload: Some(v1::job_spec::Workload::Batch(batch)),
        }
    }
}

impl TryFrom<v1::JobSpec> for JobSpec {
    type Error = InvalidField;

    fn try_from(message: v1::JobSpec) -> Result<Self, InvalidField> {
        let v1::JobSpec {
            name,
            workspace,
            targets,
            nodes,
            procs_per_node,
            resources_per_node,
            gpu_type,
            gpu_memory_bytes,
            launcher,
            on_disconnect,
            time_limit,
            grace,
            retries,
            array,
            snapshot,
            labels,
            workload,
        } = message;
        let v1::Batch { command, env } = match workload {
            Some(v1::job_spec::Workload::Batch(batch)) => batch,
            None => return Err(InvalidField::missing("workload")),
        };
        Ok(Self {
            name,
            workspace: text("workspace", &workspace)?,
            targets,
            nodes,
            procs_per_node,
            resources_per_node: required("resources_per_node", resources_per_node)?,
            gpu_type: optional_text(gpu_type),
            gpu_memory_bytes: (gpu_memory_bytes != 0).then_some(gpu_memory_bytes),
            launcher: enum_field("launcher", launcher)?,
            command,
            env,
            snapshot: optional_digest("snapshot", &snapshot)?,
            time_limit: optional_duration("time_limit", time_limit)?,
            grace: to_duration("grace", grace)?,
            retries,
            array: optional("array", array)?,
            on_disconnect: enum_field("on_disconnect", on_disconnect)?,
            labels,
        })
    }
}

impl From<&Array> for v1::Array {
    fn from(array: &Array) -> Self {
        let Array {
            first,
            last,
            max_running,
        } = *array;
        Self {
            first,
            last,
            max_running: max_running.unwrap_or_default(),
        }
    }
}

impl TryFrom<v1::Array> for Array {
    type Error = InvalidField;

    fn try_from(message: v1::Array) -> Result<Self, InvalidField> {
        let v1::Array {
            first,
            last,
            max_running,
        } = message;
        Ok(Self {
            first,
            last,
            max_running: (max_running != 0).then_some(max_running),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> v1::JobSpec {
        v1::JobSpec::from(&JobSpec::new("train", vec!["true".into()]))
    }

    fn field_of(change: impl FnOnce(&mut v1::JobSpec)) -> String {
        let mut message = message();
        change(&mut message);
        let refused = JobSpec::try_from(message).expect_err("the change is invalid");
        refused.field
    }

    #[test]
    fn each_bad_or_missing_field_is_named() {
        assert_eq!(field_of(|m| m.workload = None), "workload");
        assert_eq!(field_of(|m| m.workspace.clear()), "workspace");
        assert_eq!(field_of(|m| m.workspace = "a b".into()), "workspace");
        assert_eq!(
            field_of(|m| m.resources_per_node = None),
            "resources_per_node"
        );
        assert_eq!(field_of(|m| m.launcher = 0), "launcher");
        assert_eq!(field_of(|m| m.launcher = 99), "launcher");
        assert_eq!(field_of(|m| m.on_disconnect = 0), "on_disconnect");
        assert_eq!(field_of(|m| m.grace = None), "grace");
        assert_eq!(field_of(|m| m.snapshot = vec![1]), "snapshot");
        let negative = prost_types::Duration {
            seconds: -1,
            nanos: 0,
        };
        assert_eq!(field_of(|m| m.time_limit = Some(negative)), "time_limit");
    }

    #[test]
    fn what_is_invalid_but_can_be_said_is_left_to_validate() {
        let mut message = message();
        message.array = Some(v1::Array {
            first: 5,
            last: 1,
            max_running: 0,
        });
        message.nodes = 0;
        let spec = JobSpec::try_from(message).unwrap();
        let array = spec.array.unwrap();
        assert_eq!((array.first, array.last, array.max_running), (5, 1, None));
        assert_eq!(spec.task_count(), 1, "counting must not overflow");
        assert!(spec.validate().is_err());
    }
}
