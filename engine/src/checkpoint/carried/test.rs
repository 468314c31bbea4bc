//! Tries of checkpoints over a store that fails, and what a restore of each committed one would
//! give.

use super::super::delta::{Delta, Space};
use super::super::holder;
use super::super::upload::add_carried;
use super::*;
use crate::lineage;
use crate::pack::{PackJob, PackTarget, Packer};
use bytes::Bytes;
use checkpoint_format::{
    DigestTable, PAGE_SIZE, PageCount, PageDigest, PageIndex, SpaceTable, VmName,
};
use checkpoint_store::{
    Claim, Fault, FaultRule, FaultyStore, MemoryStore, Mode, Op, Repository, Store, StorePath,
    Writer,
};
use proptest::prelude::*;
use qmp_bridge::nbd::{Content, ContentRange};
use std::collections::{BTreeMap, BTreeSet};

const RAM: u64 = 200;
const DISK: u64 = 1000;
/// A part of the disk that is looked up at once.
const PART: u64 = 300;
/// A frame fills a pack.
const PACK: ByteLen = ByteLen(64 << 10);
/// What the layer below the disk holds.
const LAYER: u64 = 7;

/// Page contents: 0 is zeros. A disk's page that is `None` is not allocated.
#[derive(Clone)]
struct Pages {
    ram: Vec<u64>,
    disk: Vec<Option<u64>>,
}

/// Content that does not compress.
fn page(number: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_SIZE];
    if number != 0 {
        blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut bytes);
    }
    bytes
}

fn digest(number: u64) -> PageDigest {
    if number == 0 { PageDigest::ZERO_PAGE } else { PageDigest::of(&page(number)) }
}

fn names() -> [SpaceName; 3] {
    [SpaceName::ram("pc.ram").unwrap(), SpaceName::disk("d").unwrap(), SpaceName::device_state()]
}

fn new_spaces() -> Vec<Space> {
    let tables = [
        DigestTable::dense(PageCount(RAM)),
        DigestTable::sparse(ByteLen(64 << 10)),
        DigestTable::sparse(ByteLen(4096)),
    ];
    let sizes = [PageCount(RAM), PageCount(DISK), PageCount(0)];
    names()
        .into_iter()
        .zip(sizes)
        .zip(tables)
        .map(|((name, pages), table)| Space::new(name, pages, table))
        .collect()
}

/// One VM and its helper, as far as pages go.
struct Scene {
    faulty: FaultyStore,
    memory: Arc<dyn Store>,
    repository: Repository,
    writer: Writer,
    vm: Pages,
    spaces: Vec<Space>,
    carried: Option<Carried>,
    committed: u64,
    /// Written since the last commit, by space.
    dirty: [BTreeSet<u64>; 2],
    /// What a restore gives, by space.
    restored: [BTreeMap<u64, PageDigest>; 2],
}

fn vm() -> VmName {
    "vm-1".parse().unwrap()
}

impl Scene {
    async fn new(vm_content: Pages) -> Self {
        let memory: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let faulty = FaultyStore::new(Arc::clone(&memory));
        let repository =
            Repository::open(Arc::new(faulty.clone()), Mode::CreateIfMissing).await.unwrap();
        let writer = repository
            .claim_writer(&vm(), holder::record("i").unwrap(), Claim::TakeOver)
            .await
            .unwrap();
        let (dirty, restored) = Default::default();
        let spaces = new_spaces();
        Self {
            faulty,
            memory,
            repository,
            writer,
            vm: vm_content,
            spaces,
            carried: None,
            committed: 0,
            dirty,
            restored,
        }
    }

    fn parent(&self) -> Option<CheckpointId> {
        (self.committed > 0).then_some(CheckpointId(self.committed))
    }

    async fn begin(&mut self) -> Result<(PartialCheckpoint, Vec<NumberedPack>)> {
        let id = CheckpointId(self.committed + 1);
        if let Some(carried) = self.carried.take()
            && let Some(partial) = self.writer.resume(id, &carried.kept).await?
        {
            return Ok((partial, carried.packs));
        }
        Ok((self.writer.begin(id).await?, Vec::new()))
    }

