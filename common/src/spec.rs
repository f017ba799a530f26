//! What a user asks for: the specification of a job, and the one set of rules that says which are valid.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::{Digest, TaskIndex, WorkspaceName, is_name};
use crate::limits;
use crate::resources::Resources;
use crate::state::named_enum;
use crate::units::{format_bytes, format_cpus, format_duration};

named_enum!(
    /// How the processes of a member are started.
    Launcher {
        /// The command itself, once per rank, with the rank's environment.
        None = "none",
        /// The same, for `torch.distributed` with `init_method="env://"`.
        Torch = "torch",
        /// One `torchrun` per node, which starts the ranks.
        Torchrun = "torchrun",
    }
);

named_enum!(
    /// What happens to an attempt whose node falls silent.
    OnDisconnect {
        /// After `lost_after` a new attempt starts elsewhere, labelled as unconfirmed.
        Replace = "replace",
        /// A new attempt starts only when the end of the old one is confirmed.
        Wait = "wait",
        /// The node itself ends the ranks when it is cut off for `lost_after`; a new attempt starts only when that is
        /// certain.
        Stop = "stop",
    }
);

/// The tasks of an array: every index from `first` to `last`, at most `max_running` at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Array {
    /// First task index.
    pub first: u32,
    /// Last task index, not below the first.
    pub last: u32,
    /// Most tasks at a time, at least 1; none means as many as fit.
    pub max_running: Option<u32>,
}

/// The specification of a job. Everything that counts things counts them per node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// For people; need not be unique. Follows [`is_name`].
    pub name: String,
    /// The workspace that the job belongs to.
    pub workspace: WorkspaceName,
    /// Acceptable targets in order of preference; empty means every node that the workspace may use.
    pub targets: Vec<String>,
    /// Nodes of each task's gang, at least 1.
    pub nodes: u32,
    /// Ranks per node, at least 1.
    pub procs_per_node: u32,
    /// What each member is given.
    pub resources_per_node: Resources,
    /// Wanted GPU model: every letter and digit group of it must occur in the product name, in any case.
    pub gpu_type: Option<String>,
    /// Least memory of each GPU, in bytes.
    pub gpu_memory_bytes: Option<u64>,
    /// How ranks are started.
    pub launcher: Launcher,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// The user's variables.
    pub env: BTreeMap<String, String>,
    /// The tree that each attempt gets a fresh working copy of.
    pub snapshot: Option<Digest>,
    /// Longest run of one attempt; none means no limit.
    pub time_limit: Option<Duration>,
    /// Time between SIGTERM and SIGKILL.
    pub grace: Duration,
    /// Further attempts of a task after failures that lie in the job.
    pub retries: u32,
    /// Present for an array.
    pub array: Option<Array>,
    /// What happens when a node falls silent.
    pub on_disconnect: OnDisconnect,
    /// Free text for people and filters.
    pub labels: BTreeMap<String, String>,
}

impl JobSpec {
    /// A job of one process on one node with the default of one CPU.
    #[must_use]
    pub fn new(name: impl Into<String>, command: Vec<String>) -> Self {
        Self {
            name: name.into(),
            workspace: WorkspaceName::default_workspace(),
            targets: Vec::new(),
            nodes: 1,
            procs_per_node: 1,
            resources_per_node: Resources {
                cpu_milli: 1000,
                memory_bytes: 0,
                gpus: 0,
            },
            gpu_type: None,
            gpu_memory_bytes: None,
            launcher: Launcher::None,
            command,
            env: BTreeMap::new(),
            snapshot: None,
            time_limit: None,
            grace: limits::DEFAULT_GRACE,
            retries: 0,
            array: None,
            on_disconnect: OnDisconnect::Replace,
            labels: BTreeMap::new(),
        }
    }

    /// How many tasks the job has.
    #[must_use]
    pub fn task_count(&self) -> u32 {
        self.array.map_or(1, |array| {
            array.last.saturating_sub(array.first).saturating_add(1)
        })
    }

    /// The task indices in order.
    pub fn task_indices(&self) -> impl DoubleEndedIterator<Item = TaskIndex> + use<> {
        let (first, last) = self.array.map_or((0, 0), |array| (array.first, array.last));
        (first..=last).map(TaskIndex)
    }

