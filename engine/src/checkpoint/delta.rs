//! What differs from the parent, page by page, as jobs for the packer.
//!
//! Each space has a table of digests: those of the pages that a restore of the parent, plus what
//! this checkpoint has stored so far, would have. A page is stored when its digest is not the
//! table's, and the table then takes the new one. So a page that was written with its old content
//! costs nothing, and one that was stored in a pre-copy pass and changed again is stored again,
//! also when it went back to what the parent holds.
//!
//! When the checkpoint fails, the tables have digests of pages that no checkpoint holds:
//! [`Delta::fail`] forgets them. The packs that a failed try has stored are "stored so far" for the
//! next one
//! ([`Delta::carry`]): memory in the tables, a disk's part that is being read in a [`Window`].

use super::staging::SpaceNumber;
use super::window::Window;
use crate::pack::{FrameJob, PackJob};
use anyhow::{Context, Result};
use checkpoint_format::{
    DigestTable, FRAME_PAGES, MAX_PAGES_PER_PACK, PAGE_SIZE, PackIndex, PageCount, PageDigest,
    PageIndex, PageRange, PageRun, PageSet, RangeSet, RunSource, SpaceId, SpaceKind, SpaceName,
    SpaceTable, is_zero,
};

/// Zeros recorded at once: a pack takes no more pages than [`MAX_PAGES_PER_PACK`].
const ZERO_PAGES: PageCount = PageCount(MAX_PAGES_PER_PACK / 4);

/// Ranges of one disk that are compared to tell how much of a carried pack is outdated. Beyond, a
/// pack counts as current.
const MOST_RANGES: usize = 16 << 10;

/// One named array of pages of the VM, and what the last durable checkpoint holds of it.
pub(super) struct Space {
    pub name: SpaceName,
    pub pages: PageCount,
    pub table: DigestTable,
    /// Whether a checkpoint of the lineage has recorded this space, so that what is not recorded
    /// now is what it was then.
    pub in_lineage: bool,
    /// RAM pages stored by the checkpoint under way.
    stored: PageSet,
    carried: CarriedPages,
}

/// What earlier tries have stored of a space for the checkpoint under way.
#[derive(Default)]
struct CarriedPages {
    /// RAM pages that were not offered yet.
    unconfirmed: Option<PageSet>,
    /// Of a disk: the part that is being read, but for the pages that were offered.
    window: Option<Window>,
    /// Of a disk: pages of the packs seen so far.
    ranges: RangeSet,
}

impl Space {
    pub(super) fn new(name: SpaceName, pages: PageCount, table: DigestTable) -> Self {
        let counted = if name.kind() == SpaceKind::Ram { pages } else { PageCount(0) };
        Self {
            name,
            pages,
            table,
            in_lineage: false,
            stored: PageSet::new(counted),
            carried: CarriedPages::default(),
        }
    }

    fn holds(&self, page: PageIndex, digest: PageDigest) -> bool {
        let carried = self.carried.window.as_ref().and_then(|window| window.get(page));
        carried.map_or_else(|| self.table.holds(page, digest), |carried| carried == digest)
    }

    /// The pages were compared: what a pack of an earlier try holds of them is confirmed or
    /// overridden.
    fn confirm(&mut self, pages: PageRange) {
        self.carried.unconfirmed.iter_mut().for_each(|left| left.remove_range(pages));
        self.carried.window.iter_mut().for_each(|window| window.forget(pages));
    }

    /// The parts of `pages` that are not known to hold zeros.
    fn not_zero(&self, pages: PageRange) -> Vec<PageRange> {
        let news = self.table.not_zero(pages);
        match &self.carried.window {
            Some(window) => news.into_iter().flat_map(|part| window.not_zero(part)).collect(),
            None => news,
        }
    }

