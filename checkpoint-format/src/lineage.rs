//! Where the newest content of each page of a space is, over a checkpoint and all its ancestors.

use thiserror::Error;

use crate::names::SpaceName;
use crate::pack::{FRAME_PAGES, MAX_FRAMES_PER_PACK, PackLayout, PageRun, RunSource};
use crate::sparse_pages::{Cell, SparsePages};
use crate::units::{FrameNo, PackNo, PageCount, PageIndex, PageRange, Slot, as_index};

/// Most packs in a lineage.
pub const MAX_LINEAGE_PACKS: u32 = 1 << 28;

/// Pages in a chunk of the map: 16 MiB of the space in 32 KiB of memory.
const CHUNK_PAGES: usize = 4096;

#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum LineageError {
    #[error(
        "apply pack {pack} of a lineage: pack {last} was applied before it; apply packs from the oldest to the newest, each once"
    )]
    OutOfOrder { pack: PackNo, last: PackNo },
    #[error(
        "apply pack {pack} of a lineage: a lineage has at most {limit} packs; begin again with a full checkpoint"
    )]
    TooManyPacks { pack: PackNo, limit: u32 },
}

/// Where the content of a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageLocation {
    /// No checkpoint of the lineage recorded it; a disk's page has the content of the layer below.
    Unknown,
    /// The page is all zeros.
    Zero,
    /// The page is stored.
    Data {
        /// The pack, counted from the lineage's first.
        pack: PackNo,
        /// The frame of that pack.
        frame: FrameNo,
        /// The page's place in the frame.
        slot: Slot,
    },
}

/// A location in eight bytes: two bits of kind, six of slot, 28 of frame, 28 of pack.
///
/// The pack is on top, then the frame, then the slot: sorted by this number, locations are in the
/// order of reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Packed(u64);

const KIND_BITS: u32 = 2;
const SLOT_BITS: u32 = 6;
const FRAME_BITS: u32 = 28;
const FRAME_SHIFT: u32 = KIND_BITS + SLOT_BITS;
const PACK_SHIFT: u32 = FRAME_SHIFT + FRAME_BITS;

const _: () = {
    assert!(FRAME_PAGES <= 1 << SLOT_BITS);
    assert!(MAX_FRAMES_PER_PACK <= 1 << FRAME_BITS);
    assert!(MAX_LINEAGE_PACKS as u64 <= 1 << (u64::BITS - PACK_SHIFT));
};

impl Cell for Packed {
    const UNKNOWN: Self = Self(0);
    const ZERO: Self = Self(1);
}

type Pages = SparsePages<Packed, CHUNK_PAGES>;

impl Packed {
    const DATA: u64 = 2;

    fn data(pack: PackNo, frame: FrameNo, slot: Slot) -> Self {
        let pack = u64::from(pack.0) << PACK_SHIFT;
        let frame = u64::from(frame.0) << FRAME_SHIFT;
        Self(pack | frame | u64::from(slot.0) << KIND_BITS | Self::DATA)
    }

    fn is_data(self) -> bool {
        self.0 & Self::DATA != 0
    }

    /// The location `pages` further on, if it is recorded in the same way.
    fn plus(self, pages: usize) -> Self {
        if self.is_data() {
            // A run never goes past the last slot of its frame, so nothing is carried into the
            // frame's bits.
            Self(self.0 + ((pages as u64) << KIND_BITS))
        } else {
            self
        }
    }

    /// What the next page must have to belong to the same run. The last slot of a frame ends its
    /// run: the carry into the frame's bits would look like the first slot of the next frame, where
    /// the next page may really be.
    fn successor(self) -> Option<Self> {
        let last_slot = (self.0 >> KIND_BITS) & ((1 << SLOT_BITS) - 1) == (1 << SLOT_BITS) - 1;
        (!(self.is_data() && last_slot)).then(|| self.plus(1))
    }

