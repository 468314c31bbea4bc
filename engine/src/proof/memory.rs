//! Memory of the loaded VM, held against the checkpoint.

use super::difference::Difference;
use super::expected::Expected;
use anyhow::{Context, Result};
use checkpoint_format::{PAGE_SIZE, PageDigest, SpaceName, as_index, is_zero};
use dirty_tracker::GuestMemory;
use qmp_bridge::device_sections::Layout;
use qmp_bridge::device_state::DeviceState;
use qmp_bridge::stream_reader::{DeviceSection, Item, ReaderLimits, StreamReader};
use std::collections::HashMap;
use std::os::unix::net::UnixStream;

const PAGE: u64 = PAGE_SIZE as u64;
/// Read at once: a hole costs nothing, so only what the kernel has is read.
const READ: u64 = 1 << 20;

/// Every page of the main block. QEMU has mapped this very file.
pub(super) fn main_block(
    name: &SpaceName,
    memory: &GuestMemory,
    expected: &Expected,
) -> Result<Difference> {
    let mut difference = Difference::new(name.as_str());
    let mut next = 0;
    for range in memory.data_ranges()? {
        let (start, end) =
            (range.start - range.start % PAGE, range.end.next_multiple_of(PAGE).min(memory.len()));
        holes(next, start.max(next), expected, &mut difference);
        data(memory, start.max(next), end, expected, &mut difference)?;
        next = end.max(next);
    }
    holes(next, memory.len(), expected, &mut difference);
    Ok(difference)
}

fn holes(start: u64, end: u64, expected: &Expected, difference: &mut Difference) {
    let (first, last) = (start / PAGE, end / PAGE);
    if !expected.is_unknown(first, last) {
        (first..last).for_each(|page| check(page, PageDigest::ZERO_PAGE, expected, difference));
    }
}

fn data(
    memory: &GuestMemory,
    start: u64,
    end: u64,
    expected: &Expected,
    difference: &mut Difference,
) -> Result<()> {
    let mut buffer = vec![0; as_index(READ)];
    for at in (start..end).step_by(as_index(READ)) {
        let piece = &mut buffer[..as_index((end - at).min(READ))];
        memory.read(at, piece)?;
        for (number, page) in piece.chunks(PAGE_SIZE).enumerate() {
            check(at / PAGE + number as u64, digest(page), expected, difference);
        }
    }
    Ok(())
}

pub(super) fn digest(page: &[u8]) -> PageDigest {
    if is_zero(page) { PageDigest::ZERO_PAGE } else { PageDigest::of(page) }
}

/// A page of memory that no pack has is zero.
fn check(page: u64, found: PageDigest, expected: &Expected, difference: &mut Difference) {
    if expected.get(page).unwrap_or(PageDigest::ZERO_PAGE) != found {
        difference.push(page * PAGE..(page + 1) * PAGE);
    }
}

/// What QEMU wrote when it was asked for its state again.
pub(super) struct Resaved {
    /// One for each block that the stream carries.
    pub blocks: Vec<(String, Difference)>,
    pub devices: DeviceState,
    pub sections: Vec<DeviceSection>,
    pub layout: Layout,
}

/// Reads QEMU's stream to its end. `expected` are the blocks that travel in it.
pub(super) fn read_stream(
    stream: UnixStream,
    expected: &HashMap<String, Expected>,
) -> Result<Resaved> {
    let mut reader = StreamReader::new(stream, ReaderLimits::default());
    let mut blocks: Vec<Block<'_>> = Vec::new();
    let mut devices = None;
    while let Some(item) = reader.next().context("reading the state that QEMU wrote again")? {
        match item {
            Item::Configuration { .. } | Item::PassEnd | Item::RamEnd => {}
            Item::Blocks(list) => {
                blocks =
                    list.iter().map(|block| Block::new(&block.name, block.used, expected)).collect()
            }
            Item::Page { block, offset, bytes } => page(&mut blocks, block, offset, digest(bytes))?,
            Item::Zero { block, offset } => {
                page(&mut blocks, block, offset, PageDigest::ZERO_PAGE)?
            }
            Item::Devices(state) => devices = Some(state),
        }
    }
    let devices = devices.context("QEMU's stream ended without the devices' state")?;
    let sections = reader.device_sections().to_vec();
    let layout = Layout::parse(reader.description())
        .context("reading the description of the device state")?;
    let blocks = blocks.into_iter().filter_map(Block::finish).collect();
    Ok(Resaved { blocks, devices, sections, layout })
}

fn page(blocks: &mut [Block<'_>], block: usize, offset: u64, digest: PageDigest) -> Result<()> {
    let block = blocks.get_mut(block).context("a page came before the list of RAM blocks")?;
    let number = offset / PAGE;
    let seen = block.seen.get_mut(usize::try_from(number)?);
    *seen.with_context(|| {
        format!("page {number} is beyond the end of RAM block {}", block.name)
    })? = true;
    if let Some(expected) = block.expected {
        check(number, digest, expected, &mut block.difference);
    }
    Ok(())
}

struct Block<'a> {
    name: String,
    expected: Option<&'a Expected>,
    seen: Vec<bool>,
    difference: Difference,
}

impl<'a> Block<'a> {
    fn new(name: &str, used: u64, expected: &'a HashMap<String, Expected>) -> Self {
        let pages = usize::try_from(used / PAGE).unwrap_or(usize::MAX);
        let expected = expected.get(name);
        let seen = if expected.is_some() { vec![false; pages] } else { vec![false; 0] };
        Self {
            name: name.to_owned(),
            expected,
            seen,
            difference: Difference::new(format!("ram:{name}")),
        }
    }

    /// None for the main block, which is not in the stream. A page that did not come was not
    /// compared.
    fn finish(mut self) -> Option<(String, Difference)> {
        self.expected?;
        let missing = self.seen.iter().filter(|seen| !**seen).count();
        if missing > 0 {
            self.difference.note =
                Some(format!("{missing} pages did not come out of the restored QEMU"));
        }
        Some((self.name, self.difference))
    }
}
