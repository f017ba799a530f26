//! The services, one file each: they turn messages into domain types, check whose object it is, ask the driver or read
//! what is durable, and turn the answer into messages. Who may call at all was checked before them.
//!
//! No decision about jobs or nodes is taken here, and no `tonic::Status` is built but from a refusal.

mod admin;
mod agent;
mod blobs;
mod enroll;
mod faults;
mod jobs;
mod logs;
mod nodes;
mod push_logs;
mod session;

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Response, Status};
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{ClusterId, Term};
use trainyard_coordinator_core::effect::Answer;
use trainyard_proto::status::to_status;
use trainyard_transport::connections::Connections;
use trainyard_transport::endpoint::Endpoint;
use trainyard_transport::restart::Restart;

use crate::authority::Certificates;
use crate::blobs::BlobStore;
use crate::config::Timing;
use crate::disk::DiskGuard;
use crate::driver::Driver;
use crate::logs::LogStore;
use crate::read_model::ReadModel;
use crate::store::{Store, StoreError};
use trainyard_transport::task::blocking;

pub(crate) use admin::AdminApi;
pub(crate) use agent::AgentApi;
pub(crate) use blobs::BlobApi;
pub(crate) use enroll::{EnrollApi, FailureLimit};
pub(crate) use faults::FaultLines;
pub(crate) use jobs::JobApi;
pub(crate) use logs::LogApi;
pub(crate) use nodes::NodeApi;

/// Watches and readers of output at a time: a follower may hold about 1 MiB that its peer does not take.
pub(crate) const MAX_FOLLOWERS: usize = 2048;
/// Messages of an answer that wait for their peer.
const ANSWER_QUEUE: usize = 4;
/// Encoded bytes of the rows of one answer: below the message limit with room for one more large row.
const MAX_ANSWER_BYTES: usize = 2 << 20;

/// What all services share.
pub(crate) struct Shared {
    pub(crate) driver: Driver,
    pub(crate) read: Arc<ReadModel>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) logs: Arc<LogStore>,
    pub(crate) blobs: Arc<BlobStore>,
    pub(crate) certificates: Certificates,
    pub(crate) connections: Connections,
    pub(crate) cluster: ClusterId,
    pub(crate) term: Term,
    /// What is written into tokens.
    pub(crate) endpoints: Vec<Endpoint>,
    pub(crate) timing: Timing,
    /// The file system of the state.
    pub(crate) disk: DiskGuard,
    /// Cancelled when the server is to end: streams end themselves.
    pub(crate) stop: CancellationToken,
    pub(crate) followers: Arc<Semaphore>,
    pub(crate) failures: FailureLimit,
    /// Who starts this process again if a self test kills it.
    pub(crate) restart: Restart,
    /// Agents that can be told to make trouble for a self test.
    pub(crate) faults: FaultLines,
}

impl Shared {
    /// Reads from the store outside the async threads.
    async fn stored<T: Send + 'static>(
        &self,
        read: impl FnOnce(&dyn Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Refusal> {
        let store = self.store.clone();
        blocking(move || read(&*store)).await.map_err(|error| {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "the state could not be read"
            );
            Refusal::new(
                ErrorCode::Internal,
                "STORE",
                "the coordinator could not read its state; its log says why",
            )
        })
    }

    /// A place among the followers.
    fn follower(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        self.followers.clone().try_acquire_owned().map_err(|_| {
            Refusal::new(
                ErrorCode::Exhausted,
                "TOO_MANY_FOLLOWERS",
                format!("{MAX_FOLLOWERS} watches and readers of output are open, as many as there may be; close some"),
            )
        })
    }
}

/// A stream of answers.
type Answers<T> = ReceiverStream<Result<T, Status>>;
/// Where a task puts the answers of a stream.
type Sender<T> = mpsc::Sender<Result<T, Status>>;

fn answers<T>() -> (Sender<T>, Answers<T>) {
    let (sender, receiver) = mpsc::channel(ANSWER_QUEUE);
    (sender, ReceiverStream::new(receiver))
}

/// The refusal of a stream whose coordinator ends.
fn shutting_down() -> Refusal {
    Refusal::new(
        ErrorCode::Unavailable,
        "STOPPING",
        "the coordinator is stopping; running jobs are not affected; connect again",
    )
}

fn reply<T>(result: Result<T, Refusal>) -> Result<Response<T>, Status> {
    result
        .map(Response::new)
        .map_err(|refusal| to_status(&refusal))
}

/// The core answered a request with the answer to another one: an own bug that must not end the process.
fn unexpected(answer: &Answer) -> Refusal {
    tracing::error!(
        ?answer,
        "the core gave an answer that does not belong to the request"
    );
    Refusal::new(
        ErrorCode::Internal,
        "UNEXPECTED_ANSWER",
        "the coordinator gave an answer that it should not give",
    )
}

fn not_found(what: impl std::fmt::Display) -> Refusal {
    Refusal::new(
        ErrorCode::NotFound,
        "NOT_FOUND",
        format!("there is no {what} here"),
    )
}
