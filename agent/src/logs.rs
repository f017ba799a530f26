//! Brings the output of ranks to the coordinator while it is written: one stream for all ranks of this node, from the
//! offset that the coordinator has stored.
//!
//! The record files are written by shims and only read here. What was sent and not acknowledged is bounded per rank; a
//! coordinator that is away or slow only makes the files wait, never a rank.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use trainyard_common::error::ErrorCode;
use trainyard_common::ids::AttemptRef;
use trainyard_common::limits::{CHUNK_BYTES, MAX_MESSAGE};
use trainyard_common::logrecord::{LogKind, LogRecord, dropped_data};
use trainyard_proto::convert::InvalidField;
use trainyard_proto::status::from_status;
use trainyard_proto::v1;
use trainyard_proto::v1::agent_service_client::AgentServiceClient;
use trainyard_transport::client::ConnectError;

use crate::backoff::Backoff;
use crate::chain::chain;
use crate::growth::Growth;
use crate::link::Link;
use crate::runtime::AttemptDir;
use trainyard_transport::clock::wall_now;
use trainyard_transport::task::blocking;

/// How often record files are looked at that the kernel does not tell of: what a person who follows a log hardly notices.
const POLL: Duration = Duration::from_millis(150);
/// The same for all others, as the kernel may forget to tell (a queue that ran over, a file system of the strange kind).
const SLOW_POLL: Duration = Duration::from_secs(10);
/// Least time between two looks because files grew: ranks that write all the time are heard often enough by this.
const LOOK_GAP: Duration = Duration::from_millis(20);
/// Bytes of one rank that are on their way. A second's worth on a slow line (10 Mbit/s).
const WINDOW: u64 = 1 << 20;
/// Chunks that wait for the network, 8 MiB: enough that the short output of many tasks is read in one go.
const SEND_QUEUE: usize = 32;

/// The ranks whose output is brought to the coordinator. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Logs(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    tracked: Mutex<BTreeMap<AttemptRef, Tracked>>,
    growth: Growth,
    /// There is something new to do.
    news: Notify,
}

#[derive(Debug)]
struct Tracked {
    ranks: BTreeMap<u32, RankLog>,
    /// Growth of their files is told of.
    watched: bool,
    /// No process writes any more.
    gone: bool,
    /// Told when everything is stored.
    waiters: Vec<oneshot::Sender<()>>,
}

#[derive(Debug)]
struct RankLog {
    path: PathBuf,
    /// What the coordinator has, once it said so on this stream.
    stored: Option<u64>,
    /// Up to where it was sent on this stream.
    sent: u64,
    asked: bool,
    end_sent: bool,
    /// Nothing is left to do.
    done: bool,
}

impl RankLog {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            stored: None,
            sent: 0,
            asked: false,
            end_sent: false,
            done: false,
        }
    }

    /// A new stream knows nothing of the old one.
    fn restart(&mut self) {
        let path = std::mem::take(&mut self.path);
        let done = self.done;
        *self = Self::new(path);
        self.done = done;
    }
}

