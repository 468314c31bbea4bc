//! The saved form of the index, before compression.
//!
//! ```text
//! pack id                16 bytes
//! number of spaces       u32   then of each: length of the name u16, name
//! number of frames       u32   then of each: offset u64, stored length u32, space u16, pages u8, codec u8, checksum 16
//! number of runs         u32   then of each: first page u64, pages u32, space u16, kind u8 (0 zero, 1 data), reserved u8
//! number of data pages   u32   then of each: digest 16
//! ```

use super::codec::Codec;
use super::error::{PackError, PackPart, at_most};
use super::frame::{FRAME_HEADER_LEN, FRAME_PAGES, FrameEntry};
use super::header::{HEADER_LEN, PackId};
use super::space_table::{SpaceId, first_duplicate};
use super::{MAX_FRAMES_PER_PACK, MAX_PAGES_PER_PACK, MAX_SPACES_PER_PACK};
use crate::digest::{Checksum, PageDigest};
use crate::names::SpaceName;
use crate::units::{
    ByteOffset, MAX_SPACE_PAGES, PAGE_SIZE, PageCount, PageIndex, PageRange, count,
};
use crate::wire::{Reader, Short};

const PART: PackPart = PackPart::Trailer;

/// Bytes of the four counts and the pack id.
const FIXED_LEN: usize = 4 * size_of::<u32>() + size_of::<PackId>();
pub(super) const FRAME_ENTRY_LEN: usize = 32;
pub(super) const RUN_LEN: usize = 16;
pub(super) const DIGEST_LEN: usize = size_of::<PageDigest>();

/// Pages one after another that are recorded in the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RunRecord {
    pub space: SpaceId,
    pub start: PageIndex,
    pub count: u32,
    pub kind: RunKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RunKind {
    Zero,
    /// The next `count` data pages of the frames.
    Data,
}

impl RunRecord {
    pub(super) fn pages(&self) -> PageRange {
        PageRange::of_len(self.start, PageCount(self.count.into()))
    }

    /// Lengthens the run when the page, recorded in the same way, follows at once.
    pub(super) fn try_append(&mut self, space: SpaceId, page: PageIndex, kind: RunKind) -> bool {
        let follows = self.space == space
            && self.kind == kind
            && self.pages().end == page
            && self.count < u32::MAX;
        self.count += u32::from(follows);
        follows
    }
}

/// The tables of a trailer as they are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trailer {
    pub id: PackId,
    pub spaces: Vec<SpaceName>,
    pub frames: Vec<FrameEntry>,
    pub runs: Vec<RunRecord>,
    pub digests: Vec<PageDigest>,
}

impl Trailer {
    /// Bytes before compression.
    pub(super) fn raw_len(&self) -> usize {
        let names: usize = self.spaces.iter().map(|name| 2 + name.as_str().len()).sum();
        FIXED_LEN
            + names
            + self.frames.len() * FRAME_ENTRY_LEN
            + self.runs.len() * RUN_LEN
            + self.digests.len() * DIGEST_LEN
    }

