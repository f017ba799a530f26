//! Blobs that were fetched, kept for later attempts: one file per digest, bounded, least recently used out first. What
//! an attempt is just being made from is never thrown out.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::OwnedMutexGuard;
use trainyard_common::ids::Digest;
use trainyard_common::limits::MAX_MANIFEST_BYTES;
use trainyard_transport::blobs::blob_path;
use trainyard_transport::tree::Tree;

/// After a clean-up this share of the limit is in use at most, in percent, so that not every fetch cleans up.
const CLEAN_TO_PERCENT: u64 = 90;
/// Looking through the cache takes up to a second for 100,000 files, so it is done after this share of the limit came in.
const LOOK_AFTER_PERCENT: u64 = 5;

/// A temporary file that was not written to for so long belongs to no download: a fetch is given up much sooner.
const LONGEST_DOWNLOAD: Duration = Duration::from_secs(24 * 3600);

/// The cache. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Cache(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    limit: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// How many fetches use a blob.
    pinned: BTreeMap<Digest, usize>,
    /// One lock for each tree that is being fetched.
    flights: BTreeMap<Digest, Arc<tokio::sync::Mutex<()>>>,
    /// Bytes that came in since the last look; none at the start, so that the first look comes at once.
    since_look: Option<u64>,
}

impl Cache {
    pub(crate) fn new(dir: PathBuf, limit: u64) -> Self {
        Self(Arc::new(Shared {
            dir,
            limit,
            state: Mutex::default(),
        }))
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// Waits for its turn to fetch a tree: members of an array often want the same one at the same time.
    pub(crate) async fn flight(&self, tree: Digest) -> OwnedMutexGuard<()> {
        let lock = {
            let mut state = self.lock();
            // Whoever waits or fetches holds a clone.
            state.flights.retain(|_, lock| Arc::strong_count(lock) > 1);
            state.flights.entry(tree).or_default().clone()
        };
        lock.lock_owned().await
    }

    /// A manifest that is here and undamaged. It blocks.
    pub(crate) fn tree(&self, id: Digest) -> Option<Tree> {
        let path = blob_path(&self.0.dir, &id);
        if fs::metadata(&path).ok()?.len() > MAX_MANIFEST_BYTES {
            return None;
        }
        let tree = Tree::decode(&fs::read(&path).ok()?).ok();
        tree.filter(|tree| tree.id() == id)
    }

    /// Keeps a manifest. It blocks.
    pub(crate) fn keep_tree(&self, tree: &Tree) -> io::Result<()> {
        let path = blob_path(&self.0.dir, &tree.id());
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        trainyard_transport::files::write_private(&path, &tree.encode())
    }

    /// Keeps the contents of a tree from being thrown out, until the pin is dropped.
    pub(crate) fn pin(&self, tree: &Tree) -> Pin {
        let digests: Vec<_> = tree.files().map(|(_, file)| file.digest).collect();
        let mut state = self.lock();
        for digest in &digests {
            *state.pinned.entry(*digest).or_default() += 1;
        }
        drop(state);
        Pin {
            cache: self.clone(),
            digests,
        }
    }

    /// A blob's content; the blob counts as used now. It blocks.
    pub(crate) fn open(&self, digest: &Digest) -> io::Result<File> {
        let file = File::open(blob_path(&self.0.dir, digest))?;
        // Only the order in which blobs are thrown out depends on it.
        let _ = file.set_modified(SystemTime::now());
        Ok(file)
    }

    /// A blob turned out to be damaged. It blocks.
    pub(crate) fn discard(&self, digest: &Digest) {
        // If it stays, it is found damaged again.
        let _ = fs::remove_file(blob_path(&self.0.dir, digest));
    }

    /// `bytes` came in: throws out what is too much, if it is time to look. It blocks.
    pub(crate) fn came_in(&self, bytes: u64) {
        {
            let mut state = self.lock();
            let since = state.since_look.map(|since| since.saturating_add(bytes));
            let due = since.is_none_or(|since| since >= self.0.limit / 100 * LOOK_AFTER_PERCENT);
            state.since_look = if due { Some(0) } else { since };
            if !due {
                return;
            }
        }
        if let Err(error) = self.clean_up() {
            tracing::warn!(%error, dir = ?self.0.dir, "cannot clean up the blob cache");
        }
    }

    fn clean_up(&self) -> io::Result<()> {
        let mut blobs = Vec::new();
        let mut total: u64 = 0;
        for group in fs::read_dir(&self.0.dir)? {
            let group = group?.path();
            for entry in fs::read_dir(&group).into_iter().flatten() {
                let entry = entry?;
                // Downloads that end meanwhile rename their temporary files.
                let Some(metadata) = present(entry.metadata())? else {
                    continue;
                };
                let digest = entry
                    .file_name()
                    .to_str()
                    .and_then(|name| name.parse().ok());
                let modified = metadata.modified()?;
                match digest {
                    Some(digest) => blobs.push((modified, metadata.len(), digest)),
                    // Temporary files have other names. One of an agent that was killed would stay for ever.
                    None if modified.elapsed().is_ok_and(|age| age > LONGEST_DOWNLOAD) => {
                        present(fs::remove_file(entry.path()))?;
                        continue;
                    }
                    None => {}
                }
                total = total.saturating_add(metadata.len());
            }
        }
        if total <= self.0.limit {
            return Ok(());
        }
        blobs.sort_unstable();
        let goal = self.0.limit / 100 * CLEAN_TO_PERCENT;
        let mut thrown_out = 0;
        for (_, length, digest) in blobs {
            if total <= goal {
                break;
            }
            if self.remove_unused(&digest)? {
                total = total.saturating_sub(length);
                thrown_out += 1;
            }
        }
        tracing::debug!(thrown_out, left_bytes = total, "cleaned up the blob cache");
        Ok(())
    }

    fn remove_unused(&self, digest: &Digest) -> io::Result<bool> {
        // Held over the removal, so that nobody begins to use it in between.
        let state = self.lock();
        if state.pinned.contains_key(digest) {
            return Ok(false);
        }
        present(fs::remove_file(blob_path(&self.0.dir, digest)))?;
        Ok(true)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is complete before anything can panic.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nothing if the file is not there any more.
fn present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Blobs that must stay.
#[derive(Debug)]
pub(crate) struct Pin {
    cache: Cache,
    digests: Vec<Digest>,
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut state = self.cache.lock();
        for digest in &self.digests {
            if let Some(count) = state.pinned.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    state.pinned.remove(digest);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use trainyard_transport::tree::{EntryKind, TreeEntry, TreeFile, digest_of};

    use super::*;

    fn put(cache: &Cache, data: &[u8], age: u64) -> Digest {
        let digest = digest_of(data);
        let path = blob_path(cache.dir(), &digest);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, data).unwrap();
        let then = SystemTime::now() - Duration::from_secs(age);
        File::open(&path).unwrap().set_modified(then).unwrap();
        digest
    }

    fn tree_of(digest: Digest, size: u64) -> Tree {
        let file = TreeFile {
            digest,
            size,
            executable: false,
        };
        let path = "a".to_owned();
        let kind = EntryKind::File(file);
        Tree::new(vec![TreeEntry { path, kind }]).unwrap()
    }

    #[test]
    fn the_oldest_go_first_and_what_is_in_use_stays() {
        let temp = tempfile::tempdir().unwrap();
        let cache = Cache::new(temp.path().to_owned(), 1000);
        let [oldest, old, new] =
            [(1, 30), (2, 20), (3, 10)].map(|(byte, age)| put(&cache, &[byte; 400], age));
        let pin = cache.pin(&tree_of(oldest, 400));
        cache.came_in(0);
        assert!(cache.open(&oldest).is_ok(), "pinned");
        assert!(cache.open(&old).is_err());
        assert!(cache.open(&new).is_ok());
        // Used now, so it is not the oldest any more.
        drop(pin);
        put(&cache, &[4; 400], 5);
        cache.came_in(10);
        assert!(cache.open(&new).is_ok(), "not time to look");
        let then = SystemTime::now() - Duration::from_secs(60);
        File::open(blob_path(cache.dir(), &new))
            .unwrap()
            .set_modified(then)
            .unwrap();
        cache.came_in(400);
        assert!(cache.open(&new).is_err());
        assert!(cache.open(&oldest).is_ok());
    }

    #[test]
    fn temporary_files_of_dead_downloads_are_removed() {
        let temp = tempfile::tempdir().unwrap();
        let cache = Cache::new(temp.path().to_owned(), 1000);
        let group = temp.path().join("ab");
        fs::create_dir(&group).unwrap();
        let [dead, live] = ["dead.tmp", "live.tmp"].map(|name| group.join(name));
        for (path, age) in [(&dead, LONGEST_DOWNLOAD * 2), (&live, Duration::ZERO)] {
            fs::write(path, b"part").unwrap();
            let then = SystemTime::now() - age;
            File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_modified(then)
                .unwrap();
        }
        cache.came_in(0);
        assert!(!dead.exists());
        assert!(live.exists());
    }

    #[test]
    fn manifests_are_checked_when_they_are_read() {
        let temp = tempfile::tempdir().unwrap();
        let cache = Cache::new(temp.path().to_owned(), 1000);
        let tree = tree_of(Digest([1; 32]), 5);
        assert!(cache.tree(tree.id()).is_none());
        cache.keep_tree(&tree).unwrap();
        assert_eq!(cache.tree(tree.id()), Some(tree.clone()));
        let other = tree_of(Digest([2; 32]), 5);
        fs::write(blob_path(cache.dir(), &tree.id()), other.encode()).unwrap();
        assert!(cache.tree(tree.id()).is_none());
    }

    #[tokio::test]
    async fn one_tree_is_fetched_by_one_at_a_time() {
        let temp = tempfile::tempdir().unwrap();
        let cache = Cache::new(temp.path().to_owned(), 1000);
        let first = cache.flight(Digest([1; 32])).await;
        let _other = cache.flight(Digest([2; 32])).await;
        let second = cache.flight(Digest([1; 32]));
        tokio::pin!(second);
        let early = tokio::time::timeout(Duration::from_millis(20), &mut second).await;
        assert!(early.is_err());
        drop(first);
        second.await;
    }
}
