//! File trees: code snapshots, outputs and checkpoints as a list of files, directories and symbolic links.
//!
//! A [`Tree`] is always valid: whoever made the manifest, unpacking it inside a folder stays inside that folder. It
//! touches no file; see [`crate::pack`] and [`crate::unpack`].
//!
//! Kept of a file: path, content, and whether it is executable. Not kept: times, owners, other mode bits, extended
//! attributes, hard links (each becomes a file of its own) and holes (they become zeros).
//!
//! Names are compared byte by byte. `a` and `A`, or two Unicode spellings of one word, are different files, as they
//! are on Linux; where the file system disagrees, unpacking fails rather than overwriting one by the other.

use std::collections::HashSet;

use prost::Message;
use trainyard_common::ids::Digest;
use trainyard_common::limits;
use trainyard_proto::v1;

/// The one version of the manifest so far.
const VERSION: u32 = 1;

/// The bounds of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeLimits {
    /// Files, directories and links together.
    pub entries: usize,
    /// Bytes of all files together.
    pub bytes: u64,
    /// Bytes of one path.
    pub path_bytes: usize,
    /// Components of one path.
    pub depth: usize,
}

impl Default for TreeLimits {
    fn default() -> Self {
        Self {
            entries: limits::MAX_TREE_ENTRIES,
            bytes: limits::MAX_TREE_BYTES,
            path_bytes: limits::MAX_TREE_PATH_BYTES,
            depth: limits::MAX_TREE_DEPTH,
        }
    }
}

/// One thing in a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeEntry {
    /// Relative, with `/` between components.
    pub path: String,
    /// What it is.
    pub kind: EntryKind,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File(TreeFile),
    /// A directory. Only empty ones need an entry.
    Directory,
    /// A symbolic link.
    Symlink {
        /// Relative to the link's directory; stays inside the tree.
        target: String,
    },
}

/// A regular file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeFile {
    /// The hash of its bytes.
    pub digest: Digest,
    /// How many bytes.
    pub size: u64,
    /// Whether its owner may execute it.
    pub executable: bool,
}

/// A valid file tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    entries: Vec<TreeEntry>,
    total_bytes: u64,
    id: Digest,
}

impl Tree {
    /// A tree of these entries, in any order.
    ///
    /// # Errors
    /// [`InvalidTree`].
    pub fn new(mut entries: Vec<TreeEntry>) -> Result<Self, InvalidTree> {
        entries.sort_by(|one, other| one.path.cmp(&other.path));
        let total_bytes = validate(&entries, &TreeLimits::default())?;
        let mut tree = Self {
            entries,
            total_bytes,
            id: Digest([0; 32]),
        };
        let bytes = tree.encode();
        if bytes.len() as u64 > limits::MAX_MANIFEST_BYTES {
            return Err(InvalidTree::ManifestTooLarge);
        }
        tree.id = digest_of(&bytes);
        Ok(tree)
    }

    /// Reads a manifest that anybody may have written. Its id is the digest of exactly these bytes.
    ///
    /// # Errors
    /// [`InvalidTree`]; memory stays within a small multiple of the limits whatever the bytes are.
    pub fn decode(bytes: &[u8]) -> Result<Self, InvalidTree> {
        if bytes.len() as u64 > limits::MAX_MANIFEST_BYTES {
            return Err(InvalidTree::ManifestTooLarge);
        }
        let limits = TreeLimits::default();
        // Before decoding: an empty entry has 2 bytes on the wire and about 80 in memory.
        if count_entries(bytes).ok_or(InvalidTree::Malformed)? > limits.entries {
            return Err(InvalidTree::TooManyEntries {
                limit: limits.entries,
            });
        }
        let manifest = v1::Manifest::decode(bytes).map_err(|_| InvalidTree::Malformed)?;
        if manifest.version != VERSION {
            return Err(InvalidTree::Version {
                found: manifest.version,
            });
        }
        let entries = manifest
            .entries
            .into_iter()
            .map(entry_from_wire)
            .collect::<Result<Vec<_>, _>>()?;
        let total_bytes = validate(&entries, &limits)?;
        Ok(Self {
            entries,
            total_bytes,
            id: digest_of(bytes),
        })
    }

    /// The manifest's bytes, the same ones each time.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let entries = self.entries.iter().map(entry_to_wire).collect();
        v1::Manifest {
            version: VERSION,
            entries,
        }
        .encode_to_vec()
    }

    /// The tree's name: the digest of its manifest.
    #[must_use]
    pub fn id(&self) -> Digest {
        self.id
    }

    /// All entries, sorted by path.
    #[must_use]
    pub fn entries(&self) -> &[TreeEntry] {
        &self.entries
    }

    /// The files, sorted by path.
    pub fn files(&self) -> impl Iterator<Item = (&str, &TreeFile)> {
        self.entries.iter().filter_map(|entry| match &entry.kind {
            EntryKind::File(file) => Some((entry.path.as_str(), file)),
            EntryKind::Directory | EntryKind::Symlink { .. } => None,
        })
    }

    /// Bytes of all files together.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }
}

