//! Collects frames and zero runs into the chunks of a pack file.

use super::codec::compress_whole;
use super::error::EncodeError;
use super::footer::{FOOTER_LEN, PackFooter};
use super::frame::EncodedFrame;
use super::header::{HEADER_LEN, PackHeader, PackId};
use super::index::PackLayout;
use super::info::PackInfo;
use super::space_table::{SpaceId, SpaceTable};
use super::trailer::{DIGEST_LEN, FRAME_ENTRY_LEN, RUN_LEN, RunKind, RunRecord, Trailer};
use super::{MAX_FRAMES_PER_PACK, MAX_PACK_LEN, MAX_PAGES_PER_PACK, MAX_TRAILER_RAW_LEN};
use crate::digest::{Checksum, PageDigest};
use crate::units::{ByteLen, ByteOffset, MAX_SPACE_PAGES, PageCount, PageIndex, PageRange, count};

/// A pack that is being filled.
///
/// A page may be recorded more than once; the record that was pushed last counts.
#[derive(Debug)]
pub struct PackBuilder {
    trailer: Trailer,
    trailer_raw_len: u64,
    frames_end: u64,
    raw_bytes: u64,
    zero_pages: u64,
    chunks: Vec<Vec<u8>>,
}

/// The bytes of a pack file, in order, and what the manifest says about it.
#[derive(Debug)]
pub struct FinishedPack {
    /// The bytes of the pack, in order.
    pub chunks: Vec<Vec<u8>>,
    /// What the manifest says of the pack.
    pub info: PackInfo,
    /// What its trailer says of its pages, but for the digests.
    pub layout: PackLayout,
}

impl PackBuilder {
    /// A pack without frames, for pages of these spaces.
    pub fn new(id: PackId, spaces: &SpaceTable) -> Self {
        let trailer = Trailer {
            id,
            spaces: spaces.names().to_vec(),
            frames: Vec::new(),
            runs: Vec::new(),
            digests: Vec::new(),
        };
        Self {
            trailer_raw_len: trailer.raw_len() as u64,
            frames_end: HEADER_LEN as u64,
            raw_bytes: HEADER_LEN as u64,
            zero_pages: 0,
            chunks: vec![PackHeader { id }.encode()],
            trailer,
        }
    }

    /// Whether the pack is still within its limits with this frame in it.
    pub fn has_room_for(&self, frame: &EncodedFrame) -> bool {
        self.check_room(frame).is_ok()
    }

    /// Adds the frame behind all others.
    ///
    /// # Errors
    /// When the space is unknown, a page is out of order, or the pack is full.
    pub fn push_frame(&mut self, frame: EncodedFrame) -> Result<(), EncodeError> {
        self.check_space(frame.space())?;
        self.check_room(&frame)?;
        let (mut entry, pages, bytes) = frame.into_parts();
        entry.offset = ByteOffset(self.frames_end);
        for &(page, digest) in &pages {
            self.record(entry.space, page, digest);
        }
        self.frames_end = entry.byte_range().end;
        self.raw_bytes += (bytes.len() - entry.stored_len as usize + entry.raw_len()) as u64;
        self.trailer_raw_len += FRAME_ENTRY_LEN as u64;
        self.trailer.frames.push(entry);
        self.chunks.push(bytes);
        Ok(())
    }

    fn record(&mut self, space: SpaceId, page: PageIndex, digest: PageDigest) {
        self.trailer.digests.push(digest);
        self.trailer_raw_len += DIGEST_LEN as u64;
        let last = self.trailer.runs.last_mut();
        if !last.is_some_and(|run| run.try_append(space, page, RunKind::Data)) {
            self.push_run(space, page, 1, RunKind::Data);
        }
    }

    fn push_run(&mut self, space: SpaceId, start: PageIndex, count: u32, kind: RunKind) {
        self.trailer_raw_len += RUN_LEN as u64;
        self.trailer.runs.push(RunRecord { space, start, count, kind });
    }

    /// Records that the pages hold zeros.
    ///
    /// # Errors
    /// When the space is unknown, or the pack is full.
    pub fn push_zero(&mut self, space: SpaceId, pages: PageRange) -> Result<(), EncodeError> {
        self.check_space(space)?;
        self.check_zero(pages)?;
        for piece in pages.chunks(PageCount(u32::MAX.into())) {
            // The piece's length is what it was cut to: at most 32 bits.
            self.push_run(space, piece.start, count(piece.len().as_usize()), RunKind::Zero);
        }
        self.zero_pages += pages.len().0;
        Ok(())
    }

