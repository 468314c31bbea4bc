//! A store with checkpoints that no QEMU took, for tests of what is read of them.

use super::holder;
use super::index::{IndexParts, NewIndex};
use super::parent::{Ancestry, Parent};
use crate::pack::{FrameJob, NumberedPack, PackJob, PackTarget, Packer};
use bytes::Bytes;
use checkpoint_format::{
    ByteLen, CheckpointId, CheckpointIdentity, CheckpointKind, Epoch, Manifest, PAGE_SIZE,
    PackRecord, PageDigest, PageIndex, PageRange, RamBlockRecord, SpaceName, SpaceRecord,
    SpaceTable, Totals, VmName, VmRecord,
};
use checkpoint_store::{
    Claim, FaultyStore, MemoryStore, Mode, PartialCheckpoint, Repository, Store, Writer,
};
use std::sync::Arc;

/// Pages of the memory and of the disk, at first.
const PAGES: (usize, usize) = (300, 200);

/// A VM's checkpoints, and what the newest one holds.
pub(crate) struct Synthetic {
    pub store: FaultyStore,
    pub repository: Repository,
    writer: Writer,
    parent: Option<Parent>,
    /// What fills each page of both spaces. There is no disk without pages.
    pub content: [Vec<u8>; 2],
    /// Whether any checkpoint recorded the page.
    pub is_recorded: [Vec<bool>; 2],
    /// The last checkpoint that has no index.
    pub last_of_version_1: u64,
    /// Whether a checkpoint writes a page.
    pub writes: fn(u64, u64) -> bool,
    /// What a page holds that something fills.
    pub page: fn(u8) -> [u8; PAGE_SIZE],
    /// Of frames, and the length at which packs are closed.
    pub pages: usize,
    pub pack_bytes: ByteLen,
    /// Pages that each checkpoint finds to be zero.
    pub zeros: u64,
    /// On QEMU's command line.
    pub arguments: Vec<String>,
    pub metadata: Metadata,
}

/// Bytes of manifests, trailers and indexes of all checkpoints.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Metadata {
    pub written: u64,
    /// What would have been written without an index.
    pub written_without: u64,
    /// To make the index.
    pub read: u64,
}

/// Content of a page that does not compress, but for zeros.
pub(crate) fn noise(fill: u8) -> [u8; PAGE_SIZE] {
    let mut state = u64::from(fill);
    let mut page = [0; PAGE_SIZE];
    for word in page.chunks_exact_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(u64::from(fill));
        word.copy_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    page[0] = fill;
    page
}

pub(crate) fn vm() -> VmName {
    "vm-1".parse().unwrap()
}

fn spaces(ram: usize, disk: usize) -> Vec<SpaceRecord> {
    let pages = |count: usize| ByteLen((count * PAGE_SIZE) as u64);
    let ram = SpaceRecord::new(SpaceName::ram("pc.ram").unwrap(), pages(ram));
    let disk = (disk > 0).then(|| SpaceRecord::new(SpaceName::disk("d").unwrap(), pages(disk)));
    std::iter::once(ram).chain(disk).collect()
}

fn manifest(id: u64, spaces: Vec<SpaceRecord>, packs: Vec<PackRecord>) -> Manifest {
    let ram = spaces[0].bytes;
    Manifest {
        vm: vm(),
        id: CheckpointId(id),
        parent: (id > 1).then_some(CheckpointId(id - 1)),
        kind: if id > 1 { CheckpointKind::Incremental } else { CheckpointKind::Full },
        epoch: Epoch(1),
        instance: "i".to_owned(),
        created_at: "2026-01-31T23:59:59Z".to_owned(),
        stillpoint_version: String::new(),
        vm_record: VmRecord {
            qemu_version: "10.0.2".to_owned(),
            program: "/usr/bin/qemu".to_owned(),
            machine_type: "pc".to_owned(),
            accelerator: "tcg".to_owned(),
            arguments: Vec::new(),
            vcpus: 1,
            ram_bytes: ram,
            ram_block: "pc.ram".to_owned(),
            directory: "/".to_owned(),
            files: Vec::new(),
        },
        run_state: None,
        spaces,
        ram_blocks: vec![RamBlockRecord {
            name: "pc.ram".to_owned(),
            used: ram,
            total: ram,
            page_size: ByteLen(4096),
            shared: true,
        }],
        disks: Vec::new(),
        packs,
        index: None,
        totals: Totals::default(),
    }
}

impl Synthetic {
    pub(crate) async fn new() -> Self {
        Self::in_store(Arc::new(MemoryStore::new())).await
    }

    pub(crate) async fn in_store(store: Arc<dyn Store>) -> Self {
        let store = FaultyStore::new(store);
        let repository =
            Repository::open(Arc::new(store.clone()), Mode::CreateIfMissing).await.unwrap();
        let record = holder::record("i").unwrap();
        let writer = repository.claim_writer(&vm(), record, Claim::TakeOver).await.unwrap();
        Self {
            store,
            repository,
            writer,
            parent: None,
            content: [vec![0; PAGES.0], vec![0; PAGES.1]],
            is_recorded: [vec![false; PAGES.0], vec![false; PAGES.1]],
            last_of_version_1: 0,
            writes: |page, id| (page * 31 + id * 17).is_multiple_of(23),
            page: |fill| [fill; PAGE_SIZE],
            pages: 7,
            pack_bytes: ByteLen(8192),
            zeros: 3,
            arguments: Vec::new(),
            metadata: Metadata::default(),
        }
    }

