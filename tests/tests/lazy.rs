//! A guest that runs before its memory has arrived is the guest that was saved, whatever happens
//! meanwhile: a checkpoint, the death of its helper, a store that is away.

use checkpoint_format::CheckpointId;
use engine::checkpoint::outcome::Kind;
use serde_json::{Value, json};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;
use stillpoint_tests::{
    Lab, Recipe, SCRIBBLER_RAM_BYTES, Taken, TestVm, files_below, newest_qemu, on_each_qemu,
    qemu_img, read_image, wait_until,
};

/// The host may be busy.
const TIMEOUT: Duration = Duration::from_secs(120);

/// While it exists, pages come only when the guest needs them.
pub(crate) struct Hold(PathBuf);

impl Hold {
    /// For helpers that are started from now on.
    pub(crate) fn begin(lab: &mut Lab) -> Self {
        let path = lab.path().join("hold");
        lab.set("STILLPOINT_HOLD_FILLER", path.to_str().expect("UTF-8").to_owned());
        let hold = Self(path);
        hold.hold();
        hold
    }

    pub(crate) fn hold(&self) {
        File::create(&self.0).expect("the test's directory");
    }

    /// All but what the guest needed first the last time.
    pub(crate) fn hold_rest(&self) {
        std::fs::write(&self.0, "rest").expect("the test's directory");
    }

    pub(crate) fn release(&self) {
        std::fs::remove_file(&self.0).expect("the test's directory");
    }
}

/// A VM `m` that worked, and has a checkpoint; it is gone.
pub(crate) fn saved_witness(lab: &Lab) -> Taken {
    let vm = lab.start("m", &Recipe::witness("q35-virtio.cfg"));
    vm.wait_for_witness();
    let taken = vm.checkpoint();
    vm.kill();
    taken
}

pub(crate) fn hydration(lab: &Lab, name: &str) -> Option<Value> {
    let status = lab.run(&["status", name, "--json"]).expect_success().json();
    status.get("hydration").cloned()
}

/// Of its disks.
fn disks_to_come(lab: &Lab, name: &str) -> Option<Value> {
    let status = lab.run(&["status", name, "--json"]).expect_success().json();
    status.get("disks").cloned()
}

pub(crate) fn wait_until_hydrated(lab: &Lab, name: &str) {
    let all = wait_until(TIMEOUT, || hydration(lab, name).is_none());
    assert!(all, "memory has not arrived: {:?}", hydration(lab, name));
    let all = wait_until(TIMEOUT, || disks_to_come(lab, name).is_none());
    assert!(all, "disks have not arrived: {:?}", disks_to_come(lab, name));
}

pub(crate) fn assert_hydrating(lab: &Lab, name: &str) {
    let status = hydration(lab, name).expect("it should be under way");
    let number = |key: &str| status[key].as_u64().expect("a number");
    assert!(number("done_bytes") < number("total_bytes"), "{status}");
}

pub(crate) fn move_away(store: &Path) -> PathBuf {
    let away = store.with_extension("away");
    std::fs::rename(store, &away).expect("a store");
    away
}

