//! The index of a checkpoint's lineage in the store: which pack and frame has each page, without a
//! look at any other checkpoint's manifest.
//!
//! Of each segment the directory is read when the index is opened; of its blocks those that a
//! question is about, and they are kept, as far as there is room.

mod digests;

use crate::lineage::ManifestFile;
use anyhow::{Context, Result};
use bytes::Bytes;
use checkpoint_format::{
    CheckpointId, Checksum, IndexBlock, IndexDirectory, IndexRecord, Overlay, PackPlace, PageRange,
    Placed, PlacedRun, Segment, SegmentRecord, SpaceName, VmName, as_index,
};
use checkpoint_store::Repository;
use futures::future::BoxFuture;
use futures::{StreamExt, TryStreamExt};
use quick_cache::Weighter;
use quick_cache::sync::{Cache, DefaultLifecycle};
use std::convert::Infallible;
use std::hash::RandomState;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Directories or runs of blocks that are read at once.
const READS: usize = 8;
/// Neighbouring blocks are read in one go up to this length.
const BATCH_BYTES: u64 = 4 << 20;
/// Decoded blocks that are kept: those of 8 GiB of scattered pages.
const CACHE_BYTES: u64 = 64 << 20;
/// About as many of them.
const KEPT_BLOCKS: usize = 256;

pub(crate) struct LineageIndex {
    repository: Repository,
    vm: VmName,
    /// The newest first.
    segments: Vec<StoredSegment>,
    blocks: Blocks,
    bytes_read: AtomicU64,
}

/// A segment in the file of a manifest.
struct StoredSegment {
    id: CheckpointId,
    /// Of the first block, in the file.
    blocks_at: u64,
    directory: IndexDirectory,
}

/// Where a segment is in the store.
pub(crate) struct SegmentPlace {
    pub id: CheckpointId,
    pub at: u64,
}

/// `head_len`: of the manifest that has the record.
pub(crate) fn place(record: &SegmentRecord, head_len: u64) -> SegmentPlace {
    SegmentPlace { id: record.id, at: record.at.map_or(head_len, |at| at.0) }
}

/// All of a segment.
pub(crate) async fn read_segment(
    repository: &Repository,
    vm: &VmName,
    record: &SegmentRecord,
    head_len: u64,
) -> Result<Segment<Bytes>> {
    let SegmentPlace { id, at } = place(record, head_len);
    let about = || format!("the index in the manifest of {vm}@{id}");
    let bytes = repository.read_manifest_range(vm, id, at, record.info.len().0).await;
    Segment::new(bytes.with_context(about)?, &record.info).with_context(about)
}

impl LineageIndex {
    pub(crate) async fn open(
        repository: &Repository,
        vm: &VmName,
        manifest: &ManifestFile,
        record: &IndexRecord,
    ) -> Result<Self> {
        let head_len = manifest.head_len;
        let mut reads: Vec<BoxFuture<'_, Result<StoredSegment>>> = Vec::new();
        for segment in &record.segments {
            let place = place(segment, head_len);
            reads.push(Box::pin(directory(repository, vm, place, segment)));
        }
        let segments = futures::stream::iter(reads).buffered(READS).try_collect().await?;
        let directories = record.segments.iter().map(|segment| segment.info.directory_len);
        Ok(Self {
            repository: repository.clone(),
            vm: vm.clone(),
            segments,
            blocks: no_blocks(),
            bytes_read: AtomicU64::new(directories.map(u64::from).sum()),
        })
    }

    pub(crate) fn vm(&self) -> &VmName {
        &self.vm
    }

    /// Bytes of directories and blocks that were read.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// The blocks that have any of these pages of a space, the newest segment's first; `keep`
    /// when other questions about them may follow.
    pub(crate) async fn blocks(
        &self,
        space: &SpaceName,
        pages: PageRange,
        keep: bool,
    ) -> Result<Vec<Vec<Arc<IndexBlock>>>> {
        let mut found = Vec::new();
        for segment in &self.segments {
            found.push(self.blocks_of(segment, space, pages, keep).await?);
        }
        Ok(found)
    }

    /// Passes on where `pages` are, given their [blocks](Self::blocks): ascending and without
    /// overlap, each run with the pack that it is in, if it is of data. Pages that no checkpoint
    /// recorded are left out.
    pub(crate) fn each(
        &self,
        blocks: &[Vec<Arc<IndexBlock>>],
        pages: PageRange,
        mut found: impl FnMut(&PlacedRun, Option<&PackPlace>) -> Result<()>,
    ) -> Result<()> {
        let lists = blocks.iter().map(|blocks| {
            let runs = blocks.iter().flat_map(move |block| block.runs_within(pages));
            runs.map(Ok::<_, Infallible>)
        });
        for piece in Overlay::new(lists) {
            let Ok((number, run)) = piece;
            let pack = match run.content {
                Placed::Unknown => continue,
                Placed::Zero => None,
                Placed::Data { pack, .. } => {
                    let directory = &self.segments[number].directory;
                    Some(directory.pack(pack).context("a block names a pack that is not listed")?)
                }
            };
            found(&run, pack)?;
        }
        Ok(())
    }

