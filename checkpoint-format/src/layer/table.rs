//! The block table of a layer: where each block's content is.
//!
//! ```text
//! version 1             magic "STLPBLK1", then compressed with zstd:
//! of each block         owner u32: 0xffff_ffff zero block, 0 this layer, n the n-th of the manifest's owners
//! of each non-zero one  number of the owner's pack u32
//! of each non-zero one  number of the frame in that pack u32
//! of each non-zero one  digest 32
//!
//! version 2             magic "STLPBLK2", then compressed with zstd, of each non-zero block only:
//!                       zero blocks in front of it u32
//!                       owner u32, pack u32, frame u32, digest 32 as in version 1
//! ```
//!
//! Each field has a column of its own because all but the last are nearly constant or count up, and
//! compress to nothing.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::{LayerError, LayerManifest, MAX_LAYER_OWNERS};
use crate::digest::ContentDigest;
use crate::digest_form::{BlocksHasher, DigestForm};
use crate::pack::{MAX_FRAMES_PER_PACK, compress_whole, decompress_whole};
use crate::units::{ByteLen, FrameNo, PackNo, as_index, count};
use crate::wire::{Reader, Short};

use super::index::BlockHome;

/// Most blocks of a layer, zeros included (16 TiB); of one of version 1 as many as may be stored.
pub const MAX_LAYER_BLOCKS: u64 = 1 << 28;
/// Most blocks of a layer that are not zero (1 TiB).
pub const MAX_STORED_BLOCKS: u64 = 1 << 24;

const MAGIC_LEN: usize = 8;
const ZERO_OWNER: u32 = u32::MAX;
/// Of a stored block, without its owner.
const REF_LEN: u64 = 4 + 4 + 32;
/// A number in a column.
const NUMBER_LEN: u64 = size_of::<u32>() as u64;

fn magic(form: DigestForm) -> [u8; MAGIC_LEN] {
    match form {
        DigestForm::Content => *b"STLPBLK1",
        DigestForm::Blocks => *b"STLPBLK2",
    }
}

pub(super) fn most_blocks(form: DigestForm) -> u64 {
    match form {
        DigestForm::Content => MAX_STORED_BLOCKS,
        DigestForm::Blocks => MAX_LAYER_BLOCKS,
    }
}

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
    /// The layer whose pack has the block.
    pub owner: OwnerIndex,
    /// Among the owner's packs.
    pub pack: PackNo,
    /// The frame of that pack.
    pub frame: FrameNo,
    /// Of the frame's decoded content; must be compared whenever the block comes from another
    /// layer.
    pub digest: ContentDigest,
}

/// The blocks of a layer in order. Blocks of zeros take no room.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    /// Zeros included.
    blocks: u64,
    stored: Vec<(u32, BlockRef)>,
}

/// What the layer's manifest says about its table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockTableInfo {
    /// Blocks of the layer.
    pub blocks: u64,
    /// Blocks that are not all zeros.
    pub stored_blocks: u64,
    /// Length of the file.
    pub len: ByteLen,
    /// Of the whole file.
    pub digest: ContentDigest,
}

impl BlockTableInfo {
    fn raw_len(&self, form: DigestForm) -> u64 {
        let numbers = match form {
            DigestForm::Content => self.blocks,
            DigestForm::Blocks => 2 * self.stored_blocks,
        };
        numbers * NUMBER_LEN + self.stored_blocks * REF_LEN
    }

    /// The numbers are bounded before [`raw_len`](Self::raw_len) is used to allocate.
    pub(super) fn check(&self, form: DigestForm) -> Result<(), &'static str> {
        if self.blocks > most_blocks(form) {
            return Err("of more blocks than a layer can have");
        }
        if self.stored_blocks > self.blocks || self.stored_blocks > MAX_STORED_BLOCKS {
            return Err("of more stored blocks than blocks, or than a layer can have");
        }
        Ok(())
    }
}

