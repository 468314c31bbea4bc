//! Nothing that fails while a guest's memory arrives is for the guest to notice, or for an operator
//! to repair: a helper that dies is followed by another, whatever it was doing.

use crate::lazy::{
    Hold, assert_hydrating, hydration, move_away, packs, saved_witness, wait_until_hydrated,
};
use nix::sys::signal::{Signal, kill};
use std::time::Duration;
use stillpoint_tests::{
    Lab, Recipe, Scribbles, TestVm, is_running, kill_hard, newest_qemu, on_each_qemu, wait_until,
};

/// The host may be busy.
const TIMEOUT: Duration = Duration::from_secs(120);
const SUPERVISED: (&str, &str) = ("STILLPOINT_NO_SUPERVISOR", "");

/// Kills the helper, and waits for the next one, which comes unasked.
fn replace_helper(vm: &TestVm) {
    let killed = vm.helper().expect("a helper");
    kill_hard(killed);
    let is_replaced = || vm.helper().is_some_and(|pid| pid != killed);
    assert!(wait_until(TIMEOUT, is_replaced), "no other helper: {}", vm.said());
}

/// While a helper is being replaced nothing answers.
fn wait_for_answer(lab: &Lab, name: &str) {
    let answers = || lab.run(&["status", name]).code == 0;
    assert!(wait_until(TIMEOUT, answers), "no helper answers");
}

#[test]
fn supervisor_replaces_a_killed_helper_and_the_guest_continues() {
    on_each_qemu(|qemu| {
        let mut lab = Lab::new(qemu);
        lab.with_supervisor();
        let hold = Hold::begin(&mut lab);
        let vm = lab.start("m", &Recipe::witness("q35-virtio.cfg"));
        vm.wait_for_witness();
        replace_helper(&vm);
        wait_for_answer(&lab, "m");
        let taken = vm.checkpoint();
        vm.kill();

        let vm = lab.restore("m", "m", &["--lazy"]);
        for _ in 0..2 {
            replace_helper(&vm);
            vm.assert_makes_progress();
            wait_for_answer(&lab, "m");
            assert_hydrating(&lab, "m");
        }
        hold.release();
        replace_helper(&vm);
        wait_for_answer(&lab, "m");
        wait_until_hydrated(&lab, "m");
        vm.assert_continues(&taken);
        let after = vm.checkpoint();
        assert_eq!(after.outcome.parent, Some(taken.outcome.id), "{:?}", after.outcome);
        lab.verify("m");

        // One that is asked to end is not replaced.
        let (helper, supervisor) = (vm.helper().expect("one"), vm.supervisor().expect("one"));
        kill(helper, Signal::SIGTERM).expect("ours");
        let are_gone = || !is_running(helper) && !is_running(supervisor);
        assert!(wait_until(TIMEOUT, are_gone), "it was asked to end: {}", vm.said());
        assert_eq!(vm.helper(), None);
        vm.attach();
        // Nor one whose QEMU has ended.
        let (helper, supervisor) = (vm.helper().expect("one"), vm.supervisor().expect("one"));
        let mut vm = vm;
        vm.kill_qemu();
        let are_gone = || !is_running(helper) && !is_running(supervisor);
        assert!(wait_until(TIMEOUT, are_gone), "QEMU has ended: {}", vm.said());
    });
}

#[test]
fn supervisor_is_ended_with_a_helper_that_is_taken_over_by_force() {
    let mut lab = Lab::new(&newest_qemu());
    lab.with_supervisor();
    let vm = lab.start("m", &Recipe::scribbler(101));
    let helper = vm.wait_for_helper();
    let supervisor = vm.supervisor().expect("one");
    kill(helper, Signal::SIGSTOP).expect("ours");
    vm.attach_with(&["--take-over"], &[]);
    assert!(!is_running(helper) && wait_until(TIMEOUT, || !is_running(supervisor)));
    assert!(vm.helper().is_some() && vm.supervisor().is_some_and(|pid| pid != supervisor));
    vm.checkpoint();
}

/// The guest's memory is a function of one register, so each byte can be judged.
#[test]
fn hydration_is_exact_whatever_the_helper_was_doing_when_it_died() {
    let points = [
        "restore.listening",
        "restore.fault",
        "restore.filling",
        "restore.zeros",
        "restore.hydrated",
        "restore.recorded",
    ];
    let mut lab = Lab::new(&newest_qemu());
    let hold = Hold::begin(&mut lab);
    let vm = lab.start("m", &Recipe::scribbler(102));
    vm.checkpoint();
    vm.kill();
    for point in points {
        hold.hold();
        let vm = lab.restore("m", "m", &["--lazy"]);
        vm.kill_helper();
        if point != "restore.fault" {
            hold.release();
        }
        vm.attach_with(&[], &[("STILLPOINT_DIE_AT", point), SUPERVISED]);
        let log = lab.runtime().join("m/helper.log");
        let has_died = || {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            text.lines().any(|line| line.contains("dying") && line.contains(point))
        };
        assert!(wait_until(TIMEOUT, has_died), "{point} is never passed: {}", vm.said());
        if point == "restore.fault" {
            hold.release();
        }
        wait_for_answer(&lab, "m");
        wait_until_hydrated(&lab, "m");
        let mut monitor = vm.qmp();
        monitor.stop();
        let wrong = Scribbles::new(102).differences(&mut monitor);
        assert!(wrong.is_empty(), "{point}: pages {wrong:?}");
        vm.kill();
    }
    lab.verify("m");
}

