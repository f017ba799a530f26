//! How the parts of Trainyard reach each other: identities and certificates, join tokens, TLS connections, and the
//! transfer of file trees; and the clock and the tasks that all their drivers share.
//!
//! Used by coordinator, agent and command line alike; it knows none of them, takes no scheduling decision and holds
//! no state of a cluster.

pub mod blobs;
pub mod client;
pub mod clock;
pub mod connections;
pub mod credentials;
pub mod endpoint;
pub mod enrol;
pub mod files;
pub mod gate;
pub mod host;
pub mod identity;
pub mod pack;
pub mod pki;
pub mod restart;
pub mod sealed;
pub mod server;
pub mod skew;
mod socket;
pub mod task;
#[cfg(test)]
mod testing;
pub mod tls;
pub mod token;
pub mod tree;
pub mod unpack;
mod verify;
