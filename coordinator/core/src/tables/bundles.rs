//! The part of the tables that is about bundles: what each one holds of its node and counts for in its job. A bundle is
//! taken out to be changed and put back, so that what is derived from it is worked out once for many changes.

use trainyard_common::bundle::TaskRange;
use trainyard_common::ids::{AttemptNumber, AttemptRef, BundleRef, JobId, NodeId, TaskIndex};
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::record::{AttemptRecord, BundleRecord, BundleState, TaskRecord};
use trainyard_common::resources::Resources;

use super::{Tables, Usage, fresh_tasks};

/// The number of every attempt that is made in a bundle.
pub(crate) const IN_BUNDLE: AttemptNumber = AttemptNumber(1);

/// What the bundles of a job that are not `LOST` come to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Bundled {
    /// Tasks in them.
    pub(crate) tasks: u32,
    /// How many of those run at a time at most.
    pub(crate) width: u32,
    /// Bundles with tasks that are `PLACED`.
    pub(crate) placed: u32,
    /// Likewise `RUNNING` or `CLOSING`.
    pub(crate) running: u32,
    /// Likewise `STOPPING`.
    pub(crate) stopping: u32,
}

impl Bundled {
    fn of(&mut self, state: BundleState) -> &mut u32 {
        match state {
            BundleState::Placed => &mut self.placed,
            BundleState::Running | BundleState::Closing => &mut self.running,
            BundleState::Stopping | BundleState::Lost => &mut self.stopping,
        }
    }

    pub(crate) fn add(&mut self, bundle: &BundleRecord) {
        if bundle.state != BundleState::Lost && !bundle.tasks.is_empty() {
            self.tasks += bundle.tasks.count();
            self.width += width(bundle);
            *self.of(bundle.state) += 1;
        }
    }

    fn remove(&mut self, bundle: &BundleRecord) {
        if bundle.state != BundleState::Lost && !bundle.tasks.is_empty() {
            self.tasks = self.tasks.saturating_sub(bundle.tasks.count());
            self.width = self.width.saturating_sub(width(bundle));
            let state = self.of(bundle.state);
            *state = state.saturating_sub(1);
        }
    }
}

/// Tasks of a bundle that run at a time at most. Those of a `LOST` one may still run.
pub(crate) fn width(bundle: &BundleRecord) -> u32 {
    bundle.slots.min(bundle.tasks.count())
}

/// What so many tasks hold.
pub(crate) fn times(each: &Resources, tasks: u32) -> Resources {
    Resources {
        cpu_milli: each.cpu_milli.saturating_mul(u64::from(tasks)),
        memory_bytes: each.memory_bytes.saturating_mul(u64::from(tasks)),
        gpus: each.gpus.saturating_mul(tasks),
    }
}

/// The attempt of a task in a bundle.
pub(crate) fn attempt_in_bundle(job: JobId, task: TaskIndex) -> AttemptRef {
    AttemptRef {
        job,
        task,
        attempt: IN_BUNDLE,
    }
}

impl Usage {
    pub(crate) fn add_bundle(&mut self, bundle: &BundleRecord) {
        let width = match planted(Mutation::BundleHoldsOne) {
            true => 1,
            false => width(bundle),
        };
        self.amounts = self.amounts.plus(&times(&bundle.resources, width));
        self.members += width;
    }

    fn remove_bundle(&mut self, bundle: &BundleRecord) {
        let width = width(bundle);
        let held = times(&bundle.resources, width);
        self.amounts = Resources {
            cpu_milli: self.amounts.cpu_milli.saturating_sub(held.cpu_milli),
            memory_bytes: self.amounts.memory_bytes.saturating_sub(held.memory_bytes),
            gpus: self.amounts.gpus.saturating_sub(held.gpus),
        };
        self.members = self.members.saturating_sub(width);
    }
}

impl Tables {
    /// The bundles of a job, in order.
    pub(crate) fn bundles_of(&self, job: JobId) -> impl Iterator<Item = &BundleRecord> {
        let bound = |bundle| BundleRef { job, bundle };
        self.bundles
            .range(bound(0)..=bound(u32::MAX))
            .map(|(_, bundle)| bundle)
    }

    /// The bundles of a node, in order.
    pub(crate) fn bundles_on(&self, node: NodeId) -> Vec<BundleRef> {
        let bundles = self.bundles_by_node.get(&node);
        bundles.into_iter().flatten().copied().collect()
    }

