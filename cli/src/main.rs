//! `yard`: every role of Trainyard in one binary, and the only place that prints.
//!
//! It turns arguments into requests and answers into text; what a request means is decided elsewhere.

mod absences;
mod args;
mod cluster;
mod completion;
mod connection;
mod context;
mod demo;
mod doctor;
mod embedded;
mod failure;
mod follow;
mod jobfile;
mod jobs;
mod json;
mod local;
mod logs;
mod nodes;
mod notyet;
mod output;
mod outputs;
mod paths;
mod processes;
mod restart;
mod roles;
mod selftest;
mod spec;
mod state;
mod submit;
mod tokens;
mod usage;
mod yaml;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::args::{Cli, Command};
use crate::failure::{EXIT_USAGE, Failure};

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    // The shim lives as long as its ranks: it gets neither a runtime nor the rest of the command line.
    if let [_, role, dir] = arguments.as_slice()
        && role == roles::SHIM
    {
        return roles::shim(dir.as_ref());
    }
    // It becomes another process.
    if let [_, role, rest @ ..] = arguments.as_slice()
        && role == restart::REVIVE
    {
        return restart::revive(rest);
    }
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        // Nothing was asked for: what could be is the best answer.
        Err(error) if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            return ExitCode::from(EXIT_USAGE);
        }
        Err(error) if error.use_stderr() => {
            let failure = usage::failure(&error, &arguments);
            failure.report(usage::wants_json(&arguments));
            return ExitCode::from(failure.exit);
        }
        // Help and version, which were asked for.
        Err(error) => {
            // Nothing is left to do about a terminal that cannot be written to.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
    };
    let json = cli.command.wants_json();
    match run(cli) {
        Ok(code) => code,
        Err(failure) => {
            failure.report(json);
            ExitCode::from(failure.exit)
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode, Failure> {
    let Cli { global, command } = cli;
    // Roles serve many at once; everything else waits for one answer at a time and starts faster without threads.
    let mut runtime = match command {
        Command::Coordinator(_) | Command::Agent(_) | Command::Join(_) => {
            tokio::runtime::Builder::new_multi_thread()
        }
        _ => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime = runtime
        .enable_all()
        .build()
        .map_err(|error| Failure::io("start the async runtime", &error))?;
    runtime.block_on(async {
        match command {
            Command::Run(args) => submit::run(&global, args).await,
            Command::Submit(args) => submit::submit(&global, args).await,
            Command::Jobs(args) => jobs::list(&global, args).await,
            Command::Job(args) => jobs::show(&global, args).await,
            Command::Logs(args) => logs::logs(&global, args).await,
            Command::Wait(args) => jobs::wait(&global, args).await,
            Command::Cancel(args) => jobs::cancel(&global, args).await,
            Command::Outputs(args) => outputs::outputs(&global, args).await,
            Command::Nodes(args) => nodes::list(&global, args).await,
            Command::Node(args) => nodes::node(&global, args).await,
            Command::Cordon(args) => nodes::cordon(&global, args).await,
            Command::Uncordon(args) => nodes::uncordon(&global, args).await,
            Command::Token(args) => tokens::token(&global, args).await,
            Command::Join(args) => roles::join(&global, args).await,
            Command::Login(args) => tokens::login(&global, args).await,
            Command::Up(args) => cluster::up(&global, args).await,
            Command::Down(args) => cluster::down(&global, args).await,
            Command::Coordinator(args) => roles::coordinator(&global, args).await,
            Command::Agent(args) => roles::agent(&global, args).await,
            Command::Demo(args) => demo::demo(&global, args).await,
            Command::Doctor(args) => doctor::doctor(&global, args).await,
            Command::Selftest(args) => Box::pin(selftest::selftest(&global, args)).await,
            Command::Completion(args) => completion::print(&args),
        }
    })
}
