//! Waiting for the turn to have a capture in a QEMU.

use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use super::CaptureError;
use crate::qmp::Qmp;

/// How long a capture waits for the clean-up of one before.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Between two polls of what that clean-up waits for.
const POLL: Duration = Duration::from_millis(100);

/// Waits until no other capture of this connection is left.
pub(super) async fn take(qmp: &Qmp) -> Result<OwnedMutexGuard<()>, CaptureError> {
    let shared = qmp.capture_turn();
    let begun = Instant::now();
    loop {
        if let Ok(turn) = tokio::time::timeout(POLL, shared.wait()).await {
            return Ok(turn);
        }
        if let Some(path) = shared.hung() {
            return Err(CaptureError::Hung { path, after: begun.elapsed() });
        }
        if begun.elapsed() >= TIMEOUT {
            return Err(CaptureError::Busy { after: TIMEOUT });
        }
    }
}
