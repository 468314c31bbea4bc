//! Adoption: an external VM moves into a managed QEMU while it runs. Whichever process dies,
//! exactly one VM continues, never two.

use engine::checkpoint::outcome::Kind;
use engine::kill_point::POINTS;
use std::path::Path;
use std::time::Duration;
use stillpoint_tests::{
    Lab, Line, Pid, Recipe, Taken, TestVm, kill_hard, on_each_qemu, processor_time, qemus,
    thorough, wait_until,
};

/// A guest that works takes a fifth of a processor and more; a stopped one none.
const WORK_SEEN_IN: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_secs(20);
const WORK: Duration = Duration::from_millis(60);

fn recipe() -> Recipe {
    Recipe::witness("q35-virtio.cfg")
        .words("witness.rate=1500")
        .arguments(&["-nic", "user,model=virtio-net-pci"])
}

/// A plain VM with two checkpoints by stream.
fn started(lab: &Lab) -> (TestVm<'_>, Vec<Taken>) {
    let vm = lab.start_plain("m", &recipe());
    vm.wait_for_witness();
    vm.attach_plain(&[]);
    let taken = [(); 2].map(|()| {
        std::thread::sleep(Duration::from_millis(500));
        vm.checkpoint()
    });
    (vm, taken.into())
}

/// The guest continued where it was: no step twice, none left out beyond what lines leave out.
fn assert_never_back(vm: &TestVm, last: &Line) {
    let after = vm.wait_for_line("a step after it", |line| line.step > last.step);
    let lines = vm.lines();
    let steps: Vec<u64> = lines.iter().map(|line| line.step).collect();
    assert!(steps.is_sorted(), "the guest went back: {steps:?}");
    vm.assert_all_right(&after);
}

#[test]
fn a_vm_is_adopted_in_the_middle_of_its_lineage() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let (mut vm, mut taken) = started(&lab);
        let last = vm.lines().pop().expect("it works");
        vm.adopt();
        eprintln!("adopted: {}", vm.report);
        assert!(vm.report["downtime_ms"].as_f64().is_some(), "{}", vm.report);
        // Before the guest has written all that it writes at all.
        let next = vm.checkpoint();
        assert_never_back(&vm, &last);
        assert_eq!(vm.qemus(), [vm.qemu()], "the QEMU that it came from has ended");
        assert_eq!(
            (next.outcome.engine.as_str(), next.outcome.kind),
            ("tracker", Kind::Incremental)
        );
        assert_eq!(next.outcome.parent, Some(taken[1].outcome.id));
        let full = taken[0].outcome.bytes_stored;
        assert!(
            next.outcome.bytes_stored < full / 4,
            "not small: {} after {full} for a full one",
            next.outcome.bytes_stored
        );
        taken.push(next);
        std::thread::sleep(Duration::from_millis(500));
        taken.push(vm.checkpoint());
        vm.kill();
        for taken in &taken {
            lab.restore(&taken.name, "restored", &[]).assert_continues(taken);
        }
        lab.verify("m");
    });
}

// ---- deaths

/// QEMUs whose guest works.
fn at_work(vm: &TestVm) -> Vec<Pid> {
    let before: Vec<(Pid, Duration)> =
        vm.qemus().into_iter().map(|pid| (pid, processor_time(pid))).collect();
    std::thread::sleep(WORK_SEEN_IN);
    before
        .into_iter()
        .filter(|(pid, then)| processor_time(*pid).saturating_sub(*then) > WORK)
        .map(|(pid, _)| pid)
        .collect()
}

/// After a death and a new helper: one VM continues, nothing went back, the next checkpoint is
/// whole.
fn assert_one_continues(lab: &Lab, vm: &mut TestVm, what: &str, last: &Line, taken: &[Taken]) {
    // A QEMU that is just starting is at work for a moment, too.
    let at_most_one = wait_until(Duration::from_secs(10), || at_work(vm).len() <= 1);
    assert!(at_most_one, "{what}: {:?} are at work before a new helper came", at_work(vm));
    let ran = lab.run(&["attach", "m"]);
    assert!(ran.code == 0 || vm.helper().is_some(), "{what}: {}", ran.err);
    let one = wait_until(Duration::from_secs(10), || at_work(vm).len() == 1);
    assert!(one, "{what}: {:?} are at work of {:?}", at_work(vm), vm.qemus());
    vm.follow();
    assert!(vm.qemu_runs(), "{what}: QEMU ended");
    assert_never_back(vm, last);
    let next = vm.checkpoint();
    assert_eq!(next.outcome.parent, taken.last().map(|last| last.outcome.id), "{what}");
    assert_eq!(next.outcome.kind, Kind::Incremental, "{what}");
    vm.kill_helper();
    vm.kill_qemu();
    vm.qemus().into_iter().for_each(kill_hard);
    lab.restore(&next.name, "restored", &[]).assert_continues(&next);
}

