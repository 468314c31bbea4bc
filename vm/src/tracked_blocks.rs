//! The RAM of a VM: QEMU's RAM blocks, and the tracker that follows them.

use crate::error::{VmError, refused};
use anyhow::{Context, Result};
use dirty_tracker::{BlockMemory, GuestMemory, PluginHandles, TrackedBlock, Tracker, shown_path};
use procfs::process::{MMPermissions, MemoryMap};
use qmp_bridge::devices::GuestDevice;
use qmp_bridge::ramblock::RamBlock;
use qmp_bridge::{Qmp, devices, host_finder, ramblock};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A plugin that is there answers at once.
const PLUGIN_ANSWER: Duration = Duration::from_secs(2);
const PAGE: u64 = checkpoint_format::PAGE_SIZE as u64;

/// The RAM blocks, and the tracker that follows them if QEMU has the plugin.
pub(crate) async fn watch(
    qmp: &Qmp,
    handles: Option<PluginHandles>,
    main: &str,
) -> Result<(Vec<RamBlock>, Option<Arc<Mutex<Tracker>>>)> {
    match handles {
        Some(handles) => {
            let (blocks, tracker) = track(qmp, handles, main).await?;
            Ok((blocks, Some(tracker)))
        }
        None => Ok((whole_blocks(qmp).await?, None)),
    }
}

async fn track(
    qmp: &Qmp,
    handles: PluginHandles,
    main: &str,
) -> Result<(Vec<RamBlock>, Arc<Mutex<Tracker>>)> {
    let blocks = ram_blocks(qmp, &handles, main).await?;
    let tracked_blocks = tracked_blocks(&handles, &blocks, main)?;
    let mut tracker =
        Tracker::attach(handles, tracked_blocks).context("tracking the guest's memory")?;
    if has_balloon(qmp).await? {
        tracker.watch_holes().context("watching for pages that the balloon discards")?;
    }
    Ok((blocks, Arc::new(Mutex::new(tracker))))
}

async fn has_balloon(qmp: &Qmp) -> Result<bool> {
    let devices = devices::guest_devices(qmp).await.context("asking QEMU for its devices")?;
    Ok(devices.iter().any(GuestDevice::is_balloon))
}

/// Blocks with the addresses that the tracker needs: printed by QEMU, or found in its heap where it
/// is too old to say.
async fn ram_blocks(qmp: &Qmp, handles: &PluginHandles, main: &str) -> Result<Vec<RamBlock>> {
    let mut blocks = whole_blocks(qmp).await?;
    if !blocks.iter().any(|block| block.name == main) {
        return Err(refused(format!(
            "QEMU has no RAM block '{main}'; was this VM started by 'stillpoint run'?"
        )));
    }
    if blocks.iter().any(|block| block.host.is_none()) {
        let maps = handles.maps()?;
        host_finder::find_hosts(handles.memory()?, &maps, &mut blocks)
            .context("finding QEMU's RAM blocks in its memory")?;
    }
    Ok(blocks)
}

pub(crate) async fn whole_blocks(qmp: &Qmp) -> Result<Vec<RamBlock>> {
    let blocks = ramblock::ram_blocks(qmp).await.context("asking QEMU for its RAM blocks")?;
    check_whole(&blocks)?;
    Ok(blocks)
}

/// Checks that each RAM block has a whole number of pages.
///
/// # Errors
/// Refused if one is not.
pub fn check_whole(blocks: &[RamBlock]) -> Result<(), VmError> {
    match blocks.iter().find(|block| block.used % PAGE != 0) {
        None => Ok(()),
        Some(odd) => Err(refused(format!(
            "RAM block {} has {} bytes, which are no whole pages",
            odd.name, odd.used
        ))
        .into()),
    }
}

