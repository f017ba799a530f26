//! The coordinator's machine: its clock and disk, and the process on it, driven in the one fixed order of the real
//! driver: handle what waits, commit, and only then speak. The process can end at every boundary between two of these,
//! be paused for any length, and find its disk full, slow, broken or damaged.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{Incarnation, NodeId, Term};
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::record::Record;
use trainyard_common::state::{NodeAvailability, ReasonCode};
use trainyard_common::time::Timestamp;
use trainyard_coordinator_core::effect::{Command, Effect, Urgency};
use trainyard_coordinator_core::event::{Event, Registration, RequestKey, SessionId};
use trainyard_coordinator_core::{Core, Outbox};

use super::clock::{HostClock, Micros, ProcessClock, micros, ms, secs};
use super::corner::Side;
use super::rng::Rng;
use super::store::{Backup, Store};
use super::swarm::{Fault, Swarm};
use super::users::{Ask, Said};
use super::world::{Happening, World};

/// Events of one round, as in the real driver.
const ROUND: usize = 512;
/// Least time between two rounds of the scheduler, as in the real driver.
const SCHEDULE_INTERVAL: Micros = ms(2);
/// Standing still for so long is noticed by the driver, as in the real one.
pub(crate) const PAUSE: Micros = secs(5);
/// Stalls that are remembered to judge who was silent.
const STALLS: usize = 64;

/// What the driver is given.
#[derive(Debug)]
pub(crate) enum Input {
    Call {
        call: u64,
        attempt: u64,
        ask: Box<Ask>,
    },
    Register {
        conn: u64,
        registration: Box<Registration>,
    },
    Event(Event),
}

/// A commit under way.
#[derive(Debug)]
struct Flight {
    at: Timestamp,
    since: Micros,
    records: Vec<Record>,
    told: Vec<Effect>,
}

/// The process.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) core: Core,
    pub(crate) term: Term,
    /// The last transition that readers are shown.
    pub(crate) published: u64,
    clock: ProcessClock,
    inputs: VecDeque<Input>,
    flight: Option<Flight>,
    requests: BTreeMap<RequestKey, (u64, u64)>,
    sessions: BTreeMap<SessionId, u64>,
    next_key: u64,
    next_session: u64,
    schedule_wanted: bool,
    last_schedule: Option<Micros>,
    held_until: Option<Timestamp>,
    wakes: Option<Micros>,
    /// Stalls before this time are taken account of.
    looked_at: Micros,
}

/// The machine.
#[derive(Debug)]
pub(crate) struct Coordinator {
    pub(crate) clock: HostClock,
    pub(crate) process: Option<Process>,
    /// Counts processes, so that what was meant for an earlier one is told apart.
    pub(crate) number: u64,
    pub(crate) since: Micros,
    pub(crate) paused_until: Micros,
    pub(crate) store: Store,
    pub(crate) disk_full: bool,
    /// When the process could not act although it was there.
    pub(crate) stalls: VecDeque<(Micros, Micros)>,
    backup: Option<Backup>,
    /// An operator was called because the rows are damaged.
    repaired_soon: bool,
}

impl Coordinator {
    pub(crate) fn new(rng: &mut Rng, swarm: &Swarm) -> Self {
        Self {
            clock: drifting(rng, swarm),
            process: None,
            number: 0,
            since: 0,
            paused_until: 0,
            store: Store::new(),
            disk_full: false,
            stalls: VecDeque::new(),
            backup: None,
            repaired_soon: false,
        }
    }

    /// The process, if it runs and is not stopped.
    pub(crate) fn acts(&self, now: Micros) -> bool {
        self.process.is_some() && self.paused_until <= now
    }

    /// Whether a commit is under way.
    pub(crate) fn commits(&self) -> bool {
        let process = self.process.as_ref();
        process.is_some_and(|process| process.flight.is_some())
    }

    pub(crate) fn stalled(&mut self, from: Micros, to: Micros) {
        // Those that overlap are one.
        if let Some(last) = self.stalls.back_mut().filter(|last| from <= last.1) {
            *last = (last.0.min(from), last.1.max(to));
            return;
        }
        if self.stalls.len() >= STALLS {
            self.stalls.pop_front();
        }
        self.stalls.push_back((from, to));
    }
}

