//! The agent's process: the real core, driven as the real driver does it (requests about one attempt in order, those
//! about different attempts side by side, each with a delay and its own luck), and the session with the coordinator as
//! the real session runs it.

use std::collections::{BTreeMap, VecDeque};

use trainyard_agent_core::{BundleEvent, Config, Core, Effect, Event, Fault, Outbox};
use trainyard_common::bundle::DesiredBundle;
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{AttemptRef, Incarnation, Term};
use trainyard_common::member::{DesiredMember, Go, ObservedMember, ObservedPhase, Stop};
use trainyard_coordinator_core::effect::Command;
use trainyard_coordinator_core::event::{Registration, SessionId};

use super::bundles::Bundles;
use super::clock::{Micros, ProcessClock, micros, ms, secs};
use super::host::{File, Kept};
use super::network::{Down, Up};
use super::shim::State;
use super::world::{Happening, World};

/// As in the real session.
const ANSWER_TIMEOUT: Micros = secs(60);
const SILENT_HEARTBEATS: u32 = 3;
const SEND_QUEUE: usize = 32;
const FIRST_PAUSE: Micros = ms(200);
const LONGEST_PAUSE: Micros = secs(30);

/// A request to the runtime, the fetcher or the uploader.
#[derive(Debug, Clone)]
pub(crate) enum Task {
    Accept(Box<DesiredMember>),
    Fetch,
    SpawnShim,
    Go(Go),
    Stop(Stop),
    Upload,
    Remove,
}

/// Requests about one attempt.
#[derive(Debug)]
struct Lane {
    running: Task,
    token: u64,
    queue: VecDeque<Task>,
    cancelled: bool,
}

/// A shim that this agent process follows.
#[derive(Debug, Default)]
pub(crate) struct Follower {
    pub(crate) go: Option<Go>,
    pub(crate) words: VecDeque<State>,
    pub(crate) word_at: Micros,
    pub(crate) told_stopping: bool,
}

/// Where the session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Session {
    Idle,
    /// The greeting is on its way, or its answer.
    Greeting(u64),
    /// The answer is here, and its term is being kept.
    Keeping(u64),
    Open {
        conn: u64,
        heard: Micros,
        healthy: bool,
    },
}

/// A welcome whose term is being kept.
#[derive(Debug)]
struct Answer {
    term: trainyard_common::ids::Term,
    desired: Vec<DesiredMember>,
    bundles: Vec<DesiredBundle>,
}

/// An agent's process.
#[derive(Debug)]
pub(crate) struct Agent {
    /// No other process has this number.
    pub(crate) number: u64,
    pub(crate) core: Core,
    pub(crate) clock: ProcessClock,
    kept: Kept,
    lanes: BTreeMap<AttemptRef, Lane>,
    pub(crate) followers: BTreeMap<AttemptRef, Follower>,
    outgoing: BTreeMap<AttemptRef, ObservedMember>,
    pub(crate) bundles: Bundles,
    session: Session,
    answer: Option<Answer>,
    /// What was read behind the answer while its term was being kept.
    behind: Vec<Event>,
    pause: Micros,
    openings: u64,
    wakes: Option<Micros>,
    /// When the last greeting was sent.
    greeted: Micros,
    /// When the last word was sent that the coordinator has answered.
    pub(crate) heard: Option<Micros>,
}

impl Agent {
    pub(crate) fn is_open(&self) -> bool {
        matches!(self.session, Session::Open { .. })
    }

    pub(crate) fn conn(&self) -> Option<u64> {
        match self.session {
            Session::Idle => None,
            Session::Greeting(conn) | Session::Keeping(conn) | Session::Open { conn, .. } => {
                Some(conn)
            }
        }
    }

    /// Whether requests are under way.
    pub(crate) fn has_requests(&self) -> bool {
        !self.lanes.is_empty() || self.bundles.has_requests()
    }

    /// A term before the one that it has seen, if there was one.
    pub(crate) fn older_term(&self) -> Option<Term> {
        let term = self.kept.term.0.checked_sub(1).filter(|term| *term > 0);
        term.map(Term)
    }

    pub(crate) fn idle(&self) -> bool {
        self.lanes.is_empty() && self.outgoing.is_empty() && self.bundles.idle()
    }
}

impl World {
    fn agent_mut(&mut self, host: usize, number: u64) -> Option<&mut Agent> {
        self.hosts
            .get_mut(host)?
            .agent
            .as_mut()
            .filter(|agent| agent.number == number)
    }

