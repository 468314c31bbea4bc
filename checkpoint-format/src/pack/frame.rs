//! Frames: up to 64 pages of one space, compressed together.
//!
//! | at | bytes | field |
//! | -- | ----- | ----- |
//! | 0  | 4     | magic `SPFR` |
//! | 4  | 2     | space, by its place in the space table |
//! | 6  | 1     | pages, 1 to 64 |
//! | 7  | 1     | codec: 0 none, 1 zstd |
//! | 8  | 4     | length of the content before compression, pages x 4096 |
//! | 12 | 4     | length of the content as stored |
//! | 16 | 8     | reserved, zero |
//! | 24 | 16    | checksum of the stored content and, behind it, of bytes 0..24 |
//! | 40 |       | the content as stored |

use std::ops::Range;

use super::codec::{Codec, compress_frame, decompress_frame};
use super::error::{EncodeError, PackError, PackPart};
use super::header::{check_checksum, check_fixed_len};
use super::space_table::SpaceId;
use crate::digest::{Checksum, PageDigest};
use crate::units::{self, ByteOffset, MAX_SPACE_PAGES, PAGE_SIZE, PageIndex, as_index};

/// Most pages in a frame: 256 KiB, the amount that a restore reads to get one page.
pub const FRAME_PAGES: usize = 64;
/// Bytes in front of a frame's content.
pub const FRAME_HEADER_LEN: usize = 40;

const MAGIC: [u8; 4] = *b"SPFR";
const CHECKED_HEADER_LEN: usize = FRAME_HEADER_LEN - size_of::<Checksum>();

/// A frame ready to be added to a pack.
#[derive(Clone, Debug)]
pub struct EncodedFrame {
    /// Its place is not known yet: the offset is zero until a pack takes the frame.
    entry: FrameEntry,
    pages: Vec<(PageIndex, PageDigest)>,
    bytes: Vec<u8>,
}

impl EncodedFrame {
    /// Compresses `raw`, the content of `pages` one after another. The pages must ascend but may
    /// have gaps.
    ///
    /// Pure CPU work: call it on as many threads as you like.
    ///
    /// # Errors
    /// When there are no or too many pages, they are not ascending, `raw` has another length, or
    /// cannot be compressed.
    pub fn encode(
        space: SpaceId,
        pages: &[(PageIndex, PageDigest)],
        raw: &[u8],
        level: i32,
    ) -> Result<Self, EncodeError> {
        let count = check_pages(pages)?;
        check_content(pages.len(), raw)?;
        compress_frame(raw, level, |codec, stored| {
            let mut entry = FrameEntry {
                offset: ByteOffset(0),
                // Never longer than the content itself, which is at most 256 KiB.
                stored_len: units::count(stored.len()),
                space,
                pages: count,
                codec,
                checksum: Checksum([0; 16]),
            };
            let head = entry.checked_header();
            entry.checksum = Checksum::of_both(stored, &head);
            Self {
                bytes: [&head[..], &entry.checksum.0, stored].concat(),
                pages: pages.to_vec(),
                entry,
            }
        })
    }

    /// The space of its pages.
    pub fn space(&self) -> SpaceId {
        self.entry.space
    }

    /// Its pages in ascending order, with their digests.
    pub fn pages(&self) -> &[(PageIndex, PageDigest)] {
        &self.pages
    }

    /// Bytes that the frame takes in the pack, its header included.
    pub fn stored_len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn into_parts(self) -> (FrameEntry, Vec<(PageIndex, PageDigest)>, Vec<u8>) {
        (self.entry, self.pages, self.bytes)
    }
}

fn check_pages(pages: &[(PageIndex, PageDigest)]) -> Result<u8, EncodeError> {
    if pages.is_empty() || pages.len() > FRAME_PAGES {
        return Err(EncodeError::FramePages { pages: pages.len(), limit: FRAME_PAGES });
    }
    if let Some(pair) = pages.windows(2).find(|pair| pair[0].0 >= pair[1].0) {
        return Err(EncodeError::NotAscending { before: pair[0].0, page: pair[1].0 });
    }
    match pages.last() {
        Some(&(page, _)) if page.0 >= MAX_SPACE_PAGES => {
            Err(EncodeError::PageBeyondLimit { page, limit: MAX_SPACE_PAGES })
        }
        #[expect(clippy::cast_possible_truncation, reason = "at most FRAME_PAGES, as checked")]
        _ => Ok(pages.len() as u8),
    }
}

