//! Attaching to an external QEMU: when it is refused, what the runtime directory keeps, and what
//! `doctor` reports.

use checkpoint_format::CheckpointId;
use engine::checkpoint::outcome::Kind;
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;
use stillpoint_tests::{
    Lab, QmpClient, Recipe, Scribbled, TestVm, assert_root, built, kill_hard, newest_qemu,
    on_each_qemu, wait_until,
};

const UNPRIVILEGED_UID: u32 = 65534;

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn attach(lab: &Lab, socket: &Path, name: &str) -> stillpoint_tests::Ran {
    lab.run(&["attach", "--qmp", text(socket), "--store", lab.store(), "--name", name])
}

fn doctor(lab: &Lab, socket: &Path) -> (i32, Value) {
    let ran = lab.run(&["doctor", "--qmp", text(socket), "--json"]);
    (ran.code, ran.json())
}

/// The rows whose name begins so: state and detail.
fn rows(report: &Value, check: &str) -> Vec<(String, String)> {
    let rows = report["checks"].as_array().expect("rows").iter();
    let word = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    rows.filter(|row| word(row, "check").starts_with(check))
        .map(|row| (word(row, "state"), word(row, "detail")))
        .collect()
}

fn saved(lab: &Lab, name: &str) -> Value {
    let text = std::fs::read_to_string(lab.runtime().join(name).join("machine.json"))
        .expect("a VM was written down");
    serde_json::from_str(&text).expect("JSON")
}

fn end_helper(vm: &TestVm) {
    kill_hard(vm.wait_for_helper());
    assert!(wait_until(Duration::from_secs(10), || vm.helper().is_none()));
}

#[test]
fn what_is_no_monitor_of_a_qemu_is_refused_and_says_what_would_be() {
    let lab = Lab::new(&newest_qemu());
    let place = |name: &str| lab.path().join(name);
    let foreign = UnixListener::bind(place("foreign")).expect("a socket");
    drop(UnixListener::bind(place("dead")).expect("a socket"));
    std::fs::write(place("file"), "").expect("a file");
    for (name, said) in [
        ("foreign", "no QEMU"),
        ("dead", "has ended"),
        ("missing", "is the path right?"),
        ("file", "cannot be reached"),
    ] {
        for message in [
            attach(&lab, &place(name), "m").expect_failure(3),
            lab.run(&["doctor", "--qmp", text(&place(name))]).expect_failure(3),
        ] {
            assert!(
                message.contains(name) && message.contains(said),
                "{name}: no '{said}' in {message}"
            );
        }
    }
    drop(foreign);
    assert!(
        !lab.runtime().join("m").exists() && !lab.store_directory().exists(),
        "something was left"
    );
    let message = lab
        .run(&["attach", "--qmp", text(&place("dead")), "--store", "ftp://x", "--name", "m"])
        .expect_failure(2);
    assert!(message.contains("ftp"), "{message}");
}

/// A device that the command line does not name has no place in a restored VM, whenever it came.
#[test]
fn plugged_devices_are_refused() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let vm = lab.start_plain("m", &Recipe::scribbler(3));
        let socket = vm.directory.join("qmp.sock");
        assert_eq!(rows(&doctor(&lab, &socket).1, "devices")[0].0, "ok");
        vm.qmp().execute("device_add", json!({"driver": "virtio-rng-pci", "id": "late"}));
        let (code, report) = doctor(&lab, &socket);
        assert!(
            code == 3
                && rows(&report, "devices")[0].1.contains("late (virtio-rng-pci) was plugged in"),
            "{report}"
        );
        vm.attach_plain(&[]);
        let message = vm.try_checkpoint().expect_failure(3);
        assert!(
            message.contains("/machine/peripheral/late") && message.contains("command line"),
            "{message}"
        );
    });
}

/// An image that was changed at run time likewise.
#[test]
fn a_disk_that_moved_is_refused() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start_plain("m", &Recipe::scribbler(3));
    vm.attach_plain(&[]);
    vm.checkpoint();
    let snapshot = vm.directory.join("snap.qcow2");
    vm.qmp().execute(
        "blockdev-snapshot-sync",
        json!({"device": "cow", "snapshot-file": text(&snapshot), "format": "qcow2"}),
    );
    let message = vm.try_checkpoint().expect_failure(3);
    assert!(message.contains("snap.qcow2"), "{message}");
}

