//! A checkpoint under way: one type for each phase, which owns what that phase has.
//!
//! ```text
//! Prepared --capture--> Captured --upload--> Uploaded --commit--> Durable (or Unchanged)
//!     \______________________\___________________\______> Failed
//! ```
//! A step takes its phase by value and returns the next one, or [`Failed`] with all that has to be
//! restored. Nothing that a phase needs can be missing in it.

use super::Report;
use super::base::History;
use super::buffers::{Aborted, Buffers};
use super::carried::{self, Resumed};
use super::outcome::{Outcome, Phases};
use super::parent::Parent;
use super::source::{CaptureContext, Claimed, FailedDisks, MemorySource, Moment, NotTaken, Taken};
use super::writer::StoreSession;
use crate::kill_point;
use crate::layers;
use crate::pack::{NumberedPack, Packer, StoredPacks};
use anyhow::{Context, Error, Result};
use checkpoint_format::{ByteLen, CheckpointId, LayerRef};
use checkpoint_store::PartialCheckpoint;
use dirty_tracker::DirtyClaim;
use qmp_bridge::capture::PreparedDisks;
use std::sync::Arc;
use std::time::Duration;
use vm::inventory::Inventory;
use vm::memory_source::Engine;
use vm::running::Vm;

/// What every phase has.
pub(super) struct Underway {
    pub id: CheckpointId,
    pub parent: Option<CheckpointId>,
    pub engine: Engine,
    /// What the operator should know though all goes well.
    pub notes: Vec<String>,
    /// The VM as it was when the checks were made.
    pub inventory: Inventory,
    pub boot_files: Vec<LayerRef>,
    pub layer_bytes: u64,
    pub session: StoreSession,
    pub history: History,
}

impl Underway {
    /// Commits or removes a checkpoint in the store.
    pub(super) async fn change_store<T>(&mut self, change: impl Future<Output = T>) -> T {
        self.history.lineage.change(&self.session.repository, change).await
    }
}

/// What the phases borrow from the helper.
pub(super) struct Site<'a> {
    pub vm: &'a Vm,
    pub layers: &'a layers::Known,
    pub report: &'a Report,
}

/// The guest runs; nothing of it was taken.
pub(super) struct Prepared {
    pub underway: Underway,
    pub storing: Storing,
    pub buffers: Buffers,
    pub disks: PreparedDisks,
    pub source: Box<dyn MemorySource>,
}

impl Prepared {
    pub(super) async fn capture(
        self,
        site: &Site<'_>,
        phases: &mut Phases,
    ) -> Result<Captured, Failed> {
        let Self { underway, storing, buffers, disks, source } = self;
        kill_point::point("prepared");
        let context = CaptureContext {
            packer: &storing.packer,
            inventory: &underway.inventory,
            phases,
            report: site.report,
        };
        let taken = source.capture(buffers, disks, context).await;
        match taken {
            Ok(taken) => {
                kill_point::point("pause.captured");
                Ok(Captured { underway, storing, taken })
            }
            Err(NotTaken { error, buffers, disks }) => {
                let store = FailedStore::Storing(storing);
                Err(Failed { error, underway, store, buffers, claim: None, disks })
            }
        }
    }
}

/// The instant is taken and the guest runs again.
pub(super) struct Captured {
    pub underway: Underway,
    pub storing: Storing,
    pub taken: Taken,
}

/// Every pack is stored.
pub(super) struct Uploaded {
    pub underway: Underway,
    pub stored: Stored,
    pub buffers: Buffers,
    pub claimed: Claimed,
    pub moment: Moment,
    pub state_bytes: ByteLen,
}

impl Uploaded {
    pub(super) fn failed(self, error: Error) -> Failed {
        let Self { underway, stored, buffers, claimed, .. } = self;
        let store = FailedStore::Ended(Some(stored));
        Failed::captured(error, underway, store, Some(buffers), claimed)
    }
}

