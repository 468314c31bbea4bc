//! Watches the room for scratch overlays while a capture copies before write.
//!
//! If the old content of a block cannot be saved, `blockdev-backup` fails the guest's write (seen with 7.2 and 10.0: the
//! guest gets "No space left on device", and the job goes on as if nothing were). A checkpoint is worth less than that:
//! before room runs out, this task ends the copying. The capture is broken then, which
//! [`super::FrozenDisks::verify`] finds, and its changes go to the next one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::JoinHandle;

use super::{CaptureError, scratch, sweep};
use crate::qmp::Qmp;

/// Pause between two looks. With the default reserve, a guest would have to overwrite 12 GiB/s to be faster.
const LOOK: Duration = Duration::from_millis(20);

/// Ends the watch when dropped.
#[derive(Debug)]
pub(super) struct ScratchGuard(JoinHandle<()>);

impl ScratchGuard {
    pub(super) fn start(qmp: Qmp, directory: PathBuf, reserve: u64) -> Self {
        Self(tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOOK).await;
                if let Err(error) = check(&directory, reserve) {
                    tracing::warn!(%error, "ending the capture");
                    return end_copying(&qmp).await;
                }
            }
        }))
    }
}

impl Drop for ScratchGuard {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Fails if fewer than `reserve` bytes are free.
pub(super) fn check(directory: &Path, reserve: u64) -> Result<(), CaptureError> {
    let free = scratch::free_bytes(directory)?;
    if free < reserve {
        return Err(CaptureError::ScratchFull { path: directory.into(), free, wanted: reserve });
    }
    Ok(())
}

async fn end_copying(qmp: &Qmp) {
    if let Err(error) = sweep::end_jobs(qmp).await {
        tracing::error!(%error, "cannot end copying before write; writes of the guest may fail");
    }
}
