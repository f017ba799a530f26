//! Carriers and the processes of their tasks, as the real carrier runs them: one process for many tasks, a journal that
//! outlives it, slots that run one task after the other, tasks that are given back when they waited too long. What the
//! agent makes of a carrier and its journal is in `bundles.rs`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use trainyard_common::bundle::{BundlePhase, DesiredBundle, TaskRange, TaskSet};
use trainyard_common::ids::{AttemptNumber, AttemptRef, BundleRef, TaskIndex};
use trainyard_common::member::{EndCause, MemberSpec};
use trainyard_common::state::ExitStatus;
use trainyard_common::time::Timestamp;

use super::clock::{Micros, ProcessClock, micros, ms, secs};
use super::host::{Process, Role};
use super::world::{Happening, World};

/// As in the real carrier.
const RETURN_AFTER: Micros = secs(5);
const STARTED_AFTER: Micros = ms(500);
const LEFTOVER_GRACE: Micros = secs(5);
/// How soon a journal that could not be written is written again.
const RETRY: Micros = secs(1);
/// Records that fit into the space that was set aside.
const RESERVE: u32 = 30;

/// A record of the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Entry {
    Handed(TaskRange),
    Began(TaskIndex),
    Started { task: TaskIndex, at: Timestamp },
    Ended(Box<TaskEnd>),
    Returned(TaskRange),
    Skipped { to: u64 },
    Over { message: String },
}

impl Entry {
    pub(crate) fn is_report(&self) -> bool {
        match self {
            Self::Started { .. } | Self::Ended(_) | Self::Returned(_) => true,
            Self::Handed(_) | Self::Began(_) | Self::Skipped { .. } | Self::Over { .. } => false,
        }
    }
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TaskEnd {
    pub(crate) task: TaskIndex,
    pub(crate) started_at: Option<Timestamp>,
    pub(crate) started: bool,
    pub(crate) exit: Option<ExitStatus>,
    pub(crate) unprompted: bool,
    pub(crate) at: Timestamp,
    pub(crate) cause: EndCause,
    pub(crate) message: String,
    /// It left a log or outputs.
    pub(crate) left: bool,
}

/// A bundle's directory.
#[derive(Debug, Clone)]
pub(crate) struct BundleDir {
    pub(crate) spec: MemberSpec,
    /// The boot in which it was made.
    pub(crate) boot: u64,
    /// `shim.json`: a carrier came up.
    pub(crate) shim: bool,
    pub(crate) journal: Vec<Entry>,
    /// Records that a power loss leaves there for sure.
    pub(crate) synced: usize,
}

/// What the records so far come to.
#[derive(Debug, Default)]
pub(crate) struct Account {
    pub(crate) handed: TaskSet,
    pub(crate) open: TaskSet,
    pub(crate) begun: BTreeSet<TaskIndex>,
    pub(crate) over: bool,
}

impl BundleDir {
    pub(crate) fn account(&self) -> Account {
        let mut account = Account::default();
        for entry in &self.journal {
            match entry {
                Entry::Handed(range) => {
                    account.handed.insert(*range);
                    account.open.insert(*range);
                }
                Entry::Began(task) => drop(account.begun.insert(*task)),
                Entry::Started { .. } | Entry::Skipped { .. } => {}
                Entry::Ended(end) => {
                    account.open.remove(end.task);
                    account.begun.remove(&end.task);
                }
                Entry::Returned(range) => {
                    for task in range.tasks() {
                        account.open.remove(task);
                    }
                }
                Entry::Over { .. } => account.over = true,
            }
        }
        account
    }
}

/// Those of `wanted` that are not in `known`, as ranges.
pub(crate) fn missing(wanted: &TaskSet, known: &TaskSet) -> Vec<TaskRange> {
    let new = wanted.tasks().filter(|task| !known.contains(*task));
    let new: TaskSet = new.map(one).collect();
    new.ranges().to_vec()
}

fn one(task: TaskIndex) -> TaskRange {
    TaskRange {
        first: task,
        last: task,
    }
}

/// The attempt that a task has in a bundle.
pub(crate) fn attempt_of(bundle: BundleRef, task: TaskIndex) -> AttemptRef {
    AttemptRef {
        job: bundle.job,
        task,
        attempt: AttemptNumber(1),
    }
}

#[derive(Debug)]
enum RunStage {
    Preparing,
    /// It may have been started from now on.
    Began,
    Running,
    /// Nothing of it is left; that is being recorded.
    Ending(Box<TaskEnd>),
}

#[derive(Debug, Clone, Copy)]
struct Exit {
    status: ExitStatus,
    at: Timestamp,
    unprompted: bool,
}

#[derive(Debug, Clone, Copy)]
struct Stopping {
    cause: EndCause,
    kill_at: Micros,
    asked: bool,
}

/// A task in a slot.
#[derive(Debug)]
struct Run {
    stage: RunStage,
    uid: Option<u64>,
    started_at: Timestamp,
    tell_at: Option<Micros>,
    limit: Option<Micros>,
    exit: Option<Exit>,
    stopping: Option<Stopping>,
}

/// A carrier's process.
#[derive(Debug)]
pub(crate) struct Carrier {
    pub(crate) bundle: BundleRef,
    uid: u64,
    spec: MemberSpec,
    clock: ProcessClock,
    /// It holds the lock of the directory.
    pub(crate) up: bool,
    /// What agents told it and it has not read.
    pub(crate) inbox: VecDeque<DesiredBundle>,
    slots: usize,
    closed: bool,
    stopped: bool,
    handed: TaskSet,
    queue: VecDeque<(TaskRange, Micros)>,
    running: BTreeMap<TaskIndex, Run>,
    kill_at: Option<Micros>,
    reserve: Option<u32>,
    told: Option<usize>,
}

/// What a carrier does next.
#[derive(Debug, Clone, Copy)]
pub(crate) enum CarrierStep {
    Up,
    /// Its main thread looks around.
    Turn,
    /// The thread of a task looks around.
    Task(TaskIndex),
}

impl World {
    fn carry(&mut self, wait: Micros, host: usize, serial: u64, step: CarrierStep) {
        self.after(wait, Happening::Carrier(host, serial, step));
    }

