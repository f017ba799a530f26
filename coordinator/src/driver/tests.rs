//! The order of the driver: nothing is told before it is durable, and a failed commit ends everything.

use std::future::Future;
use std::sync::{Condvar, Mutex};

use trainyard_common::bundle::{ObservedBundle, ObservedBundlePhase};
use trainyard_common::error::ErrorCode;
use trainyard_common::ids::{
    AttemptRef, ClusterId, Digest, Incarnation, JobId, NodeId, Sequence, UserName,
};
use trainyard_common::inventory::Inventory;
use trainyard_common::member::{EndCause, Ending, ObservedMember, ObservedPhase};
use trainyard_common::record::{AttemptRecord, JobRecord, Record, Role, Target};
use trainyard_common::resources::Resources;
use trainyard_common::spec::JobSpec;

use super::*;
use crate::store::{CheckReport, JobHistory, MemStore, Transition};
use crate::testing::CLUSTER;

/// A store whose commits wait until they are let through.
struct Gated {
    reconciled: Mutex<bool>,
    noted: Condvar,
    inner: MemStore,
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gated {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            reconciled: Mutex::new(false),
            noted: Condvar::new(),
            inner: MemStore::new(CLUSTER),
            open: Mutex::new(true),
            changed: Condvar::new(),
        })
    }

    fn set_open(&self, open: bool) {
        *self.open.lock().unwrap() = open;
        self.changed.notify_all();
    }
}

impl Store for Gated {
    fn cluster(&self) -> ClusterId {
        self.inner.cluster()
    }
    fn lead(&self) -> Result<Term, StoreError> {
        self.inner.lead()
    }
    fn commit(
        &self,
        term: Term,
        at: Timestamp,
        records: &[Record],
    ) -> Result<Sequence, StoreError> {
        let open = self.open.lock().unwrap();
        drop(self.changed.wait_while(open, |open| !*open).unwrap());
        self.inner.commit(term, at, records)
    }
    fn reconciled(&self) -> Result<(), StoreError> {
        *self.reconciled.lock().unwrap() = true;
        self.noted.notify_all();
        Ok(())
    }
    fn load(&self, now: Timestamp, since: Timestamp) -> Result<Loaded, StoreError> {
        self.inner.load(now, since)
    }
    fn job(&self, job: JobId) -> Result<Option<JobHistory>, StoreError> {
        self.inner.job(job)
    }
    fn attempt(&self, attempt: AttemptRef) -> Result<Option<AttemptRecord>, StoreError> {
        self.inner.attempt(attempt)
    }
    fn jobs(&self, before: JobId, limit: usize) -> Result<Vec<JobRecord>, StoreError> {
        self.inner.jobs(before, limit)
    }
    fn transitions(&self, after: Sequence, limit: usize) -> Result<Vec<Transition>, StoreError> {
        self.inner.transitions(after, limit)
    }
    fn check(&self) -> Result<CheckReport, StoreError> {
        self.inner.check()
    }
}

fn ended() -> Ending {
    Ending {
        cause: EndCause::Completed,
        message: String::new(),
        started: true,
        ranks: Vec::new(),
        ended_at: Timestamp(1),
        outputs: None,
        checkpoint: None,
        warning: String::new(),
    }
}

struct Bench {
    store: Arc<Gated>,
    read: Arc<ReadModel>,
    driver: Driver,
    task: AbortOnDrop<Result<(), FatalError>>,
    stop: CancellationToken,
}

fn parts(store: Arc<Gated>) -> Parts {
    let term = store.lead().unwrap();
    let clock = Clock::start();
    let loaded = store.load(clock.now(), Timestamp(0)).unwrap();
    let read = Arc::new(ReadModel::new(&loaded));
    let (core, stop) = (CoreConfig::default(), CancellationToken::new());
    Parts {
        store,
        term,
        loaded,
        read,
        clock,
        core,
        stop,
    }
}

