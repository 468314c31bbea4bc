//! Replies as QEMU gives them, shortened to the fields that count.

use super::*;

fn node(name: &str, driver: &str, file: &str) -> Value {
    json!({"node-name": name, "drv": driver, "file": file, "encrypted": false, "image": {"virtual-size": 1 << 20}})
}

fn graph(edges: &[(&str, &str, &str)]) -> Value {
    let mut names: Vec<&str> = edges.iter().flat_map(|(parent, _, child)| [*parent, *child]).collect();
    names.sort_unstable();
    names.dedup();
    let id = |wanted: &str| names.iter().position(|name| *name == wanted);
    let nodes: Vec<Value> = names.iter().map(|name| json!({"id": id(name), "type": "block-driver", "name": name})).collect();
    let edges: Vec<Value> = edges.iter().map(|(p, name, c)| json!({"parent": id(p), "name": name, "child": id(c)})).collect();
    json!({"nodes": nodes, "edges": edges})
}

fn survey(nodes: &[Value], edges: &[(&str, &str, &str)], block: Value) -> Result<Disks, DiskError> {
    let nodes = node_infos(&Value::Array(nodes.to_vec()));
    let survey = Survey { nodes, graph: Graph::parse(&graph(edges)), qemu_cwd: Some(Path::new("/vm")) };
    survey.read(&block)
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
    let edges = [("top", "file", "f0"), ("top", "backing", "mid"), ("mid", "file", "f1"), ("mid", "backing", "low"), ("low", "file", "f2")];
    let disks = survey(&nodes, &edges, drive("top")).expect("disks").disks;
    assert_eq!(disks.len(), 1);
    assert_eq!(disks[0].file, Path::new("/vm/top.qcow2"));
    assert_eq!((disks[0].node.as_str(), disks[0].name.as_str()), ("top", "top"), "the node's name until somebody knows a steadier one");
    assert_eq!(disks[0].device, "/machine/peripheral/vda/virtio-backend");
    let layers: Vec<_> = disks[0].backing.iter().map(|b| (b.file.to_str().expect("path"), b.format)).collect();
    assert_eq!(layers, [("/base/mid.qcow2", ImageFormat::Qcow2), ("/base/low.img", ImageFormat::Raw)]);
}

#[test]
fn a_bare_file_node_is_raw_and_an_empty_drive_is_no_disk() {
    let block = json!([
        {"device": "d0", "removable": false, "inserted": {"node-name": "f", "ro": true}},
        {"device": "cd", "removable": true},
    ]);
    let disks = survey(&[node("f", "file", "/x.img")], &[], block).expect("disks");
    assert_eq!((disks.disks[0].format, disks.disks[0].read_only), (ImageFormat::Raw, true));
    assert_eq!(disks.empty, ["cd"]);
    assert_eq!(disks.writable().count(), 0);
}

#[test]
fn a_survey_tells_each_drive_by_itself() {
    let block = json!([
        {"device": "bad", "inserted": {"node-name": "n", "ro": false}},
        {"device": "good", "inserted": {"node-name": "f", "ro": false}},
        {"device": "cd", "removable": true},
    ]);
    let nodes = node_infos(&json!([node("n", "vvfat", "fat:/x"), node("f", "file", "/x.img")]));
    let drives = Survey { nodes, graph: Graph::parse(&graph(&[])), qemu_cwd: None }.drives(&block);
    let told: Vec<_> = drives.iter().map(|drive| (drive.device.as_str(), drive.disk.as_ref().map(Option::is_some).ok())).collect();
    assert_eq!(told, [("bad", None), ("good", Some(true)), ("cd", Some(false))]);
}

#[test]
fn what_cannot_come_back_is_refused_with_a_reason() {
    let cases = [
        (vec![node("n", "vvfat", "fat:/x")], vec![], "directory of the host"),
        (vec![node("n", "raw", ""), node("f", "nbd", "nbd://h")], vec![("n", "file", "f")], "network server"),
        (vec![node("n", "throttle", ""), node("f", "qcow2", "x")], vec![("n", "file", "f")], "filter"),
        (vec![node("n", "file", "/dev/fdset/1")], vec![], "no path of its own"),
        (vec![node("n", "qcow2", "x"), node("f", "file", "x")], vec![("n", "file", "f"), ("n", "data-file", "f")], "data file"),
        (vec![json!({"node-name": "n", "drv": "qcow2", "encrypted": true})], vec![], "encrypted"),
    ];
    for (nodes, edges, reason) in cases {
        let error = survey(&nodes, &edges, drive("n")).expect_err(reason);
        assert!(error.to_string().contains(reason), "{error}");
        assert!(!error.is_retryable());
    }
    let error = survey(&[], &[], drive("gone")).expect_err("missing node");
    assert!(error.is_retryable());
}
