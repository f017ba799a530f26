//! The store as one SQLite file (bundled, WAL, `synchronous=FULL`): one connection that writes, a few that only read.
//!
//! A commit is one transaction with its fence, its rows and its transitions, and is on disk when it returns. Reads see
//! the last durable state. Damage that SQL does not see (a row changed or cut off below it) shows in the checksums.

use std::fmt;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, OpenFlags, Transaction};
use trainyard_common::ids::{AttemptRef, ClusterId, JobId, Sequence, Term};
use trainyard_common::record::{AttemptRecord, JobRecord, Record};
use trainyard_common::time::Timestamp;

use super::codec;
use super::mark::Marker;
use super::reserve::Reserve;
use super::{CheckReport, JobHistory, Loaded, Store, StoreError, Transition};

pub(crate) mod inspect;
mod meta;
mod open;
mod read;
pub(crate) mod salvage;
mod schema;
mod write;

use meta::Meta;
pub(crate) use schema::SCHEMA_VERSION;

/// The database's file in the state directory.
pub(crate) const FILE_NAME: &str = "state.db";
/// The cluster's id as text; written once the database exists, so its presence says that the database must be there.
pub(crate) const CLUSTER_FILE: &str = "cluster-id";

/// Transitions at the end of the log that are checked at every start: what a crash can have touched, in milliseconds.
const CHECKED_AT_OPEN: u64 = 1000;
/// Reading connections that are kept open; more are opened under load and closed after use.
const KEPT_READERS: usize = 8;
/// Statements that a connection keeps prepared: there are about thirty.
const PREPARED: usize = 48;
/// Bytes of the write-ahead log that are kept for the next round of it: about three checkpoints.
const WAL_LIMIT: i64 = 12 << 20;
/// How long a connection waits for a lock of SQLite: only checkpoints and backups hold one against us.
const BUSY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// State in `state.db`.
pub struct SqliteStore {
    file: PathBuf,
    cluster: ClusterId,
    writer: Mutex<Writer>,
    readers: Mutex<Vec<Connection>>,
    /// Whether the last commit left some of the reserve missing.
    short: AtomicBool,
}

struct Writer {
    connection: Connection,
    reserve: Reserve,
    marker: Marker,
}

impl fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteStore")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

impl SqliteStore {
    fn writer(&self) -> MutexGuard<'_, Writer> {
        // A transaction that a panic left open is rolled back when its guard is dropped.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read<T>(
        &self,
        operation: &'static str,
        read: impl FnOnce(&Reader<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let kept = self
            .readers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let mut connection = match kept {
            Some(connection) => connection,
            None => connect(&self.file, OpenFlags::SQLITE_OPEN_READ_ONLY)?,
        };
        let reader = Reader {
            // One transaction, so that everything read belongs to one moment.
            transaction: connection
                .transaction()
                .map_err(|source| self.failed(operation, source))?,
            file: &self.file,
            operation,
        };
        let result = read(&reader);
        drop(reader);
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        if readers.len() < KEPT_READERS {
            readers.push(connection);
        }
        result
    }

    fn failed(&self, operation: &'static str, source: rusqlite::Error) -> StoreError {
        failed(operation, &self.file, source)
    }
}

impl Writer {
    /// Writes, and if the disk is full again from the reserve, as long as there is some.
    ///
    /// Once more is safe: SQLite says that there is no room before the last page of a transaction is in its write-ahead
    /// log (or, for its index of that, before the transaction is in there), so the transaction is not in the state, and
    /// the next one is written over what there is of it. Any other failure leaves open what is durable and is not retried.
    fn write(
        &mut self,
        mut attempt: impl FnMut(&Connection) -> Result<Meta, StoreError>,
    ) -> Result<Meta, StoreError> {
        // Bounded by the pieces of the reserve.
        loop {
            let result = attempt(&self.connection);
            let full = matches!(&result, Err(error) if is_full(error) || self.is_over_quota(error));
            if full && self.reserve.give_back() {
                continue;
            }
            let meta = result?;
            self.marker.note(&meta.mark());
            if self.reserve.is_short() {
                self.recover();
            }
            return Ok(meta);
        }
    }

    /// Whether a write failed because the user's quota is used up. SQLite calls that a failed write like any other, so the
    /// disk is asked; nothing is in the state for the same reason as on a full one.
    fn is_over_quota(&self, error: &StoreError) -> bool {
        let StoreError::Database { source, .. } = error else {
            return false;
        };
        let failed_write = source
            .sqlite_error()
            .is_some_and(|error| error.extended_code == rusqlite::ffi::SQLITE_IOERR_WRITE);
        failed_write && self.reserve.is_over_quota()
    }