#[test]
fn attach_to_the_same_process_continues_and_to_another_begins_again() {
    on_each_qemu(|qemu| {
        let lab = Lab::for_vms(qemu, 2);
        let vm = lab.start_plain("m", &Recipe::scribbler(4));
        vm.attach_plain(&[]);
        let first = saved(&lab, "m");
        assert_eq!(first["unprepared"]["monitor"], text(&vm.directory.join("qmp.sock")));
        assert!(first["arguments"].to_string().contains("node-name=sp-cow"), "{first}");
        assert!(
            !first["arguments"].to_string().contains("qmp.sock"),
            "the helper's monitor belongs to this process: {first}"
        );
        assert_eq!(vm.checkpoint().outcome.kind, Kind::Full);
        end_helper(&vm);
        vm.attach_plain(&[]);
        assert_eq!(saved(&lab, "m")["instance"], first["instance"]);
        assert_eq!(
            vm.checkpoint().outcome.parent,
            Some(CheckpointId(1)),
            "the same process continues"
        );
        end_helper(&vm);
        // What was written down is enough; and a directory that was lost is no loss.
        lab.run(&["attach", "m"]).expect_success();
        assert_eq!(vm.checkpoint().outcome.parent, Some(CheckpointId(2)));
        end_helper(&vm);
        std::fs::remove_dir_all(lab.runtime().join("m")).expect("a directory");
        vm.attach_plain(&[]);
        assert_eq!(vm.checkpoint().outcome.parent, Some(CheckpointId(3)));

        let other = lab.start_plain("other", &Recipe::scribbler(5));
        end_helper(&vm);
        let message = attach(&lab, &other.directory.join("qmp.sock"), "m").expect_failure(3);
        assert!(message.contains("another QEMU that runs"), "{message}");
        vm.kill();
        let message = lab.run(&["attach", "m"]).expect_failure(3);
        assert!(message.contains("has ended"), "{message}");
        attach(&lab, &other.directory.join("qmp.sock"), "m").expect_success();
        assert_ne!(saved(&lab, "m")["instance"], first["instance"]);
        let outcome = lab.run(&["checkpoint", "m", "--json"]).expect_success().json();
        assert_eq!(
            (outcome["kind"].as_str(), outcome["id"].as_u64()),
            (Some("full"), Some(5)),
            "{outcome}"
        );
        lab.verify("m");
    });
}

/// Two helpers would take each other's captures apart, and so would a second VM of a running one's
/// name.
#[test]
fn one_vm_has_one_name_and_one_helper() {
    let lab = Lab::for_vms(&newest_qemu(), 2);
    let vm = lab.start_plain(
        "m",
        &Recipe::scribbler(6).arguments(&["-qmp", "unix:third.sock,server=on,wait=off"]),
    );
    vm.attach_plain(&[]);
    let third = vm.directory.join("third.sock");
    let message = attach(&lab, &third, "twin").expect_failure(3);
    assert!(message.contains("attached as m already"), "{message}");
    let message = attach(&lab, &third, "m").expect_failure(3);
    assert!(message.contains("--take-over"), "{message}");
    vm.checkpoint();
    end_helper(&vm);
    attach(&lab, &third, "twin").expect_success();
    let message = lab.run(&["attach", "m"]).expect_failure(3);
    assert!(message.contains("attached as twin already"), "{message}");

    let ours = lab.start("ours", &Recipe::scribbler(7));
    let message = attach(&lab, &ours.directory.join("extra.sock"), "external").expect_failure(3);
    assert!(message.contains("started by Stillpoint"), "{message}");
    let message = attach(&lab, &third, "ours").expect_failure(3);
    assert!(message.contains("--name") || message.contains("already"), "{message}");
}

/// A VM that runs cannot be brought to life a second time, though its QEMU has no sign of ours on
/// its command line.
#[test]
fn a_running_vm_is_not_restored_beside_itself() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start_plain("m", &Recipe::scribbler(8));
    vm.attach_plain(&[]);
    vm.checkpoint();
    end_helper(&vm);
    let directory = lab.fresh_directory("again");
    let ran = lab.run_with(
        &["restore", "--eager", "m", "--qemu", text(&lab.qemu), "--dir", text(&directory)],
        &[("STILLPOINT_RUNTIME_DIR", text(&lab.path().join("elsewhere")))],
    );
    let message = ran.expect_failure(3);
    assert!(message.contains("did not release"), "{message}");
    // Not even on order where it is known that its QEMU runs.
    let words = [
        "restore",
        "--eager",
        "m",
        "--take-over",
        "--qemu",
        text(&lab.qemu),
        "--dir",
        text(&directory),
    ];
    let message = lab.run(&words).expect_failure(3);
    assert!(message.contains("runs"), "{message}");
    lab.run(&["attach", "m"]).expect_success();
    vm.checkpoint();
}

