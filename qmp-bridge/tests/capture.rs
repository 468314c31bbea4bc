//! Disk captures on real QEMUs: the instant is the instant, whatever is written after it, and
//! nothing is ever lost.

#![expect(
    clippy::disallowed_methods,
    reason = "mem::forget: a helper that is killed drops nothing"
)]

mod common;

use std::path::Path;
use std::time::Instant;

use common::{TestQemu, qemu_img, with_each_qemu};
use qmp_bridge::capture::{
    BitmapTag, CaptureError, CapturePlaces, CapturePlan, CapturedDisks, DEFAULT_FLEECING_RESERVE,
    Leftovers, PreparedDisks, cleanup_leftovers,
};
use qmp_bridge::disks::{self, Disks};
use qmp_bridge::nbd::{Content, ContentRange, content_ranges};
use qmp_bridge::{Paused, Qmp};

const DISK: u64 = 8 << 20;
const PAGE: u64 = 4096;

/// What a restore would build: the model of a disk, written by captures.
type Image = Vec<u8>;

fn tag() -> BitmapTag {
    "test-1".parse().expect("tag")
}

/// A QEMU with four disks: an overlay on a base, a plain qcow2, a raw file and a raw file of odd
/// length. One has no device, so its old blocks are saved by `blockdev-backup`.
async fn start(qemu: &Path) -> (TestQemu, Disks) {
    let directory = tempfile::tempdir().expect("directory");
    let size = DISK.to_string();
    // The layer below holds data of its own, which must show through and must not be captured.
    std::fs::write(directory.path().join("base.raw"), base_content()).expect("base");
    qemu_img(
        qemu,
        directory.path(),
        &["convert", "-q", "-f", "raw", "-O", "qcow2", "base.raw", "base.qcow2"],
    );
    qemu_img(
        qemu,
        directory.path(),
        &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "top.qcow2"],
    );
    qemu_img(qemu, directory.path(), &["create", "-q", "-f", "qcow2", "plain.qcow2", &size]);
    std::fs::File::create(directory.path().join("raw.img"))
        .and_then(|file| file.set_len(DISK))
        .expect("raw");
    std::fs::write(directory.path().join("odd.img"), vec![0x11; 512 * 77]).expect("odd");
    let arguments = [
        "-M",
        "q35",
        "-m",
        "16",
        "-S",
        "-drive",
        "if=none,id=drive-top,node-name=top,file=top.qcow2,format=qcow2",
        "-drive",
        "if=none,id=drive-plain,node-name=plain,file=plain.qcow2,format=qcow2",
        "-drive",
        "if=none,id=drive-raw,node-name=raw,file=raw.img,format=raw",
        "-drive",
        "if=none,id=drive-odd,node-name=odd,file=odd.img,format=raw",
        "-drive",
        "if=none,id=drive-ro,node-name=ro,file=base.qcow2,format=qcow2,read-only=on",
        "-device",
        "virtio-blk-pci,drive=drive-top,id=vda",
        "-device",
        "ide-hd,drive=drive-plain",
        "-device",
        "virtio-blk-pci,drive=drive-odd",
    ];
    let vm = TestQemu::start_in(qemu, &arguments, directory).await;
    let disks = disks::list(&vm.qmp, Some(vm.directory.path())).await.expect("disks");
    (vm, disks)
}

/// Data where the overlay gets some too, and data that only the layer has.
fn base_content() -> Image {
    let mut image = vec![0; DISK as usize];
    image[..1 << 20].fill(0x91);
    image[2 << 20..3 << 20].fill(0x92);
    image[6 << 20..7 << 20].fill(0x93);
    image
}

fn plan(vm: &TestQemu, id: u64, parent: Option<u64>) -> CapturePlan {
    let fleecing_dir = vm.directory.path().to_owned();
    CapturePlan {
        tag: tag(),
        checkpoint: common::checkpoint(id),
        parent,
        fleecing_dir,
        fleecing_reserve: DEFAULT_FLEECING_RESERVE,
        nbd_socket: vm.path("nbd.sock"),
        streamed: id.is_multiple_of(2),
    }
}