pub(crate) fn drifting(rng: &mut Rng, swarm: &Swarm) -> HostClock {
    let spread = swarm.drift_ppm;
    let drift = i64::try_from(rng.below(2 * spread + 1)).unwrap_or_default();
    HostClock {
        drift_ppm: drift - i64::try_from(spread).unwrap_or_default(),
        offset_ms: i64::try_from(rng.below(4000)).unwrap_or_default() - 2000,
    }
}

impl Process {
    /// Notes a stall of ours and says whether timers may fire; as the real driver does it.
    fn may_fire(&mut self, now: Timestamp, stood_still: Micros, grace: Duration) -> bool {
        if stood_still >= PAUSE {
            self.held_until = Some(now.after(grace));
        }
        if self.held_until.is_some_and(|until| now >= until) {
            self.held_until = None;
        }
        self.held_until.is_none()
    }

    fn note_schedule(&mut self, effects: &[Effect]) {
        self.schedule_wanted |= effects
            .iter()
            .any(|effect| matches!(effect, Effect::RequestSchedule));
    }

    fn next_wake(&self, now: Micros) -> Option<Micros> {
        if !self.inputs.is_empty() {
            return Some(now);
        }
        let deadline = self.core.next_deadline().map(|deadline| {
            let held = self.held_until.map_or(deadline, |held| held.max(deadline));
            self.clock.when(now, held)
        });
        let schedule = self.schedule_wanted.then(|| {
            self.last_schedule
                .map_or(now, |last| (last + SCHEDULE_INTERVAL).max(now))
        });
        deadline.into_iter().chain(schedule).min()
    }

    pub(crate) fn forget_session(&mut self, session: SessionId) {
        self.sessions.remove(&session);
    }

    fn key(&mut self) -> RequestKey {
        self.next_key += 1;
        RequestKey(self.next_key)
    }
}

impl World {
    // === start and end ===

    pub(crate) fn coordinator_starts(&mut self) {
        if self.coordinator.process.is_some() || self.coordinator.repaired_soon {
            return;
        }
        if self.coordinator.disk_full && !self.swarm.reserve {
            self.see("coordinator cannot start on a full disk");
            return self.after(secs(2), Happening::CoordinatorStarts);
        }
        let snapshot = match self.coordinator.store.load() {
            Ok(snapshot) => snapshot,
            Err(bad) => return self.refuse_to_start(&bad),
        };
        let term = self.coordinator.store.meta.term.next();
        self.coordinator.store.meta.term = term;
        let clock = self.coordinator.clock.start(self.now);
        let config = self.swarm.config.clone();
        let core = Core::new(config, snapshot, clock.now(self.now));
        self.coordinator.number += 1;
        self.coordinator.since = self.now;
        self.forget_openings();
        self.coordinator.process = Some(Process {
            core,
            term,
            published: self.coordinator.store.sequence(),
            clock,
            inputs: VecDeque::new(),
            flight: None,
            requests: BTreeMap::new(),
            sessions: BTreeMap::new(),
            next_key: 0,
            next_session: 0,
            schedule_wanted: true,
            last_schedule: None,
            held_until: None,
            wakes: None,
            looked_at: self.now,
        });
        self.see("coordinator started");
        self.say(format!("coordinator starts with term {term}"));
        self.check_after_start();
        self.wake_coordinator();
    }

    fn refuse_to_start(&mut self, bad: &str) {
        self.see("damaged rows refused");
        self.say(format!("coordinator refuses to start: {bad}"));
        self.coordinator.repaired_soon = true;
        let wait = self.rng.between(secs(5), secs(120));
        self.after(wait, Happening::BackupRestored);
    }

    pub(crate) fn backup_made(&mut self) {
        if let Some(backup) = self.coordinator.store.backup() {
            self.coordinator.backup = Some(backup);
            self.oracle.backed_up(&self.coordinator.store.typed);
            self.say("operator makes a backup".to_owned());
        }
        if self.faults_on() {
            let wait = self.rng.between(secs(20), secs(600));
            self.after(wait, Happening::BackupMade);
        }
    }

