//! One suite over every store, and what only the one on disk can suffer.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::Connection;
use trainyard_common::ids::{NodeId, TokenId};
use trainyard_common::record::Role;
use trainyard_common::state::{AttemptState, JobState};

use super::*;
use crate::testing::{CLUSTER, attempt, bundle, job, node, row, task, token, user};

pub(super) const NOW: Timestamp = Timestamp(5000);

pub(super) fn everything() -> Vec<Record> {
    vec![
        row(job(1, JobState::Running)),
        row(job(2, JobState::Pending)),
        Record::Task(Box::new(task(1, 0, JobState::Running))),
        Record::Attempt(Box::new(attempt("j1.0.1", AttemptState::Ended))),
        Record::Attempt(Box::new(attempt("j1.0.2", AttemptState::Running))),
        Record::Node(Box::new(node(1))),
        Record::Node(Box::new(node(4))),
        Record::Token(Box::new(token(1, 1, 9000))),
        Record::Token(Box::new(token(2, 0, 9000))),
        Record::Token(Box::new(token(3, 1, NOW.0))),
        Record::User(Box::new(user("anna", Role::Admin))),
        Record::Bundle(Box::new(bundle("j1.b1", 1, 4, 7))),
        Record::Bundle(Box::new(bundle("j1.b2", 5, 9, 0))),
        Record::Bundle(Box::new(bundle("j1.b1", 2, 4, 8))),
        Record::BundleRemoved(bundle("j1.b2", 5, 9, 0).id),
    ]
}

/// Runs a test over each kind of store; `reopen` gives the state as the next start finds it.
fn each(test: impl Fn(&dyn Store, &dyn Fn() -> Arc<dyn Store>)) {
    let memory = Arc::new(MemStore::new(CLUSTER));
    test(&*memory, &|| memory.clone());
    let dir = tempfile::tempdir().unwrap();
    let sqlite = open(dir.path()).unwrap();
    test(&sqlite, &|| Arc::new(open(dir.path()).unwrap()));
}

fn open(dir: &std::path::Path) -> Result<SqliteStore, StoreError> {
    SqliteStore::open(dir, &dir.join("ca"), NOW)
}

#[test]
fn what_was_committed_is_there_at_the_next_start() {
    each(|store, reopen| {
        let term = store.lead().unwrap();
        let last = store.commit(term, NOW, &everything()).unwrap();
        assert_eq!(last, Sequence(15));
        let later = reopen();
        assert_eq!(later.cluster(), store.cluster());
        let Loaded { snapshot, sequence } = later.load(NOW, Timestamp(0)).unwrap();
        assert_eq!(sequence, Sequence(15));
        assert_eq!(
            snapshot.jobs,
            [job(1, JobState::Running), job(2, JobState::Pending)]
        );
        assert_eq!(snapshot.tasks, [task(1, 0, JobState::Running)]);
        assert_eq!(
            snapshot.attempts,
            [attempt("j1.0.2", AttemptState::Running)]
        );
        assert_eq!(snapshot.nodes, [node(1), node(4)]);
        assert_eq!(
            snapshot.tokens,
            [token(1, 1, 9000)],
            "used and expired ones stay on disk"
        );
        assert_eq!(snapshot.users, [user("anna", Role::Admin)]);
        assert_eq!(
            snapshot.bundles,
            [bundle("j1.b1", 2, 4, 8)],
            "a removed one is gone"
        );
        assert_eq!(
            (snapshot.next_job, snapshot.next_node, snapshot.next_token),
            (JobId(3), NodeId(5), TokenId(4))
        );
        let report = later.check().unwrap();
        assert_eq!(
            report,
            CheckReport {
                rows: 12,
                transitions: 15,
                sequence
            }
        );
    });
}