    async fn blocks_of(
        &self,
        segment: &StoredSegment,
        space: &SpaceName,
        pages: PageRange,
        keep: bool,
    ) -> Result<Vec<Arc<IndexBlock>>> {
        let numbers = segment.directory.blocks_of(space, pages);
        let rows = &segment.directory.blocks()[numbers.clone()];
        let mut reads: Vec<BoxFuture<'_, Result<Vec<Arc<IndexBlock>>>>> = Vec::new();
        if keep {
            for number in numbers {
                reads.push(Box::pin(self.kept(segment, number)));
            }
        } else {
            let mut first = numbers.start;
            while first < numbers.end {
                let start = rows[first - numbers.start].byte_range().start;
                let fits = rows[first - numbers.start..]
                    .iter()
                    .take_while(|row| row.byte_range().end - start <= BATCH_BYTES);
                let end = first + fits.count().max(1);
                reads.push(Box::pin(self.read_blocks(segment, first..end)));
                first = end;
            }
        }
        let batches: Vec<_> = futures::stream::iter(reads).buffered(READS).try_collect().await?;
        Ok(batches.into_iter().flatten().collect())
    }

    /// A block that is kept; two that ask for it wait for one read.
    async fn kept(&self, segment: &StoredSegment, number: usize) -> Result<Vec<Arc<IndexBlock>>> {
        let row = &segment.directory.blocks()[number];
        let read = async {
            let mut blocks = self.read_blocks(segment, number..number + 1).await?;
            blocks.pop().context("internal error: a read of no block")
        };
        let block = self.blocks.get_or_insert_async(&(row.checksum, row.pages), read).await?;
        Ok(vec![block])
    }

    /// Blocks that stand one behind another.
    async fn read_blocks(
        &self,
        segment: &StoredSegment,
        numbers: Range<usize>,
    ) -> Result<Vec<Arc<IndexBlock>>> {
        let (StoredSegment { id, blocks_at, directory }, vm) = (segment, &self.vm);
        let about = || format!("the index in the manifest of {vm}@{id}");
        let rows = &directory.blocks()[numbers.clone()];
        let (Some(first), Some(last)) = (rows.first(), rows.last()) else {
            return Ok(Vec::new());
        };
        let start = first.byte_range().start;
        let len = last.byte_range().end - start;
        let read = self.repository.read_manifest_range(vm, *id, blocks_at + start, len);
        let bytes = read.await.with_context(about)?;
        self.bytes_read.fetch_add(len, Ordering::Relaxed);
        let mut blocks = Vec::new();
        for (number, row) in numbers.zip(rows) {
            let range = row.byte_range();
            let stored = &bytes[as_index(range.start - start)..as_index(range.end - start)];
            let block = IndexBlock::parse(number, row, directory.packs().len(), stored);
            blocks.push(Arc::new(block.with_context(about)?));
        }
        Ok(blocks)
    }
}

async fn directory(
    repository: &Repository,
    vm: &VmName,
    place: SegmentPlace,
    record: &SegmentRecord,
) -> Result<StoredSegment> {
    let SegmentPlace { id, at } = place;
    let about = || format!("the index in the manifest of {vm}@{id}");
    let len = u64::from(record.info.directory_len);
    let bytes = repository.read_manifest_range(vm, id, at, len).await.with_context(about)?;
    let directory = IndexDirectory::parse(&bytes, &record.info).with_context(about)?;
    Ok(StoredSegment { id, blocks_at: at + len, directory })
}

/// What a decoded block depends on: its bytes, and the pages that its runs are counted from. The
/// numbers of packs in it are those of a segment's directory, whichever that is.
type BlockKey = (Checksum, PageRange);

type Blocks = Cache<BlockKey, Arc<IndexBlock>, Memory, RandomState>;

#[derive(Clone)]
struct Memory;

impl Weighter<BlockKey, Arc<IndexBlock>> for Memory {
    fn weight(&self, _: &BlockKey, block: &Arc<IndexBlock>) -> u64 {
        block.memory() as u64
    }
}

fn no_blocks() -> Blocks {
    Cache::with(KEPT_BLOCKS, CACHE_BYTES, Memory, RandomState::new(), DefaultLifecycle::default())
}
