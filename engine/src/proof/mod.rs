//! The proof that a checkpoint brings back what it says.
//!
//! ```text
//! plan      the checkpoint, a QEMU, room in memory and on disk
//! restore   as `stillpoint restore` does it, but in a sandbox: see [`sandbox`] and `isolate`
//! compare   before the first instruction: every page of memory, every block of the disks and of
//!           the layers below, the device state as QEMU writes it again
//! run       if asked for: the guest runs on; it must not die, panic or reset
//! note      the proof is remembered beside the checkpoint
//! ```
//! No writer epoch is claimed, no name is taken, and the store is only read but for the note.

mod devices;
mod difference;
mod disks;
mod expected;
mod isolate;
mod memory;
pub mod note;
mod room;
mod running;
pub mod sandbox;
mod tpm;

use crate::checkpoint::outcome::whole_milliseconds;
use crate::kill_point;
use crate::lineage::{self, CheckpointName, Lineage};
use crate::progress::Progress;
use crate::restore::disks::Places;
use crate::restore::layers::LocalLayers;
use crate::restore::line::Mapping;
use crate::restore::qemu::NewQemu;
use crate::restore::run_state::Transition;
use crate::restore::source::Source;
use crate::restore::{self, activate_disks};
use crate::run_state::of_record;
use crate::stores;
use anyhow::{Context, Result, anyhow};
use checkpoint_format::{CheckpointId, Checksum, PAGE_SIZE, SpaceKind, SpaceName, VmName};
pub use difference::Difference;
use dirty_tracker::GuestMemory;
use expected::Expected;
use qemu_cmdline::restorable::Wishes;
use qmp_bridge::device_state::DeviceState;
use qmp_bridge::migration::{Incoming, resave};
use qmp_bridge::{Qmp, ramblock};
pub use running::Ran;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use vm::error::{EngineError, InPhase, Phase, explain};
use vm::launch;
use vm::runtime_dir::{RestoreTarget, RuntimeDir, VmFile};

/// QEMU opens its monitor within 100 ms; a loaded host takes longer.
const STARTUP: Duration = Duration::from_secs(60);

/// What was proven, or not.
pub struct Report {
    /// The VM that was restored.
    pub vm: VmName,
    /// The checkpoint that it was restored from.
    pub id: CheckpointId,
    /// Of the checkpoint's manifest: a number may be used again by a store that lost its newest.
    manifest: Checksum,
    /// Of the QEMU that restored it, as `MAJOR.MINOR.MICRO`.
    pub qemu_version: String,
    /// Where the restored VM is not what is stored; none if it is proven.
    pub differences: Vec<Difference>,
    /// Sections that may differ, and why.
    pub excused: Vec<(String, &'static str)>,
    /// Device sections that were compared.
    pub sections: usize,
    /// How the guest ran on; none where it did not.
    pub ran: Option<Ran>,
    /// Memory that was compared: all RAM blocks.
    pub memory_bytes: u64,
    /// Virtual sizes of the disks that were compared.
    pub disk_bytes: u64,
    /// From the request on.
    pub total: Duration,
    /// Whether the proof is remembered in the store.
    pub noted: bool,
}

impl Report {
    /// As `stillpoint verify --restore --json` prints it.
    pub fn json(&self) -> Value {
        json!({
            "name": self.vm,
            "id": self.id,
            "proven": self.is_proven(),
            "qemu_version": self.qemu_version,
            "differences": self.differences.iter().map(Difference::json).collect::<Vec<_>>(),
            "may_differ": self.excused.iter().map(|(section, why)| json!({ "section": section, "why": why })).collect::<Vec<_>>(),
            "sections": self.sections,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "ran": self.ran.as_ref().map(Ran::json),
            "noted": self.noted,
            "total_ms": whole_milliseconds(self.total),
        })
    }

