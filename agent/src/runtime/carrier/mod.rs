//! The carrier: one shim for many tasks of one array, each a single process. This is where its files are named; the
//! carrier's own side begins in `start.rs`, the agent's in `client.rs`. Knows nothing of the coordinator, of fetching and
//! of uploading.
//!
//! | File in the bundle's directory | Written by | Means |
//! |---|---|---|
//! | the directory itself, `bundle.json` | agent, in one step | accepted; can happen once |
//! | `template/work` | agent, before the carrier | what each task's working copy is made from |
//! | `shim.lock`, `shim.json`, `shim.sock` | carrier | as those of a member's shim |
//! | `journal` | carrier; agent, if that is gone | all that happened, in order; see `journal.rs` |
//! | `slots/<n>` | carrier | the directories of the task that runs there |
//! | `tasks/<index>` | carrier | what a task left in `outputs` and `checkpoint` |
//! | `logs/<index>.log` | carrier | what a task wrote; no file if it wrote nothing |
//!
//! The journal is on disk when a process dies, and may lose its end when the machine does; then what the tasks did is
//! unknown, and unknown is not success.

mod birth;
mod client;
mod control;
mod dirs;
mod journal;
mod output;
mod processes;
mod settle;
mod slot;
mod start;
mod work;

use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use trainyard_common::ids::{AttemptNumber, AttemptRef, BundleRef, TaskIndex};
use trainyard_common::member::MemberSpec;
use trainyard_transport::sealed::FileRecord;

#[cfg(test)]
pub(crate) use self::client::Told;
pub use self::client::{CarrierConfig, CarrierError, CarrierEvent, CarrierState, Carriers};
pub use self::client::{RecoveredBundle, RecoveredCarrier};
pub(crate) use self::journal::{Gap, Item, Record, TaskEnd, items, missing, read_from};
#[cfg(test)]
pub(crate) use self::journal::{parse, write_journal};
pub(crate) use self::start::{carry, is_bundle};

use super::RunAs;
use super::dir::{AttemptDir, NEW_PREFIX, random_hex, sync_dir, write_json};
use super::failpoint::point;
use super::remove::delete_tree;

/// How long a task may wait for a slot before it is given back, so that others can run it.
pub const RETURN_AFTER: Duration = Duration::from_secs(5);
/// A task that runs for so long is told of before its end.
const STARTED_AFTER: Duration = Duration::from_millis(500);

/// `bundle.json`: what is carried, and what the carrier must know that the coordinator did not say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BundleFile {
    pub(crate) bundle: BundleRef,
    pub(crate) spec: MemberSpec,
    /// The kernel's boot id when the bundle was accepted.
    pub(crate) boot_id: String,
    /// Random text in the environment of every process of the bundle (`YARD_ATTEMPT_KEY`).
    pub(crate) key: String,
    pub(crate) log_limit: u64,
    pub(crate) run_as: Option<RunAs>,
    pub(crate) return_after: Duration,
}

impl FileRecord for BundleFile {
    const KIND: &'static str = "bundle";
    const VERSION: u32 = 2;
}

/// The directory of one bundle on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleDir {
    bundle: BundleRef,
    root: PathBuf,
}

impl BundleDir {
    pub(crate) fn new(bundles: &Path, bundle: BundleRef) -> Self {
        Self {
            bundle,
            root: bundles.join(bundle.to_string()),
        }
    }

    pub(crate) fn at(bundle: BundleRef, root: PathBuf) -> Self {
        Self { bundle, root }
    }

    /// Whose directory it is.
    #[must_use]
    pub fn bundle(&self) -> BundleRef {
        self.bundle
    }

    /// The directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The attempt that a task has in a bundle: always its first.
    #[must_use]
    pub fn attempt(&self, task: TaskIndex) -> AttemptRef {
        AttemptRef {
            job: self.bundle.job,
            task,
            attempt: AttemptNumber(1),
        }
    }

