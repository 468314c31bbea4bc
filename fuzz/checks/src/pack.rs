//! Pack files.
//!
//! An input is a pack whose trailer is not compressed. Checksums and lengths are put right, in the
//! header, in the footer and of each frame; where the trailer begins is what the footer says.

use crate::sealing::compressed;
use checkpoint_format::{
    ByteLen, Checksum, EncodedFrame, FOOTER_LEN, FRAME_HEADER_LEN, FrameEntry, HEADER_LEN,
    MAX_SPACE_PAGES, PAGE_SIZE, PackBuilder, PackError, PackFooter, PackHeader, PackIndex,
    PackInfo, PackNo, PageCount, PageMap, PageRange, PageRun, RunSource, SpaceTable, ZSTD_LEVEL,
};

const CHECKSUM_LEN: usize = 16;
/// Where the footer has the trailer's offset.
const OFFSET_AT: usize = 8;
/// Frames that are decoded, and written again, of one input.
const MOST_FRAMES: usize = 8;
/// Largest space whose pages are mapped.
const MOST_PAGES: u64 = 1 << 20;

/// Reads `input` as it is, and with checksums and lengths put right; whether that is a pack.
pub(crate) fn check(input: &[u8]) -> bool {
    let _ = read(input);
    let Some(file) = sealed(input) else { return false };
    let header = PackHeader::parse(&file[..HEADER_LEN]);
    let Ok((footer, index)) = read(&file) else { return false };
    assert_index(&footer, &index);
    assert_info(&footer, &index, &file);
    index.frames().iter().take(MOST_FRAMES).for_each(|frame| decode(frame, &file));
    assert_mapped(&index);
    if header.is_ok_and(|header| header.id == index.id()) && index.frames().len() <= MOST_FRAMES {
        assert_written_again(&index);
    }
    true
}

/// From its end to its index, as without a manifest.
fn read(file: &[u8]) -> Result<(PackFooter, PackIndex), PackError> {
    PackHeader::parse(&file[..file.len().min(HEADER_LEN)])?;
    let footer = PackFooter::parse(&file[file.len().saturating_sub(FOOTER_LEN)..])?;
    let range = footer.trailer_range();
    assert!(range.end <= footer.pack_len.0);
    let trailer = file.get(range.start as usize..range.end as usize).unwrap_or_default();
    let index = PackIndex::parse(trailer, &footer)?;
    Ok((footer, index))
}

fn sealed(input: &[u8]) -> Option<Vec<u8>> {
    let (header, rest) = input.split_at_checked(HEADER_LEN)?;
    let (middle, footer) = rest.split_at_checked(rest.len().checked_sub(FOOTER_LEN)?)?;
    let said = u64::from_le_bytes(footer[OFFSET_AT..OFFSET_AT + 8].try_into().ok()?);
    let offset = said.clamp(HEADER_LEN as u64, (HEADER_LEN + middle.len()) as u64);
    let (frames, raw) = middle.split_at(offset as usize - HEADER_LEN);
    let trailer = compressed(raw);
    let length = HEADER_LEN + frames.len() + trailer.len() + FOOTER_LEN;
    let numbers = [
        &footer[..OFFSET_AT],
        &offset.to_le_bytes(),
        &(trailer.len() as u32).to_le_bytes(),
        &(raw.len() as u32).to_le_bytes(),
        &Checksum::of(&trailer).0,
        &(length as u64).to_le_bytes(),
    ];
    let (header, footer) = (&header[..HEADER_LEN - CHECKSUM_LEN], numbers.concat());
    let sums = [Checksum::of(header).0, Checksum::of(&footer).0];
    Some([header, &sums[0], frames, &trailer, &footer, &sums[1]].concat())
}

fn assert_index(footer: &PackFooter, index: &PackIndex) {
    let mut next = HEADER_LEN as u64;
    for frame in index.frames() {
        assert_eq!(frame.byte_range().start, next, "frames follow one another");
        assert!((1..=64).contains(&frame.pages) && frame.stored_len as usize <= frame.raw_len());
        next = frame.byte_range().end;
    }
    assert_eq!(next, footer.trailer_offset.0);
    let pages = index.frames().iter().map(|frame| usize::from(frame.pages)).sum::<usize>();
    assert_eq!(index.digests().len(), pages);
    // Each page of each frame belongs to one run, in order.
    let mut place = (0, 0);
    for run in index.runs() {
        assert!(!run.pages.is_empty() && run.pages.end.0 <= MAX_SPACE_PAGES);
        index.space_name(run.space);
        let RunSource::Frame { frame, first_slot } = run.source else {
            assert!(index.run_digests(run).is_empty());
            continue;
        };
        let entry = index.frame(frame).expect("a frame of the pack");
        assert_eq!((frame.as_usize(), first_slot.as_usize()), place);
        assert_eq!(entry.space, run.space);
        assert_eq!(index.run_digests(run).len() as u64, run.pages.len().0);
        place.1 += run.pages.len().as_usize();
        if place.1 == usize::from(entry.pages) {
            place = (place.0 + 1, 0);
        }
    }
    assert_eq!(place, (index.frames().len(), 0));
}

