//! The plan: all that could be in the way is looked at before anything is done.

use super::host;
use super::line::{self, Later};
use super::memory;
use super::record::Process;
use super::sockets::{self, Socket};
use anyhow::{Context, Result};
use qmp_bridge::Qmp;
use qmp_bridge::disks::Disk;
use qmp_bridge::migration::{self, BitmapMap, Found};
use qmp_bridge::paused::run_state;
use qmp_bridge::quirks::Release;
use qmp_bridge::vm::VmFacts;
use std::path::{Path, PathBuf};
use vm::error::refused;
use vm::launch;
use vm::launch::arguments::{self, QemuOption};
use vm::launch::process::QemuProcess;
use vm::launch::qemu_binary::{self, QemuFacts};
use vm::memory_source::can_pre_copy_live;
use vm::reopen;
use vm::running::Vm;
use vm::runtime_dir::{External, VmFile};

pub(super) struct Plan {
    pub source: Process,
    pub monitor: PathBuf,
    pub found: Found,
    pub bitmaps: BitmapMap,
    /// By which the new QEMU is started.
    pub start: VmFile,
    /// What the VM is afterwards: its sockets have their names again.
    pub file: VmFile,
    pub later: Later,
    /// The files of its writable disks.
    pub images: Vec<PathBuf>,
    pub plugin: PathBuf,
    /// The process whose environment the new one gets, if both run the same program.
    pub like: Option<u32>,
    pub notes: Vec<String>,
}

impl Plan {
    pub(super) async fn make(vm: &Vm, qemu: Option<&Path>) -> Result<Self> {
        let there = external(&vm.file)?;
        let process = QemuProcess::read(vm.pid)?;
        let options = arguments::parse(&vm.file.arguments)?;
        host::check(&process, vm.file.ram_bytes)?;
        if can_pre_copy_live(&vm.facts.qemu, vm.facts.accelerator).is_err() {
            memory::check_readable(vm.pid)?;
        }
        let mut line = line::rewrite(&options, &process.directory)?;
        check_vm(vm, &process.directory, &there.monitor).await?;
        let drives = vm.disks().await?;
        if let Some(what) = &drives.changed {
            return Err(refused(format!(
                "{what} since the VM was started; put it back as it was, then adopt the VM"
            )));
        }
        reopen::check_paths(&drives)?;
        let disks = drives.disks;
        let plugin = launch::plugin_path()?;
        let program = qemu.unwrap_or(&vm.file.qemu);
        let facts = qemu_binary::probe(program, &plugin)?;
        check_program(&vm.file, &vm.qmp, &facts, program)?;
        carry_monitor(&mut line, &there.monitor);
        let file = VmFile {
            qemu: program.to_owned(),
            qemu_version: facts.version,
            pid: None,
            directory: process.directory.clone(),
            external: None,
            ..vm.file.clone()
        };
        let bitmaps = BitmapMap::survey(&vm.qmp, &names(&disks))
            .await
            .context("asking QEMU for its dirty bitmaps")?;
        let mut notes = line.notes;
        notes.extend(owner_notes(&bitmaps, vm.pid));
        Ok(Self {
            source: Process { pid: process.pid, started: process.started },
            monitor: there.monitor.clone(),
            found: Found::read(&vm.qmp).await.context("asking for QEMU's migration settings")?,
            bitmaps,
            start: VmFile { arguments: arguments::words(&line.options), ..file.clone() },
            file,
            later: line.later,
            images: disks
                .iter()
                .filter(|disk| !disk.read_only)
                .map(|disk| disk.file.clone())
                .collect(),
            plugin,
            like: qemu.is_none().then_some(process.pid),
            notes,
        })
    }
}

fn external(file: &VmFile) -> Result<&External> {
    file.external
        .as_ref()
        .ok_or_else(|| refused(format!("{} runs in a QEMU of Stillpoint's already", file.name)))
}

/// The node that each disk has, and the one that it will have.
fn names(disks: &[Disk]) -> Vec<(String, String)> {
    disks
        .iter()
        .filter(|disk| !disk.read_only)
        .map(|disk| (disk.node.clone(), disk.name.clone()))
        .collect()
}

fn owner_notes(bitmaps: &BitmapMap, pid: u32) -> Vec<String> {
    let left = bitmaps
        .left_behind()
        .iter()
        .map(|name| format!("dirty bitmap {name} is in use or damaged and does not go along"));
    let service = host::service_of(pid)
        .map(|unit| format!("{unit} sees its QEMU end; it must not start the VM again"));
    left.chain(service).collect()
}

