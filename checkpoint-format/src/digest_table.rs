//! What the last durable checkpoint holds: one digest a page, so that a page written with its old
//! content isn't stored.

use std::fmt;

use crate::digest::PageDigest;
use crate::names::SpaceName;
use crate::pack::{PackIndex, RunSource};
use crate::sparse_pages::{Cell, SparsePages};
use crate::units::{ByteLen, PageCount, PageIndex, PageRange};

/// Pages in a chunk of a sparse table: 1 MiB of the disk in 4 KiB of memory.
const CHUNK_PAGES: usize = 256;
/// A sparse table may also have one range of zeros (some 50 bytes) for each so many bytes of its
/// limit.
const LIMIT_PER_RANGE: usize = 256;

/// A page's digest. "Unknown" is all zeros, so that no room is spent on an `Option`: a page that
/// has this digest (one in 2^128) is only stored again.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Known([u8; 16]);

impl Cell for Known {
    const UNKNOWN: Self = Self([0; 16]);
    const ZERO: Self = Self(PageDigest::ZERO_PAGE.0);
}

type Pages = SparsePages<Known, CHUNK_PAGES>;

/// The digests of the pages of one space as the last durable checkpoint has them.
///
/// A page may always be unknown; that only costs bytes, since it is stored even if it is equal. So
/// the table may forget a digest at any time, but must never keep one that is no longer right.
/// Hence the two shapes: RAM is dense (all of it is written sooner or later), disks are sparse with
/// a limit, beyond which new pages stay unknown. Zeros of a disk are ranges: a hole costs as much
/// as a page.
#[derive(Clone)]
pub struct DigestTable(Shape);

#[derive(Clone)]
enum Shape {
    Dense(Vec<Known>),
    Sparse { pages: Pages, max_chunks: usize, max_ranges: usize },
}

impl DigestTable {
    /// For a space of `size` pages; 16 bytes a page, touched only as pages become known.
    pub fn dense(size: PageCount) -> Self {
        Self(Shape::Dense(vec![Known::UNKNOWN; size.as_usize()]))
    }

    /// For a space of any size, in at most `limit` bytes of digests and a fifth of that for ranges
    /// of zeros.
    pub fn sparse(limit: ByteLen) -> Self {
        let limit = limit.as_usize();
        let max_chunks = limit / (CHUNK_PAGES * size_of::<Known>());
        Self(Shape::Sparse {
            pages: Pages::default(),
            max_chunks,
            max_ranges: (limit / LIMIT_PER_RANGE).max(1),
        })
    }

    /// The digest of a page, if it is known.
    pub fn get(&self, page: PageIndex) -> Option<PageDigest> {
        let known = match &self.0 {
            Shape::Dense(slots) => slots.get(page.as_usize()).copied().unwrap_or(Known::UNKNOWN),
            Shape::Sparse { pages, .. } => pages.get(page),
        };
        (known != Known::UNKNOWN).then_some(PageDigest(known.0))
    }

    /// Whether the durable checkpoint is known to hold just this content.
    pub fn holds(&self, page: PageIndex, digest: PageDigest) -> bool {
        self.get(page) == Some(digest)
    }

    /// Remembers the page's content; without room for it the page stays unknown.
    pub fn set(&mut self, page: PageIndex, digest: PageDigest) {
        match &mut self.0 {
            Shape::Dense(slots) => {
                if let Some(slot) = slots.get_mut(page.as_usize()) {
                    *slot = Known(digest.0);
                }
            }
            Shape::Sparse { .. } => self.set_sparse(page, digest),
        }
    }

    fn set_sparse(&mut self, page: PageIndex, digest: PageDigest) {
        let Shape::Sparse { pages, max_chunks, .. } = &mut self.0 else { return };
        let (chunk, at) = Pages::place(page);
        if let Some(cells) = pages.chunk_if_present(chunk) {
            cells[at] = Known(digest.0);
        } else if digest == PageDigest::ZERO_PAGE {
            self.set_zero(PageRange::single(page));
        } else if pages.chunk_count() < *max_chunks {
            pages.chunk(chunk)[at] = Known(digest.0);
        } else {
            self.forget(page);
        }
    }

    /// Remembers that all of `pages` hold zeros.
    pub fn set_zero(&mut self, pages: PageRange) {
        match &mut self.0 {
            Shape::Dense(slots) => {
                let pages = pages.clip(PageCount(slots.len() as u64));
                slots[pages.start.as_usize()..pages.end.as_usize()].fill(Known::ZERO);
            }
            Shape::Sparse { pages: known, max_ranges, .. } => {
                known.set_zero(pages);
                known.keep_ranges(*max_ranges);
            }
        }
    }

