//! `LogService`: the output of a job's ranks, once or followed until the job is over. A reader that does not keep up
//! holds up nobody but itself: it reads files, and at most a few batches wait for it.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;
use tonic::{Request, Response, Status};
use trainyard_common::error::Refusal;
use trainyard_common::ids::{JobId, Sequence};
use trainyard_common::logrecord::{LogKind, LogRecord};
use trainyard_proto::convert::{self, InvalidField};
use trainyard_proto::status::to_status;
use trainyard_proto::v1;

use super::{Answers, Sender, Shared, answers, not_found, reply, shutting_down};
use crate::auth::ActivityGuard;
use crate::logs::{Entry, LogKey, LogReader, Start};
use trainyard_transport::task::{blocking, spawn};

/// `LogService`.
pub(crate) struct LogApi(pub(crate) Arc<Shared>);

/// What somebody wants to read.
#[derive(Debug, Clone, Copy)]
struct Query {
    job: JobId,
    task: Option<u32>,
    rank: Option<u32>,
    attempt: Option<u32>,
    follow: bool,
    start: Start,
}

impl TryFrom<v1::ReadLogsRequest> for Query {
    type Error = InvalidField;

    fn try_from(request: v1::ReadLogsRequest) -> Result<Self, InvalidField> {
        let v1::ReadLogsRequest {
            job,
            task,
            rank,
            attempt,
            follow,
            tail,
            since,
            offset,
        } = request;
        let one_file = task.is_some() && rank.is_some() && attempt.is_some();
        if offset > 0 && !one_file {
            return Err(InvalidField::new(
                "offset",
                "needs task, rank and attempt, as it is a place in one rank's output",
            ));
        }
        let since = convert::optional_timestamp("since", since)?;
        Ok(Self {
            job: convert::job_id("job", job)?,
            task,
            rank,
            attempt,
            follow,
            start: Start {
                offset,
                since,
                tail,
            },
        })
    }
}

impl Query {
    fn wants(&self, key: LogKey) -> bool {
        self.task.is_none_or(|task| task == key.attempt.task.0)
            && self
                .attempt
                .is_none_or(|attempt| attempt == key.attempt.attempt.0)
            && self.rank.is_none_or(|rank| rank == key.rank)
    }
}

impl LogApi {
    async fn read(
        &self,
        request: v1::ReadLogsRequest,
        activity: Option<ActivityGuard>,
    ) -> Result<Answers<v1::ReadLogsResponse>, Refusal> {
        let query = Query::try_from(request)?;
        let permit = self.0.follower()?;
        self.check_exists(query.job).await?;
        let (sender, answers) = answers();
        let reading = Reading {
            shared: self.0.clone(),
            query,
            sender,
            readers: BTreeMap::new(),
        };
        spawn("read logs", async move {
            reading.run().await;
            drop((permit, activity));
        });
        Ok(answers)
    }

    async fn check_exists(&self, job: JobId) -> Result<(), Refusal> {
        if self.0.read.tables().jobs.contains_key(&job) {
            return Ok(());
        }
        let next = JobId(job.0.saturating_add(1));
        let found = self.0.stored(move |store| store.jobs(next, 1)).await?;
        match found.first() {
            Some(found) if found.id == job => Ok(()),
            _ => Err(not_found(format_args!("job {job}"))),
        }
    }
}

/// One reader at work.
struct Reading {
    shared: Arc<Shared>,
    query: Query,
    sender: Sender<v1::ReadLogsResponse>,
    readers: BTreeMap<LogKey, LogReader>,
}

/// Nobody listens any more, or all was said.
struct Done;

impl Reading {
    async fn run(mut self) {
        if let Err(refusal) = self.read_all().await {
            // The peer may be gone; then nobody wants to know.
            let _ = self.sender.send(Err(to_status(&refusal))).await;
        }
    }

