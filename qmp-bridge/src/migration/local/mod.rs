//! Moving a running VM from one QEMU into another on the same host: a live migration over a unix
//! socket whose last step waits for the helper.
//!
//! ```text
//! Found::read                 the source's settings, to restore them later
//! LocalMigration::begin       settings on both sides; memory is sent while the guest runs
//! LocalMigration::switchover  the source has stopped the guest, and waits
//! LocalMigration::complete    rest of memory, devices; both sides report `completed`;
//!                             the source has inactivated its disks
//! -------------------------   here the caller decides which VM continues
//! LocalMigration::resume      the destination activates the disks, and the guest runs there
//! ```
//! Before the decision, at any point, [`resume_source`] lets the source continue; the destination
//! must be dead by then. The destination has `late-block-activate`, so it locks no image and writes
//! to none before it gets `cont`.

mod bitmaps;

use std::path::Path;
use std::time::{Duration, Instant};

use futures::FutureExt;
use serde_json::{Value, json};

pub use bitmaps::BitmapMap;

use super::downtime::DowntimePolicy;
use super::settings::{Found, Settings, Wanted, set_downtime_limit};
use super::status::check_idle;
use super::watch::{IDLE_POLL, News, PAUSED_POLL, Watch, cancel};
use super::{MIGRATION, MigrationError, MigrationStatus, Progress, incoming};
use crate::paused::run_state;
use crate::qmp::{EventWatch, Qmp};

/// A migration that sends nothing for so long is aborted.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// What a source gets to leave a migration that has ended.
const RESUME_TIMEOUT: Duration = Duration::from_secs(60);
/// As fast as it goes; a socket on one host has no neighbours to spare. A number that no other
/// client would choose, and the same in each helper, as the next one has to know it.
const BANDWIDTH: u64 = 1 << 36;

/// No return path: after a migration that failed QEMU 7.2 continues to announce one in each later
/// stream (seen). We ask the destination ourselves whether it has everything.
const SOURCE: [&str; 2] = ["events", "pause-before-switchover"];
const DESTINATION: [&str; 2] = ["events", "late-block-activate"];
const WHAT: &str = "the move";

/// A VM on its way.
#[derive(Debug)]
pub struct LocalMigration {
    source: Qmp,
    destination: Qmp,
    source_watch: Watch,
    destination_watch: Watch,
    suspends: EventWatch,
    stops: EventWatch,
    resumes: EventWatch,
    policy: DowntimePolicy,
    begun: Instant,
    /// The source waited for us; we let it continue; both sides had completed.
    waited: Instant,
    continued: Instant,
    completed: Instant,
}

/// How long the guest stood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Downtime {
    /// From the source's STOP to the destination's RESUME.
    pub seen: Duration,
    /// What the source's QEMU says, which does not know the destination's part.
    pub by_qemu: Option<Duration>,
}

impl LocalMigration {
    /// Sets up both sides and starts the flow. The destination waits with `-incoming defer`, `-S`;
    /// `socket` is its to make.
    ///
    /// # Errors
    /// When one of the two refuses the migration's settings or its start.
    pub async fn begin(
        source: &Qmp,
        destination: &Qmp,
        found: &Found,
        bitmaps: &BitmapMap,
        socket: &Path,
    ) -> Result<Self, MigrationError> {
        let suspends = source.watch(&["SUSPEND"]);
        check_idle(source).await?;
        if run_state(source).await? == "suspended" {
            return Err(suspended());
        }
        let policy = DowntimePolicy::of_move(Instant::now());
        let wanted = Wanted { capabilities: DESTINATION.to_vec(), ..Wanted::default() };
        let wanted = wanted.with_bitmaps(bitmaps.for_destination());
        Found::read(destination).await?.plan(destination, wanted)?.apply(destination).await?;
        let wanted = Wanted::live(&SOURCE, BANDWIDTH, policy.limit_ms());
        found.plan(source, wanted.with_bitmaps(bitmaps.for_source()))?.apply(source).await?;
        let uri = incoming::listen(destination, socket).await?;
        let begun = Instant::now();
        let this = Self {
            source: source.clone(),
            destination: destination.clone(),
            source_watch: Watch::new(source, WHAT, ""),
            destination_watch: Watch::new(destination, WHAT, ""),
            suspends,
            stops: source.watch(&["STOP"]),
            resumes: destination.watch(&["RESUME"]),
            policy,
            begun,
            waited: begun,
            continued: begun,
            completed: begun,
        };
        source.execute_json("migrate", json!({ "uri": uri })).await?;
        Ok(this)
    }

