//! `JobService`: submit, look at, follow and cancel jobs. Live jobs are read from what was published, with their tasks
//! and attempts, and finished ones from the store; both are durable.

use std::sync::Arc;

use prost::Message;
use tonic::{Request, Response, Status};
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{Digest, JobId, Sequence};
use trainyard_common::limits;
use trainyard_common::record::{JobRecord, Role, UserRecord};
use trainyard_common::spec::JobSpec;
use trainyard_coordinator_core::effect::Answer;
use trainyard_coordinator_core::event::Event;
use trainyard_proto::convert::{self, InvalidField};
use trainyard_proto::status::to_status;
use trainyard_proto::v1;

use super::{
    Answers, MAX_ANSWER_BYTES, Sender, Shared, answers, not_found, reply, shutting_down, unexpected,
};
use crate::auth::{self, ActivityGuard};
use crate::disk::RESERVE_FOR_STATE;
use crate::store::JobHistory;
use trainyard_transport::task::{blocking, spawn};

/// Rows of a page unless the caller says otherwise.
const DEFAULT_PAGE: u32 = 100;

/// `JobService`.
pub(crate) struct JobApi(pub(crate) Arc<Shared>);

impl JobApi {
    async fn submit(
        &self,
        user: &UserRecord,
        request: v1::SubmitRequest,
    ) -> Result<v1::SubmitResponse, Refusal> {
        self.0.disk.check(RESERVE_FOR_STATE, 0)?;
        self.0.disk.check_reserve(&*self.0.store)?;
        let request_digest = body_digest(&request);
        let v1::SubmitRequest {
            request_id,
            spec,
            allow_infeasible,
        } = request;
        let request_id = convert::text("request_id", &request_id)?;
        let spec: JobSpec = convert::required("spec", spec)?;
        if spec.workspace != user.workspace {
            let mut refusal = not_found(format_args!("workspace {}", spec.workspace));
            refusal.message += &format!("; yours is {}", user.workspace);
            return Err(refusal.at("spec.workspace"));
        }
        self.check_snapshot(spec.snapshot).await?;
        let owner = user.name.clone();
        let answer = self
            .0
            .driver
            .request(|key| Event::JobSubmitted {
                key,
                owner,
                request_id,
                request_digest,
                spec: Box::new(spec),
                allow_infeasible,
            })
            .await?;
        match answer {
            Answer::Submitted { job, repeated } => Ok(v1::SubmitResponse {
                job: job.0,
                repeated_request: repeated,
            }),
            other => Err(unexpected(&other)),
        }
    }

    async fn check_snapshot(&self, snapshot: Option<Digest>) -> Result<(), Refusal> {
        let Some(snapshot) = snapshot else {
            return Ok(());
        };
        let blobs = self.0.blobs.clone();
        if blocking(move || blobs.contains(snapshot)).await {
            return Ok(());
        }
        let message = format!(
            "snapshot {snapshot} was not uploaded; upload its files and its manifest first"
        );
        Err(
            Refusal::new(ErrorCode::FailedPrecondition, "SNAPSHOT_MISSING", message)
                .at("spec.snapshot"),
        )
    }

    async fn history(&self, job: u64) -> Result<JobHistory, Refusal> {
        let job = convert::job_id("job", job)?;
        history(&self.0, job).await
    }

    async fn list(&self, request: v1::ListJobsRequest) -> Result<v1::ListJobsResponse, Refusal> {
        let v1::ListJobsRequest {
            all,
            page_size,
            before,
        } = request;
        let limit = match page_size {
            0 => DEFAULT_PAGE,
            1..=limits::MAX_PAGE => page_size,
            _ => {
                let problem = format!("{page_size} is above {}", limits::MAX_PAGE);
                return Err(InvalidField::new("page_size", problem).into());
            }
        } as usize;
        let before = if before == 0 {
            JobId(u64::MAX)
        } else {
            JobId(before)
        };
        let found = if all {
            self.0
                .stored(move |store| store.jobs(before, limit))
                .await?
        } else {
            let tables = self.0.read.tables();
            let live = tables.jobs.range(..before).rev().take(limit);
            live.map(|(_, job)| JobRecord::clone(job)).collect()
        };
        Ok(page(&found, limit))
    }

