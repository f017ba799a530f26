//! People: users who submit and cancel and try again under one request id when they hear nothing, watchers that follow
//! the durable sequence, and operators who enrol, cordon, remove and repair. They know only what they are told.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{Digest, JobId, NodeId, UserName};
use trainyard_common::record::{Record, Target};
use trainyard_common::spec::{Array, JobSpec, Launcher, OnDisconnect};
use trainyard_common::state::NodePolicy;
use trainyard_coordinator_core::effect::Answer;
use trainyard_coordinator_core::event::{Event, RequestKey};

use super::clock::{Micros, ms, secs};
use super::coordinator::Input;
use super::store::Rows;
use super::world::{Happening, World};

/// How long a caller waits for an answer.
const PATIENCE: Micros = secs(10);

/// What somebody asks for.
#[derive(Debug, Clone)]
pub(crate) enum Ask {
    Submit {
        request: u64,
        /// Which of the bodies that use this request id.
        body: u8,
        spec: Box<JobSpec>,
    },
    Cancel {
        job: JobId,
    },
    Policy {
        node: NodeId,
        policy: NodePolicy,
    },
    Remove {
        node: NodeId,
    },
    ConfirmLost {
        node: NodeId,
    },
    Enrol {
        host: usize,
        name: String,
    },
}

/// What a caller hears.
#[derive(Debug)]
pub(crate) enum Said {
    Answer(Result<Answer, Refusal>),
    /// Nobody is there.
    Unreachable,
}

#[derive(Debug)]
struct Call {
    ask: Ask,
    attempt: u64,
    done: bool,
    /// Of somebody who did not look.
    rash: bool,
}

/// Somebody who follows the durable sequence.
#[derive(Debug, Default)]
pub(crate) struct Watcher {
    seen: u64,
    restores: u64,
    over: BTreeSet<JobId>,
}

/// Everybody.
#[derive(Debug)]
pub(crate) struct Users {
    calls: BTreeMap<u64, Call>,
    submitted: u64,
    jobs: Vec<JobId>,
    pub(crate) watchers: Vec<Watcher>,
    /// Jobs that were asked to end because they can never start.
    pub(crate) hopeless: BTreeSet<JobId>,
}

fn user(name: &str) -> UserName {
    name.parse()
        .expect("a constant that follows the rule for names")
}

/// The hash of a submission's body.
pub(crate) fn digest(request: u64, body: u8) -> Digest {
    let mut bytes = [body; 32];
    bytes[..8].copy_from_slice(&request.to_le_bytes());
    Digest(bytes)
}

impl Ask {
    pub(crate) fn event(&self, key: RequestKey) -> Event {
        match self.clone() {
            Self::Submit {
                request,
                body,
                spec,
            } => Event::JobSubmitted {
                key,
                owner: user(if request.is_multiple_of(3) {
                    "alice"
                } else {
                    "bob"
                }),
                request_id: format!("r{request}")
                    .parse()
                    .expect("letters and digits are a request id"),
                request_digest: digest(request, body),
                spec,
                allow_infeasible: true,
            },
            Self::Cancel { job } => Event::CancelRequested {
                key,
                by: user("carol"),
                job,
            },
            Self::Policy { node, policy } => Event::NodePolicySet {
                key,
                node,
                policy,
                by: user("root"),
            },
            Self::Remove { node } => Event::NodeRemoved { key, node },
            Self::ConfirmLost { node } => Event::NodeConfirmedLost { key, node },
            Self::Enrol { name, .. } => Event::LocalNodeAdded {
                key,
                name,
                target: Target::Attached,
                owner: user("root"),
            },
        }
    }
}

impl Users {
    pub(crate) fn new() -> Self {
        Self {
            calls: BTreeMap::new(),
            submitted: 0,
            jobs: Vec::new(),
            watchers: vec![Watcher::default(), Watcher::default()],
            hopeless: BTreeSet::new(),
        }
    }

