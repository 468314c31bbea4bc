//! Layers: immutable disk images, stored once for all VMs.
//!
//! A layer is cut into blocks of 64 KiB. Each block that is not zero is one frame, in a pack of
//! this layer or of another one that already had the same block. Two files describe it: the
//! [`LayerManifest`], text like a checkpoint's manifest, and the [`BlockTable`], binary because a
//! large image has millions of blocks. The manifest holds the table's checksum, so it is written
//! last.
//!
//! Version 1 is named by the digest of the whole file; version 2, for files with many zeros, by
//! that of its blocks ([`DigestForm`]), and its table does not mention zeros.

mod index;
mod table;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::digest::ContentDigest;
use crate::digest_form::DigestForm;
use crate::envelope::{Envelope, EnvelopeError};
use crate::manifest::{Check, ManifestError, PackRecord, at_most, check_packs, pack_list};
use crate::units::{ByteLen, PAGE_SIZE, as_index, count};

pub use index::{BlockHome, BlockIndex};
pub use table::{
    BlockRef, BlockTable, BlockTableBuilder, BlockTableInfo, MAX_LAYER_BLOCKS, MAX_STORED_BLOCKS,
    OwnerIndex,
};

/// The newest version that this program writes and reads, for [`DigestForm::Blocks`];
/// [`DigestForm::Content`] has version 1.
pub const LAYER_VERSION: u32 = 2;
/// Longest body of a layer's manifest.
pub const MAX_LAYER_BODY: usize = 64 << 20;
/// Most other layers whose blocks a layer may use.
pub const MAX_LAYER_OWNERS: usize = 1 << 16;
/// Pages in a block.
pub const BLOCK_PAGES: usize = 16;
/// Bytes in a block; the last one of a layer may be shorter.
pub const BLOCK_SIZE: usize = BLOCK_PAGES * PAGE_SIZE;

const ENVELOPE: Envelope =
    Envelope { kind: "stillpoint-layer", version: LAYER_VERSION, max_body: MAX_LAYER_BODY };
const ENVELOPE_1: Envelope = Envelope { version: 1, ..ENVELOPE };
const CHECK: Check = Check("layer manifest");

/// A layer that can't be read, or must not be written. The caller adds the file's name.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum LayerError {
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error(
        "read the block table: it is {found} bytes long, the layer's manifest says {expected}; the file is cut short or of another layer"
    )]
    TableLength { expected: u64, found: u64 },
    #[error(
        "verify the block table: digest is {found}, expected {expected}; the bytes are damaged, read them again from another replica"
    )]
    TableDigest { expected: ContentDigest, found: ContentDigest },
    #[error(
        "read the block table: it begins with {found:02x?}; this is no block table of the manifest's version"
    )]
    TableMagic { found: [u8; 8] },
    #[error("decompress the block table; its digest is right, so it was written wrongly")]
    Decompress { source: std::io::Error },
    #[error("compress the block table")]
    Compress { source: std::io::Error },
    #[error(
        "parse the block table: {what} is {found}, expected {expected}; it was written wrongly"
    )]
    TableCount { what: &'static str, expected: u64, found: u64 },
    #[error(
        "verify the layer: the digest of its blocks is {found}, its name is {expected}; it was written wrongly or by another program"
    )]
    BlocksDigest { expected: ContentDigest, found: ContentDigest },
    #[error("check block {block} of the layer: {problem}; it was written wrongly")]
    BadBlock { block: u64, problem: &'static str },
    #[error(
        "describe a layer: {count} {what}, the limit is {limit}; the image is too large to be one layer"
    )]
    TooMany { what: &'static str, count: u64, limit: u64 },
}

impl LayerError {
    /// Whether reading the same bytes again, best from another replica, may help.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Manifest(error) => error.is_retryable(),
            Self::TableLength { .. } | Self::TableDigest { .. } => true,
            _ => false,
        }
    }
}

