//! `stillpoint run`: an ordinary QEMU command line becomes a machine that can be checkpointed.
//!
//! The process prepares the machine, leaves a helper behind (detached, in a session of its own) and then *becomes*
//! QEMU by exec: same pid, same terminal, same exit status. So a wrapper can put it where QEMU stood, and QEMU never
//! depends on a helper that lives.

pub mod accelerator;
pub mod command;
pub mod expected;
mod first_start;
pub mod foreign;
pub mod inherited;
pub mod instance;
mod memory;
pub mod normalize;
pub mod paths;
pub mod probe;
pub mod process;
mod readconfig;
pub mod refuse;
mod refuse_disks;
pub mod saved;

pub use qemu_cmdline::{arguments, form};

use crate::cli::RunArgs;
use crate::exit::refused;
use crate::files;
use crate::runtime::{MachineFile, RuntimeDir};
use crate::stores;
use anyhow::{Context, Result, anyhow, bail};
use checkpoint_format::VmName;
use command::Start;
use dirty_tracker::{GuestMemory, HostSupport};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub struct RunRequest {
    pub name: VmName,
    pub store: String,
    pub runtime_base: Option<PathBuf>,
    pub scratch: Option<PathBuf>,
    pub qemu: String,
    pub arguments: Vec<String>,
}

impl TryFrom<RunArgs> for RunRequest {
    type Error = anyhow::Error;

    fn try_from(args: RunArgs) -> Result<Self> {
        let mut words = args.qemu.into_iter();
        let qemu = words.next().context("no QEMU program was named after '--'")?;
        Ok(Self {
            name: args.name,
            store: args.store.store,
            runtime_base: args.runtime.runtime_dir,
            scratch: args.scratch_dir,
            qemu,
            arguments: words.collect(),
        })
    }
}

/// Returns only on failure: on success this process is QEMU.
pub fn run(request: RunRequest) -> Result<std::convert::Infallible> {
    let plugin = plugin_path()?;
    let runtime = RuntimeDir::new(request.runtime_base.as_deref(), &request.name)?;
    let (machine, first) = describe(&request, &plugin)?;
    stores::connect(&machine.store)?;
    runtime.create()?;
    refuse_running(&runtime)?;
    runtime.forget_earlier()?;
    runtime.save_machine(&machine)?;
    let memory = GuestMemory::create(machine.name.as_ref(), machine.ram_bytes).context("making the guest's memory")?;
    spawn_helper(&machine.name, request.runtime_base.as_deref(), &runtime)?;
    memory.set_inheritable(true)?;
    let words = command::arguments(&machine, &runtime, Some(&plugin), memory.raw_fd(), Start::Boot(&first));
    let error = Command::new(&machine.qemu).args(words).exec();
    Err(error).with_context(|| format!("starting {}", machine.qemu.display()))
}

/// The VM, and what its first start alone has on the command line.
fn describe(request: &RunRequest, plugin: &Path) -> Result<(MachineFile, Vec<String>)> {
    let qemu = find_program(&request.qemu)?;
    let facts = probe::probe(&qemu, plugin)?;
    let options = readconfig::expand(arguments::parse(&request.arguments)?)?;
    let directory = std::env::current_dir().context("asking for the current directory")?;
    refuse::check(&options, refuse::Rules::Launched, &directory).map_err(|error| refused(error.to_string()))?;
    check_host()?;
    let accelerator = accelerator::choose(&options, &qemu)?;
    eprintln!("stillpoint: {} runs on {} ({})", request.name, accelerator.name, accelerator.reason);
    let options = accelerator::without(options);
    let (options, first) = first_start::split(options);
    let normalized = normalize::normalize(options, &facts)?;
    let machine = MachineFile {
        format: MachineFile::FORMAT,
        name: request.name.clone(),
        store: absolute_store(&request.store)?,
        instance: new_instance()?,
        qemu,
        // By exec this process becomes QEMU, unless that forks once more.
        pid: (!first.iter().any(|word| word == "-daemonize")).then(std::process::id),
        qemu_version: facts.version,
        machine_type: normalized.machine_type,
        accelerator: accelerator.name,
        ram_bytes: normalized.ram_bytes,
        ram_block: normalized.ram_block,
        arguments: arguments::words(&normalized.options),
        scratch: scratch_dir(request.scratch.as_deref())?,
        directory,
        restored_from: None,
        unprepared: None,
    };
    Ok((machine, first))
}

/// Before the guest starts: what the tracker needs of this kernel, and of our rights.
fn check_host() -> Result<()> {
    let host = HostSupport::probe();
    if host.can_track {
        return Ok(());
    }
    let missing = host.checks.iter().filter(|check| !check.ok);
    let missing = missing.map(|check| format!("{}: {}; {}", check.name, check.detail, check.remedy.unwrap_or("see 'stillpoint doctor'")));
    Err(refused(format!("this host cannot track a guest's writes: {}", missing.collect::<Vec<_>>().join(". "))))
}

