//! Members that are over but for processes that outlive SIGKILL. Their task ends for the user if no further attempt of it
//! follows; a further attempt waits for the last process. What such a member was given stays in use, and its node gets no
//! new work, until the agent says that nothing is left or nobody can report about the node any more.
//!
//! It decides nothing about outcomes; an attempt whose task ended before its processes did is `LOST` until they are gone.

use trainyard_common::ids::{AttemptRef, NodeId};
use trainyard_common::member::Cleanup;
use trainyard_common::record::{AttemptRecord, MemberRecord};
use trainyard_common::state::{
    AttemptState, JobState, MemberPhase, NodeAvailability, Reason, ReasonCode,
};
use trainyard_common::time::Timestamp;

use crate::Core;
use crate::effect::{Effect, Urgency};

/// What stands between the reason of an attempt and the processes that outlive it.
const PENDING: &str = "; cleanup pending on ";
/// Members of a gang whose processes are told of in one sentence.
const MEMBERS_TOLD: usize = 3;
/// Characters of what is left on one node: eight processes with names of ordinary length.
const MAX_LEFT: usize = 512;

/// Whether processes of the member outlive SIGKILL.
pub(crate) fn lingers(member: &MemberRecord) -> bool {
    member.phase == MemberPhase::CleanupPending
}

/// Whether the member is over for the user: nothing of it runs that was not killed.
pub(crate) fn is_over(phase: MemberPhase) -> bool {
    phase >= MemberPhase::CleanupPending
}

/// `n3: pid 812 (python3), state D`, for each member with such processes; nothing if there is none.
fn told(attempt: &AttemptRecord) -> Option<String> {
    let left: Vec<String> = attempt
        .members
        .iter()
        .filter(|member| lingers(member))
        .map(|member| format!("{}: {}", member.node, member.cleanup))
        .collect();
    let first = left.iter().take(MEMBERS_TOLD).cloned().collect::<Vec<_>>();
    match (first.join("; "), left.len().saturating_sub(MEMBERS_TOLD)) {
        (told, _) if told.is_empty() => None,
        (told, 0) => Some(told),
        (told, more) => Some(format!("{told}; and on {more} more")),
    }
}

/// Says at an attempt that its task ended before its processes did.
pub(crate) fn tell_pending(attempt: &mut AttemptRecord) {
    if let Some(left) = told(attempt) {
        attempt.reason.message = format!("{}{PENDING}{left}", attempt.reason.message);
    }
}

/// Says at an attempt that was told of so that nothing of it is left.
pub(crate) fn tell_done(attempt: &mut AttemptRecord) {
    if let Some(at) = attempt.reason.message.find(PENDING) {
        attempt.reason.message.truncate(at);
        attempt.reason.message.push_str("; cleaned up later");
    }
}

impl Core {
    /// Whether processes that outlive SIGKILL are on the node, so that it gets no new work.
    pub(crate) fn is_quarantined(&self, node: NodeId) -> bool {
        self.t.quarantined.contains_key(&node)
    }

    /// Takes in what is left of a member, for the first time or again. Whether that is news.
    pub(crate) fn note_left(&mut self, id: AttemptRef, rank: usize, cleanup: &Cleanup) -> bool {
        let left: String = cleanup.told().chars().take(MAX_LEFT).collect();
        let known = self.t.attempts.get(&id);
        let known = known.and_then(|attempt| attempt.members.get(rank));
        let Some(node) = known
            .filter(|member| lingers(member) && member.cleanup != left)
            .map(|member| member.node)
        else {
            return false;
        };
        if let Some(attempt) = self.t.attempt_mut(id) {
            attempt.members[rank].cleanup.clone_from(&left);
        }
        let message = format!("processes of {id} on {node} outlive SIGKILL: {left}");
        let reason = Reason::new(ReasonCode::CleanupPending, message);
        self.later
            .push(Effect::Note(Urgency::Error, Some(node), reason));
        self.tell_node_reason(node);
        true
    }

