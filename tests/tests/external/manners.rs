//! A guest in an external QEMU: the owner's settings are kept, the owner's operations have
//! priority, and the helper leaves nothing behind.

use engine::checkpoint::outcome::Kind;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use stillpoint_tests::{
    Footprint, Lab, QmpClient, Recipe, TestVm, descriptors, major_version, newest_qemu,
    on_each_qemu, stream_modes, wait_for_scribbles, wait_until,
};

/// Other values than QEMU's own, and a capability that does not go together with a background
/// snapshot.
fn set_owners_values(monitor: &mut QmpClient) {
    let capabilities = json!([{"capability": "events", "state": true}, {"capability": "auto-converge", "state": true}]);
    monitor.execute("migrate-set-capabilities", json!({"capabilities": capabilities}));
    monitor.execute(
        "migrate-set-parameters",
        json!({"max-bandwidth": 34_567_890, "downtime-limit": 451}),
    );
}

fn leaves_nothing(qemu: &Path, mode: &str) {
    let lab = Lab::new(qemu);
    let vm = lab.start_plain("m", &Recipe::scribbler(2));
    let mut monitor = vm.qmp();
    set_owners_values(&mut monitor);
    let before = Footprint::of(&mut monitor);
    let files_before = descriptors(vm.qemu());
    vm.attach_plain(&["--stream", mode]);
    vm.checkpoint();
    let (after_one, files_after_one) = (Footprint::of(&mut monitor), descriptors(vm.qemu()));
    for _ in 0..3 {
        monitor.disk_io("odd", "write -P 1 0 1M");
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(vm.checkpoint().outcome.kind, Kind::Incremental);
    }
    let (mut after, files_after) = (Footprint::of(&mut monitor), descriptors(vm.qemu()));
    let bitmaps = after.take_bitmaps();
    assert_eq!(
        bitmaps.len(),
        6,
        "{mode}: a bitmap and a size mark for each of three disks: {bitmaps:?}"
    );
    assert_eq!(before.differences(&after), [""; 0], "{mode}");
    let mut after_one = after_one;
    assert_eq!(after_one.take_bitmaps().len(), 6);
    assert_eq!(after_one.differences(&after), [""; 0], "{mode}");
    assert_eq!(files_after_one, files_after, "{mode}: descriptors pile up");
    vm.kill_helper();
    // Event descriptors and the userfaultfd device are QEMU's own, which it keeps once it had to
    // open them.
    let without_own = |mut kinds: BTreeMap<String, usize>| {
        ["anon_inode", "/dev/userfaultfd"]
            .iter()
            .for_each(|own| kinds.retain(|kind, _| kind != own));
        kinds
    };
    let files_before = without_own(files_before);
    let same = || without_own(descriptors(vm.qemu())) == files_before;
    assert!(
        wait_until(Duration::from_secs(2), same),
        "{mode}: {:?} open, {files_before:?} before",
        descriptors(vm.qemu())
    );
}

#[test]
fn what_was_found_is_left_as_it_was() {
    on_each_qemu(|qemu| stream_modes(qemu).iter().for_each(|mode| leaves_nothing(qemu, mode)));
}

#[test]
fn a_guest_that_its_owner_stopped_stays_stopped() {
    on_each_qemu(|qemu| {
        for mode in stream_modes(qemu) {
            let lab = Lab::new(qemu);
            let vm = lab.start_plain("m", &Recipe::scribbler(6));
            let mut monitor = vm.qmp();
            wait_for_scribbles(&mut monitor);
            vm.attach_plain(&["--stream", mode]);
            vm.checkpoint();
            monitor.stop();
            monitor.events();
            vm.checkpoint();
            assert!(!monitor.is_running(), "{mode}");
            let ran = monitor.events().iter().any(|event| event["event"] == "RESUME");
            assert!(!ran, "{mode}: it ran for a moment");
            monitor.cont();
            std::thread::sleep(Duration::from_millis(300));
            assert_eq!(vm.checkpoint().outcome.kind, Kind::Incremental, "{mode}");
            assert!(monitor.is_running(), "{mode}");
        }
    });
}

