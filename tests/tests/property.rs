//! A restored VM is byte for byte what the VM was: random writes to memory and disks, random
//! checkpoints, random failures in between, and expected content that is computed without the
//! program under test (`src/truth.rs`).

use engine::kill_point::POINTS;
use std::path::Path;
use std::time::Duration;
use stillpoint_tests::{
    Lab, Random, Recipe, Scribbled, SmallStore, newest_qemu, on_each_qemu, wait_until,
};

const SEEDS: &[u64] = &[1, 7, 20_260_711];
const ACTIONS: usize = 40;
/// Where a helper dies in these runs; `kills.rs` has them all.
const DIE_AT: &[&str] =
    &["prepared", "pre-copy", "pause.captured", "upload", "commit", "committed"];

struct Run<'lab> {
    lab: &'lab Lab,
    small: Option<&'lab SmallStore>,
    scribbled: Scribbled<'lab>,
}

impl<'lab> Run<'lab> {
    fn start(lab: &'lab Lab, small: Option<&'lab SmallStore>, seed: u64) -> Self {
        let vm = lab.start("p", &Recipe::scribbler(seed as u32));
        Self { lab, small, scribbled: Scribbled::new(lab, vm, seed) }
    }

    fn act(&mut self) {
        match self.scribbled.random.below(10) {
            0..=3 => self.scribbled.write_disks(),
            4 => self.scribbled.pause_between(),
            5 => self.die_in_a_checkpoint(),
            6 if self.small.is_some() => self.fill_the_store(),
            _ => drop(self.scribbled.checkpoint()),
        }
    }

    fn die_in_a_checkpoint(&mut self) {
        let Scribbled { vm, random, story, .. } = &mut self.scribbled;
        let point = *random.pick(DIE_AT);
        assert!(POINTS.contains(&point), "{point}");
        story.push(format!("the helper dies at {point}"));
        vm.kill_helper();
        vm.attach_with(&[], &[("STILLPOINT_DIE_AT", point)]);
        let ran = vm.try_checkpoint();
        // A checkpoint that finds nothing changed does not come that far.
        if ran.code == 0 {
            assert!(
                ["commit", "committed"].contains(&point) && ran.json()["kind"] == "unchanged",
                "{story:?}"
            );
        } else {
            assert!(
                wait_until(Duration::from_secs(5), || vm.helper().is_none()),
                "it did not die: {}",
                ran.err
            );
        }
        vm.kill_helper();
        vm.attach();
    }

    fn fill_the_store(&mut self) {
        let Some(small) = self.small else { return };
        let Scribbled { vm, random, story, .. } = &mut self.scribbled;
        let left = random.below(40) * 4096;
        story.push(format!("the store is full but for {left} bytes"));
        let before = self.lab.list_if_any("p");
        let ballast = small.fill_but(left);
        let ran = vm.try_checkpoint();
        drop(ballast);
        if ran.code == 0 {
            return;
        }
        let message = ran.expect_failure(4);
        assert!(message.contains("No space left"), "{message}");
        assert_eq!(self.lab.list_if_any("p"), before, "a failed checkpoint is listed");
    }
}

fn run(qemu: &Path, seed: u64, small: bool) {
    eprintln!("seed {seed} with {}", qemu.display());
    let lab = Lab::new(qemu);
    // Room for the layers, a full checkpoint and some more.
    let small = small.then(|| SmallStore::mount(lab.store_directory(), 96));
    let mut run = Run::start(&lab, small.as_ref(), seed);
    run.scribbled.checkpoint();
    for _ in 0..ACTIONS {
        run.act();
    }
    run.scribbled.checkpoint();
    // The newest, and others over the whole lineage.
    run.scribbled.check(|newest_first| newest_first.iter().step_by(2).copied().take(4).collect());
}

#[test]
fn restored_vms_are_byte_for_byte_what_was_checkpointed() {
    on_each_qemu(|qemu| SEEDS.iter().for_each(|seed| run(qemu, *seed, true)));
}

#[test]
fn restored_vms_of_a_fresh_seed_are_byte_for_byte_what_was_checkpointed() {
    run(&newest_qemu(), Random::fresh_seed(), true);
}
