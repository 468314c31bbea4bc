//! What a checkpoint is relative to: a store that has lost, or holds another, than what the helper
//! knows, gets no checkpoint that builds on a hole.

use checkpoint_format::CheckpointId;
use std::path::{Path, PathBuf};
use stillpoint_tests::{Lab, Recipe, Scribbled, copy_tree, newest_qemu};

fn checkpoint_directory(lab: &Lab, id: u64) -> PathBuf {
    lab.store_directory().join("vms/m/checkpoints").join(id.to_string())
}

/// The store as it was when `copy` was made.
fn set_back(lab: &Lab, copy: &Path) {
    std::fs::remove_dir_all(lab.store_directory()).expect("the test's directory");
    copy_tree(copy, &lab.store_directory());
}

/// Writes to memory and disks, then takes a checkpoint that has this number and parent.
fn step(scribbled: &mut Scribbled, words: &[&str], id: u64, parent: Option<u64>) {
    scribbled.write_disks();
    scribbled.pause_between();
    let outcome = scribbled.checkpoint_with(words);
    assert_eq!(
        (outcome.id, outcome.parent),
        (CheckpointId(id), parent.map(CheckpointId)),
        "{outcome:?} after {:#?}",
        scribbled.story
    );
}

#[test]
fn lineage_is_what_the_store_holds() {
    let lab = Lab::for_vms(&newest_qemu(), 2);
    let mut scribbled = Scribbled::new(&lab, lab.start("m", &Recipe::scribbler(51)), 51);
    let (away, copy) = (lab.path().join("away"), lab.path().join("copy"));
    step(&mut scribbled, &[], 1, None);
    step(&mut scribbled, &[], 2, Some(1));
    copy_tree(&lab.store_directory(), &copy);
    step(&mut scribbled, &[], 3, Some(2));

    // The store goes away, a checkpoint fails, and it comes back without the newest two.
    std::fs::rename(lab.store_directory(), &away).expect("the test's directory");
    scribbled.vm.try_checkpoint().expect_failure(4);
    assert!(
        !lab.store_directory().exists(),
        "a store that is missing is not made again in its place"
    );
    std::fs::rename(&away, lab.store_directory()).expect("the test's directory");
    [2, 3].iter().for_each(|id| {
        std::fs::remove_dir_all(checkpoint_directory(&lab, *id)).expect("the test's directory")
    });
    step(&mut scribbled, &[], 2, Some(1));
    scribbled.check_beside(CheckpointId(2));

    // It loses one between two checkpoints.
    step(&mut scribbled, &[], 3, Some(2));
    std::fs::remove_dir_all(checkpoint_directory(&lab, 3)).expect("the test's directory");
    step(&mut scribbled, &[], 3, Some(2));
    scribbled.check_beside(CheckpointId(3));

    // Another checkpoint has the parent's number.
    std::fs::remove_dir_all(checkpoint_directory(&lab, 3)).expect("the test's directory");
    set_back(&lab, &copy);
    step(&mut scribbled, &[], 3, Some(2));
    scribbled.check_beside(CheckpointId(3));

    // The same while no helper lives.
    step(&mut scribbled, &[], 4, Some(3));
    scribbled.vm.kill_helper();
    set_back(&lab, &copy);
    scribbled.vm.attach();
    step(&mut scribbled, &[], 3, Some(2));
    scribbled.check_beside(CheckpointId(3));

    // What the parent builds on is gone, so nothing builds on it.
    std::fs::remove_dir_all(checkpoint_directory(&lab, 2)).expect("the test's directory");
    step(&mut scribbled, &[], 4, None);
    step(&mut scribbled, &[], 5, Some(4));
    scribbled.check_beside(CheckpointId(5));

    step(&mut scribbled, &["--full"], 6, None);
    step(&mut scribbled, &[], 7, Some(6));

    // Another store takes its place.
    std::fs::remove_dir_all(lab.store_directory()).expect("the test's directory");
    scribbled.vm.try_checkpoint().expect_failure(4);
    step(&mut scribbled, &["--full"], 1, None);
    step(&mut scribbled, &[], 2, Some(1));
    scribbled.check(|newest_first| {
        newest_first.iter().copied().filter(|id| *id <= CheckpointId(2)).collect()
    });
}
