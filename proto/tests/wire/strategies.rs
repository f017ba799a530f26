//! Arbitrary domain values, as wide as the wire can say: texts of any script, amounts up to the largest, every value of
//! every closed set. Ids count from 1, and an empty text or 0 is not `Some`.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use trainyard_common::bundle::{
    BundlePhase, DesiredBundle, ObservedBundle, ObservedBundlePhase, TaskRange, TaskReport, TaskSet,
};
use trainyard_common::ids::{
    AttemptNumber, AttemptRef, BundleRef, Digest, Incarnation, JobId, NodeId, RequestId, TaskIndex,
    TokenId, UserName, WorkspaceName,
};
use trainyard_common::inventory::{Cpu, Disk, Gpu, Interface, Inventory, NumaNode};
use trainyard_common::member::{
    Cleanup, DesiredMember, DesiredPhase, EndCause, Ending, Go, LeftProcess, MemberSpec,
    ObservedMember, ObservedPhase, RankEnd, Stop,
};
use trainyard_common::record::{
    AttemptRecord, BundleRecord, BundleState, CancelRequest, JobRecord, MemberRecord, NodeRecord,
    Record, Role, Target, TaskCounts, TaskRecord, TokenGrant, TokenRecord, UserRecord,
};
use trainyard_common::resources::Resources;
use trainyard_common::spec::{Array, JobSpec, Launcher, OnDisconnect};
use trainyard_common::state::{
    AttemptState, ExitStatus, JobState, MemberPhase, NodeAvailability, NodePolicy, Outcome, Reason,
    ReasonCode,
};
use trainyard_common::time::Timestamp;

fn text() -> impl Strategy<Value = String> {
    "\\PC{0,12}"
}

fn some_text() -> impl Strategy<Value = String> {
    "\\PC{1,12}"
}

fn user() -> impl Strategy<Value = UserName> {
    "[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}".prop_map(|name| name.parse().expect("is a name"))
}

fn workspace() -> impl Strategy<Value = WorkspaceName> {
    "[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}".prop_map(|name| name.parse().expect("is a name"))
}

fn request_id() -> impl Strategy<Value = RequestId> {
    "[!-~]{1,128}".prop_map(|id| id.parse().expect("is printable"))
}

fn digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest)
}

fn time() -> impl Strategy<Value = Timestamp> {
    any::<u64>().prop_map(Timestamp)
}

fn duration() -> impl Strategy<Value = Duration> {
    any::<u64>().prop_map(Duration::from_millis)
}

fn texts() -> impl Strategy<Value = Vec<String>> {
    vec(text(), 0..4)
}

fn text_map() -> impl Strategy<Value = BTreeMap<String, String>> {
    btree_map(text(), text(), 0..4)
}

fn node_id() -> impl Strategy<Value = NodeId> {
    (1..=u32::MAX).prop_map(NodeId)
}

fn job_id() -> impl Strategy<Value = JobId> {
    (1..=u64::MAX).prop_map(JobId)
}

pub(crate) fn attempt_ref() -> impl Strategy<Value = AttemptRef> {
    (job_id(), any::<u32>(), 1..=u32::MAX).prop_map(|(job, task, attempt)| AttemptRef {
        job,
        task: TaskIndex(task),
        attempt: AttemptNumber(attempt),
    })
}

pub(crate) fn resources() -> impl Strategy<Value = Resources> {
    any::<(u64, u64, u32)>().prop_map(|(cpu_milli, memory_bytes, gpus)| Resources {
        cpu_milli,
        memory_bytes,
        gpus,
    })
}

pub(crate) fn reason() -> impl Strategy<Value = Reason> {
    (select(ReasonCode::ALL), text()).prop_map(|(code, message)| Reason { code, message })
}

pub(crate) fn exit() -> impl Strategy<Value = ExitStatus> {
    prop_oneof![
        any::<u8>().prop_map(ExitStatus::Code),
        any::<u8>().prop_map(ExitStatus::Signal),
        Just(ExitStatus::NotStarted),
        Just(ExitStatus::Unknown),
    ]
}

pub(crate) fn rank_end() -> impl Strategy<Value = RankEnd> {
    (any::<u32>(), exit(), time(), any::<bool>(), any::<bool>()).prop_map(
        |(rank, exit, at, unprompted, oom_killed)| RankEnd {
            rank,
            exit,
            at,
            unprompted,
            oom_killed,
        },
    )
}

