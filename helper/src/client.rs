//! The other end of the control socket.

use crate::control::{BarePause, MAX_LINE, Reply, Request, Status};
use anyhow::{Context, Result, anyhow};
use backon::{ConstantBuilder, Retryable};
use engine::checkpoint::Choice;
use engine::progress::{Progress, Update};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use vm::error::{EngineError, refused};
use vm::process;
use vm::runtime_dir::RuntimeDir;

/// Who answers must be who owns the directory: root may ask where another user could have put any
/// socket.
fn check_peer(stream: &UnixStream, runtime: &RuntimeDir) -> Result<()> {
    let peer = stream.peer_cred().context("asking who answers for the helper")?.uid();
    let owner = std::fs::symlink_metadata(runtime.path()).map(|facts| facts.uid()).ok();
    if peer == 0 || Some(peer) == owner {
        return Ok(());
    }
    Err(refused(format!(
        "{} is answered by user {peer}, whose directory that is not",
        runtime.control().display()
    )))
}

/// How long after a VM's launch its helper may be on its way up.
const STARTUP: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A helper that was launched a moment ago is waited for, unless it has failed.
async fn connect(runtime: &RuntimeDir) -> std::io::Result<UnixStream> {
    let polls = ConstantBuilder::new().with_delay(POLL_INTERVAL).without_max_times();
    (|| UnixStream::connect(runtime.control()))
        .retry(polls)
        .when(|_| runtime.launched_within(STARTUP) && runtime.helper_failure().is_none())
        .await
}

/// Why a helper gives no answer: it ends with its QEMU.
fn ended(runtime: &RuntimeDir) -> anyhow::Error {
    let pid = runtime.vm().ok().and_then(|file| file.pid);
    match pid {
        Some(pid) if process::started(pid).is_none() => {
            anyhow!("the VM's QEMU (process {pid}) has ended, and its helper with it")
        }
        _ => anyhow!(
            "the helper ended before it answered; if the VM still runs, 'stillpoint attach' starts another helper"
        ),
    }
}

/// Asks for a checkpoint and waits until it is durable: an `Outcome` in the helper's own form.
///
/// # Errors
/// The helper's, with its class; or when no helper answers.
pub async fn checkpoint(
    runtime: &RuntimeDir,
    choice: Choice,
    show: impl Fn(&Update),
) -> Result<Value> {
    ask(runtime, &Request::Checkpoint(choice), show).await
}

/// Asks how the helper is.
///
/// # Errors
/// When no helper answers.
pub async fn status(runtime: &RuntimeDir) -> Result<Status> {
    decode(ask(runtime, &Request::Status, |_| ()).await?)
}

/// Until nothing of the VM's memory is to come from the store.
///
/// # Errors
/// When the helper ends before that.
pub async fn wait_until_hydrated(runtime: &RuntimeDir, progress: &dyn Progress) -> Result<()> {
    let Some(first) = status(runtime).await?.hydration else { return Ok(()) };
    let bar = progress.begin("memory", first.total_bytes);
    let mut shown = 0;
    while let Some(now) = status(runtime).await?.hydration {
        bar.advance(now.done_bytes.saturating_sub(shown));
        shown = shown.max(now.done_bytes);
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    Ok(())
}

/// Asks for a bare `stop` and `cont`.
///
/// # Errors
/// The helper's, with its class; or when no helper answers.
pub async fn bare_pause(runtime: &RuntimeDir) -> Result<BarePause> {
    decode(ask(runtime, &Request::BarePause, |_| ()).await?)
}

/// A helper of another version may answer in another form.
///
/// # Errors
/// When the answer lacks what is expected of it.
pub fn decode<T: DeserializeOwned>(answer: Value) -> Result<T> {
    serde_json::from_value(answer).context("the helper's answer cannot be parsed")
}

/// Sends one request and waits for its result, showing progress meanwhile.
///
/// # Errors
/// The helper's, with its class; or when no helper answers.
pub async fn ask(runtime: &RuntimeDir, request: &Request, show: impl Fn(&Update)) -> Result<Value> {
    let path = runtime.control();
    let stream = connect(runtime).await;
    let stream = stream.map_err(|error| {
        refused(format!("no helper answers at {} ({error}); 'stillpoint attach NAME' starts one for a running VM", path.display()))
    })?;
    check_peer(&stream, runtime)?;
    let (read, mut write) = stream.into_split();
    let mut line = serde_json::to_vec(request).context("encoding the request")?;
    line.push(b'\n');
    write.write_all(&line).await.context("sending the request to the helper")?;
    let mut replies = BufReader::new(read.take(u64::MAX));
    loop {
        let mut line = String::new();
        replies.get_mut().set_limit(MAX_LINE as u64);
        let count = match replies.read_line(&mut line).await {
            // It ended with the request unread.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => 0,
            count => count.context("reading the helper's answer")?,
        };
        if count == 0 {
            return Err(ended(runtime));
        }
        match Reply::parse(&line)? {
            Reply::Progress(update) => show(&update),
            Reply::Done(value) => return Ok(value),
            Reply::Failed(failure) => return Err(EngineError::from(failure).into()),
        }
    }
}