impl BlockTable {
    /// All blocks, zeros included.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The stored blocks with their numbers, ascending.
    pub fn stored(&self) -> impl Iterator<Item = (u64, &BlockRef)> {
        self.stored.iter().map(|(number, at)| (u64::from(*number), at))
    }

    /// The n-th stored block and its number.
    pub fn get(&self, nth: usize) -> Option<(u64, BlockRef)> {
        self.stored.get(nth).map(|(number, at)| (u64::from(*number), *at))
    }

    /// The digest of a layer of this length that has these blocks.
    pub fn digest(&self, len: ByteLen) -> ContentDigest {
        let mut hasher = BlocksHasher::new(len);
        self.stored().for_each(|(number, at)| hasher.block(number, &at.digest));
        hasher.finish()
    }

    /// Says where the layer's own blocks are, once its packs are written: `home` gets the number
    /// that each was pushed with.
    ///
    /// # Errors
    /// When `home` has no place for a block.
    pub fn place_own(
        &mut self,
        mut home: impl FnMut(u32) -> Option<(PackNo, FrameNo)>,
    ) -> Result<(), LayerError> {
        for (number, at) in self.stored.iter_mut().filter(|(_, at)| at.owner == OwnerIndex::OWN) {
            let missing = LayerError::BadBlock {
                block: u64::from(*number),
                problem: "it is in no pack of the layer",
            };
            (at.pack, at.frame) = home(at.frame.0).ok_or(missing)?;
        }
        Ok(())
    }

    /// The bytes of the file and what the manifest says about it.
    ///
    /// # Errors
    /// When the table cannot be compressed.
    pub fn encode(&self, form: DigestForm) -> Result<(Vec<u8>, BlockTableInfo), LayerError> {
        at_most("blocks", self.blocks, most_blocks(form))?;
        let stored = compress_whole(&self.columns(form))
            .map_err(|source| LayerError::Compress { source })?;
        let file = [&magic(form)[..], &stored].concat();
        let info = BlockTableInfo {
            blocks: self.blocks,
            stored_blocks: self.stored.len() as u64,
            len: ByteLen(file.len() as u64),
            digest: ContentDigest::of(&file),
        };
        Ok((file, info))
    }

    fn columns(&self, form: DigestForm) -> Vec<u8> {
        let mut out: Vec<u8> = Vec::new();
        let refs = || self.stored.iter().map(|(_, at)| at);
        match form {
            DigestForm::Content => self.owner_column(&mut out),
            DigestForm::Blocks => {
                out.extend(self.gaps().flat_map(u32::to_le_bytes));
                out.extend(refs().flat_map(|at| at.owner.0.to_le_bytes()));
            }
        }
        out.extend(refs().flat_map(|at| at.pack.0.to_le_bytes()));
        out.extend(refs().flat_map(|at| at.frame.0.to_le_bytes()));
        refs().for_each(|at| out.extend(at.digest.0));
        out
    }

    /// Of every block, zeros included.
    fn owner_column(&self, out: &mut Vec<u8>) {
        let number_len = size_of::<u32>();
        out.resize(as_index(self.blocks) * number_len, u32::MAX.to_le_bytes()[0]);
        for (number, at) in self.stored() {
            let place = as_index(number) * number_len;
            out[place..place + number_len].copy_from_slice(&at.owner.0.to_le_bytes());
        }
    }

    /// Zero blocks in front of each stored one.
    fn gaps(&self) -> impl Iterator<Item = u32> {
        let mut next = 0;
        self.stored.iter().map(move |(number, _)| {
            let gap = number - next;
            next = number + 1;
            gap
        })
    }

    pub(super) fn parse(manifest: &LayerManifest, bytes: &[u8]) -> Result<Self, LayerError> {
        let info = &manifest.table;
        let bad = |problem| LayerError::BadBlock { block: 0, problem };
        info.check(manifest.form).map_err(bad)?;
        let columns =
            decompress(verified(manifest, bytes)?, as_index(info.raw_len(manifest.form)))?;
        let table = Self {
            blocks: info.blocks,
            stored: Columns::split(manifest, &columns)?.blocks(manifest)?,
        };
        match manifest.form {
            DigestForm::Content => Ok(table),
            DigestForm::Blocks => table.named(manifest),
        }
    }

