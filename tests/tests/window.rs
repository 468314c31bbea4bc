//! What changes between the checks of a checkpoint and its pause, or within the pause: no such
//! checkpoint becomes durable.

use checkpoint_format::CheckpointId;
use engine::checkpoint::outcome::Kind;
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use stillpoint_tests::{
    Lab, QmpClient, Ran, Random, Recipe, Scribbled, TestVm, kill_hard, newest_qemu, on_each_qemu,
    wait_until,
};

const TIMEOUT: Duration = Duration::from_secs(60);
/// Takes a second or more to store as a layer.
const LAYER_BYTES: usize = 24 << 20;

/// A read-only disk whose content changes before each checkpoint, so that each stores a layer while
/// the guest runs.
struct Layer(PathBuf, Random);

impl Layer {
    fn new(lab: &Lab) -> Self {
        let mut layer = Self(lab.path().join("layer.raw"), Random::new(7));
        File::create(&layer.0).expect("the test's directory");
        layer.renew();
        layer
    }

    fn renew(&mut self) {
        let content: Vec<u8> =
            (0..LAYER_BYTES / 8).flat_map(|_| self.1.below(u64::MAX).to_le_bytes()).collect();
        let file = File::options().write(true).open(&self.0).expect("the test's directory");
        file.write_all_at(&content, 0).expect("the test's directory");
    }

    fn recipe(&self, seed: u32) -> Recipe {
        let drive = format!("file={},format=raw,if=none,id=layer,readonly=on", self.0.display());
        let cd =
            format!("file={},format=raw,if=none,id=cd,media=cdrom,readonly=on", self.0.display());
        Recipe::scribbler(seed).arguments(&[
            "-drive",
            &drive,
            "-device",
            "virtio-blk-pci,drive=layer",
            "-device",
            "nec-usb-xhci,id=usb",
            "-drive",
            &cd,
            "-device",
            "ide-cd,drive=cd,id=cd0,bus=ide.1",
        ])
    }
}

fn is_storing_a_layer(lab: &Lab) -> bool {
    let entries =
        std::fs::read_dir(lab.store_directory().join("layers")).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_string_lossy().ends_with(".partial"))
}

/// Takes a checkpoint, and does something to the VM after its checks.
fn checkpoint_while(lab: &Lab, vm: &TestVm, layer: &mut Layer, change: impl FnOnce()) -> Ran {
    layer.renew();
    std::thread::scope(|scope| {
        let checkpoint = scope.spawn(|| vm.try_checkpoint());
        assert!(wait_until(TIMEOUT, || is_storing_a_layer(lab)), "no layer is stored");
        change();
        checkpoint.join().expect("it says above why not")
    })
}

fn plug(monitor: &mut QmpClient) {
    monitor.execute("device_add", json!({ "driver": "usb-tablet", "id": "late", "bus": "usb.0" }));
}

/// QEMU tells of it a little after the device is gone.
fn unplug(monitor: &mut QmpClient) {
    monitor.events();
    monitor.execute("device_del", json!({ "id": "late" }));
    let told = |monitor: &mut QmpClient| {
        monitor.events().iter().any(|event| event["event"] == "DEVICE_DELETED")
    };
    assert!(wait_until(TIMEOUT, || told(monitor)), "it stays plugged in");
}

