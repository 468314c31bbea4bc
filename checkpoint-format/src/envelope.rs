//! The envelope of the text files: one line that says what follows, its version, digest and length;
//! then the body.
//!
//! ```text
//! stillpoint-manifest 1 <BLAKE3 of the body, 64 hex digits> <length of the body>\n
//! <body>
//! ```
//!
//! The line is outside of what it describes, so version and digest are checked before the body is
//! looked at.

use thiserror::Error;

use crate::digest::ContentDigest;
use crate::units::as_index;

/// Longest header line, its newline included.
pub const MAX_HEADER_LINE: usize = 256;

/// What a file of this kind begins with and how long it may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Envelope {
    pub kind: &'static str,
    pub version: u32,
    pub max_body: usize,
}

/// A text file whose envelope is wrong. The caller adds the file's name.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum EnvelopeError {
    #[error("read the {kind}: it begins with {found:?}; this is another kind of file, or damaged")]
    WrongKind { kind: &'static str, found: String },
    #[error(
        "read the {kind}: it has format version {found}, this program reads version {supported}; use a newer program"
    )]
    UnknownVersion { kind: &'static str, found: u32, supported: u32 },
    #[error(
        "read the {kind}: its header line {found:?} is not '{kind} <version> <digest> <length>'; the file is damaged"
    )]
    BadHeader { kind: &'static str, found: String },
    #[error(
        "read the {kind}: the body is {found} bytes long, the limit is {limit}; the file was not written by Stillpoint"
    )]
    TooLong { kind: &'static str, found: u64, limit: u64 },
    #[error(
        "read the {kind}: the body is {found} bytes long, its header line says {expected}; the file is cut short or was added to"
    )]
    WrongLength { kind: &'static str, expected: u64, found: u64 },
    #[error(
        "verify the {kind}: the body's digest is {found}, expected {expected}; the bytes are damaged, read them again from another replica"
    )]
    DigestMismatch { kind: &'static str, expected: ContentDigest, found: ContentDigest },
}

impl EnvelopeError {
    /// Whether reading the same bytes again, best from another replica, may help.
    pub fn is_retryable(&self) -> bool {
        !matches!(self, Self::UnknownVersion { .. } | Self::TooLong { .. })
    }
}

impl Envelope {
    pub(crate) fn wrap(&self, body: &[u8]) -> Result<Vec<u8>, EnvelopeError> {
        self.check_limit(body.len() as u64)?;
        let digest = ContentDigest::of(body);
        let line = format!("{} {} {digest} {}\n", self.kind, self.version, body.len());
        Ok([line.as_bytes(), body].concat())
    }

    /// The body, when everything that the header line says about it is true.
    pub(crate) fn unwrap<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], EnvelopeError> {
        let (line, body) = self.split(bytes)?;
        let (digest, len) = self.parse_line(line)?;
        self.check_limit(len)?;
        self.check_len(len, body.len() as u64)?;
        self.check_digest(digest, ContentDigest::of(body))?;
        Ok(body)
    }

    /// The body, when everything that the header line says about it is true; more may follow it.
    pub(crate) fn unwrap_front<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], EnvelopeError> {
        let len = as_index(self.front_len(bytes)?);
        self.unwrap(&bytes[..bytes.len().min(len)])
    }

    /// Bytes of header line and body, as the line says.
    pub(crate) fn front_len(&self, bytes: &[u8]) -> Result<u64, EnvelopeError> {
        let (line, _) = self.split(bytes)?;
        let (_, len) = self.parse_line(line)?;
        self.check_limit(len)?;
        Ok(line.len() as u64 + 1 + len)
    }

    /// Whether the header line says that the file has this version.
    pub(crate) fn is_version(&self, version: u32, bytes: &[u8]) -> bool {
        let words = self.split(bytes).ok().map(|(line, _)| line.split(' '));
        let mut words = words.into_iter().flatten();
        words.next() == Some(self.kind) && words.next().and_then(number) == Some(version)
    }

    fn split<'a>(&self, bytes: &'a [u8]) -> Result<(&'a str, &'a [u8]), EnvelopeError> {
        let head = &bytes[..bytes.len().min(MAX_HEADER_LINE)];
        if !head.starts_with(self.kind.as_bytes()) {
            return Err(EnvelopeError::WrongKind { kind: self.kind, found: excerpt(head) });
        }
        let end = head.iter().position(|&byte| byte == b'\n');
        let line = end.and_then(|end| std::str::from_utf8(&head[..end]).ok());
        match end.zip(line) {
            Some((end, line)) => Ok((line, &bytes[end + 1..])),
            None => Err(self.bad_header(head)),
        }
    }

    fn parse_line(&self, line: &str) -> Result<(ContentDigest, u64), EnvelopeError> {
        let bad = || self.bad_header(line.as_bytes());
        let mut words = line.split(' ');
        if words.next() != Some(self.kind) {
            return Err(bad());
        }
        let version: u32 = words.next().and_then(number).ok_or_else(bad)?;
        // Before the rest: a later version may have other fields there.
        self.check_version(version)?;
        let digest = words.next().and_then(|word| word.parse().ok());
        let len = words.next().and_then(number);
        match (digest, len, words.next()) {
            (Some(digest), Some(len), None) => Ok((digest, len)),
            _ => Err(bad()),
        }
    }

    fn bad_header(&self, line: &[u8]) -> EnvelopeError {
        EnvelopeError::BadHeader { kind: self.kind, found: excerpt(line) }
    }

    fn check_version(&self, found: u32) -> Result<(), EnvelopeError> {
        if found == self.version {
            return Ok(());
        }
        Err(EnvelopeError::UnknownVersion { kind: self.kind, found, supported: self.version })
    }

    fn check_limit(&self, found: u64) -> Result<(), EnvelopeError> {
        let limit = self.max_body as u64;
        if found <= limit {
            return Ok(());
        }
        Err(EnvelopeError::TooLong { kind: self.kind, found, limit })
    }

    fn check_len(&self, expected: u64, found: u64) -> Result<(), EnvelopeError> {
        if found == expected {
            return Ok(());
        }
        Err(EnvelopeError::WrongLength { kind: self.kind, expected, found })
    }

    fn check_digest(
        &self,
        expected: ContentDigest,
        found: ContentDigest,
    ) -> Result<(), EnvelopeError> {
        if found == expected {
            return Ok(());
        }
        Err(EnvelopeError::DigestMismatch { kind: self.kind, expected, found })
    }
}