/// What a layer is. See the comment on [`Manifest`](crate::Manifest) for how fields are added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerManifest {
    /// What `digest` is taken of. Saved as the file's version.
    #[serde(skip)]
    pub form: DigestForm,
    /// Of the image file; also the layer's name in the store.
    pub digest: ContentDigest,
    /// Exact length of the image file. The last block is padded with zeros to whole pages.
    pub len: ByteLen,
    /// Bytes of a block; [`BLOCK_SIZE`].
    pub block_size: u32,
    /// The layer's own packs: one frame a block, in the space
    /// [`SpaceName::layer`](crate::SpaceName::layer).
    #[serde(deserialize_with = "pack_list")]
    pub packs: Vec<PackRecord>,
    /// Other layers that hold some of the blocks; must stay in the store while this one does.
    #[serde(deserialize_with = "at_most::<_, _, MAX_LAYER_OWNERS>")]
    pub owners: Vec<ContentDigest>,
    /// Length and digest of the table of blocks.
    pub table: BlockTableInfo,
}

impl LayerManifest {
    /// A manifest of this version.
    pub fn new(
        digest: ContentDigest,
        len: ByteLen,
        packs: Vec<PackRecord>,
        owners: Vec<ContentDigest>,
        table: BlockTableInfo,
    ) -> Self {
        Self {
            form: DigestForm::Content,
            digest,
            len,
            block_size: count(BLOCK_SIZE),
            packs,
            owners,
            table,
        }
    }

    /// With a digest of another form.
    pub fn with_form(self, form: DigestForm) -> Self {
        Self { form, ..self }
    }

    /// Blocks of a layer of this length.
    pub fn blocks(&self) -> u64 {
        self.len.0.div_ceil(BLOCK_SIZE as u64)
    }

    /// Pages in the frame of a block: fewer than [`BLOCK_PAGES`] only in the last.
    pub fn block_pages(&self, block: u64) -> usize {
        let start = block.saturating_mul(BLOCK_SIZE as u64);
        let rest = self.len.0.saturating_sub(start).min(BLOCK_SIZE as u64);
        as_index(rest.div_ceil(PAGE_SIZE as u64))
    }

    /// The sealed bytes of the manifest.
    ///
    /// # Errors
    /// When a field is beyond its limit.
    pub fn encode(&self) -> Result<Vec<u8>, LayerError> {
        self.validate()?;
        let mut body = serde_json::to_vec_pretty(self).map_err(json_error)?;
        body.push(b'\n');
        let envelope = match self.form {
            DigestForm::Content => ENVELOPE_1,
            DigestForm::Blocks => ENVELOPE,
        };
        let file = envelope.wrap(&body).map_err(ManifestError::from)?;
        Ok(file)
    }

    /// Verifies the file's digest, reads it, and checks that its parts fit one another.
    ///
    /// # Errors
    /// When the bytes are damaged, of another version, or a field is beyond its limit.
    pub fn parse(bytes: &[u8]) -> Result<Self, LayerError> {
        let (form, body) = match ENVELOPE.unwrap(bytes) {
            Err(EnvelopeError::UnknownVersion { found: 1, .. }) => {
                (DigestForm::Content, ENVELOPE_1.unwrap(bytes))
            }
            other => (DigestForm::Blocks, other),
        };
        let manifest: Self =
            serde_json::from_slice(body.map_err(ManifestError::from)?).map_err(json_error)?;
        let manifest = manifest.with_form(form);
        manifest.validate()?;
        Ok(manifest)
    }

    fn validate(&self) -> Result<(), ManifestError> {
        let size = self.block_size as usize == BLOCK_SIZE;
        CHECK.that(size, "block_size", "not 65536")?;
        let most = table::most_blocks(self.form);
        let blocks = self.blocks() <= most && self.table.blocks == self.blocks();
        CHECK.that(blocks, "table.blocks", "another number than the length gives, or too high")?;
        CHECK.count("owners", self.owners.len(), MAX_LAYER_OWNERS)?;
        let foreign = !self.owners.contains(&self.digest);
        CHECK.that(foreign, "owners", "holding the layer itself")?;
        CHECK.distinct("owners", &self.owners)?;
        self.table.check(self.form).map_err(|problem| ManifestError::Invalid {
            what: CHECK.what(),
            field: "table".into(),
            problem,
        })?;
        check_packs(CHECK, &self.packs)
    }

    /// Verifies and reads the block table that belongs to this manifest.
    ///
    /// # Errors
    /// When the bytes are damaged, or the table contradicts this manifest.
    pub fn parse_table(&self, bytes: &[u8]) -> Result<BlockTable, LayerError> {
        BlockTable::parse(self, bytes)
    }
}

fn json_error(source: serde_json::Error) -> ManifestError {
    ManifestError::Json { what: CHECK.what(), source }
}
