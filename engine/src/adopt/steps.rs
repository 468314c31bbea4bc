//! The adoption itself, step by step; the guest runs but for a moment between
//! [`LocalMigration::switchover`] and [`LocalMigration::resume`].

use super::Adopted;
use super::destination;
use super::finish::finish;
use super::memory::MemoryComparison;
use super::plan::Plan;
use super::record::{ImageMark, Process, Record, Stage};
use super::recover::roll_back;
use crate::checkpoint::outcome::milliseconds;
use crate::checkpoint::{Checkpointer, Report};
use crate::kill_point;
use anyhow::{Context, Result};
use dirty_tracker::GuestMemory;
use qmp_bridge::Qmp;
use qmp_bridge::devices::guest_devices;
use qmp_bridge::migration::{Downtime, LocalMigration};
use qmp_bridge::ramblock::ram_blocks;
use std::path::PathBuf;
use std::time::Instant;
use tracing::instrument;
use vm::error::{EngineError, InPhase, Phase, refused};
use vm::memory_source::can_pre_copy_live;
use vm::running::Vm;
use vm::runtime_dir::RuntimeDir;

/// Where the new QEMU waits for the stream.
pub(super) fn stream_socket(runtime: &RuntimeDir) -> PathBuf {
    runtime.path().join("adopt.sock")
}

/// Moves the VM of `checkpointer`, which continues with the new QEMU: that of `qemu`, or the
/// program that runs the VM now.
///
/// # Errors
/// Refused with what is in the way, before anything is made; failed when a step fails. The guest
/// then continues in the old QEMU, unless it ran in the new one already: the next helper completes
/// that.
#[instrument(name = "adopt", skip_all)]
pub async fn adopt(
    checkpointer: &mut Checkpointer,
    qemu: Option<PathBuf>,
    report: &Report,
) -> Result<Adopted, EngineError> {
    let mut phase = Phase::Plan;
    carry_out(checkpointer, qemu, report, &mut phase).await.in_phase(phase)
}

async fn carry_out(
    checkpointer: &mut Checkpointer,
    qemu: Option<PathBuf>,
    report: &Report,
    phase: &mut Phase,
) -> Result<Adopted> {
    let begun = Instant::now();
    checkpointer.clean_up().await?;
    let plan = Plan::make(&checkpointer.vm, qemu.as_deref()).await?;
    kill_point::point("adopt.plan");
    let runtime = checkpointer.vm.runtime.clone();
    let mut record = Record::begin(
        plan.source,
        plan.monitor.clone(),
        plan.found.clone(),
        plan.file.clone(),
        plan.later.clone(),
    );
    record.save(&runtime)?;
    let mut adoption =
        Adoption { vm: &checkpointer.vm, plan: &plan, runtime: &runtime, record: &mut record };
    let (downtime, destination) = match adoption.run(report, phase).await {
        Ok(moved) => moved,
        Err(error) => {
            return Err(roll_back(&record, &runtime, Some(&checkpointer.vm.qmp), error).await);
        }
    };
    *phase = Phase::Finish;
    let mut notes = plan.notes;
    notes.extend(finish(&record, &runtime, Some(&checkpointer.vm.qmp), &destination).await?);
    // Its monitor serves one client.
    drop(destination);
    let vm = Vm::attach(runtime)
        .await
        .context("the VM runs in its new QEMU, but the helper does not reach it")?;
    let pid = vm.pid;
    checkpointer.replace_vm(vm);
    tracing::info!(pid, downtime_ms = milliseconds(downtime.seen), "adopted");
    Ok(Adopted {
        adopted: true,
        downtime_ms: milliseconds(downtime.seen),
        qemu_downtime_ms: downtime.by_qemu.map(milliseconds),
        total_ms: milliseconds(begun.elapsed()),
        source_pid: plan.source.pid,
        pid,
        notes,
    })
}

struct Adoption<'a> {
    vm: &'a Vm,
    plan: &'a Plan,
    runtime: &'a RuntimeDir,
    record: &'a mut Record,
}