    async fn cancel(
        &self,
        user: &UserRecord,
        request: v1::CancelJobRequest,
    ) -> Result<v1::CancelJobResponse, Refusal> {
        let job = convert::job_id("job", request.job)?;
        let live = self.0.read.tables().jobs.get(&job).cloned();
        let record = match &live {
            Some(record) => JobRecord::clone(record),
            None => self.record(job).await?,
        };
        if record.owner != user.name && user.role < Role::Operator {
            let message = format!(
                "{job} belongs to {}; cancelling it needs the role {}",
                record.owner,
                Role::Operator
            );
            return Err(Refusal::new(
                ErrorCode::PermissionDenied,
                "NOT_OWNER",
                message,
            ));
        }
        if live.is_none() {
            return Ok(v1::CancelJobResponse {
                job: Some((&record).into()),
            });
        }
        let by = user.name.clone();
        let record = match self
            .0
            .driver
            .request(|key| Event::CancelRequested { key, by, job })
            .await
        {
            Ok(Answer::Cancelled(record)) => *record,
            Ok(other) => return Err(unexpected(&other)),
            // It ended since we looked.
            Err(refusal) if refusal.code == ErrorCode::NotFound => self.record(job).await?,
            Err(refusal) => return Err(refusal),
        };
        Ok(v1::CancelJobResponse {
            job: Some((&record).into()),
        })
    }

    async fn record(&self, job: JobId) -> Result<JobRecord, Refusal> {
        let next = JobId(job.0.saturating_add(1));
        let found = self.0.stored(move |store| store.jobs(next, 1)).await?.pop();
        found
            .filter(|found| found.id == job)
            .ok_or_else(|| not_found(format_args!("job {job}")))
    }

    async fn watch(
        &self,
        request: v1::WatchJobRequest,
        activity: Option<ActivityGuard>,
    ) -> Result<Answers<v1::WatchJobResponse>, Refusal> {
        let job = convert::job_id("job", request.job)?;
        let seen = Sequence(request.after_revision);
        let newest = self.0.read.tables().revision;
        if seen > newest {
            let message = format!(
                "revision {seen} is not known here, the newest is {newest}: the coordinator's state was restored from a \
                 backup; watch from 0"
            );
            return Err(
                Refusal::new(ErrorCode::Compacted, "REVISION_UNKNOWN", message)
                    .at("after_revision"),
            );
        }
        self.record(job).await?;
        let permit = self.0.follower()?;
        let (sender, answers) = answers();
        let shared = self.0.clone();
        spawn("watch", async move {
            if let Err(refusal) = watch(&shared, job, seen, &sender).await {
                // The peer may be gone; then nobody wants to know.
                let _ = sender.send(Err(to_status(&refusal))).await;
            }
            drop((permit, activity));
        });
        Ok(answers)
    }
}

/// Tells the job at once and after each change, until it is over or nobody listens.
async fn watch(
    shared: &Shared,
    job: JobId,
    mut seen: Sequence,
    sender: &Sender<v1::WatchJobResponse>,
) -> Result<(), Refusal> {
    let mut changes = shared.read.watch();
    loop {
        changes.borrow_and_update();
        let (row, revision) = {
            let tables = shared.read.tables();
            match tables.jobs.get(&job) {
                Some(row) => (
                    Some((Arc::clone(row), tables.attempts_of(job))),
                    tables.changed(job),
                ),
                None => (None, tables.revision),
            }
        };
        let live = row.is_some();
        if !live || seen == Sequence(0) || revision > seen {
            // While the job lives its rows are in memory: a watcher of a large array must not read the store for each of
            // its tasks.
            let (job, attempts) = match row {
                Some((row, attempts)) => {
                    let attempts = attempts
                        .iter()
                        .map(|attempt| v1::Attempt::from(attempt.as_ref()));
                    (v1::Job::from(row.as_ref()), attempts.collect())
                }
                None => {
                    let JobHistory { job, attempts, .. } = history(shared, job).await?;
                    (
                        (&job).into(),
                        attempts.iter().map(v1::Attempt::from).collect(),
                    )
                }
            };
            let message = v1::WatchJobResponse {
                revision: revision.0,
                job: Some(job),
                attempts: newest(attempts),
            };
            if sender.send(Ok(message)).await.is_err() || !live {
                return Ok(());
            }
            seen = revision.max(Sequence(1));
        }
        tokio::select! {
            biased;
            // Cancel-safe, all three: nothing is taken.
            () = sender.closed() => return Ok(()),
            () = shared.stop.cancelled() => return Err(shutting_down()),
            changed = changes.changed() => if changed.is_err() { return Err(shutting_down()) },
        }
    }
}