    /// The parts of `pages` that the durable checkpoint is not known to hold zeros in, ascending.
    pub fn not_zero(&self, pages: PageRange) -> Vec<PageRange> {
        match &self.0 {
            Shape::Sparse { pages: known, .. } => known.not_zero(pages),
            Shape::Dense(slots) => {
                let mut found: Vec<PageRange> = Vec::new();
                for page in
                    pages.iter().filter(|page| slots.get(page.as_usize()) != Some(&Known::ZERO))
                {
                    match found.last_mut() {
                        Some(last) if last.end == page => last.end = PageIndex(page.0 + 1),
                        _ => found.push(PageRange::single(page)),
                    }
                }
                found
            }
        }
    }

    /// Makes the digest of a page unknown.
    pub fn forget(&mut self, page: PageIndex) {
        match &mut self.0 {
            Shape::Dense(slots) => {
                if let Some(slot) = slots.get_mut(page.as_usize()) {
                    *slot = Known::UNKNOWN;
                }
            }
            Shape::Sparse { pages, max_ranges, .. } => {
                pages.forget(page);
                pages.keep_ranges(*max_ranges);
            }
        }
    }

    /// Makes the digests of all of `pages` unknown.
    pub fn forget_all(&mut self, pages: PageRange) {
        match &mut self.0 {
            Shape::Dense(slots) => {
                let pages = pages.clip(PageCount(slots.len() as u64));
                slots[pages.start.as_usize()..pages.end.as_usize()].fill(Known::UNKNOWN);
            }
            Shape::Sparse { pages: known, max_ranges, .. } => {
                known.forget_all(pages);
                known.keep_ranges(*max_ranges);
            }
        }
    }

    /// Forgets the pages from `size` on: when a disk shrinks, what it held there is not what it
    /// will hold when it grows.
    pub fn truncate(&mut self, size: PageCount) {
        match &mut self.0 {
            Shape::Dense(slots) => {
                let len = slots.len();
                slots[size.as_usize().min(len)..].fill(Known::UNKNOWN);
            }
            Shape::Sparse { pages, .. } => pages.truncate(size),
        }
    }

    /// Number of pages whose content is known. Reads the whole table.
    pub fn known(&self) -> PageCount {
        PageCount(match &self.0 {
            Shape::Dense(slots) => {
                slots.iter().filter(|slot| **slot != Known::UNKNOWN).count() as u64
            }
            Shape::Sparse { pages, .. } => pages.known(),
        })
    }

    /// Adds what a pack of the durable lineage holds for `space`; apply packs oldest to newest.
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
}

