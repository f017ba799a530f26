//! The one task that owns the core: brings it every fact and has its requests carried out.
//!
//! Requests about one attempt are carried out one after the other in the order made, those about different attempts side
//! by side, and their results come back as facts. The driver itself never waits for any of them. What is durable is what
//! the runtime keeps in the attempts' directories, and each fact about that comes after it is on disk.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use trainyard_agent_core::{
    BundleEvent, Config as CoreConfig, Core, Effect, Event, Outbox, RuntimeState,
};
use trainyard_common::ids::AttemptRef;
use trainyard_common::inventory::Inventory;
use trainyard_common::member::{DesiredMember, Go, MemberSpec, Stop};
use trainyard_common::time::Timestamp;

use crate::bundles::Bundles;
use crate::chain::chain;
use crate::fetch::Fetcher;
use crate::logs::Logs;
use crate::outgoing::Outgoing;
use crate::probe::usable_gpus;
use crate::runtime::{Runtime, RuntimeError, RuntimeEvent, ShimState};
use crate::session::SessionEvent;
use crate::state::History;
use crate::uploads::Uploader;
use trainyard_transport::clock::Clock;
use trainyard_transport::task::{blocking, spawn};

/// Short requests to the runtime at a time; each waits for the disk once or twice.
const PARALLEL: usize = 32;
/// How long requests to the runtime may take to finish when the agent leaves; they are short.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the driver ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    Asked,
    Orphaned,
}

/// What the driver works with.
pub(crate) struct Driver {
    pub(crate) core: Core,
    pub(crate) clock: Clock,
    pub(crate) hands: Hands,
    pub(crate) outgoing: Arc<Outgoing>,
    pub(crate) runtime_events: mpsc::Receiver<RuntimeEvent>,
    pub(crate) session_events: mpsc::Receiver<SessionEvent>,
    pub(crate) leave_when_orphaned: Option<Duration>,
    pub(crate) inventory: Inventory,
    pub(crate) lanes: Lanes,
    pub(crate) bundles: Bundles,
    /// Present while something of before the records were lost may be taken for new.
    pub(crate) history: Option<History>,
}

/// Those who carry requests out.
#[derive(Debug, Clone)]
pub(crate) struct Hands {
    pub(crate) runtime: Runtime,
    pub(crate) fetcher: Fetcher,
    pub(crate) uploader: Uploader,
    pub(crate) logs: Logs,
}

/// Requests under way and in line.
#[derive(Debug)]
pub(crate) struct Lanes {
    running: JoinSet<Done>,
    /// What has to wait for an earlier request about the same attempt; an entry without any means that one is running.
    lines: BTreeMap<AttemptRef, VecDeque<Task>>,
    /// Fetches that can be cancelled.
    fetches: BTreeMap<AttemptRef, CancellationToken>,
    slots: Arc<Semaphore>,
}

/// A request with all that it needs.
#[derive(Debug)]
enum Task {
    Accept(Box<DesiredMember>),
    Fetch(Box<MemberSpec>, CancellationToken),
    SpawnShim,
    Go(Go, Option<String>),
    Stop(Stop),
    Upload { started: bool },
    Remove,
}

/// A request that was carried out, and what came of it.
#[derive(Debug)]
struct Done {
    attempt: AttemptRef,
    event: Option<Event>,
}

impl Lanes {
    pub(crate) fn new() -> Self {
        Self {
            running: JoinSet::new(),
            lines: BTreeMap::new(),
            fetches: BTreeMap::new(),
            slots: Arc::new(Semaphore::new(PARALLEL)),
        }
    }

    fn add(&mut self, hands: &Hands, attempt: AttemptRef, task: Task) {
        match self.lines.get_mut(&attempt) {
            // Bounded by the core, which asks for one thing at a time of each kind.
            Some(line) => line.push_back(task),
            None => {
                self.lines.insert(attempt, VecDeque::new());
                self.start(hands, attempt, task);
            }
        }
    }

