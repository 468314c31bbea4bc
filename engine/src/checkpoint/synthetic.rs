//! A store with checkpoints that no QEMU took, for tests of what is read of them.

use super::holder;
use super::index::{IndexParts, NewIndex};
use crate::pack::{FrameJob, PackJob, PackTarget, Packer};
use bytes::Bytes;
use checkpoint_format::{
    ByteLen, CheckpointId, CheckpointKind, Epoch, Manifest, PAGE_SIZE, PackRecord, PageDigest,
    PageIndex, PageRange, RamBlockRecord, SpaceName, SpaceRecord, SpaceTable, Totals, VmName,
    VmRecord,
};
use checkpoint_store::{
    Claim, FaultyStore, MemoryStore, Mode, PartialCheckpoint, Repository, Writer,
};
use std::sync::Arc;

/// Pages of the memory.
pub(crate) const RAM: u64 = 300;

/// A VM's checkpoints, and what the newest one holds.
pub(crate) struct Synthetic {
    pub store: FaultyStore,
    pub repository: Repository,
    writer: Writer,
    /// What fills each page of both spaces.
    pub content: [Vec<u8>; 2],
    /// The last checkpoint that has no index.
    pub last_of_version_1: u64,
    /// Whether a checkpoint writes a page.
    pub writes: fn(u64, u64) -> bool,
}

pub(crate) fn vm() -> VmName {
    "vm-1".parse().unwrap()
}

fn spaces(disk: u64) -> Vec<SpaceRecord> {
    let pages = |count: u64| ByteLen(count * PAGE_SIZE as u64);
    vec![
        SpaceRecord::new(SpaceName::ram("pc.ram").unwrap(), pages(RAM)),
        SpaceRecord::new(SpaceName::disk("d").unwrap(), pages(disk)),
    ]
}

fn manifest(id: u64, disk: u64, packs: Vec<PackRecord>) -> Manifest {
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
            ram_bytes: ByteLen(RAM * PAGE_SIZE as u64),
            ram_block: "pc.ram".to_owned(),
            directory: "/".to_owned(),
            files: Vec::new(),
        },
        run_state: None,
        spaces: spaces(disk),
        ram_blocks: vec![RamBlockRecord {
            name: "pc.ram".to_owned(),
            used: ByteLen(RAM * PAGE_SIZE as u64),
            total: ByteLen(RAM * PAGE_SIZE as u64),
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
        let store = FaultyStore::new(Arc::new(MemoryStore::new()));
        let repository =
            Repository::open(Arc::new(store.clone()), Mode::CreateIfMissing).await.unwrap();
        let record = holder::record("i").unwrap();
        let writer = repository.claim_writer(&vm(), record, Claim::TakeOver).await.unwrap();
        Self {
            store,
            repository,
            writer,
            content: [vec![0; RAM as usize], vec![0; 200]],
            last_of_version_1: 0,
            writes: |page, id| (page * 31 + id * 17).is_multiple_of(23),
        }
    }

    /// Stores what `id` writes: of each space some pages, and some zeros.
    async fn store_packs(&mut self, partial: &Arc<PartialCheckpoint>, id: u64) -> Vec<PackRecord> {
        let names = spaces(1).into_iter().map(|space| space.name);
        let table = SpaceTable::new(names.clone()).unwrap();
        let target = Arc::clone(partial) as Arc<dyn PackTarget>;
        let pack = ByteLen(8192);
        let packer = Packer::with_packs_of(pack, target, table.clone(), format!("{id}"), 0);
        let mut jobs = Vec::new();
        for (space, content) in names.map(|name| table.id(&name).unwrap()).zip(&mut self.content) {
            let len = content.len() as u64;
            let written: Vec<u64> =
                (0..len).filter(|page| id == 1 || (self.writes)(*page, id)).collect();
            for pages in written.chunks(7) {
                let fill = |page: &u64| (page * 7 + id) as u8 | 1;
                pages.iter().for_each(|page| content[*page as usize] = fill(page));
                let raw = |page: &u64| [fill(page); PAGE_SIZE];
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
            let zeros = PageRange::new(PageIndex(start), PageIndex((start + 3).min(len)));
            content[zeros.start.as_usize()..zeros.end.as_usize()].fill(0);
            jobs.push(PackJob::Zero(space, zeros));
            packer.send(&mut jobs).await.unwrap();
        }
        packer.finish().await.unwrap()
    }

    /// The next checkpoint; `spoil` may change what its index is made of.
    pub(crate) async fn commit_with(&mut self, id: u64, spoil: impl Fn(&mut Manifest)) -> Manifest {
        let partial = Arc::new(self.writer.begin(CheckpointId(id)).await.unwrap());
        let packs = self.store_packs(&partial, id).await;
        let partial = Arc::into_inner(partial).unwrap();
        let mut manifest = manifest(id, self.content[1].len() as u64, packs);
        let mut behind = Vec::new();
        if id > self.last_of_version_1 {
            let mut spoilt = manifest.clone();
            spoil(&mut spoilt);
            let parts = IndexParts {
                repository: &self.repository,
                partial: &partial,
                manifest: &spoilt,
            };
            let NewIndex { record, segment } = parts.make().await.unwrap();
            (manifest.index, behind) = (Some(record), segment);
        }
        let file = [manifest.encode().unwrap(), behind].concat();
        let _durable = partial.commit(Bytes::from(file)).await.unwrap();
        manifest
    }

    pub(crate) async fn commit(&mut self, id: u64) -> Manifest {
        self.commit_with(id, |_| {}).await
    }
}
