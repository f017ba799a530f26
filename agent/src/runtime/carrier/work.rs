//! What the threads of a carrier share: the tasks that wait, those that run, the journal, and the bells that wake each
//! other up. Decides who takes which task, and nothing about how one is run.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollTimeout, poll};
use trainyard_common::bundle::{TaskRange, TaskSet};
use trainyard_common::ids::TaskIndex;
use trainyard_common::time::Timestamp;
use trainyard_transport::clock::{BootTime, Clock};

use super::super::shim::note;
use super::birth::Nursery;
use super::journal::{Journal, Record};
use super::output::Writer;
use super::processes::{Marks, Running};
use super::{BundleDir, BundleFile};

/// How often a journal that could not be written (a full disk) is written again.
const RETRY_MS: u16 = 1000;

/// Wakes a thread that polls.
#[derive(Debug)]
pub(super) struct Bell {
    reader: io::PipeReader,
    writer: io::PipeWriter,
}

impl Bell {
    pub(super) fn new() -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self { reader, writer })
    }

    /// Never waits: a bell that is full has been rung.
    pub(super) fn ring(&self) {
        let _ = (&self.writer).write(&[0]);
    }

    pub(super) fn silence(&self) {
        while matches!((&self.reader).read(&mut [0; 64]), Ok(64)) {}
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

/// All that is shared.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) dir: BundleDir,
    pub(super) file: BundleFile,
    pub(super) clock: Clock,
    pub(super) nursery: Nursery,
    pub(super) marks: Marks,
    pub(super) writer: Writer,
    /// What is to be deleted.
    pub(super) trash: SyncSender<std::path::PathBuf>,
    /// Rung when the journal grew, or a task is over, and nobody was told yet.
    pub(super) bell: Bell,
    rung: AtomicBool,
    journal: Mutex<Journal>,
    desk: Mutex<Desk>,
    /// Somebody may take a task.
    waiting: Condvar,
}

/// Tasks that wait and tasks that run.
#[derive(Debug, Default)]
pub(super) struct Desk {
    /// In order, each since when.
    queue: VecDeque<(TaskRange, BootTime)>,
    pub(super) handed: TaskSet,
    slots: Vec<Slot>,
    /// By slot.
    running: BTreeMap<u32, Running>,
    stop: Option<StopOrder>,
    /// Slots that wait for a task.
    idle: usize,
}

#[derive(Debug)]
struct Slot {
    bell: Arc<Bell>,
}

/// That everything is to end.
#[derive(Debug, Clone)]
pub(super) struct StopOrder {
    pub(super) message: String,
    /// When SIGTERM has had its time.
    pub(super) kill_at: BootTime,
}

/// What a carrier begins with.
pub(super) struct Parts {
    pub(super) dir: BundleDir,
    pub(super) file: BundleFile,
    pub(super) nursery: Nursery,
    pub(super) writer: Writer,
    pub(super) trash: SyncSender<std::path::PathBuf>,
    pub(super) journal: Journal,
}

