//! Trouble that a self test asks for: this process ends by SIGKILL, or its connections are cut and none is made for a while.
//! What becomes of members is exactly what this is to show, so nothing here knows of them.

use std::time::Duration;

use tokio::time::sleep;
use trainyard_proto::convert::to_duration;
use trainyard_proto::v1;
use trainyard_proto::v1::fault::Fault;
use trainyard_transport::gate::Gate;
use trainyard_transport::restart::Restart;

use crate::chain::chain;

/// Longest time until the process ends itself.
const MAX_KILL_AFTER: Duration = Duration::from_secs(10);
/// Longest silence.
const MAX_PARTITION: Duration = Duration::from_secs(3600);

/// What carries faults out.
#[derive(Debug, Clone)]
pub(crate) struct Faults {
    gate: Gate,
    restart: Restart,
}

impl Faults {
    pub(crate) fn new(gate: Gate, restart: Restart) -> Self {
        Self { gate, restart }
    }

    /// What the greeting says of them.
    pub(crate) fn capabilities(&self) -> Vec<String> {
        let kill = match &self.restart {
            Restart::Systemd { .. } | Restart::Helper(_) => Some("fault.kill".to_owned()),
            Restart::Nobody(_) => None,
        };
        std::iter::once("fault.partition".to_owned())
            .chain(kill)
            .collect()
    }

    /// Carries one out. What cannot be is told in the log and does not happen.
    pub(crate) async fn inject(&self, fault: v1::Fault) {
        match fault.fault {
            Some(Fault::Kill(kill)) => {
                let after = to_duration("after", kill.after).unwrap_or_default();
                self.kill(after.min(MAX_KILL_AFTER)).await;
            }
            Some(Fault::Partition(partition)) => {
                let length = to_duration("length", partition.length).unwrap_or_default();
                let length = length.min(MAX_PARTITION);
                tracing::warn!(?length, "falls silent, as a self test asks for");
                self.gate.close_for(length);
            }
            // One of a later version.
            None => tracing::warn!("a self test asks for a fault that this version does not know"),
        }
    }

    async fn kill(&self, after: Duration) {
        let stand_by = match self.restart.stand_by().await {
            Ok(stand_by) => stand_by,
            Err(error) => {
                let error = chain(&error);
                tracing::error!(
                    error,
                    "does not end itself for a self test, as it would not come back"
                );
                return;
            }
        };
        sleep(after).await;
        tracing::warn!(
            restarted_by = self.restart.by(),
            "ends itself with SIGKILL, as a self test asks for"
        );
        if let Err(error) = stand_by.die() {
            tracing::error!(%error, "could not end itself for a self test");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_nobody_would_start_again_lives_on_and_says_so_in_its_greeting() {
        let faults = Faults::new(Gate::default(), Restart::Nobody("a test".to_owned()));
        assert_eq!(faults.capabilities(), ["fault.partition"]);
        let kill = v1::KillFault { after: None };
        let fault = Some(Fault::Kill(kill));
        faults.inject(v1::Fault { fault }).await;
        let helped = Faults::new(Gate::default(), Restart::Helper(vec!["x".into()]));
        assert_eq!(helped.capabilities(), ["fault.partition", "fault.kill"]);
    }

    #[tokio::test]
    async fn a_partition_closes_the_gate() {
        let faults = Faults::new(Gate::default(), Restart::Nobody(String::new()));
        let length = Some(trainyard_proto::convert::duration(Duration::from_secs(5)));
        let fault = Some(Fault::Partition(v1::PartitionFault { length }));
        faults.inject(v1::Fault { fault }).await;
        assert!(faults.gate.is_closed());
    }
}
