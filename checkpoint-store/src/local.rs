//! A store in a local (or mounted) directory.
//!
//! A file is written under a hidden name, synced, renamed with `RENAME_NOREPLACE` and its directory
//! synced: a power cut leaves either all of it or a hidden leftover. A directory is removed by
//! renaming it to a hidden name first, so that it disappears in one step and a late writer's path
//! leads nowhere.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use crate::error::{Op, Result, StoreError};
use crate::nonce::nonce;
use crate::path::{StorePath, is_visible};
use crate::store::{
    Entry, MAX_LIST_LEN, MAX_READ_LEN, PutOptions, PutReceipt, Stat, Store, total_len,
};

const UNFINISHED: &str = ".tmp-";
const REMOVED: &str = ".trash-";
/// A checkpoint holds the guest's memory, so its files are not world-readable.
const FILE_MODE: u32 = 0o640;
const DIR_MODE: u32 = 0o750;

/// A store below one directory, which need not exist yet.
#[derive(Debug, Clone)]
pub struct LocalStore {
    base: PathBuf,
    url: String,
}

impl LocalStore {
    /// A store below `base`, an absolute path.
    ///
    /// # Errors
    /// When the directory cannot be made or resolved.
    pub fn new(base: impl Into<PathBuf>) -> Result<Self> {
        // By its components, so that a store has one name however many slashes it is written with.
        let base: PathBuf = base.into().components().collect();
        let url = format!("file://{}", base.display());
        if !base.is_absolute() {
            return Err(StoreError::InvalidUrl {
                url,
                reason: "the directory must be an absolute path".to_owned(),
            });
        }
        Ok(LocalStore { base, url })
    }

    fn at(&self, path: &StorePath) -> PathBuf {
        if path.is_root() { self.base.clone() } else { self.base.join(path.as_str()) }
    }

    /// Runs file system calls on a thread that may block, and names the error.
    async fn blocking<T: Send + 'static>(
        &self,
        op: Op,
        path: &StorePath,
        work: impl FnOnce(PathBuf) -> io::Result<T> + Send + 'static,
    ) -> Result<T> {
        let full = self.at(path);
        match tokio::task::spawn_blocking(move || work(full)).await {
            Ok(result) => result.map_err(|error| explain(op, path, error)),
            Err(join) => Err(StoreError::failed(op, path, join)),
        }
    }
}

#[async_trait]
impl Store for LocalStore {
    fn url(&self) -> &str {
        &self.url
    }

    async fn create_dir_all(&self, path: &StorePath) -> Result<()> {
        self.blocking(Op::CreateDirAll, path, |full| create_dir_all_synced(&full)).await
    }

    async fn create_dir(&self, path: &StorePath) -> Result<()> {
        self.blocking(Op::CreateDir, path, |full| {
            DirBuilder::new().mode(DIR_MODE).create(&full)?;
            sync_parent(&full)
        })
        .await
    }

    async fn put(
        &self,
        path: &StorePath,
        data: Vec<Bytes>,
        _options: PutOptions,
    ) -> Result<PutReceipt> {
        let len = total_len(&data);
        self.blocking(Op::Put, path, move |full| write_whole(&full, &data)).await?;
        Ok(PutReceipt { len, replicas: None })
    }

    async fn put_exclusive(
        &self,
        path: &StorePath,
        data: Bytes,
        _options: PutOptions,
    ) -> Result<PutReceipt> {
        let len = data.len() as u64;
        self.blocking(Op::PutExclusive, path, move |full| write_whole(&full, &[data])).await?;
        Ok(PutReceipt { len, replicas: None })
    }

    async fn read(&self, path: &StorePath, limit: u64) -> Result<Bytes> {
        let limit = limit.min(MAX_READ_LEN);
        let (len, data) =
            self.blocking(Op::Read, path, move |full| read_whole(&full, limit)).await?;
        data.ok_or_else(|| StoreError::Limit {
            path: path.to_string(),
            what: "its length",
            actual: len,
            limit,
        })
    }

    async fn read_range(&self, path: &StorePath, offset: u64, len: u64) -> Result<Bytes> {
        check_range_len(path, len)?;
        let (file_len, data) =
            self.blocking(Op::ReadRange, path, move |full| read_part(&full, offset, len)).await?;
        data.ok_or_else(|| StoreError::PastEnd { path: path.to_string(), offset, len, file_len })
    }

