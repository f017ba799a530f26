//! Agents that are killed and replaced at any moment while jobs run: nothing that a job said or how it ended is lost, and
//! nothing is started twice.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use trainyard_tests::{Machine, lives, until};

/// How often the agent is killed.
const KILLS: u32 = 20;
/// The longest time in milliseconds between two kills: an agent comes up in some 100 of a debug build.
const LONGEST_LIFE: u64 = 600;

/// A process of the cluster, started again exactly as it was.
fn again(pid: i32, program: &Path, log: &Path) -> Command {
    let words = fs::read(format!("/proc/{pid}/cmdline")).expect("the file can be used");
    let words = String::from_utf8(words).expect("it is UTF-8");
    let variables = fs::read(format!("/proc/{pid}/environ")).expect("the file can be used");
    let variables = String::from_utf8(variables).expect("it is UTF-8");
    let log = fs::OpenOptions::new()
        .append(true)
        .open(log)
        .expect("the file can be used");
    let mut command = Command::new(program);
    command
        .args(words.split_terminator('\0').skip(1))
        .env_clear()
        .envs(
            variables
                .split_terminator('\0')
                .filter_map(|variable| variable.split_once('=')),
        )
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    command
}

/// Kills an agent of its own again and again; the last one lives on until this is dropped.
struct Agent(Child);

impl Agent {
    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Every number once and in order, and then the end.
fn check_lines(lines: &[&str], what: &str) {
    let (last, numbers) = lines
        .split_last()
        .unwrap_or_else(|| panic!("{what}: nothing"));
    for (expected, line) in (1..).zip(numbers) {
        assert_eq!(*line, format!("line {expected}"), "{what}");
    }
    assert_eq!(*last, format!("end {}", numbers.len()), "{what}");
    assert!(numbers.len() > 100, "{what}: only {} lines", numbers.len());
}

#[test]
fn nothing_is_lost_while_the_agent_is_killed_again_and_again() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let gate = machine.dir("gate");
    // The first rank that fails ends its gang, so the two wait for each other before they fail.
    let script = format!(
        "i=0; while [ ! -e {} ]; do i=$((i+1)); echo line $i; [ $((i % 20)) = 0 ] && sleep 0.01; done; echo end $i; \
         : > ended.$RANK; [ $WORLD_SIZE = 1 ] || until [ -e ended.0 -a -e ended.1 ]; do sleep 0.01; done; exit $((5 + RANK))",
        gate.display()
    );
    let two = cluster.submit(&[
        "--procs-per-node",
        "2",
        "--cpus",
        "0.1",
        "--",
        "sh",
        "-c",
        &script,
    ]);
    let array = cluster.submit(&["--array", "0-3", "--cpus", "0.1", "--", "sh", "-c", &script]);
    let _ = cluster.until_state(&two, "RUNNING");
    let _ = cluster.until_state(&array, "RUNNING");
    let short: Vec<String> = (0..3)
        .map(|code| {
            let script = format!("echo only; exit {code}");
            cluster.submit(&["--cpus", "0.1", "--", "sh", "-c", &script])
        })
        .collect();

    let seed = std::env::var("TRAINYARD_SEED").ok();
    let seed = seed.and_then(|seed| seed.parse().ok()).unwrap_or(7);
    let mut state: u64 = seed;
    let mut draw = |bound: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) % bound
    };
    let first = cluster.pid("agent 0");
    let log = machine.local().join("nodes/0/agent.log");
    let mut command = again(first, machine.program(), &log);
    trainyard_tests::end(first, Signal::SIGKILL);
    until("the first agent is gone", || (!lives(first)).then_some(()));
    let mut agent = Agent(command.spawn().expect("yard can be started"));
    for _ in 1..KILLS {
        let life = std::time::Duration::from_millis(draw(LONGEST_LIFE));
        trainyard_tests::pass(life);
        agent.kill();
        agent = Agent(command.spawn().expect("yard can be started"));
    }
    fs::write(&gate, "").expect("the file can be used");
    for (id, code) in short.iter().zip(0..) {
        let _ = cluster.yard(&["wait", id]).expect_code(code);
    }
    assert_ne!(cluster.yard(&["wait", &two]).code, 0);
    assert_ne!(cluster.yard(&["wait", &array]).code, 0);
    let job = cluster.job(&two);
    assert_eq!(
        job["attempts"].as_array().map(Vec::len),
        Some(1),
        "seed {seed}: {job}"
    );
    let output = cluster.yard(&["logs", &two]).expect_code(0).stdout;
    for rank in 0..2 {
        let prefix = format!("[{rank}] ");
        let lines: Vec<&str> = output
            .lines()
            .filter_map(|line| line.strip_prefix(&prefix))
            .collect();
        check_lines(&lines, &format!("seed {seed}, rank {rank}"));
    }
    let all = cluster.yard(&["logs", &array]).expect_code(0).stdout;
    for task in 0..4 {
        let prefix = format!("[{task}.0] ");
        let lines: Vec<&str> = all
            .lines()
            .filter_map(|line| line.strip_prefix(&prefix))
            .collect();
        check_lines(&lines, &format!("seed {seed}, task {task}"));
    }
    agent.kill();
}
