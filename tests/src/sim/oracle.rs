//! What really happened and what was promised to whom, and the checks that hold every durable row, every word and every
//! process against it. The coordinator's own tables count for nothing here; the list of invariants is in `mod.rs`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use trainyard_agent_core::Event as AgentEvent;
use trainyard_common::bundle::ObservedBundle;
use trainyard_common::ids::{AttemptRef, BundleRef, Digest, JobId, NodeId, TaskIndex};
use trainyard_common::member::{DesiredPhase, MemberSpec, ObservedMember, ObservedPhase};
use trainyard_common::record::{AttemptRecord, JobRecord, NodeRecord, Record, TaskRecord};
use trainyard_common::resources::Resources;
use trainyard_common::spec::OnDisconnect;
use trainyard_common::state::{
    AttemptState, ExitStatus, MemberPhase, NodeAvailability, Outcome, ReasonCode,
};
use trainyard_coordinator_core::Core;

use super::carried::Carried;
use super::clock::{Micros, micros};
use super::coordinator::PAUSE;
use super::duties::Duties;
use super::host::Role;
use super::order::Order;
use super::quarantine::is_lingering;
use super::store::{Rows, awaited};
use super::world::World;

/// Greetings of a node that are remembered, to know what it said it does not have.
const GREETINGS: usize = 8;

/// What is known beside the machines themselves.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    /// When the coordinator last took in a word of a node.
    pub(crate) contact: BTreeMap<NodeId, Micros>,
    /// Who a connection's certificate says it is.
    pub(crate) certificates: BTreeMap<u64, NodeId>,
    /// How ranks really ended, by attempt, job and rank.
    pub(crate) exits: BTreeMap<(AttemptRef, String, u32), ExitStatus>,
    spawned: BTreeSet<(AttemptRef, String, u32)>,
    holds: BTreeMap<(usize, AttemptRef), (Resources, Vec<String>)>,
    ready: BTreeSet<(AttemptRef, u32)>,
    /// The furthest phase that the right agent reported of a member.
    reported: BTreeMap<(AttemptRef, NodeId), MemberPhase>,
    greetings: BTreeMap<NodeId, VecDeque<Greeting>>,
    pub(crate) carried: Carried,
    pub(crate) duties: Duties,
    pub(crate) order: Order,
    /// Nodes that an operator vouched for or removed.
    pub(crate) vouched: BTreeSet<NodeId>,
    pub(crate) accepted: BTreeMap<u64, (Digest, JobId)>,
    pub(crate) acked: BTreeSet<JobId>,
    pub(crate) cancelled: BTreeSet<JobId>,
    highest: BTreeMap<(String, TaskIndex), u32>,
    backup: Option<Rows>,
    pub(crate) restores: u64,
    /// Jobs, by name, of which a restored backup forgot something.
    loose: BTreeSet<String>,
    pub(crate) forged: u64,
    pub(crate) identities_changed: u64,
    /// Nodes of a restored backup that have not said what they run.
    pub(crate) awaited: BTreeSet<NodeId>,
    /// Nodes that said what they run since the last restore.
    pub(crate) heard: BTreeSet<NodeId>,
}

/// What a node said it has.
#[derive(Debug, Default)]
struct Greeting {
    members: BTreeSet<AttemptRef>,
    bundles: BTreeSet<BundleRef>,
}

impl Oracle {
    /// Whether a node said of itself that it does not have a member or a bundle.
    pub(crate) fn absent(
        &self,
        node: NodeId,
        member: Option<AttemptRef>,
        bundle: Option<BundleRef>,
    ) -> bool {
        let lacks = |greeting: &Greeting| {
            member.is_none_or(|member| !greeting.members.contains(&member))
                && bundle.is_none_or(|bundle| !greeting.bundles.contains(&bundle))
        };
        self.greetings
            .get(&node)
            .is_some_and(|greetings| greetings.iter().any(lacks))
    }

    pub(crate) fn was_told(&self, attempt: AttemptRef, node: NodeId, phase: MemberPhase) -> bool {
        self.reported
            .get(&(attempt, node))
            .is_some_and(|reported| phase <= *reported)
    }

