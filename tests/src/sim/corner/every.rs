//! Every disturbance of a scenario: which there are follows from an undisturbed run.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::str::FromStr;

use super::super::clock::secs;
use super::super::rng::Rng;
use super::super::swarm::Swarm;
use super::super::world::World;
use super::super::{Failure, Options, told};
use super::{
    Boundary, Corner, Crash, Disturbance, Ends, Message, Scenario, Side, Swap, find, scenarios,
};

/// How often a scenario was run.
#[derive(Debug, Clone, Default)]
pub struct CornerSum {
    /// Boundaries of an undisturbed run.
    pub boundaries: u64,
    /// Pairs of messages under way at the same time in an undisturbed run.
    pub pairs: u64,
    /// Runs with an end of the coordinator, an agent, a node, its shims.
    pub crashes: [u64; 4],
    /// Runs with a pair in the other order.
    pub swaps: u64,
    /// Simulated happenings of all runs.
    pub events: u64,
    /// How often each fault and branch was reached in all runs.
    pub counters: BTreeMap<&'static str, u64>,
}

impl CornerSum {
    /// All runs, with the undisturbed one.
    #[must_use]
    pub fn runs(&self) -> u64 {
        1 + self.crashes.iter().sum::<u64>() + self.swaps
    }

    fn add(&mut self, ran: Ran) {
        self.events += ran.events;
        for (what, times) in ran.counters {
            *self.counters.entry(what).or_default() += times;
        }
    }
}

impl fmt::Display for Disturbance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Swap(Swap {
                first,
                second,
                until,
            }) => write!(f, "swap:{first}:{second}:{until}"),
            Self::Crash(Crash { at, ends, done }) => {
                let (what, host) = match ends {
                    Ends::Coordinator => ("coordinator", 0),
                    Ends::Agent(host) => ("agent", *host),
                    Ends::Power(host) => ("power", *host),
                    Ends::Shims(host) => ("shims", *host),
                };
                write!(f, "crash:{at}:{what}:{host}:{}", u8::from(*done))
            }
        }
    }
}

impl FromStr for Disturbance {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let parts: Vec<&str> = text.split(':').collect();
        let number = |text: &str| text.parse::<u64>().map_err(|_| ());
        let index = |text: &str| text.parse::<usize>().map_err(|_| ());
        match parts[..] {
            ["none"] => Ok(Self::None),
            ["swap", first, second, until] => Ok(Self::Swap(Swap {
                first: number(first)?,
                second: number(second)?,
                until: number(until)?,
            })),
            ["crash", at, what, host, done] => {
                let host = index(host)?;
                let ends = match what {
                    "coordinator" => Ends::Coordinator,
                    "agent" => Ends::Agent(host),
                    "power" => Ends::Power(host),
                    "shims" => Ends::Shims(host),
                    _ => return Err(()),
                };
                let (at, done) = (index(at)?, number(done)? != 0);
                Ok(Self::Crash(Crash { at, ends, done }))
            }
            _ => Err(()),
        }
    }
}

/// The names of all scenarios.
#[must_use]
pub fn scenario_names() -> Vec<&'static str> {
    let all = scenarios::all();
    all.iter().map(|scenario| scenario.name).collect()
}

/// What a run of a scenario left.
struct Ran {
    boundaries: Vec<Boundary>,
    messages: Vec<Message>,
    events: u64,
    counters: BTreeMap<&'static str, u64>,
    trace: Vec<String>,
}

fn once(
    scenario: &Scenario,
    seed: u64,
    disturbance: Disturbance,
    whole_trace: bool,
) -> Result<Ran, Box<Failure>> {
    let mut rng = Rng::new(seed);
    let swarm = Swarm::scripted(&mut rng, scenario.hosts);
    let mut world = World::new(swarm, rng);
    world.trace.whole = whole_trace;
    world.corner = Some(Box::new(Corner::new(scenario.clone(), disturbance)));
    for host in &mut world.hosts {
        host.shape(4, 1);
    }
    let ran = catch_unwind(AssertUnwindSafe(|| world.run()));
    let broken = match ran {
        Ok(()) => world
            .broken
            .take()
            .map(|broken| (broken.invariant, broken.what)),
        Err(panic) => Some(("panic", told(panic.as_ref()))),
    };
    let trace = world.trace.tail();
    if let Some((invariant, what)) = broken {
        let again = format!("{}/{seed}/{disturbance}", scenario.name);
        return Err(Box::new(Failure {
            options: Options {
                seed,
                whole_trace,
                ..Options::default()
            },
            invariant,
            what,
            trace,
            corner: Some(again),
        }));
    }
    let (events, counters) = (world.events, std::mem::take(&mut world.trace.counters));
    let corner = world.corner.take().map(|corner| *corner);
    let (boundaries, messages) = corner.map_or_else(Default::default, |corner| {
        (corner.boundaries, corner.messages)
    });
    Ok(Ran {
        boundaries,
        messages,
        events,
        counters,
        trace,
    })
}

