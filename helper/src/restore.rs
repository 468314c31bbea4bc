//! The process that restores a VM and then is its helper, and the command that waits for it.
//!
//! The command starts the process with one end of a socket pair as its standard input, sends the
//! request there, and gets one [`Reply`]: when the guest may run and the helper listens, or when a
//! restore has failed and is undone. The command sends nothing more: its end, however it comes, is
//! the order to undo what was made, as long as the guest may not run yet. Until then the standard
//! error of the process is that of the command, later it is the helper's log.

use crate::control::{MAX_LINE, Reply};
use crate::start;
use anyhow::{Context, Error, Result, anyhow};
use engine::checkpoint::Checkpointer;
use engine::progress::Progress;
use engine::restore::{self, Report, Request, Restored};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as Pair;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use vm::error::EngineError;
use vm::runtime_dir::{Failure, RuntimeDir};

/// Lets another process restore the VM, and waits until it is the VM's helper.
///
/// # Errors
/// The restore's own, with its class; all is undone then, unless the guest may have run.
pub async fn start(request: &Request, is_verbose: bool) -> Result<Report> {
    let (ours, theirs) = Pair::pair().context("making a socket pair")?;
    let mut command = start::command(&[], request.name(), request.runtime_base.as_deref())?;
    command.arg("--restore").args(is_verbose.then_some("--verbose")).stdin(OwnedFd::from(theirs));
    let mut process = tokio::process::Command::from(command)
        .spawn()
        .context("starting the process that restores, through setsid (package util-linux)")?;
    let (read, mut write) = asynchronous(ours)?.into_split();
    let mut line = serde_json::to_vec(request).context("encoding the request")?;
    line.push(b'\n');
    let mut interrupted = Interrupted::listen()?;
    // A process that has ended already says why by its status.
    let _ = write.write_all(&line).await;
    let mut write = Some(write);
    let mut replies = BufReader::new(read.take(MAX_LINE as u64));
    let mut reply = String::new();
    {
        let mut reading = std::pin::pin!(replies.read_line(&mut reply));
        loop {
            tokio::select! {
                // One that ended in the middle of its reply has not replied.
                _ = &mut reading => break,
                () = interrupted.wait(), if write.is_some() => drop(write.take()),
            }
        }
    }
    match serde_json::from_str(&reply) {
        Ok(Reply::Done(result)) => {
            let (report, state): (Report, String) =
                serde_json::from_value(result).context("internal error: decoding the result")?;
            Ok(Report { state, ..report })
        }
        Ok(Reply::Failed(failure)) => {
            let _ = process.wait().await;
            Err(EngineError::from(failure).into())
        }
        _ => {
            let status = process.wait().await.context("waiting for the process that restores")?;
            Err(ended(status, request))
        }
    }
}

/// Of a process that ended without a reply. If a signal killed it, the same one kills this process:
/// who waits for the command sees the end of what the command is.
fn ended(status: ExitStatus, request: &Request) -> Error {
    let name = request.name();
    let is_left = RuntimeDir::new(request.runtime_base.as_deref(), name)
        .is_ok_and(|runtime| runtime.restore_record().exists());
    let remedy = if is_left {
        "run the command again, which undoes what it left".to_owned()
    } else {
        format!("if {name} runs, 'stillpoint attach {name}' starts a helper")
    };
    let error = anyhow!("the process that restores ended ({status}); {remedy}");
    if let Some(signal) = status.signal().and_then(rustix::process::Signal::from_named_raw) {
        tracing::error!("{error}");
        let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
    }
    error
}

/// What [`start()`] starts: restores the VM, then serves until QEMU ends or a signal ends the
/// helper. `detached` is called in between.
///
/// # Errors
/// When there is no request, or serving fails; a failed restore is the command's to report.
pub async fn run(progress: Arc<dyn Progress>, detached: impl FnOnce()) -> Result<()> {
    let (read, mut write) = command_at_stdin()?.into_split();
    let mut command = BufReader::new(read.take(MAX_LINE as u64));
    let mut line = String::new();
    command.read_line(&mut line).await.context("reading the request")?;
    let request: Request = serde_json::from_str(&line).context("decoding the request")?;
    let mut signals = Interrupted::listen()?;
    let interrupted = async {
        tokio::select! {
            // Its end: it sends nothing more.
            _ = command.read_u8() => {}
            () = signals.wait() => {}
        }
    };
    let begun = begin(request, progress, interrupted).await;
    let reply = match &begun {
        Ok((restored, _)) => {
            detached();
            let result = serde_json::to_value((&restored.report, &restored.report.state));
            Reply::Done(result.context("encoding the result")?)
        }
        Err(error) => Reply::Failed(Failure::of(error)),
    };
    let mut line = serde_json::to_vec(&reply).context("encoding the reply")?;
    line.push(b'\n');
    // The command may be gone; the VM needs its helper.
    let _ = write.write_all(&line).await;
    drop((write, command));
    let Ok((restored, control)) = begun else { return Ok(()) };
    let Restored { vm, session, marks, lock, hydration, .. } = restored;
    let socket = vm.runtime.control();
    let checkpointer = Checkpointer::of_restored(vm, session, marks).await;
    let result = crate::serve_vm(checkpointer, hydration, control).await;
    crate::remove(&socket);
    drop(lock);
    result
}

/// A restored VM, and the control socket of its helper, which this process is now.
async fn begin(
    request: Request,
    progress: Arc<dyn Progress>,
    interrupted: impl Future<Output = ()>,
) -> Result<(Restored, UnixListener)> {
    let restored = restore::run(request, progress, interrupted).await?;
    let runtime = &restored.vm.runtime;
    let control = crate::listen(runtime).and_then(|control| detach(runtime).map(|()| control));
    let control = control.with_context(|| {
        format!(
            "{} is restored, but has no helper ('stillpoint attach {0}' starts one)",
            restored.report.name
        )
    })?;
    Ok((restored, control))
}

/// Nothing of the command's is held any more.
fn detach(runtime: &RuntimeDir) -> Result<()> {
    let log = runtime.open_helper_log()?;
    rustix::stdio::dup2_stderr(&log).context("writing the helper's log")?;
    std::env::set_current_dir("/").context("leaving the current directory")
}

/// The socket that the command has put there; no child of this process gets it.
fn command_at_stdin() -> Result<UnixStream> {
    let about = "taking the command's socket from standard input";
    let socket = std::io::stdin().as_fd().try_clone_to_owned().context(about)?;
    rustix::stdio::dup2_stdin(File::open("/dev/null").context(about)?).context(about)?;
    asynchronous(Pair::from(socket))
}

fn asynchronous(stream: Pair) -> Result<UnixStream> {
    let about = "using a socket";
    stream.set_nonblocking(true).context(about)?;
    UnixStream::from_std(stream).context(about)
}

/// The signals that ask a command to end.
struct Interrupted([Signal; 3]);

impl Interrupted {
    fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("listening for signals");
        Ok(Self([
            listen(SignalKind::terminate())?,
            listen(SignalKind::interrupt())?,
            listen(SignalKind::hangup())?,
        ]))
    }

    async fn wait(&mut self) {
        let [terminate, interrupt, hang_up] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hang_up.recv() => {}
        }
    }
}
