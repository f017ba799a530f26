//! What an agent keeps about itself in its data directory: the lock that makes it the only one there, how often it has
//! started, and the highest term that it has seen.
//!
//! Losing `agent.json` loses no member: attempts are found by their directories. A damaged one is set aside with a
//! warning; the incarnation then starts above any real one's by taking the time.

use std::ffi::CString;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, getgrouplist};
use serde::{Deserialize, Serialize};
use trainyard_common::ids::{Incarnation, Term};
use trainyard_transport::files;

use crate::runtime::RunAs;
use trainyard_transport::clock;

/// The directory of certificate and key.
pub(crate) const CREDENTIALS: &str = "credentials";
/// The directory of attempts.
pub(crate) const ATTEMPTS: &str = "attempts";
/// The directory of bundles.
pub(crate) const BUNDLES: &str = "bundles";
/// The directory of blobs that were fetched.
pub(crate) const CACHE: &str = "cache";
const STATE: &str = "agent.json";
const LOCK: &str = "agent.lock";
/// Bytes of `agent.json` that are read; ours has about 60.
const MAX_STATE_BYTES: u64 = 64 << 10;

/// Why an agent's data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another agent uses it.
    #[error("another agent runs on {dir:?}; each agent needs a data directory of its own")]
    Locked {
        /// The directory.
        dir: PathBuf,
    },
    /// Jobs could not reach their directories.
    #[error(
        "the user {user:?} cannot pass through {dir:?} to the directories of its jobs: allow it with \
         `chmod o+x {}`, or choose another data directory", dir.display()
    )]
    Impassable {
        /// As whom jobs run.
        user: String,
        /// Which directory is in the way.
        dir: PathBuf,
    },
    /// Something in it cannot be read or written.
    #[error("cannot {operation} {path:?}")]
    File {
        /// What was to be done.
        operation: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Kept {
    incarnation: Incarnation,
    term: Term,
}

/// An agent's data directory, held by its lock.
#[derive(Debug)]
pub(crate) struct AgentState {
    dir: PathBuf,
    kept: Kept,
    boot_id: String,
    /// Given back when dropped, or when the process ends in whatever way.
    _lock: File,
}

impl AgentState {
    /// Takes the directory, making it if needed, and counts one more start. It blocks.
    pub(crate) fn open(dir: &Path) -> Result<Self, StateError> {
        make_data_dir(dir)?;
        make_dir(&dir.join(ATTEMPTS), 0o711)?;
        make_dir(&dir.join(BUNDLES), 0o711)?;
        make_dir(&dir.join(CACHE), 0o700)?;
        let lock = lock(dir)?;
        let mut kept = load(&dir.join(STATE))?;
        kept.incarnation = kept.incarnation.next();
        let boot = Path::new("/proc/sys/kernel/random/boot_id");
        let boot_id = fs::read_to_string(boot).map_err(failed("read", boot))?;
        let state = Self {
            dir: dir.to_owned(),
            kept,
            boot_id: boot_id.trim().to_owned(),
            _lock: lock,
        };
        state.save()?;
        Ok(state)
    }

    pub(crate) fn incarnation(&self) -> Incarnation {
        self.kept.incarnation
    }

    /// The highest term seen.
    pub(crate) fn term(&self) -> Term {
        self.kept.term
    }

    pub(crate) fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// Keeps a higher term, before anything is done on its word. It blocks.
    pub(crate) fn raise_term(&mut self, term: Term) -> Result<(), StateError> {
        if term > self.kept.term {
            self.kept.term = term;
            self.save()?;
        }
        Ok(())
    }

    fn save(&self) -> Result<(), StateError> {
        let path = self.dir.join(STATE);
        let json =
            serde_json::to_vec(&self.kept).map_err(|error| failed("write", &path)(error.into()))?;
        files::write_private(&path, &json).map_err(failed("write", &path))
    }
}

/// Makes an agent's data directory and what is missing above it, so that jobs that run as another user can pass through.
/// It blocks.
///
/// # Errors
/// [`StateError::File`].
pub fn make_data_dir(dir: &Path) -> Result<(), StateError> {
    make_dir(dir, 0o711)
}

/// Sees to it that `user` can reach the directories of its jobs. It blocks.
pub(crate) fn let_pass(dir: &Path, user: &RunAs) -> Result<(), StateError> {
    let real = dir.canonicalize().map_err(failed("find", dir))?;
    let groups = CString::new(user.name.as_str())
        .map_err(io::Error::other)
        .and_then(|name| Ok(getgrouplist(&name, Gid::from_raw(user.gid))?))
        .map_err(failed("look up the groups of its user for", dir))?;
    // These are the agent's own; they may have been made by something that knew nothing of other users.
    for own in [real.clone(), real.join(ATTEMPTS), real.join(BUNDLES)] {
        let mode = fs::metadata(&own).map_err(failed("read", &own))?.mode();
        fs::set_permissions(&own, Permissions::from_mode(mode & 0o777 | 0o111))
            .map_err(failed("set the mode of", &own))?;
    }
    for above in real.ancestors().skip(1) {
        let metadata = fs::metadata(above).map_err(failed("read", above))?;
        let mode = metadata.mode();
        // The most specific of the three counts, as for the kernel.
        let passes = if metadata.uid() == user.uid {
            mode & 0o100
        } else if groups.contains(&Gid::from_raw(metadata.gid())) {
            mode & 0o010
        } else {
            mode & 0o001
        };
        if passes == 0 {
            return Err(StateError::Impassable {
                user: user.name.clone(),
                dir: above.to_owned(),
            });
        }
    }
    Ok(())
}

fn lock(dir: &Path) -> Result<File, StateError> {
    let path = dir.join(LOCK);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(failed("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StateError::Locked {
            dir: dir.to_owned(),
        }),
        Err(TryLockError::Error(source)) => Err(failed("lock", &path)(source)),
    }
}

