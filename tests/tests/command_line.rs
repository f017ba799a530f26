//! The command line without a cluster: exit codes, refusals, and what is said about them.

use trainyard_tests::Machine;

#[test]
fn help_and_completion_come_without_a_cluster() {
    let machine = Machine::new();
    let help = machine.yard(&["--help"]).expect_code(0);
    for command in [
        "run",
        "submit",
        "jobs",
        "job",
        "logs",
        "wait",
        "cancel",
        "nodes",
        "node",
        "token",
        "join",
        "login",
        "outputs",
        "up",
        "down",
        "coordinator",
        "agent",
        "demo",
        "doctor",
        "completion",
    ] {
        assert!(
            help.stdout.contains(&format!("\n  {command} ")),
            "{command} is missing in\n{}",
            help.stdout
        );
        let _ = machine.yard(&[command, "--help"]).expect_code(0);
    }
    let script = machine.yard(&["completion", "bash"]).expect_code(0);
    assert!(script.stdout.contains("_yard"));
}

#[test]
fn wrong_use_ends_with_64_and_names_the_flag() {
    let machine = Machine::new();
    for (arguments, named) in [
        (vec!["run", "--nodes", "-1", "--", "true"], "--nodes"),
        (
            vec!["run", "--nodes", "2..8", "--", "true"],
            "--nodes MIN..MAX",
        ),
        (vec!["run", "--gpus", "NaN", "--", "true"], "--gpus"),
        (vec!["run", "--cpus", "1e3", "--", "true"], "--cpus"),
        (vec!["run", "--memory", "１GiB", "--", "true"], "--memory"),
        (
            vec!["run", "--time-limit", "soon", "--", "true"],
            "--time-limit",
        ),
        (
            vec!["run", "--launcher", "mpi", "--", "true"],
            "--launcher mpi",
        ),
        (vec!["run", "--image", "x", "--", "true"], "--image"),
        (
            vec!["run", "--priority", "high", "--", "true"],
            "--priority",
        ),
        (vec!["run", "--preemptible", "--", "true"], "--preemptible"),
        (
            vec!["run", "--on-disconnect", "pause", "--", "true"],
            "--on-disconnect",
        ),
        (vec!["run", "--array", "9-", "--", "true"], "--array"),
        (
            vec!["run", "--env", "NOT_SET_ANYWHERE", "--", "true"],
            "--env",
        ),
        (vec!["job", "seventeen"], "ID"),
        (vec!["no-such-command"], "no-such-command"),
        (vec!["run", "true"], "-- true"),
        (vec!["run", "--after", "j1", "--", "true"], "--after"),
        (vec!["run", "--label", "bad", "--", "true"], "--label"),
        (
            vec!["run", "--memory", "99999999999T", "--", "true"],
            "64 TiB",
        ),
        (vec!["run", "--cpus", "1e309", "--", "true"], "--cpus"),
        (vec!["run", "--retries", "-1", "--", "true"], "0 to 100"),
        (vec!["token", "create"], "--node or --user"),
        (
            vec!["token", "create", "--node", "--ttl", "1ms"],
            "--ttl: 1ms is outside 10s to 30d",
        ),
        (
            vec!["token", "create", "--node", "--uses", "0"],
            "--uses: \"0\" is not a whole number from 1 to 10000",
        ),
        (vec!["token", "create", "--node", "--pool", "x"], "--pool"),
        (vec!["join", "--service", "x"], "--service"),
        (vec!["up", "--cpus", "0"], "--cpus"),
        (vec!["up", "--memory", "-1"], "--memory"),
        (vec!["up", "--idle-exit", "0"], "--idle-exit"),
        (vec!["up", "--nodes", "-1"], "0 to 64"),
        (vec!["logs", "j1", "--rank", "-1"], "--rank"),
    ] {
        let ran = machine.yard(&arguments).expect_code(64);
        assert!(
            ran.stderr.contains(named),
            "{arguments:?} does not name {named}:\n{}",
            ran.stderr
        );
    }
}

#[test]
fn what_is_not_built_says_so_and_is_neither_shown_nor_completed() {
    let machine = Machine::new();
    let help = machine.yard(&["--help"]).expect_code(0).stdout;
    let completion = machine.yard(&["completion", "bash"]).expect_code(0).stdout;
    for command in [
        "retry",
        "queue",
        "explain",
        "plan",
        "exec",
        "top",
        "events",
        "simulate",
        "pool",
        "workspace",
        "drain",
    ] {
        for arguments in [vec![command], vec![command, "x", "--json"]] {
            let ran = machine.yard(&arguments).expect_code(64);
            let said = format!("`yard {command}` is not in this version");
            assert!(
                ran.stderr.contains(&said) || ran.stdout.contains(&said),
                "{command}:\n{}{}",
                ran.stdout,
                ran.stderr
            );
        }
        assert!(!help.contains(&format!("\n  {command} ")), "{command}");
        assert!(
            !completion.contains(&format!("yard__{command}")),
            "{command}"
        );
    }
    for (command, flag) in [
        ("run", "--image"),
        ("run", "--priority"),
        ("run", "--preemptible"),
        ("run", "--after"),
        ("submit", "--run-as"),
    ] {
        let ran = machine.yard(&[command, flag, "--", "true"]).expect_code(64);
        assert!(
            ran.stderr
                .contains(&format!("{flag}: is not in this version")),
            "{}",
            ran.stderr
        );
    }
    assert!(!completion.contains("--preemptible"));
    let json = machine.yard(&["top", "--json"]).expect_code(64).json();
    assert_eq!(json["error"]["reason"], "NOT_BUILT");
}