/// Checks that QEMU itself answers at the plugin's socket. The owner of an external VM chooses that
/// path; if another process had it, other memory would be recorded as the VM's.
pub(crate) fn check_plugin(
    socket: &Path,
    handles: PluginHandles,
    qemu: u32,
) -> Result<PluginHandles> {
    if handles.pid() == qemu {
        return Ok(handles);
    }
    Err(refused(format!(
        "{} is answered by process {}, and QEMU is process {qemu}",
        socket.display(),
        handles.pid()
    )))
}

/// Whether the plugin at `socket` lets the tracker follow the memory of process `qemu`. Nothing is
/// registered.
///
/// # Errors
/// Refused with the reason if not.
pub(crate) async fn can_track(qmp: &Qmp, socket: PathBuf, qemu: u32, main: &str) -> Result<()> {
    let connect = tokio::task::spawn_blocking(move || {
        check_plugin(&socket, PluginHandles::connect(&socket, PLUGIN_ANSWER)?, qemu)
    });
    let handles = connect
        .await
        .context("internal error: the task that connects to the plugin panicked")??;
    handles.uffd()?;
    let blocks = ram_blocks(qmp, &handles, main).await?;
    let tracked_blocks = tracked_blocks(&handles, &blocks, main)?;
    if has_balloon(qmp).await? {
        Tracker::can_watch_holes(&tracked_blocks)?;
    }
    Ok(())
}

fn tracked_blocks(
    handles: &PluginHandles,
    blocks: &[RamBlock],
    main: &str,
) -> Result<Vec<TrackedBlock>> {
    blocks.iter().map(|block| tracked_block(handles, block, main)).collect()
}

fn tracked_block(handles: &PluginHandles, block: &RamBlock, main: &str) -> Result<TrackedBlock> {
    let host_address = block
        .host
        .with_context(|| format!("the address of RAM block {} is unknown", block.name))?;
    let memory = if block.name == main {
        main_memory(handles, host_address, main)?
    } else {
        BlockMemory::Private
    };
    Ok(TrackedBlock { name: block.name.clone(), host_address, bytes: block.used, memory })
}

/// The guest's own RAM: the file that we gave QEMU; or one that QEMU made itself; or memory without
/// a file.
fn main_memory(handles: &PluginHandles, host_address: u64, main: &str) -> Result<BlockMemory> {
    if let Some(given) = handles.ram(main)? {
        return Ok(BlockMemory::Shared(given));
    }
    let maps = handles.maps()?;
    let mapping =
        maps.iter().find(|mapping| (mapping.address.0..mapping.address.1).contains(&host_address));
    let mapping = mapping
        .with_context(|| format!("nothing is mapped where QEMU has its RAM block {main}"))?;
    if mapping.perms.contains(MMPermissions::SHARED) {
        let file = own_file(handles.pid(), mapping)?;
        return Ok(BlockMemory::Shared(GuestMemory::from_fd(main, file.into())?));
    }
    if mapping.inode != 0 {
        return Err(refused(format!(
            "the guest's memory is a private mapping of {}, whose content the tracker cannot tell from the guest's; use a memory-backend-memfd",
            shown_path(mapping)
        )));
    }
    Ok(BlockMemory::Private)
}

/// Opens a memory file that QEMU has mapped, by its file descriptor, since it has no path.
fn own_file(pid: u32, mapping: &MemoryMap) -> Result<File> {
    let folder = format!("/proc/{pid}/fd");
    let files = std::fs::read_dir(&folder)
        .with_context(|| format!("looking at QEMU's open files in {folder}"))?;
    let is_it = |path: &PathBuf| {
        std::fs::metadata(path).is_ok_and(|facts| facts.ino() == mapping.inode && facts.is_file())
    };
    let is_memory = |path: &PathBuf| {
        std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:"))
    };
    match files.flatten().map(|file| file.path()).find(|path| is_it(path) && is_memory(path)) {
        // For writing, because only such a file can be watched for holes; nothing is written.
        Some(path) => File::options()
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("opening the guest's memory by {}", path.display())),
        None => Err(refused(format!(
            "the guest's memory is the file {}, which others can write or cut off \
             unseen; use a memory-backend-memfd",
            shown_path(mapping)
        ))),
    }
}