/// Why something is not a tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTree {
    /// The bytes are no manifest.
    #[error("the manifest cannot be read")]
    Malformed,
    /// The manifest is of another version.
    #[error("the manifest has version {found}; this version of Trainyard reads {VERSION}")]
    Version {
        /// What it says.
        found: u32,
    },
    /// The manifest itself is too large.
    #[error("the manifest is larger than {} MiB: use fewer files or shorter paths", limits::MAX_MANIFEST_BYTES >> 20)]
    ManifestTooLarge,
    /// It has too many entries.
    #[error(
        "the tree has more than {limit} files and directories: list what is not needed in .yardignore"
    )]
    TooManyEntries {
        /// The limit.
        limit: usize,
    },
    /// The files are too large together.
    #[error("the files of the tree are larger than {} GiB together: list what is not needed in .yardignore", limit >> 30)]
    TooManyBytes {
        /// The limit in bytes.
        limit: u64,
    },
    /// A path breaks a rule.
    #[error("{path:?} is not allowed in a tree: {rule}")]
    BadPath {
        /// The path, cut to a readable length.
        path: String,
        /// The rule.
        rule: PathRule,
    },
    /// The paths are not strictly ascending.
    #[error("{path:?} appears twice in the tree, or out of order")]
    Order {
        /// The later one.
        path: String,
    },
    /// Something lies below a thing that is no directory.
    #[error("{path:?} cannot lie below {parent:?}, which is not a directory")]
    ParentNotDirectory {
        /// What lies there.
        path: String,
        /// Below what.
        parent: String,
    },
    /// A link leads out of the tree, or may.
    #[error("the symbolic link {path:?} -> {target:?} {rule}")]
    BadSymlink {
        /// The link.
        path: String,
        /// Where it leads.
        target: String,
        /// What is wrong with that.
        rule: SymlinkRule,
    },
    /// A file's digest has not 32 bytes.
    #[error("the digest of {path:?} does not have 32 bytes")]
    BadDigest {
        /// The file.
        path: String,
    },
    /// An entry says not what it is.
    #[error("{path:?} is neither a file nor a directory nor a symbolic link")]
    NoKind {
        /// The entry.
        path: String,
    },
}

/// What is wrong with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathRule {
    /// It has no component.
    #[error("it is empty")]
    Empty,
    /// It begins with `/`.
    #[error("it is absolute")]
    Absolute,
    /// It has two slashes beside each other, or one at the end.
    #[error("it has an empty component")]
    EmptyComponent,
    /// It has a component `.` or `..`.
    #[error("it has a component `.` or `..`")]
    Dots,
    /// It has a NUL.
    #[error("it contains a NUL character")]
    Nul,
    /// It is too long.
    #[error("it is longer than {} bytes", limits::MAX_TREE_PATH_BYTES)]
    TooLong,
    /// A component is too long.
    #[error(
        "one of its components is longer than {} bytes",
        limits::MAX_NAME_BYTES
    )]
    LongComponent,
    /// It is too deep.
    #[error("it has more than {} components", limits::MAX_TREE_DEPTH)]
    TooDeep,
}

/// What is wrong with a link's target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SymlinkRule {
    /// It is empty, too long or has a NUL.
    #[error("has a target that no file system takes")]
    Unusable,
    /// It is absolute.
    #[error("is absolute, which means something else on another machine")]
    Absolute,
    /// It leads above the root.
    #[error("leads out of the tree")]
    Escapes,
    /// It goes up after it went down.
    #[error("has `..` after another component, so that another link could lead it out of the tree")]
    InnerDots,
}

/// The digest of some bytes.
#[must_use]
pub fn digest_of(bytes: &[u8]) -> Digest {
    Digest(*blake3::hash(bytes).as_bytes())
}

/// Checks everything that makes a tree valid; gives the sum of the sizes.
pub(crate) fn validate(entries: &[TreeEntry], limits: &TreeLimits) -> Result<u64, InvalidTree> {
    if entries.len() > limits.entries {
        return Err(InvalidTree::TooManyEntries {
            limit: limits.entries,
        });
    }
    let mut total: u64 = 0;
    let mut previous: Option<&str> = None;
    let mut not_directories = HashSet::new();
    for entry in entries {
        let path = entry.path.as_str();
        check_path(path, limits).map_err(|rule| InvalidTree::BadPath {
            path: shorten(path),
            rule,
        })?;
        if previous.is_some_and(|previous| previous >= path) {
            return Err(InvalidTree::Order {
                path: shorten(path),
            });
        }
        previous = Some(path);
        // A path is sorted after all its ancestors, so those are known by now.
        if let Some(parent) = ancestors(path).find(|parent| not_directories.contains(parent)) {
            let (path, parent) = (shorten(path), shorten(parent));
            return Err(InvalidTree::ParentNotDirectory { path, parent });
        }
        match &entry.kind {
            EntryKind::Directory => continue,
            EntryKind::File(file) => {
                total = total
                    .checked_add(file.size)
                    .filter(|total| *total <= limits.bytes)
                    .ok_or(InvalidTree::TooManyBytes {
                        limit: limits.bytes,
                    })?;
            }
            EntryKind::Symlink { target } => {
                check_symlink(path, target).map_err(|rule| InvalidTree::BadSymlink {
                    path: shorten(path),
                    target: shorten(target),
                    rule,
                })?
            }
        }
        not_directories.insert(path);
    }
    Ok(total)
}

