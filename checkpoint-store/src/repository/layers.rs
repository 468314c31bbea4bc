//! Layers: immutable disk images, stored once for all VMs under the digest of their content.
//!
//! No VM owns a layer. VMs may store the same one at the same time, each in a partial directory of
//! its own; the first rename wins and the others find the layer there.
//!
//! An interrupted upload leaves its partial directory. The next upload, of any layer, removes the
//! partial directories that no process can need: those of layers that are there, and those where
//! nothing was stored for a day by the store's own clock (the new upload's directory shows the
//! time). An upload that still runs but was considered dead finds its directory gone and fails;
//! the next checkpoint begins it again.

use std::collections::HashSet;
use std::time::SystemTime;

use bytes::Bytes;
use checkpoint_format::{ContentDigest, PackName};
use tracing::warn;

use super::Repository;
use super::layout;
use super::retry::{Naming, StoredPack, retrying, store_file};
use crate::error::{Op, Result, StoreError};
use crate::nonce::nonce;
use crate::path::StorePath;

/// Tries of the committing rename while its answers are lost.
const MAX_RENAME_TRIES: u32 = 5;

/// How the commit of a layer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerOutcome {
    /// The layer was committed.
    Stored,
    /// Another VM stored the same content first.
    AlreadyThere,
}

impl Repository {
    /// The committed layers.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn layers(&self) -> Result<Vec<ContentDigest>> {
        let names = self.names(&layout::layers()).await?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Whether the layer is committed.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn has_layer(&self, digest: &ContentDigest) -> Result<bool> {
        let path = layout::layer(digest);
        Ok(retrying(|| self.store.stat(&path)).await?.is_some())
    }

    /// Begins the upload of a layer, in a directory of its own. Removes abandoned uploads.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub async fn begin_layer(&self, digest: &ContentDigest) -> Result<PartialLayer> {
        self.store.create_dir_all(&layout::layers()).await?;
        let dir = layout::partial_layer(digest, &nonce());
        self.store.create_dir(&dir).await?;
        self.sweep_partial_layers(&dir).await;
        Ok(PartialLayer { repository: self.clone(), digest: *digest, dir })
    }

    /// Removes uploads that no process continues. `ours` was made just now. What fails is left to
    /// the next upload.
    async fn sweep_partial_layers(&self, ours: &StorePath) {
        if let Err(error) = self.try_sweep(ours).await {
            warn!(%error, "abandoned uploads of layers were not removed");
        }
    }

    async fn try_sweep(&self, ours: &StorePath) -> Result<()> {
        let Some(now) = retrying(|| self.store.stat(ours)).await?.map(|stat| stat.modified) else {
            return Ok(());
        };
        let names = self.names(&layout::layers()).await?;
        let committed: HashSet<ContentDigest> =
            names.iter().filter_map(|name| name.parse().ok()).collect();
        for name in names.iter().filter(|name| *name != ours.name()) {
            let Some(digest) = layout::parse_partial_layer(name) else { continue };
            let path = layout::layers().join(name)?;
            if committed.contains(&digest) || self.is_abandoned(&path, now).await? {
                warn!(%path, "removing an abandoned upload of a layer");
                retrying(|| self.store.remove(&path)).await?;
            }
        }
        Ok(())
    }

    /// A missing directory counts as not abandoned: another process has just committed or removed
    /// it.
    async fn is_abandoned(&self, path: &StorePath, now: SystemTime) -> Result<bool> {
        let stat = retrying(|| self.store.stat(path)).await?;
        Ok(stat.is_some_and(|stat| {
            now.duration_since(stat.modified).is_ok_and(|age| age >= self.abandoned_after)
        }))
    }

    /// The layer exists: what others have stored of it so far is of no use.
    async fn sweep_uploads_of(&self, digest: &ContentDigest) {
        let Ok(names) = self.names(&layout::layers()).await else { return };
        for name in names.iter().filter(|name| layout::parse_partial_layer(name) == Some(*digest)) {
            if let Ok(path) = layout::layers().join(name) {
                // The next upload tries again.
                let _ = self.store.remove(&path).await;
            }
        }
    }

    /// A whole file of a layer, if it is not longer than `limit` bytes.
    ///
    /// # Errors
    /// When the file is missing, longer than `limit`, or cannot be read.
    pub async fn read_layer_file(
        &self,
        digest: &ContentDigest,
        name: &str,
        limit: u64,
    ) -> Result<Bytes> {
        let path = layout::layer(digest).join(name)?;
        retrying(|| self.store.read(&path, limit)).await
    }

    /// Exactly `len` bytes of a layer's file.
    ///
    /// # Errors
    /// When the range is not in the file, or cannot be read.
    pub async fn read_layer_range(
        &self,
        digest: &ContentDigest,
        name: &str,
        offset: u64,
        len: u64,
    ) -> Result<Bytes> {
        let path = layout::layer(digest).join(name)?;
        retrying(|| self.store.read_range(&path, offset, len)).await
    }

    /// The length of a file of a layer in bytes.
    ///
    /// # Errors
    /// When the file is missing, or the store cannot be read.
    pub async fn layer_file_len(&self, digest: &ContentDigest, name: &str) -> Result<u64> {
        self.file_len(&layout::layer(digest).join(name)?).await
    }

    /// Removes a layer. Whether checkpoints or other layers refer to it is the caller's to know.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub async fn remove_layer(&self, digest: &ContentDigest) -> Result<()> {
        let path = layout::layer(digest);
        retrying(|| self.store.remove(&path)).await
    }
}

