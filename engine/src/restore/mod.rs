//! Bringing a VM back: plan -> layers -> disks and RAM -> device state -> running -> a member of
//! its lineage again.
//!
//! Nothing of the old host is needed but the store. Nothing runs before everything is in place;
//! whatever fails before `cont` leaves the checkpoint as it was, and a new QEMU that is ended.

mod afterwards;
mod backoff;
mod chain;
pub(crate) mod check;
pub mod disk_export;
pub(crate) mod disks;
mod guest_time;
mod hooks;
pub mod hydration;
pub mod in_use;
pub(crate) mod layers;
pub mod lazy_disks;
pub(crate) mod line;
mod link;
pub(crate) mod memory;
pub mod on_demand;
mod places;
mod ports;
pub(crate) mod program;
pub(crate) mod qemu;
mod request;
pub(crate) mod run_state;
pub(crate) mod source;
mod undo;

use crate::checkpoint::outcome::{Phases, milliseconds};
use crate::checkpoint::{self, Force, StoreSession};
use crate::kill_point;
use crate::lineage;
use crate::progress::Progress;
use crate::stores;
pub use afterwards::Afterwards;
use anyhow::{Context, Result};
use checkpoint_format::{CheckpointId, Manifest, VmName};
use dirty_tracker::GuestMemory;
pub use disks::Places;
pub use hooks::Hooks;
use hydration::Hydration;
use layers::LocalLayers;
use lazy_disks::LazyDisks;
pub use line::{Mapping, Planned};
use qemu::NewQemu;
use qemu_cmdline::restorable::Wishes;
use qmp_bridge::capture::{BitmapTag, CapturePlaces, start_recording};
use qmp_bridge::migration::Incoming;
use qmp_bridge::ramblock::RamBlock;
use qmp_bridge::{Qmp, RunState};
pub use request::{Report, Request};
pub use run_state::Transition;
use serde_json::{Value, json};
pub use source::Source;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use undo::Undo;
use vm::error::{EngineError, InPhase, Phase, refused};
use vm::launch;
use vm::launch::paths::NewPaths;
use vm::running::Vm;
use vm::runtime_dir::{HelperLock, Marks, RestoreTarget, RuntimeDir, VmFile};

/// A VM that was restored and may run, with all that the restore knows and holds of it: the process
/// that restored it is its helper.
pub struct Restored {
    /// With this process attached.
    pub vm: Vm,
    /// The store, and the writer epoch that was claimed in it.
    pub session: StoreSession,
    /// What the marks of written pages count from; none for a copy.
    pub marks: Option<Marks>,
    /// Makes this process the only helper of the VM.
    pub lock: HelperLock,
    /// Of a guest that runs before all its memory has arrived.
    pub hydration: Option<Hydration>,
    /// Of a guest that runs before all its disks have arrived.
    pub disks: Option<lazy_disks::Disks>,
    /// For the command that asked, without the notes of `afterwards`.
    pub report: Report,
    /// What is left to be done when a helper serves the VM.
    pub afterwards: Afterwards,
}

/// Restores the VM, unless `interrupted` comes before its guest may run.
///
/// # Errors
/// When it cannot be restored: all that was made is removed then, and what was there is as before.
pub async fn run(
    request: Request,
    progress: Arc<dyn Progress>,
    interrupted: impl Future<Output = ()>,
) -> Result<Restored, EngineError> {
    let restore = Restore::plan(request, progress, Instant::now()).await.in_phase(Phase::Plan)?;
    restore.run(interrupted).await
}

struct Restore {
    request: Request,
    begun: Instant,
    phases: Phases,
    source: Source,
    id: CheckpointId,
    runtime: RuntimeDir,
    dir: PathBuf,
    qemu: PathBuf,
    plugin: PathBuf,
    qemu_version: String,
    wishes: Wishes,
    instance: String,
    run_state: Transition,
}

