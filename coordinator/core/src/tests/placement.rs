//! Scheduling rounds on a whole core: order, fit, GPUs, sentences; and properties of rounds on arbitrary clusters.

use proptest::prelude::*;
use trainyard_common::ids::{JobId, NodeId};
use trainyard_common::inventory::{Interface, Inventory};
use trainyard_common::member::ObservedPhase;
use trainyard_common::record::Target;
use trainyard_common::spec::{Array, JobSpec, Launcher};
use trainyard_common::state::JobState;

use crate::config::{BEHIND_TOLD, MAX_TOLD_PER_ROUND};
use crate::effect::Effect;
use crate::event::{Event, Registration};
use crate::testing::{TestEnv, attempt, completed, gpu_spec, job_spec, user};

fn nodes_of(env: &TestEnv, id: &str) -> Vec<u32> {
    env.store.attempts[&attempt(id)]
        .members
        .iter()
        .map(|member| member.node.0)
        .collect()
}

fn gpus_of(env: &TestEnv, id: &str) -> Vec<String> {
    env.store.attempts[&attempt(id)].members[0]
        .gpu_uuids
        .clone()
}

/// Adds a node whose registration is changed first.
fn node_with(env: &mut TestEnv, gpus: u32, change: impl FnOnce(&mut Registration)) -> NodeId {
    let id = env.enrol();
    let mut registration = env.registration(id, gpus, vec![]);
    change(&mut registration);
    env.register_with(registration);
    env.words();
    id
}

fn cpus(milli: u64) -> JobSpec {
    let mut spec = job_spec();
    spec.resources_per_node.cpu_milli = milli;
    spec
}

#[test]
fn the_head_blocks_what_is_behind_it_and_says_what_it_lacks() {
    let mut env = TestEnv::new();
    env.node(4);
    env.node(8);
    env.start(gpu_spec(1, 2));
    env.start(gpu_spec(2, 4));
    env.start(gpu_spec(1, 1));
    assert_eq!(nodes_of(&env, "j1.0.1"), [1], "the best fit");
    assert_eq!(
        env.job(2),
        "PENDING INSUFFICIENT_FREE: needs 2 nodes with 4 GPUs and 1 CPU each; 1 of 2 suitable nodes free enough now; \
         n1 has 2 of 4 GPUs free"
    );
    assert_eq!(
        env.job(3),
        "PENDING BEHIND_EARLIER_JOB: waits behind j2, which is first in line and does not fit yet"
    );
    env.schedule();
    env.expect_all(&[], &[]);
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(completed(0)));
    env.schedule();
    env.expect(&[
        "n1: forget j1.0.1",
        "schedule",
        "n1: prepare j2.0.1",
        "n2: prepare j2.0.1",
        "n2: start j3.0.1",
    ]);
}

#[test]
fn only_the_first_ones_are_told_the_name_of_the_head() {
    let mut env = TestEnv::new();
    env.node(0);
    for _ in 0..22 {
        env.start(cpus(8000));
    }
    assert!(env.job(2).contains("INSUFFICIENT_FREE"), "{}", env.job(2));
    assert!(
        env.job(3)
            .ends_with("behind j2, which is first in line and does not fit yet"),
        "{}",
        env.job(3)
    );
    assert!(
        env.job(22).ends_with("waits behind earlier jobs"),
        "{}",
        env.job(22)
    );
    env.report(1, "j1.0.1", 0, ObservedPhase::Ended(completed(0)));
    env.words();
    env.schedule();
    let changed = env.changes();
    assert!(
        !changed.iter().any(|row| row.starts_with("j22 ")),
        "its sentence is still true: {changed:?}"
    );
    assert!(env.job(4).contains("behind j3"), "{}", env.job(4));
    env.words();
}

#[test]
fn a_round_is_bounded_and_asks_for_another() {
    let mut env = TestEnv::new();
    let many =
        |registration: &mut Registration| registration.inventory.capacity.cpu_milli = 1_500_000;
    node_with(&mut env, 0, many);
    let mut spec = job_spec();
    spec.array = Some(Array {
        first: 0,
        last: 1199,
        max_running: None,
    });
    spec.launcher = Launcher::Torchrun; // Has a shim for each attempt.
    env.submit("alice", "r1", spec);
    env.words();
    env.schedule();
    assert_eq!(env.store.attempts.len(), 1000);
    assert_eq!(env.words().last().unwrap(), "schedule");
    env.schedule();
    assert_eq!(env.store.attempts.len(), 1200);
    assert_eq!(env.words().len(), 200);
}

