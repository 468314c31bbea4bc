//! What changes under a VM, while it runs or between its lives: a checkpoint follows it, or says
//! that it cannot.

use checkpoint_format::CheckpointId;
use engine::checkpoint::outcome::Kind;
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use stillpoint_tests::{
    Lab, QmpClient, Ran, Recipe, SCRIBBLER_RAM_BYTES, Scribbled, TestVm, newest_qemu, on_each_qemu,
    wait_until,
};

const TIMEOUT: Duration = Duration::from_secs(20);

/// The boot sector continues writing to memory.
fn assert_guest_writes(monitor: &mut QmpClient) {
    assert!(monitor.is_running(), "the guest was stopped");
    let before = monitor.memory(SCRIBBLER_RAM_BYTES);
    assert!(
        wait_until(TIMEOUT, || monitor.memory(SCRIBBLER_RAM_BYTES) != before),
        "the guest is stopped"
    );
}

/// A checkpoint that is refused, in words that name each of `named`; the guest does not notice.
fn assert_refused(lab: &Lab, vm: &TestVm, monitor: &mut QmpClient, named: &[&str]) {
    let known = lab.list(&vm.name);
    let message = vm.try_checkpoint().expect_failure(3);
    let missing: Vec<_> = named.iter().filter(|word| !message.contains(**word)).collect();
    assert!(missing.is_empty(), "{missing:?} not named in: {message}");
    assert_eq!(lab.list(&vm.name), known, "a refused checkpoint is none");
    assert_guest_writes(monitor);
}

#[test]
fn a_chain_that_was_streamed_together_is_stored_again() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let mut scribbled = Scribbled::new(&lab, lab.start("m", &Recipe::scribbler(21)), 21);
        scribbled.write_disks();
        assert_eq!(scribbled.checkpoint().kind, Kind::Full);
        scribbled.write_disks();
        assert_eq!(scribbled.checkpoint().kind, Kind::Incremental);
        let layers = backing_files(&mut scribbled.monitor, "cow");
        scribbled.monitor.execute("block-stream", json!({ "job-id": "stream", "device": "cow" }));
        let jobs = |monitor: &mut QmpClient| monitor.execute("query-block-jobs", json!({}));
        assert!(
            wait_until(TIMEOUT, || jobs(&mut scribbled.monitor) == json!([])),
            "the stream does not end"
        );
        assert_eq!(
            (layers, backing_files(&mut scribbled.monitor, "cow")),
            (1, 0),
            "the base image is no part of the disk any more"
        );
        scribbled.write_disks();
        let again = scribbled.checkpoint();
        assert_eq!((again.kind, again.parent), (Kind::Full, None), "{again:?}");
        scribbled.write_disks();
        assert_eq!(scribbled.checkpoint().parent, Some(again.id));
        // Nothing that the old chain was made of may be needed.
        std::fs::remove_file(scribbled.vm.directory.join("base.raw"))
            .expect("the test's directory");
        // The newest, what it is based on, and the first of the old chain.
        scribbled.check(|newest_first| vec![newest_first[0], newest_first[1], newest_first[3]]);
    });
}

/// How many images a drive has below its own.
fn backing_files(monitor: &mut QmpClient, drive: &str) -> u64 {
    let all = monitor.execute("query-block", json!({}));
    let hit = all.as_array().into_iter().flatten().find(|block| block["device"] == drive);
    hit.and_then(|block| block["inserted"]["backing_file_depth"].as_u64())
        .unwrap_or_else(|| panic!("no drive {drive} in {all}"))
}

/// USB, since a PCI device leaves only when the guest lets it go, and a boot sector does not.
#[test]
fn a_plugged_device_is_refused_until_it_is_gone() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start("m", &Recipe::scribbler(22).arguments(&["-device", "nec-usb-xhci,id=usb"]));
    let first = vm.checkpoint().outcome;
    let mut monitor = vm.qmp();
    monitor.execute("device_add", json!({ "driver": "usb-tablet", "id": "late", "bus": "usb.0" }));
    assert_refused(&lab, &vm, &mut monitor, &["late", "usb-tablet", "plugged"]);
    // Another helper does not take it for a device that was always there.
    vm.kill_helper();
    // Nor does one that is the first to look.
    std::fs::remove_file(lab.runtime().join("m/devices.json")).expect("what the first helper saw");
    vm.attach();
    assert_refused(&lab, &vm, &mut monitor, &["late"]);
    monitor.events();
    monitor.execute("device_del", json!({ "id": "late" }));
    // QEMU tells of it a little after the device is gone.
    let mut told = || monitor.events().iter().any(|event| event["event"] == "DEVICE_DELETED");
    assert!(wait_until(TIMEOUT, &mut told), "it stays plugged in");
    let second = vm.checkpoint().outcome;
    assert_eq!(second.parent, Some(first.id));
    drop(monitor);
    lab.verify("m");
    vm.kill();
    lab.restore("m", "m", &[]).checkpoint();
}

