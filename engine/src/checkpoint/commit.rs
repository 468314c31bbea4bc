//! Phase `commit`: the manifest written, one rename. After that the checkpoint
//! exists.

use super::index::{IndexParts, NewIndex};
use super::outcome::{Kind, Outcome, Phases, milliseconds};
use super::parent::Parent;
use super::underway::{
    Committed, Durable, Failed, FailedStore, Site, Unchanged, Underway, Uploaded,
};
use crate::kill_point;
use crate::layers;
use crate::lineage;
use crate::run_state;
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use checkpoint_format::{
    ByteLen, CheckpointId, CheckpointIdentity, CheckpointKind, DiskRecord, LayerRef, Manifest,
    PAGE_SIZE, PackRecord, PageCount, Qcow2Record, RamBlockRecord, SpaceName, SpaceRecord, Totals,
    VmRecord,
};
use checkpoint_store::Sealed;
use qmp_bridge::RunState;
use qmp_bridge::disks::{BackingImage, Disk, Qcow2Layout};
use qmp_bridge::ramblock::RamBlock;
use std::time::SystemTime;
use tokio::time::Instant;
use tracing::instrument;
use vm::drives::Drives;
use vm::error::{self, classed};
use vm::launch::arguments;
use vm::running::Vm;

/// A manifest and its file, in two parts.
struct WrittenManifest {
    head: Vec<u8>,
    segment: Vec<u8>,
    manifest: Manifest,
}

impl Uploaded {
    #[instrument(name = "commit", level = "debug", skip_all)]
    pub(super) async fn commit(
        mut self,
        site: &Site<'_>,
        phases: &mut Phases,
    ) -> Result<Committed, Failed> {
        let is_same = match self.check(site).await {
            Ok(is_same) => is_same,
            Err(error) => return Err(self.failed(error)),
        };
        if let (Some(parent), true) = (self.underway.parent, is_same) {
            return self.give_up_unchanged(parent).await.map(Committed::Unchanged);
        }
        let begun = Instant::now();
        let (sealed, manifest, parent) = match self.seal(site).await {
            Ok(sealed) => sealed,
            Err(error) => return Err(self.failed(error)),
        };
        let durable = self.publish(sealed, manifest.totals, parent).await?;
        phases.since("commit", begun);
        kill_point::point("committed");
        Ok(Committed::Durable(durable))
    }

    /// Whether nothing differs from the parent; an error if the checkpoint could not be restored.
    async fn check(&mut self, site: &Site<'_>) -> Result<bool> {
        self.check_parent(site).await?;
        self.check_carried()?;
        Ok(self.stored.packs.is_empty() && self.is_same_vm(site).await?)
    }

    /// A checkpoint that adds to one that the store no longer holds could not be restored.
    async fn check_parent(&mut self, site: &Site<'_>) -> Result<()> {
        let Underway { session, history, id, parent, .. } = &mut self.underway;
        if history.lineage.is_held(&session.repository).await? {
            return Ok(());
        }
        let vm_name = &site.vm.file.name;
        let what = parent.map_or_else(
            || format!("it has checkpoints of {vm_name} that it did not have"),
            |parent| {
                format!("it does not hold {vm_name}@{parent}, or what that builds on, as it did")
            },
        );
        Err(classed(
            error::Class::Store,
            format!(
                "the store has changed while checkpoint {id} was taken: {what}; the next one starts from what it holds"
            ),
        ))
    }

    /// A page of an earlier try that was not looked at may have changed since: then none of the
    /// packs counts for the next try.
    fn check_carried(&mut self) -> Result<()> {
        let left = self.buffers.delta.unconfirmed();
        if left > PageCount(0) {
            self.stored.packs.clear();
            bail!(
                "internal error: {left} pages that an earlier try stored were not compared; \
                 take the checkpoint again"
            );
        }
        Ok(())
    }

    /// No page differs from the parent; neither do the disks and the sizes of what there is?
    async fn is_same_vm(&self, site: &Site<'_>) -> Result<bool> {
        let Underway { parent: Some(parent), session, .. } = &self.underway else {
            return Ok(false);
        };
        let before = lineage::manifest(&session.repository, &site.vm.file.name, *parent).await?;
        let now = self.describe(site, Vec::new(), Totals::default())?;
        let is_same = (now.spaces, now.ram_blocks, now.disks, now.vm_record)
            == (before.spaces, before.ram_blocks, before.disks, before.vm_record);
        Ok(is_same && now.run_state == before.run_state)
    }

