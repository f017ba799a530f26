//! How the rest of the coordinator reaches the driver: requests with an answer, sessions of agents, and plain facts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::NodeId;
use trainyard_common::time::Timestamp;
use trainyard_coordinator_core::effect::Answer;
use trainyard_coordinator_core::event::{Event, Registration, RequestKey, SessionId};

use super::round::stopping;
use super::{Input, SESSION_QUEUE, SessionMessage};
use trainyard_transport::clock::Clock;
use trainyard_transport::task::spawn;

/// How long something waits for a place in the driver's queue before its sender is told to come again.
const QUEUE_WAIT: Duration = Duration::from_secs(10);

/// A way to the driver. Clones share it.
#[derive(Clone)]
pub(crate) struct Driver {
    inputs: mpsc::Sender<Input>,
    numbers: Arc<Numbers>,
    clock: Clock,
}

/// Keys and sessions, each given once in this process.
#[derive(Default)]
struct Numbers {
    key: AtomicU64,
    session: AtomicU64,
}

impl Driver {
    pub(super) fn new(inputs: mpsc::Sender<Input>, clock: Clock) -> Self {
        Self {
            inputs,
            numbers: Arc::default(),
            clock,
        }
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    #[cfg(test)]
    pub(super) fn requests_begun(&self) -> u64 {
        self.numbers.key.load(Ordering::Relaxed)
    }

    /// Hands a request to the core and waits until its outcome is durable.
    pub(crate) async fn request(
        &self,
        event: impl FnOnce(RequestKey) -> Event,
    ) -> Result<Answer, Refusal> {
        let key = RequestKey(self.numbers.key.fetch_add(1, Ordering::Relaxed));
        let (reply, answer) = oneshot::channel();
        self.put(Input::Request {
            key,
            event: event(key),
            reply,
        })
        .await?;
        answer.await.unwrap_or_else(|_| Err(stopping()))
    }

    /// Hands a fact to the core.
    pub(crate) async fn tell(&self, event: Event) -> Result<(), Refusal> {
        self.put(Input::Event(event)).await
    }

    /// Opens a session for an agent that has said everything about itself.
    pub(crate) async fn open_session(
        &self,
        registration: impl FnOnce(SessionId) -> Registration,
    ) -> Result<OpenSession, Refusal> {
        let session = SessionId(self.numbers.session.fetch_add(1, Ordering::Relaxed));
        let registration = Box::new(registration(session));
        let node = registration.node;
        let (commands, receiver) = mpsc::channel(SESSION_QUEUE);
        // Made first, so that a session whose opening is cancelled is ended too.
        let open = OpenSession {
            commands: receiver,
            session,
            node,
            driver: self.clone(),
        };
        self.put(Input::Register {
            registration,
            commands,
        })
        .await?;
        Ok(open)
    }

    async fn put(&self, input: Input) -> Result<(), Refusal> {
        match timeout(QUEUE_WAIT, self.inputs.send(input)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(stopping()),
            Err(_) => Err(Refusal::new(
                ErrorCode::Unavailable,
                "OVERLOADED",
                "the coordinator is overloaded and the request was not taken; try again in some seconds",
            )),
        }
    }
}

/// A session; dropping it tells the core that it is over.
pub(crate) struct OpenSession {
    /// What the agent is to be told, in order. It ends when the agent does not keep up.
    pub(crate) commands: mpsc::Receiver<SessionMessage>,
    /// Its number.
    pub(crate) session: SessionId,
    /// Whose it is.
    pub(crate) node: NodeId,
    driver: Driver,
}

impl Drop for OpenSession {
    fn drop(&mut self) {
        let ended = Input::Event(Event::SessionEnded {
            session: self.session,
            node: self.node,
        });
        let Err(mpsc::error::TrySendError::Full(ended)) = self.driver.inputs.try_send(ended) else {
            return;
        };
        // Must not be lost: without it the node would count as in session until its heartbeats are missed.
        let inputs = self.driver.inputs.clone();
        spawn("session end", async move {
            let _ = inputs.send(ended).await;
        });
    }
}
