//! Small packs for unit tests: page `n` holds `n` in every byte, and so does its digest.

use super::codec::{Codec, compress_whole};
use super::frame::FrameEntry;
use super::header::HEADER_LEN;
use super::trailer::{RunKind, RunRecord, Trailer};
use super::{EncodedFrame, PackBuilder, PackId, PackIndex, SpaceId, SpaceTable, ZSTD_LEVEL};
use crate::digest::{Checksum, PageDigest};
use crate::names::SpaceName;
use crate::units::{ByteOffset, PAGE_SIZE, PageIndex, PageRange};

pub(crate) fn ram() -> SpaceName {
    SpaceName::ram("a").expect("a good name")
}

/// Two spaces, `ram:a` and `disk:b`.
pub(crate) fn table() -> SpaceTable {
    let disk = SpaceName::disk("b").expect("a good name");
    SpaceTable::new([ram(), disk]).expect("two spaces")
}

pub(crate) fn frame(space: SpaceId, pages: impl IntoIterator<Item = u64>) -> EncodedFrame {
    let digest = |page| (PageIndex(page), PageDigest([page as u8; 16]));
    let pages: Vec<_> = pages.into_iter().map(digest).collect();
    let content = |&(page, _): &(PageIndex, _)| [page.0 as u8; PAGE_SIZE];
    let raw: Vec<u8> = pages.iter().flat_map(content).collect();
    EncodedFrame::encode(space, &pages, &raw, ZSTD_LEVEL).expect("good pages")
}

/// The index of a pack that `fill` has filled, saved and read again.
pub(crate) fn index(fill: impl FnOnce(&mut PackBuilder, &SpaceTable)) -> PackIndex {
    let table = table();
    let mut builder = PackBuilder::new(PackId([1; 16]), &table);
    fill(&mut builder, &table);
    let pack = builder.finish().expect("small");
    let trailer = &pack.chunks[pack.chunks.len() - 2];
    pack.info.parse_index(trailer).expect("sound")
}

/// What a bare pack records of one space.
#[derive(Clone, Debug)]
pub(crate) enum Recorded {
    Zero(SpaceId, PageRange),
    /// One frame; the pages ascend.
    Frame(SpaceId, Vec<u64>),
}

/// A pack without content, for tests of what is known of packs: quick to make. `seed` makes its
/// checksums and digests.
pub(crate) struct BarePack(Trailer);

impl BarePack {
    pub(crate) fn new(spaces: &SpaceTable, seed: &str, records: &[Recorded]) -> Self {
        let mut bytes = blake3::Hasher::new().update(seed.as_bytes()).finalize_xof();
        let mut random = || {
            let mut half = [0; 16];
            bytes.fill(&mut half);
            half
        };
        let spaces = spaces.names().to_vec();
        let mut trailer = Trailer {
            id: PackId(random()),
            spaces,
            frames: Vec::new(),
            runs: Vec::new(),
            digests: Vec::new(),
        };
        let mut offset = HEADER_LEN as u64;
        for record in records {
            match record {
                Recorded::Zero(space, pages) => {
                    for page in pages.iter() {
                        trailer.record(*space, page, RunKind::Zero);
                    }
                }
                Recorded::Frame(space, pages) => {
                    for page in pages {
                        trailer.record(*space, PageIndex(*page), RunKind::Data);
                        trailer.digests.push(PageDigest(random()));
                    }
                    let entry = FrameEntry {
                        offset: ByteOffset(offset),
                        stored_len: 1000 * pages.len() as u32 + u32::from(random()[0]),
                        space: *space,
                        pages: pages.len() as u8,
                        codec: Codec::Zstd,
                        checksum: Checksum(random()),
                    };
                    offset = entry.byte_range().end;
                    trailer.frames.push(entry);
                }
            }
        }
        Self(trailer)
    }

    /// Bytes of its trailer as it would be stored.
    pub(crate) fn trailer_len(&self) -> usize {
        compress_whole(&self.0.encode()).expect("memory is compressed").len()
    }

    pub(crate) fn index(self) -> PackIndex {
        PackIndex::resolve(self.0).expect("sound")
    }
}

impl Trailer {
    fn record(&mut self, space: SpaceId, page: PageIndex, kind: RunKind) {
        if !self.runs.last_mut().is_some_and(|run| run.try_append(space, page, kind)) {
            self.runs.push(RunRecord { space, start: page, count: 1, kind });
        }
    }
}
