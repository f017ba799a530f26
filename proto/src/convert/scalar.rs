//! Small values: ids, names, digests, times and ports, and what is done with each kind of field: required, optional,
//! repeated. It knows no message of its own.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use trainyard_common::ids::{
    AttemptNumber, AttemptRef, ClusterId, Digest, JobId, NodeId, TaskIndex, TokenId,
};
use trainyard_common::resources::Resources;
use trainyard_common::time::{Timestamp, millis};

use super::InvalidField;
use crate::v1;

/// Converts the sub-message in `field`, which has to be there.
///
/// # Errors
/// It is missing, or something in it is bad.
pub fn required<Message, Domain>(
    field: &str,
    message: Option<Message>,
) -> Result<Domain, InvalidField>
where
    Domain: TryFrom<Message, Error = InvalidField>,
{
    optional(field, message)?.ok_or_else(|| InvalidField::missing(field))
}

/// Converts the sub-message in `field`, which may be absent.
///
/// # Errors
/// Something in it is bad.
pub fn optional<Message, Domain>(
    field: &str,
    message: Option<Message>,
) -> Result<Option<Domain>, InvalidField>
where
    Domain: TryFrom<Message, Error = InvalidField>,
{
    message
        .map(|message| Domain::try_from(message).map_err(|e| e.under(field)))
        .transpose()
}

/// Converts the repeated sub-messages in `field`; a bad one is named by its place, as in `members[3].node`.
///
/// # Errors
/// Something in one of them is bad.
pub fn list<Message, Domain>(
    field: &str,
    messages: Vec<Message>,
) -> Result<Vec<Domain>, InvalidField>
where
    Domain: TryFrom<Message, Error = InvalidField>,
{
    let convert = |(place, message)| {
        Domain::try_from(message).map_err(|e: InvalidField| e.under(&format!("{field}[{place}]")))
    };
    messages.into_iter().enumerate().map(convert).collect()
}

/// Reads a name or another domain type with a text form.
///
/// # Errors
/// The text is not of that form; an empty one never is.
pub fn text<T>(field: &str, text: &str) -> Result<T, InvalidField>
where
    T: FromStr<Err: Display>,
{
    if text.is_empty() {
        return Err(InvalidField::missing(field));
    }
    text.parse()
        .map_err(|e: T::Err| InvalidField::new(field, e.to_string()))
}

