//! Which processes belong to which task of a bundle. Knows nothing of when they are to end.
//!
//! A task's first process is a child of the thread that made it. Whoever loses its parent becomes a child of the
//! carrier's main thread, which makes none itself. So once a task's first process is gone and the main thread has no
//! children, nothing is left of the task; that is one read for each task, and for most of them all there is to do.
//!
//! Otherwise the marks tell: each process of a task has a limit on file locks of its own, which Linux hands down to all
//! descendants, has not enforced since 2.4, and shows to everybody. It survives what `daemon`, `setsid` and `env -i` do. The
//! attempt's key in the environment is the second mark. Whoever has got rid of both is ended as soon as no living task
//! can be the one that started it, at the latest with the carrier.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::unistd::getpid;
use trainyard_common::ids::TaskIndex;

use super::super::process::Process;
use super::super::tree::{self, KEY_VARIABLE, descendants};
use super::birth::wait;

/// Bytes that are read to see whether there are children at all.
const PEEK_BYTES: usize = 16;

/// How the processes of a bundle are told from others.
#[derive(Debug, Clone)]
pub(super) struct Marks {
    entry: Vec<u8>,
    /// Upper half of each task's limit.
    stamp: u64,
}

impl Marks {
    /// `key` is the bundle's random text, of hexadecimal digits.
    pub(super) fn new(key: &str) -> Self {
        let stamp = key
            .get(..8)
            .and_then(|digits| u64::from_str_radix(digits, 16).ok());
        Self {
            entry: format!("{KEY_VARIABLE}={key}").into_bytes(),
            stamp: stamp.unwrap_or_default(),
        }
    }

    /// The limit that marks a task's processes.
    pub(super) fn tag(&self, task: TaskIndex) -> u64 {
        self.stamp << 32 | u64::from(task.0)
    }

    /// Whose process it is, if it shows a mark.
    fn owner(&self, process: &Process) -> Option<TaskIndex> {
        let limit = lock_limit(process.pid)?;
        if limit >> 32 == self.stamp {
            return u32::try_from(limit & u64::from(u32::MAX))
                .ok()
                .map(TaskIndex);
        }
        self.named(process.pid)
    }

    fn named(&self, pid: i32) -> Option<TaskIndex> {
        let environ = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
        let mut entries = environ.split(|byte| *byte == 0);
        entries
            .clone()
            .any(|entry| entry == self.entry)
            .then_some(())?;
        let index = entries.find_map(|entry| entry.strip_prefix(b"YARD_TASK_INDEX="))?;
        std::str::from_utf8(index).ok()?.parse().ok().map(TaskIndex)
    }

    /// Everything of the bundle, after the carrier's death.
    pub(super) fn all(&self) -> Vec<Process> {
        let all = Process::all();
        let marked = all.iter().filter(|process| self.owner(process).is_some());
        let roots = marked.map(|process| process.pid).collect();
        living(&all, roots)
    }
}

fn lock_limit(pid: i32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Max file locks"))?;
    let soft = line.split_whitespace().next()?;
    Some(soft.parse().unwrap_or(u64::MAX))
}

fn living(all: &[Process], roots: BTreeSet<i32>) -> Vec<Process> {
    let mut living = descendants(all, roots);
    living.retain(|process| !process.is_zombie);
    living
}

/// A task that was taken up and whose end is not on record.
#[derive(Debug, Clone, Copy)]
pub(super) struct Running {
    pub(super) task: TaskIndex,
    /// None while it is being started, and once it was reaped.
    pub(super) pid: Option<i32>,
    /// Whether it may still start something: false once its first process is gone.
    pub(super) fertile: bool,
}

/// The children of the main thread: what lost its parent. Each thread has its own view.
#[derive(Debug)]
pub(super) struct Orphans {
    /// None where the kernel does not list children.
    list: Option<File>,
}

impl Orphans {
    pub(super) fn new() -> Self {
        let pid = getpid();
        Self {
            list: File::open(format!("/proc/self/task/{pid}/children")).ok(),
        }
    }

    /// Whether there are none. `running` is asked only if it matters.
    pub(super) fn are_none(&self, running: impl Fn() -> Vec<Running>) -> bool {
        let mut some = [0; PEEK_BYTES];
        if let Some(list) = &self.list
            && let Ok(length) = list.read_at(&mut some, 0)
            && length == 0
        {
            return true;
        }
        self.reap(&running).is_empty()
    }