    /// Ranks of one attempt.
    #[must_use]
    pub fn world_size(&self) -> u32 {
        self.nodes.saturating_mul(self.procs_per_node)
    }

    /// Checks every rule; the first broken one is named.
    ///
    /// # Errors
    /// The field, what was given, and what is allowed.
    pub fn validate(&self) -> Result<(), InvalidSpec> {
        self.validate_shape()?;
        self.validate_amounts()?;
        self.validate_command()?;
        self.validate_env()?;
        self.validate_labels()
    }

    fn validate_shape(&self) -> Result<(), InvalidSpec> {
        if !is_name(&self.name) {
            return Err(bad(
                "name",
                format!("{:?} is not a name; use {NAME_FORM}", cut(&self.name)),
            ));
        }
        range("nodes", self.nodes, 1, limits::MAX_NODES_PER_JOB)?;
        range(
            "procs_per_node",
            self.procs_per_node,
            1,
            limits::MAX_PROCS_PER_NODE,
        )?;
        range("retries", self.retries, 0, limits::MAX_RETRIES)?;
        if self.targets.len() > limits::MAX_TARGETS {
            return Err(bad(
                "targets",
                format!(
                    "{} are listed; at most {} may be, so leave some out",
                    self.targets.len(),
                    limits::MAX_TARGETS
                ),
            ));
        }
        if let Some(target) = self.targets.iter().find(|target| !is_name(target)) {
            return Err(bad(
                "targets",
                format!(
                    "{:?} is not the name of a target; there are local and attached",
                    cut(target)
                ),
            ));
        }
        let Some(array) = self.array else {
            return Ok(());
        };
        if array.last < array.first {
            return Err(bad(
                "array",
                format!(
                    "the last index {} is below the first, {}; write the smaller one first",
                    array.last, array.first
                ),
            ));
        }
        if array.last - array.first >= limits::MAX_TASKS_PER_JOB {
            let tasks = u64::from(array.last - array.first) + 1;
            return Err(bad(
                "array",
                format!(
                    "{tasks} tasks; at most {} fit into one job, so submit several",
                    limits::MAX_TASKS_PER_JOB
                ),
            ));
        }
        match array.max_running {
            Some(0) => Err(bad(
                "array",
                "at most 0 tasks at a time would never run; use at least 1",
            )),
            Some(_) | None => Ok(()),
        }
    }

    fn validate_amounts(&self) -> Result<(), InvalidSpec> {
        let Resources {
            cpu_milli,
            memory_bytes,
            gpus,
        } = self.resources_per_node;
        range("gpus_per_node", gpus, 0, limits::MAX_GPUS_PER_NODE)?;
        if !(1..=limits::MAX_CPU_MILLI_PER_NODE).contains(&cpu_milli) {
            let (least, most) = (format_cpus(1), format_cpus(limits::MAX_CPU_MILLI_PER_NODE));
            return Err(bad(
                "cpus_per_node",
                format!(
                    "{} is outside {least} to {most}; choose within that",
                    format_cpus(cpu_milli)
                ),
            ));
        }
        if memory_bytes > limits::MAX_MEMORY_PER_NODE {
            let most = format_bytes(limits::MAX_MEMORY_PER_NODE);
            return Err(bad(
                "memory_per_node",
                format!(
                    "{} is above {most}, the most of a node; ask for less",
                    format_bytes(memory_bytes)
                ),
            ));
        }
        if gpus == 0 && (self.gpu_type.is_some() || self.gpu_memory_bytes.is_some()) {
            return Err(bad(
                "gpus_per_node",
                "a GPU type or GPU memory is asked for, but no GPU; ask for at least 1",
            ));
        }
        if let Some(model) = &self.gpu_type
            && (model.is_empty()
                || model.len() > 96
                || !model.chars().any(|c| c.is_ascii_alphanumeric()))
        {
            return Err(bad(
                "gpu_type",
                format!(
                    "{:?} names no GPU model; write one such as H100",
                    cut(model)
                ),
            ));
        }
        if let Some(bytes) = self.gpu_memory_bytes
            && bytes > limits::MAX_MEMORY_PER_NODE
        {
            let most = format_bytes(limits::MAX_MEMORY_PER_NODE);
            return Err(bad(
                "gpu_memory",
                format!("{} is above {most}; ask for less", format_bytes(bytes)),
            ));
        }
        if let Some(limit) = self.time_limit
            && !(limits::MIN_TIME_LIMIT..=limits::MAX_TIME_LIMIT).contains(&limit)
        {
            return Err(outside(
                "time_limit",
                limit,
                limits::MIN_TIME_LIMIT,
                limits::MAX_TIME_LIMIT,
            ));
        }
        if self.grace > limits::MAX_GRACE {
            return Err(outside(
                "grace",
                self.grace,
                Duration::ZERO,
                limits::MAX_GRACE,
            ));
        }
        Ok(())
    }

