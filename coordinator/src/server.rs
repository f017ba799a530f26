//! The one port: all services behind the authorisation layer, over the transport's TLS connections, within bounds.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use trainyard_common::limits::{MAX_ENROLL_MESSAGE, MAX_MESSAGE};
use trainyard_proto::DESCRIPTORS;
use trainyard_proto::v1::admin_service_server::AdminServiceServer;
use trainyard_proto::v1::agent_service_server::AgentServiceServer;
use trainyard_proto::v1::blob_service_server::BlobServiceServer;
use trainyard_proto::v1::enroll_service_server::EnrollServiceServer;
use trainyard_proto::v1::job_service_server::JobServiceServer;
use trainyard_proto::v1::log_service_server::LogServiceServer;
use trainyard_proto::v1::node_service_server::NodeServiceServer;
use trainyard_transport::server::Incoming;

use crate::auth::AuthLayer;
use crate::driver::FatalError;
use crate::grpc::{AdminApi, AgentApi, BlobApi, EnrollApi, JobApi, LogApi, NodeApi, Shared};
use trainyard_transport::task::{AbortOnDrop, spawn};

/// Pings on every connection, so that one whose peer vanished is noticed.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// A ping without an answer for this long ends the connection.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Calls at a time on one connection: an agent has three, a user's scripts some dozens.
const MAX_STREAMS: u32 = 256;
/// Bytes of the headers of one call.
const MAX_HEADERS: u32 = 32 << 10;
/// Bytes on the way to us of one call, and of one connection: two and eight chunks of a blob.
const WINDOWS: (u32, u32) = (512 << 10, 2 << 20);

/// Serves until `stop` is cancelled and every open call has ended.
pub(crate) fn start(
    shared: Arc<Shared>,
    gate: AuthLayer,
    incoming: Incoming,
    stop: CancellationToken,
) -> AbortOnDrop<Result<(), FatalError>> {
    AbortOnDrop(spawn("server", run(shared, gate, incoming, stop)))
}

async fn run(
    shared: Arc<Shared>,
    gate: AuthLayer,
    incoming: Incoming,
    stop: CancellationToken,
) -> Result<(), FatalError> {
    let (_health, health) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
    };
    let reflection_v1 = reflection()
        .build_v1()
        .expect("the descriptors were made by our own build");
    let reflection_alpha = reflection()
        .build_v1alpha()
        .expect("the descriptors were made by our own build");
    // Sizes are set for what comes in; what goes out is bounded by who makes it.
    let jobs = JobServiceServer::new(JobApi(shared.clone())).max_decoding_message_size(MAX_MESSAGE);
    let logs = LogServiceServer::new(LogApi(shared.clone())).max_decoding_message_size(MAX_MESSAGE);
    let nodes =
        NodeServiceServer::new(NodeApi(shared.clone())).max_decoding_message_size(MAX_MESSAGE);
    let blobs =
        BlobServiceServer::new(BlobApi(shared.clone())).max_decoding_message_size(MAX_MESSAGE);
    let agents =
        AgentServiceServer::new(AgentApi(shared.clone())).max_decoding_message_size(MAX_MESSAGE);
    let admin =
        AdminServiceServer::new(AdminApi(shared.clone())).max_decoding_message_size(MAX_MESSAGE);
    let enroll =
        EnrollServiceServer::new(EnrollApi(shared)).max_decoding_message_size(MAX_ENROLL_MESSAGE);
    Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADERS)
        .initial_stream_window_size(WINDOWS.0)
        .initial_connection_window_size(WINDOWS.1)
        .layer(gate)
        .add_service(jobs)
        .add_service(logs)
        .add_service(nodes)
        .add_service(blobs)
        .add_service(agents)
        .add_service(admin)
        .add_service(enroll)
        .add_service(health)
        .add_service(reflection_v1)
        .add_service(reflection_alpha)
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
        .await
        .map_err(FatalError::Server)
}
