//! What goes wrong while the guest runs and nothing was taken yet.

use std::time::Duration;

use checkpoint_format::CheckpointId;
use checkpoint_store::{Fault, FaultRule, Op, Store, StorePath};
use engine::checkpoint::outcome::Kind;
use engine::checkpoint::{Force, StoreSession};
use scripted_vm::{Act, Version};
use vm::error::Class;

use crate::scene::{BOTH, By, DISK, Scene, name, noise, open};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checkpoint_holds_what_the_guest_has() {
    for version in [Version::V8_2, Version::V10_0] {
        for by in BOTH {
            let mut scene = Scene::with(version, 1 << 20);
            let mut helper = scene.helper().await;
            let about = format!("{version:?} {by:?}");
            scene.assert_next(&mut helper, by, &about).await;
            scene.assert_next(&mut helper, by, &about).await;
            let other = if by == By::Tracker { By::Stream } else { By::Tracker };
            scene.assert_next(&mut helper, other, &about).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_changed_makes_no_checkpoint() {
    let (scene, mut helper) = Scene::begun().await;
    for by in BOTH {
        let taken = helper.take(by).await.unwrap();
        assert_eq!((taken.kind, taken.id), (Kind::Unchanged, CheckpointId(1)), "{by:?}");
        scene.assert_at_rest("unchanged");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn store_that_fails_takes_nothing() {
    for fault in [Fault::FailBefore, Fault::Full, Fault::HangBefore] {
        let (mut scene, mut helper) = Scene::begun().await;
        helper.store.inject(FaultRule::any(fault.clone()));
        let class = scene.assert_fails(&mut helper, By::Tracker, "").await;
        assert_eq!(class, Class::Store, "{fault:?}");
        assert_eq!(scene.qemu.heard("stop"), 2, "{fault:?}: the guest was stopped again");
        helper.store.heal();
        scene.assert_next(&mut helper, By::Tracker, "healed").await;
    }
}

/// Removes checkpoints behind the helper's back, when the store's clock has gone on.
async fn lose(scene: &Scene, ids: &[u64]) {
    tokio::time::sleep(Duration::from_millis(2)).await;
    for id in ids {
        let path = StorePath::new(&format!("vms/vm/checkpoints/{id}")).unwrap();
        scene.store.remove(&path).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn next_builds_on_what_the_store_has_left() {
    for by in BOTH {
        let (mut scene, mut helper) = Scene::begun().await;
        scene.assert_next(&mut helper, by, "second").await;
        scene.assert_next(&mut helper, by, "third").await;
        lose(&scene, &[3]).await;
        let taken = scene.assert_next(&mut helper, by, "without the newest").await;
        assert_eq!(taken.parent, Some(CheckpointId(2)));
        // An ancestor is missing: nothing can build on what is left.
        lose(&scene, &[1]).await;
        scene.guest_works();
        let taken = helper.take(by).await.unwrap();
        assert_eq!(taken.kind, Kind::Full);
        scene.assert_exact(taken.id).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_store_in_the_place_of_the_first_is_refused_until_full() {
    let scene = Scene::new();
    let mut helper = scene.helper_by_url().await;
    let first = helper.take(By::Tracker).await.unwrap();
    assert_eq!(first.kind, Kind::Full);
    std::fs::rename(scene.path("store"), scene.path("gone")).unwrap();
    let class = helper.fails(By::Tracker, "").await;
    assert_eq!(class, Class::Store);
    assert!(!scene.path("store").exists(), "no store was made");
    let taken = helper.take_with(By::Tracker, true).await.unwrap();
    assert_eq!(taken.kind, Kind::Full);
    assert!(scene.path("store").exists());
    scene.assert_at_rest("full");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_writer_is_refused_and_a_take_over_fences_the_first() {
    let (mut scene, mut helper) = Scene::begun().await;
    let repository = open(scene.store.clone()).await;
    let other = tempfile::tempdir().unwrap();
    let runtime = vm::runtime_dir::RuntimeDir::new(Some(other.path()), &name()).unwrap();
    runtime.create().unwrap();
    // The first may be alive: it is on a host that is not this one.
    let file = vm::runtime_dir::VmFile { instance: "other".into(), ..scene.file.clone() };
    let theirs =
        async |force| StoreSession::claim(repository.clone(), &file, &runtime, force).await;
    let record = repository.writers(&name()).await.unwrap().pop().unwrap().record.unwrap();
    let away = checkpoint_store::WriterRecord { host: "elsewhere".into(), ..record };
    let ground = checkpoint_store::Claim::TakeOver;
    repository.claim_writer(&name(), away, ground).await.unwrap();
    let refused = theirs(Force::No).await.map(drop).unwrap_err();
    assert_eq!(refused.class(), Class::Refused, "{refused}");
    theirs(Force::TakeOver).await.unwrap();
    let class = scene.assert_fails(&mut helper, By::Tracker, "").await;
    assert_eq!(class, Class::Refused);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn device_that_was_plugged_in_is_named() {
    for by in BOTH {
        let (mut scene, mut helper) = Scene::begun().await;
        let plugged = |kind: &str| serde_json::json!({ "driver": kind, "id": "new" });
        scene.qemu.execute("device_add", &plugged("virtio-net-pci")).unwrap();
        assert_eq!(scene.assert_fails(&mut helper, by, "peripheral/new").await, Class::Refused);
        scene.qemu.execute("device_del", &plugged("")).unwrap();
        scene.qemu.execute("device_add", &plugged("vhost-user-fs-pci")).unwrap();
        assert_eq!(scene.assert_fails(&mut helper, by, "vhost-user").await, Class::Refused);
        scene.qemu.execute("device_del", &plugged("")).unwrap();
        scene.assert_next(&mut helper, by, "unplugged").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layer_whose_upload_was_cut_is_stored_by_the_next() {
    let mut scene = Scene::with_layer(noise(64 << 10));
    let mut helper = scene.helper().await;
    helper.store.inject(FaultRule::once(Op::RenameDir, Fault::Full).on("layers"));
    assert_eq!(scene.assert_fails(&mut helper, By::Tracker, "").await, Class::Store);
    let layers = || async {
        let listed = scene.store.list(&StorePath::new("layers").unwrap()).await.unwrap();
        listed.iter().map(|entry| entry.name.contains("partial")).collect::<Vec<_>>()
    };
    assert!(layers().await.iter().all(|is_partial| *is_partial), "a layer of half its bytes");
    let taken = helper.take(By::Tracker).await.unwrap();
    assert!(taken.layer_bytes_stored > 0 && layers().await.contains(&false));
    scene.assert_exact(taken.id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn run_state_without_a_guest_is_refused_by_its_name() {
    for state in ["inmigrate", "restore-vm", "postmigrate", "colo"] {
        let (scene, mut helper) = Scene::begun().await;
        scene.qemu.with(|qemu| qemu.run_state = state.to_owned());
        let orders = scene.qemu.orders().len();
        for by in BOTH {
            assert_eq!(helper.fails(by, state).await, Class::Refused);
        }
        let new = scene.qemu.orders().split_off(orders);
        assert_eq!(new, [""; 0], "{state}: QEMU was ordered something");
        assert_eq!(scene.qemu.with(|qemu| qemu.run_state.clone()), state);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overlays_without_a_directory_leave_the_disks_alone() {
    for by in BOTH {
        let (mut scene, mut helper) = Scene::begun().await;
        let nowhere = scene.path("nowhere");
        let before = std::mem::replace(&mut helper.checkpointer.vm.file.fleecing, nowhere);
        scene.assert_fails(&mut helper, by, "nowhere").await;
        assert_eq!(scene.qemu.with(|qemu| qemu.blocks.bitmaps(DISK).len()), 2);
        helper.checkpointer.vm.file.fleecing = before;
        scene.assert_next(&mut helper, by, "there again").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbd_server_of_another_tool_is_left_alone() {
    for by in BOTH {
        let (mut scene, mut helper) = Scene::begun().await;
        let place = scene.path("other-nbd");
        scene.qemu.with(|qemu| {
            qemu.blocks.start_other_server(&place);
            qemu.blocks.add_export("backup-tool", DISK);
        });
        scene.assert_fails(&mut helper, by, "`backup-tool`").await;
        scene.qemu.with(|qemu| {
            assert!(qemu.blocks.has_server());
            assert_eq!(qemu.blocks.export_ids(), ["backup-tool"]);
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migration_of_another_client_is_not_disturbed() {
    let (mut scene, mut helper) = Scene::begun().await;
    scene.qemu.with(|qemu| qemu.set_migration("active"));
    scene.assert_fails(&mut helper, By::Stream, "`active`").await;
    assert_eq!(scene.qemu.heard("migrate_cancel"), 0);
    scene.qemu.with(|qemu| qemu.set_migration("completed"));
    scene.assert_next(&mut helper, By::Stream, "it is over").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_before_the_pause_changes_nothing() {
    let (mut scene, helper) = Scene::begun().await;
    scene.qemu.on("blockdev-add", Act::Refuse("no more nodes".into()));
    let mut helper = helper;
    scene.assert_fails(&mut helper, By::Tracker, "no more nodes").await;
    scene.assert_next(&mut helper, By::Tracker, "after a refused node").await;
}
