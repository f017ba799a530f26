//! The directory of one attempt: its paths, how it comes to be in one step, and how files in it are written so that
//! whoever reads them finds the old or the new content. Knows nothing of processes.
//!
//! Two things are on disk before anybody is told: that an attempt was accepted, and how it ended. What lies between them
//! is for other processes of this machine while it runs; after a power loss every attempt without an ending counts as
//! started (see `docs/decisions/0010-single-member-go.md`), so nothing of that has to wait for the disk.

use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::libc;
use trainyard_common::ids::AttemptRef;
pub(crate) use trainyard_transport::files::sync_dir;
use trainyard_transport::sealed::{self, FileRecord};

use super::ShimState;
use super::failpoint::point;
use super::wire::{MemberFile, ShimFile, Status};

/// Largest file that is read whole: a member with the largest command and environment is about 1 MiB as JSON, twice
/// that if all of it needs escapes.
const MAX_FILE: u64 = 8 << 20;

/// The directory of one attempt on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttemptDir {
    attempt: AttemptRef,
    root: PathBuf,
}

impl AttemptDir {
    pub(crate) fn new(attempts: &Path, attempt: AttemptRef) -> Self {
        Self {
            attempt,
            root: attempts.join(attempt.to_string()),
        }
    }

    pub(crate) fn at(attempt: AttemptRef, root: PathBuf) -> Self {
        Self { attempt, root }
    }

    /// Whose directory it is.
    #[must_use]
    pub fn attempt(&self) -> AttemptRef {
        self.attempt
    }

    /// The directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the ranks start: the working copy of the snapshot.
    #[must_use]
    pub fn work(&self) -> PathBuf {
        self.root.join("work")
    }

    /// `YARD_OUTPUT_DIR`.
    #[must_use]
    pub fn outputs(&self) -> PathBuf {
        self.root.join("outputs")
    }

    /// `YARD_CHECKPOINT_DIR`.
    #[must_use]
    pub fn checkpoint(&self) -> PathBuf {
        self.root.join("checkpoint")
    }

    /// `YARD_RESUME_FROM`, if anything is in it when the ranks start.
    #[must_use]
    pub fn resume(&self) -> PathBuf {
        self.root.join("resume")
    }

    /// `YARD_TMP_DIR`.
    #[must_use]
    pub fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// Where the records of the ranks' output lie.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// The record file of one rank, by its number in the gang.
    #[must_use]
    pub fn log(&self, rank: u32) -> PathBuf {
        self.logs().join(format!("rank-{rank}.log"))
    }

    /// What was accepted.
    #[must_use]
    pub fn member(&self) -> PathBuf {
        self.root.join("member.json")
    }

    /// Exists from just before the first rank was started.
    #[must_use]
    pub fn go(&self) -> PathBuf {
        self.root.join("go.json")
    }

    /// The last state of the shim.
    #[must_use]
    pub fn status(&self) -> PathBuf {
        self.root.join("status.json")
    }

    /// The agent's progress of uploads.
    #[must_use]
    pub fn upload(&self) -> PathBuf {
        self.root.join("upload.json")
    }

    /// What the shim itself has to say to an operator.
    #[must_use]
    pub fn shim_log(&self) -> PathBuf {
        self.root.join("shim.log")
    }

    pub(crate) fn shim(&self) -> PathBuf {
        self.root.join("shim.json")
    }

    /// Space for the last state on a full disk.
    pub(crate) fn reserve(&self) -> PathBuf {
        self.root.join("reserve")
    }