    /// The carrier that has a bundle, by number.
    pub(crate) fn carrier_of(&self, index: usize, bundle: BundleRef) -> Option<u64> {
        let mut carriers = self.hosts[index].carriers.iter();
        carriers
            .find(|(_, carrier)| carrier.up && carrier.bundle == bundle)
            .map(|(serial, _)| *serial)
    }

    /// A carrier's process is made. Its number.
    pub(crate) fn start_carrier(&mut self, index: usize, bundle: BundleRef) -> Option<u64> {
        let (serial, uid) = (self.next_serial(), self.next_serial());
        let now = self.now;
        let host = &mut self.hosts[index];
        let spec = host.disk.bundles.get(&bundle)?.spec.clone();
        let process = Process {
            pid: host.pid(),
            attempt: attempt_of(bundle, TaskIndex(0)),
            bundle: Some(bundle),
            job: spec.job_name.clone(),
            role: Role::Shim,
            ignores_term: true,
            stuck_for: 0,
            killed: false,
        };
        host.processes.insert(uid, process);
        let carrier = Carrier {
            bundle,
            uid,
            spec,
            clock: host.clock.start(now),
            up: false,
            inbox: VecDeque::new(),
            slots: 0,
            closed: false,
            stopped: false,
            handed: TaskSet::default(),
            queue: VecDeque::new(),
            running: BTreeMap::new(),
            kill_at: None,
            reserve: None,
            told: None,
        };
        host.carriers.insert(serial, carrier);
        let wait = self.rng.skewed(ms(2), ms(800));
        self.carry(wait, index, serial, CarrierStep::Up);
        Some(serial)
    }

