//! Proof that a checkpoint is durable, seen from the side that waits for it.

use std::fmt;

use thiserror::Error;

use crate::names::VmName;
use crate::units::CheckpointId;

/// One checkpoint of one VM, whether it exists yet or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointRef {
    /// The VM's name.
    pub vm: VmName,
    /// The checkpoint's ID.
    pub id: CheckpointId,
}

impl fmt::Display for CheckpointRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.vm, self.id)
    }
}

/// Says that a checkpoint is committed in the store and readable by another host.
///
/// A checkpoint claims dirty pages from the tracker and dirty bitmaps of disks from QEMU. Both are
/// restored unless the very checkpoint that carries them became durable. Acknowledging a claim
/// requires this receipt and compares it ([`Self::confirm`]), so "written" cannot be mistaken for
/// "durable", nor one checkpoint for another. The type lives here because those that claim and the
/// store must not know each other.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a durable checkpoint acknowledges the claims that it carries"]
pub struct DurableReceipt(CheckpointRef);

impl DurableReceipt {
    /// Only the store's commit, and tests, may call this: clippy refuses it elsewhere.
    pub fn of_commit(checkpoint: CheckpointRef) -> Self {
        Self(checkpoint)
    }

    /// Which checkpoint became durable.
    pub fn checkpoint(&self) -> &CheckpointRef {
        &self.0
    }

    /// Compares it with the checkpoint that something was claimed for.
    ///
    /// # Errors
    /// When another checkpoint is durable.
    pub fn confirm(&self, claimed: &CheckpointRef) -> Result<(), OtherCheckpoint> {
        if self.0 == *claimed {
            return Ok(());
        }
        Err(OtherCheckpoint { durable: self.0.clone(), claimed: claimed.clone() })
    }
}

/// A claim was to be acknowledged with the receipt of another checkpoint; it was restored.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "internal error: changes that were claimed for checkpoint {claimed} are not acknowledged by \
     the receipt of {durable}; they were restored"
)]
pub struct OtherCheckpoint {
    /// The checkpoint of the receipt.
    pub durable: CheckpointRef,
    /// The checkpoint of the claim.
    pub claimed: CheckpointRef,
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a receipt without a store")]
    fn receipt_confirms_its_own_checkpoint_alone() {
        let checkpoint =
            |vm: &str, id| CheckpointRef { vm: vm.parse().expect("a name"), id: CheckpointId(id) };
        let receipt = DurableReceipt::of_commit(checkpoint("web1", 7));
        assert_eq!(receipt.confirm(&checkpoint("web1", 7)), Ok(()));
        for other in [checkpoint("web1", 8), checkpoint("web2", 7)] {
            let error = receipt.confirm(&other).expect_err("another checkpoint");
            assert!(error.to_string().contains(&format!("checkpoint {other} ")), "{error}");
        }
    }
}
