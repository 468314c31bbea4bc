//! The stream engine: what the phases `round` and `pause` are for a QEMU in which nothing of ours
//! tracks memory.
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

use super::outcome::{Phases, milliseconds};
use super::precopy::blocking;
use super::prepare::{Run, SavedState};
use super::receive::Receiver;
use super::staging::Staging;
use super::{Checkpointer, Report};
use crate::kill_point;
use anyhow::{Context, Result};
use checkpoint_format::PageCount;
use qmp_bridge::Paused;
use qmp_bridge::device_state::DeviceState;
use qmp_bridge::migration::{Migration, StreamMode, StreamOptions};
use qmp_bridge::stream_reader::StreamReadError;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tracing::instrument;
use vm::memory_source::Engine;
use vm::reopen;

type Reading = JoinHandle<Result<(Receiver, Result<DeviceState>)>>;

/// What the pause fills without a page fault: 16 MiB.
const PAUSE_ROOM: PageCount = PageCount(4096);

/// The longest that a guest is stopped while all of its memory is read; about 0.4 to 2 s a GiB.
const STOPPED_LIMIT: Duration = Duration::from_secs(600);

/// How long a guest may wait for the store, where it would (see [`Checkpointer::begin_reading`]).
const GUEST_TIMEOUT: Duration = Duration::from_millis(500);

/// Between two flushes while QEMU's migration may stop the guest at any moment.
const FLUSH_EVERY: Duration = Duration::from_millis(200);

/// A disk that needs longer for what its guest has written would hold the guest for as long.
const FLUSH_LIMIT: Duration = Duration::from_secs(30);

impl Run {
    /// To be called right before each `stop`, which writes what is not written yet while the guest
    /// waits.
    pub(super) async fn flush_disks(&self) -> Result<()> {
        match &self.prepared {
            Some(prepared) => prepared
                .flush(FLUSH_LIMIT)
                .await
                .context("flushing the disks before the guest is stopped"),
            None => Ok(()),
        }
    }

    pub(super) async fn pause_disks(&mut self, paused: &Paused) -> Result<()> {
        let prepared = self.prepared.take().context("the disks are not prepared")?;
        let captured = paused.within("the disks' point in time", prepared.capture(paused)).await?;
        self.captured = Some(captured.context("taking the disks' instant")?);
        Ok(())
    }
}

impl Checkpointer {
    #[instrument(name = "stream", level = "debug", skip_all)]
    pub(super) async fn stream(
        &mut self,
        run: &mut Run,
        mode: StreamMode,
        phases: &mut Phases,
        report: &Report,
    ) -> Result<()> {
        report.say("stream", 0, 0);
        let begun = Instant::now();
        let journal = self.vm.runtime.migration_journal();
        let options = StreamOptions::default();
        let mut migration = Migration::prepare(&self.vm.qmp, mode, &options, &journal)
            .await
            .context("preparing QEMU's migration")?;
        kill_point::point("stream.prepared");
        let taken = self.take_stream(run, &mut migration, phases).await;
        let ended = match &taken {
            Ok(()) => migration.finish().await.map(drop).context("ending QEMU's migration"),
            Err(_) => migration.cancel().await.context("cancelling QEMU's migration"),
        };
        phases.since("stream", begun);
        if let (Err(_), Err(error)) = (&taken, &ended) {
            // What comes first is why; the next checkpoint, or helper, puts QEMU's migration in
            // order.
            tracing::warn!(error = format!("{error:#}"), "after a stream that failed");
        }
        taken.and(ended)
    }

    async fn take_stream(
        &mut self,
        run: &mut Run,
        migration: &mut Migration,
        phases: &mut Phases,
    ) -> Result<()> {
        let source = migration.take_reader().context("the stream has a reader already")?;
        let cut = source.try_clone().context("keeping a hand on the stream")?;
        let guest_waits = Arc::new(AtomicBool::new(false));
        let reading = self.begin_reading(run, source, Arc::clone(&guest_waits))?;
        let flow = match run.engine {
            Engine::BackgroundSnapshot => self.background_snapshot(run, migration, phases).await,
            Engine::Stopped => self.stopped(run, migration, phases).await,
            Engine::PreCopy | Engine::Tracker | Engine::ProcessMemory => {
                self.pre_copy(run, migration, &guest_waits, phases).await
            }
        };
        if flow.is_err() {
            // Ends the reading thread too; a socket that is closed already is as good.
            let _ = cut.shutdown(std::net::Shutdown::Both);
        }
        self.end_reading(run, reading, flow).await
    }

    fn begin_reading(
        &mut self,
        run: &mut Run,
        source: UnixStream,
        guest_waits: Arc<AtomicBool>,
    ) -> Result<Reading> {
        let entrance = run.packer.as_ref().context("the packer is gone")?.entrance();
        let delta = run.delta.take().context("the tables are gone")?;
        let mut staging = std::mem::replace(&mut self.staging, Staging::new(PageCount(0)));
        staging.prefault(PAUSE_ROOM);
        // Otherwise the guest waits until we have taken all, or the page that it wants to write.
        let entrance = if run.engine == Engine::PreCopy {
            entrance
        } else {
            entrance.with_timeout(GUEST_TIMEOUT)
        };
        let receiver = Receiver::new(staging, delta, entrance, guest_waits);
        let hand = source.try_clone().context("keeping a hand on the stream")?;
        let read = move |receiver: &mut Receiver| {
            let state = receiver.receive(source);
            // A reader that has given up must not leave QEMU, and its guest, waiting: its migration
            // fails now.
            let _ = hand.shutdown(std::net::Shutdown::Both);
            state
        };
        Ok(tokio::spawn(blocking(receiver, read)))
    }