/// A restored VM whose guest has not run yet.
struct Ready {
    new: NewQemu,
    vm: Vm,
    layer_bytes: u64,
    hydration: Option<Hydration>,
    disks: Option<lazy_disks::Disks>,
    notes: Vec<String>,
}

impl Restore {
    async fn plan(request: Request, progress: Arc<dyn Progress>, begun: Instant) -> Result<Self> {
        let repository = stores::open_existing(&request.store).await?;
        let id = lineage::resolve(&repository, &request.checkpoint).await?;
        let source = Source::open(&repository, &request.checkpoint.vm, id, progress).await?;
        let runtime = RuntimeDir::new(request.runtime_base.as_deref(), request.name())?;
        let dir = request.dir.clone().unwrap_or_else(|| PathBuf::from(request.name().as_str()));
        let dir = std::path::absolute(&dir)
            .with_context(|| format!("making {} absolute", dir.display()))?;
        let plugin = launch::plugin_path()?;
        launch::saved::check_record(&source.manifest().vm_record)?;
        let (qemu, facts) =
            program::find(request.qemu.as_deref(), &source.manifest().vm_record, &plugin)?;
        let map = line::resolve(&source.manifest().vm_record.arguments, &request.map)?;
        let wishes = Wishes { map, allow: request.allow.clone() };
        let run_state =
            Transition::choose(source.manifest().run_state, request.paused, request.run)?;
        let instance = launch::new_instance()?;
        let mut phases = Phases::begin(Phase::Plan);
        phases.since("plan", begun);
        Ok(Self {
            request,
            begun,
            phases,
            source,
            id,
            runtime,
            dir,
            qemu,
            plugin,
            qemu_version: facts.version,
            wishes,
            instance,
            run_state,
        })
    }

    /// On any failure or signal until the guest may run, undoes everything that it made.
    async fn run(mut self, interrupted: impl Future<Output = ()>) -> Result<Restored, EngineError> {
        let mut undo = Undo::begin(&self.runtime).in_phase(Phase::Plan)?;
        let made = {
            let make = self.make(&mut undo);
            tokio::select! {
                made = make => made,
                () = interrupted => {
                    Err(anyhow::anyhow!("interrupted; what was made is removed again"))
                }
            }
        };
        let ready = match made {
            Ok(ready) => ready,
            Err(error) => {
                undo.run();
                return Err(self.phases.failed(error));
            }
        };
        self.phases.enter(Phase::Resume);
        let (session, marks) = match self.enter(&ready, &undo).await {
            Ok(entered) => entered,
            Err(error) => {
                let error = ready.new.explain(error);
                undo.run();
                return Err(self.phases.failed(error));
            }
        };
        let Ready { new, vm, layer_bytes, hydration, disks, notes } = ready;
        disks.iter().for_each(|disks| disks.copy(&vm.qmp));
        new.leave();
        let lock = undo.keep();
        let afterwards = self.afterwards(&vm);
        let mut report = self.report(layer_bytes, hydration.as_ref(), notes);
        report.disks_to_come = disks.as_ref().map(lazy_disks::Disks::names).unwrap_or_default();
        Ok(Restored { vm, session, marks, lock, hydration, disks, report, afterwards })
    }

    fn is_copy(&self) -> bool {
        self.request.is_copy()
    }

    fn name(&self) -> &VmName {
        self.request.name()
    }

    /// Refuses all that can be known beforehand. Nothing is made.
    async fn check(&self) -> Result<Planned> {
        let repository = self.source.repository();
        if self.is_copy() && !repository.checkpoints(self.name()).await?.is_empty() {
            return Err(refused(format!(
                "the store has checkpoints of a VM {} already; give the copy another name by --as",
                self.name()
            )));
        }
        launch::refuse_alive(&self.runtime)?;
        checkpoint::may_claim(
            repository,
            self.name(),
            &self.instance,
            Force::if_ordered(self.request.take_over),
        )
        .await?;
        let planned = Planned::of(&self.places(), &self.wishes)?;
        planned.check_free()?;
        Ok(planned)
    }

