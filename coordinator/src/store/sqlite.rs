//! The store as one SQLite file (bundled, WAL, `synchronous=FULL`): one connection that writes, a few that only read.
//!
//! A commit is one transaction with its fence, its rows and its transitions, and is on disk when it returns. Reads see
//! the last durable state. Damage that SQL does not see (a row changed or cut off below it) shows in the checksums.

use std::fmt;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rusqlite::{
    Connection, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params,
};
use trainyard_common::ids::{AttemptRef, ClusterId, JobId, Sequence, Term};
use trainyard_common::record::{AttemptRecord, JobRecord, Record};
use trainyard_common::time::Timestamp;

use super::codec;
use super::reserve::Reserve;
use super::{CheckReport, JobHistory, Loaded, Store, StoreError, Transition};

pub(crate) mod inspect;
mod read;
mod write;

/// The database's file in the state directory.
pub(crate) const FILE_NAME: &str = "state.db";
/// The cluster's id as text; written once the database exists, so its presence says that the database must be there.
pub(crate) const CLUSTER_FILE: &str = "cluster-id";

/// What this version reads and writes.
const SCHEMA_VERSION: i64 = 1;
/// "YARD", so that `file` and people can tell what the database is.
const APPLICATION_ID: i64 = 0x5941_5244;
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

const SCHEMA: &str = "
CREATE TABLE meta (
    one INTEGER PRIMARY KEY CHECK (one = 1), schema_version INTEGER NOT NULL, cluster BLOB NOT NULL,
    created_at INTEGER NOT NULL, term INTEGER NOT NULL, sequence INTEGER NOT NULL, chain INTEGER NOT NULL,
    next_job INTEGER NOT NULL, next_node INTEGER NOT NULL, next_token INTEGER NOT NULL
) STRICT;
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY, user TEXT NOT NULL, state TEXT NOT NULL, live INTEGER NOT NULL,
    request_id TEXT NOT NULL, request_digest BLOB NOT NULL, submitted_at INTEGER NOT NULL, row BLOB NOT NULL
) STRICT;
CREATE INDEX jobs_live ON jobs (id) WHERE live = 1;
CREATE INDEX jobs_submitted ON jobs (submitted_at);
CREATE TABLE tasks (
    job INTEGER NOT NULL, task INTEGER NOT NULL, state TEXT NOT NULL, live INTEGER NOT NULL, row BLOB NOT NULL,
    PRIMARY KEY (job, task)
) STRICT, WITHOUT ROWID;
CREATE INDEX tasks_live ON tasks (job) WHERE live = 1;
CREATE TABLE attempts (
    job INTEGER NOT NULL, task INTEGER NOT NULL, attempt INTEGER NOT NULL, open INTEGER NOT NULL, row BLOB NOT NULL,
    PRIMARY KEY (job, task, attempt)
) STRICT, WITHOUT ROWID;
CREATE INDEX attempts_open ON attempts (job) WHERE open = 1;
CREATE TABLE nodes (id INTEGER PRIMARY KEY, row BLOB NOT NULL) STRICT;
CREATE TABLE tokens (id INTEGER PRIMARY KEY, usable INTEGER NOT NULL, expires_at INTEGER NOT NULL, row BLOB NOT NULL)
    STRICT;
CREATE TABLE users (name TEXT PRIMARY KEY, row BLOB NOT NULL) STRICT;
CREATE TABLE transitions (
    sequence INTEGER PRIMARY KEY, at INTEGER NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, row BLOB NOT NULL,
    chain INTEGER NOT NULL
) STRICT;
";

/// Made apart from the others, because states that were made before there were bundles lack it.
const SCHEMA_OF_BUNDLES: &str = "
CREATE TABLE IF NOT EXISTS bundles (
    job INTEGER NOT NULL, bundle INTEGER NOT NULL, row BLOB NOT NULL, PRIMARY KEY (job, bundle)
) STRICT, WITHOUT ROWID;
";

