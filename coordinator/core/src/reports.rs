//! What agents report of bundles: each task leaves its bundle once, by its end, by coming back unstarted, or because
//! nobody can report about it any more. A task that ends gets rows and goes through the code of any attempt's end, so
//! that the rules of success, retries, limits and cancels are in one place.

use std::collections::{BTreeMap, BTreeSet};

use trainyard_common::bundle::{
    DesiredBundle, ObservedBundle, ObservedBundlePhase, TaskRange, TaskReport, TaskSet,
};
use trainyard_common::ids::{AttemptRef, BundleRef, NodeId, TaskIndex};
use trainyard_common::limits;
use trainyard_common::member::{Ending, OWN_ADDRESS};
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::record::{
    AttemptRecord, BundleRecord, BundleState, MemberRecord, TaskRecord,
};
use trainyard_common::state::{AttemptState, JobState, MemberPhase, Outcome, Reason, ReasonCode};
use trainyard_common::time::Timestamp;

use crate::Core;
use crate::attempts::Decision;
use crate::bundles::{count_tasks, stray_stop};
use crate::effect::{Command, Effect, Urgency};
use crate::event::SessionId;
use crate::sessions::MAX_ATTEMPT_LEAD;
use crate::tables::{attempt_in_bundle, fresh_tasks, width};

/// Reports that an agent is left to keep before it is told that they are on record, if nothing else is to be said.
const UNTOLD: u64 = 512;

/// What a reported bundle is to us.
enum Standing {
    /// In memory, on that node.
    Ours,
    /// Over or never on record, of a job that we gave a number to.
    Over,
    /// Of a job that we never heard of, or on another node: never touched.
    Foreign,
}

impl Core {
    pub(crate) fn on_bundle_observed(
        &mut self,
        now: Timestamp,
        session: SessionId,
        node: NodeId,
        seen: &ObservedBundle,
    ) {
        if !self.hear(now, session, node) {
            return;
        }
        let id = seen.bundle;
        match self.bundle_standing(node, id) {
            Standing::Ours => {
                if self.bundle_moved(now, seen) {
                    self.tell_reported(id);
                } else {
                    let message = format!("reports of {id} are missing before {}", seen.first);
                    self.send(node, Command::Resync(message));
                }
            }
            Standing::Over => {
                self.note_stray(seen);
                let command = match seen.phase {
                    ObservedBundlePhase::Ended { .. } => Command::ForgetBundle(id),
                    ObservedBundlePhase::Preparing | ObservedBundlePhase::Running => {
                        Command::DesireBundle(Box::new(stray_stop(id, next_report(seen))))
                    }
                };
                self.later.push(Effect::Send(session, command));
            }
            Standing::Foreign => self.leave_alone(node, id),
        }
    }

    /// Holds the bundles that an agent has against those on record. Gives what is desired of all of them, and those
    /// that can be cleaned away.
    pub(crate) fn reconcile_bundles(
        &mut self,
        now: Timestamp,
        node: NodeId,
        observed: &[ObservedBundle],
    ) -> (Vec<DesiredBundle>, BTreeSet<BundleRef>) {
        let seen: BTreeMap<BundleRef, &ObservedBundle> = observed
            .iter()
            .take(limits::MAX_MEMBERS_PER_NODE)
            .map(|bundle| (bundle.bundle, bundle))
            .collect();
        let (mut desired, mut forget) = (Vec::new(), BTreeSet::new());
        for (id, bundle) in &seen {
            match self.bundle_standing(node, *id) {
                Standing::Ours => {
                    // A gap does not matter: what is missing is sent when the agent knows what is on record.
                    self.bundle_moved(now, bundle);
                    if !self.t.bundles.contains_key(id) {
                        forget.insert(*id);
                    }
                }
                Standing::Over => {
                    self.note_stray(bundle);
                    match bundle.phase {
                        ObservedBundlePhase::Ended { .. } => drop(forget.insert(*id)),
                        ObservedBundlePhase::Preparing | ObservedBundlePhase::Running => {
                            desired.push(stray_stop(*id, next_report(bundle)));
                        }
                    }
                }
                Standing::Foreign => self.leave_alone(node, *id),
            }
        }
        for id in self.t.bundles_on(node) {
            // A command that did not arrive is in the answer.
            let unheard = |bundle: &BundleRecord| bundle.state == BundleState::Placed;
            if !seen.contains_key(&id) && !self.t.bundles.get(&id).is_some_and(unheard) {
                let message =
                    format!("{node} no longer knows {id}; how its tasks ended is not known");
                let reason = Reason::new(ReasonCode::UnknownToAgent, message);
                self.end_bundle(now, id, &reason);
            }
        }
        for id in self.t.bundles_on(node) {
            if let Some(bundle) = self.t.bundles.get(&id) {
                let told = self.desired_bundle(bundle, true);
                self.live.paces.entry(id).or_default().told = told.recorded;
                desired.push(told);
            }
        }
        desired.sort_by_key(|bundle| bundle.bundle);
        (desired, forget)
    }

