//! When a user was last served, so that a coordinator that was started for one user's jobs can leave when idle.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use trainyard_common::time::Timestamp;

use trainyard_transport::clock::Clock;

/// Requests of users, open and past.
#[derive(Debug)]
pub(crate) struct Activity {
    clock: Clock,
    open: AtomicUsize,
    last: AtomicU64,
}

impl Activity {
    pub(crate) fn new(clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            clock,
            open: AtomicUsize::new(0),
            last: AtomicU64::new(clock.now().0),
        })
    }

    /// Counts a request until the guard and its clones are dropped.
    pub(crate) fn begin(self: &Arc<Self>) -> ActivityGuard {
        self.open.fetch_add(1, Ordering::SeqCst);
        ActivityGuard(Arc::new(Open(self.clone())))
    }

    /// Requests that are open.
    pub(crate) fn open_requests(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }

    /// How long no request of a user was open.
    pub(crate) fn idle(&self) -> Duration {
        if self.open_requests() > 0 {
            return Duration::ZERO;
        }
        self.clock
            .now()
            .since(Timestamp(self.last.load(Ordering::SeqCst)))
    }
}

/// An open request of a user. A service whose answer is a stream keeps a clone as long as the stream lives.
#[derive(Debug, Clone)]
pub(crate) struct ActivityGuard(#[expect(dead_code, reason = "held for its drop")] Arc<Open>);

#[derive(Debug)]
struct Open(Arc<Activity>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.last.store(self.0.clock.now().0, Ordering::SeqCst);
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}
