//! The reader on streams of running VMs: what it gives is the guest's memory and device state of
//! that instant.

mod common;
mod streams;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{TestQemu, with_each_qemu};
use procfs_core::FromRead;
use procfs_core::process::MemoryMaps;
use qmp_bridge::device_state::DeviceState;
use qmp_bridge::host_finder::find_hosts;
use qmp_bridge::migration::Incoming;
use qmp_bridge::ramblock::{RamBlock, ram_blocks};
use qmp_bridge::stream::{STREAM_PAGE, StreamBlock, StreamWriter};
use qmp_bridge::stream_reader::{DeviceSection, Item, ReaderLimits, StreamReadError, StreamReader};
use qmp_bridge::{PauseError, Paused};
use serde_json::{Value, json};
use streams::{COUNTER, DEVICES, Mode, capabilities, migrate, start, wait_for_status};

const MEGABYTES: u32 = 16;
const RAM: &str = "pc.ram";
/// Device sections that differ between two savings of one instant: whether the guest runs, and a
/// clock that continues anyway.
const DIFFERENT: [&str; 2] = ["globalstate", "mc146818rtc"];

/// All that a stream gave.
#[derive(Default)]
struct Received {
    machine_type: String,
    names: Vec<String>,
    memory: Vec<Vec<u8>>,
    devices: Option<DeviceState>,
    sections: Vec<DeviceSection>,
}

/// Reads on a thread; `first_page` hears when the first page is there.
fn receive(
    source: UnixStream,
    first_page: mpsc::SyncSender<()>,
) -> JoinHandle<Result<Received, StreamReadError>> {
    std::thread::spawn(move || {
        let mut reader = StreamReader::new(source, ReaderLimits::default());
        let mut received = Received::default();
        let mut first_page = Some(first_page);
        while let Some(item) = reader.next()? {
            if matches!(item, Item::Page { .. } | Item::Zero { .. })
                && let Some(sender) = first_page.take()
            {
                let _ = sender.send(());
            }
            received.take(item);
        }
        received.sections = reader.device_sections().to_vec();
        Ok(received)
    })
}

impl Received {
    fn take(&mut self, item: Item<'_>) {
        match item {
            Item::Configuration { machine_type, .. } => self.machine_type = machine_type,
            Item::Blocks(blocks) => {
                self.names = blocks.iter().map(|block| block.name.clone()).collect();
                // A page that never comes shows as this.
                self.memory = blocks.iter().map(|block| vec![0xee; block.used as usize]).collect();
            }
            Item::Page { block, offset, bytes } => self.page(block, offset).copy_from_slice(bytes),
            Item::Zero { block, offset } => self.page(block, offset).fill(0),
            Item::PassEnd | Item::RamEnd => {}
            Item::Devices(devices) => self.devices = Some(devices),
        }
    }

    fn page(&mut self, block: usize, offset: u64) -> &mut [u8] {
        &mut self.memory[block][offset as usize..][..STREAM_PAGE]
    }
}

fn memory_of(vm: &TestQemu) -> File {
    File::open(format!("/proc/{}/mem", vm.pid())).expect("open memory")
}

async fn blocks_of(vm: &TestQemu) -> Vec<RamBlock> {
    let mut blocks = ram_blocks(&vm.qmp).await.expect("blocks");
    let maps = MemoryMaps::from_file(format!("/proc/{}/maps", vm.pid())).expect("maps");
    find_hosts(&memory_of(vm), &maps, &mut blocks).expect("hosts");
    blocks
}

fn read_blocks(vm: &TestQemu, blocks: &[RamBlock]) -> Vec<Vec<u8>> {
    let memory = memory_of(vm);
    let read = |block: &RamBlock| {
        let mut bytes = vec![0; block.used as usize];
        memory.read_exact_at(&mut bytes, block.host.expect("host")).expect("read block");
        bytes
    };
    blocks.iter().map(read).collect()
}

fn count_in(memory: &[u8]) -> u32 {
    u32::from_le_bytes(memory[COUNTER..COUNTER + 4].try_into().expect("four"))
}

async fn count(vm: &TestQemu, blocks: &[RamBlock]) -> u32 {
    let block = blocks.iter().find(|block| block.name == RAM).expect("memory");
    let mut bytes = [0; 4];
    let at = block.host.expect("host") + COUNTER as u64;
    memory_of(vm).read_exact_at(&mut bytes, at).expect("read");
    u32::from_le_bytes(bytes)
}