    /// Nothing differs, and the guest ran if it was to.
    pub fn is_proven(&self) -> bool {
        self.differences.is_empty() && self.ran.as_ref().is_none_or(|ran| ran.trouble.is_empty())
    }
}

/// What is to be proven, and how.
pub struct Request {
    /// Which one; the newest if it names none.
    pub checkpoint: CheckpointName,
    /// The store's URL.
    pub store: String,
    /// QEMU's program; none for one of this host, as [`restore::Request::qemu`] has it.
    pub qemu: Option<String>,
    /// How long the guest runs after the comparison; none if it does not.
    pub run: Option<Duration>,
    /// Values of the saved command line that are replaced: `--map`.
    pub map: Vec<Mapping>,
    /// Things of this host that QEMU may have: `--allow`.
    pub allow: Vec<String>,
    /// Is shown how much has been read, and what the user should know.
    pub progress: Arc<dyn Progress>,
}

/// Restores the checkpoint in the sandbox, compares, and notes the proof in the store. To be called
/// in the process that [`sandbox::supervise`] started.
///
/// # Errors
/// When there is no comparison: the checkpoint cannot be restored here, is damaged, or the proof is
/// interrupted. A restored VM that differs is no error but a [`Report`].
pub async fn run(request: &Request) -> Result<Report, EngineError> {
    let mut phase = Phase::Plan;
    run_in_sandbox(request, &mut phase).await.in_phase(phase)
}

async fn run_in_sandbox(request: &Request, phase: &mut Phase) -> Result<Report> {
    sandbox::die_with_supervisor()?;
    let workspace =
        sandbox::workspace().context("internal error: a proof outside of its supervisor")?;
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut report = tokio::select! {
        report = prove(request, &workspace, phase) => report?,
        _ = terminate.recv() => return Err(anyhow!("interrupted; nothing was proven")),
        _ = tokio::signal::ctrl_c() => return Err(anyhow!("interrupted; nothing was proven")),
    };
    if report.is_proven() {
        let noted = note::write(&request.store, &report).await;
        report.noted = noted.is_ok();
        if let Err(error) = noted {
            request
                .progress
                .note(&format!("the proof could not be noted in the store: {}", explain(&error)));
        }
    }
    Ok(report)
}

async fn prove(request: &Request, workspace: &Path, phase: &mut Phase) -> Result<Report> {
    let begun = Instant::now();
    let proof = Proof::plan(request, workspace).await?;
    let mut report = proof.run(request, phase).await?;
    report.total = begun.elapsed();
    Ok(report)
}

struct Proof {
    source: Source,
    manifest: Checksum,
    expected: HashMap<SpaceName, Expected>,
    id: CheckpointId,
    qemu: PathBuf,
    qemu_version: String,
    runtime: RuntimeDir,
    directory: PathBuf,
}

impl Proof {
    async fn plan(request: &Request, workspace: &Path) -> Result<Self> {
        let repository = stores::open_existing(&request.store).await?;
        let id = lineage::resolve(&repository, &request.checkpoint).await?;
        let lineage = Lineage::read(&repository, &request.checkpoint.vm, id).await?;
        let indexes = lineage.indexes(&repository).await?;
        let expected = expected::of_lineage(&lineage, &indexes)?;
        drop((lineage, indexes));
        let manifest = note::manifest_checksum(&repository, &request.checkpoint.vm, id).await?;
        let source =
            Source::open(&repository, &request.checkpoint.vm, id, Arc::clone(&request.progress))
                .await?;
        let plugin = launch::plugin_path()?;
        launch::saved::check_record(&source.manifest().vm_record)?;
        let (qemu, facts) =
            restore::program::find(request.qemu.as_deref(), &source.manifest().vm_record, &plugin)?;
        room::check(&expected, workspace)?;
        let runtime = RuntimeDir::new(Some(&workspace.join("run")), &request.checkpoint.vm)?;
        runtime.create()?;
        let directory = workspace.join("vm");
        std::fs::create_dir(&directory)
            .with_context(|| format!("making {}", directory.display()))?;
        Ok(Self {
            source,
            manifest,
            expected,
            id,
            qemu,
            qemu_version: facts.version,
            runtime,
            directory,
        })
    }

