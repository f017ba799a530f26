//! One commit: the fence, the rows, the transitions and the high-water marks, in one transaction.

use std::path::Path;

use rusqlite::{Connection, ToSql, Transaction, TransactionBehavior, params};
use trainyard_common::ids::{BundleRef, Term};
use trainyard_common::record::{AttemptRecord, JobRecord, Record, TaskRecord, TokenRecord};
use trainyard_common::state::AttemptState;
use trainyard_common::time::Timestamp;

use super::meta::{self, Meta, is_live, table_of};
use super::{StoreError, chain, codec, failed, kind_and_key, schema};

pub(super) struct Batch<'a> {
    pub(super) term: Term,
    pub(super) at: Timestamp,
    pub(super) records: &'a [Record],
}

/// A time as SQLite's integer.
pub(super) fn time(at: Timestamp) -> i64 {
    i64::try_from(at.0).unwrap_or(i64::MAX)
}

/// An id as SQLite's integer. Ids count from 1 and never come near the limit.
pub(super) fn id(id: u64) -> i64 {
    i64::try_from(id).unwrap_or(i64::MAX)
}

/// Writes a batch; gives the numbers as they became.
pub(super) fn commit(
    connection: &Connection,
    file: &Path,
    batch: Batch<'_>,
) -> Result<Meta, StoreError> {
    let error = |source| failed("commit to", file, source);
    let transaction =
        Transaction::new_unchecked(connection, TransactionBehavior::Immediate).map_err(error)?;
    let mut meta = meta::read(&transaction, file)?;
    if meta.term != batch.term {
        return Err(StoreError::Fenced {
            mine: batch.term,
            stored: meta.term,
        });
    }
    for record in batch.records {
        let row = codec::encode(batch.at, record);
        retally(&transaction, &mut meta, record, &row).map_err(error)?;
        upsert(&transaction, record, &row).map_err(error)?;
        append(&transaction, &mut meta, batch.at, record, &row).map_err(error)?;
        if let Record::Job(job) = record {
            // Only ids that were never given: the core gives them one by one.
            schema::add_gap(&transaction, meta.next_job, job.id.0).map_err(error)?;
        }
        raise_marks(&mut meta, record);
    }
    meta.commits += 1;
    meta::write(&transaction, &meta).map_err(error)?;
    transaction.commit().map_err(error)?;
    Ok(meta)
}

/// Takes the row as it was out of its table's tally, and adds it as it becomes.
fn retally(
    transaction: &Transaction<'_>,
    meta: &mut Meta,
    record: &Record,
    row: &[u8],
) -> rusqlite::Result<()> {
    let table = table_of(record);
    let tallies = &mut meta.tallies;
    let mut old = |query: &str, key: &[&dyn ToSql]| -> rusqlite::Result<()> {
        let mut statement = transaction.prepare_cached(query)?;
        let mut rows = statement.query(key)?;
        if let Some(found) = rows.next()? {
            let live = found.get(0)?;
            tallies
                .of(table, live)
                .remove(found.get_ref(1)?.as_blob().unwrap_or_default());
        }
        Ok(())
    };
    match record {
        Record::Job(job) => old("SELECT live, row FROM jobs WHERE id = ?1", &[&id(job.id.0)])?,
        Record::Task(task) => old(
            "SELECT live, row FROM tasks WHERE job = ?1 AND task = ?2",
            &[&id(task.job.0), &task.index.0],
        )?,
        Record::Attempt(attempt) => old(
            "SELECT open, row FROM attempts WHERE job = ?1 AND task = ?2 AND attempt = ?3",
            &[
                &id(attempt.id.job.0),
                &attempt.id.task.0,
                &attempt.id.attempt.0,
            ],
        )?,
        Record::Bundle(bundle) => old_bundle(bundle.id, &mut old)?,
        Record::BundleRemoved(bundle) => old_bundle(*bundle, &mut old)?,
        Record::Node(node) => old("SELECT 1, row FROM nodes WHERE id = ?1", &[&node.id.0])?,
        Record::NodeRemoved(node) => old("SELECT 1, row FROM nodes WHERE id = ?1", &[&node.0])?,
        Record::Token(token) => old(
            "SELECT usable, row FROM tokens WHERE id = ?1",
            &[&id(token.id.0)],
        )?,
        Record::User(user) => old(
            "SELECT 1, row FROM users WHERE name = ?1",
            &[&user.name.as_str()],
        )?,
    }
    if !matches!(record, Record::BundleRemoved(_) | Record::NodeRemoved(_)) {
        tallies.of(table, is_live(record)).add(row);
    }
    Ok(())
}

