//! Brings what an attempt left to the coordinator once its processes are gone: first the rest of its output, then the
//! trees of its outputs and its checkpoint.
//!
//! `upload.json` in the attempt's directory says how far it is, so that an agent that is restarted does not begin anew.
//! What can never be uploaded becomes a warning; everything else is for the core to ask for again.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use trainyard_agent_core::Uploaded;
use trainyard_common::error::ErrorCode;
use trainyard_common::ids::Digest;
use trainyard_proto::status::from_status;
use trainyard_transport::blobs::{self, BlobError};
use trainyard_transport::client::ConnectError;
use trainyard_transport::files;
use trainyard_transport::pack::{PackOptions, Packed, pack};
use trainyard_transport::sealed::{self, FileRecord};

use crate::chain::chain;
use crate::link::Link;
use crate::logs::Logs;
use crate::runtime::AttemptDir;
use trainyard_transport::task::blocking;

/// Uploads at a time: a few keep the line busy, and packing reads whole disks.
const PARALLEL: usize = 4;
/// Names of things that were left out in a warning.
const NAMED: usize = 3;
/// Bytes of `upload.json` that are read; ours has a few hundred, plus warnings.
const MAX_FILE_BYTES: u64 = 256 << 10;

/// How far the upload of an attempt is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Progress {
    #[serde(default)]
    logs: bool,
    #[serde(default)]
    outputs: Option<Part>,
    #[serde(default)]
    checkpoint: Option<Part>,
}

impl FileRecord for Progress {
    const KIND: &'static str = "upload";
    const VERSION: u32 = 2;
}

/// What became of one directory.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Part {
    /// Nothing if there was nothing in it, or it could not be uploaded.
    tree: Option<Digest>,
    #[serde(default)]
    warning: Option<String>,
}

impl Progress {
    fn uploaded(self) -> Option<Uploaded> {
        let (Some(outputs), Some(checkpoint), true) = (self.outputs, self.checkpoint, self.logs)
        else {
            return None;
        };
        let warnings: Vec<_> = [outputs.warning, checkpoint.warning]
            .into_iter()
            .flatten()
            .collect();
        Some(Uploaded {
            outputs: outputs.tree,
            checkpoint: checkpoint.tree,
            warning: (!warnings.is_empty()).then(|| warnings.join("; ")),
        })
    }
}

/// Why an upload has to be tried again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UploadError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Blob(#[from] BlobError),
}

/// What an earlier agent process had finished uploading of an attempt. It blocks.
pub(crate) fn finished(dir: &AttemptDir) -> Option<Uploaded> {
    load(dir).uploaded()
}

/// Uploads. Clones share the limits.
#[derive(Debug, Clone)]
pub(crate) struct Uploader {
    link: Link,
    logs: Logs,
    slots: Arc<Semaphore>,
}

impl Uploader {
    pub(crate) fn new(link: Link, logs: Logs) -> Self {
        Self {
            link,
            logs,
            slots: Arc::new(Semaphore::new(PARALLEL)),
        }
    }

    /// Uploads everything that `dir` still has. `started` says whether ranks ran; if not, the directories hold only what
    /// the agent put there.
    ///
    /// # Errors
    /// What may go away by itself.
    pub(crate) async fn upload(
        self,
        dir: AttemptDir,
        started: bool,
    ) -> Result<Uploaded, UploadError> {
        let mut progress = {
            let dir = dir.clone();
            blocking(move || load(&dir)).await
        };
        if !progress.logs {
            self.logs.finish(dir.attempt()).await;
            progress.logs = true;
        }
        if !started {
            progress.outputs.get_or_insert_default();
            progress.checkpoint.get_or_insert_default();
        }
        if progress.outputs.is_none() {
            progress.outputs = Some(self.upload_dir("outputs", &dir.outputs()).await?);
            keep(&dir, &progress).await;
        }
        if progress.checkpoint.is_none() {
            progress.checkpoint = Some(self.upload_dir("checkpoint", &dir.checkpoint()).await?);
        }
        keep(&dir, &progress).await;
        Ok(progress.uploaded().unwrap_or_default())
    }

