//! What the members of an attempt are told: how they reach each other, how they are started, and what is desired of
//! each at the moment. Pure functions of rows. It must not know about sessions or change anything.

use std::net::IpAddr;
use std::ops::Range;

use trainyard_common::ids::{UserName, WorkspaceName};
use trainyard_common::member::{DesiredMember, DesiredPhase, Go, MemberSpec, OWN_ADDRESS, Stop};
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::record::{AttemptRecord, JobRecord, MemberRecord, NodeRecord};
use trainyard_common::spec::{JobSpec, Launcher};
use trainyard_common::state::{AttemptState, MemberPhase, Outcome, ReasonCode};

/// Whether an address only reaches the machine that it is used on.
pub(crate) fn is_loopback(address: &str) -> bool {
    address == "localhost" || address.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Whether other machines may reach the address. IPv6 link-local ones need a scope that only their own machine knows.
fn is_reachable(address: &str) -> bool {
    match address.parse::<IpAddr>() {
        Ok(IpAddr::V4(ip)) => !ip.is_loopback() && !ip.is_unspecified(),
        Ok(IpAddr::V6(ip)) => {
            !ip.is_loopback() && !ip.is_unspecified() && !ip.is_unicast_link_local()
        }
        Err(_) => !address.is_empty() && address != "localhost",
    }
}

/// The address at which members on other machines reach this node, if there is one.
pub(crate) fn remote_address(node: &NodeRecord) -> Option<String> {
    if is_reachable(&node.address) {
        return Some(node.address.clone());
    }
    node.inventory
        .interfaces
        .iter()
        .filter(|interface| !interface.loopback)
        .flat_map(|interface| &interface.addresses)
        .find(|address| address.parse::<IpAddr>().is_ok() && is_reachable(address))
        .cloned()
}

/// The address of each member of a gang on these nodes, in order; nothing if some two of them cannot reach each other.
pub(crate) fn addresses(nodes: &[&NodeRecord]) -> Option<Vec<String>> {
    if nodes.len() == 1 {
        return Some(vec![OWN_ADDRESS.to_owned()]);
    }
    if nodes.iter().all(|node| is_loopback(&node.address)) {
        return Some(nodes.iter().map(|node| node.address.clone()).collect());
    }
    nodes.iter().map(|node| remote_address(node)).collect()
}

/// The ranks whose exit status the member `node_rank` reports.
pub(crate) fn supervised(spec: &JobSpec, node_rank: usize) -> Range<u32> {
    let node_rank = u32::try_from(node_rank).unwrap_or(u32::MAX);
    let first = node_rank.saturating_mul(spec.procs_per_node);
    match spec.launcher {
        Launcher::Torchrun => first..first.saturating_add(1),
        Launcher::None | Launcher::Torch => first..first.saturating_add(spec.procs_per_node),
    }
}

/// Whether every rank of the member is known to have exited with 0.
pub(crate) fn all_succeeded(spec: &JobSpec, node_rank: usize, member: &MemberRecord) -> bool {
    let mut seen: Vec<u32> = member.ranks.iter().map(|end| end.rank).collect();
    seen.sort_unstable();
    member.ranks.iter().all(|end| end.exit.is_success())
        && seen.into_iter().eq(supervised(spec, node_rank))
}

/// What all members need to start, once the first one holds a port.
pub(crate) fn go(attempt: &AttemptRecord) -> Option<Go> {
    let first = attempt.members.first()?;
    Some(Go {
        master_addr: first.address.clone(),
        master_port: first.port?,
        node_addrs: attempt
            .members
            .iter()
            .map(|member| member.address.clone())
            .collect(),
    })
}

/// Why a member of an attempt with this outcome is ended.
pub(crate) fn stop_code(attempt: &AttemptRecord) -> ReasonCode {
    match attempt.outcome {
        Some(Outcome::Cancelled) => ReasonCode::CancelRequested,
        Some(Outcome::TimedOut) => ReasonCode::TimeLimit,
        Some(Outcome::Succeeded | Outcome::Failed) => ReasonCode::GangEnded,
        Some(Outcome::Interrupted) | None => attempt.reason.code,
    }
}

/// What is desired of a member now; nothing once it has ended. Without the job (it is over and only this attempt is
/// not confirmed) what the member was started with is no longer known, and only a stop can be desired.
pub(crate) fn desired(
    job: Option<&JobRecord>,
    attempt: &AttemptRecord,
    rank: usize,
) -> Option<DesiredMember> {
    let member = attempt.members.get(rank)?;
    if member.phase == MemberPhase::Ended {
        return None;
    }
    let undecided = (attempt.outcome.is_none() && attempt.state != AttemptState::Lost)
        || planted(Mutation::DecidedToldToRun);
    let uploads = attempt.outcome == Some(Outcome::Succeeded);
    let grace = job.map_or(trainyard_common::limits::DEFAULT_GRACE, |job| {
        job.spec.grace
    });
    let stop = DesiredPhase::Stop(Stop {
        code: stop_code(attempt),
        grace,
    });
    let alone = attempt.members.len() == 1;
    let phase = match (job, attempt.ready_at.and_then(|_| go(attempt))) {
        (Some(_), Some(go)) if undecided || uploads => DesiredPhase::Run(go),
        // Nobody to wait for, so it was allowed to start from the beginning.
        (Some(_), None) if alone && (undecided || uploads) => DesiredPhase::Start,
        (Some(_), None) if undecided => DesiredPhase::Prepare,
        (Some(_) | None, Some(_) | None) => stop,
    };
    Some(DesiredMember {
        attempt: attempt.id,
        phase,
        spec: match job {
            Some(job) => member_spec(job, attempt, rank, member),
            None => bare_spec(attempt.members.len(), rank, Some(member)),
        },
    })
}

fn member_spec(
    job: &JobRecord,
    attempt: &AttemptRecord,
    rank: usize,
    member: &MemberRecord,
) -> MemberSpec {
    let spec = &job.spec;
    MemberSpec {
        job_name: spec.name.clone(),
        owner: job.owner.clone(),
        workspace: spec.workspace.clone(),
        node_rank: u32::try_from(rank).unwrap_or(u32::MAX),
        nodes: spec.nodes,
        procs_per_node: spec.procs_per_node,
        resources: member.resources,
        gpu_uuids: member.gpu_uuids.clone(),
        launcher: spec.launcher,
        command: spec.command.clone(),
        env: spec.env.clone(),
        snapshot: spec.snapshot,
        resume_from: attempt.resume_from.clone(),
        time_limit: spec.time_limit,
        grace: spec.grace,
        lease: attempt.lease,
    }
}

/// The specification that accompanies a stop when the job is no longer in memory. It starts nothing: its command is
/// empty.
pub(crate) fn bare_spec(nodes: usize, rank: usize, member: Option<&MemberRecord>) -> MemberSpec {
    let nobody: UserName = "unknown"
        .parse()
        .expect("a constant that follows the rule for names");
    MemberSpec {
        job_name: "unknown".to_owned(),
        owner: nobody,
        workspace: WorkspaceName::default_workspace(),
        node_rank: u32::try_from(rank).unwrap_or(u32::MAX),
        nodes: u32::try_from(nodes).unwrap_or(u32::MAX),
        procs_per_node: 1,
        resources: member.map(|member| member.resources).unwrap_or_default(),
        gpu_uuids: member
            .map(|member| member.gpu_uuids.clone())
            .unwrap_or_default(),
        launcher: Launcher::None,
        command: Vec::new(),
        env: std::collections::BTreeMap::new(),
        snapshot: None,
        resume_from: Vec::new(),
        time_limit: None,
        grace: trainyard_common::limits::DEFAULT_GRACE,
        lease: None,
    }
}
