//! What a checkpoint has in the store when its packs are stored, and when they are not.

use super::super::holder;
use super::*;
use crate::pack::{FrameJob, PackJob, PackTarget};
use bytes::Bytes;
use checkpoint_format::{
    FRAME_PAGES, PAGE_SIZE, PageDigest, PageIndex, SpaceId, SpaceName, SpaceTable, VmName,
};
use checkpoint_store::{
    Claim, Fault, FaultRule, FaultyStore, MemoryStore, Mode, Op, Repository, StoreError,
};

const GRACE: Duration = Duration::from_secs(10);

/// A checkpoint of a VM with one RAM block; each frame fills a pack.
struct Scene {
    store: FaultyStore,
    storing: Storing,
    space: SpaceId,
}

impl Scene {
    async fn new() -> Self {
        let store = FaultyStore::new(Arc::new(MemoryStore::new()));
        let repository =
            Repository::open(Arc::new(store.clone()), Mode::CreateIfMissing).await.unwrap();
        let vm: VmName = "vm-1".parse().unwrap();
        let record = holder::record("i").unwrap();
        let writer = repository.claim_writer(&vm, record, Claim::TakeOver).await.unwrap();
        let partial = Arc::new(writer.begin(CheckpointId(1)).await.unwrap());
        let name = SpaceName::ram("pc.ram").unwrap();
        let table = SpaceTable::new([name.clone()]).unwrap();
        let space = table.id(&name).unwrap();
        let target = Arc::clone(&partial) as Arc<dyn PackTarget>;
        let packer = Packer::with_packs_of(ByteLen(64 << 10), target, table, "test".to_owned(), 0);
        let resumed = Resumed::none(Arc::clone(&partial));
        Self { store, storing: Storing { partial, packer, resumed }, space }
    }

    /// Frames of content that does not compress.
    async fn send(&self, frames: u64) -> Result<()> {
        for number in 0..frames {
            let mut raw = vec![0; FRAME_PAGES * PAGE_SIZE];
            blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut raw);
            let page = |(place, bytes): (usize, &[u8])| {
                (PageIndex(number * FRAME_PAGES as u64 + place as u64), PageDigest::of(bytes))
            };
            let pages = raw.chunks_exact(PAGE_SIZE).enumerate().map(page).collect();
            let job = PackJob::Data(FrameJob { space: self.space, pages, raw });
            self.storing.packer.send(&mut vec![job]).await?;
        }
        Ok(())
    }

    /// The store is full after so many packs.
    fn fail_after(&self, packs: u64) {
        self.store.inject(FaultRule::always(Op::Put, Fault::Full).on("pack-").skip(packs));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stored_has_every_pack_and_commits() {
    let scene = Scene::new().await;
    scene.send(4).await.unwrap();
    let stored = scene.storing.finish().await.map_err(|aborted| aborted.error).unwrap();
    assert_eq!((stored.packs.len(), stored.bytes_carried), (4, ByteLen(0)));
    let durable = stored.partial.commit(Bytes::from_static(b"manifest")).await.unwrap();
    assert_eq!(durable.checkpoint().id, CheckpointId(1));
}

/// The acknowledged packs are what the next checkpoint begins with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stored_packs_are_left_when_the_last_ones_fail() {
    let scene = Scene::new().await;
    scene.fail_after(3);
    scene.send(4).await.unwrap();
    let Aborted { error, left } = scene.storing.finish().await.err().unwrap();
    assert!(error.downcast_ref::<StoreError>().is_some(), "{error:#}");
    assert_eq!(left.unwrap().packs.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_checkpoint_stores_what_was_sent_and_keeps_its_own_error() {
    let scene = Scene::new().await;
    scene.send(2).await.unwrap();
    let store = FailedStore::Storing(scene.storing);
    let (error, stored) = store.end(anyhow::anyhow!("a disk was unplugged"), GRACE).await;
    assert_eq!(error.to_string(), "a disk was unplugged");
    assert_eq!(stored.unwrap().packs.len(), 2);
}

/// A sender sees only that the pipeline has ended; the store's error is why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_checkpoint_names_the_store_when_that_is_why() {
    let scene = Scene::new().await;
    scene.fail_after(2);
    let seen = scene.send(100).await.unwrap_err();
    assert!(seen.downcast_ref::<StoreError>().is_none(), "{seen:#}");
    let (error, stored) = FailedStore::Storing(scene.storing).end(seen, GRACE).await;
    assert!(error.downcast_ref::<StoreError>().is_some(), "{error:#}");
    assert!(stored.unwrap().packs.len() >= 2);
}
