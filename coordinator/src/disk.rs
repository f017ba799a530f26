//! How much room a file system has left, so that what can be refused is refused before the state has no room to grow.

use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::units::format_bytes;

use crate::store::Store;

/// New jobs are refused below this: ends, cancels and heartbeats of the jobs that there are still fit.
pub(crate) const RESERVE_FOR_STATE: u64 = 64 << 20;
/// Blobs and output are refused below this, before new jobs are.
pub(crate) const RESERVE_FOR_DATA: u64 = 128 << 20;

/// A check of the file system that holds a directory.
#[derive(Debug, Clone)]
pub(crate) struct DiskGuard {
    path: PathBuf,
}

impl DiskGuard {
    pub(crate) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// Refuses if less than `reserve` bytes would be left after `wanted` more.
    pub(crate) fn check(&self, reserve: u64, wanted: u64) -> Result<(), Refusal> {
        // If it cannot be told, the write itself will say what is wrong.
        let Some(free) = free_bytes(&self.path) else {
            return Ok(());
        };
        if free >= reserve.saturating_add(wanted) {
            return Ok(());
        }
        Err(Refusal::new(
            ErrorCode::Exhausted,
            "DISK_FULL",
            format!(
                "the coordinator's disk is full: {} are free at {} and {} are kept in reserve; make room there",
                format_bytes(free),
                self.path.display(),
                format_bytes(reserve)
            ),
        ))
    }

    /// Refuses while the state goes on from its reserve: a quota that is used up shows in no free bytes.
    pub(crate) fn check_reserve(&self, store: &dyn Store) -> Result<(), Refusal> {
        if store.lives_on_reserve() {
            return Err(on_reserve(&self.path));
        }
        Ok(())
    }
}

/// The refusal while the state goes on from its reserve.
fn on_reserve(path: &Path) -> Refusal {
    Refusal::new(
        ErrorCode::Exhausted,
        "DISK_FULL",
        format!(
            "the coordinator's disk or its quota is used up at {} and the state goes on from its reserve, though {} are free; \
             make room there",
            path.display(),
            format_bytes(free_bytes(path).unwrap_or_default())
        ),
    )
}

/// Bytes that an unprivileged process may still use.
pub(crate) fn free_bytes(path: &Path) -> Option<u64> {
    let stat = statvfs(path).ok()?;
    stat.blocks_available().checked_mul(stat.fragment_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_path_and_the_free_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let guard = DiskGuard::new(dir.path());
        assert_eq!(guard.check(0, 0), Ok(()));
        let refusal = guard.check(u64::MAX / 2, 1).unwrap_err();
        assert_eq!(refusal.code, ErrorCode::Exhausted);
        assert!(
            refusal.message.contains(dir.path().to_str().unwrap()),
            "{refusal}"
        );
        assert!(refusal.message.contains("are free"), "{refusal}");
    }
}
