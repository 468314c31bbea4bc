//! The block table of a layer: where each block's content is.
//!
//! ```text
//! magic "STLPBLK1"      8 bytes, then compressed with zstd:
//! of each block         owner u32: 0xffff_ffff zero block, 0 this layer, n the n-th of the manifest's owners
//! of each non-zero one  number of the owner's pack u32
//! of each non-zero one  number of the frame in that pack u32
//! of each non-zero one  digest 32
//! ```
//!
//! Each field has a column of its own because the first three are nearly constant or count up, and compress to nothing.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::{LayerError, LayerManifest, MAX_LAYER_OWNERS};
use crate::digest::ContentDigest;
use crate::pack::{MAX_FRAMES_PER_PACK, compress_whole, decompress_whole};
use crate::units::{ByteLen, FrameNo, PackNo};
use crate::wire::{Reader, Short};

use super::index::BlockHome;

/// Most blocks of a layer (1 TiB).
pub const MAX_LAYER_BLOCKS: u64 = 1 << 24;

const MAGIC: [u8; 8] = *b"STLPBLK1";
const ZERO_OWNER: u32 = u32::MAX;
const REF_LEN: u64 = 4 + 4 + 32;
const OWNER_LEN: u64 = 4;

/// A block's owner: this layer, or one of its manifest's `owners`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnerIndex(u32);

impl OwnerIndex {
    /// The layer that the table is of.
    pub const OWN: Self = Self(0);
}

/// Where a block is and what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRef {
    pub owner: OwnerIndex,
    /// Among the owner's packs.
    pub pack: PackNo,
    pub frame: FrameNo,
    /// Of the frame's decoded content; must be compared whenever the block comes from another layer.
    pub digest: ContentDigest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    Zero,
    Stored(BlockRef),
}

/// The blocks of a layer in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<Block>,
}

/// What the layer's manifest says about its table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockTableInfo {
    pub blocks: u64,
    pub stored_blocks: u64,
    /// Length of the file.
    pub len: ByteLen,
    /// Of the whole file.
    pub digest: ContentDigest,
}

impl BlockTableInfo {
    fn raw_len(&self) -> u64 {
        self.blocks * OWNER_LEN + self.stored_blocks * REF_LEN
    }

    /// The numbers are bounded before [`raw_len`](Self::raw_len) is used to allocate.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if self.blocks > MAX_LAYER_BLOCKS {
            return Err("of more blocks than a layer can have");
        }
        if self.stored_blocks > self.blocks {
            return Err("of more stored blocks than blocks");
        }
        Ok(())
    }
}

impl BlockTable {
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The stored blocks with their numbers.
    pub fn stored(&self) -> impl Iterator<Item = (u64, &BlockRef)> {
        (0..).zip(&self.blocks).filter_map(|(number, block)| match block {
            Block::Zero => None,
            Block::Stored(at) => Some((number, at)),
        })
    }

    /// The bytes of the file and what the manifest says about it.
    pub fn encode(&self) -> Result<(Vec<u8>, BlockTableInfo), LayerError> {
        let stored = compress_whole(&self.columns()).map_err(|source| LayerError::Compress { source })?;
        let file = [&MAGIC[..], &stored].concat();
        let info = BlockTableInfo {
            blocks: self.blocks.len() as u64,
            stored_blocks: self.stored().count() as u64,
            len: ByteLen(file.len() as u64),
            digest: ContentDigest::of(&file),
        };
        Ok((file, info))
    }

    fn columns(&self) -> Vec<u8> {
        let owner = |block: &Block| match block {
            Block::Zero => ZERO_OWNER,
            Block::Stored(at) => at.owner.0,
        };
        let refs = || self.stored().map(|(_, at)| at);
        let mut out: Vec<u8> = Vec::new();
        out.extend(self.blocks.iter().flat_map(|block| owner(block).to_le_bytes()));
        out.extend(refs().flat_map(|at| at.pack.0.to_le_bytes()));
        out.extend(refs().flat_map(|at| at.frame.0.to_le_bytes()));
        refs().for_each(|at| out.extend(at.digest.0));
        out
    }

    pub(super) fn parse(manifest: &LayerManifest, bytes: &[u8]) -> Result<Self, LayerError> {
        let info = &manifest.table;
        let raw_len = check_info(info)?;
        let columns = decompress(verified(info, bytes)?, raw_len)?;
        let blocks = Columns::split(info, &columns)?.blocks(manifest)?;
        Ok(Self { blocks })
    }
}

fn check_info(info: &BlockTableInfo) -> Result<usize, LayerError> {
    let check = info.check();
    check.map_err(|problem| LayerError::BadBlock { block: 0, problem })?;
    Ok(info.raw_len() as usize)
}

