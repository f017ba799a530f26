//! The server's end: accepts TCP connections, shakes hands concurrently and within bounds, and says who is there.
//!
//! A client certificate is optional, as enrolment has none yet; one that does not verify ends the connection. What a
//! peer may do is decided per request by whoever uses [`Peer`]. A revoked certificate passes here on purpose: a TLS 1.3
//! client sees a refusal as a random error at its first request, whereas a refused request can say why.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::Stream;
use tonic::transport::server::Connected;
use trainyard_common::ids::ClusterId;

use crate::connections::{Connections, Peer, Registration};
use crate::identity::SpiffeId;
use crate::pki::{self, PkiError, ServerCert};
use crate::socket;
use crate::task::{AbortOnDrop, spawn};
use crate::tls::{self, Current};

/// Bytes of HTTP/2's connection preface, which a client sends first.
const PREFACE_BYTES: usize = 24;
/// Finished handshakes that wait for the server to take them.
const READY_QUEUE: usize = 64;
/// Pauses after accept() failed for want of files or memory: the first, and the longest.
const ACCEPT_BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// The server's certificate and whom it trusts. Clones share both.
#[derive(Clone)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    current: Arc<Current>,
    cluster: ClusterId,
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls")
            .field("current", &self.current)
            .finish_non_exhaustive()
    }
}

impl ServerTls {
    /// Presents `cert`, and trusts clients with a certificate of the authority in `ca_pem` and of the same cluster.
    ///
    /// # Errors
    /// If one of the texts cannot be used.
    pub fn new(ca_pem: &str, cert: &ServerCert) -> Result<Self, PkiError> {
        let provider = tls::provider();
        let unusable = |_| PkiError::BadCertificate {
            reason: "it is not an authority's",
        };
        let verifier = WebPkiClientVerifier::builder_with_provider(
            Arc::new(tls::roots(ca_pem)?),
            provider.clone(),
        )
        .allow_unauthenticated()
        .build()
        .map_err(unusable)?;
        let current = Arc::new(Current::new(&cert.chain_pem, &cert.key_pem)?);
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(tls::VERSIONS)
            .expect("the provider supports TLS 1.3")
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(current.clone());
        config.alpn_protocols = vec![tls::ALPN.to_vec()];
        // No resumption: it would carry an old certificate's identity past its end and past a renewal.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let cluster = pki::inspect_pem(&cert.chain_pem)?.spiffe.cluster;
        Ok(Self {
            config: Arc::new(config),
            current,
            cluster,
        })
    }

    /// Presents another certificate from now on; open connections live on.
    ///
    /// # Errors
    /// If it cannot be used; the old one stays then.
    pub fn replace(&self, cert: &ServerCert) -> Result<(), PkiError> {
        self.current.replace(&cert.chain_pem, &cert.key_pem)
    }
}

/// The bounds of a server's connections.
#[derive(Debug, Clone)]
pub struct ServerLimits {
    /// Open connections. At the limit no more are accepted; they wait in the kernel's queue.
    pub max_connections: usize,
    /// Handshakes at a time. At the limit likewise. One remote address may have half of them; more are dropped.
    pub max_handshakes: usize,
    /// Open connections without a certificate. More are dropped.
    pub max_anonymous: usize,
    /// Open connections of one identity. More are dropped.
    pub max_per_identity: usize,
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// How long after the handshake HTTP/2's preface may take.
    pub preface_timeout: Duration,
    /// How long a connection without a certificate may stay: it only enrols.
    pub anonymous_lifetime: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            // Two for each of 20,000 nodes (session, bulk data) and as many again for users; about 50 KiB each.
            max_connections: 60_000,
            // A handshake takes about a millisecond of CPU: half a second of work for a core at most.
            max_handshakes: 512,
            // An enrolment takes a second; a fleet of machines that starts at once comes again after a pause.
            max_anonymous: 512,
            // A user's scripts may follow many jobs at once; a broken loop must not take the place of all others.
            max_per_identity: 2048,
            handshake_timeout: Duration::from_secs(10),
            preface_timeout: Duration::from_secs(10),
            anonymous_lifetime: Duration::from_secs(60),
        }
    }
}

