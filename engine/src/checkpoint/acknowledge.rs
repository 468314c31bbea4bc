//! Phase `acknowledge`, and what replaces it if the checkpoint failed or nothing changed: the
//! claimed dirty bits are dropped, or restored.

use super::base::{Base, History};
use super::buffers::Buffers;
use super::carried::{self, Carried, MOST_KEPT, WORTH_KEEPING};
use super::delta::Space;
use super::outcome::{Outcome, Phases};
use super::source::{Claimed, FailedDisks};
use super::staging::Staging;
use super::underway::{Durable, Failed, Stored, Unchanged};
use super::{Checkpointer, Report};
use anyhow::Error;
use checkpoint_format::{CheckpointId, PageCount};
use dirty_tracker::DirtyClaim;
use std::time::Duration;
use tokio::time::Instant;
use tracing::instrument;
use vm::inventory::unchanged;
use vm::memory_source::Engine;

/// Staging memory that stays between checkpoints, already faulted in.
const KEPT_STAGING: PageCount = PageCount((16 << 20) / 4096);

/// How long a failed checkpoint continues to store what was read for it, for the next one to use:
/// enough for the packs under way at 1 MiB a second.
const UPLOAD_GRACE: Duration = Duration::from_secs(60);

impl Checkpointer {
    /// The checkpoint is durable; nothing that fails here can undo that.
    #[instrument(name = "acknowledge", level = "debug", skip_all)]
    pub(super) async fn acknowledge(&mut self, durable: Durable, phases: &mut Phases) -> Outcome {
        let begun = Instant::now();
        let Durable { underway, receipt, parent, buffers, claimed, outcome } = durable;
        let Claimed { claim, disks } = claimed;
        let receipt = receipt.receipt();
        if let Some(Err(error)) = claim.map(|claim| claim.acknowledge(receipt)) {
            tracing::error!(%error, "the next checkpoint compares these pages again");
        }
        let mut history = underway.history;
        // A stream leaves the tracker's marks alone: what they count from is older, so they hold
        // more than is needed.
        history.is_exact |= underway.engine == Engine::Tracker;
        let marks = history.advance(parent);
        self.marks = Some(marks);
        self.keep(history, buffers.acknowledge());
        if let Err(error) = disks.acknowledge(receipt).await {
            // Older bits than needed stay: the next checkpoint reads more than it must, and stores
            // what differs.
            tracing::warn!(%error, "the disks' old bitmaps were not dropped");
        }
        if let Err(error) = self.vm.runtime.set_marks(marks) {
            tracing::warn!(
                error = format!("{error:#}"),
                "a later helper will compare all memory and all disks once"
            );
        }
        phases.since("acknowledge", begun);
        outcome
    }

    /// Nothing differs from the parent: what was claimed is restored, and compared again.
    pub(super) async fn restore_unchanged(&mut self, same: Unchanged) -> Outcome {
        let Unchanged { underway, buffers, claimed, outcome } = same;
        let mut history = underway.history;
        // The tracker holds the pages that are restored, so it is exact from here on.
        history.is_exact |= underway.engine == Engine::Tracker;
        self.marks = history.marks().or(self.marks);
        self.keep(history, buffers.acknowledge());
        restore(claimed.claim, Some(FailedDisks::Captured(claimed.disks))).await;
        outcome
    }

    /// Ends a checkpoint that failed, in whichever phase: everything that it claimed is dirty again
    /// for the next one, which also uses what was stored. Returns why it failed.
    pub(super) async fn fail(&mut self, failed: Failed, report: &Report) -> Error {
        let Failed { error, underway, store, buffers, claim, disks } = failed;
        // The guest and its disks first: the store may take its time.
        restore(claim, disks).await;
        report.say("storing what was read", 0, 0);
        let (error, stored) = store.end(error, UPLOAD_GRACE).await;
        self.keep_failed(underway.history, buffers);
        if let Some(stored) = stored {
            self.keep_or_remove(stored, underway.parent).await;
        }
        let error = self.with_carried(error);
        // The disks may be restored in the background.
        self.is_clean = false;
        match underway.inventory.change(&self.vm).await {
            None => error,
            change => {
                tracing::info!(error = format!("{error:#}"), "first symptom of a change of the VM");
                unchanged(change).err().map_or(error, Error::from)
            }
        }
    }

    fn keep_failed(&mut self, history: History, buffers: Option<Buffers>) {
        match buffers {
            Some(buffers) => self.keep(history, buffers.fail()),
            None => tracing::warn!(
                "a task that panicked had the digest tables; they are read from the store again"
            ),
        }
    }

    /// Keeps history, staging memory and digest tables for the next checkpoint.
    fn keep(&mut self, history: History, (mut staging, spaces): (Staging, Vec<Space>)) {
        staging.clear(KEPT_STAGING);
        self.staging = staging;
        self.base = Some(Base { history, spaces });
    }

    async fn keep_or_remove(&mut self, stored: Stored, parent: Option<CheckpointId>) {
        let Stored { partial, mut packs, .. } = stored;
        // Read again from the store if they are carried.
        packs.iter_mut().for_each(|pack| pack.layout = None);
        if carried::bytes(&packs) >= WORTH_KEEPING && packs.len() <= MOST_KEPT {
            self.carried = Some(Carried { kept: partial.keep(), packs, parent });
        } else if let Err(error) = partial.abort().await {
            tracing::warn!(%error, "a partial checkpoint is left in the store; the next one removes it");
        }
    }
}

/// Restores what a checkpoint claimed of memory and disks.
async fn restore(claim: Option<DirtyClaim>, disks: Option<FailedDisks>) {
    drop(claim);
    if let Some(disks) = disks
        && let Err(error) = disks.restore().await
    {
        tracing::warn!(%error, "the disks' dirty bitmaps were not restored; the next checkpoint restores them");
    }
}
