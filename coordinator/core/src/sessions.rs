//! Sessions with agents: who is who, what an agent has against what it should have, what it reports later, and its
//! silence being broken. A report only counts in the node's one open session and only for a member that is on that node.

use std::collections::{BTreeMap, BTreeSet};

use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{AttemptRef, Incarnation, NodeId};
use trainyard_common::limits;
use trainyard_common::member::{
    DesiredMember, DesiredPhase, EndCause, Ending, ObservedMember, ObservedPhase, Stop,
};
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::record::NodeRecord;
use trainyard_common::state::{
    AttemptState, ExitStatus, MemberPhase, NodeAvailability, NodePolicy, Reason, ReasonCode,
};
use trainyard_common::time::Timestamp;

use crate::Core;
use crate::crashes::Start;
use crate::effect::{Command, Effect, Urgency};
use crate::event::{Registration, SessionId};
use crate::gang;
use crate::tables::is_released;

/// Attempts or bundles that one report may run ahead of the row. Guards the counter against a nonsensical number.
pub(crate) const MAX_ATTEMPT_LEAD: u32 = 1_000_000;

/// What a reported member is to us.
enum Standing {
    /// The member of this place of an attempt in memory.
    Ours(usize),
    /// Of an attempt that is over or was never on record, of a job that we gave a number to.
    Over,
    /// Of a job that we never heard of, or on a node that its attempt does not have: never touched.
    Foreign,
}

/// Characters of what an agent says about results that were not kept: a few dozen names fit.
const MAX_WARNING: usize = 4096;

impl Core {
    pub(crate) fn on_registered(&mut self, now: Timestamp, reg: Registration) {
        if let Err(refusal) = self.admit(&reg) {
            return self.later.push(Effect::CloseSession(reg.session, refusal));
        }
        let node = reg.node;
        // The new session gets its first command last, so nothing that happens below may reach it before.
        if let Some(old) = self.live.sessions.remove(&node)
            && old != reg.session
        {
            let message = format!("a newer session of {node} was opened");
            let refusal = Refusal::new(ErrorCode::Unavailable, "SESSION_REPLACED", message);
            self.later.push(Effect::CloseSession(old, refusal));
        }
        self.take_registration(now, &reg);
        let (mut desired, forget) = self.reconcile(now, node, &reg.observed);
        for (id, rank) in self.t.members_on(node) {
            if let Some(attempt) = self.t.attempts.get(&id) {
                desired.extend(gang::desired(self.t.jobs.get(&id.job), attempt, rank));
            }
        }
        desired.sort_by_key(|member| member.attempt);
        let (bundles, forget_bundles) = self.reconcile_bundles(now, node, &reg.bundles);
        self.live.sessions.insert(node, reg.session);
        self.no_longer_awaited(node);
        self.send(node, Command::Welcome { desired, bundles });
        for id in forget {
            self.send(node, Command::Forget(id));
        }
        for id in forget_bundles {
            self.send(node, Command::ForgetBundle(id));
        }
        self.wants_schedule = true;
    }

    /// Whether the agent may speak for the node.
    fn admit(&mut self, reg: &Registration) -> Result<(), Refusal> {
        let node = reg.node;
        let Some(record) = self.t.nodes.get(&node) else {
            let message = format!(
                "{node} is not enrolled here, or it was removed; enrol the machine again with `yard join TOKEN`"
            );
            return Err(Refusal::new(ErrorCode::NotFound, "NODE_UNKNOWN", message));
        };
        let same_or_later = |(start, opening): &(Incarnation, u64)| {
            *start == reg.incarnation
                && (1..=*opening).contains(&reg.opening)
                && !planted(Mutation::LateGreetingCounts)
        };
        if self.live.opened.get(&node).is_some_and(same_or_later) {
            // It was given up and its words were still on their way. What it says is older than what we know.
            let message = format!("a later session of {node} was opened before");
            return Err(Refusal::new(
                ErrorCode::Unavailable,
                "SESSION_TOO_LATE",
                message,
            ));
        }
        let older = reg.incarnation < record.incarnation && !planted(Mutation::EarlierStartSpeaks);
        let twin = reg.incarnation == record.incarnation
            && !record.boot_id.is_empty()
            && reg.boot_id != record.boot_id;
        if !older && !twin {
            return Ok(());
        }
        let message = format!(
            "two agents claim to be {node} (start {} of boot {:.36} against start {} of boot {:.36}); if the disk was \
             copied, remove the agent's data from the copy and enrol it with `yard join TOKEN`",
            reg.incarnation, reg.boot_id, record.incarnation, record.boot_id
        );
        let reason = Reason::new(ReasonCode::DuplicateIdentity, message.clone());
        self.later
            .push(Effect::Note(Urgency::Error, Some(node), reason));
        Err(Refusal::new(
            ErrorCode::FailedPrecondition,
            "DUPLICATE_IDENTITY",
            message,
        ))
    }

