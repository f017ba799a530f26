//! The exhaustive corner: short scripted scenarios that are run once undisturbed, then again with an end of the coordinator,
//! of an agent, of a node or of its shims at every boundary between two effects, and again with each pair of messages that
//! were under way at the same time in the other order. Here is what a world needs for that: the script, the counting of
//! boundaries, and the message that is held back. The scenarios are in `scenarios.rs`, the enumeration in `every.rs`.

mod every;
mod scenarios;

use trainyard_common::ids::{AttemptRef, JobId};
use trainyard_common::state::{ExitStatus, MemberPhase, NodeAvailability};

use super::clock::{Micros, ms, secs};
use super::host::{Host, Role};
use super::network::{Down, Up};
use super::shim::Fate;
use super::swarm::Fault;
use super::users::Ask;
use super::world::{Entry, Happening, Stage, World};

pub use every::{CornerSum, corner, corner_again, scenario_names};
pub(crate) use scenarios::{Act, Scenario, When, find};

/// A step whose time does not come, because an end at a boundary changed what happens, is taken after this long.
const PATIENCE: Micros = secs(150);

/// What ends at a boundary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ends {
    /// The coordinator's process.
    Coordinator,
    /// The agent's process of a host.
    Agent(usize),
    /// A host loses its power.
    Power(usize),
    /// Every shim and carrier of a host is killed.
    Shims(usize),
}

/// An end at a boundary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Crash {
    /// The number of the boundary, from 1.
    pub(crate) at: usize,
    /// What ends.
    pub(crate) ends: Ends,
    /// What was under way then, a commit or a request to the system, is done all the same.
    pub(crate) done: bool,
}

/// Two messages of which the first is delivered right after the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Swap {
    /// By its number in the order of sending.
    pub(crate) first: u64,
    /// The same.
    pub(crate) second: u64,
    /// The first is not held longer, in simulated microseconds.
    pub(crate) until: Micros,
}

/// How a scenario is disturbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Disturbance {
    /// Not at all.
    #[default]
    None,
    /// Something ends at a boundary.
    Crash(Crash),
    /// Two messages come in the other order.
    Swap(Swap),
}

/// Whose boundary it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Coordinator,
    Host(usize),
}

/// A boundary that an undisturbed run passed, and what there was to end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Boundary {
    pub(crate) side: Side,
    pub(crate) agent: bool,
    pub(crate) shims: bool,
    /// A commit is under way.
    pub(crate) commit: bool,
    /// Requests of the host's agent are under way, or records are not synced.
    pub(crate) requests: bool,
}

/// In which messages keep their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Session { conn: u64, up: bool },
    Call(u64, u64),
    Answer(u64, u64),
}

/// A message of an undisturbed run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Message {
    pub(crate) number: u64,
    pub(crate) stream: Stream,
    /// After how many happenings it was sent and delivered.
    pub(crate) sent: u64,
    pub(crate) delivered: Option<(u64, Micros)>,
    /// A heartbeat or its answer.
    pub(crate) beat: bool,
}

/// What a scripted world has beside the others.
#[derive(Debug)]
pub(crate) struct Corner {
    scenario: Scenario,
    step: usize,
    since: Micros,
    disturbance: Disturbance,
    /// What was under way at the end that is happening right now is done, or not.
    done: Option<bool>,
    held: Vec<Happening>,
    pub(crate) boundaries: Vec<Boundary>,
    pub(crate) messages: Vec<Message>,
}

impl Corner {
    pub(crate) fn new(scenario: Scenario, disturbance: Disturbance) -> Self {
        Self {
            scenario,
            step: 0,
            since: 0,
            disturbance,
            done: None,
            held: Vec::new(),
            boundaries: Vec::new(),
            messages: Vec::new(),
        }
    }
}

fn stream_of(what: &Happening) -> Option<Stream> {
    match what {
        Happening::Deliver { conn, up } => Some(Stream::Session {
            conn: *conn,
            up: *up,
        }),
        Happening::CallArrives(call, attempt) => Some(Stream::Call(*call, *attempt)),
        Happening::CallAnswered(call, attempt, _) => Some(Stream::Answer(*call, *attempt)),
        _ => None,
    }
}

