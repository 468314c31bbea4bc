//! The index of a lineage: where the newest content of each page is, in segments that are merged as
//! checkpoints are made.
//!
//! ```text
//! manifest's file:  header line | JSON body | segment
//! segment:          directory | block | block | ...
//! ```
//!
//! A checkpoint that only said what it recorded itself would have to be read together with all of
//! its ancestors. One that said where every page is would cost as much as the whole map. So each
//! checkpoint writes one *segment*: the newest record of each page that a contiguous range of
//! checkpoints made, its own and, now and then, those of the youngest segments before it, which are
//! merged into it ([`MergePolicy`]). The manifest names the few segments that together cover the
//! lineage. Of two records of a page the one in the newer segment counts.
//!
//! A segment is cut into *blocks* of neighbouring pages of one space, each checksummed and
//! compressed for itself, with a table of the frames that its pages are in. So a reader that needs
//! one page takes the directories, one block of each segment at most, and the frame. Blocks are cut
//! by what they hold, not by page numbers: a hole is one run however large it is, and a segment of
//! a few scattered pages has one block instead of one for each page.
//!
//! A record says of a page: it is in this slot of that frame; it holds zeros; or nothing is
//! recorded of it ([`Placed::Unknown`]), whatever older segments say: for a new space whose name an
//! older one had. Where a space grew, the new pages are recorded as zeros; where it shrank nothing
//! is recorded, because the size in the manifest cuts it off and only growth would show more.
//! Digests of pages are not in the index, but in the packs' own trailers.

mod block;
mod builder;
mod compare;
mod directory;
mod error;
mod info;
mod merge;
mod policy;
mod records;
mod run;
mod segment;
#[cfg(test)]
mod test;

pub use block::{IndexBlock, IndexFrame, MAX_BLOCK_FRAMES, MAX_BLOCK_RUNS};
pub use builder::{EncodedSegment, SegmentBuilder};
pub use compare::first_difference;
pub use directory::{
    BlockRow, IndexDirectory, MAX_BLOCK_RAW_LEN, MAX_DIRECTORY_RAW_LEN, MAX_SEGMENT_BLOCKS,
    MAX_SEGMENT_LEN, MAX_SEGMENT_PACKS, PackPlace,
};
pub use error::{IndexError, IndexPart};
pub use info::SegmentInfo;
pub use merge::merge_segments;
pub use policy::MergePolicy;
pub use records::Records;
pub use run::{Overlay, Placed, PlacedRun};
pub use segment::Segment;
