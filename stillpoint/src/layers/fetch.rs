//! A layer for a restored machine: the local copy when its content is the right one, else fetched into the cache.

use super::digest;
use super::read::StoredLayer;
use crate::cache;
use crate::terminal::Progress;
use anyhow::{Context, Result};
use checkpoint_format::{Block, ContentDigest, LayerRef};
use checkpoint_store::Repository;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

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
    fetch(repository, &layer.digest, &cached).await.with_context(|| format!("fetching layer {}", layer.digest))
}

fn is_copy(path: &Path, layer: &LayerRef) -> bool {
    let same_len = std::fs::metadata(path).is_ok_and(|facts| facts.is_file() && facts.len() == layer.len.0);
    same_len && digest::of_file(path).is_ok_and(|found| found.digest == layer.digest)
}

/// Written under another name and renamed when its digest is right, so a cached layer is always whole.
async fn fetch(repository: &Repository, digest: &ContentDigest, target: &Path) -> Result<Provided> {
    let mut layer = StoredLayer::open(repository, digest).await?;
    let folder = target.parent().unwrap_or(target);
    std::fs::create_dir_all(folder).with_context(|| format!("making the cache {}", folder.display()))?;
    let file = tempfile::NamedTempFile::new_in(folder).context("making a file in the cache")?;
    let len = layer.len();
    file.as_file().set_len(len.0).context("sizing the cached layer")?;
    let progress = Progress::bytes("layer", len.0);
    let mut bytes_read = 0;
    let blocks: Vec<Block> = layer.table.blocks().to_vec();
    for (number, block) in blocks.iter().enumerate() {
        let number = number as u64;
        if let Some(bytes) = layer.read_block(number, block).await? {
            let offset = number * u64::from(layer.manifest.block_size);
            file.as_file().write_all_at(&bytes, offset).context("writing the cached layer")?;
            bytes_read += bytes.len() as u64;
        }
        progress.advance(u64::from(layer.manifest.block_size));
    }
    file.as_file().sync_all().context("syncing the cached layer")?;
    let found = digest::of_file(file.path())?;
    if found.digest != *digest {
        return Err(crate::exit::damaged(format!("its blocks make a file of digest {}", found.digest)));
    }
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o444)).context("protecting the cached layer")?;
    file.persist(target).with_context(|| format!("naming the cached layer {}", target.display()))?;
    Ok(Provided { path: target.to_owned(), bytes_read })
}
