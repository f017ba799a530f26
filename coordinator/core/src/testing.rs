//! For tests only: a model of the durable store, and an environment with a fake clock that holds the core's effects in
//! a short text form. The effects must be looked at: an environment that is dropped with some left fails its test.

use std::collections::BTreeMap;
use std::time::Duration;

use trainyard_common::bundle::{
    BundlePhase, DesiredBundle, ObservedBundle, ObservedBundlePhase, TaskRange, TaskReport, TaskSet,
};
use trainyard_common::ids::{
    AttemptRef, BundleRef, Digest, Incarnation, JobId, NodeId, TaskIndex, TokenId, UserName,
};
use trainyard_common::inventory::{Gpu, Inventory};
use trainyard_common::member::{
    DesiredMember, DesiredPhase, EndCause, Ending, ObservedMember, ObservedPhase, RankEnd,
};
use trainyard_common::record::{
    AttemptRecord, BundleRecord, JobRecord, NodeRecord, Record, Target, TaskRecord, TokenRecord,
    UserRecord,
};
use trainyard_common::resources::Resources;
use trainyard_common::spec::JobSpec;
use trainyard_common::state::{AttemptState, ExitStatus};
use trainyard_common::time::Timestamp;

use crate::effect::{Answer, Command, Effect};
use crate::event::{Event, Registration, RequestKey, SessionId};
use crate::{Config, Core, Outbox, RememberedRequest, Snapshot};

/// Every row that was made durable.
#[derive(Debug, Clone, Default)]
pub(crate) struct Store {
    pub(crate) jobs: BTreeMap<JobId, JobRecord>,
    pub(crate) tasks: BTreeMap<(JobId, TaskIndex), TaskRecord>,
    pub(crate) attempts: BTreeMap<AttemptRef, AttemptRecord>,
    pub(crate) bundles: BTreeMap<BundleRef, BundleRecord>,
    pub(crate) nodes: BTreeMap<NodeId, NodeRecord>,
    pub(crate) tokens: BTreeMap<TokenId, TokenRecord>,
    pub(crate) users: BTreeMap<UserName, UserRecord>,
    pub(crate) highest_node: u32,
}

impl Store {
    pub(crate) fn apply(&mut self, record: Record) {
        match record {
            Record::Job(job) => drop(self.jobs.insert(job.id, *job)),
            Record::Task(task) => drop(self.tasks.insert((task.job, task.index), *task)),
            Record::Attempt(attempt) => drop(self.attempts.insert(attempt.id, *attempt)),
            Record::Bundle(bundle) => drop(self.bundles.insert(bundle.id, *bundle)),
            Record::BundleRemoved(bundle) => drop(self.bundles.remove(&bundle)),
            Record::Node(node) => {
                self.highest_node = self.highest_node.max(node.id.0);
                self.nodes.insert(node.id, *node);
            }
            Record::NodeRemoved(node) => drop(self.nodes.remove(&node)),
            Record::Token(token) => drop(self.tokens.insert(token.id, *token)),
            Record::User(user) => drop(self.users.insert(user.name.clone(), *user)),
        }
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let live = |job: &JobId| {
            self.jobs
                .get(job)
                .is_some_and(|job| !job.state.is_terminal())
        };
        Snapshot {
            jobs: self
                .jobs
                .values()
                .filter(|job| live(&job.id))
                .cloned()
                .collect(),
            tasks: self
                .tasks
                .values()
                .filter(|task| live(&task.job) && !task.state.is_terminal())
                .cloned()
                .collect(),
            attempts: self
                .attempts
                .values()
                .filter(|attempt| attempt.state != AttemptState::Ended)
                .cloned()
                .collect(),
            bundles: self.bundles.values().cloned().collect(),
            nodes: self.nodes.values().cloned().collect(),
            tokens: self.tokens.values().cloned().collect(),
            users: self.users.values().cloned().collect(),
            requests: self
                .jobs
                .values()
                .map(|job| RememberedRequest {
                    owner: job.owner.clone(),
                    request_id: job.request_id.clone(),
                    digest: job.request_digest,
                    job: job.id,
                    at: job.submitted_at,
                })
                .collect(),
            awaited: std::collections::BTreeSet::new(),
            next_job: JobId(self.jobs.keys().next_back().map_or(1, |id| id.0 + 1)),
            next_node: NodeId(self.highest_node + 1),
            next_token: TokenId(self.tokens.keys().next_back().map_or(1, |id| id.0 + 1)),
        }
    }
}

