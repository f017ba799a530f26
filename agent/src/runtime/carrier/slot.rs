//! One slot of a carrier: a thread that runs one task after the other, each from its directories to the record of its
//! end. What it knows of other tasks is that their processes are none of its business.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use trainyard_common::ids::TaskIndex;
use trainyard_common::logrecord::LogKind;
use trainyard_common::member::{EndCause, Go, RankEnd};
use trainyard_common::state::ExitStatus;
use trainyard_common::time::Timestamp;
use trainyard_common::units::format_duration;
use trainyard_transport::clock::BootTime;

use super::super::launch::{self, Context, RankPlan};
use super::super::output;
use super::super::port::HeldPort;
use super::super::process;
use super::super::shim::note;
use super::super::spawn::{Image, SpawnError};
use super::super::supervise::{environment, exit_status, failure};
use super::STARTED_AFTER;
use super::birth::{Child, Cradle, wait};
use super::dirs::SlotDirs;
use super::journal::{Record, TaskEnd};
use super::output::TaskLog;
use super::processes::{Orphans, Whose, find, kill, terminate};
use super::work::{Bell, Shared, poll_timeout};

/// Stack of a slot's thread: copying a deep snapshot needs most of it. Only what is used takes memory.
const STACK_BYTES: usize = 512 << 10;
/// Bytes of output that are read at once.
const READ_BYTES: usize = 64 << 10;
/// Reads of one stream before the other gets its turn, and at the end, when nobody but strangers can still write.
const READS_PER_TURN: usize = 8;
const LAST_READS: usize = 512;
/// Grace of what a task leaves behind when its process ended: as for a member.
const LEFTOVER_GRACE: Duration = Duration::from_secs(5);
/// Pause between looks at what is left; doubled for each further one up to [`MAX_ROUND_GAP`].
const FIRST_ROUND_GAP: Duration = Duration::from_millis(5);
const MAX_ROUND_GAP: Duration = Duration::from_secs(1);
/// A process that outlives SIGKILL by this much is told of in the carrier's log.
const UNKILLABLE_AFTER: Duration = Duration::from_secs(5);

/// Starts a thread for one more slot.
pub(super) fn start(shared: &Arc<Shared>) -> io::Result<()> {
    let bell = Arc::new(Bell::new()?);
    let shared = Arc::clone(shared);
    std::thread::Builder::new()
        .name("slot".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            block_signals();
            let number = shared.add_slot(Arc::clone(&bell));
            Slot::new(shared, number, bell).serve();
        })?;
    Ok(())
}

/// A child begins with what its maker has blocked, and must not be interrupted while it is in the carrier's memory. The
/// end of a child interrupts nobody, and is better ignored at once than kept.
fn block_signals() {
    let mut all = nix::sys::signal::SigSet::all();
    all.remove(nix::sys::signal::Signal::SIGCHLD);
    if let Err(error) = all.thread_block() {
        note(&format!("signals could not be blocked: {error}"));
    }
}

struct Slot {
    shared: Arc<Shared>,
    number: u32,
    bell: Arc<Bell>,
    orphans: Orphans,
    cradle: Cradle,
    buffer: Vec<u8>,
    dirs: Option<SlotDirs>,
    /// Kept from task to task as long as it can be bound.
    port: Option<HeldPort>,
    /// What the next task is started as, but for what differs.
    plan: Option<RankPlan>,
    /// The process that runs, for when something goes wrong here.
    pid: Option<i32>,
}

/// A task's process and what is known of it.
struct Run {
    task: TaskIndex,
    pid: i32,
    pidfd: OwnedFd,
    stdout: Option<File>,
    stderr: Option<File>,
    log: TaskLog,
    started_at: Timestamp,
    /// When it is to be told of.
    tell_at: Option<BootTime>,
    limit: Option<BootTime>,
    exit: Option<Exit>,
    stopping: Option<Stopping>,
}

#[derive(Clone, Copy)]
struct Exit {
    status: ExitStatus,
    at: Timestamp,
    unprompted: bool,
}

struct Stopping {
    cause: EndCause,
    message: String,
    kill_at: BootTime,
    /// Whether what is left was asked to end.
    asked: bool,
    next_round: BootTime,
    gap: Duration,
    first_kill: Option<BootTime>,
    told_unkillable: bool,
}

impl Slot {
    fn new(shared: Arc<Shared>, number: u32, bell: Arc<Bell>) -> Self {
        Self {
            shared,
            number,
            bell,
            orphans: Orphans::new(),
            cradle: Cradle::new(),
            buffer: vec![0; READ_BYTES],
            dirs: None,
            port: None,
            plan: None,
            pid: None,
        }
    }

