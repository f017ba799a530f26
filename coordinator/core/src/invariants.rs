//! Holds every table against every other. It runs after every event in tests and in the simulation; what it finds is
//! always a bug of ours. It changes nothing and must not be needed for anything else.

use std::collections::{BTreeMap, BTreeSet};

use trainyard_common::ids::{AttemptRef, BundleRef, JobId, NodeId, TaskIndex, UserName};
use trainyard_common::record::{AttemptRecord, BundleRecord, BundleState, JobRecord};
use trainyard_common::state::{AttemptState, JobState, MemberPhase, Outcome};

use crate::Core;
use crate::cleanup::{is_over, lingers};
use crate::gang;
use crate::sessions::was_seen;
use crate::tables::{
    ActiveCounts, Bundled, Usage, attempt_in_bundle, fresh_tasks, is_released, width,
};
use crate::timers::{is_lost, is_unreachable, prepares};

pub(crate) fn check(core: &Core) -> Result<(), Vec<String>> {
    let mut wrong = Vec::new();
    for job in core.t.jobs.values() {
        check_job(core, job, &mut wrong);
    }
    check_tasks(core, &mut wrong);
    for attempt in core.t.attempts.values() {
        check_attempt(core, attempt, &mut wrong);
    }
    check_bundles(core, &mut wrong);
    check_usage(core, &mut wrong);
    check_users(core, &mut wrong);
    check_nodes(core, &mut wrong);
    check_timers(core, &mut wrong);
    check_requests(core, &mut wrong);
    if !core.later.is_empty() || core.wants_schedule || !core.t.touched.is_empty() {
        wrong.push("something was left to be said".to_owned());
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong) }
}

fn check_job(core: &Core, job: &JobRecord, wrong: &mut Vec<String>) {
    let id = job.id;
    let mut expect = |holds: bool, what: &str| {
        if !holds {
            wrong.push(format!("{id}: {what}: {:?}", job.tasks));
        }
    };
    let counts = &job.tasks;
    let total = counts.pending
        + counts.active
        + counts.succeeded
        + counts.failed
        + counts.cancelled
        + counts.timed_out;
    expect(
        total == job.spec.task_count(),
        "its counts are not all of its tasks",
    );
    let mut bundled = Bundled::default();
    core.t.bundles_of(id).for_each(|bundle| bundled.add(bundle));
    let alive = |attempt: &&AttemptRef| {
        let attempt = core.t.attempts.get(attempt);
        attempt.is_some_and(|attempt| !attempt.state.is_over())
    };
    let with_rows = core.t.carried.iter().filter(|carried| carried.job == id);
    let with_rows = with_rows.filter(alive).count();
    let without_rows = bundled
        .tasks
        .saturating_sub(u32::try_from(with_rows).unwrap_or(u32::MAX));
    let (mut waiting, mut active) = (0, ActiveCounts::default());
    for task in core.t.tasks_of(id) {
        match task.state {
            JobState::Pending => waiting += 1,
            JobState::Provisioning
            | JobState::Preparing
            | JobState::Running
            | JobState::Stopping
            | JobState::Succeeded
            | JobState::Failed
            | JobState::Cancelled
            | JobState::TimedOut => active.add(task.state),
        }
    }
    expect(
        counts.pending == waiting + fresh_tasks(job),
        "its waiting tasks are miscounted",
    );
    expect(
        counts.active == active.preparing + active.running + active.stopping + without_rows,
        "its active tasks are miscounted",
    );
    let indexed = core.t.active.get(&id).copied().unwrap_or_default();
    expect(indexed == active, "its index of active tasks is wrong");
    let indexed = core.t.bundled.get(&id).copied().unwrap_or_default();
    expect(indexed == bundled, "its index of bundles is wrong");
    expect(
        core.t.pending.contains(&id) == (counts.pending > 0),
        "its place in the queue is wrong",
    );
    expect(!job.state.is_terminal(), "it is over and still in memory");
    expect(
        counts.pending + counts.active > 0,
        "nothing of it is left and it is not over",
    );
    expect(job.ended_at.is_none(), "it goes on and has an end");
    expect(
        job.cancel.is_none() || counts.pending == 0,
        "it is cancelled and waits for a place",
    );
    expect(id < core.t.next_job, "its id is still to be given");
    let most = job
        .spec
        .array
        .and_then(|array| array.max_running)
        .unwrap_or(u32::MAX);
    let single = counts.active.saturating_sub(bundled.tasks);
    expect(
        single + bundled.width <= most,
        "more of it runs than it allows",
    );
    let pending = job.state == JobState::Pending;
    expect(
        pending == (counts.active == 0),
        "its state is not that of its tasks",
    );
}

