//! `yard logs`, and how output of ranks is shown.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::json;
use trainyard_common::ids::AttemptRef;
use trainyard_common::spec::JobSpec;
use trainyard_common::time::Timestamp;
use trainyard_common::units::{format_bytes, parse_duration};
use trainyard_proto::v1;

use crate::args::{Global, LogsArgs};
use crate::connection::{self, Connection, Patience, is_away};
use crate::failure::{EXIT_NOT_FOUND, Failure};
use crate::jobs::{self, JobDetail};
use crate::output;

/// Shows a job's output.
pub(crate) async fn logs(global: &Global, args: LogsArgs) -> Result<ExitCode, Failure> {
    let connection = connection::connect(global).await?;
    let request = v1::ReadLogsRequest {
        job: args.job.0,
        task: args.task,
        rank: args.rank,
        attempt: args.attempt,
        follow: args.follow,
        tail: args.tail,
        since: args.since.as_deref().map(since).transpose()?,
        offset: 0,
    };
    let detail = jobs::get(&connection, args.job).await?;
    exists(&args, &detail)?;
    let mut printer = Printer::new(args.json, Labels::of(&detail.job.spec));
    read(&connection, request, &mut printer, Patience::default()).await?;
    printer.finish()?;
    Ok(ExitCode::SUCCESS)
}

/// Reads until the stream ends by itself; a coordinator that goes away meanwhile is waited for, and nothing is shown
/// twice.
pub(crate) async fn read(
    connection: &Connection,
    mut request: v1::ReadLogsRequest,
    printer: &mut Printer,
    mut patience: Patience,
) -> Result<(), Failure> {
    loop {
        let status = match connection.logs().read(request).await {
            Ok(answer) => {
                let mut stream = answer.into_inner();
                loop {
                    match stream.message().await {
                        Ok(Some(batch)) => {
                            patience.reset();
                            for entry in batch.entries {
                                printer.show(entry)?;
                            }
                        }
                        Ok(None) => return Ok(()),
                        Err(status) => break status,
                    }
                }
            }
            Err(status) => status,
        };
        if !request.follow || !is_away(&status) {
            return Err(status.into());
        }
        // The stream is read again from the start: what was shown is skipped by its offset, so `tail` must not cut.
        if printer.has_shown() {
            request.tail = None;
        }
        patience.wait().await;
    }
}

fn since(text: &str) -> Result<prost_types::Timestamp, Failure> {
    let at = match (text.parse::<jiff::Timestamp>(), parse_duration(text)) {
        (Ok(at), _) => at,
        (Err(_), Ok(ago)) => {
            let ago = jiff::SignedDuration::try_from(ago).unwrap_or(jiff::SignedDuration::MAX);
            jiff::Timestamp::now()
                .saturating_sub(ago)
                .unwrap_or_default()
        }
        (Err(_), Err(_)) => {
            return Err(Failure::usage(
                "--since",
                format!(
                    "{text:?} is neither a time such as 2026-11-24T08:00:00Z nor a duration such as 10m"
                ),
            ));
        }
    };
    // Records have whole milliseconds, and none is from before 1970.
    let millis = u64::try_from(at.as_millisecond()).unwrap_or(0);
    Ok(trainyard_proto::convert::timestamp(Timestamp(millis)))
}

/// Whether lines say which rank wrote them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Labels {
    /// A job of one rank: the bytes as they are.
    None,
    /// A gang of several ranks.
    Ranks,
    /// An array, and maybe several ranks.
    Tasks,
}

impl Labels {
    /// What a job's output needs.
    pub(crate) fn of(spec: &JobSpec) -> Self {
        match (spec.array.is_some(), spec.world_size()) {
            (true, _) => Self::Tasks,
            (false, 1) => Self::None,
            (false, _) => Self::Ranks,
        }
    }
}

/// Refuses what the job cannot have, rather than showing nothing.
fn exists(args: &LogsArgs, detail: &JobDetail) -> Result<(), Failure> {
    let spec = &detail.job.spec;
    let missing = |what: &str, has: String| {
        let message = format!("{} has no {what}; it has {has}", args.job);
        Err(Failure::new(EXIT_NOT_FOUND, "NO_SUCH_OUTPUT", message))
    };
    if let Some(rank) = args.rank.filter(|rank| *rank >= spec.world_size()) {
        return missing(
            &format!("rank {rank}"),
            format!("ranks 0 to {}", spec.world_size() - 1),
        );
    }
    let (first, last) = spec.array.map_or((0, 0), |array| (array.first, array.last));
    if let Some(task) = args.task.filter(|task| !(first..=last).contains(task)) {
        return missing(&format!("task {task}"), format!("tasks {first} to {last}"));
    }
    let attempts = detail
        .attempts
        .iter()
        .map(|attempt| attempt.id.attempt.0)
        .max()
        .unwrap_or(0);
    match args.attempt {
        Some(attempt) if attempt > attempts && spec.array.is_none() => missing(
            &format!("attempt {attempt}"),
            output::count(u64::from(attempts), "attempt"),
        ),
        _ => Ok(()),
    }
}

