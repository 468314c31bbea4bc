//! The scripted QEMU of quick tests (`tests/scripted-vm/`) answers as real ones do: the same
//! conversation is held with both, and what our client reads of each answer, the class of each
//! error and the order of events agree.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use qmp_bridge::nbd::{NbdClient, context};
use qmp_bridge::qmp::QmpEvent;
use qmp_bridge::{Qmp, QmpError, ramblock};
use scripted_vm::{Ram, ScriptedQemu, Version};
use serde_json::{Value, json};
use stillpoint_tests::{Lab, major_version, on_each_qemu};
use tokio::sync::broadcast::Receiver;

const TIMEOUT: Duration = Duration::from_secs(30);
const DISK_BYTES: u64 = 1 << 20;
const RAM_PAGES: usize = 2048;
/// Those whose order our client judges by. A guest without a disk to boot from resets itself at any
/// time, so `RESET` is only waited for.
const EVENTS: [&str; 5] = ["STOP", "RESUME", "SHUTDOWN", "MIGRATION", "DEVICE_DELETED"];

/// Ends the real QEMU.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(qemu: &Path, disk: &Path, socket: &Path) -> Qemu {
    let drive = format!("if=none,id=d0,node-name=d0-node,format=raw,file={}", disk.display());
    let mut command = Command::new(qemu);
    command.args(["-accel", "tcg", "-M", "q35", "-m", "8M", "-display", "none", "-nodefaults"]);
    command.args(["-drive", &drive, "-device", "virtio-blk-pci,id=d0-dev,drive=d0"]);
    command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
    Qemu(command.stdin(Stdio::null()).spawn().expect("QEMU starts"))
}

/// One value of an answer: keys, numbers, and `key=value` for the row of a list that has it.
fn find<'a>(answer: &'a Value, path: &str) -> &'a Value {
    let mut value = answer;
    for part in path.split('/').filter(|part| !part.is_empty()) {
        value = match part.split_once('=') {
            Some((key, wanted)) => {
                let rows = value.as_array().map(Vec::as_slice).unwrap_or_default();
                rows.iter().find(|row| row[key] == wanted).unwrap_or(&Value::Null)
            }
            None => match part.parse::<usize>() {
                Ok(number) => &value[number],
                Err(_) => &value[part],
            },
        };
    }
    value
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a truth",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

struct Conversation {
    qmp: Qmp,
    events: Receiver<QmpEvent>,
    directory: PathBuf,
    transcript: Vec<String>,
}

impl Conversation {
    fn note(&mut self, line: String) {
        self.transcript.push(line);
    }

    /// `read`: what our client reads of the answer. One that ends in `!` must be the same value in
    /// each QEMU, another of the same kind.
    async fn say(&mut self, command: &str, arguments: Value, read: &[&str]) -> Value {
        let answer = self.qmp.execute_json(command, arguments.clone()).await;
        self.heard(&format!("{command} {arguments}"), &answer, read);
        answer.unwrap_or_default()
    }

    async fn give(&mut self, command: &str, arguments: Value, fd: impl AsFd) -> Value {
        let answer = self.qmp.execute_with_fd(command, arguments.clone(), fd.as_fd()).await;
        self.heard(&format!("{command} {arguments}"), &answer, &[]);
        answer.unwrap_or_default()
    }

    fn heard(&mut self, what: &str, answer: &Result<Value, QmpError>, read: &[&str]) {
        let line = match answer {
            Ok(value) => {
                let of = |path: &&str| match path.strip_suffix('!') {
                    Some(path) => format!("{path} {}", find(value, path)),
                    None => format!("{path} {}", kind(find(value, path))),
                };
                read.iter().map(of).collect::<Vec<_>>().join(", ")
            }
            Err(QmpError::Refused { class, .. }) => format!("refused: {class:?}"),
            Err(error) => format!("failed: {error}"),
        };
        self.note(format!("{what} -> {line}"));
        self.note_events();
    }

