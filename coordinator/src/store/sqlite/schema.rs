//! The tables of a state, and how a state of an earlier version gets them. A migration is one transaction, so one that
//! was interrupted has not begun; whoever calls it has made a backup before.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::OnceLock;

use rusqlite::{Connection, Transaction, TransactionBehavior, params};
use trainyard_common::ids::{ClusterId, Term};
use trainyard_common::time::Timestamp;

use super::meta::{self, Meta};
use super::write::id;
use super::{Reader, corrupt, failed, write};
use crate::store::StoreError;

/// What this version writes; it reads every one from [`OLDEST`] on.
pub(crate) const SCHEMA_VERSION: i64 = 2;
/// The first version there was.
const OLDEST: i64 = 1;
/// "YARD", so that `file` and people can tell what the database is.
pub(super) const APPLICATION_ID: i64 = 0x5941_5244;

const META: &str = "
CREATE TABLE meta (
    one INTEGER PRIMARY KEY CHECK (one = 1), schema_version INTEGER NOT NULL, cluster BLOB NOT NULL,
    created_at INTEGER NOT NULL, term INTEGER NOT NULL, sequence INTEGER NOT NULL, chain INTEGER NOT NULL,
    next_job INTEGER NOT NULL, next_node INTEGER NOT NULL, next_token INTEGER NOT NULL, commits INTEGER NOT NULL,
    awaiting INTEGER NOT NULL, authority BLOB NOT NULL, tallies BLOB NOT NULL, seal INTEGER NOT NULL
) STRICT;
";

/// Not changed since the first version.
const ROWS: &str = "
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

