//! A command line that cannot be understood: what was wrong with it, in the words and with the exit code of every other
//! failure. It must not know what the commands do.

use std::error::Error as _;
use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory};

use crate::args::Cli;
use crate::failure::{EXIT_USAGE, Failure};
use crate::notyet;

/// Global flags that take a value: it is no command, whatever it looks like.
const GLOBAL_FLAGS: [&str; 3] = ["--context", "--data-dir", "--config-dir"];

/// The failure that an error of the parser stands for.
pub(crate) fn failure(error: &clap::Error, arguments: &[OsString]) -> Failure {
    let command = words(arguments);
    let told = Told {
        error,
        command: &command,
    };
    told.not_built().unwrap_or_else(|| {
        let mut failure = Failure::new(EXIT_USAGE, "USAGE", told.message());
        failure.field = told.flag().map(str::to_owned);
        failure
    })
}

/// Whether failures are to be told as JSON, as far as that can be known.
pub(crate) fn wants_json(arguments: &[OsString]) -> bool {
    arguments
        .iter()
        .take_while(|argument| *argument != "--")
        .any(|argument| argument == "--json")
}

/// The words of the command that was meant: `token create`.
fn words(arguments: &[OsString]) -> String {
    let cli = Cli::command();
    let mut command: &Command = &cli;
    let mut words: Vec<&str> = Vec::new();
    let mut rest = arguments.iter().skip(1).map(|word| word.to_str());
    while let Some(word) = rest.next() {
        match word {
            Some("--") => break,
            Some(flag) if GLOBAL_FLAGS.contains(&flag) => drop(rest.next()),
            Some(word) => {
                if let Some(next) = command.find_subcommand(word) {
                    command = next;
                    words.push(word);
                }
            }
            None => {}
        }
    }
    words.join(" ")
}

struct Told<'a> {
    error: &'a clap::Error,
    command: &'a str,
}

