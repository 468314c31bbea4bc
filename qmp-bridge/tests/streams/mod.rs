//! Streams for the tests: recorded ones, and QEMUs that send new ones.
#![allow(dead_code, reason = "each test file uses its part")]

#[path = "../../../fuzz/checks/src/stream_reader.rs"]
pub(crate) mod check;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use qmp_bridge::Qmp;
use serde_json::{Value, json};

use crate::common::TestQemu;

const FIRMWARE: usize = 64 << 10;
/// Where the processor begins, from the end of the firmware.
const RESET_VECTOR: usize = 16;
/// Where the guest counts.
pub(crate) const COUNTER: usize = 0x1000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    PreCopy,
    Background,
}

pub(crate) fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/streams")
}

/// The fuzzer's seeds by name.
pub(crate) fn seeds() -> Vec<(String, Vec<u8>)> {
    files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/stream_reader"), "")
}

/// Recorded streams by name, e.g. `7.2-pc-precopy`.
pub(crate) fn recorded() -> Vec<(String, Vec<u8>)> {
    files(&directory(), ".stream")
}

/// Files whose names end so, by what is in front of that.
fn files(directory: &Path, ending: &str) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(directory).expect("list");
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.expect("entry");
        let name = entry.file_name().into_string().expect("text");
        let stem = name.strip_suffix(ending)?.to_owned();
        Some((stem, std::fs::read(entry.path()).expect("read")))
    };
    let mut found: Vec<_> = entries.filter_map(read).collect();
    found.sort();
    found
}

/// `xor ax,ax; mov ds,ax; again: inc dword [0x1000]; jmp again`, and a far jump to it at the reset
/// vector; the rest is zero, which makes the streams small.
fn firmware() -> Vec<u8> {
    let mut image = vec![0; FIRMWARE];
    let code = [0x31, 0xc0, 0x8e, 0xd8, 0x66, 0xff, 0x06, 0x00, 0x10, 0xeb, 0xf9];
    image[..code.len()].copy_from_slice(&code);
    let jump = [0xea, 0x00, 0x00, 0x00, 0xf0];
    image[FIRMWARE - RESET_VECTOR..FIRMWARE - RESET_VECTOR + jump.len()].copy_from_slice(&jump);
    image
}

/// Starts the counting guest in an external VM.
pub(crate) async fn start(
    qemu: &Path,
    machine_type: &str,
    megabytes: u32,
    more: &[&str],
) -> TestQemu {
    let directory = tempfile::tempdir().expect("directory");
    std::fs::write(directory.path().join("firmware.bin"), firmware()).expect("firmware");
    for disk in ["virtio.img", "ide.img"] {
        File::create(directory.path().join(disk))
            .and_then(|file| file.set_len(1 << 20))
            .expect("disk");
    }
    let memory = megabytes.to_string();
    let mut arguments = vec!["-accel", "tcg", "-M", machine_type, "-m", &memory];
    if machine_type != "none" {
        arguments.extend(["-bios", "firmware.bin"]);
    }
    arguments.extend(more);
    TestQemu::start_in(qemu, &arguments, directory).await
}

/// A display and two disks.
pub(crate) const DEVICES: [&str; 10] = [
    "-device",
    "VGA,vgamem_mb=1,romfile=",
    "-drive",
    "if=none,id=d0,file=virtio.img,format=raw",
    "-device",
    "virtio-blk-pci,drive=d0",
    "-drive",
    "if=none,id=d1,file=ide.img,format=raw",
    "-device",
    "ide-hd,drive=d1",
];

pub(crate) async fn capabilities(qmp: &Qmp, on: &[&str]) {
    let list: Vec<_> = on.iter().map(|name| json!({ "capability": name, "state": true })).collect();
    let set = qmp.execute_json("migrate-set-capabilities", json!({ "capabilities": list })).await;
    set.expect("set capabilities");
}

/// Lets QEMU send a stream into a socket, whose other end is returned. Capabilities must be set
/// before.
pub(crate) async fn migrate(qmp: &Qmp) -> UnixStream {
    let (here, there) = UnixStream::pair().expect("socket pair");
    let fast = json!({ "max-bandwidth": 1u64 << 40 });
    qmp.execute_json("migrate-set-parameters", fast).await.expect("set parameters");
    qmp.execute_with_fd("getfd", json!({ "fdname": "stream" }), there.as_fd())
        .await
        .expect("getfd");
    drop(there);
    qmp.execute_json("migrate", json!({ "uri": "fd:stream" })).await.expect("migrate");
    here
}

pub(crate) async fn wait_for_status(qmp: &Qmp, wanted: &str) {
    for _ in 0..1000 {
        let status = qmp.execute_json("query-migrate", Value::Null).await.expect("query-migrate");
        if status["status"] == wanted {
            return;
        }
        assert!(
            !matches!(status["status"].as_str(), Some("failed" | "cancelled" | "completed")),
            "{status}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the migration does not get `{wanted}`");
}
