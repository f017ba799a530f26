//! Single processes: what `/proc` says about one, signals that cannot hit a later process of the same number, and
//! reaping. All of the agent's `unsafe` for processes is here, in [`super::spawn`] and in [`super::client`]'s start of
//! the shim.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use nix::errno::Errno;
use nix::libc;
pub(crate) use nix::sys::signal::Signal;
use nix::unistd::Pid;
use trainyard_common::limits::MAX_LEFT_TOLD;
use trainyard_common::member::LeftProcess;

/// A process as `/proc/PID/stat` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) parent: i32,
    pub(crate) session: i32,
    /// Ticks since boot: with `pid`, this names a process for good.
    pub(crate) start_time: u64,
    /// Ended with all its threads, only its exit status is left.
    pub(crate) is_zombie: bool,
    /// The kernel's letter for what its first thread does.
    pub(crate) state: char,
}

impl Process {
    /// The process of this number, if there is one.
    pub(crate) fn find(pid: i32) -> Option<Self> {
        // The program's name need not be text.
        let bytes = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
        Self::parse(&String::from_utf8_lossy(&bytes))
    }

    /// Every process that can be seen.
    pub(crate) fn all() -> Vec<Self> {
        let Ok(entries) = std::fs::read_dir("/proc") else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter_map(Self::find)
            .collect()
    }

    fn parse(stat: &str) -> Option<Self> {
        // The name in parentheses may hold anything, a parenthesis too, but what follows it holds none.
        let pid = stat.split(' ').next()?.parse().ok()?;
        let rest: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
        let state = *rest.first()?;
        let threads: i64 = rest.get(17)?.parse().ok()?;
        Some(Self {
            pid,
            parent: rest.get(1)?.parse().ok()?,
            session: rest.get(3)?.parse().ok()?,
            start_time: rest.get(19)?.parse().ok()?,
            // While another thread lives, the first one only looks dead.
            is_zombie: matches!(state, "Z" | "X" | "x") && threads <= 1,
            state: state.chars().next()?,
        })
    }

    /// Sends a signal to this very process; does nothing if it has ended, whoever has its number now.
    pub(crate) fn signal(&self, signal: Signal) {
        match self.open() {
            Some(Some(pidfd)) => pidfd_signal(&pidfd, signal),
            // Before Linux 5.3 there is a gap between the check and the signal that cannot be closed.
            Some(None) if Self::find(self.pid).is_some_and(|now| self.is_same(&now)) => {
                let _ = nix::sys::signal::kill(Pid::from_raw(self.pid), signal);
            }
            Some(None) | None => {}
        }
    }

    /// How it is told of when it outlives SIGKILL.
    fn left(&self) -> Option<LeftProcess> {
        let name = std::fs::read(format!("/proc/{}/comm", self.pid)).unwrap_or_default();
        Some(LeftProcess {
            pid: u32::try_from(self.pid).ok()?,
            state: self.stuck_state(),
            name: String::from_utf8_lossy(&name).trim_end().to_owned(),
        })
    }

    /// The state of a thread that is not dead: the first one may be.
    fn stuck_state(&self) -> char {
        if !matches!(self.state, 'Z' | 'X' | 'x') {
            return self.state;
        }
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid));
        let states = threads
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|thread| {
                let stat = std::fs::read(thread.path().join("stat")).ok()?;
                Some(Self::parse(&String::from_utf8_lossy(&stat))?.state)
            });
        let mut living = states.filter(|state| !matches!(state, 'Z' | 'X' | 'x'));
        living.next().unwrap_or(self.state)
    }

    fn is_same(&self, now: &Self) -> bool {
        (now.pid, now.start_time) == (self.pid, self.start_time)
    }

    /// Holds on to the process: nothing if it has ended, nothing inside if the kernel has no such handle.
    #[expect(clippy::option_option, reason = "three answers, used in one place")]
    fn open(&self) -> Option<Option<OwnedFd>> {
        match pidfd_open(self.pid) {
            Ok(pidfd) => Self::find(self.pid)
                .is_some_and(|now| self.is_same(&now))
                .then_some(Some(pidfd)),
            Err(Errno::ENOSYS | Errno::EPERM | Errno::EMFILE | Errno::ENFILE) => Some(None),
            Err(_) => None,
        }
    }

    /// Whether the environment that it was started with holds `entry`, such as `NAME=value`.
    pub(crate) fn environment_has(&self, entry: &[u8]) -> bool {
        std::fs::read(format!("/proc/{}/environ", self.pid))
            .is_ok_and(|bytes| bytes.split(|byte| *byte == 0).any(|own| own == entry))
    }
}

