//! A block: neighbouring pages of one space, and the frames that they are in.
//!
//! Before compression, numbers without a width as varints:
//!
//! ```text
//! number of frames       u32
//! number of runs         u32
//! of each frame          pack: how much higher than that of the frame before
//! of each frame          offset of its header, from the end of the frame before in the same pack
//! of each frame          length of the content as stored
//! of each frame          space: its number in that pack
//! of each frame          pages u8
//! of each frame          codec u8
//! of each frame          checksum 16
//! of each run            pages between the end of the run before and its first
//! of each run            pages, less one
//! of each run            kind u8: 0 unknown, 1 zeros, 2 data
//! of each run of data    frame
//! of each run of data    slot of its first page u8
//! ```
//!
//! Frames ascend by pack and offset, and each is used. The first run begins where the directory
//! says that the block does, the last one ends where the block does.

use super::directory::BlockRow;
use super::error::{IndexError, IndexPart, at_most, verified};
use super::run::{Placed, PlacedRun};
use crate::digest::Checksum;
use crate::pack::{Codec, FrameEntry, MAX_PACK_LEN, MAX_SPACES_PER_PACK, SpaceId, check_frame};
use crate::units::{
    ByteOffset, MAX_SPACE_PAGES, PackNo, PageCount, PageIndex, PageRange, Slot, count,
};
use crate::wire::{Reader, Short, put_varint};

/// Most runs in a block: the map of 64 MiB when each page has a run of its own.
pub const MAX_BLOCK_RUNS: usize = 1 << 14;
/// Most frames in a block: those of 1 GiB when each is full.
pub const MAX_BLOCK_FRAMES: usize = 1 << 12;

/// A frame that holds pages of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexFrame {
    /// Among the packs of the directory.
    pub pack: PackNo,
    /// All that is needed to read the frame.
    pub entry: FrameEntry,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Unknown,
    Zero,
    Data { frame: u32, first_slot: Slot },
}

/// A block, verified and read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IndexBlock {
    pub(super) frames: Vec<IndexFrame>,
    pub(super) runs: Vec<(PageRange, Content)>,
}

impl IndexBlock {
    /// Verifies and reads the block of that row; `number` names it in errors, `packs` is how many
    /// its directory has.
    ///
    /// # Errors
    /// When the bytes are damaged, beyond a limit, or contradict the directory.
    pub fn parse(
        number: usize,
        row: &BlockRow,
        packs: usize,
        stored: &[u8],
    ) -> Result<Self, IndexError> {
        let part = IndexPart::Block(number);
        let raw = verified(part, stored, (row.stored_len, row.raw_len, row.checksum))?;
        let mut parser = Parser { part, reader: Reader::new(&raw) };
        let frames = parser.count("frames", MAX_BLOCK_FRAMES)?;
        let runs = parser.count("runs", MAX_BLOCK_RUNS)?;
        let frames = parser.frames(frames, packs)?;
        let runs = parser.runs(runs, row.pages, &frames)?;
        at_most(part, "bytes behind the last column", parser.reader.rest() as u64, 0)?;
        Ok(Self { frames, runs })
    }

    /// The frames of its pages.
    pub fn frames(&self) -> &[IndexFrame] {
        &self.frames
    }

    /// The runs, ascending.
    pub fn runs(&self) -> impl Iterator<Item = PlacedRun> {
        self.runs.iter().map(|run| self.placed(run))
    }

    /// The parts of the runs that lie in `pages`, ascending.
    pub fn runs_within(&self, pages: PageRange) -> impl Iterator<Item = PlacedRun> {
        let first = self.runs.partition_point(|(run, _)| run.end <= pages.start);
        let met = self.runs[first..].iter().take_while(move |(run, _)| run.start < pages.end);
        met.map(move |run| self.placed(run).within(pages)).filter(|run| !run.pages.is_empty())
    }

    /// Bytes that it takes in memory.
    pub fn memory(&self) -> usize {
        size_of_val(&self.frames[..]) + size_of_val(&self.runs[..])
    }

