//! One round of scheduling: rows to a problem, the problem to a plan, the plan back to rows, checked again when applied.
//! The placement itself is in `placement.rs` and knows none of this; see README.md beside this file.

mod explain;
mod placement;
mod problem;

use std::collections::{BTreeMap, BTreeSet};

use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{AttemptNumber, AttemptRef, BundleRef, JobId, NodeId};
use trainyard_common::limits;
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::record::{AttemptRecord, JobRecord, MemberRecord, NodeRecord, Target};
use trainyard_common::resources::Resources;
use trainyard_common::spec::JobSpec;
use trainyard_common::state::{
    AttemptState, JobState, MemberPhase, NodePolicy, Reason, ReasonCode,
};
use trainyard_common::time::Timestamp;

use self::explain::Impossible;
use self::placement::{Bounds, Placement, Plan, Verdict, fits_empty, solve, suits};
use self::problem::{Demand, GpuView, Group, Models, NodeView, Reach, Which};
use crate::Core;
use crate::config::{BEHIND_NAMED, BEHIND_TOLD, MAX_PLACEMENTS_PER_ROUND, MAX_TOLD_PER_ROUND};
use crate::effect::{Effect, Urgency};
use crate::gang;
use crate::sessions::was_seen;
use crate::tables::{Usage, fresh_tasks};
use crate::timers::{is_lost, is_ready};

impl Core {
    /// Places what can be placed and tells the others why they wait.
    pub(crate) fn round(&mut self, now: Timestamp) {
        if self.awaits_nodes(now) {
            return self.tell_awaiting();
        }
        if self.t.pending.is_empty() {
            return;
        }
        let (mut nodes, models) = self.view();
        self.hold_back(now, &mut nodes);
        let bounds = Bounds {
            placements: MAX_PLACEMENTS_PER_ROUND,
            behind: BEHIND_TOLD,
        };
        let passed = usize::from(planted(Mutation::OldestLeftOut));
        let waiting = self.t.pending.iter().skip(passed);
        let groups = waiting.filter_map(|id| self.t.jobs.get(id));
        let plan = solve(
            &mut nodes,
            groups.flat_map(|job| self.groups(now, job, &models)),
            bounds,
        );
        let ids: Vec<NodeId> = nodes.iter().map(|node| node.id).collect();
        let mut handed = BTreeSet::new();
        for planned in plan
            .placements
            .chunk_by(|a, b| (a.job, a.which) == (b.job, b.which))
        {
            handed.extend(self.apply_all(now, planned, &ids));
        }
        handed.extend(self.fill_ahead(plan.reached));
        // Fresh tasks also run out where they are placed one by one.
        let fresh = plan.placements.iter().filter(|p| p.which == Which::Fresh);
        self.tell_handed(handed, fresh.map(|placement| placement.job).collect());
        self.wants_schedule |= plan.more;
        let sight = Sight {
            now,
            nodes: &nodes,
            models: &models,
        };
        self.explain(&plan, sight);
    }

    /// Makes placements of one group true. Fresh tasks that may be bundled are handed out together; gives the bundles
    /// that changed by that.
    fn apply_all(
        &mut self,
        now: Timestamp,
        planned: &[Placement],
        ids: &[NodeId],
    ) -> BTreeSet<BundleRef> {
        let mut handed = BTreeSet::new();
        let Some(first) = planned.first() else {
            return handed;
        };
        let bundled = first.which == Which::Fresh
            && self
                .t
                .jobs
                .get(&first.job)
                .is_some_and(|job| self.bundles_tasks(job));
        if !bundled {
            self.apply_each(now, planned, ids);
            return handed;
        }
        let mut by_node: BTreeMap<usize, u32> = BTreeMap::new();
        for seat in planned.iter().flat_map(|placement| &placement.members) {
            *by_node.entry(seat.node).or_default() += 1;
        }
        for (ordinal, tasks) in by_node {
            let open = |node: &&NodeId| {
                let node = self.t.nodes.get(node);
                node.is_some_and(|node| self.is_open(node))
            };
            let node = ids.get(ordinal).filter(open).copied();
            match node.and_then(|node| self.hand_out(now, first.job, node, tasks)) {
                Some((changed, left)) => {
                    node.into_iter()
                        .for_each(|node| self.live.troubles.tried(now, node));
                    handed.extend(changed);
                    let here = |placement: &&Placement| {
                        placement.members.iter().any(|seat| seat.node == ordinal)
                    };
                    let left = usize::try_from(left).unwrap_or(usize::MAX);
                    let rest = planned.iter().filter(here).take(left);
                    self.apply_each(now, rest, ids);
                }
                None => self.does_not_hold(first.job),
            }
        }
        handed
    }

