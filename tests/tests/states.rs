//! Run states: what a guest was doing is part of its checkpoint, taking one changes nothing about
//! it, and a restored VM does the same.

use checkpoint_format::CheckpointId;
use engine::checkpoint::outcome::{Kind, Outcome};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use stillpoint_tests::{
    Lab, QmpClient, Recipe, SCRIBBLER_RAM_BYTES, SmallStore, TestVm, major_version, newest_qemu,
    on_each_qemu, stream_modes, wait_for_scribbles, wait_until,
};

const TIMEOUT: Duration = Duration::from_secs(20);

fn state(monitor: &mut QmpClient) -> String {
    monitor.execute("query-status", json!({}))["status"].as_str().expect("QEMU says so").to_owned()
}

fn wait_for_state(monitor: &mut QmpClient, wanted: &str) {
    let reached = wait_until(TIMEOUT, || state(monitor) == wanted);
    assert!(reached, "the run state is {} and not {wanted}", state(monitor));
}

/// A guest that stops for every reason.
fn recipe(seed: u32) -> Recipe {
    let actions = "panic=pause,watchdog=pause,reboot=shutdown,shutdown=pause";
    Recipe::scribbler(seed)
        .arguments(&["-S", "-action", actions, "-device", "pvpanic", "-device", "ib700"])
}

/// How a guest that runs gets into each state, by what an administrator or the guest itself would
/// do.
fn enter(monitor: &mut QmpClient, wanted: &str) {
    match wanted {
        "paused" => monitor.stop(),
        "guest-panicked" => drop(monitor.human("o /b 0x505 1")),
        "watchdog" => drop(monitor.human("o /b 0x443 15")),
        "shutdown" => drop(monitor.execute("system_reset", json!({}))),
        other => panic!("no way to {other}"),
    }
    wait_for_state(monitor, wanted);
}

/// What a stopped guest is made of.
struct Truth {
    id: CheckpointId,
    state: &'static str,
    memory: Vec<u8>,
}

/// A checkpoint in this state changes neither the state nor memory.
fn take(vm: &TestVm, monitor: &mut QmpClient, state_now: &'static str) -> Truth {
    let memory = monitor.memory(SCRIBBLER_RAM_BYTES);
    let ran = vm.try_checkpoint().expect_success();
    let outcome: Outcome = serde_json::from_value(ran.json()).expect("the documented form");
    assert_eq!(ran.json()["run_state"], state_now);
    assert_eq!(state(monitor), state_now, "after checkpoint {outcome:?}");
    assert!(
        monitor.memory(SCRIBBLER_RAM_BYTES) == memory,
        "{state_now}: the checkpoint changed the guest's memory"
    );
    assert!(outcome.notes.iter().any(|note| note.contains(state_now)), "{outcome:?}");
    Truth { id: outcome.id, state: state_now, memory }
}

fn take_all(vm: &TestVm, monitor: &mut QmpClient) -> Vec<Truth> {
    let mut truths = vec![take(vm, monitor, "prelaunch")];
    monitor.cont();
    wait_for_scribbles(monitor);
    for state in ["paused", "guest-panicked", "watchdog", "shutdown"] {
        enter(monitor, state);
        truths.push(take(vm, monitor, state));
        if state == "shutdown" {
            break;
        }
        monitor.cont();
        wait_for_state(monitor, "running");
        assert!(vm.try_checkpoint().expect_success().json()["run_state"] == "running");
    }
    truths
}

fn check(lab: &Lab, truth: &Truth) {
    // It takes a checkpoint of its own, so its name is used up.
    let restored = lab.restore(&format!("m@{}", truth.id), &format!("back{}", truth.id), &[]);
    assert_eq!(
        (&restored.report["run_state"], &restored.report["running"]),
        (&json!(truth.state), &json!(false))
    );
    let mut monitor = restored.qmp();
    assert_eq!(state(&mut monitor), truth.state);
    assert!(monitor.memory(SCRIBBLER_RAM_BYTES) == truth.memory, "{}: another memory", truth.state);
    // It is a VM like the one that it comes from.
    assert_eq!(restored.checkpoint().outcome.kind, Kind::Full);
    assert_eq!(state(&mut monitor), truth.state);
    if truth.state == "shutdown" {
        assert!(monitor.try_execute("cont", json!({})).is_err(), "a guest that was shut down runs");
        return;
    }
    monitor.cont();
    let memory = monitor.memory(SCRIBBLER_RAM_BYTES);
    assert!(
        wait_until(TIMEOUT, || monitor.memory(SCRIBBLER_RAM_BYTES) != memory),
        "{}: it does not continue",
        truth.state
    );
}