    fn placed(&self, (pages, content): &(PageRange, Content)) -> PlacedRun {
        let content = match *content {
            Content::Unknown => Placed::Unknown,
            Content::Zero => Placed::Zero,
            Content::Data { frame, first_slot } => {
                let IndexFrame { pack, entry: frame } = self.frames[frame as usize];
                Placed::Data { pack, frame, first_slot }
            }
        };
        PlacedRun { pages: *pages, content }
    }

    /// The columns. The numbers of frames and runs are within their limits, and frames ascend.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(count(self.frames.len()).to_le_bytes());
        out.extend(count(self.runs.len()).to_le_bytes());
        self.encode_frames(&mut out);
        self.encode_runs(&mut out);
        out
    }

    fn encode_frames(&self, out: &mut Vec<u8>) {
        let mut before = None;
        for frame in &self.frames {
            let (pack, _) = before_of(before);
            put_varint(out, u64::from(frame.pack.0 - pack));
            before = Some(*frame);
        }
        before = None;
        for frame in &self.frames {
            let (pack, end) = before_of(before);
            let end = if frame.pack.0 == pack { end } else { 0 };
            put_varint(out, frame.entry.offset.0 - end);
            before = Some(*frame);
        }
        let entries = || self.frames.iter().map(|frame| &frame.entry);
        entries().for_each(|entry| put_varint(out, entry.stored_len.into()));
        entries().for_each(|entry| put_varint(out, entry.space.0.into()));
        out.extend(entries().map(|entry| entry.pages));
        out.extend(entries().map(|entry| entry.codec.to_wire()));
        entries().for_each(|entry| out.extend(entry.checksum.0));
    }

    fn encode_runs(&self, out: &mut Vec<u8>) {
        let mut end = self.runs.first().map_or(PageIndex(0), |(pages, _)| pages.start);
        for (pages, _) in &self.runs {
            put_varint(out, pages.start.0 - end.0);
            end = pages.end;
        }
        self.runs.iter().for_each(|(pages, _)| put_varint(out, pages.len().0 - 1));
        out.extend(self.runs.iter().map(|(_, content)| match content {
            Content::Unknown => 0,
            Content::Zero => 1,
            Content::Data { .. } => 2,
        }));
        let data = || {
            self.runs.iter().filter_map(|(_, content)| match content {
                Content::Data { frame, first_slot } => Some((*frame, first_slot.0)),
                _ => None,
            })
        };
        data().for_each(|(frame, _)| put_varint(out, frame.into()));
        out.extend(data().map(|(_, slot)| slot));
    }
}

/// Pack and end of a frame; of none: the first pack, the start of its file.
fn before_of(frame: Option<IndexFrame>) -> (u32, u64) {
    frame.map_or((0, 0), |frame| (frame.pack.0, frame.entry.byte_range().end))
}

struct Parser<'a> {
    part: IndexPart,
    reader: Reader<'a>,
}

impl<'a> Parser<'a> {
    fn bad(&self, table: &'static str, entry: usize, problem: &'static str) -> IndexError {
        IndexError::BadEntry { part: self.part, table, entry, problem }
    }

    fn count(&mut self, what: &'static str, limit: usize) -> Result<usize, IndexError> {
        let count = self.reader.u32().map_err(IndexError::short(self.part))?;
        at_most(self.part, what, count.into(), limit as u64)?;
        Ok(count as usize)
    }

