//! Replies as QEMU gives them, shortened to the fields that count.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::qmp::replies::{BlockDeviceInfo, BlockGraph};

fn reply<T: DeserializeOwned>(reply: Value) -> T {
    serde_json::from_value(reply).expect("a reply")
}

fn is_unsupported(error: &DiskError) -> bool {
    matches!(error, DiskError::Unsupported { .. })
}

fn node(name: &str, driver: &str, file: &str) -> BlockDeviceInfo {
    reply(json!({"node-name": name, "drv": driver, "file": file, "ro": false, "encrypted": false,
                 "image": {"virtual-size": 1 << 20}}))
}

fn graph(edges: &[(&str, &str, &str)]) -> BlockGraph {
    let mut names: Vec<&str> =
        edges.iter().flat_map(|(parent, _, child)| [*parent, *child]).collect();
    names.sort_unstable();
    names.dedup();
    let id = |wanted: &str| names.iter().position(|name| *name == wanted);
    let nodes: Vec<Value> = names
        .iter()
        .map(|name| json!({"id": id(name), "type": "block-driver", "name": name}))
        .collect();
    let edges: Vec<Value> = edges
        .iter()
        .map(|(p, name, c)| json!({"parent": id(p), "name": name, "child": id(c), "perm": []}))
        .collect();
    reply(json!({"nodes": nodes, "edges": edges}))
}

fn survey(
    nodes: &[BlockDeviceInfo],
    edges: &[(&str, &str, &str)],
    block: Value,
) -> Result<Disks, DiskError> {
    let block: Vec<_> = reply(block);
    Survey::new(nodes.to_vec(), graph(edges), Some(Path::new("/vm"))).read(&block)
}

fn drive(node: &str) -> Value {
    json!([{"device": "", "qdev": "/machine/peripheral/vda/virtio-backend", "removable": false,
            "inserted": {"node-name": node, "ro": false}}])
}

#[test]
fn an_overlay_on_two_layers() {
    let nodes = [
        node("top", "qcow2", "top.qcow2"),
        node("f0", "file", "top.qcow2"),
        node("mid", "qcow2", "/base/mid.qcow2"),
        node("f1", "file", "/base/mid.qcow2"),
        node("low", "raw", "/base/low.img"),
        node("f2", "file", "file:/base/low.img"),
    ];
    let edges = [
        ("top", "file", "f0"),
        ("top", "backing", "mid"),
        ("mid", "file", "f1"),
        ("mid", "backing", "low"),
        ("low", "file", "f2"),
    ];
    let disks = survey(&nodes, &edges, drive("top")).expect("disks").disks;
    assert_eq!(disks.len(), 1);
    assert_eq!(disks[0].file, Path::new("/vm/top.qcow2"));
    assert_eq!(
        (disks[0].node.as_str(), disks[0].name.as_str()),
        ("top", "top"),
        "the node's name until the command line gives a stable one"
    );
    assert_eq!(disks[0].device, "/machine/peripheral/vda/virtio-backend");
    let layers: Vec<_> =
        disks[0].backing.iter().map(|b| (b.file.to_str().expect("path"), b.format)).collect();
    assert_eq!(
        layers,
        [("/base/mid.qcow2", ImageFormat::Qcow2), ("/base/low.img", ImageFormat::Raw)]
    );
}

#[test]
fn a_bare_file_node_is_raw_and_an_empty_drive_is_no_disk() {
    let block = json!([
        {"device": "d0", "removable": false, "inserted": {"node-name": "f", "ro": true}},
        {"device": "cd", "removable": true},
    ]);
    let disks = survey(&[node("f", "file", "/x.img")], &[], block).expect("disks");
    assert_eq!((disks.disks[0].format, disks.disks[0].read_only), (ImageFormat::Raw, true));
    assert_eq!(disks.empty, [EmptyDrive { device: "cd".into(), qdev: None, is_named: true }]);
    assert_eq!(disks.writable().count(), 0);
}

#[test]
fn a_survey_tells_each_drive_by_itself() {
    let block = json!([
        {"device": "bad", "removable": false, "inserted": {"node-name": "n", "ro": false}},
        {"device": "good", "removable": false, "inserted": {"node-name": "f", "ro": false}},
        {"device": "cd", "removable": true},
    ]);
    let nodes = vec![node("n", "vvfat", "fat:/x"), node("f", "file", "/x.img")];
    let block: Vec<_> = reply(block);
    let drives = Survey::new(nodes, graph(&[]), None).drives(&block);
    let has_disk =
        |drive: &Drive| drive.disk.as_ref().map(|medium| matches!(medium, Medium::Disk(_))).ok();
    let told: Vec<_> =
        drives.iter().map(|drive| (drive.device.as_str(), has_disk(drive))).collect();
    assert_eq!(told, [("bad", None), ("good", Some(true)), ("cd", Some(false))]);
}

