//! The output of ranks as it arrives: one file of whole records per rank, `<job>/<task>.<attempt>.<rank>.log`, and beside
//! it a `.end` file once nothing more will come.
//!
//! It knows no job's state and no caller. All methods block. Chunks are not synced one by one: what a power loss takes
//! is told to the agent by the lower offset, and it sends it again; only the end of a rank is synced before it is
//! acknowledged, as the agent's own copy may go after that.

mod read;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{AttemptNumber, AttemptRef, JobId, TaskIndex};
use trainyard_common::limits::{MAX_LOG_BYTES_PER_RANK, MAX_LOG_RECORD};
use trainyard_common::logrecord::{self, HEADER_BYTES};
use trainyard_common::units::format_bytes;

use crate::disk::{DiskGuard, RESERVE_FOR_DATA};

pub(crate) use read::{Entry, LogReader, Start};

/// What a rank's file may have beyond the limit that the shim keeps to: the marker that says what was dropped.
const SLACK: u64 = MAX_LOG_RECORD as u64 + HEADER_BYTES as u64;
/// Locks that ranks share, so that appends to one file never overlap and appends to others seldom wait.
const SHARDS: usize = 64;
/// Files of a shard whose length is remembered; the others are looked through again (about a second per GiB).
const KNOWN_PER_SHARD: usize = 1024;

/// Which output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LogKey {
    pub(crate) attempt: AttemptRef,
    pub(crate) rank: u32,
}

/// What an append came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Appended {
    /// Everything below this offset is stored.
    pub(crate) stored: u64,
    /// The rank's end is on record.
    pub(crate) end: bool,
}

/// Why output was not taken or cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogError {
    #[error("the output is not a sequence of whole records: {0}")]
    Records(&'static str),
    #[error(
        "the output of a rank is limited to {}; what follows must be dropped with a marker",
        format_bytes(MAX_LOG_BYTES_PER_RANK)
    )]
    TooLong,
    #[error("{0}")]
    Disk(Refusal),
    #[error("cannot {operation} {}", path.display())]
    File {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl From<LogError> for Refusal {
    fn from(error: LogError) -> Self {
        match error {
            LogError::Records(_) => {
                Self::new(ErrorCode::Invalid, "NOT_RECORDS", error.to_string()).at("data")
            }
            LogError::TooLong => Self::new(ErrorCode::Exhausted, "LOG_LIMIT", error.to_string()),
            LogError::Disk(refusal) => refusal,
            LogError::File {
                operation,
                path,
                source,
            } => {
                tracing::error!(path = %path.display(), error = %source, operation, "log file failed");
                let message = format!("the coordinator cannot {operation} a log file: {source}");
                Self::new(ErrorCode::Unavailable, "LOG_STORE", message)
            }
        }
    }
}

/// The output of all ranks.
#[derive(Debug)]
pub(crate) struct LogStore {
    root: PathBuf,
    disk: DiskGuard,
    shards: [Mutex<Shard>; SHARDS],
    /// Jobs that somebody follows; the value counts what came.
    followed: Mutex<HashMap<JobId, watch::Sender<u64>>>,
}

/// Lengths of files that are known to hold whole records up to there.
type Shard = HashMap<LogKey, u64>;

impl LogStore {
    pub(crate) fn open(root: PathBuf) -> Result<Self, LogError> {
        trainyard_transport::files::create_private_dir(&root).map_err(|source| LogError::File {
            operation: "make",
            path: root.clone(),
            source,
        })?;
        Ok(Self {
            disk: DiskGuard::new(&root),
            root,
            shards: std::array::from_fn(|_| Mutex::default()),
            followed: Mutex::default(),
        })
    }

    /// Takes `data`, whole records that begin at `offset` of the rank's file. What is stored already is skipped; after a
    /// gap nothing is stored and the answer says from where to send again.
    pub(crate) fn append(
        &self,
        key: LogKey,
        offset: u64,
        data: &[u8],
        end: bool,
    ) -> Result<Appended, LogError> {
        check_whole(data)?;
        let mut shard = self.shard(key);
        let path = self.path(key);
        if end_path(&path).exists() {
            let stored = file_length(&path)?;
            return Ok(Appended { stored, end: true });
        }
        let mut stored = match shard.get(&key) {
            Some(stored) => *stored,
            None => repair(&path)?,
        };
        let Some(skip) = stored.checked_sub(offset) else {
            return Ok(Appended { stored, end: false });
        };
        let new = usize::try_from(skip)
            .ok()
            .and_then(|skip| data.get(skip..))
            .unwrap_or_default();
        // Offsets that do not fall on a record's start would make everything after them unreadable.
        check_whole(new)?;
        if !new.is_empty() {
            if stored + new.len() as u64 > MAX_LOG_BYTES_PER_RANK + SLACK {
                return Err(LogError::TooLong);
            }
            self.disk
                .check(RESERVE_FOR_DATA, new.len() as u64)
                .map_err(LogError::Disk)?;
            // Not known while it is being written: a failure half way is repaired at the next append.
            shard.remove(&key);
            write(&path, stored, new)?;
            stored += new.len() as u64;
        }
        let end = end && stored == offset.saturating_add(data.len() as u64);
        if end {
            finish(&path)?;
            shard.remove(&key);
        } else {
            remember(&mut shard, key, stored);
        }
        drop(shard);
        self.notify(key.attempt.job);
        Ok(Appended { stored, end })
    }

    /// The outputs of a job that there are, in task, attempt and rank order.
    pub(crate) fn list(&self, job: JobId) -> Result<Vec<LogKey>, LogError> {
        let dir = self.root.join(job.to_string());
        let failed = |source| LogError::File {
            operation: "list",
            path: dir.clone(),
            source,
        };
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut keys = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed)?.file_name();
            keys.extend(name.to_str().and_then(|name| parse_name(job, name)));
        }
        keys.sort_unstable();
        Ok(keys)
    }

    /// A reader of one rank's output.
    pub(crate) fn reader(&self, key: LogKey) -> LogReader {
        LogReader::new(self.path(key))
    }

    /// Changes whenever output of the job arrives.
    pub(crate) fn follow(&self, job: JobId) -> watch::Receiver<u64> {
        let mut followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        // Bounded by the followers that there are, whose number is.
        followed.retain(|_, sender| sender.receiver_count() > 0);
        followed
            .entry(job)
            .or_insert_with(|| watch::Sender::new(0))
            .subscribe()
    }

    fn notify(&self, job: JobId) {
        let followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = followed.get(&job) {
            sender.send_modify(|count| *count += 1);
        }
    }

    fn shard(&self, key: LogKey) -> MutexGuard<'_, Shard> {
        let mixed = key.attempt.job.0 ^ u64::from(key.attempt.task.0) ^ u64::from(key.rank);
        let shard = &self.shards[(mixed % SHARDS as u64) as usize];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, key: LogKey) -> PathBuf {
        let AttemptRef { job, task, attempt } = key.attempt;
        self.root
            .join(job.to_string())
            .join(format!("{task}.{attempt}.{}.log", key.rank))
    }
}

