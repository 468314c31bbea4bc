//! Phase `prepare`: all that can be done while the guest runs, so that the pause has nothing to
//! wait for.

use super::base::{Base, Chains};
use super::carried::{Carried, Resumed};
use super::delta::{Delta, Space};
use super::outcome::Phases;
use super::writer::{Force, StoreSession};
use super::{Checkpointer, Choice, Report};
use crate::kill_point;
use crate::pack::{NumberedPack, PackJob, PackTarget, Packer, StoredPacks};
use crate::progress::bytes;
use anyhow::{Context, Result, ensure};
use checkpoint_format::{
    ByteLen, CheckpointId, CheckpointRef, ContentDigest, LayerRef, PageCount, SpaceKind, SpaceName,
    SpaceTable,
};
use checkpoint_store::{Mode, PartialCheckpoint};
use dirty_tracker::DirtyClaim;
use qmp_bridge::RunState;
use qmp_bridge::capture::{
    BitmapTag, CapturePlaces, CapturePlan, CapturedDisks, DEFAULT_FLEECING_RESERVE, Outlook,
    PreparedDisks, cleanup_leftovers,
};
use qmp_bridge::device_state::{DeviceState, DeviceStateFile};
use qmp_bridge::disks::Disk;
use qmp_bridge::migration::{self, StreamMode};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::instrument;
use vm::drives::Drives;
use vm::error::{EngineError, InPhase, Phase};
use vm::inventory::Inventory;
use vm::launch::paths::boot_files_of;
use vm::memory_source::{Chosen, Engine, can_pre_copy_live, choose_stream, choose_tracker};
use vm::process_memory::ProcessMemory;
use vm::reopen;
use vm::running::{check_blockers, lock};

/// Room for copied pages: 160 MiB. With packs being filled, written and waiting (96 MiB) that is
/// the staging of 256 MiB.
pub const STAGING_PAGES: PageCount = PageCount((160 << 20) / 4096);

/// Where the devices' state of the instant is.
pub enum SavedState {
    File(DeviceStateFile),
    Read(DeviceState),
}

/// A checkpoint under way.
pub struct Run {
    pub engine: Engine,
    /// What the operator should know though all goes well.
    pub notes: Vec<String>,
    pub id: CheckpointId,
    pub parent: Option<CheckpointId>,
    /// The VM as it was when the checks were made.
    pub inventory: Arc<Inventory>,
    /// What the guest was doing at the checkpoint's point in time.
    pub run_state: RunState,
    pub boot_files: Vec<LayerRef>,
    pub partial: Option<Arc<PartialCheckpoint>>,
    pub packer: Option<Packer>,
    /// What the packer has stored.
    pub stored: StoredPacks,
    /// Packs of earlier tries; they come before those that the packer stores.
    pub carried: Vec<NumberedPack>,
    pub resumed: Option<Resumed>,
    /// If this checkpoint fails, the next one may build on its packs.
    pub may_carry: bool,
    pub delta: Option<Delta>,
    pub claim: Option<DirtyClaim>,
    pub prepared: Option<PreparedDisks>,
    pub captured: Option<CapturedDisks>,
    pub device_state: Option<SavedState>,
    pub brief_stops: Vec<Duration>,
    pub pause: Duration,
    pub pages_dirty: PageCount,
    pub layer_bytes: u64,
    pub state_bytes: ByteLen,
    pub is_exact: bool,
    pub is_spilled: bool,
}

impl Run {
    /// All that the store has acknowledged, in the order in which it counts.
    pub fn packs(&self) -> Vec<NumberedPack> {
        self.carried.iter().cloned().chain(self.stored.list()).collect()
    }

    pub fn take_partial(&mut self) -> Result<PartialCheckpoint> {
        let partial = self.partial.take().context("the partial checkpoint is gone")?;
        Arc::try_unwrap(partial).ok().context("the pack pipeline still holds the checkpoint")
    }

    /// A page of an earlier try that was not looked at may have changed since.
    pub fn check_carried(&mut self) -> Result<()> {
        let left = self.delta.as_ref().map_or(PageCount(0), Delta::unconfirmed);
        self.may_carry = left == PageCount(0);
        ensure!(
            self.may_carry,
            "internal error: {left} pages that an earlier try stored were not compared; take the checkpoint again"
        );
        Ok(())
    }
}

