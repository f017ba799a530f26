//! `NodeService`: nodes with what is derived from the attempts on them, and what operators do with them.

use std::collections::BTreeMap;
use std::sync::Arc;

use tonic::{Request, Response, Status};
use trainyard_common::error::Refusal;
use trainyard_common::ids::{AttemptRef, NodeId};
use trainyard_common::record::{BundleRecord, NodeRecord};
use trainyard_common::resources::Resources;
use trainyard_common::state::MemberPhase;
use trainyard_coordinator_core::effect::Answer;
use trainyard_coordinator_core::event::Event;
use trainyard_coordinator_core::mass_loss;
use trainyard_proto::convert;
use trainyard_proto::v1;
use trainyard_transport::identity::Identity;

use super::{Shared, not_found, reply, unexpected};
use crate::auth;
use crate::read_model::Tables;

/// `NodeService`.
pub(crate) struct NodeApi(pub(crate) Arc<Shared>);

/// What attempts and bundles hold of one node.
#[derive(Debug, Default)]
struct Use {
    resources: Resources,
    /// Of that, what is held only by processes that outlive SIGKILL.
    quarantined: Resources,
    attempts: Vec<AttemptRef>,
    gpus: Vec<String>,
}

/// What attempts and bundles hold, by node. An attempt's phase says it: from `UPLOADING` on every process is gone. A
/// bundle holds what as many of its tasks as run at a time do; attempts of its tasks hold nothing beside it.
fn usage(tables: &Tables, only: Option<NodeId>) -> BTreeMap<NodeId, Use> {
    let mut usage: BTreeMap<NodeId, Use> = BTreeMap::new();
    let wanted = |node| only.is_none_or(|only| only == node);
    for bundle in tables.bundles.values().filter(|b| wanted(b.node)) {
        let used = usage.entry(bundle.node).or_default();
        used.resources = used.resources.plus(&held(bundle));
    }
    for attempt in tables.attempts.values() {
        if tables.in_bundle(attempt.id).is_some() {
            let node = attempt.members.first().map(|member| member.node);
            if let Some(node) = node.filter(|node| wanted(*node)) {
                usage.entry(node).or_default().attempts.push(attempt.id);
            }
            continue;
        }
        for member in &attempt.members {
            let released = matches!(member.phase, MemberPhase::Uploading | MemberPhase::Ended);
            if released || !wanted(member.node) {
                continue;
            }
            let used = usage.entry(member.node).or_default();
            used.resources = used.resources.plus(&member.resources);
            if member.phase == MemberPhase::CleanupPending {
                used.quarantined = used.quarantined.plus(&member.resources);
            }
            used.attempts.push(attempt.id);
            used.gpus.extend(member.gpu_uuids.iter().cloned());
        }
    }
    usage
}

fn held(bundle: &BundleRecord) -> Resources {
    let width = bundle.slots.min(bundle.tasks.count());
    let Resources {
        cpu_milli,
        memory_bytes,
        gpus,
    } = bundle.resources;
    Resources {
        cpu_milli: cpu_milli.saturating_mul(u64::from(width)),
        memory_bytes: memory_bytes.saturating_mul(u64::from(width)),
        gpus: gpus.saturating_mul(width),
    }
}

fn status(node: &NodeRecord, used: Option<Use>) -> v1::NodeStatus {
    let Use {
        resources,
        quarantined,
        attempts,
        gpus,
    } = used.unwrap_or_default();
    let capacity = node.inventory.capacity;
    // A machine that shrank may have less than is used of it.
    let free = Resources {
        cpu_milli: capacity.cpu_milli.saturating_sub(resources.cpu_milli),
        memory_bytes: capacity.memory_bytes.saturating_sub(resources.memory_bytes),
        gpus: capacity.gpus.saturating_sub(resources.gpus),
    };
    v1::NodeStatus {
        node: Some(node.into()),
        free: Some(free.into()),
        attempts: attempts.into_iter().map(v1::AttemptRef::from).collect(),
        used_gpus: gpus,
        quarantined: Some(quarantined.into()),
    }
}

impl NodeApi {
    fn list(&self) -> v1::ListNodesResponse {
        let tables = self.0.read.tables();
        let mut usage = usage(&tables, None);
        let brake = mass_loss(tables.nodes.values().map(AsRef::as_ref)).unwrap_or_default();
        let nodes = tables
            .nodes
            .iter()
            .map(|(id, node)| status(node, usage.remove(id)))
            .collect();
        v1::ListNodesResponse { nodes, brake }
    }

    fn get(&self, request: &v1::GetNodeRequest) -> Result<v1::GetNodeResponse, Refusal> {
        let id = convert::node_id("node", request.node)?;
        let tables = self.0.read.tables();
        let node = tables
            .nodes
            .get(&id)
            .ok_or_else(|| not_found(format_args!("node {id}")))?;
        let used = usage(&tables, Some(id)).remove(&id);
        Ok(v1::GetNodeResponse {
            node: Some(status(node, used)),
        })
    }

    async fn done(
        &self,
        event: impl FnOnce(trainyard_coordinator_core::event::RequestKey) -> Event,
    ) -> Result<(), Refusal> {
        match self.0.driver.request(event).await? {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    async fn set_policy(
        &self,
        request: Request<v1::SetNodePolicyRequest>,
    ) -> Result<v1::SetNodePolicyResponse, Refusal> {
        let by = auth::user(&request)?.name.clone();
        let v1::SetNodePolicyRequest { node, policy } = request.into_inner();
        let node = convert::node_id("node", node)?;
        let policy = convert::enum_field("policy", policy)?;
        self.done(|key| Event::NodePolicySet {
            key,
            node,
            policy,
            by,
        })
        .await?;
        Ok(v1::SetNodePolicyResponse {})
    }

    async fn remove(&self, node: u32) -> Result<v1::RemoveNodeResponse, Refusal> {
        let node = convert::node_id("node", node)?;
        self.done(|key| Event::NodeRemoved { key, node }).await?;
        // Its certificate is refused from now on; what it has open ends too.
        self.0.connections.close_identity(&Identity::Node(node));
        Ok(v1::RemoveNodeResponse {})
    }

    async fn confirm_lost(&self, node: u32) -> Result<v1::ConfirmLostResponse, Refusal> {
        let node = convert::node_id("node", node)?;
        self.done(|key| Event::NodeConfirmedLost { key, node })
            .await?;
        Ok(v1::ConfirmLostResponse {})
    }
}

#[tonic::async_trait]
impl v1::node_service_server::NodeService for NodeApi {
    async fn list(
        &self,
        _request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        Ok(Response::new(NodeApi::list(self)))
    }

    async fn get(
        &self,
        request: Request<v1::GetNodeRequest>,
    ) -> Result<Response<v1::GetNodeResponse>, Status> {
        reply(NodeApi::get(self, request.get_ref()))
    }

    async fn set_policy(
        &self,
        request: Request<v1::SetNodePolicyRequest>,
    ) -> Result<Response<v1::SetNodePolicyResponse>, Status> {
        reply(NodeApi::set_policy(self, request).await)
    }

    async fn remove(
        &self,
        request: Request<v1::RemoveNodeRequest>,
    ) -> Result<Response<v1::RemoveNodeResponse>, Status> {
        reply(NodeApi::remove(self, request.get_ref().node).await)
    }

    async fn confirm_lost(
        &self,
        request: Request<v1::ConfirmLostRequest>,
    ) -> Result<Response<v1::ConfirmLostResponse>, Status> {
        reply(NodeApi::confirm_lost(self, request.get_ref().node).await)
    }
}
