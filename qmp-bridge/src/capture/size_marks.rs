//! Whether a disk was ever shorter than it was at a checkpoint.
//!
//! QEMU truncates the dirty bitmaps of a disk that is shortened, and clears their new part when the
//! disk grows again. A change of that part since the checkpoint, by the guest or by the shortening
//! itself, is then in no bitmap, and the size alone shows nothing if both happened between two
//! checks. QEMU sends no event for it either. So each disk has a second bitmap that does not
//! record, with one bit set: that of the last granule. A disk that was shortened has lost the bit.
//! The mark's name carries the size and the checkpoint before which it was placed.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use bytes::Bytes;
use serde_json::json;

use super::bitmaps::transaction;
use super::names::{self, BitmapTag, DiskNames};
use super::{CaptureError, fleecing, storage};
use crate::fdset::FdSet;
use crate::jobs::{remove_exports, tolerate_refusal};
use crate::nbd::NbdClient;
use crate::qmp::replies::{BlockDeviceInfo, BlockDirtyInfo};
use crate::qmp::{Qmp, QmpError};

/// Finest granularity of a mark: a sector, by which sizes change.
const FINEST: u64 = 512;
/// Up to this size a disk gets the finest; beyond, the granularity doubles so that a mark stays
/// within 4 MiB.
const FINEST_UP_TO: u64 = 16 << 30;
/// The bitmap of the helper node from which the bit is merged.
const SOURCE_BITMAP: &str = "last";

/// A mark that is on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SizeMark {
    checkpoint_id: u64,
    bytes: u64,
    granularity: u64,
    /// The bit is still there.
    whole: bool,
    name: String,
}

impl SizeMark {
    /// A disk that was shortened within its last granule only has kept the bit.
    fn certain_until(&self) -> u64 {
        if self.granularity == FINEST {
            self.bytes
        } else {
            last_granule(self.bytes, self.granularity)
        }
    }
}

/// Bytes per bit of the mark of a disk of this size.
fn granularity(disk_bytes: u64) -> u64 {
    let times = disk_bytes.div_ceil(FINEST_UP_TO).max(1);
    FINEST.saturating_mul(times.next_power_of_two())
}

/// What has become of a disk since its base bitmap began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Since {
    /// Its bitmap holds all changes, except those behind this offset.
    NotShortened { certain_until: u64 },
    /// It was shortened, or may have been.
    Unknown,
}

/// All marks with this tag, by node.
pub(super) async fn find(
    qmp: &Qmp,
    tag: &BitmapTag,
) -> Result<HashMap<String, Vec<SizeMark>>, QmpError> {
    let mark = |bitmap: BlockDirtyInfo| {
        let name = bitmap.name?;
        let (checkpoint_id, bytes) = names::parse_size_mark(tag, &name)?;
        let (granularity, whole) = (bitmap.granularity, bitmap.count > 0);
        Some(SizeMark { checkpoint_id, bytes, granularity, whole, name })
    };
    let marks = |node: BlockDeviceInfo| {
        (node.node_name, node.dirty_bitmaps.into_iter().filter_map(mark).collect())
    };
    let all = qmp.query_block_nodes().await?.into_iter().map(marks);
    Ok(all.filter(|(_, marks): &(_, Vec<SizeMark>)| !marks.is_empty()).collect())
}

/// What is known of a disk that has `bytes` now and whose bitmap records since checkpoint `since`:
/// only a mark that was there by then speaks for it.
pub(super) fn since(marks: &[SizeMark], since: u64, bytes: u64) -> Since {
    match marks
        .iter()
        .filter(|mark| mark.checkpoint_id <= since)
        .max_by_key(|mark| mark.checkpoint_id)
    {
        Some(mark) if mark.whole && mark.bytes <= bytes => {
            Since::NotShortened { certain_until: mark.certain_until() }
        }
        // Nothing can be missing from a disk that had nothing.
        Some(mark) if mark.bytes == 0 => Since::NotShortened { certain_until: 0 },
        _ => Since::Unknown,
    }
}

