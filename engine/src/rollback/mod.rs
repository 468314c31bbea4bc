//! Setting a running VM back, in place, to a checkpoint that it descends from: only pages and
//! blocks that differ are written, and QEMU with all its connections stays.
//!
//! ```text
//! plan      guest runs    refusals; a checkpoint of the present
//! prepare   guest runs    pages and blocks that may differ are read, checked and staged here
//! pause     guest paused  what was written meanwhile is staged too; until here all can be undone
//! apply     guest paused  a record is written, then disks, memory, devices
//! resume    guest runs    the next checkpoint adds to the one that the VM was set back to
//! ```
//! From the first write on the VM is of two instants. So a record in the runtime directory says so
//! before it: no helper resumes the guest and no checkpoint is taken until a rollback is complete.
//! One that was not completed is repeated for all pages, whatever was written.
//!
//! Which pages may differ is known from two sides: what the checkpoints since then stored, and what
//! the tracker and the disks' bitmaps have recorded since the last of them.

mod apply;
mod check;
mod staging;
mod wanted;

use crate::checkpoint::outcome::{Phases, milliseconds};
use crate::checkpoint::{self, Checkpointer, Choice};
use crate::kill_point;
use crate::restore::memory;
use anyhow::{Context, Error, Result};
use apply::{Alone, Apply, Origin, Written};
use check::Plan;
use checkpoint_format::{CheckpointId, PageCount, VmName};
use qmp_bridge::capture::{CapturePlaces, DiskRewrite, restart_recording};
use qmp_bridge::migration::LoadableState;
use qmp_bridge::paused::{leave_stopped, resume_later};
use qmp_bridge::{Paused, RunState, said};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use staging::Staging;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};
use tokio::time::Instant;
use vm::error::{EngineError, Phase};
use vm::runtime_dir::{Marks, RollbackUnderWay, RolledBack};

/// The longest that the guest waits for the last pages to be staged; then it is resumed.
const PAUSE: Duration = Duration::from_secs(10);
/// So few pages (4 MiB) are staged while the guest is paused.
const FEW: PageCount = PageCount(1024);
/// Passes over what was written meanwhile, while the guest runs.
const PASSES: u32 = 6;

/// Where a VM is to be set back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The checkpoint.
    pub id: CheckpointId,
    /// No checkpoint of the present is taken first: what was done since the last one is lost.
    pub discard: bool,
}

/// What came of a rollback. As JSON it is what `stillpoint rollback --json` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The VM.
    pub name: VmName,
    /// The checkpoint that it was set back to.
    pub id: CheckpointId,
    /// The last checkpoint before that: of the present, unless that was discarded.
    pub saved: CheckpointId,
    /// Whether the guest runs.
    pub running: bool,
    /// What it does, in QEMU's word.
    pub run_state: String,
    /// From the command `stop` until the guest could run again, in milliseconds.
    pub pause_ms: f64,
    /// From the request until then, in milliseconds.
    pub total_ms: f64,
    /// Pages of main memory that were written because they differed.
    pub pages_written: u64,
    /// Bytes of disks that were written because they differed.
    pub disk_bytes_written: u64,
    /// Bytes read from the store.
    pub bytes_read: u64,
    /// Milliseconds in each phase, by its name.
    pub phases: BTreeMap<String, f64>,
}

/// Sets the VM back.
///
/// # Errors
/// Refused before anything is touched where the VM, its disks or devices are not those of the
/// checkpoint, or what differs is not known. An error before the first write resumes the guest; one
/// after it leaves the guest paused, and says what to do.
pub async fn run(
    checkpointer: &mut Checkpointer,
    request: Request,
    report: &checkpoint::Report,
) -> Result<Report, EngineError> {
    let begun = Instant::now();
    let mut phases = Phases::begin(Phase::Plan);
    match go_back(checkpointer, request, report, &mut phases).await {
        Ok(done) => Ok(Report {
            total_ms: milliseconds(begun.elapsed()),
            phases: phases.into_map(),
            ..done
        }),
        Err(error) => Err(phases.failed(error)),
    }
}

