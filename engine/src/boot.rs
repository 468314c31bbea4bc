//! Turns an ordinary QEMU command line into a managed VM: everything up to the `exec` by which the
//! calling process *becomes* QEMU, with the same pid, terminal and exit status. So a wrapper can
//! take the place of QEMU's program.

use crate::progress::Progress;
use crate::stores;
use anyhow::{Context, Error, Result};
use checkpoint_format::VmName;
use dirty_tracker::{GuestMemory, HostSupport};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use vm::error::{EngineError, InPhase, Phase, refused};
use vm::launch::command::{self, Start};
use vm::launch::{
    self, accelerator, arguments, first_start, normalize, qemu_binary, readconfig, unsupported,
};
use vm::runtime_dir::{RuntimeDir, VmFile};

/// The VM that is wanted.
pub struct Request {
    /// Its name in the store, and that of its runtime directory.
    pub name: VmName,
    /// The store's URL.
    pub store: String,
    /// Where the runtime directories are; none for the default.
    pub runtime_base: Option<PathBuf>,
    /// Directory for temporary fleecing overlays; none for the default.
    pub fleecing: Option<PathBuf>,
    /// QEMU's program: a path, or a name that is found on the PATH.
    pub qemu: String,
    /// QEMU's arguments, as its user wrote them.
    pub arguments: Vec<String>,
}

/// A VM whose runtime directory and memory exist, and whose QEMU does not run yet.
pub struct Prepared {
    /// Where its sockets, logs and records are.
    pub runtime: RuntimeDir,
    vm: VmFile,
    memory: GuestMemory,
    plugin: PathBuf,
    /// Arguments of its first start only, which are not saved.
    first: Vec<String>,
}

impl Prepared {
    /// Checks the command line and this host, then makes the runtime directory and the memory.
    ///
    /// # Errors
    /// Refused where the VM could not be checkpointed, or one of its name is there.
    pub fn of(request: &Request, progress: &dyn Progress) -> Result<Self, EngineError> {
        Self::prepare(request, progress).in_phase(Phase::Plan)
    }

    fn prepare(request: &Request, progress: &dyn Progress) -> Result<Self> {
        let plugin = launch::plugin_path()?;
        let runtime = RuntimeDir::new(request.runtime_base.as_deref(), &request.name)?;
        stores::connect(&stores::absolute(&request.store)?)?;
        let (vm, first) = describe(request, &plugin, progress)?;
        runtime.create()?;
        refuse_running(&runtime)?;
        runtime.forget_earlier()?;
        runtime.save_vm(&vm)?;
        let memory = GuestMemory::create(vm.name.as_ref(), vm.ram_bytes)
            .context("making the guest's memory")?;
        Ok(Self { runtime, vm, memory, plugin, first })
    }

    /// This process becomes QEMU. Returns only on failure.
    pub fn exec(self) -> EngineError {
        EngineError::new(Phase::Start, self.become_qemu())
    }

    fn become_qemu(self) -> Error {
        let Self { runtime, vm, memory, plugin, first } = self;
        if let Err(error) = memory.set_inheritable(true) {
            return error.into();
        }
        let start = Start::Boot(&first);
        let words = command::arguments(&vm, &runtime, Some(&plugin), memory.raw_fd(), start);
        let error = Command::new(&vm.qemu).args(words).exec();
        Error::from(error).context(format!("starting {}", vm.qemu.display()))
    }
}

/// The VM, and what its first start alone has on the command line.
fn describe(
    request: &Request,
    plugin: &Path,
    progress: &dyn Progress,
) -> Result<(VmFile, Vec<String>)> {
    let qemu = launch::find_program(&request.qemu)?;
    let facts = qemu_binary::probe(&qemu, plugin)?;
    let options = readconfig::expand(arguments::parse(&request.arguments)?)?;
    let directory = std::env::current_dir().context("asking for the current directory")?;
    unsupported::check(&options, qemu_cmdline::unsupported::Command::Run, &directory)
        .map_err(|error| refused(error.to_string()))?;
    check_host()?;
    let accelerator = accelerator::choose(&options, &qemu);
    progress
        .note(&format!("{} runs on {} ({})", request.name, accelerator.name, accelerator.reason));
    let options = accelerator::without(options);
    let (options, first) = first_start::split(options);
    let normalized = normalize::normalize(options, &facts)?;
    let vm = VmFile {
        format: VmFile::FORMAT,
        name: request.name.clone(),
        store: stores::absolute(&request.store)?,
        instance: launch::new_instance()?,
        qemu,
        // By exec this process becomes QEMU, unless that forks once more.
        pid: (!first.iter().any(|word| word == "-daemonize")).then(std::process::id),
        qemu_version: facts.version,
        machine_type: normalized.machine_type,
        accelerator: accelerator.name,
        ram_bytes: normalized.ram_bytes,
        ram_block: normalized.ram_block,
        arguments: arguments::words(&normalized.options),
        fleecing: launch::fleecing_dir(request.fleecing.as_deref())?,
        directory,
        restored_from: None,
        external: None,
    };
    Ok((vm, first))
}

/// Checks, before the guest starts, that the kernel and our rights let the tracker work.
fn check_host() -> Result<()> {
    let host = HostSupport::probe();
    if host.can_track {
        return Ok(());
    }
    let missing = host.checks.iter().filter(|check| !check.ok);
    let missing = missing.map(|check| {
        format!(
            "{}: {}; {}",
            check.name,
            check.detail,
            check.remedy.unwrap_or("see 'stillpoint doctor'")
        )
    });
    Err(refused(format!(
        "this host cannot track a guest's writes: {}",
        missing.collect::<Vec<_>>().join(". ")
    )))
}

fn refuse_running(runtime: &RuntimeDir) -> Result<()> {
    launch::refuse_alive(runtime)?;
    let _free = runtime.lock_helper()?;
    launch::refuse_half_restored(runtime)?;
    for socket in [runtime.qmp(), runtime.plugin(), runtime.control(), runtime.nbd()] {
        // Left by a VM that has ended; QEMU makes them again.
        let _ = std::fs::remove_file(socket);
    }
    Ok(())
}
