//! Which pages of the guest were written, as the kernel reports it to another process than QEMU.

use std::collections::HashSet;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use checkpoint_format::{CheckpointRef, PageRange, PageSet};

use crate::block::{BlockId, BlockMemory, TrackedBlock, covering};
use crate::claim::{DirtyClaim, Pending};
use crate::error::TrackerError;
use crate::handles::PluginHandles;
use crate::holes::HoleWatch;
use crate::sys::pagemap::{self, Categories, ScanBuffer, Then, scan};
use crate::sys::write_protect::{protect, register};

#[derive(Debug)]
struct Tracked {
    block: TrackedBlock,
    knowledge: Knowledge,
    /// Only in a VM with a balloon.
    holes: Option<HoleWatch>,
    /// Not all of it is here: see [`Tracker::set_arriving`].
    is_arriving: bool,
}

/// What this tracker knows about a RAM block.
#[derive(Debug)]
enum Knowledge {
    /// Nothing; some pages may be protected by an earlier tracker.
    None,
    /// Every page was protected once, while the guest ran; these existed before.
    Prepared { existing: PageSet },
    /// Every page was protected while the guest was stopped: "written" means written since.
    Complete,
}

/// Write tracking of some RAM blocks of one QEMU.
///
/// The kernel does the work. A page is write-protected; the guest's next write to it faults, and
/// the kernel lifts the protection by itself and lets the guest continue (asynchronous userfaultfd
/// write protection: one fault per page and pre-copy pass, and no user-space handler to wait for).
/// A page without protection is a written page, and one call finds all of them and protects them
/// again.
///
/// What it costs, per GiB on two cores of a VM (Linux 6.18; `tests/measure.rs` prints it again): a
/// claim or a scan that finds nothing 0.5 ms, 2,048 scattered pages 0.9 ms, half of memory 5 to 9
/// ms, every other page 7 to 15 ms; a first claim 0.6 ms when prepared, else 10 to 20 ms;
/// [`Self::prepare`] 30 ms, while the guest runs.
///
/// Three things are *not* seen, because they do not go through QEMU's page table: writes through
/// another mapping of the RAM file (a vhost-user daemon, another process,
/// [`GuestMemory::write`](crate::GuestMemory::write)), holes punched into it, and what a device or
/// the kernel writes into a page that it had pinned before the page was protected (direct I/O in
/// flight). The program that composes the VM must exclude the first. The second is found after
/// [`Self::watch_holes`]. The third is why everything that protects ([`Self::claim`],
/// [`Self::protect_all`]) **must be called while the guest is stopped** and its block I/O drained.
///
/// Until a RAM block has been protected as a whole nothing is known about it, so its first claim
/// has every page that exists. That includes the first claim after a restart of this process,
/// although the kernel would still know what was written since the last scan: no process knows the
/// pages of a claim that ended with the earlier process, nor those that dropped claims restored
/// there. A caller that knows that there were none says so with [`Self::resume_protection`].
#[derive(Debug)]
pub struct Tracker {
    handles: PluginHandles,
    blocks: Vec<Tracked>,
    pending: Arc<Pending>,
    buffer: Mutex<ScanBuffer>,
}

impl Tracker {
    /// Registers the RAM blocks; the guest may run.
    ///
    /// RAM blocks that an earlier tracker has registered keep their state.
    ///
    /// # Errors
    /// When the plugin could not open what is needed, a RAM block is listed twice or is not in
    /// QEMU's memory, or the kernel refuses to register it.
    pub fn attach(handles: PluginHandles, blocks: Vec<TrackedBlock>) -> Result<Self, TrackerError> {
        let uffd = handles.uffd()?;
        handles.pagemap()?;
        let maps = handles.maps()?;
        let mut names = HashSet::new();
        for block in &blocks {
            block.check(&maps)?;
            if !names.insert(block.name.as_str()) {
                let reason = "it is listed twice".to_owned();
                return Err(TrackerError::TrackedBlock { block: block.name.clone(), reason });
            }
        }
        for block in &blocks {
            register(uffd, &block.addresses())
                .map_err(|source| TrackerError::Register { block: block.name.clone(), source })?;
        }
        let pending = Arc::new(Pending::new(blocks.iter().map(TrackedBlock::pages)));
        let blocks = blocks
            .into_iter()
            .map(|block| Tracked {
                block,
                knowledge: Knowledge::None,
                holes: None,
                is_arriving: false,
            })
            .collect();
        Ok(Self { handles, blocks, pending, buffer: Mutex::new(ScanBuffer::new()) })
    }

