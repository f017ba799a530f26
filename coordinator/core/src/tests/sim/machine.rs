//! A modelled machine: an agent with its incarnation, and the processes of its members, which outlive the agent. What
//! is here is the truth that the coordinator's view is held against.

use std::collections::BTreeMap;
use std::time::Duration;

use trainyard_common::ids::{AttemptRef, BundleRef, NodeId};
use trainyard_common::member::{
    Cleanup, DesiredMember, DesiredPhase, EndCause, Ending, MemberSpec, ObservedMember,
    ObservedPhase, RankEnd,
};
use trainyard_common::state::ExitStatus;
use trainyard_common::time::Timestamp;

use super::carrier::Carrier;

/// xorshift64*: small, seeded, and the same everywhere.
#[derive(Debug)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % bound
    }

    pub(super) fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    pub(super) fn seconds(&mut self, most: u64) -> Duration {
        Duration::from_millis(self.below(most * 1000 + 1))
    }
}

/// A member as it really is.
#[derive(Debug, Clone)]
pub(super) struct Member {
    pub(super) spec: MemberSpec,
    pub(super) phase: ObservedPhase,
    /// When it moves on by itself.
    pub(super) next: Option<Timestamp>,
    /// How it will end by itself.
    pub(super) fate: EndCause,
    pub(super) started: bool,
    /// It may start as soon as it is ready. Forgotten with the agent's process.
    pub(super) goes: bool,
}

impl Member {
    /// Whether processes of it exist.
    pub(super) fn lives(&self) -> bool {
        match self.phase {
            ObservedPhase::Running { .. } | ObservedPhase::CleanupPending(_) => true,
            ObservedPhase::Stopping => self.started,
            ObservedPhase::Preparing
            | ObservedPhase::Ready { .. }
            | ObservedPhase::Uploading(_)
            | ObservedPhase::Ended(_) => false,
        }
    }

    fn go(&mut self, now: Timestamp, rng: &mut Rng) {
        self.phase = ObservedPhase::Running { started_at: now };
        self.started = true;
        // Some run for so long that a silent node is given up while they do.
        let longest = if rng.chance(250) { 150 } else { 20 };
        self.next = Some(now.after(rng.seconds(longest)));
        self.fate = match rng.below(100) {
            0..80 => EndCause::Completed,
            80..92 => EndCause::RankFailed,
            92..95 => EndCause::TimeLimit,
            _ => EndCause::SupervisorLost,
        };
    }
}

#[derive(Debug)]
pub(super) struct Machine {
    pub(super) node: NodeId,
    pub(super) incarnation: u64,
    pub(super) boot: u64,
    pub(super) members: BTreeMap<AttemptRef, Member>,
    pub(super) carriers: BTreeMap<BundleRef, Carrier>,
}

/// What an agent did with a command.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Did {
    Nothing,
    Changed,
    Spawned,
}

impl Machine {
    pub(super) fn observed(&self) -> Vec<ObservedMember> {
        self.members
            .iter()
            .map(|(id, member)| seen(*id, member))
            .collect()
    }

    pub(super) fn desire(&mut self, now: Timestamp, desired: &DesiredMember, rng: &mut Rng) -> Did {
        let id = desired.attempt;
        let Some(member) = self.members.get_mut(&id) else {
            return self.accept(now, desired, rng);
        };
        match (&desired.phase, &member.phase) {
            (DesiredPhase::Run(_), ObservedPhase::Ready { .. }) => {
                member.go(now, rng);
                Did::Spawned
            }
            (DesiredPhase::Start, ObservedPhase::Ready { .. }) => {
                member.goes = true;
                member.next = Some(now);
                Did::Nothing
            }
            (DesiredPhase::Start, ObservedPhase::Preparing) => {
                member.goes = true;
                Did::Nothing
            }
            (
                DesiredPhase::Stop(_),
                ObservedPhase::Preparing
                | ObservedPhase::Ready { .. }
                | ObservedPhase::Running { .. },
            ) => {
                member.goes = false;
                member.fate = EndCause::Stopped;
                member.phase = ObservedPhase::Stopping;
                member.next = Some(now.after(rng.seconds(10)));
                Did::Changed
            }
            _ => Did::Nothing,
        }
    }

    fn accept(&mut self, now: Timestamp, desired: &DesiredMember, rng: &mut Rng) -> Did {
        let phase = match desired.phase {
            DesiredPhase::Prepare | DesiredPhase::Start => ObservedPhase::Preparing,
            DesiredPhase::Stop(_) => ObservedPhase::Stopping,
            DesiredPhase::Run(_) => {
                panic!("{} was told to go and was never ready", desired.attempt)
            }
        };
        let (fate, next) = match (&desired.phase, rng.below(100)) {
            (DesiredPhase::Stop(_), _) => (EndCause::Stopped, Some(now)),
            (_, 0..5) => (EndCause::PrepareFailed, Some(now.after(rng.seconds(3)))),
            (_, 5..7) => (EndCause::CannotExecute, Some(now.after(rng.seconds(3)))),
            (_, 7..9) => (EndCause::Completed, None), // Hangs.
            _ => (EndCause::Completed, Some(now.after(rng.seconds(3)))),
        };
        let member = Member {
            spec: desired.spec.clone(),
            phase,
            next,
            fate,
            started: false,
            goes: desired.phase == DesiredPhase::Start,
        };
        self.members.insert(desired.attempt, member);
        Did::Changed
    }

