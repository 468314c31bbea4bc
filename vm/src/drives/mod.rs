//! The drives of a running VM on its command line: which option each disk comes from, and the
//! command line that would build the drives as they are now.
//!
//! QEMU's drives change while it runs: media are ejected and changed, nodes are added and deleted,
//! chains get shorter. A restore starts QEMU by a command line, so the one that is saved with a
//! checkpoint is not the one that QEMU was started by but the one that makes what runs. Where none
//! can, the VM is refused, before anything is taken.

mod auto_id;
mod empty_overlay;
mod error_policy;
mod line;
mod open_files;
mod option;
mod saved;
#[cfg(test)]
mod test;

use crate::error::{VmError, refused};
use crate::launch;
use crate::launch::arguments::QemuOption;
use crate::launch::own_files::Running;
use anyhow::{Error, Result};
use auto_id::Board;
use line::Line;
use qmp_bridge::disks::{self, BackingImage, Disk, EmptyDrive};
use std::path::Path;

pub use error_policy::stop_at_errors;
pub use open_files::OpenFiles;
pub use saved::{as_device, on_what_images_name};

/// The disks of a VM, each under its name in the store, and the command line that makes them.
#[derive(Debug)]
pub struct Drives {
    /// Disks with a medium.
    pub disks: Vec<Disk>,
    /// Drives without a medium.
    pub empty: Vec<EmptyDrive>,
    /// The files that QEMU holds open.
    pub open: OpenFiles,
    /// A medium or node that is another than the command line said at the start, if there is one.
    pub changed: Option<String>,
    /// To be saved with a checkpoint.
    pub options: Vec<QemuOption>,
}

/// The command line of a running VM.
pub struct Started<'a> {
    /// The options that QEMU was started with.
    pub options: &'a [QemuOption],
    /// Versioned.
    pub machine_type: &'a str,
    /// QEMU's working directory.
    pub directory: &'a Path,
    /// QEMU's process.
    pub pid: u32,
}

/// Compares what runs with the command line.
///
/// # Errors
/// A refusal that names the disk and says what to do, where no command line could build the VM's
/// drives as they are.
pub fn examine(found: disks::Disks, started: &Started<'_>) -> Result<Drives, VmError> {
    let line = Line {
        options: started.options,
        directory: started.directory,
        board: Board::of(started.machine_type),
    };
    let disks::Disks { mut disks, empty, unused } = found;
    for (node, disk) in unused {
        // Other nodes were added at run time, by another QMP client; they are no part of the VM.
        if line.defines_node(&node) {
            disks.push(disk.map_err(Error::from)?);
        }
    }
    line.name(&mut disks);
    let (options, changed) = saved::command_line(&line, &disks, &empty)?;
    Ok(Drives { disks, empty, open: OpenFiles::of(started.pid)?, options, changed })
}

impl Drives {
    /// Whether the drives are what they were when `other` was read.
    pub fn is_same(&self, other: &Self) -> bool {
        (&self.disks, &self.empty, &self.options) == (&other.disks, &other.empty, &other.options)
    }

    /// The images of a disk that are only read, top to bottom, without overlays that hold nothing.
    pub fn layers(&self, disk: &Disk) -> Vec<BackingImage> {
        empty_overlay::without(disk.layers(), &self.open)
    }
}

/// That a restore could start the VM from the command line that is saved: every file that it names
/// is in the checkpoint. `arguments`: as QEMU was started, in `directory`.
pub(crate) fn check_command_line(
    arguments: &[String],
    directory: &Path,
    drives: &Drives,
    qemu: Running<'_>,
) -> Result<()> {
    let boot_files = launch::paths::boot_files_of(arguments, directory)?;
    let data = match launch::paths::missing_boot_file(&drives.options, &boot_files) {
        None => Vec::new(),
        Some(name) => qemu.data_directories().map_err(|error| {
            refused(format!("{name} is no file in QEMU's working directory, and whether it is one of QEMU's own is not known: {error:#}"))
        })?,
    };
    launch::saved::check_carried(
        &launch::arguments::words(&drives.options),
        directory,
        &drives.disks,
        &boot_files,
        &data,
    )
}
