//! What a proof needs of the host, checked before anything is made.

use super::expected::Expected;
use crate::progress::bytes;
use anyhow::{Context, Result};
use checkpoint_format::{PAGE_SIZE, SpaceKind, SpaceName};
use nix::sys::statvfs::statvfs;
use std::collections::HashMap;
use std::path::Path;
use vm::error::refused;
use vm::process::available_memory;

/// QEMU itself, and this process.
const PROGRAMS: u64 = 192 << 20;

/// Memory and disk space, by what the checkpoint holds: zero pages take none.
pub(super) fn check(expected: &HashMap<SpaceName, Expected>, workspace: &Path) -> Result<()> {
    let sum = |kind: SpaceKind| -> u64 {
        let pages = expected
            .iter()
            .filter(|(name, _)| name.kind() == kind)
            .map(|(_, pages)| pages.data_pages());
        pages.sum::<u64>() * PAGE_SIZE as u64
    };
    let memory = sum(SpaceKind::Ram) + PROGRAMS;
    let available = available_memory()?;
    tracing::info!(needed = memory, available, "memory for the proof");
    if memory > available {
        return Err(refused(format!(
            "the proof needs {} of memory, and this host has {} to spare; prove it on another host",
            bytes(memory),
            bytes(available)
        )));
    }
    let disk = sum(SpaceKind::Disk);
    let facts = statvfs(workspace)
        .with_context(|| format!("asking for the free space of {}", workspace.display()))?;
    let free = facts.blocks_available() * facts.fragment_size();
    if disk > free {
        return Err(refused(format!(
            "the proof needs {} for disks, and {} has {} free; name another directory by --fleecing-dir",
            bytes(disk),
            workspace.display(),
            bytes(free)
        )));
    }
    Ok(())
}
