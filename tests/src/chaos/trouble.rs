//! When something was wrong, and with whom: the script of a run on the boot clock, so that what took long can be told from
//! what was held up. Knows nothing of what was promised.

use std::time::Duration;

use super::script::{Fault, Step};
use super::timing;

/// A process that was killed and started again needs a moment before all is as it was.
const RETURN: Duration = Duration::from_secs(1);

/// The faults of a run.
#[derive(Debug)]
pub(crate) struct Troubles(Vec<Trouble>);

#[derive(Debug)]
struct Trouble {
    from: Duration,
    until: Duration,
    /// Nobody: the coordinator's.
    agent: Option<usize>,
    everyone: bool,
}

impl Troubles {
    /// Of a script that was begun at this time of the boot clock.
    pub(crate) fn new(script: &[Step], began: Duration) -> Self {
        let troubles = script.iter().map(|step| {
            let lasts = match step.fault {
                Fault::KillCoordinator { pause }
                | Fault::KillAll { pause }
                | Fault::KillAgent { pause, .. } => pause + RETURN,
                _ => step.lasts,
            };
            Trouble {
                from: began + step.at,
                until: began + step.at + lasts,
                agent: step.fault.agent(),
                everyone: matches!(step.fault, Fault::KillAll { .. }),
            }
        });
        Self(troubles.collect())
    }

    /// Whether the coordinator or one of these agents was in trouble at some time from one to another.
    pub(crate) fn met(&self, from: Duration, until: Duration, agents: &[usize]) -> bool {
        self.0.iter().any(|trouble| {
            trouble.from <= until
                && trouble.until >= from
                && trouble
                    .agent
                    .is_none_or(|agent| trouble.everyone || agents.contains(&agent))
        })
    }

    /// When one of these agents fell away for longer than the cluster waits.
    pub(crate) fn long(&self, agents: &[usize]) -> impl Iterator<Item = Duration> {
        let long = self.0.iter().filter(|trouble| {
            trouble.until.saturating_sub(trouble.from) >= timing::LONG
                && trouble.agent.is_some_and(|agent| agents.contains(&agent))
        });
        long.map(|trouble| trouble.from)
    }

    /// When the coordinator had its next trouble after a time.
    pub(crate) fn next_of_coordinator(&self, after: Duration) -> Option<Duration> {
        let own = self.0.iter().filter(|trouble| trouble.agent.is_none());
        own.map(|trouble| trouble.from)
            .filter(|from| *from > after)
            .min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn trouble_concerns_its_agent_and_the_coordinators_concerns_all() {
        let step = |at, lasts, fault| Step {
            at: AT(at),
            lasts: AT(lasts),
            fault,
        };
        let pause = AT(1);
        let script = [
            step(10, 2, Fault::Cut { agent: 1 }),
            step(20, 0, Fault::KillCoordinator { pause }),
        ];
        let troubles = Troubles::new(&script, AT(100));
        assert!(troubles.met(AT(111), AT(115), &[0, 1]));
        assert!(!troubles.met(AT(111), AT(115), &[0, 2]));
        assert!(!troubles.met(AT(113), AT(115), &[1]));
        assert!(troubles.met(AT(121), AT(121), &[]));
        assert!(!troubles.met(AT(123), AT(125), &[0, 1, 2]));
        assert_eq!(troubles.next_of_coordinator(AT(0)), Some(AT(120)));
        assert_eq!(troubles.next_of_coordinator(AT(120)), None);
    }
}
