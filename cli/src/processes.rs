//! Processes that outlive the command that started them: started detached, known by process id and start time, ended by
//! exactly that.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use trainyard_agent::runtime::start_time;
use trainyard_transport::files::PRIVATE_FILE_MODE;

use crate::failure::Failure;
use crate::jobs::POLL;

/// A process that ends on SIGTERM takes far less; then it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// Lines of a log that are shown when its process failed to start.
const TAIL_LINES: usize = 12;

/// One process, told apart from a later one under the same id by when it started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    /// What it is, for people.
    pub(crate) role: String,
    /// Its process id.
    pub(crate) pid: i32,
    /// Clock ticks from the machine's boot to its start.
    pub(crate) started: u64,
}

/// Starts this binary again with other arguments, in a process group of its own, writing to a log.
pub(crate) fn spawn(
    role: &str,
    arguments: &[OsString],
    log: &Path,
) -> Result<(Process, Child), Failure> {
    let program =
        std::env::current_exe().map_err(|error| Failure::io("find the yard program", &error))?;
    let open = || {
        File::options()
            .create(true)
            .append(true)
            .mode(PRIVATE_FILE_MODE)
            .open(log)
            .map_err(|error| Failure::path("write", log, &error))
    };
    let child = Command::new(&program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(open()?)
        .stderr(open()?)
        // Out of the terminal's foreground group: Ctrl-C is for the command, not for the cluster.
        .process_group(0)
        .spawn()
        .map_err(|error| Failure::path("start", &program, &error))?;
    let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
    let process = Process {
        role: role.to_owned(),
        pid,
        started: start_time(pid).unwrap_or(0),
    };
    Ok((process, child))
}

/// Whether some process has this id and is not a zombie.
pub(crate) fn is_alive(pid: i32) -> bool {
    start_time(pid).is_some()
}

impl Process {
    /// Whether it is still the same process that lives.
    pub(crate) fn lives(&self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    /// Ends it: SIGTERM, and SIGKILL if it does not listen.
    pub(crate) async fn stop(&self) -> Result<(), Failure> {
        self.signal(Signal::SIGTERM)?;
        if !self.gone_within(STOP_TIMEOUT).await {
            self.signal(Signal::SIGKILL)?;
            self.gone_within(STOP_TIMEOUT).await;
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) -> Result<(), Failure> {
        if !self.lives() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(nix::Error::ESRCH) => Ok(()),
            Err(error) => Err(Failure::io(
                &format!("end the {} (process {})", self.role, self.pid),
                &error.into(),
            )),
        }
    }

    async fn gone_within(&self, limit: Duration) -> bool {
        let deadline = tokio::time::Instant::now() + limit;
        while self.lives() {
            if tokio::time::Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(POLL).await;
        }
        true
    }
}

/// The last lines of a log, for an error message.
pub(crate) fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let started = start_time(pid).unwrap();
        let own = Process {
            role: "test".into(),
            pid,
            started,
        };
        assert!(own.lives());
        assert!(
            !Process {
                started: started + 1,
                ..own
            }
            .lives()
        );
        assert!(!is_alive(i32::MAX));
    }
}
