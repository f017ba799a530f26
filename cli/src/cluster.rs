//! `yard up` and `yard down`.

use std::process::ExitCode;

use serde_json::json;

use crate::args::{DownArgs, Global, UpArgs};
use crate::context::{self, LOCAL};
use crate::failure::Failure;
use crate::local::{LocalCluster, Plan};
use crate::output;
use crate::paths::Paths;
use crate::spec::duration;

/// Starts a cluster on this machine, or adds what is missing to the one that runs.
pub(crate) async fn up(global: &Global, args: UpArgs) -> Result<ExitCode, Failure> {
    let paths = Paths::new(global)?;
    let idle_exit = args
        .idle_exit
        .as_deref()
        .map(|text| duration("--idle-exit", text))
        .transpose()?;
    if let Some(spec) = &args.fake_gpus {
        // Before anything is started.
        trainyard_fake_nvml::scenario(spec, "")
            .map_err(|error| Failure::usage("--fake-gpus", error))?;
    }
    let listen = args.listen;
    let plan = Plan {
        nodes: args.nodes,
        listen: args.listen,
        advertise: args.advertise,
        cpus: args.cpus,
        memory: args.memory,
        fake_gpus: args.fake_gpus,
        idle_exit,
    };
    let (context, started) = LocalCluster::new(paths.local()).start(&plan).await?;
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
        let answer = json!({ "endpoints": endpoints, "processes_started": started, "cluster": context.credentials.cluster });
        output::line(&answer.to_string());
    } else {
        let nodes = output::count(u64::from(args.nodes), "node");
        let verb = if started == 0 {
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