    fn bundle_standing(&self, node: NodeId, id: BundleRef) -> Standing {
        match self.t.bundles.get(&id) {
            Some(bundle) if bundle.node == node => Standing::Ours,
            Some(_) => Standing::Foreign,
            None if id.job < self.t.next_job => Standing::Over,
            None => Standing::Foreign,
        }
    }

    fn leave_alone(&mut self, node: NodeId, id: BundleRef) {
        let message = format!("{node} has {id}, which is not on record as its own; left alone");
        let reason = Reason::new(ReasonCode::UnknownToAgent, message);
        self.later
            .push(Effect::Note(Urgency::Warn, Some(node), reason));
    }

    /// A bundle above every number that our rows know, so they were restored from a backup: its tasks may count as
    /// fresh here and have run as attempt 1. The job's further tasks go the single way, above the attempts that were
    /// seen.
    fn note_stray(&mut self, seen: &ObservedBundle) {
        let BundleRef { job, bundle } = seen.bundle;
        let Some(known) = self.t.jobs.get(&job).map(|job| job.bundles) else {
            return;
        };
        if !(1..=MAX_ATTEMPT_LEAD).contains(&bundle.saturating_sub(known)) {
            return;
        }
        if let Some(job) = self.t.job_mut(job) {
            job.bundles = bundle;
        }
        let message = format!("{} was made before these rows were", seen.bundle);
        self.end_bundling(job, &Reason::new(ReasonCode::UnknownToAgent, message));
        for report in &seen.reports {
            match report {
                TaskReport::Started { task, .. } | TaskReport::Ended { task, .. } => {
                    self.note_floor(attempt_in_bundle(job, *task));
                }
                TaskReport::Returned(_) => {}
            }
        }
    }

    /// Takes in what an agent says of a bundle. False if reports are missing before the first of these; then nothing
    /// was taken in.
    fn bundle_moved(&mut self, now: Timestamp, seen: &ObservedBundle) -> bool {
        let Some(mut bundle) = self.t.take_bundle(seen.bundle) else {
            return true;
        };
        let Some(known) = bundle
            .recorded
            .checked_sub(seen.first)
            .or((seen.reports.is_empty() || planted(Mutation::GapTaken)).then_some(0))
        else {
            self.t.index_bundle(bundle);
            return false;
        };
        let (state, recorded, used) = (bundle.state, bundle.recorded, width(&bundle));
        if seen.phase == ObservedBundlePhase::Running {
            self.bundle_runs(&mut bundle);
        }
        let known = usize::try_from(known).unwrap_or(usize::MAX);
        let known = known * usize::from(!planted(Mutation::ReportsCountedAgain));
        for report in seen.reports.iter().skip(known) {
            bundle.recorded += 1;
            self.take_report(now, &mut bundle, report);
        }
        if let ObservedBundlePhase::Ended { total, message } = &seen.phase {
            if bundle.state == BundleState::Placed && !message.is_empty() {
                self.live.troubles.failed(now, bundle.node, message);
                let message = format!("could not prepare on {}: {message}", bundle.node);
                let reason = Reason::new(ReasonCode::PrepareFailed, message);
                self.end_bundling(bundle.id.job, &reason);
            }
            if bundle.recorded >= *total {
                let why = match message.as_str() {
                    "" => "a report of its end is missing",
                    message => message,
                };
                let reason = Reason::new(ReasonCode::SupervisorLost, why);
                self.close_bundle(now, bundle, &reason);
                return true;
            }
        }
        self.wants_schedule |= width(&bundle) < used || self.missing_ahead(&bundle) > 0;
        if (state, recorded) == (bundle.state, bundle.recorded) {
            self.t.index_bundle(bundle);
        } else {
            self.t.keep_bundle(bundle);
        }
        true
    }

