//! The coordinator's durable state behind one trait.
//!
//! | What | How it is kept |
//! |---|---|
//! | jobs, tasks, attempts, bundles, nodes, tokens, users | durable: one row each, the truth at start-up |
//! | every change of a row | durable: the transition log, chained by checksums, written in the same transaction |
//! | cluster id, term, next ids, last sequence and chain value | durable: the one row of `meta` |
//! | queues, free amounts, allocations | derived by the core from the rows |
//! | sessions, when a node was last heard of | rebuilt from the agents |
//! | blobs, output of ranks, certificates | files beside the store; not its business |
//!
//! It knows rows and transitions and takes no decision about them.

mod codec;
#[cfg(test)]
mod full_disk;
#[cfg(test)]
mod golden;
mod lock;
mod mark;
mod memory;
mod refusal;
mod reserve;
mod sqlite;
#[cfg(test)]
mod sweep;
#[cfg(test)]
mod tests;
mod wal;

use std::io;
use std::path::PathBuf;

use trainyard_common::ids::{AttemptRef, ClusterId, JobId, Sequence, Term};
use trainyard_common::record::{AttemptRecord, JobRecord, Record, TaskRecord};
use trainyard_common::time::Timestamp;
use trainyard_coordinator_core::Snapshot;

pub(crate) use lock::LOCK_FILE;
pub use lock::StateLock;
pub use memory::MemStore;
pub(crate) use refusal::{BACKUPS, explain, migration_backup};
pub use sqlite::SqliteStore;
pub(crate) use sqlite::inspect;
pub(crate) use sqlite::salvage::accept_loss;
pub(crate) use sqlite::{CLUSTER_FILE, FILE_NAME, SCHEMA_VERSION};

/// Tasks and attempts of one job in one answer; a large array has more, and a message has a limit.
pub const MAX_ROWS_OF_JOB: usize = 1000;

/// Rows and transitions that outlive the process. All methods block.
pub trait Store: Send + Sync + 'static {
    /// The cluster whose state this is.
    fn cluster(&self) -> ClusterId;

    /// Takes the lead: the next term, durable before it is returned. Commits with a lower one fail from then on.
    ///
    /// # Errors
    /// If it could not be made durable.
    fn lead(&self) -> Result<Term, StoreError>;

    /// Makes `records` and the transitions that they are durable, all or none, and says the last sequence.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if somebody else leads by now, or whatever the disk says. After any error nothing is
    /// known about what is durable, so the caller must end.
    fn commit(&self, term: Term, at: Timestamp, records: &[Record])
    -> Result<Sequence, StoreError>;

    /// After a restored backup: the nodes of it were heard of or given up, so the next start need not wait for them.
    ///
    /// # Errors
    /// If it could not be made durable; the next start waits for them again then.
    fn reconciled(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Keeps which authority belongs to the state, the first time, and refuses another one after that.
    ///
    /// # Errors
    /// [`StoreError::OtherAuthority`], or whatever the disk says.
    fn pin_authority(&self, digest: [u8; 32]) -> Result<(), StoreError> {
        let _ = digest;
        Ok(())
    }

    /// Whether the disk is so full that the state goes on from its reserve, so that nothing new should be taken in.
    fn lives_on_reserve(&self) -> bool {
        false
    }

    /// The rows about live work at `now`, submissions accepted at or after `requests_since`, and the last sequence.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] naming the row, or whatever the disk says.
    fn load(&self, now: Timestamp, requests_since: Timestamp) -> Result<Loaded, StoreError>;

    /// A job, live or finished, with its newest attempts and its tasks (of a large array those that did not plainly
    /// succeed), at most [`MAX_ROWS_OF_JOB`] each.
    ///
    /// # Errors
    /// Like [`load`](Self::load).
    fn job(&self, job: JobId) -> Result<Option<JobHistory>, StoreError>;

    /// One attempt, live or over.
    ///
    /// # Errors
    /// Like [`load`](Self::load).
    fn attempt(&self, attempt: AttemptRef) -> Result<Option<AttemptRecord>, StoreError>;

    /// Jobs with ids below `before`, newest first, at most `limit`.
    ///
    /// # Errors
    /// Like [`load`](Self::load).
    fn jobs(&self, before: JobId, limit: usize) -> Result<Vec<JobRecord>, StoreError>;

    /// Transitions after a sequence in their order, at most `limit`.
    ///
    /// # Errors
    /// Like [`load`](Self::load).
    fn transitions(&self, after: Sequence, limit: usize) -> Result<Vec<Transition>, StoreError>;

    /// Reads everything and checks every checksum and the whole chain.
    ///
    /// # Errors
    /// The first damage that is found.
    fn check(&self) -> Result<CheckReport, StoreError>;
}

/// What a coordinator starts from.
#[derive(Debug)]
pub struct Loaded {
    /// For the core.
    pub snapshot: Snapshot,
    /// The last durable transition.
    pub sequence: Sequence,
}

