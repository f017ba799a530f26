//! The ranks' output on its way to disk: records as in `trainyard_common::logrecord`, one file per rank. Knows nothing
//! of pipes and processes.
//!
//! Training must never wait for a disk. So a thread of its own writes, from a queue of bounded size, and what does not
//! fit into the queue, into the limit or onto the disk is counted; a marker in the log tells how much is missing.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use trainyard_common::limits::MAX_LOG_RECORD;
use trainyard_common::logrecord::{HEADER_BYTES, LogKind, LogRecord, dropped_data};
use trainyard_common::time::Timestamp;
use trainyard_common::units::format_bytes;

/// Pieces in the queue. Most are a whole pipe full; of tiny ones this is more than a rank writes in a disk's pause.
const QUEUE_PIECES: usize = 8192;
/// Bytes in the queue: a second of the fastest output that was ever asked of it.
const QUEUE_BYTES: usize = 32 << 20;
/// Records are gathered up to this size while more of them wait, to save system calls.
const BATCH_BYTES: usize = 256 << 10;
/// How long a disk that failed is left alone.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Where a log lies, with failures to be had in tests.
pub(crate) trait LogFile: Send + 'static {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()>;
    fn truncate(&mut self, length: u64) -> io::Result<()>;
}

impl LogFile for File {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }
}

/// Logs that are named in a warning; the rest are counted.
const NAMED: usize = 8;

/// Output that is not in a log, and of which the log says nothing either.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unmarked {
    pub(super) bytes: u64,
    pub(super) cause: String,
}

/// What is to be said of the output of some ranks; empty if nothing is. Its length is bounded.
pub(super) fn warning(unmarked: &[(u32, Unmarked)]) -> String {
    let named = unmarked.iter().take(NAMED).map(|(rank, unmarked)| {
        let Unmarked { bytes, cause } = unmarked;
        format!("{bytes} bytes of output of rank {rank} were dropped: {cause}")
    });
    let more = unmarked.len().saturating_sub(NAMED);
    let tail = (more > 0).then(|| format!("output of {more} more ranks was dropped"));
    named.chain(tail).collect::<Vec<_>>().join("; ")
}

/// One rank's log: whole records only, whatever the disk does.
#[derive(Debug)]
pub(super) struct RankLog<F> {
    file: F,
    limit: u64,
    /// Bytes of whole records on disk.
    offset: u64,
    /// Records that wait to be written, and the bytes of output in them (with what their markers stand for).
    batch: Vec<u8>,
    batch_output: u64,
    /// Bytes that were not kept since the last marker, and why.
    dropped: u64,
    cause: String,
    /// Once the limit is reached nothing more is kept, not even what would still fit.
    full: bool,
    /// Something may lie behind `offset`.
    torn: bool,
    retry_at: Timestamp,
}

impl<F: LogFile> RankLog<F> {
    pub(super) fn new(file: F, limit: u64) -> Self {
        Self {
            file,
            limit,
            offset: 0,
            batch: Vec::new(),
            batch_output: 0,
            dropped: 0,
            cause: String::new(),
            full: false,
            torn: false,
            retry_at: Timestamp(0),
        }
    }

    pub(super) fn append(&mut self, kind: LogKind, at: Timestamp, data: &[u8]) {
        for data in data.chunks(MAX_LOG_RECORD) {
            let size = (HEADER_BYTES + data.len()) as u64;
            if !self.full && self.offset + self.batch.len() as u64 + size > self.limit {
                self.full = true;
                let limit = format_bytes(self.limit);
                self.lose(data.len() as u64, &format!("log limit of {limit} reached"));
            } else if self.full || at < self.retry_at {
                self.dropped += data.len() as u64;
            } else {
                self.mark(at);
                LogRecord { kind, at, data }.encode(&mut self.batch);
                self.batch_output += data.len() as u64;
                if self.batch.len() >= BATCH_BYTES {
                    self.flush(at);
                }
            }
        }
    }

    /// Bytes that wait to be written.
    pub(super) fn waiting(&self) -> usize {
        self.batch.len()
    }

    /// Bytes of whole records on disk.
    pub(super) fn written(&self) -> u64 {
        self.offset
    }

    /// Counts output that is not kept.
    fn lose(&mut self, bytes: u64, cause: &str) {
        self.dropped += bytes;
        cause.clone_into(&mut self.cause);
    }

    /// Counts output that came faster than it could be written.
    pub(super) fn overflow(&mut self, bytes: u64) {
        if self.full {
            self.dropped += bytes;
        } else {
            self.lose(bytes, "log disk too slow");
        }
    }