    async fn give_up_unchanged(self, parent: CheckpointId) -> Result<Unchanged, Failed> {
        let outcome = Outcome {
            id: parent,
            parent: Some(parent),
            kind: Kind::Unchanged,
            pages_dirty: self.moment.pages_dirty.0,
            ..self.outcome()
        };
        let Self { mut underway, stored, buffers, claimed, .. } = self;
        let removed = underway.change_store(stored.partial.abort()).await;
        match removed.context("removing an empty checkpoint") {
            Ok(()) => Ok(Unchanged { underway, buffers, claimed, outcome }),
            Err(error) => {
                let store = FailedStore::Ended(None);
                Err(Failed::captured(error, underway, store, Some(buffers), claimed))
            }
        }
    }

    async fn seal(&self, site: &Site<'_>) -> Result<(Sealed, Manifest, Parent)> {
        let WrittenManifest { head, segment, manifest } = self.manifest(site).await?;
        let identity = CheckpointIdentity::new(self.underway.id, &head);
        let parent = Parent::new(&manifest, identity, head.len() as u64, 1);
        kill_point::point("commit");
        let sealed = self.stored.partial.seal(Bytes::from([head, segment].concat())).await;
        Ok((sealed.context("committing the checkpoint")?, manifest, parent))
    }

    async fn publish(
        self,
        sealed: Sealed,
        totals: Totals,
        parent: Parent,
    ) -> Result<Durable, Failed> {
        let outcome = self.outcome();
        let Self { mut underway, stored, buffers, claimed, moment, .. } = self;
        let bytes_carried = stored.bytes_carried.0;
        let published = underway.change_store(stored.partial.publish(sealed)).await;
        let receipt = match published.context("committing the checkpoint") {
            Ok(receipt) => receipt,
            Err(error) => {
                let store = FailedStore::Ended(None);
                return Err(Failed::captured(error, underway, store, Some(buffers), claimed));
            }
        };
        let outcome = Outcome {
            pages_dirty: totals.pages_dirty.0,
            bytes_changed: totals.bytes_changed.0,
            bytes_stored_raw: totals.bytes_stored_raw.0,
            bytes_stored: totals.bytes_stored.0,
            bytes_carried,
            layer_bytes_stored: underway.layer_bytes,
            replicas: receipt.least_replicas(),
            notes: notes(&underway.notes, moment.run_state, &receipt),
            ..outcome
        };
        Ok(Durable { underway, receipt, parent, buffers, claimed, outcome })
    }

    /// What a checkpoint tells about itself, durable or not.
    fn outcome(&self) -> Outcome {
        let (underway, moment) = (&self.underway, &self.moment);
        Outcome {
            id: underway.id,
            parent: underway.parent,
            kind: if underway.parent.is_some() { Kind::Incremental } else { Kind::Full },
            pause_ms: milliseconds(moment.pause),
            passes: moment.brief_stops.len(),
            brief_stops_ms: moment.brief_stops.iter().copied().map(milliseconds).collect(),
            engine: underway.engine.name().to_owned(),
            run_state: moment.run_state.name().to_owned(),
            ..Outcome::default()
        }
    }

    fn totals(&self, packs: &[PackRecord]) -> Totals {
        Totals {
            pages_dirty: self.moment.pages_dirty,
            bytes_changed: ByteLen(self.buffers.delta.changed().0 * PAGE_SIZE as u64),
            bytes_stored_raw: ByteLen(packs.iter().map(|pack| pack.info.raw_bytes.0).sum()),
            bytes_stored: ByteLen(packs.iter().map(|pack| pack.info.len.0).sum()),
        }
    }

