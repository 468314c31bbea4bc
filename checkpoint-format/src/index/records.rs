//! What one or more checkpoints recorded, page by page, on the way into a segment.

use std::collections::BTreeMap;

use super::builder::{EncodedSegment, SegmentBuilder};
use super::directory::PackPlace;
use super::error::IndexError;
use super::run::{Placed, PlacedRun};
use crate::lineage::{LineageError, PageLocation, PageMap};
use crate::names::SpaceName;
use crate::pack::{FrameEntry, PackLayout};
use crate::units::{PackNo, PageCount, count};

/// Collects the records of checkpoints that follow one another: of each,
/// [`begin_checkpoint`](Self::begin_checkpoint), then its packs in their order. Keeps 8 bytes for
/// each page in a 16 MiB chunk that has any data, and what is needed to read each frame.
#[derive(Clone, Debug)]
pub struct Records {
    spaces: BTreeMap<SpaceName, Recorded>,
    packs: Vec<PackPlace>,
    frames: Vec<Vec<FrameEntry>>,
    /// The first of the checkpoints is full.
    is_oldest: bool,
}

#[derive(Clone, Debug)]
struct Recorded {
    /// A page is unknown when none of the checkpoints recorded it.
    map: PageMap,
    /// What older checkpoints have under this name was another space.
    is_new: bool,
}

impl Records {
    /// `parent`: the spaces of the checkpoint that the first one adds to; `None` when that is full.
    pub fn new(parent: Option<&[(SpaceName, PageCount)]>) -> Self {
        let known = parent.unwrap_or_default().iter().map(|(space, size)| {
            (space.clone(), Recorded { map: PageMap::new(space.clone(), *size), is_new: false })
        });
        Self {
            spaces: known.collect(),
            packs: Vec::new(),
            frames: Vec::new(),
            is_oldest: parent.is_none(),
        }
    }

    /// The next checkpoint has these spaces.
    pub fn begin_checkpoint(&mut self, spaces: &[(SpaceName, PageCount)]) {
        let mut before = std::mem::take(&mut self.spaces);
        for (space, size) in spaces {
            let mut recorded = before.remove(space).unwrap_or_else(|| Recorded {
                map: PageMap::new(space.clone(), *size),
                is_new: true,
            });
            recorded.map.resize(*size);
            self.spaces.insert(space.clone(), recorded);
        }
    }

    /// Takes in the checkpoint's next pack.
    ///
    /// # Errors
    /// When there are more packs than a lineage can have.
    pub fn apply_pack(
        &mut self,
        place: PackPlace,
        index: &impl AsRef<PackLayout>,
    ) -> Result<(), LineageError> {
        let number = PackNo(count(self.packs.len()));
        for recorded in self.spaces.values_mut() {
            recorded.map.apply_pack(number, index)?;
        }
        self.packs.push(place);
        self.frames.push(index.as_ref().frames().to_vec());
        Ok(())
    }

    /// The segment of these checkpoints.
    ///
    /// # Errors
    /// When it is beyond a limit, or can't be compressed.
    pub fn encode(&self) -> Result<EncodedSegment, IndexError> {
        self.encode_into(SegmentBuilder::new())
    }

    pub(super) fn encode_into(
        &self,
        mut builder: SegmentBuilder,
    ) -> Result<EncodedSegment, IndexError> {
        let mut numbers: Vec<Option<PackNo>> = vec![None; self.packs.len()];
        for (space, recorded) in &self.spaces {
            let hides = recorded.is_new && !self.is_oldest;
            builder.begin_space(space)?;
            for run in recorded.map.runs() {
                let content = match run.location {
                    PageLocation::Unknown if !hides => continue,
                    PageLocation::Unknown => Placed::Unknown,
                    PageLocation::Zero => Placed::Zero,
                    PageLocation::Data { pack, frame, slot: first_slot } => {
                        let at = pack.as_usize();
                        let number =
                            *numbers[at].get_or_insert_with(|| builder.pack(&self.packs[at]));
                        let frame = self.frames[at][frame.as_usize()];
                        Placed::Data { pack: number, frame, first_slot }
                    }
                };
                builder.push(PlacedRun { pages: run.pages, content })?;
            }
        }
        builder.finish()
    }
}