    async fn run(self, request: &Request, phase: &mut Phase) -> Result<Report> {
        *phase = Phase::Layers;
        let layers = LocalLayers::provide(&self.source).await?;
        *phase = Phase::Disks;
        let paths = restore::disks::restore(
            &self.source,
            &layers,
            &self.places(),
            &self.qemu,
            self.runtime.path(),
            None,
        )
        .await?;
        *phase = Phase::Start;
        let file = self.vm_file(request, &layers, &paths)?;
        let memory = GuestMemory::create(file.name.as_ref(), file.ram_bytes)
            .context("making the guest's memory")?;
        let workspace =
            sandbox::workspace().context("internal error: a proof outside of its supervisor")?;
        let _tpms = self.tpms(&file).await?;
        let command = sandbox::command(&workspace, &file.directory, &file.qemu)?;
        let new = NewQemu::spawn(command, &file, &self.runtime, None, &memory)?;
        *phase = Phase::Compare;
        match self.compare(request, &file, new.pid(), &layers, memory).await {
            // Dropped, so ended.
            Ok(report) => Ok(report),
            Err(error) => Err(new.explain(error)),
        }
    }

    /// The software TPMs that QEMU expects.
    async fn tpms(&self, file: &VmFile) -> Result<Vec<tpm::Tpm>> {
        let sockets = isolate::tpm_sockets(&launch::arguments::parse(&file.arguments)?);
        if sockets.is_empty() {
            return Ok(Vec::new());
        }
        tpm::check_state(restore::memory::device_state(&self.source).await?.as_bytes())?;
        let started = sockets.iter().map(|socket| tpm::Tpm::start(socket));
        futures::future::try_join_all(started).await
    }

    /// As a restore makes it, without its host.
    fn vm_file(
        &self,
        request: &Request,
        layers: &LocalLayers,
        paths: &launch::paths::NewPaths,
    ) -> Result<VmFile> {
        let manifest = self.source.manifest();
        let options = isolate::isolate(
            launch::arguments::parse(&manifest.vm_record.arguments)?,
            &self.directory,
        );
        let mut wishes = Wishes {
            map: restore::line::resolve(&manifest.vm_record.arguments, &request.map)?,
            allow: request.allow.clone(),
        };
        wishes.allow.extend(isolate::harmless(&options));
        // What the sandbox has taken away needs no other value.
        let gone = qemu_cmdline::restorable::map(options.clone(), &wishes).unused;
        wishes.map.retain(|(old, _)| !gone.contains(old));
        let options =
            launch::saved::restored(&launch::arguments::words(&options), paths, &wishes)?.options;
        let options = restore::check::on_the_line(&self.places(), layers, options)?;
        for directory in isolate::directories(&options, &self.directory) {
            std::fs::create_dir_all(&directory)
                .with_context(|| format!("making {}", directory.display()))?;
        }
        let target = RestoreTarget {
            name: manifest.vm.clone(),
            store: request.store.clone(),
            instance: launch::new_instance()?,
            qemu: self.qemu.clone(),
            qemu_version: self.qemu_version.clone(),
            arguments: launch::arguments::words(&options),
            directory: self.directory.clone(),
            fleecing: self.directory.clone(),
            restored_from: None,
        };
        Ok(VmFile::restored(&manifest.vm_record, target))
    }

    /// Images are made in the private directory, wherever `--map` has them.
    fn places(&self) -> Places<'_> {
        Places { manifest: self.source.manifest(), dir: &self.directory, map: &[] }
    }

