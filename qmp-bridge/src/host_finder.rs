//! Finds where RAM blocks lie in QEMU's address space when its monitor does not tell (before 8.x).
//!
//! QEMU keeps a `struct RAMBlock` per block on its heap. What the monitor does print is in it, in
//! fixed places:
//!
//! ```text
//! host (8) | colo_cache (8) | offset (8) | used_length (8) | max_length (8) | resized (8) | flags (4) | idstr (256)
//! ```
//!
//! So the heap is searched for offset, used and max length beside one another with the block's name
//! behind them. A hit counts only if its host pointer leads to memory of at least that length, and
//! if there is no other such pointer.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

use procfs_core::process::{MMPermissions, MMapPath, MemoryMap, MemoryMaps};
use thiserror::Error;

use crate::ramblock::RamBlock;

/// Largest anonymous mapping searched: heaps and arenas are smaller, guest RAM is larger.
const MAX_SEARCHED: u64 = 256 << 20;
const PIECE: usize = 1 << 20;
/// The struct as far as it is looked at.
const HOST: usize = 0;
const OFFSET: usize = 16;
const USED: usize = 24;
const MAX: usize = 32;
const NAME: usize = 52;
const NAME_LENGTH: usize = 256;
const STRUCT: usize = NAME + NAME_LENGTH;
const WORD: usize = 8;

#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum HostError {
    #[error("cannot read the memory of QEMU: {0}; run as the same user, or with CAP_SYS_PTRACE")]
    Read(std::io::Error),
    #[error(
        "RAM block `{name}` was not found in the memory of QEMU; use QEMU 8.2 or later, which tells its address"
    )]
    NotFound { name: String },
    #[error(
        "RAM block `{name}` could be at {count} places in QEMU; use QEMU 8.2 or later, which tells its address"
    )]
    Ambiguous { name: String, count: usize },
}

/// Fills in `host` of the blocks that lack it. `memory` is `/proc/PID/mem`, `maps` what is in
/// `/proc/PID/maps`.
///
/// # Errors
/// When a block's memory is not found at one place in QEMU's map, or cannot be read.
pub fn find_hosts(
    memory: &File,
    maps: &MemoryMaps,
    blocks: &mut [RamBlock],
) -> Result<(), HostError> {
    if blocks.iter().all(|block| block.host.is_some()) {
        return Ok(());
    }
    let mut found = vec![BTreeSet::new(); blocks.len()];
    // The structs are made by the main thread, whose heap is usually this one; the rest is searched
    // only if need be.
    for is_main in [true, false] {
        let is_it = |mapping: &&MemoryMap| {
            is_heap_like(mapping) && (mapping.pathname == MMapPath::Heap) == is_main
        };
        for mapping in maps.iter().filter(is_it) {
            search(memory, mapping.address, blocks, &mut found)?;
        }
        for (block, hosts) in blocks.iter().zip(&mut found) {
            hosts.retain(|host| is_memory(maps, *host, block));
        }
        if found.iter().all(|hosts| !hosts.is_empty()) {
            break;
        }
    }
    for (block, hosts) in blocks.iter_mut().zip(found).filter(|(block, _)| block.host.is_none()) {
        let hosts: Vec<u64> = hosts.into_iter().collect();
        match hosts.as_slice() {
            [host] => block.host = Some(*host),
            [] => return Err(HostError::NotFound { name: block.name.clone() }),
            many => {
                return Err(HostError::Ambiguous { name: block.name.clone(), count: many.len() });
            }
        }
    }
    Ok(())
}

/// Read-write, private, without a file: where a heap can be.
fn is_heap_like(mapping: &MemoryMap) -> bool {
    let (start, end) = mapping.address;
    let is_writable = MMPermissions::READ | MMPermissions::WRITE | MMPermissions::PRIVATE;
    let is_small = match mapping.pathname {
        MMapPath::Heap => true,
        MMapPath::Anonymous => end.saturating_sub(start) <= MAX_SEARCHED,
        _ => false,
    };
    mapping.perms == is_writable && mapping.inode == 0 && is_small
}

/// Whether a block can begin here: page-aligned, and readable mappings without a gap for all of it.
fn is_memory(maps: &MemoryMaps, host: u64, block: &RamBlock) -> bool {
    let Some(end) = host.checked_add(block.total) else { return false };
    let mut at = host;
    // The map is sorted by address, so one pass follows neighbours.
    for mapping in maps {
        let (start, end) = mapping.address;
        if mapping.perms.contains(MMPermissions::READ) && start <= at && at < end {
            at = end;
        }
    }
    host != 0 && host.is_multiple_of(block.page_size.max(1)) && at >= end
}

