//! A connection to the coordinator, and waiting for one that is away.

use std::future::Future;
use std::time::Duration;

use tonic::transport::Channel;
use tonic::{Code, Status};
use trainyard_common::limits::MAX_MESSAGE;
use trainyard_proto::v1::admin_service_client::AdminServiceClient;
use trainyard_proto::v1::job_service_client::JobServiceClient;
use trainyard_proto::v1::log_service_client::LogServiceClient;
use trainyard_proto::v1::node_service_client::NodeServiceClient;
use trainyard_transport::client;
use trainyard_transport::skew;

use crate::args::Global;
use crate::context::{self, Context};
use crate::failure::Failure;
use crate::output;
use crate::paths::Paths;

/// An answer may be a page of rows; the coordinator closes pages well below this.
const MAX_ANSWER: usize = 4 * MAX_MESSAGE;
/// Waits between tries while the coordinator is away: short at first, so that a restart is hardly noticed.
const RETRY_WAITS: [Duration; 4] = [
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(3),
];

/// A connection with an identity.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    /// Reconnects by itself.
    pub(crate) channel: Channel,
}

/// Connects to the cluster that the user means.
pub(crate) async fn connect(global: &Global) -> Result<Connection, Failure> {
    let paths = Paths::new(global)?;
    open(&context::require(global, &paths)?).await
}

/// Connects to the cluster that the user means, and starts one on this machine if none is configured.
pub(crate) async fn connect_or_start(global: &Global) -> Result<Connection, Failure> {
    let paths = Paths::new(global)?;
    match context::find(global, &paths)? {
        Some(context) => open(&context).await,
        None => open(&crate::embedded::start(&paths).await?).await,
    }
}

/// Connects to one cluster.
pub(crate) async fn open(context: &Context) -> Result<Connection, Failure> {
    let credentials = &context.credentials;
    let certificate = credentials
        .client_cert()
        .map_err(|error| Failure::chain(crate::failure::EXIT_IO, "CREDENTIALS", &error))?;
    let channel =
        client::connect(&context.endpoints, &credentials.trust(), Some(&certificate)).await?;
    Ok(Connection { channel })
}

impl Connection {
    pub(crate) fn jobs(&self) -> JobServiceClient<Channel> {
        JobServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    pub(crate) fn nodes(&self) -> NodeServiceClient<Channel> {
        NodeServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    pub(crate) fn logs(&self) -> LogServiceClient<Channel> {
        LogServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    pub(crate) fn admin(&self) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }
}

/// Whether the coordinator was not there to answer, so that the same request may be made again.
pub(crate) fn is_away(status: &Status) -> bool {
    let refused = trainyard_transport::client::connect_error(status)
        .is_some_and(|error| !error.is_unreachable())
        || skew::says_expired(status);
    let broken = matches!(
        status.code(),
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal
    ) && std::error::Error::source(status).is_some();
    !refused && (broken || status.code() == Code::Unavailable)
}

/// Tells once that the coordinator is away, waits longer with each try, and tells that it is back.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    tries: usize,
    quiet: bool,
}

impl Patience {
    /// For what goes on beside something that tells already.
    pub(crate) fn quiet() -> Self {
        Self {
            tries: 0,
            quiet: true,
        }
    }

    /// Waits before the next try.
    pub(crate) async fn wait(&mut self) {
        // One short gap is a restart that nobody needs to hear of.
        if self.tries == 1 && !self.quiet {
            output::note(
                "the coordinator is unreachable; your jobs are not affected; waiting for it",
            );
        }
        tokio::time::sleep(RETRY_WAITS[self.tries.min(RETRY_WAITS.len() - 1)]).await;
        self.tries += 1;
    }

    /// The coordinator answered.
    pub(crate) fn reset(&mut self) {
        if self.tries > 1 && !self.quiet {
            output::note("the coordinator is back");
        }
        self.tries = 0;
    }
}

/// Makes a request that may be repeated until the coordinator answers it.
pub(crate) async fn patiently<T, F>(mut request: impl FnMut() -> F) -> Result<T, Failure>
where
    F: Future<Output = Result<T, Status>>,
{
    let mut patience = Patience::default();
    loop {
        match request().await {
            Ok(answer) => {
                patience.reset();
                return Ok(answer);
            }
            Err(status) if is_away(&status) => patience.wait().await,
            Err(status) => return Err(status.into()),
        }
    }
}
