//! Migration streams on real QEMUs: whatever happens to them, the guest runs on and QEMU is as it was.

mod common;

use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{TestQemu, qemu_img, with_each_qemu};
use qmp_bridge::capture::{CapturePlan, DEFAULT_SCRATCH_RESERVE, FrozenDisks, PreparedDisks, cleanup_leftovers};
use qmp_bridge::migration::{Migration, MigrationError, StreamMode, StreamOptions, WhenTooFast, probe, recover};
use qmp_bridge::paused::run_state;
use qmp_bridge::{Paused, Qmp, disks};
use serde_json::{Value, json};

/// What a QEMU can do. Before 9.0 a background snapshot that does not end well leaves the guest hanging.
fn modes(machine: &TestQemu) -> &'static [StreamMode] {
    let both = &[StreamMode::PreCopy, StreamMode::BackgroundSnapshot];
    if snapshots(machine) { both } else { &both[..1] }
}

fn snapshots(machine: &TestQemu) -> bool {
    machine.qmp.version().major >= 9
}

const FIRMWARE: usize = 64 << 10;
/// Where the processor begins, from the end of the firmware.
const RESET_VECTOR: usize = 16;
/// The first word of each page that the guest writes.
const FIRST_COUNTER: u64 = 0x100000;
const PAGE: u64 = 4096;
/// A guest that counts up the first word of each page from 1 MiB on, in turn, for ever:
/// ```text
///         cli; lgdt %cs:gdtr; mov %cr0,%eax; or $1,%al; mov %eax,%cr0; ljmpl $8,$pm
/// pm:     mov $16,%ax; mov %ax,%ds
/// again:  mov $0x100000,%edi
/// next:   incl (%edi); add $0x1000,%edi; cmp $END,%edi; jb next; jmp again
///         flat code and data segments
/// ```
#[rustfmt::skip]
const COUNTING: [u8; 86] = [
    0xfa, 0x2e, 0x66, 0x0f, 0x01, 0x16, 0x50, 0x00, 0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, 0x66, 0xea, 0x18, 0x00,
    0x0f, 0x00, 0x08, 0x00, 0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd8, 0xbf, 0x00, 0x00, 0x10, 0x00, 0xff, 0x07, 0x81, 0xc7, 0x00,
    0x10, 0x00, 0x00, 0x81, 0xff, 0x44, 0x33, 0x22, 0x11, 0x72, 0xf0, 0xeb, 0xe9, 0x8d, 0x76, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0x9a, 0xcf, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0x92, 0xcf, 0x00,
    0x17, 0x00, 0x38, 0x00, 0x0f, 0x00,
];
/// Where END stands in it.
const END_AT: usize = 45;

fn firmware(pages: u64) -> Vec<u8> {
    let mut image = vec![0xf4; FIRMWARE];
    image[..COUNTING.len()].copy_from_slice(&COUNTING);
    let end = u32::try_from(FIRST_COUNTER + pages * PAGE).expect("a small guest");
    image[END_AT..END_AT + 4].copy_from_slice(&end.to_le_bytes());
    let jump = [0xea, 0x00, 0x00, 0x00, 0xf0];
    image[FIRMWARE - RESET_VECTOR..FIRMWARE - RESET_VECTOR + jump.len()].copy_from_slice(&jump);
    image
}

/// Written by the guest of most tests.
const FEW: u64 = 128;
/// More than a socket buffers.
const MANY: u64 = 2048;