    /// Takes in a run of a carried pack, newest first; zeros have no digests. Returns how many
    /// pages were not known to be carried. The ground of a full checkpoint is no change.
    fn carry_memory(&mut self, pages: PageRange, digests: &[PageDigest]) -> u64 {
        let size = self.stored.len();
        let carried = self.carried.unconfirmed.get_or_insert_with(|| PageSet::new(size));
        let mut news = 0;
        for (number, page) in pages
            .iter()
            .enumerate()
            .filter(|(_, page)| !carried.contains(*page))
            .collect::<Vec<_>>()
        {
            carried.insert(page);
            let digest = digests.get(number).copied();
            self.table.set(page, digest.unwrap_or(PageDigest::ZERO_PAGE));
            if digest.is_some() || self.in_lineage {
                self.stored.insert(page);
                news += 1;
            }
        }
        news
    }

    /// What the table knew of the disk is overridden by what it does not know.
    fn carry_disk(&mut self, pages: PageRange) {
        self.table.truncate(PageCount(0));
        self.carried.ranges.insert(pages);
        self.carried.ranges.keep(MOST_RANGES);
    }

    fn unknown(&self, pages: PageRange) -> Vec<PageRange> {
        let mut found: Vec<PageRange> = Vec::new();
        for page in pages.iter().filter(|page| self.table.get(*page).is_none()) {
            match found.last_mut() {
                Some(last) if last.end == page => last.end = PageIndex(page.0 + 1),
                _ => found.push(PageRange::single(page)),
            }
        }
        found
    }

    /// [`Self::confirm`] for pages that hold zeros; those that a carried pack says so of are known
    /// from now on.
    fn confirm_zero(&mut self, pages: PageRange) {
        if self.carried.window.is_some() {
            self.table.set_zero(pages);
        }
        self.confirm(pages);
    }

    /// Pages of `pages` that no carried pack has a record of yet.
    fn uncarried(&self, pages: PageRange) -> u64 {
        match &self.carried.unconfirmed {
            Some(carried) => pages.iter().filter(|page| !carried.contains(*page)).count() as u64,
            None => self.carried.ranges.outside(pages).map(|part| part.len().0).sum(),
        }
    }

    /// Notes that these pages, which were not known to be zero, are. In a space that no checkpoint
    /// has recorded yet they are holes: recorded, because a layer below may hold something else
    /// there, but no change.
    fn take_zero(&mut self, pages: PageRange, changed: &mut PageCount) {
        self.table.set_zero(pages);
        if self.stored.len() > PageCount(0) {
            let again = pages.iter().filter(|page| self.stored.contains(*page)).count() as u64;
            self.stored.insert_range(pages);
            changed.0 += pages.len().0 - again;
        } else if self.in_lineage {
            changed.0 += pages.len().0;
        }
    }
}

#[derive(Default)]
struct OpenFrame {
    pages: Vec<(PageIndex, PageDigest)>,
    raw: Vec<u8>,
}

pub(super) struct Delta {
    spaces: Vec<Space>,
    ids: Vec<SpaceId>,
    frames: Vec<OpenFrame>,
    zeros: Option<(SpaceNumber, PageRange)>,
    changed: PageCount,
    /// Carried disk pages that were passed without being looked at.
    missed: PageCount,
}

impl Delta {
    pub(super) fn new(spaces: Vec<Space>, table: &SpaceTable) -> Result<Self> {
        let id = |space: &Space| {
            table.id(&space.name).with_context(|| format!("space {} has no number", space.name))
        };
        let ids = spaces.iter().map(id).collect::<Result<_>>()?;
        let frames = spaces.iter().map(|_| OpenFrame::default()).collect();
        Ok(Self { spaces, ids, frames, zeros: None, changed: PageCount(0), missed: PageCount(0) })
    }

    pub(super) fn spaces(&self) -> &[Space] {
        &self.spaces
    }

    /// Pages whose content differs from the parent's.
    pub(super) fn changed(&self) -> PageCount {
        self.changed
    }