impl fmt::Debug for DigestTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DigestTable({} pages known)", self.known())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::pack::testing::{frame, index, ram};
    use crate::units::MAX_SPACE_PAGES;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const A: PageDigest = PageDigest([1; 16]);
    const B: PageDigest = PageDigest([2; 16]);
    const CHUNK: u64 = CHUNK_PAGES as u64;

    #[test]
    fn both_shapes_remember_replace_and_forget() {
        for mut table in
            [DigestTable::dense(PageCount(1000)), DigestTable::sparse(ByteLen(1 << 20))]
        {
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
    fn both_shapes_forget_ranges() {
        let range = |start, end| PageRange::new(PageIndex(start), PageIndex(end));
        for mut table in
            [DigestTable::dense(PageCount(2000)), DigestTable::sparse(ByteLen(1 << 20))]
        {
            table.set_zero(range(0, 2 * CHUNK));
            (3 * CHUNK - 9..4 * CHUNK + 9).for_each(|page| table.set(PageIndex(page), A));
            table.forget_all(range(CHUNK, 4 * CHUNK + 3));
            assert_eq!(table.known(), PageCount(CHUNK + 6));
            assert_eq!(table.get(PageIndex(4 * CHUNK + 3)), Some(A));
            assert_eq!(table.get(PageIndex(CHUNK - 1)), Some(PageDigest::ZERO_PAGE));
        }
    }

    #[test]
    fn past_the_limit_new_pages_stay_unknown_and_old_ones_stay_true() {
        let mut table = DigestTable::sparse(ByteLen(2 * 4096));
        table.set(PageIndex(0), A);
        table.set(PageIndex(CHUNK), A);
        table.set(PageIndex(2 * CHUNK), A);
        assert_eq!(table.get(PageIndex(2 * CHUNK)), None);
        table.set(PageIndex(CHUNK), B);
        table.set(PageIndex(1), B);
        assert!(table.holds(PageIndex(CHUNK), B) && table.holds(PageIndex(1), B));
        assert_eq!(table.known(), PageCount(3));
    }

    #[test]
    fn a_shrunken_disk_forgets_its_tail() {
        for mut table in
            [DigestTable::dense(PageCount(1000)), DigestTable::sparse(ByteLen(1 << 20))]
        {
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
        // A sparse table has no size of its own.
        assert!(sparse.holds(PageIndex(300), PageDigest::ZERO_PAGE));
        assert_eq!(sparse.known(), PageCount(999));
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
        for (page, digest) in
            [(254, A), (255, PageDigest::ZERO_PAGE), (512, PageDigest::ZERO_PAGE), (513, A)]
        {
            assert!(table.holds(PageIndex(page), digest), "page {page}");
        }
    }

    #[test]
    fn sparse_table_of_a_huge_hole_is_one_range() {
        let mut table = DigestTable::sparse(ByteLen(1 << 20));
        let all = PageRange::new(PageIndex(0), PageIndex(MAX_SPACE_PAGES));
        table.set_zero(all);
        table.set(PageIndex(1 << 30), A);
        assert_eq!(table.known(), PageCount(MAX_SPACE_PAGES));
        let one = PageRange::single(PageIndex(1 << 30));
        assert_eq!(table.not_zero(all), [one]);
        table.set_zero(all);
        assert_eq!(table.not_zero(all), []);
    }

    #[test]
    fn sparse_table_past_its_limits_forgets_and_never_lies() {
        let mut table = DigestTable::sparse(ByteLen(4096));
        table.set_zero(PageRange::new(PageIndex(0), PageIndex(100_000)));
        table.set(PageIndex(0), A);
        // No room for a second chunk: the page is no zero any more, and not known.
        table.set(PageIndex(9999), A);
        assert_eq!(table.get(PageIndex(9999)), None);
        assert!(table.holds(PageIndex(9998), PageDigest::ZERO_PAGE));
        (0..1000).for_each(|number| table.forget(PageIndex(20_000 + 2 * number)));
        assert_eq!(table.get(PageIndex(20_000)), None);
        assert!(table.get(PageIndex(21_001)).is_none_or(|digest| digest == PageDigest::ZERO_PAGE));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Set(u64, u8),
        Zero(PageRange),
        Forget(u64),
        Truncate(u64),
    }

    const SIZE: u64 = 4 * CHUNK;

    fn any_range() -> impl Strategy<Value = PageRange> {
        (0..=SIZE, 0..=SIZE)
            .prop_map(|(start, end)| PageRange::new(PageIndex(start), PageIndex(end)))
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..SIZE, 0..3_u8).prop_map(|(page, digest)| Step::Set(page, digest)),
            3 => any_range().prop_map(Step::Zero),
            1 => (0..SIZE).prop_map(Step::Forget),
            1 => (0..=SIZE).prop_map(Step::Truncate),
        ]
    }

    fn digest(number: u8) -> PageDigest {
        [PageDigest::ZERO_PAGE, A, B][usize::from(number)]
    }

    fn naive_step(naive: &mut BTreeMap<u64, PageDigest>, step: &Step) {
        match step {
            Step::Set(page, number) => drop(naive.insert(*page, digest(*number))),
            Step::Zero(pages) => {
                naive.extend(pages.iter().map(|page| (page.0, PageDigest::ZERO_PAGE)))
            }
            Step::Forget(page) => drop(naive.remove(page)),
            Step::Truncate(size) => naive.retain(|page, _| page < size),
        }
    }

    fn step(table: &mut DigestTable, step: &Step) {
        match step {
            Step::Set(page, number) => table.set(PageIndex(*page), digest(*number)),
            Step::Zero(pages) => table.set_zero(*pages),
            Step::Forget(page) => table.forget(PageIndex(*page)),
            Step::Truncate(size) => table.truncate(PageCount(*size)),
        }
    }

    proptest! {
        /// With room for all it is a map; with less it may not know, but never says what is not so.
        #[test]
        fn digest_table_is_a_map(steps in prop::collection::vec(any_step(), 0..40), asked in any_range()) {
            let mut naive = BTreeMap::new();
            let roomy = [DigestTable::dense(PageCount(SIZE)), DigestTable::sparse(ByteLen(1 << 20))];
            let small = [DigestTable::sparse(ByteLen(2 * 4096)), DigestTable::sparse(ByteLen(600))];
            let (mut roomy, mut small) = (roomy, small);
            for one in &steps {
                naive_step(&mut naive, one);
                roomy.iter_mut().chain(&mut small).for_each(|table| step(table, one));
            }
            for page in 0..SIZE {
                let expected = naive.get(&page).copied();
                prop_assert!(roomy.iter().all(|table| table.get(PageIndex(page)) == expected));
                prop_assert!(small.iter().all(|table| table.get(PageIndex(page)).is_none_or(|found| Some(found) == expected)));
            }
            for table in roomy.iter().chain(&small) {
                let news: Vec<u64> = table.not_zero(asked).into_iter().flat_map(PageRange::iter).map(|page| page.0).collect();
                let is_zero = |page: u64| table.holds(PageIndex(page), PageDigest::ZERO_PAGE);
                prop_assert_eq!(news, asked.iter().map(|page| page.0).filter(|page| !is_zero(*page)).collect::<Vec<_>>());
            }
            prop_assert_eq!(roomy[1].known().0, naive.len() as u64);
        }
    }
}
