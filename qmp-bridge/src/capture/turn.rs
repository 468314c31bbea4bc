//! Whose turn it is to have a capture in a QEMU.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::OwnedMutexGuard;

use super::CaptureError;
use crate::qmp::Qmp;

/// How long a capture waits for the clean-up of one before.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two polls of what that clean-up waits for.
const POLL: Duration = Duration::from_millis(100);

/// Of one connection.
#[derive(Debug, Default)]
pub(crate) struct CaptureTurn {
    turn: Arc<tokio::sync::Mutex<()>>,
    /// The directory that keeps the holder from its clean-up.
    hung: Mutex<Option<PathBuf>>,
}

impl CaptureTurn {
    fn hung(&self) -> Option<PathBuf> {
        self.hung.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The holder says what it waits for, or that it does not any more.
    pub(super) fn set_hung(&self, directory: Option<PathBuf>) {
        *self.hung.lock().unwrap_or_else(PoisonError::into_inner) = directory;
    }
}

/// Waits until no other capture of this connection is left.
pub(super) async fn take(qmp: &Qmp) -> Result<OwnedMutexGuard<()>, CaptureError> {
    let shared = qmp.capture_turn();
    let begun = Instant::now();
    loop {
        if let Ok(turn) = tokio::time::timeout(POLL, Arc::clone(&shared.turn).lock_owned()).await {
            return Ok(turn);
        }
        if let Some(path) = shared.hung() {
            return Err(CaptureError::Hung { path, after: begun.elapsed() });
        }
        if begun.elapsed() >= PATIENCE {
            return Err(CaptureError::Busy { after: PATIENCE });
        }
    }
}