    fn validate_command(&self) -> Result<(), InvalidSpec> {
        match self.command.first() {
            None => {
                return Err(bad(
                    "command",
                    "is missing; write the program and its arguments after --, or as `command` in a job file",
                ));
            }
            Some(program) if program.is_empty() => {
                return Err(bad(
                    "command",
                    "the program's name is empty; write the program and its arguments",
                ));
            }
            Some(_) => {}
        }
        for argument in &self.command {
            plain_text("command", argument)?;
        }
        let total: usize = self.command.iter().map(|argument| argument.len() + 1).sum();
        most("command", total, limits::MAX_COMMAND_BYTES, "bytes in all")
    }

    fn validate_env(&self) -> Result<(), InvalidSpec> {
        most(
            "env",
            self.env.len(),
            limits::MAX_ENV_VARIABLES,
            "variables",
        )?;
        for (name, value) in &self.env {
            let mut bytes = name.bytes();
            let starts_well = bytes
                .next()
                .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
            if !starts_well || !bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') {
                return Err(bad(
                    "env",
                    format!(
                        "{:?} is not the name of a variable; use letters, digits and '_', not beginning with a digit",
                        cut(name)
                    ),
                ));
            }
            if name.starts_with("YARD_") {
                return Err(bad(
                    "env",
                    format!(
                        "{:?} begins with YARD_, which the runtime sets; use another name",
                        cut(name)
                    ),
                ));
            }
            plain_text("env", value)?;
        }
        let total: usize = self
            .env
            .iter()
            .map(|(name, value)| name.len() + value.len() + 2)
            .sum();
        most("env", total, limits::MAX_ENV_BYTES, "bytes in all")
    }

    fn validate_labels(&self) -> Result<(), InvalidSpec> {
        most("labels", self.labels.len(), limits::MAX_LABELS, "labels")?;
        for (name, value) in &self.labels {
            if !is_name(name) {
                return Err(bad(
                    "labels",
                    format!(
                        "{:?} is not the name of a label; use {NAME_FORM}",
                        cut(name)
                    ),
                ));
            }
            most(
                "labels",
                value.len(),
                limits::MAX_LABEL_VALUE_BYTES,
                "bytes in one value",
            )?;
            plain_text("labels", value)?;
        }
        Ok(())
    }
}

/// A rule of [`JobSpec::validate`] that is broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct InvalidSpec {
    /// The field, by its name in the job file.
    pub field: &'static str,
    /// What is wrong, with the limit and the remedy.
    pub problem: String,
}

fn bad(field: &'static str, problem: impl Into<String>) -> InvalidSpec {
    InvalidSpec {
        field,
        problem: problem.into(),
    }
}

/// What [`is_name`] takes, for messages.
const NAME_FORM: &str =
    "1 to 63 letters, digits, '-', '_' or '.', beginning with a letter or digit";

fn cut(text: &str) -> String {
    text.chars().take(64).collect()
}

fn range(field: &'static str, value: u32, least: u32, most: u32) -> Result<(), InvalidSpec> {
    if (least..=most).contains(&value) {
        Ok(())
    } else {
        Err(bad(
            field,
            format!("{value} is outside {least} to {most}; choose within that"),
        ))
    }
}

fn most(field: &'static str, value: usize, limit: usize, of: &str) -> Result<(), InvalidSpec> {
    if value <= limit {
        Ok(())
    } else {
        Err(bad(
            field,
            format!("{value} {of}; at most {limit} are allowed, so give less"),
        ))
    }
}

fn outside(field: &'static str, value: Duration, least: Duration, most: Duration) -> InvalidSpec {
    let (least, most) = (format_duration(least), format_duration(most));
    bad(
        field,
        format!(
            "{} is outside {least} to {most}; choose within that",
            format_duration(value)
        ),
    )
}

