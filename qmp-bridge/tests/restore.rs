//! VM state on real QEMUs: saved during a pause, put together into a stream, loaded by another
//! QEMU.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use common::loop_guest::{self, counter, guest_memory};
use common::{TestQemu, with_each_qemu};
use procfs_core::FromRead;
use procfs_core::process::MemoryMaps;
use qmp_bridge::device_state::{DeviceState, DeviceStateFile};
use qmp_bridge::host_finder::find_hosts;
use qmp_bridge::migration::{Incoming, MigrationError};
use qmp_bridge::paused::run_state;
use qmp_bridge::ramblock::{RamBlock, ram_blocks};
use qmp_bridge::stream::{STREAM_PAGE, StreamBlock, StreamWriter};
use qmp_bridge::vm::VmFacts;
use qmp_bridge::{Paused, devices};
use serde_json::{Value, json};

const SHARED: &str = "pc.ram";

/// All that a restore needs besides the shared memory.
struct Saved {
    machine_type: String,
    blocks: Vec<(RamBlock, Vec<u8>)>,
    devices: DeviceState,
    counter: u32,
}

async fn blocks_with_hosts(vm: &TestQemu) -> Vec<RamBlock> {
    let mut blocks = ram_blocks(&vm.qmp).await.expect("blocks");
    let maps = MemoryMaps::from_file(format!("/proc/{}/maps", vm.pid())).expect("maps");
    find_hosts(&memory_of(vm), &maps, &mut blocks).expect("hosts");
    blocks
}

fn memory_of(vm: &TestQemu) -> File {
    File::open(format!("/proc/{}/mem", vm.pid())).expect("open memory")
}

fn block_bytes(memory: &File, block: &RamBlock) -> Vec<u8> {
    let mut bytes = vec![0; block.used as usize];
    memory.read_exact_at(&mut bytes, block.host.expect("host")).expect("read block");
    bytes
}

/// Saves a VM at one instant; its shared memory goes into `copy`.
async fn save(vm: &TestQemu, memory: &File, copy: &File) -> Saved {
    let facts = VmFacts::read(&vm.qmp).await.expect("facts");
    let blocks = blocks_with_hosts(vm).await;
    let process = memory_of(vm);
    let file = DeviceStateFile::prepare(&vm.qmp, vm.directory.path()).await.expect("file");
    let paused = Paused::stop(&vm.qmp).await.expect("stop");
    file.save(&paused).await.expect("save");
    // The later one counts, alone.
    file.save(&paused).await.expect("save again");
    let mut ram = vec![0; loop_guest::RAM as usize];
    memory.read_exact_at(&mut ram, 0).expect("read");
    let small: Vec<_> = blocks
        .into_iter()
        .map(|block| {
            let bytes =
                if block.name == SHARED { Vec::new() } else { block_bytes(&process, &block) };
            (block, bytes)
        })
        .collect();
    paused.resume().await.expect("resume");
    copy.write_all_at(&ram, 0).expect("write");
    let devices = file.read().expect("device state");
    Saved { machine_type: facts.machine_type, blocks: small, devices, counter: counter(copy) }
}

fn stream_of(saved: &Saved) -> Vec<u8> {
    let listed = saved
        .blocks
        .iter()
        .map(|(block, _)| StreamBlock::new(block, block.name == SHARED))
        .collect();
    let mut writer = StreamWriter::new(&saved.machine_type, listed).expect("writer");
    for (index, (_, bytes)) in saved.blocks.iter().enumerate() {
        for (number, page) in bytes.chunks(STREAM_PAGE).enumerate() {
            writer.page(index, (number * STREAM_PAGE) as u64, page).expect("page");
        }
    }
    let mut stream = writer.take();
    stream.extend(writer.finish(&saved.devices).expect("finish"));
    stream
}

async fn load(vm: &TestQemu, stream: &[u8]) -> Result<(), MigrationError> {
    let mut incoming = Incoming::begin(&vm.qmp, &vm.path("incoming.sock")).await?;
    for piece in stream.chunks(100_000) {
        incoming.send(piece).await?;
    }
    incoming.finish().await
}

