//! `stillpoint rollback`: a running VM becomes, in place, what a checkpoint of its lineage holds;
//! only what differs is written; and a helper that dies in the middle leaves no VM of two instants
//! running.

use checkpoint_format::{CheckpointId, PAGE_SIZE};
use engine::checkpoint::outcome::Kind;
use engine::kill_point::POINTS;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;
use stillpoint_tests::{
    Lab, QmpClient, Recipe, SCRIBBLER_RAM_BYTES, TestVm, files_below, newest_qemu, on_each_qemu,
    read_image, wait_for_scribbles, wait_until,
};

/// The host may be busy.
const TIMEOUT: Duration = Duration::from_secs(120);
/// Steps that the witness makes between two of its lines, on a busy host.
const STEPS_BETWEEN_LINES: u64 = 15;
const DISKS: [&str; 3] = ["boot", "cow", "odd"];

fn rollback(lab: &Lab, checkpoint: &str, more: &[&str]) -> Value {
    lab.run(&[&["rollback", checkpoint, "--json"], more].concat()).expect_success().json()
}

#[test]
fn rollback_guest_goes_back_and_continues_in_the_same_qemu() {
    on_each_qemu(|qemu| {
        let lab = Lab::for_vms(qemu, 2);
        let vm = lab.start("m", &Recipe::witness("q35-scsi.cfg"));
        vm.wait_for_witness();
        let first = vm.checkpoint();
        vm.wait_for_line("later steps", |line| line.step > first.after + 40);
        let mut monitor = vm.qmp();
        let known = vm.lines().len();
        let report = rollback(&lab, "m@1", &[]);
        assert_eq!((&report["id"], &report["saved"]), (&json!(1), &json!(2)), "{report}");
        let number = |key: &str| report[key].as_u64().expect("a number");
        // 256 MiB of memory, of which the witness writes a few.
        assert!((1..16_000).contains(&number("pages_written")), "{report}");
        assert!((1..16 << 20).contains(&number("disk_bytes_written")), "{report}");
        assert!(monitor.is_running(), "{report}");
        // Lines of the guest that was there may have come until it was paused.
        let is_back = |step: u64| step <= first.after + STEPS_BETWEEN_LINES;
        let back = || vm.lines().into_iter().skip(known).find(|line| is_back(line.step));
        assert!(wait_until(TIMEOUT, || back().is_some()), "{:?}", vm.lines().last());
        let line = back().expect("it came");
        assert!(line.step > first.before, "{line:?}");
        vm.assert_all_right(&line);
        let next = vm.checkpoint();
        assert_eq!(next.outcome.id, CheckpointId(3));
        assert_eq!(
            (next.outcome.parent, next.outcome.kind),
            (Some(first.outcome.id), Kind::Incremental)
        );
        assert!(next.outcome.bytes_changed < 64 << 20, "{:?}", next.outcome);
        let after = vm.checkpoint();
        assert_eq!(after.outcome.parent, Some(next.outcome.id));
        vm.kill();
        lab.verify("m");
        lab.restore(&after.name, "elsewhere", &[]).assert_continues(&after);
    });
}

/// What a stopped VM is made of.
#[derive(PartialEq)]
struct Truth {
    memory: Vec<u8>,
    disks: Vec<Vec<u8>>,
}

fn truth(lab: &Lab, vm: &TestVm, monitor: &mut QmpClient) -> Truth {
    let memory = monitor.memory(SCRIBBLER_RAM_BYTES);
    let all = monitor.execute("query-block", json!({}));
    let disk = |name: &&str| {
        let hit = all.as_array().into_iter().flatten().find(|block| block["device"] == *name);
        let inserted = &hit.unwrap_or_else(|| panic!("no drive {name} in {all}"))["inserted"];
        let text = |key: &str| inserted[key].as_str().expect("QEMU says so").to_owned();
        read_image(&lab.qemu, &vm.directory.join(text("file")), &text("drv"))
    };
    Truth { memory, disks: DISKS.iter().map(disk).collect() }
}

fn differing_pages(one: &[u8], other: &[u8]) -> u64 {
    let pages = one.chunks(PAGE_SIZE).zip(other.chunks(PAGE_SIZE));
    pages.filter(|(one, other)| one != other).count() as u64
}

