//! Dirty bitmaps that go along: those that live in QEMU's memory only. Persistent ones travel in
//! their qcow2 image.
//!
//! The two QEMUs may call a disk's node by different names (`#block123` and one that the command
//! line gives), so the stream carries the name that the destination has.

use serde::Deserialize;
use serde_json::{Value, json};

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
        let rows: Vec<NodeRow> =
            source.query("query-named-block-nodes", json!({ "flat": true })).await?;
        Ok(Self::of(&rows, nodes))
    }

    fn of(rows: &[NodeRow], nodes: &[(String, String)]) -> Self {
        let mut map = Self::default();
        for (from, to) in nodes {
            let rows = rows.iter().filter(|row| row.node_name.as_deref() == Some(from));
            let bitmaps = rows.flat_map(|row| &row.dirty_bitmaps).filter_map(BitmapRow::in_memory);
            let (carried, left): (Vec<_>, Vec<_>) = bitmaps.partition(|(_, row)| row.is_sound());
            let names = |list: Vec<(&String, &BitmapRow)>| {
                list.into_iter().map(|(name, _)| name.clone()).collect::<Vec<_>>()
            };
            map.left.extend(names(left));
            let bitmaps = names(carried);
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

/// A row of `query-named-block-nodes`.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct NodeRow {
    node_name: Option<String>,
    #[serde(default)]
    dirty_bitmaps: Vec<BitmapRow>,
}

#[derive(Deserialize)]
struct BitmapRow {
    name: Option<String>,
    persistent: bool,
    busy: bool,
    #[serde(default)]
    inconsistent: bool,
}

impl BitmapRow {
    /// A nameless one belongs to a job.
    fn in_memory(&self) -> Option<(&String, &Self)> {
        let name = self.name.as_ref().filter(|name| !name.is_empty() && !self.persistent)?;
        Some((name, self))
    }

    fn is_sound(&self) -> bool {
        let is_short = self.name.as_ref().is_some_and(|name| name.len() <= MAX_NAME);
        !self.busy && !self.inconsistent && is_short
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn bitmaps_in_memory_go_under_the_new_nodes_name() {
        let reply = json!([
            { "node-name": "#block1", "dirty-bitmaps": [
                { "name": "a", "persistent": false, "busy": false }, { "name": "disk", "persistent": true, "busy": false },
                { "name": "b", "persistent": false, "busy": true }, { "persistent": false, "busy": false } ] },
            { "node-name": "#block2" },
            { "node-name": "other", "dirty-bitmaps": [{ "name": "c", "persistent": false, "busy": false }] },
        ]);
        let nodes =
            [("#block1".to_owned(), "sp-x".to_owned()), ("#block2".to_owned(), "sp-y".to_owned())];
        let rows: Vec<NodeRow> = serde_json::from_value(reply).expect("a reply");
        let map = BitmapMap::of(&rows, &nodes);
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
        assert_eq!(BitmapMap::of(&rows, &nodes[1..]).for_source(), None);
    }
}
