//! The life of a bundle but for what its agent reports: handed to a node, filled, closed, stopped, given up; and what
//! is desired of it at the moment. How tasks leave it is in `reports.rs`. It must not know how a place is found.

use std::collections::BTreeSet;

use trainyard_common::bundle::{
    BundlePhase, DesiredBundle, MAX_RANGES, MAX_SLOTS, TaskSet, may_bundle,
};
use trainyard_common::ids::{BundleRef, JobId, NodeId};
use trainyard_common::limits;
use trainyard_common::member::{MemberSpec, Stop};
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::record::{AttemptRecord, BundleRecord, BundleState, JobRecord};
use trainyard_common::spec::OnDisconnect;
use trainyard_common::state::{Reason, ReasonCode};
use trainyard_common::time::Timestamp;
use trainyard_common::units::format_duration;

use crate::Core;
use crate::ahead::top_up;
use crate::attempts::count;
use crate::config::MAX_BUNDLES_PER_NODE;
use crate::effect::{Command, Urgency};
use crate::tables::{fresh_tasks, times, width};

impl Core {
    /// Whether fresh tasks of the job go into bundles.
    pub(crate) fn bundles_tasks(&self, job: &JobRecord) -> bool {
        may_bundle(&job.spec) && !self.live.unbundled.contains(&job.id)
    }

    /// Hands fresh tasks of a job to a node: to bundles with free slots that are there, and else to new ones. The caller
    /// has checked that the node takes new work. Gives the bundles that changed, and how many tasks are left because the
    /// node has as many bundles as it takes; nothing if so many tasks do not fit.
    pub(crate) fn hand_out(
        &mut self,
        now: Timestamp,
        id: JobId,
        node: NodeId,
        tasks: u32,
    ) -> Option<(BTreeSet<BundleRef>, u32)> {
        let each = self.t.jobs.get(&id)?.spec.resources_per_node;
        if !times(&each, tasks).fits(&self.free_on(node)?) {
            return None;
        }
        let mut changed = BTreeSet::new();
        let mut left = tasks;
        let open: Vec<(BundleRef, u32)> = self
            .t
            .bundles_of(id)
            .filter(|bundle| bundle.node == node && takes_tasks(bundle))
            .map(|bundle| (bundle.id, bundle.slots - width(bundle)))
            .filter(|(_, room)| *room > 0)
            .collect();
        for (bundle, room) in open {
            let most = left.min(room);
            if most > 0 && self.add_tasks(bundle, most) {
                changed.insert(bundle);
                left -= most;
            }
        }
        while left > 0 && self.t.bundles_on(node).len() < MAX_BUNDLES_PER_NODE {
            let slots = left.min(MAX_SLOTS);
            let Some(bundle) = self.new_bundle(now, id, node, slots) else {
                break; // Fewer are fresh than were planned.
            };
            changed.insert(bundle);
            left -= slots;
        }
        Some((changed, left))
    }

    fn new_bundle(
        &mut self,
        now: Timestamp,
        id: JobId,
        node: NodeId,
        slots: u32,
    ) -> Option<BundleRef> {
        let range = self.t.take_fresh_range(id, slots)?;
        let job = self.t.job_mut(id)?;
        job.bundles = job.bundles.saturating_add(1);
        let bundle = BundleRef {
            job: id,
            bundle: job.bundles,
        };
        let record = BundleRecord {
            id: bundle,
            owner: job.owner.clone(),
            workspace: job.spec.workspace.clone(),
            state: BundleState::Placed,
            reason: Reason::new(ReasonCode::Placed, format!("has a place on {node}")),
            node,
            slots: range.count(),
            resources: job.spec.resources_per_node,
            tasks: [range].into_iter().collect(),
            recorded: 0,
            placed_at: now,
        };
        self.t.keep_bundle(record);
        let from = now.max(self.live.lease_base);
        self.live
            .arm_bundle(bundle, Some(from.after(self.config.prepare_timeout)));
        Some(bundle)
    }

