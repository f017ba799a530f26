//! What reads and checks of rights see: rows that are durable, and only those about live work. The driver publishes a
//! batch here after its commit and before anybody is answered, so whoever got an answer sees its effect.
//!
//! Jobs leave when they reach a terminal state; the store has them.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use tokio::sync::watch;
use trainyard_common::ids::{
    AttemptNumber, AttemptRef, BundleRef, JobId, NodeId, Sequence, TaskIndex, TokenId, UserName,
};
use trainyard_common::record::{
    AttemptRecord, BundleRecord, JobRecord, NodeRecord, Record, TokenRecord, UserRecord,
};
use trainyard_common::state::AttemptState;

use crate::store::Loaded;

/// The durable rows about live work. Readers share it with the one who publishes.
#[derive(Debug)]
pub(crate) struct ReadModel {
    tables: RwLock<Tables>,
    revision: watch::Sender<Sequence>,
}

/// The rows at one moment.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    /// Jobs that are not in a terminal state.
    pub(crate) jobs: BTreeMap<JobId, Arc<JobRecord>>,
    /// Attempts that are not `ENDED`.
    pub(crate) attempts: BTreeMap<AttemptRef, Arc<AttemptRecord>>,
    /// Bundles that have not ended; also those of jobs that are over.
    pub(crate) bundles: BTreeMap<BundleRef, Arc<BundleRecord>>,
    pub(crate) nodes: BTreeMap<NodeId, Arc<NodeRecord>>,
    pub(crate) tokens: BTreeMap<TokenId, Arc<TokenRecord>>,
    pub(crate) users: BTreeMap<UserName, Arc<UserRecord>>,
    /// When something of a live job last changed since the start of this process.
    changed: BTreeMap<JobId, Sequence>,
    /// The last durable transition.
    pub(crate) revision: Sequence,
    /// The same at the start of this process: what did not change since has changed at this one at the latest.
    base: Sequence,
}

impl ReadModel {
    pub(crate) fn new(loaded: &Loaded) -> Self {
        let mut tables = Tables {
            revision: loaded.sequence,
            base: loaded.sequence,
            ..Tables::default()
        };
        let from = &loaded.snapshot;
        tables
            .jobs
            .extend(from.jobs.iter().map(|row| (row.id, Arc::new(row.clone()))));
        tables.attempts.extend(
            from.attempts
                .iter()
                .map(|row| (row.id, Arc::new(row.clone()))),
        );
        tables.bundles.extend(
            from.bundles
                .iter()
                .map(|row| (row.id, Arc::new(row.clone()))),
        );
        tables
            .nodes
            .extend(from.nodes.iter().map(|row| (row.id, Arc::new(row.clone()))));
        tables.tokens.extend(
            from.tokens
                .iter()
                .map(|row| (row.id, Arc::new(row.clone()))),
        );
        tables.users.extend(
            from.users
                .iter()
                .map(|row| (row.name.clone(), Arc::new(row.clone()))),
        );
        Self {
            tables: RwLock::new(tables),
            revision: watch::Sender::new(loaded.sequence),
        }
    }

    /// The rows now. Not to be held across an await.
    pub(crate) fn tables(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes after every publication.
    pub(crate) fn watch(&self) -> watch::Receiver<Sequence> {
        self.revision.subscribe()
    }

    /// Shows records that are durable, the last of them with number `last`.
    pub(crate) fn publish(&self, records: Vec<Record>, last: Sequence) {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        for record in records {
            tables.apply(record, last);
        }
        tables.revision = last;
        drop(tables);
        self.revision.send_replace(last);
    }
}

impl Tables {
    fn apply(&mut self, record: Record, at: Sequence) {
        match record {
            Record::Job(job) if job.state.is_terminal() => {
                self.jobs.remove(&job.id);
                self.changed.remove(&job.id);
            }
            Record::Job(job) => {
                self.changed.insert(job.id, at);
                self.jobs.insert(job.id, Arc::from(job));
            }
            Record::Task(task) => self.touch(task.job, at),
            Record::Attempt(attempt) => {
                self.touch(attempt.id.job, at);
                if attempt.state == AttemptState::Ended {
                    self.attempts.remove(&attempt.id);
                } else {
                    self.attempts.insert(attempt.id, Arc::from(attempt));
                }
            }
            Record::Bundle(bundle) => drop(self.bundles.insert(bundle.id, Arc::from(bundle))),
            Record::BundleRemoved(bundle) => drop(self.bundles.remove(&bundle)),
            Record::Node(node) => drop(self.nodes.insert(node.id, Arc::from(node))),
            Record::NodeRemoved(node) => drop(self.nodes.remove(&node)),
            Record::Token(token) if token.revoked || token.uses_left == 0 => {
                self.tokens.remove(&token.id);
            }
            Record::Token(token) => drop(self.tokens.insert(token.id, Arc::from(token))),
            Record::User(user) => drop(self.users.insert(user.name.clone(), Arc::from(user))),
        }
    }

    fn touch(&mut self, job: JobId, at: Sequence) {
        if self.jobs.contains_key(&job) {
            self.changed.insert(job, at);
        }
    }

    /// The attempts of a live job that are not over, in order.
    pub(crate) fn attempts_of(&self, job: JobId) -> Vec<Arc<AttemptRecord>> {
        let of = |task, attempt| AttemptRef {
            job,
            task: TaskIndex(task),
            attempt: AttemptNumber(attempt),
        };
        let range = self.attempts.range(of(0, 0)..=of(u32::MAX, u32::MAX));
        range.map(|(_, attempt)| Arc::clone(attempt)).collect()
    }

    /// The bundles of a job that have not ended, in order.
    pub(crate) fn bundles_of(&self, job: JobId) -> impl Iterator<Item = &Arc<BundleRecord>> {
        let of = |bundle| BundleRef { job, bundle };
        self.bundles
            .range(of(0)..=of(u32::MAX))
            .map(|(_, bundle)| bundle)
    }

    /// The bundle that holds the task of this attempt, if the attempt is one in a bundle.
    pub(crate) fn in_bundle(&self, id: AttemptRef) -> Option<&Arc<BundleRecord>> {
        if id.attempt != AttemptNumber(1) {
            return None;
        }
        self.bundles_of(id.job)
            .find(|bundle| bundle.tasks.contains(id.task))
    }

    /// When something of a live job last changed, at the latest.
    pub(crate) fn changed(&self, job: JobId) -> Sequence {
        self.changed.get(&job).copied().unwrap_or(self.base)
    }
}
