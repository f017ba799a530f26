//! Trouble that an admin asks for (`yard selftest`): the coordinator ends itself with SIGKILL, or tells an agent to, or
//! tells an agent to fall silent. It refuses what nobody would recover from; what becomes of jobs is not its business.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tonic::Request;
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{NodeId, UserName};
use trainyard_common::units::format_duration;
use trainyard_proto::convert::{self, InvalidField};
use trainyard_proto::v1;
use trainyard_proto::v1::fault::Fault;
use trainyard_transport::task::spawn;

use super::{Shared, not_found};
use crate::auth;

/// An agent that can be told to fall silent names this in its greeting.
const CAN_PARTITION: &str = "fault.partition";
/// One that can be told to end itself, as somebody starts it again, names this.
const CAN_KILL: &str = "fault.kill";
/// Faults that wait for an agent's session: nobody needs two at a time.
const WAITING: usize = 2;
/// Bounds for the time until a process ends itself: the answer has to leave before.
const KILL_AFTER: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(10));
/// Longest silence.
const MAX_PARTITION: Duration = Duration::from_secs(3600);
/// Of `lost_after`, how many tenths a silence may last: the agent comes back a while after it is over.
const SAFE_TENTHS: u32 = 7;

/// The agents in session that can be told of faults.
#[derive(Debug, Default)]
pub(crate) struct FaultLines(Mutex<Lines>);

#[derive(Debug, Default)]
struct Lines {
    opened: u64,
    open: BTreeMap<NodeId, Line>,
}

#[derive(Debug)]
struct Line {
    number: u64,
    can_kill: bool,
    can_partition: bool,
    sender: mpsc::Sender<v1::Fault>,
}

/// The session's end of a line; dropping it closes the line.
pub(super) struct OpenLine<'a> {
    lines: &'a FaultLines,
    node: NodeId,
    number: u64,
    pub(super) faults: mpsc::Receiver<v1::Fault>,
}

impl Drop for OpenLine<'_> {
    fn drop(&mut self) {
        let mut lines = self.lines.lock();
        // A newer session has a line of its own.
        if lines
            .open
            .get(&self.node)
            .is_some_and(|line| line.number == self.number)
        {
            lines.open.remove(&self.node);
        }
    }
}

impl FaultLines {
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A line to an agent in session that named these capabilities.
    pub(super) fn open(&self, node: NodeId, capabilities: &[String]) -> OpenLine<'_> {
        let can = |what: &str| capabilities.iter().any(|named| named == what);
        let (sender, faults) = mpsc::channel(WAITING);
        let mut lines = self.lock();
        lines.opened += 1;
        let number = lines.opened;
        let line = Line {
            number,
            can_kill: can(CAN_KILL),
            can_partition: can(CAN_PARTITION),
            sender,
        };
        lines.open.insert(node, line);
        OpenLine {
            lines: self,
            node,
            number,
            faults,
        }
    }

    /// Where to send a fault for a node.
    fn line(&self, node: NodeId, fault: &Fault) -> Result<mpsc::Sender<v1::Fault>, Refusal> {
        let lines = self.lock();
        let Some(line) = lines.open.get(&node) else {
            let message = format!("{node} is not in session, so nothing can be done to its agent");
            return Err(refused("NOT_IN_SESSION", message));
        };
        let (can, problem) = match fault {
            Fault::Kill(_) => (
                line.can_kill,
                "cannot be killed for a test: it is of an older version, or nobody would start it again (its log says \
                 which)",
            ),
            Fault::Partition(_) => (
                line.can_partition,
                "is of an older version and cannot fall silent on purpose; upgrade it",
            ),
        };
        match can {
            true => Ok(line.sender.clone()),
            false => Err(refused(
                "NO_FAULTS",
                format!("the agent of {node} {problem}"),
            )),
        }
    }
}

fn refused(reason: &str, message: impl Into<String>) -> Refusal {
    Refusal::new(ErrorCode::FailedPrecondition, reason, message)
}

/// `AdminService.InjectFault`.
pub(super) async fn inject(
    shared: &Shared,
    request: Request<v1::InjectFaultRequest>,
) -> Result<v1::InjectFaultResponse, Refusal> {
    let by = auth::user(&request)?.name.clone();
    let v1::InjectFaultRequest {
        fault,
        node,
        check_only,
        beyond_lost,
    } = request.into_inner();
    let fault = fault
        .and_then(|fault| fault.fault)
        .ok_or_else(|| InvalidField::missing("fault"))?;
    let fault = within_bounds(fault)?;
    match node {
        None => to_coordinator(shared, &by, fault, check_only).await?,
        Some(node) => {
            let node = convert::node_id("node", node)?;
            to_node(shared, &by, (node, fault), check_only, beyond_lost)?;
        }
    }
    let timing = &shared.timing;
    Ok(v1::InjectFaultResponse {
        restarted_by: match node {
            None => shared.restart.by(),
            Some(_) => String::new(),
        },
        heartbeat_interval: Some(convert::duration(timing.heartbeat_interval)),
        unreachable_after: Some(convert::duration(timing.unreachable_after)),
        lost_after: Some(convert::duration(timing.lost_after)),
        lost_after_gang: Some(convert::duration(timing.lost_after_gang)),
    })
}

