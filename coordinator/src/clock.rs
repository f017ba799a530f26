//! The driver's clock: the wall clock at the process's start plus the boot-time clock's progress since then. So it never
//! jumps when somebody sets the time, and it counts on while the machine sleeps.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use trainyard_common::time::{Timestamp, millis};

/// A clock; copies agree with each other.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    wall: Timestamp,
    boot: Duration,
}

impl Clock {
    /// A clock that agrees with the wall clock now.
    #[must_use]
    pub fn start() -> Self {
        let wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            wall: Timestamp(millis(wall)),
            boot: since_boot(),
        }
    }

    /// The time now.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.wall.after(since_boot().saturating_sub(self.boot))
    }
}

fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map(Duration::from)
        .expect("Linux has had CLOCK_BOOTTIME since 2.6.39")
}
