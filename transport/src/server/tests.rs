//! The server's side with real handshakes on loopback. Rows A and B of the attack list are named `attack_…`.

use std::collections::VecDeque;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_stream::StreamExt;

use super::*;
use crate::client::Dialer;
use crate::pki::LEAF_VALIDITY;
use crate::testing::{Cluster, Server, listener, long_ago, node, now, soon};
use crate::tls::ClientCert;

type Client = tokio_rustls::client::TlsStream<crate::gate::Gated>;

async fn dial(cluster: &Cluster, server: &Server, client: Option<&ClientCert>) -> Client {
    let dialer = Dialer::new(
        std::slice::from_ref(&server.endpoint),
        &cluster.trust(),
        client,
    )
    .unwrap();
    soon("a connection", dialer.dial()).await.unwrap()
}

async fn accept(server: &mut Server) -> TlsConnection {
    soon("an accepted connection", server.incoming.next())
        .await
        .unwrap()
        .unwrap()
}

/// Reads until the connection ends, in whichever way.
async fn wait_for_end(stream: &mut (impl AsyncRead + Unpin)) {
    let mut buffer = [0; 64];
    let end = async { while !matches!(stream.read(&mut buffer).await, Ok(0) | Err(_)) {} };
    soon("the end of a connection", end).await;
}

#[tokio::test]
async fn a_node_is_known_by_its_certificate() {
    let cluster = Cluster::new();
    let mut server = cluster.serve().await;
    let cert = cluster.client(&node(7));
    let mut client = dial(&cluster, &server, Some(&cert)).await;
    let mut connection = accept(&mut server).await;

    let peer = connection.connect_info();
    assert_eq!(peer.identity, Some(node(7)));
    assert_eq!(peer.serial, Some(cert.info().serial));
    assert_eq!(peer.not_after, Some(cert.not_after()));
    assert_eq!(peer.addr, client.get_ref().0.local_addr().unwrap());
    assert_eq!(client.get_ref().1.alpn_protocol(), Some(tls::ALPN));
    assert_eq!(server.connections.list(), [peer]);

    client.write_all(b"ping").await.unwrap();
    let mut buffer = [0; 4];
    connection.read_exact(&mut buffer).await.unwrap();
    connection.write_all(&buffer).await.unwrap();
    connection.flush().await.unwrap();
    client.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"ping");

    drop(connection);
    assert!(server.connections.is_empty());
}

#[tokio::test]
async fn attack_b01_without_a_certificate_a_peer_is_anonymous() {
    let cluster = Cluster::new();
    let mut server = cluster.serve().await;
    let _client = dial(&cluster, &server, None).await;
    let connection = accept(&mut server).await;
    assert_eq!(connection.peer().identity, None);
    assert_eq!(connection.peer().serial, None);
}

#[tokio::test]
async fn attack_b02_foreign_and_expired_certificates_do_not_get_in() {
    let cluster = Cluster::new();
    let mut server = cluster.serve().await;
    // The same cluster id and identity, but another authority.
    let foreign = Cluster::new().client(&node(7));
    let (cert, key) = cluster.issue(&node(7), long_ago());
    let expired = ClientCert::new(&cert, &key).unwrap();
    for bad in [foreign, expired] {
        let mut client = dial(&cluster, &server, Some(&bad)).await;
        wait_for_end(&mut client).await;
    }
    let _client = dial(&cluster, &server, Some(&cluster.client(&node(8)))).await;
    assert_eq!(accept(&mut server).await.peer().identity, Some(node(8)));
    assert_eq!(
        server.connections.len(),
        0,
        "only the good one was ever there"
    );
}

#[tokio::test]
async fn a_stalled_handshake_does_not_block_others() {
    let cluster = Cluster::new();
    let mut server = cluster.serve().await;
    let address = server.endpoint.to_string();
    let _stalled = TcpStream::connect(&address).await.unwrap();
    let mut half = TcpStream::connect(&address).await.unwrap();
    half.write_all(&[0x16, 3, 1, 2, 0]).await.unwrap();
    let _client = dial(&cluster, &server, None).await;
    accept(&mut server).await;
}

#[tokio::test]
async fn stalled_handshakes_give_their_places_back() {
    let cluster = Cluster::new();
    let limits = ServerLimits {
        max_handshakes: 1,
        handshake_timeout: Duration::from_millis(50),
        ..ServerLimits::default()
    };
    let mut server = Server::start(cluster.server_tls(), limits).await;
    let mut stalled = TcpStream::connect(server.endpoint.to_string())
        .await
        .unwrap();
    let _client = dial(&cluster, &server, None).await;
    accept(&mut server).await;
    wait_for_end(&mut stalled).await;
}

