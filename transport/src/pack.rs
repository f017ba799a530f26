//! Turns a directory into a [`Tree`] and the list of files behind it.
//!
//! It reads and changes nothing, and sends nothing. What it cannot carry faithfully it names, rather than leaving it
//! out in silence.
//!
//! With [`IgnoreRules::YardAndGit`] the files `.gitignore` and `.yardignore` in the directory and below count, also
//! without a git repository, and also for files that git tracks nevertheless; `.yardignore` has the last word, so
//! `!name` in it brings something back. Rules from outside of the directory (above it, the user's global ones) do not
//! count, as the same directory would then mean something else to another user. `.git` itself is never included.

use std::collections::HashSet;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ignore::{DirEntry, WalkBuilder};
use trainyard_common::ids::Digest;
use trainyard_common::units::format_bytes;

use crate::tree::{
    self, EntryKind, InvalidTree, SymlinkRule, Tree, TreeEntry, TreeFile, TreeLimits,
};

/// Bytes read at a time.
const READ_BYTES: usize = 256 << 10;
/// Names of skipped things that are kept; beyond that they are only counted.
const MAX_SKIPPED_NAMES: usize = 100;
/// The ignore file of our own.
const YARDIGNORE: &str = ".yardignore";

/// What is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IgnoreRules {
    /// What `.gitignore` and `.yardignore` say, and `.git`: for code.
    YardAndGit,
    /// Nothing: for outputs and checkpoints.
    None,
}

/// What to do with what a tree cannot hold: sockets, pipes, devices, names that are not UTF-8, links that lead out,
/// files that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unpackable {
    /// An error that names it: for code, where the user is there and can decide.
    Refuse,
    /// Left out and listed: for outputs, where losing the rest would be worse.
    Skip,
}

/// How to pack.
#[derive(Debug, Clone, Copy)]
pub struct PackOptions {
    /// What is left out.
    pub ignore: IgnoreRules,
    /// What to do with what a tree cannot hold.
    pub unpackable: Unpackable,
    /// The bounds.
    pub limits: TreeLimits,
}

impl PackOptions {
    /// For a code snapshot.
    #[must_use]
    pub fn snapshot() -> Self {
        Self {
            ignore: IgnoreRules::YardAndGit,
            unpackable: Unpackable::Refuse,
            limits: TreeLimits::default(),
        }
    }

    /// For outputs and checkpoints.
    #[must_use]
    pub fn output() -> Self {
        Self {
            ignore: IgnoreRules::None,
            unpackable: Unpackable::Skip,
            limits: TreeLimits::default(),
        }
    }
}

/// A file whose content is one blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedFile {
    /// The hash of its bytes when it was packed.
    pub digest: Digest,
    /// Its size then.
    pub size: u64,
    /// Where it lies.
    pub path: PathBuf,
}

/// A directory, packed.
#[derive(Debug, Clone)]
pub struct Packed {
    /// The tree.
    pub tree: Tree,
    /// One file for each different content, in the order of the tree.
    pub files: Vec<PackedFile>,
    /// Bytes of [`files`](Self::files) together: at most the tree's, as equal contents count once.
    pub total_bytes: u64,
    /// What was left out, with the reason: the first 100. See [`Unpackable::Skip`].
    pub skipped: Vec<String>,
    /// How much was left out.
    pub skipped_count: usize,
}