    /// Everything but a guest that runs.
    async fn make(&mut self, undo: &mut Undo) -> Result<Ready> {
        let planned = self.check().await?;
        self.hook_before().await?;
        let images = self.places().made();
        undo.make_directory(&self.dir, images.into_iter().chain(planned.made()).collect())?;
        self.phases.enter(Phase::Layers);
        let step = Instant::now();
        let layers = LocalLayers::provide(&self.source).await?;
        self.phases.since("layers", step);
        self.phases.enter(Phase::Disks);
        let step = Instant::now();
        let runtime_path = self.runtime.path().to_owned();
        let mut lazy = self.lazy_disks()?;
        let (places, lazily) = (self.places(), lazy.as_mut());
        let paths =
            disks::restore(&self.source, &layers, &places, &self.qemu, &runtime_path, lazily)
                .await?;
        self.phases.since("disks", step);
        self.phases.enter(Phase::Start);
        let mut file = self.vm_file(&layers, &paths)?;
        let memory = GuestMemory::create(file.name.as_ref(), file.ram_bytes)
            .context("making the guest's memory")?;
        let (disks, line) = self.serve_disks(lazy, &file).await?;
        let new = NewQemu::start(&line, &self.runtime, &self.plugin, &memory)?;
        file.pid = Some(new.pid());
        undo.started(new.pid())?;
        self.runtime.save_vm(&file)?;
        kill_point::point("restore.started");
        let mut notes: Vec<String> =
            self.is_copy().then(|| planned.note_of_copy()).into_iter().collect();
        match self.bring_up(memory, &layers, &mut notes).await {
            Ok((vm, hydration)) => {
                Ok(Ready { new, vm, layer_bytes: layers.bytes_read, hydration, disks, notes })
            }
            Err(error) => Err(new.explain(error)),
        }
    }

    fn lazy_disks(&self) -> Result<Option<LazyDisks>> {
        if !self.request.lazy {
            return Ok(None);
        }
        let store = stores::absolute(&self.request.store)?;
        let of = &self.request.checkpoint.vm;
        Ok(Some(LazyDisks::new(&self.source, of, store, &self.instance, &self.runtime)))
    }

    /// Also the command line that QEMU is started with.
    async fn serve_disks(
        &self,
        lazy: Option<LazyDisks>,
        file: &VmFile,
    ) -> Result<(Option<lazy_disks::Disks>, VmFile)> {
        let Some(mut lazy) = lazy else { return Ok((None, file.clone())) };
        let line = lazy.command_line(&self.places(), file)?;
        let served = (file, self.run_state.wanted);
        Ok((lazy.serve(&self.source, &self.runtime, served).await?, line))
    }

    /// From the claim on no older helper of this VM can commit; then the guest may run.
    async fn enter(&self, ready: &Ready, undo: &Undo) -> Result<(StoreSession, Option<Marks>)> {
        let marks = self.begin_recording(&ready.vm).await?;
        kill_point::point("restore.loaded");
        let force = Force::if_ordered(self.request.take_over);
        let repository = self.source.repository().clone();
        let writer =
            checkpoint::claim(&repository, self.name(), &self.instance, &self.runtime, force)
                .await?;
        if let Err(error) = self.start_guest(ready, undo).await {
            if let Err(error) = writer.withdraw().await {
                tracing::warn!(%error, "the writer epoch that was claimed is not released; it is free as this QEMU has ended");
            }
            return Err(error);
        }
        Ok((StoreSession { repository, writer }, marks))
    }

