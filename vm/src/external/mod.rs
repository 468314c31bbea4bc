//! A running external QEMU: its identity, and the command line by which it can be started again
//! elsewhere.
//!
//! Everything is read from the running process and from its monitor; nothing in it is changed. What
//! is found is written down in the runtime directory, as `stillpoint run` does for a managed VM,
//! so that every later helper continues from there.

mod monitor;
pub(crate) mod owner;
pub mod probe;

use crate::drives;
use crate::error::{EngineError, InPhase, Phase, VmError, refused};
use crate::launch::command::MONITOR_CHARDEV;
use crate::launch::external::ExternalVm;
use crate::launch::process::QemuProcess;
use crate::launch::{self, arguments, instance};
use crate::memory_source::{
    Chosen, EngineChoice, StreamChoice, can_pre_copy_live, choose_stream, choose_tracker,
};
use crate::process;
use crate::process_memory::ProcessMemory;
use crate::qemu_lock::QemuLock;
use crate::reopen;
use crate::runtime_dir::{External, RuntimeDir, VmFile};
use anyhow::{Context, Result};
use checkpoint_format::VmName;
use monitor::MonitorConnection;
use probe::Probe;
use qmp_bridge::Qmp;
use qmp_bridge::migration::StreamMode;
use std::path::PathBuf;

/// What the owner of an external VM wants.
pub struct Wanted {
    /// The VM's QMP socket.
    pub monitor: PathBuf,
    /// Its URL, which was checked.
    pub store: String,
    /// Directory for temporary fleecing overlays; none for the default.
    pub fleecing: Option<PathBuf>,
    /// What its owner chose.
    pub engine: EngineChoice,
    /// What its owner chose for the stream engine.
    pub stream: StreamChoice,
}

/// What `attach` tells about a VM that it found.
pub struct Found {
    /// The engine, and why this one.
    pub engine: String,
}

/// Writes down what a helper has to know of the VM behind the monitor.
///
/// # Errors
/// If no QEMU answers there, another one has the name, or no engine can checkpoint the VM as it is.
pub async fn describe(
    runtime: &RuntimeDir,
    name: &VmName,
    wanted: Wanted,
) -> Result<Found, EngineError> {
    probe_and_save(runtime, name, wanted).await.in_phase(Phase::Attach)
}

async fn probe_and_save(runtime: &RuntimeDir, name: &VmName, wanted: Wanted) -> Result<Found> {
    let Wanted { monitor, store, fleecing, engine, stream } = wanted;
    let monitor = std::path::absolute(&monitor)
        .with_context(|| format!("making {} absolute", monitor.display()))?;
    let mut earlier = None;
    let look = Probe::at(&monitor, |process| {
        refuse_ours(process)?;
        // First: a helper of this name says how to replace it.
        earlier = known(runtime, process)?;
        refuse_taken(runtime, process.pid, process.started)?;
        Ok(())
    });
    let look = look.await?;
    if let Some(why) = look.foreign_user() {
        return Err(refused(why));
    }
    let found = look.parse()?;
    let drives = look.drives(&found).await?;
    let tracker = look.tracker(&found).await;
    let chosen = match choose_tracker(engine, &tracker)? {
        Some(chosen) => chosen,
        None => choose_from_streams(&look, &found, stream).await?,
    };
    if chosen.engine.mode() == Some(StreamMode::PreCopy) {
        reopen::check(look.process.pid, &drives)?;
    }
    let file = VmFile {
        format: VmFile::FORMAT,
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
        fleecing: launch::fleecing_dir(fleecing.as_deref())?,
        restored_from: None,
        external: Some(External {
            monitor,
            plugin: found.plugin.filter(|_| tracker.is_ok()),
            started: look.process.started,
            engine,
            stream,
        }),
    };
    drives::check_command_line(&file.arguments, &file.directory, &drives, look.running())?;
    for dropped in &found.dropped {
        let (what, why) = (&dropped.what, &dropped.why);
        tracing::info!(what, why, "a restored VM is started without it");
    }
    save(runtime, &file, earlier.as_ref())?;
    Ok(Found { engine: format!("{}: {}", chosen.engine.name(), chosen.why) })
}

