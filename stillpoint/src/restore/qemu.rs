//! The QEMU process of a restored machine: started detached, ended again if the restore fails.

use crate::launch::command::{self, Start};
use crate::runtime::{MachineFile, RuntimeDir};
use anyhow::{Context, Error, Result};
use dirty_tracker::GuestMemory;
use qmp_bridge::said;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Dropping it ends QEMU, unless it was left to itself.
pub struct NewQemu {
    child: Option<Child>,
    log: std::path::PathBuf,
}

impl NewQemu {
    /// In a session of its own (by `setsid`), in the directory of its disks.
    pub fn start(file: &MachineFile, runtime: &RuntimeDir, plugin: &Path, memory: &GuestMemory) -> Result<Self> {
        let mut command = Command::new("setsid");
        command.arg(&file.qemu);
        Self::spawn(command, file, runtime, Some(plugin), memory)
    }

    /// `command` becomes the QEMU that its arguments follow.
    pub fn spawn(
        mut command: Command,
        file: &MachineFile,
        runtime: &RuntimeDir,
        plugin: Option<&Path>,
        memory: &GuestMemory,
    ) -> Result<Self> {
        let log = runtime.qemu_log();
        let output = runtime.create_qemu_log()?;
        let errors = output.try_clone().context("opening QEMU's log twice")?;
        memory.set_inheritable(true)?;
        command.args(command::arguments(file, runtime, plugin, memory.raw_fd(), Start::Incoming));
        command.current_dir(&file.directory).stdin(Stdio::null()).stdout(output).stderr(errors);
        let child = command.spawn().with_context(|| format!("starting {}", file.qemu.display()));
        memory.set_inheritable(false)?;
        Ok(Self { child: Some(child?), log })
    }

    /// `setsid` becomes QEMU without another fork, because it leads no process group.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// It runs on by itself.
    pub fn leave(mut self) {
        self.child = None;
    }

    /// The error with what QEMU itself said.
    pub fn explain(self, error: Error) -> Error {
        let said = said::quote_log(&self.log);
        if said.is_empty() { error } else { error.context(format!("QEMU said: {said}")) }
    }
}

impl Drop for NewQemu {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It has no guest yet; nothing is lost.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
