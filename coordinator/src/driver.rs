//! The one task that owns the core. Its order is the heart of every promise: **handle, persist, and only then speak**.
//!
//! A round takes the events that wait, lets the core handle them, runs the scheduler if it is time, commits every changed
//! row in one transaction, shows them to readers, and only after that answers requests and sends commands. A failed
//! commit ends the coordinator: the core knows things by then that are not on disk, and nobody was told of them.
//!
//! It takes no decision of its own, with one exception: after a pause of the whole process it lets no timer fire until
//! what the agents sent meanwhile had time to arrive. Our own pause is nobody's silence; long ones the core notices too.

#[cfg(test)]
mod cost;
mod handle;
mod round;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use trainyard_common::error::Refusal;
use trainyard_common::ids::Term;
use trainyard_common::time::Timestamp;
use trainyard_coordinator_core::effect::{Answer, Command};
use trainyard_coordinator_core::event::{Event, Registration, RequestKey, SessionId};
use trainyard_coordinator_core::{Config as CoreConfig, Core, Outbox};

use crate::read_model::ReadModel;
use crate::store::{Loaded, Store, StoreError};
use trainyard_transport::clock::Clock;
use trainyard_transport::task::{AbortOnDrop, blocking, spawn};

pub(crate) use handle::Driver;
use round::Committer;

/// Events that wait for the driver. A burst of heartbeats of 4096 nodes fits; behind it senders wait.
const INPUT_QUEUE: usize = 4096;
/// Events of one round: one transaction of a few hundred rows takes about as long as its fsync.
const ROUND: usize = 512;
/// Commands that wait for one session. A slower agent is cut off and comes back with whole sets.
pub(crate) const SESSION_QUEUE: usize = 256;
/// Least time between two rounds of the scheduler, so that a burst of submits is placed in few rounds.
const SCHEDULE_INTERVAL: Duration = Duration::from_millis(2);
/// How often the driver looks at the clock although nothing happens.
const TICK: Duration = Duration::from_secs(1);
/// A longer time between two looks at the clock means that the process (or its disk) stood still.
const PAUSE: Duration = Duration::from_secs(5);

/// Why the coordinator had to stop.
#[derive(Debug, thiserror::Error)]
pub enum FatalError {
    /// The state could not be made durable. What was not answered may or may not be on record; what was answered is.
    #[error(
        "the state could not be made durable, so the coordinator stopped; running jobs are not affected"
    )]
    Store(#[source] StoreError),
    /// An own bug.
    #[error(
        "the task {task} failed with a panic, so the coordinator stopped; running jobs are not affected"
    )]
    Panicked {
        /// Which one.
        task: &'static str,
    },
    /// The server ended by itself.
    #[error("the server failed")]
    Server(#[source] tonic::transport::Error),
}

/// What the driver is given.
enum Input {
    /// A request that somebody waits for.
    Request {
        key: RequestKey,
        event: Event,
        reply: oneshot::Sender<Result<Answer, Refusal>>,
    },
    /// An agent that speaks first, and where its commands go.
    Register {
        registration: Box<Registration>,
        commands: mpsc::Sender<SessionMessage>,
    },
    /// Any other fact.
    Event(Event),
}

/// What a session is told.
#[derive(Debug)]
pub(crate) enum SessionMessage {
    /// Tell the agent.
    Command(Command),
    /// End with this reason.
    Close(Refusal),
}

/// What a driver is made from.
pub(crate) struct Parts {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) term: Term,
    pub(crate) loaded: Loaded,
    pub(crate) read: Arc<ReadModel>,
    pub(crate) clock: Clock,
    pub(crate) core: CoreConfig,
    pub(crate) stop: CancellationToken,
}

/// Starts the driver; the task's result says why it ended.
pub(crate) fn start(parts: Parts) -> (Driver, AbortOnDrop<Result<(), FatalError>>) {
    let (sender, inputs) = mpsc::channel(INPUT_QUEUE);
    let (clock, stop) = (parts.clock, parts.stop.clone());
    let task = AbortOnDrop(spawn("driver", run(State::new(parts), inputs, stop)));
    (Driver::new(sender, clock), task)
}

struct State {
    core: Core,
    committer: Committer,
    read: Arc<ReadModel>,
    clock: Clock,
    /// How long agents get to be heard after a pause of ours.
    grace: Duration,
    /// Who waits. Bounded by the requests that the server admits at a time.
    requests: HashMap<RequestKey, oneshot::Sender<Result<Answer, Refusal>>>,
    /// Open sessions. Bounded by the connections.
    sessions: HashMap<SessionId, mpsc::Sender<SessionMessage>>,
    schedule_wanted: bool,
    last_schedule: Option<Instant>,
    last_look: Timestamp,
    timers_held_until: Option<Timestamp>,
    /// Of a state that was restored from a backup: where to note that its nodes were heard of.
    restored: Option<Arc<dyn Store>>,
}

