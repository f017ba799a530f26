//! What happened to the tasks of a bundle, in order: an append-only file of lines, each with a checksum, each written in
//! one step. Knows nothing of processes.
//!
//! The end of a process loses nothing of it, so it is never synced: after a power loss its end may be missing, and then
//! the agent says of every task without an end that it is not known. Lines at the end that are not whole are cut off. A
//! line that is not whole and has whole ones behind it is damage: it is passed over, and whatever it may have told is
//! unknown. The format's version is that of `bundle.json` beside it.
//!
//! What the coordinator is told is exactly the `started`, `ended` and `returned` records in their order; the number of a
//! report is its place among them.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::libc;
use serde::{Deserialize, Serialize};
use trainyard_common::bundle::{TaskRange, TaskSet};
use trainyard_common::ids::TaskIndex;
use trainyard_common::member::EndCause;
use trainyard_common::state::ExitStatus;
use trainyard_common::time::Timestamp;

/// Bytes before a record's text: the checksum in hexadecimal digits, and a space.
const PREFIX: usize = 9;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Record {
    /// The coordinator handed these out.
    Handed(TaskRange),
    /// This one may have been started from now on.
    Began(TaskIndex),
    /// It runs for a while now.
    Started { task: TaskIndex, at: Timestamp },
    /// Nothing of it is left.
    Ended(Box<TaskEnd>),
    /// These were not started and never will be.
    Returned(TaskRange),
    /// Reports with a lower number are on the coordinator's record, though the machine's end took them from here.
    Skipped { to: u64 },
    /// Nothing of the bundle is left. What went wrong with the bundle itself, if anything.
    Over { message: String },
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TaskEnd {
    pub(crate) task: TaskIndex,
    /// Absent if it never was, or nobody knows.
    pub(crate) started_at: Option<Timestamp>,
    /// Whether it was ever started.
    pub(crate) started: bool,
    /// Absent if it was not tried.
    pub(crate) exit: Option<ExitStatus>,
    /// Whether it ended by itself.
    pub(crate) unprompted: bool,
    /// When its process ended, and when the last of what it started was gone.
    pub(crate) exited_at: Timestamp,
    pub(crate) ended_at: Timestamp,
    pub(crate) cause: EndCause,
    pub(crate) message: String,
    /// Bytes in its log; no file if there are none.
    pub(crate) log: u64,
    /// Whether it left something for upload.
    pub(crate) outputs: bool,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) warning: String,
}

impl Record {
    /// Whether the coordinator is told of it.
    pub(crate) fn is_report(&self) -> bool {
        match self {
            Self::Started { .. } | Self::Ended(_) | Self::Returned(_) => true,
            Self::Handed(_) | Self::Began(_) | Self::Skipped { .. } | Self::Over { .. } => false,
        }
    }

    fn encode(&self, into: &mut Vec<u8>) -> io::Result<()> {
        let start = into.len();
        into.extend_from_slice(&[b' '; PREFIX]);
        serde_json::to_writer(&mut *into, self)?;
        let crc = crc32fast::hash(&into[start + PREFIX..]);
        write!(&mut into[start..], "{crc:08x}")?;
        into.push(b'\n');
        Ok(())
    }
}

/// Bytes of a journal that are no records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gap {
    /// Where they begin.
    pub(crate) offset: u64,
    /// How many there are.
    pub(crate) bytes: u64,
}

impl Gap {
    /// What is said of whatever such bytes may have told.
    pub(crate) fn explain(self, journal: &Path) -> String {
        format!(
            "record unreadable: {}: byte {}",
            journal.display(),
            self.offset
        )
    }
}

/// What lies in a journal, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Item {
    Record(Record),
    Gap(Gap),
}

/// What whole lines there are in `bytes`, which lie at `offset`; and how long those are. Lines that are no records and
/// lie side by side are one gap.
pub(crate) fn items(bytes: &[u8], offset: u64) -> (Vec<Item>, usize) {
    let mut items = Vec::new();
    let mut taken = 0;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        if !line.ends_with(b"\n") {
            break;
        }
        let length = line.len() as u64;
        match (parse_line(line), items.last_mut()) {
            (Some(record), _) => items.push(Item::Record(record)),
            (None, Some(Item::Gap(gap))) => gap.bytes += length,
            (None, _) => items.push(Item::Gap(Gap {
                offset: offset + taken as u64,
                bytes: length,
            })),
        }
        taken += line.len();
    }
    (items, taken)
}

