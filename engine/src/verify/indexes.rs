//! The indexes of checkpoints: whether each segment is whole, and says what the trailers of the
//! packs say.

use crate::index::{place, read_segment};
use crate::lineage::{self, ManifestFile};
use anyhow::{Context, Result};
use bytes::Bytes;
use checkpoint_format::{
    CheckpointId, EncodedSegment, IndexRecord, Manifest, PackPlace, Records, Segment,
    SegmentRecord, first_difference,
};
use checkpoint_store::Repository;
use std::collections::{BTreeMap, BTreeSet};
use vm::error::damaged;

/// Of the checkpoints that are verified.
pub(super) struct Indexes<'a> {
    repository: &'a Repository,
    files: BTreeMap<CheckpointId, &'a ManifestFile>,
}

impl<'a> Indexes<'a> {
    pub(super) fn new(repository: &'a Repository, files: &'a [ManifestFile]) -> Self {
        let files = files.iter().map(|file| (file.manifest.id, file)).collect();
        Self { repository, files }
    }

    /// The checkpoints whose segments a restore of `wanted` reads; of all, if none is named.
    pub(super) fn used_by(&self, wanted: Option<CheckpointId>) -> BTreeSet<CheckpointId> {
        let Some(wanted) = wanted else { return self.files.keys().copied().collect() };
        let index = self.files.get(&wanted).and_then(|file| file.manifest.index.as_ref());
        index.iter().flat_map(|index| &index.segments).map(|segment| segment.id).collect()
    }

    /// Returns how many bytes were read back.
    pub(super) async fn check(&self, file: &ManifestFile) -> Result<u64> {
        let manifest = &file.manifest;
        let Some(index) = &manifest.index else { return Ok(0) };
        for segment in &index.segments {
            self.check_place(file, segment)?;
        }
        let own = index.own().context("an index without a segment of its own")?;
        let len = self.repository.manifest_len(&manifest.vm, manifest.id).await?;
        let expected = file.head_len + own.info.len().0;
        if len != expected {
            return Err(damaged(format!("its file has {len} bytes instead of {expected}")));
        }
        let segment = read_segment(self.repository, &manifest.vm, own, file.head_len).await?;
        (0..segment.directory().blocks().len())
            .try_for_each(|number| segment.block(number).map(drop))?;
        self.check_content(manifest, own, segment).await?;
        Ok(own.info.len().0)
    }

    /// Whether the segment that a manifest names is where it says, with the checksum that it says.
    fn check_place(&self, file: &ManifestFile, named: &SegmentRecord) -> Result<()> {
        let holder = self.files.get(&named.id);
        let own = holder.and_then(|file| file.manifest.index.as_ref()).and_then(IndexRecord::own);
        let is_there = own.zip(holder).is_some_and(|(own, holder)| {
            let at = place(named, file.head_len).at;
            (own.first, own.info, holder.head_len) == (named.first, named.info, at)
        });
        let (vm, id) = (&file.manifest.vm, named.id);
        if is_there {
            Ok(())
        } else {
            Err(damaged(format!(
                "it names a segment in the manifest of {vm}@{id} that is not there"
            )))
        }
    }

    /// Whether the segment says what its checkpoints recorded.
    async fn check_content(
        &self,
        manifest: &Manifest,
        own: &SegmentRecord,
        segment: Segment<Bytes>,
    ) -> Result<()> {
        // What cannot be read is noted with its pack.
        let Some(records) = self.records(manifest, own.first).await? else { return Ok(()) };
        let spaces = manifest.space_sizes();
        let compare = move || -> Result<_> {
            let EncodedSegment { bytes, info } = records.encode().context("encoding it again")?;
            Ok(first_difference(&Segment::new(bytes, &info)?, &segment, &spaces)?)
        };
        let differ = tokio::task::spawn_blocking(compare)
            .await
            .context("internal error: comparing an index panicked")??;
        match differ {
            None => Ok(()),
            Some((space, pages)) => Err(damaged(format!(
                "of pages {} to {} of {space} it does not say what the trailers of the packs say",
                pages.start.0,
                pages.end.0 - 1
            ))),
        }
    }

    /// What the checkpoints from `first` to that of `last` recorded, by the trailers of their
    /// packs; `None` if one of these cannot be read.
    async fn records(&self, last: &Manifest, first: CheckpointId) -> Result<Option<Records>> {
        let mut covered = vec![last];
        while let Some(oldest) = covered.last().filter(|oldest| oldest.id > first) {
            covered.push(self.parent(oldest)?.context("the lineage does not have its beginning")?);
        }
        let parent = covered.last().map(|oldest| self.parent(oldest)).transpose()?.flatten();
        let mut records = Records::new(parent.map(Manifest::space_sizes).as_deref());
        for manifest in covered.iter().rev() {
            records.begin_checkpoint(&manifest.space_sizes());
            for pack in &manifest.packs {
                let (vm, id) = (&manifest.vm, manifest.id);
                let Ok(index) = lineage::index(self.repository, vm, id, pack).await else {
                    return Ok(None);
                };
                let place = PackPlace { checkpoint: id, name: pack.name.clone() };
                records.apply_pack(place, &index)?;
            }
        }
        Ok(Some(records))
    }

    fn parent(&self, manifest: &Manifest) -> Result<Option<&'a Manifest>> {
        let Some(parent) = manifest.parent else { return Ok(None) };
        match self.files.get(&parent) {
            Some(file) => Ok(Some(&file.manifest)),
            None => Err(damaged(format!(
                "the store does not have {}@{parent}, on which {} builds",
                manifest.vm, manifest.id
            ))),
        }
    }
}

#[cfg(test)]
mod test;