    /// Whether a restore of the parent, plus what was stored so far, would give this page.
    pub(super) fn holds(&self, space: SpaceNumber, page: PageIndex, digest: PageDigest) -> bool {
        self.spaces[usize::from(space)].holds(page, digest)
    }

    /// Takes pages in ascending order, each at most once until the next [`Delta::flush`].
    pub(super) fn offer(
        &mut self,
        space: SpaceNumber,
        first: PageIndex,
        bytes: &[u8],
        jobs: &mut Vec<PackJob>,
    ) {
        for (number, page) in bytes.chunks_exact(PAGE_SIZE).enumerate() {
            self.offer_page(space, PageIndex(first.0 + number as u64), page, jobs);
        }
    }

    fn offer_page(
        &mut self,
        space: SpaceNumber,
        page: PageIndex,
        bytes: &[u8],
        jobs: &mut Vec<PackJob>,
    ) {
        if is_zero(bytes) {
            // Of RAM most pages that are zero were before.
            if self.holds(space, page, PageDigest::ZERO_PAGE) {
                self.spaces[usize::from(space)].confirm_zero(PageRange::single(page));
            } else {
                self.offer_zero(space, PageRange::single(page), jobs);
            }
            return;
        }
        let digest = PageDigest::of(bytes);
        if !self.take(space, page, digest) {
            return;
        }
        let frame = &mut self.frames[usize::from(space)];
        frame.pages.push((page, digest));
        frame.raw.extend_from_slice(bytes);
        if frame.pages.len() == FRAME_PAGES {
            self.close_frame(usize::from(space), jobs);
        }
    }

    /// Pages known to hold zeros. Costs the ranges that it meets, not the pages: a hole may be as
    /// large as a disk.
    pub(super) fn offer_zero(
        &mut self,
        space: SpaceNumber,
        pages: PageRange,
        jobs: &mut Vec<PackJob>,
    ) {
        let news = self.spaces[usize::from(space)].not_zero(pages);
        self.spaces[usize::from(space)].confirm_zero(pages);
        for part in news {
            self.spaces[usize::from(space)].take_zero(part, &mut self.changed);
            match &mut self.zeros {
                Some((open, range)) if *open == space && range.end == part.start => {
                    range.end = part.end
                }
                _ => {
                    self.close_zeros(jobs);
                    self.zeros = Some((space, part));
                }
            }
        }
    }

    /// Says that a whole space is zero but for what is offered after, and what is carried: the
    /// ground of a full checkpoint.
    pub(super) fn ground(&mut self, space: SpaceNumber, jobs: &mut Vec<PackJob>) {
        let all = self.spaces[usize::from(space)].pages.all();
        let is_carried = self.spaces[usize::from(space)].carried.unconfirmed.is_some();
        let rest =
            if is_carried { self.spaces[usize::from(space)].unknown(all) } else { vec![all] };
        for pages in rest {
            self.spaces[usize::from(space)].table.set_zero(pages);
            self.push_zeros(space, pages, jobs);
        }
    }

    /// Whether all that the pack records can be part of this checkpoint. Device state cannot: it
    /// has another length each time.
    pub(super) fn could_hold(&self, index: &PackIndex) -> bool {
        let space = |name: &SpaceName| self.spaces.iter().find(|space| space.name == *name);
        let fits = |name: &SpaceName, pages: PageRange| {
            let is_carried = matches!(name.kind(), SpaceKind::Ram | SpaceKind::Disk);
            is_carried && space(name).is_some_and(|space| pages.end.0 <= space.pages.0)
        };
        index.spaces().iter().all(|name| space(name).is_some())
            && index.runs().iter().all(|run| fits(index.space_name(run.space), run.pages))
    }

    /// Pages of the pack that no pack carried so far records.
    pub(super) fn uncarried(&self, index: &PackIndex) -> PageCount {
        let data = index.runs().iter().filter(|run| run.source != RunSource::Zero);
        let space = |run: &PageRun| {
            self.spaces.iter().find(|space| space.name == *index.space_name(run.space))
        };
        PageCount(data.filter_map(|run| Some(space(run)?.uncarried(run.pages))).sum())
    }