fn check_content(pages: usize, raw: &[u8]) -> Result<(), EncodeError> {
    let expected = pages * PAGE_SIZE;
    if raw.len() == expected {
        return Ok(());
    }
    Err(EncodeError::ContentLength { pages, expected, found: raw.len() })
}

/// What the trailer says about a frame: all that is needed to fetch and decode it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameEntry {
    /// Where the frame's header begins in the file.
    pub offset: ByteOffset,
    /// Length of the content as stored, without the frame's header.
    pub stored_len: u32,
    /// The space of its pages.
    pub space: SpaceId,
    /// 1 to [`FRAME_PAGES`].
    pub pages: u8,
    /// How the stored bytes are compressed.
    pub codec: Codec,
    /// Checksum of the stored bytes.
    pub checksum: Checksum,
}

impl FrameEntry {
    /// Length of the content before compression.
    pub fn raw_len(&self) -> usize {
        usize::from(self.pages) * PAGE_SIZE
    }

    /// The bytes of the file to hand to [`decode`](Self::decode): header and content.
    pub fn byte_range(&self) -> Range<u64> {
        self.offset.0..self.offset.0 + FRAME_HEADER_LEN as u64 + u64::from(self.stored_len)
    }

    /// Verifies the frame's bytes (just those of [`byte_range`](Self::byte_range)) and gives the
    /// content of its pages.
    ///
    /// # Errors
    /// When the bytes are damaged, or have another length than this entry says.
    pub fn decode(&self, bytes: &[u8]) -> Result<Vec<u8>, PackError> {
        let part = PackPart::Frame(self.offset);
        let range = self.byte_range();
        check_fixed_len(part, bytes, as_index(range.end - range.start))?;
        let (head, rest) = bytes.split_at(CHECKED_HEADER_LEN);
        let (_, stored) = rest.split_at(size_of::<Checksum>());
        check_checksum(part, self.checksum, Checksum::of_both(stored, head))?;
        self.check_header(part, head)?;
        decompress_frame(part, self.codec, stored, self.raw_len())
    }

    /// The content is what was written; is the frame also the one that the index means?
    fn check_header(&self, part: PackPart, head: &[u8]) -> Result<(), PackError> {
        if head == self.checked_header() {
            return Ok(());
        }
        Err(PackError::BadEntry {
            part,
            table: "frame table",
            entry: self.offset.0,
            problem: "the frame's own header says something else",
        })
    }

