//! The tracker engine's memory, and phase `pause`: what happens between `stop` and `cont`.
//!
//! The pause does two things side by side: a thread scans, protects and copies memory; QMP captures
//! the disks in one transaction and writes the device state to a file. The guest runs again when
//! both have ended, whatever their results.

use super::buffers::{Aborted, Buffers, OrKeep, blocking};
use super::outcome::{Phases, milliseconds};
use super::precopy;
use super::source::{
    CaptureContext, Claimed, FailedDisks, MemorySource, Moment, NotTaken, SavedState, Taken, flush,
};
use crate::kill_point;
use anyhow::{Context, Error, Result, anyhow, bail};
use checkpoint_format::{CheckpointRef, PageCount};
use dirty_tracker::{DirtyClaim, Tracker};
use futures::future::BoxFuture;
use qmp_bridge::capture::{CapturedDisks, PreparedDisks};
use qmp_bridge::device_state::DeviceStateFile;
use qmp_bridge::{Paused, Qmp};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;
use tracing::instrument;
use vm::error::Phase;
use vm::running::lock;

/// How often what QEMU wrote after `stop` is claimed again, and how much of it at most (1 MiB): a
/// floppy's DMA moves 512 bytes.
const LATE_PASSES: u32 = 3;
const MOST_LATE_PAGES: PageCount = PageCount(256);

/// The pages that the kernel recorded as written.
pub(super) struct TrackerSource {
    pub qmp: Qmp,
    /// For the file of the device state.
    directory: PathBuf,
    pub tracker: Arc<Mutex<Tracker>>,
    pub claim: DirtyClaim,
    /// The tracker knows every page written since the parent.
    pub is_exact: bool,
    pub brief_stops: Vec<Duration>,
    pub pages_dirty: PageCount,
}

impl MemorySource for TrackerSource {
    fn capture<'a>(
        mut self: Box<Self>,
        buffers: Buffers,
        disks: PreparedDisks,
        mut context: CaptureContext<'a>,
    ) -> BoxFuture<'a, Result<Taken, NotTaken>> {
        Box::pin(async move {
            match self.passes(buffers, &disks, &mut context).await {
                Ok(buffers) => {
                    kill_point::point("pre-copy");
                    self.pause(buffers, disks, context.phases).await
                }
                Err(aborted) => Err(NotTaken::before(aborted, disks)),
            }
        })
    }
}

/// The guest is stopped.
struct Stopped {
    paused: Paused,
    state_file: DeviceStateFile,
    /// Before `stop` was sent.
    begun: Instant,
    /// When it was answered.
    after: Duration,
}

/// What the copying thread works on.
struct Copies {
    claim: DirtyClaim,
    buffers: Buffers,
    pages: PageCount,
}

/// What QMP has taken beside it.
struct Devices {
    disks: CapturedDisks,
    /// When the disks' instant was taken, from the beginning of the pause.
    at: Duration,
    saved: Result<()>,
}

impl TrackerSource {
    /// Does the long part of the first claim, and begins an empty one.
    pub(super) async fn begin(
        qmp: Qmp,
        directory: PathBuf,
        tracker: Arc<Mutex<Tracker>>,
        checkpoint: CheckpointRef,
        is_exact: bool,
    ) -> Result<Box<dyn MemorySource>> {
        let shared = Arc::clone(&tracker);
        let begin = move || {
            let mut tracker = lock(&shared);
            tracker.prepare()?;
            Ok::<_, Error>(tracker.begin_claim(checkpoint))
        };
        let claim = tokio::task::spawn_blocking(begin)
            .await
            .context("internal error: preparing the tracker panicked")??;
        let (brief_stops, pages_dirty) = (Vec::new(), PageCount(0));
        Ok(Box::new(Self { qmp, directory, tracker, claim, is_exact, brief_stops, pages_dirty }))
    }

    #[instrument(name = "pause", level = "debug", skip_all)]
    async fn pause(
        self,
        buffers: Buffers,
        disks: PreparedDisks,
        phases: &mut Phases,
    ) -> Result<Taken, NotTaken> {
        phases.enter(Phase::Pause);
        let stopped = match self.stop(&disks, phases).await {
            Ok(stopped) => stopped,
            Err(error) => return Err(NotTaken::before(Aborted::new(error, buffers), disks)),
        };
        let Self { tracker, claim, brief_stops, pages_dirty, .. } = self;
        let copies = Copies { claim, buffers, pages: pages_dirty };
        let mut copy = Box::pin(copy_memory(Arc::clone(&tracker), copies));
        let mut copied = None;
        let devices = take_devices(disks, &stopped);
        let work = async { tokio::join!(async { copied = Some((&mut copy).await) }, devices).1 };
        let devices = stopped.paused.within("memory, disks and devices", work).await;
        let devices = devices.map_err(Error::from).flatten();
        let (copied, late) = match (copied, &devices) {
            (Some(Ok((copies, time))), Ok(Devices { saved: Ok(()), .. })) => {
                match claim_late_writes(&tracker, copies, &stopped).await {
                    Ok(copies) => (Some(Ok((copies, time))), Ok(())),
                    Err(Aborted { error, left: Some(copies) }) => {
                        (Some(Ok((copies, time))), Err(error))
                    }
                    Err(lost) => (Some(Err(lost)), Ok(())),
                }
            }
            (copied, _) => (copied, Ok(())),
        };
        let saved = stopped.begun.elapsed();
        kill_point::point("pause.paused");
        let run_state = stopped.paused.before();
        let resumed = stopped.paused.resume().await.context("letting the guest run again");
        // If the pause took too long, what the thread has taken must come back before anything
        // else.
        let copied = match copied {
            Some(copied) => copied,
            None => copy.await,
        };
        let Ended { copies, copied, disks, at, pause } = conclude(copied, devices, resumed, late)?;
        trace_pause(phases, [stopped.after, at, saved, copied], pause);
        let Copies { claim, buffers, pages } = copies;
        Ok(Taken {
            buffers,
            claimed: Claimed { claim: Some(claim), disks },
            devices: SavedState::File(stopped.state_file),
            moment: Moment { run_state, pause, brief_stops, pages_dirty: pages },
        })
    }

