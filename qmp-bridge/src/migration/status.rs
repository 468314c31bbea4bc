//! How far QEMU's migration is: the reply of `query-migrate`.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::MigrationError;
use crate::qmp::{Qmp, QmpError};

/// QEMU's word for how far its migration is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// There was never a migration.
    #[default]
    None,
    /// It has begun and sends nothing yet.
    Setup,
    /// Memory is sent.
    Active,
    /// The guest is stopped, and QEMU waits for `migrate-continue`.
    PreSwitchover,
    /// The rest of memory and the devices are sent.
    Device,
    /// All was sent, or loaded.
    Completed,
    /// It ended with an error.
    Failed,
    /// It is being cancelled.
    Cancelling,
    /// It ended by `migrate_cancel`.
    Cancelled,
    /// A word on which nothing here depends: those of post-copy and COLO, and of later QEMUs.
    #[serde(untagged)]
    Unknown(String),
}

impl MigrationStatus {
    /// Whether a migration is under way, so that no client can start another or change
    /// capabilities.
    ///
    /// The statuses without one are listed, which are the same four in QEMU 7.2 and 10.0, since
    /// each newer QEMU has more in which there is one: `postcopy-recover-setup` since 9.1,
    /// `postcopy-device` since 10.2. With COLO there is one too, though QEMU's own list of them has
    /// it only since 9.2.
    pub(super) fn is_running(&self) -> bool {
        !matches!(self, Self::None | Self::Completed | Self::Failed | Self::Cancelled)
    }
}

impl fmt::Display for MigrationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// The reply of `query-migrate`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Progress {
    /// How far it is. QEMU leaves it out before its first migration.
    #[serde(default)]
    pub status: MigrationStatus,
    /// QEMU's reason of a failure.
    pub error_desc: Option<String>,
    /// Memory; all 0 unless QEMU has sent some.
    #[serde(default)]
    pub ram: RamProgress,
    /// Why QEMU cannot be migrated at all.
    #[serde(default)]
    pub blocked_reasons: Vec<String>,
    /// For how long the source believes that the guest was stopped, in milliseconds.
    pub downtime: Option<u64>,
}

/// What was sent of memory.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RamProgress {
    /// Bytes of memory still to be sent, of `total`.
    pub remaining: u64,
    /// Bytes of memory in all.
    pub total: u64,
    /// Bytes sent, with repetitions.
    pub transferred: u64,
    /// Passes over memory.
    #[serde(rename = "dirty-sync-count")]
    pub passes: u64,
    /// Pages sent.
    normal: u64,
    /// Pages of zeros sent.
    duplicate: u64,
    /// Pages per second that the guest writes, by QEMU's estimate.
    dirty_pages_rate: u64,
    /// Bytes.
    page_size: u64,
    /// Megabits per second that QEMU sends.
    mbps: f64,
}

impl RamProgress {
    #[cfg(test)]
    pub(super) fn at_rates(passes: u64, written: u64, mbps: f64) -> Self {
        Self { passes, dirty_pages_rate: written, page_size: 1, mbps, ..Self::default() }
    }

    /// Pages sent, zero ones included.
    pub(super) fn pages(&self) -> u64 {
        self.normal.saturating_add(self.duplicate)
    }

    /// Bytes per second that the guest writes.
    pub fn written_rate(&self) -> u64 {
        self.dirty_pages_rate.saturating_mul(self.page_size)
    }

    /// Bytes per second that QEMU sends.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "absurd values become the nearest that fits"
    )]
    pub fn sent_rate(&self) -> u64 {
        (self.mbps * 1e6 / 8.0) as u64
    }
}

impl Progress {
    /// Asks QEMU.
    ///
    /// # Errors
    /// When QEMU does not answer, or in an unknown form.
    pub async fn query(qmp: &Qmp) -> Result<Self, QmpError> {
        qmp.query("query-migrate", Value::Null).await
    }
}

/// Fails if a migration is under way. Returns what QEMU says of its last one.
///
/// # Errors
/// When a migration is under way, or QEMU does not answer.
pub async fn check_idle(qmp: &Qmp) -> Result<Progress, MigrationError> {
    let progress = Progress::query(qmp).await?;
    if progress.status.is_running() {
        return Err(MigrationError::Busy { status: progress.status });
    }
    Ok(progress)
}

#[cfg(test)]
mod test {
    use serde_json::json;

    use super::*;

    #[test]
    fn progress_is_read_from_what_qemu_says() {
        let ram = json!({
            "remaining": 5, "total": 10, "transferred": 3, "dirty-sync-count": 2, "mbps": 8.0,
            "dirty-pages-rate": 10, "page-size": 4096, "normal": 1, "duplicate": 2,
        });
        let reply = json!({ "status": "active", "ram": ram, "downtime": 4, "total-time": 1 });
        let progress: Progress = serde_json::from_value(reply.clone()).expect("a reply");
        assert!(progress.status.is_running());
        let ram = &progress.ram;
        assert_eq!((ram.remaining, ram.total, ram.transferred, ram.passes), (5, 10, 3, 2));
        assert_eq!((ram.written_rate(), ram.sent_rate(), ram.pages()), (40960, 1_000_000, 3));
        assert_eq!(progress.downtime, Some(4));
        let never: Progress = serde_json::from_value(json!({})).expect("no migration yet");
        assert!(!never.status.is_running());
        let mut partial = reply;
        partial["ram"].as_object_mut().expect("an object").remove("total");
        assert!(serde_json::from_value::<Progress>(partial).is_err());
    }

    #[test]
    fn status_keeps_the_word_of_qemu() {
        let words = ["none", "setup", "active", "pre-switchover", "device", "completed", "failed"];
        let more = ["cancelling", "cancelled", "colo", "postcopy-recover-setup", "of-the-future"];
        let idle = ["none", "completed", "failed", "cancelled"];
        for word in words.into_iter().chain(more) {
            let status: MigrationStatus = serde_json::from_value(json!(word)).expect(word);
            assert_eq!(status.to_string(), word);
            assert_eq!(status.is_running(), !idle.contains(&word), "{word}");
            let is_unknown = matches!(status, MigrationStatus::Unknown(_));
            assert_eq!(is_unknown, more[2..].contains(&word), "{word}");
        }
    }
}