    pub(crate) fn agent_number(&self, host: usize) -> Option<u64> {
        self.hosts[host].agent.as_ref().map(|agent| agent.number)
    }

    // === start and end ===

    pub(crate) fn agent_starts(&mut self, index: usize) {
        let now = self.now;
        let host = &mut self.hosts[index];
        if host.agent.is_some() || !host.powered || host.scrapped || host.node.is_none() {
            return;
        }
        if host.disk_full {
            self.see("agent cannot start on a full disk");
            return self.after(secs(3), Happening::AgentStarts(index));
        }
        let mut kept = match &host.disk.agent {
            File::Missing => Kept::default(),
            File::Whole(kept) => *kept,
            File::Damaged => Kept {
                incarnation: Incarnation(host.clock.wall(now).0 / 1000),
                ..Kept::default()
            },
        };
        kept.incarnation = kept.incarnation.next();
        host.disk.agent = File::Whole(kept);
        let clock = host.clock.start(now);
        let number = self.next_serial();
        let recovered = self.recover(index, clock);
        let (bundles, found) = self.recover_bundles(index);
        let host = &mut self.hosts[index];
        let config = Config {
            capacity: host.inventory.capacity,
            gpus: host
                .inventory
                .gpus
                .iter()
                .map(|gpu| gpu.uuid.clone())
                .collect(),
        };
        let followers = recovered.followed;
        let mut core = Core::new(config, recovered.members, clock.now(now));
        core.recover_bundles(found);
        host.agent = Some(Agent {
            number,
            core,
            clock,
            kept,
            lanes: BTreeMap::new(),
            followers: followers
                .iter()
                .map(|id| (*id, Follower::default()))
                .collect(),
            outgoing: BTreeMap::new(),
            bundles,
            session: Session::Idle,
            answer: None,
            behind: Vec::new(),
            pause: FIRST_PAUSE,
            openings: 0,
            wakes: None,
            greeted: 0,
            heard: None,
        });
        host.paused_until = 0;
        self.see("agent started");
        self.say(format!(
            "agent {index} starts, incarnation {}",
            kept.incarnation
        ));
        for attempt in followers {
            self.follow(index, attempt);
        }
        self.wake_agent(index);
        let wait = self.rng.between(ms(5), ms(300));
        self.after(wait, Happening::SessionTried(index, number));
        if self.hosts[index].crash_loop_until > now {
            let wait = self.rng.between(ms(50), secs(4));
            let host = index;
            self.after(
                wait,
                Happening::FaultEnds(super::swarm::Fault::AgentCrashLoop, host),
            );
        }
    }

    /// The agent's process ends, now. What it was about to do is done, half done or not done.
    pub(crate) fn agent_ends(&mut self, index: usize, power: bool) {
        let Some(agent) = self.hosts[index].agent.take() else {
            return;
        };
        self.hosts[index].paused_until = 0;
        self.say(format!("agent {index} ends"));
        if let Some(conn) = agent.conn() {
            self.agent_side_ends(conn);
        }
        for (attempt, lane) in agent.lanes {
            self.half_done(index, attempt, lane.running, power);
        }
        self.bundles_half_done(index, agent.bundles);
    }

    // === the driver ===

    pub(crate) fn wake_agent(&mut self, index: usize) {
        let now = self.now;
        let Some(agent) = &mut self.hosts[index].agent else {
            return;
        };
        let Some(deadline) = agent.core.next_deadline() else {
            return;
        };
        let at = agent.clock.when(now, deadline);
        let number = agent.number;
        if agent.wakes.is_none_or(|wakes| at < wakes || wakes <= now) {
            agent.wakes = Some(at);
            self.at(at, Happening::AgentWakes(index, number));
        }
    }

    pub(crate) fn agent_wakes(&mut self, index: usize, number: u64) {
        let now = self.now;
        let Some(agent) = self.agent_mut(index, number) else {
            return;
        };
        if agent.wakes.is_some_and(|wakes| wakes > now) {
            return;
        }
        agent.wakes = None;
        let time = agent.clock.now(now);
        if agent
            .core
            .next_deadline()
            .is_some_and(|deadline| deadline <= time)
        {
            self.tell_agent(index, Event::TimerFired);
        } else {
            self.wake_agent(index);
        }
    }