    /// Until the source has stopped the guest and waits. `tell` gets bytes sent and to be sent.
    ///
    /// # Errors
    /// When the migration fails or makes no progress. The VM still runs in the source.
    pub async fn switchover(
        &mut self,
        mut tell: impl FnMut(u64, u64),
    ) -> Result<(), MigrationError> {
        let mut moved = (0, Instant::now());
        loop {
            match self.source_watch.next(IDLE_POLL).await {
                News::Status(MigrationStatus::PreSwitchover) => break,
                News::Stop | News::Resume => {}
                News::Status(_) | News::Look => match self.look(&mut moved, &mut tell).await {
                    Ok(false) => {}
                    Ok(true) => break,
                    Err(error) => return Err(self.why(error).await),
                },
            }
        }
        self.waited = Instant::now();
        // Should the move fail once it has completed, the source aborts when such a guest is to
        // continue there.
        if self.suspends.is_empty() { Ok(()) } else { Err(suspended()) }
    }

    /// Whether the source waits.
    async fn look(
        &mut self,
        moved: &mut (u64, Instant),
        tell: &mut impl FnMut(u64, u64),
    ) -> Result<bool, MigrationError> {
        self.check_destination()?;
        let progress = self.source_watch.look().await?;
        let ram = &progress.ram;
        tell(ram.total.saturating_sub(ram.remaining), ram.total);
        match progress.status {
            MigrationStatus::PreSwitchover => return Ok(true),
            MigrationStatus::None | MigrationStatus::Completed => {
                return Err(self.source_watch.failure(progress));
            }
            _ => {}
        }
        if ram.transferred != moved.0 {
            *moved = (ram.transferred, Instant::now());
        }
        self.source_watch.check_time(&progress, moved.1, STALL_TIMEOUT)?;
        if let Some(limit) = self.policy.judge(&progress, Instant::now())? {
            tracing::info!(
                limit_ms = limit,
                passes = progress.ram.passes,
                "the guest writes fast; it may be stopped for longer"
            );
            set_downtime_limit(&self.source, limit).await?;
        }
        Ok(false)
    }

    /// Whether the destination still reads; asks nothing of it, for it is busy.
    fn check_destination(&self) -> Result<(), MigrationError> {
        match self.destination.closed().now_or_never() {
            Some(()) => Err(MigrationError::DestinationEnded),
            None => Ok(()),
        }
    }

    /// The rest of memory and the devices. Ends when both sides say that they have completed.
    ///
    /// # Errors
    /// When the migration fails. The VM can still be resumed in the source.
    pub async fn complete(&mut self) -> Result<(), MigrationError> {
        self.check_destination()?;
        let state = json!({ "state": "pre-switchover" });
        let continued = self.source.execute_json("migrate-continue", state).await;
        continued.map_err(|error| source_gone(error.into()))?;
        self.continued = Instant::now();
        let both = tokio::try_join!(
            completed(&mut self.source_watch, MigrationError::SourceEnded),
            completed(&mut self.destination_watch, MigrationError::DestinationEnded),
        );
        if let Err(error) = both {
            return Err(self.why(error).await);
        }
        self.completed = Instant::now();
        Ok(())
    }

    /// Lets the destination run: its disks become active, and the guest continues.
    ///
    /// # Errors
    /// When the destination does not run the guest.
    pub async fn resume(&mut self) -> Result<Downtime, MigrationError> {
        let told = Instant::now();
        let cont = self.destination.execute_timed("cont", Value::Null).await;
        let (_, replied) = cont.map_err(|error| {
            MigrationError::from(error).or_gone(MigrationError::DestinationEnded)
        })?;
        let resumed = self.resumes.since(told).first().map_or(replied, |event| event.at);
        let stopped = self.stops.since(self.begun).last().map_or(resumed, |event| event.at);
        Self::trace([stopped, self.waited, self.continued, self.completed, told, resumed]);
        // The source has no guest any more; its figure is a courtesy.
        let by_qemu = Progress::query(&self.source).await.ok().and_then(|said| said.downtime);
        Ok(Downtime {
            seen: resumed.saturating_duration_since(stopped),
            by_qemu: by_qemu.map(Duration::from_millis),
        })
    }

