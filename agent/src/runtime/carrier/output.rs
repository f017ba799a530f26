//! The output of tasks on its way to disk: records as in `trainyard_common::logrecord`, one file per task that writes
//! anything. Knows nothing of pipes and processes.
//!
//! Most tasks write little and end soon. Their output stays in memory, and is written when they are over, by whoever
//! waited for them. What is more, or older, goes to a thread of its own, so that no task ever waits for a disk: what
//! does not fit into the queue is counted, and a marker in the log tells how much is missing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use trainyard_common::logrecord::LogKind;
use trainyard_common::time::Timestamp;

use super::super::output::{LogFile, RankLog, Unmarked};

/// Pieces in the queue of all tasks together.
const QUEUE_PIECES: usize = 4096;
/// Bytes in it: a second of the fastest output that a machine's tasks may have together.
const QUEUE_BYTES: usize = 32 << 20;
/// What one task may have in memory without being handed over.
const OWN_BYTES: usize = 64 << 10;
/// How old output may get in memory: what a person who follows a log hardly notices.
const OWN_AGE: Duration = Duration::from_millis(200);

/// A file that is made when something is written into it.
#[derive(Debug)]
struct LazyFile {
    path: PathBuf,
    file: Option<File>,
}

impl LazyFile {
    fn file(&mut self) -> io::Result<&mut File> {
        match &mut self.file {
            Some(file) => Ok(file),
            none => {
                let file = File::options()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&self.path)?;
                Ok(none.insert(file))
            }
        }
    }
}

impl LogFile for LazyFile {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file()?.write_at(bytes, offset)
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        match &mut self.file {
            Some(file) => file.truncate(length),
            None => Ok(()),
        }
    }
}

/// The log of one task.
#[derive(Debug)]
pub(super) struct TaskLog {
    path: PathBuf,
    limit: u64,
    place: Place,
    /// When the oldest of what is in memory came.
    since: Option<Timestamp>,
    /// Bytes that did not fit into the queue and have no marker yet.
    lost: u64,
}

#[derive(Debug)]
enum Place {
    Nothing,
    Memory(Box<RankLog<LazyFile>>),
    /// With the thread that writes, by this number.
    Thread(u64),
}

impl TaskLog {
    /// Nothing is made before something is written.
    pub(super) fn new(path: PathBuf, limit: u64) -> Self {
        Self {
            path,
            limit,
            place: Place::Nothing,
            since: None,
            lost: 0,
        }
    }

    /// Takes output. Never waits for a disk.
    pub(super) fn write(&mut self, writer: &Writer, kind: LogKind, at: Timestamp, data: &[u8]) {
        if matches!(self.place, Place::Nothing) {
            let file = LazyFile {
                path: std::mem::take(&mut self.path),
                file: None,
            };
            self.place = Place::Memory(Box::new(RankLog::new(file, self.limit)));
            self.since = Some(at);
        }
        match &mut self.place {
            Place::Nothing => {}
            Place::Memory(log) => {
                log.append(kind, at, data);
                if log.waiting() >= OWN_BYTES {
                    self.hand_over(writer);
                }
            }
            Place::Thread(id) => {
                let piece = Message::Piece {
                    id: *id,
                    kind,
                    at,
                    data: data.to_vec(),
                    lost: self.lost,
                };
                self.lost = match writer.offer(piece, data.len()) {
                    true => 0,
                    false => self.lost + data.len() as u64,
                };
            }
        }
    }

    /// When [`Self::hand_over`] is due, if it is to be done at all.
    pub(super) fn due(&self) -> Option<Timestamp> {
        match self.place {
            Place::Memory(_) => Some(self.since?.after(OWN_AGE)),
            Place::Nothing | Place::Thread(_) => None,
        }
    }

    /// Gives what is in memory to the thread that writes. Stays as it is if its queue is full.
    pub(super) fn hand_over(&mut self, writer: &Writer) {
        let Place::Memory(log) = std::mem::replace(&mut self.place, Place::Nothing) else {
            return;
        };
        self.place = match writer.adopt(log) {
            Ok(id) => Place::Thread(id),
            Err(log) => Place::Memory(log),
        };
    }