/// A core under test.
pub(crate) struct TestEnv {
    pub(crate) core: Core,
    pub(crate) config: Config,
    pub(crate) now: Timestamp,
    pub(crate) store: Store,
    /// What the core said since it was last looked at; rows are not in it.
    pub(crate) said: Vec<Effect>,
    /// The rows of that time.
    pub(crate) rows: Vec<Record>,
    next_session: u64,
    next_key: u64,
    sessions: BTreeMap<NodeId, SessionId>,
    incarnations: BTreeMap<NodeId, u64>,
}

impl Drop for TestEnv {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.said.is_empty(), "nobody looked at {:?}", self.words());
        }
    }
}

pub(crate) fn user(name: &str) -> UserName {
    name.parse().unwrap()
}

pub(crate) fn attempt(text: &str) -> AttemptRef {
    text.parse().unwrap()
}

pub(crate) fn job_spec() -> JobSpec {
    JobSpec::new("train", vec!["true".into()])
}

pub(crate) fn gpu_spec(nodes: u32, gpus: u32) -> JobSpec {
    let mut spec = job_spec();
    spec.nodes = nodes;
    spec.resources_per_node.gpus = gpus;
    spec
}

/// A machine with 8 CPUs, 64 GiB and this many GPUs, four to a NUMA node.
pub(crate) fn inventory(name: &str, gpus: u32) -> Inventory {
    Inventory {
        hostname: name.into(),
        gpus: (0..gpus)
            .map(|index| Gpu {
                index,
                uuid: format!("GPU-{name}-{index}"),
                model: "NVIDIA H100 80GB HBM3".into(),
                memory_bytes: 80 << 30,
                numa_node: Some(index / 4),
                healthy: true,
                ..Gpu::default()
            })
            .collect(),
        capacity: Resources {
            cpu_milli: 8000,
            memory_bytes: 64 << 30,
            gpus,
        },
        ..Inventory::default()
    }
}

/// The end of a member whose ranks ended like this, in rank order.
pub(crate) fn ending(cause: EndCause, first_rank: u32, exits: &[ExitStatus]) -> Ending {
    Ending {
        cause,
        message: String::new(),
        started: !exits.is_empty(),
        ranks: (first_rank..)
            .zip(exits)
            .map(|(rank, exit)| RankEnd {
                rank,
                exit: *exit,
                at: Timestamp(5),
                unprompted: true,
                oom_killed: false,
            })
            .collect(),
        ended_at: Timestamp(5),
        outputs: None,
        checkpoint: None,
        warning: String::new(),
    }
}

pub(crate) fn completed(first_rank: u32) -> Ending {
    ending(EndCause::Completed, first_rank, &[ExitStatus::Code(0)])
}

pub(crate) fn stopped(first_rank: u32) -> Ending {
    ending(EndCause::Stopped, first_rank, &[ExitStatus::Signal(15)])
}

impl TestEnv {
    pub(crate) fn new() -> Self {
        Self::with(Config::default())
    }

    pub(crate) fn with(config: Config) -> Self {
        let now = Timestamp(1_000_000);
        Self {
            core: Core::new(config.clone(), Snapshot::default(), now),
            config,
            now,
            store: Store::default(),
            said: Vec::new(),
            rows: Vec::new(),
            next_session: 1,
            next_key: 1,
            sessions: BTreeMap::new(),
            incarnations: BTreeMap::new(),
        }
    }

    fn take(&mut self, mut out: Outbox) {
        let mut spoke = false;
        for effect in out.drain() {
            match effect {
                Effect::Persist(record) => {
                    assert!(!spoke, "a row came after words: {record:?}");
                    self.store.apply(record.clone());
                    self.rows.push(record);
                }
                Effect::Reply(..)
                | Effect::Send(..)
                | Effect::CloseSession(..)
                | Effect::RequestSchedule
                | Effect::Note(..) => {
                    spoke = true;
                    self.said.push(effect);
                }
            }
        }
        self.core.check().unwrap();
        assert_eq!(
            self.live_rows(),
            rows_of(&self.core),
            "what is in memory is not what is on record"
        );
    }

    fn live_rows(&self) -> Rows {
        let snapshot = self.store.snapshot();
        (
            snapshot.jobs,
            snapshot.tasks,
            snapshot.attempts,
            snapshot.bundles,
        )
    }

    pub(crate) fn event(&mut self, event: Event) {
        let mut out = Outbox::new();
        self.core.handle(self.now, event, &mut out);
        self.take(out);
    }

    pub(crate) fn schedule(&mut self) {
        let mut out = Outbox::new();
        self.core.schedule(self.now, &mut out);
        self.take(out);
    }

