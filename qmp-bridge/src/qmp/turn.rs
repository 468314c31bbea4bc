//! A lock: one QEMU has one capture at a time.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

/// The lock of one connection.
#[derive(Debug, Default)]
pub(crate) struct CaptureTurn {
    turn: Arc<tokio::sync::Mutex<()>>,
    /// The hung directory for which the holder waits before it cleans up.
    hung: Mutex<Option<PathBuf>>,
}

impl CaptureTurn {
    /// Waits for the turn without a limit.
    pub(crate) async fn wait(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.turn).lock_owned().await
    }

    pub(crate) fn hung(&self) -> Option<PathBuf> {
        self.hung.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Records for which directory the holder waits; `None` when it no longer does.
    pub(crate) fn set_hung(&self, directory: Option<PathBuf>) {
        *self.hung.lock().unwrap_or_else(PoisonError::into_inner) = directory;
    }
}