    /// Takes in a pack that an earlier try stored and that is a pack of this checkpoint. To be
    /// called with the newest pack first, before anything is offered.
    pub(super) fn carry(&mut self, index: &PackIndex) {
        for run in index.runs().iter().rev() {
            let name = index.space_name(run.space);
            let Some(space) = self.spaces.iter_mut().find(|space| space.name == *name) else {
                continue;
            };
            match name.kind() {
                SpaceKind::Ram => {
                    self.changed.0 += space.carry_memory(run.pages, index.run_digests(run))
                }
                _ => space.carry_disk(run.pages),
            }
        }
    }

    /// The part of a disk that is offered from here on.
    pub(super) fn enter(&mut self, space: SpaceNumber, window: Option<Window>) {
        let passed = std::mem::replace(&mut self.spaces[usize::from(space)].carried.window, window);
        self.missed.0 += passed.map_or(0, |window| window.left().0);
    }

    /// Forgets the digests of all memory pages: a full checkpoint begins.
    pub(super) fn forget_memory(&mut self) {
        let memory = self.spaces.iter_mut().filter(|space| space.name.kind() == SpaceKind::Ram);
        memory.for_each(|space| space.table.truncate(PageCount(0)));
    }

    /// Every memory page was looked at, also those that were not offered because they are as they
    /// were.
    pub(super) fn confirm_memory(&mut self) {
        self.spaces.iter_mut().for_each(|space| space.carried.unconfirmed = None);
    }

    /// Carried pages that were not looked at.
    pub(super) fn unconfirmed(&self) -> PageCount {
        let memory = self
            .spaces
            .iter()
            .filter_map(|space| space.carried.unconfirmed.as_ref())
            .map(PageSet::count);
        let disks =
            self.spaces.iter().filter_map(|space| space.carried.window.as_ref()).map(Window::left);
        PageCount(self.missed.0 + memory.chain(disks).map(|left| left.0).sum::<u64>())
    }

    /// The space has this size now: what was known of pages beyond is gone.
    pub(super) fn truncate(&mut self, space: SpaceNumber, pages: PageCount) {
        self.spaces[usize::from(space)].table.truncate(pages);
    }

    /// Whether the page differs and must be stored.
    fn take(&mut self, space: SpaceNumber, page: PageIndex, digest: PageDigest) -> bool {
        let space = &mut self.spaces[usize::from(space)];
        let is_held = space.holds(page, digest);
        let is_carried =
            space.carried.window.as_ref().is_some_and(|window| window.get(page).is_some());
        space.confirm(PageRange::single(page));
        if is_held {
            if is_carried {
                space.table.set(page, digest);
                self.changed.0 += 1;
            }
            return false;
        }
        space.table.set(page, digest);
        if space.stored.len() == PageCount(0) || !space.stored.contains(page) {
            self.changed.0 += 1;
        }
        if space.stored.len() > PageCount(0) {
            space.stored.insert(page);
        }
        true
    }

    /// Ends a pass: everything offered so far comes before whatever follows.
    pub(super) fn flush(&mut self, jobs: &mut Vec<PackJob>) {
        for space in 0..self.frames.len() {
            self.close_frame(space, jobs);
        }
        self.close_zeros(jobs);
    }

    fn close_frame(&mut self, space: usize, jobs: &mut Vec<PackJob>) {
        let frame = std::mem::take(&mut self.frames[space]);
        if !frame.pages.is_empty() {
            let space = self.ids[space];
            jobs.push(PackJob::Data(FrameJob { space, pages: frame.pages, raw: frame.raw }));
        }
    }

    fn close_zeros(&mut self, jobs: &mut Vec<PackJob>) {
        if let Some((space, range)) = self.zeros.take() {
            self.push_zeros(space, range, jobs);
        }
    }

