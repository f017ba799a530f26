//! A state directory from outside: checked, copied while a coordinator runs on it, and made anew from such a copy.
//!
//! A backup is a directory: `state.db`, `cluster-id`, `ca/`, and `backup.json`, which says what is in it. Blobs, output of
//! ranks and the local admin's credentials are not in it; the credentials are made anew. Everything here blocks.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use trainyard_common::ids::{ClusterId, Sequence, Term};
use trainyard_common::time::Timestamp;
use trainyard_transport::clock::Clock;
use trainyard_transport::files::{create_private_dir, sync_dir, write_private};

use crate::authority::{self, AuthorityError, Certificates};
use crate::store::{
    BACKUPS, CLUSTER_FILE, FILE_NAME, Inspection, LOCK_FILE, SCHEMA_VERSION, SqliteStore,
    StateLock, Store, StoreError, inspect, migration_backup,
};

/// What is in a backup.
const MANIFEST: &str = "backup.json";
/// The form of a backup that this version writes and reads.
const FORMAT: u32 = 1;
/// Backups from before migrations that are kept, the newest ones: an upgrade may be given up some time later.
const KEPT_BACKUPS: usize = 3;
/// Bytes of a manifest that are read; a real one has a few hundred.
const MAX_MANIFEST: u64 = 64 << 10;
/// The files of the authority.
const AUTHORITY: [&str; 2] = ["ca/ca.key.pem", "ca/ca.pem"];

/// What a backup is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backup {
    /// Its form.
    format: u32,
    /// The cluster.
    pub cluster: ClusterId,
    /// When it was taken.
    pub taken_at: Timestamp,
    /// The version of yard that took it.
    pub version: String,
    /// The term then.
    pub term: Term,
    /// The last transition in it.
    pub sequence: Sequence,
    /// Rows.
    pub rows: u64,
    /// Transitions.
    pub transitions: u64,
    /// The version of its tables; 1 in backups that do not say it.
    #[serde(default = "first_schema")]
    pub schema: i64,
    /// Digests (BLAKE3, hexadecimal) of its files by their names.
    files: BTreeMap<String, String>,
}

fn first_schema() -> i64 {
    1
}

/// Why there is no backup, or nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The state cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The authority cannot be used.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// What would be copied is damaged.
    #[error(
        "{} is damaged in {} at least; `yard coordinator check --state-dir {}` tells where",
        file.display(),
        if *places == 1 { "1 place".to_owned() } else { format!("{places} places") },
        file.parent().unwrap_or(file).display()
    )]
    Damaged {
        /// The database.
        file: PathBuf,
        /// In how many places.
        places: usize,
    },
    /// A file is not what the backup says.
    #[error("{} is not the file that was backed up: it was changed or cut off; use another backup", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// It is no backup that this version reads.
    #[error("{} is no backup that this version of yard reads: {problem}", path.display())]
    NoBackup {
        /// Where it was looked for.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// There is something where a backup or a state is to be made.
    #[error("{} is not empty; nothing of it was touched; name a new directory", path.display())]
    NotEmpty {
        /// The directory.
        path: PathBuf,
    },
    /// A file failed.
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
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BackupError {
    let path = path.to_owned();
    move |source| BackupError::File {
        operation,
        path,
        source,
    }
}

/// Reads the whole state in `data_dir`, every checksum and the chain of its log, and the authority. A coordinator may run
/// on it meanwhile.
///
/// # Errors
/// If there is no state that can be read at all. Damage is no error but part of the answer.
pub fn check(data_dir: &Path) -> Result<Inspection, BackupError> {
    let file = existing(data_dir)?;
    let found = inspect::inspect(&file)?;
    Certificates::open(data_dir, found.cluster, false, Clock::start().now())?;
    Ok(found)
}

fn existing(data_dir: &Path) -> Result<PathBuf, StoreError> {
    let database = data_dir.join(FILE_NAME);
    if database.exists() {
        return Ok(database);
    }
    let marker = data_dir.join(CLUSTER_FILE);
    if marker.exists() {
        return Err(StoreError::Missing { database, marker });
    }
    Err(StoreError::File {
        operation: "find the state",
        path: database,
        source: io::ErrorKind::NotFound.into(),
    })
}

/// Copies the state in `data_dir` as of one moment, checks the copy, and puts it at `to`, or into `to` under a name with
/// cluster and time if that is a directory. Gives where it is and what it is.
///
/// # Errors
/// [`BackupError`]; there is nothing new at `to` then.
pub fn backup(data_dir: &Path, to: &Path) -> Result<(PathBuf, Backup), BackupError> {
    let file = existing(data_dir)?;
    let now = Clock::start().now();
    let place = if to.is_dir() {
        let cluster = fs::read_to_string(data_dir.join(CLUSTER_FILE)).unwrap_or_default();
        let cluster: String = cluster.chars().take(8).collect();
        to.join(format!("trainyard-{cluster}-{}", now.0))
    } else {
        to.to_owned()
    };
    if place.exists() {
        return Err(BackupError::NotEmpty { path: place });
    }
    let parent = match place.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let partial = tempfile_beside(parent, &place)?;
    let made = fill(data_dir, &file, &partial, now).and_then(|made| {
        fs::rename(&partial, &place).map_err(failed("make", &place))?;
        sync_dir(parent).map_err(failed("sync", parent))?;
        Ok(made)
    });
    if made.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_dir_all(&partial);
    }
    Ok((place, made?))
}

