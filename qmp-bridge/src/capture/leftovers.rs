//! What a helper that was killed in the middle of a capture left in QEMU.

use super::CaptureError;
use super::bitmaps::{self, KeptBitmap};
use super::names::BitmapTag;
use super::prepare::take_turn;
use super::sweep;
use crate::jobs;
use crate::paused;
use crate::qmp::Qmp;

/// What [`cleanup_leftovers`] did, and the bitmaps that go on recording.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// The guest was paused by the dead helper, and runs again.
    pub resumed: bool,
    pub exports: usize,
    pub jobs: usize,
    pub nodes: usize,
    /// At most one per disk node, recording since its `since`.
    pub bitmaps: Vec<KeptBitmap>,
}

impl Leftovers {
    /// Whether a capture was under way; bitmaps alone are the normal state between two checkpoints.
    pub fn found_capture(&self) -> bool {
        self.resumed || self.exports + self.jobs + self.nodes > 0
    }
}

/// Brings QEMU back to the state between two checkpoints. To be called once before the first capture of a helper.
///
/// The guest is resumed first if an earlier helper left it paused. Changes are never lost: bitmaps with this tag are
/// merged into the oldest of their node, whose set then holds at least what changed since that checkpoint.
pub async fn cleanup_leftovers(qmp: &Qmp, tag: &BitmapTag) -> Result<Leftovers, CaptureError> {
    let _turn = take_turn(qmp).await?;
    let resumed = paused::resume_abandoned(qmp).await?;
    let swept = sweep::sweep(qmp).await?;
    // A server without our exports may be somebody else's.
    if swept != sweep::Swept::default() && jobs::export_ids(qmp).await?.is_empty() {
        sweep::stop_server(qmp).await?;
    }
    let bitmaps = bitmaps::merge_back(qmp, tag).await?;
    let left = Leftovers { resumed, exports: swept.exports, jobs: swept.jobs, nodes: swept.nodes, bitmaps };
    if left.found_capture() {
        tracing::warn!(?left, "cleaned up after a helper that ended in the middle of a capture");
    }
    Ok(left)
}
