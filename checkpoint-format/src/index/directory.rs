//! The directory of a segment: which spaces, packs and blocks it has.
//!
//! Before compression, numbers without a width as varints:
//!
//! ```text
//! number of spaces  u32  then of each: length of the name u16, name
//! number of packs   u32  then of each: checkpoint; then of each: length of the name u16, name
//! number of blocks  u32  then of each: space: how much higher than that of the block before
//!                        then of each: pages from the block before it in its space to its first
//!                        then of each: pages that it reaches over, less one
//!                        then of each: stored length
//!                        then of each: length before compression
//!                        then of each: checksum 16
//! ```
//!
//! Blocks ascend by space and page, and follow the directory in this order without a gap.

use super::error::{IndexError, IndexPart, at_most, verified};
use super::info::SegmentInfo;
use crate::digest::Checksum;
use crate::names::{NameError, PackName, SpaceName};
use crate::pack::MAX_SPACES_PER_PACK;
use crate::units::{CheckpointId, MAX_SPACE_PAGES, PackNo, PageIndex, PageRange, count};
use crate::wire::{Reader, Short, put_varint};
use std::ops::Range;

const PART: IndexPart = IndexPart::Directory;

/// Longest directory before compression.
pub const MAX_DIRECTORY_RAW_LEN: u32 = 64 << 20;
/// Longest block before compression: more than the most runs and frames can take.
pub const MAX_BLOCK_RAW_LEN: u32 = 1 << 20;
/// Most blocks of a segment.
pub const MAX_SEGMENT_BLOCKS: usize = 1 << 20;
/// Most packs that the pages of a segment can be in.
pub const MAX_SEGMENT_PACKS: usize = 1 << 21;
/// Longest segment as stored.
pub const MAX_SEGMENT_LEN: u64 = 1 << 30;

/// A pack, as seen from any checkpoint of the lineage.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackPlace {
    /// The checkpoint that the pack is of.
    pub checkpoint: CheckpointId,
    /// Its file name.
    pub name: PackName,
}

/// Where a block is and which pages it reaches over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockRow {
    /// Among the spaces of the directory.
    pub space: usize,
    /// From its first run to its last; there may be holes between.
    pub pages: PageRange,
    /// Where its bytes begin, counted from the end of the directory.
    pub offset: u64,
    /// Bytes as stored.
    pub stored_len: u32,
    /// Bytes after decompression.
    pub raw_len: u32,
    /// Of the bytes as stored. Equal bytes are equal runs only from the same first page on.
    pub checksum: Checksum,
}

impl BlockRow {
    /// Its bytes, counted from the end of the directory.
    pub fn byte_range(&self) -> Range<u64> {
        self.offset..self.offset + u64::from(self.stored_len)
    }
}

/// What a segment consists of, verified and read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IndexDirectory {
    pub(super) spaces: Vec<SpaceName>,
    pub(super) packs: Vec<PackPlace>,
    pub(super) blocks: Vec<BlockRow>,
}

impl IndexDirectory {
    /// Verifies the directory's bytes, just those, against what the manifest says, and reads them.
    ///
    /// # Errors
    /// When they are damaged, beyond a limit, or contradict the manifest.
    pub fn parse(stored: &[u8], info: &SegmentInfo) -> Result<Self, IndexError> {
        info.check()?;
        let expected = (info.directory_len, info.directory_raw_len, info.directory_checksum);
        let raw = verified(PART, stored, expected)?;
        let mut reader = Reader::new(&raw);
        let spaces = spaces(&mut reader)?;
        let packs = packs(&mut reader)?;
        let blocks = blocks(&mut reader, spaces.len())?;
        at_most(PART, "bytes behind the last column", reader.rest() as u64, 0)?;
        let end = blocks.last().map_or(0, |row| row.byte_range().end);
        if end != info.blocks_len.0 {
            let problem = "the blocks are not as long as the manifest says";
            return Err(bad("block table", blocks.len(), problem));
        }
        Ok(Self { spaces, packs, blocks })
    }

    /// The spaces that it has pages of.
    pub fn spaces(&self) -> &[SpaceName] {
        &self.spaces
    }

    /// The packs that the pages are in, by number.
    pub fn packs(&self) -> &[PackPlace] {
        &self.packs
    }

    /// The pack of that number.
    pub fn pack(&self, number: PackNo) -> Option<&PackPlace> {
        self.packs.get(number.as_usize())
    }

    /// The blocks, by number.
    pub fn blocks(&self) -> &[BlockRow] {
        &self.blocks
    }

    /// The numbers of the blocks of a space that reach over any of `pages`.
    pub fn blocks_of(&self, space: &SpaceName, pages: PageRange) -> Range<usize> {
        let Some(space) = self.spaces.iter().position(|known| known == space) else { return 0..0 };
        let before = |row: &BlockRow| {
            row.space < space || row.space == space && row.pages.end <= pages.start
        };
        let start = self.blocks.partition_point(before);
        let met = self.blocks[start..]
            .iter()
            .take_while(|row| row.space == space && row.pages.start < pages.end);
        start..start + met.count()
    }

