//! That the restored VM has the checkpoint's disks and no other: on the command line, and in the
//! QEMU that it made.

use super::disks::{Places, is_block_device};
use super::layers::LocalLayers;
use anyhow::{Error, Result};
use checkpoint_format::DiskRecord;
use qmp_bridge::disks::Disk;
use std::path::PathBuf;
use vm::drives::{self, Drives};
use vm::error::refused;
use vm::launch::arguments::QemuOption;
use vm::launch::paths;

/// Every disk must be on the new command line, or QEMU would open files of the old host. Disks on
/// block devices get the driver for those, and all stand on what their images name.
pub(crate) fn on_the_line(
    places: &Places<'_>,
    layers: &LocalLayers,
    options: Vec<QemuOption>,
) -> Result<Vec<QemuOption>> {
    let mut options = drives::on_what_images_name(options);
    for disk in &places.manifest.disks {
        let file = places.file(layers, disk)?;
        if !paths::is_named(&options, places.dir, &file) {
            return Err(refused(format!(
                "the saved command line does not name {}, the file of disk {}; the checkpoint cannot be restored as it is",
                disk.file, disk.node
            )));
        }
        if is_block_device(&file) {
            options = drives::as_device(options, &file);
        }
    }
    Ok(options)
}

/// Before the guest runs: each disk is the one of the checkpoint, on its layers.
pub(crate) fn in_qemu(places: &Places<'_>, layers: &LocalLayers, found: &Drives) -> Result<()> {
    let records = &places.manifest.disks;
    for disk in &found.disks {
        let record = records.iter().find(|record| record.node == disk.name);
        let record = record.ok_or_else(|| other(disk, "is in no checkpoint"))?;
        let file = places.file(layers, record)?;
        if disk.file != file {
            return Err(other(disk, &format!("should be on {}", file.display())));
        }
        let is_same = (disk.read_only, disk.format.as_str(), disk.virtual_size)
            == (record.read_only, record.format.as_str(), size(record));
        if !is_same {
            return Err(other(
                disk,
                "is not what it was: its size, format or write access is another",
            ));
        }
        check_layers(layers, record, disk, found)?;
    }
    match records.iter().find(|record| found.disks.iter().all(|disk| disk.name != record.node)) {
        None => Ok(()),
        Some(missing) => Err(refused(format!(
            "the new QEMU does not have disk {}; is its command line another?",
            missing.node
        ))),
    }
}

/// QEMU passes up to sectors.
fn size(record: &DiskRecord) -> u64 {
    record.virtual_size.0.next_multiple_of(512)
}

fn check_layers(
    layers: &LocalLayers,
    record: &DiskRecord,
    disk: &Disk,
    found: &Drives,
) -> Result<()> {
    let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
    let mut expected = record.backing.iter().map(|layer| absolute(layers.path(layer).to_owned()));
    // Layers that hold nothing may be left out; none may be another.
    match found.layers(disk).iter().find(|image| !expected.any(|layer| layer == image.file)) {
        None => Ok(()),
        Some(image) => Err(other(
            disk,
            &format!("shows {}, which is none of its layers", image.file.display()),
        )),
    }
}

fn other(disk: &Disk, what: &str) -> Error {
    refused(format!(
        "disk {} on {} of the new QEMU {what}; the VM is not started, since it would not be the one of the checkpoint",
        disk.name,
        disk.file.display()
    ))
}
