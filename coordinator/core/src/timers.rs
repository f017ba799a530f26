//! Everything that happens because time passed: silent nodes, attempts that are never ready, tasks that may be tried
//! again; and the two brakes on it, our own pause and a loss of too many nodes at once.
//!
//! Silence has three thresholds: unreachable (no new work), given up for gangs, given up for single-node attempts (the
//! node is then lost). A node's timer is set to the next one; a heartbeat does not move it, it is looked at when due.

use trainyard_common::ids::{AttemptRef, NodeId};
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::record::{AttemptRecord, NodeRecord};
use trainyard_common::state::{MemberPhase, NodeAvailability, Reason, ReasonCode};
use trainyard_common::time::Timestamp;
use trainyard_common::units::format_duration;

use crate::Core;
use crate::attempts::{Decision, count};
use crate::effect::{Effect, Urgency};
use crate::sessions::was_seen;

/// So few nodes are no crowd: with them, two that fail together are no sign that we are cut off ourselves.
const BRAKE_LEAST: usize = 3;

impl Core {
    pub(crate) fn on_timer(&mut self, now: Timestamp) {
        self.check_silence(now);
        self.awaits_nodes(now);
        while let Some((at, id)) = self.live.prepare_timers.first().copied()
            && at <= now
        {
            self.drop_prepare_timer(id);
            self.prepare_timed_out(now, id);
        }
        while let Some((at, id)) = self.live.bundle_timers.first().copied()
            && at <= now
        {
            self.live.arm_bundle(id, None);
            self.bundle_timed_out(now, id);
        }
        while let Some((at, key)) = self.live.retry_timers.first().copied()
            && at <= now
        {
            self.live.clear_delay(key);
            self.wants_schedule = true;
        }
        self.wants_schedule |= self.live.troubles.take_ended(now);
        for node in self.live.crashes.take_ended(now) {
            self.tell_node_reason(node);
            self.wants_schedule = true;
        }
    }

    /// Begins every lease anew: after a start, or when we notice that we did not run for a while.
    pub(crate) fn restart_leases(&mut self, now: Timestamp) {
        let from = match planted(Mutation::LeasesGoOn) {
            true => Timestamp(0),
            false => now,
        };
        self.live.lease_base = from;
        let nodes: Vec<NodeId> = self.t.nodes.keys().copied().collect();
        for node in nodes {
            self.live.last_heard.insert(node, from);
            self.arm_silence(now, node);
        }
        let waiting: Vec<AttemptRef> = self
            .t
            .attempts
            .values()
            .filter(|attempt| prepares(attempt))
            .map(|attempt| attempt.id)
            .filter(|id| !self.t.is_carried(*id))
            .collect();
        self.live.prepare_timers.clear();
        self.live.prepare_armed.clear();
        for id in waiting {
            self.arm_prepare(now, id);
        }
        self.restart_bundle_timers(now);
    }

    /// If a timer is overdue by more than the shortest lease, it was us who were away, not the nodes.
    pub(crate) fn notice_pause(&mut self, now: Timestamp) {
        if let Some(due) = self.live.next_deadline()
            && now.since(due) > self.config.unreachable_after
        {
            self.restart_leases(now);
        }
    }

    /// Takes a pause of ours out of every silence. Noticed by the driver, because with only silent nodes no timer may be
    /// due for so long that [`Self::notice_pause`] sees nothing.
    pub(crate) fn excuse(&mut self, now: Timestamp, length: std::time::Duration) {
        if planted(Mutation::PauseIsSilence) {
            return;
        }
        let nodes: Vec<NodeId> = self.t.nodes.keys().copied().collect();
        for node in nodes {
            if let Some(heard) = self.live.last_heard.get_mut(&node) {
                *heard = heard.after(length).min(now);
            }
            self.arm_silence(now, node);
        }
    }

    pub(crate) fn arm_prepare(&mut self, from: Timestamp, id: AttemptRef) {
        self.drop_prepare_timer(id);
        let at = from.after(self.config.prepare_timeout);
        self.live.prepare_timers.insert((at, id));
        self.live.prepare_armed.insert(id, at);
    }

    pub(crate) fn drop_prepare_timer(&mut self, id: AttemptRef) {
        if planted(Mutation::PrepareTimerStays) {
            return;
        }
        if let Some(at) = self.live.prepare_armed.remove(&id) {
            self.live.prepare_timers.remove(&(at, id));
        }
    }

