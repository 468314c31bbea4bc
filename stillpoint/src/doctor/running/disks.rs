//! The disks of a running machine, one by one.

use super::super::Row;
use super::cannot;
use crate::helper::unprepared::look::Look;
use crate::launch::foreign::Foreign;
use crate::terminal::bytes;
use anyhow::Error;
use qmp_bridge::QmpError;
use qmp_bridge::disks::{self, Disk, DiskError, Drive, Medium};
use serde_json::Value;

const START_ANEW: &str = "start the machine anew with that disk on a qcow2 or raw image";
const ELSEWHERE: &str = "start the machine anew on that file";

pub async fn check(look: &Look, found: Option<&Foreign>) -> Vec<Row> {
    match rows(look, found).await {
        Ok(rows) => rows,
        Err(error) => vec![Row::no("disks", error.to_string(), "try again")],
    }
}

async fn rows(look: &Look, found: Option<&Foreign>) -> Result<Vec<Row>, QmpError> {
    let drives = disks::survey(&look.qmp, Some(&look.process.directory)).await?;
    let is_writable = |drive: &Drive| matches!(&drive.disk, Ok(Medium::Disk(disk)) if !disk.read_only);
    let has_writable = drives.iter().any(is_writable);
    let is_sound = drives.iter().all(|drive| drive.disk.is_ok());
    let mut rows: Vec<Row> = drives.into_iter().map(row).collect();
    if let Some(why) = disks::unsafe_iothread(&look.qmp).await?.filter(|_| has_writable) {
        rows.push(cannot("disk threads", &Error::msg(why), START_ANEW));
    } else if let Some(found) = found.filter(|_| is_sound) {
        rows.extend(together(look, found).await);
    }
    rows.extend(jobs(&look.qmp.execute_json("query-block-jobs", Value::Null).await?));
    rows.extend(exports(&look.qmp.execute_json("query-block-exports", Value::Null).await?));
    Ok(rows)
}

/// What only all drives together, and the command line, show.
async fn together(look: &Look, found: &Foreign) -> Option<Row> {
    match look.drives(found).await {
        Ok(_) => None,
        // It has a row of its own.
        Err(error) if matches!(error.downcast_ref(), Some(DiskError::Job { .. })) => None,
        Err(error) => Some(cannot("disks", &error, ELSEWHERE)),
    }
}

fn row(drive: Drive) -> Row {
    let check = format!("disk {}", short(&drive.device));
    match drive.disk {
        Ok(Medium::Disk(disk)) => Row::ok(check, describe(&disk)),
        Ok(Medium::None(_)) => Row::ok(check, "no medium"),
        // The device is in the row's name already.
        Err(DiskError::Unsupported { why, .. }) => cannot(check, &Error::msg(why), START_ANEW),
        Err(error) => cannot(check, &error.into(), START_ANEW),
    }
}

/// A drive without a name of its own is told by its device: `/machine/peripheral/virtio-disk0/virtio-backend`.
fn short(device: &str) -> &str {
    let below = device.strip_prefix("/machine/peripheral/").or_else(|| device.strip_prefix("/machine/peripheral-anon/"));
    below.map_or(device, |below| below.split('/').next().unwrap_or(below))
}

fn describe(disk: &Disk) -> String {
    let mode = if disk.read_only { "read-only" } else { "writable" };
    let layers = match disk.backing.len() {
        0 => String::new(),
        1 => " on 1 layer".to_owned(),
        many => format!(" on {many} layers"),
    };
    format!("{mode} {}, {}, {}{layers}", disk.format.as_str(), bytes(disk.virtual_size), disk.file.display())
}

/// A job stands above its disk, or will change what is below it.
fn jobs(reply: &Value) -> Option<Row> {
    let list = reply.as_array().filter(|list| !list.is_empty())?;
    let name = |job: &Value| format!("{} of {}", job["type"].as_str().unwrap_or("?"), job["device"].as_str().unwrap_or("?"));
    let names: Vec<String> = list.iter().map(name).collect();
    Some(Row::no("disk jobs", format!("running: {}", names.join(", ")), "wait for them, or end them"))
}

/// QEMU has one NBD server, and a checkpoint needs it.
fn exports(reply: &Value) -> Option<Row> {
    let list = reply.as_array().into_iter().flatten().filter(|export| export["type"] == "nbd");
    let names: Vec<&str> = list.filter_map(|export| export["id"].as_str()).collect();
    (!names.is_empty()).then(|| {
        Row::no("NBD server", format!("somebody serves {} by it", names.join(", ")), "end that export (block-export-del, nbd-server-stop)")
    })
}

#[cfg(test)]
mod test {
    use super::super::super::State;
    use super::*;
    use serde_json::json;

    #[test]
    fn a_drive_is_told_by_its_device() {
        assert_eq!(short("/machine/peripheral/virtio-disk0/virtio-backend"), "virtio-disk0");
        assert_eq!(short("/machine/peripheral-anon/device[0]"), "device[0]");
        assert_eq!(short("drive-scsi0"), "drive-scsi0");
    }

    #[test]
    fn jobs_and_exports_of_others_are_in_the_way() {
        let row = jobs(&json!([{"type": "mirror", "device": "d0"}])).unwrap();
        assert!(row.state == State::No && row.detail.contains("mirror of d0"), "{row:?}");
        assert!(jobs(&json!([])).is_none());
        let row = exports(&json!([{"id": "e", "type": "nbd"}])).unwrap();
        assert!(row.state == State::No && row.detail.contains('e'), "{row:?}");
        assert!(exports(&json!([{"id": "e", "type": "fuse"}])).is_none());
    }
}
