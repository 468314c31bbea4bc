//! A restore harms neither the original, nor another VM, nor the host; and one that fails leaves
//! everything as it was.

use checkpoint_format::CheckpointId;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use serde_json::json;
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use stillpoint_tests::{
    Lab, Pid, QmpClient, Ran, Recipe, SCRIBBLER_RAM_BYTES, TestVm, assert_root, newest_qemu,
    on_each_qemu, wait_until,
};

const GENERATION: &str = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87";

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Every path with its inode, but logs and caches that the original writes meanwhile.
fn tree(lab: &Lab) -> BTreeMap<PathBuf, u64> {
    fn walk(path: &Path, found: &mut BTreeMap<PathBuf, u64>) {
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            let path = entry.path();
            found.insert(path.clone(), path.symlink_metadata().map_or(0, |facts| facts.ino()));
            if path.is_dir() && !path.is_symlink() {
                walk(&path, found);
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(lab.path(), &mut found);
    found
}

fn generation(monitor: &mut QmpClient) -> String {
    monitor.execute("query-vm-generation-id", json!({}))["guid"]
        .as_str()
        .expect("a generation id")
        .to_owned()
}

/// A generation id as the guest finds it: the first three numbers are little-endian.
fn in_memory(id: &str) -> Vec<u8> {
    let digits: String = id.chars().filter(|letter| *letter != '-').collect();
    let byte =
        |at: usize| u8::from_str_radix(&digits[at * 2..at * 2 + 2], 16).expect("hexadecimal");
    [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15].into_iter().map(byte).collect()
}

fn has(vm: &TestVm, bytes: &[u8]) -> bool {
    vm.qmp().memory(SCRIBBLER_RAM_BYTES).windows(bytes.len()).any(|part| part == bytes)
}

fn restore(lab: &Lab, dir: &Path, more: &[&str]) -> Ran {
    lab.run(
        &[&["restore", "--eager", "o", "--qemu", text(&lab.qemu), "--dir", text(dir)], more]
            .concat(),
    )
}

/// What a message proposes; the rule has no `=`.
fn proposed(message: &str) -> String {
    let map = message.split_once("--map ").unwrap_or_else(|| panic!("no --map in {message}")).1;
    map.split([' ', ';', '\n']).next().expect("a word").to_owned()
}

#[test]
fn copy_beside_its_original_takes_nothing_from_it() {
    on_each_qemu(|qemu| {
        let lab = Lab::for_vms(qemu, 2);
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|free| free.local_addr())
            .expect("a port")
            .port();
        let own = |name: &str| lab.path().join(name);
        let [monitor, display, log] = ["own.qmp", "own.vnc", "own.log"].map(own);
        let arguments = [
            "-qmp".to_owned(),
            format!("unix:{},server=on,wait=off", monitor.display()),
            "-vnc".to_owned(),
            format!("unix:{}", display.display()),
            "-chardev".to_owned(),
            format!("file,id=log,path={}", log.display()),
            "-device".to_owned(),
            "isa-serial,chardev=log,index=1".to_owned(),
            "-netdev".to_owned(),
            format!("user,id=n,hostfwd=tcp:127.0.0.1:{port}-:22"),
            "-device".to_owned(),
            "e1000,netdev=n".to_owned(),
            "-device".to_owned(),
            format!("vmgenid,guid={GENERATION}"),
        ];
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let original = lab.start("o", &Recipe::scribbler(40).arguments(&arguments));
        let id = in_memory(GENERATION);
        let up = wait_until(Duration::from_secs(60), || has(&original, &id));
        assert!(up, "the firmware has not put the generation id into memory");
        original.checkpoint();
        std::fs::write(&log, "the original's").expect("a file");
        let (dir, before) = (own("a/copy"), tree(&lab));
        let unchanged = |what: &str| {
            assert_eq!(tree(&lab), before, "{what} has left something, or taken it away")
        };

        let message =
            restore(&lab, &dir, &["--as", "copy", "--map", "nothing=x"]).expect_failure(3);
        assert!(message.contains(&format!("tcp:127.0.0.1:{port}-:22")), "{message}");
        let message = restore(&lab, &dir, &["--as", "copy"]).expect_failure(3);
        unchanged("a port that is taken");
        let map = proposed(&message);
        // Its own name runs, and is held.
        restore(&lab, &dir, &["--map", &map]).expect_failure(3);
        unchanged("a VM that runs");
        std::fs::create_dir_all(&dir).expect("a directory");
        std::fs::write(dir.join("own.log"), "theirs").expect("a file");
        let message = restore(&lab, &dir, &["--as", "copy", "--map", &map]).expect_failure(3);
        assert!(message.contains("own.log"), "{message}");
        assert_eq!(std::fs::read(dir.join("own.log")).expect("a file"), b"theirs");
        std::fs::remove_dir_all(own("a")).expect("a directory");
        unchanged("a file that exists");

        let copy = lab.restore("o", "copy", &["--map", &map]);
        let mut of_copy = QmpClient::connect(&copy.directory.join("own.qmp"));
        assert_eq!(
            generation(&mut QmpClient::connect(&monitor)),
            GENERATION,
            "the original's monitor leads to it"
        );
        let new = generation(&mut of_copy);
        assert_ne!(new, GENERATION, "the copy's guest can tell that it is one");
        assert!(
            has(&copy, &in_memory(&new)) && !has(&copy, &id) && has(&original, &id),
            "where the guest looks"
        );
        assert_eq!(std::fs::read(&log).expect("a file"), b"the original's");
        let now = tree(&lab);
        let lost = before
            .iter()
            .find(|(path, inode)| now.get(*path) != Some(*inode) && !path.starts_with(own("run")));
        assert_eq!(lost, None, "the original's");
        for name in ["own.vnc", "own.log"] {
            assert!(copy.directory.join(name).exists(), "{name} is the copy's");
        }
        lab.run(&["checkpoint", "copy"]).expect_success();
        original.checkpoint();
        copy.kill();
        let message =
            restore(&lab, &own("again"), &["--as", "copy", "--map", &map]).expect_failure(3);
        assert!(message.contains("another name"), "{message}");
    });
}

/// Of VM `name`: its disks and memory, while its guest is stopped, as its original was.
fn bytes_of(lab: &Lab, directory: &Path) -> Vec<u8> {
    let mut monitor = QmpClient::connect(&directory.join("extra.sock"));
    assert!(!monitor.is_running(), "{}", lab.path().display());
    monitor.memory(SCRIBBLER_RAM_BYTES)
}

/// One command restores several VMs; one that cannot be restored leaves the others.
#[test]
fn copies_of_one_checkpoint_are_made_by_one_command() {
    on_each_qemu(|qemu| {
        let lab = Lab::for_vms(qemu, 4);
        let original = lab.start("o", &Recipe::scribbler(46));
        original.checkpoint();
        original.kill();
        let dir = lab.path().join("copies");
        // In the way of the second.
        std::fs::create_dir_all(dir.join("o-2")).expect("a directory");
        std::fs::write(dir.join("o-2/sp-odd.raw"), "theirs").expect("a file");
        let ran = restore(&lab, &dir, &["--copies", "3", "--paused", "--wait", "--json"]);
        assert_eq!(ran.code, 3, "{ran:?}");
        let json: serde_json::Value = serde_json::from_str(&ran.out).expect("JSON");
        let names = |list: &str| -> Vec<String> {
            let rows = json[list].as_array().expect("a list").iter();
            rows.map(|row| row["name"].as_str().expect("a name").to_owned()).collect()
        };
        assert_eq!(
            (names("restored"), names("failed")),
            (vec!["o-1".into(), "o-3".into()], vec!["o-2".into()])
        );
        assert_eq!(json["failed"][0]["exit_code"], 3);
        assert!(ran.err.contains("1 of 3") && ran.err.contains("o-2: "), "{}", ran.err);
        assert_eq!(std::fs::read(dir.join("o-2/sp-odd.raw")).expect("a file"), b"theirs");
        // Each is a VM of its own, with all of the original's memory.
        let memory = bytes_of(&lab, &dir.join("o-1"));
        assert!(memory == bytes_of(&lab, &dir.join("o-3")), "the copies differ");
        for name in ["o-1", "o-3"] {
            lab.run(&["status", name]).expect_success();
            lab.run(&["checkpoint", name]).expect_success();
            assert_eq!(lab.list(name), [CheckpointId(1)]);
        }
        // What is left of it, under names that are given, while those run.
        let ran = restore(
            &lab,
            &lab.path().join("more"),
            &["--as", "a", "--as", "o-1", "--run", "--wait"],
        );
        assert_eq!(ran.code, 3, "{ran:?}");
        assert!(ran.out.contains("a runs") && ran.err.contains("o-1: "), "{ran:?}");
        lab.run(&["checkpoint", "a"]).expect_success();
    });
}

/// A program of the operator's.
fn program(lab: &Lab, name: &str, words: &str) -> PathBuf {
    let path = lab.path().join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{words}\n")).expect("a file");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("a file");
    path
}

/// A hook after the restore can ask the VM's helper; and the agent's port of a guest without an
/// agent is not waited for.
#[test]
fn hooks_of_a_restore_are_run_around_it() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let agent = [
            "-device",
            "virtio-serial-pci",
            "-chardev",
            "socket,id=qga0,path=vm.qga,server=on,wait=off",
            "-device",
            "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
        ];
        let original = lab.start("o", &Recipe::scribbler(47).arguments(&agent));
        original.checkpoint();
        original.kill();
        let dir = lab.path().join("new");
        let refusing = program(&lab, "refusing", "echo 'no bridge' >&2; exit 1");
        let before = tree(&lab);
        let message = restore(&lab, &dir, &["--hook-before", text(&refusing)]).expect_failure(3);
        assert!(message.contains("no bridge"), "{message}");
        assert_eq!(tree(&lab), before);
        let noting = program(
            &lab,
            "noting",
            "echo $STILLPOINT_HOOK $STILLPOINT_NAME >> $OUT\n\
             [ $STILLPOINT_HOOK = before ] && exit\n\
             $PROGRAM status --json $STILLPOINT_NAME >> $OUT; echo 'no route'; exit 4",
        );
        let words = ["restore", "o", "--json", "--qemu", text(&lab.qemu), "--dir", text(&dir)];
        let hooks = ["--hook-before", text(&noting), "--hook-after", text(&noting)];
        let out = lab.path().join("hooks");
        let environment = [("PROGRAM", text(stillpoint_tests::built())), ("OUT", text(&out))];
        let ran = lab.run_with(&[&words[..], &hooks].concat(), &environment);
        let notes = ran.expect_success().json()["notes"].to_string();
        assert!(notes.contains("no guest agent has its port open"), "{notes}");
        assert!(notes.contains("no route") && notes.contains("exit status: 4"), "{notes}");
        let said = std::fs::read_to_string(&out).expect("the hooks wrote");
        assert!(said.starts_with("before o\nafter o\n{"), "{said}");
        assert!(said.contains("\"busy\": false") && said.contains("\"qemu_pid\""), "{said}");
        lab.run(&["checkpoint", "o"]).expect_success();
    });
}

