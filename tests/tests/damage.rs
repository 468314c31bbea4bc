//! Damaged and hostile stores: every command says which file is wrong, none panics, and no VM runs
//! from it.

use checkpoint_format::CheckpointId;
use std::path::{Path, PathBuf};
use stillpoint_tests::{
    Damage, Lab, Recipe, copy_tree, files_below, newest_qemu, wait_for_scribbles,
};

const DAMAGED: i32 = 5;

/// A store with two checkpoints of one VM, the second on the first.
fn fill(lab: &Lab) {
    let vm = lab.start("m", &Recipe::scribbler(9));
    wait_for_scribbles(&mut vm.qmp());
    vm.checkpoint();
    // It writes.
    std::thread::sleep(std::time::Duration::from_millis(500));
    vm.checkpoint();
    vm.kill();
    // A restore would take the base image from there, and not look at the store's.
    std::fs::remove_dir_all(lab.path().join("m")).expect("the test's directory");
    std::fs::rename(lab.store_directory(), lab.path().join("good")).expect("the test's directory");
}

/// A fresh copy of the good store with one file damaged.
fn damaged(lab: &Lab, file: &Path, damage: Damage) {
    let store = lab.store_directory();
    if store.exists() {
        std::fs::remove_dir_all(&store).expect("the test's directory");
    }
    copy_tree(&lab.path().join("good"), &store);
    damage.apply(&store.join(file));
}

/// Files of the good store whose path has all of `parts`, relative to the store.
fn find(lab: &Lab, parts: &[&str]) -> Vec<PathBuf> {
    let good = lab.path().join("good");
    let relative = files_below(&good)
        .into_iter()
        .map(|file| file.strip_prefix(&good).expect("below").to_owned());
    let found: Vec<PathBuf> = relative
        .filter(|file| parts.iter().all(|part| file.to_string_lossy().contains(part)))
        .collect();
    assert!(!found.is_empty(), "the store has no {parts:?}: {:?}", files_below(&good));
    found
}

/// What a message may call a file: its name, the checkpoint or layer that it belongs to.
fn names(file: &Path) -> Vec<String> {
    let name = file.file_name().expect("a file").to_string_lossy().into_owned();
    let above = file
        .parent()
        .and_then(Path::file_name)
        .expect("a directory")
        .to_string_lossy()
        .into_owned();
    let owner = if file.starts_with("vms") { format!("m@{above}") } else { above };
    vec![name, owner]
}

fn check(lab: &Lab, file: &Path, damage: Damage) {
    damaged(lab, file, damage);
    let what = format!("{} {damage:?}", file.display());
    let gone = matches!(damage, Damage::Remove);
    let qemu = lab.qemu.to_str().expect("UTF-8");
    let restored = lab.fresh_directory("restored");
    // With a cache of its own, so that a layer is not taken from elsewhere.
    let cache = lab.fresh_directory("cache").display().to_string();
    let environment = [("STILLPOINT_CACHE_DIR", cache.as_str())];
    let restore = [
        "restore",
        "--eager",
        "m",
        "--as",
        "n",
        "--qemu",
        qemu,
        "--dir",
        restored.to_str().expect("UTF-8"),
    ];
    for words in [&["verify", "m"][..], &restore] {
        let ran = lab.run_with(words, &environment);
        let fits = ran.code == DAMAGED || gone && ran.code == 4;
        assert!(fits, "{what}: {} ended with {}: {}{}", words[0], ran.code, ran.out, ran.err);
        let message = format!("{}{}", ran.out, ran.err);
        assert!(
            names(file).iter().any(|name| message.contains(name)),
            "{what}: {} does not say where: {message}",
            words[0]
        );
    }
    assert!(lab.nothing_runs("n"), "{what}: a half-restored VM runs");
}

