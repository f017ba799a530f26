//! The life of an attempt: ready, running, one outcome that is decided once, and the end on all its nodes or without
//! some of them. It decides from rows alone; who reported what, and in which session, was checked before.

use trainyard_common::ids::{AttemptRef, NodeId};
use trainyard_common::member::{EndCause, Ending, REBOOTED_AT, RankEnd};
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::record::{AttemptRecord, NodeRecord, TaskRecord};
use trainyard_common::spec::OnDisconnect;
use trainyard_common::state::{
    AttemptState, ExitStatus, JobState, MemberPhase, NodeAvailability, Outcome, Reason, ReasonCode,
};
use trainyard_common::time::Timestamp;
use trainyard_common::units::format_duration;

use crate::Core;
use crate::cleanup::{self, is_over, lingers};
use crate::effect::Command;
use crate::gang;
use crate::tables::is_released;

/// What became of an attempt, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Decision {
    pub(crate) outcome: Outcome,
    pub(crate) reason: Reason,
    pub(crate) exit: Option<ExitStatus>,
    pub(crate) failed_rank: Option<u32>,
    /// Nodes that the next attempt had better not use.
    pub(crate) bad_nodes: Vec<NodeId>,
}

impl Decision {
    /// Ended for a cause in the infrastructure, on these nodes: how the ranks ended is not known.
    pub(crate) fn interrupted(
        code: ReasonCode,
        bad_nodes: &[NodeId],
        message: impl Into<String>,
    ) -> Self {
        Self {
            outcome: Outcome::Interrupted,
            reason: Reason::new(code, message),
            exit: Some(ExitStatus::Unknown),
            failed_rank: None,
            bad_nodes: bad_nodes.to_vec(),
        }
    }
}

impl Core {
    /// Moves an attempt on after a member's phase changed for the better.
    pub(crate) fn member_prepares(&mut self, id: AttemptRef) {
        if let Some(attempt) = self.t.attempt_mut(id)
            && attempt.outcome.is_none()
            && attempt.state == AttemptState::Placed
        {
            attempt.state = AttemptState::Preparing;
            attempt.reason = Reason::new(ReasonCode::Preparing, "its nodes prepare");
        }
    }

    /// Lets the gang go once all its members are ready.
    pub(crate) fn member_ready(&mut self, now: Timestamp, id: AttemptRef) {
        self.member_prepares(id);
        let Some(attempt) = self.t.attempts.get(&id) else {
            return;
        };
        // One that its agent ends, as it could not be prepared, is beyond that phase and was never ready.
        let all_ready = attempt
            .members
            .iter()
            .all(|member| matches!(member.phase, MemberPhase::Ready | MemberPhase::Running));
        let all_ready = all_ready || planted(Mutation::GoWhenAnyReady);
        if attempt.outcome.is_some() || attempt.ready_at.is_some() || !all_ready {
            return;
        }
        let nodes: Option<Vec<&NodeRecord>> = attempt
            .members
            .iter()
            .map(|member| self.t.nodes.get(&member.node))
            .collect();
        // Asked again because a node may have come back with another address since the attempt was placed.
        let addresses = nodes.as_deref().and_then(gang::addresses);
        let has_port = attempt
            .members
            .first()
            .is_some_and(|member| member.port.is_some());
        let (Some(addresses), true) = (addresses, has_port) else {
            let message = "its members have no addresses at which they reach each other";
            let decision = Decision::interrupted(ReasonCode::PrepareFailed, &[], message);
            return self.decide(now, id, decision);
        };
        self.drop_prepare_timer(id);
        let Some(attempt) = self.t.attempt_mut(id) else {
            return;
        };
        for (member, address) in attempt.members.iter_mut().zip(addresses) {
            member.address = address;
        }
        attempt.ready_at = Some(now);
        if attempt.state == AttemptState::Preparing {
            attempt.state = AttemptState::Ready;
        }
        attempt.reason = Reason::new(
            ReasonCode::Preparing,
            "all members are ready and told to go",
        );
        for rank in 0..attempt.members.len() {
            self.tell(id, rank);
        }
    }

