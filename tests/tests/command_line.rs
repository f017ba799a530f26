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
            vec!["run", "--on-disconnect", "stop", "--", "true"],
            "--on-disconnect stop",
        ),
        (vec!["run", "--array", "9-", "--", "true"], "--array"),
        (
            vec!["run", "--env", "NOT_SET_ANYWHERE", "--", "true"],
            "--env",
        ),
        (vec!["job", "seventeen"], "ID"),
        (vec!["no-such-command"], "no-such-command"),
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
    ] {
        let ran = machine.yard(&arguments).expect_code(65);
        assert!(
            ran.stderr.contains(field),
            "{arguments:?} does not name {field}:\n{}",
            ran.stderr
        );
    }
    std::fs::write(machine.work().join("job.yaml"), "comand: [true]\n").unwrap();
    let ran = machine.yard(&["submit", "-f", "job.yaml"]).expect_code(65);
    assert!(ran.stderr.contains("comand"), "{}", ran.stderr);
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
