//! Copies the pages that an older QEMU's emulator loses in a migration into the new QEMU, before
//! the new QEMU loads the devices.
//!
//! Under TCG a guest's write marks its page dirty only when the emulator's TLB says that the page
//! is clean. Before 9.0 QEMU cleared the dirty bits in each pass over memory and left the TLB as it
//! was, so that later writes to a page that is written often went unseen, and the destination kept
//! an older copy (seen with 7.2.22 alone in one of four migrations: a guest that finds old data, or
//! a kernel that crashes). KVM and QEMU since 9.0 are not touched by this.
//!
//! QEMU does not record which pages these are. Comparing only the pages that were sent again after
//! the first pass is not enough: in tests it missed some. So with the guest stopped, and the
//! destination waiting for the rest of the stream, the two memories are compared, page by page, and
//! what differs is copied. Pages that the old process never touched are zero on both sides and are
//! skipped. The rest of the stream then brings what the source knew to be dirty.

use anyhow::{Context, Result, bail};
use checkpoint_format::as_index;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use procfs::process::{MMPermissions, MemoryMap, MemoryMaps};
use qmp_bridge::paused::run_state;
use qmp_bridge::ramblock::{RamBlock, ram_blocks};
use qmp_bridge::{Qmp, host_finder, quirks};
use std::fs::File;
use std::io::IoSliceMut;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use vm::error::refused;
use vm::process;

const PAGE: u64 = 4096;
/// What one thread takes at a time; both copies stay in its cache.
const PIECE: u64 = 256 << 10;
const THREADS: usize = 2;
/// An entry of `pagemap`: in memory, or swapped out.
const EXISTS: u64 = 0b11 << 62;
const ENTRY: u64 = 8;

/// The same part of a RAM block in both processes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    from: u64,
    to: u64,
    bytes: u64,
    /// What was never touched is not there and holds zeros; of a file's mapping that cannot be
    /// said.
    is_sparse: bool,
}

pub(super) struct MemoryComparison {
    source: u32,
    destination: u32,
    pieces: Vec<Piece>,
}

impl MemoryComparison {
    /// Finds the memories of both, with the guest running.
    pub(super) async fn prepare(source: (&Qmp, u32), destination: (&Qmp, u32)) -> Result<Self> {
        let old = blocks(source.0, source.1).await.map_err(cannot_read)?;
        let new = blocks(destination.0, destination.1).await?;
        let maps = maps(source.1)?;
        let sparse = sparse(&maps);
        let mut pieces = Vec::new();
        for block in &old {
            let there = new.iter().find(|other| other.name == block.name);
            let there =
                there.with_context(|| format!("the new QEMU has no RAM block {}", block.name))?;
            if block.used > there.total {
                bail!(
                    "RAM block {} is larger in the old QEMU than it can be in the new one",
                    block.name
                );
            }
            pieces.extend(cut(address(block)?, address(there)?, block.used, &sparse));
        }
        Ok(Self { source: source.1, destination: destination.1, pieces })
    }

    /// With the guest stopped: copies what differs, and says how many pages that were.
    pub(super) async fn copy_lost_pages(self, destination: &Qmp) -> Result<u64> {
        // When QEMU has replied twice, it has read all of the stream that was in the socket before:
        // it writes no older page from now on.
        for _ in 0..2 {
            run_state(destination).await?;
        }
        tokio::task::spawn_blocking(move || self.run())
            .await
            .context("internal error: the memory comparison panicked")?
    }

    fn run(self) -> Result<u64> {
        let pagemap = File::open(format!("/proc/{}/pagemap", self.source))
            .context("opening the old QEMU's page map")?;
        let memory =
            File::options().read(true).write(true).open(format!("/proc/{}/mem", self.destination));
        let memory = memory.context("opening the new QEMU's memory")?;
        let (next, copied) = (AtomicUsize::new(0), AtomicU64::new(0));
        let work = || -> Result<()> {
            let mut buffers = Buffers::new();
            while let Some(piece) = self.pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                for run in existing(&pagemap, piece)? {
                    let count = self.copy_differences(piece, run, &memory, &mut buffers)?;
                    copied.fetch_add(count, Ordering::Relaxed);
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
            threads.into_iter().try_for_each(|thread| match thread.join() {
                Ok(result) => result,
                Err(_) => bail!("a thread that compared memory has failed"),
            })
        })?;
        Ok(copied.into_inner())
    }

