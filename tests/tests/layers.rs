//! What VMs only read is stored once for all of them, and comes from the nearest place at restore.

use engine::checkpoint::outcome::Outcome;
use stillpoint_tests::{Lab, Recipe, TestVm, newest_qemu, on_each_qemu};

fn one_checkpoint(lab: &Lab, name: &str, recipe: &Recipe) -> Outcome {
    let vm = lab.start(name, recipe);
    let outcome = vm.checkpoint().outcome;
    vm.kill();
    outcome
}

#[test]
fn vms_on_one_base_image_store_it_once() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let first = one_checkpoint(&lab, "first", &Recipe::scribbler(1));
        assert!(first.layer_bytes_stored > 0, "{first:?}");
        let second = one_checkpoint(&lab, "second", &Recipe::scribbler(2));
        assert_eq!(second.layer_bytes_stored, 0, "the same image at another path");
        let changed = Recipe::scribbler(3).patch("base.raw", 5 << 20, b"an update of one file");
        let third = one_checkpoint(&lab, "third", &changed);
        assert!(
            (1..128 << 10).contains(&third.layer_bytes_stored),
            "one block of 64 KiB differs: {third:?}"
        );
        let layers = std::fs::read_dir(lab.store_directory().join("layers"))
            .expect("a store has it")
            .count();
        assert_eq!(layers, 2);
        ["first", "second", "third"].iter().for_each(|name| lab.verify(name));
        let restored = lab.restore("third", "third", &[]);
        let content = restored.disk("cow");
        assert_eq!(&content[5 << 20..(5 << 20) + 21], b"an update of one file");
    });
}

fn layer_bytes(vm: &TestVm) -> u64 {
    vm.report["layer_bytes_read"].as_u64().expect("a number")
}

#[test]
fn a_local_copy_serves_only_if_its_content_is_right() {
    let mut lab = Lab::new(&newest_qemu());
    let recipe = Recipe::scribbler(4);
    let vm = lab.start("m", &recipe);
    let expected = vm.disk("cow");
    let base = vm.directory.join("base.raw");
    vm.checkpoint();
    vm.kill();
    lab.set("XDG_CACHE_HOME", lab.path().join("cache").display().to_string());
    lab.set("STILLPOINT_CACHE_DIR", String::new());
    let check = |what: &str, is_fetched: bool| {
        let restored = lab.restore("m", "restored", &["--paused"]);
        assert_eq!(layer_bytes(&restored) > 0, is_fetched, "{what}: {}", restored.report);
        let found = restored.disk("cow");
        assert!(found == expected, "{what}: the disk has another content");
    };
    check("the base image is where it was", false);
    let mut other = std::fs::read(&base).expect("the test's directory");
    other[100] ^= 1;
    std::fs::write(&base, other).expect("the test's directory");
    check("a changed image of the same length is where it was", true);
    check("the cache has it by now", false);
    let cached = stillpoint_tests::files_below(&lab.path().join("cache/stillpoint/layers"));
    let mut other = std::fs::read(&cached[0]).expect("the one layer");
    other[100] ^= 1;
    std::fs::write(&cached[0], other).expect("the test's directory");
    check("the cached layer was altered", true);
    std::fs::remove_file(&base).expect("the test's directory");
    std::fs::remove_dir_all(lab.path().join("cache/stillpoint/layers"))
        .expect("the cache is where it was asked to be");
    check("neither has it", true);
}

#[test]
fn a_chain_of_backing_files_comes_back() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let recipe = Recipe::scribbler(5)
            .image(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "middle.qcow2"])
            .image(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-b",
                "middle.qcow2",
                "-F",
                "qcow2",
                "top.qcow2",
            ])
            .arguments(&[
                "-drive",
                "file=top.qcow2,format=qcow2,if=none,id=top",
                "-device",
                "virtio-blk-pci,drive=top",
            ]);
        let vm = lab.start("m", &recipe);
        vm.qmp().disk_io("top", "write -P 9 65536 100000");
        vm.checkpoint();
        vm.qmp().disk_io("top", "write -P 8 131072 512");
        vm.checkpoint();
        let expected = vm.disk("top");
        let directory = vm.directory.clone();
        vm.kill();
        std::fs::remove_dir_all(directory).expect("the test's directory");
        let restored = lab.restore("m", "m", &[]);
        let found = restored.disk("top");
        assert!(found == expected && found[65536] == 9 && found[131_072] == 8);
        assert_eq!(
            restored.checkpoint().outcome.layer_bytes_stored,
            0,
            "the fetched layers are known"
        );
    });
}

/// A base image of 2 TiB and a writable disk of 1 TiB, both nearly all holes.
#[test]
fn sparse_disks_cost_nothing_per_absent_page() {
    use std::os::unix::fs::FileExt;
    const MIB: u64 = 1 << 20;
    let lab = Lab::new(&newest_qemu());
    let recipe = Recipe::scribbler(6)
        .image(&["create", "-q", "-f", "raw", "huge.raw", "2T"])
        .patch("huge.raw", 1 << 40, b"far in the base")
        .image(&["create", "-q", "-f", "qcow2", "-b", "huge.raw", "-F", "raw", "over.qcow2"])
        .image(&["create", "-q", "-f", "raw", "big.raw", "1T"])
        .arguments(&[
            "-drive",
            "file=over.qcow2,format=qcow2,if=none,id=over",
            "-device",
            "virtio-blk-pci,drive=over",
        ])
        .arguments(&[
            "-drive",
            "file=big.raw,format=raw,if=none,id=big",
            "-device",
            "virtio-blk-pci,drive=big",
        ]);
    let vm = lab.start("m", &recipe);
    vm.qmp().disk_io("big", "write -P 8 512G 64k");
    let first = vm.checkpoint().outcome;
    assert!(first.bytes_changed < 64 * MIB && first.layer_bytes_stored < 64 * MIB, "{first:?}");
    vm.qmp().disk_io("big", "write -z 512G 4k");
    vm.qmp().disk_io("big", "write -z 700G 100M");
    let second = vm.checkpoint().outcome;
    assert!(second.bytes_changed < 16 * MIB, "holes that were zeroed are no changes: {second:?}");
    lab.verify("m");
    let directory = vm.directory.clone();
    vm.kill();
    std::fs::remove_dir_all(directory).expect("the test's directory");
    let restored = lab.restore("m", "m", &["--paused"]);
    let big =
        std::fs::File::open(restored.directory.join("sp-big.raw")).expect("the restored disk");
    let mut found = [1; 65536];
    big.read_exact_at(&mut found, 512 << 30).expect("it is as long as it was");
    assert!(
        found[..4096].iter().all(|byte| *byte == 0) && found[4096..].iter().all(|byte| *byte == 8)
    );
}