    async fn compare(
        &self,
        request: &Request,
        file: &VmFile,
        pid: u32,
        layers: &LocalLayers,
        memory: GuestMemory,
    ) -> Result<Report> {
        let manifest = self.source.manifest();
        let qmp = Qmp::connect(self.runtime.qmp(), STARTUP).await;
        let qmp = qmp.context("connecting to QEMU's monitor")?;
        let blocks = ramblock::ram_blocks(&qmp).await.context("asking QEMU for its RAM blocks")?;
        restore::check_blocks(manifest, &blocks)?;
        let ram_block = manifest.vm_record.ram_block.clone();
        restore::memory::fill(self.source.clone(), ram_block, memory.clone()).await?;
        let mut differences = self.main_memory(memory.clone()).await?;
        let stored = restore::memory::device_state(&self.source).await?;
        self.load(&qmp, stored.clone()).await?;
        activate_disks(&qmp).await;
        self.damage(&qmp, &memory, layers).await?;
        // Before the load nothing may differ; after it only what QEMU writes when it loads.
        let loaded =
            if differences.is_empty() { self.main_memory(memory).await? } else { Vec::new() };
        differences.extend(disks::compare_layers(&self.source, layers).await?);
        let pid = sandbox::pid_in_proc(pid)?;
        differences
            .extend(disks::compare(&qmp, pid, file, &self.source, layers, &self.expected).await?);
        let resaved = self.resave(&qmp).await?;
        let mut devices = devices::compare(&stored, &resaved)?;
        let written = devices::written_by_load(&resaved);
        for difference in loaded {
            let (left, excused) = difference.without(&written, PAGE_SIZE as u64);
            devices.excused.extend(excused);
            differences.extend(left.found());
        }
        differences
            .extend(resaved.blocks.into_iter().filter_map(|(_, difference)| difference.found()));
        differences.extend(devices.differences);
        let is_live = manifest.run_state.is_none_or(|state| of_record(state).is_live());
        let ran = match request.run.filter(|_| is_live) {
            Some(time) => Some(running::watch(&qmp, time).await?),
            None => None,
        };
        Ok(Report {
            vm: manifest.vm.clone(),
            id: self.id,
            manifest: self.manifest,
            qemu_version: self.qemu_version.clone(),
            differences,
            excused: devices.excused,
            sections: devices.same,
            ran,
            memory_bytes: manifest.ram_blocks.iter().map(|block| block.used.0).sum(),
            disk_bytes: manifest.disks.iter().map(|disk| disk.virtual_size.0).sum(),
            total: Duration::ZERO,
            noted: false,
        })
    }

    /// The small RAM blocks and the devices, as a restore loads them.
    async fn load(&self, qmp: &Qmp, devices: DeviceState) -> Result<()> {
        let contents = restore::memory::small_blocks(&self.source).await?;
        let incoming = Incoming::begin(qmp, &self.runtime.path().join("incoming.sock")).await?;
        let transition = Transition::choose(self.source.manifest().run_state, true, false)?;
        let devices = transition.write(devices)?;
        restore::memory::load(incoming, &self.source, &contents, &devices).await
    }

    /// For tests: see [`kill_point::damage`].
    async fn damage(&self, qmp: &Qmp, memory: &GuestMemory, layers: &LocalLayers) -> Result<()> {
        if let Some(offset) = kill_point::damage("memory") {
            let offset = offset.parse().context("STILLPOINT_DAMAGE")?;
            let mut byte = [0];
            memory.read(offset, &mut byte)?;
            memory.write(offset, &[!byte[0]])?;
        }
        if let Some(offset) = kill_point::damage("layer") {
            let layer = self
                .source
                .manifest()
                .layers()
                .next()
                .context("STILLPOINT_DAMAGE: there is no layer")?;
            disks::invert_byte(layers.path(layer), offset.parse().context("STILLPOINT_DAMAGE")?)?;
        }
        if let Some(line) = kill_point::damage("monitor") {
            tracing::warn!(said = qmp.hmp(&line).await?, "STILLPOINT_DAMAGE");
        }
        Ok(())
    }

    async fn main_memory(&self, memory: GuestMemory) -> Result<Vec<Difference>> {
        let name = SpaceName::ram(&self.source.manifest().vm_record.ram_block)?;
        let expected = self
            .expected
            .get(&name)
            .with_context(|| format!("the checkpoint has no space {name}"))?
            .clone();
        let compare = move || memory::main_block(&name, &memory, &expected);
        let found = tokio::task::spawn_blocking(compare)
            .await
            .context("internal error: comparing memory panicked")??;
        Ok(found.found().into_iter().collect())
    }

    /// The blocks that are QEMU's own, and the devices.
    async fn resave(&self, qmp: &Qmp) -> Result<memory::Resaved> {
        let main = &self.source.manifest().vm_record.ram_block;
        let others = self
            .expected
            .iter()
            .filter(|(name, _)| name.kind() == SpaceKind::Ram && name.local() != main);
        let others: HashMap<String, Expected> =
            others.map(|(name, pages)| (name.local().to_owned(), pages.clone())).collect();
        let stream = resave::start(qmp).await?;
        let read = tokio::task::spawn_blocking(move || memory::read_stream(stream, &others));
        let resaved = read.await.context("internal error: comparing a stream panicked")?;
        resave::finish(qmp).await?;
        resaved
    }
}