    /// Takes the exit statuses of those that ended, and gives those that live.
    pub(super) fn reap(&self, running: impl Fn() -> Vec<Running>) -> Vec<i32> {
        let mut left = self.read(running);
        left.retain(|pid| wait(*pid, false).is_none());
        left
    }

    fn read(&self, running: impl Fn() -> Vec<Running>) -> Vec<i32> {
        let pid = getpid();
        if self.list.is_some() {
            let text = std::fs::read_to_string(format!("/proc/self/task/{pid}/children"));
            let text = text.unwrap_or_default();
            return text
                .split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect();
        }
        let all = Process::all();
        let running = running();
        let children = all.iter().filter(|process| process.parent == pid.as_raw());
        children
            .map(|process| process.pid)
            .filter(|pid| running.iter().all(|one| one.pid != Some(*pid)))
            .collect()
    }
}

/// Whose processes are looked for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Whose {
    /// Those of one task.
    Task(TaskIndex),
    /// Those of no task that lives.
    Nobody,
    /// All.
    Everybody,
}

/// The living processes of a task, or of nobody. `running` is read after the list of processes, so that one that has just
/// been made belongs to a task that it names.
pub(super) fn find(
    marks: &Marks,
    whose: Whose,
    running: impl Fn() -> Vec<Running>,
) -> Vec<Process> {
    let all = Process::all();
    let running = running();
    let own = getpid().as_raw();
    let mains: BTreeMap<i32, TaskIndex> = running
        .iter()
        .filter_map(|one| Some((one.pid?, one.task)))
        .collect();
    let mut roots = BTreeSet::new();
    for process in all.iter().filter(|process| process.parent == own) {
        let is_meant = match (mains.get(&process.pid), whose) {
            (_, Whose::Everybody) => true,
            (Some(task), Whose::Task(wanted)) => *task == wanted,
            (Some(_), Whose::Nobody) => false,
            (None, Whose::Task(wanted)) => match marks.owner(process) {
                Some(task) => task == wanted,
                None => is_nobodys(process, &all, &running),
            },
            (None, Whose::Nobody) => match marks.owner(process) {
                Some(task) => running.iter().all(|one| one.task != task),
                None => is_nobodys(process, &all, &running),
            },
        };
        if is_meant {
            roots.insert(process.pid);
        }
    }
    living(&all, roots)
}

/// Whether an orphan without a mark is older than everything that lives and could have started it.
fn is_nobodys(process: &Process, all: &[Process], running: &[Running]) -> bool {
    let possible = running.iter().filter(|one| one.fertile);
    for one in possible {
        let Some(pid) = one.pid else {
            return false;
        };
        let main = all.iter().find(|process| process.pid == pid);
        if main.is_some_and(|main| main.start_time <= process.start_time) {
            return false;
        }
    }
    true
}

/// Asks what is found to end.
pub(super) fn terminate(marks: &Marks, whose: Whose, running: impl Fn() -> Vec<Running>) {
    tree::terminate(|| find(marks, whose, &running));
}

/// One round of killing what is found.
pub(super) fn kill(marks: &Marks, whose: Whose, running: impl Fn() -> Vec<Running>) {
    tree::kill(|| find(marks, whose, &running));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, start_time: u64) -> Process {
        Process {
            pid,
            parent: 1,
            session: 1,
            start_time,
            is_zombie: false,
            state: 'S',
        }
    }

    fn running(task: u32, pid: Option<i32>) -> Running {
        Running {
            task: TaskIndex(task),
            pid,
            fertile: true,
        }
    }

    #[test]
    fn an_orphan_without_marks_is_nobodys_once_all_others_are_younger() {
        let all = [process(10, 100), process(20, 200)];
        let orphan = process(30, 150);
        let is = |running: &[Running]| is_nobodys(&orphan, &all, running);
        assert!(is(&[]));
        assert!(is(&[running(2, Some(20))]));
        assert!(!is(&[running(2, Some(20)), running(1, Some(10))]));
        assert!(!is(&[running(2, Some(20)), running(3, None)]));
        let mut over = running(1, Some(10));
        over.fertile = false;
        assert!(is(&[over]));
    }

    #[test]
    fn marks_of_two_bundles_differ() {
        let marks = Marks::new("00c0ffee00000000");
        assert_eq!(marks.tag(TaskIndex(7)), 0x00c0_ffee_0000_0007);
        assert!(
            marks
                .owner(&process(std::process::id() as i32, 0))
                .is_none()
        );
    }
}
