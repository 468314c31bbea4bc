//! What cannot be checkpointed is refused before a guest runs, and every refusal says what to do
//! instead.

use checkpoint_format::CheckpointId;
use engine::checkpoint::outcome::Kind;
use std::path::Path;
use stillpoint_tests::{Lab, QmpClient, Recipe, newest_qemu, on_each_qemu, wait_until};

/// A command line, the word of it that the message must name, and a word of the remedy.
const REFUSED: &[(&str, &str, &str)] = &[
    (
        "-m 64 -object memory-backend-ram,id=r,size=64M -machine pc,memory-backend=r",
        "memory-backend",
        "leave it out",
    ),
    (
        "-m 64 -object memory-backend-memfd,id=r,size=64M -numa node,memdev=r",
        "memory-backend",
        "leave it out",
    ),
    ("-m 64 -numa node,memdev=r", "-numa memdev", "leave -numa out"),
    ("-m 64 -mem-path /dev/shm", "mem-path", "leave it out"),
    (
        "-chardev null,id=c -device vhost-user-blk-pci,chardev=c",
        "vhost-user-blk-pci",
        "use the virtio device",
    ),
    (
        "-chardev null,id=c -netdev vhost-user,id=n,chardev=c",
        "vhost-user",
        "use tap, user or bridge",
    ),
    ("-device vfio-pci,host=00:01.0", "vfio-pci", "use an emulated"),
    ("-device virtio-balloon-pci,free-page-hint=on", "free-page-hint", "leave free-page-hint out"),
    ("-device virtio-mem-pci,memdev=m", "virtio-mem", "by -m"),
    ("-device ivshmem-doorbell,chardev=c", "ivshmem", "use"),
    ("-incoming defer", "incoming", "stillpoint restore"),
    ("-snapshot", "snapshot", "qemu-img create"),
    ("-drive file=boot.raw,format=raw,snapshot=on", "snapshot=on", "qemu-img create"),
    ("-machine none", "none", "name another"),
    ("-global migration.send-configuration=off", "migration.send-configuration", "leave it out"),
    ("-device nvme,serial=x", "nvme", "use another device"),
    ("-device usb-mtp", "usb-mtp", "use another device"),
    (
        "-drive file=a,format=raw,if=none,id=d -set drive.d.snapshot=on",
        "snapshot=on",
        "qemu-img create",
    ),
    ("-drive file=a,format=raw,offset=512", "offset=512", "copy that part"),
    ("-blockdev quorum,node-name=q,children.0=a,children.1=b", "quorum", "convert it"),
    ("-hda nbd:localhost:1", "nbd", "convert it"),
    ("-device e1000,newfile=/x", "newfile", "leave it out"),
    ("-newoption x", "newoption", "leave it out"),
    ("-netdev tap,id=n,fd=3", "fd", "name the file"),
    ("-readconfig missing.cfg", "missing.cfg", "No such file"),
];

/// What no QEMU of this host takes: a command line, the word of it that the message must name, and
/// a word of what is wrong.
const WRONG: &[(&str, &str, &str)] = &[
    ("-m lots", "lots", "suffix"),
    ("-m", "-m", "value"),
    ("-drive", "-drive", "value"),
    ("--", "--", "option name"),
    ("-machine nonsense", "nonsense", "-machine help"),
];

fn refuse(lab: &Lab, words: &[&str]) -> String {
    let ran = lab.run(words);
    assert!(ran.code == 1 || ran.code == 3, "{words:?} ended with {}: {}", ran.code, ran.err);
    ran.err
}

#[test]
fn what_cannot_be_checkpointed_is_refused_with_a_remedy() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let qemu = qemu.to_str().expect("UTF-8");
        for (line, named, remedy) in REFUSED {
            let words: Vec<&str> = ["run", "--name", "m", "--", qemu, "-display", "none"]
                .into_iter()
                .chain(line.split(' '))
                .collect();
            let message = refuse(&lab, &words);
            assert!(message.contains(named), "{line}: '{named}' is not named in: {message}");
            assert!(message.contains(remedy), "{line}: no '{remedy}' in: {message}");
        }
        for (line, named, wrong) in WRONG {
            let words: Vec<&str> =
                ["run", "--name", "m", "--", qemu].into_iter().chain(line.split(' ')).collect();
            let message = lab.run(&words).expect_failure(2);
            assert!(message.contains(named) && message.contains(wrong), "{line}: {message}");
        }
        assert!(!lab.runtime().join("m").exists(), "a refused VM leaves nothing behind");
        assert!(!lab.store_directory().exists(), "a refused VM makes no store");
    });
}