    /// Where the downtime went.
    fn trace(steps: [Instant; 6]) {
        let part = |step: usize| {
            steps[step + 1].saturating_duration_since(steps[step]).as_secs_f64() * 1e3
        };
        tracing::info!(
            stop_ms = part(0),
            look_ms = part(1),
            rest_ms = part(2),
            decision_ms = part(3),
            cont_ms = part(4),
            "switched over"
        );
    }

    /// Why it ended early: a side that is gone, else QEMU's own words, the destination's first.
    async fn why(&self, error: MigrationError) -> MigrationError {
        if !matches!(error, MigrationError::Failed { .. }) {
            return source_gone(error);
        }
        // A QEMU that could not load ends at once, or says why.
        tokio::time::sleep(PAUSED_POLL * 5).await;
        let Ok(destination) = Progress::query(&self.destination).await else {
            return MigrationError::DestinationEnded;
        };
        match Progress::query(&self.source).await {
            Err(error) => source_gone(error.into()),
            Ok(source) => {
                let error_desc = destination.error_desc.or(source.error_desc.clone());
                self.source_watch.failure(Progress { error_desc, ..source })
            }
        }
    }
}

async fn completed(watch: &mut Watch, gone: MigrationError) -> Result<(), MigrationError> {
    let completed = watch.wait_for(MigrationStatus::Completed, PAUSED_POLL, STALL_TIMEOUT).await;
    completed.map_err(|error| error.or_gone(gone))
}

fn suspended() -> MigrationError {
    let why = "the guest is suspended; wake it, then move it".into();
    MigrationError::Failed { what: WHAT, status: MigrationStatus::PreSwitchover, why }
}

fn source_gone(error: MigrationError) -> MigrationError {
    error.or_gone(MigrationError::SourceEnded)
}

/// Lets the source continue, however far it got: ends the migration, makes its disks active again
/// and lets the guest run. The destination must be dead. Repeatable.
///
/// A migration of another client is [`MigrationError::Busy`]. A guest that is stopped after a
/// migration is resumed only if the settings of the move, whose `found` are given, are still there:
/// else its owner has migrated it since, perhaps to another host, where it runs.
///
/// # Errors
/// When the source refuses its settings or does not run again, or another client migrates it.
pub async fn resume_source(source: &Qmp, found: Option<&Found>) -> Result<(), MigrationError> {
    resume(source, found).await.map_err(source_gone)
}

async fn resume(source: &Qmp, found: Option<&Found>) -> Result<(), MigrationError> {
    let settings = found.map(moved);
    let is_ours = match &settings {
        Some(settings) => settings.is_ours(source).await?,
        None => true,
    };
    if !is_ours {
        check_idle(source).await?;
    }
    cancel(source).await?;
    resume_guest(source, is_ours).await?;
    match settings {
        Some(settings) => Ok(settings.put_back(source).await?),
        None => Ok(()),
    }
}

/// What a move has changed in a source that had `found`.
fn moved(found: &Found) -> Settings {
    let first_limit = DowntimePolicy::of_move(Instant::now()).limit_ms();
    let wanted = Wanted::live(&SOURCE, BANDWIDTH, first_limit);
    found.changes(wanted).with_unknown_bitmaps(found)
}

/// QEMU resumes a guest whose migration it cancelled by itself; one whose migration had completed
/// waits for `cont`, which makes its disks active too.
async fn resume_guest(source: &Qmp, is_ours: bool) -> Result<(), MigrationError> {
    let begun = Instant::now();
    let mut watch = Watch::new(source, MIGRATION, "");
    while begun.elapsed() < RESUME_TIMEOUT {
        match run_state(source).await?.as_str() {
            // A guest that failed by itself meanwhile is its owner's affair.
            "running" | "suspended" | "shutdown" | "guest-panicked" | "internal-error"
            | "io-error" => return Ok(()),
            "finish-migrate" => drop(watch.next(PAUSED_POLL).await),
            "postmigrate" if !is_ours => return Err(MigrationError::MigratedSince),
            // Its owner has stopped it.
            _ if !is_ours => return Ok(()),
            _ => drop(source.execute_json("cont", Value::Null).await?),
        }
    }
    let progress = Progress::query(source).await?;
    watch.check_time(&progress, begun, RESUME_TIMEOUT)
}

#[cfg(test)]
mod test;
