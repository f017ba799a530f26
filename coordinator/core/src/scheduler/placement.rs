//! The placement itself: a pure function from a problem to a plan. First come, first served, whole gangs only; see
//! README.md beside this file. It must not know rows, time or randomness: the same problem gives the same plan.

use std::collections::BTreeMap;

use trainyard_common::ids::JobId;
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::resources::Resources;

use super::problem::{Demand, Group, NodeView, Which};

/// A task's gang on its nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placement {
    pub(crate) job: JobId,
    pub(crate) which: Which,
    pub(crate) members: Vec<Seat>,
}

/// A member's place: the node's ordinal and the ordinals of its GPUs there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seat {
    pub(crate) node: usize,
    pub(crate) gpus: Vec<usize>,
}

/// What became of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Every task of it has a place.
    Placed,
    /// First in line, and not enough is free: everything behind it waits.
    Blocked,
    /// Open nodes could not hold one task of it even if they were empty. Does not hold up others.
    Infeasible,
    /// Waits for the blocked job.
    Behind {
        /// That job.
        head: JobId,
        /// Its place behind that job, from 1.
        position: usize,
    },
}

/// What a round decided.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) placements: Vec<Placement>,
    /// In queue order.
    pub(crate) verdicts: Vec<(JobId, Demand, Verdict)>,
    /// Whether the round stopped at its bound and another one is due.
    pub(crate) more: bool,
    /// The job that is first in line and did not fit, or at which the bound was met: those behind it get nothing.
    pub(crate) reached: Option<JobId>,
}

/// How much one round may do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) placements: usize,
    /// Groups looked at behind a blocked head, or while no node is open.
    pub(crate) behind: usize,
}

/// Places what can be placed, in order, and takes it from `nodes`.
pub(crate) fn solve(
    nodes: &mut [NodeView],
    groups: impl IntoIterator<Item = Group>,
    bounds: Bounds,
) -> Plan {
    let mut plan = Plan::default();
    let mut feasible: BTreeMap<Demand, bool> = BTreeMap::new();
    let mut head: Option<JobId> = None;
    let mut behind = 0;
    // Nothing gets a place then, so that no job further back has to be looked at for one.
    let all_closed = nodes.iter().all(|node| !node.open);
    for group in groups {
        let could = *feasible
            .entry(group.demand.clone())
            .or_insert_with(|| fits_empty(nodes, &group.demand));
        let verdict = match head {
            _ if !could => Verdict::Infeasible,
            // The other tasks of the head are told with it.
            Some(head) if head == group.job => continue,
            Some(head) => Verdict::Behind {
                head,
                position: behind,
            },
            None => match place_group(nodes, &group, bounds, &mut plan) {
                Some(verdict) => verdict,
                None => {
                    plan.more = true;
                    plan.reached = Some(group.job);
                    return plan;
                }
            },
        };
        if verdict == Verdict::Blocked && !planted(Mutation::HeadIsPassed) {
            head = Some(group.job);
            plan.reached = head;
        }
        if head.is_some() || all_closed {
            behind += 1;
        }
        plan.verdicts.push((group.job, group.demand, verdict));
        if behind > bounds.behind {
            break;
        }
    }
    plan
}

/// Nothing if the bound of the round was met.
fn place_group(
    nodes: &mut [NodeView],
    group: &Group,
    bounds: Bounds,
    plan: &mut Plan,
) -> Option<Verdict> {
    for _ in 0..group.count {
        if plan.placements.len() >= bounds.placements {
            return None;
        }
        let Some(members) = place(nodes, group) else {
            return Some(Verdict::Blocked);
        };
        for seat in &members {
            take(&mut nodes[seat.node], seat, &group.demand);
        }
        plan.placements.push(Placement {
            job: group.job,
            which: group.which,
            members,
        });
    }
    Some(Verdict::Placed)
}

fn take(node: &mut NodeView, seat: &Seat, demand: &Demand) {
    node.free = node.free.minus(&demand.amounts()).unwrap_or_default();
    node.slots = node.slots.saturating_sub(1);
    for gpu in &seat.gpus {
        node.gpus[*gpu].free = false;
    }
}

/// How well a node suits, smallest first. The id comes last, so that no two nodes are equal.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Score {
    /// An earlier attempt failed there, or something of any job could not be prepared there.
    avoided: bool,
    /// Place of the node's target in the job's list.
    preference: usize,
    gpus_left: u32,
    cpu_left: u64,
    memory_left: u64,
    node: usize,
}

