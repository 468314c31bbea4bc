//! What must be true of a manifest before it is written and after it was read.

use std::collections::HashSet;
use std::hash::Hash;

use super::ManifestError;
use super::record::{
    CheckpointKind, DiskRecord, LayerRef, Manifest, PackRecord, Qcow2Record, RamBlockRecord,
    VmRecord,
};
use crate::names::{SpaceKind, SpaceName};
use crate::units::{ByteLen, CheckpointId, MAX_SPACE_PAGES, PageCount};

/// Most spaces in a manifest; as many as a pack can name.
pub const MAX_SPACES: usize = crate::pack::MAX_SPACES_PER_PACK;
/// Most RAM blocks in a manifest.
pub const MAX_RAM_BLOCKS: usize = 4096;
/// Most disks in a manifest.
pub const MAX_DISKS: usize = 1024;
/// Most layers below one disk.
pub const MAX_BACKING_DEPTH: usize = 256;
/// Most files that a VM's start may need.
pub(super) const MAX_BOOT_FILES: usize = 256;
/// Most packs of a checkpoint or a layer.
pub const MAX_PACKS: usize = 1 << 16;
/// Most arguments on a command line.
pub const MAX_ARGUMENTS: usize = 1 << 14;
/// Longest text in a manifest: an argument, a path, a name. Linux passes arguments of up to 128
/// KiB.
pub const MAX_TEXT: usize = 128 << 10;
/// Longest device state. Real ones have 50 to 500 KiB.
pub const MAX_STATE_LEN: ByteLen = ByteLen(256 << 20);
/// Most bytes of all RAM blocks together that are no shared file: video memory and ROMs, which a
/// restore holds in memory.
pub const MAX_CARRIED_RAM: ByteLen = ByteLen(1 << 30);
/// Largest page size of any host.
const MAX_PAGE_SIZE: u64 = 1 << 30;
/// Most vCPUs; a higher number is damage.
const MAX_VCPUS: u32 = 1 << 16;

pub(super) const MANIFEST: Check = Check("manifest");

/// Makes the errors about one kind of file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Check(pub &'static str);

impl Check {
    pub(crate) fn what(self) -> &'static str {
        self.0
    }

    pub(crate) fn that(
        self,
        holds: bool,
        field: impl Into<String>,
        problem: &'static str,
    ) -> Result<(), ManifestError> {
        if holds {
            return Ok(());
        }
        Err(ManifestError::Invalid { what: self.0, field: field.into(), problem })
    }

    pub(crate) fn count(
        self,
        list: &'static str,
        count: usize,
        limit: usize,
    ) -> Result<(), ManifestError> {
        if count <= limit {
            return Ok(());
        }
        Err(ManifestError::TooMany { what: self.0, list, count, limit })
    }

    fn text(self, field: &str, text: &str) -> Result<(), ManifestError> {
        self.that(text.len() <= MAX_TEXT, field, "longer than any real one")?;
        self.that(!text.contains('\0'), field, "with a NUL byte, which no path or argument has")
    }

    fn named(self, field: &str, text: &str) -> Result<(), ManifestError> {
        self.that(!text.is_empty(), field, "empty")?;
        self.that(!text.contains(char::is_control), field, "with a control character")?;
        self.text(field, text)
    }

    pub(crate) fn distinct<T: Eq + Hash>(
        self,
        list: &str,
        names: impl IntoIterator<Item = T>,
    ) -> Result<(), ManifestError> {
        let mut seen = HashSet::new();
        let distinct = names.into_iter().all(|name| seen.insert(name));
        self.that(distinct, list, "holding a name twice")
    }
}

impl Manifest {
    pub(super) fn validate(&self) -> Result<(), ManifestError> {
        self.check_descent()?;
        self.check_texts()?;
        check_vm(&self.vm_record)?;
        self.check_spaces()?;
        self.check_ram_blocks()?;
        self.check_disks()?;
        check_packs(MANIFEST, &self.packs)?;
        let index = self.index.as_ref();
        index.map_or(Ok(()), |index| index.validate(self.id, self.parent))
    }

    fn check_descent(&self) -> Result<(), ManifestError> {
        MANIFEST.that(self.id >= CheckpointId::FIRST, "seq", "below 1")?;
        match (self.kind, self.parent) {
            (CheckpointKind::Full, parent) => {
                MANIFEST.that(parent.is_none(), "parent", "given though the checkpoint is full")
            }
            (CheckpointKind::Incremental, None) => {
                MANIFEST.that(false, "parent", "missing though the checkpoint is incremental")
            }
            (CheckpointKind::Incremental, Some(parent)) => {
                let older = (CheckpointId::FIRST..self.id).contains(&parent);
                MANIFEST.that(older, "parent", "not an earlier checkpoint")
            }
        }
    }