impl Adoption<'_> {
    /// Until the guest has run in the new QEMU.
    async fn run(&mut self, report: &Report, phase: &mut Phase) -> Result<(Downtime, Qmp)> {
        *phase = Phase::Start;
        let process = self.start()?;
        kill_point::point("adopt.started");
        let destination = destination::connect(process, self.runtime).await?;
        self.check_same(&destination).await?;
        let comparison = self.memory_comparison(&destination, process).await?;
        *phase = Phase::Move;
        self.record.advance(Stage::Moving, self.runtime)?;
        let socket = stream_socket(self.runtime);
        let plan = self.plan;
        let mut local_migration =
            LocalMigration::begin(&self.vm.qmp, &destination, &plan.found, &plan.bitmaps, &socket)
                .await?;
        kill_point::point("adopt.migrating");
        let tell = |done, total| report.say("adopt", done, total);
        local_migration.switchover(tell).await?;
        kill_point::point("adopt.switchover");
        *phase = Phase::Switchover;
        if let Some(comparison) = comparison {
            let begun = Instant::now();
            let pages = comparison.copy_lost_pages(&destination).await?;
            tracing::info!(
                pages,
                ms = milliseconds(begun.elapsed()),
                "copied pages that QEMU's emulator had lost or had yet to send"
            );
        }
        local_migration.complete().await?;
        kill_point::point("adopt.completed");
        self.record.images =
            plan.images.iter().map(|path| ImageMark::of(path)).collect::<Result<_>>()?;
        self.record.advance(Stage::Decided, self.runtime)?;
        kill_point::point("adopt.decided");
        self.record.advance(Stage::Resuming, self.runtime)?;
        let downtime = local_migration.resume().await?;
        // It has run: from here on no failure may end it. What stands on disk is enough for a later
        // helper.
        if let Err(error) = self.record.advance(Stage::Running, self.runtime) {
            tracing::warn!(
                error = format!("{error:#}"),
                "the adoption's last stage was not written down"
            );
        }
        kill_point::point("adopt.running");
        // It was bound by the new QEMU, which does not need it any more.
        let _ = std::fs::remove_file(socket);
        Ok((downtime, destination))
    }

    fn start(&mut self) -> Result<Process> {
        let start = &self.plan.start;
        let memory = GuestMemory::create(start.name.as_ref(), start.ram_bytes)
            .context("making the guest's memory")?;
        let process =
            destination::start(start, self.runtime, &self.plan.plugin, &memory, self.plan.like)?;
        self.record.destination = Some(process);
        self.record.file.pid = Some(process.pid);
        self.record.save(self.runtime)?;
        Ok(process)
    }

    async fn memory_comparison(
        &self,
        destination: &Qmp,
        process: Process,
    ) -> Result<Option<MemoryComparison>> {
        if can_pre_copy_live(&self.vm.facts.qemu, self.vm.facts.accelerator).is_ok() {
            return Ok(None);
        }
        let source = (&self.vm.qmp, self.plan.source.pid);
        Ok(Some(MemoryComparison::prepare(source, (destination, process.pid)).await?))
    }

    /// A VM that is another would refuse the state at its end, with the guest stopped.
    async fn check_same(&self, destination: &Qmp) -> Result<()> {
        let list = |devices: Vec<qmp_bridge::devices::GuestDevice>| {
            let mut list: Vec<String> = devices
                .into_iter()
                .map(|device| format!("{} ({})", device.path, device.kind))
                .collect();
            list.sort();
            list
        };
        let there =
            list(guest_devices(&self.vm.qmp).await.context("asking the old QEMU for its devices")?);
        let here =
            list(guest_devices(destination).await.context("asking the new QEMU for its devices")?);
        let differs = there
            .iter()
            .find(|device| !here.contains(device))
            .or_else(|| here.iter().find(|device| !there.contains(device)));
        if let Some(device) = differs {
            return Err(refused(format!(
                "device {device} is in one of the two QEMUs only; was it plugged in or out since the VM began?"
            )));
        }
        let sizes = |qmp: Qmp| async move {
            let blocks = ram_blocks(&qmp).await.context("asking QEMU for its RAM blocks")?;
            let mut sizes: Vec<(String, u64)> =
                blocks.into_iter().map(|block| (block.name, block.total)).collect();
            sizes.sort();
            Ok::<_, anyhow::Error>(sizes)
        };
        let (there, here) = (sizes(self.vm.qmp.clone()).await?, sizes(destination.clone()).await?);
        match there.iter().find(|block| !here.contains(block)) {
            None => Ok(()),
            Some((name, bytes)) => Err(refused(format!(
                "the new QEMU has no RAM block {name} of {bytes} bytes, as the old one has"
            ))),
        }
    }
}
