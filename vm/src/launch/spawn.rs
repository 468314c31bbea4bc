//! The start of QEMU as a process of its own, and the end of programs that are asked one thing.

use super::command::{self, Start};
use crate::error::VmError;
use crate::process::ProcessFd;
use crate::runtime_dir::{RuntimeDir, VmFile};
use anyhow::Context;
use dirty_tracker::GuestMemory;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// Becomes `program` in a session of its own, which the signals of our terminal do not reach.
/// `setsid` (util-linux) replaces itself: the process started is the program's.
pub fn in_own_session(program: &Path) -> Command {
    let mut command = Command::new("setsid");
    command.arg(program);
    command
}

/// Starts the QEMU that `command` becomes: paused, with the state to be loaded, in the directory of
/// its disks; what it says goes into its log.
///
/// # Errors
/// If it cannot be started.
pub fn qemu(
    mut command: Command,
    file: &VmFile,
    runtime: &RuntimeDir,
    plugin: Option<&Path>,
    memory: &GuestMemory,
) -> Result<Child, VmError> {
    let output = runtime.create_qemu_log()?;
    let errors = output.try_clone().context("opening QEMU's log twice")?;
    command.args(command::arguments(file, runtime, plugin, memory.raw_fd(), Start::Incoming));
    command.current_dir(&file.directory).stdin(Stdio::null()).stdout(output).stderr(errors);
    let about = || format!("starting {}", file.qemu.display());
    memory.set_inheritable(true).with_context(about)?;
    let child = command.spawn().with_context(about);
    memory.set_inheritable(false).with_context(about)?;
    Ok(child?)
}

/// How it ended, if it does within `timeout`.
///
/// # Errors
/// If the kernel does not tell.
pub fn ended_within(child: &mut Child, timeout: Duration) -> Result<Option<ExitStatus>, VmError> {
    // Our child: its number is its own until it has been waited for.
    let has_ended = match ProcessFd::open(child.id())? {
        Some(process) => process.wait(timeout)?,
        None => true,
    };
    Ok(if has_ended { Some(child.wait().context("taking its exit status")?) } else { None })
}
