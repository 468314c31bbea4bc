//! Dirty pages on loan.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use checkpoint_format::{DurableReceipt, PageCount, PageSet};

use crate::region::RegionId;

/// Pages that were taken from the kernel and given back, by region; the next lease gets them first.
#[derive(Debug)]
pub(crate) struct Pending(Mutex<Vec<PageSet>>);

impl Pending {
    pub fn new(sizes: impl Iterator<Item = PageCount>) -> Self {
        Self(Mutex::new(sizes.map(PageSet::new).collect()))
    }

    /// The sets; a thread that panicked elsewhere leaves them whole, for every change is one call.
    pub fn sets(&self) -> MutexGuard<'_, Vec<PageSet>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The dirty pages that a checkpoint has taken, and owes.
///
/// A scan that protects also forgets: from that moment nobody but the taker knows which pages were written. If the
/// checkpoint then fails, the next one would miss them, and a restore would bring back a machine that never existed. So the
/// pages are a loan. Whatever way a checkpoint ends - an error, a cancelled task, a panic - dropping the lease gives them
/// back, and the next lease has them again. The only way to keep them is [`Self::settle`], which asks for the receipt that
/// the store makes when the checkpoint is durable: not written, durable.
///
/// It covers this process only. When the process dies with a lease, the pages are lost, and its successor must compare all
/// of memory with the last durable checkpoint: a new tracker's first lease therefore has every page.
#[derive(Debug)]
#[must_use = "dropping a lease gives its pages back"]
pub struct DirtyLease {
    taken: Vec<PageSet>,
    pending: Arc<Pending>,
}

impl DirtyLease {
    pub(crate) fn new(pending: &Arc<Pending>) -> Self {
        let taken = pending.sets().iter().map(|set| PageSet::new(set.len())).collect();
        Self { taken, pending: Arc::clone(pending) }
    }

    pub(crate) fn is_of(&self, pending: &Arc<Pending>) -> bool {
        Arc::ptr_eq(&self.pending, pending)
    }

    pub(crate) fn add(&mut self, region: usize, pages: &PageSet) {
        if let Some(taken) = self.taken.get_mut(region) {
            taken.union_with(pages);
        }
    }

    /// All pages of a region taken so far; `None` for a region of another tracker.
    pub fn pages(&self, region: RegionId) -> Option<&PageSet> {
        self.taken.get(region.index())
    }

    /// Pages taken so far, in all regions.
    pub fn count(&self) -> PageCount {
        PageCount(self.taken.iter().map(|pages| pages.count().0).sum())
    }

    /// Whether no page is claimed.
    pub fn is_empty(&self) -> bool {
        self.taken.iter().all(PageSet::is_empty)
    }

    /// Keeps the pages: the checkpoint that has them is durable.
    pub fn settle(mut self, receipt: &dyn DurableReceipt) {
        let (vm, checkpoint) = receipt.checkpoint();
        tracing::debug!(%vm, %checkpoint, pages = %self.count(), "dirty lease settled");
        self.taken.clear();
    }

    /// Gives the pages back now; the same as dropping it, said aloud.
    pub fn give_back(self) {}
}

impl Drop for DirtyLease {
    fn drop(&mut self) {
        // `settle` has emptied `taken`: then there is nothing to return.
        for (pending, taken) in self.pending.sets().iter_mut().zip(&self.taken) {
            pending.union_with(taken);
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use checkpoint_format::{CheckpointSeq, PageIndex, VmName};

    struct Receipt(VmName);

    impl DurableReceipt for Receipt {
        fn checkpoint(&self) -> (&VmName, CheckpointSeq) {
            (&self.0, CheckpointSeq(1))
        }
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
    fn dropped_pages_come_back_settled_ones_do_not() {
        let pending = pending();
        let mut lease = DirtyLease::new(&pending);
        lease.add(1, &one_page(3));
        lease.add(1, &one_page(4));
        assert_eq!(lease.count(), PageCount(2));
        drop(lease);
        assert!(pending.sets()[0].is_empty());
        assert_eq!(pending.sets()[1].count(), PageCount(2));

        pending.sets()[1].clear();
        let mut lease = DirtyLease::new(&pending);
        lease.add(0, &one_page(9));
        lease.settle(&Receipt("vm".parse().unwrap()));
        assert!(pending.sets().iter().all(PageSet::is_empty));
    }

    #[test]
    fn a_panic_gives_the_pages_back() {
        let pending = pending();
        let mut lease = DirtyLease::new(&pending);
        lease.add(0, &one_page(5));
        let result = std::thread::spawn(move || {
            let _held = lease;
            panic!("as a failing checkpoint might");
        })
        .join();
        assert!(result.is_err());
        assert!(pending.sets()[0].contains(PageIndex(5)));
    }
}
