//! The cluster that `yard run` starts when none is configured: on this machine, for this user, leaving by itself.

use std::time::Duration;

use trainyard_common::units::format_duration;

use crate::context::Context;
use crate::failure::Failure;
use crate::local::{LocalCluster, Plan};
use crate::output;
use crate::paths::Paths;

/// Long enough to look at a job's logs and outputs after a break, short enough not to be forgotten.
const IDLE_EXIT: Duration = Duration::from_secs(20 * 60);

/// Starts it and says so in one line.
pub(crate) async fn start(paths: &Paths) -> Result<Context, Failure> {
    let plan = Plan {
        nodes: None,
        idle_exit: Some(IDLE_EXIT),
        ..Plan::default()
    };
    let started = LocalCluster::new(paths.local()).start(&plan).await?;
    // Another command may have been faster.
    if started.processes > 0 {
        output::note(&format!(
            "no cluster is configured: started one on this machine, which leaves after {} without work (or with `yard down`)",
            format_duration(IDLE_EXIT)
        ));
    }
    Ok(started.context)
}
