//! Points in time as plain numbers. Whoever owns a clock makes them; nothing here reads one.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Unix time in milliseconds.
///
/// A driver makes it as its wall clock at process start plus the boot-time clock's progress since then, so that within
/// one process it never jumps and differences are real durations.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// The later point, at most the largest representable one.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(millis(duration)))
    }

    /// How long ago `earlier` was; zero if it lies in the future.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// A duration in whole milliseconds, at most the largest representable one.
#[must_use]
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
