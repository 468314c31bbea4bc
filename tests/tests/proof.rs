//! `verify --restore`: what is right is proven, what is not is found by its place, and nothing is
//! left.

use checkpoint_format::CheckpointId;
use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use stillpoint_tests::{
    Lab, Pid, Ran, Recipe, TestVm, kill_hard, newest_qemu, on_each_qemu, qemus_below, wait_until,
};

const TIMEOUT: Duration = Duration::from_secs(60);

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// `verify --restore` with a cache of its own, so that layers come from the store.
fn prove(lab: &Lab, checkpoint: &str, words: &[&str], damage: &str) -> Ran {
    let cache = lab.path().join("cache-of-the-proof");
    let first = ["verify", "--restore", checkpoint, "--json", "--qemu", text(&lab.qemu)];
    lab.run_with(
        &[&first, words].concat(),
        &[("STILLPOINT_CACHE_DIR", text(&cache)), ("STILLPOINT_DAMAGE", damage)],
    )
}

fn proven(lab: &Lab, checkpoint: &str, words: &[&str]) -> Value {
    let report = prove(lab, checkpoint, words, "").expect_success().json();
    assert!(report["proven"] == true && report["noted"] == true, "{report}");
    assert_eq!(leftovers(lab), Vec::<PathBuf>::new());
    report
}

/// Private directories of proofs.
fn leftovers(lab: &Lab) -> Vec<PathBuf> {
    let entries =
        std::fs::read_dir(lab.path()).expect("the lab").flatten().map(|entry| entry.path());
    entries
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("stillpoint-proof."))
        })
        .collect()
}

/// All kinds of disks, and places of the host that a second QEMU would fight for.
fn recipe(lab: &Lab, seed: u32) -> Recipe {
    let serial = format!("file:{}", text(&lab.path().join("absolute.log")));
    Recipe::scribbler(seed).arguments(&[
        "-vga",
        "std",
        "-device",
        "nec-usb-xhci",
        "-device",
        "usb-tablet",
        "-device",
        "virtio-rng-pci",
        "-serial",
        &serial,
        "-nic",
        "user,model=e1000",
        "-drive",
        "file=base.raw,format=raw,readonly=on,if=none,id=ro",
        "-device",
        "ide-cd,drive=ro",
    ])
}

fn write_disks(vm: &TestVm<'_>, pattern: u8) {
    let mut monitor = vm.qmp();
    monitor.disk_io("cow", &format!("write -P {pattern} 1M 300k"));
    monitor.disk_io("cow", "write -z 4M 64k");
    monitor.disk_io("odd", &format!("write -P {pattern} 3M 512"));
}

#[test]
fn proof_of_each_engine_and_kind_of_disk() {
    on_each_qemu(|qemu| {
        let lab = Lab::for_vms(qemu, 2);
        let managed = lab.start("m", &recipe(&lab, 41));
        let plain = lab.start_plain("p", &recipe(&lab, 42));
        plain.attach_plain(&["--engine", "stream"]);
        for (vm, pattern) in [(&managed, 5), (&plain, 6)] {
            vm.checkpoint();
            write_disks(vm, pattern);
            let last = vm.checkpoint();
            assert!(last.outcome.parent.is_some(), "{:?}", last.outcome);
        }
        // Beside the VM that still runs, whose files and sockets it does not touch.
        let before = std::fs::metadata(lab.path().join("absolute.log"))
            .expect("the serial port's file")
            .modified()
            .expect("a time");
        proven(&lab, "m", &[]);
        assert_eq!(
            std::fs::metadata(lab.path().join("absolute.log")).unwrap().modified().unwrap(),
            before
        );
        assert!(managed.qmp().is_running() && plain.qmp().is_running());
        // On a host that has nothing but the store.
        for vm in [managed, plain] {
            let (name, directory) = (vm.name.clone(), vm.directory.clone());
            vm.kill();
            std::fs::rename(&directory, directory.with_extension("gone")).expect("the lab");
            proven(&lab, &format!("{name}@1"), &[]);
            let report = proven(&lab, &name, &["--run", "1s"]);
            assert!(report["ran"]["trouble"].as_array().is_some_and(Vec::is_empty), "{report}");
            let shown = lab.run(&["show", &name, "--json"]).expect_success().json();
            assert_eq!(shown["proofs"][0]["qemu_version"], report["qemu_version"], "{shown}");
        }
    });
}

