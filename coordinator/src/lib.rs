//! The head of a cluster: everything around the pure core that touches a disk, a clock or the network.
//!
//! [`start`] opens the state directory, takes the lead, and serves; [`Coordinator`] is the running thing. Nothing is
//! process-global: several may live in one process. Layout of the state directory:
//!
//! ```text
//! coordinator.lock   held for the coordinator's life; says who has it
//! coordinator.json   where it can be reached, while it runs
//! cluster-id         says that state.db must be there
//! state.db           rows and transitions (SQLite, WAL)
//! state.reserve      room that is given back when the disk is full
//! ca/                the authority: ca.pem, ca.key.pem
//! admin/             the local admin's credentials
//! blobs/<aa>/<hash>  snapshots, outputs, checkpoints; blobs/partial/ what is arriving
//! logs/<job>/<task>.<attempt>.<rank>.log   output of ranks; .end once it is complete
//! ```
//!
//! Decisions about jobs and nodes are the core's.

mod auth;
mod authority;
mod backup;
mod blobs;
pub mod config;
mod coordinator;
mod disk;
mod driver;
mod grpc;
mod logs;
pub mod presence;
mod read_model;
mod server;
pub mod store;
#[cfg(test)]
mod testing;

pub use authority::AuthorityError;
pub use backup::{Backup, BackupError, backup, check, restore};
pub use config::{Config, ConfigError, Timing};
pub use coordinator::{Coordinator, LocalNodeError, StartError, start};
pub use driver::FatalError;
pub use presence::Presence;
pub use trainyard_transport::clock::Clock;
