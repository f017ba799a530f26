//! What the cluster of a run is configured with, in proportion to faults of some seconds: ten times shorter than the
//! defaults, and in the same order.

use std::time::Duration;

/// How often agents report.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(1);
/// Silence after which a node gets no new work.
pub(crate) const UNREACHABLE: Duration = Duration::from_secs(4);
/// Silence after which a gang is given up.
pub(crate) const LOST_GANG: Duration = Duration::from_secs(14);
/// Silence after which everything else is given up.
pub(crate) const LOST: Duration = Duration::from_secs(20);
/// What the coordinator waits beyond a lease, its drift and the grace: with a grace of a second, an attempt on a node that
/// is away for [`LONG`] is over before that.
pub(crate) const LEASE_MARGIN: Duration = Duration::from_secs(3);
/// Time in which an attempt must be ready on all its nodes.
pub(crate) const PREPARE: Duration = Duration::from_secs(20);
/// After so long without the coordinator nothing runs any more that has a lease of [`LOST`]: the clock's drift and the kernel's
/// part are in it. A rank that listens to SIGTERM needs no grace.
pub(crate) const LEASE_OVER: Duration = Duration::from_secs(25);
/// How long a node gets no new work whose agent crashes again and again, as all do here.
pub(crate) const CRASH_PAUSE: Duration = Duration::from_secs(2);
/// A fault that lasts longer than the cluster waits.
pub(crate) const LONG: Duration = Duration::from_secs(28);
/// How long the cluster may take to bring everything to an end when nothing goes wrong any more.
pub(crate) const SETTLE: Duration = Duration::from_secs(240);
