//! What an agent says before it crashes: a short note in its data directory that the next start tells the coordinator
//! with its first greeting, and deletes once that was heard. Best effort: nothing ever fails for it.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::panic;
use std::path::{Path, PathBuf};

use trainyard_common::limits::MAX_LAST_WORDS;

const FILE: &str = "last-words.txt";

/// Leaves words for the next start; the latest count. Does nothing without a data directory.
pub(crate) fn leave(dir: &Path, words: &str) {
    let words: String = words.chars().take(MAX_LAST_WORDS).collect();
    let file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(dir.join(FILE));
    if let Ok(mut file) = file {
        let _ = file.write_all(words.as_bytes());
    }
}

/// The words that an earlier process left, empty if none.
pub(crate) fn read(dir: &Path) -> String {
    let mut bytes = Vec::new();
    // A character has up to four bytes.
    let most = MAX_LAST_WORDS as u64 * 4;
    if let Ok(file) = fs::File::open(dir.join(FILE)) {
        let _ = file.take(most).read_to_end(&mut bytes);
    }
    let words = String::from_utf8_lossy(&bytes);
    words.chars().take(MAX_LAST_WORDS).collect()
}

/// They were heard.
pub(crate) fn forget(dir: &Path) {
    let _ = fs::remove_file(dir.join(FILE));
}

/// Makes every panic of this process leave its message in the agent's data directory, besides what it does already. For
/// a process that is an agent and nothing else: it changes the whole process.
pub fn keep_panics(dir: PathBuf) {
    let before = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        leave(&dir, &info.to_string());
        before(info);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_bounded_and_gone_when_heard() {
        let temp = tempfile::tempdir().unwrap();
        assert_eq!(read(temp.path()), "");
        leave(temp.path(), &"ä".repeat(1 << 20));
        assert_eq!(read(temp.path()), "ä".repeat(MAX_LAST_WORDS));
        leave(temp.path(), "panicked at driver.rs");
        assert_eq!(read(temp.path()), "panicked at driver.rs");
        fs::write(temp.path().join(FILE), vec![b'x'; 1 << 20]).unwrap();
        assert_eq!(read(temp.path()).len(), MAX_LAST_WORDS);
        forget(temp.path());
        assert_eq!(read(temp.path()), "");
        leave(&temp.path().join("nowhere"), "nothing happens");
    }
}