    fn start(&mut self, hands: &Hands, attempt: AttemptRef, task: Task) {
        let (hands, slots) = (hands.clone(), self.slots.clone());
        let span = tracing::info_span!("attempt", %attempt);
        let work = async move {
            let event = hands.carry_out(attempt, task, slots).await;
            Done { attempt, event }
        };
        self.running.spawn(work.instrument(span));
    }

    /// The next in line may start.
    fn next(&mut self, hands: &Hands, attempt: AttemptRef) {
        match self.lines.get_mut(&attempt).and_then(VecDeque::pop_front) {
            Some(task) => self.start(hands, attempt, task),
            None => drop(self.lines.remove(&attempt)),
        }
    }

    fn cancel_fetch(&self, attempt: AttemptRef) {
        if let Some(fetch) = self.fetches.get(&attempt) {
            fetch.cancel();
        }
    }
}

impl Hands {
    async fn carry_out(
        self,
        attempt: AttemptRef,
        task: Task,
        slots: Arc<Semaphore>,
    ) -> Option<Event> {
        match task {
            Task::Fetch(spec, cancel) => {
                let dir = self.runtime.dir(attempt);
                Some(match self.fetcher.fetch(dir, spec, cancel).await {
                    Ok(()) => Event::FetchFinished(attempt),
                    Err((error, fault)) => Event::FetchFailed {
                        attempt,
                        error,
                        fault,
                    },
                })
            }
            Task::Upload { started } => {
                let dir = self.runtime.dir(attempt);
                Some(match self.uploader.upload(dir, started).await {
                    Ok(uploaded) => Event::UploadFinished { attempt, uploaded },
                    Err(error) => Event::UploadFailed {
                        attempt,
                        error: chain(&error),
                    },
                })
            }
            Task::Accept(_) | Task::SpawnShim | Task::Go(..) | Task::Stop(_) | Task::Remove => {
                let _slot = slots.acquire_owned().await;
                self.tell_runtime(attempt, task).await
            }
        }
    }

    async fn tell_runtime(self, attempt: AttemptRef, task: Task) -> Option<Event> {
        let runtime = self.runtime;
        match task {
            Task::Accept(member) => Some(match runtime.accept(&member).await {
                Ok(_) => Event::Accepted(attempt),
                Err(error) => Event::AcceptFailed {
                    attempt,
                    exists: matches!(error, RuntimeError::AlreadyAccepted(_)),
                    error: chain(&error),
                },
            }),
            Task::SpawnShim => failed(runtime.spawn_shim(attempt).await, |error| {
                Event::SpawnFailed { attempt, error }
            }),
            Task::Go(go, interface) => failed(
                runtime.go(attempt, &go, interface.as_deref()).await,
                |error| Event::GoFailed { attempt, error },
            ),
            Task::Stop(stop) => failed(runtime.stop(attempt, &stop).await, |error| {
                Event::StopFailed { attempt, error }
            }),
            Task::Remove => Some(match runtime.remove(attempt).await {
                Ok(()) => Event::Removed(attempt),
                Err(error) => Event::RemoveFailed {
                    attempt,
                    error: chain(&error),
                },
            }),
            // Carried out by others.
            Task::Fetch(..) | Task::Upload { .. } => None,
        }
    }
}

fn failed(result: Result<(), RuntimeError>, event: impl FnOnce(String) -> Event) -> Option<Event> {
    result.err().map(|error| event(chain(&error)))
}

