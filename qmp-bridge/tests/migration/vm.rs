//! A guest of some bytes that writes memory without end, and what must be as it was after a stream
//! of it.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use qmp_bridge::capture::{CapturePlan, CapturedDisks, DEFAULT_FLEECING_RESERVE, PreparedDisks};
use qmp_bridge::migration::{Migration, StreamMode, StreamOptions};
use qmp_bridge::paused::run_state;
use qmp_bridge::{Paused, Qmp, disks};
use serde_json::{Value, json};

use super::common::{TestQemu, qemu_img};

/// What a QEMU can do. Before 9.0 a background snapshot that does not end well leaves the guest
/// hanging.
pub(crate) fn modes(vm: &TestQemu) -> &'static [StreamMode] {
    let both = &[StreamMode::PreCopy, StreamMode::BackgroundSnapshot];
    if snapshots(vm) { both } else { &both[..1] }
}

pub(crate) fn snapshots(vm: &TestQemu) -> bool {
    vm.qmp.version().major >= 9
}

pub(crate) const FIRMWARE: usize = 64 << 10;
/// Where the processor begins, from the end of the firmware.
pub(crate) const RESET_VECTOR: usize = 16;
/// The first word of each page that the guest writes.
pub(crate) const FIRST_COUNTER: u64 = 0x100000;
pub(crate) const PAGE: u64 = 4096;
/// A guest that counts up the first word of each page from 1 MiB on, in turn, for ever:
/// ```text
///         cli; lgdt %cs:gdtr; mov %cr0,%eax; or $1,%al; mov %eax,%cr0; ljmpl $8,$pm
/// pm:     mov $16,%ax; mov %ax,%ds
/// again:  mov $0x100000,%edi
/// next:   incl (%edi); add $0x1000,%edi; cmp $END,%edi; jb next; jmp again
///         flat code and data segments
/// ```
#[rustfmt::skip]
pub(crate) const COUNTING: [u8; 86] = [
    0xfa, 0x2e, 0x66, 0x0f, 0x01, 0x16, 0x50, 0x00, 0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, 0x66, 0xea, 0x18, 0x00,
    0x0f, 0x00, 0x08, 0x00, 0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd8, 0xbf, 0x00, 0x00, 0x10, 0x00, 0xff, 0x07, 0x81, 0xc7, 0x00,
    0x10, 0x00, 0x00, 0x81, 0xff, 0x44, 0x33, 0x22, 0x11, 0x72, 0xf0, 0xeb, 0xe9, 0x8d, 0x76, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0x9a, 0xcf, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0x92, 0xcf, 0x00,
    0x17, 0x00, 0x38, 0x00, 0x0f, 0x00,
];
/// Where END stands in it.
pub(crate) const END_AT: usize = 45;

pub(crate) fn firmware(pages: u64) -> Vec<u8> {
    let mut image = vec![0xf4; FIRMWARE];
    image[..COUNTING.len()].copy_from_slice(&COUNTING);
    let end = u32::try_from(FIRST_COUNTER + pages * PAGE).expect("a small guest");
    image[END_AT..END_AT + 4].copy_from_slice(&end.to_le_bytes());
    let jump = [0xea, 0x00, 0x00, 0x00, 0xf0];
    image[FIRMWARE - RESET_VECTOR..FIRMWARE - RESET_VECTOR + jump.len()].copy_from_slice(&jump);
    image
}

/// Written by the guest of most tests.
pub(crate) const FEW: u64 = 128;
/// More than a socket buffers.
pub(crate) const MANY: u64 = 2048;

