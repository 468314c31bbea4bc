//! The memory of a guest that does not run, read from QEMU's process: nothing is asked of QEMU for
//! it, so the guest's run state stays what it is. QEMU's own migration would leave it in another.

use crate::error::{VmError, refused};
use crate::process;
use crate::tracked_blocks::whole_blocks;
use anyhow::Context;
use checkpoint_format::PageRange;
use qmp_bridge::Qmp;
use qmp_bridge::host_finder;
use qmp_bridge::ramblock::RamBlock;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// The memory of a QEMU process, read by the kernel's way for debuggers.
pub struct ProcessMemory {
    memory: File,
    blocks: Vec<RamBlock>,
}

impl ProcessMemory {
    /// Refused where this user may not read that process (another user's, or
    /// `kernel.yama.ptrace_scope`).
    ///
    /// # Errors
    /// If this user may not read it, or a RAM block is not found in it.
    pub async fn open(qmp: &Qmp, pid: u32) -> Result<Self, VmError> {
        let path = format!("/proc/{pid}/mem");
        let memory = File::open(&path).map_err(|error| {
            refused(format!(
                "{path} cannot be opened ({error}); run Stillpoint as root, or let the guest run for the time of the checkpoint"
            ))
        })?;
        let mut blocks = whole_blocks(qmp).await?;
        if blocks.iter().any(|block| block.host.is_none()) {
            let maps = process::open(pid).and_then(|process| process::memory_maps(&process));
            host_finder::find_hosts(
                &memory,
                &maps.context("reading QEMU's memory map")?,
                &mut blocks,
            )
            .map_err(|error| refused(format!("{error}")))?;
        }
        Ok(Self { memory, blocks })
    }

    /// Whether the memory of a guest could be read so, if it `is_stopped`.
    ///
    /// # Errors
    /// Why not, in words.
    pub async fn check(qmp: &Qmp, pid: u32, is_stopped: bool) -> Result<(), String> {
        if !is_stopped {
            return Ok(());
        }
        Self::open(qmp, pid).await.map(drop).map_err(|error| format!("{error:#}"))
    }

    /// Its RAM blocks, by number.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// Fills `out` with pages of the block of this number.
    ///
    /// # Errors
    /// If there is no such block, or the process has ended.
    pub fn read(&self, block: usize, pages: PageRange, out: &mut [u8]) -> Result<(), VmError> {
        let block = self.blocks.get(block).context("no such RAM block")?;
        let host = block
            .host
            .with_context(|| format!("the address of RAM block {} is unknown", block.name))?;
        let place = host + pages.bytes().start;
        let read = self.memory.read_exact_at(out, place);
        Ok(read.with_context(|| {
            format!("reading {pages} of RAM block {} in QEMU's memory", block.name)
        })?)
    }
}
