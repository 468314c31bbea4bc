//! Small packs for unit tests: page `n` holds `n` in every byte, and so does its digest.

use super::{EncodedFrame, PackBuilder, PackId, PackIndex, SpaceId, SpaceTable, ZSTD_LEVEL};
use crate::digest::PageDigest;
use crate::names::SpaceName;
use crate::units::{PAGE_SIZE, PageIndex};

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
