//! The index of a pack, ready for use: which page is in which frame.

use super::codec::decompress_whole;
use super::error::{PackError, PackPart, equal};
use super::footer::PackFooter;
use super::frame::FrameEntry;
use super::header::{PackId, check_checksum, check_fixed_len};
use super::space_table::SpaceId;
use super::trailer::{RunKind, RunRecord, Trailer};
use crate::digest::{Checksum, PageDigest};
use crate::names::SpaceName;
use crate::units::{FrameNo, PageCount, PageRange, Slot, count};

const PART: PackPart = PackPart::Trailer;

/// Pages one after another with one source: zeros, or neighbouring slots of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The space of the pages.
    pub space: SpaceId,
    /// The pages of the run.
    pub pages: PageRange,
    /// Where their content is.
    pub source: RunSource,
}

/// Where the content of a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunSource {
    /// They are all zeros.
    Zero,
    /// The run's first page is in `first_slot` of the frame, the next one behind it, and so on.
    Frame {
        /// The frame that has them.
        frame: FrameNo,
        /// Where the first of them is in the frame.
        first_slot: Slot,
    },
}

/// Which page is in which frame of a pack: its index without the digests.
///
/// The runs are in the order in which they were recorded; a later one overrides an earlier one of
/// the same page.
#[derive(Clone, Debug)]
pub struct PackLayout {
    spaces: Vec<SpaceName>,
    frames: Vec<FrameEntry>,
    runs: Vec<PageRun>,
}

/// The index of one pack, verified.
#[derive(Clone, Debug)]
pub struct PackIndex {
    id: PackId,
    layout: PackLayout,
    digests: Vec<PageDigest>,
    /// Of each frame, the number of its first page among the data pages.
    first_digest: Vec<u32>,
}

impl PackLayout {
    pub(super) fn resolve(
        spaces: Vec<SpaceName>,
        frames: Vec<FrameEntry>,
        runs: &[RunRecord],
    ) -> Result<Self, PackError> {
        let runs = Resolver::new(&frames).resolve(runs)?;
        Ok(Self { spaces, frames, runs })
    }

    /// All frames, in the order in which they are stored.
    pub fn frames(&self) -> &[FrameEntry] {
        &self.frames
    }

    /// The runs of one space, in order.
    pub fn runs_of(&self, space: &SpaceName) -> impl Iterator<Item = &PageRun> {
        let id = self.space_id(space);
        self.runs.iter().filter(move |run| Some(run.space) == id)
    }

    /// Bytes of memory that it takes, but for the spaces' names.
    pub fn memory(&self) -> usize {
        size_of_val(&self.frames[..]) + size_of_val(&self.runs[..])
    }

    fn space_id(&self, name: &SpaceName) -> Option<SpaceId> {
        let at = self.spaces.iter().position(|known| known == name)?;
        u16::try_from(at).ok().map(SpaceId)
    }
}

impl AsRef<PackLayout> for PackLayout {
    fn as_ref(&self) -> &PackLayout {
        self
    }
}

impl AsRef<PackLayout> for PackIndex {
    fn as_ref(&self) -> &PackLayout {
        &self.layout
    }
}

impl PackIndex {
    /// Verifies the stored trailer against the footer, then reads it.
    ///
    /// # Errors
    /// When the trailer is damaged, beyond a limit, or contradicts the footer.
    pub fn parse(trailer: &[u8], footer: &PackFooter) -> Result<Self, PackError> {
        footer.check(PackPart::Footer)?;
        check_fixed_len(PART, trailer, footer.trailer_len as usize)?;
        check_checksum(PART, footer.trailer_checksum, Checksum::of(trailer))?;
        let raw = decompress_whole(trailer, footer.trailer_raw_len as usize)
            .map_err(|source| PackError::Decompress { part: PART, source })?;
        let raw_len = u64::from(footer.trailer_raw_len);
        equal(PART, "decompressed length", raw.len() as u64, raw_len)?;
        Self::resolve(Trailer::parse(&raw, footer.trailer_offset)?)
    }

    pub(super) fn resolve(trailer: Trailer) -> Result<Self, PackError> {
        let Trailer { id, spaces, frames, runs, digests } = trailer;
        let layout = PackLayout::resolve(spaces, frames, &runs)?;
        let first_digest = first_pages(&layout.frames);
        let pages: u64 = layout.frames.iter().map(|f| u64::from(f.pages)).sum();
        equal(PART, "number of digests", digests.len() as u64, pages)?;
        Ok(Self { id, layout, digests, first_digest })
    }

    /// The pack's ID.
    pub fn id(&self) -> PackId {
        self.id
    }