/// Whatever can end at a boundary, and both ways in which what is under way there can go.
fn crashes(at: usize, boundary: &Boundary) -> Vec<Crash> {
    let mut all = Vec::new();
    let mut add = |ends, both: bool| {
        for done in [false, true].into_iter().take(if both { 2 } else { 1 }) {
            all.push(Crash { at, ends, done });
        }
    };
    add(Ends::Coordinator, boundary.commit);
    if let Side::Host(host) = boundary.side {
        if boundary.agent {
            add(Ends::Agent(host), boundary.requests);
        }
        add(Ends::Power(host), boundary.requests);
        if boundary.shims {
            add(Ends::Shims(host), false);
        }
    }
    all
}

/// Pairs of messages in different streams, each sent before the other arrived.
fn pairs(messages: &[Message]) -> Vec<Swap> {
    let mut arrived: Vec<(&Message, u64, u64)> = messages
        .iter()
        .filter_map(|message| message.delivered.map(|(at, time)| (message, at, time)))
        .collect();
    arrived.sort_by_key(|(_, at, _)| *at);
    let mut pairs = Vec::new();
    for (index, (first, at, _)) in arrived.iter().enumerate() {
        for (second, _, time) in &arrived[index + 1..] {
            let together = second.sent < *at && second.stream != first.stream;
            if together && !(first.beat && second.beat) {
                pairs.push(Swap {
                    first: first.number,
                    second: second.number,
                    until: time + secs(5),
                });
            }
        }
    }
    pairs
}

/// Runs a scenario with one seed undisturbed, and with one in `share` of everything that can disturb it.
///
/// # Errors
/// The broken promise.
pub fn corner(name: &str, seed: u64, share: usize) -> Result<CornerSum, Box<Failure>> {
    let mut sum = CornerSum::default();
    let Some(scenario) = find(name) else {
        return Ok(sum);
    };
    let plain = once(&scenario, seed, Disturbance::None, false)?;
    sum.boundaries = plain.boundaries.len() as u64;
    let crashes: Vec<Crash> = (1..)
        .zip(&plain.boundaries)
        .flat_map(|(at, boundary)| crashes(at, boundary))
        .collect();
    // Another part of them for each scenario.
    let skip = name.len() % share.max(1);
    for crash in crashes.into_iter().skip(skip).step_by(share.max(1)) {
        let kind = match crash.ends {
            Ends::Coordinator => 0,
            Ends::Agent(_) => 1,
            Ends::Power(_) => 2,
            Ends::Shims(_) => 3,
        };
        sum.crashes[kind] += 1;
        sum.add(once(&scenario, seed, Disturbance::Crash(crash), false)?);
    }
    let pairs = pairs(&plain.messages);
    sum.add(plain);
    sum.pairs = pairs.len() as u64;
    for swap in pairs.into_iter().skip(skip).step_by(share.max(1)) {
        sum.swaps += 1;
        sum.add(once(&scenario, seed, Disturbance::Swap(swap), false)?);
    }
    Ok(sum)
}

/// Repeats one run that is named as a failure names it, and gives everything that happened; nothing if there is none.
///
/// # Errors
/// The broken promise.
pub fn corner_again(named: &str) -> Result<Option<Vec<String>>, Box<Failure>> {
    let parts: Vec<&str> = named.split('/').collect();
    let [name, seed, disturbance] = parts[..] else {
        return Ok(None);
    };
    let (Some(scenario), Ok(seed), Ok(disturbance)) =
        (find(name), seed.parse(), disturbance.parse())
    else {
        return Ok(None);
    };
    once(&scenario, seed, disturbance, true).map(|ran| Some(ran.trace))
}
