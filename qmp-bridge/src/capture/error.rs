//! Errors of the disk capture.

use std::path::PathBuf;
use std::time::Duration;

use checkpoint_format::OtherCheckpoint;
use thiserror::Error;

use crate::jobs::JobError;
use crate::nbd::NbdError;
use crate::nbd_server::ServerError;
use crate::qmp::QmpError;

#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum CaptureError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Nbd(#[from] NbdError),
    #[error(
        "cannot use the directory {path} for fleecing overlays: {source}; name a writable one on a disk with room"
    )]
    Fleecing { path: PathBuf, source: std::io::Error },
    #[error(
        "an earlier capture of this VM is still there after {after:?}; acknowledge it or give it back first"
    )]
    Busy { after: Duration },
    #[error("the path {path} is not UTF-8, and QMP can carry no other")]
    Path { path: PathBuf },
    #[error(transparent)]
    Job(#[from] JobError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(
        "the copy of disk node `{node}` is broken: {why}; this checkpoint must be given up, the guest is not affected"
    )]
    Broken { node: String, why: String },
    #[error(
        "disk node `{node}` took longer than {after:?} to flush, and the guest would have to wait for that; try again when its storage is less busy"
    )]
    SlowFlush { node: String, after: Duration },
    #[error(
        "the directory {path} of the fleecing overlays does not answer (for {after:?}); bring its file system back, then try again"
    )]
    Hung { path: PathBuf, after: Duration },
    #[error(
        "only {free} bytes are free in the directory {path} of the fleecing overlays, fewer than the wanted {wanted}; make room there"
    )]
    FleecingFull { path: PathBuf, free: u64, wanted: u64 },
    #[error(
        "blocks of disk {device} are still arriving from the store, and what the guest has written \
         to it since the last checkpoint is not known; wait until all are here"
    )]
    Arriving { device: String },
    #[error(
        "what was written to disk node `{node}` since the last checkpoint is not known; \
         take a checkpoint first"
    )]
    Unrecorded { node: String },
    #[error(
        "disk node `{node}` has no device of its own, or another client writes to it, so it \
         cannot be written in place"
    )]
    NotAlone { node: String },
    #[error(transparent)]
    OtherCheckpoint(#[from] OtherCheckpoint),
}

impl CaptureError {
    /// Whether the same call may work later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Qmp(error) => error.is_retryable(),
            Self::Server(error) => error.is_retryable(),
            Self::Nbd(error) => error.is_retryable(),
            Self::Job(error) => error.is_retryable(),
            Self::Busy { .. }
            | Self::Broken { .. }
            | Self::FleecingFull { .. }
            | Self::SlowFlush { .. }
            | Self::Arriving { .. }
            | Self::Hung { .. } => true,
            Self::Fleecing { .. }
            | Self::Path { .. }
            | Self::Unrecorded { .. }
            | Self::NotAlone { .. }
            | Self::OtherCheckpoint(_) => false,
        }
    }
}
