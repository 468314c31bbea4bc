//! `stillpoint verify --restore`: the proof that a checkpoint brings back what it says.
//!
//! ```text
//! plan      the checkpoint, a QEMU, room in memory and on disk
//! restore   as `stillpoint restore` does it, but in a sandbox: see [`sandbox`] and [`isolate`]
//! compare   before the first instruction: every page of memory, every block of the disks and of
//!           the layers below, the device state as QEMU writes it again
//! run       if asked for: the guest runs on; it must not die, panic or reset
//! note      the proof is remembered beside the checkpoint
//! ```
//! No writer epoch is claimed, no name is taken, and the store is only read but for the note.

pub mod client;
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

use crate::cli::VerifyArgs;
use crate::exit::damaged;
use crate::fault;
use crate::inspect::{self, print_json};
use crate::launch;
use crate::lineage::Lineage;
use crate::restore::disks::Places;
use crate::restore::layers::LocalLayers;
use crate::restore::qemu::NewQemu;
use crate::restore::run_state::Transition;
use crate::restore::source::Source;
use crate::restore::{self, activate_disks};
use crate::run_state::of_record;
use crate::runtime::{MachineFile, RestoreTarget, RuntimeDir};
use crate::terminal::out;
use anyhow::{Context, Result, anyhow};
use checkpoint_format::{CheckpointSeq, Checksum, PAGE_SIZE, SpaceKind, SpaceName, VmName};
use difference::Difference;
use dirty_tracker::GuestMemory;
use expected::Expected;
use qemu_cmdline::restorable::Wishes;
use qmp_bridge::incoming::Incoming;
use qmp_bridge::{Qmp, ramblock, resave};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

/// QEMU opens its monitor within 100 ms; a loaded host takes longer.
const STARTUP: Duration = Duration::from_secs(60);

/// What was proven, or not.
pub struct Report {
    vm: VmName,
    seq: CheckpointSeq,
    /// Of the checkpoint's manifest: a number may be used again by a store that lost its newest.
    manifest: Checksum,
    qemu_version: String,
    differences: Vec<Difference>,
    excused: Vec<(String, &'static str)>,
    sections: usize,
    ran: Option<running::Ran>,
    memory_bytes: u64,
    disk_bytes: u64,
    total: Duration,
}

impl Report {
    fn is_proven(&self) -> bool {
        self.differences.is_empty() && self.ran.as_ref().is_none_or(|ran| ran.trouble.is_empty())
    }
}

/// In the process inside the sandbox's process namespace.
pub async fn run(args: &VerifyArgs) -> Result<()> {
    sandbox::die_with_supervisor()?;
    let workspace = sandbox::workspace().context("internal error: a proof outside of its supervisor")?;
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let report = tokio::select! {
        report = prove(args, &workspace) => report?,
        _ = terminate.recv() => return Err(anyhow!("interrupted; nothing was proven")),
        _ = tokio::signal::ctrl_c() => return Err(anyhow!("interrupted; nothing was proven")),
    };
    let noted = if report.is_proven() { Some(note::write(args, &report).await) } else { None };
    if let Some(Err(error)) = &noted {
        eprintln!("stillpoint: the proof could not be noted in the store: {}", crate::exit::explain(error));
    }
    tell(args, &report, noted.is_some_and(|noted| noted.is_ok()))
}

fn tell(args: &VerifyArgs, report: &Report, noted: bool) -> Result<()> {
    if args.json {
        let mut value = json(report);
        value["noted"] = noted.into();
        print_json(&value)?;
    } else {
        report.differences.iter().for_each(|difference| out!("  differs: {difference}"));
        report.ran.iter().flat_map(|ran| &ran.trouble).for_each(|trouble| out!("  after its start: {trouble}"));
        report.excused.iter().for_each(|(section, why)| out!("  may differ: {section}: {why}"));
    }
    let name = format!("{}@{}", report.vm, report.seq);
    if report.is_proven() {
        if !args.json {
            out!(
                "{name} is proven: restored with QEMU {}, {} of memory and {} of disks compared, {} device sections, {:.1} s",
                report.qemu_version,
                crate::terminal::bytes(report.memory_bytes),
                crate::terminal::bytes(report.disk_bytes),
                report.sections,
                report.total.as_secs_f64()
            );
        }
        return Ok(());
    }
    let troubles = report.ran.iter().flat_map(|ran| &ran.trouble).cloned();
    let all: Vec<String> = report.differences.iter().map(ToString::to_string).chain(troubles).collect();
    let more = if all.len() > 1 { format!(" (and {} more)", all.len() - 1) } else { String::new() };
    Err(damaged(format!("{name} does not restore as it was: {}{more}", all.first().cloned().unwrap_or_default())))
}

fn json(report: &Report) -> Value {
    json!({
        "name": report.vm,
        "id": report.seq,
        "proven": report.is_proven(),
        "qemu_version": report.qemu_version,
        "differences": report.differences.iter().map(Difference::json).collect::<Vec<_>>(),
        "may_differ": report.excused.iter().map(|(section, why)| json!({ "section": section, "why": why })).collect::<Vec<_>>(),
        "sections": report.sections,
        "memory_bytes": report.memory_bytes,
        "disk_bytes": report.disk_bytes,
        "ran": report.ran.as_ref().map(running::Ran::json),
        "total_ms": report.total.as_millis() as u64,
    })
}

async fn prove(args: &VerifyArgs, workspace: &Path) -> Result<Report> {
    let begun = Instant::now();
    let proof = Proof::plan(args, workspace).await?;
    let mut report = proof.run(args).await?;
    report.total = begun.elapsed();
    Ok(report)
}

struct Proof {
    source: Source,
    manifest: Checksum,
    expected: HashMap<SpaceName, Expected>,
    seq: CheckpointSeq,
    qemu: PathBuf,
    qemu_version: String,
    runtime: RuntimeDir,
    directory: PathBuf,
}

impl Proof {
    async fn plan(args: &VerifyArgs, workspace: &Path) -> Result<Self> {
        let repository = inspect::open(&args.store.store).await?;
        let seq = inspect::resolve(&repository, &args.checkpoint).await?;
        let lineage = Lineage::read(&repository, &args.checkpoint.vm, seq).await?;
        let indexes = lineage.indexes(&repository).await?;
        let expected = expected::of_lineage(&lineage, &indexes)?;
        drop((lineage, indexes));
        let manifest = note::manifest_checksum(&repository, &args.checkpoint.vm, seq).await?;
        let source = Source::open(&repository, &args.checkpoint.vm, seq).await?;
        let plugin = launch::plugin_path()?;
        launch::saved::check_record(&source.manifest().machine)?;
        let (qemu, facts) = restore::program::find(args.qemu.as_deref(), &source.manifest().machine, &plugin)?;
        room::check(&expected, workspace)?;
        let runtime = RuntimeDir::new(Some(&workspace.join("run")), &args.checkpoint.vm)?;
        runtime.create()?;
        let directory = workspace.join("vm");
        std::fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
        Ok(Self { source, manifest, expected, seq, qemu, qemu_version: facts.version, runtime, directory })
    }