    pub(crate) fn tell_agent(&mut self, index: usize, event: Event) {
        let now = self.now;
        self.note_agent_told(index, &event);
        let Some(agent) = &mut self.hosts[index].agent else {
            return;
        };
        let mut out = Outbox::new();
        agent.core.handle(agent.clock.now(now), event, &mut out);
        for effect in out.drain() {
            if self.agent_boundary(index) {
                return;
            }
            self.carry_out(index, effect);
        }
        self.pump(index);
        self.wake_agent(index);
    }

    fn carry_out(&mut self, index: usize, effect: Effect) {
        self.trace.debug(&effect);
        self.check_request(index, &effect);
        let (attempt, task) = match effect {
            Effect::Accept(member) => (member.attempt, Task::Accept(member)),
            Effect::Fetch(attempt) => (attempt, Task::Fetch),
            Effect::CancelFetch(attempt) => return self.cancel_fetch(index, attempt),
            Effect::Bundle(effect) => return self.carry_out_bundle(index, effect),
            Effect::SpawnShim(attempt) => (attempt, Task::SpawnShim),
            Effect::Go(attempt, go) => (attempt, Task::Go(go)),
            Effect::StopRanks(attempt, stop) => (attempt, Task::Stop(stop)),
            Effect::Upload { attempt, .. } => (attempt, Task::Upload),
            Effect::Report(member) => {
                let name = phase_name(&member.phase);
                self.say(format!("agent {index} reports {} {name}", member.attempt));
                if let Some(agent) = &mut self.hosts[index].agent {
                    agent.outgoing.insert(member.attempt, member);
                }
                return;
            }
            Effect::Remove(attempt) => (attempt, Task::Remove),
            Effect::Note { attempt, text } => {
                return self.say(format!("agent {index} notes on {attempt}: {text}"));
            }
        };
        self.add_task(index, attempt, task);
    }

    fn add_task(&mut self, index: usize, attempt: AttemptRef, task: Task) {
        let token = self.next_serial();
        let takes = self.task_takes(&task);
        let Some(agent) = &mut self.hosts[index].agent else {
            return;
        };
        if let Some(lane) = agent.lanes.get_mut(&attempt) {
            lane.queue.push_back(task);
            return;
        }
        let lane = Lane {
            running: task,
            token,
            queue: VecDeque::new(),
            cancelled: false,
        };
        agent.lanes.insert(attempt, lane);
        let number = agent.number;
        let (host, agent) = (index, number);
        self.after(
            takes,
            Happening::AgentDone {
                host,
                agent,
                attempt,
                token,
            },
        );
    }

    fn task_takes(&mut self, task: &Task) -> Micros {
        match task {
            Task::Fetch | Task::Upload if self.is_scripted() => ms(800),
            Task::Accept(_) => self.rng.between(ms(1), ms(30)),
            Task::Fetch if self.goes_wrong(self.swarm.chances.fetch_hangs) => {
                self.see("fetch hangs");
                self.rng.between(secs(60), secs(600))
            }
            Task::Fetch => self.rng.skewed(ms(1), secs(10)),
            Task::SpawnShim | Task::Go(_) | Task::Stop(_) => self.rng.between(100, ms(5)),
            Task::Upload => self.rng.skewed(ms(10), secs(10)),
            Task::Remove => self.rng.between(ms(1), ms(200)),
        }
    }

    fn cancel_fetch(&mut self, index: usize, attempt: AttemptRef) {
        let Some(agent) = &mut self.hosts[index].agent else {
            return;
        };
        let number = agent.number;
        let Some(lane) = agent.lanes.get_mut(&attempt) else {
            return;
        };
        if !matches!(lane.running, Task::Fetch) {
            return;
        }
        lane.cancelled = true;
        let token = lane.token;
        let wait = self.rng.between(100, ms(300));
        let (host, agent) = (index, number);
        self.after(
            wait,
            Happening::AgentDone {
                host,
                agent,
                attempt,
                token,
            },
        );
    }

