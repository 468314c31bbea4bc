//! Our NBD server and the images that it exports, with the clients that the field has: qemu-img,
//! libnbd's tools, and QEMU itself, which streams such an image into an overlay.

mod common;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use checkpoint_format::{PageIndex, PageRange};
use common::{INSTANCE, TestQemu, with_each_qemu};
use futures::future::BoxFuture;
use qmp_bridge::Qmp;
use qmp_bridge::arriving::{self, ArrivingDisk};
use qmp_bridge::disks::{self, ImageFormat};
use qmp_bridge::images::{Backing, BackingMode, ImageSpec, ImageWorker};
use qmp_bridge::nbd::server::{Export, ExportError, Exports, NbdServer};
use qmp_bridge::nbd::{Content, Extent, ZeroMode};
use qmp_bridge::synthetic_qcow2::{OwnPages, OwnRun, SyntheticQcow2};
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::watch;

const PAGE: u64 = 4096;
/// No whole page at the end.
const DISK: u64 = (24 << 20) + 1024;
/// The image below is shorter than the disk.
const BASE: u64 = 20 << 20;

/// A disk's pages: data whose bytes all tell the page's number, zeros, or nothing.
#[derive(Debug, Clone)]
struct Pages {
    content: Arc<BTreeMap<u64, Content>>,
    /// Reads beyond this byte wait.
    readable: watch::Receiver<u64>,
}

fn byte_of(page: u64) -> u8 {
    (page % 239) as u8 + 1
}

impl Pages {
    /// Runs of all sizes and states, the last page among them.
    fn new() -> (Self, watch::Sender<u64>) {
        let (sender, readable) = watch::channel(u64::MAX);
        let mut content = BTreeMap::new();
        let mut page = 3;
        for step in 1..60u64 {
            let kind = if step % 4 == 0 { Content::Zero } else { Content::Data };
            content.extend((page..page + step % 23 + 1).map(|page| (page, kind)));
            page += step % 23 + 1 + (step * 7) % 90;
        }
        let last = DISK.div_ceil(PAGE) - 1;
        content.retain(|page, _| *page < last);
        content.insert(last, Content::Data);
        (Self { content: Arc::new(content), readable }, sender)
    }

    fn of(&self, content: Content) -> impl Iterator<Item = u64> + use<'_> {
        self.content.iter().filter(move |(_, kind)| **kind == content).map(|(page, _)| *page)
    }
}

impl OwnPages for Pages {
    fn locate(&self, pages: PageRange) -> BoxFuture<'_, Result<Vec<OwnRun>, ExportError>> {
        let run = |page| {
            let pages = PageRange::new(PageIndex(page), PageIndex(page + 1));
            OwnRun { pages, content: self.content.get(&page).copied() }
        };
        let runs = (pages.start.0..pages.end.0).map(run).collect();
        Box::pin(async move { Ok(runs) })
    }

    fn read(&self, bytes: Range<u64>) -> BoxFuture<'_, Result<Bytes, ExportError>> {
        let mut readable = self.readable.clone();
        Box::pin(async move {
            let gone = readable.wait_for(|until| bytes.end <= *until).await.is_err();
            assert!(!gone, "the test is over");
            Ok(bytes.map(|at| byte_of(at / PAGE)).collect::<Vec<u8>>().into())
        })
    }
}

/// A plain export.
struct Flat(Vec<u8>);

impl Export for Flat {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ExportError>> {
        let bytes = self.0[range.start as usize..range.end as usize].to_vec();
        Box::pin(async move { Ok(bytes.into()) })
    }

    fn status(&self, range: Range<u64>) -> BoxFuture<'_, Result<Vec<Extent>, ExportError>> {
        let mut extents = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let end = (at / 65536 + 1) * 65536;
            let end = end.min(self.size());
            let is_zero = self.0[at as usize..end as usize].iter().all(|byte| *byte == 0);
            extents.push(Extent { start: at, end, flags: if is_zero { 3 } else { 0 } });
            at = end;
        }
        Box::pin(async move { Ok(extents) })
    }
}

fn serve(socket: &Path, export: impl Export + 'static) -> NbdServer {
    let _ = std::fs::remove_file(socket);
    let export: Arc<dyn Export> = Arc::new(export);
    let exports = Exports::new([("disk".to_owned(), export)].into()).expect("exports");
    NbdServer::start(UnixListener::bind(socket).expect("socket"), exports)
}