/// The whole records at the start of `bytes`, and how long they are. What follows is not a record, or not whole.
#[cfg(test)]
pub(crate) fn parse(bytes: &[u8]) -> (Vec<Record>, usize) {
    let mut records = Vec::new();
    let mut taken = 0;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let Some(record) = parse_line(line) else {
            break;
        };
        records.push(record);
        taken += line.len();
    }
    (records, taken)
}

fn parse_line(line: &[u8]) -> Option<Record> {
    let (crc, text) = line.strip_suffix(b"\n")?.split_at_checked(PREFIX)?;
    let crc = std::str::from_utf8(crc.strip_suffix(b" ")?).ok()?;
    let crc = u32::from_str_radix(crc, 16).ok()?;
    (crc == crc32fast::hash(text)).then_some(())?;
    serde_json::from_slice(text).ok()
}

/// At most `most` bytes of a journal from `offset` on.
pub(crate) fn read_from(path: &Path, offset: u64, most: usize) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.take(most as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The end of the file that is written to.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    /// Bytes of whole records.
    length: u64,
    /// Something may lie behind `length`.
    torn: bool,
    scratch: Vec<u8>,
}

impl Journal {
    /// Opens it, and tells what is in it. What is behind its last whole record is given up, and told.
    pub(super) fn open(path: &Path) -> io::Result<(Self, Account)> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let (mut items, taken) = items(&bytes, 0);
        let mut length = taken as u64;
        if let Some(Item::Gap(gap)) = items.last() {
            length = gap.offset;
            items.pop();
        }
        let left = bytes.len() as u64 - length;
        let journal = Self {
            file,
            length,
            torn: left > 0,
            scratch: Vec::new(),
        };
        let mut account = Account {
            torn: (left > 0).then_some(Gap {
                offset: length,
                bytes: left,
            }),
            ..Account::default()
        };
        for item in &items {
            match item {
                Item::Record(record) => account.take(record),
                Item::Gap(gap) => account.damage = account.damage.or(Some(*gap)),
            }
        }
        Ok((journal, account))
    }

    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Appends all of them or, if the disk refuses, none.
    pub(super) fn append(&mut self, records: &[Record]) -> io::Result<()> {
        if std::mem::take(&mut self.torn)
            && let Err(error) = self.file.set_len(self.length)
        {
            self.torn = true;
            return Err(error);
        }
        self.scratch.clear();
        for record in records {
            record.encode(&mut self.scratch)?;
        }
        if let Err(error) = self.file.write_all_at(&self.scratch, self.length) {
            self.torn = true;
            return Err(error);
        }
        self.length += self.scratch.len() as u64;
        Ok(())
    }

    /// Waits until it is on disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Appends records to a journal.
#[cfg(test)]
pub(crate) fn write_journal(path: &Path, records: &[Record]) -> io::Result<()> {
    Journal::open(path)?.0.append(records)
}

/// What the records so far come to.
#[derive(Debug, Default)]
pub(super) struct Account {
    /// Every task that was ever handed out.
    pub(super) handed: TaskSet,
    /// Those that neither ended nor were given back.
    pub(super) open: TaskSet,
    /// Those of them that may have been started.
    pub(super) begun: BTreeSet<TaskIndex>,
    /// The number of the next report.
    pub(super) reports: u64,
    pub(super) over: bool,
    /// The first bytes that are no records and have records behind them: anything may be missing.
    pub(super) damage: Option<Gap>,
    /// The bytes at the end that are no records: the last of what happened may be missing.
    pub(super) torn: Option<Gap>,
}

impl Account {
    pub(super) fn take(&mut self, record: &Record) {
        match record {
            Record::Handed(range) => {
                self.handed.insert(*range);
                self.open.insert(*range);
            }
            Record::Began(task) => drop(self.begun.insert(*task)),
            Record::Started { .. } => {}
            Record::Ended(end) => {
                // That it was handed out may be what is missing.
                self.handed.insert(TaskRange {
                    first: end.task,
                    last: end.task,
                });
                self.open.remove(end.task);
                self.begun.remove(&end.task);
            }
            Record::Returned(range) => {
                self.handed.insert(*range);
                for task in range.tasks() {
                    self.open.remove(task);
                }
            }
            Record::Skipped { to } => self.reports = self.reports.max(*to),
            Record::Over { .. } => self.over = true,
        }
        self.reports += u64::from(record.is_report());
    }

    /// Whether it is known how the task ended, or that it did not begin.
    pub(super) fn is_settled(&self, task: TaskIndex) -> bool {
        self.handed.contains(task) && !self.open.contains(task)
    }
}