#[test]
fn a_disk_that_was_moved_is_refused() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start("m", &Recipe::scribbler(23));
    vm.checkpoint();
    let mut monitor = vm.qmp();
    monitor.execute(
        "blockdev-snapshot-sync",
        json!({ "device": "odd", "snapshot-file": "moved.qcow2", "format": "qcow2" }),
    );
    assert_refused(&lab, &vm, &mut monitor, &["odd", "moved.qcow2"]);
    monitor.disk_io("odd", "write -P 5 0 4096");
    drop(monitor);
    lab.verify("m");
    vm.kill();
    let restored = lab.restore("m", "m", &["--paused"]);
    assert!(
        restored.disk("odd").iter().all(|byte| *byte == 0),
        "the checkpoint is of the time before"
    );
}

/// A migration ends with the disks inactive, and QEMU opens them by their paths then: the guest
/// would be on another disk.
#[test]
fn file_that_was_replaced_below_qemu_is_never_opened() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let words = [
            "-drive",
            "file=d.raw,format=raw,if=none,id=d",
            "-device",
            "virtio-blk-pci,drive=d,share-rw=on",
        ];
        let vm = lab.start_plain(
            "m",
            &Recipe::scribbler(29)
                .image(&["create", "-q", "-f", "raw", "d.raw", "1M"])
                .arguments(&words),
        );
        vm.attach_plain(&[]);
        vm.checkpoint();
        let mut monitor = vm.qmp();
        let (path, away) = (vm.directory.join("d.raw"), vm.directory.join("away.raw"));
        std::fs::rename(&path, &away).expect("the test's directory");
        assert_refused(&lab, &vm, &mut monitor, &["disk", "d.raw", "moved"]);
        std::fs::copy(&away, &path).expect("the test's directory");
        assert_refused(&lab, &vm, &mut monitor, &["disk", "d.raw", "another file"]);
        drop(monitor);
        let message = lab.run(&["adopt", "m"]).expect_failure(3);
        assert!(message.contains("another file"), "{message}");
        let mut monitor = vm.qmp();
        monitor.disk_io("d", "write -P 5 4096 4096");
        let (new, old) =
            [&path, &away].map(|path| std::fs::read(path).expect("a file")[4096]).into();
        assert_eq!((new, old), (0, 5), "the guest is on the disk that it was started on");
        drop(monitor);
        std::fs::rename(&away, &path).expect("the test's directory");
        assert_eq!(vm.checkpoint().outcome.kind, Kind::Incremental);
        vm.kill();
        let restored = lab.restore("m", "m", &["--paused"]);
        assert_eq!(restored.disk("d")[4096], 5);
    });
}

/// QEMU truncates dirty bitmaps together with the disk and sends no event: before and after a
/// restore.
#[test]
fn resized_disks_are_restored_as_they_are() {
    const DRIVES: [&str; 2] = ["cow", "odd"];
    const SIZES: [u64; 2] = [16 << 20, (3 << 20) + 512];
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let mut vm = lab.start("m", &Recipe::scribbler(29));
        for pattern in [1, 2] {
            let mut monitor = vm.qmp();
            DRIVES
                .iter()
                .for_each(|drive| monitor.disk_io(drive, &format!("write -P {pattern} 2M 512K")));
            vm.checkpoint();
            for (drive, full) in DRIVES.into_iter().zip(SIZES) {
                for size in [1 << 20, full] {
                    monitor.execute("block_resize", json!({ "device": drive, "size": size }));
                }
            }
            drop(monitor);
            let truth = DRIVES.map(|drive| vm.disk(drive));
            assert!(truth.iter().all(|disk| disk[2 << 20] == 0), "the disks were not cut");
            vm.checkpoint();
            vm.kill();
            vm = lab.restore("m", "m", &[]);
            assert!(
                DRIVES.map(|drive| vm.disk(drive)) == truth,
                "the restored disks are not those of life {pattern}"
            );
        }
        // Nothing was resized since the restore, so its first checkpoint reads what changed, not
        // the disks.
        assert!(vm.checkpoint().outcome.parent.is_some());
    });
}