    pub(crate) fn ask(&self, call: u64) -> Option<Ask> {
        self.calls.get(&call).map(|call| call.ask.clone())
    }

    /// Whether somebody is about to say that nothing on the node lives.
    pub(crate) fn vouches_for(&self, node: NodeId) -> bool {
        self.calls.values().any(|call| {
            let vouched = match call.ask {
                Ask::ConfirmLost { node } | Ask::Remove { node } => Some(node),
                Ask::Submit { .. }
                | Ask::Cancel { .. }
                | Ask::Policy { .. }
                | Ask::Enrol { .. } => None,
            };
            !call.done && !call.rash && vouched == Some(node)
        })
    }

    /// Whether a call is of somebody who did not look.
    pub(crate) fn is_rash(&self, call: u64) -> bool {
        self.calls.get(&call).is_some_and(|call| call.rash)
    }

    pub(crate) fn sets_policies(&self) -> bool {
        let policy = |call: &Call| !call.done && matches!(call.ask, Ask::Policy { .. });
        self.calls.values().any(policy)
    }

    pub(crate) fn waits_for(&self) -> Option<&Ask> {
        let open = self.calls.values().find(|call| !call.done)?;
        Some(&open.ask)
    }

    /// What came after the backup is gone; users are told.
    pub(crate) fn restored(&mut self, rows: &Rows) {
        self.jobs.retain(|job| rows.jobs.contains_key(job));
        self.hopeless.retain(|job| rows.jobs.contains_key(job));
    }
}

impl World {
    // === calls ===

    pub(crate) fn call(&mut self, wait: Micros, ask: Ask) {
        let id = self.next_serial();
        let call = Call {
            ask,
            attempt: 0,
            done: false,
            rash: false,
        };
        self.users.calls.insert(id, call);
        self.after(wait, Happening::CallMade(id));
    }

    /// A call of somebody who did not look whether it is so.
    pub(crate) fn call_rashly(&mut self, ask: Ask) {
        let id = self.next_serial();
        let call = Call {
            ask,
            attempt: 0,
            done: false,
            rash: true,
        };
        self.users.calls.insert(id, call);
        self.after(0, Happening::CallMade(id));
    }

    fn call_takes(&mut self) -> Micros {
        match self.is_scripted() {
            true => self.rng.between(ms(20), ms(400)),
            false => self.rng.skewed(100, ms(500)),
        }
    }

    pub(crate) fn call_made(&mut self, id: u64) {
        let lost = self.goes_wrong(self.swarm.chances.call_lost);
        let wait = self.call_takes();
        let Some(call) = self.users.calls.get_mut(&id) else {
            return;
        };
        if call.done {
            return;
        }
        call.attempt += 1;
        let attempt = call.attempt;
        if let Ask::ConfirmLost { node } | Ask::Remove { node } = call.ask
            && !call.rash
        {
            self.oracle.vouched.insert(node);
        }
        if lost {
            self.see("call lost");
        } else {
            self.after(wait, Happening::CallArrives(id, attempt));
        }
        self.after(PATIENCE, Happening::CallLate(id, attempt));
    }

    pub(crate) fn call_arrives(&mut self, id: u64, attempt: u64) {
        let Some(call) = self.users.calls.get(&id) else {
            return;
        };
        let ask = call.ask.clone();
        if self.coordinator.process.is_none() {
            return self.answer(id, attempt, Said::Unreachable);
        }
        if self.coordinator.disk_full && matches!(ask, Ask::Submit { .. }) {
            self.see("submit refused on a full disk");
            let refusal = Refusal::new(ErrorCode::Exhausted, "DISK_FULL", "the disk is full");
            return self.answer(id, attempt, Said::Answer(Err(refusal)));
        }
        let (call, ask) = (id, Box::new(ask));
        self.give_coordinator(Input::Call { call, attempt, ask });
    }

    pub(crate) fn answer(&mut self, call: u64, attempt: u64, said: Said) {
        if self.goes_wrong(self.swarm.chances.call_lost) {
            return self.see("answer lost");
        }
        let wait = self.call_takes();
        self.after(wait, Happening::CallAnswered(call, attempt, Box::new(said)));
    }

