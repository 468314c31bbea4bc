//! Several segments made one.

use super::builder::{EncodedSegment, SegmentBuilder};
use super::error::IndexError;
use super::run::{Overlay, Placed, PlacedRun};
use super::segment::Segment;
use crate::names::SpaceName;
use crate::units::{PackNo, PageCount};

/// One segment that says the same as `segments`, the newest first, about the spaces as they are
/// now: others are dropped, and so are pages beyond the end, because a checkpoint in which such a
/// name or page comes back records all of it. With `is_oldest` nothing is below to be hidden.
///
/// Holds the result and a block of each segment.
///
/// # Errors
/// When a segment is damaged, or the result is beyond a limit.
pub fn merge_segments<B: AsRef<[u8]>>(
    segments: &[Segment<B>],
    spaces: &[(SpaceName, PageCount)],
    is_oldest: bool,
) -> Result<EncodedSegment, IndexError> {
    merge_into(SegmentBuilder::new(), segments, spaces, is_oldest)
}

pub(super) fn merge_into<B: AsRef<[u8]>>(
    mut builder: SegmentBuilder,
    segments: &[Segment<B>],
    spaces: &[(SpaceName, PageCount)],
    is_oldest: bool,
) -> Result<EncodedSegment, IndexError> {
    let mut packs: Vec<Vec<Option<PackNo>>> =
        segments.iter().map(|segment| vec![None; segment.directory().packs().len()]).collect();
    for (space, size) in spaces {
        builder.begin_space(space)?;
        let lists = segments.iter().map(|segment| segment.runs(space, size.all()));
        for piece in Overlay::new(lists) {
            let (from, mut run) = piece?;
            if is_oldest && run.content == Placed::Unknown {
                continue;
            }
            renumber(&mut run, &segments[from], &mut packs[from], &mut builder);
            builder.push(run)?;
        }
    }
    builder.finish()
}

/// The pack's number in the new segment. Packs without a page that counts get none.
fn renumber<B: AsRef<[u8]>>(
    run: &mut PlacedRun,
    segment: &Segment<B>,
    numbers: &mut [Option<PackNo>],
    builder: &mut SegmentBuilder,
) {
    if let Placed::Data { pack, .. } = &mut run.content {
        let at = pack.as_usize();
        *pack = *numbers[at].get_or_insert_with(|| builder.pack(&segment.directory().packs()[at]));
    }
}
