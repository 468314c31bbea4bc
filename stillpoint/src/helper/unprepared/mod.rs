//! A running QEMU that nobody prepared: who it is, and the command line by which it can be started anew elsewhere.
//!
//! Everything is read from the running process and from its monitor; nothing in it is changed. What is found is written
//! down in the runtime directory, as `stillpoint run` does for a machine of ours, so that every later helper goes on from
//! there.

mod engine;
pub mod look;
pub mod owner;
pub mod peer;

use crate::cli::AttachArgs;
use crate::exit::refused;
use crate::launch::{self, arguments, instance, process};
use crate::runtime::{MachineFile, RuntimeDir, Unprepared};
use crate::stores;
use anyhow::{Context, Result};
use checkpoint_format::VmName;
use look::Look;
use std::path::Path;

/// What `attach` tells about a machine that it found.
pub struct Found {
    /// The engine, and why this one.
    pub engine: String,
}

/// Writes down what a helper has to know of the machine behind `monitor`.
pub async fn describe(runtime: &RuntimeDir, name: &VmName, monitor: &Path, args: &AttachArgs) -> Result<Found> {
    let store = launch::absolute_store(args.store.as_deref().context("--qmp needs --store (or STILLPOINT_STORE)")?)?;
    stores::connect(&store)?;
    let monitor = std::path::absolute(monitor).with_context(|| format!("making {} absolute", monitor.display()))?;
    let process = peer::behind(&monitor)?;
    let earlier = earlier(runtime, &process)?;
    let look = Look::at(&monitor, process).await?;
    let found = look.understand()?;
    let tracker = look.tracker(&found).await;
    let choice = engine::choose(args.engine, args.stream, &tracker, &look.support().await?)?;
    let file = MachineFile {
        format: MachineFile::FORMAT,
        name: name.clone(),
        instance: instance::of_process(look.process.pid, look.process.started, &store, name)?,
        store,
        qemu: look.process.program.clone(),
        pid: Some(look.process.pid),
        qemu_version: look.facts.qemu.to_string(),
        machine_type: found.machine_type,
        accelerator: found.accelerator,
        ram_bytes: found.ram_bytes,
        ram_block: found.ram_block,
        arguments: arguments::words(&found.options),
        directory: look.process.directory.clone(),
        scratch: launch::scratch_dir(args.scratch_dir.as_deref())?,
        restored_from: None,
        unprepared: Some(Unprepared {
            monitor,
            plugin: found.plugin.filter(|_| tracker.is_ok()),
            started: look.process.started,
            engine: args.engine,
            stream: args.stream,
        }),
    };
    for dropped in &found.dropped {
        tracing::info!(what = dropped.what, why = dropped.why, "a restored machine is started without it");
    }
    save(runtime, &file, earlier.as_ref())?;
    Ok(Found { engine: format!("{}: {}", choice.engine.name(), choice.why) })
}

/// What is known under that name already; refused if a machine of that name runs that is not this process.
fn earlier(runtime: &RuntimeDir, process: &process::QemuProcess) -> Result<Option<MachineFile>> {
    if !runtime.path().exists() {
        return Ok(None);
    }
    if std::os::unix::net::UnixStream::connect(runtime.plugin()).is_ok() {
        return Err(refused(format!(
            "a machine of this name, started by Stillpoint, runs at {}; give this one another --name",
            runtime.path().display()
        )));
    }
    drop(runtime.lock_helper()?);
    let Ok(file) = runtime.machine() else { return Ok(None) };
    let (Some(there), Some(pid)) = (&file.unprepared, file.pid) else { return Ok(Some(file)) };
    let is_other = (pid, there.started) != (process.pid, process.started);
    if is_other && process::started(pid) == Some(there.started) {
        return Err(refused(format!("{} is the name of another QEMU that runs (pid {pid}); give this one another --name", file.name)));
    }
    Ok(Some(file))
}

/// The same process under the same name goes on where it was; another begins anew.
fn save(runtime: &RuntimeDir, file: &MachineFile, earlier: Option<&MachineFile>) -> Result<()> {
    runtime.create()?;
    if earlier.is_none_or(|earlier| earlier.instance != file.instance) {
        runtime.forget_earlier()?;
    }
    runtime.save_machine(file)
}

/// That the machine of a runtime directory is still the process that it was written down for.
pub fn check_alive(file: &MachineFile) -> Result<()> {
    let (Some(there), Some(pid)) = (&file.unprepared, file.pid) else { return Ok(()) };
    let known = instance::of_process(pid, there.started, &file.store, &file.name)?;
    if known != file.instance || process::started(pid) != Some(there.started) {
        return Err(refused(format!(
            "{} does not run: its QEMU (pid {pid}) has ended; attach to the one that runs now by --qmp SOCKET, or restore it",
            file.name
        )));
    }
    let peer = peer::behind(&there.monitor)?;
    if peer.pid != pid {
        return Err(refused(format!(
            "the monitor {} of {} is that of another process now (pid {}); attach to it by --qmp under another name",
            there.monitor.display(),
            file.name,
            peer.pid
        )));
    }
    Ok(())
}
