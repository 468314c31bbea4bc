//! Lineages that begin without an index: what is read of each checkpoint is what was stored.

use super::super::parent::Ancestry;
use super::super::synthetic::{Synthetic, vm};
use crate::lineage::{self, CheckpointName};
use crate::progress::Silent;
use crate::restore::Source;
use crate::verify;
use checkpoint_format::{
    ByteLen, CheckpointId, DigestTable, Manifest, PAGE_SIZE, PageDigest, PageIndex, PageRange,
};
use checkpoint_store::{LocalStore, MemoryStore, PutOptions, Store, StorePath};
use std::path::Path;
use std::sync::Arc;

const CHECKPOINTS: u64 = 40;

#[tokio::test]
async fn index_of_a_lineage_that_began_without_one() {
    let mut made = Synthetic::new().await;
    made.last_of_version_1 = 5;
    for id in 1..=CHECKPOINTS {
        // The disk shrinks and grows, and sometimes it is away.
        let pages = if id % 11 == 8 { 0 } else { 100 + (id * 37 % 100) as usize };
        made.resize_disk(pages);
        let manifest = made.commit(id).await;
        if let Some(index) = &manifest.index {
            assert_eq!(index.checkpoints, id);
            assert!(index.segments.len() <= 10, "{index:?}");
            assert_eq!(index.segments.last().unwrap().first, CheckpointId(1));
        }
        check_content(&made, id, &manifest).await;
        check_digests(&made, id, &manifest).await;
    }
}

/// Of a guest that writes to the same pages again and again.
#[tokio::test]
async fn reads_of_a_helper_that_begins_do_not_grow_with_the_lineage() {
    let mut made = Synthetic::new().await;
    made.resize(300, 0);
    made.zeros = 0;
    made.writes = |page, id| page < 30 && (page + id).is_multiple_of(3);
    let mut found = Vec::new();
    for id in 1..=300 {
        let manifest = made.commit(id).await;
        if id == 30 || id == 300 {
            let before = made.store.reads().len();
            check_digests(&made, id, &manifest).await;
            let reads = made.store.reads().split_off(before);
            found.push((reads.len(), reads.iter().map(|(_, bytes)| bytes).sum::<u64>()));
        }
    }
    let (young, old) = (found[0], found[1]);
    println!("calls and bytes: {young:?}, {old:?}");
    assert!(old.0 * 10 <= young.0 * 12 && old.1 * 10 <= young.1 * 12, "{young:?} {old:?}");
}

#[tokio::test]
async fn index_that_is_damaged_is_made_again() {
    let mut made = Synthetic::new().await;
    let mut last = 0;
    let mut segments = 0;
    while segments < 10 {
        last += 1;
        segments = made.commit(last).await.index.unwrap().segments.len();
    }
    // The next one merges the youngest of them.
    let path = StorePath::new(&format!("vms/vm-1/checkpoints/{last}/manifest.json")).unwrap();
    let file = made.store.read(&path, 1 << 20).await.unwrap();
    let damaged: Vec<u8> =
        file[..file.len() - 1].iter().copied().chain([!file[file.len() - 1]]).collect();
    made.store.remove(&path).await.unwrap();
    made.store.put(&path, vec![damaged.into()], PutOptions::default()).await.unwrap();
    for id in last + 1..=last + 2 {
        let manifest = made.commit(id).await;
        let index = manifest.index.as_ref().unwrap();
        assert_eq!((index.checkpoints, index.segments.len() as u64), (id, id - last));
        check_content(&made, id, &manifest).await;
        check_digests(&made, id, &manifest).await;
    }
}

/// What is read of the newest checkpoint is what it holds.
async fn check_content(made: &Synthetic, id: u64, manifest: &Manifest) {
    let (name, progress) = (vm(), Arc::new(Silent));
    let source = Source::open(&made.repository, &name, CheckpointId(id), progress).await.unwrap();
    for (space, expected) in manifest.spaces.iter().zip(&made.content) {
        let found = source.read_whole(space).await.unwrap();
        let found: Vec<u8> = found.chunks(PAGE_SIZE).map(|page| page[0]).collect();
        assert!(found == *expected, "{} of checkpoint {id}", space.name);
        let pages = PageRange::new(PageIndex(20), PageIndex(90));
        let whole: Vec<_> = source.map(&space.name).await.unwrap().runs_in(pages).collect();
        assert_eq!(source.locate(&space.name, pages).await.unwrap(), whole);
    }
}

