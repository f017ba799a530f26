//! The program that the jobs of a run are: it writes down in the ledger what becomes of it, and behaves as badly as it is
//! told to. It knows nothing of the cluster but the variables that every rank finds.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::ledger::{Event, Ledger, Who, pattern};

/// Exit code of a rank that was started a second time.
const EXIT_TWICE: u8 = 99;
/// Exit code of a rank that could not do its part: a fault of the run.
const EXIT_BROKEN: u8 = 98;
/// Exit code of a rank that was told to end and did.
const EXIT_TOLD: u8 = 143;
/// How long what was left behind lives, unless it is ended.
const DAEMON_LIFE: Duration = Duration::from_secs(600);
/// How long outputs wait for room on the disk; faults are shorter.
const DISK_PATIENCE: Duration = Duration::from_secs(20);
/// Lines that are written in one go.
const LINES_AT_ONCE: u64 = 1000;

/// What a rank is told to do.
#[derive(Debug, Default)]
struct Orders {
    work: Duration,
    code: u8,
    /// Only the first attempt ends with `code`; later ones succeed.
    only_first: bool,
    /// Only this rank ends with `code` and after `work`; the others work until they are ended.
    only_rank: Option<u32>,
    ignore_term: bool,
    daemon: bool,
    lines: u64,
    outputs: u32,
    command: Vec<String>,
}

/// Runs a rank: `LEDGER [--work MS] [--exit CODE] [--only-first] [--only-rank N] [--ignore-term] [--daemon] [--lines N]
/// [--outputs N] [-- COMMAND…]`.
pub fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (Some(dir), Some(who)) = (arguments.next(), who()) else {
        return ExitCode::from(EXIT_BROKEN);
    };
    let ledger = Ledger::at(Path::new(&dir));
    let Some(orders) = orders(arguments) else {
        return be_daemon(&ledger, who);
    };
    // Blocked, so that it can be read; the commands that are started below begin with an empty mask.
    let told = SigSet::from(Signal::SIGTERM);
    let signals = told
        .thread_block()
        .and_then(|()| SignalFd::with_flags(&told, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC));
    let Ok(signals) = signals else {
        return ExitCode::from(EXIT_BROKEN);
    };
    let code = live(&ledger, who, &orders, &signals).unwrap_or(EXIT_BROKEN);
    ExitCode::from(code)
}

fn who() -> Option<Who> {
    let variable = |name| std::env::var(name).ok();
    Some(Who {
        job: variable("YARD_JOB_ID")?
            .trim_start_matches('j')
            .parse()
            .ok()?,
        task: variable("YARD_TASK_INDEX")?.parse().ok()?,
        attempt: variable("YARD_ATTEMPT")?.parse().ok()?,
        rank: variable("RANK")?.parse().ok()?,
    })
}

/// The orders; nothing for the process that is left behind.
fn orders(mut arguments: impl Iterator<Item = String>) -> Option<Orders> {
    let mut orders = Orders::default();
    while let Some(word) = arguments.next() {
        let mut number = || arguments.next()?.parse::<u64>().ok();
        match word.as_str() {
            "--work" => orders.work = Duration::from_millis(number()?),
            "--exit" => orders.code = u8::try_from(number()?).ok()?,
            "--only-first" => orders.only_first = true,
            "--only-rank" => orders.only_rank = Some(u32::try_from(number()?).ok()?),
            "--ignore-term" => orders.ignore_term = true,
            "--daemon" => orders.daemon = true,
            "--lines" => orders.lines = number()?,
            "--outputs" => orders.outputs = u32::try_from(number()?).ok()?,
            "--" => {
                orders.command = arguments.by_ref().collect();
            }
            _ => return None,
        }
    }
    Some(orders)
}

fn live(ledger: &Ledger, who: Who, orders: &Orders, signals: &SignalFd) -> std::io::Result<u8> {
    let lock = match ledger.lock(who) {
        Ok(lock) => lock,
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            ledger.add(who, Event::Twice)?;
            return Ok(EXIT_TWICE);
        }
        Err(error) => return Err(error),
    };
    ledger.add(who, Event::Start(cgroup()))?;
    for other in ledger.others_alive(who)? {
        ledger.add(who, Event::Overlap(other))?;
    }
    if orders.daemon {
        leave_daemon(ledger, lock.try_clone()?)?;
    }
    let lines = write_lines(who, orders.lines);
    ledger.add(who, Event::Wrote(lines))?;
    if write_outputs(who, orders.outputs, signals).is_err() {
        // What has no place now has none later; the code says so.
        ledger.add(who, Event::End(EXIT_BROKEN))?;
        return Ok(EXIT_BROKEN);
    }
    let code = if orders.command.is_empty() {
        work(ledger, who, orders, signals)?
    } else {
        wrap(ledger, who, &orders.command, signals)?
    };
    ledger.add(who, Event::End(code))?;
    // Held until now.
    drop(lock);
    Ok(code)
}

