//! What can go wrong while a VM moves from one QEMU into another.

use std::time::Duration;

use thiserror::Error;

use crate::qmp::QmpError;

#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum LocalMigrationError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(
        "this QEMU {version} has no migration capability `{name}`, which the move needs; it is too old"
    )]
    Missing { version: String, name: &'static str },
    #[error("this QEMU is being migrated (its status is `{status}`); wait for its end")]
    Busy { status: String },
    #[error("the VM's QEMU has ended while the VM was being moved")]
    SourceEnded,
    #[error("the new QEMU has ended while it took the VM; its log says why")]
    DestinationEnded,
    #[error("the move ended as `{status}`: {why}")]
    Failed { status: String, why: String },
    #[error(
        "the guest writes {written} MiB/s, faster than its memory can be moved ({moved} MiB/s) for a pause within {limit:?}; \
         try again when it writes less"
    )]
    TooFast { written: u64, moved: u64, limit: Duration },
    #[error("the move is stopped at `{status}` for {after:?}")]
    Stuck { status: String, after: Duration },
}

impl LocalMigrationError {
    /// Whether the same call may work later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Qmp(error) => error.is_retryable(),
            Self::Missing { .. } | Self::SourceEnded => false,
            Self::Busy { .. }
            | Self::DestinationEnded
            | Self::Failed { .. }
            | Self::TooFast { .. }
            | Self::Stuck { .. } => true,
        }
    }
}
