//! Promises about what is decided and asked for, held against rows and requests when they are made: how often a task is
//! tried, that nothing new begins where nothing may, and what an agent's process must not do once it was told something.

use std::collections::{BTreeMap, BTreeSet};

use trainyard_agent_core::{BundleEffect, Effect, Event};
use trainyard_common::ids::{
    AttemptNumber, AttemptRef, BundleRef, Incarnation, JobId, NodeId, TaskIndex,
};
use trainyard_common::member::{DesiredMember, DesiredPhase, EndCause};
use trainyard_common::record::{AttemptRecord, NodeRecord};
use trainyard_common::state::{NodeAvailability, NodePolicy, Outcome, ReasonCode};
use trainyard_coordinator_core::event::{Registration, SessionId};

use super::clock::{Micros, micros, secs};
use super::host::Role;
use super::world::World;

/// Longest until a rank is killed, beyond its grace, when its agent was told to stop it and was there all the time:
/// requests that fail are made again.
const OBEYED_WITHIN: Micros = secs(100);
/// So few silent nodes are no crowd, as in the core.
const CROWD: usize = 3;

/// What is known for these checks. Agents' processes go by their numbers.
#[derive(Debug, Default)]
pub(crate) struct Duties {
    /// Tasks that changed in this commit.
    tasks: BTreeSet<(JobId, TaskIndex)>,
    /// Attempts that were decided in this commit.
    pub(crate) decided: BTreeSet<AttemptRef>,
    /// Most nodes were silent before this commit.
    most_silent: bool,
    /// Members that a process was told to stop, and when.
    stopped: BTreeMap<(u64, AttemptRef), Micros>,
    /// Directories that a process deleted.
    deleted: BTreeSet<(u64, AttemptRef)>,
    deleted_bundles: BTreeSet<(u64, BundleRef)>,
    /// How agents said that tasks in bundles ended.
    told: BTreeMap<(AttemptRef, NodeId), EndCause>,
    /// Start and opening of each session of this process of the coordinator, and of the last one of each node.
    openings: BTreeMap<SessionId, (NodeId, Incarnation, u64)>,
    welcomed: BTreeMap<NodeId, (Incarnation, u64)>,
}

impl World {
    // === rows ===

    pub(crate) fn before_commit(&mut self) {
        let seen = |node: &&NodeRecord| node.incarnation.0 > 0 || !node.boot_id.is_empty();
        let nodes = self.typed().nodes.values().filter(seen);
        let (mut present, mut silent) = (0, 0);
        for node in nodes {
            present += usize::from(node.availability != NodeAvailability::Lost);
            silent += usize::from(node.availability == NodeAvailability::Unreachable);
        }
        let duties = &mut self.oracle.duties;
        duties.tasks.clear();
        duties.decided.clear();
        duties.most_silent = silent >= CROWD && 2 * silent > present;
    }

    pub(crate) fn note_task_row(&mut self, job: JobId, task: TaskIndex) {
        self.oracle.duties.tasks.insert((job, task));
    }

    /// Nobody is given up while most are silent at once: then it is we who are cut off.
    pub(crate) fn check_brake(&mut self, who: &dyn std::fmt::Display) {
        let most_silent = self.oracle.duties.most_silent;
        self.holds("I16", !most_silent, || {
            format!("{who} is given up while most nodes are silent")
        });
    }

    pub(crate) fn check_incarnation(&mut self, node: &NodeRecord) {
        let before = self.typed().nodes.get(&node.id);
        let before = before.map(|node| node.incarnation).unwrap_or_default();
        self.holds("I4", before <= node.incarnation, || {
            let (id, now) = (node.id, node.incarnation);
            format!("start {now} of {id} speaks after start {before}")
        });
    }

    /// A member's attempt has a place now.
    pub(crate) fn check_place_allowed(&mut self, attempt: &AttemptRecord) {
        let id = attempt.id;
        if attempt.outcome.is_some() || self.oracle.carried.attempts.contains_key(&id) {
            return;
        }
        let job = self.typed().jobs.get(&id.job);
        let cancelled = job.is_some_and(|job| job.cancel.is_some());
        self.holds("I8", !cancelled, || {
            format!("{id} is placed after its job was cancelled")
        });
        for member in &attempt.members {
            self.check_open(&id, member.node);
        }
    }

    /// Nothing new is given to a node that an operator closed.
    pub(crate) fn check_open(&mut self, what: &dyn std::fmt::Display, node: NodeId) {
        let policy = self.typed().nodes.get(&node).map(|node| node.policy);
        let open = policy.is_none_or(|policy| policy == NodePolicy::Active);
        self.holds("policy", open, || {
            format!("{what} is placed on {node}, which is {policy:?}")
        });
    }

    /// The end of a task in a bundle is on record as its agent told it.
    pub(crate) fn check_told(&mut self, attempt: &AttemptRecord) {
        let lost = attempt.reason.code == ReasonCode::SupervisorLost;
        let Some(member) = attempt.members.first().filter(|_| lost) else {
            return;
        };
        let id = attempt.id;
        let excused =
            self.loose_job(id.job) || self.is_doubled(member.node) || self.oracle.restores > 0;
        let told = self.oracle.duties.told.get(&(id, member.node)).copied();
        let wrong = told.filter(|told| *told != EndCause::SupervisorLost);
        self.holds("I13", excused || wrong.is_none(), || {
            format!("{id} counts as unaccounted for, and its agent told of {wrong:?}")
        });
    }

    pub(crate) fn note_told_end(&mut self, id: AttemptRef, node: NodeId, cause: EndCause) {
        self.oracle.duties.told.entry((id, node)).or_insert(cause);
    }