    fn take_registration(&mut self, now: Timestamp, reg: &Registration) {
        let Some(record) = self.t.node_mut(reg.node) else {
            return;
        };
        let before = record.incarnation;
        record.inventory = reg.inventory.clone();
        record.incarnation = reg.incarnation;
        record.boot_id.clone_from(&reg.boot_id);
        record.agent_version.clone_from(&reg.agent_version);
        record.address.clone_from(&reg.address);
        record.changed_at = now;
        self.note_shrunk(reg.node);
        self.live
            .opened
            .insert(reg.node, (reg.incarnation, reg.opening));
        self.note_start(now, before, reg);
        self.live.last_heard.insert(reg.node, now);
        let reason = self.ready_reason(reg.node);
        self.set_availability(now, reg.node, NodeAvailability::Ready, reason);
        self.arm_silence(now, reg.node);
        self.resume_waiting(now, reg.node);
        self.resume_bundles(now, reg.node);
    }

    /// Counts how often the agent started without having said goodbye.
    fn note_start(&mut self, now: Timestamp, before: Incarnation, reg: &Registration) {
        let node = reg.node;
        if !reg.last_words.is_empty() {
            let words: String = reg
                .last_words
                .chars()
                .take(limits::MAX_LAST_WORDS)
                .collect();
            let message = format!("the agent of {node} crashed before; its last words: {words}");
            let reason = Reason::new(ReasonCode::AgentCrashes, message);
            self.later
                .push(Effect::Note(Urgency::Warn, Some(node), reason));
        }
        let start = Start {
            node,
            before,
            now: reg.incarnation,
            silence: self.silence(now, node),
            last_words: &reg.last_words,
            pause: self.config.crash_pause,
        };
        if self.live.crashes.started(now, start)
            && let Some(told) = self.live.crashes.told(node)
        {
            let reason = Reason::new(ReasonCode::AgentCrashes, told);
            self.later
                .push(Effect::Note(Urgency::Error, Some(node), reason));
        }
    }

    fn note_shrunk(&mut self, node: NodeId) {
        match self.overuses(node) {
            true => self.live.shrunk.insert(node),
            false => self.live.shrunk.remove(&node),
        };
    }

    fn overuses(&self, node: NodeId) -> bool {
        let capacity = self
            .t
            .nodes
            .get(&node)
            .map(|record| record.inventory.capacity);
        let used = self.t.usage.get(&node).map(|usage| usage.amounts);
        !used.unwrap_or_default().fits(&capacity.unwrap_or_default())
    }

    /// Nodes of which more is used than they have.
    pub(crate) fn overused(&self) -> BTreeSet<NodeId> {
        self.t
            .usage
            .keys()
            .copied()
            .filter(|node| self.overuses(*node))
            .collect()
    }

    /// Holds what the agent has against what is on record. Gives the stops for members whose attempts are over, and
    /// those that can be cleaned away.
    fn reconcile(
        &mut self,
        now: Timestamp,
        node: NodeId,
        observed: &[ObservedMember],
    ) -> (Vec<DesiredMember>, BTreeSet<AttemptRef>) {
        let mut seen: BTreeMap<AttemptRef, &ObservedMember> = BTreeMap::new();
        for member in observed.iter().take(limits::MAX_MEMBERS_PER_NODE) {
            seen.insert(member.attempt, member);
            self.observe(now, node, member);
        }
        for (id, rank) in self.t.members_on(node) {
            if !seen.contains_key(&id) {
                self.missing(now, node, id, rank);
            }
        }
        let (mut stops, mut forget) = (Vec::new(), BTreeSet::new());
        for member in seen.values() {
            if let Standing::Over = self.standing(node, member) {
                match ending(&member.phase) {
                    Some(_) if is_ended(&member.phase) => drop(forget.insert(member.attempt)),
                    Some(_) | None => stops.push(stray_stop(member)),
                }
            }
        }
        (stops, forget)
    }

