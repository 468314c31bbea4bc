//! Pages that QEMU discarded unseen by the write tracking: holes punched into the guest's memory
//! file.
//!
//! For a balloon (inflated, or with free page reporting) QEMU punches holes into the file that is
//! the guest's RAM. Such a page is zero from then on, and no write-protect fault reports it: the
//! kernel keeps the page's protection mark. A hole that the guest reads becomes a page of zeros, so
//! the holes that the file has at a checkpoint do not show it either.
//!
//! The helper therefore maps the file once more ([`WatchMapping`]). A punched hole takes its pages
//! out of that mapping, and they stay out, whatever the guest reads later. So a page that is in the
//! mapping now, and was at the last claim, was not discarded since. And only a page that had
//! content and is zero now can have been discarded unseen: one that was written afterwards is dirty
//! anyway.

use std::ops::Range;

use checkpoint_format::{PAGE_SIZE, PageCount, PageIndex, PageRange, PageSet};

use crate::block::{BlockMemory, TrackedBlock, covering};
use crate::error::TrackerError;
use crate::guest_memory::GuestMemory;
use crate::sys::pagemap::ScanBuffer;
use crate::sys::watch_mapping::WatchMapping;

/// What is mapped in one call, so that the kernel's answer comes before the next page of a running
/// guest changes much.
const MAX_MAPPED: PageCount = PageCount(4096);

/// Runs of pages that a claim checks for holes; each call takes about half a microsecond, in the
/// pause.
const MAX_QUESTIONS: usize = 8192;

/// What is known of each page since the last claim. A page in neither set may have been discarded
/// unseen.
#[derive(Debug)]
struct Known {
    /// In the watching mapping since the last claim; or since a moment after it at which the page
    /// was seen not to be zero.
    mapped: PageSet,
    /// Zero at the last claim or at a moment since: a discard changes nothing.
    zero: PageSet,
}

impl Known {
    fn nothing(pages: PageCount) -> Self {
        Self { mapped: PageSet::new(pages), zero: PageSet::new(pages) }
    }

    fn unknown(&self) -> PageSet {
        let mut unknown = PageSet::full(self.mapped.len());
        unknown.subtract(&self.mapped);
        unknown.subtract(&self.zero);
        unknown
    }

    /// `mapped` are the pages in the mapping now: the others have left it.
    fn keep(&mut self, mapped: &PageSet) {
        self.mapped.intersect_with(mapped);
    }

    /// Pages that were written may no longer be zero. Returns those that were known to be zero.
    fn written(&mut self, written: &PageSet) -> PageSet {
        let mut doubtful = written.clone();
        doubtful.intersect_with(&self.zero);
        self.zero.subtract(written);
        doubtful
    }
}

/// Watches one shared RAM block.
///
/// Costs the helper a page table (2 MiB per GiB that the guest uses) and one fault for each page
/// when it first exists (0.5 s per GiB), both while the guest runs. In the pause it costs one scan
/// of that table: 3 ms in a VM of 12 GiB with 1 GiB in use, 4.5 with 4 GiB in use, beside the 7 ms
/// of the tracker's own scan (Linux 6.18; `tests/measure.rs`). Pages that the kernel takes out of
/// the mapping for other reasons (swapped out, moved) are reported too, once, and compared like any
/// page.
#[derive(Debug)]
pub(crate) struct HoleWatch {
    block: String,
    memory: GuestMemory,
    mapping: WatchMapping,
    buffer: ScanBuffer,
    known: Known,
    /// The pages in the mapping.
    present: PageSet,
}

impl HoleWatch {
    /// `None` for private memory: there the kernel itself reports pages that were discarded.
    pub(crate) fn of(block: &TrackedBlock) -> Result<Option<Self>, TrackerError> {
        let BlockMemory::Shared(memory) = &block.memory else { return Ok(None) };
        let mapping = WatchMapping::new(memory.fd(), block.bytes);
        let mapping =
            mapping.map_err(|source| TrackerError::Holes { block: block.name.clone(), source })?;
        Ok(Some(Self {
            block: block.name.clone(),
            memory: memory.clone(),
            mapping,
            buffer: ScanBuffer::new(),
            known: Known::nothing(block.pages()),
            present: PageSet::new(block.pages()),
        }))
    }

    /// Begins again, with every page protected already, so that what is written from here on is
    /// dirty. The guest may run.
    pub(crate) fn begin(&mut self) -> Result<(), TrackerError> {
        self.begin_stopped()?;
        self.look(&PageSet::new(self.known.zero.len())).map(drop)
    }

    /// The same with the guest stopped, and quick: what exists is mapped by the next
    /// [`Self::look`].
    pub(crate) fn begin_stopped(&mut self) -> Result<(), TrackerError> {
        let mut holes = PageSet::full(self.known.zero.len());
        for data in self.memory.data_in(self.bytes())? {
            holes.remove_range(covering(data));
        }
        self.known.zero = holes;
        self.scan()?;
        self.known.mapped.clone_from(&self.present);
        Ok(())
    }

