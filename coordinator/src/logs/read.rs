//! Reading a rank's records back: from an offset, from a time, or the last lines, in batches of bounded size.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use trainyard_common::limits::{CHUNK_BYTES, MAX_LOG_RECORD};
use trainyard_common::logrecord::{HEADER_BYTES, LogKind, LogRecord};
use trainyard_common::time::Timestamp;

use super::LogError;

/// Most lines that `tail` gives; more than anybody reads, and the positions of so many fit into 2 MiB.
const MAX_TAIL: u32 = 100_000;

/// Where to begin.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Start {
    /// At this offset, or the first record after it.
    pub(crate) offset: u64,
    /// Only records from then on.
    pub(crate) since: Option<Timestamp>,
    /// Only so many lines.
    pub(crate) tail: Option<u32>,
}

/// One record for a reader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) kind: LogKind,
    pub(crate) at: Timestamp,
    pub(crate) next_offset: u64,
    pub(crate) data: Vec<u8>,
}

/// A place in one rank's output. It holds no open file between batches, as a follower of a large gang has thousands.
#[derive(Debug)]
pub(crate) struct LogReader {
    path: PathBuf,
    offset: u64,
    since: Option<Timestamp>,
    /// Bytes of the first record that a tail leaves out.
    skip: usize,
}

impl LogReader {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            offset: 0,
            since: None,
            skip: 0,
        }
    }

    fn open(&self) -> Result<File, LogError> {
        File::open(&self.path).map_err(|source| LogError::File {
            operation: "open",
            path: self.path.clone(),
            source,
        })
    }

    /// Goes to where reading is to begin.
    pub(crate) fn start(&mut self, start: Start) -> Result<(), LogError> {
        self.since = start.since;
        let mut lines = start.tail.map(|lines| LineStarts::new(lines.min(MAX_TAIL)));
        if start.offset == 0 && lines.is_none() {
            return Ok(());
        }
        let file = self.open()?;
        let mut records = Records::new(&file, &self.path)?;
        let mut end = 0;
        let mut data = Vec::new();
        while let Some(header) = records.next(lines.is_some().then_some(&mut data))? {
            if header.offset >= start.offset && lines.is_none() {
                break;
            }
            end = header.end;
            let wanted =
                header.offset >= start.offset && start.since.is_none_or(|since| header.at >= since);
            if let Some(lines) = lines.as_mut().filter(|_| wanted) {
                lines.pass(header, &data);
            }
        }
        (self.offset, self.skip) = lines.and_then(LineStarts::first).unwrap_or((end, 0));
        Ok(())
    }

    /// The next records, at most about [`CHUNK_BYTES`] of them; none if nothing more is there now.
    pub(crate) fn next_batch(&mut self) -> Result<Vec<Entry>, LogError> {
        loop {
            let before = self.offset;
            let entries = self.read_chunk()?;
            // A chunk may hold only records that are too old.
            if !entries.is_empty() || self.offset == before {
                return Ok(entries);
            }
        }
    }

    fn read_chunk(&mut self) -> Result<Vec<Entry>, LogError> {
        let failed = |source| LogError::File {
            operation: "read",
            path: self.path.clone(),
            source,
        };
        let mut bytes = Vec::with_capacity(CHUNK_BYTES);
        let mut file = self.open()?;
        file.seek(SeekFrom::Start(self.offset)).map_err(failed)?;
        file.take(CHUNK_BYTES as u64)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
        let mut entries = Vec::new();
        let mut rest = bytes.as_slice();
        loop {
            let decoded = LogRecord::decode(rest)
                .map_err(|bad| failed(io::Error::new(io::ErrorKind::InvalidData, bad)))?;
            let Some((record, length)) = decoded else {
                return Ok(entries);
            };
            rest = &rest[length..];
            self.offset += length as u64;
            let skip = std::mem::take(&mut self.skip).min(record.data.len());
            if self.since.is_none_or(|since| record.at >= since) {
                entries.push(Entry {
                    kind: record.kind,
                    at: record.at,
                    next_offset: self.offset,
                    data: record.data[skip..].to_vec(),
                });
            }
        }
    }
}