impl Told<'_> {
    fn text(&self, kind: ContextKind) -> Option<&str> {
        match self.error.get(kind)? {
            ContextValue::String(text) => Some(text),
            ContextValue::Strings(texts) => texts.first().map(String::as_str),
            _ => None,
        }
    }

    fn list(&self, kind: ContextKind) -> String {
        match self.error.get(kind) {
            Some(ContextValue::String(text)) => text.clone(),
            Some(ContextValue::Strings(texts)) => texts.join(", "),
            _ => String::new(),
        }
    }

    /// The flag or argument at fault without the name of its value: `--limit`.
    fn flag(&self) -> Option<&str> {
        self.text(ContextKind::InvalidArg)
            .map(|flag| flag.split(' ').next().unwrap_or(flag))
    }

    fn full(&self, word: &str) -> String {
        format!("{} {word}", self.command).trim_start().to_owned()
    }

    fn not_built(&self) -> Option<Failure> {
        match self.error.kind() {
            ErrorKind::InvalidSubcommand => {
                notyet::command(&self.full(self.text(ContextKind::InvalidSubcommand)?))
            }
            ErrorKind::UnknownArgument => notyet::flag(self.command, self.flag()?),
            _ => None,
        }
    }

    fn message(&self) -> String {
        self.known().unwrap_or_else(|| self.other())
    }

    fn known(&self) -> Option<String> {
        let help = self.help();
        let message = match self.error.kind() {
            ErrorKind::InvalidSubcommand => {
                let word = self.full(self.text(ContextKind::InvalidSubcommand)?);
                let meant = self
                    .text(ContextKind::SuggestedSubcommand)
                    .map(|meant| format!("did you mean `yard {}`? ", self.full(meant)));
                let meant = meant.unwrap_or_default();
                format!("there is no command `yard {word}`; {meant}{help}")
            }
            ErrorKind::MissingSubcommand => {
                let commands = self.list(ContextKind::ValidSubcommand);
                let of = self.full("COMMAND");
                format!("`yard {of}`: COMMAND is missing; it is one of {commands}")
            }
            ErrorKind::UnknownArgument => self.unknown(self.flag()?),
            ErrorKind::MissingRequiredArgument if self.command == "token create" => {
                "--node or --user: one of them is needed; --node for a token that enrols a machine, --user NAME for one \
                 that enrols a user"
                    .to_owned()
            }
            ErrorKind::MissingRequiredArgument => {
                let missing = self.list(ContextKind::InvalidArg);
                format!("{missing} is missing; {help}")
            }
            ErrorKind::ArgumentConflict => {
                let (flag, other) = (self.flag()?, self.list(ContextKind::PriorArg));
                match self.text(ContextKind::InvalidArg) == Some(other.as_str()) {
                    true => format!("{flag}: is given more than once; leave all but one out"),
                    false => format!("{flag}: cannot be given together with {other}; leave one out"),
                }
            }
            ErrorKind::InvalidValue => {
                let (flag, value) = (self.flag()?, self.text(ContextKind::InvalidValue)?);
                let valid = self.list(ContextKind::ValidValue);
                match (value, valid.as_str()) {
                    ("", _) => format!("{flag}: its value is missing; {help}"),
                    (_, "") => format!("{flag}: {value:?} is not possible; {help}"),
                    (_, valid) => format!("{flag}: {value:?} is not one of {valid}"),
                }
            }
            ErrorKind::ValueValidation => {
                let problem = self.error.source()?.to_string();
                let value = self.text(ContextKind::InvalidValue)?;
                match problem.contains(&format!("{value:?}")) {
                    true => format!("{}: {problem}", self.flag()?),
                    false => format!("{}: {value:?} is not possible: {problem}", self.flag()?),
                }
            }
            _ => return None,
        };
        Some(message)
    }

    fn unknown(&self, argument: &str) -> String {
        let help = self.help();
        if matches!(self.command, "run" | "submit") && !argument.starts_with('-') {
            return format!(
                "{argument:?} is no flag; write the job's program and its arguments after --, as in `yard {} -- \
                 {argument}`",
                self.command
            );
        }
        let meant = self
            .text(ContextKind::SuggestedArg)
            .map(|meant| format!("did you mean {meant}? "))
            .unwrap_or_default();
        let of = self.full("");
        let of = match of.trim_end() {
            "" => String::new(),
            command => format!(" of `yard {command}`"),
        };
        let what = match argument.starts_with('-') {
            true => "no flag",
            false => "no argument",
        };
        format!("{argument}: is {what}{of}; {meant}{help}")
    }

    fn help(&self) -> String {
        format!("see `yard {}`", self.full("--help"))
    }

    /// What the parser itself says, without its headings.
    fn other(&self) -> String {
        let text = self.error.render().to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        let text = text.split("\n\n").next().unwrap_or(text);
        format!("{}; {}", text.trim(), self.help())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn told(line: &str) -> Failure {
        let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let error = Cli::try_parse_from(&arguments).expect_err(line);
        failure(&error, &arguments)
    }

    #[test]
    fn what_is_to_come_is_told_as_that_and_not_as_unknown() {
        for (line, named) in [
            ("yard retry j1", "`yard retry` is not in this version"),
            ("yard retry --help", "`yard retry` is not in this version"),
            ("yard help retry", "`yard retry` is not in this version"),
            (
                "yard --context x plan --gpus 8 -- true",
                "`yard plan` is not in this version",
            ),
            (
                "yard agent upgrade",
                "`yard agent upgrade` is not in this version",
            ),
            (
                "yard run --image x -- true",
                "--image: is not in this version",
            ),
            (
                "yard submit --priority=high -- true",
                "--priority: is not in this version",
            ),
            (
                "yard submit --after j1 -- true",
                "--after: is not in this version",
            ),
            (
                "yard run --preemptible -- true",
                "--preemptible: is not in this version",
            ),
            (
                "yard token create --node --pool x",
                "--pool: is not in this version",
            ),
            (
                "yard join --service TOKEN",
                "--service: is not in this version",
            ),
        ] {
            let failure = told(line);
            assert_eq!(failure.reason, "NOT_BUILT", "{line}: {}", failure.message);
            assert!(failure.message.starts_with(named), "{}", failure.message);
        }
    }

    #[test]
    fn each_error_names_what_is_wrong_and_the_remedy() {
        for (line, message) in [
            (
                "yard token create",
                "--node or --user: one of them is needed; --node for a token that enrols a machine, \
              --user NAME for one that enrols a user",
            ),
            (
                "yard token create --role user",
                "--node or --user: one of them is needed; --node for a token that enrols a \
              machine, --user NAME for one that enrols a user",
            ),
            (
                "yard runn",
                "there is no command `yard runn`; did you mean `yard run`? see `yard --help`",
            ),
            (
                "yard run true",
                "\"true\" is no flag; write the job's program and its arguments after --, as in `yard run -- \
              true`",
            ),
            (
                "yard submit --gpu 8 -- true",
                "--gpu: is no flag of `yard submit`; did you mean --gpus? see `yard submit \
              --help`",
            ),
            ("yard job", "<ID> is missing; see `yard job --help`"),
            (
                "yard jobs -n 0",
                "--limit: \"0\" is not a whole number from 1 to 100000",
            ),
            (
                "yard jobs -n x",
                "--limit: \"x\" is not a whole number from 1 to 100000",
            ),
            (
                "yard logs j1 --tail -1",
                "--tail: \"-1\" is not a whole number from 0 to 4294967295",
            ),
            (
                "yard run --name a --name b -- true",
                "--name: is given more than once; leave all but one out",
            ),
            (
                "yard run --dir . --no-dir -- true",
                "--dir: cannot be given together with --no-dir; leave one out",
            ),
            (
                "yard completion x",
                "<SHELL>: \"x\" is not one of bash, elvish, fish, powershell, zsh",
            ),
        ] {
            let failure = told(line);
            assert_eq!(
                (failure.exit, failure.message.as_str()),
                (64, message),
                "{line}"
            );
        }
    }

    #[test]
    fn json_is_asked_for_before_the_jobs_own_arguments() {
        let line = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert!(wants_json(&line("yard jobs -n x --json")));
        assert!(!wants_json(&line("yard run x -- --json")));
    }
}
