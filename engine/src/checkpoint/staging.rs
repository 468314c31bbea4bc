//! Staging memory for copied pages: one block of a fixed capacity, filled in the pause by plain
//! copying.
//!
//! A page may be staged again (dirtied between a pre-copy pass and the pause); nothing is searched
//! while the guest is paused, so both copies stay and [`Staging::newest`] takes the later one. That
//! is what keeps a page that was dirtied twice from being stored twice.

use anyhow::{Context, Result, bail};
use checkpoint_format::{PAGE_SIZE, PageCount, PageIndex, PageRange};

/// Room for copied pages: 160 MiB. With packs being filled, written and waiting (96 MiB) that is
/// the staging of 256 MiB.
const STAGING_PAGES: PageCount = PageCount((160 << 20) / 4096);

/// Which space of the VM, as the checkpoint numbers them.
pub(super) type SpaceNumber = u16;

/// The number of the space at a place in the checkpoint's list.
///
/// # Errors
/// For a list that no manifest could have: their limit is far below 65,536 spaces.
pub(super) fn space_number(place: usize) -> Result<SpaceNumber> {
    SpaceNumber::try_from(place)
        .with_context(|| format!("the VM has more than {place} RAM blocks and disks"))
}

pub(super) struct Staging {
    memory: Vec<u8>,
    used: usize,
    capacity: usize,
    ranges: Vec<StagedRange>,
}

#[derive(Clone, Copy, Debug)]
struct StagedRange {
    space: SpaceNumber,
    pages: PageRange,
    offset: usize,
}

/// One staged page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StagedPage {
    pub space: SpaceNumber,
    pub page: PageIndex,
    offset: usize,
}

impl Staging {
    /// Reserves addresses only; memory is touched by [`Staging::prefault`] or when it is used.
    pub(super) fn new(capacity: PageCount) -> Self {
        let capacity = capacity.as_usize() * PAGE_SIZE;
        Self { memory: Vec::with_capacity(capacity), used: 0, capacity, ranges: Vec::new() }
    }

    pub(super) fn capacity(&self) -> PageCount {
        PageCount((self.capacity / PAGE_SIZE) as u64)
    }

    pub(super) fn free(&self) -> PageCount {
        PageCount(((self.capacity - self.used) / PAGE_SIZE) as u64)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Has room for `pages` more without a page fault, so that the pause pays for copying only.
    pub(super) fn prefault(&mut self, pages: PageCount) {
        let wanted = (self.used + pages.as_usize() * PAGE_SIZE).min(self.capacity);
        if wanted > self.memory.len() {
            self.memory.resize(wanted, 0);
        }
    }

    /// Room for one range, to be filled by the caller.
    pub(super) fn push(&mut self, space: SpaceNumber, pages: PageRange) -> Result<&mut [u8]> {
        let bytes = pages.byte_len().as_usize();
        if bytes > self.capacity - self.used {
            bail!(
                "{} pages do not fit into the {} free pages of the staging memory",
                pages.len(),
                self.free()
            );
        }
        let offset = self.used;
        self.used += bytes;
        if self.used > self.memory.len() {
            self.memory.resize(self.used, 0);
        }
        self.ranges.push(StagedRange { space, pages, offset });
        Ok(&mut self.memory[offset..offset + bytes])
    }

    /// Each staged page once, in its newest copy, ordered by space and page.
    pub(super) fn newest(&self) -> Vec<StagedPage> {
        let mut pages: Vec<StagedPage> = self.ranges.iter().flat_map(StagedRange::pages).collect();
        // Stable: of equal pages the later copy stays last.
        pages.sort_by_key(|staged| (staged.space, staged.page));
        pages.reverse();
        pages.dedup_by_key(|staged| (staged.space, staged.page));
        pages.reverse();
        pages
    }

    pub(super) fn bytes(&self, staged: StagedPage) -> &[u8] {
        &self.memory[staged.offset..staged.offset + PAGE_SIZE]
    }

    /// Empties it, and keeps up to `keep` of its memory for the next use.
    pub(super) fn clear(&mut self, keep: PageCount) {
        self.used = 0;
        self.ranges.clear();
        if self.memory.len() > keep.as_usize() * PAGE_SIZE {
            self.memory = Vec::with_capacity(self.capacity);
        }
    }
}

impl Default for Staging {
    fn default() -> Self {
        Self::new(STAGING_PAGES)
    }
}

impl StagedRange {
    fn pages(&self) -> impl Iterator<Item = StagedPage> + use<> {
        let Self { space, offset, .. } = *self;
        self.pages.iter().enumerate().map(move |(number, page)| StagedPage {
            space,
            page,
            offset: offset + number * PAGE_SIZE,
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::new(PageIndex(start), PageIndex(end))
    }

    #[test]
    fn the_later_copy_of_a_page_wins() {
        let mut staging = Staging::new(PageCount(8));
        staging.push(0, range(4, 7)).unwrap().fill(1);
        staging.push(1, range(5, 6)).unwrap().fill(2);
        staging.push(0, range(5, 6)).unwrap().fill(3);
        let newest: Vec<_> = staging
            .newest()
            .iter()
            .map(|page| (page.space, page.page.0, staging.bytes(*page)[9]))
            .collect();
        assert_eq!(newest, [(0, 4, 1), (0, 5, 3), (0, 6, 1), (1, 5, 2)]);
    }

    #[test]
    fn the_capacity_is_a_limit() {
        let mut staging = Staging::new(PageCount(2));
        staging.prefault(PageCount(100));
        staging.push(0, range(0, 2)).unwrap();
        assert!(staging.push(0, range(2, 3)).is_err());
        staging.clear(PageCount(0));
        assert_eq!(staging.free(), PageCount(2));
        staging.push(0, range(2, 3)).unwrap();
    }
}
