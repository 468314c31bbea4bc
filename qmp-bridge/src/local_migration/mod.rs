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
mod error;
mod policy;
mod settings;
mod watch;

use std::path::Path;
use std::time::{Duration, Instant};

use futures::FutureExt;
use serde_json::{Value, json};

pub use bitmaps::BitmapMap;
pub use error::LocalMigrationError;
pub use settings::Found;
pub use watch::State;

use crate::paused::run_state;
use crate::qmp::{EventWatch, Qmp, QmpError};
use crate::quirks;
use policy::Policy;
use watch::{Events, Happened};

/// Between two looks while memory flows, for progress and the policy of the pause; nothing waits
/// for it.
const LOOK: Duration = Duration::from_millis(50);
/// Between two looks when the guest is stopped, should an event be lost.
const PAUSED_LOOK: Duration = Duration::from_millis(5);
/// A migration that sends nothing for so long is aborted.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// What a cancelled migration gets to end.
const CANCEL: Duration = Duration::from_secs(60);

/// A VM on its way.
#[derive(Debug)]
pub struct LocalMigration {
    source: Qmp,
    destination: Qmp,
    source_events: Events,
    destination_events: Events,
    suspends: EventWatch,
    policy: Policy,
    stopped: Option<Instant>,
    /// The source waited for us; we let it continue; both sides had completed.
    waited: Option<Instant>,
    continued: Option<Instant>,
    completed: Option<Instant>,
}

/// How long the guest stood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Downtime {
    /// From the source's STOP to the destination's RESUME.
    pub seen: Duration,
    /// What the source's QEMU says, which does not know the destination's part.
    pub by_qemu: Option<Duration>,
}

