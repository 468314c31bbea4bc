//! Copying dirty pages: pre-copy passes while the guest runs, and the copy inside the pause.
//!
//! A pre-copy pass begins with a brief stop (`stop`, scan and protect, `cont`), because a page
//! under block I/O can be written without a fault when it is protected under a running guest. The
//! pages that it claimed are then copied while the guest runs; a page that the guest changes
//! meanwhile is dirty again and is claimed again.

use super::buffers::{Aborted, Buffers, OrKeep, blocking};
use super::delta::Delta;
use super::pause::TrackerSource;
use super::source::{CaptureContext, flush};
use super::staging::{SpaceNumber, Staging, space_number};
use crate::kill_point;
use crate::pack::{Entrance, Packer};
use anyhow::{Context, Result, anyhow};
use checkpoint_format::{FRAME_PAGES, PAGE_SIZE, PageCount, PageRange, PageSet};
use dirty_tracker::{BlockId, DirtyClaim, Tracker};
use qmp_bridge::Paused;
use qmp_bridge::capture::PreparedDisks;
use std::sync::{Arc, Mutex};
use tokio::time::Instant;
use tracing::instrument;
use vm::error::Phase;
use vm::running::lock;

/// Pre-copy passes that a checkpoint may make; what is left then is copied in the pause.
pub(super) const MAX_PASSES: usize = 6;
/// Dirty pages that are copied in the pause without another pass: 16 MiB take about 4 ms.
pub(super) const PAUSE_PAGES: PageCount = PageCount(4096);
/// A pause that would copy more than this is not begun: about 100 ms of copying.
const MOST_PAUSE_PAGES: PageCount = PageCount(96 * 256);
/// If a pass leaves more than this share of the pages that it claimed, no further pass follows.
const WORTH: f64 = 0.7;

/// What a claim took from each RAM space, by number.
pub(super) type Taken = Vec<(SpaceNumber, PageSet)>;

impl TrackerSource {
    #[instrument(name = "pre-copy", level = "debug", skip_all)]
    pub(super) async fn passes(
        &mut self,
        mut buffers: Buffers,
        disks: &PreparedDisks,
        context: &mut CaptureContext<'_>,
    ) -> Result<Buffers, Aborted<Buffers>> {
        context.phases.enter(Phase::PreCopy);
        let begun = Instant::now();
        let mut before = None;
        let mut dirty;
        (buffers, dirty) = look(&mut lock(&self.tracker)).or_keep(buffers)?;
        // Until the tracker is exact, its first claim has every page: never inside the pause.
        let mut is_first = !self.is_exact;
        while is_first || is_worth_it(self.brief_stops.len(), dirty, before) {
            context.report.say("pre-copy", self.brief_stops.len() as u64, MAX_PASSES as u64);
            buffers = self.pass(buffers, disks, is_first, context.packer).await?;
            is_first = false;
            before = Some(dirty);
            (buffers, dirty) = look(&mut lock(&self.tracker)).or_keep(buffers)?;
            tracing::debug!(passes = self.brief_stops.len(), left = dirty.0, "pre-copy");
        }
        buffers = make_room(buffers, dirty, context.packer).await?;
        context.phases.since("pre-copy", begun);
        if dirty > MOST_PAUSE_PAGES {
            let error = anyhow!(
                "the guest writes memory faster than it can be copied: {dirty} pages are dirty \
                 after {} passes, which would stop it for too long; slow the guest down and try \
                 again",
                self.brief_stops.len()
            );
            return Err(Aborted::new(error, buffers));
        }
        Ok(buffers)
    }

    async fn pass(
        &mut self,
        buffers: Buffers,
        disks: &PreparedDisks,
        is_first: bool,
        packer: &Packer,
    ) -> Result<Buffers, Aborted<Buffers>> {
        let (mut buffers, taken) = self.begin_pass(disks, is_first).await.or_keep(buffers)?;
        if is_first {
            let offered = offer_holes(&mut buffers.delta, &taken, packer).await;
            (buffers, ()) = offered.or_keep(buffers)?;
        }
        let pages = count(&taken);
        self.pages_dirty.0 += pages.0;
        let tracker = Arc::clone(&self.tracker);
        if pages <= buffers.staging.free() && !is_first {
            let stage =
                move |buffers: &mut Buffers| stage(&lock(&tracker), &taken, &mut buffers.staging);
            return Ok(blocking(buffers, stage).await?.0);
        }
        // What was staged is older, so it must reach the packs before.
        let buffers = buffers.upload_staging(packer.entrance()).await?;
        let entrance = packer.entrance();
        let spill =
            move |buffers: &mut Buffers| spill(&tracker, &taken, &mut buffers.delta, &entrance);
        Ok(blocking(buffers, spill).await?.0)
    }

