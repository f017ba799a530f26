//! The faults of a self test: which, on which node, whether they may be made, and how to see that they are over.

use std::time::Duration;

use trainyard_common::ids::{Incarnation, NodeId};
use trainyard_common::state::{NodeAvailability, NodePolicy};
use trainyard_common::time::Timestamp;
use trainyard_common::units::format_duration;
use trainyard_proto::v1::fault::Fault as Wire;
use trainyard_proto::{convert, v1};

use super::client::Client;
use crate::args::SelftestArgs;
use crate::failure::{EXIT_NOT_FOUND, EXIT_UNAVAILABLE, Failure};
use crate::jobs::unreadable;
use crate::nodes::NodeDetail;
use crate::output::printable;
use crate::spec;

/// How long jobs run on at least after a fault began, besides the time of a partition.
const THROUGH: Duration = Duration::from_secs(8);
/// How long a killed process may take until it serves again, and a cut-off agent until it is back: its pauses between tries
/// grow to half a minute.
const RECOVERY: Duration = Duration::from_secs(90);

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    KillCoordinator,
    KillAgent,
    Partition(Duration),
}

/// One fault, ready to be made.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) what: What,
    pub(crate) node: Option<(NodeId, String)>,
    pub(crate) beyond_lost: bool,
    /// Who starts a killed coordinator again.
    pub(crate) restarted_by: String,
    /// Silence after which this cluster gives attempts up.
    pub(crate) lost_after: Duration,
    /// Attempts of others on the node.
    pub(crate) others: Vec<String>,
}

/// What is compared to see that a fault is over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Before {
    term: u64,
    node: Option<(Incarnation, Timestamp)>,
}

impl Fault {
    /// A few words: `kill-coordinator`.
    pub(crate) fn name(&self) -> &'static str {
        match self.what {
            What::KillCoordinator => "kill-coordinator",
            What::KillAgent => "kill-agent",
            What::Partition(_) => "partition",
        }
    }

    /// What is going to happen, for a person who may say no.
    pub(crate) fn warning(&self) -> String {
        let node = self.node_text();
        match self.what {
            What::KillCoordinator => format!(
                "kills the coordinator (SIGKILL; {} starts it again): jobs of others are not affected; submits are refused \
                 for some seconds",
                self.restarted_by
            ),
            What::KillAgent => format!(
                "kills the agent of {node} (SIGKILL; it is started again): jobs there are not affected{}",
                self.others_text()
            ),
            What::Partition(length) if self.beyond_lost => format!(
                "cuts {node} off for {}: attempts there are GIVEN UP after {} and may be run again elsewhere{}",
                format_duration(length),
                format_duration(self.lost_after),
                self.others_text()
            ),
            What::Partition(length) => format!(
                "cuts {node} off for {}: jobs there go on and are not replaced{}",
                format_duration(length),
                self.others_text()
            ),
        }
    }

    /// The node, for people.
    pub(crate) fn node_text(&self) -> String {
        self.node
            .as_ref()
            .map(|(id, name)| format!("{id} ({})", printable(name)))
            .unwrap_or_default()
    }

    fn others_text(&self) -> String {
        match self.others.as_slice() {
            [] => "; nothing else runs there".to_owned(),
            others => format!("; there run also: {}", others.join(", ")),
        }
    }

    /// How long jobs are to run, counted from their start, so that they outlast it.
    pub(crate) fn through(&self) -> Duration {
        match self.what {
            What::KillCoordinator | What::KillAgent => THROUGH,
            What::Partition(length) => THROUGH + length,
        }
    }

    /// How long it may take until it is over.
    pub(crate) fn limit(&self) -> Duration {
        match self.what {
            What::KillCoordinator | What::KillAgent => RECOVERY,
            // The pause before the try that works may be as long as all that were before it.
            What::Partition(length) => RECOVERY + length,
        }
    }

    fn request(&self, check_only: bool, after: Duration) -> v1::InjectFaultRequest {
        let after = Some(convert::duration(after));
        let fault = match self.what {
            What::KillCoordinator | What::KillAgent => Wire::Kill(v1::KillFault { after }),
            What::Partition(length) => Wire::Partition(v1::PartitionFault {
                length: Some(convert::duration(length)),
            }),
        };
        v1::InjectFaultRequest {
            fault: Some(v1::Fault { fault: Some(fault) }),
            node: self.node.as_ref().map(|(id, _)| id.0),
            check_only,
            beyond_lost: self.beyond_lost,
        }
    }

    /// Asks whether it may be made.
    async fn check(mut self, client: &Client) -> Result<Self, Failure> {
        let request = self.request(true, Duration::ZERO);
        let answer = client.connection.admin().inject_fault(request).await;
        let answer = answer
            .map_err(|status| self.refused(status.into()))?
            .into_inner();
        let time = |field, value| convert::to_duration(field, value).map_err(unreadable);
        self.restarted_by = answer.restarted_by;
        self.lost_after = time("lost_after", answer.lost_after)?
            .min(time("lost_after_gang", answer.lost_after_gang)?);
        Ok(self)
    }

    fn refused(&self, mut failure: Failure) -> Failure {
        let remedy = match failure.reason.as_str() {
            "BEYOND_LOST" => " with --beyond-lost",
            _ => "",
        };
        failure.message = format!("--{}: {}{remedy}", self.name(), failure.message);
        failure
    }

    /// What to compare with later.
    pub(crate) async fn before(&self, client: &Client) -> Result<Before, Failure> {
        let node = match &self.node {
            Some((id, _)) => find(&client.nodes().await?, *id)
                .map(|detail| (detail.node.incarnation, detail.node.changed_at)),
            None => None,
        };
        Ok(Before {
            term: client.term().await?,
            node,
        })
    }

    /// Makes it, a while after the answer if something is killed. Not asked for twice: if the answer is lost, what follows
    /// shows whether it happened.
    pub(crate) async fn make(&self, client: &Client, after: Duration) -> Result<(), Failure> {
        let request = self.request(false, after);
        match client.connection.admin().inject_fault(request).await {
            Ok(_) => Ok(()),
            Err(status) if crate::connection::is_away(&status) => Ok(()),
            Err(status) => Err(self.refused(status.into())),
        }
    }

    /// Whether it has happened and is over.
    pub(crate) async fn is_over(&self, client: &Client, before: Before) -> Result<bool, Failure> {
        let Some((id, _)) = &self.node else {
            return Ok(client.term().await? > before.term);
        };
        let nodes = client.nodes().await?;
        let (Some(now), Some((incarnation, changed_at))) = (find(&nodes, *id), before.node) else {
            return Ok(false);
        };
        let news = match self.what {
            What::KillAgent => now.node.incarnation > incarnation,
            What::KillCoordinator | What::Partition(_) => now.node.changed_at > changed_at,
        };
        Ok(news && now.node.availability == NodeAvailability::Ready)
    }
}

