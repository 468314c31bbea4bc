//! Adoption: a machine that nobody prepared moves into a QEMU of ours while it runs. One machine goes on, whatever dies, and never two.

use std::path::Path;
use std::time::Duration;
use stillpoint_tests::{
    Lab, Line, Pid, Recipe, Taken, TestMachine, kill_hard, kill_points, on_each_qemu, processor_time, qemus, thorough, wait_until,
};

/// A guest that works takes a fifth of a processor and more; a stopped one none.
const WORK_SEEN_IN: Duration = Duration::from_secs(2);
const WORK: Duration = Duration::from_millis(60);

fn recipe() -> Recipe {
    Recipe::witness("q35-virtio.cfg").words("witness.rate=1500").arguments(&["-nic", "user,model=virtio-net-pci"])
}

/// A plain machine with two checkpoints by stream.
fn started(lab: &Lab) -> (TestMachine<'_>, Vec<Taken>) {
    let machine = lab.start_plain("m", &recipe());
    machine.wait_for_witness();
    machine.attach_plain(&[]);
    let taken = [(); 2].map(|()| {
        std::thread::sleep(Duration::from_millis(500));
        machine.checkpoint()
    });
    (machine, taken.into())
}

/// The guest went on where it was: no step twice, none left out beyond what lines leave out.
fn assert_never_back(machine: &TestMachine, last: &Line) {
    let after = machine.wait_for_line("a step after it", |line| line.step > last.step);
    let lines = machine.lines();
    let steps: Vec<u64> = lines.iter().map(|line| line.step).collect();
    assert!(steps.is_sorted(), "the guest went back: {steps:?}");
    machine.assert_all_right(&after);
}

#[test]
fn a_machine_is_adopted_in_the_middle_of_its_lineage() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let (mut machine, mut taken) = started(&lab);
        let last = machine.lines().pop().expect("it works");
        machine.adopt();
        eprintln!("adopted: {}", machine.report);
        assert!(machine.report["downtime_ms"].as_f64().is_some(), "{}", machine.report);
        assert_never_back(&machine, &last);
        assert_eq!(machine.qemus(), [machine.qemu()], "the QEMU that it came from has ended");
        let next = machine.checkpoint();
        assert_eq!((next.outcome.engine.as_str(), next.outcome.kind.as_str()), ("tracker", "incremental"));
        assert_eq!(next.outcome.parent, Some(taken[1].outcome.id));
        let full = taken[0].outcome.bytes_stored;
        assert!(next.outcome.bytes_stored < full / 4, "not small: {} after {full} for a full one", next.outcome.bytes_stored);
        taken.push(next);
        std::thread::sleep(Duration::from_millis(500));
        taken.push(machine.checkpoint());
        machine.kill();
        for taken in &taken {
            lab.restore(&taken.name, "restored", &[]).assert_continues(taken);
        }
        lab.verify("m");
    });
}

// ---- deaths

/// QEMUs whose guest works.
fn at_work(machine: &TestMachine) -> Vec<Pid> {
    let before: Vec<(Pid, Duration)> = machine.qemus().into_iter().map(|pid| (pid, processor_time(pid))).collect();
    std::thread::sleep(WORK_SEEN_IN);
    before.into_iter().filter(|(pid, then)| processor_time(*pid).saturating_sub(*then) > WORK).map(|(pid, _)| pid).collect()
}

/// After a death and a new helper: one machine goes on, nothing went back, the next checkpoint is whole.
fn assert_one_goes_on(lab: &Lab, machine: &mut TestMachine, what: &str, last: &Line, taken: &[Taken]) {
    // A QEMU that is just starting is at work for a moment, too.
    let at_most_one = wait_until(Duration::from_secs(10), || at_work(machine).len() <= 1);
    assert!(at_most_one, "{what}: {:?} are at work before a new helper came", at_work(machine));
    let ran = lab.run(&["attach", "m"]);
    assert!(ran.code == 0 || machine.helper().is_some(), "{what}: {}", ran.err);
    let one = wait_until(Duration::from_secs(10), || at_work(machine).len() == 1);
    assert!(one, "{what}: {:?} are at work of {:?}", at_work(machine), machine.qemus());
    machine.follow();
    assert!(machine.qemu_runs(), "{what}: QEMU ended");
    assert_never_back(machine, last);
    let next = machine.checkpoint();
    assert_eq!(next.outcome.parent, taken.last().map(|last| last.outcome.id), "{what}");
    assert_eq!(next.outcome.kind, "incremental", "{what}");
    machine.kill_helper();
    machine.kill_qemu();
    machine.qemus().into_iter().for_each(kill_hard);
    lab.restore(&next.name, "restored", &[]).assert_continues(&next);
}

