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
use trainyard_common::ids::{AttemptRef, UserName, WorkspaceName};
use trainyard_common::limits::{DEFAULT_GRACE, MAX_PROCS_PER_NODE};
use trainyard_common::member::{
    Cleanup, EndCause, Ending, Go, MemberSpec, REBOOTED_AT, RankEnd, Stop,
};
use trainyard_common::resources::Resources;
use trainyard_common::spec::Launcher;
use trainyard_common::state::ExitStatus;
use trainyard_common::time::Timestamp;

use super::cgroup::Cgroup;
use super::dir::{AttemptDir, SOCKET, read_json};
use super::failpoint::point;
use super::process::{self, Process};
use super::remove::{named_directories, remove_whole};
use super::supervise::UNKILLABLE_AFTER;
use super::tree::Tree;
use super::wire::{Command, Lines, MemberFile, Settings, ShimFile, Status, line};
use super::{RuntimeEvent, ShimState};
use trainyard_transport::clock::{BootTime, Clock};
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
/// Ranks whose last log offsets are told after a reboot.
const OFFSETS_TOLD: usize = 4;

/// What was asked of a shim.
#[derive(Debug, Clone, Default)]
pub(super) struct Wanted {
    pub(super) go: Option<(Go, Option<String>)>,
    pub(super) stop: Option<Stop>,
    /// When the lease is over, if the member has one.
    pub(super) lease: Option<BootTime>,
}

/// One shim, from its start to its end.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) dir: AttemptDir,
    /// The process, if this agent started it, and its first connection.
    pub(super) child: Option<Child>,
    pub(super) first: Option<UnixStream>,
    pub(super) wanted: watch::Receiver<Wanted>,
    /// When the coordinator was last known to hear this node.
    pub(super) heard: watch::Receiver<Option<BootTime>>,
    pub(super) clock: Clock,
    pub(super) events: mpsc::Sender<RuntimeEvent>,
}

impl Link {
    /// Tells all states but the last one, which it returns when the shim is gone and no process is left. Nothing if the
    /// runtime does not want it any more.
    pub(super) async fn follow(mut self) -> Option<Ending> {
        let lease = self.lease().await;
        let ending = loop {
            while let Some(stream) = self.next_stream().await {
                match self.converse(stream, lease).await {
                    Heard::End => {}
                    Heard::Ending => self.await_exit().await,
                    Heard::Dismissed => return None,
                }
            }
            if self.events.is_closed() {
                return None;
            }
            // Nothing: an agent started a shim just before its own end, and that one was late. It must be told what is
            // wanted, as nobody else will.
            if let Some(ending) = self.settle().await? {
                break ending;
            }
        };
        if let Some(child) = &mut self.child {
            let _ = timeout(EXIT_TIMEOUT, child.wait()).await;
        }
        Some(ending)
    }