    /// The columns. The counts are within their limits.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(count(self.spaces.len()).to_le_bytes());
        self.spaces.iter().for_each(|name| put_name(&mut out, name.as_str()));
        out.extend(count(self.packs.len()).to_le_bytes());
        self.packs.iter().for_each(|pack| put_varint(&mut out, pack.checkpoint.0));
        self.packs.iter().for_each(|pack| put_name(&mut out, pack.name.as_str()));
        self.encode_blocks(&mut out);
        out
    }

    fn encode_blocks(&self, out: &mut Vec<u8>) {
        out.extend(count(self.blocks.len()).to_le_bytes());
        let mut space = 0;
        for row in &self.blocks {
            put_varint(out, (row.space - space) as u64);
            space = row.space;
        }
        let mut before = (0, PageIndex(0));
        for row in &self.blocks {
            put_varint(out, row.pages.start.0 - end_before(before, row.space).0);
            before = (row.space, row.pages.end);
        }
        self.blocks.iter().for_each(|row| put_varint(out, row.pages.len().0 - 1));
        self.blocks.iter().for_each(|row| put_varint(out, row.stored_len.into()));
        self.blocks.iter().for_each(|row| put_varint(out, row.raw_len.into()));
        self.blocks.iter().for_each(|row| out.extend(row.checksum.0));
    }
}

/// Where the block before ends, if it is of the same space.
fn end_before(before: (usize, PageIndex), space: usize) -> PageIndex {
    if before.0 == space { before.1 } else { PageIndex(0) }
}

#[expect(clippy::cast_possible_truncation, reason = "a name has at most 255 bytes")]
fn put_name(out: &mut Vec<u8>, name: &str) {
    out.extend((name.len() as u16).to_le_bytes());
    out.extend(name.as_bytes());
}

fn short(short: Short) -> IndexError {
    IndexError::short(PART)(short)
}

fn bad(table: &'static str, entry: usize, problem: &'static str) -> IndexError {
    IndexError::BadEntry { part: PART, table, entry, problem }
}

/// A count, believed only as far as bytes are left for that many entries.
fn counted(
    reader: &mut Reader<'_>,
    what: &'static str,
    entry_len: usize,
    limit: usize,
) -> Result<usize, IndexError> {
    let count = reader.u32().map_err(short)? as usize;
    at_most(PART, what, count as u64, limit.min(reader.rest() / entry_len) as u64)?;
    Ok(count)
}

fn names<T>(
    reader: &mut Reader<'_>,
    table: &'static str,
    count: usize,
    make: impl Fn(String) -> Result<T, NameError>,
) -> Result<Vec<T>, IndexError> {
    let name = |entry| {
        let len = reader.u16().map_err(short)?;
        let bytes = reader.take(len.into()).map_err(short)?;
        make(String::from_utf8_lossy(bytes).into_owned()).map_err(|source| {
            let source = Box::new(source);
            IndexError::BadName { part: PART, table, entry, source }
        })
    };
    (0..count).map(name).collect()
}

fn varints(reader: &mut Reader<'_>, count: usize) -> Result<Vec<u64>, IndexError> {
    (0..count).map(|_| reader.varint().map_err(short)).collect()
}

fn spaces(reader: &mut Reader<'_>) -> Result<Vec<SpaceName>, IndexError> {
    const SHORTEST: usize = size_of::<u16>() + "ram:x".len();
    let count = counted(reader, "spaces", SHORTEST, MAX_SPACES_PER_PACK)?;
    let spaces = names(reader, "space table", count, SpaceName::new)?;
    let mut seen = std::collections::HashSet::new();
    match spaces.iter().position(|name| !seen.insert(name)) {
        Some(entry) => Err(bad("space table", entry, "the name is there twice")),
        None => Ok(spaces),
    }
}

fn packs(reader: &mut Reader<'_>) -> Result<Vec<PackPlace>, IndexError> {
    const SHORTEST: usize = 1 + size_of::<u16>() + 1;
    let count = counted(reader, "packs", SHORTEST, MAX_SEGMENT_PACKS)?;
    let checkpoints = varints(reader, count)?;
    let names = names(reader, "pack table", count, PackName::new)?;
    let places = checkpoints.into_iter().map(CheckpointId).zip(names);
    Ok(places.map(|(checkpoint, name)| PackPlace { checkpoint, name }).collect())
}

fn blocks(reader: &mut Reader<'_>, spaces: usize) -> Result<Vec<BlockRow>, IndexError> {
    const TABLE: &str = "block table";
    const SHORTEST: usize = 5 + size_of::<Checksum>();
    let count = counted(reader, "blocks", SHORTEST, MAX_SEGMENT_BLOCKS)?;
    let [space_steps, gaps, lengths, stored, raw] = [(); 5].map(|()| varints(reader, count));
    let (space_steps, gaps, lengths, stored, raw) = (space_steps?, gaps?, lengths?, stored?, raw?);
    let mut rows: Vec<BlockRow> = Vec::with_capacity(count);
    let (mut space, mut offset, mut before) = (0_u64, 0_u64, (0, PageIndex(0)));
    for nth in 0..count {
        space = space.saturating_add(space_steps[nth]);
        let number = usize::try_from(space).ok().filter(|number| *number < spaces);
        let number = number.ok_or_else(|| bad(TABLE, nth, "its space is not in the list"))?;
        let start = end_before(before, number).0.saturating_add(gaps[nth]);
        let end = start.saturating_add(lengths[nth]).saturating_add(1);
        if end > MAX_SPACE_PAGES {
            return Err(bad(TABLE, nth, "it reaches beyond the largest space"));
        }
        let len = |length: u64| {
            let length = u32::try_from(length).ok().filter(|length| *length <= MAX_BLOCK_RAW_LEN);
            length.ok_or_else(|| bad(TABLE, nth, "it is longer than a block can be"))
        };
        let row = BlockRow {
            space: number,
            pages: PageRange::new(PageIndex(start), PageIndex(end)),
            offset,
            stored_len: len(stored[nth])?,
            raw_len: len(raw[nth])?,
            checksum: Checksum(reader.array().map_err(short)?),
        };
        offset = row.byte_range().end;
        before = (number, row.pages.end);
        rows.push(row);
    }
    Ok(rows)
}