impl Bench {
    async fn start() -> Self {
        let store = Gated::new();
        let parts = parts(store.clone());
        let (read, stop) = (parts.read.clone(), parts.stop.clone());
        let (driver, task) = start(parts);
        let bench = Self {
            store,
            read,
            driver,
            task,
            stop,
        };
        let name = bench.anna();
        let added = bench.driver.request(|key| Event::LocalUserAdded {
            key,
            name,
            role: Role::Admin,
        });
        added.await.unwrap();
        bench
    }

    fn anna(&self) -> UserName {
        "anna".parse().unwrap()
    }

    async fn submit(&self, id: usize) -> Result<Answer, Refusal> {
        let mut spec = JobSpec::new("train", vec!["true".to_owned()]);
        spec.resources_per_node = Resources {
            cpu_milli: 1,
            memory_bytes: 0,
            gpus: 0,
        };
        let owner = self.anna();
        self.driver
            .request(|key| Event::JobSubmitted {
                key,
                owner,
                request_id: format!("r{id}").parse().unwrap(),
                request_digest: Digest([0; 32]),
                spec: Box::new(spec),
                allow_infeasible: true,
            })
            .await
    }

    async fn add_node(&self) -> NodeId {
        let (name, owner, target) = ("here".to_owned(), self.anna(), Target::Local);
        let added = self.driver.request(|key| Event::LocalNodeAdded {
            key,
            name,
            target,
            owner,
        });
        match added.await.unwrap() {
            Answer::NodeEnrolled(node) => node.id,
            other => panic!("{other:?}"),
        }
    }

    async fn open_session(&self, node: NodeId) -> handle::OpenSession {
        self.open_session_with(node, Vec::new(), Vec::new()).await
    }

    async fn open_session_with(
        &self,
        node: NodeId,
        observed: Vec<ObservedMember>,
        bundles: Vec<ObservedBundle>,
    ) -> handle::OpenSession {
        let capacity = Resources {
            cpu_milli: 1_000_000,
            memory_bytes: 1 << 40,
            gpus: 0,
        };
        self.driver
            .open_session(|session| Registration {
                session,
                node,
                incarnation: Incarnation(1),
                opening: 0,
                boot_id: "b".to_owned(),
                agent_version: "0".to_owned(),
                last_words: String::new(),
                address: "127.0.0.1".to_owned(),
                inventory: Inventory {
                    capacity,
                    ..Inventory::default()
                },
                observed,
                bundles,
            })
            .await
            .unwrap()
    }

    /// Lets every round that can run do so: a request that changes nothing goes through after what was sent before.
    async fn settle(&self) {
        let job = JobId(999);
        let by = self.anna();
        let unknown = self
            .driver
            .request(|key| Event::CancelRequested { key, by, job })
            .await;
        assert_eq!(unknown.unwrap_err().code, ErrorCode::NotFound);
    }
}

async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(Duration::from_secs(20), future).await {
        Ok(output) => output,
        Err(_) => panic!("waited 20 s for {what}"),
    }
}

#[tokio::test]
async fn nobody_is_told_before_the_row_is_durable() {
    let bench = Bench::start().await;
    let node = bench.add_node().await;
    let mut session = bench.open_session(node).await;
    let welcome = soon("the welcome", session.commands.recv()).await;
    assert!(matches!(
        welcome,
        Some(SessionMessage::Command(Command::Welcome { .. }))
    ));
    bench.store.set_open(false);
    let mut answer = std::pin::pin!(bench.submit(1));
    // The driver is inside its commit now or will be; neither answer, nor command, nor row may show.
    let early = tokio::time::timeout(Duration::from_millis(200), &mut answer).await;
    assert!(early.is_err(), "answered before the commit: {early:?}");
    assert!(session.commands.try_recv().is_err());
    assert!(bench.read.tables().jobs.is_empty());
    bench.store.set_open(true);
    let answer = soon("the answer", answer).await.unwrap();
    assert_eq!(
        answer,
        Answer::Submitted {
            job: JobId(1),
            repeated: false
        }
    );
    assert!(
        bench.read.tables().jobs.contains_key(&JobId(1)),
        "answered before it is shown"
    );
    let command = soon("the command", session.commands.recv()).await;
    let Some(SessionMessage::Command(Command::Desire(member))) = command else {
        panic!("{command:?}")
    };
    let stored = bench.store.attempt(member.attempt).unwrap();
    assert!(
        stored.is_some(),
        "an agent was told of an attempt that is not on disk"
    );
}

