//! What each of QEMU's block drivers means for a checkpoint.

/// A filter that shows what is below it, unchanged, and passes writes on: the checkpoint is taken
/// of the node below. The restored VM has the filter again, since its command line says so.
pub(super) fn is_transparent(driver: &str) -> bool {
    matches!(driver, "throttle" | "copy-on-read")
}

/// Why an image under this driver cannot be in a checkpoint, and what to do.
pub(super) fn refusal(driver: &str) -> String {
    let why = match driver {
        "vvfat" => {
            "a directory of the host shown as a disk changes without QEMU seeing it; copy it into an image"
        }
        "null-co" | "null-aio" => "it holds nothing that could be restored; use an image",
        "quorum" | "replication" => {
            "several images stand for one; use one of them alone, or copy it with qemu-img convert"
        }
        "blkdebug" | "blkverify" | "blklogwrites" | "blkreplay" => {
            "it is a driver for tests of QEMU; leave it out"
        }
        "host_cdrom" => {
            "a CD drive of this host exists nowhere else; copy the medium into an image"
        }
        "nbd" | "iscsi" | "rbd" | "ssh" | "nfs" | "http" | "https" | "ftp" | "ftps" | "curl"
        | "gluster" | "sheepdog" => {
            "it is on a network server, whose content a checkpoint does not hold; use a local image"
        }
        "nvme"
        | "virtio-blk-vhost-vdpa"
        | "virtio-blk-vhost-user"
        | "virtio-blk-vfio-pci"
        | "nvme-io_uring"
        | "io_uring" => {
            "the hardware or another process writes guest memory by itself, unseen; use a file or a host device"
        }
        "luks" => ENCRYPTED,
        "copy-before-write" | "snapshot-access" | "backup-top" | "mirror_top" | "commit_top" => {
            "it belongs to a block job or a backup; let that end, or end it"
        }
        "preallocate" | "compress" => {
            "its filter changes how the image is written; set up the disk without it"
        }
        "throttle" | "copy-on-read" => {
            "this filter is in the backing chain; put it above the disk, or leave it out"
        }
        "vmdk" | "vdi" | "vhdx" | "vpc" | "qed" | "qcow" | "parallels" | "dmg" | "bochs"
        | "cloop" => {
            "images of this format are not carried; convert it: qemu-img convert -O qcow2 OLD NEW"
        }
        "raw" | "qcow2" => {
            "an image inside an image, whose content would be copied as if it were the file; \
             open the file itself"
        }
        _ => {
            "only qcow2 and raw images in files or host devices are supported; convert it with qemu-img"
        }
    };
    format!("driver `{driver}`: {why}")
}

pub(super) const ENCRYPTED: &str =
    "its image is encrypted, and a checkpoint would hold it in clear; encrypt the store instead";
pub(super) const DATA_FILE: &str = "its qcow2 image keeps its data in an external data file; copy it into one file: qemu-img convert -O qcow2 OLD NEW";
