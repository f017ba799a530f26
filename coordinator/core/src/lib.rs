//! The coordinator's decisions as one deterministic state machine: facts in, requests out.
//!
//! It owns every table about jobs, tasks, attempts, nodes, tokens and users, and the scheduler. It knows no clock, file,
//! network, async runtime or random source, and iterates over nothing unordered: the same events at the same times
//! always give the same effects.

#![deny(clippy::wildcard_enum_match_arm)]

mod ahead;
mod attempts;
mod bundles;
mod cleanup;
mod config;
mod crashes;
pub mod effect;
mod enrol;
pub mod event;
mod gang;
mod invariants;
mod jobs;
mod lease;
mod live;
mod nodes;
mod outbox;
mod reports;
mod restored;
mod scheduler;
mod sessions;
mod snapshot;
mod tables;
mod tasks;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod timers;
mod trouble;

use std::time::Duration;

use trainyard_common::error::Refusal;
use trainyard_common::ids::{AttemptRef, BundleRef, JobId, NodeId, TaskIndex, TokenId, UserName};
use trainyard_common::record::{
    AttemptRecord, BundleRecord, JobRecord, NodeRecord, TaskRecord, TokenRecord, UserRecord,
};
use trainyard_common::time::Timestamp;

pub use crate::config::Config;
use crate::effect::{Answer, Command, Effect};
use crate::enrol::TokenWish;
use crate::event::{Event, RequestKey};
use crate::jobs::Submission;
use crate::live::Live;
pub use crate::outbox::Outbox;
pub use crate::snapshot::{RememberedRequest, Snapshot};
use crate::tables::Tables;
pub use crate::timers::mass_loss;

/// The coordinator's state and everything it decides.
#[derive(Debug)]
pub struct Core {
    config: Config,
    t: Tables,
    live: Live,
    /// What is said at the end of this call, after the rows that explain it.
    later: Vec<Effect>,
    wants_schedule: bool,
}

impl Core {
    /// Starts from rows. Every lease begins anew at `now`: no node is lost because we were away.
    #[must_use]
    pub fn new(config: Config, snapshot: Snapshot, now: Timestamp) -> Self {
        let awaited = snapshot.awaited.clone();
        let mut core = Self {
            config,
            t: Tables::new(snapshot),
            live: Live::default(),
            later: Vec::new(),
            wants_schedule: false,
        };
        let nodes: Vec<NodeId> = core.t.nodes.keys().copied().collect();
        nodes
            .into_iter()
            .for_each(|node| core.weigh_silence(now, node));
        core.later.clear();
        core.live.shrunk = core.overused();
        core.restart_leases(now);
        core.await_nodes(now, awaited);
        core
    }

    /// Takes in one fact. Everything that follows from it is in `out` when this returns: first the rows to persist,
    /// then what is said.
    pub fn handle(&mut self, now: Timestamp, event: Event, out: &mut Outbox) {
        self.notice_pause(now);
        match event {
            Event::JobSubmitted {
                key,
                owner,
                request_id,
                request_digest,
                spec,
                allow_infeasible,
            } => {
                let new = Submission {
                    owner,
                    request_id,
                    digest: request_digest,
                    spec: *spec,
                    allow_infeasible,
                };
                let answer = self.on_submitted(now, new);
                self.reply(key, answer);
            }
            Event::CancelRequested { key, by, job } => {
                let answer = self.on_cancel(now, by, job);
                self.reply(key, answer);
            }
            Event::TokenRequested {
                key,
                by,
                secret_hash,
                grant,
                uses,
                ttl,
            } => {
                let answer = self.on_token_requested(
                    now,
                    TokenWish {
                        by,
                        secret_hash,
                        grant,
                        uses,
                        ttl,
                    },
                );
                self.reply(key, answer);
            }
            Event::TokenRevoked { key, token } => {
                let answer = self.on_token_revoked(token);
                self.reply(key, answer);
            }
            Event::NodeEnrolled {
                key,
                token,
                secret_hash,
                name,
            } => {
                let answer = self.on_node_enrolled(now, token, secret_hash, &name);
                self.reply(key, answer);
            }
            Event::UserEnrolled {
                key,
                token,
                secret_hash,
            } => {
                let answer = self.on_user_enrolled(now, token, secret_hash);
                self.reply(key, answer);
            }
            Event::LocalUserAdded { key, name, role } => {
                let answer = self.upsert_user(now, name, role);
                self.reply(key, Ok(answer));
            }
            Event::LocalNodeAdded {
                key,
                name,
                target,
                owner,
            } => {
                let answer = self.on_local_node(now, &name, target, owner);
                self.reply(key, answer);
            }
            Event::NodePolicySet {
                key,
                node,
                policy,
                by,
            } => {
                let answer = self.on_policy_set(node, policy, &by);
                self.reply(key, answer);
            }
            Event::NodeRemoved { key, node } => {
                let answer = self.on_node_removed(now, node);
                self.reply(key, answer);
            }
            Event::NodeConfirmedLost { key, node } => {
                let answer = self.on_confirmed_lost(now, node);
                self.reply(key, answer);
            }
            Event::AgentRegistered(registration) => self.on_registered(now, *registration),
            Event::MemberObserved {
                session,
                node,
                member,
            } => {
                self.on_observed(now, session, node, &member);
            }
            Event::BundleObserved {
                session,
                node,
                bundle,
            } => self.on_bundle_observed(now, session, node, &bundle),
            Event::HeartbeatReceived { session, node } => self.on_heartbeat(now, session, node),
            Event::GoodbyeSaid { session, node } => {
                if self.live.sessions.get(&node) == Some(&session) {
                    self.live.crashes.goodbye(node);
                }
            }
            Event::SessionEnded { session, node } => self.on_session_ended(session, node),
            Event::TimerFired => self.on_timer(now),
        }
        self.finish(now, out);
    }

