//! One coordinator per state directory: a lock that the kernel drops with the process, and a text that says who has it.
//!
//! It knows nothing of what is in the directory.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use trainyard_common::time::Timestamp;

use super::StoreError;

/// Bytes of the holder's description that are read.
const MAX_HOLDER_BYTES: u64 = 1024;

/// The right to use a state directory, for as long as it lives.
#[derive(Debug)]
pub struct StateLock {
    _file: Flock<File>,
}

impl StateLock {
    /// Takes `dir/coordinator.lock`, making it if need be.
    ///
    /// # Errors
    /// [`StoreError::Held`] with the holder's process, host and start, or [`StoreError::File`].
    pub fn acquire(dir: &Path, now: Timestamp) -> Result<Self, StoreError> {
        let path = dir.join("coordinator.lock");
        let failed = |operation, source| StoreError::File {
            operation,
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|source| failed("open", source))?;
        let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((file, Errno::EWOULDBLOCK)) => {
                return Err(StoreError::Held {
                    path: PathBuf::from(dir),
                    holder: holder(file),
                });
            }
            Err((_, errno)) => return Err(failed("lock", errno.into())),
        };
        let host = nix::unistd::gethostname().unwrap_or_default();
        let text = format!(
            "pid {}, host {}, since unix ms {}\n",
            std::process::id(),
            host.display(),
            now.0
        );
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(text.as_bytes()))
            .map_err(|source| failed("write", source))?;
        Ok(Self { _file: file })
    }
}

fn holder(file: File) -> String {
    let mut text = String::new();
    match file.take(MAX_HOLDER_BYTES).read_to_string(&mut text) {
        Ok(_) if !text.trim().is_empty() => text.trim().to_owned(),
        _ => "it did not say who it is".to_owned(),
    }
}