    pub(crate) fn backed_up(&mut self, rows: &Rows) {
        self.backup = Some(rows.clone());
    }

    /// A backup was put back: what came after it is lost, and the documentation says so.
    pub(crate) fn before_restore(&mut self, rows: &Rows) {
        let Some(backup) = &self.backup else { return };
        for (id, job) in &rows.jobs {
            let same_tasks = |a: &Rows, b: &Rows| {
                let all = (*id, TaskIndex(0))..=(*id, TaskIndex(u32::MAX));
                a.tasks.range(all.clone()).eq(b.tasks.range(all))
            };
            let same_attempts = |a: &Rows, b: &Rows| {
                let of = |rows: &Rows| -> Vec<AttemptRecord> {
                    rows.attempts
                        .values()
                        .filter(|attempt| attempt.id.job == *id)
                        .cloned()
                        .collect()
                };
                of(a) == of(b)
            };
            let bundles = |rows: &Rows| -> Vec<_> {
                let of = rows.bundles.values().filter(|bundle| bundle.id.job == *id);
                of.cloned().collect()
            };
            let same = backup.jobs.get(id) == Some(job)
                && bundles(rows) == bundles(backup)
                && same_tasks(rows, backup)
                && same_attempts(rows, backup);
            if !same {
                self.loose.insert(job.spec.name.clone());
            }
        }
    }

    pub(crate) fn restored(&mut self, rows: &Rows) {
        self.restores += 1;
        let kept = |job: &JobId| rows.jobs.contains_key(job);
        self.acked.retain(kept);
        self.cancelled
            .retain(|job| rows.jobs.get(job).is_some_and(|job| job.cancel.is_some()));
        self.accepted.retain(|_, (_, job)| kept(job));
        self.reported.clear();
        self.awaited = awaited(rows.nodes.values());
        self.heard.clear();
    }

    fn is_loose(&self, job: &str) -> bool {
        self.loose.contains(job)
    }
}

