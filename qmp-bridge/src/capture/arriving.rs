//! Disks whose blocks have not all arrived: see [`crate::arriving`].

use super::CaptureError;
use super::prepare::Target;
use crate::disks::Disk;

/// What has not arrived is as the parent has it, and only its bitmap tells what else is there.
pub(super) fn refuse_whole(targets: &[Target], disks: &[Disk]) -> Result<(), CaptureError> {
    let is_whole = |disk: &&Disk| {
        targets.iter().any(|target| target.node == disk.node && target.base.is_none())
    };
    match disks.iter().filter(|disk| disk.arriving).find(is_whole) {
        None => Ok(()),
        Some(disk) => Err(CaptureError::Arriving { device: disk.device.clone() }),
    }
}
