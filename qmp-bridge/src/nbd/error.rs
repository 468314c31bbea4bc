//! What can go wrong on an NBD connection.

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

#[derive(Debug, Clone, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum NbdError {
    #[error("cannot connect to the NBD socket {path}: {why}")]
    Connect { path: PathBuf, why: String },
    #[error("the NBD server refused {what}: {why}")]
    Refused { what: String, why: String },
    #[error(
        "the NBD export `{export}` has no meta context `{context}`; is it exported with that bitmap?"
    )]
    NoContext { export: String, context: String },
    #[error("the NBD server broke the protocol: {0}")]
    Protocol(String),
    #[error("the NBD connection ended: {0}")]
    Closed(String),
    #[error("NBD {command} at {offset}, {length} bytes, failed with errno {errno}: {message}")]
    Failed { command: &'static str, offset: u64, length: u64, errno: u32, message: String },
    #[error(
        "the NBD server did not answer {command} at {offset} within {after:?}; its storage may hang"
    )]
    Timeout { command: &'static str, offset: u64, after: Duration },
    #[error(
        "an NBD {command} of {length} bytes at {offset} does not fit an export of {size} bytes (limit {limit} per request)"
    )]
    Bounds { command: &'static str, offset: u64, length: u64, size: u64, limit: u64 },
}

impl NbdError {
    /// Whether the same request may succeed later, on a new connection.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::Connect { .. } | Self::Closed(_) | Self::Timeout { .. } | Self::Failed { .. }
        )
    }
}
