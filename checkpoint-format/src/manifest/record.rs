//! The records of a manifest.

use serde::{Deserialize, Serialize};

use super::index::IndexRecord;
use super::list::{
    arguments_list, backing_list, boot_file_list, disk_list, pack_list, ram_block_list, space_list,
};
use crate::digest::ContentDigest;
use crate::digest_form::DigestForm;
use crate::names::{PackName, SpaceKind, SpaceName, VmName};
use crate::pack::PackInfo;
use crate::units::{ByteLen, CheckpointId, Epoch, PageCount};

/// One checkpoint.
///
/// Fields are only ever added, with a default, and only such as a reader may ignore: a reader skips
/// what it doesn't know. Whatever changes how a checkpoint must be restored takes a
/// new version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The VM's name.
    pub vm: VmName,
    /// The checkpoint ID.
    #[serde(rename = "seq")]
    pub id: CheckpointId,
    /// The checkpoint that this one adds to; none for a full one.
    pub parent: Option<CheckpointId>,
    /// Full or incremental.
    pub kind: CheckpointKind,
    /// The writer's claim under which it was written.
    pub epoch: Epoch,
    /// The running QEMU process that it was taken of; a new one begins with unknown dirty bits.
    pub instance: String,
    /// RFC 3339, in UTC.
    pub created_at: String,
    /// The version of Stillpoint that took it.
    pub stillpoint_version: String,
    /// The VM's configuration.
    #[serde(rename = "machine")]
    pub vm_record: VmRecord,
    /// The guest's run state. None in a checkpoint of an earlier version: such a VM is run, as that
    /// version did. (A reader that skips this does the same with every VM.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_state: Option<RunState>,
    /// All page spaces that the checkpoint holds.
    #[serde(deserialize_with = "space_list")]
    pub spaces: Vec<SpaceRecord>,
    /// QEMU's RAM blocks, in its order.
    #[serde(deserialize_with = "ram_block_list")]
    pub ram_blocks: Vec<RamBlockRecord>,
    /// The VM's disks.
    #[serde(deserialize_with = "disk_list")]
    pub disks: Vec<DiskRecord>,
    /// In the order of their numbers; of two records of a page the later pack's counts.
    #[serde(deserialize_with = "pack_list")]
    pub packs: Vec<PackRecord>,
    /// Where the index of the lineage is. None in a file of version 1, which has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<IndexRecord>,
    /// Sums over the whole checkpoint.
    pub totals: Totals,
}

/// Whether a checkpoint needs its parent.
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
    /// The guest ran.
    Running,
    /// The guest was asleep (ACPI S3).
    Suspended,
    /// Stopped by its owner.
    Paused,
    /// Never started, or reset while it was stopped.
    Prelaunch,
    /// Powered off.
    Shutdown,
    /// The guest's kernel reported a panic.
    GuestPanicked,
    /// QEMU stopped it at a disk error.
    IoError,
    /// QEMU stopped it after an error of its own.
    InternalError,
    /// A watchdog device stopped it.
    Watchdog,
}

/// The VM's configuration, as far as a restore must know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// The version of the QEMU that ran it.
    pub qemu_version: String,
    /// Path of the QEMU program on the host of the checkpoint. A restore uses its file name alone.
    pub program: String,
    /// Its versioned name (`pc-q35-10.0`), so that a newer QEMU builds the same VM.
    pub machine_type: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The command line, the program's own name not included.
    #[serde(deserialize_with = "arguments_list")]
    pub arguments: Vec<String>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Base memory, without hot-plugged modules.
    pub ram_bytes: ByteLen,
    /// The name of the RAM block that is the guest's main memory.
    pub ram_block: String,
    /// QEMU's working directory, to which relative paths among the arguments belong.
    pub directory: String,
    /// Files that QEMU reads at its start and at a reboot (kernel, initrd, firmware): layers whose
    /// path is the one among the arguments.
    #[serde(deserialize_with = "boot_file_list")]
    pub files: Vec<LayerRef>,
}