    /// Lets time pass as a driver does: each timer fires when it is due. Nodes in session send heartbeats.
    pub(crate) fn pass(&mut self, duration: Duration) {
        let end = self.now.after(duration);
        while self.now < end {
            let beat = self.now.after(Duration::from_secs(5)).min(end);
            let due = self.core.next_deadline().unwrap_or(beat);
            self.now = self.now.max(due.min(beat));
            if due <= self.now {
                self.event(Event::TimerFired);
            }
            if self.now == beat {
                for (node, session) in self.sessions.clone() {
                    self.event(Event::HeartbeatReceived { session, node });
                }
            }
        }
    }

    pub(crate) fn key(&mut self) -> RequestKey {
        self.next_key += 1;
        RequestKey(self.next_key - 1)
    }

    /// What the core said since the last look, in short; rows are not in it.
    pub(crate) fn words(&mut self) -> Vec<String> {
        self.rows.clear();
        std::mem::take(&mut self.said)
            .iter()
            .map(|effect| self.word(effect))
            .collect()
    }

    /// The last row of each thing that changed since the last look, in short.
    pub(crate) fn changes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.rows).iter().map(change).collect()
    }

    /// The core said exactly this since the last look.
    #[track_caller]
    pub(crate) fn expect(&mut self, expected: &[&str]) {
        assert_eq!(self.words(), expected);
    }

    /// The core changed exactly these rows and then said exactly this.
    #[track_caller]
    pub(crate) fn expect_all(&mut self, rows: &[&str], words: &[&str]) {
        assert_eq!(self.changes(), rows);
        self.expect(words);
    }

    fn word(&self, effect: &Effect) -> String {
        let node = |session: &SessionId| {
            let known = self.sessions.iter().find(|(_, open)| *open == session);
            known.map_or(format!("s{}", session.0), |(node, _)| node.to_string())
        };
        match effect {
            Effect::Persist(record) => change(record),
            Effect::Reply(_, Ok(answer)) => match answer {
                Answer::Submitted {
                    job,
                    repeated: false,
                } => format!("submitted {job}"),
                Answer::Submitted {
                    job,
                    repeated: true,
                } => format!("submitted {job} before"),
                Answer::Cancelled(job) => format!("cancelled {} {}", job.id, job.state),
                Answer::TokenCreated(token) => format!("token {}", token.id),
                Answer::NodeEnrolled(node) => format!("enrolled {} {}", node.id, node.name),
                Answer::UserEnrolled(user) => format!("enrolled {} {}", user.name, user.role),
                Answer::Done => "done".into(),
            },
            Effect::Reply(_, Err(refusal)) => {
                format!("refused {} {}", refusal.code.as_str(), refusal.reason)
            }
            Effect::Send(session, Command::Welcome { desired, bundles }) => {
                let bundles = bundles.iter().map(desire_bundle);
                let desired: Vec<String> = desired.iter().map(desire).chain(bundles).collect();
                format!("{}: welcome [{}]", node(session), desired.join(", "))
            }
            Effect::Send(session, Command::Desire(member)) => {
                format!("{}: {}", node(session), desire(member))
            }
            Effect::Send(session, Command::Forget(id)) => format!("{}: forget {id}", node(session)),
            Effect::Send(session, Command::DesireBundle(bundle)) => {
                format!("{}: {}", node(session), desire_bundle(bundle))
            }
            Effect::Send(session, Command::ForgetBundle(id)) => {
                format!("{}: forget {id}", node(session))
            }
            Effect::Send(session, Command::Resync(_)) => format!("{}: resync", node(session)),
            Effect::CloseSession(session, refusal) => {
                format!("close s{} {}", session.0, refusal.reason)
            }
            Effect::RequestSchedule => "schedule".into(),
            Effect::Note(urgency, _, reason) => format!("note {urgency:?} {}", reason.code),
        }
    }

    /// Enrols and registers a node with this many GPUs; its name is `m` and its number.
    pub(crate) fn node(&mut self, gpus: u32) -> NodeId {
        let id = self.enrol();
        self.register(id, gpus, vec![]);
        self.words();
        id
    }

    pub(crate) fn enrol(&mut self) -> NodeId {
        let (key, name) = (self.key(), format!("m{}", self.store.highest_node + 1));
        self.event(Event::LocalNodeAdded {
            key,
            name,
            target: Target::Attached,
            owner: user("root"),
        });
        self.words();
        NodeId(self.store.highest_node)
    }

    pub(crate) fn registration(
        &mut self,
        node: NodeId,
        gpus: u32,
        observed: Vec<ObservedMember>,
    ) -> Registration {
        let session = SessionId(self.next_session);
        self.next_session += 1;
        let incarnation = Incarnation(*self.incarnations.entry(node).or_insert(1));
        Registration {
            session,
            node,
            incarnation,
            opening: 0,
            boot_id: "boot-1".into(),
            agent_version: "1".into(),
            last_words: String::new(),
            address: format!("10.0.0.{}", node.0),
            inventory: inventory(&format!("m{}", node.0), gpus),
            observed,
            bundles: Vec::new(),
        }
    }

    /// Registers a node without members and with these bundles.
    pub(crate) fn register_bundles(&mut self, node: u32, bundles: Vec<ObservedBundle>) {
        let mut registration = self.registration(NodeId(node), 0, vec![]);
        registration.bundles = bundles;
        self.register_with(registration);
    }

    /// The node reports of a bundle that runs, from this report on.
    pub(crate) fn tasks(&mut self, node: u32, id: &str, first: u64, reports: Vec<TaskReport>) {
        self.bundle(
            node,
            observed(id, ObservedBundlePhase::Running, first, reports),
        );
    }

    pub(crate) fn bundle(&mut self, node: u32, bundle: ObservedBundle) {
        let node = NodeId(node);
        let session = self.sessions[&node];
        self.event(Event::BundleObserved {
            session,
            node,
            bundle,
        });
    }

    pub(crate) fn register_with(&mut self, registration: Registration) {
        self.sessions
            .insert(registration.node, registration.session);
        self.event(Event::AgentRegistered(Box::new(registration)));
    }

    pub(crate) fn register(&mut self, node: NodeId, gpus: u32, observed: Vec<ObservedMember>) {
        let registration = self.registration(node, gpus, observed);
        self.register_with(registration);
    }

    pub(crate) fn session(&self, node: NodeId) -> SessionId {
        self.sessions[&node]
    }

    /// The node's connection breaks.
    pub(crate) fn cut(&mut self, node: NodeId) {
        if let Some(session) = self.sessions.remove(&node) {
            self.event(Event::SessionEnded { session, node });
        }
    }

    /// A node's heartbeats are lost from now on, and its session stays open.
    pub(crate) fn silence(&mut self, node: NodeId) {
        self.sessions.remove(&node);
    }

    pub(crate) fn submit(&mut self, owner: &str, request: &str, spec: JobSpec) {
        let key = self.key();
        self.event(Event::JobSubmitted {
            key,
            owner: user(owner),
            request_id: request.parse().unwrap(),
            request_digest: Digest([u8::try_from(spec.nodes % 250).unwrap(); 32]),
            spec: Box::new(spec),
            allow_infeasible: false,
        });
    }

    /// Submits a job that may not fit on any node.
    pub(crate) fn submit_anyway(&mut self, request: &str, spec: JobSpec) {
        let key = self.key();
        self.event(Event::JobSubmitted {
            key,
            owner: user("alice"),
            request_id: request.parse().unwrap(),
            request_digest: Digest([1; 32]),
            spec: Box::new(spec),
            allow_infeasible: true,
        });
    }

    /// Submits a job and runs a round; says nothing of it.
    pub(crate) fn start(&mut self, spec: JobSpec) -> JobId {
        let request = format!("r{}", self.store.jobs.len() + 1);
        self.submit("alice", &request, spec);
        self.schedule();
        self.words();
        *self.store.jobs.keys().next_back().unwrap()
    }

    pub(crate) fn cancel(&mut self, job: u64) {
        let key = self.key();
        self.event(Event::CancelRequested {
            key,
            by: user("bob"),
            job: JobId(job),
        });
    }

    pub(crate) fn report(&mut self, node: u32, id: &str, node_rank: u32, phase: ObservedPhase) {
        let node = NodeId(node);
        let session = self.sessions[&node];
        let member = ObservedMember {
            attempt: attempt(id),
            node_rank,
            phase,
        };
        self.event(Event::MemberObserved {
            session,
            node,
            member,
        });
    }

    /// Brings the members on these nodes, in rank order, to `RUNNING`; says nothing of it.
    pub(crate) fn run(&mut self, id: &str, nodes: &[u32]) {
        for (rank, node) in (0..).zip(nodes) {
            self.report(*node, id, rank, ObservedPhase::Ready { port: 4000 });
        }
        for (rank, node) in (0..).zip(nodes) {
            self.report(
                *node,
                id,
                rank,
                ObservedPhase::Running {
                    started_at: self.now,
                },
            );
        }
        self.words();
    }

    /// The coordinator crashes and starts again from its rows; every session is gone.
    pub(crate) fn restart(&mut self) {
        self.sessions.clear();
        self.core = Core::new(self.config.clone(), self.store.snapshot(), self.now);
        self.core.check().unwrap();
    }

    /// The newest row of a job: state, reason, sentence.
    pub(crate) fn job(&self, id: u64) -> String {
        let job = &self.store.jobs[&JobId(id)];
        format!("{} {}: {}", job.state, job.reason.code, job.reason.message)
    }
}

