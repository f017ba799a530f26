//! The world around the core: time, the network, users, the durable store and its crashes, and the promises that are
//! checked at every row that becomes durable and every process that starts.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use trainyard_common::bundle::DesiredBundle;
use trainyard_common::ids::{AttemptRef, Digest, Incarnation, JobId, NodeId, TaskIndex};
use trainyard_common::member::ObservedPhase;
use trainyard_common::record::{BundleState, JobRecord, Record, Target};
use trainyard_common::spec::{Array, JobSpec, OnDisconnect};
use trainyard_common::state::{AttemptState, MemberPhase, NodeAvailability, ReasonCode};
use trainyard_common::time::Timestamp;

use super::machine::{Did, Machine, Rng, seen};
use crate::effect::{Answer, Command, Effect, Urgency};
use crate::event::{Event, Registration, RequestKey, SessionId};
use crate::testing::{Store, inventory, job_spec, rows_of, user};
use crate::{Config, Core, Outbox, Snapshot};

const TICK: Duration = Duration::from_secs(1);
const BEAT: Duration = Duration::from_secs(2);

/// One agent's line to the coordinator.
#[derive(Debug, Default)]
pub(super) struct Line {
    session: Option<SessionId>,
    /// No contact before this time.
    dead_until: Timestamp,
    last_beat: Timestamp,
    up: VecDeque<(Timestamp, Event)>,
    down: VecDeque<(Timestamp, Command)>,
    /// Messages of sessions that are over, which arrive all the same.
    late: Vec<(Timestamp, Event)>,
}

#[derive(Debug, Clone)]
pub(super) enum Wish {
    Submit { id: u64, spec: Box<JobSpec> },
    Cancel(JobId),
}

pub(super) struct World {
    pub(super) rng: Rng,
    pub(super) now: Timestamp,
    pub(super) config: Config,
    pub(super) core: Option<Core>,
    pub(super) core_since: Timestamp,
    pub(super) down_until: Timestamp,
    pub(super) schedule: bool,
    pub(super) faults: bool,
    pub(super) store: Store,
    pub(super) machines: Vec<Machine>,
    pub(super) lines: Vec<Line>,
    pub(super) next_session: u64,
    pub(super) next_key: u64,
    pub(super) next_request: u64,
    pub(super) waiting: BTreeMap<RequestKey, Wish>,
    /// What users still have to send (again).
    pub(super) unsent: Vec<Wish>,
    pub(super) jobs_of_requests: BTreeMap<u64, JobId>,
    pub(super) acked_cancels: BTreeSet<JobId>,
    pub(super) highest_attempt: BTreeMap<(JobId, TaskIndex), u32>,
    /// How often each member was spawned.
    pub(super) spawned: BTreeMap<(AttemptRef, u32), u32>,
    pub(super) ever_ready: BTreeSet<(AttemptRef, u32)>,
    /// Ranks that really exited with 0.
    pub(super) succeeded: BTreeSet<(AttemptRef, u32)>,
    /// Where members of attempts that were given up could not be confirmed.
    pub(super) unconfirmed: BTreeSet<(AttemptRef, NodeId)>,
    pub(super) last_contact: BTreeMap<NodeId, Timestamp>,
    /// Whether every effect is put into `trace`, which takes most of the time.
    pub(super) traces: bool,
    pub(super) trace: u64,
    /// What happened how often, to see that the faults do reach what they are meant for.
    pub(super) seen: BTreeMap<&'static str, u64>,
}

