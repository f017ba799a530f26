//! Output of ranks with the real binary: the same command reads it while the rank runs, after its end, after a restart of
//! the coordinator and after its node is gone; a reader that is slow or whose coordinator dies loses nothing, and nobody
//! else waits for it.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Stdio};

use nix::sys::signal::Signal;
use trainyard_tests::{Cluster, Machine, end, lives, until};

/// A shell script that waits until a file is there.
fn wait_for(path: &Path) -> String {
    format!("until [ -e {} ]; do sleep 0.02; done", path.display())
}

fn kill(cluster: &Cluster<'_>, role: &str) {
    let pid = cluster.pid(role);
    end(pid, Signal::SIGKILL);
    until("it is gone", || (!lives(pid)).then_some(()));
}

fn read_all(reader: &mut Child) -> String {
    let mut text = String::new();
    let mut pipe = reader.stdout.take().expect("its output is a pipe");
    let _ = pipe.read_to_string(&mut text).expect("it is text");
    assert!(reader.wait().expect("it ends").success());
    text
}

fn numbered(from: u32, to: u32) -> String {
    (from..=to).map(|line| format!("line {line}\n")).collect()
}

#[test]
fn output_is_readable_at_any_time_and_without_its_node() {
    let machine = Machine::new();
    let cluster = machine.up(&["--nodes", "2"]);
    let go = machine.dir("go");
    let script = format!(
        "for i in 1 2 3; do echo line $i; done; {}; for i in 4 5 6; do echo line $i; done",
        wait_for(&go)
    );
    let job = cluster.submit(&["--", "sh", "-c", &script]);
    let read = |wanted: String| {
        until("its output can be read", || {
            let logs = cluster.yard(&["logs", &job]).expect_code(0);
            (logs.stdout == wanted).then_some(())
        });
    };
    read(numbered(1, 3));
    // While the coordinator is new and the rank says nothing.
    kill(&cluster, "coordinator");
    let _ = cluster
        .yard(&["up", "--listen", "127.0.0.1:0"])
        .expect_code(0);
    read(numbered(1, 3));
    fs::write(&go, "").unwrap();
    let _ = cluster.yard(&["wait", &job]).expect_code(0);
    read(numbered(1, 6));
    // The node that it ran on goes for good, with everything that it kept.
    let node = cluster.job(&job)["attempts"][0]["members"][0]["node"].to_string();
    let number: u32 = node.trim_matches(['"', 'n']).parse().unwrap();
    for agent in 0..2 {
        kill(&cluster, &format!("agent {agent}"));
    }
    let _ = cluster
        .yard(&["node", "remove", &format!("n{number}")])
        .expect_code(0);
    kill(&cluster, "coordinator");
    let _ = cluster
        .yard(&["up", "--listen", "127.0.0.1:0"])
        .expect_code(0);
    read(numbered(1, 6));
    let last = cluster.yard(&["logs", &job, "--tail", "2"]).expect_code(0);
    assert_eq!(last.stdout, numbered(5, 6));
}

#[test]
fn a_follower_goes_on_where_it_was_when_the_coordinator_comes_back() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let (first, second) = (machine.dir("first"), machine.dir("second"));
    let script = format!(
        "echo line 1; {}; echo line 2; {}; echo line 3",
        wait_for(&first),
        wait_for(&second)
    );
    let job = cluster.submit(&["--", "sh", "-c", &script]);
    let _ = cluster.until_state(&job, "RUNNING");
    let mut command = machine.command(&["logs", "-f", &job]);
    let mut follower = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    assert_eq!(next(), "line 1");
    kill(&cluster, "coordinator");
    // Written while there is nobody who could take it.
    fs::write(&first, "").unwrap();
    let _ = cluster.yard(&["up"]).expect_code(0);
    fs::write(&second, "").unwrap();
    assert_eq!(next(), "line 2");
    assert_eq!(next(), "line 3");
    assert!(lines.next().is_none(), "something comes twice");
    assert!(follower.wait().unwrap().success());
}

#[test]
fn a_reader_that_does_not_read_holds_up_nobody_else() {
    // Far more than what pipes, sockets and streams between the two hold.
    const LINES: u32 = 2_000_000;
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let go = machine.dir("go");
    let job = cluster.submit(&[
        "--",
        "sh",
        "-c",
        &format!("{}; seq -f 'line %.0f' {LINES}", wait_for(&go)),
    ]);
    let follow = || {
        let mut command = machine.command(&["logs", "-f", &job]);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        command.spawn().unwrap()
    };
    // Nobody reads its pipe yet, so it stands still as soon as that is full.
    let mut slow = follow();
    let mut quick = follow();
    let _ = cluster.until_state(&job, "RUNNING");
    fs::write(&go, "").unwrap();
    let wanted = numbered(1, LINES);
    assert!(
        read_all(&mut quick) == wanted,
        "the quick reader misses something"
    );
    let _ = cluster.yard(&["wait", &job]).expect_code(0);
    let _ = cluster.yard(&["run", "--", "true"]).expect_code(0);
    // It has not missed anything either, as what is stored can be read at any pace.
    assert!(
        read_all(&mut slow) == wanted,
        "the slow reader misses something"
    );
}
