//! Finds a block by its content among the layers that the store has.

use std::collections::HashMap;

use super::{BlockTable, LayerManifest, OwnerIndex};
use crate::digest::ContentDigest;
use crate::units::{FrameNo, PackNo};

/// The one place where a block's content is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockHome {
    /// The layer whose pack has the block.
    pub layer: ContentDigest,
    /// The number of the pack in that layer.
    pub pack: PackNo,
    /// The number of the frame in that pack.
    pub frame: FrameNo,
}

/// The blocks of existing layers by content.
///
/// Only blocks in a layer's *own* packs are indexed, so a new layer refers to the pack that has the
/// content and never to another reference: there are no chains to follow, and a layer's `owners`
/// are all that must be kept for it.
#[derive(Clone, Debug, Default)]
pub struct BlockIndex {
    homes: HashMap<ContentDigest, BlockHome>,
}

impl BlockIndex {
    /// An empty index.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the layer's own blocks. Content that is already known keeps its place.
    pub fn add_layer(&mut self, manifest: &LayerManifest, table: &BlockTable) {
        let own = table.stored().filter(|(_, at)| at.owner == OwnerIndex::OWN);
        for (_, at) in own {
            self.homes.entry(at.digest).or_insert(BlockHome {
                layer: manifest.digest,
                pack: at.pack,
                frame: at.frame,
            });
        }
    }

    /// Where a block with that digest is stored.
    pub fn find(&self, digest: &ContentDigest) -> Option<BlockHome> {
        self.homes.get(digest).copied()
    }

    /// Number of different blocks.
    pub fn len(&self) -> usize {
        self.homes.len()
    }

    /// Whether no block is known.
    pub fn is_empty(&self) -> bool {
        self.homes.is_empty()
    }
}
