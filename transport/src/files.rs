//! Writing files so that a crash leaves the old content or the new one, never half of it, and so that
//! secrets are never readable by others, not even for a moment.
//!
//! It must not know what the files mean.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

/// Mode of everything that is written here, secret or not: nobody else has any business with it.
pub const PRIVATE_FILE_MODE: u32 = 0o600;
/// Mode of directories that hold secrets.
const PRIVATE_DIR_MODE: u32 = 0o700;

/// Writes `bytes` to `path` with mode 0600: a temporary file beside it, fsync, rename, fsync of the directory.
///
/// The mode is 0600 also if the file existed with another one, as it is replaced.
///
/// # Errors
/// Whatever the file system says; the temporary file is removed then.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let (file, temporary) = create_beside(path, PRIVATE_FILE_MODE)?;
    let written = fill(file, bytes).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        // The first error is the one to report; a leftover is only untidy.
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    sync_dir(parent_of(path))
}

/// Creates `path` and what is missing above it. `path` itself gets mode 0700, also if it existed.
///
/// # Errors
/// Whatever the file system says; also if `path` is something else than a directory.
pub fn create_private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(PRIVATE_DIR_MODE)
        .create(path)?;
    let metadata = fs::metadata(path)?;
    if metadata.permissions().mode() & 0o777 != PRIVATE_DIR_MODE {
        fs::set_permissions(path, fs::Permissions::from_mode(PRIVATE_DIR_MODE))?;
    }
    Ok(())
}

/// Makes a rename inside `dir` durable.
///
/// # Errors
/// Whatever the file system says.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Takes the lock of `file` (as of `flock`), waiting for another holder to let it go for at most `patience`; nothing if
/// it did not. The lock is held until the file is dropped. It blocks.
///
/// # Errors
/// Whatever the file system says, or that no thread can be started.
pub fn lock_within(file: File, patience: Duration) -> io::Result<Option<File>> {
    match file.try_lock() {
        Ok(()) => return Ok(Some(file)),
        Err(TryLockError::WouldBlock) if patience.is_zero() => return Ok(None),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(error),
    }
    // The kernel wakes a thread that waits for a lock, and knows no time limit for it, so another one waits. If it gets
    // the lock too late, nobody takes it over, and that drops it.
    let (sender, receiver) = mpsc::sync_channel(1);
    let waiter = move || {
        let locked = file.lock().map(|()| file);
        let _ = sender.send(locked);
    };
    std::thread::Builder::new()
        .name("file-lock".to_owned())
        .spawn(waiter)?;
    receiver.recv_timeout(patience).ok().transpose()
}

/// A new, empty file beside `path` with an unguessable name, and that name.
///
/// The caller writes, syncs and renames it, or removes it.
///
/// # Errors
/// Whatever the file system says, or that `path` has no file name.
pub(crate) fn create_beside(path: &Path, mode: u32) -> io::Result<(File, PathBuf)> {
    let temporary = path.with_file_name(temporary_name(path)?);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)?;
    Ok((file, temporary))
}

/// The directory that holds `path`, with the empty parent of a bare name spelled `.`.
pub(crate) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A name for a temporary file that nobody can have planted before.
fn temporary_name(path: &Path) -> io::Result<String> {
    if path.file_name().is_none() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the path has no file name",
        ));
    }
    Ok(format!(".tmp-{}", random_hex()?))
}

/// Sixteen random hex digits.
pub(crate) fn random_hex() -> io::Result<String> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(data_encoding::HEXLOWER.encode(&random))
}

fn fill(mut file: File, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    fn names(dir: &Path) -> Vec<String> {
        fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn private_files_are_0600_also_when_they_replace_a_public_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pem");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        write_private(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(mode(&path), 0o600);
        assert_eq!(names(dir.path()), ["key.pem"]);
    }

    #[test]
    fn a_failed_write_leaves_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("taken");
        fs::create_dir(&path).unwrap();
        write_private(&path, b"x").unwrap_err();
        assert_eq!(names(dir.path()), ["taken"]);
        write_private(Path::new("/"), b"x").unwrap_err();
    }

    #[test]
    fn a_lock_is_waited_for_so_long_and_no_longer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let open = || File::create(&path).unwrap();
        let first = lock_within(open(), Duration::ZERO).unwrap().unwrap();
        assert!(lock_within(open(), Duration::ZERO).unwrap().is_none());
        let short = Duration::from_millis(10);
        assert!(lock_within(open(), short).unwrap().is_none());
        let file = open();
        let second = std::thread::spawn(move || lock_within(file, Duration::from_secs(60)));
        drop(first);
        let second = second.join().unwrap().unwrap();
        // Whoever was refused above may have it for a moment, but does not keep it.
        assert!(second.is_some());
        assert!(lock_within(open(), Duration::ZERO).unwrap().is_none());
    }

    #[test]
    fn directories_become_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        create_private_dir(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
        create_private_dir(&dir.path().join("c/d")).unwrap();
        assert_eq!(mode(&dir.path().join("c/d")), 0o700);
        fs::write(dir.path().join("file"), "").unwrap();
        create_private_dir(&dir.path().join("file")).unwrap_err();
    }
}