async fn go_back(
    checkpointer: &mut Checkpointer,
    request: Request,
    report: &checkpoint::Report,
    phases: &mut Phases,
) -> Result<Report> {
    let begun = Instant::now();
    check::vm(checkpointer)?;
    checkpointer.clean_up().await?;
    if !request.discard && checkpointer.half_rolled_back()?.is_none() {
        // What can be refused is refused before a checkpoint of the present is stored.
        check::plan(checkpointer, &request, false, report).await?;
        checkpointer.take(Choice::default(), report).await.map_err(Error::from)?;
    }
    let plan = check::plan(checkpointer, &request, true, report).await?;
    phases.since("plan", begun);
    phases.enter(Phase::Prepare);
    let vm = &checkpointer.vm;
    let tag = checkpointer.tag()?;
    let places = CapturePlaces { fleecing_dir: &vm.file.fleecing, nbd_socket: &vm.runtime.nbd() };
    let drives = &plan.standing.drives.disks;
    let disks = DiskRewrite::prepare(&vm.qmp, &tag, drives, places).await?;
    let state = match loadable(checkpointer, &plan).await {
        Ok(state) => state,
        Err(error) => {
            disks.remove().await?;
            return Err(error);
        }
    };
    let rollback = Rollback { request, plan, disks, state };
    rollback.run(checkpointer, report, phases).await
}

/// The device state of the checkpoint with the small RAM blocks, in QEMU.
async fn loadable(checkpointer: &Checkpointer, plan: &Plan) -> Result<LoadableState> {
    let vm = &checkpointer.vm;
    let source = plan.to.source();
    let contents = memory::small_blocks(source).await?;
    let mut stream = memory::stream(source, &contents, &plan.devices)?;
    if let Some(bytes) = kill_point::damage("state").and_then(|bytes| bytes.parse().ok()) {
        stream.truncate(stream.len().saturating_sub(bytes));
    }
    Ok(LoadableState::prepare(&vm.qmp, &vm.file.fleecing, stream).await?)
}

/// What is ready while the guest still runs.
struct Rollback {
    request: Request,
    plan: Plan,
    disks: DiskRewrite,
    state: LoadableState,
}

impl Rollback {
    async fn run(
        self,
        checkpointer: &mut Checkpointer,
        report: &checkpoint::Report,
        phases: &mut Phases,
    ) -> Result<Report> {
        let watch = checkpointer.vm.qmp.watch(apply::EVENTS);
        let held = self.hold(checkpointer, report, phases).await;
        let (origin, begun, since) = match held {
            Ok(held) => held,
            Err(error) => {
                self.remove().await?;
                return Err(error);
            }
        };
        phases.enter(Phase::Memory);
        let step = Instant::now();
        report.say("apply", 0, 0);
        let name = checkpointer.vm.file.name.clone();
        let (id, log) = (self.request.id, checkpointer.vm.runtime.qemu_log());
        let advice = |error: Error| {
            let said = said::quote_log(&log);
            error.context(format!(
                "the rollback has begun and is not complete: the guest stays stopped; \
                 'stillpoint rollback {name}@{id}' tries again, or end QEMU and use \
                 'stillpoint restore {name}' (QEMU said: {said})"
            ))
        };
        let alone = Alone { watch, since };
        let applied = Apply {
            checkpointer,
            plan: &self.plan,
            disks: &self.disks,
            state: &self.state,
            origin,
            alone: &alone,
        };
        let written = applied.run().await.map_err(advice)?;
        phases.since("apply", step);
        phases.enter(Phase::Resume);
        self.complete(checkpointer, &alone, written, begun).await.map_err(advice)
    }

    /// Stages all that may differ and stops the guest for good. If it fails the guest runs on.
    async fn hold(
        &self,
        checkpointer: &mut Checkpointer,
        report: &checkpoint::Report,
        phases: &mut Phases,
    ) -> Result<(Origin, Instant, std::time::Instant)> {
        let step = Instant::now();
        let mut origin = Origin::Store;
        if !self.plan.is_continued {
            origin = Origin::Staged(self.stage(checkpointer, report).await?);
        }
        kill_point::point("rollback.staged");
        phases.since("prepare", step);
        phases.enter(Phase::Pause);
        let begun = Instant::now();
        let paused =
            Paused::stop_within(&checkpointer.vm.qmp, PAUSE).await.context("stopping the guest")?;
        if let Origin::Staged(staging) = &mut origin {
            let rest = self.stage_rest(checkpointer, staging);
            let rest = paused.within("staging what was written last", rest).await;
            let rest = rest.map_err(Error::from).flatten();
            if let Err(error) = rest.and(check::run_state(paused.before(), self.plan.wanted)) {
                paused.resume().await.context("letting the guest run again")?;
                return Err(error);
            }
        }
        kill_point::point("rollback.paused");
        let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let instance = checkpointer.vm.file.instance.clone();
        let runtime = checkpointer.vm.runtime.clone();
        runtime.begin_rollback(&RollbackUnderWay { instance, to: self.request.id, since: now })?;
        let since = std::time::Instant::now();
        let held = checkpointer.begin_to_go_back();
        let held = match held {
            Ok(()) => paused.hold().await.map_err(Error::from),
            Err(error) => Err(error),
        };
        if let Err(error) = held {
            // Nothing was written, and the guest runs again.
            if !self.plan.is_continued {
                runtime.end_rollback()?;
            }
            return Err(error);
        }
        kill_point::point("rollback.begun");
        phases.since("pause", begun);
        Ok((origin, begun, since))
    }

