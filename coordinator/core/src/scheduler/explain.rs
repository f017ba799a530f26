//! The sentences about a job that waits: what it needs, what there is, what is missing where. They are part of the
//! product and tested like code. It must not decide anything.

use trainyard_common::resources::Resources;
use trainyard_common::spec::JobSpec;
use trainyard_common::units::{format_bytes, format_cpus};

use super::placement::{fits_free, is_targeted, suits};
use super::problem::{Demand, NodeView};
use crate::attempts::count;

/// Nodes named in one sentence.
const NAMED: usize = 2;

/// `2 nodes with 8 H100 GPUs, 4 CPUs and 16 GiB each`.
pub(crate) fn needs(spec: &JobSpec) -> String {
    let Resources {
        cpu_milli,
        memory_bytes,
        gpus,
    } = spec.resources_per_node;
    let mut parts = Vec::new();
    if gpus > 0 {
        let model = spec
            .gpu_type
            .as_deref()
            .map(|model| format!("{model} "))
            .unwrap_or_default();
        let memory = spec
            .gpu_memory_bytes
            .map(|least| format!(" of {} or more", format_bytes(least)));
        let noun = if gpus == 1 { "GPU" } else { "GPUs" };
        parts.push(format!(
            "{gpus} {model}{noun}{}",
            memory.unwrap_or_default()
        ));
    }
    parts.push(cpus(cpu_milli));
    if memory_bytes > 0 {
        parts.push(format!("{} of memory", format_bytes(memory_bytes)));
    }
    let each = if spec.nodes > 1 { " each" } else { "" };
    let of = match spec.targets.len() {
        0 => String::new(),
        _ => format!(" of {}", spec.targets.join(" or ")),
    };
    let nodes = count(usize::try_from(spec.nodes).unwrap_or(usize::MAX), "node");
    format!("{nodes}{of} with {}{each}", list(&parts))
}

/// Why not enough is free: `needs …; 1 of 3 suitable nodes has that free; n3 has 4 of 8 GPUs free`.
pub(crate) fn blocked(nodes: &[NodeView], demand: &Demand, spec: &JobSpec) -> String {
    let suiting: Vec<&NodeView> = nodes
        .iter()
        .filter(|node| node.open && suits(node, demand))
        .collect();
    let (fitting, short): (Vec<&NodeView>, Vec<&NodeView>) = suiting
        .iter()
        .copied()
        .partition(|node| fits_free(node, demand));
    let missing: Vec<String> = short
        .iter()
        .take(NAMED)
        .map(|node| lacks(node, demand))
        .collect();
    let more = match short.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more are short too"),
    };
    format!(
        "needs {}; {} of {} free enough now; {}{more}",
        needs(spec),
        fitting.len(),
        count(suiting.len(), "suitable node"),
        missing.join(", "),
    )
}

/// What a node is short of.
fn lacks(node: &NodeView, demand: &Demand) -> String {
    let id = node.id;
    let (free, all) = (&node.free, &node.capacity);
    let takes = |free_only: bool| {
        let suits = |gpu: &&super::problem::GpuView| (gpu.free || !free_only) && demand.takes(gpu);
        node.gpus
            .iter()
            .filter(suits)
            .count()
            .min(usize::try_from(all.gpus).unwrap_or(usize::MAX))
    };
    if free.gpus < demand.gpus || takes(true) < usize::try_from(demand.gpus).unwrap_or(usize::MAX) {
        let free_gpus = takes(true).min(usize::try_from(free.gpus).unwrap_or(usize::MAX));
        return format!("{id} has {free_gpus} of {} GPUs free", takes(false));
    }
    if free.cpu_milli < demand.cpu_milli {
        let (free, all) = (format_cpus(free.cpu_milli), format_cpus(all.cpu_milli));
        return format!("{id} has {free} of {all} CPUs free");
    }
    if free.memory_bytes < demand.memory_bytes {
        let (free, all) = (
            format_bytes(free.memory_bytes),
            format_bytes(all.memory_bytes),
        );
        return format!("{id} has {free} of {all} of memory free");
    }
    format!("{id} has as many members as it takes")
}

/// Why no set of these nodes could hold it, and the largest there is.
pub(crate) fn infeasible(nodes: &[NodeView], demand: &Demand, spec: &JobSpec) -> String {
    let suiting: Vec<&NodeView> = nodes.iter().filter(|node| suits(node, demand)).collect();
    let of = nodes.len();
    let mut text = format!("needs {}", needs(spec));
    if suiting.len() >= usize::try_from(demand.nodes).unwrap_or(usize::MAX) {
        text += "; enough nodes could hold a part, but they cannot reach each other: they are on different machines \
                 and have no address but loopback";
        return text;
    }
    let could = match suiting.len() {
        0 => "none of them could hold that even if empty".to_owned(),
        some => format!("only {some} could hold a part even if empty"),
    };
    text += &match of {
        1 => "; there is 1 node, and it could not hold that even if empty".to_owned(),
        _ => format!("; there are {of} nodes, and {could}"),
    };
    let targeted = nodes.iter().filter(|node| is_targeted(node, demand));
    let largest = targeted.max_by_key(|node| {
        let gpus = node.gpus.iter().filter(|gpu| demand.takes(gpu)).count();
        (
            gpus,
            node.capacity.cpu_milli,
            node.capacity.memory_bytes,
            std::cmp::Reverse(node.id),
        )
    });
    text += &match largest {
        Some(node) => format!("; the largest possible is {}", largest_of(node, demand)),
        None => "; no node is of that target".to_owned(),
    };
    text
}

fn largest_of(node: &NodeView, demand: &Demand) -> String {
    let gpus = node.gpus.iter().filter(|gpu| demand.takes(gpu)).count();
    let gpus = gpus.min(usize::try_from(node.capacity.gpus).unwrap_or(usize::MAX));
    let mut parts = Vec::new();
    if demand.gpus > 0 {
        parts.push(format!(
            "{gpus} suitable {}",
            if gpus == 1 { "GPU" } else { "GPUs" }
        ));
    }
    parts.push(cpus(node.capacity.cpu_milli));
    parts.push(format!(
        "{} of memory",
        format_bytes(node.capacity.memory_bytes)
    ));
    format!("{} on {}", list(&parts), node.id)
}

fn cpus(milli: u64) -> String {
    format!(
        "{} {}",
        format_cpus(milli),
        if milli == 1000 { "CPU" } else { "CPUs" }
    )
}

fn list(parts: &[String]) -> String {
    match parts {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}
