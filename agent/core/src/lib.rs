//! The agent's decisions as a pure, deterministic state machine: which members the coordinator wants here, which ones
//! there are, and what to do next.
//!
//! It is told facts with the time at which they were learnt and answers with requests. It knows no async runtime, no
//! wire, no process, no file and no clock; the drivers in `trainyard-agent` carry its requests out and report back.
//!
//! What is durable is not here: an attempt's directory is its acceptance, and the runtime reads it back after a
//! restart. Everything in [`Core`] is either recovered from there or told again by the coordinator.
#![deny(clippy::wildcard_enum_match_arm)]

mod backoff;
mod bundle;
mod core;
mod effect;
mod event;
mod holdings;
mod member;

#[cfg(test)]
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test names what it is about"
)]
mod properties;
#[cfg(test)]
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test names what it is about"
)]
mod tests;

pub use crate::bundle::{
    BundleEffect, BundleEvent, MAX_BUNDLES_PER_NODE, RecoveredBundle, RecoveredBundleState,
};
pub use crate::core::{Config, Core};
pub use crate::effect::{Effect, Outbox};
pub use crate::event::{Event, Fault, RecoveredMember, RecoveredState, RuntimeState, Uploaded};
