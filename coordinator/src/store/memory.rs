//! A store in memory for tests, with failures on request. It keeps the promises of the trait except the one thing that
//! it cannot: nothing outlives it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use trainyard_common::ids::{
    AttemptRef, BundleRef, ClusterId, JobId, NodeId, Sequence, TaskIndex, Term, TokenId, UserName,
};
use trainyard_common::record::{
    AttemptRecord, BundleRecord, JobRecord, NodeRecord, Record, TaskRecord, TokenRecord, UserRecord,
};
use trainyard_common::state::{AttemptState, JobState};
use trainyard_common::time::Timestamp;
use trainyard_coordinator_core::{RememberedRequest, Snapshot};

use super::{CheckReport, JobHistory, Loaded, MAX_ROWS_OF_JOB, Store, StoreError, Transition};

/// State that dies with the process.
#[derive(Debug)]
pub struct MemStore {
    cluster: ClusterId,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    term: Term,
    fail_at: Option<u64>,
    commits: u64,
    jobs: BTreeMap<JobId, JobRecord>,
    tasks: BTreeMap<(JobId, TaskIndex), TaskRecord>,
    attempts: BTreeMap<AttemptRef, AttemptRecord>,
    bundles: BTreeMap<BundleRef, BundleRecord>,
    nodes: BTreeMap<NodeId, NodeRecord>,
    next_node: u32,
    tokens: BTreeMap<TokenId, TokenRecord>,
    users: BTreeMap<UserName, UserRecord>,
    transitions: Vec<(Timestamp, Record)>,
}

impl MemStore {
    /// An empty one.
    #[must_use]
    pub fn new(cluster: ClusterId) -> Self {
        Self {
            cluster,
            inner: Mutex::default(),
        }
    }

    /// Lets the commit after `successes` further ones fail, and all that follow.
    pub fn fail_after(&self, successes: u64) {
        let mut inner = self.lock();
        inner.fail_at = Some(inner.commits + successes);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn apply(&mut self, at: Timestamp, record: &Record) {
        match record.clone() {
            Record::Job(job) => drop(self.jobs.insert(job.id, *job)),
            Record::Task(task) => drop(self.tasks.insert((task.job, task.index), *task)),
            Record::Attempt(attempt) => drop(self.attempts.insert(attempt.id, *attempt)),
            Record::Bundle(bundle) => drop(self.bundles.insert(bundle.id, *bundle)),
            Record::BundleRemoved(bundle) => drop(self.bundles.remove(&bundle)),
            Record::Node(node) => {
                self.next_node = self.next_node.max(node.id.0 + 1);
                self.nodes.insert(node.id, *node);
            }
            Record::NodeRemoved(node) => drop(self.nodes.remove(&node)),
            Record::Token(token) => drop(self.tokens.insert(token.id, *token)),
            Record::User(user) => drop(self.users.insert(user.name.clone(), *user)),
        }
        self.transitions.push((at, record.clone()));
    }

    fn is_live(&self, job: JobId) -> bool {
        self.jobs
            .get(&job)
            .is_some_and(|job| !job.state.is_terminal())
    }

    fn sequence(&self) -> Sequence {
        Sequence(self.transitions.len() as u64)
    }

    fn snapshot(&self, now: Timestamp, requests_since: Timestamp) -> Snapshot {
        let live_task = |task: &&TaskRecord| self.is_live(task.job) && !task.state.is_terminal();
        let requests = self
            .jobs
            .values()
            .filter(|job| job.submitted_at >= requests_since);
        Snapshot {
            jobs: self
                .jobs
                .values()
                .filter(|job| !job.state.is_terminal())
                .cloned()
                .collect(),
            tasks: self.tasks.values().filter(live_task).cloned().collect(),
            attempts: self
                .attempts
                .values()
                .filter(|attempt| attempt.state != AttemptState::Ended)
                .cloned()
                .collect(),
            bundles: self.bundles.values().cloned().collect(),
            nodes: self.nodes.values().cloned().collect(),
            tokens: self
                .tokens
                .values()
                .filter(|token| is_usable(token, now))
                .cloned()
                .collect(),
            users: self.users.values().cloned().collect(),
            requests: requests.map(remembered).collect(),
            awaited: std::collections::BTreeSet::new(),
            next_job: JobId(self.jobs.last_key_value().map_or(1, |(id, _)| id.0 + 1)),
            next_node: NodeId(self.next_node.max(1)),
            next_token: TokenId(self.tokens.last_key_value().map_or(1, |(id, _)| id.0 + 1)),
        }
    }

    fn history(&self, job: JobId) -> Option<JobHistory> {
        let record = self.jobs.get(&job)?.clone();
        let of_job = (job, TaskIndex(0))..=(job, TaskIndex(u32::MAX));
        let mut tasks: Vec<_> = self
            .tasks
            .range(of_job)
            .map(|(_, task)| task.clone())
            .collect();
        if tasks.len() > MAX_ROWS_OF_JOB {
            tasks.retain(|task| task.state != JobState::Succeeded);
            tasks.truncate(MAX_ROWS_OF_JOB);
        }
        let mut attempts: Vec<_> = self
            .attempts
            .values()
            .filter(|attempt| attempt.id.job == job)
            .cloned()
            .collect();
        attempts.drain(..attempts.len().saturating_sub(MAX_ROWS_OF_JOB));
        Some(JobHistory {
            job: record,
            tasks,
            attempts,
        })
    }
}

fn is_usable(token: &TokenRecord, now: Timestamp) -> bool {
    !token.revoked && token.uses_left > 0 && token.expires_at > now
}

fn remembered(job: &JobRecord) -> RememberedRequest {
    RememberedRequest {
        owner: job.owner.clone(),
        request_id: job.request_id.clone(),
        digest: job.request_digest,
        job: job.id,
        at: job.submitted_at,
    }
}

impl Store for MemStore {
    fn cluster(&self) -> ClusterId {
        self.cluster
    }

