//! Guest devices that a live checkpoint would miss or could not bring back.
//!
//! Memory is tracked by write protection in QEMU's own page tables. A device whose other half is another process or
//! real hardware writes guest memory past them: the change would be in no checkpoint.

use serde_json::{Value, json};

use crate::qmp::{Qmp, QmpError};

/// Where QEMU keeps devices with and without an id.
const PARENTS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// A device made with `-device` or `device_add`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestDevice {
    /// Its QOM path.
    pub path: String,
    /// Its QOM type, e.g. `virtio-blk-pci`.
    pub kind: String,
}

impl GuestDevice {
    /// Why a checkpoint with this device would be wrong; `None` if it is fine.
    pub fn refusal(&self) -> Option<&'static str> {
        let kind = self.kind.as_str();
        if kind.starts_with("vhost-user") {
            Some("its daemon writes guest memory through a mapping of its own; use the device without vhost-user")
        } else if kind.starts_with("vfio") || kind.starts_with("vhost-vdpa") {
            Some("its hardware writes guest memory unseen and its state stays in it; use an emulated device")
        } else if kind.starts_with("virtio-balloon") || kind.starts_with("virtio-mem") {
            Some("it punches holes into guest memory, which no page fault shows; unplug it")
        } else if kind.starts_with("ivshmem") {
            Some("other processes write the memory it shares")
        } else if kind.starts_with("vhost-vsock") || kind.starts_with("vhost-scsi") {
            Some("its state is in the kernel of this host; use the device without vhost")
        } else if kind.starts_with("virtio-pmem") || kind == "nvdimm" {
            Some("its memory is a file outside of the disks and the main RAM; use a disk instead")
        } else {
            None
        }
    }
}

/// Lists the guest devices.
pub async fn guest_devices(qmp: &Qmp) -> Result<Vec<GuestDevice>, QmpError> {
    let mut devices = Vec::new();
    for parent in PARENTS {
        let rows = qmp.execute_json("qom-list", json!({ "path": parent })).await?;
        devices.extend(rows.as_array().into_iter().flatten().filter_map(|row| parse(parent, row)));
    }
    Ok(devices)
}

fn parse(parent: &str, row: &Value) -> Option<GuestDevice> {
    let kind = row["type"].as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
    Some(GuestDevice { path: format!("{parent}/{}", row["name"].as_str()?), kind: kind.into() })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn devices_with_a_foreign_writer_are_refused() {
        let refused = |kind: &str| GuestDevice { path: "/x".into(), kind: kind.into() }.refusal().is_some();
        assert!(["vhost-user-fs-pci", "vfio-pci", "ivshmem-plain", "vhost-vsock-pci", "nvdimm"].into_iter().all(refused));
        assert!(!["virtio-blk-pci", "virtio-net-pci", "e1000e", "virtio-rng-pci"].into_iter().any(refused));
        let row = json!({"name": "device[0]", "type": "child<virtio-blk-pci>"});
        let device = parse(PARENTS[1], &row).expect("device");
        assert_eq!(device.path, "/machine/peripheral-anon/device[0]");
        assert_eq!(parse(PARENTS[0], &json!({"name": "type", "type": "string"})), None);
    }
}
