//! What docs/security.md promises: each promise names its tests, and those that concern the whole
//! program are here.

use nix::fcntl::{Flock, FlockArg};
use qmp_bridge::paused::PAUSE_LIMIT;
use serde_json::{Value, json};
use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use stillpoint_tests::{
    Lab, QmpClient, Recipe, Registry, TestVm, assert_root, built, newest_qemu, on_each_qemu, pages,
    wait_until,
};

const FLOODER: &[u8; 512] = include_bytes!("../src/flooder.bin");
const UNPRIVILEGED_UID: u32 = 65534;
const SECTIONS: &[&str] = &[
    "Users who can write the store: tests",
    "Hostile guest",
    "Peers on sockets",
    "Other users of the host",
];
/// What a flood of clients may cost the helper: a request's limit for each that is served, and as
/// much again.
const CLIENTS_MAY_COST: u64 = 16 << 20;

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .permissions()
        .mode()
        & 0o7777
}

/// The last cell of each row names tests.
#[test]
fn promises_name_tests_that_are_there() {
    let tests = Registry::get();
    let mut wrong = Vec::new();
    for section in SECTIONS {
        let rows = pages::rows("security.md", section);
        assert!(rows.len() > 3, "{section}: no table");
        for row in rows {
            let last = row.last().map(String::as_str).unwrap_or_default();
            let names: Vec<&str> = last.split('`').skip(1).step_by(2).collect();
            let missing = names.iter().filter(|name| !tests.has(name));
            wrong.extend(missing.map(|name| format!("{section}: no test `{name}`")));
            if names.is_empty() {
                wrong.push(format!("{section}: no test for '{}'", row[0]));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Seconds from each STOP to the next RESUME.
fn pauses(events: &[Value]) -> Vec<f64> {
    let time = |event: &Value| {
        let part = |key: &str| event["timestamp"][key].as_f64().expect("QEMU says so");
        part("seconds") + part("microseconds") / 1e6
    };
    let of = |name: &str| {
        events.iter().filter(|event| event["event"] == name).map(time).collect::<Vec<f64>>()
    };
    let (stops, resumes) = (of("STOP"), of("RESUME"));
    assert_eq!(stops.len(), resumes.len(), "a stop without its end: {events:?}");
    stops.into_iter().zip(resumes).map(|(stop, resume)| resume - stop).collect()
}

/// It gets a failed checkpoint and no longer pauses, and the next one has what it wrote.
#[test]
fn hostile_guest_that_dirties_memory_loses_its_checkpoint_and_no_time() {
    let lab = Lab::new(&newest_qemu());
    let recipe = Recipe::scribbler(1).patch("boot.raw", 0, FLOODER).arguments(&["-m", "200"]);
    let vm = lab.start("m", &recipe);
    let mut monitor = vm.qmp();
    // The last page that it writes.
    let is_flooding = || {
        monitor
            .human("xp /1xw 0xbfff000")
            .split_whitespace()
            .last()
            .is_some_and(|word| word != "0x00000000")
    };
    assert!(wait_until(Duration::from_secs(60), is_flooding), "the guest does not write");
    drop(monitor.events());
    let message = vm.try_checkpoint().expect_failure(1);
    assert!(message.contains("faster than it can be copied"), "{message}");
    let pauses = pauses(&monitor.events());
    assert!(
        !pauses.is_empty() && pauses.iter().all(|pause| *pause < PAUSE_LIMIT.as_secs_f64()),
        "{pauses:?}"
    );
    assert!(monitor.is_running());
    assert!(lab.list_if_any("m").is_empty());
    monitor.stop();
    vm.checkpoint();
    drop(monitor);
    vm.kill();
    lab.run(&["verify", "--restore", "m", "--qemu", lab.qemu.to_str().expect("UTF-8")])
        .expect_success();
}

fn ask(stream: &mut UnixStream, line: &[u8]) -> Option<Value> {
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a socket");
    // One who is cut off at its limit cannot send the rest.
    let _ = stream.write_all(line);
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).ok()?;
    serde_json::from_str(&answer).ok()
}

fn control(vm: &TestVm, lab: &Lab) -> UnixStream {
    UnixStream::connect(lab.runtime().join(&vm.name).join("control.sock"))
        .expect("the helper listens")
}

/// A client may send anything; the helper then serves the next client, in bounded memory.
#[test]
fn control_socket_serves_on_whatever_its_clients_send() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start("m", &Recipe::scribbler(2));
    vm.checkpoint();
    let helper = vm.helper().expect("a helper");
    let open = || std::fs::read_dir(format!("/proc/{helper}/fd")).expect("it runs").count();
    let (files, peak) = (open(), vm.helper_peak_bytes());
    for garbage in [
        &b"\n"[..],
        b"{\"checkpoint\":7}\n",
        b"\xff\xfe\x00garbage\n",
        b"{\"status\":null,\"more\":1}\n",
        b"[[[[\n",
    ] {
        let answer = ask(&mut control(&vm, &lab), garbage);
        assert!(
            answer.is_none_or(|answer| answer["failed"]["exit_code"].is_u64()),
            "{}",
            String::from_utf8_lossy(garbage)
        );
    }
    let long = [vec![b'['; 2 << 20], b"\n".to_vec()].concat();
    let held: Vec<UnixStream> = (0..200)
        .map(|number| {
            let mut stream = control(&vm, &lab);
            match number % 4 {
                0 => drop(stream.write_all(b"{\"checkpo")),
                1 => drop(ask(&mut stream, &long)),
                // It asks and does not read.
                2 => drop(stream.write_all(b"\"status\"\n")),
                _ => {}
            }
            stream
        })
        .collect();
    let busy = || {
        ask(&mut control(&vm, &lab), b"\"status\"\n").expect("an answer")["done"]["busy"] != false
    };
    // Those who only look are not in each other's way: no status says busy because of another.
    std::thread::scope(|scope| {
        let asking: Vec<_> =
            (0..4).map(|_| scope.spawn(|| (0..50).filter(|_| busy()).count())).collect();
        let refused: usize = asking.into_iter().map(|client| client.join().expect("asked")).sum();
        assert_eq!(refused, 0, "of 200 said busy");
    });
    vm.checkpoint();
    let grown = vm.helper_peak_bytes() - peak;
    assert!(grown < CLIENTS_MAY_COST, "{grown} bytes more for 200 clients");
    // Those that stay without a request are let go.
    assert!(
        wait_until(Duration::from_secs(20), || open() <= files),
        "{} descriptors, {files} before",
        open()
    );
    drop(held);
    assert_eq!(vm.helper(), Some(helper), "another helper");
    check_modes(&lab, vm);
}

/// No other user reads a VM's memory, disks and sockets, unless its owner lets them.
fn check_modes(lab: &Lab, vm: TestVm) {
    let runtime = lab.runtime().join("m");
    assert_eq!(mode(&runtime), 0o700);
    for file in ["control.sock", "plugin.sock", "machine.json", "helper.pid", "helper.log"] {
        assert_eq!(mode(&runtime.join(file)) & 0o077, 0, "{file}");
    }
    for file in stillpoint_tests::files_below(&lab.store_directory()) {
        assert_eq!(mode(&file) & 0o007, 0, "{}", file.display());
    }
    vm.kill();
    let restored = lab.restore("m", "m", &["--paused"]);
    assert_eq!(mode(&restored.directory), 0o700);
}

/// A plugin's socket where others may put one: what another process answers is not taken for the
/// VM's memory.
#[test]
fn plugin_socket_of_another_process_is_refused() {
    on_each_qemu(|qemu| {
        let lab = Lab::for_vms(qemu, 2);
        let plugin = built().with_file_name("libstillpoint_plugin.so");
        let words = format!("file={},socket=plug.sock", plugin.display());
        let with_plugin = |seed| Recipe::scribbler(seed).arguments(&["-plugin", &words, "-S"]);
        let (vm, other) =
            (lab.start_plain("m", &with_plugin(3)), lab.start_plain("other", &with_plugin(4)));
        let socket = |vm: &TestVm| vm.directory.join("plug.sock");
        vm.attach_plain(&["--engine", "tracker"]);
        vm.checkpoint();
        vm.kill_helper();
        std::fs::rename(socket(&other), socket(&vm)).expect("the test's directory");
        let message = vm.try_attach_plain(&["--engine", "tracker"], &[]).expect_failure(3);
        assert!(message.contains(&format!("process {}", other.qemu())), "{message}");
        // A helper that knows the VM already does not take it either.
        let message = lab.run(&["attach", "m"]).expect_failure(3);
        assert!(message.contains(&format!("process {}", other.qemu())), "{message}");
    });
}

/// What lies in the runtime directory decides who is signalled and which file is written: only its
/// owner may have put it there.
#[test]
fn runtime_directory_that_others_can_change_is_refused_by_every_command() {
    let lab = Lab::new(&newest_qemu());
    let (base, directory) = (lab.runtime(), lab.runtime().join("m"));
    let elsewhere = lab.path().join("elsewhere");
    let fresh = || {
        let _ = std::fs::remove_dir_all(&base);
        let _ = std::fs::remove_dir_all(&elsewhere);
        std::fs::create_dir_all(&directory).expect("the lab");
        std::fs::set_permissions(&directory, Permissions::from_mode(0o700)).expect("the lab");
    };
    let refused = |what: &str| {
        let qemu = lab.qemu.to_str().expect("UTF-8");
        let run = ["run", "--name", "m", "--", qemu, "-display", "none", "-m", "16"];
        for words in [
            &run[..],
            &["attach", "m"],
            &["attach", "m", "--take-over"],
            &["checkpoint", "m"],
            &["adopt", "m"],
        ] {
            lab.run(words).expect_failure(3);
            assert!(
                !directory.join("helper.lock").exists() && !elsewhere.join("helper.lock").exists(),
                "{what}: {words:?}"
            );
        }
    };
    fresh();
    std::fs::set_permissions(&directory, Permissions::from_mode(0o770)).expect("the lab");
    refused("writable by the group");
    fresh();
    std::fs::rename(&directory, &elsewhere).expect("the lab");
    symlink(&elsewhere, &directory).expect("the lab");
    refused("a link in its place");
    fresh();
    std::fs::set_permissions(&base, Permissions::from_mode(0o777)).expect("the lab");
    refused("a base that all can write");
    assert_root("giving a directory to another user");
    fresh();
    nix::unistd::chown(&directory, Some(UNPRIVILEGED_UID.into()), None).expect("root");
    refused("another user's");
}

/// A pid file names a process that is no helper, and files are links to those of others.
#[test]
fn take_over_signals_no_process_that_a_file_names() {
    let lab = Lab::new(&newest_qemu());
    let directory = lab.runtime().join("m");
    std::fs::create_dir_all(&directory).expect("the lab");
    std::fs::set_permissions(&directory, Permissions::from_mode(0o700)).expect("the lab");
    let mut bystander =
        Command::new("sh").args(["-c", "read line"]).stdin(Stdio::piped()).spawn().expect("sh");
    let lock = File::create(directory.join("helper.lock")).expect("the lab");
    let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| error)
        .expect("free");
    let pid = directory.join("helper.pid");
    std::fs::write(&pid, bystander.id().to_string()).expect("the lab");
    let message = lab.run(&["attach", "m", "--take-over"]).expect_failure(3);
    assert!(message.contains(&bystander.id().to_string()), "{message}");
    let theirs = lab.path().join("theirs");
    std::fs::rename(&pid, &theirs).expect("the lab");
    symlink(&theirs, &pid).expect("the lab");
    assert_ne!(lab.run(&["attach", "m", "--take-over"]).code, 0);
    drop(lock);
    // A lock that is a link to another file locks, and makes, nothing.
    std::fs::remove_file(directory.join("helper.lock")).expect("the lab");
    symlink(lab.path().join("made"), directory.join("helper.lock")).expect("the lab");
    assert_ne!(lab.run(&["attach", "m", "--take-over"]).code, 0);
    assert!(!lab.path().join("made").exists());
    assert!(
        bystander.try_wait().expect("a child").is_none(),
        "a process that a file names was signalled"
    );
    bystander.kill().expect("a child");
    bystander.wait().expect("a child");
}

/// A second client of a helper's monitor is QEMU's affair: it is not served, and the helper is not
/// disturbed.
#[test]
fn monitor_of_a_helper_has_no_second_client() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start("m", &Recipe::scribbler(5));
    vm.checkpoint();
    let mut second = UnixStream::connect(lab.runtime().join("m/qmp.sock")).expect("QEMU listens");
    let line = json!({"execute": "quit"}).to_string();
    second.write_all(format!("{line}\n").as_bytes()).expect("it is only queued");
    vm.checkpoint();
    drop(second);
    assert!(QmpClient::connect(&vm.directory.join("extra.sock")).is_running());
    vm.checkpoint();
}
