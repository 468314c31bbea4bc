//! The stream engine's memory: pages as QEMU's migration sends them, compared with what the last
//! checkpoint holds.
//!
//! A thread reads the stream. A page whose digest is that of the tables is dropped at once; any
//! other page is staged, where a later copy of it replaces the earlier one, so that a page that the
//! guest writes repeatedly is stored once. When the staging memory fills up, its pages are stored;
//! not while the guest waits for us: then there must be room left.

use super::buffers::Buffers;
use super::delta::Delta;
use super::precopy;
use super::staging::{SpaceNumber, space_number};
use crate::pack::Entrance;
use anyhow::{Context, Result, bail, ensure};
use checkpoint_format::{
    ByteLen, PAGE_SIZE, PageCount, PageDigest, PageIndex, PageRange, PageSet, SpaceKind, is_zero,
};
use qmp_bridge::device_state::DeviceState;
use qmp_bridge::stream_reader::{Item, ReaderLimits, StreamRamBlock, StreamReader};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// While the guest runs, the staging memory is emptied when less than this is free: 64 MiB, more
/// than any pause takes.
const RESERVE: PageCount = PageCount((64 << 20) / PAGE_SIZE as u64);

/// All that the thread works on; it comes back when the thread ends.
pub(super) struct Receiver {
    pub buffers: Buffers,
    entrance: Entrance,
    /// The thread must not wait for the store now: the guest is stopped until the thread has ended.
    guest_waits: Arc<AtomicBool>,
    /// Spaces of the stream's RAM blocks.
    blocks: Vec<SpaceNumber>,
    /// By space: pages that the stream had, and pages that are staged.
    seen: Vec<PageSet>,
    staged: Vec<PageSet>,
    /// Pages that were not what the last checkpoint holds.
    pub news: PageCount,
}

impl Receiver {
    pub(super) fn new(buffers: Buffers, entrance: Entrance, guest_waits: Arc<AtomicBool>) -> Self {
        let sizes = || ram_sizes(&buffers.delta).map(PageSet::new).collect();
        let (seen, staged) = (sizes(), sizes());
        Self {
            buffers,
            entrance,
            guest_waits,
            blocks: Vec::new(),
            seen,
            staged,
            news: PageCount(0),
        }
    }

    /// Reads the stream to its end. Every page of every block must have come.
    pub(super) fn receive(&mut self, source: &UnixStream) -> Result<DeviceState> {
        let mut reader = StreamReader::new(source, ReaderLimits::default());
        let mut state = None;
        while let Some(item) = reader.next()? {
            match item {
                Item::Configuration { .. } | Item::PassEnd => {}
                Item::Blocks(blocks) => self.blocks = self.match_blocks(blocks)?,
                Item::Page { block, offset, bytes } => self.page(block, offset, bytes)?,
                Item::Zero { block, offset } => self.page(block, offset, &[0; PAGE_SIZE])?,
                Item::RamEnd => self.check_complete()?,
                Item::Devices(devices) => state = Some(devices),
            }
        }
        state.context("QEMU's stream ended without the devices' state")
    }

    /// Each RAM block is a space of the same size.
    fn match_blocks(&self, blocks: &[StreamRamBlock]) -> Result<Vec<SpaceNumber>> {
        ensure!(
            blocks.len() == self.seen.len(),
            "QEMU's stream has {} RAM blocks and its monitor names {}; memory was plugged in or out, so try again",
            blocks.len(),
            self.seen.len()
        );
        blocks.iter().map(|block| self.match_block(block)).collect()
    }

    fn match_block(&self, block: &StreamRamBlock) -> Result<SpaceNumber> {
        let is_it = |space: &super::delta::Space| {
            space.name.kind() == SpaceKind::Ram && space.name.local() == block.name
        };
        let number = self.buffers.delta.spaces().iter().position(is_it);
        let number = number.with_context(|| {
            format!("QEMU's stream has RAM block {}, which its monitor does not name", block.name)
        })?;
        let pages = self.buffers.delta.spaces()[number].pages;
        ensure!(
            pages == PageCount::covering(ByteLen(block.used)),
            "RAM block {} has {} bytes in QEMU's stream and {pages} pages by its monitor; try again",
            block.name,
            block.used
        );
        space_number(number)
    }

    fn page(&mut self, block: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        let space = *self.blocks.get(block).context("a page came before the list of RAM blocks")?;
        let page = PageIndex(offset / PAGE_SIZE as u64);
        self.seen[usize::from(space)].insert(page);
        let is_staged = self.staged[usize::from(space)].contains(page);
        if !is_staged && !self.is_news(space, page, bytes) {
            return Ok(());
        }
        if !is_staged {
            self.news.0 += 1;
        }
        self.make_room()?;
        self.buffers.staging.push(space, PageRange::single(page))?.copy_from_slice(bytes);
        self.staged[usize::from(space)].insert(page);
        Ok(())
    }

    fn is_news(&self, space: SpaceNumber, page: PageIndex, bytes: &[u8]) -> bool {
        let digest = if is_zero(bytes) { PageDigest::ZERO_PAGE } else { PageDigest::of(bytes) };
        !self.buffers.delta.holds(space, page, digest)
    }

    fn make_room(&mut self) -> Result<()> {
        let guest_waits = self.guest_waits.load(Ordering::SeqCst);
        let Buffers { staging, delta } = &mut self.buffers;
        if staging.free() > RESERVE || guest_waits && staging.free() > PageCount(0) {
            return Ok(());
        }
        if guest_waits {
            bail!(
                "the staging memory is full while the guest waits; try again when it writes less"
            );
        }
        precopy::upload(staging, delta, &self.entrance)?;
        staging.clear(staging.capacity());
        self.staged.iter_mut().for_each(PageSet::clear);
        Ok(())
    }

    /// Without this check a page that the stream lacks would silently be that of the last
    /// checkpoint.
    fn check_complete(&mut self) -> Result<()> {
        for (number, seen) in self.seen.iter().enumerate() {
            let missing = seen.len().0 - seen.count().0;
            ensure!(
                missing == 0,
                "QEMU's stream left out {missing} pages of RAM block {}; a balloon with free-page-hint=on does that: turn it off",
                self.buffers.delta.spaces()[number].name.local()
            );
        }
        self.buffers.delta.confirm_memory();
        Ok(())
    }
}

/// RAM blocks are the first spaces.
fn ram_sizes(delta: &Delta) -> impl Iterator<Item = PageCount> {
    delta
        .spaces()
        .iter()
        .filter(|space| space.name.kind() == SpaceKind::Ram)
        .map(|space| space.pages)
}
