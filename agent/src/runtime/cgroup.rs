//! A cgroup (version 2) of an attempt's own, where the machine lets us make one: it holds every process that the ranks
//! start, so it can kill them all in one step and tell when none is left. Without one the process tree must do.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use trainyard_common::ids::{AttemptNumber, AttemptRef, JobId, TaskIndex};

use super::dir::random_hex;
use super::process::{Process, Signal};

const PREFIX: &str = "trainyard-";
/// Nested cgroups that a job may have made below its own and that are looked at when it is removed.
const MAX_NESTED: usize = 10_000;

/// A cgroup that is ours.
#[derive(Debug, Clone)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes one, or nothing where that is not allowed or there is no cgroup file system.
    pub(crate) fn create(attempt: AttemptRef) -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let name = format!("{PREFIX}{attempt}-{}", random_hex(4).ok()?);
        places(&mounts, &own).into_iter().find_map(|place| {
            let path = place.join(&name);
            std::fs::create_dir(&path).ok()?;
            let cgroup = Self { path };
            // A cgroup that cannot be joined is none.
            if cgroup.can_be_joined().is_err() {
                cgroup.remove();
                return None;
            }
            Some(cgroup)
        })
    }

    /// One that an earlier process made; nothing if the path cannot be one of ours.
    pub(crate) fn existing(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let ours = name.starts_with(PREFIX) && path.join("cgroup.procs").exists();
        ours.then(|| Self {
            path: path.to_owned(),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn can_be_joined(&self) -> io::Result<File> {
        OpenOptions::new()
            .write(true)
            .open(self.path.join("cgroup.procs"))
    }

    /// Its directory, in which children can be born.
    pub(crate) fn directory(&self) -> io::Result<File> {
        File::open(&self.path)
    }

    /// Whether any process is in it or below.
    pub(crate) fn is_populated(&self) -> bool {
        match std::fs::read_to_string(self.path.join("cgroup.events")) {
            Ok(text) => counter(&text, "populated") != Some(0),
            // Gone altogether: only an empty one can be removed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(_) => true,
        }
    }

    /// Processes in it, in nested ones too.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let mut all = Vec::new();
        for place in self.nested() {
            let text = std::fs::read_to_string(place.join("cgroup.procs")).unwrap_or_default();
            all.extend(text.lines().filter_map(|pid| pid.parse::<i32>().ok()));
        }
        // 0 stands for a process of another pid namespace, which no signal can name.
        all.retain(|pid| *pid > 0);
        all
    }

    /// Kills everything in it, what is being forked this moment included.
    pub(crate) fn kill(&self) {
        if std::fs::write(self.path.join("cgroup.kill"), "1").is_ok() {
            return;
        }
        // Before Linux 5.14.
        for pid in self.processes() {
            if let Some(process) = Process::find(pid) {
                process.signal(Signal::SIGKILL);
            }
        }
    }

    /// Removes it and what is nested in it; does nothing while processes live.
    pub(crate) fn remove(&self) {
        for place in self.nested().iter().rev() {
            let _ = std::fs::remove_dir(place);
        }
    }

    /// It and everything below, parents first.
    fn nested(&self) -> Vec<PathBuf> {
        let mut found = vec![self.path.clone()];
        let mut next = 0;
        while next < found.len() && found.len() < MAX_NESTED {
            if let Ok(entries) = std::fs::read_dir(&found[next]) {
                let dirs = entries
                    .flatten()
                    .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
                found.extend(dirs.map(|entry| entry.path()));
            }
            next += 1;
        }
        found
    }
}

/// Where attempts of an agent on this machine get cgroups; for people who want to know.
///
/// # Errors
/// Why they get none, in one sentence.
pub fn usable() -> Result<PathBuf, &'static str> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if mount_of(&mounts, |kind, _| kind == "cgroup2").is_none() {
        return Err("no version 2 file system is mounted");
    }
    let probe = AttemptRef {
        job: JobId(0),
        task: TaskIndex(0),
        attempt: AttemptNumber(0),
    };
    let made = Cgroup::create(probe)
        .ok_or("this user may not make one (systemd's Delegate=yes lets it)")?;
    made.remove();
    Ok(made.path.parent().unwrap_or(Path::new("/")).to_owned())
}

