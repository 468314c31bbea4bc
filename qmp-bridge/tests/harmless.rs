//! What a capture must not harm: the objects of others in the same QEMU, and the guest's writes.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use common::{TestQemu, with_each_qemu};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use qmp_bridge::capture::{CaptureError, CapturePlan, CapturedDisks, PreparedDisks};
use qmp_bridge::disks;
use qmp_bridge::nbd::NbdClient;
use qmp_bridge::{Paused, ServerError};
use serde_json::{Value, json};

const DISK: u64 = 8 << 20;
const EMPTY: Value = Value::Null;

async fn start(qemu: &Path) -> TestQemu {
    let directory = tempfile::tempdir().expect("directory");
    std::fs::write(directory.path().join("disk.raw"), vec![0x11; DISK as usize]).expect("disk");
    let drive = "if=none,id=disk,node-name=stillpoint-data,file=disk.raw,format=raw";
    let object = "throttle-group,id=stillpoint-paused";
    TestQemu::start_in(
        qemu,
        &[
            "-M",
            "q35",
            "-m",
            "16",
            "-drive",
            drive,
            "-device",
            "ide-hd,drive=disk",
            "-object",
            object,
        ],
        directory,
    )
    .await
}

fn plan(vm: &TestQemu, id: u64, fleecing_dir: &Path) -> CapturePlan {
    CapturePlan {
        tag: common::INSTANCE.parse().expect("tag"),
        checkpoint: common::checkpoint(id),
        parent: id.checked_sub(1).filter(|parent| *parent > 0),
        fleecing_dir: fleecing_dir.into(),
        fleecing_reserve: 0,
        nbd_socket: vm.path("nbd.sock"),
        streamed: false,
    }
}

async fn prepare(vm: &TestQemu, plan: CapturePlan) -> Result<PreparedDisks, CaptureError> {
    let list = disks::list(&vm.qmp, Some(vm.directory.path())).await.expect("disks");
    PreparedDisks::prepare(&vm.qmp, &list.disks, plan).await
}

async fn capture(vm: &TestQemu, plan: CapturePlan) -> CapturedDisks {
    let prepared = prepare(vm, plan).await.expect("prepare");
    let paused = Paused::stop(&vm.qmp).await.expect("stop");
    let mut captured = prepared.capture(&paused).await.expect("pause");
    paused.resume().await.expect("resume");
    captured.export().await.expect("export");
    captured
}

async fn assert_holds(captured: &CapturedDisks, pattern: u8) {
    let client = captured.connect(&captured.disks()[0]).await.expect("connect");
    assert_eq!(client.read(0, 1 << 20).await.expect("read"), vec![pattern; 1 << 20]);
    client.close().await;
    captured.verify().await.expect("verify");
}

/// Everything in QEMU that has a name, and each device's node.
async fn inventory(vm: &TestQemu) -> Vec<String> {
    let mut found = Vec::new();
    for (command, arguments, field) in [
        ("query-block-exports", EMPTY, "id"),
        ("query-jobs", EMPTY, "id"),
        ("query-named-block-nodes", json!({ "flat": true }), "node-name"),
        ("qom-list", json!({ "path": "/objects" }), "name"),
    ] {
        let rows = vm.qmp.execute_json(command, arguments).await.expect(command);
        found.extend(
            rows.as_array()
                .expect("list")
                .iter()
                .filter_map(|row| row[field].as_str().map(Into::into)),
        );
        let bitmaps = rows
            .as_array()
            .expect("list")
            .iter()
            .flat_map(|row| row["dirty-bitmaps"].as_array())
            .flatten();
        found.extend(bitmaps.filter_map(|bitmap| bitmap["name"].as_str().map(Into::into)));
    }
    let block = vm.qmp.execute_json("query-block", EMPTY).await.expect("drives");
    found.extend(
        block
            .as_array()
            .expect("list")
            .iter()
            .map(|row| format!("inserted: {}", row["inserted"]["node-name"])),
    );
    found.retain(|name: &String| !name.starts_with("stillpoint/test-1/"));
    found.sort();
    found
}

async fn execute(vm: &TestQemu, command: &str, arguments: Value) {
    vm.qmp.execute_json(command, arguments).await.expect(command);
}