    /// Moves every member on that is due. Gives those that changed.
    pub(super) fn step(&mut self, now: Timestamp, rng: &mut Rng) -> Vec<AttemptRef> {
        let mut changed = Vec::new();
        for (id, member) in &mut self.members {
            if member.next.is_none_or(|next| next > now) {
                continue;
            }
            member.next = None;
            member.phase = match &member.phase {
                ObservedPhase::Preparing if member.fate == EndCause::Completed => {
                    if member.goes {
                        member.next = Some(now.after(rng.seconds(1)));
                    }
                    ObservedPhase::Ready { port: 4000 }
                }
                ObservedPhase::Ready { .. } if member.goes => {
                    member.go(now, rng);
                    changed.push(*id);
                    continue;
                }
                ObservedPhase::Running { .. } | ObservedPhase::Stopping
                    if member.started && rng.below(100) < 10 =>
                {
                    member.next = Some(now.after(rng.seconds(60)));
                    ObservedPhase::CleanupPending(Cleanup {
                        ending: end(now, member, rng),
                        left: Vec::new(),
                        more: 1,
                    })
                }
                // How its ranks ended is on record.
                ObservedPhase::CleanupPending(cleanup) => {
                    member.next = Some(now.after(rng.seconds(3)));
                    ObservedPhase::Uploading(cleanup.ending.clone())
                }
                ObservedPhase::Preparing
                | ObservedPhase::Running { .. }
                | ObservedPhase::Stopping => {
                    member.next = Some(now.after(rng.seconds(3)));
                    ObservedPhase::Uploading(end(now, member, rng))
                }
                ObservedPhase::Uploading(ending) => ObservedPhase::Ended(ending.clone()),
                ObservedPhase::Ready { .. } | ObservedPhase::Ended(_) => continue,
            };
            changed.push(*id);
        }
        changed
    }

    /// The agent's process is replaced. Its members live on, and it has no orders.
    pub(super) fn restart(&mut self) {
        self.incarnation += 1;
        self.members
            .values_mut()
            .for_each(|member| member.goes = false);
    }

    /// The power fails and comes back: nothing lives, and what had started has no exit status.
    pub(super) fn reboot(&mut self, now: Timestamp, rng: &mut Rng) {
        self.boot += 1;
        self.incarnation += 1;
        for member in self.members.values_mut() {
            match &member.phase {
                ObservedPhase::Ended(_) => continue,
                ObservedPhase::Uploading(ending) => {
                    member.phase = ObservedPhase::Ended(ending.clone());
                }
                ObservedPhase::Preparing
                | ObservedPhase::Ready { .. }
                | ObservedPhase::Running { .. }
                | ObservedPhase::CleanupPending(_)
                | ObservedPhase::Stopping => {
                    member.fate = EndCause::NodeRebooted;
                    member.phase = ObservedPhase::Ended(end(now, member, rng));
                }
            }
            member.next = None;
        }
        self.reboot_bundles(now);
    }
}

pub(super) fn seen(id: AttemptRef, member: &Member) -> ObservedMember {
    ObservedMember {
        attempt: id,
        node_rank: member.spec.node_rank,
        phase: member.phase.clone(),
    }
}

fn end(now: Timestamp, member: &Member, rng: &mut Rng) -> Ending {
    let ranks = member.spec.supervised_ranks();
    let failing =
        ranks.start + u32::try_from(rng.below(u64::from(ranks.end - ranks.start))).unwrap();
    let exit = |rank: u32| match member.fate {
        EndCause::Completed => ExitStatus::Code(0),
        EndCause::RankFailed if rank == failing => ExitStatus::Code(1),
        EndCause::RankFailed | EndCause::Stopped | EndCause::TimeLimit | EndCause::LeaseExpired => {
            ExitStatus::Signal(15)
        }
        EndCause::SupervisorLost
        | EndCause::NodeRebooted
        | EndCause::PrepareFailed
        | EndCause::CannotExecute => ExitStatus::Unknown,
    };
    let ends = ranks.map(|rank| RankEnd {
        rank,
        exit: exit(rank),
        at: now,
        unprompted: rank == failing && member.fate == EndCause::RankFailed,
        oom_killed: false,
    });
    Ending {
        cause: member.fate,
        message: String::new(),
        started: member.started,
        ranks: if member.started {
            ends.collect()
        } else {
            Vec::new()
        },
        ended_at: now,
        outputs: None,
        checkpoint: None,
        warning: String::new(),
    }
}
