//! Phase `prepare`: all that can be done while the guest runs, so that the pause does not wait for
//! it.

use super::base::{Base, Chains, History};
use super::buffers::Buffers;
use super::carried::{Carried, Resumed};
use super::delta::{Delta, Space};
use super::direct::ProcessMemorySource;
use super::outcome::Phases;
use super::pause::TrackerSource;
use super::source::MemorySource;
use super::stream::StreamSource;
use super::underway::{Prepared, Storing, Underway};
use super::writer::{Force, StoreSession};
use super::{Checkpointer, Choice, Report};
use crate::kill_point;
use crate::pack::{NumberedPack, PackJob, PackTarget, Packer};
use crate::progress::bytes;
use anyhow::{Context, Error, Result};
use checkpoint_format::{
    ByteLen, CheckpointId, CheckpointRef, LayerRef, PageCount, SpaceKind, SpaceName, SpaceTable,
};
use checkpoint_store::{Mode, PartialCheckpoint};
use qmp_bridge::RunState;
use qmp_bridge::capture::{
    BitmapTag, CapturePlaces, CapturePlan, DEFAULT_FLEECING_RESERVE, Outlook, PreparedDisks,
    cleanup_leftovers,
};
use qmp_bridge::disks::{BackingImage, Disk};
use qmp_bridge::migration::{self, StreamMode};
use qmp_bridge::paused::leave_stopped;
use serde_json::Value;
use std::sync::Arc;
use tokio::time::Instant;
use tracing::instrument;
use vm::drives::Drives;
use vm::error::{EngineError, InPhase, Phase};
use vm::inventory::Inventory;
use vm::launch::paths::boot_files_of;
use vm::memory_source::{Chosen, Engine, can_pre_copy_live, choose_stream, choose_tracker};
use vm::process_memory::ProcessMemory;
use vm::reopen;
use vm::running::{Vm, check_blockers};

/// What is decided while the base is as it was.
struct Plan {
    chosen: Chosen,
    layer_bytes: u64,
    boot_files: Vec<LayerRef>,
    disks: PreparedDisks,
    outlook: Outlook,
    partial: Arc<PartialCheckpoint>,
    /// Packs of earlier tries in it.
    earlier: Vec<NumberedPack>,
}

impl Checkpointer {
    #[instrument(name = "prepare", level = "debug", skip_all)]
    pub(super) async fn prepare(
        &mut self,
        choice: Choice,
        phases: &mut Phases,
        report: &Report,
    ) -> Result<Prepared> {
        let begun = Instant::now();
        report.say("prepare", 0, 0);
        kill_point::point("prepare");
        self.clean_up().await?;
        self.refuse_half_rolled_back("this checkpoint")?;
        RunState::of(&self.vm.qmp).await.context("asking for the run state")?;
        let inventory = self.survey().await?;
        let session = self.ensure_session(choice.full).await?;
        self.vm.check_command_line(&inventory.drives)?;
        let spaces = disk_spaces(&inventory.drives.disks)?;
        let mut base = self.take_base(&session, &spaces).await?;
        let plan = match self.plan(choice, &session, &mut base, &inventory.drives, phases).await {
            Ok(plan) => plan,
            Err(error) => {
                self.base = Some(base);
                return Err(error);
            }
        };
        let prepared = self.begin(plan, inventory, session, base).await?;
        phases.since("prepare", begun);
        Ok(prepared)
    }

    async fn plan(
        &mut self,
        choice: Choice,
        session: &StoreSession,
        base: &mut Base,
        drives: &Drives,
        phases: &mut Phases,
    ) -> Result<Plan> {
        let begun = Instant::now();
        let boot = boot_files_of(&self.vm.file.arguments, &self.vm.directory())?;
        let layer_bytes = self.layers.ensure_all(&session.repository, drives, &boot).await?;
        phases.since("layers", begun);
        base.follow_chains(self.chains(drives)?);
        base.begin_lineage_if_due(choice.full);
        let chosen = self.choose_engine(choice).await?;
        self.check_arriving(&chosen, &base.history)?;
        if chosen.engine.mode() == Some(StreamMode::PreCopy) {
            reopen::check(self.vm.pid, drives)?;
        }
        let history = &mut base.history;
        let plan = CapturePlan {
            tag: self.tag()?,
            checkpoint: self.reference(history.next()),
            parent: history.parent_of_bitmaps().map(|parent| parent.0),
            fleecing_dir: self.vm.file.fleecing.clone(),
            fleecing_reserve: DEFAULT_FLEECING_RESERVE,
            nbd_socket: self.vm.runtime.nbd(),
            streamed: chosen.engine != Engine::Tracker,
        };
        let disks = PreparedDisks::prepare(&self.vm.qmp, &drives.disks, plan)
            .await
            .context("preparing the disks")?;
        let outlook = disks.outlook().await.context("estimating what the disks will need")?;
        tracing::info!(?outlook, "what the disks will need");
        let (partial, earlier) = self.begin_partial(session, history).await?;
        let boot_files =
            boot.iter().filter_map(|(_, path)| self.layers.get(path).cloned()).collect();
        Ok(Plan { chosen, layer_bytes, boot_files, disks, outlook, partial, earlier })
    }

