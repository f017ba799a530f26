//! Records for the tests of this crate.

use trainyard_common::bundle::TaskRange;
use trainyard_common::ids::{
    AttemptRef, BundleRef, ClusterId, Digest, Incarnation, JobId, NodeId, TaskIndex, TokenId,
    WorkspaceName,
};
use trainyard_common::inventory::Inventory;
use trainyard_common::record::{
    AttemptRecord, BundleRecord, BundleState, JobRecord, NodeRecord, Record, Role, Target,
    TaskCounts, TaskRecord, TokenGrant, TokenRecord, UserRecord,
};
use trainyard_common::resources::Resources;
use trainyard_common::spec::JobSpec;
use trainyard_common::state::{
    AttemptState, JobState, NodeAvailability, NodePolicy, Reason, ReasonCode,
};
use trainyard_common::time::Timestamp;

pub(crate) const CLUSTER: ClusterId = ClusterId([7; 16]);

fn reason() -> Reason {
    Reason::new(ReasonCode::Queued, "waits")
}

pub(crate) fn job(id: u64, state: JobState) -> JobRecord {
    let spec = JobSpec::new("train", vec!["true".to_owned()]);
    JobRecord {
        id: JobId(id),
        owner: "anna".parse().unwrap(),
        request_id: format!("r{id}").parse().unwrap(),
        request_digest: Digest([id as u8; 32]),
        spec,
        state,
        reason: reason(),
        tasks: TaskCounts {
            pending: 1,
            ..TaskCounts::default()
        },
        next_fresh: TaskIndex(0),
        bundles: 0,
        submitted_at: Timestamp(1000 + id),
        started_at: None,
        ended_at: None,
        cancel: None,
        exit: None,
    }
}

pub(crate) fn task(job: u64, index: u32, state: JobState) -> TaskRecord {
    let (owner, workspace) = ("anna".parse().unwrap(), WorkspaceName::default_workspace());
    TaskRecord {
        state,
        attempts: 1,
        ..TaskRecord::untried(JobId(job), TaskIndex(index), owner, workspace, reason())
    }
}

pub(crate) fn attempt(id: &str, state: AttemptState) -> AttemptRecord {
    AttemptRecord {
        id: id.parse::<AttemptRef>().unwrap(),
        owner: "anna".parse().unwrap(),
        workspace: WorkspaceName::default_workspace(),
        state,
        reason: reason(),
        outcome: None,
        exit: None,
        failed_rank: None,
        members: Vec::new(),
        resume_from: Vec::new(),
        placed_at: Timestamp(5),
        ready_at: None,
        started_at: None,
        ended_at: None,
        lease: None,
    }
}

/// A bundle of these tasks, both included, of which as many reports are on record.
pub(crate) fn bundle(id: &str, first: u32, last: u32, recorded: u64) -> BundleRecord {
    let tasks = TaskRange {
        first: TaskIndex(first),
        last: TaskIndex(last),
    };
    BundleRecord {
        id: id.parse::<BundleRef>().unwrap(),
        owner: "anna".parse().unwrap(),
        workspace: WorkspaceName::default_workspace(),
        state: BundleState::Running,
        reason: reason(),
        node: NodeId(1),
        slots: 2,
        resources: Resources {
            cpu_milli: 1000,
            memory_bytes: 0,
            gpus: 0,
        },
        tasks: [tasks].into_iter().collect(),
        recorded,
        placed_at: Timestamp(5),
    }
}

pub(crate) fn node(id: u32) -> NodeRecord {
    NodeRecord {
        id: NodeId(id),
        name: format!("node-{id}"),
        owner: "anna".parse().unwrap(),
        workspace: WorkspaceName::default_workspace(),
        target: Target::Attached,
        availability: NodeAvailability::Ready,
        policy: NodePolicy::Active,
        reason: reason(),
        inventory: Inventory::default(),
        incarnation: Incarnation(1),
        boot_id: "b".to_owned(),
        agent_version: "0".to_owned(),
        address: "10.0.0.1".to_owned(),
        enrolled_at: Timestamp(1),
        changed_at: Timestamp(1),
    }
}

pub(crate) fn token(id: u64, uses_left: u32, expires_at: u64) -> TokenRecord {
    TokenRecord {
        id: TokenId(id),
        secret_hash: Digest([3; 32]),
        grant: TokenGrant::Node {
            target: Target::Attached,
        },
        created_by: "anna".parse().unwrap(),
        workspace: WorkspaceName::default_workspace(),
        created_at: Timestamp(1),
        expires_at: Timestamp(expires_at),
        uses_left,
        revoked: false,
    }
}

pub(crate) fn user(name: &str, role: Role) -> UserRecord {
    UserRecord {
        name: name.parse().unwrap(),
        role,
        workspace: WorkspaceName::default_workspace(),
        created_at: Timestamp(1),
    }
}

pub(crate) fn row(job: JobRecord) -> Record {
    Record::Job(Box::new(job))
}