impl Driver {
    /// Works until `leave` is done or the agent is an orphan. Members live on.
    ///
    /// # Errors
    /// A request panicked. Nothing is lost by starting the agent again.
    pub(crate) async fn run(mut self, leave: impl Future<Output = ()>) -> Result<Left, JoinError> {
        tokio::pin!(leave);
        let mut alone_since = Some(self.clock.now());
        loop {
            let now = self.clock.now();
            let orphaned_at = self.orphaned_at(alone_since);
            if orphaned_at.is_some_and(|at| at <= now) {
                return Ok(Left::Orphaned);
            }
            let deadline = [self.core.next_deadline(), orphaned_at]
                .into_iter()
                .flatten()
                .min();
            tokio::select! {
                biased;
                // Cancel-safe: polled by reference.
                () = &mut leave => return self.finish().await,
                // Cancel-safe: a result is taken whole or stays.
                Some(done) = self.lanes.running.join_next() => {
                    let Done { attempt, event } = done?;
                    if let Some(event) = event {
                        self.tell(event);
                    }
                    self.lanes.next(&self.hands, attempt);
                }
                // Cancel-safe: an event is taken whole or stays. Both senders live as long as this.
                Some(event) = self.runtime_events.recv() => self.on_runtime(event),
                // Cancel-safe, as it says.
                event = self.bundles.next() => {
                    if let Some(event) = event? {
                        self.tell(Event::Bundle(event));
                    }
                }
                Some(event) = self.session_events.recv() => {
                    match &event {
                        SessionEvent::Open(..) => alone_since = None,
                        SessionEvent::Closed => alone_since = Some(self.clock.now()),
                        SessionEvent::Opening { .. }
                        | SessionEvent::Desired(_)
                        | SessionEvent::Forget(_)
                        | SessionEvent::DesiredBundle(_)
                        | SessionEvent::ForgetBundle(_) => {}
                    }
                    self.on_session(event);
                }
                // Cancel-safe: only waits.
                () = at(deadline, now), if deadline.is_some() => self.tell(Event::TimerFired),
            }
        }
    }

    /// When the agent is an orphan, if nothing changes.
    fn orphaned_at(&self, alone_since: Option<Timestamp>) -> Option<Timestamp> {
        let patience = self.leave_when_orphaned?;
        if self.core.has_live_members() {
            return None;
        }
        Some(alone_since?.after(patience))
    }

    /// Lets what was begun in the runtime come to its end; fetches and uploads begin again at the next start.
    async fn finish(self) -> Result<Left, JoinError> {
        self.lanes
            .fetches
            .values()
            .for_each(CancellationToken::cancel);
        let busy = self.lanes.slots.clone();
        let all = u32::try_from(PARALLEL).unwrap_or(u32::MAX);
        let _ = timeout(FINISH_TIMEOUT, busy.acquire_many(all)).await;
        Ok(Left::Asked)
    }

    fn on_runtime(&mut self, RuntimeEvent { attempt, state }: RuntimeEvent) {
        let Some(state) = runtime_state(state) else {
            return;
        };
        tracing::debug!(%attempt, ?state, "shim reported");
        if matches!(state, RuntimeState::Running { .. } | RuntimeState::Gone(_)) {
            self.track(attempt);
        }
        self.tell(Event::RuntimeReported { attempt, state });
    }

    /// Output comes from now on, if there is any.
    fn track(&self, attempt: AttemptRef) {
        if let Some(spec) = self.core.spec(attempt) {
            let dir = self.hands.runtime.dir(attempt);
            self.hands.logs.track(&dir, spec.supervised_ranks());
        }
    }

    fn on_session(&mut self, event: SessionEvent) {
        match event {
            SessionEvent::Opening {
                inventory,
                observed,
            } => {
                self.core.set_config(core_config(&inventory));
                self.inventory = *inventory;
                self.outgoing.clear();
                // A session that is gone already is followed by another one.
                let bundles = self.outgoing.bundles(crate::bundles::Lanes::observed);
                let _ = observed.send((self.core.observed(), bundles));
            }
            SessionEvent::Open(desired, bundles) => {
                self.tell(Event::Connected { desired });
                self.tell(Event::Bundle(BundleEvent::AllDesired(bundles)));
            }
            SessionEvent::DesiredBundle(bundle) => {
                self.tell(Event::Bundle(BundleEvent::Desired(bundle)));
            }
            SessionEvent::ForgetBundle(bundle) => {
                self.tell(Event::Bundle(BundleEvent::ForgetRequested(bundle)));
            }
            SessionEvent::Desired(member) => self.tell(Event::DesiredChanged(member)),
            SessionEvent::Forget(attempt) => self.tell(Event::ForgetRequested(attempt)),
            SessionEvent::Closed => self.tell(Event::Disconnected),
        }
        self.mind_history();
    }

