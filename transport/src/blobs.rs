//! The client's side of `BlobService`: sends the blobs of a packed directory that the coordinator lacks, and fetches
//! trees and blobs.
//!
//! Everything is named by its hash and checked against it, so every step can be repeated; broken connections are, a
//! few times. Where the bytes go on the other side is not known here.

use std::collections::{HashMap, HashSet};
use std::error::Error as _;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};
use trainyard_common::ids::Digest;
use trainyard_common::limits::{CHUNK_BYTES, MAX_MANIFEST_BYTES};
use trainyard_proto::v1;
use trainyard_proto::v1::blob_service_client::BlobServiceClient;
use trainyard_proto::v1::upload_request::Part;

use crate::files;
use crate::pack::{self, Packed, PackedFile};
use crate::tree::{InvalidTree, Tree};

/// Digests in one question; the service takes no more.
const MISSING_BATCH: usize = 1000;
/// Chunks that wait between disk and network, 2 MiB: enough to keep both busy.
const CHUNKS_IN_FLIGHT: usize = 8;
/// Tries of one transfer while the connection breaks without anything having been transferred in between.
const MAX_TRIES: u32 = 5;
/// Pause before the second try; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Downloads at a time: small files wait for the round trip, not for the network.
const PARALLEL_DOWNLOADS: usize = 16;

/// How far a transfer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Bytes transferred so far.
    pub bytes: u64,
    /// Bytes to transfer; what was there already does not count.
    pub total_bytes: u64,
    /// Blobs begun so far.
    pub blobs: usize,
    /// Blobs to transfer.
    pub total_blobs: usize,
}

/// Why blobs could not be transferred.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The coordinator refused, or could not be reached.
    #[error("cannot {operation}")]
    Rpc {
        /// What was to be done.
        operation: &'static str,
        /// What it said.
        #[source]
        status: Box<Status>,
    },
    /// The coordinator answered something that makes no sense.
    #[error("the coordinator answered wrongly: {what}")]
    Answer {
        /// What is wrong.
        what: &'static str,
    },
    /// A file changed between packing and sending.
    #[error("{path:?} changed while it was being sent: try again when nothing writes to it")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("cannot read {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {path:?}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What arrived is not what was asked for.
    #[error("blob {digest} arrived damaged: its {what} is wrong")]
    Damaged {
        /// The blob.
        digest: Digest,
        /// `size` or `hash`.
        what: &'static str,
    },
    /// The blob is larger than it may be.
    #[error("blob {digest} is larger than {limit} bytes")]
    TooLarge {
        /// The blob.
        digest: Digest,
        /// The limit.
        limit: u64,
    },
    /// The blob is no manifest.
    #[error("blob {digest} is not a file tree")]
    NotATree {
        /// The blob.
        digest: Digest,
        /// Why not.
        #[source]
        source: InvalidTree,
    },
}

impl BlobError {
    /// The refusal of the coordinator, if it is one.
    #[must_use]
    pub fn status(&self) -> Option<&Status> {
        match self {
            Self::Rpc { status, .. } => Some(status),
            _ => None,
        }
    }

    /// Whether the connection broke, so that another try may help.
    fn is_transient(&self) -> bool {
        // A status that this side made up for a broken connection has a cause; one from the peer has none.
        self.status().is_some_and(|status| {
            status.code() == Code::Unavailable
                || (status.source().is_some() && status.code() != Code::OutOfRange)
        })
    }
}

/// Sends what the coordinator lacks of a packed directory, the manifest last; gives the tree's id.
///
/// `progress` is called for each chunk and must not block.
///
/// # Errors
/// [`BlobError`]. Calling it again continues where it ended, except within one file.
pub async fn upload_tree(
    channel: &Channel,
    packed: &Packed,
    progress: impl Fn(Progress) + Send + Sync + 'static,
) -> Result<Digest, BlobError> {
    let progress: Arc<dyn Fn(Progress) + Send + Sync> = Arc::new(progress);
    let mut least = usize::MAX;
    let mut retries = Retries::new();
    loop {
        match upload_once(channel, packed, &progress, &mut least, &mut retries).await {
            Err(error) if error.is_transient() => retries.pause(error).await?,
            other => return other.map(|()| packed.tree.id()),
        }
    }
}