    fn lead(&self) -> Result<Term, StoreError> {
        let mut inner = self.lock();
        inner.term = inner.term.next();
        Ok(inner.term)
    }

    fn commit(
        &self,
        term: Term,
        at: Timestamp,
        records: &[Record],
    ) -> Result<Sequence, StoreError> {
        let mut inner = self.lock();
        if inner.term != term {
            return Err(StoreError::Fenced {
                mine: term,
                stored: inner.term,
            });
        }
        if inner.fail_at.is_some_and(|at| inner.commits >= at) {
            return Err(StoreError::Injected);
        }
        inner.commits += 1;
        records.iter().for_each(|record| inner.apply(at, record));
        Ok(inner.sequence())
    }

    fn load(&self, now: Timestamp, requests_since: Timestamp) -> Result<Loaded, StoreError> {
        let inner = self.lock();
        Ok(Loaded {
            snapshot: inner.snapshot(now, requests_since),
            sequence: inner.sequence(),
        })
    }

    fn job(&self, job: JobId) -> Result<Option<JobHistory>, StoreError> {
        Ok(self.lock().history(job))
    }

    fn attempt(&self, attempt: AttemptRef) -> Result<Option<AttemptRecord>, StoreError> {
        Ok(self.lock().attempts.get(&attempt).cloned())
    }

    fn jobs(&self, before: JobId, limit: usize) -> Result<Vec<JobRecord>, StoreError> {
        Ok(self
            .lock()
            .jobs
            .range(..before)
            .rev()
            .take(limit)
            .map(|(_, job)| job.clone())
            .collect())
    }

    fn transitions(&self, after: Sequence, limit: usize) -> Result<Vec<Transition>, StoreError> {
        let inner = self.lock();
        let numbered = (1..).map(Sequence).zip(&inner.transitions);
        let wanted = numbered
            .skip(usize::try_from(after.0).unwrap_or(usize::MAX))
            .take(limit);
        Ok(wanted
            .map(|(sequence, (at, record))| Transition {
                sequence,
                at: *at,
                record: record.clone(),
            })
            .collect())
    }

    fn check(&self) -> Result<CheckReport, StoreError> {
        let inner = self.lock();
        let rows = inner.jobs.len()
            + inner.tasks.len()
            + inner.attempts.len()
            + inner.bundles.len()
            + inner.nodes.len()
            + inner.tokens.len()
            + inner.users.len();
        let sequence = inner.sequence();
        Ok(CheckReport {
            rows: rows as u64,
            transitions: sequence.0,
            sequence,
        })
    }
}
