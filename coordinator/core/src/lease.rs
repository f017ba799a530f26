//! How long a silent node is waited for before an attempt there is given up, and the leases of the policy `stop`: what a
//! node is told, and from when on it is certain that it has done what it was told. It must not know why nodes are silent.
//!
//! The node counts from the *sending* of the last heartbeat that we acknowledged, we count from the *receipt* of the last
//! word of it, which is not earlier. Both clocks may be wrong by [`limits::CLOCK_DRIFT_PERCENT`]. So when we have waited
//! for lease and grace, stretched by that, and a margin for the kernel, the ranks are gone.

use std::time::Duration;

use trainyard_common::ids::{JobId, NodeId};
use trainyard_common::limits;
use trainyard_common::record::AttemptRecord;
use trainyard_common::spec::OnDisconnect;
use trainyard_common::time::millis;

use crate::Core;

impl Core {
    /// Silence after which an attempt of this size is given up under the policy `replace`.
    fn lost_after(&self, members: usize) -> Duration {
        match members {
            0 | 1 => self.config.lost_after,
            _ => self.config.lost_after_gang,
        }
    }

    /// The lease of a new attempt of the job, if its policy has one.
    pub(crate) fn lease_for(&self, job: JobId, members: usize) -> Option<Duration> {
        let spec = &self.t.jobs.get(&job)?.spec;
        match spec.on_disconnect {
            OnDisconnect::Stop => Some(self.lost_after(members)),
            OnDisconnect::Replace | OnDisconnect::Wait => None,
        }
    }

    /// Silence of a node after which an attempt there need not be waited for. A lease is taken from the attempt, as its
    /// node was told that one, whatever the configuration says now.
    pub(crate) fn patience(&self, attempt: &AttemptRecord) -> Duration {
        let Some(lease) = attempt.lease else {
            return self.lost_after(attempt.members.len());
        };
        let job = self.t.jobs.get(&attempt.id.job);
        // Without its job the grace is no longer known, so the longest one is waited for.
        let grace = job.map_or(limits::MAX_GRACE, |job| job.spec.grace);
        lease_over_after(lease, grace, self.config.lease_margin)
    }

    /// The silences of a node at which attempts with leases are given up, if there are any.
    pub(crate) fn lease_ends(&self, node: NodeId) -> impl Iterator<Item = Duration> {
        self.t
            .members_on(node)
            .into_iter()
            .filter_map(|(id, _)| self.t.attempts.get(&id))
            .filter(|attempt| attempt.lease.is_some())
            .map(|attempt| self.patience(attempt))
    }
}

/// How long after our last word of a node its ranks are gone for certain: its clock may be slow, and ours fast.
fn lease_over_after(lease: Duration, grace: Duration, margin: Duration) -> Duration {
    let (slow, fast) = (
        100 - limits::CLOCK_DRIFT_PERCENT,
        100 + limits::CLOCK_DRIFT_PERCENT,
    );
    let told = lease.saturating_add(grace);
    let stretched = told.checked_mul(fast).unwrap_or(Duration::MAX) / slow;
    // In whole milliseconds, as timestamps are, and one more for what is rounded off on either side.
    let waited = millis(stretched.saturating_add(margin));
    Duration::from_millis(waited.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_waited_for_with_both_clocks_wrong() {
        let secs = Duration::from_secs;
        let waited = lease_over_after(secs(900), secs(30), secs(30));
        // 930 s by a clock that is 5 % slow are 979 s, and those by one that is 5 % fast 1028 s.
        assert_eq!(waited.as_secs(), 1057);
        assert!(lease_over_after(Duration::MAX, secs(1), secs(1)) > secs(1));
    }
}
