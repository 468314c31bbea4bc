//! How far a migration is on one side: QEMU's events, and a look at intervals, since a busy
//! listener may lose some.

use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::qmp::{Qmp, QmpError, QmpEvent};

/// Statuses in which a migration is under way.
const UNDER_WAY: [&str; 10] = [
    "setup",
    "active",
    "pre-switchover",
    "pre-switchover-resumed",
    "device",
    "postcopy-active",
    "postcopy-device",
    "postcopy-paused",
    "cancelling",
    "wait-unplug",
];

/// What `query-migrate` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// `none` if there was never a migration.
    pub status: String,
    /// QEMU's reason of a failure.
    pub why: Option<String>,
    /// Bytes of memory still to be sent.
    pub remaining: u64,
    /// Bytes of memory in all.
    pub total: u64,
    /// Bytes sent, with repetitions.
    pub sent: u64,
    /// How often memory was looked through.
    pub passes: u64,
    /// Bytes per second.
    pub written_rate: u64,
    /// Bytes per second.
    pub moved_rate: u64,
    /// QEMU's own figure for how long the guest stood, once it is over.
    pub downtime: Option<Duration>,
}

impl State {
    /// The state of QEMU's migration now.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn query(qmp: &Qmp) -> Result<Self, QmpError> {
        Ok(Self::parse(&qmp.execute_json("query-migrate", Value::Null).await?))
    }

    pub(super) fn parse(reply: &Value) -> Self {
        let ram = &reply["ram"];
        let number = |name: &str| ram[name].as_u64().unwrap_or(0);
        let page = number("page-size").max(4096);
        // Megabits per second.
        let rate = ram["mbps"].as_f64().unwrap_or(0.0) * 1e6 / 8.0;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "absurd values become the nearest that fits"
        )]
        let moved_rate = rate as u64;
        Self {
            status: reply["status"].as_str().unwrap_or("none").to_owned(),
            why: reply["error-desc"].as_str().map(str::to_owned),
            remaining: number("remaining"),
            total: number("total"),
            sent: number("transferred"),
            passes: number("dirty-sync-count"),
            written_rate: number("dirty-pages-rate").saturating_mul(page),
            moved_rate,
            downtime: reply["downtime"].as_u64().map(Duration::from_millis),
        }
    }

    /// Whether the migration runs.
    pub fn is_under_way(&self) -> bool {
        UNDER_WAY.contains(&self.status.as_str())
    }
}

/// What happened on one side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Happened {
    Status(String),
    Stop(Instant),
    Resume(Instant),
    /// Nothing was heard for a while, or something was missed: time to look.
    Nothing,
}

#[derive(Debug)]
pub(super) struct Events(broadcast::Receiver<QmpEvent>);

impl Events {
    pub(super) fn new(qmp: &Qmp) -> Self {
        Self(qmp.events())
    }

    pub(super) async fn next(&mut self, timeout: Duration) -> Happened {
        let deadline = tokio::time::Instant::now() + timeout;
        loop {
            let event = match tokio::time::timeout_at(deadline, self.0.recv()).await {
                Ok(Ok(event)) => event,
                Ok(Err(RecvError::Closed)) => {
                    tokio::time::sleep_until(deadline).await;
                    return Happened::Nothing;
                }
                Err(_) | Ok(Err(RecvError::Lagged(_))) => return Happened::Nothing,
            };
            match event.name.as_str() {
                "MIGRATION" => {
                    return Happened::Status(
                        event.data["status"].as_str().unwrap_or_default().to_owned(),
                    );
                }
                "STOP" => return Happened::Stop(event.at),
                "RESUME" => return Happened::Resume(event.at),
                _ => {}
            }
        }
    }
}
