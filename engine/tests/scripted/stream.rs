//! QEMU's migration stream in place of the tracker.

use std::time::Duration;

use scripted_vm::{Act, State, StreamFault};

use crate::scene::{By, Scene};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_takes_what_the_guest_writes_meanwhile() {
    let (mut scene, mut helper) = Scene::begun().await;
    scene.qemu.with(|state| state.migration.written_meanwhile = vec![(0, 9, 0xab), (1, 2, 0xcd)]);
    scene.assert_next(&mut helper, By::Stream, "written meanwhile").await;
    assert_eq!(scene.qemu.with(|state| state.ram.page(0, 9)), [0xab; 4096]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_stream_is_cancelled_and_the_byte_is_named() {
    let faults = [
        (StreamFault::CutAfter(5000), "Broken pipe"),
        (StreamFault::Damaged(40), "byte "),
        (StreamFault::Lacks(7), "1 pages of RAM block pc.ram"),
    ];
    for (fault, words) in faults {
        let (mut scene, mut helper) = Scene::begun().await;
        scene.qemu.with(|state| state.migration.fault = Some(fault));
        scene.assert_fails(&mut helper, By::Stream, words).await;
        scene.qemu.with(|state| state.migration.fault = None);
        scene.assert_next(&mut helper, By::Stream, words).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guest_that_writes_too_fast_is_never_stopped() {
    let (mut scene, mut helper) = Scene::begun().await;
    scene.qemu.with(|state| state.migration.fault = Some(StreamFault::NeverConverges));
    let stops = scene.qemu.heard("stop");
    scene.assert_fails(&mut helper, By::Stream, "MiB/s").await;
    assert_eq!(scene.qemu.heard("stop"), stops);
    scene.qemu.with(|state| state.migration.fault = None);
    scene.assert_next(&mut helper, By::Stream, "slower").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migration_that_its_owner_cancels_fails_and_the_guest_runs() {
    let (mut scene, mut helper) = Scene::begun().await;
    let cancel = |state: &mut State| {
        state.order("migrate_cancel");
    };
    scene.qemu.on("migrate-continue", Act::before(cancel));
    scene.assert_fails(&mut helper, By::Stream, "").await;
    scene.assert_next(&mut helper, By::Stream, "not cancelled").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_settings_are_put_back() {
    // Capabilities are set, and put back, to find out what this QEMU can do.
    let commands = [
        ("migrate-set-capabilities", 2),
        ("migrate-set-parameters", 0),
        ("getfd", 1),
        ("migrate", 0),
    ];
    for (command, skip) in commands {
        let (mut scene, helper) = Scene::begun().await;
        let mut helper = helper.wait_for_qemu(Duration::from_secs(2));
        scene.qemu.on_nth(command, skip, Act::Refuse("not today".into()));
        scene.assert_fails(&mut helper, By::Stream, "not today").await;
        scene.assert_next(&mut helper, By::Stream, command).await;
    }
}