#[test]
fn damage_is_found_and_named() {
    let lab = Lab::new(&newest_qemu());
    fill(&lab);
    let first_pack = &find(&lab, &["vms/m/checkpoints/1/", "pack"])[0];
    for damage in [Damage::Flip(300), Damage::Truncate(500), Damage::Truncate(0), Damage::Remove] {
        check(&lab, first_pack, damage);
    }
    for file in find(&lab, &["vms/m/checkpoints/2/", "pack"]) {
        check(&lab, &file, Damage::Flip(400));
    }
    let manifest = &find(&lab, &["vms/m/checkpoints/2/manifest"])[0];
    let first_manifest = &find(&lab, &["vms/m/checkpoints/1/manifest"])[0];
    // A restore finds its way by the index, without trailer and footer of a pack, reads only the
    // index of an earlier manifest, and does not look behind the end of that; 'verify' reads all of
    // it.
    let unused = [
        (first_manifest, Damage::Flip(300)),
        (first_pack, Damage::Flip(996)),
        (first_pack, Damage::Flip(1000)),
        (manifest, Damage::Append),
    ];
    for (file, damage) in unused {
        damaged(&lab, file, damage);
        let message = lab.run(&["verify", "m"]).expect_failure(DAMAGED);
        assert!(names(file).iter().any(|name| message.contains(name)), "{message}");
    }
    for damage in [
        Damage::Flip(0),
        Damage::Flip(500),
        Damage::Truncate(700),
        Damage::Truncate(0),
        Damage::Zeroes,
    ] {
        check(&lab, manifest, damage);
    }
    check(&lab, first_manifest, Damage::Flip(1000));
    check(&lab, &find(&lab, &["layers/", "layer.json"])[0], Damage::Flip(500));
    check(&lab, &find(&lab, &["layers/", "blocks.table"])[0], Damage::Flip(500));
    check(&lab, &find(&lab, &["layers/", "pack"])[0], Damage::Flip(300));
    check(&lab, &find(&lab, &["layers/", "pack"])[0], Damage::Truncate(900));
}

#[test]
fn a_damaged_or_newer_store_file_stops_every_command() {
    let lab = Lab::new(&newest_qemu());
    fill(&lab);
    let file = Path::new("store.json");
    for damage in [Damage::Truncate(500), Damage::Zeroes, Damage::Truncate(0)] {
        damaged(&lab, file, damage);
        for words in [&["ls"][..], &["verify", "m"], &["restore", "--eager", "m"]] {
            let message = lab.run(words).expect_failure(DAMAGED);
            assert!(message.contains("store.json"), "{damage:?}: {message}");
        }
    }
    damaged(&lab, file, Damage::Append);
    let path = lab.store_directory().join(file);
    let good = std::fs::read_to_string(lab.path().join("good").join(file)).expect("a store has it");
    let newer = good.replace("\"version\": 1", "\"version\": 999");
    assert_ne!(newer, good, "the format's version is not where this test thinks: {good}");
    std::fs::write(path, newer).expect("the test's directory");
    let ran = lab.run(&["ls"]);
    assert!(ran.code != 0 && ran.err.contains("999"), "{ran:?}");
}

#[test]
fn an_earlier_checkpoint_survives_damage_to_a_later_one() {
    let lab = Lab::new(&newest_qemu());
    fill(&lab);
    let later = &find(&lab, &["vms/m/checkpoints/2/", "pack"])[0];
    damaged(&lab, later, Damage::Flip(400));
    lab.restore("m@1", "n", &[]).checkpoint();
    lab.run(&["verify", "m@1"]).expect_success();
    lab.run(&["verify", "m@2"]).expect_failure(DAMAGED);
}

#[test]
fn leftovers_of_a_crash_are_no_checkpoints() {
    let lab = Lab::new(&newest_qemu());
    fill(&lab);
    copy_tree(&lab.path().join("good"), &lab.store_directory());
    let checkpoints = lab.store_directory().join("vms/m/checkpoints");
    copy_tree(&checkpoints.join("2"), &checkpoints.join("3.1-1.partial"));
    std::fs::create_dir_all(checkpoints.join("4.1-1.partial")).expect("the test's directory");
    assert_eq!(lab.list("m"), [1, 2].map(CheckpointId));
    lab.verify("m");
    let vm = lab.restore("m", "m", &[]);
    let outcome = vm.checkpoint().outcome;
    assert_eq!((outcome.id, outcome.parent), (CheckpointId(3), Some(CheckpointId(2))));
    let left = std::fs::read_dir(&checkpoints).expect("a directory").flatten();
    let partial = left.filter(|entry| entry.file_name().to_string_lossy().ends_with("partial"));
    assert_eq!(partial.count(), 0, "the next writer removes what a dead one left");
}