impl World {
    pub(crate) fn is_scripted(&self) -> bool {
        self.corner.is_some()
    }

    // === boundaries ===

    /// A boundary between two effects. True if something ended at it.
    pub(crate) fn boundary(&mut self, side: Side) -> bool {
        let Some(corner) = &mut self.corner else {
            return false;
        };
        let (mut agent, mut shims, mut requests) = (false, false, false);
        if let Side::Host(host) = side {
            let host = &self.hosts[host];
            agent = host.agent.is_some();
            shims = !host.shims.is_empty() || !host.carriers.is_empty();
            let mut journals = host.disk.bundles.values();
            requests = host
                .agent
                .as_ref()
                .is_some_and(|agent| agent.has_requests())
                || journals.any(|dir| dir.synced < dir.journal.len());
        }
        let commit = self.coordinator.commits();
        corner.boundaries.push(Boundary {
            side,
            agent,
            shims,
            commit,
            requests,
        });
        let number = corner.boundaries.len();
        let Disturbance::Crash(crash) = corner.disturbance else {
            return false;
        };
        if crash.at != number {
            return false;
        }
        corner.done = Some(crash.done);
        self.end_at_boundary(crash.ends);
        if let Some(corner) = &mut self.corner {
            corner.done = None;
        }
        true
    }

    fn end_at_boundary(&mut self, ends: Ends) {
        self.say(format!("at this boundary ends: {ends:?}"));
        match ends {
            Ends::Coordinator => self.crash("at a boundary"),
            Ends::Agent(host) => {
                self.agent_ends(host, false);
                let wait = self.rng.skewed(ms(200), secs(5));
                self.after(wait, Happening::AgentStarts(host));
            }
            Ends::Power(host) => {
                if self.hosts[host].powered {
                    self.power_off(host);
                    let wait = self.rng.between(secs(3), secs(20));
                    self.after(wait, Happening::PowerOn(host));
                }
            }
            Ends::Shims(host) => self.kill_shims(host),
        }
    }

    fn kill_shims(&mut self, host: usize) {
        let shims: Vec<AttemptRef> = self.hosts[host].shims.keys().copied().collect();
        let carriers: Vec<u64> = self.hosts[host].carriers.keys().copied().collect();
        for attempt in shims {
            self.see("shim killed by the script");
            self.kill_shim(host, attempt);
        }
        for carrier in carriers {
            self.kill_carrier(host, carrier);
        }
    }

    /// The same where an agent carries out something. True if this agent is no more.
    pub(crate) fn agent_boundary(&mut self, host: usize) -> bool {
        let number = self.agent_number(host);
        self.boundary(Side::Host(host)) && self.agent_number(host) != number
    }

    /// Whether something that was under way when its process ended is done all the same.
    pub(crate) fn done_all_the_same(&mut self) -> bool {
        let chosen = self.corner.as_ref().and_then(|corner| corner.done);
        // The draw is made in any case, so that both ways go on alike.
        let drawn = self.rng.chance(500);
        chosen.unwrap_or(drawn)
    }

    /// How much of something is kept by a power loss.
    pub(crate) fn kept_of(&mut self, least: u64, most: u64) -> u64 {
        let drawn = self.rng.between(least, most);
        match self.corner.as_ref().and_then(|corner| corner.done) {
            Some(true) => most,
            Some(false) => least,
            None => drawn,
        }
    }

    pub(crate) fn host_boundary(&mut self, what: &Happening) {
        if self.corner.is_none() {
            return;
        }
        let host = match what {
            Happening::AgentStarts(host)
            | Happening::AgentWakes(host, _)
            | Happening::AgentDone { host, .. }
            | Happening::ShimHeard { host, .. }
            | Happening::Settle { host, .. }
            | Happening::SessionTried(host, _)
            | Happening::TermKept { host, .. }
            | Happening::Bundle(host, ..)
            | Happening::Carrier(host, ..)
            | Happening::ShimUp(host, ..)
            | Happening::ShimOrdered(host, ..)
            | Happening::ShimGoes(host, ..)
            | Happening::ShimTurns(host, ..)
            | Happening::ShimWritten(host, ..)
            | Happening::ShimExits(host, ..)
            | Happening::ProcessEnds { host, .. } => Some(*host),
            Happening::Deliver { conn, up: false } => self.conns.get(conn).map(|conn| conn.host),
            _ => None,
        };
        if let Some(host) = host {
            self.boundary(Side::Host(host));
        }
    }

