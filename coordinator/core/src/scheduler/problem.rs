//! The scheduling problem: nodes with what they have and what is free, and groups of equal tasks in queue order, all of
//! it ordinals and integer amounts. It must not know rows, sessions or the reasons why a node is not open.

use std::collections::{BTreeMap, BTreeSet};

use trainyard_common::ids::{JobId, NodeId, TaskIndex};
use trainyard_common::record::Target;
use trainyard_common::resources::Resources;

/// A GPU model, by its place in [`Models`].
pub(crate) type ModelId = u32;

/// A node as placement sees it. Its ordinal is its place in the slice; nodes are sorted by id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NodeView {
    pub(crate) id: NodeId,
    pub(crate) target: Target,
    /// Whether new work may be placed on it.
    pub(crate) open: bool,
    /// Whether to take it only if no others fit, whatever the job.
    pub(crate) doubtful: bool,
    /// What it has for jobs when nothing runs.
    pub(crate) capacity: Resources,
    /// What is free of it.
    pub(crate) free: Resources,
    /// Members that it may still take.
    pub(crate) slots: u32,
    /// Its healthy GPUs in index order.
    pub(crate) gpus: Vec<GpuView>,
    pub(crate) reach: Reach,
}

/// A healthy GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GpuView {
    pub(crate) model: ModelId,
    pub(crate) memory_bytes: u64,
    pub(crate) numa: Option<u32>,
    pub(crate) free: bool,
}

/// How other members reach a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reach {
    /// Its address only reaches its own machine, as all such nodes share.
    pub(crate) loopback: bool,
    /// Other machines reach it.
    pub(crate) remote: bool,
}

/// What each task of a group needs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Demand {
    /// Nodes of the gang.
    pub(crate) nodes: u32,
    /// Per node.
    pub(crate) cpu_milli: u64,
    /// Per node; 0 means that memory is not counted.
    pub(crate) memory_bytes: u64,
    /// Per node.
    pub(crate) gpus: u32,
    /// Models that will do; none means every model.
    pub(crate) models: Option<BTreeSet<ModelId>>,
    /// Least memory of each GPU.
    pub(crate) gpu_memory_bytes: u64,
    /// Targets in order of preference; empty means every node.
    pub(crate) targets: Vec<Target>,
}

impl Demand {
    pub(crate) fn amounts(&self) -> Resources {
        Resources {
            cpu_milli: self.cpu_milli,
            memory_bytes: self.memory_bytes,
            gpus: self.gpus,
        }
    }

    pub(crate) fn takes(&self, gpu: &GpuView) -> bool {
        gpu.memory_bytes >= self.gpu_memory_bytes
            && self
                .models
                .as_ref()
                .is_none_or(|models| models.contains(&gpu.model))
    }
}

/// Which tasks of a job a group stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Which {
    /// One that had an attempt.
    Again(TaskIndex),
    /// The next ones that never had one.
    Fresh,
}

/// Equal tasks of one job.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    pub(crate) job: JobId,
    pub(crate) which: Which,
    pub(crate) demand: Demand,
    /// How many of them may be placed now, at least 1.
    pub(crate) count: u32,
    /// Nodes to take only if no others fit.
    pub(crate) avoid: BTreeSet<NodeId>,
}

/// The GPU models of a cluster, numbered.
#[derive(Debug, Default)]
pub(crate) struct Models {
    names: Vec<String>,
    numbers: BTreeMap<String, ModelId>,
}

impl Models {
    pub(crate) fn number(&mut self, name: &str) -> ModelId {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        let number = ModelId::try_from(self.names.len()).unwrap_or(ModelId::MAX);
        self.names.push(name.to_owned());
        self.numbers.insert(name.to_owned(), number);
        number
    }

    /// The product name of a model.
    pub(crate) fn name(&self, model: ModelId) -> Option<&str> {
        let place = usize::try_from(model).ok()?;
        self.names.get(place).map(String::as_str)
    }

    /// The models that a request names: every run of letters and digits of it occurs in the name, in any case.
    pub(crate) fn matching(&self, wanted: &str) -> BTreeSet<ModelId> {
        let wanted = wanted.to_ascii_lowercase();
        let runs: Vec<&str> = wanted
            .split(|c: char| !c.is_ascii_alphanumeric())
            .filter(|run| !run.is_empty())
            .collect();
        self.numbers
            .iter()
            .filter(|(name, _)| {
                let name = name.to_ascii_lowercase();
                runs.iter().all(|run| name.contains(run))
            })
            .map(|(_, number)| *number)
            .collect()
    }
}