    /// Bytes of header and frames so far. The trailer and the footer come on top.
    pub fn len(&self) -> ByteLen {
        ByteLen(self.frames_end)
    }

    /// Bytes of the index so far, before compression: what pages that compress to nothing cost all
    /// the same.
    pub fn index_len(&self) -> ByteLen {
        ByteLen(self.trailer_raw_len)
    }

    /// Whether nothing was recorded: such a pack need not be stored.
    pub fn is_empty(&self) -> bool {
        self.trailer.runs.is_empty()
    }

    /// Appends index and footer.
    ///
    /// # Errors
    /// When the index cannot be compressed, or is too long.
    ///
    /// # Panics
    /// Never: the runs of a builder name all of its frames.
    pub fn finish(mut self) -> Result<FinishedPack, EncodeError> {
        let raw = self.trailer.encode();
        let stored = compress_whole(&raw)
            .map_err(|source| EncodeError::Compress { what: "the trailer of a pack", source })?;
        let footer = self.footer(raw.len(), &stored);
        let info = self.info(&footer);
        self.chunks.push(stored);
        self.chunks.push(footer.encode());
        let Trailer { spaces, frames, runs, .. } = self.trailer;
        let layout = PackLayout::resolve(spaces, frames, &runs)
            .expect("the runs of a builder name all of its frames");
        Ok(FinishedPack { chunks: self.chunks, info, layout })
    }

    /// The trailer's lengths fit: it was kept below [`MAX_TRAILER_RAW_LEN`], and zstd adds little
    /// at the worst.
    fn footer(&self, raw_len: usize, stored: &[u8]) -> PackFooter {
        PackFooter {
            trailer_offset: ByteOffset(self.frames_end),
            trailer_len: count(stored.len()),
            trailer_raw_len: count(raw_len),
            trailer_checksum: Checksum::of(stored),
            pack_len: ByteLen(self.frames_end + (stored.len() + FOOTER_LEN) as u64),
        }
    }

    fn info(&self, footer: &PackFooter) -> PackInfo {
        let raw_bytes = self.raw_bytes + u64::from(footer.trailer_raw_len) + FOOTER_LEN as u64;
        PackInfo {
            id: self.trailer.id,
            len: footer.pack_len,
            trailer_offset: footer.trailer_offset,
            trailer_len: footer.trailer_len,
            trailer_raw_len: footer.trailer_raw_len,
            trailer_checksum: footer.trailer_checksum,
            frames: count(self.trailer.frames.len()),
            data_pages: PageCount(self.trailer.digests.len() as u64),
            zero_pages: PageCount(self.zero_pages),
            raw_bytes: ByteLen(raw_bytes),
        }
    }

    fn check_space(&self, space: SpaceId) -> Result<(), EncodeError> {
        let spaces = self.trailer.spaces.len();
        if usize::from(space.0) < spaces {
            return Ok(());
        }
        Err(EncodeError::UnknownSpace { space: space.0, spaces })
    }

    fn check_room(&self, frame: &EncodedFrame) -> Result<(), EncodeError> {
        let pages = frame.pages().len() as u64;
        // As if no page followed another: a little room may stay unused, but the limit is kept for
        // certain.
        let entries = FRAME_ENTRY_LEN as u64 + pages * (RUN_LEN + DIGEST_LEN) as u64;
        let frames = self.trailer.frames.len() as u64 + 1;
        fits("the number of frames", frames, MAX_FRAMES_PER_PACK.into())?;
        self.check_pages(pages)?;
        self.check_lens(entries, frame.stored_len() as u64)
    }

    fn check_zero(&self, pages: PageRange) -> Result<(), EncodeError> {
        if pages.end.0 > MAX_SPACE_PAGES {
            return Err(EncodeError::PageBeyondLimit {
                page: PageIndex(pages.end.0 - 1),
                limit: MAX_SPACE_PAGES,
            });
        }
        let runs = pages.len().0.div_ceil(u32::MAX.into());
        self.check_pages(pages.len().0)?;
        self.check_lens(runs * RUN_LEN as u64, 0)
    }

    fn check_pages(&self, more: u64) -> Result<(), EncodeError> {
        let pages = self.zero_pages + self.trailer.digests.len() as u64 + more;
        fits("the number of pages", pages, MAX_PAGES_PER_PACK)
    }

