//! VMs with different boards and disks: checkpointed under load, killed, restored, and checkpointed
//! again.

use checkpoint_format::CheckpointId;
use engine::checkpoint::outcome::Kind;
use std::path::Path;
use std::time::Duration;
use stillpoint_tests::{Lab, Recipe, Taken, TestVm, on_each_qemu};

/// Checkpoints under load; the first is full and the others build each on the one before.
fn take(vm: &TestVm, count: usize) -> Vec<Taken> {
    vm.wait_for_witness();
    let mut all: Vec<Taken> = Vec::new();
    for _ in 0..count {
        let taken = vm.checkpoint();
        let expected = if all.is_empty() { Kind::Full } else { Kind::Incremental };
        assert_eq!(
            (taken.outcome.kind, taken.outcome.parent),
            (expected, all.last().map(|last| last.outcome.id))
        );
        all.push(taken);
        std::thread::sleep(Duration::from_millis(700));
    }
    all
}

/// Checkpoints, kill and restore of one VM, and of two that are made from its checkpoints.
fn survives(qemu: &Path, recipe: &Recipe) {
    let lab = Lab::new(qemu);
    let vm = lab.start("m", recipe);
    let taken = take(&vm, 4);
    vm.assert_no_contradiction();
    vm.kill();

    let newest = lab.restore("m", "m", &[]);
    newest.assert_continues(&taken[3]);
    let next = newest.checkpoint().outcome;
    assert_eq!((next.kind, next.parent), (Kind::Incremental, Some(taken[3].outcome.id)));
    assert!(next.bytes_stored_raw < taken[0].outcome.bytes_stored_raw / 4, "not small: {next:?}");
    newest.assert_makes_progress();
    newest.kill();

    let middle = lab.restore(&taken[1].name, "middle", &[]);
    middle.assert_continues(&taken[1]);
    middle.kill();
    assert_eq!(lab.list("m"), [1, 2, 3, 4, 5].map(CheckpointId));
    lab.verify("m");
}

#[test]
fn an_overlay_on_a_base_image_survives() {
    on_each_qemu(|qemu| survives(qemu, &Recipe::witness("q35-virtio.cfg")));
}

#[test]
fn two_plain_ide_disks_and_a_display_survive() {
    on_each_qemu(|qemu| survives(qemu, &Recipe::witness("pc-ide.cfg")));
}

#[test]
fn layers_joined_inside_the_guest_survive() {
    on_each_qemu(|qemu| survives(qemu, &Recipe::witness("guest-union.cfg")));
}

#[test]
fn a_scsi_disk_and_a_network_card_survive() {
    on_each_qemu(|qemu| survives(qemu, &Recipe::witness("q35-scsi.cfg")));
}

#[test]
fn four_processors_and_four_disks_of_which_one_is_read_only_survive() {
    on_each_qemu(|qemu| survives(qemu, &many_disks()));
}

fn many_disks() -> Recipe {
    Recipe::witness("q35-virtio.cfg")
        .image(&["convert", "-f", "qcow2", "-O", "raw", "base.qcow2", "read-only.raw"])
        .words("witness.journal=/dev/vda,/dev/vdb,/dev/vdc witness.base=/dev/vdd")
        .arguments(&["-smp", "4"])
        .arguments(&[
            "-drive",
            "file=data.raw,format=raw,if=none,id=two",
            "-device",
            "virtio-blk-pci,drive=two",
        ])
        .arguments(&[
            "-drive",
            "file=data.qcow2,format=qcow2,if=none,id=three",
            "-device",
            "virtio-blk-pci,drive=three",
        ])
        .arguments(&[
            "-drive",
            "file=read-only.raw,format=raw,if=none,id=four,read-only=on",
            "-device",
            "virtio-blk-pci,drive=four",
        ])
}