    pub(crate) fn carrier_steps(&mut self, index: usize, serial: u64, step: CarrierStep) {
        if !self.hosts[index].carriers.contains_key(&serial) {
            return;
        }
        match step {
            CarrierStep::Up => self.carrier_up(index, serial),
            CarrierStep::Turn => self.carrier_turns(index, serial),
            CarrierStep::Task(task) => self.task_turns(index, serial, task),
        }
    }

    fn carrier_up(&mut self, index: usize, serial: u64) {
        let dies = self.goes_wrong(self.swarm.chances.spawn_fails);
        let bundle = self.hosts[index].carriers[&serial].bundle;
        let other = self.carrier_of(index, bundle).is_some();
        let host = &mut self.hosts[index];
        let late = match host.disk.bundles.get(&bundle) {
            Some(dir) => dir.shim || dir.account().over,
            None => true,
        };
        if other || late || dies || host.disk_full {
            self.see(if other || late {
                "late carrier left"
            } else {
                "carrier died without a word"
            });
            return self.carrier_leaves(index, serial);
        }
        if let Some(dir) = host.disk.bundles.get_mut(&bundle) {
            dir.shim = true;
        }
        if let Some(carrier) = host.carriers.get_mut(&serial) {
            carrier.up = true;
        }
        self.see("carrier up");
        self.carrier_turns(index, serial);
    }

    /// The carrier's process is no more.
    fn carrier_leaves(&mut self, index: usize, serial: u64) {
        let host = &mut self.hosts[index];
        if let Some(carrier) = host.carriers.remove(&serial) {
            host.processes.remove(&carrier.uid);
            self.link_broken(index, carrier.bundle, serial);
        }
    }

    /// A carrier is killed. The processes of its tasks are tied to its life; what they started is not.
    pub(crate) fn kill_carrier(&mut self, index: usize, serial: u64) {
        let Some(carrier) = self.hosts[index].carriers.get(&serial) else {
            return;
        };
        let bundle = carrier.bundle;
        let uids: Vec<u64> = carrier.running.values().filter_map(|run| run.uid).collect();
        self.see("carrier killed");
        if !uids.is_empty() {
            self.see("carrier killed with tasks");
        }
        self.say(format!("host {index}: the carrier of {bundle} is killed"));
        for uid in uids {
            let stuck = self.hosts[index].processes.get(&uid).map(|p| p.stuck_for);
            let (host, exit, oom) = (index, ExitStatus::Signal(9), false);
            self.after(
                ms(1) + stuck.unwrap_or(0),
                Happening::ProcessEnds {
                    host,
                    uid,
                    exit,
                    oom,
                },
            );
        }
        self.carrier_leaves(index, serial);
    }

    /// Appends to the journal. False if the disk refuses: to be tried again.
    fn append(&mut self, index: usize, serial: u64, entries: Vec<Entry>) -> bool {
        let host = &mut self.hosts[index];
        let Some(carrier) = host.carriers.get_mut(&serial) else {
            return false;
        };
        if host.disk_full {
            match &mut carrier.reserve {
                Some(left) if *left > 0 => *left -= 1,
                Some(_) => return false,
                none => {
                    *none = Some(RESERVE);
                    self.see("carrier wrote from its reserve");
                    return false;
                }
            }
        }
        if let Some(dir) = host.disk.bundles.get_mut(&carrier.bundle) {
            dir.journal.extend(entries);
        }
        true
    }