fn check_tasks(core: &Core, wrong: &mut Vec<String>) {
    let mut current: BTreeMap<_, &AttemptRecord> = BTreeMap::new();
    for attempt in core
        .t
        .attempts
        .values()
        .filter(|attempt| !attempt.state.is_over())
    {
        if current
            .insert((attempt.id.job, attempt.id.task), attempt)
            .is_some()
        {
            wrong.push(format!("{}: its task has two attempts", attempt.id));
        }
    }
    for (key, task) in &core.t.tasks {
        let name = format!("{}.{}", key.0, key.1);
        let Some(job) = core.t.jobs.get(&key.0) else {
            wrong.push(format!("{name}: its job is not there"));
            continue;
        };
        if task.index >= job.next_fresh {
            wrong.push(format!("{name}: it has a row and counts as fresh"));
        }
        if task.state.is_terminal() {
            wrong.push(format!("{name}: it is over and still in memory"));
        }
        match (task.state, current.get(key)) {
            (JobState::Pending, None) => {}
            (JobState::Pending, Some(_)) => {
                wrong.push(format!("{name}: it waits and has an attempt"))
            }
            (_, None) => wrong.push(format!("{name}: it is active without an attempt")),
            (state, Some(attempt)) => {
                let fitting = match attempt.state {
                    AttemptState::Placed | AttemptState::Preparing | AttemptState::Ready => {
                        JobState::Preparing
                    }
                    AttemptState::Running => JobState::Running,
                    AttemptState::Stopping | AttemptState::Ended | AttemptState::Lost => {
                        JobState::Stopping
                    }
                };
                if state != fitting {
                    wrong.push(format!(
                        "{name}: it is {state} with an attempt that is {}",
                        attempt.state
                    ));
                }
                if attempt.id.attempt.0 != task.attempts {
                    wrong.push(format!(
                        "{name}: attempt {} is not its newest",
                        attempt.id.attempt
                    ));
                }
            }
        }
    }
}

