//! What a runtime directory says of a rollback: that one is under way, or that the VM was set back.

use super::{MAX_MARKS_BYTES, RuntimeDir};
use crate::error::VmError;
use anyhow::Context;
use checkpoint_format::CheckpointId;
use serde::{Deserialize, Serialize};

const UNDER_WAY: &str = "rollback.json";
const DONE: &str = "rolled-back.json";

/// A rollback has begun to write to the VM: until it is complete the VM is of two instants, and its
/// guest must not run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollbackUnderWay {
    /// Of the QEMU process that is written to.
    pub instance: String,
    /// The checkpoint that it is set back to.
    pub to: CheckpointId,
    /// RFC 3339, UTC.
    pub since: String,
}

/// The VM was set back, and the next checkpoint adds to the one that it was set back to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolledBack {
    /// Of the QEMU process that was set back.
    pub instance: String,
    /// The checkpoint that it was set back to.
    pub to: CheckpointId,
    /// The newest in the store then: of those that this instance took, only newer ones descend from
    /// `to`.
    pub newest: CheckpointId,
}

impl RuntimeDir {
    /// The rollback of this instance that has begun and is not complete.
    ///
    /// # Errors
    /// If there is a record that cannot be read: then one may be under way.
    pub fn rollback(&self, instance: &str) -> Result<Option<RollbackUnderWay>, VmError> {
        if !self.path().join(UNDER_WAY).exists() {
            return Ok(None);
        }
        let text = self.read(UNDER_WAY, MAX_MARKS_BYTES)?;
        let about = || format!("{} is damaged", self.path().join(UNDER_WAY).display());
        let record: RollbackUnderWay = serde_json::from_slice(&text).with_context(about)?;
        Ok(Some(record).filter(|record| record.instance == instance))
    }

    /// Writes down that a rollback begins to write to the VM.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn begin_rollback(&self, record: &RollbackUnderWay) -> Result<(), VmError> {
        let text = serde_json::to_vec(record).context("encoding the record of a rollback")?;
        self.replace(UNDER_WAY, &text)
    }

    /// The rollback is complete, or has not begun after all.
    ///
    /// # Errors
    /// If the record cannot be removed.
    pub fn end_rollback(&self) -> Result<(), VmError> {
        self.forget(UNDER_WAY)
    }

    /// Where this instance was set back to the last time.
    pub fn rolled_back(&self, instance: &str) -> Option<RolledBack> {
        let text = self.read(DONE, MAX_MARKS_BYTES).ok()?;
        let record: RolledBack = serde_json::from_slice(&text).ok()?;
        Some(record).filter(|record| record.instance == instance)
    }

    /// Writes down where the VM was set back to.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn set_rolled_back(&self, record: &RolledBack) -> Result<(), VmError> {
        let text = serde_json::to_vec(record).context("encoding where the VM was set back to")?;
        self.replace(DONE, &text)
    }

    pub(super) fn forget_rollbacks(&self) -> Result<(), VmError> {
        self.forget(UNDER_WAY)?;
        self.forget(DONE)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn rollback_records_are_of_one_instance() {
        let place = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::new(Some(place.path()), &"m".parse().unwrap()).unwrap();
        runtime.create().unwrap();
        assert_eq!(runtime.rollback("a").unwrap(), None);
        let record =
            RollbackUnderWay { instance: "a".into(), to: CheckpointId(3), since: String::new() };
        runtime.begin_rollback(&record).unwrap();
        assert_eq!(runtime.rollback("a").unwrap(), Some(record));
        assert_eq!(runtime.rollback("b").unwrap(), None);
        runtime.replace(UNDER_WAY, b"{").unwrap();
        assert!(runtime.rollback("a").is_err(), "one that cannot be read may be under way");
        runtime.end_rollback().unwrap();
        assert_eq!(runtime.rollback("a").unwrap(), None);

        let (to, newest) = (CheckpointId(3), CheckpointId(5));
        let back = RolledBack { instance: "a".into(), to, newest };
        runtime.set_rolled_back(&back).unwrap();
        assert_eq!(runtime.rolled_back("a"), Some(back));
        assert_eq!(runtime.rolled_back("b"), None);
    }
}
