//! How the agent starts shims. The start of a program takes milliseconds and need not know for which member it is, so one
//! spare shim is kept once any was needed: it waits to be told its directory, and leaves when the agent does.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::libc;
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::time::sleep;
use trainyard_transport::task::spawn;

use super::dir::AttemptDir;
use super::failpoint::point;
use super::launch::INHERITED;

/// What a spare shim has instead of a directory.
pub(super) const SPARE: &str = "-";
/// A new spare is made this long after the last one was used, when the member that it was for has the machine no longer
/// to itself.
const REPLACE_AFTER: Duration = Duration::from_millis(25);

/// Starts the shims of members.
#[derive(Debug, Clone)]
pub(super) struct Shims {
    command: Vec<OsString>,
    spare: Arc<Mutex<Spare>>,
}

#[derive(Debug, Default)]
struct Spare {
    /// Its connection blocks no one: it is written to once, and empty until then.
    ready: Option<(Child, StdStream)>,
    /// A new one is on its way.
    ordered: bool,
}

impl Shims {
    pub(super) fn new(command: Vec<OsString>) -> Self {
        Self {
            command,
            spare: Arc::default(),
        }
    }

    /// Starts the shim of an attempt; gives the process and the connection to it.
    pub(super) fn start(&self, dir: &AttemptDir) -> io::Result<(Child, UnixStream)> {
        let spare = self.lock().ready.take();
        self.order_spare();
        if let Some((mut child, mut stream)) = spare
            && matches!(child.try_wait(), Ok(None))
            && stream.write_all(&orders(dir.root())).is_ok()
        {
            return Ok((child, UnixStream::from_std(stream)?));
        }
        start_shim(&self.command, dir)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Spare> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn spare(&self) -> Option<i32> {
        let spare = self.lock();
        let (child, _) = spare.ready.as_ref()?;
        child.id()?.try_into().ok()
    }

    #[cfg(test)]
    pub(super) fn take(&self) -> Option<(Child, StdStream)> {
        self.lock().ready.take()
    }

    fn order_spare(&self) {
        if std::mem::replace(&mut self.lock().ordered, true) {
            return;
        }
        let shims = self.clone();
        spawn("spare shim", async move {
            sleep(REPLACE_AFTER).await;
            // Without one the next member's shim is started when it is needed, and says what is wrong.
            let started = launch(&shims.command, SPARE.as_ref(), Stdio::null(), Stdio::null());
            let mut spare = shims.lock();
            spare.ordered = false;
            spare.ready = started.ok();
        });
    }
}

/// The line that tells a spare shim its directory. A path may hold anything but a zero byte.
fn orders(dir: &Path) -> Vec<u8> {
    let mut orders = dir.as_os_str().as_bytes().to_vec();
    orders.push(0);
    orders
}

/// Starts a shim for a directory, with a log file there.
pub(super) fn start_shim(
    command: &[OsString],
    dir: &AttemptDir,
) -> io::Result<(Child, UnixStream)> {
    let log = open_log(dir)?;
    point("shim.log");
    let (child, stream) = launch(command, dir.root(), log.try_clone()?.into(), log.into())?;
    Ok((child, UnixStream::from_std(stream)?))
}

/// The shim's own log.
pub(super) fn open_log(dir: &AttemptDir) -> io::Result<std::fs::File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(dir.shim_log())
}

/// Starts the program in a session of its own, with nothing of the agent's but a few variables.
fn launch(
    command: &[OsString],
    argument: &Path,
    stdout: Stdio,
    stderr: Stdio,
) -> io::Result<(Child, StdStream)> {
    let (program, arguments) = command
        .split_first()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no shim program is set"))?;
    let inherited = INHERITED
        .iter()
        .filter_map(|name| Some((*name, std::env::var_os(name)?)));
    let (ours, theirs) = StdStream::pair()?;
    ours.set_nonblocking(true)?;
    let mut command = tokio::process::Command::new(program);
    command
        .args(arguments)
        .arg(argument)
        .env_clear()
        .envs(inherited)
        .stdin(OwnedFd::from(theirs))
        .stdout(stdout)
        .stderr(stderr)
        .current_dir("/")
        .kill_on_drop(false);
    detach(&mut command);
    let child = command.spawn()?;
    point("shim.forked");
    Ok((child, ours))
}

#[expect(unsafe_code, reason = "code between fork and exec")]
fn detach(command: &mut tokio::process::Command) {
    let blocked = super::shim::blocked_signals();
    // SAFETY: the closure makes system calls only and allocates nothing, so it may run between fork and exec.
    unsafe {
        command.pre_exec(move || {
            super::process::close_others();
            nix::unistd::setsid()?;
            blocked.thread_block()?;
            Ok(())
        });
    }
}