    pub(crate) fn call_answered(&mut self, id: u64, attempt: u64, said: Said) {
        let Some(call) = self.users.calls.get_mut(&id) else {
            return;
        };
        if call.done || call.attempt != attempt {
            return;
        }
        let again = match &said {
            Said::Unreachable => true,
            Said::Answer(Err(refusal)) => matches!(
                refusal.code,
                ErrorCode::Unavailable | ErrorCode::Exhausted | ErrorCode::Internal
            ),
            Said::Answer(Ok(_)) => false,
        };
        if let Said::Answer(Err(refusal)) = &said {
            let text = format!("call {id} is refused: {}", refusal.message);
            self.trace.line(self.now, text);
        }
        if again {
            let wait = self.rng.between(secs(1), secs(8));
            return self.after(wait, Happening::CallMade(id));
        }
        call.done = true;
        let (ask, rash) = (call.ask.clone(), call.rash);
        if let Said::Answer(answer) = said {
            self.heard(ask, rash, answer);
        }
    }

    pub(crate) fn call_late(&mut self, id: u64, attempt: u64) {
        let Some(call) = self.users.calls.get(&id) else {
            return;
        };
        if !call.done && call.attempt == attempt {
            self.see("caller tried again");
            self.call_made(id);
        }
    }

    fn heard(&mut self, ask: Ask, rash: bool, answer: Result<Answer, Refusal>) {
        match (ask, answer) {
            (Ask::Submit { .. }, Ok(Answer::Submitted { job, .. })) => self.submitted(job),
            (Ask::Enrol { host, .. }, Ok(Answer::NodeEnrolled(node))) => {
                self.enrolled(host, node.id);
            }
            (Ask::Remove { node }, Ok(_)) => {
                self.see("node removed");
                self.say(format!("operator removed {node}"));
            }
            (Ask::ConfirmLost { .. }, Ok(_)) => self.see("operator confirmed a loss"),
            (Ask::Policy { .. }, Ok(_)) => self.see("policy set"),
            (Ask::Remove { .. } | Ask::ConfirmLost { .. }, Err(_)) if rash => {
                self.see("operator who did not look refused");
            }
            (ask @ (Ask::Remove { node } | Ask::ConfirmLost { node }), Err(refusal)) => {
                // Copies of a machine are nobody's, and some of them are scrapped by now.
                let mut machines = self.hosts.iter().take(self.swarm.hosts);
                let own = machines.any(|host| host.node == Some(node));
                if !own && refusal.code == ErrorCode::FailedPrecondition {
                    // The machine is no more, so it will be true soon.
                    if let Ask::Remove { node } = ask {
                        self.call(secs(15), Ask::ConfirmLost { node });
                    }
                    self.call(secs(30), ask);
                }
            }
            _ => {}
        }
    }

    // === jobs ===

    pub(crate) fn submit(&mut self) {
        if !self.faults_on() || self.users.submitted >= self.swarm.jobs {
            return;
        }
        self.users.submitted += 1;
        let request = self.users.submitted;
        let spec = Box::new(self.some_spec(request));
        let body = 0;
        let ask = Ask::Submit {
            request,
            body,
            spec: spec.clone(),
        };
        self.call(0, ask.clone());
        if self.rng.chance(60) {
            // The same call from a second place, or another body under the same id.
            let wait = self.rng.between(0, secs(5));
            let body = u8::from(self.rng.chance(500));
            self.call(
                wait,
                Ask::Submit {
                    request,
                    body,
                    spec,
                },
            );
        }
        let gap = self.swarm.submit_gap;
        let wait = match self.rng.chance(200) {
            true => ms(1),
            false => self.rng.below(2 * gap),
        };
        self.after(wait, Happening::Submit);
    }