#[test]
fn lazy_restored_guest_is_exact_through_checkpoints_a_kill_and_a_store_that_is_away() {
    on_each_qemu(|qemu| {
        let mut lab = Lab::for_vms(qemu, 2);
        let hold = Hold::begin(&mut lab);
        let first = saved_witness(&lab);

        let vm = lab.restore("m", "m", &["--lazy"]);
        assert!(vm.report["memory_bytes_to_come"].as_u64() > Some(0), "{}", vm.report);
        vm.assert_makes_progress();
        assert_hydrating(&lab, "m");
        let during = vm.checkpoint();
        assert_eq!(during.outcome.parent, Some(first.outcome.id), "{:?}", during.outcome);
        assert_hydrating(&lab, "m");

        vm.kill_helper();
        let store = lab.store_directory();
        let away = move_away(&store);
        vm.attach();
        let says_so = wait_until(TIMEOUT, || {
            hydration(&lab, "m").is_some_and(|status| status["store_away"]["since"].is_string())
        });
        assert!(says_so, "{:?}", hydration(&lab, "m"));
        std::fs::rename(&away, &store).expect("a store");
        vm.assert_makes_progress();
        assert_hydrating(&lab, "m");
        let attached = vm.checkpoint();
        assert_eq!(attached.outcome.parent, Some(during.outcome.id), "{:?}", attached.outcome);
        assert_hydrating(&lab, "m");

        hold.release();
        wait_until_hydrated(&lab, "m");
        vm.assert_continues(&first);
        // No helper is needed any more.
        vm.kill_helper();
        vm.assert_all_right(&vm.lines().pop().expect("a line"));
        vm.attach();
        assert_eq!(hydration(&lab, "m"), None);
        let after = vm.checkpoint();
        assert_eq!(after.outcome.parent, Some(attached.outcome.id), "{:?}", after.outcome);
        vm.kill();
        for taken in [&during, &attached, &after] {
            lab.restore(&taken.name, "elsewhere", &[]).assert_continues(taken);
        }
        lab.verify("m");
    });
}

/// What the store has of the packs of all checkpoints.
pub(crate) fn packs(lab: &Lab) -> Vec<PathBuf> {
    let files = files_below(&lab.store_directory()).into_iter();
    files.filter(|file| file.extension().is_some_and(|name| name == "pack")).collect()
}

/// The index is read already: only what the guest still needs is damaged for it.
#[test]
fn lazy_guest_that_needs_a_damaged_page_is_stopped_until_the_store_is_repaired() {
    let mut lab = Lab::new(&newest_qemu());
    let hold = Hold::begin(&mut lab);
    let taken = saved_witness(&lab);
    let vm = lab.restore("m", "m", &["--lazy"]);
    let whole: Vec<(PathBuf, Vec<u8>)> = packs(&lab)
        .into_iter()
        .map(|pack| (pack.clone(), std::fs::read(pack).expect("a pack")))
        .collect();
    assert!(!whole.is_empty());
    for (pack, bytes) in &whole {
        let inverted: Vec<u8> = bytes.iter().map(|byte| !byte).collect();
        std::fs::write(pack, inverted).expect("a pack");
    }
    let says_so = wait_until(TIMEOUT, || {
        hydration(&lab, "m").is_some_and(|status| status["damaged"]["since"].is_string())
    });
    assert!(says_so, "{:?}", hydration(&lab, "m"));
    let message = hydration(&lab, "m").expect("it is under way")["damaged"]["message"].to_string();
    assert!(message.contains("m@1/") && message.contains(".pack"), "no object in {message}");
    for (pack, bytes) in &whole {
        std::fs::write(pack, bytes).expect("a pack");
    }
    // It is read again, and the guest stays stopped: an operator should look at that store.
    assert!(wait_until(TIMEOUT, || !vm.qmp().is_running()), "the guest runs");
    vm.qmp().cont();
    vm.assert_makes_progress();
    hold.release();
    wait_until_hydrated(&lab, "m");
    vm.assert_continues(&taken);
}

/// The next helper looks again and finds that nothing is missing.
#[test]
fn lazy_helper_killed_when_all_has_arrived_leaves_nothing_to_do() {
    for point in ["restore.hydrated", "restore.disks-arrived"] {
        helper_killed_at(point);
    }
}

fn helper_killed_at(point: &str) {
    let mut lab = Lab::new(&newest_qemu());
    lab.set("STILLPOINT_DIE_AT", point.to_owned());
    let hold = Hold::begin(&mut lab);
    let vm = lab.start("m", &Recipe::scribbler(92));
    vm.checkpoint();
    vm.kill();
    let vm = lab.restore("m", "m", &["--lazy"]);
    hold.release();
    assert!(wait_until(TIMEOUT, || vm.helper().is_none()), "the helper lives");
    vm.attach_with(&[], &[("STILLPOINT_DIE_AT", "")]);
    wait_until_hydrated(&lab, "m");
    assert_eq!(vm.checkpoint().outcome.parent, Some(CheckpointId(1)));
    lab.verify("m");
}

