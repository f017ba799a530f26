//! What the measuring programs in `benches/` share: the binary to measure, a local cluster of it in a directory of its own,
//! and the table that they print. They measure from outside, through the command line and `/proc`; this must not reach into
//! a component either.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "for programs whose purpose is to print a table"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::build;

/// The release binary, built if need be; or the one that `YARD_BENCH_BINARY` names.
///
/// # Panics
/// If it does not build.
#[must_use]
pub fn binary() -> PathBuf {
    std::env::var_os("YARD_BENCH_BINARY").map_or_else(|| build(&["--release"]), PathBuf::from)
}

/// One line about the machine.
#[must_use]
pub fn machine() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("CPU of an unknown model", |(_, model)| model);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    // What else ran shortly before, as that makes every figure worse.
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    let kernel = kernel.trim();
    format!("machine: {cores} cores of {model}, Linux {kernel}, load {load} before the start")
}

/// A local cluster of one node, which is stopped when dropped.
#[derive(Debug)]
pub struct Cluster {
    yard: PathBuf,
    home: TempDir,
}

impl Cluster {
    /// Starts one of this binary.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn up(yard: PathBuf) -> Self {
        let home = tempfile::Builder::new()
            .prefix("yard-figures-")
            .tempdir()
            .expect("a temporary directory can be made");
        let cluster = Self { yard, home };
        let _ = cluster.yard(&["up", "--listen", "127.0.0.1:0"]);
        cluster
    }

    /// Its directory; everything of it lies within.
    #[must_use]
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// A command of its user, not yet started.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.yard);
        command
            .args(arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.home.path())
            .env("YARD_DATA_DIR", self.home.path().join("data"))
            .env("YARD_CONFIG_DIR", self.home.path().join("config"))
            .stdin(Stdio::null());
        command
    }

    /// Runs a command; what it wrote to its standard output, trimmed.
    ///
    /// # Panics
    /// If it fails.
    #[must_use]
    pub fn yard(&self, arguments: &[&str]) -> String {
        printed(arguments, &output(&mut self.command(arguments)))
    }

    /// The coordinator's and the agent's process.
    ///
    /// # Panics
    /// If they are not on record.
    #[must_use]
    pub fn processes(&self) -> [(&'static str, Pid); 2] {
        let path = self.home.path().join("data/local/processes.json");
        let text = fs::read(path).expect("up has written its processes");
        let value: Value = serde_json::from_slice(&text).expect("they are JSON");
        let pid = |process: &Value| {
            let pid = process["pid"].as_i64().and_then(|pid| pid.try_into().ok());
            Pid::from_raw(pid.expect("a process has an id"))
        };
        [
            ("coordinator", pid(&value["coordinator"])),
            ("agent", pid(&value["agents"][0])),
        ]
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let stopped = self.command(&["down", "--force"]).output();
        if !stopped.is_ok_and(|output| output.status.success()) {
            eprintln!("the cluster could not be stopped");
        }
    }
}

/// Runs a command to its end.
///
/// # Panics
/// If it cannot be started.
pub fn output(command: &mut Command) -> Output {
    command.output().expect("a command can be started")
}

/// What a command wrote to its standard output, trimmed.
///
/// # Panics
/// If it failed.
#[must_use]
pub fn printed(arguments: &[&str], output: &Output) -> String {
    assert!(
        output.status.success(),
        "{arguments:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Lets time go by.
#[expect(
    clippy::disallowed_methods,
    reason = "what is measured is what happens in a span of time in which nothing is asked for"
)]
pub fn let_pass(time: Duration) {
    std::thread::sleep(time);
}

/// In milliseconds.
#[must_use]
pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The median of values, of which there is at least one.
#[must_use]
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2])
}

/// What a figure should be.
#[derive(Debug, Clone, Copy)]
pub enum Goal {
    /// It is only told.
    None,
    /// The most that it may be.
    AtMost(f64),
    /// The least that it may be.
    AtLeast(f64),
}

/// Rows of figure, measured, goal, and whether it was met.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<[String; 4]>,
}

impl Table {
    /// Adds a row, and shows it at once.
    pub fn add(&mut self, figure: &str, value: f64, unit: &str, goal: Goal) {
        // Three digits are as many as such a measurement bears.
        let digits = match value.abs() {
            value if value >= 100.0 => 0,
            value if value >= 10.0 => 1,
            value if value >= 0.1 => 2,
            _ => 3,
        };
        let measured = format!("{value:.digits$} {unit}").trim().to_owned();
        eprintln!("{figure}: {measured}");
        let (goal, met) = match goal {
            Goal::None => (String::new(), None),
            Goal::AtMost(most) => (format!("at most {most}"), Some(value <= most)),
            Goal::AtLeast(least) => (format!("at least {least}"), Some(value >= least)),
        };
        let verdict = met.map_or("", |met| if met { "met" } else { "missed" });
        let row = [figure.to_owned(), measured, goal, verdict.to_owned()];
        self.rows.push(row);
    }

    /// Prints all rows as a table.
    pub fn print(&self) {
        let head = ["figure", "measured", "goal", ""].map(str::to_owned);
        let rule = ["---"; 4].map(str::to_owned);
        let lines = || [&head, &rule].into_iter().chain(&self.rows);
        let width = |column: usize| lines().map(|row| row[column].len()).max().unwrap_or(0);
        let widths = [0, 1, 2, 3].map(width);
        for row in lines() {
            let cells = row.iter().zip(widths);
            let cells: Vec<_> = cells.map(|(cell, w)| format!("{cell:w$}")).collect();
            println!("| {} |", cells.join(" | "));
        }
    }
}