/// A store that stays away: the operator has said what then.
#[test]
fn hydration_deadline_stops_the_guest_until_cont() {
    let mut lab = Lab::new(&newest_qemu());
    let hold = Hold::begin(&mut lab);
    let taken = saved_witness(&lab);
    let vm = lab.restore("m", "m", &["--lazy", "--deadline", "1s"]);
    let store = lab.store_directory();
    let away = move_away(&store);
    let says = |what: &str| {
        let status = hydration(&lab, "m").expect("it is under way");
        (status[what]["since"].is_string()).then(|| status[what]["message"].to_string())
    };
    assert!(wait_until(TIMEOUT, || says("stopped").is_some()), "{:?}", hydration(&lab, "m"));
    let message = says("stopped").expect("it was there");
    assert!(message.contains(lab.store()), "{message}");
    assert!(says("store_away").is_some(), "{:?}", hydration(&lab, "m"));
    std::fs::rename(&away, &store).expect("a store");
    // QEMU carries the order out at the latest when the page has come.
    assert!(wait_until(TIMEOUT, || !vm.qmp().is_running()), "the guest runs");
    assert!(wait_until(TIMEOUT, || says("store_away").is_none()), "{:?}", hydration(&lab, "m"));
    assert!(says("stopped").is_some() && !vm.qmp().is_running());
    vm.qmp().cont();
    vm.assert_makes_progress();
    hold.release();
    wait_until_hydrated(&lab, "m");
    vm.assert_continues(&taken);
}

/// A stopped guest needs no page, so it is the filler that finds the damage.
#[test]
fn hydration_damaged_frame_holds_up_no_other_page() {
    /// More than is read at once.
    const READ: u64 = 20 << 20;
    let mut lab = Lab::new(&newest_qemu());
    let hold = Hold::begin(&mut lab);
    let taken = saved_witness(&lab);
    let vm = lab.restore("m", "m", &["--lazy", "--paused"]);
    let pack = packs(&lab).into_iter().max_by_key(|pack| std::fs::metadata(pack).unwrap().len());
    let pack = pack.expect("a pack");
    let whole = std::fs::read(&pack).expect("a pack");
    let mut damaged = whole.clone();
    // Disks come before memory.
    damaged[whole.len() / 4 * 3] ^= 0xff;
    std::fs::write(&pack, damaged).expect("a pack");
    hold.release();
    let to_come = || {
        let status = hydration(&lab, "m").expect("a page is missing");
        let number = |key: &str| status[key].as_u64().expect("a number");
        assert!(number("total_bytes") > 2 * READ, "{status}");
        let message = status["damaged"]["message"].as_str().map(str::to_owned);
        (number("total_bytes") - number("done_bytes"), message)
    };
    let rest_is_here = || matches!(to_come(), (1..READ, Some(_)));
    assert!(wait_until(TIMEOUT, rest_is_here), "{:?}", hydration(&lab, "m"));
    let (_, message) = to_come();
    let name = pack.file_name().expect("a name").to_string_lossy().into_owned();
    assert!(message.as_ref().is_some_and(|said| said.contains(&name)), "{message:?}: {name}");
    std::fs::write(&pack, &whole).expect("a pack");
    wait_until_hydrated(&lab, "m");
    vm.qmp().cont();
    vm.assert_continues(&taken);
}

/// What the store says of who needs the checkpoints of `m`.
fn readers(lab: &Lab) -> Vec<String> {
    let files = std::fs::read_dir(lab.store_directory().join("vms/m/readers"));
    let names = files.into_iter().flatten().flatten().map(|file| file.file_name());
    names.map(|name| name.to_string_lossy().into_owned()).collect()
}

#[test]
fn hydration_protects_its_checkpoint_until_all_is_here() {
    let mut lab = Lab::for_vms(&newest_qemu(), 2);
    let hold = Hold::begin(&mut lab);
    let vm = lab.start("m", &Recipe::scribbler(104));
    vm.checkpoint();
    vm.checkpoint();
    vm.kill();
    let vm = lab.restore("m@2", "copy", &["--lazy"]);
    let is_noted = || readers(&lab).len() == 1;
    assert!(wait_until(TIMEOUT, is_noted), "{:?}", readers(&lab));
    assert!(readers(&lab)[0].starts_with("2."), "{:?}", readers(&lab));
    // The next helper is the same reader.
    let first = readers(&lab);
    vm.kill_helper();
    vm.attach();
    let is_renewed = || is_noted() && readers(&lab) != first;
    assert!(wait_until(TIMEOUT, is_renewed), "{:?} after {first:?}", readers(&lab));
    hold.release();
    wait_until_hydrated(&lab, "copy");
    assert!(wait_until(TIMEOUT, || readers(&lab).is_empty()), "{:?}", readers(&lab));
    vm.kill();

    hold.hold();
    let mut vm = lab.restore("m", "m", &["--lazy"]);
    assert!(wait_until(TIMEOUT, is_noted), "{:?}", readers(&lab));
    vm.kill_qemu();
    assert!(wait_until(TIMEOUT, || readers(&lab).is_empty()), "{:?}", readers(&lab));
}

/// As when the host is lost.
#[test]
fn hydration_that_ends_with_its_host_leaves_the_checkpoint_as_it_was() {
    let mut lab = Lab::new(&newest_qemu());
    let hold = Hold::begin(&mut lab);
    let vm = lab.start("m", &Recipe::scribbler(103));
    let taken = vm.checkpoint();
    vm.kill();
    let vm = lab.restore("m", "m", &["--lazy"]);
    assert_hydrating(&lab, "m");
    vm.kill();
    assert_eq!(lab.list("m"), [taken.outcome.id]);
    lab.verify("m");
    let vm = lab.restore("m", "m", &["--lazy"]);
    hold.release();
    wait_until_hydrated(&lab, "m");
    let mut monitor = vm.qmp();
    monitor.stop();
    let wrong = Scribbles::new(103).differences(&mut monitor);
    assert!(wrong.is_empty(), "pages {wrong:?}");
}