fn run_states(lab: &Lab, vm: TestVm) {
    let mut monitor = vm.qmp();
    let truths = take_all(&vm, &mut monitor);
    drop(monitor);
    let listed = lab.run(&["ls", "m", "--json"]).expect_success().json();
    for truth in &truths {
        let row = listed["checkpoints"]
            .as_array()
            .expect("rows")
            .iter()
            .find(|row| row["id"] == truth.id.get());
        assert_eq!(row.expect("it is listed")["run_state"], truth.state);
        let shown = lab.run(&["show", &format!("m@{}", truth.id)]).expect_success().out;
        assert!(shown.contains(truth.state), "{shown}");
    }
    vm.kill();
    truths.iter().for_each(|truth| check(lab, truth));
    // The command's word counts more.
    let restored = lab.restore(&format!("m@{}", truths[1].id), "back", &["--run"]);
    assert_eq!(
        (state(&mut restored.qmp()), &restored.report["running"]),
        ("running".to_owned(), &json!(true))
    );
    drop(restored);
    let shut_down = format!("m@{}", truths.last().expect("five").id);
    let directory = lab.fresh_directory("back");
    let words = [
        "restore",
        "--eager",
        &shut_down,
        "--as",
        "back",
        "--run",
        "--dir",
        directory.to_str().expect("UTF-8"),
    ];
    assert!(lab.run(&words).expect_failure(3).contains("system_reset"));
    assert!(!directory.exists(), "a refused restore leaves nothing");
}

#[test]
fn run_state_of_a_managed_vm_is_kept_and_restored() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let vm = lab.start("m", &recipe(61));
        run_states(&lab, vm);
    });
}

#[test]
fn run_state_of_an_external_vm_is_kept_and_restored() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let vm = lab.start_plain("m", &recipe(62));
        vm.attach_plain(&[]);
        run_states(&lab, vm);
    });
}

/// Nothing is changed in a QEMU that holds no guest, by either engine; QEMU itself would abort on
/// some of it.
#[test]
fn run_state_without_a_guest_is_refused() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let failed_load = lab.start_plain("m", &Recipe::scribbler(63));
        failed_load.attach_plain(&[]);
        let mut monitor = failed_load.qmp();
        monitor.human("loadvm nosuch");
        wait_for_state(&mut monitor, "restore-vm");
        refuse(&lab, &failed_load, &mut monitor, "restore-vm");
        drop(monitor);
        failed_load.kill();

        let target =
            lab.start_plain("t", &Recipe::scribbler(64).arguments(&["-incoming", "defer"]));
        target.attach_plain(&[]);
        let mut monitor = target.qmp();
        refuse(&lab, &target, &mut monitor, "inmigrate");
        drop(monitor);
        target.kill();

        let managed = lab.start("o", &Recipe::scribbler(65));
        managed.checkpoint();
        let mut monitor = managed.qmp();
        monitor.human("loadvm nosuch");
        refuse(&lab, &managed, &mut monitor, "restore-vm");
        monitor.cont();
        wait_for_state(&mut monitor, "running");
        assert_eq!(managed.checkpoint().outcome.parent, Some(CheckpointId(1)));
        let file = lab.path().join("away.stream");
        migrate_away(&mut monitor, &file);
        refuse(&lab, &managed, &mut monitor, "postmigrate");
    });
}

fn migrate_away(monitor: &mut QmpClient, file: &Path) {
    let target = format!("exec:cat >{}", file.display());
    monitor.execute("migrate", json!({ "uri": target }));
    wait_for_state(monitor, "postmigrate");
}

