//! What the core knows only while it runs: sessions, when each node was last heard of, timers, and hints for the next
//! placement. None of it is durable; after a start every lease begins anew, so our own downtime is nobody's fault.

use std::collections::{BTreeMap, BTreeSet};

use trainyard_common::ids::{AttemptRef, BundleRef, Incarnation, JobId, NodeId, TaskIndex};
use trainyard_common::time::Timestamp;

use crate::ahead::Pace;
use crate::crashes::Crashes;
use crate::event::SessionId;
use crate::restored::Awaited;
use crate::scheduler::Shapes;
use crate::tables::TaskKey;
use crate::trouble::Troubles;

#[derive(Debug, Default)]
pub(crate) struct Live {
    /// The one open session of each node that has one.
    pub(crate) sessions: BTreeMap<NodeId, SessionId>,
    /// Which of its sessions each node opened last, by the agent's own count.
    pub(crate) opened: BTreeMap<NodeId, (Incarnation, u64)>,
    /// When each node was last heard of, or its lease began anew.
    pub(crate) last_heard: BTreeMap<NodeId, Timestamp>,
    /// When to look at a node's silence again. May be early (a heartbeat does not move it), never late.
    pub(crate) node_timers: BTreeSet<(Timestamp, NodeId)>,
    /// The entry of `node_timers` by node.
    pub(crate) armed: BTreeMap<NodeId, Timestamp>,
    /// When an attempt that is not ready is given up.
    pub(crate) prepare_timers: BTreeSet<(Timestamp, AttemptRef)>,
    /// The entry of `prepare_timers` by attempt. Not worked out from rows: their times are of other starts, between which
    /// the wall clock may have jumped.
    pub(crate) prepare_armed: BTreeMap<AttemptRef, Timestamp>,
    /// When a bundle of which nothing runs yet is given up.
    pub(crate) bundle_timers: BTreeSet<(Timestamp, BundleRef)>,
    /// The same by bundle.
    pub(crate) armed_bundles: BTreeMap<BundleRef, Timestamp>,
    /// How quickly tasks of each bundle end, and what its agent was told of its reports.
    pub(crate) paces: BTreeMap<BundleRef, Pace>,
    /// Jobs that get no more bundles, because one could not be prepared.
    pub(crate) unbundled: BTreeSet<JobId>,
    /// When a task may be tried again.
    pub(crate) retry_timers: BTreeSet<(Timestamp, TaskKey)>,
    /// The same by task.
    pub(crate) not_before: BTreeMap<TaskKey, Timestamp>,
    /// Nodes on which earlier attempts of a task failed for a cause in the infrastructure: taken last.
    pub(crate) avoid: BTreeMap<TaskKey, BTreeSet<NodeId>>,
    /// Nodes that could not prepare lately.
    pub(crate) troubles: Troubles,
    /// Agents that crashed lately.
    pub(crate) crashes: Crashes,
    /// Highest attempt that an agent reported of a task whose row knows fewer (after a restored backup).
    pub(crate) floors: BTreeMap<TaskKey, u32>,
    /// Nodes without which nothing is placed after a restored backup.
    pub(crate) awaited: Awaited,
    /// Leases began anew at this time.
    pub(crate) lease_base: Timestamp,
    /// Nodes that were seen and are not lost.
    pub(crate) present: BTreeSet<NodeId>,
    /// Those of them that are unreachable.
    pub(crate) silent: BTreeSet<NodeId>,
    /// Nodes that are READY and not heard of for a while: they get no new work, as one that is cut off would let it wait.
    pub(crate) suspects: BTreeSet<NodeId>,
    /// Nodes that came back with less than is used of them. They are full until that is in order.
    pub(crate) shrunk: BTreeSet<NodeId>,
    /// What the nodes could hold, as long as no node changes.
    pub(crate) shapes: Option<Shapes>,
    /// Whether so many are silent at once that none is given up.
    pub(crate) braked: bool,
}

impl Live {
    pub(crate) fn arm_node(&mut self, node: NodeId, at: Option<Timestamp>) {
        if let Some(old) = self.armed.remove(&node) {
            self.node_timers.remove(&(old, node));
        }
        if let Some(at) = at {
            self.armed.insert(node, at);
            self.node_timers.insert((at, node));
        }
    }

    pub(crate) fn arm_bundle(&mut self, id: BundleRef, at: Option<Timestamp>) {
        if let Some(old) = self.armed_bundles.remove(&id) {
            self.bundle_timers.remove(&(old, id));
        }
        if let Some(at) = at {
            self.armed_bundles.insert(id, at);
            self.bundle_timers.insert((at, id));
        }
    }

    /// Drops everything about a bundle that is no more.
    pub(crate) fn forget_bundle(&mut self, id: BundleRef) {
        self.arm_bundle(id, None);
        self.paces.remove(&id);
    }

    pub(crate) fn delay_task(&mut self, key: TaskKey, at: Timestamp) {
        self.clear_delay(key);
        self.not_before.insert(key, at);
        self.retry_timers.insert((at, key));
    }

    pub(crate) fn clear_delay(&mut self, key: TaskKey) {
        if let Some(at) = self.not_before.remove(&key) {
            self.retry_timers.remove(&(at, key));
        }
    }

    /// Drops every hint about a task that is over.
    pub(crate) fn forget_task(&mut self, key: TaskKey) {
        self.clear_delay(key);
        self.avoid.remove(&key);
        self.floors.remove(&key);
    }

    /// Drops every hint about a job that is over.
    pub(crate) fn forget_job(&mut self, job: JobId) {
        let all = (job, TaskIndex(0))..=(job, TaskIndex(u32::MAX));
        let keys: BTreeSet<TaskKey> = self
            .not_before
            .range(all.clone())
            .map(|(key, _)| *key)
            .chain(self.avoid.range(all.clone()).map(|(key, _)| *key))
            .chain(self.floors.range(all).map(|(key, _)| *key))
            .collect();
        keys.into_iter().for_each(|key| self.forget_task(key));
        self.unbundled.remove(&job);
    }

    pub(crate) fn next_deadline(&self) -> Option<Timestamp> {
        let first = [
            self.node_timers.first().map(|entry| entry.0),
            self.prepare_timers.first().map(|entry| entry.0),
            self.bundle_timers.first().map(|entry| entry.0),
            self.retry_timers.first().map(|entry| entry.0),
            self.awaited.next(),
            self.troubles.next(),
            self.crashes.next(),
        ];
        first.into_iter().flatten().min()
    }
}
