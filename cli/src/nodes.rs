//! `yard nodes`, `node`, `cordon` and `uncordon`.

use std::process::ExitCode;

use serde_json::{Value, json};
use trainyard_common::ids::{AttemptRef, NodeId};
use trainyard_common::inventory::Inventory;
use trainyard_common::record::NodeRecord;
use trainyard_common::resources::Resources;
use trainyard_common::state::{NodeAvailability, NodePolicy, ReasonCode};
use trainyard_common::units::{format_bytes, format_cpus};
use trainyard_proto::v1;

use crate::args::{Global, JsonArgs, NodeArgs, NodeCommand, NodeNameArgs};
use crate::connection::{self, Connection};
use crate::failure::{EXIT_INTERNAL, EXIT_NOT_FOUND, Failure};
use crate::jobs::unreadable;
use crate::logs::local_time;
use crate::output::{self, printable};

/// A node with what runs on it.
#[derive(Debug, Clone)]
pub(crate) struct NodeDetail {
    pub(crate) node: NodeRecord,
    pub(crate) free: Resources,
    /// Neither free nor of use: processes of members that are over outlive SIGKILL.
    pub(crate) quarantined: Resources,
    pub(crate) attempts: Vec<AttemptRef>,
    pub(crate) used_gpus: Vec<String>,
}

impl NodeDetail {
    fn new(status: v1::NodeStatus) -> Result<Self, Failure> {
        let v1::NodeStatus {
            node,
            free,
            attempts,
            used_gpus,
            quarantined,
            ..
        } = status;
        let missing = || {
            Failure::new(
                EXIT_INTERNAL,
                "BAD_ANSWER",
                "the coordinator's answer holds no node; are both of the same version?",
            )
        };
        Ok(Self {
            node: node.ok_or_else(missing)?.try_into().map_err(unreadable)?,
            free: free.ok_or_else(missing)?.try_into().map_err(unreadable)?,
            // An older coordinator does not tell.
            quarantined: match quarantined {
                Some(amounts) => amounts.try_into().map_err(unreadable)?,
                None => Resources::default(),
            },
            attempts: attempts
                .into_iter()
                .map(AttemptRef::try_from)
                .collect::<Result<_, _>>()
                .map_err(unreadable)?,
            used_gpus,
        })
    }
}

/// All nodes in id order.
pub(crate) async fn all(connection: &Connection) -> Result<Vec<NodeDetail>, Failure> {
    let answer = connection
        .nodes()
        .list(v1::ListNodesRequest {})
        .await?
        .into_inner();
    of_answer(answer)
}

/// The nodes in an answer.
pub(crate) fn of_answer(answer: v1::ListNodesResponse) -> Result<Vec<NodeDetail>, Failure> {
    answer.nodes.into_iter().map(NodeDetail::new).collect()
}

