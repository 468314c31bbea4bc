//! Phase `commit`: packs closed, the manifest written, one rename. After that the checkpoint
//! exists.

use super::Checkpointer;
use super::carried;
use super::outcome::{Kind, Outcome, Phases, milliseconds};
use super::prepare::Run;
use crate::kill_point;
use crate::lineage;
use crate::run_state;
use anyhow::{Context, Result};
use bytes::Bytes;
use checkpoint_format::{
    ByteLen, CheckpointIdentity, CheckpointKind, DiskRecord, LayerRef, Manifest, PAGE_SIZE,
    PackRecord, Qcow2Record, RamBlockRecord, SpaceName, SpaceRecord, Totals, VmRecord,
};
use checkpoint_store::Durable;
use qmp_bridge::RunState;
use qmp_bridge::disks::{BackingImage, Disk, Qcow2Layout};
use std::time::{Instant, SystemTime};
use tracing::instrument;
use vm::drives::Drives;
use vm::error::{self, classed};
use vm::launch::arguments;

impl Checkpointer {
    #[instrument(name = "commit", level = "debug", skip_all)]
    pub(super) async fn commit(&mut self, run: &mut Run, phases: &mut Phases) -> Result<Outcome> {
        let begun = Instant::now();
        run.packer.take().context("the packer is gone")?.finish().await?;
        run.resumed = None;
        phases.since("upload", begun);
        kill_point::point("uploaded");
        self.check_parent(run).await?;
        run.check_carried()?;
        let packs: Vec<PackRecord> = run.packs().into_iter().map(|pack| pack.record).collect();
        let is_same = packs.is_empty() && self.is_same_vm(run).await?;
        if let (Some(parent), true) = (run.parent, is_same) {
            let partial = run.take_partial()?;
            self.change_store(|_| partial.abort())
                .await?
                .context("removing an empty checkpoint")?;
            return self.unchanged(run, parent).await;
        }
        let begun = Instant::now();
        let totals = self.totals(run, &packs);
        let (manifest, totals) = self.manifest(run, packs, totals)?;
        let identity = CheckpointIdentity::new(run.id, &manifest);
        kill_point::point("commit");
        let partial = run.partial.as_ref().context("the partial checkpoint is gone")?;
        let sealed =
            partial.seal(Bytes::from(manifest)).await.context("committing the checkpoint")?;
        let partial = run.take_partial()?;
        let durable = self
            .change_store(|_| partial.publish(sealed))
            .await?
            .context("committing the checkpoint")?;
        phases.since("commit", begun);
        kill_point::point("committed");
        let outcome = outcome(run, &durable, totals);
        let begun = Instant::now();
        self.acknowledge(run, durable, identity).await;
        phases.since("acknowledge", begun);
        Ok(outcome)
    }

    /// A checkpoint that adds to one that the store no longer holds could not be restored.
    async fn check_parent(&mut self, run: &Run) -> Result<()> {
        let (session, base) = (
            self.store.as_ref().context("the store is not open")?,
            self.base.as_mut().context("the base is not known")?,
        );
        if base.lineage.is_held(&session.repository).await? {
            return Ok(());
        }
        let vm_name = &self.vm.file.name;
        let what = run.parent.map_or_else(
            || format!("it has checkpoints of {vm_name} that it did not have"),
            |parent| {
                format!("it does not hold {vm_name}@{parent}, or what that builds on, as it did")
            },
        );
        Err(classed(
            error::Class::Store,
            format!(
                "the store has changed while checkpoint {} was taken: {what}; the next one starts from what it holds",
                run.id
            ),
        ))
    }

    /// No page differs from the parent; neither do the disks and the sizes of what there is?
    async fn is_same_vm(&self, run: &Run) -> Result<bool> {
        let (Some(parent), Some(session)) = (run.parent, &self.store) else { return Ok(false) };
        let before = lineage::manifest(&session.repository, &self.vm.file.name, parent).await?;
        let now = self.describe(run, Vec::new(), Totals::default())?;
        let is_same = (now.spaces, now.ram_blocks, now.disks, now.vm_record)
            == (before.spaces, before.ram_blocks, before.disks, before.vm_record);
        Ok(is_same && now.run_state == before.run_state)
    }

    fn totals(&self, run: &Run, packs: &[PackRecord]) -> Totals {
        let changed = run.delta.as_ref().map_or(0, |delta| delta.changed().0);
        Totals {
            pages_dirty: run.pages_dirty,
            bytes_changed: ByteLen(changed * PAGE_SIZE as u64),
            bytes_stored_raw: ByteLen(packs.iter().map(|pack| pack.info.raw_bytes.0).sum()),
            bytes_stored: ByteLen(packs.iter().map(|pack| pack.info.len.0).sum()),
        }
    }

    /// The manifest counts itself: its length is in its own totals.
    fn manifest(
        &self,
        run: &Run,
        packs: Vec<PackRecord>,
        totals: Totals,
    ) -> Result<(Vec<u8>, Totals)> {
        let mut manifest = self.describe(run, packs, totals)?;
        let draft = manifest.encode().context("encoding the manifest")?.len() as u64;
        manifest.totals.bytes_stored_raw.0 += draft;
        manifest.totals.bytes_stored.0 += draft;
        Ok((manifest.encode().context("encoding the manifest")?, manifest.totals))
    }

