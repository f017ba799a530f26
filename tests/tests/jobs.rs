//! Jobs on a real cluster: real coordinator, agents, shims and processes.

use std::fs;

use nix::sys::signal::Signal;
use trainyard_tests::{Machine, Running, lives, until};

#[test]
fn run_ends_with_the_jobs_own_exit_code() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let ran = cluster
        .yard(&[
            "run",
            "--",
            "sh",
            "-c",
            "echo out; echo err >&2; printf 'no end'",
        ])
        .expect_code(0);
    assert_eq!(ran.stdout, "out\nno end");
    assert!(ran.stderr.contains("err\n"), "{}", ran.stderr);
    let _ = cluster
        .yard(&["run", "--", "sh", "-c", "exit 3"])
        .expect_code(3);
    let _ = cluster
        .yard(&["run", "--", "sh", "-c", "kill -9 $$"])
        .expect_code(137);
    let missing = cluster
        .yard(&["run", "--", "/no/such/program"])
        .expect_code(127);
    assert!(
        missing.stderr.contains("/no/such/program"),
        "{}",
        missing.stderr
    );
    let _ = cluster
        .yard(&[
            "run",
            "--time-limit",
            "1s",
            "--grace",
            "1s",
            "--",
            "sleep",
            "600",
        ])
        .expect_code(124);
    let json = cluster
        .yard(&["run", "--json", "--", "sh", "-c", "exit 7"])
        .expect_code(7);
    let last: serde_json::Value =
        serde_json::from_str(json.stdout.lines().last().unwrap()).unwrap();
    assert_eq!(
        (&last["source"], &last["exit_code"]),
        (&"job".into(), &7.into())
    );
}

#[test]
fn ranks_find_their_environment() {
    let machine = Machine::new();
    let cluster = machine.up(&["--nodes", "2"]);
    let script = "echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $NODE_RANK $GROUP_RANK \
                  $MASTER_ADDR:${MASTER_PORT:+port} [$CUDA_VISIBLE_DEVICES] $OMP_NUM_THREADS $YARD_JOB_ID \
                  $YARD_ATTEMPT $YARD_TASK_INDEX $YARD_NODE_ADDRS $OWN; cd \"$YARD_OUTPUT_DIR\" && cd \
                  \"$YARD_CHECKPOINT_DIR\" && cd \"$YARD_TMP_DIR\" && test -z \"$YARD_RESUME_FROM\"";
    let ran = cluster
        .yard(&[
            "run",
            "--nodes",
            "2",
            "--procs-per-node",
            "2",
            "--cpus",
            "1",
            "--launcher",
            "torch",
            "--env",
            "OWN=mine",
            "--",
            "sh",
            "-c",
            script,
        ])
        .expect_code(0);
    let mut lines: Vec<_> = ran.stdout.lines().collect();
    lines.sort_unstable();
    let line = |rank: u32| {
        let (local, node) = (rank % 2, rank / 2);
        format!(
            "[{rank}] {rank}/4 {local}/2 {node} {node} 127.0.0.1:port [] 1 j1 1 0 127.0.0.1,127.0.0.1 mine"
        )
    };
    assert_eq!(lines, [line(0), line(1), line(2), line(3)]);
}

#[test]
fn the_first_failing_rank_ends_its_gang_and_everything_it_started() {
    let machine = Machine::new();
    let cluster = machine.up(&["--nodes", "2"]);
    let pids = machine.dir("pids");
    fs::create_dir(&pids).unwrap();
    // Rank 0 leaves a process in a session of its own that ignores SIGTERM; rank 1 fails once that is there.
    let script = format!(
        "if [ $RANK = 0 ]; then
           setsid sh -c 'trap \"\" TERM; echo $$ > {dir}/daemon.new; mv {dir}/daemon.new {dir}/daemon; sleep 600 & wait; sleep 600' &
           echo $$ > {dir}/rank; wait; sleep 600
         else
           until [ -e {dir}/daemon ]; do sleep 0.05; done; exit 5
         fi",
        dir = pids.display()
    );
    let ran = cluster
        .yard(&[
            "run", "--nodes", "2", "--grace", "1s", "--", "sh", "-c", &script,
        ])
        .expect_code(5);
    assert!(ran.stderr.contains("rank 1"), "{}", ran.stderr);
    for file in ["daemon", "rank"] {
        let pid: i32 = fs::read_to_string(pids.join(file))
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        assert!(!lives(pid), "process {pid} ({file}) outlived its attempt");
    }
    let job = cluster.job("j1");
    assert_eq!(job["attempts"][0]["failed_rank"], 1);
    assert_eq!(job["state"], "FAILED");
}

