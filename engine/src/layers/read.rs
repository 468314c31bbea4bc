//! A layer as the store has it, read in batches of neighbouring blocks.

use super::{MANIFEST_FILE, TABLE_FILE};
use anyhow::{Context, Result};
use bytes::Bytes;
use checkpoint_format::{
    BlockRef, BlockTable, ByteLen, ContentDigest, FrameEntry, FrameNo, LayerManifest,
    MAX_LAYER_BODY, PAGE_SIZE, PackIndex, PackName, PackNo, as_index,
};
use checkpoint_store::Repository;
use futures::{Stream, StreamExt};
use std::collections::VecDeque;
use std::hash::Hash;
use std::sync::Arc;
use vm::error::damaged;

/// A manifest's header line comes on top of its body.
const MAX_MANIFEST_FILE: u64 = MAX_LAYER_BODY as u64 + 4096;
/// Neighbouring blocks are read in one go up to this length as stored, and this content.
const BATCH_BYTES: u64 = 4 << 20;
const BATCH_RAW_BYTES: u64 = 16 << 20;
/// A gap between two blocks that is cheaper to read than to skip.
const GAP_BYTES: u64 = 256 << 10;
/// Batches being read or decoded at once: with their content 80 MiB at most.
const READS: usize = 4;
/// Pack indexes and manifests of other layers kept: blocks follow one another, so the last few are
/// the next.
const KEPT: usize = 8;

pub(crate) struct StoredLayer {
    repository: Repository,
    pub manifest: Arc<LayerManifest>,
    pub table: Arc<BlockTable>,
}

/// Blocks that lie next to each other in one pack.
struct Batch {
    owner: ContentDigest,
    pack: PackName,
    start: u64,
    end: u64,
    raw_bytes: u64,
    blocks: Vec<BatchBlock>,
}

struct BatchBlock {
    number: u64,
    entry: FrameEntry,
    digest: ContentDigest,
}

/// Where a block's bytes are, and its content, exactly as long as the layer has bytes there.
pub(crate) type Content = (u64, Bytes);

impl StoredLayer {
    pub(crate) async fn open(repository: &Repository, digest: &ContentDigest) -> Result<Self> {
        let manifest = read_manifest(repository, digest).await?;
        Self::with_manifest(repository, manifest).await
    }

    pub(crate) async fn with_manifest(
        repository: &Repository,
        manifest: LayerManifest,
    ) -> Result<Self> {
        let about = || format!("the block table of layer {}", manifest.digest);
        let bytes = repository
            .read_layer_file(&manifest.digest, TABLE_FILE, manifest.table.len.0)
            .await
            .with_context(about)?;
        let table = manifest.parse_table(&bytes).with_context(about)?;
        Ok(Self {
            repository: repository.clone(),
            manifest: Arc::new(manifest),
            table: Arc::new(table),
        })
    }

    pub(crate) fn len(&self) -> ByteLen {
        self.manifest.len
    }

