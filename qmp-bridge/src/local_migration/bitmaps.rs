//! Dirty bitmaps that go along: those that live in QEMU's memory only. Persistent ones travel in
//! their qcow2 image.
//!
//! The two QEMUs may call a disk's node by different names (`#block123` and one that the command
//! line gives), so the stream carries the name that the destination has.

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
        let reply = source.execute_json("query-named-block-nodes", json!({ "flat": true })).await?;
        Ok(Self::parse(&reply, nodes))
    }

    fn parse(reply: &Value, nodes: &[(String, String)]) -> Self {
        let mut map = Self::default();
        for (from, to) in nodes {
            let rows = reply.as_array().into_iter().flatten();
            let bitmaps = rows
                .filter(|row| row["node-name"] == from.as_str())
                .flat_map(|row| row["dirty-bitmaps"].as_array());
            let (carried, left): (Vec<&Value>, Vec<&Value>) =
                bitmaps.flatten().filter(|row| in_memory(row)).partition(|row| is_sound(row));
            let name = |row: &&Value| row["name"].as_str().unwrap_or_default().to_owned();
            map.left.extend(left.iter().map(name));
            if !carried.is_empty() {
                map.nodes.push(Node {
                    from: from.clone(),
                    to: to.clone(),
                    bitmaps: carried.iter().map(name).collect(),
                });
            }
        }
        map
    }

    /// Whether no bitmap is migrated.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Bitmaps that cannot go along, for they are in use or damaged.
    pub fn left_behind(&self) -> &[String] {
        &self.left
    }

    pub(super) fn for_source(&self) -> Value {
        self.mapping(|node| (&node.from, &node.to))
    }

    pub(super) fn for_destination(&self) -> Value {
        self.mapping(|node| (&node.to, &node.to))
    }

    fn mapping<'a>(&'a self, names: impl Fn(&'a Node) -> (&'a String, &'a String)) -> Value {
        let node = |node: &'a Node| {
            let (name, alias) = names(node);
            let bitmaps: Vec<Value> =
                node.bitmaps.iter().map(|name| json!({ "name": name, "alias": name })).collect();
            json!({ "node-name": name, "alias": alias, "bitmaps": bitmaps })
        };
        self.nodes.iter().map(node).collect()
    }
}

/// A nameless one belongs to a job.
fn in_memory(row: &Value) -> bool {
    row["persistent"] != true && row["name"].as_str().is_some_and(|name| !name.is_empty())
}

fn is_sound(row: &Value) -> bool {
    row["busy"] != true
        && row["inconsistent"] != true
        && row["name"].as_str().is_some_and(|name| name.len() <= MAX_NAME)
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
        let map = BitmapMap::parse(&reply, &nodes);
        let bitmaps = json!([{ "name": "a", "alias": "a" }]);
        assert_eq!(
            map.for_source(),
            json!([{ "node-name": "#block1", "alias": "sp-x", "bitmaps": bitmaps }])
        );
        assert_eq!(
            map.for_destination(),
            json!([{ "node-name": "sp-x", "alias": "sp-x", "bitmaps": bitmaps }])
        );
        assert_eq!(map.left_behind(), ["b"]);
        assert!(BitmapMap::parse(&reply, &nodes[1..]).is_empty());
    }
}
