//! A segment that is in memory whole, as it is stored.

use super::block::IndexBlock;
use super::directory::IndexDirectory;
use super::error::{IndexError, IndexPart};
use super::info::SegmentInfo;
use super::run::PlacedRun;
use crate::names::SpaceName;
use crate::units::{PageRange, as_index};

/// The bytes of a segment with its directory read; its blocks are read one after another, when
/// their turn comes.
#[derive(Clone, Debug)]
pub struct Segment<B> {
    directory: IndexDirectory,
    bytes: B,
    blocks_at: usize,
}

impl<B: AsRef<[u8]>> Segment<B> {
    /// Reads the directory.
    ///
    /// # Errors
    /// When it is damaged, or the bytes are not as many as the manifest says.
    pub fn new(bytes: B, info: &SegmentInfo) -> Result<Self, IndexError> {
        let (expected, found) = (info.len().0, bytes.as_ref().len() as u64);
        if expected != found {
            return Err(IndexError::WrongLength { part: IndexPart::Directory, expected, found });
        }
        let blocks_at = info.directory_len as usize;
        let directory = IndexDirectory::parse(&bytes.as_ref()[..blocks_at], info)?;
        Ok(Self { directory, bytes, blocks_at })
    }

    /// What it consists of.
    pub fn directory(&self) -> &IndexDirectory {
        &self.directory
    }

    /// Bytes as stored.
    pub fn len(&self) -> u64 {
        self.bytes.as_ref().len() as u64
    }

    /// Whether it has no bytes, which none has.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of its directory as stored.
    pub fn directory_len(&self) -> usize {
        self.blocks_at
    }

    /// Reads a block.
    ///
    /// # Errors
    /// When it is damaged.
    ///
    /// # Panics
    /// When the directory has no block of that number.
    pub fn block(&self, number: usize) -> Result<IndexBlock, IndexError> {
        let row = &self.directory.blocks[number];
        let range = row.byte_range();
        let blocks = &self.bytes.as_ref()[self.blocks_at..];
        let stored = &blocks[as_index(range.start)..as_index(range.end)];
        IndexBlock::parse(number, row, self.directory.packs.len(), stored)
    }

    /// What it has of the pages of a space, ascending. Holds one block at a time.
    pub fn runs(
        &self,
        space: &SpaceName,
        pages: PageRange,
    ) -> impl Iterator<Item = Result<PlacedRun, IndexError>> {
        self.directory.blocks_of(space, pages).flat_map(move |number| match self.block(number) {
            Ok(block) => block.runs_within(pages).map(Ok).collect(),
            Err(error) => vec![Err(error)],
        })
    }
}