#[test]
fn window_with_a_change_makes_no_checkpoint() {
    let lab = Lab::new(&newest_qemu());
    let mut layer = Layer::new(&lab);
    let vm = lab.start("m", &layer.recipe(71));
    let mut monitor = vm.qmp();
    let known = |lab: &Lab| lab.list_if_any("m");
    let given_up = |monitor: &mut QmpClient,
                    layer: &mut Layer,
                    named: &str,
                    change: &dyn Fn(&mut QmpClient)| {
        let before = known(&lab);
        let ran = checkpoint_while(&lab, &vm, layer, || change(monitor));
        // Refused, where the VM is one now that no checkpoint can have.
        let code = if ran.code == 3 { 3 } else { 1 };
        let message = ran.expect_failure(code);
        assert!(message.contains(named), "no '{named}' in {message}");
        assert_eq!(known(&lab), before, "{named}");
        assert!(monitor.is_running());
    };
    given_up(&mut monitor, &mut layer, "late", &|monitor| {
        plug(monitor);
        unplug(monitor);
    });
    given_up(&mut monitor, &mut layer, "late (usb-tablet)", &plug);
    assert!(vm.try_checkpoint().expect_failure(3).contains("late"), "the next one refuses it");
    unplug(&mut monitor);
    assert_eq!(vm.checkpoint().outcome.kind, Kind::Full);
    given_up(&mut monitor, &mut layer, "odd", &|monitor| {
        drop(monitor.execute("block_resize", json!({ "device": "odd", "size": 4 << 20 })))
    });
    assert_eq!(vm.checkpoint().outcome.parent, Some(CheckpointId(1)));
    given_up(&mut monitor, &mut layer, "cd", &|monitor| {
        drop(monitor.execute("eject", json!({ "id": "cd0", "force": true })))
    });
    let file = vm.directory.join("moved.qcow2");
    let snapshot = json!({ "device": "odd", "snapshot-file": file, "format": "qcow2" });
    given_up(&mut monitor, &mut layer, "moved.qcow2", &|monitor| {
        drop(monitor.execute("blockdev-snapshot-sync", snapshot.clone()))
    });
    lab.verify("m");
}

#[test]
fn window_of_a_stream_with_a_change_makes_no_checkpoint() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let mut layer = Layer::new(&lab);
        let vm = lab.start_plain("m", &layer.recipe(72));
        vm.attach_plain(&[]);
        let mut monitor = vm.qmp();
        let message =
            checkpoint_while(&lab, &vm, &mut layer, || plug(&mut monitor)).expect_failure(1);
        assert!(
            message.contains("late (usb-tablet)") || message.contains("RAM block"),
            "{message}"
        );
        assert_eq!(lab.list_if_any("m"), [] as [CheckpointId; 0]);
        unplug(&mut monitor);
        vm.checkpoint();
    });
}

/// Another monitor's `cont` in a pause and in the brief stops before it: whatever becomes durable
/// is of one point in time, and a guest that its owner stopped stays stopped.
#[test]
fn pause_that_another_monitor_ends_makes_no_checkpoint() {
    let lab = Lab::for_vms(&newest_qemu(), 2);
    let mut scribbled = Scribbled::new(&lab, lab.start("m", &Recipe::scribbler(73)), 73);
    scribbled.vm.checkpoint();
    let (mut failed, mut taken) = (0, 0);
    let end = Instant::now() + Duration::from_secs(20);
    while (failed == 0 || taken == 0) && Instant::now() < end {
        let ran = std::thread::scope(|scope| {
            let vm = &scribbled.vm;
            let checkpoint = scope.spawn(|| vm.try_checkpoint());
            while !checkpoint.is_finished() {
                scribbled.monitor.cont();
            }
            checkpoint.join().expect("it says above why not")
        });
        assert!(scribbled.monitor.is_running());
        match ran.code {
            0 => taken += 1,
            _ => {
                assert!(ran.err.contains("cont") || ran.err.contains("written"), "{}", ran.err);
                failed += 1;
            }
        }
        let quiet: Value = scribbled.vm.try_checkpoint().expect_success().json();
        assert_eq!(quiet["run_state"], "running");
        taken += 1;
    }
    assert!(failed > 0, "no pause was met");
    scribbled.write_disks();
    let outcome = scribbled.checkpoint();
    scribbled.check(|_| vec![outcome.id]);
}

/// Whatever the helper notices first, the message says that QEMU has ended.
#[test]
fn window_in_which_qemu_is_killed_names_that() {
    let lab = Lab::new(&newest_qemu());
    let mut layer = Layer::new(&lab);
    let mut vm = lab.start("m", &layer.recipe(74));
    layer.renew();
    let qemu = vm.qemus()[0];
    let message = std::thread::scope(|scope| {
        let checkpoint = scope.spawn(|| vm.try_checkpoint());
        assert!(wait_until(TIMEOUT, || is_storing_a_layer(&lab)), "no layer is stored");
        kill_hard(qemu);
        checkpoint.join().expect("it says above why not").expect_failure(1)
    });
    vm.kill_qemu();
    assert!(
        message.contains("QEMU") && message.contains("ended") && message.contains("restore"),
        "{message}"
    );
    assert!(
        !message.contains("early eof") && !message.contains("failed to open module"),
        "{message}"
    );
}
