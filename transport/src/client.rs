//! The client's end: finds a coordinator that answers, makes sure that it is ours, and gives a gRPC channel that
//! reconnects by itself.
//!
//! **What is verified.** The server must present a certificate of the cluster's own authority whose URI is
//! `spiffe://<cluster>/coordinator`. Host names and addresses are *not* compared: this authority signs for one cluster
//! only and gives that URI to coordinators alone, so the URI says more than a name could; and an endpoint may be any
//! address that leads there (a NAT, a tunnel, an address of tomorrow), which no certificate could list.
//!
//! A client certificate that the server does not accept (expired, other authority) does not show here: in TLS 1.3 the
//! handshake is done for the client before the server has looked. The first request fails instead, in one of several
//! ways; check [`crate::tls::ClientCert::not_after`] first and treat such a failure as "renew or enrol again".

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::client::Resumption;
use rustls::pki_types::{ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Uri};
use trainyard_common::ids::ClusterId;
use trainyard_common::time::Timestamp;
use trainyard_common::units::format_duration;

use crate::endpoint::Endpoint;
use crate::gate::{self, Gate, Gated};
use crate::pki::PkiError;
use crate::socket;
use crate::tls::{self, ClientCert};
use crate::verify::CoordinatorVerifier;

/// How long one endpoint may take for TCP and for TLS, each.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// HTTP/2 pings, also while nothing is asked: they keep NAT entries alive and notice a dead coordinator.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// A ping without an answer for this long ends the connection.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// The name in the handshake, always the same: nobody reads it, and the real one is nobody's business on the way.
const SERVER_NAME: &str = "coordinator.trainyard.invalid";

/// By what the coordinator is recognised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// After enrolment: by the authority's certificate.
    Ca {
        /// The authority's certificate in PEM.
        ca_pem: String,
        /// The cluster.
        cluster: ClusterId,
    },
    /// For enrolment: by the hash of the authority's certificate, from the join token. The server sends the certificate
    /// along; it counts only if it has this hash and verifies the server's own certificate.
    CaHash {
        /// [`crate::pki::Authority::hash`].
        hash: [u8; 32],
        /// The cluster.
        cluster: ClusterId,
    },
}

/// Connects to the first of `endpoints` that answers and is the coordinator.
///
/// The channel reconnects when it must, then trying all endpoints again, beginning with the one that worked last; and
/// each time with the newest certificate of `client`.
///
/// # Errors
/// [`ConnectError`], with what was wrong at each endpoint.
pub async fn connect(
    endpoints: &[Endpoint],
    trust: &Trust,
    client: Option<&ClientCert>,
) -> Result<Channel, ConnectError> {
    connect_through(&Gate::default(), endpoints, trust, client).await
}

/// The same through a gate: the channel fails while that is closed.
///
/// # Errors
/// As [`connect`].
pub async fn connect_through(
    gate: &Gate,
    endpoints: &[Endpoint],
    trust: &Trust,
    client: Option<&ClientCert>,
) -> Result<Channel, ConnectError> {
    let mut dialer = Dialer::new(endpoints, trust, client)?;
    dialer.gate = gate.clone();
    // Dialled here and not by tonic, so that the caller gets our error and not "transport error".
    let first = dialer.dial().await?;
    let connector = Connector {
        dialer,
        first: Some(first),
    };
    // `http`, as TLS is the connector's business: tonic refuses `https` without its own TLS.
    tonic::transport::Endpoint::from_static("http://coordinator")
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
        .map_err(|error| ConnectError::Http2(Arc::new(error)))
}

/// The [`ConnectError`] behind a failed request, if it failed because the channel could not reconnect.
#[must_use]
pub fn connect_error(status: &tonic::Status) -> Option<&ConnectError> {
    let mut error: Option<&(dyn std::error::Error + 'static)> = Some(status);
    while let Some(current) = error {
        if let Some(found) = current.downcast_ref::<ConnectError>() {
            return Some(found);
        }
        error = current.source();
    }
    None
}

/// Why no coordinator could be reached.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectError {
    /// There is nothing to connect to.
    #[error("there is no endpoint to connect to")]
    NoEndpoints,
    /// The own certificate or the authority's cannot be used.
    #[error("cannot use the certificates of this {what}")]
    Credentials {
        /// Whose.
        what: &'static str,
        /// What is wrong with them.
        #[source]
        source: Arc<PkiError>,
    },
    /// Whatever answers there is not vouched for by this cluster's authority: a wrong address, a cluster that was set
    /// up anew, or somebody in between. Nothing was sent to it.
    #[error(
        "CA hash mismatch: the server at {endpoint} has no certificate of this cluster's authority; nothing was sent \
         to it"
    )]
    CaMismatch {
        /// Where.
        endpoint: Endpoint,
    },
    /// No endpoint worked.
    #[error("cannot reach the coordinator: {}", list(failures))]
    Failed {
        /// What was wrong with each, in the order tried.
        failures: Vec<(Endpoint, EndpointFailure)>,
    },
    /// HTTP/2 could not be started on a connection that was open.
    #[error("cannot start HTTP/2 with the coordinator")]
    Http2(#[source] Arc<tonic::transport::Error>),
}