fn write_disks(monitor: &mut QmpClient, pattern: u8) {
    let place = u64::from(pattern % 7) * (1 << 20);
    // Blocks that show the layer below, zeros over it, and the last sector of a disk.
    monitor.disk_io("cow", &format!("write -P {pattern} {} 8192", place + 4096));
    monitor.disk_io("cow", &format!("write -z {} 12288", place + (512 << 10)));
    monitor.disk_io("odd", &format!("write -P {pattern} {} 512", 3 << 20));
    monitor.disk_io("odd", &format!("write -P {pattern} {} 4096", u64::from(pattern % 64) * 8192));
}

/// A VM that was stopped for checkpoint 1, and what it was then; it runs.
fn scribbling(lab: &Lab, seed: u32) -> (TestVm<'_>, Truth) {
    let vm = lab.start("m", &Recipe::scribbler(seed));
    let mut monitor = vm.qmp();
    wait_for_scribbles(&mut monitor);
    write_disks(&mut monitor, 11);
    monitor.stop();
    let then = truth(lab, &vm, &mut monitor);
    assert_eq!(vm.checkpoint().outcome.id, CheckpointId(1));
    monitor.cont();
    (vm, then)
}

fn keep_running(monitor: &mut QmpClient, pattern: u8) {
    let before = monitor.memory(SCRIBBLER_RAM_BYTES);
    write_disks(monitor, pattern);
    assert!(wait_until(TIMEOUT, || monitor.memory(SCRIBBLER_RAM_BYTES) != before), "it stands");
}

fn assert_is(lab: &Lab, vm: &TestVm, monitor: &mut QmpClient, expected: &Truth, what: &str) {
    assert!(!monitor.is_running(), "{what}: the guest was stopped in the checkpoint");
    let now = truth(lab, vm, monitor);
    assert_eq!(differing_pages(&now.memory, &expected.memory), 0, "{what}: pages of memory");
    for (name, (now, then)) in DISKS.iter().zip(now.disks.iter().zip(&expected.disks)) {
        assert_eq!(differing_pages(now, then), 0, "{what}: blocks of {name}");
    }
}

#[test]
fn rollback_has_every_byte_and_writes_only_those_that_differ() {
    on_each_qemu(|qemu| {
        let lab = Lab::for_vms(qemu, 2);
        let (vm, then) = scribbling(&lab, 71);
        let mut monitor = vm.qmp();
        keep_running(&mut monitor, 12);
        vm.checkpoint();
        keep_running(&mut monitor, 13);
        monitor.stop();
        let before = truth(&lab, &vm, &mut monitor);
        let report = rollback(&lab, "m@1", &[]);
        assert_eq!(report["run_state"], "paused", "{report}");
        assert_is(&lab, &vm, &mut monitor, &then, "after a checkpoint of the present");
        let differed = differing_pages(&before.memory, &then.memory);
        assert_eq!(report["pages_written"], differed, "{report}");
        // Nothing but the clock of the RTC advances.
        let next = vm.checkpoint().outcome;
        assert_eq!((next.parent, next.id), (Some(CheckpointId(1)), CheckpointId(4)));
        assert!(next.bytes_changed <= 64 << 10, "{next:?}");
        let refused = lab.run(&["rollback", "m@2"]).expect_failure(3);
        assert!(refused.contains("no ancestor"), "{refused}");

        monitor.cont();
        keep_running(&mut monitor, 14);
        let listed = lab.list("m");
        rollback(&lab, "m@1", &["--discard"]);
        assert_is(&lab, &vm, &mut monitor, &then, "discarding the present");
        assert_eq!(lab.list("m"), listed);
        monitor.cont();
        keep_running(&mut monitor, 15);
        monitor.stop();
        let later = truth(&lab, &vm, &mut monitor);
        let taken = vm.checkpoint();
        assert_eq!(taken.outcome.parent, Some(CheckpointId(1)), "{:?}", taken.outcome);
        drop(monitor);
        vm.kill();
        lab.verify("m");

        // A QEMU that has loaded a state before.
        let vm = lab.restore("m", "m", &["--wait"]);
        let mut monitor = vm.qmp();
        assert_is(&lab, &vm, &mut monitor, &later, "restored");
        monitor.cont();
        keep_running(&mut monitor, 16);
        rollback(&lab, "m@1", &["--discard"]);
        assert_is(&lab, &vm, &mut monitor, &then, "a restored VM");
        monitor.cont();
        keep_running(&mut monitor, 17);
    });
}

