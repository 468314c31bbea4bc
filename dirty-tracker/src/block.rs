//! One RAM block of QEMU, and the check that it is where we were told.

use std::ops::Range;

use checkpoint_format::{
    ByteLen, ByteOffset, MAX_SPACE_PAGES, PAGE_SIZE, PageCount, PageIndex, PageRange,
};

use crate::error::TrackerError;
use crate::guest_memory::GuestMemory;
use crate::maps::shown_path;
use procfs_core::process::{MMPermissions, MemoryMap, MemoryMaps};

/// A RAM block of one tracker; numbers count from 0 in the order of attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub(crate) usize);

impl BlockId {
    /// Its place among the RAM blocks given to [`Tracker::attach`](crate::Tracker::attach).
    pub fn index(self) -> usize {
        self.0
    }
}

/// What lies behind a RAM block's addresses.
#[derive(Debug, Clone)]
pub enum BlockMemory {
    /// A file that is read here too: guest RAM.
    Shared(GuestMemory),
    /// QEMU's own anonymous memory, read through `/proc/PID/mem`: VRAM, ROMs, ACPI tables.
    Private,
}

/// A RAM block to track.
#[derive(Debug, Clone)]
pub struct TrackedBlock {
    /// QEMU's name of the block.
    pub name: String,
    /// Where it begins in QEMU's address space; page-aligned.
    pub host_address: u64,
    /// A whole number of pages.
    pub bytes: u64,
    /// What the block is made of, and how it is read.
    pub memory: BlockMemory,
}

impl TrackedBlock {
    /// Its number of pages.
    pub fn pages(&self) -> PageCount {
        PageCount::covering(ByteLen(self.bytes))
    }

    /// That these bytes are in the RAM block.
    pub(crate) fn check_inside(&self, bytes: &Range<u64>) -> Result<(), TrackerError> {
        if bytes.end <= self.bytes {
            return Ok(());
        }
        Err(TrackerError::OutOfRange {
            name: self.name.clone(),
            start: bytes.start,
            end: bytes.end,
            len: self.bytes,
        })
    }

    pub(crate) fn addresses(&self) -> Range<u64> {
        self.host_address..self.host_address + self.bytes
    }

    /// The pages at these addresses, which lie in the RAM block.
    pub(crate) fn page_range(&self, addresses: &Range<u64>) -> PageRange {
        let page = |address: u64| PageIndex((address - self.host_address) / PAGE_SIZE as u64);
        PageRange::new(page(addresses.start), page(addresses.end))
    }

