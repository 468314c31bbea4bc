//! A file becomes a layer: cut into fixed blocks, of which only those that no layer has yet are
//! stored.

use super::digest::FileDigest;
use super::image::{self, Blocks};
use super::read::{StoredLayer, read_manifest};
use super::{MANIFEST_FILE, TABLE_FILE};
use crate::pack::{Entrance, FrameJob, PackJob, PackTarget, Packer};
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use checkpoint_format::{
    BLOCK_PAGES, BLOCK_SIZE, BlockIndex, BlockTable, BlockTableBuilder, BlocksHasher,
    ContentDigest, ContentHasher, DigestForm, FrameNo, LayerManifest, PAGE_SIZE, PackName, PackNo,
    PackRecord, PageDigest, PageIndex, SpaceId, SpaceName, SpaceTable, is_zero,
};
use checkpoint_store::{LayerOutcome, PartialLayer, Repository};
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use vm::error::{EngineError, InPhase, Phase};

/// Blocks of other layers, and of the new one, held in memory to be found again: about 40 MB, 16
/// GiB of layers.
const MOST_KNOWN_BLOCKS: usize = 1 << 18;
/// A table that names each zero block is not read for its few others beyond this length.
const MOST_TABLE_BLOCKS: u64 = 1 << 22;

/// Stores the file, whose digest is `file`, as a layer unless the store has it. Returns how many
/// bytes were stored: 0 for a layer that is there.
///
/// # Errors
/// When the file cannot be read, or does not have that digest any more; class store when the store
/// does not take it. Nothing of a layer is visible before all of it is stored.
pub async fn ensure(
    repository: &Repository,
    path: &Path,
    file: FileDigest,
) -> Result<u64, EngineError> {
    ensure_stored(repository, path, file).await.in_phase(Phase::Layers)
}

