//! Makes reports of one bundle's journal: reads it as it grows, brings the output and the outputs of ended tasks to the
//! coordinator, and hands the reports over in the journal's order.
//!
//! All of it follows from the journal and from what the coordinator has on record, so an agent that is restarted does it
//! again from the beginning, and nothing else is kept.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use trainyard_agent_core::Uploaded;
use trainyard_common::bundle::{ObservedBundlePhase, TaskRange, TaskReport, TaskSet};
use trainyard_common::ids::TaskIndex;
use trainyard_common::member::{Ending, RankEnd};
use trainyard_transport::task::{AbortOnDrop, blocking, spawn};

use crate::backoff::Backoff;
use crate::chain::chain;
use crate::logs::Logs;
use crate::outgoing::Outgoing;
use crate::runtime::carrier::{BundleDir, Gap, Item, Record, TaskEnd, items, read_from};
use crate::uploads::Uploader;

/// Bytes of the journal that are read at once, some hundreds of reports.
const READ_BYTES: usize = 128 << 10;
/// Reports that are made and not on the coordinator's record; the journal waits beyond that.
const MAX_UNRECORDED: usize = 4096;
/// Tasks whose output or outputs are on their way at the same time; the uploads themselves have limits of their own.
const MAX_UPLOADS: usize = 256;

/// How long reports are gathered while uploads end one after the other: each message costs the coordinator a commit.
const GATHER: Duration = Duration::from_millis(10);

/// What a feed works with.
#[derive(Debug, Clone)]
pub(crate) struct Means {
    pub(crate) logs: Logs,
    pub(crate) uploader: Uploader,
    pub(crate) outgoing: Arc<Outgoing>,
}

/// How far the journal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Growth {
    pub(crate) journal: u64,
    /// No process of the bundle is left.
    pub(crate) over: bool,
}

/// A feed that runs until this is dropped.
#[derive(Debug)]
pub(crate) struct Feed {
    growth: watch::Sender<Growth>,
    recorded: watch::Sender<Recorded>,
    _task: AbortOnDrop,
}

/// What the coordinator said that it has on record.
#[derive(Debug, Clone, Default)]
pub(crate) struct Recorded {
    /// Reports with a lower number.
    pub(crate) reports: u64,
    /// Tasks whose ends are not.
    pub(crate) open: Arc<TaskSet>,
}

impl Feed {
    pub(crate) fn start(means: Means, dir: BundleDir, growth: Growth, recorded: Recorded) -> Self {
        let (growth, growth_seen) = watch::channel(growth);
        let first_open = recorded.open.clone();
        let (recorded, recorded_seen) = watch::channel(recorded);
        let feeder = Feeder {
            means,
            dir,
            growth: growth_seen,
            recorded: recorded_seen,
            first_open,
            is_damaged: false,
            offset: 0,
            number: 0,
            pending: VecDeque::new(),
            uploads: JoinSet::new(),
            is_abreast: false,
            running: BTreeSet::new(),
            kept: VecDeque::new(),
            hand_over_at: Instant::now(),
            message: None,
        };
        Self {
            growth,
            recorded,
            _task: AbortOnDrop(spawn("bundle reports", feeder.run())),
        }
    }

    pub(crate) fn grew(&self, growth: Growth) {
        self.growth.send_replace(growth);
    }

    pub(crate) fn recorded(&self, recorded: Recorded) {
        self.recorded.send_replace(recorded);
    }
}

#[derive(Debug)]
struct Feeder {
    means: Means,
    dir: BundleDir,
    growth: watch::Receiver<Growth>,
    recorded: watch::Receiver<Recorded>,
    /// Tasks whose ends were not on record when this began.
    first_open: Arc<TaskSet>,
    /// Something was unreadable, so that the numbers of what follows are not those of before.
    is_damaged: bool,
    /// Bytes of the journal that were taken.
    offset: u64,
    /// The number of the next report in it.
    number: u64,
    /// Reports in order that are not handed over, as the first one waits for an upload.
    pending: VecDeque<Pending>,
    uploads: JoinSet<(u64, Uploaded)>,
    /// All that is on record was passed over.
    is_abreast: bool,
    /// Tasks that were told of and have not ended, as far as that is on record.
    running: BTreeSet<TaskIndex>,
    /// Ended tasks with files, which are deleted when the report with this number is on record.
    kept: VecDeque<(u64, Box<TaskEnd>)>,
    /// While uploads are on their way, not before this.
    hand_over_at: Instant,
    /// What went wrong with the bundle, once it is over.
    message: Option<String>,
}

#[derive(Debug)]
struct Pending {
    number: u64,
    report: TaskReport,
    /// Something of it is on its way.
    waits: bool,
}

