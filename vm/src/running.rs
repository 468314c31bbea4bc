//! The running VM as the helper holds it: QEMU's monitor, the tracker on its memory, and what it
//! consists of.

use crate::drives::{self, Drives, Started};
use crate::error::{EngineError, InPhase, Phase, VmError, refused};
use crate::external;
use crate::launch::own_files::Running;
use crate::launch::process::QemuProcess;
use crate::launch::{arguments, expected_devices};
use crate::process;
use crate::qemu_lock::QemuLock;
use crate::runtime_dir::{RuntimeDir, VmFile};
use crate::tracked_blocks;
use anyhow::{Context, Result};
use checkpoint_format::{ByteLen, PageCount, SpaceName};
use dirty_tracker::{PluginHandles, Tracker};
use qemu_cmdline::unsupported::{self, Refusal, USER_NETWORKS};
use qmp_bridge::devices::GuestDevice;
use qmp_bridge::ramblock::RamBlock;
use qmp_bridge::vm::VmFacts;
use qmp_bridge::{Qmp, devices, disks, quirks, ramblock};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// QEMU opens its monitor within 100 ms; a large VM that preallocates takes longer.
const STARTUP: Duration = Duration::from_secs(60);
/// Between two looks whether QEMU still lives.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
const NO_PLUGIN: &str = "no plugin sits in this QEMU, so nothing tracks its memory";

/// A running VM with a helper attached.
pub struct Vm {
    /// What was launched.
    pub file: VmFile,
    /// Its runtime directory.
    pub runtime: RuntimeDir,
    /// Its monitor.
    pub qmp: Qmp,
    /// What QEMU says of it.
    pub facts: VmFacts,
    /// Its RAM blocks.
    pub blocks: Vec<RamBlock>,
    /// QEMU's process.
    pub pid: u32,
    /// QOM paths of the devices that were there when the VM was last looked at.
    pub last_devices: Mutex<Vec<String>>,
    /// No other helper works on this QEMU meanwhile.
    _lock: QemuLock,
    /// None where no plugin is loaded in that QEMU: memory comes by stream only.
    tracker: Option<Arc<Mutex<Tracker>>>,
}

impl Vm {
    /// Attaches to the QEMU that the runtime directory describes.
    ///
    /// # Errors
    /// If that QEMU does not run, is another than it was, or cannot be checkpointed.
    pub async fn attach(runtime: RuntimeDir) -> Result<Self, EngineError> {
        Self::attached(runtime).await.in_phase(Phase::Attach)
    }

    async fn attached(runtime: RuntimeDir) -> Result<Self> {
        let file = runtime.vm()?;
        external::check_alive(&runtime, &file)?;
        let handles = match file.plugin(&runtime) {
            Some(socket) => Some(connect_later(socket, &file).await?),
            None => None,
        };
        let pid = handles
            .as_ref()
            .map(PluginHandles::pid)
            .or(file.pid)
            .context("the VM's file does not name QEMU's process")?;
        let lock = take_lock(pid).await?;
        let qmp = match &file.external {
            Some(there) => external::connect(&file, there).await?,
            None => Qmp::connect(runtime.qmp(), STARTUP)
                .await
                .context("connecting to QEMU's monitor")?,
        };
        let qmp = qmp.for_instance(&file.instance);
        if file.external.is_some() && handles.is_some() {
            external::owner::claim(&qmp, &runtime, &file).await?;
        }
        let facts = VmFacts::read(&qmp).await.context("asking QEMU what VM it runs")?;
        check_blockers(&facts.migration_blockers)?;
        let (blocks, tracker) = tracked_blocks::watch(&qmp, handles, &file.ram_block).await?;
        Ok(Self {
            file,
            runtime,
            qmp,
            facts,
            blocks,
            pid,
            last_devices: Mutex::default(),
            _lock: lock,
            tracker,
        })
    }

