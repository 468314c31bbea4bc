//! Writing a segment: runs in the order of spaces and pages become blocks and a directory.

use std::collections::HashMap;

use super::block::{Content, IndexBlock, IndexFrame, MAX_BLOCK_FRAMES, MAX_BLOCK_RUNS};
use super::directory::{
    BlockRow, IndexDirectory, MAX_BLOCK_RAW_LEN, MAX_DIRECTORY_RAW_LEN, MAX_SEGMENT_BLOCKS,
    MAX_SEGMENT_LEN, MAX_SEGMENT_PACKS, PackPlace,
};
use super::error::{IndexError, IndexPart, at_most};
use super::info::SegmentInfo;
use super::run::{Placed, PlacedRun};
use crate::digest::Checksum;
use crate::names::SpaceName;
use crate::pack::{FrameEntry, MAX_SPACES_PER_PACK, compress_whole};
use crate::units::{ByteLen, PackNo, PageRange, count};

/// A segment ready to be stored behind a manifest's body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedSegment {
    /// Directory and blocks.
    pub bytes: Vec<u8>,
    /// For the manifest.
    pub info: SegmentInfo,
}

/// Makes a segment.
#[derive(Debug)]
pub struct SegmentBuilder {
    /// Most runs and frames of a block.
    limits: (usize, usize),
    directory: IndexDirectory,
    /// Of the runs that follow, if any do.
    next_space: Option<SpaceName>,
    pack_numbers: HashMap<PackPlace, PackNo>,
    blocks: Vec<u8>,
    /// Not closed: a run may follow that continues it.
    open: Option<PlacedRun>,
    block: IndexBlock,
    frames: HashMap<(PackNo, u64), u32>,
}

impl Default for SegmentBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl SegmentBuilder {
    /// A segment without pages.
    pub fn new() -> Self {
        Self::with_blocks_of(MAX_BLOCK_RUNS, MAX_BLOCK_FRAMES)
    }

    /// With smaller blocks.
    pub(super) fn with_blocks_of(runs: usize, frames: usize) -> Self {
        Self {
            limits: (runs, frames),
            directory: IndexDirectory::default(),
            next_space: None,
            pack_numbers: HashMap::new(),
            blocks: Vec::new(),
            open: None,
            block: IndexBlock::default(),
            frames: HashMap::new(),
        }
    }

    /// The number of a pack, for the runs of data that are in it. Name only packs that have some.
    pub fn pack(&mut self, place: &PackPlace) -> PackNo {
        if let Some(number) = self.pack_numbers.get(place) {
            return *number;
        }
        let number = PackNo(count(self.directory.packs.len()));
        self.directory.packs.push(place.clone());
        self.pack_numbers.insert(place.clone(), number);
        number
    }

    /// The runs that follow are of this space. One without any is not named in the segment.
    ///
    /// # Errors
    /// When it had its turn, or a block can't be compressed.
    pub fn begin_space(&mut self, space: &SpaceName) -> Result<(), IndexError> {
        self.close_block()?;
        if self.directory.spaces.contains(space) {
            return Err(IndexError::Misuse { problem: "a space is named twice" });
        }
        self.next_space = Some(space.clone());
        Ok(())
    }

    /// Adds a run behind the last one of the same space. What continues that one becomes part of
    /// it.
    ///
    /// # Errors
    /// When it does not stand behind the last one, there is no space or no such pack, there are too
    /// many blocks, or one can't be compressed.
    pub fn push(&mut self, run: PlacedRun) -> Result<(), IndexError> {
        self.directory.spaces.extend(self.next_space.take());
        self.check(&run)?;
        if self.open.as_mut().is_some_and(|open| open.try_append(&run)) {
            return Ok(());
        }
        self.close_run()?;
        self.open = Some(run);
        Ok(())
    }

    fn check(&self, run: &PlacedRun) -> Result<(), IndexError> {
        let last = self.open.as_ref().map(|open| open.pages.end);
        let last = last.or_else(|| self.block.runs.last().map(|(pages, _)| pages.end));
        let problem = match run.content {
            _ if self.directory.spaces.is_empty() => "a run is of no space",
            _ if run.pages.is_empty() => "a run has no pages",
            _ if last.is_some_and(|last| run.pages.start < last) => "a run is out of order",
            Placed::Data { pack, .. } if pack.as_usize() >= self.directory.packs.len() => {
                "a run is of no pack"
            }
            Placed::Data { frame, first_slot, .. }
                if u64::from(first_slot.0) + run.pages.len().0 > frame.pages.into() =>
            {
                "a run is longer than its frame"
            }
            _ => return Ok(()),
        };
        Err(IndexError::Misuse { problem })
    }

