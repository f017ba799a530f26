//! How members run on this machine: one directory and one shim process per attempt. This is the agent's side of it;
//! the shim's own side begins in `shim.rs`. Knows nothing of the coordinator, of fetching and of uploading.
//!
//! | File in the attempt directory | Written by | Means |
//! |---|---|---|
//! | the directory itself | agent, in one step | accepted; can happen once |
//! | `member.json` | agent, with it | what is to run |
//! | `shim.lock` | locked by the shim while it lives | free: the shim is gone, whatever a process number says |
//! | `shim.json` | shim, first of all | who it is; for cleaning up after it |
//! | `go.json` | shim, before the first rank | ranks may have been started |
//! | `status.json` | shim; agent, if the shim is gone | the last state; with an ending in it: final |
//!
//! An ending is never made up: without one in `status.json` the exit status of the ranks is unknown, and unknown is not
//! success.

pub mod carrier;
mod cgroup;
mod client;
mod dir;
mod failpoint;
pub(crate) mod footprint;
mod launch;
mod output;
mod peers;
mod pipes;
mod port;
mod process;
mod remove;
pub mod shim;
mod spawn;
mod start;
mod supervise;
mod tree;
mod wait;
mod wire;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::{mpsc, watch};
use trainyard_common::ids::AttemptRef;
use trainyard_common::member::{
    Cleanup, DesiredMember, DesiredPhase, EndCause, Ending, Go, MemberSpec, Stop,
};
use trainyard_common::time::Timestamp;

pub use self::cgroup::usable as usable_cgroup;
pub use self::dir::AttemptDir;
pub use self::process::start_time;
pub use self::shim::shim_main;
#[cfg(test)]
pub(crate) use self::tests::SmallDisk;

use self::client::{Link, Wanted};
use self::start::Shims;
use self::wire::{MemberFile, Settings};
use trainyard_transport::clock::{BootTime, Clock};
use trainyard_transport::task::{blocking, spawn};

/// How a runtime works; fixed for its life.
#[derive(Debug, Clone)]
pub struct RuntimeConfig {
    /// Holds one directory per attempt. Made if it does not exist. With `run_as`, every directory above it must let that
    /// user pass (mode 0711 is enough).
    pub attempts_dir: PathBuf,
    /// The shim program and its first arguments, such as `yard shim`; the attempt's directory is appended.
    pub shim_command: Vec<OsString>,
    /// The user that ranks run as, when the agent may choose (as root); else they run as the agent's user.
    pub run_as: Option<RunAs>,
    /// Bytes of output kept of one rank.
    pub log_limit: u64,
}

/// A user of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunAs {
    /// User number.
    pub uid: u32,
    /// Number of its main group; its other groups are looked up by name.
    pub gid: u32,
    /// Its name.
    pub name: String,
    /// Its home directory.
    pub home: PathBuf,
}

/// The state of a member as its shim knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShimState {
    /// Accepted, and no shim has told of itself yet.
    Accepted,
    /// Waits for go and holds the port.
    Ready {
        /// The rendezvous port.
        port: u16,
    },
    /// The ranks run.
    Running {
        /// When they were started.
        started_at: Timestamp,
    },
    /// What is left of the member is being ended.
    Stopping,
    /// Everything was killed some seconds ago, and this is left all the same. Told again when it changes.
    #[serde(skip)]
    CleanupPending(Cleanup),
    /// No process is left. `outputs` and `checkpoint` are not known here.
    Gone(Ending),
}

/// A member came into a state. States may be skipped, and may be told again after an agent's start; the last one is
/// [`ShimState::Gone`], told once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeEvent {
    /// Whose.
    pub attempt: AttemptRef,
    /// Which.
    pub state: ShimState,
}

/// A member that an earlier agent process accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// The member; its phase is always `Prepare`, as what was wanted later is not kept here.
    pub member: DesiredMember,
    /// Its state. Unless it is `Accepted` or `Gone`, events follow.
    pub state: ShimState,
}

