//! The fleecing overlay of one disk: where old blocks are saved before the guest overwrites them.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::names::DiskNames;
use super::{CaptureError, storage};
use crate::fdset::FdSet;
use crate::jobs;
use crate::qmp::Qmp;

/// Kind of the file descriptor that QEMU gets for a while.
const FD_KIND: &str = "overlay";

/// Longest wait for [`first_failed`]. The guest does not wait for it, and a busy file system's
/// journal may have much to write.
const WRITE_BACK: Duration = Duration::from_secs(60);

/// An overlay's file, opened by the helper for itself, to ask the kernel for errors of write-back.
///
/// QEMU writes an overlay through the page cache and never flushes it. A page whose write-back
/// failed counts as clean: the kernel may evict it, and a later read returns other data and no
/// error. `fsync` reports the failure once to each open file description that is older than it, so
/// this one is not a duplicate of QEMU's.
#[derive(Debug)]
pub(super) struct OverlayFile {
    node: String,
    file: Option<File>,
}

impl OverlayFile {
    /// Drops dirty pages unwritten: then `fsync` has nothing to write, which may be gigabytes, and
    /// still reports an earlier failure.
    fn empty(&self) -> std::io::Result<()> {
        self.file.as_ref().map_or(Ok(()), |file| file.set_len(0))
    }

    fn sync(&self) -> std::io::Result<()> {
        self.file.as_ref().map_or(Ok(()), File::sync_data)
    }
}

impl Drop for OverlayFile {
    /// The last close of a file without a name frees its blocks, which can hang.
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            storage::close(file);
        }
    }
}

/// The node of the first disk whose overlay had a failed write-back, and the error. To be called
/// when QEMU has closed the overlays. Empties and closes them all.
pub(super) async fn first_failed(
    overlays: Vec<OverlayFile>,
    directory: &Path,
) -> Result<Option<(String, std::io::Error)>, CaptureError> {
    if overlays.is_empty() {
        return Ok(None);
    }
    let check = move || {
        let mut overlays = overlays;
        let emptied: Vec<_> = overlays.iter().map(OverlayFile::empty).collect();
        let results = overlays.iter().zip(emptied).map(|(overlay, emptied)| {
            emptied.and_then(|()| overlay.sync()).map_err(|error| (overlay.node.clone(), error))
        });
        let failed = results.filter_map(Result::err).next();
        // Here, so that the room is there when this returns.
        overlays.iter_mut().for_each(|overlay| drop(overlay.file.take()));
        Ok(failed)
    };
    storage::within_limit(directory, WRITE_BACK, check).await
}

/// Makes the overlay of `node` and adds it to QEMU. Its file has no name when this returns: a
/// fleecing overlay is useless after QEMU's end, and so no process has to find and delete it.
///
/// `shows_disk`: whether reading it shows the disk where nothing was saved, as `blockdev-backup`
/// wants it. With a filter of our own only the filter reads it.
pub(super) async fn add_overlay(
    qmp: &Qmp,
    names: &DiskNames,
    (node, disk_bytes): (&str, u64),
    directory: &Path,
    shows_disk: bool,
) -> Result<OverlayFile, CaptureError> {
    let path = directory.join(format!("{}.{}.qcow2", names.overlay(), std::process::id()));
    let (file, own) = storage::within(directory, move || opened_twice(&path)).await?;
    let own = OverlayFile { node: node.to_owned(), file: Some(own) };
    let set = FdSet::add(qmp, file.as_fd(), FD_KIND).await?;
    let added =
        add_nodes(qmp, names, &set.filename(), disk_bytes, shows_disk.then_some(node)).await;
    // What QEMU has opened by now stays open.
    set.remove(qmp).await?;
    added.map(|()| own)
}

async fn add_nodes(
    qmp: &Qmp,
    names: &DiskNames,
    filename: &str,
    disk_bytes: u64,
    backing: Option<&str>,
) -> Result<(), CaptureError> {
    // Nothing of it has to survive a crash, so no flush of it may cost the guest's pause anything.
    let cache = json!({ "no-flush": true });
    let node_options = json!({
        "driver": "file", "node-name": names.file(), "filename": filename, "cache": cache, "discard": "unmap",
    });
    qmp.execute_json("blockdev-add", node_options).await?;
    let image = json!({ "driver": "qcow2", "file": names.file(), "size": disk_bytes });
    jobs::create_image(qmp, &names.create_job(), image).await?;
    let overlay = json!({
        "driver": "qcow2", "node-name": names.overlay(), "file": names.file(), "backing": backing, "cache": cache,
        "discard": "unmap",
    });
    qmp.execute_json("blockdev-add", overlay).await?;
    Ok(())
}

/// Takes an overlay that nothing stands on out of QEMU again.
pub(super) async fn delete(qmp: &Qmp, names: &DiskNames) -> Result<(), CaptureError> {
    for node in [names.overlay(), names.file()] {
        qmp.execute_json("blockdev-del", json!({ "node-name": node })).await?;
    }
    Ok(())
}

/// A file without a name, made in the directory of `path`.
pub(crate) fn unnamed(path: &Path) -> std::io::Result<File> {
    let file = created(path)?;
    std::fs::remove_file(path)?;
    Ok(file)
}

/// A file without a name, with two open file descriptions.
fn opened_twice(path: &Path) -> std::io::Result<(File, File)> {
    let first = created(path)?;
    // Not by its name, which may be another file's by now.
    let by_number = format!("/proc/self/fd/{}", first.as_raw_fd());
    let second = OpenOptions::new().read(true).write(true).open(by_number);
    std::fs::remove_file(path)?;
    Ok((first, second?))
}

fn created(path: &Path) -> std::io::Result<File> {
    // A file of that name can only be what an ended helper with our process id left.
    let _ = std::fs::remove_file(path);
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}