/// A QEMU that does as `incoming` says where it should wait for a VM's state, and is one otherwise.
fn wrapper(lab: &Lab, incoming: &str) -> PathBuf {
    let path = lab.path().join("qemu-system-wrapped");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *-incoming*) {incoming};; esac\nexec {} \"$@\"\n",
        lab.qemu.display()
    );
    std::fs::write(&path, script).expect("a file");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("a file");
    path
}

#[test]
fn failed_restore_leaves_everything_as_it_was() {
    let lab = Lab::new(&newest_qemu());
    let original = lab.start("o", &Recipe::scribbler(41));
    original.checkpoint();
    original.kill();
    // The helper has seen that.
    let dir = lab.path().join("a/new");
    let breaking = wrapper(&lab, "touch serial.log; echo 'no such luck' >&2; exit 1");
    let before = tree(&lab);
    let first = ["restore", "--eager", "o", "--qemu", text(&breaking), "--dir", text(&dir)];
    let failing = |name: &[&'static str]| [&first[..], name].concat();
    for name in [&[][..], &["--as", "copy"]] {
        let message = lab.run(&failing(name)).expect_failure(3);
        assert!(message.contains("no such luck"), "{message}");
        assert_eq!(tree(&lab), before, "{name:?}");
    }
    // Interrupted while QEMU comes up.
    wrapper(&lab, "exec sleep 60");
    let before = tree(&lab);
    let signals = [
        (Signal::SIGTERM, Some(1), &[][..]),
        (Signal::SIGINT, Some(1), &["--as", "copy"]),
        (Signal::SIGKILL, None, &[]),
    ];
    for (signal, code, name) in signals {
        let mut child = lab.command(&failing(name)).spawn().expect("stillpoint can be run");
        let log = lab.runtime().join(name.last().unwrap_or(&"o")).join("qemu.log");
        let disk = dir.join("sp-odd.raw");
        assert!(
            wait_until(Duration::from_secs(30), || disk.exists() && log.exists()),
            "no QEMU was started"
        );
        kill(Pid::from_raw(child.id().cast_signed()), signal).expect("ours");
        assert_eq!(child.wait().expect("a child").code(), code, "{signal}");
        if signal == Signal::SIGKILL {
            // The process that restores undoes it, and no command waits for that.
            wait_until(Duration::from_secs(30), || tree(&lab) == before);
        }
        assert_eq!(tree(&lab), before, "{signal}");
    }
    std::fs::remove_file(&breaking).expect("a file");
    let again = lab.restore("o", "o", &[]);
    lab.run(&["checkpoint", "o"]).expect_success();
    drop(again);
}

/// What SIGKILL leaves is undone by the same command; from where the guest may have run, nothing
/// is.
#[test]
fn killed_restore_can_be_repeated() {
    let lab = Lab::new(&newest_qemu());
    let original = lab.start("o", &Recipe::scribbler(42));
    original.checkpoint();
    original.kill();
    let dir = lab.path().join("new");
    let words = ["restore", "--eager", "o", "--qemu", text(&lab.qemu), "--dir", text(&dir)];
    for point in ["restore.started", "restore.loaded"] {
        let ran = lab.run_with(&words, &[("STILLPOINT_DIE_AT", point)]);
        assert_eq!(ran.code, -1, "{point}: {ran:?}");
        assert!(dir.exists() && lab.runtime().join("o/restore.json").exists(), "{point}");
        let message = lab.run(&["attach", "o"]).expect_failure(3);
        assert!(message.contains("restore"), "{message}");
    }
    let ran = lab.run(&words).expect_success();
    assert!(ran.err.contains("undoing"), "{}", ran.err);
    assert!(
        !lab.runtime().join("o/restore.json").exists()
            && !lab.runtime().join("o/before-restore").exists()
    );
    let pid: i32 = std::fs::read_to_string(lab.runtime().join("o/helper.pid"))
        .expect("a helper")
        .trim()
        .parse()
        .expect("a number");
    lab.run(&["checkpoint", "o"]).expect_success();
    assert_eq!(lab.list("o"), [1, 2].map(CheckpointId));
    let mut monitor = QmpClient::connect(&dir.join("extra.sock"));
    // It may be gone before the last byte of that is written.
    let _ = monitor.try_execute("quit", json!({}));
    assert!(
        wait_until(Duration::from_secs(20), || !stillpoint_tests::is_running(Pid::from_raw(pid))),
        "the helper ends with QEMU"
    );
    // Claimed, and the guest about to run: it is a VM, which only lacks its helper.
    let dir = lab.path().join("newer");
    let ran = lab.run_with(
        &["restore", "--eager", "o", "--qemu", text(&lab.qemu), "--dir", text(&dir)],
        &[("STILLPOINT_DIE_AT", "restore.claimed")],
    );
    assert_eq!(ran.code, -1, "{ran:?}");
    lab.run(&words).expect_failure(3);
    lab.run(&["attach", "o"]).expect_success();
    lab.run(&["checkpoint", "o"]).expect_success();
    lab.verify("o");
}

/// Stopped, so that it is there until the guest runs and does not answer for the helper.
#[test]
fn command_killed_once_the_guest_runs_leaves_it_a_helper() {
    let lab = Lab::new(&newest_qemu());
    let original = lab.start("o", &Recipe::scribbler(44));
    original.checkpoint();
    original.kill();
    let dir = lab.path().join("new");
    let words = ["restore", "--eager", "o", "--qemu", text(&lab.qemu), "--dir", text(&dir)];
    let mut command = lab.command(&words).spawn().expect("stillpoint can be run");
    let pid = Pid::from_raw(command.id().cast_signed());
    assert!(wait_until(Duration::from_secs(30), || dir.join("sp-odd.raw").exists()), "no disk");
    kill(pid, Signal::SIGSTOP).expect("ours");
    let is_served = || lab.run(&["checkpoint", "o"]).code == 0;
    assert!(wait_until(Duration::from_secs(30), is_served), "no helper serves the VM");
    kill(pid, Signal::SIGKILL).expect("ours");
    assert_eq!(command.wait().expect("a child").code(), None);
    lab.run(&["checkpoint", "o"]).expect_success();
    assert_eq!(lab.list("o"), [1, 2, 3].map(CheckpointId));
}

/// In a network namespace of its own: there /sys shows the devices of another, and a tap without a
/// script is down.
#[test]
fn copy_tap_in_use_is_named_with_a_map_that_helps() {
    const OWN_NETWORK: CloneFlags = CloneFlags::CLONE_NEWNET;
    assert_root("making a network namespace and taps in it");
    assert!(Path::new("/dev/net/tun").exists(), "the kernel has no taps: modprobe tun");
    let test = || {
        unshare(OWN_NETWORK).expect("a network namespace");
        let lab = Lab::for_vms(&newest_qemu(), 2);
        let tap = [
            "-netdev",
            "tap,id=n,ifname=sptap0,script=no,downscript=no",
            "-device",
            "e1000,netdev=n",
        ];
        let original = lab.start("o", &Recipe::scribbler(41).arguments(&tap));
        original.checkpoint();
        let dir = lab.path().join("copy");
        let message = restore(&lab, &dir, &["--as", "c"]).expect_failure(3);
        assert!(message.contains("tap sptap0") && !dir.exists(), "{message}");
        let map = proposed(&message);
        lab.restore("o", "c", &["--map", &map]);
    };
    std::thread::spawn(test).join().expect("no panic");
}

/// A second helper of the same QEMU, from another runtime directory, is refused for as long as the
/// first lives.
#[test]
fn helper_of_a_qemu_is_one_whatever_the_runtime_directory() {
    let lab = Lab::for_vms(&newest_qemu(), 2);
    let vm = lab.start_plain(
        "m",
        &Recipe::scribbler(43).arguments(&["-qmp", "unix:second.sock,server=on,wait=off"]),
    );
    vm.attach_plain(&[]);
    vm.checkpoint();
    let second = vm.directory.join("second.sock");
    let elsewhere = lab.path().join("run2");
    let words = [
        "attach",
        "--qmp",
        text(&second),
        "--store",
        lab.store(),
        "--name",
        "twin",
        "--runtime-dir",
        text(&elsewhere),
    ];
    let attach = |vm: &TestVm| {
        let ran = lab.run(&words);
        assert!(vm.try_checkpoint().code == 0 || vm.helper().is_none());
        ran
    };
    let helper = vm.helper().expect("a helper").to_string();
    let message = attach(&vm).expect_failure(3);
    assert!(message.contains(&helper), "{helper} is not named: {message}");
    vm.kill_helper();
    attach(&vm).expect_success();
    let message = lab.run(&["attach", "m"]).expect_failure(3);
    assert!(message.contains("has a helper already"), "{message}");
    lab.run(&["checkpoint", "twin", "--runtime-dir", text(&lab.path().join("run2"))])
        .expect_success();

    // The same of a VM with the plugin, whose runtime directory was copied: its helper finds out,
    // and the command says it.
    let ours = lab.start("ours", &Recipe::scribbler(44));
    ours.checkpoint();
    let copied = elsewhere.join("ours");
    std::fs::create_dir(&copied).expect("a directory");
    std::fs::set_permissions(&copied, std::fs::Permissions::from_mode(0o700)).expect("a directory");
    let original = lab.runtime().join("ours");
    std::fs::copy(original.join("machine.json"), copied.join("machine.json")).expect("a file");
    for socket in ["plugin.sock", "qmp.sock"] {
        std::os::unix::fs::symlink(original.join(socket), copied.join(socket)).expect("a link");
    }
    let message = lab.run(&["attach", "ours", "--runtime-dir", text(&elsewhere)]).expect_failure(3);
    assert!(message.contains("has a helper already"), "{message}");
    ours.checkpoint();
    // A directory that others can write is not believed at all.
    std::fs::set_permissions(&copied, std::fs::Permissions::from_mode(0o777)).expect("a directory");
    let message = lab
        .run(&["attach", "ours", "--take-over", "--runtime-dir", text(&elsewhere)])
        .expect_failure(3);
    assert!(message.contains("by others"), "{message}");
    ours.checkpoint();
}