/// The counting guest, with memory of QEMU's own, and a qcow2 disk on a base.
async fn start(qemu: &Path, pages: u64, more: &[&str]) -> TestQemu {
    let directory = tempfile::tempdir().expect("directory");
    std::fs::write(directory.path().join("firmware.bin"), firmware(pages)).expect("firmware");
    qemu_img(qemu, directory.path(), &["create", "-q", "-f", "qcow2", "base.qcow2", "8M"]);
    qemu_img(qemu, directory.path(), &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "disk.qcow2"]);
    let common = "-accel tcg -M pc -bios firmware.bin -vga std -device virtio-net-pci \
                  -drive if=none,id=d0,file=disk.qcow2,format=qcow2 -device virtio-blk-pci,drive=d0";
    let mut arguments: Vec<&str> = common.split_whitespace().collect();
    if !more.contains(&"-m") {
        arguments.extend(["-m", "32"]);
    }
    arguments.extend(more);
    let machine = TestQemu::start_in(qemu, &arguments, directory).await;
    let last = format!("xp /1wx {:#x}", FIRST_COUNTER + (pages - 1) * PAGE);
    while !more.contains(&"-S") && machine.qmp.hmp(&last).await.expect("xp").contains("0x00000000\r") {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    machine
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
        let (state, now, traces) =
            (run_state(&machine.qmp).await.expect("state"), settings(&machine.qmp).await, traces(&machine.qmp).await);
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
    let wrong = ["Pattern verification failed", "write failed", "read failed"].iter().find(|words| log.contains(**words));
    assert_eq!(wrong, None, "{what}: {log}");
}

/// A whole checkpoint's worth in either mode. Returns the pause, the stream's length and the disks of the instant.
async fn stream(machine: &TestQemu, qmp: &Qmp, mode: StreamMode, options: &StreamOptions, seq: u64) -> (Duration, u64, FrozenDisks) {
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
        let machine = start(&qemu, FEW, &[]).await;
        let before = settings(&machine.qmp).await;
        let support = probe(&machine.qmp).await.expect("probe");
        assert_eq!((support.pre_copy.is_ok(), support.background_snapshot.is_ok()), (true, snapshots(&machine)), "{support:?}");
        assert_eq!(support.preferred(), Some(StreamMode::PreCopy));
        assert_eq!(settings(&machine.qmp).await, before, "the probe changed something");
        let mut seq = 0;
        for &mode in modes(&machine) {
            for _ in 0..2 {
                seq += 1;
                let (pause, bytes, frozen) = stream(&machine, &machine.qmp, mode, &StreamOptions::default(), seq).await;
                assert!(pause < Duration::from_secs(2) && bytes > FEW * PAGE, "{mode}: {pause:?}, {bytes} bytes");
                frozen.export().await.expect("export");
                frozen.verify().await.expect("verify");
                frozen.settle().await.expect("settle");
                assert_as_before(&machine, &before, &mode.to_string()).await;
            }
        }
    })
    .await;
}

/// The owner's settings, some of which would spoil a stream or exclude its capabilities, come back to the letter.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_of_the_owner_come_back() {
    with_each_qemu(async |qemu| {
        let machine = start(&qemu, FEW, &[]).await;
        let on = ["xbzrle", "auto-converge", "postcopy-ram", "return-path", "release-ram", "dirty-bitmaps", "validate-uuid"];
        let on: Vec<Value> = on.iter().map(|name| json!({ "capability": name, "state": true })).collect();
        machine.qmp.execute_json("migrate-set-capabilities", json!({ "capabilities": on })).await.expect("capabilities");
        let parameters = json!({ "max-bandwidth": 1 << 20, "downtime-limit": 77, "tls-creds": "theirs", "max-cpu-throttle": 50 });
        machine.qmp.execute_json("migrate-set-parameters", parameters).await.expect("parameters");
        let before = settings(&machine.qmp).await;
        let support = probe(&machine.qmp).await.expect("probe");
        assert_eq!(support.background_snapshot.is_ok(), snapshots(&machine), "{support:?}");
        assert_eq!(settings(&machine.qmp).await, before, "the probe changed something");
        for (seq, &mode) in (1..).zip(modes(&machine)) {
            let (_, bytes, frozen) = stream(&machine, &machine.qmp, mode, &StreamOptions::default(), seq).await;
            assert!(bytes > FEW * PAGE, "{mode}: {bytes}");
            frozen.settle().await.expect("settle");
            assert_as_before(&machine, &before, &mode.to_string()).await;
        }
    })
    .await;
}