    /// The digests of the blocks must be those that the layer's name stands for.
    fn named(self, manifest: &LayerManifest) -> Result<Self, LayerError> {
        let (expected, found) = (manifest.digest, self.digest(manifest.len));
        if found == expected {
            return Ok(self);
        }
        Err(LayerError::BlocksDigest { expected, found })
    }
}

/// The compressed part of the file, when the file is the one that the manifest speaks of.
fn verified<'a>(manifest: &LayerManifest, bytes: &'a [u8]) -> Result<&'a [u8], LayerError> {
    let info = &manifest.table;
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
        Some((&found, stored)) if found == magic(manifest.form) => Ok(stored),
        Some((&found, _)) => Err(LayerError::TableMagic { found }),
        None => Err(LayerError::TableMagic { found: [0; MAGIC_LEN] }),
    }
}

fn decompress(stored: &[u8], raw_len: usize) -> Result<Vec<u8>, LayerError> {
    let columns =
        decompress_whole(stored, raw_len).map_err(|source| LayerError::Decompress { source })?;
    if columns.len() == raw_len {
        return Ok(columns);
    }
    Err(LayerError::TableCount {
        what: "decompressed length",
        expected: raw_len as u64,
        found: columns.len() as u64,
    })
}

/// The columns, each with a reader of its own.
struct Columns<'a> {
    info: &'a BlockTableInfo,
    /// Only in version 2.
    gaps: Option<Reader<'a>>,
    owners: Reader<'a>,
    packs: Reader<'a>,
    frames: Reader<'a>,
    digests: Reader<'a>,
}

impl<'a> Columns<'a> {
    fn split(manifest: &'a LayerManifest, raw: &'a [u8]) -> Result<Self, LayerError> {
        let info = &manifest.table;
        let mut whole = Reader::new(raw);
        let mut column = |entries: u64, len: u64| {
            let bytes = whole.take(as_index(entries * len));
            bytes.map(Reader::new).map_err(short)
        };
        let (gaps, owners) = match manifest.form {
            DigestForm::Content => (None, info.blocks),
            DigestForm::Blocks => {
                (Some(column(info.stored_blocks, NUMBER_LEN)?), info.stored_blocks)
            }
        };
        Ok(Self {
            info,
            gaps,
            owners: column(owners, NUMBER_LEN)?,
            packs: column(info.stored_blocks, NUMBER_LEN)?,
            frames: column(info.stored_blocks, NUMBER_LEN)?,
            digests: column(info.stored_blocks, 32)?,
        })
    }

    fn blocks(mut self, manifest: &LayerManifest) -> Result<Vec<(u32, BlockRef)>, LayerError> {
        let mut stored = Vec::new();
        let mut next = 0;
        while let Some(number) = self.next_number(next)? {
            let owner = self.owners.u32().map_err(short)?;
            next = number + 1;
            if owner != ZERO_OWNER {
                // A layer has at most 2^28 blocks.
                stored.push((count(as_index(number)), self.next_ref(number, owner, manifest)?));
            } else if self.gaps.is_some() {
                return Err(LayerError::BadBlock {
                    block: number,
                    problem: "it is zero and yet in the table",
                });
            }
        }
        match self.digests.rest() as u64 {
            0 => Ok(stored),
            unused => Err(LayerError::TableCount {
                what: "bytes of digests that no block names",
                expected: 0,
                found: unused,
            }),
        }
    }

    /// Of the next block that the owners' column has an entry of; `from` is the first that it may
    /// be.
    fn next_number(&mut self, from: u64) -> Result<Option<u64>, LayerError> {
        let Some(gaps) = &mut self.gaps else {
            return Ok((from < self.info.blocks).then_some(from));
        };
        if gaps.rest() == 0 {
            return Ok(None);
        }
        let number = from + u64::from(gaps.u32().map_err(short)?);
        if number < self.info.blocks {
            return Ok(Some(number));
        }
        Err(LayerError::BadBlock { block: number, problem: "it lies beyond the end of the layer" })
    }