    async fn run(self, args: &VerifyArgs) -> Result<Report> {
        let layers = LocalLayers::provide(&self.source).await?;
        let paths = restore::disks::restore(&self.source, &layers, &self.places(), &self.qemu, self.runtime.path()).await?;
        let file = self.machine_file(args, &layers, &paths)?;
        let memory = GuestMemory::create(file.name.as_ref(), file.ram_bytes).context("making the guest's memory")?;
        let workspace = sandbox::workspace().context("internal error: a proof outside of its supervisor")?;
        let _tpms = self.tpms(&file).await?;
        let command = sandbox::command(&workspace, &file.directory, &file.qemu)?;
        let new = NewQemu::spawn(command, &file, &self.runtime, None, &memory)?;
        match self.compare(args, &file, new.pid(), &layers, memory).await {
            // Dropped, so ended.
            Ok(report) => Ok(report),
            Err(error) => Err(new.explain(error)),
        }
    }

    /// The software TPMs that QEMU expects.
    async fn tpms(&self, file: &MachineFile) -> Result<Vec<tpm::Tpm>> {
        let sockets = isolate::tpm_sockets(&launch::arguments::parse(&file.arguments)?);
        if sockets.is_empty() {
            return Ok(Vec::new());
        }
        tpm::check_state(restore::memory::device_state(&self.source).await?.as_bytes())?;
        let started = sockets.iter().map(|socket| tpm::Tpm::start(socket));
        futures::future::try_join_all(started).await
    }

    /// As a restore makes it, without its host.
    fn machine_file(&self, args: &VerifyArgs, layers: &LocalLayers, paths: &launch::paths::NewPaths) -> Result<MachineFile> {
        let manifest = self.source.manifest();
        let options = isolate::isolate(launch::arguments::parse(&manifest.machine.arguments)?, &self.directory);
        let mut wishes = Wishes { map: restore::line::resolve(&manifest.machine.arguments, &args.map)?, allow: args.allow.clone() };
        wishes.allow.extend(isolate::harmless(&options));
        // What the sandbox has taken away needs no other value.
        let gone = qemu_cmdline::restorable::map(options.clone(), &wishes).unused;
        wishes.map.retain(|(old, _)| !gone.contains(old));
        let options = launch::saved::restored(&launch::arguments::words(&options), paths, &wishes)?.options;
        let options = restore::check::on_the_line(&self.places(), layers, options)?;
        for directory in isolate::directories(&options, &self.directory) {
            std::fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        }
        let target = RestoreTarget {
            name: manifest.vm.clone(),
            store: args.store.store.clone(),
            instance: launch::new_instance()?,
            qemu: self.qemu.clone(),
            qemu_version: self.qemu_version.clone(),
            arguments: launch::arguments::words(&options),
            directory: self.directory.clone(),
            scratch: self.directory.clone(),
            restored_from: None,
        };
        Ok(MachineFile::restored(&manifest.machine, target))
    }