/// One page space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceRecord {
    /// Its name.
    pub name: SpaceName,
    /// Its kind, which the name's prefix says, too.
    pub kind: SpaceKind,
    /// Its exact length at this checkpoint. The last page is padded with zeros.
    pub bytes: ByteLen,
}

impl SpaceRecord {
    /// A space of that many bytes.
    pub fn new(name: SpaceName, bytes: ByteLen) -> Self {
        Self { kind: name.kind(), name, bytes }
    }

    /// Its number of pages; the last one may be partial.
    pub fn pages(&self) -> PageCount {
        PageCount::covering(self.bytes)
    }
}

/// One RAM block of QEMU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamBlockRecord {
    /// QEMU's name of it (`pc.ram`).
    pub name: String,
    /// Bytes in use.
    pub used: ByteLen,
    /// Bytes that it may grow to.
    pub total: ByteLen,
    /// Bytes of one of the host's pages behind it.
    pub page_size: ByteLen,
    /// Whether its memory is a shared file, which the migration stream leaves out.
    pub shared: bool,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Its node name.
    pub node: String,
    /// Where its content is; none for a read-only disk, which is all in its layers.
    pub space: Option<SpaceName>,
    /// Whether the guest can only read it.
    pub read_only: bool,
    /// `qcow2` or `raw`.
    pub format: String,
    /// What the guest sees.
    pub virtual_size: ByteLen,
    /// The image's path on the host where the checkpoint was taken.
    pub file: String,
    /// The layers below, top to bottom; a read-only disk's own image is the first.
    #[serde(deserialize_with = "backing_list")]
    pub backing: Vec<LayerRef>,
    /// How the image was made. The guest cannot see it: if a reader skips it, the image has the
    /// same content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qcow2: Option<Qcow2Record>,
}

/// Options of a qcow2 image, with the meaning that QEMU gives them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Qcow2Record {
    /// Bytes of a cluster.
    pub cluster_size: ByteLen,
    /// `0.10` or `1.1`.
    pub compat: String,
    /// Whether refcounts are written late.
    pub lazy_refcounts: bool,
    /// Width of a refcount.
    pub refcount_bits: u32,
    /// Whether L2 entries have subclusters.
    pub extended_l2: bool,
    /// `zlib` or `zstd`.
    pub compression: String,
}

/// An immutable image in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRef {
    /// The digest of the layer's content.
    pub digest: ContentDigest,
    /// What the digest is taken of. A reader of version 1 that skips this refuses the layer by its
    /// version, or takes a local copy for another file.
    #[serde(default, skip_serializing_if = "DigestForm::is_content")]
    pub form: DigestForm,
    /// What a reader of the image sees.
    pub len: ByteLen,
    /// `qcow2` or `raw`.
    pub format: String,
    /// Its path on the host where the checkpoint was taken.
    pub path: String,
}

/// One pack of the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackRecord {
    /// Its file name.
    pub name: PackName,
    /// Its length and where its index is.
    pub info: PackInfo,
    /// Copies that the store keeps, where it says.
    pub replicas: Option<u16>,
}

/// Sums over a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Pages that were reported as dirty.
    pub pages_dirty: PageCount,
    /// Content of the pages that differ from the parent.
    pub bytes_changed: ByteLen,
    /// The packs before compression, metadata included.
    pub bytes_stored_raw: ByteLen,
    /// The packs as stored.
    pub bytes_stored: ByteLen,
}

impl Manifest {
    /// The record of a page space.
    pub fn space(&self, name: &SpaceName) -> Option<&SpaceRecord> {
        self.spaces.iter().find(|space| space.name == *name)
    }

    /// Every layer that some disk stands on, or the VM's start needs; one that several need comes
    /// several times.
    pub fn layers(&self) -> impl Iterator<Item = &LayerRef> {
        self.disks.iter().flat_map(|disk| &disk.backing).chain(&self.vm_record.files)
    }
}