    /// A disk that was away is another one when it comes back.
    pub(crate) fn resize_disk(&mut self, pages: usize) {
        let is_there = !self.content[1].is_empty();
        self.content[1].resize(pages, 0);
        self.is_recorded[1].resize(pages, is_there);
    }

    /// Stores what `id` writes: of each space some pages, and some zeros.
    async fn store_packs(
        &mut self,
        partial: &Arc<PartialCheckpoint>,
        id: u64,
    ) -> Vec<NumberedPack> {
        let names = spaces(1, 1).into_iter().map(|space| space.name);
        let table = SpaceTable::new(names.clone()).unwrap();
        let target = Arc::clone(partial) as Arc<dyn PackTarget>;
        let label = format!("{id}");
        let packer = Packer::with_packs_of(self.pack_bytes, target, table.clone(), label, 0);
        let mut jobs = Vec::new();
        let spaces = names.map(|name| table.id(&name).unwrap());
        let pages = self.content.iter_mut().zip(&mut self.is_recorded);
        for (space, (content, is_recorded)) in spaces.zip(pages) {
            let len = content.len() as u64;
            if len == 0 {
                continue;
            }
            let written: Vec<u64> =
                (0..len).filter(|page| id == 1 || (self.writes)(*page, id)).collect();
            for pages in written.chunks(self.pages) {
                let fill = |page: &u64| (page * 7 + id) as u8 | 1;
                for page in pages {
                    content[*page as usize] = fill(page);
                    is_recorded[*page as usize] = true;
                }
                let raw = |at: &u64| (self.page)(fill(at));
                jobs.push(PackJob::Data(FrameJob {
                    space,
                    pages: pages
                        .iter()
                        .map(|page| (PageIndex(*page), PageDigest::of(&raw(page))))
                        .collect(),
                    raw: pages.iter().flat_map(raw).collect(),
                }));
            }
            let start = id * 5 % len;
            let zeros = PageRange::new(PageIndex(start), PageIndex((start + self.zeros).min(len)));
            content[zeros.start.as_usize()..zeros.end.as_usize()].fill(0);
            is_recorded[zeros.start.as_usize()..zeros.end.as_usize()].fill(true);
            if self.zeros > 0 {
                jobs.push(PackJob::Zero(space, zeros));
            }
            packer.send(&mut jobs).await.unwrap();
        }
        let stored = packer.stored();
        packer.finish().await.unwrap();
        stored.list()
    }

    /// The next checkpoint; `spoil` may change what its index is made of.
    pub(crate) async fn commit_with(&mut self, id: u64, spoil: impl Fn(&mut Manifest)) -> Manifest {
        let partial = Arc::new(self.writer.begin(CheckpointId(id)).await.unwrap());
        let mut packs = self.store_packs(&partial, id).await;
        let partial = Arc::into_inner(partial).unwrap();
        let records = packs.iter().map(|pack| pack.record.clone()).collect();
        let mut manifest =
            manifest(id, spaces(self.content[0].len(), self.content[1].len()), records);
        manifest.vm_record.arguments = self.arguments.clone();
        let without = manifest.encode().unwrap().len();
        let trailers = manifest.packs.iter().map(|pack| u64::from(pack.info.trailer_len));
        let trailers: u64 = trailers.sum();
        let reads = self.store.reads().len();
        let mut behind = Vec::new();
        if id > self.last_of_version_1 {
            let mut spoilt = manifest.clone();
            spoil(&mut spoilt);
            packs.truncate(spoilt.packs.len());
            let parts = IndexParts {
                repository: &self.repository,
                partial: &partial,
                packs: &packs,
                manifest: &spoilt,
                parent: self.parent.as_ref(),
            };
            let NewIndex { record, segment } = parts.make().await.unwrap();
            (manifest.index, behind) = (Some(record), segment);
        }
        let head = manifest.encode().unwrap();
        let identity = CheckpointIdentity::new(CheckpointId(id), &head);
        self.parent = Some(Parent::new(&manifest, identity, head.len() as u64, id));
        let read: u64 = self.store.reads()[reads..].iter().map(|(_, bytes)| bytes).sum();
        self.metadata.written_without += without as u64 + trailers;
        self.metadata.written += (head.len() + behind.len()) as u64 + trailers;
        self.metadata.read += read;
        let file = [head, behind].concat();
        let _durable = partial.commit(Bytes::from(file)).await.unwrap();
        manifest
    }

    /// The next checkpoint adds to `id`, which another made; with what that one holds.
    pub(crate) async fn continue_from(&mut self, id: u64, made: &Self) {
        let listed: Vec<CheckpointId> = (1..=id).map(CheckpointId).collect();
        let found = Ancestry::read(&self.repository, &vm(), CheckpointId(id), &listed).await;
        self.parent = Some(found.unwrap().parent().unwrap());
        self.content = made.content.clone();
        self.is_recorded = made.is_recorded.clone();
    }

    /// Of other sizes, before the first checkpoint.
    pub(crate) fn resize(&mut self, ram: usize, disk: usize) {
        self.content = [vec![0; ram], vec![0; disk]];
        self.is_recorded = [vec![false; ram], vec![false; disk]];
    }

    pub(crate) async fn commit(&mut self, id: u64) -> Manifest {
        self.commit_with(id, |_| {}).await
    }
}
