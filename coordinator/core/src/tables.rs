//! The tables of rows and what is derived from them: what is used on which node, which attempts concern a node, which
//! jobs wait, how many tasks are in which state. A row is changed only through this file, so that the derived part and
//! the list of rows to persist cannot be forgotten. It must not know why a row changes.
//!
//! Durable: every `…Record`, the remembered requests (part of the job rows) and the next ids. Derived: everything else.

mod bundles;

use std::collections::{BTreeMap, BTreeSet};

use trainyard_common::ids::{
    AttemptNumber, AttemptRef, BundleRef, Digest, JobId, NodeId, RequestId, TaskIndex, TokenId,
    UserName,
};
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::record::{
    AttemptRecord, BundleRecord, JobRecord, MemberRecord, NodeRecord, Record, TaskCounts,
    TaskRecord, TokenRecord, UserRecord,
};
use trainyard_common::resources::Resources;
use trainyard_common::state::{AttemptState, JobState, MemberPhase, Reason};
use trainyard_common::time::Timestamp;

pub(crate) use self::bundles::{Bundled, attempt_in_bundle, times, width};
use crate::cleanup::lingers;
use crate::effect::Effect;
use crate::outbox::Outbox;
use crate::snapshot::Snapshot;

pub(crate) type TaskKey = (JobId, TaskIndex);

/// What a remembered request is remembered by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remembered {
    pub(crate) digest: Digest,
    pub(crate) job: JobId,
    pub(crate) at: Timestamp,
}

/// What members that are not released and bundles hold on one node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) amounts: Resources,
    pub(crate) gpus: BTreeMap<String, AttemptRef>,
    pub(crate) members: u32,
}

/// Tasks of a job with rows that have an attempt which is not over, by state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ActiveCounts {
    pub(crate) preparing: u32,
    pub(crate) running: u32,
    pub(crate) stopping: u32,
}

#[derive(Debug, Default)]
struct Dirty {
    users: BTreeSet<UserName>,
    tokens: BTreeSet<TokenId>,
    nodes: BTreeSet<NodeId>,
    removed_nodes: BTreeSet<NodeId>,
    jobs: BTreeSet<JobId>,
    tasks: BTreeSet<TaskKey>,
    attempts: BTreeSet<AttemptRef>,
    bundles: BTreeSet<BundleRef>,
    removed_bundles: BTreeSet<BundleRef>,
}

#[derive(Debug)]
pub(crate) struct Tables {
    pub(crate) jobs: BTreeMap<JobId, JobRecord>,
    pub(crate) tasks: BTreeMap<TaskKey, TaskRecord>,
    pub(crate) attempts: BTreeMap<AttemptRef, AttemptRecord>,
    pub(crate) bundles: BTreeMap<BundleRef, BundleRecord>,
    pub(crate) nodes: BTreeMap<NodeId, NodeRecord>,
    pub(crate) tokens: BTreeMap<TokenId, TokenRecord>,
    pub(crate) users: BTreeMap<UserName, UserRecord>,
    pub(crate) requests: BTreeMap<(UserName, RequestId), Remembered>,
    pub(crate) next_job: JobId,
    pub(crate) next_node: NodeId,
    pub(crate) next_token: TokenId,

    /// The remembered requests, oldest first.
    pub(crate) request_ages: BTreeSet<(Timestamp, UserName, RequestId)>,
    /// Jobs with tasks that wait for a place, in queue order.
    pub(crate) pending: BTreeSet<JobId>,
    pub(crate) active: BTreeMap<JobId, ActiveCounts>,
    pub(crate) usage: BTreeMap<NodeId, Usage>,
    /// Attempts with a member on the node that is not `ENDED`.
    pub(crate) on_node: BTreeMap<NodeId, BTreeSet<AttemptRef>>,
    /// Attempts with processes on the node that outlive SIGKILL.
    pub(crate) quarantined: BTreeMap<NodeId, BTreeSet<AttemptRef>>,
    /// What the bundles of a job come to.
    pub(crate) bundled: BTreeMap<JobId, Bundled>,
    pub(crate) bundles_by_node: BTreeMap<NodeId, BTreeSet<BundleRef>>,
    /// Attempts in memory whose tasks are in bundles, also in those that are `LOST`. They hold nothing by themselves.
    pub(crate) carried: BTreeSet<AttemptRef>,
    pub(crate) jobs_per_user: BTreeMap<UserName, usize>,
    /// Jobs whose state has to be derived again before the rows are persisted.
    pub(crate) touched: BTreeSet<JobId>,
    dirty: Dirty,
}

