//! What goes wrong and when, drawn from the seed before the run begins. Nothing here does anything.

use std::fmt;
use std::time::Duration;

use super::rng::Rng;
use super::timing;

/// What goes wrong. Agents are counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// `kill -9`, and started again after the pause.
    KillCoordinator { pause: Duration },
    /// `kill -9` to it and every agent at once, and started again after the pause.
    KillAll { pause: Duration },
    /// SIGSTOP, then SIGCONT.
    StopCoordinator,
    /// Its cable is pulled: nobody reaches it.
    CutCoordinator,
    /// Its disk is filled to the last byte.
    FullCoordinatorDisk,
    /// `kill -9`, and started again after the pause.
    KillAgent { agent: usize, pause: Duration },
    /// `kill -9` to every supervisor of a member on the agent's node.
    KillShims { agent: usize },
    /// SIGSTOP, then SIGCONT.
    StopAgent { agent: usize },
    /// Its cable is pulled.
    Cut { agent: usize },
    /// The same, for longer than the cluster waits.
    LongCut { agent: usize },
    /// SIGSTOP for longer than the cluster waits; its ranks run on.
    LongStop { agent: usize },
    /// It hears nothing of the coordinator, which hears it.
    Deaf { agent: usize },
    /// The coordinator hears nothing of it, and it hears the coordinator.
    Mute { agent: usize },
    /// It hears nothing of another agent's node.
    Peers { agent: usize, other: usize },
    /// So many of a hundred packets are lost in each direction.
    Loss { agent: usize, percent: u64 },
    /// Every byte between it and the coordinator takes so long.
    Delay { agent: usize, by: Duration },
    /// Its disk is filled to the last byte.
    FullDisk { agent: usize },
}

impl Fault {
    /// The agent that it concerns, if it is one's.
    pub(crate) fn agent(self) -> Option<usize> {
        match self {
            Self::KillCoordinator { .. }
            | Self::KillAll { .. }
            | Self::StopCoordinator
            | Self::CutCoordinator
            | Self::FullCoordinatorDisk => None,
            Self::KillAgent { agent, .. }
            | Self::KillShims { agent }
            | Self::StopAgent { agent }
            | Self::Cut { agent }
            | Self::LongCut { agent }
            | Self::LongStop { agent }
            | Self::Deaf { agent }
            | Self::Mute { agent }
            | Self::Peers { agent, .. }
            | Self::Loss { agent, .. }
            | Self::Delay { agent, .. }
            | Self::FullDisk { agent } => Some(agent),
        }
    }

    /// The kind, for people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::KillCoordinator { .. } => "coordinator killed",
            Self::KillAll { .. } => "coordinator and all agents killed",
            Self::StopCoordinator => "coordinator stopped",
            Self::CutCoordinator => "coordinator cut off",
            Self::FullCoordinatorDisk => "coordinator's disk full",
            Self::KillAgent { .. } => "agent killed",
            Self::KillShims { .. } => "supervisors killed",
            Self::StopAgent { .. } => "agent stopped",
            Self::Cut { .. } => "node cut off",
            Self::LongCut { .. } => "node cut off beyond lost_after",
            Self::LongStop { .. } => "agent stopped beyond lost_after",
            Self::Deaf { .. } => "one way: node does not hear",
            Self::Mute { .. } => "one way: node is not heard",
            Self::Peers { .. } => "one way: between two nodes",
            Self::Loss { .. } => "packets lost",
            Self::Delay { .. } => "packets late",
            Self::FullDisk { .. } => "node's disk full",
        }
    }
}

/// One fault of the script.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    /// Since the faults began.
    pub(crate) at: Duration,
    /// Until it is healed; zero for what is over at once.
    pub(crate) lasts: Duration,
    pub(crate) fault: Fault,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:7.3} s: {:?}", self.at.as_secs_f64(), self.fault)?;
        if self.lasts > Duration::ZERO {
            write!(f, " for {:.3} s", self.lasts.as_secs_f64())?;
        }
        Ok(())
    }
}

/// What the cluster is like, as far as the script must know.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stage {
    pub(crate) agents: usize,
    /// The agent whose data lie on a small file system of their own.
    pub(crate) small_disk: usize,
    /// The agent that reaches the coordinator through the slow line.
    pub(crate) slow_line: usize,
    /// Whether the coordinator's data lie on a small file system.
    pub(crate) coordinator_disk: bool,
}

/// The agent that is away for longer than the cluster waits, and when, in hundredths of the run. Jobs of one node go to the
/// fullest one that holds them and to the first of equals, so that this is where most of them run.
pub(crate) const LONG_AGENT: usize = 0;
const LONG_AT: [u32; 2] = [15, 60];