/// How a checkpoint ends that does not fail.
pub(super) enum Committed {
    Durable(Durable),
    Unchanged(Unchanged),
}

/// The checkpoint exists.
pub(super) struct Durable {
    pub underway: Underway,
    pub receipt: checkpoint_store::Durable,
    /// The checkpoint, as the next one's parent.
    pub parent: Parent,
    pub buffers: Buffers,
    pub claimed: Claimed,
    pub outcome: Outcome,
}

/// Nothing differs from the parent: no checkpoint is made.
pub(super) struct Unchanged {
    pub underway: Underway,
    pub buffers: Buffers,
    pub claimed: Claimed,
    pub outcome: Outcome,
}

/// A checkpoint that failed in any phase, and what has to be restored.
pub(super) struct Failed {
    pub error: Error,
    pub underway: Underway,
    pub store: FailedStore,
    /// `None`: a task that panicked had them.
    pub buffers: Option<Buffers>,
    pub claim: Option<DirtyClaim>,
    /// `None`: they are restored in the background.
    pub disks: Option<FailedDisks>,
}

impl Failed {
    /// After the instant was taken.
    pub(super) fn captured(
        error: Error,
        underway: Underway,
        store: FailedStore,
        buffers: Option<Buffers>,
        claimed: Claimed,
    ) -> Self {
        let Claimed { claim, disks } = claimed;
        let disks = Some(FailedDisks::Captured(disks));
        Self { error, underway, store, buffers, claim, disks }
    }
}

/// How far a checkpoint that failed has come in the store.
#[expect(clippy::large_enum_variant, reason = "there is one, while a checkpoint fails")]
pub(super) enum FailedStore {
    Storing(Storing),
    /// `None`: nothing of it can be carried.
    Ended(Option<Stored>),
}

impl FailedStore {
    /// What was sent is stored if the store takes it within `grace`. Returns why the checkpoint
    /// failed, when `error` may only be that the pipeline has ended.
    pub(super) async fn end(self, error: Error, grace: Duration) -> (Error, Option<Stored>) {
        match self {
            Self::Storing(Storing { partial, packer, resumed }) => {
                let stored = packer.stored();
                let error = packer.why(error, grace).await;
                (error, Stored::new(partial, resumed, &stored).ok())
            }
            Self::Ended(stored) => (error, stored),
        }
    }
}

/// A checkpoint's packs on their way into the store.
pub(super) struct Storing {
    pub partial: Arc<PartialCheckpoint>,
    pub packer: Packer,
    /// What earlier tries have stored.
    pub resumed: Resumed,
}

impl Storing {
    /// Waits until every pack is stored.
    pub(super) async fn finish(self) -> Result<Stored, Aborted<Stored>> {
        let Self { partial, packer, resumed } = self;
        let packs = packer.stored();
        let finished = packer.finish().await;
        let stored = Stored::new(partial, resumed, &packs);
        match finished {
            Ok(_) => stored.map_err(Aborted::lost),
            Err(error) => Err(Aborted { error, left: stored.ok() }),
        }
    }
}

/// The packs that the store has acknowledged, and the partial checkpoint that they are in.
pub(super) struct Stored {
    pub partial: PartialCheckpoint,
    /// In the order in which they count; those of earlier tries come first.
    pub packs: Vec<NumberedPack>,
    /// Of earlier tries.
    pub bytes_carried: ByteLen,
}

impl Stored {
    fn new(
        partial: Arc<PartialCheckpoint>,
        resumed: Resumed,
        stored: &StoredPacks,
    ) -> Result<Self> {
        let mut packs = resumed.packs();
        drop(resumed);
        let bytes_carried = carried::bytes(&packs);
        packs.extend(stored.list());
        let partial = Arc::into_inner(partial)
            .context("internal error: the pack pipeline still holds the checkpoint")?;
        Ok(Self { partial, packs, bytes_carried })
    }
}

#[cfg(test)]
mod test;