    /// From now on pages that QEMU discards count as written: a VM with a balloon needs it. To be
    /// called right after [`Self::attach`]; what was known before is forgotten.
    ///
    /// It finds what QEMU's balloon does: `fallocate(FALLOC_FL_PUNCH_HOLE)` on the RAM file. In
    /// private memory the kernel reports pages that were discarded, and nothing is needed.
    ///
    /// # Errors
    /// When the kernel lacks what is needed, or a memory file cannot be mapped here.
    pub fn watch_holes(&mut self) -> Result<(), TrackerError> {
        for tracked in &mut self.blocks {
            tracked.holes = HoleWatch::of(&tracked.block)?;
            tracked.knowledge = Knowledge::None;
        }
        Ok(())
    }

    /// Checks that [`Self::watch_holes`] is possible for these RAM blocks; nothing is watched yet.
    ///
    /// # Errors
    /// When the kernel lacks what is needed.
    pub fn can_watch_holes(blocks: &[TrackedBlock]) -> Result<(), TrackerError> {
        blocks.iter().try_for_each(|block| HoleWatch::of(block).map(drop))
    }

    /// Whether pages of a RAM block are still to come ([`MissingPages`](crate::MissingPages)).
    /// Those are not zeros, and must not be read here: while it is so, all that needs the whole
    /// block is an error.
    ///
    /// # Errors
    /// When the ID is of another tracker.
    pub fn set_arriving(&mut self, id: BlockId, is_arriving: bool) -> Result<(), TrackerError> {
        self.tracked(id)?;
        self.blocks[id.0].is_arriving = is_arriving;
        Ok(())
    }

    /// What the plugin has sent.
    pub fn handles(&self) -> &PluginHandles {
        &self.handles
    }

    /// All RAM blocks with their IDs.
    pub fn blocks(&self) -> impl Iterator<Item = (BlockId, &TrackedBlock)> {
        self.blocks.iter().enumerate().map(|(index, tracked)| (BlockId(index), &tracked.block))
    }

    /// The RAM block of an ID.
    ///
    /// # Errors
    /// When the ID is of another tracker.
    pub fn block(&self, id: BlockId) -> Result<&TrackedBlock, TrackerError> {
        self.tracked(id).map(|tracked| &tracked.block)
    }

    /// The ID of the RAM block with that name.
    pub fn find(&self, name: &str) -> Option<BlockId> {
        self.blocks().find(|(_, block)| block.name == name).map(|(id, _)| id)
    }

    fn tracked(&self, id: BlockId) -> Result<&Tracked, TrackerError> {
        self.blocks.get(id.0).ok_or(TrackerError::UnknownBlock(id.0))
    }

    /// Does the long part of the first claim in advance: the guest may run.
    ///
    /// Protects every page, existing or not, and splits huge pages, so that single pages are seen:
    /// 30 to 60 ms per GiB that would else be (in part) pause. Claims nothing: a device that has
    /// pinned a page now may write to it unseen, so the first claim still has every page that
    /// exists. Does nothing for RAM blocks that had their first claim.
    ///
    /// # Errors
    /// When the kernel fails to populate or protect memory.
    pub fn prepare(&mut self) -> Result<(), TrackerError> {
        for index in 0..self.blocks.len() {
            if matches!(self.blocks[index].knowledge, Knowledge::None) {
                let mut existing = PageSet::new(self.blocks[index].block.pages());
                self.populated_into(BlockId(index), &mut existing)?;
                self.protect_ahead(BlockId(index))?;
                // A page that was allocated between the two calls is protected by now, so nothing
                // else would ever report it.
                self.born_meanwhile_into(BlockId(index), &mut existing)?;
                self.blocks[index].holes.as_mut().map_or(Ok(()), HoleWatch::begin)?;
                self.blocks[index].knowledge = Knowledge::Prepared { existing };
            }
        }
        Ok(())
    }

    fn protect_ahead(&self, id: BlockId) -> Result<(), TrackerError> {
        let block = &self.tracked(id)?.block;
        protect(self.handles.uffd()?, &block.addresses())
            .map_err(|source| TrackerError::Protect { block: block.name.clone(), source })
    }

