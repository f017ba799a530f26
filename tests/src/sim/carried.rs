//! What the oracle holds bundles against: every row of one, every word about one, every start of a task in one. The
//! truth about their processes is in the process tables, as for any other attempt.

use std::collections::{BTreeMap, BTreeSet};

use trainyard_common::bundle::{
    BundlePhase, DesiredBundle, ObservedBundle, ObservedBundlePhase, TaskRange, TaskReport,
    TaskSet, may_bundle,
};
use trainyard_common::ids::{AttemptRef, BundleRef, NodeId, TaskIndex};
use trainyard_common::member::MemberSpec;
use trainyard_common::record::{BundleRecord, BundleState};
use trainyard_common::resources::Resources;
use trainyard_common::spec::OnDisconnect;
use trainyard_common::state::{AttemptState, MemberPhase};

use super::carrier::attempt_of;
use super::host::Role;
use super::world::World;

/// What is known of bundles beside rows and machines.
#[derive(Debug, Default)]
pub(crate) struct Carried {
    /// Which bundle a task of a job, by name, was ever in.
    bundle_of: BTreeMap<(String, TaskIndex), BundleRef>,
    /// Tasks that rows ever had in a bundle.
    handed: BTreeMap<BundleRef, TaskSet>,
    /// Attempts in bundles, until they are given back.
    pub(crate) attempts: BTreeMap<AttemptRef, BundleRef>,
    /// Tasks that a node gave back.
    pub(crate) returned: BTreeSet<(AttemptRef, NodeId)>,
}

/// What a bundle's tasks may use at once.
fn used(bundle: &BundleRecord) -> Resources {
    let times = bundle.slots.min(bundle.tasks.count());
    (0..times).fold(Resources::default(), |sum, _| sum.plus(&bundle.resources))
}

impl World {
    // === what agents say ===

    pub(crate) fn note_bundle_reported(&mut self, node: NodeId, seen: &ObservedBundle) {
        let job = seen.bundle.job;
        for report in &seen.reports {
            match report {
                TaskReport::Started { task, .. } => {
                    let id = attempt_of(seen.bundle, *task);
                    self.note_phase(id, node, MemberPhase::Running);
                }
                TaskReport::Ended { task, ending, .. } => {
                    let id = attempt_of(seen.bundle, *task);
                    self.note_told_end(id, node, ending.cause);
                    self.note_phase(id, node, MemberPhase::Ended);
                }
                TaskReport::Returned(range) => {
                    for task in range.tasks() {
                        let id = attempt_of(seen.bundle, task);
                        self.oracle.carried.attempts.remove(&id);
                        self.oracle.carried.returned.insert((id, node));
                    }
                }
            }
        }
        if let ObservedBundlePhase::Ended { total, .. } = seen.phase {
            let told = seen.first + seen.reports.len() as u64;
            self.holds("I13", told <= total, || {
                format!("{job}: {told} reports of a bundle that made {total}")
            });
        }
    }

    // === processes ===

    /// A task of a bundle is about to start.
    pub(crate) fn check_task_start(
        &mut self,
        index: usize,
        bundle: BundleRef,
        task: TaskIndex,
        spec: &MemberSpec,
    ) {
        self.see("task started in a bundle");
        let attempt = attempt_of(bundle, task);
        self.check_room(index, attempt, spec.resources, &[]);
        let host = &self.hosts[index];
        if self.loose_job(bundle.job) || host.doubled || host.taken_for_gone {
            return;
        }
        let row = self.typed().bundles.get(&bundle).cloned();
        let node = self.hosts[index].node;
        let changed = self.oracle.identities_changed > 0;
        let ours = row
            .as_ref()
            .is_some_and(|row| row.tasks.contains(task) && (Some(row.node) == node || changed));
        self.holds("I11", ours, || {
            format!("{attempt} starts in {bundle} on host {index}, which is not on record: {row:?}")
        });
        let ranks = self.hosts[index].processes.values();
        let ranks = ranks.filter(|p| p.bundle == Some(bundle) && p.role == Role::Rank(0));
        let running: BTreeSet<AttemptRef> = ranks.map(|process| process.attempt).collect();
        let slots = row.map_or(0, |row| usize::try_from(row.slots).unwrap_or(0));
        self.holds("I1", running.len() <= slots, || {
            format!(
                "{} tasks run in {bundle}, which has {slots} slots",
                running.len()
            )
        });
        let newer = self
            .hosts
            .iter()
            .flat_map(|host| host.processes.values())
            .find(|other| {
                other.role != Role::Shim
                    && other.job == spec.job_name
                    && other.attempt.task == task
                    && other.attempt.attempt > attempt.attempt
            });
        if let Some(newer) = newer.map(|process| process.attempt) {
            self.see("task of a lost bundle starts late");
            let replace = self
                .typed()
                .jobs
                .get(&attempt.job)
                .is_some_and(|job| job.spec.on_disconnect == OnDisconnect::Replace);
            let state = self.typed().attempts.get(&attempt).map(|row| row.state);
            let declared = replace && state == Some(AttemptState::Lost);
            self.holds("I2", declared, || {
                format!("{attempt} ({state:?}) starts on host {index} while {newer} lives")
            });
        }
    }