fn half(lab: &Lab) -> Value {
    lab.run(&["status", "m", "--json"]).expect_success().json()["rollback"].clone()
}

#[test]
fn rollback_helper_may_die_at_every_point() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let (vm, then) = scribbling(&lab, 72);
        let mut monitor = vm.qmp();
        for (number, point) in
            (20..).zip(POINTS.iter().filter(|point| point.starts_with("rollback.")))
        {
            keep_running(&mut monitor, number);
            vm.kill_helper();
            vm.attach_with(&[], &[("STILLPOINT_DIE_AT", point)]);
            let ran = lab.run(&["rollback", "m@1"]);
            assert_ne!(ran.code, 0, "{point}: the helper should have died: {}", ran.out);
            assert!(wait_until(TIMEOUT, || vm.helper().is_none()), "{point}: the helper lives");
            vm.attach();
            let is_untouched = ["rollback.staged", "rollback.paused"].contains(point);
            assert_eq!(monitor.is_running(), is_untouched, "{point}");
            if is_untouched {
                assert_eq!(half(&lab), Value::Null, "{point}");
                keep_running(&mut monitor, number);
            } else {
                assert_eq!(half(&lab)["to"], 1, "{point}");
                let refused = vm.try_checkpoint().expect_failure(3);
                assert!(refused.contains("stillpoint rollback m@1"), "{point}: {refused}");
            }
            rollback(&lab, "m@1", &[]);
            assert_is(&lab, &vm, &mut monitor, &then, point);
            assert_eq!(half(&lab), Value::Null, "{point}");
            monitor.cont();
        }
        keep_running(&mut monitor, 40);
        let taken = vm.checkpoint();
        assert_eq!(taken.outcome.parent, Some(CheckpointId(1)), "{:?}", taken.outcome);
        lab.verify("m");
    });
}

/// What the store has of the packs of all checkpoints.
fn packs(lab: &Lab) -> Vec<(PathBuf, Vec<u8>)> {
    let files = files_below(&lab.store_directory()).into_iter();
    let packs = files.filter(|file| file.extension().is_some_and(|name| name == "pack"));
    packs.map(|pack| (pack.clone(), std::fs::read(pack).expect("a pack"))).collect()
}

#[test]
fn rollback_that_fails_early_leaves_the_guest_running() {
    let lab = Lab::new(&newest_qemu());
    let (vm, then) = scribbling(&lab, 75);
    let mut monitor = vm.qmp();
    keep_running(&mut monitor, 18);
    let whole = packs(&lab);
    for (pack, bytes) in &whole {
        // Frames alone; the index at the end is whole.
        let mut damaged = bytes.clone();
        damaged[64..bytes.len() / 2].iter_mut().for_each(|byte| *byte = !*byte);
        std::fs::write(pack, damaged).expect("a pack");
    }
    lab.run(&["rollback", "m@1", "--discard"]).expect_failure(5);
    assert!(monitor.is_running());
    assert_eq!(half(&lab), Value::Null);
    keep_running(&mut monitor, 19);
    whole.iter().for_each(|(pack, bytes)| std::fs::write(pack, bytes).expect("a pack"));
    rollback(&lab, "m@1", &[]);
    assert_is(&lab, &vm, &mut monitor, &then, "repaired");
}

/// A rollback that fails after its first write, with `damage` in it; it is repeated without.
fn fail_late(seed: u32, damage: &str, why: &str) {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let (vm, then) = scribbling(&lab, seed);
        let mut monitor = vm.qmp();
        keep_running(&mut monitor, 18);
        vm.kill_helper();
        vm.attach_with(&[], &[("STILLPOINT_DAMAGE", damage)]);
        let said = lab.run(&["rollback", "m@1"]).expect_failure(1);
        assert!(said.contains("the guest stays stopped") && said.contains(why), "{said}");
        assert!(!monitor.is_running());
        assert_eq!(half(&lab)["to"], 1);
        vm.kill_helper();
        vm.attach();
        assert!(!monitor.is_running());
        rollback(&lab, "m@1", &[]);
        assert_is(&lab, &vm, &mut monitor, &then, "repeated");
        monitor.cont();
        keep_running(&mut monitor, 19);
    });
}

#[test]
fn rollback_that_fails_late_leaves_the_guest_stopped() {
    fail_late(76, "state=2000", "could not load");
}

