//! What a manifest says about a segment.

use serde::{Deserialize, Serialize};

use super::directory::{MAX_DIRECTORY_RAW_LEN, MAX_SEGMENT_LEN};
use super::error::{IndexError, IndexPart, at_most};
use crate::digest::Checksum;
use crate::units::ByteLen;

/// Enough to read a segment's directory and to know that it is the right one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentInfo {
    /// Stored bytes of the directory, with which the segment begins.
    pub directory_len: u32,
    /// Bytes of the directory after decompression.
    pub directory_raw_len: u32,
    /// Checksum of the stored bytes.
    pub directory_checksum: Checksum,
    /// Stored bytes of all blocks.
    pub blocks_len: ByteLen,
}

impl SegmentInfo {
    /// Bytes of the whole segment.
    pub fn len(&self) -> ByteLen {
        ByteLen(self.blocks_len.0.saturating_add(self.directory_len.into()))
    }

    /// Whether it has no bytes, which none has.
    pub fn is_empty(&self) -> bool {
        self.len().0 == 0
    }

    /// Whether the numbers can be true at all.
    ///
    /// # Errors
    /// When a value is beyond its limit.
    pub fn check(&self) -> Result<(), IndexError> {
        const PART: IndexPart = IndexPart::Directory;
        let raw_len = u64::from(self.directory_raw_len);
        at_most(PART, "length before compression", raw_len, MAX_DIRECTORY_RAW_LEN.into())?;
        at_most(PART, "length of the segment", self.len().0, MAX_SEGMENT_LEN)
    }
}