/// Whether the processes of a member are gone, so that what it held is free.
pub(crate) fn is_released(phase: MemberPhase) -> bool {
    phase >= MemberPhase::Uploading
        || (planted(Mutation::ReleaseAtStopping) && phase == MemberPhase::Stopping)
}

/// How many tasks of a job were never placed.
pub(crate) fn fresh_tasks(job: &JobRecord) -> u32 {
    let last = job.spec.array.map_or(0, |array| array.last);
    last.saturating_add(1).saturating_sub(job.next_fresh.0)
}

fn count_of(counts: &mut TaskCounts, state: JobState) -> &mut u32 {
    match state {
        JobState::Pending | JobState::Provisioning => &mut counts.pending,
        JobState::Preparing | JobState::Running | JobState::Stopping => &mut counts.active,
        JobState::Succeeded => &mut counts.succeeded,
        JobState::Failed => &mut counts.failed,
        JobState::Cancelled => &mut counts.cancelled,
        JobState::TimedOut => &mut counts.timed_out,
    }
}

impl ActiveCounts {
    fn of(&mut self, state: JobState) -> Option<&mut u32> {
        match state {
            JobState::Preparing => Some(&mut self.preparing),
            JobState::Running => Some(&mut self.running),
            JobState::Stopping => Some(&mut self.stopping),
            JobState::Pending
            | JobState::Provisioning
            | JobState::Succeeded
            | JobState::Failed
            | JobState::Cancelled
            | JobState::TimedOut => None,
        }
    }

    pub(crate) fn add(&mut self, state: JobState) {
        if let Some(count) = self.of(state) {
            *count += 1;
        }
    }

    fn remove(&mut self, state: JobState) {
        if let Some(count) = self.of(state) {
            *count = count.saturating_sub(1);
        }
    }
}

impl Usage {
    pub(crate) fn add(&mut self, attempt: AttemptRef, member: &MemberRecord) {
        self.amounts = self.amounts.plus(&member.resources);
        self.members += 1;
        for uuid in &member.gpu_uuids {
            self.gpus.insert(uuid.clone(), attempt);
        }
    }

    fn remove(&mut self, attempt: AttemptRef, member: &MemberRecord) {
        self.amounts = Resources {
            cpu_milli: self
                .amounts
                .cpu_milli
                .saturating_sub(member.resources.cpu_milli),
            memory_bytes: self
                .amounts
                .memory_bytes
                .saturating_sub(member.resources.memory_bytes),
            gpus: self.amounts.gpus.saturating_sub(member.resources.gpus),
        };
        self.members = self.members.saturating_sub(1);
        for uuid in &member.gpu_uuids {
            if self.gpus.get(uuid) == Some(&attempt) {
                self.gpus.remove(uuid);
            }
        }
    }
}

impl Tables {
    pub(crate) fn new(snapshot: Snapshot) -> Self {
        let mut tables = Self {
            jobs: snapshot.jobs.into_iter().map(|job| (job.id, job)).collect(),
            tasks: BTreeMap::new(),
            attempts: BTreeMap::new(),
            bundles: BTreeMap::new(),
            nodes: snapshot
                .nodes
                .into_iter()
                .map(|node| (node.id, node))
                .collect(),
            tokens: snapshot
                .tokens
                .into_iter()
                .map(|token| (token.id, token))
                .collect(),
            users: snapshot
                .users
                .into_iter()
                .map(|user| (user.name.clone(), user))
                .collect(),
            requests: BTreeMap::new(),
            next_job: snapshot.next_job,
            next_node: snapshot.next_node,
            next_token: snapshot.next_token,
            request_ages: BTreeSet::new(),
            pending: BTreeSet::new(),
            active: BTreeMap::new(),
            usage: BTreeMap::new(),
            on_node: BTreeMap::new(),
            quarantined: BTreeMap::new(),
            bundled: BTreeMap::new(),
            bundles_by_node: BTreeMap::new(),
            carried: BTreeSet::new(),
            jobs_per_user: BTreeMap::new(),
            touched: BTreeSet::new(),
            dirty: Dirty::default(),
        };
        for job in tables.jobs.values() {
            *tables.jobs_per_user.entry(job.owner.clone()).or_default() += 1;
            if job.tasks.pending > 0 {
                tables.pending.insert(job.id);
            }
        }
        for task in snapshot.tasks {
            tables.active.entry(task.job).or_default().add(task.state);
            tables.tasks.insert((task.job, task.index), task);
        }
        tables
            .active
            .retain(|_, counts| *counts != ActiveCounts::default());
        for bundle in snapshot.bundles {
            tables.index_bundle(bundle);
        }
        for attempt in snapshot.attempts {
            let AttemptRef { job, task, .. } = attempt.id;
            if attempt.id == attempt_in_bundle(job, task)
                && tables
                    .bundles_of(job)
                    .any(|bundle| bundle.tasks.contains(task))
            {
                tables.carried.insert(attempt.id);
            }
            tables.index_attempt(&attempt);
            tables.attempts.insert(attempt.id, attempt);
        }
        for request in snapshot.requests {
            tables.remember(
                request.owner,
                request.request_id,
                Remembered {
                    digest: request.digest,
                    job: request.job,
                    at: request.at,
                },
            );
        }
        tables
    }