    /// Makes the directory with all that is in it from the start, in one step: it is complete or it is not there.
    ///
    /// # Errors
    /// `AlreadyExists` if the attempt was accepted before.
    pub(crate) fn create(attempts: &Path, scratch: &str, member: &MemberFile) -> io::Result<Self> {
        let dir = Self::new(attempts, member.attempt);
        if std::fs::symlink_metadata(dir.root()).is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let new = Self::at(
            member.attempt,
            attempts.join(format!("{NEW_PREFIX}{scratch}")),
        );
        point("attempt.begin");
        let made = new.fill(member).and_then(|()| {
            point("attempt.filled");
            match std::fs::rename(new.root(), dir.root()) {
                // Only an empty directory can be replaced, and none of ours is ever empty.
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                    return Err(io::ErrorKind::AlreadyExists.into());
                }
                result => result?,
            }
            point("attempt.named");
            sync_dir(attempts)
        });
        point("attempt.synced");
        if made.is_err() {
            // Nobody but this call has written into it, so there is nothing hostile to follow.
            let _ = std::fs::remove_dir_all(new.root());
        }
        made.map(|()| dir)
    }

    fn fill(&self, member: &MemberFile) -> io::Result<()> {
        // A mapped user must be able to pass through to the directories that are its own; it cannot list this one.
        let mode = if member.settings.run_as.is_some() {
            0o711
        } else {
            0o700
        };
        make_dir(&self.root, mode)?;
        point("attempt.made");
        for sub in [
            self.work(),
            self.outputs(),
            self.checkpoint(),
            self.resume(),
            self.tmp(),
            self.logs(),
        ] {
            make_dir(&sub, 0o700)?;
        }
        // Its name in this directory becomes durable with it, or it is missing after a power loss: then the attempt still
        // counts as accepted, by the directory's own name.
        let mut file = create_json(&self.member())?;
        file.write_all(&sealed::seal(member)?)?;
        file.sync_all()
    }

    pub(crate) fn read_status(&self) -> io::Result<Option<ShimState>> {
        Ok(read_json::<Status>(&self.status())?.map(Status::into_state))
    }

    /// Returns when others find it, and an ending when it is on disk: exit statuses survive the machine.
    pub(crate) fn write_status(&self, state: &ShimState) -> io::Result<()> {
        let durable = matches!(state, ShimState::Gone(_));
        let status = Status::new(state.clone());
        replace_json(&self.status(), &status, durable)
    }

    pub(crate) fn read_shim(&self) -> io::Result<Option<ShimFile>> {
        read_json(&self.shim())
    }

    /// Takes the shim's lock, or nothing if a living shim has it. Dropping the file gives it back.
    pub(crate) fn try_lock(&self) -> io::Result<Option<File>> {
        let file = self.lock_file()?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Whether no shim lives. Several who look at the same time do not take each other for one.
    pub(crate) fn is_unlocked(&self) -> io::Result<bool> {
        match self.lock_file()?.try_lock_shared() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn lock_file(&self) -> io::Result<File> {
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(self.root.join("shim.lock"))
    }
}

/// The socket's name in the directory.
pub(crate) const SOCKET: &str = "shim.sock";
/// Begins the name of a directory that is being made.
pub(crate) const NEW_PREFIX: &str = ".new-";
/// Begins the name of a directory that is being deleted.
pub(crate) const OLD_PREFIX: &str = ".old-";

/// Makes a directory that did not exist, with exactly this mode whatever the umask is.
fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Replaces a file in one step.
pub(crate) fn write_json<T: FileRecord>(path: &Path, value: &T) -> io::Result<()> {
    replace_json(path, value, false)
}

fn replace_json<T: FileRecord>(path: &Path, value: &T, durable: bool) -> io::Result<()> {
    let bytes = sealed::seal(value)?;
    let scratch = path.with_extension("json.new");
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&scratch)?;
    file.write_all(&bytes)?;
    if durable {
        file.sync_all()?;
    }
    std::fs::rename(&scratch, path)?;
    match path.parent() {
        Some(parent) if durable => sync_dir(parent),
        _ => Ok(()),
    }
}

/// Makes a file that must not exist yet. If writing fails half way it exists all the same.
pub(crate) fn write_json_once<T: FileRecord>(path: &Path, value: &T) -> io::Result<()> {
    let bytes = sealed::seal(value)?;
    create_json(path)?.write_all(&bytes)
}

fn create_json(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(path)
}

/// The content of a file; nothing if it is not there. What is damaged in it is told with the file's name and the place.
pub(crate) fn read_json<T: FileRecord>(path: &Path) -> io::Result<Option<T>> {
    let file = match OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
    {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if file.metadata()?.len() > MAX_FILE {
        let message = format!("{}: file is too large", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes)?;
    sealed::open(&bytes)
        .map(Some)
        .map_err(|damage| damage.of(path))
}

/// The kernel's name for the time since the last boot.
pub(crate) fn boot_id() -> io::Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(text.trim().to_owned())
}

/// `bytes` random bytes as hexadecimal digits.
pub(crate) fn random_hex(bytes: usize) -> io::Result<String> {
    let mut random = vec![0_u8; bytes];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}
