//! A row's bytes: those of `trainyard_proto`'s stored form, with their errors as one sentence for the refusal to start.

use std::error::Error;

use trainyard_common::record::Record;
use trainyard_common::time::Timestamp;
use trainyard_proto::convert::store;

pub(super) fn encode(at: Timestamp, record: &Record) -> Vec<u8> {
    store::encode(at, record)
}

/// The row, or what is wrong with it with all causes.
pub(super) fn decode(row: &[u8]) -> Result<(Timestamp, Record), String> {
    store::decode(row).map_err(|error| {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        text
    })
}
