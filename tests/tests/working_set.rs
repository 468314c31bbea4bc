//! What a guest needed first after a restore comes first after the next one.

use crate::lazy::{Hold, assert_hydrating, hydration, saved_witness, wait_until_hydrated};
use checkpoint_format::WorkingSet;
use std::time::Duration;
use stillpoint_tests::{Lab, on_each_qemu, wait_until};

/// The host may be busy.
const TIMEOUT: Duration = Duration::from_secs(120);

fn number(lab: &Lab, key: &str) -> Option<u64> {
    hydration(lab, "m").and_then(|status| status[key].as_u64())
}

#[test]
fn lazy_restore_brings_first_what_the_guest_needed_first_the_last_time() {
    on_each_qemu(|qemu| {
        let mut lab = Lab::new(qemu);
        let hold = Hold::begin(&mut lab);
        let taken = saved_witness(&lab);

        let vm = lab.restore("m", "m", &["--lazy"]);
        vm.assert_makes_progress();
        let record = lab.store_directory().join("vms/m/working-set");
        assert!(wait_until(TIMEOUT, || record.exists()), "no working set");
        let set = WorkingSet::parse(&std::fs::read(&record).expect("a file")).expect("a set");
        let set_bytes = set.pages.pages().byte_len().0;
        let without = number(&lab, "faults").expect("it should be under way");
        assert!(set_bytes > 0 && without > 0, "{set_bytes} {without}");
        vm.kill();

        hold.hold_rest();
        let vm = lab.restore("m", "m", &["--lazy", "--paused"]);
        // Pages of zeros are in the set and are not counted here.
        let came = wait_until(TIMEOUT, || number(&lab, "done_bytes") > Some(set_bytes / 2));
        assert!(came, "{:?} of {set_bytes}", hydration(&lab, "m"));
        vm.qmp().cont();
        vm.assert_makes_progress();
        assert_hydrating(&lab, "m");
        let with = number(&lab, "faults").expect("it should be under way");
        assert!(with < without / 2, "{with} pages were waited for, {without} without the set");
        vm.kill();

        hold.release();
        std::fs::write(&record, "damaged").expect("a file");
        let vm = lab.restore("m", "m", &["--lazy"]);
        wait_until_hydrated(&lab, "m");
        vm.assert_continues(&taken);
    });
}
