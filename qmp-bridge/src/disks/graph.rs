//! Which block node stands on which, from `x-debug-query-block-graph`.

use std::collections::HashMap;

use serde_json::Value;

/// Edges by parent node and edge name.
#[derive(Debug, Default)]
pub(super) struct Graph {
    children: HashMap<(String, String), String>,
}

impl Graph {
    /// Block backends and jobs are nodes of that graph too, but no parents that anybody asks for.
    pub(super) fn parse(reply: &Value) -> Self {
        let list = |field: &str| reply[field].as_array().map(Vec::as_slice).unwrap_or_default();
        let drivers = list("nodes").iter().filter(|node| node["type"] == "block-driver");
        let names: HashMap<u64, &str> = drivers.filter_map(|node| Some((node["id"].as_u64()?, node["name"].as_str()?))).collect();
        let edge = |edge: &Value| {
            let end = |side: &str| names.get(&edge[side].as_u64()?).map(|name| (*name).to_owned());
            Some(((end("parent")?, edge["name"].as_str()?.to_owned()), end("child")?))
        };
        Self { children: list("edges").iter().filter_map(edge).collect() }
    }

    pub(super) fn child(&self, parent: &str, edge: &str) -> Option<&str> {
        self.children.get(&(parent.to_owned(), edge.to_owned())).map(String::as_str)
    }
}