    fn checked_header(&self) -> [u8; CHECKED_HEADER_LEN] {
        let mut head = [0; CHECKED_HEADER_LEN];
        head[..4].copy_from_slice(&MAGIC);
        head[4..6].copy_from_slice(&self.space.0.to_le_bytes());
        head[6] = self.pages;
        head[7] = self.codec.to_wire();
        head[8..12].copy_from_slice(&units::count(self.raw_len()).to_le_bytes());
        head[12..16].copy_from_slice(&self.stored_len.to_le_bytes());
        head
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::pack::ZSTD_LEVEL;

    const SPACE: SpaceId = SpaceId(3);

    fn pages(numbers: &[u64]) -> Vec<(PageIndex, PageDigest)> {
        let page = |&number| (PageIndex(number), PageDigest([number as u8; 16]));
        numbers.iter().map(page).collect()
    }

    /// Bytes that zstd can't shrink.
    fn noise(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    fn encode(raw: &[u8]) -> EncodedFrame {
        let numbers: Vec<_> = (0..(raw.len() / PAGE_SIZE) as u64).collect();
        EncodedFrame::encode(SPACE, &pages(&numbers), raw, ZSTD_LEVEL).expect("good pages")
    }

    #[test]
    fn compressible_content_shrinks_and_comes_back() {
        let raw = [[1; PAGE_SIZE], [2; PAGE_SIZE]].concat();
        let frame = encode(&raw);
        assert_eq!(frame.entry.codec, Codec::Zstd);
        assert!(frame.stored_len() < 200);
        assert_eq!(frame.entry.decode(&frame.bytes).expect("sound"), raw);
    }

    #[test]
    fn noise_is_stored_as_it_is() {
        let raw = noise(FRAME_PAGES * PAGE_SIZE);
        let frame = encode(&raw);
        assert_eq!(frame.entry.codec, Codec::None);
        assert_eq!(frame.stored_len(), FRAME_HEADER_LEN + raw.len());
        assert_eq!(frame.entry.decode(&frame.bytes).expect("sound"), raw);
    }

    #[test]
    fn a_change_of_level_is_followed() {
        let text: Vec<u8> = (0..16 * PAGE_SIZE).map(|n| (n * n / 97) as u8).collect();
        let numbers: Vec<_> = (0..16).collect();
        let len = |level| {
            let frame = EncodedFrame::encode(SPACE, &pages(&numbers), &text, level);
            frame.expect("good pages").stored_len()
        };
        let (fast, small) = (len(1), len(19));
        assert!(small < fast, "level 19 gave {small}, level 1 {fast}");
        assert_eq!(len(1), fast);
    }

    #[test]
    fn unusable_pages_are_refused() {
        let error = |numbers: &[u64], raw_pages: usize| {
            let raw = vec![0; raw_pages * PAGE_SIZE];
            EncodedFrame::encode(SPACE, &pages(numbers), &raw, ZSTD_LEVEL).expect_err("unusable")
        };
        let many: Vec<_> = (0..65).collect();
        assert!(matches!(error(&[], 0), EncodeError::FramePages { pages: 0, .. }));
        assert!(matches!(error(&many, 65), EncodeError::FramePages { pages: 65, .. }));
        assert!(matches!(error(&[1, 1], 2), EncodeError::NotAscending { .. }));
        assert!(matches!(error(&[2, 1], 2), EncodeError::NotAscending { .. }));
        assert!(matches!(error(&[1, 2], 1), EncodeError::ContentLength { .. }));
        assert!(matches!(error(&[MAX_SPACE_PAGES], 1), EncodeError::PageBeyondLimit { .. }));
    }

    #[test]
    fn damage_and_a_mixed_up_index_are_different_errors() {
        let frame = encode(&[[1; PAGE_SIZE], [2; PAGE_SIZE]].concat());
        for at in 0..frame.bytes.len() {
            let mut bad = frame.bytes.clone();
            bad[at] ^= 0x40;
            let result = frame.entry.decode(&bad);
            // The reader takes the checksum from the index; the frame's copy of it serves a reader
            // that has no index.
            if !(CHECKED_HEADER_LEN..FRAME_HEADER_LEN).contains(&at) {
                assert!(matches!(result, Err(PackError::ChecksumMismatch { .. })), "byte {at}");
            }
        }
        let other = FrameEntry { space: SpaceId(4), ..frame.entry };
        assert!(matches!(other.decode(&frame.bytes), Err(PackError::BadEntry { .. })));
        let cut = frame.entry.decode(&frame.bytes[1..]);
        assert!(matches!(cut, Err(PackError::WrongLength { .. })));
    }

    #[test]
    fn content_that_unpacks_to_another_length_is_refused() {
        let mut frame = encode(&[[1; PAGE_SIZE], [2; PAGE_SIZE]].concat());
        for pages in [1, 3] {
            frame.entry.pages = pages;
            let head = frame.entry.checked_header();
            frame.bytes[..CHECKED_HEADER_LEN].copy_from_slice(&head);
            frame.entry.checksum = Checksum::of_both(&frame.bytes[FRAME_HEADER_LEN..], &head);
            assert!(frame.entry.decode(&frame.bytes).is_err(), "{pages} pages");
        }
    }
}