/// How far a session gets before it is dropped or its process is killed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    Prepared,
    Started,
    SwitchedOver,
    Completed,
    SnapshotBegun,
    SnapshotHeld,
}

const STAGES: [Stage; 6] =
    [Stage::Prepared, Stage::Started, Stage::SwitchedOver, Stage::Completed, Stage::SnapshotBegun, Stage::SnapshotHeld];

fn stages(machine: &TestQemu) -> &'static [Stage] {
    if snapshots(machine) { &STAGES } else { &STAGES[..4] }
}

/// All that a helper has in its hands at a stage.
struct Hands {
    _migration: Migration,
    _paused: Option<Paused>,
    _disks: Option<FrozenDisks>,
}

async fn get_to(machine_directory: &Path, qmp: &Qmp, stage: Stage) -> Hands {
    let journal = machine_directory.join("migration.json");
    let mode =
        if matches!(stage, Stage::SnapshotBegun | Stage::SnapshotHeld) { StreamMode::BackgroundSnapshot } else { StreamMode::PreCopy };
    let list = disks::list(qmp, Some(machine_directory)).await.expect("disks");
    let plan = CapturePlan {
        tag: "test".parse().expect("tag"),
        seq: 1,
        parent: None,
        scratch_dir: machine_directory.into(),
        scratch_reserve: DEFAULT_SCRATCH_RESERVE,
        nbd_socket: machine_directory.join("nbd.sock"),
    };
    let disks = PreparedDisks::prepare(qmp, &list.disks, plan).await.expect("prepare disks");
    let mut migration = Migration::prepare(qmp, mode, &StreamOptions::default(), &journal).await.expect("prepare");
    // A stage in which the stream is under way needs a reader that is not at its end too soon.
    let slow = matches!(stage, Stage::Started | Stage::SnapshotHeld);
    let (chunk, pause) = if slow { (4096, Duration::from_millis(20)) } else { (1 << 20, Duration::ZERO) };
    drain(migration.take_reader().expect("reader"), chunk, pause);
    let mut hands = Hands { _migration: migration, _paused: None, _disks: None };
    let migration = &mut hands._migration;
    if mode == StreamMode::BackgroundSnapshot {
        let paused = Paused::stop(qmp).await.expect("stop");
        hands._disks = Some(disks.freeze(&paused).await.expect("freeze"));
        migration.start().await.expect("start");
        match stage {
            Stage::SnapshotBegun => hands._paused = Some(paused),
            _ => drop(migration.memory_is_held(paused).await.expect("held")),
        }
        return hands;
    }
    if stage == Stage::Prepared {
        return hands;
    }
    migration.start().await.expect("start");
    if stage != Stage::Started {
        let paused = migration.switchover().await.expect("switchover");
        if stage == Stage::Completed {
            migration.complete(&paused).await.expect("complete");
            hands._disks = Some(disks.freeze(&paused).await.expect("freeze"));
        }
        hands._paused = Some(paused);
    }
    hands
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_session_leaves_everything_as_it_was() {
    with_each_qemu(async |qemu| {
        let machine = start(&qemu, MANY, &[]).await;
        let before = settings(&machine.qmp).await;
        for &stage in stages(&machine) {
            let hands = get_to(machine.directory.path(), &machine.qmp, stage).await;
            assert!(machine.path("migration.json").exists(), "{stage:?}: no journal");
            drop(hands);
            assert_as_before(&machine, &before, &format!("{stage:?}")).await;
        }
    })
    .await;
}

/// Does nothing unless it is started by the test below, as a process of its own that is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dying_helper() {
    let Ok(stage) = std::env::var("STILLPOINT_TEST_STAGE") else { return };
    let stage = STAGES.into_iter().find(|known| format!("{known:?}") == stage).expect("stage");
    let directory = PathBuf::from(std::env::var("STILLPOINT_TEST_DIRECTORY").expect("directory"));
    let qmp = Qmp::connect(directory.join("second.sock"), Duration::from_secs(5)).await.expect("connect");
    let _hands = get_to(&directory, &qmp, stage).await;
    nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL).expect("kill");
    unreachable!("killed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_helper_is_recovered_from() {
    with_each_qemu(async |qemu| {
        let machine = start(&qemu, MANY, &[]).await;
        let before = settings(&machine.qmp).await;
        for &stage in stages(&machine) {
            let helper = std::process::Command::new(std::env::current_exe().expect("own path"))
                .args(["--exact", "dying_helper", "--nocapture"])
                .env("STILLPOINT_TEST_STAGE", format!("{stage:?}"))
                .env("STILLPOINT_TEST_DIRECTORY", machine.directory.path())
                .output();
            let helper = helper.expect("start the helper");
            assert!(!helper.status.success() && helper.status.code().is_none(), "{stage:?}: {}", String::from_utf8_lossy(&helper.stderr));
            let stopped = run_state(&machine.qmp).await.expect("state");
            // The next helper, on the same socket as the dead one.
            let next = machine.second().await;
            let recovered = recover(&next, &journal(&machine)).await.expect("recover");
            eprintln!("{stage:?}: found {stopped}, {recovered:?}");
            assert!(recovered.found);
            assert_eq!(recovered.resumed, !matches!(stopped.as_str(), "running"), "{stage:?}: {stopped}");
            let again = recover(&next, &journal(&machine)).await.expect("again");
            assert!(!again.found && !again.resumed);
            drop(next);
            cleanup_leftovers(&machine.qmp, &"test".parse().expect("tag")).await.expect("clean up");
            assert_as_before(&machine, &before, &format!("{stage:?}")).await;
        }
    })
    .await;
}