    /// Adds the job's next fresh tasks to a bundle. False if there are none, or it holds too many ranges already.
    fn add_tasks(&mut self, id: BundleRef, most: u32) -> bool {
        let full = |bundle: &BundleRecord| bundle.tasks.ranges().len() >= MAX_RANGES;
        if self.t.bundles.get(&id).is_none_or(full) {
            return false;
        }
        let Some(range) = self.t.take_fresh_range(id.job, most) else {
            return false;
        };
        if let Some(mut bundle) = self.t.take_bundle(id) {
            bundle.tasks.insert(range);
            self.t.keep_bundle(bundle);
        }
        true
    }

    /// Gives running bundles tasks ahead of their slots, in queue order and not behind the job that is first in line
    /// and does not fit. Gives those that changed.
    pub(crate) fn fill_ahead(&mut self, reached: Option<JobId>) -> BTreeSet<BundleRef> {
        let last = reached.unwrap_or(JobId(u64::MAX));
        let jobs: Vec<JobId> = self
            .t
            .bundled
            .range(..=last)
            .map(|(job, _)| *job)
            .filter(|job| self.t.jobs.get(job).is_some_and(|job| fresh_tasks(job) > 0))
            .collect();
        let mut changed = BTreeSet::new();
        for job in jobs {
            let missing: Vec<(BundleRef, u32)> = self
                .t
                .bundles_of(job)
                .map(|bundle| (bundle.id, self.missing_ahead(bundle)))
                .filter(|(_, missing)| *missing > 0)
                .collect();
            for (bundle, missing) in missing {
                if self.add_tasks(bundle, missing) {
                    changed.insert(bundle);
                }
            }
        }
        changed
    }

    /// Tasks that the bundle should hold beyond those it has.
    pub(crate) fn missing_ahead(&self, bundle: &BundleRecord) -> u32 {
        let open = || {
            let node = self.t.nodes.get(&bundle.node);
            node.is_some_and(|node| self.is_open(node))
        };
        let pace = self.live.paces.get(&bundle.id);
        match pace {
            // A node that could not prepare lately gets one task at a time.
            Some(_) if self.live.troubles.is_known(bundle.node) => 0,
            Some(pace) if bundle.state == BundleState::Running && open() => {
                top_up(bundle.slots, pace.ahead(bundle.slots), bundle.tasks.count())
            }
            Some(_) | None => 0,
        }
    }

    /// Tells agents of bundles that were handed tasks, and of all bundles of these jobs if they have no more.
    pub(crate) fn tell_handed(
        &mut self,
        mut changed: BTreeSet<BundleRef>,
        mut jobs: BTreeSet<JobId>,
    ) {
        jobs.extend(changed.iter().map(|bundle| bundle.job));
        for job in jobs {
            if self
                .t
                .jobs
                .get(&job)
                .is_some_and(|job| fresh_tasks(job) == 0)
            {
                let others: Vec<BundleRef> = self
                    .t
                    .bundles_of(job)
                    .filter(|bundle| takes_tasks(bundle))
                    .map(|bundle| bundle.id)
                    .collect();
                others.iter().for_each(|id| self.close_if_running(*id));
                changed.extend(others);
            }
        }
        changed.into_iter().for_each(|id| self.tell_bundle(id));
    }

    fn close_if_running(&mut self, id: BundleRef) {
        let running = |bundle: &&BundleRecord| bundle.state == BundleState::Running;
        if self.t.bundles.get(&id).filter(running).is_none() {
            return; // One of which nothing runs yet is closed by the job having no fresh tasks.
        }
        self.set_bundle(
            id,
            BundleState::Closing,
            Reason::new(ReasonCode::Running, "its last tasks run"),
        );
    }

    fn set_bundle(&mut self, id: BundleRef, state: BundleState, reason: Reason) {
        if let Some(mut bundle) = self.t.take_bundle(id) {
            bundle.state = state;
            bundle.reason = reason;
            self.t.keep_bundle(bundle);
        }
    }

    /// The node takes no new work: its bundles get no more tasks.
    pub(crate) fn close_bundles_on(&mut self, node: NodeId) {
        for id in self.t.bundles_on(node) {
            if self.t.bundles.get(&id).is_some_and(takes_tasks) {
                let reason = Reason::new(
                    ReasonCode::Operator,
                    format!("{node} takes no new work; what it holds already runs"),
                );
                self.set_bundle(id, BundleState::Closing, reason);
                self.tell_bundle(id);
            }
        }
    }