/// Runs a program of QEMU's, the one beside the emulator, or of the PATH, while the server serves.
async fn run(qemu: &Path, name: &str, directory: &Path, arguments: &[&str]) -> Output {
    let beside = qemu.with_file_name(name);
    let program: PathBuf = if beside.exists() { beside } else { name.into() };
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).current_dir(directory).kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(60), command.output()).await;
    let output = output.unwrap_or_else(|_| panic!("{name} {arguments:?} hangs"));
    output.unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The same of a run that must go well.
async fn tool(qemu: &Path, name: &str, directory: &Path, arguments: &[&str]) -> Output {
    let output = run(qemu, name, directory, arguments).await;
    let text = [&output.stdout[..], &output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{name} {arguments:?}: {text}");
    output
}

fn parse(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[tokio::test]
async fn nbd_server_serves_qemu_and_libnbd() {
    let mut content = vec![0; 9 << 20];
    for (at, byte) in content.iter_mut().enumerate().filter(|(at, _)| at % (3 << 20) < (1 << 20)) {
        *byte = (at / 4096 % 250) as u8 + 1;
    }
    with_each_qemu(async |qemu| {
        let directory = tempfile::tempdir().expect("directory");
        let dir = directory.path();
        let _server = serve(&dir.join("s"), Flat(content.clone()));
        std::fs::write(dir.join("flat"), &content).expect("write");
        let url = "nbd+unix:///disk?socket=s";
        let convert = ["convert", "-f", "raw", "-O", "raw", url, "copy"];
        tool(&qemu, "qemu-img", dir, &convert).await;
        assert!(std::fs::read(dir.join("copy")).expect("copy") == content);
        tool(&qemu, "qemu-img", dir, &["compare", "-f", "raw", "-F", "raw", url, "flat"]).await;
        let map = tool(&qemu, "qemu-img", dir, &["map", "-f", "raw", "--output=json", url]).await;
        let zeros = parse(&map);
        let zeros: Vec<_> =
            zeros.as_array().expect("list").iter().map(|run| &run["zero"]).collect();
        assert_eq!(zeros, [false, true, false, true, false, true]);
        let read = ["-r", "-f", "raw", "-c", "read -P 1 0 4k", "-c", "read -P 5 1016k 1k", url];
        let output = tool(&qemu, "qemu-io", dir, &read).await;
        assert!(!String::from_utf8_lossy(&output.stdout).contains("failed"), "{output:?}");
        let write = ["-f", "raw", "-c", "write 0 4k", url];
        let refused = run(&qemu, "qemu-io", dir, &write).await;
        assert!(!refused.status.success(), "it cannot be written");
        // In Debian's libnbd-bin.
        let installed = Command::new("nbdinfo").arg("--version").output();
        assert!(installed.is_ok(), "nbdinfo is missing: scripts/install-deps");
        let info = parse(&tool(&qemu, "nbdinfo", dir, &["--json", url]).await);
        let export = &info["exports"][0];
        assert_eq!(info["structured"], true);
        assert_eq!((&export["is_read_only"], &export["can_df"]), (&true.into(), &true.into()));
        assert_eq!(export["contexts"], json!(["base:allocation"]));
        let list = parse(&tool(&qemu, "nbdinfo", dir, &["--list", "--json", url]).await);
        assert_eq!(list["exports"][0]["export-name"], "disk");
        tool(&qemu, "nbdcopy", dir, &[url, "copied"]).await;
        assert!(std::fs::read(dir.join("copied")).expect("copied") == content);
    })
    .await;
}

/// The layers below, and an image on them that has the pages as a restore writes them today.
async fn make_eager(worker: &mut ImageWorker, dir: &Path, pages: &Pages) -> Backing {
    let spec = |name: &str, size, backing| ImageSpec {
        path: dir.join(name),
        format: ImageFormat::Qcow2,
        virtual_size: size,
        backing,
        layout: None,
    };
    worker.create(&spec("base.qcow2", BASE, None)).await.expect("base");
    let base = worker.open(&dir.join("base.qcow2"), ImageFormat::Qcow2, BackingMode::Chain).await;
    let base = base.expect("open");
    for at in [0, 5 << 20, 19 << 20] {
        base.client.write(at, vec![0xee; 1 << 20].into()).await.expect("write");
    }
    worker.close(base).await.expect("close");
    let below = json!({
        "driver": "qcow2", "backing": null,
        "file": { "driver": "file", "filename": dir.join("base.qcow2").to_str().expect("text") },
    });
    let backing = Backing { file: format!("json:{below}"), format: ImageFormat::Qcow2 };
    worker.create(&spec("eager.qcow2", DISK, Some(backing.clone()))).await.expect("eager");
    let eager = worker.open(&dir.join("eager.qcow2"), ImageFormat::Qcow2, BackingMode::Chain).await;
    let eager = eager.expect("open");
    for page in pages.of(Content::Zero) {
        eager.client.write_zeroes(page * PAGE, PAGE, ZeroMode::Allocated).await.expect("zeroes");
    }
    for page in pages.of(Content::Data) {
        let length = PAGE.min(DISK - page * PAGE) as usize;
        let data = vec![byte_of(page); length];
        eager.client.write(page * PAGE, data.into()).await.expect("write");
    }
    worker.close(eager).await.expect("close");
    backing
}

#[tokio::test]
async fn synthetic_image_is_sound_and_has_the_content() {
    with_each_qemu(async |qemu| {
        let directory = tempfile::tempdir().expect("directory");
        let dir = directory.path();
        let (pages, _sender) = Pages::new();
        let mut worker = ImageWorker::start(&qemu, dir).await.expect("worker");
        let backing = make_eager(&mut worker, dir, &pages).await;
        worker.shutdown().await.expect("shutdown");
        let image = SyntheticQcow2::new(DISK, Some(&backing), pages.clone()).expect("image");
        let _server = serve(&dir.join("s"), image);
        let url = "nbd+unix:///disk?socket=s";
        let check = ["check", "-f", "qcow2", "--output=json", url];
        let check = parse(&tool(&qemu, "qemu-img", dir, &check).await);
        for fault in ["corruptions", "leaks", "check-errors"] {
            assert!(check[fault] == 0 || check[fault].is_null(), "{check}");
        }
        assert_eq!(check["allocated-clusters"], pages.of(Content::Data).count());
        let compare = ["compare", "-f", "qcow2", "-F", "qcow2", url, "eager.qcow2"];
        tool(&qemu, "qemu-img", dir, &compare).await;
        // Of the pages in the image itself: as many, and where they are in the file.
        let map = ["map", "-f", "qcow2", "--output=json", url];
        let map = parse(&tool(&qemu, "qemu-img", dir, &map).await);
        let own = map.as_array().expect("list").iter().filter(|run| run["depth"] == 0);
        let (mut data, mut zeros) = (0, 0);
        for run in own {
            let (start, length) = (run["start"].as_u64(), run["length"].as_u64());
            // Beyond the end of what is below all is zeros of the image itself.
            let end = (start.expect("start") + length.expect("length")).min(BASE);
            let length = end.saturating_sub(start.expect("start"));
            if run["zero"] == true { zeros += length } else { data += length }
        }
        let below = |kind| pages.of(kind).filter(|page| page * PAGE < BASE).count() as u64 * PAGE;
        assert_eq!((data, zeros), (below(Content::Data), below(Content::Zero)));
        let info = ["info", "-U", "-f", "qcow2", "--output=json", url];
        let info = parse(&tool(&qemu, "qemu-img", dir, &info).await);
        assert_eq!(info["backing-filename"].as_str(), Some(backing.file.as_str()));
        assert_eq!(info["backing-filename-format"], "qcow2");
    })
    .await;
}

/// The largest disk, with one page at its very end.
#[derive(Debug)]
struct LastPage(u64);

impl OwnPages for LastPage {
    fn locate(&self, pages: PageRange) -> BoxFuture<'_, Result<Vec<OwnRun>, ExportError>> {
        let last = PageIndex(self.0 / PAGE - 1);
        let before = PageRange::new(pages.start, pages.end.min(last));
        let mut runs = vec![OwnRun { pages: before, content: None }];
        let own = PageRange::new(pages.start.max(last), pages.end.max(last));
        runs.push(OwnRun { pages: own, content: Some(Content::Data) });
        runs.retain(|run| run.pages.start < run.pages.end);
        Box::pin(async move { Ok(runs) })
    }

    fn read(&self, bytes: Range<u64>) -> BoxFuture<'_, Result<Bytes, ExportError>> {
        let length = (bytes.end - bytes.start) as usize;
        Box::pin(async move { Ok(vec![0x5a; length].into()) })
    }
}