/// A job with what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobHistory {
    /// The job.
    pub job: JobRecord,
    /// Its tasks in index order.
    pub tasks: Vec<TaskRecord>,
    /// Its attempts, newest last.
    pub attempts: Vec<AttemptRecord>,
}

/// One entry of the transition log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition {
    /// Its number.
    pub sequence: Sequence,
    /// When.
    pub at: Timestamp,
    /// The row as it became.
    pub record: Record,
}

/// What a full check read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckReport {
    /// Rows of all tables.
    pub rows: u64,
    /// Transitions.
    pub transitions: u64,
    /// The last one.
    pub sequence: Sequence,
}

/// Damages that are told one by one; a state with more is lost anyhow.
pub const MAX_DAMAGE: usize = 100;

/// What a look at a whole state from outside found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// Whose it is.
    pub cluster: ClusterId,
    /// The version of its tables.
    pub schema: i64,
    /// The last term.
    pub term: Term,
    /// Rows of all tables that could be reached.
    pub rows: u64,
    /// Transitions that could be reached.
    pub transitions: u64,
    /// The last one that was written.
    pub sequence: Sequence,
    /// What is damaged, at most [`MAX_DAMAGE`] of it.
    pub damage: Vec<Damage>,
    /// Whether there is more.
    pub more: bool,
}

/// One damaged place of a state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The file.
    pub file: PathBuf,
    /// The table, `(any)`, or `(log)` for SQLite's write-ahead log.
    pub table: String,
    /// The row's key, or `(unknown)`.
    pub key: String,
    /// Where in the file, if that is known.
    pub offset: Option<u64>,
    /// What is wrong.
    pub reason: String,
    /// The jobs that it is about, as far as that can be told.
    pub jobs: Vec<JobId>,
}

/// Why the state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another coordinator has it.
    #[error("the state directory {} is held by another coordinator ({holder}); stop that one first", path.display())]
    Held {
        /// The directory.
        path: PathBuf,
        /// Process, host, and since when.
        holder: String,
    },
    /// The directory was used before, but the database is not there.
    #[error(
        "this cluster has existed; state not found: {} is missing although {} is there; restore the file from a \
         backup, or start a new cluster in an empty directory",
        database.display(), marker.display()
    )]
    Missing {
        /// The file that is missing.
        database: PathBuf,
        /// What says that it was there.
        marker: PathBuf,
    },
    /// The database is another cluster's than the files beside it.
    #[error("{} belongs to cluster {found}, but the files beside it to cluster {expected}", database.display())]
    OtherCluster {
        /// The database.
        database: PathBuf,
        /// Whose it is.
        found: ClusterId,
        /// Whose it should be.
        expected: ClusterId,
    },
    /// The authority beside the database is not the one that was there before.
    #[error(
        "the cluster's authority beside {} is not the one that belongs to it: ca/ca.pem or ca/ca.key.pem was changed or \
         damaged; restore both from a backup",
        database.display()
    )]
    OtherAuthority {
        /// The database.
        database: PathBuf,
    },
    /// Written by a later version.
    #[error(
        "{} has schema version {found}, this version of yard ({}) reads versions up to {known}; use the version that wrote \
         it, or {}",
        database.display(), env!("CARGO_PKG_VERSION"), refusal::downgrade(database, *known)
    )]
    Schema {
        /// The database.
        database: PathBuf,
        /// Its version.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// The state is damaged, and this is what is known of it.
    #[error("{}", refusal::damaged(file, places, *more))]
    Damaged {
        /// The database.
        file: PathBuf,
        /// Where, at least one place.
        places: Vec<Damage>,
        /// Whether there is more.
        more: bool,
    },
    /// Nothing of a damaged state can be given up so that the rest is of use.
    #[error("{} cannot be mended by giving something up: {reason}; restore a backup with `yard coordinator restore`", file.display())]
    CannotAccept {
        /// The database.
        file: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A row is damaged.
    #[error("{} is damaged: table {table}, key {key}: {reason}; `yard coordinator check` tells everything that is damaged and \
         the jobs that it is about; restore a backup with `yard coordinator restore`", file.display())]
    Corrupt {
        /// The database.
        file: PathBuf,
        /// The table.
        table: &'static str,
        /// The row's key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Somebody else leads.
    #[error("term {mine} is over: the state is led with term {stored}")]
    Fenced {
        /// The term of the commit.
        mine: Term,
        /// The durable one.
        stored: Term,
    },
    /// The database failed.
    #[error("cannot {operation} {}", file.display())]
    Database {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        file: PathBuf,
        /// What it said.
        #[source]
        source: rusqlite::Error,
    },
    /// A file beside the database failed.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A failure that a test asked for.
    #[error("injected failure of a commit")]
    Injected,
    /// The system gives no random numbers.
    #[error("the system gives no random numbers for a cluster id")]
    Random,
}

impl StoreError {
    /// Whether it says that something that was written is not there as it was written.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. } | Self::Corrupt { .. })
    }
}
