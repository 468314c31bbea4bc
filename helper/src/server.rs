//! The control socket: requests in, progress and results out.

#[cfg(test)]
mod test;

use crate::control::{BarePause, MAX_REQUEST, Reply, Request, Status, VmStatus};
use crate::{ToCome, memory};
use anyhow::{Context, Result};
use engine::checkpoint::outcome::milliseconds;
use engine::checkpoint::{Arriving, Checkpointer, Report};
use engine::progress::Update;
use engine::restore::hydration::Hydration;
use engine::restore::lazy_disks::Disks;
use engine::rollback;
use qmp_bridge::Paused;
use serde::Serialize;
use serde_json::Value;
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{RwLock, Semaphore, mpsc};
use vm::error::{EngineError, InPhase, Phase, refused};
use vm::runtime_dir::{Failure, RuntimeDir};

/// Progress waits for a slow client only this far; then it is dropped, never the work.
const PROGRESS_QUEUE: usize = 64;

/// Connections at once. The next ones wait in the kernel until one has ended.
const CONNECTIONS: usize = 256;
/// A client sends its request at once, and reads what it is sent.
const CLIENT: Duration = Duration::from_secs(5);

/// What a checkpoint gets to end when the helper must; a service manager waits 90 s.
const GRACE: Duration = Duration::from_secs(60);

/// How long a request waits for the lock of the VM: a request that only reads the VM's state has
/// released it by then; a checkpoint has not.
const LOCK_WAIT: Duration = Duration::from_millis(500);