    async fn read_all(&mut self) -> Result<(), Refusal> {
        // Before anything is read, so that nothing that comes later is missed.
        let mut output = self.shared.logs.follow(self.query.job);
        let mut rows = self.shared.read.watch();
        loop {
            output.borrow_and_update();
            rows.borrow_and_update();
            // Before reading: agents report the end only after all output was taken here.
            let over = !self.is_live();
            self.find().await?;
            let Ok(progressed) = self.pass().await? else {
                return Ok(());
            };
            if !self.query.follow || (over && !progressed) {
                return Ok(());
            }
            if !over && self.wait(&mut output, &mut rows).await?.is_err() {
                return Ok(());
            }
        }
    }

    fn is_live(&self) -> bool {
        self.shared.read.tables().jobs.contains_key(&self.query.job)
    }

    /// Adds readers for outputs that are new.
    async fn find(&mut self) -> Result<(), Refusal> {
        let (logs, job) = (self.shared.logs.clone(), self.query.job);
        let keys = blocking(move || logs.list(job)).await?;
        for key in keys.into_iter().filter(|key| self.query.wants(*key)) {
            if self.readers.contains_key(&key) {
                continue;
            }
            let (mut reader, start) = (self.shared.logs.reader(key), self.query.start);
            let reader = blocking(move || reader.start(start).map(|()| reader)).await?;
            self.readers.insert(key, reader);
        }
        Ok(())
    }

    /// Sends what is new of every output; says whether anything was.
    async fn pass(&mut self) -> Result<Result<bool, Done>, Refusal> {
        let mut progressed = false;
        for key in self.readers.keys().copied().collect::<Vec<_>>() {
            while let Some(mut reader) = self.readers.remove(&key) {
                let (reader, batch) = blocking(move || {
                    let batch = reader.next_batch();
                    (reader, batch)
                })
                .await;
                self.readers.insert(key, reader);
                let batch = batch?;
                if batch.is_empty() {
                    break;
                }
                progressed = true;
                let entries = batch.into_iter().map(|entry| wire(key, entry)).collect();
                if self.shared.stop.is_cancelled() {
                    return Err(shutting_down());
                }
                if self
                    .sender
                    .send(Ok(v1::ReadLogsResponse { entries }))
                    .await
                    .is_err()
                {
                    return Ok(Err(Done));
                }
            }
        }
        Ok(Ok(progressed))
    }

    /// Waits for output or for the end of the job.
    async fn wait(
        &self,
        output: &mut watch::Receiver<u64>,
        rows: &mut watch::Receiver<Sequence>,
    ) -> Result<Result<(), Done>, Refusal> {
        loop {
            tokio::select! {
                biased;
                // Cancel-safe, all four: nothing is taken.
                () = self.sender.closed() => return Ok(Err(Done)),
                () = self.shared.stop.cancelled() => return Err(shutting_down()),
                changed = output.changed() => return changed.map(Ok).map_err(|_| shutting_down()),
                // Every commit of the cluster wakes this; only the end of the job matters.
                changed = rows.changed() => {
                    changed.map_err(|_| shutting_down())?;
                    if !self.is_live() {
                        return Ok(Ok(()));
                    }
                }
            }
        }
    }
}

fn wire(key: LogKey, entry: Entry) -> v1::LogEntry {
    let Entry {
        kind,
        at,
        next_offset,
        data,
    } = entry;
    let dropped = LogRecord {
        kind,
        at,
        data: &data,
    }
    .dropped()
    .map(|(bytes, cause)| (bytes, cause.to_vec()));
    let (dropped_bytes, data) = dropped.unwrap_or((0, data));
    v1::LogEntry {
        attempt: Some(key.attempt.into()),
        rank: key.rank,
        kind: match kind {
            LogKind::Stdout => v1::LogKind::Stdout,
            LogKind::Stderr => v1::LogKind::Stderr,
            LogKind::Dropped => v1::LogKind::Dropped,
        }
        .into(),
        at: Some(convert::timestamp(at)),
        next_offset,
        data,
        dropped_bytes,
    }
}

#[tonic::async_trait]
impl v1::log_service_server::LogService for LogApi {
    type ReadStream = Answers<v1::ReadLogsResponse>;

    async fn read(
        &self,
        request: Request<v1::ReadLogsRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let activity = request.extensions().get::<ActivityGuard>().cloned();
        reply(LogApi::read(self, request.into_inner(), activity).await)
    }
}