    /// `run`: bytes of the piece.
    fn copy_differences(
        &self,
        piece: &Piece,
        run: Range<u64>,
        memory: &File,
        buffers: &mut Buffers,
    ) -> Result<u64> {
        let len = usize::try_from(run.end - run.start).context("a piece is too large")?;
        let (old, new) = (&mut buffers.old[..len], &mut buffers.new[..len]);
        read(self.source, piece.from + run.start, old).context("reading the old QEMU's memory")?;
        read(self.destination, piece.to + run.start, new)
            .context("reading the new QEMU's memory")?;
        if old == new {
            return Ok(0);
        }
        let mut count = 0;
        for (index, (old, new)) in
            old.chunks(as_index(PAGE)).zip(new.chunks(as_index(PAGE))).enumerate()
        {
            if old != new {
                let at = piece.to + run.start + index as u64 * PAGE;
                memory.write_all_at(old, at).context("writing the new QEMU's memory")?;
                count += 1;
            }
        }
        Ok(count)
    }
}

struct Buffers {
    old: Vec<u8>,
    new: Vec<u8>,
}

impl Buffers {
    fn new() -> Self {
        Self { old: vec![0; as_index(PIECE)], new: vec![0; as_index(PIECE)] }
    }
}

fn read(pid: u32, at: u64, out: &mut [u8]) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid).context("a process id is too large")?);
    let mut done = 0;
    while done < out.len() {
        let remote = RemoteIoVec {
            base: usize::try_from(at).context("an address is too large")? + done,
            len: out.len() - done,
        };
        match process_vm_readv(pid, &mut [IoSliceMut::new(&mut out[done..])], &[remote])? {
            0 => bail!("nothing could be read at {:#x}", remote.base),
            count => done += count,
        }
    }
    Ok(())
}

/// The parts of a piece that exist in the old process, as bytes from its begin.
fn existing(pagemap: &File, piece: &Piece) -> Result<Vec<Range<u64>>> {
    if !piece.is_sparse {
        return Ok(Vec::from([Range { start: 0, end: piece.bytes }]));
    }
    let pages = piece.bytes.div_ceil(PAGE);
    let mut entries = vec![0; usize::try_from(pages * ENTRY).context("a piece is too large")?];
    pagemap
        .read_exact_at(&mut entries, piece.from / PAGE * ENTRY)
        .context("reading the old QEMU's page map")?;
    let exists = entries.chunks_exact(as_index(ENTRY)).map(|entry| {
        let entry: [u8; as_index(ENTRY)] = entry.try_into().unwrap_or_default();
        u64::from_ne_bytes(entry) & EXISTS != 0
    });
    let mut runs: Vec<Range<u64>> = Vec::new();
    for page in exists.enumerate().filter(|(_, exists)| *exists).map(|(page, _)| page as u64 * PAGE)
    {
        match runs.last_mut() {
            Some(run) if run.end == page => run.end += PAGE,
            _ => runs.push(page..page + PAGE),
        }
    }
    if let Some(last) = runs.last_mut() {
        last.end = last.end.min(piece.bytes);
    }
    Ok(runs)
}

/// The blocks with their addresses: printed by QEMU, or found in its heap where it is too old to
/// say.
async fn blocks(qmp: &Qmp, pid: u32) -> Result<Vec<RamBlock>> {
    let mut blocks = ram_blocks(qmp).await.context("asking QEMU for its RAM blocks")?;
    if blocks.iter().any(|block| block.host.is_none()) {
        let path = format!("/proc/{pid}/mem");
        let memory = File::open(&path).with_context(|| format!("opening {path}"))?;
        host_finder::find_hosts(&memory, &maps(pid)?, &mut blocks)
            .context("finding QEMU's RAM blocks in its memory")?;
    }
    Ok(blocks)
}

fn maps(pid: u32) -> Result<MemoryMaps> {
    process::open(pid)
        .and_then(|process| process::memory_maps(&process))
        .with_context(|| format!("reading the memory map of process {pid}"))
}