#[test]
fn gpus_are_taken_from_one_numa_node_with_the_fewest_to_spare() {
    let mut env = TestEnv::new();
    env.node(8);
    env.start(gpu_spec(1, 3));
    assert_eq!(
        gpus_of(&env, "j1.0.1"),
        ["GPU-m1-0", "GPU-m1-1", "GPU-m1-2"]
    );
    env.start(gpu_spec(1, 2));
    assert_eq!(gpus_of(&env, "j2.0.1"), ["GPU-m1-4", "GPU-m1-5"]);
    env.start(gpu_spec(1, 1));
    assert_eq!(gpus_of(&env, "j3.0.1"), ["GPU-m1-3"]);
    env.start(gpu_spec(1, 2));
    assert_eq!(gpus_of(&env, "j4.0.1"), ["GPU-m1-6", "GPU-m1-7"]);
}

/// A start with so many jobs like the first one in the queue: no agent is in session yet.
fn restart_with(env: &mut TestEnv, spec: JobSpec, jobs: u64) {
    env.submit("alice", "r1", spec);
    let first = env.store.jobs[&JobId(1)].clone();
    for id in (2..=jobs).map(JobId) {
        let mut job = first.clone();
        (job.id, job.request_id) = (id, format!("r{id}").parse().unwrap());
        env.store.jobs.insert(id, job);
    }
    env.restart();
    env.words();
}

#[test]
fn while_no_node_is_open_only_the_first_jobs_are_told() {
    let mut env = TestEnv::new();
    env.node(0);
    restart_with(&mut env, cpus(8000), 3000);
    env.schedule();
    assert_eq!(
        env.changes().len(),
        BEHIND_TOLD + 1,
        "a submit must not wait until every row is rewritten"
    );
    assert!(env.job(1).contains("UNREACHABLE"), "{}", env.job(1));
    assert!(env.job(3000).contains("QUEUED"), "{}", env.job(3000));
    env.schedule();
    env.expect_all(&[], &[]);
}

#[test]
fn jobs_that_cannot_fit_are_told_over_several_rounds() {
    let mut env = TestEnv::new();
    let open = env.node(0);
    env.node(4);
    let jobs = MAX_TOLD_PER_ROUND as u64 + 10;
    restart_with(&mut env, gpu_spec(1, 4), jobs);
    env.register(open, 0, vec![]);
    env.words();
    env.schedule();
    assert_eq!(env.changes().len(), MAX_TOLD_PER_ROUND);
    env.expect(&["schedule"]);
    assert!(env.job(jobs).contains("QUEUED"), "{}", env.job(jobs));
    env.schedule();
    assert_eq!(env.changes().len(), 10);
    env.expect(&[]);
    let told = env.job(jobs);
    assert!(told.contains("UNREACHABLE"), "{told}");
    assert_eq!(env.job(1), told, "the same for all that ask for the same");
}

#[test]
fn what_a_job_asks_of_its_gpus_is_met() {
    let mut env = TestEnv::new();
    node_with(&mut env, 2, |registration| {
        registration.inventory.gpus[0].model = "NVIDIA A100-SXM4-80GB".into();
        registration.inventory.gpus[1].model = "NVIDIA A100-PCIE-40GB".into();
        registration.inventory.gpus[1].memory_bytes = 40 << 30;
    });
    node_with(&mut env, 2, |registration| {
        registration.inventory.gpus[0].healthy = false
    });
    let mut start = |model: Option<&str>, memory: Option<u64>| {
        let mut spec = gpu_spec(1, 1);
        spec.gpu_type = model.map(str::to_owned);
        spec.gpu_memory_bytes = memory;
        let job = env.start(spec);
        let id = format!("{job}.0.1");
        let gpu = gpus_of(&env, &id).remove(0);
        env.cancel(job.0);
        let node = nodes_of(&env, &id)[0];
        env.report(
            node,
            &id,
            0,
            ObservedPhase::Ended(crate::testing::stopped(0)),
        );
        env.words();
        gpu
    };
    assert_eq!(start(Some("a100-80gb"), None), "GPU-m1-0");
    assert_eq!(start(Some("A100-40GB"), None), "GPU-m1-1");
    assert_eq!(start(Some("h100"), None), "GPU-m2-1", "the healthy one");
    assert_eq!(start(Some("A100"), Some(80 << 30)), "GPU-m1-0");
    let mut spec = gpu_spec(1, 1);
    spec.gpu_type = Some("B200".into());
    env.submit("alice", "x", spec);
    env.expect(&["refused FAILED_PRECONDITION INFEASIBLE"]);
}