    fn check_texts(&self) -> Result<(), ManifestError> {
        MANIFEST.named("instance", &self.instance)?;
        MANIFEST.text("stillpoint_version", &self.stillpoint_version)?;
        let utc = is_rfc3339_utc(&self.created_at);
        MANIFEST.that(utc, "created_at", "no time like 2026-01-31T23:59:59Z")
    }

    fn check_spaces(&self) -> Result<(), ManifestError> {
        MANIFEST.count("spaces", self.spaces.len(), MAX_SPACES)?;
        MANIFEST.distinct("spaces", self.spaces.iter().map(|space| &space.name))?;
        for space in &self.spaces {
            let name = space.name.as_str();
            MANIFEST.that(
                space.kind == space.name.kind(),
                name,
                "of another kind than its name",
            )?;
            let layer = space.kind == SpaceKind::Layer;
            MANIFEST.that(!layer, name, "a layer, which belongs to no checkpoint")?;
            MANIFEST.that(fits_a_space(space.bytes), name, "larger than a space can be")?;
            let state = space.kind != SpaceKind::State || space.bytes <= MAX_STATE_LEN;
            MANIFEST.that(state, name, "longer than any device state")?;
        }
        Ok(())
    }

    fn check_ram_blocks(&self) -> Result<(), ManifestError> {
        MANIFEST.count("RAM blocks", self.ram_blocks.len(), MAX_RAM_BLOCKS)?;
        MANIFEST.distinct("ram_blocks", self.ram_blocks.iter().map(|block| &block.name))?;
        self.ram_blocks.iter().try_for_each(|block| self.check_ram_block(block))?;
        let carried = self.ram_blocks.iter().filter(|block| !block.shared);
        let carried = carried.fold(0, |sum: u64, block| sum.saturating_add(block.used.0));
        let fits = carried <= MAX_CARRIED_RAM.0;
        MANIFEST.that(
            fits,
            "ram_blocks",
            "of more memory beside the main block than a restore can hold",
        )?;
        let main = self.ram_blocks.iter().find(|block| block.name == self.vm_record.ram_block);
        MANIFEST.that(main.is_some(), "machine.ram_block", "not among the RAM blocks")?;
        let fits = main.is_none_or(|block| block.used <= self.vm_record.ram_bytes);
        MANIFEST.that(fits, "machine.ram_block", "larger than the VM's RAM")
    }

    fn check_ram_block(&self, block: &RamBlockRecord) -> Result<(), ManifestError> {
        let field = format!("RAM block {}", block.name);
        MANIFEST.named(&field, &block.name)?;
        let space = SpaceName::ram(&block.name).ok().and_then(|name| self.space(&name));
        MANIFEST.that(
            block.used.0 == 0 || space.is_some(),
            &field,
            "without a space that holds its content",
        )?;
        let same = space.is_none_or(|space| space.bytes == block.used);
        MANIFEST.that(same, &field, "of another length than its space")?;
        MANIFEST.that(block.used <= block.total, &field, "used beyond its size")?;
        MANIFEST.that(fits_a_space(block.total), &field, "larger than a space can be")?;
        let page_size = block.page_size.0;
        let possible = page_size.is_power_of_two() && page_size <= MAX_PAGE_SIZE;
        MANIFEST.that(possible, &field, "of an impossible page size")
    }

    fn check_disks(&self) -> Result<(), ManifestError> {
        MANIFEST.count("disks", self.disks.len(), MAX_DISKS)?;
        MANIFEST.distinct("disks", self.disks.iter().map(|disk| &disk.node))?;
        let spaces = self.disks.iter().filter_map(|disk| disk.space.as_ref());
        MANIFEST.distinct("the disks' spaces", spaces)?;
        self.disks.iter().try_for_each(|disk| self.check_disk(disk))
    }

