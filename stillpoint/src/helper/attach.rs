//! `stillpoint attach`: a running machine gets a helper again.

use super::client;
use super::other::OtherHelper;
use crate::checkpoint::{Force, StoreSession};
use crate::cli::AttachArgs;
use crate::control::Request;
use crate::exit::refused;
use crate::launch;
use crate::runtime::{MachineFile, RuntimeDir, read_limited};
use anyhow::{Context, Result, bail};
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
    let begin = std::fs::metadata(runtime.helper_log()).map_or(0, |facts| facts.len());
    launch::spawn_helper(name, args.runtime.runtime_dir.as_deref(), &runtime)?;
    let status = wait(&runtime, begin).await?;
    println!(
        "helper {} is attached to {} (QEMU {}, pid {})",
        status["pid"],
        machine.name,
        status["qemu_version"].as_str().unwrap_or("?"),
        status["qemu_pid"]
    );
    if let Some(found) = found {
        println!("engine {}", found.engine);
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

/// Until the helper of the machine answers.
pub async fn wait(runtime: &RuntimeDir, log_begin: u64) -> Result<Value> {
    let end = Instant::now() + PATIENCE;
    loop {
        match client::ask(runtime, &Request::Status).await {
            Ok(status) => return Ok(status),
            Err(_) if Instant::now() < end && !has_failed(runtime, log_begin) => tokio::time::sleep(LOOK_EVERY).await,
            Err(error) => {
                let said = log_tail(runtime, log_begin).unwrap_or_default();
                let said = said.lines().last().unwrap_or("nothing").to_owned();
                bail!("the helper did not come up ({error:#}); its log {} ends with: {said}", runtime.helper_log().display());
            }
        }
    }
}

fn has_failed(runtime: &RuntimeDir, log_begin: u64) -> bool {
    log_tail(runtime, log_begin).is_ok_and(|text| text.lines().any(|line| line.starts_with("stillpoint: ")))
}

fn log_tail(runtime: &RuntimeDir, begin: u64) -> Result<String> {
    const MAX_LOG: u64 = 64 << 20;
    let bytes = read_limited(&runtime.helper_log(), MAX_LOG)?;
    let tail = bytes.get(begin as usize..).context("the log was cut")?;
    Ok(String::from_utf8_lossy(tail).into_owned())
}
