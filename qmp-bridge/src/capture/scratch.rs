//! The scratch overlay of one disk: where blocks of the instant are saved before the guest overwrites them.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::CaptureError;
use super::names::DiskNames;
use crate::jobs;
use crate::qmp::Qmp;

/// Makes the overlay above `node` and adds it to QEMU. Its file is gone from the directory when this returns: a
/// scratch overlay is worth nothing to anybody after QEMU's end, and so nobody has to find and delete it.
pub(super) async fn add_overlay(qmp: &Qmp, names: &DiskNames, node: &str, disk_bytes: u64, directory: &Path) -> Result<(), CaptureError> {
    let file = ScratchFile::create(directory, &names.overlay())?;
    let filename = file.0.to_str().ok_or_else(|| CaptureError::Path { path: file.0.clone() })?;
    // Nothing of a scratch file has to survive a crash, so no flush of it may cost the guest's pause anything.
    let cache = json!({ "no-flush": true });
    let node_options = json!({
        "driver": "file", "node-name": names.file(), "filename": filename, "cache": cache, "discard": "unmap",
    });
    qmp.execute_json("blockdev-add", node_options).await?;
    let image = json!({ "driver": "qcow2", "file": names.file(), "size": disk_bytes });
    jobs::create_image(qmp, &names.create_job(), image).await?;
    let overlay = json!({
        "driver": "qcow2", "node-name": names.overlay(), "file": names.file(), "backing": node, "cache": cache,
        "discard": "unmap",
    });
    qmp.execute_json("blockdev-add", overlay).await?;
    Ok(())
}

/// Bytes free for an ordinary user in the file system of `directory`.
pub(super) fn free_bytes(directory: &Path) -> Result<u64, CaptureError> {
    let stat =
        nix::sys::statvfs::statvfs(directory).map_err(|errno| CaptureError::Scratch { path: directory.into(), source: errno.into() })?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

/// A file that only its openers keep once this is dropped.
struct ScratchFile(PathBuf);

impl ScratchFile {
    fn create(directory: &Path, stem: &str) -> Result<Self, CaptureError> {
        let path = directory.join(format!("{stem}.{}.qcow2", std::process::id()));
        let error = |source| CaptureError::Scratch { path: path.clone(), source };
        let path = std::path::absolute(&path).map_err(error)?;
        // A file of that name can only be what an ended helper with our process id left.
        let _ = std::fs::remove_file(&path);
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        made.map_err(|source| CaptureError::Scratch { path: path.clone(), source })?;
        Ok(Self(path))
    }
}

impl Drop for ScratchFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!(%error, path = %self.0.display(), "cannot remove a scratch file");
        }
    }
}
