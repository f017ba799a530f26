//! Room that is kept for the state: a file of real blocks beside the database. When the disk is full to the last byte it
//! is given back piece by piece, so that ends and cancels of jobs can still be written down; it is taken again once there
//! is room. It knows nothing of what the room is for.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use trainyard_transport::files::PRIVATE_FILE_MODE;

use crate::disk::{RESERVE_FOR_STATE, free_bytes};

/// The file's name in the state directory.
pub(crate) const FILE_NAME: &str = "state.reserve";
/// What is kept. The end of a job takes about 2 KB for good, so more than ten thousand of them fit.
pub(super) const SIZE: u64 = 32 << 20;
/// The file by which a quota is found out.
const PROBE: &str = ".state.probe";
/// Its size: as much as a small commit.
const PROBE_BYTES: usize = 32 << 10;
/// What is given back at a time: more than the largest commit writes. Not all at once, because whoever filled the disk
/// takes what is free, too.
const PIECE: u64 = 4 << 20;
/// How often it is looked whether there is room again.
const PAUSE: Duration = Duration::from_secs(1);

/// The reserve of one state directory.
#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
    dir: PathBuf,
    held: u64,
    looked: Option<Instant>,
}

impl Reserve {
    /// Finds what is kept in `dir`, and takes what is missing if there is room for it.
    pub(super) fn open(dir: &Path) -> Self {
        let path = dir.join(FILE_NAME);
        // Its blocks, not its length: a copy of the directory may have holes in their place.
        let held = fs::metadata(&path)
            .map(|found| found.len().min(found.blocks().saturating_mul(512)))
            .unwrap_or_default();
        let mut reserve = Self {
            path,
            dir: dir.to_owned(),
            held,
            looked: None,
        };
        reserve.take();
        reserve
    }

    /// Gives a piece back if next to nothing is free: what a start writes has to fit.
    pub(super) fn make_room(&mut self) {
        if free_bytes(&self.dir).is_some_and(|free| free < PIECE) {
            self.give_back();
        }
    }

    /// Gives a piece back; false if nothing is left or it cannot be given back.
    pub(super) fn give_back(&mut self) -> bool {
        if self.held == 0 {
            tracing::error!(
                path = %self.dir.display(),
                "the disk is full to the last byte and the reserve is used up"
            );
            return false;
        }
        let left = self.held.saturating_sub(PIECE);
        let given = OpenOptions::new()
            .write(true)
            .open(&self.path)
            .and_then(|file| file.set_len(left));
        if let Err(error) = given {
            tracing::error!(%error, path = %self.path.display(), "the reserve cannot be given back");
            return false;
        }
        self.held = left;
        tracing::error!(
            left_bytes = left,
            path = %self.dir.display(),
            "the disk is full to the last byte; the state goes on from its reserve, make room there"
        );
        true
    }

    /// Whether the user's quota leaves no room for a few more pages, found out by writing them to a file beside.
    pub(super) fn is_over_quota(&self) -> bool {
        let path = self.dir.join(PROBE);
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(PRIVATE_FILE_MODE)
            .open(&path)
            .and_then(|mut file| {
                file.write_all(&[1; PROBE_BYTES])?;
                file.sync_data()
            });
        // It is made anew each time, and holds nothing.
        let _ = fs::remove_file(&path);
        written.is_err_and(|error| error.kind() == io::ErrorKind::QuotaExceeded)
    }

    /// Whether some of it is missing.
    pub(super) fn is_short(&self) -> bool {
        self.held < SIZE
    }

    /// Takes what is missing, if more is free than new jobs are refused below; looks once in [`PAUSE`] at most.
    pub(super) fn take(&mut self) {
        if !self.is_short() || self.looked.is_some_and(|at| at.elapsed() < PAUSE) {
            return;
        }
        self.looked = Some(Instant::now());
        let wanted = (SIZE - self.held).saturating_add(RESERVE_FOR_STATE);
        if free_bytes(&self.dir).is_none_or(|free| free < wanted) {
            return;
        }
        match self.allocate() {
            Ok(()) => {
                self.held = SIZE;
                tracing::debug!(bytes = SIZE, "room is kept for the state");
            }
            Err(error) => {
                tracing::warn!(%error, path = %self.path.display(), "no room can be kept for the state");
            }
        }
    }

    fn allocate(&self) -> io::Result<()> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(PRIVATE_FILE_MODE)
            .open(&self.path)?;
        let taken = blocks(&file);
        if taken.is_err() {
            // Whatever was taken before it failed is not kept as if it were whole.
            file.set_len(self.held)?;
        }
        taken
    }
}

fn blocks(file: &File) -> io::Result<()> {
    let size = i64::try_from(SIZE).map_err(|_| Errno::EFBIG)?;
    fallocate(file, FallocateFlags::empty(), 0, size).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_real_blocks_given_back_in_pieces_and_taken_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let blocks = || fs::metadata(&path).unwrap().blocks() * 512;
        let mut reserve = Reserve::open(dir.path());
        if reserve.is_short() {
            eprintln!("skipped: no room, or the file system cannot keep any");
            return;
        }
        assert!(blocks() >= SIZE);
        let mut pieces = 0;
        while reserve.give_back() {
            pieces += 1;
            assert_eq!(fs::metadata(&path).unwrap().len(), SIZE - pieces * PIECE);
        }
        assert_eq!((pieces, blocks()), (SIZE / PIECE, 0));
        reserve.looked = None;
        reserve.take();
        assert!(!reserve.is_short() && blocks() >= SIZE);
        // Holes do not count as room.
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(0).unwrap();
        file.set_len(SIZE).unwrap();
        assert!(!Reserve::open(dir.path()).is_short() && blocks() >= SIZE);
    }
}
