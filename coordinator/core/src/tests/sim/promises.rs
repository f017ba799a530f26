//! The promises, checked against the truth at every row that becomes durable and every process that starts. The names
//! are those of the project's list of invariants: I1 no double use, I2 whole gangs, I3 one spawn, I4 epochs, I6 one job
//! per request, I7 terminal is final and success is real, I8 cancel is final, I11 durable before visible, I16 our own
//! downtime is nobody's fault.

use trainyard_common::ids::AttemptRef;
use trainyard_common::member::{Cleanup, ObservedPhase};
use trainyard_common::record::{AttemptRecord, BundleState, Record};
use trainyard_common::spec::OnDisconnect;
use trainyard_common::state::{AttemptState, NodeAvailability, Outcome};

use super::world::World;

impl World {
    pub(super) fn note_truth(&mut self, index: usize, id: AttemptRef) {
        let member = &self.machines[index].members[&id];
        match &member.phase {
            ObservedPhase::Ready { .. } => {
                self.ever_ready.insert((id, member.spec.node_rank));
            }
            ObservedPhase::CleanupPending(Cleanup { ending, .. })
            | ObservedPhase::Uploading(ending) => {
                let zero = ending.ranks.iter().filter(|end| end.exit.is_success());
                self.succeeded.extend(zero.map(|end| (id, end.rank)));
            }
            ObservedPhase::Preparing
            | ObservedPhase::Running { .. }
            | ObservedPhase::Stopping
            | ObservedPhase::Ended(_) => {}
        }
    }

    pub(super) fn check_spawn(&mut self, index: usize, id: AttemptRef) {
        let machine = &self.machines[index];
        let spec = machine.members[&id].spec.clone();
        let count = self.spawned.entry((id, spec.node_rank)).or_default();
        *count += 1;
        assert_eq!(*count, 1, "I3: {id} was started twice on {}", machine.node);
        for rank in 0..spec.nodes {
            assert!(
                self.ever_ready.contains(&(id, rank)),
                "I2: {id} goes and member {rank} was not ready"
            );
        }
        // The only member of a gang was allowed to go by what made its attempt known.
        let placed = self.store.attempts.get(&id);
        assert!(
            placed.is_some_and(|placed| placed.ready_at.is_some() || spec.nodes == 1),
            "I11: {id} goes and that is not on record"
        );
        let mut cpu: u64 = machine.live_tasks().map(|(_, cpu)| cpu).sum();
        for (other, member) in machine.members.iter().filter(|(_, member)| member.lives()) {
            cpu += member.spec.resources.cpu_milli;
            let shared = member
                .spec
                .gpu_uuids
                .iter()
                .any(|gpu| spec.gpu_uuids.contains(gpu));
            assert!(
                *other == id || !shared,
                "I1: {id} and {other} use one GPU of {}",
                machine.node
            );
        }
        assert!(
            cpu <= 8000,
            "I1: more CPUs of {} are used than it has",
            machine.node
        );
        self.check_older(id);
    }

    /// No older attempt of the task lives, unless its node was given up.
    fn check_older(&self, id: AttemptRef) {
        for machine in &self.machines {
            let members = machine.members.iter().filter(|(_, member)| member.lives());
            let members = members.map(|(other, _)| *other);
            for other in members.chain(machine.live_tasks().map(|(other, _)| other)) {
                let older =
                    other.job == id.job && other.task == id.task && other.attempt < id.attempt;
                let lost = || self.unconfirmed.contains(&(other, machine.node));
                let replace =
                    || self.store.jobs[&id.job].spec.on_disconnect == OnDisconnect::Replace;
                assert!(
                    !older || (lost() && replace()),
                    "I2: {id} starts while {other} lives on {}",
                    machine.node
                );
            }
        }
    }

    /// A task in a bundle starts: once, with room, and not after an attempt that is not on record.
    pub(super) fn check_start(&mut self, index: usize, id: AttemptRef) {
        let count = self.spawned.entry((id, 0)).or_default();
        *count += 1;
        let machine = &self.machines[index];
        assert_eq!(*count, 1, "I3: {id} was started twice on {}", machine.node);
        let members = machine.members.values().filter(|member| member.lives());
        let cpu: u64 = members
            .map(|member| member.spec.resources.cpu_milli)
            .chain(machine.live_tasks().map(|(_, cpu)| cpu))
            .sum();
        assert!(
            cpu <= 8000,
            "I1: more CPUs of {} are used than it has",
            machine.node
        );
        for (other, _) in self.spawned.range((id, 1)..) {
            if (other.0.job, other.0.task) != (id.job, id.task) {
                break;
            }
            let first = self.store.attempts.get(&id);
            assert!(
                first.is_some_and(|first| first.outcome == Some(Outcome::Interrupted)),
                "{id} starts after {} and its interruption is not on record",
                other.0
            );
        }
    }