    /// A member is over but for processes that no signal ends.
    pub(crate) fn member_lingers(&mut self, node: NodeId) {
        // What is queued ahead there had better run elsewhere.
        self.close_bundles_on(node);
        self.wants_schedule = true;
    }

    /// The last such process of a member is gone, or nobody can tell of it any more.
    pub(crate) fn member_cleaned(&mut self, now: Timestamp, id: AttemptRef, node: NodeId) {
        let key = (id.job, id.task);
        let waited = self.t.tasks.get(&key).is_some_and(|task| {
            task.state == JobState::Stopping && task.reason.code == ReasonCode::CleanupPending
        });
        if waited
            && !self
                .t
                .attempts
                .get(&id)
                .is_some_and(|attempt| attempt.members.iter().any(lingers))
        {
            let reason = Reason::new(ReasonCode::Uploading, "its results are brought in");
            self.t.set_task(key, now, JobState::Stopping, reason);
        }
        if !self.is_quarantined(node) {
            let message = format!("{node}: nothing is left of what outlived SIGKILL");
            let reason = Reason::new(ReasonCode::CleanupPending, message);
            self.later
                .push(Effect::Note(Urgency::Info, Some(node), reason));
        }
        self.tell_node_reason(node);
        self.wants_schedule = true;
    }

    /// Tells a task that would be tried again what it waits for.
    pub(crate) fn explain_cleanup(&mut self, now: Timestamp, id: AttemptRef) {
        let Some(attempt) = self.t.attempts.get(&id) else {
            return;
        };
        let Some(left) = told(attempt) else { return };
        let message = format!(
            "attempt {}: {}; tried again when nothing of it is left{PENDING}{left}",
            id.attempt, attempt.reason.message
        );
        let key = (id.job, id.task);
        let told = |message: &str| {
            let task = self.t.tasks.get(&key);
            task.is_some_and(|task| task.reason.message == message)
        };
        if !told(&message) {
            let reason = Reason::new(ReasonCode::CleanupPending, message);
            self.t.set_task(key, now, JobState::Stopping, reason);
        }
    }

    /// Why a node that is heard of is as it is.
    pub(crate) fn ready_reason(&self, node: NodeId) -> Reason {
        if let Some(left) = self.left_on(node) {
            let message = format!("cleanup pending on {node}: {left}; no new work until then");
            return Reason::new(ReasonCode::CleanupPending, message);
        }
        if let Some(told) = self.live.crashes.told(node) {
            return Reason::new(ReasonCode::AgentCrashes, told);
        }
        Reason::new(ReasonCode::InSession, format!("{node} is in session"))
    }

    fn left_on(&self, node: NodeId) -> Option<String> {
        let first = self.t.quarantined.get(&node)?.first()?;
        let members = &self.t.attempts.get(first)?.members;
        let member = members.iter().find(|member| member.node == node)?;
        Some(member.cleanup.clone())
    }

    /// Brings the reason of a node that is heard of up to date. The word of an operator stays.
    pub(crate) fn tell_node_reason(&mut self, node: NodeId) {
        let reason = self.ready_reason(node);
        let stays = self.t.nodes.get(&node).is_none_or(|record| {
            record.availability != NodeAvailability::Ready || record.reason == reason
        });
        if !stays && !self.live.suspects.contains(&node) {
            self.give_reason(node, reason);
        }
    }

    /// Looks again at the attempts of a job whose end was asked for while they waited for processes to go.
    pub(crate) fn settle_lingering(&mut self, now: Timestamp, attempts: Vec<AttemptRef>) {
        for id in attempts {
            let waits = self.t.attempts.get(&id).is_some_and(|attempt| {
                attempt.state == AttemptState::Stopping && attempt.members.iter().any(lingers)
            });
            if waits {
                self.settle(now, id);
            }
        }
    }
}
