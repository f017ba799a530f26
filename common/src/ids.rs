//! Typed identifiers. An id never turns into another kind of id by accident, and each has one text form that
//! `Display` writes and `FromStr` reads back.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A text that is not an id of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {kind}; expected {expected}")]
pub struct InvalidId {
    /// What was wanted, in the vocabulary's words.
    pub kind: &'static str,
    /// The form it should have.
    pub expected: &'static str,
    /// What was given, cut to a readable length.
    pub text: String,
}

impl InvalidId {
    fn new(kind: &'static str, expected: &'static str, text: &str) -> Self {
        let text = text.chars().take(64).collect();
        Self {
            kind,
            expected,
            text,
        }
    }
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $int:ty, $prefix:literal, $kind:literal, $expected:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $int);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&format!(concat!($prefix, "{}"), self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            /// Reads the text form; the prefix letter may be left out.
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let digits = text.strip_prefix($prefix).unwrap_or(text);
                let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
                match digits.parse() {
                    Ok(number) if plain => Ok(Self(number)),
                    _ => Err(InvalidId::new($kind, $expected, text)),
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

number_id!(
    /// A job, numbered from 1 in the order in which the coordinator accepted them. Shown as `j17`.
    JobId, u64, "j", "job id", "a number such as j17 or 17"
);
number_id!(
    /// A node, numbered from 1 in the order of enrolment and never used again. Shown as `n7`.
    NodeId, u32, "n", "node id", "a number such as n7 or 7"
);
number_id!(
    /// A join token's public half. Shown as `t3`.
    TokenId, u64, "t", "token id", "a number such as t3 or 3"
);

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident, $int:ty) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $int);

        impl $name {
            /// The one that follows; stays at the largest value rather than wrapping to an old one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

counter!(
    /// The place of a task in its job, from 0. A plain job has the one task 0.
    TaskIndex, u32
);
counter!(
    /// The number of an attempt within its task, from 1; the epoch in every message that names an attempt.
    AttemptNumber, u32
);
counter!(
    /// How often an agent process has started on its node, from 1.
    Incarnation, u64
);
counter!(
    /// The coordinator's leadership counter: grows at each start on the same state. Agents refuse a lower one.
    Term, u64
);
counter!(
    /// The number of a durable transition, from 1. Watches resume from it.
    Sequence, u64
);

/// One attempt of one task of one job, unique within a cluster. Shown as `j17.0.1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptRef {
    /// The job.
    pub job: JobId,
    /// The task of that job.
    pub task: TaskIndex,
    /// The attempt of that task, its epoch.
    pub attempt: AttemptNumber,
}

impl fmt::Display for AttemptRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.job, self.task, self.attempt)
    }
}

impl FromStr for AttemptRef {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let invalid = || InvalidId::new("attempt", "job.task.attempt such as j17.0.1", text);
        let mut parts = text.split('.');
        let (Some(job), Some(task), Some(attempt), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(invalid());
        };
        Ok(Self {
            job: job.parse().map_err(|_| invalid())?,
            task: TaskIndex(task.parse().map_err(|_| invalid())?),
            attempt: AttemptNumber(attempt.parse().map_err(|_| invalid())?),
        })
    }
}

impl Serialize for AttemptRef {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for AttemptRef {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// A bundle of tasks of one job on one node, numbered from 1 within the job and never used again. Shown as `j17.b3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BundleRef {
    /// The job.
    pub job: JobId,
    /// The bundle of that job.
    pub bundle: u32,
}

impl fmt::Display for BundleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.b{}", self.job, self.bundle)
    }
}

impl FromStr for BundleRef {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let invalid = || InvalidId::new("bundle", "job.b and a number such as j17.b3", text);
        let (job, bundle) = text.split_once(".b").ok_or_else(invalid)?;
        Ok(Self {
            job: job.parse().map_err(|_| invalid())?,
            bundle: bundle.parse().map_err(|_| invalid())?,
        })
    }
}

