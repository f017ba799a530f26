//! When a request that failed is made again. Pure: the delay follows from the number of failures alone. One node's
//! retries need no jitter, as the coordinator paces its agents by their sessions.

use std::time::Duration;

use trainyard_common::time::Timestamp;

/// The first pause: a coordinator that restarts is back in about this time.
const FIRST: Duration = Duration::from_secs(1);
/// The longest pause: what a person waits for a report after a fault is repaired.
const LONGEST: Duration = Duration::from_secs(60);

/// Failures in a row of one request, and until when it rests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Backoff {
    failures: u32,
    until: Option<Timestamp>,
}

impl Backoff {
    /// Counts a failure and rests from `now` on.
    pub(crate) fn fail(&mut self, now: Timestamp) {
        self.until = Some(now.after(delay(self.failures)));
        self.failures = self.failures.saturating_add(1);
    }

    /// One that is to be made at once, but by the timer.
    pub(crate) fn due(now: Timestamp) -> Self {
        Self {
            failures: 0,
            until: Some(now),
        }
    }

    /// Whether the request still rests.
    pub(crate) fn rests(&self, now: Timestamp) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// When it may be made again, if it failed.
    pub(crate) fn deadline(&self) -> Option<Timestamp> {
        self.until
    }

    /// The request was made again; the failures still count.
    pub(crate) fn begin(&mut self) {
        self.until = None;
    }
}

fn delay(failures: u32) -> Duration {
    LONGEST.min(FIRST.saturating_mul(2_u32.saturating_pow(failures)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let seconds: Vec<_> = (0..9).map(|failures| delay(failures).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(delay(u32::MAX), LONGEST);
    }
}
