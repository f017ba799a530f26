//! The clocks of the drivers: one for facts, which never jumps within a process; the machine's own since its boot, for
//! deadlines; and the wall clock, which certificates go by.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use trainyard_common::time::{Timestamp, millis};

/// The wall clock at its start plus the boot-time clock's progress since then. So it never jumps when somebody sets the
/// time, and it counts on while the machine sleeps. Copies agree with each other.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    wall: Timestamp,
    boot: BootTime,
}

impl Clock {
    /// A clock that agrees with the wall clock now.
    #[must_use]
    pub fn start() -> Self {
        Self {
            wall: wall_now(),
            boot: BootTime::now(),
        }
    }

    /// The time now.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.wall.after(self.boot.until(BootTime::now()))
    }
}

/// Time since the machine was booted, its sleep included, which nobody can set; only differences mean something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(Duration);

impl BootTime {
    /// The time now.
    #[must_use]
    pub fn now() -> Self {
        clock_gettime(ClockId::CLOCK_BOOTTIME)
            .map(|time| Self(Duration::from(time)))
            .expect("Linux has had CLOCK_BOOTTIME since 2.6.39")
    }

    /// The time at which the machine was up for so long; for what another process of this boot wrote down.
    #[must_use]
    pub fn since_boot(uptime: Duration) -> Self {
        Self(uptime)
    }

    /// How long the machine was up at this time; for processes of the same boot.
    #[must_use]
    pub fn uptime(self) -> Duration {
        self.0
    }

    /// The later time.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }

    /// How long it is from this to `later`; zero if that is earlier.
    #[must_use]
    pub fn until(self, later: Self) -> Duration {
        later.0.saturating_sub(self.0)
    }
}

/// What the machine's wall clock says; may jump.
#[must_use]
pub fn wall_now() -> Timestamp {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH);
    Timestamp(millis(wall.unwrap_or_default()))
}
