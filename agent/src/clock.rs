//! The clocks of the drivers: one for facts, which never jumps within a process, and the wall clock, which
//! certificates go by.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use trainyard_common::time::{Timestamp, millis};

/// The wall clock at the process's start plus the boot-time clock's progress since then. So it never jumps when somebody
/// sets the time, and it counts on while the machine sleeps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    wall: Timestamp,
    boot: Duration,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self {
            wall: wall_now(),
            boot: since_boot(),
        }
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.wall.after(since_boot().saturating_sub(self.boot))
    }
}

/// What the machine's wall clock says; may jump.
pub(crate) fn wall_now() -> Timestamp {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH);
    Timestamp(millis(wall.unwrap_or_default()))
}

fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map(Duration::from)
        .expect("Linux has had CLOCK_BOOTTIME since 2.6.39")
}
