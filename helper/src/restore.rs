//! The process that restores a VM and then is its helper, and the command that waits for it.
//!
//! The command starts the process with one end of a socket pair as its standard input, sends the
//! request there, and gets one [`Reply`]: when the guest may run and the helper listens, or when a
//! restore has failed and is undone. The command sends nothing more: its end, however it comes, is
//! the order to undo what was made, as long as the guest may not run yet. Until then the standard
//! error of the process is that of the command, later it is the helper's log.

use crate::ToCome;
use crate::client;
use crate::control::{MAX_LINE, Reply};
use crate::start::{self, Supervision};
use crate::supervisor::die_as;
use anyhow::{Context, Error, Result, anyhow};
use engine::checkpoint::Checkpointer;
use engine::progress::Progress;
use engine::restore::{self, Report, Request, Restored};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as Pair;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::Child;
use tokio::signal::unix::{Signal, SignalKind, signal};
use vm::error::{EngineError, InPhase, Phase};
use vm::runtime_dir::{Failure, RuntimeDir};

const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Lets another process restore the VM, and waits until it is the VM's helper.
///
/// # Errors
/// The restore's own, with its class and phase; all is undone then, unless the guest may have run.
pub async fn start(
    request: &Request,
    supervision: Supervision,
    is_verbose: bool,
) -> Result<Report, EngineError> {
    let stderr = Stdio::inherit();
    let (mut process, socket) = Restoring::spawn(request, supervision, is_verbose, stderr)?;
    let done = process.report(socket, request).await;
    if let Err(error) = &done
        && let Some(status) = process.killed
    {
        // Who waits for the command sees the end of what the command is.
        tracing::error!("{error}");
        die_as(status);
    }
    done
}

/// The same beside others: what its process prints is given to `say`, line by line, and its end is
/// not this command's.
///
/// # Errors
/// As those of [`start()`].
pub async fn start_beside(
    request: &Request,
    supervision: Supervision,
    is_verbose: bool,
    say: impl Fn(&str),
) -> Result<Report, EngineError> {
    let (mut process, socket) = Restoring::spawn(request, supervision, is_verbose, Stdio::piped())?;
    let said = process.child.stderr.take();
    let telling = async {
        let Some(said) = said else { return };
        let mut lines = BufReader::new(said).lines();
        // Until it writes to the helper's log.
        while let Ok(Some(line)) = lines.next_line().await {
            say(&line);
        }
    };
    let (done, ()) = tokio::join!(process.report(socket, request), telling);
    done
}

/// The process that restores, as the command sees it.
struct Restoring {
    child: Child,
    /// How it ended, if a signal killed it before it replied.
    killed: Option<ExitStatus>,
}

impl Restoring {
    fn spawn(
        request: &Request,
        supervision: Supervision,
        is_verbose: bool,
        stderr: Stdio,
    ) -> Result<(Self, Pair), EngineError> {
        Self::begin(request, supervision, is_verbose, stderr).in_phase(Phase::Ask)
    }

    fn begin(
        request: &Request,
        supervision: Supervision,
        is_verbose: bool,
        stderr: Stdio,
    ) -> Result<(Self, Pair)> {
        let (ours, theirs) = Pair::pair().context("making a socket pair")?;
        let base = request.runtime_base.as_deref();
        let mut command = start::command(&[], request.name(), base, supervision)?;
        command.arg("--restore").args(is_verbose.then_some("--verbose"));
        command.stdin(OwnedFd::from(theirs)).stderr(stderr);
        let child = tokio::process::Command::from(command)
            .spawn()
            .context("starting the process that restores, through setsid (package util-linux)")?;
        Ok((Self { child, killed: None }, ours))
    }

    async fn report(&mut self, socket: Pair, request: &Request) -> Result<Report, EngineError> {
        let mut interrupted = Interrupted::listen().in_phase(Phase::Ask)?;
        match converse(socket, request, interrupted.wait()).await.in_phase(Phase::Ask)? {
            Some(Reply::Done(result)) => {
                let (report, state): (Report, String) = client::decode(result)?;
                Ok(Report { state, ..report })
            }
            Some(Reply::Failed(failure)) => {
                let _ = self.child.wait().await;
                Err(failure.into())
            }
            _ => Err(self.lost(request).await).in_phase(Phase::Ask),
        }
    }

    /// Why there is no reply.
    async fn lost(&mut self, request: &Request) -> Error {
        tokio::select! {
            biased;
            status = self.child.wait() => match status {
                Ok(status) => {
                    self.killed = status.signal().map(|_| status);
                    without_reply(status, request)
                }
                Err(error) => Error::new(error).context("waiting for the process that restores"),
            },
            () = other_answers(request) => anyhow!(
                "the process that restored {0} ended before it could say so; {0} runs, and has \
                 another helper now",
                request.name()
            ),
        }
    }
}

