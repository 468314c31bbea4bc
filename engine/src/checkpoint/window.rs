//! A part of a disk, and what packs that an earlier try stored hold of it.

use checkpoint_format::{
    DigestTable, PackIndex, PageCount, PageDigest, PageIndex, PageRange, RunSource, SpaceName,
    as_index,
};

/// What the packs record for the pages of one part of a disk: 16 bytes a page of the part.
pub(super) struct Window {
    pages: PageRange,
    /// By place in `pages`.
    table: DigestTable,
}

impl Window {
    pub(super) fn new(pages: PageRange) -> Self {
        Self { pages, table: DigestTable::dense(pages.len()) }
    }

    /// Takes in what a pack records; of two packs the later one counts.
    pub(super) fn apply(&mut self, space: &SpaceName, index: &PackIndex) {
        for run in index.runs_of(space) {
            let Some(part) = self.place(run.pages) else { continue };
            if run.source == RunSource::Zero {
                self.table.set_zero(part);
                continue;
            }
            let skipped = as_index(self.pages.start.0 + part.start.0 - run.pages.start.0);
            for (page, digest) in part.iter().zip(&index.run_digests(run)[skipped..]) {
                self.table.set(page, *digest);
            }
        }
    }

    /// What the packs hold of the page, if they hold it and it was not forgotten.
    pub(super) fn get(&self, page: PageIndex) -> Option<PageDigest> {
        let place = self.place(PageRange::single(page))?;
        self.table.get(place.start)
    }

    pub(super) fn forget(&mut self, pages: PageRange) {
        self.place(pages)
            .into_iter()
            .flat_map(PageRange::iter)
            .for_each(|page| self.table.forget(page));
    }

    /// The parts of `pages` that the packs are not known to hold zeros in, ascending.
    pub(super) fn not_zero(&self, pages: PageRange) -> Vec<PageRange> {
        let Some(part) = self.place(pages) else { return vec![pages] };
        let inside = self.table.not_zero(part).into_iter().map(|part| self.shifted(part));
        let before = PageRange::new(pages.start, self.pages.start);
        let behind = PageRange::new(self.pages.end, pages.end);
        let all = [before].into_iter().chain(inside).chain([behind]);
        all.filter(|range| !range.is_empty()).collect()
    }

    /// Pages that the packs hold and that were not forgotten.
    pub(super) fn left(&self) -> PageCount {
        self.table.known()
    }

    /// Those pages, ascending.
    pub(super) fn held(&self) -> Vec<PageRange> {
        let mut found: Vec<PageRange> = Vec::new();
        let all = self.pages.len().all();
        for page in all.iter().filter(|page| self.table.get(*page).is_some()) {
            match found.last_mut() {
                Some(last) if last.end == page => last.end = PageIndex(page.0 + 1),
                _ => found.push(PageRange::single(page)),
            }
        }
        found.into_iter().map(|part| self.shifted(part)).collect()
    }

    /// Where these pages are in the table; `None` if none of them is.
    fn place(&self, pages: PageRange) -> Option<PageRange> {
        let (start, end) = (pages.start.max(self.pages.start), pages.end.min(self.pages.end));
        let first = self.pages.start.0;
        (start < end).then(|| PageRange::new(PageIndex(start.0 - first), PageIndex(end.0 - first)))
    }

    fn shifted(&self, part: PageRange) -> PageRange {
        let first = self.pages.start;
        PageRange::of_len(PageIndex(first.0 + part.start.0), PageCount(part.len().0))
    }
}