    /// Runs one round of the scheduler. Asked for by [`Effect::RequestSchedule`]; harmless at any other time.
    pub fn schedule(&mut self, now: Timestamp, out: &mut Outbox) {
        self.round(now);
        self.finish(now, out);
    }

    /// The driver noticed that the whole process stood still for `length` until `now`. Nobody was silent meanwhile: no
    /// word could be heard. To be called before what came in since is handed in.
    pub fn stood_still(&mut self, now: Timestamp, length: Duration) {
        self.excuse(now, length);
        self.live.awaited.excuse(length);
    }

    /// When to hand in [`Event::TimerFired`] next. May be early, never late; changes with every call.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Timestamp> {
        self.live.next_deadline()
    }

    /// Holds every table against every other.
    ///
    /// # Errors
    /// A sentence for each thing that does not agree: a bug of ours.
    pub fn check(&self) -> Result<(), Vec<String>> {
        invariants::check(self)
    }

    /// A job that is not in a terminal state.
    #[must_use]
    pub fn job(&self, id: JobId) -> Option<&JobRecord> {
        self.t.jobs.get(&id)
    }

    /// A task of such a job that was placed and is not in a terminal state.
    #[must_use]
    pub fn task(&self, job: JobId, index: TaskIndex) -> Option<&TaskRecord> {
        self.t.tasks.get(&(job, index))
    }

    /// An attempt that is not `ENDED`.
    #[must_use]
    pub fn attempt(&self, id: AttemptRef) -> Option<&AttemptRecord> {
        self.t.attempts.get(&id)
    }

    /// A bundle that has not ended.
    #[must_use]
    pub fn bundle(&self, id: BundleRef) -> Option<&BundleRecord> {
        self.t.bundles.get(&id)
    }

    /// A node.
    #[must_use]
    pub fn node(&self, id: NodeId) -> Option<&NodeRecord> {
        self.t.nodes.get(&id)
    }

    /// A user.
    #[must_use]
    pub fn user(&self, name: &UserName) -> Option<&UserRecord> {
        self.t.users.get(name)
    }

    /// A join token.
    #[must_use]
    pub fn token(&self, id: TokenId) -> Option<&TokenRecord> {
        self.t.tokens.get(&id)
    }

    /// Jobs that are not in a terminal state, in the order of their ids.
    pub fn live_jobs(&self) -> impl Iterator<Item = &JobRecord> {
        self.t.jobs.values()
    }

    /// Attempts that are not `ENDED`, in the order of their ids.
    pub fn attempts(&self) -> impl Iterator<Item = &AttemptRecord> {
        self.t.attempts.values()
    }

    /// Bundles that have not ended, in the order of their ids.
    pub fn bundles(&self) -> impl Iterator<Item = &BundleRecord> {
        self.t.bundles.values()
    }

    /// Nodes in the order of their ids.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeRecord> {
        self.t.nodes.values()
    }

    fn reply(&mut self, key: RequestKey, answer: Result<Answer, Refusal>) {
        self.later.push(Effect::Reply(key, answer));
    }

    /// Tells a node's agent something, if it is in session; if not, it is told with the whole set when it comes back.
    fn send(&mut self, node: NodeId, command: Command) {
        if let Some(session) = self.live.sessions.get(&node) {
            self.later.push(Effect::Send(*session, command));
        }
    }

    /// Derives what is left to derive and writes the effects out: rows before words.
    fn finish(&mut self, now: Timestamp, out: &mut Outbox) {
        for job in std::mem::take(&mut self.t.touched) {
            self.derive_job(now, job);
        }
        self.t.flush(out);
        self.later.drain(..).for_each(|effect| out.push(effect));
        if std::mem::take(&mut self.wants_schedule) {
            out.push(Effect::RequestSchedule);
        }
    }
}
