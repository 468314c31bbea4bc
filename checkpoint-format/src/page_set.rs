//! A set of the pages of one space: one bit a page, walked word by word.

use std::fmt;

use bitvec::prelude::{BitVec, Lsb0};

use crate::units::{PageCount, PageIndex, PageRange, as_index};

const WORD_BITS: u64 = u64::BITS as u64;

/// Some of the pages of a space of fixed size.
///
/// A page outside the space can't be added: that panics, because to drop it silently would lose a
/// dirty page and to grow would hide that two spaces were mixed up. Asking for or removing pages
/// outside is harmless and allowed.
#[derive(Clone, PartialEq, Eq)]
pub struct PageSet {
    /// The bits of the last word above `bits.len()` are zero; the word-wise operations rely on it.
    bits: BitVec<u64, Lsb0>,
}

impl PageSet {
    /// No page of a space of `size` pages.
    pub fn new(size: PageCount) -> Self {
        let words = vec![0; as_index(size.0.div_ceil(WORD_BITS))];
        let mut bits = BitVec::from_vec(words);
        bits.truncate(size.as_usize());
        Self { bits }
    }

    /// Every page of a space of `size` pages.
    pub fn full(size: PageCount) -> Self {
        let mut set = Self::new(size);
        set.bits.fill(true);
        set
    }

    /// Pages in the space, in the set or not.
    pub fn len(&self) -> PageCount {
        PageCount(self.bits.len() as u64)
    }

    /// Pages in the set.
    pub fn count(&self) -> PageCount {
        PageCount(self.words().iter().map(|word| u64::from(word.count_ones())).sum())
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words().iter().all(|&word| word == 0)
    }

    /// Whether the page is in the set.
    pub fn contains(&self, page: PageIndex) -> bool {
        self.bits.get(page.as_usize()).is_some_and(|bit| *bit)
    }

    /// # Panics
    /// When the page is outside the space.
    pub fn insert(&mut self, page: PageIndex) {
        self.insert_range(PageRange::single(page));
    }

    /// # Panics
    /// When a page of the range is outside the space.
    pub fn insert_range(&mut self, range: PageRange) {
        assert!(
            range.is_empty() || range.end.0 <= self.len().0,
            "pages {range} are outside a space of {} pages",
            self.len()
        );
        self.fill(range, true);
    }

    /// Removes a page, if it is there.
    pub fn remove(&mut self, page: PageIndex) {
        self.remove_range(PageRange::single(page));
    }

    /// Removes all pages of a range.
    pub fn remove_range(&mut self, range: PageRange) {
        self.fill(range.clip(self.len()), false);
    }

    fn fill(&mut self, range: PageRange, value: bool) {
        if !range.is_empty() {
            self.bits[range.start.as_usize()..range.end.as_usize()].fill(value);
        }
    }

    /// Takes all pages out.
    pub fn clear(&mut self) {
        self.bits.as_raw_mut_slice().fill(0);
    }

    /// Adds every page of `other`.
    ///
    /// # Panics
    /// When the two are of spaces of different size.
    pub fn union_with(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| mine | theirs);
    }

    /// Takes out every page of `other`.
    ///
    /// # Panics
    /// When the two are of spaces of different size.
    pub fn subtract(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| mine & !theirs);
    }

    /// Keeps only the pages that `other` has too.
    ///
    /// # Panics
    /// When the two are of spaces of different size.
    pub fn intersect_with(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| mine & theirs);
    }

    fn combine(&mut self, other: &Self, operation: impl Fn(u64, u64) -> u64) {
        assert_eq!(self.len(), other.len(), "page sets of spaces of different size");
        for (mine, &theirs) in self.bits.as_raw_mut_slice().iter_mut().zip(other.words()) {
            *mine = operation(*mine, theirs);
        }
    }

    /// Follows a space that grew or shrank: pages that are gone leave the set, new ones are not in
    /// it.
    pub fn resize(&mut self, size: PageCount) {
        let mut resized = Self::new(size);
        for range in self.ranges() {
            resized.fill(range.clip(size), true);
        }
        *self = resized;
    }

    /// The pages in the set as maximal ranges, ascending.
    pub fn ranges(&self) -> Ranges<'_> {
        Ranges { words: self.words(), next: 0, len: self.len().0 }
    }

    /// The pages of `pages` that are not in the set as maximal ranges, ascending.
    ///
    /// Pages beyond the space are left out.
    pub fn absent_in(&self, pages: PageRange) -> impl Iterator<Item = PageRange> + '_ {
        let ranges = self.ranges();
        let end = pages.end.0.min(self.len().0);
        let next = move |at: u64| {
            let start = ranges.seek(at, !0);
            let stop = ranges.seek(start, 0).min(end);
            (start < end).then(|| PageRange::new(PageIndex(start), PageIndex(stop)))
        };
        std::iter::successors(next(pages.start.0), move |range| next(range.end.0))
    }

    /// The pages in the set one by one, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PageIndex> {
        self.ranges().flat_map(PageRange::iter)
    }

    fn words(&self) -> &[u64] {
        self.bits.as_raw_slice()
    }
}

