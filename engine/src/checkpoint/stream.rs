//! The stream engine: what the phases `pre-copy` and `pause` are for a QEMU in which nothing of
//! ours tracks memory.
//!
//! QEMU migrates itself to us, over a socket pair, and continues. By
//! - *pre-copy*: memory comes while the guest runs; QEMU stops it for the rest when that is small,
//!   and waits for our word before it sends it, so that the disks' instant can be taken in the same
//!   pause; or
//! - *background snapshot*: the guest is stopped, the disks' instant taken, memory write-protected;
//!   the guest runs on and memory comes as it was; or
//! - *stopped*: the guest is stopped while all of its memory comes (where QEMU's pre-copy of a
//!   running guest has a fault).
//!
//! The devices' state is the stream's own last part. Whatever fails: the guest runs, and QEMU's
//! capabilities and parameters are what they were.

use super::buffers::{Aborted, Buffers, OrKeep, blocking};
use super::outcome::{Phases, milliseconds};
use super::receive::Receiver;
use super::source::{
    CaptureContext, Claimed, FailedDisks, MemorySource, Moment, NotTaken, SavedState, Taken,
    capture_disks, flush,
};
use crate::kill_point;
use crate::pack::Packer;
use anyhow::{Context, Result};
use checkpoint_format::PageCount;
use futures::future::BoxFuture;
use qmp_bridge::capture::{CapturedDisks, PreparedDisks};
use qmp_bridge::device_state::DeviceState;
use qmp_bridge::migration::{Migration, StreamMode, StreamOptions};
use qmp_bridge::stream_reader::StreamReadError;
use qmp_bridge::{Paused, Qmp, RunState};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::Instant;
use tracing::instrument;
use vm::drives::Drives;
use vm::error::Phase;
use vm::memory_source::Engine;
use vm::reopen;

/// What the pause fills without a page fault: 16 MiB.
const PAUSE_ROOM: PageCount = PageCount(4096);

/// The longest that a guest is stopped while all of its memory is read; about 0.4 to 2 s a GiB.
const STOPPED_LIMIT: Duration = Duration::from_secs(600);

/// How long a guest may wait for the store, where it would (see [`StreamSource::begin_reading`]).
const GUEST_TIMEOUT: Duration = Duration::from_millis(500);
/// The same for one that is stopped for seconds anyway: a store that is slow for a moment must not
/// make that pause useless.
const STOPPED_GUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// Between two flushes while QEMU's migration may stop the guest at any moment.
const FLUSH_EVERY: Duration = Duration::from_millis(200);

/// QEMU's migration into a socket pair.
pub(super) struct StreamSource {
    pub qmp: Qmp,
    pub engine: Engine,
    pub mode: StreamMode,
    /// Where the migration's settings are kept while they are changed.
    pub journal: PathBuf,
}

/// What comes beside the stream.
struct Flow {
    disks: CapturedDisks,
    run_state: RunState,
    pause: Duration,
}

type FlowResult = Result<Flow, Aborted<FailedDisks>>;
type ReadResult = Result<(Receiver, DeviceState), Aborted<Receiver>>;

impl MemorySource for StreamSource {
    fn capture<'a>(
        self: Box<Self>,
        buffers: Buffers,
        disks: PreparedDisks,
        context: CaptureContext<'a>,
    ) -> BoxFuture<'a, Result<Taken, NotTaken>> {
        Box::pin(self.stream(buffers, disks, context))
    }
}

