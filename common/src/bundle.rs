//! Bundles: tasks of one array that one node holds ahead of its free slots and runs under one shim. What the coordinator
//! wants of a bundle and what the agent observed of it; the counterpart of `member.rs` for tasks that need no gang.
//!
//! A task is in at most one bundle ever, as its first attempt, and leaves it by exactly one [`TaskReport::Ended`] or
//! [`TaskReport::Returned`]. Reports are numbered in the order in which the agent made them, from 0, so that each counts
//! once whatever is sent again.

use serde::{Deserialize, Serialize};

use crate::ids::{BundleRef, TaskIndex};
use crate::member::{Ending, MemberSpec, Stop};
use crate::spec::{JobSpec, Launcher, OnDisconnect};
use crate::time::Timestamp;

/// Tasks that a node may hold ahead of its slots in one bundle. Half a second of the fastest tasks that a machine can
/// start; bounds what is run again when a node is lost.
pub const MAX_AHEAD: u32 = 1024;
/// Slots of one bundle; a node with more room gets several bundles.
pub const MAX_SLOTS: u32 = 1024;
/// Reports in one message.
pub const MAX_REPORTS: usize = 1024;
/// Ranges of tasks in one bundle. They are few, as tasks are handed out in order and end nearly in order.
pub const MAX_RANGES: usize = 8192;

/// Tasks with neighbouring indices, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TaskRange {
    /// The first one.
    pub first: TaskIndex,
    /// The last one, at least `first`.
    pub last: TaskIndex,
}

impl TaskRange {
    /// How many tasks it holds.
    #[must_use]
    pub fn count(self) -> u32 {
        self.last.0.saturating_sub(self.first.0).saturating_add(1)
    }

    /// Whether the task is one of them.
    #[must_use]
    pub fn contains(self, task: TaskIndex) -> bool {
        (self.first..=self.last).contains(&task)
    }

    /// Its tasks in order.
    pub fn tasks(self) -> impl Iterator<Item = TaskIndex> {
        (self.first.0..=self.last.0).map(TaskIndex)
    }
}

/// Tasks as sorted ranges that neither overlap nor touch.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TaskSet {
    ranges: Vec<TaskRange>,
}

impl TaskSet {
    /// The ranges, sorted.
    #[must_use]
    pub fn ranges(&self) -> &[TaskRange] {
        &self.ranges
    }

    /// How many tasks it holds.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.ranges
            .iter()
            .fold(0, |sum, range| range.count().saturating_add(sum))
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether the task is in it.
    #[must_use]
    pub fn contains(&self, task: TaskIndex) -> bool {
        let after = self.ranges.partition_point(|range| range.first <= task);
        after > 0 && self.ranges[after - 1].contains(task)
    }

    /// Its tasks in order.
    pub fn tasks(&self) -> impl Iterator<Item = TaskIndex> + '_ {
        self.ranges.iter().flat_map(|range| range.tasks())
    }

    /// Adds tasks. Those that are there already stay.
    pub fn insert(&mut self, new: TaskRange) {
        if new.last < new.first {
            return;
        }
        let from = self
            .ranges
            .partition_point(|range| range.last.next() < new.first);
        let to = self
            .ranges
            .partition_point(|range| range.first <= new.last.next());
        let mut merged = new;
        if let (Some(first), Some(last)) =
            (self.ranges.get(from), self.ranges.get(to.wrapping_sub(1)))
            && from < to
        {
            merged.first = merged.first.min(first.first);
            merged.last = merged.last.max(last.last);
        }
        self.ranges.splice(from..to, [merged]);
    }

    /// Takes a task out. Whether it was there.
    pub fn remove(&mut self, task: TaskIndex) -> bool {
        let after = self.ranges.partition_point(|range| range.first <= task);
        let Some(range) = after
            .checked_sub(1)
            .and_then(|at| self.ranges.get(at))
            .copied()
        else {
            return false;
        };
        if !range.contains(task) {
            return false;
        }
        let mut rest = Vec::new();
        if range.first < task {
            rest.push(TaskRange {
                first: range.first,
                last: TaskIndex(task.0 - 1),
            });
        }
        if task < range.last {
            rest.push(TaskRange {
                first: task.next(),
                last: range.last,
            });
        }
        self.ranges.splice(after - 1..after, rest);
        true
    }

    /// Takes the first `most` tasks out, in order.
    pub fn take_first(&mut self, most: u32) -> Vec<TaskRange> {
        let mut left = most;
        let mut taken = Vec::new();
        while left > 0
            && let Some(range) = self.ranges.first_mut()
        {
            if range.count() <= left {
                left -= range.count();
                taken.push(self.ranges.remove(0));
            } else {
                let next = TaskIndex(range.first.0 + left);
                taken.push(TaskRange {
                    first: range.first,
                    last: TaskIndex(next.0 - 1),
                });
                range.first = next;
                left = 0;
            }
        }
        taken
    }
}

impl FromIterator<TaskRange> for TaskSet {
    fn from_iter<I: IntoIterator<Item = TaskRange>>(ranges: I) -> Self {
        let mut set = Self::default();
        ranges.into_iter().for_each(|range| set.insert(range));
        set
    }
}

