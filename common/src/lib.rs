//! Words that every part of Trainyard shares: ids, units, resources, the job specification, states, records, limits
//! and error codes.
//!
//! Plain data and rules about it. It knows no async runtime, no wire format, no clock, no file and no network; the
//! other crates build on it and it builds on none of them.

pub mod bundle;
pub mod error;
pub mod ids;
pub mod inventory;
pub mod limits;
pub mod logrecord;
pub mod member;
pub mod mutation;
pub mod record;
pub mod resources;
pub mod spec;
pub mod state;
pub mod time;
pub mod units;
