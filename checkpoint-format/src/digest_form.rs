//! What the digest of a layer is taken of.

use serde::{Deserialize, Serialize};

use crate::digest::{ContentDigest, ContentHasher};
use crate::units::ByteLen;

/// What the digest of an image file is taken of, which is also its layer's name.
///
/// A file's zeros cost as much to digest as its data, and a sparse image may have terabytes of
/// them. So a file with many zeros has the digest of its blocks, zeros left out. Either form
/// depends on the content alone and not on which zeros are holes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum DigestForm {
    /// All bytes of the file: layers of version 1.
    #[default]
    Content,
    /// The length, then number and digest of each block that is not zero: layers of version 2.
    Blocks,
}

impl DigestForm {
    pub(crate) fn is_content(&self) -> bool {
        *self == Self::Content
    }
}

/// Makes the digest of a file's blocks, which come in ascending order.
#[derive(Clone, Debug)]
pub struct BlocksHasher(ContentHasher);

impl BlocksHasher {
    /// For a file of this length.
    pub fn new(len: ByteLen) -> Self {
        let mut hasher = ContentHasher::new();
        // Not the beginning of any image that a digest of content is taken of by chance.
        hasher.update(
            b"stillpoint-layer 2: length, then number and digest of each block that is not zero\n",
        );
        hasher.update(&len.0.to_le_bytes());
        Self(hasher)
    }

    /// A block that is not zero: its number, and the digest of its content padded with zeros to
    /// whole pages.
    pub fn block(&mut self, number: u64, digest: &ContentDigest) {
        self.0.update(&number.to_le_bytes()).update(&digest.0);
    }

    /// The digest of all blocks so far.
    pub fn finish(&self) -> ContentDigest {
        self.0.finish()
    }
}
