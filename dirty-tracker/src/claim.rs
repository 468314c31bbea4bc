//! Claims of dirty pages.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use checkpoint_format::{CheckpointRef, DurableReceipt, OtherCheckpoint, PageCount, PageSet};

use crate::block::BlockId;

/// Pages that a claim took from the kernel and then restored, by RAM block; the next claim gets
/// them first.
#[derive(Debug)]
pub(crate) struct Pending(Mutex<Vec<PageSet>>);

impl Pending {
    pub(crate) fn new(sizes: impl Iterator<Item = PageCount>) -> Self {
        Self(Mutex::new(sizes.map(PageSet::new).collect()))
    }

    /// The sets; a thread that panicked elsewhere leaves them whole, for every change is one call.
    pub(crate) fn sets(&self) -> MutexGuard<'_, Vec<PageSet>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The dirty pages that a checkpoint has taken and must still acknowledge.
///
/// A scan that protects also clears the dirty bits: from that moment only the claim has the list of
/// written pages. If the checkpoint then fails, the next one would miss them, and a restore would
/// bring back a VM that never existed. So the claim keeps the pages. However a checkpoint ends (by
/// an error, a cancelled task, a panic), dropping the claim restores them, and the next claim has
/// them again. The only way to keep them is [`Self::acknowledge`], which asks for the receipt that
/// the store makes when that very checkpoint is durable: not written, durable.
///
/// It covers this process only. When the process dies with a claim, the pages are lost, and its
/// successor must compare all of memory with the last durable checkpoint: a new tracker's first
/// claim therefore has every page.
#[derive(Debug)]
#[must_use = "dropping a claim restores its pages"]
pub struct DirtyClaim {
    checkpoint: CheckpointRef,
    taken: Vec<PageSet>,
    pending: Arc<Pending>,
}

impl DirtyClaim {
    pub(crate) fn new(pending: &Arc<Pending>, checkpoint: CheckpointRef) -> Self {
        let taken = pending.sets().iter().map(|set| PageSet::new(set.len())).collect();
        Self { checkpoint, taken, pending: Arc::clone(pending) }
    }

    pub(crate) fn is_of(&self, pending: &Arc<Pending>) -> bool {
        Arc::ptr_eq(&self.pending, pending)
    }

    pub(crate) fn add(&mut self, block: usize, pages: &PageSet) {
        if let Some(taken) = self.taken.get_mut(block) {
            taken.union_with(pages);
        }
    }

    /// All pages of a RAM block taken so far; `None` for a RAM block of another tracker.
    pub fn pages(&self, block: BlockId) -> Option<&PageSet> {
        self.taken.get(block.index())
    }

    /// Pages taken so far, in all RAM blocks.
    pub fn count(&self) -> PageCount {
        PageCount(self.taken.iter().map(|pages| pages.count().0).sum())
    }

    /// Whether no page is claimed.
    pub fn is_empty(&self) -> bool {
        self.taken.iter().all(PageSet::is_empty)
    }

    /// Keeps the pages: the checkpoint that has them is durable.
    ///
    /// # Errors
    /// When the receipt is of another checkpoint; then the pages are restored.
    pub fn acknowledge(mut self, receipt: &DurableReceipt) -> Result<(), OtherCheckpoint> {
        receipt.confirm(&self.checkpoint)?;
        let (checkpoint, pages) = (&self.checkpoint, self.count());
        tracing::debug!(%checkpoint, %pages, "dirty claim acknowledged");
        self.taken.clear();
        Ok(())
    }

    /// Restores the pages now; the same as dropping the claim, but explicit.
    pub fn restore(self) {}
}

impl Drop for DirtyClaim {
    fn drop(&mut self) {
        // `acknowledge` has emptied `taken`: then there is nothing to return.
        for (pending, taken) in self.pending.sets().iter_mut().zip(&self.taken) {
            pending.union_with(taken);
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use checkpoint_format::{CheckpointId, PageIndex};

    fn checkpoint(vm: &str, id: u64) -> CheckpointRef {
        CheckpointRef { vm: vm.parse().unwrap(), id: CheckpointId(id) }
    }

    #[expect(clippy::disallowed_methods, reason = "a receipt without a store")]
    fn receipt(vm: &str, id: u64) -> DurableReceipt {
        DurableReceipt::of_commit(checkpoint(vm, id))
    }

    fn begin(pending: &Arc<Pending>) -> DirtyClaim {
        DirtyClaim::new(pending, checkpoint("vm", 1))
    }

    fn one_page(page: u64) -> PageSet {
        let mut set = PageSet::new(PageCount(10));
        set.insert(PageIndex(page));
        set
    }

    fn pending() -> Arc<Pending> {
        Arc::new(Pending::new([PageCount(10), PageCount(10)].into_iter()))
    }

    #[test]
    fn dropped_pages_come_back_acknowledged_ones_do_not() {
        let pending = pending();
        let mut claim = begin(&pending);
        claim.add(1, &one_page(3));
        claim.add(1, &one_page(4));
        assert_eq!(claim.count(), PageCount(2));
        drop(claim);
        assert!(pending.sets()[0].is_empty());
        assert_eq!(pending.sets()[1].count(), PageCount(2));

        pending.sets()[1].clear();
        let mut claim = begin(&pending);
        claim.add(0, &one_page(9));
        claim.acknowledge(&receipt("vm", 1)).unwrap();
        assert!(pending.sets().iter().all(PageSet::is_empty));
    }

    #[test]
    fn claim_is_restored_when_another_checkpoint_is_durable() {
        let pending = pending();
        for other in [receipt("vm", 2), receipt("another", 1)] {
            let mut claim = begin(&pending);
            claim.add(0, &one_page(7));
            assert!(claim.acknowledge(&other).is_err());
            assert!(pending.sets()[0].contains(PageIndex(7)), "{other:?}");
            pending.sets()[0].clear();
        }
    }

    #[test]
    fn a_panic_gives_the_pages_back() {
        let pending = pending();
        let mut claim = begin(&pending);
        claim.add(0, &one_page(5));
        let result = std::thread::spawn(move || {
            let _held = claim;
            panic!("as a failing checkpoint might");
        })
        .join();
        assert!(result.is_err());
        assert!(pending.sets()[0].contains(PageIndex(5)));
    }
}
