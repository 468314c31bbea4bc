//! What can go wrong between us and QEMU's monitor.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use thiserror::Error;

#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum QmpError {
    #[error(
        "cannot connect to the QMP socket {path}: {source}; is QEMU running, with `-qmp unix:{path},server=on,wait=off`?"
    )]
    Connect { path: PathBuf, source: std::io::Error },
    #[error(
        "the QMP socket {path} accepted but did not greet within {after:?}; another client holds it, give QEMU a second -qmp socket"
    )]
    NoGreeting { path: PathBuf, after: Duration },
    #[error("the socket {path} does not speak QMP: {why}")]
    NotQmp { path: PathBuf, why: String },
    #[error("QEMU does not speak QMP on the socket that it was started with: {why}")]
    NoMonitor { why: String },
    #[error("cannot encode the QMP command {command}: {source}")]
    Encode { command: String, source: serde_json::Error },
    #[error("QEMU did not answer {command} within {after:?}; it may still carry it out")]
    Timeout { command: String, after: Duration },
    #[error("the QMP connection was lost at {command}: {why}; reconnect if QEMU still runs")]
    Closed { command: String, why: String },
    #[error("QEMU refused {command}: {description}")]
    Refused { command: String, class: qapi::ErrorClass, description: String },
    #[error("what QEMU says to {command} has an unknown form at `{field}`: {source}")]
    Reply { command: String, field: String, source: serde_json::Error },
    #[error("QEMU's reply to {command} should hold {wanted} but is {got}")]
    Unexpected { command: String, wanted: String, got: String },
}

/// Longest part of an unexpected reply shown in an error.
const SHOWN_REPLY: usize = 200;

impl QmpError {
    pub(crate) fn refused(command: &str, error: qapi::Error) -> Self {
        Self::Refused { command: command.into(), class: error.class, description: error.desc }
    }

    pub(crate) fn unexpected(command: &str, wanted: &str, got: &Value) -> Self {
        let got: String = got.to_string().chars().take(SHOWN_REPLY).collect();
        Self::Unexpected { command: command.into(), wanted: wanted.into(), got }
    }

    /// Whether the same call may work later, after a reconnect if the connection was lost.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::Connect { .. }
                | Self::NoGreeting { .. }
                | Self::NoMonitor { .. }
                | Self::Timeout { .. }
                | Self::Closed { .. }
        )
    }

    /// Whether this QEMU lacks the command.
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, Self::Refused { class: qapi::ErrorClass::CommandNotFound, .. })
    }

    /// Whether QEMU itself said no (as against a broken connection).
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}
