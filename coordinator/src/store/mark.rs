//! The high-water mark of what was answered, in a small file beside the database. SQLite cannot tell a write-ahead log
//! that was cut off (or left behind when somebody copied `state.db` alone) from one that ends there; this can.
//!
//! It is written after each commit and not synced: so it never runs ahead of what is durable, it is exact after any crash
//! of the process, and after a power loss it is merely old. A mark that cannot be read says nothing.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use trainyard_common::ids::ClusterId;
use trainyard_transport::files::PRIVATE_FILE_MODE;

/// The file's name in the state directory.
pub(crate) const FILE_NAME: &str = "state.mark";
/// Two places are written in turn, in different sectors, so that one of them is always whole.
const PLACE: usize = 512;
const MAGIC: &[u8; 8] = b"yardmrk1";
/// Bytes of a place that are used.
const USED: usize = 8 + 16 + 8 + 8 + 8 + 4 + 4;
/// Those that the checksum is over.
const SUMMED: usize = USED - 4;

/// How far a state had come when its last commit was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Whose state it is.
    pub(crate) cluster: ClusterId,
    /// Commits of any kind.
    pub(crate) commits: u64,
    /// Transitions.
    pub(crate) sequence: u64,
    /// The term.
    pub(crate) term: u64,
    /// The chain's value after the last one.
    pub(crate) chain: u32,
}

/// What is in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// There is no such file: a new state, one of an earlier version, or a restored one.
    Nothing,
    /// Nothing in it can be read.
    Unreadable,
    /// The later of its whole marks.
    Mark(Mark),
}

impl Mark {
    fn encode(&self) -> [u8; USED] {
        let mut bytes = [0; USED];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..24].copy_from_slice(&self.cluster.0);
        bytes[24..32].copy_from_slice(&self.commits.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.term.to_le_bytes());
        bytes[48..SUMMED].copy_from_slice(&self.chain.to_le_bytes());
        let sum = crc32fast::hash(&bytes[..SUMMED]);
        bytes[SUMMED..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; USED] = bytes.first_chunk()?;
        let sum = u32::from_le_bytes(*bytes.last_chunk()?);
        if bytes[..8] != MAGIC[..] || crc32fast::hash(&bytes[..SUMMED]) != sum {
            return None;
        }
        Some(Self {
            cluster: ClusterId(bytes[8..24].try_into().ok()?),
            commits: u64::from_le_bytes(bytes[24..32].try_into().ok()?),
            sequence: u64::from_le_bytes(bytes[32..40].try_into().ok()?),
            term: u64::from_le_bytes(bytes[40..48].try_into().ok()?),
            chain: u32::from_le_bytes(bytes[48..SUMMED].try_into().ok()?),
        })
    }
}

/// Reads the mark in `dir`.
///
/// # Errors
/// Whatever the file system says.
pub(crate) fn read(dir: &Path) -> io::Result<Found> {
    let file = match File::open(dir.join(FILE_NAME)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::with_capacity(2 * PLACE);
    file.take(2 * PLACE as u64).read_to_end(&mut bytes)?;
    let whole = bytes.chunks(PLACE).filter_map(Mark::decode);
    Ok(whole
        .max_by_key(|mark| mark.commits)
        .map_or(Found::Unreadable, Found::Mark))
}

/// Where marks are written.
#[derive(Debug)]
pub(crate) struct Marker {
    path: PathBuf,
    file: Option<File>,
}

impl Marker {
    /// Begins with `mark`, durably and in both places. A disk that takes no mark is no reason not to start.
    pub(crate) fn begin(dir: &Path, mark: &Mark) -> Self {
        let path = dir.join(FILE_NAME);
        let open = || -> io::Result<File> {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(PRIVATE_FILE_MODE)
                .open(&path)?;
            let bytes = mark.encode();
            // The later place first: whatever happens between the two, the higher one of them is right.
            file.write_all_at(&bytes, PLACE as u64)?;
            file.write_all_at(&bytes, 0)?;
            file.set_len(2 * PLACE as u64)?;
            file.sync_all()?;
            Ok(file)
        };
        let file = open();
        if let Err(error) = &file {
            tracing::warn!(%error, path = %path.display(), "no mark of what was answered can be kept");
        }
        Self {
            path,
            file: file.ok(),
        }
    }

    /// Notes a commit that is durable.
    pub(crate) fn note(&mut self, mark: &Mark) {
        let Some(file) = &self.file else {
            return;
        };
        let place = (mark.commits % 2) * PLACE as u64;
        if let Err(error) = file.write_all_at(&mark.encode(), place) {
            // An old mark is a true one, so it may stay.
            tracing::warn!(%error, path = %self.path.display(), "the mark of what was answered stays behind");
            self.file = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn mark(commits: u64) -> Mark {
        Mark {
            cluster: ClusterId([7; 16]),
            commits,
            sequence: 2 * commits,
            term: 3,
            chain: 9,
        }
    }

    #[test]
    fn the_later_whole_mark_counts_and_no_flipped_bit_makes_another() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), Found::Nothing);
        let mut marker = Marker::begin(dir.path(), &mark(4));
        marker.note(&mark(5));
        marker.note(&mark(6));
        assert_eq!(read(dir.path()).unwrap(), Found::Mark(mark(6)));
        let path = dir.path().join(FILE_NAME);
        let whole = fs::read(&path).unwrap();
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, bytes).unwrap();
            let found = read(dir.path()).unwrap();
            assert!(
                [mark(5), mark(6)].map(Found::Mark).contains(&found),
                "{bit}"
            );
        }
        for len in 0..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            let found = read(dir.path()).unwrap();
            let expected = [
                Found::Unreadable,
                Found::Mark(mark(6)),
                Found::Mark(mark(5)),
            ];
            assert!(expected.contains(&found), "{len}: {found:?}");
        }
    }
}
