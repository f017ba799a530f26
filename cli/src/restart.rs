//! Who starts a role of this process again after a self test has killed it, and the helper that does it where no service
//! manager would: it waits for the role's death and becomes what that was, with the same command line, directory,
//! environment and output. It must not know why a role is killed.

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::{Pid, getpid, getppid, setsid};
use trainyard_agent::runtime::start_time;
use trainyard_transport::restart::{Restart, await_death};

use crate::jobs::POLL;
use crate::local::LocalCluster;
use crate::output;
use crate::processes::Process;

/// The hidden command that a role starts before it kills itself.
pub(crate) const REVIVE: &str = "revive";
/// How long a killed process may take until the kernel has taken it down; what has gigabytes in memory takes a while.
const DEATH_TIMEOUT: Duration = Duration::from_secs(60);

/// Who starts this process again. `arguments` are those of the role, without the program; `cluster` is where a cluster on
/// this machine would keep the list of its processes.
pub(crate) fn of_this_process(arguments: Vec<OsString>, cluster: Option<&Path>) -> Restart {
    let pid = getpid();
    if pid == Pid::from_raw(1) {
        let why = "it is process 1 of its container, which ends with it; end the container instead";
        return Restart::Nobody(why.to_owned());
    }
    if let Some(unit) = systemd_unit(pid) {
        return unit;
    }
    match std::env::current_exe() {
        Ok(program) => {
            let cluster = cluster.map(OsString::from).unwrap_or_default();
            let mut command = vec![program.into(), REVIVE.into(), cluster];
            command.extend(arguments);
            Restart::Helper(command)
        }
        Err(error) => Restart::Nobody(format!("cannot find out which program this is: {error}")),
    }
}

/// The systemd unit whose main process this is. What a unit's process starts inherits the variable, but not the number.
fn systemd_unit(pid: Pid) -> Option<Restart> {
    let main: i32 = std::env::var("SYSTEMD_EXEC_PID").ok()?.parse().ok()?;
    if main != pid.as_raw() {
        return None;
    }
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let (unit, user) = unit_of(&groups)?;
    Some(Restart::Systemd { unit, user })
}

/// The unit in the text of `/proc/self/cgroup`, and whether it is one of a user's manager.
fn unit_of(groups: &str) -> Option<(String, bool)> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let unit = path
        .split('/')
        .rev()
        .find(|part| part.ends_with(".service"))?;
    let user = path
        .split('/')
        .any(|part| part.starts_with("user@") && part != unit);
    Some((unit.to_owned(), user))
}

/// The helper. `arguments` are the cluster's directory (or nothing) and the role's own arguments. Its standard input is the
/// line to the role.
pub(crate) fn revive(arguments: &[OsString]) -> ExitCode {
    match wait_and_become(arguments) {
        Ok(code) => code,
        Err(error) => {
            output::error(&format!("cannot start again what was killed: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn wait_and_become(arguments: &[OsString]) -> io::Result<ExitCode> {
    let Some((cluster, command)) = arguments.split_first() else {
        return Err(io::Error::other("this command is started by others only"));
    };
    let role = getppid().as_raw();
    let started = start_time(role).unwrap_or(0);
    // Out of the role's terminal and process group, which may be told to end with it. It leads no group yet.
    setsid()?;
    let mut line = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    if !await_death(&mut line)? {
        return Ok(ExitCode::SUCCESS);
    }
    drop(line);
    // Its end of the line may be closed before its locks are.
    let deadline = Instant::now() + DEATH_TIMEOUT;
    while start_time(role) == Some(started) && Instant::now() < deadline {
        pause();
    }
    if !cluster.is_empty() {
        take_its_place(Path::new(cluster), (role, started));
    }
    let failed = Command::new(std::env::current_exe()?)
        .args(command)
        .stdin(Stdio::null())
        .exec();
    Err(failed)
}

/// So that `yard down` finds it. A cluster that lists nothing of the kind is none of `yard up`.
fn take_its_place(cluster: &Path, before: (i32, u64)) {
    let pid = getpid().as_raw();
    let now = Process {
        role: String::new(),
        pid,
        started: start_time(pid).unwrap_or(0),
    };
    if let Err(failure) = LocalCluster::new(cluster.to_owned()).replace(before, now) {
        output::warning(&failure.message);
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the helper has no runtime and waits for a process that is not its child"
)]
fn pause() {
    std::thread::sleep(POLL);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_found_in_both_managers() {
        let unit = |text: &str| unit_of(text);
        assert_eq!(
            unit("0::/system.slice/yard-coordinator.service\n"),
            Some(("yard-coordinator.service".to_owned(), false))
        );
        assert_eq!(
            unit("0::/user.slice/user-1.slice/user@1.service/app.slice/yard.service/x\n"),
            Some(("yard.service".to_owned(), true))
        );
        assert_eq!(unit("0::/user.slice/user-1.slice/session-2.scope\n"), None);
        assert_eq!(unit("1:cpu:/x.service\n"), None);
    }

    #[test]
    fn the_helper_is_this_program_with_the_roles_own_arguments() {
        let arguments: Vec<OsString> = ["coordinator", "run"].map(Into::into).to_vec();
        let Restart::Helper(command) = of_this_process(arguments, Some(Path::new("/x"))) else {
            panic!("a test is neither process 1 nor a service");
        };
        assert_eq!(command[1..], ["revive", "/x", "coordinator", "run"]);
    }
}