    fn push_zeros(&self, space: SpaceNumber, pages: PageRange, jobs: &mut Vec<PackJob>) {
        let id = self.ids[usize::from(space)];
        jobs.extend(pages.chunks(ZERO_PAGES).map(|part| PackJob::Zero(id, part)));
    }

    /// The checkpoint is durable: the tables are what the next one compares with.
    pub(super) fn acknowledge(mut self) -> Vec<Space> {
        for space in &mut self.spaces {
            space.stored.clear();
            space.carried = CarriedPages::default();
            space.in_lineage = true;
        }
        self.spaces
    }

    /// The checkpoint failed: what it would have stored is unknown again, so it is stored by the
    /// next one.
    pub(super) fn fail(mut self) -> Vec<Space> {
        for space in &mut self.spaces {
            space.carried = CarriedPages::default();
            if space.name.kind() == SpaceKind::Ram {
                for page in space.stored.iter() {
                    space.table.forget(page);
                }
                space.stored.clear();
            } else {
                space.table.truncate(PageCount(0));
            }
        }
        self.spaces
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use checkpoint_format::{ByteLen, MAX_SPACE_PAGES};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn delta(pages: u64) -> Delta {
        let names = [SpaceName::ram("pc.ram").unwrap(), SpaceName::disk("d").unwrap()];
        let table = SpaceTable::new(names.clone()).unwrap();
        let spaces = names
            .into_iter()
            .map(|name| Space::new(name, PageCount(pages), DigestTable::dense(PageCount(pages))));
        Delta::new(spaces.collect(), &table).unwrap()
    }

    fn again(spaces: Vec<Space>) -> Delta {
        let table = SpaceTable::new(spaces.iter().map(|space| space.name.clone())).unwrap();
        Delta::new(spaces, &table).unwrap()
    }

    fn jobs_of(delta: &mut Delta, pages: &[(u64, u8)]) -> Vec<PackJob> {
        let mut jobs = Vec::new();
        for (page, fill) in pages {
            delta.offer(0, PageIndex(*page), &[*fill; PAGE_SIZE], &mut jobs);
        }
        delta.flush(&mut jobs);
        jobs
    }

    fn data_pages(jobs: &[PackJob]) -> Vec<u64> {
        let frames = jobs.iter().filter_map(|job| match job {
            PackJob::Data(frame) => Some(frame.pages.iter().map(|(page, _)| page.0)),
            PackJob::Zero(..) => None,
        });
        frames.flatten().collect()
    }

    #[test]
    fn an_equal_page_is_not_stored_again() {
        let mut first = delta(8);
        assert_eq!(data_pages(&jobs_of(&mut first, &[(1, 7), (3, 7), (4, 0)])), [1, 3]);
        let mut second = again(first.acknowledge());
        assert_eq!(data_pages(&jobs_of(&mut second, &[(1, 7), (3, 8)])), [3]);
        assert_eq!(second.changed(), PageCount(1));
    }

    #[test]
    fn a_failed_checkpoint_stores_its_pages_with_the_next() {
        let mut first = delta(8);
        jobs_of(&mut first, &[(1, 7)]);
        let mut second = again(first.acknowledge());
        jobs_of(&mut second, &[(1, 9), (2, 9)]);
        let mut third = again(second.fail());
        assert_eq!(data_pages(&jobs_of(&mut third, &[(1, 9), (2, 9)])), [1, 2]);
    }

    #[test]
    fn a_page_that_went_back_is_stored_again_and_counted_once() {
        let mut delta = delta(8);
        assert_eq!(data_pages(&jobs_of(&mut delta, &[(5, 1)])), [5]);
        assert_eq!(data_pages(&jobs_of(&mut delta, &[(5, 2)])), [5]);
        assert_eq!(data_pages(&jobs_of(&mut delta, &[(5, 1)])), [5]);
        assert_eq!(delta.changed(), PageCount(1));
    }

    #[test]
    fn a_page_beyond_a_shrunken_end_is_news_when_it_comes_back() {
        let mut first = delta(8);
        jobs_of(&mut first, &[(5, 7), (6, 7)]);
        let mut second = again(first.acknowledge());
        second.truncate(0, PageCount(6));
        let mut third = again(second.acknowledge());
        assert_eq!(data_pages(&jobs_of(&mut third, &[(5, 7), (6, 7)])), [6]);
    }

    #[test]
    fn zero_pages_are_runs() {
        let mut delta = delta(100);
        let jobs = jobs_of(&mut delta, &[(4, 0), (5, 0), (6, 1), (7, 0)]);
        let zeros: Vec<_> = jobs
            .iter()
            .filter_map(|job| match job {
                PackJob::Zero(_, range) => Some((range.start.0, range.end.0)),
                PackJob::Data(_) => None,
            })
            .collect();
        assert_eq!(zeros, [(4, 6), (7, 8)]);
    }

    fn disk(pages: u64) -> Delta {
        let name = SpaceName::disk("d").unwrap();
        let table = SpaceTable::new([name.clone()]).unwrap();
        let space = Space::new(name, PageCount(pages), DigestTable::sparse(ByteLen(1 << 20)));
        Delta::new(vec![space], &table).unwrap()
    }

    fn zero_ranges(jobs: &[PackJob]) -> Vec<(u64, u64)> {
        let zeros = jobs.iter().filter_map(|job| match job {
            PackJob::Zero(_, range) => Some((range.start.0, range.end.0)),
            PackJob::Data(_) => None,
        });
        zeros.collect()
    }

    fn pages(start: u64, end: u64) -> PageRange {
        PageRange::new(PageIndex(start), PageIndex(end))
    }

    #[test]
    fn sparse_disk_costs_its_ranges_and_its_holes_are_no_changes() {
        const TIB: u64 = 1 << 28;
        let (mut first, mut jobs) = (disk(TIB), Vec::new());
        first.offer_zero(0, pages(0, 1000), &mut jobs);
        first.offer(0, PageIndex(1000), &[7; PAGE_SIZE], &mut jobs);
        first.offer_zero(0, pages(1001, TIB), &mut jobs);
        first.flush(&mut jobs);
        assert_eq!(zero_ranges(&jobs), [(0, 1000), (1001, TIB)]);
        assert_eq!((data_pages(&jobs), first.changed()), (vec![1000], PageCount(1)));
        // What was a hole and is one is nothing; what the guest discarded is a change of one page.
        let (mut second, mut jobs) = (again(first.acknowledge()), Vec::new());
        second.offer_zero(0, pages(0, TIB), &mut jobs);
        second.flush(&mut jobs);
        assert_eq!((zero_ranges(&jobs), second.changed()), (vec![(1000, 1001)], PageCount(1)));
        // A failed checkpoint leaves the next one all of it.
        let (mut third, mut jobs) = (again(second.fail()), Vec::new());
        third.offer_zero(0, pages(0, 10), &mut jobs);
        third.flush(&mut jobs);
        assert_eq!(zero_ranges(&jobs), [(0, 10)]);
    }

    #[test]
    fn zeros_of_the_largest_space_fit_into_packs() {
        let (mut delta, mut jobs) = (disk(MAX_SPACE_PAGES), Vec::new());
        delta.offer_zero(0, PageCount(MAX_SPACE_PAGES).all(), &mut jobs);
        delta.flush(&mut jobs);
        let ranges = zero_ranges(&jobs);
        assert!(ranges.iter().all(|(start, end)| end - start <= MAX_PAGES_PER_PACK));
        assert_eq!(ranges.iter().map(|(start, end)| end - start).sum::<u64>(), MAX_SPACE_PAGES);
    }

    /// What the store would return: each job's pages, in order.
    fn replay(jobs: &[PackJob], stored: &mut BTreeMap<u64, u8>) {
        for job in jobs {
            match job {
                PackJob::Zero(_, range) => stored.extend(range.iter().map(|page| (page.0, 0))),
                PackJob::Data(frame) => {
                    let pages = frame.pages.iter().zip(frame.raw.chunks_exact(PAGE_SIZE));
                    stored.extend(pages.map(|((page, _), bytes)| (page.0, bytes[0])));
                }
            }
        }
    }

    /// Offers pages as a disk's extents would: neighbours of zeros as one range, data as pieces.
    fn offer_all(delta: &mut Delta, disk: &[u8], from: u64, to: u64, jobs: &mut Vec<PackJob>) {
        let mut at = from;
        while at < to {
            let fill = disk[at as usize];
            let same =
                disk[at as usize..to as usize].iter().take_while(|other| **other == fill).count()
                    as u64;
            match fill {
                0 => delta.offer_zero(0, pages(at, at + same), jobs),
                _ => delta.offer(0, PageIndex(at), &vec![fill; same as usize * PAGE_SIZE], jobs),
            }
            at += same;
        }
    }

    const SIZE: u64 = 600;

    #[derive(Clone, Debug)]
    struct Pass {
        /// Written by the guest: from, to, what.
        writes: Vec<(u64, u64, u8)>,
        /// Whether the bitmap is there, or all of the disk has to be looked at.
        has_bitmap: bool,
        is_durable: bool,
    }

    fn any_pass() -> impl Strategy<Value = Pass> {
        let write = (0..SIZE, 0..SIZE, 0..3_u8).prop_map(|(a, b, fill)| (a.min(b), a.max(b), fill));
        let writes = prop::collection::vec(write, 0..5);
        (writes, any::<bool>(), prop::bool::weighted(0.7))
            .prop_map(|(writes, has_bitmap, is_durable)| Pass { writes, has_bitmap, is_durable })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever the guest writes and whichever checkpoints fail: a durable one restores the
        /// disk, and counts no page that does not differ from its parent where the parent is known.
        #[test]
        fn sparse_disk_comes_back_after_any_checkpoints(passes in prop::collection::vec(any_pass(), 1..8), limit in 1_u64..5) {
            let mut disk = vec![0; SIZE as usize];
            let name = SpaceName::disk("d").unwrap();
            let mut spaces = vec![Space::new(name, PageCount(SIZE), DigestTable::sparse(ByteLen(limit * 4096)))];
            let mut stored: BTreeMap<u64, u8> = BTreeMap::new();
            let mut dirty: Vec<(u64, u64)> = vec![(0, SIZE)];
            for pass in passes {
                for (from, to, fill) in pass.writes {
                    disk[from as usize..to as usize].fill(fill);
                    dirty.push((from, to));
                }
                if !pass.has_bitmap {
                    dirty = vec![(0, SIZE)];
                }
                let (mut delta, mut jobs) = (again(spaces), Vec::new());
                let mut is_dirty = vec![false; SIZE as usize];
                dirty.iter().for_each(|(from, to)| is_dirty[*from as usize..*to as usize].fill(true));
                let mut at = 0;
                while at < SIZE {
                    let same = is_dirty[at as usize..].iter().take_while(|other| **other == is_dirty[at as usize]).count() as u64;
                    if is_dirty[at as usize] {
                        offer_all(&mut delta, &disk, at, at + same, &mut jobs);
                    }
                    at += same;
                }
                delta.flush(&mut jobs);
                if !pass.is_durable {
                    spaces = delta.fail();
                    continue;
                }
                let recorded = data_pages(&jobs).len() as u64 + zero_ranges(&jobs).iter().map(|(start, end)| end - start).sum::<u64>();
                prop_assert!(delta.changed().0 <= recorded);
                replay(&jobs, &mut stored);
                prop_assert!((0..SIZE).all(|page| stored.get(&page).copied().unwrap_or(0) == disk[page as usize]));
                spaces = delta.acknowledge();
                dirty.clear();
            }
        }
    }
}
