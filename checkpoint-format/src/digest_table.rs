//! What the last durable checkpoint holds: one digest a page, so that a page written with its old content isn't stored.

use std::collections::HashMap;
use std::fmt;

use crate::digest::PageDigest;
use crate::names::SpaceName;
use crate::pack::{PackIndex, RunSource};
use crate::units::{ByteLen, PageCount, PageIndex, PageRange};

/// Stands for "unknown": no room is spent on an `Option`. A page whose digest happens to be all zeros (one in 2^128) is
/// only stored again.
const UNKNOWN: [u8; 16] = [0; 16];

/// Pages in a chunk of a sparse table: 1 MiB of the disk in 4 KiB of memory.
const CHUNK_PAGES: u64 = 256;
type Chunk = [[u8; 16]; CHUNK_PAGES as usize];

/// The digests of the pages of one space as the last durable checkpoint has them.
///
/// Not knowing a page is always right and only costs bytes: it is stored though it may be equal. So the table may forget
/// at any time, but must never remember what is no longer so. Hence the two shapes: RAM is dense (all of it is written
/// sooner or later), disks are sparse with a ceiling, past which new pages stay unknown.
#[derive(Clone)]
pub struct DigestTable {
    shape: Shape,
    known: u64,
}

#[derive(Clone)]
enum Shape {
    Dense(Vec<[u8; 16]>),
    Sparse { chunks: HashMap<u64, Box<Chunk>>, max_chunks: usize },
}

impl DigestTable {
    /// For a space of `size` pages; 16 bytes a page, touched only as pages become known.
    pub fn dense(size: PageCount) -> Self {
        Self::with(Shape::Dense(vec![UNKNOWN; size.as_usize()]))
    }

    /// For a space of any size, in at most `limit` bytes of digests.
    pub fn sparse(limit: ByteLen) -> Self {
        Self::with(Shape::Sparse { chunks: HashMap::new(), max_chunks: limit.as_usize() / size_of::<Chunk>() })
    }

    fn with(shape: Shape) -> Self {
        Self { shape, known: 0 }
    }

    pub fn get(&self, page: PageIndex) -> Option<PageDigest> {
        self.slot(page).filter(|&digest| *digest != UNKNOWN).map(|&digest| PageDigest(digest))
    }

    /// Whether the durable checkpoint is known to hold just this content.
    pub fn holds(&self, page: PageIndex, digest: PageDigest) -> bool {
        self.get(page) == Some(digest)
    }

    /// Remembers the page's content; without room for it the page stays unknown.
    pub fn set(&mut self, page: PageIndex, digest: PageDigest) {
        if let Some(slot) = self.slot_or_new(page) {
            let before = std::mem::replace(slot, digest.0);
            self.known += u64::from(digest.0 != UNKNOWN);
            self.known -= u64::from(before != UNKNOWN);
        }
    }

    pub fn forget(&mut self, page: PageIndex) {
        if let Some(slot) = self.slot_mut(page) {
            let before = std::mem::replace(slot, UNKNOWN);
            self.known -= u64::from(before != UNKNOWN);
        }
    }

    /// Forgets the pages from `size` on: when a disk shrinks, what it held there is not what it will hold when it grows.
    pub fn truncate(&mut self, size: PageCount) {
        match &mut self.shape {
            Shape::Dense(slots) => {
                let len = slots.len();
                slots[size.as_usize().min(len)..].fill(UNKNOWN);
            }
            Shape::Sparse { chunks, .. } => truncate_chunks(chunks, size),
        }
        self.known = self.slots().filter(|&slot| *slot != UNKNOWN).count() as u64;
    }

    /// Pages whose content is known.
    pub fn known(&self) -> PageCount {
        PageCount(self.known)
    }

    /// Takes in what a pack of the durable lineage holds for `space`; apply packs oldest to newest.
    pub fn apply_pack(&mut self, space: &SpaceName, index: &PackIndex) {
        for run in index.runs_of(space) {
            match run.source {
                RunSource::Zero => self.set_zero(run.pages),
                RunSource::Frame { .. } => {
                    for (page, &digest) in run.pages.iter().zip(index.run_digests(run)) {
                        self.set(page, digest);
                    }
                }
            }
        }
    }

