//! The life of one member, seen from its shim: wait for go, run the ranks, end them, prove that nothing is left, report.
//! One thread, one loop over descriptors; everything that is known lies in [`Supervisor`]. How a process is started or
//! killed, how output is written and what goes into the environment is next door.
//!
//! Order that matters: `go.json` is on disk before the first rank starts, a state is in `status.json` before anybody is
//! told of it, and "gone" is written only when no process is left.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use nix::sys::signal::Signal as SignalName;
use nix::sys::signalfd::SignalFd;
use trainyard_common::logrecord::LogKind;
use trainyard_common::member::{
    Cleanup, EndCause, Ending, Go, LeftProcess, MemberSpec, RankEnd, Stop,
};
use trainyard_common::state::{ExitStatus, ReasonCode};
use trainyard_common::units::format_duration;

use trainyard_transport::clock::Clock;

use super::ShimState;
use super::cgroup::{Cgroup, OomCounter};
use super::dir::{AttemptDir, write_json_once};
use super::footprint;
use super::launch::{self, Context};
use super::output::{self, Output};
use super::peers::Peers;
use super::pipes::{Pipe, READ_BYTES};
use super::port::HeldPort;
use super::process::{self, Reaped};
use super::shim::note;
use super::spawn::{self, Identity, Setup, SpawnError, Started};
use super::tree::Tree;
use super::wait::{Ready, Timer, wait};
use super::wire::{Command, Settings};
use trainyard_transport::clock::BootTime;

/// Grace of what ranks leave behind when all of them succeeded: it has nothing to finish for the job.
const LEFTOVER_GRACE: Duration = Duration::from_secs(5);
/// Pause after the first round of killing; doubled for each further one up to [`MAX_ROUND_GAP`], so that a process that
/// cannot die costs little.
const FIRST_ROUND_GAP: Duration = Duration::from_millis(20);
const MAX_ROUND_GAP: Duration = Duration::from_secs(1);
/// Processes that outlive SIGKILL by this much are told of, and the rest of the member's end does not wait for them. One
/// that gives back a lot of memory takes a second or two.
pub(super) const UNKILLABLE_AFTER: Duration = Duration::from_secs(5);
/// How often a state that could not be written (a full disk) is written again.
const STATUS_RETRY: Duration = Duration::from_secs(1);
/// Ranks that run for so long keep their shim waiting; before that it is not worth the while.
const SHRINK_AFTER: Duration = Duration::from_secs(1);
/// Whole buffers read from one pipe before the others get their turn.
const READS_PER_TURN: usize = 8;

/// What the supervisor is given by the shim's start.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) dir: AttemptDir,
    pub(crate) spec: MemberSpec,
    pub(crate) settings: Settings,
    pub(crate) port: HeldPort,
    pub(crate) cgroup: Option<Cgroup>,
    pub(crate) listener: UnixListener,
    /// The connection that the agent gave along.
    pub(crate) agent: Option<UnixStream>,
    pub(crate) signals: SignalFd,
    pub(crate) identity: Option<Identity>,
}

/// A member and its processes.
#[derive(Debug)]
pub(crate) struct Supervisor {
    dir: AttemptDir,
    spec: MemberSpec,
    settings: Settings,
    port: HeldPort,
    cgroup: Option<Cgroup>,
    identity: Option<Identity>,
    clock: Clock,
    peers: Peers,
    signals: SignalFd,
    timer: Timer,
    phase: Phase,
    /// Until when the ranks may live, if that is bounded.
    lease: Lease,
    ranks: Vec<Rank>,
    pipes: Vec<Pipe>,
    output: Option<Output>,
    oom: Option<OomCounter>,
    started: bool,
    childless: bool,
    /// The state that is to be told, and whether it is on disk yet.
    state: ShimState,
    unwritten: bool,
    write_again: BootTime,
    /// When memory that the start needed is given back.
    shrink_at: Option<BootTime>,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct Rank {
    rank: u32,
    /// None if it could not be started.
    pid: Option<i32>,
    end: Option<RankEnd>,
}

#[derive(Debug)]
enum Phase {
    Waiting,
    Running { limit: Option<BootTime> },
    Stopping(Stopping),
    Gone,
}

/// Until when a member may live without news of the coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lease {
    /// For ever: its policy has no lease.
    Unbounded,
    /// It has one, and nobody has said yet until when. Nothing is started before.
    Awaited,
    /// Until then, if nobody says later.
    Until(BootTime),
    /// It is over, for good.
    Over,
}