    /// The tracker, for one phase at a time.
    ///
    /// # Errors
    /// If there is none.
    pub fn tracker(&self) -> Result<Arc<Mutex<Tracker>>, VmError> {
        Ok(self.tracker.clone().context(NO_PLUGIN)?)
    }

    /// Whether a tracker follows its memory.
    pub fn has_tracker(&self) -> bool {
        self.tracker.is_some()
    }

    /// Whether our plugin is in this QEMU, in use or not: its userfaultfd may hold the memory since
    /// an earlier helper.
    pub fn has_plugin(&self) -> bool {
        let loads_it = |process: QemuProcess| {
            process.words.iter().any(|word| word.contains("stillpoint_plugin"))
        };
        self.has_tracker() || QemuProcess::read(self.pid).is_ok_and(loads_it)
    }

    /// The tracker, for one call.
    ///
    /// # Errors
    /// If there is none.
    pub fn lock_tracker(&self) -> Result<MutexGuard<'_, Tracker>, VmError> {
        Ok(self.tracker.as_deref().map(lock).context(NO_PLUGIN)?)
    }

    /// Whether QEMU's process is gone.
    pub fn has_ended(&self) -> bool {
        process::started(self.pid).is_none()
    }

    /// QEMU's working directory, to which relative paths on its command line belong.
    pub fn directory(&self) -> PathBuf {
        process::open(self.pid)
            .and_then(|process| process.cwd())
            .unwrap_or_else(|_| self.file.directory.clone())
    }

    /// The disks, each under the name that it has in the store, and the command line that makes
    /// them as they are.
    ///
    /// # Errors
    /// If QEMU does not list them, or one cannot be part of a checkpoint.
    pub async fn disks(&self) -> Result<Drives, VmError> {
        let directory = self.directory();
        let found =
            disks::list(&self.qmp, Some(&directory)).await.context("asking QEMU for its disks")?;
        let options = self.options()?;
        let started = Started {
            options: &options,
            machine_type: &self.file.machine_type,
            directory: &directory,
            pid: self.pid,
        };
        drives::examine(found, &started)
    }

    fn options(&self) -> Result<Vec<arguments::QemuOption>> {
        Ok(arguments::parse(&self.file.arguments)?)
    }

    /// The guest's memory: one space for each RAM block, in the order of the tracker's RAM blocks.
    ///
    /// # Errors
    /// If a RAM block has a name that no space can have.
    pub fn ram_spaces(&self) -> Result<Vec<(SpaceName, PageCount)>, VmError> {
        let space = |block: &RamBlock| {
            let name = SpaceName::ram(&block.name).map_err(anyhow::Error::from)?;
            Ok((name, PageCount::covering(ByteLen(block.used))))
        };
        self.blocks.iter().map(space).collect()
    }

    /// A restore builds the VM from its command line, so what was plugged in or out since has no
    /// place there; and a new device may write memory that the tracker cannot see.
    ///
    /// # Errors
    /// Refused if one came or went, or cannot be part of a checkpoint.
    pub async fn check_devices(&self) -> Result<(), VmError> {
        self.check_listed(
            &devices::guest_devices(&self.qmp).await.context("asking QEMU for its devices")?,
        )
        .await
    }

    /// The same of devices that QEMU has listed.
    ///
    /// # Errors
    /// As for these.
    pub async fn check_listed(&self, devices: &[GuestDevice]) -> Result<(), VmError> {
        if let Some(why) = refusals(&self.qmp, devices).await?.into_iter().next() {
            return Err(refused(why).into());
        }
        match self.difference(devices)? {
            None => Ok(()),
            Some(what) => Err(refused(not_as_started(&what)).into()),
        }
    }

    /// What was plugged in or out. The command line tells, from which a restore builds the VM. What
    /// the first helper saw tells more of a managed VM, but a device may have come before that
    /// helper looked.
    fn difference(&self, devices: &[GuestDevice]) -> Result<Option<String>> {
        let difference = expected_devices::difference(&self.options()?, devices);
        if difference.is_some() || self.file.external.is_some() {
            return Ok(difference);
        }
        let now: Vec<String> =
            devices.iter().map(|device| format!("{} ({})", device.path, device.kind)).collect();
        let then = self.runtime.devices_at_start(&now)?;
        let new = now
            .iter()
            .find(|device| !then.contains(device))
            .map(|device| format!("{device} was plugged in"));
        let gone = then
            .iter()
            .find(|device| !now.contains(device))
            .map(|device| format!("{device} was unplugged"));
        Ok(new.or(gone))
    }

    /// Whether a restore could start the VM from the command line that is saved.
    ///
    /// # Errors
    /// Refused if it names a file that is in no checkpoint.
    pub fn check_command_line(&self, drives: &Drives) -> Result<(), VmError> {
        let qemu = Running { program: &self.file.qemu, pid: self.pid };
        Ok(drives::check_command_line(&self.file.arguments, &self.directory(), drives, qemu)?)
    }

    /// Hot-plug or a reboot may change the list of RAM blocks: then they are tracked again, from
    /// nothing. Says whether.
    ///
    /// # Errors
    /// If QEMU does not list them, or they cannot be tracked.
    pub async fn refresh_blocks(&mut self) -> Result<bool, VmError> {
        let now =
            ramblock::ram_blocks(&self.qmp).await.context("asking QEMU for its RAM blocks")?;
        let place = |block: &RamBlock| (block.name.clone(), block.used, block.offset);
        // Where QEMU is too old to print the address, the offset tells a block that went and came
        // again.
        let moved = |now: &RamBlock, then: &RamBlock| now.host.is_some() && now.host != then.host;
        let same =
            |(now, then): (&RamBlock, &RamBlock)| place(now) == place(then) && !moved(now, then);
        if now.len() == self.blocks.len() && now.iter().zip(&self.blocks).all(same) {
            return Ok(false);
        }
        let handles = match self.file.plugin(&self.runtime) {
            Some(socket) => Some(connect_later(socket, &self.file).await?),
            None => None,
        };
        (self.blocks, self.tracker) =
            tracked_blocks::watch(&self.qmp, handles, &self.file.ram_block).await?;
        tracing::info!(
            blocks = self.blocks.len(),
            "the VM's RAM blocks have changed; they are tracked again"
        );
        Ok(true)
    }
}

