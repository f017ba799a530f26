//! The agent of a machine: reports what the machine has, and runs the members that the coordinator wants on it.
//!
//! [`run`] is a whole agent. Decisions are in `trainyard-agent-core`; here are the drivers around it: the session with
//! the coordinator, the runtime with its shims, fetches, uploads, output, renewal of the certificate, and the one task
//! that owns the core. The end of an agent, wanted or not, touches no running member.

mod backoff;
mod bundles;
mod cache;
mod chain;
pub mod config;
mod driver;
mod faults;
mod fetch;
mod growth;
mod last_words;
mod link;
mod logs;
mod outgoing;
pub mod probe;
mod renew;
pub mod runtime;
mod session;
mod state;
#[cfg(test)]
mod tests;
mod uploads;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use trainyard_agent_core::{Core, RecoveredMember, RecoveredState};
use trainyard_transport::credentials::{Credentials, CredentialsError};
use trainyard_transport::identity::Identity;
use trainyard_transport::pki::PkiError;

pub use crate::config::{Config, ConfigError};
pub use crate::last_words::keep_panics;
pub use crate::state::{StateError, make_data_dir};

use crate::bundles::{Bundles, Means};
use crate::cache::Cache;
use crate::driver::{Driver, Hands, Lanes, Left, core_config, runtime_state};
use crate::faults::Faults;
use crate::fetch::Fetcher;
use crate::link::Link;
use crate::logs::Logs;
use crate::outgoing::Outgoing;
use crate::probe::Probe;
use crate::runtime::carrier::{CarrierConfig, CarrierError, Carriers, RETURN_AFTER};
use crate::runtime::{Recovered, Runtime, RuntimeConfig, RuntimeError};
use crate::session::Session;
use crate::state::{ATTEMPTS, AgentState, BUNDLES, CACHE, CREDENTIALS};
use crate::uploads::Uploader;
use trainyard_transport::clock::Clock;
use trainyard_transport::task::{AbortOnDrop, blocking, spawn};

/// Reports of shims that wait for the driver, which never waits itself.
const RUNTIME_EVENTS: usize = 256;
/// Messages of the coordinator that wait for the driver.
const SESSION_EVENTS: usize = 256;

/// Why an agent ended without a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    /// It was asked to. Its members live on.
    Shutdown,
    /// The coordinator was away for long and nothing was alive here; see [`Config::leave_when_orphaned`].
    Orphaned,
}