/// Where a cgroup may be made: at the top, so that it lies outside the agent's own and survives a restart of its
/// service, or below our own, which a user may have been given.
fn places(mountinfo: &str, own: &str) -> Vec<PathBuf> {
    let Some(mount) = mount_of(mountinfo, |kind, _| kind == "cgroup2") else {
        return Vec::new();
    };
    let own = own
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap_or("/");
    let mut places = vec![mount.clone()];
    let below = mount.join(own.trim_start_matches('/'));
    if below != mount {
        places.push(below);
    }
    places
}

fn mount_of(mountinfo: &str, wanted: impl Fn(&str, &str) -> bool) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut right = right.split(' ');
        let (kind, options) = (right.next()?, right.nth(1).unwrap_or_default());
        wanted(kind, options).then(|| PathBuf::from(left.split(' ').nth(4).unwrap_or("/")))
    })
}

/// The value of a `name value` line.
fn counter(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(' ')?;
        (key == name).then(|| value.trim().parse().ok())?
    })
}

/// The kernel's count of processes that it killed for want of memory.
#[derive(Debug)]
pub(crate) struct OomCounter {
    path: PathBuf,
    start: u64,
    /// Whether it counts nothing but this attempt's processes.
    own: bool,
}

impl OomCounter {
    /// The narrowest one that counts the attempt's processes, from now on.
    pub(crate) fn start(cgroup: Option<&Cgroup>) -> Self {
        let own = cgroup.map(|cgroup| cgroup.path.join("memory.events"));
        let candidates = [
            (own, true),
            (version_1(), false),
            (Some(PathBuf::from("/proc/vmstat")), false),
        ];
        for (path, own) in candidates {
            if let Some(path) = path
                && let Some(start) = read_counter(&path)
            {
                return Self { path, start, own };
            }
        }
        Self {
            path: PathBuf::new(),
            start: 0,
            own: false,
        }
    }

    /// Whether a rank that ended by itself probably ended for want of memory. A counter of its own also tells of its
    /// children; a shared one only counts beside the signal that the kernel sends.
    pub(crate) fn explains(&self, killed: bool, failed: bool) -> bool {
        (killed || (self.own && failed))
            && read_counter(&self.path).is_some_and(|now| now > self.start)
    }
}

fn read_counter(path: &Path) -> Option<u64> {
    counter(&std::fs::read_to_string(path).ok()?, "oom_kill")
}

fn version_1() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let mount = mount_of(&mounts, |kind, options| {
        kind == "cgroup" && options.split(',').any(|option| option == "memory")
    })?;
    let path = own.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let controllers = parts.nth(1)?;
        let path = parts.next()?;
        controllers
            .split(',')
            .any(|name| name == "memory")
            .then_some(path)
    })?;
    Some(
        mount
            .join(path.trim_start_matches('/'))
            .join("memory.oom_control"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
";

    #[test]
    fn mounts_are_found_in_both_versions() {
        let own = "4:memory:/a/b\n0::/user.slice/u\n";
        assert_eq!(
            places(HYBRID, own),
            [
                PathBuf::from("/sys/fs/cgroup/unified"),
                PathBuf::from("/sys/fs/cgroup/unified/user.slice/u")
            ]
        );
        assert_eq!(
            places(HYBRID, "0::/\n"),
            [PathBuf::from("/sys/fs/cgroup/unified")]
        );
        assert!(places("31 23 0:28 / / rw - ext4 /dev/vda rw", own).is_empty());
    }

    #[test]
    fn counters_are_read_by_whole_name() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 0\n";
        assert_eq!(counter(text, "oom_kill"), Some(2));
        assert_eq!(counter(text, "kill"), None);
    }

    #[test]
    fn only_our_own_names_are_taken_up() {
        assert!(Cgroup::existing(Path::new("/sys/fs/cgroup/unified")).is_none());
        assert!(Cgroup::existing(Path::new("/")).is_none());
    }
}