/// Devices that no checkpoint can have, of these and of the board's own, each with the reason and
/// what to do.
///
/// # Errors
/// If QEMU does not answer.
pub async fn refusals(qmp: &Qmp, devices: &[GuestDevice]) -> Result<Vec<String>, VmError> {
    let board = devices::board_devices(qmp).await.context("asking QEMU for its board's devices")?;
    let mut found = Vec::new();
    if qmp.version().has(quirks::EQUAL_DEVICES_SAVED_AS_ONE) {
        let networks =
            qmp.hmp("info usernet").await.context("asking QEMU for its user networks")?;
        let kinds: Vec<&str> =
            devices.iter().chain(&board).map(|device| device.kind.as_str()).collect();
        found.extend(saved_as_one(&kinds, user_networks(&networks)));
    }
    for device in devices.iter().chain(&board) {
        found.extend(refusal(qmp, device).await?);
    }
    Ok(found.iter().map(Refusal::to_string).collect())
}

async fn refusal(qmp: &Qmp, device: &GuestDevice) -> Result<Option<Refusal>> {
    let place = format!("device {} ({})", device.path, device.kind);
    if let Some(refusal) = unsupported::device(&device.kind, &place) {
        return Ok(Some(refusal));
    }
    for (key, value, row) in unsupported::properties(&device.kind) {
        let is_on = devices::is_on(qmp, device, key)
            .await
            .with_context(|| format!("asking QEMU for {key} of {}", device.path))?;
        if value.has(is_on.then_some("on")) {
            return Ok(Some(unsupported::refusal_of_running(row, &place)));
        }
    }
    Ok(None)
}

