//! The start of a carrier: brings everything into place and hands over to `control.rs`. As for any shim, it must be the
//! main thread of a process of its own.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{Mode, umask};
use trainyard_common::ids::BundleRef;

use super::super::dir::{SOCKET, write_json};
use super::super::peers::Peers;
use super::super::process::close_others;
use super::super::shim::{
    blocked_signals, identify, lock_for_good, look_up, note, require, set_aside, take_connection,
    take_name,
};
use super::super::wire::ShimFile;
use super::birth::Nursery;
use super::control::Control;
use super::dirs::start_cleaner;
use super::journal::Journal;
use super::output::Writer;
use super::work::{Parts, Shared};
use super::{BundleDir, BundleFile};

/// The carrier has nothing to do: another one has the bundle, or had it.
const EXIT_NOT_MINE: u8 = 3;
/// The carrier could not come up; what is wrong is in its log.
const EXIT_FAILED: u8 = 1;

/// Whether a shim's directory is that of a bundle.
pub(crate) fn is_bundle(dir: &Path) -> bool {
    reference(dir).is_some()
}

fn reference(dir: &Path) -> Option<BundleRef> {
    dir.file_name()?.to_str()?.parse().ok()
}

/// The whole program: carries the bundle whose directory this is and returns when all of its processes are gone and that
/// is recorded.
pub(crate) fn carry(dir: &Path) -> ExitCode {
    match start(dir) {
        Ok(Some(control)) => match control.run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                // The agent finds the lock free and the journal without an end, and cleans up.
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

/// Nothing if this is not the bundle's one carrier. What goes wrong before the first task is told by the agent, which
/// finds a bundle of which nothing was started.
fn start(path: &Path) -> io::Result<Option<Control>> {
    // Fails if this process leads a session already, which is as good.
    let _ = nix::unistd::setsid();
    umask(Mode::from_bits_truncate(0o077));
    close_others();
    let agent = take_connection()?;
    let root = path.canonicalize()?;
    let bundle = reference(&root)
        .ok_or_else(|| io::Error::other("the directory is not named like a bundle"))?;
    let dir = BundleDir::at(bundle, root);
    take_name(&bundle.to_string());
    let shim = dir.shim();
    if !lock_for_good(&shim)? {
        note("another shim has this bundle");
        return Ok(None);
    }
    let (journal, account) = Journal::open(&dir.journal())?;
    if shim.shim().exists() || account.over {
        note("this bundle was carried before");
        return Ok(None);
    }
    let file: BundleFile = require(&dir.file())?;
    let signals = take_signals()?;
    nix::sys::prctl::set_child_subreaper(true)?;
    let told = ShimFile {
        bundle: Some(Box::new(file.clone())),
        ..identify(None)
    };
    write_json(&shim.shim(), &told)?;
    set_aside(&shim, 1)?;
    let identity = file.run_as.as_ref().map(look_up);
    let nursery = Nursery::new(identity, raise_open_files()?)?;
    // The socket's address holds 108 bytes, fewer than a path may have.
    std::env::set_current_dir(dir.root())?;
    let _ = std::fs::remove_file(SOCKET);
    let peers = Peers::new(UnixListener::bind(SOCKET)?, agent)?;
    let shared = Shared::new(Parts {
        dir,
        file,
        nursery,
        writer: Writer::start()?,
        trash: start_cleaner()?,
        journal,
    })?;
    Ok(Some(Control::new(Arc::new(shared), peers, signals)))
}

/// As for any shim, but that the ends of children are asked for one by one, so nobody has to be woken by them.
fn take_signals() -> io::Result<SignalFd> {
    let mut blocked = blocked_signals();
    blocked.remove(Signal::SIGCHLD);
    blocked.thread_block()?;
    default_child_signal()?;
    let mut child = SigSet::empty();
    child.add(Signal::SIGCHLD);
    child.thread_unblock()?;
    let mut read = SigSet::empty();
    read.add(Signal::SIGTERM);
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    Ok(SignalFd::with_flags(&read, flags)?)
}

/// Whoever started the agent may have ignored the ends of children, and then their exit statuses would be lost.
#[expect(unsafe_code, reason = "setting a signal's action")]
fn default_child_signal() -> io::Result<()> {
    // SAFETY: the default action runs no code of ours.
    let old = unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    match old {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Slots need some ten descriptors each, more than a process has by default. Gives the limits of before, for tasks.
fn raise_open_files() -> io::Result<(u64, u64)> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    Ok((soft, hard))
}
