//! What `yard` itself failed at: exit codes after sysexits, and the one way in which failures are reported.

use std::fmt::Display;
use std::io;
use std::path::Path;

use serde_json::json;
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_proto::status;
use trainyard_transport::client::ConnectError;
use trainyard_transport::skew;

use crate::output;

/// Wrong use of the command line (EX_USAGE).
pub(crate) const EXIT_USAGE: u8 = 64;
/// An invalid job or other data (EX_DATAERR).
pub(crate) const EXIT_INVALID: u8 = 65;
/// What was named is not there (EX_NOINPUT).
pub(crate) const EXIT_NOT_FOUND: u8 = 66;
/// The coordinator cannot be reached (EX_UNAVAILABLE).
pub(crate) const EXIT_UNAVAILABLE: u8 = 69;
/// A fault of ours (EX_SOFTWARE).
pub(crate) const EXIT_INTERNAL: u8 = 70;
/// Reading or writing failed (EX_IOERR).
pub(crate) const EXIT_IO: u8 = 74;
/// Refused (EX_NOPERM).
pub(crate) const EXIT_REFUSED: u8 = 77;
/// What `run` and `wait` end with for a job that was cancelled: as a shell does for Ctrl-C.
pub(crate) const EXIT_CANCELLED: u8 = 130;
/// What they end with for a job whose time limit passed: as `timeout` does.
pub(crate) const EXIT_TIME_LIMIT: u8 = 124;
/// What they end with when the infrastructure gave the job up (EX_TEMPFAIL).
pub(crate) const EXIT_INFRASTRUCTURE: u8 = 75;

/// An error of `yard` itself, as opposed to a job that failed.
#[derive(Debug)]
pub(crate) struct Failure {
    /// The exit code.
    pub(crate) exit: u8,
    /// Stable machine-readable reason in capitals.
    pub(crate) reason: String,
    /// The field or flag at fault.
    pub(crate) field: Option<String>,
    /// What failed, on what, and the remedy.
    pub(crate) message: String,
}

impl Failure {
    /// A failure with its exit code.
    pub(crate) fn new(exit: u8, reason: &str, message: impl Into<String>) -> Self {
        Self {
            exit,
            reason: reason.to_owned(),
            field: None,
            message: message.into(),
        }
    }

    /// A wrong command line.
    pub(crate) fn usage(flag: &str, message: impl Display) -> Self {
        let mut failure = Self::new(EXIT_USAGE, "USAGE", format!("{flag}: {message}"));
        failure.field = Some(flag.to_owned());
        failure
    }

    /// Invalid data in a named field.
    pub(crate) fn invalid(field: &str, message: impl Display) -> Self {
        let mut failure = Self::new(EXIT_INVALID, "INVALID_FIELD", format!("{field}: {message}"));
        failure.field = Some(field.to_owned());
        failure
    }

    /// The machine refused an operation; `doing` is in the infinitive.
    pub(crate) fn io(doing: &str, error: &io::Error) -> Self {
        Self::new(EXIT_IO, "IO", format!("cannot {doing}: {error}"))
    }

    /// The same with the path that it was about.
    pub(crate) fn path(doing: &str, path: &Path, error: &io::Error) -> Self {
        let exit = if error.kind() == io::ErrorKind::NotFound {
            EXIT_NOT_FOUND
        } else {
            EXIT_IO
        };
        Self::new(
            exit,
            "IO",
            format!("cannot {doing} {}: {error}", path.display()),
        )
    }

    /// An error with its causes, one after the other.
    pub(crate) fn chain(exit: u8, reason: &str, error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(exit, reason, chain(error))
    }

    /// Tells the user: a sentence on standard error, or with `--json` an object on standard output.
    pub(crate) fn report(&self, json: bool) {
        if json {
            let object = json!({
                "type": "result",
                "source": "yard",
                "exit_code": self.exit,
                "error": { "reason": self.reason, "field": self.field, "message": self.message },
            });
            output::line(&object.to_string());
        } else {
            output::error(&self.message);
        }
    }
}

/// An error's text with those of its causes.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Some libraries repeat the cause in their own text.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let exit = match refusal.code {
            ErrorCode::Invalid | ErrorCode::AlreadyExists => EXIT_INVALID,
            ErrorCode::NotFound => EXIT_NOT_FOUND,
            // More than the cluster could ever have is a fault of the job.
            ErrorCode::FailedPrecondition if refusal.reason == "INFEASIBLE" => EXIT_INVALID,
            ErrorCode::FailedPrecondition
            | ErrorCode::Exhausted
            | ErrorCode::PermissionDenied
            | ErrorCode::Unauthenticated => EXIT_REFUSED,
            ErrorCode::Unavailable => EXIT_UNAVAILABLE,
            ErrorCode::Compacted | ErrorCode::Unimplemented | ErrorCode::Internal => EXIT_INTERNAL,
        };
        Self {
            exit,
            reason: refusal.reason,
            field: refusal.field,
            message: refusal.message,
        }
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        match trainyard_transport::client::connect_error(&status) {
            Some(error) => Self::from(error.clone()),
            None if skew::says_expired(&status) => Self::new(
                EXIT_REFUSED,
                "CERTIFICATE_TIME",
                "the coordinator holds your certificate for expired or not valid yet: either it has ended, or there is \
                 clock skew between the two machines; `yard doctor` says which",
            ),
            None => Self::from(status::from_status(&status)),
        }
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        let mut failure = Self::chain(EXIT_UNAVAILABLE, "UNREACHABLE", &error);
        if error.is_unreachable() {
            failure.message.push_str("; running jobs are not affected");
        }
        failure
    }
}