/// The counting guest, with memory of QEMU's own, and a qcow2 disk on a base.
pub(crate) async fn start(qemu: &Path, pages: u64, more: &[&str]) -> TestQemu {
    let directory = tempfile::tempdir().expect("directory");
    std::fs::write(directory.path().join("firmware.bin"), firmware(pages)).expect("firmware");
    qemu_img(qemu, directory.path(), &["create", "-q", "-f", "qcow2", "base.qcow2", "8M"]);
    qemu_img(
        qemu,
        directory.path(),
        &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "disk.qcow2"],
    );
    let common = "-accel tcg -M pc -bios firmware.bin -vga std -device virtio-net-pci \
                  -drive if=none,id=d0,file=disk.qcow2,format=qcow2 -device virtio-blk-pci,drive=d0";
    let mut arguments: Vec<&str> = common.split_whitespace().collect();
    if !more.contains(&"-m") {
        arguments.extend(["-m", "32"]);
    }
    arguments.extend(more);
    let vm = TestQemu::start_in(qemu, &arguments, directory).await;
    let last = format!("xp /1wx {:#x}", FIRST_COUNTER + (pages - 1) * PAGE);
    while !more.contains(&"-S") && vm.qmp.hmp(&last).await.expect("xp").contains("0x00000000\r") {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    vm
}

/// Reads the stream to its end and throws it away; `chunk` bytes at a time with `pause` between,
/// for a slow one.
pub(crate) fn upload(mut reader: UnixStream, chunk: usize, pause: Duration) -> JoinHandle<u64> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; chunk];
        let mut total = 0;
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            total += count as u64;
            if !pause.is_zero() {
                std::thread::sleep(pause);
            }
        }
        total
    })
}

pub(crate) fn upload_fast(migration: &mut Migration) -> JoinHandle<u64> {
    upload(migration.take_reader().expect("reader"), 1 << 20, Duration::ZERO)
}

pub(crate) fn plan(vm: &TestQemu, id: u64) -> CapturePlan {
    CapturePlan {
        tag: crate::common::INSTANCE.parse().expect("tag"),
        checkpoint: crate::common::checkpoint(id),
        parent: id.checked_sub(1).filter(|parent| *parent > 0),
        fleecing_dir: vm.directory.path().into(),
        fleecing_reserve: DEFAULT_FLEECING_RESERVE,
        nbd_socket: vm.path("nbd.sock"),
        streamed: true,
    }
}

pub(crate) async fn prepare_disks(vm: &TestQemu, qmp: &Qmp, id: u64) -> PreparedDisks {
    let disks = disks::list(qmp, Some(vm.directory.path())).await.expect("disks");
    PreparedDisks::prepare(qmp, &disks.disks, plan(vm, id)).await.expect("prepare disks")
}

pub(crate) fn journal(vm: &TestQemu) -> PathBuf {
    vm.path("migration.json")
}

/// What must be the same before and after: capabilities, parameters, and that nothing of ours is
/// there.
pub(crate) async fn settings(qmp: &Qmp) -> BTreeMap<String, Value> {
    let capabilities =
        qmp.execute_json("query-migrate-capabilities", Value::Null).await.expect("capabilities");
    let parameters =
        qmp.execute_json("query-migrate-parameters", Value::Null).await.expect("parameters");
    let rows = capabilities.as_array().expect("list").iter();
    let mut all: BTreeMap<_, _> =
        rows.map(|row| (format!("cap {}", row["capability"]), row["state"].clone())).collect();
    all.extend(parameters.as_object().expect("object").clone());
    all
}

/// Things of ours in QEMU.
pub(crate) async fn traces(qmp: &Qmp) -> Vec<String> {
    let mut found = Vec::new();
    for (command, arguments, field) in [
        ("query-block-exports", Value::Null, "id"),
        ("query-jobs", Value::Null, "id"),
        ("query-named-block-nodes", json!({ "flat": true }), "node-name"),
        ("qom-list", json!({ "path": "/objects" }), "name"),
    ] {
        let rows = qmp.execute_json(command, arguments).await.expect(command);
        let names = rows.as_array().expect("list").iter().filter_map(|row| row[field].as_str());
        found.extend(
            names.filter(|name| name.starts_with("sp-")).map(|name| format!("{command}: {name}")),
        );
    }
    // QEMU before 9.1 closes a removed descriptor only while the guest runs, so it is asked again.
    let sets = async || qmp.execute_json("query-fdsets", Value::Null).await.expect("sets");
    for set in sets().await.as_array().expect("list") {
        qmp.execute_json("remove-fd", json!({ "fdset-id": set["fdset-id"] })).await.ok();
    }
    let left = sets().await;
    found.extend(left.as_array().expect("list").iter().map(|set| format!("a descriptor: {set}")));
    found
}

