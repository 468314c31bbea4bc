//! The pause on real QEMUs: short, and over whatever happens to the helper.

mod common;

use std::time::{Duration, Instant};

use common::loop_guest::{self, guest_memory};
use common::{TestQemu, with_each_qemu};
use qmp_bridge::capture::{CapturePlaces, CapturePlan, DEFAULT_SCRATCH_RESERVE, PreparedDisks, cleanup_leftovers};
use qmp_bridge::device_state::DeviceStateFile;
use qmp_bridge::paused::run_state;
use qmp_bridge::{Paused, Qmp, disks};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_pause_ends_though_the_connection_ends_with_it() {
    with_each_qemu(async |qemu| {
        let machine = loop_guest::start(&qemu, "pc", &guest_memory(), &[]).await;
        for _ in 0..30 {
            let helper = machine.second().await;
            let paused = Paused::stop(&helper).await.expect("stop");
            assert_eq!(run_state(&machine.qmp).await.expect("state"), "paused");
            drop(helper);
            drop(paused);
            assert_eq!(run_state(&machine.qmp).await.expect("state"), "running");
        }
    })
    .await;
}

#[tokio::test]
async fn a_guest_that_its_owner_stopped_stays_so() {
    with_each_qemu(async |qemu| {
        let machine = loop_guest::start(&qemu, "pc", &guest_memory(), &[]).await;
        machine.qmp.execute_json("stop", serde_json::Value::Null).await.expect("stop");
        Paused::stop(&machine.qmp).await.expect("stop").resume().await.expect("resume");
        let tag = "t".parse().expect("tag");
        let places = CapturePlaces { scratch_dir: machine.directory.path(), nbd_socket: &machine.path("nbd.sock") };
        assert!(!cleanup_leftovers(&machine.qmp, &tag, places).await.expect("clean up").resumed);
        assert_eq!(run_state(&machine.qmp).await.expect("state"), "paused");
    })
    .await;
}

/// Not a bound but a record: `cargo test -p qmp-bridge --test pause -- --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_parts_of_a_pause() {
    with_each_qemu(async |qemu| {
        let machine = loop_guest::start(&qemu, "q35", &guest_memory(), &[]).await;
        let disks = disks::list(&machine.qmp, Some(machine.directory.path())).await.expect("disks");
        let mut parent = None;
        for seq in 1..=6 {
            let total = one_pause(&machine.qmp, &machine, &disks.disks, seq, parent).await;
            assert!(total < Duration::from_secs(2));
            parent = Some(seq);
        }
    })
    .await;
}

async fn one_pause(qmp: &Qmp, machine: &common::TestQemu, disks: &[disks::Disk], seq: u64, parent: Option<u64>) -> Duration {
    let tag = "test".parse().expect("tag");
    let scratch_dir = machine.directory.path().to_owned();
    let plan = CapturePlan {
        tag,
        seq,
        parent,
        scratch_dir,
        scratch_reserve: DEFAULT_SCRATCH_RESERVE,
        nbd_socket: machine.path("nbd.sock"),
        streamed: false,
    };
    let start = Instant::now();
    let prepared = PreparedDisks::prepare(qmp, disks, plan).await.expect("prepare");
    let state = DeviceStateFile::prepare(&machine.qmp, std::path::Path::new("/dev/shm")).await.expect("file");
    let prepare = start.elapsed();
    let paused = Paused::stop(qmp).await.expect("stop");
    let stop = paused.elapsed();
    let mut frozen = prepared.freeze(&paused).await.expect("freeze");
    let freeze = paused.elapsed();
    state.save(&paused).await.expect("state");
    let save = paused.elapsed();
    let total = paused.resume().await.expect("resume");
    let start = Instant::now();
    let bytes = state.read().expect("read").as_bytes().len();
    frozen.export().await.expect("export");
    frozen.verify().await.expect("verify");
    frozen.settle().await.expect("settle");
    eprintln!(
        "prepare {prepare:.1?} | stop {stop:.2?} disks {:.2?} devices {:.2?} cont {:.2?} total {total:.2?} | after {:.1?}, {bytes} bytes of device state",
        freeze - stop,
        save - freeze,
        total - save,
        start.elapsed(),
    );
    total
}

/// What the guest has written and nobody has flushed is written within the pause, unless it was flushed before. A record, and
/// a bound that holds on any host: `cargo test -p qmp-bridge --test pause flush -- --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flush_before_a_stop_is_not_in_the_pause() {
    const UNFLUSHED: u64 = 128 << 20;
    with_each_qemu(async |qemu| {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("directory");
        std::fs::File::create(directory.path().join("disk.raw")).and_then(|file| file.set_len(UNFLUSHED)).expect("disk");
        let arguments = ["-M", "q35", "-m", "16", "-drive", "if=none,id=disk,file=disk.raw,format=raw", "-device", "ide-hd,drive=disk"];
        let machine = TestQemu::start_in(&qemu, &arguments, directory).await;
        let disks = disks::list(&machine.qmp, Some(machine.directory.path())).await.expect("disks");
        let plan = |seq| CapturePlan {
            tag: common::INSTANCE.parse().expect("tag"),
            seq,
            parent: None,
            scratch_dir: machine.directory.path().into(),
            scratch_reserve: 0,
            nbd_socket: machine.path("nbd.sock"),
            streamed: false,
        };
        let mut pauses = [Duration::ZERO; 2];
        for seq in 1..=4 {
            let prepared = PreparedDisks::prepare(&machine.qmp, &disks.disks, plan(seq)).await.expect("prepare");
            machine.write_disk("disk", seq as u8, 0, UNFLUSHED).await;
            let begun = Instant::now();
            if seq % 2 == 0 {
                prepared.flush(Duration::from_secs(30)).await.expect("flush");
            }
            let flushed = begun.elapsed();
            let paused = Paused::stop(&machine.qmp).await.expect("stop");
            let pause = paused.resume().await.expect("resume");
            eprintln!("{} MiB unflushed, flush before: {}: flush {flushed:.1?}, pause {pause:.1?}", UNFLUSHED >> 20, seq % 2 == 0);
            pauses[(seq % 2) as usize] += pause;
            prepared.discard().await.expect("discard");
        }
        assert!(pauses[0] < pauses[1], "{pauses:?}");
    })
    .await;
}