/// The compressed part of the file, when the file is the one that the manifest speaks of.
fn verified<'a>(info: &BlockTableInfo, bytes: &'a [u8]) -> Result<&'a [u8], LayerError> {
    let (expected, found) = (info.len.0, bytes.len() as u64);
    if found != expected {
        return Err(LayerError::TableLength { expected, found });
    }
    let found = ContentDigest::of(bytes);
    if found != info.digest {
        let expected = info.digest;
        return Err(LayerError::TableDigest { expected, found });
    }
    match bytes.split_first_chunk() {
        Some((&MAGIC, stored)) => Ok(stored),
        Some((&found, _)) => Err(LayerError::TableMagic { found }),
        None => Err(LayerError::TableMagic { found: [0; 8] }),
    }
}

fn decompress(stored: &[u8], raw_len: usize) -> Result<Vec<u8>, LayerError> {
    let columns = decompress_whole(stored, raw_len).map_err(|source| LayerError::Decompress { source })?;
    if columns.len() == raw_len {
        return Ok(columns);
    }
    Err(LayerError::TableCount { what: "decompressed length", expected: raw_len as u64, found: columns.len() as u64 })
}

/// The four columns, each with a reader of its own.
struct Columns<'a> {
    info: &'a BlockTableInfo,
    owners: Reader<'a>,
    packs: Reader<'a>,
    frames: Reader<'a>,
    digests: Reader<'a>,
}

impl<'a> Columns<'a> {
    fn split(info: &'a BlockTableInfo, raw: &'a [u8]) -> Result<Self, LayerError> {
        let mut whole = Reader::new(raw);
        let mut column = |entries: u64, len: u64| {
            let bytes = whole.take((entries * len) as usize);
            bytes.map(Reader::new).map_err(short)
        };
        Ok(Self {
            info,
            owners: column(info.blocks, OWNER_LEN)?,
            packs: column(info.stored_blocks, 4)?,
            frames: column(info.stored_blocks, 4)?,
            digests: column(info.stored_blocks, 32)?,
        })
    }

    fn blocks(mut self, manifest: &LayerManifest) -> Result<Vec<Block>, LayerError> {
        let blocks: Result<Vec<_>, _> = (0..self.info.blocks).map(|number| self.next(number, manifest)).collect();
        let unused = self.digests.rest() as u64;
        if unused == 0 {
            return blocks;
        }
        blocks.and(Err(LayerError::TableCount { what: "bytes of digests that no block names", expected: 0, found: unused }))
    }

    fn next(&mut self, number: u64, manifest: &LayerManifest) -> Result<Block, LayerError> {
        let owner = self.owners.u32().map_err(short)?;
        if owner == ZERO_OWNER {
            return Ok(Block::Zero);
        }
        let at = BlockRef {
            owner: OwnerIndex(owner),
            pack: PackNo(self.packs.u32().map_err(short)?),
            frame: FrameNo(self.frames.u32().map_err(short)?),
            digest: ContentDigest(self.digests.array().map_err(short)?),
        };
        check_ref(&at, manifest).map_err(|problem| LayerError::BadBlock { block: number, problem })?;
        Ok(Block::Stored(at))
    }
}

/// More blocks claim to be stored than the manifest says.
fn short(short: Short) -> LayerError {
    LayerError::TableCount { what: "bytes left in a column", expected: short.wanted as u64, found: 0 }
}

fn check_ref(at: &BlockRef, manifest: &LayerManifest) -> Result<(), &'static str> {
    if at.owner.0 as usize > manifest.owners.len() {
        return Err("its owner is not in the manifest");
    }
    if at.frame.0 >= MAX_FRAMES_PER_PACK {
        return Err("its frame's number is beyond any pack's last");
    }
    // Other layers' packs are checked when their manifest is at hand.
    if at.owner != OwnerIndex::OWN {
        return Ok(());
    }
    match manifest.packs.get(at.pack.as_usize()) {
        None => Err("its pack is not in the manifest"),
        Some(pack) if at.frame.0 >= pack.info.frames => Err("its pack has no such frame"),
        Some(_) => Ok(()),
    }
}

impl LayerManifest {
    /// The layer in whose packs a block is.
    pub fn owner(&self, owner: OwnerIndex) -> Option<ContentDigest> {
        match owner {
            OwnerIndex::OWN => Some(self.digest),
            OwnerIndex(number) => self.owners.get(number as usize - 1).copied(),
        }
    }
}

/// Collects the blocks of a new layer, in order.
#[derive(Clone, Debug, Default)]
pub struct BlockTableBuilder {
    blocks: Vec<Block>,
    owners: Vec<ContentDigest>,
    numbers: HashMap<ContentDigest, OwnerIndex>,
}

