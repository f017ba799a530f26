//! Holds what the cluster says against what the ranks wrote down and what users were told. Every sentence in
//! [`Findings::broken`] is a broken promise; what is allowed but worth knowing is counted.

mod promises;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::Value;

use self::promises::{
    attempts, cancels, codes, gang_stop, logs, outputs, overlaps, starts, successes, verdict,
};
use super::daemon::Daemon;
use super::ledger::{Event, Life, Line, Who, lives};
use super::output::attempt_id;
use super::plan::{Job, Kind};
use super::script::Step;
use super::users::{Accepted, Cancelled, Sighting, Users};
use super::world::{As, World};
use super::{rest, timing};

/// Longest a command of the checker may take.
const COMMAND: Duration = Duration::from_secs(60);
/// How soon after the last job's end nothing may be left of any.
const CLEAN: Duration = Duration::from_secs(90);
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
    /// From the first rank's failure to the end of all others, for each gang that failed by itself.
    pub(crate) gang_stops: Vec<Duration>,
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

/// Waits until the cluster has settled and checks everything.
pub(crate) fn check(
    world: &World,
    users: &Users,
    script: &[Step],
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
                    match case(world, accepted, lives, cancels) {
                        Ok(case) => examine(world, &case, &lines, &mut own),
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

/// Waits until every accepted job is over; the jobs as listed then.
fn settle(world: &World, accepted: &[Accepted], findings: &mut Findings) -> Vec<Value> {
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
fn cleaned(world: &World, findings: &mut Findings) {
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
fn same_jobs(accepted: &[Accepted], listed: &[Value], findings: &mut Findings) {
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

fn cgroups_gone(lines: &[Line], findings: &mut Findings) {
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

fn case<'a>(
    world: &World,
    accepted: &'a Accepted,
    lives: BTreeMap<Who, Life>,
    cancels: Vec<&'a Cancelled>,
) -> Result<Case<'a>, String> {
    let id = accepted.id;
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
        attempts: attempts.iter().filter_map(attempt).collect(),
        lives,
        cancels,
    })
}

fn attempt(value: &Value) -> Option<Attempt> {
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
        warned: members
            .iter()
            .any(|member| !text(&member["warning"]).is_empty()),
    })
}

impl Attempt {
    /// Given up without a word from its node, and labelled so: it may have lived on. When its node is back, it is over as
    /// any other, but for its reason.
    fn is_unconfirmed(&self) -> bool {
        self.outcome == "INTERRUPTED"
            && self.reason == "NODE_LOST"
            && self.message.contains("unconfirmed")
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

    /// Whether a rank belongs to an attempt that was given up and may have lived on; never if its job wanted to wait.
    fn is_unconfirmed(&self, who: Who) -> bool {
        let waits = self.job.flags.iter().any(|flag| flag == "wait");
        !waits
            && self
                .attempt(who.task, who.attempt)
                .is_some_and(Attempt::is_unconfirmed)
    }
}

fn examine(world: &World, case: &Case<'_>, lines: &[Line], findings: &mut Findings) {
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
    attempts(case, findings);
    overlaps(case, findings);
    successes(case, findings);
    codes(case, findings);
    verdict(case, findings);
    cancels(case, lines, findings);
    gang_stop(case, findings);
    logs(world, case, findings);
    if case.job.kind == Kind::Outputs && case.state == "SUCCEEDED" {
        outputs(world, case, findings);
    }
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
