//! Which block node is above which, from `x-debug-query-block-graph`.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

/// Edges between nodes by parent and edge name, and the nodes that anything at all is above.
#[derive(Debug, Default)]
pub(super) struct Graph {
    children: HashMap<(String, String), String>,
    /// Nodes below another node, a device, an export or a job.
    used: HashSet<String>,
}

impl Graph {
    /// Block backends and jobs are nodes of that graph too: parents, but none that has a name among
    /// block nodes.
    pub(super) fn parse(reply: &Value) -> Self {
        let list = |field: &str| reply[field].as_array().map(Vec::as_slice).unwrap_or_default();
        let drivers = list("nodes").iter().filter(|node| node["type"] == "block-driver");
        let names: HashMap<u64, &str> = drivers
            .filter_map(|node| Some((node["id"].as_u64()?, node["name"].as_str()?)))
            .collect();
        let end = |edge: &Value, side: &str| {
            names.get(&edge[side].as_u64()?).map(|name| (*name).to_owned())
        };
        let edge = |edge: &Value| {
            Some(((end(edge, "parent")?, edge["name"].as_str()?.to_owned()), end(edge, "child")?))
        };
        Self {
            children: list("edges").iter().filter_map(edge).collect(),
            used: list("edges").iter().filter_map(|edge| end(edge, "child")).collect(),
        }
    }

    pub(super) fn child(&self, parent: &str, edge: &str) -> Option<&str> {
        self.children.get(&(parent.to_owned(), edge.to_owned())).map(String::as_str)
    }

    pub(super) fn is_used(&self, node: &str) -> bool {
        self.used.contains(node)
    }
}
