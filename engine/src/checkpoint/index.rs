//! The index of a new checkpoint: a segment of what it recorded, with the youngest segments before
//! it merged in when it is time.

use super::parent::Parent;
use crate::index::read_segment;
use crate::lineage::{Lineage, is_lost};
use crate::pack::NumberedPack;
use anyhow::{Context, Result};
use bytes::Bytes;
use checkpoint_format::{
    CheckpointId, EncodedSegment, IndexRecord, MAX_SEGMENT_LEN, Manifest, MergePolicy, PackPlace,
    PageCount, Records, Segment, SegmentRecord, SpaceName, VmName, merge_segments,
};
use checkpoint_store::{PartialCheckpoint, Repository};

/// What the index of a checkpoint is made of.
pub(super) struct IndexParts<'a> {
    pub repository: &'a Repository,
    /// Where the packs are.
    pub partial: &'a PartialCheckpoint,
    /// Those of the manifest.
    pub packs: &'a [NumberedPack],
    /// But for the index.
    pub manifest: &'a Manifest,
    /// `None`: the checkpoint is full.
    pub parent: Option<&'a Parent>,
}

/// For the manifest and behind it.
pub(super) struct NewIndex {
    pub record: IndexRecord,
    pub segment: Vec<u8>,
}

/// What the new segment adds to.
struct Ground {
    records: Records,
    /// The first checkpoint that the new segment has records of.
    first: CheckpointId,
    /// In the lineage, without the new one.
    checkpoints: u64,
    /// The parent's segments.
    older: Vec<SegmentRecord>,
}

impl IndexParts<'_> {
    pub(super) async fn make(&self) -> Result<NewIndex> {
        let made = self.made_on(self.ground().await?).await;
        let Some((parent, error)) = self.parent.zip(made.as_ref().err().filter(|e| is_lost(e)))
        else {
            return made;
        };
        tracing::warn!(
            error = format!("{error:#}"),
            "a segment of the index is lost; the index is made again from the packs' trailers"
        );
        let ground = self.whole_lineage(parent.identity.id).await;
        self.made_on(ground.context("making an index that was lost again from the packs")?).await
    }

    async fn made_on(&self, ground: Ground) -> Result<NewIndex> {
        let Ground { mut records, mut first, checkpoints, mut older } = ground;
        records.begin_checkpoint(&self.spaces());
        for pack in self.packs {
            self.apply(&mut records, pack).await?;
        }
        let own = tokio::task::spawn_blocking(move || records.encode())
            .await
            .context("internal error: encoding the index panicked")?
            .context("encoding the index")?;
        let mut segment = own;
        let lengths: Vec<u64> = older.iter().map(|segment| segment.info.len().0).collect();
        let count = MergePolicy::default().merged(segment.info.len().0, &lengths, MAX_SEGMENT_LEN);
        if count > 0 {
            match self.merged(&segment, &older, count).await {
                Ok(merged) => {
                    segment = merged;
                    first = older[count - 1].first;
                    older.drain(..count);
                }
                // No restore could read it.
                Err(error) if is_lost(&error) => return Err(error),
                // The next checkpoint tries it again.
                Err(error) => tracing::warn!(
                    error = format!("{error:#}"),
                    "segments of the index could not be merged"
                ),
            }
        }
        let own = SegmentRecord { id: self.manifest.id, first, at: None, info: segment.info };
        let segments = std::iter::once(own).chain(older).collect();
        let record = IndexRecord { checkpoints: checkpoints + 1, segments };
        Ok(NewIndex { record, segment: segment.bytes })
    }

    fn vm(&self) -> &VmName {
        &self.manifest.vm
    }

    fn spaces(&self) -> Vec<(SpaceName, PageCount)> {
        self.manifest.space_sizes()
    }

    async fn ground(&self) -> Result<Ground> {
        let first = self.manifest.id;
        let Some(parent) = self.parent else {
            let records = Records::new(None);
            return Ok(Ground { records, first, checkpoints: 0, older: Vec::new() });
        };
        let Some(segments) = &parent.segments else {
            return self.whole_lineage(parent.identity.id).await;
        };
        let (records, older) = (Records::new(Some(&parent.spaces)), segments.clone());
        Ok(Ground { records, first, checkpoints: parent.checkpoints, older })
    }

    /// The parent has no index: the new one begins with the lineage.
    async fn whole_lineage(&self, parent: CheckpointId) -> Result<Ground> {
        let lineage = Lineage::read(self.repository, self.vm(), parent).await?;
        let first = lineage.manifests().next().context("a lineage without a checkpoint")?.id;
        let checkpoints = lineage.files.len() as u64;
        let records = lineage.records(self.repository).await?;
        Ok(Ground { records, first, checkpoints, older: Vec::new() })
    }

    async fn apply(&self, records: &mut Records, pack: &NumberedPack) -> Result<()> {
        let NumberedPack { record: pack, layout, .. } = pack;
        let place = PackPlace { checkpoint: self.manifest.id, name: pack.name.clone() };
        if let Some(layout) = layout {
            return Ok(records.apply_pack(place, &**layout)?);
        }
        let about = || format!("the index of {}", pack.name);
        let range = pack.info.footer().trailer_range();
        let trailer =
            self.partial.read_pack_range(&pack.name, range.start, range.end - range.start);
        let index =
            pack.info.parse_index(&trailer.await.with_context(about)?).with_context(about)?;
        records.apply_pack(place, &index).with_context(about)
    }

    /// The new segment with the `count` youngest of the older ones.
    async fn merged(
        &self,
        own: &EncodedSegment,
        older: &[SegmentRecord],
        count: usize,
    ) -> Result<EncodedSegment> {
        let mut segments = vec![Segment::new(Bytes::from(own.bytes.clone()), &own.info)?];
        for record in &older[..count] {
            // Each of them says where it is.
            segments.push(read_segment(self.repository, self.vm(), record, 0).await?);
        }
        let (spaces, is_oldest) = (self.spaces(), count == older.len());
        let merged = move || merge_segments(&segments, &spaces, is_oldest);
        let merged = tokio::task::spawn_blocking(merged).await;
        Ok(merged.context("internal error: merging the index panicked")??)
    }
}

#[cfg(test)]
mod test;