async fn wait_for_count(memory: &File, above: u32) {
    for _ in 0..500 {
        if counter(memory) > above {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the guest does not count: {} is not above {above}", counter(memory));
}

async fn save_and_restore(from: &Path, machine_type: &str, to: &Path) {
    let (memory, copy) = (guest_memory(), guest_memory());
    let source = loop_guest::start(from, machine_type, &memory, &[]).await;
    wait_for_count(&memory, 1000).await;
    let saved = save(&source, &memory, &copy).await;
    wait_for_count(&memory, saved.counter).await;
    drop(source);

    let started = std::time::Instant::now();
    let target =
        loop_guest::start(to, &saved.machine_type, &copy, &["-incoming", "defer", "-S"]).await;
    let up = started.elapsed();
    let stream = stream_of(&saved);
    if let Err(error) = load(&target, &stream).await {
        panic!("{error}\n{}", target.log());
    }
    eprintln!("up {up:?}, loaded {:?}, {} bytes", started.elapsed() - up, stream.len());
    assert_eq!(counter(&copy), saved.counter, "it must not run before cont");
    let process = memory_of(&target);
    let arrived = blocks_with_hosts(&target).await;
    for (block, bytes) in saved.blocks.iter().filter(|(block, _)| block.name != SHARED) {
        let other = arrived.iter().find(|other| other.name == block.name).expect("block");
        assert_eq!(other.used, block.used, "{}", block.name);
        assert!(block_bytes(&process, other) == *bytes, "{} differs", block.name);
    }
    target.qmp.execute_json("cont", Value::Null).await.expect("cont");
    wait_for_count(&copy, saved.counter).await;
    assert_eq!(run_state(&target.qmp).await.expect("state"), "running");
    // It continued from there and did not begin again.
    assert!(counter(&copy) < saved.counter.wrapping_add(u32::MAX / 2));
}

#[tokio::test]
async fn assembled_stream_is_loaded_and_the_guest_continues() {
    with_each_qemu(async |qemu| {
        save_and_restore(&qemu, "q35", &qemu).await;
        save_and_restore(&qemu, "pc", &qemu).await;
    })
    .await;
}

#[tokio::test]
async fn an_older_vm_moves_into_a_newer_qemu() {
    let qemus = common::qemus();
    save_and_restore(&qemus[0], "q35", &qemus[1]).await;
}

/// The setup part of a stream, and the address of each block in it.
fn setup_of(stream: &[u8], blocks: &[RamBlock]) -> (Vec<u8>, Vec<u64>) {
    let mut at = 0;
    let mut addresses = Vec::new();
    for block in blocks {
        let entry: Vec<u8> =
            [&[block.name.len() as u8], block.name.as_bytes(), &block.used.to_be_bytes()].concat();
        let found = stream[at..]
            .windows(entry.len())
            .position(|window| window == entry)
            .expect("block in stream");
        at += found + entry.len();
        addresses.push(u64::from_be_bytes(stream[at..at + 8].try_into().expect("8 bytes")));
        at += 8;
    }
    // End mark, footer, section number.
    (stream[..at + 8 + 5].to_vec(), addresses)
}

#[tokio::test]
async fn our_prefix_is_that_of_qemu() {
    with_each_qemu(async |qemu| {
        let memory = guest_memory();
        let vm = loop_guest::start(&qemu, "pc", &memory, &[]).await;
        let facts = VmFacts::read(&vm.qmp).await.expect("facts");
        assert_eq!(facts.ram_backend.as_deref(), Some(SHARED));
        assert_eq!(
            (facts.vcpus, facts.ram_bytes, facts.default_ram_id.as_deref()),
            (1, loop_guest::RAM, Some(SHARED))
        );
        assert_eq!(facts.migration_blockers, Vec::<String>::new());
        let blocks = ram_blocks(&vm.qmp).await.expect("blocks");
        let capability = json!([{ "capability": "x-ignore-shared", "state": true }]);
        vm.qmp
            .execute_json("migrate-set-capabilities", json!({ "capabilities": capability }))
            .await
            .expect("capability");
        let path = vm.path("real.stream");
        let uri = format!("exec:cat > {}", path.display());
        vm.qmp.execute_json("migrate", json!({ "uri": uri })).await.expect("migrate");
        while vm.qmp.execute_json("query-migrate", Value::Null).await.expect("query")["status"]
            != "completed"
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let (real, addresses) = setup_of(&std::fs::read(path).expect("stream"), &blocks);
        let listed = blocks.iter().zip(addresses).map(|(block, address)| StreamBlock {
            address,
            ..StreamBlock::new(block, block.name == SHARED)
        });
        let ours = StreamWriter::new(&facts.machine_type, listed.collect()).expect("writer").take();
        // Behind the setup ours continues with the head of its one section of pages.
        let mut ours = ours[..ours.len() - 5].to_vec();
        // QEMU numbers sections as it registers them; the number stands before the name and at the
        // end.
        let head = real.windows(4).position(|window| window == b"\x03ram").expect("section") - 4;
        let number = real[head..head + 4].to_vec();
        assert_eq!(number, real[real.len() - 4..]);
        let end = ours.len() - 4;
        ours[head..head + 4].copy_from_slice(&number);
        ours[end..].copy_from_slice(&number);
        assert!(
            ours == real,
            "{}\n{}",
            String::from_utf8_lossy(&ours),
            String::from_utf8_lossy(&real)
        );
    })
    .await;
}

#[tokio::test]
async fn a_stream_of_another_vm_is_refused_with_a_reason() {
    with_each_qemu(async |qemu| {
        let (memory, copy) = (guest_memory(), guest_memory());
        let source = loop_guest::start(&qemu, "pc", &memory, &[]).await;
        let saved = save(&source, &memory, &copy).await;
        let target = loop_guest::start(&qemu, "q35", &copy, &["-incoming", "defer", "-S"]).await;
        let error = load(&target, &stream_of(&saved)).await.expect_err("another machine type");
        eprintln!("{error}");
        assert!(
            matches!(error, MigrationError::Load { .. } | MigrationError::DestinationEnded),
            "{error}"
        );
        let error =
            Incoming::begin(&source.qmp, &source.path("i.sock")).await.expect_err("it runs");
        assert!(matches!(error, MigrationError::NotWaiting(_)), "{error}");
    })
    .await;
}

#[tokio::test]
async fn addresses_found_are_those_that_qemu_uses() {
    with_each_qemu(async |qemu| {
        let memory = guest_memory();
        let vm = loop_guest::start(&qemu, "pc", &memory, &["-S"]).await;
        let told = ram_blocks(&vm.qmp).await.expect("blocks");
        let mut found: Vec<RamBlock> =
            told.iter().map(|block| RamBlock { host: None, ..block.clone() }).collect();
        let maps = MemoryMaps::from_file(format!("/proc/{}/maps", vm.pid())).expect("maps");
        let start = std::time::Instant::now();
        find_hosts(&memory_of(&vm), &maps, &mut found).expect("hosts");
        eprintln!("{} blocks found in {:?}", found.len(), start.elapsed());
        for (told, found) in told.iter().zip(&found) {
            assert!(told.host.is_none() || told.host == found.host, "{}", told.name);
        }
        // What 7.2 does tell: where a guest address lies.
        let text = vm.qmp.hmp("gpa2hva 0x1000").await.expect("gpa2hva");
        let ram = found
            .iter()
            .find(|block| block.name == SHARED)
            .and_then(|block| block.host)
            .expect("host");
        assert!(text.contains(&format!("is {:#x}", ram + 0x1000)), "{text} {ram:#x}");
        let bios = found.iter().find(|block| block.name == "pc.bios").expect("firmware");
        assert_eq!(block_bytes(&memory_of(&vm), bios)[..2], [0x31, 0xc0]);
        let kinds: Vec<String> = devices::guest_devices(&vm.qmp)
            .await
            .expect("devices")
            .into_iter()
            .map(|device| device.kind)
            .collect();
        assert_eq!(kinds, ["virtio-net-pci", "virtio-rng-pci", "virtio-blk-pci"]);
    })
    .await;
}
