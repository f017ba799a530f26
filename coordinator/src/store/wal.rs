//! A look at SQLite's write-ahead log before SQLite opens it, without changing it. SQLite takes the first frame that is
//! not whole for the end of the log and says nothing, also if whole commits that were answered follow. This module tells
//! such damage from a torn end.
//!
//! It knows the form of the file (<https://sqlite.org/fileformat2.html#walformat>) and nothing of what is in the pages.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

/// The file's name in the state directory.
pub(crate) const FILE_NAME: &str = "state.db-wal";
/// Bytes before the first frame.
const HEADER: usize = 32;
/// Bytes before the page of a frame.
const FRAME_HEADER: usize = 24;
/// The magic number; its lowest bit says that checksums are over big-endian words.
const MAGIC: u32 = 0x377f_0682;
/// The only version there is.
const VERSION: u32 = 3_007_000;
/// Sizes of a page that the format allows.
const PAGE_SIZES: std::ops::RangeInclusive<u32> = 512..=65_536;

/// What a log holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scan {
    /// The file.
    pub(crate) path: PathBuf,
    /// Its length; 0 if it is not there.
    pub(crate) len: u64,
    /// Where its last whole commit ends; what follows counts for nothing.
    pub(crate) end: u64,
    /// Whole commits in it.
    pub(crate) commits: u64,
    /// The database after the last of them: bytes of a page and number of pages.
    pub(crate) database: Option<(u32, u32)>,
    /// Pages that whole commits hold.
    pub(crate) pages: BTreeSet<u32>,
    /// What comes after them.
    pub(crate) verdict: Verdict,
}

/// What comes after the last whole commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing, or what is left of an earlier round.
    Clean,
    /// A commit that did not get whole, and nothing after it.
    Torn {
        /// Where it begins.
        offset: u64,
        /// Its bytes.
        dropped: u64,
    },
    /// Whole commits follow behind something damaged, or may.
    Damaged {
        /// Where the damage is.
        offset: u64,
        /// Whole commits behind it, of those that can be told.
        commits: u64,
        /// What is wrong.
        reason: &'static str,
    },
}

/// The two words of SQLite's running checksum.
type Checksum = (u32, u32);

#[derive(Clone, Copy)]
struct Form {
    page_size: u32,
    big_endian: bool,
    salts: [u8; 8],
    checksum: Checksum,
}

/// One frame, as far as it matters here.
struct Frame {
    offset: u64,
    page: u32,
    /// Pages of the database if it ends a commit, else 0.
    commit: u32,
    /// Whether it says that it is of the log's present round.
    current: bool,
    /// Whether its checksum follows from the one that its predecessor stored.
    verified: bool,
    stored: Checksum,
}

/// Reads a log; one that is not there holds nothing.
///
/// # Errors
/// Whatever the file system says.
pub(crate) fn scan(path: &Path) -> io::Result<Scan> {
    let mut scan = Scan {
        path: path.to_owned(),
        len: 0,
        end: 0,
        commits: 0,
        database: None,
        pages: BTreeSet::new(),
        verdict: Verdict::Clean,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(scan),
        Err(error) => return Err(error),
    };
    scan.len = file.metadata()?.len();
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut header = [0; HEADER];
    let read = fill(&mut reader, &mut header)?;
    if read == 0 {
        return Ok(scan);
    }
    let Some(form) = form(&header).filter(|_| read == HEADER) else {
        scan.verdict = without_header(&mut reader, &header, scan.len)?;
        return Ok(scan);
    };
    scan.end = HEADER as u64;
    follow(&mut reader, form, &mut scan)?;
    Ok(scan)
}

/// A header that was never written is one of zeros, or is cut off; any other that is not whole was damaged.
fn without_header(reader: &mut impl Read, header: &[u8], len: u64) -> io::Result<Verdict> {
    if len >= HEADER as u64 {
        let mut rest = Vec::new();
        let mut zeros = header.iter().all(|byte| *byte == 0);
        // Bounded by the length of the file, a piece at a time.
        while zeros && reader.by_ref().take(1 << 20).read_to_end(&mut rest)? > 0 {
            zeros = rest.iter().all(|byte| *byte == 0);
            rest.clear();
        }
        if !zeros {
            return Ok(Verdict::Damaged {
                offset: 0,
                commits: 0,
                reason: "the header of the write-ahead log is damaged, so that nothing behind it can be told",
            });
        }
    }
    Ok(Verdict::Torn {
        offset: 0,
        dropped: len,
    })
}

fn form(header: &[u8; HEADER]) -> Option<Form> {
    let magic = word(header, 0);
    if magic & !1 != MAGIC || word(header, 4) != VERSION {
        return None;
    }
    let big_endian = magic & 1 == 1;
    let page_size = word(header, 8);
    let checksum = checksum((0, 0), &header[..24], big_endian);
    let valid = page_size.is_power_of_two()
        && PAGE_SIZES.contains(&page_size)
        && checksum == (word(header, 24), word(header, 28));
    valid.then(|| Form {
        page_size,
        big_endian,
        salts: header[16..24].try_into().unwrap_or_default(),
        checksum,
    })
}

