//! A look at a state from outside, beside a coordinator that may be running on it: everything that is damaged, a copy of
//! it as of one moment, and what a restored copy gets before it is used. It changes nothing but such a copy.

use std::fs;
use std::path::Path;

use rusqlite::{Connection, OpenFlags, OptionalExtension, params};
use trainyard_common::ids::{JobId, Sequence, Term};
use trainyard_common::record::Record;
use trainyard_common::time::Timestamp;

use super::meta::{self, Meta, flag_of, is_live};
use super::read::TABLES;
use super::write::{id, time};
use super::{Reader, chain, connect, create_private, decode, failed, schema};
use crate::store::wal::{self, Scan, Verdict};
use crate::store::{Damage, Inspection, MAX_DAMAGE, StoreError};

/// What a restored state's numbers are raised by: more than can have been given since any backup that is still of use.
const TERMS: u64 = 1_000_000;
const JOBS: u64 = 1_000_000;
const NODES: u32 = 10_000;
const TOKENS: u64 = 100_000;
/// Looks that one process may have open at a time; there are two at most.
const MAX_LOOKS: u32 = 16;

/// Reads everything of a state and says all that is wrong with it.
pub(crate) fn inspect(file: &Path) -> Result<Inspection, StoreError> {
    let mut found = Found {
        file: file.to_owned(),
        damage: Vec::new(),
        more: false,
    };
    inspect_log(file, &mut found)?;
    let mut connection = connect(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let version = schema::identify(&connection, file)?;
    let reader = Reader {
        transaction: connection
            .transaction()
            .map_err(|source| failed("check", file, source))?,
        file,
        operation: "check",
    };
    let meta = schema::read_any(&reader.transaction, file, version)?;
    let tallied = version == schema::SCHEMA_VERSION;
    if tallied && let Err(error) = schema::check(&reader.transaction, file) {
        found.note("sqlite_master", error)?;
    }
    reader.inspect_pages(&mut found)?;
    let (mut rows, mut tallies) = (0, meta::Tallies::default());
    for (index, table) in TABLES.iter().enumerate() {
        rows += reader.inspect_table(index, &mut tallies, &mut found)?;
        let same = tallies.live[index] == meta.tallies.live[index]
            && tallies.rest[index] == meta.tallies.rest[index];
        if tallied && !same && !found.damage.iter().any(|known| known.table == table.name) {
            let written = meta.tallies.live[index].rows + meta.tallies.rest[index].rows;
            reader.inspect_missing(table.name, written, &mut found)?;
        }
    }
    let transitions = reader.inspect_chain(&meta, &mut found)?;
    reader.name_jobs(&mut found.damage);
    Ok(Inspection {
        cluster: meta.cluster,
        schema: version,
        term: meta.term,
        rows,
        transitions,
        sequence: Sequence(meta.sequence),
        damage: found.damage,
        more: found.more,
    })
}

/// The write-ahead log below SQLite. A commit at its end that is not whole may be one that is on its way.
fn inspect_log(file: &Path, found: &mut Found) -> Result<(), StoreError> {
    let path = file.with_file_name(wal::FILE_NAME);
    let scan = wal::scan(&path).map_err(super::open::file_failed("read", &path))?;
    if let Verdict::Damaged { offset, reason, .. } = scan.verdict {
        found.damage.push(Damage {
            file: path,
            table: "(log)".to_owned(),
            key: format!("commit {}", scan.commits + 1),
            offset: Some(offset),
            reason: reason.to_owned(),
            jobs: jobs_behind(file, &scan),
        });
    }
    Ok(())
}

/// Whether whole commits of the write-ahead log are out of SQLite's sight.
pub(crate) fn has_damaged_log(file: &Path) -> bool {
    let scan = wal::scan(&file.with_file_name(wal::FILE_NAME));
    scan.is_ok_and(|scan| matches!(scan.verdict, Verdict::Damaged { .. }))
}

/// Jobs that commits behind the damage of a log were about, as far as that can be told: from a copy of the state into which
/// everything that is left of the log is put, whole or not, and which is thrown away.
pub(super) fn jobs_behind(file: &Path, scan: &Scan) -> Vec<JobId> {
    jobs_of_leftovers(file, scan).unwrap_or_else(|error| {
        tracing::debug!(%error, "it cannot be told which jobs a damaged log was about");
        Vec::new()
    })
}

fn jobs_of_leftovers(file: &Path, scan: &Scan) -> std::io::Result<Vec<JobId>> {
    use std::os::unix::fs::FileExt;
    let look = tempdir_beside(file)?;
    let copy = look.0.join(super::FILE_NAME);
    fs::copy(file, &copy)?;
    let known = {
        // What whole commits hold, read as SQLite reads it.
        fs::copy(&scan.path, look.0.join(wal::FILE_NAME))?;
        wal::cut(&look.0.join(wal::FILE_NAME), scan.end)?;
        let connection = Connection::open(&copy).map_err(std::io::Error::other)?;
        // Nothing, if even the tables were made behind the damage.
        let query = "SELECT MAX(sequence) FROM transitions";
        let last: Option<i64> = connection
            .query_row(query, [], |row| row.get(0))
            .unwrap_or(None);
        last.unwrap_or(0)
    };
    let bytes = fs::File::options().read(true).write(true).open(&copy)?;
    let mut header = [0; 100];
    bytes.read_exact_at(&mut header, 0)?;
    let page_size = match u16::from_be_bytes([header[16], header[17]]) {
        1 => 65_536,
        size => u32::from(size),
    };
    wal::leftovers(&scan.path, page_size, |page, content| {
        let at = u64::from(page.saturating_sub(1)) * u64::from(page_size);
        bytes.write_all_at(content, at)
    })?;
    // The database has as many pages as it has now, whatever an older first page says.
    let pages = u32::try_from(bytes.metadata()?.len() / u64::from(page_size)).unwrap_or(u32::MAX);
    bytes.write_all_at(&pages.to_be_bytes(), 28)?;
    drop(bytes);
    let _ = fs::remove_file(look.0.join(wal::FILE_NAME));
    let connection = Connection::open(&copy).map_err(std::io::Error::other)?;
    let query = "SELECT key FROM transitions WHERE sequence > ?1 AND kind IN ('jobs', 'tasks', 'attempts', 'bundles')";
    let mut statement = connection.prepare(query).map_err(std::io::Error::other)?;
    let rows = statement
        .query_map([known], |row| row.get::<_, String>(0))
        .map_err(std::io::Error::other)?;
    let jobs: std::collections::BTreeSet<JobId> = rows
        .map_while(Result::ok)
        .filter_map(|key| key.split('.').next()?.parse().ok())
        .collect();
    Ok(jobs.into_iter().collect())
}

/// A directory that goes with the value.
pub(super) struct Scratch(std::path::PathBuf);

impl Scratch {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(super) fn tempdir_beside(file: &Path) -> std::io::Result<Scratch> {
    use std::os::unix::fs::DirBuilderExt;
    // The next free name: one look may be made within another.
    for number in 0..MAX_LOOKS {
        let path = file.with_file_name(format!(".look-{}-{number}", std::process::id()));
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => return Ok(Scratch(path)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(std::io::ErrorKind::AlreadyExists.into())
}

/// Damage so far.
struct Found {
    file: std::path::PathBuf,
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
            file: self.file.clone(),
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

    /// Decodes every row of a table and tallies them; says how many there are.
    fn inspect_table(
        &self,
        index: usize,
        tallies: &mut meta::Tallies,
        found: &mut Found,
    ) -> Result<u64, StoreError> {
        let (table, key) = (TABLES[index].name, TABLES[index].key);
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
                tallies.of(index, flag).add(&bytes);
                match decode(self.file, table, &key, &bytes) {
                    Err(bad) => found.note(table, bad)?,
                    Ok((_, record)) if is_live(&record) != flag => {
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

    /// Names the rows of a table that are not those of the log: vanished ones, and ones that are not the last.
    fn inspect_missing(
        &self,
        table: &str,
        written: u64,
        found: &mut Found,
    ) -> Result<(), StoreError> {
        let error = |source| self.failed(source);
        let key = TABLES
            .iter()
            .find(|known| known.name == table)
            .map_or("''", |known| known.key);
        // The last change of each key, if it left a row, and the row that there is.
        let query = format!(
            "SELECT t.key, t.row, r.row FROM (SELECT key, row, MAX(sequence) FROM transitions WHERE kind = ?1 GROUP BY key) t \
             LEFT JOIN (SELECT {key} AS key, row FROM {table}) r ON r.key = t.key WHERE r.row IS NOT t.row"
        );
        let mut named = 0;
        let mut statement = self.transaction.prepare(&query).map_err(error)?;
        let mut rows = statement.query([table]).map_err(error)?;
        while let Some(row) = rows.next().map_err(error)? {
            let (key, last): (String, Vec<u8>) =
                (row.get(0).map_err(error)?, row.get(1).map_err(error)?);
            let there: Option<Vec<u8>> = row.get(2).map_err(error)?;
            let removed = matches!(
                super::codec::decode(&last),
                Ok((_, Record::NodeRemoved(_) | Record::BundleRemoved(_)))
            );
            match (removed, there) {
                (true, None) => continue,
                (true, Some(_)) => found.add(table, key, "it was removed, but is there"),
                (false, None) => found.add(table, key, "it is missing"),
                (false, Some(_)) => {
                    found.add(table, key, "it is not the last one that was written")
                }
            }
            named += 1;
        }
        if named == 0 {
            let reason =
                format!("{written} rows were written, and they are not the ones that are there");
            found.add(table, "(unknown)", reason);
        }
        Ok(())
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

/// The number of the page that SQLite's complaint is about.
fn page_of(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once("page ")?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// Copies the state as of one moment into a new file. A coordinator may go on writing meanwhile.
pub(crate) fn copy(file: &Path, to: &Path) -> Result<(), StoreError> {
    let connection = connect(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    schema::identify(&connection, file)?;
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

/// The schema version of a state, if it is one that this version reads.
pub(crate) fn version(file: &Path) -> Result<i64, StoreError> {
    schema::identify(&connect(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?, file)
}

/// Raises every number above what can have been given since, and has the nodes awaited.
pub(super) fn raise_numbers(meta: &mut Meta) {
    meta.term = Term(meta.term.0.saturating_add(TERMS));
    meta.next_job = meta.next_job.saturating_add(JOBS);
    meta.next_node = meta.next_node.saturating_add(NODES);
    meta.next_token = meta.next_token.saturating_add(TOKENS);
    meta.awaiting = true;
}

/// Puts on record that the numbers were raised: the ids that were never given are not missed.
pub(super) fn note_raise(
    connection: &Connection,
    file: &Path,
    meta: &Meta,
    taken_at: Timestamp,
) -> Result<Meta, StoreError> {
    let note = || -> rusqlite::Result<()> {
        schema::add_gap(
            connection,
            meta.next_job.saturating_sub(JOBS),
            meta.next_job,
        )?;
        connection
            .execute(
                "INSERT INTO restores (at, taken_at, sequence, reconciled) VALUES (?1, ?1, ?2, 0)",
                params![time(taken_at), id(meta.sequence)],
            )
            .map(drop)
    };
    note().map_err(|source| failed("raise the numbers of", file, source))?;
    Ok(*meta)
}

/// Raises every number of a copied state above what can have been given since it was copied at `taken_at`, and puts on
/// record that it was restored. A copy of an earlier version is migrated.
pub(crate) fn raise(file: &Path, taken_at: Timestamp, now: Timestamp) -> Result<(), StoreError> {
    let error = |source| failed("raise the numbers of", file, source);
    let mut connection = connect(file, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    connection
        .pragma_update(None, "synchronous", "FULL")
        .map_err(error)?;
    schema::migrate(&connection, file)?;
    let transaction = connection.transaction().map_err(error)?;
    let mut meta = meta::read(&transaction, file)?;
    let first = meta.next_job;
    raise_numbers(&mut meta);
    meta.commits += 1;
    let write = || -> rusqlite::Result<()> {
        meta::write(&transaction, &meta)?;
        schema::add_gap(&transaction, first, meta.next_job)?;
        transaction
            .execute(
                "INSERT INTO restores (at, taken_at, sequence, reconciled) VALUES (?1, ?2, ?3, 0)",
                params![time(now), time(taken_at), id(meta.sequence)],
            )
            .map(drop)
    };
    write().map_err(error)?;
    transaction.commit().map_err(error)
}