/// Length of the part of a file that is whole records.
pub(super) fn whole_length(path: &Path) -> Result<u64, LogError> {
    let file = File::open(path).map_err(|source| LogError::File {
        operation: "open",
        path: path.to_owned(),
        source,
    })?;
    let mut records = Records::new(&file, path)?;
    let mut end = 0;
    loop {
        match records.next(None) {
            Ok(Some(header)) => end = header.end,
            Ok(None) => return Ok(end),
            Err(LogError::File { source, .. }) if source.kind() == io::ErrorKind::InvalidData => {
                return Ok(end);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Where one record is.
#[derive(Debug, Clone, Copy)]
struct Header {
    kind: LogKind,
    at: Timestamp,
    offset: u64,
    end: u64,
}

/// Goes over the records of a file once, with or without their data.
struct Records<'a> {
    file: BufReader<&'a File>,
    path: &'a Path,
    length: u64,
    offset: u64,
}

impl<'a> Records<'a> {
    fn new(file: &'a File, path: &'a Path) -> Result<Self, LogError> {
        let failed = |source| LogError::File {
            operation: "read",
            path: path.to_owned(),
            source,
        };
        let length = file.metadata().map_err(failed)?.len();
        let mut file = BufReader::with_capacity(CHUNK_BYTES, file);
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        Ok(Self {
            file,
            path,
            length,
            offset: 0,
        })
    }

    /// The next record, its data in `data` if wanted; nothing at the end or before a record that is not whole.
    fn next(&mut self, data: Option<&mut Vec<u8>>) -> Result<Option<Header>, LogError> {
        let path = self.path;
        let failed = |source| LogError::File {
            operation: "read",
            path: path.to_owned(),
            source,
        };
        let left = self.length - self.offset;
        if left < HEADER_BYTES as u64 {
            return Ok(None);
        }
        let mut bytes = [0; HEADER_BYTES];
        self.file.read_exact(&mut bytes).map_err(failed)?;
        let length = u32::from_le_bytes([bytes[9], bytes[10], bytes[11], bytes[12]]) as usize;
        // Decoded with empty data: the kind and time are checked by those who own the format.
        bytes[9..].fill(0);
        let record = LogRecord::decode(&bytes)
            .map_err(|bad| failed(io::Error::new(io::ErrorKind::InvalidData, bad)))?;
        let Some((record, _)) = record.filter(|_| length <= MAX_LOG_RECORD) else {
            return Err(failed(io::Error::new(
                io::ErrorKind::InvalidData,
                "a record is too long",
            )));
        };
        if left < (HEADER_BYTES + length) as u64 {
            return Ok(None);
        }
        match data {
            Some(data) => {
                data.resize(length, 0);
                self.file.read_exact(data).map_err(failed)?;
            }
            None => self.file.seek_relative(length as i64).map_err(failed)?,
        }
        let offset = self.offset;
        self.offset += (HEADER_BYTES + length) as u64;
        Ok(Some(Header {
            kind: record.kind,
            at: record.at,
            offset,
            end: self.offset,
        }))
    }
}

/// Where the last lines begin: the record's offset and the place in its data.
struct LineStarts {
    wanted: usize,
    starts: VecDeque<(u64, usize)>,
    at_start: bool,
}

impl LineStarts {
    fn new(wanted: u32) -> Self {
        Self {
            wanted: wanted as usize,
            starts: VecDeque::new(),
            at_start: true,
        }
    }

    fn pass(&mut self, header: Header, data: &[u8]) {
        if header.kind == LogKind::Dropped {
            self.push(header.offset, 0);
            self.at_start = true;
            return;
        }
        let mut place = 0;
        while place < data.len() {
            if self.at_start {
                self.push(header.offset, place);
            }
            match data[place..].iter().position(|byte| *byte == b'\n') {
                Some(end) => {
                    place += end + 1;
                    self.at_start = true;
                }
                None => {
                    place = data.len();
                    self.at_start = false;
                }
            }
        }
    }

    fn push(&mut self, offset: u64, place: usize) {
        self.starts.push_back((offset, place));
        if self.starts.len() > self.wanted {
            self.starts.pop_front();
        }
    }

    fn first(self) -> Option<(u64, usize)> {
        self.starts.front().copied()
    }
}
