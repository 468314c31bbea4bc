//! Packs: the files that carry page content.
//!
//! ```text
//! header | frame | frame | ... | trailer | footer
//! ```
//!
//! A frame holds up to 64 pages of one space, compressed together and checksummed, so that one page
//! can be fetched without reading the rest. The trailer says which page is where. It stands behind
//! the frames because it is only known when they are written, and a store like HDFS can't go back;
//! the footer, last and of fixed size, leads to it. Restore has the same facts in the manifest
//! ([`PackInfo`]) and reads the trailer at once.
//!
//! Runs of zero pages are entries in the trailer and take no room among the frames. Data runs don't
//! say where their pages are: data pages are numbered through all frames in file order and the runs
//! name the pages in just that order. That keeps a run at 16 bytes, however many frames it crosses.

mod builder;
mod codec;
mod error;
mod footer;
mod frame;
mod header;
mod index;
mod info;
mod space_table;
#[cfg(test)]
pub(crate) mod testing;
mod trailer;

pub(crate) use codec::{compress_whole, decompress_whole};
pub(crate) use trailer::check_frame;

pub use builder::{FinishedPack, PackBuilder};
pub use codec::{Codec, ZSTD_LEVEL};
pub use error::{EncodeError, PackError, PackPart};
pub use footer::{FOOTER_LEN, PackFooter};
pub use frame::{EncodedFrame, FRAME_HEADER_LEN, FRAME_PAGES, FrameEntry};
pub use header::{HEADER_LEN, PACK_VERSION, PackHeader, PackId};
pub use index::{PackIndex, PackLayout, PageRun, RunSource};
pub use info::PackInfo;
pub use space_table::{SpaceId, SpaceTable};

/// Longest pack file. Far above what one upload should carry; it bounds every offset in the index.
pub const MAX_PACK_LEN: u64 = 8 << 30;
/// Longest trailer before compression; more than two million scattered pages.
pub const MAX_TRAILER_RAW_LEN: u32 = 64 << 20;
/// Most frames in a pack; as many as one-page frames fit into the longest pack.
pub const MAX_FRAMES_PER_PACK: u32 = 1 << 21;
/// Most spaces that a pack may name.
pub const MAX_SPACES_PER_PACK: usize = 4096;
/// Most pages that the runs of a pack may cover, zero pages included (16 TiB); bounds the work of
/// applying it.
pub const MAX_PAGES_PER_PACK: u64 = 1 << 32;