/// The reply to the request; none of a process that ends before, or in the middle of it. When
/// `interrupted` ends, the process gets the order to undo, and its reply is waited for.
async fn converse(
    stream: Pair,
    request: &Request,
    interrupted: impl Future<Output = ()>,
) -> Result<Option<Reply>> {
    let (read, mut write) = asynchronous(stream)?.into_split();
    let mut line = serde_json::to_vec(request).context("encoding the request")?;
    line.push(b'\n');
    // A process that has ended already says why by its status.
    let _ = write.write_all(&line).await;
    let mut replies = BufReader::new(read.take(MAX_LINE as u64));
    let mut reply = String::new();
    {
        let mut reading = std::pin::pin!(replies.read_line(&mut reply));
        tokio::select! {
            _ = &mut reading => {}
            () = interrupted => {
                drop(write);
                let _ = reading.await;
            }
        }
    }
    Ok(serde_json::from_str(&reply).ok())
}

/// Until the helper that a supervisor has started answers.
async fn other_answers(request: &Request) {
    loop {
        tokio::time::sleep(POLL_INTERVAL).await;
        let runtime = RuntimeDir::new(request.runtime_base.as_deref(), request.name());
        let Ok(runtime) = runtime else { continue };
        if !runtime.restore_record().exists() && client::status(&runtime).await.is_ok() {
            return;
        }
    }
}

/// Of a process that ended without a reply.
fn without_reply(status: ExitStatus, request: &Request) -> Error {
    let name = request.name();
    let is_left = RuntimeDir::new(request.runtime_base.as_deref(), name)
        .is_ok_and(|runtime| runtime.restore_record().exists());
    let remedy = if is_left {
        "run the command again, which undoes what it left".to_owned()
    } else {
        format!("if {name} runs, 'stillpoint attach {name}' starts a helper")
    };
    anyhow!("the process that restores ended ({status}); {remedy}")
}

/// What [`start()`] starts: restores the VM, then serves until QEMU ends or a signal ends the
/// helper. `detached` is called in between.
///
/// # Errors
/// When there is no request, or serving fails; a failed restore is the command's to report.
pub async fn run(progress: Arc<dyn Progress>, detached: impl FnOnce()) -> Result<(), EngineError> {
    let (read, mut write) = command_at_stdin().in_phase(Phase::Ask)?.into_split();
    let mut command = BufReader::new(read.take(MAX_LINE as u64));
    let request = asked(&mut command).await.in_phase(Phase::Ask)?;
    let mut signals = Interrupted::listen().in_phase(Phase::Ask)?;
    let interrupted = async {
        tokio::select! {
            // Its end: it sends nothing more.
            _ = command.read_u8() => {}
            () = signals.wait() => {}
        }
    };
    let (restored, control) = match begin(request, progress, interrupted).await {
        Ok(begun) => begun,
        Err(error) => {
            let _ = write.write_all(&reply(Err(&error)).in_phase(Phase::Ask)?).await;
            return Ok(());
        }
    };
    detached();
    let Restored { vm, session, marks, lock, hydration, disks, mut report, afterwards } = restored;
    let socket = vm.runtime.control();
    let checkpointer = Checkpointer::of_restored(vm, session, marks).await;
    let serving = crate::serve_vm(checkpointer, ToCome { hydration, disks }, control);
    let telling = async {
        report.notes.extend(afterwards.complete().await);
        // The command may be gone; the VM needs its helper.
        let _ = write.write_all(&reply(Ok(&report)).in_phase(Phase::Ask)?).await;
        drop((write, command));
        Ok(())
    };
    let (result, told) = tokio::join!(serving, telling);
    crate::remove(&socket);
    drop(lock);
    result.and(told)
}

async fn asked(command: &mut (impl AsyncBufRead + Unpin)) -> Result<Request> {
    let mut line = String::new();
    command.read_line(&mut line).await.context("reading the request")?;
    serde_json::from_str(&line).context("decoding the request")
}

/// A line for the command.
fn reply(done: Result<&Report, &EngineError>) -> Result<Vec<u8>> {
    let reply = match done {
        Ok(report) => Reply::Done(
            serde_json::to_value((report, &report.state)).context("encoding the result")?,
        ),
        Err(error) => Reply::Failed(Failure::of(error)),
    };
    let mut line = serde_json::to_vec(&reply).context("encoding the reply")?;
    line.push(b'\n');
    Ok(line)
}

