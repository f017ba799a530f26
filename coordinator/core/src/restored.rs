//! The first time after a restored backup: nothing is placed until the nodes that were ready in it have said what they
//! run, or had the time in which a silent node is given up. What they run may be newer than the backup.

use std::collections::BTreeSet;
use std::time::Duration;

use trainyard_common::ids::NodeId;
use trainyard_common::state::{Reason, ReasonCode};
use trainyard_common::time::Timestamp;

use crate::Core;
use crate::attempts::count;
use crate::config::BEHIND_TOLD;
use crate::effect::Urgency;
use crate::timers::is_lost;

/// The nodes that are still awaited, and until when.
#[derive(Debug, Default)]
pub(crate) struct Awaited {
    nodes: BTreeSet<NodeId>,
    until: Timestamp,
}

impl Awaited {
    pub(crate) fn next(&self) -> Option<Timestamp> {
        (!self.nodes.is_empty()).then_some(self.until)
    }

    /// While we stood still no node could say what it runs.
    pub(crate) fn excuse(&mut self, length: Duration) {
        self.until = self.until.after(length);
    }
}

impl Core {
    /// Whether the next start need not wait again for what nodes of a restored backup say: each of them was heard of or
    /// given up, and no attempt number is known from them alone. True if none was restored.
    #[must_use]
    pub fn is_reconciled(&self) -> bool {
        self.was_told() && self.live.floors.is_empty()
    }

    fn was_told(&self) -> bool {
        self.live.awaited.nodes.is_empty()
    }

    pub(crate) fn await_nodes(&mut self, now: Timestamp, nodes: BTreeSet<NodeId>) {
        if nodes.is_empty() {
            return;
        }
        let message = format!(
            "the state was restored from a backup; nothing is placed until {} of it said what they run",
            count(nodes.len(), "ready node")
        );
        let until = now.after(self.config.lost_after);
        self.live.awaited = Awaited { nodes, until };
        self.note(Urgency::Warn, ReasonCode::Silent, message);
    }

    /// Strikes off a node that was heard of.
    pub(crate) fn no_longer_awaited(&mut self, node: NodeId) {
        if self.live.awaited.nodes.remove(&node) {
            self.weigh_awaited();
        }
    }

    /// Strikes off what is no longer there, or everything if it took too long; says whether placement has to wait.
    pub(crate) fn awaits_nodes(&mut self, now: Timestamp) -> bool {
        if self.was_told() {
            return false;
        }
        if now >= self.live.awaited.until {
            self.live.awaited.nodes.clear();
        }
        let nodes = &self.t.nodes;
        let there = |id: &NodeId| {
            nodes
                .get(id)
                .is_some_and(|node| !is_lost(node.availability))
        };
        self.live.awaited.nodes.retain(there);
        self.weigh_awaited();
        !self.was_told()
    }

    /// Tells the jobs that would be next what they wait for.
    pub(crate) fn tell_awaiting(&mut self) {
        let message = "waits until the nodes of the restored state have said what they run";
        let reason = Reason::new(ReasonCode::Queued, message);
        let next: Vec<_> = self.t.pending.iter().copied().take(BEHIND_TOLD).collect();
        for id in next {
            let job = self.t.jobs.get(&id);
            let told = job.is_none_or(|job| job.reason == reason || job.tasks.active > 0);
            if !told && let Some(job) = self.t.job_mut(id) {
                job.reason = reason.clone();
            }
        }
    }

    fn weigh_awaited(&mut self) {
        if self.was_told() {
            self.wants_schedule = true;
            let message = "the restored state agrees with its nodes; jobs are placed again";
            self.note(Urgency::Info, ReasonCode::InSession, message.to_owned());
        }
    }
}
