//! The helper dies at every point of a stream, and the owner cuts streams off: the guest continues,
//! QEMU is left as it was found, and nothing is lost.

use checkpoint_format::CheckpointId;
use engine::checkpoint::outcome::Kind;
use engine::kill_point::POINTS;
use serde_json::json;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;
use stillpoint_tests::{
    Footprint, Lab, QmpClient, Ran, Recipe, Taken, TestVm, on_each_qemu, stop_and_continue,
    stream_modes, thorough, wait_until,
};

/// Points that every checkpoint passes; `kills.rs` has the tracker's.
const COMMON: &[&str] = &["prepared", "uploaded", "commit", "committed"];

fn points() -> Vec<&'static str> {
    let stream: Vec<&str> =
        POINTS.iter().copied().filter(|point| point.starts_with("stream.")).collect();
    assert!(!stream.is_empty(), "no kill points of the stream");
    assert!(COMMON.iter().all(|point| POINTS.contains(point)), "{COMMON:?}");
    stream.into_iter().chain(COMMON.iter().copied()).collect()
}

fn recipe() -> Recipe {
    Recipe::witness("q35-virtio.cfg").words("witness.rate=1500")
}

struct Killed<'lab> {
    lab: &'lab Lab,
    vm: TestVm<'lab>,
    mode: &'static str,
    /// QEMU as its owner has it.
    found: Footprint,
    known: Vec<CheckpointId>,
}

impl<'lab> Killed<'lab> {
    fn start(lab: &'lab Lab, mode: &'static str) -> Self {
        let vm = lab.start_plain("m", &recipe());
        vm.wait_for_witness();
        let mut monitor = vm.qmp();
        monitor.execute(
            "migrate-set-parameters",
            json!({"max-bandwidth": 34_567_890, "downtime-limit": 451}),
        );
        let mut found = Footprint::of(&mut monitor);
        found.take_bitmaps();
        Self { lab, vm, mode, found, known: Vec::new() }
    }

    /// Lets a helper die at `point`; false when a checkpoint of this kind does not pass it.
    fn dies_at(&self, point: &str) -> bool {
        let vm = &self.vm;
        vm.kill_helper();
        vm.attach_plain_with(&["--stream", self.mode], &[("STILLPOINT_DIE_AT", point)]);
        let ran = vm.try_checkpoint();
        if ran.code == 0 {
            return false;
        }
        assert!(
            wait_until(Duration::from_secs(5), || vm.helper().is_none()),
            "{point}: the helper lives: {}",
            ran.err
        );
        assert!(vm.qemu_runs(), "{point}: QEMU died with its helper");
        true
    }

    /// After a death: the store has whole checkpoints only, the guest continues, QEMU is as it was,
    /// the next checkpoint is complete.
    fn recover(&mut self, point: &str) -> Taken {
        let vm = &self.vm;
        let listed = self.lab.list_if_any(&vm.name);
        let new = listed
            .strip_prefix(self.known.as_slice())
            .unwrap_or_else(|| panic!("{point}: {listed:?} after {:?}", self.known));
        assert_eq!(
            new.len(),
            usize::from(point == "committed"),
            "{point}: {listed:?} after {:?}",
            self.known
        );
        vm.attach();
        vm.assert_makes_progress();
        self.assert_left_as_found(point);
        let vm = &self.vm;
        let taken = vm.checkpoint();
        assert_eq!(
            (taken.outcome.parent, taken.outcome.engine.as_str()),
            (listed.last().copied(), self.mode),
            "{point}"
        );
        self.known = self.lab.list(&vm.name);
        assert_eq!(self.known.last(), Some(&taken.outcome.id));
        self.assert_left_as_found(point);
        taken
    }

    fn assert_left_as_found(&self, point: &str) {
        let mut now = Footprint::of(&mut self.vm.qmp());
        now.take_bitmaps();
        assert_eq!(self.found.differences(&now), [""; 0], "{point}, {}", self.mode);
    }
}