fn array() -> impl Strategy<Value = Array> {
    (any::<u32>(), any::<u32>(), option::of(1..=u32::MAX)).prop_map(|(first, last, max_running)| {
        Array {
            first,
            last,
            max_running,
        }
    })
}

pub(crate) fn job_spec() -> impl Strategy<Value = JobSpec> {
    let shape = (
        text(),
        workspace(),
        texts(),
        any::<u32>(),
        any::<u32>(),
        resources(),
        option::of(some_text()),
        option::of(1..=u64::MAX),
    );
    let run = (
        select(Launcher::ALL),
        texts(),
        text_map(),
        option::of(digest()),
        option::of(duration()),
        duration(),
        any::<u32>(),
        option::of(array()),
        select(OnDisconnect::ALL),
        text_map(),
    );
    (shape, run).prop_map(|(shape, run)| {
        let (name, workspace, targets, nodes, procs_per_node, resources_per_node, gpu_type, memory) =
            shape;
        let (launcher, command, env, snapshot, time_limit, grace, retries, array, on, labels) = run;
        JobSpec {
            name,
            workspace,
            targets,
            nodes,
            procs_per_node,
            resources_per_node,
            gpu_type,
            gpu_memory_bytes: memory,
            launcher,
            command,
            env,
            snapshot,
            time_limit,
            grace,
            retries,
            array,
            on_disconnect: on,
            labels,
        }
    })
}

fn counts() -> impl Strategy<Value = TaskCounts> {
    any::<[u32; 6]>().prop_map(
        |[pending, active, succeeded, failed, cancelled, timed_out]| TaskCounts {
            pending,
            active,
            succeeded,
            failed,
            cancelled,
            timed_out,
        },
    )
}

pub(crate) fn job() -> impl Strategy<Value = JobRecord> {
    let request = (job_id(), user(), request_id(), digest(), job_spec());
    let state = (
        select(JobState::ALL),
        reason(),
        counts(),
        any::<(u32, u32)>(),
        option::of((user(), time()).prop_map(|(by, at)| CancelRequest { by, at })),
        option::of(exit()),
    );
    let times = (time(), option::of(time()), option::of(time()));
    (request, state, times).prop_map(|(request, state, times)| {
        let (id, owner, request_id, request_digest, spec) = request;
        let (state, reason, tasks, (next_fresh, bundles), cancel, exit) = state;
        let (submitted_at, started_at, ended_at) = times;
        JobRecord {
            id,
            owner,
            request_id,
            request_digest,
            spec,
            state,
            reason,
            tasks,
            next_fresh: TaskIndex(next_fresh),
            bundles,
            submitted_at,
            started_at,
            ended_at,
            cancel,
            exit,
        }
    })
}

pub(crate) fn task() -> impl Strategy<Value = TaskRecord> {
    let counts = (any::<[u32; 4]>(), any::<u32>(), vec(node_id(), 0..3));
    let rest = (
        select(JobState::ALL),
        reason(),
        option::of(exit()),
        vec(digest(), 0..3),
        option::of(time()),
    );
    (job_id(), counts, rest, user(), workspace()).prop_map(
        |(job, counts, rest, owner, workspace)| {
            let (
                [index, attempts, failures, infrastructure_failures],
                early_ends,
                nodes_taken_down,
            ) = counts;
            let (state, reason, exit, checkpoints, ended_at) = rest;
            TaskRecord {
                job,
                index: TaskIndex(index),
                owner,
                workspace,
                state,
                reason,
                attempts,
                failures,
                infrastructure_failures,
                early_ends,
                nodes_taken_down,
                exit,
                checkpoints,
                ended_at,
            }
        },
    )
}

fn member() -> impl Strategy<Value = MemberRecord> {
    let given = (node_id(), resources(), texts(), text());
    let seen = (
        select(MemberPhase::ALL),
        option::of(1..=u16::MAX),
        vec(rank_end(), 0..3),
        option::of(digest()),
        option::of(digest()),
        text(),
        text(),
    );
    (given, seen).prop_map(|(given, seen)| {
        let (node, resources, gpu_uuids, address) = given;
        let (phase, port, ranks, outputs, checkpoint, warning, cleanup) = seen;
        MemberRecord {
            node,
            resources,
            gpu_uuids,
            phase,
            address,
            port,
            ranks,
            outputs,
            checkpoint,
            warning,
            cleanup,
        }
    })
}

