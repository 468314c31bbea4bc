//! A layer for a restored VM: the local copy when its content is the right one, else fetched into
//! the cache.

use super::digest;
use super::read::StoredLayer;
use crate::progress::Progress;
use anyhow::{Context, Result};
use checkpoint_format::{DigestForm, LayerRef};
use checkpoint_store::Repository;
use futures::TryStreamExt;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use qmp_bridge::poll::poll_until;
use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vm::cache;
use vm::error::damaged;

/// Begins the name of a file that is being fetched, which its process holds locked.
const UNFINISHED: &str = ".fetch-";
/// What another process gets to fetch a layer that this one needs, too.
const OTHERS: Duration = Duration::from_secs(600);
const OTHERS_POLL: Duration = Duration::from_millis(20);
/// By then a new file is locked.
const LOCKED_AFTER: Duration = Duration::from_secs(60);

/// A layer ready to be used, and what it took.
pub(crate) struct Provided {
    pub path: PathBuf,
    /// Zero when a local copy served.
    pub bytes_read: u64,
}

/// Looks where the layer was on the host of the checkpoint (a relative path counts from
/// `directory`), then in the cache.
pub(crate) async fn provide(
    repository: &Repository,
    layer: &LayerRef,
    directory: &Path,
    progress: &dyn Progress,
) -> Result<Provided> {
    let cached = cache::directory().join("layers").join(layer.digest.to_string());
    for place in [directory.join(&layer.path), cached.clone()] {
        if is_copy(&place, layer) {
            return Ok(Provided { path: place.canonicalize()?, bytes_read: 0 });
        }
    }
    fetch(repository, layer, &cached, progress)
        .await
        .with_context(|| format!("fetching layer {}", layer.digest))
}

fn is_copy(path: &Path, layer: &LayerRef) -> bool {
    let same_len =
        std::fs::metadata(path).is_ok_and(|facts| facts.is_file() && facts.len() == layer.len.0);
    same_len && digest::of_file_as(path, layer.form).is_ok_and(|found| found.digest == layer.digest)
}

/// Written under another name and renamed when its digest is right, so a cached layer is always
/// whole.
async fn fetch(
    repository: &Repository,
    wanted: &LayerRef,
    target: &Path,
    progress: &dyn Progress,
) -> Result<Provided> {
    let layer = StoredLayer::open(repository, &wanted.digest).await?;
    if (layer.len(), layer.manifest.form) != (wanted.len, wanted.form) {
        return Err(damaged(
            "the store's layer is of another length or version than the checkpoint says",
        ));
    }
    let folder = target.parent().unwrap_or(target);
    std::fs::create_dir_all(folder)
        .with_context(|| format!("making the cache {}", folder.display()))?;
    remove_abandoned(folder);
    let _alone = wait_for_others(folder, &wanted.digest.to_string()).await;
    if is_copy(target, wanted) {
        return Ok(Provided { path: target.to_owned(), bytes_read: 0 });
    }
    let file = tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempfile_in(folder)
        .context("making a file in the cache")?;
    let lock = file.as_file().try_clone().context("opening the cached layer twice")?;
    let _locked = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| error)
        .context("locking the cached layer")?;
    let bytes_read = write(&layer, file.as_file(), progress).await?;
    file.as_file().sync_all().context("syncing the cached layer")?;
    // In the other form the table's digests, which every block was compared with, make the name.
    if wanted.form == DigestForm::Content {
        let path = file.path().to_owned();
        let found =
            tokio::task::spawn_blocking(move || digest::of_file_as(&path, DigestForm::Content));
        let found = found.await.context("internal error: digest task panicked")??;
        if found.digest != wanted.digest {
            return Err(damaged(format!("its blocks make a file of digest {}", found.digest)));
        }
    }
    file.as_file()
        .set_permissions(std::fs::Permissions::from_mode(0o444))
        .context("protecting the cached layer")?;
    file.persist(target)
        .with_context(|| format!("naming the cached layer {}", target.display()))?;
    Ok(Provided { path: target.to_owned(), bytes_read })
}

