//! First come, first served, and how many jobs there may be, held against the rows of each commit. It must not know how the
//! scheduler decides: that something was placed on a node proves that the node was open.

use std::collections::BTreeSet;

use trainyard_common::ids::{JobId, NodeId, TaskIndex};
use trainyard_common::record::{JobRecord, Record};
use trainyard_common::spec::JobSpec;
use trainyard_common::state::JobState;

use super::world::World;

/// What one commit did.
#[derive(Debug, Default)]
pub(crate) struct Order {
    /// Jobs that waited with all of their tasks before it.
    waiting: BTreeSet<JobId>,
    /// What got a place in it, and where.
    placed: Vec<(JobId, Vec<NodeId>)>,
    /// Nodes of which it has a row: what they had when something was placed is not known.
    changed: BTreeSet<NodeId>,
}

impl World {
    pub(crate) fn order_before_commit(&mut self, records: &[Record]) {
        let jobs = self.typed().jobs.values();
        let waiting = jobs
            .filter(|job| all_waits(job))
            .map(|job| job.id)
            .collect();
        let changed = |record: &Record| match record {
            Record::Node(node) => Some(node.id),
            _ => None,
        };
        let changed = records.iter().filter_map(changed).collect();
        self.oracle.order = Order {
            waiting,
            placed: Vec::new(),
            changed,
        };
    }

    pub(crate) fn note_placed(&mut self, job: JobId, nodes: impl IntoIterator<Item = NodeId>) {
        let nodes = nodes.into_iter().collect();
        self.oracle.order.placed.push((job, nodes));
    }

    pub(crate) fn check_order(&mut self) {
        self.check_live_jobs();
        let order = std::mem::take(&mut self.oracle.order);
        for (job, nodes) in &order.placed {
            let passed = order.waiting.range(..*job).copied();
            let passed = passed
                .filter(|earlier| self.could_have_had(*earlier, *job, nodes, &order.changed))
                .min();
            if order.waiting.range(..*job).next().is_some() {
                self.see("placed while an earlier job waits");
            }
            self.holds("I20", passed.is_none(), || {
                format!("{job} got {nodes:?}, which {passed:?} has waited for since before")
            });
        }
    }

    /// Whether a job still waits that the same nodes, if empty, could hold. Then it was first in line, and what came after
    /// it had to wait whether it would have fitted or not.
    fn could_have_had(
        &self,
        earlier: JobId,
        later: JobId,
        nodes: &[NodeId],
        changed: &BTreeSet<NodeId>,
    ) -> bool {
        let jobs = &self.typed().jobs;
        let (Some(earlier), Some(later)) = (jobs.get(&earlier), jobs.get(&later)) else {
            return false;
        };
        let (wanted, given) = (&earlier.spec, &later.spec);
        let enough = usize::try_from(wanted.nodes).is_ok_and(|wanted| wanted <= nodes.len());
        all_waits(earlier)
            && enough
            && gpus_suit(wanted, given)
            && nodes.iter().all(|id| {
                let node = self.typed().nodes.get(id);
                !changed.contains(id)
                    && node.is_some_and(|node| {
                        let target = node.target.as_str();
                        let targeted = wanted.targets.iter().any(|wanted| wanted == target);
                        let gpus = node.inventory.gpus.iter().filter(|gpu| gpu.healthy).count();
                        let gpus = u32::try_from(gpus).unwrap_or(u32::MAX);
                        (wanted.targets.is_empty() || targeted)
                            && wanted.resources_per_node.gpus <= gpus
                            && wanted.resources_per_node.fits(&node.inventory.capacity)
                    })
            })
    }

    /// No more jobs are there than may be, of one user and of all.
    fn check_live_jobs(&mut self) {
        let config = &self.swarm.config;
        let (most, most_own) = (config.max_live_jobs, config.max_live_jobs_per_user);
        let live = |job: &&JobRecord| !job.state.is_terminal();
        let mut owners: Vec<_> = self
            .typed()
            .jobs
            .values()
            .filter(live)
            .map(|job| &job.owner)
            .collect();
        owners.sort_unstable();
        let all = owners.len();
        let own = owners.chunk_by(|a, b| a == b).map(<[_]>::len).max();
        let own = own.unwrap_or_default();
        if all == most || own == most_own {
            self.see("as many jobs as there may be");
        }
        self.holds("I9", all <= most && own <= most_own, || {
            format!("{all} jobs are unfinished, {own} of one user")
        });
    }
}

/// Nothing of it had a place yet, and nothing but its turn keeps it from one.
fn all_waits(job: &JobRecord) -> bool {
    let fresh = job.next_fresh == TaskIndex(0);
    job.state == JobState::Pending && fresh && job.tasks.active == 0 && job.cancel.is_none()
}

/// GPUs of which the later job got as many are good enough for the earlier one, too.
fn gpus_suit(wanted: &JobSpec, given: &JobSpec) -> bool {
    let alike =
        (&wanted.gpu_type, wanted.gpu_memory_bytes) == (&given.gpu_type, given.gpu_memory_bytes);
    let (wanted, given) = (
        wanted.resources_per_node.gpus,
        given.resources_per_node.gpus,
    );
    wanted == 0 || (alike && wanted <= given)
}