    fn submitted(&mut self, job: JobId) {
        self.users.jobs.push(job);
        if self.is_scripted() || !self.rng.chance(150) {
            return;
        }
        let wait = self.rng.skewed(ms(1), secs(90));
        self.call(wait, Ask::Cancel { job });
        if self.rng.chance(300) {
            let wait = self.rng.skewed(ms(1), secs(90));
            self.call(wait, Ask::Cancel { job });
        }
    }

    fn some_spec(&mut self, request: u64) -> JobSpec {
        let mut spec = JobSpec::new(format!("r{request}"), vec!["train".to_owned()]);
        let hosts = u64::try_from(self.hosts.len()).unwrap_or(1);
        let rng = &mut self.rng;
        let nodes = match rng.chance(350) {
            true => rng.between(1, hosts.min(5)),
            false => 1,
        };
        spec.nodes = u32::try_from(nodes).unwrap_or(1);
        spec.procs_per_node = u32::try_from(rng.between(1, 3)).unwrap_or(1);
        spec.resources_per_node.cpu_milli = 500 * rng.between(1, 4);
        spec.resources_per_node.gpus = rng.pick(&[0, 0, 0, 1, 1, 2]).unwrap_or(0);
        spec.retries = u32::try_from(rng.below(3)).unwrap_or(0);
        spec.grace = Duration::from_secs(rng.between(1, 20));
        if rng.chance(150) {
            spec.time_limit = Some(Duration::from_secs(rng.between(5, 100)));
        }
        if rng.chance(100) {
            spec.launcher = Launcher::Torchrun;
        }
        if rng.chance(250) {
            spec.on_disconnect = OnDisconnect::Wait;
        } else if rng.chance(330) {
            spec.on_disconnect = OnDisconnect::Stop;
        }
        if rng.chance(150) {
            let first = u32::try_from(rng.below(4)).unwrap_or(0);
            let last = first + u32::try_from(rng.between(1, 8)).unwrap_or(1);
            let max_running = rng.chance(400).then_some(2);
            spec.array = Some(Array {
                first,
                last,
                max_running,
            });
            spec.nodes = 1;
        }
        if rng.chance(250) {
            self.some_array(&mut spec);
        }
        if self.rng.chance(30) {
            spec.resources_per_node.gpus = 100;
        }
        spec
    }

    /// Tasks that may go into bundles, often so quick that some are held ahead.
    fn some_array(&mut self, spec: &mut JobSpec) {
        let rng = &mut self.rng;
        let first = u32::try_from(rng.below(4)).unwrap_or(0);
        let last = first + u32::try_from(rng.skewed(2, 120)).unwrap_or(1);
        let max_running = rng.chance(250).then_some(3);
        spec.array = Some(Array {
            first,
            last,
            max_running,
        });
        spec.nodes = 1;
        spec.procs_per_node = 1;
        spec.launcher = Launcher::None;
        spec.resources_per_node.gpus = 0;
        if rng.chance(700) {
            spec.command = vec!["quick".to_owned()];
        }
        if rng.chance(500) {
            spec.snapshot = Some(Digest([7; 32]));
        }
    }

    // === watchers ===

    pub(crate) fn watcher_looks(&mut self, index: usize) {
        let wait = self.rng.skewed(ms(100), secs(30));
        self.after(wait, Happening::WatcherLooks(index));
        self.check_stopped();
        let Some(process) = &self.coordinator.process else {
            return;
        };
        let published = process.published;
        let watcher = &mut self.users.watchers[index];
        if watcher.restores != self.oracle.restores {
            // A restored state is another history: the watcher is told to read from the start.
            *watcher = Watcher {
                restores: self.oracle.restores,
                ..Watcher::default()
            };
        }
        let seen = watcher.seen;
        if seen > published {
            let what = format!("a watcher saw {seen} and is shown {published}");
            return self.breaks("I17", what);
        }
        let rows = match self.coordinator.store.transitions(seen, published) {
            Ok(rows) => rows,
            Err(bad) => return self.breaks("I17", bad),
        };
        if rows.len() as u64 != published - seen {
            return self.breaks(
                "I17",
                format!("events between {seen} and {published} are missing"),
            );
        }
        let watcher = &mut self.users.watchers[index];
        watcher.seen = published;
        let mut back = None;
        for row in rows {
            if let Record::Job(job) = row {
                if watcher.over.contains(&job.id) {
                    back = Some(job.id);
                }
                if job.state.is_terminal() {
                    watcher.over.insert(job.id);
                }
            }
        }
        if let Some(job) = back {
            self.breaks(
                "I7",
                format!("a watcher saw the end of {job}, and then something else"),
            );
        }
    }

