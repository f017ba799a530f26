//! Backups of real state directories, and what must not pass as one.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use rusqlite::Connection;
use trainyard_common::ids::{JobId, NodeId, TokenId};
use trainyard_common::record::Record;
use trainyard_common::state::{AttemptState, JobState, MemberPhase, NodeAvailability};

use super::*;
use crate::testing::{attempt, job, node, row, task, token};

const NOW: Timestamp = Timestamp(5000);

/// A state with a running job on one of two nodes, and whoever runs on it.
struct World {
    dir: tempfile::TempDir,
    store: SqliteStore,
    term: Term,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        create_private_dir(&state).unwrap();
        let store = SqliteStore::open(&state, &state.join("ca"), NOW).unwrap();
        Certificates::open(&state, store.cluster(), true, Clock::start().now()).unwrap();
        let term = store.lead().unwrap();
        let mut world = Self { dir, store, term };
        let mut lost = node(3);
        lost.availability = NodeAvailability::Lost;
        let mut runs = attempt("j1.0.1", AttemptState::Running);
        runs.members = vec![member(NodeId(2))];
        world.commit(&[
            row(job(1, JobState::Running)),
            Record::Task(Box::new(task(1, 0, JobState::Running))),
            Record::Attempt(Box::new(runs)),
            Record::Node(Box::new(node(1))),
            Record::Node(Box::new(node(2))),
            Record::Node(Box::new(lost)),
            Record::Token(Box::new(token(1, 1, u64::MAX >> 2))),
        ]);
        world
    }

    fn commit(&mut self, records: &[Record]) {
        self.store.commit(self.term, NOW, records).unwrap();
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn backup(&self, name: &str) -> (PathBuf, Backup) {
        backup(&self.state(), &self.path(name)).unwrap()
    }

    fn damage(&self, sql: &str) {
        let changed = Connection::open(self.state().join(FILE_NAME))
            .unwrap()
            .execute(sql, [])
            .unwrap();
        assert!(changed > 0, "{sql}");
    }
}