/// What QEMU itself says against it, now.
async fn check_vm(vm: &Vm, directory: &Path, monitor: &Path) -> Result<()> {
    let qmp = &vm.qmp;
    migration::check_idle(qmp).await?;
    let facts = VmFacts::read(qmp).await.context("asking QEMU what VM it runs")?;
    if let Some(why) = facts.migration_blockers.first() {
        return Err(refused(format!(
            "QEMU says that this VM cannot be migrated: {why}; remove that device"
        )));
    }
    vm.check_devices().await?;
    let state = run_state(qmp).await?;
    if state != "running" {
        return Err(refused(format!(
            "the guest does not run (its state is `{state}`); let it run, then adopt it"
        )));
    }
    let chardevs = qmp.query_chardev().await.context("asking QEMU for its chardevs")?;
    if let Some(client) = sockets::connected(&chardevs, directory, monitor) {
        return Err(refused(format!(
            "{client} has a client, which would be cut off; disconnect it, then adopt the VM"
        )));
    }
    check_blocks(qmp).await?;
    check_displays(qmp).await
}

async fn check_blocks(qmp: &Qmp) -> Result<()> {
    let jobs = qmp.query_jobs().await.context("asking QEMU for its jobs")?;
    if let Some(job) = jobs.first() {
        return Err(refused(format!(
            "job `{}` runs in QEMU and holds a disk; wait for its end, or cancel it",
            job.id
        )));
    }
    let exports = qmp.query_block_exports().await.context("asking QEMU for its disk exports")?;
    match exports.first() {
        None => Ok(()),
        Some(export) => Err(refused(format!(
            "disk export `{}` would not go along; end it by block-export-del",
            export.id
        ))),
    }
}

/// Displays that the command line does not ask for: QEMU makes one by default where it can.
async fn check_displays(qmp: &Qmp) -> Result<()> {
    for server in ["vnc", "spice"] {
        // A QEMU without that display does not know the command.
        if qmp.query_display(server).await.is_ok_and(|display| !display.clients.is_empty()) {
            return Err(refused(format!(
                "the VM's display has a client (query-{server}), which would be cut off; disconnect it first"
            )));
        }
    }
    Ok(())
}

/// A program as new as the one that runs the VM, and that has its machine type.
fn check_program(file: &VmFile, source: &Qmp, facts: &QemuFacts, program: &Path) -> Result<()> {
    if Release::parse(&facts.version) < Some(source.version().release()) {
        return Err(refused(format!(
            "{} is QEMU {}, older than the {} that runs {}: it could not read its state; name one as new by --qemu",
            program.display(),
            facts.version,
            source.version(),
            file.name
        )));
    }
    if facts.machine_types.iter().any(|known| known.name == file.machine_type) {
        return Ok(());
    }
    Err(refused(format!(
        "{} (QEMU {}) does not know the machine type {}; name another by --qemu",
        program.display(),
        facts.version,
        file.machine_type
    )))
}

/// The monitor by which the VM is attached is its owner's, though a restored VM does not have it.
fn carry_monitor(line: &mut line::Line, monitor: &Path) {
    let text = monitor.to_string_lossy();
    match Socket::beside(&text, Path::new("/")) {
        Ok((waits, socket)) => {
            line.options.push(QemuOption::with(
                "qmp",
                format!("unix:{},server=on,wait=off", waits.replace(',', ",,")),
            ));
            line.later.sockets.push(socket);
        }
        Err(why) => line.notes.push(format!("the monitor {text} does not go along: {why}")),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_owners_monitor_goes_along() {
        let mut line = line::Line::default();
        carry_monitor(&mut line, Path::new("/run/a,b.qmp"));
        assert_eq!(
            line.options[0],
            QemuOption::with("qmp", "unix:/run/a,,b.qmp.adopting,server=on,wait=off")
        );
        assert_eq!(
            line.later.sockets[0],
            Socket { waits: "/run/a,b.qmp.adopting".into(), path: "/run/a,b.qmp".into() }
        );
        carry_monitor(&mut line, Path::new(&format!("/{}", "x".repeat(100))));
        assert_eq!((line.options.len(), line.notes.len()), (1, 1));
    }
}
