//! Fills the state of a coordinator that does not run with pending and running jobs, through the store's own code: for
//! figures about large states. `large_state DIR PENDING RUNNING NODES`.
#![expect(clippy::print_stdout, reason = "a program that says what it made")]

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use trainyard_common::ids::{
    AttemptNumber, AttemptRef, Digest, Incarnation, JobId, NodeId, TaskIndex, WorkspaceName,
};
use trainyard_common::inventory::Inventory;
use trainyard_common::record::{
    AttemptRecord, JobRecord, MemberRecord, NodeRecord, Record, Target, TaskCounts, TaskRecord,
};
use trainyard_common::resources::Resources;
use trainyard_common::spec::JobSpec;
use trainyard_common::state::{
    AttemptState, JobState, MemberPhase, NodeAvailability, NodePolicy, Reason, ReasonCode,
};
use trainyard_common::time::Timestamp;
use trainyard_coordinator::store::{SqliteStore, Store};

/// Rows of one commit.
const BATCH: usize = 1000;

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let dir = PathBuf::from(arguments.next().expect("a directory is named"));
    let mut number = || -> u64 {
        let text = arguments.next().expect("a number is given");
        text.to_str()
            .and_then(|text| text.parse().ok())
            .expect("it is a number")
    };
    let (pending, running, nodes) = (number(), number(), number());
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = Timestamp(elapsed.expect("it is after 1970").as_millis() as u64);
    let store = SqliteStore::open(&dir, &dir.join("ca"), now).expect("the state can be opened");
    let term = store.lead().expect("nobody else leads");
    let first = store
        .load(now, now)
        .expect("it is whole")
        .snapshot
        .next_job
        .0;
    let on_node = running.div_ceil(nodes.max(1));
    let mut records: Vec<Record> = (1..=nodes).map(|id| node(id, on_node, now)).collect();
    for index in 0..running {
        let id = first + index;
        records.push(job(id, JobState::Running, now));
        records.push(task(id));
        records.push(attempt(id, 1 + index / on_node, now));
    }
    records.extend((0..pending).map(|index| job(first + running + index, JobState::Pending, now)));
    for batch in records.chunks(BATCH) {
        store.commit(term, now, batch).expect("it can be written");
    }
    println!("{pending} pending and {running} running jobs on {nodes} nodes");
}

fn owner() -> trainyard_common::ids::UserName {
    "anna".parse().expect("it is a valid name")
}

fn one_cpu() -> Resources {
    Resources {
        cpu_milli: 1000,
        memory_bytes: 0,
        gpus: 0,
    }
}

fn node(id: u64, holds: u64, now: Timestamp) -> Record {
    let capacity = Resources {
        cpu_milli: 1000 * holds,
        memory_bytes: 1 << 40,
        gpus: 0,
    };
    Record::Node(Box::new(NodeRecord {
        id: NodeId(id as u32),
        name: format!("node-{id}"),
        owner: owner(),
        workspace: WorkspaceName::default_workspace(),
        target: Target::Attached,
        availability: NodeAvailability::Ready,
        policy: NodePolicy::Active,
        reason: Reason::new(ReasonCode::InSession, "in session"),
        inventory: Inventory {
            capacity,
            ..Inventory::default()
        },
        incarnation: Incarnation(1),
        boot_id: "boot".to_owned(),
        agent_version: "0".to_owned(),
        address: "127.0.0.1".to_owned(),
        enrolled_at: now,
        changed_at: now,
    }))
}

fn job(id: u64, state: JobState, now: Timestamp) -> Record {
    let mut spec = JobSpec::new("train", vec!["python3".to_owned(), "train.py".to_owned()]);
    spec.env.insert("EPOCHS".to_owned(), "20".to_owned());
    let mut tasks = TaskCounts::default();
    if state == JobState::Running {
        tasks.active = 1;
    } else {
        tasks.pending = 1;
    }
    Record::Job(Box::new(JobRecord {
        id: JobId(id),
        owner: format!("user-{}", id % 50)
            .parse()
            .expect("it is a valid name"),
        request_id: format!("r{id}").parse().expect("it is a valid id"),
        request_digest: Digest([7; 32]),
        spec,
        state,
        reason: Reason::new(ReasonCode::Queued, "waits"),
        next_fresh: TaskIndex(u32::from(state == JobState::Running)),
        tasks,
        bundles: 0,
        submitted_at: now,
        started_at: None,
        ended_at: None,
        cancel: None,
        exit: None,
    }))
}

fn task(job: u64) -> Record {
    let (owner, workspace) = (owner(), WorkspaceName::default_workspace());
    let reason = Reason::new(ReasonCode::Queued, "runs");
    Record::Task(Box::new(TaskRecord {
        state: JobState::Running,
        attempts: 1,
        ..TaskRecord::untried(JobId(job), TaskIndex(0), owner, workspace, reason)
    }))
}

fn attempt(job: u64, node: u64, now: Timestamp) -> Record {
    let member = MemberRecord {
        node: NodeId(node as u32),
        resources: one_cpu(),
        gpu_uuids: Vec::new(),
        phase: MemberPhase::Running,
        address: "127.0.0.1".to_owned(),
        port: None,
        ranks: Vec::new(),
        outputs: None,
        checkpoint: None,
        warning: String::new(),
        cleanup: String::new(),
    };
    Record::Attempt(Box::new(AttemptRecord {
        id: AttemptRef {
            job: JobId(job),
            task: TaskIndex(0),
            attempt: AttemptNumber(1),
        },
        owner: owner(),
        workspace: WorkspaceName::default_workspace(),
        state: AttemptState::Running,
        reason: Reason::new(ReasonCode::Queued, "runs"),
        outcome: None,
        exit: None,
        failed_rank: None,
        members: vec![member],
        resume_from: Vec::new(),
        placed_at: now,
        ready_at: Some(now),
        started_at: Some(now),
        ended_at: None,
        lease: None,
    }))
}