fn with_plugin(recipe: Recipe) -> Recipe {
    let plugin = built().with_file_name("libstillpoint_plugin.so");
    recipe.arguments(&["-plugin", &format!("file={},socket=plug.sock", plugin.display())])
}

/// The plugin in a QEMU that gave it no memory file: the VM's own memory, or a file that QEMU made
/// itself.
#[test]
fn the_tracker_follows_memory_that_qemu_made_itself() {
    let shared = json!({"qom-type": "memory-backend-memfd", "id": "pc.ram", "share": true, "size": 16 << 20}).to_string();
    let kinds: [&[&str]; 2] = [&[], &["-object", &shared, "-machine", "memory-backend=pc.ram"]];
    on_each_qemu(|qemu| {
        for (seed, kind) in (20..).zip(kinds) {
            let lab = Lab::new(qemu);
            let vm =
                lab.start_plain("m", &with_plugin(Recipe::scribbler(seed as u32)).arguments(kind));
            vm.attach_plain(&["--engine", "tracker"]);
            let mut scribbled = Scribbled::new(&lab, vm, seed);
            for number in 0..5 {
                let outcome = scribbled.checkpoint();
                assert_eq!(
                    (outcome.engine.as_str(), outcome.parent.is_some()),
                    ("tracker", number > 0),
                    "{outcome:?}"
                );
                scribbled.write_disks();
                scribbled.pause_between();
            }
            // Kept marks of another helper are believed only by the VM whose they are.
            end_helper(&scribbled.vm);
            scribbled.vm.attach_plain(&[]);
            scribbled.checkpoint();
            scribbled.check(<[CheckpointId]>::to_vec);
        }
    });
}

/// One QEMU has one set of marks: who uses it under another name makes them worthless for the
/// first.
#[test]
fn marks_that_another_name_has_used_are_not_believed() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start_plain("m", &with_plugin(Recipe::scribbler(30)));
    let socket = vm.directory.join("qmp.sock");
    vm.attach_plain(&[]);
    let mut scribbled = Scribbled::new(&lab, vm, 30);
    scribbled.checkpoint();
    end_helper(&scribbled.vm);
    attach(&lab, &socket, "twin").expect_success();
    let twin = lab.run(&["checkpoint", "twin", "--json"]).expect_success().json();
    assert_eq!(twin["engine"], "tracker", "{twin}");
    let pid: i32 = std::fs::read_to_string(lab.runtime().join("twin/helper.pid"))
        .expect("a helper")
        .trim()
        .parse()
        .expect("a number");
    kill_hard(stillpoint_tests::Pid::from_raw(pid));
    scribbled.vm.attach_plain(&[]);
    scribbled.checkpoint();
    scribbled.check(<[CheckpointId]>::to_vec);
}

