//! The cluster after the faults: every job comes to an end, what was accepted is there, and nothing is left of anything.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::super::daemon::Daemon;
use super::super::ledger::{Event, Line};
use super::super::users::Accepted;
use super::super::world::{As, World};
use super::super::{rest, timing};
use super::{COMMAND, Findings, is_over, text};

/// How soon after the last job's end nothing may be left of any.
const CLEAN: Duration = Duration::from_secs(90);

/// Waits until every accepted job is over; the jobs as listed then.
pub(super) fn settle(world: &World, accepted: &[Accepted], findings: &mut Findings) -> Vec<Value> {
    let deadline = Instant::now() + timing::SETTLE;
    loop {
        let ran = world.yard(As::User, &["jobs", "-a", "-n", "100000", "--json"], COMMAND);
        let value = serde_json::from_str::<Value>(&ran.stdout).unwrap_or_default();
        let listed = value["jobs"].as_array().cloned().unwrap_or_default();
        let open: Vec<_> = listed
            .iter()
            .filter(|job| !is_over(&text(&job["state"])))
            .collect();
        if open.is_empty() && listed.len() >= accepted.len() {
            return listed;
        }
        if Instant::now() > deadline {
            let named: Vec<_> = open
                .iter()
                .map(|job| {
                    format!(
                        "{} {}: {}",
                        text(&job["id"]),
                        text(&job["state"]),
                        text(&job["reason"]["message"])
                    )
                })
                .collect();
            findings.broken.push(format!(
                "{:?} after the faults {} of {} jobs are not over: {}",
                timing::SETTLE,
                open.len(),
                accepted.len(),
                named.join("; ")
            ));
            return listed;
        }
        rest(Duration::from_millis(300));
    }
}

/// Waits until no process and no directory of an attempt is left and every node is ready and free.
pub(super) fn cleaned(world: &World, findings: &mut Findings) {
    let deadline = Instant::now() + CLEAN;
    loop {
        let left = leftovers(world);
        if left.is_empty() {
            return;
        }
        findings.last_left = left.join("; ");
        if Instant::now() > deadline {
            findings.broken.extend(left);
            return;
        }
        rest(Duration::from_millis(200));
    }
}

fn leftovers(world: &World) -> Vec<String> {
    let mut left = Vec::new();
    let mut agents: Vec<_> = world
        .agents
        .iter()
        .filter_map(Daemon::pid)
        .map(u32::cast_signed)
        .collect();
    for process in world.others() {
        // Each agent keeps one supervisor ready, and no more.
        if let Some(agent) = agents.iter().position(|agent| process.is_spare_of(*agent)) {
            agents.swap_remove(agent);
            continue;
        }
        let what = if process.is_shim() {
            "a supervisor"
        } else {
            "a process"
        };
        left.push(format!(
            "{what} is left: {} {}",
            process.pid,
            process.arguments.join(" ")
        ));
    }
    for agent in 0..world.agents.len() {
        for place in ["attempts", "bundles"] {
            let dir = world.agent_dir(agent).join(place);
            for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
                if entry.file_name().as_encoded_bytes().starts_with(b".") {
                    // What the agent knows of all attempts, and no attempt's.
                    continue;
                }
                left.push(format!("a directory is left: {}", entry.path().display()));
            }
        }
    }
    if left.is_empty() && !world.all_ready() {
        let nodes: Vec<_> = world.nodes().iter().map(node_text).collect();
        left.push(format!(
            "not every node is ready and free: {}",
            nodes.join("; ")
        ));
    }
    left
}

fn node_text(node: &Value) -> String {
    format!(
        "{} {} ({}), free {} of {}, attempts {}",
        node["name"],
        node["availability"],
        node["reason"]["message"],
        node["free"],
        node["capacity"],
        node["attempts"]
    )
}

/// What was accepted is listed, under its request id, and nothing else is.
pub(super) fn same_jobs(accepted: &[Accepted], listed: &[Value], findings: &mut Findings) {
    let told: BTreeMap<_, _> = accepted
        .iter()
        .map(|one| (one.job.request.clone(), one.id))
        .collect();
    let mut seen = BTreeSet::new();
    for job in listed {
        let (id, request) = (text(&job["id"]), text(&job["request_id"]));
        if !seen.insert(request.clone()) {
            findings.broken.push(format!(
                "two jobs were made under the request id {request}; one is {id}"
            ));
        }
        match told.get(&request) {
            Some(known) if id == format!("j{known}") => {}
            Some(known) => findings
                .broken
                .push(format!("{request} was told to be j{known} and is {id}")),
            None => findings.broken.push(format!(
                "{id} was accepted under {request}, of which nobody was told"
            )),
        }
    }
    for (request, id) in told {
        if !seen.contains(&request) {
            findings
                .broken
                .push(format!("j{id} ({request}) was accepted and is lost"));
        }
    }
}

pub(super) fn cgroups_gone(lines: &[Line], findings: &mut Findings) {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mount = mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        right
            .starts_with("cgroup2 ")
            .then(|| PathBuf::from(left.split(' ').nth(4).unwrap_or("/")))
    });
    let Some(mount) = mount else {
        return;
    };
    let mut named = BTreeSet::new();
    for line in lines {
        if let Event::Start(cgroup) = &line.event
            && cgroup.contains("trainyard-")
        {
            named.insert(mount.join(cgroup.trim_start_matches('/')));
        }
    }
    if named.is_empty() {
        findings.allow("runs without cgroups of attempts");
    }
    for path in named.iter().filter(|path| path.exists()) {
        findings
            .broken
            .push(format!("a cgroup is left: {}", path.display()));
    }
}
