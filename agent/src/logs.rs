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
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use trainyard_common::error::ErrorCode;
use trainyard_common::ids::AttemptRef;
use trainyard_common::limits::{CHUNK_BYTES, MAX_MESSAGE};
use trainyard_common::logrecord::whole_records;
use trainyard_proto::convert::InvalidField;
use trainyard_proto::status::from_status;
use trainyard_proto::v1;
use trainyard_proto::v1::agent_service_client::AgentServiceClient;
use trainyard_transport::client::ConnectError;

use crate::backoff::Backoff;
use crate::chain::chain;
use crate::link::Link;
use crate::runtime::AttemptDir;
use trainyard_transport::task::blocking;

/// How often record files are looked at: what a person who follows a log hardly notices.
const POLL: Duration = Duration::from_millis(150);
/// Bytes of one rank that are on their way. A second's worth on a slow line (10 Mbit/s).
const WINDOW: u64 = 1 << 20;
/// Chunks that wait for the network, 2 MiB.
const SEND_QUEUE: usize = 8;

/// The ranks whose output is brought to the coordinator. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Logs(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    tracked: Mutex<BTreeMap<AttemptRef, Tracked>>,
    /// There is something new to do.
    news: Notify,
}

#[derive(Debug)]
struct Tracked {
    ranks: BTreeMap<u32, RankLog>,
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
        Self(Arc::default())
    }

    /// Brings the output of an attempt's ranks to the coordinator from now on. Doing it again changes nothing.
    pub(crate) fn track(&self, dir: &AttemptDir, ranks: Range<u32>) {
        let mut tracked = self.lock();
        tracked.entry(dir.attempt()).or_insert_with(|| Tracked {
            ranks: ranks
                .map(|rank| (rank, RankLog::new(dir.log(rank))))
                .collect(),
            gone: false,
            waiters: Vec::new(),
        });
        drop(tracked);
        self.0.news.notify_one();
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
        let mut ticks = interval(POLL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.fill(&sender).await?;
            if self.lock().is_empty() {
                return Ok(());
            }
            tokio::select! {
                biased;
                // Cancel-safe: a message is taken whole or stays.
                answer = answers.message() => {
                    let answer = answer?.ok_or(PushError::Closed)?;
                    *healthy = true;
                    self.take(answer)?;
                }
                // Cancel-safe: a notification that is not taken stays.
                () = self.0.news.notified() => {}
                // Cancel-safe: only waits. Files may have grown.
                _ = ticks.tick() => {}
                // Cancel-safe: only waits. A sender that is gone never renews.
                Ok(()) = renewals.changed() => return Err(PushError::Renewed),
            }
        }
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
        let Chunk { read, result } = chunk;
        let mut tracked = self.lock();
        let of = tracked.get_mut(&read.attempt)?;
        let log = of.ranks.get_mut(&read.rank)?;
        let (offset, data, end) = match (read.what, result) {
            (What::Ask, _) => {
                log.asked = true;
                (0, Vec::new(), false)
            }
            (What::Read, Ok(data)) if !data.is_empty() => {
                log.sent += data.len() as u64;
                (read.offset, data, false)
            }
            (What::Read, Ok(_)) if read.gone => {
                log.end_sent = true;
                (log.sent, Vec::new(), true)
            }
            (What::Read, Ok(_)) => return None,
            (What::Read, Err(error)) => {
                let path = &read.path;
                tracing::warn!(?path, %error, "cannot read the output of a rank, it ends here");
                log.end_sent = true;
                (log.sent, Vec::new(), true)
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
            None => log.sent = answer.stored,
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
    Ask,
    Read,
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
    result: io::Result<Vec<u8>>,
}

impl Wanted {
    fn perform(self) -> Chunk {
        let result = match self.what {
            What::Ask => Ok(Vec::new()),
            What::Read => read_records(&self.path, self.offset),
        };
        Chunk { read: self, result }
    }
}

/// Whole records from `offset` on, about a chunk's worth; nothing if there is no whole one.
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
    let whole = whole_records(&bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    bytes.truncate(whole);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use trainyard_common::logrecord::{LogKind, LogRecord};
    use trainyard_common::time::Timestamp;

    use super::*;

    #[test]
    fn only_whole_records_are_read() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("rank-0.log");
        assert_eq!(read_records(&path, 0).unwrap(), b"");
        let mut bytes = Vec::new();
        for data in [&b"one"[..], b"two"] {
            let (kind, at) = (LogKind::Stdout, Timestamp(1));
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

    #[test]
    fn a_chunk_always_has_room_for_a_record() {
        use trainyard_common::limits::MAX_LOG_RECORD;
        use trainyard_common::logrecord::HEADER_BYTES;
        const { assert!(CHUNK_BYTES >= MAX_LOG_RECORD + HEADER_BYTES) };
        const { assert!(WINDOW >= CHUNK_BYTES as u64) };
    }
}
