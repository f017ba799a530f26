//! The agent's connections to its coordinator: one for the session and one for bulk data, so that a large upload never
//! delays a heartbeat. Both present the newest certificate.

use std::sync::Arc;

use tokio::sync::{Mutex, watch};
use tonic::transport::Channel;
use trainyard_common::ids::{ClusterId, NodeId};
use trainyard_transport::client::{self, ConnectError, Trust};
use trainyard_transport::endpoint::Endpoint;
use trainyard_transport::gate::Gate;
use trainyard_transport::tls::ClientCert;

/// Where the coordinator is and how each knows the other. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Link(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    endpoints: Vec<Endpoint>,
    trust: Trust,
    cert: ClientCert,
    gate: Gate,
    cluster: ClusterId,
    node: NodeId,
    bulk: Mutex<Option<Channel>>,
    /// Counts renewals of the certificate.
    renewals: watch::Sender<u64>,
}

impl Link {
    pub(crate) fn new(
        endpoints: Vec<Endpoint>,
        trust: Trust,
        cert: ClientCert,
        (cluster, node): (ClusterId, NodeId),
    ) -> Self {
        Self(Arc::new(Inner {
            endpoints,
            trust,
            cert,
            gate: Gate::default(),
            cluster,
            node,
            bulk: Mutex::new(None),
            renewals: watch::Sender::new(0),
        }))
    }

    pub(crate) fn cluster(&self) -> ClusterId {
        self.0.cluster
    }

    pub(crate) fn node(&self) -> NodeId {
        self.0.node
    }

    /// The certificate that new connections present; replace it to renew.
    pub(crate) fn cert(&self) -> &ClientCert {
        &self.0.cert
    }

    /// What all connections go through, so that they can be cut.
    pub(crate) fn gate(&self) -> &Gate {
        &self.0.gate
    }

    /// A new connection for a session.
    pub(crate) async fn connect(&self) -> Result<Channel, ConnectError> {
        let Inner {
            endpoints,
            trust,
            cert,
            gate,
            ..
        } = &*self.0;
        client::connect_through(gate, endpoints, trust, Some(cert)).await
    }

    /// The connection for bulk data, made when first needed; afterwards it reconnects by itself.
    pub(crate) async fn bulk(&self) -> Result<Channel, ConnectError> {
        let mut bulk = self.0.bulk.lock().await;
        if let Some(channel) = &*bulk {
            return Ok(channel.clone());
        }
        let channel = self.connect().await?;
        *bulk = Some(channel.clone());
        Ok(channel)
    }

    /// The certificate was replaced: connections that were opened with the old one are to be given up, as their peer may
    /// stop listening to them when that one ends.
    pub(crate) async fn renewed(&self) {
        *self.0.bulk.lock().await = None;
        self.0.renewals.send_modify(|count| *count += 1);
    }

    /// Changes with each renewal.
    pub(crate) fn renewals(&self) -> watch::Receiver<u64> {
        self.0.renewals.subscribe()
    }
}
