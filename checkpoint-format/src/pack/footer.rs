//! The last 64 bytes of a pack: where the trailer is.

use super::error::{PackError, PackPart, at_most, equal};
use super::header::{HEADER_LEN, check_fixed_len, check_magic, check_own_checksum};
use super::{MAX_PACK_LEN, MAX_TRAILER_RAW_LEN};
use crate::digest::Checksum;
use crate::units::{ByteLen, ByteOffset};
use crate::wire::Reader;

/// Bytes of a pack's footer.
pub const FOOTER_LEN: usize = 64;

const MAGIC: [u8; 8] = *b"STLPFOOT";

/// | at | bytes | field |
/// | -- | ----- | ----- |
/// | 0  | 8     | magic `STLPFOOT` |
/// | 8  | 8     | offset of the trailer |
/// | 16 | 4     | length of the trailer as stored |
/// | 20 | 4     | length of the trailer before compression |
/// | 24 | 16    | checksum of the trailer as stored |
/// | 40 | 8     | length of the file |
/// | 48 | 16    | checksum of bytes 0..48 |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackFooter {
    /// Where the trailer begins.
    pub trailer_offset: ByteOffset,
    /// Stored bytes of the trailer.
    pub trailer_len: u32,
    /// Bytes of the trailer after decompression.
    pub trailer_raw_len: u32,
    /// Checksum of the stored bytes.
    pub trailer_checksum: Checksum,
    /// Length of the whole pack.
    pub pack_len: ByteLen,
}

impl PackFooter {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FOOTER_LEN);
        bytes.extend(MAGIC);
        bytes.extend(self.trailer_offset.0.to_le_bytes());
        bytes.extend(self.trailer_len.to_le_bytes());
        bytes.extend(self.trailer_raw_len.to_le_bytes());
        bytes.extend(self.trailer_checksum.0);
        bytes.extend(self.pack_len.0.to_le_bytes());
        bytes.extend(Checksum::of(&bytes).0);
        bytes
    }

    /// Reads the last [`FOOTER_LEN`] bytes of a pack.
    ///
    /// # Errors
    /// When the bytes are damaged, of another version, or contradict each other.
    pub fn parse(bytes: &[u8]) -> Result<Self, PackError> {
        const PART: PackPart = PackPart::Footer;
        check_fixed_len(PART, bytes, FOOTER_LEN)?;
        let short = PackError::short(PART);
        let mut reader = Reader::new(bytes);
        check_magic(PART, MAGIC, reader.array().map_err(&short)?)?;
        check_own_checksum(PART, bytes)?;
        let footer = Self {
            trailer_offset: ByteOffset(reader.u64().map_err(&short)?),
            trailer_len: reader.u32().map_err(&short)?,
            trailer_raw_len: reader.u32().map_err(&short)?,
            trailer_checksum: Checksum(reader.array().map_err(&short)?),
            pack_len: ByteLen(reader.u64().map_err(&short)?),
        };
        footer.check(PART)?;
        Ok(footer)
    }

    /// The bytes of the file to hand to [`PackIndex::parse`](super::PackIndex::parse).
    pub fn trailer_range(&self) -> std::ops::Range<u64> {
        self.trailer_offset.0..self.trailer_offset.0 + u64::from(self.trailer_len)
    }

    /// The numbers must fit one another, wherever they come from.
    pub(super) fn check(&self, part: PackPart) -> Result<(), PackError> {
        at_most(part, "pack length", self.pack_len.0, MAX_PACK_LEN)?;
        at_most(part, "trailer offset", self.trailer_offset.0, self.pack_len.0)?;
        at_most(
            part,
            "raw trailer length",
            self.trailer_raw_len.into(),
            MAX_TRAILER_RAW_LEN.into(),
        )?;
        // No overflow: both are bounded by now, and the trailer's length is 32 bits.
        let end = self.trailer_range().end + FOOTER_LEN as u64;
        equal(part, "end of the footer", end, self.pack_len.0)?;
        at_most(
            part,
            "length of the header before the trailer",
            HEADER_LEN as u64,
            self.trailer_offset.0,
        )
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn footer() -> PackFooter {
        PackFooter {
            trailer_offset: ByteOffset(64),
            trailer_len: 10,
            trailer_raw_len: 24,
            trailer_checksum: Checksum::of(b"trailer"),
            pack_len: ByteLen(138),
        }
    }

    #[test]
    fn goes_there_and_back_in_64_bytes() {
        let bytes = footer().encode();
        assert_eq!(bytes.len(), FOOTER_LEN);
        assert_eq!(PackFooter::parse(&bytes).expect("sound"), footer());
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let good = footer().encode();
        for bit in 0..FOOTER_LEN * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(PackFooter::parse(&bad).is_err(), "missed bit {bit}");
        }
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused_though_the_checksum_is_right() {
        type Change = fn(&mut PackFooter);
        let changes: [Change; 5] = [
            |f| f.pack_len.0 = u64::MAX,
            |f| f.trailer_offset.0 = u64::MAX,
            |f| f.trailer_len = u32::MAX,
            |f| f.trailer_raw_len = MAX_TRAILER_RAW_LEN + 1,
            |f| (f.trailer_offset.0, f.pack_len.0) = (63, 137),
        ];
        for change in changes {
            let mut bad = footer();
            change(&mut bad);
            assert!(PackFooter::parse(&bad.encode()).is_err(), "accepted {bad:?}");
        }
    }
}