    fn serve(mut self) {
        loop {
            let task = self.shared.next(self.number);
            let end = match catch_unwind(AssertUnwindSafe(|| self.run(task))) {
                Ok(end) => end,
                Err(_) => self.repair(task),
            };
            self.shared.record(&[Record::Ended(Box::new(end))]);
            self.shared.done(self.number);
        }
    }

    /// One of our own faults must cost no other task anything: what is left of this one is killed, and how it ended is
    /// not known.
    fn repair(&mut self, task: TaskIndex) -> TaskEnd {
        note(&format!("own fault while task {task} ran"));
        let started = self.pid.is_some();
        loop {
            self.kill(task);
            if let Some(pid) = self.pid
                && wait(pid, false).is_some()
            {
                self.pid = None;
                self.shared.exited(self.number);
            }
            if self.pid.is_none() && self.is_empty(task) {
                break;
            }
            super::work::pause(20);
        }
        if let Some(dirs) = &mut self.dirs {
            dirs.abandon();
        }
        let message = "the shim failed while the task ran".to_owned();
        let mut end = self.not_run(task, EndCause::SupervisorLost, message);
        end.started = started;
        end.exit = Some(ExitStatus::Unknown);
        end
    }

    fn run(&mut self, task: TaskIndex) -> TaskEnd {
        let plan = match self.prepare(task) {
            Ok(plan) => plan,
            Err(error) => {
                if let Some(dirs) = &mut self.dirs {
                    dirs.abandon();
                }
                let message = format!("the node could not prepare the task: {error}");
                return self.not_run(task, EndCause::PrepareFailed, message);
            }
        };
        self.shared.record(&[Record::Began(task)]);
        let end = match self.spawn(task, &plan) {
            Ok(mut run) => {
                while !self.is_over(&mut run) {
                    self.wait(&mut run);
                }
                self.close(run)
            }
            Err(error) => {
                let cause = match error {
                    SpawnError::CannotExecute { .. } => EndCause::CannotExecute,
                    SpawnError::Machine(_) => EndCause::PrepareFailed,
                };
                let mut end = self.not_run(task, cause, error.to_string());
                end.exit = Some(ExitStatus::NotStarted);
                end.unprompted = true;
                end
            }
        };
        self.plan = Some(plan);
        end
    }

    fn not_run(&self, task: TaskIndex, cause: EndCause, message: String) -> TaskEnd {
        let now = self.shared.now();
        TaskEnd {
            task,
            started_at: None,
            started: false,
            exit: None,
            unprompted: false,
            exited_at: now,
            ended_at: now,
            cause,
            message,
            log: 0,
            outputs: false,
            warning: String::new(),
        }
    }

    // === start ===

    /// Directories, port and environment.
    fn prepare(&mut self, task: TaskIndex) -> io::Result<RankPlan> {
        let shared = &self.shared;
        if self.dirs.is_none() {
            let template = shared
                .file
                .spec
                .snapshot
                .map(|_| shared.dir.template().work());
            self.dirs = Some(SlotDirs::new(
                &shared.dir,
                self.number,
                shared.file.run_as.clone(),
                template,
                shared.trash.clone(),
            )?);
        }
        if let Some(dirs) = &mut self.dirs {
            dirs.prepare()?;
        }
        if !self.port.as_ref().is_some_and(HeldPort::is_usable) {
            let mut port = HeldPort::take()?;
            port.release();
            self.port = Some(port);
            self.plan = None;
        }
        match self.plan.take() {
            Some(mut plan) => {
                launch::set_task(&mut plan, task);
                Ok(plan)
            }
            None => self.plan(task),
        }
    }

    fn plan(&self, task: TaskIndex) -> io::Result<RankPlan> {
        let file = &self.shared.file;
        let dir = self.shared.dir.slot(self.number, task);
        let go = Go::alone(self.port.as_ref().map_or(0, HeldPort::port));
        let plans = launch::plan(&Context {
            attempt: dir.attempt(),
            spec: &file.spec,
            go: &go,
            interface: Some("lo"),
            dir: &dir,
            key: &file.key,
            run_as: file.run_as.as_ref(),
            inherited: &environment(),
            resume: false,
        });
        let first = plans.into_iter().next();
        first.ok_or_else(|| io::Error::other("the job has no processes"))
    }