/// What a balloon discards would be waited for.
#[test]
fn lazy_is_not_possible_with_a_balloon_and_says_so() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start("m", &Recipe::scribbler(93).arguments(&["-device", "virtio-balloon-pci"]));
    vm.checkpoint();
    vm.kill();
    let vm = lab.restore("m", "m", &["--lazy"]);
    assert_eq!(vm.report["memory_bytes_to_come"], 0, "{}", vm.report);
    assert!(vm.report["notes"].to_string().contains("balloon"), "{}", vm.report);
    assert_eq!(hydration(&lab, "m"), None);
}

/// Also while a thread of it waits for a page.
#[test]
fn lazy_restored_qemu_may_end_before_its_memory_has_arrived() {
    let mut lab = Lab::new(&newest_qemu());
    let _hold = Hold::begin(&mut lab);
    let vm = lab.start("m", &Recipe::scribbler(94));
    vm.checkpoint();
    vm.kill();
    let mut vm = lab.restore("m", "m", &["--lazy"]);
    assert_hydrating(&lab, "m");
    vm.kill_qemu();
    assert!(wait_until(TIMEOUT, || vm.helper().is_none()), "the helper lives on");
    drop(vm);
    lab.verify("m");
    lab.restore("m", "m", &["--lazy"]).checkpoint();
}

fn memory(vm: &TestVm) -> Vec<u8> {
    vm.qmp().memory(SCRIBBLER_RAM_BYTES)
}

/// A copy has no parent: what it would store first is all of its memory.
#[test]
fn lazy_copy_has_the_same_bytes_and_no_checkpoint_before_all_are_here() {
    on_each_qemu(|qemu| {
        let mut lab = Lab::for_vms(qemu, 3);
        let hold = Hold::begin(&mut lab);
        let vm = lab.start("m", &Recipe::scribbler(91));
        vm.checkpoint();
        let eager = lab.restore("m", "eager", &["--paused"]);
        let expected = memory(&eager);
        let lazy = lab.restore("m", "lazy", &["--paused", "--lazy"]);
        let message = lazy.try_checkpoint().expect_failure(3);
        assert!(message.contains("of its memory has arrived"), "{message}");
        assert!(memory(&lazy) == expected, "read page by page, it is another");
        hold.release();
        wait_until_hydrated(&lab, "lazy");
        assert!(memory(&lazy) == expected, "it is another");
        assert_eq!(lazy.checkpoint().outcome.kind, Kind::Full);
        let filled = lab.restore("m", "filled", &["--paused", "--lazy", "--wait"]);
        assert_eq!(hydration(&lab, "filled"), None);
        assert!(memory(&filled) == expected, "it is another");
        lab.verify("lazy");
    });
}

/// Both are qcow2: one on a layer, one whose options say that nothing is below it.
const DISKS: [&str; 2] = ["cow", "alone"];

fn with_two_disks(seed: u32) -> Recipe {
    let file = json!({ "driver": "file", "filename": "alone.qcow2" });
    let node = json!({ "driver": "qcow2", "node-name": "alone", "backing": null, "file": file });
    let node = node.to_string();
    Recipe::scribbler(seed)
        .image(&["create", "-q", "-f", "qcow2", "alone.qcow2", "8M"])
        .arguments(&["-blockdev", &node, "-device", "virtio-blk-pci,drive=alone,share-rw=on"])
}