    /// The job's end was asked for.
    pub(crate) fn stop_bundles_of(&mut self, now: Timestamp, job: JobId, reason: &Reason) {
        let ids: Vec<BundleRef> = self.t.bundles_of(job).map(|bundle| bundle.id).collect();
        for id in ids {
            self.stop_bundle(id, reason.clone());
            self.settle_bundle(now, id);
        }
    }

    /// Has a bundle end what runs and give back what does not.
    fn stop_bundle(&mut self, id: BundleRef, reason: Reason) {
        let state = self.t.bundles.get(&id).map(|bundle| bundle.state);
        if !matches!(
            state,
            Some(BundleState::Placed | BundleState::Running | BundleState::Closing)
        ) {
            return;
        }
        self.live.arm_bundle(id, None);
        self.set_bundle(id, BundleState::Stopping, reason);
        self.tell_bundle(id);
    }

    /// Nothing of the bundle ran in time. Its tasks go the single way once the agent has given them back.
    pub(crate) fn bundle_timed_out(&mut self, now: Timestamp, id: BundleRef) {
        let Some(node) = self.t.bundles.get(&id).map(|bundle| bundle.node) else {
            return;
        };
        if self.is_silent(node) {
            // Its tasks may run there by now. How long a silent node is waited for is its policy's business.
            let again = now.after(self.config.prepare_timeout);
            return self.live.arm_bundle(id, Some(again));
        }
        let message = format!(
            "{node} not ready within {}",
            format_duration(self.config.prepare_timeout)
        );
        let reason = Reason::new(ReasonCode::PrepareTimeout, message);
        self.end_bundling(id.job, &reason);
        self.stop_bundle(id, reason);
    }

    /// A bundle of the job could not be prepared: its further tasks go the single way, with its waits between attempts
    /// and its end after too many.
    pub(crate) fn end_bundling(&mut self, job: JobId, why: &Reason) {
        if self.t.jobs.contains_key(&job) && self.live.unbundled.insert(job) {
            let message = format!(
                "{job} gets no more bundles, its tasks are placed one by one: {}",
                why.message
            );
            self.note(Urgency::Warn, why.code, message);
        }
    }

    /// Times the preparing of every bundle anew.
    pub(crate) fn restart_bundle_timers(&mut self, now: Timestamp) {
        let placed = |bundle: &&BundleRecord| bundle.state == BundleState::Placed;
        let ids: BTreeSet<BundleRef> = self
            .t
            .bundles
            .values()
            .filter(placed)
            .map(|bundle| bundle.id)
            .chain(self.live.armed_bundles.keys().copied())
            .collect();
        let due = now.after(self.config.prepare_timeout);
        for id in ids {
            self.live.arm_bundle(id, Some(due));
        }
    }

    /// Gives a bundle up if its node is silent for too long and the job does not want to wait.
    pub(crate) fn settle_bundle(&mut self, now: Timestamp, id: BundleRef) {
        let Some(bundle) = self.t.bundles.get(&id) else {
            return;
        };
        let node = bundle.node;
        let given_up = self.silence(now, node) >= self.config.lost_after
            && self.is_silent(node)
            && !self.live.braked;
        if bundle.state == BundleState::Lost || !given_up {
            return;
        }
        let replace = |job: &JobRecord| job.spec.on_disconnect == OnDisconnect::Replace;
        if self.t.jobs.get(&id.job).is_none_or(replace) || planted(Mutation::WaitingBundleLost) {
            return self.lose_bundle(now, id);
        }
        if bundle.reason.code == ReasonCode::NodeUnreachable
            || bundle.state == BundleState::Stopping
        {
            return;
        }
        let message = format!("{node} is not heard of; waits until what runs there is confirmed");
        self.explain_bundle(now, id, Reason::new(ReasonCode::NodeUnreachable, message));
    }

    /// Gives a bundle and those of its tasks that have rows another reason in the same state.
    fn explain_bundle(&mut self, now: Timestamp, id: BundleRef, reason: Reason) {
        let Some(mut bundle) = self.t.take_bundle(id) else {
            return;
        };
        bundle.reason = reason.clone();
        let carried: Vec<_> = self.carried_of(&bundle).collect();
        self.t.keep_bundle(bundle);
        for attempt in carried {
            let undecided =
                |attempt: &AttemptRecord| attempt.outcome.is_none() && !attempt.state.is_over();
            if self.t.attempts.get(&attempt).is_some_and(undecided) {
                self.explain_attempt(now, attempt, reason.clone());
            }
        }
    }

