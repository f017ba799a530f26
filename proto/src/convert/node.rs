//! Nodes as they are on record.

use trainyard_common::ids::Incarnation;
use trainyard_common::record::NodeRecord;

use super::scalar::{node_id, required, text, timestamp, to_timestamp};
use super::{InvalidField, WireEnum, enum_field};
use crate::v1;

impl From<&NodeRecord> for v1::Node {
    fn from(node: &NodeRecord) -> Self {
        let NodeRecord {
            id,
            name,
            owner,
            workspace,
            target,
            availability,
            policy,
            reason,
            inventory,
            incarnation,
            boot_id,
            agent_version,
            address,
            enrolled_at,
            changed_at,
        } = node;
        Self {
            id: id.0,
            name: name.clone(),
            owner: owner.to_string(),
            workspace: workspace.to_string(),
            target: target.number(),
            availability: availability.number(),
            policy: policy.number(),
            reason: Some(reason.into()),
            inventory: Some(inventory.into()),
            incarnation: incarnation.0,
            boot_id: boot_id.clone(),
            agent_version: agent_version.clone(),
            address: address.clone(),
            enrolled_at: Some(timestamp(*enrolled_at)),
            changed_at: Some(timestamp(*changed_at)),
        }
    }
}

impl TryFrom<v1::Node> for NodeRecord {
    type Error = InvalidField;

    fn try_from(message: v1::Node) -> Result<Self, InvalidField> {
        let v1::Node {
            id,
            name,
            owner,
            workspace,
            target,
            availability,
            policy,
            reason,
            inventory,
            incarnation,
            boot_id,
            agent_version,
            address,
            enrolled_at,
            changed_at,
        } = message;
        Ok(Self {
            id: node_id("id", id)?,
            name,
            owner: text("owner", &owner)?,
            workspace: text("workspace", &workspace)?,
            target: enum_field("target", target)?,
            availability: enum_field("availability", availability)?,
            policy: enum_field("policy", policy)?,
            reason: required("reason", reason)?,
            inventory: required("inventory", inventory)?,
            incarnation: Incarnation(incarnation),
            boot_id,
            agent_version,
            address,
            enrolled_at: to_timestamp("enrolled_at", enrolled_at)?,
            changed_at: to_timestamp("changed_at", changed_at)?,
        })
    }
}