/// When the state was restored from a backup, likewise.
const SCHEMA_OF_RESTORES: &str = "
CREATE TABLE IF NOT EXISTS restores (
    at INTEGER NOT NULL, taken_at INTEGER NOT NULL, sequence INTEGER NOT NULL, reconciled INTEGER NOT NULL
) STRICT;
";

/// State in `state.db`.
pub struct SqliteStore {
    file: PathBuf,
    cluster: ClusterId,
    writer: Mutex<Writer>,
    readers: Mutex<Vec<Connection>>,
}

struct Writer {
    connection: Connection,
    reserve: Reserve,
}

impl fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteStore")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

/// The one row of `meta`.
#[derive(Debug, Clone, Copy)]
struct Meta {
    term: Term,
    sequence: u64,
    chain: u32,
    next_job: u64,
    next_node: u32,
    next_token: u64,
}

impl SqliteStore {
    /// Opens the state in `dir`, or makes it if `dir` was never a coordinator's. The caller holds the directory's lock.
    ///
    /// `marker` is what else says that the cluster has existed, such as its authority.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Schema`], [`StoreError::Corrupt`], or whatever the disk says.
    pub fn open(dir: &Path, marker: &Path, now: Timestamp) -> Result<Self, StoreError> {
        let file = dir.join(FILE_NAME);
        let cluster_file = dir.join(CLUSTER_FILE);
        let existed = fs::metadata(&file).is_ok_and(|metadata| metadata.len() > 0);
        if !existed {
            let marker = [cluster_file.as_path(), marker]
                .into_iter()
                .find(|path| path.exists());
            if let Some(marker) = marker {
                return Err(StoreError::Missing {
                    database: file,
                    marker: marker.to_owned(),
                });
            }
        }
        let mut reserve = Reserve::open(dir);
        reserve.make_room();
        if !existed {
            create_private(&file)?;
        }
        let writer = connect(
            &file,
            OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE,
        )?;
        prepare(&writer, &file)?;
        let cluster = establish(&writer, &file, now)?;
        check_cluster_file(&cluster_file, &file, cluster)?;
        let store = Self {
            file,
            cluster,
            writer: Mutex::new(Writer {
                connection: writer,
                reserve,
            }),
            readers: Mutex::default(),
        };
        store.check_tail()?;
        Ok(store)
    }

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

    fn check_tail(&self) -> Result<(), StoreError> {
        self.read("read the transitions of", |reader| {
            let meta = read_meta(&reader.transaction).map_err(|source| reader.failed(source))?;
            reader.check_chain(
                &meta,
                Sequence(meta.sequence.saturating_sub(CHECKED_AT_OPEN)),
            )?;
            Ok(())
        })
    }
}