    /// A member's ranks run. The only member of a gang may say so without ever having said that it was ready.
    pub(crate) fn member_runs(&mut self, now: Timestamp, id: AttemptRef, since: Timestamp) {
        self.drop_prepare_timer(id);
        let Some(attempt) = self.t.attempt_mut(id) else {
            return;
        };
        if attempt.outcome.is_some() || attempt.state == AttemptState::Running {
            return;
        }
        // The agent's clock may be wrong; it cannot have started before it was placed nor after we heard of it.
        let since = since.max(attempt.placed_at).min(now);
        attempt.started_at = Some(since);
        attempt.state = AttemptState::Running;
        let nodes = attempt.members.len();
        let reason = Reason::new(
            ReasonCode::Running,
            format!("attempt {} runs on {}", id.attempt, count(nodes, "node")),
        );
        attempt.reason = reason.clone();
        if let Some(job) = self.t.job_mut(id.job) {
            job.started_at.get_or_insert(since);
        }
        self.t
            .set_task((id.job, id.task), now, JobState::Running, reason);
    }

    /// The processes of a member are gone: decides the outcome if this ends the gang.
    pub(crate) fn member_over(
        &mut self,
        now: Timestamp,
        id: AttemptRef,
        rank: usize,
        ending: &Ending,
    ) {
        let Some(attempt) = self.t.attempts.get(&id) else {
            return;
        };
        if attempt.outcome.is_some() {
            return;
        }
        if ending.started && attempt.started_at.is_none() {
            let started = ending
                .ranks
                .iter()
                .map(|end| end.at)
                .min()
                .unwrap_or(ending.ended_at);
            self.member_runs(now, id, started);
        }
        if let Some(decision) = self.judge(id, rank, ending) {
            self.decide(now, id, decision);
        }
    }

    fn judge(&self, id: AttemptRef, rank: usize, ending: &Ending) -> Option<Decision> {
        let attempt = self.t.attempts.get(&id)?;
        let spec = &self.t.jobs.get(&id.job)?.spec;
        let member = attempt.members.get(rank)?;
        let node = member.node;
        let because = |what: &str| match ending.message.as_str() {
            "" => format!("{what} {node}"),
            message => format!("{what} {node}: {message}"),
        };
        let interrupted =
            |code, message: String| Some(Decision::interrupted(code, &[node], message));
        match ending.cause {
            EndCause::Completed
                if !gang::all_succeeded(spec, rank, member)
                    && !planted(Mutation::CompletedIsSuccess) =>
            {
                interrupted(
                    ReasonCode::SupervisorLost,
                    format!("{node} reported an end without the exit status 0 of every rank"),
                )
            }
            EndCause::Completed => {
                let all_over = attempt.members.iter().all(|member| is_over(member.phase));
                all_over.then(|| Decision {
                    outcome: Outcome::Succeeded,
                    reason: Reason::new(ReasonCode::Completed, "every rank exited with 0"),
                    exit: Some(ExitStatus::Code(0)),
                    failed_rank: None,
                    bad_nodes: Vec::new(),
                })
            }
            EndCause::RankFailed => Some(rank_failed(node, &member.ranks)),
            EndCause::CannotExecute => Some(Decision {
                outcome: Outcome::Failed,
                reason: Reason::new(ReasonCode::CannotExecute, because("cannot be started on")),
                exit: Some(ExitStatus::NotStarted),
                failed_rank: member
                    .ranks
                    .iter()
                    .find(|end| !end.exit.is_success())
                    .map(|end| end.rank),
                bad_nodes: Vec::new(),
            }),
            EndCause::TimeLimit => {
                let limit = spec
                    .time_limit
                    .map(|limit| format!(" of {}", format_duration(limit)));
                Some(Decision {
                    outcome: Outcome::TimedOut,
                    reason: Reason::new(
                        ReasonCode::TimeLimit,
                        format!("the time limit{} passed", limit.unwrap_or_default()),
                    ),
                    exit: None,
                    failed_rank: None,
                    bad_nodes: Vec::new(),
                })
            }
            EndCause::PrepareFailed => {
                interrupted(ReasonCode::PrepareFailed, because("could not prepare on"))
            }
            EndCause::SupervisorLost => interrupted(
                ReasonCode::SupervisorLost,
                because("the exit status is UNKNOWN (supervisor killed) on"),
            ),
            EndCause::LeaseExpired => interrupted(
                ReasonCode::LeaseExpired,
                because("lost the coordinator for longer than the lease on"),
            ),
            EndCause::NodeRebooted if ending.message.starts_with(REBOOTED_AT) => interrupted(
                ReasonCode::NodeRebooted,
                format!("node {node} {}", ending.message),
            ),
            EndCause::NodeRebooted => interrupted(
                ReasonCode::NodeRebooted,
                because("rebooted before the exit status was recorded:"),
            ),
            // Nobody here asked for it, or the outcome would be decided.
            EndCause::Stopped => {
                interrupted(ReasonCode::Operator, because("was stopped by the agent on"))
            }
        }
    }

