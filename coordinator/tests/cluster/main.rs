//! A real coordinator on loopback, called by real clients, with agents that follow a script. Only the wire and the
//! public interface are used; what an agent does with a member is played here.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails where it is surprised; clippy knows only functions marked as tests"
)]

mod access;
mod agents;
mod bundles;
mod epochs;
mod full_disk;
mod harness;
mod jobs;
mod lifecycle;
mod logs_and_blobs;
