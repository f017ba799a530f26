//! What operators do with nodes: policy, removal, and vouching that one is gone. It must not know about sessions but
//! to end one.

use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{NodeId, UserName};
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::state::{NodeAvailability, NodePolicy, Reason, ReasonCode};
use trainyard_common::time::Timestamp;
use trainyard_common::units::format_duration;

use crate::Core;
use crate::effect::{Answer, Effect};
use crate::tables::is_released;
use crate::timers::is_ready;

impl Core {
    pub(crate) fn on_policy_set(
        &mut self,
        node: NodeId,
        policy: NodePolicy,
        by: &UserName,
    ) -> Result<Answer, Refusal> {
        let record = self.t.nodes.get(&node).ok_or_else(|| unknown(node))?;
        if record.policy == policy {
            return Ok(Answer::Done);
        }
        let done = match policy {
            NodePolicy::Active => "takes new work again",
            NodePolicy::Cordoned => "takes no new work",
            NodePolicy::Draining => "takes no new work and is being emptied",
        };
        if let Some(record) = self.t.node_mut(node) {
            record.policy = policy;
            record.reason =
                Reason::new(ReasonCode::Operator, format!("{node} {done}: set by {by}"));
        }
        if policy != NodePolicy::Active {
            self.close_bundles_on(node);
        }
        self.wants_schedule = true;
        Ok(Answer::Done)
    }

    pub(crate) fn on_node_removed(
        &mut self,
        now: Timestamp,
        node: NodeId,
    ) -> Result<Answer, Refusal> {
        if !self.t.nodes.contains_key(&node) {
            return Err(unknown(node));
        }
        let members = self.t.members_on(node);
        let held: Vec<String> = members
            .iter()
            .filter(|(id, rank)| {
                let attempt = self.t.attempts.get(id);
                attempt.is_some_and(|attempt| !is_released(attempt.members[*rank].phase))
            })
            .map(|(id, _)| id.to_string())
            .chain(self.t.bundles_on(node).iter().map(ToString::to_string))
            .collect();
        if !held.is_empty() && !planted(Mutation::BusyNodeRemoved) {
            let first: Vec<&str> = held.iter().take(3).map(String::as_str).collect();
            let message = format!(
                "{node} may still run {} of {}; cancel them or wait, or vouch for its end with `yard node confirm-lost {node}`",
                first.join(", "),
                held.len()
            );
            return Err(Refusal::new(
                ErrorCode::FailedPrecondition,
                "NODE_IN_USE",
                message,
            ));
        }
        for (id, rank) in members {
            let message = format!("{node} was removed");
            self.end_member(now, id, rank, Reason::new(ReasonCode::Operator, message));
        }
        self.t.remove_node(node);
        let message = format!("{node} was removed; enrol the machine again with `yard join TOKEN`");
        self.close_session(
            node,
            Refusal::new(ErrorCode::NotFound, "NODE_UNKNOWN", message),
        );
        self.live.last_heard.remove(&node);
        self.live.opened.remove(&node);
        self.live.shrunk.remove(&node);
        self.live.suspects.remove(&node);
        self.live.troubles.over(node);
        self.live.crashes.forget(node);
        self.live.arm_node(node, None);
        self.weigh_silence(now, node);
        self.wants_schedule = true;
        Ok(Answer::Done)
    }

    pub(crate) fn on_confirmed_lost(
        &mut self,
        now: Timestamp,
        node: NodeId,
    ) -> Result<Answer, Refusal> {
        let record = self.t.nodes.get(&node).ok_or_else(|| unknown(node))?;
        if is_ready(record.availability) {
            return Err(self.not_lost(now, node));
        }
        let reason = Reason::new(
            ReasonCode::Operator,
            format!("{node} was confirmed as lost by an operator"),
        );
        self.set_availability(now, node, NodeAvailability::Lost, reason);
        self.arm_silence(now, node);
        let message = format!("{node} was confirmed as lost; it may register anew");
        self.close_session(
            node,
            Refusal::new(ErrorCode::Unavailable, "NODE_LOST", message),
        );
        for (id, rank) in self.t.members_on(node) {
            let message =
                format!("{node} was confirmed as lost before the exit status was recorded");
            self.end_member(now, id, rank, Reason::new(ReasonCode::NodeLost, message));
        }
        for id in self.t.bundles_on(node) {
            let message =
                format!("{node} was confirmed as lost before the exit status was recorded");
            self.end_bundle(now, id, &Reason::new(ReasonCode::NodeLost, message));
        }
        self.wants_schedule = true;
        Ok(Answer::Done)
    }

    /// Vouching for the end of a node that was just heard of is mostly a slip, and would let two attempts overlap.
    fn not_lost(&self, now: Timestamp, node: NodeId) -> Refusal {
        let heard = format_duration(self.silence(now, node));
        let limit = format_duration(self.config.unreachable_after);
        let message = format!(
            "{node} was heard of {heard} ago, so it is not lost; if its machine is off, say it again when it is \
             UNREACHABLE, {limit} after its last word; `yard cordon {node}` keeps new work away"
        );
        Refusal::new(ErrorCode::FailedPrecondition, "NODE_REACHABLE", message)
    }

    fn close_session(&mut self, node: NodeId, refusal: Refusal) {
        if let Some(session) = self.live.sessions.remove(&node) {
            self.later.push(Effect::CloseSession(session, refusal));
        }
    }
}

fn unknown(node: NodeId) -> Refusal {
    Refusal::new(
        ErrorCode::NotFound,
        "NODE_UNKNOWN",
        format!("there is no node {node}; see `yard nodes`"),
    )
}
