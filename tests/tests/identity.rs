//! Who may do what: tokens, login, join, and everything that is refused.

use std::fs;

use trainyard_tests::{Machine, Running, until};

/// A token as its maker hands it over.
fn token(head: &trainyard_tests::Cluster<'_>, flags: &[&str]) -> String {
    let arguments: Vec<_> = ["token", "create"].iter().chain(flags).copied().collect();
    head.yard(&arguments)
        .expect_code(0)
        .stdout
        .trim()
        .to_owned()
}

#[test]
fn a_laptop_logs_in_and_submits_to_a_head_elsewhere() {
    let head = Machine::new();
    let cluster = head.up(&[]);
    let laptop = Machine::new();
    let token = token(&cluster, &["--user", "ann"]);
    let login = laptop.yard(&["login", &token]).expect_code(0);
    assert!(login.stdout.contains("ann"), "{}", login.stdout);
    let ran = laptop
        .yard(&["run", "--", "echo", "from afar"])
        .expect_code(0);
    assert_eq!(ran.stdout, "from afar\n");
    assert_eq!(cluster.job("j1")["owner"], "ann");
    // The token is used up.
    let again = Machine::new().yard(&["login", &token]).expect_code(77);
    assert!(!again.stderr.contains(&token), "{}", again.stderr);
    // A plain user makes no tokens and cannot end somebody else's job.
    let _ = laptop.yard(&["token", "create", "--node"]).expect_code(77);
    let other = cluster.submit(&["--", "sleep", "600"]);
    let _ = laptop.yard(&["cancel", &other]).expect_code(77);
    let _ = laptop.yard(&["cordon", "n1"]).expect_code(77);
}

#[test]
fn a_viewer_only_looks() {
    let head = Machine::new();
    let cluster = head.up(&[]);
    let laptop = Machine::new();
    let _ = laptop
        .yard(&[
            "login",
            &token(&cluster, &["--user", "eve", "--role", "viewer"]),
        ])
        .expect_code(0);
    let _ = laptop.yard(&["jobs", "-a"]).expect_code(0);
    let _ = laptop.yard(&["submit", "--", "true"]).expect_code(77);
}

#[test]
fn a_machine_joins_with_a_token_and_runs_jobs() {
    let head = Machine::new();
    let cluster = head.up(&[]);
    let token = token(&cluster, &["--node"]);
    let machine = Machine::new();
    let mut join = machine.command(&["join", "-", "--name", "worker", "--run-as", "nobody"]);
    let file = machine.dir("token");
    fs::write(&file, &token).unwrap();
    join.stdin(fs::File::open(&file).unwrap());
    if !nix::unistd::geteuid().is_root() {
        join = machine.command(&["join", &token, "--name", "worker"]);
    }
    let agent = Running::start(join);
    until("the node is ready", || {
        let nodes = cluster.yard(&["nodes", "--json"]).expect_code(0).json();
        let nodes = nodes["nodes"].as_array().cloned().unwrap_or_default();
        nodes
            .into_iter()
            .find(|node| node["name"] == "worker" && node["availability"] == "READY")
    });
    let ran = cluster
        .yard(&["run", "--target", "attached", "--", "id", "-un"])
        .expect_code(0);
    if nix::unistd::geteuid().is_root() {
        assert_eq!(ran.stdout, "nobody\n", "a job never runs as root");
    }
    agent.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(agent.wait(), 0);
}

#[test]
fn an_agent_that_runs_as_root_wants_to_know_the_jobs_user() {
    if !nix::unistd::geteuid().is_root() {
        return trainyard_tests::skip("it takes root to see what root is refused");
    }
    let head = Machine::new();
    let cluster = head.up(&[]);
    let token = token(&cluster, &["--node"]);
    let machine = Machine::new();
    let refused = machine.yard(&["join", &token]).expect_code(77);
    assert!(
        refused.stderr.contains("run_as") || refused.stderr.contains("--run-as"),
        "{}",
        refused.stderr
    );
    let _ = machine
        .yard(&["join", &token, "--run-as", "root"])
        .expect_code(77);
    // The token was not used up by these.
    let _ = machine
        .yard(&["join", &token, "--run-as", "nobody", "--no-run"])
        .expect_code(0);
}

#[test]
fn reusable_tokens_are_not_taken_from_arguments() {
    let head = Machine::new();
    let cluster = head.up(&[]);
    let token = token(&cluster, &["--user", "ann", "--uses", "2"]);
    let laptop = Machine::new();
    let refused = laptop.yard(&["login", &token]).expect_code(77);
    assert!(
        refused.stderr.contains("standard input") && !refused.stderr.contains(&token),
        "{}",
        refused.stderr
    );
    let file = laptop.dir("token");
    fs::write(&file, format!("{token}\n")).unwrap();
    for name in ["one", "two"] {
        let _ = laptop
            .yard(&[
                "login",
                "--token-file",
                file.to_str().unwrap(),
                "--name",
                name,
            ])
            .expect_code(0);
    }
    let _ = laptop.yard(&["--context", "one", "jobs"]).expect_code(0);
    let _ = laptop.yard(&["--context", "three", "jobs"]).expect_code(66);
}

#[test]
fn a_revoked_token_enrols_nobody() {
    let head = Machine::new();
    let cluster = head.up(&[]);
    let made = cluster
        .yard(&["token", "create", "--user", "ann", "--json"])
        .expect_code(0)
        .json();
    let id = made["id"].as_str().unwrap();
    let _ = cluster.yard(&["token", "revoke", id]).expect_code(0);
    let _ = Machine::new()
        .yard(&["login", made["token"].as_str().unwrap()])
        .expect_code(77);
    let listed = cluster
        .yard(&["token", "list", "--json"])
        .expect_code(0)
        .stdout;
    assert!(!listed.contains(made["token"].as_str().unwrap()));
}

#[test]
fn a_token_for_one_cluster_is_not_sent_to_another() {
    let (one, other) = (Machine::new(), Machine::new());
    let (one_cluster, other_cluster) = (one.up(&[]), other.up(&[]));
    let text = token(&one_cluster, &["--user", "ann"]);
    // The same token, but the endpoint is the other cluster's: as if somebody stood in between.
    let endpoint = |machine: &Machine| {
        let text = fs::read(machine.local().join("coordinator/coordinator.json")).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
        value["endpoints"][0].as_str().unwrap().to_owned()
    };
    let (_, to) = (endpoint(&one), endpoint(&other));
    let port = to.rsplit(':').next().unwrap();
    let _ = one_cluster.yard(&["down"]).expect_code(0);
    let _ = other_cluster.yard(&["down"]).expect_code(0);
    // The other cluster now listens where the first one did.
    let first_port = {
        let text = fs::read(one.local().join("processes.json")).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
        value["listen"].as_str().unwrap().to_owned()
    };
    assert!(!first_port.ends_with(port));
    let _ = other.yard(&["up", "--listen", &first_port]).expect_code(0);
    let refused = Machine::new().yard(&["login", &text]).expect_code(69);
    assert!(
        refused.stderr.contains("CA hash mismatch"),
        "{}",
        refused.stderr
    );
}
