//! Digests: what a page, a frame or a file holds, in 16 or 32 bytes of BLAKE3.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::units::PAGE_SIZE;

/// Text that is no digest in hexadecimal.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[error("{found:?} is no {what}; expected {digits} lower-case hex digits")]
pub struct DigestParseError {
    what: &'static str,
    digits: usize,
    found: String,
}

/// The content of one page: the first 16 bytes of its BLAKE3.
///
/// 128 bits decide whether a page equals the one in the last durable checkpoint of the *same* VM,
/// so an accidental collision is out of reach. Content that is shared between VMs goes by the full
/// [`ContentDigest`], because there an attacker could search for a collision.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageDigest(pub [u8; 16]);

impl PageDigest {
    /// The digest of a page of zeros.
    pub const ZERO_PAGE: Self = Self([
        0xb6, 0xfb, 0x73, 0xfc, 0x46, 0x93, 0x8c, 0x98, 0x1e, 0x2b, 0x0b, 0x4b, 0x1e, 0xf2, 0x82,
        0xad,
    ]);

    /// The digest of one page.
    pub fn of(page: &[u8]) -> Self {
        Self(truncated(page))
    }
}

/// Guards stored bytes against damage: the first 16 bytes of their BLAKE3.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Checksum(pub [u8; 16]);

impl Checksum {
    /// The checksum of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(truncated(bytes))
    }

    /// Of the two parts as if they were one. The long one goes first: BLAKE3 is a tenth faster on
    /// bytes that begin where one of its chunks does.
    pub(crate) fn of_both(long: &[u8], short: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(long).update(short);
        Self(first_half(hasher.finalize()))
    }
}

/// The content of a whole file or block: the full BLAKE3.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContentDigest(pub [u8; 32]);

impl ContentDigest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

/// Makes a [`ContentDigest`] of more bytes than fit in memory at once.
#[derive(Clone, Debug, Default)]
pub struct ContentHasher(blake3::Hasher);

impl ContentHasher {
    /// A hasher that has seen no bytes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes at the end.
    pub fn update(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update(bytes);
        self
    }

    /// The digest of all bytes so far.
    pub fn finish(&self) -> ContentDigest {
        ContentDigest(*self.0.finalize().as_bytes())
    }
}

/// Whether all bytes are zero. Compares with a page of zeros, because the C library's comparison is
/// the fastest there is and stops at the first difference.
pub fn is_zero(bytes: &[u8]) -> bool {
    static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
    bytes.chunks(PAGE_SIZE).all(|chunk| chunk == &ZEROS[..chunk.len()])
}

fn truncated(bytes: &[u8]) -> [u8; 16] {
    first_half(blake3::hash(bytes))
}

fn first_half(hash: blake3::Hash) -> [u8; 16] {
    let (half, _) = hash.as_bytes().split_first_chunk().expect("a BLAKE3 hash has 32 bytes");
    *half
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn parse_hex<const N: usize>(what: &'static str, text: &str) -> Result<[u8; N], DigestParseError> {
    let error = || DigestParseError {
        what,
        digits: 2 * N,
        // Enough to recognise it by; the text may be hostile and long.
        found: text.chars().take(2 * N + 1).collect(),
    };
    if text.len() != 2 * N {
        return Err(error());
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = hex_value(pair[0])
            .zip(hex_value(pair[1]))
            .map(|(high, low)| high << 4 | low)
            .ok_or_else(error)?;
    }
    Ok(bytes)
}

/// Lower case only: one content has one name.
fn hex_value(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

macro_rules! hex {
    ($($name:ident, $what:literal;)*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(f, &self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = DigestParseError;

            fn from_str(text: &str) -> Result<Self, DigestParseError> {
                parse_hex($what, text).map(Self)
            }
        }

        impl TryFrom<String> for $name {
            type Error = DigestParseError;

            fn try_from(text: String) -> Result<Self, DigestParseError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(digest: $name) -> String {
                digest.to_string()
            }
        }
    )*};
}

hex! {
    PageDigest, "page digest";
    Checksum, "checksum";
    ContentDigest, "content digest";
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_zero_page_is_known() {
        assert_eq!(PageDigest::of(&[0; PAGE_SIZE]), PageDigest::ZERO_PAGE);
    }

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        let mut bytes = vec![0; 3 * PAGE_SIZE + 5];
        assert!(is_zero(&bytes) && is_zero(&[]));
        for at in [0, 1, PAGE_SIZE - 1, PAGE_SIZE, 3 * PAGE_SIZE, 3 * PAGE_SIZE + 4] {
            bytes[at] = 0x10;
            assert!(!is_zero(&bytes), "missed a bit at {at}");
            bytes[at] = 0;
        }
    }

    #[test]
    fn hex_goes_there_and_back() {
        let digest = ContentDigest::of(b"stillpoint");
        assert_eq!(digest.to_string().parse(), Ok(digest));
    }

    #[test]
    fn other_spellings_are_refused() {
        let good = ContentDigest::of(b"").to_string();
        for bad in
            ["", &good[1..], &good.to_uppercase(), &format!("{good}0"), &good.replace('a', "g")]
        {
            assert!(bad.parse::<ContentDigest>().is_err(), "{bad} was accepted");
        }
        assert!("é".repeat(32).parse::<ContentDigest>().is_err());
    }

    #[test]
    fn hashing_in_parts_is_hashing_the_whole() {
        let mut hasher = ContentHasher::new();
        hasher.update(b"still").update(b"point");
        assert_eq!(hasher.finish(), ContentDigest::of(b"stillpoint"));
        assert_eq!(Checksum::of_both(b"still", b"point"), Checksum::of(b"stillpoint"));
    }
}
