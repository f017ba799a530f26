//! Error codes, each defined by what the caller should do, and the refusal that carries one to a user.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What went wrong, in terms of what the caller should do about it. One table in `trainyard-proto` maps these to gRPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ErrorCode {
    /// The request is wrong: fix the named field.
    Invalid,
    /// There is no such thing, or it is not yours to see.
    NotFound,
    /// The same name or request id is taken by something else.
    AlreadyExists,
    /// The thing is not in a state that allows this; look at it again.
    FailedPrecondition,
    /// A limit or quota is met: ask for less, or wait until there is room.
    Exhausted,
    /// You are known, and you may not do this.
    PermissionDenied,
    /// You are not known: enrol with `yard login` or `yard join`.
    Unauthenticated,
    /// Try again later; nothing is wrong with the request.
    Unavailable,
    /// The position asked for is no longer kept: read again from the start.
    Compacted,
    /// Not built, or not in this version.
    Unimplemented,
    /// Our fault: tell the operator.
    Internal,
}

impl ErrorCode {
    /// The stable machine-readable name, as on the wire and in `--json`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "INVALID",
            Self::NotFound => "NOT_FOUND",
            Self::AlreadyExists => "ALREADY_EXISTS",
            Self::FailedPrecondition => "FAILED_PRECONDITION",
            Self::Exhausted => "EXHAUSTED",
            Self::PermissionDenied => "PERMISSION_DENIED",
            Self::Unauthenticated => "UNAUTHENTICATED",
            Self::Unavailable => "UNAVAILABLE",
            Self::Compacted => "COMPACTED",
            Self::Unimplemented => "UNIMPLEMENTED",
            Self::Internal => "INTERNAL",
        }
    }
}

/// A request that is refused: what, why, and the remedy, in one sentence that a user can act on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// What the caller should do.
    pub code: ErrorCode,
    /// Stable machine-readable reason in capitals, such as `REQUEST_ID_REUSED`.
    pub reason: String,
    /// The field of the request that is at fault, if one is.
    pub field: Option<String>,
    /// Names the field, the limit and the remedy.
    pub message: String,
}

impl Refusal {
    /// A refusal without a field.
    #[must_use]
    pub fn new(code: ErrorCode, reason: &str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason: reason.to_owned(),
            field: None,
            message: message.into(),
        }
    }

    /// The same refusal, naming the field at fault.
    #[must_use]
    pub fn at(mut self, field: &str) -> Self {
        self.field = Some(field.to_owned());
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refusal {}