/// Before 9.0 a guest would hang with the reader of its snapshot.
#[test]
fn a_background_snapshot_that_could_hang_the_guest_is_refused() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let vm = lab.start_plain("m", &Recipe::scribbler(6));
        let ran = vm.try_attach_plain(&["--stream", "background-snapshot"], &[]);
        let expected = if major_version(qemu) >= 9 { 0 } else { 3 };
        assert_eq!(ran.code, expected, "{ran:?}");
        vm.kill_helper();
        vm.attach_plain(&[]);
        vm.checkpoint();
        lab.verify("m");
    });
}

/// A monitor of QEMU serves one client at a time; a second one waits for ever.
#[test]
fn a_busy_monitor_is_refused() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let vm = lab.start_plain("m", &Recipe::scribbler(2));
        let other = QmpClient::connect(&vm.directory.join("qmp.sock"));
        let said = vm.try_attach_plain(&[], &[]).expect_failure(3);
        assert!(said.contains("qmp.sock") && said.contains("-qmp"), "no remedy in: {said}");
        assert!(vm.helper().is_none(), "a helper was left");
        drop(other);
        vm.attach_plain(&[]);
        vm.checkpoint();
    });
}

#[test]
fn attach_to_a_missing_socket_is_refused() {
    let lab = Lab::new(&newest_qemu());
    let missing = lab.path().join("missing.sock");
    let ran = lab.run(&[
        "attach",
        "--qmp",
        missing.to_str().expect("UTF-8"),
        "--store",
        lab.store(),
        "--name",
        "m",
    ]);
    assert!([1, 3].contains(&ran.code) && ran.err.contains("missing.sock"), "{ran:?}");
    assert!(!lab.store_directory().exists(), "a store was made for no VM");
}

/// QEMU can be in one migration at a time, and it is the owner's.
#[test]
fn a_migration_of_the_owner_goes_first() {
    on_each_qemu(|qemu| {
        for mode in stream_modes(qemu) {
            let lab = Lab::new(qemu);
            let vm = lab.start_plain("m", &Recipe::witness("q35-virtio.cfg"));
            vm.wait_for_witness();
            vm.attach_plain(&["--stream", mode]);
            let first = vm.checkpoint().outcome;
            let mut monitor = vm.qmp();
            begin_slow_migration(&mut monitor);
            let said = vm.try_checkpoint().expect_failure(3);
            assert!(said.contains("migrat"), "{mode}: {said}");
            assert_eq!(
                migration_status(&mut monitor),
                "active",
                "{mode}: the owner's migration was touched"
            );
            vm.assert_makes_progress();
            monitor.execute("migrate_cancel", json!({}));
            let is_over = wait_until(Duration::from_secs(10), || {
                migration_status(&mut monitor) == "cancelled"
            });
            assert!(is_over, "{}", migration_status(&mut monitor));
            let next = vm.checkpoint().outcome;
            assert_eq!((next.kind, next.parent), (Kind::Incremental, Some(first.id)), "{mode}");
            attach_meanwhile(&vm, &mut monitor);
            lab.verify("m");
        }
    });
}

/// Whether a helper that comes during the owner's migration is refused or waits for its first
/// checkpoint: the guest continues.
fn attach_meanwhile(vm: &TestVm, monitor: &mut QmpClient) {
    vm.kill_helper();
    begin_slow_migration(monitor);
    let ran = vm.try_attach_plain(&[], &[]);
    assert!([0, 3].contains(&ran.code), "{ran:?}");
    assert_eq!(migration_status(monitor), "active", "the owner's migration was touched");
    vm.assert_makes_progress();
    monitor.execute("migrate_cancel", json!({}));
}

fn begin_slow_migration(monitor: &mut QmpClient) {
    monitor.execute("migrate-set-parameters", json!({"max-bandwidth": 4096}));
    monitor.execute("migrate", json!({"uri": "exec:cat >/dev/null"}));
    let is_active = wait_until(Duration::from_secs(10), || migration_status(monitor) == "active");
    assert!(is_active, "{}", migration_status(monitor));
}

fn migration_status(monitor: &mut QmpClient) -> String {
    monitor.execute("query-migrate", json!({}))["status"].as_str().unwrap_or("none").to_owned()
}