    /// What has not arrived yet is as the parent has it, if the tracker knows all that was written
    /// since: any other checkpoint would have to read it.
    fn check_arriving(&self, chosen: &Chosen, history: &History) -> Result<()> {
        let is_incremental = history.parent().is_some() && history.is_exact;
        if is_incremental && chosen.engine == Engine::Tracker {
            return Ok(());
        }
        self.refuse_arriving("this checkpoint")
    }

    /// A tracker that replaced another does not know.
    pub(super) fn tell_tracker(&self) -> Result<()> {
        if self.arriving.is_none() {
            return Ok(());
        }
        let mut tracker = self.vm.lock_tracker()?;
        match tracker.find(&self.vm.file.ram_block) {
            Some(id) => Ok(tracker.set_arriving(id, self.arriving().is_some())?),
            None => Ok(()),
        }
    }

    pub(super) async fn ensure_session(&mut self, is_full: bool) -> Result<StoreSession> {
        if let Some(session) = &self.store {
            if session.is_current().await? {
                return Ok(session.clone());
            }
            tracing::warn!(
                store = session.repository.url(),
                "this is not the state of the store that the helper has written to"
            );
            (self.store, self.base, self.carried) = (None, None, None);
        }
        // A store that has this VM's checkpoints must exist. If it does not, its file system may
        // not be mounted.
        let mode =
            if is_full || self.marks.is_none() { Mode::CreateIfMissing } else { Mode::MustExist };
        let session = StoreSession::open(&self.vm.file, &self.vm.runtime, mode, Force::No).await?;
        Ok(self.store.insert(session).clone())
    }

    /// What the VM is made of now. Refuses what cannot be saved.
    pub(super) async fn survey(&mut self) -> Result<Inventory> {
        if self.vm.refresh_blocks().await? {
            self.vm.runtime.forget_exact_marks()?;
            self.distrust_marks();
        }
        self.tell_tracker()?;
        let inventory = Inventory::take(&self.vm).await?;
        self.vm.check_listed(&inventory.devices).await?;
        check_blockers(&inventory.composition.migration_blockers)?;
        Ok(inventory)
    }

    /// Once per helper, and after a failure: resumes a guest that was left stopped, then removes
    /// what was left in QEMU.
    ///
    /// # Errors
    /// When QEMU does not answer or refuses; the next call tries again.
    pub async fn clean_up(&mut self) -> Result<(), EngineError> {
        if !self.is_clean {
            self.clean_up_qemu().await.in_phase(Phase::Prepare)?;
            self.is_clean = true;
        }
        Ok(())
    }

    async fn clean_up_qemu(&self) -> Result<()> {
        if self.half_rolled_back()?.is_some() {
            leave_stopped(&self.vm.qmp).await.context("leaving the guest stopped")?;
            let state = RunState::of(&self.vm.qmp).await.context("asking for the run state")?;
            if state.is_live() {
                tracing::error!("another client let a guest run that is set back by half");
                let stop = self.vm.qmp.execute_json("stop", Value::Null).await;
                stop.context("stopping a guest that is set back by half")?;
            }
        }
        let journal = self.vm.runtime.migration_journal();
        migration::recover(&self.vm.qmp, &journal)
            .await
            .context("undoing an earlier helper's migration")?;
        let places = CapturePlaces {
            fleecing_dir: &self.vm.file.fleecing,
            nbd_socket: &self.vm.runtime.nbd(),
        };
        cleanup_leftovers(&self.vm.qmp, &self.tag()?, places)
            .await
            .context("cleaning up after an earlier helper")?;
        Ok(())
    }