    fn next_ref(
        &mut self,
        number: u64,
        owner: u32,
        manifest: &LayerManifest,
    ) -> Result<BlockRef, LayerError> {
        let at = BlockRef {
            owner: OwnerIndex(owner),
            pack: PackNo(self.packs.u32().map_err(short)?),
            frame: FrameNo(self.frames.u32().map_err(short)?),
            digest: ContentDigest(self.digests.array().map_err(short)?),
        };
        check_ref(&at, manifest)
            .map_err(|problem| LayerError::BadBlock { block: number, problem })?;
        Ok(at)
    }
}

/// More blocks claim to be stored than the manifest says.
fn short(short: Short) -> LayerError {
    LayerError::TableCount {
        what: "bytes left in a column",
        expected: short.wanted as u64,
        found: 0,
    }
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
    table: BlockTable,
    owners: Vec<ContentDigest>,
    numbers: HashMap<ContentDigest, OwnerIndex>,
}

impl BlockTableBuilder {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds blocks of zeros.
    ///
    /// # Errors
    /// When the table has too many blocks.
    pub fn push_zeros(&mut self, count: u64) -> Result<(), LayerError> {
        let blocks = self.table.blocks.saturating_add(count);
        at_most("blocks", blocks, MAX_LAYER_BLOCKS)?;
        self.table.blocks = blocks;
        Ok(())
    }

    /// A block whose content is in a pack of the new layer.
    ///
    /// # Errors
    /// When the table has too many blocks.
    pub fn push_own(
        &mut self,
        digest: ContentDigest,
        pack: PackNo,
        frame: FrameNo,
    ) -> Result<(), LayerError> {
        self.push(BlockRef { owner: OwnerIndex::OWN, pack, frame, digest })
    }

    /// A block that another layer has already.
    ///
    /// # Errors
    /// When the table has too many blocks or owners.
    pub fn push_shared(
        &mut self,
        digest: ContentDigest,
        home: BlockHome,
    ) -> Result<(), LayerError> {
        let owner = self.number(home.layer)?;
        self.push(BlockRef { owner, pack: home.pack, frame: home.frame, digest })
    }

    /// Blocks pushed so far, zeros included.
    pub fn blocks(&self) -> u64 {
        self.table.blocks
    }

    /// The table, and the owners for the manifest.
    pub fn finish(self) -> (BlockTable, Vec<ContentDigest>) {
        (self.table, self.owners)
    }

    fn push(&mut self, block: BlockRef) -> Result<(), LayerError> {
        at_most("stored blocks", self.table.stored.len() as u64 + 1, MAX_STORED_BLOCKS)?;
        let number = self.table.blocks;
        self.push_zeros(1)?;
        // A layer has at most 2^28 blocks.
        self.table.stored.push((count(as_index(number)), block));
        Ok(())
    }