    /// Tells the agent that many reports are on record, or that all of them are.
    fn tell_reported(&mut self, id: BundleRef) {
        let Some(bundle) = self.t.bundles.get(&id) else {
            return;
        };
        let told = self.live.paces.get(&id).map_or(0, |pace| pace.told);
        if bundle.recorded.saturating_sub(told) >= UNTOLD {
            self.tell_bundle(id);
        }
    }

    /// Something of a bundle runs, or ran.
    fn bundle_runs(&mut self, bundle: &mut BundleRecord) {
        self.live.arm_bundle(bundle.id, None);
        if bundle.state != BundleState::Placed {
            return;
        }
        let more = self
            .t
            .jobs
            .get(&bundle.id.job)
            .is_some_and(|job| fresh_tasks(job) > 0);
        (bundle.state, bundle.reason) = if more {
            let told = format!("{} run at a time", count_tasks(bundle.slots));
            (BundleState::Running, Reason::new(ReasonCode::Running, told))
        } else {
            let reason = Reason::new(ReasonCode::Running, "its last tasks run");
            (BundleState::Closing, reason)
        };
    }

    fn take_report(&mut self, now: Timestamp, bundle: &mut BundleRecord, report: &TaskReport) {
        match report {
            TaskReport::Started { task, at } => {
                self.bundle_runs(bundle);
                self.node_prepared(bundle.node);
                if bundle.state != BundleState::Lost && bundle.tasks.contains(*task) {
                    let on = format!("attempt 1 runs on {}", bundle.node);
                    self.carry(now, bundle, *task, Some((*at, on)));
                }
            }
            TaskReport::Ended {
                task,
                started_at,
                ending,
            } => {
                if started_at.is_some() {
                    self.bundle_runs(bundle);
                }
                if !bundle.tasks.remove(*task) {
                    return; // An agent that repeats itself under another number.
                }
                self.note_preparation(now, bundle.node, started_at.is_some(), ending);
                if let Some(started_at) = started_at {
                    let pace = self.live.paces.entry(bundle.id).or_default();
                    pace.note(*started_at, ending.ended_at);
                }
                self.task_ended(now, bundle, *task, *started_at, ending);
            }
            TaskReport::Returned(range) => {
                self.live.paces.entry(bundle.id).or_default().gave_back();
                for task in within(&bundle.tasks, *range) {
                    bundle.tasks.remove(task);
                    self.task_returned(now, bundle, task);
                }
            }
        }
    }

    /// The end of a task, like that of the only member of any attempt.
    fn task_ended(
        &mut self,
        now: Timestamp,
        bundle: &BundleRecord,
        task: TaskIndex,
        started_at: Option<Timestamp>,
        ending: &Ending,
    ) {
        let id = attempt_in_bundle(bundle.id.job, task);
        if bundle.state != BundleState::Lost {
            // An end overwrites the reason at once, so it has no sentence.
            let started = started_at.map(|at| (at, String::new()));
            self.carry(now, bundle, task, started);
        }
        if let Some(before) = self.t.advance_member(id, 0, MemberPhase::Ended) {
            self.record_ending(id, 0, before, ending);
            self.member_over(now, id, 0, ending);
        }
        self.settle(now, id);
    }

