//! What is committed, for a restore to read.

use std::time::SystemTime;

use bytes::Bytes;
use checkpoint_format::{CheckpointId, MAX_HEADER_LINE, MAX_SEGMENT_LEN, Manifest, VmName};

use super::Repository;
use super::layout;
use super::retry::retrying;
use crate::error::{Op, Result, StoreError};
use crate::path::StorePath;

/// The longest header line and body of a manifest.
const MAX_HEAD_LEN: u64 = (64 << 20) + 1024;
/// The longest file of a manifest, with the segment of the index behind it.
pub const MAX_MANIFEST_LEN: u64 = MAX_HEAD_LEN + MAX_SEGMENT_LEN;
/// A manifest's file up to this length is read by one call, whatever of it is wanted.
const WHOLE_LEN: u64 = 64 << 10;

impl Repository {
    /// The VMs that have checkpoints or had a writer, by name.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn vms(&self) -> Result<Vec<VmName>> {
        let names = self.names(&layout::vms()).await?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// The committed checkpoints of a VM, ascending. None if there is no such VM.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn checkpoints(&self, vm: &VmName) -> Result<Vec<CheckpointId>> {
        let names = self.names(&layout::checkpoints(vm)).await?;
        let mut found: Vec<CheckpointId> =
            names.iter().filter_map(|name| layout::number(name)).map(CheckpointId).collect();
        found.sort();
        Ok(found)
    }

    /// Whether a checkpoint is committed.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn has_checkpoint(&self, vm: &VmName, id: CheckpointId) -> Result<bool> {
        let path = layout::checkpoint(vm, id);
        Ok(retrying(|| self.store.stat(&path)).await?.is_some_and(|stat| stat.is_dir))
    }

    /// When an entry of the directory of a VM's checkpoints last came or went, by the store's
    /// clock; `None`: there is no such directory.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn checkpoints_changed(&self, vm: &VmName) -> Result<Option<SystemTime>> {
        let path = layout::checkpoints(vm);
        Ok(retrying(|| self.store.stat(&path)).await?.map(|stat| stat.modified))
    }

    /// The sealed manifest of a checkpoint: header line and body, without the segment of the index
    /// that may stand behind them.
    ///
    /// # Errors
    /// When the checkpoint is missing, its manifest is too long, or the store cannot be read.
    pub async fn read_manifest(&self, vm: &VmName, id: CheckpointId) -> Result<Bytes> {
        let path = layout::checkpoint(vm, id).join(layout::MANIFEST)?;
        match retrying(|| self.store.read(&path, WHOLE_LEN)).await {
            Ok(file) => Ok(front(file)),
            Err(StoreError::Limit { .. }) => self.read_front(&path).await,
            Err(error) => Err(error),
        }
    }

    async fn read_front(&self, path: &StorePath) -> Result<Bytes> {
        let line = MAX_HEADER_LINE as u64;
        let start = retrying(|| self.store.read_range(path, 0, line)).await?;
        match Manifest::head_len(&start) {
            Some(len) => retrying(|| self.store.read_range(path, 0, len.0)).await,
            None => retrying(|| self.store.read(path, MAX_HEAD_LEN)).await,
        }
    }

    /// The length of a manifest's file in bytes.
    ///
    /// # Errors
    /// When the checkpoint is missing, or the store cannot be read.
    pub async fn manifest_len(&self, vm: &VmName, id: CheckpointId) -> Result<u64> {
        self.file_len(&layout::checkpoint(vm, id).join(layout::MANIFEST)?).await
    }

    /// Exactly `len` bytes of a manifest's file.
    ///
    /// # Errors
    /// When the range is not in the file, or cannot be read.
    pub async fn read_manifest_range(
        &self,
        vm: &VmName,
        id: CheckpointId,
        offset: u64,
        len: u64,
    ) -> Result<Bytes> {
        let path = layout::checkpoint(vm, id).join(layout::MANIFEST)?;
        retrying(|| self.store.read_range(&path, offset, len)).await
    }

    /// Exactly `len` bytes of a pack.
    ///
    /// # Errors
    /// When the range is not in the pack, or cannot be read.
    pub async fn read_pack_range(
        &self,
        vm: &VmName,
        id: CheckpointId,
        name: &str,
        offset: u64,
        len: u64,
    ) -> Result<Bytes> {
        let path = layout::checkpoint(vm, id).join(name)?;
        retrying(|| self.store.read_range(&path, offset, len)).await
    }

    /// The length of a pack in bytes.
    ///
    /// # Errors
    /// When the pack is missing, or the store cannot be read.
    pub async fn pack_len(&self, vm: &VmName, id: CheckpointId, name: &str) -> Result<u64> {
        self.file_len(&layout::checkpoint(vm, id).join(name)?).await
    }

    pub(super) async fn file_len(&self, path: &StorePath) -> Result<u64> {
        match retrying(|| self.store.stat(path)).await? {
            Some(stat) if !stat.is_dir => Ok(stat.len),
            _ => Err(StoreError::not_found(Op::Stat, path)),
        }
    }

    /// The directories in a directory; none if it is missing.
    pub(super) async fn names(&self, path: &StorePath) -> Result<Vec<String>> {
        match retrying(|| self.store.list(path)).await {
            Ok(entries) => Ok(entries.into_iter().filter(|e| e.is_dir).map(|e| e.name).collect()),
            Err(error) if error.is_not_found() => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

/// Header line and body.
fn front(file: Bytes) -> Bytes {
    match Manifest::head_len(&file) {
        Some(len) if len.0 < file.len() as u64 => file.slice(..len.as_usize()),
        _ => file,
    }
}
