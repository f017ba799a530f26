//! The agent's side of one shim: listens to it, tells it what is wanted, and cleans up after it when it dies without an
//! ending. Decides nothing about what is wanted.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::libc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use trainyard_common::ids::AttemptRef;
use trainyard_common::member::{EndCause, Ending, Go, MemberSpec, RankEnd, Stop};
use trainyard_common::state::ExitStatus;
use trainyard_common::time::Timestamp;

use super::cgroup::Cgroup;
use super::dir::{AttemptDir, SOCKET, read_json};
use super::remove::{named_directories, remove_whole};
use super::tree::Tree;
use super::wire::{Command, Lines, MemberFile, Settings, ShimFile, Status, line};
use super::{RuntimeEvent, ShimState};
use trainyard_transport::clock::Clock;
use trainyard_transport::task::blocking;

/// Pauses between looks at something that is about to happen: short at first, as a shim starts in milliseconds.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A shim that has not opened its socket by then is killed; a machine under heavy load may need seconds.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// A shim that does not take a line for so long is not listening; the connection is made anew.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// After telling its ending a shim has nothing left to do; longer than this and somebody should look.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of the shim's own log that are shown when it could not start.
const LOG_TAIL: usize = 400;

/// What was asked of a shim.
#[derive(Debug, Clone, Default)]
pub(super) struct Wanted {
    pub(super) go: Option<(Go, Option<String>)>,
    pub(super) stop: Option<Stop>,
}

/// One shim, from its start to its end.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) dir: AttemptDir,
    /// The process, if this agent started it, and its first connection.
    pub(super) child: Option<Child>,
    pub(super) first: Option<UnixStream>,
    pub(super) wanted: watch::Receiver<Wanted>,
    pub(super) clock: Clock,
    pub(super) events: mpsc::Sender<RuntimeEvent>,
}

impl Link {
    /// Tells all states but the last one, which it returns when the shim is gone and no process is left. Nothing if the
    /// runtime does not want it any more.
    pub(super) async fn follow(mut self) -> Option<Ending> {
        while let Some(stream) = self.next_stream().await {
            match self.converse(stream).await {
                Heard::End => {}
                Heard::Ending => self.await_exit().await,
                Heard::Dismissed => return None,
            }
        }
        if self.events.is_closed() {
            return None;
        }
        let ending = self.settle().await?;
        if let Some(child) = &mut self.child {
            let _ = timeout(EXIT_TIMEOUT, child.wait()).await;
        }
        Some(ending)
    }

    /// The connection that the shim was started with, or a new one; nothing if the shim is dead.
    async fn next_stream(&mut self) -> Option<UnixStream> {
        match self.first.take() {
            Some(stream) => Some(stream),
            None => self.connect().await,
        }
    }

