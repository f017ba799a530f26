//! The second half of a round: commit, publish, speak. The thread that commits lives here, so that a slow disk holds up
//! nothing but the driver.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};

use tokio::sync::{mpsc, oneshot};
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{Sequence, Term};
use trainyard_common::record::Record;
use trainyard_common::time::Timestamp;
use trainyard_coordinator_core::effect::{Command, Effect, Urgency};
use trainyard_coordinator_core::event::SessionId;

use super::{FatalError, SESSION_QUEUE, SessionMessage, State};
use crate::store::{Store, StoreError};

impl State {
    pub(super) fn note_schedule(&mut self, effects: &[Effect]) {
        self.schedule_wanted |= effects
            .iter()
            .any(|effect| matches!(effect, Effect::RequestSchedule));
    }

    /// Makes everything durable that is to be, shows it, and only then tells anybody.
    pub(super) async fn carry_out(
        &mut self,
        now: Timestamp,
        effects: Vec<Effect>,
    ) -> Result<(), FatalError> {
        let mut records = Vec::new();
        let mut told = Vec::new();
        for effect in effects {
            match effect {
                Effect::Persist(record) => records.push(record),
                Effect::RequestSchedule => {}
                other => told.push(other),
            }
        }
        if !records.is_empty() {
            let (records, last) = self.committer.commit(now, records).await?;
            self.read.publish(records, last);
        }
        told.into_iter().for_each(|effect| self.tell(effect));
        Ok(())
    }

    fn tell(&mut self, effect: Effect) {
        match effect {
            Effect::Reply(key, answer) => {
                if let Some(reply) = self.requests.remove(&key) {
                    // Nobody waits any more if the caller went away; the record stands.
                    let _ = reply.send(answer);
                }
            }
            Effect::Send(session, command) => {
                self.send(session, SessionMessage::Command(command));
            }
            Effect::CloseSession(session, refusal) => {
                self.send(session, SessionMessage::Close(refusal));
                self.sessions.remove(&session);
            }
            Effect::Note(urgency, node, reason) => {
                let node = node.map(|node| node.to_string()).unwrap_or_default();
                let code = reason.code.as_str();
                match urgency {
                    Urgency::Info => tracing::info!(node, code, message = reason.message),
                    Urgency::Warn => tracing::warn!(node, code, message = reason.message),
                    Urgency::Error => tracing::error!(node, code, message = reason.message),
                }
            }
            Effect::Persist(_) | Effect::RequestSchedule => {}
        }
    }

    fn send(&mut self, session: SessionId, message: SessionMessage) {
        let Some(commands) = self.sessions.get(&session) else {
            return;
        };
        // Told again at the start of the next session. After an outage every member and bundle of a node may be due for one
        // at once; were the session closed for that, the next one would begin and end in the same way. So they leave half
        // of the queue to what must arrive.
        let may_wait = matches!(
            message,
            SessionMessage::Command(Command::Forget(_) | Command::ForgetBundle(_))
        );
        if may_wait && commands.capacity() <= SESSION_QUEUE / 2 && !commands.is_closed() {
            return;
        }
        match commands.try_send(message) {
            Ok(()) => {}
            // Dropping our end closes the session; the agent comes back and gets its whole set.
            Err(mpsc::error::TrySendError::Full(_)) => {
                tracing::warn!(
                    session = session.0,
                    "agent does not keep up with its commands, session closed"
                );
                self.sessions.remove(&session);
            }
            Err(mpsc::error::TrySendError::Closed(_)) => drop(self.sessions.remove(&session)),
        }
    }
}

/// The refusal of whatever came too late.
pub(super) fn stopping() -> Refusal {
    Refusal::new(
        ErrorCode::Unavailable,
        "STOPPING",
        "the coordinator is stopping and it is not known whether the request was carried out; repeat it with the same \
         request id once it is back",
    )
}

/// One batch for the thread that commits.
struct Work {
    at: Timestamp,
    records: Vec<Record>,
    done: oneshot::Sender<Done>,
}

type Done = (Vec<Record>, Result<Sequence, StoreError>);

/// A thread of its own for commits: they must not wait for other blocking work of the process.
pub(super) struct Committer {
    work: SyncSender<Work>,
}

impl Committer {
    pub(super) fn start(store: Arc<dyn Store>, term: Term) -> Self {
        // One batch at a time is on its way, so sending never blocks.
        let (work, queue) = sync_channel::<Work>(1);
        std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || {
                for Work { at, records, done } in queue {
                    let result = store.commit(term, at, &records);
                    // Nobody waits if the driver was aborted; nobody was told then either.
                    let _ = done.send((records, result));
                }
            })
            .expect("the process can start a thread while it starts up");
        Self { work }
    }

    async fn commit(
        &self,
        at: Timestamp,
        records: Vec<Record>,
    ) -> Result<(Vec<Record>, Sequence), FatalError> {
        let panicked = FatalError::Panicked { task: "store" };
        let (done, answer) = oneshot::channel();
        if self.work.send(Work { at, records, done }).is_err() {
            return Err(panicked);
        }
        match answer.await {
            Ok((records, Ok(last))) => Ok((records, last)),
            Ok((_, Err(error))) => Err(FatalError::Store(error)),
            Err(_) => Err(panicked),
        }
    }
}
