//! Writes a [`Tree`] into a folder, and nowhere else.
//!
//! A tree is valid, but the folder may not be ours alone: somebody may plant symbolic links while we write. So every
//! directory is opened one component at a time without following links, and everything is done relative to such open
//! directories; links of the tree itself come last, so that nothing is ever written through one.
//!
//! Each file's size and digest are checked while it is written; it knows not where the bytes come from.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use cap_std::ambient_authority;
use cap_std::fs::{Dir, DirBuilder, OpenOptions, OpenOptionsExt};
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use trainyard_common::ids::Digest;

use crate::files;
use crate::tree::{EntryKind, Tree, TreeFile};

/// Bytes written at a time.
const WRITE_BYTES: usize = 256 << 10;

/// Why a tree could not be written.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The destination is there already.
    #[error("cannot unpack into {dest:?}: it is not an empty directory")]
    NotEmpty {
        /// The destination.
        dest: PathBuf,
    },
    /// The destination cannot be used.
    #[error("cannot unpack into {dest:?}")]
    Destination {
        /// The destination.
        dest: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something inside it cannot be written.
    #[error("cannot write {path:?}")]
    Write {
        /// Relative to the destination.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something else stands where a part of the tree should go.
    #[error("cannot write {path:?}: {reason}; move it away first")]
    InTheWay {
        /// Relative to the destination.
        path: String,
        /// What stands there.
        reason: &'static str,
    },
    /// The content of a file cannot be had.
    #[error("cannot read the content of {path:?} (blob {digest})")]
    Source {
        /// Relative to the destination.
        path: String,
        /// The blob.
        digest: Digest,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The content is not what the tree says.
    #[error("the content of {path:?} (blob {digest}) is damaged: its {what} is wrong")]
    Damaged {
        /// Relative to the destination.
        path: String,
        /// The blob.
        digest: Digest,
        /// `size` or `hash`.
        what: &'static str,
    },
}

/// Writes `tree` into `dest`, which does not exist yet or is an empty directory. It blocks.
///
/// `source` gives the content of a blob. On an error everything written is removed again (and `dest` too, if it did not
/// exist). Modes are 0755 and 0644 less the umask. Nothing is synced to disk.
///
/// # Errors
/// [`UnpackError`].
pub fn unpack<R: Read>(
    tree: &Tree,
    dest: &Path,
    source: impl FnMut(&Digest) -> io::Result<R>,
) -> Result<(), UnpackError> {
    let failed = |source| UnpackError::Destination {
        dest: dest.to_owned(),
        source,
    };
    let created = match std::fs::create_dir(dest) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
        Err(error) => return Err(failed(error)),
    };
    let root = Dir::open_ambient_dir(dest, ambient_authority()).map_err(failed)?;
    if !created && root.entries().map_err(failed)?.next().is_some() {
        return Err(UnpackError::NotEmpty {
            dest: dest.to_owned(),
        });
    }
    let mut writer = Writer::new(root, Existing::Fresh);
    let result = writer.write_tree(tree, source);
    if result.is_err() {
        // The first error is the one to report; if this fails too, the caller finds the folder not empty.
        let _ = empty(&writer.root);
        if created {
            let _ = std::fs::remove_dir(dest);
        }
    }
    result
}

/// Writes `tree` over what is in `dest`, for outputs that are fetched into a user's folder. It blocks.
///
/// Each file appears whole or not at all. A file or link that stands in the place of a file or link is replaced (the
/// link, not what it points to); a directory is never replaced, and a link is never followed. After an error the files
/// written so far stay.
///
/// # Errors
/// [`UnpackError`].
pub fn unpack_over<R: Read>(
    tree: &Tree,
    dest: &Path,
    source: impl FnMut(&Digest) -> io::Result<R>,
) -> Result<(), UnpackError> {
    let failed = |source| UnpackError::Destination {
        dest: dest.to_owned(),
        source,
    };
    std::fs::create_dir_all(dest).map_err(failed)?;
    let root = Dir::open_ambient_dir(dest, ambient_authority()).map_err(failed)?;
    Writer::new(root, Existing::Over).write_tree(tree, source)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Existing {
    /// Nothing may be there.
    Fresh,
    /// What is there is replaced.
    Over,
}

struct Writer {
    root: Dir,
    existing: Existing,
    /// The directory opened last, with its path: entries of one directory come together.
    open: Option<(String, Dir)>,
    buffer: Vec<u8>,
}

impl Writer {
    fn new(root: Dir, existing: Existing) -> Self {
        Self {
            root,
            existing,
            open: None,
            buffer: vec![0; WRITE_BYTES],
        }
    }

    fn write_tree<R: Read>(
        &mut self,
        tree: &Tree,
        mut source: impl FnMut(&Digest) -> io::Result<R>,
    ) -> Result<(), UnpackError> {
        for entry in tree.entries() {
            match &entry.kind {
                EntryKind::Directory => drop(self.directory(&entry.path)?),
                EntryKind::File(file) => {
                    let content = source(&file.digest).map_err(|source| UnpackError::Source {
                        path: entry.path.clone(),
                        digest: file.digest,
                        source,
                    })?;
                    self.file(&entry.path, file, content)?;
                }
                EntryKind::Symlink { .. } => {}
            }
        }
        for entry in tree.entries() {
            if let EntryKind::Symlink { target } = &entry.kind {
                self.symlink(&entry.path, target)?;
            }
        }
        Ok(())
    }

    /// The open directory at `path`, made if it is missing.
    fn directory(&mut self, path: &str) -> Result<&Dir, UnpackError> {
        let cached = matches!(&self.open, Some((open, _)) if open == path);
        if !cached {
            let mut dir = self.root.try_clone().map_err(write_error(path))?;
            for component in path.split('/').filter(|component| !component.is_empty()) {
                dir = enter(&dir, component, path)?;
            }
            self.open = Some((path.to_owned(), dir));
        }
        let (_, dir) = self.open.as_ref().expect("it was just set");
        Ok(dir)
    }

    fn file(&mut self, path: &str, file: &TreeFile, content: impl Read) -> Result<(), UnpackError> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let existing = self.existing;
        let dir = self
            .directory(parent)?
            .try_clone()
            .map_err(write_error(path))?;
        let temporary;
        let written_as = match existing {
            Existing::Fresh => name,
            Existing::Over => {
                check_replaceable(&dir, name, path)?;
                temporary = temporary_name(path)?;
                &temporary
            }
        };
        let result =
            self.create(&dir, written_as, path, file, content)
                .and_then(|()| match existing {
                    Existing::Fresh => Ok(()),
                    Existing::Over => dir
                        .rename(written_as, &dir, name)
                        .map_err(write_error(path)),
                });
        if result.is_err() && existing == Existing::Over {
            let _ = dir.remove_file(written_as);
        }
        result
    }

    fn create(
        &mut self,
        dir: &Dir,
        name: &str,
        path: &str,
        file: &TreeFile,
        content: impl Read,
    ) -> Result<(), UnpackError> {
        let mut options = OpenOptions::new();
        // `create_new` neither follows a link nor opens what somebody else put there.
        options
            .write(true)
            .create_new(true)
            .mode(if file.executable { 0o755 } else { 0o644 });
        let out = dir
            .open_with(name, &options)
            .map_err(write_error(path))?
            .into_std();
        copy_checked(content, out, path, file, &mut self.buffer)
    }

    fn symlink(&mut self, path: &str, target: &str) -> Result<(), UnpackError> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let existing = self.existing;
        let dir = self.directory(parent)?;
        match existing {
            // `symlink_contents`: the target is just a text here, it was checked with the tree.
            Existing::Fresh => dir
                .symlink_contents(target, name)
                .map_err(write_error(path)),
            Existing::Over => {
                check_replaceable(dir, name, path)?;
                let temporary = temporary_name(path)?;
                dir.symlink_contents(target, &temporary)
                    .map_err(write_error(path))?;
                let renamed = dir.rename(&temporary, dir, name).map_err(write_error(path));
                if renamed.is_err() {
                    let _ = dir.remove_file(&temporary);
                }
                renamed
            }
        }
    }
}