/// Backs up a state of an earlier version before it is migrated, into the state directory under a name that says what it is,
/// and removes all but the newest such backups. Nothing is done for any other state.
pub(crate) fn before_migration(data_dir: &Path, now: Timestamp) -> Result<(), BackupError> {
    let file = data_dir.join(FILE_NAME);
    if !fs::metadata(&file).is_ok_and(|found| found.len() > 0) {
        return Ok(());
    }
    // Whatever is wrong with it is told by the start itself, which looks before it opens the database.
    if inspect::has_damaged_log(&file) {
        return Ok(());
    }
    let Ok(found @ ..SCHEMA_VERSION) = inspect::version(&file) else {
        return Ok(());
    };
    let backups = data_dir.join(BACKUPS);
    create_private_dir(&backups).map_err(failed("make", &backups))?;
    let (place, made) = backup(data_dir, &backups.join(format!("schema-{found}-{}", now.0)))?;
    tracing::info!(
        backup = %place.display(),
        schema = found,
        sequence = made.sequence.0,
        "the state was backed up before its migration"
    );
    let mut kept: Vec<_> = fs::read_dir(&backups)
        .map_err(failed("read", &backups))?
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            Some((migration_backup(&path)?.1, path))
        })
        .collect();
    kept.sort();
    for (_, old) in kept.iter().rev().skip(KEPT_BACKUPS) {
        fs::remove_dir_all(old).map_err(failed("remove", old))?;
    }
    Ok(())
}

fn tempfile_beside(parent: &Path, place: &Path) -> Result<PathBuf, BackupError> {
    let name = place.file_name().unwrap_or_default().to_string_lossy();
    let partial = parent.join(format!(".{name}.{}.partial", std::process::id()));
    if !parent.is_dir() {
        return Err(failed("find", parent)(io::ErrorKind::NotFound.into()));
    }
    create_private_dir(&partial).map_err(failed("make", &partial))?;
    Ok(partial)
}

fn fill(
    data_dir: &Path,
    file: &Path,
    partial: &Path,
    now: Timestamp,
) -> Result<Backup, BackupError> {
    let copy = partial.join(FILE_NAME);
    inspect::copy(file, &copy)?;
    let found = undamaged(&copy, file)?;
    // Read as what it is to be used as, so that no backup is without a key.
    Certificates::open(data_dir, found.cluster, false, now)?;
    create_private_dir(&authority::directory(partial))
        .map_err(failed("make", &authority::directory(partial)))?;
    for name in AUTHORITY {
        copy_private(&data_dir.join(name), &partial.join(name))?;
    }
    let marker = partial.join(CLUSTER_FILE);
    write_private(&marker, format!("{}\n", found.cluster).as_bytes())
        .map_err(failed("write", &marker))?;
    let names = AUTHORITY.into_iter().chain([CLUSTER_FILE, FILE_NAME]);
    let digests = names.map(|name| Ok((name.to_owned(), digest(&partial.join(name))?)));
    let manifest = Backup {
        format: FORMAT,
        cluster: found.cluster,
        taken_at: now,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        term: found.term,
        sequence: found.sequence,
        rows: found.rows,
        transitions: found.transitions,
        schema: found.schema,
        files: digests.collect::<Result<_, BackupError>>()?,
    };
    let path = partial.join(MANIFEST);
    let json = serde_json::to_vec_pretty(&manifest)
        .map_err(|error| failed("write", &path)(io::Error::other(error)))?;
    write_private(&path, &json).map_err(failed("write", &path))?;
    Ok(manifest)
}

