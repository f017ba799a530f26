//! Walks over directory trees that a job has written, and so may hold anything: links to elsewhere, directories that
//! cannot be read, paths longer than any limit. Nothing outside the tree is ever touched.
//!
//! Directories are held by descriptors and their entries named through `/proc/self/fd`, so no link in the middle of a
//! path can lead away, and no path gets long. Depth costs no descriptors either: a directory inside a directory is
//! moved up to the top before it is emptied.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::libc;

use super::RunAs;
use super::dir::{AttemptDir, NEW_PREFIX, OLD_PREFIX, random_hex, sync_dir};

/// A directory that is held, whatever happens to its name.
#[derive(Debug)]
struct Held {
    file: File,
}

impl Held {
    /// Opens the directory itself, never one behind a link.
    fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW)
            .open(path)?;
        Ok(Self { file })
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    fn entry(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path().join(name)
    }

    /// Makes it possible to list and change it.
    fn unlock(&self) {
        // Fails for directories of others, which shows in what is tried next.
        let _ = std::fs::set_permissions(self.path(), Permissions::from_mode(0o700));
    }
}

/// The directories in `parent` that are named like a `T`, in its order. What an interrupted making or removal left is
/// deleted, and everything else left alone. There may be no such parent.
///
/// # Errors
/// The parent cannot be listed.
pub(crate) fn named_directories<T: FromStr + ToString + Ord>(parent: &Path) -> io::Result<Vec<T>> {
    let entries = match std::fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(NEW_PREFIX) || name.starts_with(OLD_PREFIX) {
            if let Err(error) = delete_tree(&path) {
                tracing::warn!(
                    path = %path.display(),
                    error = &error as &dyn std::error::Error,
                    "a leftover directory cannot be deleted"
                );
            }
            continue;
        }
        if name == crate::state::MARK {
            continue;
        }
        match name.parse::<T>() {
            Ok(named) if named.to_string() == name => found.push(named),
            _ => tracing::warn!(path = %path.display(), "not one of ours; left alone"),
        }
    }
    found.sort();
    Ok(found)
}

/// Deletes a directory in `parent`: first its name, so that it is whole or not there for everybody else.
///
/// # Errors
/// It cannot be renamed, or as for [`delete_tree`].
pub(crate) fn remove_whole(parent: &Path, directory: &Path) -> io::Result<()> {
    let old = parent.join(format!("{OLD_PREFIX}{}", random_hex(8)?));
    match std::fs::rename(directory, &old) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    }
    sync_dir(parent)?;
    delete_tree(&old)
}

/// Deletes a directory and all below it.
///
/// # Errors
/// Something in it cannot be deleted (a mount, a file of another user); the rest may be gone already.
pub(crate) fn delete_tree(path: &Path) -> io::Result<()> {
    let top = match Held::open(path) {
        Ok(top) => top,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    top.unlock();
    let mut moved: u64 = 0;
    loop {
        let mut empty = true;
        for entry in std::fs::read_dir(top.path())? {
            let entry = entry?;
            empty = false;
            if entry.file_type()?.is_dir() {
                empty_dir(&top, &entry.file_name(), &mut moved)?;
                absent(std::fs::remove_dir(top.entry(entry.file_name())))?;
            } else {
                absent(std::fs::remove_file(top.entry(entry.file_name())))?;
            }
        }
        if empty {
            break;
        }
    }
    drop(top);
    absent(std::fs::remove_dir(path))
}

/// Deletes the files of a directory in `top` and moves its directories up into `top`.
fn empty_dir(top: &Held, name: &std::ffi::OsStr, moved: &mut u64) -> io::Result<()> {
    let dir = Held::open(&top.entry(name))?;
    dir.unlock();
    for entry in std::fs::read_dir(dir.path())? {
        let entry = entry?;
        let path = dir.entry(entry.file_name());
        if entry.file_type()?.is_dir() {
            // Moving it changes its "..", which needs the right to write it.
            Held::open(&path)?.unlock();
            rename_up(top, &path, moved)?;
        } else {
            absent(std::fs::remove_file(path))?;
        }
    }
    Ok(())
}

/// Gives `path` a name in `top` that is not taken.
fn rename_up(top: &Held, path: &Path, moved: &mut u64) -> io::Result<()> {
    loop {
        *moved += 1;
        let new = top.entry(format!(".{moved}"));
        match std::fs::symlink_metadata(&new) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return std::fs::rename(path, new);
            }
            Err(error) => return Err(error),
        }
    }
}

fn absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Gives the directories that belong to the job to its user. Before this nobody but the agent can enter them, so they
/// hold what the agent has put there; the outermost is given last for that reason.
pub(crate) fn hand_over(dir: &AttemptDir, user: &RunAs) -> io::Result<()> {
    for path in [
        dir.work(),
        dir.resume(),
        dir.outputs(),
        dir.checkpoint(),
        dir.tmp(),
    ] {
        give(&path, user)?;
    }
    Ok(())
}

pub(super) fn give(root: &Path, user: &RunAs) -> io::Result<()> {
    let mut dirs = vec![root.to_owned()];
    let mut next = 0;
    while next < dirs.len() {
        for entry in std::fs::read_dir(&dirs[next])? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                dirs.push(entry.path());
            } else {
                std::os::unix::fs::lchown(entry.path(), Some(user.uid), Some(user.gid))?;
            }
        }
        next += 1;
    }
    for dir in dirs.iter().rev() {
        std::os::unix::fs::lchown(dir, Some(user.uid), Some(user.gid))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn hostile_trees_are_deleted_and_nothing_else_is() {
        let scratch = tempfile::tempdir().unwrap();
        let outside = scratch.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("precious"), "x").unwrap();
        let tree = scratch.path().join("tree");
        std::fs::create_dir_all(tree.join("a/b/c")).unwrap();
        std::fs::create_dir(tree.join(".1")).unwrap();
        std::fs::write(tree.join("a/b/.2"), "x").unwrap();
        symlink(&outside, tree.join("a/b/link")).unwrap();
        symlink(&outside, tree.join("link")).unwrap();
        symlink("/nowhere", tree.join("a/dangling")).unwrap();
        std::fs::set_permissions(tree.join("a/b"), Permissions::from_mode(0o000)).unwrap();
        std::fs::set_permissions(tree.join("a"), Permissions::from_mode(0o500)).unwrap();
        delete_tree(&tree).unwrap();
        assert!(!tree.exists());
        assert!(outside.join("precious").exists());
        delete_tree(&tree).unwrap();
    }

    #[test]
    fn depth_does_not_matter() {
        let scratch = tempfile::tempdir().unwrap();
        let tree = scratch.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        // Deeper than a path may be long and than a process may have files open.
        let mut at = Held::open(&tree).unwrap();
        for _ in 0..5000 {
            std::fs::create_dir(at.entry("d")).unwrap();
            at = Held::open(&at.entry("d")).unwrap();
        }
        std::fs::write(at.entry("file"), "x").unwrap();
        drop(at);
        delete_tree(&tree).unwrap();
        assert!(!tree.exists());
    }

    #[test]
    fn a_link_is_no_tree() {
        let scratch = tempfile::tempdir().unwrap();
        let real = scratch.path().join("real");
        std::fs::create_dir(&real).unwrap();
        std::fs::write(real.join("file"), "x").unwrap();
        let link = scratch.path().join("link");
        symlink(&real, &link).unwrap();
        assert!(delete_tree(&link).is_err());
        assert!(real.join("file").exists());
    }
}