impl Lease {
    /// Takes an end that is later than the one that is known.
    fn renew(&mut self, end: BootTime) {
        match *self {
            Self::Awaited => *self = Self::Until(end),
            Self::Until(known) => *self = Self::Until(known.max(end)),
            Self::Unbounded | Self::Over => {}
        }
    }

    /// Whether ranks may start now.
    fn lets_start(self) -> bool {
        match self {
            Self::Unbounded => true,
            Self::Until(end) => BootTime::now() < end,
            Self::Awaited | Self::Over => false,
        }
    }
}

#[derive(Debug)]
struct Stopping {
    cause: EndCause,
    message: String,
    /// When SIGTERM has had its time.
    kill_at: BootTime,
    /// When the next round of killing, or the next look at what is left, is due.
    next_round: BootTime,
    gap: Duration,
    first_kill: Option<BootTime>,
    /// What was told to be left last.
    left: Option<(Vec<LeftProcess>, u32)>,
}

impl Stopping {
    fn next_round(&mut self, now: BootTime) {
        self.next_round = now.after(self.gap);
        self.gap = (self.gap * 2).min(MAX_ROUND_GAP);
    }

    fn deadline(&self, childless: bool) -> BootTime {
        match self.first_kill {
            Some(_) => self.next_round,
            // Children announce their end; what is none of ours needs a look at times.
            None if childless => self.next_round.min(self.kill_at),
            None => self.kill_at,
        }
    }
}

impl Supervisor {
    pub(crate) fn new(parts: Parts) -> io::Result<Self> {
        let port = parts.port.port();
        let lease = parts.spec.lease;
        Ok(Self {
            peers: Peers::new(parts.listener, parts.agent)?,
            timer: Timer::new()?,
            dir: parts.dir,
            spec: parts.spec,
            settings: parts.settings,
            port: parts.port,
            cgroup: parts.cgroup,
            identity: parts.identity,
            signals: parts.signals,
            clock: Clock::start(),
            phase: Phase::Waiting,
            lease: match lease {
                None => Lease::Unbounded,
                Some(_) => Lease::Awaited,
            },
            ranks: Vec::new(),
            pipes: Vec::new(),
            output: None,
            oom: None,
            started: false,
            childless: true,
            state: ShimState::Ready { port },
            unwritten: true,
            write_again: BootTime::now(),
            shrink_at: None,
            buffer: vec![0; READ_BYTES],
        })
    }

    /// Returns when every process is gone and that is on disk.
    pub(crate) fn run(mut self) -> io::Result<()> {
        loop {
            self.publish();
            if matches!(self.phase, Phase::Gone) && (!self.unwritten || self.is_abandoned()) {
                break;
            }
            self.timer.set(self.next_deadline())?;
            let ready = wait(&self.signals, &self.timer, &self.peers, &self.pipes)?;
            self.turn(&ready);
        }
        self.peers.tell();
        if let Some(cgroup) = &self.cgroup {
            cgroup.remove();
        }
        Ok(())
    }

    fn turn(&mut self, ready: &Ready) {
        for index in &ready.pipes {
            self.read_pipe(*index, READS_PER_TURN);
        }
        self.pipes.retain(|pipe| pipe.is_open());
        if ready.timer {
            self.timer.clear();
            self.shrink();
        }
        if ready.signals {
            self.take_signals();
            // A rank that failed before a stop came in is what ended the member.
            self.advance();
        }
        // Before anybody is heard: a lease that is over is not renewed, however late this process was to notice.
        self.mind_lease();
        let commands = self.peers.serve(ready);
        for command in commands {
            self.obey(command);
        }
        self.advance();
    }

    // === what comes in ===

