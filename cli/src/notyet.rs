//! The names of the design that this version has not built: commands, flags, values and fields of a job file. One table
//! for all, so that each is refused in the same words and none is ever ignored or called unknown.
//!
//! A name leaves this table when it is built. None of them is in the help or in completion scripts.

use crate::failure::{EXIT_INVALID, EXIT_USAGE, Failure};

/// Commands, and what to do instead; empty if there is nothing.
const COMMANDS: [(&str, &str); 12] = [
    ("retry", "submit the job again with `yard submit`"),
    ("queue", "`yard jobs` lists what waits, and why"),
    (
        "explain",
        "`yard job ID` tells the reason, attempt by attempt",
    ),
    (
        "plan",
        "`yard submit` refuses what no nodes could hold, and `yard nodes` lists what is free",
    ),
    ("exec", ""),
    ("top", "`yard jobs` and `yard nodes` show what there is now"),
    ("events", "`yard job ID` tells what happened to a job"),
    ("simulate", ""),
    ("drain", "`yard cordon NODE` gives it no new work"),
    ("workspace", "there is one workspace, default"),
    ("pool", "machines join with `yard token create --node`"),
    ("agent upgrade", ""),
];

/// Flags of a job.
const JOB_FLAGS: [&str; 5] = [
    "--image",
    "--priority",
    "--preemptible",
    "--after",
    "--run-as",
];

/// Flags by their command.
const FLAGS: [(&str, &[&str]); 4] = [
    ("run", &JOB_FLAGS),
    ("submit", &JOB_FLAGS),
    ("token create", &["--pool"]),
    ("join", &["--service", "--pool"]),
];

/// Values by the flag that takes them.
const VALUES: [(&str, &[&str]); 1] = [("--launcher", &["mpi", "jax", "tensorflow"])];

/// Fields of a job file.
const FIELDS: [&str; 5] = ["image", "priority", "preemptible", "after", "run_as"];

/// The refusal of a command by its words, such as `agent upgrade`, if it is still to come.
pub(crate) fn command(words: &str) -> Option<Failure> {
    let (_, instead) = COMMANDS.iter().find(|(name, _)| *name == words)?;
    let instead = match *instead {
        "" => "see `yard --help` for what is",
        instead => instead,
    };
    let message = format!("`yard {words}` is not in this version of Trainyard; {instead}");
    Some(Failure::new(EXIT_USAGE, "NOT_BUILT", message))
}

/// The refusal of a flag of a command, if it is still to come.
pub(crate) fn flag(command: &str, flag: &str) -> Option<Failure> {
    let (_, flags) = FLAGS.iter().find(|(name, _)| *name == command)?;
    flags.contains(&flag).then(|| refuse(flag, flag))
}

/// The refusal of a flag's value, if it is still to come.
pub(crate) fn value(flag: &str, value: &str) -> Option<Failure> {
    let (_, values) = VALUES.iter().find(|(name, _)| *name == flag)?;
    values
        .contains(&value)
        .then(|| refuse(flag, &format!("{flag} {value}")))
}

/// The refusal of a gang of changing size, by the flag or field that asks for it.
pub(crate) fn elastic(nodes: &str) -> Failure {
    refuse(nodes, &format!("{nodes} MIN..MAX"))
}

/// The refusal of a field of a job file, if it is still to come.
pub(crate) fn field(field: &str) -> Option<Failure> {
    FIELDS.contains(&field).then(|| {
        let mut failure = refuse(field, field);
        failure.exit = EXIT_INVALID;
        failure
    })
}

fn refuse(field: &str, what: &str) -> Failure {
    let message = format!("{what}: is not in this version of Trainyard; leave it out");
    let mut failure = Failure::new(EXIT_USAGE, "NOT_BUILT", message);
    failure.field = Some(field.to_owned());
    failure
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::args::Cli;

    #[test]
    fn nothing_that_is_built_is_called_unbuilt() {
        let mut cli = Cli::command();
        cli.build();
        for (words, _) in COMMANDS {
            let (parent, name) = words.rsplit_once(' ').unwrap_or(("", words));
            let parent = match parent {
                "" => &cli,
                parent => cli.find_subcommand(parent).expect("its parent is there"),
            };
            assert!(parent.find_subcommand(name).is_none(), "{words} is built");
        }
        for (words, flags) in FLAGS {
            let command = words.split(' ').fold(&cli, |command, word| {
                command.find_subcommand(word).expect("its command is there")
            });
            for flag in flags {
                let long = flag.strip_prefix("--");
                assert!(
                    command.get_arguments().all(|arg| arg.get_long() != long),
                    "{words} {flag} is built"
                );
            }
        }
    }
}