async fn serves(socket: &Path, export: &str) -> bool {
    match NbdClient::connect(socket, export, &[]).await {
        Ok(client) => client.read(0, 512).await.is_ok(),
        Err(_) => false,
    }
}

#[tokio::test]
async fn capture_leaves_objects_of_others_as_they_were() {
    with_each_qemu(async |qemu| {
        let vm = start(&qemu).await;
        let directory = vm.directory.path().to_owned();
        // Names that begin like ours, or are what an earlier release gave.
        execute(&vm, "blockdev-add", json!({ "driver": "null-co", "node-name": "stillpoint-tgt" })).await;
        execute(&vm, "blockdev-add", json!({ "driver": "null-co", "node-name": "sp-data" })).await;
        execute(&vm, "blockdev-add", json!({ "driver": "null-co", "node-name": "stillpoint-1-0-f" })).await;
        for name in ["stillpoint/other/1", "stillpoint/test-1x/1", "theirs"] {
            execute(&vm, "block-dirty-bitmap-add", json!({ "node": "stillpoint-data", "name": name })).await;
        }
        execute(&vm, "object-add", json!({ "qom-type": "throttle-group", "id": "stillpoint-at-home" })).await;
        let job =
            json!({ "job-id": "stillpoint-1-0-create", "options": { "driver": "file", "filename": directory.join("x"), "size": 512 } });
        execute(&vm, "blockdev-create", job).await;
        let before = inventory(&vm).await;
        capture(&vm, plan(&vm, 1, &directory)).await.restore().await.expect("restore");
        assert_eq!(inventory(&vm).await, before);

        // Their server: refused by the name of their export, and nothing of it is touched.
        let theirs = directory.join("theirs.sock");
        execute(&vm, "nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": theirs } } })).await;
        let export = |id: &str| json!({ "type": "nbd", "id": id, "node-name": "stillpoint-data", "name": id });
        execute(&vm, "block-export-add", export("theirs")).await;
        let with_server = inventory(&vm).await;
        let error = prepare(&vm, plan(&vm, 1, &directory)).await.expect_err("their server is in the way");
        assert!(error.to_string().contains("`theirs`"), "{error}");
        assert!(matches!(&error, CaptureError::Server(ServerError::InUse { exports }) if exports == &["theirs"]), "{error:?}");
        assert_eq!(inventory(&vm).await, with_server);
        assert!(serves(&theirs, "theirs").await);
        execute(&vm, "nbd-server-stop", EMPTY).await;

        // An export that they add to our server stays, and the next capture works beside it.
        let captured = capture(&vm, plan(&vm, 1, &directory)).await;
        execute(&vm, "block-export-add", export("late")).await;
        vm.write_disk("disk", 0x22, 0, 1 << 20).await;
        assert_holds(&captured, 0x11).await;
        common::acknowledge(captured).await;
        assert!(serves(&vm.path("nbd.sock"), "late").await);
        let captured = capture(&vm, plan(&vm, 2, &directory)).await;
        assert_holds(&captured, 0x22).await;
        execute(&vm, "block-export-del", json!({ "id": "late" })).await;
        common::acknowledge(captured).await;
        assert_eq!(inventory(&vm).await, before);
        // The server is gone too: another tool can have its own.
        execute(&vm, "nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": theirs } } })).await;
    })
    .await;
}

/// A file system of its own, thawed and unmounted at the end whatever happens.
struct Mounted {
    path: PathBuf,
    watchdog: Option<Child>,
}

impl Mounted {
    fn new(path: PathBuf, arguments: &[&str]) -> Self {
        std::fs::create_dir(&path).expect("a directory");
        run(Command::new("mount").args(arguments).arg(&path));
        Self { path, watchdog: None }
    }

    fn hang(&mut self) {
        let thaw = format!("sleep 60; fsfreeze -u '{}'", self.path.display());
        self.watchdog = Some(Command::new("sh").args(["-c", &thaw]).spawn().expect("a watchdog"));
        run(Command::new("fsfreeze").arg("-f").arg(&self.path));
    }