    /// Puts a marker for what was dropped before the next record.
    fn mark(&mut self, at: Timestamp) {
        if self.dropped == 0 {
            return;
        }
        let data = dropped_data(self.dropped, &self.cause);
        let kind = LogKind::Dropped;
        LogRecord {
            kind,
            at,
            data: &data,
        }
        .encode(&mut self.batch);
        self.batch_output += std::mem::take(&mut self.dropped);
    }

    pub(super) fn flush(&mut self, at: Timestamp) {
        if self.batch.is_empty() {
            return;
        }
        match self.write() {
            Ok(()) => self.offset += self.batch.len() as u64,
            Err(error) => {
                self.torn = true;
                let bytes = self.batch_output;
                self.lose(bytes, describe(&error));
                self.retry_at = at.after(RETRY_AFTER);
            }
        }
        self.batch.clear();
        self.batch_output = 0;
    }

    fn write(&mut self) -> io::Result<()> {
        if self.torn {
            self.file.truncate(self.offset)?;
            self.torn = false;
        }
        self.file.write_at(&self.batch, self.offset)
    }

    /// Writes what can be written, and the last marker.
    pub(super) fn finish(&mut self, at: Timestamp) {
        self.flush(at);
        self.mark(at);
        self.flush(at);
        if self.torn && self.file.truncate(self.offset).is_ok() {
            self.torn = false;
        }
    }

    /// What [`Self::finish`] found no place for a marker for: a disk may be full until all is over.
    pub(super) fn unmarked(&self) -> Option<Unmarked> {
        (self.dropped > 0).then(|| Unmarked {
            bytes: self.dropped,
            cause: self.cause.clone(),
        })
    }
}

fn describe(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "log disk full",
        _ => "log disk failed",
    }
}

struct Piece {
    log: usize,
    kind: LogKind,
    at: Timestamp,
    data: Vec<u8>,
}

/// The way to the thread that writes.
#[derive(Debug)]
pub(crate) struct Output {
    /// Bounded by what is counted in `shared`. A queue of fixed length would take its half MiB from the beginning.
    queue: Sender<Piece>,
    shared: Arc<Shared>,
    thread: JoinHandle<Vec<Option<Unmarked>>>,
}

#[derive(Debug)]
struct Shared {
    queued_bytes: AtomicUsize,
    queued_pieces: AtomicUsize,
    /// Bytes per log that did not fit into the queue and have no marker yet.
    overflow: Vec<AtomicU64>,
}