    fn number(&mut self, layer: ContentDigest) -> Result<OwnerIndex, LayerError> {
        if let Some(&known) = self.numbers.get(&layer) {
            return Ok(known);
        }
        let owners = self.owners.len() + 1;
        at_most("other layers", owners as u64, MAX_LAYER_OWNERS as u64)?;
        // Zero stands for the layer itself, so the first owner is number one.
        let number = OwnerIndex(count(owners));
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
        let (file, info) = table.encode(DigestForm::Content).expect("small");
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
            blocks.push_zeros(1).expect("room");
            blocks.push_shared(shared, home(7, 8)).expect("room");
            blocks.push_shared(shared, home(7, 9)).expect("room");
            own(blocks, b"b", 0, 1);
        });
        assert_eq!(manifest.owners, [OTHER]);
        let table = manifest.parse_table(&file).expect("sound");
        let seen: Vec<_> = table
            .stored()
            .map(|(n, at)| (n, manifest.owner(at.owner), at.pack.0, at.frame.0))
            .collect();
        let (me, other) = (Some(DIGEST), Some(OTHER));
        assert_eq!(seen, [(0, me, 0, 0), (2, other, 7, 8), (3, other, 7, 9), (4, me, 0, 1)]);
        assert_eq!(table.blocks(), 5);
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
            blocks.push_zeros(1).expect("room");
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
            blocks.push_zeros(1).expect("room");
        });
        let mut raw = decompress_whole(
            &file[MAGIC_LEN..],
            manifest.table.raw_len(DigestForm::Content) as usize,
        )
        .expect("sound");
        raw[block * 4..block * 4 + 4].copy_from_slice(&owner.to_le_bytes());
        let bad = [&magic(DigestForm::Content)[..], &compress_whole(&raw).expect("small")].concat();
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
        assert!(manifest.parse_table(&file).expect("sound").blocks() == 0);
    }

    #[test]
    fn only_the_last_block_is_short() {
        let (mut manifest, _) = layer(|_| ());
        manifest.len = ByteLen(BLOCK_SIZE as u64 + 4097);
        let pages: Vec<_> = (0..3).map(|block| manifest.block_pages(block)).collect();
        assert_eq!(pages, [16, 2, 0]);
    }

    /// A layer of version 2 with one block of its own behind a hole.
    fn sparse(hole: u64) -> (LayerManifest, Vec<u8>) {
        let mut builder = BlockTableBuilder::new();
        builder.push_zeros(hole).expect("room");
        own(&mut builder, b"a", 0, 3);
        builder.push_zeros(hole).expect("room");
        let (table, owners) = builder.finish();
        let len = ByteLen((2 * hole + 1) * BLOCK_SIZE as u64);
        let (file, info) = table.encode(DigestForm::Blocks).expect("small");
        (
            LayerManifest::new(table.digest(len), len, vec![pack()], owners, info)
                .with_form(DigestForm::Blocks),
            file,
        )
    }

    #[test]
    fn sparse_layer_of_terabytes_is_a_few_bytes() {
        let hole = (MAX_LAYER_BLOCKS - 2) / 2;
        let (manifest, file) = sparse(hole);
        assert!(file.len() < 150, "{} bytes", file.len());
        let manifest = LayerManifest::parse(&manifest.encode().expect("sound")).expect("sound");
        assert_eq!(manifest.form, DigestForm::Blocks);
        let table = manifest.parse_table(&file).expect("sound");
        assert_eq!(
            table.stored().map(|(number, at)| (number, at.frame)).collect::<Vec<_>>(),
            [(hole, FrameNo(3))]
        );
        assert_eq!(table.blocks(), 2 * hole + 1);
    }

    #[test]
    fn sparse_layer_must_have_the_blocks_of_its_name() {
        let (manifest, file) = sparse(5);
        let mut other = manifest.clone();
        other.len.0 -= 1;
        assert!(matches!(other.parse_table(&file), Err(LayerError::BlocksDigest { .. })));
        let (_, elsewhere) = sparse(4);
        let mut other = manifest.clone();
        (other.table.len, other.table.digest) =
            (ByteLen(elsewhere.len() as u64), ContentDigest::of(&elsewhere));
        assert!(matches!(other.parse_table(&elsewhere), Err(LayerError::BlocksDigest { .. })));
        let other = manifest.with_form(DigestForm::Content);
        assert!(matches!(other.parse_table(&file), Err(LayerError::TableMagic { .. })));
    }

    #[test]
    fn own_blocks_are_placed_when_the_packs_are_known() {
        let mut builder = BlockTableBuilder::new();
        own(&mut builder, b"a", 0, 0);
        builder.push_shared(OTHER, home(7, 1)).expect("room");
        own(&mut builder, b"b", 0, 1);
        let (mut table, _) = builder.finish();
        table.place_own(|ordinal| Some((PackNo(9), FrameNo(ordinal + 10)))).expect("all are there");
        let places: Vec<_> = table.stored().map(|(_, at)| (at.pack.0, at.frame.0)).collect();
        assert_eq!(places, [(9, 10), (7, 1), (9, 11)]);
        assert!(table.place_own(|_| None).is_err());
    }
}
