//! The second phase: faults stop, everything is switched on again, and within a bounded time all that can finish must
//! have finished, with nothing left anywhere.

use trainyard_common::ids::{JobId, NodeId};
use trainyard_common::state::{AttemptState, JobState, NodeAvailability, NodePolicy, ReasonCode};

use super::clock::{Micros, secs};
use super::swarm::Fault;
use super::users::Ask;
use super::world::{Happening, Stage, World};

/// By then everything must have come to its end. The longest chain is a queue of jobs whose ranks run for minutes, each
/// of which may be tried again.
const BOUND: Micros = secs(6 * 3600);
/// Least that happens in a seed.
const LEAST_EVENTS: u64 = 500;
/// How often somebody looks.
const LOOK: Micros = secs(2);
/// Longest that only a part of a gang may live once nothing goes wrong any more, beyond grace and time to notice.
const PART_OF_A_GANG: Micros = secs(120);

impl World {
    pub(crate) fn chaos_ends(&mut self) {
        if self.stage != Stage::Chaos {
            return;
        }
        self.say("faults stop".to_owned());
        self.stage = Stage::Calm(self.now);
        self.coordinator.disk_full = false;
        self.coordinator.paused_until = self.coordinator.paused_until.min(self.now);
        if let Some(last) = self.coordinator.stalls.back_mut() {
            last.1 = last.1.min(self.now);
        }
        self.wake_coordinator();
        for host in 0..self.hosts.len() {
            self.calm_host(host);
        }
        self.after(LOOK, Happening::CalmLook);
        self.after(secs(1), Happening::CoordinatorStarts);
    }

    fn calm_host(&mut self, index: usize) {
        // A script says itself when what it did is over.
        if self.is_scripted() {
            return;
        }
        let now = self.now;
        let host = &mut self.hosts[index];
        let line = &mut host.line;
        line.up_cut_until = line.up_cut_until.min(now);
        line.down_cut_until = line.down_cut_until.min(now);
        line.slow_until = line.slow_until.min(now);
        host.paused_until = host.paused_until.min(now);
        host.crash_loop_until = host.crash_loop_until.min(now);
        host.disk_full = false;
        if index >= self.swarm.hosts {
            // Somebody noticed the copy at last.
            if !self.hosts[index].scrapped {
                self.power_off(index);
                self.hosts[index].scrapped = true;
            }
            return;
        }
        self.after(secs(1), Happening::PowerOn(index));
        self.after(secs(2), Happening::AgentStarts(index));
        self.fault_ends(Fault::AgentDiskFull, index);
        // A damaged status is only put right by a start of the agent; see the module's documentation.
        let damaged = self.hosts[index].disk.is_damaged();
        if damaged || self.rng.chance(300) {
            self.agent_ends(index, false);
        }
    }

    /// Operators let every node take work again.
    fn open_nodes(&mut self) {
        let closed: Vec<NodeId> = self
            .coordinator
            .store
            .typed
            .nodes
            .values()
            .filter(|node| node.policy != NodePolicy::Active)
            .map(|node| node.id)
            .collect();
        if self.users.sets_policies() {
            return;
        }
        for node in closed {
            let policy = NodePolicy::Active;
            self.call(0, Ask::Policy { node, policy });
        }
    }

    pub(crate) fn calm_look(&mut self) {
        let Stage::Calm(since) = self.stage else {
            return;
        };
        self.open_nodes();
        self.cancel_hopeless(since);
        self.check_gangs(since);
        if self.now % secs(300) < LOOK {
            // Some things are only sorted out at the start of a session, and those end at times, as certificates do.
            for host in 0..self.swarm.hosts {
                self.renew_session(host);
            }
        }
        match self.what_is_left(since) {
            // A seed in which little happened goes on for a while: idle time has to be without events of its own, too.
            None if self.events < LEAST_EVENTS && !self.is_scripted() => {
                self.after(LOOK, Happening::CalmLook)
            }
            None => {
                self.check_end();
                self.stage = Stage::Done;
            }
            Some((invariant, left)) => {
                let late = self.now > since + BOUND;
                self.holds(invariant, !late, || format!("not over in time: {left}"));
                self.after(LOOK, Happening::CalmLook);
            }
        }
    }

    /// Jobs that can never start say so, and their users give them up.
    fn cancel_hopeless(&mut self, since: Micros) {
        if self.now < since + secs(300) {
            return;
        }
        let waiting: Vec<(JobId, ReasonCode)> = self
            .coordinator
            .store
            .typed
            .jobs
            .values()
            .filter(|job| job.state == JobState::Pending && job.cancel.is_none())
            .map(|job| (job.id, job.reason.code))
            .collect();
        for (job, code) in waiting {
            if code == ReasonCode::Infeasible && self.users.hopeless.insert(job) {
                self.see("infeasible job said so");
                self.call(0, Ask::Cancel { job });
            }
        }
    }