/// Writes output as it comes. Where lines are labelled a line appears when it is whole.
#[derive(Debug)]
pub(crate) struct Printer {
    json: bool,
    labels: Labels,
    clean: [bool; 2],
    seen: BTreeMap<(AttemptRef, u32), u64>,
    partial: BTreeMap<(AttemptRef, u32, bool), Vec<u8>>,
    gaps: BTreeMap<(AttemptRef, u32), Gap>,
}

/// Output of a rank that was dropped, told of at most once in [`GAP_PAUSE`]: a rank that writes faster than its disk
/// leaves hundreds of gaps.
#[derive(Debug)]
struct Gap {
    told: Instant,
    /// Dropped since then.
    bytes: u64,
    cause: String,
}

/// Time between two words about gaps of one rank.
const GAP_PAUSE: Duration = Duration::from_secs(1);

/// A line without an end is shown in pieces of this size.
const MAX_PARTIAL: usize = 64 << 10;

impl Printer {
    pub(crate) fn new(json: bool, labels: Labels) -> Self {
        let clean = [io::stdout().is_terminal(), io::stderr().is_terminal()];
        Self {
            json,
            labels,
            clean,
            seen: BTreeMap::new(),
            partial: BTreeMap::new(),
            gaps: BTreeMap::new(),
        }
    }

    /// Whether anything was shown yet.
    pub(crate) fn has_shown(&self) -> bool {
        !self.seen.is_empty()
    }

    /// Shows one piece of output, unless it was shown before.
    pub(crate) fn show(&mut self, entry: v1::LogEntry) -> Result<(), Failure> {
        let Some(attempt) = entry
            .attempt
            .and_then(|attempt| AttemptRef::try_from(attempt).ok())
        else {
            return Ok(());
        };
        let seen = self.seen.entry((attempt, entry.rank)).or_insert(0);
        if entry.next_offset <= *seen {
            return Ok(());
        }
        *seen = entry.next_offset;
        match entry.kind() {
            v1::LogKind::Dropped => self.show_gap(attempt, &entry),
            v1::LogKind::Stdout | v1::LogKind::Stderr if self.json => {
                let at = entry
                    .at
                    .and_then(|at| jiff::Timestamp::new(at.seconds, at.nanos).ok());
                let stream = if entry.kind() == v1::LogKind::Stderr {
                    "stderr"
                } else {
                    "stdout"
                };
                output::line(
                    &json!({
                        "type": "log",
                        "attempt": attempt,
                        "rank": entry.rank,
                        "stream": stream,
                        "at": at.map(|at| at.to_string()),
                        "text": String::from_utf8_lossy(&entry.data),
                    })
                    .to_string(),
                );
                Ok(())
            }
            v1::LogKind::Stdout => self.show_bytes(attempt, entry.rank, false, &entry.data),
            v1::LogKind::Stderr => self.show_bytes(attempt, entry.rank, true, &entry.data),
            // A kind of a later version: it cannot be shown, and nothing that can be is lost.
            v1::LogKind::Unspecified => Ok(()),
        }
    }

    fn show_gap(&mut self, attempt: AttemptRef, entry: &v1::LogEntry) -> Result<(), Failure> {
        let cause = String::from_utf8_lossy(&entry.data);
        if self.json {
            let gap = json!({
                "type": "gap", "attempt": attempt, "rank": entry.rank,
                "dropped_bytes": entry.dropped_bytes, "cause": cause,
            });
            output::line(&gap.to_string());
            return Ok(());
        }
        let key = (attempt, entry.rank);
        if let Some(gap) = self.gaps.get_mut(&key) {
            if gap.told.elapsed() < GAP_PAUSE && gap.cause == cause {
                gap.bytes += entry.dropped_bytes;
                return Ok(());
            }
            let gap = self.gaps.remove(&key);
            gap.iter().for_each(|gap| tell_gap(key, gap));
        }
        let mut gap = Gap {
            told: Instant::now(),
            bytes: entry.dropped_bytes,
            cause: cause.into_owned(),
        };
        tell_gap(key, &gap);
        gap.bytes = 0;
        self.gaps.insert(key, gap);
        Ok(())
    }