impl StreamSource {
    #[instrument(name = "stream", level = "debug", skip_all)]
    async fn stream(
        self: Box<Self>,
        buffers: Buffers,
        disks: PreparedDisks,
        mut context: CaptureContext<'_>,
    ) -> Result<Taken, NotTaken> {
        context.phases.enter(Phase::Stream);
        context.report.say("stream", 0, 0);
        let begun = Instant::now();
        let options = StreamOptions::default();
        let prepared = Migration::prepare(&self.qmp, self.mode, &options, &self.journal).await;
        let mut migration = match prepared.context("preparing QEMU's migration") {
            Ok(migration) => migration,
            Err(error) => return Err(NotTaken::before(Aborted::new(error, buffers), disks)),
        };
        kill_point::point("stream.prepared");
        let taken = self.take(buffers, disks, &mut migration, &mut context).await;
        let ended = match &taken {
            Ok(_) => migration.finish().await.map(drop).context("ending QEMU's migration"),
            Err(_) => migration.cancel().await.context("cancelling QEMU's migration"),
        };
        context.phases.since("stream", begun);
        match (taken, ended) {
            (Ok(Taken { buffers, claimed, .. }), Err(error)) => {
                Err(NotTaken::after(error, Some(buffers), claimed.disks))
            }
            (Err(not_taken), Err(error)) => {
                // What comes first is why; the next checkpoint, or helper, puts QEMU's migration in
                // order.
                tracing::warn!(error = format!("{error:#}"), "after a stream that failed");
                Err(not_taken)
            }
            (taken, Ok(())) => taken,
        }
    }

    async fn take(
        &self,
        buffers: Buffers,
        disks: PreparedDisks,
        migration: &mut Migration,
        context: &mut CaptureContext<'_>,
    ) -> Result<Taken, NotTaken> {
        let (source, cut) = match open(migration) {
            Ok(ends) => ends,
            Err(error) => return Err(NotTaken::before(Aborted::new(error, buffers), disks)),
        };
        let guest_waits = Arc::new(AtomicBool::new(false));
        let reading = self.begin_reading(buffers, source, Arc::clone(&guest_waits), context.packer);
        let flow = match self.engine {
            Engine::BackgroundSnapshot => self.background_snapshot(disks, migration, context).await,
            Engine::Stopped => self.stopped(disks, migration, context).await,
            Engine::PreCopy | Engine::Tracker | Engine::ProcessMemory => {
                pre_copy(disks, migration, &guest_waits, context).await
            }
        };
        if flow.is_err() {
            // Ends the reading thread too; a socket that is closed already is as good.
            let _ = cut.shutdown(Shutdown::Both);
        }
        let read = reading.await;
        kill_point::point("stream.read");
        conclude(flow, read)
    }

    fn begin_reading(
        &self,
        mut buffers: Buffers,
        source: UnixStream,
        guest_waits: Arc<AtomicBool>,
        packer: &Packer,
    ) -> impl Future<Output = ReadResult> + Send + use<> {
        buffers.staging.prefault(PAUSE_ROOM);
        // Otherwise the guest waits until we have taken all, or the page that it wants to write.
        let entrance = match self.engine {
            Engine::PreCopy => packer.entrance(),
            Engine::Stopped => packer.entrance().with_timeout(STOPPED_GUEST_TIMEOUT),
            _ => packer.entrance().with_timeout(GUEST_TIMEOUT),
        };
        let receiver = Receiver::new(buffers, entrance, guest_waits);
        blocking(receiver, move |receiver: &mut Receiver| {
            let state = receiver.receive(&source);
            // A reader that has given up must not leave QEMU, and its guest, waiting: its migration
            // fails now.
            let _ = source.shutdown(Shutdown::Both);
            state
        })
    }

    /// Pre-copy of a guest that we have stopped before: all of its memory is read in the pause.
    async fn stopped(
        &self,
        disks: PreparedDisks,
        migration: &mut Migration,
        context: &mut CaptureContext<'_>,
    ) -> FlowResult {
        let stop = async {
            flush(&disks).await?;
            Paused::stop_within(&self.qmp, STOPPED_LIMIT).await.context("stopping the guest")
        };
        let (disks, mut paused) = stop.await.or_keep(disks)?;
        let run_state = paused.before();
        paused.has_migrated();
        let stopped = paused.elapsed();
        let drives = &context.inventory.drives;
        let read = read_stopped(disks, migration, &paused, drives).await;
        // After a failure too, and then before anything else.
        let resumed = paused.resume().await.context("letting the guest run again");
        let (disks, taken) = read?;
        let (disks, pause) = resumed.or_keep(disks)?;
        trace_rest(context.phases, pause, stopped, taken);
        Ok(Flow { disks, run_state, pause })
    }

