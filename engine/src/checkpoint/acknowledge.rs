//! Phase `acknowledge`, and its counterpart `abort`: who owns the dirty bits after the checkpoint.

use super::Checkpointer;
use super::carried::{self, Carried, MOST_KEPT, WORTH_KEEPING};
use super::outcome::{Kind, Outcome, milliseconds};
use super::prepare::Run;
use anyhow::Result;
use checkpoint_format::{CheckpointId, CheckpointIdentity, PageCount};
use checkpoint_store::Durable;
use std::sync::Arc;
use tracing::instrument;
use vm::memory_source::Engine;

/// Staging memory that stays between checkpoints, already faulted in.
const KEPT_STAGING: PageCount = PageCount((16 << 20) / 4096);

impl Checkpointer {
    /// The checkpoint is durable; nothing that fails here can undo that.
    #[instrument(name = "acknowledge", level = "debug", skip_all)]
    pub(super) async fn acknowledge(
        &mut self,
        run: &mut Run,
        durable: Durable,
        identity: CheckpointIdentity,
    ) {
        let receipt = durable.receipt();
        if let Some(claim) = run.claim.take()
            && let Err(error) = claim.acknowledge(receipt)
        {
            tracing::error!(%error, "the next checkpoint looks at these pages again");
        }
        if let (Some(base), Some(delta)) = (&mut self.base, run.delta.take()) {
            base.spaces = delta.acknowledge();
            // A stream leaves the tracker's marks alone: what they count from is older, so they
            // hold more than is needed.
            base.is_exact |= run.engine == Engine::Tracker;
            self.marks = Some(base.advance(identity));
        }
        if let Some(captured) = run.captured.take()
            && let Err(error) = captured.acknowledge(receipt).await
        {
            // Older bits than needed stay: the next checkpoint reads more than it must, and stores
            // what differs.
            tracing::warn!(%error, "the disks' old bitmaps were not dropped");
        }
        if let Some(marks) = self.marks
            && let Err(error) = self.vm.runtime.set_marks(marks)
        {
            tracing::warn!(
                error = format!("{error:#}"),
                "a later helper will compare all memory and all disks once"
            );
        }
        self.staging.clear(KEPT_STAGING);
    }

    /// Nothing differs from the parent: no checkpoint is made, and what was looked at is given
    /// back, to be looked at again.
    pub(super) async fn unchanged(
        &mut self,
        run: &mut Run,
        parent: CheckpointId,
    ) -> Result<Outcome> {
        let outcome = Outcome {
            id: parent,
            parent: Some(parent),
            kind: Kind::Unchanged,
            pause_ms: milliseconds(run.pause),
            passes: run.brief_stops.len() as u32,
            brief_stops_ms: run.brief_stops.iter().copied().map(milliseconds).collect(),
            pages_dirty: run.pages_dirty.0,
            engine: run.engine.name().to_owned(),
            run_state: run.run_state.name().to_owned(),
            ..Outcome::default()
        };
        if let (Some(base), Some(delta)) = (&mut self.base, run.delta.take()) {
            base.spaces = delta.acknowledge();
            // The tracker holds the pages that were restored, so it is exact from here on.
            base.is_exact |= run.engine == Engine::Tracker;
            self.marks = base.marks().or(self.marks);
        }
        self.restore_claimed(run).await;
        Ok(outcome)
    }

    /// The checkpoint failed: everything that it claimed is dirty again, for the next one.
    pub(super) async fn abort(&mut self, mut run: Run) {
        if let (Some(base), Some(delta)) = (&mut self.base, run.delta.take()) {
            base.spaces = delta.fail();
        }
        self.restore_claimed(&mut run).await;
        run.resumed = None;
        let packs = run.packs();
        let Some(partial) = run.partial.take().and_then(|partial| Arc::try_unwrap(partial).ok())
        else {
            return;
        };
        let is_worth_it = carried::bytes(&packs) >= WORTH_KEEPING && packs.len() <= MOST_KEPT;
        if run.may_carry && is_worth_it {
            self.carried = Some(Carried { kept: partial.keep(), packs, parent: run.parent });
        } else if let Err(error) = partial.abort().await {
            tracing::warn!(%error, "a partial checkpoint is left in the store; the next one removes it");
        }
    }

    /// Restores what the checkpoint claimed of memory and disks. Idempotent.
    pub(super) async fn restore_claimed(&mut self, run: &mut Run) {
        drop(run.claim.take());
        let disks = match (run.captured.take(), run.prepared.take()) {
            (Some(captured), _) => captured.restore().await,
            (None, Some(prepared)) => prepared.discard().await,
            (None, None) => Ok(()),
        };
        if let Err(error) = disks {
            tracing::warn!(%error, "the disks' dirty bitmaps were not restored; the next checkpoint restores them");
        }
        self.staging.clear(KEPT_STAGING);
    }
}
