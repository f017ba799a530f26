//! The ledger: what the ranks themselves wrote down, in a file that every network namespace of this machine shares. It is
//! the witness against the cluster's own view, so nothing here may know of it.
//!
//! A line: boot-clock nanoseconds, job, task, attempt, rank, pid, event, and the event's own word. The attempt is its
//! number, which is the epoch in every message of the cluster and `YARD_ATTEMPT` for the rank. Beside the file lies a
//! directory of locks, one file for each rank of each attempt: made once (a second start fails) and locked for as long as
//! the rank or anything that it left behind lives, so that a later attempt can see whether an earlier one is over.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::time::{ClockId, clock_gettime};

/// Now, on the clock that no one can set and that all namespaces share.
pub(crate) fn boot_clock() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// One rank of one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Who {
    pub(crate) job: u64,
    pub(crate) task: u32,
    /// The epoch.
    pub(crate) attempt: u32,
    pub(crate) rank: u32,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            job,
            task,
            attempt,
            rank,
        } = self;
        write!(f, "j{job}.{task}.{attempt} rank {rank}")
    }
}

/// What happened to a rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// It runs, in this cgroup (version 2).
    Start(String),
    /// It was started although it had been started before.
    Twice,
    /// It runs, and so does something of this other attempt of its task.
    Overlap(u32),
    /// It left a process in a session of its own.
    Daemon,
    /// It was told to end.
    Term,
    /// So many lines of the known pattern went to standard output.
    Wrote(u64),
    /// The next thing it does is to exit with this code.
    End(u8),
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) at: Duration,
    pub(crate) who: Who,
    pub(crate) pid: u32,
    pub(crate) event: Event,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Who {
            job,
            task,
            attempt,
            rank,
        } = self.who;
        write!(
            f,
            "{} {job} {task} {attempt} {rank} {} ",
            self.at.as_nanos(),
            self.pid
        )?;
        match &self.event {
            Event::Start(cgroup) => write!(f, "start {cgroup}"),
            Event::Twice => f.write_str("twice -"),
            Event::Overlap(attempt) => write!(f, "overlap {attempt}"),
            Event::Daemon => f.write_str("daemon -"),
            Event::Term => f.write_str("term -"),
            Event::Wrote(lines) => write!(f, "wrote {lines}"),
            Event::End(code) => write!(f, "end {code}"),
        }
    }
}

fn parse(text: &str) -> Option<Line> {
    let mut words = text.splitn(8, ' ');
    let at = Duration::from_nanos(words.next()?.parse().ok()?);
    let who = Who {
        job: words.next()?.parse().ok()?,
        task: words.next()?.parse().ok()?,
        attempt: words.next()?.parse().ok()?,
        rank: words.next()?.parse().ok()?,
    };
    let pid = words.next()?.parse().ok()?;
    let (event, word) = (words.next()?, words.next()?);
    let event = match event {
        "start" => Event::Start(word.to_owned()),
        "twice" => Event::Twice,
        "overlap" => Event::Overlap(word.parse().ok()?),
        "daemon" => Event::Daemon,
        "term" => Event::Term,
        "wrote" => Event::Wrote(word.parse().ok()?),
        "end" => Event::End(word.parse().ok()?),
        _ => return None,
    };
    Some(Line {
        at,
        who,
        pid,
        event,
    })
}

/// Where the ledger lies.
#[derive(Debug, Clone)]
pub(crate) struct Ledger {
    dir: PathBuf,
}

impl Ledger {
    /// Makes an empty one that any user may add to.
    pub(crate) fn create(dir: &Path) -> io::Result<Self> {
        let ledger = Self::at(dir);
        std::fs::create_dir_all(ledger.locks())?;
        for place in [dir.to_owned(), ledger.locks()] {
            std::fs::set_permissions(place, Permissions::from_mode(0o1777))?;
        }
        File::create(ledger.file())?;
        std::fs::set_permissions(ledger.file(), Permissions::from_mode(0o666))?;
        Ok(ledger)
    }