impl Checkpointer {
    #[instrument(name = "prepare", level = "debug", skip_all)]
    pub(super) async fn prepare(
        &mut self,
        choice: Choice,
        phases: &mut Phases,
        report: &Report,
    ) -> Result<Run> {
        let begun = Instant::now();
        report.say("prepare", 0, 0);
        kill_point::point("prepare");
        self.clean_up().await?;
        RunState::of(&self.vm.qmp).await.context("asking for the run state")?;
        if self.vm.refresh_blocks().await? {
            self.vm.runtime.forget_exact_marks()?;
            self.distrust_marks();
        }
        let inventory = Inventory::take(&self.vm).await?;
        self.vm.check_listed(&inventory.devices).await?;
        check_blockers(&inventory.composition.migration_blockers)?;
        self.ensure_session(choice.full).await?;
        let drives = &inventory.drives;
        self.vm.check_command_line(drives)?;
        let spaces = disk_spaces(&drives.disks)?;
        self.ensure_base(&spaces).await?;
        let layers_begun = Instant::now();
        let layer_bytes = self.ensure_layers(drives).await?;
        phases.since("layers", layers_begun);
        self.follow_chains(drives)?;
        self.begin_lineage_if_due(choice.full)?;
        let chosen = self.choose_engine(choice).await?;
        if chosen.engine.mode() == Some(StreamMode::PreCopy) {
            reopen::check(self.vm.pid, drives)?;
        }
        let run = self.begin_run(chosen, inventory, layer_bytes).await?;
        phases.since("prepare", begun);
        Ok(run)
    }

    async fn ensure_session(&mut self, is_full: bool) -> Result<()> {
        if let Some(session) = &self.store {
            if session.is_current().await? {
                return Ok(());
            }
            tracing::warn!(
                store = session.repository.url(),
                "this is not the state of the store that the helper has written to"
            );
            (self.store, self.base, self.carried) = (None, None, None);
        }
        // A store that has this VM's checkpoints is there already; where it is missing, its file
        // system is not mounted, say.
        let mode =
            if is_full || self.marks.is_none() { Mode::CreateIfMissing } else { Mode::MustExist };
        self.store =
            Some(StoreSession::open(&self.vm.file, &self.vm.runtime, mode, Force::No).await?);
        Ok(())
    }

    /// Once per helper, and after a failure: what was left in QEMU, a stopped guest first of all.
    pub async fn clean_up(&mut self) -> Result<(), EngineError> {
        if !self.is_clean {
            self.clean_up_qemu().await.in_phase(Phase::Prepare)?;
            self.is_clean = true;
        }
        Ok(())
    }

    async fn clean_up_qemu(&self) -> Result<()> {
        let journal = self.vm.runtime.migration_journal();
        migration::recover(&self.vm.qmp, &journal)
            .await
            .context("taking back an earlier helper's migration")?;
        let places = CapturePlaces {
            fleecing_dir: &self.vm.file.fleecing,
            nbd_socket: &self.vm.runtime.nbd(),
        };
        cleanup_leftovers(&self.vm.qmp, &self.tag()?, places)
            .await
            .context("cleaning up after an earlier helper")?;
        Ok(())
    }

    /// What is wanted, if it can be had.
    async fn choose_engine(&mut self, choice: Choice) -> Result<Chosen> {
        let there = self.vm.file.external.as_ref();
        let engine = choice.engine.or(there.map(|there| there.engine)).unwrap_or_default();
        let stream = choice.stream.or(there.map(|there| there.stream)).unwrap_or_default();
        let has_tracker = self.vm.has_tracker();
        let tracker = if has_tracker {
            Ok(())
        } else {
            Err("no plugin of ours sits in this QEMU".to_owned())
        };
        if let Some(chosen) = choose_tracker(engine, &tracker)? {
            return Ok(chosen);
        }
        let support =
            migration::probe(&self.vm.qmp).await.context("asking what QEMU's migration can do")?;
        let process_memory = ProcessMemory::check(&self.vm.qmp, self.vm.pid, support.stopped).await;
        let live = can_pre_copy_live(&self.vm.facts.qemu, self.vm.facts.accelerator);
        choose_stream(stream, &support, live, self.vm.has_plugin(), &process_memory)
    }

    /// Bitmaps serve one lineage: that of this instance.
    fn tag(&self) -> Result<BitmapTag> {
        self.vm.file.instance.parse().context("naming the dirty bitmaps")
    }

