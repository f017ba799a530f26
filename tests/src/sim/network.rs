//! Lines between agents and the coordinator, and the connections on them: delay, cuts of one way or both, connections
//! that break with what is under way lost or late, messages that come twice or overtake each other, slow readers.
//! What is said passes through its wire form and back, so that a conversion that loses something is noticed.

use std::collections::VecDeque;

use trainyard_common::bundle::{DesiredBundle, ObservedBundle};
use trainyard_common::error::Refusal;
use trainyard_common::ids::Term;
use trainyard_common::member::{DesiredMember, ObservedMember};
use trainyard_coordinator_core::effect::Command;
use trainyard_coordinator_core::event::{Event, Registration, SessionId};
use trainyard_proto::v1;

use super::clock::{Micros, ms, secs};
use super::coordinator::Input;
use super::world::{Happening, World};

/// What an agent says.
#[derive(Debug, Clone)]
pub(crate) enum Up {
    Hello(Term, Box<Registration>),
    Observed(ObservedMember),
    Bundle(ObservedBundle),
    /// With the time of its sending.
    Heartbeat(Micros),
    Goodbye,
}

/// What the coordinator says.
#[derive(Debug, Clone)]
pub(crate) enum Down {
    Command(Term, Box<Command>),
    /// With the time at which the acknowledged heartbeat was sent.
    Ack(Term, Micros),
    End(Option<Refusal>),
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Conn {
    pub(crate) host: usize,
    pub(crate) agent: u64,
    pub(crate) coordinator: u64,
    pub(crate) session: Option<SessionId>,
    pub(crate) up: VecDeque<Up>,
    pub(crate) down: VecDeque<Down>,
    up_at: Micros,
    down_at: Micros,
    pub(crate) agent_side: bool,
    pub(crate) coordinator_side: bool,
    pub(crate) welcomed: bool,
}

/// What is wrong with a host's line.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Line {
    pub(crate) up_cut_until: Micros,
    pub(crate) down_cut_until: Micros,
    /// Until then the agent reads slowly.
    pub(crate) slow_until: Micros,
}

impl World {
    /// A new connection of an agent, if it gets through.
    pub(crate) fn connect(&mut self, host: usize, agent: u64) -> Option<u64> {
        let line = self.hosts[host].line;
        if self.coordinator.process.is_none()
            || line.up_cut_until > self.now
            || line.down_cut_until > self.now
        {
            return None;
        }
        let id = self.next_serial();
        self.conns.insert(
            id,
            Conn {
                host,
                agent,
                coordinator: self.coordinator.number,
                session: None,
                up: VecDeque::new(),
                down: VecDeque::new(),
                up_at: 0,
                down_at: 0,
                agent_side: true,
                coordinator_side: true,
                welcomed: false,
            },
        );
        Some(id)
    }

    fn delay(&mut self) -> Micros {
        let most = self.swarm.delay;
        if self.is_scripted() {
            // Long ones, so that messages are under way at the same time.
            return self.rng.between(most / 8, most);
        }
        self.rng.skewed(100, most.max(200))
    }

    pub(crate) fn send_up(&mut self, id: u64, message: Up) {
        let message = match message {
            Up::Observed(member) => Up::Observed(self.over_the_wire(member)),
            Up::Bundle(bundle) => Up::Bundle(self.bundle_over_the_wire(bundle)),
            Up::Hello(term, mut registration) => {
                let bundles = std::mem::take(&mut registration.bundles).into_iter();
                registration.bundles = bundles.map(|b| self.bundle_over_the_wire(b)).collect();
                Up::Hello(term, registration)
            }
            other @ (Up::Heartbeat(_) | Up::Goodbye) => other,
        };
        let (delay, twice) = (self.delay(), self.goes_wrong(self.swarm.chances.twice));
        let overtakes = self.goes_wrong(self.swarm.chances.overtakes);
        let now = self.now;
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        if !conn.agent_side {
            return;
        }
        let cut = self.hosts[conn.host].line.up_cut_until;
        let first = matches!(message, Up::Hello(..));
        let copies = if twice && !first { 2 } else { 1 };
        let mut times = Vec::new();
        for _ in 0..copies {
            let at = (conn.up_at + 1).max(now + delay).max(cut + delay);
            conn.up_at = at;
            times.push(at);
            conn.up.push_back(message.clone());
        }
        let length = conn.up.len();
        if overtakes && length >= 2 && !matches!(conn.up[length - 2], Up::Hello(..)) {
            conn.up.swap(length - 1, length - 2);
            self.see("message overtook another");
        }
        if copies > 1 {
            self.see("message came twice");
        }
        for at in times {
            self.at(at, Happening::Deliver { conn: id, up: true });
        }
    }