/// Digits only, one spelling for each number: `parse` alone would take a sign and leading zeros.
fn number<T: std::str::FromStr + ToString>(word: &str) -> Option<T> {
    let value: T = word.parse().ok()?;
    (value.to_string() == word).then_some(value)
}

fn excerpt(bytes: &[u8]) -> String {
    const LONGEST: usize = 100;
    String::from_utf8_lossy(&bytes[..bytes.len().min(LONGEST)]).into_owned()
}

#[cfg(test)]
mod test {
    use super::*;

    const ENVELOPE: Envelope = Envelope { kind: "stillpoint-test", version: 2, max_body: 100 };

    fn wrapped() -> Vec<u8> {
        ENVELOPE.wrap(b"the body").expect("short")
    }

    fn error(bytes: &[u8]) -> EnvelopeError {
        ENVELOPE.unwrap(bytes).expect_err("damaged")
    }

    fn with(from: &str, to: &str) -> EnvelopeError {
        let text = String::from_utf8(wrapped()).expect("text");
        assert!(text.contains(from));
        error(text.replacen(from, to, 1).as_bytes())
    }

    #[test]
    fn the_body_comes_back() {
        assert_eq!(ENVELOPE.unwrap(&wrapped()), Ok(&b"the body"[..]));
    }

    #[test]
    fn each_damage_has_its_own_error() {
        assert!(matches!(with("the body", "the b0dy"), EnvelopeError::DigestMismatch { .. }));
        assert!(matches!(with("the body", "the bod"), EnvelopeError::WrongLength { found: 7, .. }));
        assert!(matches!(with("the body", "the body!"), EnvelopeError::WrongLength { .. }));
        assert!(matches!(with("test 2", "test 3"), EnvelopeError::UnknownVersion { found: 3, .. }));
        assert!(matches!(with("test 2", "test +2"), EnvelopeError::BadHeader { .. }));
        assert!(matches!(with("test 2", "testing 2"), EnvelopeError::BadHeader { .. }));
        assert!(matches!(with("test 2", "test2"), EnvelopeError::BadHeader { .. }));
        assert!(matches!(with(" 8\n", " 101\n"), EnvelopeError::TooLong { found: 101, .. }));
        assert!(matches!(with(" 8\n", " 08\n"), EnvelopeError::BadHeader { .. }));
        assert!(matches!(with(" 8\n", " 8 9\n"), EnvelopeError::BadHeader { .. }));
        assert!(matches!(with("still", "Still"), EnvelopeError::WrongKind { .. }));
        assert!(matches!(error(b""), EnvelopeError::WrongKind { .. }));
        let endless = [ENVELOPE.kind.as_bytes(), &[b'x'; 1000]].concat();
        assert!(matches!(error(&endless), EnvelopeError::BadHeader { .. }));
    }

    #[test]
    fn a_later_version_is_named_whatever_its_header_holds() {
        let later = error(b"stillpoint-test 7 something else entirely\nbody");
        assert!(matches!(later, EnvelopeError::UnknownVersion { found: 7, .. }));
    }

    #[test]
    fn nothing_is_wrapped_that_could_not_be_read() {
        assert!(matches!(ENVELOPE.wrap(&[0; 101]), Err(EnvelopeError::TooLong { .. })));
    }
}
