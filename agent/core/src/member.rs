//! One member: what is wanted of it, where it is, and how that looks to the coordinator.
//!
//! It knows nothing of other members; whether they allow a step is decided in `core`.

use std::time::Duration;

use trainyard_common::ids::AttemptRef;
use trainyard_common::member::{
    Cleanup, DesiredMember, DesiredPhase, EndCause, Ending, Go, MemberSpec, ObservedMember,
    ObservedPhase, Stop,
};
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::state::ReasonCode;
use trainyard_common::time::Timestamp;

use crate::backoff::Backoff;
use crate::event::{RecoveredMember, RecoveredState, RuntimeState, Uploaded};

/// What the coordinator wants of a member. Never goes back from stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Want {
    /// It did not say: the member is left alone.
    Nothing,
    Prepare,
    /// As soon as it is ready: it is the only member.
    Start,
    Run(Go),
    Stop(Stop),
}

/// Where a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stage {
    /// An older attempt of its task has processes here; nothing of this one is on disk.
    Waiting,
    /// Its directory is being made.
    Accepting,
    Fetching {
        /// It was told to give up.
        cancelled: bool,
    },
    /// Its shim was started and has not said anything.
    Starting,
    Ready {
        port: u16,
    },
    Running {
        started_at: Timestamp,
    },
    Stopping,
    /// Everything was killed, and some processes outlive it.
    CleanupPending(Cleanup),
    /// No process is left.
    Uploading {
        ending: Ending,
        /// An upload is under way.
        busy: bool,
    },
    Ended(Ending),
    /// The coordinator has its end on record.
    Removing {
        ending: Ending,
        /// A removal is under way.
        busy: bool,
    },
}

/// A member that this agent knows.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) attempt: AttemptRef,
    /// As first accepted.
    pub(crate) spec: MemberSpec,
    pub(crate) want: Want,
    pub(crate) stage: Stage,
    /// Whether a directory was, or may have been, made.
    pub(crate) on_disk: bool,
    pub(crate) go_sent: bool,
    pub(crate) stop_sent: Option<Stop>,
    /// Its preparation was cut short by the end of an earlier agent process; the stop is ours.
    pub(crate) abandoned: bool,
    /// Of the one request that this stage makes.
    pub(crate) backoff: Backoff,
    /// What the coordinator was last told, or will be.
    pub(crate) reported: Option<ObservedPhase>,
}

impl Member {
    /// One that the coordinator wants for the first time.
    pub(crate) fn new(desired: DesiredMember, stage: Stage) -> Self {
        Self {
            attempt: desired.attempt,
            want: want(desired.phase, &desired.spec),
            spec: desired.spec,
            stage,
            on_disk: false,
            go_sent: false,
            stop_sent: None,
            abandoned: false,
            backoff: Backoff::default(),
            reported: None,
        }
    }

    /// One that an earlier agent process accepted.
    pub(crate) fn recovered(recovered: RecoveredMember, now: Timestamp) -> Self {
        let (stage, abandoned) = match recovered.state {
            // Its fetch is half done, and its shim may or may not be about to say its first word. It holds no go, so
            // nothing of the job runs; but to prepare it again could make a second shim. So it is ended.
            RecoveredState::Accepted => (Stage::Starting, true),
            RecoveredState::Shim(state) => (Stage::of(state), false),
        };
        let mut member = Self {
            on_disk: true,
            want: Want::Nothing,
            abandoned,
            ..Self::new(recovered.member, stage)
        };
        if abandoned {
            member.want = Want::Stop(Stop {
                code: ReasonCode::PrepareFailed,
                grace: Duration::ZERO,
            });
            member.backoff = Backoff::due(now);
        }
        if let Some(uploaded) = recovered.uploaded {
            member.finish_upload(uploaded);
        }
        member
    }

    /// Whether it has, or is about to have, something on this node that another must not have at the same time.
    pub(crate) fn is_live(&self) -> bool {
        match self.stage {
            Stage::Accepting
            | Stage::Fetching { .. }
            | Stage::Starting
            | Stage::Ready { .. }
            | Stage::Running { .. }
            | Stage::Stopping
            | Stage::CleanupPending(_) => true,
            Stage::Waiting | Stage::Uploading { .. } | Stage::Ended(_) | Stage::Removing { .. } => {
                false
            }
        }
    }

    /// Takes what the coordinator wants now, if it goes forward.
    pub(crate) fn wish(&mut self, phase: DesiredPhase) {
        let new = want(phase, &self.spec);
        let forward = match (&self.want, &new) {
            (Want::Stop(_), Want::Nothing | Want::Prepare | Want::Start | Want::Run(_))
            | (Want::Run(_), Want::Nothing | Want::Prepare | Want::Start)
            | (Want::Start, Want::Nothing | Want::Prepare) => planted(Mutation::StopTakenBack),
            (Want::Nothing | Want::Prepare, _)
            | (_, Want::Stop(_))
            | (Want::Start, Want::Start | Want::Run(_))
            | (Want::Run(_), Want::Run(_)) => true,
        };
        if forward && self.want != new {
            self.want = new;
            // What failed is another request than what is asked now.
            self.backoff = Backoff::default();
        }
    }

    /// The coordinator's whole set does not name it.
    pub(crate) fn unwish(&mut self) {
        match self.want {
            Want::Nothing | Want::Prepare | Want::Start | Want::Run(_) => self.want = Want::Nothing,
            Want::Stop(_) => {}
        }
    }

