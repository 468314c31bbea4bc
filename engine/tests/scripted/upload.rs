//! What goes wrong while the guest runs on and the copies go to the store.

use std::time::Duration;

use checkpoint_format::CheckpointId;
use checkpoint_store::{Claim, Fault, FaultRule, MemoryStore, Op, Store, StorePath};
use engine::checkpoint::outcome::Kind;
use scripted_vm::{NbdFault, Version};
use vm::error::Class;

use crate::scene::{BOTH, By, DISK, Helper, Scene, name, open};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copy_that_breaks_fails_the_checkpoint_and_not_the_guest() {
    for version in [Version::V8_2, Version::V10_0] {
        let mut scene = Scene::with(version, 1 << 20);
        let mut helper = scene.helper().await;
        helper.take(By::Tracker).await.unwrap();
        scene.guest_works();
        let mut gate = scene.qemu.hold_answer("cont");
        let mut running = helper.begin(By::Tracker);
        running.at(&mut gate, "cont").await;
        scene.qemu.with(|state| {
            state.blocks.break_copies();
            state.blocks.write(DISK, 4096, &[0x11; 4096]);
        });
        gate.open();
        let (mut helper, taken) = running.end().await;
        let said = format!("{:#}", taken.unwrap_err());
        assert!(said.contains("save blocks"), "{said}");
        scene.assert_at_rest("broken copy");
        scene.assert_next(&mut helper, By::Tracker, "broken copy").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_that_cannot_be_read_fails_the_checkpoint() {
    for by in BOTH {
        for fault in [NbdFault::ReadsFail, NbdFault::ReadsCut] {
            let (mut scene, mut helper) = Scene::begun().await;
            scene.qemu.with(|state| state.blocks.nbd_fault = Some(fault));
            scene.assert_fails(&mut helper, by, "").await;
            scene.qemu.with(|state| state.blocks.nbd_fault = None);
            scene.assert_next(&mut helper, by, &format!("{by:?} {fault:?}")).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn export_of_another_tool_stays_and_the_server_with_it() {
    for by in BOTH {
        let (mut scene, helper) = Scene::begun().await;
        scene.guest_works();
        let mut gate = scene.qemu.hold_answer("cont");
        let mut running = helper.begin(by);
        running.at(&mut gate, "cont").await;
        scene.qemu.with(|state| state.blocks.add_export("backup-tool", DISK));
        gate.open();
        let (mut helper, taken) = running.end().await;
        scene.assert_exact(taken.unwrap().id).await;
        let is_there = |scene: &Scene| {
            scene.qemu.with(|state| (state.blocks.has_server(), state.blocks.export_ids()))
        };
        assert_eq!(is_there(&scene), (true, vec!["backup-tool".to_owned()]), "{by:?}");
        scene.assert_next(&mut helper, by, "beside it").await;
        assert_eq!(is_there(&scene), (true, vec!["backup-tool".to_owned()]), "{by:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_data_node_leaves_fewer_replicas_and_a_note() {
    let mut scene = Scene::new();
    scene.store = MemoryStore::with_replicas(3);
    let mut helper = scene.helper().await;
    helper.store.inject(FaultRule::always(Op::Put, Fault::FailBefore).at_least_replicas(3));
    let taken = helper.take(By::Tracker).await.unwrap();
    assert!(taken.notes.iter().any(|note| note.contains("fewer replicas")), "{:?}", taken.notes);
    scene.assert_exact(taken.id).await;
    scene.assert_next(&mut helper, By::Tracker, "the node is back").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn store_that_stops_answering_fails_the_checkpoint() {
    for by in BOTH {
        for fault in [Fault::HangBefore, Fault::FailBefore, Fault::ShortWrite(10)] {
            let (mut scene, mut helper) = Scene::begun().await;
            helper.store.inject(FaultRule::always(Op::Put, fault.clone()));
            let class = scene.assert_fails(&mut helper, by, "").await;
            assert_eq!(class, Class::Store, "{by:?} {fault:?}");
            helper.store.heal();
            scene.assert_next(&mut helper, by, &format!("{by:?} {fault:?}")).await;
        }
    }
}

/// A VM whose first try has stored most of a disk of 24 MiB when the store fails.
async fn failed_late() -> (Scene, Helper) {
    let scene = Scene::with(Version::V10_0, 24 << 20);
    let mut helper = scene.helper().await;
    helper.store.inject(FaultRule::always(Op::PutExclusive, Fault::Full).on("manifest"));
    helper.store.inject(FaultRule::always(Op::Put, Fault::Full).on("manifest"));
    assert_eq!(helper.fails(By::Tracker, "needs not store again").await, Class::Store);
    helper.store.heal();
    scene.assert_at_rest("failed late");
    (scene, helper)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packs_of_a_failed_try_count_for_the_next() {
    let (mut scene, mut helper) = failed_late().await;
    let taken = scene.assert_next(&mut helper, By::Tracker, "carried").await;
    assert!(taken.bytes_carried > 16 << 20, "{}", taken.bytes_carried);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packs_of_a_failed_try_that_are_missing_or_cut_are_stored_again() {
    for is_cut in [false, true] {
        let (mut scene, mut helper) = failed_late().await;
        let folder = StorePath::new("vms/vm/checkpoints").unwrap();
        let partial = scene.store.list(&folder).await.unwrap().remove(0).name;
        let files = StorePath::new(&format!("{folder}/{partial}")).unwrap();
        let pack = scene.store.list(&files).await.unwrap().remove(0).name;
        let pack = StorePath::new(&format!("{files}/{pack}")).unwrap();
        scene.store.remove(&pack).await.unwrap();
        if is_cut {
            scene.store.put(&pack, vec![vec![1; 10].into()], Default::default()).await.unwrap();
        }
        scene.assert_next(&mut helper, By::Tracker, &format!("cut: {is_cut}")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packs_of_a_failed_try_are_gone_when_another_has_claimed() {
    let (scene, mut helper) = failed_late().await;
    take_over(&scene).await;
    assert_eq!(helper.fails(By::Tracker, "").await, Class::Refused);
    let folder = StorePath::new("vms/vm/checkpoints").unwrap();
    assert!(scene.store.list(&folder).await.unwrap().is_empty(), "its partial directory is there");
    scene.assert_at_rest("fenced");
}

/// Another host's helper becomes the writer.
async fn take_over(scene: &Scene) {
    let repository = open(scene.store.clone()).await;
    let record = repository.writers(&name()).await.unwrap().pop().unwrap().record.unwrap();
    let other = checkpoint_store::WriterRecord { instance: "other".into(), ..record };
    repository.claim_writer(&name(), other, Claim::TakeOver).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fenced_writer_stores_nothing_and_its_guest_runs() {
    for by in BOTH {
        let (mut scene, helper) = Scene::begun().await;
        scene.guest_works();
        let mut gate = scene.qemu.hold_answer("cont");
        let mut running = helper.begin(by);
        running.at(&mut gate, "cont").await;
        take_over(&scene).await;
        gate.open();
        let (_, taken) = running.end().await;
        let error = taken.unwrap_err();
        assert_eq!(vm::error::class_of(&error), Class::Refused, "{by:?}: {error:#}");
        assert_eq!(scene.checkpoints().await, [1]);
        scene.assert_at_rest("fenced");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parent_lost_meanwhile_fails_before_the_commit() {
    let (mut scene, helper) = Scene::begun().await;
    scene.guest_works();
    let mut gate = scene.qemu.hold_answer("cont");
    let mut running = helper.begin(By::Tracker);
    running.at(&mut gate, "cont").await;
    tokio::time::sleep(Duration::from_millis(2)).await;
    scene.store.remove(&StorePath::new("vms/vm/checkpoints/1").unwrap()).await.unwrap();
    gate.open();
    let (mut helper, taken) = running.end().await;
    assert_eq!(vm::error::class_of(&taken.unwrap_err()), Class::Store);
    scene.assert_at_rest("without a parent");
    let taken = helper.take(By::Tracker).await.unwrap();
    assert_eq!((taken.kind, taken.parent), (Kind::Full, None));
    scene.assert_exact(taken.id).await;
    assert!(taken.id > CheckpointId(1) || scene.checkpoints().await == [1]);
}