fn refuse(lab: &Lab, vm: &TestVm, monitor: &mut QmpClient, wanted: &str) {
    let objects =
        |monitor: &mut QmpClient| monitor.execute("qom-list", json!({ "path": "/objects" }));
    let (known, before) = (lab.list_if_any(&vm.name), objects(monitor));
    let message = vm.try_checkpoint().expect_failure(3);
    assert!(message.contains(wanted), "{message}");
    assert_eq!(
        (lab.list_if_any(&vm.name), objects(monitor), state(monitor).as_str()),
        (known, before, wanted)
    );
}

/// A guest in ACPI S3 is what a tracker gets it as; QEMU aborts after its migration, so by stream
/// it is refused.
#[test]
fn run_state_suspended_is_kept_by_the_tracker_and_refused_by_stream() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        for mode in stream_modes(qemu) {
            let external = lab.start_plain(mode, &Recipe::scribbler(68));
            external.attach_plain(&["--stream", mode]);
            let mut monitor = external.qmp();
            wait_for_scribbles(&mut monitor);
            suspend(&mut monitor);
            let message = external.try_checkpoint().expect_failure(3);
            assert!(
                message.contains("suspended") && state(&mut monitor) == "suspended",
                "{mode}: {message}"
            );
            wake(&mut monitor);
            external.checkpoint();
        }

        let managed = lab.start("m", &Recipe::scribbler(69));
        let mut monitor = managed.qmp();
        wait_for_scribbles(&mut monitor);
        managed.checkpoint();
        suspend(&mut monitor);
        if major_version(qemu) < 9 {
            assert!(managed.try_checkpoint().expect_failure(3).contains("suspended"));
            return wake(&mut monitor);
        }
        let taken = managed.try_checkpoint_with(&["--verify"]).expect_success().json();
        assert!(taken["run_state"] == "suspended" && taken["proof"]["proven"] == true, "{taken}");
        assert_eq!(state(&mut monitor), "suspended");
        let memory = monitor.memory(SCRIBBLER_RAM_BYTES);
        drop(monitor);
        managed.kill();
        for (name, words, is) in
            [("paused", &["--paused"] as &[&str], "paused"), ("back", &[], "suspended")]
        {
            let restored = lab.restore("m", name, words);
            let mut monitor = restored.qmp();
            assert_eq!(state(&mut monitor), is);
            assert!(monitor.memory(SCRIBBLER_RAM_BYTES) == memory, "another memory");
            if is == "paused" {
                monitor.cont();
                wait_for_state(&mut monitor, "suspended");
            }
            wake(&mut monitor);
        }
    });
}

/// What a guest does for S3: SLP_TYP and SLP_EN of the PM1 control register.
fn suspend(monitor: &mut QmpClient) {
    monitor.human("o /h 0x604 0x2400");
    wait_for_state(monitor, "suspended");
}

/// The firmware finds no waking vector, and boots again.
fn wake(monitor: &mut QmpClient) {
    monitor.execute("system_wakeup", json!({}));
    wait_for_state(monitor, "running");
    wait_for_scribbles(monitor);
}

/// A helper stops the guest and dies, and the guest is reset meanwhile: the next helper continues
/// it.
#[test]
fn run_state_of_a_guest_that_was_reset_in_the_pause_of_a_dead_helper_is_running_again() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start_with("m", &Recipe::scribbler(66), &[("STILLPOINT_DIE_AT", "pause.paused")]);
    let mut monitor = vm.qmp();
    wait_for_scribbles(&mut monitor);
    assert_ne!(vm.try_checkpoint().code, 0);
    wait_for_state(&mut monitor, "paused");
    monitor.execute("system_reset", json!({}));
    wait_for_state(&mut monitor, "prelaunch");
    vm.attach();
    wait_for_state(&mut monitor, "running");
    let before: Value = monitor.execute("query-status", json!({}));
    assert_eq!(vm.checkpoint().outcome.kind, Kind::Full, "{before}");
}

/// Where the guest's write is, which waits for room on the host.
const SECTOR: u8 = 64;

