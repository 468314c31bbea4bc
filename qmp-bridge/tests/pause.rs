//! The pause on real QEMUs: short, and over whatever happens to the helper.

mod common;

use std::time::{Duration, Instant};

use common::loop_guest::{self, guest_memory};
use common::with_each_qemu;
use qmp_bridge::capture::{CapturePlan, DEFAULT_SCRATCH_RESERVE, PreparedDisks, cleanup_leftovers};
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
        assert!(!cleanup_leftovers(&machine.qmp, &tag).await.expect("clean up").resumed);
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
    let plan =
        CapturePlan { tag, seq, parent, scratch_dir, scratch_reserve: DEFAULT_SCRATCH_RESERVE, nbd_socket: machine.path("nbd.sock") };
    let start = Instant::now();
    let prepared = PreparedDisks::prepare(qmp, disks, plan).await.expect("prepare");
    let state = DeviceStateFile::new(std::path::Path::new("/dev/shm")).expect("name");
    let prepare = start.elapsed();
    let paused = Paused::stop(qmp).await.expect("stop");
    let stop = paused.elapsed();
    let frozen = prepared.freeze(&paused).await.expect("freeze");
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
