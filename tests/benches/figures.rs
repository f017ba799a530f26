//! The figures of docs/performance.md: starts a local cluster of the release binary in a directory of its own, measures
//! it from outside through the command line and `/proc`, and prints one table beside the goals. A missed goal is shown,
//! not a failure. It must not reach into a component.
//!
//! `FIGURES_TASKS` sets the length of the array (default 1000); `YARD_BENCH_BINARY` names a binary to measure instead of
//! the one of this tree; the directory is made in `TMPDIR`.
#![expect(
    clippy::print_stdout,
    reason = "a program whose purpose is to print a table"
)]

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::time::ClockId;
use nix::unistd::Pid;
use trainyard_tests::bench::{self, Cluster, Goal, Table, let_pass, milliseconds, output, printed};
use trainyard_tests::until;

/// Repetitions of everything of which the median is shown.
const REPEATS: usize = 40;
/// Repetitions before them that do not count.
const WARM_UP: usize = 3;
/// Tasks of the array unless `FIGURES_TASKS` says otherwise; the goals were set for 10,000.
const TASKS: u32 = 1000;
/// Threads of the raw loop: as many as this project's reference machine has cores.
const RAW_THREADS: u32 = 2;
/// Processes in one round of the raw loop.
const RAW_TASKS: u32 = 1000;
/// Rounds of it; the median counts, as making files gets slower for seconds after many were deleted.
const RAW_ROUNDS: usize = 5;
/// After its last work a process gets so long to calm down before it is called idle.
const SETTLE: Duration = Duration::from_secs(3);
/// CPU use of an idle process is taken over so long.
const IDLE: Duration = Duration::from_secs(10);
/// Seconds that the sleeping task sleeps: far longer than the measurement, and odd enough to find its process by.
const SLEEP_SECONDS: &str = "86431";

fn main() {
    let yard = bench::binary();
    let tasks = tasks();
    println!("{}", bench::machine());
    println!("binary: {}\n", yard.display());
    let cluster = Cluster::up(yard);
    let mut table = Table::default();
    start_of_command(&cluster, &mut table);
    let raw_rate = raw(&cluster, &mut table);
    submit(&cluster, &mut table);
    run(&cluster, &mut table);
    idle(&cluster, &mut table, "after the commands above");
    array(&cluster, &mut table, tasks, raw_rate);
    idle(&cluster, &mut table, "after the array");
    table.print();
}

fn tasks() -> u32 {
    let Some(text) = std::env::var_os("FIGURES_TASKS") else {
        return TASKS;
    };
    let number = text.to_str().and_then(|text| text.parse().ok());
    let number = number.expect("FIGURES_TASKS is a number");
    assert!(number > 0, "FIGURES_TASKS is at least 1");
    number
}

// ---- latencies --------------------------------------------------------------------------------------------------

fn start_of_command(cluster: &Cluster, table: &mut Table) {
    let time = median(|| {
        let started = Instant::now();
        let _ = cluster.yard(&["--version"]);
        milliseconds(started.elapsed())
    });
    table.add("`yard --version`, p50", time, "ms", Goal::AtMost(6.0));
}

fn submit(cluster: &Cluster, table: &mut Table) {
    let words = ["/bin/date", "+%s%N"];
    // `date` reads the clock a while after its process has started; that is its own cost.
    let raw = median(|| {
        let before = since_epoch();
        let output = output(Command::new(words[0]).arg(words[1]).env_clear());
        milliseconds(clock_of_date(&printed(&words, &output)).saturating_sub(before))
    });
    let whole = median(|| {
        let before = since_epoch();
        let job = cluster.yard(&["submit", "--no-dir", "--", words[0], words[1]]);
        let _ = cluster.yard(&["wait", &job]);
        let log = cluster.yard(&["logs", &job]);
        milliseconds(clock_of_date(&log).saturating_sub(before))
    });
    table.add(
        "raw: spawn `date` until it reads the clock, p50",
        raw,
        "ms",
        Goal::None,
    );
    table.add(
        "`yard submit`, command's start to process's start, p50",
        whole - raw,
        "ms",
        Goal::AtMost(12.0),
    );
}