/// What a driver does to write a sector of the second IDE channel's second disk.
fn write_a_sector(monitor: &mut QmpClient) {
    let mut out = |size: char, port: u16, value: u16| {
        drop(monitor.human(&format!("o /{size} {port:#x} {value:#x}")))
    };
    for (register, value) in [(6, 0xf0), (2, 1), (3, u16::from(SECTOR)), (4, 0), (5, 0), (7, 0x30)]
    {
        out('b', 0x170 + register, value);
    }
    (0..256).for_each(|_| out('h', 0x170, 0x4141));
}

/// A guest that was stopped at a disk error has its request still; a restored one that is let run
/// gets it done.
#[test]
fn run_state_io_error_keeps_the_request_that_waits() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let small = SmallStore::mount(lab.path().join("small"), 4);
        let file = small.path().join("late.raw");
        std::fs::File::create(&file)
            .and_then(|file| file.set_len(8 << 20))
            .expect("the test's directory");
        let drive = format!("file={},format=raw,if=none,id=late,werror=stop", file.display());
        let recipe = Recipe::scribbler(67).arguments(&[
            "-drive",
            &drive,
            "-device",
            "ide-hd,drive=late,bus=ide.1,unit=1",
        ]);
        let vm = lab.start_plain("m", &recipe);
        let mut monitor = vm.qmp();
        wait_for_scribbles(&mut monitor);
        let full = small.fill_but(0);
        monitor.stop();
        write_a_sector(&mut monitor);
        monitor.cont();
        wait_for_state(&mut monitor, "io-error");
        vm.attach_plain(&[]);
        let truth = take(&vm, &mut monitor, "io-error");
        drop((full, monitor));
        vm.kill();
        let restored = lab.restore(&format!("m@{}", truth.id), "back", &["--run"]);
        let at = usize::from(SECTOR) * 512;
        let is_written = || restored.disk("late")[at..at + 512].iter().all(|byte| *byte == b'A');
        assert!(wait_until(TIMEOUT, is_written), "the guest's write is lost");
        drop(restored);
        check(&lab, &truth);
    });
}

/// ATAPI: PREVENT ALLOW MEDIUM REMOVAL, by the driver of the second IDE channel's second device.
fn lock_tray(monitor: &mut QmpClient) {
    let mut out = |size: char, port: u16, value: u16| {
        drop(monitor.human(&format!("o /{size} {port:#x} {value:#x}")))
    };
    for (register, value) in [(6, 0xb0), (1, 0), (4, 0), (5, 0), (7, 0xa0)] {
        out('b', 0x170 + register, value);
    }
    for word in [0x1e, 0, 1, 0, 0, 0] {
        out('h', 0x170, word);
    }
}

fn is_locked(monitor: &mut QmpClient) -> bool {
    let drives = monitor.execute("query-block", json!({}));
    let mut drives = drives.as_array().expect("drives").iter();
    drives.find(|drive| drive["device"] == "cd").expect("the CD drive")["locked"] == true
}

/// The guest's lock of a tray is part of the devices' state, by either engine.
#[test]
fn run_state_of_a_locked_tray_is_restored() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let drive = "file=cd.raw,format=raw,if=none,id=cd,media=cdrom,readonly=on";
        let recipe = Recipe::scribbler(70)
            .image(&["create", "-q", "-f", "raw", "cd.raw", "1M"])
            .arguments(&["-drive", drive, "-device", "ide-cd,drive=cd,bus=ide.1,unit=1,id=tray"]);
        for (name, is_managed) in [("m", true), ("e", false)] {
            let vm =
                if is_managed { lab.start(name, &recipe) } else { lab.start_plain(name, &recipe) };
            if !is_managed {
                vm.attach_plain(&[]);
            }
            let mut monitor = vm.qmp();
            wait_for_scribbles(&mut monitor);
            assert!(!is_locked(&mut monitor));
            lock_tray(&mut monitor);
            assert!(is_locked(&mut monitor), "the drive did not take the command");
            vm.checkpoint();
            assert!(is_locked(&mut monitor));
            drop(monitor);
            vm.kill();
            let restored = lab.restore(name, name, &[]);
            let mut monitor = restored.qmp();
            assert!(is_locked(&mut monitor), "{name}");
            assert!(
                monitor.try_execute("blockdev-remove-medium", json!({ "id": "tray" })).is_err()
            );
        }
    });
}
