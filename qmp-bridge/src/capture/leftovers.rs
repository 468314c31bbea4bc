//! What a helper that was killed in the middle of a capture left in QEMU.

use std::path::Path;

use super::bitmaps::{self, KeptBitmap};
use super::names::BitmapTag;
use super::storage::Storage;
use super::{CaptureError, sweep, turn};
use crate::nbd_server;
use crate::paused;
use crate::qmp::Qmp;

/// What [`cleanup_leftovers`] did, and the bitmaps that continue recording.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// The guest was paused by the dead helper, and runs again.
    pub resumed: bool,
    /// Exports that were removed.
    pub exports: usize,
    /// Jobs that were cancelled.
    pub jobs: usize,
    /// Nodes that were removed.
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

/// Where the captures of a VM have their things on this host.
#[derive(Debug, Clone, Copy)]
pub struct CapturePlaces<'a> {
    /// As in [`super::CapturePlan`].
    pub fleecing_dir: &'a Path,
    /// As in [`super::CapturePlan`].
    pub nbd_socket: &'a Path,
}

/// Brings QEMU back to the state between two checkpoints. To be called once before the first
/// capture of a helper.
///
/// The guest is resumed first if an earlier helper left it paused. Changes are never lost: bitmaps
/// with this tag are merged into the oldest of their node, whose set then holds at least what
/// changed since that checkpoint. What is not named after the tag is not touched.
///
/// # Errors
/// When QEMU refuses a command.
pub async fn cleanup_leftovers(
    qmp: &Qmp,
    tag: &BitmapTag,
    places: CapturePlaces<'_>,
) -> Result<Leftovers, CaptureError> {
    let qmp = &tag.on(qmp);
    let _turn = turn::take(qmp).await?;
    let resumed = paused::resume_abandoned(qmp).await?;
    if sweep::has_nodes(qmp).await? {
        // Writes of that capture which hang would hang what follows.
        match Storage::open(places.fleecing_dir).await {
            Ok(storage) => storage.answers().await?,
            Err(hung @ CaptureError::Hung { .. }) => return Err(hung),
            Err(error) => {
                tracing::debug!(%error, "the overlays' directory is of no use, but does not hang")
            }
        }
    }
    let swept = sweep::sweep(qmp).await?;
    nbd_server::stop_unused(qmp, places.nbd_socket).await?;
    let bitmaps = bitmaps::merge_back(qmp, tag).await?;
    let left = Leftovers {
        resumed,
        exports: swept.exports,
        jobs: swept.jobs,
        nodes: swept.nodes,
        bitmaps,
    };
    if left.found_capture() {
        tracing::warn!(?left, "cleaned up after a helper that ended in the middle of a capture");
    }
    Ok(left)
}