    async fn background_snapshot(
        &self,
        disks: PreparedDisks,
        migration: &mut Migration,
        context: &mut CaptureContext<'_>,
    ) -> FlowResult {
        let stop = async {
            flush(&disks).await?;
            Paused::stop(&self.qmp).await.context("stopping the guest")
        };
        let (disks, paused) = stop.await.or_keep(disks)?;
        let run_state = paused.before();
        let stopped = paused.elapsed();
        kill_point::point("stream.switched");
        let disks = capture_disks(disks, &paused).await.map_err(Aborted::<FailedDisks>::lost)?;
        let captured = paused.elapsed();
        kill_point::point("stream.captured");
        let hold = async {
            migration.start().await.context("starting QEMU's migration to the helper")?;
            kill_point::point("stream.started");
            let held = migration.memory_is_held(paused).await;
            held.context("write-protecting the guest's memory")
        };
        let (disks, pause) = hold.await.or_keep(disks)?;
        kill_point::point("stream.held");
        let parts = [
            ("pause.stop", stopped),
            ("pause.disks", captured - stopped),
            ("pause.stream", pause.saturating_sub(captured)),
        ];
        trace(context.phases, pause, &parts);
        Ok(Flow { disks, run_state, pause })
    }
}

/// The end of the stream that is read, and one by which it is cut.
fn open(migration: &mut Migration) -> Result<(UnixStream, UnixStream)> {
    let source = migration.take_reader().context("the stream has a reader already")?;
    let cut = source.try_clone().context("keeping a hand on the stream")?;
    Ok((source, cut))
}

/// Of two errors the cause counts, not the one that follows from it.
fn conclude(flow: FlowResult, read: ReadResult) -> Result<Taken, NotTaken> {
    let about = "reading QEMU's migration stream";
    match (flow, read) {
        (Ok(Flow { disks, run_state, pause }), Ok((receiver, devices))) => Ok(Taken {
            buffers: receiver.buffers,
            claimed: Claimed { claim: None, disks },
            devices: SavedState::Read(devices),
            moment: Moment {
                run_state,
                pause,
                brief_stops: Vec::new(),
                pages_dirty: receiver.news,
            },
        }),
        (Ok(Flow { disks, .. }), Err(Aborted { error, left })) => {
            let buffers = left.map(|receiver| receiver.buffers);
            Err(NotTaken::after(error.context(about), buffers, disks))
        }
        (Err(flow), Ok((receiver, _))) => {
            let buffers = Some(receiver.buffers);
            Err(NotTaken { error: flow.error, buffers, disks: flow.left })
        }
        (Err(flow), Err(read)) => {
            let error = match &read.left {
                Some(_) if is_echo(&read.error) => flow.error,
                Some(_) => read.error.context(about).context(flow.error),
                None => read.error,
            };
            let buffers = read.left.map(|receiver| receiver.buffers);
            Err(NotTaken { error, buffers, disks: flow.left })
        }
    }
}