impl ConnectError {
    /// Whether waiting may help, as nothing answered; otherwise something answered that is not our coordinator, or we
    /// cannot be a client at all.
    #[must_use]
    pub fn is_unreachable(&self) -> bool {
        match self {
            Self::Failed { failures } => failures.iter().any(|(_, failure)| {
                !matches!(
                    failure,
                    EndpointFailure::NotCoordinator | EndpointFailure::NotTls
                )
            }),
            Self::Http2(_) => true,
            Self::NoEndpoints | Self::Credentials { .. } | Self::CaMismatch { .. } => false,
        }
    }

    fn from_failures(failures: Vec<(Endpoint, EndpointFailure)>) -> Self {
        // Somebody with a false certificate is worse than somebody who is not there, so it is what is told.
        let mismatch = failures
            .iter()
            .find(|(_, f)| matches!(f, EndpointFailure::CaMismatch));
        match mismatch {
            Some((endpoint, _)) => Self::CaMismatch {
                endpoint: endpoint.clone(),
            },
            None => Self::Failed { failures },
        }
    }
}

fn list(failures: &[(Endpoint, EndpointFailure)]) -> String {
    let texts: Vec<_> = failures
        .iter()
        .map(|(e, failure)| format!("{e}: {failure}"))
        .collect();
    texts.join("; ")
}

/// What was wrong at one endpoint.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EndpointFailure {
    /// The host name leads nowhere.
    #[error("the host name cannot be resolved")]
    Resolve(#[source] Arc<io::Error>),
    /// Nothing listens there.
    #[error("connection refused (is the coordinator running?)")]
    Refused,
    /// No answer within [`CONNECT_TIMEOUT`].
    #[error("no answer within {} s (firewall, or the machine is down)", CONNECT_TIMEOUT.as_secs())]
    Timeout,
    /// The network says that it cannot be reached, or broke off.
    #[error("{0}")]
    Network(Arc<io::Error>),
    /// Something else than TLS listens there.
    #[error("what listens there does not speak TLS")]
    NotTls,
    /// See [`ConnectError::CaMismatch`].
    #[error("it has no certificate of this cluster's authority")]
    CaMismatch,
    /// It has a certificate of this cluster's authority, but not a coordinator's.
    #[error("its certificate is not a coordinator's")]
    NotCoordinator,
    /// The server's certificate has ended or not begun by this machine's clock.
    #[error("its certificate is {0} (clock skew? check the clocks of both machines)")]
    CertificateTime(CertificateTime),
    /// TLS failed in another way.
    #[error("the TLS handshake failed: {0}")]
    Tls(Arc<io::Error>),
}

/// How a certificate and this machine's clock disagree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CertificateTime {
    /// It is over.
    Ended {
        /// When it ended.
        at: Timestamp,
        /// What this machine's clock said.
        clock: Timestamp,
    },
    /// It has not begun.
    NotBegun {
        /// When it begins.
        from: Timestamp,
        /// What this machine's clock said.
        clock: Timestamp,
    },
}

impl fmt::Display for CertificateTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, at, clock) = match self {
            Self::Ended { at, clock } => ("not valid after", at, clock),
            Self::NotBegun { from, clock } => ("not valid before", from, clock),
        };
        let apart = Duration::from_secs(clock.since(*at).max(at.since(*clock)).as_secs());
        write!(
            f,
            "{what} {}, and this machine's clock says {}, {} {}",
            at.utc(),
            clock.utc(),
            format_duration(apart),
            if clock >= at { "later" } else { "earlier" }
        )
    }
}

fn timestamp(time: UnixTime) -> Timestamp {
    Timestamp(time.as_secs().saturating_mul(1000))
}

impl EndpointFailure {
    fn of_tcp(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::TimedOut => Self::Timeout,
            _ => Self::Network(Arc::new(error)),
        }
    }

    fn of_tls(error: io::Error) -> Self {
        let Some(inner) = error
            .get_ref()
            .and_then(|e| e.downcast_ref::<rustls::Error>())
        else {
            return Self::Tls(Arc::new(error));
        };
        match inner {
            rustls::Error::InvalidMessage(_) => Self::NotTls,
            rustls::Error::InvalidCertificate(certificate) => match certificate {
                CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                    Self::CaMismatch
                }
                CertificateError::ApplicationVerificationFailure
                | CertificateError::InvalidPurpose
                | CertificateError::InvalidPurposeContext { .. } => Self::NotCoordinator,
                CertificateError::ExpiredContext { time, not_after } => {
                    Self::CertificateTime(CertificateTime::Ended {
                        at: timestamp(*not_after),
                        clock: timestamp(*time),
                    })
                }
                CertificateError::NotValidYetContext { time, not_before } => {
                    Self::CertificateTime(CertificateTime::NotBegun {
                        from: timestamp(*not_before),
                        clock: timestamp(*time),
                    })
                }
                _ => Self::Tls(Arc::new(error)),
            },
            _ => Self::Tls(Arc::new(error)),
        }
    }
}