#[test]
fn cancelled_jobs_end_with_130_and_leave_nothing() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let pid_file = machine.dir("pid");
    let script = format!(
        "echo $$ > {0}.new; mv {0}.new {0}; exec sleep 600",
        pid_file.display()
    );
    let running = cluster.submit(&["--", "sh", "-c", &script]);
    let pid: i32 = until("the rank runs", || fs::read_to_string(&pid_file).ok())
        .trim()
        .parse()
        .unwrap();
    let _ = cluster.until_state(&running, "RUNNING");
    // More than the machine has free while the first one runs.
    let cpus = cluster.yard(&["nodes", "--json"]).json()["nodes"][0]["capacity"]["cpu_milli"]
        .as_u64()
        .unwrap();
    let waiting = cluster.submit(&["--cpus", &format!("{cpus}m"), "--", "true"]);
    let cancelled = cluster.yard(&["cancel", &waiting]).expect_code(0);
    assert!(
        cancelled.stdout.contains("CANCELLED"),
        "{}",
        cancelled.stdout
    );
    let _ = cluster.yard(&["cancel", &running]).expect_code(0);
    assert!(!lives(pid));
    for job in [&running, &waiting] {
        let _ = cluster.yard(&["wait", job]).expect_code(130);
        // Once more: the same answer, and nothing changes.
        let _ = cluster.yard(&["cancel", job]).expect_code(0);
        assert_eq!(cluster.job(job)["state"], "CANCELLED");
    }
    assert_eq!(
        cluster.job(&waiting)["attempts"].as_array().map(Vec::len),
        Some(0)
    );
    let _ = cluster.yard(&["cancel", "j99"]).expect_code(66);
}

#[test]
fn one_request_id_makes_one_job() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let first = cluster.submit(&["--request-id", "mine", "--", "true"]);
    assert_eq!(
        cluster.submit(&["--request-id", "mine", "--", "true"]),
        first
    );
    let other = cluster
        .yard(&["submit", "--request-id", "mine", "--", "false"])
        .expect_code(65);
    assert!(other.stderr.contains(&first), "{}", other.stderr);
    assert_eq!(
        cluster.yard(&["jobs", "-a", "--json"]).json()["jobs"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn an_array_runs_each_of_its_tasks() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let script = "echo task $YARD_TASK_INDEX; test $YARD_TASK_INDEX != 7";
    let job = cluster.submit(&[
        "--array", "3-9%2", "--cpus", "0.5", "--", "sh", "-c", script,
    ]);
    let _ = cluster.yard(&["wait", &job]).expect_code(1);
    let detail = cluster.job(&job);
    assert_eq!(detail["tasks"]["succeeded"], 6);
    assert_eq!(detail["tasks"]["failed"], 1);
    let logs = cluster.yard(&["logs", &job]).expect_code(0);
    let mut tasks: Vec<_> = logs
        .stdout
        .lines()
        .map(|line| line.rsplit(' ').next().unwrap().to_owned())
        .collect();
    tasks.sort_unstable();
    assert_eq!(tasks, ["3", "4", "5", "6", "7", "8", "9"]);
    let one = cluster.yard(&["logs", &job, "--task", "4"]).expect_code(0);
    assert!(
        one.stdout.contains("task 4") && !one.stdout.contains("task 5"),
        "{}",
        one.stdout
    );
}

#[test]
fn failed_attempts_are_tried_again_and_resume_from_what_they_left() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let script = "if [ $YARD_ATTEMPT = 1 ]; then echo kept > $YARD_CHECKPOINT_DIR/state; exit 4; fi
                  cat $YARD_RESUME_FROM/state $YARD_CHECKPOINT_DIR/state";
    let ran = cluster
        .yard(&["run", "--retries", "1", "--", "sh", "-c", script])
        .expect_code(0);
    assert_eq!(ran.stdout, "kept\nkept\n");
    let attempts = cluster.job("j1")["attempts"].clone();
    assert_eq!(attempts[0]["outcome"], "FAILED");
    assert_eq!(attempts[1]["outcome"], "SUCCEEDED");
    assert!(
        cluster
            .yard(&["logs", "j1", "--attempt", "1"])
            .expect_code(0)
            .stdout
            .is_empty()
    );
}

