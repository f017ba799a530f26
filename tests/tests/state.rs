//! The coordinator's state as an operator handles it: checked, backed up while it is in use, lost, and restored while a job
//! runs.

use std::fs;

use nix::sys::signal::Signal;
use trainyard_tests::{Machine, Running, lives, until};

#[test]
fn a_job_that_was_in_the_backup_outlives_the_loss_of_the_state() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let state = machine.local().join("coordinator");
    let (state, spare) = (state.to_str().unwrap(), machine.dir("backup"));
    let spare = spare.to_str().unwrap();
    let go = machine.dir("go");
    let script = format!(
        "echo began; until [ -e {} ]; do sleep 0.05; done; echo ended; exit 6",
        go.display()
    );
    let run = Running::start(machine.command(&["run", "--", "sh", "-c", &script]));
    let _ = run.until_line("began");
    let _ = cluster.until_state("j1", "RUNNING");

    let made = machine
        .yard(&[
            "coordinator",
            "backup",
            "--state-dir",
            state,
            "--to",
            spare,
            "--json",
        ])
        .expect_code(0)
        .json();
    assert_eq!(made["path"], spare);
    let found = machine
        .yard(&["coordinator", "check", "--state-dir", state, "--json"])
        .expect_code(0)
        .json();
    assert_eq!(found["whole"], true);
    assert_eq!(found["cluster"], made["cluster"]);
    // Unless told otherwise it is the state of the cluster that commands here speak to.
    let unnamed = machine
        .yard(&["coordinator", "check", "--json"])
        .expect_code(0)
        .json();
    assert_eq!(unnamed["cluster"], made["cluster"]);
    // Younger than the backup: lost with the state.
    assert_eq!(cluster.submit(&["--", "true"]), "j2");
    let refused = machine
        .yard(&[
            "coordinator",
            "restore",
            "--from",
            spare,
            "--state-dir",
            state,
        ])
        .expect_code(77);
    assert!(
        refused.stderr.contains("held by another coordinator"),
        "{}",
        refused.stderr
    );

    let pid = cluster.pid("coordinator");
    trainyard_tests::end(pid, Signal::SIGKILL);
    until("it is gone", || (!lives(pid)).then_some(()));
    fs::remove_dir_all(state).unwrap();
    let _ = machine
        .yard(&[
            "coordinator",
            "restore",
            "--from",
            spare,
            "--state-dir",
            state,
        ])
        .expect_code(0);
    let _ = machine
        .yard(&["up", "--listen", "127.0.0.1:0"])
        .expect_code(0);
    fs::write(&go, "").unwrap();
    let _ = cluster.yard(&["wait", "j1"]).expect_code(6);
    assert_eq!(
        cluster.job("j1")["attempts"].as_array().unwrap().len(),
        1,
        "nothing was started twice"
    );
    let _ = cluster.yard(&["job", "j2"]).expect_code(66);
    let next = cluster.submit(&["--", "true"]);
    assert!(next.len() > "j1000000".len() - 1 && next != "j2", "{next}");
    let _ = cluster.yard(&["wait", &next]).expect_code(0);
}

#[test]
fn damage_and_a_missing_state_have_codes_of_their_own() {
    let machine = Machine::new();
    let cluster = machine.up(&["--nodes", "0"]);
    let state = machine.local().join("coordinator");
    let backup = machine.dir("backup");
    let (from, to) = (backup.to_str().unwrap(), machine.dir("new"));
    let to = to.to_str().unwrap();
    let _ = machine
        .yard(&[
            "coordinator",
            "backup",
            "--state-dir",
            state.to_str().unwrap(),
            "--to",
            from,
        ])
        .expect_code(0);
    drop(cluster);
    let database = backup.join("state.db");
    let mut bytes = fs::read(&database).unwrap();
    // Rows lie at the ends of pages; the first two say how the others are to be read.
    for page in bytes.chunks_mut(4096).skip(2) {
        let end = page.len() - 64;
        page[end..].fill(0xff);
    }
    fs::write(&database, bytes).unwrap();
    let found = machine
        .yard(&["coordinator", "check", "--state-dir", from, "--json"])
        .expect_code(65)
        .json();
    assert_eq!(found["whole"], false);
    let refused = machine
        .yard(&["coordinator", "restore", "--from", from, "--state-dir", to])
        .expect_code(65);
    assert!(
        refused
            .stderr
            .contains("state.db is not the file that was backed up")
    );
    let _ = machine
        .yard(&["coordinator", "check", "--state-dir", to])
        .expect_code(66);
}

#[test]
fn where_no_state_is_the_places_and_the_flag_are_named() {
    let machine = Machine::new();
    let refused = machine.yard(&["coordinator", "check"]).expect_code(66);
    for said in ["local/coordinator", "--state-dir"] {
        assert!(refused.stderr.contains(said), "{}", refused.stderr);
    }
}