fn load(path: &Path) -> Result<Kept, StateError> {
    let bytes = match fs::metadata(path) {
        Ok(metadata) if metadata.len() <= MAX_STATE_BYTES => {
            fs::read(path).map_err(failed("read", path))?
        }
        Ok(_) => Vec::new(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Kept::default()),
        Err(source) => return Err(failed("read", path)(source)),
    };
    if let Ok(kept) = serde_json::from_slice(&bytes) {
        return Ok(kept);
    }
    tracing::warn!(
        ?path,
        "the agent's state is damaged, starting with a new one"
    );
    fs::rename(path, path.with_extension("json.damaged")).map_err(failed("rename", path))?;
    // The coordinator takes only a growing counter for a new start, and no agent starts once a second for long.
    let incarnation = Incarnation(clock::wall_now().0 / 1000);
    Ok(Kept {
        incarnation,
        term: Term(0),
    })
}

fn make_dir(path: &Path, mode: u32) -> Result<(), StateError> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(failed("make", path))
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::File {
        operation,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_start_counts_and_terms_only_grow() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("agent");
        let mut state = AgentState::open(&dir).unwrap();
        assert_eq!(
            (state.incarnation(), state.term()),
            (Incarnation(1), Term(0))
        );
        assert_eq!(state.boot_id().len(), 36);
        state.raise_term(Term(7)).unwrap();
        state.raise_term(Term(3)).unwrap();
        drop(state);
        let state = AgentState::open(&dir).unwrap();
        assert_eq!(
            (state.incarnation(), state.term()),
            (Incarnation(2), Term(7))
        );
    }

    #[test]
    fn the_user_of_jobs_can_reach_them_or_is_told_what_is_in_the_way() {
        let temp = tempfile::tempdir().unwrap();
        let above = temp.path().canonicalize().unwrap().join("above");
        let dir = above.join("agent");
        let user = RunAs {
            uid: 65_533,
            gid: 65_533,
            name: "nobody-of-ours".to_owned(),
            home: "/".into(),
        };
        drop(AgentState::open(&dir).unwrap());
        let set = |path: &Path, mode| {
            fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        };
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        set(temp.path(), 0o711);
        set(&dir, 0o700);
        let_pass(&dir, &user).unwrap();
        assert_eq!(mode(&dir), 0o711);
        assert_eq!(mode(&dir.join(CACHE)), 0o700);
        set(&above, 0o700);
        let error = let_pass(&dir, &user).unwrap_err();
        assert!(
            matches!(&error, StateError::Impassable { dir, .. } if *dir == above),
            "{error:?}"
        );
        assert!(error.to_string().contains("chmod o+x"), "{error}");
    }

    #[test]
    fn a_second_agent_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let first = AgentState::open(temp.path()).unwrap();
        let error = AgentState::open(temp.path()).unwrap_err();
        assert!(matches!(error, StateError::Locked { .. }), "{error:?}");
        drop(first);
        let second = AgentState::open(temp.path()).unwrap();
        assert_eq!(
            second.incarnation(),
            Incarnation(2),
            "the refused one does not count"
        );
    }

    #[test]
    fn a_damaged_file_is_set_aside() {
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join(STATE), "{\"incarnation\":").unwrap();
        let state = AgentState::open(temp.path()).unwrap();
        assert!(state.incarnation().0 > 1_600_000_000);
        assert!(temp.path().join("agent.json.damaged").exists());
    }
}
