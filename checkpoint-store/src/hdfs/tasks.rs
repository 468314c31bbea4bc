//! Tasks with a progress timeout: a task that makes no progress is dropped.
//!
//! They run on threads of their own, for the life of the process: the client keeps connections in a
//! process-wide cache, which must not belong to a runtime that ends; and encoding a checkpoint must
//! not starve the transfers. A panic in the client ends its task, not the helper.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinHandle;

use crate::error::{Op, Result, StoreError};
use crate::path::StorePath;

const IO_THREADS: usize = 2;
/// How often a task is polled within its limit; that it makes no progress may be detected one poll
/// late.
const POLLS_PER_LIMIT: u32 = 8;

pub(super) fn runtime() -> io::Result<Handle> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime.handle().clone());
    }
    let built = Builder::new_multi_thread()
        .worker_threads(IO_THREADS)
        .thread_name("hdfs-io")
        .enable_all()
        .build()?;
    if let Err(surplus) = RUNTIME.set(built) {
        // Another thread was faster; dropping a runtime blocks, which async callers must not.
        surplus.shutdown_background();
    }
    Ok(RUNTIME.get().expect("it was set just now, by this thread or by another").handle().clone())
}

/// Steps that a task has made.
#[derive(Debug, Clone, Default)]
pub(super) struct Progress(Arc<AtomicU64>);

impl Progress {
    pub(super) fn step(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn steps(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Runs `work` until it is done or has made no step for `limit`.
pub(super) async fn watched<T: Send + 'static>(
    op: Op,
    path: &StorePath,
    limit: Duration,
    progress: Progress,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T> {
    let handle = runtime().map_err(|error| StoreError::failed(op, path, error))?;
    let mut task = AbortOnDrop(handle.spawn(work));
    let (mut seen, mut since) = (progress.steps(), Instant::now());
    loop {
        match tokio::time::timeout(limit / POLLS_PER_LIMIT, &mut task.0).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(join)) => {
                return Err(StoreError::failed(op, path, format!("the HDFS client broke: {join}")));
            }
            Err(_) if progress.steps() != seen => {
                (seen, since) = (progress.steps(), Instant::now())
            }
            Err(_) if since.elapsed() < limit => {}
            Err(_) => {
                return Err(StoreError::Timeout { op, path: path.to_string(), after: limit });
            }
        }
    }
}

/// Runs `work` in the background; no caller waits for it.
pub(super) fn detached(work: impl Future<Output = ()> + Send + 'static) {
    if let Ok(handle) = runtime() {
        handle.spawn(work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step takes a tenth of it, on a busy host too.
    const LIMIT: Duration = Duration::from_secs(1);

    async fn run<T: Send + 'static>(
        progress: Progress,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T> {
        watched(Op::Put, &StorePath::root(), LIMIT, progress, work).await
    }

    /// Long enough to print a panic with its backtrace.
    const PATIENT: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn slow_but_moving_is_fine() {
        let progress = Progress::default();
        let steps = progress.clone();
        let work = async move {
            for _ in 0..15 {
                tokio::time::sleep(LIMIT / 10).await;
                steps.step();
            }
        };
        run(progress, work).await.expect("it kept moving");
    }

    #[tokio::test]
    async fn standing_still_is_not() {
        let result = run(Progress::default(), std::future::pending::<()>()).await;
        assert!(matches!(result, Err(StoreError::Timeout { .. })));
    }

    #[tokio::test]
    async fn a_panic_becomes_an_error() {
        let work = async { panic!("on purpose") };
        let result: Result<()> =
            watched(Op::Put, &StorePath::root(), PATIENT, Progress::default(), work).await;
        assert!(matches!(result, Err(StoreError::Failed { .. })));
    }
}