/// The manifest's record of a pack leads to the same index, and to no other.
fn assert_info(footer: &PackFooter, index: &PackIndex, file: &[u8]) {
    let zeros = index.runs().iter().filter(|run| run.source == RunSource::Zero);
    let mut info = PackInfo {
        id: index.id(),
        len: footer.pack_len,
        trailer_offset: footer.trailer_offset,
        trailer_len: footer.trailer_len,
        trailer_raw_len: footer.trailer_raw_len,
        trailer_checksum: footer.trailer_checksum,
        frames: index.frames().len() as u32,
        data_pages: PageCount(index.digests().len() as u64),
        zero_pages: PageCount(zeros.map(|run| run.pages.len().0).sum()),
        raw_bytes: ByteLen(0),
    };
    let range = footer.trailer_range();
    let trailer = &file[range.start as usize..range.end as usize];
    info.parse_index(trailer).expect("a record that is true");
    info.zero_pages.0 += 1;
    info.parse_index(trailer).expect_err("a record that is not true");
}

fn decode(frame: &FrameEntry, file: &[u8]) {
    let range = frame.byte_range();
    let Some(bytes) = file.get(range.start as usize..range.end as usize) else { return };
    let _ = frame.decode(bytes);
    let (head, stored) = bytes.split_at(FRAME_HEADER_LEN);
    let head = &head[..FRAME_HEADER_LEN - CHECKSUM_LEN];
    let checksum = Checksum::of(&[stored, head].concat());
    if let Ok(content) = (FrameEntry { checksum, ..*frame }).decode(bytes) {
        assert_eq!(content.len(), frame.raw_len());
    }
}

/// Of two records of a page the later one counts.
fn assert_mapped(index: &PackIndex) {
    for name in index.spaces() {
        let mut map = PageMap::new(name.clone(), PageCount(MOST_PAGES));
        map.apply_pack(PackNo(0), index).expect("the first pack");
        let located: u64 = map.runs().map(|run| run.pages.len().0).sum();
        let unknown: u64 = map.unknown().map(|pages| pages.len().0).sum();
        assert!(located <= MOST_PAGES && unknown <= MOST_PAGES);
        for read in map.frame_reads() {
            assert!(index.frame(read.frame).is_some());
        }
    }
}

/// A pack of the same pages, made by the writer, reads the same.
fn assert_written_again(index: &PackIndex) {
    let Some(written) = written(index) else { return };
    let file = written.chunks.concat();
    let (_, again) = read(&file).expect("what was written can be read");
    assert_eq!(again.spaces(), index.spaces());
    assert_eq!(again.digests(), index.digests());
    assert_eq!(merged(again.runs()), merged(index.runs()));
    written.info.check().expect("the writer's record is true");
}

/// `None` where the writer would not make such a pack.
fn written(index: &PackIndex) -> Option<checkpoint_format::FinishedPack> {
    let spaces = SpaceTable::new(index.spaces().iter().cloned()).expect("as they were read");
    let mut pack = PackBuilder::new(index.id(), &spaces);
    let mut pages = Vec::new();
    for run in index.runs() {
        let RunSource::Frame { frame, .. } = run.source else {
            if !pages.is_empty() {
                return None;
            }
            pack.push_zero(run.space, run.pages).expect("as it was read");
            continue;
        };
        pages.extend(run.pages.iter().zip(index.run_digests(run).iter().copied()));
        let entry = index.frame(frame)?;
        if pages.len() == usize::from(entry.pages) {
            let raw = vec![0; pages.len() * PAGE_SIZE];
            pack.push_frame(EncodedFrame::encode(run.space, &pages, &raw, ZSTD_LEVEL).ok()?)
                .ok()?;
            pages.clear();
        }
    }
    Some(pack.finish().expect("small"))
}

/// Runs that continue each other are one.
fn merged(runs: &[PageRun]) -> Vec<PageRun> {
    let mut merged: Vec<PageRun> = Vec::new();
    for run in runs {
        let place = |run: &PageRun| match run.source {
            RunSource::Zero => None,
            RunSource::Frame { frame, .. } => Some(frame),
        };
        let follows = |last: &PageRun| {
            (last.space, last.pages.end, place(last)) == (run.space, run.pages.start, place(run))
        };
        match merged.last_mut() {
            Some(last) if follows(last) => {
                last.pages = PageRange::new(last.pages.start, run.pages.end);
            }
            _ => merged.push(*run),
        }
    }
    merged
}
