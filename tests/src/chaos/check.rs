//! Holds what the cluster says against what the ranks wrote down and what users were told. Every sentence in
//! [`Findings::broken`] is a broken promise; what is allowed but worth knowing is counted.

mod promises;
mod settled;
#[cfg(test)]
mod tests;
mod training;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Duration;

use serde_json::Value;

use self::promises::{
    attempts, cancels, codes, epochs, gang_stop, leases, logs, outputs, overlaps, starts,
    successes, verdict,
};
use self::settled::{cgroups_gone, cleaned, same_jobs, settle};
use self::training::References;
use super::ledger::{Event, Life, Line, Who, lives};
use super::output::attempt_id;
use super::plan::{Job, Kind, Policy};
use super::script::{LONG_AGENT, Step};
use super::timing;
use super::trouble::Troubles;
use super::users::{Accepted, Cancelled, Sighting, Users};
use super::world::{As, World};

/// Longest a command of the checker may take.
const COMMAND: Duration = Duration::from_secs(60);
/// Commands at a time.
const READERS: usize = 4;

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Broken promises.
    pub(crate) broken: Vec<String>,
    /// Jobs by kind and end.
    pub(crate) ends: BTreeMap<(Kind, String), u32>,
    /// Attempts by outcome and reason, those that succeeded left out.
    pub(crate) attempts: BTreeMap<String, u32>,
    /// Allowed, and how often.
    pub(crate) allowed: BTreeMap<&'static str, u32>,
    /// For each gang that failed by itself.
    pub(crate) gang_stops: Vec<GangStop>,
    /// Ends of ranks during the faults, and the longest time between two.
    pub(crate) ended_meanwhile: usize,
    pub(crate) longest_pause: Duration,
    /// Time from the end of the faults until every job was over, and until nothing was left.
    pub(crate) settled: Duration,
    pub(crate) clean: Duration,
    /// What was left last.
    pub(crate) last_left: String,
}

impl Findings {
    fn allow(&mut self, what: &'static str) {
        *self.allowed.entry(what).or_default() += 1;
    }
}

/// How a gang ended of which one rank failed, by the ledger.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GangStop {
    /// From that rank's end to the end of all others.
    pub(crate) took: Duration,
    /// Whether meanwhile the coordinator or one of its nodes was in trouble.
    pub(crate) disturbed: bool,
}

/// How a rank ended, as the cluster says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    Code(u8),
    Signal(u8),
    NotStarted,
    Unknown,
}

/// An attempt, as the cluster says.
#[derive(Debug, Clone)]
struct Attempt {
    task: u32,
    number: u32,
    state: String,
    outcome: String,
    reason: String,
    message: String,
    ranks: BTreeMap<u32, Exit>,
    /// On whose nodes it was.
    agents: Vec<usize>,
    warned: bool,
}

/// Everything about one job.
struct Case<'a> {
    job: &'a Job,
    id: u64,
    state: String,
    reason: String,
    exit: Option<Exit>,
    tasks: Vec<(u32, String)>,
    attempts: Vec<Attempt>,
    lives: BTreeMap<Who, Life>,
    cancels: Vec<&'a Cancelled>,
}

/// What is the same for every job.
struct Scene<'a> {
    world: &'a World,
    lines: &'a [Line],
    troubles: &'a Troubles,
    references: References,
    /// Agents by the id of their node.
    nodes: BTreeMap<String, usize>,
}