async fn clean_up(vm: &TestQemu) -> Leftovers {
    let places =
        CapturePlaces { fleecing_dir: vm.directory.path(), nbd_socket: &vm.path("nbd.sock") };
    cleanup_leftovers(&vm.qmp, &tag(), places).await.expect("clean up")
}

async fn capture(qmp: &Qmp, disks: &Disks, plan: CapturePlan) -> CapturedDisks {
    let is_full = plan.parent.is_none();
    let prepared = PreparedDisks::prepare(qmp, &disks.disks, plan).await.expect("prepare");
    let outlook = prepared.outlook().await.expect("outlook");
    assert!(outlook.room > 0 && (!is_full || outlook.full_bytes > 0), "{outlook:?}");
    let paused = Paused::stop(qmp).await.expect("stop");
    let captured = prepared.capture(&paused).await.expect("pause");
    paused.resume().await.expect("resume");
    captured
}

/// Reads what the capture holds into the images, as a restore would. Returns what the bitmaps told.
async fn upload(captured: &mut CapturedDisks, images: &mut [Image]) -> Vec<Vec<ContentRange>> {
    captured.export().await.expect("export");
    let mut all = Vec::new();
    for (disk, image) in captured.disks().iter().zip(images) {
        let client = captured.connect(disk).await.expect("connect");
        assert_eq!(client.size(), disk.bytes);
        let mut states = client.block_status(0, disk.bytes).await.expect("status");
        let told = content_ranges(&states[0], &states[1], PAGE, disk.bytes);
        if disk.changes.is_some() {
            states[1].set_from(disk.certain_until, 1);
        }
        for range in &content_ranges(&states[0], &states[1], PAGE, disk.bytes) {
            let target = &mut image[range.start as usize..range.end as usize];
            match range.content {
                Content::Zero => target.fill(0),
                Content::Data => {
                    let length = u32::try_from(range.end - range.start).expect("small disk");
                    target.copy_from_slice(&client.read(range.start, length).await.expect("read"));
                }
            }
        }
        client.close().await;
        all.push(told);
    }
    captured.verify().await.expect("verify");
    all
}

