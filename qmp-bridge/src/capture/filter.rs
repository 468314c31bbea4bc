//! Copy before write by a filter node of our own, where QEMU has what it needs for that (7.1 and
//! newer).
//!
//! `blockdev-backup` puts such a filter above a disk by itself, but with QEMU's default for a block
//! that cannot be saved: the guest's write fails, and a write that hangs in the overlay's directory
//! holds the guest's for as long. A filter of our own has `on-cbw-error=break-snapshot` and
//! `cbw-timeout`: the guest's write is done in any case, at the latest after [`TIMEOUT_SECONDS`],
//! and the point-in-time copy is what breaks. `snapshot-access` above it then fails each read.
//!
//! It is inserted by setting the `drive` property of the disk's device, which each kind of block
//! device allows while it runs (disk, CD, floppy, flash; with an id or without), and only while the
//! guest is stopped. It must be the disk's only writer: the filter allows no other beside it. A
//! disk without a device, or with a second writer (a writable export of another tool), is left to
//! `blockdev-backup`.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::names::{self, DiskNames};
use crate::jobs::tolerate_refusal;
use crate::qmp::replies::{BlockGraph, BlockInfo, GraphEdge};
use crate::qmp::{Qmp, QmpError};

/// Longest wait of a guest's write for the old content to be saved. QEMU before 9.0 keeps it in 32
/// bits of nanoseconds, so more than 4 would be less.
pub(super) const TIMEOUT_SECONDS: u32 = 3;

/// The device of each node that a filter can be put above: its path in QEMU's object tree.
pub(super) async fn devices(qmp: &Qmp) -> Result<HashMap<String, String>, QmpError> {
    Ok(filterable(&qmp.query_block().await?, &qmp.query_block_graph().await?))
}

fn filterable(block: &[BlockInfo], graph: &BlockGraph) -> HashMap<String, String> {
    let writes = |edge: &&GraphEdge| edge.perm.iter().any(|allowed| allowed == "write");
    let device = |drive: &BlockInfo| {
        let (node, qdev) = (drive.node()?, drive.qdev.as_deref()?);
        let writers = graph.above(node).filter(writes).count();
        (writers <= 1).then(|| (node.to_owned(), path(qdev)))
    };
    block.iter().filter_map(device).collect()
}

/// The QOM path of a device: `qdev` is that path, or the device's id.
fn path(qdev: &str) -> String {
    if qdev.starts_with('/') { qdev.to_owned() } else { format!("/machine/peripheral/{qdev}") }
}

/// Makes the filter; nothing passes through it yet. A refusal means that this QEMU is built
/// without.
pub(super) async fn add(qmp: &Qmp, names: &DiskNames, node: &str) -> Result<(), QmpError> {
    let options = json!({
        "driver": "copy-before-write", "node-name": names.filter(), "file": node, "target": names.overlay(),
        "on-cbw-error": "break-snapshot", "cbw-timeout": TIMEOUT_SECONDS,
    });
    qmp.execute_json("blockdev-add", options).await.map(drop)
}

pub(super) async fn delete(qmp: &Qmp, names: &DiskNames) -> Result<(), QmpError> {
    qmp.execute_json("blockdev-del", json!({ "node-name": names.filter() })).await.map(drop)
}

/// From here on the device writes through the filter. Only while the guest is stopped.
pub(super) async fn insert(qmp: &Qmp, names: &DiskNames, device: &str) -> Result<(), QmpError> {
    set_drive(qmp, device, &names.filter()).await
}

pub(super) async fn set_drive(qmp: &Qmp, device: &str, node: &str) -> Result<(), QmpError> {
    let arguments = json!({ "path": device, "property": "drive", "value": node });
    qmp.execute_json("qom-set", arguments).await.map(drop)
}

/// The node that shows the disk as it was when the filter was inserted, for reading.
pub(super) async fn add_access(qmp: &Qmp, names: &DiskNames) -> Result<(), QmpError> {
    let options =
        json!({ "driver": "snapshot-access", "node-name": names.access(), "file": names.filter() });
    qmp.execute_json("blockdev-add", options).await.map(drop)
}

/// Whether each of these filters is where it was inserted: once taken out it misses writes and does
/// not know.
pub(super) async fn missing(qmp: &Qmp, filters: &[String]) -> Result<Option<String>, QmpError> {
    let block = qmp.query_block().await?;
    let inserted: Vec<&str> = block.iter().filter_map(BlockInfo::node).collect();
    Ok(filters.iter().find(|filter| !inserted.contains(&filter.as_str())).cloned())
}

/// Takes every filter and placeholder of ours out again: its device gets the disk's node back.
/// Nothing may stand on the filters by now.
pub(super) async fn remove_all(qmp: &Qmp) -> Result<(), QmpError> {
    let block = qmp.query_block().await?;
    let ours: Vec<(&str, &str)> = block
        .iter()
        .filter_map(|drive| Some((drive.node()?, drive.qdev.as_deref()?)))
        .filter(|(node, _)| qmp.names().owns(node))
        .collect();
    if ours.is_empty() {
        return Ok(());
    }
    let graph = qmp.query_block_graph().await?;
    for (filter, qdev) in ours {
        let hold = names::hold_of(filter);
        let above = hold.as_deref().unwrap_or(filter);
        let Some(below) = graph.child(above, "file") else { continue };
        tolerate_refusal(set_drive(qmp, &path(qdev), below).await.map(|()| Value::Null))?;
    }
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;

    fn graph() -> BlockGraph {
        let graph = json!({
            "nodes": [
                { "id": 1, "type": "block-backend", "name": "a" }, { "id": 2, "type": "block-driver", "name": "na" },
                { "id": 3, "type": "block-driver", "name": "sp-1-0-cbw" }, { "id": 4, "type": "block-backend", "name": "" },
                { "id": 5, "type": "block-driver", "name": "nb" },
            ],
            "edges": [
                { "parent": 1, "child": 2, "name": "root", "perm": ["consistent-read", "write"] },
                { "parent": 3, "child": 2, "name": "file", "perm": [] },
                { "parent": 1, "child": 5, "name": "root", "perm": ["write"] },
                { "parent": 4, "child": 5, "name": "root", "perm": ["write", "consistent-read"] },
            ],
        });
        serde_json::from_value(graph).expect("a graph")
    }

    #[test]
    fn filter_stands_only_where_one_device_writes() {
        let block = json!([
            { "device": "a", "removable": false, "qdev": "vda", "inserted": { "node-name": "na", "ro": false } },
            { "device": "b", "removable": false, "qdev": "/machine/unattached/device[3]", "inserted": { "node-name": "nb", "ro": false } },
            { "device": "c", "removable": false, "inserted": { "node-name": "nc", "ro": false } },
            { "device": "d", "removable": false, "qdev": "/machine/x" },
        ]);
        let block: Vec<BlockInfo> = serde_json::from_value(block).expect("a reply");
        let found = filterable(&block, &graph());
        assert_eq!(found, HashMap::from([("na".to_owned(), "/machine/peripheral/vda".to_owned())]));
    }

    #[test]
    fn filter_is_replaced_by_what_is_under_it() {
        assert_eq!(graph().child("sp-1-0-cbw", "file"), Some("na"));
        assert_eq!(graph().child("nb", "file"), None);
    }
}