#[tokio::test]
async fn synthetic_image_of_the_largest_disk_is_opened() {
    let largest = qmp_bridge::synthetic_qcow2::MAX_DISK;
    with_each_qemu(async |qemu| {
        let directory = tempfile::tempdir().expect("directory");
        let dir = directory.path();
        let image = SyntheticQcow2::new(largest, None, LastPage(largest)).expect("image");
        let _server = serve(&dir.join("s"), image);
        let last = format!("read -P 0x5a {} 4k", largest - PAGE);
        let before = format!("read -P 0 {} 4k", largest - 2 * PAGE);
        let url = "nbd+unix:///disk?socket=s";
        let read = ["-r", "-f", "qcow2", "-c", &last, "-c", &before, url];
        let output = tool(&qemu, "qemu-io", dir, &read).await;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!text.contains("failed") && text.matches("4 KiB").count() == 2, "{text}");
    })
    .await;
}

/// The backing name in an image's header, and its format.
fn backing_name(image: &Path) -> (String, String) {
    let bytes = std::fs::read(image).expect("image");
    let long = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8")) as usize;
    let short = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4")) as usize;
    let text =
        |at: usize, length| String::from_utf8(bytes[at..at + length].to_vec()).expect("text");
    let mut extension = short(100);
    while short(extension) != 0xe279_2aca {
        extension += 8 + short(extension + 4).next_multiple_of(8);
    }
    (text(long(8), short(16)), text(extension + 8, short(extension + 4)))
}