pub(crate) fn attempt() -> impl Strategy<Value = AttemptRecord> {
    let decided = (
        option::of(select(Outcome::ALL)),
        option::of(exit()),
        option::of(any::<u32>()),
    );
    let times = (
        time(),
        option::of(time()),
        option::of(time()),
        option::of(time()),
        option::of(duration()),
    );
    let state = (
        attempt_ref(),
        user(),
        workspace(),
        select(AttemptState::ALL),
        reason(),
    );
    let members = (vec(member(), 0..4), vec(digest(), 0..3));
    (state, decided, members, times).prop_map(|(state, decided, members, times)| {
        let (id, owner, workspace, state, reason) = state;
        let (outcome, exit, failed_rank) = decided;
        let (members, resume_from) = members;
        let (placed_at, ready_at, started_at, ended_at, lease) = times;
        AttemptRecord {
            id,
            owner,
            workspace,
            state,
            reason,
            outcome,
            exit,
            failed_rank,
            members,
            resume_from,
            placed_at,
            ready_at,
            started_at,
            ended_at,
            lease,
        }
    })
}

fn cpu() -> impl Strategy<Value = Cpu> {
    (text(), any::<[u32; 3]>()).prop_map(|(model, [sockets, cores, threads])| Cpu {
        model,
        sockets,
        cores,
        threads,
    })
}

fn numa() -> impl Strategy<Value = NumaNode> {
    (any::<u32>(), text(), any::<u64>()).prop_map(|(id, cpus, memory_bytes)| NumaNode {
        id,
        cpus,
        memory_bytes,
    })
}

fn disk() -> impl Strategy<Value = Disk> {
    (text(), text(), text(), any::<[u64; 2]>()).prop_map(
        |(mount_point, device, file_system, [total_bytes, available_bytes])| Disk {
            mount_point,
            device,
            file_system,
            total_bytes,
            available_bytes,
        },
    )
}

fn interface() -> impl Strategy<Value = Interface> {
    (text(), texts(), any::<bool>()).prop_map(|(name, addresses, loopback)| Interface {
        name,
        addresses,
        loopback,
    })
}

fn gpu() -> impl Strategy<Value = Gpu> {
    let texts = (some_text(), text(), text(), option::of(some_text()));
    let rest = any::<(u32, u64, Option<u32>, bool)>();
    (texts, rest).prop_map(|(texts, (index, memory_bytes, numa_node, healthy))| {
        let (uuid, model, pci_address, compute_capability) = texts;
        Gpu {
            index,
            uuid,
            model,
            memory_bytes,
            pci_address,
            numa_node,
            compute_capability,
            healthy,
        }
    })
}

pub(crate) fn inventory() -> impl Strategy<Value = Inventory> {
    let texts = (text(), text(), text(), text(), option::of(some_text()));
    let parts = (
        cpu(),
        vec(numa(), 0..3),
        vec(disk(), 0..3),
        vec(interface(), 0..3),
        vec(gpu(), 0..3),
    );
    (texts, parts, any::<u64>(), resources()).prop_map(|(texts, parts, memory_bytes, capacity)| {
        let (hostname, os, kernel, architecture, gpu_driver) = texts;
        let (cpu, numa, disks, interfaces, gpus) = parts;
        Inventory {
            hostname,
            os,
            kernel,
            architecture,
            cpu,
            memory_bytes,
            numa,
            disks,
            interfaces,
            gpus,
            gpu_driver,
            capacity,
        }
    })
}

pub(crate) fn node() -> impl Strategy<Value = NodeRecord> {
    let who = (node_id(), text(), user(), workspace(), select(Target::ALL));
    let state = (
        select(NodeAvailability::ALL),
        select(NodePolicy::ALL),
        reason(),
        inventory(),
    );
    let session = (any::<u64>(), text(), text(), text());
    (who, state, session, time(), time()).prop_map(
        |(who, state, session, enrolled_at, changed_at)| {
            let (id, name, owner, workspace, target) = who;
            let (availability, policy, reason, inventory) = state;
            let (incarnation, boot_id, agent_version, address) = session;
            NodeRecord {
                id,
                name,
                owner,
                workspace,
                target,
                availability,
                policy,
                reason,
                inventory,
                incarnation: Incarnation(incarnation),
                boot_id,
                agent_version,
                address,
                enrolled_at,
                changed_at,
            }
        },
    )
}

