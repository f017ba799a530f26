//! The coordinator's disk: encoded rows with the few columns beside them that a database keeps, the transition log, and
//! the marks. A commit is all or nothing. The typed rows are the oracle's copy of what is durable; the coordinator is
//! only ever given what it can decode.

use std::collections::{BTreeMap, BTreeSet};

use trainyard_common::ids::{AttemptRef, BundleRef, JobId, NodeId, TaskIndex, Term, TokenId};
use trainyard_common::record::{
    AttemptRecord, BundleRecord, JobRecord, NodeRecord, Record, TaskRecord, TokenRecord, UserRecord,
};
use trainyard_common::state::{AttemptState, NodeAvailability};
use trainyard_common::time::Timestamp;
use trainyard_coordinator_core::{RememberedRequest, Snapshot};
use trainyard_proto::convert::store::{decode, encode};

use super::rng::Rng;

/// Table and key of a row.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Key {
    User(String),
    Token(TokenId),
    Node(NodeId),
    Job(JobId),
    Task(JobId, TaskIndex),
    Attempt(AttemptRef),
    Bundle(BundleRef),
}

/// A row as it lies on disk.
#[derive(Debug, Clone)]
struct Row {
    bytes: Vec<u8>,
    /// A column of its own: rows about what is over are not read at a start.
    live: bool,
}

/// Marks that grow with the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) term: Term,
    next_job: JobId,
    next_node: NodeId,
    next_token: TokenId,
}

/// Rows as they are meant, for the oracle.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Rows {
    pub(crate) jobs: BTreeMap<JobId, JobRecord>,
    pub(crate) tasks: BTreeMap<(JobId, TaskIndex), TaskRecord>,
    pub(crate) attempts: BTreeMap<AttemptRef, AttemptRecord>,
    pub(crate) nodes: BTreeMap<NodeId, NodeRecord>,
    pub(crate) bundles: BTreeMap<BundleRef, BundleRecord>,
    tokens: BTreeMap<TokenId, TokenRecord>,
    users: BTreeMap<String, UserRecord>,
}

/// A copy that an operator made.
#[derive(Debug, Clone)]
pub(crate) struct Backup {
    rows: BTreeMap<Key, Row>,
    requests: BTreeMap<JobId, RememberedRequest>,
    typed: Rows,
    log: usize,
}

/// The disk.
#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) meta: Meta,
    rows: BTreeMap<Key, Row>,
    /// Columns of the jobs.
    requests: BTreeMap<JobId, RememberedRequest>,
    pub(crate) typed: Rows,
    /// The transition log; sequence numbers count from 1.
    log: Vec<Vec<u8>>,
    /// It was restored from a backup, and the nodes of it were not all heard of since.
    pub(crate) restored: bool,
}

impl Rows {
    pub(crate) fn apply(&mut self, record: &Record) {
        match record.clone() {
            Record::Job(job) => drop(self.jobs.insert(job.id, *job)),
            Record::Task(task) => drop(self.tasks.insert((task.job, task.index), *task)),
            Record::Attempt(attempt) => drop(self.attempts.insert(attempt.id, *attempt)),
            Record::Node(node) => drop(self.nodes.insert(node.id, *node)),
            Record::NodeRemoved(node) => drop(self.nodes.remove(&node)),
            Record::Token(token) => drop(self.tokens.insert(token.id, *token)),
            Record::User(user) => {
                drop(self.users.insert(user.name.as_str().to_owned(), *user));
            }
            Record::Bundle(bundle) => drop(self.bundles.insert(bundle.id, *bundle)),
            Record::BundleRemoved(bundle) => drop(self.bundles.remove(&bundle)),
        }
    }
}

fn key(record: &Record) -> (Key, bool) {
    match record {
        Record::Job(job) => (Key::Job(job.id), !job.state.is_terminal()),
        Record::Task(task) => (Key::Task(task.job, task.index), !task.state.is_terminal()),
        Record::Attempt(attempt) => (
            Key::Attempt(attempt.id),
            attempt.state != AttemptState::Ended,
        ),
        Record::Node(node) => (Key::Node(node.id), true),
        Record::NodeRemoved(node) => (Key::Node(*node), false),
        Record::Token(token) => (Key::Token(token.id), true),
        Record::User(user) => (Key::User(user.name.as_str().to_owned()), true),
        Record::Bundle(bundle) => (Key::Bundle(bundle.id), true),
        Record::BundleRemoved(bundle) => (Key::Bundle(*bundle), false),
    }
}

impl Store {
    pub(crate) fn new() -> Self {
        Self {
            meta: Meta {
                term: Term(0),
                next_job: JobId(1),
                next_node: NodeId(1),
                next_token: TokenId(1),
            },
            rows: BTreeMap::new(),
            requests: BTreeMap::new(),
            typed: Rows::default(),
            log: Vec::new(),
            restored: false,
        }
    }

    /// One transaction. Gives the encoded rows, for the trace.
    pub(crate) fn apply(&mut self, at: Timestamp, records: &[Record]) -> Vec<Vec<u8>> {
        let mut written = Vec::with_capacity(records.len());
        for record in records {
            let bytes = encode(at, record);
            let (key, live) = key(record);
            let row = Row {
                bytes: bytes.clone(),
                live,
            };
            match record {
                Record::NodeRemoved(_) | Record::BundleRemoved(_) => drop(self.rows.remove(&key)),
                Record::Job(_)
                | Record::Task(_)
                | Record::Attempt(_)
                | Record::Node(_)
                | Record::Token(_)
                | Record::User(_)
                | Record::Bundle(_) => drop(self.rows.insert(key, row)),
            }
            self.raise_marks(record);
            self.typed.apply(record);
            self.log.push(bytes.clone());
            written.push(bytes);
        }
        written
    }

