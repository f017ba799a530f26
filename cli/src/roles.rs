//! The roles that a machine can have: coordinator, agent, and the shim that supervises a member.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use trainyard_transport::credentials::Credentials;
use trainyard_transport::endpoint::InvalidEndpoint;
use trainyard_transport::enrol;
use trainyard_transport::host;
use trainyard_transport::token::TokenKind;

use crate::args::{
    AgentArgs, AgentCommand, AgentFlags, CoordinatorArgs, CoordinatorCommand, CoordinatorRunArgs,
    Global, JoinArgs,
};
use crate::failure::{EXIT_INVALID, EXIT_IO, EXIT_REFUSED, Failure};
use crate::output;
use crate::paths::Paths;
use crate::restart;
use crate::spec::{cpus_of_node, duration, memory_of_node};
use crate::state;
use crate::tokens;

/// The hidden command that agents start for each member.
pub(crate) const SHIM: &str = "shim";

/// Supervises one member, without an async runtime.
pub(crate) fn shim(dir: &Path) -> ExitCode {
    trainyard_agent::runtime::shim::shim_main(dir)
}

/// Runs a coordinator until it is told to end, or looks after its state.
pub(crate) async fn coordinator(
    global: &Global,
    args: CoordinatorArgs,
) -> Result<ExitCode, Failure> {
    match args.command {
        CoordinatorCommand::Run(args) => run_coordinator(global, args).await,
        CoordinatorCommand::Backup(args) => state::backup(global, &args),
        CoordinatorCommand::Restore(args) => state::restore(global, &args),
        CoordinatorCommand::Check(args) => state::check(global, &args),
    }
}

