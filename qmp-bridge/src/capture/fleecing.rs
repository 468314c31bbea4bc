//! The fleecing overlay of one disk: where old blocks are saved before the guest overwrites them.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde_json::json;

use super::names::DiskNames;
use super::{CaptureError, storage};
use crate::fdset::FdSet;
use crate::jobs;
use crate::qmp::Qmp;

/// Kind of the file descriptor that QEMU gets for a while.
const FD_KIND: &str = "overlay";

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
) -> Result<(), CaptureError> {
    let path = directory.join(format!("{}.{}.qcow2", names.overlay(), std::process::id()));
    let file = storage::within(directory, move || unnamed(&path)).await?;
    let set = FdSet::add(qmp, file.as_fd(), FD_KIND).await?;
    let added =
        add_nodes(qmp, names, &set.filename(), disk_bytes, shows_disk.then_some(node)).await;
    // What QEMU has opened by now stays open.
    set.remove(qmp).await?;
    added
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

pub(super) fn unnamed(path: &Path) -> std::io::Result<File> {
    // A file of that name can only be what an ended helper with our process id left.
    let _ = std::fs::remove_file(path);
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    std::fs::remove_file(path)?;
    Ok(file)
}