async fn upload_once(
    channel: &Channel,
    packed: &Packed,
    progress: &Arc<dyn Fn(Progress) + Send + Sync>,
    least: &mut usize,
    retries: &mut Retries,
) -> Result<(), BlobError> {
    let todo = missing_sources(channel, packed).await?;
    if todo.len() < *least {
        *least = todo.len();
        retries.reset();
    }
    if todo.is_empty() {
        return Ok(());
    }
    let state = Progress {
        total_bytes: todo.iter().map(Source::size).sum(),
        total_blobs: todo.len(),
        ..Progress::default()
    };
    let (sender, receiver) = mpsc::channel(CHUNKS_IN_FLIGHT);
    let reader = tokio::task::spawn_blocking(move || read_all(todo, &sender));
    let requests = requests(receiver, state, progress.clone());
    let sent = client(channel).upload(requests).await;
    // What went wrong on this side comes first: the refusal of half a blob is only its consequence.
    match reader.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return Err(error),
        Err(_) => {
            return Err(BlobError::Answer {
                what: "(the reader of the files panicked)",
            });
        }
    }
    sent.map(drop).map_err(rpc("upload files"))
}

/// The messages of an upload. Not a closure in the async function above: that one borrows, and a closure in it would
/// keep the compiler from seeing that the whole may move between threads.
fn requests(
    parts: mpsc::Receiver<Part>,
    mut state: Progress,
    progress: Arc<dyn Fn(Progress) + Send + Sync>,
) -> impl tokio_stream::Stream<Item = v1::UploadRequest> + Send + 'static {
    ReceiverStream::new(parts).map(move |part: Part| {
        match &part {
            Part::Header(_) => state.blobs += 1,
            Part::Data(data) => state.bytes += data.len() as u64,
        }
        progress(state);
        v1::UploadRequest { part: Some(part) }
    })
}

/// Where the bytes of a blob come from.
enum Source {
    File(PackedFile),
    Memory(Digest, Vec<u8>),
}

impl Source {
    fn size(&self) -> u64 {
        match self {
            Self::File(file) => file.size,
            Self::Memory(_, bytes) => bytes.len() as u64,
        }
    }
}

/// What the coordinator lacks, the manifest last.
async fn missing_sources(channel: &Channel, packed: &Packed) -> Result<Vec<Source>, BlobError> {
    let mut digests: Vec<_> = packed.files.iter().map(|file| file.digest).collect();
    digests.push(packed.tree.id());
    let missing = missing(channel, &digests).await?;
    let files = packed
        .files
        .iter()
        .filter(|file| missing.contains(&file.digest));
    let mut sources: Vec<_> = files.cloned().map(Source::File).collect();
    if missing.contains(&packed.tree.id()) {
        sources.push(Source::Memory(packed.tree.id(), packed.tree.encode()));
    }
    Ok(sources)
}

/// Which of these blobs the coordinator lacks.
///
/// # Errors
/// [`BlobError::Rpc`] or [`BlobError::Answer`].
pub async fn missing(channel: &Channel, digests: &[Digest]) -> Result<HashSet<Digest>, BlobError> {
    let mut missing = HashSet::new();
    for batch in digests.chunks(MISSING_BATCH) {
        let request = v1::MissingRequest {
            digests: batch.iter().map(|digest| digest.0.to_vec()).collect(),
        };
        let answer = client(channel)
            .missing(request)
            .await
            .map_err(rpc("ask which files are there already"))?
            .into_inner();
        let asked: HashSet<_> = batch.iter().collect();
        for digest in answer.digests {
            match Digest::try_from(digest.as_slice()) {
                Ok(digest) if asked.contains(&digest) => drop(missing.insert(digest)),
                _ => {
                    return Err(BlobError::Answer {
                        what: "a blob that was not asked for is missing",
                    });
                }
            }
        }
    }
    Ok(missing)
}

/// Reads everything into the channel; ends early, without an error, if nobody listens any more.
fn read_all(sources: Vec<Source>, out: &mpsc::Sender<Part>) -> Result<(), BlobError> {
    for source in sources {
        let listens = match source {
            Source::File(file) => read_file(&file, out)?,
            Source::Memory(digest, bytes) => {
                let size = bytes.len() as u64;
                send(out, header(digest, size))
                    && bytes
                        .chunks(CHUNK_BYTES)
                        .all(|chunk| send(out, Part::Data(chunk.to_vec())))
            }
        };
        if !listens {
            break;
        }
    }
    Ok(())
}

