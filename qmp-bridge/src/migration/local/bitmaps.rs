//! Dirty bitmaps that go along: those that live in QEMU's memory only. Persistent ones travel in
//! their qcow2 image.
//!
//! The two QEMUs may call a disk's node by different names (`#block123` and one that the command
//! line gives), so the stream carries the name that the destination has.

use serde_json::{Value, json};

use crate::qmp::replies::{BlockDeviceInfo, BlockDirtyInfo};
use crate::qmp::{Qmp, QmpError};

/// QEMU's limit for a bitmap's name in a stream.
const MAX_NAME: usize = 255;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    from: String,
    to: String,
    bitmaps: Vec<String>,
}

/// Which bitmaps of which node go where.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BitmapMap {
    nodes: Vec<Node>,
    left: Vec<String>,
}

impl BitmapMap {
    /// `nodes`: the node that each disk has in the source and in the destination.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn survey(source: &Qmp, nodes: &[(String, String)]) -> Result<Self, QmpError> {
        Ok(Self::of(&source.query_block_nodes().await?, nodes))
    }

    fn of(known: &[BlockDeviceInfo], nodes: &[(String, String)]) -> Self {
        let mut map = Self::default();
        for (from, to) in nodes {
            let known = known.iter().filter(|node| node.node_name == *from);
            let mut bitmaps = Vec::new();
            for (name, can_go) in known.flat_map(|node| &node.dirty_bitmaps).filter_map(in_memory) {
                if can_go { &mut bitmaps } else { &mut map.left }.push(name.clone());
            }
            if !bitmaps.is_empty() {
                map.nodes.push(Node { from: from.clone(), to: to.clone(), bitmaps });
            }
        }
        map
    }

    /// Bitmaps that cannot go along, for they are in use or damaged.
    pub fn left_behind(&self) -> &[String] {
        &self.left
    }

    /// None if no bitmap is migrated.
    pub(super) fn for_source(&self) -> Option<Value> {
        self.mapping(|node| (&node.from, &node.to))
    }

    pub(super) fn for_destination(&self) -> Option<Value> {
        self.mapping(|node| (&node.to, &node.to))
    }

    fn mapping<'a>(
        &'a self,
        names: impl Fn(&'a Node) -> (&'a String, &'a String),
    ) -> Option<Value> {
        let node = |node: &'a Node| {
            let (name, alias) = names(node);
            let bitmaps: Vec<Value> =
                node.bitmaps.iter().map(|name| json!({ "name": name, "alias": name })).collect();
            json!({ "node-name": name, "alias": alias, "bitmaps": bitmaps })
        };
        (!self.nodes.is_empty()).then(|| self.nodes.iter().map(node).collect())
    }
}

/// The name of a bitmap that lives in memory only, and whether QEMU can migrate it. A nameless one
/// belongs to a job.
fn in_memory(bitmap: &BlockDirtyInfo) -> Option<(&String, bool)> {
    let name = bitmap.name.as_ref().filter(|name| !name.is_empty() && !bitmap.persistent)?;
    Some((name, !bitmap.busy && !bitmap.inconsistent && name.len() <= MAX_NAME))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn bitmaps_in_memory_go_under_the_new_nodes_name() {
        let bitmap = |name: Option<&str>, persistent: bool, busy: bool| {
            json!({ "name": name, "persistent": persistent, "busy": busy, "recording": true,
                    "granularity": 65536, "count": 0 })
        };
        let node = |name: &str, bitmaps: &[Value]| {
            json!({ "node-name": name, "drv": "qcow2", "file": "x", "ro": false, "encrypted": false,
                    "image": { "virtual-size": 1 }, "dirty-bitmaps": bitmaps })
        };
        let several = [
            bitmap(Some("a"), false, false),
            bitmap(Some("disk"), true, false),
            bitmap(Some("b"), false, true),
            bitmap(None, false, false),
        ];
        let known = json!([
            node("#block1", &several),
            node("#block2", &[]),
            node("other", &[bitmap(Some("c"), false, false)]),
        ]);
        let nodes =
            [("#block1".to_owned(), "sp-x".to_owned()), ("#block2".to_owned(), "sp-y".to_owned())];
        let known: Vec<BlockDeviceInfo> = serde_json::from_value(known).expect("a reply");
        let map = BitmapMap::of(&known, &nodes);
        let bitmaps = json!([{ "name": "a", "alias": "a" }]);
        assert_eq!(
            map.for_source().expect("a mapping"),
            json!([{ "node-name": "#block1", "alias": "sp-x", "bitmaps": bitmaps }])
        );
        assert_eq!(
            map.for_destination().expect("a mapping"),
            json!([{ "node-name": "sp-x", "alias": "sp-x", "bitmaps": bitmaps }])
        );
        assert_eq!(map.left_behind(), ["b"]);
        assert_eq!(BitmapMap::of(&known, &nodes[1..]).for_source(), None);
    }
}