    fn carrier_turns(&mut self, index: usize, serial: u64) {
        let now = self.now;
        if !self.hosts[index].carriers[&serial].up {
            return;
        }
        while let Some(order) = self.hosts[index].carriers[&serial].inbox.front().cloned() {
            if !self.obey(index, serial, order) {
                return self.carry(RETRY, index, serial, CarrierStep::Turn);
            }
            if let Some(carrier) = self.hosts[index].carriers.get_mut(&serial) {
                carrier.inbox.pop_front();
            }
        }
        let carrier = &self.hosts[index].carriers[&serial];
        let old = |since: Micros| since + RETURN_AFTER <= now;
        let stopped = carrier.stopped;
        let waited: Vec<TaskRange> = carrier
            .queue
            .iter()
            .take_while(|(_, since)| stopped || old(*since))
            .map(|(range, _)| *range)
            .collect();
        if !waited.is_empty() {
            let count = waited.len();
            let entries = waited.into_iter().map(Entry::Returned).collect();
            if !self.append(index, serial, entries) {
                return self.carry(RETRY, index, serial, CarrierStep::Turn);
            }
            if !stopped {
                self.see("tasks returned after waiting");
            }
            if let Some(carrier) = self.hosts[index].carriers.get_mut(&serial) {
                carrier.queue.drain(..count);
            }
        }
        let carrier = &self.hosts[index].carriers[&serial];
        let idle = carrier.queue.is_empty() && carrier.running.is_empty();
        if idle && (carrier.closed || carrier.stopped) {
            return self.carrier_ends(index, serial);
        }
        self.fill_slots(index, serial);
        self.carrier_tells(index, serial);
        let carrier = &self.hosts[index].carriers[&serial];
        if let Some((_, since)) = carrier.queue.front() {
            let at = since + RETURN_AFTER;
            self.at(at, Happening::Carrier(index, serial, CarrierStep::Turn));
        }
    }

    fn obey(&mut self, index: usize, serial: u64, desired: DesiredBundle) -> bool {
        let now = self.now;
        let carrier = &self.hosts[index].carriers[&serial];
        let new = missing(&desired.tasks, &carrier.handed);
        let stopped = carrier.stopped || matches!(desired.phase, BundlePhase::Stop(_));
        let mut entries: Vec<Entry> = new.iter().copied().map(Entry::Handed).collect();
        if stopped {
            entries.extend(new.iter().copied().map(Entry::Returned));
        }
        if !entries.is_empty() && !self.append(index, serial, entries) {
            return false;
        }
        let host = &mut self.hosts[index];
        let Some(carrier) = host.carriers.get_mut(&serial) else {
            return false;
        };
        carrier.slots = usize::try_from(desired.slots).unwrap_or(1);
        let more = !carrier.handed.is_empty() && !new.is_empty() && !stopped;
        for range in &new {
            carrier.handed.insert(*range);
            if !stopped {
                carrier.queue.push_back((*range, now));
            }
        }
        carrier.closed |= desired.phase == BundlePhase::Close;
        let mut rung = Vec::new();
        if let BundlePhase::Stop(stop) = desired.phase {
            carrier.stopped = true;
            let kill_at = now + micros(stop.grace);
            carrier.kill_at = Some(carrier.kill_at.map_or(kill_at, |at| at.min(kill_at)));
            rung.extend(carrier.running.keys().copied());
        }
        if more {
            self.see("carrier handed more tasks");
        }
        if !rung.is_empty() {
            self.see("carrier told to stop while tasks run");
        }
        for task in rung {
            self.carry(50, index, serial, CarrierStep::Task(task));
        }
        true
    }

    fn fill_slots(&mut self, index: usize, serial: u64) {
        loop {
            let Some(carrier) = self.hosts[index].carriers.get_mut(&serial) else {
                return;
            };
            if carrier.running.len() >= carrier.slots {
                return;
            }
            let Some((range, _)) = carrier.queue.front_mut() else {
                return;
            };
            let task = range.first;
            if range.first == range.last {
                carrier.queue.pop_front();
            } else {
                range.first = task.next();
            }
            let run = Run {
                stage: RunStage::Preparing,
                uid: None,
                started_at: Timestamp(0),
                tell_at: None,
                limit: None,
                exit: None,
                stopping: None,
            };
            carrier.running.insert(task, run);
            let wait = self.rng.skewed(100, ms(5));
            self.carry(wait, index, serial, CarrierStep::Task(task));
        }
    }