#[test]
fn rollback_that_another_monitor_disturbs_leaves_the_guest_stopped() {
    fail_late(77, "monitor=cont", "another client");
}

/// QEMU before 9.0 must have none.
#[test]
fn rollback_writes_a_disk_that_is_in_an_iothread() {
    let lab = Lab::new(&newest_qemu());
    let recipe = Recipe::scribbler(78)
        .image(&["create", "-q", "-f", "qcow2", "extra.qcow2", "8M"])
        .arguments(&["-object", "iothread,id=io"])
        .arguments(&["-drive", "file=extra.qcow2,format=qcow2,if=none,id=extra"])
        .arguments(&["-device", "virtio-blk-pci,drive=extra,iothread=io"]);
    let vm = lab.start("m", &recipe);
    let mut monitor = vm.qmp();
    wait_for_scribbles(&mut monitor);
    monitor.disk_io("extra", "write -P 5 1M 1M");
    let content = |monitor: &mut QmpClient| {
        monitor.stop();
        let found = read_image(&lab.qemu, &vm.directory.join("extra.qcow2"), "qcow2");
        monitor.cont();
        found
    };
    let then = content(&mut monitor);
    vm.checkpoint();
    monitor.disk_io("extra", "write -P 6 1536k 2M");
    let report = rollback(&lab, "m@1", &[]);
    assert_eq!(report["disk_bytes_written"], 2 << 20, "{report}");
    assert!(monitor.is_running(), "{report}");
    assert!(content(&mut monitor) == then, "another content");
    monitor.disk_io("extra", "write -P 7 0 4k");
    assert_eq!(vm.checkpoint().outcome.parent, Some(CheckpointId(1)));
    lab.verify("m");
}

#[test]
fn rollback_is_refused_before_anything_is_touched() {
    let lab = Lab::for_vms(&newest_qemu(), 2);
    let recipe = Recipe::scribbler(73).arguments(&["-device", "nec-usb-xhci,id=usb"]);
    let vm = lab.start("m", &recipe);
    let mut monitor = vm.qmp();
    wait_for_scribbles(&mut monitor);
    vm.checkpoint();
    let refuse = |monitor: &mut QmpClient, words: &[&str], code: i32, why: &str| {
        let listed = lab.list("m");
        let said = lab.run(words).expect_failure(code);
        assert!(said.contains(why), "{words:?}: {said}");
        assert!(monitor.is_running(), "{words:?}");
        assert_eq!(lab.list("m"), listed, "{words:?}: a checkpoint of the present was taken");
    };
    refuse(&mut monitor, &["rollback", "m"], 2, "m@7");
    refuse(&mut monitor, &["rollback", "m@9"], 3, "no ancestor");

    monitor.execute("device_add", json!({ "driver": "usb-mouse", "bus": "usb.0", "id": "mouse" }));
    refuse(&mut monitor, &["rollback", "m@1"], 3, "plugged in");
    monitor.execute("device_del", json!({ "id": "mouse" }));
    let is_gone = || !lab.run(&["rollback", "m@9"]).err.contains("plugged in");
    assert!(wait_until(TIMEOUT, is_gone), "the mouse stays");

    monitor.execute("block_resize", json!({ "device": "odd", "size": 4 << 20 }));
    refuse(&mut monitor, &["rollback", "m@1"], 3, "a disk was changed");
    refuse(&mut monitor, &["rollback", "m@1", "--discard"], 3, "a disk was changed");
    vm.checkpoint();
    refuse(&mut monitor, &["rollback", "m@1"], 3, "a disk (its size");

    vm.checkpoint_with(&["--full"]);
    refuse(&mut monitor, &["rollback", "m@2"], 3, "no ancestor");
    lab.verify("m");
}

/// What was written to an external VM is known only from its stream.
#[test]
fn rollback_of_an_external_vm_is_refused() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start_plain("m", &Recipe::scribbler(74));
    let socket = vm.directory.join("qmp.sock");
    vm.attach_with(&["--qmp", socket.to_str().expect("UTF-8"), "--store", lab.store()], &[]);
    vm.checkpoint();
    let said = lab.run(&["rollback", "m@1"]).expect_failure(3);
    assert!(said.contains("no managed VM"), "{said}");
    assert!(vm.qmp().is_running());
}