impl Serialize for BundleRef {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BundleRef {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

macro_rules! bytes_id {
    ($(#[$doc:meta])* $name:ident, $len:literal, $kind:literal, $expected:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let invalid = || InvalidId::new($kind, $expected, text);
                let digits = text.as_bytes();
                if digits.len() != 2 * $len {
                    return Err(invalid());
                }
                let mut bytes = [0; $len];
                for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
                    let (high, low) = (hex_digit(pair[0]), hex_digit(pair[1]));
                    *byte = high.zip(low).map(|(high, low)| high << 4 | low).ok_or_else(invalid)?;
                }
                Ok(Self(bytes))
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = InvalidId;

            fn try_from(bytes: &[u8]) -> Result<Self, InvalidId> {
                let length = format!("{} bytes", bytes.len());
                bytes.try_into().map(Self).map_err(|_| InvalidId::new($kind, concat!($len, " bytes"), &length))
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

fn hex_digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

bytes_id!(
    /// A cluster: 16 random bytes drawn at the coordinator's first start. Shown as 32 hexadecimal digits.
    ClusterId, 16, "cluster id", "32 lower-case hexadecimal digits"
);
bytes_id!(
    /// A content hash (BLAKE3) of a blob: a file, or the manifest of a tree. Shown as 64 hexadecimal digits.
    Digest, 32, "digest", "64 lower-case hexadecimal digits"
);

macro_rules! name_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                if is_name(text) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(InvalidId::new(
                        $kind,
                        "1 to 63 letters, digits, '-', '_' or '.', beginning with a letter or digit",
                        text,
                    ))
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

/// Whether `text` may name a user, a workspace, a job or a label: 1 to 63 ASCII letters, digits, `-`, `_` or `.`,
/// beginning with a letter or digit. So a name is safe in a path component, a certificate and a terminal.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

name_id!(
    /// Who submits jobs, as written in the user's certificate.
    UserName, "user name"
);
name_id!(
    /// A workspace (tenant).
    WorkspaceName, "workspace name"
);

impl WorkspaceName {
    /// The one workspace that exists from the first start: `default`.
    #[must_use]
    pub fn default_workspace() -> Self {
        Self("default".to_owned())
    }
}

/// The caller's own name for one request, so that a retry is recognised: 1 to 128 printable ASCII characters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct RequestId(String);

impl RequestId {
    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RequestId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        if (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidId::new(
                "request id",
                "1 to 128 printable ASCII characters without spaces",
                text,
            ))
        }
    }
}

impl<'de> Deserialize<'de> for RequestId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_ids_read_what_they_write_and_also_bare_numbers() {
        assert_eq!("j17".parse(), Ok(JobId(17)));
        assert_eq!("17".parse(), Ok(JobId(17)));
        assert_eq!(JobId(17).to_string(), "j17");
        for bad in [
            "",
            "j",
            "j-1",
            "+1",
            "j1 ",
            "jj1",
            "n1",
            "１",
            "18446744073709551616",
        ] {
            assert!(
                bad.parse::<JobId>().is_err(),
                "{bad:?} was taken for a job id"
            );
        }
    }

    #[test]
    fn attempt_reference_round_trips() {
        let attempt: AttemptRef = "j17.0.1".parse().unwrap();
        assert_eq!(attempt.to_string(), "j17.0.1");
        for bad in ["j17.0", "j17.0.1.2", "j17..1", "j17.0.x"] {
            assert!(
                bad.parse::<AttemptRef>().is_err(),
                "{bad:?} was taken for an attempt"
            );
        }
    }

    #[test]
    fn bundle_reference_round_trips() {
        let bundle: BundleRef = "j17.b3".parse().unwrap();
        assert_eq!(bundle.to_string(), "j17.b3");
        for bad in ["j17", "j17.3", "j17.b", "j17.b3.1", ".b3"] {
            assert!(
                bad.parse::<BundleRef>().is_err(),
                "{bad:?} was taken for a bundle"
            );
        }
    }

    #[test]
    fn digests_are_strict_lower_case_hexadecimal() {
        let text = "00ff".repeat(16);
        assert_eq!(text.parse::<Digest>().unwrap().to_string(), text);
        assert!(text.to_uppercase().parse::<Digest>().is_err());
        assert!(text[2..].parse::<Digest>().is_err());
        assert!("é".repeat(32).parse::<Digest>().is_err());
    }

    #[test]
    fn names_are_safe_in_paths_and_certificates() {
        for good in ["a", "alice", "team-1.gpu_lab", &"x".repeat(63)] {
            assert!(good.parse::<UserName>().is_ok(), "{good:?}");
        }
        for bad in [
            "",
            ".",
            "..",
            "-a",
            "a/b",
            "a b",
            "é",
            "a\0",
            &"x".repeat(64),
        ] {
            assert!(bad.parse::<UserName>().is_err(), "{bad:?}");
        }
    }
}