impl BlockTableBuilder {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn push_zero(&mut self) -> Result<(), LayerError> {
        self.push(Block::Zero)
    }

    /// A block whose content is in a pack of the new layer.
    pub fn push_own(&mut self, digest: ContentDigest, pack: PackNo, frame: FrameNo) -> Result<(), LayerError> {
        self.push(Block::Stored(BlockRef { owner: OwnerIndex::OWN, pack, frame, digest }))
    }

    /// A block that another layer has already.
    pub fn push_shared(&mut self, digest: ContentDigest, home: BlockHome) -> Result<(), LayerError> {
        let owner = self.number(home.layer)?;
        self.push(Block::Stored(BlockRef { owner, pack: home.pack, frame: home.frame, digest }))
    }

    /// The table, and the owners for the manifest.
    pub fn finish(self) -> (BlockTable, Vec<ContentDigest>) {
        let table = BlockTable { blocks: self.blocks };
        (table, self.owners)
    }

    fn push(&mut self, block: Block) -> Result<(), LayerError> {
        at_most("blocks", self.blocks.len() as u64 + 1, MAX_LAYER_BLOCKS)?;
        self.blocks.push(block);
        Ok(())
    }

    fn number(&mut self, layer: ContentDigest) -> Result<OwnerIndex, LayerError> {
        if let Some(&known) = self.numbers.get(&layer) {
            return Ok(known);
        }
        let count = self.owners.len() as u64 + 1;
        at_most("other layers", count, MAX_LAYER_OWNERS as u64)?;
        // Zero stands for the layer itself, so the first owner is number one.
        let number = OwnerIndex(count as u32);
        self.owners.push(layer);
        self.numbers.insert(layer, number);
        Ok(number)
    }
}

