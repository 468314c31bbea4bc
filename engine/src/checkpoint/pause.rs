//! Phases `round` and `pause` as seen from the guest: what happens between `stop` and `cont`.
//!
//! The pause does two things side by side: a thread scans, protects and copies memory; QMP takes
//! the disks' instant in one transaction and writes the device state to a file. The guest runs
//! again when both are done, whatever they did.

use super::outcome::{Phases, milliseconds};
use super::precopy::{self, Taken, blocking};
use super::prepare::{Run, SavedState};
use super::staging::Staging;
use super::{Checkpointer, Report};
use crate::kill_point;
use anyhow::{Context, Result, bail};
use checkpoint_format::{PageCount, PageSet};
use dirty_tracker::{DirtyClaim, Tracker};
use qmp_bridge::Paused;
use qmp_bridge::device_state::DeviceStateFile;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::task::JoinError;
use tracing::instrument;
use vm::running::lock;

/// A pause that would copy more than this is not begun: about 100 ms of copying.
const MOST_PAUSE_PAGES: PageCount = PageCount(96 * 256);
/// How often what QEMU wrote after `stop` is claimed again, and how much of it at most (1 MiB): a
/// floppy's DMA moves 512 bytes.
const LATE_PASSES: u32 = 3;
const MOST_LATE_PAGES: PageCount = PageCount(256);

impl Checkpointer {
    #[instrument(name = "pre-copy", level = "debug", skip_all)]
    pub(super) async fn passes(
        &mut self,
        run: &mut Run,
        phases: &mut Phases,
        report: &Report,
    ) -> Result<()> {
        let begun = Instant::now();
        let mut before = None;
        let mut dirty = precopy::look(&self.vm)?;
        // Until the tracker is exact, its first claim has every page: never inside the pause.
        let mut is_first = !run.is_exact;
        while is_first || precopy::is_worth_it(run.brief_stops.len() as u32, dirty, before) {
            report.say("pre-copy", run.brief_stops.len() as u64, u64::from(precopy::MAX_PASSES));
            self.pass(run, is_first).await?;
            is_first = false;
            before = Some(dirty);
            dirty = precopy::look(&self.vm)?;
            tracing::debug!(passes = run.brief_stops.len(), left = dirty.0, "pre-copy");
        }
        self.make_room(run, dirty).await?;
        phases.since("pre-copy", begun);
        if dirty > MOST_PAUSE_PAGES {
            bail!(
                "the guest writes memory faster than it can be copied: {dirty} pages are dirty after {} passes, which would stop it for too long; \
                 slow the guest down and try again",
                run.brief_stops.len()
            );
        }
        Ok(())
    }

    async fn pass(&mut self, run: &mut Run, is_first: bool) -> Result<()> {
        run.flush_disks().await?;
        let claim = run.claim.as_mut().context("the claim is gone")?;
        let (mut taken, pause) = precopy::begin(&self.vm, claim).await?;
        run.brief_stops.push(pause);
        if is_first {
            // Also what is clean for the tracker: this checkpoint may know less than it (a full one
            // after a change of layers).
            for (space, pages) in &mut taken {
                pages.union_with(&precopy::existing(&self.vm, *space)?);
            }
            self.offer_holes(run, &taken).await?;
        }
        let pages = precopy::count(&taken);
        run.pages_dirty.0 += pages.0;
        if pages <= self.staging.free() && !is_first {
            return self.stage(taken).await;
        }
        // What was staged is older, so it must reach the packs before.
        self.upload_staging(run).await?;
        self.spill(run, taken).await
    }