/// What the disks of a restored VM hold, read through whatever is below their images.
fn disks(qemu: &Path, vm: &TestVm) -> Vec<Vec<u8>> {
    let image = |disk: &str| {
        let name = format!("{disk}.qcow2");
        let files = files_below(&vm.directory);
        let named = |file: &PathBuf| file.to_string_lossy().ends_with(&name);
        files.into_iter().find(named).expect("an image")
    };
    DISKS.map(|disk| read_image(qemu, &image(disk), "qcow2")).into()
}

fn write(
    vm: &TestVm,
    expected: &mut [Vec<u8>],
    disk: usize,
    (at, length, byte): (usize, usize, u8),
) {
    vm.qmp().disk_io(DISKS[disk], &format!("write -P {byte} {at} {length}"));
    if let Some(expected) = expected.get_mut(disk) {
        expected[at..at + length].fill(byte);
    }
}

fn assert_same(found: &[Vec<u8>], expected: &[Vec<u8>], what: &str) {
    for (number, disk) in DISKS.into_iter().enumerate() {
        assert!(found[number] == expected[number], "{what}: {disk} is another");
    }
}

/// Also what the guest writes meanwhile, on both sides of what has not arrived.
#[test]
fn lazy_disks_are_exact_through_checkpoints_and_a_kill_and_then_depend_on_nothing() {
    on_each_qemu(|qemu| {
        let mut lab = Lab::for_vms(qemu, 2);
        let hold = Hold::begin(&mut lab);
        let vm = lab.start("m", &with_two_disks(95));
        for (disk, what) in
            [(0, (1 << 20, 1 << 17, 0x11)), (0, (5 << 20, 4096, 0x22)), (1, (0, 1 << 20, 0x33))]
        {
            write(&vm, &mut [], disk, what);
        }
        vm.qmp().disk_io("cow", "write -z 2M 128k");
        let first = vm.checkpoint();
        vm.kill();
        let mut expected = disks(qemu, &lab.restore("m", "eager", &["--paused"]));

        let vm = lab.restore("m", "m", &["--paused", "--lazy"]);
        let to_come = vm.report["disks_to_come"].as_array().expect("a list");
        assert_eq!(to_come.len(), DISKS.len(), "{}", vm.report);
        assert_same(&disks(qemu, &vm), &expected, "read from the store");
        let mut taken = Vec::new();
        for what in [(5 << 20, 512, 0x44), (9 << 20, 70_000, 0x55)] {
            write(&vm, &mut expected, 0, what);
            let now = vm.checkpoint();
            assert_eq!(now.outcome.kind, Kind::Incremental);
            taken.push((now, expected.clone()));
            assert!(disks_to_come(&lab, "m").is_some(), "they have arrived");
            vm.kill_helper();
            vm.attach();
        }
        assert_eq!(taken[0].0.outcome.parent, Some(first.outcome.id));
        hold.release();
        wait_until_hydrated(&lab, "m");
        let nodes = vm.qmp().execute("query-named-block-nodes", json!({}));
        let nodes = nodes.as_array().expect("a list");
        assert!(nodes.iter().all(|node| node["drv"] != "nbd"), "{nodes:?}");
        write(&vm, &mut expected, 1, (3 << 20, 512, 0x66));
        taken.push((vm.checkpoint(), expected.clone()));
        vm.kill_helper();
        assert_same(&disks(qemu, &vm), &expected, "when all has arrived");
        vm.attach();
        let directory = vm.directory.clone();
        vm.kill();
        let images = files_below(&directory).into_iter();
        for image in images.filter(|file| file.extension().is_some_and(|kind| kind == "qcow2")) {
            qemu_img(qemu, &directory, &["check", "-q", image.to_str().expect("UTF-8")]);
        }
        for (now, expected) in taken {
            let elsewhere = lab.restore(&now.name, "elsewhere", &["--paused"]);
            assert_same(&disks(qemu, &elsewhere), &expected, &now.name);
        }
        lab.verify("m");
    });
}