/// Why an agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The data directory cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// There are no usable credentials.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The certificate cannot be used.
    #[error("the node's certificate cannot be used; enrol it again with `yard join`")]
    Certificate(#[source] PkiError),
    /// The credentials are not a node's.
    #[error("the credentials in {dir:?} are not a node's; enrol it with `yard join`")]
    NotANode {
        /// The data directory.
        dir: PathBuf,
    },
    /// Earlier members cannot be looked for.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// Earlier bundles cannot be looked for.
    #[error(transparent)]
    Bundles(#[from] CarrierError),
    /// An own fault; starting the agent again loses nothing.
    #[error("a part of the agent failed")]
    Panicked(#[source] tokio::task::JoinError),
}

/// Runs an agent until `shutdown` is done. Its members live on after it and are found again at the next start.
///
/// # Errors
/// [`Error`]: nothing was started then, except for [`Error::Panicked`].
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> Result<ExitReason, Error> {
    let dir = config.data_dir.clone();
    let result = work(config, shutdown).await;
    match &result {
        // The directory is another agent's.
        Ok(_) | Err(Error::State(StateError::Locked { .. })) => {}
        Err(error) => last_words::leave(&dir, &chain::chain(error)),
    }
    result
}

async fn work(config: Config, shutdown: impl Future<Output = ()>) -> Result<ExitReason, Error> {
    let run_as = config.run_as()?;
    let dir = config.data_dir.clone();
    let (mut state, credentials) = {
        let (dir, run_as) = (dir.clone(), run_as.clone());
        blocking(move || {
            let state = AgentState::open(&dir)?;
            if let Some(user) = &run_as {
                state::let_pass(&dir, user)?;
            }
            Ok::<_, Error>((state, Credentials::load(&dir.join(CREDENTIALS))?))
        })
        .await?
    };
    let link = link(&credentials, &config)?;
    tracing::info!(node = %link.node(), cluster = %link.cluster(), ?dir, incarnation = state.incarnation().0, "agent starts");
    let (runtime_sender, runtime_events) = mpsc::channel(RUNTIME_EVENTS);
    let runtime = Runtime::new(
        RuntimeConfig {
            attempts_dir: dir.join(ATTEMPTS),
            shim_command: config.shim_command.clone(),
            run_as: run_as.clone(),
            log_limit: config.log_limit,
        },
        runtime_sender,
    );
    let (carrier_sender, carrier_events) = mpsc::channel(RUNTIME_EVENTS);
    let carriers = Carriers::new(
        CarrierConfig {
            bundles_dir: dir.join(BUNDLES),
            shim_command: config.shim_command.clone(),
            run_as,
            log_limit: config.log_limit,
            return_after: RETURN_AFTER,
        },
        carrier_sender,
    );
    let probe = Arc::new(Probe::new(&config));
    let inventory = {
        let (probe, dir) = (probe.clone(), dir.clone());
        blocking(move || probe.read(&dir)).await
    };
    let clock = Clock::start();
    let logs = Logs::new();
    let recovered = recover(&runtime, &logs).await?;
    let mut core = Core::new(core_config(&inventory), recovered, clock.now());
    let cache = Cache::new(dir.join(CACHE), config.cache_limit);
    let hands = Hands {
        fetcher: Fetcher::new(link.clone(), cache),
        uploader: Uploader::new(link.clone(), logs.clone()),
        logs: logs.clone(),
        runtime,
    };
    let (session_sender, session_events) = mpsc::channel(SESSION_EVENTS);
    let outgoing = Arc::new(Outgoing::default());
    let means = Means {
        logs: logs.clone(),
        uploader: hands.uploader.clone(),
        outgoing: outgoing.clone(),
    };
    let mut bundles = Bundles::new(carriers, carrier_events, hands.fetcher.clone(), means);
    core.recover_bundles(bundles.recover().await?);
    let history = state.begins_anew();
    if history.is_some() {
        tracing::info!(
            "no records of earlier attempts are here, what was placed before is not started"
        );
        core.begin_anew();
    }
    let leaving = CancellationToken::new();
    let _leave_on_drop = leaving.clone().drop_guard();
    let session = Session {
        link: link.clone(),
        state,
        probe,
        dir: dir.clone(),
        advertise_address: config.advertise_address.clone(),
        outgoing: outgoing.clone(),
        runtime: hands.runtime.clone(),
        driver: session_sender,
        leaving: leaving.clone(),
        openings: 0,
        last_words: {
            let dir = dir.clone();
            blocking(move || last_words::read(&dir)).await
        },
        skewed: false,
        faults: Faults::new(link.gate().clone(), config.restart.clone()),
    };
    let mut session = AbortOnDrop(spawn("session", session.run()));
    let mut logs = AbortOnDrop(spawn("logs", logs.run(link.clone())));
    let mut renew = AbortOnDrop(spawn(
        "renew",
        renew::run(credentials, dir.join(CREDENTIALS), link),
    ));
    let driver = Driver {
        core,
        clock,
        hands,
        outgoing,
        runtime_events,
        session_events,
        leave_when_orphaned: config.leave_when_orphaned,
        inventory,
        lanes: Lanes::new(),
        bundles,
        history,
    };
    let left = tokio::select! {
        biased;
        left = driver.run(shutdown) => left,
        // Cancel-safe, all three: the tasks live on. None of them ends before the driver but by a panic, and an agent
        // without one of them would look alive and not be.
        Err(panic) = &mut session.0 => Err(panic),
        Err(panic) = &mut logs.0 => Err(panic),
        Err(panic) = &mut renew.0 => Err(panic),
    };
    let left = left.map_err(Error::Panicked)?;
    leaving.cancel();
    // It says goodbye, for a bounded time, and gives the lock of the data directory back.
    let _ = (&mut session.0).await;
    tracing::info!(?left, "agent ends, its members live on");
    Ok(match left {
        Left::Asked => ExitReason::Shutdown,
        Left::Orphaned => ExitReason::Orphaned,
    })
}

fn link(credentials: &Credentials, config: &Config) -> Result<Link, Error> {
    let Identity::Node(node) = credentials.identity else {
        return Err(Error::NotANode {
            dir: config.data_dir.clone(),
        });
    };
    let cert = credentials.client_cert().map_err(Error::Certificate)?;
    let endpoints = credentials.endpoints.clone();
    let names = (credentials.cluster, node);
    Ok(Link::new(endpoints, credentials.trust(), cert, names))
}

/// Finds the members that earlier agent processes left, with the output that is still to be sent.
async fn recover(runtime: &Runtime, logs: &Logs) -> Result<Vec<RecoveredMember>, Error> {
    let mut members = Vec::new();
    for Recovered { member, state } in runtime.recover().await? {
        let dir = runtime.dir(member.attempt);
        let state = match runtime_state(state) {
            Some(state) => RecoveredState::Shim(state),
            None => RecoveredState::Accepted,
        };
        let uploaded = {
            let dir = dir.clone();
            blocking(move || uploads::finished(&dir)).await
        };
        if uploaded.is_none() && matches!(state, RecoveredState::Shim(_)) {
            logs.track(&dir, member.spec.supervised_ranks());
        }
        tracing::info!(attempt = %member.attempt, ?state, "found a member of an earlier agent process");
        members.push(RecoveredMember {
            member,
            state,
            uploaded,
        });
    }
    Ok(members)
}