fn search(
    memory: &File,
    (start, end): (u64, u64),
    blocks: &[RamBlock],
    found: &mut [BTreeSet<u64>],
) -> Result<(), HostError> {
    let mut buffer = vec![0; PIECE + STRUCT];
    let mut at = start;
    while at < end {
        let wanted = usize::try_from(end - at).map_or(buffer.len(), |rest| rest.min(buffer.len()));
        let read = match memory.read_at(&mut buffer[..wanted], at) {
            Ok(read) => read,
            // A mapping that has gone in the meantime, or a guard page.
            Err(error) if error.raw_os_error() == Some(nix::libc::EIO) => 0,
            Err(error) => return Err(HostError::Read(error)),
        };
        search_piece(&buffer[..read], blocks, found);
        // Pieces overlap by a struct, so that none is cut.
        at += PIECE as u64;
    }
    Ok(())
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + WORD).and_then(|word| word.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

fn search_piece(bytes: &[u8], blocks: &[RamBlock], found: &mut [BTreeSet<u64>]) {
    for at in (0..bytes.len().saturating_sub(NAME)).step_by(WORD) {
        let max = word(bytes, at + MAX);
        // Lengths are whole pages, which rules out nearly everything at once.
        if max == 0 || !max.is_multiple_of(4096) {
            continue;
        }
        let (offset, used) = (word(bytes, at + OFFSET), word(bytes, at + USED));
        for (block, hosts) in blocks.iter().zip(found.iter_mut()) {
            if (block.offset, block.used, block.total) == (offset, used, max)
                && has_name(&bytes[at + NAME..], &block.name)
            {
                hosts.insert(word(bytes, at + HOST));
            }
        }
    }
}

fn has_name(bytes: &[u8], name: &str) -> bool {
    bytes.get(..name.len()) == Some(name.as_bytes()) && bytes.get(name.len()) == Some(&0)
}

#[cfg(test)]
mod test {
    use super::*;
    use procfs_core::FromRead;

    const BLOCK: &str = "vga.vram";

    fn block() -> RamBlock {
        let (offset, used, total) = (0x8000, 0x4000, 0x5000);
        RamBlock {
            name: BLOCK.into(),
            page_size: 4096,
            offset,
            used,
            total,
            host: None,
            read_only: None,
        }
    }

    fn image(host: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        for number in [host, 0, 0x8000, 0x4000, 0x5000, 0] {
            bytes.extend(number.to_ne_bytes());
        }
        bytes.extend([0; 4]);
        bytes.extend(BLOCK.as_bytes());
        bytes.resize(STRUCT, 0);
        bytes
    }

    /// A file as memory: the heap at 0x1000 holds the given structs, the block's memory is a
    /// mapping at 0x100000.
    fn find(structs: &[(usize, u64)]) -> Result<Option<u64>, HostError> {
        let mut heap = vec![0; 0x3000];
        for (at, host) in structs {
            heap[*at..*at + STRUCT].copy_from_slice(&image(*host));
        }
        let file = tempfile::tempfile().expect("file");
        file.write_all_at(&heap, 0x1000).expect("write");
        let maps = "1000-4000 rw-p 00000000 00:00 0    [heap]\n\
                    100000-103000 rw-p 00000000 00:00 0 \n103000-106000 rw-s 00000000 00:01 5 /memfd:x (deleted)\n\
                    200000-204000 rw-p 00000000 00:00 0 \n";
        let mut blocks = [block()];
        let maps = MemoryMaps::from_read(maps.as_bytes()).expect("maps");
        find_hosts(&file, &maps, &mut blocks).map(|()| blocks[0].host)
    }

    #[test]
    fn one_sound_pointer_is_taken() {
        assert_eq!(find(&[(0x128, 0x10_0000)]).expect("found"), Some(0x10_0000));
        // The same struct twice agrees; pointers to nowhere and into too short a mapping are passed
        // over.
        let structs = [
            (0x128, 0x10_0000),
            (0x800, 0x10_0000),
            (0x1000, 0x90_0000),
            (0x2000, 0x20_0000),
            (0x2800, 0x10_0001),
        ];
        assert_eq!(find(&structs).expect("found"), Some(0x10_0000));
    }

    #[test]
    fn none_and_two_are_errors() {
        assert!(matches!(find(&[]), Err(HostError::NotFound { .. })));
        assert!(matches!(find(&[(0x128, 0x90_0000)]), Err(HostError::NotFound { .. })));
        assert!(matches!(
            find(&[(0x128, 0x10_0000), (0x800, 0x10_1000)]),
            Err(HostError::Ambiguous { count: 2, .. })
        ));
    }
}