type Rows = (
    Vec<JobRecord>,
    Vec<TaskRecord>,
    Vec<AttemptRecord>,
    Vec<BundleRecord>,
);

pub(crate) fn rows_of(core: &Core) -> Rows {
    (
        core.t.jobs.values().cloned().collect(),
        core.t.tasks.values().cloned().collect(),
        core.t.attempts.values().cloned().collect(),
        core.t.bundles.values().cloned().collect(),
    )
}

fn desire(member: &DesiredMember) -> String {
    let id = member.attempt;
    match &member.phase {
        DesiredPhase::Prepare => format!("prepare {id}"),
        DesiredPhase::Start => format!("start {id}"),
        DesiredPhase::Run(go) => format!("run {id} at {}:{}", go.master_addr, go.master_port),
        DesiredPhase::Stop(stop) => format!("stop {id} {}", stop.code),
    }
}

/// `run j1.b1 x2 [0-3] 0 spec`: phase, bundle, slots, tasks, recorded, and whether the specification is with it.
fn desire_bundle(bundle: &DesiredBundle) -> String {
    let phase = match bundle.phase {
        BundlePhase::Run => "run".to_owned(),
        BundlePhase::Close => "close".to_owned(),
        BundlePhase::Stop(stop) => format!("stop {}", stop.code),
    };
    let spec = if bundle.spec.is_some() { " spec" } else { "" };
    let (id, slots, tasks) = (bundle.bundle, bundle.slots, ranges(&bundle.tasks));
    format!("{phase} {id} x{slots} [{tasks}] {}{spec}", bundle.recorded)
}