/// A checkpoint chooses again; what cannot be had at all is refused before a helper is started.
async fn choose_from_streams(
    look: &Probe,
    found: &ExternalVm,
    wanted: StreamChoice,
) -> Result<Chosen> {
    let support = look.support().await?;
    let process_memory = ProcessMemory::check(&look.qmp, look.process.pid, support.stopped).await;
    let live = can_pre_copy_live(&look.facts.qemu, look.facts.accelerator);
    let has_plugin = found.plugin.is_some();
    Ok(choose_stream(wanted, &support, live, has_plugin, &process_memory)?)
}

/// What is known under that name already; refused if a VM of that name runs that is not this
/// process.
fn known(runtime: &RuntimeDir, process: &QemuProcess) -> Result<Option<VmFile>> {
    if !runtime.path().exists() {
        return Ok(None);
    }
    if std::os::unix::net::UnixStream::connect(runtime.plugin()).is_ok() {
        return Err(refused(format!(
            "a VM of this name, started by Stillpoint, runs at {}; give this one another --name",
            runtime.path().display()
        )));
    }
    drop(runtime.lock_helper()?);
    if runtime.adoption().exists() {
        return Err(refused(
            "an adoption of this VM was interrupted; 'stillpoint attach NAME' (without --qmp) completes or undoes it",
        ));
    }
    let Ok(file) = runtime.vm() else { return Ok(None) };
    let (Some(there), Some(pid)) = (&file.external, file.pid) else { return Ok(Some(file)) };
    let is_other = (pid, there.started) != (process.pid, process.started);
    if is_other && process::started(pid) == Some(there.started) {
        return Err(refused(format!(
            "{} is the name of another QEMU that runs (pid {pid}); give this one another --name",
            file.name
        )));
    }
    Ok(Some(file))
}

/// The same process under the same name continues where it was; another begins again.
fn save(runtime: &RuntimeDir, file: &VmFile, earlier: Option<&VmFile>) -> Result<()> {
    runtime.create()?;
    if earlier.is_none_or(|earlier| earlier.instance != file.instance) {
        runtime.forget_earlier()?;
    }
    Ok(runtime.save_vm(file)?)
}

/// A VM of ours has its monitor and its helper already.
fn refuse_ours(process: &QemuProcess) -> Result<()> {
    let chardev = format!("chardev={MONITOR_CHARDEV}");
    let ours = process.words.iter().find(|word| word.split(',').any(|key| key == chardev));
    match ours {
        None => Ok(()),
        Some(_) => Err(refused(format!(
            "QEMU {} was started by Stillpoint; give it a helper by its name: stillpoint attach NAME",
            process.pid
        ))),
    }
}

/// Two helpers would take each other's captures apart.
fn refuse_taken(runtime: &RuntimeDir, pid: u32, started: u64) -> Result<()> {
    let base = runtime.path().parent().unwrap_or(runtime.path());
    for (other, file) in RuntimeDir::known(Some(base)) {
        if other.path() == runtime.path() {
            continue;
        }
        let is_same =
            file.pid == Some(pid) && file.external.is_some_and(|there| there.started == started);
        if is_same && other.lock_helper().is_err() {
            return Err(refused(format!(
                "that QEMU (pid {pid}) is attached as {} already, and its helper lives; use that name",
                file.name
            )));
        }
    }
    // Whatever directory it was attached from.
    drop(QemuLock::take(pid)?);
    Ok(())
}

/// Checks that the VM of a runtime directory is still the process that its file describes, and no
/// other.
///
/// # Errors
/// Refused if it has ended, is another process, or has another helper.
pub fn check_alive(runtime: &RuntimeDir, file: &VmFile) -> Result<(), VmError> {
    let (Some(there), Some(pid)) = (&file.external, file.pid) else { return Ok(()) };
    let known = instance::of_process(pid, there.started, &file.store, &file.name)?;
    if known != file.instance || process::started(pid) != Some(there.started) {
        return Err(refused(format!(
            "{} does not run: its QEMU (pid {pid}) has ended; attach to the one that runs now by --qmp SOCKET, or restore it",
            file.name
        ))
        .into());
    }
    Ok(refuse_taken(runtime, pid, there.started)?)
}

/// The monitor of a VM that was written down.
pub(crate) async fn connect(file: &VmFile, there: &External) -> Result<Qmp> {
    let line = MonitorConnection::open(&there.monitor).await?;
    let peer = line.qemu(&there.monitor)?;
    if Some(peer.pid) != file.pid {
        return Err(refused(format!(
            "the monitor {} of {} is that of another process now (pid {}); attach to that one by --qmp under another name",
            there.monitor.display(),
            file.name,
            peer.pid
        )));
    }
    line.greet(&there.monitor).await
}
