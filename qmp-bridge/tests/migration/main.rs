//! Migration streams on real QEMUs: whatever happens to them, the guest runs on and QEMU is as it
//! was.

#[path = "../common/mod.rs"]
mod common;
mod figures;
mod vm;

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{TestQemu, with_each_qemu};
use qmp_bridge::capture::{
    CapturePlaces, CapturePlan, CapturedDisks, DEFAULT_FLEECING_RESERVE, PreparedDisks,
    cleanup_leftovers,
};
use qmp_bridge::migration::{
    Migration, MigrationError, MigrationStatus, StreamMode, StreamOptions, WhenTooFast, probe,
    recover,
};
use qmp_bridge::paused::{PauseError, run_state};
use qmp_bridge::{Paused, Qmp, disks};
use serde_json::{Value, json};
use vm::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_modes_leave_everything_as_it_was() {
    with_each_qemu(async |qemu| {
        let vm = start(&qemu, FEW, &[]).await;
        let before = settings(&vm.qmp).await;
        let support = probe(&vm.qmp).await.expect("probe");
        assert_eq!(
            (support.pre_copy.is_ok(), support.background_snapshot.is_ok()),
            (true, snapshots(&vm)),
            "{support:?}"
        );
        assert_eq!(support.preferred(), Some(StreamMode::PreCopy));
        assert_eq!(settings(&vm.qmp).await, before, "the probe changed something");
        let mut id = 0;
        for &mode in modes(&vm) {
            for _ in 0..2 {
                id += 1;
                let (pause, bytes, mut captured) =
                    stream(&vm, &vm.qmp, mode, &StreamOptions::default(), id).await;
                assert!(
                    pause < Duration::from_secs(2) && bytes > FEW * PAGE,
                    "{mode}: {pause:?}, {bytes} bytes"
                );
                captured.export().await.expect("export");
                captured.verify().await.expect("verify");
                common::acknowledge(captured).await;
                assert_as_before(&vm, &before, &mode.to_string()).await;
            }
        }
    })
    .await;
}

