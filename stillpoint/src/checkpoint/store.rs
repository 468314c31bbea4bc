//! The helper's place in the store: opened at the first checkpoint, kept for all that follow.

use crate::launch::command::is_running;
use crate::runtime::MachineFile;
use crate::stores;
use anyhow::{Context, Result};
use checkpoint_format::VmName;
use checkpoint_store::{Claim, Mode, Repository, Writer, WriterRecord};
use std::time::SystemTime;

pub struct StoreSession {
    pub repository: Repository,
    pub writer: Writer,
}

impl StoreSession {
    /// Opens the store and claims the writer's place of this machine.
    pub async fn open(machine: &MachineFile, take_over: bool, mode: Mode) -> Result<Self> {
        let repository = stores::open(&machine.store, mode).await?;
        let writer = claim(&repository, &machine.name, &machine.instance, take_over).await?;
        tracing::info!(vm = %machine.name, epoch = writer.epoch().0, store = repository.url(), "this helper is the writer");
        Ok(Self { repository, writer })
    }

    /// Whether this is still the store that was opened, and it knows of this writer. Fails if it knows of a later one.
    pub async fn is_current(&self) -> Result<bool> {
        Ok(self.repository.is_unchanged().await? && self.writer.is_claimed().await?)
    }
}

/// Claims the writer's place of a machine for one instance of it.
///
/// A place that another instance holds is not taken without force, unless that holder cannot be alive: it was on this
/// host, and before its last boot or with a QEMU that is gone.
pub async fn claim(repository: &Repository, vm: &VmName, instance: &str, force: bool) -> Result<Writer> {
    let about = || format!("claiming the writer's place of {vm}");
    let record = writer_record(instance)?;
    let newest = repository.writers(vm).await.with_context(about)?.pop().and_then(|holder| holder.record);
    let is_gone = newest.is_some_and(|holder| holder.instance != instance && cannot_live(&holder, &record));
    let claim = if force || is_gone { Claim::TakeOver } else { Claim::Continue { instance: instance.to_owned() } };
    repository.claim_writer(vm, record, claim).await.with_context(about)
}

fn cannot_live(holder: &WriterRecord, here: &WriterRecord) -> bool {
    holder.host == here.host && (holder.boot_id != here.boot_id || !is_running(&holder.instance))
}

/// Who claims, for whoever finds the claim later.
fn writer_record(instance: &str) -> Result<WriterRecord> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").context("asking for the boot's id")?;
    Ok(WriterRecord {
        host: host(boot.trim())?,
        boot_id: boot.trim().to_owned(),
        instance: instance.to_owned(),
        pid: std::process::id(),
        claimed_at: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// The host's name, and what tells it from others of that name: the machine's id, and which processes we can see at all.
fn host(boot: &str) -> Result<String> {
    let name = nix::unistd::gethostname().context("asking for the host's name")?;
    let id = std::fs::read_to_string("/etc/machine-id").map(|id| id.trim().to_owned()).ok().filter(|id| !id.is_empty());
    // Without an id only records of this very boot may look like this host.
    let id = id.unwrap_or_else(|| boot.to_owned());
    let processes = std::fs::read_link("/proc/self/ns/pid").context("asking for our process namespace")?;
    Ok(format!("{} (machine {id}, {})", name.to_string_lossy(), processes.display()))
}
