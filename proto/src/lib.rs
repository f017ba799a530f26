//! The wire format `trainyard.v1` and its conversions to and from the domain; the only crate that knows both.
//!
//! It knows no socket, file or clock. [`convert`] turns messages into domain types with one error per bad field;
//! [`status`] is the one table between error codes and gRPC.

pub mod convert;
pub mod status;

/// Generated from `proto/trainyard/v1`.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated code; the .proto files carry the documentation"
)]
pub mod v1 {
    tonic::include_proto!("trainyard.v1");
}

/// The encoded descriptors of every file, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The version of the session protocol that this build speaks.
pub const PROTOCOL_VERSION: u32 = 1;
/// The oldest version of the session protocol that this build still speaks.
pub const OLDEST_PROTOCOL_VERSION: u32 = 1;