fn member(node: NodeId) -> trainyard_common::record::MemberRecord {
    trainyard_common::record::MemberRecord {
        node,
        resources: trainyard_common::resources::Resources::default(),
        gpu_uuids: Vec::new(),
        phase: MemberPhase::Running,
        address: "10.0.0.2".to_owned(),
        port: None,
        ranks: Vec::new(),
        outputs: None,
        checkpoint: None,
        warning: String::new(),
        cleanup: String::new(),
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_backup_is_taken_while_somebody_writes_and_is_as_of_one_moment() {
    let mut world = World::new();
    let (place, taken) = world.backup("b");
    world.commit(&[row(job(2, JobState::Pending))]);
    assert_eq!((taken.sequence, taken.rows), (Sequence(7), 7));
    assert_eq!(check(&place).unwrap().sequence, Sequence(7));
    assert_eq!(check(&world.state()).unwrap().sequence, Sequence(8));
    assert_eq!(
        names(&place),
        ["backup.json", "ca", "cluster-id", "state.db"]
    );
    for (name, mode) in [
        ("", 0o700),
        ("ca", 0o700),
        ("ca/ca.key.pem", 0o600),
        ("state.db", 0o600),
        ("backup.json", 0o600),
    ] {
        let found = fs::metadata(place.join(name)).unwrap().permissions().mode();
        assert_eq!(found & 0o777, mode, "{name}");
    }
    // Into a directory under a name of its own; never over anything.
    fs::create_dir(world.path("all")).unwrap();
    let (inside, _) = world.backup("all");
    assert_eq!(inside.parent(), Some(world.path("all").as_path()));
    fs::write(world.path("file"), "mine").unwrap();
    let refused = backup(&world.state(), &world.path("file"));
    assert!(matches!(refused, Err(BackupError::NotEmpty { .. })));
    let nowhere = backup(&world.state(), &world.path("none/b"));
    assert!(matches!(nowhere, Err(BackupError::File { .. })));
    assert_eq!(names(world.dir.path()), ["all", "b", "file", "state"]);
}

#[test]
fn a_restored_state_gives_no_number_twice_and_waits_for_its_nodes() {
    let mut world = World::new();
    let (place, taken) = world.backup("b");
    // What the backup does not know of.
    world.commit(&[
        row(job(2, JobState::Pending)),
        Record::Node(Box::new(node(4))),
        Record::Token(Box::new(token(2, 1, u64::MAX >> 2))),
    ]);
    let later = world.store.lead().unwrap();
    let to = world.path("restored");
    assert_eq!(restore(&place, &to).unwrap(), taken);
    let store = SqliteStore::open(&to, &to.join("ca"), NOW).unwrap();
    assert!(store.lead().unwrap() > later);
    let snapshot = store.load(NOW, Timestamp(0)).unwrap().snapshot;
    assert!(snapshot.next_job > JobId(1_000_000));
    assert!(snapshot.next_node > NodeId(10_000));
    assert!(snapshot.next_token > TokenId(100_000));
    assert_eq!(snapshot.awaited, [NodeId(1), NodeId(2)].into());
    assert_eq!(snapshot.attempts.len(), 1);
    // Also at the next start, until they were heard of.
    drop(store);
    let store = SqliteStore::open(&to, &to.join("ca"), NOW).unwrap();
    assert_eq!(
        store
            .load(NOW, Timestamp(0))
            .unwrap()
            .snapshot
            .awaited
            .len(),
        2
    );
    store.reconciled().unwrap();
    drop(store);
    let store = SqliteStore::open(&to, &to.join("ca"), NOW).unwrap();
    let loaded = store.load(NOW, Timestamp(0)).unwrap();
    assert_eq!(loaded.snapshot.awaited.len(), 0);
    assert_eq!(loaded.sequence, Sequence(7));
    assert!(check(&to).unwrap().damage.is_empty());
    let mode = fs::metadata(to.join(FILE_NAME))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn nothing_is_restored_over_a_state_or_from_what_is_no_whole_backup() {
    let world = World::new();
    let (place, _) = world.backup("b");
    let over = restore(&place, &world.state());
    assert!(
        matches!(over, Err(BackupError::NotEmpty { .. })),
        "{over:?}"
    );
    let lock = StateLock::acquire_within(&world.state(), NOW, Duration::ZERO).unwrap();
    let held = restore(&place, &world.state());
    assert!(
        matches!(held, Err(BackupError::Store(StoreError::Held { .. }))),
        "{held:?}"
    );
    drop(lock);
    assert!(check(&world.state()).unwrap().damage.is_empty());

    let to = world.path("restored");
    let none = restore(&world.state(), &to);
    assert!(
        matches!(none, Err(BackupError::NoBackup { .. })),
        "{none:?}"
    );
    for name in ["state.db", "ca/ca.key.pem", "cluster-id"] {
        let whole = fs::read(place.join(name)).unwrap();
        fs::write(place.join(name), &whole[..whole.len() - 1]).unwrap();
        let changed = restore(&place, &to);
        assert!(
            matches!(&changed, Err(BackupError::Changed { path }) if path.ends_with(name)),
            "{changed:?}"
        );
        fs::write(place.join(name), whole).unwrap();
    }
    let manifest = fs::read_to_string(place.join(MANIFEST)).unwrap();
    fs::write(
        place.join(MANIFEST),
        manifest.replace("\"format\": 1", "\"format\": 2"),
    )
    .unwrap();
    let newer = restore(&place, &to);
    assert!(
        matches!(newer, Err(BackupError::NoBackup { .. })),
        "{newer:?}"
    );
    assert!(!to.exists(), "nothing was begun");
    fs::write(place.join(MANIFEST), manifest).unwrap();
    restore(&place, &to).unwrap();
}

#[test]
fn every_damage_is_told_with_its_place_and_the_jobs_that_it_is_about() {
    let mut world = World::new();
    world.commit(&[
        row(job(2, JobState::Pending)),
        row(job(3, JobState::Pending)),
    ]);
    world.damage("UPDATE jobs SET row = zeroblob(40) WHERE id = 2");
    world.damage("UPDATE jobs SET live = 0 WHERE id = 3");
    world.damage("UPDATE nodes SET row = zeroblob(40) WHERE id = 2");
    world.damage("UPDATE transitions SET chain = chain + 1 WHERE sequence = 3");
    world.damage("DELETE FROM transitions WHERE sequence = 5");
    let found = check(&world.state()).unwrap();
    let told: Vec<_> = found
        .damage
        .iter()
        .map(|damage| {
            (
                damage.table.as_str(),
                damage.key.as_str(),
                damage.jobs.as_slice(),
            )
        })
        .collect();
    // The transition behind a changed one does not continue it either.
    assert_eq!(
        told,
        [
            ("jobs", "j2", [JobId(2)].as_slice()),
            ("jobs", "j3", &[JobId(3)]),
            ("nodes", "n2", &[JobId(1)]),
            ("transitions", "3", &[JobId(1)]),
            ("transitions", "4", &[]),
            ("transitions", "5..5", &[]),
        ]
    );
    let refused = backup(&world.state(), &world.path("b"));
    assert!(
        matches!(refused, Err(BackupError::Damaged { places: 6, .. })),
        "{refused:?}"
    );
    assert_eq!(names(world.dir.path()), ["state"]);
}

#[test]
fn damage_below_sql_is_told_with_its_offset() {
    let world = World::new();
    let (place, _) = world.backup("b");
    let file = place.join(FILE_NAME);
    let mut bytes = fs::read(&file).unwrap();
    // The header of the second page, which is the root of `meta` or `jobs`.
    let last = bytes.len() - 4096;
    bytes[last..last + 8].fill(0xff);
    fs::write(&file, bytes).unwrap();
    let found = check(&place).unwrap();
    assert!(
        found
            .damage
            .iter()
            .any(|damage| damage.offset == Some(last as u64)),
        "{:?}",
        found.damage
    );
}

#[test]
fn a_state_of_an_earlier_version_is_backed_up_before_it_is_migrated() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store/golden/v1-restores.db");
    fs::copy(golden, state.join(FILE_NAME)).unwrap();
    let cluster = inspect::inspect(&state.join(FILE_NAME)).unwrap().cluster;
    let now = Clock::start().now();
    Certificates::open(state, cluster, true, now).unwrap();
    write_private(&state.join(CLUSTER_FILE), cluster.to_string().as_bytes()).unwrap();
    let backups = state.join(BACKUPS);
    // A migration that never came to its end is begun again, each time with a backup, of which some are kept.
    for at in 1..=5 {
        before_migration(state, Timestamp(at)).unwrap();
    }
    assert_eq!(names(&backups), ["schema-1-3", "schema-1-4", "schema-1-5"]);
    let store = SqliteStore::open(state, &state.join("ca"), NOW).unwrap();
    store.lead().unwrap();
    store.check().unwrap();
    drop(store);
    before_migration(state, Timestamp(6)).unwrap();
    assert_eq!(names(&backups).len(), 3, "there is nothing to migrate");
    // The backup is of the earlier version, and this one restores it.
    let from = backups.join("schema-1-5");
    assert_eq!(check(&from).unwrap().schema, 1);
    let to = dir.path().join("restored");
    assert_eq!(restore(&from, &to).unwrap().schema, 1);
    let store = SqliteStore::open(&to, &to.join("ca"), NOW).unwrap();
    store.check().unwrap();
}