    fn check_disk(&self, disk: &DiskRecord) -> Result<(), ManifestError> {
        let field = format!("disk {}", disk.node);
        MANIFEST.named(&field, &disk.node)?;
        MANIFEST.text(&field, &disk.file)?;
        MANIFEST.that(is_format(&disk.format), &field, "neither qcow2 nor raw")?;
        MANIFEST.that(fits_a_space(disk.virtual_size), &field, "larger than a space can be")?;
        MANIFEST.count("layers below a disk", disk.backing.len(), MAX_BACKING_DEPTH)?;
        if let Some(options) = &disk.qcow2 {
            MANIFEST.that(
                disk.format == "qcow2" && is_possible(options),
                &field,
                "with options that no qcow2 image has",
            )?;
        }
        disk.backing.iter().try_for_each(|layer| check_layer(&field, layer))?;
        let Some(name) = &disk.space else {
            return MANIFEST.that(disk.read_only, &field, "writable and without a space");
        };
        MANIFEST.that(!disk.read_only, &field, "read-only and yet with a space")?;
        let space = self.space(name).filter(|space| space.kind == SpaceKind::Disk);
        MANIFEST.that(space.is_some(), &field, "kept in a space that is not there")?;
        let same = space.is_none_or(|space| space.bytes == disk.virtual_size);
        MANIFEST.that(same, &field, "of another length than its space")
    }
}

fn check_layer(field: &str, layer: &LayerRef) -> Result<(), ManifestError> {
    MANIFEST.text(field, &layer.path)?;
    MANIFEST.that(is_format(&layer.format), field, "on a layer neither qcow2 nor raw")?;
    MANIFEST.that(fits_a_space(layer.len), field, "on a layer larger than a space can be")
}

fn check_vm(vm: &VmRecord) -> Result<(), ManifestError> {
    MANIFEST.text("machine.qemu_version", &vm.qemu_version)?;
    MANIFEST.text("machine.program", &vm.program)?;
    MANIFEST.named("machine.machine_type", &vm.machine_type)?;
    MANIFEST.text("machine.accelerator", &vm.accelerator)?;
    MANIFEST.count("arguments", vm.arguments.len(), MAX_ARGUMENTS)?;
    for argument in &vm.arguments {
        MANIFEST.text("machine.arguments", argument)?;
    }
    MANIFEST.text("machine.directory", &vm.directory)?;
    MANIFEST.count("boot files", vm.files.len(), MAX_BOOT_FILES)?;
    for file in &vm.files {
        MANIFEST.named("machine.files", &file.path)?;
        check_layer("machine.files", file)?;
    }
    let vcpus = (1..=MAX_VCPUS).contains(&vm.vcpus);
    MANIFEST.that(vcpus, "machine.vcpus", "none or impossibly many")?;
    let ram = fits_a_space(vm.ram_bytes);
    MANIFEST.that(ram, "machine.ram_bytes", "larger than a space can be")
}

/// Shared with layers, which have packs of their own.
pub(crate) fn check_packs(check: Check, packs: &[PackRecord]) -> Result<(), ManifestError> {
    check.count("packs", packs.len(), MAX_PACKS)?;
    check.distinct("packs", packs.iter().map(|pack| &pack.name))?;
    check.distinct("the packs' ids", packs.iter().map(|pack| pack.info.id))?;
    packs.iter().try_for_each(|pack| {
        pack.info.check().map_err(|source| ManifestError::Pack {
            what: check.what(),
            pack: pack.name.to_string(),
            source: Box::new(source),
        })
    })
}

fn fits_a_space(len: ByteLen) -> bool {
    PageCount::covering(len).0 <= MAX_SPACE_PAGES
}

fn is_possible(options: &Qcow2Record) -> bool {
    const CLUSTERS: std::ops::RangeInclusive<u64> = 512..=2 << 20;
    let clusters =
        options.cluster_size.0.is_power_of_two() && CLUSTERS.contains(&options.cluster_size.0);
    let refcounts = options.refcount_bits.is_power_of_two() && options.refcount_bits <= 64;
    let texts = matches!(options.compat.as_str(), "0.10" | "1.1")
        && matches!(options.compression.as_str(), "zlib" | "zstd");
    clusters && refcounts && texts
}

fn is_format(format: &str) -> bool {
    matches!(format, "qcow2" | "raw")
}

/// The shape `2026-01-31T23:59:59Z`, with or without a fraction of the second. Whether the day
/// exists is not checked.
fn is_rfc3339_utc(text: &str) -> bool {
    const SHAPE: &[u8] = b"0000-00-00T00:00:00";
    const LONGEST_FRACTION: usize = 9;
    let Some((time, fraction)) = text.as_bytes().split_at_checked(SHAPE.len()) else {
        return false;
    };
    let shaped = time.iter().zip(SHAPE).all(|(found, wanted)| match wanted {
        b'0' => found.is_ascii_digit(),
        _ => found == wanted,
    });
    shaped
        && match fraction {
            [b'Z'] => true,
            [b'.', digits @ .., b'Z'] => {
                (1..=LONGEST_FRACTION).contains(&digits.len())
                    && digits.iter().all(u8::is_ascii_digit)
            }
            _ => false,
        }
}
