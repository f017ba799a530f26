//! One session of an agent: its greeting and whole observed sets, members before bundles, then changes both ways until either side ends it.
//!
//! What the agent says becomes events for the driver, in order; what the core wants becomes messages, in order, each
//! with the coordinator's term. It takes no decision but whether the peer speaks our protocol.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tonic::Streaming;
use trainyard_common::bundle::ObservedBundle;
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{Incarnation, NodeId, Term};
use trainyard_common::inventory::Inventory;
use trainyard_common::limits::MAX_LAST_WORDS;
use trainyard_common::member::ObservedMember;
use trainyard_coordinator_core::effect::Command;
use trainyard_coordinator_core::event::{Event, Registration, SessionId};
use trainyard_proto::convert::pages::{Assembler, desired_pages, pages};
use trainyard_proto::convert::{self, InvalidField};
use trainyard_proto::status::{from_status, to_status};
use trainyard_proto::{OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, v1};
use trainyard_transport::clock::wall_now;
use trainyard_transport::connections::Peer;

use super::{Sender, Shared, shutting_down};
use crate::driver::SessionMessage;

/// How long an agent may take for its greeting and its whole set; the largest sets take some seconds on a slow line.
const GREETING_TIMEOUT: Duration = Duration::from_secs(60);
/// Heartbeats that wait to be acknowledged; a later one says all that an earlier one does.
const ACK_QUEUE: usize = 4;
/// Bytes of an inventory; the largest machines take about 40 KiB. It becomes a row at each session.
const MAX_INVENTORY_BYTES: usize = 256 << 10;
/// Bytes of a boot id, version or address; real ones have fewer than 64.
const MAX_TEXT_BYTES: usize = 255;

/// What a session needs.
pub(super) struct Session {
    pub(super) shared: Arc<Shared>,
    /// From the certificate.
    pub(super) node: NodeId,
    pub(super) peer: Peer,
    pub(super) sender: Sender<v1::CoordinatorMessage>,
}

/// What an agent said first.
struct Greeting {
    incarnation: Incarnation,
    opening: u64,
    boot_id: String,
    agent_version: String,
    address: String,
    inventory: Inventory,
    observed: Vec<ObservedMember>,
    bundles: Vec<ObservedBundle>,
    last_words: String,
    capabilities: Vec<String>,
}

impl Session {
    pub(super) async fn run(self, messages: Streaming<v1::AgentMessage>) {
        let node = self.node;
        match self.serve(messages).await {
            Ok(()) => tracing::debug!(%node, "session ended by the agent"),
            Err(refusal) => {
                tracing::info!(%node, reason = refusal.reason, message = refusal.message, "session ended");
                // The peer may be gone; then nobody wants to know.
                let _ = self.sender.send(Err(to_status(&refusal))).await;
            }
        }
    }

    async fn serve(&self, mut messages: Streaming<v1::AgentMessage>) -> Result<(), Refusal> {
        let greeting = tokio::select! {
            biased;
            // Cancel-safe: a token stays cancelled.
            () = self.shared.stop.cancelled() => return Err(shutting_down()),
            // Not to be used again after the other branch won, and it is not.
            greeting = timeout(GREETING_TIMEOUT, self.greeting(&mut messages)) => greeting.map_err(|_| {
                let seconds = GREETING_TIMEOUT.as_secs();
                Refusal::new(ErrorCode::Unavailable, "GREETING_LATE", format!("no complete greeting within {seconds} s"))
            })??,
        };
        let capabilities = greeting.capabilities.clone();
        let mut open = self
            .shared
            .driver
            .open_session(|session| self.registration(session, greeting))
            .await?;
        let session = open.session;
        let (acks, pending_acks) = mpsc::channel(ACK_QUEUE);
        let mut line = self.shared.faults.open(self.node, &capabilities);
        tokio::select! {
            biased;
            // None of them is used again after another one won: the session is over then.
            () = self.shared.stop.cancelled() => Err(shutting_down()),
            () = self.certificate_end() => Err(Refusal::new(
                ErrorCode::Unauthenticated,
                "CERTIFICATE_EXPIRED",
                "the certificate of this session has ended; connect again with a renewed one",
            )),
            done = self.tell(&mut open.commands, pending_acks, &mut line.faults) => done,
            done = self.listen(session, &mut messages, acks) => done,
        }
    }

