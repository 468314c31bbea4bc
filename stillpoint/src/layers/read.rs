//! A layer as the store has it.

use super::{MANIFEST_FILE, TABLE_FILE};
use crate::exit::damaged;
use anyhow::{Context, Result};
use checkpoint_format::{
    Block, BlockRef, BlockTable, ByteLen, ContentDigest, FrameEntry, FrameNo, LayerManifest, MAX_LAYER_BODY, PackIndex, PackNo,
};
use checkpoint_store::Repository;
use std::collections::HashMap;

/// A manifest's header line comes on top of its body.
const MAX_MANIFEST_FILE: u64 = MAX_LAYER_BODY as u64 + 4096;

pub struct StoredLayer {
    repository: Repository,
    pub manifest: LayerManifest,
    pub table: BlockTable,
    /// Manifests of the layers in whose packs blocks of this one are, itself included.
    owners: HashMap<ContentDigest, LayerManifest>,
    indexes: HashMap<(ContentDigest, PackNo), PackIndex>,
}

impl StoredLayer {
    pub async fn open(repository: &Repository, digest: &ContentDigest) -> Result<Self> {
        let manifest = read_manifest(repository, digest).await?;
        let about = || format!("the block table of layer {digest}");
        let bytes = repository.read_layer_file(digest, TABLE_FILE, manifest.table.len.0).await.with_context(about)?;
        let table = manifest.parse_table(&bytes).with_context(about)?;
        let owners = HashMap::from([(*digest, manifest.clone())]);
        Ok(Self { repository: repository.clone(), manifest, table, owners, indexes: HashMap::new() })
    }

    /// The content of a block, checked against its digest: exactly as long as the layer has bytes there.
    pub async fn read_block(&mut self, number: u64, block: &Block) -> Result<Option<Vec<u8>>> {
        let Block::Stored(block) = block else { return Ok(None) };
        let digest = self.manifest.digest;
        let about = || format!("block {number} of layer {digest}");
        let mut bytes = self.read_frame(block).await.with_context(about)?;
        if ContentDigest::of(&bytes) != block.digest {
            return Err(damaged("its content does not have the digest that the table names")).with_context(about);
        }
        let start = number * u64::from(self.manifest.block_size);
        bytes.truncate(self.manifest.len.0.saturating_sub(start).min(bytes.len() as u64) as usize);
        Ok(Some(bytes))
    }

    async fn read_frame(&mut self, block: &BlockRef) -> Result<Vec<u8>> {
        let owner = self.manifest.owner(block.owner).context("the block's owner is not in the layer's list")?;
        let (name, entry) = self.locate(owner, block.pack, block.frame).await?;
        let range = entry.byte_range();
        let bytes = self.repository.read_layer_range(&owner, &name, range.start, range.end - range.start).await?;
        entry.decode(&bytes).with_context(|| format!("frame {} of layer {owner}/{name}", block.frame))
    }

    async fn locate(&mut self, owner: ContentDigest, pack: PackNo, frame: FrameNo) -> Result<(String, FrameEntry)> {
        if !self.owners.contains_key(&owner) {
            self.owners.insert(owner, read_manifest(&self.repository, &owner).await?);
        }
        let record = self.owners[&owner].packs.get(pack.0 as usize);
        let record = record.with_context(|| format!("layer {owner} has no pack {pack}"))?.clone();
        if !self.indexes.contains_key(&(owner, pack)) {
            let about = || format!("the index of layer {owner}/{}", record.name);
            let range = record.info.footer().trailer_range();
            let read = self.repository.read_layer_range(&owner, record.name.as_str(), range.start, range.end - range.start);
            let index = record.info.parse_index(&read.await.with_context(about)?).with_context(about)?;
            self.indexes.insert((owner, pack), index);
        }
        let entry = self.indexes[&(owner, pack)].frame(frame);
        let entry = entry.with_context(|| format!("layer {owner}/{} has no frame {frame}", record.name))?;
        Ok((record.name.to_string(), *entry))
    }

    pub fn len(&self) -> ByteLen {
        self.manifest.len
    }
}

pub async fn read_manifest(repository: &Repository, digest: &ContentDigest) -> Result<LayerManifest> {
    let about = || format!("the manifest of layer {digest}");
    let bytes = repository.read_layer_file(digest, MANIFEST_FILE, MAX_MANIFEST_FILE).await.with_context(about)?;
    let manifest = LayerManifest::parse(&bytes).with_context(about)?;
    if manifest.digest != *digest {
        return Err(damaged(format!("it says that it is {}", manifest.digest))).with_context(about);
    }
    Ok(manifest)
}
