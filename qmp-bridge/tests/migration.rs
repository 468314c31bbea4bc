//! Migration streams on real QEMUs: whatever happens to them, the guest runs on and QEMU is as it was.

mod common;

use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{TestQemu, qemu_img, with_each_qemu};
use qmp_bridge::capture::{CapturePlan, DEFAULT_SCRATCH_RESERVE, FrozenDisks, PreparedDisks, cleanup_leftovers};
use qmp_bridge::migration::{Migration, MigrationError, StreamMode, StreamOptions, WhenTooFast, probe, recover};
use qmp_bridge::paused::run_state;
use qmp_bridge::{Paused, Qmp, disks};
use serde_json::{Value, json};

const MODES: [StreamMode; 2] = [StreamMode::PreCopy, StreamMode::BackgroundSnapshot];
const FIRMWARE: usize = 64 << 10;
/// Where the processor begins, from the end of the firmware.
const RESET_VECTOR: usize = 16;
/// The first word of each page that the guest writes.
const FIRST_COUNTER: u64 = 0x10000;

/// A guest that counts up the first word of 128 pages in turn, for ever:
/// `start: mov bx,0x1000; next: mov ds,bx; inc word [0]; add bx,0x100; cmp bx,0x9000; jb next; jmp start`.
fn firmware() -> Vec<u8> {
    let mut image = vec![0xf4; FIRMWARE];
    let code = [
        0xbb, 0x00, 0x10, 0x8e, 0xdb, 0xff, 0x06, 0x00, 0x00, 0x81, 0xc3, 0x00, 0x01, 0x81, 0xfb, 0x00, 0x90, 0x72, 0xf0, 0xeb, 0xeb,
    ];
    image[..code.len()].copy_from_slice(&code);
    let jump = [0xea, 0x00, 0x00, 0x00, 0xf0];
    image[FIRMWARE - RESET_VECTOR..FIRMWARE - RESET_VECTOR + jump.len()].copy_from_slice(&jump);
    image
}

/// The counting guest, with memory of QEMU's own, and a qcow2 disk on a base.
async fn start(qemu: &Path, more: &[&str]) -> TestQemu {
    let directory = tempfile::tempdir().expect("directory");
    std::fs::write(directory.path().join("firmware.bin"), firmware()).expect("firmware");
    qemu_img(qemu, directory.path(), &["create", "-q", "-f", "qcow2", "base.qcow2", "8M"]);
    qemu_img(qemu, directory.path(), &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "disk.qcow2"]);
    let common = "-accel tcg -M pc -bios firmware.bin -vga std -device virtio-net-pci \
                  -drive if=none,id=d0,file=disk.qcow2,format=qcow2 -device virtio-blk-pci,drive=d0";
    let mut arguments: Vec<&str> = common.split_whitespace().collect();
    if !more.contains(&"-m") {
        arguments.extend(["-m", "32"]);
    }
    arguments.extend(more);
    TestQemu::start_in(qemu, &arguments, directory).await
}

