//! A value for each page of a space of any size, where most pages are unknown or zero and cost
//! nothing.

use std::collections::BTreeMap;

use crate::range_set::RangeSet;
use crate::units::{PageCount, PageIndex, PageRange, as_index};

/// What is kept of a page.
pub(crate) trait Cell: Copy + PartialEq {
    /// Nothing is known of the page.
    const UNKNOWN: Self;
    /// The page holds zeros.
    const ZERO: Self;
}

/// Pages in chunks of `N`, which exist only where a page is neither unknown nor zero; the zeros
/// between them are ranges.
///
/// So a length that a file claims costs nothing, and a hole costs one range however large it is.
#[derive(Clone, Debug)]
pub(crate) struct SparsePages<C, const N: usize> {
    chunks: BTreeMap<u64, Box<[C; N]>>,
    /// Of pages in no chunk.
    zeros: RangeSet,
}

impl<C, const N: usize> Default for SparsePages<C, N> {
    fn default() -> Self {
        Self { chunks: BTreeMap::new(), zeros: RangeSet::default() }
    }
}

impl<C: Cell, const N: usize> SparsePages<C, N> {
    pub(crate) fn get(&self, page: PageIndex) -> C {
        let (chunk, at) = Self::place(page);
        match self.chunks.get(&chunk) {
            Some(cells) => cells[at],
            None if self.zeros.contains(page) => C::ZERO,
            None => C::UNKNOWN,
        }
    }

    /// Chunk and place in it.
    pub(crate) fn place(page: PageIndex) -> (u64, usize) {
        (page.0 / N as u64, as_index(page.0 % N as u64))
    }

    fn pages_of(chunk: u64) -> PageRange {
        PageRange::of_len(PageIndex(chunk * N as u64), PageCount(N as u64))
    }

    pub(crate) fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    /// The cells of a chunk that exists.
    pub(crate) fn chunk_if_present(&mut self, chunk: u64) -> Option<&mut [C; N]> {
        self.chunks.get_mut(&chunk).map(Box::as_mut)
    }

    /// The cells of a chunk, which exists from now on.
    pub(crate) fn chunk(&mut self, chunk: u64) -> &mut [C; N] {
        let zeros = &mut self.zeros;
        self.chunks.entry(chunk).or_insert_with(|| {
            let mut cells = Box::new([C::UNKNOWN; N]);
            let pages = Self::pages_of(chunk);
            for part in zeros.within(pages) {
                let place = |page: PageIndex| as_index(page.0 - pages.start.0);
                cells[place(part.start)..place(part.end)].fill(C::ZERO);
            }
            zeros.remove(pages);
            cells
        })
    }

    /// The chunks that `pages` meet, and the part of each that they cover.
    fn met(&self, pages: PageRange) -> Vec<(u64, PageRange)> {
        if pages.is_empty() {
            return Vec::new();
        }
        let (first, last) = (Self::place(pages.start).0, Self::place(PageIndex(pages.end.0 - 1)).0);
        let part = |chunk: u64| {
            let all = Self::pages_of(chunk);
            PageRange::new(all.start.max(pages.start), all.end.min(pages.end))
        };
        self.chunks.range(first..=last).map(|(&chunk, _)| (chunk, part(chunk))).collect()
    }

    /// All of `pages` hold zeros. Costs the chunks that they meet.
    pub(crate) fn set_zero(&mut self, pages: PageRange) {
        self.zeros.insert(pages);
        self.fill_met(pages, C::ZERO);
    }

    /// Gives those of the pages that are in chunks this value; drops chunks of no others.
    fn fill_met(&mut self, pages: PageRange, cell: C) {
        for (chunk, part) in self.met(pages) {
            if part == Self::pages_of(chunk) {
                self.chunks.remove(&chunk);
                continue;
            }
            self.zeros.remove(part);
            if let Some(cells) = self.chunks.get_mut(&chunk) {
                cells[Self::within_chunk(part)].fill(cell);
            }
        }
    }

