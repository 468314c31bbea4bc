//! Lineages that begin without an index: what is read of each checkpoint is what was stored.

use super::super::holder;
use super::*;
use crate::pack::{FrameJob, PackJob, PackTarget, Packer};
use crate::progress::Silent;
use crate::restore::Source;
use checkpoint_format::{
    ByteLen, CheckpointKind, Epoch, PAGE_SIZE, PageDigest, PageIndex, PageRange, RamBlockRecord,
    SpaceRecord, SpaceTable, Totals, VmRecord,
};
use checkpoint_store::{Claim, MemoryStore, Mode, Writer};
use std::sync::Arc;

const RAM: u64 = 300;
/// Checkpoints before there was an index.
const BEFORE: u64 = 5;
const CHECKPOINTS: u64 = 40;

fn vm() -> VmName {
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

/// Pages by what fills them; the content of both spaces.
type Content = [Vec<u8>; 2];

/// Stores what `id` writes: of each space some pages, and some zeros.
async fn store_packs(
    partial: &Arc<PartialCheckpoint>,
    id: u64,
    content: &mut Content,
) -> Vec<PackRecord> {
    let names = spaces(1).into_iter().map(|space| space.name);
    let table = SpaceTable::new(names.clone()).unwrap();
    let target = Arc::clone(partial) as Arc<dyn PackTarget>;
    let packer = Packer::with_packs_of(ByteLen(8192), target, table.clone(), format!("{id}"), 0);
    let mut jobs = Vec::new();
    for (space, content) in names.map(|name| table.id(&name).unwrap()).zip(content) {
        let len = content.len() as u64;
        let written: Vec<u64> =
            (0..len).filter(|page| id == 1 || (page * 31 + id * 17).is_multiple_of(23)).collect();
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
        let zeros = PageRange::new(PageIndex(id * 5 % len), PageIndex((id * 5 % len + 3).min(len)));
        content[zeros.start.as_usize()..zeros.end.as_usize()].fill(0);
        jobs.push(PackJob::Zero(space, zeros));
        packer.send(&mut jobs).await.unwrap();
    }
    packer.finish().await.unwrap()
}

async fn commit(
    repository: &Repository,
    writer: &Writer,
    id: u64,
    content: &mut Content,
) -> Manifest {
    let partial = Arc::new(writer.begin(CheckpointId(id)).await.unwrap());
    let packs = store_packs(&partial, id, content).await;
    let partial = Arc::into_inner(partial).unwrap();
    let mut manifest = manifest(id, content[1].len() as u64, packs);
    let mut behind = Vec::new();
    if id > BEFORE {
        let parts = IndexParts { repository, partial: &partial, manifest: &manifest };
        let NewIndex { record, segment } = parts.make().await.unwrap();
        (manifest.index, behind) = (Some(record), segment);
    }
    let file = [manifest.encode().unwrap(), behind].concat();
    let _durable = partial.commit(Bytes::from(file)).await.unwrap();
    manifest
}

#[tokio::test]
async fn index_of_a_lineage_that_began_without_one() {
    let store = Arc::new(MemoryStore::new());
    let repository = Repository::open(store, Mode::CreateIfMissing).await.unwrap();
    let name = vm();
    let claim = repository.claim_writer(&name, holder::record("i").unwrap(), Claim::TakeOver);
    let writer = claim.await.unwrap();
    let mut content: Content = [vec![0; RAM as usize], vec![0; 200]];
    for id in 1..=CHECKPOINTS {
        // The disk shrinks and grows.
        content[1].resize(100 + (id * 37 % 100) as usize, 0);
        let manifest = commit(&repository, &writer, id, &mut content).await;
        if let Some(index) = &manifest.index {
            assert_eq!(index.checkpoints, id);
            assert!(index.segments.len() <= 10, "{index:?}");
            assert_eq!(index.segments.last().unwrap().first, CheckpointId(1));
        }
        let source =
            Source::open(&repository, &vm(), CheckpointId(id), Arc::new(Silent)).await.unwrap();
        for (space, expected) in manifest.spaces.iter().zip(&content) {
            let found = source.read_whole(space).await.unwrap();
            let found: Vec<u8> = found.chunks(PAGE_SIZE).map(|page| page[0]).collect();
            assert!(found == *expected, "{} of checkpoint {id}", space.name);
            let pages = PageRange::new(PageIndex(20), PageIndex(90));
            let whole: Vec<_> = source.map(&space.name).await.unwrap().runs_in(pages).collect();
            assert_eq!(source.locate(&space.name, pages).await.unwrap(), whole);
        }
    }
}