fn at_most(what: &'static str, count: u64, limit: u64) -> Result<(), LayerError> {
    if count <= limit {
        return Ok(());
    }
    Err(LayerError::TooMany { what, count, limit })
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::digest::Checksum;
    use crate::layer::{BLOCK_SIZE, BlockIndex};
    use crate::manifest::PackRecord;
    use crate::names::PackName;
    use crate::pack::{PackId, PackInfo};
    use crate::units::{ByteOffset, PageCount};

    const DIGEST: ContentDigest = ContentDigest([1; 32]);
    const OTHER: ContentDigest = ContentDigest([2; 32]);

    /// A pack of 10 frames, as far as a layer's manifest tells.
    fn pack() -> PackRecord {
        let info = PackInfo {
            id: PackId([0; 16]),
            len: ByteLen(1000),
            trailer_offset: ByteOffset(900),
            trailer_len: 36,
            trailer_raw_len: 100,
            trailer_checksum: Checksum([0; 16]),
            frames: 10,
            data_pages: PageCount(160),
            zero_pages: PageCount(0),
            raw_bytes: ByteLen(2000),
        };
        PackRecord { name: PackName::new("p").expect("a good name"), info, replicas: None }
    }

    fn layer(fill: impl FnOnce(&mut BlockTableBuilder)) -> (LayerManifest, Vec<u8>) {
        let mut builder = BlockTableBuilder::new();
        fill(&mut builder);
        let (table, owners) = builder.finish();
        let (file, info) = table.encode().expect("small");
        let len = ByteLen(info.blocks * BLOCK_SIZE as u64);
        (LayerManifest::new(DIGEST, len, vec![pack()], owners, info), file)
    }

    fn home(pack: u32, frame: u32) -> BlockHome {
        BlockHome { layer: OTHER, pack: PackNo(pack), frame: FrameNo(frame) }
    }

    fn own(block: &mut BlockTableBuilder, content: &[u8], pack: u32, frame: u32) {
        let digest = ContentDigest::of(content);
        block.push_own(digest, PackNo(pack), FrameNo(frame)).expect("room");
    }

    #[test]
    fn blocks_come_back_with_their_owners() {
        let shared = ContentDigest::of(b"s");
        let (manifest, file) = layer(|blocks| {
            own(blocks, b"a", 0, 0);
            blocks.push_zero().expect("room");
            blocks.push_shared(shared, home(7, 8)).expect("room");
            blocks.push_shared(shared, home(7, 9)).expect("room");
            own(blocks, b"b", 0, 1);
        });
        assert_eq!(manifest.owners, [OTHER]);
        let table = manifest.parse_table(&file).expect("sound");
        let seen: Vec<_> = table.stored().map(|(n, at)| (n, manifest.owner(at.owner), at.pack.0, at.frame.0)).collect();
        let (me, other) = (Some(DIGEST), Some(OTHER));
        assert_eq!(seen, [(0, me, 0, 0), (2, other, 7, 8), (3, other, 7, 9), (4, me, 0, 1)]);
        assert_eq!(table.blocks()[1], Block::Zero);
    }

    #[test]
    fn the_index_knows_own_blocks_only_and_keeps_the_first_home() {
        let (manifest, file) = layer(|blocks| {
            own(blocks, b"a", 0, 3);
            own(blocks, b"a", 0, 4);
            blocks.push_shared(ContentDigest::of(b"s"), home(0, 0)).expect("room");
        });
        let mut index = BlockIndex::new();
        index.add_layer(&manifest, &manifest.parse_table(&file).expect("sound"));
        let expected = BlockHome { layer: DIGEST, pack: PackNo(0), frame: FrameNo(3) };
        assert_eq!(index.find(&ContentDigest::of(b"a")), Some(expected));
        assert_eq!(index.find(&ContentDigest::of(b"s")), None);
        assert_eq!(index.len(), 1);
    }

    #[test]
    fn references_to_nowhere_are_refused() {
        let problem = |fill: fn(&mut BlockTableBuilder)| {
            let (manifest, file) = layer(fill);
            match manifest.parse_table(&file) {
                Err(LayerError::BadBlock { block: 0, problem }) => problem,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(problem(|b| own(b, b"a", 1, 0)), "its pack is not in the manifest");
        assert_eq!(problem(|b| own(b, b"a", 0, 10)), "its pack has no such frame");
        let frame = "its frame's number is beyond any pack's last";
        assert_eq!(problem(|b| own(b, b"a", 0, MAX_FRAMES_PER_PACK)), frame);
        let (mut manifest, file) = layer(|b| b.push_shared(OTHER, home(0, 0)).expect("room"));
        manifest.owners.clear();
        let owner = manifest.parse_table(&file).expect_err("no such owner");
        assert!(owner.to_string().contains("its owner is not in the manifest"));
    }

    #[test]
    fn counts_that_the_table_does_not_bear_out_are_refused() {
        let (manifest, file) = layer(|blocks| {
            own(blocks, b"a", 0, 0);
            blocks.push_zero().expect("room");
        });
        for (blocks, stored_blocks) in [(2, 0), (2, 2), (1, 1), (12, 0), (u64::MAX, 1), (1, 2)] {
            let mut bad = manifest.clone();
            (bad.table.blocks, bad.table.stored_blocks) = (blocks, stored_blocks);
            assert!(bad.parse_table(&file).is_err(), "accepted {blocks}, {stored_blocks}");
        }
    }

    /// The table with the owner of its block `block` changed, and all digests right again.
    fn with_owner(block: usize, owner: u32) -> Result<BlockTable, LayerError> {
        let (mut manifest, file) = layer(|blocks| {
            own(blocks, b"a", 0, 0);
            blocks.push_zero().expect("room");
        });
        let mut raw = decompress_whole(&file[MAGIC.len()..], manifest.table.raw_len() as usize).expect("sound");
        raw[block * 4..block * 4 + 4].copy_from_slice(&owner.to_le_bytes());
        let bad = [&MAGIC[..], &compress_whole(&raw).expect("small")].concat();
        manifest.table.len = ByteLen(bad.len() as u64);
        manifest.table.digest = ContentDigest::of(&bad);
        manifest.parse_table(&bad)
    }

    #[test]
    fn blocks_and_columns_must_agree() {
        assert!(with_owner(0, 0).is_ok());
        let more = with_owner(1, 0).expect_err("a second stored block");
        assert!(more.to_string().contains("bytes left in a column"), "{more}");
        let less = with_owner(0, ZERO_OWNER).expect_err("no stored block");
        assert!(less.to_string().contains("that no block names"), "{less}");
    }

    #[test]
    fn a_layer_is_no_owner_of_its_own_in_name() {
        let (mut manifest, _) = layer(|blocks| own(blocks, b"a", 0, 0));
        manifest.owners = vec![manifest.digest];
        let error = manifest.encode().expect_err("its own owner");
        assert!(error.to_string().contains("owners is holding the layer itself"), "{error}");
    }

    #[test]
    fn an_empty_image_is_a_layer() {
        let (manifest, file) = layer(|_| ());
        let bytes = manifest.encode().expect("sound");
        let manifest = LayerManifest::parse(&bytes).expect("sound");
        assert!(manifest.parse_table(&file).expect("sound").blocks().is_empty());
    }

    #[test]
    fn only_the_last_block_is_short() {
        let (mut manifest, _) = layer(|_| ());
        manifest.len = ByteLen(BLOCK_SIZE as u64 + 4097);
        let pages: Vec<_> = (0..3).map(|block| manifest.block_pages(block)).collect();
        assert_eq!(pages, [16, 2, 0]);
    }
}