    /// Writes what can be written; nothing writes any more.
    pub(super) fn finish(self, writer: &Writer, at: Timestamp) -> Finished {
        match self.place {
            Place::Nothing => Finished::default(),
            Place::Memory(mut log) => Finished::of(&mut log, at),
            Place::Thread(id) => writer.finish(id, at, self.lost),
        }
    }
}

/// A log to which nothing is added any more.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Finished {
    /// Bytes of its file.
    pub(super) length: u64,
    /// What is neither in it nor marked.
    pub(super) unmarked: Option<Unmarked>,
}

impl Finished {
    fn of(log: &mut RankLog<LazyFile>, at: Timestamp) -> Self {
        log.finish(at);
        Self {
            length: log.written(),
            unmarked: log.unmarked(),
        }
    }
}

enum Message {
    Adopt {
        id: u64,
        log: Box<RankLog<LazyFile>>,
    },
    Piece {
        id: u64,
        kind: LogKind,
        at: Timestamp,
        data: Vec<u8>,
        lost: u64,
    },
    Finish {
        id: u64,
        at: Timestamp,
        lost: u64,
        reply: SyncSender<Finished>,
    },
}

/// The way to the thread that writes.
#[derive(Debug, Clone)]
pub(super) struct Writer {
    queue: SyncSender<Message>,
    queued_bytes: Arc<AtomicUsize>,
    next: Arc<std::sync::atomic::AtomicU64>,
}

impl Writer {
    /// Starts the thread.
    pub(super) fn start() -> io::Result<Self> {
        let (queue, messages) = sync_channel(QUEUE_PIECES);
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let theirs = Arc::clone(&queued_bytes);
        std::thread::Builder::new()
            .name("output".to_owned())
            .spawn(move || write_all(&messages, &theirs))?;
        Ok(Self {
            queue,
            queued_bytes,
            next: Arc::default(),
        })
    }

    fn offer(&self, message: Message, bytes: usize) -> bool {
        if self.queued_bytes.load(Ordering::Relaxed) + bytes > QUEUE_BYTES {
            return false;
        }
        self.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        let taken = self.queue.try_send(message).is_ok();
        if !taken {
            self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        taken
    }

    fn adopt(&self, log: Box<RankLog<LazyFile>>) -> Result<u64, Box<RankLog<LazyFile>>> {
        use std::sync::mpsc::TrySendError::{Disconnected, Full};
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        match self.queue.try_send(Message::Adopt { id, log }) {
            Ok(()) => Ok(id),
            Err(Full(Message::Adopt { log, .. }) | Disconnected(Message::Adopt { log, .. })) => {
                Err(log)
            }
            // It was an adoption.
            Err(_) => Ok(id),
        }
    }

    /// Waits until everything of one log is written, as far as the disk takes it.
    fn finish(&self, id: u64, at: Timestamp, lost: u64) -> Finished {
        let (reply, answer) = sync_channel(1);
        let message = Message::Finish {
            id,
            at,
            lost,
            reply,
        };
        // A thread that panicked is our own bug; the exit status is worth more than the output.
        let _ = self.queue.send(message);
        answer.recv().unwrap_or_default()
    }
}

fn write_all(messages: &Receiver<Message>, queued_bytes: &AtomicUsize) {
    let mut logs: BTreeMap<u64, Box<RankLog<LazyFile>>> = BTreeMap::new();
    let mut touched: BTreeMap<u64, Timestamp> = BTreeMap::new();
    while let Ok(first) = messages.recv() {
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                Message::Adopt { id, log } => {
                    logs.insert(id, log);
                    touched.insert(id, Timestamp(0));
                }
                Message::Piece {
                    id,
                    kind,
                    at,
                    data,
                    lost,
                } => {
                    queued_bytes.fetch_sub(data.len(), Ordering::Relaxed);
                    if let Some(log) = logs.get_mut(&id) {
                        lose(log, lost);
                        log.append(kind, at, &data);
                    }
                    touched.insert(id, at);
                }
                Message::Finish {
                    id,
                    at,
                    lost,
                    reply,
                } => {
                    touched.remove(&id);
                    if let Some(mut log) = logs.remove(&id) {
                        lose(&mut log, lost);
                        let _ = reply.send(Finished::of(&mut log, at));
                    }
                }
            }
            next = messages.try_recv().ok();
        }
        for (id, at) in std::mem::take(&mut touched) {
            if let Some(log) = logs.get_mut(&id) {
                log.flush(at);
            }
        }
    }
}