/// A difference of `space` that covers `at`.
fn assert_found(ran: Ran, space: &str, at: Option<u64>) {
    assert_eq!(ran.code, 5, "{ran:?}");
    let report = ran.json();
    let differences = report["differences"].as_array().expect("a list");
    let [one] = differences.as_slice() else { panic!("one difference was expected: {report}") };
    assert!(one["space"].as_str().is_some_and(|found| found.starts_with(space)), "{report}");
    let covers = |range: &Value, at: u64| {
        range["start"].as_u64().is_some_and(|start| start <= at) && range["end"].as_u64() > Some(at)
    };
    assert!(
        at.is_none_or(|at| one["ranges"]
            .as_array()
            .is_some_and(|ranges| ranges.iter().any(|range| covers(range, at)))),
        "{report}"
    );
    assert!(report["proven"] == false && report["noted"] == false, "{report}");
}

#[test]
fn proof_finds_each_difference_by_its_place() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start("m", &recipe(&lab, 43));
    write_disks(&vm, 7);
    vm.checkpoint();
    let directory = vm.directory.clone();
    vm.kill();
    std::fs::rename(&directory, directory.with_extension("gone")).expect("the lab");
    let damaged = |damage: &str| prove(&lab, "m", &[], damage);
    assert_found(damaged("memory=1191936"), "ram:pc.ram", Some(1_191_936));
    assert_found(damaged("monitor=qemu-io odd \"write -P 9 4096 512\""), "disk:sp-odd", Some(4096));
    // The end of the disk, which is no whole page; and what only the layer below has.
    assert_found(
        damaged("monitor=qemu-io odd \"write -P 9 3M 512\""),
        "disk:sp-odd",
        Some(3 << 20),
    );
    assert_found(
        damaged("monitor=qemu-io cow \"write -P 9 12M 512\""),
        "disk:sp-cow",
        Some(12 << 20),
    );
    // The timer's gate and the speaker's switch; and a byte of the CMOS that is no clock.
    assert_found(damaged("monitor=o /b 0x70 0x20"), "state:device/mc146818rtc", None);
    assert_found(damaged("layer=300000"), "layer:", Some(300_000));
    // A damaged copy in the cache is not believed the next time.
    proven(&lab, "m", &[]);
    // A proof that cannot be noted is one.
    let notes = lab.store_directory().join("vms/m/proofs");
    std::fs::remove_dir_all(&notes).expect("the notes");
    std::fs::write(&notes, "").expect("the store");
    let ran = prove(&lab, "m", &[], "").expect_success();
    assert!(ran.json()["noted"] == false && ran.err.contains("could not be noted"), "{ran:?}");
    lab.run(&["show", "m"]).expect_success();
}

#[test]
fn proof_after_a_checkpoint_on_request() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start("m", &Recipe::scribbler(44));
    let ran = lab.run(&["checkpoint", "m", "--verify", "--json"]).expect_success().json();
    assert!(ran["id"] == 1 && ran["proof"]["proven"] == true, "{ran}");
    assert!(vm.qmp().is_running());
    // Not proven is not a success, but the checkpoint is there.
    let ran = lab.run_with(
        &["checkpoint", "m", "--verify", "--json"],
        &[("STILLPOINT_DAMAGE", "memory=1191936")],
    );
    assert!(ran.code == 5 && ran.json()["id"] == 2, "{ran:?}");
    assert_eq!(lab.list("m"), [1, 2].map(CheckpointId));
}

#[test]
fn proof_that_is_ended_leaves_nothing() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start("m", &Recipe::scribbler(45));
    vm.checkpoint();
    vm.kill();
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let mut command =
            lab.command(&["verify", "--restore", "m", "--run", "1h", "--qemu", text(&lab.qemu)]);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("stillpoint");
        let up = wait_until(TIMEOUT, || !qemus_below(lab.path()).is_empty());
        let sandboxed = qemus_below(lab.path());
        kill(Pid::from_raw(child.id().cast_signed()), signal).expect("a child");
        let status = child.wait().expect("a child");
        assert!(up && !status.success());
        assert!(
            wait_until(TIMEOUT, || qemus_below(lab.path()).is_empty()),
            "a QEMU outlives its proof"
        );
        sandboxed.into_iter().for_each(kill_hard);
        assert_eq!(leftovers(&lab).len(), usize::from(signal == Signal::SIGKILL));
    }
    // The next one clears away what a killed one could not.
    proven(&lab, "m", &[]);
}
