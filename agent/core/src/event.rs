//! Facts that the core is told, in the past tense, by the session, the runtime and the drivers of fetches and uploads.
//! Any of them may come twice, late or in an order that makes no sense; the core must stay right.

use trainyard_common::ids::{AttemptRef, Digest};
use trainyard_common::member::{Cleanup, DesiredMember, Ending};
use trainyard_common::time::Timestamp;

use crate::bundle::BundleEvent;

/// A fact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A session began; this is everything that the coordinator wants here.
    Connected {
        /// The complete desired set.
        desired: Vec<DesiredMember>,
    },
    /// The coordinator wants one member, or wants it differently.
    DesiredChanged(Box<DesiredMember>),
    /// The end of this attempt is on the coordinator's record.
    ForgetRequested(AttemptRef),
    /// The session is over.
    Disconnected,
    /// The attempt's directory was made and is durable.
    Accepted(AttemptRef),
    /// It could not be made.
    AcceptFailed {
        /// Which one.
        attempt: AttemptRef,
        /// It was there already, so this attempt was accepted before.
        exists: bool,
        /// Why, without a final period.
        error: String,
    },
    /// Code and checkpoints are in place.
    FetchFinished(AttemptRef),
    /// They cannot be brought here, and trying again here would not help; also the answer to a cancelled fetch.
    FetchFailed {
        /// Which one.
        attempt: AttemptRef,
        /// Why, without a final period.
        error: String,
        /// Whose fault.
        fault: Fault,
    },
    /// No shim could be started; there is no process of this attempt.
    SpawnFailed {
        /// Which one.
        attempt: AttemptRef,
        /// Why, without a final period.
        error: String,
    },
    /// The go could not be handed to the shim.
    GoFailed {
        /// Which one.
        attempt: AttemptRef,
        /// Why, without a final period.
        error: String,
    },
    /// The stop could not be handed to the shim.
    StopFailed {
        /// Which one.
        attempt: AttemptRef,
        /// Why, without a final period.
        error: String,
    },
    /// A shim said where it is, or was found dead.
    RuntimeReported {
        /// Which one.
        attempt: AttemptRef,
        /// Where it is.
        state: RuntimeState,
    },
    /// Logs, outputs and checkpoint are with the coordinator, or never will be.
    UploadFinished {
        /// Which one.
        attempt: AttemptRef,
        /// What was uploaded.
        uploaded: Uploaded,
    },
    /// Not yet; trying again may help.
    UploadFailed {
        /// Which one.
        attempt: AttemptRef,
        /// Why, without a final period.
        error: String,
    },
    /// The attempt's directory is gone.
    Removed(AttemptRef),
    /// It could not be removed.
    RemoveFailed {
        /// Which one.
        attempt: AttemptRef,
        /// Why, without a final period.
        error: String,
    },
    /// About a bundle.
    Bundle(BundleEvent),
    /// The time of [`crate::Core::next_deadline`] has come.
    TimerFired,
}

/// Whose fault a failed fetch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The node's, the network's or the coordinator's: another attempt may succeed.
    Infrastructure,
    /// The job's: what it wants fetched cannot be used anywhere.
    Job,
}

/// Where a shim is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuntimeState {
    /// It holds `port` and waits to go.
    Ready {
        /// Held for the rendezvous.
        port: u16,
    },
    /// Its ranks run.
    Running {
        /// When they were started.
        started_at: Timestamp,
    },
    /// Its ranks are being ended.
    Stopping,
    /// Everything was killed some seconds ago, and this is left all the same.
    CleanupPending(Cleanup),
    /// Every process of the attempt is gone. `outputs` and `checkpoint` are not known yet.
    Gone(Ending),
}

/// What an upload brought to the coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Uploaded {
    /// The tree of outputs, if there were any.
    pub outputs: Option<Digest>,
    /// The tree of the checkpoint, if there was one.
    pub checkpoint: Option<Digest>,
    /// What could not be uploaded and why, without a final period.
    pub warning: Option<String>,
}

impl Uploaded {
    /// Puts it into the end of what was uploaded. A warning that the end came with stays in front.
    pub fn complete(self, ending: &mut Ending) {
        ending.outputs = self.outputs;
        ending.checkpoint = self.checkpoint;
        if let Some(warning) = self.warning {
            if !ending.warning.is_empty() {
                ending.warning.push_str("; ");
            }
            ending.warning.push_str(&warning);
        }
    }
}

/// A member that was found on disk when the agent started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveredMember {
    /// The attempt and how it is started, as accepted. The phase counts for nothing.
    pub member: DesiredMember,
    /// Where it is.
    pub state: RecoveredState,
    /// What an earlier agent process had finished uploading.
    pub uploaded: Option<Uploaded>,
}

/// Where a recovered member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecoveredState {
    /// Its directory was made, and no shim has told of itself.
    Accepted,
    /// What its shim said last.
    Shim(RuntimeState),
}
