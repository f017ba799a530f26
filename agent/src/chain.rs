//! Errors as text with their causes, for the log and for messages that travel.

use std::error::Error;
use std::fmt::Write;

/// Causes that are followed; real chains have fewer than ten.
const MAX_CAUSES: usize = 16;

/// The error and its causes in one line.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    for _ in 0..MAX_CAUSES {
        let Some(error) = cause else { break };
        let own = error.to_string();
        // Some libraries repeat their cause in their own text.
        if !text.contains(&own) {
            let _ = write!(text, ": {own}");
        }
        cause = error.source();
    }
    text
}
