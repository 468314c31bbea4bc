//! The import rules of ARCHITECTURE.md, checked against what Cargo says.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, MetadataCommand, Package};

/// Who may import which of our own crates, outside of tests.
const ALLOWED: &[(&str, &[&str])] = &[
    ("checkpoint-format", &[]),
    ("checkpoint-store", &["checkpoint-format"]),
    ("dirty-tracker", &["checkpoint-format", "plugin-protocol"]),
    ("plugin-protocol", &[]),
    ("qemu-cmdline", &[]),
    ("qmp-bridge", &[]),
    ("stillpoint", &["checkpoint-format", "checkpoint-store", "dirty-tracker", "qemu-cmdline", "qmp-bridge"]),
    ("stillpoint-documents", &["stillpoint"]),
    ("stillpoint-plugin", &["plugin-protocol"]),
    ("stillpoint-tests", &["checkpoint-format", "checkpoint-store", "dirty-tracker", "qemu-cmdline", "qmp-bridge"]),
    ("witness", &[]),
];

fn packages() -> Vec<Package> {
    let metadata = MetadataCommand::new().no_deps().exec().expect("cargo metadata");
    metadata.packages
}

fn imports(package: &Package) -> BTreeSet<String> {
    let normal = package.dependencies.iter().filter(|dependency| dependency.kind == DependencyKind::Normal);
    normal.map(|dependency| dependency.name.clone()).collect()
}

#[test]
fn crates_import_only_what_the_architecture_allows() {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    let ours: BTreeSet<String> = packages().iter().map(|package| package.name.to_string()).collect();
    assert_eq!(ours, allowed.keys().map(ToString::to_string).collect(), "a crate came or went: say in ALLOWED what it may import");
    for package in packages() {
        let own: Vec<String> = imports(&package).intersection(&ours).cloned().collect();
        let wrong: Vec<&String> = own.iter().filter(|name| !allowed[package.name.as_str()].contains(&name.as_str())).collect();
        assert!(wrong.is_empty(), "{} imports {wrong:?}, which ARCHITECTURE.md does not allow", package.name);
    }
}

#[test]
fn hdfs_appears_only_in_the_store() {
    let users = packages().into_iter().filter(|package| imports(package).contains("hdfs-native"));
    assert_eq!(users.map(|package| package.name.to_string()).collect::<Vec<_>>(), ["checkpoint-store"]);
}
