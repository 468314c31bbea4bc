//! Writing to the VM while its guest is stopped: disks, memory, then the devices.
//!
//! Memory comes before the devices, because QEMU's device code reads the guest's memory while it
//! loads (a virtio queue whose indices do not fit breaks its device). It comes after the disks,
//! because a device whose disk is replaced may write to the guest's memory.

use super::check::Plan;
use super::staging::{Part, Reader, Staging, pieces};
use super::wanted::{Wanted, written_to_memory};
use crate::checkpoint::Checkpointer;
use crate::kill_point;
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use checkpoint_format::{PAGE_SIZE, SpaceName};
use dirty_tracker::{BlockMemory, GuestMemory};
use qmp_bridge::capture::{DiskRewrite, RewrittenDisk, differing, write_differing};
use qmp_bridge::migration::LoadableState;
use qmp_bridge::nbd::NbdClient;
use qmp_bridge::qmp::EventWatch;
use qmp_bridge::{Qmp, RunState};
use serde_json::Value;
use std::time::Instant;
use vm::running::Vm;

/// QEMU writes to the guest's memory at most a few times while nothing runs.
const MOST_PASSES: u32 = 8;

/// What another client does to a guest that must not run.
pub(super) const EVENTS: &[&str] = &["RESUME", "RESET"];

/// What was written.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Written {
    /// Pages of memory that differed.
    pub pages: u64,
    /// Bytes of disks that differed.
    pub disk_bytes: u64,
}

/// Where the content of pages comes from.
pub(super) enum Origin {
    /// All that may differ is staged.
    Staged(Staging),
    /// Any page may differ: it is read piece by piece.
    Store,
}

pub(super) struct Apply<'a> {
    pub checkpointer: &'a Checkpointer,
    pub plan: &'a Plan,
    pub disks: &'a DiskRewrite,
    pub state: &'a LoadableState,
    pub origin: Origin,
    pub alone: &'a Alone,
}

/// That no other client orders anything while the VM is of two instants.
pub(super) struct Alone {
    /// Of [`EVENTS`].
    pub watch: EventWatch,
    pub since: Instant,
}

impl Alone {
    /// A guest that another client let run is stopped again: it runs on in nothing but an error.
    pub(super) async fn check(&self, qmp: &Qmp) -> Result<()> {
        // An event that came before this reply has been read.
        let state = RunState::of(qmp).await.context("asking for the run state")?;
        let Some(event) = self.watch.since(self.since).into_iter().next() else {
            return Ok(());
        };
        if state.is_live() {
            qmp.execute_json("stop", Value::Null).await.context("stopping the guest again")?;
        }
        bail!("another client changed the VM while it was written to ({})", event.name)
    }
}

