//! `yard up` and `yard down`.

use std::ops::RangeInclusive;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;
use trainyard_transport::endpoint::Endpoint;

use crate::args::{DownArgs, Global, UpArgs};
use crate::context::{self, LOCAL};
use crate::failure::{EXIT_REFUSED, Failure};
use crate::local::{LocalCluster, Plan};
use crate::output;
use crate::paths::Paths;
use crate::spec::{cpus_of_node, duration, memory_of_node, within};

/// After how long without work a cluster may leave.
const IDLE_EXIT: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(30 * 86_400);

/// Starts a cluster on this machine, or adds what is missing to the one that runs.
pub(crate) async fn up(global: &Global, args: UpArgs) -> Result<ExitCode, Failure> {
    let paths = Paths::new(global)?;
    let idle_exit = args
        .idle_exit
        .as_deref()
        .map(|text| {
            let time = duration("--idle-exit", text)?;
            within("--idle-exit", time, IDLE_EXIT)
        })
        .transpose()?;
    // Before anything is started, as all of this.
    args.cpus.as_deref().map(cpus_of_node).transpose()?;
    args.memory.as_deref().map(memory_of_node).transpose()?;
    for text in &args.advertise {
        text.parse::<Endpoint>()
            .map_err(|error| Failure::usage("--advertise", error))?;
    }
    if let Some(name) = &args.run_as
        && !matches!(nix::unistd::User::from_name(name), Ok(Some(_)))
    {
        let message = format!("this machine has no user {name:?}; name one that it has");
        return Err(Failure::usage("--run-as", message));
    }
    if let Some(spec) = &args.fake_gpus {
        trainyard_fake_nvml::scenario(spec, "")
            .map_err(|error| Failure::usage("--fake-gpus", error))?;
    }
    let listen = args.listen;
    let for_others = listen.is_some_and(|listen| !listen.ip().is_loopback());
    if for_others
        && args.run_as.is_none()
        && args.nodes != Some(0)
        && nix::unistd::geteuid().is_root()
    {
        return Err(Failure::new(
            EXIT_REFUSED,
            "JOBS_AS_ROOT",
            "others could submit jobs, which would run as root on this machine: name an unprivileged user with \
             --run-as USER, or start a head without a node with --nodes 0",
        ));
    }
    let changes_agents = args.cpus.is_some() || args.memory.is_some() || args.fake_gpus.is_some();
    let plan = Plan {
        nodes: args.nodes,
        run_as: args.run_as,
        listen: args.listen,
        advertise: args.advertise,
        cpus: args.cpus,
        memory: args.memory,
        fake_gpus: args.fake_gpus,
        idle_exit,
    };
    let started = LocalCluster::new(paths.local()).start(&plan).await?;
    let context = &started.context;
    if changes_agents && started.kept > 0 {
        output::warning(
            "agents that ran already keep the CPUs, memory and GPUs that they have; yard down first changes them",
        );
    }
    if let Some(listen) = listen.filter(|listen| listen.port() != 0)
        && context
            .endpoints
            .iter()
            .all(|endpoint| endpoint.port() != listen.port())
    {
        output::warning(&format!(
            "it was running and keeps its address; to listen on {listen}, stop it first with yard down"
        ));
    }
    let endpoints: Vec<_> = context.endpoints.iter().map(ToString::to_string).collect();
    if args.json {
        let answer = json!({ "endpoints": endpoints, "processes_started": started.processes, "nodes": started.nodes, "cluster": context.credentials.cluster });
        output::line(&answer.to_string());
    } else {
        let nodes = output::count(started.nodes as u64, "node");
        let verb = if started.processes == 0 {
            "is already up"
        } else {
            "is up"
        };
        output::line(&format!(
            "the cluster {verb}: {nodes}, coordinator at {}",
            endpoints.join(", ")
        ));
        output::note("try: yard run -- hostname     stop it with: yard down");
        if let Some(name) = context::chosen(global, &paths)?.filter(|name| name != LOCAL) {
            output::note(&format!(
                "commands go to context {name}; to this cluster with --context {LOCAL}"
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Stops the cluster on this machine.
pub(crate) async fn down(global: &Global, args: DownArgs) -> Result<ExitCode, Failure> {
    let cluster = LocalCluster::new(Paths::new(global)?.local());
    let stopped = cluster.stop(args.force).await?;
    if args.delete {
        cluster.delete()?;
    }
    let kept = if args.delete {
        "; everything it kept is deleted"
    } else {
        ""
    };
    output::line(&if stopped {
        format!("the cluster is down{kept}")
    } else {
        format!("no cluster runs on this machine{kept}")
    });
    Ok(ExitCode::SUCCESS)
}