    pub(crate) fn check_bundle_removed(&mut self, index: usize, bundle: BundleRef) {
        self.see("bundle forgotten");
        let there = self.typed().bundles.contains_key(&bundle);
        let excused = self.loose_job(bundle.job) || self.hosts[index].doubled;
        self.holds("I11", !there || excused, || {
            format!("host {index} deletes {bundle}, which is on record")
        });
        let mut living = self.hosts[index].processes.values();
        let alive = living.any(|p| p.bundle == Some(bundle) && p.role != Role::Shim);
        self.holds("I13", !alive, || {
            format!("host {index} deletes {bundle}, which lives")
        });
    }

    // === durable rows ===

    pub(crate) fn check_bundle(&mut self, bundle: &BundleRecord) {
        let id = bundle.id;
        let before = self.typed().bundles.get(&id).cloned();
        let name = self.job_name(id.job).unwrap_or_default();
        let loose = self.loose_job(id.job);
        match &before {
            Some(before) => {
                let same = (before.slots, before.node) == (bundle.slots, bundle.node);
                self.holds("I4", same, || format!("{id} has another place or width"));
                self.holds("I4", before.recorded <= bundle.recorded, || {
                    format!("{id} has fewer reports than before")
                });
                let lost = before.state == BundleState::Lost;
                self.holds("I7", !lost || bundle.state == BundleState::Lost, || {
                    format!("{id} was lost and is {}", bundle.state)
                });
            }
            None => {
                self.see("bundle handed");
                self.check_placed(&id.to_string());
                self.note_placed(id.job, [bundle.node]);
            }
        }
        let old = before.as_ref().map(|before| before.tasks.clone());
        let old = old.unwrap_or_default();
        let new: Vec<TaskIndex> = bundle.tasks.tasks().filter(|t| !old.contains(*t)).collect();
        if before.is_some() && !new.is_empty() {
            self.check_placed(&id.to_string());
            self.see("bundle topped up");
        }
        if bundle.tasks.count() > bundle.slots {
            self.see("bundle holds tasks ahead");
        }
        if !new.is_empty() {
            self.check_open(&id, bundle.node);
        }
        for task in new {
            let carried = &mut self.oracle.carried;
            let first = *carried.bundle_of.entry((name.clone(), task)).or_insert(id);
            let handed = carried.handed.entry(id).or_default();
            let twice = handed.contains(task);
            handed.insert(TaskRange {
                first: task,
                last: task,
            });
            carried.attempts.insert(attempt_of(id, task), id);
            self.holds("I3", loose || (first == id && !twice), || {
                format!("task {task} is in {id} and was in {first} before")
            });
            let closed = before
                .as_ref()
                .is_some_and(|b| !matches!(b.state, BundleState::Placed | BundleState::Running));
            self.holds("I8", !closed, || {
                format!("{id} gets task {task} after it was closed or stopped")
            });
        }
        if let Some(before) = before {
            self.check_left(&before, &bundle.tasks, true);
            if before.state != bundle.state && bundle.state == BundleState::Lost {
                self.see("bundle lost");
                if !self.is_vouched(bundle.node) {
                    self.check_brake(&id);
                }
                let (node, limit) = (bundle.node, self.swarm.config.lost_after);
                let silent = self.was_silent(node, limit) || self.is_vouched(node);
                self.holds("I16", silent, || {
                    format!("{id} is lost and {node} was not silent")
                });
                let job = self.typed().jobs.get(&id.job);
                let waits = job.is_some_and(|job| {
                    job.spec.on_disconnect == OnDisconnect::Wait && !job.state.is_terminal()
                });
                self.holds("I2", !waits, || {
                    format!("{id} is lost and its job is to wait")
                });
            }
        }
    }

    pub(crate) fn check_bundle_over(&mut self, bundle: BundleRef) {
        self.see("bundle removed from the rows");
        if let Some(before) = self.typed().bundles.get(&bundle).cloned() {
            self.check_left(&before, &TaskSet::default(), false);
        }
    }

