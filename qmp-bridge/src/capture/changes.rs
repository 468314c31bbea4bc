//! Which blocks were written since a checkpoint, read from the bitmaps without a capture: the guest
//! may run.
//!
//! QEMU exports no bitmap that records beside a node that can be written. So the bitmap is copied
//! within QEMU, and the copy is exported.

use std::ops::Range;

use serde_json::json;

use super::bitmaps::{self, KeptBitmap, transaction};
use super::names::{self, BitmapTag, DiskNames};
use super::size_marks::{self, Since};
use super::{CaptureError, CapturePlaces};
use crate::disks::Disk;
use crate::jobs::remove_exports;
use crate::nbd::{NbdClient, context};
use crate::nbd_server;
use crate::qmp::Qmp;

/// What was written to one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskChanges {
    /// As [`Disk::node`].
    pub node: String,
    /// In bytes, ascending.
    pub ranges: Vec<Range<u64>>,
}

/// What was written to each writable disk since checkpoint `parent`, and perhaps more.
///
/// # Errors
/// When no bitmap has recorded since that checkpoint, or QEMU refuses a command.
pub async fn changes_since(
    qmp: &Qmp,
    tag: &BitmapTag,
    parent: u64,
    disks: &[Disk],
    places: CapturePlaces<'_>,
) -> Result<Vec<DiskChanges>, CaptureError> {
    let qmp = &tag.on(qmp);
    let kept = bitmaps::find(qmp, tag).await?;
    let marks = size_marks::find(qmp, tag).await?;
    let mut changes = Vec::new();
    for (index, disk) in disks.iter().filter(|disk| !disk.read_only).enumerate() {
        let unrecorded = || CaptureError::Unrecorded { node: disk.node.clone() };
        let mut own = kept.iter().filter(|bitmap| bitmap.node == disk.node);
        let bitmap = match (own.next(), own.next()) {
            (Some(only), None) if only.recording && only.since <= parent => only,
            _ => return Err(unrecorded()),
        };
        let marks = marks.get(&disk.node).map(Vec::as_slice).unwrap_or_default();
        let Since::NotShortened { certain_until } =
            size_marks::since(marks, bitmap.since, disk.virtual_size)
        else {
            return Err(unrecorded());
        };
        let mut ranges = Vec::new();
        if disk.virtual_size > 0 {
            nbd_server::start(qmp, places.nbd_socket).await?;
            let names = DiskNames::new(tag, index);
            ranges = read(qmp, (tag, &names), disk, bitmap, places).await?;
        }
        if certain_until < disk.virtual_size {
            ranges.push(certain_until..disk.virtual_size);
        }
        changes.push(DiskChanges { node: disk.node.clone(), ranges });
    }
    Ok(changes)
}

async fn read(
    qmp: &Qmp,
    (tag, names): (&BitmapTag, &DiskNames),
    disk: &Disk,
    bitmap: &KeptBitmap,
    places: CapturePlaces<'_>,
) -> Result<Vec<Range<u64>>, CaptureError> {
    let (node, copy) = (&disk.node, names::bitmap_copy(tag));
    let removed =
        json!({ "type": "block-dirty-bitmap-remove", "data": { "node": node, "name": copy } });
    // One is left by a helper that was killed in the middle.
    let nodes = qmp.query_block_nodes().await?;
    let is_left = |name: &Option<String>| name.as_deref() == Some(copy.as_str());
    if nodes.iter().any(|other| {
        other.node_name == *node && other.dirty_bitmaps.iter().any(|bitmap| is_left(&bitmap.name))
    }) {
        transaction(qmp, vec![removed.clone()]).await?;
    }
    let added = json!({
        "node": node, "name": copy, "granularity": bitmap.granularity, "disabled": true,
    });
    let merged = json!({ "node": node, "target": copy, "bitmaps": [bitmap.name] });
    transaction(
        qmp,
        vec![
            json!({ "type": "block-dirty-bitmap-add", "data": added }),
            json!({ "type": "block-dirty-bitmap-merge", "data": merged }),
        ],
    )
    .await?;
    let export = names.changes_export();
    let options = json!({
        "type": "nbd", "id": export, "name": export, "node-name": node, "bitmaps": [copy],
    });
    qmp.execute_json("block-export-add", options).await?;
    let what = context::dirty_bitmap(&copy);
    let client = NbdClient::connect(places.nbd_socket, &export, &[&what]).await?;
    let status = client.block_status(0, disk.virtual_size).await?;
    client.close().await;
    remove_exports(qmp, |id| id == export).await?;
    transaction(qmp, vec![removed]).await?;
    let extents = status.into_iter().flat_map(|context| context.extents);
    let dirty = extents.filter(|extent| extent.flags & context::STATE_DIRTY != 0);
    Ok(dirty.map(|extent| extent.start..extent.end).collect())
}
