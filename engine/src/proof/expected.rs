//! What a checkpoint's lineage says that a space holds: a digest for each page that some pack has.
//!
//! Built from the pack indexes alone, by other code than the page map by which a restore finds its
//! frames, so that a fault of one of them shows.

use crate::lineage::Lineage;
use anyhow::{Context, Result};
use checkpoint_format::{PackIndex, PageDigest, PageRange, RunSource, SpaceName, as_index};
use std::collections::HashMap;

/// Pages in a chunk of a table: 1 MiB of a space in 4 KiB of memory.
const CHUNK: u64 = 256;
/// Stands for a page that no pack has.
const UNKNOWN: PageDigest = PageDigest([0; 16]);

#[derive(Clone, Debug)]
enum Chunk {
    /// All of it is zero; disks have many of these.
    Zero,
    Pages(Box<[PageDigest; as_index(CHUNK)]>),
}

/// The pages of one space.
#[derive(Clone, Debug, Default)]
pub(super) struct Expected {
    chunks: HashMap<u64, Chunk>,
    pages: u64,
}

impl Expected {
    /// None where no pack has the page: then a layer below has it, or it is zero.
    pub(super) fn get(&self, page: u64) -> Option<PageDigest> {
        match self.chunks.get(&(page / CHUNK))? {
            Chunk::Zero => Some(PageDigest::ZERO_PAGE),
            Chunk::Pages(pages) => {
                Some(pages[as_index(page % CHUNK)]).filter(|digest| *digest != UNKNOWN)
            }
        }
    }

    /// Whether all pages from `start` to `end` are unknown.
    pub(super) fn is_unknown(&self, start: u64, end: u64) -> bool {
        (start / CHUNK..=(end.max(start + 1) - 1) / CHUNK)
            .all(|chunk| !self.chunks.contains_key(&chunk))
            || (start..end).all(|page| self.get(page).is_none())
    }

    /// Whether the chunks of all pages from `start` to `end` are zero as a whole.
    pub(super) fn is_zero(&self, start: u64, end: u64) -> bool {
        (start / CHUNK..=(end.max(start + 1) - 1) / CHUNK)
            .all(|chunk| matches!(self.chunks.get(&chunk), Some(Chunk::Zero)))
    }

    /// Pages that are known not to be zero.
    pub(super) fn data_pages(&self) -> u64 {
        let count = |chunk: &Chunk| match chunk {
            Chunk::Zero => 0,
            Chunk::Pages(pages) => pages
                .iter()
                .filter(|page| **page != UNKNOWN && **page != PageDigest::ZERO_PAGE)
                .count() as u64,
        };
        self.chunks.values().map(count).sum()
    }

    fn set(&mut self, page: u64, digest: PageDigest) {
        let chunk = self
            .chunks
            .entry(page / CHUNK)
            .or_insert_with(|| Chunk::Pages(Box::new([UNKNOWN; as_index(CHUNK)])));
        if let Chunk::Zero = chunk {
            *chunk = Chunk::Pages(Box::new([PageDigest::ZERO_PAGE; as_index(CHUNK)]));
        }
        if let Chunk::Pages(pages) = chunk {
            pages[as_index(page % CHUNK)] = digest;
        }
    }

    fn set_zero(&mut self, start: u64, end: u64) {
        let mut page = start;
        while page < end {
            let next = (page / CHUNK + 1) * CHUNK;
            if page.is_multiple_of(CHUNK) && next <= end {
                self.chunks.insert(page / CHUNK, Chunk::Zero);
            } else {
                (page..next.min(end)).for_each(|page| self.set(page, PageDigest::ZERO_PAGE));
            }
            page = next;
        }
    }

    /// What a shrunken space lost does not come back: it grows with zeros.
    fn resize(&mut self, pages: u64) {
        if pages < self.pages {
            self.chunks.retain(|chunk, _| chunk * CHUNK < pages);
            let end = (pages / CHUNK + 1) * CHUNK;
            (pages..end)
                .filter(|page| self.get(*page).is_some())
                .collect::<Vec<_>>()
                .into_iter()
                .for_each(|page| self.set(page, UNKNOWN));
        } else if self.pages > 0 {
            self.set_zero(self.pages, pages);
        }
        self.pages = pages;
    }

