//! Processes that a supervisor keeps running, as an init system would: one that ends is started again. What they write
//! goes to a file each.

use std::fs::OpenOptions;
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::ledger::boot_clock;
use super::rest;

/// Time before one that ended by itself is started again.
const RESTART_AFTER: Duration = Duration::from_millis(500);

/// One supervised process.
pub(crate) struct Daemon {
    name: String,
    log: PathBuf,
    command: Box<dyn Fn() -> Command + Send + Sync>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    child: Option<Child>,
    /// When it is to be started; never means it shall not run.
    start: Option<Instant>,
    kills: Vec<Kill>,
    own_ends: Vec<String>,
}

/// One `kill -9`, by the boot clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kill {
    pub(crate) at: Duration,
    /// When it was started again; nothing if it was not.
    pub(crate) started: Option<Duration>,
}

impl std::fmt::Debug for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Daemon")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Daemon {
    /// One that does not run yet.
    pub(crate) fn new(
        name: &str,
        log: PathBuf,
        command: impl Fn() -> Command + Send + Sync + 'static,
    ) -> Self {
        let state = Mutex::default();
        Self {
            name: name.to_owned(),
            log,
            command: Box::new(command),
            state,
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn log(&self) -> &std::path::Path {
        &self.log
    }

    /// Starts it at once, under supervision if [`supervise`] runs.
    pub(crate) fn start(&self) -> io::Result<()> {
        let mut state = self.state();
        state.child = Some(self.spawn()?);
        state.start = Some(Instant::now());
        Ok(())
    }

    fn spawn(&self) -> io::Result<Child> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)?;
        (self.command)()
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
    }

    /// `kill -9`; started again after the pause.
    pub(crate) fn kill(&self, pause: Duration) {
        let mut state = self.state();
        if let Some(mut child) = state.child.take() {
            let _ = child.kill();
            let _ = child.wait();
            state.kills.push(Kill {
                at: boot_clock(),
                started: None,
            });
        }
        state.start = Some(Instant::now() + pause);
    }

    /// Sends a signal, if it runs.
    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(child) = &self.state().child {
            crate::end(child.id().cast_signed(), signal);
        }
    }

    /// Its process id, if it runs.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.state().child.as_ref().map(Child::id)
    }

    /// Ends it for good.
    pub(crate) fn end(&self) {
        let mut state = self.state();
        state.start = None;
        if let Some(mut child) = state.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// The kills so far.
    pub(crate) fn kills(&self) -> Vec<Kill> {
        self.state().kills.clone()
    }

    /// Ends that nobody asked for.
    pub(crate) fn own_ends(&self) -> Vec<String> {
        self.state().own_ends.clone()
    }

    fn look_after(&self) {
        let mut state = self.state();
        let ended: Option<ExitStatus> = state
            .child
            .as_mut()
            .and_then(|child| child.try_wait().ok().flatten());
        if let Some(status) = ended {
            state.child = None;
            state.start = Some(Instant::now() + RESTART_AFTER);
            state.own_ends.push(status.to_string());
        }
        if state.child.is_none() && state.start.is_some_and(|start| start <= Instant::now()) {
            // What cannot be started now is tried again in the next round.
            state.child = self.spawn().ok();
            if let Some(kill) = state.kills.last_mut().filter(|kill| kill.started.is_none()) {
                kill.started = Some(boot_clock());
            }
        }
    }
}

/// Keeps processes running until told to stop.
pub(crate) fn supervise<'a>(daemons: impl Iterator<Item = &'a Daemon> + Clone, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        daemons.clone().for_each(Daemon::look_after);
        rest(Duration::from_millis(10));
    }
}