/// Waits until the cluster has settled and checks everything.
pub(crate) fn check(
    world: &World,
    users: &Users,
    script: &[Step],
    troubles: &Troubles,
    window: (Duration, Duration),
) -> Findings {
    let mut findings = Findings::default();
    let told = users.told();
    findings.broken.extend(told.broken.iter().cloned());
    let listed = settle(world, &told.accepted, &mut findings);
    findings.settled = super::ledger::boot_clock().saturating_sub(window.1);
    cleaned(world, &mut findings);
    findings.clean = super::ledger::boot_clock().saturating_sub(window.1);

    let lines = world.ledger.read().expect("the ledger can be read");
    same_jobs(&told.accepted, &listed, &mut findings);
    cgroups_gone(&lines, &mut findings);
    progress(&lines, window, &mut findings);
    let mut by_job: BTreeMap<u64, BTreeMap<Who, Life>> = BTreeMap::new();
    for (who, life) in lives(&lines) {
        by_job.entry(who.job).or_default().insert(who, life);
    }
    let scene = Scene {
        world,
        lines: &lines,
        troubles,
        references: References::new(world, u32::try_from(world.agents.len()).unwrap_or(0)),
        nodes: nodes(world),
    };
    let findings = Mutex::new(findings);
    let queue = Mutex::new(told.accepted.iter());
    std::thread::scope(|scope| {
        for _ in 0..READERS {
            scope.spawn(|| {
                while let Some(accepted) = { queue.lock().ok().and_then(|mut queue| queue.next()) }
                {
                    let mut own = Findings::default();
                    let lives = by_job.get(&accepted.id).cloned().unwrap_or_default();
                    let cancels = told
                        .cancelled
                        .iter()
                        .filter(|cancel| cancel.id == accepted.id)
                        .collect();
                    match case(&scene, accepted, lives, cancels) {
                        Ok(case) => examine(&scene, &case, &mut own),
                        Err(problem) => own.broken.push(problem),
                    }
                    if let Ok(mut all) = findings.lock() {
                        all.add(own);
                    }
                }
            });
        }
    });
    let mut findings = findings
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    lost_nodes(&told.watched, script, window, &mut findings);
    panics(world, &mut findings);
    findings
}

impl Findings {
    fn add(&mut self, other: Self) {
        self.broken.extend(other.broken);
        self.gang_stops.extend(other.gang_stops);
        for (key, count) in other.ends {
            *self.ends.entry(key).or_default() += count;
        }
        for (key, count) in other.attempts {
            *self.attempts.entry(key).or_default() += count;
        }
        for (key, count) in other.allowed {
            *self.allowed.entry(key).or_default() += count;
        }
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn is_over(state: &str) -> bool {
    ["SUCCEEDED", "FAILED", "CANCELLED", "TIMED_OUT"].contains(&state)
}

fn progress(lines: &[Line], (began, ended): (Duration, Duration), findings: &mut Findings) {
    let mut ends: Vec<_> = lines
        .iter()
        .filter(|line| matches!(line.event, Event::End(_)) && (began..=ended).contains(&line.at))
        .map(|line| line.at)
        .collect();
    ends.sort_unstable();
    findings.ended_meanwhile = ends.len();
    let bounds = std::iter::once(began)
        .chain(ends)
        .chain([ended])
        .collect::<Vec<_>>();
    let pauses = bounds
        .windows(2)
        .map(|pair| pair[1].saturating_sub(pair[0]));
    findings.longest_pause = pauses.max().unwrap_or_default();
    if findings.ended_meanwhile == 0 {
        findings
            .broken
            .push("no rank ended while things went wrong".to_owned());
    }
}

fn exit(value: &Value) -> Option<Exit> {
    let number = |name: &str| {
        value[name]
            .as_u64()
            .and_then(|number| u8::try_from(number).ok())
    };
    if value.is_null() {
        return None;
    }
    Some(match (number("code"), number("signal")) {
        (Some(code), _) => Exit::Code(code),
        (_, Some(signal)) => Exit::Signal(signal),
        _ if value["not_started"] == true => Exit::NotStarted,
        _ => Exit::Unknown,
    })
}

/// Agents by the id of their node.
fn nodes(world: &World) -> BTreeMap<String, usize> {
    let agent = |node: &Value| {
        let mut agents = world.agents.iter();
        agents.position(|agent| node["name"] == agent.name())
    };
    world
        .nodes()
        .iter()
        .filter_map(|node| Some((text(&node["id"]), agent(node)?)))
        .collect()
}

fn case<'a>(
    scene: &Scene<'_>,
    accepted: &'a Accepted,
    lives: BTreeMap<Who, Life>,
    cancels: Vec<&'a Cancelled>,
) -> Result<Case<'a>, String> {
    let id = accepted.id;
    let world = scene.world;
    let ran = world.yard(As::User, &["job", &format!("j{id}"), "--json"], COMMAND);
    let detail: Value = serde_json::from_str(&ran.stdout)
        .map_err(|error| format!("j{id} cannot be shown: {error}, {}", ran.stderr))?;
    // For people who look into a failure.
    world.note(&format!("details/j{id}.json"), &ran.stdout);
    let tasks = detail["task_list"].as_array().cloned().unwrap_or_default();
    let index = |value: &Value| value.as_u64().and_then(|index| u32::try_from(index).ok());
    let tasks = tasks
        .iter()
        .filter_map(|task| Some((index(&task["index"])?, text(&task["state"]))))
        .collect();
    let attempts = detail["attempts"].as_array().cloned().unwrap_or_default();
    Ok(Case {
        job: &accepted.job,
        id,
        state: text(&detail["state"]),
        reason: text(&detail["reason"]["code"]),
        exit: exit(&detail["exit"]),
        tasks,
        attempts: attempts
            .iter()
            .filter_map(|value| attempt(value, &scene.nodes))
            .collect(),
        lives,
        cancels,
    })
}

