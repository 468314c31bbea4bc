//! How far QEMU's migration is: `query-migrate`, and the events that say when to ask.

use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};

use super::MigrationError;
use crate::qmp::{Qmp, QmpError, QmpEvent};

/// The event that tells each change of status, if the capability `events` is on.
const MIGRATION_EVENT: &str = "MIGRATION";

/// What `query-migrate` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// `none` if there was never a migration.
    pub status: String,
    /// QEMU's reason of a failure.
    pub error: Option<String>,
    /// Bytes of memory still to be sent, of `total`.
    pub remaining: u64,
    /// Bytes of memory in all.
    pub total: u64,
    /// Pages sent, zero ones included.
    pub pages: u64,
    /// How often memory was looked through.
    pub passes: u64,
    /// What the guest writes, in bytes per second, by QEMU's estimate.
    pub written_rate: u64,
    /// What QEMU sends, in bytes per second.
    pub sent_rate: u64,
    /// Why QEMU cannot be migrated at all.
    pub blocked: Vec<String>,
}

impl Progress {
    pub(super) async fn query(qmp: &Qmp) -> Result<Self, QmpError> {
        Ok(Self::parse(&qmp.execute_json("query-migrate", Value::Null).await?))
    }

    pub(super) fn parse(reply: &Value) -> Self {
        let ram = &reply["ram"];
        let number = |field: &str| ram[field].as_u64().unwrap_or(0);
        let blocked = reply["blocked-reasons"].as_array().into_iter().flatten();
        // QEMU counts megabits.
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "absurd values become the nearest that fits"
        )]
        let sent_rate = (ram["mbps"].as_f64().unwrap_or(0.0) * 1e6 / 8.0) as u64;
        Self {
            status: reply["status"].as_str().unwrap_or("none").into(),
            error: reply["error-desc"].as_str().map(Into::into),
            remaining: number("remaining"),
            total: number("total"),
            pages: number("normal").saturating_add(number("duplicate")),
            passes: number("dirty-sync-count"),
            written_rate: number("dirty-pages-rate").saturating_mul(number("page-size").max(4096)),
            sent_rate,
            blocked: blocked.filter_map(|reason| reason.as_str().map(Into::into)).collect(),
        }
    }

    /// Whether QEMU is migrating, so that no client can start another migration or change
    /// capabilities.
    pub(super) fn is_running(&self) -> bool {
        !matches!(self.status.as_str(), "none" | "completed" | "failed" | "cancelled")
    }

    pub(super) fn is_over(&self) -> bool {
        !self.is_running()
    }

    /// An error unless the migration runs or has completed.
    pub(super) fn check(&self) -> Result<(), MigrationError> {
        match self.status.as_str() {
            "failed" | "cancelled" | "cancelling" | "none" => Err(self.failure()),
            _ => Ok(()),
        }
    }

    pub(super) fn failure(&self) -> MigrationError {
        let why = self.error.clone().unwrap_or_else(|| match self.status.as_str() {
            "cancelled" | "cancelling" => "another client cancelled it".into(),
            _ => "QEMU gives no reason; its log may".into(),
        });
        MigrationError::Failed { status: self.status.clone(), why }
    }
}

/// Something that may have changed.
#[derive(Debug)]
pub(super) enum Hint {
    /// The migration has this status, says an event.
    Status(String),
    Stop(Instant),
    Resume,
    /// Time to look.
    Look,
}

/// QEMU's events, with a look at intervals, since a busy listener may lose some.
#[derive(Debug)]
pub(super) struct Hints {
    events: broadcast::Receiver<QmpEvent>,
}

impl Hints {
    pub(super) fn new(qmp: &Qmp) -> Self {
        Self { events: qmp.events() }
    }

    /// The next event that matters, or `Look` after `interval`.
    pub(super) async fn next(&mut self, interval: Duration) -> Hint {
        let deadline = tokio::time::Instant::now() + interval;
        loop {
            let event = match tokio::time::timeout_at(deadline, self.events.recv()).await {
                Err(_) | Ok(Err(RecvError::Lagged(_))) => return Hint::Look,
                Ok(Err(RecvError::Closed)) => {
                    tokio::time::sleep_until(deadline).await;
                    return Hint::Look;
                }
                Ok(Ok(event)) => event,
            };
            if let Some(hint) = understand(event) {
                return hint;
            }
        }
    }

    /// What has come already, without waiting.
    pub(super) fn queued(&mut self) -> impl Iterator<Item = Hint> {
        std::iter::from_fn(|| {
            loop {
                match self.events.try_recv() {
                    Ok(event) => return Some(understand(event)),
                    Err(TryRecvError::Lagged(_)) => {}
                    Err(TryRecvError::Empty | TryRecvError::Closed) => return None,
                }
            }
        })
        .flatten()
    }
}

fn understand(event: QmpEvent) -> Option<Hint> {
    match event.name.as_str() {
        MIGRATION_EVENT => {
            Some(Hint::Status(event.data["status"].as_str().unwrap_or_default().into()))
        }
        "STOP" => Some(Hint::Stop(event.at)),
        "RESUME" => Some(Hint::Resume),
        _ => None,
    }
}

/// Waits, looking at `interval`, until no migration runs any more.
pub(super) async fn wait_until_over(
    qmp: &Qmp,
    interval: Duration,
    timeout: Duration,
) -> Result<Progress, MigrationError> {
    let start = Instant::now();
    let mut hints = Hints::new(qmp);
    loop {
        let progress = Progress::query(qmp).await?;
        if progress.is_over() {
            return Ok(progress);
        }
        if start.elapsed() > timeout {
            return Err(MigrationError::Stuck {
                status: progress.status,
                after: timeout,
                hint: String::new(),
            });
        }
        hints.next(interval).await;
    }
}
