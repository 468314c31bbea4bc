//! A checkpoint that does not exist yet, and the commit that makes it exist.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use checkpoint_format::{CheckpointId, CheckpointRef, DurableReceipt, Epoch, PackName};
use tracing::{debug, warn};

use super::durable::Durable;
use super::layout::{self, PartialName};
use super::reading::MAX_MANIFEST_LEN;
use super::retry::{Naming, StoredPack, retrying, store_file};
use super::writer::Writer;
use crate::error::{Result, StoreError};
use crate::path::StorePath;
use crate::store::Entry;

/// Tries of the committing rename while its answers are lost.
const MAX_RENAME_TRIES: u32 = 3;

/// A checkpoint under way. Readers don't see it. Dropping it leaves a partial directory that the
/// next [`Writer::begin`] removes; [`abort`](Self::abort) removes it now.
#[derive(Debug)]
pub struct PartialCheckpoint {
    writer: Writer,
    name: PartialName,
    leftover: Leftover,
    dir: StorePath,
    tally: Mutex<Tally>,
}

/// A partial checkpoint that failed and whose packs may serve the writer's next one:
/// [`Writer::resume`]. Dropping it leaves a directory that the next [`Writer::begin`] removes,
/// [`remove`](Self::remove) removes it now.
#[derive(Debug)]
pub struct KeptPartial {
    leftover: Leftover,
    tally: Tally,
}

impl KeptPartial {
    /// The writer that made it.
    pub(super) fn epoch(&self) -> Epoch {
        self.leftover.name.epoch
    }

    pub(super) fn dir(&self) -> StorePath {
        layout::partial_checkpoint(&self.leftover.writer.vm, &self.leftover.name)
    }

    /// Removes what was kept.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn remove(self) -> Result<()> {
        let dir = self.dir();
        retrying(|| self.leftover.writer.repository.store.remove(&dir)).await
    }
}

/// A partial directory of this process. Once dropped, the writer's next [`Writer::begin`] removes
/// it.
#[derive(Debug)]
struct Leftover {
    writer: Writer,
    name: PartialName,
}

impl Drop for Leftover {
    fn drop(&mut self) {
        self.writer.forget(&self.name);
    }
}

/// The manifest that a partial checkpoint's directory holds.
#[derive(Debug)]
pub struct Sealed(Bytes);

/// What the files of the checkpoint were stored with.
#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    least_replicas: Option<u16>,
    short: usize,
}

impl Tally {
    fn add(&mut self, pack: &StoredPack) {
        self.least_replicas = match (self.least_replicas, pack.replicas) {
            (Some(least), Some(replicas)) => Some(least.min(replicas)),
            (least, replicas) => least.or(replicas),
        };
        self.short += usize::from(pack.is_short());
    }
}

impl PartialCheckpoint {
    pub(super) fn new(writer: Writer, name: PartialName) -> Self {
        let dir = layout::partial_checkpoint(&writer.vm, &name);
        let leftover = Leftover { writer: writer.clone(), name };
        PartialCheckpoint { writer, name, leftover, dir, tally: Mutex::default() }
    }

    /// The next try, under a name of its own, with the files of an earlier one.
    pub(super) fn after(kept: &KeptPartial, writer: Writer, name: PartialName) -> Self {
        Self { tally: Mutex::new(kept.tally), ..Self::new(writer, name) }
    }

    /// The ID that the checkpoint will have.
    pub fn id(&self) -> CheckpointId {
        self.name.id
    }

    /// The epoch of its writer.
    pub fn epoch(&self) -> Epoch {
        self.name.epoch
    }

    pub(super) fn dir(&self) -> &StorePath {
        &self.dir
    }

    /// Stores one pack, as often and in as many copies as the retry policy says. `stem` becomes the
    /// file name, with a suffix; the name that counts is in the result. Several packs may be on
    /// their way at once.
    ///
    /// # Errors
    /// When a newer writer has fenced this one, or the pack cannot be stored after all retries.
    pub async fn put_pack(&self, stem: &str, data: Vec<Bytes>) -> Result<StoredPack> {
        let pack = self.store_file(Naming::Stem(stem), data).await?;
        debug!(dir = %self.dir, name = %pack.name, len = pack.len, attempts = pack.attempts, "pack stored");
        Ok(pack)
    }