async fn ensure_stored(repository: &Repository, path: &Path, file: FileDigest) -> Result<u64> {
    if repository.has_layer(&file.digest).await? {
        return Ok(0);
    }
    tracing::info!(path = %path.display(), digest = %file.digest, len = file.len.0, "storing a layer");
    let known = known_blocks(repository).await?;
    let layer = Arc::new(repository.begin_layer(&file.digest).await?);
    match store(&layer, path, file, known).await {
        Ok(stored) => finish(layer, stored).await,
        Err(error) => {
            if let Ok(layer) = Arc::try_unwrap(layer) {
                // The next upload cleans up after one that could not.
                let _ = layer.abort().await;
            }
            if repository.has_layer(&file.digest).await.unwrap_or(false) {
                // Another upload stored it meanwhile, and removed what this one had stored.
                return Ok(0);
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
        if let Err(error) = add_known(repository, &digest, &mut known).await {
            tracing::warn!(%digest, error = format!("{error:#}"), "not used for sharing blocks");
        }
    }
    Ok(known)
}

/// A layer that is too large to be known is not: a block that is not known is stored once more,
/// which is larger, never wrong.
async fn add_known(
    repository: &Repository,
    digest: &ContentDigest,
    known: &mut BlockIndex,
) -> Result<()> {
    let manifest = read_manifest(repository, digest).await?;
    let blocks = known.len() as u64 + manifest.table.stored_blocks;
    if blocks > MOST_KNOWN_BLOCKS as u64
        || manifest.form == DigestForm::Content && manifest.table.blocks > MOST_TABLE_BLOCKS
    {
        return Ok(());
    }
    let layer = StoredLayer::with_manifest(repository, manifest).await?;
    known.add_layer(&layer.manifest, &layer.table);
    Ok(())
}

async fn store(
    layer: &Arc<PartialLayer>,
    path: &Path,
    file: FileDigest,
    known: BlockIndex,
) -> Result<u64> {
    let space = SpaceName::layer(file.digest);
    let spaces = SpaceTable::new([space.clone()])?;
    let id = spaces.id(&space).context("the layer's space has no number")?;
    let label = format!("layer {}", file.digest);
    let packer = Packer::new(Arc::clone(layer) as Arc<dyn PackTarget>, spaces, label);
    let (entrance, path) = (packer.entrance(), path.to_owned());
    let cut = tokio::task::spawn_blocking(move || Cut::new(known, id, entrance).cut(&path, file));
    let cut = cut.await.context("internal error: read task panicked")?;
    let (table, packs) = match cut {
        Ok(table) => (table, packer.finish().await?),
        Err(error) => return Err(packer.why(error, Duration::ZERO).await),
    };
    let (mut table, owners) = table.finish();
    place(&mut table, &packs)?;
    let (bytes, info) = table.encode(file.form)?;
    let stored: u64 = packs.iter().map(|pack| pack.info.len.0).sum::<u64>() + bytes.len() as u64;
    let manifest = LayerManifest::new(file.digest, file.len, packs, owners, info)
        .with_form(file.form)
        .encode()?;
    put(layer, TABLE_FILE, bytes).await?;
    put(layer, MANIFEST_FILE, manifest).await?;
    Ok(stored)
}

async fn put(layer: &PartialLayer, name: &str, bytes: Vec<u8>) -> Result<()> {
    let name: PackName = name.parse().context("a layer's file name")?;
    layer.put_file(&name, vec![Bytes::from(bytes)]).await?;
    Ok(())
}

/// The n-th own block is the n-th frame over all packs: the packer keeps the order.
fn place(table: &mut BlockTable, packs: &[PackRecord]) -> Result<()> {
    let ends = packs.iter().scan(0, |end: &mut u64, record| {
        *end += u64::from(record.info.frames);
        Some(*end)
    });
    let ends: Vec<u64> = ends.collect();
    table.place_own(|ordinal| {
        let pack = ends.partition_point(|end| *end <= u64::from(ordinal));
        let first = pack.checked_sub(1).map_or(0, |before| ends[before]);
        let frame = u64::from(ordinal) - first;
        let place = (PackNo(u32::try_from(pack).ok()?), FrameNo(u32::try_from(frame).ok()?));
        (pack < ends.len()).then_some(place)
    })?;
    Ok(())
}

/// Reads a file once, without its holes, and sends what is new to the packer. Runs on a thread that
/// may block.
struct Cut {
    known: BlockIndex,
    space: SpaceId,
    entrance: Entrance,
    table: BlockTableBuilder,
    /// Blocks sent, by content. Not all of a very large file: see [`MOST_KNOWN_BLOCKS`].
    own: HashMap<ContentDigest, u32>,
    sent: u32,
}

impl Cut {
    fn new(known: BlockIndex, space: SpaceId, entrance: Entrance) -> Self {
        Self {
            known,
            space,
            entrance,
            table: BlockTableBuilder::new(),
            own: HashMap::new(),
            sent: 0,
        }
    }

    /// Own blocks are in the table by their order: see [`place`]. Checks that the content is still
    /// what its digest says.
    fn cut(mut self, path: &Path, file: FileDigest) -> Result<BlockTableBuilder> {
        let input = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let about = || format!("reading {}", path.display());
        let which = if file.form == DigestForm::Content { Blocks::All } else { Blocks::NoHoles };
        let mut content = ContentHasher::new();
        let mut blocks = BlocksHasher::new(file.len);
        image::each_block::<anyhow::Error>(&input, file.len.0, which, |number, block| {
            if file.form == DigestForm::Content {
                content.update(block);
            }
            if !is_zero(block) {
                blocks.block(number, &self.push(number, image::padded(block))?);
            }
            Ok(())
        })
        .with_context(about)?;
        self.table.push_zeros(file.len.0.div_ceil(BLOCK_SIZE as u64) - self.table.blocks())?;
        let found =
            if file.form == DigestForm::Content { content.finish() } else { blocks.finish() };
        if found != file.digest || input.metadata().with_context(about)?.len() != file.len.0 {
            bail!("{} changed while it was stored; a layer must be read-only", path.display());
        }
        Ok(self.table)
    }

    fn push(&mut self, number: u64, block: Vec<u8>) -> Result<ContentDigest> {
        self.table.push_zeros(number - self.table.blocks())?;
        let digest = ContentDigest::of(&block);
        if let Some(home) = self.known.find(&digest) {
            self.table.push_shared(digest, home)?;
            return Ok(digest);
        }
        let ordinal = self.own.get(&digest).copied().unwrap_or(self.sent);
        if ordinal == self.sent {
            if self.own.len() < MOST_KNOWN_BLOCKS {
                self.own.insert(digest, ordinal);
            }
            self.sent += 1;
            self.entrance.send(&mut vec![frame(self.space, number, block)])?;
        }
        self.table.push_own(digest, PackNo(0), FrameNo(ordinal))?;
        Ok(digest)
    }
}

fn frame(space: SpaceId, block: u64, raw: Vec<u8>) -> PackJob {
    let first = block * BLOCK_PAGES as u64;
    let pages = raw.chunks_exact(PAGE_SIZE).enumerate();
    let pages = pages
        .map(|(number, page)| (PageIndex(first + number as u64), PageDigest::of(page)))
        .collect();
    PackJob::Data(FrameJob { space, pages, raw })
}