/// Tables that states of the first version may lack: they came without a number of their own.
const LATE: &str = "
CREATE TABLE IF NOT EXISTS bundles (
    job INTEGER NOT NULL, bundle INTEGER NOT NULL, row BLOB NOT NULL, PRIMARY KEY (job, bundle)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS restores (
    at INTEGER NOT NULL, taken_at INTEGER NOT NULL, sequence INTEGER NOT NULL, reconciled INTEGER NOT NULL
) STRICT;
";

/// Ids of jobs that were never given, so that every other one below `next_job` is missed if it is not there.
const GAPS: &str = "
CREATE TABLE gaps (first INTEGER PRIMARY KEY, last INTEGER NOT NULL) STRICT;
";

/// Makes the tables of a new database.
pub(super) fn create(
    connection: &Connection,
    file: &Path,
    now: Timestamp,
) -> Result<ClusterId, StoreError> {
    let mut cluster = [0; 16];
    getrandom::fill(&mut cluster).map_err(|_| StoreError::Random)?;
    let cluster = ClusterId(cluster);
    create_for(connection, &Meta::new(cluster, write::time(now)))
        .map_err(|source| failed("make the tables of", file, source))?;
    Ok(cluster)
}

/// Makes them for a cluster that is known.
pub(super) fn create_for(connection: &Connection, meta: &Meta) -> rusqlite::Result<()> {
    let transaction = Transaction::new_unchecked(connection, TransactionBehavior::Immediate)?;
    // Fails if there are tables of somebody else, and then nothing of theirs is touched.
    tables(&transaction)?;
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    meta::insert(&transaction, meta)?;
    transaction.commit()
}

fn tables(connection: &Connection) -> rusqlite::Result<()> {
    for sql in [META, ROWS, LATE, GAPS] {
        connection.execute_batch(sql)?;
    }
    Ok(())
}

/// Refuses what is no state, or one of a version that this one does not read; gives the version.
pub(super) fn identify(connection: &Connection, file: &Path) -> Result<i64, StoreError> {
    let application: i64 = connection
        .pragma_query_value(None, "application_id", |row| row.get(0))
        .map_err(|source| failed("read", file, source))?;
    if application != APPLICATION_ID {
        let reason = "it is no state of a coordinator";
        return Err(corrupt(file, "meta", "1", reason));
    }
    let found = meta::version(connection, file)?;
    if (OLDEST..=SCHEMA_VERSION).contains(&found) {
        return Ok(found);
    }
    Err(StoreError::Schema {
        database: file.to_owned(),
        found,
        known: SCHEMA_VERSION,
    })
}

/// The numbers of a state of any version; those that an old one does not have are as of a state that has none.
pub(super) fn read_any(
    connection: &Connection,
    file: &Path,
    version: i64,
) -> Result<Meta, StoreError> {
    if version == SCHEMA_VERSION {
        return meta::read(connection, file);
    }
    let query = "SELECT cluster, created_at, term, sequence, chain, next_job, next_node, next_token FROM meta";
    let (cluster, meta): (Vec<u8>, Meta) = connection
        .query_row(query, [], |row| {
            let meta = Meta {
                term: Term(row.get(2)?),
                sequence: row.get(3)?,
                chain: row.get(4)?,
                next_job: row.get(5)?,
                next_node: row.get(6)?,
                next_token: row.get(7)?,
                ..Meta::new(ClusterId([0; 16]), row.get(1)?)
            };
            Ok((row.get(0)?, meta))
        })
        .map_err(|source| failed("read", file, source))?;
    let cluster =
        ClusterId::try_from(cluster.as_slice()).map_err(|bad| corrupt(file, "meta", "1", bad))?;
    Ok(Meta { cluster, ..meta })
}

/// Brings a state of an earlier version to this one, in one transaction. Everything in it is read before.
pub(super) fn migrate(connection: &Connection, file: &Path) -> Result<(), StoreError> {
    let error = |source| failed("migrate", file, source);
    let transaction =
        Transaction::new_unchecked(connection, TransactionBehavior::Immediate).map_err(error)?;
    let version = identify(&transaction, file)?;
    if version == SCHEMA_VERSION {
        return Ok(());
    }
    transaction.execute_batch(LATE).map_err(error)?;
    let old = read_any(&transaction, file, version)?;
    let reader = Reader {
        transaction,
        file,
        operation: "check before its migration",
    };
    reader.check_all(&old, false)?;
    let transaction = reader.transaction;
    let meta = Meta {
        awaiting: unreconciled(&transaction).map_err(error)?,
        tallies: meta::tallies(&transaction, file)?,
        commits: 1,
        ..old
    };
    let change = || -> rusqlite::Result<()> {
        transaction.execute_batch("DROP TABLE meta")?;
        transaction.execute_batch(META)?;
        transaction.execute_batch(GAPS)?;
        meta::insert(&transaction, &meta)?;
        find_gaps(&transaction, meta.next_job)
    };
    change().map_err(error)?;
    transaction.commit().map_err(error)?;
    tracing::info!(
        file = %file.display(),
        from = version,
        to = SCHEMA_VERSION,
        "the state was migrated"
    );
    Ok(())
}

fn unreconciled(connection: &Connection) -> rusqlite::Result<bool> {
    let query = "SELECT COUNT(*) FROM restores WHERE reconciled = 0";
    let open: i64 = connection.query_row(query, [], |row| row.get(0))?;
    Ok(open > 0)
}

/// Puts the ids that no job has on record as never given.
pub(super) fn find_gaps(connection: &Connection, next_job: u64) -> rusqlite::Result<()> {
    let mut statement = connection.prepare("SELECT id FROM jobs ORDER BY id")?;
    let mut rows = statement.query([])?;
    let mut expected = 1;
    while let Some(row) = rows.next()? {
        let found: u64 = row.get(0)?;
        add_gap(connection, expected, found)?;
        expected = found + 1;
    }
    add_gap(connection, expected, next_job)
}

/// Puts the ids from `first` to the one before `next` on record as never given.
pub(super) fn add_gap(connection: &Connection, first: u64, next: u64) -> rusqlite::Result<()> {
    if first >= next {
        return Ok(());
    }
    connection
        .prepare_cached("INSERT OR REPLACE INTO gaps VALUES (?1, ?2)")?
        .execute(params![id(first), id(next - 1)])
        .map(drop)
}

/// Compares what the database says its tables and indexes are with what they should be.
pub(super) fn check(connection: &Connection, file: &Path) -> Result<(), StoreError> {
    let error = |source| failed("read the tables of", file, source);
    // The same in each process of this version.
    static EXPECTED: OnceLock<BTreeSet<Object>> = OnceLock::new();
    let expected = match EXPECTED.get() {
        Some(expected) => expected,
        None => {
            let own = Connection::open_in_memory().map_err(error)?;
            tables(&own).map_err(error)?;
            let made = objects(&own).map_err(error)?;
            EXPECTED.get_or_init(|| made)
        }
    };
    let found = objects(connection).map_err(error)?;
    if *expected == found {
        return Ok(());
    }
    let differs = expected.symmetric_difference(&found).next();
    let name = differs.map_or("(any)", |(_, name, ..)| name.as_str());
    let reason = "the description of this table or index is not the one that was written";
    Err(corrupt(file, "sqlite_master", name, reason))
}

type Object = (String, String, String, Option<String>);

fn objects(connection: &Connection) -> rusqlite::Result<BTreeSet<Object>> {
    let mut statement =
        connection.prepare("SELECT type, name, tbl_name, sql FROM sqlite_master")?;
    let rows = statement.query_map([], |row| {
        Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
    })?;
    rows.collect()
}
