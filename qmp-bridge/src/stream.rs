//! Writes a migration stream that QEMU never wrote: our RAM blocks before its device sections.
//!
//! ```text
//! "QEVM" 3 | configuration: machine type, capability x-ignore-shared
//!          | section START "ram": total size, list of blocks (name, used length, address), end mark, footer
//!          | section END "ram": pages of the blocks that are not shared, end mark, footer
//!          | device sections as `xen-save-devices-state` gave them | end of stream | an empty description
//! ```
//!
//! All numbers are big-endian. Blocks in shared file memory stand in the list and have no pages:
//! `x-ignore-shared` says that the destination finds their content in that memory. All pages of the
//! others are written, zero ones too, since the destination has filled its ROM blocks already. The
//! form is that of QEMU's `savevm.c` and `ram.c`, the same from 7.2 to 10.0; a test compares it
//! with streams of real ones.

use thiserror::Error;

use crate::device_state::DeviceState;
use crate::ramblock::{MAX_RAM_BLOCKS, RamBlock};
pub use crate::stream_format::STREAM_PAGE;
use crate::stream_format::{STREAM_HEADER, configuration, mark, ram};

/// QEMU numbers its sections at start; the loader takes any number. This is the usual one.
const RAM_SECTION: u32 = 2;

#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum StreamError {
    #[error("the name `{0}` does not fit into a migration stream (1 to 255 bytes)")]
    Name(String),
    #[error("{0} RAM blocks are more than the limit of {MAX_RAM_BLOCKS}")]
    TooManyBlocks(usize),
    #[error("RAM block `{name}` uses {used} bytes, which is no multiple of {STREAM_PAGE}")]
    UnevenBlock { name: String, used: u64 },
    #[error("the RAM blocks together overflow 64 bits")]
    Overflow,
    #[error("there is no RAM block number {0} in this stream")]
    NoSuchBlock(usize),
    #[error("RAM block `{name}` is shared; its pages have no place in the stream")]
    Shared { name: String },
    #[error(
        "page {got:#x} of RAM block `{name}` came where {wanted:#x} is next; all pages are needed, in order"
    )]
    Order { name: String, wanted: u64, got: u64 },
    #[error("a page of RAM block `{name}` has {length} bytes instead of {STREAM_PAGE}")]
    PageLength { name: String, length: usize },
    #[error("RAM block `{name}` ends after {given} of {used} bytes")]
    Incomplete { name: String, given: u64, used: u64 },
}

/// A RAM block as the stream lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamBlock {
    /// QEMU's name of it.
    pub name: String,
    /// Bytes in use, a multiple of [`STREAM_PAGE`].
    pub used: u64,
    /// Where the block lies in the RAM block around it. QEMU compares it for shared blocks only: 0
    /// for the memory of `-machine memory-backend=`, the sum of those before it for several
    /// `-numa node,memdev=`.
    pub address: u64,
    /// In shared file memory, so without pages here.
    pub shared: bool,
}

impl StreamBlock {
    /// The block as QEMU lists it; `address` is 0.
    pub fn new(block: &RamBlock, shared: bool) -> Self {
        Self { name: block.name.clone(), used: block.used, address: 0, shared }
    }
}

/// Builds the stream piece by piece: [`Self::page`]s, [`Self::take`] what there is now and then,
/// [`Self::finish`].
#[derive(Debug)]
pub struct StreamWriter {
    blocks: Vec<StreamBlock>,
    /// Bytes given of each block.
    given: Vec<u64>,
    /// The block of the record before.
    current: Option<usize>,
    out: Vec<u8>,
}

impl StreamWriter {
    /// `machine_type` is the versioned name; `blocks` are in the order of `info ramblock`.
    ///
    /// # Errors
    /// When a block's size is no multiple of [`STREAM_PAGE`], a name is too long, or there are too
    /// many blocks.
    pub fn new(machine_type: &str, blocks: Vec<StreamBlock>) -> Result<Self, StreamError> {
        if blocks.len() > MAX_RAM_BLOCKS {
            return Err(StreamError::TooManyBlocks(blocks.len()));
        }
        let given = vec![0; blocks.len()];
        let mut writer = Self { blocks, given, current: None, out: STREAM_HEADER.to_vec() };
        writer.configuration(machine_type)?;
        writer.setup()?;
        writer.section_head(mark::SECTION_END);
        Ok(writer)
    }

