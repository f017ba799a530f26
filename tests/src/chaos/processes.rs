//! Which processes of this machine belong to a run: its directory stands in their environment or arguments. This is how
//! what was left behind is found, and ended when the run is over; it asks the kernel and nobody else.

use std::path::Path;

/// A living process of the run.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) pid: i32,
    pub(crate) parent: i32,
    pub(crate) arguments: Vec<String>,
    environment: Vec<u8>,
}

impl Found {
    /// Whether it supervises a member.
    pub(crate) fn is_shim(&self) -> bool {
        self.arguments.get(1).is_some_and(|word| word == "shim")
    }

    /// Whether it may be the one that an agent keeps ready, its child. Afterwards it is called the same.
    pub(crate) fn is_spare_of(&self, agent: i32) -> bool {
        self.is_shim()
            && self.parent == agent
            && self.arguments.get(2).is_some_and(|word| word == "-")
    }

    /// Whether its environment says this.
    pub(crate) fn has(&self, variable: &str) -> bool {
        self.environment
            .split(|byte| *byte == 0)
            .any(|entry| entry == variable.as_bytes())
    }
}

/// Every living process that names the directory, but for this one.
pub(crate) fn naming(dir: &Path) -> Vec<Found> {
    let wanted = dir.display().to_string();
    let own = std::process::id().to_string();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| *name != own)
        .filter_map(|name| {
            let pid: i32 = name.parse().ok()?;
            let read = |file| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let (arguments, environment) = (read("cmdline"), read("environ"));
            let wanted = wanted.as_bytes();
            let named = contains(&arguments, wanted) || contains(&environment, wanted);
            (named && crate::lives(pid)).then(|| Found {
                pid,
                parent: parent(pid),
                arguments: arguments
                    .split(|byte| *byte == 0)
                    .map(|word| String::from_utf8_lossy(word).into_owned())
                    .collect(),
                environment,
            })
        })
        .collect()
}

/// The parent of a process; 0 if it is gone.
fn parent(pid: i32) -> i32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let parent = after_name.split_whitespace().nth(1);
    parent.and_then(|parent| parent.parse().ok()).unwrap_or(0)
}

fn contains(text: &[u8], wanted: &[u8]) -> bool {
    text.windows(wanted.len()).any(|window| window == wanted)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_found_by_its_environment_and_by_its_arguments() {
        let dir = tempfile::tempdir().unwrap();
        let mut by_variable = Command::new("sleep")
            .arg("600")
            .env("YARD_OUTPUT_DIR", dir.path().join("outputs"))
            .spawn()
            .unwrap();
        let mut by_argument = Command::new("tail")
            .args(["-f", "/dev/null"])
            .arg(dir.path().join("file"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Both are there when their programs have replaced the copy of this process that they begin as.
        let found = crate::until("both are found", || {
            let found = naming(dir.path());
            let programs = found.iter().map(|found| found.arguments[0].as_str());
            (found.len() == 2
                && programs
                    .clone()
                    .all(|name| ["sleep", "tail"].contains(&name)))
            .then_some(found)
        });
        let ids = [by_variable.id(), by_argument.id()].map(u32::cast_signed);
        assert!(
            found
                .iter()
                .all(|found| ids.contains(&found.pid) && !found.is_shim())
        );
        let own = std::process::id().cast_signed();
        assert!(
            found
                .iter()
                .all(|found| found.parent == own && !found.is_spare_of(own))
        );
        let variable = format!("YARD_OUTPUT_DIR={}", dir.path().join("outputs").display());
        assert_eq!(found.iter().filter(|found| found.has(&variable)).count(), 1);
        for child in [&mut by_variable, &mut by_argument] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(naming(dir.path()).len(), 0);
    }
}