    // === messages ===

    pub(crate) fn note_sent(&mut self, number: u64, what: &Happening) {
        let sent = self.events;
        if let Some(corner) = &mut self.corner
            && let Some(stream) = stream_of(what)
        {
            corner.messages.push(Message {
                number,
                stream,
                sent,
                delivered: None,
                beat: false,
            });
        }
    }

    /// Notes that a message arrives, or holds it back: then it is given back later.
    pub(crate) fn arrives(&mut self, entry: Entry) -> Option<(Happening, u64)> {
        let (number, what) = (entry.sequence, entry.what);
        let (events, now) = (self.events, self.now);
        let Some(stream) = stream_of(&what) else {
            return Some((what, number));
        };
        let beat = match &what {
            Happening::Deliver { conn, up } => self.conns.get(conn).is_some_and(|conn| match up {
                true => matches!(conn.up.front(), Some(Up::Heartbeat(..))),
                false => matches!(conn.down.front(), Some(Down::Ack(..))),
            }),
            _ => false,
        };
        let Some(corner) = &mut self.corner else {
            return Some((what, number));
        };
        if let Some(message) = corner
            .messages
            .iter_mut()
            .rev()
            .find(|m| m.number == number)
        {
            message.delivered = Some((events, now));
            message.beat = beat;
        }
        let Disturbance::Swap(swap) = corner.disturbance else {
            return Some((what, number));
        };
        let behind = corner.held.first().and_then(stream_of) == Some(stream);
        if number == swap.first || behind {
            corner.held.push(what);
            return None;
        }
        Some((what, number))
    }

    /// Delivers what was held back, if its time came with the message of this number.
    pub(crate) fn let_go(&mut self, number: u64) {
        let now = self.now;
        let Some(corner) = &mut self.corner else {
            return;
        };
        let Disturbance::Swap(swap) = corner.disturbance else {
            return;
        };
        if corner.held.is_empty() || (number != swap.second && now < swap.until) {
            return;
        }
        corner.disturbance = Disturbance::None;
        self.see("message delivered after a later one");
        let Some(corner) = &mut self.corner else {
            return;
        };
        for what in std::mem::take(&mut corner.held) {
            self.happen(what);
        }
    }

    // === the script ===

    pub(crate) fn follow_script(&mut self) {
        loop {
            let Some(corner) = &self.corner else { return };
            if self.stage != Stage::Chaos {
                return;
            }
            let (step, since) = (corner.step, corner.since);
            let Some((when, act)) = corner.scenario.steps.get(step).cloned() else {
                return self.chaos_ends();
            };
            let late = self.now >= since + PATIENCE;
            if !late && !self.has_come(when, since) {
                return;
            }
            let now = self.now;
            if let Some(corner) = &mut self.corner {
                corner.step += 1;
                corner.since = now;
            }
            self.say(format!("script: {act:?}"));
            self.act(act);
        }
    }

    /// The job that was submitted with a request.
    fn job_of(&self, request: u64) -> Option<JobId> {
        let name = format!("r{request}");
        let mut jobs = self.typed().jobs.values();
        jobs.find(|job| job.spec.name == name).map(|job| job.id)
    }

