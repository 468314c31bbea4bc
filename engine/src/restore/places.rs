//! Where the pages of a checkpoint are: its index says it; of a checkpoint without one, the
//! trailers of all packs of its lineage do.

use crate::index::LineageIndex;
use crate::lineage::{Lineage, ManifestFile};
use anyhow::{Context, Result};
use checkpoint_format::{
    ByteOffset, FrameEntry, FrameNo, LocatedRun, Manifest, PackIndex, PackNo, PackPlace,
    PageLocation, PageMap, PageRange, Placed, PlacedRun, SpaceName, SpaceRecord, VmName,
};
use checkpoint_store::Repository;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(super) struct Places {
    known: Known,
    frames: Mutex<Frames>,
}

enum Known {
    Index(LineageIndex),
    Trailers(Arc<Trailers>),
}

/// Of the lineage, oldest first.
struct Trailers {
    manifests: Vec<Manifest>,
    indexes: Vec<PackIndex>,
    /// Maps of whole spaces, once made.
    maps: tokio::sync::Mutex<HashMap<SpaceName, Arc<PageMap>>>,
}

impl Places {
    /// `file`: the checkpoint's manifest.
    pub(super) async fn open(
        repository: &Repository,
        vm: &VmName,
        file: &ManifestFile,
    ) -> Result<Self> {
        if let Some(record) = &file.manifest.index {
            let index = LineageIndex::open(repository, vm, file, record).await?;
            return Ok(Self { known: Known::Index(index), frames: Mutex::default() });
        }
        let lineage = Lineage::read(repository, vm, file.manifest.id).await?;
        let indexes = lineage.indexes(repository).await?;
        let mut frames = Frames::default();
        for ((checkpoint, pack), index) in lineage.packs().into_iter().zip(&indexes) {
            frames.add_pack(PackPlace { checkpoint, name: pack.name.clone() }, index)?;
        }
        let manifests = lineage.files.into_iter().map(|file| file.manifest).collect();
        let trailers = Trailers { manifests, indexes, maps: tokio::sync::Mutex::default() };
        Ok(Self { known: Known::Trailers(Arc::new(trailers)), frames: Mutex::new(frames) })
    }

    /// Bytes that were read to know it.
    pub(super) fn bytes_read(&self) -> u64 {
        match &self.known {
            Known::Index(index) => index.bytes_read(),
            Known::Trailers(trailers) => trailers.bytes_read(),
        }
    }

    /// Where each page of a space is.
    pub(super) async fn map(&self, space: &SpaceRecord) -> Result<PageMap> {
        match &self.known {
            Known::Index(index) => {
                self.indexed(index, space, space.pages().all(), Keep::Nothing).await
            }
            Known::Trailers(trailers) => Ok(PageMap::clone(&*trailers.map(space).await?)),
        }
    }

    /// Where these pages of a space are.
    pub(super) async fn locate(
        &self,
        space: &SpaceRecord,
        pages: PageRange,
    ) -> Result<Vec<LocatedRun>> {
        let pages = pages.clip(space.pages());
        match &self.known {
            Known::Index(index) => {
                let map = self.indexed(index, space, pages, Keep::Blocks).await?;
                Ok(map.runs_in(pages).collect())
            }
            Known::Trailers(trailers) => Ok(trailers.map(space).await?.runs_in(pages).collect()),
        }
    }

    async fn indexed(
        &self,
        index: &LineageIndex,
        space: &SpaceRecord,
        pages: PageRange,
        keep: Keep,
    ) -> Result<PageMap> {
        let blocks = index.blocks(&space.name, pages, keep == Keep::Blocks).await?;
        let mut map = PageMap::new(space.name.clone(), space.pages());
        let mut frames = self.frames();
        index.each(&blocks, pages, |run, pack| {
            map.record(&frames.located(run, pack)?);
            Ok(())
        })?;
        Ok(map)
    }

    /// All that is needed to read a frame: its pack's place, and the frame's in the pack.
    pub(super) fn frame(&self, pack: PackNo, frame: FrameNo) -> Result<FrameEntry> {
        let frames = self.frames();
        let entry = frames.entries.get(pack.as_usize()).and_then(|pack| pack.get(frame.as_usize()));
        entry.copied().with_context(|| format!("pack {pack} of the lineage has no frame {frame}"))
    }