#[test]
fn targets_are_taken_in_the_order_of_the_job() {
    let mut env = TestEnv::new();
    env.node(0);
    let key = env.key();
    env.event(Event::LocalNodeAdded {
        key,
        name: "here".into(),
        target: Target::Local,
        owner: user("root"),
    });
    env.register(NodeId(2), 0, vec![]);
    env.words();
    let spec = |targets: &[&str]| JobSpec {
        targets: targets.iter().map(|target| (*target).to_owned()).collect(),
        ..job_spec()
    };
    env.start(spec(&["local", "attached"]));
    env.start(spec(&["attached"]));
    env.start(spec(&["attached", "local"]));
    assert_eq!(nodes_of(&env, "j1.0.1"), [2]);
    assert_eq!(nodes_of(&env, "j2.0.1"), [1]);
    assert_eq!(nodes_of(&env, "j3.0.1"), [1]);
}

#[test]
fn members_of_a_gang_reach_each_other() {
    let loopback = |registration: &mut Registration| registration.address = "127.0.0.1".into();
    let mut env = TestEnv::new();
    node_with(&mut env, 0, loopback);
    env.node(0);
    env.submit("alice", "r1", gpu_spec(2, 0));
    let words = env.words();
    assert_eq!(
        words,
        ["refused FAILED_PRECONDITION INFEASIBLE"],
        "n1 and n2 cannot reach each other"
    );
    // Two agents on one machine can.
    node_with(&mut env, 0, loopback);
    env.start(gpu_spec(2, 0));
    assert_eq!(nodes_of(&env, "j1.0.1"), [1, 3]);
    assert_eq!(
        env.store.attempts[&attempt("j1.0.1")].members[1].address,
        "127.0.0.1"
    );
}

/// The field and the sentence of a refusal, without the remedy that all have.
fn refusal(env: &mut TestEnv, change: impl FnOnce(&mut JobSpec)) -> (String, String) {
    let mut spec = gpu_spec(1, 0);
    change(&mut spec);
    env.submit("alice", "refused", spec);
    let Some(Effect::Reply(_, Err(refusal))) = env.said.first() else {
        panic!("it was not refused");
    };
    let field = refusal.field.clone().expect("a field is named");
    let message = refusal.message.clone();
    let remedy = "; ask for less, add nodes, or submit with --allow-infeasible to wait for them";
    let text = message.strip_suffix(remedy).expect("the remedy is told");
    let text = text
        .strip_prefix(&format!("{field}: "))
        .expect("the field is told");
    let told = (field, text.to_owned());
    env.expect_all(&[], &["refused FAILED_PRECONDITION INFEASIBLE"]);
    told
}

