//! States as earlier versions wrote them, kept in `golden/`: this version must read each of them. One is added whenever
//! what is written changes (`cargo test -p trainyard-coordinator write_golden -- --ignored`), none is ever changed.

use std::fs;
use std::path::{Path, PathBuf};

use trainyard_common::ids::{JobId, NodeId, Sequence, TokenId};
use trainyard_common::state::{AttemptState, JobState};
use trainyard_common::time::Timestamp;

use super::tests::{NOW, everything};
use super::{CheckReport, FILE_NAME, SqliteStore, Store, inspect, wal};
use crate::testing::{attempt, bundle, job, node, task};

/// By their schema version, and within the first by what they lack of its last tables.
const STATES: [&str; 4] = ["v1-first.db", "v1-bundles.db", "v1-restores.db", "v2.db"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("src/store/golden")
        .join(name)
}

#[test]
fn states_of_earlier_versions_are_read_and_written_on() {
    for name in STATES {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(golden(name), dir.path().join(FILE_NAME)).unwrap();
        let outside = inspect::inspect(&dir.path().join(FILE_NAME)).unwrap();
        assert!(outside.damage.is_empty(), "{name}: {:?}", outside.damage);
        let store = SqliteStore::open(dir.path(), &dir.path().join("ca"), NOW).unwrap();
        let bundled = name != "v1-first.db";
        let (rows, transitions) = if bundled { (12, 15) } else { (11, 11) };
        let sequence = Sequence(transitions);
        let expected = CheckReport {
            rows,
            transitions,
            sequence,
        };
        assert_eq!(store.check().unwrap(), expected, "{name}");
        assert_eq!(outside.rows, rows, "{name}");
        let snapshot = store.load(NOW, Timestamp(0)).unwrap().snapshot;
        let jobs = [job(1, JobState::Running), job(2, JobState::Pending)];
        assert_eq!(snapshot.jobs, jobs, "{name}");
        assert_eq!(snapshot.tasks, [task(1, 0, JobState::Running)], "{name}");
        let runs = attempt("j1.0.2", AttemptState::Running);
        assert_eq!(snapshot.attempts, [runs], "{name}");
        assert_eq!(snapshot.nodes, [node(1), node(4)], "{name}");
        let bundles = bundled.then(|| bundle("j1.b1", 2, 4, 8));
        assert_eq!(snapshot.bundles, Vec::from_iter(bundles), "{name}");
        let next = (snapshot.next_job, snapshot.next_node, snapshot.next_token);
        assert_eq!(next, (JobId(3), NodeId(5), TokenId(4)), "{name}");
        let term = store.lead().unwrap();
        store.commit(term, NOW, &everything()).unwrap();
        store.check().unwrap();
    }
}

/// The migration's own transaction is all that it writes, so a crash leaves some first part of its log.
#[test]
fn a_migration_that_was_interrupted_anywhere_is_begun_again() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(FILE_NAME);
    fs::copy(golden("v1-restores.db"), &file).unwrap();
    rusqlite::Connection::open(&file)
        .unwrap()
        .pragma_update(None, "journal_mode", "WAL")
        .unwrap();
    let before = fs::read(&file).unwrap();
    let store = SqliteStore::open(dir.path(), &dir.path().join("ca"), NOW).unwrap();
    let whole = store.load(NOW, Timestamp(0)).unwrap().snapshot;
    let log = fs::read(dir.path().join(wal::FILE_NAME)).unwrap();
    drop(store);
    assert_eq!(fs::read(&file).unwrap(), before, "all of it is in the log");
    for len in (0..=log.len()).step_by(128) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE_NAME), &before).unwrap();
        fs::write(dir.path().join(wal::FILE_NAME), &log[..len]).unwrap();
        let store = SqliteStore::open(dir.path(), &dir.path().join("ca"), NOW).unwrap();
        let found = store.load(NOW, Timestamp(0)).unwrap().snapshot;
        assert_eq!(found, whole, "cut to {len}");
    }
}

/// Writes those that are not there yet, as this version would.
#[test]
#[ignore = "makes golden states; run it by name when what is written changes"]
fn write_golden() {
    for name in STATES {
        if golden(name).exists() {
            continue;
        }
        assert!(
            name.starts_with("v2"),
            "{name} can only be made by its own version"
        );
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(dir.path(), &dir.path().join("ca"), NOW).unwrap();
        let term = store.lead().unwrap();
        store.commit(term, NOW, &everything()).unwrap();
        drop(store);
        let connection = rusqlite::Connection::open(dir.path().join(FILE_NAME)).unwrap();
        // Small pages, so that the file is small.
        let sql = "PRAGMA journal_mode = DELETE; PRAGMA page_size = 512;";
        connection.execute_batch(sql).unwrap();
        connection
            .execute("VACUUM INTO ?1", [golden(name).to_str().unwrap()])
            .unwrap();
    }
}