/// Goes through all frames: the whole commits from the start, then what may be behind them.
fn follow(reader: &mut impl Read, form: Form, scan: &mut Scan) -> io::Result<()> {
    let mut bytes = vec![0; FRAME_HEADER + form.page_size as usize];
    let (mut offset, mut before) = (HEADER as u64, form.checksum);
    let mut open = BTreeSet::new();
    let mut behind: Option<Behind> = None;
    loop {
        let read = fill(reader, &mut bytes)?;
        if read < bytes.len() {
            if read > 0 && behind.is_none() {
                let torn = read < FRAME_HEADER || bytes[8..16] == form.salts;
                behind = torn.then(|| Behind::partial(offset + read as u64));
            }
            break;
        }
        let frame = frame(&bytes, form, before, offset);
        (offset, before) = (offset + bytes.len() as u64, frame.stored);
        match &mut behind {
            None if frame.current && frame.verified && frame.page != 0 => {
                open.insert(frame.page);
                if frame.commit != 0 {
                    scan.pages.append(&mut open);
                    scan.end = offset;
                    scan.commits += 1;
                    scan.database = Some((form.page_size, frame.commit));
                }
            }
            None => behind = Some(Behind::new(&frame, offset)),
            Some(behind) => behind.take(&frame, offset),
        }
    }
    // Frames of a commit without its last one.
    if behind.is_none() && !open.is_empty() {
        behind = Some(Behind::partial(offset));
    }
    if let Some(behind) = behind {
        scan.verdict = behind.verdict(scan.end, !open.is_empty());
    }
    Ok(())
}

/// What is known of the frames from the first that is not whole on.
struct Behind {
    offset: u64,
    /// Whether the commit that it belongs to has ended.
    ended: bool,
    /// Whole commits after that one.
    commits: u64,
    /// Where the last frame of the present round ends, if there is one.
    last: Option<u64>,
}

impl Behind {
    fn new(first: &Frame, end: u64) -> Self {
        Self {
            offset: first.offset,
            // Of a frame that is not of this round nothing is known, but that a damaged one may have been a commit's last.
            ended: first.commit != 0,
            commits: 0,
            last: first.current.then_some(end),
        }
    }

    fn partial(end: u64) -> Self {
        Self {
            offset: end,
            ended: false,
            commits: 0,
            last: Some(end),
        }
    }

    fn take(&mut self, frame: &Frame, end: u64) {
        if !frame.current {
            return;
        }
        self.last = Some(end);
        if frame.commit == 0 {
            return;
        }
        if self.ended && frame.verified {
            self.commits += 1;
        }
        self.ended = true;
    }

    fn verdict(self, whole: u64, begun: bool) -> Verdict {
        match self.last {
            Some(_) if self.commits > 0 => Verdict::Damaged {
                offset: self.offset,
                commits: self.commits,
                reason: "a frame of the write-ahead log is damaged, and whole commits follow it",
            },
            Some(last) => Verdict::Torn {
                offset: whole,
                dropped: last.saturating_sub(whole),
            },
            // Whole frames without a commit before the first frame of an earlier round.
            None if begun => Verdict::Torn {
                offset: whole,
                dropped: self.offset.saturating_sub(whole),
            },
            None => Verdict::Clean,
        }
    }
}

fn frame(bytes: &[u8], form: Form, before: Checksum, offset: u64) -> Frame {
    let current = bytes[8..16] == form.salts;
    let stored = (word(bytes, 16), word(bytes, 20));
    let verified = current && {
        let sum = checksum(before, &bytes[..8], form.big_endian);
        checksum(sum, &bytes[FRAME_HEADER..], form.big_endian) == stored
    };
    Frame {
        offset,
        page: word(bytes, 0),
        commit: word(bytes, 4),
        current,
        verified,
        stored,
    }
}