/// `file:` stores may be named relative to where the user stands; the helper stands elsewhere.
pub fn absolute_store(url: &str) -> Result<String> {
    match url.strip_prefix("file:") {
        Some(rest) if !rest.starts_with('/') => {
            let path = std::path::absolute(rest).with_context(|| format!("making store {url} absolute"))?;
            Ok(format!("file://{}", path.display()))
        }
        _ => Ok(url.to_owned()),
    }
}

/// Where the old content of disk blocks waits during a checkpoint: on a disk, never on a tmpfs.
pub fn scratch_dir(wanted: Option<&Path>) -> Result<PathBuf> {
    let path = wanted.unwrap_or(Path::new("/var/tmp"));
    std::path::absolute(path).with_context(|| format!("making {} absolute", path.display()))
}

pub fn new_instance() -> Result<String> {
    let id = files::read_text("/proc/sys/kernel/random/uuid").context("asking the kernel for a random id")?;
    Ok(id.trim().to_owned())
}

/// A VM of this name has its QEMU.
pub fn refuse_alive(runtime: &RuntimeDir) -> Result<()> {
    if std::os::unix::net::UnixStream::connect(runtime.plugin()).is_ok() {
        return Err(refused(format!("a VM of this name is running at {}; give this one another name", runtime.path().display())));
    }
    // An external VM has no plugin of ours, and its helper may be dead.
    match runtime.machine() {
        Ok(file) if command::is_running(&file.instance) => Err(refused(format!(
            "the QEMU of a VM of this name runs ({} says which); end it, or give this one another name",
            runtime.path().join("machine.json").display()
        ))),
        _ => Ok(()),
    }
}

pub fn refuse_running(runtime: &RuntimeDir) -> Result<()> {
    refuse_alive(runtime)?;
    let _free = runtime.lock_helper()?;
    refuse_half_restored(runtime)?;
    for socket in [runtime.qmp(), runtime.plugin(), runtime.control(), runtime.nbd()] {
        // Left by a machine that is gone; QEMU makes them anew.
        let _ = std::fs::remove_file(socket);
    }
    Ok(())
}

/// What a killed restore left is half a VM, which may have an original that lives.
pub fn refuse_half_restored(runtime: &RuntimeDir) -> Result<()> {
    if !runtime.restore_record().exists() {
        return Ok(());
    }
    Err(refused(format!(
        "a restore of this name was killed and has left {}; run 'stillpoint restore' again, which undoes what it left",
        runtime.restore_record().display()
    )))
}

/// Starts the helper in a session of its own, not as a child of what will be QEMU.
pub fn spawn_helper(name: &VmName, runtime_base: Option<&Path>, runtime: &RuntimeDir) -> Result<()> {
    let log = runtime.open_helper_log()?;
    runtime.forget_helper_failure()?;
    let program = std::env::current_exe().context("finding this program's own path")?;
    let mut command = Command::new("setsid");
    command.arg("--fork").arg(program).arg("helper");
    if let Some(base) = runtime_base {
        command.arg("--runtime-dir").arg(std::path::absolute(base).context("making --runtime-dir absolute")?);
    }
    command.arg(name.as_str()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).current_dir("/");
    let status = command.status().context("starting the helper through setsid (package util-linux)")?;
    if !status.success() {
        bail!("setsid could not start the helper: {status}; see {}", runtime.helper_log().display());
    }
    Ok(())
}

/// `$STILLPOINT_PLUGIN`, or the file beside this program, or in the library folder next to it.
pub fn plugin_path() -> Result<PathBuf> {
    const FILE: &str = "libstillpoint_plugin.so";
    let program = std::env::current_exe().context("finding this program's own path")?;
    let beside = program.parent().unwrap_or(Path::new("/"));
    let named = std::env::var_os("STILLPOINT_PLUGIN").filter(|value| !value.is_empty()).map(PathBuf::from);
    let places = match named {
        Some(path) => vec![path],
        None => vec![beside.join(FILE), beside.join("../lib/stillpoint").join(FILE)],
    };
    let hit = places.iter().find_map(|path| path.canonicalize().ok());
    hit.ok_or_else(|| anyhow!("the QEMU plugin {FILE} is not at {places:?}; build it by 'cargo build --release' or set STILLPOINT_PLUGIN"))
}

pub fn find_program(name: &str) -> Result<PathBuf> {
    if name.contains('/') {
        return Path::new(name).canonicalize().with_context(|| format!("looking for the program {name}"));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let hit = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
    hit.ok_or_else(|| anyhow!("there is no {name} on the PATH; install QEMU (Debian: apt-get install qemu-system-x86)"))
}