/// A guest that its owner has stopped stays stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_guest_stays_stopped() {
    with_each_qemu(async |qemu| {
        let machine = start(&qemu, FEW, &[]).await;
        let before = settings(&machine.qmp).await;
        let keeps_state = snapshots(&machine);
        machine.qmp.execute_json("stop", Value::Null).await.expect("stop");
        let count = counter(&machine.qmp).await;
        let support = probe(&machine.qmp).await.expect("probe");
        assert!(support.stopped && support.pre_copy.is_ok());
        assert_eq!(support.background_snapshot.is_ok(), keeps_state, "{support:?}");
        let options = StreamOptions::default();
        if keeps_state {
            assert_eq!(support.preferred(), Some(StreamMode::BackgroundSnapshot));
            let (_, _, frozen) = stream(&machine, &machine.qmp, StreamMode::BackgroundSnapshot, &options, 1).await;
            frozen.settle().await.expect("settle");
            assert_eq!(run_state(&machine.qmp).await.expect("state"), "paused");
        } else {
            let refused = Migration::prepare(&machine.qmp, StreamMode::BackgroundSnapshot, &options, &journal(&machine)).await;
            assert!(matches!(&refused, Err(MigrationError::Unsupported { .. })), "{refused:?}");
            assert!(!journal(&machine).exists());
        }
        let (_, _, frozen) = stream(&machine, &machine.qmp, StreamMode::PreCopy, &options, 2).await;
        frozen.settle().await.expect("settle");
        assert_eq!(run_state(&machine.qmp).await.expect("state"), "postmigrate");
        assert_eq!(counter(&machine.qmp).await, count, "the guest ran");
        let again = probe(&machine.qmp).await.expect("probe");
        assert!(again.pre_copy.is_err_and(|why| why.contains("`cont`")));
        machine.qmp.execute_json("cont", Value::Null).await.expect("cont");
        assert_as_before(&machine, &before, "after the owner's cont").await;
    })
    .await;
}