/// # Panics
/// When a page of a range is outside the space.
impl Extend<PageRange> for PageSet {
    fn extend<I: IntoIterator<Item = PageRange>>(&mut self, ranges: I) {
        for range in ranges {
            self.insert_range(range);
        }
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSet({} of {} pages)", self.count(), self.len())
    }
}

/// The iterator of [`PageSet::ranges`].
#[derive(Clone, Debug)]
pub struct Ranges<'a> {
    words: &'a [u64],
    next: u64,
    len: u64,
}

impl Iterator for Ranges<'_> {
    type Item = PageRange;

    fn next(&mut self) -> Option<PageRange> {
        let start = self.seek(self.next, 0);
        if start == self.len {
            self.next = start;
            return None;
        }
        self.next = self.seek(start, !0);
        Some(PageRange::new(PageIndex(start), PageIndex(self.next)))
    }
}

impl Ranges<'_> {
    /// The first page at or after `from` whose bit, flipped by `flip`, is set; the space's length
    /// when there is none.
    fn seek(&self, from: u64, flip: u64) -> u64 {
        if from >= self.len {
            return self.len;
        }
        let first = (from / WORD_BITS) as usize;
        let mut mask = !0 << (from % WORD_BITS);
        for (number, word) in (first as u64..).zip(&self.words[first..]) {
            let hits = (word ^ flip) & mask;
            if hits != 0 {
                // Flipped, the unused bits of the last word are hits, and the first of them is at
                // the very end.
                return number * WORD_BITS + u64::from(hits.trailing_zeros());
            }
            mask = !0;
        }
        self.len
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::new(PageIndex(start), PageIndex(end))
    }

    #[test]
    fn ranges_cross_words_and_stop_at_the_end() {
        let mut set = PageSet::new(PageCount(200));
        set.extend([range(0, 1), range(60, 130), range(199, 200)]);
        let ranges: Vec<_> = set.ranges().collect();
        assert_eq!(ranges, [range(0, 1), range(60, 130), range(199, 200)]);
        assert_eq!(set.count(), PageCount(72));
    }

    #[test]
    fn absent_pages_are_those_that_the_set_lacks() {
        let mut set = PageSet::new(PageCount(200));
        set.extend([range(0, 1), range(60, 130), range(199, 200)]);
        for (start, end) in
            [(0, 200), (1, 60), (61, 129), (50, 140), (130, 199), (70, 70), (150, 300)]
        {
            let pages = range(start, end);
            let expected: Vec<_> =
                pages.iter().filter(|page| page.0 < 200 && !set.contains(*page)).collect();
            let found: Vec<_> = set.absent_in(pages).flat_map(PageRange::iter).collect();
            assert_eq!(found, expected, "{pages}");
        }
        let all: Vec<_> = set.absent_in(range(0, 200)).collect();
        assert_eq!(all, [range(1, 60), range(130, 199)]);
    }

    #[test]
    fn a_full_set_is_one_range() {
        for size in [1, 63, 64, 65, 128, 1000] {
            let set = PageSet::full(PageCount(size));
            assert_eq!(set.ranges().collect::<Vec<_>>(), [range(0, size)]);
            assert_eq!(set.count(), PageCount(size));
        }
    }

    #[test]
    fn a_space_without_pages_is_fine() {
        let set = PageSet::full(PageCount(0));
        assert!(set.is_empty());
        assert_eq!(set.ranges().next(), None);
    }

    #[test]
    fn shrinking_forgets_and_growing_adds_nothing() {
        let mut set = PageSet::full(PageCount(100));
        set.resize(PageCount(70));
        assert_eq!(set.count(), PageCount(70));
        set.resize(PageCount(128));
        assert_eq!(set.ranges().collect::<Vec<_>>(), [range(0, 70)]);
    }

    #[test]
    #[should_panic(expected = "outside a space of 10 pages")]
    fn a_page_outside_is_not_lost_silently() {
        PageSet::new(PageCount(10)).insert(PageIndex(10));
    }

    #[test]
    #[should_panic(expected = "different size")]
    fn sets_of_different_spaces_do_not_mix() {
        PageSet::new(PageCount(10)).union_with(&PageSet::new(PageCount(11)));
    }

    #[test]
    fn asking_and_removing_outside_is_harmless() {
        let mut set = PageSet::full(PageCount(10));
        assert!(!set.contains(PageIndex(u64::MAX)));
        set.remove_range(range(8, u64::MAX));
        set.remove_range(range(50, 60));
        assert_eq!(set.count(), PageCount(8));
    }
}