fn find(nodes: &[NodeDetail], id: NodeId) -> Option<&NodeDetail> {
    nodes.iter().find(|detail| detail.node.id == id)
}

/// Whether new work may come to a node.
pub(crate) fn takes_work(detail: &NodeDetail) -> bool {
    detail.node.availability == NodeAvailability::Ready && detail.node.policy == NodePolicy::Active
}

/// The faults that were asked for, in the order in which they happen; each may be made as far as can be known.
pub(crate) async fn prepare(
    client: &Client,
    args: &SelftestArgs,
    nodes: &[NodeDetail],
) -> Result<Vec<Fault>, Failure> {
    let length = spec::duration("--for", &args.length)?;
    let mut wanted: Vec<(What, Option<&str>)> = Vec::new();
    if args.kill_coordinator {
        wanted.push((What::KillCoordinator, None));
    }
    if let Some(node) = &args.kill_agent {
        wanted.push((What::KillAgent, Some(node)));
    }
    if let Some(node) = &args.partition {
        wanted.push((What::Partition(length), Some(node)));
    }
    let mut faults = Vec::new();
    for (what, node) in wanted {
        let node = node.map(|text| choose(nodes, text)).transpose()?;
        let fault = Fault {
            what,
            node: node.map(|detail| (detail.node.id, detail.node.name.clone())),
            beyond_lost: args.beyond_lost && matches!(what, What::Partition(_)),
            restarted_by: String::new(),
            lost_after: Duration::ZERO,
            others: node
                .map(|detail| detail.attempts.iter().map(ToString::to_string).collect())
                .unwrap_or_default(),
        };
        faults.push(fault.check(client).await?);
    }
    Ok(faults)
}

/// The named node, or the one with the least work.
fn choose<'a>(nodes: &'a [NodeDetail], text: &str) -> Result<&'a NodeDetail, Failure> {
    if text.is_empty() {
        let usable = nodes.iter().filter(|detail| takes_work(detail));
        return usable
            .min_by_key(|detail| (detail.attempts.len(), detail.node.id))
            .ok_or_else(no_node);
    }
    let id = text.parse::<NodeId>().ok();
    let named = nodes
        .iter()
        .find(|detail| detail.node.name == text || Some(detail.node.id) == id);
    let detail = named.ok_or_else(|| {
        let message = format!("there is no node {text:?}; `yard nodes` lists them");
        Failure::new(EXIT_NOT_FOUND, "NO_NODE", message)
    })?;
    match takes_work(detail) {
        true => Ok(detail),
        false => {
            let message =
                format!("{text} takes no new work now, so no job of a self test would run there");
            Err(Failure::new(EXIT_UNAVAILABLE, "NODE_NOT_READY", message))
        }
    }
}

/// No node is there to run anything.
pub(crate) fn no_node() -> Failure {
    let message = "no node is ready to take work; `yard nodes` shows why, `yard token create --node` adds one";
    Failure::new(EXIT_UNAVAILABLE, "NO_NODE", message)
}
