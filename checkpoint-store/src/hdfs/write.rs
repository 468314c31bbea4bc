//! Writing one file: under a hidden name, synced, closed, then renamed.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hdfs_native::file::FileWriter;
use hdfs_native::{Client, HdfsError, WriteOptions};

use super::errors::{Effect, explain};
use super::tasks::Progress;
use super::{FILE_MODE, HdfsOptions, replicas_of};
use crate::error::{Op, Result, StoreError};
use crate::path::StorePath;
use crate::store::{PutReceipt, total_len};

/// Bytes written at a time; each such write counts as progress.
const SLICE: usize = 1 << 20;
/// HDFS wants blocks of whole checksum chunks, and by default none below 1 MiB.
const BLOCK_UNIT: u64 = 1 << 20;
/// Limit of the last sync and the close, after all data was sent. If a DataNode's connection breaks
/// then, the client waits for ever for an acknowledgement; a retry must not wait the whole stall
/// limit each time.
const FINISH_LIMIT: Duration = Duration::from_secs(5);
const FINISH_PER_MIB: Duration = Duration::from_millis(100);
const MAX_RENAME_TRIES: u32 = 3;

pub(super) struct Job {
    pub client: Client,
    pub op: Op,
    pub path: StorePath,
    pub target: String,
    pub unfinished: String,
    pub data: Vec<Bytes>,
    pub replicas: Option<u16>,
    pub options: Arc<HdfsOptions>,
    pub progress: Progress,
}

impl Job {
    pub(super) async fn run(self) -> Result<PutReceipt> {
        // This only saves an upload: the rename decides.
        if self.exists(&self.target).await? {
            return Err(StoreError::already_exists(self.op, &self.path));
        }
        let write = |error| self.explain_write(error);
        let (mut writer, syncing) = self.write().await.map_err(write)?;
        let limit = FINISH_LIMIT
            + FINISH_PER_MIB * u32::try_from(total_len(&self.data) >> 20).unwrap_or(u32::MAX);
        let finish = tokio::time::timeout(limit, self.finish(&mut writer, syncing)).await;
        finish.map_err(|_| self.unfinished_after(limit))?.map_err(write)?;
        self.rename().await?;
        self.verify().await
    }

    /// A directory below the store's may have got an erasure coding policy since the store was
    /// opened: there the sync fails.
    fn explain_write(&self, error: HdfsError) -> StoreError {
        match error {
            HdfsError::OperationFailed(reason) if reason.contains("erasure") => {
                let path = self.target.rsplit_once('/').map_or("/", |(directory, _)| directory);
                StoreError::ErasureCoded { path: path.to_owned() }
            }
            error => explain(self.op, &self.path, Effect::Idempotent, error),
        }
    }

    /// Writes all data. Returns whether the last block still has to be synced.
    async fn write(&self) -> hdfs_native::Result<(FileWriter, bool)> {
        let block_size = (self.options.block_size / BLOCK_UNIT).max(1) * BLOCK_UNIT;
        let options = WriteOptions {
            block_size: Some(block_size),
            replication: self.replicas.map(u32::from),
            permission: FILE_MODE,
            overwrite: false,
            create_parent: false,
        };
        let mut writer = self.client.create(&self.unfinished, options).await?;
        self.progress.step();
        let syncing = self.options.sync;
        let mut in_block = 0;
        for slice in slices(&self.data, block_size) {
            if in_block == block_size {
                // The next slice opens a new block, and a sync reaches only the one being written.
                if syncing {
                    writer.hsync().await?;
                }
                in_block = 0;
            }
            in_block += slice.len() as u64;
            writer.write_bytes(slice).await?;
            self.progress.step();
        }
        Ok((writer, syncing && in_block > 0))
    }

    /// The outcome of this timeout is certain: without the rename the file does not exist under its
    /// name, now or later.
    fn unfinished_after(&self, limit: Duration) -> StoreError {
        let reason = format!("the DataNodes did not acknowledge all data within {limit:?}");
        StoreError::Unavailable { op: self.op, path: self.path.to_string(), reason }
    }

    async fn finish(&self, writer: &mut FileWriter, syncing: bool) -> hdfs_native::Result<()> {
        if syncing {
            writer.hsync().await?;
            self.progress.step();
        }
        writer.close().await?;
        self.progress.step();
        Ok(())
    }

    /// No other client uses the hidden name, so if it is gone and the target exists, it was this
    /// rename.
    async fn rename(&self) -> Result<()> {
        let mut tries = 0;
        loop {
            tries += 1;
            let renamed = self.client.rename(&self.unfinished, &self.target, false).await;
            self.progress.step();
            let Err(error) = renamed else { return Ok(()) };
            let error = explain(self.op, &self.path, Effect::Once, error);
            if !matches!(error, StoreError::Uncertain { .. }) || tries >= MAX_RENAME_TRIES {
                return Err(error);
            }
            let left = self.exists(&self.unfinished).await?;
            match (left, self.exists(&self.target).await?) {
                (false, true) => return Ok(()),
                (false, false) => return Err(StoreError::not_found(self.op, &self.path)),
                (true, _) => {}
            }
        }
    }

    /// Compares the length that the NameNode reports with what was written.
    async fn verify(&self) -> Result<PutReceipt> {
        let len = total_len(&self.data);
        let status = self.client.get_file_info(&self.target).await;
        let status = status.map_err(|error| explain(self.op, &self.path, Effect::Once, error))?;
        if status.length as u64 != len {
            return Err(StoreError::Corrupt {
                path: self.path.to_string(),
                reason: format!("{len} bytes were written, the NameNode counts {}", status.length),
            });
        }
        Ok(PutReceipt { len, replicas: replicas_of(&status) })
    }

    async fn exists(&self, path: &str) -> Result<bool> {
        let found = self.client.get_file_info(path).await;
        self.progress.step();
        match found {
            Ok(_) => Ok(true),
            Err(HdfsError::FileNotFound(_)) => Ok(false),
            Err(error) => Err(explain(self.op, &self.path, Effect::Once, error)),
        }
    }
}

/// The data in slices that cross no block boundary.
fn slices(data: &[Bytes], block_size: u64) -> impl Iterator<Item = Bytes> {
    let mut in_block = 0u64;
    data.iter().flat_map(move |chunk| {
        let mut parts = Vec::new();
        let mut rest = chunk.clone();
        while !rest.is_empty() {
            let room = usize::try_from(block_size - in_block).unwrap_or(usize::MAX);
            let part = rest.split_to(rest.len().min(SLICE).min(room));
            in_block = (in_block + part.len() as u64) % block_size;
            parts.push(part);
        }
        parts
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_end_at_block_boundaries() {
        let block = 3 << 19;
        let data = [vec![1u8; 100], vec![2u8; 5 << 20], Vec::new(), vec![3u8; 7]].map(Bytes::from);
        let mut at = 0u64;
        let mut joined = Vec::new();
        for slice in slices(&data, block) {
            assert!(!slice.is_empty() && slice.len() <= SLICE);
            assert_eq!(at / block, (at + slice.len() as u64 - 1) / block);
            at += slice.len() as u64;
            joined.extend_from_slice(&slice);
        }
        assert_eq!(joined, data.concat());
    }
}