/// Those of `living` that are told of when they outlive SIGKILL, and how many more there are.
pub(crate) fn left(living: &[Process]) -> (Vec<LeftProcess>, u32) {
    let told: Vec<LeftProcess> = living
        .iter()
        .filter_map(Process::left)
        .take(MAX_LEFT_TOLD)
        .collect();
    let more = living.len().saturating_sub(told.len());
    (told, u32::try_from(more).unwrap_or(u32::MAX))
}

/// When a process started, in clock ticks since the machine's boot: with its number, this names it for good. Nothing if
/// it has ended, also if its exit status is still to be taken.
#[must_use]
pub fn start_time(pid: i32) -> Option<u64> {
    Process::find(pid)
        .filter(|process| !process.is_zombie)
        .map(|process| process.start_time)
}

/// The name of this process's pid namespace.
pub(crate) fn pid_namespace() -> String {
    std::fs::read_link("/proc/self/ns/pid")
        .map(|path| path.to_string_lossy().into_owned())
        .unwrap_or_default()
}

#[expect(
    unsafe_code,
    reason = "the library has no wrapper for this system call"
)]
fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: the call takes two integers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = Errno::result(result)? as RawFd;
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[expect(
    unsafe_code,
    reason = "the library has no wrapper for this system call"
)]
fn pidfd_signal(pidfd: &OwnedFd, signal: Signal) {
    let info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: the descriptor is open while it is borrowed; the kernel allows a null pointer for the details.
    // An error means that the process has ended or is not ours to signal, and the caller looks again anyhow.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal as libc::c_int,
            info,
            0,
        );
    }
}

/// What became of our children.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reaped {
    /// One has ended, this way.
    Ended(i32, ExitStatus),
    /// There are some and none has ended.
    StillRunning,
    /// There are none, and so no descendants either: orphans would have become our children.
    Childless,
}

/// Takes the exit status of one child that has ended. The library's own wrapper cannot be used: it turns an end by a
/// real-time signal into an error and loses the status.
#[expect(unsafe_code, reason = "the library's wrapper loses some exit statuses")]
pub(crate) fn reap() -> Reaped {
    let mut status: libc::c_int = 0;
    loop {
        // SAFETY: `status` is a valid place for one integer for the time of the call.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        match Errno::result(pid) {
            Ok(0) => return Reaped::StillRunning,
            Ok(pid) => return Reaped::Ended(pid, ExitStatus::from_raw(status)),
            Err(Errno::EINTR) => {}
            Err(_) => return Reaped::Childless,
        }
    }
}

/// Marks everything but standard input, output and error to be closed at exec. Rust's own descriptors are marked
/// already; on kernels before 5.11, which lack the call, that has to do.
#[expect(
    unsafe_code,
    reason = "the library has no wrapper for this system call"
)]
pub(crate) fn close_others() {
    // SAFETY: marks descriptors only; none is closed while something in this process still uses it.
    unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        );
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn hostile_names_do_not_confuse_the_parser() {
        let stat = "812 (a) S 1 (b) D 77 812 800 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 99887 1 2";
        assert_eq!(
            Process::parse(stat),
            Some(Process {
                pid: 812,
                parent: 77,
                session: 800,
                start_time: 99_887,
                is_zombie: false,
                state: 'D',
            })
        );
        let ended = |threads: &str| {
            let stat = stat.replace("(b) D", "(b) Z").replace("20 0 1 0", threads);
            Process::parse(&stat).unwrap().is_zombie
        };
        assert!(ended("20 0 1 0"));
        assert!(!ended("20 0 2 0"), "one of its threads lives");
        for cut in 0..stat.len() {
            let _ = Process::parse(&stat[..cut]);
        }
    }

    #[test]
    fn a_signal_hits_only_the_process_it_was_meant_for() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let found = Process::find(child.id().try_into().unwrap()).unwrap();
        assert_eq!(found.parent, std::process::id() as i32);
        let later = Process {
            start_time: found.start_time + 1,
            ..found
        };
        later.signal(Signal::SIGKILL);
        assert!(child.try_wait().unwrap().is_none());
        assert!(Process::all().contains(&Process::find(found.pid).unwrap()));
        found.signal(Signal::SIGTERM);
        assert_eq!(child.wait().unwrap().signal(), Some(15));
    }
}
