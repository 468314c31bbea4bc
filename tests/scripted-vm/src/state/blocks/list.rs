//! What QEMU lists of its disks.

use serde_json::{Value, json};

use super::{Blocks, Drive, Node};

impl Blocks {
    pub(super) fn query(&self, command: &str) -> Option<Value> {
        Some(match command {
            "query-block" => self.drives.iter().map(|drive| self.drive_row(drive)).collect(),
            "query-block-jobs" => self
                .jobs
                .iter()
                .filter(|job| job.kind == "backup")
                .map(|job| {
                    json!({
                        "device": job.id, "type": job.kind, "status": job.status,
                        "offset": 0, "len": 1, "io-status": "ok",
                    })
                })
                .collect(),
            "query-jobs" => self
                .jobs
                .iter()
                .map(|job| {
                    let mut row = json!({ "id": job.id, "type": job.kind, "status": job.status });
                    if let Some(error) = &job.error {
                        row["error"] = json!(error);
                    }
                    row
                })
                .collect(),
            "query-named-block-nodes" => {
                self.nodes.iter().map(|node| self.node_row(node)).collect()
            }
            "query-block-exports" => self
                .exports
                .iter()
                .map(|export| json!({ "id": export.id, "type": "nbd", "node-name": export.node }))
                .collect(),
            "x-debug-query-block-graph" => self.graph(),
            _ => return None,
        })
    }

    fn drive_row(&self, drive: &Drive) -> Value {
        let mut row = json!({
            "device": drive.device, "qdev": drive.qdev, "type": "unknown", "locked": false,
            "removable": false, "io-status": "ok",
        });
        if let Some(node) = drive.node.as_deref().and_then(|node| self.node(node)) {
            row["inserted"] = self.node_row(node);
        }
        row
    }

    /// What a node says of its size is that of the disk it stands on.
    fn bytes(&self, node: &Node) -> u64 {
        match node.driver.as_str() {
            "copy-before-write" | "snapshot-access" => {
                let below = node.child("file").and_then(|below| self.node(below));
                below.map_or(0, |below| self.bytes(below))
            }
            _ => node.data.len() as u64,
        }
    }

    fn node_row(&self, node: &Node) -> Value {
        let bytes = self.bytes(node);
        let mut row = json!({
            "node-name": node.name, "drv": node.driver, "file": node.filename, "ro": node.read_only,
            "encrypted": false,
            "image": {
                "virtual-size": bytes, "actual-size": bytes, "filename": node.filename,
                "format": node.driver,
            },
        });
        if !node.bitmaps.is_empty() {
            let bitmap = |bitmap: &super::Bitmap| {
                json!({
                    "name": bitmap.name, "granularity": bitmap.granularity, "count": bitmap.count(),
                    "recording": bitmap.is_recording, "busy": false, "persistent": false,
                })
            };
            row["dirty-bitmaps"] = node.bitmaps.iter().map(bitmap).collect();
        }
        row
    }

    fn graph(&self) -> Value {
        let id =
            |name: &str| self.nodes.iter().position(|node| node.name == name).map(|at| at + 100);
        let mut nodes: Vec<Value> = Vec::new();
        let mut edges: Vec<Value> = Vec::new();
        let mut edge = |parent: usize, child: &str, name: &str, perm: Value| {
            edges.push(json!({ "parent": parent, "child": id(child), "name": name, "perm": perm }));
        };
        for node in &self.nodes {
            let own = id(&node.name).expect("listed");
            nodes.push(json!({ "id": own, "type": "block-driver", "name": node.name }));
            node.children.iter().for_each(|(name, child)| edge(own, child, name, json!([])));
        }
        let writes = json!(["consistent-read", "write"]);
        for (number, drive) in self.drives.iter().enumerate() {
            nodes.push(json!({ "id": number + 1, "type": "block-backend", "name": drive.device }));
            if let Some(node) = &drive.node {
                edge(number + 1, node, "root", writes.clone());
            }
        }
        for (number, export) in self.exports.iter().enumerate() {
            nodes.push(json!({ "id": number + 50, "type": "block-backend", "name": "" }));
            let perm = if export.is_writable { writes.clone() } else { json!(["consistent-read"]) };
            edge(number + 50, &export.node, "root", perm);
        }
        json!({ "nodes": nodes, "edges": edges })
    }
}