    fn answer(&mut self) {
        if let Some(mut watchdog) = self.watchdog.take() {
            run(Command::new("fsfreeze").arg("-u").arg(&self.path));
            watchdog.kill().and_then(|()| watchdog.wait()).expect("our child");
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.answer();
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

fn run(command: &mut Command) {
    let status = command.status();
    assert!(status.as_ref().is_ok_and(|status| status.success()), "{command:?}: {status:?}");
}

/// The guest's write is done, and done in time, whatever the overlays' directory does.
async fn assert_written(vm: &TestQemu, pattern: u8) {
    let begun = Instant::now();
    vm.write_disk("disk", pattern, 0, DISK).await;
    vm.qemu_io("disk", "flush").await;
    assert!(begun.elapsed() < Duration::from_secs(15), "the guest waited {:?}", begun.elapsed());
    let log = vm.log();
    assert!(!log.contains("write failed") && !log.contains("No space"), "{log}");
    let content = std::fs::read(vm.path("disk.raw")).expect("disk");
    assert!(content.iter().all(|byte| *byte == pattern), "the write is not in the disk");
}

async fn works_again(vm: &TestQemu, directory: &Path, pattern: u8) {
    let deadline = Instant::now() + Duration::from_secs(30);
    let prepared = loop {
        match prepare(vm, plan(vm, 1, directory)).await {
            Ok(prepared) => break prepared,
            Err(error) => assert!(error.is_retryable() && Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    prepared.discard().await.expect("discard");
    let captured = capture(vm, plan(vm, 1, directory)).await;
    assert_holds(&captured, pattern).await;
    captured.restore().await.expect("restore");
}

fn assert_root(what: &str) {
    let is_root = nix::unistd::geteuid().is_root();
    assert!(is_root, "{what} needs root: sudo -E env PATH=$PATH cargo test --workspace -- TEST");
}

#[tokio::test]
async fn capture_overlay_directory_that_is_full_costs_no_write() {
    assert_root("mounting a tmpfs");
    with_each_qemu(async |qemu| {
        let vm = start(&qemu).await;
        let before = inventory(&vm).await;
        let full = Mounted::new(vm.path("full"), &["-t", "tmpfs", "-o", "size=2m", "none"]);
        let captured = capture(&vm, plan(&vm, 1, &full.path)).await;
        assert_written(&vm, 0x33).await;
        assert!(
            captured
                .connect(&captured.disks()[0])
                .await
                .expect("connect")
                .read(0, 4096)
                .await
                .is_err()
        );
        let error = captured.verify().await.expect_err("broken");
        assert!(
            matches!(error, CaptureError::Broken { .. }) && error.to_string().contains("/full"),
            "{error}"
        );
        captured.restore().await.expect("restore");
        assert_eq!(inventory(&vm).await, before);
        works_again(&vm, vm.directory.path(), 0x33).await;
    })
    .await;
}

/// As after an error of the disk below: each write to the file system fails with EIO.
#[tokio::test]
async fn capture_overlay_directory_with_io_errors_costs_no_write() {
    assert_root("mounting a file system");
    with_each_qemu(async |qemu| {
        let vm = start(&qemu).await;
        let before = inventory(&vm).await;
        let image = ext4(&vm);
        let broken = Mounted::new(vm.path("broken"), &["-o", "loop", &image]);
        let captured = capture(&vm, plan(&vm, 1, &broken.path)).await;
        // EXT4_IOC_SHUTDOWN without writing the log.
        let shutdown = "my $how = pack('L', 2); open(my $d, '<', $ARGV[0]) || die $!; ioctl($d, 0x8004587d, $how) || die $!";
        run(Command::new("perl").args(["-e", shutdown]).arg(&broken.path));
        assert!(std::fs::write(broken.path.join("x"), "x").is_err_and(|error| error.raw_os_error() == Some(5)));
        assert_written(&vm, 0x66).await;
        let error = captured.verify().await.expect_err("broken");
        assert!(matches!(error, CaptureError::Broken { .. }) && error.to_string().contains("/broken"), "{error}");
        captured.restore().await.expect("restore");
        assert_eq!(inventory(&vm).await, before);
        let error = prepare(&vm, plan(&vm, 1, &broken.path)).await.expect_err("no overlay can be made");
        assert!(matches!(error, CaptureError::Fleecing { .. }), "{error}");
        assert_eq!(inventory(&vm).await, before);
        works_again(&vm, vm.directory.path(), 0x66).await;
    })
    .await;
}

/// The overlay's write-back fails, as on a full thin pool, and the kernel evicts its pages. Reads
/// succeed, with other data.
#[tokio::test]
async fn capture_overlay_whose_write_back_failed_breaks_it() {
    assert_root("mounting a file system");
    with_each_qemu(async |qemu| {
        // Without a journal the file system stays writable, and only `fsync` reports the error.
        for (name, features) in [("journal", "has_journal"), ("none", "^has_journal")] {
            let vm = start(&qemu).await;
            let before = inventory(&vm).await;
            let pool = Mounted::new(vm.path(name), &["-t", "tmpfs", "-o", "size=24m", "none"]);
            let image = pool.path.join("ext4.img");
            std::fs::File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("image");
            run(Command::new("mkfs.ext4").args(["-q", "-O", features]).arg(&image));
            let image = image.to_str().expect("UTF-8");
            let overlays =
                Mounted::new(vm.path("overlays"), &["-o", "loop,errors=continue", image]);
            let mut captured = capture(&vm, plan(&vm, 1, &overlays.path)).await;
            fill(&pool.path);
            assert_written(&vm, 0x77).await;
            write_back_and_evict(&vm, &overlays.path);
            // From here on each write succeeds: what is reported is what happened before.
            std::fs::remove_file(pool.path.join("fill")).expect("room");
            captured.verify().await.expect("no read fails");
            let error = captured.release().await.expect_err("broken");
            assert!(matches!(error, CaptureError::Broken { .. }), "{error}");
            assert!(error.to_string().contains("/overlays"), "{error}");
            captured.restore().await.expect("restore");
            assert_eq!(inventory(&vm).await, before);
            works_again(&vm, vm.directory.path(), 0x77).await;
        }
    })
    .await;
}

fn fill(directory: &Path) {
    let mut file = std::fs::File::create(directory.join("fill")).expect("fill");
    let error = std::io::copy(&mut std::io::repeat(1), &mut file).expect_err("full");
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{error}");
}

/// Through QEMU's own descriptor, since the overlay's file has no name.
fn write_back_and_evict(vm: &TestQemu, directory: &Path) {
    // It fails too, for the block device; the overlay's descriptors still report their own error.
    let _ = Command::new("sync").arg("-f").arg(directory).status();
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).expect("descriptors");
    let mut overlays = 0;
    for descriptor in descriptors {
        let descriptor = descriptor.expect("descriptor").path();
        if std::fs::read_link(&descriptor).is_ok_and(|target| target.starts_with(directory)) {
            let file = std::fs::File::open(&descriptor).expect("overlay");
            let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
            posix_fadvise(&file, 0, 0, advice).expect("evict");
            overlays += 1;
        }
    }
    assert!(overlays > 0, "QEMU has no overlay open");
}

fn ext4(vm: &TestQemu) -> String {
    let image = vm.path("ext4.img");
    std::fs::File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("image");
    run(Command::new("mkfs.ext4").arg("-q").arg(&image));
    image.to_str().expect("UTF-8").to_owned()
}

#[tokio::test]
async fn capture_overlay_directory_that_hangs_costs_no_write() {
    assert_root("mounting a file system");
    with_each_qemu(async |qemu| {
        let vm = start(&qemu).await;
        let before = inventory(&vm).await;
        let image = ext4(&vm);
        let mut hung = Mounted::new(vm.path("hung"), &["-o", "loop", &image]);
        let captured = capture(&vm, plan(&vm, 1, &hung.path)).await;
        hung.hang();
        assert_written(&vm, 0x44).await;
        assert!(matches!(captured.verify().await, Err(CaptureError::Broken { .. })));
        // Taking the capture apart would wait for the directory, and QEMU with it.
        let error = captured.restore().await.expect_err("hung");
        assert!(matches!(error, CaptureError::Hung { .. }), "{error}");
        let begun = Instant::now();
        let error = prepare(&vm, plan(&vm, 1, vm.directory.path()))
            .await
            .expect_err("the first is still there");
        assert!(
            matches!(error, CaptureError::Hung { .. }) && begun.elapsed() < Duration::from_secs(5),
            "{error}"
        );
        assert_written(&vm, 0x55).await;
        hung.answer();
        works_again(&vm, &hung.path, 0x55).await;
        assert_eq!(inventory(&vm).await, before);
    })
    .await;
}