    async fn connect(&mut self) -> Option<UnixStream> {
        let since = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            if let Ok(stream) = connect(&self.dir).await {
                return Some(stream);
            }
            if self.events.is_closed() || self.is_dead().await {
                return None;
            }
            if since.elapsed() > START_TIMEOUT {
                self.kill_deaf();
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Ends a shim that this agent started and that never said anything.
    fn kill_deaf(&mut self) {
        if let Some(child) = &mut self.child {
            tracing::warn!(attempt = %self.dir.attempt(), "a shim does not speak and is killed");
            let _ = child.start_kill();
        }
    }

    /// Whether no shim lives and none is about to.
    async fn is_dead(&mut self) -> bool {
        let exited = match &mut self.child {
            Some(child) => !matches!(child.try_wait(), Ok(None)),
            None => true,
        };
        exited && is_unlocked(&self.dir).await
    }

    /// Passes on what is said until the connection ends.
    async fn converse(&mut self, stream: UnixStream) -> Heard {
        let (mut reader, mut writer) = stream.into_split();
        let mut lines = Lines::default();
        let mut buffer = vec![0; 4096];
        let mut sent = Wanted::default();
        let deaf_at = Instant::now() + START_TIMEOUT;
        let mut silent = true;
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            if send_news(&mut writer, &wanted, &mut sent).await.is_err() {
                return Heard::End;
            }
            tokio::select! {
                biased;
                // Cancel-safe: a read that does not complete has taken nothing.
                read = reader.read(&mut buffer) => match read {
                    Ok(0) | Err(_) => return Heard::End,
                    Ok(length) => {
                        silent = false;
                        lines.push(&buffer[..length]);
                        match self.take_states(&mut lines).await {
                            Ok(true) => return Heard::Ending,
                            Ok(false) => {}
                            Err(error) => {
                                tracing::warn!(
                                    attempt = %self.dir.attempt(),
                                    error = &error as &dyn std::error::Error,
                                    "a shim was not understood"
                                );
                                return Heard::End;
                            }
                        }
                    }
                },
                // Cancel-safe: only tells that there is something, and what is taken at the top of the loop.
                changed = self.wanted.changed() => if changed.is_err() {
                    return Heard::Dismissed;
                },
                // Cancel-safe: takes nothing. The agent that this belonged to is no more.
                () = self.events.closed() => return Heard::Dismissed,
                // Cancel-safe: only waits. The connection ends with the shim.
                () = sleep_until(deaf_at), if silent => {
                    silent = false;
                    self.kill_deaf();
                }
            }
        }
    }

    /// Whether an ending was among the states.
    async fn take_states(&mut self, lines: &mut Lines) -> io::Result<bool> {
        while let Some(line) = lines.take()? {
            let status: Status = serde_json::from_slice(&line)?;
            if matches!(status.state, ShimState::Gone(_)) {
                // Told when the shim is gone too; then it can be removed at once.
                return Ok(true);
            }
            let event = RuntimeEvent {
                attempt: self.dir.attempt(),
                state: status.state,
            };
            let _ = self.events.send(event).await;
        }
        Ok(false)
    }

    async fn await_exit(&mut self) {
        if let Some(child) = &mut self.child {
            // The kernel tells at once.
            let _ = timeout(EXIT_TIMEOUT, child.wait()).await;
        }
        let since = Instant::now();
        let mut pause = FIRST_PAUSE;
        while !is_unlocked(&self.dir).await {
            if since.elapsed() > EXIT_TIMEOUT {
                tracing::warn!(attempt = %self.dir.attempt(), "a shim told its ending and does not end");
                return;
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// The shim is dead: its ending, or what must stand for one once no process is left.
    async fn settle(&mut self) -> Option<Ending> {
        let mut pause = FIRST_PAUSE;
        let mut told = false;
        loop {
            let (dir, now) = (self.dir.clone(), self.clock.now());
            match blocking(move || settle(&dir, now)).await {
                Ok(Some(ending)) => return Some(ending),
                _ if self.events.is_closed() => return None,
                Ok(None) => {
                    if !told {
                        let attempt = self.dir.attempt();
                        let state = ShimState::Stopping;
                        let _ = self.events.send(RuntimeEvent { attempt, state }).await;
                    }
                    told = true;
                }
                Err(error) => tracing::error!(
                    attempt = %self.dir.attempt(),
                    error = &error as &dyn std::error::Error,
                    "the ending of an attempt cannot be recorded yet"
                ),
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// Why a conversation is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    /// The connection broke.
    End,
    /// The shim told its ending.
    Ending,
    /// The runtime has no use for this follower.
    Dismissed,
}

/// Sends what was not sent on this connection yet. The shim takes each order once, however often it comes.
async fn send_news(
    writer: &mut (impl AsyncWriteExt + Unpin),
    wanted: &Wanted,
    sent: &mut Wanted,
) -> io::Result<()> {
    let mut command = Command::default();
    if let (Some((go, interface)), None) = (&wanted.go, &sent.go) {
        command.go = Some(go.clone());
        command.interface.clone_from(interface);
    }
    if wanted.stop != sent.stop {
        command.stop = wanted.stop;
    }
    sent.clone_from(wanted);
    if command.go.is_none() && command.stop.is_none() {
        return Ok(());
    }
    let line = line(&command)?;
    timeout(SEND_TIMEOUT, writer.write_all(&line)).await?
}

/// Connects through a short path: an address holds 108 bytes, fewer than a path may have.
pub(super) async fn connect(dir: &AttemptDir) -> io::Result<UnixStream> {
    let held = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(dir.root())?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", held.as_raw_fd()));
    UnixStream::connect(path).await
}

pub(super) async fn is_unlocked(dir: &AttemptDir) -> bool {
    let dir = dir.clone();
    // A directory that is gone has no lock that anybody could hold.
    blocking(move || match dir.is_unlocked() {
        Ok(unlocked) => unlocked,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    })
    .await
}

/// One step towards an ending: nothing while processes of the attempt still live.
fn settle(dir: &AttemptDir, now: Timestamp) -> io::Result<Option<Ending>> {
    if !dir.root().exists() {
        return Ok(Some(Ending {
            cause: EndCause::SupervisorLost,
            message: "the attempt's directory was deleted by somebody else".to_owned(),
            started: true,
            ranks: Vec::new(),
            ended_at: now,
            outputs: None,
            checkpoint: None,
            warning: String::new(),
        }));
    }
    if let Ok(Some(ShimState::Gone(ending))) = dir.read_status() {
        return Ok(Some(ending));
    }
    // Also keeps a late shim from starting meanwhile.
    let Some(_lock) = dir.try_lock()? else {
        return Ok(None);
    };
    let member = read_member(dir)?;
    let ending = match dir.read_shim()? {
        None => never_started(dir, now),
        Some(shim) => {
            if !kill_all(&shim, &member.settings) {
                return Ok(None);
            }
            unknown_ending(dir, &member.spec, EndCause::SupervisorLost, now)
        }
    };
    dir.write_status(&ShimState::Gone(ending.clone()))?;
    Ok(Some(ending))
}

/// Kills what a dead shim left. Whether nothing is left.
fn kill_all(shim: &ShimFile, settings: &Settings) -> bool {
    let cgroup = shim.cgroup.as_deref().and_then(Cgroup::existing);
    let tree = Tree {
        shim: shim.pid,
        dead_shim: Some(shim),
        cgroup: cgroup.as_ref(),
        key: &settings.key,
    };
    let populated = || cgroup.as_ref().is_some_and(Cgroup::is_populated);
    // Looked at twice: a process that is just being replaced by another program shows no environment.
    for _ in 0..2 {
        if populated() || !tree.living().is_empty() {
            tree.kill();
            return false;
        }
    }
    if let Some(cgroup) = &cgroup {
        cgroup.remove();
    }
    true
}

fn never_started(dir: &AttemptDir, now: Timestamp) -> Ending {
    let log = std::fs::read(dir.shim_log()).unwrap_or_default();
    let tail = String::from_utf8_lossy(&log[log.len().saturating_sub(LOG_TAIL)..]);
    let mut message = "the shim ended before it was ready".to_owned();
    if !tail.trim().is_empty() {
        message = format!("{message}: {}", tail.trim());
    }
    Ending {
        cause: EndCause::PrepareFailed,
        message,
        started: false,
        ranks: Vec::new(),
        ended_at: now,
        outputs: None,
        checkpoint: None,
        warning: String::new(),
    }
}

/// The ending of a member that nobody saw end.
pub(super) fn unknown_ending(
    dir: &AttemptDir,
    spec: &MemberSpec,
    cause: EndCause,
    now: Timestamp,
) -> Ending {
    let (what, started) = match cause {
        // A file that was not synced may be gone with the power, so its absence says nothing.
        EndCause::NodeRebooted => ("the node was rebooted", true),
        _ => ("the shim was killed", dir.go().exists()),
    };
    let message = if started {
        format!("{what} before the exit status was recorded")
    } else {
        format!("{what} before any rank was started")
    };
    let ranks = if started {
        spec.supervised_ranks()
    } else {
        0..0
    };
    Ending {
        cause,
        message,
        started,
        ranks: ranks
            .map(|rank| RankEnd {
                rank,
                exit: ExitStatus::Unknown,
                at: now,
                unprompted: false,
                oom_killed: false,
            })
            .collect(),
        ended_at: now,
        outputs: None,
        checkpoint: None,
        warning: String::new(),
    }
}

/// What was accepted.
pub(super) fn read_member(dir: &AttemptDir) -> io::Result<MemberFile> {
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    let member: MemberFile = read_json(&dir.member())?.ok_or_else(missing)?;
    if member.attempt != dir.attempt() {
        let message = format!("the directory holds attempt {}", member.attempt);
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(member)
}

/// The directories of attempts, in their order.
pub(super) fn list(attempts: &Path) -> io::Result<Vec<AttemptDir>> {
    let found = named_directories::<AttemptRef>(attempts)?;
    let dirs = found.into_iter();
    Ok(dirs
        .map(|attempt| AttemptDir::new(attempts, attempt))
        .collect())
}

/// Deletes an attempt's directory and its cgroup.
pub(super) fn remove(attempts: &Path, dir: &AttemptDir) -> io::Result<()> {
    if let Ok(Some(ShimFile {
        cgroup: Some(path), ..
    })) = dir.read_shim()
        && let Some(cgroup) = Cgroup::existing(&path)
    {
        cgroup.remove();
    }
    remove_whole(attempts, dir.root())
}