    fn spawn(&mut self, task: TaskIndex, plan: &RankPlan) -> Result<Run, SpawnError> {
        let shared = &self.shared;
        let image = Image::new(plan)?;
        let work = shared.dir.slot(self.number, task).work();
        let tag = shared.marks.tag(task);
        let Child { started, pidfd } = self
            .cradle
            .spawn(&shared.nursery, &image, &work, tag)
            .map_err(|failed| failed.explain(plan))?;
        self.pid = Some(started.pid);
        shared.started(self.number, started.pid);
        let now = BootTime::now();
        Ok(Run {
            task,
            pid: started.pid,
            pidfd,
            stdout: Some(File::from(started.stdout)),
            stderr: Some(File::from(started.stderr)),
            log: TaskLog::new(shared.dir.log(task), shared.file.log_limit),
            started_at: shared.now(),
            tell_at: Some(now.after(STARTED_AFTER)),
            limit: shared.file.spec.time_limit.map(|limit| now.after(limit)),
            exit: None,
            stopping: None,
        })
    }

    // === what comes in ===

    /// Sleeps until something happens, and takes it in.
    fn wait(&mut self, run: &mut Run) {
        let timeout = poll_timeout(self.sleep(run));
        let input = PollFlags::POLLIN;
        let mut fds = Vec::with_capacity(4);
        fds.push(PollFd::new(self.bell.fd(), input));
        if run.exit.is_none() {
            fds.push(PollFd::new(run.pidfd.as_fd(), input));
        }
        let pipes = fds.len();
        for pipe in [&run.stdout, &run.stderr].into_iter().flatten() {
            fds.push(PollFd::new(pipe.as_fd(), input));
        }
        match poll(&mut fds, timeout) {
            Ok(0) => return,
            Ok(_) => {}
            Err(Errno::EINTR) => return,
            Err(error) => {
                // Only for want of kernel memory.
                note(&format!("cannot wait for a task: {error}"));
                return super::work::pause(100);
            }
        }
        let is_ready = |fd: &PollFd<'_>| fd.any() == Some(true);
        let rung = is_ready(&fds[0]);
        let ended = run.exit.is_none() && is_ready(&fds[1]);
        let written = fds[pipes..].iter().any(is_ready);
        drop(fds);
        if rung {
            self.bell.silence();
        }
        if written {
            self.read(run, READS_PER_TURN);
        }
        if ended {
            self.reap(run);
        }
    }

    /// How long nothing is to be done.
    fn sleep(&self, run: &Run) -> Option<Duration> {
        let now = BootTime::now();
        let stopping = run
            .stopping
            .as_ref()
            .map(|stopping| match stopping.first_kill {
                Some(_) => stopping.next_round,
                None if run.exit.is_some() => stopping.next_round.min(stopping.kill_at),
                None => stopping.kill_at,
            });
        let limit = run.limit.filter(|_| run.stopping.is_none());
        let due = [stopping, limit, run.tell_at].into_iter().flatten().min();
        let due = due.map(|due| now.until(due));
        let log = run.log.due().map(|due| due.since(self.shared.now()));
        due.into_iter().chain(log).min()
    }

