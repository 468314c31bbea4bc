//! Where a checkpoint's memory comes from: the trait between the phases and the engines.
//!
//! A source captures memory, disks and device state of one instant. The phases before it (what the
//! checkpoint builds on) and after it (upload, commit, acknowledge) are the same for all of them.

use super::Report;
use super::buffers::{Aborted, Buffers};
use super::outcome::Phases;
use crate::pack::Packer;
use anyhow::{Context, Error, Result};
use checkpoint_format::PageCount;
use dirty_tracker::DirtyClaim;
use futures::future::BoxFuture;
use qmp_bridge::capture::{CaptureError, CapturedDisks, PreparedDisks};
use qmp_bridge::device_state::{DeviceState, DeviceStateFile};
use qmp_bridge::{Paused, RunState};
use std::time::Duration;
use vm::inventory::Inventory;

/// If a disk needs longer to write what is buffered, `stop` would hold the guest for as long.
const FLUSH_LIMIT: Duration = Duration::from_secs(30);

/// One engine, ready for one checkpoint.
pub(super) trait MemorySource: Send {
    /// Captures memory, disks and device state of one instant. When this returns, with whatever
    /// result, the guest is in its run state again, and what was claimed is in the result or
    /// restored.
    fn capture<'a>(
        self: Box<Self>,
        buffers: Buffers,
        disks: PreparedDisks,
        context: CaptureContext<'a>,
    ) -> BoxFuture<'a, Result<Taken, NotTaken>>;
}

/// What a source may use of the phases.
pub(super) struct CaptureContext<'a> {
    /// Takes pages that the buffers have no room for.
    pub packer: &'a Packer,
    pub inventory: &'a Inventory,
    pub phases: &'a mut Phases,
    pub report: &'a Report,
}

/// One instant of the VM.
pub(super) struct Taken {
    /// The pages that were not sent to the packer are staged.
    pub buffers: Buffers,
    pub claimed: Claimed,
    pub devices: SavedState,
    pub moment: Moment,
}

/// What becomes clean when the checkpoint is durable; it is restored otherwise.
pub(super) struct Claimed {
    /// `None`: the source takes no dirty pages from the tracker.
    pub claim: Option<DirtyClaim>,
    pub disks: CapturedDisks,
}

/// Where the devices' state of the instant is.
pub(super) enum SavedState {
    File(DeviceStateFile),
    Read(DeviceState),
}

impl SavedState {
    pub(super) fn read(self) -> Result<DeviceState> {
        match self {
            Self::File(file) => file.read().context("reading the device state back"),
            Self::Read(state) => Ok(state),
        }
    }
}

/// The checkpoint's point in time.
#[derive(Debug)]
pub(super) struct Moment {
    /// The guest's run state.
    pub run_state: RunState,
    pub pause: Duration,
    /// Of the pre-copy passes before it.
    pub brief_stops: Vec<Duration>,
    pub pages_dirty: PageCount,
}

/// The capture failed: why, and what is left of the checkpoint.
pub(super) struct NotTaken {
    pub error: Error,
    /// `None`: a task that panicked had them.
    pub buffers: Option<Buffers>,
    /// `None`: they are restored in the background.
    pub disks: Option<FailedDisks>,
}

impl NotTaken {
    /// The disks were not captured yet.
    pub(super) fn before(aborted: Aborted<Buffers>, disks: PreparedDisks) -> Self {
        let Aborted { error, left } = aborted;
        Self { error, buffers: left, disks: Some(FailedDisks::Prepared(disks)) }
    }

    /// The disks were captured.
    pub(super) fn after(error: Error, buffers: Option<Buffers>, disks: CapturedDisks) -> Self {
        Self { error, buffers, disks: Some(FailedDisks::Captured(disks)) }
    }
}

/// The disks of a checkpoint that failed.
pub(super) enum FailedDisks {
    Prepared(PreparedDisks),
    Captured(CapturedDisks),
}

impl FailedDisks {
    /// Merges the bitmaps back and removes what was made in QEMU.
    pub(super) async fn restore(self) -> Result<(), CaptureError> {
        match self {
            Self::Prepared(disks) => disks.discard().await,
            Self::Captured(disks) => disks.restore().await,
        }
    }
}

impl From<Aborted<PreparedDisks>> for Aborted<FailedDisks> {
    fn from(aborted: Aborted<PreparedDisks>) -> Self {
        aborted.map(FailedDisks::Prepared)
    }
}

impl From<Aborted<CapturedDisks>> for Aborted<FailedDisks> {
    fn from(aborted: Aborted<CapturedDisks>) -> Self {
        aborted.map(FailedDisks::Captured)
    }
}

/// To be called right before each `stop`, since that writes what is buffered while the guest waits.
pub(super) async fn flush(disks: &PreparedDisks) -> Result<()> {
    disks.flush(FLUSH_LIMIT).await.context("flushing the disks before the guest is stopped")
}

/// Captures the disks in a pause that does nothing else at the same time.
pub(super) async fn capture_disks(disks: PreparedDisks, paused: &Paused) -> Result<CapturedDisks> {
    let captured = paused.within("the disks' point in time", disks.capture(paused)).await?;
    captured.context("taking the disks' instant")
}
