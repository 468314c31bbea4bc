//! The command line that a checkpoint saves, and what a restore makes of it.

use checkpoint_format::Manifest;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use stillpoint_tests::{
    Lab, QmpClient, Recipe, TestVm, files_below, newest_qemu, on_each_qemu, qemu_img,
};

fn recipe(words: &str) -> Recipe {
    Recipe::scribbler(5).arguments(&words.split_whitespace().collect::<Vec<_>>())
}

/// Files whose names are words of QEMU's: every value that is spelled like them stays as it is.
#[test]
fn paths_are_recognized_by_their_place_and_not_by_their_spelling() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let mut recipe = recipe(
            "-hdb disk -drive file=on,if=none,id=disk -device virtio-blk-pci,drive=disk,serial=on \
             -drive file=16,if=none,id=none,format=qcow2 -device virtio-blk-pci,drive=none,id=on \
             -drive driver=qcow2,file.driver=file,file.filename=raw,if=none,id=qcow2 -device virtio-blk-pci,drive=qcow2 \
             -drive file=drive2,id=drive7,if=none,format=qcow2 -device virtio-blk-pci,drive=drive7 -debugcon file:none -audiodev none,id=a -device ac97,audiodev=a",
        );
        for name in ["disk", "on", "16", "raw", "drive2"] {
            recipe = recipe.image(&["create", "-q", "-f", "qcow2", name, "4M"]);
        }
        let vm = lab.start("m", &recipe);
        let taken = vm.checkpoint();
        vm.kill();
        let restored = lab.restore(&taken.name, "copy", &[]);
        let line = command_line(&restored);
        for part in [
            "id=disk",
            "serial=on",
            "id=none",
            "format=qcow2",
            "id=on",
            "media=disk",
            "driver=qcow2",
            "-debugcon file:none",
        ] {
            assert!(line.contains(part), "no {part} in {line}");
        }
        for name in ["sp-drive", "sp-disk", "sp-none", "sp-qcow2", "sp-drive7"] {
            assert!(
                line.contains(&format!("{}/{name}", restored.directory.display())),
                "no {name} in {line}"
            );
        }
        assert!(restored.qmp().is_running());
    });
}

fn command_line(vm: &TestVm) -> String {
    let bytes = std::fs::read(format!("/proc/{}/cmdline", vm.qemu())).expect("QEMU runs");
    bytes.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect::<Vec<_>>().join(" ")
}

/// The same devices by attach, and a size that is no whole MiB.
#[test]
fn shorthands_are_known_to_attach() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let vm =
            lab.start_plain("m", &recipe("-debugcon file:debug -audiodev none,id=a -device ac97,audiodev=a -device virtio-rng -m 17.3M"));
        vm.attach_plain(&[]);
        let taken = vm.checkpoint();
        vm.kill();
        assert!(lab.restore(&taken.name, "copy", &[]).qmp().is_running());
    });
}

/// A snapshot is loaded by the first start; what comes back is the checkpoint.
#[test]
fn loadvm_is_for_the_first_start_alone() {
    let lab = Lab::new(&newest_qemu());
    let directory = lab.path().join("disks");
    std::fs::create_dir(&directory).expect("a directory");
    qemu_img(&lab.qemu, &directory, &["create", "-q", "-f", "qcow2", "boot.qcow2", "4M"]);
    let boot = directory.join("boot.qcow2");
    let disk = format!("file={},format=qcow2,if=none,id=boot", boot.display());
    let socket = directory.join("qmp");
    let monitor = format!("unix:{},server=on,wait=off", socket.display());
    let words = [
        "-machine",
        "pc",
        "-m",
        "16",
        "-nodefaults",
        "-accel",
        "tcg",
        "-display",
        "none",
        "-drive",
        &disk,
        "-device",
        "ide-hd,drive=boot",
    ];
    let mut plain = std::process::Command::new(&lab.qemu)
        .args(words)
        .args(["-qmp", &monitor])
        .spawn()
        .expect("QEMU can be run");
    assert!(stillpoint_tests::wait_until(std::time::Duration::from_secs(20), || socket.exists()));
    assert_eq!(QmpClient::connect(&socket).human("savevm old"), "");
    plain.kill().expect("ours");
    plain.wait().expect("ours");
    let qemu = lab.qemu.to_str().expect("UTF-8");
    let words = [
        &["run", "--name", "m", "--", qemu][..],
        &words,
        &["-qmp", &monitor, "-loadvm", "old", "-S"],
    ]
    .concat();
    let mut managed = lab.command(&words).spawn().expect("stillpoint can be run");
    let up = || lab.run(&["checkpoint", "m", "--json"]).code == 0;
    assert!(stillpoint_tests::wait_until(std::time::Duration::from_secs(30), up), "no checkpoint");
    managed.kill().expect("ours");
    managed.wait().expect("ours");
    let restored = lab.restore("m", "copy", &[]);
    assert!(!command_line(&restored).contains("loadvm"));
}

