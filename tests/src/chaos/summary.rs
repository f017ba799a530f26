//! The numbers of a run, as a text for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use super::Options;
use super::check::Findings;
use super::daemon::Kill;
use super::script::Step;
use super::trouble::Troubles;
use super::users::Users;
use super::world::World;

/// A kill and its place in the script, or the start after it, are not further apart unless there is a pause.
const SAME: Duration = Duration::from_millis(100);

/// Writes it all down.
pub(crate) fn summary(
    options: &Options,
    world: &World,
    script: &[Step],
    users: &Users,
    (window, troubles): ((Duration, Duration), &Troubles),
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
    let accepted: Vec<_> = told.accepted.iter().map(|one| one.at).collect();
    let recovered = recoveries(&world.coordinator.kills(), &accepted, troubles);
    line(
        &mut text,
        "coordinator killed, begun at once: next accepted submit",
        spread(recovered.from_kill),
    );
    line(
        &mut text,
        "coordinator begun after a kill: next accepted submit",
        spread(recovered.from_start),
    );
    line(
        &mut text,
        "  (left out: another fault of it came before)",
        recovered.left_out.to_string(),
    );
    let stops = |disturbed: bool| {
        let stops = findings.gang_stops.iter();
        let of_them = stops.filter(|stop| stop.disturbed == disturbed);
        spread(of_them.map(|stop| stop.took).collect())
    };
    line(
        &mut text,
        "rank failed until its gang had ended, undisturbed",
        stops(false),
    );
    line(
        &mut text,
        "  (with a fault of the coordinator or of its nodes)",
        stops(true),
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

/// Times until a submit was accepted again.
#[derive(Debug, Default)]
struct Recoveries {
    /// From the kill, where the script made no pause.
    from_kill: Vec<Duration>,
    /// From the start of the process, its pause left out.
    from_start: Vec<Duration>,
    /// Kills that another fault of the coordinator followed before that.
    left_out: usize,
}

/// From each `kill -9` of the coordinator to the next submit that was accepted, as its user saw it: users try every 0.1
/// seconds. Where the script did something else to the coordinator before that, the time would be the script's.
fn recoveries(kills: &[Kill], accepted: &[Duration], troubles: &Troubles) -> Recoveries {
    let mut recoveries = Recoveries::default();
    for kill in kills {
        let Some(started) = kill.started else {
            continue;
        };
        let next = accepted.iter().copied().filter(|at| *at > started).min();
        let trouble = troubles.next_of_coordinator(kill.at + SAME);
        match (next, trouble) {
            (Some(next), trouble) if trouble.is_none_or(|trouble| next < trouble) => {
                recoveries.from_start.push(next.saturating_sub(started));
                if started.saturating_sub(kill.at) < SAME {
                    recoveries.from_kill.push(next.saturating_sub(kill.at));
                }
            }
            _ => recoveries.left_out += 1,
        }
    }
    recoveries
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

#[cfg(test)]
mod tests {
    use super::super::script::Fault;
    use super::*;

    const AT: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn a_recovery_leaves_out_pauses_and_what_another_fault_held_up() {
        let kill = |at, pause| {
            let pause = AT(pause);
            let fault = Fault::KillCoordinator { pause };
            let (lasts, at) = (Duration::ZERO, AT(at));
            (
                Kill {
                    at: at + AT(3),
                    started: Some(at + AT(10) + pause),
                },
                Step { at, lasts, fault },
            )
        };
        let (kills, script): (Vec<_>, Vec<_>) = [
            kill(1000, 0),
            kill(5000, 2000),
            kill(9000, 0),
            kill(9500, 0),
        ]
        .into_iter()
        .unzip();
        let accepted = [AT(1400), AT(7500), AT(9900)];
        let found = recoveries(&kills, &accepted, &Troubles::new(&script, Duration::ZERO));
        assert_eq!(found.from_start, [AT(390), AT(490), AT(390)]);
        assert_eq!(found.from_kill, [AT(397), AT(397)]);
        assert_eq!(found.left_out, 1);
    }
}