fn old_bundle(
    bundle: BundleRef,
    old: &mut impl FnMut(&str, &[&dyn ToSql]) -> rusqlite::Result<()>,
) -> rusqlite::Result<()> {
    old(
        "SELECT 1, row FROM bundles WHERE job = ?1 AND bundle = ?2",
        &[&id(bundle.job.0), &bundle.bundle],
    )
}

pub(super) fn append(
    transaction: &Transaction<'_>,
    meta: &mut Meta,
    at: Timestamp,
    record: &Record,
    row: &[u8],
) -> rusqlite::Result<()> {
    meta.sequence += 1;
    meta.chain = chain(meta.chain, meta.sequence, row);
    let (kind, key) = kind_and_key(record);
    transaction
        .prepare_cached("INSERT INTO transitions VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?
        .execute(params![
            id(meta.sequence),
            time(at),
            kind,
            key,
            row,
            meta.chain
        ])?;
    Ok(())
}

pub(super) fn raise_marks(meta: &mut Meta, record: &Record) {
    match record {
        Record::Job(job) => meta.next_job = meta.next_job.max(job.id.0.saturating_add(1)),
        Record::Node(node) => meta.next_node = meta.next_node.max(node.id.0.saturating_add(1)),
        Record::Token(token) => meta.next_token = meta.next_token.max(token.id.0.saturating_add(1)),
        Record::Task(_)
        | Record::Attempt(_)
        | Record::Bundle(_)
        | Record::BundleRemoved(_)
        | Record::NodeRemoved(_)
        | Record::User(_) => {}
    }
}

pub(super) fn upsert(
    transaction: &Transaction<'_>,
    record: &Record,
    row: &[u8],
) -> rusqlite::Result<()> {
    match record {
        Record::Job(job) => upsert_job(transaction, job, row),
        Record::Task(task) => upsert_task(transaction, task, row),
        Record::Attempt(attempt) => upsert_attempt(transaction, attempt, row),
        Record::Token(token) => upsert_token(transaction, token, row),
        Record::Bundle(bundle) => transaction
            .prepare_cached("INSERT OR REPLACE INTO bundles VALUES (?1, ?2, ?3)")?
            .execute(params![id(bundle.id.job.0), bundle.id.bundle, row]),
        Record::BundleRemoved(bundle) => transaction
            .prepare_cached("DELETE FROM bundles WHERE job = ?1 AND bundle = ?2")?
            .execute(params![id(bundle.job.0), bundle.bundle]),
        Record::Node(node) => transaction
            .prepare_cached("INSERT OR REPLACE INTO nodes VALUES (?1, ?2)")?
            .execute(params![node.id.0, row]),
        Record::NodeRemoved(node) => transaction
            .prepare_cached("DELETE FROM nodes WHERE id = ?1")?
            .execute(params![node.0]),
        Record::User(user) => transaction
            .prepare_cached("INSERT OR REPLACE INTO users VALUES (?1, ?2)")?
            .execute(params![user.name.as_str(), row]),
    }
    .map(|_| ())
}

fn upsert_job(
    transaction: &Transaction<'_>,
    job: &JobRecord,
    row: &[u8],
) -> rusqlite::Result<usize> {
    transaction
        .prepare_cached("INSERT OR REPLACE INTO jobs VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")?
        .execute(params![
            id(job.id.0),
            job.owner.as_str(),
            job.state.as_str(),
            !job.state.is_terminal(),
            job.request_id.as_str(),
            job.request_digest.0,
            time(job.submitted_at),
            row
        ])
}

fn upsert_task(
    transaction: &Transaction<'_>,
    task: &TaskRecord,
    row: &[u8],
) -> rusqlite::Result<usize> {
    transaction
        .prepare_cached("INSERT OR REPLACE INTO tasks VALUES (?1, ?2, ?3, ?4, ?5)")?
        .execute(params![
            id(task.job.0),
            task.index.0,
            task.state.as_str(),
            !task.state.is_terminal(),
            row
        ])
}

fn upsert_attempt(
    transaction: &Transaction<'_>,
    attempt: &AttemptRecord,
    row: &[u8],
) -> rusqlite::Result<usize> {
    let open = attempt.state != AttemptState::Ended;
    transaction
        .prepare_cached("INSERT OR REPLACE INTO attempts VALUES (?1, ?2, ?3, ?4, ?5)")?
        .execute(params![
            id(attempt.id.job.0),
            attempt.id.task.0,
            attempt.id.attempt.0,
            open,
            row
        ])
}

fn upsert_token(
    transaction: &Transaction<'_>,
    token: &TokenRecord,
    row: &[u8],
) -> rusqlite::Result<usize> {
    let usable = !token.revoked && token.uses_left > 0;
    transaction
        .prepare_cached("INSERT OR REPLACE INTO tokens VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![id(token.id.0), usable, time(token.expires_at), row])
}