    fn take_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            if info.ssi_signo == SignalName::SIGTERM as u32 {
                let message = "the shim was asked to end by SIGTERM".to_owned();
                self.stop(EndCause::Stopped, message, self.spec.grace);
            }
        }
        self.reap();
    }

    fn obey(&mut self, command: Command) {
        if let Some(uptime) = command.lease {
            self.lease.renew(BootTime::since_boot(uptime));
        }
        if let Some(stop) = command.stop {
            self.stop(EndCause::Stopped, stop_message(&stop), stop.grace);
        }
        if let Some(go) = command.go
            && matches!(self.phase, Phase::Waiting)
        {
            match self.lease.lets_start() {
                true => self.go(go, command.interface),
                false => self.end_lease(),
            }
        }
    }

    /// Ends the member if its lease is over.
    fn mind_lease(&mut self) {
        if let Lease::Until(end) = self.lease
            && end <= BootTime::now()
        {
            self.end_lease();
        }
    }

    fn end_lease(&mut self) {
        let lease = format_duration(self.spec.lease.unwrap_or_default());
        let message = match self.lease {
            Lease::Awaited => "nobody said that the coordinator is within reach".to_owned(),
            Lease::Unbounded | Lease::Until(_) | Lease::Over => {
                format!("the coordinator was out of reach for {lease}")
            }
        };
        self.lease = Lease::Over;
        self.stop(EndCause::LeaseExpired, message, self.spec.grace);
    }

    /// Reads what is there, at most so many buffers.
    fn read_pipe(&mut self, index: usize, reads: usize) {
        let Some(pipe) = self.pipes.get_mut(index) else {
            return;
        };
        for _ in 0..reads {
            match pipe.read(&mut self.buffer) {
                Ok(0) => return pipe.close(),
                Ok(length) => {
                    if let Some(output) = &self.output {
                        let at = self.clock.now();
                        output.write(pipe.log, pipe.kind, at, &self.buffer[..length]);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return pipe.close(),
            }
        }
    }

    fn reap(&mut self) {
        loop {
            match process::reap() {
                Reaped::Ended(pid, status) => self.ended(pid, exit_status(status)),
                Reaped::StillRunning => {
                    self.childless = false;
                    return;
                }
                Reaped::Childless => {
                    self.childless = true;
                    return;
                }
            }
        }
    }

    fn ended(&mut self, pid: i32, exit: ExitStatus) {
        let unprompted = matches!(self.phase, Phase::Running { .. });
        let Some(rank) = self.ranks.iter_mut().find(|rank| rank.pid == Some(pid)) else {
            return;
        };
        let killed = matches!(exit, ExitStatus::Signal(9) | ExitStatus::Code(137));
        let oom_killed = unprompted
            && self
                .oom
                .as_ref()
                .is_some_and(|oom| oom.explains(killed, !exit.is_success()));
        rank.end = Some(RankEnd {
            rank: rank.rank,
            exit,
            at: self.clock.now(),
            unprompted,
            oom_killed,
        });
        // Its number may go to another process now.
        rank.pid = None;
    }

    // === start ===

    fn go(&mut self, go: Go, interface: Option<String>) {
        let record = Command {
            go: Some(go.clone()),
            interface: interface.clone(),
            stop: None,
            lease: None,
        };
        if let Err(error) = self.prepare_start(&record) {
            return self.finish(EndCause::PrepareFailed, error);
        }
        let inherited = environment();
        let plans = launch::plan(&Context {
            attempt: self.dir.attempt(),
            spec: &self.spec,
            go: &go,
            interface: interface.as_deref(),
            dir: &self.dir,
            key: &self.settings.key,
            run_as: self.settings.run_as.as_ref(),
            inherited: &inherited,
            resume: has_entries(&self.dir),
        });
        let logs: Vec<_> = plans.iter().map(|plan| self.dir.log(plan.rank)).collect();
        match Output::start(&logs, self.settings.log_limit) {
            Ok(output) => self.output = Some(output),
            Err(error) => {
                let message = format!("the log files could not be made: {error}");
                return self.finish(EndCause::PrepareFailed, message);
            }
        }
        let setup = Setup {
            work: self.dir.work(),
            cgroup: self.cgroup.as_ref().and_then(|own| own.directory().ok()),
            identity: self.identity.clone(),
        };
        self.oom = Some(OomCounter::start(self.cgroup.as_ref()));
        // Asked again: the disk may have taken its time.
        if !self.lease.lets_start() {
            return self.end_lease();
        }
        self.port.release();
        let started_at = self.clock.now();
        let limit = self
            .spec
            .time_limit
            .map(|limit| BootTime::now().after(limit));
        self.phase = Phase::Running { limit };
        for plan in &plans {
            if let Err(error) = self.start_rank(plan, &setup) {
                return self.start_failed(&plans, &error);
            }
        }
        self.set_state(ShimState::Running { started_at });
        self.shrink_at = Some(BootTime::now().after(SHRINK_AFTER));
    }

    /// Records the start, which can happen once only, and gives the directories to the job's user.
    fn prepare_start(&mut self, record: &Command) -> Result<(), String> {
        write_json_once(&self.dir.go(), record)
            .map_err(|error| format!("the start could not be recorded: {error}"))?;
        if let Some(user) = &self.settings.run_as {
            super::remove::hand_over(&self.dir, user).map_err(|error| {
                format!(
                    "the directories could not be given to {}: {error}",
                    user.name
                )
            })?;
        }
        Ok(())
    }

    fn start_rank(&mut self, plan: &launch::RankPlan, setup: &Setup) -> Result<(), SpawnError> {
        let Started {
            pid,
            stdout,
            stderr,
        } = spawn::spawn(plan, setup)?;
        self.started = true;
        self.childless = false;
        let log = self.ranks.len();
        self.ranks.push(Rank {
            rank: plan.rank,
            pid: Some(pid),
            end: None,
        });
        for (fd, kind) in [(stdout, LogKind::Stdout), (stderr, LogKind::Stderr)] {
            self.pipes.push(Pipe::new(fd, log, kind));
        }
        Ok(())
    }

    fn start_failed(&mut self, plans: &[launch::RankPlan], error: &SpawnError) {
        let at = self.clock.now();
        for (nth, plan) in plans.iter().enumerate().skip(self.ranks.len()) {
            self.ranks.push(Rank {
                rank: plan.rank,
                pid: None,
                end: Some(RankEnd {
                    rank: plan.rank,
                    exit: ExitStatus::NotStarted,
                    at,
                    unprompted: nth == 0
                        || self
                            .ranks
                            .get(nth - 1)
                            .is_some_and(|last| last.end.is_none()),
                    oom_killed: false,
                }),
            });
        }
        let cause = match error {
            SpawnError::CannotExecute { .. } => EndCause::CannotExecute,
            SpawnError::Machine(_) => EndCause::PrepareFailed,
        };
        self.stop(
            cause,
            error.to_string(),
            self.spec.grace.min(LEFTOVER_GRACE),
        );
    }

    // === end ===

    /// Begins the end, or hurries it; the first cause stays.
    fn stop(&mut self, cause: EndCause, message: String, grace: Duration) {
        let now = BootTime::now();
        match &mut self.phase {
            Phase::Gone => {}
            Phase::Stopping(stopping) => {
                stopping.kill_at = stopping.kill_at.min(now.after(grace));
            }
            Phase::Waiting => self.finish(cause, message),
            Phase::Running { .. } => {
                // What has ended by now has ended by itself.
                self.reap();
                self.phase = Phase::Stopping(Stopping {
                    cause,
                    message,
                    kill_at: now.after(grace),
                    next_round: now.after(FIRST_ROUND_GAP),
                    gap: FIRST_ROUND_GAP,
                    first_kill: None,
                    left: None,
                });
                if !self.is_empty() {
                    self.tree().terminate();
                    self.set_state(ShimState::Stopping);
                }
            }
        }
    }

    /// Draws the conclusions from what came in and from the time.
    fn advance(&mut self) {
        if let Phase::Running { limit } = self.phase {
            self.check_ranks(limit);
        }
        if matches!(self.phase, Phase::Stopping(_)) {
            self.go_on_stopping();
        }
    }

    fn check_ranks(&mut self, limit: Option<BootTime>) {
        let failed = self
            .ranks
            .iter()
            .filter_map(|rank| rank.end)
            .filter(|end| !end.exit.is_success())
            .min_by_key(|end| (end.at, end.rank));
        if let Some(end) = failed {
            self.stop(EndCause::RankFailed, failure(&end), self.spec.grace);
        } else if self.ranks.iter().all(|rank| rank.end.is_some()) {
            let message = "all ranks exited with code 0".to_owned();
            let grace = self.spec.grace.min(LEFTOVER_GRACE);
            self.stop(EndCause::Completed, message, grace);
        } else if let Some(limit) = limit
            && limit <= BootTime::now()
        {
            let limit = format_duration(self.spec.time_limit.unwrap_or_default());
            let message = format!("the time limit of {limit} passed");
            self.stop(EndCause::TimeLimit, message, self.spec.grace);
        }
    }

    fn go_on_stopping(&mut self) {
        let now = BootTime::now();
        if self.is_empty() {
            let Phase::Stopping(stopping) = &mut self.phase else {
                return;
            };
            let (cause, message) = (stopping.cause, std::mem::take(&mut stopping.message));
            return self.finish(cause, message);
        }
        let Phase::Stopping(stopping) = &mut self.phase else {
            return;
        };
        if now < stopping.kill_at {
            if stopping.next_round <= now {
                stopping.next_round(now);
            }
            return;
        }
        if stopping.first_kill.is_none() {
            stopping.gap = FIRST_ROUND_GAP;
        } else if now < stopping.next_round {
            return;
        }
        stopping.next_round(now);
        let first = *stopping.first_kill.get_or_insert(now);
        let tell = first.until(now) > UNKILLABLE_AFTER;
        self.tree().kill();
        self.reap();
        if tell {
            self.tell_left();
        }
    }

    /// Tells what outlives SIGKILL, if that is news.
    fn tell_left(&mut self) {
        let living = self.tree().living();
        let left = process::left(&living);
        let Phase::Stopping(stopping) = &mut self.phase else {
            return;
        };
        if stopping.left.as_ref() == Some(&left) || (living.is_empty() && self.childless) {
            return;
        }
        stopping.left = Some(left.clone());
        let (cause, message) = (stopping.cause, stopping.message.clone());
        let (left, more) = left;
        let ending = self.ending(cause, message, String::new());
        let cleanup = Cleanup { ending, left, more };
        note(&format!("processes outlive SIGKILL: {}", cleanup.told()));
        self.set_state(ShimState::CleanupPending(cleanup));
    }

    /// Whether nothing of the attempt is left. No children means no descendants; what left the tree all the same (moved
    /// into the cgroup, or started on request by something else) is looked for by the cgroup or the attempt's key.
    fn is_empty(&self) -> bool {
        self.childless
            && match &self.cgroup {
                Some(cgroup) => !cgroup.is_populated(),
                None => self.tree().living().is_empty(),
            }
    }

    fn tree(&self) -> Tree<'_> {
        Tree {
            shim: nix::unistd::getpid().as_raw(),
            dead_shim: None,
            cgroup: self.cgroup.as_ref(),
            key: &self.settings.key,
        }
    }

    /// Every process is gone: brings in the last output and reports.
    fn finish(&mut self, cause: EndCause, message: String) {
        for index in 0..self.pipes.len() {
            // All writers are gone, so this ends; the bound is for descriptors that were passed on to strangers.
            self.read_pipe(index, 64 * READS_PER_TURN);
        }
        self.pipes.clear();
        // A log without a place for its marker cannot tell what it lacks; the ending does.
        let unmarked = self.output.take().map(Output::finish).unwrap_or_default();
        let unmarked: Vec<_> = self
            .ranks
            .iter()
            .zip(unmarked)
            .filter_map(|(rank, unmarked)| Some((rank.rank, unmarked?)))
            .collect();
        let ending = self.ending(cause, message, output::warning(&unmarked));
        self.phase = Phase::Gone;
        self.set_state(ShimState::Gone(ending));
    }

    fn ending(&self, cause: EndCause, message: String, warning: String) -> Ending {
        let ended_at = self.clock.now();
        let ranks = self.ranks.iter().map(|rank| {
            rank.end.unwrap_or(RankEnd {
                rank: rank.rank,
                exit: ExitStatus::Unknown,
                at: ended_at,
                unprompted: false,
                oom_killed: false,
            })
        });
        Ending {
            cause,
            message,
            started: self.started,
            ranks: ranks.collect(),
            ended_at,
            outputs: None,
            checkpoint: None,
            warning,
        }
    }

    fn shrink(&mut self) {
        if self.shrink_at.is_some_and(|at| at <= BootTime::now()) {
            self.shrink_at = None;
            footprint::give_back_program();
        }
    }

    // === what goes out ===

    fn set_state(&mut self, state: ShimState) {
        self.state = state;
        self.unwritten = true;
        self.write_again = BootTime::now();
    }

    /// Writes the state if it is new, and only then tells it.
    fn publish(&mut self) {
        let now = BootTime::now();
        if !self.unwritten || now < self.write_again {
            return;
        }
        match self.dir.write_status(&self.state) {
            Ok(()) => {
                self.unwritten = false;
                self.peers.set(&self.state);
            }
            Err(error) => {
                note(&format!("the state could not be written: {error}"));
                // Space that was set aside for this very moment.
                let _ = std::fs::remove_file(self.dir.reserve());
                self.write_again = now.after(STATUS_RETRY);
            }
        }
    }

    /// Whether the directory was taken away, so that nobody can ever be told.
    fn is_abandoned(&self) -> bool {
        let gone = std::fs::symlink_metadata(self.dir.root())
            .is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        if gone {
            note("the attempt's directory is gone, its ending cannot be recorded");
        }
        gone
    }

    fn next_deadline(&self) -> Option<BootTime> {
        let phase = match &self.phase {
            Phase::Waiting | Phase::Gone => None,
            Phase::Running { limit } => *limit,
            Phase::Stopping(stopping) => Some(stopping.deadline(self.childless)),
        };
        let write = self.unwritten.then_some(self.write_again);
        let lease = match self.lease {
            Lease::Until(end) => Some(end),
            Lease::Unbounded | Lease::Awaited | Lease::Over => None,
        };
        let write = write.into_iter().chain(lease);
        phase.into_iter().chain(write).chain(self.shrink_at).min()
    }
}

