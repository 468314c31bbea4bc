//! What changes between two checkpoints, or while one is taken.

use scripted_vm::State;
use serde_json::json;

use crate::scene::{BOTH, By, DISK, Scene};

/// A change while the copies go to the store.
async fn changed(
    by: By,
    change: impl FnOnce(&mut State),
    words: &str,
) -> (Scene, crate::scene::Helper) {
    let (mut scene, helper) = Scene::begun().await;
    scene.guest_works();
    let mut gate = scene.qemu.hold_answer("cont");
    let mut running = helper.begin(by);
    running.at(&mut gate, "cont").await;
    scene.qemu.with(change);
    gate.open();
    let (helper, taken) = running.end().await;
    let said = format!("{:#}", taken.expect_err(words));
    assert!(said.contains(words), "{by:?}: {said:?} has no {words:?}");
    assert_eq!(scene.checkpoints().await, [1], "{words}");
    (scene, helper)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn device_that_comes_or_goes_meanwhile_is_named() {
    for by in BOTH {
        let add = |state: &mut State| {
            state.devices.push(("/machine/peripheral/new".into(), "virtio-net-pci".into()));
        };
        let (mut scene, mut helper) = changed(by, add, "peripheral/new").await;
        scene.qemu.execute("device_del", &json!({ "id": "new" })).unwrap();
        scene.assert_next(&mut helper, by, "unplugged").await;
        let cpu = |state: &mut State| state.vcpus = 2;
        changed(by, cpu, "2 vCPUs").await;
        let dimm = |state: &mut State| state.plugged_memory = 1 << 20;
        changed(by, dimm, "1048576 bytes of memory are plugged in").await;
        let tray = |state: &mut State| {
            state.event(
                "DEVICE_TRAY_MOVED",
                json!({ "device": "", "id": "cd9", "tray-open": true }),
            );
        };
        let (mut scene, mut helper) = changed(by, tray, "the tray of cd9").await;
        scene.assert_next(&mut helper, by, "after a tray").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_that_changes_its_size_meanwhile_is_named() {
    for by in BOTH {
        let grow = |state: &mut State| state.blocks.resize(DISK, 2 << 20);
        let (mut scene, mut helper) = changed(by, grow, "2097152 bytes").await;
        scene.assert_next(&mut helper, by, "grown").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_that_grew_counts_as_changed_there() {
    for by in BOTH {
        let (mut scene, mut helper) = Scene::begun().await;
        scene.qemu.with(|state| {
            state.blocks.resize(DISK, 2 << 20);
            state.blocks.write(DISK, (2 << 20) - 512, &[9; 512]);
        });
        scene.assert_next(&mut helper, by, "grown").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_that_was_shorter_is_compared_as_a_whole() {
    for by in BOTH {
        let (mut scene, mut helper) = Scene::begun().await;
        scene.qemu.with(|state| state.blocks.resize(DISK, 512 << 10));
        scene.assert_next(&mut helper, by, "shorter").await;
        // Shortened and grown again between two looks: the size shows nothing.
        scene.qemu.with(|state| {
            state.blocks.resize(DISK, 256 << 10);
            state.blocks.resize(DISK, 512 << 10);
        });
        scene.assert_next(&mut helper, by, "shortened and grown").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_that_ends_releases_the_epoch() {
    let (mut scene, mut helper) = Scene::begun().await;
    helper.checkpointer.release().await;
    let is_released = async |scene: &Scene| {
        let repository = scene.repository().await;
        repository.writers(&crate::scene::name()).await.unwrap().pop().unwrap().released
    };
    assert!(!is_released(&scene).await, "QEMU runs");
    scene.body.kill();
    scene.qemu.sever();
    let said = format!("{:#}", helper.take(By::Tracker).await.unwrap_err());
    assert!(said.contains("ended") && said.contains("stillpoint restore vm"), "{said}");
    helper.checkpointer.release().await;
    assert!(is_released(&scene).await);
    assert_eq!(scene.checkpoints().await, [1]);
}
