//! Pages of a checkpoint as they are asked for, not all of them in the order of the packs: for
//! memory and disks that are in use before they have arrived.
//!
//! A page costs one ranged read of its frame. Frames are kept in memory up to a budget, so that the
//! neighbours of a page cost nothing; requests for a frame that is being read already wait for that
//! read.

use super::source::Source;
use crate::progress::Silent;
use crate::stores;
use anyhow::{Context, Result};
use bytes::Bytes;
use checkpoint_format::{
    ByteLen, CheckpointIdentity, FRAME_PAGES, FrameNo, LocatedRun, PAGE_SIZE, PackNo, PageCount,
    PageIndex, PageLocation, PageRange, Slot, SpaceName, VmName, as_index,
};
use futures::{StreamExt, TryStreamExt};
use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{OptionsBuilder, Weighter};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::hash::RandomState;
use std::sync::Arc;
use vm::error::damaged;

/// Frames of one request that are read at once.
const READS: usize = 4;
/// How far from a page the other pages of its frame are looked for, on either side. A frame's pages
/// ascend, and most frames have no gaps.
const NEIGHBOURHOOD: PageCount = PageCount(4 * FRAME_PAGES as u64);
/// One of them is as large as this, uncompressed.
const FRAME_BYTES: u64 = (FRAME_PAGES * PAGE_SIZE) as u64;

/// What pages hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros; nothing was read.
    Zero,
    /// The lineage says nothing of them: of a disk, look into the layer below.
    Unknown,
    /// These bytes.
    Data(Bytes),
}

/// Pages one after another and what they hold.
pub type Part = (PageRange, Content);

/// A checkpoint as the runtime directory names it, for a reader that is opened later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Origin {
    /// The store's URL.
    pub store: String,
    /// The VM whose checkpoint it is; a copy has another name.
    pub vm: VmName,
    /// The checkpoint: another of the same ID is another.
    pub checkpoint: CheckpointIdentity,
}

impl Origin {
    /// Opens the checkpoint; damaged if the store has another one of its ID.
    pub(super) async fn open(&self) -> Result<Source> {
        let repository = stores::open_existing(&self.store).await?;
        let id = self.checkpoint.id;
        let source = Source::open(&repository, &self.vm, id, Arc::new(Silent)).await?;
        if source.identity() == self.checkpoint {
            return Ok(source);
        }
        Err(damaged(format!(
            "checkpoint {id} in the store is not the one that the VM was restored from"
        )))
    }
}

/// Reads single pages of a checkpoint; any number of tasks may ask at once.
pub struct OnDemand {
    source: Source,
    frames: Frames,
}

type Frames = Cache<(PackNo, FrameNo), Bytes, Length, RandomState>;

#[derive(Clone)]
struct Length;

impl Weighter<(PackNo, FrameNo), Bytes> for Length {
    fn weight(&self, _: &(PackNo, FrameNo), content: &Bytes) -> u64 {
        content.len() as u64
    }
}

impl OnDemand {
    /// `budget`: what the kept frames may take, uncompressed.
    ///
    /// # Panics
    /// Never: the cache is given all that it needs.
    pub fn new(source: Source, budget: ByteLen) -> Self {
        let options = OptionsBuilder::new()
            .estimated_items_capacity(as_index(budget.0.div_ceil(FRAME_BYTES).max(1)))
            .weight_capacity(budget.0)
            // Each would have its share of the budget, and few tasks ask at once.
            .shards(1)
            .build()
            .expect("all that it needs is given");
        let lifecycle = DefaultLifecycle::default();
        let frames = Cache::with_options(options, Length, RandomState::new(), lifecycle);
        Self { source, frames }
    }

    /// The checkpoint that is read.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Where these pages of a space are, in order; pages beyond the space are left out. Data is
    /// given as its frame.
    ///
    /// # Errors
    /// When the checkpoint has no such space, or its index cannot be read.
    pub async fn locate(&self, space: &SpaceName, pages: PageRange) -> Result<Vec<LocatedRun>> {
        self.source.locate(space, pages).await
    }

    /// Where the data of these pages is, and of the other pages near them that the same frames
    /// have.
    ///
    /// # Errors
    /// As those of [`Self::locate`].
    pub async fn locate_frames(
        &self,
        space: &SpaceName,
        pages: PageRange,
    ) -> Result<Vec<LocatedRun>> {
        let mut runs = self.locate(space, neighbourhood(pages)).await?;
        let own = runs.iter().filter(|run| part_of(run, pages).is_some());
        let frames: HashSet<_> = own.filter_map(|run| frame_of(run.location)).collect();
        runs.retain(|run| frame_of(run.location).is_some_and(|frame| frames.contains(&frame)));
        Ok(runs)
    }