    fn column<T>(
        &mut self,
        count: usize,
        mut entry: impl FnMut(&mut Reader<'a>) -> Result<T, Short>,
    ) -> Result<Vec<T>, IndexError> {
        let column: Result<Vec<T>, Short> = (0..count).map(|_| entry(&mut self.reader)).collect();
        column.map_err(IndexError::short(self.part))
    }

    fn frames(&mut self, count: usize, packs: usize) -> Result<Vec<IndexFrame>, IndexError> {
        const TABLE: &str = "frame table";
        let pack_steps = self.column(count, Reader::varint)?;
        let offsets = self.column(count, Reader::varint)?;
        let lengths = self.column(count, Reader::varint)?;
        let spaces = self.column(count, Reader::varint)?;
        let pages = self.column(count, Reader::u8)?;
        let codecs = self.column(count, Reader::u8)?;
        let checksums = self.column(count, Reader::array)?;
        let mut frames = Vec::with_capacity(count);
        for nth in 0..count {
            let (before, end) = before_of(frames.last().copied());
            let pack = u64::from(before).saturating_add(pack_steps[nth]);
            let from = if pack == u64::from(before) { end } else { 0 };
            let entry = FrameEntry {
                offset: ByteOffset(from.saturating_add(offsets[nth])),
                stored_len: u32::try_from(lengths[nth]).unwrap_or(u32::MAX),
                space: SpaceId(u16::try_from(spaces[nth]).unwrap_or(u16::MAX)),
                pages: pages[nth],
                codec: Codec::from_wire(codecs[nth])
                    .ok_or_else(|| self.bad(TABLE, nth, "unknown codec"))?,
                checksum: Checksum(checksums[nth]),
            };
            check_frame(&entry).map_err(|problem| self.bad(TABLE, nth, problem))?;
            if entry.offset.0 > MAX_PACK_LEN || usize::from(entry.space.0) >= MAX_SPACES_PER_PACK {
                return Err(self.bad(TABLE, nth, "its place is beyond a limit"));
            }
            let pack = u32::try_from(pack).ok().filter(|pack| (*pack as usize) < packs);
            let pack = pack.ok_or_else(|| self.bad(TABLE, nth, "its pack is not in the list"))?;
            frames.push(IndexFrame { pack: PackNo(pack), entry });
        }
        Ok(frames)
    }

    fn runs(
        &mut self,
        count: usize,
        block: PageRange,
        frames: &[IndexFrame],
    ) -> Result<Vec<(PageRange, Content)>, IndexError> {
        const TABLE: &str = "run table";
        let gaps = self.column(count, Reader::varint)?;
        let lengths = self.column(count, Reader::varint)?;
        let contents = self.contents(count, frames)?;
        let mut at = block.start;
        let mut runs = Vec::with_capacity(count);
        for (nth, content) in contents.into_iter().enumerate() {
            let start = at.0.saturating_add(gaps[nth]);
            let len = lengths[nth].saturating_add(1);
            let end = start.saturating_add(len);
            if end > block.end.0 || end > MAX_SPACE_PAGES {
                return Err(self.bad(TABLE, nth, "it reaches beyond its block"));
            }
            if let Content::Data { frame, first_slot } = content
                && u64::from(first_slot.0) + len > frames[frame as usize].entry.pages.into()
            {
                return Err(self.bad(TABLE, nth, "it reaches beyond its frame"));
            }
            at = PageIndex(end);
            runs.push((PageRange::of_len(PageIndex(start), PageCount(len)), content));
        }
        if runs.first().is_none_or(|(pages, _)| pages.start != block.start) || at != block.end {
            return Err(self.bad(TABLE, count, "the runs don't fill the block"));
        }
        Ok(runs)
    }

    /// Each run's kind, frame and slot; every frame is of use.
    fn contents(
        &mut self,
        count: usize,
        frames: &[IndexFrame],
    ) -> Result<Vec<Content>, IndexError> {
        const TABLE: &str = "run table";
        let kinds = self.column(count, Reader::u8)?;
        let data = kinds.iter().filter(|kind| **kind == 2).count();
        let numbers = self.column(data, Reader::varint)?;
        let slots = self.column(data, Reader::u8)?;
        let mut used = vec![false; frames.len()];
        let mut data = numbers.into_iter().zip(slots);
        let mut contents = Vec::with_capacity(count);
        for (nth, kind) in kinds.into_iter().enumerate() {
            contents.push(match kind {
                0 => Content::Unknown,
                1 => Content::Zero,
                2 => {
                    let (number, slot) = data.next().unwrap_or((u64::MAX, 0));
                    let frame = u32::try_from(number).ok();
                    let frame = frame.filter(|frame| (*frame as usize) < frames.len());
                    let frame = frame.ok_or_else(|| self.bad(TABLE, nth, "it has no frame"))?;
                    used[frame as usize] = true;
                    Content::Data { frame, first_slot: Slot(slot) }
                }
                _ => return Err(self.bad(TABLE, nth, "unknown kind of run")),
            });
        }
        match used.iter().position(|used| !used) {
            Some(frame) => Err(self.bad("frame table", frame, "no run is in it")),
            None => Ok(contents),
        }
    }
}