/// Reads the stream to its end and throws it away; `chunk` bytes at a time with `pause` between, for a slow one.
fn drain(mut reader: UnixStream, chunk: usize, pause: Duration) -> JoinHandle<u64> {
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

fn drain_fast(migration: &mut Migration) -> JoinHandle<u64> {
    drain(migration.take_reader().expect("reader"), 1 << 20, Duration::ZERO)
}

fn plan(machine: &TestQemu, seq: u64) -> CapturePlan {
    CapturePlan {
        tag: "test".parse().expect("tag"),
        seq,
        parent: seq.checked_sub(1).filter(|parent| *parent > 0),
        scratch_dir: machine.directory.path().into(),
        scratch_reserve: DEFAULT_SCRATCH_RESERVE,
        nbd_socket: machine.path("nbd.sock"),
    }
}

async fn prepare_disks(machine: &TestQemu, qmp: &Qmp, seq: u64) -> PreparedDisks {
    let disks = disks::list(qmp, Some(machine.directory.path())).await.expect("disks");
    PreparedDisks::prepare(qmp, &disks.disks, plan(machine, seq)).await.expect("prepare disks")
}

fn journal(machine: &TestQemu) -> PathBuf {
    machine.path("migration.json")
}

/// What must be the same before and after: capabilities, parameters, and that nothing of ours is there.
async fn settings(qmp: &Qmp) -> BTreeMap<String, Value> {
    let capabilities = qmp.execute_json("query-migrate-capabilities", Value::Null).await.expect("capabilities");
    let parameters = qmp.execute_json("query-migrate-parameters", Value::Null).await.expect("parameters");
    let rows = capabilities.as_array().expect("list").iter();
    let mut all: BTreeMap<_, _> = rows.map(|row| (format!("cap {}", row["capability"]), row["state"].clone())).collect();
    all.extend(parameters.as_object().expect("object").clone());
    all
}

/// Things of ours in QEMU.
async fn traces(qmp: &Qmp) -> Vec<String> {
    let mut found = Vec::new();
    for (command, arguments, field) in [
        ("query-block-exports", Value::Null, "id"),
        ("query-jobs", Value::Null, "id"),
        ("query-named-block-nodes", json!({ "flat": true }), "node-name"),
        ("qom-list", json!({ "path": "/objects" }), "name"),
    ] {
        let rows = qmp.execute_json(command, arguments).await.expect(command);
        let names = rows.as_array().expect("list").iter().filter_map(|row| row[field].as_str());
        found.extend(names.filter(|name| name.contains("stillpoint")).map(|name| format!("{command}: {name}")));
    }
    let closed = qmp.execute_json("closefd", json!({ "fdname": "stillpoint-migration" })).await;
    if closed.is_ok() {
        found.push("a descriptor".into());
    }
    found
}

async fn counter(qmp: &Qmp) -> String {
    qmp.hmp(&format!("xp /1hx {FIRST_COUNTER:#x}")).await.expect("xp")
}

/// The guest counts, its disk takes writes, and no part of ours is left. Some of it comes about in the background.
async fn assert_as_before(machine: &TestQemu, before: &BTreeMap<String, Value>, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let (state, now, traces) = (run_state(&machine.qmp).await.expect("state"), settings(&machine.qmp).await, traces(&machine.qmp).await);
        let status = machine.qmp.execute_json("query-migrate", Value::Null).await.expect("status");
        let busy = matches!(status["status"].as_str(), Some("active" | "setup" | "pre-switchover" | "device" | "cancelling"));
        let journal = journal(machine).exists();
        if state == "running" && now == *before && traces.is_empty() && !journal && !busy {
            break;
        }
        let changed: Vec<_> = now.iter().filter(|(name, value)| before.get(*name) != Some(value)).collect();
        assert!(Instant::now() < deadline, "{what}: {state}, {changed:?}, {traces:?}, journal {journal}, {status}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let first = counter(&machine.qmp).await;
    while counter(&machine.qmp).await == first {
        assert!(Instant::now() < deadline, "{what}: the guest does not count");
    }
    assert_disk_works(machine, what).await;
}

/// Writes through the device and looks into the image.
async fn assert_disk_works(machine: &TestQemu, what: &str) {
    let pattern = 1 + (Instant::now().elapsed().subsec_nanos() % 200) as u8;
    machine.write_disk("d0", pattern, 1 << 20, 4096).await;
    let read = machine.qmp.hmp(&format!("qemu-io d0 \"read -P {pattern:#x} 1048576 4096\"")).await.expect("hmp");
    assert!(read.trim().is_empty(), "{what}: {read}");
    let log = machine.log();
    assert!(!log.contains("failed") && !log.contains("error"), "{what}: {log}");
}

/// A whole checkpoint's worth in either mode. Returns the pause, the stream's length and the disks of the instant.
async fn stream(
    machine: &TestQemu,
    qmp: &Qmp,
    mode: StreamMode,
    options: &StreamOptions,
    seq: u64,
) -> (Duration, u64, FrozenDisks) {
    let prepared = prepare_disks(machine, qmp, seq).await;
    let mut migration = Migration::prepare(qmp, mode, options, &journal(machine)).await.expect("prepare");
    let bytes = drain_fast(&mut migration);
    let (frozen, pause) = match mode {
        StreamMode::PreCopy => {
            migration.start().await.expect("start");
            let paused = migration.switchover().await.expect("switchover");
            let stopped = paused.elapsed();
            migration.complete(&paused).await.expect("complete");
            let complete = paused.elapsed();
            let frozen = prepared.freeze(&paused).await.expect("freeze");
            let freeze = paused.elapsed();
            let pause = paused.resume().await.expect("resume");
            eprintln!(
                "pre-copy: switchover {stopped:.2?} complete {:.2?} disks {:.2?} cont {:.2?} = {pause:.2?}",
                complete - stopped,
                freeze - complete,
                pause - freeze
            );
            (frozen, pause)
        }
        StreamMode::BackgroundSnapshot => {
            let paused = Paused::stop(qmp).await.expect("stop");
            let stop = paused.elapsed();
            let frozen = prepared.freeze(&paused).await.expect("freeze");
            let freeze = paused.elapsed();
            migration.start().await.expect("start");
            let pause = migration.memory_is_held(paused).await.expect("held");
            eprintln!("background: stop {stop:.2?} disks {:.2?} hold {:.2?} = {pause:.2?}", freeze - stop, pause - freeze);
            (frozen, pause)
        }
    };
    migration.finish().await.expect("finish");
    (pause, bytes.join().expect("reader"), frozen)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_modes_leave_everything_as_it_was() {
    with_each_qemu(async |qemu| {
        let machine = start(&qemu, &[]).await;
        let before = settings(&machine.qmp).await;
        let support = probe(&machine.qmp).await.expect("probe");
        assert_eq!((&support.pre_copy, &support.background_snapshot), (&Ok(()), &Ok(())));
        assert_eq!(settings(&machine.qmp).await, before, "the probe changed something");
        let mut seq = 0;
        for mode in MODES {
            for _ in 0..2 {
                seq += 1;
                let (pause, bytes, frozen) = stream(&machine, &machine.qmp, mode, &StreamOptions::default(), seq).await;
                assert!(pause < Duration::from_secs(2) && bytes > 128 * 4096, "{mode}: {pause:?}, {bytes} bytes");
                frozen.export().await.expect("export");
                frozen.verify().await.expect("verify");
                frozen.settle().await.expect("settle");
                assert_as_before(&machine, &before, &mode.to_string()).await;
            }
        }
    })
    .await;
}
