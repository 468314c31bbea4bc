//! What a rollback refuses, before anything of the VM is touched.

use super::Request;
use crate::checkpoint::{Checkpointer, Report, Standing};
use crate::lineage;
use crate::progress::Silent;
use crate::restore::on_demand::OnDemand;
use crate::restore::{Source, memory};
use crate::run_state::of_record;
use anyhow::{Context, Error, Result};
use checkpoint_format::{
    ByteLen, CheckpointId, DiskRecord, Manifest, PageCount, RamBlockRecord, SpaceName, VmName,
};
use qmp_bridge::RunState;
use qmp_bridge::device_sections::sections_like;
use qmp_bridge::device_state::DeviceState;
use qmp_bridge::disks::Disk;
use std::collections::BTreeSet;
use std::sync::Arc;
use vm::error::refused;
use vm::running::Vm;

/// Frames that are kept in memory while single pages are read.
const FRAMES: ByteLen = ByteLen(64 << 20);

/// What is to be done, and that it can be.
pub(super) struct Plan {
    /// The checkpoint that the VM is set back to.
    pub to: OnDemand,
    /// The VM's last checkpoint.
    pub now: OnDemand,
    pub parent: CheckpointId,
    pub standing: Standing,
    /// The space of the guest's main memory.
    pub main_memory: SpaceName,
    pub devices: DeviceState,
    /// What the guest does afterwards.
    pub wanted: RunState,
    /// An earlier rollback was not completed: any page may differ.
    pub is_continued: bool,
}

impl Plan {
    /// The spaces that are written to page by page, and their sizes.
    pub(super) fn spaces(&self) -> Vec<(SpaceName, PageCount)> {
        let manifest = self.to.source().manifest();
        let disks = manifest.disks.iter().filter_map(|disk| disk.space.as_ref());
        let names = std::iter::once(&self.main_memory).chain(disks);
        let sized = names.filter_map(|name| Some((name.clone(), manifest.space(name)?.pages())));
        sized.collect()
    }
}

/// Refuses what needs no store.
pub(super) fn vm(checkpointer: &Checkpointer) -> Result<()> {
    let vm = &checkpointer.vm;
    if vm.file.external.is_some() || !vm.has_tracker() {
        return Err(refused(format!(
            "{} is no managed VM: only where the plugin tracks its memory is it known what \
             differs; 'stillpoint adopt' makes it one, or end it and restore the checkpoint",
            vm.file.name
        )));
    }
    checkpointer.refuse_arriving("a rollback")
}

/// QEMU can be brought from one of these run states to the other, with other devices in between.
pub(super) fn run_state(now: RunState, wanted: RunState) -> Result<()> {
    let is_possible = match wanted {
        RunState::Paused => matches!(now, RunState::Running | RunState::Paused),
        _ => !matches!(now, RunState::Suspended | RunState::Shutdown | RunState::InternalError),
    };
    if is_possible {
        return Ok(());
    }
    Err(refused(format!(
        "the VM's run state is `{now}`, and QEMU cannot be brought from that to `{wanted}`; end it \
         and restore the checkpoint"
    )))
}

/// What the guest did in the checkpoint, if QEMU can be brought to that in place.
fn saved_state(manifest: &Manifest) -> Result<RunState> {
    let saved = manifest.run_state.map_or(RunState::Running, of_record);
    match saved {
        RunState::Running | RunState::Paused => Ok(saved),
        other => Err(refused(format!(
            "the run state of {}@{} is `{other}`, which a running QEMU cannot be brought to; end \
             the VM and restore the checkpoint",
            manifest.vm, manifest.id
        ))),
    }
}

/// Reads what is stored of both checkpoints, and compares. `is_last`: no checkpoint will be taken
/// before the VM is set back.
pub(super) async fn plan(
    checkpointer: &mut Checkpointer,
    request: &Request,
    is_last: bool,
    report: &Report,
) -> Result<Plan> {
    let is_continued = checkpointer.half_rolled_back()?.is_some();
    let standing = checkpointer.standing(report).await?;
    let vm = &checkpointer.vm;
    let name = &vm.file.name;
    let must_be_exact = is_last && !is_continued;
    let repository = &standing.session.repository;
    let parent = standing.parent.filter(|parent| *parent >= request.id);
    let parent = parent.ok_or_else(|| other_lineage(name, request.id))?;
    if !lineage::is_ancestor(repository, name, parent, request.id).await? {
        return Err(other_lineage(name, request.id));
    }
    is_known(&standing, name, parent, must_be_exact)?;
    let open = |id: CheckpointId| Source::open(repository, name, id, Arc::new(Silent));
    let (to, now) = (open(request.id).await?, open(parent).await?);
    let wanted = saved_state(to.manifest())?;
    let now_is = RunState::of(&vm.qmp).await.context("asking for the run state")?;
    run_state(now_is, wanted)?;
    same_vm(to.manifest(), now.manifest())?;
    is_as_recorded(vm, &standing, now.manifest())?;
    let (devices, current) = (memory::device_state(&to).await?, memory::device_state(&now).await?);
    same_sections(&devices, &current)?;
    let main_memory = SpaceName::ram(&vm.file.ram_block)?;
    let on_demand = |source: Source| OnDemand::new(source, FRAMES);
    let (to, now) = (on_demand(to), on_demand(now));
    Ok(Plan { to, now, parent, standing, main_memory, devices, wanted, is_continued })
}

/// What was written since the last checkpoint is known.
fn is_known(
    standing: &Standing,
    name: &VmName,
    parent: CheckpointId,
    must_be_exact: bool,
) -> Result<()> {
    if must_be_exact && !(standing.is_exact && standing.has_bitmaps) {
        return Err(refused(format!(
            "it is not known what was written since {name}@{parent}; take a checkpoint first, or \
             omit --discard"
        )));
    }
    if !standing.is_chain_same {
        return Err(refused(format!(
            "a disk stands on other layers than in {name}@{parent}; end the VM and restore the \
             checkpoint"
        )));
    }
    Ok(())
}