    fn check_lens(&self, entries: u64, frame_len: u64) -> Result<(), EncodeError> {
        /// What compression may add at the worst to a trailer of the longest kind, with a margin.
        const SLACK: u64 = 1 << 20;
        let trailer = self.trailer_raw_len + entries;
        fits("the trailer's length", trailer, MAX_TRAILER_RAW_LEN.into())?;
        let pack = self.frames_end + frame_len + trailer + SLACK + FOOTER_LEN as u64;
        fits("the pack's length", pack, MAX_PACK_LEN)
    }
}

fn fits(what: &'static str, would_be: u64, limit: u64) -> Result<(), EncodeError> {
    if would_be <= limit {
        return Ok(());
    }
    Err(EncodeError::Full { what, would_be, limit })
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::pack::testing::{frame, table};
    use crate::pack::{RunSource, SpaceId};

    const SPACE: SpaceId = SpaceId(0);

    fn builder() -> PackBuilder {
        PackBuilder::new(PackId([1; 16]), &table())
    }

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::new(PageIndex(start), PageIndex(end))
    }

    fn assert_full(result: Result<(), EncodeError>, words: &str) {
        let error = result.expect_err(words);
        assert!(matches!(error, EncodeError::Full { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }

    #[test]
    fn spaces_of_another_table_are_refused() {
        let mut pack = builder();
        let stray = pack.push_frame(frame(SpaceId(2), [1]));
        assert!(matches!(stray, Err(EncodeError::UnknownSpace { space: 2, spaces: 2 })));
        let stray = pack.push_zero(SpaceId(2), range(0, 1));
        assert!(matches!(stray, Err(EncodeError::UnknownSpace { .. })));
        assert!(pack.is_empty());
    }

    #[test]
    fn a_zero_run_of_any_length_is_recorded_whole() {
        let mut pack = builder();
        pack.push_zero(SPACE, range(0, MAX_PAGES_PER_PACK)).expect("just within the limit");
        let finished = pack.finish().expect("small");
        let index = finished.info.parse_index(&finished.chunks[1]).expect("sound");
        let ends: Vec<_> = index.runs().iter().map(|run| run.pages.end.0).collect();
        assert_eq!(ends, [u64::from(u32::MAX), MAX_PAGES_PER_PACK]);
        assert!(index.runs().iter().all(|run| run.source == RunSource::Zero));
    }

    #[test]
    fn no_run_is_recorded_for_no_pages() {
        let mut pack = builder();
        pack.push_zero(SPACE, range(5, 5)).expect("nothing to do");
        assert!(pack.is_empty());
    }

    #[test]
    fn what_a_reader_would_refuse_is_not_built() {
        let beyond = builder().push_zero(SPACE, range(MAX_SPACE_PAGES, MAX_SPACE_PAGES + 1));
        assert!(matches!(beyond, Err(EncodeError::PageBeyondLimit { .. })));
        let many = range(0, MAX_PAGES_PER_PACK + 1);
        assert_full(builder().push_zero(SPACE, many), "the number of pages");
        let mut pack = builder();
        pack.push_zero(SPACE, range(0, MAX_PAGES_PER_PACK)).expect("just within the limit");
        assert_full(pack.push_frame(frame(SPACE, [1])), "the number of pages");
    }

    #[test]
    fn a_full_pack_says_so_and_stays_usable() {
        let mut pack = builder();
        pack.trailer_raw_len = u64::from(MAX_TRAILER_RAW_LEN) - RUN_LEN as u64;
        assert!(!pack.has_room_for(&frame(SPACE, [1])));
        assert_full(pack.push_frame(frame(SPACE, [1])), "the trailer's length");
        pack.push_zero(SPACE, range(0, 1)).expect("room for one run");
        assert_full(pack.push_zero(SPACE, range(0, 1)), "the trailer's length");
        let mut pack = builder();
        pack.frames_end = MAX_PACK_LEN - (1 << 20);
        assert_full(pack.push_frame(frame(SPACE, [1])), "the pack's length");
        assert!(pack.finish().is_ok());
    }

    #[test]
    fn the_length_is_that_of_the_chunks_so_far() {
        let mut pack = builder();
        assert_eq!(pack.len(), ByteLen(HEADER_LEN as u64));
        let frame = frame(SPACE, 0..64);
        let expected = HEADER_LEN + frame.stored_len();
        pack.push_frame(frame).expect("room");
        assert_eq!(pack.len(), ByteLen(expected as u64));
        let pack = pack.finish().expect("small");
        let len: usize = pack.chunks.iter().map(Vec::len).sum();
        assert_eq!(pack.info.len, ByteLen(len as u64));
    }
}