/// What was taken after deaths, by the points. Each point of the stream is passed in one of the
/// modes at least.
fn die_everywhere(qemu: &Path, mode: &'static str, passed: &Mutex<BTreeSet<&'static str>>) {
    let lab = Lab::new(qemu);
    let mut killed = Killed::start(&lab, mode);
    let mut all = Vec::new();
    for point in points() {
        let is_known = passed.lock().expect("no other test panicked").contains(&point);
        if is_known && COMMON.contains(&point) && !thorough() {
            continue;
        }
        if killed.dies_at(point) {
            passed.lock().expect("no other test panicked").insert(point);
            let taken = killed.recover(point);
            all.push((point, taken));
        } else {
            assert!(point.starts_with("stream."), "{point} is passed by every checkpoint");
            killed.known = lab.list("m");
        }
    }
    lab.verify("m");
    killed.vm.kill();
    // Each holds what the ones before it stored; all of them have been read back by then.
    let (count, step) = (all.len(), if thorough() { 1 } else { 3 });
    for (point, taken) in all
        .into_iter()
        .enumerate()
        .filter(|(number, _)| (count - 1 - number) % step == 0)
        .map(|(_, one)| one)
    {
        eprintln!("restoring {}, taken by {mode} after a death at {point}", taken.name);
        lab.restore(&taken.name, "restored", &[]).assert_continues(&taken);
    }
}

#[test]
fn a_helper_may_die_at_every_point_of_a_stream() {
    on_each_qemu(|qemu| {
        let passed = Mutex::new(BTreeSet::new());
        stream_modes(qemu).iter().for_each(|mode| die_everywhere(qemu, mode, &passed));
        let passed = passed.into_inner().expect("no other test panicked");
        // Of the two kinds of streams each passes points that the other does not.
        let has_both = stream_modes(qemu).len() > 1;
        let missed: Vec<&str> =
            points().into_iter().filter(|point| has_both && !passed.contains(point)).collect();
        assert!(missed.is_empty(), "no checkpoint passes {missed:?}");
    });
}

// ---- cut off by the owner

fn status(monitor: &mut QmpClient) -> String {
    monitor.execute("query-migrate", json!({}))["status"].as_str().unwrap_or("none").to_owned()
}

/// A checkpoint in whose stream the owner says `migrate_cancel`. The helper is held meanwhile, so
/// that the stream is in its middle.
fn cut_off(vm: &TestVm) -> Ran {
    let mut monitor = vm.qmp();
    let earlier = status(&mut monitor);
    std::thread::scope(|scope| {
        let checkpoint = scope.spawn(|| vm.try_checkpoint());
        let is_under_way =
            |status: String| ["setup", "active"].contains(&status.as_str()) && status != earlier;
        let seen = wait_until(Duration::from_secs(20), || {
            checkpoint.is_finished() || is_under_way(status(&mut monitor))
        });
        assert!(
            seen && !checkpoint.is_finished(),
            "the stream was over before it was seen: {:?}",
            checkpoint.join()
        );
        let held = stop_and_continue(vm.helper().expect("it streams"));
        monitor.execute("migrate_cancel", json!({}));
        drop(held);
        checkpoint.join().expect("it says above why not")
    })
}

#[test]
fn a_stream_that_the_owner_cuts_off_fails_one_checkpoint() {
    on_each_qemu(|qemu| {
        for mode in stream_modes(qemu) {
            let lab = Lab::new(qemu);
            let mut killed = Killed::start(&lab, mode);
            killed.vm.attach_plain(&["--stream", mode]);
            killed.known = vec![killed.vm.checkpoint().outcome.id];
            let said = cut_off(&killed.vm);
            assert_ne!(said.code, 0, "{mode}: a checkpoint of half a stream");
            assert!(said.err.contains("cancel"), "{mode}: the cause is not named: {}", said.err);
            killed.vm.assert_makes_progress();
            killed.assert_left_as_found("cut off");
            assert_eq!(lab.list("m"), killed.known, "{mode}");
            let next = killed.vm.checkpoint();
            assert_eq!(
                (next.outcome.kind, next.outcome.parent),
                (Kind::Incremental, killed.known.last().copied()),
                "{mode}"
            );
            killed.assert_left_as_found("the checkpoint after it");
            killed.vm.kill();
            lab.restore(&next.name, "restored", &[]).assert_continues(&next);
        }
    });
}