/// Accepts connections from `listener` for as long as the stream lives.
///
/// The stream never ends and never yields an error: what fails is one connection, never the server. Each connection is
/// in `connections` while it is open.
///
/// Must be called inside a tokio runtime.
pub fn incoming(
    listener: TcpListener,
    tls: ServerTls,
    limits: ServerLimits,
    connections: Connections,
) -> Incoming {
    let (sender, ready) = mpsc::channel(READY_QUEUE);
    let acceptor = Arc::new(Acceptor {
        tls: TlsAcceptor::from(tls.config),
        cluster: tls.cluster,
        slots: Arc::new(Semaphore::new(limits.max_connections)),
        handshakes: Arc::new(Semaphore::new(limits.max_handshakes)),
        by_address: ByAddress {
            most: limits.max_handshakes.div_ceil(2),
            counts: Arc::default(),
        },
        limits,
        connections,
        ready: sender,
    });
    let task = AbortOnDrop(spawn("accept", accept_loop(listener, acceptor)));
    Incoming { ready, _task: task }
}

/// Connections whose handshake is done, for tonic's `serve_with_incoming_shutdown`. Dropping it closes the port.
#[derive(Debug)]
pub struct Incoming {
    ready: mpsc::Receiver<TlsConnection>,
    _task: AbortOnDrop,
}

impl Stream for Incoming {
    type Item = io::Result<TlsConnection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.ready
            .poll_recv(context)
            .map(|connection| connection.map(Ok))
    }
}

/// Where TCP connections come from; a trait so that a test can let it fail.
trait Accept: Send + 'static {
    fn accept(&mut self) -> impl Future<Output = io::Result<(TcpStream, SocketAddr)>> + Send;
}

impl Accept for TcpListener {
    async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        TcpListener::accept(self).await
    }
}

struct Acceptor {
    tls: TlsAcceptor,
    cluster: ClusterId,
    slots: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    by_address: ByAddress,
    limits: ServerLimits,
    connections: Connections,
    ready: mpsc::Sender<TlsConnection>,
}

async fn accept_loop(mut listener: impl Accept, acceptor: Arc<Acceptor>) {
    let mut backoff = ACCEPT_BACKOFF.0;
    loop {
        // The permits come first: a connection that we cannot serve stays in the kernel's queue.
        let Ok(slot) = acceptor.slots.clone().acquire_owned().await else {
            return;
        };
        let Ok(handshake) = acceptor.handshakes.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, addr)) => {
                backoff = ACCEPT_BACKOFF.0;
                let Some(guard) = acceptor.by_address.enter(addr.ip()) else {
                    tracing::warn!(%addr, "too many handshakes from one address, connection dropped");
                    continue;
                };
                let acceptor = acceptor.clone();
                spawn("handshake", async move {
                    acceptor.handshake(stream, addr, slot).await;
                    drop((handshake, guard));
                });
            }
            Err(error) if concerns_one_connection(&error) => {}
            Err(error) => {
                // Out of files or memory. Trying at once would spin; giving up would end the server.
                tracing::warn!(%error, pause_ms = backoff.as_millis(), "accept failed");
                drop((slot, handshake));
                sleep(backoff).await;
                backoff = (backoff * 2).min(ACCEPT_BACKOFF.1);
            }
        }
    }
}

/// accept() reports some errors of the connection it would have returned as its own.
fn concerns_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

impl Acceptor {
    async fn handshake(&self, stream: TcpStream, addr: SocketAddr, slot: OwnedSemaphorePermit) {
        socket::tune(&stream);
        let stream = match timeout(self.limits.handshake_timeout, self.tls.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            // A scanner, a health check, a foreign certificate: the peer's affair, and often a lot of them.
            Ok(Err(error)) => return tracing::debug!(%addr, %error, "tls handshake failed"),
            Err(_) => return tracing::debug!(%addr, "tls handshake timed out"),
        };
        let peer = match self.peer(&stream, addr) {
            Ok(peer) => peer,
            Err(error) => {
                // Our authority signed it and yet it names nobody here: that never happens by itself.
                return tracing::warn!(%addr, %error, "certificate without a usable identity");
            }
        };
        let anonymous = peer.identity.is_none();
        let most = if anonymous {
            self.limits.max_anonymous
        } else {
            self.limits.max_per_identity
        };
        let Some(registration) = self.connections.register(peer, most) else {
            return tracing::warn!(%addr, limit = most, "too many connections, connection dropped");
        };
        let connection = TlsConnection {
            stream,
            registration,
            closing: false,
            preface: Some(Preface {
                missing: PREFACE_BYTES,
                deadline: Box::pin(sleep(self.limits.preface_timeout)),
            }),
            lifetime: anonymous.then(|| Box::pin(sleep(self.limits.anonymous_lifetime))),
            _slot: slot,
        };
        // An error means that the server is gone; the connection goes with it.
        let _ = self.ready.send(connection).await;
    }

