//! `yard selftest` on real clusters: it keeps its word on healthy ones, and it accuses one that was sabotaged.

use std::fs;

use nix::sys::signal::Signal;
use serde_json::Value;
use trainyard_tests::{Cluster, Machine, Ran, Running, end, until};

/// The result of one promise.
fn result(report: &Value, key: &str) -> String {
    let promises = report["promises"].as_array().expect("a list of promises");
    let row = promises.iter().find(|row| row["key"] == key);
    let row = row.unwrap_or_else(|| panic!("no {key} in {report:#}"));
    row["result"].as_str().expect("a result").to_owned()
}

/// The report of a self test that found nothing wrong.
fn good(ran: Ran) -> Value {
    let text = ran.stdout.clone();
    let report = if ran.code == 0 {
        ran.json()
    } else {
        panic!("exit code {}: {text}\n{}", ran.code, ran.stderr)
    };
    assert_eq!(report["ok"], true, "{report:#}");
    for key in [
        "acknowledged",
        "one_job",
        "ended",
        "started_once",
        "uninterrupted",
        "exits",
        "retries",
        "gangs",
        "cancelled",
        "final",
        "logs",
        "outputs",
        "nothing_left",
    ] {
        assert_eq!(result(&report, key), "kept", "{key}: {report:#}");
    }
    report
}

/// Nothing of a self test is left unfinished.
fn nothing_lives(cluster: &Cluster<'_>) {
    let live = cluster.yard(&["jobs", "--json"]).expect_code(0).json();
    assert_eq!(live["jobs"], Value::Array(Vec::new()), "{live:#}");
}

/// Processes whose command line has all these words.
fn processes_with(words: &[&str]) -> Vec<i32> {
    let all = fs::read_dir("/proc").expect("there is /proc").flatten();
    all.filter_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).into_owned();
        words.iter().all(|word| line.contains(word)).then_some(pid)
    })
    .collect()
}

#[test]
fn a_cluster_that_is_left_alone_keeps_everything() {
    let machine = Machine::new();
    let cluster = machine.up(&["--nodes", "2"]);
    let ran = cluster.yard(&["selftest", "--keep"]).expect_code(0);
    assert!(
        ran.stdout.contains("an acknowledged job is on record")
            && ran.stdout.contains("none broken"),
        "{}",
        ran.stdout
    );
    // In a pipe: no colours, no moving line.
    assert!(!ran.stdout.contains('\u{1b}') && !ran.stderr.contains('\u{1b}'));
    let kept = fs::read_dir(machine.work()).expect("readable").flatten();
    let kept: Vec<_> = kept
        .filter(|entry| {
            entry
                .file_name()
                .to_string_lossy()
                .starts_with("yard-selftest-")
        })
        .collect();
    assert_eq!(kept.len(), 1, "{kept:?}");
    nothing_lives(&cluster);
}

#[test]
fn all_three_faults_on_a_head_and_two_nodes() {
    let machine = Machine::new();
    let cluster = machine.up(&["--nodes", "2"]);
    let (coordinator, agent) = (cluster.pid("coordinator"), cluster.pid("agent 1"));
    let ran = cluster.yard(&[
        "selftest",
        "--kill-coordinator",
        "--kill-agent",
        "n2",
        "--partition",
        "n1",
        "--for",
        "3s",
        "--yes",
        "--json",
    ]);
    let report = good(ran);
    for key in ["kill_coordinator", "kill_agent", "partition"] {
        assert_eq!(result(&report, key), "kept", "{key}: {report:#}");
    }
    // They really died, others took their places, and `yard down` will find them.
    let now = (cluster.pid("coordinator"), cluster.pid("agent 1"));
    assert!(now.0 != coordinator && now.1 != agent, "{now:?}");
    assert!(trainyard_tests::lives(now.0) && trainyard_tests::lives(now.1));
    assert!(!trainyard_tests::lives(coordinator) && !trainyard_tests::lives(agent));
    nothing_lives(&cluster);
    let log = fs::read_to_string(machine.local().join("coordinator.log")).expect("readable");
    let warned = log
        .lines()
        .filter(|line| line.contains("WARN") && line.contains("self test"));
    assert!(warned.count() >= 3, "{log}");
}

#[test]
fn the_embedded_cluster_is_started_and_survives() {
    let machine = Machine::new();
    let ran = machine.yard(&[
        "selftest",
        "--kill-coordinator",
        "--kill-agent",
        "--jobs",
        "4",
        "--yes",
        "--json",
    ]);
    let down = machine.yard(&["down", "--force"]);
    let report = good(ran);
    assert_eq!(result(&report, "kill_coordinator"), "kept");
    assert_eq!(result(&report, "kill_agent"), "kept");
    let _ = down.expect_code(0);
    // Down has found what was started again.
    let home = machine.local().display().to_string();
    until("everything has ended", || {
        processes_with(&[&home]).is_empty().then_some(())
    });
}