#[test]
fn bad_names_are_refused() {
    let lab = Lab::new(&newest_qemu());
    let long = "x".repeat(65);
    for name in ["", "../m", "a/b", "-m", ".hidden", "a b", "m\n", &long] {
        let ran = lab.run(&["run", &format!("--name={name}"), "--", "qemu-system-x86_64"]);
        assert_eq!(ran.code, 2, "{name:?}: {}", ran.err);
    }
    for checkpoint in ["m@", "m@x", "m@-1", "@1", "m@99999999999999999999"] {
        assert_eq!(lab.run(&["restore", checkpoint]).code, 2, "{checkpoint}");
    }
    refuse(&lab, &["run", "--name", "m", "--", "no-such-qemu"]);
    for program in ["/bin/true", "/bin/false", "/bin/cat", "/etc/passwd"] {
        let message = lab.run(&["run", "--name", "m", "--", program]).expect_failure(3);
        assert!(
            message.contains(program) && message.contains("QEMU") && !message.contains(": :"),
            "{message}"
        );
    }
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    let lab = Lab::new(&newest_qemu());
    std::fs::create_dir_all(lab.store_directory().join("vms")).expect("the test's directory");
    std::fs::write(lab.store_directory().join("store.json"), STORE).expect("the test's directory");
    for words in [
        &["ls"][..],
        &["ls", "--json"],
        &["doctor"],
        &["doctor", "--json"],
        &["--help"],
        &["--version"],
    ] {
        let full =
            std::fs::OpenOptions::new().write(true).open("/dev/full").expect("every Linux has it");
        let ran = lab.command(words).stdout(full).output().expect("stillpoint can be run");
        let message = String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.code() == Some(1) && message.contains("stdout"), "{words:?}: {message}");
        // A reader that has read enough is no failure.
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let ran = lab.command(words).stdout(writer).output().expect("stillpoint can be run");
        assert!(ran.status.success() && ran.stderr.is_empty(), "{words:?}: {ran:?}");
    }
}

/// The note that makes a directory a store.
const STORE: &str = r#"{"format": "stillpoint-store", "version": 1, "id": "x"}"#;
const RUN: &[&str] = &["run", "--name", "m", "--", "qemu-system-x86_64"];
const ATTACH: &[&str] = &["attach", "m", "--qmp", "nothing.sock"];

#[test]
fn a_store_that_cannot_be_named_or_is_not_there_is_said_so() {
    let mut lab = Lab::new(&newest_qemu());
    let ran = lab.run(&["ls"]);
    assert!([1, 3, 4].contains(&ran.code) && ran.err.contains("store"), "{ran:?}");
    assert!(!lab.store_directory().exists(), "looking at a store makes none");
    std::fs::create_dir_all(lab.path().join("foreign/thing")).expect("the test's directory");
    for url in [
        "ftp://x/y",
        "relative",
        "",
        "file:",
        "file://",
        "file://host/x",
        "hdfs://",
        "hdfs:x",
        "://",
        "hdfs://h:1/a/../b",
    ] {
        lab.set("STILLPOINT_STORE", url.to_owned());
        for words in [
            &["ls"][..],
            &["restore", "m"],
            &["verify", "m"],
            &["verify", "m", "--restore"],
            &["show", "m"],
            RUN,
            ATTACH,
        ] {
            let message = lab.run(words).expect_failure(2);
            assert!(
                message.contains(url) && message.contains("hdfs://namenode:port/directory"),
                "{url} {words:?}: {message}"
            );
        }
    }
    for (url, named) in [
        ("hdfs://127.0.0.1:1/x", "127.0.0.1:1"),
        (&format!("file://{}", lab.path().join("foreign").display()), "foreign"),
        ("file:///proc/nowhere", "nowhere"),
    ] {
        lab.set("STILLPOINT_STORE", url.to_owned());
        for words in [&["ls"][..], &["restore", "m"], &["verify", "m"], &["show", "m"]] {
            let ran = lab.run(words);
            assert!([1, 3, 4].contains(&ran.code), "{url} {words:?}: {ran:?}");
            assert!(ran.err.contains(named), "{url} {words:?}: {}", ran.err);
        }
    }
}