impl Shared {
    pub(super) fn new(parts: Parts) -> io::Result<Self> {
        Ok(Self {
            marks: Marks::new(&parts.file.key),
            dir: parts.dir,
            file: parts.file,
            clock: Clock::start(),
            nursery: parts.nursery,
            writer: parts.writer,
            trash: parts.trash,
            bell: Bell::new()?,
            rung: AtomicBool::new(false),
            journal: Mutex::new(parts.journal),
            desk: Mutex::default(),
            waiting: Condvar::new(),
        })
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        // Every change is complete before anything can panic.
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // === the journal ===

    /// Writes what happened, however long that takes, and has it told.
    pub(super) fn record(&self, records: &[Record]) {
        loop {
            let result = self.journal().append(records);
            match result {
                Ok(()) => break,
                Err(error) => {
                    note(&format!("the journal could not be written: {error}"));
                    // Space that was set aside for this very moment.
                    let _ = std::fs::remove_file(self.dir.shim().reserve());
                    pause(RETRY_MS);
                }
            }
        }
        if records.iter().any(Record::is_report) {
            self.ring();
        }
    }

    pub(super) fn journal_length(&self) -> u64 {
        self.journal().length()
    }

    pub(super) fn sync(&self) {
        let _ = self.journal().sync();
    }

    /// Wakes the main thread, once until it looks.
    fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            self.bell.ring();
        }
    }

    /// From now on it is rung again.
    pub(super) fn answer(&self) {
        self.rung.store(false, Ordering::Release);
    }

    // === tasks ===

    /// Tasks to be run, in this order, behind those that wait.
    pub(super) fn add(&self, ranges: &[TaskRange], now: BootTime) {
        let mut desk = self.desk();
        for range in ranges {
            desk.handed.insert(*range);
            desk.queue.push_back((*range, now));
        }
        drop(desk);
        self.waiting.notify_all();
    }

    pub(super) fn handed(&self) -> TaskSet {
        self.desk().handed.clone()
    }

    /// These will never wait here.
    pub(super) fn refuse(&self, ranges: &[TaskRange]) {
        let mut desk = self.desk();
        ranges.iter().for_each(|range| desk.handed.insert(*range));
    }

    /// Waits for a task for a slot, which has it from now on.
    pub(super) fn next(&self, slot: u32) -> TaskIndex {
        let mut desk = self.desk();
        loop {
            if let Some(task) = desk.pop() {
                let running = Running {
                    task,
                    pid: None,
                    fertile: true,
                };
                desk.running.insert(slot, running);
                return task;
            }
            desk.idle += 1;
            desk = self
                .waiting
                .wait(desk)
                .unwrap_or_else(PoisonError::into_inner);
            desk.idle -= 1;
        }
    }

    /// The slot's task has a process now.
    pub(super) fn started(&self, slot: u32, pid: i32) {
        if let Some(running) = self.desk().running.get_mut(&slot) {
            running.pid = Some(pid);
        }
    }

    /// That process is gone, and its number may go to another one.
    pub(super) fn exited(&self, slot: u32) {
        if let Some(running) = self.desk().running.get_mut(&slot) {
            running.pid = None;
            running.fertile = false;
        }
    }

    /// The slot's task is over, and that is recorded.
    pub(super) fn done(&self, slot: u32) {
        let mut desk = self.desk();
        desk.running.remove(&slot);
        let last = desk.running.is_empty() && desk.queue.is_empty();
        drop(desk);
        if last {
            self.ring();
        }
    }

    pub(super) fn running(&self) -> Vec<Running> {
        self.desk().running.values().copied().collect()
    }

    /// Whether no task runs or waits.
    pub(super) fn is_idle(&self) -> bool {
        let desk = self.desk();
        desk.running.is_empty() && desk.queue.is_empty()
    }

    /// How many more slots could be used, up to `most`; each is to be added.
    pub(super) fn wanted_slots(&self, most: u32) -> usize {
        let desk = self.desk();
        let waiting: u64 = desk
            .queue
            .iter()
            .map(|(range, _)| u64::from(range.count()))
            .sum();
        let waiting = usize::try_from(waiting).unwrap_or(usize::MAX);
        let room = (most as usize).saturating_sub(desk.slots.len());
        room.min(waiting.saturating_sub(desk.idle))
    }

    /// A new slot's number.
    pub(super) fn add_slot(&self, bell: Arc<Bell>) -> u32 {
        let mut desk = self.desk();
        desk.slots.push(Slot { bell });
        u32::try_from(desk.slots.len() - 1).unwrap_or(u32::MAX)
    }

    /// When the oldest waiting task is to be given back.
    pub(super) fn return_at(&self) -> Option<BootTime> {
        let desk = self.desk();
        let (_, since) = desk.queue.front()?;
        Some(since.after(self.file.return_after))
    }

    /// Takes back what waits for so long, oldest first.
    pub(super) fn take_back(&self, is_meant: impl Fn(BootTime) -> bool) -> Vec<TaskRange> {
        let mut desk = self.desk();
        let mut taken = Vec::new();
        while let Some((range, since)) = desk.queue.front()
            && is_meant(*since)
        {
            taken.push(*range);
            desk.queue.pop_front();
        }
        taken
    }

    // === the end ===

    /// Everything that runs is to end; a later order can only hurry it.
    pub(super) fn stop(&self, order: StopOrder) {
        let mut desk = self.desk();
        match &mut desk.stop {
            Some(stop) => stop.kill_at = stop.kill_at.min(order.kill_at),
            None => desk.stop = Some(order),
        }
        desk.slots.iter().for_each(|slot| slot.bell.ring());
    }

    pub(super) fn stop_order(&self) -> Option<StopOrder> {
        self.desk().stop.clone()
    }

    /// The time now, for records.
    pub(super) fn now(&self) -> Timestamp {
        self.clock.now()
    }
}

impl Desk {
    fn pop(&mut self) -> Option<TaskIndex> {
        let (range, _) = self.queue.front_mut()?;
        let task = range.first;
        if range.first == range.last {
            self.queue.pop_front();
        } else {
            range.first = task.next();
        }
        Some(task)
    }
}

/// Waits without anything to wait for.
pub(super) fn pause(milliseconds: u16) {
    let _ = poll(&mut [], PollTimeout::from(milliseconds));
}

/// The shortest time in whole milliseconds that is not before `duration` is over.
pub(super) fn poll_timeout(duration: Option<Duration>) -> PollTimeout {
    /// So that a clock that counts the machine's sleep is looked at from time to time.
    const LONGEST: Duration = Duration::from_secs(60);
    match duration {
        None => PollTimeout::NONE,
        Some(left) => {
            let left = left.min(LONGEST).as_micros().div_ceil(1000);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        }
    }
}
