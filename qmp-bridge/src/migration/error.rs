//! What can go wrong with a migration of ours.

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::StreamMode;
use crate::jobs::JobError;
use crate::nbd_server::ServerError;
use crate::paused::PauseError;
use crate::qmp::QmpError;

#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum MigrationError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Pause(#[from] PauseError),
    #[error(transparent)]
    Export(#[from] JobError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error("this QEMU is being migrated (its status is `{status}`); wait for its end")]
    Busy { status: String },
    #[error("{mode} is not possible with this VM: {why}")]
    Unsupported { mode: StreamMode, why: String },
    #[error("QEMU's migration stream ended as `{status}`: {why}")]
    Failed { status: String, why: String },
    #[error("QEMU's migration is still `{status}` after {after:?}{hint}")]
    Stuck { status: String, after: Duration, hint: String },
    #[error(
        "the guest writes {written} MiB/s, faster than its memory can be read ({read} MiB/s) for a pause within {limit:?}; \
         allow a longer pause, or try again when it writes less"
    )]
    TooFast { written: u64, read: u64, limit: Duration },
    #[error("cannot set up QEMU for the migration stream: {source}; nothing was left changed")]
    Setup { source: QmpError },
    #[error("QEMU does not begin {mode}: {source}; nothing was left changed")]
    Start { mode: StreamMode, source: QmpError },
    #[error("the guest would have waited too long for QEMU's migration; {hint}")]
    PauseTooLong { hint: &'static str },
    #[error("cannot make a socket pair for the migration stream: {source}")]
    Socket { source: std::io::Error },
    #[error("cannot {what} the migration journal {path}: {source}")]
    Journal { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error(
        "the migration journal {path} cannot be used: {why}; look at `query-migrate-capabilities` and `query-migrate-parameters` \
         of this QEMU, set them by hand if needed, and remove the file"
    )]
    BadJournal { path: PathBuf, why: String },
    #[error("a migration session was used out of order: {0}")]
    Order(&'static str),
    #[error("cannot make the disk nodes of QEMU usable again after the switch-over: {why}")]
    Activate { why: String },
}

impl MigrationError {
    /// Whether the same call may work later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Qmp(error)
            | Self::Setup { source: error }
            | Self::Start { source: error, .. } => error.is_retryable(),
            Self::Pause(error) => error.is_retryable(),
            Self::Export(error) => error.is_retryable(),
            Self::Server(error) => error.is_retryable(),
            Self::Busy { .. }
            | Self::Failed { .. }
            | Self::Stuck { .. }
            | Self::PauseTooLong { .. }
            | Self::TooFast { .. } => true,
            Self::Unsupported { .. }
            | Self::Socket { .. }
            | Self::Journal { .. }
            | Self::BadJournal { .. }
            | Self::Order(_)
            | Self::Activate { .. } => false,
        }
    }
}
