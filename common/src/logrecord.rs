//! The form of a rank's output on disk and on the wire between agent and coordinator: a sequence of typed records.
//!
//! Markers are records of their own kind, so that no output can imitate one. Bytes are kept as the rank wrote them.
//! Offsets into a record file are byte offsets, and always those of a record's start where a reader may begin.

use crate::limits::MAX_LOG_RECORD;
use crate::state::named_enum;
use crate::time::Timestamp;

/// Bytes before a record's data: kind (1), unix milliseconds (8, little endian), length of the data (4, little endian).
pub const HEADER_BYTES: usize = 13;

named_enum!(
    /// What a record holds.
    LogKind {
        /// Bytes that the rank wrote to its standard output.
        Stdout = "stdout",
        /// Bytes that the rank wrote to its standard error.
        Stderr = "stderr",
        /// Output that was not kept: the number of bytes (8, little endian) and the cause as text.
        Dropped = "dropped",
    }
);

impl LogKind {
    fn code(self) -> u8 {
        match self {
            Self::Stdout => 1,
            Self::Stderr => 2,
            Self::Dropped => 3,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Stdout),
            2 => Some(Self::Stderr),
            3 => Some(Self::Dropped),
            _ => None,
        }
    }
}

/// One record, borrowed from the bytes that it was found in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogRecord<'a> {
    /// What it holds.
    pub kind: LogKind,
    /// When it was read from the rank, by the agent's clock.
    pub at: Timestamp,
    /// The bytes.
    pub data: &'a [u8],
}

/// Bytes that are not a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLogRecord {
    /// The kind is none that this version knows.
    #[error("unknown kind of log record: {0}")]
    Kind(u8),
    /// The length is above the limit.
    #[error("log record of {0} bytes is above the limit of {MAX_LOG_RECORD}")]
    Length(usize),
}

impl<'a> LogRecord<'a> {
    /// Appends the record's bytes. `data` is at most [`MAX_LOG_RECORD`] long; what is above is cut off.
    pub fn encode(&self, into: &mut Vec<u8>) {
        let data = &self.data[..self.data.len().min(MAX_LOG_RECORD)];
        into.push(self.kind.code());
        into.extend_from_slice(&self.at.0.to_le_bytes());
        into.extend_from_slice(&(data.len() as u32).to_le_bytes());
        into.extend_from_slice(data);
    }

    /// The record at the start of `bytes` and its whole length; nothing if more bytes are needed.
    ///
    /// # Errors
    /// The bytes cannot be the start of a record.
    pub fn decode(bytes: &'a [u8]) -> Result<Option<(Self, usize)>, InvalidLogRecord> {
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let [kind, at @ .., l0, l1, l2, l3] = *header;
        let kind = LogKind::from_code(kind).ok_or(InvalidLogRecord::Kind(kind))?;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if length > MAX_LOG_RECORD {
            return Err(InvalidLogRecord::Length(length));
        }
        let Some(data) = rest.get(..length) else {
            return Ok(None);
        };
        let at = Timestamp(u64::from_le_bytes(at));
        Ok(Some((Self { kind, at, data }, HEADER_BYTES + length)))
    }

    /// For a [`LogKind::Dropped`] record: how many bytes were not kept, and why.
    #[must_use]
    pub fn dropped(&self) -> Option<(u64, &'a [u8])> {
        let (count, cause) = self.data.split_first_chunk::<8>()?;
        (self.kind == LogKind::Dropped).then_some((u64::from_le_bytes(*count), cause))
    }
}

/// The data of a [`LogKind::Dropped`] record.
#[must_use]
pub fn dropped_data(bytes: u64, cause: &str) -> Vec<u8> {
    let mut data = bytes.to_le_bytes().to_vec();
    data.extend_from_slice(cause.as_bytes());
    data
}

/// Length of the longest prefix of `bytes` that is whole records.
///
/// # Errors
/// Somewhere in it are bytes that cannot be the start of a record.
pub fn whole_records(bytes: &[u8]) -> Result<usize, InvalidLogRecord> {
    let mut end = 0;
    while let Some((_, length)) = LogRecord::decode(&bytes[end..])? {
        end += length;
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn records_read_what_they_write(at: u64, data in proptest::collection::vec(any::<u8>(), 0..300), more in 0..20_usize) {
            let record = LogRecord { kind: LogKind::Stderr, at: Timestamp(at), data: &data };
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            let length = bytes.len();
            for cut in 0..length {
                prop_assert_eq!(LogRecord::decode(&bytes[..cut]), Ok(None));
            }
            bytes.extend(std::iter::repeat_n(1, more.min(HEADER_BYTES - 1)));
            prop_assert_eq!(whole_records(&bytes), Ok(length));
            prop_assert_eq!(LogRecord::decode(&bytes), Ok(Some((record, length))));
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = whole_records(&bytes);
        }
    }

    #[test]
    fn markers_tell_how_much_is_missing() {
        let data = dropped_data(1_200_000_000, "log disk full");
        let record = LogRecord {
            kind: LogKind::Dropped,
            at: Timestamp(1),
            data: &data,
        };
        assert_eq!(
            record.dropped(),
            Some((1_200_000_000, &b"log disk full"[..]))
        );
        assert_eq!(
            LogRecord {
                kind: LogKind::Stdout,
                ..record
            }
            .dropped(),
            None
        );
    }
}