fn points() -> Vec<String> {
    let points: Vec<String> = kill_points().into_iter().filter(|point| point.starts_with("adopt.")).collect();
    assert!(!points.is_empty(), "no kill points of an adoption");
    points
}

fn die_at(qemu: &Path, point: &str) {
    let lab = Lab::new(qemu);
    let (mut machine, taken) = started(&lab);
    machine.kill_helper();
    machine.attach_with(&[], &[("STILLPOINT_DIE_AT", point)]);
    let last = machine.lines().pop().expect("it works");
    // Helper and command may both come by the point.
    let ran = lab.run_with(&["adopt", "m", "--json"], &[("STILLPOINT_DIE_AT", point)]);
    assert_ne!(ran.code, 0, "{point}: nobody died: {}", ran.out);
    assert_one_goes_on(&lab, &mut machine, point, &last, &taken);
}

#[test]
fn one_machine_goes_on_wherever_the_helper_dies() {
    let all = qemus();
    on_each_qemu(|qemu| {
        // Each point with one of them at least; `STILLPOINT_TEST_THOROUGH=1`: each with each.
        let own = all.iter().position(|one| one == qemu).expect("it is one of them");
        let points = points().into_iter().enumerate().filter(|(number, _)| thorough() || number % all.len() == own);
        points.for_each(|(_, point)| die_at(qemu, &point));
    });
}

/// The QEMU that a machine moves into, once it is there.
fn destination(machine: &TestMachine) -> Option<Pid> {
    let mut other = None;
    wait_until(Duration::from_secs(20), || {
        other = machine.qemus().into_iter().find(|pid| *pid != machine.qemu());
        other.is_some()
    });
    other
}

/// Kills the destination some time after it is there.
fn destination_dies(qemu: &Path, after: Duration) {
    let lab = Lab::new(qemu);
    let (mut machine, taken) = started(&lab);
    let last = machine.lines().pop().expect("it works");
    let ran = std::thread::scope(|scope| {
        let adoption = scope.spawn(|| machine.try_adopt());
        let pid = destination(&machine).expect("a destination comes up");
        std::thread::sleep(after);
        kill_hard(pid);
        adoption.join().expect("it says above why not")
    });
    let what = format!("the destination killed after {after:?} ({})", ran.err.trim());
    if ran.code == 0 {
        // It was over: the machine's own QEMU has been killed, and so has the machine.
        assert!(at_work(&machine).is_empty(), "{what}: the source goes on after its successor");
        return;
    }
    assert_eq!(at_work(&machine), [machine.qemu()], "{what}: the source goes on");
    assert_one_goes_on(&lab, &mut machine, &what, &last, &taken);
}

#[test]
fn a_destination_that_dies_leaves_the_source_running() {
    let moments: &[u64] = if thorough() { &[0, 60, 200] } else { &[60] };
    on_each_qemu(|qemu| moments.iter().for_each(|after| destination_dies(qemu, Duration::from_millis(*after))));
}

#[test]
fn a_source_that_dies_leaves_one_machine_or_none() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let (mut machine, _) = started(&lab);
        let source = machine.qemu();
        let ran = std::thread::scope(|scope| {
            let adoption = scope.spawn(|| machine.try_adopt());
            destination(&machine).expect("a destination comes up");
            std::thread::sleep(Duration::from_millis(60));
            kill_hard(source);
            adoption.join().expect("it says above why not")
        });
        machine.follow();
        let working = at_work(&machine);
        let expected = if ran.code == 0 { vec![machine.qemu()] } else { Vec::new() };
        assert_eq!(working, expected, "{} {}", ran.code, ran.err);
        let left = machine.qemus();
        assert_eq!(left, expected, "a QEMU without a machine is left");
        lab.verify("m");
    });
}
