//! The vocabulary and the saved forms of Stillpoint: units, names, digests, page sets, packs,
//! lineages, manifests, layers.
//!
//! Pure: bytes in, values out. This crate opens no file and no socket: the caller does, passes the
//! bytes, and names the file in the error that wraps the error of this crate. Byte layouts are
//! written down in `docs/format.md`.
//!
//! Two rules hold for everything that is parsed: the checksum is verified before anything is
//! believed, and every count and length is compared with a named limit before it is used to
//! allocate or to loop.
//!
//! # Example
//!
//! One page into a pack, and out of its bytes again:
//!
//! ```
//! use checkpoint_format::{
//!     EncodedFrame, PAGE_SIZE, PackBuilder, PackId, PageDigest, PageIndex, SpaceName, SpaceTable, ZSTD_LEVEL,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let ram = SpaceName::ram("pc.ram")?;
//! let spaces = SpaceTable::new([ram.clone()])?;
//! let space = spaces.id(&ram).ok_or("it has just been listed")?;
//! let page = [7; PAGE_SIZE];
//! let pages = [(PageIndex(42), PageDigest::of(&page))];
//!
//! let mut pack = PackBuilder::new(PackId::derive(&["web1", "1", "0"]), &spaces);
//! pack.push_frame(EncodedFrame::encode(space, &pages, &page, ZSTD_LEVEL)?)?;
//! let finished = pack.finish()?;
//!
//! let (bytes, info) = (finished.chunks.concat(), finished.info);
//! let from = info.trailer_offset.0 as usize;
//! let index = info.parse_index(&bytes[from..from + info.trailer_len as usize])?;
//! let frame = &index.frames()[0];
//! let stored = frame.byte_range();
//! let content = frame.decode(&bytes[stored.start as usize..stored.end as usize])?;
//! assert_eq!(content, page);
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs, clippy::missing_errors_doc, clippy::missing_panics_doc)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]
#![forbid(unsafe_code)]

mod class;
mod digest;
mod digest_form;
mod digest_table;
mod envelope;
mod identity;
mod index;
mod layer;
mod lineage;
mod manifest;
mod names;
mod pack;
mod page_set;
mod range_set;
mod receipt;
mod sparse_pages;
mod units;
mod wire;
mod working_set;

pub use digest::{Checksum, ContentDigest, ContentHasher, DigestParseError, PageDigest, is_zero};
pub use digest_form::{BlocksHasher, DigestForm};
pub use digest_table::DigestTable;
pub use envelope::{EnvelopeError, MAX_HEADER_LINE};
pub use identity::CheckpointIdentity;
pub use index::{
    BlockRow, EncodedSegment, IndexBlock, IndexDirectory, IndexError, IndexFrame, IndexPart,
    MAX_BLOCK_FRAMES, MAX_BLOCK_RAW_LEN, MAX_BLOCK_RUNS, MAX_DIRECTORY_RAW_LEN, MAX_SEGMENT_BLOCKS,
    MAX_SEGMENT_LEN, MAX_SEGMENT_PACKS, MergePolicy, Overlay, PackPlace, Placed, PlacedRun,
    Records, Segment, SegmentBuilder, SegmentInfo, first_difference, merge_segments,
};
pub use layer::{
    BLOCK_PAGES, BLOCK_SIZE, BlockHome, BlockIndex, BlockRef, BlockTable, BlockTableBuilder,
    BlockTableInfo, LAYER_VERSION, LayerError, LayerManifest, MAX_LAYER_BLOCKS, MAX_LAYER_BODY,
    MAX_LAYER_OWNERS, MAX_STORED_BLOCKS, OwnerIndex,
};
pub use lineage::{
    FramePart, FrameRead, LineageError, LocatedRun, MAX_LINEAGE_PACKS, PageLocation, PageMap,
};
pub use manifest::{
    CheckpointKind, DiskRecord, IndexRecord, LayerRef, MANIFEST_VERSION, MAX_ARGUMENTS,
    MAX_BACKING_DEPTH, MAX_CARRIED_RAM, MAX_DISKS, MAX_MANIFEST_BODY, MAX_PACKS, MAX_RAM_BLOCKS,
    MAX_SEGMENTS, MAX_SPACES, MAX_STATE_LEN, MAX_TEXT, Manifest, ManifestError, PackRecord,
    Qcow2Record, RamBlockRecord, RunState, SegmentRecord, SpaceRecord, Totals, VmRecord,
};
pub use names::{
    MAX_PACK_NAME, MAX_SPACE_NAME, MAX_VM_NAME, NameError, PackName, SpaceKind, SpaceName, VmName,
};
pub use pack::{
    Codec, EncodeError, EncodedFrame, FOOTER_LEN, FRAME_HEADER_LEN, FRAME_PAGES, FinishedPack,
    FrameEntry, HEADER_LEN, MAX_FRAMES_PER_PACK, MAX_PACK_LEN, MAX_PAGES_PER_PACK,
    MAX_SPACES_PER_PACK, MAX_TRAILER_RAW_LEN, PACK_VERSION, PackBuilder, PackError, PackFooter,
    PackHeader, PackId, PackIndex, PackInfo, PackLayout, PackPart, PageRun, RunSource, SpaceId,
    SpaceTable, ZSTD_LEVEL,
};
pub use page_set::{PageSet, Ranges};
pub use range_set::RangeSet;
pub use receipt::{CheckpointRef, DurableReceipt, OtherCheckpoint};
pub use units::{
    ByteLen, ByteOffset, CheckpointId, Epoch, FrameNo, MAX_SPACE_PAGES, PAGE_SIZE, PackNo,
    PageCount, PageIndex, PageRange, Slot, as_index,
};
pub use working_set::{MAX_WORKING_SET_LEN, MAX_WORKING_SET_RANGES, WorkingSet, WorkingSetError};

/// Page numbers and lengths are `u64` in the saved forms and index memory as `usize`: the two must
/// agree.
const _: () = assert!(usize::BITS == 64, "Stillpoint needs a 64-bit host");