#[test]
fn doctor_says_what_can_be_done_with_a_running_vm() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let recipe = Recipe::scribbler(9).arguments(&[
            "-netdev",
            "user,id=n",
            "-vnc",
            "none",
            "-chardev",
            "socket,id=c,path=/run/nowhere,server=off,reconnect=5",
        ]);
        let vm = lab.start_plain("m", &recipe);
        let socket = vm.directory.join("qmp.sock");
        let mut monitor = vm.qmp();
        let before = footprint(&mut monitor);
        let (code, report) = doctor(&lab, &socket);
        assert_eq!(code, 0, "{report}");
        assert_eq!(report["checkpoints_possible"], true);
        let is_old = report["checks"].to_string().contains("7.2.22");
        for (engine, possible) in [("tracker", false), ("pre-copy", !is_old), ("stopped", true)] {
            assert_eq!(report["engines"][engine]["possible"], possible, "{engine}: {report}");
        }
        let disks = rows(&report, "disk ");
        assert_eq!(disks.len(), 3, "{report}");
        assert!(
            disks.iter().all(|(state, _)| state == "ok")
                && disks.iter().any(|(_, detail)| detail.contains("on 1 layer")),
            "{disks:?}"
        );
        assert!(rows(&report, "process")[0].1.contains("qemu-system-x86_64"));
        assert!(
            rows(&report, "restore elsewhere needs")
                .iter()
                .any(|(_, detail)| detail.contains("/run/nowhere")),
            "{report}"
        );
        assert!(report["left_out"].to_string().contains("qmp.sock"), "{report}");
        assert_eq!(
            footprint(&mut monitor),
            before,
            "doctor left something behind, or stopped the guest"
        );
        let table = lab.run(&["doctor", "--qmp", text(&socket)]).expect_success().out;
        assert!(
            table.contains("ok    machine")
                && table.contains("engine stopped")
                && table.contains("Checkpoints can be taken"),
            "{table}"
        );
        assert!(!lab.runtime().exists() && !lab.store_directory().exists());

        // Another's export takes the one NBD server; a busy monitor tells nothing.
        let address = json!({"type": "unix", "data": {"path": text(&lab.path().join("nbd.sock"))}});
        monitor.execute("nbd-server-start", json!({"addr": address}));
        let node = monitor.execute("query-block", json!({}))[0]["inserted"]["node-name"].clone();
        monitor.execute(
            "block-export-add",
            json!({"type": "nbd", "id": "theirs", "node-name": node.clone()}),
        );
        let (code, report) = doctor(&lab, &socket);
        assert!(code == 3 && rows(&report, "NBD server")[0].1.contains("theirs"), "{report}");
        monitor.execute("block-export-del", json!({"id": "theirs"}));
        let (code, report) = doctor(&lab, &socket);
        assert!(
            code == 3 && rows(&report, "NBD server")[0].1.contains("no export yet"),
            "{report}"
        );
        monitor.execute("nbd-server-stop", json!({}));
        let holder = QmpClient::connect(&socket);
        let (code, report) = doctor(&lab, &socket);
        assert!(code == 3 && rows(&report, "monitor")[0].1.contains("another client"), "{report}");
        drop((holder, monitor));

        // Nor is an export that another has in the helper's own server in the way of a checkpoint.
        attach(&lab, &socket, "m").expect_success();
        let address =
            json!({"type": "unix", "data": {"path": text(&lab.runtime().join("m/nbd.sock"))}});
        vm.qmp().execute("nbd-server-start", json!({"addr": address}));
        vm.qmp()
            .execute("block-export-add", json!({"type": "nbd", "id": "theirs", "node-name": node}));
        let (code, report) = doctor(&lab, &vm.directory.join("extra.sock"));
        assert!(code == 0 && rows(&report, "NBD server").is_empty(), "{report}");
        lab.run(&["checkpoint", "m"]).expect_success();
        assert_eq!(vm.qmp().execute("query-block-exports", json!({}))[0]["id"], "theirs");
    });
}

/// What a look could leave behind in QEMU.
fn footprint(monitor: &mut QmpClient) -> Vec<Value> {
    let stops = monitor.events().iter().filter(|event| event["event"] == "STOP").count();
    let asked = [
        ("query-migrate-capabilities", json!({})),
        ("query-migrate-parameters", json!({})),
        ("query-jobs", json!({})),
        ("query-block-exports", json!({})),
        ("qom-list", json!({"path": "/objects"})),
    ];
    let mut found: Vec<Value> =
        asked.into_iter().map(|(command, arguments)| monitor.execute(command, arguments)).collect();
    found.push(json!(stops));
    found
}

/// Beside a guest whose QEMU is slow to answer, and one that does not answer at all.
#[test]
fn doctor_waits_only_so_long() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start_plain("m", &Recipe::scribbler(10));
    let socket = vm.directory.join("qmp.sock");
    kill(vm.qemu(), Signal::SIGSTOP).expect("a process of the test");
    let ran = lab.run(&["doctor", "--qmp", text(&socket)]);
    kill(vm.qemu(), Signal::SIGCONT).expect("a process of the test");
    assert!(ran.time < Duration::from_secs(30), "{ran:?}");
    assert!(ran.code == 3 && ran.out.contains("does not answer"), "{ran:?}");
    assert_eq!(doctor(&lab, &socket).0, 0);
}