    fn index_attempt(&mut self, attempt: &AttemptRecord) {
        if self.is_carried(attempt.id) {
            return;
        }
        for member in &attempt.members {
            if !is_released(member.phase) {
                self.usage
                    .entry(member.node)
                    .or_default()
                    .add(attempt.id, member);
            }
            if member.phase != MemberPhase::Ended {
                self.on_node
                    .entry(member.node)
                    .or_default()
                    .insert(attempt.id);
            }
            if lingers(member) {
                let there = self.quarantined.entry(member.node).or_default();
                there.insert(attempt.id);
            }
        }
    }

    pub(crate) fn remember(&mut self, owner: UserName, id: RequestId, what: Remembered) {
        self.request_ages
            .insert((what.at, owner.clone(), id.clone()));
        self.requests.insert((owner, id), what);
    }

    /// Forgets requests that were accepted before `oldest`.
    pub(crate) fn forget_requests(&mut self, oldest: Timestamp) {
        while let Some(first) = self.request_ages.first()
            && first.0 < oldest
            && let Some((_, owner, id)) = self.request_ages.pop_first()
        {
            self.requests.remove(&(owner, id));
        }
    }

    /// Puts a new job in.
    pub(crate) fn insert_job(&mut self, job: JobRecord) {
        self.dirty.jobs.insert(job.id);
        self.pending.insert(job.id);
        *self.jobs_per_user.entry(job.owner.clone()).or_default() += 1;
        self.jobs.insert(job.id, job);
    }

    /// A job to change anything of but its counts.
    pub(crate) fn job_mut(&mut self, id: JobId) -> Option<&mut JobRecord> {
        let job = self.jobs.get_mut(&id)?;
        self.dirty.jobs.insert(id);
        Some(job)
    }

    /// Makes the job's next fresh task a task of its own in state `PREPARING`.
    pub(crate) fn take_fresh(&mut self, id: JobId, reason: Reason) -> Option<TaskIndex> {
        let job = self.jobs.get_mut(&id)?;
        if fresh_tasks(job) == 0 || job.tasks.pending == 0 {
            return None;
        }
        let index = job.next_fresh;
        job.next_fresh = index.next();
        job.tasks.pending -= 1;
        job.tasks.active += 1;
        if job.tasks.pending == 0 {
            self.pending.remove(&id);
        }
        self.active.entry(id).or_default().preparing += 1;
        let (owner, workspace) = (job.owner.clone(), job.spec.workspace.clone());
        let task = TaskRecord::untried(id, index, owner, workspace, reason);
        self.tasks.insert((id, index), task);
        self.dirty.tasks.insert((id, index));
        self.dirty.jobs.insert(id);
        self.touched.insert(id);
        Some(index)
    }

