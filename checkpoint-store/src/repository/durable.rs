//! The proof that a checkpoint exists.

use checkpoint_format::{CheckpointRef, DurableReceipt, Epoch};

/// A checkpoint that is committed and readable by another host.
///
/// Only [`super::PartialCheckpoint::commit`] makes one, after the rename is known to have happened.
/// Code that holds dirty bits of unsaved changes drops them for its [receipt](Self::receipt) and
/// for nothing else.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a durable checkpoint acknowledges the claims that it carries"]
pub struct Durable {
    receipt: DurableReceipt,
    epoch: Epoch,
    least_replicas: Option<u16>,
    short_of_replicas: usize,
}

impl Durable {
    pub(super) fn new(
        receipt: DurableReceipt,
        epoch: Epoch,
        least_replicas: Option<u16>,
        short_of_replicas: usize,
    ) -> Self {
        Durable { receipt, epoch, least_replicas, short_of_replicas }
    }

    /// What acknowledges the claims that this checkpoint carries.
    pub fn receipt(&self) -> &DurableReceipt {
        &self.receipt
    }

    /// The checkpoint that was committed.
    pub fn checkpoint(&self) -> &CheckpointRef {
        self.receipt.checkpoint()
    }

    /// The writer epoch that committed it.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The fewest copies that any file of the checkpoint was written with; `None` if the store
    /// keeps no copies.
    pub fn least_replicas(&self) -> Option<u16> {
        self.least_replicas
    }

    /// How many files were written with fewer copies than wanted (the store was asked to make up
    /// for it).
    pub fn short_of_replicas(&self) -> usize {
        self.short_of_replicas
    }
}
