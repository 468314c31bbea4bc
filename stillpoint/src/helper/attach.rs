//! `stillpoint attach`: a running machine gets a helper again.

use super::client;
use super::other::OtherHelper;
use crate::checkpoint::{Force, StoreSession};
use crate::cli::AttachArgs;
use crate::control::{Failure, Request};
use crate::exit::{coded, refused};
use crate::launch;
use crate::runtime::{MachineFile, RuntimeDir};
use crate::terminal::out;
use anyhow::{Result, bail};
use checkpoint_store::Mode;
use rustix::process::Signal;
use serde_json::Value;
use std::time::{Duration, Instant};

/// A helper is up in tens of milliseconds; a busy host may need longer.
const PATIENCE: Duration = Duration::from_secs(30);
/// What a helper gets to end in order.
const GRACE: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(20);

pub async fn run(args: AttachArgs) -> Result<()> {
    let name = args.machine()?;
    let runtime = RuntimeDir::new(args.runtime.runtime_dir.as_deref(), name)?;
    if args.take_over && runtime.path().exists() {
        end_other(&runtime).await?;
    }
    let found = match &args.qmp {
        Some(monitor) => Some(super::unprepared::describe(&runtime, name, monitor, &args).await?),
        None => None,
    };
    let machine = runtime.machine()?;
    drop(runtime.lock_helper()?);
    launch::refuse_half_restored(&runtime)?;
    check_running(&machine, &runtime)?;
    if args.take_over {
        // At once, and by this command: a helper that remembered the order would carry it out whenever it next starts.
        StoreSession::open(&machine, &runtime, Mode::CreateIfMissing, Force::TakeOver).await?;
    }
    if args.foreground {
        return super::serve(runtime).await;
    }
    launch::spawn_helper(name, args.runtime.runtime_dir.as_deref(), &runtime)?;
    let status = wait(&runtime).await?;
    out!(
        "helper {} is attached to {} (QEMU {}, pid {})",
        status["pid"],
        machine.name,
        status["qemu_version"].as_str().unwrap_or("?"),
        status["qemu_pid"]
    );
    if let Some(found) = found {
        out!("engine {}", found.engine);
    }
    Ok(())
}

fn check_running(machine: &MachineFile, runtime: &RuntimeDir) -> Result<()> {
    if runtime.adoption().exists() {
        // Which of the two QEMUs is the machine is for the helper to find out.
        return Ok(());
    }
    if machine.unprepared.is_some() {
        return super::unprepared::check_alive(runtime, machine);
    }
    let socket = runtime.plugin();
    match std::os::unix::net::UnixStream::connect(&socket) {
        Ok(_) => Ok(()),
        Err(_) => Err(refused(format!("{} does not run: nobody answers at {}", machine.name, socket.display()))),
    }
}

/// Ends the helper that holds the machine, by force if it does not listen. The guest does not notice either way.
async fn end_other(runtime: &RuntimeDir) -> Result<()> {
    for signal in [Signal::TERM, Signal::KILL] {
        let end = Instant::now() + GRACE;
        while Instant::now() < end {
            if runtime.lock_helper().is_ok() {
                return Ok(());
            }
            if let Some(other) = OtherHelper::find(runtime)? {
                other.signal(signal);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
    bail!("the other helper of this machine does not end; its pid is in {}", runtime.helper_pid().display())
}

/// Until the helper of the VM answers, or has said why it ended.
pub async fn wait(runtime: &RuntimeDir) -> Result<Value> {
    let end = Instant::now() + PATIENCE;
    loop {
        let error = match client::ask(runtime, &Request::Status).await {
            Ok(status) => return Ok(status),
            Err(error) => error,
        };
        if let Some(Failure { message, exit_code }) = runtime.helper_failure() {
            return Err(coded(exit_code, format!("the helper ended: {message}; its log is {}", runtime.helper_log().display())));
        }
        if Instant::now() >= end {
            bail!("the helper did not come up within {PATIENCE:?} ({error:#}); see its log {}", runtime.helper_log().display());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