    /// Each task is tried again as often as its job asks for; what the infrastructure does counts for nothing.
    pub(crate) fn check_budget(&mut self) {
        for key in std::mem::take(&mut self.oracle.duties.tasks) {
            let (Some(task), Some(job)) =
                (self.typed().tasks.get(&key), self.typed().jobs.get(&key.0))
            else {
                continue;
            };
            let bound = |number| AttemptRef {
                job: key.0,
                task: key.1,
                attempt: AttemptNumber(number),
            };
            let attempts = self.typed().attempts.range(bound(0)..=bound(u32::MAX));
            let failed = attempts
                .filter(|(_, row)| row.outcome == Some(Outcome::Failed) && row.state.is_over())
                .count();
            let (failures, retries) = (task.failures, job.spec.retries);
            let most = retries + u32::from(task.state.is_terminal());
            let counted = usize::try_from(failures) == Ok(failed);
            let right = (counted && failures <= most) || self.loose_job(key.0);
            self.holds("P39", right, || {
                let (job, index) = key;
                format!(
                    "{job}.{index} counts {failures} failures of {failed}, with {retries} retries"
                )
            });
        }
    }

    // === sessions ===

    pub(crate) fn note_opening(&mut self, reg: &Registration) {
        let opening = (reg.node, reg.incarnation, reg.opening);
        self.oracle.duties.openings.insert(reg.session, opening);
    }

    pub(crate) fn forget_openings(&mut self) {
        self.oracle.duties.openings.clear();
        self.oracle.duties.welcomed.clear();
    }

    /// An agent is welcomed, and it is not an earlier opening of a session that speaks.
    pub(crate) fn check_welcome(&mut self, conn: u64) {
        let session = self.conns.get(&conn).and_then(|conn| conn.session);
        let duties = &mut self.oracle.duties;
        let opening = session.and_then(|session| duties.openings.get(&session));
        let Some((node, incarnation, opening)) = opening.copied() else {
            return;
        };
        let now = (incarnation, opening);
        let before = duties.welcomed.insert(node, now);
        // Another start is held against the row.
        let late = before.filter(|before| before.0 == incarnation && before.1 >= opening);
        self.holds("I4", late.is_none() || self.is_doubled(node), || {
            format!("{node} is welcomed with opening {opening} after {before:?}")
        });
    }

    // === an agent's process ===

    pub(crate) fn note_agent_told(&mut self, index: usize, event: &Event) {
        let Some(agent) = self.agent_number(index) else {
            return;
        };
        let (now, stopped) = (self.now, &mut self.oracle.duties.stopped);
        let mut note = |member: &DesiredMember| {
            if let DesiredPhase::Stop(stop) = member.phase {
                let by = now + micros(stop.grace);
                stopped.entry((agent, member.attempt)).or_insert(by);
            }
        };
        match event {
            Event::Connected { desired } => desired.iter().for_each(&mut note),
            Event::DesiredChanged(desired) => note(desired),
            _ => {}
        }
    }

    /// What was told to stop is not taken further, and what was deleted is not begun again.
    pub(crate) fn check_request(&mut self, index: usize, effect: &Effect) {
        let Some(agent) = self.agent_number(index) else {
            return;
        };
        let attempt = match effect {
            Effect::Accept(member) => {
                let again = self
                    .oracle
                    .duties
                    .deleted
                    .contains(&(agent, member.attempt));
                self.holds("I3", !again, || {
                    format!("agent {index} takes {} on again", member.attempt)
                });
                member.attempt
            }
            Effect::SpawnShim(attempt) | Effect::Go(attempt, _) => *attempt,
            Effect::Bundle(BundleEffect::Accept(bundle)) => {
                let bundle = bundle.bundle;
                let again = self
                    .oracle
                    .duties
                    .deleted_bundles
                    .contains(&(agent, bundle));
                return self.holds("I3", !again, || {
                    format!("agent {index} takes {bundle} on again")
                });
            }
            _ => return,
        };
        let stopped = self.oracle.duties.stopped.contains_key(&(agent, attempt));
        self.holds("I8", !stopped, || {
            format!("agent {index} goes on with {attempt}, which it was told to stop")
        });
    }

    pub(crate) fn note_deleted(&mut self, index: usize, attempt: AttemptRef) {
        if let Some(agent) = self.agent_number(index) {
            self.oracle.duties.deleted.insert((agent, attempt));
        }
    }

    pub(crate) fn note_bundle_deleted(&mut self, index: usize, bundle: BundleRef) {
        if let Some(agent) = self.agent_number(index) {
            self.oracle.duties.deleted_bundles.insert((agent, bundle));
        }
    }

    /// What an agent was told to stop is gone in time, if it was there to see to it.
    pub(crate) fn check_stopped(&mut self) {
        let now = self.now;
        let mut late = None;
        for (index, host) in self.hosts.iter().enumerate() {
            let Some(agent) = &host.agent else { continue };
            let ranks = host.processes.values();
            for rank in ranks.filter(|p| p.role != Role::Shim && p.bundle.is_none() && !p.killed) {
                let key = (agent.number, rank.attempt);
                let by = self.oracle.duties.stopped.get(&key);
                let by = by.map(|by| (*by).max(host.paused_until));
                if by.is_some_and(|by| now > by + OBEYED_WITHIN) {
                    late = Some((index, rank.attempt));
                }
            }
        }
        self.holds("I8", late.is_none(), || {
            format!("host, attempt {late:?} was told to stop long ago and lives")
        });
    }
}