    /// Pages that do not exist hold zeros. Only where the parent holds something else is that news.
    async fn offer_holes(&mut self, run: &mut Run, taken: &Taken) -> Result<()> {
        let packer = run.packer.as_ref().context("the packer is gone")?;
        let delta = run.delta.as_mut().context("the tables are gone")?;
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

    async fn stage(&mut self, taken: Taken) -> Result<()> {
        let tracker = self.vm.tracker()?;
        let staging = std::mem::replace(&mut self.staging, Staging::new(PageCount(0)));
        let (staging, result) =
            blocking(staging, move |staging| precopy::stage(&lock(&tracker), &taken, staging))
                .await?;
        self.staging = staging;
        result
    }

    async fn spill(&mut self, run: &mut Run, taken: Taken) -> Result<()> {
        let tracker = self.vm.tracker()?;
        let entrance = run.packer.as_ref().context("the packer is gone")?.entrance();
        let delta = run.delta.take().context("the tables are gone")?;
        run.is_spilled = true;
        let (delta, result) =
            blocking(delta, move |delta| precopy::spill(&tracker, &taken, delta, &entrance))
                .await?;
        run.delta = Some(delta);
        result
    }

    /// The pause copies into memory that is there already.
    async fn make_room(&mut self, run: &mut Run, expected: PageCount) -> Result<()> {
        let wanted = PageCount(expected.0 * 2 + 1024);
        if wanted > self.staging.free() && !self.staging.is_empty() {
            self.upload_staging(run).await?;
        }
        self.staging.prefault(wanted);
        Ok(())
    }

    #[instrument(name = "pause", level = "debug", skip_all)]
    pub(super) async fn pause(&mut self, run: &mut Run, phases: &mut Phases) -> Result<()> {
        let tracker = self.vm.tracker()?;
        let state_file = DeviceStateFile::prepare(&self.vm.qmp, self.vm.runtime.path()).await?;
        let flush_begun = Instant::now();
        run.flush_disks().await?;
        phases.since("flush", flush_begun);
        let prepared = run.prepared.take().context("the disks are not prepared")?;
        let claim = run.claim.take().context("the claim is gone")?;
        let begun = Instant::now();
        let paused = Paused::stop(&self.vm.qmp).await.context("stopping the guest")?;
        run.run_state = paused.before();
        let stopped = begun.elapsed();
        let mut memory = tokio::spawn(self.pause_memory(tracker, claim));
        let mut copied = None;
        let devices = async {
            let captured = prepared.capture(&paused).await.context("taking the disks' instant")?;
            let disks = begun.elapsed();
            // The disks' instant is taken: it must be known to the run whatever comes now.
            let saved = state_file.save(&paused).await.context("saving the device state");
            Ok::<_, anyhow::Error>((captured, disks, saved))
        };
        let work = async { tokio::join!(async { copied = Some((&mut memory).await) }, devices).1 };
        let devices = paused
            .within("memory, disks and devices", work)
            .await
            .map_err(anyhow::Error::from)
            .flatten();
        let kept = copied.map(|memory| self.keep_memory(run, memory));
        let late = match (&devices, &kept) {
            (Ok((_, _, Ok(()))), Some(Ok(_))) => {
                self.claim_late_writes(run, &paused, &state_file).await
            }
            _ => Ok(()),
        };
        let saved = begun.elapsed();
        kill_point::point("pause.paused");
        let resumed = paused.resume().await.context("letting the guest run again");
        let copied = match kept {
            Some(kept) => kept?,
            // The pause took too long; what the thread has taken must come back before anything
            // else.
            None => {
                let memory = memory.await;
                self.keep_memory(run, memory)?
            }
        };
        let (captured, disks, device_state) = devices?;
        run.captured = Some(captured);
        run.pause = resumed?;
        device_state?;
        late?;
        run.device_state = Some(SavedState::File(state_file));
        trace_pause(phases, stopped, disks, copied, saved, run.pause);
        Ok(())
    }

    /// What was claimed and copied becomes the run's, whatever else fails. Returns the time that it
    /// took.
    fn keep_memory(
        &mut self,
        run: &mut Run,
        memory: Result<Result<CapturedMemory>, JoinError>,
    ) -> Result<Duration> {
        let (claim, staging, taken, time) =
            memory.context("internal error: copy task panicked")??;
        self.staging = staging;
        run.claim = Some(claim);
        run.pages_dirty.0 += taken?.0;
        Ok(time)
    }

    /// QEMU itself may write guest memory after `stop`: a DMA controller's bottom half, a device
    /// that saves its state. Such pages are claimed again and the device state is saved again,
    /// until memory and devices are of one instant.
    async fn claim_late_writes(
        &mut self,
        run: &mut Run,
        paused: &Paused,
        state: &DeviceStateFile,
    ) -> Result<()> {
        let mut passes = 0;
        let mut left = precopy::look(&self.vm)?;
        while left > PageCount(0) && left <= MOST_LATE_PAGES && passes < LATE_PASSES {
            tracing::debug!(%left, "written after the guest was stopped");
            let claim = run.claim.take().context("the claim is gone")?;
            let memory = self.pause_memory(self.vm.tracker()?, claim).await;
            self.keep_memory(run, Ok(memory))?;
            paused
                .within("the device state", state.save(paused))
                .await?
                .context("saving the device state again")?;
            left = precopy::look(&self.vm)?;
            passes += 1;
        }
        if left == PageCount(0) {
            return Ok(());
        }
        bail!(
            "{left} pages of the guest's memory were written while it was stopped for the checkpoint; another monitor is at work on \
             this VM, try again"
        )
    }

    /// On a thread of its own, from the moment the guest is stopped.
    fn pause_memory(
        &mut self,
        tracker: Arc<Mutex<Tracker>>,
        claim: DirtyClaim,
    ) -> impl Future<Output = Result<CapturedMemory>> + Send + use<> {
        let staging = std::mem::replace(&mut self.staging, Staging::new(PageCount(0)));
        let begun = Instant::now();
        let job = blocking((claim, staging), move |(claim, staging)| {
            let mut tracker = lock(&tracker);
            let taken = precopy::take(&mut tracker, claim)?;
            let pages = precopy::count(&taken);
            if pages > staging.free() {
                bail!(
                    "{pages} pages were dirty in the pause, more than the staging memory has room for; try again"
                );
            }
            precopy::stage(&tracker, &taken, staging)?;
            Ok(pages)
        });
        async move {
            let ((claim, staging), taken) = job.await?;
            Ok((claim, staging, taken, begun.elapsed()))
        }
    }
}

type CapturedMemory = (DirtyClaim, Staging, Result<PageCount>, Duration);

fn trace_pause(
    phases: &mut Phases,
    stopped: Duration,
    disks: Duration,
    copied: Duration,
    saved: Duration,
    pause: Duration,
) {
    phases.add("pause", pause);
    phases.add("pause.stop", stopped);
    phases.add("pause.disks", disks.saturating_sub(stopped));
    phases.add("pause.devices", saved.saturating_sub(disks));
    phases.add("pause.memory", copied);
    tracing::info!(pause_ms = milliseconds(pause), "pause");
}