fn points() -> Vec<&'static str> {
    let points: Vec<&str> =
        POINTS.iter().copied().filter(|point| point.starts_with("adopt.")).collect();
    assert!(!points.is_empty(), "no kill points of an adoption");
    points
}

fn die_at(qemu: &Path, point: &str) {
    let lab = Lab::new(qemu);
    let (mut vm, taken) = started(&lab);
    vm.kill_helper();
    vm.attach_with(&[], &[("STILLPOINT_DIE_AT", point)]);
    let last = vm.lines().pop().expect("it works");
    // Helper and command may both come by the point.
    let ran = lab.run_with(&["adopt", "m", "--json"], &[("STILLPOINT_DIE_AT", point)]);
    assert_ne!(ran.code, 0, "{point}: no process died: {}", ran.out);
    assert_one_continues(&lab, &mut vm, point, &last, &taken);
}

#[test]
fn one_vm_continues_wherever_the_helper_dies() {
    let all = qemus();
    on_each_qemu(|qemu| {
        // Each point with one of them at least; `STILLPOINT_TEST_THOROUGH=1`: each with each.
        let own = all.iter().position(|one| one == qemu).expect("it is one of them");
        let points = points()
            .into_iter()
            .enumerate()
            .filter(|(number, _)| thorough() || number % all.len() == own);
        points.for_each(|(_, point)| die_at(qemu, point));
    });
}

/// The QEMU that a VM moves into, once it is there.
fn destination(vm: &TestVm) -> Option<Pid> {
    let mut other = None;
    wait_until(Duration::from_secs(20), || {
        other = vm.qemus().into_iter().find(|pid| *pid != vm.qemu());
        other.is_some()
    });
    other
}

/// The stage of the adoption under way, as its record has it.
fn stage(lab: &Lab) -> Option<String> {
    let record = std::fs::read(lab.runtime().join("m/adopt.json")).ok()?;
    let record: serde_json::Value = serde_json::from_slice(&record).ok()?;
    Some(record["stage"].as_str()?.to_owned())
}

/// Kills the destination when the adoption is at a stage.
fn destination_dies(qemu: &Path, at: &str) {
    let lab = Lab::new(qemu);
    let (mut vm, taken) = started(&lab);
    let last = vm.lines().pop().expect("it works");
    let ran = std::thread::scope(|scope| {
        let adoption = scope.spawn(|| vm.try_adopt());
        let pid = destination(&vm).expect("a destination comes up");
        wait_until(TIMEOUT, || stage(&lab).is_none_or(|stage| stage == at));
        kill_hard(pid);
        adoption.join().expect("it says above why not")
    });
    let what = format!("the destination killed when {at} ({})", ran.err.trim());
    if ran.code == 0 {
        // It was over: the VM's own QEMU has been killed, and so has the VM.
        assert!(at_work(&vm).is_empty(), "{what}: the source continues after its successor");
        return;
    }
    assert_eq!(at_work(&vm), [vm.qemu()], "{what}: the source continues");
    assert_one_continues(&lab, &mut vm, &what, &last, &taken);
}

#[test]
fn a_destination_that_dies_leaves_the_source_running() {
    let stages: &[&str] =
        if thorough() { &["started", "moving", "decided", "running"] } else { &["moving"] };
    on_each_qemu(|qemu| stages.iter().for_each(|stage| destination_dies(qemu, stage)));
}

#[test]
fn a_source_that_dies_leaves_one_vm_or_none() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let (mut vm, _) = started(&lab);
        let source = vm.qemu();
        let ran = std::thread::scope(|scope| {
            let adoption = scope.spawn(|| vm.try_adopt());
            destination(&vm).expect("a destination comes up");
            wait_until(TIMEOUT, || stage(&lab).is_none_or(|stage| stage == "moving"));
            kill_hard(source);
            adoption.join().expect("it says above why not")
        });
        vm.follow();
        let working = at_work(&vm);
        let expected = if ran.code == 0 { vec![vm.qemu()] } else { Vec::new() };
        assert_eq!(working, expected, "{} {}", ran.code, ran.err);
        let left = vm.qemus();
        assert_eq!(left, expected, "a QEMU without a VM is left");
        lab.verify("m");
    });
}
