//! The helper dies at every point of a checkpoint; the guest does not notice, and nothing is lost.

use checkpoint_format::CheckpointId;
use engine::checkpoint::outcome::Kind;
use engine::kill_point::POINTS;
use nix::sys::signal::{Signal, kill};
use std::path::Path;
use std::time::Duration;
use stillpoint_tests::{
    Lab, Pid, Ran, Recipe, Taken, TestVm, is_running, newest_qemu, on_each_qemu, wait_until,
};

/// The points that the tracker passes.
fn points() -> impl Iterator<Item = &'static str> {
    let others = ["stream.", "adopt.", "restore.", "rollback."];
    let is_other = move |point: &str| others.iter().any(|other| point.starts_with(other));
    POINTS.iter().copied().filter(move |point| !is_other(point))
}

fn recipe() -> Recipe {
    Recipe::witness("q35-virtio.cfg")
}

/// Lets the helper die at `point` of the checkpoint that is asked for now.
fn die_at(vm: &TestVm, point: &str) {
    let ran = vm.try_checkpoint();
    assert_ne!(ran.code, 0, "{point}: the helper should have died: {}", ran.out);
    assert!(ran.err.contains("helper"), "{point}: {}", ran.err);
    assert!(
        wait_until(Duration::from_secs(5), || vm.helper().is_none()),
        "{point}: the helper lives"
    );
    assert!(vm.qemu_runs(), "{point}: QEMU died with its helper");
}

/// The same with a helper of its own.
fn die_attached(vm: &TestVm, point: &str) {
    vm.kill_helper();
    vm.attach_with(&[], &[("STILLPOINT_DIE_AT", point)]);
    die_at(vm, point);
}

/// After a death at `point`: the guest continues, the store has whole checkpoints only, the next
/// one is complete.
fn recover(lab: &Lab, vm: &TestVm, point: &str, known: &[CheckpointId]) -> Taken {
    // Only a guest that was stopped at that moment needs a new helper to let it continue.
    if !point.ends_with(".paused") {
        vm.assert_makes_progress();
    }
    let listed = lab.list(&vm.name);
    let new =
        listed.strip_prefix(known).unwrap_or_else(|| panic!("{point}: {listed:?} after {known:?}"));
    assert_eq!(new.len(), usize::from(point == "committed"), "{point}: {listed:?} after {known:?}");
    vm.attach();
    vm.assert_makes_progress();
    let taken = vm.checkpoint();
    assert_eq!(taken.outcome.parent, listed.last().copied(), "{point}");
    taken
}

/// Every checkpoint by itself brings a VM back.
fn restore_all(lab: &Lab, taken: &[(&str, Taken)]) {
    for (point, taken) in taken {
        eprintln!("restoring {}, taken after a death at {point}", taken.name);
        lab.restore(&taken.name, "restored", &[]).assert_continues(taken);
    }
}

#[test]
fn a_helper_may_die_at_every_point_of_a_checkpoint() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let vm = lab.start("m", &recipe());
        vm.wait_for_witness();
        let mut known = vec![vm.checkpoint().outcome.id];
        let mut all = Vec::new();
        for point in points() {
            if point == "pre-copy.paused" {
                // Live passes come only where much is dirty: for a helper that does not know what
                // has changed.
                die_attached(&vm, "prepared");
            }
            die_attached(&vm, point);
            let taken = recover(&lab, &vm, point, &known);
            known = lab.list("m");
            assert_eq!(known.last(), Some(&taken.outcome.id));
            all.push((point, taken));
        }
        lab.verify("m");
        vm.kill();
        restore_all(&lab, &all);
    });
}

#[test]
fn a_helper_may_die_at_every_point_of_the_first_checkpoint() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let vm = lab.start_with("m", &recipe(), &[("STILLPOINT_DIE_AT", "pre-copy.paused")]);
        vm.wait_for_witness();
        die_at(&vm, "pre-copy.paused");
        assert!(!vm.qmp().is_running(), "it died while the guest was stopped");
        let first_points =
            ["pre-copy", "pause.paused", "pause.captured", "upload", "uploaded", "commit"];
        for point in first_points {
            die_attached(&vm, point);
            assert_eq!(lab.list("m"), [] as [CheckpointId; 0], "{point}");
        }
        vm.attach();
        vm.assert_makes_progress();
        let taken = vm.checkpoint();
        assert_eq!(taken.outcome.kind, Kind::Full);
        lab.verify("m");
        vm.kill();
        restore_all(&lab, &[("commit", taken)]);
    });
}

#[test]
fn a_helper_may_die_between_checkpoints() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let vm = lab.start("m", &recipe());
        vm.wait_for_witness();
        let first = vm.checkpoint();
        vm.assert_makes_progress();
        vm.kill_helper();
        let refusal = vm.try_checkpoint().expect_failure(3);
        assert!(refusal.contains("stillpoint attach"), "no remedy in {refusal}");
        vm.assert_makes_progress();
        vm.attach();
        let second = vm.checkpoint();
        assert_eq!(
            (second.outcome.kind, second.outcome.parent),
            (Kind::Incremental, Some(first.outcome.id))
        );
        assert!(
            second.outcome.bytes_stored_raw < first.outcome.bytes_stored_raw / 4,
            "{:?}",
            second.outcome
        );
        lab.verify("m");
        vm.kill();
        restore_all(&lab, &[("nothing", second)]);
    });
}