    fn prepare_timed_out(&mut self, now: Timestamp, id: AttemptRef) {
        let Some(attempt) = self.t.attempts.get(&id) else {
            return;
        };
        let late: Vec<NodeId> = attempt
            .members
            .iter()
            .filter(|member| member.phase < MemberPhase::Ready)
            .map(|member| member.node)
            .collect();
        if late.iter().all(|node| self.is_silent(*node)) {
            // It may run there by now, as one of a single node needs no word of ours. How long a silent node is waited for
            // is its policy's business; one that is back gets the time once more at most.
            return self.arm_prepare(now, id);
        }
        let first: Vec<String> = late.iter().take(3).map(ToString::to_string).collect();
        let message = format!(
            "{} of {} not ready within {}: {}",
            late.len(),
            count(attempt.members.len(), "node"),
            format_duration(self.config.prepare_timeout),
            first.join(", "),
        );
        self.decide(
            now,
            id,
            Decision::interrupted(ReasonCode::PrepareTimeout, &late, message),
        );
    }

    fn check_silence(&mut self, now: Timestamp) {
        let mut due = Vec::new();
        while let Some((at, node)) = self.live.node_timers.first().copied()
            && at <= now
        {
            self.live.arm_node(node, None);
            due.push(node);
        }
        // All that are silent are counted before any of them is given up.
        for node in &due {
            self.mark_suspect(now, *node);
            self.mark_unreachable(now, *node);
        }
        for node in due {
            if !self.live.braked {
                self.give_up(now, node);
            }
            self.arm_silence(now, node);
        }
    }

    pub(crate) fn silence(&self, now: Timestamp, node: NodeId) -> std::time::Duration {
        now.since(
            self.live
                .last_heard
                .get(&node)
                .copied()
                .unwrap_or(self.live.lease_base),
        )
    }

    /// A node that is READY is not heard of for a while: tells so, and keeps new work away.
    fn mark_suspect(&mut self, now: Timestamp, node: NodeId) {
        let silence = self.silence(now, node);
        let (from, to) = (self.config.suspect_after(), self.config.unreachable_after);
        let ready = |record: &NodeRecord| is_ready(record.availability) && was_seen(record);
        if !(from..to).contains(&silence)
            || !self.t.nodes.get(&node).is_some_and(ready)
            || !self.live.suspects.insert(node)
        {
            return;
        }
        let message = format!(
            "{node} is not heard of for {}; it counts as unreachable after {}",
            format_duration(silence),
            format_duration(to)
        );
        self.give_reason(node, Reason::new(ReasonCode::Suspect, message));
    }

    fn mark_unreachable(&mut self, now: Timestamp, node: NodeId) {
        let silence = self.silence(now, node);
        let ready = self
            .t
            .nodes
            .get(&node)
            .is_some_and(|record| is_ready(record.availability));
        if ready && silence >= self.config.unreachable_after {
            let message = format!(
                "{node} is not heard of for {}; what runs there is left alone",
                format_duration(silence)
            );
            let reason = Reason::new(ReasonCode::Silent, message);
            self.set_availability(now, node, NodeAvailability::Unreachable, reason);
        }
    }

    fn give_up(&mut self, now: Timestamp, node: NodeId) {
        let silence = self.silence(now, node);
        let Some(record) = self.t.nodes.get(&node) else {
            return;
        };
        if is_ready(record.availability) || !was_seen(record) {
            return;
        }
        if silence >= self.config.lost_after && is_unreachable(record.availability) {
            let message = format!(
                "{node} is not heard of for {}; given up",
                format_duration(silence)
            );
            let reason = Reason::new(ReasonCode::NodeLost, message);
            self.set_availability(now, node, NodeAvailability::Lost, reason);
            self.wants_schedule = true;
        }
        if silence >= self.config.lost_after.min(self.config.lost_after_gang) {
            for (id, _) in self.t.members_on(node) {
                self.settle(now, id);
            }
            for id in self.t.bundles_on(node) {
                self.settle_bundle(now, id);
            }
        }
    }