    pub(crate) fn backup_restored(&mut self) {
        if self.coordinator.process.is_some() {
            self.crash("an operator stops it to restore a backup");
        }
        self.coordinator.repaired_soon = false;
        let Some(backup) = self.coordinator.backup.clone() else {
            return self.breaks("I5", "there is no backup to restore".to_owned());
        };
        self.oracle.before_restore(&self.coordinator.store.typed);
        self.coordinator.store.restore(&backup);
        self.see("backup restored");
        self.say("operator restores the last backup".to_owned());
        self.oracle.restored(&self.coordinator.store.typed);
        self.users.restored(&self.coordinator.store.typed);
        self.after(ms(200), Happening::CoordinatorStarts);
    }

    /// The process ends, now and without a word.
    pub(crate) fn crash(&mut self, why: &str) {
        let Some(process) = self.coordinator.process.take() else {
            return;
        };
        self.see("coordinator ended");
        self.coordinator.paused_until = self.now;
        if let Some(last) = self.coordinator.stalls.back_mut() {
            last.1 = last.1.min(self.now);
        }
        self.say(format!("coordinator ends: {why}"));
        if let Some(Flight { at, records, .. }) = process.flight {
            // It may or may not have reached the disk.
            if self.done_all_the_same() {
                self.see("commit durable and nobody told");
                self.make_durable(at, &records);
            } else {
                self.see("commit lost");
            }
        }
        for conn in process.sessions.values().copied().collect::<Vec<_>>() {
            self.coordinator_side_ends(conn, None);
        }
        let orphans: Vec<u64> = self.conns.keys().copied().collect();
        orphans
            .into_iter()
            .for_each(|conn| self.coordinator_side_ends(conn, None));
        let long = self.goes_wrong(200);
        let wait = if long {
            self.rng.between(secs(10), secs(400))
        } else {
            self.rng.between(ms(100), secs(5))
        };
        self.after(wait, Happening::CoordinatorStarts);
    }

    /// A boundary between two effects; true if the process ended at it.
    fn crashes_here(&mut self, where_: &str) -> bool {
        self.boundaries += 1;
        if self.boundary(Side::Coordinator) {
            return true;
        }
        let chosen = self.crash_at == Some(self.boundaries);
        if chosen || self.goes_wrong(self.swarm.chances.crash) {
            self.see("crash at a boundary");
            self.crash(where_);
            return true;
        }
        false
    }

    // === a round ===

    pub(crate) fn wake_coordinator(&mut self) {
        let now = self.now;
        let number = self.coordinator.number;
        let Some(process) = &mut self.coordinator.process else {
            return;
        };
        if process.flight.is_some() {
            return;
        }
        let Some(at) = process.next_wake(now) else {
            return;
        };
        if process.wakes.is_none_or(|wakes| at < wakes) {
            process.wakes = Some(at);
            self.at(at, Happening::CoordinatorWakes(number));
        }
    }

    pub(crate) fn give_coordinator(&mut self, input: Input) {
        if let Some(process) = &mut self.coordinator.process {
            process.inputs.push_back(input);
            self.wake_coordinator();
        }
    }

    pub(crate) fn late(&mut self, process: u64, event: Event) {
        if self.coordinator.number == process {
            self.see("message of an old session arrived late");
            self.give_coordinator(Input::Event(event));
        }
    }