    /// The engine that is wanted, if it can be used.
    async fn choose_engine(&mut self, choice: Choice) -> Result<Chosen> {
        let there = self.vm.file.external.as_ref();
        let engine = choice.engine.or(there.map(|there| there.engine)).unwrap_or_default();
        let stream = choice.stream.or(there.map(|there| there.stream)).unwrap_or_default();
        let has_tracker = self.vm.has_tracker();
        let tracker = if has_tracker {
            Ok(())
        } else {
            Err("this QEMU has no plugin of Stillpoint".to_owned())
        };
        if let Some(chosen) = choose_tracker(engine, &tracker)? {
            return Ok(chosen);
        }
        let support =
            migration::probe(&self.vm.qmp).await.context("asking what QEMU's migration can do")?;
        let process_memory = ProcessMemory::check(&self.vm.qmp, self.vm.pid, support.stopped).await;
        let live = can_pre_copy_live(&self.vm.facts.qemu, self.vm.facts.accelerator);
        let has_plugin = self.vm.has_plugin();
        Ok(choose_stream(stream, &support, live, has_plugin, &process_memory)?)
    }

    /// Bitmaps serve one lineage: that of this instance.
    pub(crate) fn tag(&self) -> Result<BitmapTag> {
        self.vm.file.instance.parse().context("naming the dirty bitmaps")
    }

    /// The store may have changed since the last checkpoint: it lost some (a snapshot of it was
    /// restored), or a commit whose answer was lost took place.
    pub(super) async fn take_base(
        &mut self,
        session: &StoreSession,
        disks: &[(SpaceName, PageCount)],
    ) -> Result<Base> {
        let is_held = match &mut self.base {
            Some(base) => base.history.lineage.is_held(&session.repository).await?,
            None => false,
        };
        if !is_held {
            tracing::info!("looking up what the store has of this VM");
            self.base = None;
        }
        if let Some(base) = &mut self.base {
            base.adapt(&self.vm, disks)?;
        }
        match self.base.take() {
            Some(base) => Ok(base),
            None => Base::find(&self.vm, &session.repository, disks, self.marks).await,
        }
    }

    /// The layers that each writable disk stands on.
    pub(super) fn chains(&self, drives: &Drives) -> Result<Chains> {
        let writable = drives.disks.iter().filter(|disk| !disk.read_only);
        let digest = |image: &BackingImage| {
            let layer = self.layers.get(&image.file).context("a layer was not stored")?;
            Ok::<_, Error>(layer.digest)
        };
        let chain =
            |disk: &Disk| drives.layers(disk).iter().map(digest).collect::<Result<Vec<_>>>();
        writable.map(|disk| Ok((disk.name.clone(), chain(disk)?))).collect()
    }

    fn reference(&self, id: CheckpointId) -> CheckpointRef {
        CheckpointRef { vm: self.vm.file.name.clone(), id }
    }

    /// From here on the tables are in use: if this fails, they are read from the store again.
    async fn begin(
        &mut self,
        plan: Plan,
        inventory: Inventory,
        session: StoreSession,
        base: Base,
    ) -> Result<Prepared> {
        let Base { history, spaces } = base;
        let Plan { chosen, layer_bytes, boot_files, disks, outlook, partial, earlier } = plan;
        let (id, parent) = (history.next(), history.parent());
        let label = format!("{} {id} {}", self.vm.file.name, self.vm.file.instance);
        let begun = begin_delta(&partial, earlier.clone(), spaces, parent, label).await;
        let (packer, delta, resumed) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                self.keep_earlier(partial, earlier, parent);
                return Err(error);
            }
        };
        let source = self.source(chosen.engine, self.reference(id), history.is_exact).await?;
        Ok(Prepared {
            underway: Underway {
                id,
                parent,
                engine: chosen.engine,
                notes: notes(chosen).into_iter().chain(room_note(outlook)).collect(),
                inventory,
                boot_files,
                layer_bytes,
                session,
                history,
            },
            storing: Storing { partial, packer, resumed },
            buffers: Buffers { staging: std::mem::take(&mut self.staging), delta },
            disks,
            source,
        })
    }

    async fn source(
        &self,
        engine: Engine,
        checkpoint: CheckpointRef,
        is_exact: bool,
    ) -> Result<Box<dyn MemorySource>> {
        let Vm { qmp, runtime, pid, .. } = &self.vm;
        let (qmp, directory) = (qmp.clone(), runtime.path().to_owned());
        match engine.mode() {
            Some(mode) => {
                let journal = runtime.migration_journal();
                Ok(Box::new(StreamSource { qmp, engine, mode, journal }))
            }
            None if engine == Engine::ProcessMemory => {
                Ok(Box::new(ProcessMemorySource { qmp, pid: *pid, directory }))
            }
            None => {
                // If the helper dies from here on, no record says which pages it has claimed.
                runtime.forget_exact_marks()?;
                let tracker = self.vm.tracker()?;
                TrackerSource::begin(qmp, directory, tracker, checkpoint, is_exact).await
            }
        }
    }

    /// A partial checkpoint, with the packs of earlier tries if they can be had.
    async fn begin_partial(
        &mut self,
        session: &StoreSession,
        history: &mut History,
    ) -> Result<(Arc<PartialCheckpoint>, Vec<NumberedPack>)> {
        let (id, parent) = (history.next(), history.parent());
        if let Some(carried) = self.carried.take_if(|carried| carried.parent == parent) {
            let resume = session.writer.resume(id, &carried.kept);
            match history.lineage.change(&session.repository, resume).await {
                Ok(Some(partial)) => return Ok((Arc::new(partial), carried.packs)),
                Ok(None) => tracing::warn!("what an earlier try stored is not there any more"),
                Err(error) => {
                    self.carried = Some(carried);
                    return Err(error).context("resuming what an earlier try stored");
                }
            }
        }
        self.carried = None;
        let begin = session.writer.begin(id);
        let partial = history.lineage.change(&session.repository, begin).await;
        let partial = partial.context("beginning a checkpoint in the store")?;
        Ok((Arc::new(partial), Vec::new()))
    }

    /// A store that fails now may have the packs at the next try.
    fn keep_earlier(
        &mut self,
        partial: Arc<PartialCheckpoint>,
        packs: Vec<NumberedPack>,
        parent: Option<CheckpointId>,
    ) {
        if let (Some(partial), false) = (Arc::into_inner(partial), packs.is_empty()) {
            self.carried = Some(Carried { kept: partial.keep(), packs, parent });
        }
    }
}