fn remember(shard: &mut Shard, key: LogKey, stored: u64) {
    if shard.len() >= KNOWN_PER_SHARD && !shard.contains_key(&key) {
        shard.clear();
    }
    shard.insert(key, stored);
}

fn parse_name(job: JobId, name: &str) -> Option<LogKey> {
    let mut parts = name.strip_suffix(".log")?.split('.').map(str::parse);
    let (Some(Ok(task)), Some(Ok(attempt)), Some(Ok(rank)), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    let attempt = AttemptRef {
        job,
        task: TaskIndex(task),
        attempt: AttemptNumber(attempt),
    };
    Some(LogKey { attempt, rank })
}

fn end_path(path: &Path) -> PathBuf {
    path.with_extension("end")
}

fn check_whole(data: &[u8]) -> Result<(), LogError> {
    match logrecord::whole_records(data) {
        Ok(whole) if whole == data.len() => Ok(()),
        Ok(_) => Err(LogError::Records("the last record is cut off")),
        Err(_) => Err(LogError::Records("there are bytes that are no record")),
    }
}

fn file_length(path: &Path) -> Result<u64, LogError> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(metadata.len()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(source) => Err(LogError::File {
            operation: "look at",
            path: path.to_owned(),
            source,
        }),
    }
}

/// Cuts off what a crash left of a record at the end; says the length after that.
fn repair(path: &Path) -> Result<u64, LogError> {
    let length = file_length(path)?;
    if length == 0 {
        return Ok(0);
    }
    let whole = read::whole_length(path)?;
    if whole < length {
        tracing::warn!(path = %path.display(), offset = whole, dropped = length - whole, "torn end of a log cut off");
        OpenOptions::new()
            .write(true)
            .open(path)
            .and_then(|file| file.set_len(whole))
            .map_err(|source| LogError::File {
                operation: "cut",
                path: path.to_owned(),
                source,
            })?;
    }
    Ok(whole)
}

fn write(path: &Path, at: u64, data: &[u8]) -> Result<(), LogError> {
    let failed = |source| LogError::File {
        operation: "write",
        path: path.to_owned(),
        source,
    };
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o600);
    let mut file = match options.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).map_err(failed)?;
            }
            options.open(path).map_err(failed)?
        }
        Err(error) => return Err(failed(error)),
    };
    file.write_all(data).map_err(|source| {
        // If this fails too, the next append finds the torn end.
        let _ = file.set_len(at);
        failed(source)
    })
}

fn finish(path: &Path) -> Result<(), LogError> {
    let failed = |source| LogError::File {
        operation: "sync",
        path: path.to_owned(),
        source,
    };
    let end = end_path(path);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    match File::open(path) {
        Ok(file) => file.sync_data().map_err(failed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    trainyard_transport::files::write_private(&end, b"").map_err(failed)
}