    async fn start_guest(&self, ready: &Ready, undo: &Undo) -> Result<()> {
        let vm = &ready.vm;
        self.check_newest().await?;
        activate_disks(&vm.qmp).await;
        // A guest that runs may read at once, and must get no error.
        ready.disks.iter().try_for_each(lazy_disks::Disks::wait_for_reads)?;
        undo.forget()?;
        kill_point::point("restore.claimed");
        if !self.run_state.wanted.is_live() {
            return self.run_state.check(vm).await;
        }
        vm.qmp.execute_json("cont", Value::Null).await.context("starting the guest")?;
        if !self.is_copy() {
            qmp_bridge::vm::announce(&vm.qmp).await;
        }
        Ok(())
    }

    fn places(&self) -> Places<'_> {
        Places { manifest: self.source.manifest(), dir: &self.dir, map: &self.wishes.map }
    }

    /// The command line of the old VM with the files of the new one.
    fn vm_file(&self, layers: &LocalLayers, paths: &NewPaths) -> Result<VmFile> {
        let manifest = self.source.manifest();
        let record = &manifest.vm_record;
        let restored = launch::saved::restored(&record.arguments, paths, &self.wishes)?;
        restored.notes.iter().for_each(|note| self.source.progress().note(note));
        let options = if self.is_copy() {
            line::as_copy(restored.options, &self.wishes)
        } else {
            restored.options
        };
        let options = check::on_the_line(&self.places(), layers, options)?;
        let target = RestoreTarget {
            name: self.name().clone(),
            store: stores::absolute(&self.request.store)?,
            instance: self.instance.clone(),
            qemu: self.qemu.clone(),
            qemu_version: self.qemu_version.clone(),
            arguments: launch::arguments::words(&options),
            directory: self.dir.clone(),
            fleecing: launch::fleecing_dir(self.request.fleecing.as_deref())?,
            restored_from: (!self.is_copy()).then_some(self.id),
        };
        Ok(VmFile::restored(record, target))
    }

    /// The previous writer may have committed while this restore was reading, before its claim.
    async fn check_newest(&self) -> Result<()> {
        let newest = lineage::resolve(self.source.repository(), &self.request.checkpoint).await?;
        if newest != self.id {
            return Err(refused(format!(
                "checkpoint {newest} was committed while {} was being restored; run the command again",
                self.id
            )));
        }
        Ok(())
    }

    /// QEMU with the VM's whole state, stopped.
    async fn bring_up(
        &mut self,
        memory: GuestMemory,
        layers: &LocalLayers,
        notes: &mut Vec<String>,
    ) -> Result<(Vm, Option<Hydration>)> {
        self.phases.enter(Phase::Memory);
        let step = Instant::now();
        let filling = (!self.request.lazy).then(|| self.fill(memory.clone()));
        let contents = memory::small_blocks(&self.source).await?;
        let devices = self.run_state.write(memory::device_state(&self.source).await?)?;
        let vm = Vm::attach(self.runtime.clone()).await?;
        check_blocks(self.source.manifest(), &vm.blocks)?;
        check::in_qemu(&self.places(), layers, &vm.disks().await?)?;
        // Records the VM's first devices.
        if let Err(error) = vm.check_devices().await {
            tracing::warn!(error = format!("{error:#}"), "no checkpoint can be taken as the VM is");
        }
        // QEMU has not touched the memory yet; what it writes while it loads is dirty from the
        // first checkpoint's view.
        let hydration = match filling {
            Some(filling) => {
                finish_filling(filling, &vm).await?;
                None
            }
            None => self.begin_hydration(&vm, memory, notes).await?,
        };
        self.phases.since("memory", step);
        self.phases.enter(Phase::Devices);
        let step = Instant::now();
        let incoming = Incoming::begin(&vm.qmp, &self.runtime.path().join("incoming.sock")).await?;
        memory::load(incoming, &self.source, &contents, &devices).await?;
        self.phases.since("devices", step);
        Ok((vm, hydration))
    }

    fn fill(&self, memory: GuestMemory) -> JoinHandle<Result<()>> {
        let block = self.source.manifest().vm_record.ram_block.clone();
        tokio::spawn(memory::fill(self.source.clone(), block, memory))
    }

    /// Where memory cannot arrive while the guest runs it is all read now, and a note says why.
    async fn begin_hydration(
        &self,
        vm: &Vm,
        memory: GuestMemory,
        notes: &mut Vec<String>,
    ) -> Result<Option<Hydration>> {
        let Some(why) = hydration::obstacle(vm).await? else {
            let checkpoint_of = &self.request.checkpoint.vm;
            let deadline = self.request.deadline;
            let begin = Hydration::begin(vm, checkpoint_of, &self.source, deadline);
            return Ok(Some(begin.await?));
        };
        notes.push(format!("all memory was read before the guest ran: {why}"));
        finish_filling(self.fill(memory), vm).await?;
        Ok(None)
    }

    /// The next checkpoint of the same VM is incremental: what is in RAM and on the disks now is
    /// what the store has.
    async fn begin_recording(&self, vm: &Vm) -> Result<Option<Marks>> {
        if vm.file.restored_from != Some(self.id) {
            return Ok(None);
        }
        let tag: BitmapTag = vm.file.instance.parse().context("naming the dirty bitmaps")?;
        let disks = vm.disks().await?.disks;
        let places =
            CapturePlaces { fleecing_dir: &vm.file.fleecing, nbd_socket: &vm.runtime.nbd() };
        start_recording(&vm.qmp, &tag, self.id.0, &disks, places)
            .await
            .context("beginning to record the disks' changes")?;
        let marks = Marks { since: self.source.identity(), is_exact: true };
        self.runtime.set_marks(marks)?;
        Ok(Some(marks))
    }

    fn report(self, layer_bytes: u64, hydration: Option<&Hydration>, notes: Vec<String>) -> Report {
        let to_come = hydration.map(Hydration::status);
        Report {
            name: self.name().clone(),
            resume_ms: milliseconds(self.begun.elapsed()),
            restored: self.request.checkpoint.vm,
            id: self.id,
            running: self.run_state.wanted == RunState::Running,
            run_state: self.run_state.wanted.name().to_owned(),
            bytes_read: self.source.bytes_read() + layer_bytes,
            layer_bytes_read: layer_bytes,
            dir: self.dir,
            phases: self.phases.into_map(),
            memory_bytes_to_come: to_come
                .map_or(0, |status| status.total_bytes.saturating_sub(status.done_bytes)),
            disks_to_come: Vec::new(),
            notes,
            state: self.run_state.words(),
        }
    }
}