    #[expect(clippy::cast_possible_truncation, reason = "each part has no more bits than its type")]
    fn unpack(self) -> PageLocation {
        let bits = |shift: u32, width: u32| (self.0 >> shift) & ((1 << width) - 1);
        match self {
            Self::UNKNOWN => PageLocation::Unknown,
            Self::ZERO => PageLocation::Zero,
            _ => PageLocation::Data {
                pack: PackNo((self.0 >> PACK_SHIFT) as u32),
                frame: FrameNo(bits(FRAME_SHIFT, FRAME_BITS) as u32),
                slot: Slot(bits(KIND_BITS, SLOT_BITS) as u8),
            },
        }
    }
}

/// The newest location of each page of one space.
///
/// Replay a lineage from its full checkpoint on: for each checkpoint [`resize`](Self::resize) to
/// the size that the space had then, and apply its packs in their order. Packs are numbered through
/// the whole lineage, oldest first. What a space lost when it shrank does not come back when it
/// grows: the new pages are zeros, as in a disk that was grown.
///
/// The map costs 8 bytes for each page in a 16 MiB chunk that holds any data, and a range for each
/// hole, however large the space claims to be. After the replay a restore asks for
/// [`frame_reads`](Self::frame_reads) and fetches each frame that still matters exactly once,
/// however many generations there are.
#[derive(Clone, Debug)]
pub struct PageMap {
    space: SpaceName,
    size: PageCount,
    pages: Pages,
    last: Option<PackNo>,
}

/// Pages one after another that are all unknown, all zero, or in neighbouring slots of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocatedRun {
    /// The pages of the run.
    pub pages: PageRange,
    /// Of the first page.
    pub location: PageLocation,
}

/// A frame that a restore has to read and the parts of it that are still the newest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameRead {
    /// The pack, counted from the lineage's first.
    pub pack: PackNo,
    /// The frame of that pack.
    pub frame: FrameNo,
    /// Ascending by slot.
    pub parts: Vec<FramePart>,
}

/// Pages whose content lies in the frame from `first_slot` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FramePart {
    /// Where the first of them is in the frame.
    pub first_slot: Slot,
    /// The pages that are taken.
    pub pages: PageRange,
}

impl PageMap {
    /// Nothing is known about any of the `size` pages yet.
    pub fn new(space: SpaceName, size: PageCount) -> Self {
        Self { space, size, pages: Pages::default(), last: None }
    }

    /// The page space that is mapped.
    pub fn space(&self) -> &SpaceName {
        &self.space
    }

    /// Pages in the space.
    pub fn size(&self) -> PageCount {
        self.size
    }

    /// Follows a space that grew or shrank between two checkpoints.
    pub fn resize(&mut self, size: PageCount) {
        let before = std::mem::replace(&mut self.size, size);
        self.pages.truncate(size);
        self.pages.set_zero(PageRange::new(PageIndex(before.0), PageIndex(size.0)));
    }

    /// Adds what the pack holds for this space. Pages beyond the space's size are ignored.
    ///
    /// # Errors
    /// When `pack` is older than one already applied, or beyond the limit of packs.
    pub fn apply_pack(
        &mut self,
        pack: PackNo,
        index: &impl AsRef<PackLayout>,
    ) -> Result<(), LineageError> {
        self.check_order(pack)?;
        let space = self.space.clone();
        for run in index.as_ref().runs_of(&space) {
            self.apply_run(pack, run);
        }
        self.last = Some(pack);
        Ok(())
    }

    /// Records where the pages of a run are, of which nothing was known. What is beyond the space
    /// is ignored. A run of data lies in one frame.
    pub fn record(&mut self, run: &LocatedRun) {
        let pages = run.pages.clip(self.size);
        match run.location {
            PageLocation::Unknown => {}
            PageLocation::Zero => self.pages.set_zero(pages),
            PageLocation::Data { pack, frame, slot } => {
                self.set_data(pages, Packed::data(pack, frame, slot));
            }
        }
    }

