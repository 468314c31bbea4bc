//! Byte for byte: what a stream brings back is what the VM was, stopped or running, and whichever
//! engine took the checkpoint before.

use checkpoint_format::CheckpointId;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use stillpoint_tests::{
    Lab, QmpClient, Random, Recipe, Scribbled, Scribbles, TestVm, newest_qemu, on_each_qemu,
    stream_modes, thorough, wait_for_scribbles,
};

const ACTIONS: usize = 14;

/// The last one is possible with every QEMU.
fn modes(qemu: &Path) -> impl Iterator<Item = &'static str> {
    let others = stream_modes(qemu).iter().copied().filter(|mode| *mode != "stopped");
    others.chain(["stopped"])
}

fn attached<'lab>(lab: &'lab Lab, seed: u64, mode: &str) -> TestVm<'lab> {
    let vm = lab.start_plain("p", &Recipe::scribbler(seed as u32));
    vm.attach_plain(&["--stream", mode]);
    vm
}

/// A guest that its owner has stopped is read from QEMU's memory, whatever stream is wanted.
const STOPPED: &str = "process-memory";

fn random_checkpoints(qemu: &Path, seed: u64) {
    eprintln!("seed {seed} with {}", qemu.display());
    let lab = Lab::new(qemu);
    let mut scribbled = Scribbled::new(&lab, attached(&lab, seed, "auto"), seed);
    assert_eq!(scribbled.checkpoint().engine, STOPPED);
    let actions = if thorough() { 3 * ACTIONS } else { ACTIONS };
    for _ in 0..actions {
        match scribbled.random.below(10) {
            0..=4 => scribbled.write_disks(),
            5 => scribbled.pause_between(),
            _ => assert_eq!(scribbled.checkpoint().engine, STOPPED),
        }
    }
    scribbled.write_disks();
    scribbled.checkpoint();
    // The newest, and others over the whole lineage.
    scribbled.check(|newest_first| newest_first.iter().step_by(2).copied().take(3).collect());
}

#[test]
fn stopped_guests_are_byte_for_byte_what_they_were() {
    on_each_qemu(|qemu| random_checkpoints(qemu, 7));
}

#[test]
fn stopped_guests_are_what_they_were_with_a_fresh_seed() {
    random_checkpoints(&newest_qemu(), Random::fresh_seed() >> 32);
}

/// Tracker and stream share the digests of what the parent holds, and the bitmaps of the disks.
#[test]
fn engines_may_be_switched_at_any_checkpoint() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let vm = lab.start("p", &Recipe::scribbler(11));
        let mut scribbled = Scribbled::new(&lab, vm, 11);
        let mut last = None;
        for engine in
            ["tracker", "stream", "tracker", "stream", "tracker", "tracker", "stream", "stream"]
        {
            let outcome = scribbled.checkpoint_with(&["--engine", engine]);
            assert_eq!(
                (outcome.engine == "tracker", outcome.parent),
                (engine == "tracker", last),
                "{engine}: {outcome:?}"
            );
            last = Some(outcome.id);
            scribbled.write_disks();
            scribbled.pause_between();
        }
        scribbled.check(<[CheckpointId]>::to_vec);
    });
}

// ---- of one instant, while the guest runs and its disks are written