/// From this state a background snapshot would make QEMU abort.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_has_not_begun_is_taken_by_pre_copy_only() {
    with_each_qemu(async |qemu| {
        let machine = start(&qemu, FEW, &["-S"]).await;
        let support = probe(&machine.qmp).await.expect("probe");
        assert!(support.background_snapshot.is_err_and(|why| why.contains("prelaunch") || !snapshots(&machine)));
        let refused = Migration::prepare(&machine.qmp, StreamMode::BackgroundSnapshot, &StreamOptions::default(), &journal(&machine)).await;
        assert!(matches!(&refused, Err(MigrationError::Unsupported { .. })), "{refused:?}");
        let (_, _, frozen) = stream(&machine, &machine.qmp, StreamMode::PreCopy, &StreamOptions::default(), 1).await;
        frozen.settle().await.expect("settle");
    })
    .await;
}

/// 8 MiB written over and over, and a reader that takes at most 32 MiB/s: no pause that anybody allowed is enough.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_writes_too_fast_is_told_of_or_stopped_longer() {
    with_each_qemu(async |qemu| {
        let machine = start(&qemu, MANY, &[]).await;
        let before = settings(&machine.qmp).await;
        let options = StreamOptions { max_pause: Duration::from_millis(20), ..StreamOptions::default() };
        let mut migration = Migration::prepare(&machine.qmp, StreamMode::PreCopy, &options, &journal(&machine)).await.expect("prepare");
        drain(migration.take_reader().expect("reader"), 64 << 10, Duration::from_millis(2));
        migration.start().await.expect("start");
        let error = migration.switchover().await.map(drop).expect_err("too fast");
        eprintln!("{error}");
        assert!(matches!(error, MigrationError::TooFast { .. }) && error.is_retryable(), "{error}");
        assert!(error.to_string().contains("allow a longer pause"), "{error}");
        migration.cancel().await.expect("cancel");
        assert_as_before(&machine, &before, "too fast").await;

        let options = StreamOptions { when_too_fast: WhenTooFast::SwitchOver, ..options };
        let mut migration = Migration::prepare(&machine.qmp, StreamMode::PreCopy, &options, &journal(&machine)).await.expect("prepare");
        drain(migration.take_reader().expect("reader"), 64 << 10, Duration::from_millis(2));
        migration.start().await.expect("start");
        let paused = migration.switchover().await.expect("switchover");
        migration.complete(&paused).await.expect("complete");
        let pause = paused.resume().await.expect("resume");
        assert!(pause > options.max_pause, "{pause:?}");
        migration.finish().await.expect("finish");
        assert_as_before(&machine, &before, "stopped longer").await;
    })
    .await;
}

/// The guest must not wait for a reader that stands still.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stops_or_hangs_up_costs_the_stream_only() {
    with_each_qemu(async |qemu| {
        let machine = start(&qemu, MANY, &[]).await;
        let before = settings(&machine.qmp).await;
        let options = StreamOptions { timeout: Duration::from_millis(400), ..StreamOptions::default() };
        for &mode in modes(&machine) {
            let mut migration = Migration::prepare(&machine.qmp, mode, &options, &journal(&machine)).await.expect("prepare");
            let _unread = migration.take_reader().expect("reader");
            let error = run(&machine.qmp, &mut migration).await.expect_err("nobody reads");
            assert!(matches!(error, MigrationError::Stuck { .. } | MigrationError::PauseTooLong { .. }), "{mode}: {error}");
            migration.cancel().await.expect("cancel");
            assert_as_before(&machine, &before, &format!("{mode}, nobody reads")).await;

            let mut migration = Migration::prepare(&machine.qmp, mode, &options, &journal(&machine)).await.expect("prepare");
            let mut reader = migration.take_reader().expect("reader");
            let hang_up = std::thread::spawn(move || {
                reader.read_exact(&mut [0; 4096]).expect("read");
                reader.shutdown(std::net::Shutdown::Both).expect("shutdown");
            });
            let error = run(&machine.qmp, &mut migration).await.expect_err("hung up");
            hang_up.join().expect("reader");
            assert!(matches!(&error, MigrationError::Failed { why, .. } if !why.is_empty()), "{mode}: {error}");
            eprintln!("{mode}: {error}");
            migration.cancel().await.expect("cancel");
            assert_as_before(&machine, &before, &format!("{mode}, hung up")).await;
        }
    })
    .await;
}