    /// Sets the node's timer to the next threshold of silence that is still ahead.
    pub(crate) fn arm_silence(&mut self, now: Timestamp, node: NodeId) {
        let Some(record) = self.t.nodes.get(&node) else {
            return self.live.arm_node(node, None);
        };
        let heard = self
            .live
            .last_heard
            .get(&node)
            .copied()
            .unwrap_or(self.live.lease_base);
        let gang = heard.after(self.config.lost_after_gang);
        let lost = heard.after(self.config.lost_after);
        let next = match record.availability {
            NodeAvailability::Ready => {
                let suspected = self.live.suspects.contains(&node) || !was_seen(record);
                let limit = match suspected {
                    true => self.config.unreachable_after,
                    false => self.config.suspect_after(),
                };
                let at = heard.after(limit);
                // It was overslept: the one after that is next.
                let at = if at > now {
                    at
                } else {
                    heard.after(self.config.unreachable_after)
                };
                Some(at.max(now))
            }
            NodeAvailability::Unreachable if self.live.braked || !was_seen(record) => None,
            NodeAvailability::Unreachable | NodeAvailability::Lost => {
                let leases = self.lease_ends(node).map(|silence| heard.after(silence));
                let ends = [gang, lost].into_iter().chain(leases);
                ends.filter(|at| *at > now).min()
            }
        };
        self.live.arm_node(node, next);
    }

    /// A node came, went or changed: counts it as present or silent or neither and sets or lifts the brake. When it is lifted, every silent node
    /// gets a full lease again: those that are about to come back must not be given up because the first were quicker.
    pub(crate) fn weigh_silence(&mut self, now: Timestamp, node: NodeId) {
        self.live.shapes = None;
        self.count_node(node);
        let (present, silent) = (self.live.present.len(), self.live.silent.len());
        let crowd = is_mass_loss(present, silent);
        let braked = crowd && !planted(Mutation::BrakeIgnored);
        if braked == self.live.braked {
            return;
        }
        self.live.braked = braked;
        if braked {
            let message = tell_mass_loss(present, silent);
            return self.note(Urgency::Error, ReasonCode::Silent, message);
        }
        let message = format!(
            "{} of {} are in session again",
            present - silent,
            count(present, "node")
        );
        self.note(Urgency::Info, ReasonCode::InSession, message);
        let silent: Vec<NodeId> = self.live.silent.iter().copied().collect();
        for node in silent {
            self.live.last_heard.insert(node, now);
            self.arm_silence(now, node);
        }
    }

    pub(crate) fn count_node(&mut self, node: NodeId) {
        let record = self.t.nodes.get(&node).filter(|record| was_seen(record));
        let availability = record.map(|record| record.availability);
        let keep = |set: &mut std::collections::BTreeSet<NodeId>, counts: bool| match counts {
            true => set.insert(node),
            false => set.remove(&node),
        };
        keep(
            &mut self.live.present,
            availability.is_some_and(|availability| !is_lost(availability)),
        );
        keep(
            &mut self.live.silent,
            availability.is_some_and(is_unreachable),
        );
    }

    pub(crate) fn note(&mut self, urgency: Urgency, code: ReasonCode, message: String) {
        self.later
            .push(Effect::Note(urgency, None, Reason::new(code, message)));
    }
}

/// Whether so many of the nodes that are not lost are silent that we suspect ourselves.
fn is_mass_loss(present: usize, silent: usize) -> bool {
    silent >= BRAKE_LEAST && silent.saturating_mul(2) > present
}

fn tell_mass_loss(present: usize, silent: usize) -> String {
    format!(
        "{silent} of {} are silent at once; none of them is given up while that is so",
        count(present, "node")
    )
}

/// Why none of these nodes is given up, if that is so: too many are silent at once. By rows alone, which say the same as
/// what the core decides by.
pub fn mass_loss<'a>(nodes: impl Iterator<Item = &'a NodeRecord>) -> Option<String> {
    let (mut present, mut silent) = (0, 0);
    for node in nodes.filter(|node| was_seen(node) && !is_lost(node.availability)) {
        present += 1;
        silent += usize::from(is_unreachable(node.availability));
    }
    is_mass_loss(present, silent).then(|| tell_mass_loss(present, silent))
}

pub(crate) fn is_ready(availability: NodeAvailability) -> bool {
    availability == NodeAvailability::Ready
}

/// Whether an attempt is neither ready nor running yet, so that it has a timer for that.
pub(crate) fn prepares(attempt: &AttemptRecord) -> bool {
    attempt.outcome.is_none() && attempt.ready_at.is_none() && attempt.started_at.is_none()
}

pub(crate) fn is_unreachable(availability: NodeAvailability) -> bool {
    availability == NodeAvailability::Unreachable
}

pub(crate) fn is_lost(availability: NodeAvailability) -> bool {
    availability == NodeAvailability::Lost
}
