//! The content of a checkpoint: which frame of which pack of its lineage has each page, and reading
//! just those frames.

use super::places::Places;
use crate::lineage::{self, ManifestFile};
use crate::progress::Progress;
use anyhow::{Context, Result};
use bytes::Bytes;
use checkpoint_format::{
    ByteLen, CheckpointId, CheckpointIdentity, FrameEntry, FrameNo, FrameRead, LocatedRun,
    Manifest, PAGE_SIZE, PackNo, PackPlace, PageMap, PageRange, RangeSet, RunSource, SpaceName,
    SpaceRecord, VmName, as_index,
};
use checkpoint_store::Repository;
use futures::future::BoxFuture;
use futures::{Stream, StreamExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vm::error::damaged;

/// Neighbouring frames are read in one go up to this length.
const BATCH_BYTES: u64 = 4 << 20;
/// Frames that compressed well are read together up to this content.
const BATCH_RAW_BYTES: u64 = 16 << 20;
/// The largest space that is held in memory whole: video memory of a large display.
const MAX_WHOLE: u64 = 1 << 30;
/// A gap between two needed frames that is cheaper to read than to skip.
const GAP_BYTES: u64 = 256 << 10;
/// Batches being read or decoded at once.
const READS: usize = 4;

/// Pages next to each other and their content.
pub(crate) type Run = (PageRange, Bytes);

/// A checkpoint whose pages can be read: its manifest is in memory, and where its pages are is
/// known or looked up in the store. Clones share it.
#[derive(Clone)]
pub struct Source(Arc<Inner>);

struct Inner {
    repository: Repository,
    vm: VmName,
    file: ManifestFile,
    places: Places,
    /// Of packs' content.
    bytes_read: AtomicU64,
    progress: Arc<dyn Progress>,
}

/// Frames of one pack that are read together.
struct Batch {
    pack: PackNo,
    start: u64,
    end: u64,
    frames: Vec<(FrameRead, FrameEntry)>,
    raw_bytes: u64,
}

impl Source {
    /// Reads the checkpoint's manifest and the directories of its index; of a checkpoint without an
    /// index the manifests and pack indexes of its lineage. `progress` shows how far the content is
    /// read.
    ///
    /// # Errors
    /// When the store cannot be read; damaged when what is read is not sound.
    pub async fn open(
        repository: &Repository,
        vm: &VmName,
        id: CheckpointId,
        progress: Arc<dyn Progress>,
    ) -> Result<Self> {
        let file = lineage::manifest_file(repository, vm, id).await?;
        let places = Places::open(repository, vm, &file).await?;
        Ok(Self(Arc::new(Inner {
            repository: repository.clone(),
            vm: vm.clone(),
            file,
            places,
            bytes_read: AtomicU64::new(0),
            progress,
        })))
    }

    pub(crate) fn identity(&self) -> CheckpointIdentity {
        self.0.file.identity
    }

    /// Of the checkpoint that is restored.
    pub fn manifest(&self) -> &Manifest {
        &self.0.file.manifest
    }

    pub(crate) fn repository(&self) -> &Repository {
        &self.0.repository
    }

    pub(crate) fn progress(&self) -> &Arc<dyn Progress> {
        &self.0.progress
    }

    pub(crate) fn bytes_read(&self) -> u64 {
        self.0.bytes_read.load(Ordering::Relaxed) + self.0.places.bytes_read()
    }

    /// Where the newest content of each page of a space is.
    ///
    /// # Errors
    /// When the index cannot be read; failed when the checkpoint has no such space.
    pub async fn map(&self, name: &SpaceName) -> Result<PageMap> {
        self.0.places.map(self.space(name)?).await
    }

    /// Where these pages of a space are, in order, in runs; pages beyond the space are left out.
    ///
    /// # Errors
    /// As those of [`Self::map`].
    pub async fn locate(&self, name: &SpaceName, pages: PageRange) -> Result<Vec<LocatedRun>> {
        self.0.places.locate(self.space(name)?, pages).await
    }

    /// The pages of a space that changed shortly before the checkpoint: those that it stores
    /// itself. None if they are more than `most`.
    ///
    /// # Errors
    /// When the indexes of its packs cannot be read.
    pub async fn changed_last(&self, name: &SpaceName, most: ByteLen) -> Result<RangeSet> {
        let mut pages = RangeSet::default();
        let manifest = self.manifest();
        if manifest.parent.is_none() || manifest.totals.bytes_changed > most {
            return Ok(pages);
        }
        for pack in &manifest.packs {
            let index = lineage::index(&self.0.repository, &self.0.vm, manifest.id, pack).await?;
            let data = index.runs_of(name).filter(|run| run.source != RunSource::Zero);
            data.for_each(|run| pages.insert(run.pages));
        }
        Ok(pages)
    }

    fn space(&self, name: &SpaceName) -> Result<&SpaceRecord> {
        let record = self.manifest().space(name);
        record.with_context(|| format!("the checkpoint has no space {name}"))
    }

    /// The content of all pages of one frame, slot by slot, by one read.
    pub(super) async fn read_frame(&self, pack: PackNo, frame: FrameNo) -> Result<Bytes> {
        let entry = self.0.places.frame(pack, frame)?;
        let range = entry.byte_range();
        let (bytes, about) = self.read_range(pack, range.start, range.end).await?;
        let decode = move || entry.decode(&bytes).map(Bytes::from);
        tokio::task::spawn_blocking(decode)
            .await
            .context("internal error: decoding panicked")?
            .with_context(|| format!("frame {frame} at byte {}", range.start))
            .context(about)
    }

    /// Which pack that is, whatever its number in this lineage.
    pub(crate) fn pack(&self, pack: PackNo) -> Result<PackPlace> {
        self.0.places.pack(pack)
    }

    /// Bytes of a pack, and what they are for an error.
    async fn read_range(&self, pack: PackNo, start: u64, end: u64) -> Result<(Bytes, String)> {
        let PackPlace { checkpoint: id, name } = self.0.places.pack(pack)?;
        let about = format!("reading {}@{id}/{name}", self.0.vm);
        let repository = &self.0.repository;
        let read = repository.read_pack_range(&self.0.vm, id, name.as_str(), start, end - start);
        let bytes = read.await.with_context(|| about.clone())?;
        self.0.bytes_read.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok((bytes, about))
    }

    /// The runs of data pages in an order that reads each pack from its beginning to its end, a few
    /// reads ahead. Each frame is checked as it is decoded; pages of zeros are in none.
    pub fn read(&self, map: &PageMap) -> impl Stream<Item = Result<Vec<Run>>> + Send + use<> {
        self.read_wanted(map, |_| true)
    }

    /// The same without the frames that are not wanted any more when it is their turn.
    pub fn read_wanted<W>(
        &self,
        map: &PageMap,
        is_wanted: W,
    ) -> impl Stream<Item = Result<Vec<Run>>> + Send + use<W>
    where
        W: Fn(&FrameRead) -> bool + Send + Sync + 'static,
    {
        let is_wanted = Arc::new(is_wanted);
        let mut reads: Vec<BoxFuture<'static, Result<Vec<Run>>>> = Vec::new();
        match self.batches(map.frame_reads()) {
            Ok(batches) => reads.extend(batches.into_iter().map(|batch| {
                let load = self.clone().load(batch, Arc::clone(&is_wanted));
                Box::pin(load) as BoxFuture<'static, _>
            })),
            Err(error) => reads.push(Box::pin(async { Err(error) })),
        }
        futures::stream::iter(reads).buffered(READS)
    }

    /// All of a space that fits into memory; pages that no pack has are zero.
    ///
    /// # Errors
    /// When the store cannot be read; damaged when the space is larger than 1 GiB or a frame is not
    /// what its digests say.
    pub async fn read_whole(&self, record: &SpaceRecord) -> Result<Vec<u8>> {
        if record.bytes.0 > MAX_WHOLE {
            return Err(damaged(format!(
                "space {} has {} bytes, more than the {MAX_WHOLE} that are possible",
                record.name, record.bytes
            )));
        }
        let map = self.map(&record.name).await?;
        let mut content = vec![0; record.pages().as_usize() * PAGE_SIZE];
        let mut runs = std::pin::pin!(self.read(&map));
        while let Some(batch) = runs.next().await {
            for (pages, bytes) in batch? {
                let range = pages.bytes();
                content[as_index(range.start)..as_index(range.end)].copy_from_slice(&bytes);
            }
        }
        content.truncate(record.bytes.as_usize());
        Ok(content)
    }

    fn batches(&self, frames: Vec<FrameRead>) -> Result<Vec<Batch>> {
        let mut found = Vec::new();
        for read in frames {
            let entry = self.0.places.frame(read.pack, read.frame)?;
            found.push((read, entry));
        }
        // Frames of an index have their numbers in the order in which they were found.
        found.sort_by_key(|(read, entry)| (read.pack, entry.offset));
        let mut batches: Vec<Batch> = Vec::new();
        for (read, entry) in found {
            let pack = read.pack;
            let (range, raw_bytes) = (entry.byte_range(), entry.raw_len() as u64);
            match batches.last_mut() {
                Some(last) if last.takes(pack, range.start, range.end) => {
                    last.end = range.end;
                    last.raw_bytes += raw_bytes;
                    last.frames.push((read, entry));
                }
                _ => batches.push(Batch {
                    pack,
                    start: range.start,
                    end: range.end,
                    frames: vec![(read, entry)],
                    raw_bytes,
                }),
            }
        }
        Ok(batches)
    }

    async fn load(
        self,
        mut batch: Batch,
        is_wanted: Arc<impl Fn(&FrameRead) -> bool>,
    ) -> Result<Vec<Run>> {
        batch.frames.retain(|(read, _)| is_wanted(read));
        let (Some((_, first)), Some((_, last))) = (batch.frames.first(), batch.frames.last())
        else {
            return Ok(Vec::new());
        };
        batch.start = first.byte_range().start;
        batch.end = last.byte_range().end;
        let (bytes, about) = self.read_range(batch.pack, batch.start, batch.end).await?;
        let decode = move || decode(&batch, &bytes);
        tokio::task::spawn_blocking(decode)
            .await
            .context("internal error: decoding panicked")?
            .context(about)
    }
}

fn decode(batch: &Batch, bytes: &[u8]) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    for (read, entry) in &batch.frames {
        let range = entry.byte_range();
        let stored = &bytes[as_index(range.start - batch.start)..as_index(range.end - batch.start)];
        let content = Bytes::from(
            entry
                .decode(stored)
                .with_context(|| format!("frame {} at byte {}", read.frame, range.start))?,
        );
        for part in &read.parts {
            let start = usize::from(part.first_slot.0) * PAGE_SIZE;
            let end = start + part.pages.byte_len().as_usize();
            anyhow::ensure!(
                end <= content.len(),
                "frame {} is shorter than its index says",
                read.frame
            );
            runs.push((part.pages, content.slice(start..end)));
        }
    }
    Ok(runs)
}

impl Batch {
    fn takes(&self, pack: PackNo, start: u64, end: u64) -> bool {
        let near = (self.end..=self.end + GAP_BYTES).contains(&start);
        self.pack == pack
            && near
            && end - self.start <= BATCH_BYTES
            && self.raw_bytes < BATCH_RAW_BYTES
    }
}