    /// Keeps the write-ahead log from growing into what is left, and takes the reserve again if there is room.
    fn recover(&mut self) {
        // Waits for nobody. If it fails, the next commit tries again, and the log grows until then.
        let checkpoint =
            self.connection
                .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
        if let Err(error) = checkpoint {
            tracing::debug!(%error, "no checkpoint of the state");
        }
        self.reserve.take();
    }
}

/// Whether a write failed because there is no room for it, and for no other reason.
fn is_full(error: &StoreError) -> bool {
    let StoreError::Database { source, .. } = error else {
        return false;
    };
    source.sqlite_error().is_some_and(|error| {
        error.code == rusqlite::ErrorCode::DiskFull
            || error.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE
    })
}

struct Reader<'a> {
    transaction: Transaction<'a>,
    file: &'a Path,
    operation: &'static str,
}

impl Reader<'_> {
    fn failed(&self, source: rusqlite::Error) -> StoreError {
        failed(self.operation, self.file, source)
    }

    fn corrupt(
        &self,
        table: &'static str,
        key: impl fmt::Display,
        reason: impl fmt::Display,
    ) -> StoreError {
        corrupt(self.file, table, key, reason)
    }
}

fn corrupt(
    file: &Path,
    table: &'static str,
    key: impl fmt::Display,
    reason: impl fmt::Display,
) -> StoreError {
    StoreError::Corrupt {
        file: file.to_owned(),
        table,
        key: key.to_string(),
        reason: reason.to_string(),
    }
}

/// Whether a column holds what we never write there: damage, like a page that SQLite cannot read.
fn is_no_value(error: &rusqlite::Error) -> bool {
    matches!(
        error,
        rusqlite::Error::FromSqlConversionFailure(..)
            | rusqlite::Error::InvalidColumnType(..)
            | rusqlite::Error::IntegralValueOutOfRange(..)
            | rusqlite::Error::Utf8Error(..)
    )
}

fn failed(operation: &'static str, file: &Path, source: rusqlite::Error) -> StoreError {
    match source.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => {
            corrupt(file, "(any)", "(unknown)", source)
        }
        _ if is_no_value(&source) => corrupt(file, "(any)", "(unknown)", source),
        _ => StoreError::Database {
            operation,
            file: file.to_owned(),
            source,
        },
    }
}

fn connect(file: &Path, flags: OpenFlags) -> Result<Connection, StoreError> {
    let flags = flags | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let open = || -> rusqlite::Result<Connection> {
        let connection = Connection::open_with_flags(file, flags)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.set_prepared_statement_cache_capacity(PREPARED);
        Ok(connection)
    };
    open().map_err(|source| failed("open", file, source))
}

/// Makes the file of a new database, empty, so that it is nobody else's to read; SQLite gives the same mode to the files
/// beside it.
fn create_private(file: &Path) -> Result<(), StoreError> {
    fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(trainyard_transport::files::PRIVATE_FILE_MODE)
        .open(file)
        .map(drop)
        .map_err(|source| StoreError::File {
            operation: "create",
            path: file.to_owned(),
            source,
        })
}

fn prepare(connection: &Connection, file: &Path) -> Result<(), StoreError> {
    let set = || -> rusqlite::Result<String> {
        let mode =
            connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "journal_size_limit", WAL_LIMIT)?;
        // Nothing of a transaction may need room elsewhere.
        connection.pragma_update(None, "temp_store", "MEMORY")?;
        connection.pragma_update(None, "foreign_keys", "ON")?;
        Ok(mode)
    };
    let mode = set().map_err(|source| failed("set up", file, source))?;
    if mode.eq_ignore_ascii_case("wal") {
        return Ok(());
    }
    Err(StoreError::File {
        operation: "use a write-ahead log for",
        path: file.to_owned(),
        source: std::io::Error::other(format!(
            "the journal mode stays {mode}; is it a network file system?"
        )),
    })
}

impl Store for SqliteStore {
    fn cluster(&self) -> ClusterId {
        self.cluster
    }

    fn lead(&self) -> Result<Term, StoreError> {
        let led = self.writer().write(|connection| {
            // From here on it is a state that was found whole and is in use.
            open::keep_log_on_close(connection, &self.file, false)?;
            meta::change(connection, &self.file, "take the lead in", |meta| {
                meta.term = meta.term.next();
            })
        });
        led.map(|meta| meta.term)
    }

