//! The job file: YAML with the fields of the job's specification, amounts as people write them.

use std::io::Read;
use std::path::Path;

use crate::args::JobFlags;
use crate::failure::{EXIT_INVALID, EXIT_NOT_FOUND, Failure};
use crate::notyet;
use crate::yaml::{self, Value};

/// A job file is read whole; a larger one is surely another file.
const MAX_JOB_FILE_BYTES: u64 = 4 << 20;

/// A field of a job file.
struct Field {
    name: &'static str,
    /// The flag that says the same.
    flag: &'static str,
    /// Whether the flag was given.
    given: fn(&JobFlags) -> bool,
}

const fn field(name: &'static str, flag: &'static str, given: fn(&JobFlags) -> bool) -> Field {
    Field { name, flag, given }
}

/// What a job file may hold. What is not here is refused by name.
const FIELDS: [Field; 20] = [
    field("name", "--name", |flags| flags.name.is_some()),
    field("workspace", "--workspace", |flags| {
        flags.workspace.is_some()
    }),
    field("targets", "--target", |flags| !flags.target.is_empty()),
    field("nodes", "--nodes", |flags| flags.nodes.is_some()),
    field("procs_per_node", "--procs-per-node", |flags| {
        flags.procs_per_node.is_some()
    }),
    field("gpus_per_node", "--gpus", |flags| flags.gpus.is_some()),
    field("gpu_type", "--gpu-type", |flags| flags.gpu_type.is_some()),
    field("gpu_memory", "--gpu-memory", |flags| {
        flags.gpu_memory.is_some()
    }),
    field("cpus_per_node", "--cpus", |flags| flags.cpus.is_some()),
    field("memory_per_node", "--memory", |flags| {
        flags.memory.is_some()
    }),
    field("launcher", "--launcher", |flags| flags.launcher.is_some()),
    field("command", "--", |flags| !flags.command.is_empty()),
    field("env", "--env", |flags| !flags.env.is_empty()),
    field("dir", "--dir", |flags| flags.dir.is_some()),
    field("time_limit", "--time-limit", |flags| {
        flags.time_limit.is_some()
    }),
    field("grace", "--grace", |flags| flags.grace.is_some()),
    field("retries", "--retries", |flags| flags.retries.is_some()),
    field("array", "--array", |flags| flags.array.is_some()),
    field("on_disconnect", "--on-disconnect", |flags| {
        flags.on_disconnect.is_some()
    }),
    field("labels", "--label", |flags| !flags.label.is_empty()),
];

/// The fields of one job file that are not taken yet.
#[derive(Debug, Default)]
struct JobFile(Vec<(String, Value)>);

impl JobFile {
    fn new(value: Value) -> Result<Self, Failure> {
        let fields = match value {
            Value::Null => Vec::new(),
            Value::Map(fields) => fields,
            other => {
                let kind = other.kind();
                let message =
                    format!("holds {kind}; write fields, such as `command: [python3, train.py]`");
                return Err(Failure::invalid("file", message));
            }
        };
        match fields
            .iter()
            .find(|(name, _)| FIELDS.iter().all(|field| field.name != name))
        {
            Some((name, _)) => Err(notyet::field(name).unwrap_or_else(|| unknown(name))),
            None => Ok(Self(fields)),
        }
    }

    fn take(&mut self, name: &str) -> Value {
        let place = self.0.iter().position(|(field, _)| field == name);
        place.map_or(Value::Null, |place| self.0.swap_remove(place).1)
    }

    /// A number or text.
    fn text(&mut self, name: &str) -> Result<Option<String>, Failure> {
        match self.take(name) {
            Value::Null => Ok(None),
            value => scalar(name, value).map(Some),
        }
    }

    fn nodes(&mut self) -> Result<Option<String>, Failure> {
        match self.take("nodes") {
            Value::Null => Ok(None),
            Value::Map(_) => Err(notyet::elastic("nodes")),
            value => scalar("nodes", value).map(Some),
        }
    }

    fn list(&mut self, name: &str) -> Result<Vec<String>, Failure> {
        match self.take(name) {
            Value::Null => Ok(Vec::new()),
            Value::List(values) => values
                .into_iter()
                .map(|value| scalar(name, value))
                .collect(),
            other => {
                let kind = other.kind();
                Err(Failure::invalid(
                    name,
                    format!("is {kind}; write a list, such as [local, attached]"),
                ))
            }
        }
    }

