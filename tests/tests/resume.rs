//! A checkpoint that fails late: what it stored counts for the next one.

use checkpoint_format::CheckpointId;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use stillpoint_tests::{Lab, Random, Recipe, SmallStore, newest_qemu};

const MIB: u64 = 1 << 20;
const DISK: u64 = 160 * MIB;

/// Content that does not compress, frame by frame, in which no page is another.
fn furnish(path: &Path) -> Vec<u8> {
    let mut random = Random::new(11);
    let noise: Vec<u8> = (0..MIB / 8).flat_map(|_| random.below(u64::MAX).to_le_bytes()).collect();
    let mut content = noise.repeat((DISK / MIB) as usize);
    content
        .chunks_mut(4096)
        .enumerate()
        .for_each(|(number, page)| page[..8].copy_from_slice(&number.to_le_bytes()));
    File::create(path)
        .and_then(|file| file.write_all_at(&content, 0))
        .expect("the test's directory");
    content
}

fn bytes_below(path: &Path) -> u64 {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let one = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(facts) if facts.is_dir() => bytes_below(&entry.path()),
        facts => facts.map_or(0, |facts| facts.len()),
    };
    entries.map(one).sum()
}

/// The store is full after 100 of 160 MiB. By the time that there is room again, the guest has
/// written other content here and there. The next try has the memory from another engine, so that
/// nothing but the packs joins the two.
#[test]
fn resume_after_a_full_store_stores_only_the_rest() {
    let lab = Lab::new(&newest_qemu());
    let store = lab.path().join("small/store");
    let lab = lab.with_store(&format!("file://{}", store.display()));
    let small = SmallStore::mount(lab.path().join("small"), 320);
    let image = lab.path().join("large.raw");
    let mut content = furnish(&image);
    let drive = format!("file={},format=raw,if=none,id=large", image.display());
    let recipe = Recipe::scribbler(71).arguments(&[
        "-drive",
        &drive,
        "-device",
        "virtio-blk-pci,drive=large",
    ]);
    let vm = lab.start("m", &recipe);
    let full = small.fill_but(100 * MIB);
    let message = vm.try_checkpoint().expect_failure(4);
    assert!(message.contains("No space left") && message.contains("next one"), "{message}");
    assert_eq!(lab.list_if_any("m"), [] as [CheckpointId; 0], "a failed checkpoint is listed");
    drop(full);
    let kept = bytes_below(&store);
    assert!(kept > 70 * MIB, "{kept} bytes are kept");
    let mut monitor = vm.qmp();
    for (pattern, start, len) in [(5, MIB, 3 * MIB), (0, 10 * MIB, MIB), (6, 150 * MIB, MIB)] {
        let command = if pattern == 0 {
            format!("write -z {start} {len}")
        } else {
            format!("write -P {pattern} {start} {len}")
        };
        monitor.disk_io("large", &command);
        content[start as usize..(start + len) as usize].fill(pattern);
    }
    drop(monitor);
    let taken = vm.checkpoint_with(&["--engine", "stream"]).outcome;
    assert!(taken.bytes_carried > 70 * MIB, "{taken:?}");
    let stored = bytes_below(&store);
    assert!(stored < DISK + 12 * MIB, "{stored} bytes for {DISK}: {taken:?}");
    eprintln!(
        "{} of {} bytes were stored by the failed try; {stored} in the store",
        taken.bytes_carried, taken.bytes_stored
    );
    lab.verify("m");
    lab.run(&["verify", "--restore", "m"]).expect_success();
    // And what comes after it builds on it.
    let next = vm.checkpoint().outcome;
    assert_eq!((next.parent, next.bytes_carried), (Some(taken.id), 0), "{next:?}");
    assert!(next.bytes_stored < 20 * MIB, "{next:?}");
    vm.kill();
    let restored = lab.restore("m", "m", &["--paused"]);
    assert!(restored.disk("large") == content, "the disk is another");
}