fn place(nodes: &[NodeView], group: &Group) -> Option<Vec<Seat>> {
    let demand = &group.demand;
    let mut scores: Vec<Score> = nodes
        .iter()
        .enumerate()
        .filter(|(_, node)| node.open && fits_free(node, demand))
        .filter_map(|(ordinal, node)| {
            let left = node.free.minus(&demand.amounts())?;
            Some(Score {
                avoided: node.doubtful || group.avoid.contains(&node.id),
                preference: demand
                    .targets
                    .iter()
                    .position(|target| *target == node.target)
                    .unwrap_or(0),
                gpus_left: left.gpus,
                cpu_left: left.cpu_milli,
                memory_left: left.memory_bytes,
                node: ordinal,
            })
        })
        .collect();
    scores.sort_unstable();
    let wanted = usize::try_from(demand.nodes).ok()?;
    let seats = |allowed: &dyn Fn(&NodeView) -> bool| {
        let chosen: Vec<Seat> = scores
            .iter()
            .filter(|score| allowed(&nodes[score.node]))
            .take(wanted)
            .map(|score| Seat {
                node: score.node,
                gpus: choose_gpus(&nodes[score.node], demand),
            })
            .collect();
        (chosen.len() == wanted).then_some(chosen)
    };
    if wanted == 1 {
        return seats(&|_| true);
    }
    // The nodes of one machine need no network; otherwise every member has to be reached from others.
    seats(&|node| node.reach.loopback).or_else(|| seats(&|node| node.reach.remote))
}

/// Whether the node may ever hold a member of this demand, whatever runs on it now.
pub(crate) fn suits(node: &NodeView, demand: &Demand) -> bool {
    let gpus = node.gpus.iter().filter(|gpu| demand.takes(gpu)).count();
    is_targeted(node, demand) && demand.amounts().fits(&node.capacity) && enough(gpus, demand.gpus)
}

pub(crate) fn is_targeted(node: &NodeView, demand: &Demand) -> bool {
    demand.targets.is_empty() || demand.targets.contains(&node.target)
}

/// Whether the node can hold a member now.
pub(crate) fn fits_free(node: &NodeView, demand: &Demand) -> bool {
    let gpus = node
        .gpus
        .iter()
        .filter(|gpu| gpu.free && demand.takes(gpu))
        .count();
    let amounts: Resources = demand.amounts();
    is_targeted(node, demand)
        && node.slots > 0
        && amounts.fits(&node.free)
        && enough(gpus, demand.gpus)
}

fn enough(gpus: usize, wanted: u32) -> bool {
    usize::try_from(wanted).is_ok_and(|wanted| gpus >= wanted)
}

/// Whether the open nodes, if empty, could hold one gang.
pub(crate) fn fits_empty(nodes: &[NodeView], demand: &Demand) -> bool {
    let suiting = || nodes.iter().filter(|node| node.open && suits(node, demand));
    let enough = |number| enough(number, demand.nodes);
    if demand.nodes == 1 {
        return suiting().next().is_some();
    }
    enough(suiting().filter(|node| node.reach.loopback).count())
        || enough(suiting().filter(|node| node.reach.remote).count())
}

/// The GPUs of a node for one member: all on one NUMA node if possible, on the one that has the fewest to spare, so
/// that larger sets stay whole; then the lowest indices.
fn choose_gpus(node: &NodeView, demand: &Demand) -> Vec<usize> {
    let wanted = usize::try_from(demand.gpus).unwrap_or(usize::MAX);
    let free: Vec<usize> = (0..node.gpus.len())
        .filter(|gpu| node.gpus[*gpu].free && demand.takes(&node.gpus[*gpu]))
        .collect();
    let mut by_numa: BTreeMap<Option<u32>, Vec<usize>> = BTreeMap::new();
    for gpu in &free {
        by_numa.entry(node.gpus[*gpu].numa).or_default().push(*gpu);
    }
    let together = by_numa
        .iter()
        .filter(|(_, gpus)| gpus.len() >= wanted)
        .min_by_key(|(numa, gpus)| (gpus.len(), **numa))
        .map(|(_, gpus)| gpus);
    together
        .unwrap_or(&free)
        .iter()
        .copied()
        .take(wanted)
        .collect()
}