fn lose(log: &mut RankLog<LazyFile>, bytes: u64) {
    if bytes > 0 {
        log.overflow(bytes);
    }
}

#[cfg(test)]
mod tests {
    use trainyard_common::logrecord::LogRecord;

    use super::*;

    fn read(path: &std::path::Path) -> Vec<u8> {
        let bytes = std::fs::read(path).unwrap();
        let mut output = Vec::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (record, length) = LogRecord::decode(rest).unwrap().expect("a whole record");
            output.extend_from_slice(record.data);
            rest = &rest[length..];
        }
        output
    }

    #[test]
    fn little_output_is_written_at_the_end_and_none_makes_no_file() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("0.log");
        let writer = Writer::start().unwrap();
        let log = TaskLog::new(path.clone(), 1 << 20);
        assert_eq!(log.finish(&writer, Timestamp(1)), Finished::default());
        assert!(!path.exists());
        let mut log = TaskLog::new(path.clone(), 1 << 20);
        log.write(&writer, LogKind::Stdout, Timestamp(1), b"hello\n");
        assert_eq!(log.due(), Some(Timestamp(201)));
        assert!(!path.exists());
        let length = log.finish(&writer, Timestamp(2)).length;
        assert_eq!(length, std::fs::metadata(&path).unwrap().len());
        assert_eq!(read(&path), b"hello\n");
    }

    #[test]
    fn much_output_goes_through_the_thread_whole() {
        let temp = tempfile::tempdir().unwrap();
        let writer = Writer::start().unwrap();
        let mut expected = Vec::new();
        let path = temp.path().join("1.log");
        let mut log = TaskLog::new(path.clone(), 1 << 30);
        for number in 0..40_u8 {
            let piece = vec![number; 10_000];
            log.write(&writer, LogKind::Stderr, Timestamp(number.into()), &piece);
            expected.extend(piece);
        }
        assert!(matches!(log.place, Place::Thread(_)));
        assert_eq!(log.due(), None);
        let length = log.finish(&writer, Timestamp(50)).length;
        assert_eq!(length, std::fs::metadata(&path).unwrap().len());
        assert_eq!(read(&path), expected);
    }

    #[test]
    fn what_has_no_marker_is_told_at_the_end() {
        let temp = tempfile::tempdir().unwrap();
        let writer = Writer::start().unwrap();
        // The file can never be made.
        let path = temp.path().join("missing/3.log");
        for thread in [false, true] {
            let mut log = TaskLog::new(path.clone(), 1 << 20);
            log.write(&writer, LogKind::Stdout, Timestamp(1), b"lost");
            if thread {
                log.hand_over(&writer);
                log.write(&writer, LogKind::Stdout, Timestamp(2), b" all");
            }
            let finished = log.finish(&writer, Timestamp(3));
            assert_eq!(finished.length, 0);
            let unmarked = finished.unmarked.expect("bytes without a marker");
            assert_eq!(unmarked.bytes, if thread { 8 } else { 4 });
            assert_eq!(unmarked.cause, "log disk failed");
        }
    }

    #[test]
    fn old_output_can_be_read_while_the_task_runs() {
        let temp = tempfile::tempdir().unwrap();
        let writer = Writer::start().unwrap();
        let path = temp.path().join("2.log");
        let mut log = TaskLog::new(path.clone(), 1 << 20);
        log.write(&writer, LogKind::Stdout, Timestamp(1), b"early");
        log.hand_over(&writer);
        let start = std::time::Instant::now();
        while !path.exists() || read(&path) != b"early" {
            assert!(start.elapsed() < Duration::from_secs(60));
            std::thread::yield_now();
        }
        log.write(&writer, LogKind::Stdout, Timestamp(2), b" late");
        log.finish(&writer, Timestamp(3));
        assert_eq!(read(&path), b"early late");
    }
}
