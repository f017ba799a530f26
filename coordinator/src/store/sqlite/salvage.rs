//! What `--accept-loss` does: a new database from what is whole of a damaged one, which is kept beside it.
//!
//! Rows and transitions hold the same twice. If all rows are there, what is damaged of the log is given up; if rows are
//! damaged, they are made again from the log as far as that is whole, and what came after is given up. Either way numbers
//! go on far above, and nothing is placed until the nodes have said what they run, as after a restored backup.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, params};
use trainyard_common::record::Record;
use trainyard_common::time::Timestamp;
use trainyard_transport::files::{create_private_dir, sync_dir, write_private};

use super::inspect::{self, Scratch, tempdir_beside};
use super::meta::{self, Meta, Tallies, is_live, table_of};
use super::open::file_failed;
use super::read::TABLES;
use super::write::{id, raise_marks, time, upsert};
use super::{
    FILE_NAME, Reader, codec, connect, create_private, decode, failed, kind_and_key, schema,
};
use crate::store::mark::{self, Found};
use crate::store::wal::{self, Verdict};
use crate::store::{StoreError, refusal};

/// What was given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Accepted {
    /// Where the damaged files are kept.
    pub(crate) kept: PathBuf,
    /// One sentence for each thing.
    pub(crate) told: Vec<String>,
}

/// A transition that is whole in itself.
struct Change {
    sequence: u64,
    at: Timestamp,
    record: Record,
    row: Vec<u8>,
}

/// Rows by table and key, decoded and as they are stored.
type Rows = BTreeMap<(usize, String), (Record, Vec<u8>)>;

/// What is left of a state.
struct Left {
    rows: Rows,
    changes: Vec<Change>,
    told: Vec<String>,
}

