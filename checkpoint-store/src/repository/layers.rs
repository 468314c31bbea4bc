//! Layers: immutable disk images, stored once for all machines under the digest of their content.
//!
//! Nobody owns a layer. Machines may store the same one at the same time, each in a partial directory of its own; the
//! first rename wins and the others find that what they wanted is there.

use bytes::Bytes;
use checkpoint_format::{ContentDigest, PackName};

use super::Repository;
use super::layout;
use super::retry::{Naming, StoredPack, steady, store_file};
use crate::error::{Result, StoreError};
use crate::nonce::nonce;
use crate::path::StorePath;

/// Tries of the committing rename while its answers are lost.
const MAX_RENAME_TRIES: u32 = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerOutcome {
    Stored,
    /// Another machine stored the same content first.
    AlreadyThere,
}

impl Repository {
    /// The committed layers.
    pub async fn layers(&self) -> Result<Vec<ContentDigest>> {
        let names = self.names(&layout::layers()).await?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    pub async fn has_layer(&self, digest: &ContentDigest) -> Result<bool> {
        let path = layout::layer(digest);
        Ok(steady(|| self.store.stat(&path)).await?.is_some())
    }

    pub async fn begin_layer(&self, digest: &ContentDigest) -> Result<PartialLayer> {
        self.store.create_dir_all(&layout::layers()).await?;
        let dir = layout::partial_layer(digest, &nonce());
        self.store.create_dir(&dir).await?;
        Ok(PartialLayer { repository: self.clone(), digest: *digest, dir })
    }

    /// A whole file of a layer, if it is not longer than `limit` bytes.
    pub async fn read_layer_file(&self, digest: &ContentDigest, name: &str, limit: u64) -> Result<Bytes> {
        let path = layout::layer(digest).join(name)?;
        steady(|| self.store.read(&path, limit)).await
    }

    /// Exactly `len` bytes of a layer's file.
    pub async fn read_layer_range(&self, digest: &ContentDigest, name: &str, offset: u64, len: u64) -> Result<Bytes> {
        let path = layout::layer(digest).join(name)?;
        steady(|| self.store.read_range(&path, offset, len)).await
    }

    pub async fn layer_file_len(&self, digest: &ContentDigest, name: &str) -> Result<u64> {
        self.file_len(&layout::layer(digest).join(name)?).await
    }

    /// Removes a layer. Whether checkpoints or other layers refer to it is the caller's to know.
    pub async fn remove_layer(&self, digest: &ContentDigest) -> Result<()> {
        let path = layout::layer(digest);
        steady(|| self.store.remove(&path)).await
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
    pub fn digest(&self) -> &ContentDigest {
        &self.digest
    }

    /// Stores one pack; see [`super::PartialCheckpoint::put_pack`].
    pub async fn put_pack(&self, stem: &str, data: Vec<Bytes>) -> Result<StoredPack> {
        self.store_file(Naming::Stem(stem), data).await
    }

    /// Stores one file under exactly this name.
    pub async fn put_file(&self, name: &PackName, data: Vec<Bytes>) -> Result<StoredPack> {
        self.store_file(Naming::Fixed(name.as_str()), data).await
    }

    async fn store_file(&self, naming: Naming<'_>, data: Vec<Bytes>) -> Result<StoredPack> {
        let repository = &self.repository;
        store_file(&repository.store, &repository.retry, &self.dir, naming, data).await
    }

    /// Makes the layer exist, or finds that it does.
    pub async fn commit(self) -> Result<LayerOutcome> {
        let store = &self.repository.store;
        let target = layout::layer(&self.digest);
        let mut tries = 0;
        let outcome = loop {
            tries += 1;
            let error = match store.rename_dir(&self.dir, &target).await {
                Ok(()) => return Ok(LayerOutcome::Stored),
                Err(error) if error.is_already_exists() => break Ok(LayerOutcome::AlreadyThere),
                Err(error) => error,
            };
            match self.look().await {
                Ok(Some(outcome)) => break Ok(outcome),
                Ok(None) if error.is_retryable() && tries < MAX_RENAME_TRIES => {}
                _ => break Err(error),
            }
        };
        let removed = steady(|| store.remove(&self.dir)).await;
        outcome.and_then(|outcome| match outcome {
            LayerOutcome::Stored => Ok(outcome),
            LayerOutcome::AlreadyThere => removed.map(|()| outcome),
        })
    }

    /// After a lost answer: if the layer is there, all is well whoever put it there.
    async fn look(&self) -> Result<Option<LayerOutcome>> {
        if !self.repository.has_layer(&self.digest).await? {
            return Ok(None);
        }
        let ours_left = steady(|| self.repository.store.stat(&self.dir)).await?.is_some();
        Ok(Some(if ours_left { LayerOutcome::AlreadyThere } else { LayerOutcome::Stored }))
    }

    /// Gives up: removes all that was stored.
    pub async fn abort(self) -> std::result::Result<(), StoreError> {
        steady(|| self.repository.store.remove(&self.dir)).await
    }
}
