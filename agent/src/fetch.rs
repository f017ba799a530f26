//! Brings what a member needs into its attempt's directory: the snapshot into `work`, earlier checkpoints into `resume`
//! and, as a start, into `checkpoint`.
//!
//! It runs before the attempt's shim, so nobody else is in the directory. It says whose fault a failure is, and decides
//! nothing else about the member.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use trainyard_agent_core::Fault;
use trainyard_common::error::ErrorCode;
use trainyard_common::ids::Digest;
use trainyard_common::member::MemberSpec;
use trainyard_proto::status::from_status;
use trainyard_transport::blobs::{self, BlobError};
use trainyard_transport::client::ConnectError;
use trainyard_transport::tree::{EntryKind, InvalidTree, Tree, TreeEntry};
use trainyard_transport::unpack::{UnpackError, unpack};

use crate::backoff::Backoff;
use crate::cache::{Cache, Pin};
use crate::chain::chain;
use crate::link::Link;
use crate::runtime::AttemptDir;
use trainyard_transport::task::blocking;

/// How long a fetch is tried; the coordinator gives a member up a little later.
const DEADLINE: Duration = Duration::from_secs(600);
/// Fetches at a time: each has up to 16 downloads, and more would only share the same line.
const PARALLEL: usize = 8;

/// Fetches trees. Clones share the cache and the limits.
#[derive(Debug, Clone)]
pub(crate) struct Fetcher {
    link: Link,
    cache: Cache,
    slots: Arc<Semaphore>,
}

