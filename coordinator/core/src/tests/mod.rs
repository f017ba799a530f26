//! Tests of the core by family of events, each with a whole core, a fake clock and every effect looked at.

mod attempts;
mod bundles;
mod enrol;
mod jobs;
mod placement;
mod sessions;
mod silence;
mod sim;