async fn history(shared: &Shared, job: JobId) -> Result<JobHistory, Refusal> {
    let found = shared.stored(move |store| store.job(job)).await?;
    found.ok_or_else(|| not_found(format_args!("job {job}")))
}

/// What makes two submissions the same: everything but the request id.
fn body_digest(request: &v1::SubmitRequest) -> Digest {
    let body = v1::SubmitRequest {
        request_id: String::new(),
        ..request.clone()
    };
    Digest(*blake3::hash(&body.encode_to_vec()).as_bytes())
}

/// As many of the newest rows (the last ones) as fit into a message, at least one.
fn newest<T: Message>(mut rows: Vec<T>) -> Vec<T> {
    let mut bytes = 0;
    let fit = rows.iter().rev().take_while(|row| {
        bytes += row.encoded_len();
        bytes <= MAX_ANSWER_BYTES
    });
    let keep = fit.count().max(1);
    rows.drain(..rows.len().saturating_sub(keep));
    rows
}

fn page(found: &[JobRecord], limit: usize) -> v1::ListJobsResponse {
    let mut bytes = 0;
    let mut jobs: Vec<v1::Job> = Vec::new();
    for record in found {
        let job = v1::Job::from(record);
        bytes += job.encoded_len();
        if bytes > MAX_ANSWER_BYTES && !jobs.is_empty() {
            break;
        }
        jobs.push(job);
    }
    let more = jobs.len() < found.len() || found.len() == limit;
    let next_before = jobs.last().filter(|_| more).map_or(0, |job| job.id);
    v1::ListJobsResponse { jobs, next_before }
}

#[tonic::async_trait]
impl v1::job_service_server::JobService for JobApi {
    type WatchStream = Answers<v1::WatchJobResponse>;

    async fn submit(
        &self,
        request: Request<v1::SubmitRequest>,
    ) -> Result<Response<v1::SubmitResponse>, Status> {
        let user = auth::user(&request).map_err(|refusal| to_status(&refusal))?;
        reply(JobApi::submit(self, &user, request.into_inner()).await)
    }

    async fn get(
        &self,
        request: Request<v1::GetJobRequest>,
    ) -> Result<Response<v1::GetJobResponse>, Status> {
        let found = self.history(request.into_inner().job).await;
        reply(found.map(
            |JobHistory {
                 job,
                 tasks,
                 attempts,
             }| v1::GetJobResponse {
                job: Some((&job).into()),
                tasks: tasks.iter().map(v1::Task::from).collect(),
                attempts: newest(attempts.iter().map(v1::Attempt::from).collect()),
            },
        ))
    }

    async fn list(
        &self,
        request: Request<v1::ListJobsRequest>,
    ) -> Result<Response<v1::ListJobsResponse>, Status> {
        reply(JobApi::list(self, request.into_inner()).await)
    }

    async fn watch(
        &self,
        request: Request<v1::WatchJobRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let activity = request.extensions().get::<ActivityGuard>().cloned();
        reply(JobApi::watch(self, request.into_inner(), activity).await)
    }

    async fn cancel(
        &self,
        request: Request<v1::CancelJobRequest>,
    ) -> Result<Response<v1::CancelJobResponse>, Status> {
        let user = auth::user(&request).map_err(|refusal| to_status(&refusal))?;
        reply(JobApi::cancel(self, &user, request.into_inner()).await)
    }
}