impl World {
    pub(super) fn new(seed: u64, traces: bool) -> Self {
        let now = Timestamp(1_000_000);
        let config = Config {
            unreachable_after: Duration::from_secs(10),
            lost_after: Duration::from_secs(60),
            lost_after_gang: Duration::from_secs(30),
            prepare_timeout: Duration::from_secs(40),
            max_live_jobs: 40,
            ..Config::default()
        };
        let mut world = Self {
            rng: Rng::new(seed),
            now,
            core: Some(Core::new(config.clone(), Snapshot::default(), now)),
            config,
            core_since: now,
            down_until: now,
            schedule: false,
            faults: false,
            store: Store::default(),
            machines: Vec::new(),
            lines: Vec::new(),
            next_session: 1,
            next_key: 1,
            next_request: 1,
            waiting: BTreeMap::new(),
            unsent: Vec::new(),
            jobs_of_requests: BTreeMap::new(),
            acked_cancels: BTreeSet::new(),
            highest_attempt: BTreeMap::new(),
            spawned: BTreeMap::new(),
            ever_ready: BTreeSet::new(),
            succeeded: BTreeSet::new(),
            unconfirmed: BTreeSet::new(),
            last_contact: BTreeMap::new(),
            traces,
            trace: 0,
            seen: BTreeMap::new(),
        };
        for number in 1..=3 + world.rng.below(3) {
            let node = NodeId(u32::try_from(number).unwrap());
            let (key, name) = (world.key(), format!("m{number}"));
            world.event(Event::LocalNodeAdded {
                key,
                name,
                target: Target::Attached,
                owner: user("root"),
            });
            world.machines.push(Machine {
                node,
                incarnation: 1,
                boot: 1,
                members: BTreeMap::new(),
                carriers: BTreeMap::new(),
            });
            world.lines.push(Line::default());
        }
        world
    }

    pub(super) fn chaos(&mut self, ticks: u32) {
        self.faults = true;
        for _ in 0..ticks {
            self.users_act();
            self.faults_act();
            self.tick();
        }
    }

    /// No more faults: everything must come to its end.
    pub(super) fn calm(&mut self) {
        self.faults = false;
        self.down_until = self.now;
        self.lines
            .iter_mut()
            .for_each(|line| line.dead_until = Timestamp(0));
        for round in 0..10_000 {
            self.tick();
            let open: Vec<&JobRecord> = self
                .store
                .jobs
                .values()
                .filter(|job| !job.state.is_terminal())
                .collect();
            if let Some(job) = open
                .iter()
                .find(|job| job.reason.code == ReasonCode::Infeasible)
                && job.cancel.is_none()
                && round % 10 == 0
            {
                self.unsent.push(Wish::Cancel(job.id));
            }
            let members = self
                .machines
                .iter()
                .map(|machine| machine.members.len() + machine.carriers.len())
                .sum::<usize>();
            let done = self.store.jobs.values().all(|job| job.state.is_terminal());
            if done && members == 0 && self.waiting.is_empty() && self.unsent.is_empty() {
                return self.check_end();
            }
        }
        let open: Vec<_> = self
            .store
            .jobs
            .values()
            .filter(|job| !job.state.is_terminal())
            .collect();
        panic!(
            "no progress: {open:#?} {:#?} {:#?}",
            self.machines,
            self.core
                .as_ref()
                .map(|core| (&core.t.attempts, &core.t.bundles, &core.live.sessions))
        );
    }

    fn check_end(&self) {
        let core = self.core.as_ref().expect("it is up");
        assert!(
            core.t.usage.is_empty() && core.t.on_node.is_empty(),
            "something is still held"
        );
        assert!(
            core.t.jobs.is_empty() && core.t.tasks.is_empty(),
            "something is still in memory"
        );
        assert!(core.t.attempts.is_empty(), "an attempt is not closed");
        assert!(
            core.t.bundles.is_empty() && self.store.bundles.is_empty(),
            "a bundle is not closed"
        );
        assert!(
            core.nodes()
                .all(|node| node.availability == NodeAvailability::Ready)
        );
        for attempt in self.store.attempts.values() {
            assert_eq!(attempt.state, AttemptState::Ended, "{}", attempt.id);
        }
    }

    fn tick(&mut self) {
        self.now = self.now.after(TICK);
        if self.core.is_none() && self.now >= self.down_until {
            self.core = Some(Core::new(
                self.config.clone(),
                self.store.snapshot(),
                self.now,
            ));
            self.core_since = self.now;
            self.schedule = true;
        }
        for index in 0..self.machines.len() {
            for id in self.machines[index].step(self.now, &mut self.rng) {
                self.note_truth(index, id);
                if !self.goes_on(index, id) {
                    self.report(index, id);
                }
            }
            self.step_bundles(index);
            self.connect(index);
            self.deliver(index);
        }
        self.send_wishes();
        if self
            .core
            .as_ref()
            .and_then(Core::next_deadline)
            .is_some_and(|due| due <= self.now)
        {
            self.event(Event::TimerFired);
        }
        if self.schedule && self.rng.chance(700) {
            self.schedule = false;
            self.with_core(|core, now, out| core.schedule(now, out));
        }
    }

