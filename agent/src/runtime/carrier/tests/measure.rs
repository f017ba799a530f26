//! What a carrier costs, beside the cheapest way to run the same processes. For people: run it by name, in release.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Instant;

use nix::libc;

use super::*;

const TASKS: u32 = 5000;

/// Seconds of processor time of this process's ended children and theirs, or of `pid` alone.
#[expect(unsafe_code, reason = "a measure in a test")]
fn children_cpu() -> f64 {
    // SAFETY: zero is a value of this structure, and the kernel writes one of the same.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Own and children's seconds of a living process.
fn cpu_of(pid: i32) -> (f64, f64) {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<f64> = stat[stat.rfind(')').unwrap() + 2..]
        .split(' ')
        .map(|field| field.parse().unwrap_or(0.0))
        .collect();
    (
        (fields[11] + fields[12]) / 100.0,
        (fields[13] + fields[14]) / 100.0,
    )
}

/// Two threads, two files for each process.
fn plain_loop(dir: &std::path::Path) {
    std::thread::scope(|scope| {
        for thread in 0..2 {
            scope.spawn(move || {
                for task in 0..TASKS / 2 {
                    let log = |kind| {
                        std::fs::File::create(dir.join(format!("{thread}-{task}.{kind}"))).unwrap()
                    };
                    let mut command = Command::new("/bin/true");
                    command.stdout(log("out")).stderr(log("err"));
                    command.process_group(0);
                    assert!(command.status().unwrap().success());
                }
            });
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measure, not a test"]
async fn tasks_per_second() {
    for script in [None, Some("echo hello")] {
        let temp = tempfile::tempdir().unwrap();
        let (cpu, start) = (children_cpu(), Instant::now());
        plain_loop(temp.path());
        let (seconds, cpu) = (start.elapsed().as_secs_f64(), children_cpu() - cpu);
        let per = 1e6 / f64::from(TASKS);
        println!(
            "plain loop: {:.0} tasks/s, {:.0} us of each child",
            f64::from(TASKS) / seconds,
            cpu * per
        );
        let mut world = World::with(|config| config.return_after = Duration::from_secs(3600));
        let spec = match script {
            None => spec(&["/bin/true"]),
            Some(_) => spec(&["/bin/echo", "hello"]),
        };
        world.start(spec, &[]).await;
        world.next().await;
        let pid = world.dir().shim().read_shim().unwrap().unwrap().pid;
        let start = Instant::now();
        world.hand(range(0, TASKS - 1));
        let mut offset = 0_u64;
        let mut done = 0;
        while done < TASKS {
            world.next().await;
            let bytes = read_from(&world.dir().journal(), offset, 1 << 26).unwrap();
            let (records, taken) = parse(&bytes);
            offset += taken as u64;
            done += records
                .iter()
                .filter(|record| matches!(record, Record::Ended(_)))
                .count() as u32;
        }
        let seconds = start.elapsed().as_secs_f64();
        let (own, children) = cpu_of(pid);
        println!(
            "carrier ({script:?}): {:.0} tasks/s, {:.0} us of the carrier, {:.0} us of each child",
            f64::from(TASKS) / seconds,
            own * per,
            children * per
        );
        world.close();
        world.over().await;
    }
}
