//! The job file: YAML with the fields of the job's specification, amounts as people write them.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Deserializer};

use crate::args::JobFlags;
use crate::failure::{EXIT_INVALID, Failure};

/// A job file is read whole; a larger one is surely another file.
const MAX_JOB_FILE_BYTES: u64 = 4 << 20;

/// What a job file may hold. What is not here is refused by name.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct JobFile {
    name: Option<String>,
    workspace: Option<String>,
    targets: Option<Vec<String>>,
    nodes: Option<Scalar>,
    procs_per_node: Option<Scalar>,
    gpus_per_node: Option<Scalar>,
    gpu_type: Option<String>,
    gpu_memory: Option<Scalar>,
    cpus_per_node: Option<Scalar>,
    memory_per_node: Option<Scalar>,
    launcher: Option<String>,
    command: Option<CommandLine>,
    env: Option<BTreeMap<String, Scalar>>,
    dir: Option<String>,
    time_limit: Option<Scalar>,
    grace: Option<Scalar>,
    retries: Option<Scalar>,
    array: Option<Scalar>,
    on_disconnect: Option<String>,
    labels: Option<BTreeMap<String, Scalar>>,
}

/// A number, truth value or text, kept as text: what it means is decided where flags are read, too.
#[derive(Debug, Clone)]
struct Scalar(String);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Scalar;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a number or text")
            }
            fn visit_bool<E>(self, value: bool) -> Result<Scalar, E> {
                Ok(Scalar(value.to_string()))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Scalar, E> {
                Ok(Scalar(value.to_string()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Scalar, E> {
                Ok(Scalar(value.to_string()))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Scalar, E> {
                Ok(Scalar(value.to_string()))
            }
            fn visit_str<E>(self, value: &str) -> Result<Scalar, E> {
                Ok(Scalar(value.to_owned()))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A list of arguments, or one line for the shell.
#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "command: expected a list of arguments, or one line of text for the shell"
)]
enum CommandLine {
    Arguments(Vec<Scalar>),
    Shell(String),
}

impl CommandLine {
    fn into_arguments(self) -> Vec<String> {
        match self {
            Self::Arguments(arguments) => arguments
                .into_iter()
                .map(|Scalar(argument)| argument)
                .collect(),
            Self::Shell(line) => vec!["sh".to_owned(), "-c".to_owned(), line],
        }
    }
}

/// The flags together with what their job file says; a flag counts more than the file.
pub(crate) fn merge(flags: JobFlags) -> Result<JobFlags, Failure> {
    let Some(path) = flags.file.clone() else {
        return Ok(flags);
    };
    let file = read(&path)?;
    let base = path.parent().unwrap_or(Path::new("."));
    let text =
        |given: Option<String>, filed: Option<Scalar>| given.or(filed.map(|Scalar(text)| text));
    let pairs = |filed: Option<BTreeMap<String, Scalar>>, given: Vec<String>| {
        // Flags come last, so that they win where both name the same thing.
        let filed = filed
            .unwrap_or_default()
            .into_iter()
            .map(|(name, Scalar(value))| format!("{name}={value}"));
        filed.chain(given).collect()
    };
    Ok(JobFlags {
        file: None,
        name: flags.name.or(file.name),
        workspace: flags.workspace.or(file.workspace),
        target: if flags.target.is_empty() {
            file.targets.unwrap_or_default()
        } else {
            flags.target
        },
        nodes: text(flags.nodes, file.nodes),
        procs_per_node: text(flags.procs_per_node, file.procs_per_node),
        gpus: text(flags.gpus, file.gpus_per_node),
        gpu_type: flags.gpu_type.or(file.gpu_type),
        gpu_memory: text(flags.gpu_memory, file.gpu_memory),
        cpus: text(flags.cpus, file.cpus_per_node),
        memory: text(flags.memory, file.memory_per_node),
        launcher: flags.launcher.or(file.launcher),
        env: pairs(file.env, flags.env),
        dir: match (flags.dir, flags.no_dir) {
            (None, false) => file.dir.map(|dir| base.join(dir)),
            (dir, _) => dir,
        },
        // With a job file the directory is what the file says; the current one is not taken by surprise.
        no_dir: true,
        time_limit: text(flags.time_limit, file.time_limit),
        retries: text(flags.retries, file.retries),
        grace: text(flags.grace, file.grace),
        array: text(flags.array, file.array),
        on_disconnect: flags.on_disconnect.or(file.on_disconnect),
        label: pairs(file.labels, flags.label),
        command: if flags.command.is_empty() {
            file.command
                .map(CommandLine::into_arguments)
                .unwrap_or_default()
        } else {
            flags.command
        },
        request_id: flags.request_id,
        allow_infeasible: flags.allow_infeasible,
        json: flags.json,
        image: flags.image,
        priority: flags.priority,
        preemptible: flags.preemptible,
        after: flags.after,
        run_as: flags.run_as,
    })
}

fn read(path: &Path) -> Result<JobFile, Failure> {
    let failed = |error| Failure::path("read the job file", path, &error);
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    // What a file says of its size need not be so.
    file.take(MAX_JOB_FILE_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    if text.len() as u64 > MAX_JOB_FILE_BYTES {
        let message = format!("{} is larger than a job file may be, 4 MiB", path.display());
        return Err(Failure::invalid("file", message));
    }
    parse(&text).map_err(|error| {
        let message = format!("{}: {error}", path.display());
        Failure::new(EXIT_INVALID, "INVALID_JOB_FILE", message)
    })
}

/// The failure of a flag as one of the file's field, if it is the file that said it.
pub(crate) fn blame(failure: Failure, given: &JobFlags) -> Failure {
    let (Some(path), Some(flag)) = (&given.file, failure.field.as_deref()) else {
        return failure;
    };
    let by_flag = match flag {
        "--nodes" => given.nodes.is_some(),
        "--procs-per-node" => given.procs_per_node.is_some(),
        "--gpus" => given.gpus.is_some(),
        "--gpu-memory" => given.gpu_memory.is_some(),
        "--cpus" => given.cpus.is_some(),
        "--memory" => given.memory.is_some(),
        "--launcher" => given.launcher.is_some(),
        "--time-limit" => given.time_limit.is_some(),
        "--grace" => given.grace.is_some(),
        "--retries" => given.retries.is_some(),
        "--array" => given.array.is_some(),
        "--on-disconnect" => given.on_disconnect.is_some(),
        "--workspace" => given.workspace.is_some(),
        _ => true,
    };
    if by_flag {
        return failure;
    }
    let field = match flag {
        "--gpus" => "gpus_per_node".to_owned(),
        "--cpus" => "cpus_per_node".to_owned(),
        "--memory" => "memory_per_node".to_owned(),
        other => other.trim_start_matches('-').replace('-', "_"),
    };
    let message = failure.message.replacen(flag, &field, 1);
    let mut blamed = Failure::new(
        EXIT_INVALID,
        "INVALID_FIELD",
        format!("{}: {message}", path.display()),
    );
    blamed.field = Some(field);
    blamed
}

fn parse(text: &str) -> Result<JobFile, serde_saphyr::Error> {
    serde_saphyr::from_str(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_keep_their_text_whatever_they_look_like() {
        let file = parse(
            "nodes: 2\ncpus_per_node: 0.5\nenv: {A: 1, B: true, C: x}\ncommand: [python3, -c, 1]\n",
        )
        .unwrap();
        assert_eq!(file.nodes.unwrap().0, "2");
        assert_eq!(file.cpus_per_node.unwrap().0, "0.5");
        let env: Vec<_> = file
            .env
            .unwrap()
            .into_iter()
            .map(|(name, Scalar(value))| format!("{name}={value}"))
            .collect();
        assert_eq!(env, ["A=1", "B=true", "C=x"]);
        assert_eq!(
            file.command.unwrap().into_arguments(),
            ["python3", "-c", "1"]
        );
    }

    #[test]
    fn a_command_line_goes_to_the_shell() {
        let file = parse("command: echo a && echo b\n").unwrap();
        assert_eq!(
            file.command.unwrap().into_arguments(),
            ["sh", "-c", "echo a && echo b"]
        );
    }

    #[test]
    fn unknown_fields_are_named() {
        let error = parse("comand: [x]\n").unwrap_err().to_string();
        assert!(error.contains("comand"), "{error}");
    }
}
