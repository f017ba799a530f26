//! The register of a server's open connections: who they are, how many they may be, and a way to close them, as a
//! revoked certificate is not noticed by a connection that is already open.
//!
//! It knows no TLS. Who is to be closed is decided elsewhere.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;
use trainyard_common::time::Timestamp;

use crate::identity::Identity;

/// Who is at the other end of a connection to our server. In the extensions of every request on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its address, as TCP sees it.
    pub addr: SocketAddr,
    /// Whom its certificate names; without a certificate it may only enrol.
    pub identity: Option<Identity>,
    /// The certificate's serial number in lower-case hex.
    pub serial: Option<String>,
    /// When the certificate ends. TLS checks it only at the handshake.
    pub not_after: Option<Timestamp>,
    /// A number that no other connection of this server has.
    pub connection_id: u64,
}

/// All open connections of a server. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Connections(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    last_id: u64,
    open: BTreeMap<u64, Entry>,
    /// How many each identity has (`None`: all anonymous ones); entries leave with the last connection.
    counts: HashMap<Option<Identity>, usize>,
}

#[derive(Debug)]
struct Entry {
    peer: Peer,
    /// Taken when the connection was told to close; it leaves the register when it is dropped.
    close: Option<oneshot::Sender<()>>,
}

impl Connections {
    /// An empty register.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Closes one connection at once, if it is open.
    pub fn close(&self, connection_id: u64) -> bool {
        self.close_where(|peer| peer.connection_id == connection_id) > 0
    }

    /// Closes all connections of an identity at once; says how many.
    pub fn close_identity(&self, identity: &Identity) -> usize {
        self.close_where(|peer| peer.identity.as_ref() == Some(identity))
    }

    /// Closes all connections that were opened with a certificate; says how many.
    pub fn close_serial(&self, serial: &str) -> usize {
        self.close_where(|peer| peer.serial.as_deref() == Some(serial))
    }

    /// Closes the connections that `wanted` picks; says how many. `wanted` must not use this register.
    pub fn close_where(&self, wanted: impl Fn(&Peer) -> bool) -> usize {
        let mut inner = self.lock();
        let entries = inner.open.values_mut().filter(|entry| wanted(&entry.peer));
        let mut closed = 0;
        for close in entries.filter_map(|entry| entry.close.take()) {
            // An error means that the connection is being dropped anyhow.
            let _ = close.send(());
            closed += 1;
        }
        closed
    }

    /// Everybody who is connected, in the order of connecting.
    #[must_use]
    pub fn list(&self) -> Vec<Peer> {
        self.lock()
            .open
            .values()
            .map(|entry| entry.peer.clone())
            .collect()
    }

    /// How many connections are open.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().open.len()
    }

    /// Whether none is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a connection and fills in its number, or refuses if its identity already has `most`.
    pub(crate) fn register(&self, mut peer: Peer, most: usize) -> Option<Registration> {
        let mut inner = self.lock();
        let count = inner.counts.entry(peer.identity.clone()).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        inner.last_id += 1;
        peer.connection_id = inner.last_id;
        let (close, closed) = oneshot::channel();
        inner.open.insert(
            peer.connection_id,
            Entry {
                peer: peer.clone(),
                close: Some(close),
            },
        );
        Some(Registration {
            connections: self.clone(),
            peer,
            closed,
        })
    }

    fn remove(&self, connection_id: u64) {
        let mut inner = self.lock();
        let Some(entry) = inner.open.remove(&connection_id) else {
            return;
        };
        if let Some(count) = inner.counts.get_mut(&entry.peer.identity) {
            *count -= 1;
            if *count == 0 {
                inner.counts.remove(&entry.peer.identity);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change above is complete before anything can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place in the register, given up when dropped.
#[derive(Debug)]
pub(crate) struct Registration {
    connections: Connections,
    pub(crate) peer: Peer,
    /// Ready once the connection is to close.
    pub(crate) closed: oneshot::Receiver<()>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.connections.remove(self.peer.connection_id);
    }
}

#[cfg(test)]
mod tests {
    use trainyard_common::ids::NodeId;

    use super::*;

    fn peer(node: Option<u32>) -> Peer {
        Peer {
            addr: ([127, 0, 0, 1], 1).into(),
            identity: node.map(|node| Identity::Node(NodeId(node))),
            serial: node.map(|node| format!("{node:032x}")),
            not_after: None,
            connection_id: 0,
        }
    }

    #[test]
    fn connections_are_closed_by_number_identity_and_serial() {
        let connections = Connections::new();
        let mut open: Vec<_> = [1, 1, 2, 3]
            .map(|node| connections.register(peer(Some(node)), 9).unwrap())
            .into();
        let mut anonymous = connections.register(peer(None), 9).unwrap();
        assert_eq!(connections.len(), 5);

        assert_eq!(connections.close_identity(&Identity::Node(NodeId(1))), 2);
        assert_eq!(
            connections.close_identity(&Identity::Node(NodeId(1))),
            0,
            "already told"
        );
        assert_eq!(connections.close_serial(&format!("{:032x}", 2)), 1);
        assert!(connections.close(anonymous.peer.connection_id));
        assert!(!connections.close(99));
        for told in &mut open[..3] {
            assert_eq!(told.closed.try_recv(), Ok(()));
        }
        assert_eq!(anonymous.closed.try_recv(), Ok(()));
        assert!(open[3].closed.try_recv().is_err());

        open.clear();
        assert_eq!(connections.list().len(), 1);
        drop(anonymous);
        assert!(connections.is_empty());
        assert!(connections.lock().counts.is_empty());
    }

    #[test]
    fn each_identity_has_its_own_limit() {
        let connections = Connections::new();
        let first = connections.register(peer(Some(1)), 1).unwrap();
        assert!(connections.register(peer(Some(1)), 1).is_none());
        let _other = connections.register(peer(Some(2)), 1).unwrap();
        let _anonymous = connections.register(peer(None), 1).unwrap();
        assert!(connections.register(peer(None), 1).is_none());
        drop(first);
        assert!(connections.register(peer(Some(1)), 1).is_some());
    }
}