fn ranges(tasks: &TaskSet) -> String {
    let ranges: Vec<String> = tasks
        .ranges()
        .iter()
        .map(|TaskRange { first, last }| match first == last {
            true => first.to_string(),
            false => format!("{first}-{last}"),
        })
        .collect();
    ranges.join(",")
}

pub(crate) fn observed(
    id: &str,
    phase: ObservedBundlePhase,
    first: u64,
    reports: Vec<TaskReport>,
) -> ObservedBundle {
    ObservedBundle {
        bundle: id.parse().unwrap(),
        phase,
        first,
        reports,
    }
}

/// A task started at this time.
pub(crate) fn started(task: u32, at: Timestamp) -> TaskReport {
    TaskReport::Started {
        task: TaskIndex(task),
        at,
    }
}

/// A task that ran so long ended like this at `now`.
pub(crate) fn ended(now: Timestamp, task: u32, ran_ms: u64, mut ending: Ending) -> TaskReport {
    ending.ended_at = now;
    TaskReport::Ended {
        task: TaskIndex(task),
        started_at: ending.started.then(|| Timestamp(now.0 - ran_ms)),
        ending: Box::new(ending),
    }
}

pub(crate) fn returned(first: u32, last: u32) -> TaskReport {
    TaskReport::Returned(TaskRange {
        first: TaskIndex(first),
        last: TaskIndex(last),
    })
}

fn change(record: &Record) -> String {
    match record {
        Record::Bundle(bundle) => format!(
            "{} {} {} [{}] {}",
            bundle.id,
            bundle.state,
            bundle.node,
            ranges(&bundle.tasks),
            bundle.recorded
        ),
        Record::BundleRemoved(bundle) => format!("{bundle} removed"),
        Record::Job(job) => format!("{} {} {}", job.id, job.state, job.reason.code),
        Record::Task(task) => format!(
            "{}.{} {} {}",
            task.job, task.index, task.state, task.reason.code
        ),
        Record::Attempt(attempt) => {
            let members: Vec<String> = attempt
                .members
                .iter()
                .map(|member| format!("{} {}", member.node, member.phase))
                .collect();
            format!("{} {} [{}]", attempt.id, attempt.state, members.join(", "))
        }
        Record::Node(node) => format!(
            "{} {} {} {}",
            node.id, node.availability, node.policy, node.reason.code
        ),
        Record::NodeRemoved(node) => format!("{node} removed"),
        Record::Token(token) => format!(
            "{} uses {} revoked {}",
            token.id, token.uses_left, token.revoked
        ),
        Record::User(user) => format!("{} {}", user.name, user.role),
    }
}