/// Fails if a migration is under way already.
///
/// # Errors
/// When a migration is under way, or QEMU does not answer.
pub async fn check_idle(source: &Qmp) -> Result<(), LocalMigrationError> {
    let state = State::query(source).await?;
    if state.is_under_way() {
        Err(LocalMigrationError::Busy { status: state.status })
    } else {
        Ok(())
    }
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
    ) -> Result<Self, LocalMigrationError> {
        let suspends = source.watch(&["SUSPEND"]);
        check_idle(source).await?;
        if run_state(source).await? == "suspended" {
            return Err(suspended());
        }
        let policy = Policy::default();
        settings::apply_to_destination(destination, bitmaps).await?;
        settings::apply_to_source(source, found, bitmaps, policy.limit_ms()).await?;
        let uri = format!("unix:{}", socket.display());
        let mut listen = json!({ "uri": uri });
        if destination.version().has(quirks::REPORTS_FAILED_LOAD) {
            listen["exit-on-error"] = Value::Bool(false);
        }
        destination.execute_json("migrate-incoming", listen).await?;
        let (source_events, destination_events) = (Events::new(source), Events::new(destination));
        source.execute_json("migrate", json!({ "uri": uri })).await?;
        Ok(Self {
            source: source.clone(),
            destination: destination.clone(),
            source_events,
            destination_events,
            suspends,
            policy,
            stopped: None,
            waited: None,
            continued: None,
            completed: None,
        })
    }

    /// Until the source has stopped the guest and waits. `tell` gets bytes sent and to be sent.
    ///
    /// # Errors
    /// When the migration fails or makes no progress. The VM still runs in the source.
    pub async fn switchover(
        &mut self,
        mut tell: impl FnMut(u64, u64),
    ) -> Result<(), LocalMigrationError> {
        let mut moved = (0, Instant::now());
        while self.waited.is_none() {
            match self.source_events.next(LOOK).await {
                Happened::Status(status) => self.heard(&status).await?,
                Happened::Stop(at) => self.stopped = Some(at),
                Happened::Resume(_) => {}
                Happened::Nothing => {
                    if self.look(&mut moved, &mut tell).await? {
                        self.waited = Some(Instant::now());
                    }
                }
            }
        }
        // Should the move fail once it has completed, the source aborts when such a guest is to
        // continue there.
        if self.suspends.is_empty() { Ok(()) } else { Err(suspended()) }
    }

    async fn heard(&mut self, status: &str) -> Result<(), LocalMigrationError> {
        match status {
            "pre-switchover" => self.waited = Some(Instant::now()),
            "failed" | "completed" | "cancelled" => return Err(self.why().await),
            _ => {}
        }
        Ok(())
    }

    async fn look(
        &mut self,
        moved: &mut (u64, Instant),
        tell: &mut impl FnMut(u64, u64),
    ) -> Result<bool, LocalMigrationError> {
        self.check_destination()?;
        let state = State::query(&self.source).await.map_err(source_gone)?;
        tell(state.total.saturating_sub(state.remaining), state.total);
        if state.status == "pre-switchover" {
            return Ok(true);
        }
        if !state.is_under_way() {
            return Err(self.why().await);
        }
        if state.sent != moved.0 {
            *moved = (state.sent, Instant::now());
        } else if moved.1.elapsed() > STALL_TIMEOUT {
            return Err(LocalMigrationError::Stuck { status: state.status, after: STALL_TIMEOUT });
        }
        if let Some(limit) = self.policy.judge(&state)? {
            tracing::info!(
                limit_ms = limit,
                passes = state.passes,
                "the guest writes fast; it may be stopped for longer"
            );
            settings::set_downtime_limit(&self.source, limit).await.map_err(source_gone)?;
        }
        Ok(false)
    }

    /// Whether the destination still reads; asks nothing of it, for it is busy.
    fn check_destination(&self) -> Result<(), LocalMigrationError> {
        match self.destination.closed().now_or_never() {
            Some(()) => Err(LocalMigrationError::DestinationEnded),
            None => Ok(()),
        }
    }

    /// The rest of memory and the devices. Ends when both sides say that they have completed.
    ///
    /// # Errors
    /// When the migration fails. The VM can still be resumed in the source.
    pub async fn complete(&mut self) -> Result<(), LocalMigrationError> {
        self.check_destination()?;
        let state = json!({ "state": "pre-switchover" });
        self.source.execute_json("migrate-continue", state).await.map_err(source_gone)?;
        let begun = Instant::now();
        self.continued = Some(begun);
        let (mut source_completed, mut destination_completed) = (false, false);
        while !(source_completed && destination_completed) {
            let (happened, is_source) = tokio::select! {
                happened = self.source_events.next(PAUSED_LOOK), if !source_completed => (happened, true),
                happened = self.destination_events.next(PAUSED_LOOK), if !destination_completed => (happened, false),
            };
            let completed =
                if is_source { &mut source_completed } else { &mut destination_completed };
            match happened {
                Happened::Status(status) if status == "completed" => *completed = true,
                Happened::Status(status) if matches!(status.as_str(), "failed" | "cancelled") => {
                    return Err(self.why().await);
                }
                Happened::Stop(at) if is_source => self.stopped = self.stopped.or(Some(at)),
                Happened::Nothing if begun.elapsed() > STALL_TIMEOUT => {
                    return Err(LocalMigrationError::Stuck {
                        status: "device".into(),
                        after: STALL_TIMEOUT,
                    });
                }
                Happened::Nothing => {
                    let qmp = if is_source { &self.source } else { &self.destination };
                    let gone = if is_source { source_gone } else { destination_gone };
                    let state = State::query(qmp).await.map_err(gone)?;
                    match state.status.as_str() {
                        "completed" => *completed = true,
                        "failed" | "cancelled" => return Err(self.why().await),
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        self.completed = Some(Instant::now());
        Ok(())
    }

    /// Lets the destination run: its disks become active, and the guest continues.
    ///
    /// # Errors
    /// When the destination does not run the guest.
    pub async fn resume(&mut self) -> Result<Downtime, LocalMigrationError> {
        let told = Instant::now();
        self.destination.execute_json("cont", Value::Null).await.map_err(destination_gone)?;
        let replied = Instant::now();
        let mut resumed = None;
        while resumed.is_none() && replied.elapsed() < PAUSED_LOOK {
            match self.destination_events.next(PAUSED_LOOK).await {
                Happened::Resume(at) => resumed = Some(at),
                Happened::Nothing => break,
                _ => {}
            }
        }
        let resumed = resumed.unwrap_or(replied);
        let seen = self.stopped.map(|stopped| resumed.duration_since(stopped)).unwrap_or_default();
        self.trace(told, resumed);
        // The source has no guest any more; its figure is a courtesy.
        let by_qemu = State::query(&self.source).await.ok().and_then(|state| state.downtime);
        Ok(Downtime { seen, by_qemu })
    }

    /// Where the downtime went.
    fn trace(&self, told: Instant, resumed: Instant) {
        let between = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from).as_secs_f64() * 1e3,
            _ => 0.0,
        };
        tracing::info!(
            stop_ms = between(self.stopped, self.waited),
            look_ms = between(self.waited, self.continued),
            rest_ms = between(self.continued, self.completed),
            decision_ms = between(self.completed, Some(told)),
            cont_ms = between(Some(told), Some(resumed)),
            "switched over"
        );
    }

    /// Why it ended early: a side that is gone, else QEMU's own words.
    async fn why(&self) -> LocalMigrationError {
        // A QEMU that could not load ends at once, or says why.
        tokio::time::sleep(PAUSED_LOOK).await;
        let said = match State::query(&self.destination).await {
            Err(_) => return LocalMigrationError::DestinationEnded,
            Ok(state) => state.why,
        };
        match State::query(&self.source).await {
            Err(error) => source_gone(error),
            Ok(state) => {
                let why = said
                    .or(state.why)
                    .unwrap_or_else(|| "QEMU gives no reason; its log may".into());
                LocalMigrationError::Failed { status: state.status, why }
            }
        }
    }
}

fn suspended() -> LocalMigrationError {
    LocalMigrationError::Failed {
        status: "pre-switchover".into(),
        why: "the guest is suspended; wake it, then move it".into(),
    }
}

fn source_gone(error: QmpError) -> LocalMigrationError {
    match error {
        QmpError::Closed { .. } => LocalMigrationError::SourceEnded,
        other => LocalMigrationError::Qmp(other),
    }
}

fn destination_gone(error: QmpError) -> LocalMigrationError {
    match error {
        QmpError::Closed { .. } => LocalMigrationError::DestinationEnded,
        other => LocalMigrationError::Qmp(other),
    }
}

/// Lets the source continue, however far it got: ends the migration, makes its disks active again
/// and lets the guest run. The destination must be dead. Repeatable.
///
/// # Errors
/// When the source refuses its settings or does not run again.
pub async fn resume_source(source: &Qmp, found: Option<&Found>) -> Result<(), LocalMigrationError> {
    let begun = Instant::now();
    loop {
        let state = State::query(source).await.map_err(source_gone)?;
        if !state.is_under_way() {
            break;
        }
        if begun.elapsed() > CANCEL {
            return Err(LocalMigrationError::Stuck { status: state.status, after: CANCEL });
        }
        if state.status != "cancelling" {
            source.execute_json("migrate_cancel", Value::Null).await.map_err(source_gone)?;
        }
        tokio::time::sleep(PAUSED_LOOK).await;
    }
    resume_guest(source, begun).await?;
    match found {
        Some(found) => Ok(found.put_back(source).await.map_err(source_gone)?),
        None => Ok(()),
    }
}

/// QEMU resumes a guest whose migration it cancelled by itself; one whose migration had completed
/// waits for `cont`, which makes its disks active too.
async fn resume_guest(source: &Qmp, begun: Instant) -> Result<(), LocalMigrationError> {
    loop {
        match run_state(source).await.map_err(source_gone)?.as_str() {
            // A guest that failed by itself meanwhile is its owner's affair.
            "running" | "suspended" | "shutdown" | "guest-panicked" | "internal-error"
            | "io-error" => return Ok(()),
            "finish-migrate" if begun.elapsed() < CANCEL => tokio::time::sleep(PAUSED_LOOK).await,
            _ => {
                source.execute_json("cont", Value::Null).await.map_err(source_gone)?;
            }
        }
        if begun.elapsed() > CANCEL {
            return Err(LocalMigrationError::Stuck { status: "paused".into(), after: CANCEL });
        }
    }
}

#[cfg(test)]
mod test;
