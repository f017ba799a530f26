//! What the example training is worth: the same training, run by hand and undisturbed, ends with the same parameters, bit
//! by bit, however often an attempt was interrupted and gone on from its checkpoint.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::super::plan::TRAINING_EPOCHS;
use super::super::world::World;
use super::promises::fetch;
use super::{Case, Findings};
use crate::repository;

/// Where ranks that are run by hand meet; they have a host of their own.
const PORT: &str = "29500";
/// Longest that such a rank may take, in seconds.
const LONGEST: &str = "120";

/// What training ends with, by the number of its ranks.
#[derive(Debug)]
pub(super) struct References(BTreeMap<u32, Value>);

impl References {
    /// Trains with 2 to so many ranks on the users' host.
    pub(super) fn new(world: &World, most: u32) -> Self {
        Self(
            (2..=most)
                .map(|ranks| (ranks, reference(world, ranks)))
                .collect(),
        )
    }

    #[cfg(test)]
    pub(super) fn of(ranks: u32, metrics: Value) -> Self {
        Self([(ranks, metrics)].into())
    }

    /// What is wrong with the result of a training.
    pub(super) fn problem(&self, ranks: u32, text: &str) -> Option<String> {
        let Ok(metrics) = serde_json::from_str::<Value>(text) else {
            return Some(format!("{text:.200?} is no JSON"));
        };
        let expected = &self.0[&ranks];
        [
            "world_size",
            "epochs",
            "losses",
            "test_accuracies",
            "params_hash",
        ]
        .into_iter()
        .find(|name| expected[*name].is_null() || metrics[*name] != expected[*name])
        .map(|name| format!("{name} is {} instead of {}", metrics[name], expected[name]))
    }
}

fn reference(world: &World, ranks: u32) -> Value {
    let to = world.base().join(format!("reference-{ranks}"));
    let all: Vec<_> = (0..ranks)
        .map(|rank| start(world, rank, ranks, &to))
        .collect();
    for rank in all {
        let ran = rank.wait_with_output().expect("a child can be waited for");
        assert!(
            ran.status.success(),
            "the training that results are compared with failed: {}",
            String::from_utf8_lossy(&ran.stderr)
        );
    }
    let text = std::fs::read(to.join("metrics.json")).expect("training leaves its metrics");
    serde_json::from_slice(&text).expect("training writes JSON")
}

fn start(world: &World, rank: u32, ranks: u32, to: &Path) -> Child {
    let inner = world.net.command(world.user_host(), Path::new("timeout"));
    let mut command = Command::new(inner.get_program());
    command
        .args(inner.get_args())
        .args(["-s", "KILL", LONGEST, "python3", "train.py", "--epochs"])
        .arg(TRAINING_EPOCHS.to_string())
        .current_dir(repository().join("examples/digits"))
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("RANK", rank.to_string())
        .env("WORLD_SIZE", ranks.to_string())
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", PORT)
        .env("YARD_OUTPUT_DIR", to)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command.spawn().expect("nsenter can be started")
}

/// A training that succeeded left what it was to learn.
pub(super) fn result(
    world: &World,
    case: &Case<'_>,
    references: &References,
    findings: &mut Findings,
) {
    let Some(attempt) = case.succeeded() else {
        return;
    };
    let (ran, to) = fetch(world, case);
    let text = std::fs::read_to_string(to.join("metrics.json")).unwrap_or_default();
    match references.problem(case.job.ranks, &text) {
        None if attempt.number > 1 => {
            findings.allow("trainings of several attempts with the right parameters");
        }
        None => findings.allow("trainings of one attempt with the right parameters"),
        Some(_) if attempt.warned => {
            findings.allow("outputs that could not be kept, with a warning");
        }
        Some(problem) => findings.broken.push(format!(
            "j{} trained wrongly: {problem} ({}) {}",
            case.id,
            ran.code,
            ran.stderr.trim()
        )),
    }
}
