//! Writing to the disks of a VM whose guest is stopped, below its devices.
//!
//! A device lets no other client write to its disk. So while the disk is written the device has a
//! placeholder of the same size, by its `drive` property, which each kind of block device lets one
//! set while the guest is stopped (as a capture does with its filter). A raw node above the disk
//! keeps it in QEMU meanwhile, and is what is exported: bitmaps that are on the disk record what is
//! written.
//!
//! Whatever becomes of the helper, the clean-up of the next one gives each device its disk back.

use std::collections::HashMap;
use std::path::PathBuf;

use bytes::Bytes;
use serde_json::json;
use tokio::sync::OwnedMutexGuard;

use super::names::{BitmapTag, DiskNames};
use super::{CaptureError, CapturePlaces, filter, sweep, turn};
use crate::disks::Disk;
use crate::jobs::remove_exports;
use crate::nbd::NbdClient;
use crate::nbd_server;
use crate::qmp::Qmp;

/// The layer below a disk, for reading.
#[derive(Debug)]
struct Backing {
    client: NbdClient,
    bytes: u64,
}

/// One writable disk.
#[derive(Debug)]
pub struct RewrittenDisk {
    /// As [`Disk::node`].
    pub node: String,
    /// As [`Disk::name`].
    pub name: String,
    /// What the guest sees, in bytes.
    pub bytes: u64,
    device: String,
    names: DiskNames,
    backing: Option<Backing>,
}

impl RewrittenDisk {
    /// What the layers below the disk show there: zeros without one, and behind its end.
    ///
    /// # Errors
    /// When the layer cannot be read.
    pub async fn read_below(&self, offset: u64, length: u32) -> Result<Vec<u8>, CaptureError> {
        let mut content = vec![0; length as usize];
        let Some(Backing { client, bytes }) = &self.backing else { return Ok(content) };
        let there = bytes.saturating_sub(offset).min(u64::from(length));
        if let Ok(there) = u32::try_from(there)
            && there > 0
        {
            content[..there as usize].copy_from_slice(&client.read(offset, there).await?);
        }
        Ok(content)
    }
}

/// The writable disks of a VM, ready to be written.
#[derive(Debug)]
pub struct DiskRewrite {
    qmp: Qmp,
    nbd_socket: PathBuf,
    /// In the order of the VM's disks.
    pub disks: Vec<RewrittenDisk>,
    _turn: OwnedMutexGuard<()>,
}

impl DiskRewrite {
    /// Adds what is needed to QEMU; the guest may run, and every device has its disk.
    ///
    /// # Errors
    /// When a disk has no device of its own or another writer, or QEMU refuses a command.
    pub async fn prepare(
        qmp: &Qmp,
        tag: &BitmapTag,
        disks: &[Disk],
        places: CapturePlaces<'_>,
    ) -> Result<Self, CaptureError> {
        let qmp = tag.on(qmp);
        let turn = turn::take(&qmp).await?;
        let devices = filter::devices(&qmp).await?;
        let writable = disks.iter().filter(|disk| !disk.read_only).enumerate();
        let device = |disk: &Disk| devices.get(&disk.node).cloned();
        let targets: Vec<(usize, &Disk)> = writable.collect();
        if let Some((_, disk)) = targets.iter().find(|(_, disk)| device(disk).is_none()) {
            return Err(CaptureError::NotAlone { node: disk.node.clone() });
        }
        let nbd_socket = places.nbd_socket.to_owned();
        let mut rewrite = Self { qmp, nbd_socket, disks: Vec::new(), _turn: turn };
        if !targets.is_empty() {
            nbd_server::start(&rewrite.qmp, &rewrite.nbd_socket).await?;
        }
        for (index, disk) in targets {
            let names = DiskNames::new(tag, index);
            match rewrite.add(&names, disk, &devices).await {
                Ok(disk) => rewrite.disks.push(disk),
                Err(error) => {
                    rewrite.remove().await?;
                    return Err(error);
                }
            }
        }
        Ok(rewrite)
    }

