//! Which checkpoints are in use: a VM whose memory is still arriving depends on them.
//!
//! A reader is a file that names a checkpoint and protects it, and all earlier ones of the same VM,
//! on which it may build. Files are never changed, so a reader is renewed by a new file with the
//! next number, after which the older one is removed. One that was not renewed for long has
//! expired: its host was lost.
//!
//! How old a file is only the store's own clock says, which gives both its time and, by a file that
//! is made for that, the time now. The clocks of hosts do not matter. The store's must not jump
//! forward by the time after which readers expire, less that between two renewals.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use bytes::Bytes;
use checkpoint_format::{CheckpointId, Checksum, VmName};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::Repository;
use super::layout::{self, ReaderName};
use super::retry::retrying;
use crate::error::{Op, Result, StoreError};
use crate::nonce::nonce;
use crate::path::StorePath;
use crate::store::PutOptions;

const MAX_READER_LEN: u64 = 64 << 10;
/// Numbers that are tried for one file: those before may be of calls whose answers were lost.
const MAX_NUMBERS: u32 = 8;
/// A reader is renewed twice an hour.
const MAX_LOOKS: u32 = 8;

/// Who reads, as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReaderRecord {
    /// The host's name.
    pub host: String,
    /// The VM that runs there; a copy has another name than the VM whose checkpoint it is.
    pub vm: VmName,
    /// Its running instance: a helper that restarts beside the same QEMU process is the same
    /// reader.
    pub instance: String,
    /// The Stillpoint version.
    #[serde(default)]
    pub version: String,
}

/// A reader, as found in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReaderInfo {
    /// The checkpoint that it reads.
    pub checkpoint: CheckpointId,
    /// `None` if the record cannot be read as one.
    pub record: Option<ReaderRecord>,
}

/// A checkpoint in use. Dropped without [`Reader::release`] it stays in use until it expires.
#[derive(Debug)]
pub struct Reader {
    repository: Repository,
    vm: VmName,
    id: CheckpointId,
    key: Checksum,
    text: Bytes,
    next: AtomicU64,
}

impl Repository {
    /// Notes that a checkpoint is in use. A reader of the same instance that is noted already is
    /// replaced.
    ///
    /// # Errors
    /// `NotFound` if the checkpoint is not there (any more); or when the store cannot be written.
    ///
    /// # Panics
    /// Never: strings are always JSON.
    pub async fn begin_reading(
        &self,
        vm: &VmName,
        id: CheckpointId,
        record: &ReaderRecord,
    ) -> Result<Reader> {
        let checkpoint = layout::checkpoint(vm, id);
        let lost = || StoreError::not_found(Op::Stat, &checkpoint);
        if !self.has_checkpoint(vm, id).await? {
            return Err(lost());
        }
        self.store.create_dir_all(&layout::readers(vm)).await?;
        let text = serde_json::to_vec_pretty(record).expect("strings are always JSON");
        let reader = Reader {
            repository: self.clone(),
            vm: vm.clone(),
            id,
            key: Checksum::of(record.instance.as_bytes()),
            text: text.into(),
            next: AtomicU64::new(1),
        };
        let newest = reader.own().await?.into_iter().map(|name| name.number).max();
        reader.next.store(newest.unwrap_or(0).saturating_add(1), Ordering::Relaxed);
        reader.renew().await?;
        // Who removes a checkpoint takes its name away before the last look at the readers: so one
        // of the two sees the other.
        if self.has_checkpoint(vm, id).await? {
            info!(%vm, %id, "the checkpoint is noted as in use");
            return Ok(reader);
        }
        reader.release().await?;
        Err(lost())
    }

    /// The readers of a VM's checkpoints that have not expired.
    ///
    /// # Errors
    /// When the store cannot be read, or written: it is asked for its time.
    pub async fn readers(&self, vm: &VmName) -> Result<Vec<ReaderInfo>> {
        for _ in 0..MAX_LOOKS {
            if let Some(found) = self.look_at_readers(vm).await? {
                return Ok(found);
            }
        }
        let dir = layout::readers(vm);
        Err(StoreError::unavailable(Op::List, &dir, "readers come and go, again and again"))
    }

