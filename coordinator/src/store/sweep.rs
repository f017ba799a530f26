//! Every flipped bit and every cut of a small state: a start finds what was written, or what was before the last commit if
//! that is what was damaged, or refuses and names a file. Without reading everything: a large state starts in the same way.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rusqlite::Connection;
use trainyard_common::ids::{ClusterId, NodeId};
use trainyard_common::record::{Record, Role};
use trainyard_common::state::{AttemptState, JobState};
use trainyard_common::time::Timestamp;
use trainyard_coordinator_core::Snapshot;
use trainyard_transport::clock::Clock;

use super::tests::{NOW, everything};
use super::{CLUSTER_FILE, FILE_NAME, SqliteStore, Store, StoreError, mark, reserve, wal};
use crate::authority::Certificates;
use crate::testing::{attempt, job, node, row, task, user};

/// What a start reads, but for the authority.
const FILES: [&str; 5] = [
    FILE_NAME,
    wal::FILE_NAME,
    mark::FILE_NAME,
    CLUSTER_FILE,
    reserve::FILE_NAME,
];
/// Bytes of the reserve that are tried: nothing is read from it but how much there is.
const RESERVE_TRIED: usize = 64;

/// A directory in memory if there is one: a sweep syncs some hundred thousand times.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        tempfile::tempdir_in(memory).unwrap()
    } else {
        tempfile::tempdir().unwrap()
    }
}

/// A state as a crash leaves it: checkpointed rows and four commits in the log.
struct Golden {
    files: BTreeMap<&'static str, Vec<u8>>,
    now: Snapshot,
    before: Snapshot,
}

impl Golden {
    fn new() -> Self {
        let dir = scratch();
        // Small pages, so that there is much structure in few bytes.
        Connection::open(dir.path().join(FILE_NAME))
            .unwrap()
            .execute_batch("PRAGMA page_size = 512; PRAGMA journal_mode = WAL; VACUUM;")
            .unwrap();
        let store = open(dir.path()).unwrap();
        let term = store.lead().unwrap();
        store.commit(term, NOW, &everything()).unwrap();
        Connection::open(dir.path().join(FILE_NAME))
            .unwrap()
            .query_row("PRAGMA wal_checkpoint(RESTART)", [], |_| Ok(()))
            .unwrap();
        let batches = [
            vec![
                row(job(3, JobState::Pending)),
                Record::Node(Box::new(node(5))),
            ],
            vec![
                row(job(1, JobState::Succeeded)),
                Record::Task(Box::new(task(1, 0, JobState::Succeeded))),
                Record::Attempt(Box::new(attempt("j1.0.2", AttemptState::Ended))),
            ],
            vec![
                Record::NodeRemoved(NodeId(4)),
                row(job(2, JobState::Running)),
            ],
            vec![
                row(job(4, JobState::Pending)),
                Record::Attempt(Box::new(attempt("j2.0.1", AttemptState::Preparing))),
                Record::User(Box::new(user("otto", Role::User))),
            ],
        ];
        let mut snapshots = Vec::new();
        for batch in &batches {
            store.commit(term, NOW, batch).unwrap();
            snapshots.push(load(&store).unwrap());
        }
        let read = |name| (name, fs::read(dir.path().join(name)).unwrap());
        let files = FILES.map(read).into_iter().collect();
        let now = snapshots.pop().unwrap();
        let before = snapshots.pop().unwrap();
        Self { files, now, before }
    }

    fn write(&self, dir: &Path) {
        for (name, bytes) in &self.files {
            fs::write(dir.join(name), bytes).unwrap();
        }
    }

