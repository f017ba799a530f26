//! The users of a run: they submit the planned jobs when these are due, lose patience, ask again under the same request
//! id, and cancel some of them. What they were told is kept, to be held against what became of it.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::ledger::{Who, boot_clock};
use super::plan::{Cancel, Job};
use super::rest;
use super::world::{As, World};
use crate::Ran;

/// Users that submit at the same time.
const USERS: usize = 4;
/// A command that takes longer is given up and repeated.
const PATIENCE: Duration = Duration::from_secs(20);
/// Time between tries of a command.
const AGAIN: Duration = Duration::from_millis(100);
/// After so long without success a command is broken, and so long after the faults nothing more is submitted.
const LONGEST: Duration = Duration::from_secs(240);
/// Time between looks at the nodes.
const WATCH: Duration = Duration::from_secs(1);
/// Exit codes after which the same command may succeed: nobody there, killed by us.
const PASSING: [i32; 2] = [69, 137];

/// A job that was accepted.
#[derive(Debug, Clone)]
pub(crate) struct Accepted {
    pub(crate) job: Job,
    pub(crate) id: u64,
    /// When the id was printed, by the boot clock.
    pub(crate) at: Duration,
}

/// A cancel that was answered.
#[derive(Debug, Clone)]
pub(crate) struct Cancelled {
    pub(crate) id: u64,
    pub(crate) at: Duration,
    /// Whether it waited until nothing ran any more.
    pub(crate) waited: bool,
    /// The state that it printed.
    pub(crate) state: String,
    /// What lived of the job at that moment, if it waited.
    pub(crate) alive: Vec<Who>,
}

/// What a node was seen as.
#[derive(Debug, Clone)]
pub(crate) struct Sighting {
    pub(crate) at: Duration,
    pub(crate) agent: usize,
    pub(crate) availability: String,
}

/// What all users did.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) accepted: Vec<Accepted>,
    pub(crate) cancelled: Vec<Cancelled>,
    /// What the admin saw of the nodes, in order of time.
    pub(crate) watched: Vec<Sighting>,
    /// Answers that no fault explains.
    pub(crate) broken: Vec<String>,
    /// Submits that were given up halfway and made again.
    pub(crate) repeated: u32,
}

/// The users.
#[derive(Debug)]
pub(crate) struct Users {
    jobs: Mutex<VecDeque<Job>>,
    hurries: AtomicUsize,
    told: Mutex<Told>,
}

impl Users {
    pub(crate) fn new(jobs: Vec<Job>) -> Self {
        Self {
            jobs: Mutex::new(jobs.into()),
            hurries: AtomicUsize::new(0),
            told: Mutex::default(),
        }
    }

    /// One more job is submitted now, before its time.
    pub(crate) fn hurry(&self) {
        self.hurries.fetch_add(1, Ordering::Relaxed);
    }

    /// What they were told.
    pub(crate) fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Submits everything and sees every cancel through. `time` is how long things go wrong.
    pub(crate) fn work(&self, world: &World, began: Instant, time: Duration) {
        std::thread::scope(|scope| {
            for _ in 0..USERS {
                scope.spawn(|| {
                    while let Some(job) = self.next(began, time + LONGEST) {
                        let Some(id) = self.submit(world, &job) else {
                            continue;
                        };
                        if let Some(cancel) = job.cancel {
                            scope.spawn(move || self.cancel(world, id, cancel));
                        }
                    }
                });
            }
        });
    }

    /// Looks at the nodes every second until the faults are over.
    pub(crate) fn watch(&self, world: &World, until: Instant) {
        while Instant::now() < until {
            let nodes = world.nodes();
            let at = boot_clock();
            for (agent, daemon) in world.agents.iter().enumerate() {
                let node = nodes.iter().find(|node| node["name"] == daemon.name());
                if let Some(availability) = node.and_then(|node| node["availability"].as_str()) {
                    let availability = availability.to_owned();
                    self.told().watched.push(Sighting {
                        at,
                        agent,
                        availability,
                    });
                }
            }
            rest(WATCH);
        }
    }

