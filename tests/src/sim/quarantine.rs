//! What the oracle knows of processes that outlive SIGKILL and of attempts without end: no row may say that a task goes on
//! beside such processes, that anything comes on their node, or that a task is tried for ever.

use trainyard_common::ids::NodeId;
use trainyard_common::limits;
use trainyard_common::record::AttemptRecord;
use trainyard_common::spec::OnDisconnect;
use trainyard_common::state::{AttemptState, JobState, MemberPhase};

use super::world::World;

/// Whether processes of it outlive SIGKILL.
pub(crate) fn is_lingering(attempt: &AttemptRecord) -> bool {
    let mut members = attempt.members.iter();
    members.any(|member| member.phase == MemberPhase::CleanupPending)
}

impl World {
    /// An attempt is over for its user before its processes are: then no other one follows.
    pub(crate) fn check_lingering(&mut self, attempt: &AttemptRecord) {
        let id = attempt.id;
        self.see("attempt over with cleanup pending");
        let key = (id.job, id.task);
        let task = self.typed().tasks.get(&key).map(|task| task.state);
        let over = task.is_none_or(JobState::is_terminal);
        if !over && self.is_gone_with_its_nodes(attempt) {
            self.see("attempt with cleanup pending given up");
            return self.check_brake(&id);
        }
        self.holds("I2", over, || {
            format!("processes of {id} are left and its task is {task:?}")
        });
    }

    /// Whether time may give such an attempt up as any other one: nobody asked for a lease or to wait, and every node with
    /// something left was silent for as long as that takes.
    fn is_gone_with_its_nodes(&self, attempt: &AttemptRecord) -> bool {
        let job = self.typed().jobs.get(&attempt.id.job);
        let replaces = job.is_none_or(|job| job.spec.on_disconnect == OnDisconnect::Replace);
        let config = &self.swarm.config;
        let limit = match attempt.members.len() {
            0 | 1 => config.lost_after,
            _ => config.lost_after_gang,
        };
        let mut open = attempt
            .members
            .iter()
            .filter(|m| m.phase < MemberPhase::Uploading);
        replaces && attempt.lease.is_none() && open.all(|m| self.was_silent(m.node, limit))
    }

    /// Nothing new comes on a node with processes that outlive SIGKILL.
    pub(crate) fn check_quarantine(&mut self, attempt: &AttemptRecord) {
        let id = attempt.id;
        let on = |node: NodeId| attempt.members.iter().any(|member| member.node == node);
        let stuck = |other: &&AttemptRecord| {
            let mut members = other.members.iter();
            members.any(|m| m.phase == MemberPhase::CleanupPending && on(m.node))
        };
        let other = self.typed().attempts.values().find(stuck);
        // Of a bundle, what it holds ahead gets its rows when it starts.
        let other = other
            .map(|other| other.id)
            .filter(|_| attempt.state == AttemptState::Placed);
        self.holds("I1", other.is_none(), || {
            format!("{id} is placed on a node where processes of {other:?} outlive SIGKILL")
        });
    }

    /// No task is tried for ever.
    pub(crate) fn check_attempts_bounded(&mut self, attempt: &AttemptRecord) {
        let id = attempt.id;
        // Numbers that somebody gave before, or claims to have seen, are passed over.
        if self.oracle.restores > 0 || self.oracle.forged > 0 {
            return;
        }
        let Some(job) = self.typed().jobs.get(&id.job) else {
            return;
        };
        let (retries, most) = (
            job.spec.retries,
            self.swarm.config.max_infrastructure_failures,
        );
        // What was counted before a long run is of no account after it.
        let long = |row: &&AttemptRecord| {
            let ran = row.started_at.zip(row.ended_at);
            let same = (row.id.job, row.id.task) == (id.job, id.task);
            same && ran.is_some_and(|(from, to)| to.since(from) >= limits::PROVEN_RUN)
        };
        let long = self.typed().attempts.values().filter(long).count();
        let long = u32::try_from(long).unwrap_or(u32::MAX);
        let bound = (retries + 1).saturating_mul(most).saturating_mul(long + 1);
        self.see("attempts of a task counted");
        self.holds("P39", id.attempt.0 <= bound, || {
            format!("{id} is more than the {bound} attempts that its task may have")
        });
    }
}