    async fn certificate_end(&self) {
        match self.peer.not_after {
            Some(end) => sleep_until(Instant::now() + end.since(self.shared.driver.now())).await,
            None => std::future::pending().await,
        }
    }

    async fn greeting(
        &self,
        messages: &mut Streaming<v1::AgentMessage>,
    ) -> Result<Greeting, Refusal> {
        use v1::agent_message::Message as Said;
        let Some(Said::Hello(hello)) = next(messages).await? else {
            return Err(protocol("the first message of a session must be a hello"));
        };
        let mut greeting = self.check_hello(hello)?;
        let mut observed = Assembler::<ObservedMember>::new();
        let mut bundles = Assembler::<ObservedBundle>::new();
        let mut members_told = false;
        loop {
            match next(messages).await? {
                Some(Said::ObservedPage(page)) if !members_told => {
                    let whole = observed.push(page).map_err(|bad| protocol(&chain(&bad)))?;
                    if let Some(members) = whole {
                        greeting.observed = members;
                        members_told = true;
                    }
                }
                Some(Said::ObservedBundlePage(page)) if members_told => {
                    let whole = bundles.push(page).map_err(|bad| protocol(&chain(&bad)))?;
                    if let Some(bundles) = whole {
                        greeting.bundles = bundles;
                        return Ok(greeting);
                    }
                }
                Some(Said::Heartbeat(_)) => {}
                Some(
                    Said::Hello(_)
                    | Said::ObservedPage(_)
                    | Said::ObservedBundlePage(_)
                    | Said::Observed(_)
                    | Said::ObservedBundle(_),
                ) => {
                    return Err(protocol(
                        "after the hello all pages of the observed members must come, and then those of the bundles",
                    ));
                }
                Some(Said::GoingAway(_)) | None => {
                    return Err(protocol(
                        "the session ended before the whole observed set had come",
                    ));
                }
            }
        }
    }

    fn check_hello(&self, hello: v1::Hello) -> Result<Greeting, Refusal> {
        let v1::Hello {
            protocol_version,
            oldest_protocol_version,
            capabilities,
            cluster,
            incarnation,
            boot_id,
            agent_version,
            address,
            inventory,
            term,
            opening,
            last_words,
        } = hello;
        check_version(protocol_version, oldest_protocol_version)?;
        let cluster = convert::cluster("hello.cluster", &cluster)?;
        if cluster != self.shared.cluster {
            let message = format!(
                "this is cluster {}, and the agent belongs to cluster {cluster}; enrol it with yard join TOKEN",
                self.shared.cluster
            );
            return Err(Refusal::new(
                ErrorCode::FailedPrecondition,
                "OTHER_CLUSTER",
                message,
            ));
        }
        self.check_term(Term(term))?;
        for (field, text) in [
            ("hello.boot_id", &boot_id),
            ("hello.agent_version", &agent_version),
            ("hello.address", &address),
        ] {
            if text.len() > MAX_TEXT_BYTES {
                let problem = format!("{} bytes; at most {MAX_TEXT_BYTES} may be", text.len());
                return Err(InvalidField::new(field, problem).into());
            }
        }
        let bytes = inventory.as_ref().map_or(0, Message::encoded_len);
        if bytes > MAX_INVENTORY_BYTES {
            let problem = format!("{bytes} bytes; at most {MAX_INVENTORY_BYTES} may be");
            return Err(InvalidField::new("hello.inventory", problem).into());
        }
        Ok(Greeting {
            incarnation: Incarnation(incarnation),
            opening,
            boot_id,
            agent_version,
            address: if address.is_empty() {
                self.peer.addr.ip().to_string()
            } else {
                address
            },
            inventory: convert::required("hello.inventory", inventory)?,
            observed: Vec::new(),
            bundles: Vec::new(),
            last_words: last_words.chars().take(MAX_LAST_WORDS).collect(),
            capabilities,
        })
    }

