//! What can go wrong with a migration of ours.

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::{MigrationStatus, StreamMode};
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
    Busy { status: MigrationStatus },
    #[error(
        "this QEMU {version} has no migration capability `{name}`, which is needed; it is too old"
    )]
    Missing { version: String, name: String },
    #[error("{mode} is not possible with this VM: {why}")]
    Unsupported { mode: StreamMode, why: String },
    #[error("{what} ended as `{status}`: {why}")]
    Failed { what: &'static str, status: MigrationStatus, why: String },
    #[error("{what} is still `{status}` after {after:?}{hint}")]
    Stuck { what: &'static str, status: MigrationStatus, after: Duration, hint: &'static str },
    #[error(
        "the guest writes {written} MiB/s, faster than its memory can be sent ({sent} MiB/s) for a pause within {limit:?}; {advice}"
    )]
    TooFast { written: u64, sent: u64, limit: Duration, advice: &'static str },
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
    #[error("the VM's QEMU has ended while the VM was being moved")]
    SourceEnded,
    #[error(
        "the new QEMU ended while it loaded the VM's state; its own output says why (often a VM that differs from the saved one)"
    )]
    DestinationEnded,
    #[error(
        "the guest was migrated by another client since the move began, perhaps to another host where it runs; \
         `cont` lets it run here again"
    )]
    MigratedSince,
    #[error("QEMU does not wait for a stream: {0}; start it with `-incoming defer`")]
    NotWaiting(QmpError),
    #[error("cannot send the stream to {path}: {source}")]
    Send { path: PathBuf, source: std::io::Error },
    #[error(
        "QEMU could not load the stream: {why}; the VM must have the same devices, in the same places, as the saved one"
    )]
    Load { why: String },
    #[error(
        "cannot write the device state to {path}: {source}; name another directory \
         by --fleecing-dir"
    )]
    State { path: PathBuf, source: std::io::Error },
    #[error("the path {path} is not UTF-8, and QMP can carry no other")]
    Path { path: PathBuf },
}

impl MigrationError {
    /// `gone` in place of a connection that was lost.
    pub(super) fn or_gone(self, gone: Self) -> Self {
        match self {
            Self::Qmp(QmpError::Closed { .. }) => gone,
            other => other,
        }
    }

    /// Whether the same call may work later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Qmp(error)
            | Self::Setup { source: error }
            | Self::Start { source: error, .. } => error.is_retryable(),
            Self::Pause(error) => error.is_retryable(),
            Self::Export(error) => error.is_retryable(),
            Self::Server(error) => error.is_retryable(),
            _ => matches!(
                self,
                Self::Busy { .. }
                    | Self::Failed { .. }
                    | Self::Stuck { .. }
                    | Self::PauseTooLong { .. }
                    | Self::TooFast { .. }
                    | Self::DestinationEnded
            ),
        }
    }
}
