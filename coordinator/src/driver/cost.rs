//! What tasks in bundles cost: CPU time of the driver with the store on disk, per task, from the report to the rows.

use std::collections::BTreeSet;
use std::sync::Arc;

use nix::time::{ClockId, clock_gettime};
use trainyard_common::bundle::{ObservedBundle, ObservedBundlePhase, TaskReport};
use trainyard_common::ids::{Digest, Incarnation, JobId, Sequence, TaskIndex, UserName};
use trainyard_common::inventory::Inventory;
use trainyard_common::member::{EndCause, Ending, RankEnd};
use trainyard_common::record::{Role, Target};
use trainyard_common::resources::Resources;
use trainyard_common::spec::{Array, JobSpec};
use trainyard_common::state::ExitStatus;
use trainyard_common::time::Timestamp;
use trainyard_coordinator_core::effect::Command;

use super::*;
use crate::store::SqliteStore;

const TASKS: u32 = 10_000;

fn cpu() -> Duration {
    Duration::from(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).unwrap())
}

fn ended(task: TaskIndex, now: Timestamp) -> TaskReport {
    let rank = RankEnd {
        rank: 0,
        exit: ExitStatus::Code(0),
        at: now,
        unprompted: true,
        oom_killed: false,
    };
    let ending = Ending {
        cause: EndCause::Completed,
        message: String::new(),
        started: true,
        ranks: vec![rank],
        ended_at: now,
        outputs: None,
        checkpoint: None,
        warning: String::new(),
    };
    TaskReport::Ended {
        task,
        started_at: Some(Timestamp(now.0.saturating_sub(2))),
        ending: Box::new(ending),
    }
}

/// Runs an array whose tasks end in groups of this size, each on record before the next is told; gives the CPU time of
/// a task.
async fn run(group: usize) -> Duration {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::start();
    let now = clock.now();
    let store = Arc::new(SqliteStore::open(dir.path(), &dir.path().join("ca"), now).unwrap());
    let term = store.lead().unwrap();
    let loaded = store.load(now, Timestamp(0)).unwrap();
    let read = Arc::new(ReadModel::new(&loaded));
    let (driver, _task) = start(Parts {
        store,
        term,
        loaded,
        read: read.clone(),
        clock,
        core: CoreConfig::default(),
        stop: CancellationToken::new(),
    });
    let owner: UserName = "anna".parse().unwrap();
    let name = owner.clone();
    let role = Role::Admin;
    let added = driver.request(|key| Event::LocalUserAdded { key, name, role });
    added.await.unwrap();
    let (name, target) = ("here".to_owned(), Target::Local);
    let by = owner.clone();
    let added = driver.request(|key| Event::LocalNodeAdded {
        key,
        name,
        target,
        owner: by,
    });
    let Answer::NodeEnrolled(node) = added.await.unwrap() else {
        panic!("no node")
    };
    let node = node.id;
    let capacity = Resources {
        cpu_milli: 8000,
        memory_bytes: 1 << 40,
        gpus: 0,
    };
    let mut session = driver
        .open_session(|session| Registration {
            session,
            node,
            incarnation: Incarnation(1),
            opening: 0,
            boot_id: "b".to_owned(),
            agent_version: "0".to_owned(),
            last_words: String::new(),
            address: "127.0.0.1".to_owned(),
            inventory: Inventory {
                capacity,
                ..Inventory::default()
            },
            observed: Vec::new(),
            bundles: Vec::new(),
        })
        .await
        .unwrap();
    let mut spec = JobSpec::new("array", vec!["/bin/true".to_owned()]);
    spec.array = Some(Array {
        first: 0,
        last: TASKS - 1,
        max_running: None,
    });
    let submitted = driver.request(|key| Event::JobSubmitted {
        key,
        owner,
        request_id: "r".parse().unwrap(),
        request_digest: Digest([0; 32]),
        spec: Box::new(spec),
        allow_infeasible: true,
    });
    submitted.await.unwrap();
    let before = cpu();
    let (mut known, mut waiting) = (BTreeSet::new(), BTreeSet::new());
    let (mut first, mut bundle) = (0, None);
    let mut changes = read.watch();
    while first < u64::from(TASKS) {
        while waiting.is_empty() || !session.commands.is_empty() {
            let Some(SessionMessage::Command(command)) = session.commands.recv().await else {
                panic!("the session ended")
            };
            if let Command::DesireBundle(desired) = command {
                bundle = Some(desired.bundle);
                let new = desired.tasks.tasks().filter(|task| known.insert(*task));
                waiting.extend(new);
            }
        }
        let mut reports = Vec::new();
        while reports.len() < group
            && let Some(task) = waiting.pop_first()
        {
            reports.push(ended(task, driver.now()));
        }
        let (told, session) = (reports.len() as u64, session.session);
        let seen = ObservedBundle {
            bundle: bundle.unwrap(),
            phase: ObservedBundlePhase::Running,
            first,
            reports,
        };
        let reported = Event::BundleObserved {
            session,
            node,
            bundle: seen,
        };
        driver.tell(reported).await.unwrap();
        first += told;
        let on_record = |_: &Sequence| {
            let tables = read.tables();
            let row = tables.bundles.values().next();
            row.is_none_or(|row| row.recorded >= first)
        };
        changes.wait_for(on_record).await.unwrap();
    }
    assert!(
        !read.tables().jobs.contains_key(&JobId(1)),
        "the job is over"
    );
    (cpu() - before) / TASKS
}

#[tokio::test]
#[ignore = "measures: run it with --ignored --release --nocapture"]
async fn a_task_in_a_bundle_costs_little() {
    for group in [8, 32, 128, 512] {
        let each = run(group).await;
        eprintln!("groups of {group}: {each:?} of CPU per task");
        // A tenth of this is usual; a debug build takes several times as long.
        assert!(
            each < Duration::from_millis(1),
            "groups of {group}: {each:?}"
        );
    }
}