    /// Decides what becomes of an attempt. The first decision stands; every later one changes nothing.
    pub(crate) fn decide(&mut self, now: Timestamp, id: AttemptRef, decision: Decision) {
        self.drop_prepare_timer(id);
        let Some(attempt) = self.t.attempt_mut(id) else {
            return;
        };
        if attempt.outcome.is_some() && !planted(Mutation::DecidedTwice) {
            return;
        }
        attempt.outcome = Some(decision.outcome);
        attempt.reason = decision.reason.clone();
        attempt.exit = decision.exit;
        let started_at = attempt.started_at;
        attempt.failed_rank = decision.failed_rank;
        attempt.state = AttemptState::Stopping;
        let running: Vec<usize> = (0..attempt.members.len())
            .filter(|rank| !is_released(attempt.members[*rank].phase))
            .collect();
        let went_down = matches!(
            decision.reason.code,
            ReasonCode::NodeLost | ReasonCode::NodeRebooted
        );
        if let (true, Some(started_at)) = (went_down, started_at) {
            self.note_taken_down(now, (id.job, id.task), started_at, &decision.bad_nodes);
        }
        if !decision.bad_nodes.is_empty() {
            self.live
                .avoid
                .entry((id.job, id.task))
                .or_default()
                .extend(decision.bad_nodes);
        }
        let reason = if decision.outcome == Outcome::Succeeded {
            Reason::new(
                ReasonCode::Uploading,
                "every rank exited with 0; its results are brought in",
            )
        } else {
            decision.reason
        };
        self.t
            .set_task((id.job, id.task), now, JobState::Stopping, reason);
        for rank in running {
            self.tell(id, rank);
        }
        self.settle(now, id);
    }

    /// Ends a member that nobody can report about any more.
    pub(crate) fn end_member(&mut self, now: Timestamp, id: AttemptRef, rank: usize, why: Reason) {
        let node = self
            .t
            .attempts
            .get(&id)
            .and_then(|attempt| attempt.members.get(rank));
        let Some(node) = node.map(|member| member.node) else {
            return;
        };
        let Some(before) = self.t.advance_member(id, rank, MemberPhase::Ended) else {
            return;
        };
        if before == MemberPhase::Uploading {
            self.give_up_upload(id, rank, &why.message);
        }
        if before == MemberPhase::CleanupPending {
            self.member_cleaned(now, id, node);
        }
        if !is_released(before) {
            self.wants_schedule = true;
            // Changes nothing if the outcome is decided. A member that was uploading ended by itself before.
            self.decide(
                now,
                id,
                Decision::interrupted(why.code, &[node], why.message),
            );
        }
        self.settle(now, id);
    }

