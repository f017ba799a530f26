//! The modelled bundles of a machine: what waits, what runs, and the journal of reports, which outlives the agent. As
//! in `machine.rs`, this is the truth that the coordinator's view is held against.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use trainyard_common::bundle::{
    BundlePhase, DesiredBundle, ObservedBundle, ObservedBundlePhase, TaskRange, TaskReport, TaskSet,
};
use trainyard_common::ids::{AttemptNumber, AttemptRef, BundleRef, TaskIndex};
use trainyard_common::member::{EndCause, Ending, MemberSpec, RankEnd};
use trainyard_common::state::ExitStatus;
use trainyard_common::time::Timestamp;

use super::machine::{Machine, Rng};

/// Tasks that waited for so long are given back.
const PATIENCE: Duration = Duration::from_secs(5);
/// Tasks that run for so long are told of.
const A_WHILE: Duration = Duration::from_millis(500);

/// A task that runs.
#[derive(Debug, Clone)]
struct Run {
    since: Timestamp,
    until: Timestamp,
    fate: EndCause,
    told: bool,
}

/// A bundle as it really is.
#[derive(Debug, Clone)]
pub(super) struct Carrier {
    pub(super) spec: Option<MemberSpec>,
    slots: usize,
    phase: ObservedBundlePhase,
    /// When it is prepared; never if it hangs.
    prepared: Option<Timestamp>,
    fails: bool,
    closing: bool,
    known: BTreeSet<TaskIndex>,
    waiting: VecDeque<(TaskIndex, Timestamp)>,
    running: BTreeMap<TaskIndex, Run>,
    /// Since its beginning.
    reports: Vec<TaskReport>,
    /// The first report that was not sent in this session; none before the agent knows what is on record.
    unsent: Option<usize>,
    changed: bool,
}

/// What happened in one step.
#[derive(Debug, Default)]
pub(super) struct Steps {
    pub(super) started: Vec<AttemptRef>,
    pub(super) succeeded: Vec<AttemptRef>,
    pub(super) returned: bool,
    pub(super) killed: bool,
}

fn attempt(bundle: BundleRef, task: TaskIndex) -> AttemptRef {
    AttemptRef {
        job: bundle.job,
        task,
        attempt: AttemptNumber(1),
    }
}

fn ending(now: Timestamp, fate: EndCause, started: bool) -> Ending {
    let exit = match fate {
        EndCause::Completed => ExitStatus::Code(0),
        EndCause::RankFailed => ExitStatus::Code(1),
        EndCause::Stopped | EndCause::TimeLimit | EndCause::LeaseExpired => ExitStatus::Signal(15),
        EndCause::CannotExecute
        | EndCause::PrepareFailed
        | EndCause::SupervisorLost
        | EndCause::NodeRebooted => ExitStatus::Unknown,
    };
    let rank = RankEnd {
        rank: 0,
        exit,
        at: now,
        unprompted: fate == EndCause::RankFailed,
        oom_killed: false,
    };
    Ending {
        cause: fate,
        message: String::new(),
        started,
        ranks: if started { vec![rank] } else { Vec::new() },
        ended_at: now,
        outputs: None,
        checkpoint: None,
        warning: String::new(),
    }
}

impl Carrier {
    fn new(now: Timestamp, desired: &DesiredBundle, rng: &mut Rng) -> Self {
        let (prepared, fails) = match rng.below(100) {
            0..5 => (Some(now.after(rng.seconds(3))), true),
            5..8 => (None, false),
            _ => (Some(now.after(rng.seconds(3))), false),
        };
        Self {
            spec: desired.spec.as_deref().cloned(),
            slots: usize::try_from(desired.slots).unwrap(),
            phase: ObservedBundlePhase::Preparing,
            prepared,
            fails,
            closing: false,
            known: BTreeSet::new(),
            waiting: VecDeque::new(),
            running: BTreeMap::new(),
            reports: Vec::new(),
            unsent: None,
            changed: true,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, ObservedBundlePhase::Ended { .. })
    }

    fn end(&mut self, message: &str) {
        assert!(self.waiting.is_empty() && self.running.is_empty());
        self.phase = ObservedBundlePhase::Ended {
            total: self.reports.len() as u64,
            message: message.to_owned(),
        };
        self.changed = true;
    }