impl Logs {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Shared {
            tracked: Mutex::default(),
            growth: Growth::new(),
            news: Notify::new(),
        }))
    }

    /// Brings the output of an attempt's ranks to the coordinator from now on. Doing it again changes nothing.
    pub(crate) fn track(&self, dir: &AttemptDir, ranks: Range<u32>) {
        let mut tracked = self.lock();
        tracked.entry(dir.attempt()).or_insert_with(|| Tracked {
            // Before the first look, so that nothing is missed between the two.
            watched: self.0.growth.watch(&dir.logs()),
            ranks: ranks
                .map(|rank| (rank, RankLog::new(dir.log(rank))))
                .collect(),
            gone: false,
            waiters: Vec::new(),
        });
        drop(tracked);
        self.0.news.notify_one();
    }

    /// The same for an attempt with one rank whose records are, or will be, in this file.
    pub(crate) fn track_file(&self, attempt: AttemptRef, rank: u32, path: PathBuf) {
        self.lock().entry(attempt).or_insert_with(|| Tracked {
            watched: path.parent().is_some_and(|dir| self.0.growth.watch(dir)),
            ranks: BTreeMap::from([(rank, RankLog::new(path))]),
            gone: false,
            waiters: Vec::new(),
        });
        self.0.news.notify_one();
    }

    /// Brings the whole of such a file to the coordinator, into which nothing is written any more, and waits for that.
    pub(crate) async fn finish_file(&self, attempt: AttemptRef, rank: u32, path: PathBuf) {
        self.lock().entry(attempt).or_insert_with(|| Tracked {
            // It does not grow.
            watched: true,
            ranks: BTreeMap::from([(rank, RankLog::new(path))]),
            gone: true,
            waiters: Vec::new(),
        });
        self.finish(attempt).await;
    }

    /// Waits until everything that the ranks of an attempt wrote is stored, or refused. Nothing may write any more. Also
    /// done for an attempt that is not tracked.
    pub(crate) async fn finish(&self, attempt: AttemptRef) {
        let (waiter, stored) = oneshot::channel();
        {
            let mut tracked = self.lock();
            let Some(of) = tracked.get_mut(&attempt) else {
                return;
            };
            of.gone = true;
            of.waiters.push(waiter);
        }
        self.0.news.notify_one();
        // The sender is also dropped when the attempt is given up.
        let _ = stored.await;
    }

    /// Pushes until it is dropped.
    pub(crate) async fn run(self, link: Link) {
        let mut backoff = Backoff::new();
        let mut told = String::new();
        loop {
            while self.lock().is_empty() {
                self.0.news.notified().await;
            }
            let mut healthy = false;
            match self.push(&link, &mut healthy).await {
                Ok(()) => {
                    backoff.reset();
                    continue;
                }
                Err(error) => {
                    if healthy {
                        backoff.reset();
                        told.clear();
                    }
                    let text = chain(&error);
                    if told != text {
                        tracing::info!(error = text, "output of ranks waits on this node");
                    }
                    told = text;
                    if error.is_refusal() {
                        self.drop_refused(&link).await;
                    }
                }
            }
            sleep(backoff.pause()).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<AttemptRef, Tracked>> {
        // Every change is complete before anything can panic.
        self.0
            .tracked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// One stream, until nothing is tracked or it breaks.
    async fn push(&self, link: &Link, healthy: &mut bool) -> Result<(), PushError> {
        self.lock().values_mut().for_each(|tracked| {
            tracked.ranks.values_mut().for_each(RankLog::restart);
        });
        let (sender, mut answers) = open(link).await?;
        let mut renewals = link.renewals();
        let growth = self.0.growth.listen().map_err(PushError::Watch)?;
        loop {
            let looked = Instant::now();
            self.fill(&sender).await?;
            let Some(pause) = self.pause() else {
                return Ok(());
            };
            let mut look_at = looked + pause;
            let mut grown = false;
            loop {
                tokio::select! {
                    biased;
                    // Cancel-safe: a message is taken whole or stays.
                    answer = answers.message() => {
                        let answer = answer?.ok_or(PushError::Closed)?;
                        *healthy = true;
                        self.take(answer)?;
                        // What else is there by now, so that the next look is for many of them.
                        for _ in 0..SEND_QUEUE {
                            match timeout(Duration::ZERO, answers.message()).await {
                                Ok(answer) => self.take(answer?.ok_or(PushError::Closed)?)?,
                                Err(_) => break,
                            }
                        }
                        break;
                    }
                    // Cancel-safe: a notification that is not taken stays.
                    () = self.0.news.notified() => break,
                    // Cancel-safe. Once is enough to look; what grows later is told of again.
                    () = growth.grown(), if !grown => {
                        grown = true;
                        look_at = look_at.min(looked + LOOK_GAP);
                    }
                    // Cancel-safe: only waits. Files may have grown.
                    () = sleep_until(look_at) => break,
                    // Cancel-safe: only waits. A sender that is gone never renews.
                    Ok(()) = renewals.changed() => return Err(PushError::Renewed),
                }
            }
        }
    }

    /// How long nothing has to be looked at unless there is news; nothing if nothing is tracked.
    fn pause(&self) -> Option<Duration> {
        let tracked = self.lock();
        let pauses = tracked.values().map(|of| match of.watched {
            true => SLOW_POLL,
            false => POLL,
        });
        pauses.min()
    }

    /// Sends what there is and may be on its way, but never waits for the network: the answers have to be read too.
    async fn fill(&self, sender: &mpsc::Sender<v1::PushLogsRequest>) -> Result<(), PushError> {
        loop {
            let room = sender.capacity();
            if room == 0 {
                return Ok(());
            }
            let jobs = self.next_reads(room);
            if jobs.is_empty() {
                return Ok(());
            }
            let chunks =
                blocking(move || jobs.into_iter().map(Wanted::perform).collect::<Vec<_>>());
            let mut sent = false;
            for chunk in chunks.await {
                if let Some(request) = self.note(chunk) {
                    sender.try_send(request).map_err(|_| PushError::Closed)?;
                    sent = true;
                }
            }
            if !sent {
                return Ok(());
            }
        }
    }

    /// The next `room` things to look at, at most one for each rank.
    fn next_reads(&self, room: usize) -> Vec<Wanted> {
        let mut tracked = self.lock();
        let mut jobs = Vec::new();
        for (attempt, tracked) in tracked.iter_mut() {
            for (rank, log) in &mut tracked.ranks {
                if jobs.len() == room {
                    return jobs;
                }
                if log.done || log.end_sent {
                    continue;
                }
                let what = match log.stored {
                    None if log.asked => continue,
                    None if tracked.gone => What::ReadWhole,
                    None => What::Ask,
                    Some(stored) => {
                        let room = WINDOW.saturating_sub(log.sent.saturating_sub(stored));
                        if room < CHUNK_BYTES as u64 {
                            continue;
                        }
                        // Cheap, and most ranks have nothing new most of the time.
                        let grown = std::fs::metadata(&log.path).is_ok_and(|m| m.len() > log.sent);
                        if !grown && !tracked.gone {
                            continue;
                        }
                        What::Read
                    }
                };
                jobs.push(Wanted {
                    attempt: *attempt,
                    rank: *rank,
                    path: log.path.clone(),
                    offset: log.sent,
                    what,
                    gone: tracked.gone,
                });
            }
        }
        jobs
    }

    /// Notes what was read, and makes the message of it.
    fn note(&self, chunk: Chunk) -> Option<v1::PushLogsRequest> {
        let Chunk { read, result, rest } = chunk;
        let mut tracked = self.lock();
        let of = tracked.get_mut(&read.attempt)?;
        let log = of.ranks.get_mut(&read.rank)?;
        let (offset, data, end) = match (read.what, result) {
            (What::ReadWhole, Ok(Some(data))) => {
                log.asked = true;
                log.sent = data.len() as u64;
                log.end_sent = true;
                (0, data, true)
            }
            (What::Ask | What::ReadWhole, _) => {
                log.asked = true;
                (0, Vec::new(), false)
            }
            (What::Read, Ok(Some(data))) if !data.is_empty() => {
                log.sent += data.len() as u64;
                (read.offset, data, false)
            }
            // The damage may be all that there is to say; what is written behind it is counted with it.
            (What::Read, Err(error))
                if error.kind() == io::ErrorKind::InvalidData && !read.gone =>
            {
                return None;
            }
            (What::Read, Ok(_)) if !read.gone => return None,
            (What::Read, result) => {
                let path = &read.path;
                let (offset, bytes) = (read.offset, rest);
                match &result {
                    Err(error) => {
                        tracing::warn!(?path, offset, bytes, %error, "cannot read the output of a rank, it ends here");
                    }
                    Ok(_) if bytes > 0 => {
                        tracing::warn!(
                            ?path,
                            offset,
                            bytes,
                            "the torn end of a rank's output was cut off"
                        );
                    }
                    Ok(_) => {}
                }
                log.end_sent = true;
                let marker = marker(offset, bytes);
                log.sent += marker.len() as u64;
                (offset, marker, true)
            }
        };
        Some(v1::PushLogsRequest {
            attempt: Some(read.attempt.into()),
            rank: read.rank,
            offset,
            data,
            end,
        })
    }

    /// Notes what the coordinator has stored.
    fn take(&self, answer: v1::PushLogsResponse) -> Result<(), PushError> {
        let attempt: AttemptRef = answer.attempt.ok_or(PushError::Answer)?.try_into()?;
        let mut tracked = self.lock();
        let Some(of) = tracked.get_mut(&attempt) else {
            return Ok(());
        };
        let Some(log) = of.ranks.get_mut(&answer.rank) else {
            return Ok(());
        };
        match log.stored {
            None => {
                log.sent = answer.stored;
                // Of what was sent whole at once something else may be stored.
                log.end_sent &= answer.end;
            }
            // It lost something, as after a power failure: from there again.
            Some(before) if answer.stored < before => {
                log.sent = answer.stored;
                log.end_sent = false;
            }
            Some(_) => log.sent = log.sent.max(answer.stored),
        }
        log.stored = Some(answer.stored);
        if answer.end {
            log.done = true;
        }
        if of.ranks.values().all(|log| log.done) {
            // Dropping it tells who waits.
            if let Some(finished) = tracked.remove(&attempt) {
                tell(finished);
            }
        }
        Ok(())
    }

    /// The coordinator refused the stream: finds out because of which attempts, and gives those up, so that the others'
    /// output goes on. What ran here under another coordinator is refused for good.
    async fn drop_refused(&self, link: &Link) {
        let first_rank = |tracked: &Tracked| tracked.ranks.keys().next().copied();
        let attempts: Vec<_> = self
            .lock()
            .iter()
            .filter_map(|(attempt, tracked)| Some((*attempt, first_rank(tracked)?)))
            .collect();
        for (attempt, rank) in attempts {
            let refused = match probe(link, attempt, rank).await {
                Ok(()) => continue,
                Err(error) if error.is_refusal() => chain(&error),
                Err(_) => return,
            };
            tracing::warn!(%attempt, error = refused, "the coordinator does not take this output, it stays here");
            if let Some(dropped) = self.lock().remove(&attempt) {
                tell(dropped);
            }
        }
    }
}

fn tell(tracked: Tracked) {
    for waiter in tracked.waiters {
        // Whoever does not wait any more does not care.
        let _ = waiter.send(());
    }
}

type Stream = (
    mpsc::Sender<v1::PushLogsRequest>,
    Streaming<v1::PushLogsResponse>,
);

async fn open(link: &Link) -> Result<Stream, PushError> {
    let channel = link.bulk().await?;
    let (sender, receiver) = mpsc::channel(SEND_QUEUE);
    let mut client = AgentServiceClient::new(channel).max_encoding_message_size(MAX_MESSAGE);
    let requests = ReceiverStream::new(receiver).map(|request: v1::PushLogsRequest| request);
    let answers = client.push_logs(requests).await?.into_inner();
    Ok((sender, answers))
}

/// Asks what is stored of one attempt, on a stream of its own.
async fn probe(link: &Link, attempt: AttemptRef, rank: u32) -> Result<(), PushError> {
    let (sender, mut answers) = open(link).await?;
    let question = v1::PushLogsRequest {
        attempt: Some(attempt.into()),
        rank,
        ..v1::PushLogsRequest::default()
    };
    sender.send(question).await.map_err(|_| PushError::Closed)?;
    answers.message().await?.map(drop).ok_or(PushError::Closed)
}

/// Why the stream ended.
#[derive(Debug, thiserror::Error)]
enum PushError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the coordinator does not take output")]
    Rpc(#[from] tonic::Status),
    #[error("the coordinator closed the stream")]
    Closed,
    #[error("files cannot be watched")]
    Watch(#[source] io::Error),
    #[error("the coordinator's answer names no attempt")]
    Answer,
    #[error("the coordinator's answer makes no sense")]
    Invalid(#[from] InvalidField),
    #[error("the certificate was renewed")]
    Renewed,
}

impl PushError {
    /// Whether it is about what was sent, so that sending it again would end the same.
    fn is_refusal(&self) -> bool {
        let Self::Rpc(status) = self else {
            return false;
        };
        match from_status(status).code {
            ErrorCode::Invalid
            | ErrorCode::NotFound
            | ErrorCode::AlreadyExists
            | ErrorCode::FailedPrecondition
            | ErrorCode::PermissionDenied
            | ErrorCode::Compacted => true,
            // The coordinator has no room; it may have some later.
            ErrorCode::Exhausted
            | ErrorCode::Unauthenticated
            | ErrorCode::Unavailable
            | ErrorCode::Unimplemented
            | ErrorCode::Internal => false,
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum What {
    /// What the coordinator has stored.
    Ask,
    Read,
    /// Nothing is written any more: all of it, if it fits into one message. What is stored already is skipped.
    ReadWhole,
}

/// Something to read for one rank.
#[derive(Debug)]
struct Wanted {
    attempt: AttemptRef,
    rank: u32,
    path: PathBuf,
    offset: u64,
    what: What,
    /// Nothing was written any more before this was read, so that finding nothing is the end.
    gone: bool,
}

/// What came of it.
#[derive(Debug)]
struct Chunk {
    read: Wanted,
    /// Nothing if it is too long to be read whole.
    result: io::Result<Option<Vec<u8>>>,
    /// Bytes in the file that are no whole records, if nothing else is there.
    rest: u64,
}

impl Wanted {
    fn perform(self) -> Chunk {
        let result = match self.what {
            What::Ask => Ok(None),
            What::Read => read_records(&self.path, self.offset).map(Some),
            What::ReadWhole => read_whole(&self.path),
        };
        let nothing = !matches!(&result, Ok(Some(data)) if !data.is_empty());
        let length = || std::fs::metadata(&self.path).map_or(0, |metadata| metadata.len());
        let rest = match self.what {
            What::Read if nothing => length().saturating_sub(self.offset),
            What::Read | What::Ask | What::ReadWhole => 0,
        };
        Chunk {
            read: self,
            result,
            rest,
        }
    }
}

/// A record that says how many bytes of a log are not shown, and from where; nothing if there are none.
fn marker(offset: u64, bytes: u64) -> Vec<u8> {
    let mut marker = Vec::new();
    if bytes > 0 {
        let data = dropped_data(bytes, &format!("log damaged at byte {offset}"));
        let record = LogRecord {
            kind: LogKind::Dropped,
            at: wall_now(),
            data: &data,
        };
        record.encode(&mut marker);
    }
    marker
}

/// All records of a file of at most a chunk's length, if it holds nothing else.
fn read_whole(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let length = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    match length <= CHUNK_BYTES as u64 {
        true => Ok(read_records(path, 0)
            .ok()
            .filter(|records| records.len() as u64 == length)),
        false => Ok(None),
    }
}

/// Whole records from `offset` on, about a chunk's worth; nothing if there is no whole one.
///
/// # Errors
/// What lies at `offset` cannot be the start of a record, or the file cannot be read.
fn read_records(path: &Path, offset: u64) -> io::Result<Vec<u8>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        // A rank that was never started.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.take(CHUNK_BYTES as u64).read_to_end(&mut bytes)?;
    let mut whole = 0;
    loop {
        match LogRecord::decode(&bytes[whole..]) {
            Ok(Some((record, length))) if is_plausible(&record) => whole += length,
            Ok(None) => break,
            // Those before it are not to blame.
            Ok(Some(_)) | Err(_) if whole > 0 => break,
            Ok(Some((record, _))) => {
                let message = format!("a record of the time {}", record.at.0);
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
            Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }
    bytes.truncate(whole);
    Ok(bytes)
}

/// Records have no checksum, so a damaged length makes one of what is none; that is seen by its time.
fn is_plausible(record: &LogRecord<'_>) -> bool {
    /// 2004 and 2248, in milliseconds since 1970.
    const TIMES: std::ops::Range<u64> = 1 << 40..1 << 43;
    TIMES.contains(&record.at.0)
}

#[cfg(test)]
mod tests {
    use trainyard_common::time::Timestamp;

    use super::*;

    #[test]
    fn only_whole_records_are_read() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("rank-0.log");
        assert_eq!(read_records(&path, 0).unwrap(), b"");
        let mut bytes = Vec::new();
        for data in [&b"one"[..], b"two"] {
            let (kind, at) = (LogKind::Stdout, Timestamp(1_760_000_000_000));
            LogRecord { kind, at, data }.encode(&mut bytes);
        }
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let one = bytes.len() / 2;
        assert_eq!(read_records(&path, 0).unwrap(), bytes[..one]);
        assert_eq!(read_records(&path, one as u64).unwrap(), b"");
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read_records(&path, one as u64).unwrap(), bytes[one..]);
        assert!(read_records(&path, 1).is_err());
    }

    /// What `perform` and `note` make of a log whose rank is gone, as the coordinator would store it.
    fn brought(path: &Path) -> Vec<u8> {
        let mut stored = Vec::new();
        loop {
            let chunk = Wanted {
                attempt: "j1.0.1".parse().unwrap(),
                rank: 0,
                path: path.to_owned(),
                offset: stored.len() as u64,
                what: What::Read,
                gone: true,
            }
            .perform();
            match chunk.result {
                Ok(Some(data)) if !data.is_empty() => stored.extend(data),
                _ => {
                    stored.extend(marker(chunk.read.offset, chunk.rest));
                    return stored;
                }
            }
        }
    }

    /// Of the text of a record a flip cannot be seen, as it has no checksum; of all else it is, and never is anything left
    /// out without a word.
    #[test]
    fn a_damaged_log_is_shown_up_to_the_damage_and_says_so() {
        let mut golden = Vec::new();
        for (number, kind) in [LogKind::Stdout, LogKind::Stderr, LogKind::Stdout]
            .into_iter()
            .enumerate()
        {
            let data = format!("line {number} of a rank\n").into_bytes();
            let at = Timestamp(1_760_000_000_000 + number as u64);
            LogRecord {
                kind,
                at,
                data: &data,
            }
            .encode(&mut golden);
        }
        assert_eq!(golden, include_bytes!("../golden/rank-1.log"));
        let size = golden.len() / 3;
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("rank-0.log");
        let records = |bytes: &[u8]| {
            let mut found = Vec::new();
            let mut at = 0;
            while at < bytes.len() {
                let (record, length) = LogRecord::decode(&bytes[at..]).unwrap().unwrap();
                found.push((record.kind, record.data.to_vec()));
                at += length;
            }
            found
        };
        for cut in 0..golden.len() {
            std::fs::write(&path, &golden[..cut]).unwrap();
            let shown = brought(&path);
            let whole = cut / size * size;
            assert_eq!(shown[..whole], golden[..whole]);
            let rest = records(&shown[whole..]);
            assert_eq!(rest.len(), usize::from(cut % size > 0), "{cut}");
            assert!(rest.iter().all(|(kind, _)| *kind == LogKind::Dropped));
        }
        for bit in 0..golden.len() * 8 {
            let mut flipped = golden.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &flipped).unwrap();
            let shown = records(&brought(&path));
            let marked = shown.iter().any(|(kind, _)| *kind == LogKind::Dropped);
            let before = bit / 8 / size;
            assert_eq!(shown[..before], records(&golden)[..before], "bit {bit}");
            assert!(shown.len() == 3 || marked, "bit {bit}: {shown:?}");
        }
    }

    #[test]
    fn a_chunk_always_has_room_for_a_record() {
        use trainyard_common::limits::MAX_LOG_RECORD;
        use trainyard_common::logrecord::HEADER_BYTES;
        const { assert!(CHUNK_BYTES >= MAX_LOG_RECORD + HEADER_BYTES) };
        const { assert!(WINDOW >= CHUNK_BYTES as u64) };
    }
}
