//! Reports on their way from the driver to the session. Only the newest of each member counts, so the driver never waits
//! and the memory is bounded by the number of members.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use trainyard_common::ids::AttemptRef;
use trainyard_common::member::ObservedMember;

/// The newest report of each member that was not sent yet.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    reports: Mutex<BTreeMap<AttemptRef, ObservedMember>>,
    news: Notify,
}

impl Outgoing {
    pub(crate) fn push(&self, report: ObservedMember) {
        self.lock().insert(report.attempt, report);
        self.news.notify_one();
    }

    pub(crate) fn pop(&self) -> Option<ObservedMember> {
        self.lock().pop_first().map(|(_, report)| report)
    }

    /// The whole set is about to be sent, so what waits is old.
    pub(crate) fn clear(&self) {
        self.lock().clear();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Waits until something may have been pushed. Cancel-safe.
    pub(crate) async fn pushed(&self) {
        self.news.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<AttemptRef, ObservedMember>> {
        // Every change above is complete before anything can panic.
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
