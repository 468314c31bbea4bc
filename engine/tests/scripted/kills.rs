//! The helper is killed at every step; another takes its place.

use checkpoint_format::CheckpointId;
use checkpoint_store::{Fault, FaultRule, Op};
use engine::checkpoint::outcome::Kind;

use crate::scene::{By, Scene};

/// Where a helper is killed: at this command, so many times after the first, before it is carried
/// out or after.
type Place = (&'static str, usize, bool);

async fn killed(by: By, (command, skip, is_after): Place) -> Scene {
    let about = format!("{by:?} {command} {skip} {is_after}");
    let (mut scene, helper) = Scene::begun().await;
    scene.guest_works();
    let mut gate = scene.qemu.hold_nth(command, skip, is_after);
    let mut running = helper.begin(by);
    running.at(&mut gate, &about).await;
    scene.kill(running).await;
    drop(gate);
    if scene.qemu.with(|state| state.is_running()) {
        scene.guest_works();
    }
    scene
}

/// The next helper lets the guest run and builds on what the store has.
async fn recover(by: By, mut scene: Scene, about: &str) {
    let mut helper = scene.helper().await;
    helper.checkpointer.clean_up().await.unwrap_or_else(|error| panic!("{about}: {error:#}"));
    scene.assert_at_rest(about);
    let taken = scene.assert_next(&mut helper, by, about).await;
    assert_eq!((taken.kind, taken.parent), (Kind::Incremental, Some(CheckpointId(1))), "{about}");
    scene.assert_next(&mut helper, by, about).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn helper_killed_anywhere_is_replaced_by_the_next() {
    let places: [Place; 9] = [
        ("qom-list", 0, false),
        ("nbd-server-start", 0, true),
        ("blockdev-add", 0, true),
        ("blockdev-create", 0, true),
        ("block-export-add", 0, true),
        ("object-add", 0, true),
        ("block-export-add", 1, false),
        ("block-export-add", 1, true),
        ("block-export-del", 0, true),
    ];
    for place in places {
        let scene = killed(By::Tracker, place).await;
        recover(By::Tracker, scene, &format!("{place:?}")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guest_of_a_helper_killed_in_the_pause_waits_for_the_next() {
    let places: [Place; 6] = [
        ("stop", 0, true),
        ("transaction", 0, false),
        ("transaction", 0, true),
        ("qom-set", 0, true),
        ("xen-save-devices-state", 0, true),
        ("cont", 0, false),
    ];
    for place in places {
        let scene = killed(By::Tracker, place).await;
        let state = scene.qemu.with(|state| state.run_state.clone());
        assert_eq!(state, "paused", "{place:?}");
        recover(By::Tracker, scene, &format!("{place:?}")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_of_a_killed_helper_fails_by_itself() {
    let places: [Place; 4] = [
        ("migrate-set-capabilities", 2, true),
        ("getfd", 1, true),
        ("migrate", 0, false),
        ("migrate", 0, true),
    ];
    for place in places {
        let scene = killed(By::Stream, place).await;
        recover(By::Stream, scene, &format!("{place:?}")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guest_of_a_helper_killed_in_the_pause_of_a_stream_waits_for_the_next() {
    let places: [Place; 6] = [
        ("migrate-continue", 0, false),
        ("migrate-continue", 0, true),
        ("blockdev-set-active", 0, false),
        ("transaction", 0, true),
        ("qom-set", 0, true),
        ("cont", 0, false),
    ];
    for place in places {
        let scene = killed(By::Stream, place).await;
        recover(By::Stream, scene, &format!("{place:?}")).await;
    }
}

/// Killed when the store is asked to rename: before it does, or after.
async fn killed_at_rename(fault: Fault) -> Scene {
    let (mut scene, helper) = Scene::begun().await;
    scene.guest_works();
    helper.store.inject(FaultRule::once(Op::RenameDir, fault).on("checkpoints"));
    let store = helper.store.clone();
    let renames = store.calls(Op::RenameDir, "checkpoints");
    let running = helper.begin(By::Tracker);
    while store.calls(Op::RenameDir, "checkpoints") == renames {
        tokio::task::yield_now().await;
    }
    scene.kill(running).await;
    scene
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn helper_killed_before_the_rename_leaves_what_the_next_removes() {
    let scene = killed_at_rename(Fault::HangBefore).await;
    assert_eq!(scene.checkpoints().await, [1]);
    recover(By::Tracker, scene, "before the rename").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checkpoint_of_a_helper_killed_after_the_rename_exists() {
    let mut scene = killed_at_rename(Fault::HangAfter).await;
    assert_eq!(scene.checkpoints().await, [1, 2]);
    scene.assert_exact(CheckpointId(2)).await;
    let mut helper = scene.helper().await;
    let taken = scene.assert_next(&mut helper, By::Tracker, "after the rename").await;
    assert_eq!(taken.parent, Some(CheckpointId(2)));
}