    /// A task was not started and never will be by this bundle.
    fn task_returned(&mut self, now: Timestamp, bundle: &BundleRecord, task: TaskIndex) {
        let (job, id) = (bundle.id.job, attempt_in_bundle(bundle.id.job, task));
        if self.t.is_carried(id) {
            // It was said to run before, or it was given up without knowing.
            let message = format!("{} never started it after all", bundle.node);
            let reason = Reason::new(ReasonCode::UnknownToAgent, message);
            return self.interrupt(now, bundle, task, &reason);
        }
        let Some(record) = self.t.jobs.get(&job) else {
            return;
        };
        if record.cancel.is_some() || planted(Mutation::ReturnedSucceeds) {
            return self.t.cancel_returned(job, 1);
        }
        if planted(Mutation::ReturnedVanishes) {
            return;
        }
        let message = format!("{} gave it back before it started", bundle.node);
        let row = task_row(
            bundle,
            task,
            JobState::Pending,
            Reason::new(ReasonCode::Queued, message),
        );
        self.t.insert_returned(row);
        self.wants_schedule = true;
    }

    /// Ends a task of which nobody can tell what became of it.
    fn interrupt(&mut self, now: Timestamp, bundle: &BundleRecord, task: TaskIndex, why: &Reason) {
        let id = attempt_in_bundle(bundle.id.job, task);
        if bundle.state != BundleState::Lost {
            self.carry(now, bundle, task, None);
        }
        self.t.advance_member(id, 0, MemberPhase::Ended);
        let decision = Decision::interrupted(why.code, &[bundle.node], why.message.clone());
        self.decide(now, id, decision);
        self.settle(now, id);
    }

    /// Ends a bundle that nobody can report about any more.
    pub(crate) fn end_bundle(&mut self, now: Timestamp, id: BundleRef, why: &Reason) {
        if let Some(bundle) = self.t.take_bundle(id) {
            self.close_bundle(now, bundle, why);
        }
    }

    /// Removes a bundle that was taken out. Tasks that are still in it are interrupted.
    fn close_bundle(&mut self, now: Timestamp, mut bundle: BundleRecord, why: &Reason) {
        let (id, node) = (bundle.id, bundle.node);
        for task in std::mem::take(&mut bundle.tasks).tasks() {
            self.interrupt(now, &bundle, task, why);
        }
        self.live.forget_bundle(id);
        self.t.drop_bundle(&bundle);
        self.send(node, Command::ForgetBundle(id));
        self.wants_schedule = true;
    }

    /// Gives a bundle up without word from its node: its tasks are tried again, and it stays until the node is back.
    pub(crate) fn lose_bundle(&mut self, now: Timestamp, id: BundleRef) {
        let Some(mut bundle) = self.t.take_bundle(id) else {
            return;
        };
        let node = bundle.node;
        let message = format!("attempt 1 unconfirmed on {node}");
        let reason = Reason::new(ReasonCode::NodeLost, message);
        for task in bundle.tasks.tasks() {
            self.carry(now, &bundle, task, None);
            let attempt = attempt_in_bundle(id.job, task);
            let decision = Decision::interrupted(reason.code, &[node], reason.message.clone());
            self.decide(now, attempt, decision);
            self.close(now, attempt, AttemptState::Lost);
        }
        self.live.forget_bundle(id);
        bundle.state = BundleState::Lost;
        bundle.reason = Reason::new(
            ReasonCode::NodeLost,
            format!("{node} is not heard of; what it holds may still run"),
        );
        self.t.keep_bundle(bundle);
        self.wants_schedule = true;
    }

