//! Sections of memory: the list of blocks, then a record for each page that QEMU sends.

use std::collections::HashMap;
use std::io::Read;
use std::ops::Range;

use super::error::StreamReadError;
use super::source::Source;
use crate::ramblock::MAX_RAM_BLOCKS;
use crate::stream_format::{STREAM_PAGE, ram};

const PAGE: u64 = STREAM_PAGE as u64;

/// Flags that a plain migration does not set, and the capability that does.
const REFUSED_FLAGS: [(u64, &str, &str); 4] = [
    (0x40, "an XBZRLE page", "turn off the migration capability `xbzrle`"),
    (0x80, "a hook", "do not migrate by RDMA"),
    (0x100, "a compressed page", "turn off the migration capability `compress`"),
    (0x200, "a multifd mark", "turn off the migration capability `multifd`"),
];

/// A RAM block as the stream lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamRamBlock {
    /// As in [`crate::ramblock::RamBlock::name`].
    pub name: String,
    /// Bytes in use, a multiple of [`STREAM_PAGE`].
    pub used: u64,
    /// Where it lies in the RAM block around it, if the capability `x-ignore-shared` is on. Blocks
    /// in shared files have no pages then, and the stream does not say which they are.
    pub address: Option<u64>,
}

/// One record.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// The list of blocks, now in [`Ram::blocks`].
    Blocks,
    Page {
        block: usize,
        offset: u64,
        bytes: Range<usize>,
    },
    /// A page that has this byte everywhere.
    Filled {
        block: usize,
        offset: u64,
        byte: u8,
    },
    /// The end of a section.
    End,
}

/// What is known of the memory so far.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ram {
    /// The number of its sections.
    pub(super) section: u32,
    /// Whether a section with pages was read.
    pub(super) had_pass: bool,
    addresses: bool,
    limit: usize,
    blocks: Option<Vec<StreamRamBlock>>,
    by_name: HashMap<String, usize>,
    /// The block of the record before.
    current: Option<usize>,
}

impl Ram {
    /// `addresses`: each block in the list has one. `limit`: most blocks.
    pub(super) fn new(section: u32, addresses: bool, limit: usize) -> Self {
        let limit = limit.min(MAX_RAM_BLOCKS);
        Self {
            section,
            had_pass: false,
            addresses,
            limit,
            blocks: None,
            by_name: HashMap::new(),
            current: None,
        }
    }

    pub(super) fn blocks(&self) -> &[StreamRamBlock] {
        self.blocks.as_deref().unwrap_or_default()
    }

    pub(super) fn is_listed(&self) -> bool {
        self.blocks.is_some()
    }

    pub(super) fn record<R: Read>(
        &mut self,
        source: &mut Source<R>,
    ) -> Result<Record, StreamReadError> {
        let at = source.at();
        let head = source.u64()?;
        let (value, flags) = (head & !ram::FLAGS, head & ram::FLAGS);
        match flags & !ram::CONTINUE {
            ram::PAGE => {
                let (block, offset) = self.place(source, at, value, flags)?;
                Ok(Record::Page { block, offset, bytes: source.take(STREAM_PAGE)? })
            }
            ram::ZERO => {
                let (block, offset) = self.place(source, at, value, flags)?;
                Ok(Record::Filled { block, offset, byte: source.u8()? })
            }
            ram::END if head == ram::END => Ok(Record::End),
            ram::MEM_SIZE if flags == ram::MEM_SIZE => {
                self.list(source, at, value)?;
                Ok(Record::Blocks)
            }
            _ => Err(unknown_record(at, head)),
        }
    }

    /// Which page a record is about.
    fn place<R: Read>(
        &mut self,
        source: &mut Source<R>,
        at: u64,
        offset: u64,
        flags: u64,
    ) -> Result<(usize, u64), StreamReadError> {
        let Some(blocks) = &self.blocks else {
            return Err(StreamReadError::malformed(
                at,
                "a page",
                "the list of RAM blocks before any page",
            ));
        };
        let number = if flags & ram::CONTINUE != 0 {
            self.current.ok_or_else(|| {
                StreamReadError::malformed(
                    at,
                    "a page of the same block as the one before",
                    "the first page, with its block",
                )
            })?
        } else {
            let name = source.name()?;
            *self.by_name.get(&name).ok_or_else(|| {
                let found = format!("a page of the RAM block `{}`", name.escape_debug());
                StreamReadError::malformed(at, found, "a block of the list")
            })?
        };
        self.current = Some(number);
        let block = &blocks[number];
        // Both are multiples of a page.
        if offset >= block.used {
            let found =
                format!("page {offset:#x} of the RAM block `{}`", block.name.escape_debug());
            return Err(StreamReadError::malformed(
                at,
                found,
                format!("one below {:#x}, which is its size", block.used),
            ));
        }
        Ok((number, offset))
    }

    fn list<R: Read>(
        &mut self,
        source: &mut Source<R>,
        at: u64,
        total: u64,
    ) -> Result<(), StreamReadError> {
        if self.blocks.is_some() {
            return Err(StreamReadError::malformed(at, "a second list of RAM blocks", "only one"));
        }
        let mut blocks: Vec<StreamRamBlock> = Vec::new();
        let mut left = total;
        while left > 0 {
            let at = source.at();
            if blocks.len() == self.limit {
                let (found, limit) = (self.limit as u64 + 1, self.limit as u64);
                return Err(StreamReadError::TooLarge {
                    at,
                    what: "the list of RAM blocks",
                    found,
                    limit,
                });
            }
            let name = source.name()?;
            let used = source.u64()?;
            let address = if self.addresses { Some(source.u64()?) } else { None };
            let sized = || format!("RAM block `{}` of {used:#x} bytes", name.escape_debug());
            if !used.is_multiple_of(PAGE) {
                return Err(StreamReadError::malformed(
                    at,
                    sized(),
                    format!("a multiple of {PAGE}"),
                ));
            }
            left = left.checked_sub(used).ok_or_else(|| {
                StreamReadError::malformed(
                    at,
                    sized(),
                    format!("at most {left:#x}, what is left of the total of {total:#x}"),
                )
            })?;
            if self.by_name.insert(name.clone(), blocks.len()).is_some() {
                return Err(StreamReadError::malformed(
                    at,
                    format!("a second {}", sized()),
                    "each block once",
                ));
            }
            blocks.push(StreamRamBlock { name, used, address });
        }
        self.blocks = Some(blocks);
        Ok(())
    }
}

fn unknown_record(at: u64, head: u64) -> StreamReadError {
    match REFUSED_FLAGS.iter().find(|(flag, _, _)| head & flag != 0) {
        Some((_, what, advice)) => StreamReadError::unsupported(at, *what, *advice),
        None => StreamReadError::malformed(
            at,
            format!("the record {head:#x}"),
            "a page, a list of RAM blocks or the end mark",
        ),
    }
}
