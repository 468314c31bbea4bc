//! What a manifest says about the index of its lineage.

use serde::{Deserialize, Serialize};

use super::ManifestError;
use super::list::segment_list;
use super::validate::MANIFEST;
use crate::index::SegmentInfo;
use crate::units::{ByteOffset, CheckpointId};

/// Most segments that a manifest may name. A writer stays far below, see
/// [`MergePolicy`](crate::MergePolicy).
pub const MAX_SEGMENTS: usize = 64;

/// The index of a checkpoint: segments that together cover its lineage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexRecord {
    /// Checkpoints of the lineage, this one included.
    pub checkpoints: u64,
    /// The newest first; that is the checkpoint's own, which stands in the manifest's file.
    #[serde(deserialize_with = "segment_list")]
    pub segments: Vec<SegmentRecord>,
}

/// One segment: the newest record of each page that some checkpoints made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentRecord {
    /// The last of the checkpoints; the segment is in the file of its manifest.
    #[serde(rename = "seq")]
    pub id: CheckpointId,
    /// The first of them.
    pub first: CheckpointId,
    /// Where in the file it begins; not given for the checkpoint's own, which begins where the body
    /// ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<ByteOffset>,
    /// What it consists of.
    pub info: SegmentInfo,
}

impl IndexRecord {
    /// The segment in the file of the manifest that has this record.
    pub fn own(&self) -> Option<&SegmentRecord> {
        self.segments.first()
    }

    /// What must hold in the manifest of `id`, which adds to `parent`.
    pub(super) fn validate(
        &self,
        id: CheckpointId,
        parent: Option<CheckpointId>,
    ) -> Result<(), ManifestError> {
        MANIFEST.count("index segments", self.segments.len(), MAX_SEGMENTS)?;
        let own = self.own().filter(|own| own.id == id && own.at.is_none());
        MANIFEST.that(own.is_some(), "index", "without a segment of the checkpoint itself")?;
        let others = self.segments.get(1..).unwrap_or_default();
        MANIFEST.that(
            others.iter().all(|segment| segment.at.is_some()),
            "index",
            "with a segment of which no place is given",
        )?;
        let pairs = self.segments.iter().zip(others);
        let mut descending = pairs.map(|(newer, older)| newer.first > older.id);
        let in_order = self
            .segments
            .iter()
            .all(|segment| (CheckpointId::FIRST..=segment.id).contains(&segment.first));
        let in_order = in_order && descending.all(|descends| descends);
        MANIFEST.that(in_order, "index", "of segments that don't follow one another")?;
        let whole = match (parent, own.zip(others.first())) {
            (None, _) => others.is_empty() && own.is_some_and(|own| own.first == id),
            (Some(parent), Some((own, next))) if own.first == id => next.id == parent,
            (Some(parent), Some((own, next))) => own.first <= parent && next.id < parent,
            (Some(parent), None) => own.is_some_and(|own| own.first <= parent),
        };
        MANIFEST.that(
            whole,
            "index",
            "with a gap between its segments, or of more than the lineage",
        )?;
        let counted =
            (1..=id.0).contains(&self.checkpoints) && (self.checkpoints == 1) == parent.is_none();
        MANIFEST.that(counted, "index.checkpoints", "a number that the lineage can't have")?;
        let sound = self.segments.iter().all(|segment| segment.info.check().is_ok());
        MANIFEST.that(sound, "index", "with a segment that is longer than any")
    }
}