    /// The store may have changed since the last checkpoint: it lost some (a snapshot of it was
    /// restored), or a commit whose answer was lost took place.
    async fn ensure_base(&mut self, disks: &[(SpaceName, PageCount)]) -> Result<()> {
        let session = self.store.as_ref().context("the store is not open")?;
        let is_held = match &mut self.base {
            Some(base) => base.lineage.is_held(&session.repository).await?,
            None => false,
        };
        if !is_held {
            tracing::info!("looking up what the store has of this VM");
            self.base = None;
        }
        match &mut self.base {
            Some(base) => base.adapt(&self.vm, disks),
            none => {
                *none = Some(Base::find(&self.vm, &session.repository, disks, self.marks).await?);
                Ok(())
            }
        }
    }

    async fn ensure_layers(&mut self, drives: &Drives) -> Result<u64> {
        let session = self.store.as_ref().context("the store is not open")?;
        let boot = boot_files_of(&self.vm.file.arguments, &self.vm.directory())?;
        self.layers.ensure_all(&session.repository, drives, &boot).await
    }

    /// A disk that stands on other layers than its parent did (a stream or commit at run time) may
    /// show other content where nothing was written: then all is stored again.
    fn follow_chains(&mut self, drives: &Drives) -> Result<()> {
        let writable = drives.disks.iter().filter(|disk| !disk.read_only);
        let chains = writable
            .map(|disk| Ok((disk.name.clone(), self.chain(drives, disk)?)))
            .collect::<Result<Chains>>()?;
        let base = self.base.as_mut().context("the base is not known")?;
        let is_same = |(node, chain): (&String, &Vec<ContentDigest>)| {
            base.chains.get(node).is_none_or(|before| before == chain)
        };
        if base.parent().is_some() && !chains.iter().all(is_same) {
            tracing::info!(
                "a disk stands on other layers than before; the next checkpoint is full"
            );
            base.begin_again();
        }
        base.chains = chains;
        Ok(())
    }

    fn begin_lineage_if_due(&mut self, is_wanted: bool) -> Result<()> {
        let base = self.base.as_mut().context("the base is not known")?;
        if is_wanted || base.is_long() {
            tracing::info!(is_wanted, "the next checkpoint is full and begins a lineage");
            base.begin_again();
        }
        Ok(())
    }

    fn chain(&self, drives: &Drives, disk: &Disk) -> Result<Vec<ContentDigest>> {
        let images = drives.layers(disk);
        let layers = images.iter().map(|image| self.layers.get(&image.file));
        layers.map(|layer| Ok(layer.context("a layer was not stored")?.digest)).collect()
    }

    async fn begin_run(
        &mut self,
        chosen: Chosen,
        inventory: Inventory,
        layer_bytes: u64,
    ) -> Result<Run> {
        let base = self.base.as_ref().context("the base is not known")?;
        let (id, parent, is_exact) = (base.next(), base.parent(), base.is_exact);
        let plan = CapturePlan {
            tag: self.tag()?,
            checkpoint: self.reference(id),
            parent: base.parent_of_bitmaps().map(|parent| parent.0),
            fleecing_dir: self.vm.file.fleecing.clone(),
            fleecing_reserve: DEFAULT_FLEECING_RESERVE,
            nbd_socket: self.vm.runtime.nbd(),
            streamed: chosen.engine != Engine::Tracker,
        };
        let prepared = PreparedDisks::prepare(&self.vm.qmp, &inventory.drives.disks, plan)
            .await
            .context("preparing the disks")?;
        let outlook = prepared.outlook().await.context("looking what the disks will need")?;
        tracing::info!(?outlook, "what the disks will need");
        let (partial, earlier) = self.begin_partial(id, parent).await?;
        let (packer, delta, resumed) =
            match self.begin_delta(&partial, earlier.clone(), id, parent).await {
                Ok(begun) => begun,
                Err(error) => {
                    self.keep_earlier(partial, earlier, parent);
                    return Err(error);
                }
            };
        let boot = boot_files_of(&self.vm.file.arguments, &self.vm.directory())?;
        let boot_files =
            boot.iter().filter_map(|(_, path)| self.layers.get(path).cloned()).collect();
        let claim = match chosen.engine {
            Engine::Tracker => {
                // If the helper dies from here on, no record says which pages it has claimed.
                self.vm.runtime.forget_exact_marks()?;
                Some(self.begin_claim(self.reference(id)).await?)
            }
            Engine::PreCopy
            | Engine::BackgroundSnapshot
            | Engine::Stopped
            | Engine::ProcessMemory => None,
        };
        Ok(Run {
            engine: chosen.engine,
            notes: notes(chosen).into_iter().chain(room_note(outlook)).collect(),
            id,
            parent,
            inventory: Arc::new(inventory),
            run_state: RunState::Running,
            boot_files,
            partial: Some(partial),
            stored: packer.stored(),
            packer: Some(packer),
            carried: resumed.packs(),
            resumed: Some(resumed),
            may_carry: true,
            delta: Some(delta),
            claim,
            prepared: Some(prepared),
            captured: None,
            device_state: None,
            brief_stops: Vec::new(),
            pause: Duration::ZERO,
            pages_dirty: PageCount(0),
            layer_bytes,
            state_bytes: ByteLen(0),
            is_exact,
            is_spilled: false,
        })
    }