/// All pages of the frames of the present round in their order, whether they are whole or not: what is left of a damaged
/// log, to find out what it was about and for nothing else.
///
/// # Errors
/// Whatever the file system says, or `each`.
pub(crate) fn leftovers(
    path: &Path,
    page_size: u32,
    mut each: impl FnMut(u32, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(1 << 20, File::open(path)?);
    let mut header = [0; HEADER];
    fill(&mut reader, &mut header)?;
    let mut bytes = vec![0; FRAME_HEADER + page_size as usize];
    // The salts of the first frame, as the header may be what is damaged.
    let mut salts = None;
    while fill(&mut reader, &mut bytes)? == bytes.len() {
        let salts = salts.get_or_insert_with(|| bytes[8..16].to_vec());
        let page = word(&bytes, 0);
        if bytes[8..16] == salts[..] && page != 0 {
            each(page, &bytes[FRAME_HEADER..])?;
        }
    }
    Ok(())
}

/// Cuts a log off behind its last whole commit, durably.
///
/// # Errors
/// Whatever the file system says.
pub(crate) fn cut(path: &Path, end: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.set_len(end)?;
    file.sync_all()
}

fn fill(reader: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
    let mut read = 0;
    while read < bytes.len() {
        match reader.read(&mut bytes[read..]) {
            Ok(0) => break,
            Ok(more) => read += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    u32::from_be_bytes(word.unwrap_or_default())
}

fn checksum(start: Checksum, bytes: &[u8], big_endian: bool) -> Checksum {
    let (mut first, mut second) = start;
    for pair in bytes.chunks_exact(8) {
        let (one, two) = pair.split_at(4);
        let number = |word: &[u8]| {
            let word = word.try_into().unwrap_or_default();
            if big_endian {
                u32::from_be_bytes(word)
            } else {
                u32::from_le_bytes(word)
            }
        };
        first = first.wrapping_add(number(one)).wrapping_add(second);
        second = second.wrapping_add(number(two)).wrapping_add(first);
    }
    (first, second)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rusqlite::Connection;

    use super::*;

    /// A log of four commits, the third of several frames, and where each ends.
    fn written(dir: &Path) -> (Connection, PathBuf, Vec<u64>) {
        let file = dir.join("state.db");
        let connection = Connection::open(&file).unwrap();
        let path = dir.join(FILE_NAME);
        let mut ends = Vec::new();
        for sql in [
            "PRAGMA page_size = 512; PRAGMA journal_mode = WAL; CREATE TABLE t (a)",
            "INSERT INTO t VALUES (1)",
            "INSERT INTO t VALUES (zeroblob(3000))",
            "INSERT INTO t VALUES (2)",
        ] {
            connection.execute_batch(sql).unwrap();
            ends.push(fs::metadata(&path).unwrap().len());
        }
        (connection, path, ends)
    }

    fn flip(path: &Path, offset: u64) {
        let mut bytes = fs::read(path).unwrap();
        bytes[usize::try_from(offset).unwrap()] ^= 4;
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn a_whole_log_is_clean_also_over_the_rest_of_an_earlier_round() {
        let dir = tempfile::tempdir().unwrap();
        let (connection, path, ends) = written(dir.path());
        let found = scan(&path).unwrap();
        assert_eq!((found.verdict, found.end), (Verdict::Clean, ends[3]));
        assert!(found.commits >= 4);
        assert_eq!(found.database.unwrap().0, 512);
        connection
            .query_row("PRAGMA wal_checkpoint(RESTART)", [], |_| Ok(()))
            .unwrap();
        connection
            .execute_batch("INSERT INTO t VALUES (3)")
            .unwrap();
        let again = scan(&path).unwrap();
        assert_eq!((again.verdict, again.commits), (Verdict::Clean, 1));
        assert!(again.end < again.len && again.len == ends[3]);
        assert_eq!(scan(&dir.path().join("none")).unwrap().len, 0);
    }

    #[test]
    fn damage_before_a_later_commit_is_told_from_a_torn_end() {
        let dir = tempfile::tempdir().unwrap();
        let (_connection, path, ends) = written(dir.path());
        let whole = fs::read(&path).unwrap();
        let verdict = || scan(&path).unwrap().verdict;
        // In each commit but the last: its first frame, the page number and the page.
        for at in [
            ends[0],
            ends[0] + 3,
            ends[0] + 8,
            ends[0] + 100,
            ends[1] + 700,
        ] {
            flip(&path, at);
            let Verdict::Damaged { offset, .. } = verdict() else {
                panic!("{at}: {:?}", verdict());
            };
            assert!((at - 536..=at).contains(&offset), "{at}: {offset}");
            fs::write(&path, &whole).unwrap();
        }
        // In the last one, and cut off in it.
        let torn = Verdict::Torn {
            offset: ends[2],
            dropped: ends[3] - ends[2],
        };
        flip(&path, ends[2] + 100);
        assert_eq!(verdict(), torn);
        cut(&path, ends[3] - 7).unwrap();
        let Verdict::Torn { offset, dropped } = verdict() else {
            panic!("{:?}", verdict());
        };
        assert_eq!((offset, dropped), (ends[2], ends[3] - 7 - ends[2]));
        // The header.
        for at in 0..32 {
            fs::write(&path, &whole).unwrap();
            flip(&path, at);
            let found = verdict();
            assert!(
                matches!(found, Verdict::Damaged { offset: 0, .. }),
                "{at}: {found:?}"
            );
        }
        for len in [1, 31] {
            fs::write(&path, &whole[..len]).unwrap();
            let dropped = len as u64;
            assert_eq!(verdict(), Verdict::Torn { offset: 0, dropped });
        }
        fs::write(&path, [0; 4000]).unwrap();
        assert!(matches!(verdict(), Verdict::Torn { offset: 0, .. }));
    }
}
