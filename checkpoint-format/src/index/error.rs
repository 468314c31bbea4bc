//! What can be wrong with a segment of the index.

use std::fmt;
use std::io;

use thiserror::Error;

use crate::digest::Checksum;
use crate::names::NameError;
use crate::wire::Short;

/// The piece of a segment that an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IndexPart {
    /// The list of spaces, packs and blocks.
    Directory,
    /// The block of this number.
    Block(usize),
}

impl fmt::Display for IndexPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory => f.write_str("index directory"),
            Self::Block(number) => write!(f, "index block {number}"),
        }
    }
}

/// A segment of the index that can't be read, or must not be written. The caller adds the file's
/// name.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum IndexError {
    #[error("read the {part}: got {found} bytes, expected {expected}; the file is cut short")]
    WrongLength { part: IndexPart, expected: u64, found: u64 },
    #[error(
        "verify the {part}: checksum is {found}, expected {expected}; the bytes are damaged, \
         read them again from another replica"
    )]
    ChecksumMismatch { part: IndexPart, expected: Checksum, found: Checksum },
    #[error(
        "check the {part}: {what} is {found}, the limit is {limit}; the file is damaged or made by \
         something else"
    )]
    OverLimit { part: IndexPart, what: &'static str, found: u64, limit: u64 },
    #[error(
        "parse the {part}: it ends before the {wanted} bytes expected at byte {at}; it was written \
         wrongly"
    )]
    Truncated { part: IndexPart, at: u64, wanted: u64 },
    #[error("parse the {part}: entry {entry} of the {table}: {problem}; it was written wrongly")]
    BadEntry { part: IndexPart, table: &'static str, entry: usize, problem: &'static str },
    #[error("parse the {part}: entry {entry} of the {table} has an unusable name")]
    BadName { part: IndexPart, table: &'static str, entry: usize, source: Box<NameError> },
    #[error("decompress the {part}; its checksum is right, so it was written wrongly")]
    Decompress { part: IndexPart, source: io::Error },
    #[error("compress the {part}")]
    Compress { part: IndexPart, source: io::Error },
    #[error("write an index segment: {problem}")]
    Misuse { problem: &'static str },
}

impl IndexError {
    /// Whether reading the same bytes again, best from another replica, may help.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::ChecksumMismatch { .. } | Self::WrongLength { .. })
    }

    pub(super) fn short(part: IndexPart) -> impl Fn(Short) -> Self {
        move |short| Self::Truncated { part, at: short.at as u64, wanted: short.wanted as u64 }
    }
}

/// Compares a number that was read with its limit.
pub(super) fn at_most(
    part: IndexPart,
    what: &'static str,
    found: u64,
    limit: u64,
) -> Result<(), IndexError> {
    if found <= limit {
        return Ok(());
    }
    Err(IndexError::OverLimit { part, what, found, limit })
}

/// The bytes of a part as they were before compression, once length and checksum are right.
pub(super) fn verified(
    part: IndexPart,
    stored: &[u8],
    expected: (u32, u32, Checksum),
) -> Result<Vec<u8>, IndexError> {
    let (len, raw_len, checksum) = expected;
    if stored.len() != len as usize {
        let (expected, found) = (len.into(), stored.len() as u64);
        return Err(IndexError::WrongLength { part, expected, found });
    }
    let found = Checksum::of(stored);
    if found != checksum {
        return Err(IndexError::ChecksumMismatch { part, expected: checksum, found });
    }
    let raw = crate::pack::decompress_whole(stored, raw_len as usize)
        .map_err(|source| IndexError::Decompress { part, source })?;
    let (expected, found) = (raw_len.into(), raw.len() as u64);
    if found != expected {
        return Err(IndexError::WrongLength { part, expected, found });
    }
    Ok(raw)
}