fn grant() -> impl Strategy<Value = TokenGrant> {
    prop_oneof![
        select(Target::ALL).prop_map(|target| TokenGrant::Node { target }),
        (user(), select(Role::ALL)).prop_map(|(name, role)| TokenGrant::User { name, role }),
    ]
}

pub(crate) fn token() -> impl Strategy<Value = TokenRecord> {
    let who = (
        (1..=u64::MAX).prop_map(TokenId),
        digest(),
        grant(),
        user(),
        workspace(),
    );
    let rest = (time(), time(), any::<u32>(), any::<bool>());
    (who, rest).prop_map(|(who, rest)| {
        let (id, secret_hash, grant, created_by, workspace) = who;
        let (created_at, expires_at, uses_left, revoked) = rest;
        TokenRecord {
            id,
            secret_hash,
            grant,
            created_by,
            workspace,
            created_at,
            expires_at,
            uses_left,
            revoked,
        }
    })
}

pub(crate) fn user_record() -> impl Strategy<Value = UserRecord> {
    (user(), select(Role::ALL), workspace(), time()).prop_map(
        |(name, role, workspace, created_at)| UserRecord {
            name,
            role,
            workspace,
            created_at,
        },
    )
}

pub(crate) fn record() -> impl Strategy<Value = Record> {
    prop_oneof![
        job().prop_map(|row| Record::Job(Box::new(row))),
        task().prop_map(|row| Record::Task(Box::new(row))),
        attempt().prop_map(|row| Record::Attempt(Box::new(row))),
        node().prop_map(|row| Record::Node(Box::new(row))),
        node_id().prop_map(Record::NodeRemoved),
        token().prop_map(|row| Record::Token(Box::new(row))),
        user_record().prop_map(|row| Record::User(Box::new(row))),
        bundle_record().prop_map(|row| Record::Bundle(Box::new(row))),
        bundle_ref().prop_map(Record::BundleRemoved),
    ]
}

fn member_spec() -> impl Strategy<Value = MemberSpec> {
    let whose = (text(), user(), workspace(), any::<[u32; 3]>());
    let given = (
        resources(),
        texts(),
        option::of(digest()),
        vec(digest(), 0..3),
    );
    let run = (
        select(Launcher::ALL),
        texts(),
        text_map(),
        option::of(duration()),
        duration(),
        option::of(duration()),
    );
    (whose, given, run).prop_map(|(whose, given, run)| {
        let (job_name, owner, workspace, [node_rank, nodes, procs_per_node]) = whose;
        let (resources, gpu_uuids, snapshot, resume_from) = given;
        let (launcher, command, env, time_limit, grace, lease) = run;
        MemberSpec {
            job_name,
            owner,
            workspace,
            node_rank,
            nodes,
            procs_per_node,
            resources,
            gpu_uuids,
            launcher,
            command,
            env,
            snapshot,
            resume_from,
            time_limit,
            grace,
            lease,
        }
    })
}

pub(crate) fn desired() -> impl Strategy<Value = DesiredMember> {
    let go = (text(), 1..=u16::MAX, texts()).prop_map(|(master_addr, master_port, node_addrs)| {
        DesiredPhase::Run(Go {
            master_addr,
            master_port,
            node_addrs,
        })
    });
    let stop = (select(ReasonCode::ALL), duration())
        .prop_map(|(code, grace)| DesiredPhase::Stop(Stop { code, grace }));
    let phase = prop_oneof![
        Just(DesiredPhase::Prepare),
        Just(DesiredPhase::Start),
        go,
        stop
    ];
    (attempt_ref(), phase, member_spec()).prop_map(|(attempt, phase, spec)| DesiredMember {
        attempt,
        phase,
        spec,
    })
}

fn ending() -> impl Strategy<Value = Ending> {
    let seen = (
        select(EndCause::ALL),
        text(),
        any::<bool>(),
        vec(rank_end(), 0..3),
    );
    let left = (time(), option::of(digest()), option::of(digest()), text());
    (seen, left).prop_map(|(seen, left)| {
        let (cause, message, started, ranks) = seen;
        let (ended_at, outputs, checkpoint, warning) = left;
        Ending {
            cause,
            message,
            started,
            ranks,
            ended_at,
            outputs,
            checkpoint,
            warning,
        }
    })
}

