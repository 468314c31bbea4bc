//! Pages of a checkpoint read one at a time: they are what the whole is, and each frame is read
//! once.

use std::sync::Arc;

use checkpoint_format::{ByteLen, CheckpointId, PageIndex, PageLocation, PageRange, SpaceName};
use checkpoint_store::{Fault, FaultRule, FaultyStore, Op};
use engine::progress::Silent;
use engine::restore::Source;
use engine::restore::on_demand::{Content, OnDemand};
use vm::error::{Class, class_of};

use super::scene::{By, DISK, PAGE, Scene, name, open};

pub(super) const LARGE: ByteLen = ByteLen(64 << 20);

fn range(start: u64, end: u64) -> PageRange {
    PageRange::new(PageIndex(start), PageIndex(end))
}

/// Two checkpoints of a scripted VM, and a reader of the newer one with a store that can fail.
pub(super) async fn reader(budget: ByteLen) -> (Scene, FaultyStore, OnDemand) {
    let (mut scene, mut helper) = Scene::begun().await;
    scene.guest_works();
    let taken = helper.take(By::Tracker).await.unwrap();
    let store = FaultyStore::new(Arc::new(scene.store.clone()));
    let repository = open(store.clone()).await;
    let source = Source::open(&repository, &name(), taken.id, Arc::new(Silent)).await.unwrap();
    assert_eq!(taken.id, CheckpointId(2));
    (scene, store, OnDemand::new(source, budget))
}

fn ram() -> SpaceName {
    SpaceName::ram("pc.ram").unwrap()
}

fn reads(store: &FaultyStore) -> usize {
    store.calls(Op::ReadRange, "")
}

fn filled(parts: &[(PageRange, Content)], pages: PageRange) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut next = pages.start;
    for (part, content) in parts {
        assert_eq!(part.start, next, "a gap");
        match content {
            Content::Data(data) => bytes.extend_from_slice(data),
            Content::Zero | Content::Unknown => {
                bytes.resize(bytes.len() + part.byte_len().as_usize(), 0)
            }
        }
        next = part.end;
    }
    assert_eq!(next, pages.end, "pages are missing");
    bytes
}

#[tokio::test]
async fn on_demand_pages_are_those_of_the_whole() {
    let (_scene, _, reader) = reader(ByteLen(3 * 64 * PAGE as u64)).await;
    for space in [ram(), SpaceName::disk(&format!("{DISK}-node")).unwrap()] {
        let record = reader.source().manifest().space(&space).unwrap().clone();
        let whole = reader.source().read_whole(&record).await.unwrap();
        let all = record.pages().all();
        let parts = reader.read(&space, all).await.unwrap();
        assert!(filled(&parts, all) == whole, "{space}");
        // In an order in which a small cache forgets what it will need again.
        for page in all.iter().rev() {
            let at = page.0 as usize * PAGE;
            let parts = reader.read_around(&space, page).await.unwrap();
            assert_eq!(parts[0].0, PageRange::single(page));
            for (pages, content) in &parts {
                let start = pages.start.0 as usize * PAGE;
                if let Content::Data(data) = content {
                    assert!(**data == whole[start..start + data.len()], "{space} {pages}");
                }
            }
            if !matches!(parts[0].1, Content::Data(_)) {
                assert!(whole[at..at + PAGE].iter().all(|byte| *byte == 0), "{space} {page}");
            }
        }
        assert_eq!(reader.read(&space, range(1 << 30, 1 << 31)).await.unwrap(), []);
    }
    let missing = SpaceName::ram("none").unwrap();
    assert!(reader.location(&missing, PageIndex(0)).await.is_err());
}

#[tokio::test]
async fn on_demand_frame_is_read_once_however_many_ask() {
    let (_scene, store, reader) = reader(LARGE).await;
    let space = ram();
    // What is to be read of the index.
    reader.locate(&space, range(0, 100)).await.unwrap();
    let before = reads(&store);
    let pages = (0..32).map(|page| reader.read_around(&space, PageIndex(page)));
    let answers = futures::future::join_all(pages).await;
    assert!(answers.iter().all(Result::is_ok));
    // Pages 0 to 31 were filled before the first checkpoint, and page 4 was written before the
    // second.
    assert_eq!(reads(&store) - before, 2);
    let location = reader.location(&ram(), PageIndex(4)).await.unwrap();
    assert!(matches!(location, PageLocation::Data { pack, .. } if pack.0 > 0), "{location:?}");
    assert_eq!(reader.location(&ram(), PageIndex(77)).await.unwrap(), PageLocation::Zero);
    assert_eq!(reads(&store) - before, 2, "zeros and what is known cost no read");
}

#[tokio::test]
async fn on_demand_failure_is_not_kept() {
    let (_scene, store, reader) = reader(LARGE).await;
    store.inject(FaultRule::always(Op::ReadRange, Fault::FailBefore).on(".pack"));
    let error = reader.read(&ram(), range(0, 1)).await.unwrap_err();
    assert_eq!(class_of(&error), Class::Store, "{error:#}");
    store.heal();
    assert!(matches!(reader.read(&ram(), range(0, 1)).await.unwrap()[0].1, Content::Data(_)));
}

#[tokio::test]
async fn pages_that_changed_last_are_those_of_the_checkpoint_itself() {
    let (_scene, _, reader) = reader(LARGE).await;
    let changed = reader.source().changed_last(&ram(), LARGE).await.unwrap();
    assert!(changed.contains(PageIndex(4)), "{changed:?}");
    assert!(!changed.contains(PageIndex(5)), "{changed:?}");
    let too_many = reader.source().changed_last(&ram(), ByteLen(1)).await.unwrap();
    assert_eq!(too_many.pages().0, 0, "more than what was asked for");
}

#[tokio::test]
async fn frames_of_pages_are_located_whole() {
    let (_scene, _, reader) = reader(LARGE).await;
    let runs = reader.locate_frames(&ram(), range(5, 6)).await.unwrap();
    let pages: Vec<u64> = runs.iter().flat_map(|run| run.pages.iter()).map(|page| page.0).collect();
    // Page 4 was written before the second checkpoint, so it is in another frame.
    let frame = (0..32).filter(|page| *page != 4);
    assert_eq!(pages, frame.collect::<Vec<u64>>());
    assert_eq!(reader.locate_frames(&ram(), range(1 << 20, 1 << 21)).await.unwrap(), []);
}