fn undamaged(copy: &Path, original: &Path) -> Result<Inspection, BackupError> {
    let found = inspect::inspect(copy)?;
    match found.damage.len() {
        0 => Ok(found),
        places => Err(BackupError::Damaged {
            file: original.to_owned(),
            places,
        }),
    }
}

fn copy_private(from: &Path, to: &Path) -> Result<(), BackupError> {
    let bytes = fs::read(from).map_err(failed("read", from))?;
    write_private(to, &bytes).map_err(failed("write", to))
}

fn digest(path: &Path) -> Result<String, BackupError> {
    let mut hasher = blake3::Hasher::new();
    let mut file = fs::File::open(path).map_err(failed("open", path))?;
    io::copy(&mut file, &mut hasher).map_err(failed("read", path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Reads what a backup says of itself and compares every file with it.
fn verified(from: &Path) -> Result<Backup, BackupError> {
    let no_backup = |problem: String| BackupError::NoBackup {
        path: from.to_owned(),
        problem,
    };
    let path = from.join(MANIFEST);
    let size = fs::metadata(&path).map(|found| found.len());
    match size {
        Ok(size) if size <= MAX_MANIFEST => {}
        Ok(_) => return Err(no_backup(format!("its {MANIFEST} is too large"))),
        Err(error) => return Err(no_backup(format!("no {MANIFEST} in it ({error})"))),
    }
    let json = fs::read(&path).map_err(failed("read", &path))?;
    let manifest: Backup =
        serde_json::from_slice(&json).map_err(|error| no_backup(format!("{MANIFEST}: {error}")))?;
    if manifest.format != FORMAT {
        let problem = format!(
            "it has form {}, which yard {} wrote; this version reads form {FORMAT}",
            manifest.format, manifest.version
        );
        return Err(no_backup(problem));
    }
    for name in AUTHORITY.into_iter().chain([CLUSTER_FILE, FILE_NAME]) {
        let path = from.join(name);
        let expected = manifest.files.get(name);
        if expected != Some(&digest(&path)?) {
            return Err(BackupError::Changed { path });
        }
    }
    Ok(manifest)
}

/// Makes a state directory from a backup. Ids and the term go on far above those of the backup, so that nothing that was
/// given since is given twice, and the next coordinator places nothing until the nodes have told what they run.
///
/// # Errors
/// [`BackupError`]; nothing is changed unless the backup is whole and `data_dir` is empty and nobody's. If it fails later,
/// what is in `data_dir` is not taken for a state.
pub fn restore(from: &Path, data_dir: &Path) -> Result<Backup, BackupError> {
    let now = Clock::start().now();
    let backup = verified(from)?;
    undamaged(&from.join(FILE_NAME), &from.join(FILE_NAME))?;
    Certificates::open(from, backup.cluster, false, now)?;
    create_private_dir_if_empty(data_dir)?;
    let _lock = StateLock::acquire(data_dir, now)?;
    if !is_empty(data_dir)? {
        let path = data_dir.to_owned();
        return Err(BackupError::NotEmpty { path });
    }
    // First what says that there is a cluster: until the database has its name, a start is refused.
    copy_private(&from.join(CLUSTER_FILE), &data_dir.join(CLUSTER_FILE))?;
    let ca = authority::directory(data_dir);
    create_private_dir(&ca).map_err(failed("make", &ca))?;
    for name in AUTHORITY {
        copy_private(&from.join(name), &data_dir.join(name))?;
    }
    let (restoring, database) = (
        data_dir.join(format!("{FILE_NAME}.restoring")),
        data_dir.join(FILE_NAME),
    );
    copy_private(&from.join(FILE_NAME), &restoring)?;
    inspect::raise(&restoring, backup.taken_at, now)?;
    fs::rename(&restoring, &database).map_err(failed("make", &database))?;
    sync_dir(data_dir).map_err(failed("sync", data_dir))?;
    let store = SqliteStore::open(data_dir, &ca, now)?;
    store.check()?;
    Ok(backup)
}

/// Makes the directory, or leaves it alone if it is a state's: a held one is told as that by its lock.
fn create_private_dir_if_empty(dir: &Path) -> Result<(), BackupError> {
    if dir.exists() && !is_empty(dir)? && !dir.join(LOCK_FILE).exists() {
        let path = dir.to_owned();
        return Err(BackupError::NotEmpty { path });
    }
    create_private_dir(dir).map_err(failed("make", dir))
}

fn is_empty(dir: &Path) -> Result<bool, BackupError> {
    for entry in fs::read_dir(dir).map_err(failed("read", dir))? {
        if entry.map_err(failed("read", dir))?.file_name() != LOCK_FILE {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests;