    fn note_events(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            if EVENTS.contains(&event.name.as_str()) {
                let status = event.data["status"].as_str().unwrap_or_default();
                self.note(format!("event {} {status}", event.name).trim_end().to_owned());
            }
        }
    }

    async fn facts(&mut self) {
        let asked = json!({ "path": "/machine", "property": "type" });
        let name = self.qmp.execute_json("qom-get", asked).await.expect("a machine type");
        let name = name.as_str().expect("a text").trim_end_matches("-machine").to_owned();
        self.note(format!("machine type {name}"));
        self.say("query-version", Value::Null, &["qemu/major!", "qemu/minor!"]).await;
        let row = format!("name={name}");
        self.say(
            "query-machines",
            Value::Null,
            &[&format!("{row}/alias!"), &format!("{row}/default-ram-id!")],
        )
        .await;
        self.say("query-status", Value::Null, &["status!", "running!"]).await;
        self.say("query-cpus-fast", Value::Null, &["0/qom-path!", "0/thread-id", "1"]).await;
        self.say("query-memory-size-summary", Value::Null, &["base-memory!", "plugged-memory!"])
            .await;
        self.say("query-kvm", Value::Null, &["enabled!"]).await;
        self.say("query-iothreads", Value::Null, &["!"]).await;
        self.say("query-commands", Value::Null, &["name=blockdev-set-active/name!"]).await;
        self.say("qom-get", json!({ "path": "/machine", "property": "memory-backend" }), &["!"])
            .await;
        self.say("qom-get", json!({ "path": "/machine", "property": "nothing" }), &[]).await;
        self.say("qom-list", json!({ "path": "/machine/peripheral" }), &["name=d0-dev/type!"])
            .await;
        self.say("qom-list", json!({ "path": "/machine/peripheral-anon" }), &["name=type/type!"])
            .await;
        self.say("qom-list", json!({ "path": "/nowhere" }), &[]).await;
        let blocks = ramblock::ram_blocks(&self.qmp).await.expect("RAM blocks");
        let main = blocks.iter().find(|block| block.name == "pc.ram").expect("the main block");
        self.note(format!("pc.ram {} {} {}", main.used, main.page_size, main.host.is_some()));
    }

    async fn run_state(&mut self) {
        for command in ["cont", "stop", "stop", "cont", "cont", "system_reset"] {
            self.say(command, Value::Null, &[]).await;
        }
        self.say("stop", Value::Null, &[]).await;
        self.say("system_reset", Value::Null, &[]).await;
        // QEMU resets a moment later.
        let mut events = self.qmp.events();
        self.say("system_reset", Value::Null, &[]).await;
        while events.recv().await.expect("events").name != "RESET" {}
        self.wait("query-status", "status", &["prelaunch"]).await;
        self.say("query-status", Value::Null, &["status!", "running!"]).await;
        self.say("cont", Value::Null, &[]).await;
        let marker = json!({ "qom-type": "throttle-group", "id": "mark" });
        self.say("object-add", marker.clone(), &[]).await;
        self.say("object-add", marker, &[]).await;
        self.say(
            "qom-list",
            json!({ "path": "/objects" }),
            &["name=mark/type!", "name=pc.ram/type!"],
        )
        .await;
        self.say("object-del", json!({ "id": "mark" }), &[]).await;
        self.say("object-del", json!({ "id": "mark" }), &[]).await;
        self.say("no-such-command", Value::Null, &[]).await;
    }

    async fn wait(&mut self, command: &str, field: &str, wanted: &[&str]) -> Value {
        loop {
            let answer = self.qmp.execute_json(command, Value::Null).await.expect("an answer");
            if answer[field].as_str().is_some_and(|is| wanted.contains(&is)) {
                self.note_events();
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn list_disks(&mut self) {
        let drive = "device=d0";
        let read = ["qdev!", "removable!", "inserted/node-name!", "inserted/ro!"];
        let read = read.map(|field| format!("{drive}/{field}"));
        self.say("query-block", Value::Null, &read.each_ref().map(String::as_str)).await;
        let read =
            ["drv!", "file", "ro!", "encrypted!", "image/virtual-size!", "image/actual-size"];
        let read = read.map(|field| format!("node-name=d0-node/{field}"));
        self.say(
            "query-named-block-nodes",
            json!({ "flat": true }),
            &read.each_ref().map(String::as_str),
        )
        .await;
        let read = [
            "nodes/name=d0-node/type!",
            "nodes/name=d0-node/id",
            "nodes/name=d0/type!",
            "edges/name=root/perm",
            "edges/name=file/child",
        ];
        self.say("x-debug-query-block-graph", Value::Null, &read).await;
        for empty in ["query-block-jobs", "query-jobs", "query-block-exports", "query-fdsets"] {
            self.say(empty, Value::Null, &["!"]).await;
        }
    }

    /// An overlay, a filter above the disk, the instant, its export, and all of it away again.
    async fn capture(&mut self) {
        self.overlay().await;
        let socket = self.directory.join("nbd");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let address = |name: &str| json!({ "addr": { "type": "fd", "data": { "str": name } } });
        self.say("nbd-server-start", address("none"), &[]).await;
        self.say(
            "block-export-add",
            json!({ "type": "nbd", "id": "live", "node-name": "d0-node" }),
            &[],
        )
        .await;
        self.give("getfd", json!({ "fdname": "nbd" }), &listener).await;
        drop(listener);
        self.say("nbd-server-start", address("nbd"), &[]).await;
        let again = self.qmp.execute_json("nbd-server-start", address("none")).await;
        let words = again.expect_err("it runs").to_string();
        self.note(format!(
            "a second server: already running {}",
            words.contains("already running")
        ));
        let live = json!({ "type": "nbd", "id": "live", "name": "live", "node-name": "d0-node" });
        self.say("block-export-add", live.clone(), &[]).await;
        self.say("block-export-add", live, &[]).await;
        self.say("query-block-exports", Value::Null, &["0/id!", "0/type!"]).await;
        self.read_export(&socket, "live", &[]).await;
        self.instant().await;
        let bitmap = json!([{ "node": "d0-node", "name": "old" }]);
        let export = json!({
            "type": "nbd", "id": "then", "name": "then", "node-name": "access", "bitmaps": bitmap,
            "allocation-depth": true,
        });
        self.say("block-export-add", export, &[]).await;
        let contexts = [context::BASE_ALLOCATION.to_owned(), context::dirty_bitmap("old")];
        self.read_export(&socket, "then", &contexts.each_ref().map(String::as_str)).await;
        self.read_export(&socket, "then", &[context::BASE_ALLOCATION, context::ALLOCATION_DEPTH])
            .await;
        self.take_apart().await;
    }

    async fn overlay(&mut self) {
        let path = self.directory.join("overlay.img");
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .expect("a file");
        let set = self.give("add-fd", json!({ "opaque": "ours" }), &file).await;
        let set = set["fdset-id"].as_u64().expect("a set");
        self.say("query-fdsets", Value::Null, &["0/fds/0/opaque!", "0/fdset-id"]).await;
        let filename = format!("/dev/fdset/{set}");
        let add = self.qmp.execute_json(
            "blockdev-add",
            json!({ "driver": "file", "node-name": "over-file", "filename": filename }),
        );
        add.await.expect("the overlay's file");
        let size = json!({ "driver": "qcow2", "file": "over-file", "size": DISK_BYTES });
        self.say("blockdev-create", json!({ "job-id": "make", "options": size }), &[]).await;
        loop {
            let jobs = self.qmp.execute_json("query-jobs", Value::Null).await.expect("jobs");
            if jobs[0]["status"] == "concluded" {
                break;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        self.say("query-jobs", Value::Null, &["id=make/status!", "id=make/type!", "id=make/error"])
            .await;
        self.say("job-dismiss", json!({ "id": "make" }), &[]).await;
        self.say("job-dismiss", json!({ "id": "make" }), &[]).await;
        let overlay =
            json!({ "driver": "qcow2", "node-name": "over", "file": "over-file", "backing": null });
        self.say("blockdev-add", overlay.clone(), &[]).await;
        self.say("blockdev-add", overlay, &[]).await;
        let filter = json!({
            "driver": "copy-before-write", "node-name": "filter", "file": "d0-node",
            "target": "over", "on-cbw-error": "break-snapshot", "cbw-timeout": 3,
        });
        self.say("blockdev-add", filter, &[]).await;
        self.say("blockdev-del", json!({ "node-name": "over" }), &[]).await;
        self.qmp.execute_json("remove-fd", json!({ "fdset-id": set })).await.expect("removed");
        self.say("remove-fd", json!({ "fdset-id": 77 }), &[]).await;
    }

    async fn instant(&mut self) {
        let bitmap = |name: &str| json!({ "node": "d0-node", "name": name, "granularity": 4096 });
        self.say("block-dirty-bitmap-add", bitmap("old"), &[]).await;
        self.say("block-dirty-bitmap-add", bitmap("old"), &[]).await;
        self.say("stop", Value::Null, &[]).await;
        let act = |kind: &str, data: Value| json!({ "type": kind, "data": data });
        let name = |name: &str| json!({ "node": "d0-node", "name": name });
        // All or nothing.
        let wrong = json!([
            act("block-dirty-bitmap-add", bitmap("new")),
            act("block-dirty-bitmap-disable", name("none"))
        ]);
        self.say("transaction", json!({ "actions": wrong }), &[]).await;
        let right = json!([
            act("block-dirty-bitmap-add", bitmap("new")),
            act("block-dirty-bitmap-disable", name("old"))
        ]);
        self.say("transaction", json!({ "actions": right }), &[]).await;
        let of = |bitmap: &str, field: &str| {
            format!("node-name=d0-node/dirty-bitmaps/name={bitmap}/{field}")
        };
        let read = [
            of("old", "recording!"),
            of("new", "recording!"),
            of("new", "granularity!"),
            of("new", "count"),
        ];
        self.say(
            "query-named-block-nodes",
            json!({ "flat": true }),
            &read.each_ref().map(String::as_str),
        )
        .await;
        let device = self.qmp.execute_json("query-block", Value::Null).await.expect("disks");
        let device = find(&device, "device=d0/qdev").as_str().expect("a device").to_owned();
        for node in ["none", "filter"] {
            let arguments = json!({ "path": device, "property": "drive", "value": node });
            self.say("qom-set", arguments, &[]).await;
        }
        self.say("query-block", Value::Null, &["device=d0/inserted/node-name!"]).await;
        let read = ["nodes/name=filter/type!", "edges/name=target/child"];
        self.say("x-debug-query-block-graph", Value::Null, &read).await;
        self.say(
            "blockdev-add",
            json!({ "driver": "snapshot-access", "node-name": "access", "file": "filter" }),
            &[],
        )
        .await;
        self.say("cont", Value::Null, &[]).await;
    }

    async fn take_apart(&mut self) {
        for node in ["access", "filter", "over-file"] {
            self.say("blockdev-del", json!({ "node-name": node }), &[]).await;
        }
        for export in ["then", "then", "live"] {
            self.say("block-export-del", json!({ "id": export, "mode": "hard" }), &[]).await;
            while self
                .qmp
                .execute_json("query-block-exports", Value::Null)
                .await
                .expect("exports")
                .as_array()
                .is_some_and(|list| list.iter().any(|row| row["id"] == export))
            {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        self.say("blockdev-del", json!({ "node-name": "access" }), &[]).await;
        let device = self.qmp.execute_json("query-block", Value::Null).await.expect("disks");
        let device = find(&device, "device=d0/qdev").as_str().expect("a device").to_owned();
        self.say(
            "qom-set",
            json!({ "path": device, "property": "drive", "value": "d0-node" }),
            &[],
        )
        .await;
        for node in ["filter", "over", "over-file", "over-file"] {
            self.say("blockdev-del", json!({ "node-name": node }), &[]).await;
        }
        let merge = json!({ "node": "d0-node", "target": "old", "bitmaps": ["new"] });
        let actions = json!([
            { "type": "block-dirty-bitmap-merge", "data": merge },
            { "type": "block-dirty-bitmap-enable", "data": { "node": "d0-node", "name": "old" } },
            { "type": "block-dirty-bitmap-remove", "data": { "node": "d0-node", "name": "new" } },
        ]);
        self.say("transaction", json!({ "actions": actions }), &[]).await;
        self.say("nbd-server-stop", Value::Null, &[]).await;
        self.say("nbd-server-stop", Value::Null, &[]).await;
        self.say("block-job-cancel", json!({ "device": "none", "force": true }), &[]).await;
    }

    async fn read_export(&mut self, socket: &Path, export: &str, contexts: &[&str]) {
        let client = NbdClient::connect(socket, export, contexts).await.expect("an export");
        self.note(format!(
            "export {export}: {} bytes, read-only {}",
            client.size(),
            client.is_read_only()
        ));
        client.flush().await.expect("flushed");
        let read = client.read(4096, 8192).await.expect("read");
        self.note(format!(
            "export {export}: {:?}",
            read.iter().map(|byte| u64::from(*byte)).sum::<u64>()
        ));
        if !contexts.is_empty() {
            for of in client.block_status(0, DISK_BYTES).await.expect("a status") {
                // Where a file system has holes is its own.
                let flags: Vec<u32> = match of.context.as_str() {
                    context::BASE_ALLOCATION => Vec::new(),
                    _ => of.extents.iter().map(|extent| extent.flags).collect(),
                };
                self.note(format!("export {export}: {} {flags:?}", of.context));
            }
        }
        client.close().await;
        let nothing = NbdClient::connect(socket, "none", &[]).await;
        self.note(format!("no such export: {}", nothing.is_err()));
    }

    async fn device_state(&mut self) {
        let path = self.directory.join("state");
        let file =
            File::options().write(true).create(true).truncate(true).open(&path).expect("a file");
        let set =
            self.give("add-fd", json!({ "opaque": "state" }), &file).await["fdset-id"].clone();
        self.say("stop", Value::Null, &[]).await;
        let filename = format!("/dev/fdset/{set}");
        let saved = self
            .qmp
            .execute_json("xen-save-devices-state", json!({ "filename": filename, "live": false }));
        saved.await.expect("saved");
        self.say("cont", Value::Null, &[]).await;
        let bytes = std::fs::read(&path).expect("QEMU wrote it");
        let state = qmp_bridge::device_state::DeviceState::from_bytes(bytes);
        let ours = state.and_then(|state| state.with_run_state(qmp_bridge::RunState::Paused));
        self.note(format!("device state: {}", ours.is_ok()));
    }

    async fn migration(&mut self) {
        let read = [
            "max-bandwidth!",
            "downtime-limit!",
            "tls-creds!",
            "mode!",
            "avail-switchover-bandwidth!",
            "zero-page-detection!",
        ];
        self.say("query-migrate-parameters", Value::Null, &read).await;
        let read =
            ["events", "pause-before-switchover", "background-snapshot", "late-block-activate"]
                .map(|name| format!("capability={name}/state!"));
        self.say("query-migrate-capabilities", Value::Null, &read.each_ref().map(String::as_str))
            .await;
        self.say("query-migrate", Value::Null, &["status!", "blocked-reasons!"]).await;
        self.say("migrate_cancel", Value::Null, &[]).await;
        self.say("migrate-continue", json!({ "state": "pre-switchover" }), &[]).await;
        self.say("migrate", json!({ "uri": "fd:none" }), &[]).await;
        self.say("query-migrate", Value::Null, &["status!", "error-desc"]).await;
        self.say(
            "migrate-set-capabilities",
            json!({ "capabilities": [{ "capability": "none", "state": true }] }),
            &[],
        )
        .await;
        let on = ["events", "pause-before-switchover"]
            .map(|name| json!({ "capability": name, "state": true }));
        self.say("migrate-set-capabilities", json!({ "capabilities": on }), &[]).await;
        self.say("migrate-set-parameters", json!({ "none": 1 }), &[]).await;
        self.say("migrate-set-parameters", json!({ "max-bandwidth": 1u64 << 40 }), &[]).await;
        self.completed_migration().await;
        self.cancelled_migration().await;
        self.failed_migration().await;
    }

    /// A migration whose stream is read, or not, by another thread.
    async fn migrate(&mut self, reads: bool) {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        self.give("getfd", json!({ "fdname": "stream" }), &theirs).await;
        drop(theirs);
        if reads {
            std::thread::spawn(move || std::io::copy(&mut &ours, &mut std::io::sink()));
        }
        self.say("migrate", json!({ "uri": "fd:stream" }), &[]).await;
    }

    async fn completed_migration(&mut self) {
        self.migrate(true).await;
        self.wait("query-migrate", "status", &["pre-switchover"]).await;
        self.say("query-status", Value::Null, &["status!"]).await;
        self.say("cont", Value::Null, &[]).await;
        self.say("migrate", json!({ "uri": "fd:none" }), &[]).await;
        self.say("migrate-continue", json!({ "state": "pre-switchover" }), &[]).await;
        let done = self.wait("query-migrate", "status", &["completed"]).await;
        let read =
            ["total", "remaining", "normal", "duplicate", "dirty-sync-count", "page-size", "mbps"];
        for field in read {
            self.note(format!("ram/{field} {}", kind(&done["ram"][field])));
        }
        self.wait("query-status", "status", &["postmigrate"]).await;
        let bitmap = json!({ "node": "d0-node", "name": "late", "granularity": 4096 });
        let actions = json!([{ "type": "block-dirty-bitmap-add", "data": bitmap }]);
        self.say("transaction", json!({ "actions": actions }), &[]).await;
        self.say("blockdev-set-active", json!({ "active": true }), &[]).await;
        self.say("migrate", json!({ "uri": "fd:none" }), &[]).await;
        self.say("cont", Value::Null, &[]).await;
        self.say("query-status", Value::Null, &["status!"]).await;
    }

    async fn cancelled_migration(&mut self) {
        self.migrate(true).await;
        self.wait("query-migrate", "status", &["pre-switchover"]).await;
        self.say("migrate_cancel", Value::Null, &[]).await;
        self.wait("query-migrate", "status", &["cancelled"]).await;
        self.wait("query-status", "status", &["running"]).await;
        self.note_events();
    }

    async fn failed_migration(&mut self) {
        self.migrate(false).await;
        let failed = self.wait("query-migrate", "status", &["failed"]).await;
        self.note(format!("failed with {}", kind(&failed["error-desc"])));
        self.say("query-status", Value::Null, &["status!"]).await;
        self.say("closefd", json!({ "fdname": "stream" }), &[]).await;
    }
}

async fn talk(socket: &Path, directory: &Path) -> Vec<String> {
    let qmp = Qmp::connect(socket, TIMEOUT).await.expect("a monitor");
    let events = qmp.events();
    std::fs::create_dir_all(directory).expect("a directory");
    let mut conversation =
        Conversation { qmp, events, directory: directory.to_owned(), transcript: Vec::new() };
    conversation.facts().await;
    conversation.list_disks().await;
    conversation.run_state().await;
    conversation.capture().await;
    conversation.device_state().await;
    conversation.migration().await;
    conversation.transcript
}

/// A disk of which one page is not zero.
fn disk() -> Vec<u8> {
    let mut content = vec![0; usize::try_from(DISK_BYTES).expect("small")];
    content[4096..8192].fill(3);
    content
}

#[test]
fn agrees_with_qemu() {
    on_each_qemu(|program| {
        let lab = Lab::new(program);
        let image = lab.path().join("d0.img");
        std::fs::write(&image, disk()).expect("a disk");
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let (socket, other) = (lab.path().join("qmp"), lab.path().join("scripted"));
        let _qemu = start(program, &image, &socket);
        let real = runtime.block_on(talk(&socket, &lab.path().join("real")));
        let version = if major_version(program) >= 10 { Version::V10_0 } else { Version::V7_2 };
        let scripted = ScriptedQemu::new(version, Ram::plain(RAM_PAGES));
        scripted.with(|state| {
            state.blocks.add_disk("d0", &image, disk(), false);
            state.devices.push(("/machine/peripheral/d0-dev".into(), "virtio-blk-pci".into()));
        });
        scripted.listen(&other).expect("a socket");
        let ours = runtime.block_on(talk(&other, &lab.path().join("ours")));
        let differs = real.iter().zip(&ours).filter(|(real, ours)| real != ours);
        let differs: Vec<_> =
            differs.map(|(real, ours)| format!("QEMU:     {real}\nscripted: {ours}")).collect();
        assert!(
            differs.is_empty() && real.len() == ours.len(),
            "{} and {} lines\n{}",
            real.len(),
            ours.len(),
            differs.join("\n")
        );
    });
}