/// What a helper that begins knows of the parent is what the parent holds.
async fn check_digests(made: &Synthetic, id: u64, manifest: &Manifest) {
    let (name, id) = (vm(), CheckpointId(id));
    let listed: Vec<CheckpointId> = (1..=id.0).map(CheckpointId).collect();
    let ancestry = Ancestry::read(&made.repository, &name, id, &listed).await.unwrap();
    let shapes =
        [DigestTable::dense(manifest.spaces[0].pages()), DigestTable::sparse(ByteLen(1 << 20))];
    let names = manifest.spaces.iter().map(|space| space.name.clone());
    let mut tables: Vec<_> = names.zip(shapes).collect();
    ancestry.digests(&made.repository, &mut tables).await.unwrap();
    for ((space, table), at) in tables.iter().zip(0..) {
        for (number, fill) in (0..).zip(&made.content[at]) {
            let expected =
                made.is_recorded[at][number as usize].then(|| PageDigest::of(&(made.page)(*fill)));
            let found = table.get(PageIndex(number));
            // Trailers alone do not have the zeros by which a space grew.
            let is_unknown = found.is_none() && manifest.index.is_none();
            assert!(found == expected || is_unknown, "page {number} of {space} in {id}");
        }
    }
}

/// The sizes of the VM in the golden store, and its checkpoints.
const GOLDEN: (usize, usize, u64) = (40, 24, 3);

async fn golden(store: Arc<dyn Store>) -> Synthetic {
    let mut made = Synthetic::in_store(store).await;
    made.resize(GOLDEN.0, GOLDEN.1);
    made.last_of_version_1 = GOLDEN.2;
    made.writes = |page, id| (page + id).is_multiple_of(5);
    made
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (path, target) = entry.map(|entry| (entry.path(), to.join(entry.file_name()))).unwrap();
        if path.is_dir() {
            copy(&path, &target);
        } else {
            std::fs::copy(path, target).unwrap();
        }
    }
}

/// A store as programs wrote it before there was an index. It stays as it is.
#[tokio::test]
async fn golden_store_of_version_1_is_read_and_continued() {
    let saved = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/store-v1");
    if std::env::var_os("STILLPOINT_BLESS").is_some() {
        let mut made = golden(Arc::new(LocalStore::new(&saved).unwrap())).await;
        for id in 1..=GOLDEN.2 {
            made.commit(id).await;
        }
    }
    let mut same = golden(Arc::new(MemoryStore::new())).await;
    for id in 1..=GOLDEN.2 {
        same.commit(id).await;
    }
    let directory = tempfile::tempdir().unwrap();
    copy(&saved, directory.path());
    let mut made = golden(Arc::new(LocalStore::new(directory.path()).unwrap())).await;
    made.continue_from(GOLDEN.2, &same).await;
    let newest = CheckpointId(GOLDEN.2);
    let manifest = lineage::manifest(&made.repository, &vm(), newest).await.unwrap();
    assert_eq!(manifest.index, None);
    check_content(&made, GOLDEN.2, &manifest).await;
    check_digests(&made, GOLDEN.2, &manifest).await;
    for id in GOLDEN.2 + 1..=GOLDEN.2 + 12 {
        let manifest = made.commit(id).await;
        let index = manifest.index.as_ref().unwrap();
        assert_eq!((index.checkpoints, index.segments.last().unwrap().first.0), (id, 1));
        check_content(&made, id, &manifest).await;
        check_digests(&made, id, &manifest).await;
    }
    let name = CheckpointName { vm: vm(), id: None };
    let report = verify::read_back(&made.repository, &name, &Silent).await.unwrap();
    assert_eq!((report.checkpoints, report.problems), (GOLDEN.2 + 12, Vec::new()));
}