/// Waits for a state of the disks whose blocks arrive.
async fn until(qmp: &Qmp, what: &str, is_so: impl Fn(&[ArrivingDisk]) -> bool) {
    let wait = async {
        while !is_so(&arriving::list(qmp).await.expect("disks")) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(60), wait).await;
    assert!(waited.is_ok(), "{what}: {:?}", arriving::list(qmp).await);
}

/// An empty overlay on the exported image, as a lazy restore makes it.
async fn make_lazy(worker: &mut ImageWorker, dir: &Path, socket: &Path) {
    let backing = arriving::backing(INSTANCE, 3, socket, "disk");
    let spec = ImageSpec {
        path: dir.join("top.qcow2"),
        format: ImageFormat::Qcow2,
        virtual_size: DISK,
        backing,
        layout: None,
    };
    worker.create(&spec).await.expect("top");
}

/// The images below the one disk, and whether that is complete.
async fn chain(qmp: &Qmp) -> (Vec<PathBuf>, bool) {
    let found = disks::list(qmp, None).await.expect("disks");
    let disk = found.disks.first().expect("the disk");
    (disk.backing.iter().map(|image| image.file.clone()).collect(), disk.arriving)
}

/// What a lazy restore does: an overlay on the exported image, then a stream of that image alone.
/// The server ends in the middle of it and comes back; the guest writes meanwhile.
#[tokio::test]
async fn arriving_disk_becomes_what_an_eager_restore_makes() {
    with_each_qemu(async |qemu| {
        let directory = tempfile::tempdir().expect("directory");
        let dir = directory.path().to_owned();
        let (pages, readable) = Pages::new();
        let mut worker = ImageWorker::start(&qemu, &dir).await.expect("worker");
        let backing = make_eager(&mut worker, &dir, &pages).await;
        let image = || SyntheticQcow2::new(DISK, Some(&backing), pages.clone()).expect("image");
        let socket = dir.join("s");
        make_lazy(&mut worker, &dir, &socket).await;
        worker.shutdown().await.expect("shutdown");
        let server = serve(&socket, image());
        let drive = "if=none,id=d,node-name=top,format=qcow2,file=top.qcow2";
        let arguments = ["-machine", "none", "-drive", drive];
        let vm = TestQemu::start_in(&qemu, &arguments, directory).await;
        let base = vec![dir.join("base.qcow2")];
        assert_eq!(chain(&vm.qmp).await, (base.clone(), true));
        let bitmap = json!({ "node": "top", "name": "b" });
        vm.qmp.execute_json("block-dirty-bitmap-add", bitmap).await.expect("bitmap");
        readable.send_replace(DISK / 2);
        let [disk] = arriving::list(&vm.qmp).await.expect("disks").try_into().expect("one");
        assert_eq!((disk.node.as_str(), disk.number, disk.copying), ("top", 3, None));
        disk.begin(&vm.qmp, 0).await.expect("stream");
        let offset = |disks: &[ArrivingDisk]| disks[0].copying.expect("a job").offset;
        until(&vm.qmp, "half of it", |disks| offset(disks) > DISK / 4).await;
        assert_eq!(chain(&vm.qmp).await, (base.clone(), true));
        drop(server);
        // The next helper asks for it again, as it does not know.
        let [disk] = arriving::list(&vm.qmp).await.expect("disks").try_into().expect("one");
        disk.begin(&vm.qmp, 0).await.expect("it runs already");
        vm.write_disk("d", 0x77, 1 << 20, 1 << 16).await;
        readable.send_replace(u64::MAX);
        let _server = serve(&socket, image());
        until(&vm.qmp, "all of it", <[_]>::is_empty).await;
        assert_eq!(chain(&vm.qmp).await, (base, false));
        let nodes = vm.qmp.execute_json("query-named-block-nodes", Value::Null).await;
        let nodes = nodes.expect("nodes").as_array().expect("list").clone();
        assert!(nodes.iter().all(|node| node["drv"] != "nbd"), "nothing is remote any more");
        let top = nodes.iter().find(|node| node["node-name"] == "top").expect("top");
        assert_eq!(top["dirty-bitmaps"][0]["count"], 1 << 16, "only what the guest wrote is dirty");
        vm.qmp.execute_json("quit", Value::Null).await.expect("quit");
        until_gone(&vm).await;
        let write = ["-f", "qcow2", "-c", "write -P 0x77 1m 64k", "eager.qcow2"];
        tool(&qemu, "qemu-io", &dir, &write).await;
        let compare = ["compare", "-f", "qcow2", "-F", "qcow2", "top.qcow2", "eager.qcow2"];
        tool(&qemu, "qemu-img", &dir, &compare).await;
        tool(&qemu, "qemu-img", &dir, &["check", "-f", "qcow2", "top.qcow2"]).await;
        assert_eq!(backing_name(&dir.join("top.qcow2")), backing_name(&dir.join("eager.qcow2")));
    })
    .await;
}