async fn run_coordinator(global: &Global, args: CoordinatorRunArgs) -> Result<ExitCode, Failure> {
    let mut config = coordinator_config(global, args)?;
    config.restart = restart::of_this_process(own_arguments(), config.data_dir.parent());
    logging();
    let fatal =
        |error: &(dyn std::error::Error + 'static)| Failure::chain(EXIT_IO, "COORDINATOR", error);
    let mut coordinator = trainyard_coordinator::start(config)
        .await
        .map_err(|error| fatal(&error))?;
    let result = tokio::select! {
        biased;
        // Both are safe to drop: a signal ends the wait, and the coordinator is shut down below.
        result = coordinator.finished() => result.map_err(|error| fatal(&error)),
        () = told_to_end()? => Ok(()),
    };
    coordinator.shutdown().await;
    result.map(|()| ExitCode::SUCCESS)
}

fn coordinator_config(
    global: &Global,
    args: CoordinatorRunArgs,
) -> Result<trainyard_coordinator::Config, Failure> {
    let mut config = match &args.config {
        Some(path) => trainyard_coordinator::Config::load(path)
            .map_err(|error| Failure::chain(EXIT_INVALID, "CONFIG", &error))?,
        None => trainyard_coordinator::Config::new(Paths::new(global)?.data.join("coordinator")),
    };
    if let Some(dir) = args.state_dir {
        config.data_dir = dir;
    }
    if let Some(listen) = args.listen {
        config.listen = listen;
    }
    config.accept_loss = args.accept_loss;
    if !args.advertise.is_empty() {
        config.advertise = args
            .advertise
            .iter()
            .map(|text| text.parse())
            .collect::<Result<_, _>>()
            .map_err(|error: InvalidEndpoint| Failure::usage("--advertise", error))?;
    }
    if let Some(text) = &args.idle_exit {
        config.idle_exit = Some(duration("--idle-exit", text)?);
    }
    Ok(config)
}

/// Runs this machine's agent until it is told to end. Its members live on.
pub(crate) async fn agent(global: &Global, args: AgentArgs) -> Result<ExitCode, Failure> {
    let AgentCommand::Run(args) = args.command;
    let mut config = agent_config(global, args.config.as_deref(), &args.agent)?;
    if let Some(text) = &args.leave_when_orphaned {
        config.leave_when_orphaned = Some(duration("--leave-when-orphaned", text)?);
    }
    config.embedded |= args.embedded;
    // An agent of `yard up` lies two levels below the list of its processes.
    let cluster = config.data_dir.parent().and_then(Path::parent);
    config.restart = restart::of_this_process(own_arguments(), cluster);
    run_agent(config).await
}

/// What this process was started with, without the program.
fn own_arguments() -> Vec<OsString> {
    std::env::args_os().skip(1).collect()
}

async fn run_agent(config: trainyard_agent::Config) -> Result<ExitCode, Failure> {
    logging();
    trainyard_agent::keep_panics(config.data_dir.clone());
    let end = told_to_end()?;
    let reason = trainyard_agent::run(config, end)
        .await
        .map_err(|error| Failure::chain(EXIT_IO, "AGENT", &error))?;
    tracing::info!(?reason, "agent ends");
    Ok(ExitCode::SUCCESS)
}

/// Enrols this machine and becomes its agent.
pub(crate) async fn join(global: &Global, args: JoinArgs) -> Result<ExitCode, Failure> {
    let token = tokens::read_token(&args.source, TokenKind::Node)?;
    let mut config = agent_config(global, None, &args.agent)?;
    config.restart = restart::of_this_process(rejoin_arguments(global, &args.agent), None);
    // Whatever would keep the agent from running is found before the token is used up.
    config
        .run_as()
        .map_err(|error| Failure::chain(EXIT_REFUSED, "CONFIG", &error))?;
    let dir = config.data_dir.join("credentials");
    if let Ok(known) = Credentials::load(&dir) {
        let message = format!(
            "this machine is enrolled in cluster {} already; run its agent with `yard agent run`, or delete {} first",
            known.cluster,
            config.data_dir.display()
        );
        return Err(Failure::new(EXIT_REFUSED, "ENROLLED", message));
    }
    let name = match args.name {
        Some(name) => name,
        None => host::name().ok_or_else(|| {
            Failure::usage("--name", "this machine has no readable host name; give one")
        })?,
    };
    let credentials = enrol::enrol(&token, &name)
        .await
        .map_err(|error| tokens::enrol_failure(&error))?;
    tokens::warn_of_skew(&credentials);
    trainyard_agent::make_data_dir(&config.data_dir)
        .map_err(|error| Failure::chain(EXIT_IO, "STATE", &error))?;
    credentials
        .save(&dir)
        .map_err(|error| Failure::chain(EXIT_IO, "CREDENTIALS", &error))?;
    output::line(&format!(
        "enrolled as {:?} in cluster {}",
        credentials.identity, credentials.cluster
    ));
    if args.no_run {
        output::note("run its agent with: yard agent run");
        return Ok(ExitCode::SUCCESS);
    }
    run_agent(config).await
}

/// How the agent of a machine that has joined is started again: the token is used up.
fn rejoin_arguments(global: &Global, flags: &AgentFlags) -> Vec<OsString> {
    let AgentFlags {
        state_dir,
        advertise_address,
        cpus,
        memory,
        run_as,
        nvml_library,
    } = flags;
    let paths = [("--data-dir", &global.data_dir), ("--state-dir", state_dir)];
    let texts = [
        ("--advertise-address", advertise_address),
        ("--cpus", cpus),
        ("--memory", memory),
        ("--run-as", run_as),
        ("--nvml-library", nvml_library),
    ];
    let paths = paths
        .into_iter()
        .filter_map(|(flag, path)| Some((flag, OsString::from(path.as_ref()?))));
    let texts = texts
        .into_iter()
        .filter_map(|(flag, text)| Some((flag, OsString::from(text.as_ref()?))));
    let mut arguments: Vec<OsString> = vec!["agent".into(), "run".into()];
    for (flag, value) in paths.chain(texts) {
        arguments.extend([flag.into(), value]);
    }
    arguments
}

fn agent_config(
    global: &Global,
    file: Option<&Path>,
    flags: &AgentFlags,
) -> Result<trainyard_agent::Config, Failure> {
    let mut config = match file {
        Some(path) => trainyard_agent::Config::load(path, Paths::new(global)?.agent(global))
            .map_err(|error| Failure::chain(EXIT_INVALID, "CONFIG", &error))?,
        None => trainyard_agent::Config::new(Paths::new(global)?.agent(global))
            .map_err(|error| Failure::chain(EXIT_IO, "CONFIG", &error))?,
    };
    let AgentFlags {
        state_dir,
        advertise_address,
        cpus,
        memory,
        run_as,
        nvml_library,
    } = flags.clone();
    if let Some(dir) = state_dir {
        config.data_dir = absolute(&dir)?;
    }
    config.advertise_address = advertise_address.or(config.advertise_address);
    config.run_as = run_as.or(config.run_as);
    config.nvml_library = nvml_library.unwrap_or(config.nvml_library);
    if let Some(text) = &cpus {
        config.cpu_milli = Some(cpus_of_node(text)?);
    }
    if let Some(text) = &memory {
        config.memory_bytes = Some(memory_of_node(text)?);
    }
    Ok(config)
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| Failure::path("find", path, &error))
}

/// Resolves at SIGTERM or Ctrl-C.
fn told_to_end() -> Result<impl Future<Output = ()>, Failure> {
    let open = |kind| signal(kind).map_err(|error| Failure::io("listen for signals", &error));
    let (mut terminate, mut interrupt) = (
        open(SignalKind::terminate())?,
        open(SignalKind::interrupt())?,
    );
    Ok(async move {
        tokio::select! {
            biased;
            // Both are cancel-safe; whichever comes first ends the role.
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Logs of a role go to standard error; `YARD_LOG` says how much (as `RUST_LOG` does elsewhere).
fn logging() {
    let filter = EnvFilter::try_from_env("YARD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    // A second subscriber in one process (in a test) is no reason to fail.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .try_init();
}