/// Opens verified connections to whichever endpoint works.
#[derive(Clone)]
pub(crate) struct Dialer {
    endpoints: Arc<[Endpoint]>,
    connector: TlsConnector,
    /// The index of the endpoint that worked last.
    preferred: Arc<AtomicUsize>,
    gate: Gate,
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dialer")
            .field("endpoints", &self.endpoints)
            .finish_non_exhaustive()
    }
}

impl Dialer {
    pub(crate) fn new(
        endpoints: &[Endpoint],
        trust: &Trust,
        client: Option<&ClientCert>,
    ) -> Result<Self, ConnectError> {
        if endpoints.is_empty() {
            return Err(ConnectError::NoEndpoints);
        }
        let verifier =
            CoordinatorVerifier::new(trust).map_err(|source| ConnectError::Credentials {
                what: "cluster's authority",
                source: Arc::new(source),
            })?;
        let builder = ClientConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(tls::VERSIONS)
            .expect("the provider supports TLS 1.3")
            .dangerous() // rustls' word for an own verifier
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match client {
            Some(client) => builder.with_client_cert_resolver(client.resolver()),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![tls::ALPN.to_vec()];
        // A resumed session would skip the verification and present an old certificate.
        config.resumption = Resumption::disabled();
        Ok(Self {
            endpoints: endpoints.into(),
            connector: TlsConnector::from(Arc::new(config)),
            preferred: Arc::default(),
            gate: Gate::default(),
        })
    }

    /// The first endpoint that works, beginning with the one that worked last.
    pub(crate) async fn dial(&self) -> Result<TlsStream<Gated>, ConnectError> {
        let count = self.endpoints.len();
        let start = self.preferred.load(Ordering::Relaxed);
        let mut failures = Vec::with_capacity(count);
        for index in (0..count).map(|offset| (start + offset) % count) {
            let endpoint = &self.endpoints[index];
            match self.dial_one(endpoint).await {
                Ok(stream) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(stream);
                }
                Err(failure) => {
                    tracing::debug!(%endpoint, error = %failure, "endpoint failed");
                    failures.push((endpoint.clone(), failure));
                }
            }
        }
        Err(ConnectError::from_failures(failures))
    }

    async fn dial_one(&self, endpoint: &Endpoint) -> Result<TlsStream<Gated>, EndpointFailure> {
        if self.gate.is_closed() {
            return Err(EndpointFailure::Network(Arc::new(gate::cut())));
        }
        let stream = timeout(CONNECT_TIMEOUT, dial_tcp(endpoint))
            .await
            .map_err(|_| EndpointFailure::Timeout)??;
        socket::tune(&stream);
        let name = ServerName::try_from(SERVER_NAME).expect("the constant is a DNS name");
        let stream = self.gate.through(stream);
        timeout(CONNECT_TIMEOUT, self.connector.connect(name, stream))
            .await
            .map_err(|_| EndpointFailure::Timeout)?
            .map_err(EndpointFailure::of_tls)
    }
}

/// Tries each address of the host in turn.
async fn dial_tcp(endpoint: &Endpoint) -> Result<TcpStream, EndpointFailure> {
    let addresses = tokio::net::lookup_host((endpoint.host(), endpoint.port()))
        .await
        .map_err(|error| EndpointFailure::Resolve(Arc::new(error)))?;
    let mut last = None;
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = Some(EndpointFailure::of_tcp(error)),
        }
    }
    Err(last.unwrap_or_else(|| {
        EndpointFailure::Resolve(Arc::new(io::Error::other("the host name has no address")))
    }))
}

/// What tonic calls whenever it wants a connection.
#[derive(Debug)]
struct Connector {
    dialer: Dialer,
    /// The connection that [`connect`] opened.
    first: Option<TlsStream<Gated>>,
}

type Connecting =
    Pin<Box<dyn Future<Output = Result<TokioIo<TlsStream<Gated>>, ConnectError>> + Send>>;

impl tower::Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<Gated>>;
    type Error = ConnectError;
    type Future = Connecting;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Connecting {
        let first = self.first.take();
        let dialer = self.dialer.clone();
        Box::pin(async move {
            let stream = match first {
                Some(stream) => stream,
                None => dialer.dial().await?,
            };
            Ok(TokioIo::new(stream))
        })
    }
}

#[cfg(test)]
mod tests;