fn other_lineage(name: &VmName, id: CheckpointId) -> Error {
    refused(format!(
        "{name}@{id} is no ancestor of what {name} is now, so it is not known what differs; end \
         the VM and restore the checkpoint"
    ))
}

/// What is of the VM itself and not of its content.
fn same_vm(to: &Manifest, now: &Manifest) -> Result<()> {
    let other = |what: &str| {
        Err(refused(format!(
            "{what} of {}@{} is not what it is now; end the VM and restore the checkpoint",
            to.vm, to.id
        )))
    };
    let (old, new) = (&to.vm_record, &now.vm_record);
    if (&old.machine_type, old.vcpus, old.ram_bytes, &old.ram_block)
        != (&new.machine_type, new.vcpus, new.ram_bytes, &new.ram_block)
    {
        return other("the machine type, the number of vCPUs or the memory size");
    }
    let block = |block: &RamBlockRecord| (block.name.clone(), block.used, block.shared);
    let blocks = |manifest: &Manifest| manifest.ram_blocks.iter().map(block).collect::<Vec<_>>();
    if blocks(to) != blocks(now) {
        return other("a RAM block");
    }
    if to.ram_blocks.iter().any(|block| block.shared && block.name != old.ram_block) {
        return other("a second shared RAM block");
    }
    let disk = |disk: &DiskRecord| {
        let layers: Vec<_> = disk.backing.iter().map(|layer| layer.digest).collect();
        (disk.node.clone(), disk.read_only, disk.format.clone(), disk.virtual_size, layers)
    };
    let disks = |manifest: &Manifest| manifest.disks.iter().map(disk).collect::<Vec<_>>();
    if disks(to) != disks(now) {
        return other("a disk (its size, format, layers or medium)");
    }
    Ok(())
}

/// Nothing was plugged in, out or resized since the last checkpoint.
fn is_as_recorded(vm: &Vm, standing: &Standing, now: &Manifest) -> Result<()> {
    let changed = |what: &str| {
        Err(refused(format!(
            "{what} was changed since the last checkpoint; undo that, or end the VM and restore \
             the checkpoint"
        )))
    };
    let recorded: Vec<_> =
        now.ram_blocks.iter().map(|block| (block.name.as_str(), block.used.0)).collect();
    let blocks: Vec<_> = vm.blocks.iter().map(|block| (block.name.as_str(), block.used)).collect();
    if recorded != blocks {
        return changed("a RAM block");
    }
    let record = |disk: &Disk| now.disks.iter().find(|record| record.node == disk.name);
    let is_same = |disk: &Disk| {
        record(disk).is_some_and(|record| {
            (record.read_only, record.virtual_size.0.next_multiple_of(512), record.format.as_str())
                == (disk.read_only, disk.virtual_size, disk.format.as_str())
        })
    };
    let disks = &standing.drives.disks;
    if let Some(disk) = disks.iter().find(|disk| disk.arriving) {
        return Err(refused(format!(
            "blocks of disk {} are still arriving from the store; wait until all are here",
            disk.device
        )));
    }
    if disks.len() != now.disks.len() || !disks.iter().all(is_same) {
        return changed("a disk");
    }
    Ok(())
}

/// QEMU loads no section of a device that it does not have.
fn same_sections(to: &DeviceState, now: &DeviceState) -> Result<()> {
    let names = |state: &DeviceState| -> Result<BTreeSet<(String, u32)>> {
        let sections = sections_like(state, &[]).context("reading a device state")?;
        Ok(sections.into_iter().map(|section| (section.name, section.instance)).collect())
    };
    let (to, now) = (names(to)?, names(now)?);
    match to.symmetric_difference(&now).next() {
        None => Ok(()),
        Some((name, instance)) => Err(refused(format!(
            "only one of the checkpoint and the present VM has a device {name} (instance \
             {instance}); end the VM and restore the checkpoint"
        ))),
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use vm::error::{Class, class_of};

    #[test]
    fn rollback_is_possible_from_a_panic_and_not_from_a_shutdown() {
        let can = |now, wanted| run_state(now, wanted).is_ok();
        assert!(can(RunState::GuestPanicked, RunState::Running));
        assert!(!can(RunState::GuestPanicked, RunState::Paused), "it would not be `paused`");
        assert!(can(RunState::Running, RunState::Paused));
        assert!(!can(RunState::Shutdown, RunState::Running), "QEMU wants a reset first");
    }

    #[test]
    fn rollback_refuses_another_set_of_devices() {
        let state = |names: &[&str]| {
            let section = |(number, name): (usize, &&str)| {
                let id = u8::try_from(number).unwrap();
                let length = u8::try_from(name.len()).unwrap();
                [
                    &[4, 0, 0, 0, id, length][..],
                    name.as_bytes(),
                    &[0, 0, 0, 0, 0, 0, 0, 1, 9, 9, 0x7e, 0, 0, 0, id],
                ]
                .concat()
            };
            let sections: Vec<u8> = names.iter().enumerate().flat_map(section).collect();
            DeviceState::from_bytes([b"QEVM\0\0\0\x03".as_slice(), &sections, &[0]].concat())
                .unwrap()
        };
        assert!(same_sections(&state(&["cpu", "vga"]), &state(&["vga", "cpu"])).is_ok());
        let error = same_sections(&state(&["cpu"]), &state(&["cpu", "vga"])).unwrap_err();
        assert_eq!(class_of(&error), Class::Refused);
        assert!(error.to_string().contains("vga"), "{error}");
    }
}