    /// A member that should be on the node is not.
    fn missing(&mut self, now: Timestamp, node: NodeId, id: AttemptRef, rank: usize) {
        let Some(attempt) = self.t.attempts.get(&id) else {
            return;
        };
        let Some(member) = attempt.members.get(rank) else {
            return;
        };
        let never_accepted = member.phase == MemberPhase::Unconfirmed;
        if never_accepted && attempt.outcome.is_none() {
            return; // The command did not arrive; it is in the answer.
        }
        let message = match never_accepted {
            true => format!("{node} never accepted attempt {}", id.attempt),
            false if member.phase == MemberPhase::Uploading => {
                format!("{node} no longer knows attempt {}", id.attempt)
            }
            false => format!(
                "{node} no longer knows attempt {}; how its ranks ended is not known",
                id.attempt
            ),
        };
        self.end_member(
            now,
            id,
            rank,
            Reason::new(ReasonCode::UnknownToAgent, message),
        );
    }

    pub(crate) fn on_observed(
        &mut self,
        now: Timestamp,
        session: SessionId,
        node: NodeId,
        member: &ObservedMember,
    ) {
        if !self.hear(now, session, node) {
            return;
        }
        self.observe(now, node, member);
        if let Standing::Over = self.standing(node, member) {
            let command = match is_ended(&member.phase) {
                true => Command::Forget(member.attempt),
                false => Command::Desire(Box::new(stray_stop(member))),
            };
            // An end that closed its attempt just now was answered with the same command.
            let told = Effect::Send(session, command);
            if !self.later.contains(&told) {
                self.later.push(told);
            }
        }
    }

    pub(crate) fn on_heartbeat(&mut self, now: Timestamp, session: SessionId, node: NodeId) {
        self.hear(now, session, node);
    }

    pub(crate) fn on_session_ended(&mut self, session: SessionId, node: NodeId) {
        // The node stays READY until its lease runs out: most sessions are back at once.
        let ours = self.live.sessions.get(&node) == Some(&session);
        if ours || planted(Mutation::OldEndClosesNew) {
            self.live.sessions.remove(&node);
        }
    }

    /// Notes that a node lives. False if it was not the node's open session that spoke.
    pub(crate) fn hear(&mut self, now: Timestamp, session: SessionId, node: NodeId) -> bool {
        let ours = self.live.sessions.get(&node) == Some(&session);
        if !ours && !planted(Mutation::OldSessionHeard) {
            return false;
        }
        self.live.last_heard.insert(node, now);
        let ready = self
            .t
            .nodes
            .get(&node)
            .is_some_and(|record| match record.availability {
                NodeAvailability::Ready => true,
                NodeAvailability::Unreachable | NodeAvailability::Lost => false,
            });
        if !ready {
            let reason = self.ready_reason(node);
            self.set_availability(now, node, NodeAvailability::Ready, reason);
            self.resume_waiting(now, node);
            self.resume_bundles(now, node);
            self.wants_schedule = true;
        }
        let suspected = self.live.suspects.remove(&node);
        if suspected && ready {
            let reason = self.ready_reason(node);
            self.give_reason(node, reason);
            self.wants_schedule = true;
        }
        if !self.live.armed.contains_key(&node) || !ready || suspected {
            self.arm_silence(now, node);
        }
        true
    }

    /// Gives a node another reason. That of an operator stays.
    pub(crate) fn give_reason(&mut self, node: NodeId, reason: Reason) {
        if let Some(record) = self.t.node_mut(node)
            && !(record.policy != NodePolicy::Active && record.reason.code == ReasonCode::Operator)
        {
            record.reason = reason;
        }
    }

    fn standing(&self, node: NodeId, member: &ObservedMember) -> Standing {
        let id = member.attempt;
        let Some(attempt) = self
            .t
            .attempts
            .get(&id)
            .filter(|a| a.state != AttemptState::Ended)
        else {
            return if id.job < self.t.next_job {
                Standing::Over
            } else {
                Standing::Foreign
            };
        };
        if self.t.is_carried(id) {
            return Standing::Foreign; // We gave it to a bundle.
        }
        let rank = usize::try_from(member.node_rank).unwrap_or(usize::MAX);
        match attempt.members.get(rank) {
            Some(ours) if ours.node == node || planted(Mutation::ForeignNodeHeard) => {
                Standing::Ours(rank)
            }
            Some(_) | None => Standing::Foreign,
        }
    }