    /// Where one page is; one beyond the space is unknown.
    ///
    /// # Errors
    /// As those of [`Self::locate`].
    pub async fn location(&self, space: &SpaceName, page: PageIndex) -> Result<PageLocation> {
        let runs = self.locate(space, PageRange::single(page)).await?;
        Ok(runs.first().map_or(PageLocation::Unknown, |run| run.location))
    }

    /// The content of all pages of a frame, slot by slot: kept, or by one ranged read.
    ///
    /// # Errors
    /// When the store fails or the frame is damaged; who asks next makes another try.
    pub async fn read_frame(&self, pack: PackNo, frame: FrameNo) -> Result<Bytes> {
        let read = self.source.read_frame(pack, frame);
        self.frames.get_or_insert_async(&(pack, frame), read).await
    }

    /// What these pages hold, in order; pages beyond the space are left out.
    ///
    /// # Errors
    /// When the index or a frame cannot be read, or is damaged.
    pub async fn read(&self, space: &SpaceName, pages: PageRange) -> Result<Vec<Part>> {
        let runs = self.locate(space, pages).await?;
        let parts = runs.into_iter().map(|run| self.content(run));
        futures::stream::iter(parts).buffered(READS).try_collect().await
    }

    /// What one page holds, and then, if that was read from a frame, the other pages near it that
    /// this frame has: the first part is that of `page` alone.
    ///
    /// # Errors
    /// As those of [`Self::read`].
    pub async fn read_around(&self, space: &SpaceName, page: PageIndex) -> Result<Vec<Part>> {
        let single = PageRange::single(page);
        let near = neighbourhood(single);
        let runs = self.locate(space, near).await?;
        let Some(own) = runs.iter().find_map(|run| part_of(run, single)) else {
            return Ok(vec![(single, Content::Unknown)]);
        };
        let mut parts = vec![self.content(own).await?];
        for run in others_of_frame(&runs, own, near) {
            parts.push(self.content(run).await?);
        }
        Ok(parts)
    }

    async fn content(&self, run: LocatedRun) -> Result<Part> {
        let content = match run.location {
            PageLocation::Unknown => Content::Unknown,
            PageLocation::Zero => Content::Zero,
            PageLocation::Data { pack, frame, slot } => {
                let content = self.read_frame(pack, frame).await?;
                let start = usize::from(slot.0) * PAGE_SIZE;
                let end = start + run.pages.byte_len().as_usize();
                let about = || format!("frame {frame} is shorter than its index says");
                content.get(start..end).with_context(about)?;
                Content::Data(content.slice(start..end))
            }
        };
        Ok((run.pages, content))
    }
}

/// Where the other pages of these pages' frames are looked for.
fn neighbourhood(pages: PageRange) -> PageRange {
    let start = PageIndex(pages.start.0.saturating_sub(NEIGHBOURHOOD.0));
    PageRange::new(start, PageIndex(pages.end.0.saturating_add(NEIGHBOURHOOD.0)))
}

fn frame_of(location: PageLocation) -> Option<(PackNo, FrameNo)> {
    match location {
        PageLocation::Data { pack, frame, .. } => Some((pack, frame)),
        PageLocation::Unknown | PageLocation::Zero => None,
    }
}

/// What else the frame of `own` has of the pages in `near`; nothing if it is not in a frame.
fn others_of_frame(runs: &[LocatedRun], own: LocatedRun, near: PageRange) -> Vec<LocatedRun> {
    let Some(frame) = frame_of(own.location) else { return Vec::new() };
    let before = PageRange::new(near.start, own.pages.start);
    let after = PageRange::new(own.pages.end, near.end);
    let same = runs.iter().filter(|run| frame_of(run.location) == Some(frame));
    same.flat_map(|run| [part_of(run, before), part_of(run, after)]).flatten().collect()
}

/// What of a run lies in `pages`.
fn part_of(run: &LocatedRun, pages: PageRange) -> Option<LocatedRun> {
    let start = run.pages.start.max(pages.start);
    let part = PageRange::new(start, run.pages.end.min(pages.end));
    let skipped = start.0 - run.pages.start.0;
    let location = match run.location {
        PageLocation::Data { pack, frame, slot } if !part.is_empty() => {
            // A run of data has no more pages than a frame has slots.
            let slot = Slot(slot.0 + u8::try_from(skipped).unwrap_or(u8::MAX - slot.0));
            PageLocation::Data { pack, frame, slot }
        }
        other => other,
    };
    (!part.is_empty()).then_some(LocatedRun { pages: part, location })
}