fn run(cluster: &Cluster, table: &mut Table) {
    let time = median(|| {
        let started = Instant::now();
        let _ = cluster.yard(&["run", "--no-dir", "--", "/bin/true"]);
        milliseconds(started.elapsed())
    });
    table.add(
        "`yard run -- /bin/true`, start to exit, p50",
        time,
        "ms",
        Goal::AtMost(20.0),
    );
}

/// The median of what a measurement gives.
fn median(mut measure: impl FnMut() -> f64) -> f64 {
    for _ in 0..WARM_UP {
        let _ = measure();
    }
    bench::median((0..REPEATS).map(|_| measure()).collect())
}

fn since_epoch() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.expect("the clock is set to a time after 1970")
}

fn clock_of_date(text: &str) -> Duration {
    Duration::from_nanos(text.parse().expect("date printed nanoseconds"))
}

// ---- throughput -------------------------------------------------------------------------------------------------

/// What the same processes cost without a cluster; processes a second of the loop with two log files each.
fn raw(cluster: &Cluster, table: &mut Table) -> f64 {
    let time = median(|| {
        let started = Instant::now();
        let _ = true_command().status().expect("true can be started");
        milliseconds(started.elapsed())
    });
    table.add("raw: spawn and wait `true`, p50", time, "ms", Goal::None);

    let mut rates: Vec<f64> = (0..RAW_ROUNDS)
        .map(|round| raw_round(&cluster.home().join(format!("raw-{round}"))))
        .collect();
    rates.sort_by(f64::total_cmp);
    let rate = rates[RAW_ROUNDS / 2];
    table.add(
        &format!("raw: {RAW_THREADS} threads, two log files each"),
        rate,
        "processes/s",
        Goal::None,
    );
    rate
}

/// Processes a second of one round, whose log files go to a new directory.
fn raw_round(dir: &Path) -> f64 {
    fs::create_dir(dir).expect("a directory can be made");
    let started = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..RAW_THREADS {
            scope.spawn(move || {
                for task in (thread..RAW_TASKS).step_by(RAW_THREADS as usize) {
                    raw_task(dir, task);
                }
            });
        }
    });
    f64::from(RAW_TASKS) / started.elapsed().as_secs_f64()
}

/// One process with a log file for each of its outputs.
fn raw_task(dir: &Path, task: u32) {
    let log = |stream| {
        let path = dir.join(format!("{task}.{stream}"));
        File::create_new(path).expect("a log file can be made")
    };
    let status = true_command()
        .stdout(log("out"))
        .stderr(log("err"))
        .status()
        .expect("true can be started");
    assert!(status.success(), "true failed");
}

/// Without anything that would keep the standard library from `posix_spawn`.
fn true_command() -> Command {
    let mut command = Command::new("/bin/true");
    command.env_clear().stdin(Stdio::null());
    command
}

fn array(cluster: &Cluster, table: &mut Table, tasks: u32, raw_rate: f64) {
    let indices = format!("0-{}", tasks - 1);
    let processes = cluster.processes();
    let before = processes.map(|(_, pid)| (cpu(pid), cpu_of_children(pid)));
    let started = Instant::now();
    // Half a CPU each: with as many slots as cores these would stand still between two tasks.
    let words = [
        "submit", "--no-dir", "--array", &indices, "--cpus", "0.5", "--",
    ];
    let job = cluster.yard(&[&words[..], &["/bin/true"]].concat());
    let _ = cluster.yard(&["wait", &job]);
    let rate = f64::from(tasks) / started.elapsed().as_secs_f64();
    let after = processes.map(|(_, pid)| (cpu(pid), cpu_of_children(pid)));

    let array = format!("array of {tasks} `true`");
    table.add(&array, rate, "tasks/s", Goal::None);
    table.add(
        &format!("{array}, of the raw rate"),
        rate / raw_rate,
        "",
        Goal::AtLeast(0.5),
    );
    let per_task =
        |after: Duration, before: Duration| (after - before).as_secs_f64() * 1e6 / f64::from(tasks);
    let mut together = 0.0;
    for (((role, _), before), after) in processes.iter().zip(&before).zip(&after) {
        let cost = per_task(after.0, before.0);
        together += cost;
        table.add(
            &format!("CPU of the {role} per task"),
            cost,
            "us",
            Goal::None,
        );
    }
    table.add("CPU of both per task", together, "us", Goal::AtMost(60.0));
    table.add(
        "CPU of shims and processes per task",
        per_task(after[1].1, before[1].1),
        "us",
        Goal::None,
    );
}