    /// Takes in what an agent says of one member.
    fn observe(&mut self, now: Timestamp, node: NodeId, member: &ObservedMember) {
        match self.standing(node, member) {
            Standing::Ours(rank) => self.member_moved(now, rank, member),
            Standing::Over => self.note_floor(member.attempt),
            Standing::Foreign => {
                let id = member.attempt;
                let message =
                    format!("{node} has {id}, which is not on record as its own; left alone");
                let reason = Reason::new(ReasonCode::UnknownToAgent, message);
                self.later
                    .push(Effect::Note(Urgency::Warn, Some(node), reason));
            }
        }
    }

    /// An attempt number was given that our rows do not know: they were restored from a backup. The next attempt
    /// must get a higher one.
    pub(crate) fn note_floor(&mut self, id: AttemptRef) {
        let key = (id.job, id.task);
        let Some(job) = self.t.jobs.get(&id.job) else {
            return;
        };
        let (first, last) = job
            .spec
            .array
            .map_or((0, 0), |array| (array.first, array.last));
        let known = self.t.tasks.get(&key).map_or(0, |task| task.attempts);
        // A task in a bundle has no row either, and is not over.
        let over = !self.t.tasks.contains_key(&key)
            && id.task < job.next_fresh
            && !self
                .t
                .bundles_of(id.job)
                .any(|bundle| bundle.tasks.contains(id.task));
        let lead = id.attempt.0.saturating_sub(known);
        if (first..=last).contains(&id.task.0) && !over && (1..=MAX_ATTEMPT_LEAD).contains(&lead) {
            let floor = self.live.floors.entry(key).or_default();
            *floor = id.attempt.0.max(*floor);
        }
    }

    fn member_moved(&mut self, now: Timestamp, rank: usize, seen: &ObservedMember) {
        let id = seen.attempt;
        let Some(before) = self.t.advance_member(id, rank, member_phase(&seen.phase)) else {
            // Late or told before, but what is left of a member may change.
            if let ObservedPhase::CleanupPending(cleanup) = &seen.phase
                && self.note_left(id, rank, cleanup)
            {
                self.settle(now, id);
            }
            return;
        };
        if let Some(end) = ending(&seen.phase) {
            self.record_ending(id, rank, before, end);
        }
        let node = self.t.attempts.get(&id).map(|a| a.members[rank].node);
        match &seen.phase {
            ObservedPhase::Preparing => self.member_prepares(id),
            ObservedPhase::Ready { port } => {
                node.into_iter().for_each(|node| self.node_prepared(node));
                if let Some(attempt) = self.t.attempt_mut(id) {
                    attempt.members[rank].port = Some(*port);
                }
                self.member_ready(now, id);
            }
            ObservedPhase::Running { started_at } => {
                node.into_iter().for_each(|node| self.node_prepared(node));
                self.member_runs(now, id, *started_at);
            }
            ObservedPhase::Stopping => {}
            ObservedPhase::CleanupPending(cleanup) => {
                self.note_left(id, rank, cleanup);
                node.into_iter().for_each(|node| self.member_lingers(node));
                self.member_over(now, id, rank, &cleanup.ending);
            }
            ObservedPhase::Uploading(end) | ObservedPhase::Ended(end) => {
                if !is_released(before) {
                    self.wants_schedule = true;
                    if let Some(node) = node {
                        self.note_preparation(now, node, end.started, end);
                    }
                    self.member_over(now, id, rank, end);
                }
            }
        }
        if before == MemberPhase::CleanupPending
            && let Some(node) = node
        {
            self.member_cleaned(now, id, node);
        }
        self.settle(now, id);
    }

    /// Something was prepared on the node, so others can be.
    pub(crate) fn node_prepared(&mut self, node: NodeId) {
        self.wants_schedule |= self.live.troubles.over(node);
    }

    /// Takes from an end whether the node can prepare.
    pub(crate) fn note_preparation(
        &mut self,
        now: Timestamp,
        node: NodeId,
        started: bool,
        end: &Ending,
    ) {
        if started {
            self.node_prepared(node);
        } else if end.cause == EndCause::PrepareFailed {
            self.live.troubles.failed(now, node, &end.message);
        }
    }

