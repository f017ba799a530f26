//! Tells when something grows in directories that are watched, by the kernel's word (inotify) and not by looking again
//! and again. Knows nothing of what the files are, nor which of them grew.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Directories whose files may grow. A directory that is deleted is no longer watched.
#[derive(Debug)]
pub(crate) struct Growth(Option<Inotify>);

impl Growth {
    /// Watches nothing yet. Without the kernel's help, as when a user has too many watchers, it never will.
    pub(crate) fn new() -> Self {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK);
        if let Err(error) = &inotify {
            tracing::warn!(%error, "the kernel does not tell of growing files, they are looked at instead");
        }
        Self(inotify.ok())
    }

    /// Watches the files of a directory, also those to come. Whether it does; if not they have to be looked at.
    pub(crate) fn watch(&self, dir: &Path) -> bool {
        let flags = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_ONLYDIR;
        let watched = match &self.0 {
            Some(inotify) => inotify.add_watch(dir, flags),
            None => return false,
        };
        if let Err(error) = &watched {
            tracing::debug!(?dir, %error, "a directory is not watched, its files are looked at instead");
        }
        watched.is_ok()
    }

    /// A listener for what happens from now on, and of what nobody listened to yet. One at a time.
    ///
    /// # Errors
    /// The async runtime does not take the descriptor.
    #[expect(
        deprecated,
        reason = "the successor is unsafe, as an owner may lie about its descriptor; this one borrows a real one"
    )]
    pub(crate) fn listen(&self) -> io::Result<Listener<'_>> {
        let watched = match &self.0 {
            Some(inotify) => Some(AsyncFd::with_interest(
                Watched(inotify),
                Interest::READABLE,
            )?),
            None => None,
        };
        Ok(Listener(watched))
    }
}

#[derive(Debug)]
struct Watched<'a>(&'a Inotify);

impl AsRawFd for Watched<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Hears of growth.
#[derive(Debug)]
pub(crate) struct Listener<'a>(Option<AsyncFd<Watched<'a>>>);

impl Listener<'_> {
    /// Waits until something may have grown since the last call. Cancel-safe.
    pub(crate) async fn grown(&self) {
        let Some(watched) = &self.0 else {
            return std::future::pending().await;
        };
        loop {
            let Ok(mut ready) = watched.readable().await else {
                // The runtime is going away.
                return std::future::pending().await;
            };
            let mut any = false;
            loop {
                match ready.get_inner().0.read_events() {
                    Ok(_) => any = true,
                    Err(Errno::EINTR) => {}
                    Err(_) => break,
                }
            }
            ready.clear_ready();
            if any {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    /// Far more than the kernel takes.
    const PATIENCE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn new_files_and_growing_ones_are_told_of_and_then_it_is_quiet() {
        let temp = tempfile::tempdir().unwrap();
        let growth = Growth::new();
        assert!(growth.watch(temp.path()));
        assert!(!growth.watch(&temp.path().join("missing")));
        // What happened before anybody listened counts.
        let mut file = File::create(temp.path().join("a")).unwrap();
        let listener = growth.listen().unwrap();
        let grown = || async { timeout(PATIENCE, listener.grown()).await.expect("news") };
        grown().await;
        for _ in 0..3 {
            file.write_all(b"x").unwrap();
            grown().await;
        }
        fs::read(temp.path().join("a")).unwrap();
        let quiet = timeout(Duration::ZERO, listener.grown()).await;
        assert!(quiet.is_err(), "reading is not growing");
    }
}