/// Draws the script for a time; all is healed when that is over. The coordinator and each agent have troubles of their
/// own, one at a time each, so that up to `agents + 1` things are wrong at once.
///
/// A node is given up only by a coordinator that heard nothing of it for all of that time, as leases begin anew when it
/// starts; so it is left alone while a node is away for long.
pub(crate) fn script(rng: &mut Rng, time: Duration, stage: Stage) -> Vec<Step> {
    let mut long = Vec::new();
    for (hundredths, fault) in LONG_AT.into_iter().zip([
        Fault::LongCut { agent: LONG_AGENT },
        Fault::LongStop { agent: LONG_AGENT },
    ]) {
        let at = time * hundredths / 100;
        if time * 35 / 100 > timing::LONG && at + timing::LONG < time {
            long.push(Step {
                at,
                lasts: timing::LONG,
                fault,
            });
        }
    }
    let mut steps = Vec::new();
    let mut coordinator = rng.fork();
    stream(&mut steps, &mut coordinator, time, (1000, 5000), |rng| {
        of_coordinator(rng, stage)
    });
    steps.retain(|step| !long.iter().any(|long| overlap(step, long)));
    for agent in 0..stage.agents {
        let mut own = Vec::new();
        stream(&mut own, &mut rng.fork(), time, (1000, 6000), |rng| {
            of_agent(rng, agent, stage)
        });
        own.retain(|step| agent != LONG_AGENT || !long.iter().any(|long| overlap(step, long)));
        steps.extend(own);
    }
    steps.extend(long);
    steps.sort_by_key(|step| step.at);
    steps
}

/// When nodes fall away for longer than the cluster waits.
pub(crate) fn long(script: &[Step]) -> Vec<Duration> {
    let long = script.iter().filter(|step| step.lasts >= timing::LONG);
    long.map(|step| step.at).collect()
}

fn overlap(one: &Step, other: &Step) -> bool {
    one.at <= other.at + other.lasts && other.at <= one.at + one.lasts
}

/// Adds one fault after another, with pauses (milliseconds) between them.
fn stream(
    steps: &mut Vec<Step>,
    rng: &mut Rng,
    time: Duration,
    pause: (u64, u64),
    mut draw: impl FnMut(&mut Rng) -> (Fault, Duration),
) {
    let mut at = Duration::ZERO;
    loop {
        at += Duration::from_millis(rng.between(pause.0, pause.1));
        let (fault, lasts) = draw(rng);
        if at + lasts >= time {
            return;
        }
        steps.push(Step { at, lasts, fault });
        at += lasts;
    }
}

/// Half of the restarts are immediate, as a supervisor's are.
fn pause(rng: &mut Rng) -> Duration {
    Duration::from_millis(if rng.percent(50) {
        0
    } else {
        rng.between(100, 3000)
    })
}

fn seconds(rng: &mut Rng, least: u64, most: u64) -> Duration {
    Duration::from_millis(rng.between(least * 1000, most * 1000))
}

fn of_coordinator(rng: &mut Rng, stage: Stage) -> (Fault, Duration) {
    let pause = pause(rng);
    let mut choice = vec![
        (80, Fault::KillCoordinator { pause }),
        (10, Fault::KillAll { pause }),
        (15, Fault::StopCoordinator),
        (15, Fault::CutCoordinator),
    ];
    if stage.coordinator_disk {
        choice.push((20, Fault::FullCoordinatorDisk));
    }
    let fault = rng.weighted(&choice);
    match fault {
        Fault::KillCoordinator { .. } | Fault::KillAll { .. } => (fault, Duration::ZERO),
        _ => (fault, seconds(rng, 1, 5)),
    }
}

fn of_agent(rng: &mut Rng, agent: usize, stage: Stage) -> (Fault, Duration) {
    let other = (agent + 1) % stage.agents;
    let mut choice = vec![
        (
            30,
            Fault::KillAgent {
                agent,
                pause: pause(rng),
            },
        ),
        (4, Fault::KillShims { agent }),
        (12, Fault::StopAgent { agent }),
        (12, Fault::Cut { agent }),
        (8, Fault::Deaf { agent }),
        (8, Fault::Mute { agent }),
        (6, Fault::Peers { agent, other }),
        (
            10,
            Fault::Loss {
                agent,
                percent: rng.between(5, 35),
            },
        ),
    ];
    if agent == stage.slow_line {
        let by = Duration::from_millis(rng.between(30, 800));
        choice.push((25, Fault::Delay { agent, by }));
    }
    if agent == stage.small_disk {
        choice.push((20, Fault::FullDisk { agent }));
    }
    let fault = rng.weighted(&choice);
    match fault {
        Fault::KillAgent { .. } | Fault::KillShims { .. } => (fault, Duration::ZERO),
        _ => (fault, seconds(rng, 1, 5)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAGE: Stage = Stage {
        agents: 3,
        small_disk: 0,
        slow_line: 2,
        coordinator_disk: true,
    };

    #[test]
    fn a_seed_is_a_script_that_ends_in_time_and_holds_everything() {
        let time = Duration::from_secs(1800);
        let draw = |seed| script(&mut Rng::new(seed), time, STAGE);
        let shown = |steps: &[Step]| steps.iter().map(ToString::to_string).collect::<Vec<_>>();
        let steps = draw(3);
        assert_eq!(shown(&steps), shown(&draw(3)));
        assert_ne!(shown(&steps), shown(&draw(4)));
        assert!(steps.iter().all(|step| step.at + step.lasts < time));
        let names: std::collections::BTreeSet<_> =
            steps.iter().map(|step| step.fault.name()).collect();
        assert_eq!(names.len(), 17, "{names:?}");
    }
}