    /// Takes memory and tables back from the reader, in every case. Of two errors it returns the
    /// cause, not the one that follows from it.
    async fn end_reading(
        &mut self,
        run: &mut Run,
        reading: Reading,
        flow: Result<()>,
    ) -> Result<()> {
        let (receiver, state) =
            reading.await.context("internal error: the stream reader panicked")??;
        kill_point::point("stream.read");
        run.pages_dirty.0 += receiver.news.0;
        self.staging = receiver.staging;
        run.delta = Some(receiver.delta);
        match (flow, state) {
            (Ok(()), state) => {
                run.device_state =
                    Some(SavedState::Read(state.context("reading QEMU's migration stream")?));
                Ok(())
            }
            (Err(flow), Err(state)) if !is_echo(&state) => {
                Err(state.context("reading QEMU's migration stream").context(flow))
            }
            (Err(flow), _) => Err(flow),
        }
    }

    async fn pre_copy(
        &mut self,
        run: &mut Run,
        migration: &mut Migration,
        guest_waits: &AtomicBool,
        phases: &mut Phases,
    ) -> Result<()> {
        let begun = Instant::now();
        migration.start().await.context("starting QEMU's migration to the helper")?;
        kill_point::point("stream.started");
        let paused = switch_over(run, migration).await?;
        run.run_state = paused.before();
        phases.since("stream.live", begun);
        guest_waits.store(true, Ordering::SeqCst);
        kill_point::point("stream.switched");
        let stopped = paused.elapsed();
        let taken = take_rest(run, migration, &paused, &paused).await?;
        run.pause = paused.resume().await.context("letting the guest run again")?;
        guest_waits.store(false, Ordering::SeqCst);
        trace_rest(phases, run.pause, stopped, taken);
        Ok(())
    }

    /// Pre-copy of a guest that we have stopped before: all of its memory is read in the pause.
    async fn stopped(
        &mut self,
        run: &mut Run,
        migration: &mut Migration,
        phases: &mut Phases,
    ) -> Result<()> {
        run.flush_disks().await?;
        let mut paused =
            Paused::stop_within(&self.vm.qmp, STOPPED_LIMIT).await.context("stopping the guest")?;
        run.run_state = paused.before();
        paused.has_migrated();
        let stopped = paused.elapsed();
        let read = read_stopped(run, migration, &paused).await;
        // After a failure too, and then before anything else.
        let resumed = paused.resume().await.context("letting the guest run again");
        let taken = read?;
        run.pause = resumed?;
        trace_rest(phases, run.pause, stopped, taken);
        Ok(())
    }

    async fn background_snapshot(
        &mut self,
        run: &mut Run,
        migration: &mut Migration,
        phases: &mut Phases,
    ) -> Result<()> {
        run.flush_disks().await?;
        let paused = Paused::stop(&self.vm.qmp).await.context("stopping the guest")?;
        run.run_state = paused.before();
        let stopped = paused.elapsed();
        kill_point::point("stream.switched");
        run.pause_disks(&paused).await?;
        let captured = paused.elapsed();
        kill_point::point("stream.captured");
        migration.start().await.context("starting QEMU's migration to the helper")?;
        kill_point::point("stream.started");
        run.pause = migration
            .memory_is_held(paused)
            .await
            .context("write-protecting the guest's memory")?;
        kill_point::point("stream.held");
        trace(
            phases,
            run.pause,
            &[
                ("pause.stop", stopped),
                ("pause.disks", captured - stopped),
                ("pause.stream", run.pause.saturating_sub(captured)),
            ],
        );
        Ok(())
    }
}

/// QEMU stops the guest by itself, at a moment that it does not announce; so the disks are flushed
/// again and again until then.
async fn switch_over(run: &Run, migration: &mut Migration) -> Result<Paused> {
    let flushing = async {
        while let Ok(()) = run.flush_disks().await {
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

/// Returns when memory and disks were taken, from the beginning of the pause.
async fn read_stopped(
    run: &mut Run,
    migration: &mut Migration,
    paused: &Paused,
) -> Result<(Duration, Duration)> {
    migration.start().await.context("starting QEMU's migration to the helper")?;
    kill_point::point("stream.started");
    let switched = migration.switchover().await.context("reading the guest's memory")?;
    kill_point::point("stream.switched");
    let times = take_rest(run, migration, &switched, paused).await?;
    // It has nothing to resume: the guest did not run when QEMU switched over.
    switched.resume().await.context("ending QEMU's switch-over")?;
    Ok(times)
}

/// After the switch-over: the rest of the memory, then the disks. Returns when each was taken, from
/// the beginning of `paused`.
async fn take_rest(
    run: &mut Run,
    migration: &mut Migration,
    switched: &Paused,
    paused: &Paused,
) -> Result<(Duration, Duration)> {
    // Again, now that the guest is paused: from here on QEMU opens its disks by their paths.
    reopen::check_paths(&run.inventory.drives)?;
    migration.complete(switched).await.context("taking the rest of the memory")?;
    kill_point::point("stream.completed");
    let completed = paused.elapsed();
    run.pause_disks(paused).await?;
    let captured = paused.elapsed();
    kill_point::point("stream.captured");
    Ok((completed, captured))
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
