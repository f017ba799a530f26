//! How many tasks a bundle holds ahead of its slots, so that a slot that becomes free does not wait for us. Numbers
//! only; it must not know bundles or jobs.

use std::time::Duration;

use trainyard_common::bundle::MAX_AHEAD;
use trainyard_common::time::{Timestamp, millis};

/// What is held ahead lasts about so long: longer than our answer takes, and short enough to be done soon when an
/// earlier job needs the slots.
const COVER: Duration = Duration::from_millis(250);
/// Ends that the averages are over; older ones count half as much for each further window of this many.
const WINDOW: u64 = 256;
/// So much may be held ahead of what was seen to end in a time: twice that of [`COVER`], so that it can grow.
const SEEN: Duration = Duration::from_millis(500);
/// At most so many are held ahead for each task that was seen to end: a first quick one promises little.
const TRUST: u64 = 4;
/// Longer times without a task are those of a bundle that had none, and do not make it slow.
const IDLE: u64 = 100;

/// How quickly the tasks of a bundle end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Pace {
    seen: Seen,
    /// Tasks that ended since it began or tasks came back.
    total: u64,
    /// When the last task ended.
    until: Option<Timestamp>,
    /// How many of its reports the agent was told to be on record.
    pub(crate) told: u64,
}

/// What was seen of a number of tasks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Seen {
    ended: u64,
    /// How long they ran, together.
    took_ms: u64,
    /// In what time, with what it takes to start them.
    within_ms: u64,
}

impl Pace {
    /// Counts a task that ended.
    pub(crate) fn note(&mut self, started_at: Timestamp, ended_at: Timestamp) {
        let Seen {
            ended,
            took_ms,
            within_ms,
        } = &mut self.seen;
        if *ended >= WINDOW {
            (*ended, *took_ms, *within_ms) = (*ended / 2, *took_ms / 2, *within_ms / 2);
        }
        let until = self.until.unwrap_or(started_at);
        let begin = started_at.max(until);
        *ended += 1;
        self.total += 1;
        *took_ms = took_ms.saturating_add(millis(ended_at.since(started_at)));
        *within_ms = within_ms
            .saturating_add(millis(begin.since(until)).min(IDLE))
            .saturating_add(millis(ended_at.since(begin)));
        self.until = Some(until.max(ended_at));
    }

    /// Tasks came back unstarted: nothing is held ahead until further ones end.
    pub(crate) fn gave_back(&mut self) {
        (self.seen, self.total) = (Seen::default(), 0);
    }

    /// Tasks to hold beyond `slots`.
    pub(crate) fn ahead(&self, slots: u32) -> u32 {
        let trusted = u32::try_from(self.total.saturating_mul(TRUST)).unwrap_or(u32::MAX);
        ahead(slots, self.seen).min(trusted)
    }
}

/// What covers a while at the rate that the tasks' own times promise, but not more than the rate that was seen allows: the
/// machine may be slow to start them. Nothing before the first has ended. Times are whole milliseconds, so the quickest
/// tasks count as one.
fn ahead(slots: u32, seen: Seen) -> u32 {
    if seen.ended == 0 {
        return 0;
    }
    let in_cover = u64::from(slots).saturating_mul(millis(COVER));
    let promised = in_cover.saturating_mul(seen.ended) / seen.took_ms.max(seen.ended);
    let seen = millis(SEEN).saturating_mul(seen.ended) / seen.within_ms.max(1);
    u32::try_from(promised.min(seen))
        .unwrap_or(u32::MAX)
        .min(MAX_AHEAD)
}

/// How many tasks to add to those that a bundle holds: none as long as half of what is ahead is left, and none to a
/// bundle with free slots, because what it would use is given out by placement.
pub(crate) fn top_up(slots: u32, ahead: u32, held: u32) -> u32 {
    let low = slots.saturating_add(ahead.div_ceil(2));
    if held < slots || held >= low {
        return 0;
    }
    slots.saturating_add(ahead).saturating_sub(held)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ahead_covers_a_quarter_of_a_second() {
        for (slots, ended, took_ms, expected) in [
            (8, 0, 0, 0),         // Nothing is known yet.
            (8, 1, 250, 8),       // As many as run.
            (8, 4, 4000, 2),      // A second each.
            (8, 1, 60_000, 0),    // Long tasks wait with us.
            (1, 10, 100, 25),     // 10 ms each.
            (4, 100, 0, 1000),    // Quicker than the clock: one millisecond each.
            (64, 100, 100, 1024), // The bound.
            (1024, 1, 1 << 60, 0),
            (1024, u64::MAX, 0, 1), // Saturated sums stay harmless.
        ] {
            let seen = Seen {
                ended,
                took_ms,
                within_ms: 0,
            };
            assert_eq!(ahead(slots, seen), expected, "{slots} {ended} {took_ms}");
        }
        // Tasks of a millisecond on a machine that starts a hundred of them a second.
        let slow = Seen {
            ended: 200,
            took_ms: 200,
            within_ms: 2000,
        };
        assert_eq!(ahead(64, slow), 50);
    }

    #[test]
    fn the_rate_that_is_seen_includes_starting_tasks_and_leaves_out_having_none() {
        let mut pace = Pace::default();
        for task in 0..100 {
            let at = task * 10;
            pace.note(Timestamp(at), Timestamp(at + 1));
        }
        assert_eq!(pace.seen.within_ms, 991);
        pace.note(Timestamp(3_600_000), Timestamp(3_600_001));
        assert_eq!(pace.seen.within_ms, 991 + IDLE + 1);
        // Many at the same time.
        let before = pace.seen.within_ms;
        for _ in 0..100 {
            pace.note(Timestamp(3_600_001), Timestamp(3_600_011));
        }
        assert_eq!(pace.seen.within_ms, before + 10);
    }

    #[test]
    fn a_bundle_is_filled_when_half_of_what_is_ahead_is_gone() {
        for (slots, ahead, held, expected) in [
            (8, 0, 8, 0),
            (8, 100, 8, 100),
            (8, 100, 57, 51),
            (8, 100, 58, 0),
            (8, 100, 108, 0),
            (8, 1, 8, 1), // One ahead is missing at once.
            (8, 1, 9, 0),
            (8, 100, 7, 0), // A free slot is filled by placement.
        ] {
            assert_eq!(
                top_up(slots, ahead, held),
                expected,
                "{slots} {ahead} {held}"
            );
        }
    }

    #[test]
    fn old_tasks_are_forgotten_and_returned_ones_stop_it() {
        let mut pace = Pace::default();
        for _ in 0..1000 {
            pace.note(Timestamp(0), Timestamp(1000));
        }
        assert_eq!(pace.ahead(40), 10);
        for _ in 0..5000 {
            pace.note(Timestamp(2000), Timestamp(2010));
        }
        assert!(pace.ahead(4) >= 95, "{}", pace.ahead(4));
        pace.gave_back();
        assert_eq!(pace.ahead(40), 0);
        pace.note(Timestamp(5), Timestamp(3));
        assert_eq!(pace.ahead(40), 4, "one task is no promise");
        for _ in 0..100 {
            pace.note(Timestamp(5), Timestamp(3));
        }
        assert_eq!(
            pace.ahead(1),
            250,
            "a clock that went back is taken for no time"
        );
    }
}
