//! What live members hold of the node, so that two never get the same GPU or more than there is, whatever the
//! coordinator believes.

use std::collections::{BTreeMap, BTreeSet};

use trainyard_common::ids::AttemptRef;
use trainyard_common::member::MemberSpec;
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::resources::Resources;
use trainyard_common::units::{format_bytes, format_cpus};

/// What the node has, and who holds what of it.
#[derive(Debug)]
pub(crate) struct Holdings<'a> {
    capacity: &'a Resources,
    gpus: &'a BTreeSet<String>,
    held: Resources,
    gpu_holders: BTreeMap<&'a str, AttemptRef>,
}

impl<'a> Holdings<'a> {
    /// Nobody holds anything.
    pub(crate) fn new(capacity: &'a Resources, gpus: &'a BTreeSet<String>) -> Self {
        Self {
            capacity,
            gpus,
            held: Resources::default(),
            gpu_holders: BTreeMap::new(),
        }
    }

    /// A live member holds what its specification says.
    pub(crate) fn add(&mut self, attempt: AttemptRef, spec: &'a MemberSpec) {
        if planted(Mutation::HoldingsIgnored) {
            return;
        }
        self.held = self.held.plus(&spec.resources);
        for uuid in &spec.gpu_uuids {
            self.gpu_holders.entry(uuid).or_insert(attempt);
        }
    }

    /// Whether a member can be given what it wants beside them.
    ///
    /// # Errors
    /// What is not there or held by whom, as a sentence without a final period.
    pub(crate) fn check(&self, spec: &MemberSpec) -> Result<(), String> {
        let mut own = BTreeSet::new();
        for uuid in &spec.gpu_uuids {
            if let Some(holder) = self.gpu_holders.get(uuid.as_str()) {
                return Err(format!("GPU {uuid} is in use by {holder}"));
            }
            if !self.gpus.contains(uuid) {
                return Err(format!("GPU {uuid} is not on this node"));
            }
            if !own.insert(uuid) {
                return Err(format!("GPU {uuid} is given twice"));
            }
        }
        if own.len() != spec.resources.gpus as usize {
            let (wanted, named) = (spec.resources.gpus, own.len());
            return Err(format!("{wanted} GPUs are wanted and {named} are named"));
        }
        self.check_amounts(&spec.resources)
    }

    /// # Errors
    /// What is not there, as a sentence without a final period.
    pub(crate) fn check_amounts(&self, wanted: &Resources) -> Result<(), String> {
        let total = self.held.plus(wanted);
        if total.cpu_milli > self.capacity.cpu_milli {
            let [wanted, held, capacity] =
                [wanted, &self.held, self.capacity].map(|amounts| format_cpus(amounts.cpu_milli));
            return Err(format!(
                "{wanted} CPUs are wanted, {held} of {capacity} are in use on this node"
            ));
        }
        if total.memory_bytes > self.capacity.memory_bytes {
            let [wanted, held, capacity] = [wanted, &self.held, self.capacity]
                .map(|amounts| format_bytes(amounts.memory_bytes));
            return Err(format!(
                "{wanted} of memory are wanted, {held} of {capacity} are in use on this node"
            ));
        }
        Ok(())
    }
}