impl Writer {
    /// Writes, and if the disk is full again from the reserve, as long as there is some.
    ///
    /// Once more is safe: SQLite says that there is no room before the last page of a transaction is in its write-ahead
    /// log (or, for its index of that, before the transaction is in there), so the transaction is not in the state, and
    /// the next one is written over what there is of it. Any other failure leaves open what is durable and is not retried.
    fn write<T>(
        &mut self,
        mut attempt: impl FnMut(&Connection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        // Bounded by the pieces of the reserve.
        loop {
            let result = attempt(&self.connection);
            if matches!(&result, Err(error) if is_full(error)) && self.reserve.give_back() {
                continue;
            }
            if result.is_ok() && self.reserve.is_short() {
                self.recover();
            }
            return result;
        }
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

fn failed(operation: &'static str, file: &Path, source: rusqlite::Error) -> StoreError {
    match source.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => {
            corrupt(file, "(any)", "(unknown)", source)
        }
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

/// Makes the tables of a new database, or checks those of an old one; gives the cluster's id.
fn establish(
    connection: &Connection,
    file: &Path,
    now: Timestamp,
) -> Result<ClusterId, StoreError> {
    let error = |source| failed("read", file, source);
    let application: i64 = connection
        .pragma_query_value(None, "application_id", |row| row.get(0))
        .map_err(error)?;
    if application != APPLICATION_ID {
        return create(connection, file, now);
    }
    let (version, cluster): (i64, Vec<u8>) = connection
        .query_row("SELECT schema_version, cluster FROM meta", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .optional()
        .map_err(error)?
        .ok_or_else(|| corrupt(file, "meta", "1", "the row is missing"))?;
    if version != SCHEMA_VERSION {
        return Err(StoreError::Schema {
            database: file.to_owned(),
            found: version,
            known: SCHEMA_VERSION,
        });
    }
    connection.execute_batch(SCHEMA_OF_BUNDLES).map_err(error)?;
    connection
        .execute_batch(SCHEMA_OF_RESTORES)
        .map_err(error)?;
    ClusterId::try_from(cluster.as_slice()).map_err(|bad| corrupt(file, "meta", "1", bad))
}

fn create(connection: &Connection, file: &Path, now: Timestamp) -> Result<ClusterId, StoreError> {
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(|_| StoreError::Random)?;
    let make = || -> rusqlite::Result<()> {
        let transaction = Transaction::new_unchecked(connection, TransactionBehavior::Immediate)?;
        // Fails if there are tables of somebody else, and then nothing of theirs is touched.
        transaction.execute_batch(SCHEMA)?;
        transaction.execute_batch(SCHEMA_OF_BUNDLES)?;
        transaction.execute_batch(SCHEMA_OF_RESTORES)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.execute(
            "INSERT INTO meta VALUES (1, ?1, ?2, ?3, 0, 0, 0, 1, 1, 1)",
            params![SCHEMA_VERSION, id, write::time(now)],
        )?;
        transaction.commit()
    };
    make().map_err(|source| failed("make the tables of", file, source))?;
    Ok(ClusterId(id))
}

fn check_cluster_file(path: &Path, database: &Path, cluster: ClusterId) -> Result<(), StoreError> {
    let failed = |operation| {
        move |source| StoreError::File {
            operation,
            path: path.to_owned(),
            source,
        }
    };
    if !path.exists() {
        // After the database: a crash between the two makes this run again, and never a cluster without state.
        return trainyard_transport::files::write_private(path, format!("{cluster}\n").as_bytes())
            .map_err(failed("write"));
    }
    let text = fs::read_to_string(path).map_err(failed("read"))?;
    match text.trim().parse::<ClusterId>() {
        Ok(expected) if expected == cluster => Ok(()),
        Ok(expected) => Err(StoreError::OtherCluster {
            database: database.to_owned(),
            found: cluster,
            expected,
        }),
        Err(invalid) => Err(failed("read")(std::io::Error::other(invalid))),
    }
}

fn read_meta(connection: &Connection) -> rusqlite::Result<Meta> {
    let query = "SELECT term, sequence, chain, next_job, next_node, next_token FROM meta";
    connection.prepare_cached(query)?.query_row([], |row| {
        Ok(Meta {
            term: Term(row.get(0)?),
            sequence: row.get(1)?,
            chain: row.get(2)?,
            next_job: row.get(3)?,
            next_node: row.get(4)?,
            next_token: row.get(5)?,
        })
    })
}

impl Store for SqliteStore {
    fn cluster(&self) -> ClusterId {
        self.cluster
    }

    fn lead(&self) -> Result<Term, StoreError> {
        self.writer().write(|connection| {
            connection
                .query_row(
                    "UPDATE meta SET term = term + 1 RETURNING term",
                    [],
                    |row| row.get(0),
                )
                .map(Term)
                .map_err(|source| self.failed("take the lead in", source))
        })
    }

    fn commit(
        &self,
        term: Term,
        at: Timestamp,
        records: &[Record],
    ) -> Result<Sequence, StoreError> {
        self.writer().write(|connection| {
            write::commit(connection, &self.file, write::Batch { term, at, records })
        })
    }

    fn reconciled(&self) -> Result<(), StoreError> {
        self.writer().write(|connection| {
            connection
                .execute(
                    "UPDATE restores SET reconciled = 1 WHERE reconciled = 0",
                    [],
                )
                .map(drop)
                .map_err(|source| self.failed("note the end of a restore in", source))
        })
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