/// Whether somebody still listens.
fn read_file(packed: &PackedFile, out: &mpsc::Sender<Part>) -> Result<bool, BlobError> {
    let path = &packed.path;
    let changed = || BlobError::Changed { path: path.clone() };
    let failed = |source| BlobError::Read {
        path: path.clone(),
        source,
    };
    let (mut file, metadata) = pack::open_regular(path).map_err(failed)?;
    // Cheap, and before anything is sent.
    if metadata.len() != packed.size {
        return Err(changed());
    }
    if !send(out, header(packed.digest, packed.size)) {
        return Ok(false);
    }
    let mut hasher = blake3::Hasher::new();
    let mut left = packed.size;
    while left > 0 {
        let length = left.min(CHUNK_BYTES as u64);
        let mut chunk = Vec::with_capacity(CHUNK_BYTES.min(length as usize));
        let count = (&mut file)
            .take(length)
            .read_to_end(&mut chunk)
            .map_err(failed)?;
        if count == 0 {
            return Err(changed());
        }
        left -= count as u64;
        hasher.update(&chunk);
        if left == 0 && hasher.finalize().as_bytes() != &packed.digest.0 {
            return Err(changed());
        }
        if !send(out, Part::Data(chunk)) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn header(digest: Digest, size: u64) -> Part {
    Part::Header(v1::BlobHeader {
        digest: digest.0.to_vec(),
        size,
    })
}

fn send(out: &mpsc::Sender<Part>, part: Part) -> bool {
    out.blocking_send(part).is_ok()
}

/// Fetches a tree's manifest.
///
/// # Errors
/// [`BlobError`].
pub async fn fetch_tree(channel: &Channel, id: Digest) -> Result<Tree, BlobError> {
    let mut bytes = Vec::new();
    download(
        channel,
        id,
        MAX_MANIFEST_BYTES,
        &mut Output::Memory(&mut bytes),
    )
    .await?;
    Tree::decode(&bytes).map_err(|source| BlobError::NotATree { digest: id, source })
}

/// Fetches one blob of at most `max_bytes` into the file `dest`, which appears whole or not at all; gives its size.
///
/// Not synced to disk: who reads it after a crash must check its hash, as [`crate::unpack`] does.
///
/// # Errors
/// [`BlobError`].
pub async fn download_blob(
    channel: &Channel,
    digest: Digest,
    max_bytes: u64,
    dest: &Path,
) -> Result<u64, BlobError> {
    let failed = |source| BlobError::Write {
        path: dest.to_owned(),
        source,
    };
    let (file, temporary) = files::create_beside(dest, 0o600).map_err(failed)?;
    let temporary = RemoveOnDrop(Some(temporary));
    let mut output = Output::File {
        file: file.into(),
        path: dest,
    };
    let size = download(channel, digest, max_bytes, &mut output).await?;
    temporary.rename(dest).map_err(failed)?;
    Ok(size)
}

/// Where [`fetch_blobs`] puts a blob.
#[must_use]
pub fn blob_path(dir: &Path, digest: &Digest) -> PathBuf {
    let name = digest.to_string();
    // 256 directories, as large flat ones are slow in many tools.
    dir.join(&name[..2]).join(name)
}

/// Fetches all contents of a tree that are not in `dir` yet; see [`blob_path`]. Several at a time.
///
/// A file that is there with the right size counts as there. If unpacking then finds it damaged, remove it and fetch
/// again.
///
/// With `dir` on the file system of the destination, [`crate::unpack::unpack`] can then read from there.
///
/// # Errors
/// The first [`BlobError`]; what was fetched stays.
pub async fn fetch_blobs(
    channel: &Channel,
    tree: &Tree,
    dir: &Path,
    progress: impl Fn(Progress) + Send,
) -> Result<(), BlobError> {
    let wanted: HashMap<_, _> = tree
        .files()
        .map(|(_, file)| (file.digest, file.size))
        .collect();
    let mut todo: Vec<_> = wanted
        .into_iter()
        .filter(|(digest, size)| !has_size(&blob_path(dir, digest), *size))
        .collect();
    todo.sort_unstable();
    let mut state = Progress {
        total_bytes: todo.iter().map(|(_, size)| size).sum(),
        total_blobs: todo.len(),
        ..Progress::default()
    };
    // Dropped on the first error, which ends the others.
    let mut running = JoinSet::new();
    loop {
        while running.len() < PARALLEL_DOWNLOADS
            && let Some((digest, size)) = todo.pop()
        {
            let (channel, dest) = (channel.clone(), blob_path(dir, &digest));
            running.spawn(async move {
                make_parent(&dest)?;
                download_blob(&channel, digest, size, &dest).await
            });
        }
        match running.join_next().await {
            None => return Ok(()),
            Some(Ok(size)) => {
                state.bytes += size?;
                state.blobs += 1;
                progress(state);
            }
            Some(Err(_)) => {
                return Err(BlobError::Answer {
                    what: "(a download panicked)",
                });
            }
        }
    }
}

fn has_size(path: &Path, size: u64) -> bool {
    path.symlink_metadata()
        .is_ok_and(|metadata| metadata.is_file() && metadata.len() == size)
}

fn make_parent(path: &Path) -> Result<(), BlobError> {
    let parent = files::parent_of(path);
    std::fs::create_dir_all(parent).map_err(|source| BlobError::Write {
        path: parent.to_owned(),
        source,
    })
}

enum Output<'a> {
    Memory(&'a mut Vec<u8>),
    File {
        file: tokio::fs::File,
        path: &'a Path,
    },
}

impl Output<'_> {
    async fn write(&mut self, data: &[u8]) -> Result<(), BlobError> {
        match self {
            Self::Memory(bytes) => bytes.extend_from_slice(data),
            Self::File { file, path } => {
                file.write_all(data)
                    .await
                    .map_err(|source| BlobError::Write {
                        path: path.to_path_buf(),
                        source,
                    })?
            }
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), BlobError> {
        match self {
            Self::Memory(_) => Ok(()),
            Self::File { file, path } => file.flush().await.map_err(|source| BlobError::Write {
                path: path.to_path_buf(),
                source,
            }),
        }
    }
}

/// What arrived of a blob so far; survives a broken connection.
struct Arrived {
    digest: Digest,
    hasher: blake3::Hasher,
    bytes: u64,
    size: Option<u64>,
    max_bytes: u64,
}

async fn download(
    channel: &Channel,
    digest: Digest,
    max_bytes: u64,
    output: &mut Output<'_>,
) -> Result<u64, BlobError> {
    let mut arrived = Arrived {
        digest,
        hasher: blake3::Hasher::new(),
        bytes: 0,
        size: None,
        max_bytes,
    };
    let mut retries = Retries::new();
    loop {
        let before = arrived.bytes;
        let result = arrived.continue_from(channel, output).await;
        if arrived.bytes > before {
            retries.reset();
        }
        match result {
            Err(error) if error.is_transient() => retries.pause(error).await?,
            other => break other?,
        }
    }
    output.finish().await?;
    arrived.check()
}

impl Arrived {
    async fn continue_from(
        &mut self,
        channel: &Channel,
        output: &mut Output<'_>,
    ) -> Result<(), BlobError> {
        let request = v1::DownloadRequest {
            digest: self.digest.0.to_vec(),
            offset: self.bytes,
        };
        let failed = || rpc("download a file");
        let mut stream = client(channel)
            .download(request)
            .await
            .map_err(failed())?
            .into_inner();
        let mut first = true;
        while let Some(message) = stream.message().await.map_err(failed())? {
            if std::mem::take(&mut first) {
                self.announced(message.size)?;
            }
            self.bytes += message.data.len() as u64;
            if Some(self.bytes) > self.size {
                return Err(self.damaged("size"));
            }
            self.hasher.update(&message.data);
            output.write(&message.data).await?;
        }
        Ok(())
    }

    fn announced(&mut self, size: u64) -> Result<(), BlobError> {
        if size > self.max_bytes {
            return Err(BlobError::TooLarge {
                digest: self.digest,
                limit: self.max_bytes,
            });
        }
        if self.size.is_some_and(|before| before != size) {
            return Err(self.damaged("size"));
        }
        self.size = Some(size);
        Ok(())
    }

    fn check(&self) -> Result<u64, BlobError> {
        // An empty blob may come without any message.
        if self.bytes != self.size.unwrap_or(0) {
            return Err(self.damaged("size"));
        }
        if self.hasher.finalize().as_bytes() != &self.digest.0 {
            return Err(self.damaged("hash"));
        }
        Ok(self.bytes)
    }

    fn damaged(&self, what: &'static str) -> BlobError {
        BlobError::Damaged {
            digest: self.digest,
            what,
        }
    }
}

/// Counts the tries since the last progress.
struct Retries {
    tries: u32,
}

impl Retries {
    fn new() -> Self {
        Self { tries: 1 }
    }

    fn reset(&mut self) {
        self.tries = 1;
    }

    /// Waits before the next try, or gives the error back.
    async fn pause(&mut self, error: BlobError) -> Result<(), BlobError> {
        if self.tries >= MAX_TRIES {
            return Err(error);
        }
        tracing::debug!(%error, try_ = self.tries, "transfer broke, trying again");
        tokio::time::sleep(FIRST_PAUSE * 2_u32.pow(self.tries - 1)).await;
        self.tries += 1;
        Ok(())
    }
}

/// A temporary file that does not outlive a failure.
struct RemoveOnDrop(Option<PathBuf>);

impl RemoveOnDrop {
    fn rename(mut self, dest: &Path) -> io::Result<()> {
        let Some(path) = &self.0 else { return Ok(()) };
        std::fs::rename(path, dest)?;
        self.0 = None;
        Ok(())
    }
}

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // It is only untidy if this fails.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn client(channel: &Channel) -> BlobServiceClient<Channel> {
    BlobServiceClient::new(channel.clone())
}

fn rpc(operation: &'static str) -> impl FnOnce(Status) -> BlobError {
    move |status| BlobError::Rpc {
        operation,
        status: Box::new(status),
    }
}

#[cfg(test)]
mod tests;