/// QEMU is killed while blocks arrive. The image is sound, and the next QEMU on it continues.
#[tokio::test]
async fn arriving_disk_of_a_killed_qemu_continues_in_the_next() {
    with_each_qemu(async |qemu| {
        let place = tempfile::tempdir().expect("directory");
        let dir = place.path().to_owned();
        let (pages, readable) = Pages::new();
        let mut worker = ImageWorker::start(&qemu, &dir).await.expect("worker");
        let backing = make_eager(&mut worker, &dir, &pages).await;
        let socket = dir.join("s");
        make_lazy(&mut worker, &dir, &socket).await;
        worker.shutdown().await.expect("shutdown");
        let image = SyntheticQcow2::new(DISK, Some(&backing), pages.clone()).expect("image");
        let _server = serve(&socket, image);
        let top = dir.join("top.qcow2");
        let drive = format!("if=none,id=d,node-name=top,format=qcow2,file={}", top.display());
        let arguments = ["-machine", "none", "-drive", &drive];
        let vm = TestQemu::start(&qemu, &arguments).await;
        readable.send_replace(DISK / 2);
        let [disk] = arriving::list(&vm.qmp).await.expect("disks").try_into().expect("one");
        disk.begin(&vm.qmp, 0).await.expect("stream");
        let offset = |disks: &[ArrivingDisk]| disks[0].copying.map_or(0, |copying| copying.offset);
        until(&vm.qmp, "half of it", |disks| offset(disks) > DISK / 4).await;
        drop(vm);
        readable.send_replace(u64::MAX);
        let vm = TestQemu::start(&qemu, &arguments).await;
        let [disk] = arriving::list(&vm.qmp).await.expect("disks").try_into().expect("one");
        assert_eq!(disk.copying, None, "the job died with its QEMU");
        disk.begin(&vm.qmp, 0).await.expect("stream");
        until(&vm.qmp, "all of it", <[_]>::is_empty).await;
        vm.qmp.execute_json("quit", Value::Null).await.expect("quit");
        until_gone(&vm).await;
        let compare = ["compare", "-f", "qcow2", "-F", "qcow2", "top.qcow2", "eager.qcow2"];
        tool(&qemu, "qemu-img", &dir, &compare).await;
    })
    .await;
}

/// Waits until QEMU is gone, and with it the locks of its images.
async fn until_gone(vm: &TestQemu) {
    let stat = format!("/proc/{}/stat", vm.pid());
    let gone = async {
        while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), gone).await.expect("QEMU ends");
}