#[test]
fn code_travels_and_outputs_come_back() {
    let machine = Machine::new();
    let cluster = machine.up(&["--nodes", "2"]);
    let code = machine.work();
    fs::create_dir_all(code.join("lib")).unwrap();
    fs::write(code.join("lib/hello.sh"), "echo hello > $YARD_OUTPUT_DIR/rank-$RANK; mkdir $YARD_OUTPUT_DIR/d; echo '# x' >> lib/hello.sh").unwrap();
    fs::write(code.join(".gitignore"), "*.tmp\n").unwrap();
    fs::write(code.join(".yardignore"), "secret\n").unwrap();
    fs::write(code.join("a.tmp"), "").unwrap();
    fs::write(code.join("secret"), "").unwrap();
    let script = "test ! -e secret && test ! -e a.tmp && . ./lib/hello.sh";
    for _ in 0..2 {
        // The second time the working copies are as fresh as the first.
        let _ = cluster
            .yard(&["run", "--nodes", "2", "--", "sh", "-c", script])
            .expect_code(0);
    }
    assert_eq!(
        fs::read_to_string(code.join("lib/hello.sh"))
            .unwrap()
            .matches("# x")
            .count(),
        1
    );
    let to = machine.dir("fetched");
    let _ = cluster
        .yard(&["outputs", "j2", "--to", to.to_str().unwrap()])
        .expect_code(0);
    for rank in 0..2 {
        assert_eq!(
            fs::read_to_string(to.join(format!("rank-{rank}"))).unwrap(),
            "hello\n"
        );
    }
    assert!(to.join("d").is_dir());
    let none = cluster
        .yard(&["run", "--no-dir", "--", "sh", "-c", "test -z \"$(ls -A)\""])
        .expect_code(0);
    assert!(none.stdout.is_empty());
    let _ = cluster.yard(&["outputs", "j3"]).expect_code(66);
}

#[test]
fn what_cannot_be_kept_is_told_and_the_rest_is_kept() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let script = "cd $YARD_OUTPUT_DIR; echo kept > good; mkfifo pipe; ln -s /etc/passwd out; truncate -s 2T huge";
    let ran = cluster
        .yard(&["run", "--no-dir", "--", "sh", "-c", script])
        .expect_code(0);
    let shown = cluster.yard(&["job", "j1"]).expect_code(0).stdout;
    for name in ["pipe", "out", "huge"] {
        assert!(
            ran.stderr.contains(name) && shown.contains(name),
            "{name}: {}\n{shown}",
            ran.stderr
        );
    }
    let to = machine.dir("fetched");
    let _ = cluster
        .yard(&["outputs", "j1", "--to", to.to_str().unwrap()])
        .expect_code(0);
    assert_eq!(fs::read_to_string(to.join("good")).unwrap(), "kept\n");
    assert_eq!(fs::read_dir(&to).unwrap().count(), 1);
}

#[test]
fn up_brings_back_the_agents_that_the_cluster_had() {
    let machine = Machine::new();
    let cluster = machine.up(&["--nodes", "2"]);
    let _ = cluster.yard(&["down"]).expect_code(0);
    let up = cluster.yard(&["up"]).expect_code(0);
    assert!(up.stdout.contains("2 nodes"), "{}", up.stdout);
    let _ = cluster
        .yard(&["run", "--nodes", "2", "--", "true"])
        .expect_code(0);
    // A node that was taken off the books enrols again.
    let _ = cluster.yard(&["node", "remove", "n1"]).expect_code(0);
    let _ = cluster.yard(&["up"]).expect_code(0);
    let _ = cluster
        .yard(&["run", "--nodes", "2", "--", "true"])
        .expect_code(0);
}

#[test]
fn jobs_outlive_the_agent_and_the_coordinator() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let go = machine.dir("go");
    let script = format!(
        "echo began; until [ -e {} ]; do sleep 0.05; done; echo ended; exit 6",
        go.display()
    );
    let run = Running::start(machine.command(&["run", "--", "sh", "-c", &script]));
    let _ = run.until_line("began");
    for role in ["agent 0", "coordinator"] {
        let pid = cluster.pid(role);
        trainyard_tests::end(pid, Signal::SIGKILL);
        until("it is gone", || (!lives(pid)).then_some(()));
    }
    // Nobody is there: the rank ends unseen, but for its shim.
    fs::write(&go, "").unwrap();
    // Another port: the agent is told where the coordinator is now.
    let _ = machine
        .yard(&["up", "--listen", "127.0.0.1:0"])
        .expect_code(0);
    let ports = machine.yard(&["nodes", "--json"]).expect_code(0).json();
    assert_eq!(
        ports["nodes"].as_array().unwrap().len(),
        1,
        "the agent is the same node as before"
    );
    let _ = cluster.yard(&["wait", "j1"]).expect_code(6);
    let logs = cluster.yard(&["logs", "j1"]).expect_code(0);
    assert_eq!(logs.stdout, "began\nended\n");
    assert_eq!(
        cluster.job("j1")["attempts"].as_array().unwrap().len(),
        1,
        "nothing was started twice"
    );
}

