//! A running VM gets a helper again: what has to be so first.

use crate::other::OtherHelper;
use anyhow::{Result, bail};
use std::time::{Duration, Instant};
use vm::error::refused;
use vm::external;
use vm::launch;
use vm::process::Signal;
use vm::runtime_dir::{RuntimeDir, VmFile};

/// What a helper gets to end in order.
const GRACE: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The VM that a helper of this directory would attach to.
///
/// # Errors
/// Refused while another helper holds the VM, when it does not run, or when it was restored only by
/// half.
pub fn check(runtime: &RuntimeDir) -> Result<VmFile> {
    let vm = runtime.vm()?;
    drop(runtime.lock_helper()?);
    launch::refuse_half_restored(runtime)?;
    check_running(&vm, runtime)?;
    Ok(vm)
}

fn check_running(vm: &VmFile, runtime: &RuntimeDir) -> Result<()> {
    if runtime.adoption().exists() {
        // Which of the two QEMUs is the VM is for the helper to find out.
        return Ok(());
    }
    if vm.external.is_some() {
        return Ok(external::check_alive(runtime, vm)?);
    }
    let socket = runtime.plugin();
    match std::os::unix::net::UnixStream::connect(&socket) {
        Ok(_) => Ok(()),
        Err(_) => Err(refused(format!(
            "{} does not run: no process answers at {}",
            vm.name,
            socket.display()
        ))),
    }
}

/// Ends the helper that holds the VM, by force if it does not listen. The guest does not notice
/// either way.
///
/// # Errors
/// When the process that holds the VM is no helper of it, or does not end.
pub async fn end_other(runtime: &RuntimeDir) -> Result<()> {
    for signal in [Signal::TERM, Signal::KILL] {
        let end = Instant::now() + GRACE;
        while Instant::now() < end {
            if runtime.lock_helper().is_ok() {
                return Ok(());
            }
            if let Some(other) = OtherHelper::find(runtime)? {
                other.signal(signal);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
    bail!(
        "the other helper of this VM does not end; its pid is in {}",
        runtime.helper_pid().display()
    )
}
