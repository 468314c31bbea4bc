//! A layer for a restored machine: the local copy when its content is the right one, else fetched into the cache.

use super::digest;
use super::read::StoredLayer;
use crate::cache;
use crate::exit::damaged;
use crate::terminal::Progress;
use anyhow::{Context, Result};
use checkpoint_format::{DigestForm, LayerRef};
use checkpoint_store::Repository;
use futures::TryStreamExt;
use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A layer ready to be used, and what it took.
pub struct Provided {
    pub path: PathBuf,
    /// Zero when a local copy served.
    pub bytes_read: u64,
}

/// Looks where the layer was on the host of the checkpoint (a relative path counts from `directory`), then in the cache.
pub async fn provide(repository: &Repository, layer: &LayerRef, directory: &Path) -> Result<Provided> {
    let cached = cache::directory().join("layers").join(layer.digest.to_string());
    for place in [directory.join(&layer.path), cached.clone()] {
        if is_copy(&place, layer) {
            return Ok(Provided { path: place.canonicalize()?, bytes_read: 0 });
        }
    }
    fetch(repository, layer, &cached).await.with_context(|| format!("fetching layer {}", layer.digest))
}

fn is_copy(path: &Path, layer: &LayerRef) -> bool {
    let same_len = std::fs::metadata(path).is_ok_and(|facts| facts.is_file() && facts.len() == layer.len.0);
    same_len && digest::of_file_as(path, layer.form).is_ok_and(|found| found.digest == layer.digest)
}

/// Written under another name and renamed when its digest is right, so a cached layer is always whole.
async fn fetch(repository: &Repository, wanted: &LayerRef, target: &Path) -> Result<Provided> {
    let layer = StoredLayer::open(repository, &wanted.digest).await?;
    if (layer.len(), layer.manifest.form) != (wanted.len, wanted.form) {
        return Err(damaged("the store's layer is of another length or version than the checkpoint says"));
    }
    let folder = target.parent().unwrap_or(target);
    std::fs::create_dir_all(folder).with_context(|| format!("making the cache {}", folder.display()))?;
    let file = tempfile::NamedTempFile::new_in(folder).context("making a file in the cache")?;
    let bytes_read = write(&layer, file.as_file()).await?;
    file.as_file().sync_all().context("syncing the cached layer")?;
    // In the other form the table's digests, which every block was compared with, make the name.
    if wanted.form == DigestForm::Content {
        let path = file.path().to_owned();
        let found = tokio::task::spawn_blocking(move || digest::of_file_as(&path, DigestForm::Content));
        let found = found.await.context("internal error: digest task panicked")??;
        if found.digest != wanted.digest {
            return Err(damaged(format!("its blocks make a file of digest {}", found.digest)));
        }
    }
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o444)).context("protecting the cached layer")?;
    file.persist(target).with_context(|| format!("naming the cached layer {}", target.display()))?;
    Ok(Provided { path: target.to_owned(), bytes_read })
}

/// Writes the blocks that are not zero; the others stay holes. Returns how many bytes that were.
async fn write(layer: &StoredLayer, file: &File) -> Result<u64> {
    file.set_len(layer.len().0).context("sizing the cached layer")?;
    let file = Arc::new(file.try_clone().context("opening the cached layer twice")?);
    let total = layer.table.stored().count() as u64 * u64::from(layer.manifest.block_size);
    let progress = Progress::bytes("layer", total);
    let mut bytes = 0;
    let mut batches = std::pin::pin!(layer.blocks());
    while let Some(blocks) = batches.try_next().await? {
        let count: usize = blocks.iter().map(|(_, content)| content.len()).sum();
        let file = Arc::clone(&file);
        let write = move || blocks.iter().try_for_each(|(offset, content)| file.write_all_at(content, *offset));
        tokio::task::spawn_blocking(write).await.context("internal error: write task panicked")?.context("writing the cached layer")?;
        bytes += count as u64;
        progress.advance(count as u64);
    }
    Ok(bytes)
}