pub(crate) fn check_path(path: &str, limits: &TreeLimits) -> Result<(), PathRule> {
    if path.is_empty() {
        return Err(PathRule::Empty);
    }
    if path.len() > limits.path_bytes {
        return Err(PathRule::TooLong);
    }
    if path.starts_with('/') {
        return Err(PathRule::Absolute);
    }
    if path.contains('\0') {
        return Err(PathRule::Nul);
    }
    if path.split('/').count() > limits.depth {
        return Err(PathRule::TooDeep);
    }
    path.split('/').try_for_each(|component| match component {
        "" => Err(PathRule::EmptyComponent),
        "." | ".." => Err(PathRule::Dots),
        _ if component.len() > limits::MAX_NAME_BYTES => Err(PathRule::LongComponent),
        _ => Ok(()),
    })
}

/// Whether following the link at `path` surely ends inside the tree.
///
/// `..` counts only at the front: there it goes up from the directory that holds the link, which is a real one (no
/// entry lies below a link). After another component it would go up from wherever that component leads, and with
/// `a/b/up -> ../..` the harmless looking `a/b/up/..` is the directory above the root.
pub(crate) fn check_symlink(path: &str, target: &str) -> Result<(), SymlinkRule> {
    if target.is_empty() || target.len() > limits::MAX_TREE_PATH_BYTES || target.contains('\0') {
        return Err(SymlinkRule::Unusable);
    }
    if target.starts_with('/') {
        return Err(SymlinkRule::Absolute);
    }
    let mut depth = ancestors(path).count();
    let mut went_down = false;
    for component in target.split('/') {
        match component {
            "" | "." => {}
            ".." if went_down => return Err(SymlinkRule::InnerDots),
            ".." => depth = depth.checked_sub(1).ok_or(SymlinkRule::Escapes)?,
            _ if component.len() > limits::MAX_NAME_BYTES => return Err(SymlinkRule::Unusable),
            _ => went_down = true,
        }
    }
    Ok(())
}

/// The directories above `path`, the topmost first, without the root.
pub(crate) fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

/// A path for a message: at most 200 characters.
pub(crate) fn shorten(path: &str) -> String {
    match path.char_indices().nth(200) {
        Some((end, _)) => format!("{}…", &path[..end]),
        None => path.to_owned(),
    }
}

/// Counts the entries of an encoded manifest without making them; `None` if it is malformed.
fn count_entries(mut bytes: &[u8]) -> Option<usize> {
    const ENTRIES_FIELD: u64 = 2;
    let mut count = 0;
    while !bytes.is_empty() {
        let key = prost::encoding::decode_varint(&mut bytes).ok()?;
        let length = match key & 7 {
            0 => {
                prost::encoding::decode_varint(&mut bytes).ok()?;
                0
            }
            1 => 8,
            2 => usize::try_from(prost::encoding::decode_varint(&mut bytes).ok()?).ok()?,
            5 => 4,
            _ => return None,
        };
        if key >> 3 == ENTRIES_FIELD {
            count += 1;
        }
        bytes = bytes.get(length..)?;
    }
    Some(count)
}

fn entry_from_wire(entry: v1::TreeEntry) -> Result<TreeEntry, InvalidTree> {
    use v1::tree_entry::Kind;
    let v1::TreeEntry { path, kind } = entry;
    let kind = match kind {
        Some(Kind::File(v1::TreeFile {
            digest,
            size,
            executable,
        })) => {
            let digest =
                Digest::try_from(digest.as_slice()).map_err(|_| InvalidTree::BadDigest {
                    path: shorten(&path),
                })?;
            EntryKind::File(TreeFile {
                digest,
                size,
                executable,
            })
        }
        Some(Kind::Directory(v1::TreeDirectory {})) => EntryKind::Directory,
        Some(Kind::Symlink(v1::TreeSymlink { target })) => EntryKind::Symlink { target },
        None => {
            return Err(InvalidTree::NoKind {
                path: shorten(&path),
            });
        }
    };
    Ok(TreeEntry { path, kind })
}

fn entry_to_wire(entry: &TreeEntry) -> v1::TreeEntry {
    use v1::tree_entry::Kind;
    let kind = match &entry.kind {
        EntryKind::File(TreeFile {
            digest,
            size,
            executable,
        }) => Kind::File(v1::TreeFile {
            digest: digest.0.to_vec(),
            size: *size,
            executable: *executable,
        }),
        EntryKind::Directory => Kind::Directory(v1::TreeDirectory {}),
        EntryKind::Symlink { target } => Kind::Symlink(v1::TreeSymlink {
            target: target.clone(),
        }),
    };
    v1::TreeEntry {
        path: entry.path.clone(),
        kind: Some(kind),
    }
}

#[cfg(test)]
mod tests;
