//! Requests of a self test: made again while the coordinator is away, and timed, as that is what is to be shown.

use std::cell::Cell;
use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tonic::Status;
use trainyard_common::ids::JobId;
use trainyard_common::record::JobRecord;
use trainyard_common::spec::JobSpec;
use trainyard_proto::v1;

use super::job::LABEL;
use crate::connection::{Connection, is_away};
use crate::failure::{EXIT_UNAVAILABLE, Failure};
use crate::jobs;
use crate::nodes::{self, NodeDetail};

/// Pause between two tries: the precision of what is told of an outage.
const RETRY: Duration = Duration::from_millis(50);
/// How long one try may take; a connection whose other end vanished says nothing.
const TRY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a coordinator may be away. A service manager may wait a while before it starts it again.
pub(crate) const AWAY_TIMEOUT: Duration = Duration::from_secs(120);
/// Rows of one page.
const PAGE: u32 = 1000;
/// Pages of jobs that are looked through for those of the self test: 100,000 jobs that others submitted meanwhile.
const MAX_PAGES: usize = 100;

/// Who asks.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) connection: Connection,
    /// The self test's own name.
    pub(crate) id: String,
    /// The longest time without an answer since it was last asked for.
    longest_away: Cell<Duration>,
}

impl Client {
    pub(crate) fn new(connection: Connection, id: String) -> Self {
        Self {
            connection,
            id,
            longest_away: Cell::default(),
        }
    }

    /// The longest time without an answer since this was called before.
    pub(crate) fn take_longest_away(&self) -> Duration {
        self.longest_away.take()
    }

    /// Asks until there is an answer.
    pub(crate) async fn ask<T, F>(&self, mut request: impl FnMut() -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let mut first: Option<Instant> = None;
        loop {
            let tried = Instant::now();
            let late = || Err(Status::unavailable("no answer in time"));
            let status = match timeout(TRY_TIMEOUT, request())
                .await
                .unwrap_or_else(|_| late())
            {
                Ok(answer) => {
                    let away = first.map(|first| first.elapsed()).unwrap_or_default();
                    self.longest_away.set(self.longest_away.get().max(away));
                    return Ok(answer);
                }
                Err(status) if is_away(&status) => status,
                Err(status) => return Err(status.into()),
            };
            let since = *first.get_or_insert(tried);
            if since.elapsed() > AWAY_TIMEOUT {
                let failure = Failure::from(status);
                let message = format!(
                    "the coordinator did not come back within {} s: {}",
                    AWAY_TIMEOUT.as_secs(),
                    failure.message
                );
                return Err(Failure::new(EXIT_UNAVAILABLE, "AWAY", message));
            }
            sleep(RETRY).await;
        }
    }

    /// Submits under a request id; asking again with the same one must give the same job.
    pub(crate) async fn submit(&self, request_id: &str, spec: &JobSpec) -> Result<JobId, Failure> {
        let request = v1::SubmitRequest {
            request_id: request_id.to_owned(),
            spec: Some(spec.into()),
            allow_infeasible: false,
        };
        let answer = self
            .ask(|| {
                let (mut jobs, request) = (self.connection.jobs(), request.clone());
                async move { jobs.submit(request).await }
            })
            .await?;
        Ok(JobId(answer.into_inner().job))
    }

    /// Cancels; the answer is the job as it then is.
    pub(crate) async fn cancel(&self, job: JobId) -> Result<JobRecord, Failure> {
        let answer = self
            .ask(|| {
                let mut jobs = self.connection.jobs();
                async move { jobs.cancel(v1::CancelJobRequest { job: job.0 }).await }
            })
            .await?;
        jobs::job_of(answer.into_inner().job)
    }

    /// Who leads, as a counter.
    pub(crate) async fn term(&self) -> Result<u64, Failure> {
        let answer = self
            .ask(|| {
                let mut admin = self.connection.admin();
                async move { admin.who_am_i(v1::WhoAmIRequest {}).await }
            })
            .await?;
        Ok(answer.into_inner().term)
    }

    /// All nodes.
    pub(crate) async fn nodes(&self) -> Result<Vec<NodeDetail>, Failure> {
        let answer = self
            .ask(|| {
                let mut nodes = self.connection.nodes();
                async move { nodes.list(v1::ListNodesRequest {}).await }
            })
            .await?;
        nodes::of_answer(answer.into_inner())
    }

    /// The jobs of the self test that are not over.
    pub(crate) async fn live(&self) -> Result<Vec<JobRecord>, Failure> {
        self.list(JobId(0), false).await
    }

    /// The jobs of the self test from this one on, oldest first.
    pub(crate) async fn census(&self, oldest: JobId) -> Result<Vec<JobRecord>, Failure> {
        self.list(oldest, true).await
    }

    async fn list(&self, oldest: JobId, all: bool) -> Result<Vec<JobRecord>, Failure> {
        let mut found = Vec::new();
        let mut before = 0;
        for _ in 0..MAX_PAGES {
            let request = v1::ListJobsRequest {
                all,
                page_size: PAGE,
                before,
            };
            let answer = self
                .ask(|| {
                    let mut jobs = self.connection.jobs();
                    async move { jobs.list(request).await }
                })
                .await?;
            let page = answer.into_inner();
            let last = page.jobs.last().map_or(0, |job| job.id);
            for job in page.jobs {
                let record = jobs::job_of(Some(job))?;
                if record.spec.labels.get(LABEL) == Some(&self.id) {
                    found.push(record);
                }
            }
            before = page.next_before;
            if before == 0 || last <= oldest.0 {
                break;
            }
        }
        found.reverse();
        Ok(found)
    }
}