/// Makes the state in `dir` usable again after `error` has refused it. The caller holds the directory's lock.
///
/// # Errors
/// [`StoreError::CannotAccept`] if too little is whole, or whatever the disk says; the state is as it was then.
pub(crate) fn accept_loss(
    dir: &Path,
    error: &StoreError,
    now: Timestamp,
) -> Result<Accepted, StoreError> {
    let file = dir.join(FILE_NAME);
    let kept = keep(dir, now)?;
    let look = tempdir_beside(&file).map_err(file_failed("make a directory beside", &file))?;
    let (copy, mut told) = cut_copy(dir, &look)?;
    let connection = connect(&copy, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    if schema::identify(&connection, &copy)? != schema::SCHEMA_VERSION {
        return Err(cannot(
            &file,
            "it is of an earlier version, which has to be mended first",
        ));
    }
    let mark = match mark::read(dir) {
        Ok(Found::Mark(mark)) => Some(mark),
        _ => None,
    };
    let stored = meta::read(&connection, &copy).ok();
    let mut meta = match stored {
        Some(meta) => meta,
        None => {
            told.push(
                "the numbers of the state are damaged and were made from its rows".to_owned(),
            );
            schema::read_any(&connection, &copy, 1)
                .map_err(|_| cannot(&file, "nothing of its numbers can be read"))?
        }
    };
    let left = gather(connection, &copy, stored.as_ref())?;
    told.extend(left.told.iter().cloned());
    if let Some(mark) = &mark {
        let last = left.changes.last().map_or(0, |change| change.sequence);
        if mark.sequence > last {
            told.push(format!(
                "changes {}..{} that were answered are lost",
                last + 1,
                mark.sequence
            ));
        }
        meta.term.0 = meta.term.0.max(mark.term);
        meta.commits = meta.commits.max(mark.commits);
    }
    let accepting = dir.join(format!("{FILE_NAME}.accepting"));
    build(&accepting, meta, &left, now)?;
    swap(dir, &accepting)?;
    told.insert(0, format!("given up with --accept-loss: {error}"));
    let note = kept.join("accepted.txt");
    write_private(&note, format!("{}\n", told.join("\n")).as_bytes())
        .map_err(file_failed("write", &note))?;
    Ok(Accepted { kept, told })
}

fn cannot(file: &Path, reason: &str) -> StoreError {
    StoreError::CannotAccept {
        file: file.to_owned(),
        reason: reason.to_owned(),
    }
}

/// Copies the files as they are, before anything is done to them.
fn keep(dir: &Path, now: Timestamp) -> Result<PathBuf, StoreError> {
    let kept = dir.join(format!("damaged-{}", now.0));
    create_private_dir(&kept).map_err(file_failed("make", &kept))?;
    for name in [FILE_NAME, wal::FILE_NAME, mark::FILE_NAME] {
        let (from, to) = (dir.join(name), kept.join(name));
        if from.exists() {
            fs::copy(&from, &to)
                .and_then(|_| fs::File::open(&to)?.sync_all())
                .map_err(file_failed("copy", &from))?;
        }
    }
    sync_dir(&kept).map_err(file_failed("sync", &kept))?;
    sync_dir(dir).map_err(file_failed("sync", dir))?;
    Ok(kept)
}

/// A copy to work on, with its log cut where it stops being whole.
fn cut_copy(dir: &Path, look: &Scratch) -> Result<(PathBuf, Vec<String>), StoreError> {
    let (file, log) = (dir.join(FILE_NAME), dir.join(wal::FILE_NAME));
    let copy = look.path().join(FILE_NAME);
    fs::copy(&file, &copy).map_err(file_failed("copy", &file))?;
    let scan = wal::scan(&log).map_err(file_failed("read", &log))?;
    let mut told = Vec::new();
    if let Verdict::Damaged { offset, .. } = scan.verdict {
        let jobs = inspect::jobs_behind(&file, &scan);
        told.push(format!(
            "commits from offset {offset} of {} on are given up; {}",
            log.display(),
            refusal::jobs(jobs)
        ));
    }
    if scan.end > 0 {
        let to = look.path().join(wal::FILE_NAME);
        fs::copy(&log, &to)
            .and_then(|_| wal::cut(&to, scan.end))
            .map_err(file_failed("copy", &log))?;
    }
    Ok((copy, told))
}

/// Everything that is whole.
fn gather(
    mut connection: Connection,
    file: &Path,
    meta: Option<&Meta>,
) -> Result<Left, StoreError> {
    let reader = Reader {
        transaction: connection
            .transaction()
            .map_err(|source| failed("read", file, source))?,
        file,
        operation: "read",
    };
    let mut changes = Vec::new();
    let (mut last, mut value, mut whole) = (0, 0, true);
    // Damage ends it: what is behind it cannot be reached, or is looked at below.
    let read = reader.each_transition(
        trainyard_common::ids::Sequence(0),
        usize::MAX,
        |sequence, kind, key, row, stored| {
            let continues = sequence == last + 1 && super::chain(value, sequence, row) == stored;
            whole &= continues;
            (last, value) = (sequence, stored);
            let known = TABLES.iter().find(|table| table.name == kind);
            match known.map(|table| decode(file, table.name, key, row)) {
                Some(Ok((at, record))) => changes.push((
                    whole,
                    Change {
                        sequence,
                        at,
                        record,
                        row: row.to_owned(),
                    },
                )),
                _ => whole = false,
            }
            Ok(())
        },
    );
    whole &= read.is_ok() && meta.is_none_or(|meta| (meta.sequence, meta.chain) == (last, value));
    if let Some(rows) = meta.and_then(|meta| whole_rows(&reader, meta)) {
        let changes = changes.into_iter().map(|(_, change)| change).collect();
        return Ok(keep_rows(
            rows,
            changes,
            meta.map_or(0, |meta| meta.sequence),
            whole,
        ));
    }
    let changes: Vec<Change> = changes
        .into_iter()
        .take_while(|(whole, _)| *whole)
        .map(|(_, change)| change)
        .collect();
    from_log(file, changes, whole)
}

/// All rows, if they are the ones that were written.
fn whole_rows(reader: &Reader<'_>, meta: &Meta) -> Option<Rows> {
    let mut rows = BTreeMap::new();
    let mut tallies = Tallies::default();
    for (index, table) in TABLES.iter().enumerate() {
        // From the table itself, not through an index that may be what is damaged.
        let query = format!("SELECT {}, row FROM {} NOT INDEXED", table.key, table.name);
        let mut statement = reader.transaction.prepare(&query).ok()?;
        let mut found = statement.query([]).ok()?;
        while let Some(row) = found.next().ok()? {
            let (key, bytes): (String, Vec<u8>) = (row.get(0).ok()?, row.get(1).ok()?);
            let (_, record) = decode(reader.file, table.name, &key, &bytes).ok()?;
            tallies.of(index, is_live(&record)).add(&bytes);
            rows.insert((index, key), (record, bytes));
        }
    }
    (tallies == meta.tallies).then_some(rows)
}

/// Rows that are all there. The log keeps its numbers: in the place of a change that is lost a row is told once more.
fn keep_rows(rows: Rows, whole: Vec<Change>, sequence: u64, undamaged: bool) -> Left {
    if undamaged {
        let told = vec![format!(
            "every row and change up to number {sequence} is whole"
        )];
        return Left {
            rows,
            changes: whole,
            told,
        };
    }
    let mut left: BTreeMap<u64, Change> = whole
        .into_iter()
        .filter(|change| change.sequence <= sequence)
        .map(|change| (change.sequence, change))
        .collect();
    let lost: Vec<u64> = (1..=sequence)
        .filter(|number| !left.contains_key(number))
        .collect();
    let mut lasts: BTreeMap<(usize, String), &[u8]> = BTreeMap::new();
    for change in left.values() {
        let key = (table_of(&change.record), kind_and_key(&change.record).1);
        lasts.insert(key, &change.row);
    }
    // First the rows whose own last change is lost.
    let mut again: Vec<_> = rows
        .iter()
        .filter(|(key, (_, row))| lasts.get(*key) != Some(&row.as_slice()))
        .map(|(_, row)| row.clone())
        .collect();
    let filler = rows.values().next().cloned();
    let mut added = Vec::new();
    for number in &lost {
        if let Some((record, row)) = filler.clone() {
            added.push((*number, record, row));
        }
    }
    for (number, (record, row)) in (sequence + 1..).zip(again.drain(..)) {
        added.push((number, record, row));
    }
    for (sequence, record, row) in added {
        let at = codec::decode(&row).map_or(Timestamp(0), |(at, _)| at);
        left.insert(
            sequence,
            Change {
                sequence,
                at,
                record,
                row,
            },
        );
    }
    let told = vec![format!(
        "every row is whole; {} of the log of changes are lost, which history lacks from now on",
        lost.len()
    )];
    Left {
        rows,
        changes: left.into_values().collect(),
        told,
    }
}

/// Rows made again from the log.
fn from_log(file: &Path, mut changes: Vec<Change>, whole: bool) -> Result<Left, StoreError> {
    if changes.is_empty() {
        return Err(cannot(
            file,
            "neither its rows nor its log of changes are whole",
        ));
    }
    let told = if whole {
        "rows are damaged; all of them were made again from the log of changes, and nothing is lost"
            .to_owned()
    } else {
        // The end of the last commit that is whole cannot be told; changes of one commit have one time.
        let last = changes.last().map(|change| change.at);
        changes.retain(|change| Some(change.at) != last);
        let end = changes.last().map_or(0, |change| change.sequence);
        format!("rows and log are damaged; every change after number {end} is given up")
    };
    let mut rows = BTreeMap::new();
    for change in &changes {
        let key = (table_of(&change.record), kind_and_key(&change.record).1);
        match &change.record {
            Record::BundleRemoved(_) | Record::NodeRemoved(_) => drop(rows.remove(&key)),
            record => drop(rows.insert(key, (record.clone(), change.row.clone()))),
        }
    }
    Ok(Left {
        rows,
        changes,
        told: vec![told],
    })
}

/// Writes a new database, whole and synced.
fn build(file: &Path, mut meta: Meta, left: &Left, now: Timestamp) -> Result<(), StoreError> {
    let error = |source| failed("write", file, source);
    // What an earlier try left.
    let _ = fs::remove_file(file);
    create_private(file)?;
    let mut connection = connect(
        file,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE,
    )?;
    schema::create_for(&connection, &meta).map_err(error)?;
    meta.tallies = Tallies::default();
    (meta.sequence, meta.chain) = (0, 0);
    let transaction = connection.transaction().map_err(error)?;
    for (record, row) in left.rows.values() {
        upsert(&transaction, record, row).map_err(error)?;
        raise_marks(&mut meta, record);
        meta.tallies.of(table_of(record), is_live(record)).add(row);
    }
    for change in &left.changes {
        super::write::append(
            &transaction,
            &mut meta,
            change.at,
            &change.record,
            &change.row,
        )
        .map_err(error)?;
        raise_marks(&mut meta, &change.record);
    }
    inspect::raise_numbers(&mut meta);
    meta.commits += 1;
    meta::write(&transaction, &meta).map_err(error)?;
    schema::find_gaps(&transaction, meta.next_job).map_err(error)?;
    transaction
        .execute(
            "INSERT INTO restores (at, taken_at, sequence, reconciled) VALUES (?1, ?1, ?2, 0)",
            params![time(now), id(meta.sequence)],
        )
        .map_err(error)?;
    transaction.commit().map_err(error)?;
    let reader = Reader {
        transaction: connection.transaction().map_err(error)?,
        file,
        operation: "check",
    };
    reader.check()?;
    drop(reader);
    drop(connection);
    fs::File::open(file)
        .and_then(|file| file.sync_all())
        .map_err(file_failed("sync", file))
}

/// Puts the new database in the place of the old one. The log goes first: SQLite would take it for the new one's. A crash
/// between leaves the old database without its log, which the next start refuses by its mark.
fn swap(dir: &Path, accepting: &Path) -> Result<(), StoreError> {
    let file = dir.join(FILE_NAME);
    for name in [wal::FILE_NAME, "state.db-shm"] {
        let path = dir.join(name);
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(file_failed("remove", &path)(error)),
        }
    }
    sync_dir(dir).map_err(file_failed("sync", dir))?;
    fs::rename(accepting, &file).map_err(file_failed("replace", &file))?;
    sync_dir(dir).map_err(file_failed("sync", dir))
}
