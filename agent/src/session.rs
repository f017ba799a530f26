//! The session with the coordinator: opens it, says everything about this node, takes the whole desired set, then passes
//! single changes both ways. Any doubt ends the session, and the next one begins with full sets again.
//!
//! It decides nothing about members. What it does decide: which coordinator is obeyed (never one with a lower term than
//! one seen before), and when to try again.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use trainyard_common::bundle::{DesiredBundle, ObservedBundle};
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{AttemptRef, BundleRef, Term};
use trainyard_common::inventory::Inventory;
use trainyard_common::limits::{HEARTBEAT_INTERVAL, MAX_MESSAGE};
use trainyard_common::member::{DesiredMember, ObservedMember};
use trainyard_proto::convert::pages::{Assembler, PageError, Paged, observed_pages, pages};
use trainyard_proto::convert::{self, InvalidField};
use trainyard_proto::status::from_status;
use trainyard_proto::v1::agent_message::Message as Ours;
use trainyard_proto::v1::agent_service_client::AgentServiceClient;
use trainyard_proto::v1::coordinator_message::Message as Theirs;
use trainyard_proto::{OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, v1};
use trainyard_transport::client::ConnectError;

use crate::backoff::Backoff;
use crate::chain::chain;
use crate::faults::Faults;
use crate::last_words;
use crate::link::Link;
use crate::outgoing::Outgoing;
use crate::probe::Probe;
use crate::runtime::Runtime;
use crate::state::{AgentState, StateError};
use trainyard_transport::clock::{BootTime, wall_now};
use trainyard_transport::skew;
use trainyard_transport::task::blocking;

/// How long the coordinator may take to answer with everything that it wants. It reads the observed set first, and at
/// 10,000 agents that come back at once it takes a while.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Heartbeats that may stay unanswered before the session is given up.
const SILENT_HEARTBEATS: u32 = 3;
/// Bounds for the heartbeat interval that a coordinator may ask for.
const HEARTBEAT_BOUNDS: (Duration, Duration) =
    (Duration::from_millis(50), Duration::from_secs(300));
/// Messages that wait for the network; reports beyond them wait in [`Outgoing`].
const SEND_QUEUE: usize = 32;
/// How long a goodbye may take to leave.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

/// Heartbeats that wait for their acknowledgement and whose times are known; of older ones it changes nothing.
const REMEMBERED_HEARTBEATS: usize = 64;

/// When the heartbeats of one session were sent, or a moment before.
#[derive(Debug, Default)]
struct Beats {
    last: u64,
    sent: VecDeque<(u64, BootTime)>,
}

impl Beats {
    /// The number of the next one, which is about to be sent.
    fn next(&mut self) -> u64 {
        if self.sent.len() == REMEMBERED_HEARTBEATS {
            self.sent.pop_front();
        }
        self.last += 1;
        self.sent.push_back((self.last, BootTime::now()));
        self.last
    }

    /// When the heartbeat with this number was sent, if it was and that is still known. An acknowledgement covers all
    /// before it.
    fn acknowledged(&mut self, sequence: u64) -> Option<BootTime> {
        let (_, sent) = *self.sent.iter().find(|(number, _)| *number == sequence)?;
        self.sent.retain(|(number, _)| *number > sequence);
        Some(sent)
    }
}

/// What the session tells the driver.
#[derive(Debug)]
pub(crate) enum SessionEvent {
    /// A session is being opened with this inventory. The driver answers with the whole observed set, and everything
    /// that it reports afterwards is newer than that.
    Opening {
        inventory: Box<Inventory>,
        observed: oneshot::Sender<(Vec<ObservedMember>, Vec<ObservedBundle>)>,
    },
    /// It is open; this is everything that is desired.
    Open(Vec<DesiredMember>, Vec<DesiredBundle>),
    /// One member is desired, or desired differently.
    Desired(Box<DesiredMember>),
    /// A member's end is on record.
    Forget(AttemptRef),
    /// One bundle is desired, or desired differently.
    DesiredBundle(Box<DesiredBundle>),
    /// Everything about a bundle is on record.
    ForgetBundle(BundleRef),
    /// It is over.
    Closed,
}