    fn raise_marks(&mut self, record: &Record) {
        let meta = &mut self.meta;
        match record {
            Record::Job(job) => {
                meta.next_job = meta.next_job.max(JobId(job.id.0 + 1));
                let request = RememberedRequest {
                    owner: job.owner.clone(),
                    request_id: job.request_id.clone(),
                    digest: job.request_digest,
                    job: job.id,
                    at: job.submitted_at,
                };
                self.requests.insert(job.id, request);
            }
            Record::Node(node) => meta.next_node = meta.next_node.max(NodeId(node.id.0 + 1)),
            Record::Token(token) => {
                meta.next_token = meta.next_token.max(TokenId(token.id.0 + 1));
            }
            Record::Task(_)
            | Record::Attempt(_)
            | Record::NodeRemoved(_)
            | Record::User(_)
            | Record::Bundle(_)
            | Record::BundleRemoved(_) => {}
        }
    }

    /// What a coordinator starts from, or what is wrong with the first damaged row that it needs.
    pub(crate) fn load(&self) -> Result<Snapshot, String> {
        let mut snapshot = Snapshot {
            requests: self.requests.values().cloned().collect(),
            next_job: self.meta.next_job,
            next_node: self.meta.next_node,
            next_token: self.meta.next_token,
            ..Snapshot::default()
        };
        let live_jobs: BTreeSet<JobId> = self
            .rows
            .iter()
            .filter_map(|(key, row)| match key {
                Key::Job(id) if row.live => Some(*id),
                _ => None,
            })
            .collect();
        for (key, row) in self.rows.iter().filter(|(_, row)| row.live) {
            if let Key::Task(job, _) = key
                && !live_jobs.contains(job)
            {
                continue;
            }
            match decode(&row.bytes) {
                Ok((_, record)) => put(&mut snapshot, record),
                Err(bad) => return Err(format!("{key:?}: {bad}")),
            }
        }
        if self.restored {
            snapshot.awaited = awaited(snapshot.nodes.iter());
        }
        Ok(snapshot)
    }

    pub(crate) fn sequence(&self) -> u64 {
        self.log.len() as u64
    }

    /// Transitions after a sequence, at most `limit`.
    pub(crate) fn transitions(&self, after: u64, upto: u64) -> Result<Vec<Record>, String> {
        let from = usize::try_from(after).unwrap_or(usize::MAX);
        let to = usize::try_from(upto).unwrap_or(usize::MAX);
        let range = self.log.get(from..to.max(from)).unwrap_or_default();
        range
            .iter()
            .map(|bytes| decode(bytes).map(|found| found.1))
            .collect::<Result<_, _>>()
            .map_err(|bad| bad.to_string())
    }

    /// The rows that follow from the log alone.
    pub(crate) fn replay(&self) -> Result<Rows, String> {
        let mut rows = Rows::default();
        for record in self.transitions(0, self.sequence())? {
            rows.apply(&record);
        }
        Ok(rows)
    }

    /// Flips a bit of a live row. Its key.
    pub(crate) fn flip(&mut self, rng: &mut Rng) -> Option<String> {
        let keys: Vec<Key> = self
            .rows
            .iter()
            .filter(|(_, row)| row.live)
            .map(|(key, _)| key.clone())
            .collect();
        let key = rng.pick(&keys)?;
        let row = self.rows.get_mut(&key)?;
        let at = rng.index(row.bytes.len());
        row.bytes[at] ^= 1 << rng.below(8);
        Some(format!("{key:?}"))
    }

    pub(crate) fn backup(&self) -> Option<Backup> {
        // A copy of damaged rows is found out when it is made.
        self.load().ok()?;
        Some(Backup {
            rows: self.rows.clone(),
            requests: self.requests.clone(),
            typed: self.typed.clone(),
            log: self.log.len(),
        })
    }

    /// Puts a copy back. As `yard coordinator restore` sees to it, the term and the next ids stay above every
    /// one that was ever given, or two machines would get one identity and two jobs one id.
    pub(crate) fn restore(&mut self, backup: &Backup) {
        self.rows.clone_from(&backup.rows);
        self.requests.clone_from(&backup.requests);
        self.typed.clone_from(&backup.typed);
        self.log.truncate(backup.log);
        self.restored = true;
    }
}

/// The nodes of a restored state that may run something, as the real store picks them.
pub(crate) fn awaited<'a>(nodes: impl Iterator<Item = &'a NodeRecord>) -> BTreeSet<NodeId> {
    let there =
        nodes.filter(|node| node.incarnation.0 > 0 && node.availability != NodeAvailability::Lost);
    there.map(|node| node.id).collect()
}

fn put(snapshot: &mut Snapshot, record: Record) {
    match record {
        Record::Job(job) => snapshot.jobs.push(*job),
        Record::Task(task) => snapshot.tasks.push(*task),
        Record::Attempt(attempt) => snapshot.attempts.push(*attempt),
        Record::Node(node) => snapshot.nodes.push(*node),
        Record::Token(token) => snapshot.tokens.push(*token),
        Record::User(user) => snapshot.users.push(*user),
        Record::Bundle(bundle) => snapshot.bundles.push(*bundle),
        Record::NodeRemoved(_) | Record::BundleRemoved(_) => {}
    }
}
