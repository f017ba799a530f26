//! From flags to a job's specification. What a specification may hold is decided in `trainyard_common::spec`; here is
//! only how it is written.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use trainyard_common::limits;
use trainyard_common::spec::{Array, InvalidSpec, JobSpec};
use trainyard_common::units::{format_duration, parse_bytes, parse_cpus, parse_duration};

use crate::args::JobFlags;
use crate::failure::{EXIT_INVALID, Failure};
use crate::notyet;

/// The specification that flags ask for, checked; without the snapshot.
pub(crate) fn spec(flags: &JobFlags) -> Result<JobSpec, Failure> {
    let mut spec = JobSpec::new(job_name(flags), flags.command.clone());
    if let Some(workspace) = &flags.workspace {
        spec.workspace = workspace
            .parse()
            .map_err(|error| Failure::usage("--workspace", error))?;
    }
    spec.targets.clone_from(&flags.target);
    spec.nodes = nodes(flags.nodes.as_deref())?;
    spec.procs_per_node = count(
        "--procs-per-node",
        flags.procs_per_node.as_deref(),
        1,
        1,
        limits::MAX_PROCS_PER_NODE,
    )?;
    spec.resources_per_node.gpus = count(
        "--gpus",
        flags.gpus.as_deref(),
        0,
        0,
        limits::MAX_GPUS_PER_NODE,
    )?;
    if let Some(text) = &flags.cpus {
        spec.resources_per_node.cpu_milli =
            parse_cpus(text).map_err(|error| Failure::usage("--cpus", error))?;
    }
    if let Some(text) = &flags.memory {
        spec.resources_per_node.memory_bytes = memory("--memory", text)?;
    }
    spec.gpu_type.clone_from(&flags.gpu_type);
    if let Some(text) = &flags.gpu_memory {
        spec.gpu_memory_bytes = Some(memory("--gpu-memory", text)?);
    }
    if let Some(text) = &flags.launcher {
        spec.launcher = one_of("--launcher", text)?;
    }
    spec.env = pairs(&flags.env, |name| match std::env::var(name) {
        Ok(value) => Ok(value),
        Err(_) => Err(Failure::usage(
            "--env",
            format!("{name:?} is not NAME=VALUE, and no variable of that name is set to text"),
        )),
    })?;
    spec.labels = pairs(&flags.label, |text| {
        Err(Failure::usage(
            "--label",
            format!("{text:?} is not NAME=VALUE"),
        ))
    })?;
    spec.time_limit = flags
        .time_limit
        .as_deref()
        .map(|text| duration("--time-limit", text))
        .transpose()?;
    if let Some(text) = &flags.grace {
        spec.grace = duration("--grace", text)?;
    }
    spec.retries = count(
        "--retries",
        flags.retries.as_deref(),
        0,
        0,
        limits::MAX_RETRIES,
    )?;
    spec.array = flags.array.as_deref().map(array).transpose()?;
    if let Some(text) = &flags.on_disconnect {
        spec.on_disconnect = one_of("--on-disconnect", text)?;
    }
    spec.validate().map_err(|error| invalid(&error))?;
    Ok(spec)
}

/// An amount of memory given to a flag. None at all is said by leaving the flag out.
fn memory(flag: &str, text: &str) -> Result<u64, Failure> {
    match parse_bytes(text) {
        Ok(0) => Err(Failure::usage(
            flag,
            "0 is no amount of memory; leave it out if it is not to be counted",
        )),
        Ok(bytes) => Ok(bytes),
        Err(error) => Err(Failure::usage(flag, error)),
    }
}

/// The directory to send, if any. `default` is what is sent when nothing was said.
pub(crate) fn directory(flags: &JobFlags, default: Option<&Path>) -> Option<PathBuf> {
    match (&flags.dir, flags.no_dir) {
        (Some(dir), _) => Some(dir.clone()),
        (None, true) => None,
        (None, false) => default.map(Path::to_path_buf),
    }
}