/// What a session needs.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) link: Link,
    pub(crate) state: AgentState,
    pub(crate) probe: Arc<Probe>,
    /// The agent's data directory.
    pub(crate) dir: PathBuf,
    pub(crate) advertise_address: Option<String>,
    pub(crate) outgoing: Arc<Outgoing>,
    /// Is told how long the coordinator is known to hear this node.
    pub(crate) runtime: Runtime,
    pub(crate) driver: mpsc::Sender<SessionEvent>,
    /// The agent's process is about to end.
    pub(crate) leaving: CancellationToken,
    /// Sessions that this process tried to open.
    pub(crate) openings: u64,
    /// What an earlier process said before it crashed, until the coordinator heard it.
    pub(crate) last_words: String,
    /// The clock did not agree with the coordinator's when a session was last opened.
    pub(crate) skewed: bool,
    pub(crate) faults: Faults,
}

/// Why a session is over.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the coordinator refuses this node: {0}")]
    Refused(Refusal),
    #[error("the connection to the coordinator broke")]
    Broken(#[source] Box<tonic::Status>),
    #[error("the coordinator closed the session")]
    Closed,
    #[error("the coordinator did not answer in time")]
    Silent,
    #[error("the coordinator asks for a new session: {0}")]
    Resync(String),
    #[error("a coordinator with term {0} was refused, as one with term {1} was seen before")]
    StaleTerm(Term, Term),
    #[error("the coordinator said something out of place: {0}")]
    Protocol(&'static str),
    #[error("the coordinator said something that makes no sense")]
    Invalid(#[from] InvalidField),
    #[error("the desired set arrived damaged")]
    Pages(#[from] PageError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("the certificate was renewed")]
    Renewed,
    #[error("the agent is leaving")]
    Leaving,
}

impl From<tonic::Status> for SessionError {
    fn from(status: tonic::Status) -> Self {
        let refusal = from_status(&status);
        match refusal.code {
            ErrorCode::Unavailable | ErrorCode::Internal | ErrorCode::Exhausted => {
                Self::Broken(Box::new(status))
            }
            ErrorCode::Invalid
            | ErrorCode::NotFound
            | ErrorCode::AlreadyExists
            | ErrorCode::FailedPrecondition
            | ErrorCode::PermissionDenied
            | ErrorCode::Unauthenticated
            | ErrorCode::Compacted
            | ErrorCode::Unimplemented => Self::Refused(refusal),
        }
    }
}

impl SessionError {
    /// Whether trying again soon would be the same again, until a person has done something.
    fn needs_a_person(&self) -> bool {
        match self {
            Self::Connect(error) => !error.is_unreachable(),
            Self::Refused(_) | Self::StaleTerm(..) => true,
            Self::State(error) => !error.is_disk_full(),
            Self::Broken(_)
            | Self::Closed
            | Self::Silent
            | Self::Resync(_)
            | Self::Protocol(_)
            | Self::Invalid(_)
            | Self::Pages(_)
            | Self::Renewed
            | Self::Leaving => false,
        }
    }
}

impl Session {
    /// Keeps a session open until the agent leaves.
    pub(crate) async fn run(mut self) {
        let mut backoff = Backoff::new();
        let mut told = String::new();
        loop {
            let mut healthy = false;
            let error = match self.once(&mut healthy).await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            if healthy {
                backoff.reset();
                told.clear();
            }
            let text = self.explain(&error);
            match &error {
                SessionError::Leaving => return,
                SessionError::Renewed => continue,
                _ if error.needs_a_person() => {
                    backoff.slow_down();
                    if told != text {
                        tracing::error!(
                            error = text,
                            "no session with the coordinator, members live on"
                        );
                    }
                }
                _ if told != text => {
                    tracing::warn!(
                        error = text,
                        "no session with the coordinator, members live on"
                    );
                }
                _ => tracing::debug!(error = text, "still no session with the coordinator"),
            }
            told = text;
            let pause = backoff.pause();
            tokio::select! {
                biased;
                // Cancel-safe: only waits.
                () = self.leaving.cancelled() => return,
                // Cancel-safe: only waits.
                () = sleep(pause) => {}
            }
        }
    }

    /// The error with its causes; and with the one that TLS does not tell.
    fn explain(&self, error: &SessionError) -> String {
        let text = chain(error);
        let broke = matches!(error, SessionError::Connect(_) | SessionError::Broken(_));
        if let Some(why) = skew::refused(&self.link.cert().info(), error, wall_now()) {
            return format!("{text}; {why}");
        }
        if broke && self.link.cert().not_after() <= wall_now() {
            return format!(
                "{text}; this node's certificate has expired: enrol it again with `yard join`"
            );
        }
        text
    }

    /// One session from its beginning to its end.
    async fn once(&mut self, healthy: &mut bool) -> Result<std::convert::Infallible, SessionError> {
        let leaving = self.leaving.clone();
        let opened = tokio::select! {
            biased;
            // Cancel-safe: only waits.
            () = leaving.cancelled() => return Err(SessionError::Leaving),
            // Dropping it half way closes the connection, and nothing has been done yet on the coordinator's word but
            // to keep a higher term.
            opened = self.open() => opened?,
        };
        let Open {
            open,
            desired: (members, bundles),
            greeted,
        } = opened;
        // Before the driver can have anything started.
        self.runtime.renew(greeted);
        self.tell(SessionEvent::Open(members, bundles)).await?;
        tracing::info!(term = open.term.0, node = %self.link.node(), "session with the coordinator is open");
        let result = self.duplex(open, healthy).await;
        // The driver is only gone when the agent is.
        let _ = self.tell(SessionEvent::Closed).await;
        result
    }

    async fn tell(&self, event: SessionEvent) -> Result<(), SessionError> {
        self.driver
            .send(event)
            .await
            .map_err(|_| SessionError::Leaving)
    }

    /// Exchanges the full sets.
    async fn open(&mut self) -> Result<Open, SessionError> {
        let renewals = {
            let mut renewals = self.link.renewals();
            renewals.mark_unchanged();
            renewals
        };
        let (probe, dir) = (self.probe.clone(), self.dir.clone());
        let inventory = blocking(move || probe.read(&dir)).await;
        let channel = self.link.connect().await?;
        self.openings += 1;
        let hello = self.hello(&inventory);
        let (reply, observed) = oneshot::channel();
        self.tell(SessionEvent::Opening {
            inventory: Box::new(inventory),
            observed: reply,
        })
        .await?;
        let (members, bundles) = observed.await.map_err(|_| SessionError::Leaving)?;
        let members = observed_pages(&members).into_iter();
        let bundles = pages(&bundles).into_iter().map(Ours::ObservedBundlePage);
        let first: Vec<_> = std::iter::once(Ours::Hello(hello))
            .chain(members.map(Ours::ObservedPage))
            .chain(bundles)
            .collect();
        let (sender, receiver) = mpsc::channel(SEND_QUEUE);
        let requests = tokio_stream::iter(first)
            .chain(ReceiverStream::new(receiver))
            .map(|message| v1::AgentMessage {
                message: Some(message),
            });
        let mut client = AgentServiceClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        let greeted = BootTime::now();
        let answer = async {
            let messages = client.session(requests).await?.into_inner();
            let mut open = OpenSession {
                messages,
                sender,
                heartbeat: HEARTBEAT_INTERVAL,
                term: Term(0),
                renewals,
            };
            let desired = self.read_answer(&mut open).await?;
            Ok(Open {
                open,
                desired,
                greeted,
            })
        };
        timeout(ANSWER_TIMEOUT, answer)
            .await
            .unwrap_or(Err(SessionError::Silent))
    }

    fn hello(&self, inventory: &Inventory) -> v1::Hello {
        v1::Hello {
            protocol_version: PROTOCOL_VERSION,
            oldest_protocol_version: OLDEST_PROTOCOL_VERSION,
            opening: self.openings,
            capabilities: self.faults.capabilities(),
            cluster: self.link.cluster().0.to_vec(),
            incarnation: self.state.incarnation().0,
            boot_id: self.state.boot_id().to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            address: self.advertise_address.clone().unwrap_or_default(),
            inventory: Some(inventory.into()),
            term: self.state.term().0,
            last_words: self.last_words.clone(),
        }
    }

    /// Reads welcome and desired set.
    async fn read_answer(
        &mut self,
        open: &mut OpenSession,
    ) -> Result<(Vec<DesiredMember>, Vec<DesiredBundle>), SessionError> {
        let Theirs::Welcome(welcome) = self.next(open).await? else {
            return Err(SessionError::Protocol("something else than a welcome"));
        };
        self.check_welcome(&welcome)?;
        if !std::mem::take(&mut self.last_words).is_empty() {
            let dir = self.dir.clone();
            blocking(move || last_words::forget(&dir)).await;
        }
        self.compare_clocks(&welcome)?;
        let interval = convert::to_duration("heartbeat_interval", welcome.heartbeat_interval)?;
        let (shortest, longest) = HEARTBEAT_BOUNDS;
        open.heartbeat = interval.clamp(shortest, longest);
        let members = self
            .read_set(open, |message| match message {
                Theirs::DesiredPage(page) => Some(page),
                _ => None,
            })
            .await?;
        let bundles = self
            .read_set(open, |message| match message {
                Theirs::DesiredBundlePage(page) => Some(page),
                _ => None,
            })
            .await?;
        Ok((members, bundles))
    }

    /// Tells of clocks that disagree, once for each way that they do.
    fn compare_clocks(&mut self, welcome: &v1::Welcome) -> Result<(), SessionError> {
        let theirs = convert::optional_timestamp("now", welcome.now)?;
        let skew = theirs.and_then(|theirs| skew::between(wall_now(), theirs));
        match (&skew, self.skewed) {
            (Some(skew), false) => tracing::warn!("{skew}"),
            (Some(skew), true) => tracing::debug!("{skew}"),
            (None, true) => tracing::info!("the clock agrees with the coordinator's again"),
            (None, false) => {}
        }
        self.skewed = skew.is_some();
        Ok(())
    }

    /// Reads one whole set in pages.
    async fn read_set<T: Paged>(
        &mut self,
        open: &mut OpenSession,
        page_in: impl Fn(Theirs) -> Option<T::Page>,
    ) -> Result<Vec<T>, SessionError> {
        let mut assembler = Assembler::<T>::new();
        loop {
            let message = self.next(open).await?;
            if let Theirs::Resync(resync) = message {
                return Err(SessionError::Resync(resync.reason));
            }
            let page =
                page_in(message).ok_or(SessionError::Protocol("a message amid the desired set"))?;
            if let Some(set) = assembler.push(page)? {
                return Ok(set);
            }
        }
    }

    fn check_welcome(&self, welcome: &v1::Welcome) -> Result<(), SessionError> {
        let version = welcome.protocol_version;
        if !(OLDEST_PROTOCOL_VERSION..=PROTOCOL_VERSION).contains(&version) {
            let message = format!(
                "the coordinator speaks protocol version {version}, this agent {OLDEST_PROTOCOL_VERSION} to \
                 {PROTOCOL_VERSION}: upgrade the older one of them"
            );
            return Err(SessionError::Refused(Refusal::new(
                ErrorCode::FailedPrecondition,
                "PROTOCOL_VERSION",
                message,
            )));
        }
        if convert::cluster("cluster", &welcome.cluster)? != self.link.cluster()
            || convert::node_id("node", welcome.node)? != self.link.node()
        {
            return Err(SessionError::Protocol("a welcome for somebody else"));
        }
        Ok(())
    }

    /// The next message of the coordinator, if its term may be obeyed.
    async fn next(&mut self, open: &mut OpenSession) -> Result<Theirs, SessionError> {
        let message = open.messages.message().await?.ok_or(SessionError::Closed)?;
        self.check_term(open, Term(message.term))?;
        message.message.ok_or(SessionError::Protocol(
            "an empty message, or one of a newer version",
        ))
    }

    fn check_term(&mut self, open: &mut OpenSession, term: Term) -> Result<(), SessionError> {
        let seen = self.state.term();
        if term < seen {
            return Err(SessionError::StaleTerm(term, seen));
        }
        if term > seen {
            // It waits for the disk, but once for each start of a coordinator, and nothing may go on before.
            self.state.raise_term(term)?;
        }
        open.term = term;
        Ok(())
    }

    /// Passes changes both ways until something ends the session.
    async fn duplex(
        &mut self,
        mut open: OpenSession,
        healthy: &mut bool,
    ) -> Result<std::convert::Infallible, SessionError> {
        let leaving = self.leaving.clone();
        let outgoing = self.outgoing.clone();
        let sender = open.sender.clone();
        let mut renewals = open.renewals.clone();
        let silence = open.heartbeat * SILENT_HEARTBEATS;
        let mut give_up = Instant::now() + silence;
        let mut ticks = interval(open.heartbeat);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut beats = Beats::default();
        loop {
            let waiting = !outgoing.is_empty();
            tokio::select! {
                biased;
                // Cancel-safe: only waits.
                () = leaving.cancelled() => break,
                // Cancel-safe: only waits. A sender that is gone never renews.
                Ok(()) = renewals.changed() => return Err(SessionError::Renewed),
                // Cancel-safe: a message is taken whole or stays; the term is kept after that within this branch's body.
                message = open.messages.message() => {
                    let message = message?.ok_or(SessionError::Closed)?;
                    self.check_term(&mut open, Term(message.term))?;
                    give_up = Instant::now() + silence;
                    if let Some(Theirs::HeartbeatAck(ack)) = &message.message {
                        *healthy = true;
                        if let Some(sent) = beats.acknowledged(ack.sequence) {
                            self.runtime.renew(sent);
                        }
                    }
                    self.pass_on(message.message).await?;
                }
                // Cancel-safe: a place that is not used is given back.
                permit = sender.reserve(), if waiting => {
                    let permit = permit.map_err(|_| SessionError::Closed)?;
                    if let Some(report) = outgoing.pop() {
                        permit.send(report);
                    }
                }
                // Cancel-safe: a notification that is not taken stays.
                () = outgoing.pushed(), if !waiting => {}
                // Cancel-safe: only waits.
                _ = ticks.tick() => {
                    let sequence = beats.next();
                    // A full queue has messages that say the same: this agent lives.
                    let _ = sender.try_send(Ours::Heartbeat(v1::Heartbeat { sequence }));
                }
                // Cancel-safe: only waits.
                () = sleep_until(give_up) => return Err(SessionError::Silent),
            }
        }
        drop(sender);
        self.say_goodbye(open).await;
        Err(SessionError::Leaving)
    }

    async fn pass_on(&self, message: Option<Theirs>) -> Result<(), SessionError> {
        match message {
            Some(Theirs::Desired(desired)) => {
                let member = DesiredMember::try_from(desired)?;
                self.tell(SessionEvent::Desired(Box::new(member))).await
            }
            Some(Theirs::Forget(attempt)) => {
                self.tell(SessionEvent::Forget(attempt.try_into()?)).await
            }
            Some(Theirs::DesiredBundle(desired)) => {
                let bundle = DesiredBundle::try_from(desired)?;
                self.tell(SessionEvent::DesiredBundle(Box::new(bundle)))
                    .await
            }
            Some(Theirs::ForgetBundle(bundle)) => {
                self.tell(SessionEvent::ForgetBundle(bundle.try_into()?))
                    .await
            }
            Some(Theirs::Fault(fault)) => {
                self.faults.inject(fault).await;
                Ok(())
            }
            Some(Theirs::HeartbeatAck(_)) => Ok(()),
            Some(Theirs::Resync(resync)) => Err(SessionError::Resync(resync.reason)),
            Some(Theirs::Welcome(_) | Theirs::DesiredPage(_) | Theirs::DesiredBundlePage(_)) => {
                Err(SessionError::Protocol("a second beginning"))
            }
            // Perhaps something that only a newer version knows; full sets are always understood.
            None => Err(SessionError::Protocol(
                "an empty message, or one of a newer version",
            )),
        }
    }

    /// Says that the silence to come is meant.
    async fn say_goodbye(&self, mut open: OpenSession) {
        let reason = "the agent's process ends; its members live on".to_owned();
        let goodbye = async {
            while let Some(report) = self.outgoing.pop() {
                let _ = open.sender.send(report).await;
            }
            let _ = open
                .sender
                .send(Ours::GoingAway(v1::GoingAway { reason }))
                .await;
            // The end of our half; the coordinator then ends its own.
            drop(open.sender);
            while let Ok(Some(_)) = open.messages.message().await {}
        };
        let _ = timeout(GOODBYE_TIMEOUT, goodbye).await;
    }
}

/// A session whose full sets are exchanged.
struct Open {
    open: OpenSession,
    desired: (Vec<DesiredMember>, Vec<DesiredBundle>),
    /// When this agent began to greet.
    greeted: BootTime,
}

struct OpenSession {
    messages: Streaming<v1::CoordinatorMessage>,
    sender: mpsc::Sender<Ours>,
    heartbeat: Duration,
    term: Term,
    renewals: tokio::sync::watch::Receiver<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledgement_dates_from_the_sending_and_counts_once() {
        let mut beats = Beats::default();
        let before = BootTime::now();
        let (first, second) = (beats.next(), beats.next());
        let third = beats.next();
        let sent = beats.acknowledged(second).expect("is known");
        assert!(before <= sent && sent <= BootTime::now());
        assert_eq!(beats.acknowledged(second), None);
        assert_eq!(
            beats.acknowledged(first),
            None,
            "it is covered by a later one"
        );
        assert_eq!(beats.acknowledged(third + 1), None, "it was never sent");
        for _ in 0..REMEMBERED_HEARTBEATS {
            beats.next();
        }
        assert_eq!(beats.acknowledged(third), None, "its time is forgotten");
        assert_eq!(beats.sent.len(), REMEMBERED_HEARTBEATS);
    }
}
