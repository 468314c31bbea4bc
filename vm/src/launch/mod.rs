//! Turns an ordinary QEMU command line into that of a managed VM; finds QEMU programs and reads
//! QEMU processes.

pub mod accelerator;
pub mod command;
pub mod expected_devices;
pub mod external;
pub mod first_start;
pub mod host_specific;
pub mod instance;
mod memory;
pub mod normalize;
pub(crate) mod own_files;
pub mod paths;
pub mod process;
pub mod qemu_binary;
pub mod readconfig;
pub mod saved;
pub mod spawn;
pub mod unsupported;

pub use qemu_cmdline::{arguments, form};

use crate::error::{VmError, refused};
use crate::runtime_dir::RuntimeDir;
use anyhow::Context;
use std::path::{Path, PathBuf};

/// The directory for temporary fleecing overlays: `wanted`, else `/var/tmp`, which is not a tmpfs.
///
/// # Errors
/// If the path cannot be made absolute.
pub fn fleecing_dir(wanted: Option<&Path>) -> Result<PathBuf, VmError> {
    let path = wanted.unwrap_or(Path::new("/var/tmp"));
    let absolute = std::path::absolute(path);
    Ok(absolute.with_context(|| format!("making {} absolute", path.display()))?)
}

/// An instance that no other VM has.
///
/// # Errors
/// If the kernel gives no random number.
pub fn new_instance() -> Result<String, VmError> {
    Ok(procfs::sys::kernel::random::uuid().context("asking the kernel for a random id")?)
}

/// Checks that no VM of this name is running.
///
/// # Errors
/// Refused if one is.
pub fn refuse_alive(runtime: &RuntimeDir) -> Result<(), VmError> {
    if std::os::unix::net::UnixStream::connect(runtime.plugin()).is_ok() {
        return Err(refused(format!(
            "a VM of this name is running at {}; give this one another name",
            runtime.path().display()
        ))
        .into());
    }
    // An external VM has no plugin of ours, and its helper may be dead.
    match runtime.vm() {
        Ok(file) if command::is_running(&file.instance) => Err(refused(format!(
            "the QEMU of a VM of this name runs ({} says which); end it, or give this one another name",
            runtime.path().join("machine.json").display()
        ))
        .into()),
        _ => Ok(()),
    }
}

/// Checks that no killed restore of this name has left an incomplete VM.
///
/// # Errors
/// Refused if one has.
pub fn refuse_half_restored(runtime: &RuntimeDir) -> Result<(), VmError> {
    if !runtime.restore_record().exists() {
        return Ok(());
    }
    Err(refused(format!(
        "a restore of this name was killed and has left {}; run 'stillpoint restore' again, which undoes what it left",
        runtime.restore_record().display()
    ))
    .into())
}

/// The QEMU plugin: `$STILLPOINT_PLUGIN`, else beside this program, else in `../lib/stillpoint`.
///
/// # Errors
/// If it is in none of these places.
pub fn plugin_path() -> Result<PathBuf, VmError> {
    const FILE: &str = "libstillpoint_plugin.so";
    let program = std::env::current_exe().context("finding this program's own path")?;
    let beside = program.parent().unwrap_or(Path::new("/"));
    let named =
        std::env::var_os("STILLPOINT_PLUGIN").filter(|value| !value.is_empty()).map(PathBuf::from);
    let places = match named {
        Some(path) => vec![path],
        None => vec![beside.join(FILE), beside.join("../lib/stillpoint").join(FILE)],
    };
    let hit = places.iter().find_map(|path| path.canonicalize().ok());
    Ok(hit.with_context(|| {
        format!(
            "the QEMU plugin {FILE} is not at {places:?}; build it by 'cargo build --release' or set \
             STILLPOINT_PLUGIN"
        )
    })?)
}

/// A program by its path, or by its name in `PATH`.
///
/// # Errors
/// If there is none.
pub fn find_program(name: &str) -> Result<PathBuf, VmError> {
    if name.contains('/') {
        let found = Path::new(name).canonicalize();
        return Ok(found.with_context(|| format!("looking for the program {name}"))?);
    }
    Ok(on_path(name).with_context(|| {
        format!(
            "there is no {name} on the PATH; install QEMU (Debian: apt-get install qemu-system-x86)"
        )
    })?)
}

/// The first file of that name on the PATH.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}