    pub(crate) fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        self.backoff = Backoff::default();
    }

    /// Every process is gone, or there never was one.
    pub(crate) fn end(&mut self, ending: Ending) {
        let stage = match self.on_disk {
            true => Stage::uploading(ending),
            false => Stage::Ended(ending),
        };
        self.enter(stage);
    }

    /// Everything that was to be uploaded is.
    pub(crate) fn finish_upload(&mut self, uploaded: Uploaded) {
        let Stage::Uploading { ending, .. } = &mut self.stage else {
            return;
        };
        let mut ending = ending.clone();
        uploaded.complete(&mut ending);
        self.enter(match planted(Mutation::RemovedUnrecorded) {
            true => Stage::Removing {
                ending,
                busy: false,
            },
            false => Stage::Ended(ending),
        });
    }

    /// What its shim said; whether that was news. A shim's life goes one way, so older news is nothing.
    pub(crate) fn hear(&mut self, state: RuntimeState) -> bool {
        let Some(place) = self.stage.shim_place() else {
            return false;
        };
        let stage = Stage::of(state);
        // What is left may become less.
        let again = matches!(stage, Stage::CleanupPending(_)) && stage != self.stage;
        if stage
            .shim_place()
            .is_some_and(|new| new < place || (new == place && !again))
        {
            return false;
        }
        if matches!(self.stage, Stage::CleanupPending(_)) && again {
            self.stage = stage;
            return true;
        }
        self.enter(stage);
        self.own_up();
        true
    }

    /// The stop of an abandoned member is not the coordinator's.
    fn own_up(&mut self) {
        if let Stage::Uploading { ending, .. } = &mut self.stage
            && self.abandoned
            && !ending.started
        {
            let text = "the agent was restarted before the member was ready";
            *ending = not_started(EndCause::PrepareFailed, text, ending.ended_at);
        }
    }

    /// How it looks to the coordinator. Its end is told for as long as its directory is there: a coordinator with a restored
    /// state does not know of it, and must not give its number to another attempt.
    pub(crate) fn observed(&self) -> ObservedMember {
        let stopping = self.is_live() && matches!(self.want, Want::Stop(_));
        let phase = match &self.stage {
            Stage::CleanupPending(cleanup) => ObservedPhase::CleanupPending(cleanup.clone()),
            _ if stopping => ObservedPhase::Stopping,
            Stage::Waiting | Stage::Accepting | Stage::Fetching { .. } | Stage::Starting => {
                ObservedPhase::Preparing
            }
            Stage::Stopping => ObservedPhase::Stopping,
            Stage::Ready { port } => ObservedPhase::Ready { port: *port },
            Stage::Running { started_at } => ObservedPhase::Running {
                started_at: *started_at,
            },
            Stage::Uploading { ending, .. } => ObservedPhase::Uploading(ending.clone()),
            Stage::Ended(ending) | Stage::Removing { ending, .. } => {
                ObservedPhase::Ended(ending.clone())
            }
        };
        ObservedMember {
            attempt: self.attempt,
            node_rank: self.spec.node_rank,
            phase,
        }
    }
}

impl Stage {
    fn of(state: RuntimeState) -> Self {
        match state {
            RuntimeState::Ready { port } => Self::Ready { port },
            RuntimeState::Running { started_at } => Self::Running { started_at },
            RuntimeState::Stopping => Self::Stopping,
            RuntimeState::CleanupPending(cleanup) => Self::CleanupPending(cleanup),
            RuntimeState::Gone(ending) => Self::uploading(ending),
        }
    }

    fn uploading(ending: Ending) -> Self {
        Self::Uploading {
            ending,
            busy: false,
        }
    }

    /// How far a shim is, while there is one.
    fn shim_place(&self) -> Option<u8> {
        match self {
            Self::Starting => Some(0),
            Self::Ready { .. } => Some(1),
            Self::Running { .. } => Some(2),
            Self::Stopping => Some(3),
            Self::CleanupPending(_) => Some(4),
            Self::Waiting
            | Self::Accepting
            | Self::Fetching { .. }
            | Self::Uploading { .. }
            | Self::Ended(_)
            | Self::Removing { .. } => None,
        }
    }
}

fn want(phase: DesiredPhase, spec: &MemberSpec) -> Want {
    match phase {
        DesiredPhase::Start if spec.nodes == 1 => Want::Start,
        DesiredPhase::Prepare if planted(Mutation::GangMemberStartsAlone) => Want::Start,
        // One of several must be told when all of them are ready, whatever else it was told.
        DesiredPhase::Prepare | DesiredPhase::Start => Want::Prepare,
        DesiredPhase::Run(go) => Want::Run(go),
        DesiredPhase::Stop(stop) => Want::Stop(stop),
    }
}

/// The end of a member of which nothing was started.
pub(crate) fn not_started(cause: EndCause, message: impl Into<String>, now: Timestamp) -> Ending {
    Ending {
        cause,
        message: message.into(),
        started: false,
        ranks: Vec::new(),
        ended_at: now,
        outputs: None,
        checkpoint: None,
        warning: String::new(),
    }
}

/// The end of a member that may have run here and of which nothing is known any more.
pub(crate) fn unaccounted(message: impl Into<String>, now: Timestamp) -> Ending {
    Ending {
        started: true,
        ..not_started(EndCause::SupervisorLost, message, now)
    }
}