fn check_attempt(core: &Core, attempt: &AttemptRecord, wrong: &mut Vec<String>) {
    let id = attempt.id;
    let mut expect = |holds: bool, what: &str| {
        if !holds {
            wrong.push(format!("{id}: {what}"));
        }
    };
    let job = core.t.jobs.get(&id.job);
    let over = attempt.state.is_over();
    expect(
        attempt.state != AttemptState::Ended,
        "it has ended and is still in memory",
    );
    expect(
        over || core.t.tasks.contains_key(&(id.job, id.task)),
        "its task is not there",
    );
    let decided = attempt.state == AttemptState::Stopping || over;
    expect(
        attempt.outcome.is_some() == decided,
        "its outcome and its state do not agree",
    );
    let nodes: BTreeSet<NodeId> = attempt.members.iter().map(|member| member.node).collect();
    expect(
        nodes.len() == attempt.members.len(),
        "two members are on one node",
    );
    let open = attempt
        .members
        .iter()
        .any(|member| member.phase != MemberPhase::Ended);
    expect(open, "all its members ended and it is not closed");
    expect(
        attempt.ready_at.is_none() || gang::go(attempt).is_some(),
        "it was told to go without a port",
    );
    if attempt.ready_at.is_some() {
        let ready = attempt
            .members
            .iter()
            .all(|member| member.phase != MemberPhase::Unconfirmed);
        expect(ready, "it was told to go and a member was never heard of");
    }
    for member in &attempt.members {
        let gpus = usize::try_from(member.resources.gpus).unwrap_or(usize::MAX);
        expect(
            member.gpu_uuids.len() == gpus,
            "a member's GPUs are not as many as it was given",
        );
        let known = core.t.nodes.contains_key(&member.node) || member.phase == MemberPhase::Ended;
        expect(known, "a member is on a node that is not there");
        expect(!member.address.is_empty(), "a member has no address");
        expect(
            !lingers(member) || !member.cleanup.is_empty(),
            "a member is quarantined and nothing is said to be left",
        );
    }
    let Some(job) = job else { return };
    expect(
        usize::try_from(job.spec.nodes).is_ok_and(|n| n == attempt.members.len()),
        "its gang is not whole",
    );
    expect(
        job.cancel.is_none() || attempt.outcome.is_some(),
        "it goes on and its job is cancelled",
    );
    if attempt.outcome == Some(Outcome::Succeeded) {
        let all = attempt.members.iter().enumerate().all(|(rank, member)| {
            is_over(member.phase) && gang::all_succeeded(&job.spec, rank, member)
        });
        expect(all, "it succeeded without the exit status 0 of every rank");
    }
}

fn check_bundles(core: &Core, wrong: &mut Vec<String>) {
    let mut by_node: BTreeMap<NodeId, BTreeSet<BundleRef>> = BTreeMap::new();
    let mut carried = BTreeSet::new();
    let mut held: BTreeMap<JobId, BTreeSet<TaskIndex>> = BTreeMap::new();
    for bundle in core.t.bundles.values() {
        by_node.entry(bundle.node).or_default().insert(bundle.id);
        let held = held.entry(bundle.id.job).or_default();
        check_tasks_of_bundle(core, bundle, held, &mut carried, wrong);
        check_bundle(core, bundle, wrong);
    }
    if carried != core.t.carried {
        wrong.push("the index of attempts in bundles is wrong".to_owned());
    }
    if by_node != core.t.bundles_by_node {
        wrong.push("the index of bundles by node is wrong".to_owned());
    }
    let unknown = |id: &&BundleRef| !core.t.bundles.contains_key(id);
    for id in core.live.paces.keys().filter(unknown) {
        wrong.push(format!("{id}: it is over and its pace is kept"));
    }
    let armed = core.live.armed_bundles.iter();
    let armed: BTreeSet<_> = armed.map(|(id, at)| (*at, *id)).collect();
    if armed != core.live.bundle_timers {
        wrong.push("the timers of bundles do not agree".to_owned());
    }
}

fn check_tasks_of_bundle(
    core: &Core,
    bundle: &BundleRecord,
    held: &mut BTreeSet<TaskIndex>,
    carried: &mut BTreeSet<AttemptRef>,
    wrong: &mut Vec<String>,
) {
    let lost = bundle.state == BundleState::Lost;
    for task in bundle.tasks.tasks() {
        let id = attempt_in_bundle(bundle.id.job, task);
        let mut expect = |holds: bool, what: &str| {
            if !holds {
                wrong.push(format!("{} of {}: {what}", task, bundle.id));
            }
        };
        let attempt = core.t.attempts.get(&id);
        expect(held.insert(task), "it is in another bundle, too");
        let given_up = attempt.is_some_and(|row| row.state == AttemptState::Lost);
        expect(given_up == lost, "it is lost and its bundle is not");
        if attempt.is_some() {
            carried.insert(id);
        } else {
            let row = core.t.tasks.contains_key(&(id.job, task));
            expect(!row, "it has a row and no attempt");
        }
    }
}