/// An absent text is the empty one.
pub(super) fn optional_text(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// A digest that has to be there.
///
/// # Errors
/// It is missing or not 32 bytes long.
pub fn digest(field: &str, bytes: &[u8]) -> Result<Digest, InvalidField> {
    optional_digest(field, bytes)?.ok_or_else(|| InvalidField::missing(field))
}

/// A digest, or none for no bytes at all.
///
/// # Errors
/// It is neither empty nor 32 bytes long.
pub fn optional_digest(field: &str, bytes: &[u8]) -> Result<Option<Digest>, InvalidField> {
    if bytes.is_empty() {
        return Ok(None);
    }
    Digest::try_from(bytes).map(Some).map_err(|_| {
        InvalidField::new(field, format!("has {} bytes; a digest has 32", bytes.len()))
    })
}

/// The digests of a repeated field.
///
/// # Errors
/// One of them is not 32 bytes long.
pub fn digests(field: &str, digests: &[Vec<u8>]) -> Result<Vec<Digest>, InvalidField> {
    let convert = |(place, bytes): (usize, &Vec<u8>)| digest(&format!("{field}[{place}]"), bytes);
    digests.iter().enumerate().map(convert).collect()
}

/// The wire form of a digest that may be absent.
#[must_use]
pub fn digest_bytes(digest: Option<Digest>) -> Vec<u8> {
    digest.map_or_else(Vec::new, |digest| digest.0.to_vec())
}

pub(super) fn digest_list(digests: &[Digest]) -> Vec<Vec<u8>> {
    digests.iter().map(|digest| digest.0.to_vec()).collect()
}

/// A cluster's id.
///
/// # Errors
/// It is missing or not 16 bytes long.
pub fn cluster(field: &str, bytes: &[u8]) -> Result<ClusterId, InvalidField> {
    if bytes.is_empty() {
        return Err(InvalidField::missing(field));
    }
    let problem = || format!("has {} bytes; a cluster id has 16", bytes.len());
    ClusterId::try_from(bytes).map_err(|_| InvalidField::new(field, problem()))
}

/// A job's id.
///
/// # Errors
/// It is 0, which is what an absent field looks like.
pub fn job_id(field: &str, number: u64) -> Result<JobId, InvalidField> {
    from_one(field, number).map(JobId)
}

/// A node's id.
///
/// # Errors
/// It is 0, which is what an absent field looks like.
pub fn node_id(field: &str, number: u32) -> Result<NodeId, InvalidField> {
    from_one(field, number).map(NodeId)
}

/// A token's id.
///
/// # Errors
/// It is 0, which is what an absent field looks like.
pub fn token_id(field: &str, number: u64) -> Result<TokenId, InvalidField> {
    from_one(field, number).map(TokenId)
}

/// An attempt's number within its task.
///
/// # Errors
/// It is 0, which is what an absent field looks like.
pub fn attempt_number(field: &str, number: u32) -> Result<AttemptNumber, InvalidField> {
    from_one(field, number).map(AttemptNumber)
}

fn from_one<T: Default + PartialEq>(field: &str, number: T) -> Result<T, InvalidField> {
    if number == T::default() {
        Err(InvalidField::new(
            field,
            "is missing or 0; these count from 1",
        ))
    } else {
        Ok(number)
    }
}

/// A TCP port that has to be there.
///
/// # Errors
/// It is not within 1 to 65535.
pub fn port(field: &str, number: u32) -> Result<u16, InvalidField> {
    optional_port(field, number)?.ok_or_else(|| InvalidField::missing(field))
}

/// A TCP port, or none for 0.
pub(super) fn optional_port(field: &str, number: u32) -> Result<Option<u16>, InvalidField> {
    match u16::try_from(number) {
        Ok(0) => Ok(None),
        Ok(port) => Ok(Some(port)),
        Err(_) => Err(InvalidField::new(
            field,
            format!("{number} is not a port; ports end at {}", u16::MAX),
        )),
    }
}

/// A number that fits into a byte: an exit code or a signal.
pub(super) fn byte(field: &str, number: u32) -> Result<u8, InvalidField> {
    u8::try_from(number)
        .map_err(|_| InvalidField::new(field, format!("{number} is outside 0 to {}", u8::MAX)))
}

const NANOS_PER_MILLI: u32 = 1_000_000;

/// Whole milliseconds as seconds and nanoseconds. No value is too large: `u64::MAX / 1000` is far below `i64::MAX`.
fn split(millis: u64) -> (i64, i32) {
    let nanos = (millis % 1000) as u32 * NANOS_PER_MILLI;
    ((millis / 1000).cast_signed(), nanos.cast_signed())
}

/// Seconds and nanoseconds as whole milliseconds.
fn join(field: &str, seconds: i64, nanos: i32) -> Result<u64, InvalidField> {
    let refuse = |problem: &str| Err(InvalidField::new(field, problem));
    let (Ok(seconds), Ok(nanos)) = (u64::try_from(seconds), u32::try_from(nanos)) else {
        return refuse("is negative");
    };
    if nanos >= 1000 * NANOS_PER_MILLI {
        return refuse("has a whole second or more in its nanoseconds");
    }
    if !nanos.is_multiple_of(NANOS_PER_MILLI) {
        return refuse("has a part below a millisecond; round it to whole milliseconds");
    }
    let parts = seconds.checked_mul(1000);
    match parts.and_then(|millis| millis.checked_add(u64::from(nanos / NANOS_PER_MILLI))) {
        Some(millis) => Ok(millis),
        None => refuse("is too far in the future"),
    }
}

/// The wire form of a point in time.
#[must_use]
pub fn timestamp(at: Timestamp) -> prost_types::Timestamp {
    let (seconds, nanos) = split(at.0);
    prost_types::Timestamp { seconds, nanos }
}

/// A point in time that has to be there.
///
/// # Errors
/// It is missing, before 1970, or finer than a millisecond.
pub fn to_timestamp(
    field: &str,
    at: Option<prost_types::Timestamp>,
) -> Result<Timestamp, InvalidField> {
    optional_timestamp(field, at)?.ok_or_else(|| InvalidField::missing(field))
}

/// A point in time that may be absent.
///
/// # Errors
/// It is before 1970, or finer than a millisecond.
pub fn optional_timestamp(
    field: &str,
    at: Option<prost_types::Timestamp>,
) -> Result<Option<Timestamp>, InvalidField> {
    let convert = |prost_types::Timestamp { seconds, nanos }| join(field, seconds, nanos);
    Ok(at.map(convert).transpose()?.map(Timestamp))
}

/// The wire form of a duration: whole milliseconds, cut off, at most the largest number of them.
#[must_use]
pub fn duration(duration: Duration) -> prost_types::Duration {
    let (seconds, nanos) = split(millis(duration));
    prost_types::Duration { seconds, nanos }
}

/// A duration that has to be there.
///
/// # Errors
/// It is missing, negative, or finer than a millisecond.
pub fn to_duration(
    field: &str,
    duration: Option<prost_types::Duration>,
) -> Result<Duration, InvalidField> {
    optional_duration(field, duration)?.ok_or_else(|| InvalidField::missing(field))
}

/// A duration that may be absent.
///
/// # Errors
/// It is negative, or finer than a millisecond.
pub fn optional_duration(
    field: &str,
    duration: Option<prost_types::Duration>,
) -> Result<Option<Duration>, InvalidField> {
    let convert = |prost_types::Duration { seconds, nanos }| join(field, seconds, nanos);
    Ok(duration
        .map(convert)
        .transpose()?
        .map(Duration::from_millis))
}

impl From<&AttemptRef> for v1::AttemptRef {
    fn from(attempt: &AttemptRef) -> Self {
        let AttemptRef { job, task, attempt } = *attempt;
        Self {
            job: job.0,
            task: task.0,
            attempt: attempt.0,
        }
    }
}

impl From<AttemptRef> for v1::AttemptRef {
    fn from(attempt: AttemptRef) -> Self {
        Self::from(&attempt)
    }
}

impl TryFrom<v1::AttemptRef> for AttemptRef {
    type Error = InvalidField;

    fn try_from(message: v1::AttemptRef) -> Result<Self, InvalidField> {
        let v1::AttemptRef { job, task, attempt } = message;
        Ok(Self {
            job: job_id("job", job)?,
            task: TaskIndex(task),
            attempt: attempt_number("attempt", attempt)?,
        })
    }
}

impl From<&Resources> for v1::Resources {
    fn from(resources: &Resources) -> Self {
        let Resources {
            cpu_milli,
            memory_bytes,
            gpus,
        } = *resources;
        Self {
            cpu_milli,
            memory_bytes,
            gpus,
        }
    }
}

impl From<Resources> for v1::Resources {
    fn from(resources: Resources) -> Self {
        Self::from(&resources)
    }
}

impl TryFrom<v1::Resources> for Resources {
    type Error = InvalidField;

    fn try_from(message: v1::Resources) -> Result<Self, InvalidField> {
        let v1::Resources {
            cpu_milli,
            memory_bytes,
            gpus,
        } = message;
        Ok(Self {
            cpu_milli,
            memory_bytes,
            gpus,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn time(seconds: i64, nanos: i32) -> Result<Timestamp, String> {
        let at = prost_types::Timestamp { seconds, nanos };
        to_timestamp("at", Some(at)).map_err(|e| e.to_string())
    }

    #[test]
    fn times_are_whole_milliseconds_from_1970_on() {
        assert_eq!(time(0, 0), Ok(Timestamp(0)));
        assert_eq!(time(1, 999_000_000), Ok(Timestamp(1999)));
        assert_eq!(time(-1, 0), Err("at: is negative".into()));
        assert_eq!(time(1, -1_000_000), Err("at: is negative".into()));
        assert!(time(1, 1).is_err_and(|e| e.contains("below a millisecond")));
        assert!(time(1, 1_000_000_000).is_err_and(|e| e.contains("whole second")));
        assert!(time(i64::MAX, 0).is_err_and(|e| e.contains("too far")));
        assert_eq!(to_timestamp("at", None), Err(InvalidField::missing("at")));
        assert_eq!(optional_timestamp("at", None), Ok(None));
    }

    #[test]
    fn durations_are_cut_to_milliseconds_on_the_way_out_only() {
        let fine = Duration::from_nanos(1_999_999);
        assert_eq!(
            to_duration("grace", Some(duration(fine))),
            Ok(Duration::from_millis(1))
        );
        let longest = to_duration("grace", Some(duration(Duration::MAX)));
        assert_eq!(longest, Ok(Duration::from_millis(u64::MAX)));
        let too_fine = prost_types::Duration {
            seconds: 0,
            nanos: 1_500_000,
        };
        assert!(to_duration("grace", Some(too_fine)).is_err());
    }

    #[test]
    fn ports_are_refused_above_their_range_and_0_is_none() {
        assert_eq!(port("port", 65_535), Ok(65_535));
        assert_eq!(port("port", 0), Err(InvalidField::missing("port")));
        assert_eq!(optional_port("port", 0), Ok(None));
        assert!(optional_port("port", 65_536).is_err_and(|e| e.problem.contains("65536")));
        assert!(port("port", u32::MAX).is_err());
    }

    #[test]
    fn digests_have_32_bytes_or_none() {
        assert_eq!(optional_digest("d", &[]), Ok(None));
        assert_eq!(optional_digest("d", &[7; 32]), Ok(Some(Digest([7; 32]))));
        for length in [1, 31, 33] {
            let refused = optional_digest("d", &vec![0; length]).expect_err("wrong length");
            assert_eq!(
                refused.problem,
                format!("has {length} bytes; a digest has 32")
            );
        }
        assert_eq!(digest("d", &[]), Err(InvalidField::missing("d")));
        let refused = digests("d", &[vec![0; 32], vec![]]).expect_err("the second is empty");
        assert_eq!(refused.field, "d[1]");
    }

    #[test]
    fn ids_count_from_1() {
        assert_eq!(node_id("node", 1), Ok(NodeId(1)));
        let none = v1::AttemptRef {
            job: 1,
            task: 0,
            attempt: 0,
        };
        let refused = AttemptRef::try_from(none).expect_err("no attempt is named");
        assert_eq!(refused.field, "attempt");
    }

    proptest! {
        #[test]
        fn every_time_survives(ms: u64) {
            let at = Timestamp(ms);
            prop_assert_eq!(to_timestamp("at", Some(timestamp(at))), Ok(at));
            let long = Duration::from_millis(ms);
            prop_assert_eq!(to_duration("d", Some(duration(long))), Ok(long));
        }

        #[test]
        fn no_time_on_the_wire_panics(seconds: i64, nanos: i32) {
            if let Ok(at) = time(seconds, nanos) {
                prop_assert_eq!(timestamp(at), prost_types::Timestamp { seconds, nanos });
            }
        }
    }
}