    pub(crate) fn coordinator_wakes(&mut self, number: u64) {
        if self.coordinator.number != number {
            return;
        }
        let now = self.now;
        let Some(process) = &mut self.coordinator.process else {
            return;
        };
        if process.wakes.is_some_and(|wakes| wakes > now) {
            return; // An earlier wake came between.
        }
        process.wakes = None;
        if process.flight.is_some() {
            return;
        }
        let time = process.clock.now(now);
        let grace = self.swarm.config.unreachable_after / 2;
        let since = std::mem::replace(&mut process.looked_at, now);
        let mut stood_still = 0;
        for (from, to) in &self.coordinator.stalls {
            let length = to.saturating_sub((*from).max(since));
            if *to <= now && length >= PAUSE {
                process.core.stood_still(time, process.clock.passed(length));
                stood_still = length;
            }
        }
        let timers = process.may_fire(time, stood_still, grace);
        let count = process.inputs.len().min(ROUND);
        let inputs: Vec<Input> = process.inputs.drain(..count).collect();
        if count > 1 {
            self.see("several events in one commit");
        }
        let mut outbox = Outbox::new();
        for input in inputs {
            self.take(time, input, &mut outbox);
        }
        let Some(process) = &mut self.coordinator.process else {
            return;
        };
        if timers && process.core.next_deadline().is_some_and(|due| due <= time) {
            process.core.handle(time, Event::TimerFired, &mut outbox);
        }
        let mut effects = outbox.drain();
        process.note_schedule(&effects);
        let due = process
            .last_schedule
            .is_none_or(|last| now >= last + SCHEDULE_INTERVAL);
        if process.schedule_wanted && due {
            process.schedule_wanted = false;
            process.last_schedule = Some(now);
            process.core.schedule(time, &mut outbox);
            let placed = outbox.drain();
            process.note_schedule(&placed);
            effects.extend(placed);
        }
        let reconciled = process.core.is_reconciled();
        if self.coordinator.store.restored {
            // As the real driver notes it, in a row of its own.
            self.coordinator.store.restored = !reconciled;
            if reconciled {
                self.check_reconciled();
            }
            self.see(if reconciled {
                "restored state reconciled"
            } else {
                "restored state waits for its nodes"
            });
        }
        self.check_core();
        self.carry_out_round(time, effects);
    }

    fn take(&mut self, now: Timestamp, input: Input, outbox: &mut Outbox) {
        let true_now = self.now;
        // Switched off: a call that says so may come minutes late, when the machine is back, and nothing can tell that
        // it is not true any more. People are taken to be right when they are heard.
        if let Input::Call { call, attempt, ask } = &input
            && let Ask::ConfirmLost { node } = **ask
            && !self.users.is_rash(*call)
            && self
                .hosts
                .iter()
                .any(|host| host.node == Some(node) && host.powered)
        {
            let refusal = Refusal::new(ErrorCode::FailedPrecondition, "LATE", "it is back");
            return self.answer(*call, *attempt, Said::Answer(Err(refusal)));
        }
        let Some(process) = &mut self.coordinator.process else {
            return;
        };
        let (mut greets, mut speaks, mut rash) = (None, None, None);
        let event = match input {
            Input::Call { call, attempt, ask } => {
                let key = process.key();
                process.requests.insert(key, (call, attempt));
                // Also a copy of a call that comes when its caller has had an answer.
                if let Ask::ConfirmLost { node } | Ask::Remove { node } = *ask {
                    let new = self.oracle.vouched.insert(node);
                    rash = self.users.is_rash(call).then_some((node, new));
                }
                ask.event(key)
            }
            Input::Register { conn, registration } => {
                process.sessions.insert(registration.session, conn);
                greets = Some((registration.node, registration.incarnation));
                Event::AgentRegistered(registration)
            }
            Input::Event(event) => {
                if let Event::SessionEnded { session, .. } = &event {
                    process.sessions.remove(session);
                }
                if let Event::MemberObserved { session, node, .. }
                | Event::BundleObserved { session, node, .. }
                | Event::HeartbeatReceived { session, node } = &event
                    && process.sessions.contains_key(session)
                {
                    speaks = Some(*node);
                }
                event
            }
        };
        self.trace.debug(&event);
        if !matches!(event, Event::HeartbeatReceived { .. }) {
            let text = format!("coordinator hears {}", super::words::short(&event));
            self.trace.line(true_now, text);
        }
        process.core.handle(now, event, outbox);
        if let Some((node, new)) = rash {
            let record = process.core.node(node);
            let gone = record.is_none_or(|node| node.availability == NodeAvailability::Lost);
            if gone {
                // It is the operator's word that counts: what lives there may come beside what replaces it.
                for host in self.hosts.iter_mut().filter(|host| host.node == Some(node)) {
                    host.taken_for_gone = true;
                }
                self.trace.see("operator who did not look obeyed");
            } else if new {
                self.oracle.vouched.remove(&node);
            }
        }
        // A greeting that is refused is no sign of life.
        let taken = |(node, incarnation): &(NodeId, Incarnation)| {
            let record = process.core.node(*node);
            record.is_some_and(|node| node.incarnation == *incarnation && node.changed_at == now)
        };
        if let Some((node, _)) = greets.filter(taken) {
            self.oracle.contact.insert(node, true_now);
            self.oracle.awaited.remove(&node);
            self.oracle.heard.insert(node);
        }
        let ready = |node: &NodeId| {
            let record = process.core.node(*node);
            record.is_some_and(|node| node.availability == NodeAvailability::Ready)
        };
        if let Some(node) = speaks.filter(ready) {
            self.oracle.contact.insert(node, true_now);
        }
    }