/// A restored VM, and the control socket of its helper, which this process is now.
async fn begin(
    request: Request,
    progress: Arc<dyn Progress>,
    interrupted: impl Future<Output = ()>,
) -> Result<(Restored, UnixListener), EngineError> {
    let restored = restore::run(request, progress, interrupted).await?;
    let runtime = &restored.vm.runtime;
    let control = crate::listen(runtime)
        .and_then(|control| detach(runtime).in_phase(Phase::Attach).map(|()| control));
    let control = control.map_err(|error| {
        error.context(format!(
            "{} is restored, but has no helper ('stillpoint attach {0}' starts one)",
            restored.report.name
        ))
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

#[cfg(test)]
mod test {
    use super::*;
    use crate::scene::Place;
    use std::future::{pending, ready};
    use std::io::{BufRead, Write};
    use std::path::PathBuf;
    use std::thread::JoinHandle;
    use vm::error::{Class, refused};

    fn request(place: &Place) -> Request {
        Request {
            checkpoint: "web1@7".parse().unwrap(),
            store: "file:///s".to_owned(),
            runtime_base: Some(place.directory.path().join("run")),
            new_name: Some("vm".parse().unwrap()),
            dir: None,
            qemu: None,
            fleecing: None,
            map: Vec::new(),
            allow: Vec::new(),
            take_over: false,
            paused: true,
            run: false,
            lazy: false,
            deadline: None,
            hooks: Default::default(),
            keep_clock: false,
        }
    }

    fn report() -> Report {
        Report {
            name: "vm".parse().unwrap(),
            restored: "web1".parse().unwrap(),
            id: checkpoint_format::CheckpointId(7),
            running: true,
            run_state: "running".to_owned(),
            resume_ms: 1.5,
            bytes_read: 9,
            layer_bytes_read: 3,
            dir: PathBuf::from("/srv/vm"),
            phases: Default::default(),
            memory_bytes_to_come: 0,
            disks_to_come: Vec::new(),
            notes: vec!["a copy".to_owned()],
            state: "runs".to_owned(),
        }
    }

    /// The process that restores, played: it reads the request, waits until the command has hung up
    /// if it is to, and answers so.
    fn process(stream: Pair, waits: bool, answer: Vec<u8>) -> JoinHandle<String> {
        std::thread::spawn(move || {
            let mut lines = std::io::BufReader::new(stream);
            let mut request = String::new();
            lines.read_line(&mut request).unwrap();
            if waits {
                assert_eq!(lines.read_line(&mut String::new()).unwrap(), 0);
            }
            lines.get_mut().write_all(&answer).unwrap();
            request
        })
    }

    #[tokio::test]
    async fn restore_command_has_the_report_of_the_process() {
        let place = Place::new();
        let (ours, theirs) = Pair::pair().unwrap();
        let process = process(theirs, false, reply(Ok(&report())).unwrap());
        let reply = converse(ours, &request(&place), pending()).await.unwrap();
        let Some(Reply::Done(done)) = reply else { panic!("{reply:?}") };
        let (report, state): (Report, String) = client::decode(done).unwrap();
        assert_eq!((report.name.as_str(), report.id.0, state.as_str()), ("vm", 7, "runs"));
        assert_eq!(report.notes, ["a copy"]);
        // The process knows what it was asked.
        let line = process.join().unwrap();
        let asked = asked(&mut line.as_bytes()).await.unwrap();
        assert_eq!((asked.name().as_str(), asked.paused), ("vm", true));
    }

    #[tokio::test]
    async fn restore_command_has_the_failure_with_class_and_phase() {
        let place = Place::new();
        let (ours, theirs) = Pair::pair().unwrap();
        let error = EngineError::new(Phase::Plan, refused("its socket is there"));
        let process = process(theirs, false, reply(Err(&error)).unwrap());
        let reply = converse(ours, &request(&place), pending()).await.unwrap();
        let Some(Reply::Failed(failure)) = reply else { panic!("{reply:?}") };
        let error = EngineError::from(failure);
        assert_eq!((error.class(), error.phase()), (Class::Refused, Phase::Plan));
        process.join().unwrap();
    }

    /// The order to undo is the end of what the command sends; what comes of it is waited for.
    #[tokio::test]
    async fn restore_command_that_is_interrupted_waits_for_what_is_undone() {
        let place = Place::new();
        let (ours, theirs) = Pair::pair().unwrap();
        let error = EngineError::new(Phase::Disks, anyhow!("interrupted"));
        let process = process(theirs, true, reply(Err(&error)).unwrap());
        let reply = converse(ours, &request(&place), ready(())).await.unwrap();
        assert!(matches!(reply, Some(Reply::Failed(_))), "{reply:?}");
        process.join().unwrap();
    }

    #[tokio::test]
    async fn restore_reply_that_is_cut_is_none() {
        let place = Place::new();
        let whole = reply(Ok(&report())).unwrap();
        for answer in [&whole[..0], &whole[..whole.len() / 2], b"no JSON\n"] {
            let (ours, theirs) = Pair::pair().unwrap();
            let process = process(theirs, false, answer.to_vec());
            assert!(converse(ours, &request(&place), pending()).await.unwrap().is_none());
            process.join().unwrap();
        }
    }

    #[tokio::test]
    async fn restore_request_that_is_none_is_refused_by_the_process() {
        for line in [&b""[..], b"{}\n", b"\xff\n"] {
            assert!(asked(&mut &line[..]).await.is_err(), "{line:?}");
        }
    }

    #[test]
    fn restore_process_without_a_reply_is_explained_by_what_it_left() {
        let place = Place::new();
        let status = ExitStatus::from_raw(9);
        let said = without_reply(status, &request(&place)).to_string();
        assert!(said.contains("signal: 9") && said.contains("stillpoint attach vm"), "{said}");
        place.runtime.replace("restore.json", b"{}").unwrap();
        let said = without_reply(status, &request(&place)).to_string();
        assert!(said.contains("undoes what it left"), "{said}");
    }
}
