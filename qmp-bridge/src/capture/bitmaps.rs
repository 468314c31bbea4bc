//! Dirty bitmaps of ours on the disks: which are there, and giving changes back.

use checkpoint_format::DurableReceipt;
use serde_json::{Value, json};

use super::names::{self, BitmapTag, DiskNames};
use super::size_marks::{self, Place};
use super::{CaptureError, CapturePlaces, CapturePlan};
use crate::disks::Disk;
use crate::nbd_server;
use crate::qmp::replies::{BlockDeviceInfo, BlockDirtyInfo};
use crate::qmp::{Qmp, QmpError};

/// Finest granularity: one page.
const FINEST: u64 = 4096;
/// Up to this size a disk gets the finest; beyond, the granularity doubles so that a bitmap stays
/// within 8 MiB.
const FINEST_UP_TO: u64 = 256 << 30;
/// QEMU's own limit.
const COARSEST: u64 = 1 << 31;

/// Bytes per bit for a disk of this size.
pub(super) fn granularity(disk_bytes: u64) -> u64 {
    let mut granularity = FINEST;
    let mut limit = FINEST_UP_TO;
    while disk_bytes > limit && granularity < COARSEST {
        granularity *= 2;
        limit = limit.saturating_mul(2);
    }
    granularity
}

impl CapturePlan {
    /// The number of the checkpoint, as names of bitmaps have it.
    pub(super) fn id(&self) -> u64 {
        self.checkpoint.id.0
    }
}

/// A bitmap of ours that lives in QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptBitmap {
    /// The disk's node.
    pub node: String,
    /// It records what changed after this checkpoint.
    pub since: u64,
    /// Bytes per bit.
    pub granularity: u64,
    /// Whether it records now.
    pub recording: bool,
    pub(super) name: String,
}

/// The bitmaps with this tag on all nodes, oldest first.
pub(super) async fn find(qmp: &Qmp, tag: &BitmapTag) -> Result<Vec<KeptBitmap>, QmpError> {
    let nodes = qmp.query_block_nodes().await?;
    let mut found: Vec<KeptBitmap> = nodes.iter().flat_map(|node| of_node(node, tag)).collect();
    found.sort_by_key(|bitmap| bitmap.since);
    Ok(found)
}

fn of_node(node: &BlockDeviceInfo, tag: &BitmapTag) -> Vec<KeptBitmap> {
    let kept = |bitmap: &BlockDirtyInfo| {
        let name = bitmap.name.as_deref()?;
        Some(KeptBitmap {
            node: node.node_name.clone(),
            since: names::bitmap_id(tag, name)?,
            granularity: bitmap.granularity,
            recording: bitmap.recording,
            name: name.into(),
        })
    };
    node.dirty_bitmaps.iter().filter_map(kept).collect()
}

/// Per node: all changes into the oldest bitmap, which records again; the others go. One
/// transaction, so no write can fall between. Returns what is left.
pub(super) async fn merge_back(qmp: &Qmp, tag: &BitmapTag) -> Result<Vec<KeptBitmap>, QmpError> {
    let mut kept: Vec<KeptBitmap> = Vec::new();
    let mut actions = Vec::new();
    for bitmap in find(qmp, tag).await? {
        match kept.iter().find(|older| older.node == bitmap.node) {
            Some(older) => actions.extend([action_merge(older, &bitmap), action_remove(&bitmap)]),
            None => {
                if !bitmap.recording {
                    actions.push(action("block-dirty-bitmap-enable", &bitmap));
                }
                kept.push(KeptBitmap { recording: true, ..bitmap });
            }
        }
    }
    transaction(qmp, actions).await?;
    Ok(kept)
}

/// Before a capture of checkpoint `id`: merges the bitmaps into one per node, and removes those
/// that record since a checkpoint that does not exist yet (a first capture whose helper was killed
/// leaves one).
pub(super) async fn reconcile(
    qmp: &Qmp,
    tag: &BitmapTag,
    id: u64,
) -> Result<Vec<KeptBitmap>, QmpError> {
    let kept = merge_back(qmp, tag).await?;
    let (usable, stale): (Vec<_>, Vec<_>) = kept.into_iter().partition(|bitmap| bitmap.since < id);
    transaction(qmp, stale.iter().map(action_remove).collect()).await?;
    Ok(usable)
}