    fn apply_each<'a>(
        &mut self,
        now: Timestamp,
        planned: impl IntoIterator<Item = &'a Placement>,
        ids: &[NodeId],
    ) {
        for placement in planned {
            if self.apply(now, placement, ids).is_none() {
                self.does_not_hold(placement.job);
            }
        }
    }

    fn does_not_hold(&mut self, job: JobId) {
        let message = format!("a planned place for {job} does not hold");
        let reason = Reason::new(ReasonCode::InsufficientFree, message);
        self.later.push(Effect::Note(Urgency::Error, None, reason));
    }

    /// What is free of a node.
    pub(crate) fn free_on(&self, node: NodeId) -> Option<Resources> {
        let record = self.t.nodes.get(&node)?;
        let none = Usage::default();
        Some(free(record, self.t.usage.get(&node).unwrap_or(&none)))
    }

    /// Every node that was seen and is not lost, as placement sees it. Models are numbered on the way.
    fn view(&self) -> (Vec<NodeView>, Models) {
        let mut models = Models::default();
        let present = self
            .t
            .nodes
            .values()
            .filter(|node| was_seen(node) && !is_lost(node.availability));
        let nodes = present
            .map(|node| {
                node_view(
                    node,
                    self.is_open(node),
                    self.t.usage.get(&node.id),
                    &mut models,
                )
            })
            .collect();
        (nodes, models)
    }

    /// Keeps work away from nodes that could not prepare lately, and lets one member try where the pause is over.
    fn hold_back(&self, now: Timestamp, nodes: &mut [NodeView]) {
        for node in nodes {
            if self.live.troubles.pauses(now, node.id) || self.live.crashes.pauses(node.id) {
                node.open = false;
            } else if self.live.troubles.is_on_trial(now, node.id) {
                node.doubtful = true;
                node.slots = node.slots.min(1);
            }
        }
    }

    /// Whether new work may be placed on the node.
    pub(crate) fn is_open(&self, node: &NodeRecord) -> bool {
        is_ready(node.availability)
            && (node.policy == NodePolicy::Active || planted(Mutation::CordonIgnored))
            && self.live.sessions.contains_key(&node.id)
            && !self.live.suspects.contains(&node.id)
            && !self.is_quarantined(node.id)
    }

    /// The tasks of a job that may be placed now: those that had an attempt first, then the fresh ones.
    fn groups(&self, now: Timestamp, job: &JobRecord, models: &Models) -> Vec<Group> {
        let most = job
            .spec
            .array
            .and_then(|array| array.max_running)
            .unwrap_or(u32::MAX);
        // Of a bundle only what runs at a time counts, not what it holds ahead.
        let bundled = self.t.bundled.get(&job.id).copied().unwrap_or_default();
        let single = job.tasks.active.saturating_sub(bundled.tasks);
        let mut room = most.saturating_sub(single.saturating_add(bundled.width));
        let demand = demand(&job.spec, models);
        let mut groups = Vec::new();
        let fresh = fresh_tasks(job);
        if job.tasks.pending > fresh {
            let waiting = self
                .t
                .tasks_of(job.id)
                .filter(|task| task.state == JobState::Pending);
            for task in waiting {
                let key = (job.id, task.index);
                // Tasks beyond the bound of a round cannot be placed in it anyhow.
                if room == 0 || groups.len() > MAX_PLACEMENTS_PER_ROUND {
                    break;
                }
                if self.live.not_before.get(&key).is_some_and(|at| *at > now) {
                    continue;
                }
                room -= 1;
                groups.push(Group {
                    job: job.id,
                    which: Which::Again(task.index),
                    demand: demand.clone(),
                    count: 1,
                    avoid: self.live.avoid.get(&key).cloned().unwrap_or_default(),
                });
            }
        }
        let count = fresh.min(room);
        if count > 0 {
            let (which, avoid) = (Which::Fresh, BTreeSet::new());
            groups.push(Group {
                job: job.id,
                which,
                demand,
                count,
                avoid,
            });
        }
        groups
    }

    /// Makes a placement true, if everything it builds on is.
    fn apply(&mut self, now: Timestamp, placement: &Placement, ids: &[NodeId]) -> Option<()> {
        let job = self.t.jobs.get(&placement.job)?;
        let amounts = job.spec.resources_per_node;
        let mut members = Vec::new();
        let mut distinct = BTreeSet::new();
        let mut nodes = Vec::new();
        for seat in &placement.members {
            let node = self.t.nodes.get(ids.get(seat.node)?)?;
            let gpus = healthy_gpus(node);
            let gpu_uuids: Option<Vec<String>> = seat
                .gpus
                .iter()
                .map(|gpu| Some(gpus.get(*gpu)?.uuid.clone()))
                .collect();
            let gpu_uuids = gpu_uuids?;
            let usage = self.t.usage.get(&node.id).cloned().unwrap_or_default();
            let free = free(node, &usage);
            let gpus_free = gpu_uuids.iter().all(|uuid| !usage.gpus.contains_key(uuid))
                && gpu_uuids.len() == usize::try_from(amounts.gpus).ok()?;
            if !self.is_open(node)
                || !amounts.fits(&free)
                || !gpus_free
                || !distinct.insert(node.id)
            {
                return None;
            }
            nodes.push(node);
            members.push(MemberRecord {
                node: node.id,
                resources: amounts,
                gpu_uuids,
                phase: MemberPhase::Unconfirmed,
                address: String::new(),
                port: None,
                ranks: Vec::new(),
                outputs: None,
                checkpoint: None,
                warning: String::new(),
                cleanup: String::new(),
            });
        }
        if members.len() != usize::try_from(job.spec.nodes).ok()? {
            return None;
        }
        for (member, address) in members.iter_mut().zip(gang::addresses(&nodes)?) {
            member.address = address;
        }
        self.start_attempt(now, placement, members)
    }

    fn start_attempt(
        &mut self,
        now: Timestamp,
        placement: &Placement,
        members: Vec<MemberRecord>,
    ) -> Option<()> {
        let first: Vec<String> = members
            .iter()
            .take(4)
            .map(|member| member.node.to_string())
            .collect();
        let more = if members.len() > first.len() {
            ", …"
        } else {
            ""
        };
        let on = format!("has a place on {}{more}", first.join(", "));
        let reason = Reason::new(ReasonCode::Placed, on);
        let index = match placement.which {
            Which::Fresh => self.t.take_fresh(placement.job, reason.clone())?,
            Which::Again(index) => {
                let waits = self.t.tasks.get(&(placement.job, index))?.state == JobState::Pending;
                waits.then_some(index)?
            }
        };
        let key = (placement.job, index);
        // From now on the row knows.
        let floor = self.live.floors.remove(&key).unwrap_or_default();
        let task = self.t.task_mut(key)?;
        let step = u32::from(task.attempts == 0 || !planted(Mutation::RetryKeepsNumber));
        task.attempts = task.attempts.max(floor).saturating_add(step);
        let id = AttemptRef {
            job: key.0,
            task: index,
            attempt: AttemptNumber(task.attempts),
        };
        let resume_from = task.checkpoints.clone();
        let (owner, workspace) = (task.owner.clone(), task.workspace.clone());
        self.live.clear_delay(key);
        self.t
            .set_task(key, now, JobState::Preparing, reason.clone());
        let ranks = members.len();
        let lease = self.lease_for(id.job, ranks);
        let nodes: Vec<NodeId> = members.iter().map(|member| member.node).collect();
        self.t.insert_attempt(AttemptRecord {
            id,
            owner,
            workspace,
            state: AttemptState::Placed,
            reason,
            outcome: None,
            exit: None,
            failed_rank: None,
            members,
            resume_from,
            placed_at: now,
            ready_at: None,
            started_at: None,
            ended_at: None,
            lease,
        });
        let from = now.max(self.live.lease_base);
        self.arm_prepare(from, id);
        for node in nodes {
            self.live.troubles.tried(now, node);
        }
        for rank in 0..ranks {
            self.tell(id, rank);
        }
        Some(())
    }

    /// Tells each job that waits why, if that changed. What is beyond the bound of a round is told in the next one.
    fn explain(&mut self, plan: &Plan, sight: Sight<'_>) {
        // A retry and the fresh tasks of a job have the same demand; the first that waits speaks for the job.
        let mut told: BTreeSet<JobId> = BTreeSet::new();
        let mut impossible = BTreeMap::new();
        let mut changed = 0;
        for (id, demand, verdict) in &plan.verdicts {
            let Some(job) = self.t.jobs.get(id) else {
                continue;
            };
            if *verdict == Verdict::Placed || job.state != JobState::Pending || !told.insert(*id) {
                continue;
            }
            // States are derived later in this call; a job of which a task was just placed does not wait.
            if job.tasks.active > 0 {
                continue;
            }
            let made;
            let reason = if *verdict == Verdict::Infeasible {
                // Worked out once for all jobs that ask for the same: it goes through every node.
                let make = || self.infeasible_reason(&job.spec, demand, sight);
                let asked = asked(&job.spec, demand);
                &*impossible.entry(asked).or_insert_with(make)
            } else {
                made = self.reason(job, demand, verdict, sight);
                &made
            };
            if job.reason == *reason {
                continue;
            }
            if changed == MAX_TOLD_PER_ROUND {
                self.wants_schedule = true;
                return;
            }
            changed += 1;
            if let Some(job) = self.t.job_mut(*id) {
                job.reason = reason.clone();
            }
        }
    }

    fn reason(
        &self,
        job: &JobRecord,
        demand: &Demand,
        verdict: &Verdict,
        sight: Sight<'_>,
    ) -> Reason {
        match verdict {
            Verdict::Placed | Verdict::Blocked => {
                let mut message = explain::blocked(sight.nodes, demand, &job.spec);
                let suiting = sight.nodes.iter().filter(|node| suits(node, demand));
                let told = suiting.filter_map(|node| self.why_it_pauses(sight.now, node.id));
                for told in told.take(TROUBLES_NAMED) {
                    message = format!("{message}; {told}");
                }
                Reason::new(ReasonCode::InsufficientFree, message)
            }
            Verdict::Infeasible => self.infeasible_reason(&job.spec, demand, sight),
            Verdict::Behind { head, position } if *position <= BEHIND_NAMED => {
                let message =
                    format!("waits behind {head}, which is first in line and does not fit yet");
                Reason::new(ReasonCode::BehindEarlierJob, message)
            }
            Verdict::Behind { .. } => {
                Reason::new(ReasonCode::BehindEarlierJob, "waits behind earlier jobs")
            }
        }
    }

    /// Why a node that is in order gets no new work for a while.
    fn why_it_pauses(&self, now: Timestamp, node: NodeId) -> Option<String> {
        let told = self.live.troubles.told(now, node);
        told.or_else(|| self.live.crashes.told_briefly(node))
    }

    /// Why the open nodes could never hold it: there is none, others could, or none could.
    fn infeasible_reason(
        &self,
        spec: &JobSpec,
        demand: &Demand,
        Sight { now, nodes, models }: Sight<'_>,
    ) -> Reason {
        if nodes.is_empty() {
            return no_node_yet();
        }
        let mut all = nodes.to_vec();
        all.iter_mut().for_each(|node| node.open = true);
        if !fits_empty(&all, demand) {
            let impossible = explain::infeasible(nodes, demand, spec, models);
            return Reason::new(ReasonCode::Infeasible, impossible.message);
        }
        let mut closed: Vec<&NodeRecord> = nodes
            .iter()
            .filter(|node| !node.open && suits(node, demand))
            .filter_map(|node| self.t.nodes.get(&node.id))
            .collect();
        // Those that only pause are named first: they are what it waits for.
        closed.sort_by_key(|node| !self.is_open(node));
        let is_silent =
            |node: &&NodeRecord| node.policy == NodePolicy::Active && !self.is_quarantined(node.id);
        let is_quarantined = |node: &&NodeRecord| self.is_quarantined(node.id);
        let code = if closed.first().is_some_and(|node| self.is_open(node)) {
            ReasonCode::PrepareFailed
        } else if closed.iter().any(is_silent) {
            ReasonCode::NodeUnreachable
        } else if closed.iter().any(is_quarantined) {
            ReasonCode::CleanupPending
        } else {
            ReasonCode::Operator
        };
        let first: Vec<String> = closed
            .iter()
            .take(3)
            .map(|node| {
                if self.is_open(node)
                    && let Some(told) = self.why_it_pauses(now, node.id)
                {
                    return told;
                }
                let why = match node.policy {
                    NodePolicy::Active if self.is_quarantined(node.id) => {
                        "quarantined, as processes there outlive SIGKILL"
                    }
                    NodePolicy::Active if self.live.suspects.contains(&node.id) => {
                        "not heard of for a while"
                    }
                    NodePolicy::Active => "not in session",
                    NodePolicy::Cordoned => "cordoned",
                    NodePolicy::Draining => "draining",
                };
                format!("{} is {why}", node.id)
            })
            .collect();
        let more = match closed.len().saturating_sub(first.len()) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let message = format!(
            "needs {}; what could hold it takes no new work: {}{more}",
            explain::needs(spec),
            first.join(", ")
        );
        Reason::new(code, message)
    }

    /// The reason of a job that was just submitted, or the refusal of one that no present node could ever hold.
    pub(crate) fn first_reason(
        &mut self,
        spec: &JobSpec,
        allow_infeasible: bool,
    ) -> Result<Reason, Refusal> {
        let mut shapes = self.live.shapes.take().unwrap_or_else(|| self.shapes());
        let reason = shapes.first_reason(spec, allow_infeasible);
        self.live.shapes = Some(shapes);
        reason
    }

    fn shapes(&self) -> Shapes {
        let (mut nodes, models) = self.view();
        nodes.iter_mut().for_each(|node| node.open = true);
        Shapes {
            nodes,
            models,
            feasible: BTreeMap::new(),
        }
    }
}