    /// A run of zeros takes no room in a sparse table: storing it again costs one record, remembering it a chunk a MiB.
    fn set_zero(&mut self, pages: PageRange) {
        match &self.shape {
            Shape::Dense(slots) => {
                let size = PageCount(slots.len() as u64);
                self.set_each(pages.clip(size).iter());
            }
            Shape::Sparse { chunks, .. } => {
                let present = present_pages(chunks, pages);
                self.set_each(present.into_iter().flat_map(PageRange::iter));
            }
        }
    }

    fn set_each(&mut self, pages: impl Iterator<Item = PageIndex>) {
        for page in pages {
            self.set(page, PageDigest::ZERO_PAGE);
        }
    }

    fn slots(&self) -> Box<dyn Iterator<Item = &[u8; 16]> + '_> {
        match &self.shape {
            Shape::Dense(slots) => Box::new(slots.iter()),
            Shape::Sparse { chunks, .. } => Box::new(chunks.values().flat_map(|chunk| chunk.iter())),
        }
    }

    fn slot(&self, page: PageIndex) -> Option<&[u8; 16]> {
        match &self.shape {
            Shape::Dense(slots) => slots.get(page.as_usize()),
            Shape::Sparse { chunks, .. } => {
                let (chunk, at) = place(page);
                chunks.get(&chunk).map(|chunk| &chunk[at])
            }
        }
    }

    fn slot_mut(&mut self, page: PageIndex) -> Option<&mut [u8; 16]> {
        match &mut self.shape {
            Shape::Dense(slots) => slots.get_mut(page.as_usize()),
            Shape::Sparse { chunks, .. } => {
                let (chunk, at) = place(page);
                chunks.get_mut(&chunk).map(|chunk| &mut chunk[at])
            }
        }
    }

    fn slot_or_new(&mut self, page: PageIndex) -> Option<&mut [u8; 16]> {
        if let Shape::Sparse { chunks, max_chunks } = &mut self.shape {
            let (chunk, _) = place(page);
            if chunks.len() < *max_chunks {
                chunks.entry(chunk).or_insert_with(|| Box::new([UNKNOWN; CHUNK_PAGES as usize]));
            }
        }
        self.slot_mut(page)
    }
}

fn place(page: PageIndex) -> (u64, usize) {
    (page.0 / CHUNK_PAGES, (page.0 % CHUNK_PAGES) as usize)
}

/// The parts of `pages` that lie in chunks which exist, found from the shorter side.
fn present_pages(chunks: &HashMap<u64, Box<Chunk>>, pages: PageRange) -> Vec<PageRange> {
    if pages.is_empty() {
        return Vec::new();
    }
    let (first, _) = place(pages.start);
    let (last, _) = place(PageIndex(pages.end.0 - 1));
    let part = |chunk: u64| {
        let start = PageIndex(chunk * CHUNK_PAGES).max(pages.start);
        let end = PageIndex((chunk + 1) * CHUNK_PAGES).min(pages.end);
        PageRange::new(start, end)
    };
    if last - first < chunks.len() as u64 {
        let present = (first..=last).filter(|chunk| chunks.contains_key(chunk));
        present.map(part).collect()
    } else {
        let touched = chunks.keys().filter(|&&chunk| first <= chunk && chunk <= last);
        touched.copied().map(part).collect()
    }
}

fn truncate_chunks(chunks: &mut HashMap<u64, Box<Chunk>>, size: PageCount) {
    let (last, at) = place(PageIndex(size.0));
    chunks.retain(|&chunk, _| chunk <= last);
    if let Some(chunk) = chunks.get_mut(&last) {
        chunk[at..].fill(UNKNOWN);
    }
}

