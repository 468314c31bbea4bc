//! A scribbler VM: each of its checkpoints can be compared byte for byte with expected content that
//! is computed without the program under test.
//!
//! Memory is written by the boot sector (`scribbler.S`) and read out by QEMU's own `pmemsave` while
//! the VM is stopped. The disks are written through QEMU by the test, which keeps their content
//! itself.

use crate::lab::Lab;
use crate::process::wait_until;
use crate::qmp::QmpClient;
use crate::random::Random;
use crate::recipe::SCRIBBLER_RAM_BYTES;

use crate::vm::TestVm;
use checkpoint_format::CheckpointId;
use engine::checkpoint::outcome::Outcome;
use serde_json::json;
use std::collections::BTreeMap;
use std::time::Duration;

const DISK_BLOCK: u64 = 512;

/// Whether more than CI has time for was asked for.
pub fn thorough() -> bool {
    std::env::var_os("STILLPOINT_TEST_THOROUGH").is_some_and(|value| value == "1")
}

/// A disk of the VM, and what it holds if everything is right.
struct ModelDisk {
    drive: &'static str,
    content: Vec<u8>,
}

/// What one checkpoint must bring back.
struct Truth {
    memory: Vec<u8>,
    disks: Vec<Vec<u8>>,
}

pub struct Scribbled<'lab> {
    pub vm: TestVm<'lab>,
    pub monitor: QmpClient,
    pub random: Random,
    lab: &'lab Lab,
    seed: u64,
    disks: Vec<ModelDisk>,
    truths: BTreeMap<CheckpointId, Truth>,
    /// For the message of a failure.
    pub story: Vec<String>,
}

impl<'lab> Scribbled<'lab> {
    /// Waits until the boot sector runs.
    pub fn new(lab: &'lab Lab, vm: TestVm<'lab>, seed: u64) -> Self {
        let disks = ["cow", "odd"].map(|drive| ModelDisk { drive, content: vm.disk(drive) }).into();
        let mut monitor = vm.qmp();
        wait_for_scribbles(&mut monitor);
        Self {
            vm,
            monitor,
            random: Random::new(seed),
            lab,
            seed,
            disks,
            truths: BTreeMap::new(),
            story: Vec::new(),
        }
    }

    pub fn pause_between(&mut self) {
        let pause = self.random.below(300);
        self.story.push(format!("wait {pause} ms"));
        std::thread::sleep(Duration::from_millis(pause));
    }

    pub fn write_disks(&mut self) {
        for _ in 0..=self.random.below(6) {
            let number = self.random.below(self.disks.len() as u64) as usize;
            let disk = &mut self.disks[number];
            let blocks = disk.content.len() as u64 / DISK_BLOCK;
            let start = self.random.below(blocks);
            let most = if self.random.below(3) == 0 { 400 } else { 20 };
            let end = (start + 1 + self.random.below(most)).min(blocks);
            let (offset, length) = (start * DISK_BLOCK, (end - start) * DISK_BLOCK);
            let pattern = self.random.below(256) as u8;
            let (command, value) = match self.random.below(4) {
                0 => (format!("write -z {offset} {length}"), 0),
                1 => (format!("write -zu {offset} {length}"), 0),
                _ => (format!("write -P {pattern} {offset} {length}"), pattern),
            };
            self.monitor.disk_io(disk.drive, &command);
            disk.content[offset as usize..(offset + length) as usize].fill(value);
            self.story.push(format!("{}: {command}", disk.drive));
        }
    }

    /// With the VM stopped, so that the truth is of the same instant.
    pub fn checkpoint(&mut self) -> Outcome {
        self.checkpoint_with(&[])
    }

    pub fn checkpoint_with(&mut self, words: &[&str]) -> Outcome {
        self.monitor.stop();
        let truth = self.truth();
        let outcome = self.vm.checkpoint_with(words).outcome;
        assert!(!self.monitor.is_running(), "it was stopped before the checkpoint, so it stays so");
        self.monitor.cont();
        self.story.push(format!("checkpoint {} {:?} {}", outcome.id, outcome.kind, outcome.engine));
        self.truths.insert(outcome.id, truth);
        outcome
    }

    fn truth(&mut self) -> Truth {
        let disks = self.disks.iter().map(|disk| disk.content.clone()).collect();
        Truth { memory: self.monitor.memory(SCRIBBLER_RAM_BYTES), disks }
    }

    /// Restores a checkpoint of the store as it is now, beside the VM: byte for byte what it was.
    pub fn check_beside(&self, id: CheckpointId) {
        let wrong =
            compare(self.lab, &format!("{}@{id}", self.vm.name), &self.truths[&id], &self.disks);
        assert!(
            wrong.is_empty(),
            "seed {}, checkpoint {id}: {wrong:#?}\nafter {:#?}",
            self.seed,
            self.story
        );
    }

    /// Ends the VM, and restores what `choose` takes of its checkpoints (newest first): each is
    /// what it was, byte for byte.
    pub fn check(self, choose: impl Fn(&[CheckpointId]) -> Vec<CheckpointId>) {
        let Self { lab, vm, truths, disks, story, seed, .. } = self;
        let name = vm.name.clone();
        lab.verify(&name);
        let listed = lab.list(&name);
        vm.kill();
        let newest_first: Vec<CheckpointId> = truths.keys().rev().copied().collect();
        for id in choose(&newest_first) {
            assert!(listed.contains(&id));
            let wrong = compare(lab, &format!("{name}@{id}"), &truths[&id], &disks);
            assert!(wrong.is_empty(), "seed {seed}, checkpoint {id}: {wrong:#?}\nafter {story:#?}");
        }
    }
}

/// The boot sector runs once pages beyond the first MiB change.
pub fn wait_for_scribbles(monitor: &mut QmpClient) {
    let ran = wait_until(Duration::from_secs(60), || {
        let memory = monitor.memory(SCRIBBLER_RAM_BYTES);
        memory[2 << 20..14 << 20]
            .chunks(4096)
            .filter(|page| page.iter().any(|byte| *byte != 0))
            .count()
            > 300
    });
    assert!(ran, "the boot sector does not run");
}

/// Restores one checkpoint, paused, and tells every difference.
fn compare(lab: &Lab, checkpoint: &str, truth: &Truth, disks: &[ModelDisk]) -> Vec<String> {
    let restored = lab.restore(checkpoint, "back", &["--paused"]);
    let mut monitor = restored.qmp();
    let status = monitor.execute("query-status", json!({}));
    let mut wrong = Vec::new();
    if status["running"] != false {
        wrong.push(format!("--paused, but {status}"));
    }
    wrong.extend(differences("memory", &truth.memory, &monitor.memory(SCRIBBLER_RAM_BYTES)));
    drop(monitor);
    for (disk, content) in disks.iter().zip(&truth.disks) {
        wrong.extend(differences(disk.drive, content, &restored.disk(disk.drive)));
    }
    wrong
}

fn differences(what: &str, expected: &[u8], found: &[u8]) -> Option<String> {
    if expected.len() != found.len() {
        return Some(format!("{what}: {} bytes, {} expected", found.len(), expected.len()));
    }
    let pages = expected.chunks(4096).zip(found.chunks(4096)).enumerate();
    let differing: Vec<usize> =
        pages.filter(|(_, (one, other))| one != other).map(|(page, _)| page).collect();
    (!differing.is_empty()).then(|| {
        format!(
            "{what}: {} pages differ, first {:?}",
            differing.len(),
            &differing[..differing.len().min(8)]
        )
    })
}
