//! A look at a running QEMU: its process, and what its monitor says. Nothing is changed.

use super::monitor::MonitorConnection;
use crate::drives::{self, Drives, Started};
use crate::error::{VmError, refused};
use crate::launch::arguments;
use crate::launch::external::{self, ExternalVm, Said};
use crate::launch::host_specific::Hold;
use crate::launch::own_files::Running;
use crate::launch::process::QemuProcess;
use crate::process;
use crate::tracked_blocks;
use anyhow::{Context, Result};
use procfs::process::FDTarget;
use qmp_bridge::Qmp;
use qmp_bridge::disks;
use qmp_bridge::migration::{self, Support};
use qmp_bridge::qmp::replies::{FdsetInfo, MachineType};
use qmp_bridge::ramblock::{self, RamBlock};
use qmp_bridge::vm::VmFacts;
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What a running QEMU says of itself, and the kernel of its process.
pub struct Probe {
    /// The process behind the monitor.
    pub process: QemuProcess,
    /// Its QMP socket.
    pub monitor: PathBuf,
    /// The connection to it.
    pub qmp: Qmp,
    /// What VM it runs.
    pub facts: VmFacts,
    /// The machine types that it has.
    pub types: Vec<MachineType>,
    /// Its RAM blocks.
    pub blocks: Vec<RamBlock>,
    /// Regular files behind `/dev/fdset/N`.
    fd_paths: HashMap<String, PathBuf>,
}

impl Probe {
    /// At whatever is behind `monitor`. `check` may refuse the process before anything is said to
    /// it.
    ///
    /// # Errors
    /// If no QEMU answers there, it refuses a question, or `check` refuses the process.
    pub async fn at(
        monitor: &Path,
        check: impl FnOnce(&QemuProcess) -> Result<(), VmError>,
    ) -> Result<Self, VmError> {
        let line = MonitorConnection::open(monitor).await?;
        let process = line.qemu(monitor)?;
        check(&process)?;
        refuse_other_root(process.pid)?;
        let qmp = line.greet(monitor).await?;
        let facts = VmFacts::read(&qmp)
            .await
            .map_err(|error| not_built(&process).unwrap_or_else(|| error.into()));
        let facts = facts.context("asking QEMU what VM it runs")?;
        let types = qmp.query_machine_types().await.context("asking QEMU for its machine types")?;
        let blocks = ramblock::ram_blocks(&qmp).await.context("asking QEMU for its RAM blocks")?;
        let sets = qmp.query_fdsets().await.context("asking QEMU for its descriptors")?;
        let fd_paths = fd_paths(&sets, process.pid);
        Ok(Self { process, monitor: monitor.to_owned(), qmp, facts, types, blocks, fd_paths })
    }

    /// The VM as it can be started again.
    ///
    /// # Errors
    /// Refused if its command line has what cannot be restored.
    pub fn parse(&self) -> Result<ExternalVm, VmError> {
        let hold = Hold {
            monitor: &self.monitor,
            directory: &self.process.directory,
            tap: &|descriptor| self.process.tap(descriptor),
            fd_path: &|path| self.fd_paths.get(path).cloned(),
        };
        let said = Said { facts: &self.facts, types: &self.types, blocks: &self.blocks };
        Ok(external::parse(&self.process.words, &hold, &said)?)
    }

    /// Whether the tracker can follow the VM's memory, or why not.
    ///
    /// # Errors
    /// Why not, in words.
    pub async fn tracker(&self, found: &ExternalVm) -> Result<(), String> {
        let Some(socket) = &found.plugin else {
            return Err("Stillpoint's plugin is not loaded in this QEMU".to_owned());
        };
        tracked_blocks::can_track(&self.qmp, socket.clone(), self.process.pid, &found.ram_block)
            .await
            .map_err(|error| format!("{error:#}"))
    }

    /// Its disks, on the command line that would be saved.
    ///
    /// # Errors
    /// If QEMU does not list its disks, or one cannot be part of a checkpoint.
    pub async fn drives(&self, found: &ExternalVm) -> Result<Drives, VmError> {
        let directory = &self.process.directory;
        let listed =
            disks::list(&self.qmp, Some(directory)).await.context("asking QEMU for its disks")?;
        let (options, machine_type, pid) = (&found.options, &found.machine_type, self.process.pid);
        drives::examine(listed, &Started { options, machine_type, directory, pid })
    }

    /// Why this user's helper could not do its part. QEMU gets files and sockets as descriptors, so
    /// its own user needs no right to anything; the helper needs root's to look into a process of
    /// another user.
    pub fn foreign_user(&self) -> Option<String> {
        let (ours, theirs) = (nix::unistd::geteuid().as_raw(), self.process.user);
        (theirs != ours && ours != 0)
            .then(|| format!("QEMU runs as user {theirs} and this helper as user {ours}; run Stillpoint as root or as user {theirs}"))
    }

    /// Whether the files of that command line, on which `drives` are, would be in a checkpoint.
    ///
    /// # Errors
    /// Refused if one would not be.
    pub fn check_files(&self, found: &ExternalVm, drives: &Drives) -> Result<(), VmError> {
        let (words, directory) = (arguments::words(&found.options), &self.process.directory);
        Ok(drives::check_command_line(&words, directory, drives, self.running())?)
    }

    /// What the drives are compared with.
    pub fn running(&self) -> Running<'_> {
        Running { program: &self.process.program, pid: self.process.pid }
    }

    /// What this QEMU's migration can do.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub async fn support(&self) -> Result<Support, VmError> {
        Ok(migration::probe(&self.qmp).await.context("asking what QEMU's migration can do")?)
    }
}

/// QEMU is sent the paths of sockets and files, and has to find the same there.
fn refuse_other_root(pid: u32) -> Result<(), VmError> {
    let identity = |root: &str| std::fs::metadata(root).map(|root| (root.dev(), root.ino()));
    let there = identity(&format!("/proc/{pid}/root/"))
        .with_context(|| format!("looking at the root directory of QEMU (pid {pid})"))?;
    if there == identity("/").context("looking at our own root directory")? {
        return Ok(());
    }
    Err(refused(format!(
        "QEMU (pid {pid}) has another root directory (-chroot, a container?), where it does not \
         see Stillpoint's files; run Stillpoint there, or start the VM without it"
    ))
    .into())
}

/// A QEMU that was started with `-preconfig` answers few commands until `x-exit-preconfig`.
fn not_built(process: &QemuProcess) -> Option<anyhow::Error> {
    let waits =
        process.words.iter().any(|word| matches!(word.as_str(), "-preconfig" | "--preconfig"));
    waits.then(|| refused("QEMU waits in -preconfig and has no VM yet; send it `x-exit-preconfig`, then attach again"))
}

/// `/dev/fdset/N` by the file that the first descriptor of the set is.
fn fd_paths(sets: &[FdsetInfo], pid: u32) -> HashMap<String, PathBuf> {
    let path = |set: &FdsetInfo| {
        let descriptor = set.fds.first()?.fd;
        let FDTarget::Path(file) = process::open(pid).ok()?.fd_from_fd(descriptor).ok()?.target
        else {
            return None;
        };
        (!file.starts_with("/dev")).then(|| (format!("/dev/fdset/{}", set.fdset_id), file))
    };
    sets.iter().filter_map(path).collect()
}