/// Nodes named beside what a job lacks because they could not prepare lately.
const TROUBLES_NAMED: usize = 2;

/// What the sentence about a job that cannot fit is made of beside the nodes.
fn asked(spec: &JobSpec, demand: &Demand) -> (Demand, Option<String>, Option<u64>, Vec<String>) {
    (
        demand.clone(),
        spec.gpu_type.clone(),
        spec.gpu_memory_bytes,
        spec.targets.clone(),
    )
}

/// What a round saw, to explain from.
#[derive(Clone, Copy)]
struct Sight<'a> {
    now: Timestamp,
    nodes: &'a [NodeView],
    models: &'a Models,
}

/// What the present nodes could hold if they were empty and open, kept between submits because working it out takes
/// milliseconds with thousands of nodes. Thrown away whenever a node comes, goes or changes.
#[derive(Debug)]
pub(crate) struct Shapes {
    nodes: Vec<NodeView>,
    models: Models,
    feasible: BTreeMap<Demand, bool>,
}

/// Distinct demands remembered in [`Shapes`]; users mostly submit the same few.
const MAX_REMEMBERED_DEMANDS: usize = 1000;

impl Shapes {
    fn first_reason(&mut self, spec: &JobSpec, allow_infeasible: bool) -> Result<Reason, Refusal> {
        if self.nodes.is_empty() {
            return Ok(no_node_yet());
        }
        let demand = demand(spec, &self.models);
        if self.feasible.len() >= MAX_REMEMBERED_DEMANDS {
            self.feasible.clear();
        }
        let fits = || fits_empty(&self.nodes, &demand);
        if *self.feasible.entry(demand.clone()).or_insert_with(fits) {
            return Ok(Reason::new(ReasonCode::Queued, "waits for its first turn"));
        }
        let Impossible { field, message } =
            explain::infeasible(&self.nodes, &demand, spec, &self.models);
        if allow_infeasible {
            return Ok(Reason::new(ReasonCode::Infeasible, message));
        }
        let remedy = "ask for less, add nodes, or submit with --allow-infeasible to wait for them";
        let message = format!("{field}: {message}; {remedy}");
        let code = ErrorCode::FailedPrecondition;
        Err(Refusal::new(code, "INFEASIBLE", message).at(field))
    }
}