    pub(crate) fn agent_done(
        &mut self,
        index: usize,
        number: u64,
        attempt: AttemptRef,
        token: u64,
    ) {
        let Some(agent) = self.agent_mut(index, number) else {
            return;
        };
        let Some(lane) = agent
            .lanes
            .get_mut(&attempt)
            .filter(|lane| lane.token == token)
        else {
            return;
        };
        let (task, cancelled) = (lane.running.clone(), lane.cancelled);
        let event = match task {
            Task::Fetch => Some(self.fetched(attempt, cancelled)),
            other => self.perform(index, attempt, other),
        };
        if self.agent_boundary(index) {
            return;
        }
        if let Some(event) = event {
            self.tell_agent(index, event);
        }
        let token = self.next_serial();
        let Some(lane) = self
            .agent_mut(index, number)
            .and_then(|agent| agent.lanes.get_mut(&attempt))
        else {
            return;
        };
        let Some(next) = lane.queue.pop_front() else {
            if let Some(agent) = self.agent_mut(index, number) {
                agent.lanes.remove(&attempt);
            }
            return;
        };
        lane.running = next.clone();
        lane.token = token;
        lane.cancelled = false;
        let takes = self.task_takes(&next);
        let (host, agent) = (index, number);
        self.after(
            takes,
            Happening::AgentDone {
                host,
                agent,
                attempt,
                token,
            },
        );
    }

    fn fetched(&mut self, attempt: AttemptRef, cancelled: bool) -> Event {
        let failed = |error: &str, fault| Event::FetchFailed {
            attempt,
            error: error.to_owned(),
            fault,
        };
        if cancelled {
            self.see("fetch cancelled");
            return failed("cancelled", Fault::Infrastructure);
        }
        if self.goes_wrong(self.swarm.chances.fetch_fails) {
            self.see("fetch failed");
            return match self.rng.chance(700) {
                true => failed("the network is down", Fault::Infrastructure),
                false => failed("the snapshot is gone", Fault::Job),
            };
        }
        Event::FetchFinished(attempt)
    }

    // === the session ===

    pub(crate) fn session_tried(&mut self, index: usize, number: u64) {
        let now = self.now;
        let heartbeat = self.swarm.heartbeat;
        let Some(agent) = self.agent_mut(index, number) else {
            return;
        };
        if agent.session != Session::Idle {
            return;
        }
        let Some(conn) = self.connect(index, number) else {
            return self.retry_session(index, number, false);
        };
        let host = &mut self.hosts[index];
        let (Some(agent), Some(node)) = (&mut host.agent, host.node) else {
            return;
        };
        self.oracle.certificates.insert(conn, node);
        agent.session = Session::Greeting(conn);
        agent.greeted = now;
        agent.openings += 1;
        agent.outgoing.clear();
        let observed = agent.core.observed();
        let bundles = agent.bundles.lanes.observed();
        let registration = Registration {
            session: SessionId(0),
            node,
            incarnation: agent.kept.incarnation,
            opening: agent.openings,
            boot_id: host.boot_id(),
            agent_version: "1".to_owned(),
            last_words: String::new(),
            address: format!("10.0.0.{}", index + 1),
            inventory: host.inventory.clone(),
            observed: observed.clone(),
            bundles,
        };
        let host = &mut self.hosts[index];
        let Some(agent) = &mut host.agent else { return };
        agent.core.set_config(Config {
            capacity: host.inventory.capacity,
            gpus: host
                .inventory
                .gpus
                .iter()
                .map(|gpu| gpu.uuid.clone())
                .collect(),
        });
        let term = agent.kept.term;
        self.note_reported(index, node, &observed, true);
        self.note_greeting(node, &registration.bundles);
        self.see("session tried");
        self.send_up(conn, Up::Hello(term, Box::new(registration)));
        let (host, agent) = (index, number);
        self.at(
            now + ANSWER_TIMEOUT,
            Happening::SessionLate { host, agent, conn },
        );
        let first = micros(heartbeat);
        self.after(first, Happening::Beat { host, agent, conn });
    }

    /// The session is over for the agent: pause, and try again.
    fn retry_session(&mut self, index: usize, number: u64, slow: bool) {
        let jitter = self.rng.between(80, 120);
        let Some(agent) = self.agent_mut(index, number) else {
            return;
        };
        let healthy = matches!(agent.session, Session::Open { healthy: true, .. });
        let was_open = matches!(agent.session, Session::Open { .. });
        let conn = agent.conn();
        agent.session = Session::Idle;
        agent.answer = None;
        agent.behind.clear();
        if healthy {
            agent.pause = FIRST_PAUSE;
        }
        if slow {
            agent.pause = LONGEST_PAUSE;
        }
        let pause = agent.pause * jitter / 100;
        agent.pause = (agent.pause * 16 / 10).min(LONGEST_PAUSE);
        if let Some(conn) = conn {
            self.agent_side_ends(conn);
        }
        if was_open {
            self.say(format!("agent {index} has no session"));
            self.tell_agent(index, Event::Disconnected);
        }
        self.after(pause, Happening::SessionTried(index, number));
    }