/// What it has written is in images that are not complete.
#[test]
fn lazy_guest_that_shuts_down_leaves_complete_disks() {
    on_each_qemu(|qemu| {
        let mut lab = Lab::new(qemu);
        let hold = Hold::begin(&mut lab);
        let vm = lab.start("m", &with_two_disks(96).arguments(&["-no-reboot"]));
        write(&vm, &mut [], 0, (1 << 20, 1 << 17, 0x11));
        vm.checkpoint();
        vm.kill();
        let vm = lab.restore("m", "m", &["--lazy"]);
        let mut expected = disks(qemu, &vm);
        write(&vm, &mut expected, 0, (1 << 20, 512, 0x22));
        vm.qmp().execute("system_reset", json!({}));
        let state = || vm.qmp().execute("query-status", json!({}))["status"].clone();
        assert!(wait_until(TIMEOUT, || state() == "shutdown"), "{}", state());
        hold.release();
        assert!(wait_until(TIMEOUT, || !vm.qemu_runs()), "QEMU does not end");
        assert!(wait_until(TIMEOUT, || vm.helper().is_none()), "the helper lives");
        assert_same(&disks(qemu, &vm), &expected, "after the shutdown");
    });
}

/// With all of its memory, and stopped before it has read its disk; nor has its helper, a new one.
fn with_its_disk_to_come<'lab>(lab: &'lab Lab) -> TestVm<'lab> {
    let vm = lab.restore("m", "m", &["--paused", "--lazy"]);
    assert_eq!(vm.report["memory_bytes_to_come"], 0, "{}", vm.report);
    assert_ne!(vm.report["disks_to_come"], json!([]), "{}", vm.report);
    vm.kill_helper();
    vm.attach();
    vm
}

fn wait_until_stopped_by(lab: &Lab, vm: &TestVm, trouble: &str) {
    let state = || vm.qmp().execute("query-status", json!({}))["status"].clone();
    assert!(wait_until(TIMEOUT, || state() == "io-error"), "{}", state());
    let status = disks_to_come(lab, "m").expect("its disk is to come");
    assert!(status[trouble]["since"].is_string(), "{status}");
    vm.assert_no_contradiction();
}

/// The guest gets neither a wrong block nor an error, and QEMU's monitor answers.
#[test]
fn lazy_guest_that_needs_a_block_is_stopped_until_it_can_be_read() {
    on_each_qemu(|qemu| {
        let mut lab = Lab::new(qemu);
        let _hold = Hold::begin(&mut lab);
        let recipe = Recipe::witness("q35-virtio.cfg");
        let vm = lab.start("m", &recipe.arguments(&["-device", "virtio-balloon-pci"]));
        vm.wait_for_witness();
        let taken = vm.checkpoint();
        vm.kill();

        let vm = with_its_disk_to_come(&lab);
        let store = lab.store_directory();
        let away = move_away(&store);
        vm.qmp().cont();
        wait_until_stopped_by(&lab, &vm, "store_away");
        std::fs::rename(&away, &store).expect("a store");
        vm.assert_continues(&taken);
        vm.kill();

        let vm = with_its_disk_to_come(&lab);
        let whole: Vec<(PathBuf, Vec<u8>)> = packs(&lab)
            .into_iter()
            .map(|pack| (pack.clone(), std::fs::read(pack).expect("a pack")))
            .collect();
        for (pack, bytes) in &whole {
            let inverted: Vec<u8> = bytes.iter().map(|byte| !byte).collect();
            std::fs::write(pack, inverted).expect("a pack");
        }
        vm.qmp().cont();
        wait_until_stopped_by(&lab, &vm, "damaged");
        for (pack, bytes) in &whole {
            std::fs::write(pack, bytes).expect("a pack");
        }
        let damaged = || disks_to_come(&lab, "m").expect("to come").get("damaged").cloned();
        assert!(wait_until(TIMEOUT, || damaged().is_none()), "{:?}", damaged());
        assert!(!vm.qmp().is_running(), "an operator should look at that store");
        vm.qmp().cont();
        vm.assert_continues(&taken);
    });
}