    async fn stage(
        &self,
        checkpointer: &Checkpointer,
        report: &checkpoint::Report,
    ) -> Result<Staging> {
        let mut staging = Staging::new(&checkpointer.vm.file.fleecing)?;
        let mut wanted = wanted::between(&self.plan).await?;
        for pass in 0..PASSES {
            wanted.union_with(&wanted::written(checkpointer, &self.plan).await?);
            wanted.subtract(&staging.pages);
            if pass > 0 && wanted.count() <= FEW {
                break;
            }
            report.say("staging", staging.pages.count().0, wanted.count().0);
            staging.fetch(&self.plan.to, &self.disks, &wanted).await?;
        }
        Ok(staging)
    }

    /// With the guest paused.
    async fn stage_rest(&self, checkpointer: &Checkpointer, staging: &mut Staging) -> Result<()> {
        let mut wanted = wanted::written(checkpointer, &self.plan).await?;
        wanted.subtract(&staging.pages);
        staging.fetch(&self.plan.to, &self.disks, &wanted).await
    }

    async fn remove(self) -> Result<()> {
        self.state.remove().await?;
        Ok(self.disks.remove().await?)
    }

    /// The VM is what the checkpoint holds: that is written down, and its guest continues.
    async fn complete(
        self,
        checkpointer: &mut Checkpointer,
        alone: &Alone,
        written: Written,
        begun: Instant,
    ) -> Result<Report> {
        let Self { request, plan, disks, state } = self;
        state.remove().await?;
        disks.remove().await?;
        let (qmp, runtime) = (checkpointer.vm.qmp.clone(), checkpointer.vm.runtime.clone());
        let tag = checkpointer.tag()?;
        let fleecing = checkpointer.vm.file.fleecing.clone();
        let places = CapturePlaces { fleecing_dir: &fleecing, nbd_socket: &runtime.nbd() };
        let drives = &plan.standing.drives.disks;
        restart_recording(&qmp, &tag, request.id.0, drives, places)
            .await
            .context("beginning to record the disks' changes")?;
        // What was written before that is in no bitmap.
        alone.check(&qmp).await?;
        let marks = Marks { since: plan.to.source().identity(), is_exact: true };
        let instance = checkpointer.vm.file.instance.clone();
        let newest = plan.standing.newest;
        runtime.set_rolled_back(&RolledBack { instance, to: request.id, newest })?;
        runtime.set_marks(marks)?;
        checkpointer.has_gone_back(marks).await;
        let runs = plan.wanted == RunState::Running;
        if runs {
            resume_later(&qmp).await.context("leaving word that the guest is to run")?;
        }
        kill_point::point("rollback.recorded");
        runtime.end_rollback()?;
        if runs {
            qmp.execute_json("cont", Value::Null).await.context("letting the guest run")?;
            leave_stopped(&qmp).await.context("removing the mark of the pause")?;
        }
        Ok(Report {
            name: checkpointer.vm.file.name.clone(),
            id: request.id,
            saved: newest,
            running: runs,
            run_state: plan.wanted.name().to_owned(),
            pause_ms: milliseconds(begun.elapsed()),
            total_ms: 0.0,
            pages_written: written.pages,
            disk_bytes_written: written.disk_bytes,
            bytes_read: plan.to.source().bytes_read() + plan.now.source().bytes_read(),
            phases: BTreeMap::new(),
        })
    }
}
