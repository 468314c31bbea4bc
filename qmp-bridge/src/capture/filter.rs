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

use super::names::DiskNames;
use crate::jobs::tolerate_refusal;
use crate::qmp::{Qmp, QmpError};

/// Longest wait of a guest's write for the old content to be saved. QEMU before 9.0 keeps it in 32
/// bits of nanoseconds, so more than 4 would be less.
pub(super) const TIMEOUT_SECONDS: u32 = 3;

/// The device of each node that a filter can be put above: its path in QEMU's object tree.
pub(super) async fn devices(qmp: &Qmp) -> Result<HashMap<String, String>, QmpError> {
    let block = qmp.execute_json("query-block", Value::Null).await?;
    let graph = qmp.execute_json("x-debug-query-block-graph", Value::Null).await?;
    Ok(filterable(&block, &graph))
}

fn rows(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn filterable(block: &Value, graph: &Value) -> HashMap<String, String> {
    let writers = |node: &str| {
        let id = node_id(graph, node);
        let writes = |edge: &&Value| {
            edge["child"] == *id && rows(&edge["perm"]).iter().any(|perm| perm == "write")
        };
        rows(&graph["edges"]).iter().filter(writes).count()
    };
    let device = |row: &Value| {
        Some((row["inserted"]["node-name"].as_str()?.to_owned(), path(row["qdev"].as_str()?)))
    };
    let mut found = HashMap::new();
    for (node, path) in rows(block).iter().filter_map(device) {
        if writers(&node) <= 1 {
            found.insert(node, path);
        }
    }
    found
}

fn node_id<'a>(graph: &'a Value, name: &str) -> &'a Value {
    let hit = rows(&graph["nodes"])
        .iter()
        .find(|node| node["type"] == "block-driver" && node["name"] == name);
    hit.map_or(&Value::Null, |node| &node["id"])
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

async fn set_drive(qmp: &Qmp, device: &str, node: &str) -> Result<(), QmpError> {
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
    let block = qmp.execute_json("query-block", Value::Null).await?;
    let inserted: Vec<&str> =
        rows(&block).iter().filter_map(|row| row["inserted"]["node-name"].as_str()).collect();
    Ok(filters.iter().find(|filter| !inserted.contains(&filter.as_str())).cloned())
}

/// Takes every filter of ours out again: its device gets the disk's node back. Nothing may stand on
/// the filters by now.
pub(super) async fn remove_all(qmp: &Qmp) -> Result<(), QmpError> {
    let block = qmp.execute_json("query-block", Value::Null).await?;
    let ours = |row: &&Value| {
        row["inserted"]["node-name"].as_str().is_some_and(|node| qmp.names().owns(node))
    };
    let inserted: Vec<&Value> = rows(&block).iter().filter(ours).collect();
    if inserted.is_empty() {
        return Ok(());
    }
    let graph = qmp.execute_json("x-debug-query-block-graph", Value::Null).await?;
    for row in inserted {
        let (Some(filter), Some(qdev)) =
            (row["inserted"]["node-name"].as_str(), row["qdev"].as_str())
        else {
            continue;
        };
        let Some(below) = child(&graph, filter) else { continue };
        tolerate_refusal(set_drive(qmp, &path(qdev), below).await.map(|()| Value::Null))?;
    }
    Ok(())
}

/// The node that a filter stands on.
fn child<'a>(graph: &'a Value, filter: &str) -> Option<&'a str> {
    let id = node_id(graph, filter);
    let edge = rows(&graph["edges"])
        .iter()
        .find(|edge| edge["parent"] == *id && edge["name"] == "file")?;
    let node = rows(&graph["nodes"])
        .iter()
        .find(|node| node["type"] == "block-driver" && node["id"] == edge["child"])?;
    node["name"].as_str()
}

#[cfg(test)]
mod test {
    use super::*;

    fn graph() -> Value {
        json!({
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
        })
    }

    #[test]
    fn filter_stands_only_where_one_device_writes() {
        let block = json!([
            { "device": "a", "qdev": "vda", "inserted": { "node-name": "na" } },
            { "device": "b", "qdev": "/machine/unattached/device[3]", "inserted": { "node-name": "nb" } },
            { "device": "c", "inserted": { "node-name": "nc" } },
            { "device": "d", "qdev": "/machine/x" },
        ]);
        let found = filterable(&block, &graph());
        assert_eq!(found, HashMap::from([("na".to_owned(), "/machine/peripheral/vda".to_owned())]));
    }

    #[test]
    fn filter_is_replaced_by_what_is_under_it() {
        assert_eq!(child(&graph(), "sp-1-0-cbw"), Some("na"));
        assert_eq!(child(&graph(), "nb"), None);
    }
}