    fn close_run(&mut self) -> Result<(), IndexError> {
        let Some(run) = self.open.take() else { return Ok(()) };
        let is_new = |this: &Self| match run.content {
            Placed::Data { pack, frame, .. } => !this.frames.contains_key(&(pack, frame.offset.0)),
            _ => false,
        };
        let frames = self.block.frames.len() + usize::from(is_new(self));
        if self.block.runs.len() == self.limits.0 || frames > self.limits.1 {
            self.write_block()?;
        }
        let content = match run.content {
            Placed::Unknown => Content::Unknown,
            Placed::Zero => Content::Zero,
            Placed::Data { pack, frame, first_slot } => {
                Content::Data { frame: self.frame(pack, frame)?, first_slot }
            }
        };
        self.block.runs.push((run.pages, content));
        Ok(())
    }

    /// The frame's number in the block.
    fn frame(&mut self, pack: PackNo, entry: FrameEntry) -> Result<u32, IndexError> {
        let frames = &mut self.block.frames;
        let number = *self.frames.entry((pack, entry.offset.0)).or_insert_with(|| {
            frames.push(IndexFrame { pack, entry });
            count(frames.len() - 1)
        });
        if frames[number as usize].entry != entry {
            return Err(OVERLAP);
        }
        Ok(number)
    }

    fn close_block(&mut self) -> Result<(), IndexError> {
        self.close_run()?;
        self.write_block()
    }

    fn write_block(&mut self) -> Result<(), IndexError> {
        let mut block = std::mem::take(&mut self.block);
        self.frames.clear();
        let (Some((first, _)), Some((last, _))) = (block.runs.first(), block.runs.last()) else {
            return Ok(());
        };
        let pages = PageRange::new(first.start, last.end);
        sort_frames(&mut block)?;
        let part = IndexPart::Block(self.directory.blocks.len());
        let raw = block.encode();
        at_most(part, "length before compression", raw.len() as u64, MAX_BLOCK_RAW_LEN.into())?;
        let stored =
            compress_whole(&raw).map_err(|source| IndexError::Compress { part, source })?;
        self.directory.blocks.push(BlockRow {
            space: self.directory.spaces.len() - 1,
            pages,
            offset: self.blocks.len() as u64,
            stored_len: count(stored.len()),
            raw_len: count(raw.len()),
            checksum: Checksum::of(&stored),
        });
        self.blocks.extend(stored);
        Ok(())
    }

    /// The segment.
    ///
    /// # Errors
    /// When it is beyond a limit, or can't be compressed.
    pub fn finish(mut self) -> Result<EncodedSegment, IndexError> {
        const PART: IndexPart = IndexPart::Directory;
        self.close_block()?;
        let Self { directory, blocks, .. } = self;
        at_most(PART, "spaces", directory.spaces.len() as u64, MAX_SPACES_PER_PACK as u64)?;
        at_most(PART, "packs", directory.packs.len() as u64, MAX_SEGMENT_PACKS as u64)?;
        at_most(PART, "blocks", directory.blocks.len() as u64, MAX_SEGMENT_BLOCKS as u64)?;
        let raw = directory.encode();
        let most = u64::from(MAX_DIRECTORY_RAW_LEN);
        at_most(PART, "length before compression", raw.len() as u64, most)?;
        let stored =
            compress_whole(&raw).map_err(|source| IndexError::Compress { part: PART, source })?;
        at_most(
            PART,
            "length of the segment",
            (stored.len() + blocks.len()) as u64,
            MAX_SEGMENT_LEN,
        )?;
        let info = SegmentInfo {
            directory_len: count(stored.len()),
            directory_raw_len: count(raw.len()),
            directory_checksum: Checksum::of(&stored),
            blocks_len: ByteLen(blocks.len() as u64),
        };
        Ok(EncodedSegment { bytes: [stored, blocks].concat(), info })
    }
}

/// Segments that contradict one another: no pack has two frames at one byte.
const OVERLAP: IndexError = IndexError::Misuse { problem: "two frames overlap in their pack" };

/// In the order of packs and offsets, in which neighbours compress best.
fn sort_frames(block: &mut IndexBlock) -> Result<(), IndexError> {
    let mut order: Vec<usize> = (0..block.frames.len()).collect();
    order.sort_by_key(|&at| (block.frames[at].pack, block.frames[at].entry.offset));
    let mut place = vec![0; order.len()];
    order.iter().enumerate().for_each(|(to, &from)| place[from] = count(to));
    block.frames = order.iter().map(|&at| block.frames[at]).collect();
    for (_, content) in &mut block.runs {
        if let Content::Data { frame, .. } = content {
            *frame = place[*frame as usize];
        }
    }
    let overlap = block.frames.windows(2).any(|pair| {
        pair[0].pack == pair[1].pack && pair[0].entry.byte_range().end > pair[1].entry.offset.0
    });
    if overlap { Err(OVERLAP) } else { Ok(()) }
}