fn is_released(phase: MemberPhase) -> bool {
    phase >= MemberPhase::Uploading
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

impl World {
    pub(crate) fn typed(&self) -> &Rows {
        &self.coordinator.store.typed
    }

    pub(crate) fn job_name(&self, job: JobId) -> Option<String> {
        let job = self.typed().jobs.get(&job)?;
        Some(job.spec.name.clone())
    }

    pub(crate) fn loose_job(&self, job: JobId) -> bool {
        self.job_name(job)
            .is_none_or(|name| self.oracle.is_loose(&name))
    }

    pub(crate) fn is_vouched(&self, node: NodeId) -> bool {
        self.oracle.vouched.contains(&node) || self.users.vouches_for(node)
    }

    /// Whether an operator declared the node gone without looking: then what lives there is nobody's.
    pub(crate) fn was_taken_for_gone(&self, node: Option<NodeId>) -> bool {
        let gone = |host: &super::host::Host| host.taken_for_gone && host.node == node;
        node.is_some() && self.hosts.iter().any(gone)
    }

    /// Whether two machines claim to be this node at the moment.
    pub(crate) fn is_doubled(&self, node: NodeId) -> bool {
        let doubled = |host: &super::host::Host| host.doubled && host.node == Some(node);
        self.hosts.iter().any(doubled)
    }

    // === what agents say ===

    pub(crate) fn note_reported(
        &mut self,
        _index: usize,
        node: NodeId,
        observed: &[ObservedMember],
        whole: bool,
    ) {
        for member in observed {
            let phase = member_phase(&member.phase);
            self.note_phase(member.attempt, node, phase);
            if phase == MemberPhase::Ready {
                self.oracle.ready.insert((member.attempt, member.node_rank));
            }
        }
        if whole {
            let names = observed.iter().map(|member| member.attempt).collect();
            let greetings = self.oracle.greetings.entry(node).or_default();
            if greetings.len() >= GREETINGS {
                greetings.pop_front();
            }
            greetings.push_back(Greeting {
                members: names,
                bundles: BTreeSet::new(),
            });
        }
    }

    pub(crate) fn note_greeting(&mut self, node: NodeId, bundles: &[ObservedBundle]) {
        let greetings = self.oracle.greetings.entry(node).or_default();
        if let Some(greeting) = greetings.back_mut() {
            greeting.bundles = bundles.iter().map(|bundle| bundle.bundle).collect();
        }
    }

    pub(crate) fn note_phase(&mut self, attempt: AttemptRef, node: NodeId, phase: MemberPhase) {
        let known = self.oracle.reported.entry((attempt, node)).or_insert(phase);
        *known = phase.max(*known);
    }

    pub(crate) fn note_told(&mut self, index: usize, event: &AgentEvent) {
        if let AgentEvent::DesiredChanged(member) = event
            && let DesiredPhase::Stop(_) = member.phase
            && self.hosts[index].lives(member.attempt)
        {
            self.see("running member told to stop");
        }
    }

    // === processes ===

    /// A member's ranks are about to start.
    pub(crate) fn check_go(&mut self, index: usize, attempt: AttemptRef, spec: &MemberSpec) {
        self.see("member went");
        if spec.nodes > 1 {
            self.see("gang member went");
        }
        self.check_room(index, attempt, spec.resources, &spec.gpu_uuids);
        if self.oracle.is_loose(&spec.job_name) {
            return;
        }
        let row = self.typed().attempts.get(&attempt).cloned();
        let Some(row) = row else {
            return self.breaks("I11", format!("{attempt} goes and is not on record"));
        };
        // A member that is alone waits for nobody's word.
        self.holds("I11", row.ready_at.is_some() || spec.nodes == 1, || {
            format!("{attempt} goes and that is not on record")
        });
        let rank = usize::try_from(spec.node_rank).unwrap_or(usize::MAX);
        let node = self.hosts[index].node;
        let changed = self.oracle.identities_changed > 0;
        let ours = row.members.get(rank).map(|member| member.node) == node;
        self.holds("I18", ours || changed, || {
            format!("{attempt} goes on host {index}, which is not a node of it")
        });
        for rank in (0..spec.nodes).filter(|_| spec.nodes > 1) {
            let ready = self.oracle.ready.contains(&(attempt, rank));
            self.holds("I2", ready, || {
                format!("{attempt} goes and member {rank} was never ready")
            });
        }
    }

    /// What is about to start fits beside what lives.
    pub(crate) fn check_room(
        &mut self,
        index: usize,
        attempt: AttemptRef,
        resources: Resources,
        gpus: &[String],
    ) {
        self.oracle
            .holds
            .insert((index, attempt), (resources, gpus.to_vec()));
        let mut sum = resources;
        for other in self.hosts[index].attempts_alive() {
            if other == attempt {
                continue;
            }
            let Some((amounts, used)) = self.oracle.holds.get(&(index, other)) else {
                continue;
            };
            sum = sum.plus(amounts);
            let shared = used.iter().find(|gpu| gpus.contains(gpu)).cloned();
            self.holds("I1", shared.is_none(), || {
                format!("{attempt} and {other} use {shared:?} of host {index} at the same time")
            });
        }
        let capacity = self.hosts[index].inventory.capacity;
        // An agent counts no bundles, so two coordinators' worth of work can come together on a node: what a restored
        // backup has forgotten, and what a copied disk made the coordinator believe to be gone.
        let mut processes = self.hosts[index].processes.values();
        let carries = processes.any(|process| process.bundle.is_some());
        let gone = self.hosts[index].taken_for_gone;
        let excused = carries && (self.oracle.restores > 0 || self.hosts[index].doubled || gone);
        self.holds("I1", excused || sum.fits(&capacity), || {
            format!("live processes use {sum:?} of host {index}, which has {capacity:?}")
        });
    }

    pub(crate) fn check_spawn(&mut self, index: usize, attempt: AttemptRef, uid: u64, rank: u32) {
        let Some(process) = self.hosts[index].processes.get(&uid) else {
            return;
        };
        let job = process.job.clone();
        let first = self.oracle.spawned.insert((attempt, job.clone(), rank));
        self.see("rank started");
        if self.oracle.is_loose(&job) {
            return;
        }
        // A copied disk is told of loudly, and until it is gone two machines are one node.
        let doubled = self.hosts[index].doubled;
        self.holds("I3", first || doubled, || {
            format!("rank {rank} of {attempt} is started a second time")
        });
        let mut older = Vec::new();
        for (at, host) in self.hosts.iter().enumerate() {
            for other in host
                .processes
                .values()
                .filter(|other| other.role != Role::Shim)
            {
                let id = other.attempt;
                if other.job == job && id.task == attempt.task && id.attempt < attempt.attempt {
                    // No lease can promise more: a killed process that the kernel cannot end yet runs no instruction
                    // any more; and of what a killed shim leaves the agent takes care, if there is one.
                    let beyond = other.killed || !host.shims.contains_key(&id);
                    // An agent sees to it that none starts beside an older one that it knows.
                    let beside = at == index && other.bundle.is_none();
                    let doubled = host.doubled || host.taken_for_gone;
                    older.push((at, id, doubled, (beyond, beside)));
                }
            }
        }
        for (at, id, doubled, (beyond, beside)) in older {
            let job = self.typed().jobs.get(&id.job);
            let state = self.typed().attempts.get(&id).map(|row| row.state);
            let declared = state == Some(AttemptState::Lost)
                && job.is_some_and(|job| match job.spec.on_disconnect {
                    OnDisconnect::Replace => true,
                    OnDisconnect::Wait => false,
                    OnDisconnect::Stop => beyond,
                });
            self.see("overlap of attempts");
            self.holds("I2", (declared && !beside) || doubled, || {
                format!(
                    "{attempt} starts on host {index} while {id} ({state:?}) lives on host {at}"
                )
            });
        }
    }

    pub(crate) fn check_removed(&mut self, index: usize, attempt: AttemptRef) {
        self.see("directory removed");
        let state = self.typed().attempts.get(&attempt).map(|row| row.state);
        let recorded = state.is_none_or(|state| state == AttemptState::Ended);
        let loose = self.loose_job(attempt.job);
        self.holds("I11", recorded || loose, || {
            format!("host {index} deletes {attempt}, whose end is not on record ({state:?})")
        });
        let alive = self.hosts[index].lives(attempt);
        self.holds("I13", !alive, || {
            format!("host {index} deletes {attempt}, which lives")
        });
    }

    // === durable rows ===

    pub(crate) fn check_row(&mut self, record: &Record) {
        match record {
            Record::Job(job) => self.check_job(job),
            Record::Task(task) => self.check_task(task),
            Record::Attempt(attempt) => self.check_attempt(attempt),
            Record::Node(node) => self.check_node(node),
            Record::NodeRemoved(_) | Record::Token(_) | Record::User(_) => {}
            Record::Bundle(bundle) => self.check_bundle(bundle),
            Record::BundleRemoved(bundle) => self.check_bundle_over(*bundle),
        }
    }

    fn check_job(&mut self, job: &JobRecord) {
        let id = job.id;
        if let Some(before) = self.typed().jobs.get(&id).cloned() {
            self.holds("I7", !before.state.is_terminal(), || {
                format!("{id} changed after its end")
            });
            let forward = before.next_fresh <= job.next_fresh;
            self.holds("I4", forward, || format!("{id} has fresh tasks again"));
            let kept = before.cancel.is_none() || job.cancel.is_some();
            self.holds("I8", kept, || format!("{id} is not cancelled any more"));
        } else {
            let twin = self
                .typed()
                .jobs
                .values()
                .find(|other| other.request_id == job.request_id && other.owner == job.owner)
                .map(|twin| twin.id);
            self.holds("I6", twin.is_none(), || {
                format!(
                    "{id} and {twin:?} come from one request {}",
                    job.request_id.as_str()
                )
            });
        }
        if job.state.is_terminal() {
            self.see(job.state.as_str());
            let all = job.tasks.succeeded == job.spec.task_count();
            let success = job.state == trainyard_common::state::JobState::Succeeded;
            self.holds("I7", !success || all, || {
                format!("{id} succeeded and not all of its tasks")
            });
        }
    }

    fn check_task(&mut self, task: &TaskRecord) {
        self.note_task_row(task.job, task.index);
        let key = (task.job, task.index);
        if let Some(before) = self.typed().tasks.get(&key).cloned() {
            let name = format!("{}.{}", task.job, task.index);
            self.holds("I7", !before.state.is_terminal(), || {
                format!("{name} changed after its end")
            });
            let forward = before.attempts <= task.attempts;
            self.holds("I4", forward, || {
                format!("{name} has fewer attempts than before")
            });
        }
    }

    fn check_attempt(&mut self, attempt: &AttemptRecord) {
        let id = attempt.id;
        let before = self.typed().attempts.get(&id).cloned();
        let name = self.job_name(id.job).unwrap_or_default();
        match &before {
            Some(before) => {
                let open = before.state != AttemptState::Ended;
                self.holds("I7", open, || format!("{id} changed after its end"));
                let same = before.outcome.is_none() || before.outcome == attempt.outcome;
                self.holds("I7", same, || format!("{id} was decided twice"));
                let forward = before
                    .members
                    .iter()
                    .zip(&attempt.members)
                    .all(|(old, new)| old.phase <= new.phase);
                self.holds("I4", forward, || format!("a member of {id} went back"));
            }
            None => {
                let key = (name.clone(), id.task);
                let highest = self.oracle.highest.get(&key).copied().unwrap_or_default();
                let loose = self.oracle.is_loose(&name);
                self.holds("I4", loose || id.attempt.0 > highest, || {
                    format!("{id} is not above attempt {highest}")
                });
                self.oracle.highest.insert(key, id.attempt.0.max(highest));
                self.see("attempt placed");
                self.check_place_allowed(attempt);
                let node = attempt.members.first().map(|member| member.node);
                // Tasks of bundles get a row while they run, or with their end.
                let carried = node.is_some_and(|node| self.is_carried(id, node));
                if !carried && attempt.outcome.is_none() {
                    self.check_placed(&id.to_string());
                    self.note_placed(id.job, attempt.members.iter().map(|member| member.node));
                    self.check_above(id);
                }
                self.check_attempts_bounded(attempt);
                self.check_quarantine(attempt);
            }
        }
        self.check_members(attempt, before.as_ref(), &name);
        let decided = before
            .as_ref()
            .is_none_or(|before| before.outcome.is_none());
        if decided && let Some(outcome) = attempt.outcome {
            self.oracle.duties.decided.insert(id);
            self.check_told(attempt);
            self.see(outcome.as_str());
            self.see(attempt.reason.code.as_str());
            if outcome == Outcome::Succeeded {
                self.check_success(attempt, &name);
            }
            let lease_over = attempt.reason.message.starts_with("lease over on");
            if attempt.reason.code == ReasonCode::NodeLost || lease_over {
                self.check_given_up(attempt);
            }
            if lease_over {
                self.see("attempt given up after its lease");
            }
        }
        let newly = before.is_none_or(|before| before.state != attempt.state);
        if newly && attempt.state == AttemptState::Lost && is_lingering(attempt) {
            self.check_lingering(attempt);
        } else if newly && attempt.state == AttemptState::Lost {
            self.see("attempt given up unconfirmed");
            let waits = self
                .typed()
                .jobs
                .get(&id.job)
                .is_some_and(|job| job.spec.on_disconnect == OnDisconnect::Wait);
            let over = self
                .typed()
                .jobs
                .get(&id.job)
                .is_none_or(|job| job.state.is_terminal());
            self.holds("I2", !waits || over, || {
                format!("{id} is given up, and its job is to wait")
            });
        }
        if newly && attempt.state == AttemptState::Ready && attempt.members.len() > 1 {
            self.see("gang told to go");
        }
    }

    /// The coordinator waits no longer for nodes of a restored backup: it heard them, or had the time to.
    pub(crate) fn check_reconciled(&mut self) {
        let limit = self.swarm.config.lost_after;
        let awaited = std::mem::take(&mut self.oracle.awaited);
        let Some(process) = &self.coordinator.process else {
            return;
        };
        let there = |id: &NodeId| {
            let node = process.core.node(*id);
            node.is_some_and(|node| node.availability != NodeAvailability::Lost)
        };
        if let Some(node) = awaited.into_iter().find(there) {
            let waited = self.waited_since_start();
            let long = waited + self.drift_slack(limit) >= micros(limit);
            self.see("restored state taken as it is after a while");
            self.holds("I2", long, || {
                format!("{node} is not waited for any more, {waited} us after a restore")
            });
        }
    }

    /// Something new was placed: not while nodes of a restored backup may run what it does not know.
    pub(crate) fn check_placed(&mut self, what: &str) {
        let limit = self.swarm.config.lost_after;
        let typed = &self.coordinator.store.typed;
        let there = |id: &NodeId| {
            let node = typed.nodes.get(id);
            node.is_some_and(|node| node.availability != NodeAvailability::Lost)
        };
        let awaited = self.oracle.awaited.iter().find(|id| there(id)).copied();
        if let Some(node) = awaited {
            let waited = self.waited_since_start();
            let long = waited + self.drift_slack(limit) >= micros(limit);
            self.see("placed before a node of the backup was heard");
            self.holds("I2", long, || {
                format!("{what} is placed {waited} us after a restore, before {node} was heard of")
            });
        }
    }

    /// After a restore no number is given that a node, which was heard of, has already.
    fn check_above(&mut self, id: AttemptRef) {
        if self.oracle.restores == 0 {
            return;
        }
        let mut taken = None;
        for host in self.hosts.iter().filter(|host| !host.doubled) {
            let Some(node) = host.node else { continue };
            if !self.oracle.heard.contains(&node) {
                continue;
            }
            let same = |other: &&AttemptRef| {
                other.job == id.job && other.task == id.task && other.attempt >= id.attempt
            };
            taken = taken.or_else(|| host.disk.dirs.keys().find(same).copied());
        }
        self.see("attempt placed after a restore");
        self.holds("I4", taken.is_none(), || {
            format!("{id} is placed and a node has {taken:?}")
        });
    }

    fn check_members(
        &mut self,
        attempt: &AttemptRecord,
        before: Option<&AttemptRecord>,
        name: &str,
    ) {
        let id = attempt.id;
        let loose = self.oracle.is_loose(name) || self.oracle.restores > 0;
        for (rank, member) in attempt.members.iter().enumerate() {
            let old = before.and_then(|before| before.members.get(rank));
            let old_phase = old.map_or(MemberPhase::Unconfirmed, |old| old.phase);
            let node = member.node;
            let host = self
                .hosts
                .iter()
                .position(|host| host.node == Some(node) && !host.doubled)
                .filter(|_| !self.was_taken_for_gone(Some(node)));
            if member.phase > old_phase && !loose {
                let reported = self.oracle.reported.get(&(id, node)).copied();
                let backed = reported.is_some_and(|reported| member.phase <= reported);
                let carried = &self.oracle.carried;
                let bundle = carried.attempts.get(&id).copied();
                let absent = || {
                    self.oracle.absent(node, Some(id), bundle)
                        || carried.returned.contains(&(id, node))
                };
                let excused = member.phase == MemberPhase::Ended
                    && (absent() || self.is_vouched(node) || reported.is_some_and(is_released));
                self.holds("I18", backed || excused, || {
                    format!(
                        "{id} on {node} is {} and its agent said {reported:?}",
                        member.phase
                    )
                });
            }
            let freed = is_released(member.phase) && !is_released(old_phase);
            if let Some(host) = host.filter(|_| freed && !loose) {
                let alive = self.hosts[host]
                    .living(id)
                    .any(|(_, process)| process.job == name);
                self.holds("I1", !alive, || {
                    format!("what {id} has on {node} is free while its processes live there")
                });
            }
            if loose || self.is_doubled(node) {
                continue;
            }
            for end in &member.ranks {
                let truth = self
                    .oracle
                    .exits
                    .get(&(id, name.to_owned(), end.rank))
                    .copied();
                let right = match end.exit {
                    ExitStatus::Unknown => true,
                    ExitStatus::NotStarted => truth.is_none(),
                    ExitStatus::Code(_) | ExitStatus::Signal(_) => truth == Some(end.exit),
                };
                self.holds("I13", right, || {
                    format!(
                        "rank {} of {id} is on record with {} and ended with {truth:?}",
                        end.rank, end.exit
                    )
                });
            }
        }
    }

    fn check_success(&mut self, attempt: &AttemptRecord, name: &str) {
        let id = attempt.id;
        let cancelled = self.oracle.cancelled.contains(&id.job);
        self.holds("I8", !cancelled, || {
            format!("{id} succeeded after its cancel was answered")
        });
        let Some(spec) = self.typed().jobs.get(&id.job).map(|job| job.spec.clone()) else {
            return;
        };
        for node_rank in 0..spec.nodes {
            // Two machines with one identity ran it, and each rank ended twice.
            let member = usize::try_from(node_rank).ok();
            let member = member.and_then(|rank| attempt.members.get(rank));
            if member.is_some_and(|member| self.is_doubled(member.node)) {
                continue;
            }
            let first = node_rank * spec.procs_per_node;
            let count = match spec.launcher {
                trainyard_common::spec::Launcher::Torchrun => 1,
                trainyard_common::spec::Launcher::None
                | trainyard_common::spec::Launcher::Torch => spec.procs_per_node,
            };
            for rank in first..first + count {
                let truth = self.oracle.exits.get(&(id, name.to_owned(), rank)).copied();
                self.holds("I7", truth == Some(ExitStatus::Code(0)), || {
                    format!("{id} succeeded and rank {rank} ended with {truth:?}")
                });
            }
        }
    }

    /// How long a node was silent for while the coordinator was there to hear it, by true time.
    fn silence(&self, node: NodeId) -> Micros {
        let contact = self.oracle.contact.get(&node).copied().unwrap_or_default();
        let since = contact.max(self.coordinator.since);
        let mut silence = self.now - since;
        // Shorter ones no driver notices.
        let noticed = self
            .coordinator
            .stalls
            .iter()
            .filter(|(from, to)| to - from >= PAUSE);
        for (from, to) in noticed {
            let stalled = (*to).min(self.now).saturating_sub((*from).max(since));
            silence = silence.saturating_sub(stalled);
        }
        silence
    }

    /// How long the coordinator was there since it started, by true time.
    fn waited_since_start(&self) -> Micros {
        let since = self.coordinator.since;
        let stalls = self.coordinator.stalls.iter();
        let stalls = stalls.filter(|(from, to)| to - from >= PAUSE);
        stalls.fold(self.now - since, |waited, (from, to)| {
            let stalled = (*to).min(self.now).saturating_sub((*from).max(since));
            waited.saturating_sub(stalled)
        })
    }

    pub(crate) fn was_silent(&self, node: NodeId, limit: std::time::Duration) -> bool {
        self.silence(node) + self.drift_slack(limit) >= micros(limit)
    }

    fn check_node(&mut self, node: &NodeRecord) {
        self.check_incarnation(node);
        let id = node.id;
        let before = self.typed().nodes.get(&id).map(|node| node.availability);
        if before == Some(node.availability) {
            return;
        }
        match node.availability {
            NodeAvailability::Lost if self.is_vouched(id) => {
                self.see("node confirmed as lost");
            }
            NodeAvailability::Lost => {
                self.see("node given up");
                self.check_brake(&id);
                let silent = self.was_silent(id, self.swarm.config.lost_after);
                let heard = self.silence(id);
                let limit = self.swarm.config.lost_after;
                self.holds("I16", silent, || {
                    format!("{id} is given up after a silence of {heard} us, not {limit:?}")
                });
            }
            NodeAvailability::Unreachable => self.see("node unreachable"),
            NodeAvailability::Ready => {}
        }
    }

    /// An attempt is ended because a node is lost: one of its nodes really was silent for that long.
    fn check_given_up(&mut self, attempt: &AttemptRecord) {
        let limit = match attempt.members.len() {
            0 | 1 => self.swarm.config.lost_after,
            _ => self.swarm.config.lost_after_gang,
        };
        let silent = attempt
            .members
            .iter()
            .any(|member| self.was_silent(member.node, limit) || self.is_vouched(member.node));
        self.holds("I16", silent, || {
            format!("{} is given up and no node of it was silent", attempt.id)
        });
        let mut nodes = attempt.members.iter().map(|member| member.node);
        if !nodes.any(|node| self.is_vouched(node)) {
            self.check_brake(&attempt.id);
        }
    }

    /// What holds between rows once a commit is whole.
    pub(crate) fn check_rows(&mut self) {
        if !self.rng.chance(50) {
            return;
        }
        let mut used: BTreeMap<NodeId, Resources> = BTreeMap::new();
        let mut gpus: BTreeMap<(NodeId, String), AttemptRef> = BTreeMap::new();
        let mut wrong = Vec::new();
        for attempt in self.typed().attempts.values() {
            for member in attempt.members.iter().filter(|member| {
                !is_released(member.phase) && !self.is_carried(attempt.id, member.node)
            }) {
                let sum = used.entry(member.node).or_default();
                *sum = sum.plus(&member.resources);
                for gpu in &member.gpu_uuids {
                    if let Some(other) = gpus.insert((member.node, gpu.clone()), attempt.id) {
                        wrong.push(format!("{gpu} is given to {other} and {}", attempt.id));
                    }
                }
            }
        }
        self.bundles_use(&mut used);
        for (node, sum) in used {
            let capacity = self
                .typed()
                .nodes
                .get(&node)
                .map(|node| node.inventory.capacity);
            if capacity.is_some_and(|capacity| !sum.fits(&capacity)) {
                wrong.push(format!(
                    "{sum:?} of {node} are given, which has {capacity:?}"
                ));
            }
        }
        if let Some(wrong) = wrong.pop() {
            self.breaks("I10", wrong);
        }
        self.check_no_task_lost();
    }

    // === the core against the rows ===

    pub(crate) fn check_core(&mut self) {
        if !self.rng.chance(60) {
            return;
        }
        if let Some(process) = &self.coordinator.process
            && let Err(wrong) = process.core.check()
        {
            self.breaks("I10", wrong.join("; "));
        }
    }

    pub(crate) fn check_after_start(&mut self) {
        let lost: Vec<JobId> = self
            .oracle
            .acked
            .iter()
            .filter(|job| !self.typed().jobs.contains_key(job))
            .copied()
            .collect();
        self.holds("I5", lost.is_empty(), || {
            format!("{lost:?} were accepted and are gone")
        });
        self.compare_with_rows();
    }

    /// State is what a start from the rows would give.
    pub(crate) fn check_replay(&mut self) {
        if self.rng.chance(15) {
            self.compare_with_rows();
        }
    }

    fn compare_with_rows(&mut self) {
        let Some(process) = &self.coordinator.process else {
            return;
        };
        let snapshot = match self.coordinator.store.load() {
            Ok(snapshot) => snapshot,
            // Damaged meanwhile; the next start will say so.
            Err(_) => return,
        };
        let tasks: Vec<_> = snapshot
            .tasks
            .iter()
            .map(|task| (task.job, task.index))
            .collect();
        let now = trainyard_common::time::Timestamp(0);
        let again = Core::new(self.swarm.config.clone(), snapshot, now);
        let (core, typed) = (&process.core, self.typed());
        let live = typed.jobs.values().filter(|job| !job.state.is_terminal());
        let mut same_tasks = tasks.iter();
        let same_tasks =
            same_tasks.all(|(job, index)| core.task(*job, *index) == again.task(*job, *index));
        let compared = [
            ("jobs", core.live_jobs().eq(again.live_jobs())),
            ("attempts", core.attempts().eq(again.attempts())),
            ("nodes", core.nodes().eq(again.nodes())),
            ("bundles", core.bundles().eq(again.bundles())),
            ("rows of bundles", core.bundles().eq(typed.bundles.values())),
            ("tasks", same_tasks),
            ("rows of jobs", core.live_jobs().eq(live)),
        ];
        let differs = compared.into_iter().find(|(_, same)| !same);
        self.see("state compared with the rows");
        self.holds("I12", differs.is_none(), || {
            format!("what the core knows is not what its rows say: {differs:?}")
        });
    }
}
