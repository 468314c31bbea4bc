//! Starting a helper, and waiting until it is up.

use crate::client;
use crate::control::Status;
use anyhow::{Context, Result, bail};
use checkpoint_format::VmName;
use qmp_bridge::said;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vm::error::EngineError;
use vm::runtime_dir::RuntimeDir;

/// A helper is up in tens of milliseconds; a busy host may need longer.
const TIMEOUT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Starts the helper in a session of its own, not as a child of what will be QEMU.
///
/// # Errors
/// When the process cannot be started.
pub fn spawn(name: &VmName, runtime_base: Option<&Path>, runtime: &RuntimeDir) -> Result<()> {
    let log = runtime.open_helper_log()?;
    runtime.forget_helper_failure()?;
    let mut command = command(&["--fork"], name, runtime_base)?;
    command.stdin(Stdio::null()).stderr(log).current_dir("/");
    let status =
        command.status().context("starting the helper through setsid (package util-linux)")?;
    if !status.success() {
        bail!(
            "setsid could not start the helper: {status}; see {}",
            runtime.helper_log().display()
        );
    }
    Ok(())
}

/// This program as the helper of a VM, in a session of its own by `setsid` with `options`.
pub(crate) fn command(
    options: &[&str],
    name: &VmName,
    runtime_base: Option<&Path>,
) -> Result<Command> {
    let program = std::env::current_exe().context("finding this program's own path")?;
    let mut command = Command::new("setsid");
    command.args(options).arg(program).arg("helper");
    if let Some(base) = runtime_base {
        command
            .arg("--runtime-dir")
            .arg(std::path::absolute(base).context("making --runtime-dir absolute")?);
    }
    command.arg(name.as_str()).stdout(Stdio::null());
    Ok(command)
}

/// Until the helper of the VM answers, or has said why it ended.
///
/// # Errors
/// The helper's own, with its class; or when it does not come up in time.
pub async fn wait(runtime: &RuntimeDir) -> Result<Status> {
    let end = Instant::now() + TIMEOUT;
    loop {
        let error = match client::status(runtime).await {
            Ok(status) => return Ok(status),
            Err(error) => error,
        };
        if let Some(mut failure) = runtime.helper_failure() {
            failure.message = format!(
                "the helper ended: {}; its log is {}",
                failure.message,
                runtime.helper_log().display()
            );
            return Err(EngineError::from(failure).into());
        }
        if Instant::now() >= end {
            bail!(
                "the helper did not come up within {TIMEOUT:?} ({error:#}); \
                 its log {} ends with: {}",
                runtime.helper_log().display(),
                said::quote_log(&runtime.helper_log())
            );
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}
