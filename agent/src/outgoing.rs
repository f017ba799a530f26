//! Reports on their way from the driver to the session. Only the newest of each member counts, so the driver never waits
//! and the memory is bounded by the number of members; reports of bundles are bounded by who makes them.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use trainyard_common::ids::AttemptRef;
use trainyard_common::member::ObservedMember;
use trainyard_proto::v1::agent_message::Message;

use crate::bundles::Lanes;

/// The newest report of each member that was not sent yet.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    reports: Mutex<BTreeMap<AttemptRef, ObservedMember>>,
    bundles: Mutex<Lanes>,
    news: Notify,
}

impl Outgoing {
    pub(crate) fn push(&self, report: ObservedMember) {
        self.lock().insert(report.attempt, report);
        self.news.notify_one();
    }

    /// The next message, members first.
    pub(crate) fn pop(&self) -> Option<Message> {
        if let Some((_, report)) = self.lock().pop_first() {
            return Some(Message::Observed((&report).into()));
        }
        let bundle = self.lanes().pop()?;
        Some(Message::ObservedBundle((&bundle).into()))
    }

    /// Looks at, or changes, what is to be told of bundles.
    pub(crate) fn bundles<T>(&self, change: impl FnOnce(&mut Lanes) -> T) -> T {
        let result = change(&mut self.lanes());
        self.news.notify_one();
        result
    }

    /// The whole set is about to be sent, so what waits is old.
    pub(crate) fn clear(&self) {
        self.lock().clear();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty() && self.lanes().is_empty()
    }

    /// Waits until something may have been pushed. Cancel-safe.
    pub(crate) async fn pushed(&self) {
        self.news.notified().await;
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.bundles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<AttemptRef, ObservedMember>> {
        // Every change above is complete before anything can panic.
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