    /// Takes the steps that an attempt is due for: gives up nodes that are silent for too long, and closes the attempt
    /// when nothing of it is left or nothing that can be waited for.
    pub(crate) fn settle(&mut self, now: Timestamp, id: AttemptRef) {
        let Some(attempt) = self.t.attempts.get(&id) else {
            return;
        };
        if self.t.is_carried(id) {
            // Its bundle says what is given up.
            let ended = attempt
                .members
                .iter()
                .all(|m| m.phase == MemberPhase::Ended);
            if ended && attempt.outcome.is_some() && attempt.state != AttemptState::Ended {
                self.close(now, id, AttemptState::Ended);
            }
            return;
        }
        if attempt.outcome.is_none() {
            return self.settle_undecided(now, id);
        }
        let uploading: Vec<(usize, NodeId)> = attempt
            .members
            .iter()
            .enumerate()
            .filter(|(_, member)| {
                member.phase == MemberPhase::Uploading
                    && self.is_given_up(now, attempt, member.node)
            })
            .map(|(rank, member)| (rank, member.node))
            .collect();
        if self.may_replace(attempt) {
            // Processes are gone where a member uploads, so giving that up risks nothing but what was not uploaded.
            for (rank, node) in uploading {
                self.give_up_upload(id, rank, &format!("{node} is not heard of"));
                self.t.advance_member(id, rank, MemberPhase::Ended);
            }
        } else if let Some((_, node)) = uploading.first() {
            return self.explain_upload(now, id, *node);
        }
        let Some(attempt) = self.t.attempts.get(&id) else {
            return;
        };
        let mut open = attempt
            .members
            .iter()
            .filter(|member| member.phase != MemberPhase::Ended);
        let lost = attempt.state == AttemptState::Lost;
        if attempt.state == AttemptState::Ended {
            return;
        }
        let most = usize::from(planted(Mutation::ClosedWithOneLeft));
        if open.clone().count() <= most {
            self.close(now, id, AttemptState::Ended);
        } else if !lost
            && self.may_replace(attempt)
            && open.clone().all(|member| {
                !is_released(member.phase)
                    && self.is_given_up(now, attempt, member.node)
                    // Under a lease nothing may overlap, and this is known to live.
                    && (attempt.lease.is_none() || !lingers(member))
            })
        {
            self.label_unconfirmed(id);
            self.close(now, id, AttemptState::Lost);
        } else if !lost
            && open.all(|member| {
                let given_up = || self.is_given_up(now, attempt, member.node);
                lingers(member)
                    || (!is_released(member.phase) && self.may_replace(attempt) && given_up())
            })
        {
            self.settle_over(now, id);
        }
    }

    /// Nothing of the attempt is left but processes that outlive SIGKILL: its task is over, or waits for them.
    fn settle_over(&mut self, now: Timestamp, id: AttemptRef) {
        if self.is_tried_again(now, id) {
            return self.explain_cleanup(now, id);
        }
        if let Some(attempt) = self.t.attempt_mut(id) {
            cleanup::tell_pending(attempt);
        }
        self.close(now, id, AttemptState::Lost);
    }

    /// Says of an attempt that was decided for another reason where its end is not confirmed, before it is over for its
    /// user.
    fn label_unconfirmed(&mut self, id: AttemptRef) {
        let Some(attempt) = self.t.attempt_mut(id) else {
            return;
        };
        let said = matches!(
            attempt.reason.code,
            ReasonCode::NodeLost | ReasonCode::LeaseExpired
        );
        if said || attempt.lease.is_some() {
            return; // Under a lease the node has ended it, wherever it may be.
        }
        let nodes: Vec<String> = attempt
            .members
            .iter()
            .filter(|member| member.phase != MemberPhase::Ended)
            .map(|member| member.node.to_string())
            .collect();
        let message = format!(
            "{}; attempt {} unconfirmed on {}",
            attempt.reason.message,
            id.attempt,
            nodes.join(", ")
        );
        attempt.reason = Reason::new(attempt.reason.code, message);
    }

    /// Says at a member what of it is lost with an upload that nobody waits for any more.
    fn give_up_upload(&mut self, id: AttemptRef, rank: usize, why: &str) {
        let member = self
            .t
            .attempt_mut(id)
            .and_then(|attempt| attempt.members.get_mut(rank));
        let Some(member) = member else { return };
        let lost = match (member.outputs, member.checkpoint) {
            (None, None) => "its logs, outputs and checkpoint were",
            (None, Some(_)) => "its logs and outputs were",
            (Some(_), None) => "its logs and checkpoint were",
            (Some(_), Some(_)) => "the rest of its logs was",
        };
        let told = format!("{lost} not brought in: {why}");
        if member.warning.is_empty() {
            member.warning = told;
        } else {
            member.warning = format!("{}; {told}", member.warning);
        }
    }

    /// Tells the task that its results are waited for, however long its node is silent.
    fn explain_upload(&mut self, now: Timestamp, id: AttemptRef, node: NodeId) {
        let key = (id.job, id.task);
        let told = |task: &TaskRecord| {
            task.state != JobState::Stopping || task.reason.code == ReasonCode::NodeUnreachable
        };
        if self.t.tasks.get(&key).is_none_or(told) {
            return;
        }
        let message = format!("{node} is not heard of; waits until its results are brought in");
        let reason = Reason::new(ReasonCode::NodeUnreachable, message);
        self.t.set_task(key, now, JobState::Stopping, reason);
    }