/// Whether a disk needs another mark before checkpoint `seq`.
pub(super) fn is_due(marks: &[SizeMark], checkpoint_id: u64, bytes: u64) -> bool {
    let newest = marks
        .iter()
        .filter(|mark| mark.checkpoint_id < checkpoint_id)
        .max_by_key(|mark| mark.checkpoint_id);
    !newest.is_some_and(|mark| (mark.whole || bytes == 0) && mark.bytes == bytes)
}

fn last_granule(bytes: u64, granularity: u64) -> u64 {
    bytes.saturating_sub(1) / granularity * granularity
}

/// The disk to mark, and names for what that needs.
pub(super) struct Place<'a> {
    pub(super) node: &'a str,
    pub(super) bytes: u64,
    pub(super) names: &'a DiskNames,
}

/// CapturePlaces a mark for checkpoint `seq`, whose bitmap begins later. QEMU's NBD server runs at
/// `nbd_socket`; a file in `directory` serves for a moment.
pub(super) async fn place(
    qmp: &Qmp,
    tag: &BitmapTag,
    checkpoint_id: u64,
    disk: &Place<'_>,
    (directory, nbd_socket): (&Path, &Path),
) -> Result<(), CaptureError> {
    let name = names::size_mark(tag, checkpoint_id, disk.bytes);
    let granularity = granularity(disk.bytes);
    let target =
        json!({ "node": disk.node, "name": name, "granularity": granularity, "disabled": true });
    if disk.bytes == 0 {
        return Ok(qmp.execute_json("block-dirty-bitmap-add", target).await.map(drop)?);
    }
    let source = disk.names.mark();
    add_source(qmp, disk, granularity, directory).await?;
    let export = disk.names.mark_export();
    let options = json!({ "type": "nbd", "id": export, "node-name": source, "name": export, "writable": true });
    qmp.execute_json("block-export-add", options).await?;
    let client = NbdClient::connect(nbd_socket, &export, &[]).await?;
    let last = last_granule(disk.bytes, granularity);
    #[expect(clippy::cast_possible_truncation, reason = "at most one granule")]
    let rest = vec![0; (disk.bytes - last) as usize];
    client.write(last, Bytes::from(rest)).await?;
    client.close().await;
    let merge = json!({ "node": disk.node, "target": name, "bitmaps": [{ "node": source, "name": SOURCE_BITMAP }] });
    transaction(
        qmp,
        vec![
            json!({ "type": "block-dirty-bitmap-add", "data": target }),
            json!({ "type": "block-dirty-bitmap-merge", "data": merge }),
        ],
    )
    .await?;
    remove_exports(qmp, |id| id == export).await?;
    tolerate_refusal(qmp.execute_json("blockdev-del", json!({ "node-name": source })).await)?;
    Ok(())
}

/// A node as long as the disk, with a bitmap; its file is empty but for what is written to it.
async fn add_source(
    qmp: &Qmp,
    disk: &Place<'_>,
    granularity: u64,
    directory: &Path,
) -> Result<(), CaptureError> {
    let (path, bytes) =
        (directory.join(format!("{}.{}", disk.names.mark(), std::process::id())), disk.bytes);
    let file = storage::within(directory, move || sized(&path, bytes)).await?;
    let set = FdSet::add(qmp, file.as_fd(), "mark").await?;
    let options =
        json!({ "driver": "file", "node-name": disk.names.mark(), "filename": set.filename() });
    let added = qmp.execute_json("blockdev-add", options).await;
    set.remove(qmp).await?;
    added?;
    let bitmap =
        json!({ "node": disk.names.mark(), "name": SOURCE_BITMAP, "granularity": granularity });
    qmp.execute_json("block-dirty-bitmap-add", bitmap).await?;
    Ok(())
}

fn sized(path: &Path, bytes: u64) -> std::io::Result<File> {
    let file = fleecing::unnamed(path)?;
    file.set_len(bytes)?;
    Ok(file)
}