async fn wait_for_count(vm: &TestQemu, blocks: &[RamBlock], above: u32) {
    for _ in 0..1000 {
        if count(vm, blocks).await > above {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the guest does not count above {above}");
}

async fn run_state(vm: &TestQemu) -> String {
    let status = vm.qmp.execute_json("query-status", Value::Null).await.expect("status");
    status["status"].as_str().expect("text").to_owned()
}

/// The device state as QEMU gives it otherwise, while the guest is stopped anyway.
async fn save_devices(vm: &TestQemu) -> DeviceState {
    let path = vm.path("devices");
    let arguments = json!({ "filename": path.to_str().expect("text"), "live": false });
    vm.qmp.execute_json("xen-save-devices-state", arguments).await.expect("save");
    DeviceState::from_bytes(std::fs::read(path).expect("read")).expect("device state")
}

/// Memory and devices of one instant, by other ways than the stream.
struct Truth {
    blocks: Vec<RamBlock>,
    memory: Vec<Vec<u8>>,
    devices: DeviceState,
}

impl Truth {
    fn compare(&self, received: &Received) {
        let names: Vec<_> = self.blocks.iter().map(|block| block.name.as_str()).collect();
        assert_eq!(received.names, names);
        for ((name, wanted), got) in names.iter().zip(&self.memory).zip(&received.memory) {
            let same = |(wanted, got): (&[u8], &[u8])| wanted == got;
            let pages = wanted.chunks(STREAM_PAGE).zip(got.chunks(STREAM_PAGE));
            let different: Vec<_> = pages
                .enumerate()
                .filter(|(_, pages)| !same(*pages))
                .map(|(page, _)| page)
                .collect();
            assert!(
                wanted.len() == got.len() && different.is_empty(),
                "{name}: pages {different:?} differ"
            );
        }
        let (wanted, got) =
            (self.devices.as_bytes(), received.devices.as_ref().expect("devices").as_bytes());
        assert_eq!(wanted.len(), got.len());
        for section in &received.sections {
            if !DIFFERENT.contains(&section.name.as_str()) {
                assert_eq!(
                    wanted[section.bytes.clone()],
                    got[section.bytes.clone()],
                    "{}",
                    section.name
                );
            }
        }
    }
}

async fn truth(vm: &TestQemu, blocks: &[RamBlock]) -> Truth {
    let devices = save_devices(vm).await;
    Truth { blocks: blocks.to_vec(), memory: read_blocks(vm, blocks), devices }
}

/// The guest runs until QEMU has sent nearly all.
async fn pre_copy(vm: &TestQemu, blocks: &[RamBlock]) -> (Truth, Received) {
    capabilities(&vm.qmp, &["pause-before-switchover"]).await;
    let (sender, _first) = mpsc::sync_channel(1);
    let reader = receive(migrate(&vm.qmp).await, sender);
    wait_for_status(&vm.qmp, "pre-switchover").await;
    let truth = truth(vm, blocks).await;
    vm.qmp
        .execute_json("migrate-continue", json!({ "state": "pre-switchover" }))
        .await
        .expect("continue");
    wait_for_status(&vm.qmp, "completed").await;
    (truth, reader.join().expect("join").expect("a sound stream"))
}

/// The guest runs on while QEMU sends what it had when it was stopped.
async fn background(vm: &TestQemu, blocks: &[RamBlock]) -> (Truth, Received) {
    capabilities(&vm.qmp, &["background-snapshot"]).await;
    let paused = Paused::stop(&vm.qmp).await.expect("stop");
    let truth = truth(vm, blocks).await;
    let (sender, first_page) = mpsc::sync_channel(1);
    let reader = receive(migrate(&vm.qmp).await, sender);
    tokio::task::spawn_blocking(move || first_page.recv_timeout(Duration::from_secs(20)))
        .await
        .expect("join")
        .expect("a page");
    match paused.resume().await {
        // A background snapshot that was not begun by `Migration` lets the guest run by itself.
        Ok(_) | Err(PauseError::Disturbed { .. }) => {}
        Err(error) => panic!("resume: {error}"),
    }
    wait_for_count(vm, blocks, count(vm, blocks).await).await;
    wait_for_status(&vm.qmp, "completed").await;
    let ram = blocks.iter().position(|block| block.name == RAM).expect("memory");
    assert!(count(vm, blocks).await > count_in(&truth.memory[ram]), "the guest ran on");
    (truth, reader.join().expect("join").expect("a sound stream"))
}

/// Another QEMU continues from what was received.
async fn load(qemu: &Path, vm: &str, received: &Received) {
    let more: Vec<&str> = DEVICES.into_iter().chain(["-incoming", "defer", "-S"]).collect();
    let target = start(qemu, vm, MEGABYTES, &more).await;
    let blocks = received.names.iter().zip(&received.memory);
    let listed = blocks.map(|(name, bytes)| StreamBlock {
        name: name.clone(),
        used: bytes.len() as u64,
        address: 0,
        shared: false,
    });
    let mut writer = StreamWriter::new(&received.machine_type, listed.collect()).expect("writer");
    for (block, bytes) in received.memory.iter().enumerate() {
        for (number, page) in bytes.chunks(STREAM_PAGE).enumerate() {
            writer.page(block, (number * STREAM_PAGE) as u64, page).expect("page");
        }
    }
    let mut incoming =
        Incoming::begin(&target.qmp, &target.path("incoming.sock")).await.expect("begin");
    incoming.send(&writer.take()).await.expect("send");
    incoming
        .send(&writer.finish(received.devices.as_ref().expect("devices")).expect("finish"))
        .await
        .expect("send");
    incoming.finish().await.unwrap_or_else(|error| panic!("{error}\n{}", target.log()));
    let blocks = blocks_of(&target).await;
    let ram = received.names.iter().position(|name| name == RAM).expect("memory");
    let was = count_in(&received.memory[ram]);
    assert_eq!(count(&target, &blocks).await, was);
    target.qmp.execute_json("cont", Value::Null).await.expect("cont");
    wait_for_count(&target, &blocks, was).await;
    assert_eq!(run_state(&target).await, "running");
}

async fn round_trip(qemu: &Path, vm: &str, mode: Mode) {
    let running = start(qemu, vm, MEGABYTES, &DEVICES).await;
    let blocks = blocks_of(&running).await;
    wait_for_count(&running, &blocks, 1000).await;
    let (truth, received) = match mode {
        Mode::PreCopy => pre_copy(&running, &blocks).await,
        Mode::Background => background(&running, &blocks).await,
    };
    truth.compare(&received);
    drop(running);
    load(qemu, vm, &received).await;
}

#[tokio::test]
async fn pre_copy_of_pc() {
    with_each_qemu(async |qemu| round_trip(&qemu, "pc", Mode::PreCopy).await).await;
}

#[tokio::test]
async fn pre_copy_of_q35() {
    with_each_qemu(async |qemu| round_trip(&qemu, "q35", Mode::PreCopy).await).await;
}

#[tokio::test]
async fn background_snapshot_of_pc() {
    with_each_qemu(async |qemu| round_trip(&qemu, "pc", Mode::Background).await).await;
}

#[tokio::test]
async fn background_snapshot_of_q35() {
    with_each_qemu(async |qemu| round_trip(&qemu, "q35", Mode::Background).await).await;
}

/// Migrates into the reader and gives the error that it ends with.
async fn refusal(vm: &TestQemu) -> StreamReadError {
    let (sender, _first) = mpsc::sync_channel(1);
    let reader = receive(migrate(&vm.qmp).await, sender);
    let ended = tokio::task::spawn_blocking(move || reader.join().expect("join").map(drop));
    ended.await.expect("join").expect_err("refused")
}

/// What changes the stream is named, with what to do.
#[tokio::test]
async fn what_a_plain_migration_does_not_send_is_named() {
    with_each_qemu(async |qemu| {
        let disk = [
            "-blockdev",
            "driver=null-co,node-name=n0,size=1048576,read-zeroes=on",
            "-device",
            "virtio-blk-pci,drive=n0",
        ];
        let mut cases = vec![
            ("return-path", "OPEN_RETURN_PATH"),
            ("postcopy-ram", "OPEN_RETURN_PATH"),
            ("dirty-bitmaps", "`dirty-bitmaps`"),
        ];
        let vm = start(&qemu, "q35", 1, &[]).await;
        if vm.qmp.version().major < 9 {
            cases.extend([("compress", "`compress`"), ("block", "`block`")]);
        }
        for (capability, wanted) in cases {
            let vm = start(&qemu, "q35", 1, &disk).await;
            let bitmap = json!({ "node": "n0", "name": "b0" });
            vm.qmp.execute_json("block-dirty-bitmap-add", bitmap).await.expect("bitmap");
            capabilities(&vm.qmp, &[capability]).await;
            let error = refusal(&vm).await;
            assert!(matches!(error, StreamReadError::Unsupported { .. }), "{capability}: {error}");
            assert!(error.to_string().contains(wanted), "{capability}: {error}");
        }
    })
    .await;
}

#[tokio::test]
async fn ignored_shared_memory_has_addresses() {
    with_each_qemu(async |qemu| {
        let vm = start(&qemu, "q35", 1, &[]).await;
        capabilities(&vm.qmp, &["x-ignore-shared"]).await;
        let mut reader = StreamReader::new(migrate(&vm.qmp).await, ReaderLimits::default());
        let addressed = tokio::task::spawn_blocking(move || {
            let mut addressed = None;
            while let Some(item) = reader.next().expect("sound") {
                match item {
                    Item::Configuration { capabilities, .. } => {
                        assert_eq!(capabilities, ["x-ignore-shared"])
                    }
                    Item::Blocks(blocks) => {
                        addressed = Some(blocks.iter().all(|block| block.address.is_some()))
                    }
                    _ => {}
                }
            }
            addressed
        });
        assert_eq!(addressed.await.expect("join"), Some(true));
    })
    .await;
}

#[tokio::test]
async fn a_suppressed_description_is_named() {
    with_each_qemu(async |qemu| {
        let vm = start(&qemu, "q35,suppress-vmdesc=on", 1, &[]).await;
        let error = refusal(&vm).await;
        assert!(matches!(error, StreamReadError::NoDescription { .. }), "{error}");
    })
    .await;
}

/// The reader reports a cancelled migration as a stream that ended too early.
#[tokio::test]
async fn a_cancelled_migration() {
    with_each_qemu(async |qemu| {
        let vm = start(&qemu, "q35", MEGABYTES, &DEVICES).await;
        capabilities(&vm.qmp, &["pause-before-switchover"]).await;
        let (sender, _first) = mpsc::sync_channel(1);
        let reader = receive(migrate(&vm.qmp).await, sender);
        wait_for_status(&vm.qmp, "pre-switchover").await;
        vm.qmp.execute_json("migrate_cancel", Value::Null).await.expect("cancel");
        let error = reader.join().expect("join").map(drop).expect_err("cancelled");
        assert!(error.is_cut_off(), "{error}");
        eprintln!("{error}");
    })
    .await;
}

/// A stream up to its first page record, which is another one of `flags`.
fn endless_memory(flags: u64) -> Vec<u8> {
    let bytes = 1u64 << 32;
    let mut head =
        b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    head.extend((bytes | 4).to_be_bytes());
    head.extend(b"\x06pc.ram");
    head.extend(bytes.to_be_bytes());
    head.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\x02\0\0\0\x02");
    head.extend(flags.to_be_bytes());
    head.extend(b"\x06pc.ram");
    head
}

/// How fast memory goes through:
/// `cargo test --release -p qmp-bridge --test stream_reader -- --ignored --nocapture speed`.
#[test]
#[ignore = "a measurement"]
fn speed() {
    let page = [1; STREAM_PAGE];
    let pages = [&0x1028u64.to_be_bytes()[..], &page].concat().repeat(64);
    let zeros = [&0x1022u64.to_be_bytes()[..], &[0]].concat().repeat(1 << 18);

    let (source, mut sink) = UnixStream::pair().expect("pair");
    let (head, piece) = ([endless_memory(8), page.to_vec()].concat(), pages.clone());
    let writer = std::thread::spawn(move || {
        sink.write_all(&head).expect("write");
        while sink.write_all(&piece).is_ok() {}
    });
    eprintln!("pages through a socket: {:.2} GiB/s", measure(source, 1 << 19));
    writer.join().expect("join");

    let pages = [endless_memory(8), page.to_vec(), pages.repeat(1 << 10)].concat();
    eprintln!("pages from memory: {:.2} GiB/s", measure(&pages[..], 1 << 16));
    let zeros = [endless_memory(2), vec![0], zeros].concat();
    eprintln!("zero pages from memory: {:.2} GiB/s", measure(&zeros[..], 1 << 18));
}

fn measure<R: std::io::Read>(source: R, pages: u64) -> f64 {
    let mut reader = StreamReader::new(source, ReaderLimits::default());
    let start = Instant::now();
    let (mut got, mut sum) = (0, 0u64);
    while got < pages {
        match reader.next().expect("sound") {
            Some(Item::Page { bytes, .. }) => {
                got += 1;
                sum += u64::from(bytes[0]);
            }
            Some(Item::Zero { .. }) => got += 1,
            Some(_) => {}
            None => break,
        }
    }
    assert!(sum <= got);
    (got * STREAM_PAGE as u64) as f64 / (1u64 << 30) as f64 / start.elapsed().as_secs_f64()
}
