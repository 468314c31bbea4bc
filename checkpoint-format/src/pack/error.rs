//! What can be wrong with a pack: on the way in ([`PackError`]) and on the way out
//! ([`EncodeError`]).

use std::fmt;
use std::io;

use thiserror::Error;

use crate::digest::Checksum;
use crate::names::{NameError, SpaceName};
use crate::units::{ByteOffset, PageIndex};
use crate::wire::Short;

/// The piece of a pack that an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackPart {
    /// The first bytes, with the pack's ID.
    Header,
    /// The last bytes, which say where the trailer is.
    Footer,
    /// The index of frames and page runs.
    Trailer,
    /// The frame that begins at this byte of the file.
    Frame(ByteOffset),
    /// The record about the pack in the manifest.
    Info,
}

impl fmt::Display for PackPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => f.write_str("pack header"),
            Self::Footer => f.write_str("pack footer"),
            Self::Trailer => f.write_str("pack trailer"),
            Self::Frame(offset) => write!(f, "frame at byte {offset} of the pack"),
            Self::Info => f.write_str("pack record of the manifest"),
        }
    }
}

/// A pack that can't be read. The caller adds the file's name.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum PackError {
    #[error(
        "read the {part}: it begins with {found:02x?} where {expected:02x?} is expected; this is no pack file, or its start is overwritten"
    )]
    WrongMagic { part: PackPart, expected: [u8; 8], found: [u8; 8] },
    #[error(
        "read the {part}: it has format version {found}, this program reads version {supported}; use a newer program"
    )]
    UnknownVersion { part: PackPart, found: u32, supported: u32 },
    #[error(
        "read the {part}: got {found} bytes, expected {expected}; the file is cut short or its index is wrong"
    )]
    WrongLength { part: PackPart, expected: u64, found: u64 },
    #[error(
        "verify the {part}: checksum is {found}, expected {expected}; the bytes are damaged, read them again from another replica"
    )]
    ChecksumMismatch { part: PackPart, expected: Checksum, found: Checksum },
    #[error(
        "check the {part}: {what} is {found}, the limit is {limit}; the file is damaged or made by something else"
    )]
    OverLimit { part: PackPart, what: &'static str, found: u64, limit: u64 },
    #[error(
        "check the {part}: {what} is {found}, expected {expected}; the parts of this pack don't belong together"
    )]
    Contradiction { part: PackPart, what: &'static str, expected: u64, found: u64 },
    #[error(
        "check the {part}: it is of pack {found}, expected pack {expected}; one file took the place of another"
    )]
    WrongPack { part: PackPart, expected: super::PackId, found: super::PackId },
    #[error(
        "parse the {part}: it ends before the {wanted} bytes expected at byte {at}; it was written wrongly"
    )]
    Truncated { part: PackPart, at: u64, wanted: u64 },
    #[error("parse the {part}: entry {entry} of the {table}: {problem}; it was written wrongly")]
    BadEntry { part: PackPart, table: &'static str, entry: u64, problem: &'static str },
    #[error("parse the {part}: space {entry} has an unusable name; it was written wrongly")]
    BadSpaceName { part: PackPart, entry: u64, source: Box<NameError> },
    #[error("decompress the {part}; its checksum is right, so it was written wrongly")]
    Decompress { part: PackPart, source: io::Error },
}

impl PackError {
    /// Whether reading the same bytes again, best from another replica, may help.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::ChecksumMismatch { .. } | Self::WrongLength { .. } | Self::WrongMagic { .. }
        )
    }

    pub(super) fn short(part: PackPart) -> impl Fn(Short) -> Self {
        move |short| Self::Truncated { part, at: short.at as u64, wanted: short.wanted as u64 }
    }
}

/// Compares a number that was read with its limit.
pub(super) fn at_most(
    part: PackPart,
    what: &'static str,
    found: u64,
    limit: u64,
) -> Result<(), PackError> {
    if found <= limit {
        return Ok(());
    }
    Err(PackError::OverLimit { part, what, found, limit })
}

/// Compares a number that was read with what the rest of the pack says.
pub(super) fn equal(
    part: PackPart,
    what: &'static str,
    found: u64,
    expected: u64,
) -> Result<(), PackError> {
    if found == expected {
        return Ok(());
    }
    Err(PackError::Contradiction { part, what, expected, found })
}

/// Pages that can't be put into a pack: a mistake of the caller, so trying again doesn't help.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum EncodeError {
    #[error(
        "encode a frame of {pages} pages: a frame takes 1 to {limit}; split the pages over several frames"
    )]
    FramePages { pages: usize, limit: usize },
    #[error(
        "encode a frame of {pages} pages: got {found} bytes of content, expected {expected}; pass whole pages, in order"
    )]
    ContentLength { pages: usize, expected: usize, found: usize },
    #[error(
        "encode a frame: page {page} stands after page {before}; sort the pages and name each once"
    )]
    NotAscending { before: PageIndex, page: PageIndex },
    #[error("store page {page}: no space has more than {limit} pages; check the space's size")]
    PageBeyondLimit { page: PageIndex, limit: u64 },
    #[error("name the spaces of a pack: got {found}, the limit is {limit}; split the VM's spaces")]
    TooManySpaces { found: usize, limit: usize },
    #[error("name the spaces of a pack: {name} is there twice; name each space once")]
    DuplicateSpace { name: SpaceName },
    #[error(
        "add to a pack: space number {space} is not among its {spaces} spaces; use the table that the pack was made with"
    )]
    UnknownSpace { space: u16, spaces: usize },
    #[error(
        "add to a pack: {what} would become {would_be}, the limit is {limit}; finish this pack and begin another"
    )]
    Full { what: &'static str, would_be: u64, limit: u64 },
    #[error("compress {what}; is the zstd level valid?")]
    Compress { what: &'static str, source: io::Error },
}
