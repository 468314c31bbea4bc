//! Bringing a machine back: plan -> layers -> disks and RAM -> device state -> running -> a member of its lineage again.
//!
//! Nothing of the old host is needed but the store. Nothing runs before everything is in place; whatever fails before
//! `cont` leaves the checkpoint as it was, and a new QEMU that is ended.

mod disks;
mod layers;
mod memory;
mod program;
mod qemu;
mod source;

use crate::checkpoint;
use crate::checkpoint::Force;
use crate::checkpoint::outcome::{Phases, milliseconds};
use crate::cli::RestoreArgs;
use crate::exit::refused;
use crate::helper::attach;
use crate::helper::machine::Machine;
use crate::inspect::{self, print_json};
use crate::launch;
use crate::launch::arguments::QemuOption;
use crate::launch::paths::NewPaths;
use crate::runtime::{MachineFile, Marks, RuntimeDir};
use crate::terminal::bytes;
use anyhow::{Context, Result};
use checkpoint_format::{CheckpointSeq, Manifest};
use dirty_tracker::GuestMemory;
use layers::LocalLayers;
use qemu::NewQemu;
use qemu_cmdline::restorable::Wishes;
use qmp_bridge::capture::{BitmapTag, start_recording};
use qmp_bridge::incoming::Incoming;
use serde_json::{Value, json};
use source::Source;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub async fn run(args: RestoreArgs) -> Result<()> {
    let begun = Instant::now();
    let result = Restore::plan(args, begun).await?.run().await?;
    if result.json {
        return print_json(&result.value);
    }
    let value = &result.value;
    let state = if value["running"] == true { "runs" } else { "is paused" };
    println!(
        "{} {state} again as of {}@{}, {:.0} ms after the command, {} read from the store",
        value["name"].as_str().unwrap_or_default(),
        value["restored"].as_str().unwrap_or_default(),
        value["id"],
        value["resume_ms"].as_f64().unwrap_or_default(),
        bytes(value["bytes_read"].as_u64().unwrap_or_default()),
    );
    Ok(())
}

struct Report {
    json: bool,
    value: Value,
}

struct Restore {
    args: RestoreArgs,
    begun: Instant,
    phases: Phases,
    source: Source,
    seq: CheckpointSeq,
    runtime: RuntimeDir,
    dir: PathBuf,
    qemu: PathBuf,
    plugin: PathBuf,
    qemu_version: String,
}

impl Restore {
    async fn plan(args: RestoreArgs, begun: Instant) -> Result<Self> {
        let repository = inspect::open(&args.store.store).await?;
        let seq = inspect::resolve(&repository, &args.checkpoint).await?;
        let source = Source::open(&repository, &args.checkpoint.vm, seq).await?;
        let name = args.new_name.as_ref().unwrap_or(&args.checkpoint.vm);
        let runtime = RuntimeDir::new(args.runtime.runtime_dir.as_deref(), name)?;
        let dir = args.dir.clone().unwrap_or_else(|| PathBuf::from(name.as_str()));
        let dir = std::path::absolute(&dir).with_context(|| format!("making {} absolute", dir.display()))?;
        let plugin = launch::plugin_path()?;
        launch::saved::check_record(&source.manifest().machine)?;
        let (qemu, facts) = program::find(args.qemu.as_deref(), &source.manifest().machine, &plugin)?;
        let mut phases = Phases::default();
        phases.since("plan", begun);
        Ok(Self { args, begun, phases, source, seq, runtime, dir, qemu, plugin, qemu_version: facts.version })
    }