impl Feeder {
    async fn run(mut self) {
        loop {
            let growth = *self.growth.borrow_and_update();
            let recorded = self.recorded.borrow_and_update().clone();
            self.clear_away(recorded.reports).await;
            let more = self.read(growth, &recorded).await;
            let now = Instant::now();
            if self.uploads.is_empty() || self.hand_over_at <= now {
                self.hand_over_at = now + GATHER;
                self.hand_over(growth);
            }
            if more {
                continue;
            }
            let rest = self.hand_over_at;
            tokio::select! {
                biased;
                // Cancel-safe, both: only tell that there is something.
                changed = self.growth.changed() => if changed.is_err() {
                    return;
                },
                changed = self.recorded.changed() => if changed.is_err() {
                    return;
                },
                // Cancel-safe: a result is taken whole or stays.
                Some(done) = self.uploads.join_next() => {
                    self.uploaded(done);
                    while let Some(done) = self.uploads.try_join_next() {
                        self.uploaded(done);
                    }
                }
                // Cancel-safe: only waits.
                () = sleep_until(rest), if self.is_ready() => {}
            }
        }
    }

    /// Whether there is something to hand over.
    fn is_ready(&self) -> bool {
        self.pending.front().is_some_and(|pending| !pending.waits)
    }

    /// Takes what the journal has, as far as there is room. Whether there is more of both.
    async fn read(&mut self, growth: Growth, recorded: &Recorded) -> bool {
        if self.offset >= growth.journal || !self.has_room() {
            return false;
        }
        let (path, offset) = (self.dir.journal(), self.offset);
        let left = usize::try_from(growth.journal - offset).unwrap_or(usize::MAX);
        let read = blocking(move || {
            read_from(&path, offset, left.min(READ_BYTES)).map(|bytes| items(&bytes, offset))
        });
        match read.await {
            // Not even one whole line, of those that are there.
            Ok((items, _)) if items.is_empty() => {
                let bytes = growth.journal - offset;
                self.offset = growth.journal;
                self.pass_over(Gap { offset, bytes }, recorded);
                false
            }
            Ok((items, length)) => {
                self.offset += length as u64;
                for item in items {
                    match item {
                        Item::Record(record) => self.take(record, recorded),
                        Item::Gap(gap) => self.pass_over(gap, recorded),
                    }
                }
                self.offset < growth.journal
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(bundle = %self.dir.bundle(), error, "the journal of a bundle cannot be read");
                false
            }
        }
    }

    fn has_room(&self) -> bool {
        let bundle = self.dir.bundle();
        let waiting = self
            .means
            .outgoing
            .bundles(|lanes| lanes.unrecorded(bundle));
        waiting + self.pending.len() < MAX_UNRECORDED && self.uploads.len() < MAX_UPLOADS
    }

    /// How many reports those bytes held is not known. What follows them is told under new numbers, but for what is on
    /// record; what they told themselves is found missing when the bundle is over.
    fn pass_over(&mut self, gap: Gap, recorded: &Recorded) {
        let (path, Gap { offset, bytes }) = (self.dir.journal(), gap);
        tracing::error!(bundle = %self.dir.bundle(), ?path, offset, bytes, "the journal of a bundle is damaged, what it told there is unknown");
        self.number = self.number.max(recorded.reports);
        self.is_damaged = true;
    }

    /// Whether the coordinator may not have the task's end yet. Exact only of tasks that it has not handed out since.
    fn may_be_open(&self, task: TaskIndex, recorded: &Recorded) -> bool {
        !self.is_damaged || self.first_open.contains(task) || recorded.open.contains(task)
    }

    fn take(&mut self, record: Record, recorded: &Recorded) {
        if let (true, Record::Returned(range)) = (self.is_damaged, &record) {
            return self.take_returned(*range, recorded);
        }
        let is_open = match &record {
            Record::Started { task, .. } => self.may_be_open(*task, recorded),
            Record::Ended(end) => self.may_be_open(end.task, recorded),
            Record::Handed(_)
            | Record::Began(_)
            | Record::Returned(_)
            | Record::Skipped { .. }
            | Record::Over { .. } => true,
        };
        if !is_open {
            return;
        }
        let number = self.number;
        self.number += u64::from(record.is_report());
        let recorded = recorded.reports;
        let is_new = number >= recorded;
        match record {
            Record::Handed(_) | Record::Began(_) => {}
            Record::Skipped { to } => self.number = self.number.max(to),
            Record::Over { message } => self.message = Some(message),
            Record::Returned(range) => {
                if is_new {
                    self.push(number, TaskReport::Returned(range), false);
                }
            }
            Record::Started { task, at } => {
                self.running.insert(task);
                if is_new {
                    self.track(task);
                    self.push(number, TaskReport::Started { task, at }, false);
                }
            }
            Record::Ended(end) => self.take_end(number, end, is_new),
        }
        if !self.is_abreast && self.number >= recorded {
            // What was told of before and still runs: its output goes on.
            self.is_abreast = true;
            self.running.iter().for_each(|task| self.track(*task));
        }
    }