    /// Counts every task that was never placed as cancelled.
    pub(crate) fn cancel_fresh(&mut self, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id) else {
            return;
        };
        let fresh = fresh_tasks(job);
        job.tasks.pending = job.tasks.pending.saturating_sub(fresh);
        job.tasks.cancelled += fresh;
        job.next_fresh = TaskIndex(job.next_fresh.0.saturating_add(fresh));
        if job.tasks.pending == 0 {
            self.pending.remove(&id);
        }
        self.dirty.jobs.insert(id);
        self.touched.insert(id);
    }

    /// A task to change anything of but its state.
    pub(crate) fn task_mut(&mut self, key: TaskKey) -> Option<&mut TaskRecord> {
        let task = self.tasks.get_mut(&key)?;
        self.dirty.tasks.insert(key);
        Some(task)
    }

    /// Moves a task to a state and keeps the counts. A terminal task stays as it is.
    pub(crate) fn set_task(
        &mut self,
        key: TaskKey,
        now: Timestamp,
        state: JobState,
        reason: Reason,
    ) {
        let (Some(task), Some(job)) = (self.tasks.get_mut(&key), self.jobs.get_mut(&key.0)) else {
            return;
        };
        if task.state.is_terminal() {
            return;
        }
        let before = task.state;
        task.state = state;
        task.reason = reason;
        if state.is_terminal() {
            task.ended_at = Some(now);
        }
        let old = count_of(&mut job.tasks, before);
        *old = old.saturating_sub(1);
        *count_of(&mut job.tasks, state) += 1;
        if job.tasks.pending == 0 {
            self.pending.remove(&key.0);
        } else {
            self.pending.insert(key.0);
        }
        let counts = self.active.entry(key.0).or_default();
        counts.remove(before);
        counts.add(state);
        if *counts == ActiveCounts::default() {
            self.active.remove(&key.0);
        }
        self.dirty.tasks.insert(key);
        self.dirty.jobs.insert(key.0);
        self.touched.insert(key.0);
    }

    /// Puts a new attempt in, with what its members hold.
    pub(crate) fn insert_attempt(&mut self, attempt: AttemptRecord) {
        self.index_attempt(&attempt);
        self.dirty.attempts.insert(attempt.id);
        self.attempts.insert(attempt.id, attempt);
    }

    /// An attempt to change anything of but its members' phases.
    pub(crate) fn attempt_mut(&mut self, id: AttemptRef) -> Option<&mut AttemptRecord> {
        let attempt = self.attempts.get_mut(&id)?;
        self.dirty.attempts.insert(id);
        Some(attempt)
    }

    /// Moves a member on and frees what it held once its processes are gone. Gives the phase before, or nothing if the
    /// member is already that far.
    pub(crate) fn advance_member(
        &mut self,
        id: AttemptRef,
        rank: usize,
        phase: MemberPhase,
    ) -> Option<MemberPhase> {
        let carried = self.is_carried(id);
        let member = self.attempts.get_mut(&id)?.members.get_mut(rank)?;
        let before = member.phase;
        if phase <= before {
            return None;
        }
        member.phase = phase;
        self.dirty.attempts.insert(id);
        if carried {
            return Some(before);
        }
        if lingers(member) {
            let there = self.quarantined.entry(member.node).or_default();
            there.insert(id);
        } else if before == MemberPhase::CleanupPending
            && let Some(there) = self.quarantined.get_mut(&member.node)
        {
            there.remove(&id);
            if there.is_empty() {
                self.quarantined.remove(&member.node);
            }
        }
        if is_released(phase)
            && !is_released(before)
            && let Some(usage) = self.usage.get_mut(&member.node)
        {
            usage.remove(id, member);
            if usage.members == 0 {
                self.usage.remove(&member.node);
            }
        }
        if phase == MemberPhase::Ended
            && let Some(attempts) = self.on_node.get_mut(&member.node)
        {
            attempts.remove(&id);
            if attempts.is_empty() {
                self.on_node.remove(&member.node);
            }
        }
        Some(before)
    }

    /// Attempts of a job, over or not.
    pub(crate) fn attempts_of(&self, job: JobId) -> impl Iterator<Item = &AttemptRecord> {
        let bound = |task, attempt| AttemptRef {
            job,
            task: TaskIndex(task),
            attempt: AttemptNumber(attempt),
        };
        self.attempts
            .range(bound(0, 0)..=bound(u32::MAX, u32::MAX))
            .map(|(_, attempt)| attempt)
    }

    /// Tasks of a job that have rows in memory.
    pub(crate) fn tasks_of(&self, job: JobId) -> impl Iterator<Item = &TaskRecord> {
        self.tasks
            .range((job, TaskIndex(0))..=(job, TaskIndex(u32::MAX)))
            .map(|(_, task)| task)
    }

    /// Attempts with a member on `node` that is not `ENDED`, with the place of that member.
    pub(crate) fn members_on(&self, node: NodeId) -> Vec<(AttemptRef, usize)> {
        let Some(attempts) = self.on_node.get(&node) else {
            return Vec::new();
        };
        attempts
            .iter()
            .filter_map(|id| {
                let attempt = self.attempts.get(id)?;
                let rank = attempt
                    .members
                    .iter()
                    .position(|member| member.node == node)?;
                Some((*id, rank))
            })
            .collect()
    }

    pub(crate) fn insert_node(&mut self, node: NodeRecord) {
        self.dirty.nodes.insert(node.id);
        self.nodes.insert(node.id, node);
    }

    pub(crate) fn node_mut(&mut self, id: NodeId) -> Option<&mut NodeRecord> {
        let node = self.nodes.get_mut(&id)?;
        self.dirty.nodes.insert(id);
        Some(node)
    }

    pub(crate) fn remove_node(&mut self, id: NodeId) {
        self.nodes.remove(&id);
        self.dirty.nodes.remove(&id);
        self.dirty.removed_nodes.insert(id);
    }

    pub(crate) fn insert_token(&mut self, token: TokenRecord) {
        self.dirty.tokens.insert(token.id);
        self.tokens.insert(token.id, token);
    }

    pub(crate) fn token_mut(&mut self, id: TokenId) -> Option<&mut TokenRecord> {
        let token = self.tokens.get_mut(&id)?;
        self.dirty.tokens.insert(id);
        Some(token)
    }

    pub(crate) fn insert_user(&mut self, user: UserRecord) {
        self.dirty.users.insert(user.name.clone());
        self.users.insert(user.name.clone(), user);
    }

    /// Writes each changed row once, those that others refer to first, and drops from memory what is over for good.
    pub(crate) fn flush(&mut self, out: &mut Outbox) {
        let dirty = std::mem::take(&mut self.dirty);
        let mut persist = |record| out.push(Effect::Persist(record));
        for name in dirty.users {
            if let Some(user) = self.users.get(&name) {
                persist(Record::User(Box::new(user.clone())));
            }
        }
        for id in dirty.tokens {
            if let Some(token) = self.tokens.get(&id) {
                persist(Record::Token(Box::new(token.clone())));
            }
        }
        for id in dirty.removed_nodes {
            persist(Record::NodeRemoved(id));
        }
        for id in dirty.nodes {
            if let Some(node) = self.nodes.get(&id) {
                persist(Record::Node(Box::new(node.clone())));
            }
        }
        for id in dirty.jobs {
            if let Some(job) = self.jobs.get(&id) {
                persist(Record::Job(Box::new(job.clone())));
                if job.state.is_terminal() {
                    self.drop_job(id);
                }
            }
        }
        for id in dirty.removed_bundles {
            persist(Record::BundleRemoved(id));
        }
        for id in dirty.bundles {
            if let Some(bundle) = self.bundles.get(&id) {
                persist(Record::Bundle(Box::new(bundle.clone())));
            }
        }
        for key in dirty.tasks {
            let over = self.tasks.get(&key).map(|task| task.state.is_terminal());
            let row = match over {
                Some(true) => self.tasks.remove(&key),
                Some(false) => self.tasks.get(&key).cloned(),
                None => None,
            };
            row.into_iter()
                .for_each(|task| persist(Record::Task(Box::new(task))));
        }
        for id in dirty.attempts {
            let state = self.attempts.get(&id).map(|attempt| attempt.state);
            let row = match state {
                Some(AttemptState::Ended) => {
                    self.carried.remove(&id);
                    let row = self.attempts.remove(&id);
                    row.filter(|_| !planted(Mutation::EndNotPersisted))
                }
                Some(_) => self.attempts.get(&id).cloned(),
                None => None,
            };
            row.into_iter()
                .for_each(|attempt| persist(Record::Attempt(Box::new(attempt))));
        }
    }

    fn drop_job(&mut self, id: JobId) {
        let Some(job) = self.jobs.remove(&id) else {
            return;
        };
        self.pending.remove(&id);
        self.active.remove(&id);
        if let Some(count) = self.jobs_per_user.get_mut(&job.owner) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.jobs_per_user.remove(&job.owner);
            }
        }
    }
}