    async fn add(
        &self,
        names: &DiskNames,
        disk: &Disk,
        devices: &HashMap<String, String>,
    ) -> Result<RewrittenDisk, CaptureError> {
        let hold = json!({ "driver": "raw", "node-name": names.hold(), "file": disk.node });
        self.qmp.execute_json("blockdev-add", hold).await?;
        let placeholder = json!({
            "driver": "null-co", "node-name": names.placeholder(), "size": disk.virtual_size,
        });
        self.qmp.execute_json("blockdev-add", placeholder).await?;
        let backing = match disk.backing.first() {
            Some(layer) => Some(Backing {
                client: self.export(&names.backing_export(), &layer.node, false).await?,
                bytes: layer.virtual_size,
            }),
            None => None,
        };
        Ok(RewrittenDisk {
            node: disk.node.clone(),
            name: disk.name.clone(),
            bytes: disk.virtual_size,
            device: devices.get(&disk.node).cloned().unwrap_or_default(),
            names: names.clone(),
            backing,
        })
    }

    async fn export(
        &self,
        name: &str,
        node: &str,
        writable: bool,
    ) -> Result<NbdClient, CaptureError> {
        let options = json!({
            "type": "nbd", "id": name, "name": name, "node-name": node, "writable": writable,
        });
        self.qmp.execute_json("block-export-add", options).await?;
        Ok(NbdClient::connect(&self.nbd_socket, name, &[]).await?)
    }

    /// Takes a disk from its device, for writing. Only while the guest is stopped.
    ///
    /// # Errors
    /// When QEMU refuses it.
    pub async fn open(&self, disk: &RewrittenDisk) -> Result<NbdClient, CaptureError> {
        filter::set_drive(&self.qmp, &disk.device, &disk.names.placeholder()).await?;
        self.export(&disk.names.rewrite_export(), &disk.names.hold(), true).await
    }

    /// Writes what was written to its storage, and gives the device its disk back.
    ///
    /// # Errors
    /// When the disk cannot be written, or QEMU refuses a command.
    pub async fn close(&self, disk: &RewrittenDisk, client: NbdClient) -> Result<(), CaptureError> {
        client.flush().await?;
        client.close().await;
        let export = disk.names.rewrite_export();
        remove_exports(&self.qmp, |id| id == export).await?;
        Ok(filter::set_drive(&self.qmp, &disk.device, &disk.node).await?)
    }

    /// Takes everything out of QEMU again.
    ///
    /// # Errors
    /// When QEMU refuses to remove a node.
    pub async fn remove(self) -> Result<(), CaptureError> {
        let Self { qmp, nbd_socket, disks, _turn } = self;
        drop(disks);
        sweep::sweep(&qmp).await?;
        Ok(nbd_server::stop_unused(&qmp, &nbd_socket).await?)
    }
}

/// Writes `content`, which begins at `offset`, where the disk holds anything else: page by page of
/// `page` bytes. Returns how many bytes were written.
///
/// # Errors
/// When the disk cannot be read or written.
pub async fn write_differing(
    client: &NbdClient,
    offset: u64,
    content: &Bytes,
    page: usize,
) -> Result<u64, CaptureError> {
    let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
    let there = client.read(offset, length).await?;
    let mut written = 0;
    for (start, end) in differing(&there, content, page) {
        client.write(offset + start as u64, content.slice(start..end)).await?;
        written += (end - start) as u64;
    }
    Ok(written)
}

/// Where the runs of pages that differ begin and end, in bytes. A page is of `page` bytes, the last
/// one may be short.
pub fn differing(there: &[u8], content: &[u8], page: usize) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    let pages = there.chunks(page).zip(content.chunks(page)).enumerate();
    for (number, (_, new)) in pages.filter(|(_, (old, new))| old != new) {
        let start = number * page;
        match runs.last_mut() {
            Some((_, end)) if *end == start => *end += new.len(),
            _ => runs.push((start, start + new.len())),
        }
    }
    runs
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn only_runs_of_pages_that_differ_are_written() {
        assert_eq!(differing(b"aabbccdde", b"aabXcYdde", 2), [(2, 6)]);
        assert_eq!(differing(b"aabbccdde", b"Xabbccddf", 2), [(0, 2), (8, 9)]);
        assert_eq!(differing(b"aabb", b"aabb", 2), []);
    }
}
