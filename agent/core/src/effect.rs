//! Requests that the core makes, as plain data in the imperative, and the box that collects them.

use trainyard_common::ids::AttemptRef;
use trainyard_common::member::{DesiredMember, Go, ObservedMember, Stop};

use crate::bundle::BundleEffect;

/// A request to the driver. Requests about one attempt are carried out in the order made; each but
/// [`Effect::CancelFetch`], [`Effect::Report`] and [`Effect::Note`] is answered by an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Make the attempt's directory, durably. Answered with `Accepted` or `AcceptFailed`.
    Accept(Box<DesiredMember>),
    /// Bring code and checkpoints into it. Answered with `FetchFinished` or `FetchFailed`.
    Fetch(AttemptRef),
    /// Give a fetch up soon; it is answered all the same.
    CancelFetch(AttemptRef),
    /// Start the attempt's one shim. Answered with `RuntimeReported` or `SpawnFailed`.
    SpawnShim(AttemptRef),
    /// Tell the shim to start the ranks. Answered with `RuntimeReported` or `GoFailed`.
    Go(AttemptRef, Go),
    /// Tell the shim to end them, or itself if there are none. Answered with `RuntimeReported` or `StopFailed`.
    StopRanks(AttemptRef, Stop),
    /// Bring logs, outputs and checkpoint to the coordinator. Answered with `UploadFinished` or `UploadFailed`.
    Upload {
        /// Which one.
        attempt: AttemptRef,
        /// Whether ranks ran; if none did there are logs at most.
        started: bool,
    },
    /// Tell the coordinator. Between sessions it can be dropped, as each begins with [`crate::Core::observed`].
    Report(ObservedMember),
    /// Delete the attempt's directory. Answered with `Removed` or `RemoveFailed`.
    Remove(AttemptRef),
    /// About a bundle.
    Bundle(BundleEffect),
    /// For the operator's log: something unexpected that was handled.
    Note {
        /// Which attempt.
        attempt: AttemptRef,
        /// What, in lower case and without a final period.
        text: String,
    },
}

/// Collects the requests of one event in order.
#[derive(Debug, Default)]
pub struct Outbox {
    effects: Vec<Effect>,
}

impl Outbox {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    pub(crate) fn push(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    pub(crate) fn note(&mut self, attempt: AttemptRef, text: impl Into<String>) {
        let text = text.into();
        self.push(Effect::Note { attempt, text });
    }

    /// Takes everything out, in the order in which it was requested.
    pub fn drain(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }
}
