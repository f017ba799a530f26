//! The sentences about a job that waits: what it needs, what there is, what is missing where. They are part of the
//! product and tested like code. It must not decide anything.

use std::collections::BTreeSet;

use trainyard_common::resources::Resources;
use trainyard_common::spec::JobSpec;
use trainyard_common::units::{format_bytes, format_cpus};

use super::placement::{fits_free, is_targeted, suits};
use super::problem::{Demand, GpuView, Models, NodeView};
use crate::attempts::count;

/// Nodes named in one sentence.
const NAMED: usize = 2;
/// GPU models named in one sentence.
const MODELS_NAMED: usize = 6;

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
        let suits = |gpu: &&GpuView| (gpu.free || !free_only) && demand.takes(gpu);
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

/// What of a job no present node, or too few of them, could ever hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Impossible {
    /// The field of the specification that asks for too much, by its name in the job file.
    pub(crate) field: &'static str,
    /// What is needed, how many nodes could hold their part, and the most that there is of the field.
    pub(crate) message: String,
}

/// Why no set of these nodes could hold it even if empty. Called only if none can.
pub(crate) fn infeasible(
    nodes: &[NodeView],
    demand: &Demand,
    spec: &JobSpec,
    models: &Models,
) -> Impossible {
    let needs = needs(spec);
    let targeted: Vec<&NodeView> = nodes
        .iter()
        .filter(|node| is_targeted(node, demand))
        .collect();
    if targeted.is_empty() {
        let there: BTreeSet<&str> = nodes.iter().map(|node| node.target.as_str()).collect();
        let there: Vec<String> = there.into_iter().map(str::to_owned).collect();
        return Impossible {
            field: "targets",
            message: format!(
                "needs {needs}; no node is of that target, all of them are {}",
                list(&there)
            ),
        };
    }
    let of_target = match demand.targets.as_slice() {
        [] => "",
        _ => " of that target",
    };
    let suiting = targeted.iter().filter(|node| suits(node, demand)).count();
    if suiting == 0 {
        let (field, most) = too_much(&targeted, demand, models);
        let part = if demand.nodes > 1 { "a part" } else { "that" };
        let could = match targeted.len() {
            1 => format!("the only node{of_target} could not hold {part} even if empty"),
            of => format!("none of the {of} nodes{of_target} could hold {part} even if empty"),
        };
        return Impossible {
            field,
            message: format!("needs {needs}; {could}: {most}"),
        };
    }
    let could = format!(
        "{suiting} of the {}{of_target} could hold a part, and {} are asked for",
        count(targeted.len(), "node"),
        demand.nodes
    );
    let why = if suiting >= usize::try_from(demand.nodes).unwrap_or(usize::MAX) {
        "; they cannot reach each other: they are on different machines and too few have an address but loopback, which \
         an agent's advertise_address would give them"
            .to_owned()
    } else {
        let small = targeted.iter().find(|node| !suits(node, demand));
        let told = |node: &&NodeView| format!("; too small is {}", amounts_of(node, demand));
        small.map(told).unwrap_or_default()
    };
    Impossible {
        field: "nodes",
        message: format!("needs {needs}; {could}{why}"),
    }
}

/// The first field that is more than any one of these nodes has, and the most there is of it.
fn too_much(nodes: &[&NodeView], demand: &Demand, models: &Models) -> (&'static str, String) {
    let of_model = |gpu: &&GpuView| {
        demand
            .models
            .as_ref()
            .is_none_or(|models| models.contains(&gpu.model))
    };
    let all = || nodes.iter().flat_map(|node| &node.gpus);
    if demand.gpus > 0 {
        if all().next().is_none() {
            return ("gpus_per_node", "no node has a healthy GPU".to_owned());
        }
        let Some(memory) = all().filter(of_model).map(|gpu| gpu.memory_bytes).max() else {
            return (
                "gpu_type",
                format!("the GPU models are {}", named(all(), models)),
            );
        };
        if memory < demand.gpu_memory_bytes {
            let most = format!("the largest such GPU has {}", format_bytes(memory));
            return ("gpu_memory", most);
        }
    }
    let most = |amount: &dyn Fn(&NodeView) -> u64| {
        let best = nodes
            .iter()
            .max_by_key(|node| (amount(node), std::cmp::Reverse(node.id)));
        best.map_or((0, String::new()), |node| {
            (amount(node), format!("on {}", node.id))
        })
    };
    let (gpus, on) = most(&|node| usable_gpus(node, demand));
    if gpus < u64::from(demand.gpus) {
        return (
            "gpus_per_node",
            format!("the most is {} {on}", count_gpus(gpus, demand)),
        );
    }
    let (milli, on) = most(&|node| node.capacity.cpu_milli);
    if milli < demand.cpu_milli {
        return ("cpus_per_node", format!("the most is {} {on}", cpus(milli)));
    }
    let (bytes, on) = most(&|node| node.capacity.memory_bytes);
    if bytes < demand.memory_bytes {
        let most = format!("the most is {} of memory {on}", format_bytes(bytes));
        return ("memory_per_node", most);
    }
    let largest = nodes.iter().max_by_key(|node| {
        let Resources {
            cpu_milli,
            memory_bytes,
            gpus: _,
        } = node.capacity;
        let id = std::cmp::Reverse(node.id);
        (usable_gpus(node, demand), cpu_milli, memory_bytes, id)
    });
    let field = match demand.gpus {
        0 => "cpus_per_node",
        _ => "gpus_per_node",
    };
    let told = largest.map(|node| amounts_of(node, demand));
    let told = told.unwrap_or_default();
    (
        field,
        format!("none has all of it together; the largest is {told}"),
    )
}

/// `H100 and A100`: the models that there are, at most [`MODELS_NAMED`] by name.
fn named<'a>(gpus: impl Iterator<Item = &'a GpuView>, models: &Models) -> String {
    let there: BTreeSet<&str> = gpus.filter_map(|gpu| models.name(gpu.model)).collect();
    let mut parts: Vec<String> = there
        .iter()
        .take(MODELS_NAMED)
        .map(|model| (*model).to_owned())
        .collect();
    match there.len().saturating_sub(MODELS_NAMED) {
        0 => {}
        more => parts.push(format!("{more} more")),
    }
    list(&parts)
}

/// Healthy GPUs of a node that would do, as many as it offers.
fn usable_gpus(node: &NodeView, demand: &Demand) -> u64 {
    let gpus = node.gpus.iter().filter(|gpu| demand.takes(gpu)).count();
    u64::try_from(gpus)
        .unwrap_or(u64::MAX)
        .min(u64::from(node.capacity.gpus))
}

fn count_gpus(gpus: u64, demand: &Demand) -> String {
    let any = demand.models.is_none() && demand.gpu_memory_bytes == 0;
    let noun = if any { "GPU" } else { "such GPU" };
    count(usize::try_from(gpus).unwrap_or(usize::MAX), noun)
}

/// `n3 with 2 such GPUs, 4 CPUs and 16 GiB of memory`.
fn amounts_of(node: &NodeView, demand: &Demand) -> String {
    let mut parts = Vec::new();
    if demand.gpus > 0 {
        parts.push(count_gpus(usable_gpus(node, demand), demand));
    }
    parts.push(cpus(node.capacity.cpu_milli));
    parts.push(format!(
        "{} of memory",
        format_bytes(node.capacity.memory_bytes)
    ));
    format!("{} with {}", node.id, list(&parts))
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
