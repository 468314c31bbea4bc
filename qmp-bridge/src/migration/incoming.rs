//! Loads a stream into a QEMU that was started with `-incoming defer`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::settings::{set_capabilities, set_parameter};
use super::watch::{PAUSED_POLL, Watch};
use super::{MigrationError, MigrationStatus};
use crate::qmp::{Qmp, QmpError};
use crate::quirks;

/// How long QEMU may take for a stream of small blocks and device state.
pub const LOAD_TIMEOUT: Duration = Duration::from_secs(120);
/// How long it may take to say why it has hung up.
const REASON_TIMEOUT: Duration = Duration::from_secs(2);

/// QEMU's default of `announce-rounds`.
const DEFAULT_ANNOUNCEMENTS: u32 = 5;

async fn set_announcements(qmp: &Qmp, count: u32) -> Result<(), QmpError> {
    set_parameter(qmp, "announce-rounds", json!(count)).await
}

/// Lets QEMU wait for a stream at the socket `path`, which it makes. Returns the address of that.
pub(super) async fn listen(qmp: &Qmp, path: &Path) -> Result<String, MigrationError> {
    let text = path.to_str().ok_or_else(|| MigrationError::Path { path: path.into() })?;
    let uri = format!("unix:{text}");
    let mut arguments = json!({ "uri": uri });
    if qmp.version().has(quirks::REPORTS_FAILED_LOAD) {
        arguments["exit-on-error"] = Value::Bool(false);
    }
    match qmp.execute_json("migrate-incoming", arguments).await {
        Err(error) if error.is_refusal() => Err(MigrationError::NotWaiting(error)),
        other => Ok(other.map(|_| uri)?),
    }
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
    pub async fn begin(qmp: &Qmp, path: &Path) -> Result<Self, MigrationError> {
        set_capabilities(qmp, vec![("x-ignore-shared", true)]).await?;
        // QEMU would announce the guest to the network as soon as its state is loaded, though it
        // may never run here.
        set_announcements(qmp, 0).await?;
        listen(qmp, path).await?;
        let connected = UnixStream::connect(path).await;
        let error = |source| MigrationError::Send { path: path.into(), source };
        Ok(Self { qmp: qmp.clone(), path: path.into(), stream: connected.map_err(error)? })
    }

    /// Sends a piece of the stream.
    ///
    /// # Errors
    /// When QEMU has closed the connection; its reason is in the error.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), MigrationError> {
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
    pub async fn finish(mut self) -> Result<(), MigrationError> {
        if let Err(source) = self.stream.shutdown().await {
            return Err(self.broken(source).await);
        }
        self.wait_loaded(LOAD_TIMEOUT).await?;
        Ok(set_announcements(&self.qmp, DEFAULT_ANNOUNCEMENTS).await?)
    }

    async fn wait_loaded(&self, timeout: Duration) -> Result<(), MigrationError> {
        let mut watch = Watch::new(&self.qmp, "the loading of the stream", "");
        let loaded = watch.wait_for(MigrationStatus::Completed, PAUSED_POLL, timeout).await;
        loaded.map_err(|error| match error {
            MigrationError::Failed { why, .. } => MigrationError::Load { why },
            other => other.or_gone(MigrationError::DestinationEnded),
        })
    }

    /// QEMU hangs up early when it does not like what it reads; then it knows better than the
    /// socket why.
    async fn broken(&self, source: std::io::Error) -> MigrationError {
        match self.wait_loaded(REASON_TIMEOUT).await {
            Ok(()) | Err(MigrationError::Stuck { .. }) => {
                MigrationError::Send { path: self.path.clone(), source }
            }
            Err(error) => error,
        }
    }
}