/// Of the one process that fetches a layer. Its file goes with it: a process that has opened it
/// before finds the layer fetched.
struct Alone {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Drop for Alone {
    fn drop(&mut self) {
        // One that is left is removed by the next fetch.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One process fetches a layer for all that need it now. None after a long time, or where locks are
/// not possible: then this one fetches it too.
async fn wait_for_others(folder: &Path, digest: &str) -> Option<Alone> {
    let path = folder.join(format!("{UNFINISHED}lock-{digest}"));
    let options = || File::options().write(true).create(true).truncate(false).open(&path);
    let lock = || async {
        let locked = options().ok().map(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock));
        match locked {
            Some(Ok(lock)) => Some(Some(lock)),
            Some(Err((_, Errno::EWOULDBLOCK))) => None,
            _ => Some(None),
        }
    };
    let lock = poll_until(OTHERS, OTHERS_POLL, lock).await.flatten()?;
    Some(Alone { path: path.clone(), _lock: lock })
}

/// Removes files of fetches that were killed: no process holds their lock. What cannot be removed
/// is left to the next fetch.
fn remove_abandoned(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_ours = entry.file_name().as_encoded_bytes().starts_with(UNFINISHED.as_bytes());
        // A new one may not be locked yet.
        let is_old = || {
            entry
                .metadata()
                .and_then(|facts| facts.modified())
                .is_ok_and(|at| at.elapsed().is_ok_and(|age| age > LOCKED_AFTER))
        };
        if is_ours
            && is_old()
            && let Ok(file) = File::open(entry.path())
            && Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok()
        {
            tracing::info!(path = %entry.path().display(), "removing what a killed restore left");
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Writes the blocks that are not zero; the others stay holes. Returns how many bytes that were.
async fn write(layer: &StoredLayer, file: &File, progress: &dyn Progress) -> Result<u64> {
    file.set_len(layer.len().0).context("sizing the cached layer")?;
    let file = Arc::new(file.try_clone().context("opening the cached layer twice")?);
    let total = layer.table.stored().count() as u64 * u64::from(layer.manifest.block_size);
    let progress = progress.begin("layer", total);
    let mut bytes = 0;
    let mut batches = std::pin::pin!(layer.blocks());
    while let Some(blocks) = batches.try_next().await? {
        let count: usize = blocks.iter().map(|(_, content)| content.len()).sum();
        let file = Arc::clone(&file);
        let write = move || {
            blocks.iter().try_for_each(|(offset, content)| file.write_all_at(content, *offset))
        };
        tokio::task::spawn_blocking(write)
            .await
            .context("internal error: write task panicked")?
            .context("writing the cached layer")?;
        bytes += count as u64;
        progress.advance(count as u64);
    }
    Ok(bytes)
}

#[cfg(test)]
mod test {
    use super::*;
    use std::time::SystemTime;

    /// The lock ends with its process.
    #[tokio::test]
    async fn layer_is_fetched_by_one_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let first = wait_for_others(folder.path(), "0123").await.unwrap();
        assert!(wait_for_others(folder.path(), "4567").await.is_some(), "another layer");
        let mut second = std::pin::pin!(wait_for_others(folder.path(), "0123"));
        let short = Duration::from_millis(50);
        assert!(tokio::time::timeout(short, &mut second).await.is_err());
        drop(first);
        assert!(second.await.is_some());
        let missing = folder.path().join("missing");
        assert!(wait_for_others(&missing, "0123").await.is_none(), "no lock is possible");
    }

    #[test]
    fn cache_files_of_killed_fetches_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let old = SystemTime::now() - Duration::from_secs(3600);
        let make = |name: &str, at: SystemTime| {
            let file = File::create(folder.path().join(name)).unwrap();
            file.set_modified(at).unwrap();
            file
        };
        make(".fetch-killed", old);
        make(".fetch-new", SystemTime::now());
        make("0123", old);
        let _running =
            Flock::lock(make(".fetch-running", old), FlockArg::LockExclusiveNonblock).unwrap();
        remove_abandoned(folder.path());
        let left = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut left: Vec<String> = left.collect();
        left.sort();
        assert_eq!(left, [".fetch-new", ".fetch-running", "0123"]);
    }
}
