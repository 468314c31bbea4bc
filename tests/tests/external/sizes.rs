//! What a checkpoint by stream costs: all memory goes through the stream, and only what changed
//! goes to the store.

use super::memory_limit;
use engine::checkpoint::outcome::Kind;
use std::fs::File;
use std::io::{Read, Write};
use std::time::Duration;
use stillpoint_tests::cost::{IDLE_BYTES, MANY_BYTES, OVERHEAD, TIMELESS};
use stillpoint_tests::{
    Lab, QmpClient, Recipe, TestVm, newest_qemu, on_each_qemu, stored_over_changed, stream_modes,
    wait_for_scribbles,
};

#[test]
fn an_idle_guest_costs_next_to_nothing() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let vm = lab.start_plain(
            "idle",
            &Recipe::witness("q35-virtio.cfg").words("witness.rate=0 witness.report_ms=1000"),
        );
        vm.wait_for_witness();
        vm.attach_plain(&[]);
        vm.checkpoint();
        std::thread::sleep(Duration::from_secs(2));
        let sizes = [(); 3].map(|()| {
            std::thread::sleep(Duration::from_secs(1));
            vm.checkpoint().outcome.bytes_stored
        });
        assert!(
            sizes.iter().all(|size| *size <= IDLE_BYTES),
            "{sizes:?} bytes for an idle second each"
        );
    });
}

/// The scribbler at rest: stopped, and far enough to have been seen to work.
fn at_rest(lab: &Lab) -> (TestVm<'_>, QmpClient) {
    let vm = lab.start_plain("still", &Recipe::scribbler(3).arguments(TIMELESS));
    let mut monitor = vm.qmp();
    wait_for_scribbles(&mut monitor);
    monitor.stop();
    vm.attach_plain(&[]);
    (vm, monitor)
}

#[test]
fn nothing_is_stored_when_nothing_changed() {
    let lab = Lab::new(&newest_qemu());
    let (vm, mut monitor) = at_rest(&lab);
    let first = vm.checkpoint().outcome;
    let second = vm.checkpoint().outcome;
    assert_eq!((second.kind, second.id, second.bytes_stored), (Kind::Unchanged, first.id, 0));
    assert_eq!(lab.list("still"), [first.id]);
    assert!(!monitor.is_running(), "it was stopped before the checkpoint, so it stays so");
    monitor.disk_io("cow", "write -P 7 0 4096");
    let third = vm.checkpoint().outcome;
    assert_eq!((third.kind, third.parent), (Kind::Incremental, Some(first.id)));
    monitor.cont();
    lab.verify("still");
}

/// A guest that does not run is not migrated, since QEMU migrates one only once; whatever was
/// chosen for it.
#[test]
fn stopped_guest_is_read_from_qemus_process() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let (vm, mut monitor) = at_rest(&lab);
        let words = ["--stream", stream_modes(qemu)[0]];
        let first = vm.checkpoint_with(&words).outcome;
        let second = vm.checkpoint_with(&words).outcome;
        assert_eq!(
            (first.engine.as_str(), second.kind, second.id),
            ("process-memory", Kind::Unchanged, first.id)
        );
        assert_eq!(monitor.execute("query-status", serde_json::json!({}))["status"], "paused");
        monitor.cont();
        std::thread::sleep(Duration::from_millis(500));
        let next = vm.checkpoint_with(&words).outcome;
        assert_eq!((next.kind, next.parent), (Kind::Incremental, Some(first.id)));
        assert!(monitor.is_running() && next.engine != "process-memory");
        lab.verify("still");
    });
}

#[test]
fn a_large_change_is_stored_with_little_besides() {
    for mode in stream_modes(&newest_qemu()) {
        let lab = Lab::new(&newest_qemu());
        let busy = "witness.table_mib=24 witness.rate=6000 witness.journal_pages=16";
        let vm = lab.start_plain("busy", &Recipe::witness("q35-virtio.cfg").words(busy));
        vm.wait_for_witness();
        vm.attach_plain(&["--stream", mode]);
        vm.checkpoint();
        for _ in 0..2 {
            std::thread::sleep(Duration::from_secs(1));
            let outcome = vm.checkpoint().outcome;
            assert!(
                outcome.bytes_changed > MANY_BYTES,
                "the guest is not busy enough: {outcome:?}"
            );
            let ratio = stored_over_changed(&outcome);
            assert!(ratio <= OVERHEAD, "{mode}: {ratio:.3}: {outcome:?}");
        }
        vm.assert_no_contradiction();
    }
}

/// Half a GiB of noise, which no digest and no compression makes smaller, and all of it new.
#[test]
fn the_helper_keeps_its_limit_whatever_memory_holds() {
    let ram_mib = 512;
    let object = format!("memory-backend-memfd,id=mem,size={ram_mib}M,share=on");
    let recipe = Recipe::scribbler(5).arguments(&[
        "-m",
        "512",
        "-object",
        &object,
        "-machine",
        "memory-backend=mem",
    ]);
    for mode in stream_modes(&newest_qemu()) {
        let lab = Lab::new(&newest_qemu());
        let vm = lab.start_plain("large", &recipe);
        wait_for_scribbles(&mut vm.qmp());
        fill_with_noise(&vm, 16, ram_mib);
        vm.attach_plain(&["--stream", mode]);
        let first = vm.checkpoint().outcome;
        assert!(
            first.bytes_stored > (ram_mib - 17) << 20,
            "{mode}: memory was not full: {first:?}"
        );
        fill_with_noise(&vm, 16, ram_mib / 2);
        let second = vm.checkpoint().outcome;
        assert!(second.bytes_changed > (ram_mib / 2 - 17) << 20, "{mode}: {second:?}");
        assert!(stored_over_changed(&second) <= OVERHEAD, "{mode}: {second:?}");
        let (held, limit) = (vm.helper_peak_bytes(), memory_limit(ram_mib << 20));
        eprintln!("{mode}: the helper held {} MiB of at most {} MiB", held >> 20, limit >> 20);
        assert!(held <= limit, "{mode}: the helper held {held} bytes of at most {limit}");
    }
}

/// Writes to the guest's memory from outside, from one MiB to another; nothing of the guest lives
/// there.
fn fill_with_noise(vm: &TestVm, from_mib: u64, until_mib: u64) {
    let folder = format!("/proc/{}/fd", vm.qemu());
    let mut files =
        std::fs::read_dir(folder).expect("QEMU runs").flatten().map(|entry| entry.path());
    let is_memory = |path: &std::path::PathBuf| {
        std::fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains("memfd:"))
    };
    let memory = files.find(is_memory).expect("RAM is a memfd");
    let mut memory = File::options().write(true).open(memory).expect("the test is QEMU's user");
    std::io::Seek::seek(&mut memory, std::io::SeekFrom::Start(from_mib << 20))
        .expect("a memfd can be sought");
    let mut noise = File::open("/dev/urandom").expect("the kernel has it");
    let mut piece = vec![0; 1 << 20];
    for _ in from_mib..until_mib {
        noise.read_exact(&mut piece).expect("it does not end");
        memory.write_all(&piece).expect("it is as long as RAM");
    }
}
