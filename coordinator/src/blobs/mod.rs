//! Content-addressed blobs: `<aa>/<digest>`, written beside, checked, synced and only then given their name. So a file
//! that has a blob's name is that blob.
//!
//! It knows neither trees nor callers. All methods block.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::Digest;
use trainyard_common::limits::{CHUNK_BYTES, MAX_TREE_BYTES};
use trainyard_common::units::format_bytes;
use trainyard_transport::files;

use crate::disk::{DiskGuard, RESERVE_FOR_DATA};

/// Why a blob was not taken or cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BlobError {
    #[error("blob {0} is not here")]
    NotFound(Digest),
    #[error("a blob of {} is above the limit of {}", format_bytes(*.0), format_bytes(MAX_TREE_BYTES))]
    TooLarge(u64),
    #[error("blob {digest} was announced with {announced} bytes, but {found}")]
    Size {
        digest: Digest,
        announced: u64,
        found: &'static str,
    },
    #[error("the bytes sent as blob {announced} have the hash {found}")]
    Digest { announced: Digest, found: Digest },
    #[error("offset {offset} is beyond the end of blob {digest}, which has {size} bytes")]
    Offset {
        digest: Digest,
        offset: u64,
        size: u64,
    },
    #[error("{0}")]
    Disk(Refusal),
    #[error("cannot {operation} {}", path.display())]
    File {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl From<BlobError> for Refusal {
    fn from(error: BlobError) -> Self {
        let message = error.to_string();
        match error {
            BlobError::NotFound(_) => {
                Self::new(ErrorCode::NotFound, "NO_SUCH_BLOB", message).at("digest")
            }
            BlobError::TooLarge(_) => {
                Self::new(ErrorCode::Exhausted, "BLOB_TOO_LARGE", message).at("size")
            }
            BlobError::Size { .. } => {
                Self::new(ErrorCode::Invalid, "SIZE_MISMATCH", message).at("size")
            }
            BlobError::Digest { .. } => {
                Self::new(ErrorCode::Invalid, "DIGEST_MISMATCH", message).at("digest")
            }
            BlobError::Offset { .. } => {
                Self::new(ErrorCode::Invalid, "OFFSET_OUT_OF_RANGE", message).at("offset")
            }
            BlobError::Disk(refusal) => refusal,
            BlobError::File {
                operation,
                path,
                source,
            } => {
                tracing::error!(path = %path.display(), error = %source, operation, "blob file failed");
                let message = format!("the coordinator cannot {operation} a blob: {source}");
                Self::new(ErrorCode::Unavailable, "BLOB_STORE", message)
            }
        }
    }
}

/// All blobs.
#[derive(Debug)]
pub(crate) struct BlobStore {
    root: PathBuf,
    partial: PathBuf,
    disk: DiskGuard,
    /// Names for partial files.
    next_partial: AtomicU64,
}

impl BlobStore {
    /// Opens the blobs in `root` and removes what uploads left that did not end.
    pub(crate) fn open(root: PathBuf) -> Result<Self, BlobError> {
        let partial = root.join("partial");
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| BlobError::File {
                operation,
                path,
                source,
            }
        };
        files::create_private_dir(&root).map_err(failed("make", &root))?;
        match fs::remove_dir_all(&partial) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("clear", &partial)(error));
            }
            _ => {}
        }
        files::create_private_dir(&partial).map_err(failed("make", &partial))?;
        Ok(Self {
            disk: DiskGuard::new(&root),
            root,
            partial,
            next_partial: AtomicU64::new(0),
        })
    }

    pub(crate) fn contains(&self, digest: Digest) -> bool {
        self.path(digest).is_file()
    }

    /// Begins to take a blob.
    pub(crate) fn receive(&self, digest: Digest, size: u64) -> Result<Receiving, BlobError> {
        if size > MAX_TREE_BYTES {
            return Err(BlobError::TooLarge(size));
        }
        let mut receiving = Receiving {
            digest,
            size,
            received: 0,
            hasher: blake3::Hasher::new(),
            partial: None,
        };
        if self.contains(digest) {
            return Ok(receiving);
        }
        self.disk
            .check(RESERVE_FOR_DATA, size)
            .map_err(BlobError::Disk)?;
        let number = self.next_partial.fetch_add(1, Ordering::Relaxed);
        let path = self.partial.join(number.to_string());
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| BlobError::File {
                operation: "make",
                path: path.clone(),
                source,
            })?;
        receiving.partial = Some(Partial { file, path });
        Ok(receiving)
    }

    /// Gives a blob its name if it is what was announced; says whether it is new.
    pub(crate) fn finish(
        &self,
        receiving: Receiving,
        touched: &mut BTreeSet<PathBuf>,
    ) -> Result<bool, BlobError> {
        let Receiving {
            digest,
            size,
            received,
            hasher,
            partial,
        } = receiving;
        if received < size {
            return Err(BlobError::Size {
                digest,
                announced: size,
                found: "fewer came",
            });
        }
        let found = Digest(*hasher.finalize().as_bytes());
        if found != digest {
            return Err(BlobError::Digest {
                announced: digest,
                found,
            });
        }
        let Some(partial) = partial else {
            return Ok(false);
        };
        let path = self.path(digest);
        let failed = |operation| {
            let path = path.clone();
            move |source| BlobError::File {
                operation,
                path,
                source,
            }
        };
        partial.file.sync_all().map_err(failed("sync"))?;
        let dir = path.parent().unwrap_or(&self.root).to_owned();
        if !dir.is_dir() {
            files::create_private_dir(&dir).map_err(failed("make the directory of"))?;
            touched.insert(self.root.clone());
        }
        // Two uploads of one blob: the second rename puts the same bytes in the same place.
        fs::rename(&partial.path, &path).map_err(failed("name"))?;
        touched.insert(dir);
        Ok(true)
    }

    /// Makes the names of blobs durable; an upload is acknowledged only after this.
    pub(crate) fn sync(&self, touched: &BTreeSet<PathBuf>) -> Result<(), BlobError> {
        for dir in touched {
            files::sync_dir(dir).map_err(|source| BlobError::File {
                operation: "sync",
                path: dir.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// A reader of a blob from `offset` on.
    pub(crate) fn reader(&self, digest: Digest, offset: u64) -> Result<BlobReader, BlobError> {
        let path = self.path(digest);
        let failed = |operation| {
            let path = path.clone();
            move |source| BlobError::File {
                operation,
                path,
                source,
            }
        };
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(BlobError::NotFound(digest));
            }
            Err(error) => return Err(failed("open")(error)),
        };
        let size = file.metadata().map_err(failed("look at"))?.len();
        if offset > size {
            return Err(BlobError::Offset {
                digest,
                offset,
                size,
            });
        }
        file.seek(SeekFrom::Start(offset)).map_err(failed("read"))?;
        Ok(BlobReader { file, path, size })
    }

    fn path(&self, digest: Digest) -> PathBuf {
        let name = digest.to_string();
        self.root.join(&name[..2]).join(name)
    }
}

/// A blob that is arriving. Dropped before its end, it leaves nothing.
#[derive(Debug)]
pub(crate) struct Receiving {
    digest: Digest,
    size: u64,
    received: u64,
    hasher: blake3::Hasher,
    /// Nothing if the blob is here already; its bytes are still checked, so that a liar is told.
    partial: Option<Partial>,
}

#[derive(Debug)]
struct Partial {
    file: File,
    path: PathBuf,
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After the rename there is nothing under this name; otherwise the next start would remove it.
        let _ = fs::remove_file(&self.path);
    }
}

impl Receiving {
    pub(crate) fn write(&mut self, data: &[u8]) -> Result<(), BlobError> {
        self.received = self.received.saturating_add(data.len() as u64);
        if self.received > self.size {
            return Err(BlobError::Size {
                digest: self.digest,
                announced: self.size,
                found: "more came",
            });
        }
        self.hasher.update(data);
        let Some(partial) = &mut self.partial else {
            return Ok(());
        };
        partial
            .file
            .write_all(data)
            .map_err(|source| BlobError::File {
                operation: "write",
                path: partial.path.clone(),
                source,
            })
    }
}

/// A place in a blob.
#[derive(Debug)]
pub(crate) struct BlobReader {
    file: File,
    path: PathBuf,
    size: u64,
}

impl BlobReader {
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// The next bytes, at most [`CHUNK_BYTES`]; none at the end.
    pub(crate) fn next_chunk(&mut self) -> Result<Vec<u8>, BlobError> {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        (&self.file)
            .take(CHUNK_BYTES as u64)
            .read_to_end(&mut chunk)
            .map_err(|source| BlobError::File {
                operation: "read",
                path: self.path.clone(),
                source,
            })?;
        Ok(chunk)
    }
}
