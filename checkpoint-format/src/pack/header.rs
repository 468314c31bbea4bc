//! The first 64 bytes of a pack: what it is, read before anything else is believed.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::error::{PackError, PackPart};
use crate::digest::{Checksum, ContentHasher, DigestParseError};
use crate::units::count;
use crate::wire::Reader;

/// The version that this program writes and reads.
pub const PACK_VERSION: u32 = 1;
/// Bytes of a pack's header.
pub const HEADER_LEN: usize = 64;

const MAGIC: [u8; 8] = *b"STLPPACK";
const CHECKED_LEN: usize = HEADER_LEN - size_of::<Checksum>();

/// Which pack this is; saved in its header, its trailer and the manifest, so that no file can take
/// another's place.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PackId(pub [u8; 16]);

impl PackId {
    /// An id from things that are together unique: the VM's instance, the checkpoint, the writer's
    /// epoch, a count.
    ///
    /// # Panics
    /// Never: a digest is longer than an ID.
    pub fn derive(parts: &[&str]) -> Self {
        let mut hasher = ContentHasher::new();
        hasher.update(b"stillpoint pack id");
        for part in parts {
            // Lengths keep ("ab", "c") apart from ("a", "bc").
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        let digest = hasher.finish();
        let (half, _) = digest.0.split_first_chunk().expect("a digest has 32 bytes");
        Self(*half)
    }
}

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Checksum(self.0), f)
    }
}

impl fmt::Debug for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackId({self})")
    }
}

impl TryFrom<String> for PackId {
    type Error = DigestParseError;

    fn try_from(text: String) -> Result<Self, DigestParseError> {
        text.parse::<Checksum>().map(|hex| Self(hex.0))
    }
}

impl From<PackId> for String {
    fn from(id: PackId) -> String {
        id.to_string()
    }
}

/// | at | bytes | field |
/// | -- | ----- | ----- |
/// | 0  | 8     | magic `STLPPACK` |
/// | 8  | 4     | format version |
/// | 12 | 4     | length of this header, 64 |
/// | 16 | 16    | pack id |
/// | 32 | 16    | reserved, zero |
/// | 48 | 16    | checksum of bytes 0..48 |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackHeader {
    /// The pack's ID.
    pub id: PackId,
}

impl PackHeader {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN);
        bytes.extend(MAGIC);
        bytes.extend(PACK_VERSION.to_le_bytes());
        bytes.extend(count(HEADER_LEN).to_le_bytes());
        bytes.extend(self.id.0);
        bytes.resize(CHECKED_LEN, 0);
        bytes.extend(Checksum::of(&bytes).0);
        bytes
    }

    /// Reads the first [`HEADER_LEN`] bytes of a pack.
    ///
    /// # Errors
    /// When the bytes are damaged or of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self, PackError> {
        const PART: PackPart = PackPart::Header;
        check_fixed_len(PART, bytes, HEADER_LEN)?;
        let mut reader = Reader::new(bytes);
        check_magic(PART, MAGIC, reader.array().map_err(PackError::short(PART))?)?;
        // The version comes before the checksum: a later one may well lay out the rest in another
        // way.
        check_version(reader.u32().map_err(PackError::short(PART))?)?;
        check_own_checksum(PART, bytes)?;
        let len = reader.u32().map_err(PackError::short(PART))?;
        super::error::equal(PART, "header length", len.into(), HEADER_LEN as u64)?;
        let id = PackId(reader.array().map_err(PackError::short(PART))?);
        Ok(Self { id })
    }
}

fn check_version(found: u32) -> Result<(), PackError> {
    if found == PACK_VERSION {
        return Ok(());
    }
    Err(PackError::UnknownVersion { part: PackPart::Header, found, supported: PACK_VERSION })
}

pub(super) fn check_fixed_len(part: PackPart, bytes: &[u8], len: usize) -> Result<(), PackError> {
    if bytes.len() == len {
        return Ok(());
    }
    Err(PackError::WrongLength { part, expected: len as u64, found: bytes.len() as u64 })
}

pub(super) fn check_magic(
    part: PackPart,
    expected: [u8; 8],
    found: [u8; 8],
) -> Result<(), PackError> {
    if found == expected {
        return Ok(());
    }
    Err(PackError::WrongMagic { part, expected, found })
}

/// For a part whose last 16 bytes are the checksum of all before them.
pub(super) fn check_own_checksum(part: PackPart, bytes: &[u8]) -> Result<(), PackError> {
    let (checked, checksum) = bytes
        .split_last_chunk()
        .expect("the caller has checked the fixed length, which holds a checksum");
    check_checksum(part, Checksum(*checksum), Checksum::of(checked))
}

pub(super) fn check_checksum(
    part: PackPart,
    expected: Checksum,
    found: Checksum,
) -> Result<(), PackError> {
    if found == expected {
        return Ok(());
    }
    Err(PackError::ChecksumMismatch { part, expected, found })
}

#[cfg(test)]
mod test {
    use super::*;

    const ID: PackId = PackId([7; 16]);

    #[test]
    fn goes_there_and_back_in_64_bytes() {
        let bytes = PackHeader { id: ID }.encode();
        assert_eq!(bytes.len(), HEADER_LEN);
        assert_eq!(PackHeader::parse(&bytes).expect("sound").id, ID);
    }

    #[test]
    fn each_damage_has_its_own_error() {
        let good = PackHeader { id: ID }.encode();
        let with = |at: usize| {
            let mut bad = good.clone();
            bad[at] ^= 1;
            PackHeader::parse(&bad).expect_err("damaged")
        };
        assert!(matches!(with(0), PackError::WrongMagic { .. }));
        assert!(matches!(with(8), PackError::UnknownVersion { found: 0, .. }));
        assert!(matches!(with(20), PackError::ChecksumMismatch { .. }));
        assert!(matches!(with(40), PackError::ChecksumMismatch { .. }));
        let cut = PackHeader::parse(&good[..63]).expect_err("cut");
        assert!(matches!(cut, PackError::WrongLength { found: 63, .. }));
    }

    #[test]
    fn derived_ids_keep_their_parts_apart() {
        assert_ne!(PackId::derive(&["ab", "c"]), PackId::derive(&["a", "bc"]));
        assert_eq!(PackId::derive(&["a"]), PackId::derive(&["a"]));
    }
}