    pub(crate) fn send_down(&mut self, id: u64, message: Down) {
        let message = match message {
            Down::Command(term, command) => {
                Down::Command(term, Box::new(self.command_over_the_wire(*command)))
            }
            other @ (Down::Ack(..) | Down::End(_)) => other,
        };
        let delay = self.delay();
        let single = |message: &Down| matches!(message, Down::Command(_, command) if !matches!(**command, Command::Welcome { .. }));
        let twice = single(&message) && self.goes_wrong(self.swarm.chances.twice);
        if single(&message) && self.goes_wrong(3 * self.swarm.chances.twice) {
            // The second one comes when others may have come between.
            let wait = self.rng.skewed(ms(1), secs(5));
            self.after(wait, Happening::CommandAgain(id, Box::new(message.clone())));
        }
        let overtakes = single(&message) && self.goes_wrong(self.swarm.chances.overtakes);
        let now = self.now;
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        let line = self.hosts[conn.host].line;
        let slow = if line.slow_until > now { secs(2) } else { 0 };
        let mut times = Vec::new();
        for _ in 0..if twice { 2 } else { 1 } {
            let at = (conn.down_at + 1 + slow)
                .max(now + delay)
                .max(line.down_cut_until + delay);
            conn.down_at = at;
            times.push(at);
            conn.down.push_back(message.clone());
        }
        let length = conn.down.len();
        if overtakes && length >= 2 && single(&conn.down[length - 2]) {
            conn.down.swap(length - 1, length - 2);
        }
        for at in times {
            let up = false;
            self.at(at, Happening::Deliver { conn: id, up });
        }
    }

    pub(crate) fn deliver(&mut self, id: u64, up: bool) {
        let now = self.now;
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        let line = self.hosts[conn.host].line;
        let cut = if up {
            line.up_cut_until
        } else {
            line.down_cut_until
        };
        if cut > now {
            // It waits in some buffer; what follows it waits as well.
            return self.at(cut + 1, Happening::Deliver { conn: id, up });
        }
        if up {
            let message = conn.up.pop_front();
            let here = conn.coordinator_side && conn.coordinator == self.coordinator.number;
            if let Some(message) = message
                && here
            {
                self.coordinator_hears(id, message);
            }
        } else {
            let message = conn.down.pop_front();
            if let Some(message) = message
                && conn.agent_side
            {
                self.agent_hears(id, message);
            }
        }
    }

    fn coordinator_hears(&mut self, id: u64, message: Up) {
        let Some(conn) = self.conns.get(&id) else {
            return;
        };
        let (session, host) = (conn.session, conn.host);
        match message {
            Up::Hello(term, registration) => self.greeted(id, term, registration),
            Up::Observed(member) => {
                if let Some((session, node)) = self.who_speaks(session, host, id) {
                    let event = Event::MemberObserved {
                        session,
                        node,
                        member,
                    };
                    self.give_coordinator(Input::Event(event));
                }
            }
            Up::Bundle(bundle) => {
                if let Some((session, node)) = self.who_speaks(session, host, id) {
                    let event = Event::BundleObserved {
                        session,
                        node,
                        bundle,
                    };
                    self.give_coordinator(Input::Event(event));
                }
            }
            Up::Heartbeat(sent) => {
                if let Some((session, node)) = self.who_speaks(session, host, id) {
                    let event = Event::HeartbeatReceived { session, node };
                    self.give_coordinator(Input::Event(event));
                    let welcomed = self.conns.get(&id).is_some_and(|conn| conn.welcomed);
                    let term = self.coordinator.process.as_ref().map(|p| p.term);
                    if let (true, Some(term)) = (welcomed, term) {
                        self.send_down(id, Down::Ack(term, sent));
                    }
                }
            }
            Up::Goodbye => {
                self.see("agent said goodbye");
                self.coordinator_side_ends(id, None);
            }
        }
    }

