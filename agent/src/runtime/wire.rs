//! What agent and shim tell each other: files in the attempt directory and JSON lines on its socket. Both sides ignore
//! fields that they do not know, so that an upgraded agent and an older shim understand each other.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use trainyard_common::ids::AttemptRef;
use trainyard_common::member::{Cleanup, Go, MemberSpec, Stop};
use trainyard_transport::sealed::FileRecord;

use super::carrier::BundleFile;
use super::{RunAs, ShimState};

/// Longest line on the socket. A go message of the largest gang (10,000 addresses of up to 45 bytes) and the ends of
/// 1024 ranks (about 150 bytes each) stay well below.
pub(crate) const MAX_LINE: usize = 1 << 20;

/// `member.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MemberFile {
    pub(crate) attempt: AttemptRef,
    pub(crate) spec: MemberSpec,
    pub(crate) settings: Settings,
}

/// What the shim must know and the coordinator did not say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// The kernel's boot id when the member was accepted.
    pub(crate) boot_id: String,
    /// Random text in the environment of every process of the attempt (`YARD_ATTEMPT_KEY`).
    pub(crate) key: String,
    pub(crate) log_limit: u64,
    pub(crate) run_as: Option<RunAs>,
}

/// `shim.json`: who the shim is, written before it does anything; for cleaning up after its death.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ShimFile {
    pub(crate) pid: i32,
    /// In clock ticks since boot, as in `/proc/PID/stat`.
    pub(crate) start_time: u64,
    /// What `/proc/self/ns/pid` points to: in another one the numbers mean nothing.
    #[serde(default)]
    pub(crate) pid_namespace: String,
    pub(crate) cgroup: Option<PathBuf>,
    /// What the shim found in `member.json` or `bundle.json`, for an agent that finds that file damaged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) member: Option<Box<MemberFile>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) bundle: Option<Box<BundleFile>>,
}

impl FileRecord for MemberFile {
    const KIND: &'static str = "member";
    const VERSION: u32 = 2;
}

impl FileRecord for ShimFile {
    const KIND: &'static str = "shim";
    const VERSION: u32 = 2;
}

impl FileRecord for Command {
    const KIND: &'static str = "go";
    const VERSION: u32 = 2;
}

impl FileRecord for Status {
    const KIND: &'static str = "status";
    const VERSION: u32 = 2;
}

/// One line from agent to shim, and the content of `go.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Command {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) go: Option<Go>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) interface: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) stop: Option<Stop>,
    /// How long the machine will have been up (its sleep included) when the lease is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) lease: Option<Duration>,
}

/// One line from shim to agent, and the content of `status.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Status {
    state: ShimState,
    /// Beside `STOPPING`, so that an agent that does not know of it understands the state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cleanup: Option<Cleanup>,
}

impl Status {
    pub(crate) fn new(state: ShimState) -> Self {
        match state {
            ShimState::CleanupPending(cleanup) => Self {
                state: ShimState::Stopping,
                cleanup: Some(cleanup),
            },
            state => Self {
                state,
                cleanup: None,
            },
        }
    }

    pub(crate) fn into_state(self) -> ShimState {
        match (self.state, self.cleanup) {
            (ShimState::Stopping, Some(cleanup)) => ShimState::CleanupPending(cleanup),
            (state, _) => state,
        }
    }
}

/// `message` as one line with its end.
pub(crate) fn line<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(message)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Cuts a byte stream into lines of bounded length.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    buffer: Vec<u8>,
}

impl Lines {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole line without its end.
    ///
    /// # Errors
    /// The line is longer than [`MAX_LINE`]; the stream must be given up.
    pub(crate) fn take(&mut self) -> io::Result<Option<Vec<u8>>> {
        match self.buffer.iter().position(|byte| *byte == b'\n') {
            Some(end) if end <= MAX_LINE => {
                let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
                line.pop();
                Ok(Some(line))
            }
            None if self.buffer.len() <= MAX_LINE => Ok(None),
            Some(_) | None => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "line is too long",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_and_bounded() {
        let mut lines = Lines::default();
        lines.push(b"a\n\nbc");
        assert_eq!(lines.take().unwrap(), Some(b"a".to_vec()));
        assert_eq!(lines.take().unwrap(), Some(Vec::new()));
        assert_eq!(lines.take().unwrap(), None);
        lines.push(b"d\n");
        assert_eq!(lines.take().unwrap(), Some(b"bcd".to_vec()));
        lines.push(&vec![b'x'; MAX_LINE]);
        assert_eq!(lines.take().unwrap(), None);
        lines.push(b"xx");
        assert!(lines.take().is_err());
    }

    #[test]
    fn unknown_fields_are_ignored() {
        let command: Command = serde_json::from_str(
            r#"{"later":1,"stop":{"code":"OPERATOR","grace":{"secs":3,"nanos":0},"x":2}}"#,
        )
        .unwrap();
        assert!(command.go.is_none());
        assert_eq!(command.stop.unwrap().grace.as_secs(), 3);
    }
}
