//! The guest's RAM: the main block is filled through its memfd, the small ones travel in the
//! migration stream.

use super::source::Source;
use anyhow::{Context, Result};
use checkpoint_format::{PAGE_SIZE, RamBlockRecord, SpaceName};
use dirty_tracker::GuestMemory;
use futures::StreamExt;
use qmp_bridge::device_state::DeviceState;
use qmp_bridge::migration::Incoming;
use qmp_bridge::stream::{StreamBlock, StreamWriter};

/// The stream is handed over in pieces of this length.
const PIECE: usize = 1 << 20;

/// Writes every page that is not zero; the memory is new, so all others are.
pub(crate) async fn fill(source: Source, block: String, memory: GuestMemory) -> Result<()> {
    let map = source.map(&SpaceName::ram(&block)?).await?;
    let total: u64 = map
        .frame_reads()
        .iter()
        .flat_map(|read| &read.parts)
        .map(|part| part.pages.byte_len().0)
        .sum();
    let progress = source.progress().begin("memory", total);
    let mut runs = std::pin::pin!(source.read(&map));
    while let Some(batch) = runs.next().await {
        let (batch, memory) = (batch?, memory.clone());
        let written: usize = batch.iter().map(|(_, bytes)| bytes.len()).sum();
        let write = move || {
            batch.iter().try_for_each(|(pages, bytes)| memory.write(pages.bytes().start, bytes))
        };
        tokio::task::spawn_blocking(write)
            .await
            .context("internal error: filling the guest's memory panicked")??;
        progress.advance(written as u64);
    }
    Ok(())
}

/// The content of the RAM blocks that travel in the stream, in the manifest's order; none for the
/// main block.
pub(crate) async fn small_blocks(source: &Source) -> Result<Vec<Option<Vec<u8>>>> {
    let manifest = source.manifest();
    let mut contents = Vec::new();
    for block in &manifest.ram_blocks {
        if block.shared || block.used.0 == 0 {
            contents.push(None);
            continue;
        }
        let name = SpaceName::ram(&block.name)?;
        let record =
            manifest.space(&name).with_context(|| format!("the checkpoint has no space {name}"))?;
        contents.push(Some(source.read_whole(record).await?));
    }
    Ok(contents)
}

pub(crate) async fn device_state(source: &Source) -> Result<DeviceState> {
    let name = SpaceName::device_state();
    let record = source.manifest().space(&name).context("the checkpoint has no device state")?;
    let bytes = source.read_whole(record).await.context("reading the device state")?;
    Ok(DeviceState::from_bytes(bytes)?)
}

/// Gives QEMU the stream that a live migration would have given it.
pub(crate) async fn load(
    mut incoming: Incoming,
    source: &Source,
    contents: &[Option<Vec<u8>>],
    devices: &DeviceState,
) -> Result<()> {
    let mut writer = writer(source)?;
    for (block, at, bytes) in pages(contents) {
        writer.page(block, at, bytes)?;
        if writer.buffered() >= PIECE {
            incoming.send(&writer.take()).await?;
        }
    }
    incoming.send(&writer.finish(devices)?).await?;
    incoming.finish().await.context("loading the VM's state into QEMU")
}

/// The whole of that stream, for a load in place.
pub(crate) fn stream(
    source: &Source,
    contents: &[Option<Vec<u8>>],
    devices: &DeviceState,
) -> Result<Vec<u8>> {
    let mut writer = writer(source)?;
    for (block, at, bytes) in pages(contents) {
        writer.page(block, at, bytes)?;
    }
    Ok(writer.finish(devices)?)
}

fn writer(source: &Source) -> Result<StreamWriter> {
    let manifest = source.manifest();
    let blocks = manifest.ram_blocks.iter().map(stream_block).collect();
    Ok(StreamWriter::new(&manifest.vm_record.machine_type, blocks)?)
}

/// The pages of the blocks that travel in the stream: the block's number, the offset, the bytes.
fn pages(contents: &[Option<Vec<u8>>]) -> impl Iterator<Item = (usize, u64, &[u8])> {
    contents.iter().enumerate().flat_map(|(block, content)| {
        let pages = content.iter().flat_map(|content| content.chunks_exact(PAGE_SIZE));
        pages.enumerate().map(move |(page, bytes)| (block, (page * PAGE_SIZE) as u64, bytes))
    })
}

fn stream_block(block: &RamBlockRecord) -> StreamBlock {
    StreamBlock { name: block.name.clone(), used: block.used.0, address: 0, shared: block.shared }
}