fn check_bundle(core: &Core, bundle: &BundleRecord, wrong: &mut Vec<String>) {
    let id = bundle.id;
    let mut expect = |holds: bool, what: &str| {
        if !holds {
            wrong.push(format!("{id}: {what}"));
        }
    };
    let lost = bundle.state == BundleState::Lost;
    let there = core.t.nodes.contains_key(&bundle.node);
    expect(there, "its node is not there");
    expect(bundle.slots > 0, "it has no slots");
    let armed = core.live.armed_bundles.contains_key(&id);
    expect(
        armed || bundle.state != BundleState::Placed,
        "nobody looks whether it is prepared",
    );
    let may_wait = matches!(bundle.state, BundleState::Placed | BundleState::Closing);
    expect(!armed || may_wait, "it has a timer and needs none");
    let Some(job) = core.t.jobs.get(&id.job) else {
        expect(
            lost || bundle.tasks.is_empty(),
            "its job is over and tasks are in it",
        );
        return;
    };
    expect(id.bundle <= job.bundles, "its number is still to be given");
    let last = bundle.tasks.ranges().last();
    expect(
        last.is_none_or(|range| range.last < job.next_fresh),
        "a task of it counts as fresh",
    );
    let stopped = lost || bundle.state == BundleState::Stopping;
    expect(
        job.cancel.is_none() || stopped,
        "it goes on and its job is cancelled",
    );
}

fn check_usage(core: &Core, wrong: &mut Vec<String>) {
    let mut usage: BTreeMap<NodeId, Usage> = BTreeMap::new();
    let mut on_node: BTreeMap<NodeId, BTreeSet<_>> = BTreeMap::new();
    let mut quarantined: BTreeMap<NodeId, BTreeSet<_>> = BTreeMap::new();
    for bundle in core.t.bundles.values() {
        if width(bundle) > 0 {
            usage.entry(bundle.node).or_default().add_bundle(bundle);
        }
    }
    for attempt in core.t.attempts.values() {
        if core.t.is_carried(attempt.id) {
            continue;
        }
        for member in &attempt.members {
            if member.phase != MemberPhase::Ended {
                on_node.entry(member.node).or_default().insert(attempt.id);
            }
            if lingers(member) {
                let there = quarantined.entry(member.node).or_default();
                there.insert(attempt.id);
            }
            if is_released(member.phase) {
                continue;
            }
            let used = usage.entry(member.node).or_default();
            for uuid in &member.gpu_uuids {
                if let Some(other) = used.gpus.get(uuid) {
                    wrong.push(format!(
                        "{uuid} on {} is given to {other} and {}",
                        member.node, attempt.id
                    ));
                }
            }
            used.add(attempt.id, member);
        }
    }
    if usage != core.t.usage {
        wrong.push(format!(
            "what is used is miscounted: {:?} is {usage:?}",
            core.t.usage
        ));
    }
    if on_node != core.t.on_node {
        wrong.push("the index of attempts by node is wrong".to_owned());
    }
    if quarantined != core.t.quarantined {
        wrong.push("the index of what is quarantined is wrong".to_owned());
    }
    for (id, used) in &usage {
        let Some(node) = core.t.nodes.get(id) else {
            continue;
        };
        // A machine may come back with less than it had; then nothing new is placed on it until that is in order.
        let shrunk = core.live.shrunk.contains(id);
        if !shrunk && !used.amounts.fits(&node.inventory.capacity) {
            wrong.push(format!(
                "more is given of {id} than it has: {:?}",
                used.amounts
            ));
        }
    }
}