    /// `NAME=VALUE` for each entry.
    fn pairs(&mut self, name: &str) -> Result<Vec<String>, Failure> {
        let entries = match self.take(name) {
            Value::Null => Vec::new(),
            Value::Map(entries) => entries,
            other => {
                let kind = other.kind();
                return Err(Failure::invalid(
                    name,
                    format!("is {kind}; write a mapping, such as {{NAME: value}}"),
                ));
            }
        };
        let pair = |(key, value): (String, Value)| match value {
            // In the form of a flag the name would end there.
            _ if key.contains('=') => Err(Failure::invalid(
                name,
                format!("{key:?} is not a name; leave the '=' out"),
            )),
            Value::Null => Err(Failure::invalid(
                name,
                format!("{key} has no value; write \"\" for an empty one"),
            )),
            value => Ok(format!("{key}={}", scalar(name, value)?)),
        };
        entries.into_iter().map(pair).collect()
    }

    /// The program and its arguments; one line of text is for the shell.
    fn command(&mut self) -> Result<Vec<String>, Failure> {
        match self.take("command") {
            Value::Null => Ok(Vec::new()),
            Value::List(values) => values
                .into_iter()
                .map(|value| scalar("command", value))
                .collect(),
            Value::Text(line) if line.trim().is_empty() => Err(Failure::invalid(
                "command",
                "is empty; write the program and its arguments",
            )),
            Value::Text(line) => Ok(vec!["sh".to_owned(), "-c".to_owned(), line]),
            other => {
                let kind = other.kind();
                let message = format!(
                    "is {kind}; write a list of arguments, or one line of text for the shell"
                );
                Err(Failure::invalid("command", message))
            }
        }
    }
}

fn scalar(name: &str, value: Value) -> Result<String, Failure> {
    match value {
        Value::Plain(text) | Value::Text(text) => Ok(text),
        other => {
            let kind = other.kind();
            Err(Failure::invalid(
                name,
                format!("{kind} stands where a number or text should"),
            ))
        }
    }
}

/// The refusal of a field that is none.
fn unknown(name: &str) -> Failure {
    let flag = format!("--{}", name.replace('_', "-"));
    let near = |field: &&Field| {
        field.flag == flag || field.name.starts_with(name) || distance(field.name, name) <= 2
    };
    let remedy = match FIELDS.iter().find(near) {
        Some(field) => format!("did you mean {}?", field.name),
        None => {
            let all: Vec<&str> = FIELDS.iter().map(|field| field.name).collect();
            format!("the fields are {}", all.join(", "))
        }
    };
    Failure::invalid(name, format!("is not a field of a job file; {remedy}"))
}

/// Letters to add, drop or change to come from one name to the other.
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (place, a) in one.bytes().enumerate() {
        let mut corner = place;
        row[0] = place + 1;
        for (column, b) in other.bytes().enumerate() {
            let change = corner + usize::from(a != b);
            corner = row[column + 1];
            row[column + 1] = change.min(corner + 1).min(row[column] + 1);
        }
    }
    row[other.len()]
}

/// The flags together with what their job file says; a flag counts more than the file.
pub(crate) fn merge(flags: JobFlags) -> Result<JobFlags, Failure> {
    let Some(path) = flags.file.clone() else {
        return Ok(flags);
    };
    let file = read(&path).map_err(|failure| in_file(failure, &path))?;
    with_file(flags, file, &path).map_err(|failure| in_file(failure, &path))
}

fn with_file(flags: JobFlags, mut file: JobFile, path: &Path) -> Result<JobFlags, Failure> {
    let base = path.parent().unwrap_or(Path::new("."));
    // Flags come last, so that they win where both name the same thing.
    let pairs = |filed: Vec<String>, given: Vec<String>| filed.into_iter().chain(given).collect();
    // Every field is read, also where a flag counts more: a file is valid or it is not.
    let (targets, command, dir) = (file.list("targets")?, file.command()?, file.text("dir")?);
    let either = |given: Vec<String>, filed: Vec<String>| match given.is_empty() {
        true => filed,
        false => given,
    };
    Ok(JobFlags {
        file: None,
        name: over(flags.name, file.text("name")?),
        workspace: over(flags.workspace, file.text("workspace")?),
        target: either(flags.target, targets),
        nodes: over(flags.nodes, file.nodes()?),
        procs_per_node: over(flags.procs_per_node, file.text("procs_per_node")?),
        gpus: over(flags.gpus, file.text("gpus_per_node")?),
        gpu_type: over(flags.gpu_type, file.text("gpu_type")?),
        gpu_memory: over(flags.gpu_memory, file.text("gpu_memory")?),
        cpus: over(flags.cpus, file.text("cpus_per_node")?),
        memory: over(flags.memory, file.text("memory_per_node")?),
        launcher: over(flags.launcher, file.text("launcher")?),
        env: pairs(file.pairs("env")?, flags.env),
        dir: match (flags.dir, flags.no_dir) {
            (None, false) => dir.map(|dir| base.join(dir)),
            (dir, _) => dir,
        },
        // With a job file the directory is what the file says; the current one is not taken by surprise.
        no_dir: true,
        time_limit: over(flags.time_limit, file.text("time_limit")?),
        retries: over(flags.retries, file.text("retries")?),
        grace: over(flags.grace, file.text("grace")?),
        array: over(flags.array, file.text("array")?),
        on_disconnect: over(flags.on_disconnect, file.text("on_disconnect")?),
        label: pairs(file.pairs("labels")?, flags.label),
        command: either(flags.command, command),
        request_id: flags.request_id,
        allow_infeasible: flags.allow_infeasible,
        json: flags.json,
    })
}