    /// The next job when it is due; nothing when there are no more, or when it is too late for any.
    fn next(&self, began: Instant, most: Duration) -> Option<Job> {
        loop {
            if began.elapsed() > most {
                return self.give_up();
            }
            {
                let mut jobs = self
                    .jobs
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                let due = jobs.front()?.due <= began.elapsed();
                let hurry = |hurries: usize| hurries.checked_sub(1);
                if due
                    || self
                        .hurries
                        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, hurry)
                        .is_ok()
                {
                    return jobs.pop_front();
                }
            }
            rest(Duration::from_millis(10));
        }
    }

    /// A cluster that takes no jobs fails the run once, and not once for each job that is left.
    fn give_up(&self) -> Option<Job> {
        let mut jobs = self
            .jobs
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let left = std::mem::take(&mut *jobs).len();
        if left > 0 {
            let problem = format!("{left} jobs could not be submitted within {LONGEST:?}");
            self.told().broken.push(problem);
        }
        None
    }

    fn submit(&self, world: &World, job: &Job) -> Option<u64> {
        let words = words(job, &job.command);
        let mut impatient = job.impatient.iter().copied();
        let answer =
            self.until_answered(world, &words, || impatient.next().unwrap_or(PATIENCE), true)?;
        let Some(id) = id(&answer) else {
            self.told()
                .broken
                .push(format!("submit {} printed {answer:?}", job.request));
            return None;
        };
        let at = boot_clock();
        self.told().accepted.push(Accepted {
            job: job.clone(),
            id,
            at,
        });
        if job.again
            && let Some(second) = self.until_answered(world, &words, || PATIENCE, true)
            && self::id(&second) != Some(id)
        {
            self.told()
                .broken
                .push(format!("{} made j{id} and then {second}", job.request));
        }
        if job.other {
            self.submit_other(world, job);
        }
        Some(id)
    }

    /// The same request id for something else is refused.
    fn submit_other(&self, world: &World, job: &Job) {
        let words = words(job, &["/bin/false".to_owned()]);
        let deadline = Instant::now() + LONGEST;
        let code = loop {
            let ran = world.yard(As::User, &words, PATIENCE);
            if !passes(&ran) || Instant::now() > deadline {
                break ran.code;
            }
            rest(AGAIN);
        };
        if code != 65 {
            self.told().broken.push(format!(
                "another job under {} ended with {code} instead of 65",
                job.request
            ));
        }
    }

    fn cancel(&self, world: &World, id: u64, cancel: Cancel) {
        rest(cancel.after);
        let job = format!("j{id}");
        let mut words = vec!["cancel".to_owned(), job];
        if !cancel.waits {
            words.push("--no-wait".to_owned());
        }
        let Some(answer) = self.until_answered(world, &words, || LONGEST, false) else {
            return;
        };
        let alive = if cancel.waits {
            world.ledger.alive(id)
        } else {
            Vec::new()
        };
        let state = answer
            .split_whitespace()
            .last()
            .unwrap_or_default()
            .to_owned();
        let cancelled = Cancelled {
            id,
            at: boot_clock(),
            waited: cancel.waits,
            state,
            alive,
        };
        self.told().cancelled.push(cancelled);
    }

    /// Repeats a command until it succeeds, and gives what it printed.
    fn until_answered(
        &self,
        world: &World,
        words: &[String],
        mut limit: impl FnMut() -> Duration,
        counts: bool,
    ) -> Option<String> {
        let deadline = Instant::now() + LONGEST;
        loop {
            let ran = world.yard(As::User, words, limit());
            let problem = match ran.code {
                0 => return Some(ran.stdout.trim().to_owned()),
                code if passes(&ran) && Instant::now() < deadline => {
                    self.told().repeated += u32::from(counts && code == 137);
                    rest(AGAIN);
                    continue;
                }
                code => code,
            };
            let command = words.join(" ");
            let told = format!(
                "`yard {command:.200}` ended with {problem}: {}",
                ran.stderr.trim()
            );
            self.told().broken.push(told);
            return None;
        }
    }
}

/// Whether the same command may succeed later. A full disk is refused like everything that only an operator can change.
fn passes(ran: &Ran) -> bool {
    PASSING.contains(&ran.code) || (ran.code == 77 && ran.stderr.contains("disk is full"))
}

fn words(job: &Job, command: &[String]) -> Vec<String> {
    let first = ["submit", "--request-id", &job.request].map(str::to_owned);
    let flags = job.flags.iter().cloned();
    first
        .into_iter()
        .chain(flags)
        .chain(["--".to_owned()])
        .chain(command.iter().cloned())
        .collect()
}

fn id(answer: &str) -> Option<u64> {
    answer.strip_prefix('j')?.parse().ok()
}
