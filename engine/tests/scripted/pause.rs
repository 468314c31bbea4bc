//! What goes wrong while the guest stands, or is about to.

use std::time::{Duration, Instant};

use scripted_vm::{Act, NbdFault, State};

use crate::scene::{BOTH, By, Scene};

/// What is ordered of QEMU while the guest stands; for both engines the last of them.
fn in_pause(by: By) -> &'static [&'static str] {
    match by {
        By::Tracker => &["stop", "transaction", "qom-set", "xen-save-devices-state", "cont"],
        // A refused `cont` is taken for a switch-over that has not completed.
        By::Stream => &["migrate-continue", "blockdev-set-active", "transaction", "qom-set"],
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_command_resumes_the_guest() {
    for by in BOTH {
        for command in in_pause(by) {
            let (mut scene, mut helper) = Scene::begun().await;
            let about = format!("{by:?} {command}");
            scene.qemu.refuse(command, "not today");
            scene.assert_fails(&mut helper, by, "not today").await;
            scene.assert_next(&mut helper, by, &about).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn command_without_an_answer_resumes_the_guest() {
    for by in BOTH {
        for command in ["transaction", "qom-set"] {
            let (mut scene, helper) = Scene::begun().await;
            let mut helper = helper.wait_for_qemu(Duration::from_millis(200));
            scene.qemu.on(command, Act::Silence);
            scene.assert_fails(&mut helper, by, command).await;
            scene.assert_next(&mut helper, by, &format!("{by:?} {command}")).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_answer_to_the_transaction_loses_no_change() {
    for by in BOTH {
        let (mut scene, helper) = Scene::begun().await;
        let mut helper = helper.wait_for_qemu(Duration::from_millis(200));
        scene.qemu.on("transaction", Act::LoseAnswer);
        scene.guest_works();
        helper.fails(by, "").await;
        scene.assert_next(&mut helper, by, &format!("{by:?}")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_answers_only_make_the_pause_longer() {
    for by in BOTH {
        let (mut scene, mut helper) = Scene::begun().await;
        scene.qemu.on("transaction", Act::Late(Duration::from_millis(50)));
        let taken = scene.assert_next(&mut helper, by, "late").await;
        assert!(taken.pause_ms >= 50.0, "{by:?}: {}", taken.pause_ms);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pause_ends_after_two_seconds() {
    let (mut scene, mut helper) = Scene::begun().await;
    scene.qemu.on("xen-save-devices-state", Act::Silence);
    let begun = Instant::now();
    scene.assert_fails(&mut helper, By::Tracker, "more than 2s").await;
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    scene.assert_next(&mut helper, By::Tracker, "after a long pause").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn device_state_that_cannot_be_saved_is_qemus_own_error() {
    let (mut scene, mut helper) = Scene::begun().await;
    scene.qemu.refuse("xen-save-devices-state", "State blocked by the device x");
    scene.assert_fails(&mut helper, By::Tracker, "State blocked by the device x").await;
    scene.assert_next(&mut helper, By::Tracker, "saved").await;
}

/// After its order the run state is the owner's.
async fn disturb(by: By, order: fn(&mut State), run_state: &str, words: &str) {
    let (mut scene, mut helper) = Scene::begun().await;
    scene.guest_works();
    scene.qemu.on("transaction", Act::after(order));
    helper.fails(by, words).await;
    assert_eq!(scene.qemu.with(|qemu| qemu.run_state.clone()), run_state, "{by:?}: {words}");
    assert_eq!(scene.checkpoints().await, [1], "{by:?}: {words}");
    scene.qemu.with(State::cont);
    scene.assert_next(&mut helper, by, &format!("{by:?} after: {words}")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cont_and_stop_of_another_monitor_stay() {
    for by in BOTH {
        disturb(by, State::cont, "running", "let run").await;
        let both = |state: &mut State| {
            state.cont();
            state.stop();
        };
        disturb(by, both, "paused", "let run").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reset_of_another_monitor_stays_and_the_guest_runs() {
    for by in BOTH {
        disturb(by, State::reset, "running", "reset").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migration_of_another_monitor_in_the_pause_stays() {
    let migrated = |state: &mut State| state.run_state = "postmigrate".into();
    disturb(By::Tracker, migrated, "postmigrate", "postmigrate").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flush_that_fails_comes_before_the_pause() {
    let (mut scene, mut helper) = Scene::begun().await;
    let stops = scene.qemu.heard("stop");
    // The connection through which disks are flushed is made with the overlays.
    scene.qemu.on(
        "block-export-add",
        Act::before(|state| {
            state.blocks.nbd_fault = Some(NbdFault::FlushFails);
        }),
    );
    scene.guest_works();
    helper.fails(By::Tracker, "").await;
    assert_eq!(scene.qemu.heard("stop"), stops, "the guest was stopped");
    scene.qemu.with(|state| state.blocks.nbd_fault = None);
    scene.assert_next(&mut helper, By::Tracker, "flushed").await;
}