    /// Of what is behind damage, only what the coordinator may not know.
    fn take_returned(&mut self, range: TaskRange, recorded: &Recorded) {
        let open = range
            .tasks()
            .filter(|task| self.may_be_open(*task, recorded));
        let single = |task| TaskRange {
            first: task,
            last: task,
        };
        let open: TaskSet = open.map(single).collect();
        for range in open.ranges() {
            self.push(self.number, TaskReport::Returned(*range), false);
            self.number += 1;
        }
    }

    fn take_end(&mut self, number: u64, end: Box<TaskEnd>, is_new: bool) {
        let was_told_of = self.running.remove(&end.task);
        if is_new {
            let has_log = end.log > 0 || was_told_of;
            let waits = has_log || end.outputs;
            let report = TaskReport::Ended {
                task: end.task,
                started_at: end.started_at,
                ending: Box::new(ending(&end)),
            };
            self.push(number, report, waits);
            if waits {
                let upload = upload(self.means.clone(), self.dir.clone(), end.clone(), has_log);
                self.uploads.spawn(async move { (number, upload.await) });
            }
        }
        if end.log > 0 || end.outputs {
            self.kept.push_back((number, end));
        }
    }

    fn push(&mut self, number: u64, report: TaskReport, waits: bool) {
        self.pending.push_back(Pending {
            number,
            report,
            waits,
        });
    }

    fn track(&self, task: TaskIndex) {
        let attempt = self.dir.attempt(task);
        self.means.logs.track_file(attempt, 0, self.dir.log(task));
    }

    fn uploaded(&mut self, done: Result<(u64, Uploaded), tokio::task::JoinError>) {
        let (number, uploaded) = match done {
            Ok(done) => done,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // Nobody cancels one but by dropping all.
            Err(_) => return,
        };
        let first = self
            .pending
            .front()
            .map_or(number, |pending| pending.number);
        let at = usize::try_from(number.saturating_sub(first)).unwrap_or(usize::MAX);
        // Numbers have holes only where nothing was waited for, but look rather than believe.
        let found = match self.pending.get_mut(at) {
            Some(pending) if pending.number == number => Some(pending),
            _ => self
                .pending
                .iter_mut()
                .find(|pending| pending.number == number),
        };
        let Some(pending) = found else {
            return;
        };
        pending.waits = false;
        if let TaskReport::Ended { ending, .. } = &mut pending.report {
            uploaded.complete(ending);
        }
    }

    /// Hands over what waits for nothing, in order, and the end behind it.
    fn hand_over(&mut self, growth: Growth) {
        let bundle = self.dir.bundle();
        let mut ready = Vec::new();
        while self.is_ready() {
            ready.extend(self.pending.pop_front());
        }
        let is_over = growth.over && self.pending.is_empty() && self.offset >= growth.journal;
        let end = self.message.as_ref().filter(|_| is_over);
        let end = end.map(|message| ObservedBundlePhase::Ended {
            total: self.number,
            message: message.clone(),
        });
        if ready.is_empty() && end.is_none() {
            return;
        }
        self.means.outgoing.bundles(|lanes| {
            for Pending { number, report, .. } in ready {
                lanes.push(bundle, number, report);
            }
            if let Some(end) = end {
                lanes.set_phase(bundle, end);
            }
        });
    }

    /// Deletes the files of tasks whose end is on record.
    async fn clear_away(&mut self, recorded: u64) {
        let mut old = Vec::new();
        while self
            .kept
            .front()
            .is_some_and(|(number, _)| *number < recorded)
        {
            old.extend(self.kept.pop_front());
        }
        if old.is_empty() {
            return;
        }
        let dir = self.dir.clone();
        blocking(move || {
            for (_, end) in old {
                if let Err(error) = dir.clear_away(&end) {
                    // It goes with the bundle's directory.
                    tracing::debug!(bundle = %dir.bundle(), task = %end.task, %error, "cannot delete what a task left");
                }
            }
        })
        .await;
    }
}

/// Brings what a task left to the coordinator, however long that takes.
async fn upload(means: Means, dir: BundleDir, end: Box<TaskEnd>, has_log: bool) -> Uploaded {
    let attempt = dir.attempt(end.task);
    if has_log {
        means.logs.finish_file(attempt, 0, dir.log(end.task)).await;
    }
    if !end.outputs {
        return Uploaded::default();
    }
    let mut backoff = Backoff::new();
    loop {
        match means
            .uploader
            .clone()
            .upload(dir.task(end.task), true)
            .await
        {
            Ok(uploaded) => return uploaded,
            Err(error) => {
                tracing::debug!(%attempt, error = chain(&error), "cannot upload what a task left, trying again");
                sleep(backoff.pause()).await;
            }
        }
    }
}

fn ending(end: &TaskEnd) -> Ending {
    let rank = end.exit.map(|exit| RankEnd {
        rank: 0,
        exit,
        at: end.exited_at,
        unprompted: end.unprompted,
        oom_killed: false,
    });
    Ending {
        cause: end.cause,
        message: end.message.clone(),
        started: end.started,
        ranks: rank.into_iter().collect(),
        ended_at: end.ended_at,
        outputs: None,
        checkpoint: None,
        warning: end.warning.clone(),
    }
}