/// The worst moment: QEMU has given the disks away and sends the last pages, and nobody takes them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stops_in_the_pause_does_not_prolong_it() {
    with_each_qemu(async |qemu| {
        let machine = start(&qemu, MANY, &[]).await;
        let before = settings(&machine.qmp).await;
        let options = StreamOptions { timeout: Duration::from_secs(1), ..StreamOptions::default() };
        let mut migration = Migration::prepare(&machine.qmp, StreamMode::PreCopy, &options, &journal(&machine)).await.expect("prepare");
        let mut reader = migration.take_reader().expect("reader");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 256 << 10];
            while !stopped.load(Ordering::Relaxed) && reader.read(&mut buffer).is_ok_and(|count| count > 0) {}
            // Held open, as by a process that was stopped.
            std::thread::sleep(Duration::from_secs(30));
        });
        migration.start().await.expect("start");
        let paused = migration.switchover().await.expect("switchover");
        stop.store(true, Ordering::Relaxed);
        let error = migration.complete(&paused).await.expect_err("nobody reads");
        assert!(matches!(error, MigrationError::PauseTooLong { .. }), "{error}");
        assert!(paused.elapsed() < Duration::from_secs(2));
        drop(paused);
        migration.cancel().await.expect("cancel");
        assert_as_before(&machine, &before, "stopped in the pause").await;
    })
    .await;
}