fn covered(ranges: &[ContentRange]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// What a restore begins with: empty images, but the overlay's disk shows its layer.
fn new_images(disks: &Disks) -> Vec<Image> {
    let image = |disk: &disks::Disk| {
        if disk.backing.is_empty() { vec![0; disk.virtual_size as usize] } else { base_content() }
    };
    disks.writable().map(image).collect()
}

/// Writes the same into a disk and into its model.
async fn write(
    vm: &TestQemu,
    disks: &Disks,
    models: &mut [Image],
    (index, pattern, offset, length): (usize, u8, u64, u64),
) {
    vm.write_disk(&disks.disks[index].device, pattern, offset, length).await;
    models[index][offset as usize..(offset + length) as usize].fill(pattern);
}

fn assert_same(images: &[Image], models: &[Image], what: &str) {
    for (index, (image, model)) in images.iter().zip(models).enumerate() {
        let differs = image.iter().zip(model).position(|(a, b)| a != b);
        assert_eq!((image.len(), differs), (model.len(), None), "{what}: disk {index}");
    }
}

/// Bitmaps and other things of ours that QEMU still has, as text.
async fn traces(qmp: &Qmp) -> String {
    let nodes = qmp
        .execute_json("query-named-block-nodes", serde_json::json!({"flat": true}))
        .await
        .expect("nodes");
    let jobs = qmp.execute_json("query-jobs", serde_json::Value::Null).await.expect("jobs");
    let exports =
        qmp.execute_json("query-block-exports", serde_json::Value::Null).await.expect("exports");
    let mut found: Vec<String> = Vec::new();
    for node in nodes.as_array().expect("list") {
        let name = node["node-name"].as_str().expect("name");
        if name.starts_with("sp-") {
            found.push(name.into());
        }
        for bitmap in node["dirty-bitmaps"].as_array().into_iter().flatten() {
            if bitmap["name"].as_str().is_some_and(|name| name.contains("/size-")) {
                continue;
            }
            let recording = if bitmap["recording"] == true { "on" } else { "off" };
            found.push(format!("{name}:{}:{recording}", bitmap["name"].as_str().unwrap_or("?")));
        }
    }
    found.extend(jobs.as_array().expect("list").iter().map(|job| job["id"].to_string()));
    found.extend(exports.as_array().expect("list").iter().map(|export| export["id"].to_string()));
    // Old QEMUs keep a removed set while the guest is stopped; the next capture of a running one
    // removes it.
    if qmp.version().major >= 9 {
        let sets = qmp.execute_json("query-fdsets", serde_json::Value::Null).await.expect("sets");
        found.extend(sets.as_array().expect("list").iter().map(|set| set.to_string()));
    }
    let block = qmp.execute_json("query-block", serde_json::Value::Null).await.expect("drives");
    let inserted = block
        .as_array()
        .expect("list")
        .iter()
        .filter_map(|row| row["inserted"]["node-name"].as_str());
    found.extend(
        inserted
            .filter(|node| node.starts_with("sp-"))
            .map(|node| format!("under a device: {node}")),
    );
    found.sort();
    found.join(" ")
}

fn bitmaps_since(id: u64) -> String {
    ["odd", "plain", "raw", "top"].map(|node| format!("{node}:stillpoint/test-1/{id}:on")).join(" ")
}

#[tokio::test]
async fn full_then_incrementals_show_the_instant() {
    with_each_qemu(async |qemu| {
        let (vm, disks) = start(&qemu).await;
        assert_eq!(disks.writable().count(), 4);
        assert_eq!(disks.disks[0].backing.len(), 1);
        assert_eq!(disks.disks[0].backing[0].file, vm.path("base.qcow2"));
        let mut models = new_images(&disks);
        models[3].fill(0x11);
        let mut images = new_images(&disks);
        for at in 0..4 {
            write(&vm, &disks, &mut models, (at, 0x21 + at as u8, 4096 * at as u64, 20_480)).await;
        }
        // An explicit zero in the overlay and unaligned writes.
        write(&vm, &disks, &mut models, (0, 0x5a, 1 << 20, 512)).await;
        write(&vm, &disks, &mut models, (1, 0x5b, (1 << 20) + 1024, 5 * 512)).await;
        vm.qemu_io("drive-top", "write -z 2097152 65536").await;
        models[0][2 << 20..(2 << 20) + 65_536].fill(0);

        let mut captured = capture(&vm.qmp, &disks, plan(&vm, 1, None)).await;
        let instant = models.clone();
        // After the instant: overwrite old data, write where nothing was, zero and discard.
        write(&vm, &disks, &mut models, (0, 0x77, 0, 65_536)).await;
        write(&vm, &disks, &mut models, (1, 0x77, 3 << 20, 65_536)).await;
        write(&vm, &disks, &mut models, (2, 0x77, 8192, 4096)).await;
        write(&vm, &disks, &mut models, (3, 0x77, 0, 512 * 77)).await;
        vm.qemu_io("drive-raw", "write -z 4194304 65536").await;
        let ranges = upload(&mut captured, &mut images).await;
        assert_same(&images, &instant, "full");
        // Three clusters of the overlay's own, one of them zero; its layer's other 45 clusters stay
        // out.
        assert_eq!(covered(&ranges[0]), 3 * 65_536);
        assert!(ranges[0].contains(&ContentRange {
            start: 2 << 20,
            end: (2 << 20) + 65_536,
            content: Content::Zero
        }));
        common::acknowledge(captured).await;
        assert_eq!(traces(&vm.qmp).await, bitmaps_since(1));

        // Incremental: only what changed, and again the instant.
        write(&vm, &disks, &mut models, (1, 0, 1 << 20, 4096)).await;
        let mut captured = capture(&vm.qmp, &disks, plan(&vm, 2, Some(1))).await;
        let instant = models.clone();
        write(&vm, &disks, &mut models, (0, 0x78, 0, 131_072)).await;
        let ranges = upload(&mut captured, &mut images).await;
        assert_same(&images, &instant, "incremental");
        assert_eq!(covered(&ranges[0]), 65_536);
        assert_eq!(covered(&ranges[1]), 65_536 + 4096);
        common::acknowledge(captured).await;

        // Nothing changed on three of them.
        let mut captured = capture(&vm.qmp, &disks, plan(&vm, 3, Some(2))).await;
        let ranges = upload(&mut captured, &mut images).await;
        assert_same(&images, &models, "third");
        assert_eq!([1, 2, 3].map(|at| covered(&ranges[at])), [0; 3]);
        common::acknowledge(captured).await;
        assert_eq!(traces(&vm.qmp).await, bitmaps_since(3));
    })
    .await;
}

/// Bitmaps that are not of the durable checkpoint are merged back, as after a failure.
#[tokio::test]
async fn receipt_of_another_checkpoint_drops_no_bitmap() {
    with_each_qemu(async |qemu| {
        let (vm, disks) = start(&qemu).await;
        let mut models = new_images(&disks);
        models[3].fill(0x11);
        let mut images = new_images(&disks);
        let mut captured = capture(&vm.qmp, &disks, plan(&vm, 1, None)).await;
        upload(&mut captured, &mut images).await;
        common::acknowledge(captured).await;
        write(&vm, &disks, &mut models, (2, 0x31, 0, 4096)).await;
        let captured = capture(&vm.qmp, &disks, plan(&vm, 2, Some(1))).await;
        write(&vm, &disks, &mut models, (2, 0x32, 8192, 4096)).await;
        let error = captured.acknowledge(&common::receipt(1)).await.expect_err("another one");
        assert!(matches!(error, CaptureError::OtherCheckpoint(_)), "{error}");
        assert_eq!(traces(&vm.qmp).await, bitmaps_since(1));
        let mut captured = capture(&vm.qmp, &disks, plan(&vm, 2, Some(1))).await;
        let ranges = upload(&mut captured, &mut images).await;
        assert_same(&images, &models, "after the wrong receipt");
        assert_eq!(covered(&ranges[2]), 8192);
        common::acknowledge(captured).await;
        assert_eq!(traces(&vm.qmp).await, bitmaps_since(2));
    })
    .await;
}

#[tokio::test]
async fn a_failed_checkpoint_gives_its_changes_to_the_next() {
    with_each_qemu(async |qemu| {
        let (vm, disks) = start(&qemu).await;
        let mut models = new_images(&disks);
        models[3].fill(0x11);
        let mut images = new_images(&disks);
        // The first ever fails: nothing may remain, the same number can be used again.
        capture(&vm.qmp, &disks, plan(&vm, 1, None)).await.restore().await.expect("restore");
        assert_eq!(traces(&vm.qmp).await, "");
        write(&vm, &disks, &mut models, (2, 0x31, 0, 8192)).await;
        let mut captured = capture(&vm.qmp, &disks, plan(&vm, 1, None)).await;
        upload(&mut captured, &mut images).await;
        assert_same(&images, &models, "full");
        common::acknowledge(captured).await;

        write(&vm, &disks, &mut models, (0, 0x41, 8192, 4096)).await;
        let mut captured = capture(&vm.qmp, &disks, plan(&vm, 2, Some(1))).await;
        write(&vm, &disks, &mut models, (0, 0x42, 65_536, 4096)).await;
        upload(&mut captured, &mut images.clone()).await;
        captured.restore().await.expect("restore");
        assert_eq!(traces(&vm.qmp).await, bitmaps_since(1));

        // Dropped without a word, in each phase: the same, in the background.
        drop(capture(&vm.qmp, &disks, plan(&vm, 2, Some(1))).await);
        wait_for_traces(&vm.qmp, &bitmaps_since(1)).await;
        drop(
            PreparedDisks::prepare(&vm.qmp, &disks.disks, plan(&vm, 2, Some(1)))
                .await
                .expect("prepare"),
        );
        wait_for_traces(&vm.qmp, &bitmaps_since(1)).await;

        let mut captured = capture(&vm.qmp, &disks, plan(&vm, 2, Some(1))).await;
        let ranges = upload(&mut captured, &mut images).await;
        assert_same(&images, &models, "after failures");
        assert_eq!(covered(&ranges[0]), 8192);
        common::acknowledge(captured).await;

        // A forced full capture leaves the running bitmap alone when it fails.
        capture(&vm.qmp, &disks, plan(&vm, 3, None)).await.restore().await.expect("restore");
        assert_eq!(traces(&vm.qmp).await, bitmaps_since(2));
    })
    .await;
}

async fn wait_for_traces(qmp: &Qmp, wanted: &str) {
    let deadline = Instant::now() + std::time::Duration::from_secs(10);
    while traces(qmp).await != wanted {
        assert!(Instant::now() < deadline, "{} instead of {wanted}", traces(qmp).await);
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

/// Where a helper is killed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Death {
    Prepared,
    Paused,
    Captured,
    Exported,
    Reading,
    Released,
    HalfAcknowledged,
}

#[tokio::test]
async fn a_killed_helper_is_cleaned_up_after() {
    use Death::*;
    with_each_qemu(async |qemu| {
        for death in [Prepared, Paused, Captured, Exported, Reading, Released, HalfAcknowledged] {
            eprintln!("{death:?}");
            let (vm, disks) = start(&qemu).await;
            let mut models = new_images(&disks);
            models[3].fill(0x11);
            let mut images = new_images(&disks);
            vm.qmp.execute_json("cont", serde_json::Value::Null).await.expect("cont");
            let mut first = capture(&vm.qmp, &disks, plan(&vm, 1, None)).await;
            upload(&mut first, &mut images).await;
            common::acknowledge(first).await;
            write(&vm, &disks, &mut models, (0, 0x41, 0, 4096)).await;

            die(vm.second().await, &disks, plan(&vm, 2, Some(1)), death).await;
            write(&vm, &disks, &mut models, (1, 0x42, 65_536, 4096)).await;
            let left = clean_up(&vm).await;
            assert_eq!(left.resumed, death == Paused);
            assert_eq!(left.found_capture(), !matches!(death, Released | HalfAcknowledged));
            assert_eq!(left.bitmaps.len(), 4);
            let since = if death == HalfAcknowledged { 2 } else { 1 };
            assert!(
                left.bitmaps.iter().all(|bitmap| bitmap.since == since && bitmap.recording),
                "{left:?}"
            );
            assert_eq!(traces(&vm.qmp).await, bitmaps_since(since));
            assert!(!clean_up(&vm).await.found_capture());

            let parent = left.bitmaps[0].since;
            let mut next = capture(&vm.qmp, &disks, plan(&vm, 3, Some(parent))).await;
            let ranges = upload(&mut next, &mut images).await;
            if death != HalfAcknowledged {
                assert_same(&images, &models, "after the cleanup");
                assert_eq!((covered(&ranges[0]), covered(&ranges[1])), (4096, 4096));
            }
            common::acknowledge(next).await;
            assert_eq!(traces(&vm.qmp).await, bitmaps_since(3));
        }
    })
    .await;
}

/// A helper of its own that gets as far as `death` and then does nothing more, not even a drop.
async fn die(qmp: Qmp, disks: &Disks, plan: CapturePlan, death: Death) {
    let prepared = PreparedDisks::prepare(&qmp, &disks.disks, plan).await.expect("prepare");
    if death == Death::Prepared {
        return std::mem::forget(prepared);
    }
    let paused = Paused::stop(&qmp).await.expect("stop");
    let mut captured = prepared.capture(&paused).await.expect("pause");
    if death == Death::Paused {
        std::mem::forget(paused);
        return std::mem::forget(captured);
    }
    paused.resume().await.expect("resume");
    match death {
        Death::Exported => captured.export().await.expect("export"),
        Death::Reading => {
            captured.export().await.expect("export");
            let client = captured.connect(&captured.disks()[0]).await.expect("connect");
            client.read(0, 4096).await.expect("read");
            std::mem::forget(client);
        }
        Death::Released => captured.release().await.expect("release"),
        Death::HalfAcknowledged => return common::acknowledge(captured).await,
        _ => {}
    }
    std::mem::forget(captured);
}

#[tokio::test]
async fn a_full_fleecing_disk_ends_the_capture_and_not_a_write() {
    with_each_qemu(async |qemu| {
        let (vm, disks) = start(&qemu).await;
        // A tmpfs, so that the test can use up its free space. Other processes may use it too, so
        // the test leaves a wide margin.
        let fleecing = tempfile::tempdir_in("/dev/shm").expect("fleecing directory");
        let stat = nix::sys::statvfs::statvfs(fleecing.path()).expect("statvfs");
        let free = stat.blocks_available() * stat.fragment_size();
        let with = |reserve| CapturePlan {
            fleecing_dir: fleecing.path().into(),
            fleecing_reserve: reserve,
            ..plan(&vm, 1, None)
        };
        let refused = PreparedDisks::prepare(&vm.qmp, &disks.disks, with(u64::MAX)).await;
        assert!(matches!(refused, Err(CaptureError::FleecingFull { .. })), "{refused:?}");
        assert_eq!(traces(&vm.qmp).await, "");
        let captured = capture(&vm.qmp, &disks, with(free - (16 << 20))).await;
        captured.verify().await.expect("room is left");
        std::fs::write(fleecing.path().join("other"), vec![1; 32 << 20]).expect("fill");
        let deadline = Instant::now() + std::time::Duration::from_secs(5);
        while captured.verify().await.is_ok() {
            assert!(Instant::now() < deadline, "the capture continued");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        assert!(matches!(captured.verify().await, Err(CaptureError::Broken { .. })));
        captured.restore().await.expect("restore");
        assert_eq!(traces(&vm.qmp).await, "");
    })
    .await;
}

/// QEMU cuts dirty bitmaps with the disk and says nothing of it; the size is the same again at the
/// next look.
#[tokio::test]
async fn disk_resized_between_two_checkpoints_is_captured_as_it_is() {
    const MIB: u64 = 1 << 20;
    let steps: [(&str, bool, &[u64], bool); 6] = [
        ("nothing", false, &[], true),
        ("shrunk and grown", false, &[4 * MIB, 8 * MIB], false),
        ("shrunk and grown by the human monitor", true, &[4 * MIB, 8 * MIB], false),
        ("shrunk by a sector and grown", false, &[8 * MIB - 512, 8 * MIB], false),
        ("grown", false, &[16 * MIB], true),
        ("shrunk", true, &[12 * MIB], false),
    ];
    with_each_qemu(async |qemu| {
        let (vm, _) = start(&qemu).await;
        // The one with a device has a filter in a capture, the other a job.
        for (device, index) in [("drive-plain", 1), ("drive-raw", 2)] {
            vm.write_disk(device, 0x77, 0, DISK).await;
            let list = async || {
                let mut disks =
                    disks::list(&vm.qmp, Some(vm.directory.path())).await.expect("disks");
                disks.disks = vec![disks.disks[index].clone()];
                disks
            };
            let mut image = vec![vec![0; DISK as usize]];
            let mut model = vec![0x77; DISK as usize];
            let mut first = capture(&vm.qmp, &list().await, plan(&vm, 1, None)).await;
            upload(&mut first, &mut image).await;
            common::acknowledge(first).await;
            for (id, (what, by_human, sizes, keeps_base)) in (2..).zip(steps) {
                for size in sizes {
                    match by_human {
                        true => drop(
                            vm.qmp
                                .hmp(&format!("block_resize {device} {size}B"))
                                .await
                                .expect("resize"),
                        ),
                        false => {
                            let arguments = serde_json::json!({ "device": device, "size": size });
                            vm.qmp.execute_json("block_resize", arguments).await.expect("resize");
                        }
                    }
                    model.resize(*size as usize, 0);
                }
                vm.write_disk(device, id as u8, 0, 4096).await;
                model[..4096].fill(id as u8);
                // One that fails in between must not use the knowledge up.
                capture(&vm.qmp, &list().await, plan(&vm, id, Some(id - 1)))
                    .await
                    .restore()
                    .await
                    .expect("restore");
                let mut captured =
                    capture(&vm.qmp, &list().await, plan(&vm, id, Some(id - 1))).await;
                assert_eq!(captured.disks()[0].changes.is_some(), keeps_base, "{device} {what}");
                image[0].resize(model.len(), 0);
                if !keeps_base {
                    // What nothing is known of is compared as a whole.
                    image[0].fill(0);
                }
                let ranges = upload(&mut captured, &mut image).await;
                assert_same(&image, std::slice::from_ref(&model), &format!("{device} {what}"));
                assert!(what != "nothing" || covered(&ranges[0]) <= 4096, "{ranges:?}");
                common::acknowledge(captured).await;
            }
            assert_eq!(size_marks(&vm.qmp).await, 1, "one mark is left");
        }
    })
    .await;
}

async fn size_marks(qmp: &Qmp) -> usize {
    let nodes = qmp
        .execute_json("query-named-block-nodes", serde_json::json!({"flat": true}))
        .await
        .expect("nodes");
    let bitmaps = nodes
        .as_array()
        .expect("list")
        .iter()
        .filter_map(|node| node["dirty-bitmaps"].as_array())
        .flatten();
    bitmaps
        .filter(|bitmap| bitmap["name"].as_str().is_some_and(|name| name.contains("/size-")))
        .count()
}

/// Disks of running devices, one of them in a thread of its own.
#[tokio::test]
async fn disks_of_devices_and_iothreads_are_captured_too() {
    with_each_qemu(async |qemu| {
        let directory = tempfile::tempdir().expect("directory");
        qemu_img(&qemu, directory.path(), &["create", "-q", "-f", "qcow2", "a.qcow2", "8M"]);
        qemu_img(&qemu, directory.path(), &["create", "-q", "-f", "qcow2", "b.qcow2", "8M"]);
        let arguments = [
            "-M",
            "q35",
            "-m",
            "16",
            "-object",
            "iothread,id=io",
            "-drive",
            "if=none,id=a,node-name=na,file=a.qcow2,format=qcow2",
            "-device",
            "virtio-blk-pci,drive=a,iothread=io",
            "-blockdev",
            "driver=file,node-name=fb,filename=b.qcow2",
            "-blockdev",
            "driver=qcow2,node-name=nb,file=fb",
            "-device",
            "virtio-blk-pci,drive=nb,id=vdb",
        ];
        let vm = TestQemu::start_in(&qemu, &arguments, directory).await;
        let listed = disks::list(&vm.qmp, Some(vm.directory.path())).await;
        if vm.qmp.version().major < 9 {
            assert!(
                listed.as_ref().is_err_and(|error| error.to_string().contains("iothread")),
                "{listed:?}"
            );
            return;
        }
        let disks = listed.expect("disks");
        assert_eq!(disks.disks[1].device, "/machine/peripheral/vdb/virtio-backend");
        for id in 1..4 {
            vm.write_disk("a", id as u8, 0, 65_536).await;
            let mut captured =
                capture(&vm.qmp, &disks, plan(&vm, id, Some(id - 1).filter(|parent| *parent > 0)))
                    .await;
            vm.write_disk("a", 0xee, 0, 65_536).await;
            let mut images = new_images(&disks);
            upload(&mut captured, &mut images).await;
            assert_eq!(images[0][..65_536], vec![id as u8; 65_536]);
            common::acknowledge(captured).await;
        }
    })
    .await;
}
