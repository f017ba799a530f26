//! A cluster's authority, certificates and a listening server for the tests of this crate.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::net::TcpListener;
use trainyard_common::ids::{ClusterId, NodeId};
use trainyard_common::time::{Timestamp, millis};

use crate::client::Trust;
use crate::connections::Connections;
use crate::endpoint::Endpoint;
use crate::identity::Identity;
use crate::pki::{Authority, KeyPairPem, LEAF_VALIDITY, ServerCert};
use crate::server::{Incoming, ServerLimits, ServerTls, incoming};
use crate::tls::ClientCert;

pub(crate) fn now() -> Timestamp {
    Timestamp(millis(
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap(),
    ))
}

/// A time at which a certificate of [`LEAF_VALIDITY`] was issued that has ended by now.
pub(crate) fn long_ago() -> Timestamp {
    Timestamp(now().0 - millis(LEAF_VALIDITY) - 60_000)
}

pub(crate) fn node(number: u32) -> Identity {
    Identity::Node(NodeId(number))
}

pub(crate) struct Cluster {
    pub(crate) authority: Authority,
}

impl Cluster {
    pub(crate) fn new() -> Self {
        Self::with_id(1)
    }

    pub(crate) fn with_id(id: u8) -> Self {
        Self {
            authority: Authority::create(ClusterId([id; 16]), now()).unwrap(),
        }
    }

    pub(crate) fn trust(&self) -> Trust {
        Trust::Ca {
            ca_pem: self.authority.cert_pem().to_owned(),
            cluster: self.authority.cluster(),
        }
    }

    pub(crate) fn trust_hash(&self) -> Trust {
        Trust::CaHash {
            hash: self.authority.hash(),
            cluster: self.authority.cluster(),
        }
    }

    /// A certificate and key in PEM.
    pub(crate) fn issue(&self, identity: &Identity, at: Timestamp) -> (String, String) {
        let key = KeyPairPem::generate().unwrap();
        let csr = key.csr().unwrap();
        let issued = self
            .authority
            .sign_csr(&csr, identity, LEAF_VALIDITY, at)
            .unwrap();
        (issued.pem, key.as_pem().to_owned())
    }

    pub(crate) fn client(&self, identity: &Identity) -> ClientCert {
        let (cert, key) = self.issue(identity, now());
        ClientCert::new(&cert, &key).unwrap()
    }

    pub(crate) fn server_cert(&self) -> ServerCert {
        self.authority
            .issue_server(&["localhost".to_owned()], LEAF_VALIDITY, now())
            .unwrap()
    }

    pub(crate) fn server_tls(&self) -> ServerTls {
        ServerTls::new(self.authority.cert_pem(), &self.server_cert()).unwrap()
    }

    pub(crate) async fn serve(&self) -> Server {
        Server::start(self.server_tls(), ServerLimits::default()).await
    }
}

pub(crate) struct Server {
    pub(crate) endpoint: Endpoint,
    pub(crate) incoming: Incoming,
    pub(crate) connections: Connections,
}

impl Server {
    pub(crate) async fn start(tls: ServerTls, limits: ServerLimits) -> Self {
        let (listener, endpoint) = listener().await;
        let connections = Connections::new();
        let incoming = incoming(listener, tls, limits, connections.clone());
        Self {
            endpoint,
            incoming,
            connections,
        }
    }
}

pub(crate) async fn listener() -> (TcpListener, Endpoint) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string().parse().unwrap();
    (listener, endpoint)
}

/// Fails the test instead of hanging it.
pub(crate) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(Duration::from_secs(20), future).await {
        Ok(output) => output,
        Err(_) => panic!("waited 20 s for {what}"),
    }
}