/// Why the runtime refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The attempt was accepted before; nothing was changed.
    #[error("attempt {0} was accepted before")]
    AlreadyAccepted(AttemptRef),
    /// There is no such attempt on this node.
    #[error("attempt {0} is not on this node")]
    NotAccepted(AttemptRef),
    /// The attempt's processes are gone.
    #[error("attempt {0} has ended")]
    Ended(AttemptRef),
    /// No shim was started for it.
    #[error("attempt {0} has no shim")]
    NoShim(AttemptRef),
    /// It cannot be removed while its shim lives.
    #[error("attempt {0} still has a shim")]
    StillRunning(AttemptRef),
    /// Its directory could not be made.
    #[error("attempt {attempt} could not be accepted")]
    Accept {
        /// Which.
        attempt: AttemptRef,
        /// Why.
        source: io::Error,
    },
    /// The shim program could not be started.
    #[error("the shim of attempt {attempt} could not be started")]
    SpawnShim {
        /// Whose.
        attempt: AttemptRef,
        /// Why.
        source: io::Error,
    },
    /// What is known of the attempt could not be read or written.
    #[error("the record of attempt {attempt} could not be read or written")]
    Record {
        /// Whose.
        attempt: AttemptRef,
        /// Why.
        source: io::Error,
    },
    /// Its directory could not be deleted.
    #[error("the directory of attempt {attempt} could not be deleted")]
    Remove {
        /// Whose.
        attempt: AttemptRef,
        /// Why.
        source: io::Error,
    },
    /// The list of attempts could not be read.
    #[error("the attempts in {} could not be listed", dir.display())]
    List {
        /// Where.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The members on this machine. Clones are the same runtime.
#[derive(Debug, Clone)]
pub struct Runtime {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: RuntimeConfig,
    events: mpsc::Sender<RuntimeEvent>,
    clock: Clock,
    /// Attempts whose shim is being followed, and what was asked of it.
    links: Mutex<BTreeMap<AttemptRef, watch::Sender<Wanted>>>,
    /// When the coordinator was last known to hear this node; nothing before this process's first word was answered.
    heard: watch::Sender<Option<BootTime>>,
    shims: Shims,
}

impl Runtime {
    /// A runtime that tells what happens through `events`, which must be read all the time.
    #[must_use]
    pub fn new(config: RuntimeConfig, events: mpsc::Sender<RuntimeEvent>) -> Self {
        let inner = Inner {
            shims: Shims::new(config.shim_command.clone()),
            config,
            events,
            clock: Clock::start(),
            links: Mutex::new(BTreeMap::new()),
            heard: watch::Sender::new(None),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Where an attempt's files lie, whether it is there or not.
    #[must_use]
    pub fn dir(&self, attempt: AttemptRef) -> AttemptDir {
        AttemptDir::new(&self.inner.config.attempts_dir, attempt)
    }

    /// Takes a member on: its directory is complete and on disk when this returns. Only attempt and spec are kept.
    ///
    /// # Errors
    /// The attempt was accepted before, or the disk refuses.
    pub async fn accept(&self, member: &DesiredMember) -> Result<AttemptDir, RuntimeError> {
        let attempt = member.attempt;
        let spec = member.spec.clone();
        let config = self.inner.config.clone();
        blocking(move || create(&config, attempt, spec))
            .await
            .map_err(|source| match source.kind() {
                io::ErrorKind::AlreadyExists => RuntimeError::AlreadyAccepted(attempt),
                _ => RuntimeError::Accept { attempt, source },
            })
    }

    /// Starts the shim of an accepted attempt. Does nothing if one is there. Events follow: `Ready`, or `Gone`.
    ///
    /// # Errors
    /// The attempt is unknown or has ended, or the program cannot be started.
    pub async fn spawn_shim(&self, attempt: AttemptRef) -> Result<(), RuntimeError> {
        let dir = self.known(attempt)?;
        if self.links().contains_key(&attempt) {
            return Ok(());
        }
        let looked = {
            let dir = dir.clone();
            blocking(move || Ok((dir.read_status()?, dir.is_unlocked()?))).await
        };
        let (status, unlocked) =
            looked.map_err(|source| RuntimeError::Record { attempt, source })?;
        if matches!(status, Some(ShimState::Gone(_))) {
            return Err(RuntimeError::Ended(attempt));
        }
        let mut started = None;
        if unlocked {
            let shim = self.inner.shims.start(&dir);
            started = Some(shim.map_err(|source| RuntimeError::SpawnShim { attempt, source })?);
        }
        self.follow(dir, started);
        failpoint::point("shim.followed");
        Ok(())
    }

    /// Starts the ranks, once ever: later calls change nothing. `interface` is the network interface that reaches the
    /// other members. `Running` or `Gone` follows.
    ///
    /// # Errors
    /// The attempt has no shim.
    pub async fn go(
        &self,
        attempt: AttemptRef,
        go: &Go,
        interface: Option<&str>,
    ) -> Result<(), RuntimeError> {
        if let Some(link) = self.links().get(&attempt) {
            link.send_modify(|wanted| {
                wanted
                    .go
                    .get_or_insert_with(|| (go.clone(), interface.map(str::to_owned)));
            });
            return Ok(());
        }
        let dir = self.known(attempt)?;
        match self.read_status(&dir).await? {
            Some(ShimState::Gone(_)) => Err(RuntimeError::Ended(attempt)),
            _ => Err(RuntimeError::NoShim(attempt)),
        }
    }

    /// Ends every process of the attempt; a later call can shorten the grace, not lengthen it. `Gone` follows, also for
    /// an attempt that has not started; nothing follows if it has ended already.
    ///
    /// # Errors
    /// The attempt is unknown, or the disk refuses.
    pub async fn stop(&self, attempt: AttemptRef, stop: &Stop) -> Result<(), RuntimeError> {
        if self.want_stop(attempt, stop) {
            return Ok(());
        }
        let dir = self.known(attempt)?;
        match self.read_status(&dir).await {
            Ok(Some(ShimState::Gone(_))) => return Ok(()),
            // One that is damaged is written anew when the end is known.
            Err(RuntimeError::Record { source, .. }) if client::is_damage(&source) => {}
            status => drop(status?),
        }
        if self.is_unlocked(&dir).await?
            && !dir.shim().exists()
            && self.end_unstarted(dir.clone(), stop).await?
        {
            return Ok(());
        }
        self.follow(dir, None);
        self.want_stop(attempt, stop);
        Ok(())
    }

    /// The coordinator has acknowledged what was sent at this time: members with leases may live on from then for as
    /// long as their leases are. Earlier times than one before change nothing.
    pub fn renew(&self, sent: BootTime) {
        self.inner.heard.send_if_modified(|heard| {
            let later = heard.is_none_or(|heard| heard < sent);
            if later {
                *heard = Some(sent);
            }
            later
        });
    }

    /// Finds what an earlier process of this agent left, and follows what lives. To be called once, before anything
    /// else. Directories that cannot be understood are logged and left alone.
    ///
    /// # Errors
    /// The attempts cannot be listed.
    pub async fn recover(&self) -> Result<Vec<Recovered>, RuntimeError> {
        let dir = self.inner.config.attempts_dir.clone();
        let listed = {
            let dir = dir.clone();
            blocking(move || Ok((dir::boot_id()?, client::list(&dir)?))).await
        };
        let (boot_id, found) = listed.map_err(|source| RuntimeError::List { dir, source })?;
        let mut recovered = Vec::new();
        for dir in found {
            let attempt = dir.attempt();
            match self.recover_one(dir, &boot_id).await {
                Ok(one) => recovered.push(one),
                Err(error) => tracing::error!(
                    attempt = %attempt,
                    error = &error as &dyn std::error::Error,
                    "the directory of an attempt cannot be read and is left alone"
                ),
            }
        }
        Ok(recovered)
    }

    /// Deletes the directory of an attempt whose processes are gone. Does nothing if it is not there.
    ///
    /// # Errors
    /// Its shim lives, it has neither ended nor never begun, or something in it cannot be deleted (what is left is tried
    /// again at the next start).
    pub async fn remove(&self, attempt: AttemptRef) -> Result<(), RuntimeError> {
        let dir = self.dir(attempt);
        if !dir.root().exists() {
            return Ok(());
        }
        if self.links().contains_key(&attempt) || !self.is_unlocked(&dir).await? {
            return Err(RuntimeError::StillRunning(attempt));
        }
        let ended = matches!(self.read_status(&dir).await?, Some(ShimState::Gone(_)));
        if !ended && dir.shim().exists() {
            return Err(RuntimeError::StillRunning(attempt));
        }
        let attempts = self.inner.config.attempts_dir.clone();
        blocking(move || client::remove(&attempts, &dir))
            .await
            .map_err(|source| RuntimeError::Remove { attempt, source })
    }

    fn links(&self) -> MutexGuard<'_, BTreeMap<AttemptRef, watch::Sender<Wanted>>> {
        self.inner
            .links
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, attempt: AttemptRef) -> Result<AttemptDir, RuntimeError> {
        let dir = self.dir(attempt);
        if dir.member().exists() {
            Ok(dir)
        } else {
            Err(RuntimeError::NotAccepted(attempt))
        }
    }

    fn want_stop(&self, attempt: AttemptRef, stop: &Stop) -> bool {
        let links = self.links();
        let link = links.get(&attempt);
        if let Some(link) = link {
            link.send_modify(|wanted| wanted.stop = Some(*stop));
        }
        link.is_some()
    }

    async fn read_status(&self, dir: &AttemptDir) -> Result<Option<ShimState>, RuntimeError> {
        let attempt = dir.attempt();
        let dir = dir.clone();
        let record = |source| RuntimeError::Record { attempt, source };
        blocking(move || dir.read_status()).await.map_err(record)
    }

    async fn is_unlocked(&self, dir: &AttemptDir) -> Result<bool, RuntimeError> {
        let attempt = dir.attempt();
        let dir = dir.clone();
        let record = |source| RuntimeError::Record { attempt, source };
        blocking(move || dir.is_unlocked()).await.map_err(record)
    }

    /// Follows the attempt's shim until it is gone.
    fn follow(&self, dir: AttemptDir, started: Option<(Child, UnixStream)>) {
        let attempt = dir.attempt();
        let (link, wanted) = watch::channel(Wanted::default());
        if self.links().insert(attempt, link).is_some() {
            // The earlier follower notices that nobody can reach it and leaves.
            tracing::warn!(attempt = %attempt, "an attempt was followed twice");
        }
        let runtime = self.clone();
        let (child, first) = started.unzip();
        spawn("member", async move {
            let clock = runtime.inner.clock;
            let link = Link {
                dir,
                child,
                first,
                wanted,
                heard: runtime.inner.heard.subscribe(),
                clock,
                events: runtime.inner.events.clone(),
            };
            let ending = link.follow().await;
            runtime.links().remove(&attempt);
            if let Some(ending) = ending {
                runtime.tell(attempt, ShimState::Gone(ending)).await;
            }
        });
    }

    async fn tell(&self, attempt: AttemptRef, state: ShimState) {
        let event = RuntimeEvent { attempt, state };
        // Fails when the agent is on its way out; the state is on disk and found again.
        let _ = self.inner.events.send(event).await;
    }

    /// Whether it did: not if a shim came meanwhile.
    async fn end_unstarted(&self, dir: AttemptDir, stop: &Stop) -> Result<bool, RuntimeError> {
        let attempt = dir.attempt();
        let message = supervise::stop_message(stop);
        let state = self.unstarted(EndCause::Stopped, message);
        let ended = {
            let state = state.clone();
            blocking(move || client::end_unstarted(&dir, &state)).await
        };
        if !ended.map_err(|source| RuntimeError::Record { attempt, source })? {
            return Ok(false);
        }
        let runtime = self.clone();
        // The caller may be the one who reads the events, so it must not wait for that.
        spawn("ending", async move { runtime.tell(attempt, state).await });
        Ok(true)
    }

    fn unstarted(&self, cause: EndCause, message: String) -> ShimState {
        ShimState::Gone(Ending {
            cause,
            message,
            started: false,
            ranks: Vec::new(),
            ended_at: self.inner.clock.now(),
            outputs: None,
            checkpoint: None,
            warning: String::new(),
        })
    }

    async fn write_status(&self, dir: &AttemptDir, state: &ShimState) -> Result<(), RuntimeError> {
        let attempt = dir.attempt();
        let (dir, state) = (dir.clone(), state.clone());
        blocking(move || dir.write_status(&state))
            .await
            .map_err(|source| RuntimeError::Record { attempt, source })
    }

    async fn recover_one(&self, dir: AttemptDir, boot_id: &str) -> Result<Recovered, RuntimeError> {
        let attempt = dir.attempt();
        let record = |source| RuntimeError::Record { attempt, source };
        let file = {
            let dir = dir.clone();
            blocking(move || match client::read_member(&dir) {
                // Where nothing but a name is left, nothing tells that it is ours.
                Err(error)
                    if error.kind() == io::ErrorKind::InvalidData
                        || client::is_damage(&error) && dir.shim().exists() =>
                {
                    let spec = client::bare_spec(&dir);
                    Ok((None, spec, Some(error)))
                }
                result => result.map(|file| (Some(file.settings), file.spec, None)),
            })
            .await
        };
        let (settings, spec, error) = file.map_err(record)?;
        let state = match settings {
            Some(settings) => self.recover_state(dir, &settings, &spec, boot_id).await?,
            None => self.recover_unreadable(dir, error).await?,
        };
        let member = DesiredMember {
            attempt,
            phase: DesiredPhase::Prepare,
            spec,
        };
        Ok(Recovered { member, state })
    }

    /// Of a member without a record: what its shim told last, or tells now.
    async fn recover_unreadable(
        &self,
        dir: AttemptDir,
        error: Option<io::Error>,
    ) -> Result<ShimState, RuntimeError> {
        let attempt = dir.attempt();
        let error = error.map(|error| error.to_string());
        tracing::error!(%attempt, error, "what an attempt was accepted for cannot be read; it is never started again");
        let status = self.read_status(&dir).await.ok().flatten();
        let unlocked = self.is_unlocked(&dir).await?;
        if let (Some(ShimState::Gone(_)), true) = (&status, unlocked) {
            return Ok(status.unwrap_or(ShimState::Stopping));
        }
        self.follow(dir, None);
        Ok(match status {
            Some(ShimState::Gone(_)) | None => ShimState::Stopping,
            Some(state) if unlocked => {
                tracing::debug!(%attempt, ?state, "its shim is dead");
                ShimState::Stopping
            }
            Some(state) => state,
        })
    }

    async fn recover_state(
        &self,
        dir: AttemptDir,
        settings: &Settings,
        spec: &MemberSpec,
        boot_id: &str,
    ) -> Result<ShimState, RuntimeError> {
        // A status that cannot be read says nothing, and nothing is never an ending.
        let status = match self.read_status(&dir).await {
            Ok(status) => status,
            Err(error) => {
                tracing::error!(
                    attempt = %dir.attempt(),
                    error = &error as &dyn std::error::Error,
                    "the state of an attempt cannot be read"
                );
                None
            }
        };
        if let Some(ShimState::Gone(_)) = &status
            && self.is_unlocked(&dir).await?
        {
            return Ok(status.unwrap_or(ShimState::Accepted));
        }
        if settings.boot_id != boot_id {
            let now = self.inner.clock.now();
            let state = ShimState::Gone(client::rebooted_ending(&dir, spec, now));
            self.write_status(&dir, &state).await?;
            return Ok(state);
        }
        if !self.is_unlocked(&dir).await? {
            self.follow(dir, None);
            // An ending is told once it is certain, so by an event.
            return Ok(match status {
                Some(ShimState::Gone(_)) => ShimState::Stopping,
                Some(state) => state,
                None => ShimState::Accepted,
            });
        }
        if !dir.shim().exists() {
            return Ok(ShimState::Accepted);
        }
        // The shim is dead; what is left of the member is ended, and then its ending told.
        self.follow(dir, None);
        Ok(ShimState::Stopping)
    }
}

fn create(config: &RuntimeConfig, attempt: AttemptRef, spec: MemberSpec) -> io::Result<AttemptDir> {
    use std::os::unix::fs::DirBuilderExt;
    let settings = Settings {
        boot_id: dir::boot_id()?,
        key: dir::random_hex(16)?,
        log_limit: config.log_limit,
        run_as: config.run_as.clone(),
    };
    let mode = if config.run_as.is_some() {
        0o711
    } else {
        0o700
    };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(&config.attempts_dir)?;
    let scratch = dir::random_hex(8)?;
    let member = MemberFile {
        attempt,
        spec,
        settings,
    };
    AttemptDir::create(&config.attempts_dir, &scratch, &member)
}

#[cfg(test)]
mod tests;