    // === operators ===

    pub(crate) fn enrol(&mut self, host: usize) {
        let name = self.hosts[host].name.clone();
        let wait = self.rng.between(ms(100), secs(2));
        self.call(wait, Ask::Enrol { host, name });
    }

    fn enrolled(&mut self, index: usize, node: NodeId) {
        let host = &mut self.hosts[index];
        if host.node == Some(node) && host.agent.is_some() {
            return;
        }
        if host.node.is_some() && host.node != Some(node) {
            // An answer that comes late; the machine has its identity.
            return;
        }
        if host.boot > 1 || host.refused.is_some() {
            self.see("node enrolled anew");
        }
        self.oracle.vouched.remove(&node);
        self.hosts[index].node = Some(node);
        self.hosts[index].refused = None;
        self.say(format!("host {index} is {node}"));
        self.agent_ends(index, false);
        self.after(ms(200), Happening::AgentStarts(index));
    }

    pub(crate) fn call_operator(&mut self, index: usize) {
        if std::mem::replace(&mut self.hosts[index].operator_called, true) {
            return;
        }
        let wait = self.rng.between(secs(5), secs(60));
        self.after(wait, Happening::OperatorActs(index));
    }

    pub(crate) fn operator_acts(&mut self, index: usize) {
        self.hosts[index].operator_called = false;
        let Some(refused) = self.hosts[index].refused.take() else {
            return;
        };
        match refused.as_str() {
            // A copy is not given an identity of its own, but switched off.
            _ if index >= self.swarm.hosts => {
                self.power_off(index);
                self.hosts[index].scrapped = true;
            }
            "NODE_UNKNOWN" => {
                self.oracle.identities_changed += 1;
                self.hosts[index].node = None;
                self.enrol(index);
            }
            "DUPLICATE_IDENTITY" => self.resolve_duplicate(index),
            other => self.breaks("I22", format!("host {index} is refused for ever: {other}")),
        }
    }

    /// Switches copies of a machine off and starts the agent of the right one until its starts are above the copy's.
    fn resolve_duplicate(&mut self, index: usize) {
        let node = self.hosts[index].node;
        let copies: Vec<usize> = (self.swarm.hosts..self.hosts.len())
            .filter(|copy| self.hosts[*copy].node == node && !self.hosts[*copy].scrapped)
            .collect();
        self.say(format!("operator looks at host {index}, copies {copies:?}"));
        for copy in copies {
            self.see("copy of a machine scrapped");
            self.power_off(copy);
            self.hosts[copy].scrapped = true;
        }
        if index >= self.swarm.hosts {
            return;
        }
        let host = &mut self.hosts[index];
        host.repairs += 1;
        if host.repairs.is_multiple_of(4)
            && let Some(node) = host.node
        {
            // Starting it again does not help, so the machine is emptied and enrolled anew.
            self.see("node given another identity");
            self.power_off(index);
            self.after(secs(5), Happening::PowerOn(index));
            self.call(secs(1), Ask::ConfirmLost { node });
            self.call(secs(20), Ask::Remove { node });
            self.oracle.identities_changed += 1;
            self.hosts[index].node = None;
            self.hosts[index].name.push('y');
            self.hosts[index].refused = Some("NODE_UNKNOWN".to_owned());
            self.call_operator(index);
            return;
        }
        self.agent_ends(index, false);
        self.after(ms(200), Happening::AgentStarts(index));
    }
}