fn no_node_yet() -> Reason {
    Reason::new(
        ReasonCode::Queued,
        "no node is there yet; it starts when one has joined that can hold it",
    )
}

fn healthy_gpus(node: &NodeRecord) -> Vec<&trainyard_common::inventory::Gpu> {
    let mut gpus: Vec<_> = node
        .inventory
        .gpus
        .iter()
        .filter(|gpu| gpu.healthy)
        .collect();
    gpus.sort_by_key(|gpu| gpu.index);
    gpus
}

/// What is free of a node's amounts. Nothing, if it has less than before and more is used than it has.
fn free(node: &NodeRecord, usage: &Usage) -> Resources {
    let (all, used) = (&node.inventory.capacity, &usage.amounts);
    Resources {
        cpu_milli: match planted(Mutation::UsedCpusFree) {
            true => all.cpu_milli,
            false => all.cpu_milli.saturating_sub(used.cpu_milli),
        },
        memory_bytes: all.memory_bytes.saturating_sub(used.memory_bytes),
        gpus: all.gpus.saturating_sub(used.gpus),
    }
}

fn node_view(
    node: &NodeRecord,
    open: bool,
    usage: Option<&Usage>,
    models: &mut Models,
) -> NodeView {
    let none = Usage::default();
    let usage = usage.unwrap_or(&none);
    let gpus = healthy_gpus(node)
        .into_iter()
        .map(|gpu| GpuView {
            model: models.number(&gpu.model),
            memory_bytes: gpu.memory_bytes,
            numa: gpu.numa_node,
            free: !usage.gpus.contains_key(&gpu.uuid)
                || (planted(Mutation::FirstGpuFree) && gpu.index == 0),
        })
        .collect();
    let most = u32::try_from(limits::MAX_MEMBERS_PER_NODE).unwrap_or(u32::MAX);
    NodeView {
        id: node.id,
        target: node.target,
        open,
        doubtful: false,
        capacity: node.inventory.capacity,
        free: free(node, usage),
        slots: most.saturating_sub(usage.members),
        gpus,
        reach: Reach {
            loopback: gang::is_loopback(&node.address),
            remote: gang::remote_address(node).is_some(),
        },
    }
}

fn demand(spec: &JobSpec, models: &Models) -> Demand {
    let Resources {
        cpu_milli,
        memory_bytes,
        gpus,
    } = spec.resources_per_node;
    Demand {
        nodes: spec.nodes,
        cpu_milli,
        memory_bytes,
        gpus,
        models: spec
            .gpu_type
            .as_deref()
            .map(|wanted| models.matching(wanted)),
        gpu_memory_bytes: spec.gpu_memory_bytes.unwrap_or_default(),
        targets: spec
            .targets
            .iter()
            .filter_map(|target| target.parse::<Target>().ok())
            .collect(),
    }
}