#[tokio::test]
async fn a_connection_without_preface_ends_and_one_with_it_stays() {
    let cluster = Cluster::new();
    let limits = ServerLimits {
        preface_timeout: Duration::from_millis(50),
        ..ServerLimits::default()
    };
    let mut server = Server::start(cluster.server_tls(), limits).await;
    let mut silent = dial(&cluster, &server, None).await;
    let mut connection = accept(&mut server).await;
    silent
        .write_all(&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..23])
        .await
        .unwrap();
    silent.flush().await.unwrap();
    let mut buffer = [0; 64];
    let error = loop {
        match soon("the timeout", connection.read(&mut buffer)).await {
            Ok(0) => panic!("the client is still there"),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);

    let mut good = dial(&cluster, &server, None).await;
    let mut connection = accept(&mut server).await;
    good.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    good.flush().await.unwrap();
    let mut preface = [0; 24];
    soon("the preface", connection.read_exact(&mut preface))
        .await
        .unwrap();
    assert!(connection.preface.is_none());
}

#[tokio::test]
async fn anonymous_connections_have_an_end() {
    let cluster = Cluster::new();
    let limits = ServerLimits {
        anonymous_lifetime: Duration::from_millis(50),
        ..ServerLimits::default()
    };
    let mut server = Server::start(cluster.server_tls(), limits).await;
    let _client = dial(&cluster, &server, None).await;
    let mut connection = accept(&mut server).await;
    let error = soon("the end", connection.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);

    let cert = cluster.client(&node(1));
    let _known = dial(&cluster, &server, Some(&cert)).await;
    assert!(accept(&mut server).await.lifetime.is_none());
}

#[tokio::test]
async fn attack_b12_a_revoked_peer_is_cut_off_while_it_reads_or_writes() {
    let cluster = Cluster::new();
    let mut server = cluster.serve().await;
    let mut client = dial(&cluster, &server, Some(&cluster.client(&node(7)))).await;
    let mut connection = accept(&mut server).await;
    let read = tokio::task::JoinSet::from_iter([async move {
        let read = connection.read_u8().await;
        let written = connection.write_all(b"x").await;
        (read.unwrap_err().kind(), written.is_ok())
    }]);
    assert_eq!(server.connections.close_identity(&node(7)), 1);
    let ended = soon("the read", read.join_all()).await;
    assert_eq!(ended, [(io::ErrorKind::ConnectionAborted, false)]);
    wait_for_end(&mut client).await;
    assert!(server.connections.is_empty());
}

#[tokio::test]
async fn limits_drop_the_connections_beyond_them() {
    let cluster = Cluster::new();
    let limits = ServerLimits {
        max_anonymous: 1,
        max_per_identity: 1,
        ..ServerLimits::default()
    };
    let mut server = Server::start(cluster.server_tls(), limits).await;
    for cert in [None, Some(cluster.client(&node(1)))] {
        let _first = dial(&cluster, &server, cert.as_ref()).await;
        let connection = accept(&mut server).await;
        let mut second = dial(&cluster, &server, cert.as_ref()).await;
        wait_for_end(&mut second).await;
        assert_eq!(server.connections.len(), 1);
        drop(connection);
        let _third = dial(&cluster, &server, cert.as_ref()).await;
        accept(&mut server).await;
    }
}

