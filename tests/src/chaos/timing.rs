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
/// Time in which an attempt must be ready on all its nodes.
pub(crate) const PREPARE: Duration = Duration::from_secs(20);
/// A fault that lasts longer than the cluster waits.
pub(crate) const LONG: Duration = Duration::from_secs(28);
/// How long the cluster may take to bring everything to an end when nothing goes wrong any more.
pub(crate) const SETTLE: Duration = Duration::from_secs(240);
