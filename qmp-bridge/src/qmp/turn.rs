//! Whose turn it is to have a capture in a QEMU.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

/// Of one connection.
#[derive(Debug, Default)]
pub(crate) struct CaptureTurn {
    turn: Arc<tokio::sync::Mutex<()>>,
    /// The directory that keeps the holder from its clean-up.
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

    /// The holder says what it waits for, or that it does not any more.
    pub(crate) fn set_hung(&self, directory: Option<PathBuf>) {
        *self.hung.lock().unwrap_or_else(PoisonError::into_inner) = directory;
    }
}
