//! What a checkpoint costs: next to nothing for a guest that does nothing, and little more than its
//! changes otherwise.

use engine::checkpoint::outcome::Kind;
use std::time::Duration;
use stillpoint_tests::cost::{IDLE_BYTES, MANY_BYTES, OVERHEAD, TIMELESS};
use stillpoint_tests::{
    Lab, Recipe, newest_qemu, on_each_qemu, stored_over_changed, wait_for_scribbles,
};

#[test]
fn an_idle_guest_costs_next_to_nothing() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let vm = lab.start(
            "idle",
            &Recipe::witness("q35-virtio.cfg").words("witness.rate=0 witness.report_ms=1000"),
        );
        vm.wait_for_witness();
        vm.checkpoint();
        std::thread::sleep(Duration::from_secs(2));
        let sizes: Vec<u64> = (0..3)
            .map(|_| {
                std::thread::sleep(Duration::from_secs(1));
                vm.checkpoint().outcome.bytes_stored
            })
            .collect();
        assert!(
            sizes.iter().all(|size| *size <= IDLE_BYTES),
            "{sizes:?} bytes for an idle second each"
        );
    });
}

#[test]
fn nothing_is_stored_when_nothing_changed() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let vm = lab.start("still", &Recipe::scribbler(3).arguments(TIMELESS));
        let mut monitor = vm.qmp();
        wait_for_scribbles(&mut monitor);
        monitor.stop();
        let first = vm.checkpoint().outcome;
        let second = vm.checkpoint().outcome;
        assert_eq!((second.kind, second.id, second.bytes_stored), (Kind::Unchanged, first.id, 0));
        assert_eq!(lab.list("still"), [first.id]);
        assert!(!monitor.is_running(), "it was stopped before the checkpoint, so it stays so");
        monitor.disk_io("cow", "write -P 7 0 4096");
        let third = vm.checkpoint().outcome;
        assert_eq!((third.kind, third.parent), (Kind::Incremental, Some(first.id)));
        monitor.cont();
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(vm.checkpoint().outcome.parent, Some(third.id));
        lab.verify("still");
    });
}

#[test]
fn a_vm_restored_paused_can_be_checkpointed_before_it_runs() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let vm = lab.start("m", &Recipe::scribbler(8));
        wait_for_scribbles(&mut vm.qmp());
        let first = vm.checkpoint().outcome;
        vm.kill();
        let restored = lab.restore("m", "m", &["--paused"]);
        let second = restored.checkpoint().outcome;
        // What QEMU itself wrote while it loaded the state may count as a change, and is all that
        // does.
        assert!(
            second.kind == Kind::Unchanged
                || second.parent == Some(first.id) && second.bytes_changed < 1 << 20,
            "{second:?}"
        );
        assert!(!restored.qmp().is_running());
        restored.qmp().cont();
        restored.checkpoint();
        lab.verify("m");
    });
}

#[test]
fn a_large_change_is_stored_with_little_besides() {
    let lab = Lab::new(&newest_qemu());
    let busy = "witness.table_mib=24 witness.rate=6000 witness.journal_pages=16";
    let vm = lab.start("busy", &Recipe::witness("q35-virtio.cfg").words(busy));
    vm.wait_for_witness();
    vm.checkpoint();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_secs(1));
        let outcome = vm.checkpoint().outcome;
        assert!(outcome.bytes_changed > MANY_BYTES, "the guest is not busy enough: {outcome:?}");
        let ratio = stored_over_changed(&outcome);
        assert!(ratio <= OVERHEAD, "{ratio:.3}: {outcome:?}");
    }
    vm.assert_no_contradiction();
}