    /// Declares that the content of every page is known as it is now: only what is written from
    /// here on counts.
    ///
    /// Right after a restore this makes the first checkpoint an incremental one. Only while the
    /// guest is stopped.
    ///
    /// # Errors
    /// When the kernel fails to protect memory.
    pub fn protect_all(&mut self) -> Result<(), TrackerError> {
        for index in 0..self.blocks.len() {
            self.protect_now(BlockId(index))?;
            self.blocks[index].holes.as_mut().map_or(Ok(()), HoleWatch::begin_stopped)?;
            self.blocks[index].knowledge = Knowledge::Complete;
        }
        self.pending.sets().iter_mut().for_each(PageSet::clear);
        Ok(())
    }

    fn protect_now(&self, id: BlockId) -> Result<(), TrackerError> {
        let block = &self.tracked(id)?.block;
        pagemap::protect_all(self.handles.pagemap()?, block.addresses())
            .map_err(|source| TrackerError::Protect { block: block.name.clone(), source })
    }

    /// Trusts what an earlier tracker protected: the kernel's marks are what was written since its
    /// last claim.
    ///
    /// Only if that claim was acknowledged by a durable checkpoint (or [`Self::protect_all`] came
    /// last) and none was begun since. The caller must know it from a record that outlives the
    /// process; see the comment on the type for what would be lost otherwise. Returns whether the
    /// marks can be trusted: not when holes are watched and this tracker had no claim yet, because
    /// no tracker saw those punched in between.
    pub fn resume_protection(&mut self) -> bool {
        let is_unseen = |tracked: &Tracked| {
            tracked.holes.is_some() && !matches!(tracked.knowledge, Knowledge::Complete)
        };
        if self.blocks.iter().any(is_unseen) {
            return false;
        }
        self.blocks.iter_mut().for_each(|tracked| tracked.knowledge = Knowledge::Complete);
        true
    }

    /// An empty claim for a checkpoint, to be filled by [`Self::claim`].
    pub fn begin_claim(&self, checkpoint: CheckpointRef) -> DirtyClaim {
        DirtyClaim::new(&self.pending, checkpoint)
    }

    /// Takes the RAM block's dirty pages into `claim`, protects them, and returns what this call
    /// added.
    ///
    /// Those are the pages written since the last call, and those restored or discarded since. A
    /// page that the claim has already comes again if it was written again. Only while the guest is
    /// stopped. On an error the claim still holds what was taken.
    ///
    /// # Errors
    /// When the kernel fails to scan. Pages claimed before are in `claim`, and are restored when it
    /// is dropped.
    pub fn claim(&mut self, id: BlockId, claim: &mut DirtyClaim) -> Result<PageSet, TrackerError> {
        let tracked = self.tracked(id)?;
        if !claim.is_of(&self.pending) {
            return Err(TrackerError::ForeignClaim);
        }
        let mut pages = PageSet::new(tracked.block.pages());
        std::mem::swap(&mut pages, &mut self.pending.sets()[id.0]);
        let mut written = PageSet::new(pages.len());
        let taken = match &self.blocks[id.0].knowledge {
            Knowledge::None => self.take_everything(id, &mut written),
            Knowledge::Prepared { existing } => {
                pages.union_with(existing);
                self.scan_into(id, Categories::WRITTEN, Then::Protect, &mut written)
            }
            Knowledge::Complete => {
                self.scan_into(id, Categories::WRITTEN, Then::Protect, &mut written)
            }
        };
        pages.union_with(&written);
        let discarded = self.discarded_into(id, &written, &mut pages);
        claim.add(id.0, &pages);
        taken.and(discarded)?;
        self.blocks[id.0].knowledge = Knowledge::Complete;
        Ok(pages)
    }

    /// Pages that were discarded and that no [`Self::scan`] has reported.
    fn discarded_into(
        &mut self,
        id: BlockId,
        written: &PageSet,
        pages: &mut PageSet,
    ) -> Result<(), TrackerError> {
        let Tracked { holes: Some(holes), knowledge, .. } = &mut self.blocks[id.0] else {
            return Ok(());
        };
        match knowledge {
            Knowledge::None => holes.begin_stopped()?,
            Knowledge::Prepared { .. } | Knowledge::Complete => {
                pages.union_with(&holes.claim(written)?)
            }
        }
        Ok(())
    }

    /// The first claim of a RAM block without [`Self::prepare`]: every page that exists, and
    /// protection for all.
    fn take_everything(&self, id: BlockId, pages: &mut PageSet) -> Result<(), TrackerError> {
        self.populated_into(id, pages)?;
        self.protect_now(id)?;
        self.born_meanwhile_into(id, pages)
    }