    // The coordinator's driver and its crashes.

    fn event(&mut self, event: Event) {
        self.with_core(|core, now, out| core.handle(now, event, out));
    }

    fn with_core(&mut self, call: impl FnOnce(&mut Core, Timestamp, &mut Outbox)) {
        let Some(core) = &mut self.core else { return };
        let mut out = Outbox::new();
        call(core, self.now, &mut out);
        // Not every time, because it takes longer than all the rest.
        if self.rng.chance(200) {
            core.check().unwrap();
        }
        let mut batch = Vec::new();
        for effect in out.drain() {
            if self.traces {
                let mut hasher = DefaultHasher::new();
                (self.trace, format!("{effect:?}")).hash(&mut hasher);
                self.trace = hasher.finish();
            }
            if let Effect::Persist(record) = effect {
                batch.push(record);
                continue;
            }
            if !self.commit(&mut batch) || self.crashes() {
                return;
            }
            self.speak(effect);
        }
        if self.commit(&mut batch) && self.rng.chance(20) {
            self.check_rows();
        }
    }

    /// What is in memory is what a start from the rows would give.
    fn check_rows(&self) {
        let Some(core) = &self.core else { return };
        let again = Core::new(self.config.clone(), self.store.snapshot(), self.now);
        again.check().unwrap();
        assert_eq!(rows_of(core), rows_of(&again));
        assert_eq!(core.t.usage, again.t.usage);
    }

    /// One transaction: all of it, or a crash before it.
    fn commit(&mut self, batch: &mut Vec<Record>) -> bool {
        if batch.is_empty() {
            return true;
        }
        if self.crashes() {
            return false;
        }
        for record in batch.drain(..) {
            self.check_row(&record);
            self.store.apply(record);
        }
        true
    }

    fn crashes(&mut self) -> bool {
        if self.faults && self.rng.chance(5) {
            self.crash();
            return true;
        }
        false
    }