fn cleanup() -> impl Strategy<Value = Cleanup> {
    let left = (any::<u32>(), proptest::char::range('A', 'Z'), text())
        .prop_map(|(pid, state, name)| LeftProcess { pid, state, name });
    (ending(), vec(left, 0..3), any::<u32>()).prop_map(|(ending, left, more)| Cleanup {
        ending,
        left,
        more,
    })
}

pub(crate) fn observed() -> impl Strategy<Value = ObservedMember> {
    let phase = prop_oneof![
        Just(ObservedPhase::Preparing),
        (1..=u16::MAX).prop_map(|port| ObservedPhase::Ready { port }),
        time().prop_map(|started_at| ObservedPhase::Running { started_at }),
        Just(ObservedPhase::Stopping),
        cleanup().prop_map(ObservedPhase::CleanupPending),
        ending().prop_map(ObservedPhase::Uploading),
        ending().prop_map(ObservedPhase::Ended),
    ];
    (attempt_ref(), any::<u32>(), phase).prop_map(|(attempt, node_rank, phase)| ObservedMember {
        attempt,
        node_rank,
        phase,
    })
}

pub(crate) fn bundle_ref() -> impl Strategy<Value = BundleRef> {
    (1..=u64::MAX, 1..=u32::MAX).prop_map(|(job, bundle)| BundleRef {
        job: JobId(job),
        bundle,
    })
}

fn task_range() -> impl Strategy<Value = TaskRange> {
    any::<[u32; 2]>().prop_map(|ends| TaskRange {
        first: TaskIndex(ends[0].min(ends[1])),
        last: TaskIndex(ends[0].max(ends[1])),
    })
}

fn task_set() -> impl Strategy<Value = TaskSet> {
    vec(task_range(), 0..4).prop_map(|ranges| ranges.into_iter().collect())
}

pub(crate) fn bundle_record() -> impl Strategy<Value = BundleRecord> {
    let whose = (bundle_ref(), user(), workspace(), node_id());
    let state = (select(BundleState::ALL), reason(), task_set(), any::<u64>());
    let given = (1..=u32::MAX, resources(), time());
    (whose, state, given).prop_map(|(whose, state, given)| {
        let (id, owner, workspace, node) = whose;
        let (state, reason, tasks, recorded) = state;
        let (slots, resources, placed_at) = given;
        BundleRecord {
            id,
            owner,
            workspace,
            state,
            reason,
            node,
            slots,
            resources,
            tasks,
            recorded,
            placed_at,
        }
    })
}

pub(crate) fn desired_bundle() -> impl Strategy<Value = DesiredBundle> {
    let stop = (select(ReasonCode::ALL), duration())
        .prop_map(|(code, grace)| BundlePhase::Stop(Stop { code, grace }));
    let phase = prop_oneof![Just(BundlePhase::Run), Just(BundlePhase::Close), stop];
    let spec = option::of(member_spec().prop_map(Box::new));
    let what = (1..=u32::MAX, phase, task_set(), any::<u64>(), spec);
    (bundle_ref(), what).prop_map(|(bundle, what)| {
        let (slots, phase, tasks, recorded, spec) = what;
        DesiredBundle {
            bundle,
            slots,
            phase,
            tasks,
            recorded,
            spec,
        }
    })
}

fn task_report() -> impl Strategy<Value = TaskReport> {
    let task = || any::<u32>().prop_map(TaskIndex);
    prop_oneof![
        (task(), time()).prop_map(|(task, at)| TaskReport::Started { task, at }),
        (task(), option::of(time()), ending()).prop_map(|(task, started_at, ending)| {
            TaskReport::Ended {
                task,
                started_at,
                ending: Box::new(ending),
            }
        }),
        task_range().prop_map(TaskReport::Returned),
    ]
}

pub(crate) fn observed_bundle() -> impl Strategy<Value = ObservedBundle> {
    let phase = prop_oneof![
        Just(ObservedBundlePhase::Preparing),
        Just(ObservedBundlePhase::Running),
        (text(), any::<u64>())
            .prop_map(|(message, total)| ObservedBundlePhase::Ended { message, total }),
    ];
    let reports = (any::<u64>(), vec(task_report(), 0..4));
    (bundle_ref(), phase, reports).prop_map(|(bundle, phase, (first, reports))| ObservedBundle {
        bundle,
        phase,
        first,
        reports,
    })
}