#[tokio::test]
async fn a_failed_commit_ends_the_driver_and_answers_nobody_with_success() {
    let mut bench = Bench::start().await;
    bench.store.inner.fail_after(0);
    let refused = soon("the answer", bench.submit(1)).await.unwrap_err();
    assert_eq!(
        (refused.code, refused.reason.as_str()),
        (ErrorCode::Unavailable, "STOPPING")
    );
    let ended = soon("the driver's end", &mut bench.task.0).await.unwrap();
    assert!(
        matches!(ended, Err(FatalError::Store(StoreError::Injected))),
        "{ended:?}"
    );
    assert!(bench.read.tables().jobs.is_empty());
    assert_eq!(
        soon("a later request", bench.submit(2))
            .await
            .unwrap_err()
            .code,
        ErrorCode::Unavailable
    );
}

#[tokio::test]
async fn a_session_that_does_not_keep_up_is_cut_off_and_holds_up_nobody() {
    let bench = Bench::start().await;
    let node = bench.add_node().await;
    let mut session = bench.open_session(node).await;
    for id in 0..SESSION_QUEUE + 50 {
        soon("a submit", bench.submit(id)).await.unwrap();
    }
    // All are placed in the end, although nobody reads the commands.
    let mut changes = bench.read.watch();
    soon(
        "all to be placed",
        changes.wait_for(|_| bench.read.tables().attempts.len() == SESSION_QUEUE + 50),
    )
    .await
    .unwrap();
    bench.settle().await;
    let mut told = 0;
    while let Some(message) = soon("the end of the session", session.commands.recv()).await {
        assert!(matches!(message, SessionMessage::Command(_)));
        told += 1;
    }
    assert_eq!(
        told, SESSION_QUEUE,
        "the queue's bound is not what was kept"
    );
}

/// A node with more than a queue full of each that ended long ago, as after an outage of ours.
#[tokio::test]
async fn ended_members_and_bundles_of_a_node_that_comes_back_do_not_cut_it_off() {
    let bench = Bench::start().await;
    let node = bench.add_node().await;
    // The next job gets a higher number, so that attempts of the first one are known to be over.
    soon("a submit", bench.submit(0)).await.unwrap();
    let many = 1..=u32::try_from(SESSION_QUEUE).unwrap() + 50;
    let members = many.clone().map(|task| ObservedMember {
        attempt: format!("j1.{task}.1").parse().unwrap(),
        node_rank: 0,
        phase: ObservedPhase::Ended(ended()),
    });
    let bundles = many.map(|bundle| ObservedBundle {
        bundle: format!("j1.b{bundle}").parse().unwrap(),
        first: 0,
        reports: Vec::new(),
        phase: ObservedBundlePhase::Ended {
            total: 0,
            message: String::new(),
        },
    });
    let opened = bench.open_session_with(node, members.collect(), bundles.collect());
    let mut session = soon("the session", opened).await;
    // And what matters still finds room before the agent has read anything.
    for id in 1..=SESSION_QUEUE / 4 {
        soon("a submit", bench.submit(id)).await.unwrap();
    }
    let mut changes = bench.read.watch();
    soon(
        "all to be placed",
        changes.wait_for(|_| bench.read.tables().attempts.len() == SESSION_QUEUE / 4 + 1),
    )
    .await
    .unwrap();
    bench.settle().await;
    let (mut forgotten, mut desired) = (0, 0);
    while desired <= SESSION_QUEUE / 4 {
        match soon("a command", session.commands.recv()).await {
            Some(SessionMessage::Command(Command::Welcome { .. })) => {}
            Some(SessionMessage::Command(Command::Forget(_) | Command::ForgetBundle(_))) => {
                forgotten += 1;
            }
            Some(SessionMessage::Command(Command::Desire(_))) => desired += 1,
            other => panic!("cut off: {other:?}"),
        }
    }
    assert!(forgotten > SESSION_QUEUE / 4, "only {forgotten} forgotten");
}