impl fmt::Debug for DigestTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DigestTable({} pages known)", self.known)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::pack::testing::{frame, index, ram};

    const A: PageDigest = PageDigest([1; 16]);
    const B: PageDigest = PageDigest([2; 16]);

    #[test]
    fn both_shapes_remember_replace_and_forget() {
        for mut table in [DigestTable::dense(PageCount(1000)), DigestTable::sparse(ByteLen(1 << 20))] {
            assert_eq!(table.get(PageIndex(999)), None);
            table.set(PageIndex(999), A);
            table.set(PageIndex(999), B);
            table.set(PageIndex(3), A);
            assert!(table.holds(PageIndex(999), B) && !table.holds(PageIndex(999), A));
            assert_eq!(table.known(), PageCount(2));
            table.forget(PageIndex(999));
            assert_eq!((table.get(PageIndex(999)), table.known()), (None, PageCount(1)));
        }
    }

    #[test]
    fn past_the_limit_new_pages_stay_unknown_and_old_ones_stay_true() {
        let mut table = DigestTable::sparse(ByteLen(2 * 4096));
        table.set(PageIndex(0), A);
        table.set(PageIndex(CHUNK_PAGES), A);
        table.set(PageIndex(2 * CHUNK_PAGES), A);
        assert_eq!(table.get(PageIndex(2 * CHUNK_PAGES)), None);
        table.set(PageIndex(CHUNK_PAGES), B);
        table.set(PageIndex(1), B);
        assert!(table.holds(PageIndex(CHUNK_PAGES), B) && table.holds(PageIndex(1), B));
        assert_eq!(table.known(), PageCount(3));
    }

    #[test]
    fn a_shrunken_disk_forgets_its_tail() {
        for mut table in [DigestTable::dense(PageCount(1000)), DigestTable::sparse(ByteLen(1 << 20))] {
            for page in [0, 99, 100, 255, 256, 700] {
                table.set(PageIndex(page), A);
            }
            table.truncate(PageCount(100));
            assert_eq!(table.known(), PageCount(2));
            assert_eq!(table.get(PageIndex(100)), None);
            assert!(table.holds(PageIndex(99), A));
        }
    }

    #[test]
    fn a_page_outside_a_dense_table_stays_unknown() {
        let mut table = DigestTable::dense(PageCount(10));
        table.set(PageIndex(10), A);
        assert_eq!((table.get(PageIndex(10)), table.known()), (None, PageCount(0)));
    }

    #[test]
    fn a_pack_makes_its_pages_known_and_the_last_record_counts() {
        let index = index(|pack, spaces| {
            let space = spaces.id(&ram()).expect("in the table");
            let zero = PageRange::new(PageIndex(2), PageIndex(1000));
            pack.push_frame(frame(space, [1, 2])).expect("room");
            pack.push_zero(space, zero).expect("room");
            pack.push_frame(frame(space, [700])).expect("room");
        });
        let mut dense = DigestTable::dense(PageCount(800));
        let mut sparse = DigestTable::sparse(ByteLen(1 << 20));
        for table in [&mut dense, &mut sparse] {
            table.apply_pack(&ram(), &index);
            assert!(table.holds(PageIndex(1), A));
            assert!(table.holds(PageIndex(2), PageDigest::ZERO_PAGE));
            assert!(table.holds(PageIndex(700), PageDigest([700_u64 as u8; 16])));
        }
        assert_eq!(dense.known(), PageCount(799));
        // Only the chunks that hold data know of the zeros in them.
        assert_eq!(sparse.get(PageIndex(300)), None);
        assert_eq!(sparse.known(), PageCount(255 + 1));
    }

    #[test]
    fn zeros_replace_what_a_sparse_table_knows() {
        let index = index(|pack, spaces| {
            let space = spaces.id(&ram()).expect("in the table");
            pack.push_zero(space, PageRange::new(PageIndex(255), PageIndex(513))).expect("room");
        });
        let mut table = DigestTable::sparse(ByteLen(1 << 20));
        for page in [254, 255, 256, 512, 513, 9999] {
            table.set(PageIndex(page), A);
        }
        table.apply_pack(&ram(), &index);
        for (page, digest) in [(254, A), (255, PageDigest::ZERO_PAGE), (512, PageDigest::ZERO_PAGE), (513, A)] {
            assert!(table.holds(PageIndex(page), digest), "page {page}");
        }
    }
}
