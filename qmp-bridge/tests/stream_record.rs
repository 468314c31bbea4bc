//! Records the streams in `tests/streams/` again:
//! `cargo test -p qmp-bridge --test stream_record -- --ignored`.

mod common;
mod streams;

use std::io::Read;
use std::path::Path;

use common::qemus;
use streams::check::read_all;
use streams::{DEVICES, Mode, capabilities, directory, migrate, start, wait_for_status};

/// All together stay below this, since they are committed.
const MOST_BYTES: usize = 1_500_000;

const VMS: [(&str, Mode, &[&str]); 7] = [
    ("none", Mode::PreCopy, &[]),
    ("none", Mode::Background, &[]),
    ("microvm", Mode::PreCopy, &[]),
    ("pc", Mode::PreCopy, &DEVICES),
    ("pc", Mode::Background, &[]),
    ("q35", Mode::PreCopy, &[]),
    ("q35", Mode::Background, &DEVICES),
];

async fn record(qemu: &Path, vm: &str, mode: Mode, devices: &[&str]) -> (String, Vec<u8>) {
    let running = start(qemu, vm, 1, devices).await;
    let (capability, name): (&[&str], _) = match mode {
        Mode::PreCopy => (&[], "precopy"),
        Mode::Background => (&["background-snapshot"], "background"),
    };
    capabilities(&running.qmp, capability).await;
    let mut stream = migrate(&running.qmp).await;
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).map(|_| bytes)
    });
    wait_for_status(&running.qmp, "completed").await;
    let bytes = reader.join().expect("join").expect("read");
    let version = running.qmp.version();
    (format!("{}.{}-{vm}-{name}", version.major, version.minor), bytes)
}

#[tokio::test]
#[ignore = "writes into the source tree"]
async fn record_all() {
    let mut total = 0;
    for qemu in qemus() {
        for (vm, mode, devices) in VMS {
            let (name, bytes) = record(&qemu, vm, mode, devices).await;
            eprintln!("{name}: {} bytes", bytes.len());
            read_all(&bytes[..], Default::default()).expect("the reader understands it");
            total += bytes.len();
            std::fs::write(directory().join(format!("{name}.stream")), bytes).expect("write");
        }
    }
    assert!(total < MOST_BYTES, "{total} bytes");
}