    async fn stop(&self, disks: &PreparedDisks, phases: &mut Phases) -> Result<Stopped> {
        let state_file = DeviceStateFile::prepare(&self.qmp, &self.directory).await?;
        let flush_begun = Instant::now();
        flush(disks).await?;
        phases.since("flush", flush_begun);
        let begun = Instant::now();
        let paused = Paused::stop(&self.qmp).await.context("stopping the guest")?;
        Ok(Stopped { paused, state_file, begun, after: begun.elapsed() })
    }
}

async fn take_devices(disks: PreparedDisks, stopped: &Stopped) -> Result<Devices> {
    let captured = disks.capture(&stopped.paused).await.context("taking the disks' instant")?;
    let at = stopped.begun.elapsed();
    // The disks' instant is taken: it must be known whatever comes now.
    let saved = stopped.state_file.save(&stopped.paused).await.context("saving the device state");
    Ok(Devices { disks: captured, at, saved })
}

/// On a thread of its own, from the moment the guest is stopped. Says how long it took.
fn copy_memory(
    tracker: Arc<Mutex<Tracker>>,
    copies: Copies,
) -> impl Future<Output = Result<(Copies, Duration), Aborted<Copies>>> + Send {
    let begun = Instant::now();
    blocking(copies, move |Copies { claim, buffers, pages }| {
        let mut tracker = lock(&tracker);
        let taken = precopy::take(&mut tracker, claim)?;
        let count = precopy::count(&taken);
        if count > buffers.staging.free() {
            bail!(
                "{count} pages were dirty in the pause, more than the staging memory has room for; try again"
            );
        }
        precopy::stage(&tracker, &taken, &mut buffers.staging)?;
        pages.0 += count.0;
        Ok(begun.elapsed())
    })
}

/// QEMU itself may write guest memory after `stop`: a DMA controller's bottom half, a device that
/// saves its state. Such pages are claimed again and the device state is saved again, until memory
/// and devices are of one instant.
async fn claim_late_writes(
    tracker: &Arc<Mutex<Tracker>>,
    mut copies: Copies,
    stopped: &Stopped,
) -> Result<Copies, Aborted<Copies>> {
    let Stopped { paused, state_file, .. } = stopped;
    let mut passes = 0;
    let mut left;
    (copies, left) = precopy::look(&mut lock(tracker)).or_keep(copies)?;
    while left > PageCount(0) && left <= MOST_LATE_PAGES && passes < LATE_PASSES {
        tracing::debug!(%left, "written after the guest was stopped");
        (copies, _) = copy_memory(Arc::clone(tracker), copies).await?;
        let saved = paused.within("the device state", state_file.save(paused)).await;
        let saved = saved
            .map_err(Error::from)
            .and_then(|saved| saved.context("saving the device state again"));
        (copies, ()) = saved.or_keep(copies)?;
        (copies, left) = precopy::look(&mut lock(tracker)).or_keep(copies)?;
        passes += 1;
    }
    if left == PageCount(0) {
        return Ok(copies);
    }
    let error = anyhow!(
        "{left} pages of the guest's memory were written while it was stopped for the checkpoint; another monitor is at work on \
         this VM, try again"
    );
    Err(Aborted::new(error, copies))
}

/// A pause in which all went well.
struct Ended {
    copies: Copies,
    copied: Duration,
    disks: CapturedDisks,
    at: Duration,
    pause: Duration,
}

/// Of several errors the first in this order is returned; a claim that is dropped restores its
/// pages.
fn conclude(
    copied: Result<(Copies, Duration), Aborted<Copies>>,
    devices: Result<Devices>,
    resumed: Result<Duration>,
    late: Result<()>,
) -> Result<Ended, NotTaken> {
    let failed = |error, copies: Option<Copies>, disks: Option<CapturedDisks>| NotTaken {
        error,
        buffers: copies.map(|copies| copies.buffers),
        disks: disks.map(FailedDisks::Captured),
    };
    match (copied, devices) {
        (Ok((copies, copied)), Ok(Devices { disks, at, saved })) => {
            match resumed.and_then(|pause| saved.and(late).map(|()| pause)) {
                Ok(pause) => Ok(Ended { copies, copied, disks, at, pause }),
                Err(error) => Err(failed(error, Some(copies), Some(disks))),
            }
        }
        (Ok((copies, _)), Err(error)) => Err(failed(error, Some(copies), None)),
        (Err(Aborted { error, left }), devices) => {
            Err(failed(error, left, devices.ok().map(|devices| devices.disks)))
        }
    }
}

fn trace_pause(
    phases: &mut Phases,
    [stopped, disks, saved, copied]: [Duration; 4],
    pause: Duration,
) {
    phases.add("pause", pause);
    phases.add("pause.stop", stopped);
    phases.add("pause.disks", disks.saturating_sub(stopped));
    phases.add("pause.devices", saved.saturating_sub(disks));
    phases.add("pause.memory", copied);
    tracing::info!(pause_ms = milliseconds(pause), "pause");
}
