//! The pause on real QEMUs: short, and over whatever happens to the helper.

mod common;

use std::time::{Duration, Instant};

use common::loop_guest::{self, guest_memory};
use common::{TestQemu, with_each_qemu};
use qmp_bridge::capture::{
    CapturePlaces, CapturePlan, DEFAULT_FLEECING_RESERVE, PreparedDisks, cleanup_leftovers,
};
use qmp_bridge::device_state::DeviceStateFile;
use qmp_bridge::paused::run_state;
use qmp_bridge::{Paused, Qmp, disks};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_pause_ends_though_the_connection_ends_with_it() {
    with_each_qemu(async |qemu| {
        let vm = loop_guest::start(&qemu, "pc", &guest_memory(), &[]).await;
        for _ in 0..30 {
            let helper = vm.second().await;
            let paused = Paused::stop(&helper).await.expect("stop");
            assert_eq!(run_state(&vm.qmp).await.expect("state"), "paused");
            drop(helper);
            drop(paused);
            assert_eq!(run_state(&vm.qmp).await.expect("state"), "running");
        }
    })
    .await;
}

#[tokio::test]
async fn a_guest_that_its_owner_stopped_stays_so() {
    with_each_qemu(async |qemu| {
        let vm = loop_guest::start(&qemu, "pc", &guest_memory(), &[]).await;
        vm.qmp.execute_json("stop", serde_json::Value::Null).await.expect("stop");
        Paused::stop(&vm.qmp).await.expect("stop").resume().await.expect("resume");
        let tag = "t".parse().expect("tag");
        let places =
            CapturePlaces { fleecing_dir: vm.directory.path(), nbd_socket: &vm.path("nbd.sock") };
        assert!(!cleanup_leftovers(&vm.qmp, &tag, places).await.expect("clean up").resumed);
        assert_eq!(run_state(&vm.qmp).await.expect("state"), "paused");
    })
    .await;
}

/// Not a bound but a record: `cargo test -p qmp-bridge --test pause -- --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_parts_of_a_pause() {
    with_each_qemu(async |qemu| {
        let vm = loop_guest::start(&qemu, "q35", &guest_memory(), &[]).await;
        let disks = disks::list(&vm.qmp, Some(vm.directory.path())).await.expect("disks");
        let mut parent = None;
        for id in 1..=6 {
            let total = one_pause(&vm.qmp, &vm, &disks.disks, id, parent).await;
            assert!(total < Duration::from_secs(2));
            parent = Some(id);
        }
    })
    .await;
}

async fn one_pause(
    qmp: &Qmp,
    vm: &common::TestQemu,
    disks: &[disks::Disk],
    id: u64,
    parent: Option<u64>,
) -> Duration {
    let tag = "test".parse().expect("tag");
    let fleecing_dir = vm.directory.path().to_owned();
    let plan = CapturePlan {
        tag,
        checkpoint: common::checkpoint(id),
        parent,
        fleecing_dir,
        fleecing_reserve: DEFAULT_FLEECING_RESERVE,
        nbd_socket: vm.path("nbd.sock"),
        streamed: false,
    };
    let start = Instant::now();
    let prepared = PreparedDisks::prepare(qmp, disks, plan).await.expect("prepare");
    let state =
        DeviceStateFile::prepare(&vm.qmp, std::path::Path::new("/dev/shm")).await.expect("file");
    let prepare = start.elapsed();
    let paused = Paused::stop(qmp).await.expect("stop");
    let stop = paused.elapsed();
    let mut captured = prepared.capture(&paused).await.expect("pause");
    let capture = paused.elapsed();
    state.save(&paused).await.expect("state");
    let save = paused.elapsed();
    let total = paused.resume().await.expect("resume");
    let start = Instant::now();
    let bytes = state.read().expect("read").as_bytes().len();
    captured.export().await.expect("export");
    captured.verify().await.expect("verify");
    common::acknowledge(captured).await;
    eprintln!(
        "prepare {prepare:.1?} | stop {stop:.2?} disks {:.2?} devices {:.2?} cont {:.2?} total {total:.2?} | after {:.1?}, {bytes} bytes of device state",
        capture - stop,
        save - capture,
        total - save,
        start.elapsed(),
    );
    total
}

/// QEMU flushes within the pause what the guest has written and not flushed, unless the helper
/// flushed it before. A record, and a bound that holds on any host:
/// `cargo test -p qmp-bridge --test pause flush -- --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flush_before_a_stop_is_not_in_the_pause() {
    const UNFLUSHED: u64 = 128 << 20;
    with_each_qemu(async |qemu| {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("directory");
        std::fs::File::create(directory.path().join("disk.raw"))
            .and_then(|file| file.set_len(UNFLUSHED))
            .expect("disk");
        let arguments = [
            "-M",
            "q35",
            "-m",
            "16",
            "-drive",
            "if=none,id=disk,file=disk.raw,format=raw",
            "-device",
            "ide-hd,drive=disk",
        ];
        let vm = TestQemu::start_in(&qemu, &arguments, directory).await;
        let disks = disks::list(&vm.qmp, Some(vm.directory.path())).await.expect("disks");
        let plan = |id| CapturePlan {
            tag: common::INSTANCE.parse().expect("tag"),
            checkpoint: common::checkpoint(id),
            parent: None,
            fleecing_dir: vm.directory.path().into(),
            fleecing_reserve: 0,
            nbd_socket: vm.path("nbd.sock"),
            streamed: false,
        };
        let mut pauses = [Duration::ZERO; 2];
        for id in 1..=4 {
            let prepared =
                PreparedDisks::prepare(&vm.qmp, &disks.disks, plan(id)).await.expect("prepare");
            vm.write_disk("disk", id as u8, 0, UNFLUSHED).await;
            let begun = Instant::now();
            if id % 2 == 0 {
                prepared.flush(Duration::from_secs(30)).await.expect("flush");
            }
            let flushed = begun.elapsed();
            let paused = Paused::stop(&vm.qmp).await.expect("stop");
            let pause = paused.resume().await.expect("resume");
            eprintln!(
                "{} MiB unflushed, flush before: {}: flush {flushed:.1?}, pause {pause:.1?}",
                UNFLUSHED >> 20,
                id % 2 == 0
            );
            pauses[(id % 2) as usize] += pause;
            prepared.discard().await.expect("discard");
        }
        assert!(pauses[0] < pauses[1], "{pauses:?}");
    })
    .await;
}