#[test]
fn what_cannot_come_back_is_refused_with_a_reason() {
    let cases = [
        (vec![node("n", "vvfat", "fat:/x")], vec![], "directory of the host"),
        (
            vec![node("n", "raw", ""), node("f", "nbd", "nbd://h")],
            vec![("n", "file", "f")],
            "network server",
        ),
        (
            vec![node("n", "preallocate", ""), node("f", "qcow2", "x")],
            vec![("n", "file", "f")],
            "filter",
        ),
        (
            vec![node("n", "vmdk", "x"), node("f", "file", "x")],
            vec![("n", "file", "f")],
            "qemu-img convert",
        ),
        (vec![node("n", "quorum", "")], vec![], "several images"),
        (vec![node("n", "file", "/dev/fdset/1")], vec![], "no path of its own"),
        (
            vec![node("n", "qcow2", "x"), node("f", "file", "x")],
            vec![("n", "file", "f"), ("n", "data-file", "f")],
            "data file",
        ),
        (vec![BlockDeviceInfo { encrypted: true, ..node("n", "qcow2", "") }], vec![], "encrypted"),
    ];
    for (nodes, edges, reason) in cases {
        let error = survey(&nodes, &edges, drive("n")).expect_err(reason);
        assert!(error.to_string().contains(reason), "{error}");
        assert!(!error.is_retryable());
    }
    let error = survey(&[], &[], drive("gone")).expect_err("missing node");
    assert!(error.is_retryable());
}

#[test]
fn slice_of_a_file_is_refused_wherever_it_is() {
    let part = |options: &str, size: u64| {
        let mut part = node("n", "raw", &format!("json:{options}"));
        part.image.virtual_size = size;
        part
    };
    let whole = 1 << 20;
    let cases = [
        (r#"{"driver":"raw","offset":65536,"size":4096,"file":{}}"#, 4096, true),
        // A file of an odd length is rounded up to sectors, and so may its part be, to the same
        // size.
        (r#"{"driver":"raw","offset":"100","file":{}}"#, whole, true),
        (r#"{"driver":"raw","offset":655...."#, whole, true),
        (r#"{"driver":"raw","size":1048576,"file":{}}"#, whole, false),
        (r#"{"driver":"raw","file":{"driver":"throttle"}}"#, whole, false),
    ];
    for (options, size, refused) in cases {
        let nodes = [
            part(options, size),
            node("f", "file", "x"),
            node("top", "qcow2", "t"),
            node("tf", "file", "t"),
        ];
        let edges = [("n", "file", "f"), ("top", "file", "tf"), ("top", "backing", "n")];
        for device in ["n", "top"] {
            let found = survey(&nodes, &edges, drive(device));
            assert_eq!(found.is_err(), refused, "{device}: {options}");
            assert!(
                !refused
                    || found.is_err_and(
                        |error| is_unsupported(&error) && error.to_string().contains("part")
                    )
            );
        }
    }
}

#[test]
fn block_device_is_a_disk_and_no_layer() {
    let nodes =
        [node("d", "host_device", "/dev/vg/d"), node("top", "qcow2", "t"), node("tf", "file", "t")];
    let edges = [("top", "file", "tf"), ("top", "backing", "d")];
    let found = survey(&nodes, &edges, drive("d")).expect("a writable one");
    assert!(found.disks[0].is_device && found.disks[0].format == ImageFormat::Raw);
    let read_only =
        json!([{"device": "d", "removable": false, "inserted": {"node-name": "d", "ro": true}}]);
    for block in [read_only, drive("top")] {
        let error = survey(&nodes, &edges, block).expect_err("a layer on a device");
        assert!(is_unsupported(&error) && error.to_string().contains("/dev/vg/d"), "{error}");
    }
}

#[test]
fn filter_is_passed_and_the_checkpoint_taken_below_it() {
    let nodes = [
        node("throttled", "throttle", "json:{}"),
        node("cor", "copy-on-read", "json:{}"),
        node("data", "qcow2", "d.qcow2"),
        node("slow", "throttle", ""),
        node("file", "file", "d.qcow2"),
    ];
    let edges = [
        ("throttled", "file", "cor"),
        ("cor", "file", "data"),
        ("data", "file", "slow"),
        ("slow", "file", "file"),
    ];
    let disks = survey(&nodes, &edges, drive("throttled")).expect("disks").disks;
    assert_eq!((disks[0].root.as_str(), disks[0].node.as_str()), ("throttled", "data"));
    assert_eq!(
        (disks[0].format, disks[0].file.as_path()),
        (ImageFormat::Qcow2, Path::new("/vm/d.qcow2"))
    );
}

#[test]
fn unused_node_is_listed_apart() {
    let nodes = [
        node("used", "file", "a"),
        node("spare", "qcow2", "s"),
        node("sf", "file", "s"),
        node("net", "nbd", ""),
    ];
    let disks = survey(&nodes, &[("spare", "file", "sf")], drive("used")).expect("disks");
    let unused: Vec<_> =
        disks.unused.iter().map(|(name, disk)| (name.as_str(), disk.is_ok())).collect();
    // The test's graph has no edge from the device.
    assert_eq!(unused, [("used", true), ("spare", true), ("net", false)]);
}

#[test]
fn image_that_two_disks_have_is_one_disk_or_refused() {
    let nodes = [node("d", "file", "a"), node("top", "qcow2", "t"), node("tf", "file", "t")];
    let edges = [("top", "file", "tf"), ("top", "backing", "d")];
    let row = |node: &str, ro: bool| json!({"device": node, "removable": false, "inserted": {"node-name": node, "ro": ro}});
    let twice = survey(&nodes, &edges, json!([row("d", false), row("d", false)])).expect("disks");
    assert_eq!(twice.disks.len(), 1);
    assert!(survey(&nodes, &edges, json!([row("d", true), row("top", false)])).is_ok());
    let error = survey(&nodes, &edges, json!([row("d", false), row("top", false)]))
        .expect_err("written and shown");
    assert!(is_unsupported(&error), "{error}");
}
