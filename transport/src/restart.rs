//! Who starts this process again when it kills itself with SIGKILL, as `yard selftest` asks a coordinator or an agent to.
//!
//! Either a service manager does, or a helper: another process of this program that is started first, waits for our death
//! and then becomes what we were. The helper ends without doing anything if we end in any other way. What the helper does
//! after our death is the command line's business; here is how the two agree.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::task::blocking;

/// How long a helper may take until it stands by; it takes milliseconds.
const STAND_BY: Duration = Duration::from_secs(10);
/// What a helper says when it stands by.
const READY: u8 = b'r';
/// What we say last: the end that follows is the one that was meant.
const DYING: u8 = b'd';

/// Who starts this process again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Restart {
    /// The system's or the user's systemd, by the policy of this unit.
    Systemd {
        /// The unit.
        unit: String,
        /// Whether it is one of a user's manager.
        user: bool,
    },
    /// A helper, started with this program and these arguments.
    Helper(Vec<OsString>),
    /// Nobody would; why, and what to do about it.
    Nobody(String),
}

/// Why nobody would start this process again, so that it does not kill itself.
#[derive(Debug, thiserror::Error)]
pub enum RestartError {
    /// It is known from the start.
    #[error("{0}")]
    Nobody(String),
    /// The unit's policy is against it.
    #[error(
        "systemd would not start {unit} again, as it has Restart={policy}; set Restart=on-failure in the unit"
    )]
    Policy {
        /// The unit.
        unit: String,
        /// What it says.
        policy: String,
    },
    /// systemd does not say.
    #[error("cannot ask systemd whether it would start {unit} again")]
    Ask {
        /// The unit.
        unit: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The helper did not start.
    #[error("cannot start the helper that would start this process again")]
    Helper(#[source] io::Error),
}

/// Somebody waits for our death.
#[derive(Debug)]
pub struct StandBy(Option<Helper>);

#[derive(Debug)]
struct Helper {
    line: UnixStream,
    child: Child,
}

impl Drop for Helper {
    fn drop(&mut self) {
        // It hears that we are not going to die.
        let _ = self.line.shutdown(std::net::Shutdown::Both);
        let _ = self.child.wait();
    }
}

impl Restart {
    /// Who it is, for people.
    #[must_use]
    pub fn by(&self) -> String {
        match self {
            Self::Systemd { unit, .. } => format!("systemd ({unit})"),
            Self::Helper(_) => "a helper process".to_owned(),
            Self::Nobody(_) => "nobody".to_owned(),
        }
    }

    /// Whether somebody would start this process again, as far as that can be known beforehand.
    ///
    /// # Errors
    /// Why not.
    pub async fn check(&self) -> Result<(), RestartError> {
        match self.clone() {
            Self::Systemd { unit, user } => blocking(move || ask_systemd(unit, user)).await,
            Self::Helper(_) => Ok(()),
            Self::Nobody(why) => Err(RestartError::Nobody(why)),
        }
    }

    /// Makes sure that somebody waits for our death.
    ///
    /// # Errors
    /// Why nobody does.
    pub async fn stand_by(&self) -> Result<StandBy, RestartError> {
        self.check().await?;
        match self.clone() {
            Self::Helper(command) => {
                let helper = blocking(move || start_helper(&command)).await;
                Ok(StandBy(Some(helper.map_err(RestartError::Helper)?)))
            }
            Self::Systemd { .. } | Self::Nobody(_) => Ok(StandBy(None)),
        }
    }
}

impl StandBy {
    /// Ends this process with SIGKILL.
    ///
    /// # Errors
    /// It did not; the helper is sent home.
    pub fn die(mut self) -> io::Result<()> {
        if let Some(helper) = &mut self.0 {
            helper.line.write_all(&[DYING])?;
        }
        kill(Pid::this(), Signal::SIGKILL)?;
        Ok(())
    }
}

fn start_helper(command: &[OsString]) -> io::Result<Helper> {
    let (program, arguments) = command
        .split_first()
        .ok_or_else(|| io::Error::other("no program is named"))?;
    let (line, theirs) = UnixStream::pair()?;
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()?;
    let mut helper = Helper { line, child };
    helper.line.set_read_timeout(Some(STAND_BY))?;
    let mut said = [0];
    helper.line.read_exact(&mut said)?;
    match said {
        [READY] => Ok(helper),
        _ => Err(io::Error::other("it said something else than expected")),
    }
}

/// The helper's side: says through `line` that it stands by, and waits until the other side is gone. Whether that was the
/// death that it waits for.
///
/// # Errors
/// The line broke, which no death does.
pub fn await_death(line: &mut UnixStream) -> io::Result<bool> {
    line.write_all(&[READY])?;
    let mut last = None;
    let mut said = [0];
    loop {
        match line.read(&mut said) {
            Ok(0) => break,
            Ok(_) => last = Some(said[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The other side died with something unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
            Err(error) => return Err(error),
        }
    }
    Ok(last == Some(DYING))
}

fn ask_systemd(unit: String, user: bool) -> Result<(), RestartError> {
    let mut command = Command::new("systemctl");
    if user {
        command.arg("--user");
    }
    let output = command
        .args(["show", "--property=Restart", "--value", "--", &unit])
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) if output.status.success() => {
            let policy = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            match restarts_after_a_kill(&policy) {
                true => Ok(()),
                false => Err(RestartError::Policy { unit, policy }),
            }
        }
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            let source = io::Error::other(said);
            Err(RestartError::Ask { unit, source })
        }
        Err(source) => Err(RestartError::Ask { unit, source }),
    }
}

/// Whether a unit with this `Restart=` is started again after SIGKILL.
fn restarts_after_a_kill(policy: &str) -> bool {
    matches!(policy, "always" | "on-failure" | "on-abnormal" | "on-abort")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_helper_tells_a_death_that_was_meant_from_any_other_end() {
        for (last, meant) in [
            (&[DYING][..], true),
            (&[][..], false),
            (&[DYING, READY][..], false),
        ] {
            let (mut ours, mut theirs) = UnixStream::pair().unwrap();
            let helper = std::thread::spawn(move || await_death(&mut theirs).unwrap());
            let mut said = [0];
            ours.read_exact(&mut said).unwrap();
            assert_eq!(said, [READY]);
            ours.write_all(last).unwrap();
            drop(ours);
            assert_eq!(helper.join().unwrap(), meant, "{last:?}");
        }
    }

    #[tokio::test]
    async fn what_cannot_be_started_again_is_not_killed() {
        let nobody = Restart::Nobody("it is process 1".to_owned());
        assert!(matches!(
            nobody.stand_by().await,
            Err(RestartError::Nobody(why)) if why == "it is process 1"
        ));
        for command in [vec!["/no/such/program".into()], vec!["true".into()]] {
            let failed = Restart::Helper(command).stand_by().await;
            assert!(matches!(failed, Err(RestartError::Helper(_))), "{failed:?}");
        }
    }

    #[test]
    fn policies_that_cover_a_kill() {
        assert!(restarts_after_a_kill("on-failure") && restarts_after_a_kill("always"));
        for other in ["no", "on-success", "on-watchdog", ""] {
            assert!(!restarts_after_a_kill(other), "{other}");
        }
    }
}