/// Why a member cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    #[error("the checkpoints of the earlier attempt do not fit together")]
    Overlay(#[from] InvalidTree),
    #[error("cannot make the checkpoint read-only")]
    Protect(#[source] io::Error),
    #[error("gave up fetching after {} minutes: {why}", DEADLINE.as_secs() / 60)]
    Deadline { why: String },
    #[error("the fetch was cancelled")]
    Cancelled,
}

impl FetchError {
    /// Whose fault it is, or that it may go away by itself.
    fn fault(&self) -> Option<Fault> {
        match self {
            Self::Connect(_) => None,
            Self::Blob(error) => match error {
                BlobError::Rpc { status, .. } => match from_status(status).code {
                    ErrorCode::Unavailable
                    | ErrorCode::Internal
                    | ErrorCode::Exhausted
                    | ErrorCode::Unauthenticated => None,
                    ErrorCode::Invalid
                    | ErrorCode::NotFound
                    | ErrorCode::AlreadyExists
                    | ErrorCode::FailedPrecondition
                    | ErrorCode::PermissionDenied
                    | ErrorCode::Compacted
                    | ErrorCode::Unimplemented => Some(Fault::Infrastructure),
                },
                BlobError::Damaged { .. } | BlobError::Answer { .. } => None,
                BlobError::NotATree { .. } | BlobError::TooLarge { .. } => Some(Fault::Job),
                BlobError::Changed { .. } | BlobError::Read { .. } | BlobError::Write { .. } => {
                    Some(Fault::Infrastructure)
                }
            },
            // The cache lost or damaged a blob, which was thrown out then; the next try fetches it again.
            Self::Unpack(UnpackError::Source { .. } | UnpackError::Damaged { .. }) => None,
            Self::Unpack(
                UnpackError::NotEmpty { .. }
                | UnpackError::Destination { .. }
                | UnpackError::Write { .. }
                | UnpackError::InTheWay { .. },
            )
            | Self::Protect(_)
            | Self::Deadline { .. }
            | Self::Cancelled => Some(Fault::Infrastructure),
            Self::Overlay(_) => Some(Fault::Job),
        }
    }
}

impl Fetcher {
    pub(crate) fn new(link: Link, cache: Cache) -> Self {
        Self {
            link,
            cache,
            slots: Arc::new(Semaphore::new(PARALLEL)),
        }
    }

    /// Fetches everything for one member. After `cancel` nothing is written any more once this returns.
    ///
    /// # Errors
    /// What is wrong, in one line, and whose fault it is.
    pub(crate) async fn fetch(
        self,
        dir: AttemptDir,
        spec: Box<MemberSpec>,
        cancel: CancellationToken,
    ) -> Result<(), (String, Fault)> {
        if spec.snapshot.is_none() && spec.resume_from.is_empty() {
            return Ok(());
        }
        self.fetch_all(dir, spec, cancel).await.map_err(|error| {
            let fault = error.fault().unwrap_or(Fault::Infrastructure);
            (
                format!("cannot fetch code or checkpoint: {}", chain(&error)),
                fault,
            )
        })
    }

    async fn fetch_all(
        self,
        dir: AttemptDir,
        spec: Box<MemberSpec>,
        cancel: CancellationToken,
    ) -> Result<(), FetchError> {
        let _slot = tokio::select! {
            biased;
            // Cancel-safe, both: whoever leaves the line loses its place in it, and nothing else.
            () = cancel.cancelled() => return Err(FetchError::Cancelled),
            slot = self.slots.clone().acquire_owned() => slot,
        };
        if let Some(snapshot) = spec.snapshot {
            self.bring(&[snapshot], Destination::Work, &dir, &cancel)
                .await?;
        }
        if !spec.resume_from.is_empty() {
            self.bring(&spec.resume_from, Destination::Resume, &dir, &cancel)
                .await?;
        }
        Ok(())
    }

    /// Fetches trees, laid over each other, and unpacks them. Tries again for as long as it may help.
    async fn bring(
        &self,
        ids: &[Digest],
        destination: Destination,
        dir: &AttemptDir,
        cancel: &CancellationToken,
    ) -> Result<(), FetchError> {
        let mut backoff = Backoff::new();
        let mut last = None;
        let deadline = Instant::now() + DEADLINE;
        loop {
            let downloaded = tokio::select! {
                biased;
                // Cancel-safe: only waits.
                () = cancel.cancelled() => return Err(FetchError::Cancelled),
                // Cancel-safe: only waits.
                () = sleep_until(deadline) => return Err(too_late(last)),
                // Given up half way it leaves whole blobs in the cache, and nothing in the attempt's directory.
                downloaded = self.download_all(ids) => downloaded,
            };
            let error = match downloaded {
                // Never cut off, as somebody else may use the directory once this returns.
                Ok(trees) => match self.unpack(trees, destination, dir, cancel).await {
                    Ok(()) => return Ok(()),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if error.fault().is_some() {
                return Err(error);
            }
            tracing::debug!(attempt = %dir.attempt(), error = chain(&error), "fetch failed, trying again");
            last = Some(error);
            tokio::select! {
                biased;
                // Cancel-safe, both: only waits.
                () = cancel.cancelled() => return Err(FetchError::Cancelled),
                () = sleep(backoff.pause()) => {}
            }
        }
    }

    async fn download_all(&self, ids: &[Digest]) -> Result<Vec<(Tree, Pin)>, FetchError> {
        let mut trees = Vec::with_capacity(ids.len());
        for id in ids {
            trees.push(self.download(*id).await?);
        }
        Ok(trees)
    }

    async fn unpack(
        &self,
        trees: Vec<(Tree, Pin)>,
        destination: Destination,
        dir: &AttemptDir,
        cancel: &CancellationToken,
    ) -> Result<(), FetchError> {
        let (from, dir) = (Source::new(&self.cache, cancel), dir.clone());
        let (trees, pins): (Vec<_>, Vec<_>) = trees.into_iter().unzip();
        blocking(move || {
            let result = unpack_all(&from, trees, destination, &dir);
            drop(pins);
            result
        })
        .await
    }

    /// A tree whose contents are all in the cache, and stay there while the pin lives.
    async fn download(&self, id: Digest) -> Result<(Tree, Pin), FetchError> {
        let _flight = self.cache.flight(id).await;
        let cache = self.cache.clone();
        let tree = match blocking(move || cache.tree(id)).await {
            Some(tree) => tree,
            None => {
                let tree = blobs::fetch_tree(&self.link.bulk().await?, id).await?;
                let (cache, kept) = (self.cache.clone(), tree.clone());
                if let Err(error) = blocking(move || cache.keep_tree(&kept)).await {
                    tracing::debug!(%error, "cannot keep a manifest in the cache");
                }
                tree
            }
        };
        let pin = self.cache.pin(&tree);
        let came = AtomicU64::new(0);
        // Without files there is nothing to connect for.
        if tree.files().next().is_some() {
            let channel = self.link.bulk().await?;
            blobs::fetch_blobs(&channel, &tree, self.cache.dir(), |progress| {
                came.store(progress.bytes, Ordering::Relaxed)
            })
            .await?;
        }
        let (cache, came) = (self.cache.clone(), came.into_inner());
        blocking(move || cache.came_in(came)).await;
        Ok((tree, pin))
    }
}

fn too_late(last: Option<FetchError>) -> FetchError {
    let why = last.map_or_else(|| "it is too slow".to_owned(), |error| chain(&error));
    FetchError::Deadline { why }
}

/// Which part of the directory is filled.
#[derive(Debug, Clone, Copy)]
enum Destination {
    Work,
    Resume,
}

/// Where unpacking takes contents from, until it is cancelled.
#[derive(Debug)]
struct Source {
    cache: Cache,
    cancel: CancellationToken,
}

impl Source {
    fn new(cache: &Cache, cancel: &CancellationToken) -> Self {
        Self {
            cache: cache.clone(),
            cancel: cancel.clone(),
        }
    }
}

/// Unpacks trees, laid over each other. It blocks. What a failed try left is unpacked over again from the start.
fn unpack_all(
    from: &Source,
    trees: Vec<Tree>,
    destination: Destination,
    dir: &AttemptDir,
) -> Result<(), FetchError> {
    let tree = overlay(trees)?;
    match destination {
        Destination::Work => unpack_from(from, &tree, &dir.work()),
        Destination::Resume => {
            if tree.entries().is_empty() {
                return Ok(());
            }
            unpack_again(from, &tree, &dir.resume())?;
            protect(&tree, &dir.resume()).map_err(FetchError::Protect)?;
            unpack_again(from, &tree, &dir.checkpoint())
        }
    }
}

/// Like [`unpack_from`], but done once a try before has done it.
fn unpack_again(from: &Source, tree: &Tree, dest: &Path) -> Result<(), FetchError> {
    match unpack_from(from, tree, dest) {
        // Unpacking leaves all of a tree or nothing, and nobody else writes here yet.
        Err(FetchError::Unpack(UnpackError::NotEmpty { .. })) => Ok(()),
        other => other,
    }
}

fn unpack_from(from: &Source, tree: &Tree, dest: &Path) -> Result<(), FetchError> {
    let Source { cache, cancel } = from;
    let result = unpack(tree, dest, |digest| match cancel.is_cancelled() {
        true => Err(io::ErrorKind::Interrupted.into()),
        false => cache.open(digest),
    });
    if result.is_err() && cancel.is_cancelled() {
        return Err(FetchError::Cancelled);
    }
    if let Err(UnpackError::Damaged { digest, .. } | UnpackError::Source { digest, .. }) = &result {
        cache.discard(digest);
    }
    Ok(result?)
}

/// One tree of many: where two have the same path the first one counts, and what does not fit with it is left out.
fn overlay(trees: Vec<Tree>) -> Result<Tree, InvalidTree> {
    let mut trees = trees.into_iter();
    let Some(first) = trees.next() else {
        return Tree::new(Vec::new());
    };
    let mut rest = trees.peekable();
    if rest.peek().is_none() {
        return Ok(first);
    }
    let mut merged: BTreeMap<String, EntryKind> = first
        .entries()
        .iter()
        .cloned()
        .map(|entry| (entry.path, entry.kind))
        .collect();
    for tree in rest {
        for entry in tree.entries() {
            if fits(&merged, entry) {
                merged.insert(entry.path.clone(), entry.kind.clone());
            }
        }
    }
    Tree::new(
        merged
            .into_iter()
            .map(|(path, kind)| TreeEntry { path, kind })
            .collect(),
    )
}

/// Whether an entry can stand beside those that are there.
fn fits(merged: &BTreeMap<String, EntryKind>, entry: &TreeEntry) -> bool {
    let path = &entry.path;
    if merged.contains_key(path) {
        return false;
    }
    // Nothing but a directory may be above it.
    let above = path.match_indices('/').map(|(at, _)| &path[..at]);
    if above
        .into_iter()
        .any(|dir| !matches!(merged.get(dir), None | Some(EntryKind::Directory)))
    {
        return false;
    }
    // It must be a directory if something is below it.
    let below = format!("{path}/");
    let has_below = merged
        .range(below.clone()..)
        .next()
        .is_some_and(|(next, _)| next.starts_with(&below));
    !has_below || matches!(entry.kind, EntryKind::Directory)
}

/// Takes the right to write away from the files of a tree. Their directories keep it, so that they can be removed.
fn protect(tree: &Tree, dir: &Path) -> io::Result<()> {
    for (path, file) in tree.files() {
        let mode = if file.executable { 0o555 } else { 0o444 };
        std::fs::set_permissions(dir.join(path), std::fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use trainyard_transport::tree::{TreeFile, digest_of};

    use super::*;

    fn tree(entries: &[(&str, Option<&[u8]>)]) -> Tree {
        let entry = |&(path, data): &(&str, Option<&[u8]>)| TreeEntry {
            path: path.to_owned(),
            kind: match data {
                Some(data) => EntryKind::File(TreeFile {
                    digest: digest_of(data),
                    size: data.len() as u64,
                    executable: false,
                }),
                None => EntryKind::Directory,
            },
        };
        Tree::new(entries.iter().map(entry).collect()).unwrap()
    }

    fn paths(tree: &Tree) -> Vec<&str> {
        tree.entries()
            .iter()
            .map(|entry| entry.path.as_str())
            .collect()
    }

    #[test]
    fn the_first_tree_counts_and_conflicts_are_left_out() {
        let first = tree(&[("a", Some(b"1")), ("b/c", Some(b"2"))]);
        let second = tree(&[("a", Some(b"3")), ("b", Some(b"4")), ("d", Some(b"5"))]);
        let third = tree(&[("a/x", Some(b"6")), ("b/e", Some(b"7")), ("f", None)]);
        let merged = overlay(vec![first, second, third]).unwrap();
        assert_eq!(paths(&merged), ["a", "b/c", "b/e", "d", "f"]);
        let digests: Vec<_> = merged.files().map(|(_, file)| file.digest).collect();
        assert_eq!(
            digests,
            [b"1", b"2", b"7", b"5"].map(|data| digest_of(data))
        );
        assert_eq!(overlay(Vec::new()).unwrap().entries(), []);
    }

    #[test]
    fn checkpoints_arrive_read_only_and_as_a_start() {
        let temp = tempfile::tempdir().unwrap();
        let cache = Cache::new(temp.path().join("cache"), 1 << 20);
        let state = tree(&[("step/model.pt", Some(b"weights"))]);
        let blob = blobs::blob_path(cache.dir(), &digest_of(b"weights"));
        std::fs::create_dir_all(blob.parent().unwrap()).unwrap();
        let dir = AttemptDir::at("j1.0.2".parse().unwrap(), temp.path().join("j1.0.2"));
        for path in [dir.resume(), dir.checkpoint()] {
            std::fs::create_dir_all(path).unwrap();
        }
        // A damaged blob is thrown out and blamed on nobody, so that it is fetched again.
        std::fs::write(&blob, b"weighty").unwrap();
        let from = Source::new(&cache, &CancellationToken::new());
        let go = || unpack_all(&from, vec![state.clone()], Destination::Resume, &dir);
        let error = go().unwrap_err();
        assert_eq!(error.fault(), None, "{error:?}");
        assert!(!blob.exists());
        std::fs::write(&blob, b"weights").unwrap();
        go().unwrap();
        let resume = dir.resume().join("step/model.pt");
        let checkpoint = dir.checkpoint().join("step/model.pt");
        assert_eq!(std::fs::read(&resume).unwrap(), b"weights");
        assert_eq!(std::fs::read(&checkpoint).unwrap(), b"weights");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o222;
        assert_eq!(mode(&resume), 0);
        assert_ne!(mode(&checkpoint), 0);
        // Again changes nothing.
        go().unwrap();
    }

    #[test]
    fn a_cancelled_unpacking_leaves_nothing_and_blames_no_blob() {
        let temp = tempfile::tempdir().unwrap();
        let cache = Cache::new(temp.path().join("cache"), 1 << 20);
        let code = tree(&[("a", Some(b"one")), ("b", Some(b"two"))]);
        for data in [b"one", b"two"] {
            let blob = blobs::blob_path(cache.dir(), &digest_of(data));
            std::fs::create_dir_all(blob.parent().unwrap()).unwrap();
            std::fs::write(&blob, data).unwrap();
        }
        let cancel = CancellationToken::new();
        cancel.cancel();
        let work = temp.path().join("work");
        std::fs::create_dir(&work).unwrap();
        let error = unpack_from(&Source::new(&cache, &cancel), &code, &work).unwrap_err();
        assert!(matches!(error, FetchError::Cancelled), "{error:?}");
        assert_eq!(std::fs::read_dir(&work).unwrap().count(), 0);
        unpack_from(
            &Source::new(&cache, &CancellationToken::new()),
            &code,
            &work,
        )
        .unwrap();
        assert_eq!(std::fs::read(work.join("b")).unwrap(), b"two");
    }
}
