//! The content of a checkpoint: which frame of which pack of its lineage has each page, and reading
//! just those frames.

use crate::lineage::Lineage;
use crate::progress::Progress;
use anyhow::{Context, Result};
use bytes::Bytes;
use checkpoint_format::{
    CheckpointId, CheckpointIdentity, FrameEntry, FrameNo, FrameRead, LocatedRun, Manifest,
    PAGE_SIZE, PackIndex, PackName, PackNo, PageMap, PageRange, SpaceName, SpaceRecord, VmName,
    as_index,
};
use checkpoint_store::Repository;
use futures::future::BoxFuture;
use futures::{Stream, StreamExt};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::Mutex;
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

/// A checkpoint whose pages can be read: its manifests and pack indexes are in memory, the pages
/// are in the store. Clones share them.
#[derive(Clone)]
pub struct Source(Arc<Inner>);

struct Inner {
    repository: Repository,
    vm: VmName,
    packs: Vec<(CheckpointId, PackName)>,
    indexes: Vec<PackIndex>,
    manifests: Vec<Manifest>,
    identity: CheckpointIdentity,
    bytes_read: AtomicU64,
    progress: Arc<dyn Progress>,
    /// Maps that [`Source::locate`] has made.
    maps: Mutex<HashMap<SpaceName, Arc<PageMap>>>,
}

/// Frames of one pack that are read together.
struct Batch {
    pack: usize,
    start: u64,
    end: u64,
    frames: Vec<FrameRead>,
    raw_bytes: u64,
}

impl Source {
    /// Reads the lineage's manifests and pack indexes. `progress` shows how far the content is
    /// read.
    ///
    /// # Errors
    /// When the store cannot be read; damaged when the lineage is not complete and sound.
    pub async fn open(
        repository: &Repository,
        vm: &VmName,
        id: CheckpointId,
        progress: Arc<dyn Progress>,
    ) -> Result<Self> {
        let lineage = Lineage::read(repository, vm, id).await?;
        let indexes = lineage.indexes(repository).await?;
        let packs = lineage.packs().into_iter().map(|(id, pack)| (id, pack.name.clone())).collect();
        let trailers =
            lineage.packs().iter().map(|(_, pack)| u64::from(pack.info.trailer_len)).sum();
        let identity =
            *lineage.identities.last().context("a lineage without its newest checkpoint")?;
        Ok(Self(Arc::new(Inner {
            repository: repository.clone(),
            vm: vm.clone(),
            packs,
            indexes,
            manifests: lineage.manifests,
            identity,
            bytes_read: AtomicU64::new(trailers),
            progress,
            maps: Mutex::default(),
        })))
    }

    pub(crate) fn identity(&self) -> CheckpointIdentity {
        self.0.identity
    }

    /// Of the checkpoint that is restored.
    ///
    /// # Panics
    /// Never: [`Self::open`] refuses a lineage without its newest checkpoint.
    pub fn manifest(&self) -> &Manifest {
        self.0.manifests.last().expect("a lineage holds the checkpoint that it was read for")
    }

    pub(crate) fn repository(&self) -> &Repository {
        &self.0.repository
    }

    pub(crate) fn progress(&self) -> &Arc<dyn Progress> {
        &self.0.progress
    }

    pub(crate) fn bytes_read(&self) -> u64 {
        self.0.bytes_read.load(Ordering::Relaxed)
    }

    /// Where the newest content of each page of a space is. A space that shrank or grew over the
    /// lineage is followed through its sizes.
    ///
    /// # Errors
    /// Damaged when a pack does not fit into the space; failed when the checkpoint has no such
    /// space.
    pub fn map(&self, name: &SpaceName) -> Result<PageMap> {
        let record = self
            .manifest()
            .space(name)
            .with_context(|| format!("the checkpoint has no space {name}"))?;
        let mut map: Option<PageMap> = None;
        let mut next = 0;
        for manifest in &self.0.manifests {
            let first = next;
            next += manifest.packs.len();
            let Some(then) = manifest.space(name) else {
                // A disk of this name that comes later is another one.
                map = None;
                continue;
            };
            let map = map.get_or_insert_with(|| PageMap::new(name.clone(), then.pages()));
            map.resize(then.pages());
            for number in first..next {
                let pack =
                    PackNo(u32::try_from(number).context("a lineage of more than 2^32 packs")?);
                map.apply_pack(pack, &self.0.indexes[number])?;
            }
        }
        let mut map = map.unwrap_or_else(|| PageMap::new(name.clone(), record.pages()));
        map.resize(record.pages());
        Ok(map)
    }

