//! Watches the room for fleecing overlays while a capture copies before write.
//!
//! The room is shared: with the host, and with other VMs. Before it runs out, this ends the
//! copying. The capture is broken then, which [`super::CapturedDisks::verify`] finds, and its
//! changes go to the next one. And where the copying is done by `blockdev-backup`, a block that
//! cannot be saved fails the guest's write (seen with 7.2 and 10.0: the guest gets "No space left
//! on device"), so there this is what saves the guest. Where it is done by a filter of our own, see
//! [`super::filter`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::JoinHandle;

use super::{CaptureError, storage, sweep};
use crate::qmp::Qmp;

/// Between two polls. With the default reserve, a guest would have to overwrite 12 GiB/s to be
/// faster.
const POLL: Duration = Duration::from_millis(20);

/// Ends the watch when dropped.
#[derive(Debug)]
pub(super) struct FleecingGuard {
    ended: Arc<AtomicBool>,
    ending: JoinHandle<()>,
}

impl FleecingGuard {
    pub(super) fn start(qmp: Qmp, directory: PathBuf, reserve: u64) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let (low, is_low) = tokio::sync::oneshot::channel();
        let watched = Arc::clone(&ended);
        // On a thread of its own: a directory that hangs must not take others along.
        let thread = std::thread::Builder::new().name("overlay-room".into()).spawn(move || {
            while !watched.load(Ordering::Relaxed) {
                if let Err(error) = check(&directory, reserve) {
                    // The capture may have just ended.
                    let _ = low.send(error);
                    return;
                }
                std::thread::sleep(POLL);
            }
        });
        if let Err(error) = thread {
            tracing::warn!(%error, "the room for fleecing overlays is not watched");
        }
        let ending = tokio::spawn(async move {
            if let Ok(error) = is_low.await {
                tracing::warn!(%error, "ending the capture");
                end_copying(&qmp).await;
            }
        });
        Self { ended, ending }
    }
}

impl Drop for FleecingGuard {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        self.ending.abort();
    }
}

/// Fails if fewer than `reserve` bytes are free.
pub(super) fn check(directory: &Path, reserve: u64) -> Result<(), CaptureError> {
    let free = storage::free_bytes(directory)
        .map_err(|source| CaptureError::Fleecing { path: directory.into(), source })?;
    if free < reserve {
        return Err(CaptureError::FleecingFull { path: directory.into(), free, wanted: reserve });
    }
    Ok(())
}

async fn end_copying(qmp: &Qmp) {
    if let Err(error) = sweep::sweep(qmp).await {
        tracing::error!(%error, "cannot end copying before write");
    }
}