    fn read(&mut self, run: &mut Run, reads: usize) {
        for (pipe, kind) in [
            (&mut run.stdout, LogKind::Stdout),
            (&mut run.stderr, LogKind::Stderr),
        ] {
            for _ in 0..reads {
                let Some(file) = pipe else {
                    break;
                };
                match file.read(&mut self.buffer) {
                    Ok(0) => *pipe = None,
                    Ok(length) => {
                        let (data, at) = (&self.buffer[..length], self.shared.now());
                        run.log.write(&self.shared.writer, kind, at, data);
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(_) => *pipe = None,
                }
            }
        }
    }

    fn reap(&mut self, run: &mut Run) {
        let Some(status) = wait(run.pid, false) else {
            return;
        };
        run.exit = Some(Exit {
            status: exit_status(status),
            at: self.shared.now(),
            unprompted: run.stopping.is_none(),
        });
        // Its number may go to another process now.
        self.pid = None;
        self.shared.exited(self.number);
    }

    // === end ===

    /// Draws the conclusions. Whether nothing of the task is left.
    fn is_over(&mut self, run: &mut Run) -> bool {
        let now = BootTime::now();
        if run.tell_at.is_some_and(|at| at <= now) && run.exit.is_none() {
            run.tell_at = None;
            self.shared.record(&[Record::Started {
                task: run.task,
                at: run.started_at,
            }]);
        }
        if run.log.due().is_some_and(|due| due <= self.shared.now()) {
            run.log.hand_over(&self.shared.writer);
        }
        self.decide(run, now);
        if run.exit.is_some() {
            run.tell_at = None;
            if self.is_empty(run.task) {
                return true;
            }
        }
        self.end(run, now);
        false
    }

    /// Begins the end, or hurries it; the first cause stays.
    fn decide(&self, run: &mut Run, now: BootTime) {
        let spec = &self.shared.file.spec;
        let begin = |cause, message, kill_at| Stopping {
            cause,
            message,
            kill_at,
            asked: false,
            next_round: now,
            gap: FIRST_ROUND_GAP,
            first_kill: None,
            told_unkillable: false,
        };
        if let (Some(exit), None) = (run.exit, &run.stopping) {
            let kill_at = now.after(spec.grace.min(LEFTOVER_GRACE));
            run.stopping = Some(if exit.status.is_success() {
                let message = "all ranks exited with code 0".to_owned();
                begin(EndCause::Completed, message, kill_at)
            } else {
                begin(
                    EndCause::RankFailed,
                    failure(&rank_end(exit)),
                    now.after(spec.grace),
                )
            });
        }
        let Some(order) = self.shared.stop_order() else {
            if run.stopping.is_none() && run.limit.is_some_and(|limit| limit <= now) {
                let limit = format_duration(spec.time_limit.unwrap_or_default());
                let message = format!("the time limit of {limit} passed");
                run.stopping = Some(begin(EndCause::TimeLimit, message, now.after(spec.grace)));
            }
            return;
        };
        match &mut run.stopping {
            Some(stopping) => stopping.kill_at = stopping.kill_at.min(order.kill_at),
            none => *none = Some(begin(EndCause::Stopped, order.message, order.kill_at)),
        }
    }

    /// The next step of ending what is left, if one is due.
    fn end(&mut self, run: &mut Run, now: BootTime) {
        let Some(stopping) = &mut run.stopping else {
            return;
        };
        if !stopping.asked {
            stopping.asked = true;
            stopping.next_round = now.after(stopping.gap);
            let whose = Whose::Task(run.task);
            return terminate(&self.shared.marks, whose, || self.shared.running());
        }
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
        if !stopping.told_unkillable && first.until(now) > UNKILLABLE_AFTER {
            stopping.told_unkillable = true;
            let task = run.task;
            let living = find(&self.shared.marks, Whose::Task(task), || {
                self.shared.running()
            });
            let (left, more) = process::left(&living);
            let left: Vec<String> = left
                .iter()
                .map(|left| format!("pid {} ({}), state {}", left.pid, left.name, left.state))
                .collect();
            note(&format!(
                "processes of task {task} outlive SIGKILL, its slot stays in use: {} and {more} more",
                left.join("; ")
            ));
        }
        self.kill(run.task);
    }

    fn kill(&self, task: TaskIndex) {
        kill(&self.shared.marks, Whose::Task(task), || {
            self.shared.running()
        });
    }

    /// Whether nothing of a task is left whose own process is gone.
    fn is_empty(&self, task: TaskIndex) -> bool {
        let running = || self.shared.running();
        self.orphans.are_none(running)
            || find(&self.shared.marks, Whose::Task(task), running).is_empty()
    }

    /// Brings in the last output and what the task left.
    fn close(&mut self, mut run: Run) -> TaskEnd {
        self.read(&mut run, LAST_READS);
        drop((run.stdout, run.stderr));
        let left = match &mut self.dirs {
            Some(dirs) => dirs.collect(run.task),
            None => Default::default(),
        };
        let ended_at = self.shared.now();
        let log = run.log.finish(&self.shared.writer, ended_at);
        let unmarked: Vec<_> = log.unmarked.into_iter().map(|log| (0, log)).collect();
        let warnings = [output::warning(&unmarked), left.warning];
        let warnings = warnings.into_iter().filter(|text| !text.is_empty());
        let exit = run.exit.unwrap_or(Exit {
            status: ExitStatus::Unknown,
            at: ended_at,
            unprompted: false,
        });
        let (cause, message) = match run.stopping {
            Some(stopping) => (stopping.cause, stopping.message),
            None => (EndCause::SupervisorLost, String::new()),
        };
        TaskEnd {
            task: run.task,
            started_at: Some(run.started_at),
            started: true,
            exit: Some(exit.status),
            unprompted: exit.unprompted,
            exited_at: exit.at,
            ended_at,
            cause,
            message,
            log: log.length,
            outputs: left.outputs,
            warning: warnings.collect::<Vec<_>>().join("; "),
        }
    }
}

impl Stopping {
    fn next_round(&mut self, now: BootTime) {
        self.next_round = now.after(self.gap);
        self.gap = (self.gap * 2).min(MAX_ROUND_GAP);
    }
}

fn rank_end(exit: Exit) -> RankEnd {
    RankEnd {
        rank: 0,
        exit: exit.status,
        at: exit.at,
        unprompted: exit.unprompted,
        oom_killed: false,
    }
}