    fn give_back(&mut self, tasks: Vec<TaskIndex>) {
        // Neighbours make one report; one that was made before never changes.
        let mut ranges = TaskSet::default();
        for task in tasks {
            ranges.insert(TaskRange {
                first: task,
                last: task,
            });
        }
        let back = ranges.ranges().iter().copied();
        self.reports.extend(back.map(TaskReport::Returned));
    }

    fn give_all_back(&mut self) {
        let tasks = self.waiting.drain(..).map(|(task, _)| task).collect();
        self.give_back(tasks);
    }

    fn task_ends(&mut self, now: Timestamp, task: TaskIndex, fate: EndCause) {
        let run = self.running.remove(&task);
        let started = run.is_some() && fate != EndCause::CannotExecute;
        let at = run.as_ref().map_or(now, |run| run.until.min(now));
        self.reports.push(TaskReport::Ended {
            task,
            started_at: run.filter(|_| started).map(|run| run.since),
            ending: Box::new(ending(at, fate, started)),
        });
    }

    /// Everything that lived is gone and nobody saw how it ended.
    fn all_unknown(&mut self, now: Timestamp, cause: EndCause) {
        let running: Vec<TaskIndex> = self.running.keys().copied().collect();
        for task in running {
            self.task_ends(now, task, cause);
        }
    }
}

impl Machine {
    /// Tasks in bundles that live, with what each holds.
    pub(super) fn live_tasks(&self) -> impl Iterator<Item = (AttemptRef, u64)> + '_ {
        self.carriers.iter().flat_map(|(id, carrier)| {
            let cpu = carrier
                .spec
                .as_ref()
                .map_or(0, |spec| spec.resources.cpu_milli);
            let tasks = carrier.running.keys();
            tasks.map(move |task| (attempt(*id, *task), cpu))
        })
    }

    pub(super) fn observed_bundles(&self, rng: &mut Rng) -> Vec<ObservedBundle> {
        let mut observed = Vec::new();
        for (id, carrier) in &self.carriers {
            // Some agents send all they have at once, some wait until they know what is on record.
            let reports = if rng.chance(500) {
                carrier.reports.clone()
            } else {
                Vec::new()
            };
            observed.push(ObservedBundle {
                bundle: *id,
                phase: carrier.phase.clone(),
                first: 0,
                reports,
            });
        }
        observed
    }

    /// The session is over.
    pub(super) fn hang_up(&mut self) {
        for carrier in self.carriers.values_mut() {
            carrier.unsent = None;
        }
    }

    /// Takes in what is desired; `greeting` if it is of the whole set. Gives the tasks that are new.
    pub(super) fn desire_bundle(
        &mut self,
        now: Timestamp,
        desired: &DesiredBundle,
        greeting: bool,
        rng: &mut Rng,
    ) -> Vec<TaskIndex> {
        let stop = matches!(desired.phase, BundlePhase::Stop(_));
        let carrier = self.carriers.entry(desired.bundle).or_insert_with(|| {
            assert!(
                stop || desired.spec.is_some(),
                "{} came without a specification",
                desired.bundle
            );
            Carrier::new(now, desired, rng)
        });
        if greeting || carrier.unsent.is_none() {
            let recorded = usize::try_from(desired.recorded).unwrap();
            assert!(recorded <= carrier.reports.len() || stop);
            carrier.unsent = Some(recorded.min(carrier.reports.len()));
            carrier.changed = true;
        }
        if carrier.is_over() {
            return Vec::new();
        }
        let new: Vec<TaskIndex> = desired
            .tasks
            .tasks()
            .filter(|task| carrier.known.insert(*task))
            .collect();
        assert!(
            new.is_empty() || !carrier.closing,
            "{} gets tasks after it was closed",
            desired.bundle
        );
        carrier.waiting.extend(new.iter().map(|task| (*task, now)));
        match desired.phase {
            BundlePhase::Run => assert!(!carrier.closing, "{} opens again", desired.bundle),
            BundlePhase::Close => carrier.closing = true,
            BundlePhase::Stop(_) => {
                carrier.closing = true;
                carrier.give_all_back();
                for run in carrier.running.values_mut() {
                    if run.until > now {
                        run.until = run.until.min(now.after(rng.seconds(10)));
                        run.fate = EndCause::Stopped;
                    }
                }
                if carrier.running.is_empty() {
                    carrier.end("");
                }
            }
        }
        new
    }

    /// Moves every bundle on.
    pub(super) fn step_bundles(&mut self, now: Timestamp, faults: bool, rng: &mut Rng) -> Steps {
        let mut steps = Steps::default();
        for (id, carrier) in &mut self.carriers {
            if carrier.is_over() {
                continue;
            }
            if carrier.phase == ObservedBundlePhase::Preparing {
                match carrier.prepared {
                    Some(at) if at <= now && carrier.fails => {
                        carrier.give_all_back();
                        carrier.end("nothing to fetch from");
                    }
                    Some(at) if at <= now => {
                        carrier.phase = ObservedBundlePhase::Running;
                        carrier.changed = true;
                    }
                    Some(_) | None => {}
                }
                continue;
            }
            if faults && rng.chance(4) {
                steps.killed = true;
                carrier.all_unknown(now, EndCause::SupervisorLost);
                carrier.give_all_back();
                carrier.end("its shim was killed");
                continue;
            }
            carrier.step(now, *id, &mut steps, rng);
        }
        steps
    }

    /// What is to be said of bundles in this session; a message with a few reports each.
    pub(super) fn news(&mut self, most: usize) -> Vec<ObservedBundle> {
        let mut news = Vec::new();
        for (id, carrier) in &mut self.carriers {
            let Some(from) = carrier.unsent else { continue };
            let reports = &carrier.reports[from..];
            if reports.is_empty() && !std::mem::take(&mut carrier.changed) {
                continue;
            }
            let reports = &reports[..reports.len().min(most)];
            carrier.unsent = Some(from + reports.len());
            news.push(ObservedBundle {
                bundle: *id,
                phase: carrier.phase.clone(),
                first: from as u64,
                reports: reports.to_vec(),
            });
        }
        news
    }

    /// The power fails: nothing lives, and whatever had no end may have run.
    pub(super) fn reboot_bundles(&mut self, now: Timestamp) {
        for carrier in self.carriers.values_mut().filter(|c| !c.is_over()) {
            carrier.all_unknown(now, EndCause::NodeRebooted);
            let waiting: Vec<_> = carrier.waiting.drain(..).collect();
            for (task, _) in waiting {
                carrier.task_ends(now, task, EndCause::NodeRebooted);
            }
            carrier.end("");
        }
    }
}