#[test]
fn ls_of_a_name_without_a_checkpoint_fails() {
    let lab = Lab::new(&newest_qemu());
    let store = lab.store_directory();
    std::fs::create_dir_all(store.join("vms/claimed/writers")).expect("the test's directory");
    std::fs::create_dir_all(store.join("vms/claimed/checkpoints")).expect("the test's directory");
    std::fs::write(store.join("vms/claimed/writers/1"), "{}").expect("the test's directory");
    std::fs::write(store.join("store.json"), STORE).expect("the test's directory");
    for name in ["nosuch", "claimed"] {
        for words in
            [&["ls", name][..], &["ls", name, "--json"], &["show", name], &["verify", name]]
        {
            let message = lab.run(words).expect_failure(1);
            assert!(
                message.contains(name) && message.contains("no checkpoint"),
                "{words:?}: {message}"
            );
        }
    }
    let listed = lab.run(&["ls", "--json"]).expect_success().json();
    assert_eq!(listed["machines"], serde_json::json!([]));
    assert_eq!(listed["without_checkpoints"], serde_json::json!(["claimed"]));
    assert!(lab.run(&["ls"]).expect_success().out.contains("without a checkpoint: claimed"));
}

#[test]
fn commands_for_a_vm_that_does_not_run_say_so() {
    let lab = Lab::new(&newest_qemu());
    for words in [&["checkpoint", "no-such-vm"][..], &["attach", "no-such-vm"]] {
        let message = refuse(&lab, words);
        assert!(
            message.contains("no-such-vm") && message.contains("stillpoint"),
            "{words:?}: {message}"
        );
    }
}

#[test]
fn a_running_vm_keeps_its_name_and_a_dead_one_gives_it_back() {
    let lab = Lab::new(&newest_qemu());
    let recipe = Recipe::scribbler(1);
    let vm = lab.start("m", &recipe);
    let words = recipe.command_line(&lab.qemu);
    let again: Vec<&str> =
        ["run", "--name", "m", "--"].into_iter().chain(words.iter().map(String::as_str)).collect();
    let message = refuse(&lab, &again);
    assert!(message.contains("running") && message.contains("another name"), "{message}");
    vm.checkpoint();
    let message = refuse(&lab, &["restore", "m", "--qemu", lab.qemu.to_str().expect("UTF-8")]);
    assert!(message.contains("running"), "{message}");
    vm.kill();
    let vm = lab.start("m", &recipe);
    let outcome = vm.checkpoint().outcome;
    assert_eq!(
        (outcome.kind, outcome.id),
        (Kind::Full, CheckpointId(2)),
        "another life of the same name is another lineage"
    );
    lab.verify("m");
}

/// The launcher stands where QEMU stood: same process, same exit status, and the user's own options
/// all there.
#[test]
fn the_launcher_becomes_qemu() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start("m", &Recipe::scribbler(1).arguments(&["-name", "hello"]));
    let mut monitor = vm.qmp();
    assert_eq!(name_of(&mut monitor), "hello");
    vm.checkpoint();
    monitor.execute("quit", serde_json::json!({}));
    assert!(wait_until(std::time::Duration::from_secs(10), || !vm.qemu_runs()));
    assert!(
        wait_until(std::time::Duration::from_secs(10), || vm.helper().is_none()),
        "the helper ends with QEMU"
    );
    let control = lab.runtime().join("m/control.sock");
    assert!(!Path::new(&control).exists(), "the helper removes its socket");
}

fn name_of(monitor: &mut QmpClient) -> String {
    monitor.execute("query-name", serde_json::json!({}))["name"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}