    /// `None`: one was released, or renewed by another file, after they were listed.
    async fn look_at_readers(&self, vm: &VmName) -> Result<Option<Vec<ReaderInfo>>> {
        let names = reader_names(self, vm).await?;
        let mut found = Vec::new();
        if names.is_empty() {
            return Ok(Some(found));
        }
        let now = self.store_time(&layout::readers(vm)).await?;
        for name in names {
            let path = layout::reader(vm, &name);
            let Some(stat) = retrying(|| self.store.stat(&path)).await? else { return Ok(None) };
            let age = now.duration_since(stat.modified).unwrap_or_default();
            if age < self.readers_expire_after {
                found.push(ReaderInfo { checkpoint: name.id, record: self.record(&path).await? });
            }
        }
        Ok(Some(found))
    }

    /// Whether a checkpoint may be removed: the question of all that remove one.
    ///
    /// # Errors
    /// `InUse` while a reader of it, or of a later one, has not expired; or when the store cannot
    /// be read or written.
    pub async fn check_unused(&self, vm: &VmName, id: CheckpointId) -> Result<()> {
        let readers = self.readers(vm).await?;
        let Some(reader) = readers.into_iter().find(|reader| reader.checkpoint >= id) else {
            return Ok(());
        };
        let of = reader.record.map_or_else(
            || "a reader whose record cannot be read".to_owned(),
            |record| format!("{} on {}", record.vm, record.host),
        );
        let reader = format!("{of}, which reads {vm}@{}", reader.checkpoint);
        Err(StoreError::InUse { vm: vm.clone(), id, reader })
    }

    async fn record(&self, path: &StorePath) -> Result<Option<ReaderRecord>> {
        match retrying(|| self.store.read(path, MAX_READER_LEN)).await {
            Ok(text) => Ok(serde_json::from_slice(&text).ok()),
            Err(StoreError::NotFound { .. } | StoreError::Limit { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The time now by the store's clock, from a file in this directory.
    async fn store_time(&self, dir: &StorePath) -> Result<SystemTime> {
        let probe = dir.join(&format!("now.{}", nonce()))?;
        self.store.put(&probe, vec![Bytes::from_static(b"now")], PutOptions::default()).await?;
        let stat = retrying(|| self.store.stat(&probe)).await;
        if let Err(error) = retrying(|| self.store.remove(&probe)).await {
            warn!(path = %probe, %error, "the file that the store's time was read from stays");
        }
        stat?.map(|stat| stat.modified).ok_or_else(|| StoreError::not_found(Op::Stat, &probe))
    }
}

async fn reader_names(repository: &Repository, vm: &VmName) -> Result<Vec<ReaderName>> {
    let dir = layout::readers(vm);
    match retrying(|| repository.store.list(&dir)).await {
        Ok(entries) => {
            Ok(entries.iter().filter_map(|entry| ReaderName::parse(&entry.name)).collect())
        }
        Err(error) if error.is_not_found() => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

impl Reader {
    /// Says that the checkpoint is still in use.
    ///
    /// # Errors
    /// When the store cannot be written; what was noted before stays.
    pub async fn renew(&self) -> Result<()> {
        let number = self.put().await?;
        self.remove(|name| name.number < number).await
    }

    /// The checkpoint is not needed any more.
    ///
    /// # Errors
    /// When the store cannot be written: it stays in use until it expires.
    pub async fn release(&self) -> Result<()> {
        self.remove(|_| true).await
    }

    async fn put(&self) -> Result<u64> {
        let store = &self.repository.store;
        let mut tries = 0;
        loop {
            tries += 1;
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let name = ReaderName { id: self.id, key: self.key, number };
            let path = layout::reader(&self.vm, &name);
            let options = PutOptions::default();
            match store.put(&path, vec![self.text.clone()], options).await {
                Ok(_) => return Ok(number),
                Err(error)
                    if tries < MAX_NUMBERS
                        && (error.is_already_exists() || error.is_retryable()) => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn own(&self) -> Result<Vec<ReaderName>> {
        let names = reader_names(&self.repository, &self.vm).await?;
        Ok(names.into_iter().filter(|name| name.key == self.key).collect())
    }

    async fn remove(&self, which: impl Fn(&ReaderName) -> bool) -> Result<()> {
        for name in self.own().await?.into_iter().filter(which) {
            let path = layout::reader(&self.vm, &name);
            retrying(|| self.repository.store.remove(&path)).await?;
        }
        Ok(())
    }
}