#[test]
fn a_refusal_names_the_field_and_the_most_there_is() {
    let mut env = TestEnv::new();
    node_with(&mut env, 4, |registration| {
        for gpu in &mut registration.inventory.gpus[..2] {
            gpu.model = "NVIDIA A100-SXM4-40GB".into();
            gpu.memory_bytes = 40 << 30;
        }
    });
    node_with(&mut env, 0, |registration| {
        registration.inventory.capacity.cpu_milli = 16_000;
        registration.inventory.capacity.memory_bytes = 32 << 30;
    });
    let mut expect = |change: &dyn Fn(&mut JobSpec), field: &str, sentence: &str| {
        let (named, told) = refusal(&mut env, change);
        assert_eq!((named.as_str(), told.as_str()), (field, sentence));
    };
    expect(
        &|spec| spec.nodes = 3,
        "nodes",
        "needs 3 nodes with 1 CPU each; 2 of the 2 nodes could hold a part, and 3 are asked for",
    );
    expect(
        &|spec| (spec.nodes, spec.resources_per_node.gpus) = (2, 1),
        "nodes",
        "needs 2 nodes with 1 GPU and 1 CPU each; 1 of the 2 nodes could hold a part, and 2 are asked for; too small \
         is n2 with 0 GPUs, 16 CPUs and 32 GiB of memory",
    );
    expect(
        &|spec| spec.resources_per_node.gpus = 5,
        "gpus_per_node",
        "needs 1 node with 5 GPUs and 1 CPU; none of the 2 nodes could hold that even if empty: the most is 4 GPUs on n1",
    );
    expect(
        &|spec| {
            spec.resources_per_node.gpus = 1;
            spec.gpu_type = Some("B200".into());
        },
        "gpu_type",
        "needs 1 node with 1 B200 GPU and 1 CPU; none of the 2 nodes could hold that even if empty: the GPU models are \
         NVIDIA A100-SXM4-40GB and NVIDIA H100 80GB HBM3",
    );
    expect(
        &|spec| {
            (spec.nodes, spec.resources_per_node.gpus) = (2, 3);
            spec.gpu_type = Some("A100".into());
        },
        "gpus_per_node",
        "needs 2 nodes with 3 A100 GPUs and 1 CPU each; none of the 2 nodes could hold a part even if empty: the most \
         is 2 such GPUs on n1",
    );
    expect(
        &|spec| {
            spec.resources_per_node.gpus = 1;
            (spec.gpu_type, spec.gpu_memory_bytes) = (Some("A100".into()), Some(80 << 30));
        },
        "gpu_memory",
        "needs 1 node with 1 A100 GPU of 80 GiB or more and 1 CPU; none of the 2 nodes could hold that even if empty: \
         the largest such GPU has 40 GiB",
    );
    expect(
        &|spec| spec.resources_per_node.cpu_milli = 16_001,
        "cpus_per_node",
        "needs 1 node with 16.001 CPUs; none of the 2 nodes could hold that even if empty: the most is 16 CPUs on n2",
    );
    expect(
        &|spec| spec.resources_per_node.memory_bytes = 65 << 30,
        "memory_per_node",
        "needs 1 node with 1 CPU and 65 GiB of memory; none of the 2 nodes could hold that even if empty: the most is \
         64 GiB of memory on n1",
    );
    expect(
        &|spec| {
            spec.resources_per_node.gpus = 1;
            spec.resources_per_node.cpu_milli = 16_000;
        },
        "gpus_per_node",
        "needs 1 node with 1 GPU and 16 CPUs; none of the 2 nodes could hold that even if empty: none has all of it \
         together; the largest is n1 with 4 GPUs, 8 CPUs and 64 GiB of memory",
    );
    expect(
        &|spec| spec.targets = vec!["local".into()],
        "targets",
        "needs 1 node of local with 1 CPU; no node is of that target, all of them are attached",
    );
}

#[test]
fn a_refusal_where_there_is_no_gpu_or_no_way_between_nodes_says_so() {
    let loopback = |registration: &mut Registration| registration.address = "127.0.0.1".into();
    let mut env = TestEnv::new();
    node_with(&mut env, 0, loopback);
    env.node(0);
    let (field, told) = refusal(&mut env, |spec| {
        spec.resources_per_node.gpus = 1;
        spec.gpu_type = Some("H100".into());
    });
    assert_eq!(field, "gpus_per_node");
    assert!(told.ends_with("no node has a healthy GPU"), "{told}");
    let (field, told) = refusal(&mut env, |spec| spec.nodes = 2);
    assert_eq!(field, "nodes");
    assert!(
        told.contains(
            "2 of the 2 nodes could hold a part, and 2 are asked for; they cannot reach each other"
        ),
        "{told}"
    );
}

#[test]
fn an_address_that_others_can_use_is_found() {
    let mut env = TestEnv::new();
    node_with(&mut env, 0, |registration| {
        registration.address = "127.0.0.1".into();
        registration.inventory.interfaces = vec![Interface {
            name: "eth0".into(),
            addresses: vec!["fe80::1".into(), "10.9.9.9".into()],
            loopback: false,
        }];
    });
    env.node(0);
    env.start(gpu_spec(2, 0));
    let members = &env.store.attempts[&attempt("j1.0.1")].members;
    let addresses: Vec<&str> = members
        .iter()
        .map(|member| member.address.as_str())
        .collect();
    assert_eq!(addresses, ["10.9.9.9", "10.0.0.2"]);
}

