//! A segment of the index behind a manifest.
//!
//! An input is: the length of all blocks (64 bits), the length of the directory (32 bits), the
//! directory before compression; first page and end of a block (64 bits each), the number of packs
//! (32 bits), and the block before compression.

use crate::sealing::compressed;
use checkpoint_format::{
    BlockRow, ByteLen, CheckpointId, Checksum, EncodedSegment, IndexBlock, IndexDirectory,
    MAX_SEGMENT_PACKS, MAX_SPACE_PAGES, PackName, PackPlace, PageIndex, PageRange, Placed,
    PlacedRun, Segment, SegmentBuilder, SegmentInfo, SpaceName,
};

/// Reads a directory and a block whose lengths and checksums are right; whether they are sound.
pub(crate) fn check(input: &[u8]) -> bool {
    let mut input = input;
    let Some((blocks_len, len)) = number(&mut input, 8).zip(number(&mut input, 4)) else {
        return false;
    };
    let Some((directory, rest)) = input.split_at_checked(len as usize) else { return false };
    input = rest;
    let numbers = [8, 8, 4].map(|width| number(&mut input, width));
    let [Some(start), Some(end), Some(packs)] = numbers else { return false };
    let pages = PageRange::new(PageIndex(start), PageIndex(end));
    let has_directory = read_directory(directory, blocks_len);
    let has_block = read_block(input, pages, (packs as usize).min(MAX_SEGMENT_PACKS));
    has_directory && has_block
}

fn number(input: &mut &[u8], width: usize) -> Option<u64> {
    let (front, rest) = input.split_at_checked(width)?;
    *input = rest;
    let mut bytes = [0; 8];
    bytes[..width].copy_from_slice(front);
    Some(u64::from_le_bytes(bytes))
}

fn read_directory(raw: &[u8], blocks_len: u64) -> bool {
    let stored = compressed(raw);
    let info = SegmentInfo {
        directory_len: stored.len() as u32,
        directory_raw_len: raw.len() as u32,
        directory_checksum: Checksum::of(&stored),
        blocks_len: ByteLen(blocks_len),
    };
    let Ok(directory) = IndexDirectory::parse(&stored, &info) else { return false };
    let mut next = (0, 0, PageIndex(0));
    for row in directory.blocks() {
        let (space, offset, page) = next;
        assert_eq!(row.offset, offset);
        assert!(row.space > space || row.space == space && row.pages.start >= page, "{row:?}");
        assert!(row.pages.start < row.pages.end && row.pages.end.0 <= MAX_SPACE_PAGES, "{row:?}");
        let name = &directory.spaces()[row.space];
        let met = directory.blocks_of(name, row.pages);
        assert_eq!(directory.blocks()[met].iter().collect::<Vec<_>>(), [row]);
        next = (row.space, row.byte_range().end, row.pages.end);
    }
    assert_eq!(next.1, blocks_len);
    true
}

fn read_block(raw: &[u8], pages: PageRange, packs: usize) -> bool {
    let stored = compressed(raw);
    let row = BlockRow {
        space: 0,
        pages,
        offset: 0,
        stored_len: stored.len() as u32,
        raw_len: raw.len() as u32,
        checksum: Checksum::of(&stored),
    };
    let Ok(block) = IndexBlock::parse(0, &row, packs, &stored) else { return false };
    let runs: Vec<PlacedRun> = block.runs().collect();
    assert_eq!(runs.first().map(|run| run.pages.start), Some(pages.start));
    assert_eq!(runs.last().map(|run| run.pages.end), Some(pages.end));
    assert!(runs.windows(2).all(|pair| pair[0].pages.end <= pair[1].pages.start));
    for run in &runs {
        let found: Vec<PlacedRun> = block.runs_within(run.pages).collect();
        assert_eq!(found, [*run]);
        if let Placed::Data { pack, frame, first_slot } = run.content {
            assert!(pack.as_usize() < packs);
            assert!(u64::from(first_slot.0) + run.pages.len().0 <= frame.pages.into());
        }
    }
    // Once written, packs are numbered by their first use, and runs are as long as they can be.
    let once = read_again(&written(&runs));
    let covered = |runs: &[PlacedRun]| runs.iter().map(|run| run.pages.len().0).sum::<u64>();
    assert_eq!(covered(&once), covered(&runs));
    assert_eq!(read_again(&written(&once)), once);
    true
}

const SPACE: &str = "ram:pc.ram";

fn read_again(segment: &EncodedSegment) -> Vec<PlacedRun> {
    let segment =
        Segment::new(&segment.bytes, &segment.info).expect("what was written can be read");
    let space: SpaceName = SPACE.parse().expect("a name");
    let all = PageRange::new(PageIndex(0), PageIndex(MAX_SPACE_PAGES));
    segment.runs(&space, all).map(|run| run.expect("ours")).collect()
}

/// The runs as a segment, each pack under its number.
fn written(runs: &[PlacedRun]) -> EncodedSegment {
    let mut builder = SegmentBuilder::new();
    builder.begin_space(&SPACE.parse().expect("a name")).expect("the first space");
    for run in runs {
        let mut run = *run;
        if let Placed::Data { pack, .. } = &mut run.content {
            let name = PackName::new(format!("{}.pack", pack.0)).expect("a name");
            *pack = builder.pack(&PackPlace { checkpoint: CheckpointId(1), name });
        }
        builder.push(run).expect("what was read can be written");
    }
    builder.finish().expect("it is not longer than what was read")
}