    /// Once nothing goes wrong, no part of a gang lives on without the rest.
    fn check_gangs(&mut self, since: Micros) {
        if self.now < since + secs(600) {
            return;
        }
        let mut alone = Vec::new();
        for attempt in self.coordinator.store.typed.attempts.values() {
            if attempt.members.len() < 2 || attempt.state != AttemptState::Running {
                continue;
            }
            let alive = attempt.members.iter().filter(|member| {
                let host = self
                    .hosts
                    .iter()
                    .find(|host| host.node == Some(member.node));
                host.is_some_and(|host| {
                    host.lives(attempt.id) || host.shims.contains_key(&attempt.id)
                })
            });
            let count = alive.count();
            if count > 0 && count < attempt.members.len() {
                alone.push(attempt.id);
            }
        }
        self.oracle_gangs(&alone);
    }

    fn oracle_gangs(&mut self, alone: &[trainyard_common::ids::AttemptRef]) {
        let now = self.now;
        self.partial.retain(|id, _| alone.contains(id));
        for id in alone {
            let since = *self.partial.entry(*id).or_insert(now);
            // Ranks that succeed at different times are no part that was left alone: each ended by itself. A run has a
            // longest length, so the rest follows within that.
            let bound = PART_OF_A_GANG + 4 * self.swarm.longest_run;
            if now - since > bound {
                self.breaks(
                    "I2",
                    format!(
                        "only a part of {id} lives, for {} s",
                        (now - since) / 1_000_000
                    ),
                );
            }
        }
    }

    /// What has not come to its end, and whose promise that is.
    fn what_is_left(&self, since: Micros) -> Option<(&'static str, String)> {
        let Some(process) = &self.coordinator.process else {
            return Some(("I22", "the coordinator does not run".to_owned()));
        };
        // The end of a node's pause is a row that nobody waits for.
        if self.coordinator.commits() {
            return Some(("I22", "a commit is under way".to_owned()));
        }
        if let Some(ask) = self.users.waits_for() {
            return Some(("I22", format!("somebody waits for an answer to {ask:?}")));
        }
        // What a restored backup forgot may hang until an operator sees to it.
        let hangs = |job: JobId| {
            self.oracle.restores > 0 && self.now > since + secs(3600) && self.loose_job(job)
        };
        if let Some(job) = process.core.live_jobs().find(|job| !hangs(job.id)) {
            return Some((
                "I21",
                format!("{} is {}: {}", job.id, job.state, job.reason.message),
            ));
        }
        if let Some(attempt) = process
            .core
            .attempts()
            .find(|attempt| !hangs(attempt.id.job))
        {
            return Some(("I22", format!("{} is {}", attempt.id, attempt.state)));
        }
        if let Some(bundle) = process.core.bundles().find(|bundle| !hangs(bundle.id.job)) {
            return Some(("I22", format!("{} is {}", bundle.id, bundle.state)));
        }
        for (index, host) in self.hosts.iter().enumerate() {
            if host.scrapped {
                continue;
            }
            if let Some(bundle) = host.disk.bundles.keys().find(|bundle| !hangs(bundle.job)) {
                return Some(("I23", format!("host {index} has the directory of {bundle}")));
            }
            if let Some(process) = host
                .processes
                .values()
                .find(|process| !hangs(process.attempt.job))
            {
                let what = format!(
                    "host {index} has pid {} of {}",
                    process.pid, process.attempt
                );
                return Some(("I23", what));
            }
            if let Some(attempt) = host.disk.dirs.keys().find(|attempt| !hangs(attempt.job)) {
                return Some((
                    "I23",
                    format!("host {index} has the directory of {attempt}"),
                ));
            }
            let open = host
                .agent
                .as_ref()
                .is_some_and(|agent| agent.is_open() && agent.idle());
            if !open {
                return Some(("I22", format!("host {index} is not in session, or busy")));
            }
        }
        let known = |id| {
            self.hosts
                .iter()
                .any(|host| host.node == Some(id) && !host.scrapped)
        };
        for node in process.core.nodes() {
            if known(node.id) && node.availability != NodeAvailability::Ready {
                return Some(("I22", format!("{} is {}", node.id, node.availability)));
            }
        }
        None
    }

    /// Everything came to its end: nothing may be left, and the coordinator's view is the truth.
    fn check_end(&mut self) {
        self.say("everything came to its end".to_owned());
        let Some(process) = &self.coordinator.process else {
            return;
        };
        if let Err(wrong) = process.core.check() {
            return self.breaks("I10", wrong.join("; "));
        }
        let rows = &self.coordinator.store.typed;
        let open: Vec<String> = rows
            .jobs
            .values()
            .filter(|job| !job.state.is_terminal())
            .map(|job| job.id.to_string())
            .chain(rows.bundles.keys().map(ToString::to_string))
            .chain(
                rows.attempts
                    .values()
                    .filter(|attempt| attempt.state != AttemptState::Ended)
                    .map(|attempt| attempt.id.to_string()),
            )
            .collect();
        let replayed = self.coordinator.store.replay();
        let same = self.oracle.restores > 0 || replayed.as_ref() == Ok(rows);
        let hangs = self.oracle.restores > 0;
        self.holds("I24", open.is_empty() || hangs, || {
            format!("on record as going on: {}", open.join(", "))
        });
        self.holds("I12", same, || {
            "the rows are not what the log says".to_owned()
        });
        self.check_after_start();
        self.see("everything came to its end");
    }
}
