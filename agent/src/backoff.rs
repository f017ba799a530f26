//! Pauses between tries that grow and differ between agents, so that thousands of them do not come back at the same
//! moment after a coordinator was away.

use std::time::Duration;

use trainyard_transport::clock::wall_now;

/// The first pause; a coordinator that only restarts is back in about a second.
const FIRST: Duration = Duration::from_millis(200);
/// The longest pause: what an agent may be late after a long outage.
const LONGEST: Duration = Duration::from_secs(30);
/// Growth from one pause to the next, in tenths.
const GROWTH_TENTHS: u32 = 16;
/// Each pause is within this many percent of the nominal one.
const JITTER_PERCENT: u64 = 20;

/// Pauses of one thing that is tried again and again.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
    random: Random,
}

impl Backoff {
    pub(crate) fn new() -> Self {
        Self {
            next: FIRST,
            random: Random::new(),
        }
    }

    /// The pause before the next try.
    pub(crate) fn pause(&mut self) -> Duration {
        let nominal = self.next;
        self.next = LONGEST.min(nominal * GROWTH_TENTHS / 10);
        self.random.jitter(nominal)
    }

    /// It worked: the next failure begins anew.
    pub(crate) fn reset(&mut self) {
        self.next = FIRST;
    }

    /// Trying soon would not help.
    pub(crate) fn slow_down(&mut self) {
        self.next = LONGEST;
    }
}

/// Xorshift: enough to spread agents, and for nothing else.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn new() -> Self {
        let pid = u64::from(std::process::id());
        Self((wall_now().0 ^ pid << 40 ^ pid.wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn jitter(&mut self, nominal: Duration) -> Duration {
        let percent = 100 - JITTER_PERCENT + self.next() % (2 * JITTER_PERCENT + 1);
        nominal * u32::try_from(percent).unwrap_or(100) / 100
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_longest_and_spread() {
        let mut backoff = Backoff::new();
        let mut nominal = FIRST;
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..40 {
            let pause = backoff.pause();
            assert!(
                pause >= nominal * 8 / 10 && pause <= nominal * 12 / 10,
                "{pause:?}"
            );
            seen.insert(pause.as_millis() * 1000 / nominal.as_millis());
            nominal = LONGEST.min(nominal * 16 / 10);
        }
        assert_eq!(nominal, LONGEST);
        assert!(seen.len() > 5, "{seen:?}");
        backoff.reset();
        assert!(backoff.pause() <= FIRST * 12 / 10);
        backoff.slow_down();
        assert!(backoff.pause() >= LONGEST * 8 / 10);
    }
}