    fn carrier_ends(&mut self, index: usize, serial: u64) {
        let bundle = self.hosts[index].carriers[&serial].bundle;
        if self.kill_bundle(index, bundle) {
            return self.carry(ms(50), index, serial, CarrierStep::Turn);
        }
        let message = String::new();
        if !self.append(index, serial, vec![Entry::Over { message }]) {
            return self.carry(RETRY, index, serial, CarrierStep::Turn);
        }
        if let Some(dir) = self.hosts[index].disk.bundles.get_mut(&bundle) {
            dir.synced = dir.journal.len();
        }
        self.see("carrier done");
        self.carrier_tells(index, serial);
        self.carrier_leaves(index, serial);
    }

    /// Kills what lives of a bundle but its carrier. Whether there was anything.
    pub(crate) fn kill_bundle(&mut self, index: usize, bundle: BundleRef) -> bool {
        let living: BTreeSet<AttemptRef> = self.hosts[index]
            .processes
            .values()
            .filter(|process| process.bundle == Some(bundle) && process.role != Role::Shim)
            .map(|process| process.attempt)
            .collect();
        for attempt in &living {
            self.kill_tree(index, *attempt);
        }
        !living.is_empty()
    }

    fn carrier_tells(&mut self, index: usize, serial: u64) {
        let host = &mut self.hosts[index];
        let Some(carrier) = host.carriers.get_mut(&serial) else {
            return;
        };
        let bundle = carrier.bundle;
        let length = host.disk.bundles.get(&bundle).map(|dir| dir.journal.len());
        if carrier.told != length {
            carrier.told = length;
            self.link_hears(index, bundle, serial);
        }
    }

    // === tasks ===

    fn run_mut(&mut self, index: usize, serial: u64, task: TaskIndex) -> Option<&mut Run> {
        let carrier = self.hosts[index].carriers.get_mut(&serial)?;
        carrier.running.get_mut(&task)
    }

    fn task_turns(&mut self, index: usize, serial: u64, task: TaskIndex) {
        let Some(run) = self.run_mut(index, serial, task) else {
            return;
        };
        let written = match &run.stage {
            RunStage::Preparing => self.task_prepares(index, serial, task),
            RunStage::Began => {
                self.task_starts(index, serial, task);
                if self.goes_wrong(self.swarm.chances.spawn_fails / 16) {
                    self.see("carrier killed as it starts a task");
                    self.kill_carrier(index, serial);
                }
                true
            }
            RunStage::Running => self.task_runs(index, serial, task),
            RunStage::Ending(end) => {
                let end = end.clone();
                self.task_ends(index, serial, task, end)
            }
        };
        if !written {
            self.carry(RETRY, index, serial, CarrierStep::Task(task));
        }
    }

    fn task_prepares(&mut self, index: usize, serial: u64, task: TaskIndex) -> bool {
        if self.goes_wrong(self.swarm.chances.spawn_fails / 4) {
            self.see("task could not be prepared");
            self.task_not_run(index, serial, task, EndCause::PrepareFailed, None);
            return true;
        }
        if !self.append(index, serial, vec![Entry::Began(task)]) {
            return false;
        }
        if let Some(run) = self.run_mut(index, serial, task) {
            run.stage = RunStage::Began;
        }
        let wait = self.rng.skewed(50, ms(2));
        self.carry(wait, index, serial, CarrierStep::Task(task));
        true
    }

    fn task_not_run(
        &mut self,
        index: usize,
        serial: u64,
        task: TaskIndex,
        cause: EndCause,
        exit: Option<ExitStatus>,
    ) {
        let now = self.now;
        let at = self.hosts[index].carriers[&serial].clock.now(now);
        let end = TaskEnd {
            task,
            started_at: None,
            started: false,
            exit,
            unprompted: exit.is_some(),
            at,
            cause,
            message: "it could not be started".to_owned(),
            left: false,
        };
        if let Some(run) = self.run_mut(index, serial, task) {
            run.stage = RunStage::Ending(Box::new(end));
        }
        self.carry(100, index, serial, CarrierStep::Task(task));
    }

