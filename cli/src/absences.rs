//! Which nodes a job's unfinished attempts wait for, or do without word of: what users see of a network that is cut.

use trainyard_common::ids::{AttemptRef, NodeId};
use trainyard_common::record::AttemptRecord;
use trainyard_common::state::{MemberPhase, NodeAvailability};
use trainyard_common::time::Timestamp;
use trainyard_common::units::format_duration;

use crate::connection::Connection;
use crate::failure::Failure;
use crate::jobs::JobDetail;
use crate::nodes::{self, NodeDetail, is_suspect};
use crate::output;

/// Nodes named one by one.
const NAMED: usize = 3;

/// The nodes of one attempt that are not heard of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Absence {
    pub(crate) attempt: AttemptRef,
    /// Its end is decided, and waits for them.
    waits: bool,
    members: usize,
    pub(crate) nodes: Vec<Absent>,
}

/// A node that is not heard of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Absent {
    pub(crate) node: NodeId,
    /// Since when it counts as unreachable; nothing if it is suspected only.
    pub(crate) since: Option<Timestamp>,
}

/// What is missing of a job, if it is not over.
///
/// # Errors
/// The nodes cannot be listed.
pub(crate) async fn of(
    connection: &Connection,
    detail: &JobDetail,
) -> Result<Vec<Absence>, Failure> {
    let open = |attempt: &&AttemptRecord| !attempt.state.is_over();
    if !detail.attempts.iter().any(|attempt| open(&attempt)) {
        return Ok(Vec::new());
    }
    let nodes = nodes::all(connection).await?;
    let open = detail.attempts.iter().filter(open);
    Ok(open
        .filter_map(|attempt| absence(attempt, &nodes))
        .collect())
}

fn absence(attempt: &AttemptRecord, nodes: &[NodeDetail]) -> Option<Absence> {
    let absent = |node: NodeId| {
        let node = &nodes.iter().find(|detail| detail.node.id == node)?.node;
        let since = match node.availability {
            NodeAvailability::Ready => is_suspect(node).then_some(None),
            NodeAvailability::Unreachable | NodeAvailability::Lost => Some(Some(node.changed_at)),
        };
        since.map(|since| Absent {
            node: node.id,
            since,
        })
    };
    let away: Vec<Absent> = attempt
        .members
        .iter()
        .filter(|member| member.phase != MemberPhase::Ended)
        .filter_map(|member| absent(member.node))
        .collect();
    (!away.is_empty()).then_some(Absence {
        attempt: attempt.id,
        waits: attempt.outcome.is_some(),
        members: attempt.members.len(),
        nodes: away,
    })
}

impl Absence {
    /// `1 of 8 nodes unreachable for 45s: n7`, or what a decided end waits for.
    pub(crate) fn text(&self, now: Timestamp) -> String {
        let first: Vec<String> = self
            .nodes
            .iter()
            .take(NAMED)
            .map(|absent| absent.node.to_string())
            .collect();
        let more = match self.nodes.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let names = format!("{}{more}", first.join(", "));
        let oldest = self.nodes.iter().filter_map(|absent| absent.since).min();
        let what = match oldest {
            Some(since) => {
                let seconds = now.since(since).as_secs();
                let length = format_duration(std::time::Duration::from_secs(seconds));
                format!("unreachable for {length}")
            }
            None => "not heard of for a while".to_owned(),
        };
        if self.waits {
            return format!("waiting for {names}, {what}");
        }
        let all = u64::try_from(self.members).unwrap_or(u64::MAX);
        format!(
            "{} of {} {what}: {names}",
            self.nodes.len(),
            output::count(all, "node")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(members: usize, nodes: &[(u32, Option<u64>)], waits: bool) -> String {
        let nodes = nodes.iter().map(|(node, since)| Absent {
            node: NodeId(*node),
            since: since.map(Timestamp),
        });
        let absence = Absence {
            attempt: "j3.0.1".parse().expect("is one"),
            waits,
            members,
            nodes: nodes.collect(),
        };
        absence.text(Timestamp(100_000))
    }

    #[test]
    fn what_is_missing_is_counted_named_and_dated() {
        assert_eq!(
            missing(8, &[(7, Some(55_000))], false),
            "1 of 8 nodes unreachable for 45s: n7"
        );
        assert_eq!(
            missing(1, &[(7, None)], false),
            "1 of 1 node not heard of for a while: n7"
        );
        let five: Vec<_> = (1..=5).map(|node| (node, Some(40_000))).collect();
        assert_eq!(
            missing(5, &five, false),
            "5 of 5 nodes unreachable for 1m: n1, n2, n3 and 2 more"
        );
        assert_eq!(
            missing(8, &[(7, Some(55_000))], true),
            "waiting for n7, unreachable for 45s"
        );
    }
}