    /// The counts fit in 32 bits: the builder keeps the whole below
    /// [`MAX_TRAILER_RAW_LEN`](super::MAX_TRAILER_RAW_LEN).
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.raw_len());
        let count = |len: usize| count(len).to_le_bytes();
        out.extend(self.id.0);
        out.extend(count(self.spaces.len()));
        self.spaces.iter().for_each(|name| put_name(&mut out, name));
        out.extend(count(self.frames.len()));
        self.frames.iter().for_each(|frame| put_frame(&mut out, frame));
        out.extend(count(self.runs.len()));
        self.runs.iter().for_each(|run| put_run(&mut out, run));
        out.extend(count(self.digests.len()));
        self.digests.iter().for_each(|digest| out.extend(digest.0));
        out
    }

    /// Checks each entry for itself; [`PackIndex`](super::PackIndex) checks that runs and frames
    /// fit together.
    pub(super) fn parse(raw: &[u8], end_of_frames: ByteOffset) -> Result<Self, PackError> {
        let mut reader = Reader::new(raw);
        let id = PackId(reader.array().map_err(PackError::short(PART))?);
        let spaces = parse_spaces(&mut reader)?;
        let frames = parse_frames(&mut reader, spaces.len(), end_of_frames)?;
        let runs = parse_runs(&mut reader, spaces.len())?;
        let digests = parse_table(&mut reader, "data pages", DIGEST_LEN, |_, reader| {
            Ok(PageDigest(short(reader.array())?))
        })?;
        at_most(PART, "bytes behind the last table", reader.rest() as u64, 0)?;
        Ok(Self { id, spaces, frames, runs, digests })
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a space name has at most 255 bytes")]
fn put_name(out: &mut Vec<u8>, name: &SpaceName) {
    out.extend((name.as_str().len() as u16).to_le_bytes());
    out.extend(name.as_str().as_bytes());
}

fn put_frame(out: &mut Vec<u8>, frame: &FrameEntry) {
    out.extend(frame.offset.0.to_le_bytes());
    out.extend(frame.stored_len.to_le_bytes());
    out.extend(frame.space.0.to_le_bytes());
    out.extend([frame.pages, frame.codec.to_wire()]);
    out.extend(frame.checksum.0);
}

fn put_run(out: &mut Vec<u8>, run: &RunRecord) {
    out.extend(run.start.0.to_le_bytes());
    out.extend(run.count.to_le_bytes());
    out.extend(run.space.0.to_le_bytes());
    out.extend([matches!(run.kind, RunKind::Data).into(), 0]);
}

fn short<T>(result: Result<T, Short>) -> Result<T, PackError> {
    result.map_err(PackError::short(PART))
}

fn bad(table: &'static str, entry: u64, problem: &'static str) -> PackError {
    PackError::BadEntry { part: PART, table, entry, problem }
}

/// A count, then that many entries. The count is believed only as far as bytes are left for it.
fn parse_table<T>(
    reader: &mut Reader<'_>,
    what: &'static str,
    entry_len: usize,
    mut entry: impl FnMut(u64, &mut Reader<'_>) -> Result<T, PackError>,
) -> Result<Vec<T>, PackError> {
    let count = short(reader.u32())?;
    let room = reader.rest() / entry_len;
    at_most(PART, what, count.into(), room as u64)?;
    (0..u64::from(count)).map(|number| entry(number, reader)).collect()
}

fn parse_spaces(reader: &mut Reader<'_>) -> Result<Vec<SpaceName>, PackError> {
    const SHORTEST: usize = size_of::<u16>() + "ram:x".len();
    let spaces = parse_table(reader, "spaces", SHORTEST, parse_space)?;
    at_most(PART, "spaces", spaces.len() as u64, MAX_SPACES_PER_PACK as u64)?;
    match first_duplicate(&spaces) {
        Some(_) => Err(bad("space table", spaces.len() as u64, "a name is there twice")),
        None => Ok(spaces),
    }
}

fn parse_space(entry: u64, reader: &mut Reader<'_>) -> Result<SpaceName, PackError> {
    let len = short(reader.u16())?;
    let bytes = short(reader.take(len.into()))?;
    let name = String::from_utf8_lossy(bytes);
    SpaceName::new(name).map_err(|source| PackError::BadSpaceName {
        part: PART,
        entry,
        source: Box::new(source),
    })
}

/// Frames follow one another from the header to the trailer without a gap.
fn parse_frames(
    reader: &mut Reader<'_>,
    spaces: usize,
    end_of_frames: ByteOffset,
) -> Result<Vec<FrameEntry>, PackError> {
    let mut next = HEADER_LEN as u64;
    let frames = parse_table(reader, "frames", FRAME_ENTRY_LEN, |entry, reader| {
        let frame = parse_frame(entry, reader, spaces)?;
        if frame.offset.0 != next {
            return Err(bad("frame table", entry, "it doesn't begin where the last one ends"));
        }
        next = frame.byte_range().end;
        Ok(frame)
    })?;
    at_most(PART, "frames", frames.len() as u64, MAX_FRAMES_PER_PACK.into())?;
    super::error::equal(PART, "end of the last frame", next, end_of_frames.0)?;
    Ok(frames)
}

fn parse_frame(
    entry: u64,
    reader: &mut Reader<'_>,
    spaces: usize,
) -> Result<FrameEntry, PackError> {
    const TABLE: &str = "frame table";
    let offset = ByteOffset(short(reader.u64())?);
    let stored_len = short(reader.u32())?;
    let space = parse_space_id(TABLE, entry, reader, spaces)?;
    let pages = short(reader.u8())?;
    let codec = Codec::from_wire(short(reader.u8())?);
    let frame = FrameEntry {
        offset,
        stored_len,
        space,
        pages,
        codec: codec.ok_or_else(|| bad(TABLE, entry, "unknown codec"))?,
        checksum: Checksum(short(reader.array())?),
    };
    check_frame(&frame).map_err(|problem| bad(TABLE, entry, problem))?;
    Ok(frame)
}

pub(crate) fn check_frame(frame: &FrameEntry) -> Result<(), &'static str> {
    let stored_len = frame.stored_len as usize;
    if !(1..=FRAME_PAGES).contains(&usize::from(frame.pages)) {
        return Err("it has no pages or more than a frame can");
    }
    match frame.codec {
        Codec::None if stored_len != frame.raw_len() => {
            Err("stored as it is, but of another length")
        }
        // The encoder stores what doesn't shrink as it is.
        Codec::Zstd if stored_len >= frame.raw_len() => Err("compressed, but not shorter for it"),
        _ => Ok(()),
    }
}

fn parse_runs(reader: &mut Reader<'_>, spaces: usize) -> Result<Vec<RunRecord>, PackError> {
    let mut pages = 0;
    parse_table(reader, "runs", RUN_LEN, |entry, reader| {
        let run = parse_run(entry, reader, spaces)?;
        pages += u64::from(run.count);
        at_most(PART, "pages covered by the runs", pages, MAX_PAGES_PER_PACK)?;
        Ok(run)
    })
}

fn parse_run(entry: u64, reader: &mut Reader<'_>, spaces: usize) -> Result<RunRecord, PackError> {
    const TABLE: &str = "run table";
    let start = PageIndex(short(reader.u64())?);
    let count = short(reader.u32())?;
    let space = parse_space_id(TABLE, entry, reader, spaces)?;
    let kind = match short(reader.array())? {
        [0, 0] => RunKind::Zero,
        [1, 0] => RunKind::Data,
        _ => return Err(bad(TABLE, entry, "unknown kind of run")),
    };
    if count == 0 {
        return Err(bad(TABLE, entry, "it covers no page"));
    }
    let run = RunRecord { space, start, count, kind };
    if run.pages().end.0 > MAX_SPACE_PAGES {
        return Err(bad(TABLE, entry, "it reaches beyond the largest space"));
    }
    Ok(run)
}

fn parse_space_id(
    table: &'static str,
    entry: u64,
    reader: &mut Reader<'_>,
    spaces: usize,
) -> Result<SpaceId, PackError> {
    let id = short(reader.u16())?;
    if usize::from(id) < spaces {
        return Ok(SpaceId(id));
    }
    Err(bad(table, entry, "it names a space that is not in the space table"))
}

/// The promise of the format, at the worst: one data page that follows no other, in a full frame.
const _: () = {
    let shared = (FRAME_HEADER_LEN + FRAME_ENTRY_LEN).div_ceil(FRAME_PAGES);
    assert!(RUN_LEN + DIGEST_LEN + shared <= 40, "a scattered page costs too much");
    assert!(DIGEST_LEN + shared + RUN_LEN.div_ceil(FRAME_PAGES) <= 24, "a long run costs too much");
    assert!(FRAME_PAGES * PAGE_SIZE <= 256 << 10, "a frame is 256 KiB at most");
};