    /// The spaces by number; a space may be named without a page of it in this pack.
    pub fn spaces(&self) -> &[SpaceName] {
        &self.layout.spaces
    }

    /// The number of a space in this pack, if it has pages of it.
    pub fn space_id(&self, name: &SpaceName) -> Option<SpaceId> {
        self.layout.space_id(name)
    }

    /// The name of a space of this pack.
    ///
    /// # Panics
    /// When the number comes from another pack.
    pub fn space_name(&self, id: SpaceId) -> &SpaceName {
        &self.layout.spaces[usize::from(id.0)]
    }

    /// All frames, in the order in which they are stored.
    pub fn frames(&self) -> &[FrameEntry] {
        self.layout.frames()
    }

    /// One frame.
    pub fn frame(&self, number: FrameNo) -> Option<&FrameEntry> {
        self.layout.frames.get(number.as_usize())
    }

    /// All page runs, ascending in each space.
    pub fn runs(&self) -> &[PageRun] {
        &self.layout.runs
    }

    /// The runs of one space, in order.
    pub fn runs_of(&self, space: &SpaceName) -> impl Iterator<Item = &PageRun> {
        self.layout.runs_of(space)
    }

    /// The digests of all data pages, frame by frame.
    pub fn digests(&self) -> &[PageDigest] {
        &self.digests
    }

    /// The digests of the run's pages; none for a run of zeros.
    ///
    /// # Panics
    /// When the run is of another pack.
    pub fn run_digests(&self, run: &PageRun) -> &[PageDigest] {
        match run.source {
            RunSource::Zero => &[],
            RunSource::Frame { frame, first_slot } => {
                let first = self.first_digest[frame.as_usize()] as usize + first_slot.as_usize();
                &self.digests[first..first + run.pages.len().as_usize()]
            }
        }
    }

    pub(super) fn zero_pages(&self) -> PageCount {
        let zero = self.layout.runs.iter().filter(|run| run.source == RunSource::Zero);
        PageCount(zero.map(|run| run.pages.len().0).sum())
    }
}

fn first_pages(frames: &[FrameEntry]) -> Vec<u32> {
    let before = |sum: &mut u32, frame: &FrameEntry| {
        let first = *sum;
        // At most 2^21 frames of 64 pages.
        *sum += u32::from(frame.pages);
        Some(first)
    };
    frames.iter().scan(0, before).collect()
}

/// Hands the data pages of the frames, in order, to the runs that name them.
struct Resolver<'a> {
    frames: &'a [FrameEntry],
    frame: usize,
    slot: u8,
    runs: Vec<PageRun>,
}

impl<'a> Resolver<'a> {
    fn new(frames: &'a [FrameEntry]) -> Self {
        Self { frames, frame: 0, slot: 0, runs: Vec::with_capacity(frames.len()) }
    }

    fn resolve(mut self, records: &[RunRecord]) -> Result<Vec<PageRun>, PackError> {
        for (number, record) in (0..).zip(records) {
            match record.kind {
                RunKind::Zero => self.runs.push(PageRun {
                    space: record.space,
                    pages: record.pages(),
                    source: RunSource::Zero,
                }),
                RunKind::Data => self.place(number, record)?,
            }
        }
        equal(PART, "frames named by the runs", self.frame as u64, self.frames.len() as u64)?;
        Ok(self.runs)
    }

    /// Cuts a data run where it crosses from one frame into the next.
    fn place(&mut self, number: u64, record: &RunRecord) -> Result<(), PackError> {
        let mut pages = record.pages();
        while !pages.is_empty() {
            let frame = self.frame_of(number, record.space)?;
            let room = PageCount((frame.pages - self.slot).into());
            let piece = PageRange::of_len(pages.start, room.min(pages.len()));
            self.runs.push(PageRun {
                space: record.space,
                pages: piece,
                source: RunSource::Frame {
                    // At most 2^21 frames.
                    frame: FrameNo(count(self.frame)),
                    first_slot: Slot(self.slot),
                },
            });
            pages.start = piece.end;
            self.advance(frame.pages, piece.len());
        }
        Ok(())
    }