    /// Images are made in the private directory, wherever `--map` has them.
    fn places(&self) -> Places<'_> {
        Places { manifest: self.source.manifest(), dir: &self.directory, map: &[] }
    }

    async fn compare(&self, args: &VerifyArgs, file: &MachineFile, pid: u32, layers: &LocalLayers, memory: GuestMemory) -> Result<Report> {
        let manifest = self.source.manifest();
        let qmp = Qmp::connect(self.runtime.qmp(), STARTUP).await.context("connecting to QEMU's monitor")?;
        restore::check_blocks(manifest, &ramblock::ram_blocks(&qmp).await.context("asking QEMU for its RAM blocks")?)?;
        restore::memory::fill(self.source.clone(), manifest.machine.ram_block.clone(), memory.clone()).await?;
        let mut differences = self.main_memory(memory.clone()).await?;
        let contents = restore::memory::small_blocks(&self.source).await?;
        let stored = restore::memory::device_state(&self.source).await?;
        let incoming = Incoming::begin(&qmp, &self.runtime.path().join("incoming.sock")).await?;
        let transition = Transition::choose(manifest.run_state, true, false)?;
        restore::memory::load(incoming, &self.source, &contents, &transition.write(stored.clone())?).await?;
        drop(contents);
        activate_disks(&qmp).await;
        self.damage(&qmp, &memory, layers).await?;
        // Before the load nothing may differ; after it only what QEMU writes when it loads.
        let loaded = if differences.is_empty() { self.main_memory(memory).await? } else { Vec::new() };
        differences.extend(disks::compare_layers(&self.source, layers).await?);
        differences.extend(disks::compare(&qmp, sandbox::pid_in_proc(pid)?, file, &self.source, layers, &self.expected).await?);
        let resaved = self.resave(&qmp).await?;
        let mut devices = devices::compare(&stored, &resaved)?;
        let written = devices::written_by_load(&resaved);
        for difference in loaded {
            let (left, excused) = difference.without(&written, PAGE_SIZE as u64);
            devices.excused.extend(excused);
            differences.extend(left.found());
        }
        differences.extend(resaved.blocks.into_iter().filter_map(|(_, difference)| difference.found()));
        differences.extend(devices.differences);
        let is_live = manifest.run_state.is_none_or(|state| of_record(state).is_live());
        let ran = match args.run.filter(|_| is_live) {
            Some(time) => Some(running::watch(&qmp, time).await?),
            None => None,
        };
        Ok(Report {
            vm: manifest.vm.clone(),
            seq: self.seq,
            manifest: self.manifest,
            qemu_version: self.qemu_version.clone(),
            differences,
            excused: devices.excused,
            sections: devices.same,
            ran,
            memory_bytes: manifest.ram_blocks.iter().map(|block| block.used.0).sum(),
            disk_bytes: manifest.disks.iter().map(|disk| disk.virtual_size.0).sum(),
            total: Duration::ZERO,
        })
    }

    /// For tests: see [`fault::damage`].
    async fn damage(&self, qmp: &Qmp, memory: &GuestMemory, layers: &LocalLayers) -> Result<()> {
        if let Some(offset) = fault::damage("memory") {
            let offset = offset.parse().context("STILLPOINT_DAMAGE")?;
            let mut byte = [0];
            memory.read(offset, &mut byte)?;
            memory.write(offset, &[!byte[0]])?;
        }
        if let Some(offset) = fault::damage("layer") {
            let layer = self.source.manifest().layers().next().context("STILLPOINT_DAMAGE: there is no layer")?;
            disks::invert_byte(layers.path(layer), offset.parse().context("STILLPOINT_DAMAGE")?)?;
        }
        if let Some(line) = fault::damage("monitor") {
            tracing::warn!(said = qmp.hmp(&line).await?, "STILLPOINT_DAMAGE");
        }
        Ok(())
    }

    async fn main_memory(&self, memory: GuestMemory) -> Result<Vec<Difference>> {
        let name = SpaceName::ram(&self.source.manifest().machine.ram_block)?;
        let expected = self.expected.get(&name).with_context(|| format!("the checkpoint has no space {name}"))?.clone();
        let compare = move || memory::main_block(&name, &memory, &expected);
        let found = tokio::task::spawn_blocking(compare).await.context("internal error: comparing memory panicked")??;
        Ok(found.found().into_iter().collect())
    }

    /// The blocks that are QEMU's own, and the devices.
    async fn resave(&self, qmp: &Qmp) -> Result<memory::Resaved> {
        let main = &self.source.manifest().machine.ram_block;
        let others = self.expected.iter().filter(|(name, _)| name.kind() == SpaceKind::Ram && name.local() != main);
        let others: HashMap<String, Expected> = others.map(|(name, pages)| (name.local().to_owned(), pages.clone())).collect();
        let stream = resave::start(qmp).await?;
        let read = tokio::task::spawn_blocking(move || memory::read_stream(stream, &others));
        let resaved = read.await.context("internal error: comparing a stream panicked")?;
        resave::finish(qmp).await?;
        resaved
    }
}