fn patch(file: &Path, offset: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(file).expect("the test's directory");
    file.write_all_at(bytes, offset).expect("the test's directory");
}

const PLACE: usize = 5 << 20;

#[test]
fn a_layer_replaced_while_the_vm_runs_is_seen() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start("m", &Recipe::scribbler(24));
    let first = vm.checkpoint().outcome;
    let mut monitor = vm.qmp();
    let base = vm.directory.join("base.raw");
    let kept = vm.directory.join("kept.raw");
    // Another file at its path: QEMU has the old one open.
    std::fs::rename(&base, &kept).expect("the test's directory");
    std::fs::copy(&kept, &base).expect("the test's directory");
    assert_refused(&lab, &vm, &mut monitor, &["base.raw", "replaced"]);
    std::fs::rename(&kept, &base).expect("the test's directory");
    assert_eq!(vm.checkpoint().outcome.parent, Some(first.id));
    // Other content in the same file: QEMU reads it, too, so it is another layer.
    patch(&base, PLACE as u64, b"written from outside");
    let again = vm.checkpoint().outcome;
    assert_eq!((again.kind, again.parent), (Kind::Full, None), "{again:?}");
    assert!(again.layer_bytes_stored > 0, "{again:?}");
    drop(monitor);
    let expected = vm.disk("cow");
    lab.verify("m");
    vm.kill();
    check_base(&lab, &format!("m@{}", again.id), &expected, b"written from outside");
    check_base(&lab, "m@1", &[], &pattern());
}

/// What the scribbler's base image holds at `PLACE` if no process has changed it.
fn pattern() -> [u8; 20] {
    [(PLACE >> 12) as u8 | 1; 20].map(|byte| if PLACE % (3 << 20) < (1 << 20) { byte } else { 0 })
}

/// A restored disk shows the layer of its own checkpoint; no `expected` content compares that place
/// only.
fn check_base(lab: &Lab, checkpoint: &str, expected: &[u8], at_place: &[u8]) {
    let restored = lab.restore(checkpoint, "back", &["--paused"]);
    let disk = restored.disk("cow");
    assert_eq!(&disk[PLACE..PLACE + at_place.len()], at_place, "{checkpoint}");
    assert!(expected.is_empty() || disk == expected, "{checkpoint}: the disk is another");
}

#[test]
fn a_layer_replaced_between_two_lives_is_another_layer() {
    let mut lab = Lab::new(&newest_qemu());
    lab.set("STILLPOINT_CACHE_DIR", lab.path().join("cache").display().to_string());
    let recipe = Recipe::scribbler(25);
    let vm = lab.start("m", &recipe);
    vm.checkpoint();
    vm.kill();
    let vm = lab.start("m", &recipe.patch("base.raw", PLACE as u64, b"another base image"));
    let second = vm.checkpoint().outcome;
    assert_eq!((second.kind, second.id), (Kind::Full, CheckpointId(2)));
    vm.kill();
    lab.verify("m");
    check_base(&lab, "m@1", &[], &pattern());
    check_base(&lab, "m@2", &[], b"another base image");
    // The first one's layer came from the store; a damaged copy in the cache is not used.
    let layers = std::fs::read_dir(lab.path().join("cache/layers")).expect("the cache").flatten();
    let cached: Vec<PathBuf> = layers.map(|entry| entry.path()).collect();
    assert_eq!(cached.len(), 1, "{cached:?}");
    let mut permissions = std::fs::metadata(&cached[0]).expect("the cache").permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
    std::fs::set_permissions(&cached[0], permissions).expect("the cache");
    patch(&cached[0], PLACE as u64, b"damage");
    check_base(&lab, "m@1", &[], &pattern());
}