    /// Finds what was discarded, and maps what is new, so that the pause has little to do. Returns
    /// pages that may be dirty, each once, besides those `written` since the last claim. The guest
    /// may run.
    pub(crate) fn look(&mut self, written: &PageSet) -> Result<PageSet, TrackerError> {
        self.scan()?;
        self.known.keep(&self.present);
        let unknown = self.known.unknown();
        let mut new = written.clone();
        new.subtract(&self.present);
        new.union_with(&unknown);
        let mut news = PageSet::new(unknown.len());
        for run in new.ranges().flat_map(|run| run.chunks(MAX_MAPPED)) {
            let mut holes_from = run.start;
            for data in self.memory.data_in(run.bytes())? {
                let data = covering(data);
                self.found_zero(PageRange::new(holes_from, data.start), &mut news);
                holes_from = data.end;
                self.visit(data, &mut news);
            }
            self.found_zero(PageRange::new(holes_from, run.end), &mut news);
        }
        news.intersect_with(&unknown);
        Ok(news)
    }

    /// Maps pages that exist. What is not zero then was not discarded since the last claim, or it
    /// was written after.
    fn visit(&mut self, pages: PageRange, news: &mut PageSet) {
        // A page that cannot be mapped stays unknown, so the next claim has it, and the read of
        // that page then reports why.
        if self.mapping.map(&pages.bytes()).is_err() {
            return;
        }
        self.present.insert_range(pages);
        for page in pages.iter() {
            match self.mapping.is_zero(page.0 * PAGE_SIZE as u64) {
                true => self.found_zero(PageRange::single(page), news),
                false => self.known.mapped.insert(page),
            }
        }
    }

    fn found_zero(&mut self, pages: PageRange, news: &mut PageSet) {
        self.known.zero.insert_range(pages);
        news.insert_range(pages);
    }

    /// With the guest stopped: pages that may have been discarded since the last claim and were not
    /// in an answer of [`Self::look`]. `written` is what the same claim found written.
    pub(crate) fn claim(&mut self, written: &PageSet) -> Result<PageSet, TrackerError> {
        // First, so that it is known even after a failure: a written page may no longer be zero.
        let mut doubtful = self.known.written(written);
        self.scan()?;
        self.known.keep(&self.present);
        let mut unknown = self.known.unknown();
        unknown.subtract(written);
        doubtful.subtract(&self.present);
        self.known.mapped.clone_from(&self.present);
        self.ask_for_holes(&doubtful)?;
        Ok(unknown)
    }

    /// Pages that were written and then discarded (a guest clears what its balloon takes): zero at
    /// this claim. Without this the next [`Self::look`] would report them once more.
    fn ask_for_holes(&mut self, doubtful: &PageSet) -> Result<(), TrackerError> {
        for run in doubtful.ranges().take(MAX_QUESTIONS) {
            let data = self.memory.data_in(run.bytes())?;
            self.known.zero.insert_range(run);
            data.into_iter().for_each(|data| self.known.zero.remove_range(covering(data)));
        }
        Ok(())
    }

    fn bytes(&self) -> Range<u64> {
        PageRange::new(PageIndex(0), PageIndex(self.known.zero.len().0)).bytes()
    }

    fn scan(&mut self) -> Result<(), TrackerError> {
        let mut present = PageSet::full(self.present.len());
        let found = self
            .mapping
            .not_mapped(&mut self.buffer, |bytes| present.remove_range(covering(bytes)));
        found.map_err(|source| TrackerError::Holes { block: self.block.clone(), source })?;
        self.present = present;
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn set(pages: &[u64]) -> PageSet {
        let mut set = PageSet::new(PageCount(8));
        pages.iter().for_each(|page| set.insert(PageIndex(*page)));
        set
    }

    #[test]
    fn pages_that_left_the_mapping_are_unknown_unless_they_were_zero() {
        let mut known = Known::nothing(PageCount(8));
        assert_eq!(known.unknown().count(), PageCount(8));
        known.mapped = set(&[0, 1, 2, 3]);
        known.zero = set(&[3, 4, 5]);
        known.keep(&set(&[0, 2, 6]));
        assert_eq!(
            known.unknown(),
            set(&[1, 6, 7]),
            "1 left; 3 was zero; 6 came, but was not looked at"
        );
    }

    #[test]
    fn written_pages_are_zero_no_more() {
        let mut known = Known::nothing(PageCount(8));
        known.zero = set(&[3, 4]);
        assert_eq!(known.written(&set(&[0, 3])), set(&[3]));
        assert_eq!(known.zero, set(&[4]));
    }
}
