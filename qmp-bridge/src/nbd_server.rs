//! QEMU's NBD server. A process has one, and it may be another tool's.
//!
//! Ours listens on a socket that the helper makes in the runtime directory and passes to QEMU as a
//! file descriptor (so QEMU's user needs no right to any path). That socket alone shows whether the
//! server that runs is ours: it answers only while QEMU holds it.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use thiserror::Error;

use crate::jobs::tolerate_refusal;
use crate::nbd::answers;
use crate::qmp::{Qmp, QmpError};

/// QEMU has no error class for it; the words are the same since 1.3.
const RUNS_ALREADY: &str = "already running";
/// Kind of the descriptor that QEMU gets.
const FD_NAME: &str = "nbd";
/// Kind of a descriptor that it never gets.
const NO_FD_NAME: &str = "none";

#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum ServerError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(
        "QEMU's NBD server serves {}, and a QEMU has only one; end that first (block-export-del, nbd-server-stop), \
         nothing of it was touched",
        named(exports)
    )]
    InUse { exports: Vec<String> },
    #[error("cannot make the socket {path} for QEMU's NBD server: {source}")]
    Socket { path: PathBuf, source: std::io::Error },
}

impl ServerError {
    /// Whether the same command may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Qmp(error) => error.is_retryable(),
            Self::InUse { .. } => true,
            Self::Socket { .. } => false,
        }
    }
}

fn named(exports: &[String]) -> String {
    let names: Vec<String> = exports.iter().map(|id| format!("export `{id}`")).collect();
    if names.is_empty() {
        "another tool (it has no export yet)".into()
    } else {
        format!("{} of another tool", names.join(", "))
    }
}

/// Who has QEMU's NBD server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// It listens at our socket, even if another tool has exports in it.
    Ours,
    /// It does not run.
    Free,
}

/// Whether a capture can have the server. `socket`: ours; `None` if no helper was ever attached.
/// Changes nothing.
///
/// # Errors
/// When another tool uses the server, or QEMU does not answer.
pub async fn check(qmp: &Qmp, socket: Option<&Path>) -> Result<Holder, ServerError> {
    if let Some(socket) = socket
        && answers(socket).await
    {
        return Ok(Holder::Ours);
    }
    // QEMU looks whether its server runs before it looks at the address, and no descriptor has this
    // name.
    let address = json!({ "type": "fd", "data": { "str": qmp.names().name(NO_FD_NAME) } });
    match qmp.execute_json("nbd-server-start", json!({ "addr": address })).await {
        Err(error) if runs_already(&error) => Err(in_use(qmp).await?),
        Err(error) if error.is_refusal() => Ok(Holder::Free),
        Err(error) => Err(error.into()),
        Ok(reply) => Err(QmpError::unexpected("nbd-server-start", "an error", &reply).into()),
    }
}

fn runs_already(error: &QmpError) -> bool {
    error.is_refusal() && error.to_string().contains(RUNS_ALREADY)
}

async fn in_use(qmp: &Qmp) -> Result<ServerError, QmpError> {
    Ok(ServerError::InUse { exports: exports(qmp).await? })
}

/// Starts the server at `socket`, or keeps the one that runs there already.
pub(crate) async fn start(qmp: &Qmp, socket: &Path) -> Result<(), ServerError> {
    if check(qmp, Some(socket)).await? == Holder::Ours {
        return Ok(());
    }
    let made = make_socket(socket)
        .map_err(|source| ServerError::Socket { path: socket.into(), source })?;
    let started = hand_over(qmp, &made).await;
    if started.is_err() {
        remove_socket(socket);
    }
    match started {
        // Another tool was faster.
        Err(error) if runs_already(&error) => Err(in_use(qmp).await?),
        other => Ok(other?),
    }
}

async fn hand_over(qmp: &Qmp, socket: &UnixListener) -> Result<(), QmpError> {
    let name = qmp.names().name(FD_NAME);
    qmp.execute_with_fd("getfd", json!({ "fdname": name }), socket.as_fd()).await?;
    let address = json!({ "type": "fd", "data": { "str": name } });
    let started = qmp.execute_json("nbd-server-start", json!({ "addr": address })).await;
    if started.is_err() {
        // A server that runs already refuses before it takes the descriptor.
        tolerate_refusal(qmp.execute_json("closefd", json!({ "fdname": name })).await)?;
    }
    started.map(drop)
}

/// Stops the server if it is ours and no other tool has an export in it: stopping the server would
/// remove that export.
pub(crate) async fn stop_unused(qmp: &Qmp, socket: &Path) -> Result<(), ServerError> {
    if answers(socket).await {
        let others = exports(qmp).await?;
        if !others.is_empty() {
            tracing::warn!(
                ?others,
                "QEMU's NBD server is left running for exports of another tool"
            );
            return Ok(());
        }
        tolerate_refusal(qmp.execute_json("nbd-server-stop", Value::Null).await)?;
    }
    remove_socket(socket);
    Ok(())
}

/// Ids of all exports of the server.
async fn exports(qmp: &Qmp) -> Result<Vec<String>, QmpError> {
    let all = qmp.query_block_exports().await?.into_iter();
    Ok(all.filter(|export| export.r#type == "nbd").map(|export| export.id).collect())
}

fn make_socket(path: &Path) -> std::io::Result<UnixListener> {
    remove_socket(path);
    UnixListener::bind(path)
}

/// Missing is the rule.
fn remove_socket(path: &Path) {
    let _ = std::fs::remove_file(path);
}