fn cgroup() -> String {
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = text.lines().find_map(|line| line.strip_prefix("0::"));
    own.unwrap_or("-").to_owned()
}

/// Writes lines of the pattern; how many were taken.
fn write_lines(who: Who, lines: u64) -> u64 {
    let mut out = std::io::stdout().lock();
    let mut index = 0;
    while index < lines {
        let end = lines.min(index + LINES_AT_ONCE);
        let text: String = (index..end).map(|index| pattern(who, index)).collect();
        if out
            .write_all(text.as_bytes())
            .and_then(|()| out.flush())
            .is_err()
        {
            break;
        }
        index = end;
    }
    index
}

/// What the checker finds again with `yard outputs`. A disk that is full is waited for, as its job would fail otherwise.
fn write_outputs(who: Who, files: u32, signals: &SignalFd) -> std::io::Result<()> {
    let Some(dir) = std::env::var_os("YARD_OUTPUT_DIR") else {
        return Err(std::io::Error::other("YARD_OUTPUT_DIR is not set"));
    };
    for file in 0..files {
        let path = Path::new(&dir).join(format!("rank-{}-{file}", who.rank));
        let text = pattern(who, u64::from(file));
        let end = Instant::now() + DISK_PATIENCE;
        while let Err(error) = std::fs::write(&path, &text) {
            if Instant::now() > end || told_within(signals, Duration::from_millis(100)) {
                return Err(error);
            }
        }
    }
    Ok(())
}

/// Whether it was told to end, having waited for that.
fn told_within(signals: &SignalFd, most: Duration) -> bool {
    let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
    let timeout =
        PollTimeout::try_from(most.min(Duration::from_secs(60))).unwrap_or(PollTimeout::MAX);
    let _ = poll(&mut fds, timeout);
    matches!(signals.read_signal(), Ok(Some(_)))
}

fn work(ledger: &Ledger, who: Who, orders: &Orders, signals: &SignalFd) -> std::io::Result<u8> {
    let concerned = orders.only_rank.is_none_or(|rank| rank == who.rank);
    let end = Instant::now() + if concerned { orders.work } else { DAEMON_LIFE };
    let mut left = end.saturating_duration_since(Instant::now());
    while left > Duration::ZERO {
        if told_within(signals, left) {
            ledger.add(who, Event::Term)?;
            if !orders.ignore_term {
                return Ok(EXIT_TOLD);
            }
        }
        left = end.saturating_duration_since(Instant::now());
    }
    let fails = concerned && (!orders.only_first || who.attempt == 1);
    Ok(if fails { orders.code } else { 0 })
}

/// Runs another program in this rank's place and ends as it does.
fn wrap(ledger: &Ledger, who: Who, command: &[String], signals: &SignalFd) -> std::io::Result<u8> {
    let mut child: Child = Command::new(&command[0]).args(&command[1..]).spawn()?;
    loop {
        if let Some(status) = child.try_wait()? {
            let code = status.code().or(status.signal().map(|signal| 128 + signal));
            return Ok(code
                .and_then(|code| u8::try_from(code).ok())
                .unwrap_or(EXIT_BROKEN));
        }
        // The program is told as well: everything that belongs to the attempt is.
        if told_within(signals, Duration::from_millis(20)) {
            ledger.add(who, Event::Term)?;
        }
    }
}

/// Leaves a process behind that holds the rank's lock and listens to no one.
fn leave_daemon(ledger: &Ledger, lock: File) -> std::io::Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg(ledger.dir())
        .arg("--be-daemon")
        .stdin(Stdio::from(lock))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // Its end is none of the rank's business: that is the point.
    command.spawn().map(drop)
}

fn be_daemon(ledger: &Ledger, who: Who) -> ExitCode {
    let deaf = SigSet::all().thread_block().is_ok() && nix::unistd::setsid().is_ok();
    if !deaf || ledger.add(who, Event::Daemon).is_err() {
        return ExitCode::from(EXIT_BROKEN);
    }
    let end = Instant::now() + DAEMON_LIFE;
    while Instant::now() < end {
        let left = end.saturating_duration_since(Instant::now());
        let timeout =
            PollTimeout::try_from(left.min(Duration::from_secs(60))).unwrap_or(PollTimeout::MAX);
        let _ = poll(&mut [], timeout);
    }
    ExitCode::SUCCESS
}