    /// An agent that has seen a higher term obeys somebody else, or our state is older than what it saw.
    fn check_term(&self, seen: Term) -> Result<(), Refusal> {
        if seen <= self.shared.term {
            return Ok(());
        }
        let own = self.shared.term;
        tracing::error!(node = %self.node, %own, %seen, "an agent has seen a newer coordinator than this one");
        let message = format!(
            "this coordinator leads with term {own}, but the agent has seen term {seen}: another coordinator of this \
             cluster is or was newer; stop this one, or restore the newest state"
        );
        Err(Refusal::new(
            ErrorCode::FailedPrecondition,
            "STALE_TERM",
            message,
        ))
    }

    fn registration(&self, session: SessionId, greeting: Greeting) -> Registration {
        let Greeting {
            incarnation,
            opening,
            boot_id,
            agent_version,
            address,
            inventory,
            observed,
            bundles,
            last_words,
            capabilities: _, // of the session's own line for faults
        } = greeting;
        Registration {
            session,
            node: self.node,
            incarnation,
            opening,
            boot_id,
            agent_version,
            last_words,
            address,
            inventory,
            observed,
            bundles,
        }
    }

    /// Turns what the agent says into events, until it ends the stream.
    async fn listen(
        &self,
        session: SessionId,
        messages: &mut Streaming<v1::AgentMessage>,
        acks: mpsc::Sender<u64>,
    ) -> Result<(), Refusal> {
        use v1::agent_message::Message as Said;
        let node = self.node;
        while let Some(said) = next(messages).await? {
            match said {
                Said::Heartbeat(v1::Heartbeat { sequence }) => {
                    self.shared
                        .driver
                        .tell(Event::HeartbeatReceived { session, node })
                        .await?;
                    // Full: the agent does not read, and the next acknowledgement covers this one.
                    let _ = acks.try_send(sequence);
                }
                Said::Observed(member) => {
                    let member = convert::required("observed", Some(member))?;
                    self.shared
                        .driver
                        .tell(Event::MemberObserved {
                            session,
                            node,
                            member,
                        })
                        .await?;
                }
                Said::ObservedBundle(bundle) => {
                    let bundle = convert::required("observed_bundle", Some(bundle))?;
                    self.shared
                        .driver
                        .tell(Event::BundleObserved {
                            session,
                            node,
                            bundle,
                        })
                        .await?;
                }
                Said::GoingAway(v1::GoingAway { reason }) => {
                    let reason: String = reason.chars().take(MAX_TEXT_BYTES).collect();
                    tracing::info!(%node, reason, "agent goes away");
                    let goodbye = Event::GoodbyeSaid { session, node };
                    return self.shared.driver.tell(goodbye).await;
                }
                Said::Hello(_) | Said::ObservedPage(_) | Said::ObservedBundlePage(_) => {
                    return Err(protocol(
                        "a hello and pages come once, at the start of a session",
                    ));
                }
            }
        }
        Ok(())
    }

    /// Turns what the core wants into messages. Nothing is acknowledged before the welcome.
    async fn tell(
        &self,
        commands: &mut mpsc::Receiver<SessionMessage>,
        mut acks: mpsc::Receiver<u64>,
        faults: &mut mpsc::Receiver<v1::Fault>,
    ) -> Result<(), Refusal> {
        use v1::coordinator_message::Message as Say;
        let mut welcomed = false;
        loop {
            let sent = tokio::select! {
                biased;
                // Cancel-safe, all: a message is taken only when its branch wins.
                command = commands.recv() => match command {
                    Some(SessionMessage::Command(command)) => {
                        welcomed = true;
                        self.command(command).await
                    }
                    Some(SessionMessage::Close(refusal)) => return Err(refusal),
                    None => return Err(fell_behind()),
                },
                Some(sequence) = acks.recv(), if welcomed => {
                    self.say(Say::HeartbeatAck(v1::HeartbeatAck { sequence })).await
                }
                // A line that a newer session took over says nothing more.
                Some(fault) = faults.recv(), if welcomed => self.say(Say::Fault(fault)).await,
            };
            if sent.is_err() {
                return Ok(());
            }
        }
    }

