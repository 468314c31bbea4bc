//! Guest devices that a live checkpoint would miss or could not bring back.
//!
//! Memory is tracked by write protection in QEMU's own page tables. A device whose other half is
//! another process or real hardware writes guest memory past them: the change would be in no
//! checkpoint.

use crate::qmp::replies::ObjectPropertyInfo;
use crate::qmp::{Qmp, QmpError};

/// Where QEMU keeps devices with and without an id.
const PARENTS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];
/// Where it keeps what the machine type, `-vga`, `-audio` and the like make.
const BOARD: &str = "/machine/unattached";

/// A device made with `-device` or `device_add`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestDevice {
    /// Its QOM path.
    pub path: String,
    /// Its QOM type, e.g. `virtio-blk-pci`.
    pub kind: String,
}

impl GuestDevice {
    /// Whether it gives the guest's pages back to the host, which the tracker must watch for.
    pub fn is_balloon(&self) -> bool {
        self.kind.starts_with("virtio-balloon") || self.kind.starts_with("hv-balloon")
    }

    /// Why a checkpoint with this device would be wrong, whatever takes it; `None` if it is fine.
    pub fn refusal(&self) -> Option<&'static str> {
        let kind = self.kind.as_str();
        if kind.starts_with("vhost-user") {
            Some(
                "its daemon writes guest memory through a mapping of its own; use the device without vhost-user",
            )
        } else if kind.starts_with("vfio") || kind.starts_with("vhost-vdpa") {
            Some(
                "its hardware writes guest memory unseen and its state stays in it; use an emulated device",
            )
        } else if kind.starts_with("virtio-mem") || kind == "pc-dimm" {
            Some("a checkpoint knows one memory, the VM's own; unplug it")
        } else if kind == "scsi-block" || kind == "scsi-generic" {
            Some(
                "it sends the guest's writes to the hardware past QEMU's bitmaps; use scsi-hd on the same device",
            )
        } else if kind.starts_with("ivshmem") {
            Some("other processes write the memory it shares")
        } else if kind.starts_with("vhost-vsock") || kind.starts_with("vhost-scsi") {
            Some("its state is in the kernel of this host; use the device without vhost")
        } else if kind == "vmbus-bridge" || kind == "pci-serial-2x" {
            // Seen with 7.2 and 10.0: an assertion in vmstate_save_state_v.
            Some(
                "QEMU aborts, guest and all, when it saves the state of this device; use pci-serial or pci-serial-4x, or no VMBus",
            )
        } else if kind.starts_with("virtio-pmem") || kind == "nvdimm" {
            Some("its memory is a file outside of the disks and the main RAM; use a disk instead")
        } else {
            None
        }
    }
}

/// Whether a balloon keeps the guest's free pages out of the migration stream
/// (`free-page-hint=on`).
///
/// # Errors
/// When QEMU does not answer.
pub async fn hints_free_pages(qmp: &Qmp, balloon: &GuestDevice) -> Result<bool, QmpError> {
    is_on(qmp, balloon, "free-page-hint").await
}

/// Whether a `ramfb` is in the saved state: QEMU 8.2 and newer, machine types since then.
///
/// # Errors
/// When QEMU does not answer.
pub async fn saves_ramfb(qmp: &Qmp, ramfb: &GuestDevice) -> Result<bool, QmpError> {
    is_on(qmp, ramfb, "x-migrate").await
}

async fn is_on(qmp: &Qmp, device: &GuestDevice, property: &str) -> Result<bool, QmpError> {
    match qmp.qom_get(&device.path, property).await {
        Err(error) if error.is_refusal() => Ok(false),
        said => said,
    }
}

/// Lists the guest devices.
///
/// # Errors
/// When QEMU does not answer.
pub async fn guest_devices(qmp: &Qmp) -> Result<Vec<GuestDevice>, QmpError> {
    let mut devices = Vec::new();
    for parent in PARENTS {
        devices.extend(children(qmp, parent).await?);
    }
    Ok(devices)
}

/// Devices (and other objects) that no `-device` made.
///
/// # Errors
/// When QEMU does not answer.
pub async fn board_devices(qmp: &Qmp) -> Result<Vec<GuestDevice>, QmpError> {
    children(qmp, BOARD).await
}

async fn children(qmp: &Qmp, parent: &str) -> Result<Vec<GuestDevice>, QmpError> {
    let members = qmp.qom_list(parent).await?;
    Ok(members.iter().filter_map(|member| child(parent, member)).collect())
}

fn child(parent: &str, member: &ObjectPropertyInfo) -> Option<GuestDevice> {
    let kind = member.r#type.strip_prefix("child<")?.strip_suffix('>')?;
    Some(GuestDevice { path: format!("{parent}/{}", member.name), kind: kind.into() })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn devices_with_a_foreign_writer_are_refused() {
        let refused =
            |kind: &str| GuestDevice { path: "/x".into(), kind: kind.into() }.refusal().is_some();
        assert!(
            [
                "vhost-user-fs-pci",
                "vfio-pci",
                "ivshmem-plain",
                "vhost-vsock-pci",
                "nvdimm",
                "scsi-block",
                "pci-serial-2x"
            ]
            .into_iter()
            .all(refused)
        );
        assert!(
            !["virtio-blk-pci", "virtio-net-pci", "e1000e", "virtio-rng-pci", "virtio-balloon-pci"]
                .into_iter()
                .any(refused)
        );
        let balloon =
            |kind: &str| GuestDevice { path: "/x".into(), kind: kind.into() }.is_balloon();
        assert!(
            balloon("virtio-balloon-pci-transitional")
                && balloon("hv-balloon")
                && !balloon("virtio-blk-pci")
        );
        let member =
            |name: &str, kind: &str| ObjectPropertyInfo { name: name.into(), r#type: kind.into() };
        let device =
            child(PARENTS[1], &member("device[0]", "child<virtio-blk-pci>")).expect("device");
        assert_eq!(device.path, "/machine/peripheral-anon/device[0]");
        assert_eq!(child(PARENTS[0], &member("type", "string")), None);
    }
}