    fn check_order(&self, pack: PackNo) -> Result<(), LineageError> {
        match self.last {
            Some(last) if pack <= last => Err(LineageError::OutOfOrder { pack, last }),
            _ if pack.0 >= MAX_LINEAGE_PACKS => {
                Err(LineageError::TooManyPacks { pack, limit: MAX_LINEAGE_PACKS })
            }
            _ => Ok(()),
        }
    }

    fn apply_run(&mut self, pack: PackNo, run: &PageRun) {
        let pages = run.pages.clip(self.size);
        match run.source {
            RunSource::Zero => self.pages.set_zero(pages),
            RunSource::Frame { frame, first_slot } => {
                self.set_data(pages, Packed::data(pack, frame, first_slot))
            }
        }
    }

    /// Writes `first` and what follows it to the pages.
    fn set_data(&mut self, pages: PageRange, first: Packed) {
        let (mut at, mut location) = (pages.start, first);
        while at < pages.end {
            let (chunk, from) = Pages::place(at);
            let count = (CHUNK_PAGES - from).min(as_index(pages.end.0 - at.0));
            for cell in &mut self.pages.chunk(chunk)[from..from + count] {
                *cell = location;
                location = location.plus(1);
            }
            at.0 += count as u64;
        }
    }

    /// A page beyond the space's size is unknown.
    pub fn get(&self, page: PageIndex) -> PageLocation {
        self.packed(page).unpack()
    }

    fn packed(&self, page: PageIndex) -> Packed {
        if page.0 >= self.size.0 {
            return Packed::UNKNOWN;
        }
        self.pages.get(page)
    }

    /// The whole space, in order, in runs as long as they can be (a run of data ends with its
    /// frame).
    pub fn runs(&self) -> impl Iterator<Item = LocatedRun> {
        self.runs_in(self.size.all())
    }

    /// The same for a part of the space; pages beyond its size are left out. The first run may
    /// begin in the middle of one of [`runs`](Self::runs), and the last one may end there.
    pub fn runs_in(&self, pages: PageRange) -> impl Iterator<Item = LocatedRun> {
        let PageRange { mut start, end } = pages.clip(self.size);
        std::iter::from_fn(move || {
            let run = (start < end).then(|| self.run_from(start)).flatten()?;
            let pages = PageRange::new(start, run.pages.end.min(end));
            start = pages.end;
            Some(LocatedRun { pages, ..run })
        })
    }

    fn run_from(&self, start: PageIndex) -> Option<LocatedRun> {
        if start.0 >= self.size.0 {
            return None;
        }
        let first = self.packed(start);
        // In the last chunk it may lie beyond the size.
        let end = self.end_of_run(start, first).min(PageIndex(self.size.0));
        Some(LocatedRun { pages: PageRange::new(start, end), location: first.unpack() })
    }

    fn end_of_run(&self, start: PageIndex, first: Packed) -> PageIndex {
        let mut at = start;
        let mut expected = Some(first);
        while at.0 < self.size.0 {
            let (chunk, from) = Pages::place(at);
            let Some(cells) = self.pages.cells(chunk) else {
                // Between chunks there are only zeros and unknown pages.
                if Some(self.pages.get(at)) != expected {
                    break;
                }
                at = self.pages.end_of_ground(at, self.size);
                continue;
            };
            let same = count_following(&cells[from..], &mut expected);
            at.0 += same as u64;
            if from + same < CHUNK_PAGES {
                break;
            }
        }
        at
    }

    /// The pages that nothing in the lineage recorded.
    pub fn unknown(&self) -> impl Iterator<Item = PageRange> {
        self.ranges_at(PageLocation::Unknown)
    }

    /// The pages that hold zeros.
    pub fn zeros(&self) -> impl Iterator<Item = PageRange> {
        self.ranges_at(PageLocation::Zero)
    }

    fn ranges_at(&self, location: PageLocation) -> impl Iterator<Item = PageRange> {
        let matching = self.runs().filter(move |run| run.location == location);
        matching.map(|run| run.pages)
    }