/// CPU time of all threads of a process, those that have ended included.
fn cpu(pid: Pid) -> Duration {
    let time = ClockId::pid_cpu_clock_id(pid).and_then(ClockId::now);
    time.expect("the process lives").into()
}

/// CPU time of those children of a process (and of theirs) that it has waited for; in steps of 10 ms.
fn cpu_of_children(pid: Pid) -> Duration {
    // Fields 16 and 17 of proc_pid_stat(5); user space always sees 100 ticks a second here.
    let ticks: u64 = stat(pid, 16) + stat(pid, 17);
    Duration::from_millis(10 * ticks)
}

/// A field of `/proc/PID/stat`, counted as the manual page does, from 3 on.
fn stat(pid: Pid, field: usize) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before it may hold spaces.
    let rest = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let value = rest.split_whitespace().nth(field - 3);
    value.and_then(|value| value.parse().ok()).unwrap_or(0)
}

// ---- idle -------------------------------------------------------------------------------------------------------

/// Memory and CPU use of everything while one task sleeps.
fn idle(cluster: &Cluster, table: &mut Table, when: &str) {
    let job = cluster.yard(&["submit", "--no-dir", "--", "/bin/sleep", SLEEP_SECONDS]);
    let shim = until("the task sleeps", || shim(cluster.home()));
    let [coordinator, agent] = cluster.processes();
    let parts = [
        (coordinator, 25.0),
        (agent, 15.0),
        (("shim of a sleeping task", shim), 3.0),
    ];
    let_pass(SETTLE);
    let before = parts.map(|((_, pid), _)| cpu(pid));
    let started = Instant::now();
    let_pass(IDLE);
    let shares = [0, 1, 2].map(|part| {
        let used = cpu(parts[part].0.1) - before[part];
        100.0 * used.as_secs_f64() / started.elapsed().as_secs_f64()
    });
    for (((role, pid), goal), share) in parts.into_iter().zip(shares) {
        let figure = |what| format!("{role}, idle {when}: {what}");
        let memory = |line| megabytes(pid, line);
        table.add(&figure("PSS"), memory("Pss:"), "MB", Goal::AtMost(goal));
        table.add(&figure("RSS"), memory("Rss:"), "MB", Goal::None);
        table.add(&figure("CPU"), share, "% of a core", Goal::AtMost(0.05));
    }
    let _ = cluster.yard(&["cancel", &job]);
    // The command's exit code tells of the cancelled job, so no success is asked of it.
    let _ = output(&mut cluster.command(&["wait", &job]));
}

/// The shim that holds the sleeping task: the parent of its process, if both are there yet.
fn shim(home: &Path) -> Option<Pid> {
    let home = home.to_str().expect("the path of the directory is UTF-8");
    let words = |pid: Pid, file| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let of_ours = |pid: Pid| String::from_utf8_lossy(&words(pid, "environ")).contains(home);
    let sleeps = format!("/bin/sleep\0{SLEEP_SECONDS}\0");
    let entries = fs::read_dir("/proc").expect("proc is mounted");
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.map(Pid::from_raw)
        .filter(|pid| words(*pid, "cmdline") == sleeps.as_bytes() && of_ours(*pid))
        .find_map(|pid| Some(Pid::from_raw(stat(pid, 4).try_into().ok()?)))
}

/// A line of `smaps_rollup`, in 10^6 bytes.
fn megabytes(pid: Pid, line: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"));
    let text = text.expect("the process lives and may be looked at");
    let value = text.lines().find_map(|text| {
        let kibibytes = text.strip_prefix(line)?.trim().strip_suffix("kB")?;
        kibibytes.trim().parse::<f64>().ok()
    });
    value.expect("the kernel writes kibibytes") * 1024.0 / 1e6
}