fn attempt(value: &Value, nodes: &BTreeMap<String, usize>) -> Option<Attempt> {
    let (_, task, number) = attempt_id(value["id"].as_str()?)?;
    let members = value["members"].as_array().cloned().unwrap_or_default();
    let ranks = members
        .iter()
        .flat_map(|member| member["ranks"].as_array().cloned().unwrap_or_default());
    Some(Attempt {
        task,
        number,
        state: text(&value["state"]),
        outcome: text(&value["outcome"]),
        reason: text(&value["reason"]["code"]),
        message: text(&value["reason"]["message"]),
        ranks: ranks
            .filter_map(|rank| {
                Some((
                    u32::try_from(rank["rank"].as_u64()?).ok()?,
                    exit(&rank["exit"])?,
                ))
            })
            .collect(),
        agents: members
            .iter()
            .filter_map(|member| nodes.get(member["node"].as_str()?).copied())
            .collect(),
        warned: members
            .iter()
            .any(|member| !text(&member["warning"]).is_empty()),
    })
}

impl Attempt {
    /// Given up without a word from one of its nodes, and labelled so: it may have lived on. When its node is back, it is
    /// over as any other, but for what is said of it.
    fn is_unconfirmed(&self) -> bool {
        self.message.contains("unconfirmed on")
    }
}

impl Case<'_> {
    fn attempt(&self, task: u32, number: u32) -> Option<&Attempt> {
        self.attempts
            .iter()
            .find(|attempt| (attempt.task, attempt.number) == (task, number))
    }

    fn life(&self, attempt: &Attempt, rank: u32) -> Option<&Life> {
        self.lives.get(&Who {
            job: self.id,
            task: attempt.task,
            attempt: attempt.number,
            rank,
        })
    }

    /// The attempt that succeeded.
    fn succeeded(&self) -> Option<&Attempt> {
        self.attempts
            .iter()
            .find(|attempt| attempt.outcome == "SUCCEEDED")
    }

    /// Whether a rank belongs to an attempt that was given up and may have lived on; never unless its job wanted that.
    fn is_unconfirmed(&self, who: Who) -> bool {
        self.job.policy == Policy::Replace
            && self
                .attempt(who.task, who.attempt)
                .is_some_and(Attempt::is_unconfirmed)
    }
}