/// All of the memory is here, and counts as not written from now on.
async fn finish_filling(filling: JoinHandle<Result<()>>, vm: &Vm) -> Result<()> {
    filling.await.context("internal error: filling the guest's memory panicked")??;
    Ok(vm.lock_tracker()?.protect_all()?)
}

/// The new QEMU must have built the same RAM blocks, or the state would be loaded into the wrong
/// place.
pub(crate) fn check_blocks(manifest: &Manifest, blocks: &[RamBlock]) -> Result<()> {
    for block in &manifest.ram_blocks {
        let found = blocks.iter().find(|found| found.name == block.name);
        let fits = found.is_some_and(|found| block.used.0 <= found.total);
        if !fits {
            return Err(refused(format!(
                "the new QEMU has no RAM block {} of {} bytes, as the saved VM had; is its command line or version another?",
                block.name, block.used
            )));
        }
    }
    Ok(())
}

/// After a load QEMU keeps the disks inactive until `cont`; a checkpoint of a VM that has not run
/// yet needs them. QEMU before 10.0 lacks the command and does not ask for it.
pub(crate) async fn activate_disks(qmp: &Qmp) {
    if let Err(error) = qmp.execute_json("blockdev-set-active", json!({ "active": true })).await {
        tracing::debug!(%error, "blockdev-set-active");
    }
}
