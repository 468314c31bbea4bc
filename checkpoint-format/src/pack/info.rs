//! What the manifest says about a pack.

use serde::{Deserialize, Serialize};

use super::error::{PackError, PackPart, at_most, equal};
use super::footer::PackFooter;
use super::header::PackId;
use super::index::PackIndex;
use super::{MAX_FRAMES_PER_PACK, MAX_PAGES_PER_PACK};
use crate::digest::Checksum;
use crate::units::{ByteLen, ByteOffset, PageCount};

/// A pack as its manifest records it: enough to read the trailer at once and to know that it is the
/// right one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackInfo {
    /// The pack's ID.
    pub id: PackId,
    /// Length of the file: what the pack costs in the store.
    pub len: ByteLen,
    /// Where the trailer begins.
    pub trailer_offset: ByteOffset,
    /// Stored bytes of the trailer.
    pub trailer_len: u32,
    /// Bytes of the trailer after decompression.
    pub trailer_raw_len: u32,
    /// Checksum of the stored bytes.
    pub trailer_checksum: Checksum,
    /// Number of frames.
    pub frames: u32,
    /// Records of pages with content; a page that was recorded twice counts twice.
    pub data_pages: PageCount,
    /// Records of zero pages, counted likewise.
    pub zero_pages: PageCount,
    /// What the file would be without compression: page content and every byte of metadata.
    pub raw_bytes: ByteLen,
}

impl PackInfo {
    /// The same facts as the pack's own footer has.
    pub fn footer(&self) -> PackFooter {
        PackFooter {
            trailer_offset: self.trailer_offset,
            trailer_len: self.trailer_len,
            trailer_raw_len: self.trailer_raw_len,
            trailer_checksum: self.trailer_checksum,
            pack_len: self.len,
        }
    }

    /// Verifies and reads the trailer, the bytes of [`PackFooter::trailer_range`].
    ///
    /// # Errors
    /// When the trailer is damaged, beyond a limit, or contradicts this record.
    pub fn parse_index(&self, trailer: &[u8]) -> Result<PackIndex, PackError> {
        const PART: PackPart = PackPart::Trailer;
        self.check()?;
        let index = PackIndex::parse(trailer, &self.footer())?;
        if index.id() != self.id {
            return Err(PackError::WrongPack { part: PART, expected: self.id, found: index.id() });
        }
        equal(PART, "number of frames", index.frames().len() as u64, self.frames.into())?;
        equal(PART, "number of data pages", index.digests().len() as u64, self.data_pages.0)?;
        equal(PART, "number of zero pages", index.zero_pages().0, self.zero_pages.0)?;
        Ok(index)
    }

    /// Whether the numbers can be true at all.
    ///
    /// # Errors
    /// When a value is beyond its limit, or contradicts another.
    pub fn check(&self) -> Result<(), PackError> {
        const PART: PackPart = PackPart::Info;
        self.footer().check(PART)?;
        at_most(PART, "number of frames", self.frames.into(), MAX_FRAMES_PER_PACK.into())?;
        at_most(PART, "number of data pages", self.data_pages.0, MAX_PAGES_PER_PACK)?;
        at_most(PART, "number of zero pages", self.zero_pages.0, MAX_PAGES_PER_PACK)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::pack::testing::{frame, table};
    use crate::pack::{PackBuilder, SpaceId};
    use crate::units::{PageIndex, PageRange};

    fn sample() -> (PackInfo, Vec<u8>) {
        let mut pack = PackBuilder::new(PackId([1; 16]), &table());
        pack.push_frame(frame(SpaceId(0), [1, 2])).expect("room");
        let zero = PageRange::new(PageIndex(3), PageIndex(9));
        pack.push_zero(SpaceId(0), zero).expect("room");
        let mut pack = pack.finish().expect("small");
        (pack.info, pack.chunks.swap_remove(2))
    }

    #[test]
    fn counts_what_was_recorded() {
        let (info, trailer) = sample();
        let counts = (info.frames, info.data_pages, info.zero_pages);
        assert_eq!(counts, (1, PageCount(2), PageCount(6)));
        assert!(info.parse_index(&trailer).is_ok());
    }

    #[test]
    fn another_pack_is_not_taken_for_this_one() {
        let (mut info, trailer) = sample();
        info.id = PackId([2; 16]);
        let error = info.parse_index(&trailer).expect_err("another pack");
        assert!(matches!(error, PackError::WrongPack { .. }), "{error}");
    }

    #[test]
    fn counts_that_the_trailer_does_not_bear_out_are_refused() {
        type Change = fn(&mut PackInfo);
        let changes: [Change; 3] =
            [|info| info.frames += 1, |info| info.data_pages.0 += 1, |info| info.zero_pages.0 += 1];
        for change in changes {
            let (mut info, trailer) = sample();
            change(&mut info);
            let error = info.parse_index(&trailer).expect_err("another count");
            assert!(matches!(error, PackError::Contradiction { .. }), "{error}");
        }
    }
}