    async fn store_file(&self, naming: Naming<'_>, data: Vec<Bytes>) -> Result<StoredPack> {
        let repository = &self.writer.repository;
        let stored = store_file(&repository.store, &repository.retry, &self.dir, naming, data);
        match stored.await {
            Ok(pack) => {
                self.tally().add(&pack);
                Ok(pack)
            }
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// Exactly `len` bytes of a pack of this checkpoint.
    ///
    /// # Errors
    /// When the pack does not have them, or the store fails.
    pub async fn read_pack_range(&self, name: &PackName, offset: u64, len: u64) -> Result<Bytes> {
        let path = self.dir.join(name.as_str())?;
        retrying(|| self.writer.repository.store.read_range(&path, offset, len)).await
    }

    /// What is stored: names and lengths.
    ///
    /// # Errors
    /// When a newer writer has fenced this one, or the store fails.
    pub async fn files(&self) -> Result<Vec<Entry>> {
        match retrying(|| self.writer.repository.store.list(&self.dir)).await {
            Ok(files) => Ok(files),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// Removes a file that is not to be in the checkpoint.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn remove_file(&self, name: &str) -> Result<()> {
        let path = self.dir.join(name)?;
        retrying(|| self.writer.repository.store.remove(&path)).await
    }

    /// Gives up, but keeps what was stored for the writer's next checkpoint.
    pub fn keep(self) -> KeptPartial {
        let tally = *self.tally();
        KeptPartial { leftover: self.leftover, tally }
    }

    /// [`seal`](Self::seal), then [`publish`](Self::publish).
    ///
    /// # Errors
    /// Those of the two.
    pub async fn commit(self, manifest: Bytes) -> Result<Durable> {
        let sealed = self.seal(manifest).await?;
        self.publish(sealed).await
    }

    /// Stores the manifest, which makes nothing exist yet.
    ///
    /// # Errors
    /// When a newer writer has fenced this one, or the store fails.
    pub async fn seal(&self, manifest: Bytes) -> Result<Sealed> {
        if manifest.len() as u64 > MAX_MANIFEST_LEN {
            return Err(StoreError::Limit {
                path: self.dir.to_string(),
                what: "the manifest's length",
                actual: manifest.len() as u64,
                limit: MAX_MANIFEST_LEN,
            });
        }
        self.writer.check().await?;
        self.store_file(Naming::Fixed(layout::MANIFEST), vec![manifest.clone()]).await?;
        Ok(Sealed(manifest))
    }

    /// Makes the checkpoint exist: renames the directory. On an error the checkpoint does not exist
    /// and never will, except [`StoreError::CommitUnknown`], where that can't be known.
    ///
    /// The manifest must not be the same bytes as another writer's for the same number (its epoch
    /// sees to that): when the store's answer is lost, what is found under the checkpoint's name is
    /// compared with it.
    ///
    /// # Errors
    /// When a newer writer has fenced this one, or the store fails. There is no checkpoint then,
    /// unless the error says that the outcome is unknown.
    #[expect(clippy::disallowed_methods, reason = "this is the commit")]
    pub async fn publish(self, Sealed(manifest): Sealed) -> Result<Durable> {
        self.rename(&manifest).await?;
        let tally = *self.tally();
        let checkpoint = CheckpointRef { vm: self.writer.vm.clone(), id: self.name.id };
        let receipt = DurableReceipt::of_commit(checkpoint);
        Ok(Durable::new(receipt, self.name.epoch, tally.least_replicas, tally.short))
    }

    async fn rename(&self, manifest: &Bytes) -> Result<()> {
        let store = &self.writer.repository.store;
        let target = layout::checkpoint(&self.writer.vm, self.name.id);
        let mut tries = 0;
        loop {
            tries += 1;
            let Err(error) = store.rename_dir(&self.dir, &target).await else {
                return Ok(());
            };
            warn!(dir = %self.dir, %error, "the committing rename failed");
            if let Ok(true) = self.is_committed(manifest).await {
                return Ok(());
            }
            let hung = matches!(error, StoreError::Timeout { .. });
            if hung || !error.is_retryable() || tries >= MAX_RENAME_TRIES {
                return self.acknowledge(manifest, error).await;
            }
        }
    }

    /// Makes the outcome of a failed rename final: once its source is gone, a rename still on its
    /// way can't happen.
    async fn acknowledge(&self, manifest: &Bytes, error: StoreError) -> Result<()> {
        let store = &self.writer.repository.store;
        let removed = retrying(|| store.remove(&self.dir)).await;
        let committed = self.is_committed(manifest).await;
        match (committed, removed) {
            (Ok(true), _) => Ok(()),
            (Ok(false), Ok(())) => Err(self.explain(withdrawn(error)).await),
            (Ok(false), Err(_)) | (Err(_), _) if !error.is_ambiguous() => Err(error),
            (Ok(false), Err(reason)) | (Err(reason), _) => Err(StoreError::CommitUnknown {
                vm: self.writer.vm.clone(),
                id: self.name.id,
                reason: format!("{error}; then {reason}"),
            }),
        }
    }

    /// Whether the checkpoint under our number is ours.
    async fn is_committed(&self, manifest: &Bytes) -> Result<bool> {
        let found = self.writer.repository.read_manifest(&self.writer.vm, self.name.id).await;
        match found {
            // It is what stands in front of the index: the rest is named there by its checksums.
            Ok(found) => Ok(!found.is_empty() && manifest.starts_with(&found)),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Gives up: removes all that was stored.
    ///
    /// # Errors
    /// When the partial checkpoint cannot be removed; the next claim of the VM removes it.
    pub async fn abort(self) -> Result<()> {
        retrying(|| self.writer.repository.store.remove(&self.dir)).await
    }

    /// A missing directory means, most likely, that another writer removed it.
    async fn explain(&self, error: StoreError) -> StoreError {
        match error {
            StoreError::NotFound { .. } => self.writer.check().await.err().unwrap_or(error),
            _ => error,
        }
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The error of a rename that is known not to have happened, whatever its own error had to leave
/// open.
fn withdrawn(error: StoreError) -> StoreError {
    match error {
        StoreError::Timeout { op, path, after } => StoreError::Unavailable {
            op,
            path,
            reason: format!("no answer for {after:?}; the commit was withdrawn"),
        },
        StoreError::Uncertain { op, path, reason } => StoreError::Unavailable {
            op,
            path,
            reason: format!("{reason}; the commit was withdrawn"),
        },
        other => other,
    }
}