#[test]
fn finished_jobs_stay_in_history_and_their_request_ids_are_remembered() {
    each(|store, reopen| {
        let term = store.lead().unwrap();
        store.commit(term, NOW, &everything()).unwrap();
        let done = job(1, JobState::Succeeded);
        let records = [
            row(done.clone()),
            Record::Task(Box::new(task(1, 0, JobState::Succeeded))),
            Record::Attempt(Box::new(attempt("j1.0.2", AttemptState::Lost))),
            Record::NodeRemoved(NodeId(4)),
        ];
        store.commit(term, NOW, &records).unwrap();
        let snapshot = reopen().load(NOW, Timestamp(1002)).unwrap().snapshot;
        assert_eq!(snapshot.jobs, [job(2, JobState::Pending)]);
        assert_eq!(snapshot.tasks, []);
        assert_eq!(
            snapshot.attempts.len(),
            1,
            "a lost attempt of a job that is over is still watched"
        );
        assert_eq!(snapshot.nodes, [node(1)]);
        assert_eq!(
            snapshot.next_node,
            NodeId(5),
            "the id of a removed node is not given again"
        );
        let ids: Vec<_> = snapshot
            .requests
            .iter()
            .map(|request| request.job)
            .collect();
        assert_eq!(ids, [JobId(2)]);
        assert_eq!(
            reopen()
                .load(NOW, Timestamp(0))
                .unwrap()
                .snapshot
                .requests
                .len(),
            2
        );

        let history = store.job(JobId(1)).unwrap().unwrap();
        assert_eq!(history.job, done);
        assert_eq!(history.tasks, [task(1, 0, JobState::Succeeded)]);
        let attempts: Vec<_> = history
            .attempts
            .iter()
            .map(|found| found.id.to_string())
            .collect();
        assert_eq!(attempts, ["j1.0.1", "j1.0.2"]);
        assert_eq!(store.job(JobId(9)).unwrap(), None);
        let ended = attempt("j1.0.1", AttemptState::Ended);
        assert_eq!(store.attempt(ended.id).unwrap(), Some(ended));
        assert_eq!(
            store.jobs(JobId(u64::MAX), 1).unwrap(),
            [job(2, JobState::Pending)]
        );
        assert_eq!(store.jobs(JobId(2), 9).unwrap(), [done]);
        let log = store.transitions(Sequence(15), 2).unwrap();
        assert_eq!(
            log.iter().map(|entry| entry.sequence.0).collect::<Vec<_>>(),
            [16, 17]
        );
        assert_eq!((log[0].at, &log[0].record), (NOW, &records[0]));
        let removal = store.transitions(Sequence(18), 9).unwrap();
        assert_eq!(removal.len(), 1);
        assert_eq!(removal[0].record, Record::NodeRemoved(NodeId(4)));
    });
}

#[test]
fn a_term_that_is_over_commits_nothing() {
    each(|store, reopen| {
        let old = store.lead().unwrap();
        let new = reopen().lead().unwrap();
        assert!(new > old);
        let fenced = store.commit(old, NOW, &[row(job(1, JobState::Pending))]);
        assert!(
            matches!(fenced, Err(StoreError::Fenced { mine, stored }) if (mine, stored) == (old, new))
        );
        assert_eq!(
            reopen().load(NOW, Timestamp(0)).unwrap().sequence,
            Sequence(0)
        );
        reopen()
            .commit(new, NOW, &[row(job(1, JobState::Pending))])
            .unwrap();
    });
}

#[test]
fn a_large_array_shows_what_did_not_plainly_succeed() {
    each(|store, _| {
        let term = store.lead().unwrap();
        let state = |index| {
            if index % 100 == 7 {
                JobState::Failed
            } else {
                JobState::Succeeded
            }
        };
        let tasks = (0..1500).map(|index| Record::Task(Box::new(task(1, index, state(index)))));
        let records: Vec<_> = [row(job(1, JobState::Failed))]
            .into_iter()
            .chain(tasks)
            .collect();
        store.commit(term, NOW, &records).unwrap();
        let shown = store.job(JobId(1)).unwrap().unwrap().tasks;
        assert_eq!(shown.len(), 15);
        assert!(shown.iter().all(|task| task.state == JobState::Failed));
    });
}

#[test]
fn injected_failures_come_when_they_were_asked_for() {
    let store = MemStore::new(CLUSTER);
    let term = store.lead().unwrap();
    store.fail_after(1);
    store
        .commit(term, NOW, &[row(job(1, JobState::Pending))])
        .unwrap();
    let failed = store.commit(term, NOW, &[row(job(2, JobState::Pending))]);
    assert!(matches!(failed, Err(StoreError::Injected)));
    assert_eq!(store.load(NOW, Timestamp(0)).unwrap().sequence, Sequence(1));
}

/// A closed database with a few commits in it.
fn written() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    let term = store.lead().unwrap();
    store.commit(term, NOW, &everything()).unwrap();
    store
        .commit(term, NOW, &[row(job(2, JobState::Running))])
        .unwrap();
    dir
}

fn damage(dir: &tempfile::TempDir, sql: &str) {
    let changed = Connection::open(dir.path().join("state.db"))
        .unwrap()
        .execute(sql, [])
        .unwrap();
    assert!(changed > 0, "{sql} changed nothing");
}

fn corrupt_at(result: Result<impl std::fmt::Debug, StoreError>) -> (&'static str, String) {
    match result {
        Err(StoreError::Corrupt {
            table, key, file, ..
        }) => {
            assert!(file.ends_with("state.db"));
            (table, key)
        }
        other => panic!("expected damage to be noticed, got {other:?}"),
    }
}

