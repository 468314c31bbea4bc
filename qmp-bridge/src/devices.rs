//! The guest's devices, as QEMU lists them in its object tree.

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
}

/// Whether a switch of the device is on; one that its model lacks is off.
///
/// # Errors
/// When QEMU does not answer.
pub async fn is_on(qmp: &Qmp, device: &GuestDevice, property: &str) -> Result<bool, QmpError> {
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
    fn devices_are_read_from_the_object_tree() {
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