/// A user who can write the store can name a program and a script in a manifest; neither is
/// executed unless the user who restores allows it.
#[test]
fn hostile_manifest_runs_nothing_on_the_restoring_host() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start("m", &recipe(""));
    let taken = vm.checkpoint();
    vm.kill();
    let (program, trace) = spy(lab.path());
    let script = format!("tap,id=n,ifname=spy0,script={},downscript=no", program.display());
    let manifests = files_below(&lab.store_directory())
        .into_iter()
        .filter(|path| path.ends_with("manifest.json"));
    for path in manifests {
        let whole = std::fs::read(&path).expect("the store");
        let mut manifest = Manifest::parse(&whole).expect("a manifest");
        let index = &whole[Manifest::head_len(&whole).expect("a manifest").as_usize()..];
        manifest.vm_record.program = program.display().to_string();
        manifest.vm_record.arguments.extend(["-netdev".to_owned(), script.clone()]);
        let changed = [&manifest.encode().expect("a manifest"), index].concat();
        std::fs::write(&path, changed).expect("the store");
    }
    let target = lab.path().join("new");
    let words = [
        "restore",
        "--eager",
        &taken.name,
        "--as",
        "copy",
        "--dir",
        target.to_str().expect("UTF-8"),
    ];
    let message = lab.run(&words).expect_failure(3);
    assert!(message.contains("--allow 'netdev.script=") && !trace.exists(), "{message}");
    assert!(!target.exists(), "refused before anything is made");
    let wrong = lab.run(&[&words[..], &["--allow", "plugin"]].concat()).expect_failure(3);
    assert!(wrong.contains("plugin") && !trace.exists(), "{wrong}");
    let mapped = format!("{}=no", program.display());
    let restored = lab.restore(&taken.name, "copy", &["--map", &mapped]);
    assert!(command_line(&restored).contains("script=no,downscript=no") && !trace.exists());
}

/// A program that leaves a file where it was run.
fn spy(directory: &Path) -> (PathBuf, PathBuf) {
    let (program, trace) = (directory.join("qemu-system-x86_64"), directory.join("trace"));
    std::fs::write(&program, format!("#!/bin/sh\ntouch {}\n", trace.display()))
        .expect("the test's directory");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))
        .expect("the test's directory");
    (program, trace)
}

/// Sockets and logs of the old host are made in the restored VM's directory, wherever they were.
#[test]
fn restored_vm_writes_only_below_its_directory() {
    let lab = Lab::new(&newest_qemu());
    let outside = lab.path().join("outside");
    std::fs::create_dir(&outside).expect("a directory");
    let at = |name: &str| outside.join(name).display().to_string();
    let words = format!(
        "-debugcon file:{} -chardev socket,id=c,path={},server=on,wait=off -pidfile {}",
        at("log"),
        at("sock"),
        at("pid")
    );
    let vm = lab.start("m", &recipe(&words));
    let taken = vm.checkpoint();
    vm.kill();
    std::fs::remove_dir_all(&outside).expect("a directory");
    let restored = lab.restore(&taken.name, "copy", &[]);
    for name in ["log", "sock", "pid"] {
        assert!(
            restored.directory.join(name).exists(),
            "no {name} in {}",
            restored.directory.display()
        );
    }
    assert!(!outside.exists());
}
