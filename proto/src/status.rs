//! The one table between error codes and gRPC, and the only place that builds or reads a `tonic::Status`.
//!
//! A refusal travels with its reason and field as standard rich error details, so that every gRPC client can read
//! them. What does not come from Trainyard (transport failures, proxies, the gRPC library itself) is sorted by what
//! the caller should do, and everything taken over is cut to a bounded length.

use std::error::Error;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use trainyard_common::error::{ErrorCode, Refusal};

/// The `domain` in the error details of our own refusals.
pub const ERROR_DOMAIN: &str = "trainyard";

/// Bytes of a message. It travels twice in HTTP/2 headers, percent-encoded (3 bytes each at worst) and in base64;
/// common peers take 16 KiB of headers.
const MAX_MESSAGE_BYTES: usize = 1024;
/// Bytes of a reason or a field.
const MAX_NAME_BYTES: usize = 256;
/// Errors that are followed down a source chain; real ones have fewer than ten.
const MAX_SOURCES: usize = 16;

/// The table: each code of ours has one of gRPC's, and no two share one.
const TABLE: [(ErrorCode, Code); 11] = [
    (ErrorCode::Invalid, Code::InvalidArgument),
    (ErrorCode::NotFound, Code::NotFound),
    (ErrorCode::AlreadyExists, Code::AlreadyExists),
    (ErrorCode::FailedPrecondition, Code::FailedPrecondition),
    (ErrorCode::Exhausted, Code::ResourceExhausted),
    (ErrorCode::PermissionDenied, Code::PermissionDenied),
    (ErrorCode::Unauthenticated, Code::Unauthenticated),
    (ErrorCode::Unavailable, Code::Unavailable),
    (ErrorCode::Compacted, Code::OutOfRange),
    (ErrorCode::Unimplemented, Code::Unimplemented),
    (ErrorCode::Internal, Code::Internal),
];

/// The status that carries a refusal to a caller.
#[must_use]
pub fn to_status(refusal: &Refusal) -> Status {
    let Refusal {
        code,
        reason,
        field,
        message,
    } = refusal;
    let code = TABLE
        .iter()
        .find_map(|(own, grpc)| (own == code).then_some(*grpc))
        .unwrap_or(Code::Internal);
    let message = cut(message, MAX_MESSAGE_BYTES);
    let mut details = ErrorDetails::new();
    details.set_error_info(cut(reason, MAX_NAME_BYTES), ERROR_DOMAIN, []);
    if let Some(field) = field {
        details.add_bad_request_violation(cut(field, MAX_NAME_BYTES), message.as_str());
    }
    Status::with_error_details(code, message, details)
}

/// The refusal in a status: the one that [`to_status`] put there, or for any other status the nearest one.
#[must_use]
pub fn from_status(status: &Status) -> Refusal {
    let details = status.get_error_details();
    match details.error_info() {
        Some(info) if info.domain == ERROR_DOMAIN => Refusal {
            code: own_code(status.code()),
            reason: cut(&info.reason, MAX_NAME_BYTES),
            field: details
                .bad_request()
                .and_then(|request| request.field_violations.first())
                .map(|violation| cut(&violation.field, MAX_NAME_BYTES)),
            message: cut(status.message(), MAX_MESSAGE_BYTES),
        },
        _ => foreign(status),
    }
}

fn own_code(code: Code) -> ErrorCode {
    TABLE
        .iter()
        .find_map(|(own, grpc)| (*grpc == code).then_some(*own))
        .unwrap_or(ErrorCode::Internal)
}

/// A status that no Trainyard wrote.
fn foreign(status: &Status) -> Refusal {
    let message = whole_message(status);
    let (code, reason) = if is_transport(status, &message) {
        // A peer that refuses our certificate says so in a TLS alert after the handshake is done on our side, so that
        // it looks like any broken connection. Whether it will be taken later is not known: the text says what it was.
        let refused = message.contains("fatal alert");
        let reason = if refused { "TLS_REFUSED" } else { "TRANSPORT" };
        (ErrorCode::Unavailable, reason)
    } else {
        by_code(status.code(), &message)
    };
    Refusal::new(code, reason, message)
}

/// Words in which the transport's errors speak where their type is lost on the way.
const TRANSPORT_WORDS: [&str; 9] = [
    "transport error",
    "broken pipe",
    "connection",
    "fatal alert",
    "h2 protocol error",
    "error reading a body",
    "stream closed",
    "unexpected eof",
    "tls handshake",
];