async fn run(
    mut state: State,
    mut inputs: mpsc::Receiver<Input>,
    stop: CancellationToken,
) -> Result<(), FatalError> {
    let mut batch = Vec::with_capacity(ROUND);
    loop {
        let wake = state.next_wake();
        // `biased`: the end comes first, then what waits, then time. Nothing is lost when another branch wins.
        tokio::select! {
            biased;
            // Cancel-safe: a token stays cancelled.
            () = stop.cancelled() => break,
            // Cancel-safe: `recv_many` takes nothing unless it is ready.
            count = inputs.recv_many(&mut batch, ROUND) => if count == 0 { break },
            // Cancel-safe: a new sleep is made in each turn.
            () = tokio::time::sleep_until(wake) => {}
        }
        state.round(&mut batch).await?;
    }
    // What was taken in before the end is still carried out and answered.
    inputs.close();
    while inputs.recv_many(&mut batch, ROUND).await > 0 {
        state.round(&mut batch).await?;
    }
    Ok(())
}

impl State {
    fn new(parts: Parts) -> Self {
        let Parts {
            store,
            term,
            loaded,
            read,
            clock,
            core: config,
            stop: _,
        } = parts;
        // Shorter than what makes the core itself take a late timer for a pause.
        let grace = config.unreachable_after / 2;
        let now = clock.now();
        let core = Core::new(config, loaded.snapshot, now);
        let restored = (!core.is_reconciled()).then(|| store.clone());
        Self {
            core,
            restored,
            committer: Committer::start(store, term),
            read,
            clock,
            grace,
            requests: HashMap::new(),
            sessions: HashMap::new(),
            schedule_wanted: true,
            last_schedule: None,
            last_look: now,
            timers_held_until: None,
        }
    }

    fn next_wake(&self) -> Instant {
        let now = self.clock.now();
        let mut wait = TICK;
        if let Some(deadline) = self.core.next_deadline() {
            let deadline = self
                .timers_held_until
                .map_or(deadline, |held| held.max(deadline));
            wait = wait.min(deadline.since(now));
        }
        let wake = Instant::now() + wait;
        match (self.schedule_wanted, self.last_schedule) {
            (false, _) => wake,
            (true, None) => Instant::now(),
            (true, Some(last)) => wake.min(last + SCHEDULE_INTERVAL),
        }
    }

    /// Notices a pause of ours and says whether timers may fire.
    fn look_at_clock(&mut self, now: Timestamp) -> bool {
        let stood_still = now.since(self.last_look);
        self.last_look = now;
        if stood_still >= PAUSE {
            tracing::warn!(
                pause_ms = stood_still.as_millis(),
                "the coordinator stood still; timers wait until agents had time to be heard"
            );
            self.timers_held_until = Some(now.after(self.grace));
            self.core.stood_still(now, stood_still);
        }
        if self.timers_held_until.is_some_and(|until| now >= until) {
            self.timers_held_until = None;
        }
        self.timers_held_until.is_none()
    }

    async fn round(&mut self, batch: &mut Vec<Input>) -> Result<(), FatalError> {
        let now = self.clock.now();
        let timers = self.look_at_clock(now);
        let mut outbox = Outbox::new();
        for input in batch.drain(..) {
            self.take(now, input, &mut outbox);
        }
        if timers
            && self
                .core
                .next_deadline()
                .is_some_and(|deadline| deadline <= now)
        {
            self.core.handle(now, Event::TimerFired, &mut outbox);
        }
        let mut effects = outbox.drain();
        self.note_schedule(&effects);
        if self.schedule_wanted && self.schedule_is_due() {
            self.schedule_wanted = false;
            self.last_schedule = Some(Instant::now());
            self.core.schedule(now, &mut outbox);
            let placed = outbox.drain();
            self.note_schedule(&placed);
            effects.extend(placed);
        }
        self.carry_out(now, effects).await?;
        self.note_reconciled();
        Ok(())
    }

    /// Once the nodes of a restored state were heard of, the next start need not wait for them again.
    fn note_reconciled(&mut self) {
        if !self.core.is_reconciled() {
            return;
        }
        if let Some(store) = self.restored.take() {
            spawn("reconciled", async move {
                if let Err(error) = blocking(move || store.reconciled()).await {
                    tracing::warn!(%error, "the next start waits for the restored nodes again");
                }
            });
        }
    }

    fn take(&mut self, now: Timestamp, input: Input, outbox: &mut Outbox) {
        match input {
            Input::Request { key, event, reply } => {
                self.requests.insert(key, reply);
                self.core.handle(now, event, outbox);
            }
            Input::Register {
                registration,
                commands,
            } => {
                self.sessions.insert(registration.session, commands);
                self.core
                    .handle(now, Event::AgentRegistered(registration), outbox);
            }
            Input::Event(event) => {
                if let Event::SessionEnded { session, .. } = &event {
                    self.sessions.remove(session);
                }
                self.core.handle(now, event, outbox);
            }
        }
    }

    fn schedule_is_due(&self) -> bool {
        self.last_schedule
            .is_none_or(|last| last.elapsed() >= SCHEDULE_INTERVAL)
    }
}