    pub(crate) fn session_late(&mut self, index: usize, number: u64, conn: u64) {
        let waits = self
            .agent_mut(index, number)
            .is_some_and(|agent| agent.session == Session::Greeting(conn));
        if waits {
            self.see("greeting was not answered in time");
            self.retry_session(index, number, false);
        }
    }

    pub(crate) fn beat(&mut self, index: usize, number: u64, conn: u64) {
        let now = self.now;
        let heartbeat = self.swarm.heartbeat;
        let Some(agent) = self.agent_mut(index, number) else {
            return;
        };
        if agent.conn() != Some(conn) {
            return;
        }
        if let Session::Open { heard, .. } = agent.session {
            if now - heard >= micros(heartbeat * SILENT_HEARTBEATS) {
                self.see("session given up for silence");
                return self.retry_session(index, number, false);
            }
            self.send_up(conn, Up::Heartbeat(now));
            self.pump(index);
        }
        let (host, agent) = (index, number);
        self.after(micros(heartbeat), Happening::Beat { host, agent, conn });
    }

    pub(crate) fn agent_hears(&mut self, conn: u64, message: Down) {
        let now = self.now;
        let Some(found) = self.conns.get(&conn) else {
            return;
        };
        let (index, number) = (found.host, found.agent);
        let Some(agent) = self.agent_mut(index, number) else {
            return;
        };
        if agent.conn() != Some(conn) {
            return;
        }
        let seen = agent.kept.term;
        if let Session::Open { heard, healthy, .. } = &mut agent.session {
            *heard = now;
            *healthy |= matches!(message, Down::Ack(..));
        }
        match message {
            Down::End(refusal) => self.session_refused(index, number, refusal),
            Down::Command(term, _) | Down::Ack(term, _) if term < seen => {
                self.see("stale term refused");
                self.retry_session(index, number, true);
            }
            Down::Ack(_, sent) => {
                if agent.is_open() {
                    self.renew_leases(index, sent);
                }
            }
            Down::Command(term, command) => match *command {
                Command::Welcome { desired, bundles } => {
                    agent.session = Session::Keeping(conn);
                    agent.answer = Some(Answer {
                        term,
                        desired,
                        bundles,
                    });
                    let wait = if term > seen {
                        self.rng.between(ms(1), ms(20))
                    } else {
                        0
                    };
                    let (host, agent) = (index, number);
                    self.after(wait, Happening::TermKept { host, agent, conn });
                }
                Command::Desire(member) => {
                    self.obeyed_when_open(index, conn, Event::DesiredChanged(member));
                }
                Command::Forget(attempt) => {
                    self.obeyed_when_open(index, conn, Event::ForgetRequested(attempt));
                }
                Command::DesireBundle(bundle) => {
                    let event = Event::Bundle(BundleEvent::Desired(bundle));
                    self.obeyed_when_open(index, conn, event);
                }
                Command::ForgetBundle(bundle) => {
                    let event = Event::Bundle(BundleEvent::ForgetRequested(bundle));
                    self.obeyed_when_open(index, conn, event);
                }
                Command::Resync(why) => {
                    self.see("resync asked for");
                    self.say(format!("agent {index} is to begin anew: {why}"));
                    self.retry_session(index, number, false);
                }
            },
        }
    }

    /// While the term of the answer is being kept, nothing more is read.
    fn obeyed_when_open(&mut self, index: usize, conn: u64, event: Event) {
        let Some(agent) = &mut self.hosts[index].agent else {
            return;
        };
        match agent.session {
            Session::Open { .. } => {
                self.note_told(index, &event);
                self.tell_agent(index, event);
            }
            Session::Keeping(_) => {
                // The event is in the stream behind the welcome, so it is read right after it.
                agent.behind.push(event);
            }
            Session::Idle | Session::Greeting(_) => {
                self.breaks(
                    "I11",
                    format!("a command on {conn} came before its welcome"),
                );
            }
        }
    }