    pub(super) fn see(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    fn crash(&mut self) {
        self.see("coordinator crashed");
        self.core = None;
        let longest = if self.rng.chance(200) { 100 } else { 5 };
        self.down_until = self.now.after(self.rng.seconds(longest));
        self.machines.iter_mut().for_each(Machine::hang_up);
        for line in &mut self.lines {
            line.session = None;
            line.up.clear();
            line.down.clear();
            line.late.clear();
        }
        let waiting = std::mem::take(&mut self.waiting);
        self.unsent.extend(waiting.into_values());
    }

    fn speak(&mut self, effect: Effect) {
        match effect {
            Effect::Persist(_) => unreachable!("taken before"),
            Effect::Reply(key, answer) => {
                let Some(wish) = self.waiting.remove(&key) else {
                    return;
                };
                match (wish, answer) {
                    (Wish::Submit { id, .. }, Ok(Answer::Submitted { job, repeated })) => {
                        self.see(if repeated {
                            "submit repeated"
                        } else {
                            "submit accepted"
                        });
                        assert!(
                            self.store.jobs.contains_key(&job),
                            "I5: {job} was accepted and is not on record"
                        );
                        let first = *self.jobs_of_requests.entry(id).or_insert(job);
                        assert_eq!(first, job, "I6: one request made two jobs");
                    }
                    (Wish::Cancel(job), Ok(Answer::Cancelled(record))) => {
                        assert_eq!(record.id, job);
                        let row = &self.store.jobs[&job];
                        assert!(
                            row.cancel.is_some(),
                            "I11: the cancel of {job} is not on record"
                        );
                        self.acked_cancels.insert(job);
                        self.see("cancel answered");
                    }
                    (Wish::Submit { .. } | Wish::Cancel(_), _) => {} // Refused: full, or over.
                }
            }
            Effect::Send(session, command) => {
                let line = self
                    .lines
                    .iter_mut()
                    .find(|line| line.session == Some(session));
                if let Some(line) = line {
                    let last = line.down.back().map_or(self.now, |(at, _)| *at);
                    let at = last.max(self.now).after(self.rng.seconds(1));
                    line.down.push_back((at, command));
                }
            }
            Effect::CloseSession(session, refusal) => {
                assert_ne!(refusal.reason, "DUPLICATE_IDENTITY");
                let lines = self.lines.iter_mut().zip(&mut self.machines);
                for (line, machine) in lines.filter(|(line, _)| line.session == Some(session)) {
                    line.session = None;
                    machine.hang_up();
                }
            }
            Effect::RequestSchedule => self.schedule = true,
            Effect::Note(urgency, _, reason) => {
                assert_ne!(reason.code, ReasonCode::UnknownToAgent, "{reason:?}");
                assert_ne!(reason.code, ReasonCode::InsufficientFree, "{reason:?}");
                if urgency == Urgency::Error {
                    self.see("brake set");
                }
            }
        }
    }

    // The agents and the network.

    fn connect(&mut self, index: usize) {
        let line = &mut self.lines[index];
        if line.dead_until > self.now || self.core.is_none() {
            return;
        }
        let machine = &self.machines[index];
        let Some(session) = line.session else {
            if !self.rng.chance(500) {
                return;
            }
            let session = SessionId(self.next_session);
            self.next_session += 1;
            line.session = Some(session);
            line.last_beat = self.now;
            line.down.clear();
            let bundles = machine.observed_bundles(&mut self.rng);
            let registration = Registration {
                session,
                node: machine.node,
                incarnation: Incarnation(machine.incarnation),
                opening: 0,
                boot_id: format!("boot-{}", machine.boot),
                agent_version: "1".into(),
                last_words: String::new(),
                address: format!("10.0.0.{}", machine.node.0),
                inventory: inventory(&format!("m{}", machine.node.0), 4),
                observed: machine.observed(),
                bundles,
            };
            let at = self.now.after(self.rng.seconds(1));
            line.up
                .push_back((at, Event::AgentRegistered(Box::new(registration))));
            return;
        };
        if self.now.since(line.last_beat) >= BEAT {
            line.last_beat = self.now;
            self.send_up(
                index,
                Event::HeartbeatReceived {
                    session,
                    node: self.machines[index].node,
                },
            );
        }
    }

    fn send_up(&mut self, index: usize, event: Event) {
        let line = &mut self.lines[index];
        let last = line.up.back().map_or(self.now, |(at, _)| *at);
        let at = last.max(self.now).after(self.rng.seconds(1) / 2);
        if self.faults && self.rng.chance(50) {
            line.up.push_back((at, event.clone()));
        }
        line.up.push_back((at, event));
    }

    /// Takes note of a member that starts by itself. Whether its news is left out, as it has newer one already.
    fn goes_on(&mut self, index: usize, id: AttemptRef) -> bool {
        let member = &self.machines[index].members[&id];
        match &member.phase {
            ObservedPhase::Running { .. } => {
                self.see("member started alone");
                self.check_spawn(index, id);
                false
            }
            ObservedPhase::Ready { .. } if member.goes && self.rng.chance(300) => {
                self.see("ready was never told");
                true
            }
            ObservedPhase::Preparing
            | ObservedPhase::Ready { .. }
            | ObservedPhase::Stopping
            | ObservedPhase::CleanupPending(_)
            | ObservedPhase::Uploading(_)
            | ObservedPhase::Ended(_) => false,
        }
    }

    fn report(&mut self, index: usize, id: AttemptRef) {
        let Some(session) = self.lines[index].session else {
            return;
        };
        let machine = &self.machines[index];
        let (node, member) = (machine.node, seen(id, &machine.members[&id]));
        self.send_up(
            index,
            Event::MemberObserved {
                session,
                node,
                member,
            },
        );
    }

    fn deliver(&mut self, index: usize) {
        while let Some((at, _)) = self.lines[index].up.front()
            && *at <= self.now
            && self.core.is_some()
        {
            let Some((_, event)) = self.lines[index].up.pop_front() else {
                break;
            };
            self.last_contact
                .insert(self.machines[index].node, self.now);
            self.event(event);
        }
        let (due, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.lines[index].late)
            .into_iter()
            .partition(|(at, _)| *at <= self.now);
        self.lines[index].late = later;
        due.into_iter().for_each(|(_, event)| self.event(event));
        while let Some((at, _)) = self.lines[index].down.front()
            && *at <= self.now
            && let Some((_, command)) = self.lines[index].down.pop_front()
        {
            self.obey(index, command);
        }
    }

    fn obey(&mut self, index: usize, command: Command) {
        let desired = match command {
            Command::Welcome { desired, bundles } => {
                for bundle in &bundles {
                    self.obey_bundle(index, bundle, true);
                }
                desired
            }
            Command::DesireBundle(bundle) => return self.obey_bundle(index, &bundle, false),
            Command::ForgetBundle(id) => {
                let carrier = self.machines[index].carriers.remove(&id);
                let ended = carrier.is_none_or(|carrier| carrier.is_over());
                assert!(ended, "{id} was to be forgotten before it ended");
                return;
            }
            Command::Resync(_) => return self.cut(index),
            Command::Desire(desired) => vec![*desired],
            Command::Forget(id) => {
                let member = self.machines[index].members.remove(&id);
                let ended =
                    member.is_none_or(|member| matches!(member.phase, ObservedPhase::Ended(_)));
                assert!(ended, "{id} was to be forgotten before it ended");
                return;
            }
        };
        for desired in desired {
            let did = self.machines[index].desire(self.now, &desired, &mut self.rng);
            if did == Did::Spawned {
                self.see("member spawned");
                self.check_spawn(index, desired.attempt);
            }
            if did != Did::Nothing {
                self.report(index, desired.attempt);
            }
        }
    }

    fn obey_bundle(&mut self, index: usize, desired: &DesiredBundle, greeting: bool) {
        let id = desired.bundle;
        let known = self.machines[index].carriers.contains_key(&id);
        let new = self.machines[index].desire_bundle(self.now, desired, greeting, &mut self.rng);
        for task in &new {
            let row = self.store.bundles.get(&id);
            assert!(
                row.is_none_or(|row| row.tasks.contains(*task)),
                "I11: task {task} was handed out in {id} and that is not on record"
            );
        }
        if !known {
            self.see("bundle made");
        } else if !new.is_empty() {
            self.see("bundle topped up");
        }
    }

    fn step_bundles(&mut self, index: usize) {
        let steps = self.machines[index].step_bundles(self.now, self.faults, &mut self.rng);
        for id in steps.started {
            self.see("task in bundle started");
            self.check_start(index, id);
        }
        let succeeded = steps.succeeded.into_iter().map(|id| (id, 0));
        self.succeeded.extend(succeeded);
        if steps.returned {
            self.see("tasks given back");
        }
        if steps.killed {
            self.see("bundle shim killed");
        }
        let Some(session) = self.lines[index].session else {
            return;
        };
        let node = self.machines[index].node;
        let most = 1 + usize::try_from(self.rng.below(8)).unwrap();
        for bundle in self.machines[index].news(most) {
            self.send_up(
                index,
                Event::BundleObserved {
                    session,
                    node,
                    bundle,
                },
            );
        }
    }

    /// The connection breaks; what is under way is lost, or comes late.
    fn cut(&mut self, index: usize) {
        self.machines[index].hang_up();
        let node = self.machines[index].node;
        let line = &mut self.lines[index];
        let Some(session) = line.session.take() else {
            return;
        };
        line.down.clear();
        for (_, event) in line.up.drain(..) {
            if self.rng.chance(400) && !matches!(event, Event::AgentRegistered(_)) {
                line.late
                    .push((self.now.after(self.rng.seconds(20)), event));
            }
        }
        // Otherwise the coordinator never learns that the session is over.
        if self.rng.chance(600) {
            line.late.push((
                self.now.after(self.rng.seconds(3)),
                Event::SessionEnded { session, node },
            ));
        }
    }

    fn faults_act(&mut self) {
        let index = usize::try_from(self.rng.below(self.machines.len() as u64)).unwrap();
        match self.rng.below(1000) {
            0..30 => self.cut(index),
            30..40 => {
                self.cut(index);
                self.machines[index].restart();
            }
            40..46 => {
                self.cut(index);
                self.machines[index].reboot(self.now, &mut self.rng);
                self.lines[index].dead_until = self.now.after(self.rng.seconds(20));
            }
            46..50 => {
                self.cut(index);
                self.machines[index].incarnation += 1;
                self.lose_disk(index);
            }
            50..70 => {
                self.cut(index);
                self.lines[index].dead_until = self.now.after(self.rng.seconds(150));
            }
            70..76 if self.core.is_some() => self.crash(),
            76..80 => {
                for index in 0..self.machines.len() {
                    self.cut(index);
                    self.lines[index].dead_until = self.now.after(self.rng.seconds(80));
                }
            }
            _ => {}
        }
    }

    /// What a machine has on its disk is lost, but for what the coordinator has heard nothing of: an agent that loses
    /// such a one loses who it is, too, and never comes back as itself.
    fn lose_disk(&mut self, index: usize) {
        let (machine, store) = (&mut self.machines[index], &self.store);
        let node = machine.node;
        machine.members.retain(|id, _| {
            let row = store.attempts.get(id);
            row.is_some_and(|row| {
                let mut members = row.members.iter();
                members.any(|m| m.node == node && m.phase == MemberPhase::Unconfirmed)
            })
        });
        let before = machine.carriers.len();
        machine.carriers.retain(|id, _| {
            let row = store.bundles.get(id);
            row.is_some_and(|row| row.state == BundleState::Placed)
        });
        if machine.carriers.len() < before {
            self.see("bundle vanished");
        }
    }

    // The users.

    fn key(&mut self) -> RequestKey {
        self.next_key += 1;
        RequestKey(self.next_key)
    }

    fn users_act(&mut self) {
        if self.rng.chance(400) {
            let spec = Box::new(self.some_spec());
            self.unsent.push(Wish::Submit {
                id: self.next_request,
                spec,
            });
            self.next_request += 1;
        }
        if self.rng.chance(40) && !self.store.jobs.is_empty() {
            let job = JobId(1 + self.rng.below(self.store.jobs.len() as u64));
            self.unsent.push(Wish::Cancel(job));
            if self.rng.chance(300) {
                self.unsent.push(Wish::Cancel(job));
            }
        }
    }

    fn some_spec(&mut self) -> JobSpec {
        let mut spec = job_spec();
        spec.nodes = [1, 1, 1, 2, 3][usize::try_from(self.rng.below(5)).unwrap()];
        spec.procs_per_node = 1 + u32::try_from(self.rng.below(2)).unwrap();
        spec.resources_per_node.gpus = u32::try_from(self.rng.below(5)).unwrap();
        spec.resources_per_node.cpu_milli = 1000 * (1 + self.rng.below(5));
        spec.retries = u32::try_from(self.rng.below(3)).unwrap();
        if self.rng.chance(220) {
            let max_running = self.rng.chance(300).then_some(2);
            let mut tasks = 6;
            spec.nodes = 1;
            if self.rng.chance(700) {
                // May be bundled.
                spec.resources_per_node.gpus = 0;
                spec.procs_per_node = 1;
                tasks = 60;
            }
            spec.array = Some(Array {
                first: 3,
                last: 3 + u32::try_from(self.rng.below(tasks)).unwrap(),
                max_running,
            });
        }
        if self.rng.chance(200) {
            spec.on_disconnect = OnDisconnect::Wait;
        }
        if self.rng.chance(30) {
            spec.resources_per_node.gpus = 100;
        }
        spec
    }

    fn send_wishes(&mut self) {
        for wish in std::mem::take(&mut self.unsent) {
            if self.core.is_none() || self.rng.chance(200) {
                self.unsent.push(wish);
                continue;
            }
            let key = self.key();
            self.waiting.insert(key, wish.clone());
            if let Wish::Submit { .. } = wish
                && self.faults
                && self.rng.chance(100)
            {
                self.unsent.push(wish.clone()); // The client is impatient and tries again.
            }
            match wish {
                Wish::Submit { id, spec } => self.event(Event::JobSubmitted {
                    key,
                    owner: user("alice"),
                    request_id: format!("r{id}").parse().unwrap(),
                    request_digest: Digest([7; 32]),
                    spec,
                    allow_infeasible: true,
                }),
                Wish::Cancel(job) => self.event(Event::CancelRequested {
                    key,
                    by: user("bob"),
                    job,
                }),
            }
        }
    }
}
