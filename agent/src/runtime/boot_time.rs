//! Deadlines of the shim: points on the clock that counts from the machine's start, its sleep included, and that nobody
//! can set.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Time since the machine was booted; only differences mean something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BootTime(Duration);

impl BootTime {
    pub(crate) fn now() -> Self {
        clock_gettime(ClockId::CLOCK_BOOTTIME)
            .map(|time| Self(Duration::from(time)))
            .expect("Linux has had CLOCK_BOOTTIME since 2.6.39")
    }

    pub(crate) fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }

    /// How long it is from this to `later`; zero if that is earlier.
    pub(crate) fn until(self, later: Self) -> Duration {
        later.0.saturating_sub(self.0)
    }
}