/// What a flag says counts more than what a file says.
fn over(given: Option<String>, filed: Option<String>) -> Option<String> {
    given.or(filed)
}

fn read(path: &Path) -> Result<JobFile, Failure> {
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            let mut failure = Failure::invalid("file", "there is no such file; see --file");
            failure.exit = EXIT_NOT_FOUND;
            failure
        }
        std::io::ErrorKind::IsADirectory => {
            Failure::invalid("file", "is a directory; name a YAML file")
        }
        _ => Failure::path("read the job file", path, &error),
    };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    // What a file says of its size need not be so.
    file.take(MAX_JOB_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > MAX_JOB_FILE_BYTES {
        let message = "is larger than a job file may be, 4 MiB; is it the right one?";
        return Err(Failure::invalid("file", message));
    }
    let text = String::from_utf8(bytes)
        .map_err(|_| Failure::invalid("file", "is not UTF-8 text; is it the right one?"))?;
    parse(&text)
}

fn parse(text: &str) -> Result<JobFile, Failure> {
    let value = yaml::parse(text)
        .map_err(|problem| Failure::new(EXIT_INVALID, "INVALID_JOB_FILE", problem))?;
    JobFile::new(value)
}

/// A failure with the file that it is about in front.
fn in_file(mut failure: Failure, path: &Path) -> Failure {
    if failure.exit == crate::failure::EXIT_USAGE {
        failure.exit = EXIT_INVALID;
    }
    failure.message = format!("{}: {}", path.display(), failure.message);
    failure
}

