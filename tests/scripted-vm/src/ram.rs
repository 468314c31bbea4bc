//! The guest's memory, wherever it is.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};

pub(crate) const PAGE: usize = 4096;

/// One RAM block.
pub struct RamPart {
    /// Its name in a stream.
    pub name: String,
    /// Bytes.
    pub bytes: u64,
    /// Where it is in the address space of the VM's process.
    pub host: u64,
    /// Holds its content from `offset` on.
    pub file: File,
    /// Where in `file`.
    pub offset: u64,
}

/// All RAM blocks.
pub struct Ram {
    /// In QEMU's order.
    pub parts: Vec<RamPart>,
}

impl Ram {
    /// One block `pc.ram` in a file without a name, which no process has mapped.
    pub fn plain(pages: usize) -> Self {
        let file = memfd_create("ram", MemfdFlags::CLOEXEC).expect("a memory file");
        let file = File::from(file);
        let bytes = (pages * PAGE) as u64;
        file.set_len(bytes).expect("memory");
        let part =
            RamPart { name: "pc.ram".into(), bytes, host: 0x7f00_0000_0000, file, offset: 0 };
        Self { parts: vec![part] }
    }

    /// One page.
    pub fn page(&self, part: usize, page: usize) -> Vec<u8> {
        let RamPart { file, offset, .. } = &self.parts[part];
        let mut bytes = vec![0; PAGE];
        file.read_exact_at(&mut bytes, offset + (page * PAGE) as u64).expect("memory is there");
        bytes
    }

    /// The guest writes a page; no tracker sees it.
    pub fn fill(&self, part: usize, page: usize, byte: u8) {
        self.write(part, page, &[byte; PAGE]);
    }

    /// A page is loaded.
    pub(crate) fn write(&self, part: usize, page: usize, bytes: &[u8]) {
        let RamPart { file, offset, .. } = &self.parts[part];
        file.write_all_at(bytes, offset + (page * PAGE) as u64).expect("memory is there");
    }

    /// What `info ramblock` prints; `has_host`: from 8.0 on.
    pub(crate) fn listing(&self, has_host: bool) -> String {
        let mut text = format!(
            "{:>24}{:>9}{:>20}{:>19}{:>19}",
            "Block Name", "PSize", "Offset", "Used", "Total"
        );
        text += if has_host { "                HVA  RO\r\n" } else { "\r\n" };
        let mut at = 0;
        for RamPart { name, bytes, host, .. } in &self.parts {
            text += &format!("{name:>24}    4 KiB  {at:#018x} {bytes:#018x} {bytes:#018x}");
            text += &if has_host { format!(" {host:#018x}  rw\r\n") } else { "\r\n".into() };
            at += bytes.next_multiple_of(1 << 20);
        }
        text
    }
}
