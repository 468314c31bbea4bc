//! The helper: one process beside each QEMU. It holds the tracker and the monitor, and takes
//! checkpoints on request.
//!
//! It may die at any moment; QEMU does not notice, and `stillpoint attach` starts another that
//! continues from what the store and QEMU itself know.
//!
//! [`serve`] is the process, or [`restore`] where it restores the VM first; [`start`] and [`attach`]
//! bring it up, a [`supervisor`] starts another one when it dies, [`client`] asks it over its
//! control socket in the words of [`control`], and [`mod@bench`] measures it.
//!
//! # Example
//!
//! A helper is asked what it is doing. Here a thread plays the helper's part:
//!
//! ```
//! use helper::client;
//! use helper::control::Request;
//! use std::io::{BufRead, BufReader, Write};
//! use std::os::unix::net::UnixListener;
//! use vm::runtime_dir::RuntimeDir;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let base = tempfile::tempdir()?;
//! let runtime = RuntimeDir::new(Some(base.path()), &"web1".parse()?)?;
//! runtime.create()?;
//! let listener = UnixListener::bind(runtime.control())?;
//! let helper = std::thread::spawn(move || -> std::io::Result<String> {
//!     let (mut stream, _) = listener.accept()?;
//!     let mut request = String::new();
//!     BufReader::new(stream.try_clone()?).read_line(&mut request)?;
//!     writeln!(stream, r#"{{"done": {{"pid": 4711, "busy": true}}}}"#)?;
//!     Ok(request)
//! });
//!
//! let status = client::status(&runtime).await?;
//! assert_eq!((status.pid, status.busy), (4711, true));
//! let request = helper.join().map_err(|_| "the thread panicked")??;
//! assert_eq!(Request::parse(&request)?, Request::Status);
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs, clippy::missing_errors_doc, clippy::missing_panics_doc)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

pub mod attach;
pub mod bench;
pub mod client;
pub mod control;
mod memory;
mod other;
pub mod restore;
mod rollback;
#[cfg(test)]
mod scene;
mod server;
pub mod start;
pub mod statistics;
pub mod supervisor;

use anyhow::Context;
use checkpoint_format::VmName;
use engine::checkpoint::Checkpointer;
use engine::restore::hydration::Hydration;
use engine::restore::in_use::InUse;
use engine::restore::lazy_disks::Disks;
use sd_notify::NotifyState;
use std::path::Path;
use std::sync::Arc;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use vm::error::{EngineError, InPhase, Phase};
use vm::running::Vm;
use vm::runtime_dir::{Failure, RuntimeDir};

/// What [`start::spawn`] starts: attaches to the VM and serves.
///
/// # Errors
/// When the VM cannot be attached to. The runtime directory says why, too, for the command that
/// started this process.
pub async fn run(runtime_base: Option<&Path>, name: &VmName) -> Result<(), EngineError> {
    let runtime = RuntimeDir::new(runtime_base, name).in_phase(Phase::Open)?;
    let result = serve(runtime.clone()).await;
    if let Err(error) = &result {
        runtime.set_helper_failure(&Failure::of(error));
    }
    result
}

/// Serves until QEMU ends or a signal ends the helper.
///
/// # Errors
/// When another helper holds the VM, or the VM cannot be attached to.
pub async fn serve(runtime: RuntimeDir) -> Result<(), EngineError> {
    let _lock = runtime.lock_helper().in_phase(Phase::Attach)?;
    let control = listen(&runtime)?;
    let socket = runtime.control();
    let attached = attach(runtime).await;
    let result = match attached {
        Ok((checkpointer, to_come)) => serve_vm(checkpointer, to_come, control).await,
        Err(error) => Err(error),
    };
    remove(&socket);
    result
}

/// From now on this process is the VM's helper.
fn listen(runtime: &RuntimeDir) -> Result<UnixListener, EngineError> {
    let pid = std::process::id().to_string();
    runtime.replace("helper.pid", pid.as_bytes()).in_phase(Phase::Attach)?;
    server::listen(runtime).in_phase(Phase::Attach)
}

/// What of a lazily restored VM is still to come from the store.
#[derive(Clone, Default)]
struct ToCome {
    hydration: Option<Hydration>,
    disks: Option<Disks>,
}

async fn attach(runtime: RuntimeDir) -> Result<(Checkpointer, ToCome), EngineError> {
    // First of all: QEMU may answer only when a page or block has come that an earlier helper did
    // not bring.
    let disks = Disks::resume(&runtime)?;
    let hydration = Hydration::resume(&runtime).await?;
    // An adoption that an earlier helper did not live to end decides which QEMU that is.
    engine::adopt::recover(&runtime).await?;
    let vm = Vm::attach(runtime).await?;
    if let Some(hydration) = &hydration {
        hydration.set_monitor(&vm.qmp);
    }
    // Records the VM's first devices and disks, and warns at once if the VM cannot be checkpointed;
    // the user may fix that while the VM runs.
    for error in [vm.check_devices().await.err(), vm.disks().await.err()].into_iter().flatten() {
        tracing::warn!(error = format!("{error:#}"), "no checkpoint can be taken as the VM is");
    }
    let mut checkpointer = Checkpointer::new(vm);
    // A guest that a dying helper left stopped must not wait for the next checkpoint.
    checkpointer.clean_up().await?;
    rollback::warn_of_half(&checkpointer);
    if let Some(disks) = &disks {
        disks.copy(&checkpointer.vm.qmp);
    }
    Ok((checkpointer, ToCome { hydration, disks }))
}

async fn serve_vm(
    mut checkpointer: Checkpointer,
    to_come: ToCome,
    control: UnixListener,
) -> Result<(), EngineError> {
    if let Some(hydration) = &to_come.hydration {
        checkpointer.follow(Arc::new(hydration.clone()));
    }
    if let Some(disks) = &to_come.disks {
        checkpointer.follow_disks(Arc::new(disks.clone()));
    }
    let vm = &checkpointer.vm;
    let name = vm.file.name.clone();
    tracing::info!(%name, qemu = vm.pid, version = %vm.facts.qemu, accelerator = vm.facts.accelerator.as_str(), "attached");
    let in_use = InUse::begin(&vm.file, to_come.hydration.as_ref(), to_come.disks.as_ref())?;
    let server = server::Server::new(checkpointer, to_come);
    notify(&[NotifyState::Ready, NotifyState::Status(&format!("attached to {name}"))]);
    let terminate = signal(SignalKind::terminate()).context("listening for SIGTERM");
    let mut terminate = terminate.in_phase(Phase::Attach)?;
    tokio::select! {
        () = server.run(control) => {},
        () = server.vm_ended() => {
            tracing::info!(%name, "QEMU has ended");
            if let Some(in_use) = &in_use {
                in_use.end().await;
            }
        }
        _ = terminate.recv() => tracing::info!(%name, "asked to end"),
        _ = tokio::signal::ctrl_c() => tracing::info!(%name, "interrupted"),
    }
    notify(&[NotifyState::Stopping]);
    server.end().await;
    Ok(())
}

/// Tells systemd, if it started this helper.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "telling the service manager");
    }
}

fn remove(socket: &Path) {
    // The socket may be missing: another process may have removed it before.
    let _ = std::fs::remove_file(socket);
}