/// A duration given to a flag.
pub(crate) fn duration(flag: &str, text: &str) -> Result<Duration, Failure> {
    parse_duration(text).map_err(|error| Failure::usage(flag, error))
}

/// A duration given to a flag, if it is within a range, which the message names.
pub(crate) fn within(
    flag: &str,
    given: Duration,
    range: RangeInclusive<Duration>,
) -> Result<Duration, Failure> {
    if range.contains(&given) {
        return Ok(given);
    }
    let (given, least, most) = (
        format_duration(given),
        format_duration(*range.start()),
        format_duration(*range.end()),
    );
    let message = format!("{given} is outside {least} to {most}; choose within that");
    Err(Failure::usage(flag, message))
}

/// The CPUs of a node in milli-CPUs, as `--cpus` of an agent gives them.
pub(crate) fn cpus_of_node(text: &str) -> Result<u64, Failure> {
    match parse_cpus(text).map_err(|error| Failure::usage("--cpus", error))? {
        0 => Err(Failure::usage(
            "--cpus",
            "a node without CPUs could run nothing; give it some",
        )),
        milli => Ok(milli),
    }
}

/// The memory of a node in bytes, as `--memory` of an agent gives it.
pub(crate) fn memory_of_node(text: &str) -> Result<u64, Failure> {
    match parse_bytes(text).map_err(|error| Failure::usage("--memory", error))? {
        0 => Err(Failure::usage(
            "--memory",
            "a node without memory could run nothing; give it some",
        )),
        bytes => Ok(bytes),
    }
}

/// A whole number given to a flag, within a range that the message names.
pub(crate) fn count(
    flag: &str,
    text: Option<&str>,
    default: u32,
    least: u32,
    most: u32,
) -> Result<u32, Failure> {
    let Some(text) = text else { return Ok(default) };
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse::<u32>() {
        Ok(number) if plain && (least..=most).contains(&number) => Ok(number),
        _ => Err(Failure::usage(
            flag,
            format!("{text:?} is not a whole number from {least} to {most}"),
        )),
    }
}

fn invalid(error: &InvalidSpec) -> Failure {
    let mut failure = Failure::new(EXIT_INVALID, "INVALID_FIELD", error.to_string());
    failure.field = Some(error.field.to_owned());
    failure
}

fn nodes(text: Option<&str>) -> Result<u32, Failure> {
    if text.is_some_and(|text| text.contains("..")) {
        return Err(notyet::elastic("--nodes"));
    }
    count("--nodes", text, 1, 1, limits::MAX_NODES_PER_JOB)
}

/// One of a few words given to a flag.
fn one_of<T: FromStr<Err: Display>>(flag: &str, text: &str) -> Result<T, Failure> {
    if let Some(failure) = notyet::value(flag, text) {
        return Err(failure);
    }
    text.parse().map_err(|error| Failure::usage(flag, error))
}

/// `FIRST-LAST`, `FIRST-LAST%MAX` or one index.
fn array(text: &str) -> Result<Array, Failure> {
    let refuse = || {
        Failure::usage(
            "--array",
            format!(
                "{text:?} is not FIRST-LAST or FIRST-LAST%MAX with whole numbers up to {}, such as 0-99%10",
                u32::MAX
            ),
        )
    };
    fn number<E: Display>(text: &str, refuse: impl Fn() -> E) -> Result<u32, E> {
        let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        u32::from_str(text)
            .ok()
            .filter(|_| plain)
            .ok_or_else(refuse)
    }
    let (range, max_running) = match text.split_once('%') {
        Some((range, most)) => (
            range,
            Some(number(most, || refuse().message).map_err(|_| refuse())?),
        ),
        None => (text, None),
    };
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let parse = |text| number(text, || refuse().message).map_err(|_| refuse());
    Ok(Array {
        first: parse(first)?,
        last: parse(last)?,
        max_running,
    })
}

