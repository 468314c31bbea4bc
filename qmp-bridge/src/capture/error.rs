//! Errors of the disk capture.

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::jobs::JobError;
use crate::nbd::NbdError;
use crate::qmp::QmpError;

#[derive(Debug, Error)]
pub enum CaptureError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Nbd(#[from] NbdError),
    #[error("cannot make the scratch file {path}: {source}; give a writable scratch directory on a disk with room")]
    Scratch { path: PathBuf, source: std::io::Error },
    #[error("an earlier capture of this machine is still there after {after:?}; settle it or give it back first")]
    Busy { after: Duration },
    #[error("the path {path} is not UTF-8, and QMP can carry no other")]
    Path { path: PathBuf },
    #[error(transparent)]
    Job(#[from] JobError),
    #[error("cannot start the NBD server of QEMU: {source}; if another tool uses it, stop that one (`nbd-server-stop`)")]
    Server { source: QmpError },
    #[error("the copy of disk node `{node}` is broken: {why}; this checkpoint must be given up, the guest is not affected")]
    Broken { node: String, why: String },
    #[error(
        "only {free} bytes are free in the scratch directory {path}, fewer than the wanted {wanted}; give this checkpoint up before the guest's writes fail"
    )]
    ScratchFull { path: PathBuf, free: u64, wanted: u64 },
}

impl CaptureError {
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Qmp(error) | Self::Server { source: error } => error.is_retryable(),
            Self::Nbd(error) => error.is_retryable(),
            Self::Job(error) => error.is_retryable(),
            Self::Busy { .. } | Self::Broken { .. } | Self::ScratchFull { .. } => true,
            Self::Scratch { .. } | Self::Path { .. } => false,
        }
    }
}