    /// The blocks that are not zero, in order, each checked against its digest, a few reads ahead.
    pub(crate) fn blocks(&self) -> impl Stream<Item = Result<Vec<Content>>> + Send + use<> {
        let plan = Plan {
            repository: self.repository.clone(),
            manifest: Arc::clone(&self.manifest),
            table: Arc::clone(&self.table),
            next: 0,
            owners: Kept::default(),
            indexes: Kept::default(),
        };
        let (repository, manifest) = (self.repository.clone(), Arc::clone(&self.manifest));
        let batches = futures::stream::unfold(Some(plan), |plan| async {
            let mut plan = plan?;
            match plan.batch().await {
                Ok(Some(batch)) => Some((Ok(batch), Some(plan))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        });
        batches
            .map(move |batch| load(repository.clone(), Arc::clone(&manifest), batch))
            .buffered(READS)
    }
}

/// What is read next.
struct Plan {
    repository: Repository,
    manifest: Arc<LayerManifest>,
    table: Arc<BlockTable>,
    next: usize,
    owners: Kept<ContentDigest, LayerManifest>,
    indexes: Kept<(ContentDigest, PackNo), (PackName, PackIndex)>,
}

impl Plan {
    async fn batch(&mut self) -> Result<Option<Batch>> {
        let mut batch: Option<Batch> = None;
        while let Some((number, at)) = self.table.get(self.next) {
            let about = || format!("block {number} of layer {}", self.manifest.digest);
            let owner = self
                .manifest
                .owner(at.owner)
                .context("the block's owner is not in the layer's list")
                .with_context(about)?;
            let (pack, entry) = self
                .locate(owner, &at)
                .await
                .with_context(|| format!("block {number} of layer {owner}"))?;
            let (range, raw) = (entry.byte_range(), entry.raw_len() as u64);
            let block = BatchBlock { number, entry, digest: at.digest };
            match &mut batch {
                None => {
                    batch = Some(Batch {
                        owner,
                        pack,
                        start: range.start,
                        end: range.end,
                        raw_bytes: raw,
                        blocks: vec![block],
                    });
                }
                Some(open) if open.takes(&owner, &pack, range.start, range.end, raw) => {
                    open.end = range.end;
                    open.raw_bytes += raw;
                    open.blocks.push(block);
                }
                Some(_) => break,
            }
            self.next += 1;
        }
        Ok(batch)
    }

    async fn locate(
        &mut self,
        owner: ContentDigest,
        at: &BlockRef,
    ) -> Result<(PackName, FrameEntry)> {
        let index = self.index(owner, at.pack).await?;
        let (name, index) = index.as_ref();
        let missing = || damaged(format!("layer {owner}/{name} has no frame {}", at.frame));
        Ok((name.clone(), *index.frame(FrameNo(at.frame.0)).ok_or_else(missing)?))
    }

    async fn index(
        &mut self,
        owner: ContentDigest,
        pack: PackNo,
    ) -> Result<Arc<(PackName, PackIndex)>> {
        if let Some(known) = self.indexes.get(&(owner, pack)) {
            return Ok(known);
        }
        let manifest = self.owner(owner).await?;
        let missing = || damaged(format!("layer {owner} has no pack {pack}"));
        let record = manifest.packs.get(pack.as_usize()).ok_or_else(missing)?;
        let about = || format!("the index of layer {owner}/{}", record.name);
        let range = record.info.footer().trailer_range();
        let read = self.repository.read_layer_range(
            &owner,
            record.name.as_str(),
            range.start,
            range.end - range.start,
        );
        let index =
            record.info.parse_index(&read.await.with_context(about)?).with_context(about)?;
        Ok(self.indexes.keep((owner, pack), (record.name.clone(), index)))
    }

    async fn owner(&mut self, owner: ContentDigest) -> Result<Arc<LayerManifest>> {
        if owner == self.manifest.digest {
            return Ok(Arc::clone(&self.manifest));
        }
        match self.owners.get(&owner) {
            Some(known) => Ok(known),
            None => Ok(self.owners.keep(owner, read_manifest(&self.repository, &owner).await?)),
        }
    }
}

impl Batch {
    fn takes(
        &self,
        owner: &ContentDigest,
        pack: &PackName,
        start: u64,
        end: u64,
        raw: u64,
    ) -> bool {
        let near = (self.end..=self.end.saturating_add(GAP_BYTES)).contains(&start);
        let small = end.saturating_sub(self.start) <= BATCH_BYTES
            && self.raw_bytes + raw <= BATCH_RAW_BYTES;
        self.owner == *owner && self.pack == *pack && near && small
    }
}

async fn load(
    repository: Repository,
    manifest: Arc<LayerManifest>,
    batch: Result<Batch>,
) -> Result<Vec<Content>> {
    let batch = batch?;
    let about = format!("layer {}/{}", batch.owner, batch.pack);
    let read = repository.read_layer_range(
        &batch.owner,
        batch.pack.as_str(),
        batch.start,
        batch.end - batch.start,
    );
    let bytes = read.await.with_context(|| about.clone())?;
    let decode = move || decode(&manifest, &batch, &bytes);
    tokio::task::spawn_blocking(decode)
        .await
        .context("internal error: decode task panicked")?
        .with_context(|| about)
}

fn decode(manifest: &LayerManifest, batch: &Batch, bytes: &[u8]) -> Result<Vec<Content>> {
    let decoded = batch.blocks.iter().map(|block| {
        let about = || format!("block {} of layer {}", block.number, manifest.digest);
        let range = block.entry.byte_range();
        let stored = &bytes[as_index(range.start - batch.start)..as_index(range.end - batch.start)];
        decode_block(manifest, block, stored).with_context(about)
    });
    decoded.collect()
}

fn decode_block(manifest: &LayerManifest, block: &BatchBlock, stored: &[u8]) -> Result<Content> {
    let content = block.entry.decode(stored)?;
    if content.len() != manifest.block_pages(block.number) * PAGE_SIZE {
        return Err(damaged("it is not as long as a block of the layer there"));
    }
    if ContentDigest::of(&content) != block.digest {
        return Err(damaged("its content does not have the digest that the table names"));
    }
    let start = block.number * u64::from(manifest.block_size);
    let len = as_index((manifest.len.0 - start).min(content.len() as u64));
    Ok((start, Bytes::from(content).slice(..len)))
}

/// The last few of something, by key.
struct Kept<K, V>(VecDeque<(K, Arc<V>)>);

impl<K, V> Default for Kept<K, V> {
    fn default() -> Self {
        Self(VecDeque::new())
    }
}

impl<K: Eq + Hash, V> Kept<K, V> {
    fn get(&self, key: &K) -> Option<Arc<V>> {
        let found = self.0.iter().find(|(known, _)| known == key);
        found.map(|(_, value)| Arc::clone(value))
    }

    fn keep(&mut self, key: K, value: V) -> Arc<V> {
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        let value = Arc::new(value);
        self.0.push_back((key, Arc::clone(&value)));
        value
    }
}

pub(super) async fn read_manifest(
    repository: &Repository,
    digest: &ContentDigest,
) -> Result<LayerManifest> {
    let about = || format!("the manifest of layer {digest}");
    let bytes = repository
        .read_layer_file(digest, MANIFEST_FILE, MAX_MANIFEST_FILE)
        .await
        .with_context(about)?;
    let manifest = LayerManifest::parse(&bytes).with_context(about)?;
    if manifest.digest != *digest {
        return Err(damaged(format!("it says that it is {}", manifest.digest))).with_context(about);
    }
    Ok(manifest)
}