    async fn upload_dir(&self, what: &'static str, path: &Path) -> Result<Part, UploadError> {
        let _slot = self.slots.clone().acquire_owned().await;
        let root = path.to_owned();
        let packed = match blocking(move || pack(&root, &PackOptions::output())).await {
            Ok(packed) => packed,
            Err(error) => {
                let warning = format!("the {what} could not be uploaded: {}", chain(&error));
                return Ok(Part::failed(warning));
            }
        };
        let warning = left_out(what, &packed);
        if packed.tree.entries().is_empty() {
            return Ok(Part {
                tree: None,
                warning,
            });
        }
        let channel = self.link.bulk().await?;
        match blobs::upload_tree(&channel, &packed, |_| ()).await {
            Ok(tree) => Ok(Part {
                tree: Some(tree),
                warning,
            }),
            Err(error) if is_final(&error) => {
                let warning = format!("the {what} could not be uploaded: {}", chain(&error));
                Ok(Part::failed(warning))
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl Part {
    fn failed(warning: String) -> Self {
        Self {
            tree: None,
            warning: Some(warning),
        }
    }
}

/// Whether trying again would end the same.
fn is_final(error: &BlobError) -> bool {
    match error {
        BlobError::Rpc { status, .. } => match from_status(status).code {
            ErrorCode::Invalid
            | ErrorCode::NotFound
            | ErrorCode::AlreadyExists
            | ErrorCode::FailedPrecondition
            | ErrorCode::PermissionDenied
            | ErrorCode::Compacted
            | ErrorCode::Unimplemented => true,
            // The coordinator's disk may be full now and not later.
            ErrorCode::Exhausted
            | ErrorCode::Unauthenticated
            | ErrorCode::Unavailable
            | ErrorCode::Internal => false,
        },
        BlobError::Read { .. } | BlobError::TooLarge { .. } | BlobError::NotATree { .. } => true,
        // Something outside of the attempt wrote into its directory; it may be done next time.
        BlobError::Changed { .. }
        | BlobError::Answer { .. }
        | BlobError::Write { .. }
        | BlobError::Damaged { .. } => false,
    }
}

fn left_out(what: &str, packed: &Packed) -> Option<String> {
    if packed.skipped_count == 0 {
        return None;
    }
    let named: Vec<_> = packed
        .skipped
        .iter()
        .take(NAMED)
        .map(String::as_str)
        .collect();
    let more = packed.skipped_count.saturating_sub(named.len());
    let tail = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    Some(format!(
        "left out of the {what}: {}{tail}",
        named.join(", ")
    ))
}

/// A file that is missing or damaged means that nothing is known to be uploaded.
fn load(dir: &AttemptDir) -> Progress {
    let path = dir.upload();
    let small = fs::metadata(&path).is_ok_and(|metadata| metadata.len() <= MAX_FILE_BYTES);
    let bytes = small.then(|| fs::read(&path).ok()).flatten();
    let Some(bytes) = bytes else {
        return Progress::default();
    };
    sealed::open(&bytes).unwrap_or_else(|damage| {
        let error = damage.of(&path);
        tracing::warn!(attempt = %dir.attempt(), %error, "what was uploaded is not known and is uploaded again");
        Progress::default()
    })
}

/// Writes it down if it took any effort; to find again that there is nothing to upload costs less than to wait for the
/// disk.
async fn keep(dir: &AttemptDir, progress: &Progress) {
    let parts = [&progress.outputs, &progress.checkpoint];
    let worth = |part: &Part| part.tree.is_some() || part.warning.is_some();
    if parts.into_iter().flatten().any(worth) {
        save(dir, progress.clone()).await;
    }
}

/// If it cannot be kept, on a full disk or because the directory could never be made, a restart only costs a second
/// upload; the end of the member must not wait for that.
async fn save(dir: &AttemptDir, progress: Progress) {
    let attempt = dir.attempt();
    let dir = dir.clone();
    if let Err(error) = blocking(move || write(&dir, &progress)).await {
        tracing::warn!(%attempt, %error, "cannot write down how far an upload is");
    }
}

/// Without a directory there is nothing that a restart could upload again, so nothing to write down. It blocks.
fn write(dir: &AttemptDir, progress: &Progress) -> io::Result<()> {
    match files::write_private(&dir.upload(), &sealed::seal(progress)?) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_attempt_with_a_directory_is_missed() {
        let temp = tempfile::tempdir().unwrap();
        let attempt = "j1.0.1".parse().unwrap();
        let missing = AttemptDir::at(attempt, temp.path().join("missing"));
        write(&missing, &Progress::default()).unwrap();
        assert!(!missing.root().exists());
        let dir = AttemptDir::at(attempt, temp.path().to_owned());
        fs::create_dir(dir.upload()).unwrap();
        write(&dir, &Progress::default()).unwrap_err();
        fs::remove_dir(dir.upload()).unwrap();
        write(&dir, &Progress::default()).unwrap();
        assert!(dir.upload().exists());
    }

    #[test]
    fn only_a_whole_upload_counts_as_finished() {
        let temp = tempfile::tempdir().unwrap();
        let dir = AttemptDir::at("j1.0.1".parse().unwrap(), temp.path().to_owned());
        assert_eq!(finished(&dir), None);
        let write = |progress: &Progress| {
            fs::write(dir.upload(), serde_json::to_vec(progress).unwrap()).unwrap();
        };
        let mut progress = Progress {
            logs: true,
            outputs: Some(Part {
                tree: Some(Digest([1; 32])),
                warning: Some("one".to_owned()),
            }),
            checkpoint: None,
        };
        write(&progress);
        assert_eq!(load(&dir), progress);
        assert_eq!(finished(&dir), None);
        progress.checkpoint = Some(Part::failed("two".to_owned()));
        write(&progress);
        let uploaded = finished(&dir).unwrap();
        assert_eq!(uploaded.outputs, Some(Digest([1; 32])));
        assert_eq!(uploaded.checkpoint, None);
        assert_eq!(uploaded.warning.as_deref(), Some("one; two"));
        fs::write(dir.upload(), "{").unwrap();
        assert_eq!(finished(&dir), None);
    }

    #[test]
    fn what_is_left_out_is_named() {
        let temp = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c", "d"] {
            std::os::unix::net::UnixListener::bind(temp.path().join(name)).unwrap();
        }
        let packed = pack(temp.path(), &PackOptions::output()).unwrap();
        let text = left_out("outputs", &packed).unwrap();
        assert!(
            text.starts_with("left out of the outputs: ") && text.ends_with(" and 1 more"),
            "{text}"
        );
        assert!(packed.tree.entries().is_empty());
    }
}
