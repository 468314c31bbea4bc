//! The layers of a running VM, found and stored once.

use super::{digest, ensure};
use anyhow::{Context, Result};
use checkpoint_format::{ByteLen, LayerRef};
use checkpoint_store::Repository;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use vm::drives::Drives;

/// By path and identity: a layer that was stored stays stored, another file under its path is
/// another layer.
#[derive(Default)]
pub(crate) struct Known(HashMap<PathBuf, (String, LayerRef)>);

impl Known {
    /// Digests and stores what the VM only reads, and returns how many bytes that stored. A layer
    /// is what QEMU has open: a file that was deleted is read all the same, one that was replaced
    /// is refused.
    pub(crate) async fn ensure_all(
        &mut self,
        repository: &Repository,
        drives: &Drives,
        boot_files: &[(String, PathBuf)],
    ) -> Result<u64> {
        let mut stored = 0;
        for image in drives.disks.iter().flat_map(|disk| drives.layers(disk)) {
            let source = drives.open.readable(&image.file)?;
            stored += self
                .ensure(
                    repository,
                    &image.file,
                    &source,
                    image.format.as_str(),
                    image.file.to_string_lossy().into_owned(),
                )
                .await?;
        }
        for (named, path) in boot_files {
            stored += self.ensure(repository, path, path, "raw", named.clone()).await?;
        }
        Ok(stored)
    }

    /// `path` is what the layer is called, `source` where its content is.
    async fn ensure(
        &mut self,
        repository: &Repository,
        path: &Path,
        source: &Path,
        format: &str,
        named: String,
    ) -> Result<u64> {
        let facts = std::fs::metadata(source)
            .with_context(|| format!("looking at the layer {}", path.display()))?;
        let identity = digest::identity(&facts);
        if let Some((known, layer)) = self.0.get(path)
            && *known == identity
            // A store that was set back to an earlier state has lost it.
            && repository.has_layer(&layer.digest).await?
        {
            return Ok(0);
        }
        let owned = source.to_owned();
        let found = tokio::task::spawn_blocking(move || digest::of_file(&owned))
            .await
            .context("internal error: the digest task panicked")??;
        let stored = ensure(repository, source, found).await?;
        let layer = LayerRef {
            digest: found.digest,
            form: found.form,
            len: ByteLen(found.len.0),
            format: format.to_owned(),
            path: named,
        };
        self.0.insert(path.to_owned(), (identity, layer));
        Ok(stored)
    }

    /// A layer of these disks whose file is not what it was when it was stored: written to, or
    /// another.
    pub(crate) fn changed(&self, drives: &Drives) -> Option<PathBuf> {
        let is_same = |path: &Path| {
            let now =
                drives.open.readable(path).ok().and_then(|source| std::fs::metadata(source).ok());
            let now = now.map(|facts| digest::identity(&facts));
            self.0.get(path).is_some_and(|(stored, _)| now.as_ref() == Some(stored))
        };
        let layers = drives.disks.iter().flat_map(|disk| drives.layers(disk));
        layers.map(|image| image.file).find(|path| !is_same(path))
    }

    pub(crate) fn get(&self, path: &Path) -> Option<&LayerRef> {
        self.0.get(path).map(|(_, layer)| layer)
    }
}
