//! Loads a stream into a QEMU that was started with `-incoming defer`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use thiserror::Error;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use crate::qmp::{Qmp, QmpError};
use crate::quirks;

/// How long QEMU may take for a stream of small blocks and device state.
pub const LOAD_TIMEOUT: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(1);

/// QEMU's default of `announce-rounds`.
const DEFAULT_ANNOUNCEMENTS: u32 = 5;

#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum IncomingError {
    #[error("QEMU does not wait for a stream: {0}; start it with `-incoming defer`")]
    NotWaiting(QmpError),
    #[error(transparent)]
    Qmp(QmpError),
    #[error("cannot send the stream to {path}: {source}{hint}")]
    Send { path: PathBuf, source: std::io::Error, hint: String },
    #[error(
        "QEMU ended while it loaded the stream; its own output says why (often a VM that differs from the saved one)"
    )]
    Ended,
    #[error(
        "QEMU could not load the stream: {why}; the VM must have the same devices, in the same places, as the saved one"
    )]
    Failed { why: String },
    #[error("QEMU did not finish loading within {after:?}; its state is `{status}`")]
    Stuck { status: String, after: Duration },
    #[error("the path {path} is not UTF-8, and QMP can carry no other")]
    Path { path: PathBuf },
}

async fn set_announcements(qmp: &Qmp, count: u32) -> Result<(), IncomingError> {
    let set = qmp.execute_json("migrate-set-parameters", json!({ "announce-rounds": count })).await;
    set.map(drop).map_err(IncomingError::Qmp)
}

/// A stream on its way into QEMU.
#[derive(Debug)]
pub struct Incoming {
    qmp: Qmp,
    path: PathBuf,
    stream: UnixStream,
}

impl Incoming {
    /// Sets `x-ignore-shared`, lets QEMU listen on the socket `path` and connects to it.
    ///
    /// # Errors
    /// When QEMU does not listen there, or does not take the connection.
    pub async fn begin(qmp: &Qmp, path: &Path) -> Result<Self, IncomingError> {
        let text = path.to_str().ok_or_else(|| IncomingError::Path { path: path.into() })?;
        let capabilities = json!([{ "capability": "x-ignore-shared", "state": true }]);
        let set = qmp
            .execute_json("migrate-set-capabilities", json!({ "capabilities": capabilities }))
            .await;
        set.map_err(IncomingError::Qmp)?;
        // QEMU would announce the guest to the network as soon as its state is loaded, though it
        // may never run here.
        set_announcements(qmp, 0).await?;
        let mut arguments = json!({ "uri": format!("unix:{text}") });
        if qmp.version().has(quirks::REPORTS_FAILED_LOAD) {
            arguments["exit-on-error"] = Value::Bool(false);
        }
        let listening = qmp.execute_json("migrate-incoming", arguments).await;
        listening.map_err(|error| {
            if error.is_refusal() {
                IncomingError::NotWaiting(error)
            } else {
                IncomingError::Qmp(error)
            }
        })?;
        let connected = UnixStream::connect(path).await;
        let error = |source| IncomingError::Send { path: path.into(), source, hint: String::new() };
        Ok(Self { qmp: qmp.clone(), path: path.into(), stream: connected.map_err(error)? })
    }

    /// Sends a piece of the stream.
    ///
    /// # Errors
    /// When QEMU has closed the connection; its reason is in the error.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), IncomingError> {
        match self.stream.write_all(bytes).await {
            Ok(()) => Ok(()),
            Err(source) => Err(self.broken(source).await),
        }
    }

    /// Ends the stream and waits until QEMU has loaded it. The guest is stopped then: `cont` starts
    /// it.
    ///
    /// # Errors
    /// When QEMU refuses the stream, or does not finish in time.
    pub async fn finish(mut self) -> Result<(), IncomingError> {
        if let Err(source) = self.stream.shutdown().await {
            return Err(self.broken(source).await);
        }
        let start = Instant::now();
        loop {
            let (status, why) = self.status().await?;
            match status.as_str() {
                "completed" => return set_announcements(&self.qmp, DEFAULT_ANNOUNCEMENTS).await,
                "failed" => return Err(IncomingError::Failed { why }),
                _ if start.elapsed() > LOAD_TIMEOUT => {
                    return Err(IncomingError::Stuck { status, after: LOAD_TIMEOUT });
                }
                _ => tokio::time::sleep(LOOK).await,
            }
        }
    }

    async fn status(&self) -> Result<(String, String), IncomingError> {
        let reply =
            self.qmp.execute_json("query-migrate", Value::Null).await.map_err(
                |error| match error {
                    QmpError::Closed { .. } => IncomingError::Ended,
                    other => IncomingError::Qmp(other),
                },
            )?;
        let text = |field: &str, default: &str| reply[field].as_str().unwrap_or(default).to_owned();
        Ok((text("status", "none"), text("error-desc", "it gave no reason")))
    }

    /// QEMU hangs up early when it does not like what it reads; then it knows better than the
    /// socket why.
    async fn broken(&self, source: std::io::Error) -> IncomingError {
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline {
            match self.status().await {
                Ok((status, why)) if status == "failed" => return IncomingError::Failed { why },
                Ok(_) => tokio::time::sleep(LOOK).await,
                Err(error) => return error,
            }
        }
        IncomingError::Send {
            path: self.path.clone(),
            source,
            hint: "; QEMU says nothing about it".into(),
        }
    }
}