    /// Begins, commits or removes a checkpoint in the store.
    pub(super) async fn change_store<'a, T, F: Future<Output = T>>(
        &'a mut self,
        change: impl FnOnce(&'a StoreSession) -> F,
    ) -> Result<T> {
        let session = self.store.as_ref().context("the store is not open")?;
        let base = self.base.as_mut().context("the base is not known")?;
        Ok(base.lineage.change(&session.repository, change(session)).await)
    }

    fn reference(&self, id: CheckpointId) -> CheckpointRef {
        CheckpointRef { vm: self.vm.file.name.clone(), id }
    }

    async fn begin_claim(&self, checkpoint: CheckpointRef) -> Result<DirtyClaim> {
        let tracker = self.vm.tracker()?;
        let begin = move || {
            let mut tracker = lock(&tracker);
            tracker.prepare()?;
            Ok(tracker.begin_claim(checkpoint))
        };
        tokio::task::spawn_blocking(begin)
            .await
            .context("internal error: preparing the tracker panicked")?
    }

    /// A partial checkpoint, with the packs of earlier tries if they can be had.
    async fn begin_partial(
        &mut self,
        id: CheckpointId,
        parent: Option<CheckpointId>,
    ) -> Result<(Arc<PartialCheckpoint>, Vec<NumberedPack>)> {
        if let Some(carried) = self.carried.take_if(|carried| carried.parent == parent) {
            match self.change_store(|session| session.writer.resume(id, &carried.kept)).await? {
                Ok(Some(partial)) => return Ok((Arc::new(partial), carried.packs)),
                Ok(None) => tracing::warn!("what an earlier try stored is not there any more"),
                Err(error) => {
                    self.carried = Some(carried);
                    return Err(error).context("resuming what an earlier try stored");
                }
            }
        }
        self.carried = None;
        let partial = self.change_store(|session| session.writer.begin(id)).await?;
        let partial = partial.context("beginning a checkpoint in the store")?;
        Ok((Arc::new(partial), Vec::new()))
    }

    /// A store that fails now may have the packs when it is asked again.
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

    async fn begin_delta(
        &mut self,
        partial: &Arc<PartialCheckpoint>,
        earlier: Vec<NumberedPack>,
        id: CheckpointId,
        parent: Option<CheckpointId>,
    ) -> Result<(Packer, Delta, Resumed)> {
        let base = self.base.as_mut().context("the base is not known")?;
        let spaces = std::mem::take(&mut base.spaces);
        let table = SpaceTable::new(spaces.iter().map(|space| space.name.clone()))?;
        let mut delta = Delta::new(spaces, &table)?;
        if parent.is_none() {
            delta.forget_memory();
        }
        let resumed = match earlier.is_empty() {
            true => Resumed::none(Arc::clone(partial)),
            false => Resumed::of_packs(Arc::clone(partial), earlier, &mut delta).await?,
        };
        let label = format!("{} {id} {}", self.vm.file.name, self.vm.file.instance);
        let target = Arc::clone(partial) as Arc<dyn PackTarget>;
        let packer = Packer::after(target, table, label, resumed.last());
        if parent.is_none() {
            let mut jobs = Vec::new();
            ground_ram(&mut delta, &mut jobs);
            packer.send(&mut jobs).await?;
        }
        Ok((packer, delta, resumed))
    }
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

/// A guest that is stopped longer than usual is worth a word.
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
    (0..count).for_each(|number| delta.ground(number as u16, jobs));
}

/// What the disks' content is called and how large it is; read-only disks have none.
pub fn disk_spaces(disks: &[Disk]) -> Result<Vec<(SpaceName, PageCount)>> {
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
