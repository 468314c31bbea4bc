//! After a completed migration QEMU has inactivated its disks: their nodes are inactive until
//! `cont`, and an inactive node takes no transaction. This makes them active before, with the guest
//! still stopped.
//!
//! QEMU has a command for it since 10.0. Before, there is a side effect: a block export activates
//! the node it exports and all below it. So each writable node on which no other node stands is
//! exported for a while, read-only, under a name that no client knows. The NBD server must run for
//! that: the server of the disk capture, or one that is started here.

use std::collections::HashSet;
use std::path::Path;

use serde_json::json;

use crate::jobs::remove_exports;
use crate::migration::MigrationError;
use crate::nbd_server::{self, ServerError};
use crate::qmp::replies::{BlockDeviceInfo, BlockGraph};
use crate::qmp::{Qmp, QmpError};

const SET_ACTIVE: &str = "blockdev-set-active";
/// Begins the kinds of the exports; the disk capture's clean-up would find them too.
const EXPORTS: &str = "activate-";

/// How the nodes of a QEMU come back.
#[derive(Debug)]
pub(super) enum Activation {
    Command,
    Exports { roots: Vec<String> },
}

impl Activation {
    /// Finds the way while the guest runs. `socket`: where the NBD server may listen if none runs
    /// yet.
    pub(super) async fn plan(qmp: &Qmp, socket: &Path) -> Result<Self, MigrationError> {
        if qmp.query_commands().await?.iter().any(|command| command.name == SET_ACTIVE) {
            return Ok(Self::Command);
        }
        let roots = writable_roots(qmp).await?;
        if !roots.is_empty() {
            ensure_server(qmp, socket).await?;
        }
        Ok(Self::Exports { roots })
    }

    /// To be called with the guest stopped after the migration has completed.
    pub(super) async fn run(&self, qmp: &Qmp) -> Result<(), MigrationError> {
        let failed = |what: &str, error: QmpError| match error {
            error if error.is_refusal() => {
                MigrationError::Activate { why: format!("{what}: {error}") }
            }
            error => MigrationError::Qmp(error),
        };
        match self {
            Self::Command => {
                let done = qmp.execute_json(SET_ACTIVE, json!({ "active": true })).await;
                done.map(drop).map_err(|error| failed("all nodes", error))
            }
            Self::Exports { roots } => {
                // All at once: QEMU takes them one by one, but the guest waits for one round trip
                // only.
                let exports = roots.iter().enumerate().map(|(index, root)| async move {
                    let id = qmp.names().name(&format!("{EXPORTS}{index}"));
                    let options = json!({ "type": "nbd", "id": id, "name": id, "node-name": root });
                    qmp.execute_json("block-export-add", options)
                        .await
                        .map_err(|error| failed(root, error))
                });
                futures::future::try_join_all(exports).await.map(drop)
            }
        }
    }
}

async fn ensure_server(qmp: &Qmp, socket: &Path) -> Result<(), MigrationError> {
    match nbd_server::start(qmp, socket).await {
        // One runs already, that of the disk capture or another tool's: exports for a moment do it
        // no harm.
        Err(ServerError::InUse { .. }) => Ok(()),
        other => Ok(other?),
    }
}

/// Removes the exports of any session, and the server that it started at `socket`, if it did.
/// With the guest running; repeatable.
pub(super) async fn remove(qmp: &Qmp, socket: &Path) -> Result<(), MigrationError> {
    let exports = qmp.names().name(EXPORTS);
    remove_exports(qmp, |id| id.starts_with(&exports)).await?;
    Ok(nbd_server::stop_unused(qmp, socket).await?)
}

/// Named nodes that can be written and have no node above them.
async fn writable_roots(qmp: &Qmp) -> Result<Vec<String>, QmpError> {
    Ok(roots(qmp.query_block_nodes().await?, &qmp.query_block_graph().await?))
}

fn roots(nodes: Vec<BlockDeviceInfo>, graph: &BlockGraph) -> Vec<String> {
    let ids: HashSet<u64> = graph.drivers().map(|node| node.id).collect();
    let is_below_a_node = |name: &str| graph.above(name).any(|edge| ids.contains(&edge.parent));
    let writable = nodes.into_iter().filter(|node| !node.ro).map(|node| node.node_name);
    writable.filter(|name| graph.id(name).is_some() && !is_below_a_node(name)).collect()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn roots_are_writable_and_have_no_node_above() {
        let node = |name: &str, ro: bool| {
            json!({
                "node-name": name, "ro": ro, "drv": "raw", "file": "", "encrypted": false,
                "image": { "filename": "", "format": "raw", "virtual-size": 0 },
            })
        };
        let nodes = json!([
            node("overlay", false),
            node("overlay-file", false),
            node("disk", false),
            node("cd", true),
            node("spare", false)
        ]);
        let vertex =
            |id: u64, kind: &str, name: &str| json!({ "id": id, "type": kind, "name": name });
        let graph = json!({
            "nodes": [
                vertex(1, "block-driver", "overlay"), vertex(2, "block-driver", "overlay-file"), vertex(3, "block-driver", "disk"),
                vertex(4, "block-driver", "cd"), vertex(5, "block-driver", "spare"), vertex(6, "block-backend", "drive0"),
            ],
            // A device stands above a node, which is no node.
            "edges": [
                { "parent": 1, "child": 2, "name": "file", "perm": [] }, { "parent": 1, "child": 3, "name": "backing", "perm": [] },
                { "parent": 6, "child": 3, "name": "root", "perm": [] }, { "parent": 6, "child": 5, "name": "root", "perm": [] },
            ],
        });
        let nodes: Vec<BlockDeviceInfo> = serde_json::from_value(nodes).expect("nodes");
        let graph: BlockGraph = serde_json::from_value(graph).expect("a graph");
        assert_eq!(roots(nodes, &graph), ["overlay", "spare"]);
        assert!(roots(Vec::new(), &BlockGraph::default()).is_empty());
    }
}