    fn show_bytes(
        &mut self,
        attempt: AttemptRef,
        rank: u32,
        stderr: bool,
        data: &[u8],
    ) -> Result<(), Failure> {
        let label = match self.labels {
            Labels::None => return self.write(stderr, data),
            Labels::Ranks => format!("[{rank}] "),
            Labels::Tasks => format!("[{}.{rank}] ", attempt.task),
        };
        let mut text = self
            .partial
            .remove(&(attempt, rank, stderr))
            .unwrap_or_default();
        text.extend_from_slice(data);
        let mut labelled = Vec::with_capacity(text.len() + 64);
        let mut rest = text.as_slice();
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            labelled.extend_from_slice(label.as_bytes());
            labelled.extend_from_slice(&rest[..=end]);
            rest = &rest[end + 1..];
        }
        if rest.len() > MAX_PARTIAL {
            labelled.extend_from_slice(label.as_bytes());
            labelled.extend_from_slice(rest);
            labelled.push(b'\n');
        } else if !rest.is_empty() {
            self.partial.insert((attempt, rank, stderr), rest.to_vec());
        }
        self.write(stderr, &labelled)
    }

    fn write(&self, stderr: bool, data: &[u8]) -> Result<(), Failure> {
        let cleaned;
        let data = if self.clean[usize::from(stderr)] {
            cleaned = for_terminal(data);
            &cleaned
        } else {
            data
        };
        if stderr {
            output::write_stderr(data);
            Ok(())
        } else {
            output::write_stdout(data)
        }
    }

    /// Shows lines that never ended, and gaps that were not told of yet.
    pub(crate) fn finish(&mut self) -> Result<(), Failure> {
        for (key, gap) in std::mem::take(&mut self.gaps) {
            tell_gap(key, &gap);
        }
        for ((attempt, rank, stderr), mut rest) in std::mem::take(&mut self.partial) {
            rest.push(b'\n');
            self.show_bytes(attempt, rank, stderr, &rest)?;
        }
        Ok(())
    }
}

fn tell_gap((attempt, rank): (AttemptRef, u32), gap: &Gap) {
    if gap.bytes > 0 {
        output::warning(&format!(
            "rank {rank} of {attempt}: {} of output dropped here: {}",
            format_bytes(gap.bytes),
            gap.cause
        ));
    }
}

/// Lets through what programs use to be readable (colours, carriage returns, tabs, erasing their own line) and shows
/// every other control character, so that output cannot retitle, reprogram or overwrite the rest of a terminal.
fn for_terminal(data: &[u8]) -> Vec<u8> {
    let mut shown = Vec::with_capacity(data.len());
    let mut rest = data;
    while let Some((&byte, after)) = rest.split_first() {
        if byte == 0x1b
            && let Some(length) = harmless_sequence(rest)
        {
            shown.extend_from_slice(&rest[..length]);
            rest = &rest[length..];
            continue;
        }
        match byte {
            b'\n' | b'\r' | b'\t' | b' '..=b'~' | 0x80.. => shown.push(byte),
            _ => shown.extend_from_slice(format!("\\x{byte:02x}").as_bytes()),
        }
        rest = after;
    }
    shown
}

/// Length of a colour (`ESC [ … m`) or erase-in-line (`ESC [ … K`) sequence at the start.
fn harmless_sequence(bytes: &[u8]) -> Option<usize> {
    let parameters = bytes.strip_prefix(b"\x1b[")?;
    let end = parameters
        .iter()
        .take(32)
        .position(|byte| !matches!(byte, b'0'..=b'9' | b';'))?;
    matches!(parameters[end], b'm' | b'K').then_some(end + 3)
}

/// A time that people read, in their own zone.
pub(crate) fn local_time(at: Timestamp) -> String {
    let Some(time) = i64::try_from(at.0)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
    else {
        return String::new();
    };
    time.to_zoned_datetime(jiff::tz::TimeZone::system())
        .strftime("%Y-%m-%d %H:%M:%S")
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_pass_and_everything_that_steers_a_terminal_is_shown() {
        assert_eq!(
            for_terminal(b"\x1b[1;31mred\x1b[0m\r\x1b[K"),
            b"\x1b[1;31mred\x1b[0m\r\x1b[K"
        );
        assert_eq!(for_terminal(b"\x1b]0;title\x07"), b"\\x1b]0;title\\x07");
        assert_eq!(for_terminal(b"\x1b[2J\x1b["), b"\\x1b[2J\\x1b[");
        assert_eq!(for_terminal("größer\n".as_bytes()), "größer\n".as_bytes());
    }

    #[test]
    fn since_takes_times_and_durations() {
        assert_eq!(since("1970-01-01T00:00:05Z").unwrap().seconds, 5);
        assert!(since("10m").unwrap().seconds > 1_000_000_000);
        assert!(since("yesterday").is_err());
    }
}
