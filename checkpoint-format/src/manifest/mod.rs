//! The manifest: what one checkpoint is, in the form in which it is saved.
//!
//! Written last, so its presence under the committed name means that all it speaks of is there. Its
//! body is JSON, for an operator's eyes and tools; all bulk is in the packs.

mod index;
mod list;
mod record;
mod validate;

use thiserror::Error;

use crate::envelope::{Envelope, EnvelopeError};
use crate::names::SpaceName;
use crate::pack::PackError;
use crate::units::{ByteLen, PageCount};

pub use index::{IndexRecord, MAX_SEGMENTS, SegmentRecord};
pub(crate) use list::{at_most, pack_list};
pub use record::{
    CheckpointKind, DiskRecord, LayerRef, Manifest, PackRecord, Qcow2Record, RamBlockRecord,
    RunState, SpaceRecord, Totals, VmRecord,
};
pub(crate) use validate::{Check, check_packs};
pub use validate::{
    MAX_ARGUMENTS, MAX_BACKING_DEPTH, MAX_CARRIED_RAM, MAX_DISKS, MAX_PACKS, MAX_RAM_BLOCKS,
    MAX_SPACES, MAX_STATE_LEN, MAX_TEXT,
};

/// The newest version that this program reads: the one with an index. It reads version 1, too.
pub const MANIFEST_VERSION: u32 = 2;
/// Longest body of a manifest.
pub const MAX_MANIFEST_BODY: usize = 64 << 20;

const ENVELOPE: Envelope = Envelope {
    kind: "stillpoint-manifest",
    version: MANIFEST_VERSION,
    max_body: MAX_MANIFEST_BODY,
};

/// Of a manifest without an index.
const ENVELOPE_1: Envelope = Envelope { version: 1, ..ENVELOPE };

/// A manifest that can't be read, or must not be written. The caller adds the file's name.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum ManifestError {
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    #[error(
        "parse the body of the {what}; its digest is right, so another program wrote it or this one has a bug"
    )]
    Json { what: &'static str, source: serde_json::Error },
    #[error("check the {what}: {count} {list}, the limit is {limit}; split the VM or remove some")]
    TooMany { what: &'static str, list: &'static str, count: usize, limit: usize },
    #[error("check the {what}: {field} is {problem}; what it describes can't be restored")]
    Invalid { what: &'static str, field: String, problem: &'static str },
    #[error("check the {what}: the record of pack {pack} is wrong")]
    Pack { what: &'static str, pack: String, source: Box<PackError> },
}

impl ManifestError {
    /// Whether reading the same bytes again, best from another replica, may help.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Envelope(error) if error.is_retryable())
    }
}

impl Manifest {
    /// The bytes of the file; with an index, those in front of the checkpoint's own segment.
    /// Refuses what [`parse`](Self::parse) would refuse: better no checkpoint than one that is
    /// found unreadable when it is needed.
    ///
    /// # Errors
    /// When a field is beyond its limit or contradicts another.
    pub fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        self.validate()?;
        let mut body = serde_json::to_vec_pretty(self).map_err(json_error)?;
        body.push(b'\n');
        let envelope = if self.index.is_some() { ENVELOPE } else { ENVELOPE_1 };
        Ok(envelope.wrap(&body)?)
    }

    /// Verifies the body's digest, reads it, and checks that its parts fit one another. What stands
    /// behind the body of a version with an index is not looked at, and need not be there.
    ///
    /// # Errors
    /// When the bytes are damaged, of another version, or a field is beyond its limit or
    /// contradicts another.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let is_first = ENVELOPE.is_version(1, bytes);
        let body = if is_first { ENVELOPE_1.unwrap(bytes) } else { ENVELOPE.unwrap_front(bytes) };
        let mut manifest: Self = serde_json::from_slice(body?).map_err(json_error)?;
        if is_first {
            manifest.index = None;
        } else {
            let has_index = manifest.index.is_some();
            validate::MANIFEST.that(has_index, "index", "missing though the version has one")?;
        }
        manifest.validate()?;
        Ok(manifest)
    }

    /// Bytes of header line and body, which are what [`parse`](Self::parse) needs of a file that
    /// has more: one with an index. `None`: it needs the whole file, which is of version 1 or
    /// nothing that is known. The first [`MAX_HEADER_LINE`](crate::MAX_HEADER_LINE) bytes are
    /// enough to tell.
    pub fn head_len(start: &[u8]) -> Option<ByteLen> {
        ENVELOPE.front_len(start).ok().map(ByteLen)
    }

    /// The sizes of all spaces.
    pub fn space_sizes(&self) -> Vec<(SpaceName, PageCount)> {
        self.spaces.iter().map(|space| (space.name.clone(), space.pages())).collect()
    }
}

fn json_error(source: serde_json::Error) -> ManifestError {
    ManifestError::Json { what: validate::MANIFEST.what(), source }
}