/// The owner's settings, some of which would spoil a stream or exclude its capabilities, come back
/// to the letter.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_of_the_owner_come_back() {
    with_each_qemu(async |qemu| {
        let vm = start(&qemu, FEW, &[]).await;
        let on = ["xbzrle", "auto-converge", "postcopy-ram", "return-path", "release-ram", "dirty-bitmaps", "validate-uuid"];
        let on: Vec<Value> = on.iter().map(|name| json!({ "capability": name, "state": true })).collect();
        vm.qmp.execute_json("migrate-set-capabilities", json!({ "capabilities": on })).await.expect("capabilities");
        let parameters = json!({ "max-bandwidth": 1 << 20, "downtime-limit": 77, "tls-creds": "theirs", "max-cpu-throttle": 50 });
        vm.qmp.execute_json("migrate-set-parameters", parameters).await.expect("parameters");
        let before = settings(&vm.qmp).await;
        let support = probe(&vm.qmp).await.expect("probe");
        assert_eq!(support.background_snapshot.is_ok(), snapshots(&vm), "{support:?}");
        assert_eq!(settings(&vm.qmp).await, before, "the probe changed something");
        for (id, &mode) in (1..).zip(modes(&vm)) {
            let (_, bytes, captured) = stream(&vm, &vm.qmp, mode, &StreamOptions::default(), id).await;
            assert!(bytes > FEW * PAGE, "{mode}: {bytes}");
            common::acknowledge(captured).await;
            assert_as_before(&vm, &before, &mode.to_string()).await;
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

const STAGES: [Stage; 6] = [
    Stage::Prepared,
    Stage::Started,
    Stage::SwitchedOver,
    Stage::Completed,
    Stage::SnapshotBegun,
    Stage::SnapshotHeld,
];

fn stages(vm: &TestQemu) -> &'static [Stage] {
    if snapshots(vm) { &STAGES } else { &STAGES[..4] }
}

/// All that a helper has in its hands at a stage.
struct Hands {
    _migration: Migration,
    _paused: Option<Paused>,
    _disks: Option<CapturedDisks>,
}

async fn get_to(vm_directory: &Path, qmp: &Qmp, stage: Stage) -> Hands {
    let journal = vm_directory.join("migration.json");
    let mode = if matches!(stage, Stage::SnapshotBegun | Stage::SnapshotHeld) {
        StreamMode::BackgroundSnapshot
    } else {
        StreamMode::PreCopy
    };
    let list = disks::list(qmp, Some(vm_directory)).await.expect("disks");
    let plan = CapturePlan {
        tag: common::INSTANCE.parse().expect("tag"),
        checkpoint: common::checkpoint(1),
        parent: None,
        fleecing_dir: vm_directory.into(),
        fleecing_reserve: DEFAULT_FLEECING_RESERVE,
        nbd_socket: vm_directory.join("nbd.sock"),
        streamed: true,
    };
    let disks = PreparedDisks::prepare(qmp, &list.disks, plan).await.expect("prepare disks");
    let mut migration =
        Migration::prepare(qmp, mode, &StreamOptions::default(), &journal).await.expect("prepare");
    // A stage in which the stream is under way needs a reader that is not at its end too soon.
    let slow = matches!(stage, Stage::Started | Stage::SnapshotHeld);
    let (chunk, pause) =
        if slow { (4096, Duration::from_millis(20)) } else { (1 << 20, Duration::ZERO) };
    upload(migration.take_reader().expect("reader"), chunk, pause);
    let mut hands = Hands { _migration: migration, _paused: None, _disks: None };
    let migration = &mut hands._migration;
    if mode == StreamMode::BackgroundSnapshot {
        let paused = Paused::stop(qmp).await.expect("stop");
        hands._disks = Some(disks.capture(&paused).await.expect("pause"));
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
            hands._disks = Some(disks.capture(&paused).await.expect("pause"));
        }
        hands._paused = Some(paused);
    }
    hands
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_session_leaves_everything_as_it_was() {
    with_each_qemu(async |qemu| {
        let vm = start(&qemu, MANY, &[]).await;
        let before = settings(&vm.qmp).await;
        for &stage in stages(&vm) {
            let hands = get_to(vm.directory.path(), &vm.qmp, stage).await;
            assert!(vm.path("migration.json").exists(), "{stage:?}: no journal");
            drop(hands);
            assert_as_before(&vm, &before, &format!("{stage:?}")).await;
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
    let qmp = Qmp::connect(directory.join("second.sock"), Duration::from_secs(5))
        .await
        .expect("connect")
        .for_instance(common::INSTANCE);
    let _hands = get_to(&directory, &qmp, stage).await;
    nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL).expect("kill");
    unreachable!("killed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_helper_is_recovered_from() {
    with_each_qemu(async |qemu| {
        let vm = start(&qemu, MANY, &[]).await;
        let before = settings(&vm.qmp).await;
        for &stage in stages(&vm) {
            let helper = std::process::Command::new(std::env::current_exe().expect("own path"))
                .args(["--exact", "dying_helper", "--nocapture"])
                .env("STILLPOINT_TEST_STAGE", format!("{stage:?}"))
                .env("STILLPOINT_TEST_DIRECTORY", vm.directory.path())
                .output();
            let helper = helper.expect("start the helper");
            assert!(
                !helper.status.success() && helper.status.code().is_none(),
                "{stage:?}: {}",
                String::from_utf8_lossy(&helper.stderr)
            );
            let stopped = run_state(&vm.qmp).await.expect("state");
            // The next helper, on the same socket as the dead one.
            let next = vm.second().await;
            let recovered = recover(&next, &journal(&vm)).await.expect("recover");
            eprintln!("{stage:?}: found {stopped}, {recovered:?}");
            assert!(recovered.found);
            assert_eq!(
                recovered.resumed,
                !matches!(stopped.as_str(), "running"),
                "{stage:?}: {stopped}"
            );
            let again = recover(&next, &journal(&vm)).await.expect("again");
            assert!(!again.found && !again.resumed);
            drop(next);
            let places = CapturePlaces {
                fleecing_dir: vm.directory.path(),
                nbd_socket: &vm.path("nbd.sock"),
            };
            cleanup_leftovers(&vm.qmp, &common::INSTANCE.parse().expect("tag"), places)
                .await
                .expect("clean up");
            assert_as_before(&vm, &before, &format!("{stage:?}")).await;
        }
    })
    .await;
}

/// A guest that its owner has stopped stays stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_guest_stays_stopped() {
    with_each_qemu(async |qemu| {
        let vm = start(&qemu, FEW, &[]).await;
        let before = settings(&vm.qmp).await;
        let keeps_state = snapshots(&vm);
        vm.qmp.execute_json("stop", Value::Null).await.expect("stop");
        let count = counter(&vm.qmp).await;
        let support = probe(&vm.qmp).await.expect("probe");
        assert!(support.stopped && support.pre_copy.is_ok());
        assert_eq!(support.background_snapshot.is_ok(), keeps_state, "{support:?}");
        let options = StreamOptions::default();
        if keeps_state {
            assert_eq!(support.preferred(), Some(StreamMode::BackgroundSnapshot));
            let (_, _, captured) =
                stream(&vm, &vm.qmp, StreamMode::BackgroundSnapshot, &options, 1).await;
            common::acknowledge(captured).await;
            assert_eq!(run_state(&vm.qmp).await.expect("state"), "paused");
        } else {
            let refused = Migration::prepare(
                &vm.qmp,
                StreamMode::BackgroundSnapshot,
                &options,
                &journal(&vm),
            )
            .await;
            assert!(matches!(&refused, Err(MigrationError::Unsupported { .. })), "{refused:?}");
            assert!(!journal(&vm).exists());
        }
        let (_, _, captured) = stream(&vm, &vm.qmp, StreamMode::PreCopy, &options, 2).await;
        common::acknowledge(captured).await;
        assert_eq!(run_state(&vm.qmp).await.expect("state"), "postmigrate");
        assert_eq!(counter(&vm.qmp).await, count, "the guest ran");
        let again = probe(&vm.qmp).await.expect("probe");
        assert!(again.pre_copy.is_err_and(|why| why.contains("`cont`")));
        vm.qmp.execute_json("cont", Value::Null).await.expect("cont");
        assert_as_before(&vm, &before, "after the owner's cont").await;
    })
    .await;
}

/// From this state a background snapshot would make QEMU abort.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_has_not_begun_is_taken_by_pre_copy_only() {
    with_each_qemu(async |qemu| {
        let vm = start(&qemu, FEW, &["-S"]).await;
        let support = probe(&vm.qmp).await.expect("probe");
        assert!(
            support
                .background_snapshot
                .is_err_and(|why| why.contains("prelaunch") || !snapshots(&vm))
        );
        let refused = Migration::prepare(
            &vm.qmp,
            StreamMode::BackgroundSnapshot,
            &StreamOptions::default(),
            &journal(&vm),
        )
        .await;
        assert!(matches!(&refused, Err(MigrationError::Unsupported { .. })), "{refused:?}");
        let (_, _, captured) =
            stream(&vm, &vm.qmp, StreamMode::PreCopy, &StreamOptions::default(), 1).await;
        common::acknowledge(captured).await;
    })
    .await;
}

/// The guest writes 8 MiB over and over, and the reader takes at most 16 MiB/s: no pause within the
/// limits of the options is long enough.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guest_that_writes_too_fast_gets_an_error_or_a_longer_pause() {
    with_each_qemu(async |qemu| {
        let vm = start(&qemu, MANY, &[]).await;
        let before = settings(&vm.qmp).await;
        let options =
            StreamOptions { max_pause: Duration::from_millis(5), ..StreamOptions::default() };
        let mut migration =
            Migration::prepare(&vm.qmp, StreamMode::PreCopy, &options, &journal(&vm))
                .await
                .expect("prepare");
        upload(migration.take_reader().expect("reader"), 64 << 10, Duration::from_millis(4));
        migration.start().await.expect("start");
        let error = migration.switchover().await.map(drop).expect_err("too fast");
        eprintln!("{error}");
        assert!(matches!(error, MigrationError::TooFast { .. }) && error.is_retryable(), "{error}");
        assert!(error.to_string().contains("allow a longer pause"), "{error}");
        migration.cancel().await.expect("cancel");
        assert_as_before(&vm, &before, "too fast").await;

        let options = StreamOptions { when_too_fast: WhenTooFast::SwitchOver, ..options };
        let mut migration =
            Migration::prepare(&vm.qmp, StreamMode::PreCopy, &options, &journal(&vm))
                .await
                .expect("prepare");
        upload(migration.take_reader().expect("reader"), 64 << 10, Duration::from_millis(4));
        migration.start().await.expect("start");
        let paused = migration.switchover().await.expect("switchover");
        migration.complete(&paused).await.expect("complete");
        let pause = paused.resume().await.expect("resume");
        assert!(pause > options.max_pause, "{pause:?}");
        migration.finish().await.expect("finish");
        assert_as_before(&vm, &before, "stopped longer").await;
    })
    .await;
}

/// The guest must not wait for a reader that is stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stops_or_hangs_up_costs_the_stream_only() {
    with_each_qemu(async |qemu| {
        let vm = start(&qemu, MANY, &[]).await;
        let before = settings(&vm.qmp).await;
        let options =
            StreamOptions { timeout: Duration::from_millis(400), ..StreamOptions::default() };
        for &mode in modes(&vm) {
            let mut migration =
                Migration::prepare(&vm.qmp, mode, &options, &journal(&vm)).await.expect("prepare");
            let _unread = migration.take_reader().expect("reader");
            let error = run(&vm.qmp, &mut migration).await.expect_err("no reader");
            assert!(
                matches!(error, MigrationError::Stuck { .. } | MigrationError::PauseTooLong { .. }),
                "{mode}: {error}"
            );
            migration.cancel().await.expect("cancel");
            assert_as_before(&vm, &before, &format!("{mode}, no reader")).await;

            let mut migration =
                Migration::prepare(&vm.qmp, mode, &options, &journal(&vm)).await.expect("prepare");
            let mut reader = migration.take_reader().expect("reader");
            let hang_up = std::thread::spawn(move || {
                reader.read_exact(&mut [0; 4096]).expect("read");
                reader.shutdown(std::net::Shutdown::Both).expect("shutdown");
            });
            let error = run(&vm.qmp, &mut migration).await.expect_err("hung up");
            hang_up.join().expect("reader");
            assert!(
                matches!(&error, MigrationError::Failed { why, .. } if !why.is_empty()),
                "{mode}: {error}"
            );
            eprintln!("{mode}: {error}");
            migration.cancel().await.expect("cancel");
            assert_as_before(&vm, &before, &format!("{mode}, hung up")).await;
        }
    })
    .await;
}

/// QEMU 10.0 aborts at the `cont` after the migration of a suspended guest; 7.2 wakes it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_suspends_itself_meanwhile_stays_suspended() {
    with_each_qemu(async |qemu| {
        let vm = start(&qemu, MANY, &[]).await;
        let mut migration = Migration::prepare(
            &vm.qmp,
            StreamMode::PreCopy,
            &StreamOptions::default(),
            &journal(&vm),
        )
        .await
        .expect("prepare");
        let reader = migration.take_reader().expect("reader");
        migration.start().await.expect("start");
        suspend(&vm.qmp).await;
        upload(reader, 1 << 20, Duration::ZERO);
        let error = migration.switchover().await.map(drop).expect_err("suspended");
        assert!(matches!(&error, MigrationError::Unsupported { .. }), "{error}");
        migration.cancel().await.expect("cancel");
        if vm.qmp.version().major >= 9 {
            assert_eq!(run_state(&vm.qmp).await.expect("status"), "suspended");
            let refused = Migration::prepare(
                &vm.qmp,
                StreamMode::PreCopy,
                &StreamOptions::default(),
                &journal(&vm),
            )
            .await;
            assert!(matches!(&refused, Err(MigrationError::Unsupported { .. })), "{refused:?}");
            vm.qmp.hmp("system_wakeup").await.expect("wake");
        }
        while run_state(&vm.qmp).await.expect("status") != "running" {}
        let (_, _, captured) =
            stream(&vm, &vm.qmp, StreamMode::PreCopy, &StreamOptions::default(), 1).await;
        common::acknowledge(captured).await;
    })
    .await;
}