/// The failure of a flag or field, told as what the user wrote: the file's field, or the flag with the field's name.
pub(crate) fn blame(mut failure: Failure, given: &JobFlags) -> Failure {
    let Some(at) = failure.field.clone() else {
        return failure;
    };
    // On the wire the specification is part of a request.
    let at = at.strip_prefix("spec.").unwrap_or(&at).to_owned();
    let known = |field: &&Field| field.name == at || field.flag == at;
    let Some(field) = FIELDS.iter().find(known) else {
        return failure;
    };
    // Behind the name may come the value: `--launcher mpi: …`.
    let rest = match failure.message.strip_prefix(&at) {
        Some(rest) => rest.to_owned(),
        None => format!(": {}", failure.message),
    };
    match &given.file {
        Some(path) if !(field.given)(given) => {
            failure.message = format!("{}{rest}", field.name);
            failure.field = Some(field.name.to_owned());
            in_file(failure, path)
        }
        _ => {
            if at == field.name && field.flag != "--" {
                failure.message = format!("{} ({}){rest}", field.name, field.flag);
            }
            failure.field = Some(at);
            failure
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(text: &str) -> Result<JobFlags, Failure> {
        with_file(JobFlags::default(), parse(text)?, Path::new("dir/job.yaml"))
    }

    #[test]
    fn scalars_keep_their_text_whatever_they_look_like() {
        let flags = merged(
            "nodes: 2\ncpus_per_node: 0.5\nenv: {A: 1, B: true, C: x}\ncommand: [python3, -c, 1]\ndir: code\n",
        )
        .unwrap();
        assert_eq!(flags.nodes.as_deref(), Some("2"));
        assert_eq!(flags.cpus.as_deref(), Some("0.5"));
        assert_eq!(flags.env, ["A=1", "B=true", "C=x"]);
        assert_eq!(flags.command, ["python3", "-c", "1"]);
        assert_eq!(flags.dir.as_deref(), Some(Path::new("dir/code")));
    }

    #[test]
    fn a_command_line_goes_to_the_shell() {
        let flags = merged("command: echo a && echo b\n").unwrap();
        assert_eq!(flags.command, ["sh", "-c", "echo a && echo b"]);
    }

    #[test]
    fn a_flag_counts_more_than_the_file() {
        let given = JobFlags {
            nodes: Some("3".into()),
            name: Some("mine".into()),
            env: vec!["A=2".into()],
            ..JobFlags::default()
        };
        let file = parse("name: its\nnodes: 2\nenv: {A: 1}\n").unwrap();
        let flags = with_file(given, file, Path::new("job.yaml")).unwrap();
        assert_eq!(flags.name.as_deref(), Some("mine"));
        assert_eq!(flags.nodes.as_deref(), Some("3"));
        assert_eq!(flags.env, ["A=1", "A=2"], "the last one counts");
    }

    #[test]
    fn each_fault_names_the_field_and_the_remedy() {
        for (text, field, message) in [
            (
                "comand: [x]",
                "comand",
                "comand: is not a field of a job file; did you mean command?",
            ),
            (
                "cpus: 4",
                "cpus",
                "cpus: is not a field of a job file; did you mean cpus_per_node?",
            ),
            (
                "gpus: 4",
                "gpus",
                "gpus: is not a field of a job file; did you mean gpus_per_node?",
            ),
            (
                "label: {}",
                "label",
                "label: is not a field of a job file; did you mean labels?",
            ),
            (
                "nodes: [1]",
                "nodes",
                "nodes: a list stands where a number or text should",
            ),
            (
                "time_limit: {a: b}",
                "time_limit",
                "time_limit: a mapping stands where a number or text should",
            ),
            (
                "command: {a: 1}",
                "command",
                "command: is a mapping; write a list of arguments, or one line of text for the shell",
            ),
            (
                "command: 5",
                "command",
                "command: is a number or truth value; write a list of arguments, or one line of text for the shell",
            ),
            (
                "command: ' '",
                "command",
                "command: is empty; write the program and its arguments",
            ),
            (
                "command: [a, [b]]",
                "command",
                "command: a list stands where a number or text should",
            ),
            (
                "targets: local",
                "targets",
                "targets: is text; write a list, such as [local, attached]",
            ),
            (
                "env: [A=1]",
                "env",
                "env: is a list; write a mapping, such as {NAME: value}",
            ),
            (
                "env: {A: ~}",
                "env",
                "env: A has no value; write \"\" for an empty one",
            ),
            (
                "env: {A=B: x}",
                "env",
                "env: \"A=B\" is not a name; leave the '=' out",
            ),
            (
                "labels: {a: [1]}",
                "labels",
                "labels: a list stands where a number or text should",
            ),
            (
                "image: x",
                "image",
                "image: is not in this version of Trainyard; leave it out",
            ),
            (
                "priority: high",
                "priority",
                "priority: is not in this version of Trainyard; leave it out",
            ),
            (
                "preemptible: false",
                "preemptible",
                "preemptible: is not in this version of Trainyard; leave it out",
            ),
            (
                "after: j1",
                "after",
                "after: is not in this version of Trainyard; leave it out",
            ),
            (
                "nodes: {min: 1, max: 4}",
                "nodes",
                "nodes MIN..MAX: is not in this version of Trainyard; leave it out",
            ),
            (
                "- a",
                "file",
                "file: holds a list; write fields, such as `command: [python3, train.py]`",
            ),
        ] {
            let failure = merged(text).expect_err(text);
            assert_eq!(failure.field.as_deref(), Some(field), "{text}");
            assert_eq!(failure.message, message, "{text}");
        }
        let all = merged("colour: red").unwrap_err().message;
        assert!(
            all.contains("the fields are name, workspace, targets"),
            "{all}"
        );
    }

    #[test]
    fn a_fault_is_told_as_what_the_user_wrote() {
        let by_file = JobFlags {
            file: Some("job.yaml".into()),
            ..JobFlags::default()
        };
        let told = |field: &str, message: &str, given: &JobFlags| {
            let mut failure = Failure::new(crate::failure::EXIT_USAGE, "X", message);
            failure.field = Some(field.to_owned());
            let failure = blame(failure, given);
            (failure.exit, failure.message)
        };
        assert_eq!(
            told("--memory", "--memory: is bad", &by_file),
            (65, "job.yaml: memory_per_node: is bad".to_owned())
        );
        assert_eq!(
            told("--launcher", "--launcher mpi: is not here", &by_file),
            (65, "job.yaml: launcher mpi: is not here".to_owned())
        );
        assert_eq!(
            told("grace", "grace: is long", &by_file),
            (65, "job.yaml: grace: is long".to_owned())
        );
        let by_flag = JobFlags {
            grace: Some("2h".into()),
            ..by_file
        };
        assert_eq!(
            told("grace", "grace: is long", &by_flag),
            (64, "grace (--grace): is long".to_owned())
        );
        assert_eq!(
            told("spec.workspace", "there is no such", &by_flag),
            (65, "job.yaml: workspace: there is no such".to_owned())
        );
        assert_eq!(
            told("--grace", "--grace: is no time", &by_flag),
            (64, "--grace: is no time".to_owned())
        );
    }
}