    fn carry_out_round(&mut self, at: Timestamp, effects: Vec<Effect>) {
        let mut records = Vec::new();
        let mut told = Vec::new();
        for effect in effects {
            match effect {
                Effect::Persist(record) => records.push(record),
                Effect::RequestSchedule => {}
                other @ (Effect::Reply(..)
                | Effect::Send(..)
                | Effect::CloseSession(..)
                | Effect::Note(..)) => told.push(other),
            }
        }
        if records.is_empty() {
            return self.speak(told);
        }
        if planted(Mutation::SpeaksBeforeCommit) {
            self.speak(std::mem::take(&mut told));
        }
        if self.crashes_here("after it decided and before the commit") {
            return;
        }
        let refuses = self.coordinator.disk_full && !self.swarm.reserve;
        if refuses || self.goes_wrong(self.swarm.chances.commit_fails) {
            self.see("commit failed");
            if self.rng.chance(300) && !refuses {
                self.make_durable(at, &records);
            }
            return self.crash("a commit failed");
        }
        let slow = self.goes_wrong(self.swarm.chances.commit_slow);
        let takes = match slow {
            true => self.rng.between(secs(1), secs(60)),
            false => self.rng.between(50, self.swarm.fsync),
        };
        let (since, number) = (self.now, self.coordinator.number);
        if let Some(process) = &mut self.coordinator.process {
            process.flight = Some(Flight {
                at,
                since,
                records,
                told,
            });
        }
        self.after(takes, Happening::CoordinatorCommitted(number));
    }

    pub(crate) fn coordinator_committed(&mut self, number: u64) {
        if self.coordinator.number != number {
            return;
        }
        let now = self.now;
        let Some(process) = &mut self.coordinator.process else {
            return;
        };
        let Some(flight) = process.flight.take() else {
            return;
        };
        if now - flight.since >= PAUSE {
            self.see("disk was slow");
            self.coordinator.stalled(flight.since, now);
        }
        if !planted(Mutation::CommitNotSynced) || !self.events.is_multiple_of(5) {
            self.make_durable(flight.at, &flight.records);
        }
        if self.broken.is_some() {
            return;
        }
        let sequence = self.coordinator.store.sequence();
        if let Some(process) = &mut self.coordinator.process {
            process.published = sequence;
        }
        self.check_replay();
        self.speak(flight.told);
    }

    fn make_durable(&mut self, at: Timestamp, records: &[Record]) {
        self.before_commit();
        self.order_before_commit(records);
        for record in records {
            self.check_row(record);
            self.say(format!("on disk: {}", super::words::short_row(record)));
            let written = self
                .coordinator
                .store
                .apply(at, std::slice::from_ref(record));
            written.iter().for_each(|row| self.trace.bytes(row));
        }
        self.check_rows();
        self.check_budget();
        self.check_order();
    }

    // === words ===

    fn speak(&mut self, told: Vec<Effect>) {
        for effect in told {
            if self.coordinator.process.is_none() || self.crashes_here("between two words") {
                return;
            }
            self.trace.debug(&effect);
            match effect {
                Effect::Reply(key, answer) => {
                    let Some((call, attempt)) = self
                        .coordinator
                        .process
                        .as_mut()
                        .and_then(|process| process.requests.remove(&key))
                    else {
                        continue;
                    };
                    self.check_answer(call, &answer);
                    self.answer(call, attempt, Said::Answer(answer));
                }
                Effect::Send(session, command) => self.send_command(session, command),
                Effect::CloseSession(session, refusal) => {
                    self.see("session closed by the core");
                    let conn = self.conn_of(session);
                    if let Some(process) = &mut self.coordinator.process {
                        process.forget_session(session);
                    }
                    if let Some(conn) = conn {
                        self.coordinator_side_ends(conn, Some(refusal));
                    }
                }
                Effect::Note(urgency, node, reason) => self.noted(urgency, node, &reason),
                Effect::Persist(_) | Effect::RequestSchedule => {}
            }
        }
        self.wake_coordinator();
    }

