//! What a VM consists of at one moment, as one value that can be compared: what the checks of a
//! checkpoint looked at must still be so at its pause, minutes later, when layers were stored in
//! between.

use crate::drives::Drives;
use crate::error::{Class, VmError, classed};
use crate::running::Vm;
use anyhow::{Context, Result};
use qmp_bridge::devices::{self, GuestDevice};
use qmp_bridge::disks::{Disk, EmptyDrive};
use qmp_bridge::qmp::EventWatch;
use qmp_bridge::ramblock::{self, RamBlock};
use qmp_bridge::vm::Composition;
use serde::Deserialize;
use serde_json::Value;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// What comes and goes again between two looks shows only in these. A device that is plugged in is
/// told by no event.
const EVENTS: &[&str] = &["DEVICE_DELETED", "DEVICE_TRAY_MOVED", "MEMORY_DEVICE_SIZE_CHANGE"];

/// How long the event of a device that has gone may take; it may have come before the watch began.
const UNPLUG_EVENT: Duration = Duration::from_millis(500);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The VM as the checks saw it, and a watch on it since then.
pub struct Inventory {
    /// The guest's devices.
    pub devices: Vec<GuestDevice>,
    /// vCPUs, RAM blocks and what blocks a migration.
    pub composition: Composition,
    /// Its drives.
    pub drives: Drives,
    blocks: Vec<RamBlock>,
    watch: EventWatch,
    since: Instant,
}

impl Inventory {
    /// Of the VM as it is now.
    ///
    /// # Errors
    /// If QEMU does not answer, or a disk cannot be part of a checkpoint.
    pub async fn take(vm: &Vm) -> Result<Self, VmError> {
        let watch = vm.qmp.watch(EVENTS);
        let begun = Instant::now();
        let devices =
            devices::guest_devices(&vm.qmp).await.context("asking QEMU for its devices")?;
        wait_for_unplugged(vm, &devices, &watch, begun).await;
        // An event that comes before this reply is of a change that came before the lists below,
        // however late it is read; a device that has gone since it was listed is missed later.
        vm.qmp
            .execute_json("query-version", Value::Null)
            .await
            .context("asking QEMU for its version")?;
        let since = Instant::now();
        let composition =
            Composition::read(&vm.qmp).await.context("asking QEMU for its vCPUs and memory")?;
        let drives = vm.disks().await?;
        Ok(Self { devices, composition, drives, blocks: vm.blocks.clone(), watch, since })
    }

    /// After the guest was resumed: whether devices, vCPUs and memory are what they were.
    ///
    /// # Errors
    /// If they are not, or QEMU does not answer.
    pub async fn check_vm(&self, vm: &Vm) -> Result<(), VmError> {
        unchanged(self.vm_change(vm).await?)
    }

    /// When nothing of the capture is above the disks any more: whether they, and their media, are
    /// what they were.
    ///
    /// # Errors
    /// If they are not, or QEMU does not answer.
    pub async fn check_disks(&self, vm: &Vm) -> Result<(), VmError> {
        unchanged(self.disk_change(vm).await?)
    }

    /// What changed, if that is why a checkpoint failed. QEMU's own words for it tell only of a
    /// symptom.
    pub async fn change(&self, vm: &Vm) -> Option<String> {
        let vm_change = self.vm_change(vm).await.ok().flatten();
        match vm_change {
            None => self.disk_change(vm).await.ok().flatten(),
            some => some,
        }
    }

    async fn vm_change(&self, vm: &Vm) -> Result<Option<String>> {
        let devices =
            devices::guest_devices(&vm.qmp).await.context("asking QEMU for its devices")?;
        let composition =
            Composition::read(&vm.qmp).await.context("asking QEMU for its vCPUs and memory")?;
        let blocks =
            ramblock::ram_blocks(&vm.qmp).await.context("asking QEMU for its RAM blocks")?;
        let device = |device: &GuestDevice| format!("device {} ({})", device.path, device.kind);
        let place = |block: &RamBlock| {
            format!("RAM block {} ({} bytes at {:#x})", block.name, block.used, block.offset)
        };
        let changed = difference(&names(&self.devices, device), &names(&devices, device))
            .or_else(|| difference(&names(&self.blocks, place), &names(&blocks, place)))
            .or_else(|| self.composition.difference(&composition))
            .or_else(|| self.event());
        Ok(changed)
    }