async fn pre_copy(
    disks: PreparedDisks,
    migration: &mut Migration,
    guest_waits: &AtomicBool,
    context: &mut CaptureContext<'_>,
) -> FlowResult {
    let begun = Instant::now();
    let switch = async {
        migration.start().await.context("starting QEMU's migration to the helper")?;
        kill_point::point("stream.started");
        switch_over(&disks, migration).await
    };
    let (disks, paused) = switch.await.or_keep(disks)?;
    let run_state = paused.before();
    context.phases.since("stream.live", begun);
    guest_waits.store(true, Ordering::SeqCst);
    kill_point::point("stream.switched");
    let stopped = paused.elapsed();
    let drives = &context.inventory.drives;
    let (disks, taken) = take_rest(disks, migration, &paused, &paused, drives).await?;
    let resumed = paused.resume().await.context("letting the guest run again");
    let (disks, pause) = resumed.or_keep(disks)?;
    guest_waits.store(false, Ordering::SeqCst);
    trace_rest(context.phases, pause, stopped, taken);
    Ok(Flow { disks, run_state, pause })
}

/// QEMU stops the guest by itself, at a moment that it does not announce; so the disks are flushed
/// again and again until then.
async fn switch_over(disks: &PreparedDisks, migration: &mut Migration) -> Result<Paused> {
    let flushing = async {
        while let Ok(()) = flush(disks).await {
            tokio::time::sleep(FLUSH_EVERY).await;
        }
        // The switch-over is waited for, whatever becomes of a flush.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        paused = migration.switchover() => paused.context("waiting until the rest of the memory is small"),
        () = flushing => unreachable!("it ends only with the switch-over"),
    }
}

/// The disks' instant, and when memory and disks were taken, from the beginning of the pause.
type Rest = Result<(CapturedDisks, (Duration, Duration)), Aborted<FailedDisks>>;

async fn read_stopped(
    disks: PreparedDisks,
    migration: &mut Migration,
    paused: &Paused,
    drives: &Drives,
) -> Rest {
    let switch = async {
        migration.start().await.context("starting QEMU's migration to the helper")?;
        kill_point::point("stream.started");
        migration.switchover().await.context("reading the guest's memory")
    };
    let (disks, switched) = switch.await.or_keep(disks)?;
    kill_point::point("stream.switched");
    let (disks, times) = take_rest(disks, migration, &switched, paused, drives).await?;
    // It has nothing to resume: the guest did not run when QEMU switched over.
    let ended = switched.resume().await.context("ending QEMU's switch-over");
    let (disks, _) = ended.or_keep(disks)?;
    Ok((disks, times))
}

/// After the switch-over: the rest of the memory, then the disks.
async fn take_rest(
    disks: PreparedDisks,
    migration: &mut Migration,
    switched: &Paused,
    paused: &Paused,
    drives: &Drives,
) -> Rest {
    let complete = async {
        // Again, now that the guest is paused: from here on QEMU opens its disks by their paths.
        reopen::check_paths(drives)?;
        migration.complete(switched).await.context("taking the rest of the memory")
    };
    let (disks, ()) = complete.await.or_keep(disks)?;
    kill_point::point("stream.completed");
    let completed = paused.elapsed();
    let disks = capture_disks(disks, paused).await.map_err(Aborted::<FailedDisks>::lost)?;
    let captured = paused.elapsed();
    kill_point::point("stream.captured");
    Ok((disks, (completed, captured)))
}

/// A pause in which the rest of the memory was `completed` and then the disks `captured`.
fn trace_rest(
    phases: &mut Phases,
    pause: Duration,
    stopped: Duration,
    (completed, captured): (Duration, Duration),
) {
    let (stream, disks) = (completed - stopped, captured - completed);
    let parts = [("pause.stop", stopped), ("pause.stream", stream), ("pause.disks", disks)];
    trace(phases, pause, &parts);
}

fn trace(phases: &mut Phases, pause: Duration, parts: &[(&str, Duration)]) {
    phases.add("pause", pause);
    parts.iter().for_each(|(name, time)| phases.add(name, *time));
    tracing::info!(pause_ms = milliseconds(pause), "pause");
}

/// The stream was only cut off, which says no more than that the migration ended.
fn is_echo(error: &anyhow::Error) -> bool {
    error.downcast_ref::<StreamReadError>().is_some_and(StreamReadError::is_cut_off)
}