/// Files and sockets are handed to QEMU as descriptors, so its user needs no right to any of ours.
#[test]
fn other_users_qemu_is_served_by_a_root_helper() {
    assert_root("starting a QEMU as another user");
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let directory = lab.path().join("theirs");
        std::fs::create_dir(&directory).expect("a directory");
        std::fs::write(directory.join("disk.raw"), vec![7; 1 << 20]).expect("a disk");
        for path in [directory.clone(), directory.join("disk.raw")] {
            nix::unistd::chown(&path, Some(UNPRIVILEGED_UID.into()), None)
                .expect("a file of another user");
        }
        // Others must be able to come as far as there.
        std::fs::set_permissions(lab.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))
            .expect("a directory");
        let mut command = std::process::Command::new(&lab.qemu);
        let line = "-m 16 -nodefaults -display none -accel tcg -qmp unix:qmp.sock,server=on,wait=off \
                    -drive file=disk.raw,format=raw,if=none,id=d -device ide-hd,drive=d -qmp unix:own.sock,server=on,wait=off";
        command.args(line.split_whitespace()).current_dir(&directory);
        let mut child = std::os::unix::process::CommandExt::uid(&mut command, UNPRIVILEGED_UID)
            .spawn()
            .expect("QEMU can be run");
        let socket = directory.join("qmp.sock");
        let up = wait_until(Duration::from_secs(20), || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        let work = || {
            let (code, report) = doctor(&lab, &socket);
            assert!(code == 0, "{report}");
            attach(&lab, &socket, "m").expect_success();
            let mut monitor = QmpClient::connect(&directory.join("own.sock"));
            for pattern in [1, 2] {
                monitor.disk_io("d", &format!("write -P {pattern} 4096 4096"));
                lab.run(&["checkpoint", "m"]).expect_success();
                assert!(monitor.is_running(), "the guest was stopped");
            }
            assert_eq!(
                monitor.execute("query-fdsets", json!({})),
                json!([]),
                "descriptors of ours stay in QEMU"
            );
            lab.verify("m");
        };
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        child.kill().expect("a child");
        child.wait().expect("a child");
        assert!(up, "QEMU did not come up");
        worked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

#[test]
fn an_engine_that_cannot_be_had_is_refused_at_once() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start_plain(
        "m",
        &Recipe::scribbler(11).arguments(&["-device", "virtio-balloon-pci,id=b"]),
    );
    let message = vm.try_attach_plain(&["--engine", "tracker"], &[]).expect_failure(3);
    assert!(message.contains("plugin") && message.contains("--engine stream"), "{message}");
    assert!(!lab.runtime().join("m").exists(), "a VM was written down");
    // A balloon is none of the stream's business.
    vm.attach_plain(&[]);
    vm.checkpoint();
}

/// What a checkpoint of a managed VM is restored from stands on the saved command line.
#[test]
fn a_vm_as_libvirt_starts_one_is_restored() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let recipe = Recipe::scribbler(12).arguments(&libvirt_like());
        let vm = lab.start_plain("m", &recipe);
        vm.attach_plain(&[]);
        let mut scribbled = Scribbled::new(&lab, vm, 12);
        scribbled.checkpoint();
        scribbled.write_disks();
        scribbled.checkpoint();
        let arguments = saved(&lab, "m")["arguments"].to_string();
        for gone in ["masterKey0", "memory-backend", "fdset", "\"-S\"", "debug-threads", "-msg"] {
            assert!(!arguments.contains(gone), "{gone} is in {arguments}");
        }
        scribbled.check(<[CheckpointId]>::to_vec);
    });
}

fn libvirt_like() -> Vec<&'static str> {
    vec![
        "-name",
        "guest=m,debug-threads=on",
        "-object",
        r#"{"qom-type":"secret","id":"masterKey0","format":"raw","data":"eA=="}"#,
        "-machine",
        "memory-backend=pc.ram",
        "-object",
        r#"{"qom-type":"memory-backend-ram","id":"pc.ram","size":16777216}"#,
        "-device",
        r#"{"driver":"virtio-serial-pci","id":"virtio-serial0"}"#,
        "-chardev",
        "socket,id=charchannel0,path=channel.sock,server=on,wait=off",
        "-device",
        r#"{"driver":"virtserialport","bus":"virtio-serial0.0","nr":1,"chardev":"charchannel0","id":"channel0","name":"org.qemu.guest_agent.0"}"#,
        "-device",
        r#"{"driver":"virtio-balloon-pci","id":"balloon0"}"#,
        "-netdev",
        r#"{"type":"user","id":"hostnet0"}"#,
        "-device",
        r#"{"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0"}"#,
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-msg",
        "timestamp=on",
    ]
}
