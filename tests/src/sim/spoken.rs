//! What is said to clients and agents, held against what is on record. It must not know how it came to be said.

use trainyard_common::error::Refusal;
use trainyard_common::ids::Digest;
use trainyard_common::member::{DesiredMember, DesiredPhase};
use trainyard_common::state::{AttemptState, Outcome};
use trainyard_coordinator_core::effect::{Answer, Command};

use super::users::Ask;
use super::world::World;

impl World {
    pub(crate) fn check_answer(&mut self, call: u64, answer: &Result<Answer, Refusal>) {
        let Some(ask) = self.users.ask(call) else {
            return;
        };
        match (ask, answer) {
            (Ask::Submit { request, .. }, Ok(Answer::Submitted { job, repeated })) => {
                let digest = ask_digest(self.users.ask(call));
                self.see(if *repeated {
                    "submit repeated"
                } else {
                    "submit accepted"
                });
                let there = self.typed().jobs.contains_key(job);
                self.holds("I5", there, || {
                    format!("{job} is accepted and not on record")
                });
                let first = *self
                    .oracle
                    .accepted
                    .entry(request)
                    .or_insert((digest, *job));
                self.holds("I6", first == (digest, *job), || {
                    format!(
                        "request {request} made {} and {job}, or with another body",
                        first.1
                    )
                });
                self.oracle.acked.insert(*job);
            }
            (Ask::Submit { .. }, Err(refusal)) if refusal.reason == "REQUEST_ID_REUSED" => {
                self.see("request id with another body refused");
            }
            (Ask::Cancel { job, .. }, Ok(Answer::Cancelled(_))) => {
                let row = self.typed().jobs.get(&job);
                let noted = row.is_some_and(|job| job.cancel.is_some() || job.state.is_terminal());
                self.holds("I11", noted, || {
                    format!("the cancel of {job} is not on record")
                });
                self.see("cancel answered");
                self.oracle.cancelled.insert(job);
            }
            _ => {}
        }
    }

    pub(crate) fn check_command(&mut self, conn: u64, command: &Command) {
        match command {
            Command::Welcome { desired, bundles } => {
                self.check_welcome(conn);
                if let Some(conn) = self.conns.get_mut(&conn) {
                    conn.welcomed = true;
                }
                for member in desired {
                    self.check_desired(conn, member);
                }
                for bundle in bundles {
                    self.check_desired_bundle(conn, bundle);
                }
            }
            Command::Desire(member) => self.check_desired(conn, member),
            Command::Forget(attempt) => {
                let state = self.typed().attempts.get(attempt).map(|row| row.state);
                let over = state.is_none_or(|state| state == AttemptState::Ended);
                self.holds("I11", over, || {
                    format!("{attempt} is to be forgotten and is {state:?}")
                });
            }
            Command::DesireBundle(bundle) => self.check_desired_bundle(conn, bundle),
            Command::ForgetBundle(bundle) => self.check_forget_bundle(*bundle),
            Command::Resync(_) => self.see("gap in the reports of a bundle"),
        }
    }

    fn check_desired(&mut self, conn: u64, desired: &DesiredMember) {
        let id = desired.attempt;
        let row = self.typed().attempts.get(&id).cloned();
        let rank = usize::try_from(desired.spec.node_rank).unwrap_or(usize::MAX);
        let node = self.oracle.certificates.get(&conn).copied();
        match (&desired.phase, row) {
            (DesiredPhase::Stop(_), None) => {}
            (DesiredPhase::Stop(_), Some(row)) => {
                let stopped = row.outcome.is_some() || row.state.is_over();
                self.holds("I11", stopped, || {
                    format!("{id} is to stop and that is not on record")
                });
            }
            (_, None) => self.breaks("I11", format!("{id} is wanted and not on record")),
            (phase, Some(row)) => {
                // A connection that is over has no certificate any more.
                let there = row.members.get(rank).map(|member| member.node) == node;
                self.holds("I18", there || node.is_none(), || {
                    format!("{id} is wanted on another node than its own")
                });
                // A word that was due before the decision may come with it.
                let uploads = row.outcome == Some(Outcome::Succeeded);
                let goes_on =
                    row.outcome.is_none() || uploads || self.oracle.duties.decided.contains(&id);
                self.holds("I8", goes_on, || {
                    format!("{id} is wanted and is decided: {:?}", row.outcome)
                });
                if let DesiredPhase::Run(_) = phase {
                    self.holds("I11", row.ready_at.is_some(), || {
                        format!("{id} is to go and that is not on record")
                    });
                }
            }
        }
    }
}

fn ask_digest(ask: Option<Ask>) -> Digest {
    match ask {
        Some(Ask::Submit { request, body, .. }) => super::users::digest(request, body),
        _ => Digest([0; 32]),
    }
}