#[tokio::test]
async fn what_was_taken_in_before_the_end_is_carried_out() {
    let mut bench = Bench::start().await;
    bench.store.set_open(false);
    let driver = bench.driver.clone();
    let name: UserName = "bert".parse().unwrap();
    let request = spawn("request", async move {
        driver
            .request(|key| Event::LocalUserAdded {
                key,
                name,
                role: Role::User,
            })
            .await
    });
    // Let the request reach the driver's queue before the end is asked for.
    while !request.is_finished() && bench.driver_is_idle() {
        tokio::task::yield_now().await;
    }
    bench.stop.cancel();
    bench.store.set_open(true);
    soon("the answer", request).await.unwrap().unwrap();
    soon("the driver's end", &mut bench.task.0)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(bench.read.tables().users.len(), 2);
}

impl Bench {
    /// Whether nothing is with the driver: it is not inside a commit and nothing waits.
    fn driver_is_idle(&self) -> bool {
        self.driver.requests_begun() < 2
    }
}

#[test]
fn after_a_pause_of_ours_timers_wait_for_what_the_agents_sent() {
    let mut state = State::new(parts(Gated::new()));
    let start = state.last_look;
    let woken = start.after(Duration::from_secs(600));
    assert!(
        state.look_at_clock(start.after(TICK)),
        "an ordinary tick is no pause"
    );
    assert!(!state.look_at_clock(woken));
    assert!(!state.look_at_clock(woken.after(TICK)));
    let mut now = woken;
    while now < woken.after(state.grace) {
        now = now.after(TICK);
        state.look_at_clock(now);
    }
    assert!(
        state.look_at_clock(now.after(TICK)),
        "timers never fire again"
    );
}

#[tokio::test]
async fn a_restored_state_is_noted_as_reconciled_once_its_nodes_were_heard_of() {
    let before = Bench::start().await;
    let node = before.add_node().await;
    drop(soon("the session", before.open_session(node)).await);
    before.settle().await;
    before.stop.cancel();
    let Bench { store, task, .. } = before;
    drop(task);
    let mut parts = parts(store.clone());
    parts.loaded.snapshot.awaited = [node].into();
    let (read, stop) = (parts.read.clone(), parts.stop.clone());
    let (driver, task) = start(parts);
    let bench = Bench {
        store,
        read,
        driver,
        task,
        stop,
    };
    soon("a submit", bench.submit(1)).await.unwrap();
    bench.settle().await;
    assert!(bench.read.tables().attempts.is_empty(), "placed too early");
    assert!(!*bench.store.reconciled.lock().unwrap());
    let mut changes = bench.read.watch();
    let _session = soon("the session", bench.open_session(node)).await;
    soon(
        "the job to be placed",
        changes.wait_for(|_| bench.read.tables().attempts.len() == 1),
    )
    .await
    .unwrap();
    let store = bench.store.clone();
    let noted = blocking(move || {
        let noted = store.reconciled.lock().unwrap();
        let limit = Duration::from_secs(20);
        let waited = store
            .noted
            .wait_timeout_while(noted, limit, |noted| !*noted);
        *waited.unwrap().0
    });
    assert!(noted.await, "not noted within 20 s");
}