/// The worst moment: QEMU has inactivated the disks and sends the last pages, and the reader does
/// not read them. QEMU reads no command then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stops_in_the_pause_does_not_prolong_it() {
    with_each_qemu(async |qemu| {
        let vm = start(&qemu, MANY, &[]).await;
        let before = settings(&vm.qmp).await;
        for given_up in [true, false] {
            let options =
                StreamOptions { timeout: Duration::from_secs(1), ..StreamOptions::default() };
            let mut migration =
                Migration::prepare(&vm.qmp, StreamMode::PreCopy, &options, &journal(&vm))
                    .await
                    .expect("prepare");
            let mut reader = migration.take_reader().expect("reader");
            let stop = Arc::new(AtomicBool::new(false));
            let stopped = stop.clone();
            let (release, held) = std::sync::mpsc::sync_channel::<()>(1);
            std::thread::spawn(move || {
                let mut buffer = vec![0; 256 << 10];
                while !stopped.load(Ordering::Relaxed)
                    && reader.read(&mut buffer).is_ok_and(|count| count > 0)
                {}
                // Held open to the end, as by a process that was stopped.
                let _ = held.recv();
            });
            migration.start().await.expect("start");
            let paused = migration.switchover().await.expect("switchover");
            stop.store(true, Ordering::Relaxed);
            let error = migration.complete(&paused).await.expect_err("no reader");
            assert!(matches!(error, MigrationError::PauseTooLong { .. }), "{error}");
            let begun = Instant::now() - paused.elapsed();
            if given_up {
                drop(paused);
            } else {
                // QEMU may have let the guest run already, because its stream was cut.
                let resumed = paused.resume().await;
                assert!(
                    matches!(resumed, Ok(_) | Err(PauseError::Disturbed { .. })),
                    "{resumed:?}"
                );
            }
            assert!(begun.elapsed() < Duration::from_secs(3));
            migration.cancel().await.expect("cancel");
            assert_as_before(&vm, &before, "stopped in the pause").await;
            drop(release);
        }
    })
    .await;
}