/// Whether it speaks of the connection rather than of the request. A status that came over the wire has no source;
/// one that the library made of a failure of its own has.
fn is_transport(status: &Status, message: &str) -> bool {
    let told = matches!(
        status.code(),
        Code::Unknown | Code::Internal | Code::Cancelled | Code::Unavailable | Code::Aborted
    );
    let message = message.to_ascii_lowercase();
    told && (status.source().is_some() || TRANSPORT_WORDS.iter().any(|word| message.contains(word)))
}

fn by_code(code: Code, message: &str) -> (ErrorCode, &'static str) {
    match code {
        Code::Ok => (ErrorCode::Internal, "OK_AS_ERROR"),
        Code::Cancelled => (ErrorCode::Unavailable, "CALL_CANCELLED"),
        Code::DeadlineExceeded => (ErrorCode::Unavailable, "DEADLINE_EXCEEDED"),
        Code::Aborted => (ErrorCode::Unavailable, "ABORTED"),
        // The gRPC library's own limit on messages; it is not a position in a log.
        Code::OutOfRange if message.contains("message length too large") => {
            (ErrorCode::Exhausted, "MESSAGE_TOO_LARGE")
        }
        Code::OutOfRange => (ErrorCode::Invalid, "OUT_OF_RANGE"),
        Code::Unknown => (ErrorCode::Internal, "UNKNOWN"),
        Code::DataLoss => (ErrorCode::Internal, "DATA_LOSS"),
        Code::InvalidArgument => (ErrorCode::Invalid, "INVALID_ARGUMENT"),
        Code::NotFound => (ErrorCode::NotFound, "NOT_FOUND"),
        Code::AlreadyExists => (ErrorCode::AlreadyExists, "ALREADY_EXISTS"),
        Code::FailedPrecondition => (ErrorCode::FailedPrecondition, "FAILED_PRECONDITION"),
        Code::ResourceExhausted => (ErrorCode::Exhausted, "RESOURCE_EXHAUSTED"),
        Code::PermissionDenied => (ErrorCode::PermissionDenied, "PERMISSION_DENIED"),
        Code::Unauthenticated => (ErrorCode::Unauthenticated, "UNAUTHENTICATED"),
        Code::Unavailable => (ErrorCode::Unavailable, "UNAVAILABLE"),
        Code::Unimplemented => (ErrorCode::Unimplemented, "UNIMPLEMENTED"),
        Code::Internal => (ErrorCode::Internal, "INTERNAL"),
    }
}

/// The message with those of its sources that say something new, outermost first.
fn whole_message(status: &Status) -> String {
    let mut message = cut(status.message(), MAX_MESSAGE_BYTES);
    let mut source = status.source();
    for _ in 0..MAX_SOURCES {
        let Some(error) = source else { break };
        let text = cut(&error.to_string(), MAX_MESSAGE_BYTES);
        if !message.contains(&text) {
            if !message.is_empty() {
                message.push_str(": ");
            }
            message.push_str(&text);
        }
        source = error.source();
    }
    if message.is_empty() {
        message.push_str(status.code().description());
    }
    cut(&message, MAX_MESSAGE_BYTES)
}