/// How a status as the kernel tells it looks in our terms.
pub(super) fn exit_status(status: std::process::ExitStatus) -> ExitStatus {
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    let signal = status.signal().and_then(|signal| u8::try_from(signal).ok());
    match (code, signal) {
        (Some(code), _) => ExitStatus::Code(code),
        (None, Some(signal)) => ExitStatus::Signal(signal),
        (None, None) => ExitStatus::Unknown,
    }
}

pub(super) fn failure(end: &RankEnd) -> String {
    let rank = end.rank;
    if end.oom_killed {
        return format!("rank {rank} was killed by the kernel for want of memory");
    }
    match end.exit {
        ExitStatus::Code(code) => format!("rank {rank} exited with code {code}"),
        ExitStatus::Signal(signal) => match SignalName::try_from(i32::from(signal)) {
            Ok(name) => format!("rank {rank} was ended by signal {signal} ({name})"),
            Err(_) => format!("rank {rank} was ended by signal {signal}"),
        },
        ExitStatus::NotStarted => format!("rank {rank} could not be started"),
        ExitStatus::Unknown => format!("how rank {rank} ended is not known"),
    }
}

pub(super) fn stop_message(stop: &Stop) -> String {
    match stop.code {
        ReasonCode::CancelRequested => "ended because its cancellation was asked for".to_owned(),
        code => format!("ended on the coordinator's request: {code}"),
    }
}

pub(super) fn environment() -> BTreeMap<String, std::ffi::OsString> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .collect()
}

fn has_entries(dir: &AttemptDir) -> bool {
    std::fs::read_dir(dir.resume()).is_ok_and(|mut entries| entries.next().is_some())
}
