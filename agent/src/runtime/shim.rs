//! The start of the shim: the small process that holds a member's children, output and exit status and outlives the
//! agent. Brings everything into place and hands over to `supervise.rs`.
//!
//! Must run on the main thread of a process of its own, before that process starts other threads: signals are blocked
//! for all later threads, and the ranks are tied to the life of the thread that starts them.

use std::ffi::{CString, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::libc;
use nix::poll::{PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage};
use nix::sys::stat::{Mode, umask};
use trainyard_common::ids::AttemptRef;
use trainyard_common::member::{EndCause, Ending};

use trainyard_transport::clock::Clock;
use trainyard_transport::sealed::FileRecord;

use super::carrier::{carry, is_bundle};
use super::cgroup::Cgroup;
use super::dir::{AttemptDir, SOCKET, read_json, write_json};
use super::port::HeldPort;
use super::process::{Process, close_others, pid_namespace};
use super::spawn::Identity;
use super::start::{SPARE, open_log};
use super::supervise::{Parts, Supervisor};
use super::wire::{MemberFile, ShimFile};
use super::{RunAs, ShimState};

/// Bytes set aside on disk, given up when the last state cannot be written for want of space: what a status file takes,
/// and what each rank adds to it (about 150 bytes).
const RESERVE_BYTES: usize = 8 << 10;
const RESERVE_BYTES_PER_RANK: usize = 256;

/// An agent's look at the lock takes microseconds; after this a shim has it.
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE_MS: u8 = 5;

/// The shim has nothing to do: another one has the attempt, or had it.
const EXIT_NOT_MINE: u8 = 3;
/// The shim could not come up; what is wrong is in its log, and in its status if that could be written.
const EXIT_FAILED: u8 = 1;

/// The whole program: supervises the member whose attempt directory this is and returns when all of its processes are
/// gone and that is recorded. For `-` the directory is told through standard input, once there is a member.
#[must_use]
pub fn shim_main(dir: &Path) -> ExitCode {
    supervise(dir, true)
}

/// The same, and without a cgroup if tests ask for what machines without one get.
pub(super) fn supervise(dir: &Path, cgroup: bool) -> ExitCode {
    if dir == Path::new(SPARE) {
        return match await_directory() {
            Ok(Some(dir)) => supervise(&dir, cgroup),
            // The agent ended.
            Ok(None) => ExitCode::SUCCESS,
            Err(error) => {
                note(&format!("cannot begin: {error}"));
                ExitCode::from(EXIT_FAILED)
            }
        };
    }
    if is_bundle(dir) {
        return carry(dir);
    }
    match start(dir, cgroup) {
        Ok(Some(supervisor)) => match supervisor.run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                // The agent finds the lock free and no ending, and cleans up.
                note(&format!("cannot go on: {error}"));
                ExitCode::from(EXIT_FAILED)
            }
        },
        Ok(None) => ExitCode::from(EXIT_NOT_MINE),
        Err(error) => {
            note(&format!("cannot start: {error}"));
            ExitCode::from(EXIT_FAILED)
        }
    }
}

/// Waits to be told a directory, whose log is this process's from then on. Nothing if the agent leaves before.
fn await_directory() -> io::Result<Option<PathBuf>> {
    let _ = nix::unistd::setsid();
    close_others();
    // Byte by byte: what follows is for whoever takes the connection then.
    let mut connection = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut path = Vec::new();
    loop {
        let mut byte = [0];
        match connection.read(&mut byte)? {
            0 => return Ok(None),
            _ if byte == [0] => break,
            _ if path.len() < libc::PATH_MAX as usize => path.extend(byte),
            _ => return Err(io::Error::other("the directory's path is too long")),
        }
    }
    let path = PathBuf::from(OsString::from_vec(path));
    let log = open_log(&AttemptDir::at(attempt_of(&path)?, path.clone()))?;
    nix::unistd::dup2_stdout(&log)?;
    nix::unistd::dup2_stderr(&log)?;
    Ok(Some(path))
}

/// What `ps` shows as this process's name, as a spare shim was not told more when it was started.
pub(super) fn take_name(what: &str) {
    if let Ok(name) = CString::new(format!("yard {what}")) {
        // The kernel keeps 15 bytes of it. A name is not worth a failure.
        let _ = nix::sys::prctl::set_name(&name);
    }
}

fn attempt_of(root: &Path) -> io::Result<AttemptRef> {
    root.file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| name.parse().ok())
        .ok_or_else(|| io::Error::other("the directory is not named like an attempt"))
}

/// Says something to the operator. Standard error is the shim's log file; if it cannot be written, so be it.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Nothing if this is not the attempt's one shim.
fn start(path: &Path, cgroup: bool) -> io::Result<Option<Supervisor>> {
    // Fails if this process leads a session already, which is as good.
    let _ = nix::unistd::setsid();
    umask(Mode::from_bits_truncate(0o077));
    close_others();
    let agent = take_connection()?;
    let root = path.canonicalize()?;
    let dir = AttemptDir::at(attempt_of(&root)?, root);
    take_name(&dir.attempt().to_string());
    if !lock_for_good(&dir)? {
        note("another shim has this attempt");
        return Ok(None);
    }
    if dir.status().exists() || dir.go().exists() {
        note("this attempt was started before");
        return Ok(None);
    }
    match prepare(&dir, cgroup, agent) {
        Ok(supervisor) => Ok(Some(supervisor)),
        Err(error) => {
            let ending = Ending {
                cause: EndCause::PrepareFailed,
                message: format!("the shim could not prepare: {error}"),
                started: false,
                ranks: Vec::new(),
                ended_at: Clock::start().now(),
                outputs: None,
                checkpoint: None,
                warning: String::new(),
            };
            dir.write_status(&ShimState::Gone(ending))?;
            Err(error)
        }
    }
}