/// At most `limit` bytes of a text, with an ellipsis if that is not all of it.
fn cut(text: &str, limit: usize) -> String {
    const ELLIPSIS: &str = "…";
    if text.len() <= limit {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(limit - ELLIPSIS.len());
    format!("{}{ELLIPSIS}", &text[..end])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::io;

    use super::*;

    #[test]
    fn every_code_of_ours_comes_back_with_all_it_carries() {
        let mut seen = BTreeSet::new();
        for (code, grpc) in TABLE {
            assert!(seen.insert(i32::from(grpc)), "{grpc:?} is there twice");
            let plain = Refusal::new(code, "SOME_REASON", "it is so: do this");
            let status = to_status(&plain);
            assert_eq!(status.code(), grpc);
            assert_eq!(from_status(&status), plain);
            let at = plain.at("spec.nodes");
            assert_eq!(from_status(&to_status(&at)), at);
        }
    }

    /// A status as a client gets it: through HTTP/2 headers.
    fn over_the_wire(status: &Status) -> Status {
        let response = Status::clone(status).into_http::<()>();
        Status::from_header_map(response.headers()).expect("a trailers-only response")
    }

    #[test]
    fn refusals_cross_the_wire() {
        let refusal =
            Refusal::new(ErrorCode::Compacted, "LOG_COMPACTED", "zu alt: 100 % — ✂").at("offset");
        assert_eq!(from_status(&over_the_wire(&to_status(&refusal))), refusal);
    }

    #[test]
    fn long_messages_are_cut_at_a_character() {
        let long = "é".repeat(5000);
        let refusal = Refusal::new(ErrorCode::Invalid, &long, long.clone()).at(&long);
        let status = to_status(&refusal);
        let back = from_status(&over_the_wire(&status));
        assert!(back.message.len() <= MAX_MESSAGE_BYTES && back.message.ends_with('…'));
        assert!(back.reason.len() <= MAX_NAME_BYTES);
        assert!(
            back.field
                .is_some_and(|field| field.len() <= MAX_NAME_BYTES)
        );
        let headers = Status::clone(&status).into_http::<()>();
        let bytes: usize = headers.headers().values().map(|value| value.len()).sum();
        assert!(bytes < 16 << 10, "{bytes} bytes of headers");
        let foreign = from_status(&Status::unknown(long));
        assert!(foreign.message.len() <= MAX_MESSAGE_BYTES);
    }

    fn sorted(status: Status) -> (ErrorCode, String) {
        let refusal = from_status(&status);
        (refusal.code, refusal.reason)
    }

    #[test]
    fn foreign_statuses_are_sorted_by_what_to_do() {
        let cases = [
            (
                Status::unavailable("tcp connect error"),
                ErrorCode::Unavailable,
                "UNAVAILABLE",
            ),
            (
                Status::unknown("transport error"),
                ErrorCode::Unavailable,
                "TRANSPORT",
            ),
            (
                Status::unknown("Broken pipe (os error 32)"),
                ErrorCode::Unavailable,
                "TRANSPORT",
            ),
            (
                Status::internal("h2 protocol error: http2 error"),
                ErrorCode::Unavailable,
                "TRANSPORT",
            ),
            (
                Status::unknown("received fatal alert: CertificateRequired"),
                ErrorCode::Unavailable,
                "TLS_REFUSED",
            ),
            (
                Status::cancelled("Timeout expired"),
                ErrorCode::Unavailable,
                "CALL_CANCELLED",
            ),
            (
                Status::deadline_exceeded(""),
                ErrorCode::Unavailable,
                "DEADLINE_EXCEEDED",
            ),
            (Status::unknown("what?"), ErrorCode::Internal, "UNKNOWN"),
            (
                Status::internal("panicked"),
                ErrorCode::Internal,
                "INTERNAL",
            ),
            (Status::data_loss(""), ErrorCode::Internal, "DATA_LOSS"),
            (
                Status::unimplemented(""),
                ErrorCode::Unimplemented,
                "UNIMPLEMENTED",
            ),
            (
                Status::out_of_range(
                    "Error, decoded message length too large: found 9 bytes, the limit is: 4 bytes",
                ),
                ErrorCode::Exhausted,
                "MESSAGE_TOO_LARGE",
            ),
            (
                Status::out_of_range("beyond"),
                ErrorCode::Invalid,
                "OUT_OF_RANGE",
            ),
            (
                Status::permission_denied("connection not allowed by policy"),
                ErrorCode::PermissionDenied,
                "PERMISSION_DENIED",
            ),
        ];
        for (status, code, reason) in cases {
            let shown = status.to_string();
            assert_eq!(sorted(status), (code, reason.to_owned()), "{shown}");
        }
    }

    #[test]
    fn the_sources_of_a_transport_error_are_kept_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("transport error")]
        struct Transport(#[source] io::Error);
        let alert = io::Error::other("received fatal alert: UnknownCA");
        let status = Status::from_error(Box::new(Transport(alert)));
        assert_eq!(status.code(), Code::Unknown);
        let refusal = from_status(&status);
        assert_eq!(refusal.code, ErrorCode::Unavailable);
        assert_eq!(refusal.reason, "TLS_REFUSED");
        assert_eq!(
            refusal.message,
            "transport error: received fatal alert: UnknownCA"
        );
    }

    #[test]
    fn an_empty_message_says_at_least_what_the_code_means() {
        assert!(!from_status(&Status::unimplemented("")).message.is_empty());
    }

    #[test]
    fn details_of_somebody_else_are_not_taken_for_ours() {
        let mut details = ErrorDetails::new();
        details.set_error_info("OURS", "example.org", []);
        let status = Status::with_error_details(Code::OutOfRange, "x", details);
        assert_eq!(sorted(status), (ErrorCode::Invalid, "OUT_OF_RANGE".into()));
    }
}
