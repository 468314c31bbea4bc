//! The rename, and what follows it.

use checkpoint_store::{Fault, FaultRule, Op};
use scripted_vm::Act;

use crate::scene::{BOTH, By, Scene};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rename_whose_answer_is_lost_is_looked_up() {
    for by in BOTH {
        let (mut scene, mut helper) = Scene::begun().await;
        helper.store.inject(FaultRule::once(Op::RenameDir, Fault::FailAfter).on("checkpoints"));
        let taken = scene.assert_next(&mut helper, by, "committed").await;
        assert_eq!(scene.checkpoints().await.last(), Some(&taken.id.0));
        helper.store.inject(FaultRule::once(Op::RenameDir, Fault::FailBefore).on("checkpoints"));
        scene.assert_next(&mut helper, by, "not committed at first").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commit_that_cannot_be_determined_is_looked_up_again() {
    for by in BOTH {
        let (mut scene, mut helper) = Scene::begun().await;
        scene.guest_works();
        // The rename is done; from then on the store answers nothing.
        let blind = |helper: &crate::scene::Helper| {
            helper.store.inject(FaultRule::once(Op::RenameDir, Fault::FailAfter).on("checkpoints"));
            helper.store.inject(FaultRule::always(Op::Stat, Fault::FailBefore).on("checkpoints/"));
        };
        blind(&helper);
        helper.fails(by, "").await;
        scene.assert_at_rest("undetermined");
        helper.store.heal();
        scene.assert_next(&mut helper, by, "after an undetermined commit").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bitmap_that_cannot_be_dropped_is_no_failure() {
    let (mut scene, mut helper) = Scene::begun().await;
    scene.guest_works();
    // The first is the instant's, the second drops the older bitmap.
    scene.qemu.on_nth("transaction", 1, Act::Refuse("busy".into()));
    let taken = helper.take(By::Tracker).await.unwrap();
    scene.assert_exact(taken.id).await;
    scene.assert_next(&mut helper, By::Tracker, "reads more than it must").await;
}
