//! The layers of a running machine, found and stored once.

use super::{digest, ensure};
use crate::exit::refused;
use crate::launch::{arguments, paths};
use anyhow::{Context, Result};
use checkpoint_format::{ByteLen, LayerRef};
use checkpoint_store::Repository;
use qmp_bridge::disks::Disk;
use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// By path and identity: a layer that was stored stays stored, another file under its path is another layer.
#[derive(Default)]
pub struct Known(HashMap<PathBuf, (String, LayerRef)>);

impl Known {
    /// Digests and stores what the machine reads only, and returns how many bytes that stored. `open` tells which files QEMU
    /// has open: a layer that was replaced under its path is not what the guest sees.
    pub async fn ensure_all(
        &mut self,
        repository: &Repository,
        disks: &[Disk],
        boot_files: &[(String, PathBuf)],
        open: &HashSet<(u64, u64)>,
    ) -> Result<u64> {
        let mut stored = 0;
        for (path, format) in read_only_files(disks) {
            let facts = std::fs::metadata(&path).with_context(|| format!("looking at the layer {}", path.display()))?;
            if !open.contains(&(facts.dev(), facts.ino())) {
                return Err(refused(format!(
                    "{} was replaced by another file since QEMU opened it; put the old one back, or start the machine anew",
                    path.display()
                )));
            }
            stored += self.ensure(repository, &path, &format, path.to_string_lossy().into_owned()).await?;
        }
        for (named, path) in boot_files {
            stored += self.ensure(repository, path, "raw", named.clone()).await?;
        }
        Ok(stored)
    }

    async fn ensure(&mut self, repository: &Repository, path: &Path, format: &str, named: String) -> Result<u64> {
        let facts = std::fs::metadata(path).with_context(|| format!("looking at the layer {}", path.display()))?;
        let identity = digest::identity(&facts);
        if let Some((known, layer)) = self.0.get(path)
            && *known == identity
            // A store that was set back to an earlier state has lost it.
            && repository.has_layer(&layer.digest).await?
        {
            return Ok(0);
        }
        let owned = path.to_owned();
        let found = tokio::task::spawn_blocking(move || digest::of_file(&owned)).await.context("digesting was cut off")??;
        let stored = ensure(repository, path, found).await?;
        let layer = LayerRef { digest: found.digest, form: found.form, len: ByteLen(found.len.0), format: format.to_owned(), path: named };
        self.0.insert(path.to_owned(), (identity, layer));
        Ok(stored)
    }

    pub fn get(&self, path: &Path) -> Option<&LayerRef> {
        self.0.get(path).map(|(_, layer)| layer)
    }
}

fn read_only_files(disks: &[Disk]) -> Vec<(PathBuf, String)> {
    let own = disks.iter().filter(|disk| disk.read_only).map(|disk| (disk.file.clone(), disk.format.as_str().to_owned()));
    let backing = disks.iter().flat_map(|disk| &disk.backing);
    own.chain(backing.map(|image| (image.file.clone(), image.format.as_str().to_owned()))).collect()
}

/// Kernel, initrd and the like: as the command line names them, and where they are. A name without a file is one that
/// QEMU finds among its own (`-bios bios-256k.bin`); every host has those.
pub fn boot_files(words: &[String], directory: &Path) -> Result<Vec<(String, PathBuf)>> {
    let options = arguments::parse(words)?;
    let named = paths::boot_files(&options).into_iter().map(|name| (name.clone(), directory.join(name)));
    Ok(named.filter(|(_, path)| path.is_file()).collect())
}