    fn apply(&mut self, name: &SpaceName, index: &PackIndex) {
        for run in index.runs_of(name) {
            let PageRange { start, end } = run.pages;
            match run.source {
                RunSource::Zero => self.set_zero(start.0, end.0.min(self.pages)),
                RunSource::Frame { .. } => {
                    let size = self.pages;
                    let pages = run
                        .pages
                        .iter()
                        .zip(index.run_digests(run))
                        .filter(|(page, _)| page.0 < size);
                    pages.for_each(|(page, digest)| self.set(page.0, *digest));
                }
            }
        }
    }
}

/// Every space of the newest checkpoint of `lineage`. `indexes` are those of its packs, in order.
pub(super) fn of_lineage(
    lineage: &Lineage,
    indexes: &[PackIndex],
) -> Result<HashMap<SpaceName, Expected>> {
    let newest = lineage.manifests().next_back().context("a lineage without a checkpoint")?;
    newest
        .spaces
        .iter()
        .map(|space| Ok((space.name.clone(), of_space(&space.name, lineage, indexes)?)))
        .collect()
}

fn of_space(name: &SpaceName, lineage: &Lineage, indexes: &[PackIndex]) -> Result<Expected> {
    let mut expected: Option<Expected> = None;
    let mut next = 0;
    for manifest in lineage.manifests() {
        let packs = next..next + manifest.packs.len();
        next = packs.end;
        // A disk of this name that comes later is another one.
        let Some(record) = manifest.space(name) else {
            expected = None;
            continue;
        };
        let pages = expected.get_or_insert_default();
        pages.resize(record.pages().0);
        for index in indexes.get(packs).context("a pack of the lineage has no index")? {
            pages.apply(name, index);
        }
    }
    expected.context("a space that is in no checkpoint")
}

#[cfg(test)]
mod test {
    use super::*;

    const ONE: PageDigest = PageDigest([1; 16]);

    #[test]
    fn zeros_fill_whole_chunks_and_parts() {
        let mut pages = Expected::default();
        pages.resize(4 * CHUNK);
        pages.set(CHUNK + 3, ONE);
        pages.set_zero(CHUNK - 1, 3 * CHUNK + 1);
        let found =
            [CHUNK - 2, CHUNK - 1, CHUNK + 3, 3 * CHUNK, 3 * CHUNK + 1].map(|page| pages.get(page));
        let zero = Some(PageDigest::ZERO_PAGE);
        assert_eq!(found, [None, zero, zero, zero, None]);
        assert!(pages.is_zero(CHUNK * 2, CHUNK * 3) && !pages.is_zero(CHUNK * 2, CHUNK * 3 + 1));
        pages.set(2 * CHUNK + 5, ONE);
        assert!(!pages.is_zero(CHUNK * 2, CHUNK * 2 + 1));
        assert_eq!(
            (pages.get(2 * CHUNK + 5), pages.get(2 * CHUNK + 6), pages.data_pages()),
            (Some(ONE), zero, 1)
        );
        assert!(
            pages.is_unknown(0, 5)
                && !pages.is_unknown(0, CHUNK)
                && pages.is_unknown(3 * CHUNK + 1, 4 * CHUNK)
        );
    }

    #[test]
    fn a_shrunken_space_grows_with_zeros() {
        let mut pages = Expected::default();
        pages.resize(CHUNK + 9);
        pages.set(CHUNK + 8, ONE);
        pages.set(3, ONE);
        pages.resize(CHUNK + 2);
        assert_eq!(pages.get(CHUNK + 8), None);
        pages.resize(CHUNK + 9);
        assert_eq!(
            (pages.get(CHUNK + 8), pages.get(3), pages.get(CHUNK + 1)),
            (Some(PageDigest::ZERO_PAGE), Some(ONE), None)
        );
    }
}