fn examine(scene: &Scene<'_>, case: &Case<'_>, findings: &mut Findings) {
    let world = scene.world;
    *findings
        .ends
        .entry((case.job.kind, format!("{} {}", case.state, case.reason)))
        .or_default() += 1;
    for attempt in case
        .attempts
        .iter()
        .filter(|attempt| attempt.outcome != "SUCCEEDED")
    {
        let name = match attempt.outcome.as_str() {
            "" => format!("{} {}", attempt.state, attempt.reason),
            outcome => format!("{outcome} {}", attempt.reason),
        };
        *findings.attempts.entry(name).or_default() += 1;
    }
    starts(case, findings);
    epochs(case, findings);
    attempts(case, findings);
    overlaps(case, findings);
    leases(case, scene.troubles, findings);
    successes(case, findings);
    codes(case, findings);
    verdict(case, findings);
    cancels(case, scene.lines, findings);
    gang_stop(case, scene.troubles, findings);
    lasting(case, findings);
    logs(world, case, findings);
    match case.job.kind {
        Kind::Outputs => outputs(world, case, findings),
        Kind::Training => training::result(world, case, &scene.references, findings),
        _ => {}
    }
}

/// What became of those that were there when a node fell away for long.
fn lasting(case: &Case<'_>, findings: &mut Findings) {
    if case.job.kind != Kind::Lasting {
        return;
    }
    let away = |attempt: &Attempt| attempt.agents.contains(&LONG_AGENT);
    let first = case.attempts.iter().min_by_key(|attempt| attempt.number);
    if !first.is_some_and(away) {
        return findings.allow("lasting jobs elsewhere");
    }
    let once = case.attempts.len() == 1;
    findings.allow(match (case.job.policy, once) {
        (Policy::Replace, true) => "lasting jobs there, replace: one attempt",
        (Policy::Replace, false) => "lasting jobs there, replace: several attempts",
        (Policy::Wait, true) => "lasting jobs there, wait: one attempt",
        (Policy::Wait, false) => "lasting jobs there, wait: several attempts",
        (Policy::Stop, true) => "lasting jobs there, stop: one attempt",
        (Policy::Stop, false) => "lasting jobs there, stop: several attempts",
    });
}

/// Nothing that happens from outside makes a part of the cluster panic.
fn panics(world: &World, findings: &mut Findings) {
    for daemon in world.daemons() {
        let log = std::fs::read_to_string(daemon.log()).unwrap_or_default();
        for line in log.lines().filter(|line| line.contains("panicked")) {
            findings.broken.push(format!("{}: {line}", daemon.name()));
        }
    }
}

/// Nodes are given up when they were away for long, and not for another's trouble. `watched` is what the nodes were
/// seen as.
fn lost_nodes(
    watched: &[Sighting],
    script: &[Step],
    window: (Duration, Duration),
    findings: &mut Findings,
) {
    let long: Vec<_> = script
        .iter()
        .filter(|step| step.lasts >= timing::LONG)
        .filter_map(|step| Some((step.fault.agent()?, window.0 + step.at, step.lasts)))
        .collect();
    let mut before: BTreeMap<usize, &str> = BTreeMap::new();
    let mut noticed = BTreeSet::new();
    for seen in watched {
        let was = before
            .insert(seen.agent, &seen.availability)
            .unwrap_or("READY");
        match seen.availability.as_str() {
            now if now == was => {}
            "UNREACHABLE" => findings.allow("nodes found unreachable"),
            "LOST" => {
                let cause = long.iter().position(|(agent, at, lasts)| {
                    let end = *at + *lasts + timing::UNREACHABLE;
                    *agent == seen.agent && (*at..end).contains(&seen.at)
                });
                match cause {
                    Some(cause) => {
                        noticed.insert(cause);
                        findings.allow("nodes given up while they were away for long");
                    }
                    None => findings.allow("nodes given up for many short faults"),
                }
            }
            _ => {}
        }
    }
    for _ in noticed.len()..long.len() {
        findings.allow("long faults that no node was given up for");
    }
}