    async fn run(mut self) -> Result<Report> {
        self.runtime.create()?;
        launch::refuse_running(&self.runtime)?;
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&self.dir).with_context(|| format!("making {}", self.dir.display()))?;
        let step = Instant::now();
        let layers = LocalLayers::provide(&self.source).await?;
        self.phases.since("layers", step);
        let step = Instant::now();
        let runtime_path = self.runtime.path().to_owned();
        let paths = disks::restore(&self.source, &layers, &self.dir, &self.qemu, &runtime_path).await?;
        self.phases.since("disks", step);
        let mut file = self.machine_file(&layers, &paths)?;
        // First: what an earlier instance of this name remembers of its claims is not this one's.
        self.runtime.forget_earlier()?;
        self.claim(&file).await?;
        self.check_newest().await?;
        let memory = GuestMemory::create(file.name.as_ref(), file.ram_bytes).context("making the guest's memory")?;
        let new = NewQemu::start(&file, &self.runtime, &self.plugin, &memory)?;
        file.pid = Some(new.pid());
        self.runtime.save_machine(&file)?;
        match self.bring_up(memory).await {
            Ok(()) => new.leave(),
            Err(error) => return Err(new.explain(error)),
        }
        let resume_ms = milliseconds(self.begun.elapsed());
        let log_begin = std::fs::metadata(self.runtime.helper_log()).map_or(0, |facts| facts.len());
        launch::spawn_helper(&file.name, self.args.runtime.runtime_dir.as_deref(), &self.runtime)?;
        attach::wait(&self.runtime, log_begin).await?;
        Ok(self.report(&file, layers.bytes_read, resume_ms))
    }

    /// The command line of the old machine with the files of the new one.
    fn machine_file(&self, layers: &LocalLayers, paths: &NewPaths) -> Result<MachineFile> {
        let manifest = self.source.manifest();
        let record = &manifest.machine;
        let map = self.args.map.iter().map(|map| (map.old.clone(), map.new.clone())).collect();
        let wishes = Wishes { map, allow: self.args.allow.clone() };
        let restored = launch::saved::restored(&record.arguments, paths, &wishes)?;
        restored.notes.iter().for_each(|note| eprintln!("stillpoint: {note}"));
        let options = restored.options;
        check_disks(manifest, layers, &options, &self.dir)?;
        Ok(MachineFile {
            format: MachineFile::FORMAT,
            name: self.args.new_name.clone().unwrap_or_else(|| manifest.vm.clone()),
            store: launch::absolute_store(&self.args.store.store)?,
            instance: launch::new_instance()?,
            qemu: self.qemu.clone(),
            pid: None,
            qemu_version: self.qemu_version.clone(),
            machine_type: record.machine_type.clone(),
            accelerator: record.accelerator.clone(),
            ram_bytes: record.ram_bytes.0,
            ram_block: record.ram_block.clone(),
            arguments: launch::arguments::words(&options),
            directory: self.dir.clone(),
            scratch: launch::scratch_dir(self.args.scratch_dir.as_deref())?,
            restored_from: self.args.new_name.is_none().then_some(self.seq),
            unprepared: None,
        })
    }

    /// Before anything runs: from here on an older helper of this machine cannot commit.
    async fn claim(&self, file: &MachineFile) -> Result<()> {
        let force = Force::if_ordered(self.args.take_over);
        checkpoint::claim(self.source.repository(), &file.name, &file.instance, &self.runtime, force).await?;
        Ok(())
    }

    /// Whoever wrote before the claim may have committed while we were reading.
    async fn check_newest(&self) -> Result<()> {
        let newest = inspect::resolve(self.source.repository(), &self.args.checkpoint).await?;
        if newest != self.seq {
            return Err(refused(format!("checkpoint {newest} was committed while {} was being restored; run the command again", self.seq)));
        }
        Ok(())
    }

    async fn bring_up(&mut self, memory: GuestMemory) -> Result<()> {
        let step = Instant::now();
        let block = self.source.manifest().machine.ram_block.clone();
        let filling = tokio::spawn(memory::fill(self.source.clone(), block, memory));
        let contents = memory::small_blocks(&self.source).await?;
        let devices = memory::device_state(&self.source).await?;
        let machine = Machine::attach(self.runtime.clone()).await?;
        check_blocks(self.source.manifest(), &machine)?;
        filling.await.context("filling the guest's memory was cut off")??;
        self.phases.since("memory", step);
        let step = Instant::now();
        // QEMU has not touched the memory yet; what it writes while it loads is dirty from the first checkpoint's view.
        machine.lock_tracker()?.protect_all()?;
        let incoming = Incoming::begin(&machine.qmp, &self.runtime.path().join("incoming.sock")).await?;
        memory::load(incoming, &self.source, &contents, &devices).await?;
        self.phases.since("devices", step);
        self.begin_recording(&machine).await?;
        if self.args.paused {
            activate_disks(&machine).await;
        } else {
            machine.qmp.execute_json("cont", Value::Null).await.context("starting the guest")?;
            announce(&machine).await;
        }
        Ok(())
    }

    /// The next checkpoint of the same machine is incremental: what is in RAM and on the disks now is what the store has.
    async fn begin_recording(&self, machine: &Machine) -> Result<()> {
        if machine.file.restored_from != Some(self.seq) {
            return Ok(());
        }
        let tag: BitmapTag = machine.file.instance.parse().context("naming the dirty bitmaps")?;
        let disks = machine.disks().await?.disks;
        start_recording(&machine.qmp, &tag, self.seq.0, &disks).await.context("beginning to record the disks' changes")?;
        self.runtime.set_marks(Marks { since: self.source.identity(), is_exact: true })
    }

    fn report(self, file: &MachineFile, layer_bytes: u64, resume_ms: f64) -> Report {
        let value = json!({
            "name": file.name,
            "restored": self.args.checkpoint.vm,
            "id": self.seq,
            "running": !self.args.paused,
            "resume_ms": resume_ms,
            "bytes_read": self.source.bytes_read() + layer_bytes,
            "layer_bytes_read": layer_bytes,
            "dir": self.dir,
            "phases": self.phases.into_map(),
        });
        Report { json: self.args.json, value }
    }
}