    fn describe(&self, run: &Run, packs: Vec<PackRecord>, totals: Totals) -> Result<Manifest> {
        let (file, facts) = (&self.vm.file, &self.vm.facts);
        let session = self.store.as_ref().context("the store is not open")?;
        Ok(Manifest {
            vm: file.name.clone(),
            id: run.id,
            parent: run.parent,
            kind: if run.parent.is_some() {
                CheckpointKind::Incremental
            } else {
                CheckpointKind::Full
            },
            epoch: session.writer.epoch(),
            instance: file.instance.clone(),
            created_at: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            stillpoint_version: env!("CARGO_PKG_VERSION").to_owned(),
            vm_record: VmRecord {
                qemu_version: facts.qemu.to_string(),
                program: file.qemu.to_string_lossy().into_owned(),
                machine_type: file.machine_type.clone(),
                accelerator: file.accelerator.clone(),
                arguments: arguments::words(&run.inventory.drives.options),
                vcpus: run.inventory.composition.vcpus(),
                ram_bytes: ByteLen(file.ram_bytes),
                ram_block: file.ram_block.clone(),
                directory: self.vm.directory().to_string_lossy().into_owned(),
                files: run.boot_files.clone(),
            },
            run_state: Some(run_state::record(run.run_state)),
            spaces: self.space_records(run)?,
            ram_blocks: self.vm.blocks.iter().map(|block| self.ram_record(block)).collect(),
            disks: run
                .inventory
                .drives
                .disks
                .iter()
                .map(|disk| self.disk_record(&run.inventory.drives, disk))
                .collect::<Result<_>>()?,
            packs,
            totals,
        })
    }

    fn space_records(&self, run: &Run) -> Result<Vec<SpaceRecord>> {
        let ram =
            self.vm.blocks.iter().map(|block| {
                Ok(SpaceRecord::new(SpaceName::ram(&block.name)?, ByteLen(block.used)))
            });
        let writable = run.inventory.drives.disks.iter().filter(|disk| !disk.read_only);
        let disks = writable.map(|disk| {
            Ok(SpaceRecord::new(SpaceName::disk(&disk.name)?, ByteLen(disk.virtual_size)))
        });
        let state = SpaceRecord::new(SpaceName::device_state(), run.state_bytes);
        ram.chain(disks).chain([Ok(state)]).collect()
    }

    fn ram_record(&self, block: &qmp_bridge::ramblock::RamBlock) -> RamBlockRecord {
        RamBlockRecord {
            name: block.name.clone(),
            used: ByteLen(block.used),
            total: ByteLen(block.total),
            page_size: ByteLen(block.page_size),
            shared: block.name == self.vm.file.ram_block,
        }
    }

    fn disk_record(&self, drives: &Drives, disk: &Disk) -> Result<DiskRecord> {
        let layer = |image: &BackingImage| -> Result<LayerRef> {
            let stored = self
                .layers
                .get(&image.file)
                .with_context(|| format!("the layer {} was not stored", image.file.display()))?;
            // Two disks may read one file in two formats.
            Ok(LayerRef { format: image.format.as_str().to_owned(), ..stored.clone() })
        };
        Ok(DiskRecord {
            node: disk.name.clone(),
            space: (!disk.read_only).then(|| SpaceName::disk(&disk.name)).transpose()?,
            read_only: disk.read_only,
            format: disk.format.as_str().to_owned(),
            virtual_size: ByteLen(disk.virtual_size),
            file: disk.file.to_string_lossy().into_owned(),
            backing: drives.layers(disk).iter().map(layer).collect::<Result<_>>()?,
            qcow2: disk.layout.as_ref().filter(|_| !disk.read_only).map(qcow2_record),
        })
    }
}

fn qcow2_record(layout: &Qcow2Layout) -> Qcow2Record {
    Qcow2Record {
        cluster_size: ByteLen(layout.cluster_size),
        compat: layout.compat.clone(),
        lazy_refcounts: layout.lazy_refcounts,
        refcount_bits: layout.refcount_bits,
        extended_l2: layout.extended_l2,
        compression: layout.compression.clone(),
    }
}

fn outcome(run: &Run, durable: &Durable, totals: Totals) -> Outcome {
    let mut notes = run.notes.clone();
    if run.run_state != RunState::Running {
        notes.push(format!(
            "the guest did not run: its run state is `{}`, and a restored VM has it too (restore --run lets it run)",
            run.run_state
        ));
    }
    if durable.short_of_replicas() > 0 {
        notes.push(format!(
            "{} files were written with fewer replicas than wanted ({} at least); the store was asked to make up for it",
            durable.short_of_replicas(),
            durable.least_replicas().unwrap_or(0)
        ));
    }
    Outcome {
        id: run.id,
        parent: run.parent,
        kind: if run.parent.is_some() { Kind::Incremental } else { Kind::Full },
        pause_ms: milliseconds(run.pause),
        passes: run.brief_stops.len() as u32,
        brief_stops_ms: run.brief_stops.iter().copied().map(milliseconds).collect(),
        pages_dirty: totals.pages_dirty.0,
        bytes_changed: totals.bytes_changed.0,
        bytes_stored_raw: totals.bytes_stored_raw.0,
        bytes_stored: totals.bytes_stored.0,
        bytes_carried: carried::bytes(&run.carried).0,
        layer_bytes_stored: run.layer_bytes,
        replicas: durable.least_replicas(),
        notes,
        engine: run.engine.name().to_owned(),
        run_state: run.run_state.name().to_owned(),
        ..Outcome::default()
    }
}