    fn task_starts(&mut self, index: usize, serial: u64, task: TaskIndex) {
        let now = self.now;
        if self.goes_wrong(self.swarm.chances.rank_fails / 8) {
            self.see("task could not be executed");
            let exit = Some(ExitStatus::NotStarted);
            return self.task_not_run(index, serial, task, EndCause::CannotExecute, exit);
        }
        let carrier = &self.hosts[index].carriers[&serial];
        let (bundle, spec, clock) = (carrier.bundle, carrier.spec.clone(), carrier.clock);
        let uid = self.start_task(index, bundle, task, &spec);
        let limit = spec.time_limit.map(|limit| now + micros(limit));
        let Some(run) = self.run_mut(index, serial, task) else {
            return;
        };
        run.stage = RunStage::Running;
        run.uid = Some(uid);
        run.started_at = clock.now(now);
        run.tell_at = Some(now + STARTED_AFTER);
        run.limit = limit;
        self.carry(STARTED_AFTER, index, serial, CarrierStep::Task(task));
        if let Some(at) = limit {
            let step = CarrierStep::Task(task);
            self.at(at, Happening::Carrier(index, serial, step));
        }
        // It may have been stopped meanwhile.
        self.carry(0, index, serial, CarrierStep::Task(task));
    }

    fn start_task(
        &mut self,
        index: usize,
        bundle: BundleRef,
        task: TaskIndex,
        spec: &MemberSpec,
    ) -> u64 {
        let attempt = attempt_of(bundle, task);
        let uid = self.next_serial();
        let nasty = self.goes_wrong(self.swarm.chances.rank_nasty / 2);
        let ignores_term = nasty && self.rng.chance(400);
        let stuck_for = match nasty && self.rng.chance(300) {
            true => self.rng.between(secs(1), secs(60)),
            false => 0,
        };
        let daemon = nasty && self.rng.chance(400);
        let quick = spec.command.first().is_some_and(|word| word == "quick");
        let fate = match self.scripted_fate(&spec.command, attempt, 0) {
            Some(fate) => (fate.after, fate.exit, fate.oom),
            None => self.task_fate(quick),
        };
        let host = &mut self.hosts[index];
        let process = Process {
            pid: host.pid(),
            attempt,
            bundle: Some(bundle),
            job: spec.job_name.clone(),
            role: Role::Rank(0),
            ignores_term,
            stuck_for,
            killed: false,
        };
        host.processes.insert(uid, process.clone());
        self.say(format!("host {index} starts {attempt} of {bundle}"));
        self.check_task_start(index, bundle, task, spec);
        self.check_spawn(index, attempt, uid, 0);
        if daemon {
            self.see("task that leaves a process behind");
            let child = self.next_serial();
            let host = &mut self.hosts[index];
            let pid = host.pid();
            let role = Role::Child;
            host.processes.insert(
                child,
                Process {
                    pid,
                    role,
                    ..process
                },
            );
        }
        let (host, (after, exit, oom)) = (index, fate);
        self.after(
            after,
            Happening::ProcessEnds {
                host,
                uid,
                exit,
                oom,
            },
        );
        uid
    }

    fn task_fate(&mut self, quick: bool) -> (Micros, ExitStatus, bool) {
        if !quick || self.rng.chance(40) {
            let fate = self.fate();
            return (fate.after, fate.exit, fate.oom);
        }
        let exit = match self.goes_wrong(self.swarm.chances.rank_fails) {
            true => ExitStatus::Code(4),
            false => ExitStatus::Code(0),
        };
        (self.rng.skewed(ms(1), ms(150)), exit, false)
    }

    /// A task's process ended: its carrier, if it lives, notes how.
    pub(crate) fn task_exited(
        &mut self,
        index: usize,
        process: &Process,
        uid: u64,
        exit: ExitStatus,
    ) {
        let now = self.now;
        let found = self.hosts[index].carriers.iter_mut().find(|(_, carrier)| {
            Some(carrier.bundle) == process.bundle
                && carrier.running.contains_key(&process.attempt.task)
        });
        let Some((serial, carrier)) = found else {
            return;
        };
        let (serial, task) = (*serial, process.attempt.task);
        let at = carrier.clock.now(now);
        if let Some(run) = carrier.running.get_mut(&task)
            && run.uid == Some(uid)
        {
            run.uid = None;
            let unprompted = run.stopping.is_none();
            run.exit = Some(Exit {
                status: exit,
                at,
                unprompted,
            });
        }
        self.carry(100, index, serial, CarrierStep::Task(task));
    }