    /// The brief stop of a pass.
    async fn begin_pass(&mut self, disks: &PreparedDisks, is_first: bool) -> Result<Taken> {
        flush(disks).await?;
        let paused = Paused::stop(&self.qmp).await.context("stopping the guest for a pass")?;
        let taken = take(&mut lock(&self.tracker), &mut self.claim);
        kill_point::point("pre-copy.paused");
        self.brief_stops.push(paused.resume().await.context("letting the guest run again")?);
        let mut taken = taken?;
        if is_first {
            // Also what is clean for the tracker: this checkpoint may know less than it (a full one
            // after a change of layers).
            let tracker = lock(&self.tracker);
            for (space, pages) in &mut taken {
                pages.union_with(&tracker.populated(block_id(&tracker, *space)?)?);
            }
        }
        Ok(taken)
    }
}

/// Pages that do not exist hold zeros. Only where the parent holds something else is that news.
async fn offer_holes(delta: &mut Delta, taken: &Taken, packer: &Packer) -> Result<()> {
    let mut jobs = Vec::new();
    for (space, pages) in taken {
        let mut holes = PageSet::full(pages.len());
        holes.subtract(pages);
        for range in holes.ranges() {
            delta.offer_zero(*space, range, &mut jobs);
        }
    }
    delta.flush(&mut jobs);
    packer.send(&mut jobs).await
}

/// The pause copies into memory that is there already.
async fn make_room(
    mut buffers: Buffers,
    expected: PageCount,
    packer: &Packer,
) -> Result<Buffers, Aborted<Buffers>> {
    let wanted = PageCount(expected.0 * 2 + 1024);
    if wanted > buffers.staging.free() && !buffers.staging.is_empty() {
        buffers = buffers.upload_staging(packer.entrance()).await?;
    }
    buffers.staging.prefault(wanted);
    Ok(buffers)
}

pub(super) fn count(taken: &Taken) -> PageCount {
    PageCount(taken.iter().map(|(_, pages)| pages.count().0).sum())
}

/// Dirty pages at this moment; nothing is taken.
pub(super) fn look(tracker: &mut Tracker) -> Result<PageCount> {
    let ids: Vec<BlockId> = tracker.blocks().map(|(id, _)| id).collect();
    let mut dirty = 0;
    for id in ids {
        dirty += tracker.scan(id)?.count().0;
    }
    Ok(PageCount(dirty))
}

/// Whether another pre-copy pass shortens the pause.
pub(super) fn is_worth_it(passes: usize, dirty: PageCount, before: Option<PageCount>) -> bool {
    let shrinks = before.is_none_or(|before| (dirty.0 as f64) < before.0 as f64 * WORTH);
    dirty > PAUSE_PAGES && passes < MAX_PASSES && shrinks
}

/// Takes and protects every dirty page. Only while the guest is stopped.
pub(super) fn take(tracker: &mut Tracker, claim: &mut DirtyClaim) -> Result<Taken> {
    let ids: Vec<BlockId> = tracker.blocks().map(|(id, _)| id).collect();
    let take = |id: BlockId| Ok((space_number(id.index())?, tracker.claim(id, claim)?));
    ids.into_iter().map(take).collect()
}
/// Copies what was taken into the staging memory, where the pause can still replace it.
pub(super) fn stage(tracker: &Tracker, taken: &Taken, staging: &mut Staging) -> Result<()> {
    for (space, range) in ranges(taken) {
        let id = block_id(tracker, space)?;
        let room = staging.push(space, range)?;
        tracker.read_pages(id, range, room)?;
    }
    Ok(())
}

/// Sends what was taken on its way at once: for passes that the staging memory cannot hold.
pub(super) fn spill(
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
pub(super) fn upload(staging: &Staging, delta: &mut Delta, entrance: &Entrance) -> Result<()> {
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
