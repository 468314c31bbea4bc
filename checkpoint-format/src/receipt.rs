//! Proof that a checkpoint is durable, seen from the side that waits for it.

use crate::names::VmName;
use crate::units::CheckpointId;

/// Says that a checkpoint is committed in the store and readable by another host.
///
/// A checkpoint claims dirty pages from the tracker. The claim restores them unless the checkpoint
/// that carries them became durable. Acknowledging the claim requires this receipt, so "written"
/// can't be mistaken for "durable". The trait lives here because the tracker and the store must not
/// know each other; only the store's commit makes a value that has it.
pub trait DurableReceipt {
    /// Which checkpoint became durable.
    fn checkpoint(&self) -> (&VmName, CheckpointId);
}