    async fn stat(&self, path: &StorePath) -> Result<Option<Stat>> {
        self.blocking(Op::Stat, path, |full| match fs::symlink_metadata(&full) {
            Ok(meta) => {
                let len = if meta.is_dir() { 0 } else { meta.len() };
                Ok(Some(Stat {
                    len,
                    is_dir: meta.is_dir(),
                    replicas: None,
                    modified: meta.modified()?,
                }))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        })
        .await
    }

    async fn list(&self, path: &StorePath) -> Result<Vec<Entry>> {
        self.blocking(Op::List, path, |full| list_visible(&full)).await
    }

    async fn rename_dir(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        let target = self.at(to);
        let shown = to.clone();
        self.blocking(Op::RenameDir, from, move |source| rename_directory(&source, &target))
            .await
            .map_err(|error| match error {
                StoreError::AlreadyExists { op, .. } => StoreError::already_exists(op, &shown),
                other => other,
            })
    }

    async fn remove(&self, path: &StorePath) -> Result<()> {
        if path.is_root() {
            return Err(StoreError::failed(Op::Remove, path, "a store never removes its root"));
        }
        self.blocking(Op::Remove, path, |full| remove_tree(&full)).await
    }

    async fn set_replication(&self, _path: &StorePath, _replicas: u16) -> Result<()> {
        Ok(())
    }
}

pub(crate) fn check_range_len(path: &StorePath, len: u64) -> Result<()> {
    if len > MAX_READ_LEN {
        return Err(StoreError::Limit {
            path: path.to_string(),
            what: "the length of one read",
            actual: len,
            limit: MAX_READ_LEN,
        });
    }
    Ok(())
}

fn explain(op: Op, path: &StorePath, error: io::Error) -> StoreError {
    use io::ErrorKind as Kind;
    let (shown, reason) = (path.to_string(), error.to_string());
    match (error.kind(), error.raw_os_error().map(Errno::from_raw)) {
        (Kind::NotFound, _) => StoreError::NotFound { op, path: shown },
        (Kind::AlreadyExists | Kind::DirectoryNotEmpty, _) => {
            StoreError::AlreadyExists { op, path: shown }
        }
        (Kind::StorageFull | Kind::QuotaExceeded, _) => {
            StoreError::Full { op, path: shown, reason }
        }
        (Kind::PermissionDenied | Kind::ReadOnlyFilesystem, _) => {
            StoreError::Denied { op, path: shown, reason }
        }
        (
            _,
            Some(
                Errno::EIO
                | Errno::ESTALE
                | Errno::ETIMEDOUT
                | Errno::EAGAIN
                | Errno::EMFILE
                | Errno::ENFILE,
            ),
        ) => StoreError::Unavailable { op, path: shown, reason },
        _ => StoreError::Failed { op, path: shown, reason },
    }
}

fn hidden_sibling(full: &Path, prefix: &str) -> PathBuf {
    full.with_file_name(format!("{prefix}{}", nonce()))
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn sync_parent(full: &Path) -> io::Result<()> {
    full.parent().map_or(Ok(()), sync_dir)
}

fn create_dir_all_synced(full: &Path) -> io::Result<()> {
    if full.is_dir() {
        return Ok(());
    }
    if let Some(parent) = full.parent() {
        create_dir_all_synced(parent)?;
    }
    match DirBuilder::new().mode(DIR_MODE).create(full) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && full.is_dir() => Ok(()),
        Err(error) => Err(error),
        Ok(()) => sync_parent(full),
    }
}

/// Not by the crate tempfile, whose errors hide the kernel's number: a failure is classified by it.
fn write_whole(full: &Path, data: &[Bytes]) -> io::Result<()> {
    let unfinished = hidden_sibling(full, UNFINISHED);
    let written =
        write_synced(&unfinished, data).and_then(|()| rename_no_replace(&unfinished, full));
    if written.is_err() {
        // The error at hand says more than one about the unfinished file, which no reader sees.
        let _ = fs::remove_file(&unfinished);
    }
    written?;
    sync_parent(full)
}

fn write_synced(unfinished: &Path, data: &[Bytes]) -> io::Result<()> {
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(unfinished)?;
    for chunk in data {
        file.write_all(chunk)?;
    }
    file.sync_all()
}

fn rename_no_replace(from: &Path, to: &Path) -> io::Result<()> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::EINVAL) => Err(io::Error::other(
            "this file system can't rename without replacing (renameat2 RENAME_NOREPLACE); use another one",
        )),
        Err(errno) => Err(errno.into()),
    }
}

fn rename_directory(from: &Path, to: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(from)?.is_dir() {
        return Err(io::Error::other("it is not a directory"));
    }
    sync_dir(from)?;
    rename_no_replace(from, to)?;
    sync_parent(to)?;
    if from.parent() == to.parent() { Ok(()) } else { sync_parent(from) }
}