fn address(block: &RamBlock) -> Result<u64> {
    block.host.with_context(|| format!("the address of RAM block {} is unknown", block.name))
}

/// Private anonymous memory.
fn sparse(maps: &MemoryMaps) -> Vec<Range<u64>> {
    let is_it = |map: &&MemoryMap| map.perms.contains(MMPermissions::PRIVATE) && map.inode == 0;
    maps.iter().filter(is_it).map(|map| map.address.0..map.address.1).collect()
}

fn cut(from: u64, to: u64, bytes: u64, sparse: &[Range<u64>]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < bytes {
        let len = PIECE.min(bytes - at);
        let here = from + at..from + at + len;
        let is_sparse = here.start.is_multiple_of(PAGE)
            && sparse.iter().any(|range| range.start <= here.start && here.end <= range.end);
        pieces.push(Piece { from: from + at, to: to + at, bytes: len, is_sparse });
        at += len;
    }
    pieces
}

fn cannot_read(error: anyhow::Error) -> anyhow::Error {
    refused(format!(
        "QEMU before {} loses pages when an emulated (TCG) guest is migrated, and its memory cannot be read to copy them \
         ({error:#}); run Stillpoint as root or as the user of that QEMU, or checkpoint it by stream as it is",
        quirks::LIVE_TCG_MIGRATION_LOSES_PAGES.changed_in()
    ))
}

/// Whether we may read that process at all, asked before anything is done.
pub(super) fn check_readable(pid: u32) -> Result<()> {
    process::started(pid).context("the old QEMU has ended")?;
    match File::open(format!("/proc/{pid}/mem")) {
        Ok(_) => Ok(()),
        Err(error) => Err(cannot_read(error.into())),
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use procfs::FromRead;

    fn own(bytes: &[u8], other: &[u8]) -> MemoryComparison {
        let pid = std::process::id();
        let sparse = sparse(&maps(pid).unwrap());
        let pieces = cut(bytes.as_ptr() as u64, other.as_ptr() as u64, bytes.len() as u64, &sparse);
        MemoryComparison { source: pid, destination: pid, pieces }
    }

    /// A copy at another address, page-aligned as RAM blocks are.
    fn pages(fill: u8, count: usize) -> (Vec<u8>, usize) {
        let bytes = vec![fill; (count + 1) * as_index(PAGE)];
        let skip =
            (bytes.as_ptr() as usize).next_multiple_of(as_index(PAGE)) - bytes.as_ptr() as usize;
        (bytes, skip)
    }

    #[test]
    fn what_differs_is_copied_and_counted() {
        let count = 200;
        let len = count * as_index(PAGE);
        let ((mut old, skip), (mut new, other)) = (pages(7, count), pages(7, count));
        for page in [0, 63, 64, 199] {
            old[skip + page * as_index(PAGE) + 17] = 9;
        }
        let comparison = own(&old[skip..skip + len], &new[other..other + len]);
        assert_eq!(comparison.run().unwrap(), 4);
        // It was written behind the compiler's back.
        let new = std::hint::black_box(&mut new);
        assert!(new[other..other + len] == old[skip..skip + len]);
        assert_eq!(own(&old[skip..skip + len], &new[other..other + len]).run().unwrap(), 0);
    }

    #[test]
    fn mappings_of_files_are_not_taken_for_sparse() {
        let maps = "1000-3000 rw-p 00000000 00:00 0    [heap]\n5000-6000 rw-s 00000000 00:01 5 /memfd:x\n7000-8000 rw-p 0 08:01 9 /lib\n";
        let maps = MemoryMaps::from_read(maps.as_bytes()).unwrap();
        assert_eq!(sparse(&maps), [Range { start: 0x1000, end: 0x3000 }]);
        let pieces =
            cut(0x1000, 0x9000, PIECE + 5, &[Range { start: 0x1000, end: 0x1000 + PIECE }]);
        assert_eq!(pieces[0], Piece { from: 0x1000, to: 0x9000, bytes: PIECE, is_sparse: true });
        assert_eq!(
            pieces[1],
            Piece { from: 0x1000 + PIECE, to: 0x9000 + PIECE, bytes: 5, is_sparse: false }
        );
    }
}