#[test]
fn the_agent_of_a_machine_that_joined_comes_back_without_its_token() {
    let head = Machine::new();
    let cluster = head.up(&["--nodes", "0"]);
    let token = cluster.yard(&["token", "create", "--node"]).expect_code(0);
    let token = token.stdout.trim().to_owned();
    let machine = Machine::new();
    let data = machine.dir("agent");
    let mut words = vec![
        "join",
        &token,
        "--name",
        "worker",
        "--state-dir",
        data.to_str().expect("text"),
    ];
    if nix::unistd::geteuid().is_root() {
        words.extend(["--run-as", "nobody"]);
    }
    let agent = Running::start(machine.command(&words));
    until("the node is ready", || {
        let nodes = cluster.yard(&["nodes", "--json"]).expect_code(0).json();
        (nodes["nodes"][0]["availability"] == "READY").then_some(())
    });
    let ran = cluster.yard(&[
        "selftest",
        "--kill-agent",
        "worker",
        "--jobs",
        "4",
        "--yes",
        "--json",
    ]);
    // The one that joined is dead; its successor is nobody's child here.
    let home = data.display().to_string();
    let successors = processes_with(&["agent", "run", &home]);
    let code = agent.wait();
    for pid in &successors {
        end(*pid, Signal::SIGTERM);
    }
    assert_eq!(result(&good(ran), "kill_agent"), "kept");
    assert_eq!(code, 128 + Signal::SIGKILL as i32);
    assert_eq!(successors.len(), 1, "{successors:?}");
    until("the successor has ended", || {
        (!trainyard_tests::lives(successors[0])).then_some(())
    });
}

#[test]
fn trouble_takes_an_admin_who_agrees_and_has_bounds() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let token = cluster
        .yard(&["token", "create", "--user", "ann"])
        .expect_code(0);
    let laptop = Machine::new();
    let _ = laptop.yard(&["login", token.stdout.trim()]).expect_code(0);
    for fault in ["--kill-coordinator", "--kill-agent", "--partition"] {
        let refused = laptop.yard(&["selftest", fault, "--yes"]).expect_code(77);
        assert!(
            refused.stderr.contains("role user and this needs admin")
                && refused.stderr.contains(fault),
            "{}",
            refused.stderr
        );
    }
    let asked = cluster
        .yard(&["selftest", "--kill-coordinator"])
        .expect_code(77);
    assert!(asked.stderr.contains("--yes"), "{}", asked.stderr);
    let long = cluster
        .yard(&["selftest", "--partition", "--for", "10m", "--yes"])
        .expect_code(77);
    assert!(long.stderr.contains("--beyond-lost"), "{}", long.stderr);
    let _ = cluster
        .yard(&["selftest", "--kill-agent", "n9", "--yes"])
        .expect_code(66);
    let _ = cluster.yard(&["selftest", "--beyond-lost"]).expect_code(64);
    // None of these submitted anything.
    let jobs = cluster
        .yard(&["jobs", "-a", "--json"])
        .expect_code(0)
        .json();
    assert_eq!(jobs["jobs"], Value::Array(Vec::new()));
    // Without trouble anybody who may run jobs may try.
    let plain = laptop.yard(&["selftest", "--jobs", "4", "--json"]);
    let report = good(plain);
    assert_eq!(report["faults"], Value::Array(Vec::new()));
}

#[test]
fn a_sabotaged_cluster_is_accused() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let test = Running::start(machine.command(&["selftest", "--jobs", "8", "--json"]));
    // The shims of all that runs are killed: no promise survives that without a trace.
    let home = machine.local().display().to_string();
    until("some jobs run", || {
        let jobs = cluster.yard(&["jobs", "--json"]).json();
        let jobs = jobs["jobs"].as_array().cloned().unwrap_or_default();
        let running = jobs.iter().filter(|job| job["state"] == "RUNNING");
        (running.count() >= 4).then_some(())
    });
    for pid in processes_with(&["shim", &home]) {
        end(pid, Signal::SIGKILL);
    }
    let line = test.until_line("\"promises\"");
    assert_eq!(test.wait(), 1);
    let report: Value = serde_json::from_str(&line).expect("a report");
    assert_eq!(report["ok"], false);
    assert_eq!(result(&report, "uninterrupted"), "broken", "{report:#}");
    assert!(line.contains(" was started: "), "says why: {report:#}");
    // What it goes by is kept without being asked for.
    let kept = machine
        .work()
        .join(report["kept_in"].as_str().expect("a directory"));
    assert!(kept.is_dir());
    nothing_lives(&cluster);
}

#[test]
fn an_interrupted_self_test_cancels_what_it_started() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let test = Running::start(machine.command(&["selftest"]));
    until("some jobs run", || {
        let jobs = cluster.yard(&["jobs", "--json"]).json();
        let jobs = jobs["jobs"].as_array().cloned().unwrap_or_default();
        (jobs.len() >= 10).then_some(())
    });
    test.signal(Signal::SIGINT);
    assert_eq!(test.wait(), 130);
    nothing_lives(&cluster);
}