/// Opens the directory `name` in `dir` without following a link, making it if it is missing.
fn enter(dir: &Dir, name: &str, path: &str) -> Result<Dir, UnpackError> {
    match open_dir(dir, name) {
        Err(nix::Error::ENOENT) => {
            match dir.create_dir_with(name, &DirBuilder::new()) {
                // Somebody else was quicker: then it is as if it had been there.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other.map_err(write_error(path))?,
            }
            open_dir(dir, name).map_err(|error| write_error(path)(error.into()))
        }
        // ELOOP or ENOTDIR for a link, depending on the kernel; ENOTDIR for a file.
        Err(nix::Error::ELOOP | nix::Error::ENOTDIR) => Err(UnpackError::InTheWay {
            path: path.to_owned(),
            reason: "a file or symbolic link stands where a directory should be",
        }),
        other => other.map_err(|error| write_error(path)(error.into())),
    }
}

fn open_dir(dir: &Dir, name: &str) -> nix::Result<Dir> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let fd: OwnedFd = openat(dir, OsStr::new(name), flags, Mode::empty())?;
    Ok(Dir::from_std_file(File::from(fd)))
}

/// A directory is never replaced. (A rename over one would fail anyhow; this says so before anything is written.)
fn check_replaceable(dir: &Dir, name: &str, path: &str) -> Result<(), UnpackError> {
    match dir.symlink_metadata(name) {
        Ok(metadata) if metadata.is_dir() => Err(UnpackError::InTheWay {
            path: path.to_owned(),
            reason: "a directory stands there",
        }),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(write_error(path)(error)),
    }
}

