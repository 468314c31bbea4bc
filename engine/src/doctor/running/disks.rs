//! The disks of a running VM, one by one.

use super::super::Row;
use super::cannot;
use crate::progress::bytes;
use anyhow::Error;
use qmp_bridge::disks::{self, Disk, DiskError, Drive, Medium};
use qmp_bridge::{QmpError, nbd_server};
use std::path::Path;
use vm::external::probe::Probe;
use vm::launch::external::ExternalVm;

const START_AGAIN: &str = "start the VM again with that disk on a qcow2 or raw image";
const ELSEWHERE: &str = "start the VM again on that file";

/// `server`: where QEMU's NBD server listens if it is that of the VM's helper.
pub(super) async fn check(
    look: &Probe,
    found: Option<&ExternalVm>,
    server: Option<&Path>,
) -> Vec<Row> {
    match rows(look, found, server).await {
        Ok(rows) => rows,
        Err(error) => vec![Row::no("disks", error.to_string(), "try again")],
    }
}

async fn rows(
    look: &Probe,
    found: Option<&ExternalVm>,
    server: Option<&Path>,
) -> Result<Vec<Row>, QmpError> {
    let drives = disks::survey(&look.qmp, Some(&look.process.directory)).await?;
    let is_writable =
        |drive: &Drive| matches!(&drive.disk, Ok(Medium::Disk(disk)) if !disk.read_only);
    let has_writable = drives.iter().any(is_writable);
    let is_sound = drives.iter().all(|drive| drive.disk.is_ok());
    let mut rows: Vec<Row> = drives.into_iter().map(row).collect();
    if let Some(why) = disks::unsafe_iothread(&look.qmp).await?.filter(|_| has_writable) {
        rows.push(cannot("disk threads", &Error::msg(why), START_AGAIN));
    } else if let Some(found) = found.filter(|_| is_sound) {
        rows.extend(together(look, found).await);
    }
    // A job stands above its disk, or will change what is below it.
    rows.extend(refusal("disk jobs", disks::refuse_jobs(&look.qmp).await)?);
    // QEMU has one NBD server, and a checkpoint of a writable disk needs it.
    if has_writable {
        rows.extend(
            nbd_server::check(&look.qmp, server)
                .await
                .err()
                .map(|error| cannot("NBD server", &error.into(), "try again")),
        );
    }
    Ok(rows)
}

/// What only all drives together, and the command line, show.
async fn together(look: &Probe, found: &ExternalVm) -> Option<Row> {
    match look.drives(found).await {
        Ok(drives) => {
            let refusal = look.check_files(found, &drives).err();
            refusal.map(|error| cannot("files", &error.into(), ELSEWHERE))
        }
        Err(error) => {
            let error = Error::from(error);
            // A job has a row of its own.
            let is_job = error
                .chain()
                .any(|cause| matches!(cause.downcast_ref(), Some(DiskError::Job { .. })));
            (!is_job).then(|| cannot("disks", &error, ELSEWHERE))
        }
    }
}

fn row(drive: Drive) -> Row {
    let check = format!("disk {}", short(&drive.device));
    match drive.disk {
        Ok(Medium::Disk(disk)) => Row::ok(check, describe(&disk)),
        Ok(Medium::None(_)) => Row::ok(check, "no medium"),
        // The device is in the row's name already.
        Err(DiskError::Unsupported { why, .. }) => cannot(check, &Error::msg(why), START_AGAIN),
        Err(error) => cannot(check, &error.into(), START_AGAIN),
    }
}

/// A drive without a name of its own is shown by its device:
/// `/machine/peripheral/virtio-disk0/virtio-backend`.
fn short(device: &str) -> &str {
    let below = device
        .strip_prefix("/machine/peripheral/")
        .or_else(|| device.strip_prefix("/machine/peripheral-anon/"));
    below.map_or(device, |below| below.split('/').next().unwrap_or(below))
}

fn describe(disk: &Disk) -> String {
    let mode = if disk.read_only { "read-only" } else { "writable" };
    let layers = match disk.backing.len() {
        0 => String::new(),
        1 => " on 1 layer".to_owned(),
        many => format!(" on {many} layers"),
    };
    format!(
        "{mode} {}, {}, {}{layers}",
        disk.format.as_str(),
        bytes(disk.virtual_size),
        disk.file.display()
    )
}

fn refusal(check: &'static str, result: Result<(), DiskError>) -> Result<Option<Row>, QmpError> {
    match result {
        Ok(()) => Ok(None),
        Err(DiskError::Qmp(error)) => Err(error),
        Err(error) => Ok(Some(cannot(check, &error.into(), START_AGAIN))),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn drive_without_a_name_is_shown_by_its_device() {
        assert_eq!(short("/machine/peripheral/virtio-disk0/virtio-backend"), "virtio-disk0");
        assert_eq!(short("/machine/peripheral-anon/device[0]"), "device[0]");
        assert_eq!(short("drive-scsi0"), "drive-scsi0");
    }
}