#[test]
fn a_damaged_row_is_named_and_never_loaded() {
    let dir = written();
    damage(&dir, "UPDATE nodes SET row = zeroblob(40) WHERE id = 4");
    let store = open(dir.path()).unwrap();
    assert_eq!(
        corrupt_at(store.load(NOW, Timestamp(0))),
        ("nodes", "n4".to_owned())
    );
    assert_eq!(corrupt_at(store.check()), ("nodes", "n4".to_owned()));
    let dir = written();
    damage(&dir, "UPDATE bundles SET row = zeroblob(40)");
    let store = open(dir.path()).unwrap();
    assert_eq!(
        corrupt_at(store.load(NOW, Timestamp(0))),
        ("bundles", "j1.b1".to_owned())
    );
    assert_eq!(corrupt_at(store.check()), ("bundles", "j1.b1".to_owned()));
    let dir = written();
    damage(
        &dir,
        "UPDATE jobs SET row = (SELECT row FROM jobs WHERE id = 1) WHERE id = 2",
    );
    let store = open(dir.path()).unwrap();
    assert_eq!(
        corrupt_at(store.load(NOW, Timestamp(0))),
        ("jobs", "j2".to_owned()),
        "a whole row in a wrong place"
    );
}

#[test]
fn a_log_that_was_cut_or_changed_below_sql_is_noticed_at_the_start() {
    for (sql, at) in [
        ("DELETE FROM transitions WHERE sequence = 16", "16"),
        ("DELETE FROM transitions WHERE sequence = 5", "5"),
        (
            "UPDATE transitions SET row = (SELECT row FROM transitions WHERE sequence = 2) WHERE sequence = 3",
            "3",
        ),
        (
            "UPDATE transitions SET chain = chain + 1 WHERE sequence = 16",
            "16",
        ),
    ] {
        let dir = written();
        damage(&dir, sql);
        assert_eq!(
            corrupt_at(open(dir.path())),
            ("transitions", at.to_owned()),
            "{sql}"
        );
    }
}

#[test]
fn a_file_that_is_no_database_is_refused() {
    let dir = written();
    fs::write(dir.path().join("state.db"), [b'x'; 8192]).unwrap();
    let _ = fs::remove_file(dir.path().join("state.db-wal"));
    corrupt_at(open(dir.path()));
}

#[test]
fn a_cluster_that_has_existed_is_never_made_anew() {
    let dir = written();
    fs::remove_file(dir.path().join("state.db")).unwrap();
    let error = open(dir.path()).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("this cluster has existed; state not found"),
        "{error}"
    );
    assert!(!dir.path().join("state.db").exists());

    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("ca")).unwrap();
    assert!(matches!(open(dir.path()), Err(StoreError::Missing { .. })));

    let (one, other) = (written(), written());
    fs::copy(
        other.path().join("cluster-id"),
        one.path().join("cluster-id"),
    )
    .unwrap();
    assert!(matches!(
        open(one.path()),
        Err(StoreError::OtherCluster { .. })
    ));
}

#[test]
fn a_newer_schema_is_refused() {
    let dir = written();
    damage(&dir, "UPDATE meta SET schema_version = 3");
    let refused = || open(dir.path()).unwrap_err();
    assert!(matches!(
        refused(),
        StoreError::Schema {
            found: 3,
            known: 2,
            ..
        }
    ));
    let told = refused().to_string();
    assert!(
        told.contains("schema version 3") && told.contains("up to 2"),
        "{told}"
    );
    // The newest backup that this version reads, as a command.
    for name in ["schema-3-900", "schema-1-100", "schema-2-200", "other"] {
        fs::create_dir_all(dir.path().join("backups").join(name)).unwrap();
    }
    let (told, place) = (refused().to_string(), dir.path().display());
    let command = format!(
        "`yard coordinator restore --from {place}/backups/schema-2-200 --state-dir {place}.restored`"
    );
    assert!(told.contains(&command), "{told}");
}

#[test]
fn one_coordinator_at_a_time_and_the_other_learns_who() {
    let dir = tempfile::tempdir().unwrap();
    let lock = StateLock::acquire(dir.path(), NOW).unwrap();
    let error = StateLock::acquire_within(dir.path(), NOW, Duration::ZERO)
        .unwrap_err()
        .to_string();
    let pid = format!("pid {}, host ", std::process::id());
    assert!(error.contains(&pid) && error.contains("since"), "{error}");
    drop(lock);
    StateLock::acquire(dir.path(), NOW).unwrap();
}

#[test]
fn files_of_the_state_are_for_nobody_else() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(dir.path(), &dir.path().join("none"), NOW).unwrap();
    store.lead().unwrap();
    let mut names = Vec::new();
    for entry in fs::read_dir(dir.path()).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{entry:?}");
        names.push(entry.file_name().into_string().unwrap());
    }
    names.sort();
    assert_eq!(
        names,
        [
            "cluster-id",
            "state.db",
            "state.db-shm",
            "state.db-wal",
            "state.mark",
            "state.reserve"
        ]
    );
}

#[test]
fn a_coordinator_that_is_just_ending_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let lock = StateLock::acquire(dir.path(), NOW).unwrap();
    let path = dir.path().to_owned();
    let (sender, next) = std::sync::mpsc::channel();
    let waits = std::thread::spawn(move || sender.send(StateLock::acquire(&path, NOW)));
    // It is not refused at once …
    next.recv_timeout(Duration::from_millis(300)).unwrap_err();
    drop(lock);
    // … and gets the lock when that is let go.
    waits.join().unwrap().unwrap();
    next.recv().unwrap().unwrap();
}