impl Carrier {
    fn step(&mut self, now: Timestamp, id: BundleRef, steps: &mut Steps, rng: &mut Rng) {
        let due: Vec<(TaskIndex, EndCause)> = self
            .running
            .iter()
            .filter(|(_, run)| run.until <= now)
            .map(|(task, run)| (*task, run.fate))
            .collect();
        for (task, fate) in due {
            self.task_ends(now, task, fate);
            if fate == EndCause::Completed {
                steps.succeeded.push(attempt(id, task));
            }
        }
        for (task, run) in &mut self.running {
            let a_while = now.since(run.since) >= A_WHILE && run.fate != EndCause::CannotExecute;
            if a_while && !run.told {
                run.told = true;
                self.reports.push(TaskReport::Started {
                    task: *task,
                    at: run.since,
                });
            }
        }
        while self.running.len() < self.slots
            && let Some((task, _)) = self.waiting.pop_front()
        {
            // Mostly quick ones, so that some are held ahead, and some that others then wait behind.
            let takes = match rng.below(100) {
                0..60 => rng.seconds(1) / 20,
                60..75 => rng.seconds(1),
                75..94 => rng.seconds(20),
                _ => rng.seconds(150),
            };
            let fate = match rng.below(100) {
                0..82 => EndCause::Completed,
                82..95 => EndCause::RankFailed,
                95..98 => EndCause::TimeLimit,
                _ => EndCause::CannotExecute,
            };
            let run = Run {
                since: now,
                until: now.after(takes),
                fate,
                told: false,
            };
            self.running.insert(task, run);
            steps.started.push(attempt(id, task));
        }
        let impatient = |(_, since): &(TaskIndex, Timestamp)| now.since(*since) > PATIENCE;
        if self.waiting.iter().any(impatient) {
            let (back, kept): (VecDeque<_>, VecDeque<_>) =
                self.waiting.drain(..).partition(|waits| impatient(waits));
            self.waiting = kept;
            self.give_back(back.into_iter().map(|(task, _)| task).collect());
            steps.returned = true;
        }
        if self.closing && self.waiting.is_empty() && self.running.is_empty() {
            self.end("");
        }
    }
}
