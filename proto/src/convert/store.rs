//! A stored row: one transition with its schema version and checksum. Nothing that was damaged on disk is taken for a
//! row, and nothing that a later schema wrote is read as if it were this one's.
//!
//! Layout: schema version (1 byte), CRC-32 of the rest (4 bytes, little endian), the encoded [`v1::Transition`].

use prost::Message;
use trainyard_common::record::Record;
use trainyard_common::time::Timestamp;

use super::InvalidField;
use super::scalar::{node_id, required, timestamp, to_timestamp};
use crate::v1;

/// The version of the stored form that this build writes, and the only one that it reads.
pub const SCHEMA_VERSION: u8 = 1;

/// Bytes before the encoded transition.
const HEADER_BYTES: usize = 5;

/// A stored row that cannot be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CorruptRecord {
    /// It is too short to hold even its header.
    #[error("stored row of {bytes} bytes is cut off in its header")]
    Short {
        /// Its length.
        bytes: usize,
    },
    /// It was written in another form.
    #[error("stored row has schema version {found}; this version reads {SCHEMA_VERSION}")]
    Version {
        /// The version that it says it has.
        found: u8,
    },
    /// Its bytes are not the ones that were written.
    #[error("stored row does not match its checksum")]
    Checksum,
    /// Its bytes are the ones that were written, but are no transition.
    #[error("stored row is not an encoded transition")]
    Message(#[source] prost::DecodeError),
    /// It is a transition, but not one that means anything here.
    #[error("stored row has a bad field")]
    Field(#[source] InvalidField),
}

/// The stored form of a row as it became at `at`.
#[must_use]
pub fn encode(at: Timestamp, record: &Record) -> Vec<u8> {
    let body = v1::Transition::from((at, record)).encode_to_vec();
    let mut row = Vec::with_capacity(HEADER_BYTES + body.len());
    row.push(SCHEMA_VERSION);
    row.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
    row.extend_from_slice(&body);
    row
}

/// Reads a row that [`encode`] wrote.
///
/// # Errors
/// The bytes are damaged or of another version.
pub fn decode(row: &[u8]) -> Result<(Timestamp, Record), CorruptRecord> {
    let Some(([found, checksum @ ..], body)) = row.split_first_chunk::<HEADER_BYTES>() else {
        return Err(CorruptRecord::Short { bytes: row.len() });
    };
    if *found != SCHEMA_VERSION {
        return Err(CorruptRecord::Version { found: *found });
    }
    if crc32fast::hash(body) != u32::from_le_bytes(*checksum) {
        return Err(CorruptRecord::Checksum);
    }
    let transition = v1::Transition::decode(body).map_err(CorruptRecord::Message)?;
    transition.try_into().map_err(CorruptRecord::Field)
}

impl From<(Timestamp, &Record)> for v1::Transition {
    fn from((at, record): (Timestamp, &Record)) -> Self {
        use v1::transition::Row;
        let row = match record {
            Record::Job(job) => Row::Job(job.as_ref().into()),
            Record::Task(task) => Row::Task(task.as_ref().into()),
            Record::Attempt(attempt) => Row::Attempt(attempt.as_ref().into()),
            Record::Node(node) => Row::Node(node.as_ref().into()),
            Record::NodeRemoved(node) => Row::NodeRemoved(node.0),
            Record::Token(token) => Row::Token(token.as_ref().into()),
            Record::User(user) => Row::User(user.as_ref().into()),
            Record::Bundle(bundle) => Row::Bundle(bundle.as_ref().into()),
            Record::BundleRemoved(bundle) => Row::BundleRemoved(bundle.into()),
        };
        Self {
            at: Some(timestamp(at)),
            row: Some(row),
        }
    }
}

impl TryFrom<v1::Transition> for (Timestamp, Record) {
    type Error = InvalidField;

    fn try_from(message: v1::Transition) -> Result<Self, InvalidField> {
        use v1::transition::Row;
        let v1::Transition { at, row } = message;
        let at = to_timestamp("at", at)?;
        let record = match row {
            Some(Row::Job(job)) => Record::Job(Box::new(required("job", Some(job))?)),
            Some(Row::Task(task)) => Record::Task(Box::new(required("task", Some(task))?)),
            Some(Row::Attempt(attempt)) => {
                Record::Attempt(Box::new(required("attempt", Some(attempt))?))
            }
            Some(Row::Node(node)) => Record::Node(Box::new(required("node", Some(node))?)),
            Some(Row::NodeRemoved(node)) => Record::NodeRemoved(node_id("node_removed", node)?),
            Some(Row::Token(token)) => Record::Token(Box::new(required("token", Some(token))?)),
            Some(Row::User(user)) => Record::User(Box::new(required("user", Some(user))?)),
            Some(Row::Bundle(bundle)) => {
                Record::Bundle(Box::new(required("bundle", Some(bundle))?))
            }
            Some(Row::BundleRemoved(bundle)) => {
                Record::BundleRemoved(required("bundle_removed", Some(bundle))?)
            }
            None => return Err(InvalidField::missing("row")),
        };
        Ok((at, record))
    }
}
