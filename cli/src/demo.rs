//! `yard demo`: a cluster of two nodes that exists just for this trains a small model on real handwritten digits.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use serde::Deserialize;
use trainyard_common::spec::{JobSpec, Launcher};
use trainyard_common::units::format_duration;

use crate::args::{DemoArgs, Global, JobFlags};
use crate::connection::{self, Connection};
use crate::failure::{EXIT_IO, EXIT_NOT_FOUND, Failure};
use crate::follow::{self, Follow};
use crate::local::{LocalCluster, Plan};
use crate::outputs::{self, Wanted};
use crate::{output, submit};

/// The example of the repository, in this binary, so that the demo needs nothing beside it.
const EXAMPLE: [(&str, &[u8]); 5] = [
    ("train.py", include_bytes!("../../examples/digits/train.py")),
    ("group.py", include_bytes!("../../examples/digits/group.py")),
    ("mlp.py", include_bytes!("../../examples/digits/mlp.py")),
    (
        "checkpoint.py",
        include_bytes!("../../examples/digits/checkpoint.py"),
    ),
    (
        "data/digits.csv.gz",
        include_bytes!("../../examples/digits/data/digits.csv.gz"),
    ),
];

/// What the example writes about its run.
#[derive(Debug, Deserialize)]
struct Metrics {
    test_accuracy: f64,
    losses: Vec<f64>,
    world_size: u32,
}

/// Runs it and leaves nothing running.
pub(crate) async fn demo(_: &Global, args: DemoArgs) -> Result<ExitCode, Failure> {
    python()?;
    let scratch = tempfile::Builder::new()
        .prefix("yard-demo-")
        .tempdir()
        .map_err(|error| Failure::io("make a temporary directory", &error))?;
    let cluster = LocalCluster::new(scratch.path().join("cluster"));
    output::note("starting a cluster of two nodes on this machine");
    let result = train(&cluster, scratch.path(), &args).await;
    // Also after a failure, which is the one to report.
    let stopped = cluster.stop(true).await;
    let code = result?;
    stopped?;
    Ok(code)
}

async fn train(
    cluster: &LocalCluster,
    scratch: &Path,
    args: &DemoArgs,
) -> Result<ExitCode, Failure> {
    let plan = Plan {
        nodes: Some(2),
        listen: Some(([127, 0, 0, 1], 0).into()),
        ..Plan::default()
    };
    let started = cluster.start(&plan).await?;
    let connection = connection::open(&started.context).await?;
    let example = scratch.join("digits");
    write_example(&example)?;
    let began = Instant::now();
    let command = ["python3", "train.py", "--epochs", &args.epochs.to_string()].map(str::to_owned);
    let mut spec = JobSpec::new("digits", command.to_vec());
    spec.nodes = 2;
    spec.launcher = Launcher::Torch;
    let flags = JobFlags {
        dir: Some(example),
        ..JobFlags::default()
    };
    let job = submit::send(&connection, &flags, spec, None).await?;
    output::note(&format!(
        "{job}: training a digit classifier on both nodes, {} epochs",
        args.epochs
    ));
    let code = follow::follow(
        &connection,
        job,
        Follow {
            json: false,
            quiet: false,
        },
    )
    .await?;
    if code == ExitCode::SUCCESS {
        report(&connection, job, args, began).await?;
    }
    Ok(code)
}

async fn report(
    connection: &Connection,
    job: trainyard_common::ids::JobId,
    args: &DemoArgs,
    began: Instant,
) -> Result<(), Failure> {
    outputs::fetch(
        connection,
        job,
        Wanted {
            checkpoint: false,
            attempt: None,
        },
        &args.to,
    )
    .await?;
    let path = args.to.join("metrics.json");
    let text = fs::read(&path).map_err(|error| Failure::path("read", &path, &error))?;
    let metrics: Metrics = serde_json::from_slice(&text)
        .map_err(|error| Failure::chain(EXIT_IO, "METRICS", &error))?;
    let loss = |loss: Option<&f64>| loss.map(|loss| format!("{loss:.3}")).unwrap_or_default();
    output::line("");
    output::fields(&[
        (
            "accuracy",
            format!(
                "{:.1} % of 360 digits that it had not seen",
                metrics.test_accuracy * 100.0
            ),
        ),
        (
            "loss",
            format!(
                "{} to {}",
                loss(metrics.losses.first()),
                loss(metrics.losses.last())
            ),
        ),
        ("ranks", format!("{} on 2 nodes", metrics.world_size)),
        ("time", format_duration(began.elapsed())),
        ("outputs", args.to.display().to_string()),
    ]);
    Ok(())
}

fn write_example(dir: &Path) -> Result<(), Failure> {
    for (name, bytes) in EXAMPLE {
        let path = dir.join(name);
        let parent = path.parent().unwrap_or(dir);
        fs::create_dir_all(parent).map_err(|error| Failure::path("make", parent, &error))?;
        fs::write(&path, bytes).map_err(|error| Failure::path("write", &path, &error))?;
    }
    Ok(())
}

/// The example is plain Python without packages, but Python it is.
fn python() -> Result<(), Failure> {
    let found = Command::new("python3")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match found {
        Ok(status) if status.success() => Ok(()),
        _ => Err(Failure::new(
            EXIT_NOT_FOUND,
            "NO_PYTHON",
            "the demo trains with python3, which is not in PATH; install it and try again",
        )),
    }
}
