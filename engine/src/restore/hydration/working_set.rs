//! What the guest needed first after the last restore comes first after this one.
//!
//! The pages that the guest waits for in its first seconds are recorded in the store, one small
//! file for each VM. The pages that it wrote shortly before the checkpoint need no record: the
//! checkpoint itself stores them. A hint: without it, or with a wrong one, pages come in another
//! order.

use super::Inner;
use anyhow::{Context, Result};
use checkpoint_format::{
    ByteLen, MAX_WORKING_SET_RANGES, PageCount, PageIndex, PageRange, RangeSet, WorkingSet,
};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::OnceCell;

/// How long after its beginning a hydration records faults.
const RECORDED: Duration = Duration::from_secs(10);
/// A larger set helps no more than the order of the packs.
pub(super) const MOST: ByteLen = ByteLen(256 << 20);
/// Pages between two ranges that are taken with them: they are in the same frame mostly.
const GAP: PageCount = PageCount(16);

/// The first pages that a guest waits for.
#[derive(Default)]
pub(super) struct FirstPages {
    waited_for: Mutex<RangeSet>,
    /// What the store has from an earlier restore.
    known: OnceCell<RangeSet>,
    saved: OnceCell<()>,
}

impl FirstPages {
    /// A thread of QEMU waits for it.
    pub(super) fn note(&self, page: PageIndex) {
        if !self.saved.initialized() {
            self.lock().insert(PageRange::single(page));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, RangeSet> {
        self.waited_for.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pages of the last record; none if there is none that can be read.
    pub(super) async fn known(&self, inner: &Inner) -> &RangeSet {
        self.known.get_or_init(|| read(inner)).await
    }

    /// Once, and never again.
    pub(super) async fn save(&self, inner: &Inner) {
        let save = async {
            if let Err(error) = self.try_save(inner).await {
                tracing::debug!(error = format!("{error:#}"), "no working set was recorded");
            }
        };
        self.saved.get_or_init(|| save).await;
    }

    async fn try_save(&self, inner: &Inner) -> Result<()> {
        let known = self.known(inner).await;
        let waited_for = self.lock().clone();
        let Some(pages) = to_record(known, &waited_for) else { return Ok(()) };
        let set = WorkingSet { space: inner.space.clone(), pages };
        let vm = &inner.state.record().vm;
        let repository = inner.reader().await.source().repository();
        repository.replace_working_set(vm, &set).await.context("recording the working set")?;
        tracing::info!(pages = set.pages.pages().0, "recorded what the guest needed first");
        Ok(())
    }
}

/// When the first seconds are over.
pub(super) async fn save_in_time(inner: Arc<Inner>, first: Arc<FirstPages>) {
    tokio::time::sleep(RECORDED).await;
    first.save(&inner).await;
}

async fn read(inner: &Inner) -> RangeSet {
    let vm = &inner.state.record().vm;
    match inner.reader().await.source().repository().working_set(vm).await {
        Ok(Some(set)) if set.space == inner.space => set.pages,
        Ok(_) => RangeSet::default(),
        Err(error) => {
            tracing::debug!(%error, "the working set of the last restore cannot be read");
            RangeSet::default()
        }
    }
}

/// What to write; nothing if that would say no more than what is known.
///
/// Pages that come because they are known are not waited for, so they stay in the set until it is
/// too large.
fn to_record(known: &RangeSet, waited_for: &RangeSet) -> Option<RangeSet> {
    let new = joined(waited_for);
    if all(&new).all(|range| known.outside(range).next().is_none()) {
        return None;
    }
    let mut union = known.clone();
    all(&new).for_each(|range| union.insert(range));
    let mut union = joined(&union);
    if union.pages().byte_len() > MOST {
        union = new;
    }
    union.keep(MAX_WORKING_SET_RANGES);
    Some(union)
}

/// With the gaps closed that are not worth two ranges.
fn joined(set: &RangeSet) -> RangeSet {
    let mut closed = RangeSet::default();
    let mut last: Option<PageRange> = None;
    for range in all(set) {
        let start = last.filter(|last| range.start.0 - last.end.0 <= GAP.0);
        closed.insert(PageRange::new(start.map_or(range.start, |last| last.end), range.end));
        last = Some(range);
    }
    closed
}

pub(super) fn all(set: &RangeSet) -> impl Iterator<Item = PageRange> {
    set.within(PageRange::new(PageIndex(0), PageIndex(u64::MAX)))
}

#[cfg(test)]
mod test {
    use super::*;

    fn set(ranges: &[(u64, u64)]) -> RangeSet {
        let mut set = RangeSet::default();
        for (start, end) in ranges {
            set.insert(PageRange::new(PageIndex(*start), PageIndex(*end)));
        }
        set
    }

    #[test]
    fn what_is_known_already_is_not_written_again() {
        let known = set(&[(0, 100)]);
        assert_eq!(to_record(&known, &set(&[])), None);
        assert_eq!(to_record(&known, &set(&[(5, 6), (99, 100)])), None);
        let more = to_record(&known, &set(&[(5, 6), (200, 201)]));
        assert_eq!(more, Some(set(&[(0, 100), (200, 201)])));
    }

    #[test]
    fn near_pages_are_one_range() {
        let recorded = to_record(&set(&[]), &set(&[(0, 1), (17, 18), (35, 36)]));
        assert_eq!(recorded, Some(set(&[(0, 18), (35, 36)])));
    }

    #[test]
    fn too_large_a_set_is_replaced_by_what_was_waited_for() {
        let most = PageCount::covering(MOST).0;
        let recorded = to_record(&set(&[(0, most)]), &set(&[(most + 100, most + 101)]));
        assert_eq!(recorded, Some(set(&[(most + 100, most + 101)])));
    }
}
