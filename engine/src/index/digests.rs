//! The digests of the pages that a checkpoint holds, by its index: from the trailers of the packs
//! that still have pages of it, and no others.

use super::{LineageIndex, READS};
use crate::lineage;
use anyhow::Result;
use checkpoint_format::{
    CheckpointId, DigestTable, Manifest, PackIndex, PackPlace, PackRecord, PageCount, PageRange,
    SpaceName, SpaceRecord,
};
use futures::future::BoxFuture;
use futures::{StreamExt, TryStreamExt};
use std::collections::{BTreeMap, BTreeSet};
use vm::error::damaged;

/// Pages of which the index is in memory at once.
const WINDOW: PageCount = PageCount(1 << 20);

/// A pack and the checkpoint that it is of.
type PackOf = (CheckpointId, PackRecord);

impl LineageIndex {
    /// The checkpoints that a restore reads anything of.
    pub(crate) fn checkpoints(&self) -> BTreeSet<CheckpointId> {
        let segments = self.segments.iter().map(|segment| segment.id);
        segments.chain(self.packs().map(|place| place.checkpoint)).collect()
    }

    /// The packs that pages are in, and perhaps some of which newer ones hide all pages.
    fn packs(&self) -> impl Iterator<Item = &PackPlace> {
        self.segments.iter().flat_map(|segment| segment.directory.packs())
    }

    /// What the checkpoint of this manifest holds, page by page. `tables` names the spaces wanted,
    /// each with the table that is filled.
    ///
    /// The trailers of these packs, oldest first, give each page that the index has in a pack its
    /// newest digest: whatever recorded it later would be in the index, too. But they may also have
    /// pages that later were zero, were cut off, or belonged to another space of the same name;
    /// of these the index says so.
    pub(crate) async fn digests(
        &self,
        manifest: &Manifest,
        tables: &mut [(SpaceName, DigestTable)],
    ) -> Result<()> {
        self.apply_trailers(tables).await?;
        for (space, table) in tables {
            let size = manifest.space(space).map_or(PageCount(0), SpaceRecord::pages);
            table.truncate(size);
            for pages in size.all().chunks(WINDOW) {
                self.correct(space, pages, table).await?;
            }
        }
        Ok(())
    }

    async fn apply_trailers(&self, tables: &mut [(SpaceName, DigestTable)]) -> Result<()> {
        let records = self.pack_records().await?;
        let mut reads: Vec<BoxFuture<'_, Result<PackIndex>>> = Vec::new();
        for (id, pack) in &records {
            reads.push(Box::pin(lineage::index(&self.repository, &self.vm, *id, pack)));
        }
        // A few at a time: all together may be larger than the VM.
        let mut trailers = futures::stream::iter(reads).buffered(READS);
        while let Some(index) = trailers.try_next().await? {
            tables.iter_mut().for_each(|(space, table)| table.apply_pack(space, &index));
        }
        Ok(())
    }

    /// Those of [`packs`](Self::packs), in the order in which their records count.
    async fn pack_records(&self) -> Result<Vec<PackOf>> {
        let mut wanted: BTreeMap<CheckpointId, BTreeSet<&str>> = BTreeMap::new();
        for place in self.packs() {
            wanted.entry(place.checkpoint).or_default().insert(place.name.as_str());
        }
        let mut reads: Vec<BoxFuture<'_, Result<Vec<PackOf>>>> = Vec::new();
        for (id, names) in wanted {
            reads.push(Box::pin(self.records_of(id, names)));
        }
        let records: Vec<_> = futures::stream::iter(reads).buffered(READS).try_collect().await?;
        Ok(records.into_iter().flatten().collect())
    }

    async fn records_of(&self, id: CheckpointId, names: BTreeSet<&str>) -> Result<Vec<PackOf>> {
        let manifest = lineage::manifest_file(&self.repository, &self.vm, id).await?.manifest;
        let mut packs = manifest.packs;
        packs.retain(|pack| names.contains(pack.name.as_str()));
        if packs.len() < names.len() {
            return Err(damaged(format!(
                "the index names packs of {}@{id} that its manifest does not have",
                self.vm
            )));
        }
        Ok(packs.into_iter().map(|pack| (id, pack)).collect())
    }

    /// Pages that the index has as zeros hold zeros; of those that it does not have nothing is
    /// known.
    async fn correct(
        &self,
        space: &SpaceName,
        pages: PageRange,
        table: &mut DigestTable,
    ) -> Result<()> {
        let blocks = self.blocks(space, pages, true).await?;
        let mut at = pages.start;
        self.each(&blocks, pages, |run, pack| {
            table.forget_all(PageRange::new(at, run.pages.start));
            if pack.is_none() {
                table.set_zero(run.pages);
            }
            at = run.pages.end;
            Ok(())
        })?;
        table.forget_all(PageRange::new(at, pages.end));
        Ok(())
    }
}