/// The connection that the agent gave as standard input, if it did. What is standard input afterwards says nothing.
pub(super) fn take_connection() -> io::Result<Option<UnixStream>> {
    let input = io::stdin();
    let family = nix::sys::socket::getsockname::<SockaddrStorage>(input.as_fd().as_raw_fd());
    let is_ours = family.is_ok_and(|address| address.family() == Some(AddressFamily::Unix));
    let stream = match is_ours {
        true => Some(UnixStream::from(input.as_fd().try_clone_to_owned()?)),
        false => None,
    };
    nix::unistd::dup2_stdin(File::open("/dev/null")?)?;
    Ok(stream)
}

/// Takes the lock until this process ends, however it does. An agent that only looks has it for a moment.
pub(super) fn lock_for_good(dir: &AttemptDir) -> io::Result<bool> {
    for _ in 0..LOCK_TRIES {
        if let Some(lock) = dir.try_lock()? {
            std::mem::forget(lock);
            return Ok(true);
        }
        let _ = poll(&mut [], PollTimeout::from(LOCK_PAUSE_MS));
    }
    Ok(false)
}

fn prepare(dir: &AttemptDir, cgroup: bool, agent: Option<UnixStream>) -> io::Result<Supervisor> {
    let member: MemberFile = require(&dir.member())?;
    let signals = block_signals()?;
    nix::sys::prctl::set_child_subreaper(true)?;
    let cgroup = cgroup.then(|| Cgroup::create(dir.attempt())).flatten();
    let shim = ShimFile {
        member: Some(Box::new(member.clone())),
        ..identify(cgroup.as_ref())
    };
    write_json(&dir.shim(), &shim)?;
    let MemberFile { spec, settings, .. } = member;
    set_aside(dir, spec.procs_per_node)?;
    let identity = settings.run_as.as_ref().map(look_up);
    // The socket's address holds 108 bytes, fewer than a path may have.
    std::env::set_current_dir(dir.root())?;
    let _ = std::fs::remove_file(SOCKET);
    let listener = UnixListener::bind(SOCKET)?;
    Supervisor::new(Parts {
        dir: dir.clone(),
        spec,
        settings,
        port: HeldPort::take()?,
        cgroup,
        listener,
        agent,
        signals,
        identity,
    })
}

pub(super) fn require<T: FileRecord>(path: &Path) -> io::Result<T> {
    read_json(path)?.ok_or_else(|| {
        let name = path.display();
        io::Error::new(io::ErrorKind::NotFound, format!("{name} is missing"))
    })
}

pub(super) fn identify(cgroup: Option<&Cgroup>) -> ShimFile {
    let pid = nix::unistd::getpid().as_raw();
    ShimFile {
        pid,
        start_time: Process::find(pid).map_or(0, |own| own.start_time),
        pid_namespace: pid_namespace(),
        cgroup: cgroup.map(|cgroup| cgroup.path().to_owned()),
        member: None,
        bundle: None,
    }
}

fn block_signals() -> io::Result<SignalFd> {
    blocked_signals().thread_block()?;
    let mut read = SigSet::empty();
    read.add(Signal::SIGCHLD);
    read.add(Signal::SIGTERM);
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    Ok(SignalFd::with_flags(&read, flags)?)
}

/// What must not interrupt or end a shim. The agent's end, its terminal's end and the like are none of its business;
/// what matters is read from a descriptor. The agent blocks them before the shim's program begins, so that none is lost.
pub(super) fn blocked_signals() -> SigSet {
    let mut blocked = SigSet::empty();
    for signal in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGPIPE,
        Signal::SIGALRM,
        Signal::SIGTERM,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGCHLD,
        Signal::SIGTSTP,
        Signal::SIGTTIN,
        Signal::SIGTTOU,
    ] {
        blocked.add(signal);
    }
    blocked
}

pub(super) fn set_aside(dir: &AttemptDir, ranks: u32) -> io::Result<()> {
    let bytes = RESERVE_BYTES + RESERVE_BYTES_PER_RANK * ranks as usize;
    // Written, not only allocated: some file systems promise space and break it. No need to sync.
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(dir.reserve())?;
    file.write_all(&vec![0; bytes])
}

/// The user's groups (GPU devices are often a group's), or its own one if they cannot be found out.
pub(super) fn look_up(user: &RunAs) -> Identity {
    let groups = CString::new(user.name.as_str())
        .ok()
        .and_then(|name| nix::unistd::getgrouplist(&name, user.gid.into()).ok())
        .map(|groups| groups.iter().map(|group| group.as_raw()).collect())
        .unwrap_or_else(|| vec![user.gid]);
    Identity {
        uid: user.uid,
        gid: user.gid,
        groups,
    }
}