    /// Nothing is known of the page.
    pub(crate) fn forget(&mut self, page: PageIndex) {
        let (chunk, at) = Self::place(page);
        match self.chunks.get_mut(&chunk) {
            Some(cells) => cells[at] = C::UNKNOWN,
            None => self.zeros.remove(PageRange::single(page)),
        }
    }

    /// Nothing is known of the pages. Costs the chunks that they meet.
    pub(crate) fn forget_all(&mut self, pages: PageRange) {
        self.zeros.remove(pages);
        self.fill_met(pages, C::UNKNOWN);
    }

    fn within_chunk(part: PageRange) -> std::ops::Range<usize> {
        let start = Self::place(part.start).1;
        start..start + part.len().as_usize()
    }

    /// The parts of `pages` that are not known to be zero, ascending. Costs the chunks and ranges
    /// that they meet.
    pub(crate) fn not_zero(&self, pages: PageRange) -> Vec<PageRange> {
        let mut found = Vec::new();
        let mut at = pages.start;
        for (chunk, part) in self.met(pages) {
            found.extend(self.zeros.outside(PageRange::new(at, part.start)));
            let cells =
                self.chunks.get(&chunk).map_or(&[][..], |cells| &cells[Self::within_chunk(part)]);
            let other = part.iter().zip(cells).filter(|(_, cell)| **cell != C::ZERO);
            other.for_each(|(page, _)| push_page(&mut found, page));
            at = part.end;
        }
        found.extend(self.zeros.outside(PageRange::new(at, pages.end)));
        merge(found)
    }

    /// Nothing is known of the pages from `size` on.
    pub(crate) fn truncate(&mut self, size: PageCount) {
        let (last, at) = Self::place(PageIndex(size.0));
        let _beyond = self.chunks.split_off(&(last + 1));
        if let Some(cells) = self.chunks.get_mut(&last) {
            cells[at..].fill(C::UNKNOWN);
        }
        self.zeros.remove(PageRange::new(PageIndex(size.0), PageIndex(u64::MAX)));
    }

    /// Forgets zeros beyond so many ranges.
    pub(crate) fn keep_ranges(&mut self, most: usize) {
        self.zeros.keep(most);
    }

    /// Pages that are known.
    pub(crate) fn known(&self) -> u64 {
        let cells = self.chunks.values().flat_map(|cells| cells.iter());
        cells.filter(|cell| **cell != C::UNKNOWN).count() as u64 + self.zeros.pages().0
    }

    /// Where the run of equal cells that holds `page`, which is in no chunk, ends: at the next
    /// chunk or change, or at `size`.
    pub(crate) fn end_of_ground(&self, page: PageIndex, size: PageCount) -> PageIndex {
        let (chunk, _) = Self::place(page);
        let next_chunk =
            self.chunks.range(chunk..).next().map(|(&chunk, _)| Self::pages_of(chunk).start);
        let change = match self.zeros.range_of(page) {
            Some(range) => Some(range.end),
            None => self.zeros.next_start(page),
        };
        let end = [next_chunk, change].into_iter().flatten().min();
        end.unwrap_or(PageIndex(size.0)).min(PageIndex(size.0))
    }

    pub(crate) fn cells(&self, chunk: u64) -> Option<&[C; N]> {
        self.chunks.get(&chunk).map(Box::as_ref)
    }
}

fn push_page(ranges: &mut Vec<PageRange>, page: PageIndex) {
    match ranges.last_mut() {
        Some(last) if last.end == page => last.end = PageIndex(page.0 + 1),
        _ => ranges.push(PageRange::single(page)),
    }
}

fn merge(ranges: Vec<PageRange>) -> Vec<PageRange> {
    let mut merged: Vec<PageRange> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => merged.push(range),
        }
    }
    merged
}