    /// One try; what fails is kept for the next. Returns the bytes of the packs that it carried.
    async fn attempt(&mut self) -> Result<u64> {
        let (partial, earlier) = self.begin().await?;
        let partial = Arc::new(partial);
        let table = SpaceTable::new(names()).unwrap();
        let mut delta = Delta::new(std::mem::take(&mut self.spaces), &table)?;
        if self.parent().is_none() {
            delta.forget_memory();
        }
        let resumed = match earlier.is_empty() {
            true => Resumed::none(Arc::clone(&partial)),
            false => Resumed::of_packs(Arc::clone(&partial), earlier, &mut delta).await?,
        };
        let target = Arc::clone(&partial) as Arc<dyn PackTarget>;
        let packer = Packer::with_packs_of(PACK, target, table, "test".to_owned(), resumed.last());
        let (carried, stored) = (resumed.packs(), packer.stored());
        let done = match self.offer_all(&mut delta, &resumed, &packer).await {
            Ok(()) => packer.finish().await.map(drop),
            Err(error) => Err(packer.why(error, UPLOADS).await),
        };
        drop(resumed);
        let packs: Vec<NumberedPack> = carried.iter().cloned().chain(stored.list()).collect();
        let partial = Arc::into_inner(partial).unwrap();
        if let Err(error) = done {
            self.spaces = delta.fail();
            self.carried = Some(Carried { kept: partial.keep(), packs, parent: self.parent() });
            return Err(error);
        }
        assert_eq!(delta.unconfirmed(), PageCount(0));
        let _durable = partial.commit(Bytes::from_static(b"manifest")).await?;
        self.spaces = delta.acknowledge();
        self.committed += 1;
        self.apply(&packs).await;
        self.dirty = Default::default();
        Ok(bytes(&carried).0)
    }

    async fn offer_all(&self, delta: &mut Delta, resumed: &Resumed, packer: &Packer) -> Result<()> {
        let mut jobs: Vec<PackJob> = Vec::new();
        let is_full = self.parent().is_none();
        if is_full {
            delta.ground(0, &mut jobs);
        }
        for number in (0..RAM).filter(|number| is_full || self.dirty[0].contains(number)) {
            delta.offer(0, PageIndex(number), &page(self.vm.ram[number as usize]), &mut jobs);
            packer.send(&mut jobs).await?;
        }
        delta.flush(&mut jobs);
        for start in (0..DISK).step_by(PART as usize) {
            let part = PageRange::new(PageIndex(start), PageIndex(DISK.min(start + PART)));
            let window = resumed.window(&names()[1], part).await?;
            let mut ranges = self.ranges(part, is_full);
            window
                .iter()
                .for_each(|window| add_carried(&mut ranges, window, DISK * PAGE_SIZE as u64));
            delta.enter(1, window);
            for range in ranges {
                self.offer_range(delta, range, &mut jobs);
                packer.send(&mut jobs).await?;
            }
        }
        delta.flush(&mut jobs);
        // The device state has another length each time.
        let state = [page(1000), page(1001)].concat();
        delta.offer(
            2,
            PageIndex(0),
            &state[..PAGE_SIZE * (1 + self.committed as usize % 2)],
            &mut jobs,
        );
        delta.flush(&mut jobs);
        packer.send(&mut jobs).await
    }

    /// What is read of the disk: a full checkpoint what is allocated, another one what was written.
    fn ranges(&self, part: PageRange, is_full: bool) -> Vec<ContentRange> {
        let wanted = |number: u64| {
            if is_full {
                self.vm.disk[number as usize].is_some()
            } else {
                self.dirty[1].contains(&number)
            }
        };
        let range = |number: u64| {
            let content = if self.vm.disk[number as usize] == Some(0) {
                Content::Zero
            } else {
                Content::Data
            };
            ContentRange {
                start: number * PAGE_SIZE as u64,
                end: (number + 1) * PAGE_SIZE as u64,
                content,
            }
        };
        part.iter().map(|page| page.0).filter(|number| wanted(*number)).map(range).collect()
    }

    fn offer_range(&self, delta: &mut Delta, range: ContentRange, jobs: &mut Vec<PackJob>) {
        let pages = PageRange::new(
            PageIndex(range.start / PAGE_SIZE as u64),
            PageIndex(range.end / PAGE_SIZE as u64),
        );
        match range.content {
            Content::Zero => delta.offer_zero(1, pages, jobs),
            Content::Data => {
                let content =
                    pages.iter().map(|at| page(self.vm.disk[at.as_usize()].unwrap_or(LAYER)));
                delta.offer(1, pages.start, &content.collect::<Vec<_>>().concat(), jobs);
            }
        }
    }