/// Lists nodes.
pub(crate) async fn list(global: &Global, args: JsonArgs) -> Result<ExitCode, Failure> {
    let connection = connection::connect(global).await?;
    let answer = connection.nodes().list(v1::ListNodesRequest {}).await?;
    let answer = answer.into_inner();
    let brake = answer.brake.clone();
    let nodes = of_answer(answer)?;
    if args.json {
        let listed: Value = nodes.iter().map(crate::json::node).collect();
        let brake = (!brake.is_empty()).then_some(&brake);
        output::line(&json!({ "nodes": listed, "brake": brake }).to_string());
    } else if nodes.is_empty() {
        output::note(
            "there are no nodes; `yard token create --node` makes a token for `yard join` on a machine",
        );
    } else {
        let rows = nodes.iter().map(row).collect();
        output::line(&output::table(
            &[
                "ID", "NAME", "TARGET", "STATE", "CPUS", "MEMORY", "GPUS", "MODEL", "ATTEMPTS",
            ],
            rows,
        ));
        if !brake.is_empty() {
            output::note(&brake);
        }
        for detail in nodes.iter().filter(|detail| is_held_back(&detail.node)) {
            output::note(&printable(&detail.node.reason.message));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Availability, or the policy where that says more.
fn state_of(node: &NodeRecord) -> &'static str {
    match node.policy {
        NodePolicy::Active if is_suspect(node) => "SUSPECT",
        NodePolicy::Active if is_troubled(node, ReasonCode::CleanupPending) => "QUARANTINED",
        NodePolicy::Active if is_troubled(node, ReasonCode::AgentCrashes) => "CRASHING",
        NodePolicy::Active => node.availability.as_str(),
        policy => policy.as_str(),
    }
}

/// READY, and gets no new work for a cause that its operator should know.
fn is_held_back(node: &NodeRecord) -> bool {
    let codes = [ReasonCode::CleanupPending, ReasonCode::AgentCrashes];
    codes.into_iter().any(|code| is_troubled(node, code))
}

/// READY, and gets no new work for this cause.
fn is_troubled(node: &NodeRecord, code: ReasonCode) -> bool {
    node.availability == NodeAvailability::Ready && node.reason.code == code
}

/// READY, and not heard of for a while.
pub(crate) fn is_suspect(node: &NodeRecord) -> bool {
    match node.availability {
        NodeAvailability::Ready => node.reason.code == ReasonCode::Suspect,
        NodeAvailability::Unreachable | NodeAvailability::Lost => false,
    }
}

fn row(detail: &NodeDetail) -> Vec<String> {
    let capacity = &detail.node.inventory.capacity;
    vec![
        detail.node.id.to_string(),
        printable(&detail.node.name),
        detail.node.target.to_string(),
        output::state(state_of(&detail.node)),
        format!(
            "{}/{}",
            format_cpus(detail.free.cpu_milli),
            format_cpus(capacity.cpu_milli)
        ),
        format!(
            "{}/{}",
            format_bytes(detail.free.memory_bytes),
            format_bytes(capacity.memory_bytes)
        ),
        format!("{}/{}", detail.free.gpus, capacity.gpus),
        models(&detail.node.inventory),
        detail
            .attempts
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(" "),
    ]
}

/// GPU models with how many of each.
fn models(inventory: &Inventory) -> String {
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for gpu in &inventory.gpus {
        match counts.iter_mut().find(|(model, _)| *model == gpu.model) {
            Some((_, count)) => *count += 1,
            None => counts.push((&gpu.model, 1)),
        }
    }
    counts
        .iter()
        .map(|(model, count)| format!("{count}x {}", printable(model)))
        .collect::<Vec<_>>()
        .join(", ")
}

/// Shows one node, or does something with it.
pub(crate) async fn node(global: &Global, args: NodeArgs) -> Result<ExitCode, Failure> {
    match (args.command, args.node) {
        (Some(NodeCommand::Remove(args)), _) => {
            let (connection, detail) = find(global, &args.node).await?;
            connection
                .nodes()
                .remove(v1::RemoveNodeRequest {
                    node: detail.node.id.0,
                })
                .await?;
            done(&args, &detail, "removed")
        }
        (Some(NodeCommand::ConfirmLost(args)), _) => {
            let (connection, detail) = find(global, &args.node).await?;
            connection
                .nodes()
                .confirm_lost(v1::ConfirmLostRequest {
                    node: detail.node.id.0,
                })
                .await?;
            done(&args, &detail, "confirmed lost")
        }
        (None, Some(name)) => {
            let (_, detail) = find(global, &name).await?;
            if args.json {
                output::line(&crate::json::node(&detail).to_string());
            } else {
                show(&detail);
            }
            Ok(ExitCode::SUCCESS)
        }
        (None, None) => Err(Failure::usage(
            "NODE",
            "name a node; `yard nodes` lists them",
        )),
    }
}

/// No new work for a node.
pub(crate) async fn cordon(global: &Global, args: NodeNameArgs) -> Result<ExitCode, Failure> {
    set_policy(global, args, NodePolicy::Cordoned, "cordoned").await
}

/// New work for a node again.
pub(crate) async fn uncordon(global: &Global, args: NodeNameArgs) -> Result<ExitCode, Failure> {
    set_policy(global, args, NodePolicy::Active, "takes new work again").await
}

async fn set_policy(
    global: &Global,
    args: NodeNameArgs,
    policy: NodePolicy,
    what: &str,
) -> Result<ExitCode, Failure> {
    let (connection, detail) = find(global, &args.node).await?;
    let policy = v1::NodePolicy::from(policy);
    connection
        .nodes()
        .set_policy(v1::SetNodePolicyRequest {
            node: detail.node.id.0,
            policy: policy.into(),
        })
        .await?;
    done(&args, &detail, what)
}

fn done(args: &NodeNameArgs, detail: &NodeDetail, what: &str) -> Result<ExitCode, Failure> {
    if args.json {
        output::line(&json!({ "node": detail.node.id, "done": what }).to_string());
    } else {
        output::line(&format!(
            "{} ({}) {what}",
            detail.node.id,
            printable(&detail.node.name)
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// The node of an id or a name.
async fn find(global: &Global, text: &str) -> Result<(Connection, NodeDetail), Failure> {
    let connection = connection::connect(global).await?;
    let id = text.parse::<NodeId>().ok();
    let nodes = all(&connection).await?;
    let found = nodes
        .into_iter()
        .find(|detail| detail.node.name == text || Some(detail.node.id) == id);
    let missing = || {
        Failure::new(
            EXIT_NOT_FOUND,
            "NO_NODE",
            format!("there is no node {text:?}; `yard nodes` lists them"),
        )
    };
    Ok((connection, found.ok_or_else(missing)?))
}

/// Nothing where there is nothing.
fn told_if_any(amounts: &Resources, told: impl Fn(&Resources) -> String) -> String {
    match *amounts == Resources::default() {
        true => String::new(),
        false => told(amounts),
    }
}

fn show(detail: &NodeDetail) {
    let NodeDetail {
        node,
        free,
        quarantined,
        attempts,
        ..
    } = detail;
    let inventory = &node.inventory;
    let cpu = &inventory.cpu;
    let amounts = |amounts: &Resources| {
        format!(
            "{} CPUs, {} memory, {} GPUs",
            format_cpus(amounts.cpu_milli),
            format_bytes(amounts.memory_bytes),
            amounts.gpus
        )
    };
    output::fields(&[
        (
            "node",
            format!(
                "{}  {}",
                output::styled(output::STRONG, &node.id.to_string()),
                printable(&node.name)
            ),
        ),
        ("state", output::state(state_of(node))),
        ("reason", printable(&node.reason.message)),
        ("target", node.target.to_string()),
        ("owner", node.owner.to_string()),
        ("address", node.address.clone()),
        ("capacity", amounts(&inventory.capacity)),
        ("free", amounts(free)),
        ("quarantined", told_if_any(quarantined, amounts)),
        (
            "attempts",
            attempts
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(" "),
        ),
        ("host", printable(&inventory.hostname)),
        (
            "system",
            printable(&format!(
                "{}, Linux {}, {}",
                inventory.os, inventory.kernel, inventory.architecture
            )),
        ),
        (
            "processor",
            printable(&format!(
                "{} ({}, {}, {})",
                cpu.model,
                output::count(cpu.sockets.into(), "socket"),
                output::count(cpu.cores.into(), "core"),
                output::count(cpu.threads.into(), "thread")
            )),
        ),
        ("memory", format_bytes(inventory.memory_bytes)),
        (
            "agent",
            format!("{} (start {})", node.agent_version, node.incarnation),
        ),
        ("enrolled", local_time(node.enrolled_at)),
        ("since", local_time(node.changed_at)),
        (
            "GPU driver",
            printable(inventory.gpu_driver.as_deref().unwrap_or_default()),
        ),
    ]);
    let section = |headers: &[&str], rows: Vec<Vec<String>>| {
        if !rows.is_empty() {
            output::line(&format!("\n{}", output::table(headers, rows)));
        }
    };
    let used = |uuid: &str| {
        if detail.used_gpus.iter().any(|used| used == uuid) {
            "in use"
        } else {
            "free"
        }
    };
    let gpus = inventory.gpus.iter().map(|gpu| {
        vec![
            gpu.index.to_string(),
            printable(&gpu.model),
            format_bytes(gpu.memory_bytes),
            gpu.pci_address.clone(),
            gpu.numa_node
                .map(|numa| numa.to_string())
                .unwrap_or_default(),
            printable(&gpu.uuid),
            if gpu.healthy {
                used(&gpu.uuid).to_owned()
            } else {
                "unhealthy".to_owned()
            },
        ]
    });
    section(
        &["GPU", "MODEL", "MEMORY", "PCI", "NUMA", "UUID", "STATE"],
        gpus.collect(),
    );
    let numa = inventory.numa.iter().map(|numa| {
        vec![
            numa.id.to_string(),
            numa.cpus.clone(),
            format_bytes(numa.memory_bytes),
        ]
    });
    section(&["NUMA", "CPUS", "MEMORY"], numa.collect());
    let disks = inventory.disks.iter().map(|disk| {
        vec![
            printable(&disk.mount_point),
            printable(&disk.device),
            disk.file_system.clone(),
            format_bytes(disk.total_bytes),
            format_bytes(disk.available_bytes),
        ]
    });
    section(
        &["DISK", "DEVICE", "TYPE", "SIZE", "AVAILABLE"],
        disks.collect(),
    );
    let interfaces = inventory
        .interfaces
        .iter()
        .map(|one| vec![printable(&one.name), one.addresses.join(" ")]);
    section(&["INTERFACE", "ADDRESSES"], interfaces.collect());
}