fn check_users(core: &Core, wrong: &mut Vec<String>) {
    let mut counts: BTreeMap<UserName, usize> = BTreeMap::new();
    for job in core.t.jobs.values() {
        *counts.entry(job.owner.clone()).or_default() += 1;
    }
    if counts != core.t.jobs_per_user {
        wrong.push("the jobs of the users are miscounted".to_owned());
    }
    let unknown = |id: &&JobId| !core.t.jobs.contains_key(id);
    for id in core
        .t
        .pending
        .iter()
        .filter(unknown)
        .chain(core.t.active.keys().filter(unknown))
        .chain(core.t.bundled.keys().filter(unknown))
    {
        wrong.push(format!("{id}: it is indexed and not there"));
    }
}

fn check_nodes(core: &Core, wrong: &mut Vec<String>) {
    for node in core.t.nodes.values() {
        let id = node.id;
        let present = was_seen(node) && !is_lost(node.availability);
        let silent = present && is_unreachable(node.availability);
        if core.live.present.contains(&id) != present || core.live.silent.contains(&id) != silent {
            wrong.push(format!("{id}: it is miscounted among the silent"));
        }
        if id >= core.t.next_node {
            wrong.push(format!("{id}: its id is still to be given"));
        }
        if present && !silent && !core.live.armed.contains_key(&id) {
            wrong.push(format!("{id}: nobody looks whether it is silent"));
        }
    }
    let known = |id: &&NodeId| core.t.nodes.contains_key(id);
    let indexed = core
        .live
        .sessions
        .keys()
        .chain(&core.live.present)
        .chain(&core.live.silent);
    for id in indexed
        .chain(core.live.last_heard.keys())
        .filter(|id| !known(id))
    {
        wrong.push(format!("{id}: it was removed and is still indexed"));
    }
    let names: BTreeSet<&str> = core
        .t
        .nodes
        .values()
        .map(|node| node.name.as_str())
        .collect();
    if names.len() != core.t.nodes.len() {
        wrong.push("two nodes have one name".to_owned());
    }
}

fn check_timers(core: &Core, wrong: &mut Vec<String>) {
    let armed: BTreeSet<_> = core
        .live
        .armed
        .iter()
        .map(|(node, at)| (*at, *node))
        .collect();
    if armed != core.live.node_timers {
        wrong.push("the timers of the nodes do not agree".to_owned());
    }
    let prepare: BTreeSet<_> = core.live.prepare_timers.iter().map(|(_, id)| *id).collect();
    let waiting: BTreeSet<_> = core
        .t
        .attempts
        .values()
        .filter(|attempt| prepares(attempt) && !core.t.is_carried(attempt.id))
        .map(|attempt| attempt.id)
        .collect();
    let armed: BTreeSet<_> = core
        .live
        .prepare_armed
        .iter()
        .map(|(id, at)| (*at, *id))
        .collect();
    if prepare != waiting || armed != core.live.prepare_timers {
        wrong.push("the timers of attempts that prepare do not agree".to_owned());
    }
    wrong.extend(core.live.troubles.check());
    wrong.extend(core.live.crashes.check());
    let retries: BTreeSet<_> = core
        .live
        .not_before
        .iter()
        .map(|(key, at)| (*at, *key))
        .collect();
    if retries != core.live.retry_timers {
        wrong.push("the timers of tasks that wait for a retry do not agree".to_owned());
    }
    let hints = core
        .live
        .not_before
        .keys()
        .chain(core.live.avoid.keys())
        .chain(core.live.floors.keys());
    for job in &core.live.unbundled {
        if !core.t.jobs.contains_key(job) {
            wrong.push(format!("{job}: it is over and a hint about it is kept"));
        }
    }
    for key in hints.filter(|key| !core.t.jobs.contains_key(&key.0)) {
        wrong.push(format!("{}: it is over and a hint about it is kept", key.0));
    }
}

fn check_requests(core: &Core, wrong: &mut Vec<String>) {
    let ages: BTreeSet<_> = core
        .t
        .requests
        .iter()
        .map(|((owner, id), what)| (what.at, owner.clone(), id.clone()))
        .collect();
    if ages != core.t.request_ages {
        wrong.push("the ages of remembered requests do not agree".to_owned());
    }
}