/// Copies at most one byte more than announced, and accepts only what has the announced size and digest.
fn copy_checked(
    content: impl Read,
    mut out: File,
    path: &str,
    file: &TreeFile,
    buffer: &mut [u8],
) -> Result<(), UnpackError> {
    let damaged = |what| UnpackError::Damaged {
        path: path.to_owned(),
        digest: file.digest,
        what,
    };
    let mut hasher = blake3::Hasher::new();
    let mut size: u64 = 0;
    let mut content = content.take(file.size.saturating_add(1));
    loop {
        let count = match content.read(buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => {
                let (path, digest) = (path.to_owned(), file.digest);
                return Err(UnpackError::Source {
                    path,
                    digest,
                    source,
                });
            }
        };
        size += count as u64;
        if size > file.size {
            return Err(damaged("size"));
        }
        hasher.update(&buffer[..count]);
        out.write_all(&buffer[..count]).map_err(write_error(path))?;
    }
    if size != file.size {
        return Err(damaged("size"));
    }
    if hasher.finalize().as_bytes() != &file.digest.0 {
        return Err(damaged("hash"));
    }
    Ok(())
}

/// Removes everything in a directory.
fn empty(dir: &Dir) -> io::Result<()> {
    for entry in dir.entries()? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            dir.remove_dir_all(entry.file_name())?;
        } else {
            dir.remove_file(entry.file_name())?;
        }
    }
    Ok(())
}

fn temporary_name(path: &str) -> Result<String, UnpackError> {
    files::random_hex()
        .map(|random| format!(".yard-{random}.tmp"))
        .map_err(write_error(path))
}

fn write_error(path: &str) -> impl FnOnce(io::Error) -> UnpackError {
    let path = path.to_owned();
    move |source| UnpackError::Write { path, source }
}

#[cfg(test)]
mod tests;