fn within_bounds(fault: Fault) -> Result<Fault, Refusal> {
    match &fault {
        Fault::Kill(kill) => {
            let after = convert::to_duration("fault.kill.after", kill.after)?;
            let longest = KILL_AFTER.1;
            if after > longest {
                let problem = format!("is above {}", format_duration(longest));
                return Err(InvalidField::new("fault.kill.after", problem).into());
            }
        }
        Fault::Partition(partition) => {
            let length = convert::to_duration("fault.partition.length", partition.length)?;
            if length.is_zero() || length > MAX_PARTITION {
                let problem = format!(
                    "is not above 0 and at most {}",
                    format_duration(MAX_PARTITION)
                );
                return Err(InvalidField::new("fault.partition.length", problem).into());
            }
        }
    }
    Ok(fault)
}

async fn to_coordinator(
    shared: &Shared,
    by: &UserName,
    fault: Fault,
    check_only: bool,
) -> Result<(), Refusal> {
    let Fault::Kill(kill) = fault else {
        let problem = "is for the agent of a node; name the node";
        return Err(InvalidField::new("fault.partition", problem).into());
    };
    let no_restart = |error: trainyard_transport::restart::RestartError| {
        let mut message = format!("the coordinator would not come back: {error}");
        if let Some(cause) = std::error::Error::source(&error) {
            message.push_str(&format!(": {cause}"));
        }
        refused("NO_RESTART", message)
    };
    if check_only {
        return shared.restart.check().await.map_err(no_restart);
    }
    let stand_by = shared.restart.stand_by().await.map_err(no_restart)?;
    let (shortest, longest) = KILL_AFTER;
    let after = convert::to_duration("fault.kill.after", kill.after)?.clamp(shortest, longest);
    tracing::warn!(%by, ?after, restarted_by = shared.restart.by(), "ends itself with SIGKILL, as a self test asks for");
    spawn("fault", async move {
        tokio::time::sleep(after).await;
        if let Err(error) = stand_by.die() {
            tracing::error!(%error, "could not end itself for a self test");
        }
    });
    Ok(())
}

fn to_node(
    shared: &Shared,
    by: &UserName,
    (node, fault): (NodeId, Fault),
    check_only: bool,
    beyond_lost: bool,
) -> Result<(), Refusal> {
    if !shared.read.tables().nodes.contains_key(&node) {
        return Err(not_found(format_args!("node {node}")));
    }
    if let Fault::Partition(partition) = &fault {
        let length = convert::to_duration("fault.partition.length", partition.length)?;
        let lost = shared.timing.lost_after.min(shared.timing.lost_after_gang);
        let safe = lost * SAFE_TENTHS / 10;
        if length > safe && !beyond_lost {
            let message = format!(
                "a silence of {} is too long: this cluster gives up attempts on a silent node after {}, also those of \
                 others, and the agent needs some time to come back; take at most {}, or say that it may go beyond",
                format_duration(length),
                format_duration(lost),
                format_duration(safe),
            );
            return Err(refused("BEYOND_LOST", message));
        }
    }
    let line = shared.faults.line(node, &fault)?;
    if check_only {
        return Ok(());
    }
    tracing::warn!(%by, %node, ?fault, "tells an agent to make trouble, as a self test asks for");
    let fault = v1::Fault { fault: Some(fault) };
    line.try_send(fault).map_err(|_| {
        let message = format!("{node} has faults waiting already, or its session just ended");
        Refusal::new(ErrorCode::Unavailable, "FAULTS_WAITING", message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kill() -> Fault {
        Fault::Kill(v1::KillFault { after: None })
    }

    #[test]
    fn a_line_is_as_long_as_its_session_and_knows_what_the_agent_can() {
        let lines = FaultLines::default();
        let node = NodeId(1);
        let partition = Fault::Partition(v1::PartitionFault { length: None });
        let reason = |fault: &Fault| lines.line(node, fault).map(drop).map_err(|no| no.reason);
        assert_eq!(reason(&kill()).unwrap_err(), "NOT_IN_SESSION");
        let first = lines.open(node, &[CAN_PARTITION.to_owned()]);
        assert_eq!(reason(&kill()).unwrap_err(), "NO_FAULTS");
        reason(&partition).unwrap();
        // The agent opens a new session before the old one is noticed to be gone.
        let second = lines.open(node, &[CAN_KILL.to_owned()]);
        drop(first);
        reason(&kill()).unwrap();
        drop(second);
        assert_eq!(reason(&kill()).unwrap_err(), "NOT_IN_SESSION");
    }

    #[test]
    fn times_have_bounds() {
        let seconds = |seconds| Some(convert::duration(Duration::from_secs(seconds)));
        let partition = |length| Fault::Partition(v1::PartitionFault { length });
        within_bounds(partition(seconds(20))).unwrap();
        for length in [None, seconds(0), seconds(3601)] {
            let refusal = within_bounds(partition(length)).unwrap_err();
            assert_eq!(refusal.field.as_deref(), Some("fault.partition.length"));
        }
        let late = Fault::Kill(v1::KillFault { after: seconds(11) });
        let refusal = within_bounds(late).unwrap_err();
        assert_eq!(refusal.field.as_deref(), Some("fault.kill.after"));
    }
}