    /// Session and node of a connection; the node is that of its certificate.
    fn who_speaks(
        &self,
        session: Option<SessionId>,
        host: usize,
        conn: u64,
    ) -> Option<(SessionId, trainyard_common::ids::NodeId)> {
        let node = self.oracle.certificates.get(&conn).copied();
        session.zip(node.or(self.hosts[host].node))
    }

    /// The coordinator's end of a connection goes, for a reason that the agent may be told.
    pub(crate) fn coordinator_side_ends(&mut self, id: u64, refusal: Option<Refusal>) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        if !conn.coordinator_side {
            return;
        }
        conn.coordinator_side = false;
        conn.up.clear();
        let (session, host, same) = (
            conn.session,
            conn.host,
            conn.coordinator == self.coordinator.number,
        );
        if same
            && let Some((session, node)) = self.who_speaks(session, host, id)
            && self.coordinator.process.is_some()
        {
            self.give_coordinator(Input::Event(Event::SessionEnded { session, node }));
        }
        self.send_down(id, Down::End(refusal));
    }

    /// The agent's end of a connection goes. The coordinator may learn of it at once, late, or by silence only.
    pub(crate) fn agent_side_ends(&mut self, id: u64) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        if !conn.agent_side {
            return;
        }
        conn.agent_side = false;
        conn.down.clear();
        // What comes late comes to the process that had the connection; the next one gives its numbers out anew.
        let number = conn.coordinator;
        let (session, host) = (conn.session, conn.host);
        let cut = self.hosts[host].line.up_cut_until;
        let orderly = self.rng.chance(500) && cut <= self.now;
        if orderly {
            let at = self.conns.get(&id).map_or(0, |conn| conn.up_at) + 1;
            let coordinator = true;
            return self.at(
                at,
                Happening::ConnEnds {
                    conn: id,
                    coordinator,
                },
            );
        }
        let speaks = self.who_speaks(session, host, id);
        let lost: Vec<Up> = self
            .conns
            .get_mut(&id)
            .map(|conn| conn.up.drain(..).collect())
            .unwrap_or_default();
        let mut held = 0;
        for message in lost {
            if let Up::Hello(term, registration) = message {
                if self.goes_wrong(self.swarm.chances.late) {
                    held = self.rng.between(ms(1), secs(20));
                    let hello = Happening::HelloLate(number, id, term, registration);
                    self.after(held, hello);
                }
                continue;
            }
            let Some((session, node)) = speaks else {
                break;
            };
            let event = match message {
                Up::Observed(member) => Event::MemberObserved {
                    session,
                    node,
                    member,
                },
                Up::Bundle(bundle) => Event::BundleObserved {
                    session,
                    node,
                    bundle,
                },
                Up::Hello(..) | Up::Heartbeat(_) | Up::Goodbye => continue,
            };
            if self.goes_wrong(self.swarm.chances.late) {
                let wait = self.rng.between(ms(1), secs(20));
                self.after(wait, Happening::Late(number, Box::new(event)));
            }
        }
        let wait = match self.rng.below(3) {
            0 => self.rng.between(secs(5), secs(60)),
            _ => self.rng.between(ms(1), secs(1)),
        };
        // A greeting that comes late has its answer before its connection is noticed to be over.
        let lingers = held + if held > 0 { secs(2) } else { 0 };
        let at = (self.now.max(cut) + wait).max(self.now + lingers);
        let coordinator = true;
        self.at(
            at,
            Happening::ConnEnds {
                conn: id,
                coordinator,
            },
        );
    }

    /// A command comes a second time.
    pub(crate) fn command_again(&mut self, id: u64, message: Down) {
        let Some(conn) = self.conns.get(&id) else {
            return;
        };
        let host = &self.hosts[conn.host];
        let cut = host.line.down_cut_until > self.now;
        let agent = host.agent.as_ref();
        let open = agent.is_some_and(|agent| agent.is_open() && agent.conn() == Some(id));
        if open && !cut {
            self.see("command came again late");
            self.agent_hears(id, message);
        }
    }

    /// A greeting that was under way when its agent gave the connection up arrives.
    pub(crate) fn hello_late(
        &mut self,
        process: u64,
        id: u64,
        term: Term,
        registration: Box<Registration>,
    ) {
        let open = self
            .conns
            .get(&id)
            .is_some_and(|conn| conn.coordinator_side);
        if open && self.coordinator.number == process {
            self.see("greeting arrived late");
            self.greeted(id, term, registration);
        }
    }

    pub(crate) fn conn_ends(&mut self, id: u64, coordinator: bool) {
        if coordinator {
            self.coordinator_side_ends(id, None);
        } else {
            self.agent_hears(id, Down::End(None));
        }
        let over = self
            .conns
            .get(&id)
            .is_some_and(|conn| !conn.agent_side && !conn.coordinator_side);
        if over {
            self.conns.remove(&id);
            self.oracle.certificates.remove(&id);
        }
    }

    /// Something between the two breaks the connection; each side learns of it in its own time.
    pub(crate) fn break_conn(&mut self, id: u64) {
        for coordinator in [false, true] {
            let wait = match self.rng.below(3) {
                0 => self.rng.between(secs(1), secs(40)),
                _ => self.rng.between(ms(1), ms(500)),
            };
            self.after(
                wait,
                Happening::ConnEnds {
                    conn: id,
                    coordinator,
                },
            );
        }
    }

    pub(crate) fn conns_of(&self, host: usize) -> Vec<u64> {
        self.conns
            .iter()
            .filter(|(_, conn)| conn.host == host && (conn.agent_side || conn.coordinator_side))
            .map(|(id, _)| *id)
            .collect()
    }

    // === the wire ===

    fn over_the_wire(&mut self, member: ObservedMember) -> ObservedMember {
        let back = ObservedMember::try_from(v1::ObservedMember::from(&member));
        if back.as_ref() != Ok(&member) {
            self.breaks("I13", format!("{member:?} becomes {back:?} on the wire"));
        }
        member
    }

    fn bundle_over_the_wire(&mut self, bundle: ObservedBundle) -> ObservedBundle {
        let back = ObservedBundle::try_from(v1::ObservedBundle::from(&bundle));
        if back.as_ref() != Ok(&bundle) {
            self.breaks("I13", format!("{bundle:?} becomes {back:?} on the wire"));
        }
        bundle
    }

    fn desired_bundle_over_the_wire(&mut self, bundle: &DesiredBundle) {
        let back = DesiredBundle::try_from(v1::DesiredBundle::from(bundle));
        if back.as_ref() != Ok(bundle) {
            self.breaks("I13", format!("{bundle:?} becomes {back:?} on the wire"));
        }
    }

    fn desired_over_the_wire(&mut self, member: &DesiredMember) {
        let back = DesiredMember::try_from(v1::DesiredMember::from(member));
        if back.as_ref() != Ok(member) {
            self.breaks("I13", format!("{member:?} becomes {back:?} on the wire"));
        }
    }

    fn command_over_the_wire(&mut self, command: Command) -> Command {
        match &command {
            Command::Welcome { desired, bundles } => {
                for member in desired {
                    self.desired_over_the_wire(member);
                }
                for bundle in bundles {
                    self.desired_bundle_over_the_wire(bundle);
                }
            }
            Command::Desire(member) => self.desired_over_the_wire(member),
            Command::DesireBundle(bundle) => self.desired_bundle_over_the_wire(bundle),
            Command::Forget(_) | Command::ForgetBundle(_) | Command::Resync(_) => {}
        }
        command
    }
}