    pub(crate) fn term_kept(&mut self, index: usize, number: u64, conn: u64) {
        let now = self.now;
        let full = self.hosts[index].disk_full;
        let Some(agent) = self.agent_mut(index, number) else {
            return;
        };
        if agent.session != Session::Keeping(conn) {
            return;
        }
        let Some(answer) = agent.answer.take() else {
            return;
        };
        let Answer {
            term,
            desired,
            bundles,
        } = answer;
        if term > agent.kept.term {
            if full {
                self.see("term could not be kept");
                return self.retry_session(index, number, true);
            }
            agent.kept.term = term;
            let kept = agent.kept;
            self.hosts[index].disk.agent = File::Whole(kept);
            if self.agent_boundary(index) {
                return;
            }
        }
        let Some(agent) = self.agent_mut(index, number) else {
            return;
        };
        agent.session = Session::Open {
            conn,
            heard: now,
            healthy: false,
        };
        let waiting = std::mem::take(&mut agent.behind);
        let greeted = agent.greeted;
        self.hosts[index].refused = None;
        if let Some(node) = self.hosts[index].node {
            self.oracle.vouched.remove(&node);
        }
        self.see("session opened");
        self.renew_leases(index, greeted);
        self.say(format!("agent {index} has a session with term {term}"));
        self.tell_agent(index, Event::Connected { desired });
        self.tell_agent(index, Event::Bundle(BundleEvent::AllDesired(bundles)));
        for event in waiting {
            self.tell_agent(index, event);
        }
    }

    fn session_refused(&mut self, index: usize, number: u64, refusal: Option<Refusal>) {
        let person = refusal.as_ref().is_some_and(|refusal| match refusal.code {
            ErrorCode::Unavailable | ErrorCode::Internal | ErrorCode::Exhausted => false,
            ErrorCode::Invalid
            | ErrorCode::NotFound
            | ErrorCode::AlreadyExists
            | ErrorCode::FailedPrecondition
            | ErrorCode::PermissionDenied
            | ErrorCode::Unauthenticated
            | ErrorCode::Compacted
            | ErrorCode::Unimplemented => true,
        });
        if person && let Some(refusal) = refusal {
            self.say(format!("agent {index} is refused: {}", refusal.message));
            self.hosts[index].refused = Some(refusal.reason);
            self.call_operator(index);
        }
        self.retry_session(index, number, person);
    }

    /// Hands reports to the connection while it takes them.
    pub(crate) fn pump(&mut self, index: usize) {
        loop {
            let host = &mut self.hosts[index];
            let (Some(agent), Some(node)) = (&mut host.agent, host.node) else {
                return;
            };
            let Session::Open { conn, .. } = agent.session else {
                return;
            };
            let room = self
                .conns
                .get(&conn)
                .is_some_and(|conn| conn.up.len() < SEND_QUEUE && conn.agent_side);
            if !room || self.agent_boundary(index) {
                return;
            }
            let Some(agent) = &mut self.hosts[index].agent else {
                return;
            };
            let Some((_, report)) = agent.outgoing.pop_first() else {
                let Some(bundle) = agent.bundles.lanes.pop() else {
                    return;
                };
                self.note_bundle_reported(node, &bundle);
                self.send_up(conn, Up::Bundle(bundle));
                continue;
            };
            self.note_reported(index, node, std::slice::from_ref(&report), false);
            self.send_up(conn, Up::Observed(report));
        }
    }

    /// The session is opened anew, as after a renewed certificate.
    pub(crate) fn renew_session(&mut self, index: usize) {
        if let Some(number) = self.agent_number(index)
            && self.hosts[index].agent.as_ref().is_some_and(Agent::is_open)
        {
            self.retry_session(index, number, false);
        }
    }
}

pub(crate) fn phase_name(phase: &ObservedPhase) -> String {
    match phase {
        ObservedPhase::Preparing => "PREPARING".to_owned(),
        ObservedPhase::Ready { .. } => "READY".to_owned(),
        ObservedPhase::Running { .. } => "RUNNING".to_owned(),
        ObservedPhase::Stopping => "STOPPING".to_owned(),
        ObservedPhase::CleanupPending(cleanup) => format!("CLEANUP_PENDING {}", cleanup.told()),
        ObservedPhase::Uploading(ending) => format!("UPLOADING {}", ending.cause),
        ObservedPhase::Ended(ending) => format!("ENDED {}", ending.cause),
    }
}