    fn settle_undecided(&mut self, now: Timestamp, id: AttemptRef) {
        let Some(attempt) = self.t.attempts.get(&id) else {
            return;
        };
        let silent = attempt
            .members
            .iter()
            .find(|member| {
                !is_released(member.phase) && self.is_given_up(now, attempt, member.node)
            })
            .map(|member| member.node);
        let Some(node) = silent else { return };
        if self.may_replace(attempt) {
            let (code, message) = match attempt.lease {
                None => {
                    let message = format!("attempt {} unconfirmed on {node}", id.attempt);
                    (ReasonCode::NodeLost, message)
                }
                // The node has ended it, wherever it may be.
                Some(_) => (ReasonCode::LeaseExpired, format!("lease over on {node}")),
            };
            return self.decide(now, id, Decision::interrupted(code, &[node], message));
        }
        if attempt.reason.code == ReasonCode::NodeUnreachable {
            return;
        }
        let message = format!("{node} is not heard of; waits until what runs there is confirmed");
        let reason = Reason::new(ReasonCode::NodeUnreachable, message);
        self.explain_attempt(now, id, reason);
    }

    /// Gives an attempt and its task another reason in the same state.
    pub(crate) fn explain_attempt(&mut self, now: Timestamp, id: AttemptRef, reason: Reason) {
        if let Some(attempt) = self.t.attempt_mut(id) {
            attempt.reason = reason.clone();
        }
        let key = (id.job, id.task);
        if let Some(state) = self.t.tasks.get(&key).map(|task| task.state) {
            self.t.set_task(key, now, state, reason);
        }
    }

    /// A silent node is heard of again: its attempts that only waited for it go on.
    pub(crate) fn resume_waiting(&mut self, now: Timestamp, node: NodeId) {
        for (id, rank) in self.t.members_on(node) {
            self.resume_upload(now, id, rank);
            let waits = self.t.attempts.get(&id).is_some_and(|attempt| {
                attempt.outcome.is_none() && attempt.reason.code == ReasonCode::NodeUnreachable
            });
            if waits {
                let reason = match self.t.attempts.get(&id).map(|attempt| attempt.state) {
                    Some(AttemptState::Running) => Reason::new(
                        ReasonCode::Running,
                        format!("runs; {node} is heard of again"),
                    ),
                    Some(_) | None => Reason::new(
                        ReasonCode::Preparing,
                        format!("prepares; {node} is heard of again"),
                    ),
                };
                self.explain_attempt(now, id, reason);
            }
        }
    }

    /// The same for a task that only waited for what the node has of it.
    fn resume_upload(&mut self, now: Timestamp, id: AttemptRef, rank: usize) {
        let uploads = self.t.attempts.get(&id).is_some_and(|attempt| {
            attempt.outcome.is_some()
                && !attempt.state.is_over()
                && attempt.members[rank].phase == MemberPhase::Uploading
        });
        let key = (id.job, id.task);
        let waits = self.t.tasks.get(&key).is_some_and(|task| {
            task.state == JobState::Stopping && task.reason.code == ReasonCode::NodeUnreachable
        });
        if uploads && waits {
            let reason = Reason::new(ReasonCode::Uploading, "its results are brought in");
            self.t.set_task(key, now, JobState::Stopping, reason);
        }
    }

    fn may_replace(&self, attempt: &AttemptRecord) -> bool {
        self.t
            .jobs
            .get(&attempt.id.job)
            .is_none_or(|job| match job.spec.on_disconnect {
                OnDisconnect::Replace | OnDisconnect::Stop => true,
                OnDisconnect::Wait => planted(Mutation::ReplaceWaiting),
            })
    }

    /// Whether a node is silent for so long that an attempt of this size need not wait for it.
    fn is_given_up(&self, now: Timestamp, attempt: &AttemptRecord, node: NodeId) -> bool {
        let limit = self.patience(attempt) / (1 + u32::from(planted(Mutation::HalfSilence)));
        let heard = self
            .live
            .last_heard
            .get(&node)
            .copied()
            .unwrap_or(self.live.lease_base);
        now.since(heard) >= limit && self.is_silent(node) && !self.live.braked
    }

    /// Whether the node counts as not heard of: its silence was noticed and is on record.
    pub(crate) fn is_silent(&self, node: NodeId) -> bool {
        self.t
            .nodes
            .get(&node)
            .is_none_or(|node| match node.availability {
                NodeAvailability::Unreachable | NodeAvailability::Lost => true,
                NodeAvailability::Ready => false,
            })
    }

