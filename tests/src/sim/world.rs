//! The world of one seed: true time, the heap of what is to happen, and who is handed each happening. It knows nothing of
//! what a coordinator or an agent does.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BinaryHeap};

use trainyard_common::ids::{AttemptRef, BundleRef, Term};
use trainyard_common::state::ExitStatus;
use trainyard_coordinator_core::event::{Event as CoreEvent, Registration};

use super::bundles::BundleStep;
use super::carrier::CarrierStep;
use super::clock::{Micros, secs};
use super::coordinator::Coordinator;
use super::corner::Corner;
use super::host::Host;
use super::network::{Conn, Down};
use super::oracle::Oracle;
use super::rng::Rng;
use super::shim::Order;
use super::swarm::{Fault, Swarm};
use super::trace::Trace;
use super::users::Users;

/// Happenings of one seed. The longest seeds have some hundred thousand; more is a loop that does not end.
const MOST_EVENTS: u64 = 1_000_000;

/// A broken promise.
#[derive(Debug, Clone)]
pub(crate) struct Broken {
    pub(crate) invariant: &'static str,
    pub(crate) what: String,
}

/// Something that happens at a point of true time.
#[derive(Debug)]
pub(crate) enum Happening {
    CoordinatorStarts,
    /// The driver looks at its inputs and its clock. Of which process.
    CoordinatorWakes(u64),
    CoordinatorCommitted(u64),
    /// What was under way in a session that is over. To which process.
    Late(u64, Box<CoreEvent>),
    /// A command that came before comes again, on which connection.
    CommandAgain(u64, Box<Down>),
    /// A greeting that its agent gave up. To which process, on which connection.
    HelloLate(u64, u64, Term, Box<Registration>),
    BackupMade,
    BackupRestored,

    Deliver {
        conn: u64,
        up: bool,
    },
    /// One side of a connection learns that it is over.
    ConnEnds {
        conn: u64,
        coordinator: bool,
    },

    AgentStarts(usize),
    AgentWakes(usize, u64),
    AgentDone {
        host: usize,
        agent: u64,
        attempt: AttemptRef,
        token: u64,
    },
    /// A shim's next word reaches its agent.
    ShimHeard {
        host: usize,
        agent: u64,
        attempt: AttemptRef,
    },
    Settle {
        host: usize,
        agent: u64,
        attempt: AttemptRef,
    },
    SessionTried(usize, u64),
    SessionLate {
        host: usize,
        agent: u64,
        conn: u64,
    },
    Beat {
        host: usize,
        agent: u64,
        conn: u64,
    },
    TermKept {
        host: usize,
        agent: u64,
        conn: u64,
    },

    /// Of an agent by number.
    Bundle(usize, u64, BundleRef, BundleStep),
    /// A carrier by number.
    Carrier(usize, u64, CarrierStep),

    ShimUp(usize, AttemptRef, u64),
    ShimOrdered(usize, AttemptRef, u64, Order),
    ShimGoes(usize, AttemptRef, u64),
    ShimTurns(usize, AttemptRef, u64),
    ShimWritten(usize, AttemptRef, u64, u64),
    ShimExits(usize, AttemptRef, u64),
    ProcessEnds {
        host: usize,
        uid: u64,
        exit: ExitStatus,
        oom: bool,
    },
    PowerOn(usize),

    Submit,
    CallMade(u64),
    CallArrives(u64, u64),
    CallAnswered(u64, u64, Box<super::users::Said>),
    CallLate(u64, u64),
    WatcherLooks(usize),
    OperatorActs(usize),

    Fault(Fault),
    FaultEnds(Fault, usize),
    ChaosEnds,
    CalmLook,
}

#[derive(Debug)]
pub(crate) struct Entry {
    at: Micros,
    tie: u64,
    pub(crate) sequence: u64,
    pub(crate) what: Happening,
}

impl Entry {
    fn order(&self) -> (Micros, u64, u64) {
        (self.at, self.tie, self.sequence)
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.order() == other.order()
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        self.order().cmp(&other.order())
    }
}

/// Where in its two phases a seed is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Faults come.
    Chaos,
    /// No faults come any more, since then.
    Calm(Micros),
    /// Everything came to its end.
    Done,
}

/// Everything.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) now: Micros,
    pub(crate) swarm: Swarm,
    pub(crate) stage: Stage,
    pub(crate) trace: Trace,
    pub(crate) coordinator: Coordinator,
    pub(crate) hosts: Vec<Host>,
    pub(crate) conns: BTreeMap<u64, Conn>,
    pub(crate) users: Users,
    pub(crate) oracle: Oracle,
    pub(crate) broken: Option<Broken>,
    pub(crate) events: u64,
    /// Boundaries between two effects that the coordinator passed, and the one at which it is to crash.
    pub(crate) boundaries: u64,
    pub(crate) crash_at: Option<u64>,
    /// Only in a scenario of the exhaustive corner.
    pub(crate) corner: Option<Box<Corner>>,
    /// Gangs of which only a part lives, since when.
    pub(crate) partial: BTreeMap<AttemptRef, Micros>,
    /// Gives every process, connection and call a number of its own.
    serial: u64,
    heap: BinaryHeap<Reverse<Entry>>,
    pushed: u64,
}

