//! Opening a state: everything that could be silently missing is looked for before anything is written, and a commit that
//! did not get whole is cut off.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};
use trainyard_common::ids::{ClusterId, Sequence};
use trainyard_common::time::Timestamp;

use super::meta::{self, Meta};
use super::schema::{self, APPLICATION_ID};
use super::{
    CHECKED_AT_OPEN, CLUSTER_FILE, FILE_NAME, Reader, SqliteStore, Writer, connect, corrupt,
    create_private, failed, inspect, prepare,
};
use crate::store::mark::{self, Found, Mark, Marker};
use crate::store::reserve::Reserve;
use crate::store::wal::{self, Scan, Verdict};
use crate::store::{Damage, StoreError};

/// Bytes of the database's header that say how many pages it has.
const PAGES_AT: usize = 28;

impl SqliteStore {
    /// Opens the state in `dir`, or makes it if `dir` was never a coordinator's. A state of an earlier version is migrated.
    /// The caller holds the directory's lock.
    ///
    /// `marker` is what else says that the cluster has existed, such as its authority.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Schema`], [`StoreError::Damaged`], [`StoreError::Corrupt`], or whatever the
    /// disk says. A state that is refused is left as it was found.
    pub fn open(dir: &Path, marker: &Path, now: Timestamp) -> Result<Self, StoreError> {
        let file = dir.join(FILE_NAME);
        let cluster_file = dir.join(CLUSTER_FILE);
        let existed = exists(dir, marker)?;
        let mark = mark::read(dir).map_err(file_failed("read", &dir.join(mark::FILE_NAME)))?;
        let scan = if existed {
            let scan = look_at_log(dir)?;
            check_length(&file, &scan)?;
            Some(scan)
        } else {
            None
        };
        let mut reserve = Reserve::open(dir);
        reserve.make_room();
        if !existed {
            create_private(&file)?;
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
        let connection = connect(&file, flags)?;
        keep_log_on_close(&connection, &file, true)?;
        let found = establish(&connection, &file, now)?;
        check_cluster_file(&cluster_file, &file, found.cluster)?;
        let lost = scan.and_then(|scan| behind(&scan, &mark, &found, &file));
        let found = match lost {
            None => found,
            Some(Behind::One) => {
                tracing::error!(
                    file = %file.display(),
                    "the last commit that was answered is lost: it was cut off or damaged; numbers go on above it, and \
                     nothing is placed until the nodes have said what they run"
                );
                meta::change(&connection, &file, "raise the numbers of", |meta| {
                    inspect::raise_numbers(meta);
                    meta.commits += 1;
                })
                .and_then(|meta| inspect::note_raise(&connection, &file, &meta, now))?
            }
            Some(Behind::More(damage)) => return Err(refused(file, vec![*damage])),
        };
        let store = Self {
            cluster: found.cluster,
            writer: Mutex::new(Writer {
                connection,
                reserve,
                marker: Marker::begin(dir, &found.mark()),
            }),
            readers: Mutex::default(),
            short: AtomicBool::new(false),
            file,
        };
        store.check_tail()?;
        Ok(store)
    }

    fn check_tail(&self) -> Result<(), StoreError> {
        self.read("read the transitions of", |reader| {
            let meta = meta::read(&reader.transaction, &self.file)?;
            check_end(reader, &meta)
        })
    }
}

fn check_end(reader: &Reader<'_>, meta: &Meta) -> Result<(), StoreError> {
    let from = meta.sequence.saturating_sub(CHECKED_AT_OPEN);
    reader.check_chain(meta, Sequence(from)).map(drop)
}

/// Whether there is a state; refuses if only something beside it says so.
fn exists(dir: &Path, marker: &Path) -> Result<bool, StoreError> {
    let file = dir.join(FILE_NAME);
    if fs::metadata(&file).is_ok_and(|metadata| metadata.len() > 0) {
        return Ok(true);
    }
    let (cluster, log) = (dir.join(CLUSTER_FILE), dir.join(wal::FILE_NAME));
    let has_bytes = |path: &Path| fs::metadata(path).is_ok_and(|found| found.len() > 0);
    let marker = [cluster.as_path(), marker]
        .into_iter()
        .find(|path| path.exists())
        .or_else(|| has_bytes(&log).then_some(log.as_path()));
    match marker {
        None => Ok(false),
        Some(marker) => Err(StoreError::Missing {
            marker: marker.to_owned(),
            database: file,
        }),
    }
}

/// Refuses a write-ahead log with damage before its end; cuts off a commit at its end that did not get whole.
fn look_at_log(dir: &Path) -> Result<Scan, StoreError> {
    let path = dir.join(wal::FILE_NAME);
    let mut scan = wal::scan(&path).map_err(file_failed("read", &path))?;
    match scan.verdict {
        Verdict::Clean => {}
        Verdict::Torn { offset, dropped } => {
            tracing::warn!(
                file = %path.display(),
                offset,
                dropped_bytes = dropped,
                "a commit at the end of the write-ahead log did not get whole and was cut off"
            );
            wal::cut(&path, scan.end).map_err(file_failed("cut", &path))?;
            scan.verdict = Verdict::Clean;
            scan.len = scan.end;
        }
        Verdict::Damaged {
            offset,
            commits,
            reason,
        } => {
            let database = dir.join(FILE_NAME);
            let after = match commits {
                0 => String::new(),
                1 => " (1 commit)".to_owned(),
                more => format!(" ({more} commits)"),
            };
            let damage = Damage {
                file: path,
                table: "(log)".to_owned(),
                key: format!("commit {}", scan.commits + 1),
                offset: Some(offset),
                reason: format!("{reason}{after}"),
                jobs: inspect::jobs_behind(&database, &scan),
            };
            return Err(refused(database, vec![damage]));
        }
    }
    Ok(scan)
}

/// Refuses a database that is shorter than it says it is: SQLite would find out when it needs what is missing.
fn check_length(file: &Path, scan: &Scan) -> Result<(), StoreError> {
    let read = || -> std::io::Result<(u64, [u8; 100])> {
        let mut header = [0; 100];
        let mut opened = fs::File::open(file)?;
        let len = opened.metadata()?.len();
        std::io::Read::read_exact(&mut opened, &mut header)?;
        Ok((len, header))
    };
    let (len, header) = match read() {
        Ok(found) => found,
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            return Err(corrupt(
                file,
                "(any)",
                "offset 0",
                "the file is cut off in its header",
            ));
        }
        Err(error) => return Err(file_failed("read", file)(error)),
    };
    let own_size = match u16::from_be_bytes([header[16], header[17]]) {
        1 => 65_536,
        size => u32::from(size),
    };
    let own_pages = [0, 1, 2, 3].map(|at| header[PAGES_AT + at]);
    let (page_size, pages) = scan
        .database
        .unwrap_or((own_size, u32::from_be_bytes(own_pages)));
    // The last page that is nowhere but in this file.
    let last = (1..=pages).rev().find(|page| !scan.pages.contains(page));
    let needed = u64::from(last.unwrap_or(0)) * u64::from(page_size);
    let whole = scan.database.is_some() || len == needed;
    if len >= needed && whole {
        return Ok(());
    }
    let reason = format!("the file has {len} bytes and should have {needed}");
    Err(corrupt(
        file,
        "(any)",
        format!("offset {}", len.min(needed)),
        reason,
    ))
}