/// Names and values; what stands for a name alone is decided by `alone`.
fn pairs(
    given: &[String],
    alone: impl Fn(&str) -> Result<String, Failure>,
) -> Result<BTreeMap<String, String>, Failure> {
    let mut pairs = BTreeMap::new();
    for text in given {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, value.to_owned()),
            None => (text.as_str(), alone(text)?),
        };
        pairs.insert(name.to_owned(), value);
    }
    Ok(pairs)
}

/// The given name, or one made from the program: `python3 train.py` is called `train`.
fn job_name(flags: &JobFlags) -> String {
    if let Some(name) = &flags.name {
        return name.clone();
    }
    let mut words = flags.command.iter();
    let program = words.next().map(|word| stem(word)).unwrap_or_default();
    let mut script = || {
        words
            .find(|word| !word.starts_with('-'))
            .map(|word| stem(word))
    };
    let name = if program.starts_with("python") {
        script().unwrap_or(program)
    } else {
        program
    };
    let name: String = name
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') {
                c
            } else {
                '-'
            }
        })
        .skip_while(|c| !c.is_ascii_alphanumeric())
        .take(63)
        .collect();
    if name.is_empty() {
        "job".to_owned()
    } else {
        name
    }
}

fn stem(word: &str) -> String {
    Path::new(word)
        .file_stem()
        .map(|stem| stem.to_string_lossy().into_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(command: &[&str]) -> JobFlags {
        JobFlags {
            command: command.iter().map(ToString::to_string).collect(),
            ..JobFlags::default()
        }
    }

    #[test]
    fn a_name_is_made_from_the_program() {
        assert_eq!(
            job_name(&flags(&["python3", "-u", "src/train.py"])),
            "train"
        );
        assert_eq!(job_name(&flags(&["/bin/true"])), "true");
        assert_eq!(job_name(&flags(&["./weird name!"])), "weird-name-");
        assert_eq!(job_name(&flags(&["((("])), "job");
        assert_eq!(job_name(&flags(&["python3"])), "python3");
    }

    #[test]
    fn arrays_are_read() {
        assert_eq!(
            array("0-9%2").unwrap(),
            Array {
                first: 0,
                last: 9,
                max_running: Some(2)
            }
        );
        assert_eq!(
            array("7").unwrap(),
            Array {
                first: 7,
                last: 7,
                max_running: None
            }
        );
        for bad in [
            "",
            "-",
            "1-",
            "-1",
            "1-2-3",
            "1-2%",
            "a-b",
            "+1-2",
            "1 -2",
            "99999999999-1",
        ] {
            assert!(array(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_not_built_is_refused_and_not_ignored() {
        for (nodes, launcher) in [(Some("2..8"), None), (None, Some("mpi"))] {
            let mut given = flags(&["true"]);
            given.nodes = nodes.map(Into::into);
            given.launcher = launcher.map(Into::into);
            assert_eq!(spec(&given).unwrap_err().reason, "NOT_BUILT");
        }
    }

    #[test]
    fn numbers_out_of_range_name_the_flag_and_the_range() {
        for bad in ["-1", "0", "1e3", "NaN", "１", "99999999999", ""] {
            let mut given = flags(&["true"]);
            given.nodes = Some(bad.into());
            let failure = spec(&given).unwrap_err();
            assert_eq!(failure.field.as_deref(), Some("--nodes"), "{bad:?}");
            assert!(
                failure.message.contains("1 to 10000"),
                "{}",
                failure.message
            );
        }
    }

    #[test]
    fn a_cpu_for_each_node_unless_said_otherwise() {
        let mut given = flags(&["true"]);
        given.procs_per_node = Some("4".into());
        assert_eq!(spec(&given).unwrap().resources_per_node.cpu_milli, 1000);
        given.cpus = Some("0.5".into());
        assert_eq!(spec(&given).unwrap().resources_per_node.cpu_milli, 500);
    }
}