    /// Where these pages of a space are, in order, in runs; pages beyond the space are left out.
    pub(super) async fn locate(
        &self,
        name: &SpaceName,
        pages: PageRange,
    ) -> Result<Vec<LocatedRun>> {
        Ok(self.kept_map(name).await?.runs_in(pages).collect())
    }

    /// A map that is asked page by page is made once.
    pub(super) async fn kept_map(&self, name: &SpaceName) -> Result<Arc<PageMap>> {
        let mut maps = self.0.maps.lock().await;
        if let Some(map) = maps.get(name) {
            return Ok(Arc::clone(map));
        }
        let (source, wanted) = (self.clone(), name.clone());
        let map = tokio::task::spawn_blocking(move || source.map(&wanted))
            .await
            .context("internal error: making a page map panicked")??;
        let map = Arc::new(map);
        maps.insert(name.clone(), Arc::clone(&map));
        Ok(map)
    }

    /// The content of all pages of one frame, slot by slot, by one read.
    pub(super) async fn read_frame(&self, pack: PackNo, frame: FrameNo) -> Result<Bytes> {
        let entry = *self.frame_entry(pack, frame)?;
        let range = entry.byte_range();
        let (bytes, about) = self.read_range(pack.as_usize(), range.start, range.end).await?;
        let decode = move || entry.decode(&bytes).map(Bytes::from);
        tokio::task::spawn_blocking(decode)
            .await
            .context("internal error: decoding panicked")?
            .with_context(|| format!("frame {frame} at byte {}", range.start))
            .context(about)
    }

    fn frame_entry(&self, pack: PackNo, frame: FrameNo) -> Result<&FrameEntry> {
        let entry = self.0.indexes.get(pack.as_usize()).and_then(|index| index.frame(frame));
        entry.with_context(|| format!("pack {pack} of the lineage has no frame {frame}"))
    }

    /// Bytes of a pack, and what they are for an error.
    async fn read_range(&self, pack: usize, start: u64, end: u64) -> Result<(Bytes, String)> {
        let (id, name) = &self.0.packs[pack];
        let about = format!("reading {}@{id}/{name}", self.0.vm);
        let repository = &self.0.repository;
        let read = repository.read_pack_range(&self.0.vm, *id, name.as_str(), start, end - start);
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
        let map = self.map(&record.name)?;
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
        let mut batches: Vec<Batch> = Vec::new();
        for read in frames {
            let pack = read.pack.as_usize();
            let entry = self.frame_entry(read.pack, read.frame)?;
            let (range, raw_bytes) = (entry.byte_range(), entry.raw_len() as u64);
            match batches.last_mut() {
                Some(last) if last.takes(pack, range.start, range.end) => {
                    last.end = range.end;
                    last.raw_bytes += raw_bytes;
                    last.frames.push(read);
                }
                _ => batches.push(Batch {
                    pack,
                    start: range.start,
                    end: range.end,
                    frames: vec![read],
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
        batch.frames.retain(|read| is_wanted(read));
        let (Some(first), Some(last)) = (batch.frames.first(), batch.frames.last()) else {
            return Ok(Vec::new());
        };
        batch.start = self.frame_entry(first.pack, first.frame)?.byte_range().start;
        batch.end = self.frame_entry(last.pack, last.frame)?.byte_range().end;
        let (bytes, about) = self.read_range(batch.pack, batch.start, batch.end).await?;
        let source = self.clone();
        let decode = move || source.decode(&batch, &bytes);
        tokio::task::spawn_blocking(decode)
            .await
            .context("internal error: decoding panicked")?
            .context(about)
    }

    fn decode(&self, batch: &Batch, bytes: &[u8]) -> Result<Vec<Run>> {
        let mut runs = Vec::new();
        for read in &batch.frames {
            let entry = self.0.indexes[batch.pack]
                .frame(read.frame)
                .context("a frame is missing from its index")?;
            let range = entry.byte_range();
            let stored =
                &bytes[as_index(range.start - batch.start)..as_index(range.end - batch.start)];
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
}

impl Batch {
    fn takes(&self, pack: usize, start: u64, end: u64) -> bool {
        let near = (self.end..=self.end + GAP_BYTES).contains(&start);
        self.pack == pack
            && near
            && end - self.start <= BATCH_BYTES
            && self.raw_bytes < BATCH_RAW_BYTES
    }
}