    /// Adds the next page of a block.
    ///
    /// # Errors
    /// When there is no such block, it is shared, or the page is not the next one of it.
    pub fn page(&mut self, block: usize, offset: u64, page: &[u8]) -> Result<(), StreamError> {
        let (Some(known), Some(given)) = (self.blocks.get(block), self.given.get_mut(block)) else {
            return Err(StreamError::NoSuchBlock(block));
        };
        let name = || known.name.clone();
        if known.shared {
            return Err(StreamError::Shared { name: name() });
        }
        if page.len() != STREAM_PAGE {
            return Err(StreamError::PageLength { name: name(), length: page.len() });
        }
        if offset != *given || offset >= known.used {
            return Err(StreamError::Order { name: name(), wanted: *given, got: offset });
        }
        *given += STREAM_PAGE as u64;
        self.record(block, offset, page)
    }

    /// How many bytes [`Self::take`] would give.
    pub fn buffered(&self) -> usize {
        self.out.len()
    }

    /// Takes what is written so far, to send it.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.out)
    }

    /// The rest of the stream.
    ///
    /// # Errors
    /// When a block lacks pages.
    pub fn finish(mut self, devices: &DeviceState) -> Result<Vec<u8>, StreamError> {
        for (block, given) in self.blocks.iter().zip(&self.given) {
            if !block.shared && *given != block.used {
                return Err(StreamError::Incomplete {
                    name: block.name.clone(),
                    given: *given,
                    used: block.used,
                });
            }
        }
        self.section_end();
        self.out.extend(devices.sections());
        self.out.push(mark::END_OF_STREAM);
        self.description();
        Ok(self.out)
    }

    /// QEMU reads past it, and warns when there is none.
    fn description(&mut self) {
        const EMPTY: &[u8] = b"{}";
        self.out.push(mark::DESCRIPTION);
        #[expect(clippy::cast_possible_truncation, reason = "two bytes")]
        self.out.extend((EMPTY.len() as u32).to_be_bytes());
        self.out.extend(EMPTY);
    }

    fn configuration(&mut self, machine_type: &str) -> Result<(), StreamError> {
        self.out.push(mark::CONFIGURATION);
        let length = short(machine_type)?;
        self.out.extend(u32::from(length).to_be_bytes());
        self.out.extend(machine_type.as_bytes());
        self.out.push(mark::SUBSECTION);
        self.string(configuration::CAPABILITIES)?;
        self.out.extend(configuration::VERSION.to_be_bytes());
        self.out.extend(1u32.to_be_bytes());
        self.string(configuration::IGNORE_SHARED)
    }

    fn setup(&mut self) -> Result<(), StreamError> {
        self.section_head(mark::SECTION_START);
        self.string(ram::NAME)?;
        self.out.extend(ram::INSTANCE.to_be_bytes());
        self.out.extend(ram::VERSION.to_be_bytes());
        let mut total = 0u64;
        for block in &self.blocks {
            if block.used % STREAM_PAGE as u64 != 0 {
                return Err(StreamError::UnevenBlock {
                    name: block.name.clone(),
                    used: block.used,
                });
            }
            total = total.checked_add(block.used).ok_or(StreamError::Overflow)?;
        }
        self.number(total | ram::MEM_SIZE);
        for at in 0..self.blocks.len() {
            let StreamBlock { name, used, address, .. } = self.blocks[at].clone();
            self.string(&name)?;
            self.number(used);
            self.number(address);
        }
        self.section_end();
        Ok(())
    }

    fn record(&mut self, block: usize, offset: u64, page: &[u8]) -> Result<(), StreamError> {
        let zero = page.iter().all(|byte| *byte == 0);
        let same = self.current == Some(block);
        let kind = if zero { ram::ZERO } else { ram::PAGE };
        self.number(offset | kind | if same { ram::CONTINUE } else { 0 });
        if !same {
            let name = self.blocks[block].name.clone();
            self.string(&name)?;
            self.current = Some(block);
        }
        if zero {
            self.out.push(0);
        } else {
            self.out.extend(page);
        }
        Ok(())
    }

    fn section_head(&mut self, kind: u8) {
        self.out.push(kind);
        self.out.extend(RAM_SECTION.to_be_bytes());
    }

    fn section_end(&mut self) {
        self.number(ram::END);
        self.out.push(mark::SECTION_FOOTER);
        self.out.extend(RAM_SECTION.to_be_bytes());
    }

    fn number(&mut self, number: u64) {
        self.out.extend(number.to_be_bytes());
    }

    fn string(&mut self, text: &str) -> Result<(), StreamError> {
        let length = short(text)?;
        self.out.push(length);
        self.out.extend(text.as_bytes());
        Ok(())
    }
}

fn short(text: &str) -> Result<u8, StreamError> {
    let length = u8::try_from(text.len()).ok().filter(|length| *length > 0);
    length.ok_or_else(|| StreamError::Name(text.into()))
}

#[cfg(test)]
mod test;
