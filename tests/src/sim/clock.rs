//! Time: one true time in microseconds that nobody in the world can read, and the clocks of machines, which drift and
//! whose wall time jumps. A process makes timestamps as the real drivers do: wall time at its start and what its
//! machine's monotonic clock counted since then.

use std::time::Duration;

use trainyard_common::time::{Timestamp, millis};

/// True time.
pub(crate) type Micros = u64;

pub(crate) const fn ms(count: u64) -> Micros {
    count * 1000
}

pub(crate) const fn secs(count: u64) -> Micros {
    count * 1_000_000
}

pub(crate) fn micros(duration: Duration) -> Micros {
    millis(duration).saturating_mul(1000)
}

/// What every wall clock would show at true time 0 if it were right.
const EPOCH_MS: u64 = 1_700_000_000_000;
/// Drifts are in millionths.
const MILLION: i128 = 1_000_000;

/// The clock of a machine.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct HostClock {
    /// How much faster than true time it runs.
    pub(crate) drift_ppm: i64,
    /// How far its wall time is off.
    pub(crate) offset_ms: i64,
}

impl HostClock {
    fn monotonic(self, now: Micros) -> Micros {
        let true_time = i128::from(now);
        let counted = true_time + true_time * i128::from(self.drift_ppm) / MILLION;
        u64::try_from(counted).unwrap_or_default()
    }

    pub(crate) fn wall(self, now: Micros) -> Timestamp {
        let right = EPOCH_MS + self.monotonic(now) / 1000;
        Timestamp(right.saturating_add_signed(self.offset_ms))
    }

    /// The clock of a process that starts now.
    pub(crate) fn start(self, now: Micros) -> ProcessClock {
        ProcessClock {
            host: self,
            wall: self.wall(now),
            since: self.monotonic(now),
        }
    }
}

/// The clock of one process: never jumps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ProcessClock {
    host: HostClock,
    wall: Timestamp,
    since: Micros,
}

impl ProcessClock {
    pub(crate) fn now(self, now: Micros) -> Timestamp {
        let counted = self.host.monotonic(now).saturating_sub(self.since);
        Timestamp(self.wall.0 + counted / 1000)
    }

    /// What this clock counts while so much true time passes.
    pub(crate) fn passed(self, length: Micros) -> Duration {
        let length = i128::from(length);
        let counted = length + length * i128::from(self.host.drift_ppm) / MILLION;
        Duration::from_micros(u64::try_from(counted).unwrap_or_default())
    }

    /// The true time at which this clock shows `at`, not before `now`.
    pub(crate) fn when(self, now: Micros, at: Timestamp) -> Micros {
        let wait = i128::from(micros(at.since(self.now(now))));
        let true_wait = wait * MILLION / (MILLION + i128::from(self.host.drift_ppm));
        // One millisecond more, so that rounding never makes it early.
        now + u64::try_from(true_wait).unwrap_or_default() + if wait > 0 { 1000 } else { 0 }
    }
}
