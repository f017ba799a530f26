//! Between messages and domain types: `From<&Domain> for v1::Message` and `TryFrom<v1::Message> for Domain`.
//!
//! What comes from the wire is refused rather than guessed at: each refusal is one [`InvalidField`] with the dotted path
//! of the field. Messages are taken apart exhaustively, so that a new field does not compile until somebody has
//! decided what it means here. Rules about values that only the domain has ([`trainyard_common::spec::JobSpec::validate`])
//! are not checked here.

mod admin;
mod bundle;
mod enums;
mod inventory;
mod job;
mod member;
mod node;
pub mod pages;
mod scalar;
mod spec;
pub mod store;

use std::fmt;

use trainyard_common::error::{ErrorCode, Refusal};

pub use admin::without_secret;
pub use enums::{WireEnum, enum_field, optional_enum_field};
pub use scalar::{
    attempt_number, cluster, digest, digest_bytes, digests, duration, job_id, list, node_id,
    optional, optional_digest, optional_duration, optional_timestamp, port, required, text,
    timestamp, to_duration, to_timestamp, token_id,
};

/// A field of a message that is missing or has a value that means nothing here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidField {
    /// The path from the converted message, such as `spec.resources_per_node.gpus`; empty for the message itself.
    pub field: String,
    /// What is wrong with it, and what would be right.
    pub problem: String,
}

impl InvalidField {
    /// A problem with `field`.
    #[must_use]
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            problem: problem.into(),
        }
    }

    /// `field` is not there and has to be.
    #[must_use]
    pub fn missing(field: impl Into<String>) -> Self {
        Self::new(field, "is missing")
    }

    /// The same problem, seen from the message that holds the converted one in its field `outer`.
    #[must_use]
    pub fn under(mut self, outer: &str) -> Self {
        self.field = if self.field.is_empty() {
            outer.to_owned()
        } else {
            format!("{outer}.{}", self.field)
        };
        self
    }
}

impl fmt::Display for InvalidField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.field.is_empty() {
            f.write_str(&self.problem)
        } else {
            write!(f, "{}: {}", self.field, self.problem)
        }
    }
}

impl std::error::Error for InvalidField {}

impl From<InvalidField> for Refusal {
    fn from(invalid: InvalidField) -> Self {
        let refusal = Self::new(ErrorCode::Invalid, "INVALID_FIELD", invalid.to_string());
        if invalid.field.is_empty() {
            refusal
        } else {
            refusal.at(&invalid.field)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_grows_from_the_inside_out() {
        let invalid = InvalidField::missing("gpus")
            .under("resources_per_node")
            .under("spec");
        assert_eq!(
            invalid.to_string(),
            "spec.resources_per_node.gpus: is missing"
        );
        let refusal = Refusal::from(invalid);
        assert_eq!(refusal.code, ErrorCode::Invalid);
        assert_eq!(refusal.reason, "INVALID_FIELD");
        assert_eq!(
            refusal.field.as_deref(),
            Some("spec.resources_per_node.gpus")
        );
        assert_eq!(refusal.message, "spec.resources_per_node.gpus: is missing");
    }

    #[test]
    fn a_problem_of_the_message_itself_takes_the_name_of_its_field() {
        let invalid = InvalidField::new("", "is odd");
        assert_eq!(invalid.to_string(), "is odd");
        assert_eq!(Refusal::from(invalid.clone()).field, None);
        assert_eq!(invalid.under("state").to_string(), "state: is odd");
    }
}