    async fn command(&self, command: Command) -> Result<(), Gone> {
        use v1::coordinator_message::Message as Say;
        match command {
            Command::Welcome { desired, bundles } => {
                self.say(Say::Welcome(self.welcome())).await?;
                for page in desired_pages(&desired) {
                    self.say(Say::DesiredPage(page)).await?;
                }
                for page in pages(&bundles) {
                    self.say(Say::DesiredBundlePage(page)).await?;
                }
                Ok(())
            }
            Command::Desire(member) => self.say(Say::Desired(member.as_ref().into())).await,
            Command::Forget(attempt) => self.say(Say::Forget(attempt.into())).await,
            Command::DesireBundle(bundle) => {
                self.say(Say::DesiredBundle(bundle.as_ref().into())).await
            }
            Command::ForgetBundle(bundle) => self.say(Say::ForgetBundle(bundle.into())).await,
            Command::Resync(reason) => self.say(Say::Resync(v1::Resync { reason })).await,
        }
    }

    fn welcome(&self) -> v1::Welcome {
        v1::Welcome {
            protocol_version: PROTOCOL_VERSION,
            capabilities: Vec::new(),
            cluster: self.shared.cluster.0.to_vec(),
            node: self.node.0,
            heartbeat_interval: Some(convert::duration(self.shared.timing.heartbeat_interval)),
            lease: Some(convert::duration(self.shared.timing.unreachable_after)),
            now: Some(convert::timestamp(wall_now())),
        }
    }

    async fn say(&self, message: v1::coordinator_message::Message) -> Result<(), Gone> {
        let message = v1::CoordinatorMessage {
            term: self.shared.term.0,
            message: Some(message),
        };
        self.sender.send(Ok(message)).await.map_err(|_| Gone)
    }
}

/// The agent no longer reads.
struct Gone;

/// The next thing that the agent says; nothing at the end of the stream, also if it broke off.
async fn next(
    messages: &mut Streaming<v1::AgentMessage>,
) -> Result<Option<v1::agent_message::Message>, Refusal> {
    match messages.message().await {
        Ok(Some(v1::AgentMessage {
            message: Some(said),
        })) => Ok(Some(said)),
        Ok(Some(v1::AgentMessage { message: None })) => Err(protocol(
            "a message is empty, or of a kind that this version does not know",
        )),
        Ok(None) => Ok(None),
        Err(status) => {
            let refusal = from_status(&status);
            tracing::debug!(message = refusal.message, "an agent's stream broke off");
            match refusal.code {
                ErrorCode::Unavailable => Ok(None),
                _ => Err(refusal),
            }
        }
    }
}

fn check_version(newest: u32, oldest: u32) -> Result<(), Refusal> {
    if newest >= OLDEST_PROTOCOL_VERSION && oldest <= PROTOCOL_VERSION {
        return Ok(());
    }
    let behind = if newest < OLDEST_PROTOCOL_VERSION {
        "agent"
    } else {
        "coordinator"
    };
    let message = format!(
        "the agent speaks protocol versions {oldest} to {newest}, this coordinator {OLDEST_PROTOCOL_VERSION} to \
         {PROTOCOL_VERSION}; upgrade the {behind}"
    );
    Err(Refusal::new(
        ErrorCode::FailedPrecondition,
        "PROTOCOL_VERSION",
        message,
    ))
}

fn protocol(problem: &str) -> Refusal {
    Refusal::new(ErrorCode::Invalid, "PROTOCOL", problem)
}

fn fell_behind() -> Refusal {
    let message =
        "the agent did not keep up with its commands; open a new session to get the whole set";
    Refusal::new(ErrorCode::Unavailable, "FELL_BEHIND", message)
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_that_is_too_far_away_is_refused_with_both_and_the_remedy() {
        check_version(PROTOCOL_VERSION, OLDEST_PROTOCOL_VERSION).unwrap();
        check_version(PROTOCOL_VERSION + 1, PROTOCOL_VERSION).unwrap();
        let newer = check_version(PROTOCOL_VERSION + 2, PROTOCOL_VERSION + 1).unwrap_err();
        assert!(
            newer.message.contains("2 to 3") && newer.message.ends_with("upgrade the coordinator"),
            "{newer}"
        );
        let older = check_version(OLDEST_PROTOCOL_VERSION - 1, 0).unwrap_err();
        assert!(older.message.ends_with("upgrade the agent"), "{older}");
    }
}