    /// Tasks left a bundle: its agent said so, or nobody can, and nothing of them lives.
    fn check_left(&mut self, before: &BundleRecord, now: &TaskSet, stays: bool) {
        let (id, node) = (before.id, before.node);
        let gone = self.was_taken_for_gone(Some(node));
        if self.loose_job(id.job) || self.is_doubled(node) || self.oracle.restores > 0 || gone {
            return;
        }
        let absent = self.oracle.absent(node, None, Some(id)) || self.is_vouched(node);
        let host = self.hosts.iter().position(|host| host.node == Some(node));
        for task in before.tasks.tasks().filter(|task| !now.contains(*task)) {
            let attempt = attempt_of(id, task);
            let told = self.oracle.was_told(attempt, node, MemberPhase::Ended)
                || self.oracle.carried.returned.contains(&(attempt, node));
            self.holds("I18", told || (absent && !stays), || {
                format!("task {task} left {id} and its agent did not say so")
            });
            // A task given back may run again there under the same number.
            let alive = host.is_some_and(|host| {
                let mut living = self.hosts[host].living(attempt);
                living.any(|(_, process)| process.bundle == Some(id))
            });
            self.holds("I1", !alive, || {
                format!("what {attempt} has on {node} is free while its processes live there")
            });
        }
    }

    /// What bundles hold, and which attempts are in that.
    pub(crate) fn bundles_use(&self, used_on: &mut BTreeMap<NodeId, Resources>) {
        for bundle in self.typed().bundles.values() {
            let sum = used_on.entry(bundle.node).or_default();
            *sum = sum.plus(&used(bundle));
        }
    }

    /// Whether a bundle speaks for an attempt's member.
    pub(crate) fn is_carried(&self, attempt: AttemptRef, node: NodeId) -> bool {
        attempt.attempt.0 == 1
            && self.typed().bundles.values().any(|bundle| {
                bundle.id.job == attempt.job
                    && bundle.node == node
                    && bundle.tasks.contains(attempt.task)
            })
    }

    /// Each task that is not fresh is somewhere.
    pub(crate) fn check_no_task_lost(&mut self) {
        let mut lost = None;
        for job in self.typed().jobs.values() {
            if job.state.is_terminal() || job.cancel.is_some() || !may_bundle(&job.spec) {
                continue;
            }
            let first = job.spec.array.map_or(0, |array| array.first);
            let bundles: Vec<&TaskSet> = self
                .typed()
                .bundles
                .values()
                .filter(|bundle| bundle.id.job == job.id)
                .map(|bundle| &bundle.tasks)
                .collect();
            lost = (first..job.next_fresh.0).map(TaskIndex).find(|task| {
                !self.typed().tasks.contains_key(&(job.id, *task))
                    && !bundles.iter().any(|tasks| tasks.contains(*task))
            });
            if let Some(task) = lost {
                let what = format!("task {task} of {} is in no bundle and has no row", job.id);
                return self.breaks("I5", what);
            }
        }
        if lost.is_none() {
            self.see("no task lost");
        }
    }

    // === words ===

    pub(crate) fn check_desired_bundle(&mut self, conn: u64, desired: &DesiredBundle) {
        let id = desired.bundle;
        let row = self.typed().bundles.get(&id).cloned();
        let stops = matches!(desired.phase, BundlePhase::Stop(_));
        let handed = self.oracle.carried.handed.get(&id);
        let handed = handed.cloned().unwrap_or_default();
        let mut tasks = desired.tasks.tasks();
        let foreign = tasks.find(|task| !handed.contains(*task));
        self.holds("I11", foreign.is_none(), || {
            format!("{id} is wanted with task {foreign:?}, which is not on record in it")
        });
        match row {
            // It ended in the commit that this is told after, or is a stray one.
            None => self.holds("I11", stops || !handed.is_empty(), || {
                format!("{id} is wanted and not on record")
            }),
            Some(row) => {
                self.holds("I11", desired.recorded <= row.recorded, || {
                    format!(
                        "{} reports of {id} are said to be on record",
                        desired.recorded
                    )
                });
                let node = self.oracle.certificates.get(&conn).copied();
                self.holds("I18", node.is_none() || node == Some(row.node), || {
                    format!("{id} is wanted on another node than its own")
                });
            }
        }
    }

    pub(crate) fn check_forget_bundle(&mut self, bundle: BundleRef) {
        let there = self.typed().bundles.contains_key(&bundle);
        self.holds("I11", !there, || {
            format!("{bundle} is to be forgotten and on record")
        });
    }
}