/// The length, and the content if it is within the limit.
fn read_whole(full: &Path, limit: u64) -> io::Result<(u64, Option<Bytes>)> {
    let file = File::open(full)?;
    let meta = file.metadata()?;
    if meta.is_dir() {
        return Err(io::Error::other("it is a directory"));
    }
    let mut data = Vec::new();
    // One byte more than allowed: the file may have grown since it was measured.
    file.take(limit.saturating_add(1)).read_to_end(&mut data)?;
    let len = meta.len().max(data.len() as u64);
    Ok((len, (len <= limit).then(|| data.into())))
}

/// The file's length, and the range if the file has all of it.
fn read_part(full: &Path, offset: u64, len: u64) -> io::Result<(u64, Option<Bytes>)> {
    let mut file = File::open(full)?;
    let file_len = file.metadata()?.len();
    if offset.checked_add(len).is_none_or(|end| end > file_len) {
        return Ok((file_len, None));
    }
    file.seek(SeekFrom::Start(offset))?;
    let mut data = Vec::with_capacity(usize::try_from(len).unwrap_or_default());
    file.take(len).read_to_end(&mut data)?;
    let complete = data.len() as u64 == len;
    Ok((file_len, complete.then(|| data.into())))
}

fn list_visible(full: &Path) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(full)? {
        let entry = entry?;
        let Some(name) =
            entry.file_name().to_str().filter(|name| is_visible(name)).map(str::to_owned)
        else {
            continue;
        };
        // The directory itself tells its directories: thousands of checkpoints cost no call each.
        let len = match entry.file_type()?.is_dir() {
            true => None,
            false => match entry.metadata() {
                // Removed since it was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => Some(other?.len()),
            },
        };
        entries.push(Entry { name, is_dir: len.is_none(), len: len.unwrap_or(0) });
        if entries.len() > MAX_LIST_LEN {
            return Err(io::Error::other("the directory has too many entries"));
        }
    }
    entries.sort();
    Ok(entries)
}

fn remove_tree(full: &Path) -> io::Result<()> {
    let meta = match fs::symlink_metadata(full) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let removed = if meta.is_dir() {
        fs::rename(full, hidden_sibling(full, REMOVED))
    } else {
        fs::remove_file(full)
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => sync_parent(full)?,
    }
    full.parent().map_or(Ok(()), empty_trash)
}

/// Deletes what is under hidden removed names here, this call's and those that a killed process
/// left.
fn empty_trash(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(REMOVED.as_bytes()) {
            delete_all(&entry.path())?;
        }
    }
    Ok(())
}

/// Deletes a tree that a late writer may still be adding to, or another process be deleting.
fn delete_all(path: &Path) -> io::Result<()> {
    const TRIES: u32 = 8;
    let mut last = Ok(());
    for _ in 0..TRIES {
        last = fs::remove_dir_all(path);
        match &last {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.exists() => {
                return Ok(());
            }
            Err(_) => {}
            Ok(()) => return Ok(()),
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> StorePath {
        StorePath::new(text).expect("valid")
    }

    #[test]
    fn a_relative_base_is_refused() {
        assert!(matches!(LocalStore::new("some/dir"), Err(StoreError::InvalidUrl { .. })));
    }

    #[tokio::test]
    async fn leftovers_of_killed_processes_are_hidden_and_trash_is_emptied() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let store = LocalStore::new(dir.path()).expect("store");
        fs::write(dir.path().join(".tmp-1"), b"half").expect("write");
        fs::create_dir(dir.path().join(".trash-1")).expect("create");
        fs::write(dir.path().join(".trash-1/x"), b"old").expect("write");
        assert_eq!(store.list(&StorePath::root()).await.expect("list"), []);
        store.create_dir(&path("a")).await.expect("create");
        store.remove(&path("a")).await.expect("remove");
        assert!(!dir.path().join(".trash-1").exists());
    }

    #[tokio::test]
    async fn a_full_file_system_is_named() {
        // Every write to this device fails with ENOSPC.
        let error =
            File::options().write(true).open("/dev/full").and_then(|mut f| f.write_all(b"x"));
        let error = explain(Op::Put, &path("a"), error.expect_err("the device is full"));
        assert!(matches!(error, StoreError::Full { .. }), "{error}");
    }

    #[tokio::test]
    async fn files_are_not_readable_by_other_users() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("temporary directory");
        let store = LocalStore::new(dir.path()).expect("store");
        store
            .put(&path("a"), vec![Bytes::from_static(b"x")], PutOptions::default())
            .await
            .expect("put");
        let mode = fs::metadata(dir.path().join("a")).expect("stat").permissions().mode();
        assert_eq!(mode & 0o007, 0);
    }
}
