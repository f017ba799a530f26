//! Tests of the core by family of events, each with a whole core, a fake clock and every effect looked at.

mod attempts;
mod bundles;
mod cleanup;
mod enrol;
mod jobs;
mod lease;
mod placement;
mod restored;
mod sessions;
mod silence;
mod sim;
mod trouble;