#[test]
fn memory_that_is_not_asked_for_is_not_counted() {
    let mut env = TestEnv::new();
    node_with(&mut env, 0, |registration| {
        registration.inventory.capacity.memory_bytes = 1 << 30
    });
    let mut spec = job_spec();
    spec.resources_per_node.memory_bytes = 1 << 30;
    env.start(spec.clone());
    env.start(job_spec());
    assert!(env.job(2).starts_with("PREPARING"), "{}", env.job(2));
    env.start(spec);
    assert!(
        env.job(3).ends_with("n1 has 0 B of 1 GiB of memory free"),
        "{}",
        env.job(3)
    );
}

/// Nodes of the gang, GPUs and CPUs of each, tasks.
type Job = (u32, u32, u64, u32);

/// Nodes (GPUs and CPUs) and a queue, small enough to be crowded.
fn cluster() -> impl Strategy<Value = (Vec<(u32, u64)>, Vec<Job>)> {
    let nodes = prop::collection::vec((0..6_u32, 1..9_u64), 1..6);
    let jobs = prop::collection::vec((1..4_u32, 0..5_u32, 1..6_u64, 1..4_u32), 1..12);
    (nodes, jobs)
}

fn set_up(nodes: &[(u32, u64)], jobs: &[Job]) -> TestEnv {
    let mut env = TestEnv::new();
    for (gpus, cpu) in nodes {
        node_with(&mut env, *gpus, |registration| {
            let inventory: &mut Inventory = &mut registration.inventory;
            inventory.capacity.cpu_milli = cpu * 1000;
        });
    }
    for (index, (gang, gpus, cpu, tasks)) in jobs.iter().enumerate() {
        let mut spec = gpu_spec(*gang, *gpus);
        spec.resources_per_node.cpu_milli = cpu * 1000;
        spec.array = Some(Array {
            first: 0,
            last: tasks - 1,
            max_running: None,
        });
        env.submit_anyway(&format!("r{index}"), spec);
    }
    env.words();
    env
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// `check` after the round proves that nothing is given twice or beyond capacity, and that gangs are whole.
    #[test]
    fn a_round_gives_no_more_than_there_is_and_a_second_one_changes_nothing((nodes, jobs) in cluster()) {
        let mut env = set_up(&nodes, &jobs);
        env.schedule();
        env.words();
        for attempt in env.store.attempts.values() {
            prop_assert_eq!(attempt.members.len(), env.store.jobs[&attempt.id.job].spec.nodes as usize);
        }
        env.schedule();
        prop_assert_eq!(env.changes(), Vec::<String>::new());
        prop_assert_eq!(env.words(), Vec::<String>::new());
    }

    /// Once a feasible job does not get all it wants, no later job gets anything.
    #[test]
    fn nobody_passes_a_feasible_job((nodes, jobs) in cluster()) {
        let mut env = set_up(&nodes, &jobs);
        env.schedule();
        env.words();
        let mut blocked: Option<JobId> = None;
        for job in env.store.jobs.values() {
            let placed = job.tasks.active > 0;
            prop_assert!(blocked.is_none() || !placed, "{} passed {:?}", job.id, blocked);
            let feasible = feasible(&nodes, &job.spec);
            prop_assert!(feasible || !placed, "{} is placed and does not fit", job.id);
            if feasible && job.tasks.pending > 0 {
                blocked = blocked.or(Some(job.id));
            }
            if !placed {
                prop_assert_eq!(job.state, JobState::Pending);
            }
        }
    }

    /// A blocked head really does not fit: the rest of the nodes is too small for it.
    #[test]
    fn the_head_is_placed_if_it_fits((nodes, jobs) in cluster()) {
        let mut env = set_up(&nodes, &jobs);
        env.schedule();
        env.words();
        let head = env.store.jobs.values().find(|job| job.tasks.pending > 0 && feasible(&nodes, &job.spec));
        if let Some(head) = head {
            let wanted = head.spec.resources_per_node;
            let fitting = env.core.nodes().filter(|node| {
                let used = env.core.t.usage.get(&node.id).map(|usage| usage.amounts).unwrap_or_default();
                node.inventory.capacity.minus(&used).is_some_and(|free| wanted.fits(&free))
            });
            prop_assert!((fitting.count() as u32) < head.spec.nodes);
        }
    }
}

fn feasible(nodes: &[(u32, u64)], spec: &JobSpec) -> bool {
    let wanted = spec.resources_per_node;
    let fitting = nodes
        .iter()
        .filter(|(gpus, cpu)| *gpus >= wanted.gpus && cpu * 1000 >= wanted.cpu_milli);
    fitting.count() >= spec.nodes as usize
}
