//! Notes of proofs: that a checkpoint was restored and compared. For people; nothing depends on
//! them, and a reader that does not know them misses nothing.

use bytes::Bytes;
use checkpoint_format::{CheckpointId, Checksum, VmName};

use super::Repository;
use super::layout;
use super::retry::retrying;
use crate::error::{Result, StoreError};
use crate::store::PutOptions;

/// The longest note that is written or read.
const MAX_PROOF_LEN: u64 = 64 << 10;
/// The most notes of one checkpoint that are read.
const MAX_PROOFS: usize = 64;

impl Repository {
    /// Notes a proof under `key`, which tells proofs of one checkpoint apart. Written once: a note
    /// that is there under this key stays, and `false` is returned.
    ///
    /// # Errors
    /// When the note is too long, or cannot be stored.
    pub async fn note_proof(
        &self,
        vm: &VmName,
        id: CheckpointId,
        key: &Checksum,
        note: Bytes,
    ) -> Result<bool> {
        let path = layout::proof(vm, id, key);
        let len = note.len() as u64;
        if len > MAX_PROOF_LEN {
            let what = "the length of a proof's note";
            return Err(StoreError::Limit {
                path: path.to_string(),
                what,
                actual: len,
                limit: MAX_PROOF_LEN,
            });
        }
        self.store.create_dir_all(&layout::proofs(vm)).await?;
        match self.store.put(&path, vec![note], PutOptions::default()).await {
            Ok(_) => Ok(true),
            Err(StoreError::AlreadyExists { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The notes of a checkpoint's proofs, none if there are none; unread ones are left out.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn proofs(&self, vm: &VmName, id: CheckpointId) -> Result<Vec<Bytes>> {
        let folder = layout::proofs(vm);
        let entries = match retrying(|| self.store.list(&folder)).await {
            Ok(entries) => entries,
            Err(error) if error.is_not_found() => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut notes = Vec::new();
        let ours = entries
            .iter()
            .filter(|entry| !entry.is_dir && layout::proof_of(&entry.name) == Some(id));
        for entry in ours.take(MAX_PROOFS) {
            let path = folder.join(&entry.name)?;
            if let Ok(note) = retrying(|| self.store.read(&path, MAX_PROOF_LEN)).await {
                notes.push(note);
            }
        }
        Ok(notes)
    }
}