    fn has_come(&self, when: When, since: Micros) -> bool {
        let member = |wanted: MemberPhase| {
            let rows = self.typed().attempts.values();
            rows.flat_map(|attempt| &attempt.members)
                .any(|member| member.phase == wanted)
        };
        match when {
            When::After(wait) => self.now >= since + wait,
            When::AllThere => (0..self.hosts.len()).all(|host| {
                let node = self.hosts[host]
                    .node
                    .and_then(|id| self.typed().nodes.get(&id));
                let ready = node.is_some_and(|node| {
                    node.availability == NodeAvailability::Ready && node.incarnation.0 > 0
                });
                ready && self.hosts[host].agent.as_ref().is_some_and(|a| a.is_open())
            }),
            When::Member(phase) => member(phase),
            When::Ranks(count) => {
                let processes = self.hosts.iter().flat_map(|host| host.processes.values());
                processes
                    .filter(|process| matches!(process.role, Role::Rank(_)))
                    .count()
                    >= count
            }
            When::Job(request, state) => self
                .job_of(request)
                .and_then(|job| self.typed().jobs.get(&job))
                .is_some_and(|job| job.state == state),
            When::Node(host, availability) => self.hosts[host]
                .node
                .and_then(|id| self.typed().nodes.get(&id))
                .is_some_and(|node| node.availability == availability),
            When::Ended => self
                .typed()
                .attempts
                .values()
                .any(|attempt| attempt.outcome.is_some()),
            When::Bundle => !self.typed().bundles.is_empty(),
        }
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Submit { request, spec } => {
                let (body, spec) = (0, Box::new(spec(request)));
                self.call(
                    0,
                    Ask::Submit {
                        request,
                        body,
                        spec,
                    },
                );
            }
            Act::SubmitOther { request, spec } => {
                let (body, spec) = (1, Box::new(spec(request)));
                self.call(
                    0,
                    Ask::Submit {
                        request,
                        body,
                        spec,
                    },
                );
            }
            Act::Cancel(request) => {
                if let Some(job) = self.job_of(request) {
                    self.call(0, Ask::Cancel { job });
                }
            }
            Act::Policy(host, policy) => {
                if let Some(node) = self.hosts[host].node {
                    self.call(0, Ask::Policy { node, policy });
                }
            }
            Act::ConfirmLost(host) => {
                if let Some(node) = self.hosts[host].node {
                    self.call(0, Ask::ConfirmLost { node });
                }
            }
            Act::Remove(host) => {
                if let Some(node) = self.hosts[host].node {
                    self.call(0, Ask::Remove { node });
                }
            }
            Act::Silent(host, length) => {
                let until = self.now + length;
                let busy = |host: &Host| !host.attempts_alive().is_empty();
                let host = match busy(&self.hosts[host]) {
                    true => host,
                    false => self.hosts.iter().position(busy).unwrap_or(host),
                };
                let line = &mut self.hosts[host].line;
                line.up_cut_until = until;
                line.down_cut_until = until;
            }
            Act::Break(host) => {
                let conns = self.conns_of(host);
                conns.into_iter().for_each(|conn| self.break_conn(conn));
            }
            Act::EndAgent(host) => self.end_at_boundary(Ends::Agent(host)),
            Act::PowerOff(host, length) => {
                self.power_off(host);
                self.after(length, Happening::PowerOn(host));
            }
            Act::KillShims(host) => self.kill_shims(host),
            Act::EndCoordinator => self.crash("the script says so"),
            Act::Backup => self.backup_made(),
            Act::Restore => self.fault(Fault::BackupRestored),
            Act::Wait => {}
        }
    }

    /// How a rank ends in a scripted world: by the word that it was started with.
    pub(crate) fn scripted_fate(
        &self,
        command: &[String],
        attempt: AttemptRef,
        rank: u32,
    ) -> Option<Fate> {
        self.corner.as_ref()?;
        let (after, exit) = match command.first().map(String::as_str) {
            Some("long" | "stubborn") => (secs(12), 0),
            Some("one-fails") if rank == 0 => (secs(1), 3),
            Some("one-fails") => (secs(12), 0),
            Some("fails-first") if attempt.attempt.0 == 1 => (ms(300), 3),
            Some("task") => (ms(400), 0),
            _ => (ms(300), 0),
        };
        let (exit, oom) = (ExitStatus::Code(exit), false);
        Some(Fate { after, exit, oom })
    }
}
