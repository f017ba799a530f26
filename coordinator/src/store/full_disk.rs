//! The store on a disk that is full to the last byte: a small file system in memory, which only root may mount.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::Command;

use trainyard_common::ids::Sequence;
use trainyard_common::record::Record;
use trainyard_common::state::{AttemptState, JobState};
use trainyard_common::time::Timestamp;

use super::reserve::{FILE_NAME, SIZE};
use super::{SqliteStore, StateLock, Store, StoreError};
use crate::testing::{attempt, job, row, task};

const NOW: Timestamp = Timestamp(5000);

struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=160m", "none"])
            .arg(dir.path())
            .output();
        if mounted.is_ok_and(|mounted| mounted.status.success()) {
            return Some(Self(dir));
        }
        eprintln!("skipped: a file system can only be mounted by root");
        None
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes until not one more byte has a place.
    fn fill(&self) {
        let mut file = File::options()
            .append(true)
            .create(true)
            .open(self.path().join("filler"))
            .unwrap();
        for size in [1 << 20, 4096, 1] {
            let chunk = vec![1; size];
            let full = loop {
                if let Err(error) = file.write_all(&chunk) {
                    break error;
                }
            };
            assert_eq!(full.kind(), ErrorKind::StorageFull);
        }
    }

    fn empty(&self) {
        fs::remove_file(self.path().join("filler")).unwrap();
    }

    fn reserve(&self) -> u64 {
        fs::metadata(self.path().join(FILE_NAME)).unwrap().len()
    }

    fn open(&self) -> Result<SqliteStore, StoreError> {
        SqliteStore::open(self.path(), &self.path().join("ca"), NOW)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(self.path())
            .status();
    }
}

/// What a job of some size writes at its end.
fn end_of(id: u64) -> Vec<Record> {
    let mut ended = job(id, JobState::Succeeded);
    ended.spec.env.insert("NOISE".to_owned(), "x".repeat(3000));
    vec![
        row(ended),
        Record::Task(Box::new(task(id, 0, JobState::Succeeded))),
        Record::Attempt(Box::new(attempt(
            &format!("j{id}.0.1"),
            AttemptState::Ended,
        ))),
    ]
}

#[test]
fn what_must_be_written_is_written_on_a_full_disk_and_the_reserve_comes_back() {
    let Some(disk) = SmallDisk::mount() else {
        return;
    };
    let store = disk.open().unwrap();
    let term = store.lead().unwrap();
    store.commit(term, NOW, &end_of(1)).unwrap();
    assert_eq!(disk.reserve(), SIZE);
    // Whoever fills the disk takes what is given back, too; each time another piece is given.
    for round in 0..3 {
        disk.fill();
        for id in 2..200 {
            store.commit(term, NOW, &end_of(round * 200 + id)).unwrap();
        }
        assert!(0 < disk.reserve() && disk.reserve() < SIZE);
    }
    let log = fs::metadata(disk.path().join("state.db-wal")).unwrap();
    assert!(
        log.len() < 8 << 20,
        "{} bytes of write-ahead log",
        log.len()
    );
    assert_eq!(store.check().unwrap().sequence, Sequence(3 + 3 * 198 * 3));
    drop(store);

    // A start finds room, too, and everything that was answered.
    disk.fill();
    let _lock = StateLock::acquire(disk.path(), NOW).unwrap();
    let store = disk.open().unwrap();
    let term = store.lead().unwrap();
    let last = store.commit(term, NOW, &end_of(999)).unwrap();
    assert_eq!(last, Sequence(3 + 3 * 198 * 3 + 3));

    disk.empty();
    disk.open().unwrap();
    assert_eq!(disk.reserve(), SIZE);
    store.check().unwrap();
}

#[test]
fn a_reserve_that_is_used_up_ends_in_an_error_and_leaves_the_state_whole() {
    let Some(disk) = SmallDisk::mount() else {
        return;
    };
    let store = disk.open().unwrap();
    let term = store.lead().unwrap();
    store.commit(term, NOW, &end_of(1)).unwrap();
    let mut answered = Sequence(3);
    let failed = (2..).find_map(|id| {
        disk.fill();
        match store.commit(term, NOW, &end_of(id)) {
            Ok(last) => {
                answered = last;
                None
            }
            Err(error) => Some(error),
        }
    });
    let Some(StoreError::Database { source, .. }) = failed else {
        panic!("expected an error, got {failed:?}");
    };
    assert_eq!(
        source.sqlite_error_code(),
        Some(rusqlite::ErrorCode::DiskFull)
    );
    assert_eq!(disk.reserve(), 0);
    disk.empty();
    drop(store);
    let store = disk.open().unwrap();
    assert_eq!(store.check().unwrap().sequence, answered);
}