pub(crate) async fn counter(qmp: &Qmp) -> String {
    qmp.hmp(&format!("xp /1hx {FIRST_COUNTER:#x}")).await.expect("xp")
}

/// The guest counts, its disk takes writes, and no part of ours is left. Some of it comes about in
/// the background.
pub(crate) async fn assert_as_before(vm: &TestQemu, before: &BTreeMap<String, Value>, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let (state, now, traces) = (
            run_state(&vm.qmp).await.expect("state"),
            settings(&vm.qmp).await,
            traces(&vm.qmp).await,
        );
        let status = vm.qmp.execute_json("query-migrate", Value::Null).await.expect("status");
        let busy = matches!(
            status["status"].as_str(),
            Some("active" | "setup" | "pre-switchover" | "device" | "cancelling")
        );
        let journal = journal(vm).exists();
        if state == "running" && now == *before && traces.is_empty() && !journal && !busy {
            break;
        }
        let changed: Vec<_> =
            now.iter().filter(|(name, value)| before.get(*name) != Some(value)).collect();
        assert!(
            Instant::now() < deadline,
            "{what}: {state}, {changed:?}, {traces:?}, journal {journal}, {status}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let first = counter(&vm.qmp).await;
    while counter(&vm.qmp).await == first {
        assert!(Instant::now() < deadline, "{what}: the guest does not count");
    }
    assert_disk_works(vm, what).await;
}

/// Writes through the device and looks into the image.
pub(crate) async fn assert_disk_works(vm: &TestQemu, what: &str) {
    let pattern = 1 + (Instant::now().elapsed().subsec_nanos() % 200) as u8;
    vm.write_disk("d0", pattern, 1 << 20, 4096).await;
    let read = vm
        .qmp
        .hmp(&format!("qemu-io d0 \"read -P {pattern:#x} 1048576 4096\""))
        .await
        .expect("hmp");
    assert!(read.trim().is_empty(), "{what}: {read}");
    let log = vm.log();
    let wrong = ["Pattern verification failed", "write failed", "read failed"]
        .iter()
        .find(|words| log.contains(**words));
    assert_eq!(wrong, None, "{what}: {log}");
}

/// A whole checkpoint's worth in either mode. Returns the pause, the stream's length and the disks
/// of the instant.
pub(crate) async fn stream(
    vm: &TestQemu,
    qmp: &Qmp,
    mode: StreamMode,
    options: &StreamOptions,
    id: u64,
) -> (Duration, u64, CapturedDisks) {
    let prepared = prepare_disks(vm, qmp, id).await;
    let mut migration =
        Migration::prepare(qmp, mode, options, &journal(vm)).await.expect("prepare");
    let bytes = upload_fast(&mut migration);
    let (captured, pause) = match mode {
        StreamMode::PreCopy => {
            migration.start().await.expect("start");
            let paused = migration.switchover().await.expect("switchover");
            let stopped = paused.elapsed();
            migration.complete(&paused).await.expect("complete");
            let complete = paused.elapsed();
            let captured = prepared.capture(&paused).await.expect("pause");
            let capture = paused.elapsed();
            let pause = paused.resume().await.expect("resume");
            eprintln!(
                "pre-copy: switchover {stopped:.2?} complete {:.2?} disks {:.2?} cont {:.2?} = {pause:.2?}",
                complete - stopped,
                capture - complete,
                pause - capture
            );
            (captured, pause)
        }
        StreamMode::BackgroundSnapshot => {
            let paused = Paused::stop(qmp).await.expect("stop");
            let stop = paused.elapsed();
            let captured = prepared.capture(&paused).await.expect("pause");
            let capture = paused.elapsed();
            migration.start().await.expect("start");
            let pause = migration.memory_is_held(paused).await.expect("held");
            eprintln!(
                "background: stop {stop:.2?} disks {:.2?} hold {:.2?} = {pause:.2?}",
                capture - stop,
                pause - capture
            );
            (captured, pause)
        }
    };
    migration.finish().await.expect("finish");
    (pause, bytes.join().expect("reader"), captured)
}
