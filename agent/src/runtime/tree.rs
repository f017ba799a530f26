//! Which processes belong to an attempt, and how all of them get a signal although they fork meanwhile. Knows nothing
//! of when that is to happen.
//!
//! The shim is a *subreaper*: whoever loses its parent becomes the shim's child. So the descendants of the shim are all
//! that the ranks ever started, daemons included, and "no children" proves that nothing is left. Once the shim is dead
//! that proof is gone; then the cgroup, the shim's session and the attempt's key in the environment must tell.

use std::collections::{BTreeMap, BTreeSet};

use super::cgroup::Cgroup;
use super::process::{Process, Signal, pid_namespace};
use super::wire::ShimFile;

/// Passes over the process list in one round. A fork bomb makes new processes while its list is read; once all seen
/// ones are stopped, only those born meanwhile are left, so the passes shrink fast.
const PASSES: usize = 8;
/// The variable that marks every process of an attempt.
pub(crate) const KEY_VARIABLE: &str = "YARD_ATTEMPT_KEY";

/// The processes of one attempt, seen from its living shim or after its death.
#[derive(Debug)]
pub(crate) struct Tree<'a> {
    /// The shim, whose descendants belong to it.
    pub(crate) shim: i32,
    /// Set when the shim is dead: then its session counts too.
    pub(crate) dead_shim: Option<&'a ShimFile>,
    pub(crate) cgroup: Option<&'a Cgroup>,
    pub(crate) key: &'a str,
}

impl Tree<'_> {
    /// Asks everything to end: SIGTERM, and SIGCONT so that what is stopped can hear it.
    pub(crate) fn terminate(&self) {
        terminate(|| self.living());
    }

    /// One round of killing. What forks faster than the list is read is stopped first; the caller repeats the round
    /// until nothing is left.
    pub(crate) fn kill(&self) {
        if let Some(cgroup) = self.cgroup {
            cgroup.kill();
        }
        kill(|| self.living());
    }

    /// Everything that belongs to the attempt and has not ended.
    pub(crate) fn living(&self) -> Vec<Process> {
        let all = Process::all();
        let mut roots: BTreeSet<i32> = BTreeSet::new();
        if let Some(cgroup) = self.cgroup {
            roots.extend(cgroup.processes());
        } else {
            roots.extend(self.marked(&all));
        }
        match self.dead_shim {
            None => {
                roots.insert(self.shim);
            }
            Some(shim) => {
                roots.extend(self.marked(&all));
                if self.cgroup.is_none() && shim.pid_namespace == pid_namespace() {
                    roots.extend(orphaned_session(&all, shim));
                }
            }
        }
        let mut living = descendants(&all, roots);
        living.retain(|process| !process.is_zombie && process.pid != self.shim);
        living
    }

    fn marked(&self, all: &[Process]) -> Vec<i32> {
        let entry = format!("{KEY_VARIABLE}={}", self.key);
        all.iter()
            .filter(|process| process.environment_has(entry.as_bytes()))
            .map(|process| process.pid)
            .collect()
    }
}

/// Asks everything that `living` finds to end: SIGTERM, and SIGCONT so that what is stopped can hear it.
pub(crate) fn terminate(living: impl Fn() -> Vec<Process>) {
    let mut told = BTreeSet::new();
    for _ in 0..PASSES {
        let fresh: Vec<Process> = living()
            .into_iter()
            .filter(|process| told.insert((process.pid, process.start_time)))
            .collect();
        if fresh.is_empty() {
            return;
        }
        for process in fresh {
            process.signal(Signal::SIGTERM);
            process.signal(Signal::SIGCONT);
        }
    }
}

/// One round of killing what `living` finds; see [`Tree::kill`].
pub(crate) fn kill(living: impl Fn() -> Vec<Process>) {
    let mut seen: BTreeMap<(i32, u64), Process> = BTreeMap::new();
    for _ in 0..PASSES {
        let before = seen.len();
        for process in living() {
            let name = (process.pid, process.start_time);
            if seen.insert(name, process).is_none() {
                process.signal(Signal::SIGSTOP);
            }
        }
        if seen.len() == before {
            break;
        }
    }
    for process in seen.values() {
        process.signal(Signal::SIGKILL);
    }
}

/// `roots` and everything below them.
pub(super) fn descendants(all: &[Process], mut found: BTreeSet<i32>) -> Vec<Process> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for process in all {
        children
            .entry(process.parent)
            .or_default()
            .push(process.pid);
    }
    let mut open: Vec<i32> = found.iter().copied().collect();
    while let Some(pid) = open.pop() {
        for child in children.get(&pid).into_iter().flatten() {
            if found.insert(*child) {
                open.push(*child);
            }
        }
    }
    all.iter()
        .filter(|process| found.contains(&process.pid))
        .copied()
        .collect()
}

/// The processes that are still in the session of a shim that has ended. While one of them lives, the kernel gives the
/// session's number to nobody else; so if its leader lives, it is a later session and none of ours.
fn orphaned_session(all: &[Process], shim: &ShimFile) -> Vec<i32> {
    if all.iter().any(|process| process.pid == shim.pid) {
        return Vec::new();
    }
    all.iter()
        .filter(|process| process.session == shim.pid && process.start_time >= shim.start_time)
        .map(|process| process.pid)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, parent: i32, session: i32) -> Process {
        Process {
            pid,
            parent,
            session,
            start_time: u64::try_from(pid).unwrap(),
            is_zombie: false,
            state: 'S',
        }
    }

    #[test]
    fn descendants_are_found_in_any_order_and_nothing_else_is() {
        let all = [
            process(40, 30, 1),
            process(30, 20, 1),
            process(20, 10, 1),
            process(21, 11, 1),
            process(10, 1, 1),
        ];
        let mut pids: Vec<i32> = descendants(&all, BTreeSet::from([20]))
            .iter()
            .map(|process| process.pid)
            .collect();
        pids.sort_unstable();
        assert_eq!(pids, [20, 30, 40]);
    }

    #[test]
    fn a_session_counts_only_without_its_leader() {
        let shim = ShimFile {
            pid: 10,
            start_time: 10,
            pid_namespace: String::new(),
            cgroup: None,
            member: None,
            bundle: None,
        };
        let mut all = vec![process(40, 1, 10), process(41, 1, 11), process(9, 1, 10)];
        assert_eq!(orphaned_session(&all, &shim), [40]);
        all.push(process(10, 1, 10));
        assert!(orphaned_session(&all, &shim).is_empty());
    }
}