    fn mind_history(&mut self) {
        if self.core.is_history_settled()
            && let Some(history) = self.history.take()
        {
            spawn("history", async move {
                // Otherwise the next start begins anew too, which is safe.
                if let Err(error) = blocking(move || history.mark()).await {
                    tracing::warn!(
                        error = chain(&error),
                        "cannot note that all is accounted for"
                    );
                }
            });
        }
    }

    fn tell(&mut self, event: Event) {
        if let Event::FetchFinished(attempt) | Event::FetchFailed { attempt, .. } = &event {
            self.lanes.fetches.remove(attempt);
        }
        let mut out = Outbox::new();
        self.core.handle(self.clock.now(), event, &mut out);
        for effect in out.drain() {
            self.carry_out(effect);
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        let (attempt, task) = match effect {
            Effect::Accept(member) => (member.attempt, Task::Accept(member)),
            Effect::Fetch(attempt) => {
                let Some(spec) = self.core.spec(attempt) else {
                    return;
                };
                let cancel = CancellationToken::new();
                self.lanes.fetches.insert(attempt, cancel.clone());
                (attempt, Task::Fetch(Box::new(spec.clone()), cancel))
            }
            Effect::CancelFetch(attempt) => return self.lanes.cancel_fetch(attempt),
            Effect::SpawnShim(attempt) => (attempt, Task::SpawnShim),
            Effect::Go(attempt, go) => {
                let interface = self.interface(attempt, &go);
                (attempt, Task::Go(go, interface))
            }
            Effect::StopRanks(attempt, stop) => (attempt, Task::Stop(stop)),
            Effect::Upload { attempt, started } => (attempt, Task::Upload { started }),
            Effect::Report(member) => return self.outgoing.push(member),
            Effect::Remove(attempt) => (attempt, Task::Remove),
            Effect::Bundle(effect) => {
                let core = &self.core;
                let spec = |bundle| core.bundle_spec(bundle).cloned();
                return self.bundles.carry_out(effect, spec, self.clock.now());
            }
            Effect::Note { attempt, text } => {
                tracing::warn!(%attempt, "{text}");
                return;
            }
        };
        self.lanes.add(&self.hands, attempt, task);
    }

    /// The network interface that reaches the other members: the one with the address that they were told.
    fn interface(&self, attempt: AttemptRef, go: &Go) -> Option<String> {
        let place = usize::try_from(self.core.spec(attempt)?.node_rank).ok()?;
        let address = go.node_addrs.get(place)?;
        Some(self.inventory.interface_of(address)?.name.clone())
    }
}

/// What the core must know of the machine.
pub(crate) fn core_config(inventory: &Inventory) -> CoreConfig {
    CoreConfig {
        capacity: inventory.capacity,
        gpus: usable_gpus(inventory),
    }
}

/// What a shim's state is to the core; nothing if it has not said anything.
pub(crate) fn runtime_state(state: ShimState) -> Option<RuntimeState> {
    match state {
        ShimState::Accepted => None,
        ShimState::Ready { port } => Some(RuntimeState::Ready { port }),
        ShimState::Running { started_at } => Some(RuntimeState::Running { started_at }),
        ShimState::Stopping => Some(RuntimeState::Stopping),
        ShimState::CleanupPending(cleanup) => Some(RuntimeState::CleanupPending(cleanup)),
        ShimState::Gone(ending) => Some(RuntimeState::Gone(ending)),
    }
}

async fn at(deadline: Option<Timestamp>, now: Timestamp) {
    if let Some(deadline) = deadline {
        sleep_until(Instant::now() + deadline.since(now)).await;
    }
}
