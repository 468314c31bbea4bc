//! Lineages that begin without an index: what is read of each checkpoint is what was stored.

use super::super::synthetic::{Synthetic, vm};
use crate::progress::Silent;
use crate::restore::Source;
use checkpoint_format::{CheckpointId, PAGE_SIZE, PageIndex, PageRange};
use std::sync::Arc;

const CHECKPOINTS: u64 = 40;

#[tokio::test]
async fn index_of_a_lineage_that_began_without_one() {
    let mut made = Synthetic::new().await;
    made.last_of_version_1 = 5;
    for id in 1..=CHECKPOINTS {
        // The disk shrinks and grows.
        made.content[1].resize(100 + (id * 37 % 100) as usize, 0);
        let manifest = made.commit(id).await;
        if let Some(index) = &manifest.index {
            assert_eq!(index.checkpoints, id);
            assert!(index.segments.len() <= 10, "{index:?}");
            assert_eq!(index.segments.last().unwrap().first, CheckpointId(1));
        }
        let source = Source::open(&made.repository, &vm(), CheckpointId(id), Arc::new(Silent));
        let source = source.await.unwrap();
        for (space, expected) in manifest.spaces.iter().zip(&made.content) {
            let found = source.read_whole(space).await.unwrap();
            let found: Vec<u8> = found.chunks(PAGE_SIZE).map(|page| page[0]).collect();
            assert!(found == *expected, "{} of checkpoint {id}", space.name);
            let pages = PageRange::new(PageIndex(20), PageIndex(90));
            let whole: Vec<_> = source.map(&space.name).await.unwrap().runs_in(pages).collect();
            assert_eq!(source.locate(&space.name, pages).await.unwrap(), whole);
        }
    }
}