async fn begin_delta(
    partial: &Arc<PartialCheckpoint>,
    earlier: Vec<NumberedPack>,
    spaces: Vec<Space>,
    parent: Option<CheckpointId>,
    label: String,
) -> Result<(Packer, Delta, Resumed)> {
    let table = SpaceTable::new(spaces.iter().map(|space| space.name.clone()))?;
    let mut delta = Delta::new(spaces, &table)?;
    if parent.is_none() {
        delta.forget_memory();
    }
    let resumed = match earlier.is_empty() {
        true => Resumed::none(Arc::clone(partial)),
        false => Resumed::of_packs(Arc::clone(partial), earlier, &mut delta).await?,
    };
    let target = Arc::clone(partial) as Arc<dyn PackTarget>;
    let packer = Packer::after(target, table, label, resumed.last());
    if parent.is_none() {
        let mut jobs = Vec::new();
        ground_ram(&mut delta, &mut jobs);
        packer.send(&mut jobs).await?;
    }
    Ok((packer, delta, resumed))
}

/// A first checkpoint of a large disk takes as long as the disk is read, and the guest may
/// overwrite as much meanwhile.
fn room_note(outlook: Outlook) -> Option<String> {
    (outlook.full_bytes > outlook.room).then(|| {
        format!(
            "{} of disks are read in full, and the fleecing directory has room for {} that the guest overwrites meanwhile; beyond, the checkpoint \
             fails, though what it stored counts for the next one: name a larger one by --fleecing-dir",
            bytes(outlook.full_bytes),
            bytes(outlook.room)
        )
    })
}

/// A note if the guest is stopped for longer than usual.
fn notes(chosen: Chosen) -> Vec<String> {
    Some(chosen)
        .filter(|chosen| chosen.engine == Engine::Stopped)
        .map(|chosen| format!("stopped: {}", chosen.why))
        .into_iter()
        .collect()
}

/// All RAM is zero but for what follows.
fn ground_ram(delta: &mut Delta, jobs: &mut Vec<PackJob>) {
    let is_ram = |space: &Space| space.name.kind() == SpaceKind::Ram;
    let count = delta.spaces().iter().filter(|space| is_ram(space)).count();
    (0..).take(count).for_each(|number| delta.ground(number, jobs));
}

/// What the disks' content is called and how large it is; read-only disks have none.
pub(super) fn disk_spaces(disks: &[Disk]) -> Result<Vec<(SpaceName, PageCount)>> {
    let writable = disks.iter().filter(|disk| !disk.read_only);
    writable
        .map(|disk| {
            Ok((SpaceName::disk(&disk.name)?, PageCount::covering(ByteLen(disk.virtual_size))))
        })
        .collect()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn room_for_overlays_is_noted_only_when_it_may_not_do() {
        let note = |full_bytes, room| room_note(Outlook { full_bytes, room });
        assert_eq!((note(0, 0), note(5, 5)), (None, None));
        assert!(note(3 << 30, 1 << 30).is_some_and(|note| note.contains("--fleecing-dir")));
    }
}
