//! What a rank wrote, held against the pattern that it was to write: every byte in its place, or a mark that says how
//! many are missing.

use std::collections::BTreeMap;

use serde_json::Value;

use super::ledger::{Who, pattern};

/// A piece of a rank's standard output as `yard logs --json` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    Text(String),
    /// So many bytes were dropped here.
    Gap(u64),
}

/// How far the output of a rank goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Extent {
    /// Bytes that are there or marked as dropped.
    pub(crate) bytes: u64,
    /// Bytes that are marked as dropped.
    pub(crate) dropped: u64,
}

/// Pieces by rank, in order; lines that are no output are left out.
pub(crate) fn pieces(text: &str) -> BTreeMap<Who, Vec<Piece>> {
    let mut found: BTreeMap<Who, Vec<Piece>> = BTreeMap::new();
    for line in text.lines() {
        let Ok(value) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        let Some(who) = who(&value) else {
            continue;
        };
        let piece = match value["type"].as_str() {
            Some("log") if value["stream"] == "stdout" => value["text"]
                .as_str()
                .map(|text| Piece::Text(text.to_owned())),
            Some("gap") => value["dropped_bytes"].as_u64().map(Piece::Gap),
            _ => None,
        };
        found.entry(who).or_default().extend(piece);
    }
    found
}

fn who(value: &Value) -> Option<Who> {
    let (job, task, attempt) = attempt_id(value["attempt"].as_str()?)?;
    let rank = u32::try_from(value["rank"].as_u64()?).ok()?;
    Some(Who {
        job,
        task,
        attempt,
        rank,
    })
}

/// The parts of an id such as `j17.0.1`.
pub(crate) fn attempt_id(text: &str) -> Option<(u64, u32, u32)> {
    let mut parts = text.strip_prefix('j')?.split('.');
    let id = (
        parts.next()?.parse().ok()?,
        parts.next()?.parse().ok()?,
        parts.next()?.parse().ok()?,
    );
    parts.next().is_none().then_some(id)
}

/// Bytes of the first lines of a rank's pattern.
pub(crate) fn length(who: Who, lines: u64) -> u64 {
    (0..lines)
        .map(|index| pattern(who, index).len() as u64)
        .sum()
}

/// Holds pieces against the pattern of at most so many lines.
///
/// # Errors
/// Where it differs.
pub(crate) fn against(who: Who, lines: u64, pieces: &[Piece]) -> Result<Extent, String> {
    let expected: String = (0..lines).map(|index| pattern(who, index)).collect();
    let mut extent = Extent::default();
    for piece in pieces {
        match piece {
            Piece::Gap(bytes) => {
                extent.bytes += bytes;
                extent.dropped += bytes;
            }
            Piece::Text(text) => {
                let from = usize::try_from(extent.bytes).unwrap_or(usize::MAX);
                if !expected
                    .get(from..)
                    .is_some_and(|rest| rest.starts_with(text))
                {
                    let wanted = expected.get(from..).unwrap_or_default();
                    return Err(format!(
                        "at byte {from} there is {text:.80?} instead of {wanted:.80?}"
                    ));
                }
                extent.bytes += text.len() as u64;
            }
        }
    }
    Ok(extent)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHO: Who = Who {
        job: 1,
        task: 2,
        attempt: 3,
        rank: 0,
    };

    #[test]
    fn whole_output_and_marked_gaps_pass_and_everything_else_is_found() {
        let whole: String = (0..10).map(|index| pattern(WHO, index)).collect();
        let text = |from: usize, to: usize| Piece::Text(whole[from..to].to_owned());
        let all = whole.len();
        let full = Extent {
            bytes: all as u64,
            dropped: 0,
        };
        assert_eq!(length(WHO, 10), full.bytes);
        assert_eq!(against(WHO, 10, &[text(0, 7), text(7, all)]), Ok(full));
        let marked = [text(0, 7), Piece::Gap(3), text(10, all)];
        assert_eq!(against(WHO, 10, &marked), Ok(Extent { dropped: 3, ..full }));
        assert!(against(WHO, 10, &[text(0, 7), text(10, all)]).is_err());
        assert!(against(WHO, 10, &[text(0, 7), text(0, 7)]).is_err());
        assert_eq!(against(WHO, 10, &[text(0, 7)]).unwrap().bytes, 7);
    }

    #[test]
    fn pieces_are_told_apart() {
        let text = "{\"type\":\"log\",\"attempt\":\"j1.2.3\",\"rank\":0,\"stream\":\"stdout\",\"text\":\"a\\n\"}\n\
                    {\"type\":\"log\",\"attempt\":\"j1.2.3\",\"rank\":0,\"stream\":\"stderr\",\"text\":\"b\"}\n\
                    {\"type\":\"gap\",\"attempt\":\"j1.2.3\",\"rank\":0,\"dropped_bytes\":9,\"cause\":\"x\"}\nrest";
        assert_eq!(
            pieces(text)[&WHO],
            [Piece::Text("a\n".to_owned()), Piece::Gap(9)]
        );
    }
}