    /// One that exists.
    pub(crate) fn at(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    fn file(&self) -> PathBuf {
        self.dir.join("ledger")
    }

    fn locks(&self) -> PathBuf {
        self.dir.join("locks")
    }

    /// Adds a line, in one write that is on disk when this returns.
    pub(crate) fn add(&self, who: Who, event: Event) -> io::Result<()> {
        let mut file = OpenOptions::new()
            .append(true)
            .custom_flags(OFlag::O_SYNC.bits())
            .open(self.file())?;
        let line = Line {
            at: boot_clock(),
            who,
            pid: std::process::id(),
            event,
        };
        file.write_all(format!("{line}\n").as_bytes())
    }

    /// Every line, in the order of the file, which is the order in which they were added.
    pub(crate) fn read(&self) -> io::Result<Vec<Line>> {
        let text = std::fs::read_to_string(self.file())?;
        text.lines()
            .map(|line| {
                parse(line)
                    .ok_or_else(|| io::Error::other(format!("no line of a ledger: {line:?}")))
            })
            .collect()
    }

    /// Takes the rank's lock, which lasts as long as the file is open in any process; fails if the rank ever had one.
    pub(crate) fn lock(&self, who: Who) -> io::Result<File> {
        let dir = self.task(who);
        match std::fs::create_dir(&dir) {
            Ok(()) => std::fs::set_permissions(&dir, Permissions::from_mode(0o1777))?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        let path = dir.join(format!("{}-{}", who.attempt, who.rank));
        let file = OpenOptions::new().write(true).create_new(true).open(path)?;
        file.lock()?;
        Ok(file)
    }

    fn task(&self, who: Who) -> PathBuf {
        self.locks().join(format!("{}.{}", who.job, who.task))
    }

    /// Other attempts of the rank's task of which something lives.
    pub(crate) fn others_alive(&self, who: Who) -> io::Result<Vec<u32>> {
        let mut alive = alive_in(&self.task(who))?;
        alive.retain(|(attempt, _)| *attempt != who.attempt);
        let mut attempts: Vec<_> = alive.into_iter().map(|(attempt, _)| attempt).collect();
        attempts.dedup();
        Ok(attempts)
    }

    /// Ranks of a job that live, or of which something lives.
    pub(crate) fn alive(&self, job: u64) -> Vec<Who> {
        let prefix = format!("{job}.");
        let tasks = std::fs::read_dir(self.locks())
            .into_iter()
            .flatten()
            .flatten();
        let tasks = tasks.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some((name.strip_prefix(&prefix)?.parse().ok()?, entry.path()))
        });
        let ranks = |(task, path): (u32, PathBuf)| {
            let alive = alive_in(&path).unwrap_or_default();
            alive.into_iter().map(move |(attempt, rank)| Who {
                job,
                task,
                attempt,
                rank,
            })
        };
        tasks.flat_map(ranks).collect()
    }
}

/// Attempts and ranks whose lock is held, in order.
fn alive_in(dir: &Path) -> io::Result<Vec<(u32, u32)>> {
    let mut alive = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let ids = name.to_str().and_then(|name| name.split_once('-'));
        let Some((attempt, rank)) =
            ids.and_then(|(attempt, rank)| Some((attempt.parse().ok()?, rank.parse().ok()?)))
        else {
            continue;
        };
        // Nobody else ever waits for a lock here, so that one that cannot be shared is held by its rank.
        if let Err(std::fs::TryLockError::WouldBlock) = File::open(entry.path())?.try_lock_shared()
        {
            alive.push((attempt, rank));
        }
    }
    alive.sort_unstable();
    Ok(alive)
}

/// What the ledger says of one rank.
#[derive(Debug, Clone, Default)]
pub(crate) struct Life {
    pub(crate) starts: u32,
    pub(crate) start: Duration,
    pub(crate) end: Option<(Duration, u8)>,
    pub(crate) wrote: Option<u64>,
    pub(crate) overlaps: Vec<u32>,
    pub(crate) cgroup: String,
}

/// The lines by rank.
pub(crate) fn lives(lines: &[Line]) -> BTreeMap<Who, Life> {
    let mut lives: BTreeMap<Who, Life> = BTreeMap::new();
    for line in lines {
        let life = lives.entry(line.who).or_default();
        match &line.event {
            Event::Start(cgroup) => {
                life.starts += 1;
                life.start = line.at;
                life.cgroup.clone_from(cgroup);
            }
            Event::Twice => life.starts += 1,
            Event::Overlap(attempt) => life.overlaps.push(*attempt),
            Event::Wrote(lines) => life.wrote = Some(*lines),
            Event::End(code) => life.end = Some((line.at, *code)),
            Event::Daemon | Event::Term => {}
        }
    }
    lives
}

/// Line `index` of what a rank writes to standard output.
pub(crate) fn pattern(who: Who, index: u64) -> String {
    let Who {
        job,
        task,
        attempt,
        rank,
    } = who;
    let mixed = (index ^ (job << 32) ^ u64::from(rank)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    format!("j{job}.{task}.{attempt}r{rank} {index:08} {mixed:016x}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHO: Who = Who {
        job: 17,
        task: 3,
        attempt: 2,
        rank: 1,
    };

    #[test]
    fn what_is_added_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::create(dir.path()).unwrap();
        let events = [
            Event::Start("/a b".to_owned()),
            Event::Overlap(1),
            Event::Daemon,
            Event::Term,
            Event::Wrote(9),
            Event::End(5),
        ];
        for event in &events {
            ledger.add(WHO, event.clone()).unwrap();
        }
        let lines = ledger.read().unwrap();
        assert!(lines.iter().map(|line| &line.event).eq(&events));
        let life = &lives(&lines)[&WHO];
        assert_eq!(
            (life.starts, life.wrote, life.end.unwrap().1),
            (1, Some(9), 5)
        );
        assert_eq!(life.overlaps, [1]);
    }

    #[test]
    fn a_rank_is_locked_once_and_others_see_it_while_it_lives() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::create(dir.path()).unwrap();
        let later = Who { attempt: 3, ..WHO };
        let held = ledger.lock(WHO).unwrap();
        assert_eq!(ledger.others_alive(later).unwrap(), [2]);
        assert_eq!(ledger.others_alive(WHO).unwrap(), [0; 0]);
        assert_eq!(ledger.alive(17), [WHO]);
        drop(held);
        assert_eq!(ledger.others_alive(later).unwrap(), [0; 0]);
        assert!(ledger.lock(WHO).is_err());
    }
}
