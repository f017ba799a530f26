//! The agent's side of carriers: makes the directories of bundles, starts their carriers, tells them what is wanted, and
//! cleans up after those that died. What is in a journal is for the reader of it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use trainyard_common::bundle::{BundlePhase, DesiredBundle};
use trainyard_common::ids::BundleRef;
use trainyard_common::member::{MemberSpec, Stop};
use trainyard_common::state::ReasonCode;
use trainyard_transport::clock::Clock;
use trainyard_transport::task::{blocking, spawn};

use super::super::client::{connect, is_unlocked};
use super::super::dir::{boot_id, random_hex};
use super::super::failpoint::point;
use super::super::remove::{named_directories, remove_whole};
use super::super::start::start_shim;
use super::super::wire::{Lines, line};
use super::journal::{Gap, Journal};
use super::settle::{Settled, read_record, settle};
use super::{BundleDir, BundleFile, RunAs};

/// Pauses between looks at something that is about to happen.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A carrier that has said nothing by then is killed; a machine under heavy load may need seconds.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// A carrier that does not take a line for so long is not listening; the connection is made anew.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// One line from carrier to agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Told {
    /// Bytes of whole records in the journal.
    pub(crate) journal: u64,
}

/// How carriers work; fixed for the life of the agent.
#[derive(Debug, Clone)]
pub struct CarrierConfig {
    /// Holds one directory per bundle. Made if it does not exist. With `run_as`, every directory above it must let that
    /// user pass.
    pub bundles_dir: PathBuf,
    /// The shim program and its first arguments, such as `yard shim`; the bundle's directory is appended.
    pub shim_command: Vec<OsString>,
    /// The user that tasks run as, when the agent may choose (as root); else they run as the agent's user.
    pub run_as: Option<RunAs>,
    /// Bytes of output kept of one task.
    pub log_limit: u64,
    /// How long a task may wait for a slot; see [`super::RETURN_AFTER`].
    pub return_after: Duration,
}

/// News of a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CarrierEvent {
    /// Of which one.
    pub bundle: BundleRef,
    /// What.
    pub state: CarrierState,
}

/// Where a carrier is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CarrierState {
    /// It listens, and its journal has so many bytes.
    Running {
        /// Bytes of whole records.
        journal: u64,
    },
    /// Nothing of the bundle is left, and its journal is complete. May be told again, with a longer journal, if tasks were
    /// handed out afterwards: they are given back.
    Over {
        /// Bytes of whole records.
        journal: u64,
    },
}

/// A bundle that an earlier agent process accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveredBundle {
    /// Which one.
    pub bundle: BundleRef,
    /// How its tasks are started.
    pub spec: MemberSpec,
    /// Its carrier.
    pub carrier: RecoveredCarrier,
}

/// What is known of the carrier of a recovered bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecoveredCarrier {
    /// There never was one.
    None,
    /// There was one; it may live. It is followed with the first [`Carriers::direct`].
    Started,
    /// Its journal is complete.
    Over {
        /// Bytes of whole records.
        journal: u64,
    },
}

