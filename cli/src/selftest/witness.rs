//! What the ranks of a self test say of themselves, as it comes out of the cluster: their witness files from the outputs
//! and their numbered lines from the logs. It judges nothing.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use tokio::time::timeout;
use trainyard_common::ids::{AttemptRef, Digest, JobId};
use trainyard_proto::v1;
use trainyard_transport::blobs;

use crate::connection::Connection;
use crate::failure::{EXIT_INTERNAL, EXIT_IO, EXIT_UNAVAILABLE, Failure};
use crate::submit::blob_failure;

/// Bytes of the outputs of one member; a rank writes about 20 for each tick.
const MAX_OUTPUTS: u64 = 64 << 20;
/// Bytes of output of one job that are read.
const MAX_LOG: usize = 64 << 20;
/// The output of a job that is over is there, but for what a coordinator that was just started has still to be sent.
const LOG_TIMEOUT: Duration = Duration::from_secs(30);

/// What one rank wrote into its witness file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Witness {
    pub(crate) starts: u32,
    /// The number of the last tick.
    pub(crate) ticks: u32,
    /// A tick was missing or came twice.
    pub(crate) out_of_order: bool,
    /// The longest time between two lines.
    pub(crate) longest_gap: Duration,
    /// The code that it said it would end with.
    pub(crate) end: Option<u8>,
}

impl Witness {
    /// Reads a witness file; nothing if it is none.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut seen = Self::default();
        let mut last: Option<Duration> = None;
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let up = match words.as_slice() {
                ["start", up] => {
                    seen.starts += 1;
                    up
                }
                ["tick", number, up] => {
                    let number: u32 = number.parse().ok()?;
                    seen.out_of_order |= number != seen.ticks + 1;
                    seen.ticks = number;
                    up
                }
                ["end", code, up] => {
                    seen.end = Some(code.parse().ok()?);
                    up
                }
                _ => return None,
            };
            let up = Duration::try_from_secs_f64(up.parse().ok()?).ok()?;
            if let Some(before) = last {
                seen.longest_gap = seen.longest_gap.max(up.saturating_sub(before));
            }
            last = Some(up);
        }
        Some(seen)
    }
}

/// Output of one rank of an attempt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Output {
    pub(crate) text: String,
    pub(crate) dropped: u64,
}

/// The files of a tree, by path.
pub(crate) async fn files(
    connection: &Connection,
    tree: Digest,
) -> Result<BTreeMap<String, Vec<u8>>, Failure> {
    let tree = blobs::fetch_tree(&connection.channel, tree)
        .await
        .map_err(|error| blob_failure(&error))?;
    if tree.total_bytes() > MAX_OUTPUTS {
        let message = format!(
            "outputs of a self test have {} bytes, which none of its jobs writes",
            tree.total_bytes()
        );
        return Err(Failure::new(EXIT_INTERNAL, "OUTPUTS", message));
    }
    let cache = tempfile::Builder::new()
        .prefix("yard-selftest-")
        .tempdir()
        .map_err(|error| Failure::io("make a temporary directory", &error))?;
    blobs::fetch_blobs(&connection.channel, &tree, cache.path(), |_| {})
        .await
        .map_err(|error| blob_failure(&error))?;
    let mut files = BTreeMap::new();
    for (path, file) in tree.files() {
        let blob = blobs::blob_path(cache.path(), &file.digest);
        let bytes = std::fs::read(&blob).map_err(|error| Failure::path("read", &blob, &error))?;
        files.insert(path.to_owned(), bytes);
    }
    Ok(files)
}

/// The output of all ranks of a job that is over.
pub(crate) async fn output(
    connection: &Connection,
    job: JobId,
) -> Result<BTreeMap<(AttemptRef, u32), Output>, Failure> {
    let read = async {
        let request = v1::ReadLogsRequest {
            job: job.0,
            follow: true,
            ..v1::ReadLogsRequest::default()
        };
        let mut stream = connection.logs().read(request).await?.into_inner();
        let mut ranks: BTreeMap<(AttemptRef, u32), Vec<u8>> = BTreeMap::new();
        let mut dropped: BTreeMap<(AttemptRef, u32), u64> = BTreeMap::new();
        let mut bytes = 0;
        while let Some(batch) = stream.message().await? {
            for entry in batch.entries {
                let Some(attempt) = entry.attempt.and_then(|it| AttemptRef::try_from(it).ok())
                else {
                    continue;
                };
                let key = (attempt, entry.rank);
                bytes += entry.data.len();
                match entry.kind() {
                    v1::LogKind::Dropped => {
                        *dropped.entry(key).or_default() += entry.dropped_bytes;
                    }
                    v1::LogKind::Stdout if bytes <= MAX_LOG => {
                        ranks.entry(key).or_default().extend(&entry.data);
                    }
                    v1::LogKind::Stdout | v1::LogKind::Stderr | v1::LogKind::Unspecified => {}
                }
            }
        }
        let mut outputs: BTreeMap<_, Output> = BTreeMap::new();
        for (key, text) in ranks {
            outputs.entry(key).or_default().text = String::from_utf8_lossy(&text).into_owned();
        }
        for (key, bytes) in dropped {
            outputs.entry(key).or_default().dropped = bytes;
        }
        Ok(outputs)
    };
    timeout(LOG_TIMEOUT, read).await.unwrap_or_else(|_| {
        let seconds = LOG_TIMEOUT.as_secs();
        let message = format!("the output of {job} did not come to its end within {seconds} s");
        Err(Failure::new(EXIT_UNAVAILABLE, "LOG_TIMEOUT", message))
    })
}

/// Writes what was fetched to where a person can look at it.
pub(crate) fn keep(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), Failure> {
    let path = dir.join(name);
    let parent = path.parent().unwrap_or(dir);
    std::fs::create_dir_all(parent)
        .and_then(|()| std::fs::write(&path, bytes))
        .map_err(|error| {
            let mut failure = Failure::path("write", &path, &error);
            failure.exit = EXIT_IO;
            failure
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_witness_counts_starts_ticks_and_gaps() {
        let seen = Witness::parse("start 10.00\ntick 1 10.10\ntick 2 12.60\nend 3 12.61\n");
        let expected = Witness {
            starts: 1,
            ticks: 2,
            out_of_order: false,
            longest_gap: Duration::from_millis(2500),
            end: Some(3),
        };
        assert_eq!(seen, Some(expected));
    }

    #[test]
    fn what_should_not_be_is_seen() {
        let twice = Witness::parse("start 1.0\ntick 1 1.1\nstart 1.2\ntick 1 1.3\n").unwrap();
        assert!(twice.starts == 2 && twice.out_of_order);
        let missing = Witness::parse("start 1.0\ntick 2 1.2\n").unwrap();
        assert!(missing.out_of_order && missing.end.is_none());
        for text in ["begin 1.0", "start", "tick x 1.0", "end 300 1.0"] {
            assert_eq!(Witness::parse(text), None, "{text}");
        }
        assert_eq!(Witness::parse(""), Some(Witness::default()));
    }
}
