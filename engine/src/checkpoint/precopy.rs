//! Copying dirty pages: pre-copy passes while the guest runs, and the copy inside the pause.
//!
//! A pre-copy pass begins with a brief stop (`stop`, scan and protect, `cont`), because a page
//! under block I/O can be written without a fault when it is protected under a running guest. What
//! it took is then copied while the guest runs; a page that the guest changes meanwhile is dirty
//! again and comes again.

use super::delta::Delta;
use super::staging::{SpaceNumber, Staging};
use crate::kill_point;
use crate::pack::Entrance;
use anyhow::{Context, Result};
use checkpoint_format::{FRAME_PAGES, PAGE_SIZE, PageCount, PageRange, PageSet};
use dirty_tracker::{BlockId, DirtyClaim, Tracker};
use qmp_bridge::Paused;
use std::sync::Mutex;
use std::time::Duration;
use vm::running::{Vm, lock};

/// Pre-copy passes that a checkpoint may make; what is left then is copied in the pause.
pub const MAX_PASSES: u32 = 6;
/// What the pause may copy without a pass before it: 16 MiB take about 4 ms.
pub const PAUSE_PAGES: PageCount = PageCount(4096);
/// A pass that leaves more than this share of what it took is not worth another.
const WORTH: f64 = 0.7;

/// What a claim took from each RAM space, by number.
pub type Taken = Vec<(SpaceNumber, PageSet)>;

pub fn count(taken: &Taken) -> PageCount {
    PageCount(taken.iter().map(|(_, pages)| pages.count().0).sum())
}

/// Dirty pages at this moment; nothing is taken.
pub fn look(vm: &Vm) -> Result<PageCount> {
    let mut tracker = vm.lock_tracker()?;
    let ids: Vec<BlockId> = tracker.blocks().map(|(id, _)| id).collect();
    let mut dirty = 0;
    for id in ids {
        dirty += tracker.scan(id)?.count().0;
    }
    Ok(PageCount(dirty))
}

/// Pages of a RAM space that exist; all others are zero.
pub fn existing(vm: &Vm, space: SpaceNumber) -> Result<PageSet> {
    let tracker = vm.lock_tracker()?;
    Ok(tracker.populated(block_id(&tracker, space)?)?)
}

/// Whether another pre-copy pass shortens the pause.
pub fn is_worth_it(passes: u32, dirty: PageCount, before: Option<PageCount>) -> bool {
    let shrinks = before.is_none_or(|before| (dirty.0 as f64) < before.0 as f64 * WORTH);
    dirty > PAUSE_PAGES && passes < MAX_PASSES && shrinks
}

/// Takes and protects every dirty page. Only while the guest is stopped.
pub fn take(tracker: &mut Tracker, claim: &mut DirtyClaim) -> Result<Taken> {
    let ids: Vec<BlockId> = tracker.blocks().map(|(id, _)| id).collect();
    let take = |id: BlockId| Ok((id.index() as SpaceNumber, tracker.claim(id, claim)?));
    ids.into_iter().map(take).collect()
}

/// The brief stop of a pre-copy pass.
pub async fn begin(vm: &Vm, claim: &mut DirtyClaim) -> Result<(Taken, Duration)> {
    let paused = Paused::stop(&vm.qmp).await.context("stopping the guest for a pass")?;
    let taken = vm.lock_tracker().and_then(|mut tracker| take(&mut tracker, claim));
    kill_point::point("pre-copy.paused");
    let pause = paused.resume().await.context("letting the guest run again")?;
    Ok((taken?, pause))
}

/// Copies what was taken into the staging memory, where the pause can still replace it.
pub fn stage(tracker: &Tracker, taken: &Taken, staging: &mut Staging) -> Result<()> {
    for (space, range) in ranges(taken) {
        let id = block_id(tracker, space)?;
        let room = staging.push(space, range)?;
        tracker.read_pages(id, range, room)?;
    }
    Ok(())
}

/// Sends what was taken on its way at once: for passes that the staging memory cannot hold.
pub fn spill(
    tracker: &Mutex<Tracker>,
    taken: &Taken,
    delta: &mut Delta,
    entrance: &Entrance,
) -> Result<()> {
    let mut buffer = vec![0; FRAME_PAGES * PAGE_SIZE];
    let mut jobs = Vec::new();
    for (space, range) in ranges(taken) {
        for piece in range.chunks(PageCount(FRAME_PAGES as u64)) {
            let bytes = &mut buffer[..piece.byte_len().as_usize()];
            {
                let tracker = lock(tracker);
                tracker.read_pages(block_id(&tracker, space)?, piece, bytes)?;
            }
            delta.offer(space, piece.start, bytes, &mut jobs);
            entrance.send(&mut jobs)?;
        }
    }
    delta.flush(&mut jobs);
    entrance.send(&mut jobs)
}

/// Sends the staged pages, each in its newest copy.
pub fn upload(staging: &Staging, delta: &mut Delta, entrance: &Entrance) -> Result<()> {
    let mut jobs = Vec::new();
    for staged in staging.newest() {
        delta.offer(staged.space, staged.page, staging.bytes(staged), &mut jobs);
        entrance.send(&mut jobs)?;
    }
    delta.flush(&mut jobs);
    entrance.send(&mut jobs)
}

fn ranges(taken: &Taken) -> impl Iterator<Item = (SpaceNumber, PageRange)> {
    taken.iter().flat_map(|(space, pages)| pages.ranges().map(|range| (*space, range)))
}

fn block_id(tracker: &Tracker, space: SpaceNumber) -> Result<BlockId> {
    let id = tracker.blocks().map(|(id, _)| id).nth(usize::from(space));
    id.with_context(|| format!("space {space} has no RAM block in the tracker"))
}

/// Runs a copying job on a thread that may block. The state goes there and comes back, whatever the
/// job's result.
pub async fn blocking<T, R>(
    mut state: T,
    job: impl FnOnce(&mut T) -> Result<R> + Send + 'static,
) -> Result<(T, Result<R>)>
where
    T: Send + 'static,
    R: Send + 'static,
{
    let run = move || {
        let result = job(&mut state);
        (state, result)
    };
    tokio::task::spawn_blocking(run).await.context("internal error: a copy task panicked")
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn passes_continue_only_while_they_shrink_the_pause() {
        let pages = PageCount;
        assert!(!is_worth_it(0, PAUSE_PAGES, None), "small enough for the pause");
        assert!(is_worth_it(0, pages(100_000), None));
        assert!(is_worth_it(1, pages(50_000), Some(pages(100_000))));
        assert!(
            !is_worth_it(1, pages(90_000), Some(pages(100_000))),
            "the guest writes as fast as we copy"
        );
        assert!(!is_worth_it(MAX_PASSES, pages(100_000), None));
    }
}