/// Why a directory cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The root cannot be used.
    #[error("cannot pack {path:?}")]
    Root {
        /// The root.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something below cannot be read.
    #[error("cannot read {path:?}: make it readable, or list it in {YARDIGNORE}")]
    Read {
        /// Relative to the root.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The directory cannot be walked, or an ignore file is wrong.
    #[error("cannot walk the directory")]
    Walk(#[source] ignore::Error),
    /// Something that a tree cannot hold.
    #[error("{path:?} cannot be packed, as it {reason}: remove it or list it in {YARDIGNORE}")]
    Unpackable {
        /// Relative to the root; bytes that are not UTF-8 are replaced.
        path: String,
        /// What it is.
        reason: String,
    },
    /// A limit of trees.
    #[error(transparent)]
    Invalid(#[from] InvalidTree),
}

/// Packs the directory `root`. It blocks, reading every file once.
///
/// Each file's digest and size are of what was read, so they fit each other; a file that changes later no longer fits
/// them, which the upload notices.
///
/// # Errors
/// [`PackError`].
pub fn pack(root: &Path, options: &PackOptions) -> Result<Packed, PackError> {
    let root = usable_root(root)?;
    let mut packer = Packer {
        options,
        entries: Vec::new(),
        packed: Sink::default(),
    };
    let mut found = packer.walk(&root)?;
    found.sort_by(|one, other| one.bytes().cmp(other.bytes()));
    for thing in found {
        packer.add(&root, thing)?;
    }
    let Sink {
        files,
        total_bytes,
        skipped,
        skipped_count,
        ..
    } = packer.packed;
    let tree = Tree::new(packer.entries)?;
    Ok(Packed {
        tree,
        files,
        total_bytes,
        skipped,
        skipped_count,
    })
}

/// The root without symbolic links in it, as the links inside are what must not be followed.
fn usable_root(root: &Path) -> Result<PathBuf, PackError> {
    let failed = |source| PackError::Root {
        path: root.to_owned(),
        source,
    };
    let real = root.canonicalize().map_err(failed)?;
    if real.is_dir() {
        Ok(real)
    } else {
        Err(failed(io::ErrorKind::NotADirectory.into()))
    }
}

/// Something found in the directory, before its content was read.
struct Found {
    relative: PathBuf,
    metadata: Metadata,
}

impl Found {
    fn bytes(&self) -> &[u8] {
        self.relative.as_os_str().as_bytes()
    }
}

fn walker(root: &Path, rules: IgnoreRules) -> WalkBuilder {
    let mut walker = WalkBuilder::new(root);
    walker.standard_filters(false).follow_links(false);
    if rules == IgnoreRules::YardAndGit {
        walker
            .git_ignore(true)
            .require_git(false)
            .add_custom_ignore_filename(YARDIGNORE)
            .filter_entry(|entry| entry.file_name() != ".git");
    }
    walker
}

struct Packer<'a> {
    options: &'a PackOptions,
    entries: Vec<TreeEntry>,
    packed: Sink,
}

#[derive(Default)]
struct Sink {
    files: Vec<PackedFile>,
    digests: HashSet<Digest>,
    total_bytes: u64,
    skipped: Vec<String>,
    skipped_count: usize,
}

impl Packer<'_> {
    /// Lists everything that is not ignored, stopping at the first limit so that a wrong directory costs little.
    fn walk(&mut self, root: &Path) -> Result<Vec<Found>, PackError> {
        let limits = self.options.limits;
        let mut found = Vec::new();
        let mut bytes: u64 = 0;
        for entry in walker(root, self.options.ignore).build() {
            let Some(thing) = self.look_at(root, entry)? else {
                continue;
            };
            let with_it = match thing.metadata.is_file() {
                true => bytes.saturating_add(thing.metadata.len()),
                false => bytes,
            };
            if with_it > limits.bytes && self.skips() {
                let path = tree::shorten(&thing.relative.to_string_lossy());
                self.skip(format!(
                    "{path:?}: with it there would be more than {}",
                    format_bytes(limits.bytes)
                ));
                continue;
            }
            bytes = with_it;
            if bytes > limits.bytes {
                return Err(InvalidTree::TooManyBytes {
                    limit: limits.bytes,
                }
                .into());
            }
            if found.len() >= limits.entries {
                return Err(InvalidTree::TooManyEntries {
                    limit: limits.entries,
                }
                .into());
            }
            found.push(thing);
        }
        Ok(found)
    }

    /// `None` for the root, for what went away meanwhile, and for what may be skipped.
    fn look_at(
        &mut self,
        root: &Path,
        entry: Result<DirEntry, ignore::Error>,
    ) -> Result<Option<Found>, PackError> {
        let entry = match entry {
            Ok(entry) => entry,
            // A directory below that cannot be read. The root itself must be: its loss would be everything's.
            Err(error) if self.skips() && error.depth() != Some(0) => {
                self.skip(error.to_string());
                return Ok(None);
            }
            Err(error) => return Err(PackError::Walk(error)),
        };
        if let Some(error) = entry.error() {
            return Err(PackError::Walk(error.clone()));
        }
        if entry.depth() == 0 {
            return Ok(None);
        }
        let relative = entry
            .path()
            .strip_prefix(root)
            .unwrap_or(entry.path())
            .to_owned();
        match entry.path().symlink_metadata() {
            Ok(metadata) => Ok(Some(Found { relative, metadata })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(PackError::Read {
                path: relative,
                source,
            }),
        }
    }

    fn add(&mut self, root: &Path, found: Found) -> Result<(), PackError> {
        let absolute = root.join(&found.relative);
        let Some(path) = found.relative.to_str().map(str::to_owned) else {
            return self.unpackable(&found.relative, "has a name that is not UTF-8".to_owned());
        };
        if let Err(rule) = tree::check_path(&path, &self.options.limits) {
            if self.skips() {
                self.skip(format!("{:?}: {rule}", tree::shorten(&path)));
                return Ok(());
            }
            return Err(InvalidTree::BadPath {
                path: tree::shorten(&path),
                rule,
            }
            .into());
        }
        let kind = found.metadata.file_type();
        let kind = if kind.is_dir() {
            EntryKind::Directory
        } else if kind.is_symlink() {
            match link_target(&absolute, &path) {
                Ok(target) => EntryKind::Symlink { target },
                Err(reason) => return self.unpackable(&found.relative, reason),
            }
        } else if kind.is_file() {
            match self.read(&absolute) {
                Ok(file) => EntryKind::File(file),
                Err(error) if self.skips() => {
                    return self.unpackable(&found.relative, format!("cannot be read ({error})"));
                }
                Err(source) => {
                    return Err(PackError::Read {
                        path: found.relative,
                        source,
                    });
                }
            }
        } else {
            return self.unpackable(&found.relative, special(kind).to_owned());
        };
        self.entries.push(TreeEntry { path, kind });
        Ok(())
    }

    fn read(&mut self, path: &Path) -> io::Result<TreeFile> {
        let (digest, size, executable) = hash_file(path, self.options.limits.bytes)?;
        if self.packed.digests.insert(digest) {
            self.packed.total_bytes += size;
            self.packed.files.push(PackedFile {
                digest,
                size,
                path: path.to_owned(),
            });
        }
        Ok(TreeFile {
            digest,
            size,
            executable,
        })
    }

    fn unpackable(&mut self, path: &Path, reason: String) -> Result<(), PackError> {
        let path = tree::shorten(&path.to_string_lossy());
        if !self.skips() {
            return Err(PackError::Unpackable { path, reason });
        }
        self.skip(format!("{path:?}: it {reason}"));
        Ok(())
    }

    fn skips(&self) -> bool {
        self.options.unpackable == Unpackable::Skip
    }

    fn skip(&mut self, what: String) {
        self.packed.skipped_count += 1;
        if self.packed.skipped.len() < MAX_SKIPPED_NAMES {
            self.packed.skipped.push(what);
        }
    }
}

fn link_target(link: &Path, path: &str) -> Result<String, String> {
    let target = link
        .read_link()
        .map_err(|error| format!("cannot be read ({error})"))?;
    let Some(target) = target.to_str() else {
        return Err("is a symbolic link to a name that is not UTF-8".to_owned());
    };
    match tree::check_symlink(path, target) {
        Ok(()) => Ok(target.to_owned()),
        Err(SymlinkRule::Absolute | SymlinkRule::Escapes) => Err(format!(
            "is a symbolic link that leads out of the directory (to {target:?})"
        )),
        Err(rule) => Err(format!("is a symbolic link (to {target:?}) that {rule}")),
    }
}

fn special(kind: std::fs::FileType) -> &'static str {
    if kind.is_socket() {
        "is a socket"
    } else if kind.is_fifo() {
        "is a pipe"
    } else {
        "is a device"
    }
}

/// Opens a regular file and nothing else, whatever took its place since it was looked at.
pub(crate) fn open_regular(path: &Path) -> io::Result<(File, Metadata)> {
    // Without O_NONBLOCK a pipe would hold us until somebody writes into it.
    let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_file() {
        Ok((file, metadata))
    } else {
        Err(io::Error::other("it is no longer a regular file"))
    }
}

fn hash_file(path: &Path, limit: u64) -> io::Result<(Digest, u64, bool)> {
    let (file, metadata) = open_regular(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut size: u64 = 0;
    // One byte beyond the limit is enough to see that it is exceeded; a file that grows as fast as we read ends there.
    let mut file = file.take(limit.saturating_add(1));
    loop {
        let count = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hasher.update(&buffer[..count]);
        size += count as u64;
    }
    let executable = metadata.permissions().mode() & 0o100 != 0;
    Ok((Digest(*hasher.finalize().as_bytes()), size, executable))
}

#[cfg(test)]
mod tests;
