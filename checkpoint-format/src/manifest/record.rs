//! The records of a manifest.

use serde::{Deserialize, Serialize};

use super::list::{arguments_list, backing_list, boot_file_list, disk_list, pack_list, ram_block_list, space_list};
use crate::digest::ContentDigest;
use crate::layer::DigestForm;
use crate::names::{PackName, SpaceKind, SpaceName, VmName};
use crate::pack::PackInfo;
use crate::units::{ByteLen, CheckpointSeq, Epoch, PageCount};

/// One checkpoint.
///
/// Fields are only ever added, with a default, and only such as a reader may ignore: a reader of version 1 skips what it
/// doesn't know. Whatever changes how a checkpoint must be restored takes a new version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub vm: VmName,
    pub seq: CheckpointSeq,
    /// The checkpoint that this one adds to; none for a full one.
    pub parent: Option<CheckpointSeq>,
    pub kind: CheckpointKind,
    /// The writer's claim under which it was written.
    pub epoch: Epoch,
    /// The running QEMU process that it was taken of; a new one begins with unknown dirty bits.
    pub instance: String,
    /// RFC 3339, in UTC.
    pub created_at: String,
    pub stillpoint_version: String,
    pub machine: MachineRecord,
    /// What the guest was doing. None in a checkpoint of a version that did not say: such a VM is let run, as that version did. (A
    /// reader that skips this does the same with every VM.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_state: Option<RunState>,
    #[serde(deserialize_with = "space_list")]
    pub spaces: Vec<SpaceRecord>,
    #[serde(deserialize_with = "ram_block_list")]
    pub ram_blocks: Vec<RamBlockRecord>,
    #[serde(deserialize_with = "disk_list")]
    pub disks: Vec<DiskRecord>,
    /// In the order of their numbers; of two records of a page the later pack's counts.
    #[serde(deserialize_with = "pack_list")]
    pub packs: Vec<PackRecord>,
    pub totals: Totals,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointKind {
    /// Stands by itself.
    Full,
    /// Holds what changed since the parent.
    Incremental,
}

/// QEMU's run states, as far as they hold a guest, spelled as QEMU spells them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    Running,
    Suspended,
    /// Stopped by its owner.
    Paused,
    /// Never started, or reset while it was stopped.
    Prelaunch,
    /// Powered off.
    Shutdown,
    GuestPanicked,
    IoError,
    InternalError,
    Watchdog,
}

/// The virtual machine's configuration, as far as a restore must know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineRecord {
    pub qemu_version: String,
    /// Path of the QEMU program on the host of the checkpoint: what a restore tries first.
    pub program: String,
    /// Its versioned name (`pc-q35-10.0`), so that a newer QEMU builds the same machine.
    pub machine_type: String,
    pub accelerator: String,
    /// The command line, the program's own name not included.
    #[serde(deserialize_with = "arguments_list")]
    pub arguments: Vec<String>,
    pub vcpus: u32,
    pub ram_bytes: ByteLen,
    /// The name of the RAM block that is the guest's main memory.
    pub ram_block: String,
    /// QEMU's working directory, to which relative paths among the arguments belong.
    pub directory: String,
    /// Files that QEMU reads at its start and at a reboot (kernel, initrd, firmware): layers whose path is the one among
    /// the arguments.
    #[serde(deserialize_with = "boot_file_list")]
    pub files: Vec<LayerRef>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceRecord {
    pub name: SpaceName,
    pub kind: SpaceKind,
    /// Its exact length at this checkpoint. The last page is padded with zeros.
    pub bytes: ByteLen,
}

impl SpaceRecord {
    pub fn new(name: SpaceName, bytes: ByteLen) -> Self {
        Self { kind: name.kind(), name, bytes }
    }

    pub fn pages(&self) -> PageCount {
        PageCount::covering(self.bytes)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamBlockRecord {
    pub name: String,
    pub used: ByteLen,
    pub total: ByteLen,
    pub page_size: ByteLen,
    /// Whether its memory is a shared file, which the migration stream leaves out.
    pub shared: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    pub node: String,
    /// Where its content is; none for a read-only disk, which is all in its layers.
    pub space: Option<SpaceName>,
    pub read_only: bool,
    /// `qcow2` or `raw`.
    pub format: String,
    pub virtual_size: ByteLen,
    /// The image's path on the host where the checkpoint was taken.
    pub file: String,
    /// The layers below, top to bottom; a read-only disk's own image is the first.
    #[serde(deserialize_with = "backing_list")]
    pub backing: Vec<LayerRef>,
    /// How the image was made. The guest cannot see it: a reader that skips it makes an image that shows the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qcow2: Option<Qcow2Record>,
}

/// Options of a qcow2 image, with the meaning that QEMU gives them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Qcow2Record {
    pub cluster_size: ByteLen,
    /// `0.10` or `1.1`.
    pub compat: String,
    pub lazy_refcounts: bool,
    pub refcount_bits: u32,
    pub extended_l2: bool,
    /// `zlib` or `zstd`.
    pub compression: String,
}

/// An immutable image in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRef {
    pub digest: ContentDigest,
    /// What the digest is taken of. A reader of version 1 that skips this refuses the layer by its version, or takes a local copy
    /// for another file.
    #[serde(default, skip_serializing_if = "DigestForm::is_content")]
    pub form: DigestForm,
    pub len: ByteLen,
    pub format: String,
    /// Its path on the host where the checkpoint was taken.
    pub path: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackRecord {
    pub name: PackName,
    pub info: PackInfo,
    /// Copies that the store keeps, where it says.
    pub replicas: Option<u16>,
}

/// What the checkpoint moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Pages that the trackers called dirty.
    pub pages_dirty: PageCount,
    /// Content of the pages that differ from the parent.
    pub bytes_changed: ByteLen,
    /// The packs before compression, metadata included.
    pub bytes_stored_raw: ByteLen,
    /// The packs as stored.
    pub bytes_stored: ByteLen,
}

impl Manifest {
    pub fn space(&self, name: &SpaceName) -> Option<&SpaceRecord> {
        self.spaces.iter().find(|space| space.name == *name)
    }

    /// Every layer that some disk stands on, or the machine's start needs; one that several need comes several times.
    pub fn layers(&self) -> impl Iterator<Item = &LayerRef> {
        self.disks.iter().flat_map(|disk| &disk.backing).chain(&self.machine.files)
    }
}