    /// Starts on the files with one of them changed, and judges what comes of it.
    fn judge(&self, dir: &Path, name: &str, bytes: &[u8], what: &str) -> Outcome {
        for (known, whole) in &self.files {
            // The reserve is 32 MiB, and nothing changes it.
            if *known != reserve::FILE_NAME || *known == name {
                fs::write(dir.join(known), if *known == name { bytes } else { whole }).unwrap();
            }
        }
        let _ = fs::remove_file(dir.join("state.db-shm"));
        let started = open(dir).and_then(|store| load(&store));
        match started {
            Ok(found) if found == self.now => Outcome::Same,
            Ok(found) => {
                assert_eq!(name, wal::FILE_NAME, "{what} lost a commit");
                assert!(is_like(&found, &self.before), "{what}: {found:?}");
                Outcome::Before
            }
            Err(error) => {
                let told = super::explain(dir, error).to_string();
                assert!(told.contains(dir.to_str().unwrap()), "{what}: {told}");
                if name == FILE_NAME {
                    let left = fs::read(dir.join(name)).unwrap();
                    assert!(left == bytes, "{what}: a refused state was changed");
                }
                Outcome::Refused
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Same,
    Before,
    Refused,
}

/// The same rows; numbers may have been raised.
fn is_like(found: &Snapshot, expected: &Snapshot) -> bool {
    let numbers = Snapshot {
        awaited: expected.awaited.clone(),
        next_job: expected.next_job,
        next_node: expected.next_node,
        next_token: expected.next_token,
        ..found.clone()
    };
    numbers == *expected && found.next_job >= expected.next_job
}

fn open(dir: &Path) -> Result<SqliteStore, StoreError> {
    SqliteStore::open(dir, &dir.join("ca"), NOW)
}

fn load(store: &SqliteStore) -> Result<Snapshot, StoreError> {
    Ok(store.load(NOW, Timestamp(1002))?.snapshot)
}

/// Runs `each` over all of `cases`, in as many threads as there are cores; says how often there was which outcome.
fn sweep<T: Sync>(
    golden: &Golden,
    cases: &[T],
    each: impl Fn(&Path, &T) -> Outcome + Sync,
) -> BTreeMap<Outcome, usize> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let outcomes = std::thread::scope(|scope| {
        let parts = cases.chunks(cases.len().div_ceil(threads).max(1));
        let running: Vec<_> = parts
            .map(|part| {
                let each = &each;
                scope.spawn(move || {
                    let dir = scratch();
                    golden.write(dir.path());
                    part.iter().map(|case| each(dir.path(), case)).collect()
                })
            })
            .collect();
        running
            .into_iter()
            .flat_map(|thread| -> Vec<Outcome> { thread.join().unwrap() })
            .collect::<Vec<_>>()
    });
    let mut counts = BTreeMap::new();
    for outcome in outcomes {
        *counts.entry(outcome).or_default() += 1;
    }
    counts
}

fn flips(golden: &Golden, name: &'static str, bits: impl Fn(usize) -> Vec<usize>) {
    let whole = &golden.files[name];
    let len = if name == reserve::FILE_NAME {
        RESERVE_TRIED
    } else {
        whole.len()
    };
    let cases: Vec<(usize, usize)> = (0..len)
        .flat_map(|at| bits(at).into_iter().map(move |bit| (at, bit)))
        .collect();
    let counts = sweep(golden, &cases, |dir, (at, bit)| {
        let mut bytes = whole.clone();
        bytes[*at] ^= 1 << bit;
        golden.judge(
            dir,
            name,
            &bytes,
            &format!("bit {bit} of byte {at} of {name}"),
        )
    });
    println!("{name}: {} bits flipped: {counts:?}", cases.len());
    let refused = counts.get(&Outcome::Refused).copied().unwrap_or_default();
    let needed = [FILE_NAME, wal::FILE_NAME, CLUSTER_FILE].contains(&name);
    assert_eq!(refused > 0, needed, "{name}");
    let before = counts.contains_key(&Outcome::Before);
    assert_eq!(before, name == wal::FILE_NAME, "{name}");
}

/// One bit of each byte: the first of the first, the second of the second …
#[test]
fn a_flipped_bit_of_any_byte_is_never_taken_for_what_was_written() {
    let golden = Golden::new();
    for name in FILES {
        flips(&golden, name, |at| vec![at % 8]);
    }
}

#[test]
#[ignore = "takes minutes; `.ci/long` runs it"]
fn every_flipped_bit_is_never_taken_for_what_was_written() {
    let golden = Golden::new();
    for name in FILES {
        flips(&golden, name, |_| (0..8).collect());
    }
}

fn cuts(step: usize) {
    let golden = Golden::new();
    for name in FILES {
        let whole = &golden.files[name];
        let lengths: Vec<usize> = match name {
            reserve::FILE_NAME => vec![0, 1, 4095, 4096, whole.len() / 2],
            _ => (0..whole.len()).step_by(step).collect(),
        };
        let counts = sweep(&golden, &lengths, |dir, len| {
            golden.judge(dir, name, &whole[..*len], &format!("{name} cut to {len}"))
        });
        println!("{name}: cut at {} lengths: {counts:?}", lengths.len());
    }
}

/// At so many lengths that each frame and page is cut at each of its fields.
#[test]
fn a_file_that_was_cut_off_is_never_taken_for_the_whole_one() {
    cuts(11);
}

#[test]
#[ignore = "takes minutes; `.ci/long` runs it"]
fn every_cut_of_a_file_is_never_taken_for_the_whole_one() {
    cuts(1);
}

#[test]
fn a_changed_authority_is_noticed_whatever_was_changed() {
    let dir = scratch();
    let store = open(dir.path()).unwrap();
    let now = Clock::start().now();
    let open = |new| {
        let opened = Certificates::open(dir.path(), store.cluster(), new, now);
        opened.map(|found| store.pin_authority(found.digest()))
    };
    open(true).unwrap().unwrap();
    open(false).unwrap().unwrap();
    for name in ["ca/ca.pem", "ca/ca.key.pem"] {
        let path = dir.path().join(name);
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            let cut = whole[..at].to_vec();
            for changed in [bytes, cut] {
                fs::write(&path, changed).unwrap();
                assert!(!matches!(open(false), Ok(Ok(()))), "{name} {at}");
            }
        }
        fs::write(&path, whole).unwrap();
    }
    open(false).unwrap().unwrap();
}

#[test]
fn a_lost_commit_that_was_answered_raises_the_numbers_and_more_are_refused() {
    let golden = Golden::new();
    let dir = scratch();
    golden.write(dir.path());
    let log = dir.path().join(wal::FILE_NAME);
    let whole = wal::scan(&log).unwrap();
    // The last frame: its page.
    let mut bytes = golden.files[wal::FILE_NAME].clone();
    let last = usize::try_from(whole.end).unwrap() - 100;
    bytes[last] ^= 1;
    fs::write(&log, &bytes).unwrap();
    let found = load(&open(dir.path()).unwrap()).unwrap();
    assert!(found.next_job > golden.now.next_job);
    assert_eq!(found.awaited, [NodeId(1), NodeId(5)].into());
    // A copy of the database without its log is an old state.
    golden.write(dir.path());
    fs::remove_file(&log).unwrap();
    let error = open(dir.path()).unwrap_err();
    let told = error.to_string();
    assert!(matches!(error, StoreError::Damaged { .. }), "{told}");
    for said in ["4 commits", "--accept-loss", "coordinator check", "restore"] {
        assert!(told.contains(said), "{told}");
    }
    // Without its mark that cannot be told.
    fs::remove_file(dir.path().join(mark::FILE_NAME)).unwrap();
    assert_eq!(load(&open(dir.path()).unwrap()).unwrap().jobs.len(), 2);
}

#[test]
fn damage_in_the_middle_of_the_log_names_offset_and_jobs_and_its_loss_can_be_accepted() {
    let golden = Golden::new();
    let dir = scratch();
    golden.write(dir.path());
    let log = dir.path().join(wal::FILE_NAME);
    let mut bytes = golden.files[wal::FILE_NAME].clone();
    bytes[32 + 24 + 7] ^= 1;
    fs::write(&log, &bytes).unwrap();
    let error = open(dir.path()).unwrap_err();
    let told = error.to_string();
    for said in [
        "state.db-wal at offset 32",
        "j1, j2, j3, j4",
        "--accept-loss",
    ] {
        assert!(told.contains(said), "{said}: {told}");
    }
    assert_eq!(fs::read(&log).unwrap(), bytes, "nothing was cut");
    let accepted = super::accept_loss(dir.path(), &error, NOW).unwrap();
    let all = accepted.told.join("\n");
    assert!(
        all.contains("j1, j2, j3, j4") && all.contains("are lost"),
        "{all}"
    );
    assert_eq!(fs::read(accepted.kept.join(wal::FILE_NAME)).unwrap(), bytes);
    let store = open(dir.path()).unwrap();
    let found = load(&store).unwrap();
    assert_eq!(found.jobs.len(), 2);
    assert!(found.next_job.0 > 1_000_000 && !found.awaited.is_empty());
    assert!(store.lead().unwrap().0 > 1_000_000);
    store.check().unwrap();
}

/// The state with everything in the database, and whose it is.
fn closed() -> (tempfile::TempDir, PathBuf, ClusterId) {
    let golden = Golden::new();
    let dir = scratch();
    golden.write(dir.path());
    let store = open(dir.path()).unwrap();
    store.lead().unwrap();
    let cluster = store.cluster();
    drop(store);
    let file = dir.path().join(FILE_NAME);
    // Whoever closes it last and may write puts everything into the database.
    Connection::open(&file)
        .unwrap()
        .query_row("SELECT COUNT(*) FROM jobs", [], |_| Ok(()))
        .unwrap();
    assert!(!dir.path().join(wal::FILE_NAME).exists());
    (dir, file, cluster)
}

fn damage(file: &Path, sql: &str) {
    let connection = Connection::open(file).unwrap();
    // Below what counts rows: as damage would.
    let changed = connection.execute(sql, []).unwrap();
    assert!(changed > 0, "{sql}");
}

#[test]
fn rows_that_vanished_are_missed_named_and_made_again_from_the_log() {
    for (sql, table, key) in [
        ("DELETE FROM jobs WHERE id = 3", "jobs", "j3"),
        ("DELETE FROM jobs WHERE id = 1", "jobs", "j1"),
        ("DELETE FROM attempts WHERE job = 2", "attempts", "j2.0.1"),
        ("DELETE FROM nodes WHERE id = 5", "nodes", "n5"),
        ("DELETE FROM bundles", "bundles", "j1.b1"),
        ("DELETE FROM users WHERE name = 'otto'", "users", "otto"),
        ("DELETE FROM tokens WHERE id = 1", "tokens", "t1"),
        ("UPDATE jobs SET live = 0 WHERE id = 3", "jobs", "j3"),
        (
            "UPDATE jobs SET row = zeroblob(20) WHERE id = 2",
            "jobs",
            "j2",
        ),
    ] {
        let (dir, file, cluster) = closed();
        let whole = load(&open(dir.path()).unwrap()).unwrap();
        damage(&file, sql);
        let refused = open(dir.path()).and_then(|store| load(&store));
        let error = super::explain(dir.path(), refused.expect_err(sql));
        let told = error.to_string();
        let named = format!("table {table}, key {key}");
        assert!(told.contains(&named), "{sql}: {told}");
        if key.starts_with('j') {
            let job = key.split('.').next().unwrap();
            assert!(told.contains(&format!("affected jobs: {job}")), "{told}");
        }
        let accepted = super::accept_loss(dir.path(), &error, NOW).unwrap();
        let all = accepted.told.join("\n");
        let whole_again = ["nothing is lost", "is whole"]
            .iter()
            .any(|said| all.contains(said));
        assert!(whole_again, "{sql}: {all}");
        let store = open(dir.path()).unwrap();
        assert_eq!(store.cluster(), cluster);
        assert!(is_like(&load(&store).unwrap(), &whole), "{sql}");
        store.lead().unwrap();
        store.check().unwrap();
    }
}

#[test]
fn a_damaged_log_over_whole_rows_loses_history_and_no_row() {
    let (dir, file, _) = closed();
    let whole = load(&open(dir.path()).unwrap()).unwrap();
    damage(
        &file,
        "UPDATE transitions SET row = zeroblob(9) WHERE sequence IN (2, 25)",
    );
    damage(&file, "DELETE FROM transitions WHERE sequence = 20");
    let error = super::explain(dir.path(), open(dir.path()).unwrap_err());
    super::accept_loss(dir.path(), &error, NOW).unwrap();
    let store = open(dir.path()).unwrap();
    assert!(is_like(&load(&store).unwrap(), &whole));
    store.check().unwrap();
}

#[test]
fn with_rows_and_log_damaged_the_last_whole_moment_is_what_is_left() {
    let (dir, file, _) = closed();
    damage(
        &file,
        "UPDATE transitions SET row = zeroblob(9) WHERE sequence = 20",
    );
    damage(&file, "UPDATE jobs SET row = zeroblob(9) WHERE id = 2");
    let error = super::explain(dir.path(), open(dir.path()).unwrap_err());
    // Everything was committed at one time, so that no moment but the first can be told.
    let accepted = super::accept_loss(dir.path(), &error, NOW).unwrap();
    assert!(
        accepted
            .told
            .join("\n")
            .contains("every change after number 0")
    );
    let (dir, file, _) = closed();
    damage(&file, "DELETE FROM transitions");
    damage(&file, "UPDATE jobs SET row = zeroblob(9) WHERE id = 2");
    let before = fs::read(&file).unwrap();
    let error = super::explain(dir.path(), open(dir.path()).unwrap_err());
    let refused = super::accept_loss(dir.path(), &error, NOW);
    assert!(
        matches!(refused, Err(StoreError::CannotAccept { .. })),
        "{refused:?}"
    );
    assert_eq!(fs::read(&file).unwrap(), before);
}
