//! The coordinator's and an agent's disk fails under the real binary: what was answered is there, what was not may be, and
//! nobody goes on as if nothing had happened. Also: damage at a start, a second coordinator, and one that was just killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use nix::sys::signal::Signal;
use serde_json::Value;
use trainyard_tests::{Machine, Running, repository, until};

/// The library that stands before the calls of a disk.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let built = Command::new(cargo)
            .args(["build", "--locked", "--package", "trainyard-faulty-disk"])
            .args(["--message-format", "json-render-diagnostics"])
            .current_dir(repository())
            .output()
            .expect("cargo can be started");
        assert!(
            built.status.success(),
            "the faulty disk does not build: {}",
            String::from_utf8_lossy(&built.stderr)
        );
        let lines = String::from_utf8(built.stdout).expect("cargo speaks UTF-8");
        let file = lines.lines().rev().find_map(|line| {
            let message: Value = serde_json::from_str(line).ok()?;
            let named = message["target"]["name"] == "trainyard_faulty_disk";
            let file = message["filenames"].get(0)?.as_str()?;
            named.then(|| PathBuf::from(file))
        });
        file.expect("cargo says where it put the library")
    })
}

/// A machine with a coordinator that runs by itself, on a disk that fails on request.
struct World {
    machine: Machine,
}

impl World {
    fn new() -> Self {
        let machine = Machine::new();
        fs::write(machine.dir("faults"), "").expect("a file can be made");
        Self { machine }
    }

    fn state(&self) -> PathBuf {
        self.machine.dir("data").join("coordinator")
    }

    fn faults(&self, text: &str) {
        let new = self.machine.dir("faults.new");
        fs::write(&new, text).expect("a file can be made");
        fs::rename(new, self.machine.dir("faults")).expect("a file can be renamed");
    }

    fn faulty(&self, arguments: &[&str]) -> Command {
        let mut command = self.machine.command(arguments);
        command
            .env("LD_PRELOAD", library())
            .env("FAULTY_DISK", self.machine.dir("faults"));
        command
    }

    fn start(&self) -> Running {
        let coordinator =
            Running::start(self.faulty(&["coordinator", "run", "--listen", "127.0.0.1:0"]));
        coordinator.until_line("coordinator leads");
        coordinator
    }