/// What can be handed to a program: no NUL byte, and not longer than the kernel takes.
fn plain_text(field: &'static str, text: &str) -> Result<(), InvalidSpec> {
    if text.contains('\0') {
        return Err(bad(
            field,
            format!(
                "{:?} contains a NUL byte, which no program can be given; leave it out",
                cut(text)
            ),
        ));
    }
    most(
        field,
        text.len(),
        limits::MAX_ARGUMENT_BYTES,
        "bytes in one text",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> JobSpec {
        JobSpec::new("train", vec!["python3".into(), "train.py".into()])
    }

    fn field_of(change: impl FnOnce(&mut JobSpec)) -> &'static str {
        let mut spec = valid();
        change(&mut spec);
        spec.validate().expect_err("the change is invalid").field
    }

    #[test]
    fn the_default_is_valid() {
        assert_eq!(valid().validate(), Ok(()));
    }

    #[test]
    fn each_bad_field_is_named() {
        assert_eq!(field_of(|s| s.name = "a/b".into()), "name");
        assert_eq!(field_of(|s| s.nodes = 0), "nodes");
        assert_eq!(field_of(|s| s.nodes = 1_000_000), "nodes");
        assert_eq!(field_of(|s| s.procs_per_node = 0), "procs_per_node");
        assert_eq!(
            field_of(|s| s.resources_per_node.gpus = u32::MAX),
            "gpus_per_node"
        );
        assert_eq!(
            field_of(|s| s.resources_per_node.cpu_milli = 0),
            "cpus_per_node"
        );
        assert_eq!(
            field_of(|s| s.resources_per_node.memory_bytes = u64::MAX),
            "memory_per_node"
        );
        assert_eq!(
            field_of(|s| s.gpu_type = Some("H100".into())),
            "gpus_per_node"
        );
        assert_eq!(
            field_of(|s| {
                s.resources_per_node.gpus = 1;
                s.gpu_memory_bytes = Some(u64::MAX);
            }),
            "gpu_memory"
        );
        assert_eq!(
            field_of(|s| s.time_limit = Some(Duration::ZERO)),
            "time_limit"
        );
        assert_eq!(
            field_of(|s| s.time_limit = Some(Duration::MAX)),
            "time_limit"
        );
        assert_eq!(field_of(|s| s.grace = Duration::MAX), "grace");
        assert_eq!(field_of(|s| s.retries = 101), "retries");
        assert_eq!(field_of(|s| s.command = vec![]), "command");
        assert_eq!(field_of(|s| s.command[1] = "a\0b".into()), "command");
        assert_eq!(
            field_of(|s| s.command = vec!["x".repeat(100_000); 6]),
            "command"
        );
        assert_eq!(field_of(|s| s.targets = vec!["../x".into()]), "targets");
        assert_eq!(
            field_of(|s| s.array = Some(Array {
                first: 2,
                last: 1,
                max_running: None
            })),
            "array"
        );
        assert_eq!(
            field_of(|s| s.array = Some(Array {
                first: 0,
                last: u32::MAX,
                max_running: None
            })),
            "array"
        );
        assert_eq!(
            field_of(|s| s.array = Some(Array {
                first: 0,
                last: 1,
                max_running: Some(0)
            })),
            "array"
        );
        for name in ["", "1A", "A B", "A=B", "YARD_JOB_ID", "É"] {
            assert_eq!(
                field_of(|s| drop(s.env.insert(name.into(), String::new()))),
                "env",
                "{name:?}"
            );
        }
        assert_eq!(
            field_of(|s| drop(s.labels.insert("a".into(), "x".repeat(257)))),
            "labels"
        );
    }

    #[test]
    fn limits_hold_at_the_bound() {
        let mut spec = valid();
        spec.array = Some(Array {
            first: 1,
            last: limits::MAX_TASKS_PER_JOB,
            max_running: Some(1),
        });
        spec.nodes = limits::MAX_NODES_PER_JOB;
        spec.time_limit = Some(limits::MAX_TIME_LIMIT);
        assert_eq!(spec.validate(), Ok(()));
        assert_eq!(spec.task_count(), limits::MAX_TASKS_PER_JOB);
        assert_eq!(
            spec.task_indices().next_back(),
            Some(TaskIndex(limits::MAX_TASKS_PER_JOB))
        );
    }
}