#[tokio::test]
async fn at_the_connection_limit_the_next_waits_for_a_place() {
    let cluster = Cluster::new();
    let limits = ServerLimits {
        max_connections: 1,
        ..ServerLimits::default()
    };
    let mut server = Server::start(cluster.server_tls(), limits).await;
    let _first = dial(&cluster, &server, None).await;
    let first = accept(&mut server).await;
    let endpoints = [server.endpoint.clone()];
    let dialer = Dialer::new(&endpoints, &cluster.trust(), None).unwrap();
    let mut second = tokio::task::JoinSet::from_iter([async move { dialer.dial().await }]);
    tokio::task::yield_now().await;
    assert!(second.try_join_next().is_none());
    drop(first);
    let _second = soon("the second", second.join_next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    accept(&mut server).await;
}

#[tokio::test]
async fn certificates_are_replaced_without_a_restart() {
    let cluster = Cluster::new();
    let tls = cluster.server_tls();
    let mut server = Server::start(tls.clone(), ServerLimits::default()).await;
    let cert = cluster.client(&node(1));
    let serial = |client: &Client| {
        pki::inspect(&client.get_ref().1.peer_certificates().unwrap()[0])
            .unwrap()
            .serial
    };
    let mut old = dial(&cluster, &server, Some(&cert)).await;
    let old_peer = accept(&mut server).await;

    tls.replace(&cluster.server_cert()).unwrap();
    let (renewed, key) = cluster.issue(&node(1), now());
    cert.replace(&renewed, &key).unwrap();
    let new = dial(&cluster, &server, Some(&cert)).await;
    let new_peer = accept(&mut server).await;
    assert_ne!(serial(&old), serial(&new));
    assert_ne!(old_peer.peer().serial, new_peer.peer().serial);
    assert_eq!(new_peer.peer().identity, Some(node(1)));
    old.write_all(b"still open").await.unwrap();

    let (other, _) = cluster.issue(&node(1), now());
    assert!(matches!(
        cert.replace(&other, &key),
        Err(PkiError::KeyMismatch)
    ));
    assert_eq!(Some(cert.info().serial), new_peer.peer().serial);
}

/// Fails as often as it is told to, then is a real listener.
struct Flaky(VecDeque<io::Error>, TcpListener);

impl Accept for Flaky {
    async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        match self.0.pop_front() {
            Some(error) => Err(error),
            None => TcpListener::accept(&self.1).await,
        }
    }
}

#[tokio::test]
async fn attack_a13_accept_survives_a_storm_of_errors() {
    let cluster = Cluster::new();
    let mut server = cluster.serve().await;
    let tls = cluster.server_tls();
    let (listener, endpoint) = listener().await;
    let codes = [
        nix::libc::EMFILE,
        nix::libc::ECONNABORTED,
        nix::libc::ENOBUFS,
    ];
    let errors = codes.map(io::Error::from_raw_os_error).into();
    let (sender, ready) = mpsc::channel(1);
    let limits = ServerLimits::default();
    let acceptor = Acceptor {
        tls: TlsAcceptor::from(tls.config),
        cluster: tls.cluster,
        slots: Arc::new(Semaphore::new(1)),
        handshakes: Arc::new(Semaphore::new(1)),
        by_address: ByAddress {
            most: 1,
            counts: Arc::default(),
        },
        limits,
        connections: Connections::new(),
        ready: sender,
    };
    let task = AbortOnDrop(spawn(
        "accept",
        accept_loop(Flaky(errors, listener), Arc::new(acceptor)),
    ));
    server.incoming = Incoming { ready, _task: task };
    server.endpoint = endpoint;
    let _client = dial(&cluster, &server, None).await;
    accept(&mut server).await;
}

#[test]
fn one_address_gets_half_of_the_handshakes_and_loopback_all() {
    let by_address = ByAddress {
        most: 2,
        counts: Arc::default(),
    };
    let remote: IpAddr = [10, 0, 0, 1].into();
    let first = by_address.enter(remote).unwrap();
    let _second = by_address.enter(remote).unwrap();
    assert!(by_address.enter(remote).is_none());
    assert!(by_address.enter([10, 0, 0, 2].into()).is_some());
    drop(first);
    assert!(by_address.enter(remote).is_some());
    let local: Vec<_> = (0..9)
        .map(|_| by_address.enter([127, 0, 0, 1].into()).unwrap())
        .collect();
    assert_eq!(local.len(), 9);
    drop((local, _second));
    assert!(by_address.counts.lock().unwrap().is_empty());
}

#[tokio::test]
async fn dropping_the_stream_closes_the_port() {
    let cluster = Cluster::new();
    let server = cluster.serve().await;
    drop(server.incoming);
    let closed = async {
        while TcpStream::connect(server.endpoint.to_string())
            .await
            .is_ok()
        {
            tokio::task::yield_now().await;
        }
    };
    soon("the closed port", closed).await;
}

#[test]
fn a_server_needs_a_certificate_with_its_own_key() {
    let cluster = Cluster::new();
    let mut cert = cluster.server_cert();
    cert.key_pem = cluster.server_cert().key_pem;
    let ca = cluster.authority.cert_pem();
    assert!(matches!(
        ServerTls::new(ca, &cert),
        Err(PkiError::KeyMismatch)
    ));
    assert!(ServerTls::new("", &cluster.server_cert()).is_err());
    assert!(
        cluster
            .authority
            .issue_server(&[], LEAF_VALIDITY, now())
            .is_ok()
    );
}