    /// How the ranks ended is taken from the first report of the end; later ones only add what was uploaded.
    pub(crate) fn record_ending(
        &mut self,
        id: AttemptRef,
        rank: usize,
        before: MemberPhase,
        end: &Ending,
    ) {
        let most = self
            .t
            .jobs
            .get(&id.job)
            .map_or(limits::MAX_PROCS_PER_NODE, |job| job.spec.procs_per_node);
        let Some(attempt) = self.t.attempt_mut(id) else {
            return;
        };
        let Some(member) = attempt.members.get_mut(rank) else {
            return;
        };
        let known = member.ranks.clone();
        if !is_released(before) {
            let most = usize::try_from(most).unwrap_or(usize::MAX);
            // One more than there can be is kept, so that too many are noticed as not matching.
            member.ranks = end
                .ranks
                .iter()
                .take(most.saturating_add(1))
                .copied()
                .collect();
        }
        if before == MemberPhase::CleanupPending {
            // The shim may be gone since, and what it saw with it.
            for old in known
                .into_iter()
                .filter(|old| old.exit != ExitStatus::Unknown)
            {
                match member.ranks.iter_mut().find(|end| end.rank == old.rank) {
                    Some(end) => *end = old,
                    None => member.ranks.push(old),
                }
            }
            member.ranks.sort_by_key(|end| end.rank);
        }
        member.outputs = end.outputs.or(member.outputs);
        member.checkpoint = end.checkpoint.or(member.checkpoint);
        if !end.warning.is_empty() {
            // An agent's text has a bound here, as rows do.
            member.warning = end.warning.chars().take(MAX_WARNING).collect();
        }
    }

    /// Changes a node's availability and what follows from it. The reason of an operator stays.
    pub(crate) fn set_availability(
        &mut self,
        now: Timestamp,
        node: NodeId,
        availability: NodeAvailability,
        reason: Reason,
    ) {
        // Before this registration, if it is one: a node's first one is no return.
        let returns = self.t.nodes.get(&node).is_some_and(|record| {
            record.availability != NodeAvailability::Ready
                && record.reason.code != ReasonCode::Enrolled
        });
        let Some(record) = self.t.node_mut(node) else {
            return;
        };
        let urgency = match availability {
            _ if record.availability == availability => None,
            NodeAvailability::Ready => returns.then_some(Urgency::Info),
            NodeAvailability::Unreachable | NodeAvailability::Lost => Some(Urgency::Warn),
        };
        if let Some(urgency) = urgency {
            let told = Effect::Note(urgency, Some(node), reason.clone());
            self.later.push(told);
        }
        let cordoned =
            record.policy != NodePolicy::Active && availability == NodeAvailability::Ready;
        if !(cordoned && record.reason.code == ReasonCode::Operator) {
            record.reason = reason;
        }
        record.availability = availability;
        record.changed_at = now;
        self.live.suspects.remove(&node);
        self.weigh_silence(now, node);
    }
}

/// Whether the node has told what it has at least once.
pub(crate) fn was_seen(node: &NodeRecord) -> bool {
    node.incarnation.0 > 0 || !node.boot_id.is_empty()
}

fn stray_stop(member: &ObservedMember) -> DesiredMember {
    let rank = usize::try_from(member.node_rank).unwrap_or(usize::MAX);
    DesiredMember {
        attempt: member.attempt,
        phase: DesiredPhase::Stop(Stop {
            code: ReasonCode::NodeLost,
            grace: limits::DEFAULT_GRACE,
        }),
        spec: gang::bare_spec(rank.saturating_add(1), rank, None),
    }
}

fn ending(phase: &ObservedPhase) -> Option<&Ending> {
    match phase {
        ObservedPhase::Uploading(ending) | ObservedPhase::Ended(ending) => Some(ending),
        ObservedPhase::CleanupPending(cleanup) => Some(&cleanup.ending),
        ObservedPhase::Preparing
        | ObservedPhase::Ready { .. }
        | ObservedPhase::Running { .. }
        | ObservedPhase::Stopping => None,
    }
}

fn is_ended(phase: &ObservedPhase) -> bool {
    matches!(phase, ObservedPhase::Ended(_))
}

fn member_phase(phase: &ObservedPhase) -> MemberPhase {
    match phase {
        ObservedPhase::Preparing => MemberPhase::Preparing,
        ObservedPhase::Ready { .. } => MemberPhase::Ready,
        ObservedPhase::Running { .. } => MemberPhase::Running,
        ObservedPhase::Stopping => MemberPhase::Stopping,
        ObservedPhase::CleanupPending(_) => MemberPhase::CleanupPending,
        ObservedPhase::Uploading(_) => MemberPhase::Uploading,
        ObservedPhase::Ended(_) => MemberPhase::Ended,
    }
}