/// Drops the bitmaps that record since checkpoint `id` on the nodes that `on` picks.
pub(super) async fn remove_since(
    qmp: &Qmp,
    tag: &BitmapTag,
    id: u64,
    on: impl Fn(&str) -> bool,
) -> Result<(), QmpError> {
    let found = find(qmp, tag).await?;
    let gone = found.iter().filter(|bitmap| bitmap.since == id && on(&bitmap.node));
    transaction(qmp, gone.map(action_remove).collect()).await
}

/// Begins to record on every writable disk, as if checkpoint `id` had just been taken: right after
/// a restore of it, before the guest runs.
///
/// # Errors
/// When QEMU refuses a bitmap, or a name that it would get is taken.
pub async fn start_recording(
    qmp: &Qmp,
    tag: &BitmapTag,
    id: u64,
    disks: &[Disk],
    places: CapturePlaces<'_>,
) -> Result<(), CaptureError> {
    let qmp = &tag.on(qmp);
    let writable = disks.iter().filter(|disk| !disk.read_only).enumerate();
    let marked: Vec<(&Disk, DiskNames)> =
        writable.map(|(index, disk)| (disk, DiskNames::new(tag, index))).collect();
    if !marked.is_empty() {
        nbd_server::start(qmp, places.nbd_socket).await?;
        for (disk, names) in &marked {
            let place = Place { node: &disk.node, bytes: disk.virtual_size, names };
            size_marks::place(qmp, tag, id, &place, (places.fleecing_dir, places.nbd_socket))
                .await?;
        }
        nbd_server::stop_unused(qmp, places.nbd_socket).await?;
    }
    let name = names::bitmap(tag, id);
    let add = |disk: &Disk| {
        let data = json!({ "node": disk.node, "name": name, "granularity": granularity(disk.virtual_size) });
        json!({ "type": "block-dirty-bitmap-add", "data": data })
    };
    Ok(transaction(qmp, disks.iter().filter(|disk| !disk.read_only).map(add).collect()).await?)
}

/// As [`start_recording`], of disks that recorded since another checkpoint: what they hold now is
/// what checkpoint `id` has.
///
/// # Errors
/// As those of [`start_recording`].
pub async fn restart_recording(
    qmp: &Qmp,
    tag: &BitmapTag,
    id: u64,
    disks: &[Disk],
    places: CapturePlaces<'_>,
) -> Result<(), CaptureError> {
    let found = find(&tag.on(qmp), tag).await?;
    transaction(qmp, found.iter().map(action_remove).collect()).await?;
    size_marks::remove(&tag.on(qmp), tag, |_, _, _| true).await?;
    start_recording(qmp, tag, id, disks, places).await
}

/// Drops the bitmaps that record since any other checkpoint than the durable one.
pub(super) async fn keep_only(
    qmp: &Qmp,
    tag: &BitmapTag,
    receipt: &DurableReceipt,
) -> Result<(), QmpError> {
    let id = receipt.checkpoint().id.0;
    let found = find(qmp, tag).await?;
    let actions = found.iter().filter(|bitmap| bitmap.since != id).map(action_remove).collect();
    transaction(qmp, actions).await
}

pub(super) async fn transaction(qmp: &Qmp, actions: Vec<Value>) -> Result<(), QmpError> {
    if actions.is_empty() {
        return Ok(());
    }
    qmp.execute_json("transaction", json!({ "actions": actions })).await.map(drop)
}

fn action(kind: &str, bitmap: &KeptBitmap) -> Value {
    json!({ "type": kind, "data": { "node": bitmap.node, "name": bitmap.name } })
}

fn action_remove(bitmap: &KeptBitmap) -> Value {
    action("block-dirty-bitmap-remove", bitmap)
}

fn action_merge(into: &KeptBitmap, from: &KeptBitmap) -> Value {
    json!({
        "type": "block-dirty-bitmap-merge",
        "data": { "node": into.node, "target": into.name, "bitmaps": [from.name] },
    })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn granularity_doubles_with_the_disk() {
        assert_eq!(granularity(0), 4096);
        assert_eq!(granularity(256 << 30), 4096);
        assert_eq!(granularity((256 << 30) + 1), 8192);
        assert_eq!(granularity(1 << 40), 16384);
        assert_eq!(granularity(u64::MAX), COARSEST);
    }
}