/// A layer on its way into the store.
#[derive(Debug)]
pub struct PartialLayer {
    repository: Repository,
    digest: ContentDigest,
    dir: StorePath,
}

impl PartialLayer {
    /// The digest of the layer's content.
    pub fn digest(&self) -> &ContentDigest {
        &self.digest
    }

    /// Stores one pack; see [`super::PartialCheckpoint::put_pack`].
    ///
    /// # Errors
    /// When the file cannot be stored after all retries.
    pub async fn put_pack(&self, stem: &str, data: Vec<Bytes>) -> Result<StoredPack> {
        self.store_file(Naming::Stem(stem), data).await
    }

    /// Stores one file under exactly this name.
    ///
    /// # Errors
    /// When the file cannot be stored after all retries.
    pub async fn put_file(&self, name: &PackName, data: Vec<Bytes>) -> Result<StoredPack> {
        self.store_file(Naming::Fixed(name.as_str()), data).await
    }

    /// `AlreadyExists` of the layer when another process stored it meanwhile and removed what is
    /// here.
    async fn store_file(&self, naming: Naming<'_>, data: Vec<Bytes>) -> Result<StoredPack> {
        let repository = &self.repository;
        let stored =
            store_file(&repository.store, &repository.retry, &self.dir, naming, data).await;
        match stored {
            Err(error) if error.is_not_found() && repository.has_layer(&self.digest).await? => {
                Err(StoreError::already_exists(Op::Put, &layout::layer(&self.digest)))
            }
            other => other,
        }
    }

    /// Makes the layer exist, or finds that it does.
    ///
    /// # Errors
    /// When the upload was removed meanwhile, or the rename fails.
    pub async fn commit(self) -> Result<LayerOutcome> {
        let store = &self.repository.store;
        let target = layout::layer(&self.digest);
        let mut tries = 0;
        let outcome = loop {
            tries += 1;
            let error = match store.rename_dir(&self.dir, &target).await {
                Ok(()) => break Ok(LayerOutcome::Stored),
                Err(error) if error.is_already_exists() => break Ok(LayerOutcome::AlreadyThere),
                Err(error) => error,
            };
            match self.look().await {
                // Not our rename, whose answer would have been lost: the process that stored the
                // layer removed what was here.
                Ok(Some(_)) if tries == 1 && error.is_not_found() => {
                    break Ok(LayerOutcome::AlreadyThere);
                }
                Ok(Some(outcome)) => break Ok(outcome),
                Ok(None) if error.is_retryable() && tries < MAX_RENAME_TRIES => {}
                _ => break Err(error),
            }
        };
        let removed = retrying(|| store.remove(&self.dir)).await;
        if outcome.is_ok() {
            self.repository.sweep_uploads_of(&self.digest).await;
        }
        outcome.and_then(|outcome| match outcome {
            LayerOutcome::Stored => Ok(outcome),
            LayerOutcome::AlreadyThere => removed.map(|()| outcome),
        })
    }

    /// After a lost answer: if the layer is there, all is well, whichever process put it there.
    async fn look(&self) -> Result<Option<LayerOutcome>> {
        if !self.repository.has_layer(&self.digest).await? {
            return Ok(None);
        }
        let ours_left = retrying(|| self.repository.store.stat(&self.dir)).await?.is_some();
        Ok(Some(if ours_left { LayerOutcome::AlreadyThere } else { LayerOutcome::Stored }))
    }

    /// Gives up: removes all that was stored.
    ///
    /// # Errors
    /// When the partial layer cannot be removed; the next upload of any layer removes it.
    pub async fn abort(self) -> std::result::Result<(), StoreError> {
        retrying(|| self.repository.store.remove(&self.dir)).await
    }
}