    /// What the thread of a running task does. False if the journal could not be written.
    fn task_runs(&mut self, index: usize, serial: u64, task: TaskIndex) -> bool {
        let now = self.now;
        let bundle = self.hosts[index].carriers[&serial].bundle;
        let attempt = attempt_of(bundle, task);
        let alive = self.hosts[index].lives(attempt);
        let order = self.hosts[index].carriers[&serial].kill_at;
        let grace = micros(self.hosts[index].carriers[&serial].spec.grace);
        let Some(run) = self.run_mut(index, serial, task) else {
            return true;
        };
        if run.exit.is_none() && run.tell_at.is_some_and(|at| at <= now) {
            let at = run.started_at;
            if !self.append(index, serial, vec![Entry::Started { task, at }]) {
                return false;
            }
            self.see("long task told of");
            self.carry(0, index, serial, CarrierStep::Turn);
        }
        let Some(run) = self.run_mut(index, serial, task) else {
            return true;
        };
        if run.tell_at.is_some_and(|at| at <= now) {
            run.tell_at = None;
        }
        let begin = |cause, kill_at| Stopping {
            cause,
            kill_at,
            asked: false,
        };
        if let (Some(exit), None) = (run.exit, &run.stopping) {
            run.stopping = Some(match exit.status.is_success() {
                true => begin(EndCause::Completed, now + grace.min(LEFTOVER_GRACE)),
                false => begin(EndCause::RankFailed, now + grace),
            });
        }
        match (order, &mut run.stopping) {
            (Some(kill_at), Some(stopping)) => stopping.kill_at = stopping.kill_at.min(kill_at),
            (Some(kill_at), none) => *none = Some(begin(EndCause::Stopped, kill_at)),
            (None, None) if run.limit.is_some_and(|limit| limit <= now) => {
                run.stopping = Some(begin(EndCause::TimeLimit, now + grace));
            }
            (None, _) => {}
        }
        let Some(stopping) = run.stopping else {
            return true;
        };
        if let Some(exit) = run.exit
            && !alive
        {
            self.task_over(index, serial, task, exit, stopping.cause);
            return true;
        }
        if let Some(stopping) = &mut run.stopping {
            stopping.asked = true;
        }
        if stopping.kill_at <= now {
            self.kill_tree(index, attempt);
            self.carry(ms(200), index, serial, CarrierStep::Task(task));
        } else {
            if !stopping.asked {
                self.terminate_tree(index, attempt);
            }
            let step = CarrierStep::Task(task);
            self.at(stopping.kill_at, Happening::Carrier(index, serial, step));
        }
        true
    }

    fn task_over(
        &mut self,
        index: usize,
        serial: u64,
        task: TaskIndex,
        exit: Exit,
        cause: EndCause,
    ) {
        let left = self.rng.chance(300);
        let Some(run) = self.run_mut(index, serial, task) else {
            return;
        };
        let end = TaskEnd {
            task,
            started_at: Some(run.started_at),
            started: true,
            exit: Some(exit.status),
            unprompted: exit.unprompted,
            at: exit.at,
            cause,
            message: String::new(),
            left,
        };
        run.stage = RunStage::Ending(Box::new(end));
        self.carry(50, index, serial, CarrierStep::Task(task));
    }

    fn task_ends(&mut self, index: usize, serial: u64, task: TaskIndex, end: Box<TaskEnd>) -> bool {
        if !self.append(index, serial, vec![Entry::Ended(end)]) {
            return false;
        }
        self.see("task ended in a bundle");
        if let Some(carrier) = self.hosts[index].carriers.get_mut(&serial) {
            carrier.running.remove(&task);
        }
        self.carry(20, index, serial, CarrierStep::Turn);
        true
    }
}
