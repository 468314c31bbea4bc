//! The packs of a failed checkpoint are used by the next one.
//!
//! The first checkpoint of a large disk takes hours and may fail late: the store becomes
//! unreachable, or the guest overwrites more than the fleecing overlays have room for. The packs
//! that the store has acknowledged until then stay in the partial directory. The helper's next
//! checkpoint renames that directory, and the packs are its first ones: later records override
//! theirs, as within any checkpoint. Nothing else of the earlier try is needed: the indexes of the
//! packs list what they hold, and reading them again shows that they are there.
//!
//! A record of an earlier try is right only if this one has compared its page: then the page is
//! equal, or it is stored again. What the earlier try claimed was restored, so it is dirty again.
//! Beyond that, pages of a disk that would not be read otherwise are read because they are in a
//! carried pack ([`Resumed::window`]), and a commit with carried memory that was not offered is
//! refused ([`Delta::unconfirmed`]).
//!
//! Digests of memory go into the tables, where there is room for all of them. Those of disks are
//! read part by part as the disk is, so that the size of a disk costs nothing.

use super::delta::Delta;
use super::window::Window;
use crate::pack::NumberedPack;
use anyhow::{Context, Result};
use checkpoint_format::{
    ByteLen, CheckpointId, MAX_PACKS, PackIndex, PackRecord, PageRange, SpaceKind, SpaceName,
};
use checkpoint_store::{KeptPartial, PartialCheckpoint, StoreError};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use tokio::sync::Mutex;

/// Less than this is stored again as quickly as it is compared.
pub(super) const WORTH_KEEPING: ByteLen = ByteLen(16 << 20);

/// A manifest has to hold them and as many more: 768 GiB.
pub(super) const MOST_KEPT: usize = MAX_PACKS / 2;

/// Packs of failed tries, in the store and in no checkpoint.
pub(super) struct Carried {
    pub kept: KeptPartial,
    /// By number, ascending.
    pub packs: Vec<NumberedPack>,
    /// Of the checkpoint that failed.
    pub parent: Option<CheckpointId>,
}

impl Carried {
    pub(super) fn bytes(&self) -> ByteLen {
        bytes(&self.packs)
    }
}

pub(super) fn bytes(packs: &[NumberedPack]) -> ByteLen {
    ByteLen(packs.iter().map(|pack| pack.record.info.len.0).sum())
}

/// Packs of earlier tries in the checkpoint under way.
pub(super) struct Resumed {
    partial: Arc<PartialCheckpoint>,
    packs: Vec<CarriedPack>,
    /// One index is in memory at a time.
    reading: Mutex<()>,
}

struct CarriedPack {
    pack: NumberedPack,
    /// The part of each disk that it has records of.
    disks: Vec<(SpaceName, PageRange)>,
}

impl Resumed {
    pub(super) fn none(partial: Arc<PartialCheckpoint>) -> Self {
        Self { partial, packs: Vec::new(), reading: Mutex::default() }
    }

    /// Looks up which of the packs can be part of this checkpoint, and removes whatever else its
    /// directory holds.
    ///
    /// Newest first, since of two records of a page the newer counts. A pack is dropped if it is
    /// not there as it was stored, if it holds what this VM does not have, or if less than half of
    /// its pages are its own: the rest would be garbage in the store for as long as the checkpoint
    /// is there.
    pub(super) async fn of_packs(
        partial: Arc<PartialCheckpoint>,
        packs: Vec<NumberedPack>,
        delta: &mut Delta,
    ) -> Result<Self> {
        let files = partial.files().await.context("listing what an earlier try stored")?;
        let lengths: HashMap<&str, u64> =
            files.iter().map(|file| (file.name.as_str(), file.len)).collect();
        let mut this = Self::none(partial);
        for pack in packs.into_iter().rev() {
            let name = &pack.record.name;
            if lengths.get(name.as_str()) != Some(&pack.record.info.len.0) {
                tracing::warn!(%name, "a pack of an earlier try is not there any more");
                continue;
            }
            let Some(index) = this.index(&pack.record).await? else { continue };
            if !delta.could_hold(&index) {
                tracing::debug!(%name, "a pack of an earlier try holds what cannot be carried");
                continue;
            }
            let own = delta.uncarried(&index).0;
            if own * 2 < pack.record.info.data_pages.0 {
                tracing::debug!(%name, own, "most of a pack of an earlier try is outdated");
                continue;
            }
            delta.carry(&index);
            this.packs.push(CarriedPack { pack, disks: disk_parts(&index) });
        }
        this.packs.reverse();
        let wanted: HashSet<&str> =
            this.packs.iter().map(|carried| carried.pack.record.name.as_str()).collect();
        for file in files.iter().filter(|file| !wanted.contains(file.name.as_str())) {
            this.partial
                .remove_file(&file.name)
                .await
                .context("removing what an earlier try left")?;
        }
        tracing::info!(
            packs = this.packs.len(),
            bytes = this.bytes().0,
            "what an earlier try stored is part of this checkpoint"
        );
        Ok(this)
    }

    /// None: it is damaged or gone, so it is not carried.
    async fn index(&self, pack: &PackRecord) -> Result<Option<PackIndex>> {
        let range = pack.info.footer().trailer_range();
        let trailer = match self
            .partial
            .read_pack_range(&pack.name, range.start, range.end - range.start)
            .await
        {
            Ok(trailer) => trailer,
            Err(
                error @ (StoreError::NotFound { .. }
                | StoreError::PastEnd { .. }
                | StoreError::Corrupt { .. }),
            ) => {
                tracing::warn!(%error, "a pack of an earlier try cannot be read");
                return Ok(None);
            }
            Err(error) => {
                return Err(error).with_context(|| format!("reading the index of {}", pack.name));
            }
        };
        let index = pack.info.parse_index(&trailer);
        Ok(index
            .inspect_err(|error| tracing::warn!(%error, "a pack of an earlier try is damaged"))
            .ok())
    }

    /// What the packs hold of a part of a disk; `None`: nothing.
    pub(super) async fn window(
        &self,
        space: &SpaceName,
        pages: PageRange,
    ) -> Result<Option<Window>> {
        let meets = |part: &(SpaceName, PageRange)| {
            part.0 == *space && part.1.start < pages.end && pages.start < part.1.end
        };
        let mut window = None;
        for carried in self.packs.iter().filter(|carried| carried.disks.iter().any(meets)) {
            let _one = self.reading.lock().await;
            let index = self.index(&carried.pack.record).await?;
            let index = index.with_context(|| {
                format!("the pack {} of an earlier try is gone", carried.pack.record.name)
            })?;
            window.get_or_insert_with(|| Window::new(pages)).apply(space, &index);
        }
        Ok(window)
    }

    pub(super) fn packs(&self) -> Vec<NumberedPack> {
        self.packs.iter().map(|carried| carried.pack.clone()).collect()
    }

    /// The number of the last pack, or 0.
    pub(super) fn last(&self) -> u32 {
        self.packs.last().map_or(0, |carried| carried.pack.number)
    }

    pub(super) fn bytes(&self) -> ByteLen {
        bytes(&self.packs())
    }
}

fn disk_parts(index: &PackIndex) -> Vec<(SpaceName, PageRange)> {
    let disks = index.spaces().iter().filter(|space| space.kind() == SpaceKind::Disk);
    let part = |space: &SpaceName| {
        let start = index.runs_of(space).map(|run| run.pages.start).min()?;
        let end = index.runs_of(space).map(|run| run.pages.end).max()?;
        Some((space.clone(), PageRange::new(start, end)))
    };
    disks.filter_map(part).collect()
}

#[cfg(test)]
mod test;
