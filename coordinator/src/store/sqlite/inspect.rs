//! A look at a state from outside, beside a coordinator that may be running on it: everything that is damaged, a copy of
//! it as of one moment, and what a restored copy gets before it is used. It changes nothing but such a copy.

use std::fs;
use std::path::Path;

use rusqlite::{Connection, OpenFlags, OptionalExtension, params};
use trainyard_common::ids::{ClusterId, JobId, Sequence, Term};
use trainyard_common::record::Record;
use trainyard_common::state::AttemptState;
use trainyard_common::time::Timestamp;

use super::read::TABLES;
use super::write::{id, time};
use super::{
    APPLICATION_ID, Meta, Reader, SCHEMA_OF_BUNDLES, SCHEMA_OF_RESTORES, SCHEMA_VERSION, chain,
    connect, corrupt, create_private, decode, failed, read_meta,
};
use crate::store::{Damage, Inspection, MAX_DAMAGE, StoreError};

/// What a restored state's numbers are raised by: more than can have been given since any backup that is still of use.
const TERMS: u64 = 1_000_000;
const JOBS: u64 = 1_000_000;
const NODES: u32 = 10_000;
const TOKENS: u64 = 100_000;

/// Reads everything of a state and says all that is wrong with it.
pub(crate) fn inspect(file: &Path) -> Result<Inspection, StoreError> {
    let mut connection = connect(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let cluster = identify(&connection, file)?;
    let reader = Reader {
        transaction: connection
            .transaction()
            .map_err(|source| failed("check", file, source))?,
        file,
        operation: "check",
    };
    let meta = read_meta(&reader.transaction).map_err(|source| reader.failed(source))?;
    let mut found = Found::default();
    reader.inspect_pages(&mut found)?;
    let mut rows = 0;
    for table in &TABLES {
        rows += reader.inspect_table(table.name, table.key, &mut found)?;
    }
    let transitions = reader.inspect_chain(&meta, &mut found)?;
    reader.name_jobs(&mut found.damage);
    Ok(Inspection {
        cluster,
        term: meta.term,
        rows,
        transitions,
        sequence: Sequence(meta.sequence),
        damage: found.damage,
        more: found.more,
    })
}

/// Whose state it is, if it is one that this version reads.
fn identify(connection: &Connection, file: &Path) -> Result<ClusterId, StoreError> {
    let error = |source| failed("read", file, source);
    let application: i64 = connection
        .pragma_query_value(None, "application_id", |row| row.get(0))
        .map_err(error)?;
    if application != APPLICATION_ID {
        return Err(corrupt(
            file,
            "meta",
            "1",
            "it is no state of a coordinator",
        ));
    }
    let (found, cluster): (i64, Vec<u8>) = connection
        .query_row("SELECT schema_version, cluster FROM meta", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .optional()
        .map_err(error)?
        .ok_or_else(|| corrupt(file, "meta", "1", "the row is missing"))?;
    if found != SCHEMA_VERSION {
        return Err(StoreError::Schema {
            database: file.to_owned(),
            found,
            known: SCHEMA_VERSION,
        });
    }
    ClusterId::try_from(cluster.as_slice()).map_err(|bad| corrupt(file, "meta", "1", bad))
}

/// Damage so far.
#[derive(Default)]
struct Found {
    damage: Vec<Damage>,
    more: bool,
}

impl Found {
    fn add(&mut self, table: &str, key: impl Into<String>, reason: impl Into<String>) {
        if self.damage.len() >= MAX_DAMAGE {
            self.more = true;
            return;
        }
        self.damage.push(Damage {
            table: table.to_owned(),
            key: key.into(),
            offset: None,
            reason: reason.into(),
            jobs: Vec::new(),
        });
    }

    /// Keeps what an error says about damage; any other error stays one.
    fn note(&mut self, table: &str, error: StoreError) -> Result<(), StoreError> {
        match error {
            StoreError::Corrupt { key, reason, .. } => {
                self.add(table, key, reason);
                Ok(())
            }
            other => Err(other),
        }
    }
}

impl Reader<'_> {
    fn has_table(&self, name: &str) -> Result<bool, StoreError> {
        let query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?1";
        let found = self.transaction.query_row(query, [name], |_| Ok(()));
        found
            .optional()
            .map(|found| found.is_some())
            .map_err(|source| self.failed(source))
    }

    /// Pages as SQLite sees them, with the place in the file where it names one.
    fn inspect_pages(&self, found: &mut Found) -> Result<(), StoreError> {
        let verdicts = || -> rusqlite::Result<(u64, Vec<String>)> {
            let size = self
                .transaction
                .pragma_query_value(None, "page_size", |row| row.get(0))?;
            let mut check = self
                .transaction
                .prepare(&format!("PRAGMA quick_check({MAX_DAMAGE})"))?;
            let rows = check.query_map([], |row| row.get(0))?;
            Ok((size, rows.collect::<rusqlite::Result<_>>()?))
        };
        let (size, verdicts) = match verdicts() {
            Ok(found) => found,
            Err(source) => return found.note("(any)", self.failed(source)),
        };
        for line in verdicts.iter().flat_map(|verdict| verdict.lines()) {
            if line == "ok" || line.starts_with("***") {
                continue;
            }
            found.add("(any)", "(unknown)", line);
            if let (Some(page), Some(last)) = (page_of(line), found.damage.last_mut()) {
                last.offset = Some(page.saturating_sub(1).saturating_mul(size));
            }
        }
        Ok(())
    }

    /// Decodes every row of a table; says how many there are.
    fn inspect_table(
        &self,
        table: &'static str,
        key: &str,
        found: &mut Found,
    ) -> Result<u64, StoreError> {
        if !self.has_table(table)? {
            return Ok(0);
        }
        let mut count = 0;
        let mut scan = || -> Result<(), StoreError> {
            let error = |source| self.failed(source);
            let flag = flag_of(table);
            let query = format!("SELECT {key}, row, {flag} FROM {table}");
            let mut statement = self.transaction.prepare(&query).map_err(error)?;
            let mut rows = statement.query([]).map_err(error)?;
            while let Some(row) = rows.next().map_err(error)? {
                count += 1;
                let key: String = row.get(0).map_err(error)?;
                let bytes: Vec<u8> = row.get(1).map_err(error)?;
                let flag: bool = row.get(2).map_err(error)?;
                match decode(self.file, table, &key, &bytes) {
                    Err(bad) => found.note(table, bad)?,
                    Ok((_, record)) if is_flagged(&record) != flag => {
                        found.add(table, key, "its columns do not say what its row says");
                    }
                    Ok(_) => {}
                }
            }
            Ok(())
        };
        match scan() {
            Ok(()) => {}
            Err(error) => found.note(table, error)?,
        }
        Ok(count)
    }

    /// Follows the chain of transitions and goes on behind each break; says how many transitions there are.
    fn inspect_chain(&self, meta: &Meta, found: &mut Found) -> Result<u64, StoreError> {
        let (mut count, mut last, mut value) = (0, 0, 0);
        let read = self.each_transition(
            Sequence(0),
            usize::MAX,
            |sequence, kind, key, row, stored| {
                count += 1;
                if sequence != last + 1 {
                    let missing = format!("{}..{}", last + 1, sequence - 1);
                    found.add("transitions", missing, "missing");
                } else if chain(value, sequence, row) != stored {
                    let reason = format!(
                        "the change of {kind} {key} does not continue the chain of checksums"
                    );
                    found.add("transitions", sequence.to_string(), reason);
                }
                (last, value) = (sequence, stored);
                Ok(())
            },
        );
        if let Err(error) = read {
            found.note("transitions", error)?;
        } else if (last, value) != (meta.sequence, meta.chain) {
            let reason = format!(
                "the log ends with {last}, but {} were written; its end was cut off or changed",
                meta.sequence
            );
            found.add("transitions", meta.sequence.to_string(), reason);
        }
        Ok(count)
    }

    /// Names the jobs that each damage is about, as far as that can be told.
    fn name_jobs(&self, damage: &mut [Damage]) {
        for damage in damage {
            let job = damage
                .key
                .split('.')
                .next()
                .and_then(|key| key.parse().ok());
            damage.jobs = match damage.table.as_str() {
                "jobs" | "tasks" | "attempts" | "bundles" => job.into_iter().collect(),
                "nodes" => self.jobs_on(&damage.key),
                "transitions" => self.job_of_transition(&damage.key).into_iter().collect(),
                _ => Vec::new(),
            };
        }
    }

    /// Jobs with an attempt that is not over on a node. What cannot be read is told of by itself.
    fn jobs_on(&self, node: &str) -> Vec<JobId> {
        let query = "SELECT row FROM attempts WHERE open = 1";
        let Ok(mut statement) = self.transaction.prepare(query) else {
            return Vec::new();
        };
        let Ok(rows) = statement.query_map([], |row| row.get::<_, Vec<u8>>(0)) else {
            return Vec::new();
        };
        let mut jobs: Vec<JobId> = rows
            .flatten()
            .filter_map(|row| match super::codec::decode(&row) {
                Ok((_, Record::Attempt(attempt))) => Some(attempt),
                _ => None,
            })
            .filter(|attempt| {
                attempt
                    .members
                    .iter()
                    .any(|member| member.node.to_string() == node)
            })
            .map(|attempt| attempt.id.job)
            .collect();
        jobs.dedup();
        jobs
    }

    fn job_of_transition(&self, sequence: &str) -> Option<JobId> {
        let sequence: i64 = sequence.parse().ok()?;
        let query = "SELECT key FROM transitions WHERE sequence = ?1 AND kind IN ('jobs', 'tasks', 'attempts', 'bundles')";
        let key: String = self
            .transaction
            .query_row(query, [sequence], |row| row.get(0))
            .ok()?;
        key.split('.').next()?.parse().ok()
    }
}

/// The column that says whether a start reads a row; where it reads all, there is none.
fn flag_of(table: &str) -> &'static str {
    match table {
        "jobs" | "tasks" => "live",
        "attempts" => "open",
        "tokens" => "usable",
        _ => "1",
    }
}