    fn frame_of(&self, number: u64, space: SpaceId) -> Result<FrameEntry, PackError> {
        let bad = |problem| PackError::BadEntry {
            part: PART,
            table: "run table",
            entry: number,
            problem,
        };
        match self.frames.get(self.frame) {
            None => Err(bad("it names more pages than the frames hold")),
            Some(frame) if frame.space != space => Err(bad("its frame is of another space")),
            Some(frame) => Ok(*frame),
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "`by` is at most what the frame has left")]
    fn advance(&mut self, pages: u8, by: PageCount) {
        self.slot += by.0 as u8;
        if self.slot == pages {
            self.frame += 1;
            self.slot = 0;
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::pack::testing::{frame, index, table};
    use crate::pack::{FRAME_PAGES, PackBuilder};
    use crate::units::{PAGE_SIZE, PageIndex};

    fn run(space: u16, pages: std::ops::Range<u64>, source: Option<(u32, u8)>) -> PageRun {
        PageRun {
            space: SpaceId(space),
            pages: PageRange::new(PageIndex(pages.start), PageIndex(pages.end)),
            source: match source {
                None => RunSource::Zero,
                Some((frame, slot)) => {
                    RunSource::Frame { frame: FrameNo(frame), first_slot: Slot(slot) }
                }
            },
        }
    }

    #[test]
    fn runs_are_cut_at_frames_and_keep_their_order() {
        let index = index(|pack, _| {
            pack.push_frame(frame(SpaceId(0), 0..64)).expect("room");
            pack.push_frame(frame(SpaceId(0), (64..70).chain([80]))).expect("room");
            let zero = PageRange::new(PageIndex(0), PageIndex(2));
            pack.push_zero(SpaceId(1), zero).expect("room");
            pack.push_frame(frame(SpaceId(1), [1])).expect("room");
        });
        let expected = [
            run(0, 0..64, Some((0, 0))),
            run(0, 64..70, Some((1, 0))),
            run(0, 80..81, Some((1, 6))),
            run(1, 0..2, None),
            run(1, 1..2, Some((2, 0))),
        ];
        assert_eq!(index.runs(), expected);
        assert_eq!(index.run_digests(&expected[2]), [PageDigest([80; 16])]);
        assert_eq!(index.run_digests(&expected[4]), [PageDigest([1; 16])]);
        assert_eq!(index.runs_of(&"disk:b".parse().expect("a name")).count(), 2);
        assert_eq!(index.runs_of(&"disk:c".parse().expect("a name")).count(), 0);
    }

    #[test]
    fn run_does_not_continue_in_another_space() {
        let index = index(|pack, _| {
            pack.push_frame(frame(SpaceId(0), [1, 2])).expect("room");
            pack.push_frame(frame(SpaceId(1), [3])).expect("room");
        });
        let expected = [run(0, 1..3, Some((0, 0))), run(1, 3..4, Some((1, 0)))];
        assert_eq!(index.runs(), expected);
    }

    #[test]
    fn an_empty_pack_is_sound() {
        let index = index(|_, _| ());
        assert!(index.runs().is_empty() && index.frames().is_empty());
    }

    /// Tables that each parse but don't fit together.
    #[test]
    fn runs_that_do_not_fit_the_frames_are_refused() {
        let sound = || {
            let (mut entry, _, _) = frame(SpaceId(0), 0..4).into_parts();
            entry.offset = crate::units::ByteOffset(64);
            Trailer {
                id: PackId([1; 16]),
                spaces: table().names().to_vec(),
                frames: vec![entry],
                runs: vec![RunRecord {
                    space: SpaceId(0),
                    start: PageIndex(0),
                    count: 4,
                    kind: RunKind::Data,
                }],
                digests: vec![PageDigest([0; 16]); 4],
            }
        };
        assert!(PackIndex::resolve(sound()).is_ok());
        type Change = fn(&mut Trailer);
        let changes: [Change; 5] = [
            |t| t.runs[0].count = 3,
            |t| t.runs[0].count = 5,
            |t| t.runs[0].space = SpaceId(1),
            |t| t.runs[0].kind = RunKind::Zero,
            |t| t.digests.truncate(3),
        ];
        for change in changes {
            let mut bad = sound();
            change(&mut bad);
            assert!(PackIndex::resolve(bad.clone()).is_err(), "accepted {bad:?}");
        }
    }

    #[test]
    fn metadata_stays_small() {
        let cost = |gap: u64| {
            let table = table();
            let mut pack = PackBuilder::new(PackId([1; 16]), &table);
            let pages = 64 * FRAME_PAGES as u64;
            for first in (0..pages).step_by(FRAME_PAGES) {
                let numbers = (first..first + FRAME_PAGES as u64).map(|page| page * gap);
                pack.push_frame(frame(SpaceId(0), numbers)).expect("room");
            }
            let info = pack.finish().expect("small").info;
            (info.raw_bytes.0 - pages * PAGE_SIZE as u64) as f64 / pages as f64
        };
        assert!(cost(1) <= 24.0, "a page of a long run costs {}", cost(1));
        assert!(cost(2) <= 40.0, "a scattered page costs {}", cost(2));
    }
}