/// Every disk must be on the new command line, or QEMU would open files of the old machine.
fn check_disks(manifest: &Manifest, layers: &LocalLayers, options: &[QemuOption], dir: &Path) -> Result<()> {
    for disk in &manifest.disks {
        let file = match disk.backing.first().filter(|_| disk.read_only) {
            Some(layer) => layers.path(layer).to_owned(),
            None => dir.join(disks::file_name(disk)),
        };
        if !launch::paths::is_named(options, dir, &file) {
            return Err(refused(format!(
                "the saved command line does not name {}, the file of disk {}; the checkpoint cannot be restored as it is",
                disk.file, disk.node
            )));
        }
    }
    Ok(())
}

/// The new QEMU must have built the same RAM blocks, or the state would be loaded into the wrong place.
fn check_blocks(manifest: &Manifest, machine: &Machine) -> Result<()> {
    for block in &manifest.ram_blocks {
        let found = machine.blocks.iter().find(|found| found.name == block.name);
        let fits = found.is_some_and(|found| block.used.0 <= found.total);
        if !fits {
            return Err(refused(format!(
                "the new QEMU has no RAM block {} of {} bytes, as the saved machine had; is its command line or version another?",
                block.name, block.used
            )));
        }
    }
    Ok(())
}

/// After a load QEMU keeps the disks inactive until `cont`; a checkpoint of a machine that has not run yet needs them. QEMU
/// before 10.0 lacks the command and does not ask for it.
async fn activate_disks(machine: &Machine) {
    if let Err(error) = machine.qmp.execute_json("blockdev-set-active", json!({ "active": true })).await {
        tracing::debug!(%error, "blockdev-set-active");
    }
}

/// Tells the network where the machine is now; a machine without a network does not mind.
async fn announce(machine: &Machine) {
    let arguments = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
    if let Err(error) = machine.qmp.execute_json("announce-self", arguments).await {
        tracing::debug!(%error, "announce-self");
    }
}
