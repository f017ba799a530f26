//! `--on-disconnect stop` with real processes: an agent that is killed for good, and what its job's ranks and the next
//! attempt do then.
#![allow(clippy::unwrap_used, reason = "a failed set-up is a failed test")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use nix::unistd::geteuid;
use serde_json::Value;
use trainyard_tests::{Machine, Running, lives, until};

/// A coordinator that gives up what is silent for 6 s, and its admin.
struct Head {
    machine: Machine,
    _coordinator: Running,
}

impl Head {
    fn start() -> Self {
        let machine = Machine::new();
        let state = machine.dir("state");
        let text = format!(
            "data_dir = '{}'\nlisten = '127.0.0.1:0'\nadmin = 'chief'\n[timing]\nheartbeat_interval = '1s'\n\
             unreachable_after = '3s'\nlost_after = '6s'\nlost_after_gang = '6s'\nlease_margin = '2s'\n",
            state.display()
        );
        let config = machine.dir("coordinator.toml");
        fs::write(&config, text).unwrap();
        let arguments = ["coordinator", "run", "--config", config.to_str().unwrap()];
        let coordinator = Running::start(machine.command(&arguments));
        let admin = state.join("admin");
        until("the coordinator runs", || {
            (admin.join("cluster.json").exists() && state.join("coordinator.json").exists())
                .then_some(())
        });
        let contexts = machine.dir("config").join("contexts");
        fs::create_dir_all(&contexts).unwrap();
        symlink(&admin, contexts.join("admin")).unwrap();
        fs::write(machine.dir("config").join("current"), "admin\n").unwrap();
        Self {
            machine,
            _coordinator: coordinator,
        }
    }

    /// A node, whose agent is up. Its shims end with the test at the latest.
    fn node(&self, name: &str) -> Node {
        let token = self.machine.yard(&["token", "create", "--node"]);
        let token = token.expect_code(0).stdout.trim().to_owned();
        let machine = Machine::new();
        let mut arguments = vec!["join", &token, "--name", name];
        if geteuid().is_root() {
            arguments.extend(["--run-as", "nobody"]);
        }
        let agent = Running::start(machine.command(&arguments));
        until("the node is ready", || {
            let nodes = self.machine.yard(&["nodes", "--json"]).expect_code(0);
            let nodes = nodes.json()["nodes"].as_array().cloned()?;
            let ready = |node: &Value| node["name"] == name && node["availability"] == "READY";
            nodes.iter().any(ready).then_some(())
        });
        Node {
            _machine: machine,
            agent,
        }
    }

    fn job(&self, id: &str) -> Value {
        self.machine
            .yard(&["job", id, "--json"])
            .expect_code(0)
            .json()
    }
}

struct Node {
    _machine: Machine,
    agent: Running,
}

/// A directory that jobs can write to, whoever they run as.
fn open_to_all(path: PathBuf) -> PathBuf {
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    path
}

fn lines(ledger: &Path) -> Vec<String> {
    let text = fs::read_to_string(ledger).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// What waits for the rest of the test whatever happens to it, if it is not ended before.
const RANK: &str = "
    echo begin $YARD_ATTEMPT $$ >> $LEDGER
    trap 'echo end $YARD_ATTEMPT >> $LEDGER; exit 0' TERM
    [ $YARD_ATTEMPT = 1 ] || exit 0
    n=0
    while [ $n -lt 1200 ]; do sleep 0.1; n=$((n + 1)); done";

#[test]
fn an_agent_that_is_killed_for_good_ends_its_ranks_before_the_next_attempt_begins() {
    let head = Head::start();
    let first = head.node("first");
    let ledger = open_to_all(head.machine.dir("ledger")).join("ledger");
    let submit = head.machine.yard(&[
        "submit",
        "--on-disconnect",
        "stop",
        "--grace",
        "1s",
        "--no-dir",
        "--env",
        &format!("LEDGER={}", ledger.display()),
        "--",
        "sh",
        "-c",
        RANK,
    ]);
    let id = submit.expect_code(0).stdout.trim().to_owned();
    let rank = until("the first attempt runs", || {
        let begin = lines(&ledger).into_iter().next()?;
        begin.strip_prefix("begin 1 ")?.parse::<i32>().ok()
    });
    let _second = head.node("second");
    first.agent.signal(Signal::SIGKILL);

    let seen = until("the coordinator misses the node", || {
        let shown = head.machine.yard(&["job", &id]).expect_code(0).stdout;
        shown.contains("unreachable for").then_some(shown)
    });
    assert!(seen.contains("1 of 1 node unreachable for"), "{seen}");
    until("the second attempt begins", || {
        (lines(&ledger).len() >= 3).then_some(())
    });
    assert!(!lives(rank), "a rank of attempt 1 lives beside attempt 2");
    let ledger = lines(&ledger);
    assert_eq!(ledger[1], "end 1", "{ledger:?}");
    assert!(ledger[2].starts_with("begin 2 "), "{ledger:?}");
    assert_eq!(ledger.len(), 3, "{ledger:?}");

    let ended = head.machine.yard(&["wait", &id]);
    let _ = ended.expect_code(0);
    let job = head.job(&id);
    let attempt = &job["attempts"][0];
    assert_eq!(attempt["state"], "LOST", "{attempt}");
    assert_eq!(attempt["reason"]["code"], "LEASE_EXPIRED", "{attempt}");
    assert_eq!(attempt["outcome"], "INTERRUPTED", "{attempt}");
    let message = attempt["reason"]["message"].as_str().unwrap();
    assert!(message.starts_with("lease over on n1"), "{message}");
    assert!(!message.contains("unconfirmed"), "{message}");
}

#[test]
fn an_outage_of_the_coordinator_of_that_length_ends_the_ranks_too() {
    let head = Head::start();
    let _node = head.node("only");
    let ledger = open_to_all(head.machine.dir("ledger")).join("ledger");
    let submit = head.machine.yard(&[
        "submit",
        "--on-disconnect",
        "stop",
        "--grace",
        "1s",
        "--no-dir",
        "--env",
        &format!("LEDGER={}", ledger.display()),
        "--",
        "sh",
        "-c",
        RANK,
    ]);
    let _ = submit.expect_code(0);
    until("the first attempt runs", || {
        (!lines(&ledger).is_empty()).then_some(())
    });
    let state = head.machine.dir("state").join("coordinator.json");
    let found: Value = serde_json::from_slice(&fs::read(state).unwrap()).unwrap();
    let pid = i32::try_from(found["pid"].as_i64().unwrap()).unwrap();
    trainyard_tests::end(pid, Signal::SIGSTOP);
    until("the ranks are ended", || {
        lines(&ledger)
            .iter()
            .any(|line| line == "end 1")
            .then_some(())
    });
    trainyard_tests::end(pid, Signal::SIGCONT);
    until("the next attempt begins", || {
        lines(&ledger)
            .iter()
            .any(|line| line.starts_with("begin 2 "))
            .then_some(())
    });
    let _ = head.machine.yard(&["wait", "j1"]).expect_code(0);
    let job = head.job("j1");
    assert_eq!(
        job["attempts"][0]["reason"]["code"], "LEASE_EXPIRED",
        "{job}"
    );
    assert_eq!(job["attempts"][0]["state"], "ENDED", "{job}");
}
