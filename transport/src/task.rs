//! The one place where tasks are started: each has a name in a span, and a panic in it is reported.

use std::future::Future;

use tokio::task::JoinHandle;
use tracing::Instrument;

/// Starts `future` as a task of its own, inside a span with `name`.
pub fn spawn<F>(name: &'static str, future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    let future = async move {
        let _report = PanicReport(name);
        future.await
    };
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the helper that the rule asks for"
    )]
    tokio::spawn(future.instrument(tracing::info_span!("task", name)))
}

/// Runs `work`, which may wait for a disk, outside the async threads. A panic in it is one here.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is going away and takes this task with it at its next await.
            Err(_) => std::future::pending().await,
        },
    }
}

/// A task that ends when this is dropped.
#[derive(Debug)]
pub struct AbortOnDrop<T = ()>(
    /// The task.
    pub JoinHandle<T>,
);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct PanicReport(&'static str);

impl Drop for PanicReport {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(task = self.0, "task panicked");
        }
    }
}