/// What that column should say.
fn is_flagged(record: &Record) -> bool {
    match record {
        Record::Job(job) => !job.state.is_terminal(),
        Record::Task(task) => !task.state.is_terminal(),
        Record::Attempt(attempt) => attempt.state != AttemptState::Ended,
        Record::Token(token) => !token.revoked && token.uses_left > 0,
        Record::Bundle(_)
        | Record::BundleRemoved(_)
        | Record::Node(_)
        | Record::NodeRemoved(_)
        | Record::User(_) => true,
    }
}

/// The number of the page that SQLite's complaint is about.
fn page_of(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once("page ")?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// Copies the state as of one moment into a new file. A coordinator may go on writing meanwhile.
pub(crate) fn copy(file: &Path, to: &Path) -> Result<(), StoreError> {
    let connection = connect(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    identify(&connection, file)?;
    create_private(to)?;
    let name = to.to_str().ok_or_else(|| StoreError::File {
        operation: "write",
        path: to.to_owned(),
        source: std::io::Error::other("the path is not valid UTF-8"),
    })?;
    connection
        .execute("VACUUM INTO ?1", [name])
        .map_err(|source| failed("copy", file, source))?;
    // SQLite does not sync what it copies into.
    let synced = fs::File::open(to).and_then(|file| file.sync_all());
    synced.map_err(|source| StoreError::File {
        operation: "sync",
        path: to.to_owned(),
        source,
    })
}

/// Raises every number of a copied state above what can have been given since it was copied at `taken_at`, and puts on
/// record that it was restored. Gives the term that is over.
pub(crate) fn raise(file: &Path, taken_at: Timestamp, now: Timestamp) -> Result<Term, StoreError> {
    let raise = || -> rusqlite::Result<Term> {
        let mut connection = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        let transaction = connection.transaction()?;
        transaction.execute_batch(SCHEMA_OF_BUNDLES)?;
        transaction.execute_batch(SCHEMA_OF_RESTORES)?;
        let meta = read_meta(&transaction)?;
        transaction.execute(
            "UPDATE meta SET term = ?1, next_job = ?2, next_node = ?3, next_token = ?4",
            params![
                id(meta.term.0.saturating_add(TERMS)),
                id(meta.next_job.saturating_add(JOBS)),
                meta.next_node.saturating_add(NODES),
                id(meta.next_token.saturating_add(TOKENS)),
            ],
        )?;
        transaction.execute(
            "INSERT INTO restores (at, taken_at, sequence, reconciled) VALUES (?1, ?2, ?3, 0)",
            params![time(now), time(taken_at), id(meta.sequence)],
        )?;
        transaction.commit()?;
        Ok(meta.term)
    };
    raise().map_err(|source| failed("raise the numbers of", file, source))
}
