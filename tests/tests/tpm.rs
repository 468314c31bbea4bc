//! A VM with an emulated TPM: its state is the checkpoint's, and a restored VM has it in another
//! `swtpm`.

use checkpoint_format::CheckpointId;
use serde_json::json;
use std::path::Path;
use stillpoint_tests::{
    Lab, Recipe, SoftwareTpm, Tis, newest_qemu, on_each_qemu, wait_for_scribbles,
};

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn recipe(seed: u32, tpm: &SoftwareTpm, device: &str) -> Recipe {
    let arguments = tpm.arguments(device);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let test = ["-qtest", "unix:qtest.sock,server=on,wait=off", "-qtest-log", "none"];
    Recipe::scribbler(seed).arguments(&[&arguments[..], &test].concat())
}

#[test]
fn tpm_state_is_restored_into_another_one() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        for (name, is_managed) in [("m", true), ("p", false)] {
            let first = SoftwareTpm::start(&lab.path().join(format!("tpm-of-{name}")));
            let recipe = recipe(61, &first, "tpm-tis");
            let vm =
                if is_managed { lab.start(name, &recipe) } else { lab.start_plain(name, &recipe) };
            if !is_managed {
                vm.attach_plain(&[]);
            }
            // The firmware has started the TPM up, and uses it no more.
            wait_for_scribbles(&mut vm.qmp());
            let mut tis = Tis::connect(&vm.directory.join("qtest.sock"));
            tis.extend(10, 5);
            vm.checkpoint();
            tis.extend(10, 6);
            let value = tis.pcr(10);
            // The TPM of the original works on after each of them.
            let taken =
                lab.run(&["checkpoint", name, "--verify", "--json"]).expect_success().json();
            assert!(taken["id"] == 2 && taken["proof"]["proven"] == true, "{taken}");
            assert_eq!(tis.pcr(10), value);
            tis.extend(10, 7);
            assert_ne!(tis.pcr(10), value);
            drop(tis);
            vm.kill();
            drop(first);

            let dir = lab.path().join(format!("refused-{name}"));
            let message = lab
                .run(&["restore", "--eager", name, "--qemu", text(qemu), "--dir", text(&dir)])
                .expect_failure(3);
            assert!(message.contains("chardev.path=") && message.contains("--map"), "{message}");
            let second = SoftwareTpm::start(&lab.path().join(format!("second-of-{name}")));
            let old = lab.path().join(format!("tpm-of-{name}/sock"));
            let map = format!("{}={}", old.display(), second.socket.display());
            let restored = lab.restore(name, name, &["--map", &map]);
            let mut tis = Tis::connect(&restored.directory.join("qtest.sock"));
            assert_eq!(tis.pcr(10), value, "{name}: as at the checkpoint");
            tis.extend(10, 8);
            restored.checkpoint();
            tis.extend(10, 9);
        }
    });
}

/// What a proof cannot compare is refused by name; a TPM that answers in a page of memory is
/// proven.
#[test]
fn tpm_of_other_kinds() {
    let lab = Lab::new(&newest_qemu());
    let tpm = SoftwareTpm::start(&lab.path().join("tpm"));
    let vm = lab.start("crb", &recipe(62, &tpm, "tpm-crb"));
    vm.checkpoint();
    lab.run(&["checkpoint", "crb", "--verify"]).expect_success();
    // On a host without swtpm.
    let path = lab.path().join("path");
    std::fs::create_dir(&path).expect("a directory");
    let words = ["verify", "--restore", "crb", "--qemu", text(&lab.qemu)];
    let message = lab.run_with(&words, &[("PATH", text(&path))]).expect_failure(3);
    assert!(message.contains("swtpm"), "{message}");
    vm.kill();
    drop(tpm);

    let old = SoftwareTpm::start_with(&lab.path().join("old"), &[]);
    let vm = lab.start("old", &recipe(63, &old, "tpm-tis"));
    let message = lab.run(&["checkpoint", "old", "--verify"]).expect_failure(3);
    assert!(message.contains("TPM 1.2"), "{message}");
    assert_eq!(lab.list("old"), [1].map(CheckpointId));
    assert_eq!(vm.qmp().execute("query-tpm", json!({}))[0]["model"], "tpm-tis");
}
