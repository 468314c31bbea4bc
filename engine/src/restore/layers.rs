//! The read-only files of the restored VM: where each is on this host.

use super::source::Source;
use crate::layers;
use anyhow::Result;
use checkpoint_format::{ContentDigest, LayerRef};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

#[derive(Default)]
pub(crate) struct LocalLayers {
    by_digest: HashMap<ContentDigest, PathBuf>,
    pub bytes_read: u64,
}

impl LocalLayers {
    /// Each layer once: the copy that is here, else fetched.
    pub(crate) async fn provide(source: &Source) -> Result<Self> {
        let mut local = Self::default();
        let directory = Path::new(&source.manifest().vm_record.directory);
        for layer in source.manifest().layers() {
            if local.by_digest.contains_key(&layer.digest) {
                continue;
            }
            let provided =
                layers::provide(source.repository(), layer, directory, source.progress().as_ref())
                    .await?;
            tracing::info!(digest = %layer.digest, path = %provided.path.display(), read = provided.bytes_read, "layer");
            local.bytes_read += provided.bytes_read;
            local.by_digest.insert(layer.digest, provided.path);
        }
        Ok(local)
    }

    pub(crate) fn path<'a>(&'a self, layer: &'a LayerRef) -> &'a Path {
        self.by_digest.get(&layer.digest).map_or(Path::new(&layer.path), PathBuf::as_path)
    }
}
