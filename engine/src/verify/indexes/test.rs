use super::super::{Report, read_back};
use crate::checkpoint::synthetic::{Synthetic, vm};
use crate::lineage::CheckpointName;
use crate::progress::Silent;
use checkpoint_format::{ByteLen, CheckpointId, Manifest};

/// A lineage of which the checkpoint `spoilt` has an index that says something else.
async fn lineage(spoilt: u64, spoil: fn(&mut Manifest)) -> Synthetic {
    let mut made = Synthetic::new().await;
    made.last_of_version_1 = 2;
    for id in 1..=20 {
        made.resize_disk(if id % 11 == 8 { 0 } else { 100 + (id * 37 % 100) as usize });
        made.commit_with(id, |manifest| {
            if id == spoilt {
                spoil(manifest)
            }
        })
        .await;
    }
    made
}

async fn verify(made: &Synthetic, id: Option<u64>) -> Report {
    let name = CheckpointName { vm: vm(), id: id.map(CheckpointId) };
    read_back(&made.repository, &name, &Silent).await.unwrap()
}

#[tokio::test]
async fn index_that_says_what_the_packs_say_is_sound() {
    let made = lineage(0, |_| {}).await;
    for id in [None, Some(20), Some(7), Some(2), Some(1)] {
        assert_eq!(verify(&made, id).await.problems, [""; 0], "{id:?}");
    }
}

#[tokio::test]
async fn index_that_lacks_a_pack_is_damage() {
    let made = lineage(9, |manifest| drop(manifest.packs.pop())).await;
    assert_eq!(verify(&made, Some(8)).await.problems, [""; 0]);
    for id in [None, Some(9)] {
        let problems = verify(&made, id).await.problems;
        let first = problems.first().expect("it is damaged");
        assert!(first.contains("the index of vm-1@9") && first.contains("pages"), "{problems:?}");
    }
}

#[tokio::test]
async fn index_of_a_space_of_another_size_is_damage() {
    let shorten = |manifest: &mut Manifest| manifest.spaces[0].bytes = ByteLen(4096 * 40);
    let problems = verify(&lineage(5, shorten).await, Some(5)).await.problems;
    assert!(problems[0].contains("of ram:pc.ram"), "{problems:?}");
}