    /// The manifest counts itself: the length of its file is in its own totals.
    async fn manifest(&self, site: &Site<'_>) -> Result<WrittenManifest> {
        let packs: Vec<PackRecord> =
            self.stored.packs.iter().map(|pack| pack.record.clone()).collect();
        let totals = self.totals(&packs);
        let mut manifest = self.describe(site, packs, totals)?;
        let parts = IndexParts {
            repository: &self.underway.session.repository,
            partial: &self.stored.partial,
            packs: &self.stored.packs,
            manifest: &manifest,
            parent: self.underway.history.lineage.parent(),
        };
        let NewIndex { record, segment } = parts.make().await?;
        manifest.index = Some(record);
        let draft = manifest.encode().context("encoding the manifest")?.len() + segment.len();
        manifest.totals.bytes_stored_raw.0 += draft as u64;
        manifest.totals.bytes_stored.0 += draft as u64;
        let head = manifest.encode().context("encoding the manifest")?;
        Ok(WrittenManifest { head, segment, manifest })
    }

    fn describe(
        &self,
        site: &Site<'_>,
        packs: Vec<PackRecord>,
        totals: Totals,
    ) -> Result<Manifest> {
        let (file, facts) = (&site.vm.file, &site.vm.facts);
        let (underway, drives) = (&self.underway, &self.underway.inventory.drives);
        Ok(Manifest {
            vm: file.name.clone(),
            id: underway.id,
            parent: underway.parent,
            kind: if underway.parent.is_some() {
                CheckpointKind::Incremental
            } else {
                CheckpointKind::Full
            },
            epoch: underway.session.writer.epoch(),
            instance: file.instance.clone(),
            created_at: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            stillpoint_version: env!("CARGO_PKG_VERSION").to_owned(),
            vm_record: VmRecord {
                qemu_version: facts.qemu.to_string(),
                program: file.qemu.to_string_lossy().into_owned(),
                machine_type: file.machine_type.clone(),
                accelerator: file.accelerator.clone(),
                arguments: arguments::words(&drives.options),
                vcpus: underway.inventory.composition.vcpus(),
                ram_bytes: ByteLen(file.ram_bytes),
                ram_block: file.ram_block.clone(),
                directory: site.vm.directory().to_string_lossy().into_owned(),
                files: underway.boot_files.clone(),
            },
            run_state: Some(run_state::record(self.moment.run_state)),
            spaces: self.space_records(site.vm)?,
            ram_blocks: site.vm.blocks.iter().map(|block| ram_record(site.vm, block)).collect(),
            disks: drives
                .disks
                .iter()
                .map(|disk| disk_record(site.layers, drives, disk))
                .collect::<Result<_>>()?,
            packs,
            index: None,
            totals,
        })
    }

    fn space_records(&self, vm: &Vm) -> Result<Vec<SpaceRecord>> {
        let ram = vm
            .blocks
            .iter()
            .map(|block| Ok(SpaceRecord::new(SpaceName::ram(&block.name)?, ByteLen(block.used))));
        let disks = &self.underway.inventory.drives.disks;
        let writable = disks.iter().filter(|disk| !disk.read_only);
        let disks = writable.map(|disk| {
            Ok(SpaceRecord::new(SpaceName::disk(&disk.name)?, ByteLen(disk.virtual_size)))
        });
        let state = SpaceRecord::new(SpaceName::device_state(), self.state_bytes);
        ram.chain(disks).chain([Ok(state)]).collect()
    }
}

fn ram_record(vm: &Vm, block: &RamBlock) -> RamBlockRecord {
    RamBlockRecord {
        name: block.name.clone(),
        used: ByteLen(block.used),
        total: ByteLen(block.total),
        page_size: ByteLen(block.page_size),
        shared: block.name == vm.file.ram_block,
    }
}

fn disk_record(layers: &layers::Known, drives: &Drives, disk: &Disk) -> Result<DiskRecord> {
    let layer = |image: &BackingImage| -> Result<LayerRef> {
        let stored = layers
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

/// `prepared`: those of the phases before.
fn notes(
    prepared: &[String],
    run_state: RunState,
    receipt: &checkpoint_store::Durable,
) -> Vec<String> {
    let mut notes = prepared.to_vec();
    if run_state != RunState::Running {
        notes.push(format!(
            "the guest did not run: its run state is `{run_state}`, and a restored VM has it too (restore --run lets it run)"
        ));
    }
    if receipt.short_of_replicas() > 0 {
        notes.push(format!(
            "{} files were written with fewer replicas than wanted ({} at least); the store was asked to make up for it",
            receipt.short_of_replicas(),
            receipt.least_replicas().unwrap_or(0)
        ));
    }
    notes
}
