//! The file system of the fleecing overlays, as seen from here.
//!
//! A call to the directory can hang (`fsfreeze`, or a remote file system). It must not block the
//! helper, so each call is made on a thread of its own. And while QEMU has writes in it that do not
//! complete, the helper must send no command that waits for them: QEMU's main loop, and with it the
//! guest, would wait too. So before a capture is torn down after a failure, a write by the helper
//! shows whether writes complete there.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::CaptureError;

/// A busy disk takes a second for one synchronous write.
const ANSWER: Duration = Duration::from_secs(5);

static FILES: AtomicU64 = AtomicU64::new(0);

/// A file without a name in the overlays' directory, for test writes.
#[derive(Debug, Clone)]
pub(super) struct Storage {
    directory: PathBuf,
    probe: Arc<File>,
}

impl Storage {
    pub(super) async fn open(directory: &Path) -> Result<Self, CaptureError> {
        let place = directory.to_owned();
        let probe = within(directory, move || unnamed(&place)).await?;
        Ok(Self { directory: directory.into(), probe: Arc::new(probe) })
    }

    /// Whether a write ends, in whatever way: one that fails does not hang.
    pub(super) async fn answers(&self) -> Result<(), CaptureError> {
        let probe = Arc::clone(&self.probe);
        let written = within(&self.directory, move || {
            let mut file: &File = &probe;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&[1])?;
            file.sync_data()
        });
        match written.await {
            Err(CaptureError::Hung { path, after }) => Err(CaptureError::Hung { path, after }),
            _ => Ok(()),
        }
    }
}

/// Bytes free for an ordinary user in the file system of `directory`.
pub(super) fn free_bytes(directory: &Path) -> std::io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(directory)?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

/// Closes a file, which may never return, on a thread of its own.
pub(super) fn close(file: File) {
    let thread = std::thread::Builder::new().name("overlay-close".into());
    if let Err(error) = thread.spawn(move || drop(file)) {
        tracing::debug!(%error, "no thread to close a file of the overlays' directory");
    }
}

/// Runs a call that may never return. Its thread is then left to it.
pub(super) async fn within<T: Send + 'static>(
    directory: &Path,
    call: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, CaptureError> {
    within_limit(directory, ANSWER, call).await
}

/// [`within`], for a call that may take longer than other calls.
pub(super) async fn within_limit<T: Send + 'static>(
    directory: &Path,
    limit: Duration,
    call: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, CaptureError> {
    let error = |source| CaptureError::Fleecing { path: directory.into(), source };
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("overlay-directory".into());
    thread.spawn(move || sender.send(call()).is_ok()).map_err(error)?;
    match tokio::time::timeout(limit, receiver).await {
        Ok(Ok(result)) => result.map_err(error),
        Ok(Err(_)) => Err(error(std::io::Error::other("the thread that asked for it ended"))),
        Err(_) => Err(CaptureError::Hung { path: directory.into(), after: limit }),
    }
}

fn unnamed(directory: &Path) -> std::io::Result<File> {
    let path = directory.join(format!(
        ".stillpoint-probe.{}.{}",
        std::process::id(),
        FILES.fetch_add(1, Ordering::Relaxed)
    ));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}