impl World {
    pub(crate) fn new(swarm: Swarm, mut rng: Rng) -> Self {
        let coordinator = Coordinator::new(&mut rng, &swarm);
        let hosts = (0..swarm.hosts)
            .map(|index| Host::new(index, &mut rng, &swarm))
            .collect();
        let mut world = Self {
            rng,
            now: 0,
            stage: Stage::Chaos,
            trace: Trace::default(),
            coordinator,
            hosts,
            conns: BTreeMap::new(),
            users: Users::new(),
            oracle: Oracle::default(),
            broken: None,
            events: 0,
            boundaries: 0,
            crash_at: None,
            corner: None,
            partial: BTreeMap::new(),
            serial: 0,
            heap: BinaryHeap::new(),
            pushed: 0,
            swarm,
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        self.at(0, Happening::CoordinatorStarts);
        for host in 0..self.hosts.len() {
            self.enrol(host);
        }
        self.at(secs(1), Happening::Submit);
        self.at(secs(2), Happening::BackupMade);
        for watcher in 0..self.users.watchers.len() {
            self.at(secs(3), Happening::WatcherLooks(watcher));
        }
        for (fault, gap) in self.swarm.faults.clone() {
            let first = secs(5) + self.rng.below(2 * gap);
            self.at(first, Happening::Fault(fault));
        }
        self.at(self.swarm.chaos, Happening::ChaosEnds);
    }

    pub(crate) fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    pub(crate) fn at(&mut self, at: Micros, what: Happening) {
        let tie = self.rng.next();
        self.pushed += 1;
        self.note_sent(self.pushed, &what);
        self.heap.push(Reverse(Entry {
            at: at.max(self.now),
            tie,
            sequence: self.pushed,
            what,
        }));
    }

    pub(crate) fn after(&mut self, wait: Micros, what: Happening) {
        self.at(self.now + wait, what);
    }

    pub(crate) fn faults_on(&self) -> bool {
        self.stage == Stage::Chaos
    }

    /// Whether something that goes wrong sometimes goes wrong now.
    pub(crate) fn goes_wrong(&mut self, per_mille: u64) -> bool {
        self.faults_on() && self.rng.chance(per_mille)
    }

    pub(crate) fn say(&mut self, text: String) {
        self.trace.line(self.now, text);
    }

    pub(crate) fn see(&mut self, what: &'static str) {
        self.trace.see(what);
    }

    pub(crate) fn breaks(&mut self, invariant: &'static str, what: String) {
        if self.broken.is_none() {
            self.say(format!("{invariant} IS BROKEN: {what}"));
            self.broken = Some(Broken { invariant, what });
        }
    }

    pub(crate) fn holds(
        &mut self,
        invariant: &'static str,
        holds: bool,
        what: impl FnOnce() -> String,
    ) {
        if !holds {
            self.breaks(invariant, what());
        }
    }

    /// Runs until everything came to its end or a promise is broken.
    pub(crate) fn run(&mut self) {
        while self.broken.is_none() && self.stage != Stage::Done {
            let Some(Reverse(entry)) = self.heap.pop() else {
                self.breaks("I19", "nothing is left to happen".to_owned());
                break;
            };
            self.now = entry.at;
            self.events += 1;
            if self.events > MOST_EVENTS {
                let what = format!(
                    "more than {MOST_EVENTS} events; the last is {:?}",
                    entry.what
                );
                self.breaks("I19", what);
            }
            if let Some((what, number)) = self.arrives(entry) {
                self.happen(what);
                self.let_go(number);
            }
            self.follow_script();
        }
    }

    pub(crate) fn happen(&mut self, what: Happening) {
        if let Some(until) = self.held_until(&what) {
            return self.at(until, what);
        }
        self.host_boundary(&what);
        match what {
            Happening::CoordinatorStarts => self.coordinator_starts(),
            Happening::CoordinatorWakes(process) => self.coordinator_wakes(process),
            Happening::CoordinatorCommitted(process) => self.coordinator_committed(process),
            Happening::Late(process, event) => self.late(process, *event),
            Happening::CommandAgain(conn, message) => self.command_again(conn, *message),
            Happening::HelloLate(process, conn, term, registration) => {
                self.hello_late(process, conn, term, registration);
            }
            Happening::BackupMade => self.backup_made(),
            Happening::BackupRestored => self.backup_restored(),
            Happening::Deliver { conn, up } => self.deliver(conn, up),
            Happening::ConnEnds { conn, coordinator } => self.conn_ends(conn, coordinator),
            Happening::AgentStarts(host) => self.agent_starts(host),
            Happening::AgentWakes(host, agent) => self.agent_wakes(host, agent),
            Happening::AgentDone {
                host,
                agent,
                attempt,
                token,
            } => self.agent_done(host, agent, attempt, token),
            Happening::ShimHeard {
                host,
                agent,
                attempt,
            } => self.shim_heard(host, agent, attempt),
            Happening::Settle {
                host,
                agent,
                attempt,
            } => self.settle(host, agent, attempt),
            Happening::SessionTried(host, agent) => self.session_tried(host, agent),
            Happening::SessionLate { host, agent, conn } => self.session_late(host, agent, conn),
            Happening::Beat { host, agent, conn } => self.beat(host, agent, conn),
            Happening::TermKept { host, agent, conn } => self.term_kept(host, agent, conn),
            Happening::Bundle(host, agent, bundle, step) => {
                self.bundle_steps(host, agent, bundle, step);
            }
            Happening::Carrier(host, serial, step) => self.carrier_steps(host, serial, step),
            Happening::ShimUp(host, attempt, serial) => self.shim_up(host, attempt, serial),
            Happening::ShimOrdered(host, attempt, serial, order) => {
                self.shim_ordered(host, attempt, serial, order);
            }
            Happening::ShimGoes(host, attempt, serial) => self.shim_goes(host, attempt, serial),
            Happening::ShimTurns(host, attempt, serial) => self.shim_turns(host, attempt, serial),
            Happening::ShimWritten(host, attempt, serial, version) => {
                self.shim_written(host, attempt, serial, version);
            }
            Happening::ShimExits(host, attempt, serial) => self.shim_exits(host, attempt, serial),
            Happening::ProcessEnds {
                host,
                uid,
                exit,
                oom,
            } => self.process_ends(host, uid, exit, oom),
            Happening::PowerOn(host) => self.power_on(host),
            Happening::Submit => self.submit(),
            Happening::CallMade(call) => self.call_made(call),
            Happening::CallArrives(call, attempt) => self.call_arrives(call, attempt),
            Happening::CallAnswered(call, attempt, said) => {
                self.call_answered(call, attempt, *said);
            }
            Happening::CallLate(call, attempt) => self.call_late(call, attempt),
            Happening::WatcherLooks(watcher) => self.watcher_looks(watcher),
            Happening::OperatorActs(host) => self.operator_acts(host),
            Happening::Fault(fault) => self.fault(fault),
            Happening::FaultEnds(fault, host) => self.fault_ends(fault, host),
            Happening::ChaosEnds => self.chaos_ends(),
            Happening::CalmLook => self.calm_look(),
        }
    }

    /// Until when a happening waits because the process that it concerns stands still.
    fn held_until(&self, what: &Happening) -> Option<Micros> {
        let until = match what {
            Happening::CoordinatorWakes(_)
            | Happening::CoordinatorCommitted(_)
            | Happening::Late(..)
            | Happening::HelloLate(..)
            | Happening::CallArrives(..)
            | Happening::Deliver { up: true, .. }
            | Happening::ConnEnds {
                coordinator: true, ..
            }
            | Happening::WatcherLooks(_) => self.coordinator.paused_until,
            Happening::AgentWakes(host, _)
            | Happening::AgentDone { host, .. }
            | Happening::ShimHeard { host, .. }
            | Happening::Settle { host, .. }
            | Happening::Bundle(host, ..)
            | Happening::SessionTried(host, _)
            | Happening::SessionLate { host, .. }
            | Happening::Beat { host, .. }
            | Happening::TermKept { host, .. } => self.hosts.get(*host)?.paused_until,
            Happening::Deliver { conn, up: false }
            | Happening::CommandAgain(conn, _)
            | Happening::ConnEnds {
                conn,
                coordinator: false,
            } => {
                let host = self.conns.get(conn)?.host;
                self.hosts.get(host)?.paused_until
            }
            Happening::CoordinatorStarts
            | Happening::BackupMade
            | Happening::BackupRestored
            | Happening::AgentStarts(_)
            | Happening::Carrier(..)
            | Happening::ShimUp(..)
            | Happening::ShimOrdered(..)
            | Happening::ShimGoes(..)
            | Happening::ShimTurns(..)
            | Happening::ShimWritten(..)
            | Happening::ShimExits(..)
            | Happening::ProcessEnds { .. }
            | Happening::PowerOn(_)
            | Happening::Submit
            | Happening::CallMade(_)
            | Happening::CallAnswered(..)
            | Happening::CallLate(..)
            | Happening::OperatorActs(_)
            | Happening::Fault(_)
            | Happening::FaultEnds(..)
            | Happening::ChaosEnds
            | Happening::CalmLook => return None,
        };
        (until > self.now).then_some(until)
    }
}