/// What a firmware does to enable the power management's ports at 0x600, and then a guest for S3.
async fn suspend(qmp: &Qmp) {
    for (register, size, value) in [(0x40, 'w', 0x601), (0x80, 'b', 1), (4, 'h', 1)] {
        let select = format!("o /w 0xcf8 {:#x}", 0x8000_0b00_u32 + register);
        qmp.hmp(&select).await.expect("an output");
        qmp.hmp(&format!("o /{size} 0xcfc {value:#x}")).await.expect("an output");
    }
    qmp.hmp("o /h 0x604 0x2400").await.expect("an output");
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
        let (what, status) = ("the stream", progress.status);
        if status == MigrationStatus::Completed {
            return Ok(());
        }
        if status == MigrationStatus::Failed {
            let why = progress.error_desc.unwrap_or_default();
            return Err(MigrationError::Failed { what, status, why });
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (what, status) = ("the stream", MigrationStatus::Active);
    Err(MigrationError::Stuck { what, status, after: Duration::ZERO, hint: "" })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migration_of_another_client_is_left_alone() {
    with_each_qemu(async |qemu| {
        let vm = start(&qemu, FEW, &[]).await;
        let (theirs, ours) = UnixStream::pair().expect("pair");
        vm.qmp
            .execute_with_fd("getfd", json!({ "fdname": "owner" }), theirs.as_fd())
            .await
            .expect("getfd");
        vm.qmp
            .execute_json("migrate-set-parameters", json!({ "max-bandwidth": 4096 }))
            .await
            .expect("slow");
        let before = settings(&vm.qmp).await;
        vm.qmp.execute_json("migrate", json!({ "uri": "fd:owner" })).await.expect("migrate");
        let reader = upload(ours, 4096, Duration::from_millis(20));
        let probed = probe(&vm.qmp).await;
        assert!(matches!(&probed, Err(MigrationError::Busy { .. })), "{probed:?}");
        let refused = Migration::prepare(
            &vm.qmp,
            StreamMode::PreCopy,
            &StreamOptions::default(),
            &journal(&vm),
        )
        .await;
        assert!(refused.is_err_and(|error| error.to_string().contains("is being migrated")));
        assert_eq!(settings(&vm.qmp).await, before);
        let status = vm.qmp.execute_json("query-migrate", Value::Null).await.expect("status");
        assert!(status["status"] == "active" || status["status"] == "setup", "{status}");
        vm.qmp.execute_json("migrate_cancel", Value::Null).await.expect("cancel");
        reader.join().expect("reader");
        while matches!(probe(&vm.qmp).await, Err(MigrationError::Busy { .. })) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // What it leaves behind is no hindrance.
        let (_, _, captured) =
            stream(&vm, &vm.qmp, StreamMode::PreCopy, &StreamOptions::default(), 1).await;
        common::acknowledge(captured).await;
        assert_as_before(&vm, &before, "after the owner's").await;
    })
    .await;
}