/// A QEMU that is `shell` before it becomes the real one, which it may do by `exec "$qemu" "$@"`.
fn script(lab: &Lab, name: &str, shell: &str) -> String {
    let path = lab.path().join(name);
    std::fs::write(&path, format!("#!/bin/sh\nqemu={}\n{shell}\n", lab.qemu.display()))
        .expect("the test's directory");
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .expect("the test's directory");
    path.display().to_string()
}

fn restore_with(lab: &Lab, words: &[&str]) -> Ran {
    let directory = lab.fresh_directory("back");
    let common = [
        "restore",
        "--eager",
        "m",
        "--json",
        "--as",
        "back",
        "--dir",
        directory.to_str().expect("UTF-8"),
    ];
    lab.run(&[&common, words].concat())
}

#[test]
fn a_restore_ends_soon_when_qemu_does_and_quotes_it() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start("m", &Recipe::scribbler(26));
    vm.checkpoint();
    vm.kill();
    let scripts = [
        ("never", "echo this host has no room >&2; exit 1", "this host has no room"),
        (
            "asked",
            "case \"$*\" in *incoming*) echo this host has no room >&2; exit 1;; esac; exec \"$qemu\" \"$@\"",
            "this host has no room",
        ),
        // The plugin is there by then, and the monitor too.
        (
            "late",
            "case \"$*\" in *incoming*) set -- \"$@\" -device nonsense;; esac; exec \"$qemu\" \"$@\"",
            "nonsense",
        ),
    ];
    for (name, shell, quoted) in scripts {
        let ran = restore_with(&lab, &["--qemu", &script(&lab, name, shell)]);
        assert!(
            ran.code != 0 && ran.err.contains(quoted),
            "{name}: ended with {}: {}",
            ran.code,
            ran.err
        );
        assert!(ran.time < Duration::from_secs(15), "{name}: ended only after {:?}", ran.time);
        assert!(lab.nothing_runs("back"), "{name}");
    }
    lab.restore("m", "back", &[]);
}

#[test]
fn restore_takes_the_program_that_its_user_names() {
    let mut lab = Lab::new(&newest_qemu());
    let given = script(&lab, "my-qemu", "exec \"$qemu\" -name mine \"$@\"");
    lab.qemu = PathBuf::from(&given);
    let vm = lab.start("m", &Recipe::scribbler(27));
    vm.checkpoint();
    vm.kill();
    assert_eq!(restored_and_ended(&lab, &["--qemu", &given]), "mine");
    // The recorded path is no order, though the program is there.
    assert_eq!(restored_and_ended(&lab, &[]), "");
}

/// Restores, and ends what came of it. What its QEMU was called by -name.
fn restored_and_ended(lab: &Lab, more: &[&str]) -> String {
    let report = restore_with(lab, &[&["--paused"], more].concat()).expect_success().json();
    let directory = PathBuf::from(report["dir"].as_str().expect("the documented form"));
    let mut monitor = QmpClient::connect(&directory.join("extra.sock"));
    let name = monitor.execute("query-name", json!({}));
    // It may be gone before it has answered.
    let _ = monitor.try_execute("quit", json!({}));
    assert!(wait_until(TIMEOUT, || lab.nothing_runs("back")), "it does not end");
    name["name"].as_str().unwrap_or_default().to_owned()
}

/// No client may wait at a socket that no helper serves.
#[test]
fn a_helper_that_cannot_attach_leaves_no_socket() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start("m", &Recipe::scribbler(28));
    vm.checkpoint();
    vm.kill_helper();
    let place = lab.runtime().join("m");
    let record = std::fs::read_to_string(place.join("machine.json")).expect("a VM has it");
    let mut wrong: Value = serde_json::from_str(&record).expect("JSON");
    wrong["ram_block"] = json!("not-there");
    std::fs::write(place.join("machine.json"), wrong.to_string()).expect("the test's directory");
    let ran = lab.run(&["attach", "m"]);
    assert!(ran.code != 0 && ran.err.contains("not-there"), "ended with {}: {}", ran.code, ran.err);
    let gone = || !place.join("control.sock").exists();
    assert!(wait_until(TIMEOUT, gone), "the control socket of a helper that has ended is left");
    std::fs::write(place.join("machine.json"), record).expect("the test's directory");
    vm.attach();
    vm.checkpoint();
}
