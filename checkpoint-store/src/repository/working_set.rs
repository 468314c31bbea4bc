//! What a VM's guest needed first after its latest restore. A hint for the next restore; nothing
//! depends on it, and a reader that does not know it misses nothing but time.

use checkpoint_format::{MAX_WORKING_SET_LEN, VmName, WorkingSet};

use super::Repository;
use super::layout;
use crate::error::{Result, StoreError};
use crate::store::PutOptions;

impl Repository {
    /// The working set of a VM; none if there is none.
    ///
    /// # Errors
    /// When the store cannot be read, or what it has is damaged.
    pub async fn working_set(&self, vm: &VmName) -> Result<Option<WorkingSet>> {
        let path = layout::working_set(vm);
        let bytes = match self.store.read(&path, MAX_WORKING_SET_LEN as u64).await {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        WorkingSet::parse(&bytes).map(Some).map_err(|error| StoreError::Corrupt {
            path: path.to_string(),
            reason: error.to_string(),
        })
    }

    /// Writes the working set of a VM in the place of the one that is there. Between the two steps
    /// there is none; of two writers at once one wins.
    ///
    /// # Errors
    /// When it is too large, or the store cannot be written.
    pub async fn replace_working_set(&self, vm: &VmName, set: &WorkingSet) -> Result<()> {
        let path = layout::working_set(vm);
        let bytes = set.encode().map_err(|error| StoreError::Corrupt {
            path: path.to_string(),
            reason: error.to_string(),
        })?;
        self.store.remove(&path).await?;
        match self.store.put(&path, vec![bytes.into()], PutOptions::default()).await {
            Ok(_) | Err(StoreError::AlreadyExists { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