pub(crate) fn listen(runtime: &RuntimeDir) -> Result<UnixListener> {
    let path = runtime.control();
    // The lock says that no helper lives: this is a dead one's.
    let _ = std::fs::remove_file(&path);
    let listener =
        UnixListener::bind(&path).with_context(|| format!("listening on {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("protecting {}", path.display()))?;
    Ok(listener)
}

#[derive(Clone)]
pub(crate) struct Server {
    /// Written by what needs the VM for itself, read by what only looks at it: those who look are
    /// not in each other's way.
    checkpointer: Arc<RwLock<Checkpointer>>,
    /// Not behind the lock: its status is shown also during a checkpoint.
    to_come: ToCome,
}

impl Server {
    pub(crate) fn new(checkpointer: Checkpointer, to_come: ToCome) -> Self {
        Self { checkpointer: Arc::new(RwLock::new(checkpointer)), to_come }
    }

    pub(crate) async fn run(&self, listener: UnixListener) {
        serve(listener, |stream| {
            let server = self.clone();
            async move { server.converse(stream).await }
        })
        .await;
    }

    /// Until the VM's QEMU has ended. An adoption puts another in its place, whose end counts then.
    pub(crate) async fn vm_ended(&self) {
        loop {
            let qmp = self.checkpointer.read().await.vm.qmp.clone();
            qmp.closed().await;
            let now = self.checkpointer.read().await.vm.qmp.clone();
            if tokio::time::timeout(Duration::from_millis(1), now.closed()).await.is_ok() {
                return;
            }
        }
    }

    /// Lets a checkpoint that is under way end, so that the guest is not left stopped, then frees
    /// the writer's place.
    pub(crate) async fn end(&self) {
        match tokio::time::timeout(GRACE, self.checkpointer.write()).await {
            Ok(mut checkpointer) => checkpointer.release().await,
            Err(_) => tracing::warn!("a checkpoint is cut off; the next helper cleans up after it"),
        }
    }

    async fn converse(&self, stream: UnixStream) -> Result<()> {
        let (read, write) = stream.into_split();
        let mut client = Client { stream: Some(write), timeout: CLIENT };
        let line = request(read, CLIENT).await?;
        let (progress, mut updates) = mpsc::channel(PROGRESS_QUEUE);
        let server = self.clone();
        // Not tied to the connection: a client that goes away does not cut a checkpoint short.
        let work = tokio::spawn(async move { server.answer(&line, progress).await });
        while let Some(update) = updates.recv().await {
            client.send(&Reply::Progress(update)).await?;
        }
        let done = work.await.context("internal error: request task panicked");
        let reply = match done.in_phase(Phase::Ask).flatten() {
            Ok(value) => Reply::Done(value),
            Err(error) => Reply::Failed(Failure::of(&error)),
        };
        client.send(&reply).await
    }

    async fn answer(
        &self,
        line: &str,
        progress: mpsc::Sender<Update>,
    ) -> Result<Value, EngineError> {
        let request = Request::parse(line)?;
        if request == Request::Status {
            return encode(&self.status());
        }
        let Ok(mut checkpointer) = tokio::time::timeout(LOCK_WAIT, self.checkpointer.write()).await
        else {
            return Err(refused("a checkpoint of this VM is under way; wait for it"))
                .in_phase(Phase::Ask);
        };
        match request {
            Request::Checkpoint(choice) => {
                let _watch = memory::Watch::begin();
                logged("checkpoint", checkpointer.take(choice, &Report::to(progress)).await)
            }
            Request::Adopt { qemu } => {
                let report = Report::to(progress);
                logged("adoption", engine::adopt::adopt(&mut checkpointer, qemu, &report).await)
            }
            Request::Rollback(request) => {
                let report = Report::to(progress);
                logged("rollback", rollback::run(&mut checkpointer, request, &report).await)
            }
            Request::BarePause => encode(&bare_pause(&checkpointer).await?),
            Request::Status => Ok(Value::Null),
        }
    }

    fn status(&self) -> Status {
        let pid = std::process::id();
        let ToCome { hydration, disks } = &self.to_come;
        let hydration = hydration.as_ref().filter(|hydration| !hydration.is_done());
        let hydration = hydration.map(Hydration::status);
        let disks = disks.as_ref().and_then(Disks::status);
        let Ok(checkpointer) = self.checkpointer.try_read() else {
            return Status { pid, busy: true, vm: None, hydration, disks, rollback: None };
        };
        let vm = &checkpointer.vm;
        let status = VmStatus {
            name: vm.file.name.clone(),
            store: vm.file.store.clone(),
            instance: vm.file.instance.clone(),
            qemu_pid: vm.pid,
            qemu_version: vm.facts.qemu.to_string(),
            accelerator: vm.facts.accelerator.as_str().to_owned(),
            peak_memory_bytes: memory::peak(),
            memory_limit_bytes: memory::limit(vm, hydration.is_some(), disks.is_some()),
        };
        let rollback = checkpointer.half_rolled_back().ok().flatten();
        Status { pid, busy: false, vm: Some(status), hydration, disks, rollback }
    }
}

async fn bare_pause(checkpointer: &Checkpointer) -> Result<BarePause, EngineError> {
    let paused = Paused::stop(&checkpointer.vm.qmp).await.context("stopping the guest");
    let pause = paused.in_phase(Phase::Pause)?.resume().await;
    let pause = pause.context("letting the guest run again").in_phase(Phase::Pause)?;
    Ok(BarePause { pause_ms: milliseconds(pause) })
}

/// The result for the client; a failure is in the helper's log, too.
fn logged(what: &str, done: Result<impl Serialize, EngineError>) -> Result<Value, EngineError> {
    if let Err(error) = &done {
        tracing::error!(error = error.explain(), phase = %error.phase(), "{what} failed");
    }
    encode(&done?)
}

fn encode(result: &impl Serialize) -> Result<Value, EngineError> {
    serde_json::to_value(result).context("encoding the result").in_phase(Phase::Ask)
}

/// Accepts until it is dropped, a bounded number of connections at once.
async fn serve<F: Future<Output = Result<()>> + Send + 'static>(
    listener: UnixListener,
    converse: impl Fn(UnixStream) -> F,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    while let Ok(place) = places.clone().acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, say: that passes, and the VM needs its helper.
                tracing::warn!(%error, "accepting on the control socket");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let conversation = converse(stream);
        tokio::spawn(async move {
            if let Err(error) = conversation.await {
                tracing::debug!(error = format!("{error:#}"), "a control connection ended");
            }
            drop(place);
        });
    }
}

/// One line, of a client that may send anything or nothing.
async fn request(read: impl AsyncRead + Unpin, timeout: Duration) -> Result<String> {
    let mut line = String::new();
    let mut limited = BufReader::new(read.take(MAX_REQUEST));
    let read = tokio::time::timeout(timeout, limited.read_line(&mut line)).await;
    read.context("no request came in time")?.context("reading a request")?;
    Ok(line)
}

/// Who asked. One who went away or does not read is sent nothing more, and the work continues
/// without.
struct Client<W> {
    stream: Option<W>,
    timeout: Duration,
}

impl<W: AsyncWrite + Unpin> Client<W> {
    async fn send(&mut self, reply: &Reply) -> Result<()> {
        let Some(stream) = &mut self.stream else { return Ok(()) };
        let mut line = serde_json::to_vec(reply).context("encoding a reply")?;
        line.push(b'\n');
        if !matches!(tokio::time::timeout(self.timeout, stream.write_all(&line)).await, Ok(Ok(())))
        {
            self.stream = None;
        }
        Ok(())
    }
}
