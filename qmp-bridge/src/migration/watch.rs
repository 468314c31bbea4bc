//! Waiting for a migration: QEMU's events, and `query-migrate` when none comes, since a busy
//! listener may lose some.

use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use super::status::{MigrationStatus, Progress};
use super::{MIGRATION, MigrationError};
use crate::qmp::{Qmp, QmpEvent};

/// Between two queries while the guest runs: for progress and the downtime policy alone, since the
/// event of a new status ends the wait.
pub(super) const IDLE_POLL: Duration = Duration::from_millis(50);
/// While it waits.
pub(super) const PAUSED_POLL: Duration = Duration::from_millis(1);
/// How long a cancelled migration may take to be over.
pub(super) const CANCEL_TIMEOUT: Duration = Duration::from_secs(60);

/// Something that may have changed.
#[derive(Debug)]
pub(super) enum News {
    /// The migration has this status, says an event.
    Status(MigrationStatus),
    Stop,
    Resume,
    /// Nothing was heard for a while, or something was missed.
    Look,
}

/// What QEMU says about its migration from now on.
#[derive(Debug)]
pub(super) struct Watch {
    qmp: Qmp,
    events: broadcast::Receiver<QmpEvent>,
    /// What migrates, and what to look at when it does not come to an end, for messages.
    what: &'static str,
    hint: &'static str,
}

impl Watch {
    pub(super) fn new(qmp: &Qmp, what: &'static str, hint: &'static str) -> Self {
        Self { qmp: qmp.clone(), events: qmp.events(), what, hint }
    }

    /// The next event that matters, or `Look` after `interval`.
    pub(super) async fn next(&mut self, interval: Duration) -> News {
        let deadline = tokio::time::Instant::now() + interval;
        loop {
            let event = match tokio::time::timeout_at(deadline, self.events.recv()).await {
                Err(_) | Ok(Err(RecvError::Lagged(_))) => return News::Look,
                Ok(Err(RecvError::Closed)) => {
                    tokio::time::sleep_until(deadline).await;
                    return News::Look;
                }
                Ok(Ok(event)) => event,
            };
            match event.name.as_str() {
                "MIGRATION" => {
                    let status = serde_json::from_value(event.data["status"].clone());
                    return status.map_or(News::Look, News::Status);
                }
                "STOP" => return News::Stop,
                "RESUME" => return News::Resume,
                _ => {}
            }
        }
    }

    /// Waits until the migration has the status `wanted`, with a query each `interval`.
    pub(super) async fn wait_for(
        &mut self,
        wanted: MigrationStatus,
        interval: Duration,
        timeout: Duration,
    ) -> Result<(), MigrationError> {
        let begun = Instant::now();
        loop {
            // An event is believed: QEMU sends it after the status has changed.
            if matches!(self.next(interval).await, News::Status(status) if status == wanted) {
                return Ok(());
            }
            let progress = self.look().await?;
            if progress.status == wanted {
                return Ok(());
            }
            self.check_time(&progress, begun, timeout)?;
        }
    }

    /// Queries the migration. Fails if that has failed or was cancelled.
    ///
    /// `none` is no failure: QEMU 7.2 says so of one that loads until its first byte has come.
    pub(super) async fn look(&self) -> Result<Progress, MigrationError> {
        let progress = Progress::query(&self.qmp).await?;
        match progress.status {
            MigrationStatus::Failed | MigrationStatus::Cancelling | MigrationStatus::Cancelled => {
                Err(self.failure(progress))
            }
            _ => Ok(progress),
        }
    }

    pub(super) fn failure(&self, progress: Progress) -> MigrationError {
        let why = progress.error_desc.unwrap_or_else(|| match progress.status {
            MigrationStatus::Cancelling | MigrationStatus::Cancelled => {
                "another client cancelled it".into()
            }
            _ => "QEMU gives no reason; its log may".into(),
        });
        MigrationError::Failed { what: self.what, status: progress.status, why }
    }

    pub(super) fn check_time(
        &self,
        progress: &Progress,
        begun: Instant,
        timeout: Duration,
    ) -> Result<(), MigrationError> {
        if begun.elapsed() <= timeout {
            return Ok(());
        }
        let (what, status, hint) = (self.what, progress.status.clone(), self.hint);
        Err(MigrationError::Stuck { what, status, after: timeout, hint })
    }
}

/// Ends a migration that is under way, and waits until QEMU has ended it.
pub(super) async fn cancel(qmp: &Qmp) -> Result<(), MigrationError> {
    let begun = Instant::now();
    let mut watch = Watch::new(qmp, MIGRATION, "");
    loop {
        let progress = Progress::query(qmp).await?;
        if !progress.status.is_running() {
            return Ok(());
        }
        watch.check_time(&progress, begun, CANCEL_TIMEOUT)?;
        if progress.status != MigrationStatus::Cancelling {
            qmp.execute_json("migrate_cancel", Value::Null).await?;
        }
        watch.next(PAUSED_POLL).await;
    }
}