    /// How long the member may live without the coordinator, if that is bounded. What cannot be read is not renewed.
    async fn lease(&self) -> Option<Duration> {
        let dir = self.dir.clone();
        blocking(move || read_member(&dir)).await.ok()?.spec.lease
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
    async fn converse(&mut self, stream: UnixStream, lease: Option<Duration>) -> Heard {
        let (mut reader, mut writer) = stream.into_split();
        let mut lines = Lines::default();
        let mut buffer = vec![0; 4096];
        let mut sent = Wanted::default();
        let deaf_at = Instant::now() + START_TIMEOUT;
        let mut silent = true;
        loop {
            let mut wanted = self.wanted.borrow_and_update().clone();
            let heard = *self.heard.borrow_and_update();
            wanted.lease = lease.and_then(|lease| Some(heard?.after(lease)));
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
                // Cancel-safe: as above. Its sender lives as long as the runtime.
                Ok(()) = self.heard.changed(), if lease.is_some() => {}
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
            let state = status.into_state();
            if matches!(state, ShimState::Gone(_)) {
                // Told when the shim is gone too; then it can be removed at once.
                return Ok(true);
            }
            let event = RuntimeEvent {
                attempt: self.dir.attempt(),
                state,
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

    /// The shim is dead: its ending, or what must stand for one once no process is left. No ending if a shim is found to
    /// live; nothing at all if nobody wants to know.
    async fn settle(&mut self) -> Option<Option<Ending>> {
        let mut pause = FIRST_PAUSE;
        let (mut told, since) = (None, Instant::now());
        loop {
            let (dir, now) = (self.dir.clone(), self.clock.now());
            match blocking(move || settle(&dir, now)).await {
                Ok(Settled::Ended(ending)) => return Some(Some(ending)),
                _ if self.events.is_closed() => return None,
                Ok(Settled::Supervised) => return Some(None),
                Ok(Settled::NotYet(cleanup)) => {
                    let attempt = self.dir.attempt();
                    let left = (cleanup.left.clone(), cleanup.more);
                    let state = match since.elapsed() >= UNKILLABLE_AFTER {
                        true if told.as_ref() != Some(&left) => {
                            told = Some(left);
                            Some(ShimState::CleanupPending(*cleanup))
                        }
                        false if told.is_none() => {
                            told = Some((Vec::new(), 0));
                            Some(ShimState::Stopping)
                        }
                        _ => None,
                    };
                    if let Some(state) = state {
                        let _ = self.events.send(RuntimeEvent { attempt, state }).await;
                    }
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
    if wanted.lease != sent.lease {
        command.lease = wanted.lease.map(BootTime::uptime);
    }
    sent.clone_from(wanted);
    if command.go.is_none() && command.stop.is_none() && command.lease.is_none() {
        return Ok(());
    }
    let line = line(&command)?;
    point("member.telling");
    timeout(SEND_TIMEOUT, writer.write_all(&line)).await??;
    point("member.told");
    Ok(())
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

/// How far an attempt without a living shim is.
#[derive(Debug)]
enum Settled {
    Ended(Ending),
    /// Processes of it still live: how it would end without them, and what they are.
    NotYet(Box<Cleanup>),
    /// A shim has it.
    Supervised,
}

/// One step towards an ending.
fn settle(dir: &AttemptDir, now: Timestamp) -> io::Result<Settled> {
    if !dir.root().exists() {
        return Ok(Settled::Ended(Ending {
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
    let status = dir.read_status();
    if let Ok(Some(ShimState::Gone(ending))) = status {
        return Ok(Settled::Ended(ending));
    }
    // Also keeps a late shim from starting meanwhile.
    let Some(_lock) = dir.try_lock()? else {
        return Ok(Settled::Supervised);
    };
    let (member, no_member) = readable(read_member(dir))?;
    let (shim, no_shim) = readable(dir.read_shim())?;
    let (_, no_status) = readable(status)?;
    let unreadable = no_member.or(no_shim).or(no_status);
    let shim = shim.flatten();
    let ending = match (&unreadable, &shim) {
        (None, None) => never_started(dir, now),
        _ => {
            let left = kill_all(
                shim.as_ref(),
                member.as_ref().map(|member| &member.settings),
            );
            let ending = match (unreadable, member) {
                (None, Some(member)) => {
                    unknown_ending(dir, &member.spec, EndCause::SupervisorLost, now)
                }
                (error, member) => {
                    let spec = member.map_or_else(|| bare_spec(dir), |member| member.spec);
                    // As after a reboot: that nothing tells of a start says nothing.
                    Ending {
                        cause: EndCause::SupervisorLost,
                        message: error.unwrap_or_default(),
                        ..unknown_ending(dir, &spec, EndCause::NodeRebooted, now)
                    }
                }
            };
            if let Some(left) = left {
                let (left, more) = process::left(&left);
                return Ok(Settled::NotYet(Box::new(Cleanup { ending, left, more })));
            }
            ending
        }
    };
    dir.write_status(&ShimState::Gone(ending.clone()))?;
    Ok(Settled::Ended(ending))
}

/// What was read, or else what is damaged and where; other errors may go away.
fn readable<T>(result: io::Result<T>) -> io::Result<(Option<T>, Option<String>)> {
    match result {
        Ok(value) => Ok((Some(value), None)),
        Err(error) if is_damage(&error) => Ok((None, Some(error.to_string()))),
        Err(error) => Err(error),
    }
}

/// Whether reading again would end the same: the record is damaged, or was never written to its end.
pub(super) fn is_damage(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::InvalidData | io::ErrorKind::NotFound
    )
}

/// Ends an attempt that no shim ever had. Whether it is ended: not if one has it after all.
pub(super) fn end_unstarted(dir: &AttemptDir, state: &ShimState) -> io::Result<bool> {
    // Also keeps a late shim from starting meanwhile.
    let Some(_lock) = dir.try_lock()? else {
        return Ok(false);
    };
    if dir.shim().exists() {
        return Ok(false);
    }
    point("unstarted.locked");
    dir.write_status(state)?;
    point("unstarted.written");
    Ok(true)
}

/// Kills what a dead shim left, as far as it can be told from strangers. What lived until then; nothing if nothing did.
fn kill_all(shim: Option<&ShimFile>, settings: Option<&Settings>) -> Option<Vec<Process>> {
    // Matches no process.
    let nobody = ShimFile {
        pid: 0,
        start_time: 0,
        pid_namespace: String::new(),
        cgroup: None,
        member: None,
        bundle: None,
    };
    let shim = shim.unwrap_or(&nobody);
    let cgroup = shim.cgroup.as_deref().and_then(Cgroup::existing);
    let tree = Tree {
        shim: shim.pid,
        dead_shim: Some(shim),
        cgroup: cgroup.as_ref(),
        key: settings.map_or("unknown", |settings| settings.key.as_str()),
    };
    let populated = || cgroup.as_ref().is_some_and(Cgroup::is_populated);
    // Looked at twice: a process that is just being replaced by another program shows no environment.
    for _ in 0..2 {
        let living = tree.living();
        if populated() || !living.is_empty() {
            tree.kill();
            return Some(living);
        }
    }
    if let Some(cgroup) = &cgroup {
        cgroup.remove();
    }
    None
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

/// The ending of a member that ran, or may have, when the machine went down: it says when the machine was up again, and
/// how much of each rank's output is here.
pub(super) fn rebooted_ending(dir: &AttemptDir, spec: &MemberSpec, now: Timestamp) -> Ending {
    let uptime = BootTime::now().uptime();
    let up = Timestamp(
        now.0
            .saturating_sub(u64::try_from(uptime.as_millis()).unwrap_or(u64::MAX)),
    );
    let offsets: Vec<String> = spec
        .supervised_ranks()
        .filter_map(|rank| Some((rank, std::fs::metadata(dir.log(rank)).ok()?.len())))
        .take(OFFSETS_TOLD)
        .map(|(rank, length)| format!("rank {rank} at {length}"))
        .collect();
    let logs = match offsets.join(", ") {
        none if none.is_empty() => "no log was written".to_owned(),
        offsets => format!("last log offset: {offsets}"),
    };
    let message = format!(
        "{REBOOTED_AT}{} before the exit status was recorded; {logs}",
        up.utc()
    );
    Ending {
        message,
        ..unknown_ending(dir, spec, EndCause::NodeRebooted, up)
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
        _ => ("the supervisor was killed", dir.go().exists()),
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

/// What was accepted, if need be as its shim had read it.
pub(super) fn read_member(dir: &AttemptDir) -> io::Result<MemberFile> {
    let error = match read_member_file(dir) {
        Err(error) if is_damage(&error) => error,
        result => return result,
    };
    match dir.read_shim() {
        Ok(Some(ShimFile {
            member: Some(member),
            ..
        })) if member.attempt == dir.attempt() => {
            tracing::error!(attempt = %dir.attempt(), %error, "a member is known from its shim only");
            Ok(*member)
        }
        Ok(_) | Err(_) => Err(error),
    }
}

fn read_member_file(dir: &AttemptDir) -> io::Result<MemberFile> {
    let path = dir.member();
    let missing = || {
        let message = format!("{}: record unreadable: there is none", path.display());
        io::Error::new(io::ErrorKind::NotFound, message)
    };
    let member: MemberFile = read_json(&path)?.ok_or_else(missing)?;
    if member.attempt != dir.attempt() {
        let path = path.display();
        let message = format!(
            "{path}: record unreadable: it is of attempt {}",
            member.attempt
        );
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(member)
}

/// What can be told of a member whose record cannot be read: its ranks, if they have left logs.
pub(super) fn bare_spec(dir: &AttemptDir) -> MemberSpec {
    let names = std::fs::read_dir(dir.logs())
        .into_iter()
        .flatten()
        .flatten();
    let ranks: std::collections::BTreeSet<u32> = names
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let rank = name.strip_prefix("rank-")?.strip_suffix(".log")?;
            rank.parse().ok()
        })
        .take(MAX_PROCS_PER_NODE as usize)
        .collect();
    let procs = u32::try_from(ranks.len()).unwrap_or(1).max(1);
    let nobody: UserName = "unknown"
        .parse()
        .expect("a constant that follows the rule for names");
    MemberSpec {
        job_name: String::new(),
        owner: nobody,
        workspace: WorkspaceName::default_workspace(),
        node_rank: ranks.first().map_or(0, |first| first / procs),
        nodes: 1,
        procs_per_node: procs,
        resources: Resources::default(),
        gpu_uuids: Vec::new(),
        launcher: Launcher::None,
        command: Vec::new(),
        env: std::collections::BTreeMap::new(),
        snapshot: None,
        resume_from: Vec::new(),
        time_limit: None,
        grace: DEFAULT_GRACE,
        lease: None,
    }
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