    /// The attempts of tasks of the bundle that have rows.
    pub(crate) fn carried_of(
        &self,
        bundle: &BundleRecord,
    ) -> impl Iterator<Item = AttemptRef> + use<'_> {
        let (job, ranges) = (bundle.id.job, bundle.tasks.ranges().to_vec());
        ranges.into_iter().flat_map(move |range| {
            let (first, last) = (
                attempt_in_bundle(job, range.first),
                attempt_in_bundle(job, range.last),
            );
            self.t.carried.range(first..=last).copied()
        })
    }

    /// Gives a task in a bundle rows of its own, if it has none: it runs since then, or nothing is known of it.
    fn carry(
        &mut self,
        now: Timestamp,
        bundle: &BundleRecord,
        task: TaskIndex,
        started: Option<(Timestamp, String)>,
    ) {
        let id = attempt_in_bundle(bundle.id.job, task);
        if self.t.is_carried(id) {
            return;
        }
        // The agent's clock may be wrong; it cannot have started before it was placed nor after we heard of it.
        let (started_at, reason) = match started {
            Some((at, told)) => (
                Some(at.max(bundle.placed_at).min(now)),
                Reason::new(ReasonCode::Running, told),
            ),
            None => (None, Reason::new(ReasonCode::Placed, String::new())),
        };
        let runs = started_at.is_some();
        let state = if runs {
            JobState::Running
        } else {
            JobState::Preparing
        };
        let mut row = task_row(bundle, task, state, reason.clone());
        row.attempts = id.attempt.0;
        let member = MemberRecord {
            node: bundle.node,
            resources: bundle.resources,
            gpu_uuids: Vec::new(),
            phase: if runs {
                MemberPhase::Running
            } else {
                MemberPhase::Unconfirmed
            },
            address: OWN_ADDRESS.to_owned(),
            port: None,
            ranks: Vec::new(),
            outputs: None,
            checkpoint: None,
            warning: String::new(),
            cleanup: String::new(),
        };
        let attempt = AttemptRecord {
            id,
            owner: bundle.owner.clone(),
            workspace: bundle.workspace.clone(),
            state: if runs {
                AttemptState::Running
            } else {
                AttemptState::Placed
            },
            reason,
            outcome: None,
            exit: None,
            failed_rank: None,
            members: vec![member],
            resume_from: Vec::new(),
            placed_at: bundle.placed_at,
            ready_at: None,
            started_at,
            ended_at: None,
            lease: None,
        };
        self.t.insert_carried(row, attempt);
        let Some(job) = self.t.jobs.get(&id.job) else {
            return;
        };
        if let Some(cancel) = &job.cancel {
            let message = format!("{} asked for its end", cancel.by);
            let decision = Decision {
                outcome: Outcome::Cancelled,
                reason: Reason::new(ReasonCode::CancelRequested, message),
                exit: None,
                failed_rank: None,
                bad_nodes: Vec::new(),
            };
            self.decide(now, id, decision);
        }
        if started_at.is_some()
            && self
                .t
                .jobs
                .get(&id.job)
                .is_some_and(|job| job.started_at.is_none())
            && let Some(job) = self.t.job_mut(id.job)
        {
            job.started_at = started_at;
        }
    }
}

/// The number of the report that would follow on these.
fn next_report(seen: &ObservedBundle) -> u64 {
    let reports = u64::try_from(seen.reports.len()).unwrap_or(u64::MAX);
    seen.first.saturating_add(reports)
}

/// The tasks of a set that are in a range, however long that is.
fn within(tasks: &TaskSet, wanted: TaskRange) -> Vec<TaskIndex> {
    let ranges = tasks.ranges().iter();
    ranges
        .map(|range| TaskRange {
            first: range.first.max(wanted.first),
            last: range.last.min(wanted.last),
        })
        .filter(|range| range.first <= range.last)
        .flat_map(TaskRange::tasks)
        .collect()
}

fn task_row(bundle: &BundleRecord, task: TaskIndex, state: JobState, reason: Reason) -> TaskRecord {
    let (owner, workspace) = (bundle.owner.clone(), bundle.workspace.clone());
    TaskRecord {
        state,
        ..TaskRecord::untried(bundle.id.job, task, owner, workspace, reason)
    }
}