    pub(super) fn pack(&self, pack: PackNo) -> Result<PackPlace> {
        let frames = self.frames();
        let place = frames.packs.get(pack.as_usize());
        place.cloned().with_context(|| format!("the lineage has no pack {pack}"))
    }

    fn frames(&self) -> MutexGuard<'_, Frames> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether blocks of the index are kept for the next question.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    Blocks,
    Nothing,
}

impl Trailers {
    fn bytes_read(&self) -> u64 {
        let packs = self.manifests.iter().flat_map(|manifest| &manifest.packs);
        packs.map(|pack| u64::from(pack.info.trailer_len)).sum()
    }

    /// The map of a space is made once.
    async fn map(self: &Arc<Self>, space: &SpaceRecord) -> Result<Arc<PageMap>> {
        let mut maps = self.maps.lock().await;
        if let Some(map) = maps.get(&space.name) {
            return Ok(Arc::clone(map));
        }
        let (trailers, wanted) = (Arc::clone(self), space.clone());
        let map = tokio::task::spawn_blocking(move || trailers.replay(&wanted))
            .await
            .context("internal error: making a page map panicked")??;
        let map = Arc::new(map);
        maps.insert(space.name.clone(), Arc::clone(&map));
        Ok(map)
    }

    /// A space that shrank or grew over the lineage is followed through its sizes.
    fn replay(&self, space: &SpaceRecord) -> Result<PageMap> {
        let name = &space.name;
        let mut map: Option<PageMap> = None;
        let mut next = 0;
        for manifest in &self.manifests {
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
                map.apply_pack(pack, &self.indexes[number])?;
            }
        }
        let mut map = map.unwrap_or_else(|| PageMap::new(name.clone(), space.pages()));
        map.resize(space.pages());
        Ok(map)
    }
}

/// Packs and frames under the numbers that a page map has for them.
#[derive(Default)]
struct Frames {
    packs: Vec<PackPlace>,
    entries: Vec<Vec<FrameEntry>>,
    pack_numbers: HashMap<PackPlace, PackNo>,
    /// Of the frames of an index, by where they begin.
    frame_numbers: HashMap<(PackNo, ByteOffset), FrameNo>,
}

impl Frames {
    /// All frames of a pack, in the order of its trailer.
    fn add_pack(&mut self, place: PackPlace, index: &PackIndex) -> Result<()> {
        let number = self.number_of(&place)?;
        self.entries[number.as_usize()] = index.frames().to_vec();
        Ok(())
    }

    fn number_of(&mut self, place: &PackPlace) -> Result<PackNo> {
        if let Some(number) = self.pack_numbers.get(place) {
            return Ok(*number);
        }
        let number =
            u32::try_from(self.packs.len()).context("a lineage of more than 2^32 packs")?;
        self.packs.push(place.clone());
        self.entries.push(Vec::new());
        self.pack_numbers.insert(place.clone(), PackNo(number));
        Ok(PackNo(number))
    }

    fn located(&mut self, run: &PlacedRun, pack: Option<&PackPlace>) -> Result<LocatedRun> {
        let location = match run.content {
            Placed::Unknown => PageLocation::Unknown,
            Placed::Zero => PageLocation::Zero,
            Placed::Data { frame: entry, first_slot: slot, .. } => {
                let pack = self.number_of(pack.context("a run of data without a pack")?)?;
                let frame = self.frame_number(pack, entry)?;
                PageLocation::Data { pack, frame, slot }
            }
        };
        Ok(LocatedRun { pages: run.pages, location })
    }

    fn frame_number(&mut self, pack: PackNo, entry: FrameEntry) -> Result<FrameNo> {
        let entries = &mut self.entries[pack.as_usize()];
        let known = self.frame_numbers.get(&(pack, entry.offset)).copied();
        if let Some(known) = known.filter(|known| entries[known.as_usize()] == entry) {
            return Ok(known);
        }
        // Where two segments contradict one another, each page is compared with what its own says.
        let number = FrameNo(u32::try_from(entries.len()).context("a pack of 2^32 frames")?);
        entries.push(entry);
        self.frame_numbers.insert((pack, entry.offset), number);
        Ok(number)
    }
}

#[cfg(test)]
mod test;