#[test]
fn a_second_helper_is_refused() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start("m", &recipe());
    vm.wait_for_witness();
    vm.checkpoint();
    let helper = vm.helper().expect("it runs").to_string();
    let ran = lab.run(&["attach", "m"]);
    let said = if ran.code == 3 { ran.expect_failure(3) } else { ran.expect_failure(1) };
    assert!(said.contains(&helper), "the holder {helper} is not named: {said}");
    vm.checkpoint();
}

/// The same VM, known by two runtime directories, as after a move of its store to another host.
#[test]
fn a_helper_that_takes_over_fences_the_other() {
    let mut lab = Lab::for_vms(&newest_qemu(), 2);
    let recipe = Recipe::scribbler(5);
    let first = TwoHosts::start(&mut lab, &recipe, "a");
    let second = TwoHosts::start(&mut lab, &recipe, "b");
    first.run(&lab, &["checkpoint", "m"]).expect_success();
    let refusal = second.run(&lab, &["checkpoint", "m"]).expect_failure(3);
    assert!(
        refusal.contains("take-over") || refusal.contains("take over"),
        "no remedy in {refusal}"
    );
    second.end_helper();
    second.run(&lab, &["attach", "m", "--take-over"]).expect_success();
    second.run(&lab, &["checkpoint", "m"]).expect_success();
    let fenced = first.run(&lab, &["checkpoint", "m"]).expect_failure(3);
    assert!(fenced.contains("fenced") || fenced.contains("another"), "{fenced}");
    second.run(&lab, &["checkpoint", "m"]).expect_success();
    lab.verify("m");
}

/// A take-over is one claim, made when it was ordered. An instance that was replaced stays so,
/// whatever becomes of its helper and of its successor, until it is ordered again.
#[test]
fn take_over_is_carried_out_once() {
    let mut lab = Lab::for_vms(&newest_qemu(), 2);
    let recipe = Recipe::scribbler(6);
    let mut first = TwoHosts::start(&mut lab, &recipe, "a");
    first.run(&lab, &["checkpoint", "m"]).expect_success();
    let second = TwoHosts::start(&mut lab, &recipe, "b");
    second.run(&lab, &["attach", "m", "--take-over"]).expect_success();
    // Claimed at once, before any checkpoint of the second.
    first.run(&lab, &["checkpoint", "m"]).expect_failure(3);
    first.run(&lab, &["attach", "m", "--take-over"]).expect_success();
    second.run(&lab, &["checkpoint", "m"]).expect_failure(3);
    first.run(&lab, &["checkpoint", "m"]).expect_success();
    // Its order was carried out: a new helper of it does not repeat it, not even when the first has
    // ended in order.
    second.end_helper();
    second.run(&lab, &["attach", "m"]).expect_success();
    second.run(&lab, &["checkpoint", "m"]).expect_failure(3);
    first.end_qemu();
    assert!(wait_until(Duration::from_secs(20), || first
        .helper()
        .is_none_or(|pid| !is_running(pid))));
    second.run(&lab, &["checkpoint", "m"]).expect_failure(3);
    second.end_helper();
    second.run(&lab, &["attach", "m"]).expect_success();
    second.run(&lab, &["checkpoint", "m"]).expect_failure(3);
    second.run(&lab, &["attach", "m", "--take-over"]).expect_success();
    second.run(&lab, &["checkpoint", "m"]).expect_success();
    lab.verify("m");
}

/// A VM `m` whose runtime directory is another host's, as it were.
struct TwoHosts {
    runtime: String,
    child: std::process::Child,
}

impl TwoHosts {
    fn start(lab: &mut Lab, recipe: &Recipe, host: &str) -> Self {
        let runtime = lab.path().join(host).display().to_string();
        let directory = lab.path().join(format!("{host}-disks"));
        std::fs::create_dir_all(&directory).expect("the test's directory");
        recipe.furnish(&lab.qemu, &directory);
        let mut command = lab.command(&["run", "--name", "m", "--runtime-dir", &runtime, "--"]);
        let log = std::fs::File::create(directory.join("qemu.out")).expect("a file");
        command
            .args(recipe.command_line(&lab.qemu))
            .current_dir(&directory)
            .stderr(log.try_clone().expect("a file"))
            .stdout(log);
        let host = Self { child: command.spawn().expect("stillpoint can be run"), runtime };
        let control = Path::new(&host.runtime).join("m/control.sock");
        let up = || std::os::unix::net::UnixStream::connect(&control).is_ok();
        assert!(wait_until(Duration::from_secs(30), up), "no helper at {}", control.display());
        host
    }

    fn run(&self, lab: &Lab, words: &[&str]) -> Ran {
        lab.run(&[words, &["--runtime-dir", &self.runtime]].concat())
    }

    fn helper(&self) -> Option<Pid> {
        let text = std::fs::read_to_string(Path::new(&self.runtime).join("m/helper.pid")).ok()?;
        text.trim().parse().ok().map(Pid::from_raw)
    }

    fn end_helper(&self) {
        if let Some(pid) = self.helper() {
            let _ = kill(pid, Signal::SIGKILL);
            wait_until(Duration::from_secs(5), || !is_running(pid));
        }
    }

    /// Its helper sees that and releases the epoch.
    fn end_qemu(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for TwoHosts {
    fn drop(&mut self) {
        self.end_helper();
        self.end_qemu();
    }
}