    /// What a restore takes from the checkpoint just committed, which has to hold each of its packs
    /// whole.
    async fn apply(&mut self, packs: &[NumberedPack]) {
        let id = CheckpointId(self.committed);
        for NumberedPack { record, .. } in packs {
            let len = self.repository.pack_len(&vm(), id, record.name.as_str()).await.unwrap();
            assert_eq!(len, record.info.len.0);
            let index = lineage::index(&self.repository, &vm(), id, record).await.unwrap();
            for (space, restored) in names().iter().zip(&mut self.restored) {
                for run in index.runs_of(space) {
                    let digests = index
                        .run_digests(run)
                        .iter()
                        .copied()
                        .chain(std::iter::repeat(PageDigest::ZERO_PAGE));
                    restored.extend(run.pages.iter().map(|page| page.0).zip(digests));
                }
            }
        }
        for number in 0..RAM {
            assert_eq!(
                self.restored[0].get(&number),
                Some(&digest(self.vm.ram[number as usize])),
                "memory page {number}"
            );
        }
        for number in 0..DISK {
            let restored = self.restored[1].get(&number).copied().unwrap_or(digest(LAYER));
            assert_eq!(
                restored,
                digest(self.vm.disk[number as usize].unwrap_or(LAYER)),
                "disk page {number}"
            );
        }
    }

    fn write_ram(&mut self, number: u64, content: u64) {
        self.vm.ram[number as usize] = content;
        self.dirty[0].insert(number);
    }

    fn write_disk(&mut self, number: u64, content: Option<u64>) {
        self.vm.disk[number as usize] = content;
        self.dirty[1].insert(number);
    }

    /// The store is full after so many packs.
    fn fail_after(&self, packs: u64) {
        self.faulty.inject(FaultRule::always(Op::Put, Fault::Full).on("pack-").skip(packs));
    }

    async fn partials(&self) -> Vec<StorePath> {
        let dir = StorePath::new("vms/vm-1/checkpoints").unwrap();
        let entries = self.memory.list(&dir).await.unwrap();
        entries
            .iter()
            .filter(|entry| entry.name.ends_with(".partial"))
            .map(|entry| dir.join(&entry.name).unwrap())
            .collect()
    }
}

const UPLOADS: std::time::Duration = std::time::Duration::from_secs(10);

