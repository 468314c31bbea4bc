//! What is set, open and under way in a QEMU: a helper that came and went must have left it as it
//! was.

use crate::process::Pid;
use crate::qmp::QmpClient;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Debug, PartialEq)]
pub struct Footprint {
    capabilities: BTreeMap<String, bool>,
    parameters: BTreeMap<String, Value>,
    nodes: BTreeSet<String>,
    /// Node and name.
    bitmaps: BTreeSet<(String, String)>,
    jobs: BTreeSet<String>,
    exports: BTreeSet<String>,
    objects: BTreeSet<String>,
    chardevs: BTreeSet<String>,
}

impl Footprint {
    pub fn of(monitor: &mut QmpClient) -> Self {
        let mut ask = |command: &str, arguments: Value| monitor.execute(command, arguments);
        let listed = ask("query-migrate-capabilities", json!({}));
        let capabilities =
            each(&listed).map(|one| (text(one, "capability"), one["state"] == true)).collect();
        let parameters = ask("query-migrate-parameters", json!({}));
        let parameters = parameters.as_object().cloned().unwrap_or_default().into_iter().collect();
        let blocks = ask("query-named-block-nodes", json!({}));
        let bitmaps = each(&blocks).flat_map(bitmaps_of).collect();
        let mut names = |command: &str, arguments: Value, key: &str| -> BTreeSet<String> {
            each(&ask(command, arguments)).map(|one| text(one, key)).collect()
        };
        let jobs =
            &names("query-jobs", json!({}), "id") | &names("query-block-jobs", json!({}), "device");
        let exports = names("query-block-exports", json!({}), "id");
        let chardevs = names("query-chardev", json!({}), "label");
        let objects = names("qom-list", json!({"path": "/objects"}), "name");
        let nodes = each(&blocks).map(|node| text(node, "node-name")).collect();
        Self { capabilities, parameters, nodes, bitmaps, jobs, exports, objects, chardevs }
    }

    /// The bitmaps, taken out: node and name.
    pub fn take_bitmaps(&mut self) -> BTreeSet<(String, String)> {
        std::mem::take(&mut self.bitmaps)
    }

    pub fn capability(&self, name: &str) -> Option<bool> {
        self.capabilities.get(name).copied()
    }

    /// Every difference, in words.
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let sets = [
            ("nodes", &self.nodes, &now.nodes),
            ("jobs", &self.jobs, &now.jobs),
            ("exports", &self.exports, &now.exports),
            ("objects", &self.objects, &now.objects),
            ("chardevs", &self.chardevs, &now.chardevs),
        ];
        let mut all: Vec<String> = sets
            .iter()
            .filter(|(_, then, now)| then != now)
            .map(|(what, then, now)| {
                format!(
                    "{what}: {:?} gone, {:?} new",
                    then.difference(now).collect::<Vec<_>>(),
                    now.difference(then).collect::<Vec<_>>()
                )
            })
            .collect();
        all.extend(changes("capability", &self.capabilities, &now.capabilities));
        all.extend(changes("parameter", &self.parameters, &now.parameters));
        if self.bitmaps != now.bitmaps {
            all.push(format!("bitmaps: {:?}, {:?} before", now.bitmaps, self.bitmaps));
        }
        all
    }
}

fn bitmaps_of(node: &Value) -> impl Iterator<Item = (String, String)> {
    each(&node["dirty-bitmaps"]).map(|map| (text(node, "node-name"), text(map, "name")))
}

fn changes<V: PartialEq + std::fmt::Debug>(
    what: &str,
    then: &BTreeMap<String, V>,
    now: &BTreeMap<String, V>,
) -> Vec<String> {
    let keys: BTreeSet<&String> = then.keys().chain(now.keys()).collect();
    let changed = keys.into_iter().filter(|key| then.get(*key) != now.get(*key));
    changed
        .map(|key| format!("{what} {key}: {:?}, {:?} before", now.get(key), then.get(key)))
        .collect()
}

fn each(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

fn text(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or_default().to_owned()
}

/// How many descriptors of each kind a process has open; files by their path.
pub fn descriptors(pid: Pid) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        let target = std::fs::read_link(entry.path()).unwrap_or_default().display().to_string();
        let kind = if target.starts_with('/') {
            target
        } else {
            target.split(':').next().unwrap_or_default().to_owned()
        };
        *kinds.entry(kind).or_default() += 1;
    }
    kinds
}
