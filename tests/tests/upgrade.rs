//! A new `yard` takes over what an old one runs, and an old one what a new one does: agent first, then coordinator.
//!
//! `TRAINYARD_OLD_YARD` names an older program. Without it a copy of this tree's own is the old one, which is deleted
//! while its shims and carriers live.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use trainyard_tests::{Cluster, Machine, lives, until, yard_binary};

const OLD: &str = "TRAINYARD_OLD_YARD";

/// A program under a name of its own.
fn install(machine: &Machine, from: &Path, name: &str) -> PathBuf {
    let dir = machine.dir(name);
    fs::create_dir(&dir).expect("the file can be used");
    let to = dir.join("yard");
    fs::copy(from, &to).expect("the file can be used");
    to
}

fn old_program() -> PathBuf {
    std::env::var_os(OLD).map_or_else(|| yard_binary().to_owned(), PathBuf::from)
}

/// Ends the cluster's processes with these roles as an operator does, and has `program` start them again.
fn replace(machine: &mut Machine, program: &Path, is_meant: impl Fn(&str) -> bool) {
    let processes: Vec<i32> = {
        let text = fs::read(machine.local().join("processes.json")).expect("the file can be used");
        let value: serde_json::Value =
            serde_json::from_slice(&text).expect("it is what yard writes");
        let agents = value["agents"]
            .as_array()
            .expect("it is what yard writes")
            .iter();
        agents
            .chain([&value["coordinator"]])
            .filter(|process| is_meant(process["role"].as_str().expect("it is what yard writes")))
            .map(|process| {
                i32::try_from(process["pid"].as_i64().expect("it is what yard writes"))
                    .expect("it is what yard writes")
            })
            .collect()
    };
    assert!(!processes.is_empty());
    for pid in processes {
        trainyard_tests::end(pid, Signal::SIGTERM);
        until("a process that is replaced ends", || {
            (!lives(pid)).then_some(())
        });
    }
    machine.install(program);
    let _ = machine
        .yard(&["up", "--nodes", "2", "--listen", "127.0.0.1:0"])
        .expect_code(0);
}

fn agents(role: &str) -> bool {
    role.starts_with("agent")
}

fn coordinator(role: &str) -> bool {
    role == "coordinator"
}

/// A job that waits for a file.
struct Waiting {
    id: String,
    gate: PathBuf,
    code: i32,
}

fn script(gate: &Path, code: i32) -> String {
    format!(
        "echo began; until [ -e {} ]; do sleep 0.05; done; echo ended; exit {code}",
        gate.display()
    )
}

fn submit(machine: &Machine, name: &str, flags: &[&str], code: i32) -> Waiting {
    let gate = machine.dir(name);
    let script = script(&gate, code);
    let words: Vec<&str> = ["submit", "--cpus", "0.1"]
        .iter()
        .chain(flags)
        .chain(&["--", "sh", "-c", &script])
        .copied()
        .collect();
    let id = machine.yard(&words).expect_code(0).stdout.trim().to_owned();
    until(&format!("{name} runs"), || {
        let logs = machine.yard(&["logs", &id]).stdout;
        let began = logs.lines().filter(|line| line.ends_with("began")).count();
        let wanted = match flags {
            [] => 1,
            _ => 2,
        };
        (began >= wanted).then_some(())
    });
    Waiting { id, gate, code }
}

/// Lets a job end, and sees that it ended as it said and was started once.
fn finish(machine: &Machine, job: &Waiting, began: usize) {
    fs::write(&job.gate, "").expect("the file can be used");
    let waited = machine.yard(&["wait", &job.id]);
    if began == 1 || job.code == 0 {
        let waited = waited.expect_code(job.code);
        drop(waited);
    } else {
        assert_ne!(waited.code, 0);
    }
    let told = machine
        .yard(&["job", &job.id, "--json"])
        .expect_code(0)
        .json();
    let attempts = told["attempts"].as_array().expect("it is what yard writes");
    assert!(
        attempts.iter().all(|attempt| attempt["attempt"] == 1),
        "started again: {told}"
    );
    let logs = machine.yard(&["logs", &job.id]).expect_code(0).stdout;
    for word in ["began", "ended"] {
        let count = logs.lines().filter(|line| line.ends_with(word)).count();
        assert_eq!(count, began, "{}: {logs}", job.id);
    }
}

fn jobs(machine: &Machine, prefix: &str) -> [Waiting; 3] {
    [
        submit(machine, &format!("{prefix}-single"), &[], 7),
        submit(machine, &format!("{prefix}-array"), &["--array", "0-1"], 0),
        submit(machine, &format!("{prefix}-gang"), &["--nodes", "2"], 0),
    ]
}

fn finish_all(machine: &Machine, jobs: &[Waiting; 3]) {
    let [single, array, gang] = jobs;
    finish(machine, single, 1);
    finish(machine, array, 2);
    finish(machine, gang, 2);
}

/// What still runs of a program that was deleted.
fn shims_of(program: &Path) -> usize {
    let name = program.display().to_string();
    let entries = fs::read_dir("/proc")
        .expect("the file can be used")
        .flatten();
    let programs = entries.filter_map(|entry| fs::read_link(entry.path().join("exe")).ok());
    programs
        .filter(|program| program.to_string_lossy().starts_with(&name))
        .count()
}

#[test]
fn a_new_program_takes_over_what_an_old_one_runs_and_the_old_one_can_come_back() {
    let mut machine = Machine::new();
    let old = install(&machine, &old_program(), "old");
    let new = install(&machine, yard_binary(), "new");
    machine.install(&old);
    let first = machine.up(&["--nodes", "2"]);
    // It is stopped by its machine's newest program, at the end.
    std::mem::forget::<Cluster<'_>>(first);
    let of_old = jobs(&machine, "old");

    replace(&mut machine, &new, agents);
    let of_new_agent = jobs(&machine, "agent");
    // The upgrade is undone: what the new one began is taken over by the old one.
    replace(&mut machine, &old, agents);
    finish(&machine, &of_new_agent[0], 1);
    let back = submit(&machine, "back", &[], 3);
    replace(&mut machine, &new, agents);
    replace(&mut machine, &new, coordinator);
    fs::remove_file(&old).expect("the file can be used");
    assert!(shims_of(&old) >= 4, "the old one's shims live on");
    finish_all(&machine, &of_old);
    finish(&machine, &of_new_agent[1], 2);
    finish(&machine, &of_new_agent[2], 2);
    finish(&machine, &back, 1);
    let of_new = jobs(&machine, "new");
    finish_all(&machine, &of_new);
    until("no process of the old one is left", || {
        (shims_of(&old) == 0).then_some(())
    });
    let _ = machine.yard(&["down", "--force"]).expect_code(0);
    until("no process of the new one is left", || {
        (shims_of(&new) == 0).then_some(())
    });
}