    /// The frames that hold the newest content of any page, each once, in the order of packs and
    /// frames.
    pub fn frame_reads(&self) -> Vec<FrameRead> {
        let mut parts: Vec<_> = self.runs().filter_map(data_part).collect();
        // One page may not be in two slots, but one slot can't serve two pages either: the keys are
        // all different.
        parts.sort_unstable_by_key(|&(pack, frame, part)| (pack, frame, part.first_slot));
        let mut reads: Vec<FrameRead> = Vec::new();
        for (pack, frame, part) in parts {
            match reads.last_mut() {
                Some(read) if (read.pack, read.frame) == (pack, frame) => read.parts.push(part),
                _ => reads.push(FrameRead { pack, frame, parts: vec![part] }),
            }
        }
        reads
    }
}

/// How many locations follow one another from `expected` on, which is left at what would come next.
fn count_following(locations: &[Packed], expected: &mut Option<Packed>) -> usize {
    let differs = locations.iter().position(|&location| {
        let same = Some(location) == *expected;
        if same {
            *expected = location.successor();
        }
        !same
    });
    differs.unwrap_or(locations.len())
}

fn data_part(run: LocatedRun) -> Option<(PackNo, FrameNo, FramePart)> {
    let part = |first_slot| FramePart { first_slot, pages: run.pages };
    match run.location {
        PageLocation::Data { pack, frame, slot } => Some((pack, frame, part(slot))),
        PageLocation::Unknown | PageLocation::Zero => None,
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::pack::PackIndex;
    use crate::pack::testing::{frame, index, ram};

    const SIZE: PageCount = PageCount(3 * CHUNK_PAGES as u64);

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::new(PageIndex(start), PageIndex(end))
    }

    fn data(pack: u32, frame: u32, slot: u8) -> PageLocation {
        PageLocation::Data { pack: PackNo(pack), frame: FrameNo(frame), slot: Slot(slot) }
    }

    fn zeros(pages: PageRange) -> PackIndex {
        index(|pack, spaces| {
            let space = spaces.id(&ram()).expect("in the table");
            pack.push_zero(space, pages).expect("room");
        })
    }

    fn pages(frames: &[&[u64]]) -> PackIndex {
        index(|pack, spaces| {
            let space = spaces.id(&ram()).expect("in the table");
            for numbers in frames {
                pack.push_frame(frame(space, numbers.iter().copied())).expect("room");
            }
        })
    }

    fn map(packs: &[PackIndex]) -> PageMap {
        let mut map = PageMap::new(ram(), SIZE);
        for (number, pack) in (0..).zip(packs) {
            map.apply_pack(PackNo(number), pack).expect("in order");
        }
        map
    }

    #[test]
    fn the_largest_numbers_fit_in_eight_bytes() {
        let (pack, frame) = (MAX_LINEAGE_PACKS - 1, MAX_FRAMES_PER_PACK - 1);
        let packed = Packed::data(PackNo(pack), FrameNo(frame), Slot(63));
        assert_eq!(packed.unpack(), data(pack, frame, 63));
        assert_eq!(Packed::data(PackNo(0), FrameNo(0), Slot(0)).unpack(), data(0, 0, 0));
    }

    #[test]
    fn only_frames_that_still_matter_are_read_and_each_once() {
        let map =
            map(&[pages(&[&[0, 1, 2, 3], &[4, 5]]), pages(&[&[1, 4, 5]]), zeros(range(2, 3))]);
        let part =
            |slot, start, end| FramePart { first_slot: Slot(slot), pages: range(start, end) };
        let expected = [
            FrameRead {
                pack: PackNo(0),
                frame: FrameNo(0),
                parts: vec![part(0, 0, 1), part(3, 3, 4)],
            },
            FrameRead {
                pack: PackNo(1),
                frame: FrameNo(0),
                parts: vec![part(0, 1, 2), part(1, 4, 6)],
            },
        ];
        assert_eq!(map.frame_reads(), expected);
        assert_eq!(map.zeros().collect::<Vec<_>>(), [range(2, 3)]);
        assert_eq!(map.unknown().collect::<Vec<_>>(), [range(6, SIZE.0)]);
    }

    #[test]
    fn run_ends_with_its_frame_though_the_next_frame_continues() {
        let full: Vec<u64> = (0..FRAME_PAGES as u64).collect();
        let next: Vec<u64> = (FRAME_PAGES as u64..FRAME_PAGES as u64 + 3).collect();
        let map = map(&[pages(&[&full, &next])]);
        let part = |start, end| vec![FramePart { first_slot: Slot(0), pages: range(start, end) }];
        let expected = [
            FrameRead { pack: PackNo(0), frame: FrameNo(0), parts: part(0, 64) },
            FrameRead { pack: PackNo(0), frame: FrameNo(1), parts: part(64, 67) },
        ];
        assert_eq!(map.frame_reads(), expected);
    }

    #[test]
    fn a_later_record_in_the_same_pack_wins() {
        let map = map(&[pages(&[&[7], &[7, 8]])]);
        assert_eq!(map.get(PageIndex(7)), data(0, 1, 0));
    }

    #[test]
    fn what_a_shrunken_space_lost_does_not_come_back() {
        let mut map = map(&[pages(&[&[0, 1, 2, 3]])]);
        map.resize(PageCount(2));
        assert_eq!(map.get(PageIndex(3)), PageLocation::Unknown);
        map.resize(PageCount(6));
        assert_eq!(map.get(PageIndex(1)), data(0, 0, 1));
        assert_eq!(map.zeros().collect::<Vec<_>>(), [range(2, 6)]);
    }

    #[test]
    fn pages_beyond_the_size_are_ignored() {
        let mut map = PageMap::new(ram(), PageCount(2));
        map.apply_pack(PackNo(0), &pages(&[&[1, 2, 9]])).expect("in order");
        assert_eq!(map.frame_reads()[0].parts.len(), 1);
        assert_eq!(map.get(PageIndex(9)), PageLocation::Unknown);
        map.apply_pack(PackNo(1), &zeros(range(1, 1 << 20))).expect("in order");
        assert_eq!(map.zeros().collect::<Vec<_>>(), [range(1, 2)]);
    }

    #[test]
    fn runs_cross_chunks_and_cover_the_space() {
        let edge = CHUNK_PAGES as u64;
        let numbers: Vec<_> = (edge - 3..edge + 3).collect();
        let map = map(&[zeros(range(5, 2 * edge)), pages(&[&numbers])]);
        let runs: Vec<_> = map.runs().map(|run| (run.pages, run.location)).collect();
        let expected = [
            (range(0, 5), PageLocation::Unknown),
            (range(5, edge - 3), PageLocation::Zero),
            (range(edge - 3, edge + 3), data(1, 0, 0)),
            (range(edge + 3, 2 * edge), PageLocation::Zero),
            (range(2 * edge, 3 * edge), PageLocation::Unknown),
        ];
        assert_eq!(runs, expected);
        let part: Vec<_> =
            map.runs_in(range(edge - 4, edge + 1)).map(|run| (run.pages, run.location)).collect();
        let expected = [
            (range(edge - 4, edge - 3), PageLocation::Zero),
            (range(edge - 3, edge + 1), data(1, 0, 0)),
        ];
        assert_eq!(part, expected);
        assert_eq!(map.runs_in(range(edge + 1, edge + 2)).next().unwrap().location, data(1, 0, 4));
        assert_eq!(map.runs_in(range(3 * edge, 4 * edge)).count(), 0);
    }

    #[test]
    fn packs_out_of_order_are_refused() {
        let mut map = map(&[zeros(range(0, 1)), zeros(range(0, 1))]);
        let (pack, last) = (PackNo(1), PackNo(1));
        let again = map.apply_pack(pack, &zeros(range(0, 1)));
        assert_eq!(again, Err(LineageError::OutOfOrder { pack, last }));
        let many = map.apply_pack(PackNo(MAX_LINEAGE_PACKS), &zeros(range(0, 1)));
        assert!(matches!(many, Err(LineageError::TooManyPacks { .. })));
    }
}
