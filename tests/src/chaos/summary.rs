//! The numbers of a run, as a text for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use super::Options;
use super::check::Findings;
use super::daemon::Daemon;
use super::script::Step;
use super::users::Users;
use super::world::World;

/// Writes it all down.
pub(crate) fn summary(
    options: &Options,
    world: &World,
    script: &[Step],
    users: &Users,
    window: (Duration, Duration),
    findings: &Findings,
) -> String {
    let told = users.told();
    let mut text = format!(
        "seed {}, {} s of faults, {} jobs\n",
        options.seed,
        window.1.saturating_sub(window.0).as_secs(),
        told.accepted.len()
    );
    let mut faults: BTreeMap<&str, u32> = BTreeMap::new();
    for step in script {
        *faults.entry(step.fault.name()).or_default() += 1;
    }
    let line = |text: &mut String, name: &str, value: String| {
        let _ = writeln!(text, "  {name:<52} {value}");
    };
    text.push_str("faults\n");
    for (name, count) in faults {
        line(&mut text, name, count.to_string());
    }
    text.push_str("jobs by kind and end\n");
    for ((kind, end), count) in &findings.ends {
        line(&mut text, &format!("{kind:?}: {end}"), count.to_string());
    }
    text.push_str("attempts that did not succeed\n");
    for (name, count) in &findings.attempts {
        line(&mut text, name, count.to_string());
    }
    text.push_str("allowed, and counted\n");
    for (name, count) in &findings.allowed {
        line(&mut text, name, count.to_string());
    }
    for daemon in world.daemons() {
        let ends = daemon.own_ends();
        if !ends.is_empty() {
            line(
                &mut text,
                &format!("{} ended by itself", daemon.name()),
                ends.join(", "),
            );
        }
    }
    text.push_str("figures\n");
    line(
        &mut text,
        "submits given up halfway and repeated",
        told.repeated.to_string(),
    );
    line(
        &mut text,
        "cancels answered",
        told.cancelled.len().to_string(),
    );
    line(
        &mut text,
        "ranks ended during the faults",
        findings.ended_meanwhile.to_string(),
    );
    line(
        &mut text,
        "longest time without one",
        seconds(findings.longest_pause),
    );
    let (from_kill, from_start) = recoveries(
        &world.coordinator,
        &told.accepted.iter().map(|one| one.at).collect::<Vec<_>>(),
    );
    line(
        &mut text,
        "coordinator killed until next accepted submit",
        spread(from_kill),
    );
    line(
        &mut text,
        "coordinator started until next accepted submit",
        spread(from_start),
    );
    line(
        &mut text,
        "rank failed until its gang was gone",
        spread(findings.gang_stops.clone()),
    );
    line(
        &mut text,
        "faults over until all jobs were over",
        seconds(findings.settled),
    );
    line(
        &mut text,
        "faults over until nothing was left",
        seconds(findings.clean),
    );
    line(
        &mut text,
        "left last",
        findings.last_left.chars().take(200).collect(),
    );
    line(
        &mut text,
        "promises broken",
        findings.broken.len().to_string(),
    );
    text
}

/// For each `kill -9` of the coordinator after which it was started: time until the next submit was accepted, from the
/// kill and from the start.
fn recoveries(coordinator: &Daemon, accepted: &[Duration]) -> (Vec<Duration>, Vec<Duration>) {
    let recovered = coordinator.kills().into_iter().filter_map(|kill| {
        let started = kill.started?;
        let next = accepted.iter().copied().filter(|at| *at > started).min()?;
        Some((next.saturating_sub(kill.at), next.saturating_sub(started)))
    });
    recovered.unzip()
}

fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

/// Median and worst of some times.
fn spread(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    match (times.get(times.len() / 2), times.last()) {
        (Some(median), Some(worst)) => {
            format!(
                "median {}, worst {} of {}",
                seconds(*median),
                seconds(*worst),
                times.len()
            )
        }
        _ => "never".to_owned(),
    }
}