    /// Pages that were allocated between the scan of what exists and the end of its protection.
    ///
    /// From here on the kernel reports protected private pages that do not exist as swapped out;
    /// pages that were allocated just now are reported as present.
    fn born_meanwhile_into(&self, id: BlockId, pages: &mut PageSet) -> Result<(), TrackerError> {
        if let BlockMemory::Shared(_) = self.tracked(id)?.block.memory {
            self.populated_into(id, pages)?;
        }
        self.scan_into(id, Categories::PRESENT, Then::Leave, pages)
    }

    /// The dirty pages as they are now. Claims and protects nothing; the guest may run.
    ///
    /// Where holes are watched this finds most of them; a claim right after it has little of that
    /// to do.
    ///
    /// # Errors
    /// When the kernel fails to scan.
    pub fn scan(&mut self, id: BlockId) -> Result<PageSet, TrackerError> {
        let mut pages = PageSet::new(self.tracked(id)?.block.pages());
        match &self.tracked(id)?.knowledge {
            Knowledge::None => self.populated_into(id, &mut pages)?,
            Knowledge::Prepared { .. } | Knowledge::Complete => {
                self.scan_into(id, Categories::WRITTEN, Then::Leave, &mut pages)?;
                self.look_for_holes(id, &pages)?;
            }
        }
        if let Knowledge::Prepared { existing } = &self.tracked(id)?.knowledge {
            pages.union_with(existing);
        }
        pages.union_with(&self.pending.sets()[id.0]);
        Ok(pages)
    }

    fn look_for_holes(&mut self, id: BlockId, written: &PageSet) -> Result<(), TrackerError> {
        if let Some(holes) = &mut self.blocks[id.0].holes {
            let found = holes.look(written)?;
            self.pending.sets()[id.0].union_with(&found);
        }
        Ok(())
    }

    /// The pages that exist; all others are zero.
    ///
    /// Exact for shared memory. Private memory that is protected already may show pages that do not
    /// exist.
    ///
    /// # Errors
    /// When the kernel fails to scan.
    pub fn populated(&self, id: BlockId) -> Result<PageSet, TrackerError> {
        let mut pages = PageSet::new(self.tracked(id)?.block.pages());
        self.populated_into(id, &mut pages)?;
        Ok(pages)
    }

    fn populated_into(&self, id: BlockId, pages: &mut PageSet) -> Result<(), TrackerError> {
        let Tracked { block, is_arriving, .. } = self.tracked(id)?;
        if *is_arriving {
            return Err(TrackerError::Arriving { block: block.name.clone() });
        }
        let BlockMemory::Shared(memory) = &block.memory else {
            return self.scan_into(id, Categories::PRESENT_OR_SWAPPED, Then::Leave, pages);
        };
        for data in memory.data_ranges()? {
            let Range { start, end } = data.start.min(block.bytes)..data.end.min(block.bytes);
            if start < end {
                pages.insert_range(covering(start..end));
            }
        }
        Ok(())
    }

    fn scan_into(
        &self,
        id: BlockId,
        categories: Categories,
        then: Then,
        pages: &mut PageSet,
    ) -> Result<(), TrackerError> {
        let block = &self.tracked(id)?.block;
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        scan(self.handles.pagemap()?, block.addresses(), categories, then, &mut buffer, |found| {
            pages.insert_range(block.page_range(&found));
        })
        .map_err(|source| TrackerError::Scan { block: block.name.clone(), source })
    }

    /// Copies the content of `pages` to `out`, which must have exactly that size.
    ///
    /// # Panics
    /// When `out` has another size.
    ///
    /// # Errors
    /// When the pages are not in the RAM block, `out` has another length, or QEMU's memory cannot
    /// be read.
    pub fn read_pages(
        &self,
        id: BlockId,
        pages: PageRange,
        out: &mut [u8],
    ) -> Result<(), TrackerError> {
        assert_eq!(
            out.len() as u64,
            pages.byte_len().0,
            "a buffer for {pages} must have just its size"
        );
        let block = &self.tracked(id)?.block;
        let bytes = pages.bytes();
        block.check_inside(&bytes)?;
        match &block.memory {
            BlockMemory::Shared(memory)
                if self.blocks[id.0].holes.is_some() || self.blocks[id.0].is_arriving =>
            {
                memory.read_sparse(bytes.start, out)
            }
            BlockMemory::Shared(memory) => memory.read(bytes.start, out),
            BlockMemory::Private => {
                self.handles.memory()?.read_exact_at(out, block.host_address + bytes.start).map_err(
                    |source| TrackerError::Read { block: block.name.clone(), pages, source },
                )
            }
        }
    }
}
