//! How long a coordinator takes until it accepts submits: on a state with many jobs, and right after it was killed. Starts
//! the release binary in a directory of its own and prints one table beside the goals.
//!
//! `RECOVERY_PENDING` (100,000), `RECOVERY_RUNNING` (10,000) and `RECOVERY_RUNS` (5) set sizes and repetitions.
#![expect(
    clippy::print_stdout,
    reason = "a program whose purpose is to print a table"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use trainyard_tests::{repository, until};

fn main() {
    let runs = setting("RECOVERY_RUNS", 5);
    let (pending, running) = (
        setting("RECOVERY_PENDING", 100_000),
        setting("RECOVERY_RUNNING", 10_000),
    );
    let yard = built(&["--package", "trainyard"]);
    let maker = built(&[
        "--package",
        "trainyard-coordinator",
        "--example",
        "large_state",
    ]);
    println!("| what | median | worst | goal |\n|---|---|---|---|");
    let home = tempfile::tempdir().expect("a temporary directory can be made");
    let mut world = World::new(&yard, &home);
    let killed = world.kill_and_start(runs);
    row(
        "`kill -9` until a submit is accepted, small state",
        &killed,
        2.0,
    );
    world.stop();
    let state = home.path().join("data/coordinator");
    let made = Command::new(maker)
        .arg(&state)
        .args([pending, running, 100].map(|number| number.to_string()))
        .status()
        .expect("the maker can be started");
    assert!(made.success());
    let large = world.kill_and_start(runs);
    let what =
        format!("start until a submit is accepted, {pending} pending and {running} running jobs");
    row(&what, &large, 3.0);
    world.stop();
}

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().expect("it is a number"))
}

fn row(what: &str, times: &[Duration], goal: f64) {
    let mut seconds: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
    seconds.sort_by(f64::total_cmp);
    let (median, worst) = (seconds[seconds.len() / 2], seconds[seconds.len() - 1]);
    println!("| {what} | {median:.2} s | {worst:.2} s | {goal} s |");
}

/// Builds a program of this tree for release and says where it is.
fn built(what: &[&str]) -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--release", "--locked"])
        .args(what)
        .args(["--message-format", "json-render-diagnostics"])
        .current_dir(repository())
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo can be started");
    assert!(built.status.success(), "{what:?} does not build");
    let lines = String::from_utf8(built.stdout).expect("cargo speaks UTF-8");
    let executable = lines.lines().rev().find_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        message.get("executable")?.as_str().map(PathBuf::from)
    });
    executable.expect("cargo says where it put it")
}

struct World<'a> {
    yard: &'a Path,
    home: &'a TempDir,
    coordinator: Option<Child>,
}

impl<'a> World<'a> {
    fn new(yard: &'a Path, home: &'a TempDir) -> Self {
        let mut world = Self {
            yard,
            home,
            coordinator: None,
        };
        world.start();
        world
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.yard);
        command
            .args(arguments)
            .env_clear()
            .env("HOME", self.home.path())
            .env("YARD_DATA_DIR", self.home.path().join("data"))
            .env("YARD_CONFIG_DIR", self.home.path().join("config"))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }

    /// Starts a coordinator and submits until one is accepted; how long that took from its start.
    fn start(&mut self) -> Duration {
        let log = fs::File::create(self.home.path().join("log")).expect("a log can be made");
        let begun = Instant::now();
        let started = self
            .command(&["coordinator", "run", "--listen", "127.0.0.1:0"])
            .stderr(log)
            .spawn();
        let child = started.expect("a coordinator can be started");
        let pid = child.id();
        self.coordinator = Some(child);
        until("a submit is accepted", || {
            // Not before this coordinator is there: `yard submit` would start a cluster of its own and measure that.
            if !self.is_up(pid) {
                return None;
            }
            let submitted = self
                .command(&["submit", "--allow-infeasible", "--", "true"])
                .stderr(Stdio::null())
                .status();
            let accepted = submitted.is_ok_and(|status| status.success());
            assert!(
                !self.home.path().join("data/local").exists(),
                "the submit went to a cluster of its own"
            );
            accepted.then(|| begun.elapsed())
        })
    }

    /// Whether the coordinator that says where it is reached is this process.
    fn is_up(&self, pid: u32) -> bool {
        let path = self.home.path().join("data/coordinator/coordinator.json");
        let Ok(text) = fs::read(path) else {
            return false;
        };
        serde_json::from_slice(&text).is_ok_and(|found: Value| found["pid"] == pid)
    }

    fn kill_and_start(&mut self, runs: usize) -> Vec<Duration> {
        let times = (0..runs).map(|_| {
            let killed = Instant::now();
            self.stop();
            self.start();
            killed.elapsed()
        });
        times.collect()
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.coordinator.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        self.stop();
    }
}