#[test]
fn an_invalid_job_ends_with_65_and_names_the_field() {
    let machine = Machine::new();
    for (arguments, field) in [
        (vec!["submit", "--name", "a/b", "--", "true"], "name"),
        (
            vec!["submit", "--time-limit", "0", "--", "true"],
            "time_limit",
        ),
        (vec!["submit", "--grace", "9999h", "--", "true"], "grace"),
        (vec!["submit", "--env", "YARD_X=1", "--", "true"], "env"),
        (vec!["submit", "--array", "0-999999", "--", "true"], "array"),
        (
            vec!["submit", "--gpu-type", "H100", "--", "true"],
            "gpus_per_node",
        ),
        (vec!["submit"], "command"),
        (
            vec!["submit", "--memory", "65TiB", "--", "true"],
            "memory_per_node (--memory): 65 TiB is above 64 TiB",
        ),
        (
            vec!["submit", "--cpus", "0", "--", "true"],
            "cpus_per_node (--cpus)",
        ),
        (
            vec!["submit", "--array", "5-2", "--", "true"],
            "array (--array)",
        ),
        (vec!["submit", "--env", "=x", "--", "true"], "env (--env)"),
        (
            vec!["submit", "--label", "a/b=c", "--", "true"],
            "labels (--label)",
        ),
        (vec!["submit", "--", ""], "command"),
        (
            vec!["submit", "--name", "-x", "--", "true"],
            "name (--name)",
        ),
    ] {
        let ran = machine.yard(&arguments).expect_code(65);
        assert!(
            ran.stderr.contains(field),
            "{arguments:?} does not name {field}:\n{}",
            ran.stderr
        );
    }
    let ran = machine
        .yard(&["submit", "--dir", "missing", "--", "true"])
        .expect_code(66);
    assert!(ran.stderr.contains("dir (--dir)"), "{}", ran.stderr);
}

#[test]
fn a_job_file_that_is_wrong_ends_with_65_and_names_file_and_field() {
    let machine = Machine::new();
    let path = machine.work().join("job.yaml");
    let alias_bomb = format!(
        "command:\n- &a \"{}\"\n{}",
        "x".repeat(1 << 20),
        "- *a\n".repeat(10_000)
    );
    for (text, told) in [
        (&b"comand: [true]\n"[..], "comand: is not a field"),
        (b"nodes: 0\ncommand: [x]\n", "nodes: \"0\" is not a whole"),
        (b"nodes: [1]\ncommand: [x]\n", "nodes: a list"),
        (
            b"nodes: 2..8\ncommand: [x]\n",
            "nodes MIN..MAX: is not in this version",
        ),
        (b"gpus_per_node: .inf\ncommand: [x]\n", "gpus_per_node: "),
        (b"cpus_per_node: 1e309\ncommand: [x]\n", "cpus_per_node: "),
        (b"memory_per_node: -5\ncommand: [x]\n", "memory_per_node: "),
        (
            b"time_limit: 0\ncommand: [x]\n",
            "time_limit: 0s is outside",
        ),
        (b"launcher: mpi\ncommand: [x]\n", "launcher mpi: is not in"),
        (b"image: x\ncommand: [x]\n", "image: is not in this version"),
        (b"env: {A=B: x}\ncommand: [x]\n", "env: \"A=B\""),
        (b"nodes: 1\nnodes: 2\n", "line 2, column 1: nodes is given"),
        (b"command: \"\"\n", "command: is empty"),
        (b"", "command: is missing"),
        (b"name: \"\xff\"\n", "file: is not UTF-8"),
        (b"- x\n", "file: holds a list"),
        (&[b'['; 100_000], "nested too deeply"),
        (alias_bomb.as_bytes(), "aliases stand for more than 16 MiB"),
        (&[b' '; (4 << 20) + 1], "file: is larger than"),
    ] {
        std::fs::write(&path, text).unwrap();
        let ran = machine.yard(&["submit", "-f", "job.yaml"]).expect_code(65);
        let shown = String::from_utf8_lossy(&text[..text.len().min(60)]);
        assert!(
            ran.stderr.contains("job.yaml: ") && ran.stderr.contains(told),
            "{shown:?} is not told as {told}:\n{}",
            ran.stderr
        );
    }
    let ran = machine.yard(&["submit", "-f", "."]).expect_code(65);
    assert!(ran.stderr.contains("is a directory"), "{}", ran.stderr);
    let ran = machine.yard(&["jobs", "-a"]).expect_code(69);
    assert!(ran.stderr.contains("yard up"), "nothing was started");
    let _ = machine
        .yard(&["submit", "-f", "missing.yaml"])
        .expect_code(66);
}

#[test]
fn without_a_cluster_reading_ends_with_69_and_says_what_to_do() {
    let machine = Machine::new();
    let ran = machine.yard(&["jobs"]).expect_code(69);
    assert!(
        ran.stderr.contains("yard up") && ran.stderr.contains("yard login"),
        "{}",
        ran.stderr
    );
    let json = machine.yard(&["jobs", "--json"]).expect_code(69).json();
    assert_eq!(json["source"], "yard");
    assert_eq!(json["exit_code"], 69);
    let down = machine.yard(&["down"]).expect_code(0);
    assert!(down.stdout.contains("no cluster runs"), "{}", down.stdout);
}

#[test]
fn a_damaged_token_is_refused_before_anything_is_sent_and_never_shown() {
    let machine = Machine::new();
    for command in ["join", "login"] {
        let ran = machine
            .yard(&[command, "yard1.c2VjcmV0LXRleHQ.00000000"])
            .expect_code(65);
        assert!(!ran.stderr.contains("c2VjcmV0"), "{}", ran.stderr);
    }
}

#[test]
fn no_colours_in_a_pipe() {
    let ran = Machine::new().yard(&["jobs"]);
    assert!(!ran.stderr.contains('\u{1b}'), "{:?}", ran.stderr);
}