impl Apply<'_> {
    /// The VM is what the checkpoint holds when this returns; its guest is stopped.
    pub(super) async fn run(&self) -> Result<Written> {
        let mut written = Written::default();
        for disk in &self.disks.disks {
            let name = SpaceName::disk(&disk.name)?;
            let write = self.disk(disk, &name).await;
            written.disk_bytes += write.with_context(|| format!("writing disk {}", disk.name))?;
        }
        kill_point::point("rollback.disks");
        written.pages += self.memory().await.context("writing the guest's memory")?;
        kill_point::point("rollback.memory");
        if let Some(line) = kill_point::damage("monitor") {
            self.checkpointer.vm.qmp.hmp(&line).await?;
        }
        self.alone.check(&self.checkpointer.vm.qmp).await?;
        self.state.load().await.context("loading the device state")?;
        kill_point::point("rollback.loaded");
        // What a reset writes to memory (ROMs) is not the checkpoint's.
        let touched = written_to_memory(self.checkpointer).await?;
        let mut wanted = Wanted::default();
        wanted.insert(&self.plan.main_memory, &touched);
        written.pages += self.write_fetched(&wanted).await.context("writing memory again")?;
        self.alone.check(&self.checkpointer.vm.qmp).await?;
        Ok(written)
    }

    fn staging(&self) -> Result<Staging> {
        Staging::new(&self.checkpointer.vm.file.fleecing)
    }

    async fn disk(&self, disk: &RewrittenDisk, name: &SpaceName) -> Result<u64> {
        if let Origin::Staged(staging) = &self.origin
            && staging.parts(name).is_empty()
        {
            return Ok(0);
        }
        let client = self.disks.open(disk).await?;
        let written = match &self.origin {
            Origin::Staged(staging) => write_disk(disk, &client, staging, name).await?,
            Origin::Store => {
                let mut written = 0;
                let size = checkpoint_format::PageCount::covering(disk.bytes.into());
                for piece in pieces(name, size) {
                    let mut staging = self.staging()?;
                    staging.fetch(&self.plan.to, self.disks, &piece).await?;
                    written += write_disk(disk, &client, &staging, name).await?;
                }
                written
            }
        };
        self.disks.close(disk, client).await?;
        Ok(written)
    }

    async fn memory(&self) -> Result<u64> {
        let name = &self.plan.main_memory;
        let mut written = 0;
        match &self.origin {
            Origin::Staged(staging) => {
                written += self.write_staged(staging).await?;
                written += self.write_late(staging).await?;
            }
            Origin::Store => {
                let size = self.plan.spaces().into_iter().find(|(space, _)| space == name);
                let (_, size) = size.context("the checkpoint has no main memory")?;
                for piece in pieces(name, size) {
                    written += self.write_fetched(&piece).await?;
                }
            }
        }
        // From here on what is written counts from the checkpoint.
        self.checkpointer.vm.lock_tracker()?.protect_all()?;
        Ok(written)
    }

    /// What was written since the staging was complete: QEMU itself can do that.
    async fn write_late(&self, staging: &Staging) -> Result<u64> {
        let mut written = 0;
        let mut known = staging.pages.clone();
        for _ in 0..MOST_PASSES {
            let mut late = Wanted::default();
            late.insert(&self.plan.main_memory, &written_to_memory(self.checkpointer).await?);
            late.subtract(&known);
            if late.count().0 == 0 {
                return Ok(written);
            }
            written += self.write_fetched(&late).await?;
            known.union_with(&late);
        }
        bail!("another client writes to the guest's memory while it is stopped")
    }

    async fn write_fetched(&self, wanted: &Wanted) -> Result<u64> {
        if wanted.count().0 == 0 {
            return Ok(0);
        }
        let mut staging = self.staging()?;
        staging.fetch(&self.plan.to, self.disks, wanted).await?;
        self.write_staged(&staging).await
    }

    async fn write_staged(&self, staging: &Staging) -> Result<u64> {
        let memory = main_memory(&self.checkpointer.vm)?;
        let (parts, reader) = (staging.parts(&self.plan.main_memory), staging.reader());
        tokio::task::spawn_blocking(move || write_memory(&memory, &parts, &reader))
            .await
            .context("internal error: writing memory panicked")?
    }
}

fn main_memory(vm: &Vm) -> Result<GuestMemory> {
    let tracker = vm.lock_tracker()?;
    let id = tracker.find(&vm.file.ram_block).context("the tracker has no main memory")?;
    match &tracker.block(id)?.memory {
        BlockMemory::Shared(memory) => Ok(memory.clone()),
        BlockMemory::Private => bail!("internal error: the main memory is no file"),
    }
}

fn write_memory(memory: &GuestMemory, parts: &[Part], reader: &Reader) -> Result<u64> {
    let mut written = 0;
    for part in parts {
        let content = reader.read(part)?;
        let start = part.pages.bytes().start;
        let mut there = vec![0; content.len()];
        memory.read_sparse(start, &mut there)?;
        for (from, to) in differing(&there, &content, PAGE_SIZE) {
            memory.write(start + from as u64, &content[from..to])?;
            written += ((to - from) / PAGE_SIZE) as u64;
        }
    }
    Ok(written)
}

async fn write_disk(
    disk: &RewrittenDisk,
    client: &NbdClient,
    staging: &Staging,
    name: &SpaceName,
) -> Result<u64> {
    let reader = staging.reader();
    let mut written = 0;
    for part in staging.parts(name) {
        let start = part.pages.bytes().start;
        // The last page of a disk may be short.
        let length = disk.bytes.saturating_sub(start).min(part.pages.byte_len().0);
        let mut content = reader.read(&part)?;
        content.truncate(usize::try_from(length).unwrap_or(usize::MAX));
        if !content.is_empty() {
            written += write_differing(client, start, &Bytes::from(content), PAGE_SIZE).await?;
        }
    }
    Ok(written)
}