    /// A silent node is heard of again: its bundles that only waited for it go on.
    pub(crate) fn resume_bundles(&mut self, now: Timestamp, node: NodeId) {
        for id in self.t.bundles_on(node) {
            let waits = self.t.bundles.get(&id).is_some_and(|bundle| {
                bundle.state != BundleState::Lost
                    && bundle.reason.code == ReasonCode::NodeUnreachable
            });
            if waits {
                let message = format!("runs; {node} is heard of again");
                self.explain_bundle(now, id, Reason::new(ReasonCode::Running, message));
            }
        }
    }

    /// Tells a bundle's agent what is desired of it, if the agent is in session. Otherwise it hears when it comes back.
    pub(crate) fn tell_bundle(&mut self, id: BundleRef) {
        let Some(bundle) = self.t.bundles.get(&id) else {
            return;
        };
        // Once something of it ran the agent has the specification.
        let first = bundle.state == BundleState::Placed;
        let node = bundle.node;
        let desired = self.desired_bundle(bundle, first);
        self.live.paces.entry(id).or_default().told = desired.recorded;
        self.send(node, Command::DesireBundle(Box::new(desired)));
    }

    /// What is desired of a bundle now.
    pub(crate) fn desired_bundle(&self, bundle: &BundleRecord, with_spec: bool) -> DesiredBundle {
        let job = self.t.jobs.get(&bundle.id.job);
        let grace = job.map_or(limits::DEFAULT_GRACE, |job| job.spec.grace);
        let phase = match bundle.state {
            BundleState::Placed | BundleState::Running
                if job.is_some_and(|job| fresh_tasks(job) > 0) =>
            {
                BundlePhase::Run
            }
            BundleState::Placed | BundleState::Running | BundleState::Closing => BundlePhase::Close,
            BundleState::Stopping => BundlePhase::Stop(Stop {
                code: bundle.reason.code,
                grace,
            }),
            BundleState::Lost => BundlePhase::Stop(Stop {
                code: ReasonCode::NodeLost,
                grace,
            }),
        };
        let starts = !matches!(phase, BundlePhase::Stop(_)) && !bundle.tasks.is_empty();
        let spec = job
            .filter(|_| with_spec && starts)
            .map(|job| Box::new(task_spec(job, bundle)));
        DesiredBundle {
            bundle: bundle.id,
            slots: bundle.slots,
            phase,
            tasks: bundle.tasks.clone(),
            recorded: bundle.recorded,
            spec,
        }
    }
}

/// Whether the bundle may get more tasks.
pub(crate) fn takes_tasks(bundle: &BundleRecord) -> bool {
    matches!(bundle.state, BundleState::Placed | BundleState::Running)
        || (planted(Mutation::ClosedBundleFilled) && bundle.state == BundleState::Closing)
}

/// How each task of the bundle is started.
fn task_spec(job: &JobRecord, bundle: &BundleRecord) -> MemberSpec {
    let spec = &job.spec;
    MemberSpec {
        job_name: spec.name.clone(),
        owner: job.owner.clone(),
        workspace: spec.workspace.clone(),
        node_rank: 0,
        nodes: 1,
        procs_per_node: 1,
        resources: bundle.resources,
        gpu_uuids: Vec::new(),
        launcher: spec.launcher,
        command: spec.command.clone(),
        env: spec.env.clone(),
        snapshot: spec.snapshot,
        resume_from: Vec::new(),
        time_limit: spec.time_limit,
        grace: spec.grace,
        lease: None, // Such a job is never bundled.
    }
}

/// A bundle that is not on record is ended and gives everything back.
pub(crate) fn stray_stop(bundle: BundleRef, recorded: u64) -> DesiredBundle {
    DesiredBundle {
        bundle,
        slots: 1,
        phase: BundlePhase::Stop(Stop {
            code: ReasonCode::NodeLost,
            grace: limits::DEFAULT_GRACE,
        }),
        tasks: TaskSet::default(),
        recorded,
        spec: None,
    }
}

/// `3 tasks`.
pub(crate) fn count_tasks(tasks: u32) -> String {
    count(usize::try_from(tasks).unwrap_or(usize::MAX), "task")
}