/// Removes the marks that `which` picks by the checkpoint before which they were placed and their
/// size.
pub(super) async fn remove(
    qmp: &Qmp,
    tag: &BitmapTag,
    which: impl Fn(&str, u64, u64) -> bool,
) -> Result<(), QmpError> {
    let mut actions = Vec::new();
    for (node, marks) in find(qmp, tag).await? {
        let picked = marks.iter().filter(|mark| which(&node, mark.checkpoint_id, mark.bytes));
        actions.extend(picked.map(|mark| json!({ "type": "block-dirty-bitmap-remove", "data": { "node": node, "name": mark.name } })));
    }
    transaction(qmp, actions).await
}

/// Checkpoint `seq` is durable: of each node only the newest mark is needed.
pub(super) async fn keep_newest(qmp: &Qmp, tag: &BitmapTag) -> Result<(), QmpError> {
    let found = find(qmp, tag).await?;
    let newest = |node: &str| {
        found.get(node).and_then(|marks| marks.iter().map(|mark| mark.checkpoint_id).max())
    };
    remove(qmp, tag, |node, checkpoint_id, _| {
        newest(node).is_some_and(|newest| checkpoint_id < newest)
    })
    .await
}

#[cfg(test)]
mod test {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn mark(checkpoint_id: u64, bytes: u64, whole: bool) -> SizeMark {
        SizeMark { checkpoint_id, bytes, granularity: 64 << 10, whole, name: String::new() }
    }

    #[test]
    fn size_mark_speaks_for_bitmaps_that_began_after_it() {
        let until = |bytes: u64| Since::NotShortened { certain_until: bytes - (64 << 10) };
        assert_eq!(since(&[mark(3, 8 * MIB, true)], 3, 8 * MIB), until(8 * MIB));
        assert_eq!(since(&[mark(3, 8 * MIB, true)], 9, 8 * MIB), until(8 * MIB));
        assert_eq!(since(&[mark(3, 8 * MIB, true)], 9, 16 * MIB), until(8 * MIB), "it grew");
        assert_eq!(
            since(&[mark(3, 8 * MIB, true)], 9, 8 * MIB - 512),
            Since::Unknown,
            "it is shorter"
        );
        assert_eq!(since(&[mark(3, 8 * MIB, false)], 9, 8 * MIB), Since::Unknown, "it was shorter");
        assert_eq!(since(&[mark(4, 8 * MIB, true)], 3, 8 * MIB), Since::Unknown, "placed later");
        assert_eq!(since(&[], 3, 8 * MIB), Since::Unknown);
        // One that a killed helper placed for a checkpoint that never came.
        assert_eq!(
            since(&[mark(2, 8 * MIB, false), mark(5, 8 * MIB, true)], 4, 8 * MIB),
            Since::Unknown
        );
    }

    #[test]
    fn size_mark_is_due_when_the_size_changed() {
        assert!(!is_due(&[mark(3, 8 * MIB, true)], 4, 8 * MIB));
        assert!(
            is_due(&[mark(3, 8 * MIB, true)], 4, 16 * MIB)
                && is_due(&[mark(3, 8 * MIB, false)], 4, 8 * MIB)
        );
        assert!(is_due(&[], 1, 8 * MIB) && is_due(&[mark(4, 8 * MIB, true)], 4, 8 * MIB));
    }

    #[test]
    fn size_mark_of_a_small_disk_leaves_nothing_uncertain() {
        assert_eq!(
            [0, 16 << 30, (16 << 30) + 1, 1 << 40].map(granularity),
            [512, 512, 1024, 32 << 10]
        );
        let exact = SizeMark { granularity: 512, ..mark(3, 8 * MIB, true) };
        assert_eq!(since(&[exact], 3, 8 * MIB), Since::NotShortened { certain_until: 8 * MIB });
    }

    #[test]
    fn size_mark_ends_in_the_last_granule() {
        assert_eq!(
            [0, 1, 65_536, 65_537].map(|bytes| last_granule(bytes, 65_536)),
            [0, 0, 0, 65_536]
        );
    }
}
