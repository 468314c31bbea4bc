//! Numbers that could be confused with one another, each as a type of its own.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Bytes in a page. Everything that Stillpoint tracks, stores and restores is a whole number of
/// these.
pub const PAGE_SIZE: usize = 4096;

/// The largest space that a saved form may describe, in pages (4 PiB).
///
/// Far above any real VM, and low enough that no byte offset inside a space can overflow.
pub const MAX_SPACE_PAGES: u64 = 1 << 40;

/// For indexing memory; lossless on the 64-bit hosts that we build for.
#[expect(clippy::cast_possible_truncation, reason = "lib.rs asserts a 64-bit host")]
pub const fn as_index(number: u64) -> usize {
    number as usize
}

/// A count or length of a saved form, which is kept below a limit of fewer than 32 bits.
#[expect(clippy::cast_possible_truncation, reason = "the limits of the saved forms")]
pub(crate) const fn count(number: usize) -> u32 {
    debug_assert!(number <= u32::MAX as usize);
    number as u32
}

macro_rules! number {
    ($($(#[$doc:meta])* $name:ident($inner:ty);)*) => {$(
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The number.
            pub const fn get(self) -> $inner {
                self.0
            }

            /// For indexing memory; lossless on the 64-bit hosts that we build for.
            #[allow(clippy::cast_possible_truncation, reason = "lib.rs asserts a 64-bit host")]
            pub const fn as_usize(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }
    )*};
}

number! {
    /// Which page of a space, counted from its start.
    PageIndex(u64);
    /// How many pages.
    PageCount(u64);
    /// Where a byte is, counted from the start of a space or a file.
    ByteOffset(u64);
    /// How many bytes.
    ByteLen(u64);
    /// The number that a writer claimed for a VM; a higher one fences the lower.
    Epoch(u64);
    /// Which checkpoint of a VM; the first is 1 and a child's is higher than its parent's.
    CheckpointId(u64);
    /// Which pack of a list: of a manifest, of a layer, or of a whole lineage counted oldest first.
    PackNo(u32);
    /// Which frame of a pack, in file order.
    FrameNo(u32);
    /// Which page of a frame.
    Slot(u8);
}

impl PageIndex {
    /// The page that holds the byte at `offset`.
    pub const fn containing(offset: ByteOffset) -> Self {
        Self(offset.0 / PAGE_SIZE as u64)
    }

    /// Saturates: indexes above [`MAX_SPACE_PAGES`] come from no space.
    pub const fn byte_offset(self) -> ByteOffset {
        ByteOffset(self.0.saturating_mul(PAGE_SIZE as u64))
    }

    /// The page `count` pages further on, unless that overflows.
    pub const fn checked_add(self, count: PageCount) -> Option<Self> {
        match self.0.checked_add(count.0) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }
}

impl PageCount {
    /// Pages needed to hold `len` bytes; the last one may be partly used.
    pub const fn covering(len: ByteLen) -> Self {
        Self(len.0.div_ceil(PAGE_SIZE as u64))
    }

    /// Saturates: counts above [`MAX_SPACE_PAGES`] come from no space.
    pub const fn byte_len(self) -> ByteLen {
        ByteLen(self.0.saturating_mul(PAGE_SIZE as u64))
    }

    /// All pages of a space of this size.
    pub const fn all(self) -> PageRange {
        PageRange { start: PageIndex(0), end: PageIndex(self.0) }
    }
}

impl Epoch {
    /// The next higher epoch.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl CheckpointId {
    /// The ID of a VM's first checkpoint.
    pub const FIRST: Self = Self(1);

    /// Saturates: if a directory of the highest ID exists, a writer finds that ID taken.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// The pages from `start` up to and without `end`. Empty when `end <= start`, like the standard
/// library's ranges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    /// The first page.
    pub start: PageIndex,
    /// The page after the last.
    pub end: PageIndex,
}

impl PageRange {
    /// The pages from `start` to before `end`.
    pub const fn new(start: PageIndex, end: PageIndex) -> Self {
        Self { start, end }
    }

    /// `count` pages from `start` on; cut off at the largest page number.
    pub const fn of_len(start: PageIndex, count: PageCount) -> Self {
        Self { start, end: PageIndex(start.0.saturating_add(count.0)) }
    }

    /// One page.
    pub const fn single(page: PageIndex) -> Self {
        Self::of_len(page, PageCount(1))
    }

    /// Number of pages.
    pub const fn len(self) -> PageCount {
        PageCount(self.end.0.saturating_sub(self.start.0))
    }

    /// Whether it has no pages.
    pub const fn is_empty(self) -> bool {
        self.end.0 <= self.start.0
    }

    /// Whether the page is in the range.
    pub const fn contains(self, page: PageIndex) -> bool {
        self.start.0 <= page.0 && page.0 < self.end.0
    }

    /// The pages in ascending order.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = PageIndex> {
        (self.start.0..self.end.0).map(PageIndex)
    }

    /// The bytes of the space that these pages cover.
    pub const fn bytes(self) -> Range<u64> {
        self.start.byte_offset().0..self.end.byte_offset().0
    }

    /// Bytes of all its pages.
    pub const fn byte_len(self) -> ByteLen {
        self.len().byte_len()
    }

    /// The part that lies inside a space of `size` pages.
    pub fn clip(self, size: PageCount) -> Self {
        let end = self.end.min(PageIndex(size.0));
        Self { start: self.start.min(end), end }
    }

    /// Cuts the range into pieces of at most `max` pages, in order.
    ///
    /// # Panics
    /// When `max` is zero.
    pub fn chunks(self, max: PageCount) -> impl Iterator<Item = PageRange> {
        assert!(max.0 > 0, "a range cannot be cut into pieces of no pages");
        let mut start = self.start;
        std::iter::from_fn(move || {
            let piece = Self { start, end: PageIndex(start.0.saturating_add(max.0)).min(self.end) };
            start = piece.end;
            (!piece.is_empty()).then_some(piece)
        })
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::new(PageIndex(start), PageIndex(end))
    }

    #[test]
    fn a_partly_used_last_page_is_counted() {
        assert_eq!(PageCount::covering(ByteLen(0)), PageCount(0));
        assert_eq!(PageCount::covering(ByteLen(1)), PageCount(1));
        assert_eq!(PageCount::covering(ByteLen(4096)), PageCount(1));
        assert_eq!(PageCount::covering(ByteLen(4097)), PageCount(2));
    }

    #[test]
    fn ranges_are_half_open() {
        let r = range(2, 5);
        assert_eq!(r.len(), PageCount(3));
        assert!(r.contains(PageIndex(2)) && r.contains(PageIndex(4)));
        assert!(!r.contains(PageIndex(5)));
        assert_eq!(r.bytes(), 8192..20480);
        assert_eq!(r.iter().collect::<Vec<_>>(), [2, 3, 4].map(PageIndex).to_vec());
    }

    #[test]
    fn a_reversed_range_is_empty() {
        let r = range(5, 2);
        assert!(r.is_empty());
        assert_eq!(r.len(), PageCount(0));
        assert_eq!(r.iter().count(), 0);
        assert_eq!(r.chunks(PageCount(1)).count(), 0);
    }

    #[test]
    fn clipping_keeps_what_is_inside() {
        assert_eq!(range(2, 9).clip(PageCount(5)), range(2, 5));
        assert!(range(7, 9).clip(PageCount(5)).is_empty());
    }

    #[test]
    fn chunks_cover_the_range_in_order() {
        let pieces: Vec<_> = range(3, 10).chunks(PageCount(3)).collect();
        assert_eq!(pieces, [range(3, 6), range(6, 9), range(9, 10)]);
    }

    #[test]
    fn numbers_are_saved_bare() {
        assert_eq!(serde_json::to_string(&Epoch(7)).expect("a number"), "7");
    }
}