impl Shared {
    /// A piece of so many bytes is not in the queue any more.
    fn taken(&self, bytes: usize) {
        self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.queued_pieces.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Output {
    /// Makes the files and starts the thread.
    ///
    /// # Errors
    /// A file cannot be made.
    pub(crate) fn start(paths: &[PathBuf], limit: u64) -> io::Result<Self> {
        let files = paths
            .iter()
            .map(|path| {
                File::options()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(path)
            })
            .collect::<io::Result<Vec<_>>>()?;
        Self::start_with(files, limit)
    }

    fn start_with<F: LogFile>(files: Vec<F>, limit: u64) -> io::Result<Self> {
        let (queue, pieces) = channel();
        let shared = Arc::new(Shared {
            queued_bytes: AtomicUsize::new(0),
            queued_pieces: AtomicUsize::new(0),
            overflow: files.iter().map(|_| AtomicU64::new(0)).collect(),
        });
        let logs = files
            .into_iter()
            .map(|file| RankLog::new(file, limit))
            .collect();
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("output".to_owned())
            .spawn(move || write_all(logs, &pieces, &theirs))?;
        Ok(Self {
            queue,
            shared,
            thread,
        })
    }

    /// Hands over output of the log with this place in the list. Never waits.
    pub(crate) fn write(&self, log: usize, kind: LogKind, at: Timestamp, data: &[u8]) {
        // One thread adds, so what is seen here can only become less.
        let (bytes, pieces) = (&self.shared.queued_bytes, &self.shared.queued_pieces);
        let fits = bytes.load(Ordering::Relaxed) + data.len() <= QUEUE_BYTES
            && pieces.load(Ordering::Relaxed) < QUEUE_PIECES;
        if fits {
            bytes.fetch_add(data.len(), Ordering::Relaxed);
            pieces.fetch_add(1, Ordering::Relaxed);
            let piece = Piece {
                log,
                kind,
                at,
                data: data.to_vec(),
            };
            if self.queue.send(piece).is_ok() {
                return;
            }
            self.shared.taken(data.len());
        }
        if let Some(overflow) = self.shared.overflow.get(log) {
            overflow.fetch_add(data.len() as u64, Ordering::Relaxed);
        }
    }

    /// Waits until everything is written, as far as the disk takes it. For each log, what is neither in it nor marked.
    pub(super) fn finish(self) -> Vec<Option<Unmarked>> {
        drop(self.queue);
        // A panic there is our own bug and has been printed; the exit status is worth more than the last lines.
        self.thread.join().unwrap_or_default()
    }
}

/// What of each log is unmarked at the end.
fn write_all<F: LogFile>(
    mut logs: Vec<RankLog<F>>,
    pieces: &Receiver<Piece>,
    shared: &Shared,
) -> Vec<Option<Unmarked>> {
    let mut last = Timestamp(0);
    while let Ok(first) = pieces.recv() {
        let mut next = Some(first);
        while let Some(piece) = next {
            last = piece.at;
            shared.taken(piece.data.len());
            take_overflow(&mut logs, shared, piece.log);
            if let Some(log) = logs.get_mut(piece.log) {
                log.append(piece.kind, piece.at, &piece.data);
            }
            next = pieces.try_recv().ok();
        }
        for log in &mut logs {
            log.flush(last);
        }
    }
    for index in 0..logs.len() {
        take_overflow(&mut logs, shared, index);
        logs[index].finish(last);
    }
    logs.iter().map(RankLog::unmarked).collect()
}

fn take_overflow<F: LogFile>(logs: &mut [RankLog<F>], shared: &Shared, index: usize) {
    if let (Some(log), Some(overflow)) = (logs.get_mut(index), shared.overflow.get(index)) {
        let bytes = overflow.swap(0, Ordering::Relaxed);
        if bytes > 0 {
            log.overflow(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A disk in memory that holds so many bytes, and writes half of what does not fit.
    #[derive(Debug, Clone, Default)]
    struct Disk(Arc<Mutex<(Vec<u8>, usize)>>);

    impl Disk {
        fn of(space: usize) -> Self {
            Self(Arc::new(Mutex::new((Vec::new(), space))))
        }

        fn resize(&self, space: usize) {
            self.0.lock().unwrap().1 = space;
        }

        /// Kinds and data of all records; output is joined.
        fn read(&self) -> Vec<(LogKind, Vec<u8>)> {
            let bytes = self.0.lock().unwrap().0.clone();
            let mut records: Vec<(LogKind, Vec<u8>)> = Vec::new();
            let mut at = 0;
            while at < bytes.len() {
                let (record, length) = LogRecord::decode(&bytes[at..])
                    .unwrap()
                    .expect("a whole record");
                records.push((record.kind, record.data.to_vec()));
                at += length;
            }
            records
        }
    }

    impl LogFile for Disk {
        fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
            let mut disk = self.0.lock().unwrap();
            let offset = usize::try_from(offset).unwrap();
            let room = disk.1.saturating_sub(offset);
            let taken = if bytes.len() <= room {
                bytes.len()
            } else {
                room / 2
            };
            disk.0.truncate(offset);
            disk.0.extend_from_slice(&bytes[..taken]);
            if taken < bytes.len() {
                return Err(io::ErrorKind::StorageFull.into());
            }
            Ok(())
        }

        fn truncate(&mut self, length: u64) -> io::Result<()> {
            let mut disk = self.0.lock().unwrap();
            disk.0.truncate(usize::try_from(length).unwrap());
            Ok(())
        }
    }

    fn marker(bytes: u64, cause: &str) -> (LogKind, Vec<u8>) {
        (LogKind::Dropped, dropped_data(bytes, cause))
    }

    #[test]
    fn a_full_disk_is_counted_and_told_when_there_is_space_again() {
        let disk = Disk::of(100);
        let mut log = RankLog::new(disk.clone(), 1 << 20);
        let mut say = |at: u64, text: &[u8]| {
            log.append(LogKind::Stdout, Timestamp(at), text);
            log.flush(Timestamp(at));
        };
        say(1, b"first");
        say(2, &[b'x'; 90]);
        // Too early to try again, though there is space.
        disk.resize(10_000);
        say(900, b"lost");
        say(1500, b"kept");
        log.finish(Timestamp(1501));
        assert_eq!(log.unmarked(), None, "the marker tells");
        assert_eq!(
            disk.read(),
            [
                (LogKind::Stdout, b"first".to_vec()),
                marker(94, "log disk full"),
                (LogKind::Stdout, b"kept".to_vec()),
            ]
        );
    }

    #[test]
    fn a_disk_that_stays_full_leaves_whole_records() {
        let disk = Disk::of(50);
        let mut log = RankLog::new(disk.clone(), 1 << 20);
        for at in 0..100 {
            log.append(LogKind::Stderr, Timestamp(at * 600), b"a line of output\n");
            log.flush(Timestamp(at * 600));
        }
        log.finish(Timestamp(100_000));
        let unmarked = log.unmarked().unwrap();
        assert_eq!(unmarked.bytes, 99 * 17);
        assert_eq!(unmarked.cause, "log disk full");
        assert_eq!(
            disk.read(),
            [(LogKind::Stderr, b"a line of output\n".to_vec())]
        );
    }

    #[test]
    fn what_has_no_marker_is_told_at_the_end() {
        let full = || Disk::of(0);
        let output = Output::start_with(vec![full(), Disk::of(1 << 20), full()], 1 << 20).unwrap();
        for log in 0..3 {
            output.write(log, LogKind::Stdout, Timestamp(1), &[b'x'; 7]);
        }
        let unmarked = Unmarked {
            bytes: 7,
            cause: "log disk full".to_owned(),
        };
        assert_eq!(
            output.finish(),
            [Some(unmarked.clone()), None, Some(unmarked)]
        );
    }

    #[test]
    fn a_warning_names_some_and_counts_the_rest() {
        let unmarked = |rank| {
            let cause = "log disk full".to_owned();
            (rank, Unmarked { bytes: 9, cause })
        };
        let of = |ranks| warning(&(0..ranks).map(unmarked).collect::<Vec<_>>());
        assert_eq!(of(0), "");
        assert_eq!(
            of(1),
            "9 bytes of output of rank 0 were dropped: log disk full"
        );
        let text = of(1000);
        assert!(text.len() < 1000, "{text}");
        assert!(
            text.ends_with("; output of 992 more ranks was dropped"),
            "{text}"
        );
    }

    #[test]
    fn the_limit_is_kept_and_has_one_marker() {
        let disk = Disk::of(1 << 20);
        let mut log = RankLog::new(disk.clone(), 200);
        for at in 0..50 {
            log.append(LogKind::Stdout, Timestamp(at), &[b'x'; 50]);
        }
        // Would still fit, but a log with a hole at its end and then more would mislead.
        log.append(LogKind::Stdout, Timestamp(60), b"y");
        log.finish(Timestamp(61));
        let records = disk.read();
        assert_eq!(records.len(), 4);
        assert_eq!(
            records[3],
            marker(47 * 50 + 1, "log limit of 200 B reached")
        );
    }

    #[test]
    fn long_output_is_cut_into_records() {
        let disk = Disk::of(1 << 20);
        let mut log = RankLog::new(disk.clone(), 1 << 20);
        log.append(LogKind::Stdout, Timestamp(0), &vec![0; MAX_LOG_RECORD + 1]);
        log.finish(Timestamp(0));
        let sizes: Vec<usize> = disk.read().iter().map(|(_, data)| data.len()).collect();
        assert_eq!(sizes, [MAX_LOG_RECORD, 1]);
    }

    /// Blocks in every write until it is let go.
    struct Stuck(Disk, Arc<Mutex<()>>);

    impl LogFile for Stuck {
        fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
            let _gate = self.1.lock().unwrap();
            self.0.write_at(bytes, offset)
        }

        fn truncate(&mut self, length: u64) -> io::Result<()> {
            self.0.truncate(length)
        }
    }

    #[test]
    fn a_stuck_disk_blocks_nobody_and_memory_is_bounded() {
        let disk = Disk::of(1 << 30);
        let gate = Arc::new(Mutex::new(()));
        let closed = gate.lock().unwrap();
        let output =
            Output::start_with(vec![Stuck(disk.clone(), Arc::clone(&gate))], 1 << 30).unwrap();
        let piece = vec![b'x'; 64 << 10];
        let pieces = 4 * QUEUE_BYTES / piece.len();
        for at in 0..pieces {
            output.write(0, LogKind::Stdout, Timestamp(at as u64), &piece);
            assert!(output.shared.queued_bytes.load(Ordering::Relaxed) <= QUEUE_BYTES);
        }
        drop(closed);
        assert_eq!(output.finish(), [None]);
        let records = disk.read();
        let kept: u64 = records
            .iter()
            .filter(|(kind, _)| *kind == LogKind::Stdout)
            .map(|(_, data)| data.len() as u64)
            .sum();
        let told: u64 = records
            .iter()
            .filter(|(kind, _)| *kind == LogKind::Dropped)
            .map(|(_, data)| u64::from_le_bytes(*data.first_chunk::<8>().unwrap()))
            .sum();
        assert!(told > 0);
        assert_eq!(kept + told, (pieces * piece.len()) as u64);
    }
}
