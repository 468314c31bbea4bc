//! A file becomes a layer: cut into fixed blocks, of which only those that no layer has yet are stored.

use super::digest::FileDigest;
use super::read::StoredLayer;
use super::{MANIFEST_FILE, TABLE_FILE};
use crate::pack::{FrameJob, PackJob, PackTarget, Packer};
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use checkpoint_format::{
    BLOCK_PAGES, BLOCK_SIZE, BlockHome, BlockIndex, BlockTableBuilder, ContentDigest, ContentHasher, FrameNo, LayerManifest, PAGE_SIZE,
    PackName, PackNo, PackRecord, PageDigest, PageIndex, SpaceId, SpaceName, SpaceTable, is_zero,
};
use checkpoint_store::{LayerOutcome, PartialLayer, Repository};
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

/// Blocks of other layers held in memory to be found again: about 25 MB, 16 GiB of layers.
const MOST_KNOWN_BLOCKS: usize = 1 << 18;

/// Stores the file unless the store has it. Returns how many bytes were stored.
pub async fn ensure(repository: &Repository, path: &Path, file: FileDigest) -> Result<u64> {
    if repository.has_layer(&file.digest).await? {
        return Ok(0);
    }
    tracing::info!(path = %path.display(), digest = %file.digest, len = file.len.0, "storing a layer");
    let known = known_blocks(repository).await?;
    let layer = Arc::new(repository.begin_layer(&file.digest).await?);
    match store(&layer, path, file, &known).await {
        Ok(stored) => finish(layer, stored).await,
        Err(error) => {
            if let Ok(layer) = Arc::try_unwrap(layer) {
                // The next upload cleans up after one that could not.
                let _ = layer.abort().await;
            }
            Err(error.context(format!("storing the layer {}", path.display())))
        }
    }
}

async fn finish(layer: Arc<PartialLayer>, stored: u64) -> Result<u64> {
    let layer = Arc::try_unwrap(layer).ok().context("the layer's pipeline still runs")?;
    Ok(match layer.commit().await? {
        LayerOutcome::Stored => stored,
        LayerOutcome::AlreadyThere => 0,
    })
}

async fn known_blocks(repository: &Repository) -> Result<BlockIndex> {
    let mut known = BlockIndex::new();
    for digest in repository.layers().await? {
        // A damaged layer is no reason not to store another one; 'verify' tells of it.
        if known.len() > MOST_KNOWN_BLOCKS {
            // A block that is not known is stored once more: larger, never wrong.
            break;
        }
        match StoredLayer::open(repository, &digest).await {
            Ok(layer) => known.add_layer(&layer.manifest, &layer.table),
            Err(error) => tracing::warn!(%digest, error = format!("{error:#}"), "not used for sharing blocks"),
        }
    }
    Ok(known)
}

/// What a block turned out to be.
enum Found {
    Zero,
    /// The n-th block in the new layer's own packs.
    Own(ContentDigest, u64),
    Shared(ContentDigest, BlockHome),
}

async fn store(layer: &Arc<PartialLayer>, path: &Path, file: FileDigest, known: &BlockIndex) -> Result<u64> {
    let space = SpaceName::layer(file.digest);
    let spaces = SpaceTable::new([space.clone()])?;
    let id = spaces.id(&space).context("the layer's space has no number")?;
    let label = format!("layer {}", file.digest);
    let packer = Packer::new(Arc::clone(layer) as Arc<dyn PackTarget>, spaces, label);
    let cut = cut(path, file, known, id, &packer).await;
    let packs = packer.finish().await?;
    let (table, owners) = table(cut?, &packs)?.finish();
    let (bytes, info) = table.encode()?;
    let stored: u64 = packs.iter().map(|pack| pack.info.len.0).sum::<u64>() + bytes.len() as u64;
    let manifest = LayerManifest::new(file.digest, file.len, packs, owners, info).encode()?;
    put(layer, TABLE_FILE, bytes).await?;
    put(layer, MANIFEST_FILE, manifest).await?;
    Ok(stored)
}

async fn put(layer: &PartialLayer, name: &str, bytes: Vec<u8>) -> Result<()> {
    let name: PackName = name.parse().context("a layer's file name")?;
    layer.put_file(&name, vec![Bytes::from(bytes)]).await?;
    Ok(())
}

/// Reads the file once, sends what is new to the packer, and checks that the content is still what its digest says.
async fn cut(path: &Path, file: FileDigest, known: &BlockIndex, space: SpaceId, packer: &Packer) -> Result<Vec<Found>> {
    let mut input = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut hasher = ContentHasher::new();
    let mut found = Vec::new();
    let mut own: HashMap<ContentDigest, u64> = HashMap::new();
    loop {
        let mut block = Vec::with_capacity(BLOCK_SIZE);
        let read = input.by_ref().take(BLOCK_SIZE as u64).read_to_end(&mut block);
        if read.with_context(|| format!("reading {}", path.display()))? == 0 {
            break;
        }
        hasher.update(&block);
        block.resize(block.len().next_multiple_of(PAGE_SIZE), 0);
        if is_zero(&block) {
            found.push(Found::Zero);
            continue;
        }
        let digest = ContentDigest::of(&block);
        if let Some(home) = known.find(&digest) {
            found.push(Found::Shared(digest, home));
            continue;
        }
        let next = own.len() as u64;
        let place = *own.entry(digest).or_insert(next);
        if place == next {
            packer.send(&mut vec![frame(space, found.len(), block)]).await?;
        }
        found.push(Found::Own(digest, place));
    }
    if hasher.finish() != file.digest {
        bail!("{} changed while it was stored; a layer must be read-only", path.display());
    }
    Ok(found)
}

fn frame(space: SpaceId, block: usize, raw: Vec<u8>) -> PackJob {
    let first = (block * BLOCK_PAGES) as u64;
    let pages = raw.chunks_exact(PAGE_SIZE).enumerate();
    let pages = pages.map(|(number, page)| (PageIndex(first + number as u64), PageDigest::of(page))).collect();
    PackJob::Data(FrameJob { space, pages, raw })
}

/// The n-th own block is the n-th frame over all packs: the packer keeps the order.
fn table(found: Vec<Found>, packs: &[PackRecord]) -> Result<BlockTableBuilder> {
    let mut homes = Vec::new();
    for (pack, record) in packs.iter().enumerate() {
        homes.extend((0..record.info.frames).map(|frame| (PackNo(pack as u32), FrameNo(frame))));
    }
    let mut builder = BlockTableBuilder::new();
    for block in found {
        match block {
            Found::Zero => builder.push_zero()?,
            Found::Shared(digest, home) => builder.push_shared(digest, home)?,
            Found::Own(digest, place) => {
                let (pack, frame) = homes.get(place as usize).context("a block is missing from the layer's packs")?;
                builder.push_own(digest, *pack, *frame)?;
            }
        }
    }
    Ok(builder)
}