#[test]
fn a_killed_supervisor_is_never_success() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let pids = machine.dir("pids");
    let script = format!(
        "[ $YARD_ATTEMPT -gt 1 ] && exit 0; echo $$ $PPID > {0}.new; mv {0}.new {0}; exec sleep 600",
        pids.display()
    );
    let job = cluster.submit(&["--", "sh", "-c", &script]);
    let text = until("the rank runs", || fs::read_to_string(&pids).ok());
    let numbers: Vec<i32> = text
        .split_whitespace()
        .map(|number| number.parse().unwrap())
        .collect();
    trainyard_tests::end(numbers[1], Signal::SIGKILL);
    let _ = cluster.yard(&["wait", &job]).expect_code(0);
    assert!(!lives(numbers[0]), "the rank outlived its supervisor");
    let attempts = cluster.job(&job)["attempts"].clone();
    assert_eq!(attempts[0]["outcome"], "INTERRUPTED");
    assert_eq!(attempts[0]["reason"]["code"], "SUPERVISOR_LOST");
    assert_eq!(attempts[1]["outcome"], "SUCCEEDED");
}

#[test]
fn jobs_are_listed_and_shown() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let job = cluster.submit(&["--name", "first", "--label", "team=a", "--", "true"]);
    let _ = cluster.yard(&["wait", &job]).expect_code(0);
    assert!(
        !cluster
            .yard(&["jobs"])
            .expect_code(0)
            .stdout
            .contains("first")
    );
    assert!(
        cluster
            .yard(&["jobs", "-a"])
            .expect_code(0)
            .stdout
            .contains("first")
    );
    let shown = cluster.yard(&["job", &job]).expect_code(0).stdout;
    assert!(
        shown.contains("SUCCEEDED") && shown.contains("first") && shown.contains("j1.0.1"),
        "{shown}"
    );
    assert_eq!(cluster.job(&job)["spec"]["labels"]["team"], "a");
    let tail = cluster.submit(&["--", "sh", "-c", "for i in 1 2 3 4 5; do echo $i; done"]);
    let _ = cluster.yard(&["wait", &tail]).expect_code(0);
    assert_eq!(
        cluster
            .yard(&["logs", &tail, "--tail", "2"])
            .expect_code(0)
            .stdout,
        "4\n5\n"
    );
    // What a job cannot have is said, not shown as nothing.
    let none = cluster
        .yard(&["logs", &tail, "--rank", "1"])
        .expect_code(66);
    assert!(none.stderr.contains("ranks 0 to 0"), "{}", none.stderr);
    let recent = cluster
        .yard(&["logs", &tail, "--since", "10m"])
        .expect_code(0);
    assert_eq!(recent.stdout.lines().count(), 5);
}

#[test]
fn a_job_that_no_nodes_could_hold_is_refused_unless_asked_for() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let refused = cluster
        .yard(&["submit", "--gpus", "8", "--", "true"])
        .expect_code(65);
    for told in ["gpus_per_node (--gpus)", "GPU", "--allow-infeasible"] {
        assert!(refused.stderr.contains(told), "{}", refused.stderr);
    }
    let file = machine.work().join("job.yaml");
    std::fs::write(&file, "nodes: 5\ncommand: [true]\n").unwrap();
    let refused = cluster
        .yard(&["submit", "-f", "job.yaml", "--json"])
        .expect_code(65)
        .json();
    assert_eq!(refused["error"]["field"], "nodes");
    let told = refused["error"]["message"].as_str().unwrap();
    assert!(told.starts_with("job.yaml: nodes: needs 5 nodes"), "{told}");
    assert!(
        told.contains("could hold a part, and 5 are asked for"),
        "{told}"
    );
    let refused = cluster
        .yard(&["submit", "--workspace", "other", "--", "true"])
        .expect_code(66);
    assert!(refused.stderr.contains("--workspace"), "{}", refused.stderr);
    // Nothing of it is on record.
    let jobs = cluster
        .yard(&["jobs", "-a", "--json"])
        .expect_code(0)
        .json();
    assert_eq!(jobs["jobs"], serde_json::json!([]));
    let job = cluster.submit(&["--gpus", "8", "--allow-infeasible", "--", "true"]);
    // In a pipe the reason is whole.
    let listed = cluster.yard(&["jobs"]).expect_code(0).stdout;
    assert!(
        listed.contains("could not hold that even if empty: "),
        "{listed}"
    );
    assert_eq!(cluster.job(&job)["reason"]["code"], "INFEASIBLE");
    // It holds nobody up.
    let _ = cluster.yard(&["run", "--", "true"]).expect_code(0);
}

#[test]
fn down_refuses_while_jobs_run() {
    let machine = Machine::new();
    let cluster = machine.up(&[]);
    let job = cluster.submit(&["--", "sleep", "600"]);
    let refused = cluster.yard(&["down"]).expect_code(77);
    assert!(
        refused.stderr.contains(&job) && refused.stderr.contains("--force"),
        "{}",
        refused.stderr
    );
    let _ = cluster.yard(&["down", "--force"]).expect_code(0);
    let _ = cluster.yard(&["jobs"]).expect_code(69);
}
