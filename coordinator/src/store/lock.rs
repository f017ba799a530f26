//! One coordinator per state directory: a lock that the kernel drops with the process, and a text that says who has it.
//!
//! It knows nothing of what is in the directory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use trainyard_common::time::Timestamp;
use trainyard_transport::{files, host};

use super::StoreError;

/// The lock's file in the state directory.
pub(crate) const LOCK_FILE: &str = "coordinator.lock";
/// How long another holder is waited for: a coordinator that was killed takes a moment until the kernel has taken it
/// down, and whoever starts the next one should not meet it.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of the holder's description that are read.
const MAX_HOLDER_BYTES: u64 = 1024;

/// The right to use a state directory, for as long as it lives.
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

impl StateLock {
    /// Takes `dir/coordinator.lock`, making it if need be. It blocks for two seconds at most.
    ///
    /// # Errors
    /// [`StoreError::Held`] with the holder's process, host and start, or [`StoreError::File`].
    pub fn acquire(dir: &Path, now: Timestamp) -> Result<Self, StoreError> {
        Self::acquire_within(dir, now, PATIENCE)
    }

    /// The same, waiting for another holder to end for at most `patience`.
    pub(crate) fn acquire_within(
        dir: &Path,
        now: Timestamp,
        patience: Duration,
    ) -> Result<Self, StoreError> {
        let path = dir.join(LOCK_FILE);
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
        let locked = files::lock_within(file, patience).map_err(|source| failed("lock", source))?;
        let Some(mut file) = locked else {
            return Err(StoreError::Held {
                path: PathBuf::from(dir),
                holder: holder(&path),
            });
        };
        let text = format!(
            "pid {}, host {}, since unix ms {}\n",
            std::process::id(),
            host::name().unwrap_or_default(),
            now.0
        );
        let written = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(text.as_bytes()));
        match written {
            // It is held all the same; who holds it is only not told while the disk is full.
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {}
            other => other.map_err(|source| failed("write", source))?,
        }
        Ok(Self { _file: file })
    }
}

fn holder(path: &Path) -> String {
    let mut text = String::new();
    let read =
        File::open(path).and_then(|file| file.take(MAX_HOLDER_BYTES).read_to_string(&mut text));
    match read {
        Ok(_) if !text.trim().is_empty() => text.trim().to_owned(),
        _ => "it did not say who it is".to_owned(),
    }
}