    /// Where the agent unpacks the snapshot, once: the working copy in it.
    #[must_use]
    pub fn template(&self) -> AttemptDir {
        AttemptDir::at(self.attempt(TaskIndex(0)), self.root.join("template"))
    }

    /// Makes that place anew; what an earlier agent process had begun there is of unknown state.
    pub(crate) fn make_template(&self) -> io::Result<()> {
        let template = self.template();
        delete_tree(template.root())?;
        make_dir(template.root(), 0o700)?;
        make_dir(&template.work(), 0o700)
    }

    /// What a task left for upload, if it left anything.
    #[must_use]
    pub fn task(&self, task: TaskIndex) -> AttemptDir {
        let root = self.tasks().join(task.to_string());
        AttemptDir::at(self.attempt(task), root)
    }

    /// The record file of a task's output, if it wrote anything.
    #[must_use]
    pub fn log(&self, task: TaskIndex) -> PathBuf {
        self.logs().join(format!("{task}.log"))
    }

    /// All that happened.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.root.join("journal")
    }

    /// The files that every shim has.
    pub(crate) fn shim(&self) -> AttemptDir {
        AttemptDir::at(self.attempt(TaskIndex(0)), self.root.clone())
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.root.join("bundle.json")
    }

    pub(super) fn slot(&self, number: u32, task: TaskIndex) -> AttemptDir {
        let root = self.root.join("slots").join(number.to_string());
        AttemptDir::at(self.attempt(task), root)
    }

    fn tasks(&self) -> PathBuf {
        self.root.join("tasks")
    }

    fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// Deletes what an ended task left.
    pub(crate) fn clear_away(&self, end: &TaskEnd) -> io::Result<()> {
        if end.outputs {
            delete_tree(self.task(end.task).root())?;
        }
        match std::fs::remove_file(self.log(end.task)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Holds what is about to be deleted.
    pub(super) fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }

    /// Makes the directory with all that is in it from the start, in one step: it is complete and on disk, or it is not
    /// there.
    ///
    /// # Errors
    /// `AlreadyExists` if the bundle was accepted before.
    pub(crate) fn create(bundles: &Path, file: &BundleFile) -> io::Result<Self> {
        let dir = Self::new(bundles, file.bundle);
        if std::fs::symlink_metadata(dir.root()).is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let scratch = bundles.join(format!("{NEW_PREFIX}{}", random_hex(8)?));
        let new = Self::at(file.bundle, scratch);
        point("bundle.begin");
        let made = new.fill(file).and_then(|()| {
            point("bundle.filled");
            match std::fs::rename(new.root(), dir.root()) {
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                    return Err(io::ErrorKind::AlreadyExists.into());
                }
                result => result?,
            }
            point("bundle.named");
            sync_dir(bundles)
        });
        point("bundle.synced");
        if made.is_err() {
            // Nobody but this call has written into it, so there is nothing hostile to follow.
            let _ = std::fs::remove_dir_all(new.root());
        }
        made.map(|()| dir)
    }

    fn fill(&self, file: &BundleFile) -> io::Result<()> {
        // A mapped user must be able to pass through to the directories that are its own.
        let open = if file.run_as.is_some() { 0o711 } else { 0o700 };
        make_dir(&self.root, open)?;
        make_dir(&self.root.join("slots"), open)?;
        for sub in [self.tasks(), self.logs(), self.trash()] {
            make_dir(&sub, 0o700)?;
        }
        // A mapped user must not read it.
        let journal = std::fs::OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(self.journal())?;
        journal.sync_all()?;
        // Syncs the directory too.
        write_json(&self.file(), file)
    }
}

/// Makes a directory that did not exist, with exactly this mode whatever the umask is.
pub(super) fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::DirBuilder::new().mode(0o700).create(path)?;
    if mode == 0o700 {
        return Ok(());
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests;