/// The calls of a session in order, up to the end of the stream.
async fn run(qmp: &Qmp, migration: &mut Migration) -> Result<(), MigrationError> {
    match migration.mode() {
        StreamMode::PreCopy => {
            migration.start().await?;
            let paused = migration.switchover().await?;
            migration.complete(&paused).await?;
            paused.resume().await?;
        }
        StreamMode::BackgroundSnapshot => {
            let paused = Paused::stop(qmp).await?;
            migration.start().await?;
            migration.memory_is_held(paused).await?;
        }
    }
    let deadline = Instant::now() + Duration::from_millis(400);
    while Instant::now() < deadline {
        let progress = migration.progress().await?;
        if progress.status == "completed" {
            return Ok(());
        }
        if progress.status == "failed" {
            return Err(MigrationError::Failed { status: progress.status, why: progress.error.unwrap_or_default() });
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Err(MigrationError::Stuck { status: "active".into(), after: Duration::ZERO, hint: String::new() })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_of_somebody_else_is_left_alone() {
    with_each_qemu(async |qemu| {
        let machine = start(&qemu, FEW, &[]).await;
        let (theirs, ours) = UnixStream::pair().expect("pair");
        machine.qmp.execute_with_fd("getfd", json!({ "fdname": "owner" }), theirs.as_fd()).await.expect("getfd");
        machine.qmp.execute_json("migrate-set-parameters", json!({ "max-bandwidth": 4096 })).await.expect("slow");
        let before = settings(&machine.qmp).await;
        machine.qmp.execute_json("migrate", json!({ "uri": "fd:owner" })).await.expect("migrate");
        let reader = drain(ours, 4096, Duration::from_millis(20));
        let probed = probe(&machine.qmp).await;
        assert!(matches!(&probed, Err(MigrationError::Busy { .. })), "{probed:?}");
        let refused = Migration::prepare(&machine.qmp, StreamMode::PreCopy, &StreamOptions::default(), &journal(&machine)).await;
        assert!(refused.is_err_and(|error| error.to_string().contains("is being migrated")));
        assert_eq!(settings(&machine.qmp).await, before);
        let status = machine.qmp.execute_json("query-migrate", Value::Null).await.expect("status");
        assert!(status["status"] == "active" || status["status"] == "setup", "{status}");
        machine.qmp.execute_json("migrate_cancel", Value::Null).await.expect("cancel");
        reader.join().expect("reader");
        while matches!(probe(&machine.qmp).await, Err(MigrationError::Busy { .. })) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // What it leaves behind is no hindrance.
        let (_, _, frozen) = stream(&machine, &machine.qmp, StreamMode::PreCopy, &StreamOptions::default(), 1).await;
        frozen.settle().await.expect("settle");
        assert_as_before(&machine, &before, "after the owner's").await;
    })
    .await;
}

/// Not a test but a measurement, of Linux in a directory that `scripts/guest-image --vm` furnished, or of the counting guest:
/// `STILLPOINT_FIGURES=/tmp/m1 cargo test -p qmp-bridge --test migration --release -- --ignored --nocapture figures`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn figures() {
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let (rounds, megabytes) = (number("STILLPOINT_FIGURES_ROUNDS", 10), number("STILLPOINT_FIGURES_MIB", 1024));
    let furnished = std::env::var("STILLPOINT_FIGURES").ok();
    for backend in ["none", "memory-backend-ram", "memory-backend-memfd,share=on"] {
        with_each_qemu(async |qemu| {
            let memory = megabytes.to_string();
            let object = format!("{backend},id=memory,size={memory}M");
            let mut more = vec!["-m", &memory];
            if backend != "none" {
                more.extend(["-object", &object, "-machine", "memory-backend=memory"]);
            }
            let machine = match &furnished {
                Some(from) => start_linux(&qemu, Path::new(from), &more).await,
                None => start(&qemu, FEW, &more).await,
            };
            for &mode in modes(&machine) {
                eprintln!("{mode}, {megabytes} MiB, backend {backend}, resident {}", resident(&machine));
                let mut pauses = Vec::new();
                for seq in 1..=rounds {
                    let begun = Instant::now();
                    let (pause, bytes, frozen) = stream(&machine, &machine.qmp, mode, &StreamOptions::default(), seq).await;
                    eprintln!("    stream {:.0?} {} KiB, resident {}", begun.elapsed(), bytes >> 10, resident(&machine));
                    frozen.give_back().await.expect("give back");
                    pauses.push(pause);
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                pauses.sort();
                eprintln!("  pause p50 {:.1?} max {:.1?}", pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
            }
        })
        .await;
    }
}

async fn start_linux(qemu: &Path, furnished: &Path, more: &[&str]) -> TestQemu {
    let directory = tempfile::tempdir_in("/dev/shm").expect("directory");
    let list = std::fs::read_dir(furnished).expect("a furnished directory");
    for entry in list {
        let entry = entry.expect("entry");
        std::fs::copy(entry.path(), directory.path().join(entry.file_name())).expect("copy");
    }
    let mut arguments = vec!["-readconfig", "q35-virtio.cfg", "-accel", "tcg", "-serial", "file:serial.log"];
    arguments.extend(more);
    let machine = TestQemu::start_in(qemu, &arguments, directory).await;
    let deadline = Instant::now() + Duration::from_secs(120);
    while !std::fs::read_to_string(machine.path("serial.log")).unwrap_or_default().contains("WITNESS step=") {
        assert!(Instant::now() < deadline, "Linux does not come up");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    machine
}

fn resident(machine: &TestQemu) -> String {
    let status = std::fs::read_to_string(format!("/proc/{}/status", machine.pid())).unwrap_or_default();
    let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("?").trim().to_owned();
    format!("{} (page tables {})", line("VmRSS:"), line("VmPTE:"))
}
