//! A restored machine is byte for byte what the machine was: random writes to memory and disks, random checkpoints, random
//! failures in between, and a truth that owes nothing to the program under test.
//!
//! Memory is written by a boot sector (`src/scribbler.S`) and read out by QEMU's own `pmemsave` while the machine is stopped. The disks
//! are written through QEMU by the test, which keeps their content itself.

use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use stillpoint_tests::{
    Lab, QmpClient, Random, Recipe, SCRIBBLER_RAM_BYTES, SmallStore, TestMachine, newest_qemu, on_each_qemu, wait_until,
};

const SEEDS: &[u64] = &[1, 7, 20_260_711];
const ACTIONS: usize = 40;
const DISK_BLOCK: u64 = 512;
/// Where a helper dies in these runs; `kills.rs` has them all.
const POINTS: &[&str] = &["prepared", "round", "freeze.frozen", "drain", "commit", "committed"];

/// A disk of the machine, and what it holds if everything is right.
struct ModelDisk {
    drive: &'static str,
    content: Vec<u8>,
}

/// What one checkpoint must bring back.
struct Truth {
    memory: Vec<u8>,
    disks: Vec<Vec<u8>>,
}

struct Run<'lab> {
    lab: &'lab Lab,
    machine: TestMachine<'lab>,
    monitor: QmpClient,
    small: Option<&'lab SmallStore>,
    random: Random,
    disks: Vec<ModelDisk>,
    truths: BTreeMap<u64, Truth>,
    /// For the message of a failure.
    story: Vec<String>,
}

impl<'lab> Run<'lab> {
    fn start(lab: &'lab Lab, small: Option<&'lab SmallStore>, seed: u64) -> Self {
        let machine = lab.start("p", &Recipe::scribbler(seed as u32));
        let disks = ["cow", "odd"].map(|drive| ModelDisk { drive, content: machine.disk(drive) }).into();
        let mut monitor = machine.qmp();
        wait_for_scribbles(&mut monitor);
        Self { lab, machine, monitor, small, random: Random::new(seed), disks, truths: BTreeMap::new(), story: Vec::new() }
    }

    fn act(&mut self) {
        match self.random.below(10) {
            0..=3 => self.write_disks(),
            4 => self.pause_between(),
            5 => self.die_in_a_checkpoint(),
            6 if self.small.is_some() => self.fill_the_store(),
            _ => self.checkpoint(),
        }
    }

    fn pause_between(&mut self) {
        let pause = self.random.below(300);
        self.story.push(format!("wait {pause} ms"));
        std::thread::sleep(Duration::from_millis(pause));
    }

    fn write_disks(&mut self) {
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

    /// With the machine stopped, so that the truth is of the same instant.
    fn checkpoint(&mut self) {
        self.monitor.stop();
        let truth = self.truth();
        let outcome = self.machine.checkpoint().outcome;
        self.monitor.cont();
        self.story.push(format!("checkpoint {} {}", outcome.id, outcome.kind));
        self.truths.insert(outcome.id, truth);
    }

    fn truth(&mut self) -> Truth {
        let disks = self.disks.iter().map(|disk| disk.content.clone()).collect();
        Truth { memory: self.monitor.memory(SCRIBBLER_RAM_BYTES), disks }
    }

    fn die_in_a_checkpoint(&mut self) {
        let point = *self.random.pick(POINTS);
        self.story.push(format!("the helper dies at {point}"));
        self.machine.kill_helper();
        self.machine.attach_with(&[], &[("STILLPOINT_DIE_AT", point)]);
        let ran = self.machine.try_checkpoint();
        // A checkpoint that finds nothing changed does not come that far.
        if ran.code == 0 {
            assert!(["commit", "committed"].contains(&point) && ran.json()["kind"] == "unchanged", "{:?}", self.story);
        } else {
            assert!(wait_until(Duration::from_secs(5), || self.machine.helper().is_none()), "it did not die: {}", ran.err);
        }
        self.machine.kill_helper();
        self.machine.attach();
    }

    fn fill_the_store(&mut self) {
        let Some(small) = self.small else { return };
        let left = self.random.below(40) * 4096;
        self.story.push(format!("the store is full but for {left} bytes"));
        let before = self.lab.list_if_any("p");
        let ballast = small.fill_but(left);
        let ran = self.machine.try_checkpoint();
        drop(ballast);
        if ran.code == 0 {
            return;
        }
        let message = ran.expect_failure(4);
        assert!(message.contains("No space left"), "{message}");
        assert_eq!(self.lab.list_if_any("p"), before, "a failed checkpoint is listed");
    }

    fn check_all(self, seed: u64) {
        let Self { lab, machine, truths, disks, story, .. } = self;
        lab.verify("p");
        let listed = lab.list("p");
        machine.kill();
        // The newest, and others over the whole lineage.
        let chosen: Vec<u64> = truths.keys().rev().step_by(2).copied().take(4).collect();
        for id in chosen {
            assert!(listed.contains(&id));
            let wrong = compare(lab, id, &truths[&id], &disks);
            assert!(wrong.is_empty(), "seed {seed}, checkpoint {id}: {wrong:#?}\nafter {story:#?}");
        }
    }
}

/// The boot sector runs once pages beyond the first MiB change.
fn wait_for_scribbles(monitor: &mut QmpClient) {
    let ran = wait_until(Duration::from_secs(60), || {
        let memory = monitor.memory(SCRIBBLER_RAM_BYTES);
        memory[2 << 20..14 << 20].chunks(4096).filter(|page| page.iter().any(|byte| *byte != 0)).count() > 300
    });
    assert!(ran, "the boot sector does not run");
}

/// Restores one checkpoint, paused, and tells every difference.
fn compare(lab: &Lab, id: u64, truth: &Truth, disks: &[ModelDisk]) -> Vec<String> {
    let restored = lab.restore(&format!("p@{id}"), "back", &["--paused"]);
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
    let differing: Vec<usize> = pages.filter(|(_, (one, other))| one != other).map(|(page, _)| page).collect();
    (!differing.is_empty()).then(|| format!("{what}: {} pages differ, first {:?}", differing.len(), &differing[..differing.len().min(8)]))
}

fn run(qemu: &Path, seed: u64, small: bool) {
    eprintln!("seed {seed} with {}", qemu.display());
    let lab = Lab::new(qemu);
    // Room for the layers, a full checkpoint and some more.
    let small = small.then(|| SmallStore::mount(lab.store_directory(), 96)).flatten();
    let mut run = Run::start(&lab, small.as_ref(), seed);
    run.checkpoint();
    for _ in 0..ACTIONS {
        run.act();
    }
    run.checkpoint();
    run.check_all(seed);
}

#[test]
fn restored_machines_are_byte_for_byte_what_was_checkpointed() {
    on_each_qemu(|qemu| SEEDS.iter().for_each(|seed| run(qemu, *seed, true)));
}

#[test]
fn and_so_they_are_with_a_seed_that_nobody_tried_before() {
    run(&newest_qemu(), Random::fresh_seed(), true);
}