/// How far a state is behind what was answered.
enum Behind {
    One,
    More(Box<Damage>),
}

fn behind(scan: &Scan, mark: &Found, found: &Meta, file: &Path) -> Option<Behind> {
    let mark = match mark {
        Found::Mark(mark) if mark.cluster == found.cluster => mark,
        Found::Mark(Mark { cluster, .. }) => {
            tracing::warn!(%cluster, "the mark of what was answered is another cluster's and says nothing");
            return None;
        }
        Found::Unreadable => {
            tracing::warn!(
                file = %file.with_file_name(mark::FILE_NAME).display(),
                "the mark of what was answered cannot be read; it is made anew"
            );
            return None;
        }
        Found::Nothing => return None,
    };
    let missing = mark.commits.saturating_sub(found.commits);
    let same = missing > 0 || mark.commits < found.commits || *mark == found.mark();
    match missing {
        0 if same => None,
        1 => Some(Behind::One),
        _ => Some(Behind::More(Box::new(Damage {
            file: scan.path.clone(),
            table: "(log)".to_owned(),
            key: format!("changes {}..{}", found.sequence + 1, mark.sequence),
            offset: Some(scan.end),
            reason: format!(
                "{missing} commits that were answered are missing: the end of the write-ahead log was cut off, or {} is \
                 an older copy without its log",
                FILE_NAME
            ),
            jobs: Vec::new(),
        }))),
    }
}

/// The refusal with what is known.
pub(super) fn refused(file: PathBuf, places: Vec<Damage>) -> StoreError {
    StoreError::Damaged {
        file,
        places,
        more: false,
    }
}

/// Whether SQLite leaves its log alone when the connection is closed: a refusal must not change what it is about.
pub(super) fn keep_log_on_close(
    connection: &Connection,
    file: &Path,
    keep: bool,
) -> Result<(), StoreError> {
    connection
        .set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, keep)
        .map(drop)
        .map_err(|source| failed("set up", file, source))
}

/// Makes the tables of a new database, or checks and migrates those of an old one.
fn establish(connection: &Connection, file: &Path, now: Timestamp) -> Result<Meta, StoreError> {
    let application: i64 = connection
        .pragma_query_value(None, "application_id", |row| row.get(0))
        .map_err(|source| failed("read", file, source))?;
    let tables: i64 = connection
        .query_row("SELECT COUNT(*) FROM sqlite_master", [], |row| row.get(0))
        .map_err(|source| failed("read", file, source))?;
    // With tables it is somebody else's, or has lost what says that it is ours.
    if application != APPLICATION_ID && tables == 0 {
        prepare(connection, file)?;
        schema::create(connection, file, now)?;
    }
    schema::identify(connection, file)?;
    prepare(connection, file)?;
    schema::migrate(connection, file)?;
    schema::check(connection, file)?;
    meta::read(connection, file)
}

fn check_cluster_file(path: &Path, database: &Path, cluster: ClusterId) -> Result<(), StoreError> {
    if !path.exists() {
        // After the database: a crash between the two makes this run again, and never a cluster without state.
        return trainyard_transport::files::write_private(path, format!("{cluster}\n").as_bytes())
            .map_err(file_failed("write", path));
    }
    let bytes = fs::read(path).map_err(file_failed("read", path))?;
    match String::from_utf8_lossy(&bytes).trim().parse::<ClusterId>() {
        Ok(expected) if expected == cluster => Ok(()),
        Ok(expected) => Err(StoreError::OtherCluster {
            database: database.to_owned(),
            found: cluster,
            expected,
        }),
        Err(invalid) => Err(file_failed("read", path)(std::io::Error::other(invalid))),
    }
}

pub(super) fn file_failed(
    operation: &'static str,
    path: &Path,
) -> impl FnOnce(std::io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::File {
        operation,
        path,
        source,
    }
}