    /// Takes a bundle out to change it. It must be put back with [`keep_bundle`](Self::keep_bundle) or dropped with
    /// [`drop_bundle`](Self::drop_bundle).
    pub(crate) fn take_bundle(&mut self, id: BundleRef) -> Option<BundleRecord> {
        let bundle = self.bundles.remove(&id)?;
        if let Some(bundled) = self.bundled.get_mut(&id.job) {
            bundled.remove(&bundle);
            if *bundled == Bundled::default() {
                self.bundled.remove(&id.job);
            }
        }
        if width(&bundle) > 0
            && let Some(usage) = self.usage.get_mut(&bundle.node)
        {
            usage.remove_bundle(&bundle);
            if usage.members == 0 {
                self.usage.remove(&bundle.node);
            }
        }
        if let Some(bundles) = self.bundles_by_node.get_mut(&bundle.node) {
            bundles.remove(&id);
            if bundles.is_empty() {
                self.bundles_by_node.remove(&bundle.node);
            }
        }
        Some(bundle)
    }

    /// Puts a bundle in that is new or was changed.
    pub(crate) fn keep_bundle(&mut self, bundle: BundleRecord) {
        self.dirty.bundles.insert(bundle.id);
        self.touched.insert(bundle.id.job);
        self.index_bundle(bundle);
    }

    /// Puts a bundle in that is as it was.
    pub(crate) fn index_bundle(&mut self, bundle: BundleRecord) {
        if bundle.state != BundleState::Lost && !bundle.tasks.is_empty() {
            self.bundled.entry(bundle.id.job).or_default().add(&bundle);
        }
        if width(&bundle) > 0 {
            self.usage
                .entry(bundle.node)
                .or_default()
                .add_bundle(&bundle);
        }
        self.bundles_by_node
            .entry(bundle.node)
            .or_default()
            .insert(bundle.id);
        self.bundles.insert(bundle.id, bundle);
    }

    /// A bundle that was taken out is no more.
    pub(crate) fn drop_bundle(&mut self, bundle: &BundleRecord) {
        self.dirty.bundles.remove(&bundle.id);
        self.dirty.removed_bundles.insert(bundle.id);
        self.touched.insert(bundle.id.job);
    }

    /// Takes the job's next fresh tasks, at most `most`, for a bundle: they count as active from here on.
    pub(crate) fn take_fresh_range(&mut self, id: JobId, most: u32) -> Option<TaskRange> {
        let job = self.jobs.get_mut(&id)?;
        let tasks = fresh_tasks(job).min(most).min(job.tasks.pending);
        let last = job.next_fresh.0.checked_add(tasks.checked_sub(1)?)?;
        let range = TaskRange {
            first: job.next_fresh,
            last: TaskIndex(last),
        };
        job.next_fresh = range.last.next();
        job.tasks.pending -= tasks;
        job.tasks.active += tasks;
        if job.tasks.pending == 0 {
            self.pending.remove(&id);
        }
        self.dirty.jobs.insert(id);
        self.touched.insert(id);
        Some(range)
    }

    /// Whether the attempt is one of a task in a bundle: the bundle holds what it needs and speaks for it.
    pub(crate) fn is_carried(&self, id: AttemptRef) -> bool {
        id.attempt == IN_BUNDLE && self.carried.contains(&id)
    }

    /// Gives a task in a bundle rows of its own. It counted as active before.
    pub(crate) fn insert_carried(&mut self, task: TaskRecord, attempt: AttemptRecord) {
        let key = (task.job, task.index);
        self.active.entry(key.0).or_default().add(task.state);
        self.dirty.tasks.insert(key);
        self.tasks.insert(key, task);
        self.carried.insert(attempt.id);
        self.dirty.attempts.insert(attempt.id);
        self.attempts.insert(attempt.id, attempt);
        self.touched.insert(key.0);
    }

    /// Gives a task that left its bundle without an attempt a row: it waits for a place.
    pub(crate) fn insert_returned(&mut self, task: TaskRecord) {
        let key = (task.job, task.index);
        let Some(job) = self.jobs.get_mut(&key.0) else {
            return;
        };
        job.tasks.active = job.tasks.active.saturating_sub(1);
        job.tasks.pending += 1;
        self.pending.insert(key.0);
        self.dirty.jobs.insert(key.0);
        self.dirty.tasks.insert(key);
        self.tasks.insert(key, task);
        self.touched.insert(key.0);
    }

    /// Counts tasks that left their bundle without an attempt as cancelled.
    pub(crate) fn cancel_returned(&mut self, id: JobId, tasks: u32) {
        let Some(job) = self.jobs.get_mut(&id) else {
            return;
        };
        job.tasks.active = job.tasks.active.saturating_sub(tasks);
        match planted(Mutation::ReturnedSucceeds) {
            true => job.tasks.succeeded += tasks,
            false => job.tasks.cancelled += tasks,
        }
        self.dirty.jobs.insert(id);
        self.touched.insert(id);
    }
}