    /// Closes an attempt, `ENDED` or `LOST`, and lets its task go on.
    pub(crate) fn close(&mut self, now: Timestamp, id: AttemptRef, state: AttemptState) {
        let Some(attempt) = self.t.attempt_mut(id) else {
            return;
        };
        let first_time = !attempt.state.is_over();
        attempt.state = state;
        if !first_time {
            cleanup::tell_done(attempt);
        }
        let ended_at = ended_at(attempt, now);
        attempt.ended_at.get_or_insert(ended_at);
        let carried = self.t.is_carried(id);
        let Some(attempt) = self.t.attempts.get(&id) else {
            return;
        };
        let forget = state == AttemptState::Ended || planted(Mutation::ForgetLost);
        if forget && !carried {
            let nodes: Vec<NodeId> = attempt.members.iter().map(|member| member.node).collect();
            for node in nodes {
                self.send(node, Command::Forget(id));
            }
        }
        // What a task in a bundle held is free only when the bundle has fewer tasks than slots.
        self.wants_schedule |= !carried;
        if first_time {
            self.attempt_over(now, id);
        }
    }

    /// Tells a member's agent what is desired of it, if the agent is in session. Otherwise it hears when it comes back.
    pub(crate) fn tell(&mut self, id: AttemptRef, rank: usize) {
        if self.t.is_carried(id) {
            return; // The agent has its bundle, and never a member of it.
        }
        let Some(attempt) = self.t.attempts.get(&id) else {
            return;
        };
        let Some(member) = attempt.members.get(rank) else {
            return;
        };
        let node = member.node;
        if let Some(desired) = gang::desired(self.t.jobs.get(&id.job), attempt, rank) {
            self.send(node, Command::Desire(Box::new(desired)));
        }
    }
}

/// When the last rank of an attempt was gone, as the agents told it; now, if not every member told of its ranks.
pub(crate) fn ended_at(attempt: &AttemptRecord, now: Timestamp) -> Timestamp {
    let ends = attempt.members.iter().map(|member| {
        let ends = member.ranks.iter().map(|end| end.at);
        ends.max()
    });
    let last = ends
        .collect::<Option<Vec<_>>>()
        .and_then(|ends| ends.into_iter().max());
    // The agent's clock may be wrong; it cannot have ended before it started nor after we heard of it.
    let first = attempt.started_at.unwrap_or(attempt.placed_at);
    last.unwrap_or(now).max(first).min(now)
}

/// Finds the rank that failed first by itself, and says how.
fn rank_failed(node: NodeId, ranks: &[RankEnd]) -> Decision {
    let known = |end: &&RankEnd| !end.exit.is_success() && end.exit != ExitStatus::Unknown;
    let earliest = |end: &&RankEnd| (end.at, end.rank);
    let unprompted = ranks
        .iter()
        .filter(known)
        .filter(|end| end.unprompted)
        .min_by_key(earliest);
    let Some(end) = unprompted.or_else(|| ranks.iter().filter(known).min_by_key(earliest)) else {
        return Decision::interrupted(
            ReasonCode::SupervisorLost,
            &[node],
            format!("a rank failed on {node}, but its exit status is not known"),
        );
    };
    let rank = end.rank;
    let (code, message) = match end.exit {
        ExitStatus::Code(_) | ExitStatus::Signal(_) | ExitStatus::Unknown if end.oom_killed => (
            ReasonCode::OomKilled,
            format!("rank {rank} on {node} was killed for want of memory"),
        ),
        ExitStatus::Code(code) => (
            ReasonCode::RankExited,
            format!("rank {rank} on {node} exited with {code}"),
        ),
        ExitStatus::Signal(signal) => (
            ReasonCode::RankSignalled,
            format!("rank {rank} on {node} was ended by signal {signal}"),
        ),
        ExitStatus::NotStarted | ExitStatus::Unknown => (
            ReasonCode::CannotExecute,
            format!("rank {rank} on {node} could not be started"),
        ),
    };
    Decision {
        outcome: Outcome::Failed,
        reason: Reason::new(code, message),
        exit: Some(end.exit),
        failed_rank: Some(rank),
        bad_nodes: Vec::new(),
    }
}

/// `1 node`, `3 nodes`.
pub(crate) fn count(number: usize, noun: &str) -> String {
    match number {
        1 => format!("1 {noun}"),
        _ => format!("{number} {noun}s"),
    }
}