fn busy() -> Pages {
    Pages {
        ram: (0..RAM).map(|number| number % 5 * (number + 10_000)).collect(),
        disk: (0..DISK).map(|number| Some(number + 20_000)).collect(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn carried_packs_are_not_stored_again() {
    let mut scene = Scene::new(busy()).await;
    scene.fail_after(9);
    scene.attempt().await.unwrap_err();
    let stored = scene.carried.as_ref().unwrap().bytes().0;
    assert!(stored > 1 << 20, "{stored}");
    scene.faulty.heal();
    let before = scene.faulty.calls(Op::Put, "pack-");
    let carried = scene.attempt().await.unwrap();
    assert_eq!(carried, stored, "nothing was outdated");
    // Of 18 packs nine were there; frames are cut where the earlier try ended.
    let puts = scene.faulty.calls(Op::Put, "pack-") - before;
    assert!((8..=11).contains(&puts), "{puts}");
    assert!(scene.partials().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn carried_pack_that_is_gone_or_cut_is_stored_again() {
    let mut scene = Scene::new(busy()).await;
    scene.fail_after(9);
    scene.attempt().await.unwrap_err();
    let names: Vec<String> = scene
        .carried
        .as_ref()
        .unwrap()
        .packs
        .iter()
        .map(|pack| pack.record.name.to_string())
        .collect();
    let dir = scene.partials().await.remove(0);
    scene.memory.remove(&dir.join(&names[2]).unwrap()).await.unwrap();
    let cut = dir.join(&names[4]).unwrap();
    scene.memory.remove(&cut).await.unwrap();
    scene.memory.put(&cut, vec![Bytes::from_static(b"short")], Default::default()).await.unwrap();
    scene.faulty.heal();
    scene.attempt().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn carried_packs_of_a_fenced_writer_are_gone_and_it_commits_nothing() {
    let mut scene = Scene::new(busy()).await;
    scene.fail_after(9);
    scene.attempt().await.unwrap_err();
    scene.faulty.heal();
    let other = scene
        .repository
        .claim_writer(&vm(), holder::record("j").unwrap(), Claim::TakeOver)
        .await
        .unwrap();
    assert!(scene.partials().await.is_empty(), "the claim removes them");
    let error = scene.attempt().await.unwrap_err();
    assert!(error.downcast_ref::<StoreError>().is_some_and(StoreError::is_fenced), "{error:#}");
    assert!(scene.partials().await.is_empty());
    drop(other);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn carried_packs_that_are_outdated_leave_the_store() {
    let mut scene = Scene::new(busy()).await;
    scene.fail_after(9);
    scene.attempt().await.unwrap_err();
    let first = scene.carried.as_ref().unwrap().packs.clone();
    (0..300).for_each(|number| scene.write_disk(number, Some(30_000 + number)));
    scene.faulty.heal();
    // The second try stores again what the first one has of these pages, and fails behind them.
    scene.fail_after(6);
    scene.attempt().await.unwrap_err();
    scene.faulty.heal();
    let carried = scene.attempt().await.unwrap();
    assert!(carried > 0);
    let id = CheckpointId(1);
    let mut gone = 0;
    for pack in &first {
        gone += usize::from(
            scene.repository.pack_len(&vm(), id, pack.record.name.as_str()).await.is_err(),
        );
    }
    assert!((3..first.len()).contains(&gone), "{gone} of {} packs", first.len());
}

/// One of a few contents that the page may have, of which 0 is zeros.
fn of_page(number: u64, content: u64) -> u64 {
    content * (10_000 + number)
}

/// Between two tries.
#[derive(Clone, Debug)]
struct Step {
    ram: Vec<(u64, u64)>,
    disk: Vec<(u64, u64, Option<u64>)>,
    /// The try fails after so many packs.
    fails_after: Option<u64>,
    /// This one of the packs kept before is lost.
    stolen: Option<usize>,
}

fn any_step() -> impl Strategy<Value = Step> {
    let ram = prop::collection::vec((0..RAM, 0..4_u64), 0..60);
    let content = prop_oneof![Just(None), (0..4_u64).prop_map(Some)];
    let disk = prop::collection::vec((0..DISK, 1..120_u64, content), 0..5);
    let fails = prop::option::weighted(0.6, 0..12_u64);
    (ram, disk, fails, prop::option::weighted(0.2, 0..8_usize))
        .prop_map(|(ram, disk, fails_after, stolen)| Step { ram, disk, fails_after, stolen })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// Whatever the guest writes, whichever tries fail and whatever the store loses of them: each
    /// checkpoint that is committed restores the VM.
    #[test]
    fn carried_packs_never_change_what_a_checkpoint_holds(steps in prop::collection::vec(any_step(), 1..9)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let disk = (0..DISK).map(|number| (number % 3 > 0).then_some(of_page(number, number % 3))).collect();
            let mut scene = Scene::new(Pages { ram: vec![0; RAM as usize], disk }).await;
            for step in steps {
                step.ram.iter().for_each(|(number, content)| scene.write_ram(*number, of_page(*number, *content)));
                for (start, len, content) in &step.disk {
                    (*start..DISK.min(start + len)).for_each(|number| scene.write_disk(number, content.map(|content| of_page(number, content))));
                }
                scene.steal(step.stolen).await;
                step.fails_after.iter().for_each(|packs| scene.fail_after(*packs));
                let _ = scene.attempt().await;
                scene.faulty.heal();
            }
            scene.attempt().await.unwrap();
            assert!(scene.partials().await.is_empty());
        });
    }
}

impl Scene {
    async fn steal(&self, which: Option<usize>) {
        let mut packs = self.carried.iter().flat_map(|carried| &carried.packs);
        if let (Some(which), Some(dir)) = (which, self.partials().await.first())
            && let Some(pack) = packs.nth(which)
        {
            self.memory.remove(&dir.join(pack.record.name.as_str()).unwrap()).await.unwrap();
        }
    }
}
