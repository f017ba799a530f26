//! Real training: the examples of the repository, on two nodes, to a model that knows digits.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a surprise is a failure, also in its helpers"
)]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use trainyard_tests::{Cluster, Machine, repository, skip};

fn metrics(cluster: &Cluster<'_>, job: &str, to: &Path) -> Value {
    let _ = cluster
        .yard(&["outputs", job, "--to", to.to_str().unwrap()])
        .expect_code(0);
    serde_json::from_slice(&fs::read(to.join("metrics.json")).unwrap()).unwrap()
}

/// Loss falls from first to last epoch, and the model knows digits that it has not seen.
fn assert_learned(metrics: &Value) {
    let losses: Vec<f64> = metrics["losses"]
        .as_array()
        .unwrap()
        .iter()
        .map(|loss| loss.as_f64().unwrap())
        .collect();
    assert!(
        losses.last().unwrap() < &(losses[0] / 2.0),
        "the loss did not fall: {losses:?}"
    );
    let accuracy = metrics["test_accuracy"].as_f64().unwrap();
    assert!(accuracy >= 0.9, "accuracy {accuracy}");
}

fn example(name: &str) -> String {
    repository()
        .join("examples")
        .join(name)
        .join("job.yaml")
        .to_str()
        .unwrap()
        .to_owned()
}

#[test]
fn plain_python_trains_on_two_nodes_and_resumes_after_a_crash() {
    let machine = Machine::new();
    let cluster = machine.up(&["--nodes", "2"]);
    let file = example("digits");
    let whole = cluster
        .yard(&["run", "-f", &file, "--env", "PYTHONDONTWRITEBYTECODE=1"])
        .expect_code(0);
    assert!(whole.stdout.contains("epoch=1 "), "{}", whole.stdout);
    let uninterrupted = metrics(&cluster, "j1", &machine.dir("whole"));
    assert_learned(&uninterrupted);
    assert_eq!(uninterrupted["world_size"], 2);
    let crash = [
        "run",
        "-f",
        &file,
        "--retries",
        "1",
        "--",
        "python3",
        "train.py",
        "--crash-at-epoch",
        "3",
        "--crash-rank",
        "1",
    ];
    let _ = cluster.yard(&crash).expect_code(0);
    let resumed = metrics(&cluster, "j2", &machine.dir("resumed"));
    assert_eq!(resumed["resumed"], true);
    assert_eq!(
        resumed["params_hash"], uninterrupted["params_hash"],
        "a resumed run ends where an uninterrupted one does"
    );
    let attempts = cluster.job("j2")["attempts"].clone();
    assert_eq!(attempts[0]["outcome"], "FAILED");
    assert_eq!(attempts[1]["outcome"], "SUCCEEDED");
}

#[test]
fn the_demo_trains_and_leaves_nothing_running() {
    let machine = Machine::new();
    let ran = machine.yard(&["demo", "--epochs", "6"]).expect_code(0);
    for part in ["epoch=1 ", "epoch=6 ", "accuracy", "outputs"] {
        assert!(
            ran.stdout.contains(part),
            "{part:?} is missing in\n{}",
            ran.stdout
        );
    }
    let text = fs::read(machine.work().join("yard-demo-outputs/metrics.json")).unwrap();
    assert_learned(&serde_json::from_slice(&text).unwrap());
    let _ = machine.yard(&["jobs"]).expect_code(69);
}

/// Debian's interpreter, which its python3-torch belongs to; another `python3` may be first in PATH.
const PYTHON: &str = "/usr/bin/python3";

fn has_torch() -> bool {
    let found = Command::new(PYTHON)
        .args(["-c", "import torch"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    found.is_ok_and(|status| status.success())
}

#[test]
fn pytorch_ddp_trains_on_two_nodes() {
    if !has_torch() {
        return skip("/usr/bin/python3 has no torch (Debian's package python3-torch)");
    }
    let machine = Machine::new();
    let cluster = machine.up(&["--nodes", "2"]);
    let file = example("ddp");
    let _ = cluster
        .yard(&[
            "run",
            "-f",
            &file,
            "--",
            PYTHON,
            "ddp/train.py",
            "--epochs",
            "5",
        ])
        .expect_code(0);
    let plain = metrics(&cluster, "j1", &machine.dir("plain"));
    assert_learned(&plain);
    assert_eq!(plain["world_size"], 2);
    let torchrun = [
        "run",
        "-f",
        &file,
        "--launcher",
        "torchrun",
        "--",
        PYTHON,
        "ddp/train.py",
        "--epochs",
        "5",
    ];
    let _ = cluster.yard(&torchrun).expect_code(0);
    let launched = metrics(&cluster, "j2", &machine.dir("launched"));
    assert_learned(&launched);
    assert_eq!(
        launched["params_hash"], plain["params_hash"],
        "torchrun trains the same model"
    );
}
