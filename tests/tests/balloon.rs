//! VMs whose guests give memory back: by a balloon, by free page reporting. A page that was given
//! back is zero in the restored VM.

use checkpoint_format::CheckpointId;
use serde_json::json;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;
use stillpoint_tests::{
    Lab, Pid, QmpClient, Random, Recipe, SCRIBBLER_RAM_BYTES, Scribbled, TestVm, newest_qemu,
    on_each_qemu, wait_until,
};

const TIMEOUT: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// The guest's RAM, by the descriptor that QEMU itself punches holes with.
fn ram_file(qemu: Pid) -> File {
    let files = std::fs::read_dir(format!("/proc/{qemu}/fd"))
        .expect("QEMU runs")
        .flatten()
        .map(|entry| entry.path());
    let is_memory = |path: &PathBuf| {
        std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:"))
    };
    let is_ram = |path: &PathBuf| {
        std::fs::metadata(path).is_ok_and(|facts| facts.size() == SCRIBBLER_RAM_BYTES)
    };
    let path = files
        .into_iter()
        .find(|path| is_memory(path) && is_ram(path))
        .expect("a memory file of that size");
    File::options().read(true).write(true).open(path).expect("the test's own QEMU")
}

/// What a balloon does to pages between 1 and 15 MiB, where the boot sector writes.
fn discard_pages(ram: &File, random: &mut Random) {
    use nix::fcntl::{FallocateFlags, fallocate};
    for _ in 0..=random.below(8) {
        let first = MIB / PAGE + random.below(14 * MIB / PAGE);
        let most = if random.below(3) == 0 { 700 } else { 16 };
        let count = (1 + random.below(most)).min(15 * MIB / PAGE - first);
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(ram, how, (first * PAGE).cast_signed(), (count * PAGE).cast_signed())
            .expect("a hole");
    }
}

#[test]
fn balloon_holes_are_in_the_next_checkpoint_also_after_they_were_read() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let recipe = Recipe::scribbler(61)
            .arguments(&["-device", "virtio-balloon-pci,id=b,free-page-reporting=on"]);
        let mut scribbled = Scribbled::new(&lab, lab.start("m", &recipe), 61);
        let ram = ram_file(scribbled.vm.qemu());
        let mut random = Random::new(61);
        for number in 0..6 {
            let outcome = scribbled.checkpoint();
            assert_eq!(
                (outcome.engine.as_str(), outcome.parent.is_some()),
                ("tracker", number > 0),
                "{outcome:?}"
            );
            discard_pages(&ram, &mut random);
            if number % 2 == 0 {
                // QEMU reads all memory: what was a hole is a page of zeros.
                scribbled.monitor.memory(SCRIBBLER_RAM_BYTES);
            }
            if number == 3 {
                // Without a helper no process watches which pages are discarded.
                scribbled.vm.kill_helper();
                discard_pages(&ram, &mut random);
                scribbled.monitor.memory(SCRIBBLER_RAM_BYTES);
                scribbled.vm.attach();
            }
            scribbled.pause_between();
        }
        scribbled.checkpoint();
        scribbled.check(<[CheckpointId]>::to_vec);
    });
}

const RAM_BYTES: u64 = 256 * MIB;

fn balloon_bytes(monitor: &mut QmpClient) -> u64 {
    monitor.execute("query-balloon", json!({}))["actual"].as_u64().expect("a number")
}

/// Has the guest's driver keep so much memory.
fn keep(monitor: &mut QmpClient, bytes: u64) {
    monitor.execute("balloon", json!({ "value": bytes }));
    assert!(
        wait_until(TIMEOUT, || balloon_bytes(monitor) == bytes),
        "the balloon has {} bytes",
        balloon_bytes(monitor)
    );
}

/// A checkpoint with the guest stopped, and what its memory is then.
fn checkpoint(vm: &TestVm, monitor: &mut QmpClient) -> (String, Vec<u8>, u64) {
    monitor.stop();
    let memory = monitor.memory(RAM_BYTES);
    let taken = vm.checkpoint();
    monitor.cont();
    assert_eq!(taken.outcome.engine, "tracker");
    (taken.name, memory, balloon_bytes(monitor))
}

#[test]
fn balloon_of_a_linux_guest_inflates_and_deflates_between_checkpoints() {
    let lab = Lab::new(&newest_qemu());
    let balloon = ["-device", "virtio-balloon-pci,id=b,free-page-reporting=on"];
    // A guest that clears each page that it allocates writes to those that its balloon takes, so
    // that they are dirty anyway.
    let recipe = Recipe::witness("q35-virtio.cfg").words("init_on_alloc=0").arguments(&balloon);
    let vm = lab.start("m", &recipe);
    vm.wait_for_witness();
    let mut monitor = vm.qmp();
    let mut taken = vec![checkpoint(&vm, &mut monitor)];
    for bytes in [128 * MIB, 224 * MIB, 160 * MIB] {
        keep(&mut monitor, bytes);
        taken.push(checkpoint(&vm, &mut monitor));
    }
    vm.assert_no_contradiction();
    drop(monitor);
    vm.kill();

    for (name, memory, actual) in taken.iter().rev() {
        let restored = lab.restore(name, "back", &["--paused"]);
        let mut monitor = restored.qmp();
        let found = monitor.memory(RAM_BYTES);
        let wrong: Vec<usize> = (0..found.len())
            .step_by(PAGE as usize)
            .filter(|at| found[*at..][..4096] != memory[*at..][..4096])
            .collect();
        assert!(
            wrong.is_empty(),
            "{name}: {} pages differ, the first at {:#x}",
            wrong.len(),
            wrong[0]
        );
        assert_eq!(balloon_bytes(&mut monitor), *actual, "{name}");
        if name == "m@4" {
            monitor.cont();
            keep(&mut monitor, RAM_BYTES);
            let line = restored.wait_for_line("a first line", |_| true);
            restored.assert_all_right(&line);
        }
    }
}