    pub(super) fn check_row(&mut self, record: &Record) {
        match record {
            Record::Job(job) => {
                if let Some(before) = self.store.jobs.get(&job.id) {
                    assert!(
                        !before.state.is_terminal(),
                        "I7: {} changed after its end",
                        job.id
                    );
                    assert!(before.next_fresh <= job.next_fresh);
                } else {
                    let twin = self
                        .store
                        .jobs
                        .values()
                        .find(|other| other.request_id == job.request_id);
                    assert!(twin.is_none(), "I6: one request made two jobs");
                }
            }
            Record::Task(task) => {
                let before = self.store.tasks.get(&(task.job, task.index));
                let over = before.is_some_and(|before| before.state.is_terminal());
                assert!(!over, "I7: a task of {} changed after its end", task.job);
            }
            Record::Attempt(attempt) => self.check_attempt(attempt),
            Record::Node(node) => {
                if node.availability == NodeAvailability::Lost {
                    self.see("node lost");
                    let contact = self.last_contact.get(&node.id).copied().unwrap_or_default();
                    let since = contact.max(self.core_since);
                    assert!(
                        self.now.since(since) >= self.config.lost_after,
                        "I16: {} was given up early",
                        node.id
                    );
                }
            }
            Record::Bundle(bundle) => {
                let before = self.store.bundles.get(&bundle.id);
                assert!(before.is_none_or(|before| before.recorded <= bundle.recorded));
                let lost = before.is_some_and(|before| before.state == BundleState::Lost);
                assert!(!lost || bundle.state == BundleState::Lost);
                if bundle.state == BundleState::Lost && !lost {
                    self.see("bundle lost");
                }
            }
            Record::BundleRemoved(_)
            | Record::NodeRemoved(_)
            | Record::Token(_)
            | Record::User(_) => {}
        }
    }

    fn check_attempt(&mut self, attempt: &AttemptRecord) {
        let id = attempt.id;
        let before = self.store.attempts.get(&id);
        if let Some(before) = before {
            assert!(
                before.state != AttemptState::Ended,
                "I7: {id} changed after its end"
            );
            assert!(
                before.outcome.is_none() || before.outcome == attempt.outcome,
                "I7: {id} was decided twice"
            );
            let on = before.members.iter().zip(&attempt.members);
            assert!(
                on.into_iter().all(|(old, new)| old.phase <= new.phase),
                "I4: {id} went back"
            );
        } else {
            let highest = self.highest_attempt.entry((id.job, id.task)).or_default();
            assert!(id.attempt.0 > *highest, "I4: {id} is not above {highest}");
            *highest = id.attempt.0;
        }
        let changed = before.is_none_or(|before| before.state != attempt.state);
        let gang = attempt.members.len() > 1;
        let decided =
            attempt.outcome.is_some() && before.is_none_or(|before| before.outcome.is_none());
        if changed && attempt.state == AttemptState::Lost {
            for member in &attempt.members {
                let node = &self.store.nodes[&member.node];
                if node.availability != NodeAvailability::Ready {
                    self.unconfirmed.insert((id, node.id));
                }
            }
            self.see(if gang { "gang lost" } else { "attempt lost" });
        }
        if changed && attempt.state == AttemptState::Ready && gang {
            self.see("gang told to go");
        }
        if decided && let Some(outcome) = attempt.outcome {
            self.see(outcome.as_str());
            self.see(attempt.reason.code.as_str());
        }
        if decided && attempt.outcome == Some(Outcome::Succeeded) {
            assert!(
                !self.acked_cancels.contains(&id.job),
                "I8: {id} succeeded after the cancel was answered"
            );
            let spec = &self.store.jobs[&id.job].spec;
            for rank in 0..spec.world_size() {
                assert!(
                    self.succeeded.contains(&(id, rank)),
                    "I7: {id} succeeded and rank {rank} did not"
                );
            }
        }
    }
}