/// Whether first attempts of this job's tasks may run in bundles: an array of single processes without GPUs. Anything
/// else has a shim of its own for each attempt.
#[must_use]
pub fn may_bundle(spec: &JobSpec) -> bool {
    spec.array.is_some()
        && spec.nodes == 1
        && spec.procs_per_node == 1
        && spec.resources_per_node.gpus == 0
        && match spec.launcher {
            Launcher::None | Launcher::Torch => true,
            Launcher::Torchrun => false,
        }
        && match spec.on_disconnect {
            OnDisconnect::Replace | OnDisconnect::Wait => true,
            // Each has a lease of its own, which a shim of its own enforces.
            OnDisconnect::Stop => false,
        }
}

/// What the coordinator wants of a bundle. Sent whole each time; what it says only grows: tasks are added, `recorded`
/// rises, `Run` becomes `Close` or `Stop`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DesiredBundle {
    /// Which one.
    pub bundle: BundleRef,
    /// Tasks that run at the same time, at least 1.
    pub slots: u32,
    /// What is to be done.
    pub phase: BundlePhase,
    /// Tasks that were handed out and whose end is not on record. Those that the agent does not know yet are new.
    pub tasks: TaskSet,
    /// Reports with a lower number are on record and need not be kept.
    pub recorded: u64,
    /// How each task is started, with the job's resources per task; the index is what differs. Left out where the agent
    /// has it already or needs none any more.
    pub spec: Option<Box<MemberSpec>>,
}

/// What is to be done with a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BundlePhase {
    /// Run its tasks; more may follow.
    Run,
    /// Run its tasks; no more will follow, so it ends when they have.
    Close,
    /// End what runs, give back what does not.
    Stop(Stop),
}

/// A bundle as its agent observed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedBundle {
    /// Which one.
    pub bundle: BundleRef,
    /// Where it is in its life.
    pub phase: ObservedBundlePhase,
    /// The number of the first of `reports`. Those before were sent and perhaps recorded.
    pub first: u64,
    /// What happened, in order.
    pub reports: Vec<TaskReport>,
}

/// Where a bundle is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ObservedBundlePhase {
    /// Fetches code and starts its shim.
    Preparing,
    /// Runs tasks, or waits for more.
    Running,
    /// Every process is gone, and each task ended or was given back.
    Ended {
        /// Reports that were made in its whole life; once as many are on record, everything is told.
        total: u64,
        /// What went wrong with the bundle itself; empty if nothing.
        message: String,
    },
}

/// What became of a task in a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TaskReport {
    /// It runs for a while now. Not told of tasks that end soon.
    Started {
        /// Which one.
        task: TaskIndex,
        /// Since when, by the agent's clock.
        at: Timestamp,
    },
    /// It ended, and its output and outputs are uploaded.
    Ended {
        /// Which one.
        task: TaskIndex,
        /// When it was started, by the agent's clock; absent if it never was.
        started_at: Option<Timestamp>,
        /// How. Its one rank is 0.
        ending: Box<Ending>,
    },
    /// They were not started and never will be by this bundle.
    Returned(TaskRange),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u32, last: u32) -> TaskRange {
        TaskRange {
            first: TaskIndex(first),
            last: TaskIndex(last),
        }
    }

    #[test]
    fn a_set_agrees_with_a_plain_one() {
        // A small multiplicative generator: the same numbers in every run.
        let mut seed = 1_u64;
        let mut draw = |most: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            u32::try_from((seed >> 33) % most).unwrap()
        };
        let mut set = TaskSet::default();
        let mut plain = std::collections::BTreeSet::new();
        for _ in 0..5000 {
            match draw(4) {
                0 => {
                    let first = draw(200);
                    let last = first + draw(8);
                    set.insert(range(first, last));
                    plain.extend(first..=last);
                }
                1 => {
                    let most = draw(5);
                    let taken: Vec<u32> = set
                        .take_first(most)
                        .into_iter()
                        .flat_map(TaskRange::tasks)
                        .map(|task| task.0)
                        .collect();
                    let expected: Vec<u32> = plain.iter().take(most as usize).copied().collect();
                    assert_eq!(taken, expected);
                    for task in taken {
                        plain.remove(&task);
                    }
                }
                _ => {
                    let task = draw(210);
                    assert_eq!(set.contains(TaskIndex(task)), plain.contains(&task));
                    assert_eq!(set.remove(TaskIndex(task)), plain.remove(&task));
                }
            }
            assert!(set.tasks().map(|task| task.0).eq(plain.iter().copied()));
            assert_eq!(set.count() as usize, plain.len());
            assert!(
                set.ranges()
                    .windows(2)
                    .all(|pair| pair[0].last.next() < pair[1].first)
            );
        }
    }

    #[test]
    fn an_empty_range_adds_nothing() {
        let mut set = TaskSet::default();
        set.insert(range(5, 4));
        assert!(set.is_empty());
        set.insert(range(u32::MAX, u32::MAX));
        set.insert(range(u32::MAX - 1, u32::MAX));
        assert_eq!(set.count(), 2);
    }
}