    fn commit(
        &self,
        term: Term,
        at: Timestamp,
        records: &[Record],
    ) -> Result<Sequence, StoreError> {
        let mut writer = self.writer();
        let committed = writer.write(|connection| {
            write::commit(connection, &self.file, write::Batch { term, at, records })
        });
        self.short
            .store(writer.reserve.is_short(), Ordering::Relaxed);
        committed.map(|meta| meta.last())
    }

    fn reconciled(&self) -> Result<(), StoreError> {
        let reconciled = self.writer().write(|connection| {
            meta::change(
                connection,
                &self.file,
                "note the end of a restore in",
                |meta| {
                    meta.awaiting = false;
                },
            )
        });
        reconciled.map(drop)
    }

    fn pin_authority(&self, digest: [u8; 32]) -> Result<(), StoreError> {
        let known = self.read("read", |reader| {
            meta::read(&reader.transaction, &self.file).map(|meta| meta.authority)
        })?;
        match known {
            Some(known) if known == digest => Ok(()),
            Some(_) => Err(StoreError::OtherAuthority {
                database: self.file.clone(),
            }),
            None => {
                let pinned = self.writer().write(|connection| {
                    meta::change(connection, &self.file, "note the authority in", |meta| {
                        meta.authority = Some(digest);
                    })
                });
                pinned.map(drop)
            }
        }
    }

    fn lives_on_reserve(&self) -> bool {
        if !self.short.load(Ordering::Relaxed) {
            return false;
        }
        // While nothing is committed nobody else looks whether there is room again. A commit that is on its way does.
        let Ok(mut writer) = self.writer.try_lock() else {
            return true;
        };
        writer.reserve.take();
        let short = writer.reserve.is_short();
        self.short.store(short, Ordering::Relaxed);
        short
    }

    fn load(&self, now: Timestamp, requests_since: Timestamp) -> Result<Loaded, StoreError> {
        self.read("load", |reader| reader.load(now, requests_since))
    }

    fn job(&self, job: JobId) -> Result<Option<JobHistory>, StoreError> {
        self.read("read a job from", |reader| reader.history(job))
    }

    fn attempt(&self, attempt: AttemptRef) -> Result<Option<AttemptRecord>, StoreError> {
        self.read("read an attempt from", |reader| reader.attempt(attempt))
    }

    fn jobs(&self, before: JobId, limit: usize) -> Result<Vec<JobRecord>, StoreError> {
        self.read("list the jobs of", |reader| reader.jobs(before, limit))
    }

    fn transitions(&self, after: Sequence, limit: usize) -> Result<Vec<Transition>, StoreError> {
        self.read("read the transitions of", |reader| {
            reader.transitions(after, limit)
        })
    }

    fn check(&self) -> Result<CheckReport, StoreError> {
        self.read("check", |reader| reader.check())
    }
}

/// The chain's value after a transition.
fn chain(before: u32, sequence: u64, row: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&before.to_le_bytes());
    hasher.update(&sequence.to_le_bytes());
    hasher.update(row);
    hasher.finalize()
}

/// Kind and key of a record: the table and the row that it belongs to.
fn kind_and_key(record: &Record) -> (&'static str, String) {
    match record {
        Record::Job(job) => ("jobs", job.id.to_string()),
        Record::Task(task) => ("tasks", format!("{}.{}", task.job, task.index)),
        Record::Attempt(attempt) => ("attempts", attempt.id.to_string()),
        Record::Bundle(bundle) => ("bundles", bundle.id.to_string()),
        Record::BundleRemoved(bundle) => ("bundles", bundle.to_string()),
        Record::Node(node) => ("nodes", node.id.to_string()),
        Record::NodeRemoved(node) => ("nodes", node.to_string()),
        Record::Token(token) => ("tokens", token.id.to_string()),
        Record::User(user) => ("users", user.name.to_string()),
    }
}

/// A row as the domain has it, if its bytes are whole and it is the row that it should be.
fn decode(
    file: &Path,
    table: &'static str,
    key: &str,
    row: &[u8],
) -> Result<(Timestamp, Record), StoreError> {
    let (at, record) = codec::decode(row).map_err(|reason| corrupt(file, table, key, reason))?;
    let found = kind_and_key(&record);
    if found.0 == table && found.1 == key {
        return Ok((at, record));
    }
    Err(corrupt(
        file,
        table,
        key,
        format!("it holds {} {} instead", found.0, found.1),
    ))
}