    /// That the addresses are whole pages, mapped without a gap, and mapped to what we think.
    ///
    /// A wrong address would not fail later: it would track the wrong memory, and lose every write
    /// of the guest.
    pub(crate) fn check(&self, maps: &MemoryMaps) -> Result<(), TrackerError> {
        self.check_numbers()?;
        let inode = match &self.memory {
            BlockMemory::Shared(memory) => Some(memory.inode()?),
            BlockMemory::Private => None,
        };
        let Range { mut start, end } = self.addresses();
        for mapping in maps.iter().filter(|mapping| mapping.address.1 > self.host_address) {
            if start >= end || mapping.address.0 > start {
                break;
            }
            self.check_mapping(mapping, start, inode)?;
            start = mapping.address.1;
        }
        if start < end {
            return Err(self.wrong(format!("nothing is mapped at {start:#x}")));
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result<(), TrackerError> {
        let page = PAGE_SIZE as u64;
        let too_large = self.bytes > MAX_SPACE_PAGES * page
            || self.host_address.checked_add(self.bytes).is_none();
        if self.bytes == 0 || too_large {
            return Err(self.wrong(format!(
                "{} bytes at {:#x} is no size for it",
                self.bytes, self.host_address
            )));
        }
        if !self.bytes.is_multiple_of(page) || !self.host_address.is_multiple_of(page) {
            return Err(self.wrong(format!(
                "{} bytes at {:#x} are not whole pages",
                self.bytes, self.host_address
            )));
        }
        match &self.memory {
            BlockMemory::Shared(memory) if memory.len() < self.bytes => Err(self.wrong(format!(
                "it has {} bytes, its file only {}",
                self.bytes,
                memory.len()
            ))),
            _ => Ok(()),
        }
    }

    fn check_mapping(
        &self,
        mapping: &MemoryMap,
        at: u64,
        inode: Option<u64>,
    ) -> Result<(), TrackerError> {
        let is_shared = mapping.perms.contains(MMPermissions::SHARED);
        let Some(inode) = inode else {
            return match is_shared {
                true => Err(self
                    .wrong(format!("the memory at {at:#x} is shared; it must be given as a file"))),
                false => Ok(()),
            };
        };
        let offset = at - self.host_address;
        let is_ours = is_shared
            && mapping.inode == inode
            && mapping.offset.checked_add(at - mapping.address.0) == Some(offset);
        match is_ours {
            true => Ok(()),
            false => Err(self.wrong(format!(
                "what QEMU has mapped at {at:#x} is not byte {offset} of its file but '{}'",
                shown_path(mapping)
            ))),
        }
    }

    fn wrong(&self, reason: String) -> TrackerError {
        TrackerError::TrackedBlock { block: self.name.clone(), reason }
    }
}

/// The pages that hold these bytes of a RAM block.
pub(crate) fn covering(bytes: Range<u64>) -> PageRange {
    let end = PageCount::covering(ByteLen(bytes.end));
    PageRange::new(PageIndex::containing(ByteOffset(bytes.start)), PageIndex(end.0))
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::maps::parse_maps;

    const MAPS: &str = "\
10000-14000 rw-p 00000000 00:00 0\x20
14000-18000 rw-p 00000000 00:00 0 [heap]
20000-24000 rw-s 00000000 00:01 77 /memfd:other (deleted)
";

    fn private(host_address: u64, bytes: u64) -> TrackedBlock {
        TrackedBlock { name: "vga.vram".into(), host_address, bytes, memory: BlockMemory::Private }
    }

    fn reason(block: &TrackedBlock, maps: &str) -> String {
        block.check(&parse_maps(maps.as_bytes()).unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn private_memory_may_span_mappings_but_no_gap() {
        let maps = parse_maps(MAPS.as_bytes()).unwrap();
        for (start, len) in
            [(0x10000, 0x8000), (0x11000, 0x1000), (0x13000, 0x2000), (0x17000, 0x1000)]
        {
            private(start, len).check(&maps).unwrap();
        }
        assert!(reason(&private(0x17000, 0x2000), MAPS).contains("nothing is mapped at 0x18000"));
        assert!(reason(&private(0xf000, 0x2000), MAPS).contains("nothing is mapped at 0xf000"));
        assert!(reason(&private(0x30000, 0x2000), MAPS).contains("nothing is mapped at 0x30000"));
        assert!(reason(&private(0x20000, 0x1000), MAPS).contains("is shared"));
    }

    #[test]
    fn impossible_numbers_are_refused() {
        for (start, len) in [(0x10000, 0), (0x10000, 1 << 60), (u64::MAX - 0xfff, 0x2000)] {
            assert!(
                reason(&private(start, len), MAPS).contains("is no size"),
                "{start:#x} {len:#x}"
            );
        }
        for (start, len) in [(0x10001, 0x1000), (0x10000, 0x1001)] {
            assert!(
                reason(&private(start, len), MAPS).contains("not whole pages"),
                "{start:#x} {len:#x}"
            );
        }
    }

    #[test]
    fn shared_memory_must_be_the_file_from_its_beginning() {
        let memory = GuestMemory::create("test", 0x4000).unwrap();
        let inode = memory.inode().unwrap();
        let block = |host_address, bytes| TrackedBlock {
            name: "pc.ram".into(),
            host_address,
            bytes,
            memory: BlockMemory::Shared(memory.clone()),
        };
        let maps = format!("20000-24000 rw-s 00000000 00:01 {inode} /memfd:test (deleted)\n");
        block(0x20000, 0x4000).check(&parse_maps(maps.as_bytes()).unwrap()).unwrap();
        block(0x20000, 0x1000).check(&parse_maps(maps.as_bytes()).unwrap()).unwrap();
        assert!(reason(&block(0x21000, 0x1000), &maps).contains("is not byte 0 of its file"));
        assert!(reason(&block(0x20000, 0x8000), &maps).contains("its file only"));
        assert!(reason(&block(0x20000, 0x4000), MAPS).contains("memfd:other"));
    }
}