    /// A submit that is not waited for: it would wait for a coordinator that has ended to come back.
    fn ask(&self, request: &str) -> Child {
        let arguments = [
            "submit",
            "--allow-infeasible",
            "--request-id",
            request,
            "--",
            "true",
        ];
        let mut command = self.machine.command(&arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        command.spawn().expect("yard can be started")
    }

    fn submit(&self) -> trainyard_tests::Ran {
        let arguments = ["submit", "--allow-infeasible", "--", "true"];
        let ran = self.machine.yard(&arguments);
        // Without a coordinator it would start a cluster of its own, and prove nothing.
        assert!(!self.machine.local().exists(), "it went elsewhere");
        ran
    }

    fn jobs(&self) -> usize {
        let found = self.machine.yard(&["jobs", "-a", "--json"]).expect_code(0);
        found.stdout.matches("\"id\"").count()
    }
}

/// Ends a submit; what it has printed.
fn given_up(mut asks: Child) -> String {
    asks.kill().expect("it can be ended");
    let output = asks.wait_with_output().expect("its output can be read");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_sync_that_fails_ends_the_coordinator_and_nothing_of_it_was_answered() {
    let world = World::new();
    let coordinator = world.start();
    let _ = world.submit().expect_code(0);
    let _ = world.submit().expect_code(0);
    // The log of the database only, so that it is the commit that fails.
    let log = world.state().join("state.db-wal");
    world.faults(&format!("EIO sync 0 * {}", log.display()));
    let asks = world.ask("r3");
    coordinator.until_line("the state could not be made durable, so the coordinator stopped");
    assert_ne!(coordinator.wait(), 0);
    assert_eq!(given_up(asks), "", "nothing was answered");
    world.faults("");
    let again = world.start();
    // What was written before the failed sync may have come to the disk; the same request makes it once.
    assert!((2..=3).contains(&world.jobs()));
    let _ = world
        .machine
        .yard(&[
            "submit",
            "--allow-infeasible",
            "--request-id",
            "r3",
            "--",
            "true",
        ])
        .expect_code(0);
    assert_eq!(world.jobs(), 3);
    again.signal(Signal::SIGTERM);
    assert_eq!(again.wait(), 0);
    let state = world.state();
    let arguments = [
        "coordinator",
        "check",
        "--state-dir",
        state.to_str().unwrap(),
    ];
    let _ = world.machine.yard(&arguments).expect_code(0);
}

#[test]
fn a_write_that_fails_ends_the_coordinator_too() {
    let world = World::new();
    let coordinator = world.start();
    let _ = world.submit().expect_code(0);
    let log = world.state().join("state.db-wal");
    world.faults(&format!("EIO write 0 * {}", log.display()));
    let asks = world.ask("r2");
    assert_ne!(coordinator.wait(), 0);
    assert_eq!(given_up(asks), "", "nothing was answered");
    world.faults("");
    let _again = world.start();
    assert_eq!(world.jobs(), 1);
}

#[test]
fn a_quota_that_is_used_up_is_a_full_disk_and_no_end() {
    let world = World::new();
    let coordinator = world.start();
    let _ = world.submit().expect_code(0);
    let state = world.state();
    // The write that meets it, and whatever asks whether it was the quota; then a piece of the reserve has made room.
    world.faults(&format!(
        "EDQUOT write 0 1 {state}/state.db-wal\nEDQUOT write 0 * {state}/.state.probe\nEDQUOT write 1 * {state}/state.reserve",
        state = state.display()
    ));
    let _ = world.submit().expect_code(0);
    // While the reserve cannot be filled again, nothing new is taken in, but what is there goes on.
    let refused = world.submit().expect_code(77);
    assert!(refused.stderr.contains("quota"), "{}", refused.stderr);
    let _ = world.machine.yard(&["cancel", "j1"]).expect_code(0);
    world.faults("");
    until("it has recovered", || {
        (world.submit().code == 0).then_some(())
    });
    coordinator.signal(Signal::SIGTERM);
    assert_eq!(coordinator.wait(), 0);
}

#[test]
fn damage_at_a_start_is_refused_with_its_place_and_can_be_given_up() {
    let world = World::new();
    let coordinator = world.start();
    for _ in 0..4 {
        let _ = world.submit().expect_code(0);
    }
    coordinator.signal(Signal::SIGKILL);
    coordinator.wait();
    let log = world.state().join("state.db-wal");
    let mut bytes = fs::read(&log).unwrap();
    // Well within the log, so that whole commits come before and after it.
    let at = bytes.len() * 2 / 3;
    bytes[at] ^= 4;
    fs::write(&log, bytes).unwrap();
    let run = ["coordinator", "run", "--listen", "127.0.0.1:0"];
    let refused = world.machine.yard(&run);
    assert_ne!(refused.code, 0);
    for said in [
        "state.db-wal at offset ",
        "affected jobs: j",
        "--accept-loss",
        "coordinator check",
    ] {
        assert!(refused.stderr.contains(said), "{said}: {}", refused.stderr);
    }
    let state = world.state();
    let check = [
        "coordinator",
        "check",
        "--state-dir",
        state.to_str().unwrap(),
    ];
    let checked = world.machine.yard(&check);
    assert_ne!(checked.code, 0);
    let accepting: Vec<&str> = run.iter().copied().chain(["--accept-loss"]).collect();
    let again = Running::start(world.faulty(&accepting));
    again.until_line("a loss was accepted");
    again.until_line("coordinator leads");
    let next = world.submit().expect_code(0).stdout;
    assert!(
        next.trim().len() > "j100000".len(),
        "numbers go on above: {next}"
    );
}

#[test]
fn a_second_coordinator_says_who_holds_the_state_and_a_killed_one_is_followed_at_once() {
    let world = World::new();
    let coordinator = world.start();
    let run = ["coordinator", "run", "--listen", "127.0.0.1:0"];
    let second = world.machine.yard(&run);
    assert_ne!(second.code, 0);
    for said in ["held by another coordinator", "pid ", "host ", "since"] {
        assert!(second.stderr.contains(said), "{said}: {}", second.stderr);
    }
    let mut last = coordinator;
    for _ in 0..5 {
        last.signal(Signal::SIGKILL);
        // Not waited for: the next one is started while the kernel takes this one down.
        let next = Running::start(world.faulty(&run));
        next.until_line("coordinator leads");
        last = next;
    }
    assert_eq!(world.jobs(), 0);
}