    fn noted(
        &mut self,
        urgency: Urgency,
        node: Option<NodeId>,
        reason: &trainyard_common::state::Reason,
    ) {
        self.say(format!("note {urgency:?} {node:?}: {}", reason.message));
        match reason.code {
            ReasonCode::InsufficientFree => {
                self.breaks("I10", format!("a plan did not hold: {}", reason.message));
            }
            ReasonCode::DuplicateIdentity => self.see("duplicate identity noticed"),
            ReasonCode::UnknownToAgent => {
                self.see("foreign attempt left alone");
                let excused = self.oracle.restores > 0 || self.oracle.forged > 0;
                let node_was_new = self.oracle.identities_changed > 0;
                self.holds("I24", excused || node_was_new, || {
                    format!("an agent's own attempt is foreign: {}", reason.message)
                });
            }
            ReasonCode::Silent if urgency == Urgency::Error => self.see("mass-loss brake set"),
            _ => {}
        }
    }

    fn conn_of(&self, session: SessionId) -> Option<u64> {
        let process = self.coordinator.process.as_ref()?;
        process.sessions.get(&session).copied()
    }

    fn send_command(&mut self, session: SessionId, command: Command) {
        let Some(conn) = self.conn_of(session) else {
            return;
        };
        let Some(process) = &self.coordinator.process else {
            return;
        };
        let term = process.term;
        self.check_command(conn, &command);
        let waiting = self.conns.get(&conn).map_or(0, |conn| conn.down.len());
        // One command for each member may come at once.
        let host = self.conns.get(&conn).map_or(0, |conn| conn.host);
        let members = self.hosts[host].disk.dirs.len() + self.hosts[host].disk.bundles.len();
        if waiting >= self.swarm.session_queue + members {
            if let Command::Forget(_) | Command::ForgetBundle(_) = command {
                // Told again at the start of the next session; all members of a node may be due for it at once.
                return self.see("forget left for the next session");
            }
            self.see("slow reader cut off");
            if let Some(process) = &mut self.coordinator.process {
                process.forget_session(session);
            }
            return self.coordinator_side_ends(conn, None);
        }
        self.send_down(conn, super::network::Down::Command(term, Box::new(command)));
    }

    /// A greeting arrived: the session begins, or is refused by the server.
    pub(crate) fn greeted(&mut self, conn: u64, seen: Term, mut registration: Box<Registration>) {
        let Some(process) = &mut self.coordinator.process else {
            return;
        };
        if seen > process.term {
            let own = process.term;
            self.breaks(
                "I11",
                format!("an agent saw term {seen}, above {own}: a term was not durable"),
            );
            return;
        }
        process.next_session += 1;
        registration.session = SessionId(process.next_session);
        let session = registration.session;
        self.note_opening(&registration);
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.session = Some(session);
        }
        self.give_coordinator(Input::Register { conn, registration });
    }

    pub(crate) fn pause_coordinator(&mut self, length: Micros) {
        if self.coordinator.process.is_none() || self.coordinator.paused_until > self.now {
            return;
        }
        let until = self.now + length;
        self.say(format!(
            "coordinator is stopped for {} s",
            length / 1_000_000
        ));
        self.coordinator.paused_until = until;
        self.coordinator.stalled(self.now, until);
        let number = self.coordinator.number;
        self.at(until, Happening::CoordinatorWakes(number));
    }

    pub(crate) fn disk_fills(&mut self, length: Micros) {
        self.coordinator.disk_full = true;
        self.say("coordinator's disk is full".to_owned());
        self.after(length, Happening::FaultEnds(Fault::CoordinatorDiskFull, 0));
    }

    /// Whether two nodes' clocks and the coordinator's agree within this long.
    pub(crate) fn drift_slack(&self, length: Duration) -> Micros {
        micros(length) * self.swarm.drift_ppm / 1_000_000 + ms(20)
    }
}