/// Why something could not be done with a bundle.
#[derive(Debug, thiserror::Error)]
pub enum CarrierError {
    /// The bundle was accepted before; nothing was changed.
    #[error("bundle {0} was accepted before")]
    AlreadyAccepted(BundleRef),
    /// It cannot be removed while its carrier lives.
    #[error("bundle {0} still has a shim")]
    StillRunning(BundleRef),
    /// Its directory could not be made.
    #[error("bundle {bundle} could not be accepted")]
    Accept {
        /// Which.
        bundle: BundleRef,
        /// Why.
        source: io::Error,
    },
    /// The shim program could not be started.
    #[error("the shim of bundle {bundle} could not be started")]
    Spawn {
        /// Whose.
        bundle: BundleRef,
        /// Why.
        source: io::Error,
    },
    /// Its directory could not be deleted.
    #[error("the directory of bundle {bundle} could not be deleted")]
    Remove {
        /// Whose.
        bundle: BundleRef,
        /// Why.
        source: io::Error,
    },
    /// The list of bundles could not be read.
    #[error("the bundles in {} could not be listed", dir.display())]
    List {
        /// Where.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The bundles on this machine. Clones are the same.
#[derive(Debug, Clone)]
pub struct Carriers {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: CarrierConfig,
    events: mpsc::Sender<CarrierEvent>,
    clock: Clock,
    /// What is wanted of each bundle that is followed.
    links: Mutex<BTreeMap<BundleRef, watch::Sender<Wanted>>>,
}

/// What is wanted of a bundle.
#[derive(Debug, Clone)]
struct Wanted {
    desired: Arc<DesiredBundle>,
    /// Why it is to be ended without a carrier, if it is.
    ended: Option<String>,
}

impl Carriers {
    /// Carriers that tell news through `events`, which must be read all the time.
    #[must_use]
    pub fn new(config: CarrierConfig, events: mpsc::Sender<CarrierEvent>) -> Self {
        let inner = Inner {
            config,
            events,
            clock: Clock::start(),
            links: Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Where a bundle's files lie, whether it is there or not.
    #[must_use]
    pub fn dir(&self, bundle: BundleRef) -> BundleDir {
        BundleDir::new(&self.inner.config.bundles_dir, bundle)
    }

    /// Takes a bundle on: its directory is complete and on disk when this returns.
    ///
    /// # Errors
    /// It was accepted before, or the disk refuses.
    pub async fn accept(&self, bundle: BundleRef, spec: MemberSpec) -> Result<(), CarrierError> {
        let config = self.inner.config.clone();
        blocking(move || create(&config, bundle, spec))
            .await
            .map_err(|source| match source.kind() {
                io::ErrorKind::AlreadyExists => CarrierError::AlreadyAccepted(bundle),
                _ => CarrierError::Accept { bundle, source },
            })
    }

    /// Starts the one carrier of an accepted bundle, and follows it. News follow; the last is that it is over.
    ///
    /// # Errors
    /// The program cannot be started; there is no carrier then.
    pub fn spawn(&self, desired: &DesiredBundle) -> Result<(), CarrierError> {
        let bundle = desired.bundle;
        let shim = self.dir(bundle).shim();
        let started = start_shim(&self.inner.config.shim_command, &shim)
            .map_err(|source| CarrierError::Spawn { bundle, source })?;
        self.follow(desired, None, Some(started));
        Ok(())
    }

    /// Says what is wanted now. Follows a bundle that an earlier agent process left, or that is over already: then what is
    /// new is given back.
    pub fn direct(&self, desired: &DesiredBundle) {
        if !self.tell(desired, None) {
            self.follow(desired, None, None);
        }
    }

    /// Ends a bundle that has no carrier, because of `why`: all tasks are given back. That it is over follows.
    pub fn end(&self, desired: &DesiredBundle, why: &str) {
        if !self.tell(desired, Some(why)) {
            self.follow(desired, Some(why), None);
        }
    }

    /// Finds what an earlier process of this agent left. To be called once, before anything else. Directories that cannot
    /// be understood are logged and left alone.
    ///
    /// # Errors
    /// The bundles cannot be listed.
    pub async fn recover(&self) -> Result<Vec<RecoveredBundle>, CarrierError> {
        let dir = self.inner.config.bundles_dir.clone();
        let found = {
            let dir = dir.clone();
            blocking(move || recover(&dir)).await
        };
        found.map_err(|source| CarrierError::List { dir, source })
    }

    /// Deletes the directory of a bundle that is over, or has no carrier. Does nothing if it is not there.
    ///
    /// # Errors
    /// Its carrier lives, or something in it cannot be deleted.
    pub async fn remove(&self, bundle: BundleRef) -> Result<(), CarrierError> {
        let dir = self.dir(bundle);
        if dir.root().exists() && !is_unlocked(&dir.shim()).await {
            return Err(CarrierError::StillRunning(bundle));
        }
        // Its follower leaves.
        self.links().remove(&bundle);
        let bundles = self.inner.config.bundles_dir.clone();
        blocking(move || remove_whole(&bundles, dir.root()))
            .await
            .map_err(|source| CarrierError::Remove { bundle, source })
    }

    fn links(&self) -> MutexGuard<'_, BTreeMap<BundleRef, watch::Sender<Wanted>>> {
        let links = &self.inner.links;
        links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a follower to tell it.
    fn tell(&self, desired: &DesiredBundle, why: Option<&str>) -> bool {
        let links = self.links();
        let link = links.get(&desired.bundle);
        if let Some(link) = link {
            link.send_modify(|wanted| {
                wanted.desired = Arc::new(bare(desired));
                wanted.ended = wanted.ended.take().or(why.map(str::to_owned));
            });
        }
        link.is_some()
    }

    fn follow(
        &self,
        desired: &DesiredBundle,
        why: Option<&str>,
        started: Option<(Child, UnixStream)>,
    ) {
        let bundle = desired.bundle;
        let (link, wanted) = watch::channel(Wanted {
            desired: Arc::new(bare(desired)),
            ended: why.map(str::to_owned),
        });
        self.links().insert(bundle, link);
        let (child, first) = started.unzip();
        let link = Link {
            dir: self.dir(bundle),
            child,
            first,
            wanted,
            clock: self.inner.clock,
            events: self.inner.events.clone(),
        };
        spawn("bundle", link.follow());
    }
}

/// Without what a carrier has in its own file.
fn bare(desired: &DesiredBundle) -> DesiredBundle {
    DesiredBundle {
        spec: None,
        ..desired.clone()
    }
}

impl Wanted {
    /// What a carrier is told: one that is found although its bundle is to be ended without one is to end at once.
    fn orders(&self) -> Arc<DesiredBundle> {
        if self.ended.is_none() || matches!(self.desired.phase, BundlePhase::Stop(_)) {
            return self.desired.clone();
        }
        Arc::new(DesiredBundle {
            phase: BundlePhase::Stop(Stop {
                code: ReasonCode::PrepareFailed,
                grace: Duration::ZERO,
            }),
            ..DesiredBundle::clone(&self.desired)
        })
    }
}

/// What came of closing a bundle's books.
#[derive(Debug, Clone, Copy)]
enum Heard {
    /// They are closed, with so many bytes.
    Over(u64),
    /// There is a carrier after all.
    Carrier,
}

/// One carrier, from its start to the removal of its bundle.
#[derive(Debug)]
struct Link {
    dir: BundleDir,
    /// The process, if this agent started it, and its first connection.
    child: Option<Child>,
    first: Option<UnixStream>,
    wanted: watch::Receiver<Wanted>,
    clock: Clock,
    events: mpsc::Sender<CarrierEvent>,
}

impl Link {
    async fn follow(mut self) {
        loop {
            while let Some(stream) = self.next_stream().await {
                self.converse(stream).await;
                if self.is_dismissed() {
                    return;
                }
            }
            if let Some(child) = &mut self.child {
                let _ = timeout(START_TIMEOUT, child.wait()).await;
            }
            match self.settle().await {
                None => return,
                // It must be told, and to end if that is wanted: nobody else will.
                Some(Heard::Carrier) => continue,
                Some(Heard::Over(journal)) => self.tell(CarrierState::Over { journal }).await,
            }
            // Tasks may have been on their way meanwhile.
            tokio::select! {
                biased;
                // Cancel-safe: only tells that there is something.
                changed = self.wanted.changed() => if changed.is_err() {
                    return;
                },
                // Cancel-safe: takes nothing.
                () = self.events.closed() => return,
            }
        }
    }

    fn is_dismissed(&self) -> bool {
        self.events.is_closed() || self.wanted.has_changed().is_err()
    }

    async fn tell(&self, state: CarrierState) {
        let bundle = self.dir.bundle();
        // Fails when the agent is on its way out; all is on disk and found again.
        let _ = self.events.send(CarrierEvent { bundle, state }).await;
    }

    /// The connection that the carrier was started with, or a new one; nothing if there is no carrier.
    async fn next_stream(&mut self) -> Option<UnixStream> {
        if let Some(stream) = self.first.take() {
            return Some(stream);
        }
        let mut pause = FIRST_PAUSE;
        let since = Instant::now();
        loop {
            let shim = self.dir.shim();
            if self.wanted.borrow().ended.is_some() && is_unlocked(&shim).await {
                return None;
            }
            if let Ok(stream) = connect(&shim).await {
                return Some(stream);
            }
            if self.is_dismissed() || (self.is_dead() && is_unlocked(&shim).await) {
                return None;
            }
            if since.elapsed() > START_TIMEOUT {
                self.kill_deaf();
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn is_dead(&mut self) -> bool {
        match &mut self.child {
            Some(child) => !matches!(child.try_wait(), Ok(None)),
            None => true,
        }
    }

    fn kill_deaf(&mut self) {
        if let Some(child) = &mut self.child {
            tracing::warn!(bundle = %self.dir.bundle(), "a carrier does not speak and is killed");
            let _ = child.start_kill();
        }
    }

    /// Passes on what is said until the connection ends.
    async fn converse(&mut self, stream: UnixStream) {
        let (mut reader, mut writer) = stream.into_split();
        let mut lines = Lines::default();
        let mut buffer = vec![0; 4096];
        let mut sent: Option<Arc<DesiredBundle>> = None;
        let deaf_at = Instant::now() + START_TIMEOUT;
        let mut silent = true;
        loop {
            let desired = self.wanted.borrow_and_update().orders();
            if sent.as_ref() != Some(&desired) {
                let Ok(line) = line(&*desired) else {
                    return;
                };
                point("bundle.telling");
                if !matches!(
                    timeout(SEND_TIMEOUT, writer.write_all(&line)).await,
                    Ok(Ok(()))
                ) {
                    return;
                }
                point("bundle.told");
                sent = Some(desired);
            }
            tokio::select! {
                biased;
                // Cancel-safe: a read that does not complete has taken nothing.
                read = reader.read(&mut buffer) => match read {
                    Ok(0) | Err(_) => return,
                    Ok(length) => {
                        silent = false;
                        lines.push(&buffer[..length]);
                        if let Err(error) = self.take(&mut lines).await {
                            tracing::warn!(
                                bundle = %self.dir.bundle(),
                                error = &error as &dyn std::error::Error,
                                "a carrier was not understood"
                            );
                            return;
                        }
                    }
                },
                // Cancel-safe: only tells that there is something, and what is taken at the top of the loop.
                changed = self.wanted.changed() => if changed.is_err() {
                    return;
                },
                // Cancel-safe: takes nothing. The agent that this belonged to is no more.
                () = self.events.closed() => return,
                // Cancel-safe: only waits. The connection ends with the carrier.
                () = sleep_until(deaf_at), if silent => {
                    silent = false;
                    self.kill_deaf();
                }
            }
        }
    }

    /// Only the newest line counts.
    async fn take(&self, lines: &mut Lines) -> io::Result<()> {
        let mut newest = None;
        while let Some(line) = lines.take()? {
            newest = Some(line);
        }
        if let Some(line) = newest {
            let Told { journal } = serde_json::from_slice(&line)?;
            self.tell(CarrierState::Running { journal }).await;
        }
        Ok(())
    }

    /// Closes the bundle's books, however long that takes, unless a carrier is found to have them. Nothing if nobody wants
    /// to know.
    async fn settle(&mut self) -> Option<Heard> {
        let mut pause = FIRST_PAUSE;
        loop {
            if self.is_dismissed() {
                return None;
            }
            let wanted = self.wanted.borrow_and_update().clone();
            let (dir, now) = (self.dir.clone(), self.clock.now());
            let settled =
                blocking(move || settle(&dir, &wanted.desired, wanted.ended.as_deref(), now));
            match settled.await {
                Ok(Settled::Over(journal)) => return Some(Heard::Over(journal)),
                Ok(Settled::Carried) => return Some(Heard::Carrier),
                Ok(Settled::NotYet) => {}
                Err(error) => tracing::error!(
                    bundle = %self.dir.bundle(),
                    error = &error as &dyn std::error::Error,
                    "the end of a bundle cannot be recorded yet"
                ),
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

fn create(config: &CarrierConfig, bundle: BundleRef, spec: MemberSpec) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let file = BundleFile {
        bundle,
        spec,
        boot_id: boot_id()?,
        key: random_hex(16)?,
        log_limit: config.log_limit,
        run_as: config.run_as.clone(),
        return_after: config.return_after,
    };
    let mode = if config.run_as.is_some() {
        0o711
    } else {
        0o700
    };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(&config.bundles_dir)?;
    BundleDir::create(&config.bundles_dir, &file).map(drop)
}

fn recover(bundles: &std::path::Path) -> io::Result<Vec<RecoveredBundle>> {
    let mut found = Vec::new();
    for bundle in named_directories::<BundleRef>(bundles)? {
        match recover_one(&BundleDir::new(bundles, bundle)) {
            Ok(one) => found.push(one),
            Err(error) => tracing::error!(
                %bundle,
                error = &error as &dyn std::error::Error,
                "the directory of a bundle cannot be read and is left alone"
            ),
        }
    }
    Ok(found)
}

fn recover_one(dir: &BundleDir) -> io::Result<RecoveredBundle> {
    let file = read_record(dir)?;
    let (journal, account) = Journal::open(&dir.journal())?;
    if let Some(Gap { offset, bytes }) = account.damage {
        let path = dir.journal();
        tracing::error!(bundle = %dir.bundle(), ?path, offset, bytes, "the journal of a bundle is damaged, what it told there is unknown");
    }
    let carrier = if account.over {
        RecoveredCarrier::Over {
            journal: journal.length(),
        }
    } else if dir.shim().shim().exists() || !dir.shim().is_unlocked()? {
        RecoveredCarrier::Started
    } else {
        RecoveredCarrier::None
    };
    Ok(RecoveredBundle {
        bundle: dir.bundle(),
        spec: file.spec,
        carrier,
    })
}