/// Numbered blocks, in turn on one disk and the other.
struct Writes {
    disks: [(&'static str, Vec<u8>); 2],
}

const BLOCK: u64 = 4096;

impl Writes {
    fn new(vm: &TestVm) -> Self {
        Self { disks: ["cow", "odd"].map(|drive| (drive, vm.disk(drive))) }
    }

    /// Disk, offset and byte of the write `number`.
    fn place(&self, number: u64) -> (usize, u64, u8) {
        let disk = (number % 2) as usize;
        let blocks = self.disks[disk].1.len() as u64 / BLOCK;
        // A step that visits every block before it comes back.
        (disk, (number / 2 * 7919 % blocks) * BLOCK, (number % 255) as u8 + 1)
    }

    fn write(&self, number: u64, monitor: &mut QmpClient) {
        let (disk, offset, byte) = self.place(number);
        monitor.disk_io(self.disks[disk].0, &format!("write -P {byte} {offset} {BLOCK}"));
    }

    fn apply(&mut self, number: u64) {
        let (disk, offset, byte) = self.place(number);
        self.disks[disk].1[offset as usize..(offset + BLOCK) as usize].fill(byte);
    }

    /// Each disk of the restored VM holds all writes up to one that was made during the checkpoint,
    /// and none after it. Each by itself: unlike a guest, the test's monitor writes in the pause,
    /// too, between the commands that hold one disk and the next.
    fn assert_instant(&mut self, restored: &TestVm, during: std::ops::Range<u64>) {
        for (disk, drive) in ["cow", "odd"].into_iter().enumerate() {
            let found = restored.disk(drive);
            let mut number = during.start;
            while self.disks[disk].1 != found {
                assert!(
                    number < during.end,
                    "{}: disk {drive} is of no instant from {during:?}",
                    restored.name
                );
                if self.place(number).0 == disk {
                    self.apply(number);
                }
                number += 1;
            }
        }
    }
}

/// A checkpoint while blocks are written; the numbers of the writes that were made meanwhile. In
/// modes where QEMU migrates, the writes are made before: QEMU inactivates its disks in the pause
/// and asserts that no client writes then, as no guest does (`external::layouts` tests the rest
/// with guests).
fn checkpoint_while_written(
    vm: &TestVm,
    mode: &str,
    writes: &Writes,
    next: &AtomicU64,
) -> (String, std::ops::Range<u64>) {
    let mut monitor = vm.qmp();
    let begin = next.load(Ordering::SeqCst);
    if ["pre-copy", "stopped"].contains(&mode) {
        (0..20).for_each(|_| writes.write(next.fetch_add(1, Ordering::SeqCst), &mut monitor));
        let end = next.load(Ordering::SeqCst);
        return (vm.checkpoint().name, end..end);
    }
    let taken = std::thread::scope(|scope| {
        let checkpoint = scope.spawn(|| vm.checkpoint());
        while !checkpoint.is_finished() {
            writes.write(next.fetch_add(1, Ordering::SeqCst), &mut monitor);
        }
        checkpoint.join().expect("it says above why not")
    });
    (taken.name, begin..next.load(Ordering::SeqCst))
}

fn one_instant(qemu: &Path, mode: &str) {
    let lab = Lab::new(qemu);
    let seed = 23;
    let vm = attached(&lab, seed, mode);
    wait_for_scribbles(&mut vm.qmp());
    let mut writes = Writes::new(&vm);
    let next = AtomicU64::new(0);
    let taken: Vec<_> = (0..3)
        .map(|_| {
            std::thread::sleep(Duration::from_millis(300));
            checkpoint_while_written(&vm, mode, &writes, &next)
        })
        .collect();
    vm.kill();
    let mut applied = 0;
    for (checkpoint, during) in &taken {
        let restored = lab.restore(checkpoint, "back", &["--paused"]);
        let wrong = Scribbles::new(seed as u32).differences(&mut restored.qmp());
        assert!(
            wrong.is_empty(),
            "{checkpoint} by {mode}: {} pages are not of its instant: {:?}",
            wrong.len(),
            &wrong[..wrong.len().min(8)]
        );
        (applied..during.start).for_each(|number| writes.apply(number));
        applied = during.start;
        let mut model = Writes { disks: writes.disks.clone() };
        model.assert_instant(&restored, during.clone());
    }
}

#[test]
fn a_running_vm_is_caught_at_one_instant() {
    on_each_qemu(|qemu| modes(qemu).for_each(|mode| one_instant(qemu, mode)));
}

/// The same for the other engine, and so for this test itself.
#[test]
fn a_tracked_vm_is_caught_at_one_instant() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start("p", &Recipe::scribbler(31));
    wait_for_scribbles(&mut vm.qmp());
    let mut writes = Writes::new(&vm);
    let (checkpoint, during) =
        checkpoint_while_written(&vm, "tracker", &writes, &AtomicU64::new(0));
    vm.kill();
    let restored = lab.restore(&checkpoint, "back", &["--paused"]);
    let wrong = Scribbles::new(31).differences(&mut restored.qmp());
    assert!(
        wrong.is_empty(),
        "{} pages are not of the checkpoint's instant: {:?}",
        wrong.len(),
        &wrong[..wrong.len().min(8)]
    );
    assert!(during.end > 3, "the disks were not written meanwhile");
    writes.assert_instant(&restored, during);
}