    fn peer(&self, stream: &TlsStream<TcpStream>, addr: SocketAddr) -> Result<Peer, BadPeer> {
        let anonymous = Peer {
            addr,
            identity: None,
            serial: None,
            not_after: None,
            connection_id: 0,
        };
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let Some(leaf) = chain.first() else {
            return Ok(anonymous);
        };
        let info = pki::inspect(leaf)?;
        let SpiffeId { cluster, identity } = info.spiffe;
        if cluster != self.cluster {
            return Err(BadPeer::Cluster { cluster });
        }
        Ok(Peer {
            identity: Some(identity),
            serial: Some(info.serial),
            not_after: Some(info.not_after),
            ..anonymous
        })
    }
}

#[derive(Debug, thiserror::Error)]
enum BadPeer {
    #[error(transparent)]
    Certificate(#[from] PkiError),
    #[error("the certificate is for cluster {cluster}")]
    Cluster { cluster: ClusterId },
}

/// How many handshakes each remote address has, so that one of them cannot take all.
#[derive(Clone)]
struct ByAddress {
    most: usize,
    counts: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl ByAddress {
    fn enter(&self, address: IpAddr) -> Option<AddressGuard> {
        // Whole clusters live on one machine in tests and in `yard up`; who is on this machine has other means.
        let counted = !address.is_loopback();
        if counted {
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            let count = counts.entry(address).or_default();
            if *count >= self.most {
                return None;
            }
            *count += 1;
        }
        Some(AddressGuard {
            address,
            counted,
            by_address: self.clone(),
        })
    }
}

struct AddressGuard {
    address: IpAddr,
    counted: bool,
    by_address: ByAddress,
}

impl Drop for AddressGuard {
    fn drop(&mut self) {
        if !self.counted {
            return;
        }
        let mut counts = self
            .by_address
            .counts
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

/// An open connection to a peer that we know, or know to be anonymous.
#[derive(Debug)]
pub struct TlsConnection {
    stream: TlsStream<TcpStream>,
    registration: Registration,
    /// Whether the register told it to close.
    closing: bool,
    /// Until the preface is complete.
    preface: Option<Preface>,
    /// For anonymous ones.
    lifetime: Option<Pin<Box<Sleep>>>,
    _slot: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Preface {
    missing: usize,
    deadline: Pin<Box<Sleep>>,
}

impl TlsConnection {
    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.registration.peer
    }

    /// Ready with an error once the connection must end for a reason of ours.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        if self.closing
            || Pin::new(&mut self.registration.closed)
                .poll(context)
                .is_ready()
        {
            // Remembered, as the receiver must not be asked again.
            self.closing = true;
            return Poll::Ready(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "closed by the coordinator",
            ));
        }
        if let Some(lifetime) = &mut self.lifetime {
            ready!(lifetime.as_mut().poll(context));
            return Poll::Ready(timed_out(
                "a connection without a certificate was open for too long",
            ));
        }
        Poll::Pending
    }

    /// Counts the preface's bytes; ready with an error once they are late.
    fn poll_preface(&mut self, received: usize, context: &mut Context<'_>) -> Poll<io::Error> {
        let Some(preface) = &mut self.preface else {
            return Poll::Pending;
        };
        preface.missing = preface.missing.saturating_sub(received);
        if preface.missing == 0 {
            self.preface = None;
            return Poll::Pending;
        }
        ready!(preface.deadline.as_mut().poll(context));
        Poll::Ready(timed_out("no HTTP/2 preface in time"))
    }
}

fn timed_out(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, reason)
}

impl Connected for TlsConnection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer().clone()
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Poll::Ready(error) = self.poll_end(context) {
            return Poll::Ready(Err(error));
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        let received = buffer.filled().len() - before;
        match self.poll_preface(received, context) {
            Poll::Ready(error) if read.is_pending() => Poll::Ready(Err(error)),
            _ => read,
        }
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(error) = self.poll_end(context) {
            return Poll::Ready(Err(error));
        }
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(error) = self.poll_end(context) {
            return Poll::Ready(Err(error));
        }
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(error) = self.poll_end(context) {
            return Poll::Ready(Err(error));
        }
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests;