/// Those of `wanted` that are not in `known`.
pub(crate) fn missing(wanted: &TaskSet, known: &TaskSet) -> Vec<TaskRange> {
    let known = known.ranges();
    let mut found = Vec::new();
    for range in wanted.ranges() {
        let mut at = known.partition_point(|known| known.last < range.first);
        let mut first = range.first;
        while first <= range.last {
            match known.get(at) {
                Some(next) if next.first <= first => {
                    if next.last >= range.last {
                        break;
                    }
                    first = next.last.next();
                    at += 1;
                }
                Some(next) if next.first <= range.last => {
                    let last = TaskIndex(next.first.0 - 1);
                    found.push(TaskRange { first, last });
                    first = next.first;
                }
                Some(_) | None => {
                    let last = range.last;
                    found.push(TaskRange { first, last });
                    break;
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u32, last: u32) -> TaskRange {
        TaskRange {
            first: TaskIndex(first),
            last: TaskIndex(last),
        }
    }

    fn end(task: u32) -> Record {
        Record::Ended(Box::new(TaskEnd {
            task: TaskIndex(task),
            started_at: Some(Timestamp(3)),
            started: true,
            exit: Some(ExitStatus::Code(0)),
            unprompted: true,
            exited_at: Timestamp(4),
            ended_at: Timestamp(5),
            cause: EndCause::Completed,
            message: "one\nline".to_owned(),
            log: 7,
            outputs: false,
            warning: String::new(),
        }))
    }

    #[test]
    fn what_is_torn_is_given_up_and_written_over() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("journal");
        File::create(&path).unwrap();
        let records = [
            Record::Handed(range(0, 9)),
            Record::Began(TaskIndex(0)),
            end(0),
            Record::Returned(range(2, 9)),
        ];
        let (mut journal, _) = Journal::open(&path).unwrap();
        journal.append(&records).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(parse(&bytes), (records.to_vec(), bytes.len()));
        assert_eq!(journal.length(), bytes.len() as u64);
        for cut in 0..bytes.len() {
            let (some, taken) = parse(&bytes[..cut]);
            assert!(taken <= cut && records.starts_with(&some));
            assert!(some.len() < records.len());
        }
        let mut damaged = bytes.clone();
        let at = bytes.len() - 5;
        damaged[at] ^= 1;
        assert_eq!(parse(&damaged).0, records[..3]);

        std::fs::write(&path, &bytes[..at]).unwrap();
        let (mut journal, account) = Journal::open(&path).unwrap();
        assert_eq!(account.open.ranges(), [range(1, 9)]);
        assert_eq!((account.reports, account.over), (1, false));
        journal.append(&[end(1)]).unwrap();
        let expected = [&records[..3], &[end(1)]].concat();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(parse(&bytes), (expected, bytes.len()));
    }

    #[test]
    fn numbers_go_on_behind_what_is_skipped() {
        let mut account = Account::default();
        for record in [
            Record::Handed(range(0, 5)),
            Record::Began(TaskIndex(3)),
            Record::Started {
                task: TaskIndex(3),
                at: Timestamp(1),
            },
            Record::Skipped { to: 7 },
            end(3),
        ] {
            account.take(&record);
        }
        assert_eq!(account.reports, 8);
        assert!(account.begun.is_empty());
        assert_eq!(account.open.ranges(), [range(0, 2), range(4, 5)]);
        account.take(&Record::Skipped { to: 2 });
        assert_eq!(account.reports, 8);
    }

    #[test]
    fn what_is_missing_agrees_with_a_plain_set() {
        let mut seed = 7_u64;
        let mut draw = |most: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            u32::try_from((seed >> 33) % most).unwrap()
        };
        for _ in 0..2000 {
            let [wanted, known] = [(); 2].map(|()| {
                let ranges = (0..draw(5)).map(|_| {
                    let first = draw(40);
                    range(first, first + draw(10))
                });
                ranges.collect::<Vec<_>>().into_iter().collect::<TaskSet>()
            });
            let found = missing(&wanted, &known);
            let tasks = found.iter().flat_map(|range| range.tasks());
            let expected = wanted.tasks().filter(|task| !known.contains(*task));
            assert!(tasks.eq(expected), "{wanted:?} {known:?} {found:?}");
        }
        let all = TaskSet::from_iter([range(0, u32::MAX)]);
        assert_eq!(missing(&all, &TaskSet::default()), [range(0, u32::MAX)]);
        assert!(missing(&all, &all).is_empty());
    }
}
