//! What a rollback needs of the checkpoints: where the VM stands in its lineage, and that it stands
//! elsewhere afterwards.

use super::prepare::disk_spaces;
use super::writer::StoreSession;
use super::{Checkpointer, Marks, Report};
use crate::lineage::checkpoints;
use anyhow::{Context, Result};
use checkpoint_format::CheckpointId;
use vm::drives::Drives;
use vm::error::refused;
use vm::launch::paths::boot_files_of;
use vm::runtime_dir::RollbackUnderWay;

/// The VM as it is, and what is known of what was written to it since its last checkpoint.
pub(crate) struct Standing {
    pub session: StoreSession,
    pub drives: Drives,
    /// The last checkpoint; none if the next one would be full.
    pub parent: Option<CheckpointId>,
    /// In the store.
    pub newest: CheckpointId,
    /// The tracker knows every page that was written since.
    pub is_exact: bool,
    /// The disks' bitmaps have recorded since.
    pub has_bitmaps: bool,
    /// The disks are on the layers that they were on.
    pub is_chain_same: bool,
}

impl Checkpointer {
    /// A rollback of this VM has begun to write and is not complete.
    ///
    /// # Errors
    /// When its record cannot be read.
    pub fn half_rolled_back(&self) -> Result<Option<RollbackUnderWay>, vm::error::VmError> {
        self.vm.runtime.rollback(&self.vm.file.instance)
    }

    pub(super) fn refuse_half_rolled_back(&self, what: &str) -> Result<()> {
        let Some(record) = self.half_rolled_back()? else { return Ok(()) };
        let name = &self.vm.file.name;
        Err(refused(format!(
            "{what} is not possible: a rollback to {name}@{} that began at {} is not complete, so \
             the VM is of two instants and its guest stays stopped; \
             'stillpoint rollback {name}@{}' completes it",
            record.to, record.since, record.to
        )))
    }

    /// Of the VM as it is. Refuses what cannot be part of a checkpoint either.
    pub(crate) async fn standing(&mut self, report: &Report) -> Result<Standing> {
        report.say("plan", 0, 0);
        self.clean_up().await?;
        let inventory = self.survey().await?;
        let session = self.ensure_session(false).await?;
        let drives = inventory.drives;
        let base = self.take_base(&session, &disk_spaces(&drives.disks)?).await?;
        let history = &base.history;
        let standing = (
            history.parent(),
            history.is_exact,
            history.parent_of_bitmaps().is_some(),
            history.chains.clone(),
        );
        self.base = Some(base);
        let (parent, is_exact, has_bitmaps, before) = standing;
        let boot = boot_files_of(&self.vm.file.arguments, &self.vm.directory())?;
        self.layers.ensure_all(&session.repository, &drives, &boot).await?;
        let known = checkpoints(&session.repository, &self.vm.file.name).await?;
        let newest = *known.last().context("internal error: an empty list of checkpoints")?;
        let is_chain_same = before == self.chains(&drives)?;
        Ok(Standing { session, drives, parent, newest, is_exact, has_bitmaps, is_chain_same })
    }

    /// The VM is about to be written to: nothing that is known of it holds any more.
    pub(crate) fn begin_to_go_back(&mut self) -> Result<()> {
        self.vm.runtime.forget_exact_marks()?;
        self.distrust_marks();
        (self.base, self.is_clean) = (None, false);
        Ok(())
    }

    /// The VM is what the checkpoint of `marks` holds; what is written from here on is known.
    pub(crate) async fn has_gone_back(&mut self, marks: Marks) {
        self.forget_carried().await;
        (self.base, self.marks, self.is_clean) = (None, Some(marks), true);
    }
}