    async fn disk_change(&self, vm: &Vm) -> Result<Option<String>> {
        let now = vm.disks().await?;
        let empty = |drive: &EmptyDrive| drive.device.clone();
        let changed = difference(&names(&self.drives.empty, empty), &names(&now.empty, empty))
            .map(|what| format!("empty drive {what}"));
        let disk = |disk: &Disk| {
            format!("disk {} ({} bytes, {})", disk.device, disk.virtual_size, disk.file.display())
        };
        let moved = difference(&names(&self.drives.disks, disk), &names(&now.disks, disk));
        let otherwise =
            (!self.drives.is_same(&now)).then(|| "a disk stands on other images".to_owned());
        Ok(moved.or(changed).or(otherwise).or_else(|| self.event()))
    }

    fn event(&self) -> Option<String> {
        let event = self.watch.since(self.since).into_iter().next()?;
        let Subject { device, id, path } = event.members().unwrap_or_default();
        let mut names = [device, id, path].into_iter().flatten();
        let what = names.find(|name| !name.is_empty()).unwrap_or_else(|| "a device".to_owned());
        Some(match event.name.as_str() {
            "DEVICE_DELETED" => format!("{what} was unplugged"),
            "DEVICE_TRAY_MOVED" => format!("the tray of {what} was moved"),
            _ => format!("the size of {what} changed"),
        })
    }
}

/// What an event is of; each kind has one or two of them.
#[derive(Default, Deserialize)]
struct Subject {
    device: Option<String>,
    id: Option<String>,
    path: Option<String>,
}

/// QEMU sends `DEVICE_DELETED` a little after a device has left its list. That of a device which
/// went before this checkpoint must not look like a change during it. `begun`: before `devices`
/// were listed.
async fn wait_for_unplugged(vm: &Vm, devices: &[GuestDevice], watch: &EventWatch, begun: Instant) {
    let now = names(devices, |device| device.path.clone());
    let before = std::mem::replace(
        &mut *vm.last_devices.lock().unwrap_or_else(PoisonError::into_inner),
        now.clone(),
    );
    let mut gone: Vec<String> = before.into_iter().filter(|path| !now.contains(path)).collect();
    let until = tokio::time::Instant::now() + UNPLUG_EVENT;
    while !gone.is_empty() && tokio::time::Instant::now() < until {
        tokio::time::sleep(POLL_INTERVAL).await;
        let told = watch.since(begun);
        let unplugged: Vec<String> =
            told.iter().filter_map(|event| event.members::<Subject>().ok()?.path).collect();
        gone.retain(|path| !unplugged.contains(path));
    }
}

fn names<T>(list: &[T], name: impl Fn(&T) -> String) -> Vec<String> {
    list.iter().map(name).collect()
}

fn difference(then: &[String], now: &[String]) -> Option<String> {
    let new = now.iter().find(|name| !then.contains(name)).map(|name| format!("{name} has come"));
    new.or_else(|| {
        then.iter().find(|name| !now.contains(name)).map(|name| format!("{name} has gone"))
    })
}

/// `difference`: what changed, in words.
///
/// # Errors
/// If there is a difference.
pub fn unchanged(difference: Option<String>) -> Result<(), VmError> {
    match difference {
        None => Ok(()),
        Some(what) => Err(classed(
            Class::Failed,
            format!(
                "the VM changed while the checkpoint was taken: {what}; nothing was stored, take it again when the change is over"
            ),
        )
        .into()),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn inventory_difference_names_what_came_or_went() {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let told = |then: &[&str], now: &[&str]| difference(&list(then), &list(now));
        assert_eq!(told(&["a", "b"], &["b", "a"]), None);
        assert_eq!(told(&["a"], &["a", "b"]).as_deref(), Some("b has come"));
        assert_eq!(told(&["a", "b"], &["a"]).as_deref(), Some("b has gone"));
        assert_eq!(
            told(&["a (1 byte)"], &["a (2 bytes)"]).as_deref(),
            Some("a (2 bytes) has come")
        );
    }
}