/// Several devices whose state QEMU saves under one name, and loads into the first of them.
fn saved_as_one(kinds: &[&str], networks: usize) -> Vec<Refusal> {
    let count = |model: &str| match model {
        USER_NETWORKS => networks,
        _ => kinds.iter().filter(|kind| **kind == model).count(),
    };
    let several = unsupported::several().filter(|(model, _)| count(model) > 1);
    several
        .map(|(model, row)| {
            unsupported::refusal_of_running(row, &format!("a VM with several {model}"))
        })
        .collect()
}

/// How many user networks (slirp) QEMU has, by its answer to `info usernet`.
fn user_networks(answer: &str) -> usize {
    answer.lines().filter(|line| line.starts_with("Hub ")).count()
}

/// `what` was plugged in or out.
pub fn not_as_started(what: &str) -> String {
    format!(
        "{what} after the VM's start, and its command line, from which it would be restored, does not say so; undo that, or start the \
         VM again with the devices that it should have"
    )
}

async fn take_lock(pid: u32) -> Result<QemuLock> {
    tokio::task::spawn_blocking(move || QemuLock::take(pid))
        .await
        .context("internal error: taking QEMU's lock panicked")?
}

/// A thread that panicked left no claim half taken: each change of the tracker is one call.
pub fn lock(tracker: &Mutex<Tracker>) -> MutexGuard<'_, Tracker> {
    tracker.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn connect_later(socket: PathBuf, file: &VmFile) -> Result<PluginHandles> {
    let pid = file.pid;
    let is_external = file.external.is_some();
    let connect = tokio::task::spawn_blocking(move || {
        let handles = connect(&socket, pid)?;
        match pid.filter(|_| is_external) {
            Some(qemu) => tracked_blocks::check_plugin(&socket, handles, qemu),
            None => Ok(handles),
        }
    });
    connect.await.context("internal error: the task that connects to the plugin panicked")?
}

/// Waits for QEMU to come up, but not for one that has ended.
fn connect(socket: &Path, pid: Option<u32>) -> Result<PluginHandles> {
    let end = Instant::now() + STARTUP;
    loop {
        let error = match PluginHandles::connect(socket, POLL_INTERVAL) {
            Ok(handles) => return Ok(handles),
            Err(error) => error,
        };
        if pid.is_some_and(|pid| process::started(pid).is_none()) {
            return Err(refused(
                "QEMU has ended before it could be attached; its own output says why",
            ));
        }
        if !error.is_retryable() || Instant::now() >= end {
            return Err(error).context("QEMU's plugin does not answer; is the VM running?");
        }
    }
}

/// `blockers`: what QEMU says against a migration.
///
/// # Errors
/// Refused if there are any that count.
pub fn check_blockers(blockers: &[String]) -> Result<(), VmError> {
    if blockers.is_empty() {
        return Ok(());
    }
    let why = blockers.join("; ");
    Err(refused(format!(
        "QEMU says that this VM's device state cannot be saved: {why}; remove that device"
    ))
    .into())
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn user_networks_are_counted_in_qemus_answer() {
        let one = "Hub -1 (net0):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port\r\n";
        assert_eq!(user_networks(&[one, one].concat()), 2);
        assert_eq!(user_networks(one), 1);
        assert_eq!(user_networks("unknown command: 'info usernet'\r\n"), 0);
    }

    #[test]
    fn devices_saved_under_one_name_are_found() {
        let found = |kinds: &[&str], networks| {
            let refusals = saved_as_one(kinds, networks);
            refusals.iter().map(Refusal::to_string).collect::<String>()
        };
        assert!(found(&["isa-ide", "ide-hd", "isa-ide"], 1).contains("several isa-ide"));
        let one = ["isa-ide", "ide-hd", "ide-hd", "isa-serial", "isa-serial"];
        assert_eq!(found(&one, 1), "");
        assert!(found(&one, 2).contains("several user networks"));
    }
}
